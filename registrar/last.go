package registrar

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
)

// lastServing returns ErrLast if addr is the last that serves of svc: if a live
// balancer has a backend in which it is Serving and no other server is, ours or the
// operator's own, but such as the register has already told to go. Backup servers do
// not count. It returns nil if it is not, and if no balancer lives. snap is the state
// of the service that this is true of, zero if no balancer lives.
//
// It is the best that can be known, no proof: a balancer says what it has some 100 ms
// after it has seen it, and of a health check that failed it hears with its next look
// at all servers.
func (s *Store) lastServing(ctx context.Context, svc Service, addr netip.AddrPort) (snap Snapshot, err error) {
	acks, err := s.Acks(ctx, svc)
	if err != nil {
		return snap, err
	}
	live := acks.Live()
	if len(live) == 0 {
		return snap, nil
	}
	if snap, err = s.Read(ctx, svc, nil); err != nil {
		return snap, err
	}
	sights, err := s.Sights(ctx, svc, live, append(going(snap, addr), addr)...)
	if err != nil {
		return snap, err
	}
	for _, sight := range sights {
		if backend, alone := sight.alone(addr, sight.others()); alone {
			return snap, fmt.Errorf("%w: %s sends requests to no other server of %s", ErrLast, sight.Balancer, backend)
		}
	}
	return snap, nil
}

// going returns the addresses but addr that the register wants without new requests,
// by an operator's or their own word: a balancer may not have got to them yet. One
// that has expired is not among them, since balancers keep the last of a backend.
func going(snap Snapshot, addr netip.AddrPort) []netip.AddrPort {
	var addrs []netip.AddrPort
	for _, e := range snap.Entries {
		if e.going() && e.Addr != addr {
			addrs = append(addrs, e.Addr)
		}
	}
	return addrs
}

// going tells whether the register wants the address without new requests.
func (e Entry) going() bool {
	if e.Present {
		return e.Instance.State() != AdminNone || e.Instance.Weight() == 0
	}
	return e.Gone != nil && e.Gone.Reason != Expired
}

// others counts, by backend, the servers that are up and none of those in s.Servers. Of
// a backend whose servers are not counted that is none, or less.
func (s Sight) others() map[string]int {
	others := maps.Clone(s.Up)
	if others == nil {
		others = map[string]int{}
	}
	for _, states := range s.Servers {
		for backend, state := range states {
			if state.Serving() {
				others[backend]--
			}
		}
	}
	return others
}

// alone returns a backend in which addr is Serving and there are no others.
func (s Sight) alone(addr netip.AddrPort, others map[string]int) (backend string, alone bool) {
	for _, backend := range slices.Sorted(maps.Keys(s.Servers[addr])) {
		if s.Servers[addr][backend].Serving() && others[backend] <= 0 {
			return backend, true
		}
	}
	return "", false
}

// lastTries is how often a word is weighed at most because the service has changed
// meanwhile. After that it is written all the same: of a service that never stands
// still others serve.
const lastTries = 5

// weigh returns ErrLast if w would take out the last instance that serves. Else it
// returns the version of the service that this is true of, so that of two operators
// who take out the last two at the same time one is refused; empty if there is
// nothing to weigh.
func (s *Store) weigh(ctx context.Context, svc Service, addr netip.AddrPort, w Word) (version string, err error) {
	if w.Force || w.Verb != "maint" && w.Verb != "weight" || w.Weight != nil && *w.Weight > 0 {
		return "", nil
	}
	snap, err := s.lastServing(ctx, svc, addr)
	if err != nil && !(errors.Is(err, ErrLast) && !w.takesOut(snap, addr)) {
		return "", err
	}
	if snap.Token == (Token{}) {
		return "", nil
	}
	return strconv.FormatInt(snap.Token.Version, 10), nil
}

// takesOut tells whether w, maint or a weight, is what takes addr out: not if that has
// been asked for before, nor if the weight is not 0.
func (w Word) takesOut(snap Snapshot, addr netip.AddrPort) bool {
	for _, e := range snap.Entries {
		if e.Addr == addr && e.Present {
			return w.stops(e.Instance)
		}
	}
	return w.Verb == "maint" || w.Weight != nil && *w.Weight == 0
}

// stops tells whether w ends the requests to i, and nothing that was said before does.
func (w Word) stops(i Instance) bool {
	switch {
	case i.State() == AdminMaint || i.Weight() == 0:
		return false
	case w.Verb == "drain":
		return i.State() == AdminNone
	case w.Verb == "weight" && w.Weight == nil:
		return i.Meta.Weight == 0
	case w.Verb == "weight":
		return *w.Weight == 0
	}
	return w.Verb == "maint"
}

// WaitingDrains returns of each of addrs whose drain a live balancer says waits, why.
func (s *Store) WaitingDrains(ctx context.Context, svc Service, addrs []netip.AddrPort) (map[netip.AddrPort]string, error) {
	acks, err := s.Acks(ctx, svc)
	if err != nil {
		return nil, err
	}
	sights, err := s.Sights(ctx, svc, acks.Live(), addrs...)
	if err != nil {
		return nil, err
	}
	waits := map[netip.AddrPort]string{}
	for _, sight := range sights {
		for _, addr := range addrs {
			for _, backend := range slices.Sorted(maps.Keys(sight.Servers[addr])) {
				if st := sight.Servers[addr][backend]; st.Note == NoteWaits && waits[addr] == "" {
					waits[addr] = fmt.Sprintf("%s, says %s of %s", st.Why, sight.Balancer, backend)
				}
			}
		}
	}
	return waits, nil
}

// DrainWaits returns why the drain of addr waits: what a live balancer says of it, or,
// before one has, that addr is the last that serves. Empty if it does not wait.
func (s *Store) DrainWaits(ctx context.Context, svc Service, addr netip.AddrPort) (why string, err error) {
	waits, err := s.WaitingDrains(ctx, svc, []netip.AddrPort{addr})
	if err != nil || waits[addr] != "" {
		return waits[addr], err
	}
	if _, err = s.lastServing(ctx, svc, addr); errors.Is(err, ErrLast) {
		return err.Error(), nil
	}
	return "", err
}
