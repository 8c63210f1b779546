package lbsync

import (
	"context"
	"maps"
	"net/netip"
	"sync"
	"time"

	"rollcall/registrar"
)

// An address has one listener. A server that is kept although its instance is silent,
// because its health check is up or because it is the last one, is vouched for by
// nothing when another service beats at its address: the answers may be the other's. So
// while servers are kept the register is asked for that. Two services that both beat at
// one address are both served.

const (
	// claimsPoll paces the look at the register's version while servers are kept: a
	// server leaves that much after the other service's first heartbeat.
	claimsPoll = 200 * time.Millisecond
	// claimsRest is how much longer than a look in all services the pause after it is.
	claimsRest = 10
	// claimsAgain is the longest time between two such looks: a heartbeat that moves a
	// score only, as after an outage, changes no version.
	claimsAgain = 5 * time.Second
)

// claims is which other service beats at an address that a backend keeps a server of.
// Its methods may be called by any number of goroutines.
type claims struct {
	asked chan struct{} // of capacity 1: kept has a new address

	mu   sync.Mutex
	kept map[*backend]map[netip.AddrPort]bool                       // guarded by mu
	of   map[registrar.Service]map[netip.AddrPort]registrar.Service // guarded by mu
}

func newClaims() *claims {
	return &claims{
		asked: make(chan struct{}, 1),
		kept:  map[*backend]map[netip.AddrPort]bool{}, of: map[registrar.Service]map[netip.AddrPort]registrar.Service{},
	}
}

// keep notes the addresses of which b keeps a server although they are silent.
func (c *claims) keep(b *backend, addrs map[netip.AddrPort]bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if maps.Equal(c.kept[b], addrs) {
		return
	}
	c.kept[b] = addrs
	if len(addrs) == 0 {
		delete(c.kept, b)
		return
	}
	select {
	case c.asked <- struct{}{}:
	default: // it has been told, and has not looked since
	}
}

// wanted returns the addresses of which servers are kept, by service.
func (c *claims) wanted() map[registrar.Service][]netip.AddrPort {
	c.mu.Lock()
	defer c.mu.Unlock()
	sets := map[registrar.Service]map[netip.AddrPort]bool{}
	for b, addrs := range c.kept {
		if sets[b.service] == nil {
			sets[b.service] = map[netip.AddrPort]bool{}
		}
		maps.Copy(sets[b.service], addrs)
	}
	all := map[registrar.Service][]netip.AddrPort{}
	for svc, set := range sets {
		for a := range set { // in any order, so that of too many each has its turn
			all[svc] = append(all[svc], a)
		}
	}
	return all
}

// answer notes what was found for svc, and wakes its backends if that is new.
func (c *claims) answer(svc registrar.Service, found map[netip.AddrPort]registrar.Service) {
	c.mu.Lock()
	defer c.mu.Unlock()
	news := false
	for a := range found {
		news = news || c.of[svc][a] == ""
	}
	c.of[svc] = found
	for b := range c.kept {
		if news && b.service == svc {
			b.signal()
		}
	}
}

// other returns another service than svc that beats at a, as far as is known; "" if
// there is none.
func (c *claims) other(a netip.AddrPort, svc registrar.Service) registrar.Service {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.of[svc][a]
}

// ask asks the register until ctx ends, while servers are kept.
func (s *Syncer) ask(ctx context.Context) {
	wait := time.NewTimer(time.Hour)
	wait.Stop()
	defer wait.Stop()
	var last look
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.claims.asked:
			last = look{blind: last.blind} // of the new one nothing is known
		case <-wait.C:
		}
		pause := s.look(ctx, &last)
		if pause == 0 {
			wait.Stop()
			continue // until a server is kept
		}
		wait.Reset(registrar.Shorten(pause))
	}
}

// look is what the last look in all services found the register to be.
type look struct {
	at     time.Time
	global int64
	blind  bool // there was no right to look in all, which has been said
}

// look asks once, unless nothing can have changed since the last time, and returns how
// long the next one may wait; 0 if no server is kept.
func (s *Syncer) look(ctx context.Context, last *look) time.Duration {
	kept := s.claims.wanted()
	if len(kept) == 0 {
		return 0
	}
	tctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	begun := time.Now()
	global := int64(-1)
	if !s.store.Cluster() { // where there is no version of the whole
		v, err := s.store.Versions(tctx, nil)
		if err != nil {
			return claimsAgain // that Redis is away, others say
		}
		if global = v.Global; global == last.global && begun.Sub(last.at) < claimsAgain {
			return claimsPoll
		}
	}
	for svc, addrs := range kept {
		found, _, err := s.store.Elsewhere(tctx, svc, nil, addrs, s.ttl(svc))
		if err != nil {
			// It may have no right to see all services.
			if found, _, err = s.store.Elsewhere(tctx, svc, s.services, addrs, s.ttl(svc)); err == nil && !last.blind {
				last.blind = true
				s.log.Warn().Msg("cannot list the services, so of silent instances that are kept only those are known to be replaced whose address is beaten for by a service of this lbsync; see doctor, or scripts/deploy/acl/lbsync.acl")
			}
		}
		if err != nil {
			return claimsAgain
		}
		s.claims.answer(svc, found)
	}
	*last = look{begun, global, last.blind}
	return max(claimsPoll, claimsRest*time.Since(begun))
}

// ttl is the registry's, as the last read of svc had it.
func (s *Syncer) ttl(svc registrar.Service) time.Duration {
	for _, b := range s.backends[svc] {
		b.mu.Lock()
		ttl := b.view.TTL
		b.mu.Unlock()
		if ttl > 0 {
			return ttl
		}
	}
	return registrar.DefaultTTL
}
