package lbsync_test

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"rollcall/lbsync"
	"rollcall/lbsync/haproxy"
	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// pass runs a Syncer on the backends of a real HAProxy for a time by a simulated clock,
// and play beside it until its context ends.
func pass(t *testing.T, span time.Duration, ha *haproxytest.HAProxy, url string, probe time.Duration, said *lockedLog, play func(context.Context), backends ...string) {
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
		cfg := lbsync.Config{ID: "test", Allow: loopback, Probe: probe}
		for _, b := range backends {
			cfg.Backends = append(cfg.Backends, lbsync.BackendConfig{Service: "web", Backend: b, Mode: lbsync.Auto})
		}
		s, err := lbsync.New(cfg, bal, store, log)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), span)
		defer cancel()
		var playing sync.WaitGroup
		playing.Go(func() { play(ctx) })
		if err := s.Run(ctx); err != nil {
			t.Error(err)
		}
		playing.Wait()
		if err := bal.Close(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
		if err := rdb.Close(); err != nil {
			t.Error(err)
		}
		// go-redis dials on once a second until it sees that its pool is closed.
		<-time.After(2 * time.Second)
	})
}

// TestManyRestarts has HAProxy die, come back and be reloaded every 20 s, for 20 minutes by
// a simulated clock, with backends that are filled anew each time: with added servers,
// with more instances than slots, with a static balance algorithm. The first times
// are said, and the log does not grow with the rest.
func TestManyRestarts(t *testing.T) {
	w := &world{redis: redistest.Start(t), token: map[netip.AddrPort]string{}}
	w.ha = haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{
		{Name: "added", Balance: "leastconn"},
		{Name: "few", Balance: "leastconn", Slots: 1},
		{Name: "static", Balance: "static-rr", Slots: 5},
	}})
	store, err := registrar.NewStore(w.redis.Client(t), registrar.DefaultNamespace)
	if err != nil {
		t.Fatal(err)
	}
	w.store = store
	for range 2 {
		w.beat(t, haproxytest.NewInstance(t).Addr(), 100)
	}
	// A subscription would be read from for ever, and the simulated clock not go on.
	if err := w.redis.Client(t).Do(t.Context(), "acl", "setuser", "default", "-subscribe", "-ssubscribe").Err(); err != nil {
		t.Fatal(err)
	}
	// A process is started and ended on the true clock: outside of the bubble.
	// The simulated clock stands still while somebody in it waits for played.
	play, played, done := make(chan func(testing.TB)), make(chan struct{}), make(chan struct{})
	var playing sync.WaitGroup
	defer playing.Wait()
	defer close(done)
	playing.Go(func() {
		defer close(played) // a step that fails ends this goroutine
		for {
			select {
			case <-done:
				return
			case step := <-play:
				step(t)
			}
			played <- struct{}{}
		}
	})
	said := &lockedLog{}
	restarts := 0
	pass(t, 20*time.Minute, w.ha, w.redis.URL(), 2*time.Second, said, func(ctx context.Context) {
		for ctx.Err() == nil {
			for _, step := range []func(testing.TB){w.ha.Kill, w.ha.Restart, w.ha.Reload} {
				wait := time.NewTimer(7 * time.Second)
				select {
				case <-ctx.Done():
					wait.Stop()
					return
				case <-wait.C:
				}
				play <- step
				if _, ok := <-played; !ok {
					return
				}
			}
			restarts++
		}
	}, "added", "few", "static")
	lines := strings.Count(said.String(), "\n")
	t.Logf("%d restarts, %d lines", restarts, lines)
	if restarts < 50 || lines > 100 {
		t.Errorf("%d restarts, %d lines, want at most 100:\n%s", restarts, lines, said)
	}
	// The first times are said both ways.
	for words, n := range map[string]int{"balancer does not answer": 8, "balancer found": 16, "balancer unknown": 10, "balancer answers again": 10, "filled again": 10} {
		if got := strings.Count(said.String(), words); got < n {
			t.Errorf("%d lines with %q, want %d at least:\n%s", got, words, n, said)
		}
	}
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
	said := &lockedLog{}
	pass(t, time.Hour, ha, "redis://"+l.Addr().String()+"/0", time.Minute, said, func(context.Context) {}, "be")
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
