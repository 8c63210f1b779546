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
		HealthDown: "down", SetWeight: "weight", Shutdown: "shutdown", Delete: "del", EnableAgent: "agent", DisableAgent: "no agent",
	}
	out := make([]string, len(ops))
	for i, o := range ops {
		out[i] = names[o.Kind] + " " + o.Name
		switch o.Kind {
		case Add, SetAddr:
			out[i] += " " + o.Addr.String()
			if o.Check {
				out[i] += " check"
			}
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
	return Server{Name: fmt.Sprint("s", n), ID: n, Addr: addr, Slot: true, Admin: admin, Weight: weight, Up: admin != Maint, Configured: 1, Busy: -1}
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
	busy := func(s *Server) { s.Busy = 1 }
	idle := func(s *Server) { s.Busy = 0 }
	backup := func(s *Server) { s.Backup = true }
	agent := func(s *Server) { s.Agent = true }
	untouched := func(s *Server) { s.Untouched = true }
	odd := netip.MustParseAddrPort("10.9.9.9:8080")
	parkedA := func(admin Admin) Server {
		return with(dynamic(addrA, admin, 0), func(s *Server) { s.Addr = Placeholder })
	}
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

		overflow, private bool
		lacks             []Kind
	}{
		{name: "keep touches nothing", have: []Server{slot(1, addrA, Ready, 5)}, want: Want{Addr: addrA}},
		{name: "true already", have: []Server{slot(1, addrA, Ready, 100)}, want: serveA},
		{name: "a new one in a fresh slot is in drain when it gets its address", have: []Server{slot(1, unset, Maint, 1)}, want: serveA, ops: "weight s1 0; drain s1; addr s1 10.0.0.1:80"},
		{name: "and ready at once beside a slot that took an address", have: []Server{slot(1, addrB, Ready, 9), slot(2, unset, Maint, 1)}, want: serveA,
			ops: "weight s2 0; drain s2; addr s2 10.0.0.1:80; ready s2; weight s2 100"},
		{name: "also one that was made ready by mistake", have: []Server{slot(1, addrB, Ready, 9), slot(2, unset, Drain, 50)}, want: Want{Addr: addrA, Goal: Serve, State: Drain, Weight: 50},
			ops: "weight s2 0; maint s2; weight s2 0; drain s2; addr s2 10.0.0.1:80; weight s2 50"},
		{name: "unless that is of another template", have: []Server{with(slot(1, addrB, Ready, 9), func(s *Server) { s.Name = "old1" }), slot(2, unset, Maint, 1)}, want: serveA,
			ops: "weight s2 0; drain s2; addr s2 10.0.0.1:80"},
		{name: "a fresh slot of any placeholder", have: []Server{slot(1, odd, Maint, 1), slot(2, odd, Maint, 1)}, want: serveA, ops: "weight s1 0; drain s1; addr s1 10.0.0.1:80"},
		{name: "which no instance may have", have: []Server{slot(1, netip.MustParseAddrPort("192.0.2.1:80"), Maint, 1)}, want: serveA, ops: "weight s1 0; drain s1; addr s1 10.0.0.1:80"},
		{name: "or of which the register knows nothing", have: []Server{with(slot(1, odd, Maint, 1), untouched)}, want: serveA, ops: "weight s1 0; drain s1; addr s1 10.0.0.1:80"},
		{name: "but not one that somebody touched", have: []Server{slot(1, odd, Maint, 1)}, want: serveA, without: true},
		{name: "nor one whose instance is known", have: []Server{with(slot(1, addrB, Maint, 1), untouched)}, want: serveA, without: true},
		{name: "a fresh slot comes before a used one", have: []Server{slot(1, unset, Maint, 0), slot(2, unset, Maint, 1)}, want: serveA, ops: "weight s2 0; drain s2; addr s2 10.0.0.1:80"},
		{name: "a used slot has its sessions cut", have: []Server{slot(1, addrB, Ready, 9), slot(2, unset, Maint, 0)}, want: serveA,
			ops: "shutdown s2", without: true},
		{name: "and what is idle purged", have: []Server{slot(1, addrB, Ready, 9), with(slot(2, unset, Maint, 0), idle)}, want: serveA,
			ops: "weight s2 0; drain s2; maint s2", without: true},
		{name: "if they can be cut", lacks: []Kind{Shutdown}, have: []Server{slot(1, addrB, Ready, 9), slot(2, unset, Maint, 0)}, want: serveA, without: true},
		{name: "with a check it is down before it is ready", have: []Server{slot(1, addrB, Ready, 9), with(slot(2, unset, Maint, 1), checked)}, want: serveA,
			ops: "weight s2 0; drain s2; down s2; addr s2 10.0.0.1:80; ready s2; weight s2 100"},
		{name: "unless it was up a moment ago", have: []Server{slot(1, addrB, Ready, 9), with(slot(2, unset, Maint, 1), checked)}, want: Want{Addr: addrA, Goal: Serve, Weight: 100, Fast: true},
			ops: "weight s2 0; drain s2; addr s2 10.0.0.1:80; ready s2; weight s2 100"},
		{name: "killed after the address was set", have: []Server{slot(1, addrA, Drain, 0)}, want: serveA, ops: "ready s1; weight s1 100"},
		{name: "killed before it", have: []Server{slot(1, addrB, Ready, 9), slot(2, unset, Drain, 0)}, want: serveA,
			ops: "weight s2 0; maint s2; shutdown s2", without: true},
		{name: "killed before it, another placeholder", have: []Server{slot(1, odd, Maint, 1), slot(2, odd, Maint, 1), slot(3, odd, Drain, 0)}, want: Want{}, ops: "weight s3 0; addr s3 127.0.0.1:1; maint s3"},
		{name: "a new one in no slot", have: []Server{slot(1, addrB, Ready, 9)}, want: serveA, without: true},
		{name: "a new one, dynamic", dynamic: true, want: serveA,
			ops: "add rc_10.0.0.1:80 127.0.0.1:1; drain rc_10.0.0.1:80; addr rc_10.0.0.1:80 10.0.0.1:80; ready rc_10.0.0.1:80; weight rc_10.0.0.1:80 100"},
		{name: "a new one, dynamic, IPv6", dynamic: true, want: Want{Addr: addr6, Goal: Serve},
			ops: "add rc_2001:db8::1:80 127.0.0.1:1; drain rc_2001:db8::1:80; addr rc_2001:db8::1:80 [2001:db8::1]:80; ready rc_2001:db8::1:80"},
		{name: "a new one, dynamic, with a check", dynamic: true, checks: true, want: serveA,
			ops: "add rc_10.0.0.1:80 127.0.0.1:1 check; health rc_10.0.0.1:80; drain rc_10.0.0.1:80; down rc_10.0.0.1:80; addr rc_10.0.0.1:80 10.0.0.1:80; ready rc_10.0.0.1:80; weight rc_10.0.0.1:80 100"},
		{name: "killed after it was added", dynamic: true, have: []Server{parkedA(Maint)}, want: serveA,
			ops: "drain rc_10.0.0.1:80; addr rc_10.0.0.1:80 10.0.0.1:80; ready rc_10.0.0.1:80; weight rc_10.0.0.1:80 100"},
		{name: "beside slots with a check it gets one", overflow: true, have: []Server{with(slot(1, addrB, Ready, 9), checked)}, want: serveA,
			ops: "add rc_10.0.0.1:80 127.0.0.1:1 check; health rc_10.0.0.1:80; drain rc_10.0.0.1:80; down rc_10.0.0.1:80; addr rc_10.0.0.1:80 10.0.0.1:80; ready rc_10.0.0.1:80; weight rc_10.0.0.1:80 100"},
		{name: "which the API cannot give", overflow: true, lacks: []Kind{EnableHealth}, have: []Server{with(slot(1, addrB, Ready, 9), checked)}, want: serveA,
			ops: "add rc_10.0.0.1:80 127.0.0.1:1; drain rc_10.0.0.1:80; addr rc_10.0.0.1:80 10.0.0.1:80; ready rc_10.0.0.1:80; weight rc_10.0.0.1:80 100"},
		{name: "where connections stay tied to a slot, another server is added", overflow: true, private: true, have: []Server{slot(1, addrB, Ready, 9), slot(2, unset, Maint, 0)}, want: serveA,
			ops: "add rc_10.0.0.1:80 127.0.0.1:1; drain rc_10.0.0.1:80; addr rc_10.0.0.1:80 10.0.0.1:80; ready rc_10.0.0.1:80; weight rc_10.0.0.1:80 100"},
		{name: "unless the slot is fresh", overflow: true, private: true, have: []Server{slot(1, addrB, Ready, 9), slot(2, unset, Maint, 1)}, want: serveA,
			ops: "weight s2 0; drain s2; addr s2 10.0.0.1:80; ready s2; weight s2 100"},
		{name: "or nothing can be added", private: true, have: []Server{slot(1, addrB, Ready, 9), slot(2, unset, Maint, 0)}, want: serveA,
			ops: "shutdown s2", without: true},
		{name: "killed after ready", have: []Server{with(slot(1, addrA, Ready, 0), checked)}, want: serveA, ops: "down s1; weight s1 100"},
		{name: "weight 0 until now, check passed", have: []Server{with(slot(1, addrA, Ready, 0), func(s *Server) { s.Checked, s.Passed = true, true })}, want: serveA, ops: "weight s1 100"},
		{name: "weight", have: []Server{slot(1, addrA, Ready, 5)}, want: serveA, ops: "weight s1 100"},
		{name: "weight 0 is a weight", have: []Server{slot(1, addrA, Drain, 0)}, want: Want{Addr: addrA, Goal: Serve}, ops: "ready s1"},
		{name: "weight of a static algorithm", static: true, have: []Server{slot(1, addrA, Ready, 0)}, want: serveA, ops: "weight s1 100%"},
		{name: "which is as it is configured", static: true, have: []Server{slot(1, addrA, Ready, 3)}, want: serveA},
		{name: "or none", static: true, have: []Server{slot(1, addrA, Ready, 3)}, want: Want{Addr: addrA, Goal: Serve}, ops: "weight s1 0%"},
		{name: "drain", have: []Server{slot(1, addrA, Ready, 100)}, want: Want{Addr: addrA, Goal: Serve, State: Drain, Weight: 100}, ops: "drain s1"},
		{name: "drain ends", have: []Server{slot(1, addrA, Drain, 100)}, want: serveA, ops: "ready s1"},
		{name: "drain ends of a server whose check has not passed", have: []Server{with(slot(1, addrA, Drain, 100), checked)}, want: serveA, ops: "down s1; ready s1"},
		{name: "maint frees the slot at once", have: []Server{with(slot(1, addrA, Ready, 100), busy)}, want: Want{Addr: addrA, Goal: Leave, Now: true}, ops: "weight s1 0; drain s1; addr s1 127.0.0.1:1; maint s1"},
		{name: "a human's maint stays", have: []Server{slot(1, addrA, Maint, 100)}, want: serveA},
		{name: "at any weight", have: []Server{slot(1, addrA, Maint, 0)}, want: serveA},
		{name: "and when its instance leaves", have: []Server{slot(1, addrA, Maint, 0)}, want: leaveA},
		{name: "and when its instance is put into maint too", have: []Server{dynamic(addrA, Maint, 0)}, want: Want{Addr: addrA, Goal: Leave, Now: true, Settled: true}},
		{name: "leave", have: []Server{slot(1, addrA, Ready, 100)}, want: leaveA, ops: "drain s1"},
		{name: "leave waits for connections", have: []Server{with(slot(1, addrA, Drain, 100), busy)}, want: leaveA},
		{name: "leave waits when it cannot know", have: []Server{with(slot(1, addrA, Drain, 100), func(s *Server) { s.Busy = -1 })}, want: leaveA},
		{name: "but not for ever", have: []Server{with(slot(1, addrA, Drain, 100), busy)}, want: Want{Addr: addrA, Goal: Leave, Overdue: true}, ops: "weight s1 0; addr s1 127.0.0.1:1; maint s1"},
		{name: "nor if dynamic", have: []Server{with(dynamic(addrA, Drain, 100), busy)}, want: Want{Addr: addrA, Goal: Leave, Overdue: true},
			ops: "shutdown rc_10.0.0.1:80; weight rc_10.0.0.1:80 0; addr rc_10.0.0.1:80 127.0.0.1:1; maint rc_10.0.0.1:80"},
		{name: "leave, idle", have: []Server{with(slot(1, addrA, Drain, 100), idle)}, want: leaveA, ops: "weight s1 0; addr s1 127.0.0.1:1; maint s1"},
		{name: "dynamic stays in quarantine", have: []Server{parkedA(Maint)}, want: leaveA},
		{name: "and is deleted after it", have: []Server{parkedA(Maint)}, want: Want{Addr: addrA, Goal: Leave, Settled: true},
			ops: "drain rc_10.0.0.1:80; maint rc_10.0.0.1:80; del rc_10.0.0.1:80"},
		{name: "not while it has requests", have: []Server{with(parkedA(Maint), busy)}, want: Want{Addr: addrA, Goal: Leave, Settled: true}},
		{name: "which end at last", have: []Server{with(parkedA(Maint), busy)}, want: Want{Addr: addrA, Goal: Leave, Settled: true, Overdue: true},
			ops: "shutdown rc_10.0.0.1:80"},
		{name: "killed before maint", have: []Server{parkedA(Drain)}, want: leaveA, ops: "weight rc_10.0.0.1:80 0; maint rc_10.0.0.1:80"},
		{name: "another's server with the address is not ours", have: []Server{{Name: "static", ID: 3, Addr: addrA, Up: true, Weight: 1}}, want: leaveA},
		{name: "nor one whose name only begins as ours do", have: []Server{with(dynamic(addrA, Ready, 1), func(s *Server) { s.Name = "rc_legacy" })}, want: leaveA},
		{name: "nor one of a name that is not spelled so", have: []Server{with(dynamic(addrA, Ready, 1), func(s *Server) { s.Name = "rc_10.0.0.1:080" })}, want: leaveA},
		{name: "without a check HAProxy 2.9 is looked at first", process: Process{Version: "2.9.0-fddb8c13b"}, have: []Server{slot(1, addrB, Ready, 9), slot(2, unset, Maint, 1)}, want: serveA, ops: "weight s2 0; drain s2; addr s2 10.0.0.1:80"},
		{name: "and so where the version is unknown", process: Process{Version: "new"}, have: []Server{slot(1, addrB, Ready, 9), slot(2, unset, Maint, 1)}, want: serveA, ops: "weight s2 0; drain s2; addr s2 10.0.0.1:80"},
		{name: "with one the check waits for the address", process: Process{Version: "3.2.0"}, have: []Server{slot(1, addrB, Ready, 9), with(slot(2, unset, Maint, 1), checked)}, want: serveA,
			ops: "weight s2 0; drain s2; down s2; addr s2 10.0.0.1:80; ready s2; weight s2 100"},
		{name: "2.8 gives the address at once", process: Process{Version: "2.8.0"}, have: []Server{slot(1, addrB, Ready, 9), slot(2, unset, Maint, 1)}, want: serveA,
			ops: "weight s2 0; drain s2; addr s2 10.0.0.1:80; ready s2; weight s2 100"},
		{name: "a slot without an address is no slot", have: []Server{slot(1, netip.AddrPort{}, Maint, 1)}, want: serveA, without: true},
		{name: "of two with one address one goes", have: []Server{slot(1, addrA, Drain, 100), slot(2, addrA, Ready, 100)}, want: serveA, ops: "weight s1 0; addr s1 127.0.0.1:1; maint s1"},
		{name: "a backup slot takes nobody", have: []Server{with(slot(1, unset, Maint, 1), backup)}, want: serveA, without: true},
		{name: "and gives up whom it has", have: []Server{with(slot(1, addrA, Ready, 100), backup), slot(2, addrB, Ready, 9), slot(3, unset, Maint, 1)}, want: serveA,
			ops: "weight s1 0; drain s1; addr s1 127.0.0.1:1; maint s1; weight s3 0; drain s3; addr s3 10.0.0.1:80; ready s3; weight s3 100"},
		{name: "but not what a human holds there", have: []Server{with(slot(1, addrA, Maint, 0), backup)}, want: Want{}},
		{name: "with an agent the weight is the configured one", have: []Server{slot(1, addrB, Ready, 9), with(slot(2, unset, Maint, 100), agent)}, want: serveA,
			ops: "weight s2 0%; drain s2; addr s2 10.0.0.1:80; agent s2; ready s2; weight s2 100%"},
		{name: "what an agent has made of it stays", have: []Server{with(slot(1, addrA, Drain, 75), agent)}, want: serveA},
		{name: "until something else is to be said", have: []Server{with(slot(1, addrA, Drain, 75), agent)}, want: Want{Addr: addrA, Goal: Serve, Weight: 100, Insist: true}, ops: "ready s1"},
		{name: "with an agent weight 0 is a drain", have: []Server{with(slot(1, addrA, Ready, 75), agent)}, want: Want{Addr: addrA, Goal: Serve, Insist: true}, ops: "drain s1"},
		{name: "an agent cannot end the maint of a free slot", have: []Server{with(with(slot(1, addrA, Drain, 75), agent), idle)}, want: leaveA, ops: "no agent s1; weight s1 0%; addr s1 127.0.0.1:1; maint s1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inv := NewInventory(State{Process: cmp.Or(tt.process, debian12), Servers: tt.have, Lacks: tt.lacks}, Known{
				Allowed:  func(a netip.Addr) bool { return (rules{allow: DefaultAllow()}).allowed(a) || a == addr6.Addr() },
				Instance: func(a netip.AddrPort) bool { return a.Addr().Is6() || a == addrA || a == addrB },
			})
			inv.Dynamic, inv.Checks, inv.Static, inv.Overflow, inv.Private = tt.dynamic, tt.checks, tt.static, tt.overflow, tt.private
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
	inv := NewInventory(State{Process: debian12, Servers: []Server{slot(1, unset, Maint, 1), slot(2, unset, Maint, 1)}}, Known{})
	first, _ := Plan([]Want{{Addr: addrA, Goal: Serve, Weight: 1}}, inv, time.Now(), time.Second)
	inv.Update(first, []Server{slot(1, addrA, Drain, 0)}, time.Now())
	second, _ := Plan([]Want{{Addr: addrB, Goal: Serve, Weight: 1}}, inv, time.Now(), time.Second)
	if got, want := words(second), "weight s2 0; drain s2; addr s2 10.0.0.2:80; ready s2; weight s2 1"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestSlotsAreUsedAgainAfterQuarantine(t *testing.T) {
	now := time.Now()
	idle := func(s Server) Server { return with(s, func(s *Server) { s.Busy = 0 }) }
	inv := NewInventory(State{Process: debian12, Servers: []Server{slot(1, addrA, Drain, 0)}}, Known{})
	free := func(at time.Time, busy int) {
		t.Helper()
		ops, _ := Plan([]Want{{Addr: addrA, Goal: Leave, Now: true}}, inv, at, time.Second)
		inv.Update(ops, []Server{with(slot(1, unset, Maint, 0), func(s *Server) { s.Busy = busy })}, at)
		if _, there := inv.Lookup(addrA); there || inv.Free() != 1 {
			t.Fatalf("not free after %s", words(ops))
		}
	}
	free(now, 0)
	want := []Want{{Addr: addrB, Goal: Serve, Weight: 1}}
	if ops, unplaced := Plan(want, inv, now.Add(time.Second-1), time.Second); len(ops) != 0 || len(unplaced) != 1 {
		t.Errorf("in quarantine: %s", words(ops))
	}
	// An instance that comes back meanwhile gets its own slot, at once, and its
	// sessions go on.
	back := []Want{{Addr: addrA, Goal: Serve, Weight: 1}}
	const placed = "weight s1 0; drain s1; addr s1 10.0.0.1:80; ready s1; weight s1 1"
	ops, _ := Plan(back, inv, now, time.Second)
	if words(ops) != placed {
		t.Errorf("back: %s", words(ops))
	}
	inv.Update(ops, []Server{slot(1, addrA, Ready, 1)}, now)
	free(now, 3)
	if ops, _ = Plan(back, inv, now, time.Second); words(ops) != placed {
		t.Errorf("back, with sessions: %s", words(ops))
	}
	inv.Update(ops, []Server{slot(1, addrA, Ready, 1)}, now)
	free(now.Add(time.Second), 3)
	// What is known of free slots goes over to the next inventory.
	inv = NewInventory(State{Process: debian12, Servers: []Server{slot(1, unset, Maint, 0)}}, inv.remember())
	if ops, _ := Plan(want, inv, now.Add(2*time.Second-1), time.Second); len(ops) != 0 {
		t.Errorf("in the second quarantine: %s", words(ops))
	}
	inv.Overflow = true // then it need not wait
	if ops, _ := Plan(want, inv, now.Add(2*time.Second-1), time.Second); len(ops) == 0 || ops[0].Kind != Add {
		t.Errorf("in the second quarantine, with room beside the slots: %s", words(ops))
	}
	inv.Overflow = false
	// Its sessions are cut, and when they have ended its idle connections purged.
	for _, step := range []struct {
		ops  string
		read Server
	}{
		{"shutdown s1", with(slot(1, unset, Maint, 0), func(s *Server) { s.Busy = 1 })},
		{"shutdown s1", idle(slot(1, unset, Maint, 0))},
		{"weight s1 0; drain s1; maint s1", idle(slot(1, unset, Maint, 0))},
		{"weight s1 0; drain s1; addr s1 10.0.0.2:80", slot(1, addrB, Drain, 0)},
		{"ready s1; weight s1 1", slot(1, addrB, Ready, 1)},
		{"", Server{}},
	} {
		ops, _ := Plan(want, inv, now.Add(2*time.Second), time.Second)
		if words(ops) != step.ops {
			t.Fatalf("got %s, want %s", words(ops), step.ops)
		}
		inv.Update(ops, []Server{step.read}, now.Add(2*time.Second))
	}
}

// A lone slot in maint was taken for one that was never used. It is a human's as soon as
// the register knows an instance at its address.
func TestHearOfALoneSlot(t *testing.T) {
	lone := with(slot(1, addrA, Maint, 1), func(s *Server) { s.Untouched = true })
	inv := NewInventory(State{Process: debian12, Servers: []Server{lone}}, Known{Instance: func(netip.AddrPort) bool { return false }})
	if inv.Human(lone) || inv.Free() != 1 || !inv.Blank(addrA) {
		t.Fatal("it is no unused slot")
	}
	inv.Hear(addrB) // says nothing of it
	inv.Hear(addrA)
	if !inv.Human(lone) || inv.Free() != 0 || inv.Blank(addrA) {
		t.Error("it is no human's")
	}
	ops, unplaced := Plan([]Want{{Addr: addrA, Goal: Serve, Weight: 1}, {Addr: addrB, Goal: Serve, Weight: 1}}, inv, time.Now(), time.Second)
	if len(ops) > 0 || len(unplaced) != 1 || unplaced[0] != addrB {
		t.Errorf("%s; without a slot: %v", words(ops), unplaced)
	}
}

func TestServingIsCounted(t *testing.T) {
	inv := NewInventory(State{Servers: []Server{
		slot(1, addrA, Ready, 100), {Name: "static", ID: 9, Up: true, Weight: 1}, slot(2, addrB, Drain, 100), slot(3, unset, Maint, 1),
		{Name: "sorry", ID: 10, Up: true, Weight: 1, Backup: true},
	}}, Known{})
	if inv.Serving != 2 {
		t.Errorf("%d serve, want 2", inv.Serving)
	}
	inv.Update([]Op{{Kind: SetDrain, Name: "s1"}}, []Server{slot(1, addrA, Drain, 100)}, time.Now())
	inv.Update([]Op{{Kind: SetReady, Name: "s2"}}, []Server{slot(2, addrB, Ready, 100)}, time.Now())
	inv.Update([]Op{{Kind: Add, Name: "rc_10.0.0.9:1"}}, []Server{{Name: "rc_10.0.0.9:1", ID: 4, Up: true, Weight: 2}}, time.Now())
	if inv.Serving != 3 {
		t.Errorf("%d serve, want 3", inv.Serving)
	}
	inv.Update([]Op{{Kind: Delete, Name: "rc_10.0.0.9:1"}, {Kind: Delete, Name: "s2"}}, nil, time.Now())
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
	moved := normal
	moved.moved = true
	human := normal
	human.human = true
	parked := func(r read) read { r.parked = true; return r }
	inMaint := func(e registrar.Entry) registrar.Entry {
		e.Instance.Admin.State = registrar.AdminMaint
		return e
	}
	passes := Server{Checked: true, Up: true, Passed: true, Admin: Ready, Weight: 100}
	fails := Server{Checked: true, Admin: Ready, Weight: 100}
	none := Server{Up: true, Admin: Ready, Weight: 100}
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
		{"doubted, and its added server holds nobody", here("10.0.0.1:80"), &none, parked(doubted), Keep, 0, false},
		{"absent, and its added server holds nobody", registrar.Entry{Addr: addrA}, &none, parked(normal), Leave, 0, true},
		{"in maint", inMaint(here("10.0.0.1:80")), &none, normal, Leave, 0, true},
		{"in maint, not there", inMaint(here("10.0.0.1:80")), nil, normal, Keep, 0, false},
		{"in a human's maint", here("10.0.0.1:80"), &none, human, Serve, 0, false},
		{"in a human's maint and the operator's", inMaint(here("10.0.0.1:80")), &none, human, Keep, 0, false},
		{"in a human's maint, not allowed", here("8.8.8.8:80"), &none, human, Keep, 0, false},
		{"in a human's maint, left", gone(registrar.Left), &none, human, Keep, 0, false},
		{"in a human's maint, absent", registrar.Entry{Addr: addrA}, &none, human, Keep, 0, false},
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
		{"absent where the registry has just moved to", registrar.Entry{Addr: addrA}, &none, moved, Leave, time.Minute, false},
		{"expired where the registry has just moved to", gone(registrar.Expired), &none, moved, Leave, time.Minute, false},
		{"left where the registry has just moved to", gone(registrar.Left), &none, moved, Leave, 0, true},
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
			inv := NewInventory(State{Servers: servers}, Known{})
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
