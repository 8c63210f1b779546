package lbsync_test

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"rollcall/lbsync"
	"rollcall/lbsync/haproxy"
	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
)

// hour runs a Syncer on a real HAProxy for an hour by a simulated clock, and
// returns its log.
func hour(t *testing.T, ha *haproxytest.HAProxy, url string) *lockedLog {
	said := &lockedLog{}
	log := zerolog.New(said).Level(zerolog.InfoLevel)
	synctest.Test(t, func(t *testing.T) {
		rdb, err := registrar.Open(url, 3)
		if err != nil {
			t.Fatal(err)
		}
		store, err := registrar.NewStore(rdb, registrar.DefaultNamespace)
		if err != nil {
			t.Fatal(err)
		}
		bal, err := haproxy.New(haproxy.Config{Socket: ha.Socket}, log)
		if err != nil {
			t.Fatal(err)
		}
		cfg := lbsync.Config{ID: "test", Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, Probe: time.Minute}
		cfg.Backends = []lbsync.BackendConfig{{Service: "web", Backend: "be", Mode: lbsync.Auto}}
		s, err := lbsync.New(cfg, bal, store, log)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if err := s.Run(ctx); err != nil {
			t.Error(err)
		}
		if err := bal.Close(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
		if err := rdb.Close(); err != nil {
			t.Error(err)
		}
		// go-redis dials on once a second until it sees that its pool is closed.
		<-time.After(2 * time.Second)
	})
	return said
}

// TestHourWithoutRedis counts what lbsync says in an hour in which nobody listens
// where Redis was.
func TestHourWithoutRedis(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	ha := haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 5}}})
	said := hour(t, ha, "redis://"+l.Addr().String()+"/0")
	if n := strings.Count(said.String(), "\n"); n != 3 { // the balancer found, no answer, no subscription
		t.Errorf("%d lines, want 3:\n%s", n, said)
	}
}

// TestKeptIsSaidOnce has Redis lose everything: of the servers that are kept for that
// there is one line, and not one for each.
func TestKeptIsSaidOnce(t *testing.T) {
	w := newWorld(t, haproxytest.Backend{Name: "be", Slots: 20}, "")
	said := &lockedLog{}
	w.log = zerolog.New(said).Level(zerolog.InfoLevel)
	w.cfg.Allow = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	want := map[string]string{}
	for i := range 9 {
		a := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)}), 80)
		w.beat(t, a, 1)
		want[a.String()] = "ready 1"
	}
	w.run(t, w.client(t))
	w.want(t, "be", want)
	if err := w.redis.Client(t).FlushAll(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	haproxytest.Poll(t, "lbsync says what it keeps", func() error { return said.since(`"message":"kept"`, `"instances":9`, 1) })
	if err := said.since(`"message":"kept"`, "", 2); err == nil {
		t.Errorf("more than one line:\n%s", said)
	}
	w.want(t, "be", want)
}
