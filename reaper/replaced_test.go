package reaper

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"rollcall/registrar"
)

// TestReplacedIsNotHeld has four instances of web look dead at once, which the
// protection holds, while other services have beaten at their addresses at other times.
func TestReplacedIsNotHeld(t *testing.T) {
	const ttl = 30_000
	addr := func(i int) string { return fmt.Sprintf("10.0.0.%d:80", i) }
	for _, c := range []struct {
		name     string
		age      map[int]int64 // of api's heartbeat at an address, ms
		alive    map[int]bool  // those of web that beat
		unproven bool
		out      []string
		held     bool
	}{
		{name: "nobody else", held: true},
		{name: "one", age: map[int]int64{2: 0}, out: []string{addr(2)}, held: true},
		{name: "it has not missed a heartbeat", age: map[int]int64{2: ttl/2 - 2000}, out: []string{addr(2)}, held: true},
		{name: "it is silent too", age: map[int]int64{2: ttl/2 + 1}, held: true},
		{name: "all, the last too", age: map[int]int64{1: 0, 2: 0, 3: 0, 4: 0}, out: []string{addr(1), addr(2), addr(3), addr(4)}, held: true},
		{name: "both beat", age: map[int]int64{1: 0, 2: 0}, alive: map[int]bool{1: true}, out: []string{addr(2)}, held: true},
		{name: "not armed", age: map[int]int64{2: 0}, unproven: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newRegistry(t)
			r := newReaper(t, Config{}, g.store, zerolog.Nop())
			mustPulse(t, r)
			if !c.unproven {
				arm(t, r)
			}
			now := g.clock(t)
			var all []string
			for i := 1; i <= 4; i++ {
				all = append(all, addr(i))
				at := now - 2*ttl
				if c.alive[i] {
					at = now
				}
				g.put(t, "web", addr(i), at)
			}
			for i, age := range c.age {
				g.put(t, "api", addr(i), now-age)
			}
			report := mustSweep(t, r)
			var out []string
			for _, removal := range report.Removed {
				if removal.Service != "web" {
					t.Errorf("took out of %s: %q", removal.Service, removal.Addrs)
				}
				out = append(out, removal.Addrs...)
			}
			slices.Sort(out)
			if !slices.Equal(out, c.out) || (len(report.Held) > 0) != c.held {
				t.Errorf("took out %q, held %+v; want %q, held %v", out, report.Held, c.out, c.held)
			}
			g.wantMembers(t, "web", slices.DeleteFunc(all, func(a string) bool { return slices.Contains(c.out, a) })...)
		})
	}
}

// TestReplacedOfMany has more stale instances held than one look is for, of which the
// last ones are replaced.
func TestReplacedOfMany(t *testing.T) {
	g := newRegistry(t)
	r := newReaper(t, Config{}, g.store, zerolog.Nop())
	now := g.clock(t)
	const many, replaced = looksMost + 300, 150
	for i := range many {
		a := fmt.Sprintf("10.0.%d.%d:80", i/200, i%200)
		g.put(t, "web", a, now-3_600_000+int64(i))
		if i >= many-replaced {
			g.put(t, "api", a, now)
		}
	}
	arm(t, r)
	out := 0
	for sweep := 1; out < replaced; sweep++ {
		report := mustSweep(t, r)
		for _, removal := range report.Removed {
			out += len(removal.Addrs)
		}
		if sweep > 3 {
			t.Fatalf("after %d sweeps %d are out, want %d", sweep, out, replaced)
		}
	}
	if n := len(g.members(t, "web")); n != many-replaced {
		t.Errorf("%d are left, want %d", n, many-replaced)
	}
}

// TestReplacedAtOnce runs a reaper that holds five instances, and has another service
// beat at the address of one.
func TestReplacedAtOnce(t *testing.T) {
	g := newRegistry(t)
	r := newReaper(t, Config{TTL: registrar.DefaultTTL, Interval: registrar.DefaultInterval}, g.store, zerolog.Nop())
	old := g.clock(t) - 60_000
	for i := range 5 {
		g.put(t, "web", fmt.Sprintf("10.0.0.%d:80", i), old)
	}
	arm(t, r)
	run(t, r)
	eventually(t, func() error {
		if s := r.Status(); len(s.Held) == 0 {
			return fmt.Errorf("nothing is held: %+v", s)
		}
		return nil
	})
	begun := time.Now()
	g.put(t, "api", "10.0.0.3:80", g.clock(t))
	eventually(t, func() error {
		if gone := g.expired(t, "web"); gone["10.0.0.3:80"] == 0 {
			return errors.New("the replaced one is not out")
		}
		return nil
	})
	t.Logf("out %v after the first heartbeat of the other service", time.Since(begun).Round(time.Millisecond))
	g.wantMembers(t, "web", "10.0.0.0:80", "10.0.0.1:80", "10.0.0.2:80", "10.0.0.4:80")
}
