package registrar

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// TestMissing holds every answer of Missing, of one service with two instances and two
// balancers.
func TestMissing(t *testing.T) {
	t.Parallel()
	a, b := netip.MustParseAddrPort("10.0.0.1:80"), netip.MustParseAddrPort("10.0.0.2:80")
	up := ServerState{Server: "s1", State: "ready", Check: "up", Weight: 100}
	down := ServerState{Server: "s1", State: "ready", Check: "down", Weight: 100, Why: "its health check in HAProxy fails"}
	excluded := ServerState{Note: NoteRefused, Excluded: true, Why: "in none of the allowed networks"}
	fault := ServerState{Note: NoteRefused, Why: "the backend is not driven"}
	unplaced := ServerState{Note: NoteUnplaced, Why: "no slot is left"}
	undone := ServerState{Server: "s1", State: "ready", Weight: 0, Note: NoteUndone, Why: "its agent keeps it out"}
	held := ServerState{Server: "s1", State: "ready", Check: "up", Weight: 100, Note: NoteHeld}
	type states = map[netip.AddrPort]ServerState
	ready, converged := Wanted{Ready: 2}, Wanted{Ready: -1}
	at := func(w Wanted, version int64) Wanted { w.Version = version; return w }
	unheard := func(v *Served) {
		v.Token.Version, v.Acks.Token.Version, v.Acks.Balancers[0].Applied, v.Entries = 0, 0, 0, nil
	}
	for _, c := range []struct {
		name     string
		w        Wanted
		lb1, lb2 states // nil: it does not live
		change   func(*Served)
		want     string // in the error; "" = none
		hopeless bool
	}{
		{name: "both serve", w: ready, lb1: states{a: up, b: up}, lb2: states{a: up, b: up}},
		{name: "one of two is enough for one", w: Wanted{Ready: 1}, lb1: states{a: up, b: down}},
		{name: "held is served", w: ready, lb1: states{a: up, b: held}},
		{name: "one is down at one", w: ready, lb1: states{a: up, b: up}, lb2: states{a: up, b: down}, want: "1 of 2 instances serve; not 10.0.0.2:80 at lb2/be: down (its health check in HAProxy fails)"},
		{name: "down is converged", w: converged, lb1: states{a: up, b: down}},
		{name: "excluded at one is not to be served there", w: ready, lb1: states{a: up, b: up}, lb2: states{a: up, b: excluded}},
		{name: "and is converged", w: converged, lb1: states{a: up, b: up}, lb2: states{a: up, b: excluded}},
		{name: "refused by all", w: ready, lb1: states{a: up, b: excluded}, lb2: states{a: up, b: excluded}, want: "every balancer refuses 10.0.0.2:80 at lb1/be: excluded", hopeless: true},
		{name: "refused by all is not converged", w: converged, lb1: states{a: up, b: excluded}, want: "every balancer refuses", hopeless: true},
		{name: "refused by all, and another may come", w: Wanted{Ready: 3}, lb1: states{a: up, b: excluded}, want: "1 of 3 instances serve; not 10.0.0.2:80"},
		{name: "a backend that is not driven may be mended", w: ready, lb1: states{a: fault, b: fault}, want: "0 of 2 instances serve; not 10.0.0.1:80 at lb1/be: refused (the backend is not driven)"},
		{name: "and is not converged", w: converged, lb1: states{a: fault, b: fault}, want: "not served: 10.0.0.1:80 at lb1/be: refused"},
		{name: "unplaced", w: ready, lb1: states{a: up, b: unplaced}, want: "unplaced (no slot is left)"},
		{name: "unplaced is not converged", w: converged, lb1: states{a: up, b: unplaced}, want: "not served: 10.0.0.2:80 at lb1/be: unplaced"},
		{name: "undone", w: ready, lb1: states{a: up, b: undone}, want: "undone (its agent keeps it out)"},
		{name: "undone is not converged", w: converged, lb1: states{a: up, b: undone}, want: "undone"},
		{name: "nothing said yet", w: ready, lb1: states{a: up}, want: "10.0.0.2:80 at lb1: pending"},
		{name: "too few are registered", w: Wanted{Ready: 3}, lb1: states{a: up, b: up}, want: "2 of 3 instances serve; 2 are registered to serve"},
		{name: "none is wanted", w: Wanted{Ready: 0}, lb1: states{}},
		{name: "no balancer", w: ready, want: "no live balancer follows web: run lbsync --backend web=BACKEND"},
		{name: "no balancer is enough", w: Wanted{Ready: 2, NoBalancer: true}},
		{name: "no balancer, converged", w: converged, want: "no live balancer"},
		{name: "another's version", w: at(ready, 7), lb1: states{a: up, b: up}, lb2: states{a: up, b: up}, change: func(v *Served) { v.Acks.Balancers[1].Applied = 6 }, want: "version 7: 1 of 2 live balancers have not applied it: lb2 at version 6"},
		{name: "applied, and not looked since", w: at(converged, 7), lb1: states{a: up, b: up}, change: func(v *Served) { v.Sights[0].Version = 6 }, want: "version 7: 1 of 1 live balancers have not applied it: lb1 at version 6"},
		{name: "a version that is to come", w: at(converged, 8), lb1: states{a: up, b: up}, want: "version is 7, want 8"},
		{name: "two lbsyncs of one id", w: ready, lb1: states{a: up, b: up}, change: func(v *Served) { v.Acks.Balancers[0].Double = true }, want: "two lbsyncs acknowledge as it"},
		{name: "and converged", w: converged, lb1: states{a: up, b: up}, change: func(v *Served) { v.Acks.Balancers[0].Double = true }, want: "two lbsyncs acknowledge as lb1"},
		{name: "nobody knows the service", w: ready, lb1: states{}, change: unheard, want: "nobody has ever registered as web"},
		{name: "nobody needs to", w: Wanted{Ready: -1, Absent: true}, lb1: states{}, change: unheard},
		{name: "long silent", w: ready, lb1: states{a: up, b: up}, change: func(v *Served) { v.Entries[1].Instance.Beat = t0 - 16_000 }, want: "1 of 2 instances serve; not 10.0.0.2:80, silent for 16s"},
		{name: "drained by its own word", w: ready, lb1: states{a: up, b: up}, change: func(v *Served) { v.Entries[1].Instance.Admin.State = AdminDrain }, want: "1 of 2 instances serve; 1 are registered to serve"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := Served{Snapshot: Snapshot{Now: t0, TTL: 15 * time.Second, Token: Token{"r", "e", 7}}, Acks: Acks{Token: Token{"r", "e", 7}}}
			for _, addr := range []netip.AddrPort{a, b} {
				v.Entries = append(v.Entries, Entry{Addr: addr, Present: true, Instance: Instance{Addr: addr, Beat: t0, Meta: Meta{Weight: 100}}})
			}
			for i, of := range []states{c.lb1, c.lb2} {
				id := []string{"lb1", "lb2"}[i]
				v.Acks.Balancers = append(v.Acks.Balancers, Balancer{ID: id, Applied: 7, Live: of != nil})
				if of == nil {
					continue
				}
				s := Sight{Balancer: id, Version: 7, Servers: map[netip.AddrPort]map[string]ServerState{}}
				for addr, st := range of {
					s.Servers[addr] = map[string]ServerState{"be": st}
				}
				v.Sights = append(v.Sights, s)
			}
			if c.change != nil {
				c.change(&v)
			}
			err := v.Missing("web", c.w)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if errors.Is(err, ErrHopeless) != c.hopeless {
				t.Errorf("waiting is of no use: %v", err)
			}
		})
	}
	// In two backends of one balancer: in each that is to serve it.
	v := Served{Acks: Acks{Balancers: []Balancer{{ID: "lb1", Live: true}}}, Sights: []Sight{{Balancer: "lb1", Servers: map[netip.AddrPort]map[string]ServerState{
		a: {"be": up, "be2": excluded}, b: {"be": up, "be2": down},
	}}}}
	if by := v.By(a); !by.All() || by.Of != 1 || len(by.Not) != 1 {
		t.Errorf("%+v", by)
	}
	if by := v.By(b); by.All() || by.Of != 1 || by.Serving != 0 || by.Not[0].Backend != "be2" {
		t.Errorf("%+v", by)
	}
}
