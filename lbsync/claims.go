package lbsync

import (
	"net/netip"
	"slices"
	"sync"

	"rollcall/notifier"
	"rollcall/registrar"
)

// claims is which services an address is alive in, of all that a Syncer follows.
// Two services on one port are legitimate, and both are served. But one that is
// silent while another service has its address is no longer vouched for by a
// health check that is up: that may be the other's.
type claims struct {
	mu sync.Mutex
	of map[netip.AddrPort][]registrar.Service // guarded by mu
}

func newClaims() *claims { return &claims{of: map[netip.AddrPort][]registrar.Service{}} }

// note takes in a change of one service.
func (c *claims) note(ch notifier.Change) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if ch.Full {
		for a := range c.of {
			c.drop(a, ch.Service)
		}
	}
	for _, e := range ch.Entries {
		c.drop(e.Addr, ch.Service)
		if e.Present && ch.Now-e.Instance.Beat <= ch.TTL.Milliseconds() {
			c.of[e.Addr] = append(c.of[e.Addr], ch.Service)
		}
	}
}

func (c *claims) drop(a netip.AddrPort, svc registrar.Service) {
	was := c.of[a]
	i := slices.Index(was, svc)
	switch {
	case i < 0:
	case len(was) == 1:
		delete(c.of, a)
	default:
		c.of[a] = slices.Delete(slices.Clone(was), i, i+1)
	}
}

// other returns another service than svc that a is alive in; "" if there is none.
func (c *claims) other(a netip.AddrPort, svc registrar.Service) registrar.Service {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.of[a] {
		if s != svc {
			return s
		}
	}
	return ""
}
