package lbsync

import (
	"cmp"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"rollcall/registrar"
)

// words prints ops in one line each, short.
func words(ops []Op) string {
	names := map[Kind]string{
		Add: "add", SetAddr: "addr", EnableHealth: "health", SetReady: "ready", SetDrain: "drain", SetMaint: "maint",
		HealthDown: "down", SetWeight: "weight", Shutdown: "shutdown", Delete: "del",
	}
	out := make([]string, len(ops))
	for i, o := range ops {
		out[i] = names[o.Kind] + " " + o.Name
		switch o.Kind {
		case Add, SetAddr:
			out[i] += " " + o.Addr.String()
		case SetWeight:
			out[i] += fmt.Sprint(" ", o.Weight)
			if o.Percent {
				out[i] += "%"
			}
		}
	}
	return strings.Join(out, "; ")
}

var (
	addrA = netip.MustParseAddrPort("10.0.0.1:80")
	addrB = netip.MustParseAddrPort("10.0.0.2:80")
	addr6 = netip.MustParseAddrPort("[2001:db8::1]:80")
	unset = netip.MustParseAddrPort("127.0.0.1:1")
)

var debian12 = Process{PID: 10, Started: 100, Version: "2.6.12-1+deb12u4"}

func slot(n int, addr netip.AddrPort, admin Admin, weight int) Server {
	return Server{Name: fmt.Sprint("s", n), ID: n, Addr: addr, Slot: true, Admin: admin, Weight: weight, Up: admin != Maint}
}

func dynamic(addr netip.AddrPort, admin Admin, weight int) Server {
	return Server{Name: DynamicName(addr), ID: 7, Addr: addr, Admin: admin, Weight: weight, Up: admin != Maint}
}

func with(s Server, f func(*Server)) Server {
	f(&s)
	return s
}

func TestPlan(t *testing.T) {
	now := time.Now()
	serveA := Want{Addr: addrA, Goal: Serve, Weight: 100}
	leaveA := Want{Addr: addrA, Goal: Leave}
	checked := func(s *Server) { s.Checked = true }
	for _, tt := range []struct {
		name    string
		have    []Server
		want    Want
		process Process
		dynamic bool
		checks  bool
		static  bool
		ops     string
		without bool // no slot for it
	}{
		{name: "keep touches nothing", have: []Server{slot(1, addrA, Ready, 5)}, want: Want{Addr: addrA}},
		{name: "true already", have: []Server{slot(1, addrA, Ready, 100)}, want: serveA},
		{name: "a new one in a fresh slot loses its weight first", have: []Server{slot(1, unset, Maint, 1)}, want: serveA, ops: "weight s1 0; addr s1 10.0.0.1:80"},
		{name: "but not beside a slot that took an address", have: []Server{slot(1, addrB, Ready, 9), slot(2, unset, Maint, 1)}, want: serveA,
			ops: "weight s2 0; addr s2 10.0.0.1:80; ready s2; weight s2 100"},
		{name: "nor is one that was made ready by mistake", have: []Server{slot(1, addrB, Ready, 9), slot(2, unset, Drain, 50)}, want: Want{Addr: addrA, Goal: Serve, State: Drain, Weight: 50},
			ops: "weight s2 0; maint s2; weight s2 0; addr s2 10.0.0.1:80"},
		{name: "unless that is of another template", have: []Server{with(slot(1, addrB, Ready, 9), func(s *Server) { s.Name = "old1" }), slot(2, unset, Maint, 1)}, want: serveA,
			ops: "weight s2 0; addr s2 10.0.0.1:80"},
		{name: "or no slot", have: []Server{with(dynamic(addrB, Ready, 9), func(s *Server) { s.Name = "rc_1" }), with(slot(2, unset, Maint, 1), func(s *Server) { s.Name = "rc_2" })}, want: serveA,
			ops: "weight rc_2 0; addr rc_2 10.0.0.1:80"},
		{name: "a new one in a used slot", have: []Server{slot(1, addrB, Maint, 0)}, want: serveA, ops: "weight s1 0; addr s1 10.0.0.1:80; ready s1; weight s1 100"},
		{name: "a new one in a used slot with a check", have: []Server{with(slot(1, addrB, Maint, 0), checked)}, want: serveA, ops: "weight s1 0; addr s1 10.0.0.1:80; ready s1; down s1; weight s1 100"},
		{name: "killed after the address was set", have: []Server{slot(1, addrA, Maint, 0)}, want: serveA, ops: "ready s1; weight s1 100"},
		{name: "a new one in no slot", have: []Server{slot(1, addrB, Ready, 9)}, want: serveA, without: true},
		{name: "a new one, dynamic", dynamic: true, want: serveA, ops: "add rc_10.0.0.1:80 10.0.0.1:80; ready rc_10.0.0.1:80; weight rc_10.0.0.1:80 100"},
		{name: "a new one, dynamic, IPv6", dynamic: true, want: Want{Addr: addr6, Goal: Serve}, ops: "add rc_2001:db8::1:80 [2001:db8::1]:80; ready rc_2001:db8::1:80"},
		{name: "placed, then made ready", have: []Server{slot(1, addrA, Maint, 0)}, want: serveA, ops: "ready s1; weight s1 100"},
		{name: "with a check it waits for the check", have: []Server{with(slot(1, addrA, Maint, 0), checked)}, want: serveA, ops: "ready s1; down s1; weight s1 100"},
		{name: "unless it was up a moment ago", have: []Server{with(slot(1, addrA, Maint, 0), checked)}, want: Want{Addr: addrA, Goal: Serve, Weight: 100, Fast: true}, ops: "ready s1; weight s1 100"},
		{name: "killed after ready", have: []Server{with(slot(1, addrA, Ready, 0), checked)}, want: serveA, ops: "down s1; weight s1 100"},
		{name: "weight 0 until now, check passed", have: []Server{with(slot(1, addrA, Ready, 0), func(s *Server) { s.Checked, s.Passed = true, true })}, want: serveA, ops: "weight s1 100"},
		{name: "dynamic with a check", dynamic: true, checks: true, have: []Server{dynamic(addrA, Maint, 0)}, want: serveA,
			ops: "health rc_10.0.0.1:80; ready rc_10.0.0.1:80; down rc_10.0.0.1:80; weight rc_10.0.0.1:80 100"},
		{name: "weight", have: []Server{slot(1, addrA, Ready, 5)}, want: serveA, ops: "weight s1 100"},
		{name: "weight 0 is a weight", have: []Server{slot(1, addrA, Maint, 0)}, want: Want{Addr: addrA, Goal: Serve}, ops: "ready s1"},
		{name: "weight of a static algorithm", static: true, have: []Server{slot(1, addrA, Ready, 0)}, want: serveA, ops: "weight s1 100%"},
		{name: "which is as it is configured", static: true, have: []Server{slot(1, addrA, Ready, 3)}, want: serveA},
		{name: "or none", static: true, have: []Server{slot(1, addrA, Ready, 3)}, want: Want{Addr: addrA, Goal: Serve}, ops: "weight s1 0%"},
		{name: "drain", have: []Server{slot(1, addrA, Ready, 100)}, want: Want{Addr: addrA, Goal: Serve, State: Drain, Weight: 100}, ops: "drain s1"},
		{name: "drain on arrival", have: []Server{slot(1, addrA, Maint, 0)}, want: Want{Addr: addrA, Goal: Serve, State: Drain, Weight: 100}, ops: "drain s1; weight s1 100"},
		{name: "drain ends", have: []Server{slot(1, addrA, Drain, 100)}, want: serveA, ops: "ready s1"},
		{name: "maint", have: []Server{slot(1, addrA, Ready, 100)}, want: Want{Addr: addrA, Goal: Serve, State: Maint, Weight: 100}, ops: "weight s1 0; maint s1"},
		{name: "maint on arrival stays in maint", have: []Server{slot(1, addrA, Maint, 0)}, want: Want{Addr: addrA, Goal: Serve, State: Maint, Weight: 100}},
		{name: "a human's maint stays", have: []Server{slot(1, addrA, Maint, 100)}, want: serveA},
		{name: "a human's maint becomes the operator's", have: []Server{slot(1, addrA, Maint, 100)}, want: Want{Addr: addrA, Goal: Serve, State: Maint}, ops: "weight s1 0"},
		{name: "leave", have: []Server{slot(1, addrA, Ready, 100)}, want: leaveA, ops: "drain s1"},
		{name: "leave waits for connections", have: []Server{with(slot(1, addrA, Drain, 100), func(s *Server) { s.Busy = 1 })}, want: leaveA},
		{name: "leave waits when it cannot know", have: []Server{with(slot(1, addrA, Drain, 100), func(s *Server) { s.Busy = -1 })}, want: leaveA},
		{name: "but not for ever", have: []Server{with(slot(1, addrA, Drain, 100), func(s *Server) { s.Busy = 1 })}, want: Want{Addr: addrA, Goal: Leave, Overdue: true}, ops: "weight s1 0; maint s1"},
		{name: "nor if dynamic", have: []Server{with(dynamic(addrA, Drain, 100), func(s *Server) { s.Busy = 1 })}, want: Want{Addr: addrA, Goal: Leave, Overdue: true},
			ops: "shutdown rc_10.0.0.1:80; weight rc_10.0.0.1:80 0; maint rc_10.0.0.1:80"},
		{name: "leave, idle", have: []Server{slot(1, addrA, Drain, 100)}, want: leaveA, ops: "weight s1 0; maint s1"},
		{name: "dynamic stays in quarantine", have: []Server{dynamic(addrA, Maint, 0)}, want: leaveA},
		{name: "and is deleted after it", have: []Server{dynamic(addrA, Maint, 0)}, want: Want{Addr: addrA, Goal: Leave, Settled: true},
			ops: "drain rc_10.0.0.1:80; maint rc_10.0.0.1:80; del rc_10.0.0.1:80"},
		{name: "back before its slot was given away", have: []Server{slot(1, addrA, Maint, 0), slot(2, unset, Maint, 1)}, want: serveA, ops: "ready s1; weight s1 100"},
		{name: "another's server with the address is not ours", have: []Server{{Name: "static", ID: 3, Addr: addrA, Up: true, Weight: 1}}, want: leaveA},
		{name: "a used slot of HAProxy 2.9 is looked at first", process: Process{Version: "2.9.0-fddb8c13b"}, have: []Server{slot(1, addrB, Maint, 0)}, want: serveA, ops: "weight s1 0; addr s1 10.0.0.1:80"},
		{name: "and so where the version is unknown", process: Process{Version: "new"}, have: []Server{slot(1, addrB, Maint, 0)}, want: serveA, ops: "weight s1 0; addr s1 10.0.0.1:80"},
		{name: "2.8 gives the address at once", process: Process{Version: "2.8.0"}, have: []Server{slot(1, addrB, Maint, 0)}, want: serveA, ops: "weight s1 0; addr s1 10.0.0.1:80; ready s1; weight s1 100"},
		{name: "a slot without an address is no slot", have: []Server{slot(1, netip.AddrPort{}, Maint, 1)}, want: serveA, without: true},
		{name: "of two with one address one goes", have: []Server{slot(1, addrA, Drain, 100), slot(2, addrA, Ready, 100)}, want: serveA, ops: "weight s1 0; maint s1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inv := NewInventory(State{cmp.Or(tt.process, debian12), tt.have}, func(a netip.AddrPort) bool { return tt.want.Goal == Serve && a == tt.want.Addr })
			inv.Dynamic, inv.Checks, inv.Static = tt.dynamic, tt.checks, tt.static
			ops, unplaced := Plan([]Want{tt.want}, inv, now, time.Second)
			if got := words(ops); got != tt.ops {
				t.Errorf("got  %s\nwant %s", got, tt.ops)
			}
			if (len(unplaced) > 0) != tt.without {
				t.Errorf("without a slot: %v", unplaced)
			}
		})
	}
}

// What a look at the first slot that got an address has proven, is true of the next.
func TestSecondFreshSlot(t *testing.T) {
	inv := NewInventory(State{debian12, []Server{slot(1, unset, Maint, 1), slot(2, unset, Maint, 1)}}, func(netip.AddrPort) bool { return true })
	first, _ := Plan([]Want{{Addr: addrA, Goal: Serve, Weight: 1}}, inv, time.Now(), time.Second)
	inv.Update(first, []Server{slot(1, addrA, Maint, 0)})
	second, _ := Plan([]Want{{Addr: addrB, Goal: Serve, Weight: 1}}, inv, time.Now(), time.Second)
	if got, want := words(second), "weight s2 0; addr s2 10.0.0.2:80; ready s2; weight s2 1"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestSlotsAreUsedAgainAfterQuarantine(t *testing.T) {
	now := time.Now()
	inv := NewInventory(State{debian12, []Server{slot(1, addrA, Maint, 0)}}, func(netip.AddrPort) bool { return true })
	if !inv.Release(addrA, now) {
		t.Fatal("not released")
	}
	want := []Want{{Addr: addrB, Goal: Serve, Weight: 1}}
	if ops, unplaced := Plan(want, inv, now.Add(time.Second-1), time.Second); len(ops) != 0 || len(unplaced) != 1 {
		t.Errorf("in quarantine: %s", words(ops))
	}
	// Who comes back meanwhile gets its own slot, at once.
	if ops, _ := Plan([]Want{{Addr: addrA, Goal: Serve, Weight: 1}}, inv, now, time.Second); words(ops) != "ready s1; weight s1 1" {
		t.Errorf("back: %s", words(ops))
	}
	if !inv.Release(addrA, now.Add(time.Second)) {
		t.Fatal("not released again")
	}
	if ops, _ := Plan(want, inv, now.Add(2*time.Second-1), time.Second); len(ops) != 0 {
		t.Errorf("in the second quarantine: %s", words(ops))
	}
	if ops, _ := Plan(want, inv, now.Add(2*time.Second), time.Second); words(ops) != "weight s1 0; addr s1 10.0.0.2:80; ready s1; weight s1 1" {
		t.Errorf("after it: %s", words(ops))
	}
}

func TestServingIsCounted(t *testing.T) {
	inv := NewInventory(State{Servers: []Server{
		slot(1, addrA, Ready, 100), {Name: "static", ID: 9, Up: true, Weight: 1}, slot(2, addrB, Drain, 100), slot(3, unset, Maint, 1),
	}}, func(netip.AddrPort) bool { return true })
	if inv.Serving != 2 {
		t.Errorf("%d serve, want 2", inv.Serving)
	}
	inv.Update([]Op{{Kind: SetDrain, Name: "s1"}}, []Server{slot(1, addrA, Drain, 100)})
	inv.Update([]Op{{Kind: SetReady, Name: "s2"}}, []Server{slot(2, addrB, Ready, 100)})
	inv.Update([]Op{{Kind: Add, Name: "rc_10.0.0.9:1"}}, []Server{{Name: "rc_10.0.0.9:1", ID: 4, Up: true, Weight: 2}})
	if inv.Serving != 3 {
		t.Errorf("%d serve, want 3", inv.Serving)
	}
	inv.Update([]Op{{Kind: Delete, Name: "rc_10.0.0.9:1"}, {Kind: Delete, Name: "s2"}}, nil)
	if _, there := inv.Lookup(addrB); inv.Serving != 1 || there {
		t.Errorf("%d serve, want 1", inv.Serving)
	}
}

func TestServerIDs(t *testing.T) {
	first := freeID(addrA, nil, nil)
	if first != freeID(addrA, nil, nil) || first < 1 || first > 1<<31-1 {
		t.Errorf("id %d", first)
	}
	if next := freeID(addrA, map[int]bool{first: true}, map[int]bool{first + 1: true}); next != first+2 {
		t.Errorf("id %d with %d and its successor taken", next, first)
	}
}

func TestDecide(t *testing.T) {
	r := rules{allow: DefaultAllow(), hold: 5 * time.Minute}
	const now = 1_000_000_000
	gone := func(why registrar.Reason) registrar.Entry {
		return registrar.Entry{Addr: addrA, Gone: &registrar.Gone{Reason: why, At: now}}
	}
	here := func(addr string) registrar.Entry {
		a := netip.MustParseAddrPort(addr)
		return registrar.Entry{Addr: a, Present: true, Instance: registrar.Instance{Addr: a}}
	}
	normal := read{ttl: 15 * time.Second, interval: 5 * time.Second}
	doubted, alone := normal, normal
	doubted.doubted = true
	alone.doubted, alone.empty = true, true
	passes := Server{Checked: true, Up: true, Passed: true, Admin: Ready, Weight: 100}
	fails := Server{Checked: true, Admin: Ready, Weight: 100}
	none := Server{Up: true, Admin: Ready, Weight: 100}
	out := Server{Slot: true, Admin: Maint}
	for _, tt := range []struct {
		name   string
		entry  registrar.Entry
		server *Server
		read   read
		goal   Goal
		hold   time.Duration
		word   bool
	}{
		{"here", here("10.0.0.1:80"), nil, normal, Serve, 0, false},
		{"here and served", here("10.0.0.1:80"), &none, normal, Serve, 0, false},
		{"doubted", here("10.0.0.1:80"), nil, doubted, Keep, 0, false},
		{"doubted, but served", here("10.0.0.1:80"), &none, doubted, Serve, 0, false},
		{"doubted, and out of a slot that has its address", here("10.0.0.1:80"), &out, doubted, Keep, 0, false},
		{"doubted, but all there is", here("10.0.0.1:80"), nil, alone, Serve, 0, false},
		{"network not allowed", here("127.0.0.1:80"), nil, normal, Keep, 0, false},
		{"public", here("8.8.8.8:80"), nil, normal, Keep, 0, false},
		{"metadata service", here("169.254.169.254:80"), nil, normal, Keep, 0, false},
		{"private IPv6", here("[fd00::1]:80"), nil, normal, Serve, 0, false},
		{"network allowed no more", here("127.0.0.1:80"), &none, normal, Leave, 0, true},
		{"garbage", registrar.Entry{Addr: addrA, Garbage: "x"}, &none, normal, Keep, 0, false},
		{"never heard of", registrar.Entry{Addr: addrA}, nil, normal, Keep, 0, false},
		{"left", gone(registrar.Left), &passes, normal, Leave, 0, true},
		{"unhealthy", gone(registrar.Unhealthy), &passes, normal, Leave, 0, true},
		{"operator", gone(registrar.Operator), &passes, normal, Leave, 0, true},
		{"left, not there", gone(registrar.Left), nil, normal, Keep, 0, false},
		{"expired, check up", gone(registrar.Expired), &passes, normal, Leave, 5 * time.Minute, false},
		{"expired, check down", gone(registrar.Expired), &fails, normal, Leave, 0, false},
		{"expired, no check", gone(registrar.Expired), &none, normal, Leave, 0, false},
		{"absent, check up", registrar.Entry{Addr: addrA}, &passes, normal, Leave, 5 * time.Minute, false},
		{"absent, check down", registrar.Entry{Addr: addrA}, &fails, normal, Leave, 25 * time.Second, false},
		{"absent, no check", registrar.Entry{Addr: addrA}, &none, normal, Leave, 25 * time.Second, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, there := Server{}, tt.server != nil
			if there {
				s = *tt.server
			}
			v := r.decide(tt.entry, s, there, tt.read)
			if v.goal != tt.goal || v.hold != tt.hold || v.word != tt.word {
				t.Errorf("got %+v, want goal %d, hold %v, word %v", v, tt.goal, tt.hold, tt.word)
			}
		})
	}
}

// BenchmarkPlanOneChange shows that one change costs the same in any backend.
func BenchmarkPlanOneChange(b *testing.B) {
	for _, n := range []int{10, 1000, 10000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			servers := make([]Server, n)
			for i := range servers {
				a := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), 80)
				servers[i] = slot(i+1, a, Ready, 100)
			}
			inv := NewInventory(State{Servers: servers}, func(netip.AddrPort) bool { return true })
			want := []Want{{Addr: servers[n/2].Addr, Goal: Serve, Weight: 7}}
			now := time.Now()
			b.ReportAllocs()
			for b.Loop() {
				if ops, _ := Plan(want, inv, now, time.Second); len(ops) != 1 {
					b.Fatal(ops)
				}
			}
		})
	}
}
