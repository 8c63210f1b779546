package reaper

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"rollcall/registrar"
)

func TestNewRefuses(t *testing.T) {
	tests := []struct {
		name string
		cfg  Config
		want string // in the error; "" = accepted
	}{
		{"defaults", Config{ID: "r1"}, ""},
		{"no id", Config{}, "reaper id"},
		{"id with a blank", Config{ID: "a b"}, "reaper id"},
		{"interval of a third", Config{ID: "r", TTL: 15 * time.Second, Interval: 5 * time.Second}, ""},
		{"interval above", Config{ID: "r", TTL: 15 * time.Second, Interval: 5*time.Second + time.Millisecond}, "third of the TTL"},
		{"negative interval", Config{ID: "r", Interval: -time.Second}, "interval"},
		{"short TTL", Config{ID: "r", TTL: 299 * time.Millisecond, Interval: 50 * time.Millisecond}, "want 300ms to"},
		{"half a millisecond", Config{ID: "r", TTL: 15*time.Second + 500*time.Microsecond}, "whole milliseconds"},
		{"negative sweep", Config{ID: "r", Sweep: -1}, "sweep interval"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := New(tt.cfg, nil, nil, zerolog.Nop())
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestRunTakesOutTheDead(t *testing.T) {
	g := newRegistry(t)
	t.Parallel()
	const ttl, interval = 3 * time.Second, 800 * time.Millisecond
	log := &logBuffer{}
	// The sweep interval is long, so that only the wake-up for the oldest beat
	// can be in time.
	r := newReaper(t, Config{TTL: ttl, Interval: interval, Sweep: time.Hour}, g.store, zerolog.New(log))
	end := run(t, r)
	eventuallyArmed(t, r)
	g.live(t, "web", 8, interval)
	for i := range 2 {
		svc := registrar.Service(fmt.Sprint("lone", i))
		addr := fmt.Sprintf("10.1.0.%d:80", i)
		score := g.clock(t)
		g.put(t, svc, addr, score)
		var at int64
		eventually(t, func() error {
			e, ok := g.expired(t, svc)[addr]
			if !ok {
				return fmt.Errorf("%s is still there; %+v", addr, r.Status())
			}
			at = e
			return nil
		})
		late := ms(at - score - ttl.Milliseconds())
		t.Logf("%s was out %v after its TTL", addr, late)
		// How late is for the benchmark and the faults: on a busy machine slow
		// pulses set the cut-off back.
		if late < 0 {
			t.Errorf("%s was out %v before its TTL", addr, -late)
		}
	}
	if gone := g.expired(t, "web"); len(gone) > 0 {
		t.Errorf("live ones were taken out: %v", gone)
	}
	if got := g.members(t, "web"); len(got) != 8 {
		t.Errorf("%d of 8 live ones left", len(got))
	}
	if err := end(); err != nil {
		t.Errorf("run: %v", err)
	}
	if lines := log.lines("took out"); len(lines) != 2 || !strings.Contains(lines[0], `"service":"lone0","version":1,"count":1,"addrs":["10.1.0.0:80"]`) {
		t.Errorf("removals in the log: %q", lines)
	}
}

func TestRunConfig(t *testing.T) {
	t.Parallel()
	t.Run("others", func(t *testing.T) {
		g := newRegistry(t)
		if _, err := g.store.Config(t.Context(), 15*time.Second, 5*time.Second, false); err != nil {
			t.Fatal(err)
		}
		r := newReaper(t, Config{TTL: 20 * time.Second, Interval: 4 * time.Second}, g.store, zerolog.Nop())
		err := r.Run(t.Context())
		if !errors.Is(err, ErrConfig) {
			t.Fatalf("got %v, want ErrConfig", err)
		}
		for _, want := range []string{"15s", "5s", "20s", "4s", "--set-ttl"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q does not say %s", err, want)
			}
		}
		if _, err := r.Once(t.Context(), true); !errors.Is(err, ErrConfig) {
			t.Errorf("once: got %v, want ErrConfig", err)
		}
	})
	t.Run("set, and changed by another", func(t *testing.T) {
		t.Parallel()
		const ttl, interval = 1500 * time.Millisecond, 500 * time.Millisecond
		g := newRegistry(t)
		ctx := t.Context()
		if _, err := g.store.Config(ctx, 15*time.Second, 5*time.Second, false); err != nil {
			t.Fatal(err)
		}
		log := &logBuffer{}
		r := newReaper(t, Config{TTL: ttl, Interval: interval, Sweep: 100 * time.Millisecond, SetTTL: true}, g.store, zerolog.New(log))
		end := run(t, r)
		eventually(t, func() error {
			got, err := g.store.Config(ctx, 15*time.Second, 5*time.Second, false)
			if err != nil || got.TTL != ttl || got.Interval != interval {
				return fmt.Errorf("%+v, %v", got, err)
			}
			return nil
		})
		eventuallyArmed(t, r)
		if _, err := g.store.Config(ctx, 2*ttl, 2*interval, true); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error {
			if r.Status().Armed || len(log.lines("other times")) == 0 {
				return errors.New("it goes on with the old times")
			}
			return nil
		})
		g.live(t, "web", 3, interval)
		g.put(t, "web", "10.0.9.9:80", g.clock(t)) // beats no more
		eventually(t, func() error {
			if len(g.expired(t, "web")) == 0 {
				return errors.New("nobody went")
			}
			return nil
		})
		if gone := g.expired(t, "web"); len(gone) != 1 || gone["10.0.9.9:80"] == 0 {
			t.Errorf("went: %v", gone)
		}
		if n := len(log.lines("other times")); n != 1 {
			t.Errorf("%d lines of the times", n)
		}
		if err := end(); err != nil {
			t.Error(err)
		}
	})
	t.Run("no times to work with, which count for nothing", func(t *testing.T) {
		g := newRegistry(t)
		r := newReaper(t, Config{}, g.store, zerolog.Nop())
		g.put(t, "web", "10.0.0.1:80", 1)
		if err := r.config(t.Context(), false, true); err != nil {
			t.Fatal(err)
		}
		arm(t, r)
		if err := g.rdb.HSet(t.Context(), g.keys.Config(), "ttl_ms", 200, "interval_ms", 50).Err(); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Sweep(t.Context()); err != nil || r.cfg.TTL != registrar.DefaultTTL || r.cfg.Interval != registrar.DefaultInterval {
			t.Errorf("works with TTL %v and heartbeat %v, %v", r.cfg.TTL, r.cfg.Interval, err)
		}
		g.wantMembers(t, "web", "10.0.0.1:80") // nothing is proven of these
	})
	t.Run("shorter ones by hand", func(t *testing.T) {
		g := newRegistry(t)
		r := newReaper(t, Config{}, g.store, zerolog.Nop())
		g.put(t, "web", "10.0.0.1:80", g.clock(t)-9000) // it may beat each 10 s
		if err := r.config(t.Context(), false, true); err != nil {
			t.Fatal(err)
		}
		arm(t, r)
		if err := g.rdb.HSet(t.Context(), g.keys.Config(), "ttl_ms", 3000, "interval_ms", 1000).Err(); err != nil {
			t.Fatal(err)
		}
		report := mustSweep(t, r)
		if s := r.Status(); report.Armed || s.Armed || s.Until < r.proof.now+(10*time.Second+r.cfg.TTL).Milliseconds() {
			t.Errorf("got %+v, %+v", report, s)
		}
		g.wantMembers(t, "web", "10.0.0.1:80")
	})
	t.Run("redis comes later", func(t *testing.T) {
		g := newRegistry(t)
		g.srv.Kill(t)
		log := &logBuffer{}
		r := newReaper(t, Config{TTL: 3 * time.Second, Interval: 800 * time.Millisecond}, g.store, zerolog.New(log))
		end := run(t, r)
		eventually(t, func() error {
			if len(log.lines("retrying")) != 1 {
				return errors.New("no line says that it retries")
			}
			return nil
		})
		g.srv.Launch(t)
		eventuallyArmed(t, r)
		if err := end(); err != nil {
			t.Error(err)
		}
		if n := len(log.lines("retrying")); n != 1 {
			t.Errorf("%d lines of retrying", n)
		}
	})
	t.Run("cancelled while redis is away", func(t *testing.T) {
		g := newRegistry(t)
		g.srv.Kill(t)
		log := &logBuffer{}
		end := run(t, newReaper(t, Config{}, g.store, zerolog.New(log)))
		eventually(t, func() error {
			if len(log.lines("retrying")) != 1 {
				return errors.New("no line says that it retries")
			}
			return nil
		})
		if err := end(); err != nil {
			t.Error(err)
		}
	})
}

// An idle reaper says that it is armed, and no more, and does not spin.
func TestRunIsSilent(t *testing.T) {
	t.Parallel()
	for _, n := range []int{0, 3} {
		t.Run(fmt.Sprintf("%d instances", n), func(t *testing.T) {
			t.Parallel()
			const tries = 5
			for range tries {
				if runSilent(t, n) {
					return
				}
			}
			t.Errorf("in each of %d runs a pulse was late", tries)
		})
	}
}

// runSilent looks at one run beside n instances. It returns false if a pulse was
// too late, as on a busy machine: that is said, so the run shows nothing.
func runSilent(t *testing.T, n int) (shown bool) {
	t.Helper()
	const ttl, interval = 6 * time.Second, 1600 * time.Millisecond
	g := newRegistry(t)
	if _, err := g.store.Config(t.Context(), ttl, interval, false); err != nil { // or those who beat would have to learn it
		t.Fatal(err)
	}
	log := &logBuffer{}
	sweeps := 0
	r := newReaper(t, Config{TTL: ttl, Interval: interval}, nil, zerolog.New(log))
	r.store = &counter{g.store, &sweeps}
	defer g.live(t, "web", n, interval)()
	end := run(t, r)
	eventuallyArmed(t, r)
	<-time.After(2 * ttl) // what is tested is a length of time without events
	if err := end(); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d sweeps in about %v", sweeps, 4*ttl)
	if late := log.lines("not armed"); len(late) > 0 {
		t.Logf("late: %q", late)
		return false
	}
	if all := log.lines("\n"); len(all) != 1 {
		t.Errorf("log of an idle reaper: %q", all)
	}
	// The oldest of who beats runs out once in TTL − B at most; two sweeps are for
	// the start and for being armed.
	if sweeps > 8 {
		t.Errorf("%d sweeps in about %v: it spins", sweeps, 4*ttl)
	}
	return true
}

// counter counts the surveys.
type counter struct {
	Store
	n *int
}

func (c *counter) Survey(ctx context.Context, svcs []registrar.Service, now, cutoff, suspect int64) ([]registrar.Count, error) {
	*c.n++
	return c.Store.Survey(ctx, svcs, now, cutoff, suspect)
}

// Short sweeps may follow one another soon, long ones take a fifth of the time,
// until that would make who is dead wait for more than 50 ms.
func TestSweepPace(t *testing.T) {
	for _, tt := range []struct{ took, want time.Duration }{
		{0, 10 * time.Millisecond}, {time.Millisecond, 10 * time.Millisecond}, {4 * time.Millisecond, 20 * time.Millisecond},
		{10 * time.Millisecond, 50 * time.Millisecond}, {time.Second, 50 * time.Millisecond},
	} {
		if got := pace(tt.took, time.Second); got != tt.want {
			t.Errorf("a sweep of %v: the next after %v, want %v", tt.took, got, tt.want)
		}
	}
}

// TestShorterTimes has instances that beat by longer times than a reaper brings:
// they hear of its times with a later beat, and nobody goes before.
func TestShorterTimes(t *testing.T) {
	t.Parallel()
	const ttl, interval = 3 * time.Second, time.Second
	for _, c := range []struct {
		name   string
		stored bool          // the registry has 18 s and 6 s; else it has none, and instances beat each 5 s
		own    time.Duration // the instances' own interval, if they have one
		set    bool
	}{
		{"before the first reaper", false, 0, false},
		{"set", true, 0, true},
		{"own interval", true, 6 * time.Second, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			g := newRegistry(t)
			if c.stored {
				if _, err := g.store.Config(t.Context(), 18*time.Second, 6*time.Second, false); err != nil {
					t.Fatal(err)
				}
			}
			g.live(t, "web", 1, c.own)
			g.live(t, "api", 5, 100*time.Millisecond) // so that one that seems dead is not held
			g.put(t, "api", "10.0.1.1:80", 1)         // dead
			for _, id := range []string{"r1", "r2"} { // the second finds what the first wrote
				run(t, newReaper(t, Config{ID: id, TTL: ttl, Interval: interval, SetTTL: c.set}, newStore(t, g.srv), zerolog.Nop()))
			}
			var gone map[string]int64
			eventually(t, func() error {
				if gone = g.expired(t, "api"); len(gone) == 0 {
					return errors.New("the dead one is not out")
				}
				return nil
			})
			if web := g.expired(t, "web"); len(gone) != 1 || gone["10.0.1.1:80"] == 0 || len(web) > 0 {
				t.Errorf("the living were taken out: %v, %v", gone, web)
			}
		})
	}
}

// TestTimesSetMeanwhile has the registry's times come and go while a reaper is
// armed: what it knows from before is no licence any more.
func TestTimesSetMeanwhile(t *testing.T) {
	g := newRegistry(t)
	r := newReaper(t, Config{}, g.store, zerolog.Nop())
	g.put(t, "web", "10.0.0.1:80", 1)
	if err := r.config(t.Context(), false, true); err != nil {
		t.Fatal(err)
	}
	arm(t, r)
	for _, set := range []registrar.Times{{TTL: time.Hour, Interval: 20 * time.Minute}, {TTL: r.cfg.TTL, Interval: r.cfg.Interval}} {
		if _, err := g.store.Config(t.Context(), set.TTL, set.Interval, true); err != nil {
			t.Fatal(err)
		}
	}
	report := mustSweep(t, r)
	if s := r.Status(); report.Armed || s.Armed || s.Cause != causeTimes || s.Until < r.proof.now+(20*time.Minute+r.cfg.TTL).Milliseconds() {
		t.Errorf("got %+v, %+v", report, s)
	}
	g.wantMembers(t, "web", "10.0.0.1:80")
}

// TestTimesBack: a registry that was lost has its times again with the pulse that
// sees it, not with the next sweep that is due, a TTL later.
func TestTimesBack(t *testing.T) {
	t.Parallel()
	g := newRegistry(t)
	r := newReaper(t, Config{TTL: 3 * time.Second, Interval: 800 * time.Millisecond}, nil, zerolog.Nop())
	c := &pulses{Store: g.store}
	r.store = c
	run(t, r)
	eventuallyArmed(t, r)
	began := c.n.Load()
	if err := g.rdb.FlushAll(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if n, err := g.rdb.Exists(t.Context(), g.keys.Config()).Result(); err != nil || n == 0 {
			return fmt.Errorf("no times: %v", err)
		}
		return nil
	})
	if after := c.n.Load() - began; after > 5 { // of the 15 in a TTL; one may have been under way, and polls are late
		t.Errorf("the times came back %d pulses after the loss", after)
	}
}

// pulses counts the accepted ones.
type pulses struct {
	Store
	n atomic.Int64
}

func (p *pulses) Pulse(ctx context.Context, id, token string, expiry time.Duration) (registrar.Pulse, error) {
	got, err := p.Store.Pulse(ctx, id, token, expiry)
	if err == nil {
		p.n.Add(1)
	}
	return got, err
}

// TestForceSpares: a forced sweep takes nobody out who may beat by older times.
func TestForceSpares(t *testing.T) {
	g := newRegistry(t)
	now := g.clock(t)
	g.put(t, "web", "10.0.0.1:80", now-5000)
	g.put(t, "web", "10.0.0.2:80", now-12000)
	r := newReaper(t, Config{TTL: 3 * time.Second, Interval: time.Second, SetTTL: true}, g.store, zerolog.Nop())
	if _, err := r.Once(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	g.wantMembers(t, "web", "10.0.0.1:80")
}

// TestOnceTimesGo: the times go after the proof, so it covers nothing any more.
func TestOnceTimesGo(t *testing.T) {
	g := newRegistry(t)
	g.put(t, "web", "10.0.0.1:80", 1)
	r := newReaper(t, Config{TTL: 3 * time.Second, Interval: time.Second}, nil, zerolog.Nop())
	if _, err := g.store.Config(t.Context(), r.cfg.TTL, r.cfg.Interval, false); err != nil {
		t.Fatal(err)
	}
	gone := false
	r.store = &forgetful{Store: g.store, before: func() {
		if r.armed {
			gone = true
			if err := g.rdb.Del(t.Context(), g.keys.Config()).Err(); err != nil {
				t.Error(err)
			}
		}
	}}
	report, err := r.Once(t.Context(), false)
	if !gone || !errors.Is(err, ErrNeverArmed) || !strings.Contains(err.Error(), causeTimes) || len(report.Removed) > 0 {
		t.Errorf("gone %v, got %+v, %v", gone, report, err)
	}
	g.wantMembers(t, "web", "10.0.0.1:80")
}

// forgetful is a Store before whose times something happens.
type forgetful struct {
	Store
	before func()
}

func (f *forgetful) Config(ctx context.Context, ttl, interval time.Duration, overwrite bool) (registrar.Times, error) {
	f.before()
	return f.Store.Config(ctx, ttl, interval, overwrite)
}
