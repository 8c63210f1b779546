package lbsync_test

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"rollcall/lbsync"
	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
)

// cpu is what this process has used so far.
func cpu(t *testing.T) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// TestHAProxysOwnChanges: what HAProxy changes by itself is said soon, with the default
// times and many servers. How soon, and what all of it costs, is printed; the checks of
// 1,000 servers would be most of that.
func TestHAProxysOwnChanges(t *testing.T) {
	t.Parallel()
	const servers = 200
	w := newWorld(t, haproxytest.Backend{Name: "be", Slots: servers, Check: true, Extra: []string{"default-server inter 1s fall 1 rise 1"}}, "")
	w.cfg.Backends[0].Mode = lbsync.Slots
	w.run(t, w.client(t))
	a := haproxytest.NewInstance(t)
	w.beat(t, a.Addr(), 100)
	all, err := net.Listen("tcp", "0.0.0.0:0") // the other instances, whose checks succeed
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})}
	var serving sync.WaitGroup
	serving.Go(func() { _ = srv.Serve(all) }) // until it is closed
	t.Cleanup(func() { _ = srv.Close(); serving.Wait() })
	port := uint16(all.Addr().(*net.TCPAddr).Port)
	for n := range servers - 1 {
		w.beat(t, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 99, byte(n / 250), byte(1 + n%250)}), port), 100)
	}
	first := func() registrar.ServerState { return w.sight(t).Servers[a.Addr()]["be"] }
	await := func(what string, ok func(registrar.ServerState) bool) {
		t.Helper()
		begun := time.Now()
		haproxytest.Poll(t, what, func() error {
			if st := first(); !ok(st) {
				return fmt.Errorf("%+v", st)
			}
			return nil
		})
		took := time.Since(begun)
		t.Logf("%s: said after %v", what, took.Round(time.Millisecond))
		if took > 12*time.Second { // 3 s are promised, of a machine that is not busy
			t.Errorf("%s: said after %v", what, took)
		}
	}
	haproxytest.Poll(t, "all have a server", func() error {
		s := w.sight(t)
		n := s.Counts["be"]
		if n.Registered != servers || n.Serving != servers || s.Version < servers {
			return fmt.Errorf("%+v at version %d", n, s.Version)
		}
		return nil
	})
	a.SetHealthy(false)
	await("its check fails", func(st registrar.ServerState) bool {
		return st.Reason() == registrar.ReasonDown && st.Why != "" && st.Since > 0
	})
	a.SetHealthy(true)
	await("its check succeeds", func(st registrar.ServerState) bool { return st.Serving() && st.Since == 0 && st.Why == "" })
	w.ha.Command(t, "set server be/"+first().Server+" state maint")
	await("a human puts it into maint", func(st registrar.ServerState) bool { return st.Reason() == registrar.NoteHuman })
	w.ha.Command(t, "set server be/"+first().Server+" state ready")
	await("and ready again", registrar.ServerState.Serving)

	rdb := w.redis.Client(t)
	at := func() string { return rdb.HGet(t.Context(), "rollcall:{web}:seen:test", "at").Val() }
	begun, used, before := time.Now(), cpu(t), at()
	haproxytest.Poll(t, "it looks again", func() error {
		if now := at(); now == before {
			return fmt.Errorf("at %s", now)
		}
		return nil
	})
	t.Logf("%v without a change, with %d servers: %.1f %% of a core", time.Since(begun).Round(time.Second), servers, 100*float64(cpu(t)-used)/float64(time.Since(begun)))
}
