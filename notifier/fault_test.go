package notifier

import (
	"context"
	"fmt"
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"

	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// What is no address and what cannot be believed is said once, however often it
// is read, and hides nobody.
func TestGarbage(t *testing.T) {
	w := newWorld(t)
	w.join(web, 1, 1)
	keys := w.store.Keys()
	must(t, w.rdb.ZAdd(t.Context(), keys.Instances(web), redis.Z{Score: 1, Member: "no address"}).Err())
	must(t, w.rdb.ZAdd(t.Context(), keys.Instances(web), redis.Z{Score: 1, Member: host(2).String()}).Err())
	must(t, w.rdb.HSet(t.Context(), keys.Meta(web), host(2).String(), "{").Err())
	must(t, w.rdb.SAdd(t.Context(), keys.Services(), "NO SERVICE").Err())
	f := w.follow(Config{Poll: 20 * time.Millisecond, Full: 20 * time.Millisecond})
	f.sees(web, 1, weight(1))
	f.sees(web, 2, func(e registrar.Entry) error {
		if e.Garbage == "" || e.Present {
			return fmt.Errorf("want garbage")
		}
		return nil
	})
	eventually(t, func() error {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.fulls < 10 {
			return fmt.Errorf("%d whole reads, want 10", f.fulls)
		}
		return nil
	})
	for _, what := range []string{"no address", host(2).String(), "NO SERVICE"} {
		f.logged(fmt.Sprintf(`:%q`, what), 1)
	}
	if len(f.w.followed) != 1 {
		t.Errorf("%d services followed, want 1", len(f.w.followed))
	}
}

// A service that cannot be read stops nobody, costs little and is said once.
func TestBrokenService(t *testing.T) {
	w := newWorld(t)
	const bad registrar.Service = "bad"
	w.join(bad, 1, 1)
	w.join(web, 1, 1)
	key := w.store.Keys().Admin(bad)
	must(t, w.rdb.Set(t.Context(), key, "no hash", 0).Err())
	f := w.follow(Config{Services: []registrar.Service{bad, web}, Poll: time.Hour})
	f.subscribed()
	f.logged("cannot read this service", 1)
	f.sees(web, 1, weight(1))
	for i := range 300 {
		w.publish(fmt.Sprintf("1 bad %d", i))
		if i%10 == 0 {
			w.join(web, 1, i/10+100)
		}
	}
	f.sees(web, 1, weight(129))
	_, failed := w.calls("evalsha_ro")
	t.Logf("%d reads of it failed", failed)
	if failed > 12 {
		t.Errorf("%d reads failed, want a few at the pace of the retries", failed)
	}
	f.logged("redis does not answer", 0)
	must(t, w.rdb.Del(t.Context(), key).Err())
	f.sees(bad, 1, weight(1))
	f.logged("cannot read this service", 1)
	f.logged("service can be read again", 1)
}

// A list of services that cannot be read leaves those that are known.
func TestBrokenList(t *testing.T) {
	w := newWorld(t)
	w.join(web, 1, 1)
	f := w.follow(Config{Poll: 50 * time.Millisecond})
	f.subscribed()
	f.sees(web, 1, weight(1))
	key := w.store.Keys().Services()
	must(t, w.rdb.Set(t.Context(), key, "no set", 0).Err())
	f.logged("cannot list the services", 1)
	// A beat checks the types before it writes; so this is done by hand.
	must(t, w.rdb.HSet(t.Context(), w.store.Keys().Meta(web), host(1).String(), metaOf(1, 2)).Err())
	must(t, w.rdb.Incr(t.Context(), w.store.Keys().ServiceVersion(web)).Err())
	f.sees(web, 1, weight(2))
	must(t, w.rdb.Del(t.Context(), key).Err())
	w.join("new", 3, 3)
	f.sees("new", 3, weight(3))
	f.logged("cannot list the services", 1)
	f.logged("redis does not answer", 0)
}

// Counters that somebody has written over.
func TestWrittenOver(t *testing.T) {
	version := func(w *world) string { return w.store.Keys().ServiceVersion(web) }
	epoch := func(w *world) string { return w.store.Keys().Epoch() }
	for _, tc := range []struct {
		name        string
		key         func(*world) string
		value       string
		repair      string // without it no change is accepted
		interrupted int
	}{
		{"smaller version", version, "2", "", 1},
		{"version 0", version, "0", "", 1},
		{"version of text", version, "abc", "3", 1},
		{"empty version", version, "", "3", 1},
		{"greater version", version, "100", "", 0},
		{"another epoch", epoch, "other", "", 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			for i := range 5 {
				w.join(web, 1, i)
			}
			f := w.follow(Config{Services: []registrar.Service{web}, Poll: 30 * time.Millisecond})
			f.subscribed()
			f.sees(web, 1, weight(4))
			fulls := f.wholeReads()
			must(t, w.rdb.Set(t.Context(), tc.key(w), tc.value, 0).Err())
			eventually(t, func() error {
				if n := f.wholeReads(); n == fulls {
					return fmt.Errorf("not noticed: %d whole reads", n)
				}
				return nil
			})
			if tc.repair != "" {
				must(t, w.rdb.Set(t.Context(), tc.key(w), tc.repair, 0).Err())
			}
			w.join(web, 1, 9)
			f.sees(web, 1, weight(9))
			w.join(web, 1, 10)
			f.sees(web, 1, weight(10))
			if n := f.interruptions(web); n != tc.interrupted {
				t.Errorf("%d interruptions, want %d", n, tc.interrupted)
			}
		})
	}
}

// Nothing that anybody can send costs more than a few reads.
func TestForgedMessages(t *testing.T) {
	const many = 3000
	for _, tc := range []struct {
		name    string
		payload func(i int) string
		all     bool
		paced   bool // true messages may wait for a second then
		least   int  // reads, of versions and of services, that it causes
		most    int
	}{
		{name: "garbage", payload: func(i int) string {
			return []string{"", "x", "1 web", "1 web x", "1 web -1", "-1 web 99", "1 WEB 99", "1 web 99 9", "1 other 99",
				"1 web 99999999999999999999"}[i%10]
		}},
		{name: "what has been read", payload: func(int) string { return "1 web 1" }},
		{name: "what is not there", payload: func(i int) string { return fmt.Sprint("1 web ", 100+i) }, paced: true, least: 1, most: 3},
		{name: "global versions that are not there", payload: func(i int) string { return fmt.Sprint(100+i, " other 1") }, paced: true, most: 3},
		{name: "strangers", payload: func(i int) string { return fmt.Sprintf("1 stranger%d 1", i) }, all: true, paced: true, least: 1, most: 3},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.join(web, 1, 1)
			cfg := Config{Services: []registrar.Service{web}, Poll: time.Hour}
			if tc.all {
				cfg.Services = nil
			}
			f := w.follow(cfg)
			f.settled()
			before, _ := w.calls("evalsha_ro")
			began := time.Now()
			_, err := w.rdb.Pipelined(t.Context(), func(p redis.Pipeliner) error {
				for i := range many {
					p.Publish(t.Context(), w.store.Keys().Changes(), tc.payload(i))
				}
				return nil
			})
			must(t, err)
			for i := range 50 { // and some that cannot be one read
				w.publish(tc.payload(i))
			}
			eventually(t, func() error { // what comes with the true message may be one read with it
				if n, _ := w.calls("evalsha_ro"); n-before < tc.least {
					return fmt.Errorf("%d reads, want %d", n-before, tc.least)
				}
				return nil
			})
			w.join(web, 1, 2) // a true message behind them
			f.sees(web, 1, weight(2))
			took := time.Since(began)
			after, _ := w.calls("evalsha_ro")
			reads := after - before - 1 // one for the true message
			t.Logf("%d messages: %d reads in %v", many+50, reads, took)
			if most := tc.most + int(took/time.Second); reads < tc.least || reads > most {
				t.Errorf("%d reads, want %d to %d", reads, tc.least, most)
			}
			for n := 3; !tc.paced && took > 500*time.Millisecond; n++ { // on a busy machine, too
				if n == 10 {
					t.Fatalf("the true message was followed after %v at the soonest", took)
				}
				began := time.Now()
				for i := range 50 {
					w.publish(tc.payload(i))
				}
				w.join(web, 1, n)
				f.sees(web, 1, weight(n))
				took = min(took, time.Since(began))
			}
			must(t, f.stop())
			if h, n := len(f.w.hints), len(f.w.waiting); h > 1 || n > 1 || len(f.w.followed) != 1 {
				t.Errorf("%d and %d hints, %d services are remembered", h, n, len(f.w.followed))
			}
		})
	}
}

// Services come and go; one that went is remembered while Redis does.
func TestServicesComeAndGo(t *testing.T) {
	w := newWorld(t)
	f := w.follow(Config{Poll: 50 * time.Millisecond})
	f.subscribed()
	w.join(web, 1, 1)
	f.sees(web, 1, weight(1))
	w.join("api", 2, 2)
	f.sees("api", 2, weight(2))
	w.leave(web, 1, registrar.Left)
	f.sees(web, 1, gone(registrar.Left))
	w.joinMute(web, 5, 3)
	f.sees(web, 5, weight(3))
	must(t, w.rdb.FlushAll(t.Context()).Err())
	f.sees(web, 1, absent)
	f.sees("api", 2, absent)
	eventually(t, func() error {
		f.w.mu.Lock()
		defer f.w.mu.Unlock()
		if n := len(f.w.followed); n != 0 {
			return fmt.Errorf("%d services followed, want none", n)
		}
		return nil
	})
	w.join(web, 1, 4)
	f.sees(web, 1, weight(4))
	if n, m := f.interruptions(web), f.interruptions("api"); n != 1 || m != 1 {
		t.Errorf("%d and %d interruptions, want 1 each", n, m)
	}
	f.logged(`"level":"warn"`, 0)
}

// More services than one poll reads at once.
func TestManyServices(t *testing.T) {
	w := newWorld(t)
	const many = 2*pollChunk + 100
	name := func(i int) registrar.Service { return registrar.Service(fmt.Sprint("s", i)) }
	keys := w.store.Keys()
	_, err := w.rdb.Pipelined(t.Context(), func(p redis.Pipeliner) error {
		for i := range many {
			p.SAdd(t.Context(), keys.Services(), string(name(i)))
			p.ZAdd(t.Context(), keys.Instances(name(i)), redis.Z{Score: 1, Member: host(i).String()})
			p.Set(t.Context(), keys.ServiceVersion(name(i)), 1, 0)
		}
		return nil
	})
	must(t, err)
	cfg := Config{Poll: 200 * time.Millisecond}
	for i := range many {
		cfg.Services = append(cfg.Services, name(i))
	}
	f := w.follow(cfg)
	eventually(t, func() error {
		f.mu.Lock()
		defer f.mu.Unlock()
		if len(f.views) != many {
			return fmt.Errorf("%d services known, want %d", len(f.views), many)
		}
		return nil
	})
	f.subscribed()
	for _, i := range []int{0, pollChunk - 1, pollChunk, many - 1} {
		w.joinMute(name(i), i, 7)
	}
	for _, i := range []int{0, pollChunk - 1, pollChunk, many - 1} {
		f.sees(name(i), i, weight(7))
	}
}

// A fail-over behind one name: the pool is moved, the subscription's old server
// still answers it. The Watcher sees that the servers differ.
func TestSubscriptionMoves(t *testing.T) {
	t.Parallel()
	w, other := newWorld(t), newWorld(t)
	w.join(web, 1, 1)
	var addr atomic.Pointer[string]
	addr.Store(&w.srv.Addr)
	f := follow(t, open(t, "127.0.0.1:1", func(o *redis.Options) {
		o.Dialer = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, *addr.Load())
		}
	}), Config{Services: []registrar.Service{web}, Poll: time.Hour})
	f.settled()
	addr.Store(&other.srv.Addr)
	must(t, w.rdb.ClientKillByFilter(t.Context(), "TYPE", "normal", "SKIPME", "yes").Err())
	eventually(t, func() error {
		n, err := other.rdb.PubSubNumSub(t.Context(), w.store.Keys().Changes()).Result()
		if err != nil {
			return err
		}
		for _, c := range n {
			if c == 1 {
				return nil
			}
		}
		return fmt.Errorf("subscribers of the new server: %v", n)
	})
	f.logged("another server answers the reads", 1)
	other.join(web, 2, 2)
	f.sees(web, 2, weight(2))
	if n := f.interruptions(web); n != 1 {
		t.Errorf("%d interruptions, want 1", n)
	}
}

// After an outage long enough for the longest pauses, a Redis that is back is
// heard within 3 s, whatever the poll.
func TestLongOutage(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.join(web, 1, 1)
	f := w.follow(Config{Services: []registrar.Service{web}, Poll: time.Hour})
	f.settled()
	w.srv.Kill(t)
	before := f.dials.Load()
	eventually(t, func() error {
		if n := f.dials.Load() - before; n < 10 { // the pool dials once a second
			return fmt.Errorf("%d connections tried, want 10", n)
		}
		return nil
	})
	w.srv.Launch(t)
	back := time.Now()
	w.allowMute() // the new process knows nobody
	w.joinMute(web, 2, 2)
	f.sees(web, 2, weight(2))
	took := time.Since(back)
	t.Logf("Redis was heard %v after it was back", took)
	if took > 3*time.Second {
		t.Errorf("heard after %v, want 3 s at most", took)
	}
	f.subscribed()
}

// A read that Redis refuses is tried again, though its one message has come and
// the subscription is well.
func TestReadsRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.join(web, 1, 1)
	f := w.follow(Config{Services: []registrar.Service{web}, Poll: time.Hour})
	f.settled()
	admit := func(clients string) {
		must(t, w.rdb.ConfigSet(t.Context(), "maxclients", clients).Err())
	}
	admit("2") // this test and the subscription
	must(t, w.rdb.ClientKillByFilter(t.Context(), "TYPE", "normal", "SKIPME", "yes").Err())
	w.join(web, 1, 2)
	f.logged("redis does not answer", 1)
	admit("10000")
	f.sees(web, 1, weight(2))
	f.logged("redis answers again", 1)
	f.logged("no subscription", 0)
}

func TestRunEnds(t *testing.T) {
	for _, tc := range []struct {
		name string
		do   func(*world, *follower)
	}{
		{"idle", func(*world, *follower) {}},
		{"redis hangs", func(w *world, f *follower) {
			w.srv.Signal(w.tb, syscall.SIGSTOP)
			w.tb.Cleanup(func() { w.srv.Signal(w.tb, syscall.SIGCONT) })
			f.logged("redis does not answer", 1)
		}},
		{"redis has gone", func(w *world, f *follower) {
			w.srv.Kill(w.tb)
			f.logged("no subscription", 1)
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.join(web, 1, 1)
			f := w.follow(Config{Services: []registrar.Service{web}, Poll: 50 * time.Millisecond})
			f.subscribed()
			tc.do(w, f)
			began := time.Now()
			must(t, f.stop())
			took := time.Since(began)
			t.Logf("ended after %v", took)
			// One exchange, which go-redis ends at its deadline only.
			if most := 2 * registrar.Timeout; took > most {
				t.Errorf("ended after %v, want at most %v", took, most)
			}
		})
	}
}

// Refresh reads the whole, also when nothing has changed.
func TestRefresh(t *testing.T) {
	w := newWorld(t)
	w.join(web, 1, 1)
	f := w.follow(Config{Services: []registrar.Service{web}, Poll: time.Hour})
	f.subscribed()
	f.sees(web, 1, weight(1))
	// Nobody announces it and no version tells.
	must(t, w.rdb.HSet(t.Context(), w.store.Keys().Meta(web), host(1).String(), metaOf(1, 5)).Err())
	f.w.Refresh("other") // is nobody's
	f.w.Refresh(web)
	f.sees(web, 1, weight(5))
	must(t, f.stop())
	if f.views["other"] != nil || len(f.w.hints) != 0 {
		t.Errorf("other handed out %v, hints %v; want none", f.views["other"] != nil, f.w.hints)
	}
}

// However rare the poll, retries go on.
func TestRetryPace(t *testing.T) {
	for _, tc := range []struct{ poll, want time.Duration }{
		{time.Hour, lastRetry}, {lastRetry, lastRetry}, {50 * time.Millisecond, 50 * time.Millisecond},
	} {
		w, err := New(Config{Poll: tc.poll}, nil, zerolog.Nop())
		must(t, err)
		if got := w.retry(); got != tc.want {
			t.Errorf("poll %v: retries at most %v apart, want %v", tc.poll, got, tc.want)
		}
	}
}

// Redis may come after its watcher.
func TestRedisComesLater(t *testing.T) {
	for _, tc := range []struct {
		name string
		svcs []registrar.Service
	}{
		{"named", []registrar.Service{web}},
		{"all", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			srv := redistest.Start(t)
			w := &world{tb: t, srv: srv, rdb: srv.Client(t)}
			w.store = storeOn(t, w.rdb)
			srv.Kill(t)
			f := w.follow(Config{Services: tc.svcs, Poll: time.Second})
			f.logged("redis does not answer", 1)
			eventually(t, func() error {
				if n := f.dials.Load(); n < 8 { // the pool itself dials once a second
					return fmt.Errorf("%d connections tried", n)
				}
				return nil
			})
			f.logged("redis answers again", 0)
			srv.Launch(t)
			w.join(web, 1, 1)
			f.sees(web, 1, weight(1))
			f.subscribed()
			f.logged("redis does not answer", 1)
			f.logged("redis answers again", 1)
			f.logged("no subscription", 1)
			if n := f.interruptions(web); n != 0 {
				t.Errorf("%d interruptions of what has just begun", n)
			}
		})
	}
}
