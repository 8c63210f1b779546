package notifier

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"

	"rollcall/registrar"
)

func TestNew(t *testing.T) {
	store := storeOn(t, open(t, "127.0.0.1:1", nil))
	for _, tc := range []struct {
		name string
		cfg  Config
		ok   bool
	}{
		{"defaults", Config{}, true},
		{"poll alone", Config{Poll: time.Hour}, true},
		{"equal", Config{Poll: time.Second, Full: time.Second}, true},
		{"full before poll", Config{Poll: time.Second, Full: time.Second - 1}, false},
		{"negative poll", Config{Poll: -1}, false},
		{"negative full", Config{Full: -1}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := New(tc.cfg, store, zerolog.Nop()); (err == nil) != tc.ok {
				t.Errorf("error %v, want ok %v", err, tc.ok)
			}
		})
	}
}

// Messages alone carry a history, in its order.
func TestFollow(t *testing.T) {
	w := newWorld(t)
	w.join(web, 1, 10)
	w.join("other", 1, 1)
	f := w.follow(Config{Services: []registrar.Service{web}, Poll: time.Hour})
	f.subscribed()
	f.sees(web, 1, weight(10))
	f.mu.Lock()
	if f.fulls != 1 || f.interrupted[web] != 0 {
		t.Errorf("begins with %d whole reads, %d interruptions; want one whole read that follows nothing", f.fulls, f.interrupted[web])
	}
	f.mu.Unlock()

	w.join(web, 2, 20)
	f.sees(web, 2, weight(20))
	w.join(web, 2, 21)
	f.sees(web, 2, weight(21))
	_, _, err := w.store.SetAdmin(t.Context(), web, host(2), registrar.Word{Verb: "drain"})
	must(t, err)
	f.sees(web, 2, func(e registrar.Entry) error {
		if e.Instance.State() != registrar.AdminDrain {
			return errors.New("want drain")
		}
		return nil
	})
	w.leave(web, 2, registrar.Unhealthy)
	f.sees(web, 2, gone(registrar.Unhealthy))
	w.leave(web, 1, registrar.Left)
	f.sees(web, 1, gone(registrar.Left))

	f.mu.Lock()
	defer f.mu.Unlock()
	if got, want := fmt.Sprint(f.versions), "[1 2 3 4 5 6]"; got != want {
		t.Errorf("versions of web %s, want %s", got, want)
	}
	if f.interrupted[web] != 0 || f.views["other"] != nil {
		t.Errorf("interruptions %d, other followed %v; want none", f.interrupted[web], f.views["other"] != nil)
	}
}

// With a poll that never comes, a change is handed out as soon as its message
// is there.
func TestLatency(t *testing.T) {
	w := newWorld(t)
	w.join(web, 1, 1)
	f := w.follow(Config{Services: []registrar.Service{web}, Poll: time.Hour})
	f.subscribed()
	var took []time.Duration
	const gap = 10 * time.Millisecond
	tick := time.NewTicker(gap)
	defer tick.Stop()
	for i := 2; i < 52; i++ {
		<-tick.C
		began := time.Now()
		w.join(web, 1, i)
		f.sees(web, 1, weight(i))
		f.mu.Lock()
		took = append(took, f.lastAt.Sub(began))
		f.mu.Unlock()
	}
	t.Logf("from the beat's call to handle: p50 %v, p99 %v", percentile(took, 50), percentile(took, 99))
	if p := percentile(took, 50); p > 50*time.Millisecond {
		t.Errorf("p50 %v: the message did not do it", p)
	}
}

func TestLostMessage(t *testing.T) {
	for _, tc := range []struct {
		name string
		svcs []registrar.Service
	}{
		{"named", []registrar.Service{web, "new"}},
		{"all", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.join(web, 1, 1)
			f := w.follow(Config{Services: tc.svcs, Poll: 200 * time.Millisecond})
			f.subscribed()
			began := time.Now()
			w.joinMute(web, 2, 2)
			w.joinMute("new", 3, 3)
			f.sees(web, 2, weight(2))
			f.sees("new", 3, weight(3))
			t.Logf("found after %v", time.Since(began))
			if n := f.interruptions(web) + f.interruptions("new"); n != 0 {
				t.Errorf("%d interruptions, want none", n)
			}
		})
	}
}

// What was not announced in a burst is found by who hears the next message, of
// whatever service.
func TestGap(t *testing.T) {
	for _, tc := range []struct {
		name string
		svcs []registrar.Service
	}{
		{"named", []registrar.Service{web, "new"}},
		{"all", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.join(web, 1, 1)
			f := w.follow(Config{Services: tc.svcs, Poll: time.Hour})
			f.settled()
			for round := 2; round < 5; round++ {
				// It is somebody else's to announce, who does not.
				must(t, w.rdb.Set(t.Context(), w.store.Keys().Quiet(), "another's", 4*time.Second).Err())
				w.join(web, 1, round)
				w.join("new", 2, round)
				must(t, w.rdb.Del(t.Context(), w.store.Keys().Quiet()).Err())
				w.join("other", 3, round)
				f.sees(web, 1, weight(round))
				f.sees("new", 2, weight(round))
			}
		})
	}
}

func TestAccount(t *testing.T) {
	type message struct {
		global  int64
		svc     registrar.Service
		version int64
		gap     bool
	}
	for _, tc := range []struct {
		name     string
		messages []message
		global   int64 // in the end
	}{
		{"one by one", []message{{11, web, 6, false}, {12, "other", 9, false}, {13, web, 7, false}}, 13},
		{"again, and older ones", []message{{10, web, 5, false}, {3, web, 99, false}, {0, web, 6, false}}, 10},
		{"several of one service", []message{{14, web, 9, false}, {15, web, 10, false}}, 15},
		{"several, one not of the service", []message{{15, web, 9, true}}, 10},
		{"several of a service that is not followed", []message{{12, "other", 9, true}}, 10},
		{"several after one that is told", []message{{11, web, 6, false}, {13, web, 8, false}}, 13},
		{"a gap stays", []message{{12, "other", 9, true}, {13, "other", 10, true}}, 10},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := account{known: true, global: 10, of: map[registrar.Service]int64{web: 5}}
			for _, m := range tc.messages {
				if gap := a.hear(m.global, m.svc, m.version); gap != m.gap {
					t.Errorf("%+v: gap %v", m, gap)
				}
			}
			if a.global != tc.global {
				t.Errorf("account up to %d, want %d", a.global, tc.global)
			}
		})
	}
	if (&account{}).hear(7, web, 7) {
		t.Error("a gap after nothing")
	}
}

// A burst is read as far fewer changes, and its last state is not missed.
func TestCoalesce(t *testing.T) {
	w := newWorld(t)
	w.join(web, 1, 1)
	f := w.follow(Config{Services: []registrar.Service{web}, Poll: time.Hour})
	f.settled()
	before, _ := w.calls("evalsha_ro")
	const writers, each = 8, 125
	began := time.Now()
	var writing sync.WaitGroup
	for n := range writers {
		writing.Go(func() {
			for i := range each {
				_, err := w.store.Beat(t.Context(), web, registrar.Beat{
					Addr: host(n), Token: fmt.Sprint("t", n), Meta: metaOf(n, i+100),
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	writing.Wait()
	took := time.Since(began)
	for n := range writers {
		f.sees(web, n, weight(each+99))
	}
	after, _ := w.calls("evalsha_ro")
	t.Logf("%d changes in %v: %d reads", writers*each, took, after-before)
	// What comes while a read is under way is one more read, not one each.
	if most := writers * each / 2; after-before > most {
		t.Errorf("%d reads, want at most %d", after-before, most)
	}
}

// What a killed connection did not deliver, the next subscription finds; also a
// service that nobody knew.
func TestResubscribe(t *testing.T) {
	for _, tc := range []struct {
		name string
		svcs []registrar.Service
	}{
		{"named", []registrar.Service{web, "new"}},
		{"all", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.join(web, 1, 1)
			f := w.follow(Config{Services: tc.svcs, Poll: time.Hour})
			f.subscribed()
			w.joinMute(web, 2, 2)
			w.joinMute("new", 3, 3)
			began := time.Now()
			killed, err := w.rdb.ClientKillByFilter(t.Context(), "TYPE", "pubsub").Result()
			must(t, err)
			if killed != 1 {
				t.Fatalf("%d subscribers killed, want 1", killed)
			}
			f.sees(web, 2, weight(2))
			f.sees("new", 3, weight(3))
			t.Logf("found after %v", time.Since(began))
			f.logged("no subscription", 1)
			f.logged("subscribed again", 1)
			w.join(web, 2, 4)
			f.sees(web, 2, weight(4))
		})
	}
}

// A message that comes in two halves, far apart, is one message.
func TestSlowMessage(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.join(web, 1, 1)
	p := newProxy(t, w.srv.Addr)
	p.pause = 1200 * time.Millisecond
	f := follow(t, open(t, p.Addr().String(), nil), Config{Services: []registrar.Service{web}, Poll: time.Hour})
	f.subscribed()
	what := w.store.Keys().Changes()
	p.split.Store(&what)
	w.join(web, 1, 2)
	f.sees(web, 1, weight(2))
	if p.split.Load() != nil {
		t.Error("no message was split")
	}
	f.logged("no subscription", 0)
}

// A connection that is dead without a word is noticed, and what it hid is found.
func TestHalfOpen(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.join(web, 1, 1)
	p := newProxy(t, w.srv.Addr)
	f := follow(t, open(t, p.Addr().String(), nil), Config{Services: []registrar.Service{web}, Poll: time.Hour})
	f.subscribed()
	p.freeze()
	began := time.Now()
	w.join(web, 2, 2)
	f.logged("no answer for", 1)
	noticed := time.Since(began)
	f.sees(web, 2, weight(2))
	t.Logf("noticed after %v, found after %v", noticed, time.Since(began))
	if noticed > 6*time.Second {
		t.Errorf("noticed after %v, want 3 s at most on a quiet machine", noticed)
	}
	f.subscribed()
	w.join(web, 2, 3)
	f.sees(web, 2, weight(3))
}

// So is a Redis that hangs; it hands out nothing while it does.
func TestHang(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.join(web, 1, 1)
	f := w.follow(Config{Services: []registrar.Service{web}, Poll: 200 * time.Millisecond})
	f.subscribed()
	w.srv.Signal(t, syscall.SIGSTOP)
	stopped := time.Now()
	defer w.srv.Signal(t, syscall.SIGCONT)
	eventually(t, func() error {
		if f.w.Alive() {
			return fmt.Errorf("still alive after %v", time.Since(stopped))
		}
		return nil
	})
	noticed := time.Since(stopped)
	t.Logf("noticed after %v", noticed)
	if noticed > 6*time.Second {
		t.Errorf("noticed after %v, want 3 s at most on a quiet machine", noticed)
	}
	f.logged("redis does not answer", 1)
	before := f.count()
	w.srv.Signal(t, syscall.SIGCONT)
	w.join(web, 2, 2)
	f.sees(web, 2, weight(2))
	if f.interruptions(web) != 0 {
		t.Error("a hang is no interruption")
	}
	if f.count() == before {
		t.Error("nothing was handed out")
	}
	f.subscribed()
	f.logged("redis does not answer", 1)
	f.logged("redis answers again", 1)
}

// Who hears messages does not ask whether the connection lives; who hears none does.
func TestPingInSilence(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	f := w.follow(Config{Services: []registrar.Service{web}, Poll: time.Hour})
	f.subscribed()
	asked := func() int {
		n, _ := w.calls("ping")
		return n
	}
	const rounds = 4
	before, tick := asked(), time.NewTicker(pingEvery/10)
	defer tick.Stop()
	for began := time.Now(); time.Since(began) < rounds*pingEvery; <-tick.C {
		w.publish("1 other 1")
	}
	if n := asked() - before; n > rounds/2 {
		t.Errorf("%d pings in %v full of messages", n, rounds*pingEvery)
	}
	before = asked()
	eventually(t, func() error {
		if n := asked() - before; n < rounds {
			return fmt.Errorf("%d pings in a silence", n)
		}
		return nil
	})
}

// Data that is lost, or goes back, interrupts each service once. While Redis is
// away nothing is handed out, and that is said once.
func TestInterruption(t *testing.T) {
	svcs := []registrar.Service{web, "api"}
	for _, mode := range []struct {
		name string
		svcs []registrar.Service
	}{{"named", svcs}, {"all", nil}} {
		for _, tc := range []struct {
			name string
			lose func(*world, *follower)
		}{
			{"restarted empty", func(w *world, f *follower) { w.restart(f) }},
			{"restarted with old data", func(w *world, f *follower) {
				must(w.tb, w.rdb.Save(w.tb.Context()).Err())
				w.join(web, 8, 8)
				w.join("api", 8, 8)
				f.sees(web, 8, weight(8))
				f.sees("api", 8, weight(8))
				w.restart(f)
				w.loading()
			}},
			{"flushed", func(w *world, _ *follower) { must(w.tb, w.rdb.FlushAll(w.tb.Context()).Err()) }},
		} {
			t.Run(mode.name+" "+tc.name, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t, "--key-load-delay", "300", "--loading-process-events-interval-bytes", "1024")
				w.fill(2000)
				for _, svc := range svcs {
					w.join(svc, 1, 1)
					w.join(svc, 2, 2)
				}
				f := w.follow(Config{Services: mode.svcs, Poll: 50 * time.Millisecond, Full: 200 * time.Millisecond})
				f.subscribed()
				for _, svc := range svcs {
					f.sees(svc, 2, weight(2))
				}
				tc.lose(w, f)
				for _, svc := range svcs {
					f.sees(svc, 8, absent)
					eventually(t, func() error {
						if n := f.interruptions(svc); n != 1 {
							return fmt.Errorf("%s: %d interruptions, want 1", svc, n)
						}
						return nil
					})
				}
				// The history that begins now is one, whatever is read again.
				for _, svc := range svcs {
					w.join(svc, 8, 9)
					w.join(svc, 9, 9)
				}
				for _, svc := range svcs {
					f.sees(svc, 9, weight(9))
				}
				f.mu.Lock()
				fulls := f.fulls
				f.mu.Unlock()
				eventually(t, func() error {
					f.mu.Lock()
					defer f.mu.Unlock()
					if f.fulls < fulls+6 {
						return fmt.Errorf("%d whole reads, want %d", f.fulls, fulls+6)
					}
					return nil
				})
				for _, svc := range svcs {
					if n := f.interruptions(svc); n != 1 {
						t.Errorf("%s: %d interruptions, want 1", svc, n)
					}
				}
			})
		}
	}
}

// fill adds n keys, so that loading takes a while.
func (w *world) fill(n int) {
	w.tb.Helper()
	_, err := w.rdb.Pipelined(w.tb.Context(), func(p redis.Pipeliner) error {
		for i := range n {
			p.Set(w.tb.Context(), fmt.Sprint("filler", i), strings.Repeat("x", 100), 0)
		}
		return nil
	})
	must(w.tb, err)
}

// restart kills Redis and starts it again on what it saved last, if anything.
func (w *world) restart(f *follower) {
	w.tb.Helper()
	w.srv.Kill(w.tb)
	f.logged("redis does not answer", 1)
	f.logged("no subscription", 1)
	before := f.count()
	dialled := f.dials.Load()
	eventually(w.tb, func() error { // a few tries later
		if n := f.dials.Load() - dialled; n < 8 {
			return fmt.Errorf("%d connections tried", n)
		}
		return nil
	})
	if n := f.count(); n != before {
		w.tb.Errorf("%d changes handed out while Redis was away", n-before)
	}
	w.srv.Launch(w.tb)
	f.subscribed()
	f.logged("redis does not answer", 1)
	f.logged("redis answers again", 1)
	f.logged("no subscription", 1)
}

// loading checks that Redis has answered LOADING to somebody.
func (w *world) loading() {
	w.tb.Helper()
	info, err := w.rdb.Info(w.tb.Context(), "errorstats").Result()
	must(w.tb, err)
	if !strings.Contains(info, "errorstat_LOADING") {
		w.tb.Errorf("nobody was told LOADING: %s", info)
	}
}

// Where many listen a round of reads is followed by a rest, in which changes
// gather and what is no change is read at once.
func TestRest(t *testing.T) {
	for _, tc := range []struct {
		listeners int64
		services  int
		want      time.Duration
	}{
		{0, 10, 0}, {19, 10, 0}, {20, 1, 2 * time.Millisecond}, {100, 0, 0}, {100, 3, 30 * time.Millisecond}, {1000, 10, time.Second}, {100_000, 100_000, time.Second},
	} {
		w := Watcher{listeners: tc.listeners}
		began := time.Now()
		w.rest(tc.services)
		if got := max(w.rested.Sub(began), 0).Round(time.Millisecond); got != tc.want {
			t.Errorf("%d listeners, %d services: %v, want %v", tc.listeners, tc.services, got, tc.want)
		}
	}

	// 20 rounds in a row rest for nothing, and those after them 5 ms each.
	var burst Watcher
	for i := range 30 {
		burst.rest(1)
		left := time.Until(burst.rested)
		if i < 20 && left > 0 || i >= 20 && (left <= 0 || left > time.Duration(i-19)*roundGap) {
			t.Errorf("after round %d a rest of %v", i+1, left)
		}
	}

	w := newWorld(t)
	var svcs []registrar.Service
	for i := range 10 {
		svcs = append(svcs, registrar.Service(fmt.Sprint("s", i)))
		w.join(svcs[i], 1, 1)
	}
	seen := map[registrar.Service]int64{}
	rounds := 0
	watcher, err := New(Config{Services: svcs, Poll: time.Hour}, w.store, zerolog.Nop())
	must(t, err)
	watcher.due = true // as Run has it
	step := func() {
		t.Helper()
		must(t, watcher.Step(t.Context(), func(c Change) { seen[c.Service] = c.Token.Version; rounds++ }))
	}
	step()
	if rounds != 10 {
		t.Fatalf("%d services read, want 10", rounds)
	}
	watcher.rested = time.Now().Add(time.Hour)
	for _, svc := range svcs {
		v := w.join(svc, 1, 2).Version
		watcher.message(fmt.Sprintf("%d %s %d", v, svc, v), time.Now())
	}
	step()
	if p := watcher.pause(time.Now()); rounds != 10 || p < 59*time.Minute || p > time.Hour {
		t.Errorf("%d read while it rests, and the next pause is %v", rounds-10, p)
	}
	before, _ := w.calls("evalsha_ro")
	watcher.rested = time.Now()
	step()
	after, _ := w.calls("evalsha_ro")
	if rounds != 20 || after-before != 1 {
		t.Errorf("%d read after it, in %d calls; want 10 in one", rounds-10, after-before)
	}
	for _, svc := range svcs {
		if seen[svc] != 2 {
			t.Errorf("%s at %d", svc, seen[svc])
		}
	}
	watcher.rested = time.Now().Add(time.Hour)
	watcher.Refresh(svcs[3])
	step()
	watcher.every = true // subscribed again
	w.join(svcs[4], 1, 3)
	step()
	if rounds != 22 || seen[svcs[4]] != 3 {
		t.Errorf("%d read of what is urgent, want 2: %v", rounds-20, seen)
	}

	// A rest never passes for an answer.
	watcher.rested = time.Now().Add(time.Hour)
	w.srv.Kill(t)
	watcher.Refresh(svcs[3])
	for range 2 {
		if err := watcher.Step(t.Context(), func(Change) {}); err == nil {
			t.Error("no error without a redis")
		}
		clear(watcher.hints)
		watcher.due = true
	}
}

// A watcher learns how many listen when it reads the counters.
func TestListeners(t *testing.T) {
	w := newWorld(t)
	w.join(web, 1, 1)
	for range 25 {
		ps := w.store.Subscribe(t.Context())
		t.Cleanup(func() { must(t, ps.Close()) })
		_, err := ps.Receive(t.Context())
		must(t, err)
	}
	watcher, err := New(Config{Services: []registrar.Service{web}}, w.store, zerolog.Nop())
	must(t, err)
	watcher.due = true // as Run has it
	must(t, watcher.Step(t.Context(), func(Change) {}))
	if watcher.listeners != 25 || watcher.rested.IsZero() {
		t.Errorf("%d listeners, rested until %v", watcher.listeners, watcher.rested)
	}
}
