package lbsync

import (
	"net/netip"
	"testing"
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
	b.have = NewInventory(State{Servers: []Server{{Name: DynamicName(up), ID: 1, Addr: up, Admin: Ready, Up: true, Weight: 100}}}, func(netip.AddrPort) bool { return true })
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

	b.doubted[dead] = true
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
