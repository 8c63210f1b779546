package lbsync

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"rollcall/notifier"
	"rollcall/registrar"
)

// TestTheDeadStayOut has an interruption bring back somebody dead. No reaper is
// armed until a TTL and a heartbeat later, and lbsync must not serve it
// meanwhile: not after a TTL either, and not until it beats.
func TestTheDeadStayOut(t *testing.T) {
	const ttl = 15 * time.Second
	refreshed := 0
	b := newBackend(Config{Allow: DefaultAllow(), Full: DefaultFull}, BackendConfig{Service: "web", Backend: "be"}, nil,
		func(registrar.Service) { refreshed++ }, func() {}, func() {}, newClaims(), zerolog.Nop())
	up, dead := netip.MustParseAddrPort("10.0.0.1:80"), netip.MustParseAddrPort("10.0.0.2:80")
	b.have = NewInventory(State{Servers: []Server{{Name: DynamicName(up), ID: 1, Addr: up, Admin: Ready, Up: true, Weight: 100}}}, Known{})
	begun := int64(1_000_000_000)
	read := func(at time.Duration, beat int64, interrupted bool) {
		now := begun + at.Milliseconds()
		entry := func(a netip.AddrPort, beat int64) registrar.Entry {
			return registrar.Entry{Addr: a, Present: true, Instance: registrar.Instance{Addr: a, Beat: beat}}
		}
		b.change(notifier.Change{Interrupted: interrupted, Snapshot: registrar.Snapshot{
			Service: "web", Full: true, Now: now, TTL: ttl, Interval: ttl / 3, Token: registrar.Token{ReplID: "r", Version: 1},
			Entries: []registrar.Entry{entry(up, now), entry(dead, beat)},
		}})
	}
	serves := func() bool {
		for _, w := range b.wants([]netip.AddrPort{up, dead}, Serve, time.Now()) {
			if w.Addr == dead {
				return true
			}
		}
		return false
	}
	old := begun - ttl.Milliseconds()
	for _, step := range []struct {
		name        string
		at          time.Duration
		beat        int64
		interrupted bool
		want        bool
	}{
		{"at the interruption", 0, old, true, false},
		{"within a TTL", ttl / 2, old, false, false},
		{"a TTL later", ttl, old, false, false},
		{"two TTL later", 2 * ttl, old, false, false},
		{"it beats", 2*ttl + time.Second, begun + 2*ttl.Milliseconds(), false, true},
		{"it is silent, long after the interruption", 4 * ttl, begun + 2*ttl.Milliseconds(), false, true},
	} {
		read(step.at, step.beat, step.interrupted)
		if got := serves(); got != step.want {
			t.Errorf("%s: served %v, want %v", step.name, got, step.want)
		}
	}
	read(5*ttl, begun+2*ttl.Milliseconds(), true)
	read(6*ttl, begun+2*ttl.Milliseconds(), false)
	if serves() {
		t.Error("served when HAProxy was away for the whole of an interruption")
	}
	b.change(notifier.Change{Snapshot: registrar.Snapshot{Service: "web", Now: begun, TTL: ttl, Interval: ttl / 3, Token: registrar.Token{ReplID: "r", Version: 2}}})
	if serves() {
		t.Error("served when Redis' clock was set back and it had not been read anew")
	}

	now := time.Now()
	for range 3 {
		b.pause(now)
	}
	if refreshed != 1 {
		t.Errorf("asked for %d whole reads at once, want 1: each answer brings the next step", refreshed)
	}
	if b.pause(now.Add(b.cfg.Full / 6)); refreshed != 2 {
		t.Errorf("asked for %d whole reads, want one more at the next poll", refreshed)
	}
}

// TestClaimIsNoWord has the register lose one service's data. That another service
// has the same addresses, and beats, does not take them out before their hold.
func TestClaimIsNoWord(t *testing.T) {
	const ttl = 15 * time.Second
	a, b := netip.MustParseAddrPort("10.0.0.1:80"), netip.MustParseAddrPort("10.0.0.2:80")
	claims := newClaims()
	be := newBackend(Config{Allow: DefaultAllow(), Full: DefaultFull, Hold: DefaultHold, MinServers: 1}, BackendConfig{Service: "web", Backend: "be"}, nil,
		func(registrar.Service) {}, func() {}, func() {}, claims, zerolog.Nop())
	server := func(id int, a netip.AddrPort) Server {
		return Server{Name: DynamicName(a), ID: id, Addr: a, Admin: Ready, Up: true, Checked: true, Passed: true, Weight: 100}
	}
	be.have = NewInventory(State{Servers: []Server{server(1, a), server(2, b)}}, Known{})
	now := int64(1_000_000_000)
	read := func(svc registrar.Service, interrupted bool, addrs ...netip.AddrPort) notifier.Change {
		c := notifier.Change{Interrupted: interrupted, Snapshot: registrar.Snapshot{
			Service: svc, Full: true, Now: now, TTL: ttl, Interval: ttl / 3, Token: registrar.Token{ReplID: "r", Version: 1},
		}}
		for _, a := range addrs {
			c.Entries = append(c.Entries, registrar.Entry{Addr: a, Present: true, Instance: registrar.Instance{Addr: a, Beat: now}})
		}
		return c
	}
	be.change(read("web", false, a, b))
	claims.answer("web", map[netip.AddrPort]registrar.Service{a: "api", b: "api"})
	lost := read("web", true)
	be.change(lost)
	begun := time.Now()
	if w := be.wants([]netip.AddrPort{a, b}, Leave, begun); len(w) > 0 {
		t.Errorf("absence and another service's claim take out %+v", w)
	}
	// They had the time to come back, and a later read says that they have not.
	if w := be.wants([]netip.AddrPort{a, b}, Leave, begun.Add(2*ttl)); len(w) > 0 {
		t.Errorf("without another read %+v go", w)
	}
	lost.Now += 2 * ttl.Milliseconds()
	be.change(lost)
	be.viewAt = begun.Add(2 * ttl)
	if w := be.wants([]netip.AddrPort{a, b}, Leave, begun.Add(2*ttl)); len(w) != 2 || !w[0].Now {
		t.Errorf("after the grace %+v go, want both at once", w)
	}
}

// standing is a Balancer whose servers stay as they are. It counts what is sent.
type standing struct {
	State
	ops *int
}

func (s standing) Probe(context.Context) (Process, error)      { return s.Process, nil }
func (s standing) Read(context.Context, string) (State, error) { return s.State, nil }
func (s standing) Apply(ctx context.Context, backend string, ops []Op) (Applied, error) {
	*s.ops += len(ops)
	return Applied{Process: s.Process, Servers: s.Servers, Refused: []string{"no"}, Active: len(s.Servers)}, nil
}
func (s standing) Peek(_ context.Context, _ string, servers []Server) (Applied, error) {
	return Applied{Process: s.Process, Servers: servers, Active: len(s.Servers)}, nil
}

// tardy is a Balancer that gives its only server an address after the read back.
type tardy struct {
	standing
	addr netip.AddrPort
}

func (l *tardy) Read(context.Context, string) (State, error) {
	s := l.Servers[0]
	if s.Addr = l.addr; s.Addr != Placeholder {
		s.Admin = Drain
	}
	return State{Process: l.Process, Servers: []Server{s}}, nil
}

func (l *tardy) Apply(_ context.Context, _ string, ops []Op) (Applied, error) {
	*l.ops += len(ops)
	for _, o := range ops {
		if o.Kind == SetAddr {
			l.addr = o.Addr
		}
	}
	read := l.Servers[0]
	read.Admin = Drain
	return Applied{Process: l.Process, Servers: []Server{read}}, nil
}

// TestLateAddress has a slot that gets its address after HAProxy was read back, as
// HAProxy 3 may when it is busy. The instance must not wait for it until the next full
// look.
func TestLateAddress(t *testing.T) {
	a, before := netip.MustParseAddrPort("10.0.0.1:80"), Placeholder
	sent := 0
	bal := &tardy{standing{State{Process: Process{PID: 1, Version: "3.0.11"},
		Servers: []Server{{Name: "s1", ID: 1, Slot: true, Admin: Maint, Addr: before}}}, &sent}, before}
	b := newBackend(Config{Allow: DefaultAllow(), Full: time.Hour}, BackendConfig{Service: "web", Backend: "be", Mode: Slots}, bal,
		func(registrar.Service) {}, func() {}, func() {}, newClaims(), zerolog.Nop())
	b.change(notifier.Change{Snapshot: registrar.Snapshot{Service: "web", Full: true, Now: 1, TTL: time.Second, Interval: time.Second / 3,
		Token:   registrar.Token{ReplID: "r", Epoch: "e", Version: 1},
		Entries: []registrar.Entry{{Addr: a, Present: true, Instance: registrar.Instance{Addr: a, Beat: 1, Meta: registrar.Meta{Weight: 100}}}}}})
	next, err := b.Step(t.Context())
	if err != nil || sent != 3 || next > waitPoll {
		t.Fatalf("%d ops, next look in %v, %v; want a weight, a drain and an address, and a look soon", sent, next, err)
	}
	if _, applied := b.state(); applied {
		t.Error("acknowledged before the slot has the address")
	}
	b.readAt = b.readAt.Add(-waitPoll)
	if _, err := b.Step(t.Context()); err != nil || sent < 5 {
		t.Errorf("%d ops, %v; want it made ready with the next look", sent, err)
	}
}

// TestDeletionPutOff has HAProxy refuse for an hour, by a simulated clock, to delete
// a server that has left: it is tried, or looked at, less and less often.
func TestDeletionPutOff(t *testing.T) {
	for name, busy := range map[string]int{"in use": 2, "not known why": -1} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := netip.MustParseAddrPort("10.0.0.1:80")
				sent, log := 0, &strings.Builder{}
				bal := standing{State{Process: Process{PID: 1, Version: "2.6.0"},
					Servers: []Server{{Name: DynamicName(a), ID: 1, Addr: Placeholder, Admin: Maint, Busy: busy}}}, &sent}
				b := newBackend(Config{Allow: DefaultAllow(), Full: DefaultFull, DrainTimeout: time.Minute, Quarantine: DefaultQuarantine},
					BackendConfig{Service: "web", Backend: "be", Mode: Dynamic}, bal, func(registrar.Service) {}, func() {}, func() {}, newClaims(), zerolog.New(log))
				b.change(notifier.Change{Snapshot: registrar.Snapshot{Service: "web", Full: true, Now: 1, TTL: time.Second, Interval: time.Second / 3,
					Token:   registrar.Token{ReplID: "r", Epoch: "e", Version: 1},
					Entries: []registrar.Entry{{Addr: a, Gone: &registrar.Gone{Reason: registrar.Left}}}}})
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				b.run(ctx)
				// Three commands a try, and one each 24 to 30 s in the end.
				if tries := map[int]int{2: sent, -1: sent / 3}[busy]; tries < 100 || tries > 170 {
					t.Errorf("%d commands in an hour", sent)
				}
				if n := strings.Count(log.String(), "\n"); n > 4 {
					t.Errorf("%d lines: %s", n, log)
				}
			})
		})
	}
}

// TestHeldAnew has an instance that is held come back and go again between two
// steps. Its hold begins anew: the one before is of another silence.
func TestHeldAnew(t *testing.T) {
	const ttl = 15 * time.Second
	a, c := netip.MustParseAddrPort("10.0.0.1:80"), netip.MustParseAddrPort("10.0.0.2:80")
	server := func(id int, a netip.AddrPort) Server {
		return Server{Name: DynamicName(a), ID: id, Addr: a, Admin: Ready, Up: true, Checked: true, Passed: true, Weight: 100}
	}
	sent := 0
	bal := standing{State{Process: Process{PID: 1, Version: "2.6.0"}, Servers: []Server{server(1, a), server(2, c)}}, &sent}
	b := newBackend(Config{Allow: DefaultAllow(), Full: time.Hour, Hold: DefaultHold, MinServers: 1}, BackendConfig{Service: "web", Backend: "be", Mode: Auto}, bal,
		func(registrar.Service) {}, func() {}, func() {}, newClaims(), zerolog.Nop())
	version := int64(0)
	read := func(gone bool) {
		version++
		now := int64(1_000_000_000) + version
		entry := func(a netip.AddrPort) registrar.Entry {
			return registrar.Entry{Addr: a, Present: true, Instance: registrar.Instance{Addr: a, Beat: now, Meta: registrar.Meta{Weight: 100}}}
		}
		s := registrar.Snapshot{Service: "web", Full: true, Now: now, TTL: ttl, Interval: ttl / 3,
			Token: registrar.Token{ReplID: "r", Epoch: "e", Version: version}, Entries: []registrar.Entry{entry(c)}}
		if !gone {
			s.Entries = append(s.Entries, entry(a))
		}
		b.change(notifier.Change{Snapshot: s})
	}
	step := func() {
		t.Helper()
		if _, err := b.Step(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	read(false)
	step()
	read(true)
	step()
	if _, held := b.held[a]; !held {
		t.Fatalf("not held: %v, leaving %v", b.held, b.leaving)
	}
	b.held[a] = time.Now().Add(-2 * DefaultHold) // its hold would be over
	read(false)
	read(true)
	step()
	if since, held := b.held[a]; !held || time.Since(since) > DefaultHold || sent > 0 {
		t.Errorf("held since %v (%v), %d ops sent", since, held, sent)
	}
}

// TestPace has a register lose its data while instances are cut off from it, so that
// it mentions them no more. When their hold ends, half of a backend and more goes
// one by one, and not below the floor.
func TestPace(t *testing.T) {
	const ttl = 15 * time.Second
	for _, tt := range []struct {
		name          string
		all, missing  int
		noted, down   bool
		atOnce, after int // who goes when the holds end, and within a minute in all
	}{
		{"a lone one", 6, 1, false, false, 1, 1},
		{"fewer than half", 6, 2, false, false, 2, 2},
		{"half", 6, 3, false, false, 1, 3},
		{"all", 6, 6, false, false, 1, 5},
		{"more than go in a minute", 12, 12, false, false, 1, 6},
		{"all of two", 2, 2, false, false, 1, 1},
		{"half, and a reaper took them out", 6, 3, true, false, 3, 3},
		{"half, which HAProxy finds down", 6, 3, false, true, 3, 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBackend(Config{Allow: DefaultAllow(), Full: DefaultFull, Hold: DefaultHold, MinServers: 1}, BackendConfig{Service: "web", Backend: "be"}, nil,
					func(registrar.Service) {}, func() {}, func() {}, newClaims(), zerolog.Nop())
				var addrs []netip.AddrPort
				var servers []Server
				for i := range tt.all {
					a := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)}), 80)
					addrs = append(addrs, a)
					servers = append(servers, Server{Name: DynamicName(a), ID: i + 1, Addr: a, Admin: Ready, Weight: 100, Up: !tt.down || i >= tt.missing})
				}
				b.have = NewInventory(State{Servers: servers}, Known{})
				read := func(missing int, token registrar.Token) {
					now := time.Now().UnixMilli()
					c := notifier.Change{Interrupted: token.Version == 2, Snapshot: registrar.Snapshot{Service: "web", Full: true, Now: now, TTL: ttl, Interval: ttl / 3, Token: token}}
					for i, a := range addrs {
						switch e := (registrar.Entry{Addr: a}); {
						case i >= missing:
							e.Present, e.Instance = true, registrar.Instance{Addr: a, Beat: now}
							c.Entries = append(c.Entries, e)
						case tt.noted && token.Version > 2:
							e.Gone = &registrar.Gone{Reason: registrar.Expired, At: now, Token: "t"}
							c.Entries = append(c.Entries, e)
						}
					}
					b.change(c)
				}
				gone := 0
				step := func() int {
					n := 0
					for _, w := range b.wants(addrs, Leave, time.Now()) {
						if s := b.have.byAddr[w.Addr]; s.Admin == Ready {
							b.have.count(s, -1)
							s.Admin = Drain
							n++
						}
					}
					gone += n
					return n
				}
				read(0, registrar.Token{ReplID: "r", Epoch: "e", Version: 1})
				step()
				read(tt.missing, registrar.Token{ReplID: "s", Epoch: "e", Version: 2})
				step()
				time.Sleep(ttl + 2*ttl/3 - time.Millisecond)
				if step(); gone > 0 {
					t.Fatalf("%d went before their hold was over", gone)
				}
				time.Sleep(time.Millisecond)
				read(tt.missing, registrar.Token{ReplID: "s", Epoch: "e", Version: 3})
				if got := step(); got != tt.atOnce {
					t.Errorf("%d went at once, want %d", got, tt.atOnce)
				}
				for range 59 {
					time.Sleep(time.Second)
					if got := step(); got > 1 {
						t.Errorf("%d went at once", got)
					}
				}
				if gone != tt.after {
					t.Errorf("%d went within a minute, want %d", gone, tt.after)
				}
			})
		})
	}
}
