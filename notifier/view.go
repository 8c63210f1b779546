package notifier

import (
	"net/netip"
	"time"

	"rollcall/registrar"
)

// Change is one step of one service's history, or a new beginning.
type Change struct {
	registrar.Snapshot
	// Interrupted says that the history before this snapshot and the one after
	// it are not one: Redis lost data, was replaced, or went back.
	Interrupted bool
	// Heard is when the hint or the poll came that led to this read.
	Heard time.Time
}

// View is a picture of one service, folded from Changes in their order. Its
// zero value knows nothing. It is not safe for concurrent use.
type View struct {
	Token registrar.Token
	TTL   time.Duration
	// Interval is the registry's heartbeat interval.
	Interval time.Duration
	Known    bool // a snapshot has been applied

	entries map[netip.AddrPort]registrar.Entry
	// doubted holds the notes of departures that an interruption brought. Each
	// may be older than its instance's return, so it is not believed, however
	// often it is read; a note that is written later differs from it.
	doubted map[netip.AddrPort]registrar.Gone
}

// Apply folds c into the view and returns the addresses that it may have
// changed, each once.
func (v *View) Apply(c Change) []netip.AddrPort {
	v.Token, v.TTL, v.Interval = c.Token, c.TTL, c.Interval
	if c.Interrupted {
		v.doubted = map[netip.AddrPort]registrar.Gone{}
		for _, e := range c.Entries {
			if e.Gone != nil {
				v.doubted[e.Addr] = *e.Gone
			}
		}
	}
	changed := make([]netip.AddrPort, 0, len(c.Entries))
	old := v.entries
	if c.Full || !v.Known {
		v.entries = make(map[netip.AddrPort]registrar.Entry, len(c.Entries))
	}
	v.Known = true
	for _, e := range c.Entries {
		if e.Gone != nil && v.doubted[e.Addr] == *e.Gone {
			e.Gone = nil
		}
		v.entries[e.Addr] = e
		changed = append(changed, e.Addr)
	}
	if c.Full {
		for addr := range old {
			if _, ok := v.entries[addr]; !ok {
				changed = append(changed, addr)
			}
		}
	}
	return changed
}

// Lookup returns what is known of addr. What the register does not mention is
// absent, with no note of how it went.
func (v *View) Lookup(addr netip.AddrPort) registrar.Entry {
	if e, ok := v.entries[addr]; ok {
		return e
	}
	return registrar.Entry{Addr: addr}
}

// Each calls f for every address that the register mentions, in no order.
func (v *View) Each(f func(registrar.Entry)) {
	for _, e := range v.entries {
		f(e)
	}
}
