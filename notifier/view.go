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
	// Moved is when the registry's name was last seen to name another server; zero =
	// never. See registrar.FollowFor.
	Moved time.Time
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
	// outdated holds what an interruption brought of instances that have said
	// something else since.
	outdated map[netip.AddrPort]outdated
}

// outdated is an instance as an interruption brought it, whose owner has said
// since that it leaves or drains: a registration never takes that back. What was
// said counts until this one's heartbeat moves.
type outdated struct {
	id   string
	beat int64
	said registrar.Entry
}

// noteKept is less than the time for which the register keeps a note, 10 min: a
// registration that has left cannot come back as the same one before that, and two
// servers' clocks differ by less.
const noteKept = time.Minute

// owned tells whether g is the word of the registration that had was of. It is not if
// that has beaten since; or, after an interruption, if that is not known.
func owned(g registrar.Gone, had registrar.Entry) bool {
	if g.Token == "" || g.Reason != registrar.Left && g.Reason != registrar.Unhealthy {
		return false
	}
	if had.Present {
		return had.Instance.Meta.ID == g.Token && had.Instance.Beat-g.At < noteKept.Milliseconds()
	}
	return had.Gone != nil && *had.Gone == g
}

// surpassed tells whether had is what the owner of i has said since: that it left, or
// that it drains.
func surpassed(i registrar.Instance, had registrar.Entry) bool {
	switch {
	case i.Meta.ID == "":
		return false
	case had.Present:
		return had.Instance.Meta.ID == i.Meta.ID && had.Instance.Meta.Draining && !i.Meta.Draining && i.Beat <= had.Instance.Beat
	case had.Gone != nil:
		return had.Gone.Token == i.Meta.ID && i.Beat <= had.Gone.At && owned(*had.Gone, had)
	}
	return false
}

// interrupted decides what of entries, the first of another history, is believed.
// Another server that takes over holds what owners have said to it, and may lack the
// last that they said to the one before.
func (v *View) interrupted(entries []registrar.Entry) {
	v.doubted, v.outdated = map[netip.AddrPort]registrar.Gone{}, map[netip.AddrPort]outdated{}
	for _, e := range entries {
		had := v.Lookup(e.Addr)
		switch {
		case e.Gone != nil && !owned(*e.Gone, had):
			v.doubted[e.Addr] = *e.Gone
		case e.Present && surpassed(e.Instance, had):
			v.outdated[e.Addr] = outdated{e.Instance.Meta.ID, e.Instance.Beat, had}
		}
	}
}

// believed is what a read says of e's address, as far as it is believed.
func (v *View) believed(e registrar.Entry) registrar.Entry {
	switch o, was := v.outdated[e.Addr]; {
	case e.Gone != nil && v.doubted[e.Addr] == *e.Gone:
		e.Gone = nil
	case was && e.Present && e.Instance.Meta.ID == o.id && e.Instance.Beat == o.beat:
		if o.said.Present { // an operator's word is not the owner's
			o.said.Instance.Admin = e.Instance.Admin
		}
		return o.said
	case was:
		delete(v.outdated, e.Addr)
	}
	return e
}

// Apply folds c into the view and returns the addresses that it may have
// changed, each once.
func (v *View) Apply(c Change) []netip.AddrPort {
	v.Token, v.TTL, v.Interval = c.Token, c.TTL, c.Interval
	if c.Interrupted {
		v.interrupted(c.Entries)
	}
	changed := make([]netip.AddrPort, 0, len(c.Entries))
	old := v.entries
	if c.Full || !v.Known {
		v.entries = make(map[netip.AddrPort]registrar.Entry, len(c.Entries))
	}
	v.Known = true
	for _, e := range c.Entries {
		v.entries[e.Addr] = v.believed(e)
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
