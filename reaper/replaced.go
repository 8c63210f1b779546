package reaper

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"rollcall/registrar"
)

// An address has one listener. Where an instance has been silent for a TTL of proven
// health, and another service beats at its address, the instance is dead, however many
// others look dead at the same time: a host that was started anew, say, on which other
// containers have been given the ports of those before. Requests for the one service
// would be answered by the other, so the protection does not hold it, and it may be the
// last of its service.
//
// Two services that both beat at one address are none of this.

const (
	// looksPerPulse is how often within a pulse's period the reaper looks for replaced
	// instances while it holds stale ones: a removal comes a quarter of a second after
	// the other service's first heartbeat where the TTL is 15 s.
	looksPerPulse = 4
	// looksRest is how much longer than a look the pause after it is.
	looksRest = 10
	// looksMost is the most addresses of one look, of all services together.
	looksMost = 1000
	// replacedLimit is the most that one call takes out.
	replacedLimit = 100
)

// looking is where the next look begins, if one look cannot be for all held instances:
// at the nth stale instance of service.
type looking struct {
	service registrar.Service
	nth     int
}

// replace takes out the stale instances of held services at whose addresses another
// service beats.
func (r *Reaper) replace(ctx context.Context, report *Report, counts []registrar.Count, cutoff int64, resets int) error {
	var held []registrar.Count // those to look at, beginning with r.looking.service
	begin := 0
	for _, c := range counts { // sorted by service
		if c.Mistyped || c.Stale == 0 || !r.protection.held(c.Service) {
			continue
		}
		if c.Service < r.looking.service {
			begin++
		}
		held = append(held, c)
	}
	if len(held) == 0 {
		r.looking = looking{}
		return nil
	}
	var errs []error
	begin %= len(held)
	room := looksMost
	for i := range held {
		c := held[(begin+i)%len(held)]
		nth := 0
		if c.Service == r.looking.service && int64(r.looking.nth) < c.Stale+c.Garbage {
			nth = r.looking.nth
		}
		looked, err := r.replaceIn(ctx, report, c, cutoff, nth, room, resets)
		switch {
		case errors.Is(err, registrar.ErrBroken):
			errs = append(errs, err)
		case err != nil:
			return errors.Join(append(errs, err)...)
		}
		if room -= looked; room <= 0 || looked > 0 && int64(nth+looked) < c.Stale {
			r.looking = looking{c.Service, nth + looked}
			return errors.Join(errs...)
		}
	}
	r.looking = looking{}
	return errors.Join(errs...)
}

// replaceIn is replace for one service, at most room of its stale instances from the
// nth on. It returns how many it has looked at.
func (r *Reaper) replaceIn(ctx context.Context, report *Report, c registrar.Count, cutoff int64, nth, room, resets int) (looked int, err error) {
	tctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	stale, err := r.store.Stale(tctx, c.Service, cutoff, nth, room)
	if err != nil {
		return 0, err
	}
	found, looked, err := r.store.Elsewhere(tctx, c.Service, nil, stale, r.cfg.TTL)
	if err != nil {
		return 0, fmt.Errorf("look whether held instances of %s are replaced: %w", c.Service, err)
	}
	for len(found) > 0 {
		some := map[netip.AddrPort]registrar.Service{}
		for a, other := range found {
			if len(some) == replacedLimit {
				break
			}
			some[a] = other
			delete(found, a)
		}
		addrs, err := r.reap(ctx, c.Service, registrar.Sweep{Cutoff: cutoff, Replaced: some}, resets)
		r.removed(report, c, addrs)
		if err != nil {
			return looked, err
		}
	}
	return looked, nil
}
