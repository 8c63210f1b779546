package httpapi

import (
	"context"
	"net/netip"
	"reflect"
	"time"

	"rollcall/registrar"
)

// Overrides of addresses that no instance has may be any number and change nothing for
// readers of a service, so the watcher does not read them. One goroutine does, for all
// clients: whatever makes, ends or frees one is a change of its service.

const (
	// awayEvery is the least time between two reads of a service's overrides: 15,000 of
	// them take Redis some 30 ms.
	awayEvery = 10 * time.Second
	// awayLimit is how many a document has.
	awayLimit = 1000
	// awayTimeout bounds one read, which is two calls for each 1,000 overrides.
	awayTimeout = 10 * time.Second
)

// Word is what operators have said, as documents have it.
type Word struct {
	registrar.Admin
	// Scope is registration if any of it is of that registration alone.
	Scope registrar.Scope `json:"scope"`
}

// newWord returns what is in force for an instance; nil if nothing is.
func newWord(a registrar.Admin) *Word {
	switch {
	case a == (registrar.Admin{}):
		return nil
	case a.ID != "":
		return &Word{a, registrar.ScopeRegistration}
	}
	return &Word{a, registrar.ScopeAddress}
}

// Away is an override that is in force for no instance: of an address that none has, or
// of a registration that is not there.
type Away struct {
	Addr   string `json:"addr"`
	State  string `json:"state"`            // absent
	Reason string `json:"reason,omitempty"` // why what is stored cannot be read
	Word   *Word  `json:"word"`

	of netip.AddrPort
}

// away are those of one service. The picture's mutex guards it.
type away struct {
	rows  []Away // by address; replaced whole
	count int    // of all that there were at the last read
	at    int64  // of that, unix ms by Redis' clock; 0 = never
	// unread says that something has changed since it was read, and next when it may be
	// read again.
	unread bool
	next   time.Time
}

// missing returns the overrides that no instance has come for since they were read, and
// the count of all. The caller holds the picture's mu.
func (s *service) missing() ([]Away, int) {
	rows := make([]Away, 0, len(s.away.rows))
	for _, a := range s.away.rows {
		e := s.view.Lookup(a.of)
		if e.Present && (a.Word.Scope == registrar.ScopeAddress || a.Word.ID == e.Instance.Meta.ID) {
			continue
		}
		rows = append(rows, a)
	}
	return rows, s.away.count - len(s.away.rows) + len(rows)
}

// dueAway takes the service whose overrides are to be read now and have waited longest;
// or it returns how soon there is one, 0 = nothing waits.
func (p *picture) dueAway(now time.Time) (name registrar.Service, wait time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var first *service
	for _, s := range p.services {
		if s.away.unread && (first == nil || s.away.next.Before(first.away.next)) {
			first = s
		}
	}
	switch {
	case first == nil:
		return "", 0
	case first.away.next.After(now):
		return "", first.away.next.Sub(now)
	}
	first.away.unread = false
	return first.name, 0
}

// tookAway takes in all overrides of a service, or that they could not be read.
func (p *picture) tookAway(name registrar.Service, all []registrar.Override, err error, next time.Time, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.services[name]
	if s == nil {
		return
	}
	s.away.next = next
	if err != nil {
		s.away.unread = true
		return
	}
	rows, count := []Away(nil), 0
	for _, o := range all {
		if !o.Orphan() {
			continue
		}
		if count++; count <= awayLimit {
			rows = append(rows, Away{Addr: o.Addr.String(), State: stateAbsent, Reason: o.Garbage, Word: &Word{o.Admin, o.Scope}, of: o.Addr})
		}
	}
	s.away.rows, s.away.count, s.away.at = rows, count, p.overview.Now
	p.renew(s, p.overview.Now, now)
}

// readAway reads the overrides of services that have changed, until ctx ends.
func (s *Server) readAway(ctx context.Context) {
	wait := time.NewTimer(0)
	defer wait.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-wait.C:
		case <-s.changed:
		}
		for {
			name, next := s.picture.dueAway(time.Now())
			if name == "" {
				if next > 0 {
					wait.Reset(next)
				}
				break
			}
			begun := time.Now()
			tctx, cancel := context.WithTimeout(ctx, awayTimeout)
			all, err := s.store.Overrides(tctx, name)
			cancel()
			if ctx.Err() != nil {
				return
			}
			if len(all) >= registrar.ReadLimit {
				err = nil // there are more, and so many are known
			}
			if err != nil {
				s.log.Debug().Err(err).Msg("overrides of a service are unknown; reads them again")
			}
			s.picture.tookAway(name, all, err, begun.Add(s.rest), time.Now())
		}
	}
}

func (a Away) same(o Away) bool { return reflect.DeepEqual(a, o) }
