package reaper

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"rollcall/registrar"
)

// bare pulses and sweeps at each P with the proof alone, without the
// protection, so that the proof cannot hide behind it. It returns what it
// removed.
func bare(tb testing.TB, r *Reaper, until func(removed []string) bool) (removed []string) {
	tb.Helper()
	tick := time.NewTicker(r.proof.period * 9 / 10)
	defer tick.Stop()
	deadline := time.After(time.Minute)
	for !until(removed) {
		if r.Pulse(tb.Context()) == nil {
			cutoff, armed := r.proof.cutoff()
			report, err := r.sweep(tb.Context(), cutoff, armed, true)
			if err != nil {
				tb.Logf("sweep: %v", err)
			}
			for _, rm := range report.Removed {
				removed = append(removed, rm.Addrs...)
			}
		}
		select {
		case <-deadline:
			tb.Fatalf("a minute is over: %+v, removed %q", r.Status(), removed)
		case <-tick.C:
		}
	}
	return removed
}

// lasting returns a condition that holds once d has gone by.
func lasting(d time.Duration) func([]string) bool {
	end := time.Now().Add(d)
	return func([]string) bool { return time.Now().After(end) }
}

// A Redis that does not execute beats for longer than a TTL, or refuses them,
// costs nobody alive their place, and who is dead goes afterwards.
func TestOutageRemovesNobodyAlive(t *testing.T) {
	t.Parallel()
	const ttl, interval = 3 * time.Second, 800 * time.Millisecond
	config := func(name, value string) func(*testing.T, *registry) {
		return func(t *testing.T, g *registry) {
			if err := g.rdb.ConfigSet(t.Context(), name, value).Err(); err != nil {
				t.Fatal(err)
			}
		}
	}
	tests := []struct {
		name       string
		begin, end func(*testing.T, *registry)
	}{
		{
			"stopped",
			func(t *testing.T, g *registry) { g.srv.Signal(t, syscall.SIGSTOP) },
			func(t *testing.T, g *registry) { g.srv.Signal(t, syscall.SIGCONT) },
		},
		{
			"read-only",
			func(t *testing.T, g *registry) {
				if err := g.rdb.Do(t.Context(), "REPLICAOF", "127.0.0.1", "1").Err(); err != nil {
					t.Fatal(err)
				}
			},
			func(t *testing.T, g *registry) {
				if err := g.rdb.Do(t.Context(), "REPLICAOF", "NO", "ONE").Err(); err != nil {
					t.Fatal(err)
				}
			},
		},
		{"too few replicas", config("min-replicas-to-write", "1"), config("min-replicas-to-write", "0")},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			g := newRegistry(t)
			r := newReaper(t, Config{TTL: ttl, Interval: interval}, g.store, zerolog.Nop())
			eventually(t, func() error { return r.Pulse(t.Context()) })
			if _, err := r.Sweep(t.Context()); err != nil {
				t.Fatal(err)
			}
			g.live(t, "web", 20, interval)
			bare(t, r, func([]string) bool { return r.Status().Armed })

			g.put(t, "web", "10.9.9.9:80", g.clock(t))
			tt.begin(t, g)
			bare(t, r, lasting(2*ttl)) // the outage's own length
			if r.Status().Armed {
				t.Error("armed during the outage")
			}
			tt.end(t, g)
			removed := bare(t, r, func(removed []string) bool { return slices.Contains(removed, "10.9.9.9:80") })
			removed = append(removed, bare(t, r, lasting(ttl))...)
			if !slices.Equal(removed, []string{"10.9.9.9:80"}) {
				t.Errorf("removed %q, want only the dead one", removed)
			}
			if n := len(g.members(t, "web")); n != 20 {
				t.Errorf("%d of 20 live ones left", n)
			}
		})
	}
}

// restore puts the snapshot in place of what Redis has, by a restart.
func (g *registry) restore(tb testing.TB, snapshot []byte) {
	tb.Helper()
	g.srv.Kill(tb)
	if err := os.WriteFile(filepath.Join(g.srv.Dir, "dump.rdb"), snapshot, 0o600); err != nil {
		tb.Fatal(err)
	}
	g.srv.Launch(tb)
}

func (g *registry) snapshot(tb testing.TB) []byte {
	tb.Helper()
	if err := g.rdb.Save(tb.Context()).Err(); err != nil {
		tb.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(g.srv.Dir, "dump.rdb"))
	if err != nil {
		tb.Fatal(err)
	}
	return data
}

// Redis comes back with older data, so fast that no pulse fails: in the
// snapshot everybody was last heard of long ago.
func TestOlderData(t *testing.T) {
	newWorld := func(t *testing.T) (*registry, *Reaper, []byte) {
		g := newRegistry(t)
		r := newReaper(t, Config{}, g.store, zerolog.Nop())
		arm(t, r)
		now := g.clock(t)
		for i := range 20 {
			g.put(t, "web", fmt.Sprintf("10.0.0.%d:80", i+1), now-time.Hour.Milliseconds())
		}
		old := g.snapshot(t)
		for i := range 20 {
			g.put(t, "web", fmt.Sprintf("10.0.0.%d:80", i+1), now)
		}
		mustPulse(t, r)
		return g, r, old
	}
	t.Run("between pulse and removal", func(t *testing.T) {
		g, r, old := newWorld(t)
		g.restore(t, old)
		cutoff, armed := r.proof.cutoff()
		report, err := r.sweep(t.Context(), cutoff, armed, true)
		if !armed || report.Stale != 20 || !errors.Is(err, registrar.ErrFenced) {
			t.Errorf("armed %v, %d stale, error %v; want ErrFenced", armed, report.Stale, err)
		}
		if n := len(g.members(t, "web")); n != 20 {
			t.Errorf("%d of 20 left", n)
		}
		if s := r.Status(); s.Armed || s.Cause != causeReap {
			t.Errorf("a void licence must disarm: %+v", s)
		}
	})
	t.Run("between survey and removal", func(t *testing.T) {
		g, r, old := newWorld(t)
		g.put(t, "web", "10.9.9.9:80", 1) // the reason to remove at all
		r.store = &outage{Store: g.store, reap: func(*registrar.Sweep) { g.restore(t, old) }}
		_, err := r.Sweep(t.Context())
		if !errors.Is(err, registrar.ErrFenced) {
			t.Errorf("got %v, want ErrFenced", err)
		}
		if n := len(g.members(t, "web")); n != 20 {
			t.Errorf("%d of 20 left", n)
		}
	})
	// The snapshot has the pulse, and not the beats after it.
	t.Run("between pulse and removal, with the pulse", func(t *testing.T) {
		g := newRegistry(t)
		r := newReaper(t, Config{}, g.store, zerolog.Nop())
		arm(t, r)
		for i := range 20 {
			g.put(t, "web", fmt.Sprintf("10.0.0.%d:80", i+1), g.clock(t)-time.Hour.Milliseconds())
		}
		mustPulse(t, r)
		withPulse := g.snapshot(t)
		for i := range 20 {
			g.put(t, "web", fmt.Sprintf("10.0.0.%d:80", i+1), g.clock(t))
		}
		g.restore(t, withPulse)
		cutoff, armed := r.proof.cutoff()
		report, err := r.sweep(t.Context(), cutoff, armed, true)
		if !armed || report.Stale != 20 || !errors.Is(err, registrar.ErrFenced) {
			t.Errorf("armed %v, %d stale, error %v; want ErrFenced", armed, report.Stale, err)
		}
		if n := len(g.members(t, "web")); n != 20 {
			t.Errorf("%d of 20 left", n)
		}
		mustPulse(t, r)
		if s := r.Status(); s.Armed || s.Cause != causeReplID || r.proof.resets != 1 {
			t.Errorf("got %+v, %d resets, want a hard fault by the replication id", s, r.proof.resets)
		}
	})
	t.Run("between two pulses", func(t *testing.T) {
		g, r, old := newWorld(t)
		g.restore(t, old)
		mustPulse(t, r)
		if s := r.Status(); s.Armed || s.Cause != causeToken || r.proof.resets != 1 {
			t.Errorf("got %+v, %d resets, want a hard fault by the token", s, r.proof.resets)
		}
		if report := mustSweep(t, r); report.Armed || len(report.Removed) > 0 {
			t.Errorf("got %+v", report)
		}
		if n := len(g.members(t, "web")); n != 20 {
			t.Errorf("%d of 20 left", n)
		}
	})
}

func TestFlushIsAHardFault(t *testing.T) {
	g := newRegistry(t)
	r := newReaper(t, Config{}, g.store, zerolog.Nop())
	arm(t, r)
	if err := g.rdb.FlushAll(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	mustPulse(t, r)
	if s := r.Status(); s.Armed || r.proof.resets != 1 {
		t.Errorf("got %+v, %d resets, want a hard fault", s, r.proof.resets)
	}
	mustSweep(t, r)
	got, err := g.store.Config(t.Context(), registrar.DefaultTTL, registrar.DefaultInterval, false)
	if err != nil || got.TTL != r.cfg.TTL {
		t.Errorf("after the flush: TTL %v, %v; want the reaper's again", got.TTL, err)
	}
}

func TestTwoReapersOfOneID(t *testing.T) {
	g := newRegistry(t)
	a := newReaper(t, Config{}, g.store, zerolog.Nop())
	b := newReaper(t, Config{}, newStore(t, g.srv), zerolog.Nop())
	arm(t, a)
	mustPulse(t, b)
	if _, err := a.sweep(t.Context(), 0, true, true); err != nil {
		t.Fatal(err) // nothing to remove
	}
	mustPulse(t, a)
	if s := a.Status(); s.Armed || s.Cause != causeToken {
		t.Errorf("got %+v", s)
	}
}

func TestRefusedPulse(t *testing.T) {
	tests := []struct {
		name string
		set  []any
		code string
	}{
		{"read-only", []any{"REPLICAOF", "127.0.0.1", "1"}, "READONLY"},
		{"full", []any{"CONFIG", "SET", "maxmemory-policy", "noeviction", "maxmemory", "1"}, "OOM"},
		{"too few replicas", []any{"CONFIG", "SET", "min-replicas-to-write", "1"}, "NOREPLICAS"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := newRegistry(t)
			log := &logBuffer{}
			r := newReaper(t, Config{}, g.store, zerolog.New(log))
			arm(t, r)
			g.put(t, "web", "10.0.0.1:80", 1)
			if err := g.rdb.Do(t.Context(), tt.set...).Err(); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				if err := r.Pulse(t.Context()); err == nil || !strings.Contains(err.Error(), tt.code) {
					t.Fatalf("got %v, want %s", err, tt.code)
				}
			}
			if s := r.Status(); s.Armed || s.Cause != causePulse || r.proof.resets != 0 {
				t.Errorf("got %+v, %d resets, want a soft fault", s, r.proof.resets)
			}
			if _, err := r.Sweep(t.Context()); !errors.Is(err, errNoPulse) {
				t.Errorf("sweep: %v", err)
			}
			g.wantMembers(t, "web", "10.0.0.1:80")
			if lines := log.lines("not armed"); len(lines) != 1 || !strings.Contains(lines[0], tt.code) {
				t.Errorf("in the log: %q, want one line with %s", lines, tt.code)
			}
		})
	}
}

// The removal waits in a socket until its pulse is 2.5 P old.
func TestLateRemoval(t *testing.T) {
	g := newRegistry(t)
	r := newReaper(t, Config{}, nil, zerolog.Nop())
	r.store = &outage{Store: g.store, reap: func(w *registrar.Sweep) { w.Last -= w.MaxAge.Milliseconds() + 1 }}
	arm(t, r)
	g.put(t, "web", "10.0.0.1:80", 1)
	if _, err := r.Sweep(t.Context()); !errors.Is(err, registrar.ErrLate) {
		t.Errorf("got %v, want ErrLate", err)
	}
	if s := r.Status(); s.Armed || s.Cause != causeReap || r.proof.resets != 0 {
		t.Errorf("got %+v", s)
	}
	g.wantMembers(t, "web", "10.0.0.1:80")
}

// The removal is refused although the pulse was not: a soft fault.
func TestRefusedRemoval(t *testing.T) {
	g := newRegistry(t)
	r := newReaper(t, Config{}, nil, zerolog.Nop())
	r.store = &outage{Store: g.store, reap: func(*registrar.Sweep) {
		if err := g.rdb.ConfigSet(t.Context(), "min-replicas-to-write", "1").Err(); err != nil {
			t.Error(err)
		}
	}}
	arm(t, r)
	g.put(t, "a", "10.0.0.1:80", 1)
	g.put(t, "b", "10.0.0.1:80", 1)
	if _, err := r.Sweep(t.Context()); err == nil || !strings.Contains(err.Error(), "reap a") || strings.Contains(err.Error(), "reap b") {
		t.Errorf("got %v, want the end at a", err)
	}
	if s := r.Status(); s.Armed || s.Cause != causeReap || r.proof.resets != 0 {
		t.Errorf("got %+v", s)
	}
}
