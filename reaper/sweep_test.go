package reaper

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"

	"rollcall/registrar"
)

func TestSweepBoundary(t *testing.T) {
	g := newRegistry(t)
	r := newReaper(t, Config{}, g.store, zerolog.Nop())
	arm(t, r)
	cutoff, _ := r.proof.cutoff()
	g.put(t, "web", "10.0.0.1:80", cutoff)
	g.put(t, "web", "10.0.0.2:80", cutoff-1)
	for i := range 5 {
		g.put(t, "web", fmt.Sprintf("10.0.1.%d:80", i), r.proof.now)
	}
	report := mustSweep(t, r)
	if fmt.Sprint(report.Removed) != "[{web [10.0.0.2:80]}]" || report.Stale != 1 || report.Suspects != 2 || report.Members != 7 {
		t.Errorf("got %+v", report)
	}
	if got := g.members(t, "web"); len(got) != 6 || got[0] != "10.0.0.1:80" {
		t.Errorf("left: %q", got)
	}
}

func TestSweepNeedsAPulse(t *testing.T) {
	g := newRegistry(t)
	r := newReaper(t, Config{}, g.store, zerolog.Nop())
	g.put(t, "web", "10.0.0.1:80", 1)
	if _, err := r.Sweep(t.Context()); !errors.Is(err, errNoPulse) {
		t.Errorf("before the first pulse: %v", err)
	}
	mustPulse(t, r)
	if report := mustSweep(t, r); report.Armed || report.Members != 1 || len(report.Removed) > 0 {
		t.Errorf("not armed: %+v", report)
	}
	g.wantMembers(t, "web", "10.0.0.1:80")
}

func TestTenReapers(t *testing.T) {
	g := newRegistry(t)
	ctx := t.Context()
	old := g.clock(t) - time.Hour.Milliseconds()
	for i := range 1000 {
		g.put(t, "web", fmt.Sprintf("10.0.%d.%d:80", i/200, i%200), old+int64(i))
	}
	sub := g.store.Subscribe(ctx)
	defer sub.Close()
	if _, err := sub.Receive(ctx); err != nil {
		t.Fatal(err)
	}

	start := make(chan struct{})
	var wg sync.WaitGroup
	var mu sync.Mutex
	seen, replies := map[string]int{}, 0
	for i := range 10 {
		// A reply is counted in the log line that it causes.
		log := &logBuffer{}
		r := newReaper(t, Config{ID: fmt.Sprint("r", i)}, newStore(t, g.srv), zerolog.New(log))
		wg.Go(func() {
			<-start
			report, err := r.Once(ctx, true)
			if err != nil {
				t.Errorf("reaper %d: %v", i, err)
			}
			mu.Lock()
			defer mu.Unlock()
			replies += len(log.lines("took out"))
			for _, rm := range report.Removed {
				for _, a := range rm.Addrs {
					seen[a]++
				}
			}
		})
	}
	close(start)
	wg.Wait()

	if len(seen) != 1000 {
		t.Errorf("%d addresses in replies, want 1000", len(seen))
	}
	for a, n := range seen {
		if n != 1 {
			t.Errorf("%s is in %d replies", a, n)
		}
	}
	v, err := g.store.Versions(ctx, []registrar.Service{"web"})
	if err != nil {
		t.Fatal(err)
	}
	if replies < 4 || v.Of["web"] != int64(replies) || v.Global != int64(replies) {
		t.Errorf("%d replies removed something, service version %d, global %d", replies, v.Of["web"], v.Global)
	}
	for i := range replies {
		msg, err := sub.ReceiveTimeout(ctx, 5*time.Second)
		if err != nil {
			t.Fatalf("message %d of %d: %v", i+1, replies, err)
		}
		if got, want := msg.(*redis.Message).Payload, fmt.Sprintf("%d web %d", i+1, i+1); got != want {
			t.Errorf("message %q, want %q", got, want)
		}
	}
	if err := sub.Ping(ctx); err != nil {
		t.Fatal(err)
	}
	if msg, err := sub.ReceiveTimeout(ctx, 5*time.Second); err != nil || fmt.Sprintf("%T", msg) != "*redis.Pong" {
		t.Errorf("after the last message: %v %v, want only the Pong", msg, err)
	}
}

func TestProtectionHolds(t *testing.T) {
	tests := []struct {
		name          string
		live, silent  int // in web; 20 more are live in other
		held, removed bool
	}{
		{"lone death", 5, 1, false, true},
		{"lone death of a lone instance", 0, 1, false, true},
		{"two of six", 4, 2, false, true},
		{"half of a service", 2, 2, true, false},
		{"a fifth of all", 20, 10, true, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := newRegistry(t)
			log := &logBuffer{}
			r := newReaper(t, Config{}, g.store, zerolog.New(log))
			arm(t, r)
			cutoff, _ := r.proof.cutoff()
			for i := range 20 {
				g.put(t, "other", fmt.Sprintf("10.1.0.%d:80", i), r.proof.now)
			}
			for i := range tt.live {
				g.put(t, "web", fmt.Sprintf("10.0.0.%d:80", i), r.proof.now)
			}
			for i := range tt.silent { // one is over, the others will be
				g.put(t, "web", fmt.Sprintf("10.0.1.%d:80", i), cutoff-1+int64(i)*100)
			}
			report := mustSweep(t, r)
			if got := len(report.Held) > 0; got != tt.held {
				t.Errorf("held %v, want %v", report.Held, tt.held)
			}
			if got := len(report.Removed) == 1; got != tt.removed {
				t.Errorf("removed %v, want %v", report.Removed, tt.removed)
			}
			if !tt.held {
				return
			}
			if s := r.Status(); !s.Armed || len(s.Held) != len(report.Held) {
				t.Errorf("status %+v", s)
			}
			mustSweep(t, r)
			if n := len(log.lines("too many look dead")); n != len(report.Held) {
				t.Errorf("%d lines for %d holds after two sweeps", n, len(report.Held))
			}
			// They beat again. The hold lasts for two heartbeats more.
			for i := range tt.silent {
				g.put(t, "web", fmt.Sprintf("10.0.1.%d:80", i), r.proof.now)
			}
			g.put(t, "web", "10.0.2.1:80", 1)
			if report := mustSweep(t, r); len(report.Held) == 0 || len(report.Removed) > 0 {
				t.Errorf("in the dry time: %+v", report)
			}
			r.begin = r.begin.Add(-2 * r.cfg.Interval) // that long goes by
			r.proof.recv = r.elapsed()
			if report := mustSweep(t, r); len(report.Held) > 0 || fmt.Sprint(report.Removed) != "[{web [10.0.2.1:80]}]" {
				t.Errorf("after the dry time: %+v", report)
			}
			if n := len(log.lines("no longer held")); n == 0 {
				t.Error("the end of the hold is not in the log")
			}
		})
	}
}

// Garbage holds nobody, and goes.
func TestGarbageHoldsNobody(t *testing.T) {
	g := newRegistry(t)
	r := newReaper(t, Config{}, g.store, zerolog.Nop())
	arm(t, r)
	cutoff, _ := r.proof.cutoff()
	for i := range 5 {
		g.put(t, "web", fmt.Sprintf("10.0.1.%d:80", i), r.proof.now)
	}
	for i := range 20 {
		g.put(t, "web", fmt.Sprint("garbage", i), int64(i))
	}
	g.put(t, "web", "10.0.0.1:80", 21)
	g.put(t, "only", "garbage", 1)
	report := mustSweep(t, r)
	if len(report.Held) > 0 || len(report.Removed) != 2 || report.Members != 6 || report.Suspects != 1 || report.Stale != 1 {
		t.Errorf("got %+v", report)
	}
	if got := g.members(t, "web"); len(got) != 5 {
		t.Errorf("left: %q", got)
	}
	g.wantMembers(t, "only")

	// Suspects who are not stale yet begin no hold because garbage goes now.
	for i := range 3 {
		g.put(t, "web", fmt.Sprintf("10.0.1.%d:80", i), cutoff)
	}
	g.put(t, "web", "garbage", 1)
	report = mustSweep(t, r)
	if len(report.Held) > 0 || fmt.Sprint(report.Removed) != "[{web [garbage]}]" || report.Suspects != 3 {
		t.Errorf("got %+v", report)
	}
}

func TestProtectionLetsGo(t *testing.T) {
	g := newRegistry(t)
	r := newReaper(t, Config{}, g.store, zerolog.Nop())
	arm(t, r)
	for i := range 3 {
		g.put(t, "web", fmt.Sprintf("10.0.0.%d:80", i), int64(1000+i))
	}
	for _, lone := range []registrar.Service{"lone", "lone2", "lone3"} {
		g.put(t, lone, "10.0.0.9:80", 1)
	}
	if report := mustSweep(t, r); len(report.Held) == 0 || len(report.Removed) > 0 {
		t.Fatalf("got %+v", report)
	}
	later := func(d time.Duration) {
		r.begin = r.begin.Add(-d)
		r.proof.recv = r.elapsed()
	}
	later(LetGoAfter)
	// Another reaper lets go at the same moment, out of any service.
	g.put(t, "any", "10.0.0.5:80", 1)
	g.put(t, "any", "10.0.0.6:80", r.proof.now)
	r.store = &outage{Store: g.store, reap: func(*registrar.Sweep) {
		r.store = g.store
		out, err := g.store.Reap(t.Context(), "any", registrar.Sweep{ID: "r1", Token: r.proof.mine, ReplID: r.proof.replid, Last: r.proof.now, MaxAge: time.Minute, Cutoff: 2000, LetGo: LetGoEvery})
		if err != nil || len(out.Addrs) != 1 {
			t.Errorf("the other reaper: %+v, %v", out, err)
		}
	}}
	if report := mustSweep(t, r); len(report.Removed) > 0 {
		t.Errorf("two reapers let go at once: %+v", report)
	}
	g.wantMembers(t, "web", "10.0.0.0:80", "10.0.0.1:80", "10.0.0.2:80")
	pass := func() { // the registry's 10 s, and this reaper's
		later(LetGoEvery)
		if n, err := g.rdb.Del(t.Context(), g.keys.LetGo()).Result(); n != 1 || err != nil {
			t.Errorf("%d keys of the pace, %v", n, err)
		}
	}
	pass()
	if report := mustSweep(t, r); fmt.Sprint(report.Removed) != "[{web [10.0.0.0:80]}]" {
		t.Errorf("got %+v", report)
	}
	if report := mustSweep(t, r); len(report.Removed) > 0 {
		t.Errorf("before 10 s are over: %+v", report)
	}
	pass()
	if report := mustSweep(t, r); fmt.Sprint(report.Removed) != "[{web [10.0.0.1:80]}]" {
		t.Errorf("got %+v", report)
	}
	pass()
	if report := mustSweep(t, r); len(report.Removed) > 0 { // the last of both services
		t.Errorf("got %+v", report)
	}
	g.wantMembers(t, "web", "10.0.0.2:80")
	g.wantMembers(t, "lone", "10.0.0.9:80")
}

// TestProtectionLetsGoBesideGarbage has the oldest of those who are held be the last
// instance of its service that can be read. It stays, and another service's goes.
func TestProtectionLetsGoBesideGarbage(t *testing.T) {
	g := newRegistry(t)
	r := newReaper(t, Config{}, g.store, zerolog.Nop())
	arm(t, r)
	g.put(t, "last", "10.0.0.1:80", 1)
	g.put(t, "last", "10.0.0.2:80", r.proof.now)
	if err := g.rdb.HSet(t.Context(), g.keys.Meta("last"), "10.0.0.2:80", "{").Err(); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		g.put(t, "web", fmt.Sprintf("10.0.1.%d:80", i), int64(1000+i))
		g.put(t, "more", fmt.Sprintf("10.0.2.%d:80", i), int64(2000+i))
	}
	if report := mustSweep(t, r); len(report.Held) == 0 || len(report.Removed) > 0 {
		t.Fatalf("got %+v", report)
	}
	r.begin = r.begin.Add(-LetGoAfter)
	r.proof.recv = r.elapsed()
	if report := mustSweep(t, r); fmt.Sprint(report.Removed) != "[{web [10.0.1.0:80]}]" {
		t.Errorf("got %+v", report)
	}
	g.wantMembers(t, "last", "10.0.0.1:80", "10.0.0.2:80")
	if r.cause != "" || !r.proof.ok {
		t.Errorf("the reaper is not armed: %q", r.cause)
	}
}

func TestBrokenServiceStopsNoOther(t *testing.T) {
	g := newRegistry(t)
	ctx := t.Context()
	log := &logBuffer{}
	r := newReaper(t, Config{}, g.store, zerolog.New(log))
	arm(t, r)
	for _, svc := range []registrar.Service{"a-counter", "b-meta", "z"} {
		g.put(t, svc, "10.0.0.1:80", 1)
		for i := range 9 {
			g.put(t, svc, fmt.Sprintf("10.0.1.%d:80", i), r.proof.now)
		}
	}
	for key, value := range map[string]string{
		g.keys.ServiceVersion("a-counter"): "x", g.keys.Meta("b-meta"): "x", g.keys.Instances("c-set"): "x",
	} {
		if err := g.rdb.Set(ctx, key, value, 0).Err(); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.rdb.SAdd(ctx, g.keys.Services(), "c-set", "No Name").Err(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		report, err := r.Sweep(ctx)
		for _, want := range []string{"reap a-counter", "reap b-meta", "c-set", `"No Name"`} {
			if !errors.Is(err, registrar.ErrBroken) || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want %q in it", err, want)
			}
		}
		if !report.waits || !r.Status().Armed {
			t.Errorf("got %+v, %+v", report, r.Status())
		}
		r.complain(err)
	}
	if got := g.expired(t, "z"); len(got) != 1 {
		t.Errorf("out of z: %v, want its dead one", got)
	}
	if lines := log.lines("sweep incomplete"); len(lines) != 1 {
		t.Errorf("%d lines for the same errors twice", len(lines))
	}
	if err := g.rdb.Del(ctx, g.keys.ServiceVersion("a-counter"), g.keys.Meta("b-meta"), g.keys.Instances("c-set")).Err(); err != nil {
		t.Fatal(err)
	}
	if err := g.rdb.SRem(ctx, g.keys.Services(), "No Name").Err(); err != nil {
		t.Fatal(err)
	}
	report, err := r.Sweep(ctx)
	r.complain(err)
	if err != nil || len(report.Removed) != 2 || len(log.lines("complete again")) != 1 {
		t.Errorf("after the repair: %+v, %v", report, err)
	}
}

// Every call takes as long as P, as far as the reaper can tell.
func TestLongSweepRenewsItsLicence(t *testing.T) {
	g := newRegistry(t)
	pulses := 0
	r := newReaper(t, Config{}, nil, zerolog.Nop())
	r.store = &outage{Store: g.store, pulse: func() { pulses++ }, reap: func(*registrar.Sweep) { r.proof.recv -= r.proof.period }}
	now := g.clock(t)
	for i := range 240 {
		g.put(t, "web", fmt.Sprintf("10.0.%d.%d:80", i/200, i%200), int64(i+1))
	}
	for i := range 5000 { // so many that nothing is held
		g.put(t, "web", fmt.Sprintf("10.1.%d.%d:80", i/200, i%200), now)
	}
	arm(t, r)
	report := mustSweep(t, r)
	if len(report.Removed) != 1 || len(report.Removed[0].Addrs) != 240 || pulses != 3 {
		t.Errorf("%d services, %d pulses; want 240 addresses of one, with a pulse before the 2nd and 3rd call", len(report.Removed), pulses)
	}

	// The data is another when the licence is renewed.
	g.put(t, "other", "10.0.0.1:80", 1)
	mustPulse(t, r)
	r.proof.recv -= r.proof.period
	if err := g.rdb.Del(t.Context(), g.keys.Reaper("r1")).Err(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Sweep(t.Context()); err == nil || !strings.Contains(err.Error(), causeToken) {
		t.Errorf("got %v, want %q", err, causeToken)
	}
	g.wantMembers(t, "other", "10.0.0.1:80")
}

func TestFutureScore(t *testing.T) {
	for _, held := range []bool{false, true} {
		t.Run(fmt.Sprintf("held %v", held), func(t *testing.T) {
			g := newRegistry(t)
			r := newReaper(t, Config{}, g.store, zerolog.Nop())
			arm(t, r)
			now := g.clock(t)
			g.put(t, "web", "10.0.0.1:80", now+time.Hour.Milliseconds())
			g.put(t, "web", "10.0.0.2:80", now)
			if held {
				for i := range 3 {
					g.put(t, "web", fmt.Sprintf("10.0.1.%d:80", i), 1)
				}
			}
			report := mustSweep(t, r)
			if held != (len(report.Held) > 0) || len(report.Removed) > 0 {
				t.Fatalf("got %+v", report)
			}
			score, err := g.rdb.ZScore(t.Context(), g.keys.Instances("web"), "10.0.0.1:80").Result()
			if err != nil || score < float64(now) || score > float64(g.clock(t)) {
				t.Errorf("score %.0f, %v; want the time of the sweep, %d", score, err, now)
			}
		})
	}
}

func TestNotArmedPullsNothingBack(t *testing.T) {
	g := newRegistry(t)
	r := newReaper(t, Config{}, g.store, zerolog.Nop())
	mustPulse(t, r)
	future := g.clock(t) + time.Hour.Milliseconds()
	g.put(t, "web", "10.0.0.1:80", future)
	mustSweep(t, r)
	if score := g.rdb.ZScore(t.Context(), g.keys.Instances("web"), "10.0.0.1:80").Val(); score != float64(future) {
		t.Errorf("score %.0f, want it untouched", score)
	}
}

// TestRemovalIsAnnouncedLate takes somebody out in a pause between two
// announcements: neither Run nor Once keeps it to itself.
func TestRemovalIsAnnouncedLate(t *testing.T) {
	for name, act := range map[string]func(t *testing.T, r *Reaper){
		"run": func(t *testing.T, r *Reaper) {
			arm(t, r)
			run(t, r)
		},
		"once": func(t *testing.T, r *Reaper) {
			if _, err := r.Once(t.Context(), true); err != nil {
				t.Error(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := newRegistry(t)
			g.put(t, "web", "10.0.0.1:80", g.clock(t))
			g.put(t, "web", "10.0.0.2:80", g.clock(t)-60_000)
			sub := g.rdb.Subscribe(t.Context(), g.keys.Changes())
			defer sub.Close()
			if _, err := sub.Receive(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := g.rdb.Set(t.Context(), g.keys.Quiet(), "", 500*time.Millisecond).Err(); err != nil {
				t.Fatal(err)
			}
			act(t, newReaper(t, Config{}, g.store, zerolog.Nop()))
			msg, err := sub.ReceiveTimeout(t.Context(), 10*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			v, err := g.store.Versions(t.Context(), []registrar.Service{"web"})
			if err != nil {
				t.Fatal(err)
			}
			if got, want := msg.(*redis.Message).Payload, fmt.Sprintf("%d web %d", v.Global, v.Of["web"]); got != want {
				t.Errorf("message %q, want %q", got, want)
			}
			g.wantMembers(t, "web", "10.0.0.1:80")
		})
	}
}
