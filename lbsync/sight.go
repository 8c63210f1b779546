package lbsync

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"rollcall/registrar"
)

// This file tells the register what HAProxy has: for those who ask whether instances
// serve, and why not, and for the guard of the last server (registrar.ErrLast). Nothing
// of lbsync waits for it or is decided by it.
//
// What HAProxy changes by itself it tells nobody: a check, an agent, a human. A backend
// is therefore looked at every lookEvery, or less often where all looks of the process
// would take more than a hundredth of the time.

const (
	// publishAfter is how long after a look the register is told of it: first goes
	// the acknowledgement, and what changes together is told together.
	publishAfter = 100 * time.Millisecond
	// publishRetry is the longest pause after a failure.
	publishRetry = 5 * time.Second
	// publishTimeout bounds one publication, of 20 calls with 10,000 servers.
	publishTimeout = 10 * registrar.Timeout
	// lookEvery is the longest time between two looks at a whole backend, as long as
	// all looks of a process take no more of its time than one part of lookShare.
	lookEvery = 2 * time.Second
	lookShare = 100
	// tellEvery is how often the register is told that there has been a look, if it has
	// shown nothing new.
	tellEvery = 10 * time.Second
	// sameTime is how far two readings of one moment may differ: Redis' clock is
	// known by the last read only.
	sameTime = 1000 // ms
)

// sights is what a backend has seen: after each step, of the addresses that it
// dealt with.
type sights struct {
	states  map[netip.AddrPort]registrar.ServerState
	changed map[netip.AddrPort]bool // since they were taken last
	up      int                     // servers of the backend that are Serving, ours and others'
	version int64                   // of the service, that the states are not older than; 0 = unknown
	wholeAt time.Time               // the last look at all; zero: there was none
	takenAt time.Time               // of the look at all that was taken last
	fresh   bool                    // one of these two is of after they were taken last
}

// looks is what the last look at each backend of a process took. Its methods may be
// called by any number of goroutines.
type looks struct {
	mu   sync.Mutex
	took map[*backend]time.Duration // guarded by mu
	all  time.Duration              // their sum; guarded by mu
}

// spent notes what a look at b took, and returns the time until the next, at most limit.
func (l *looks) spent(b *backend, took, limit time.Duration) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all += took - l.took[b]
	l.took[b] = took
	return registrar.Shorten(min(limit, max(lookEvery, lookShare*l.all)))
}

// told is what the register has been told of one service.
type told struct {
	history registrar.Token // without a version
	addrs   map[netip.AddrPort]bool
}

// observe takes in what the backend has of addrs, after a step; whole says that
// these are all, just read.
func (b *backend) observe(addrs []netip.AddrPort, whole bool) {
	news := false
	for _, a := range addrs {
		news = b.observeOne(a) || news // each by itself: a change must not wait for all
	}
	b.mu.Lock()
	if up := b.have.Serving; up != b.sights.up || b.applied.Version != b.sights.version {
		b.sights.up, b.sights.version, b.sights.fresh, news = up, b.applied.Version, true, true
	}
	b.mu.Unlock()
	if whole {
		all := make(map[netip.AddrPort]bool, len(addrs))
		for _, a := range addrs {
			all[a] = true
		}
		b.mu.Lock()
		b.sights.wholeAt = b.readAt
		b.sights.fresh = b.sights.fresh || b.readAt.Sub(b.sights.takenAt) >= min(tellEvery, b.cfg.Full)
		for a := range b.sights.states {
			if !all[a] {
				b.sights.set(a, registrar.ServerState{}, false, 0)
			}
		}
		news = news || b.sights.fresh || len(b.sights.changed) > 0
		b.mu.Unlock()
	}
	if news {
		b.looked()
	}
}

// observeOne tells whether there is something new of addr.
func (b *backend) observeOne(addr netip.AddrPort) bool {
	s, there := b.have.Lookup(addr)
	b.mu.Lock()
	defer b.mu.Unlock()
	e := b.view.Lookup(addr)
	if !there && !e.Present {
		return b.sights.set(addr, registrar.ServerState{}, false, 0)
	}
	st := registrar.ServerState{}
	if e.Present && admin(e.Instance.State()) == Maint {
		st.State = Maint.String() // it needs no server for that
	}
	if there {
		st.Server, st.State, st.Weight = s.Name, s.Admin.String(), s.Weight
		switch down := !s.Up && s.Admin != Maint; {
		case s.Checked && s.Up:
			st.Check = "up"
		case s.Checked:
			st.Check = "down"
		default:
			st.Down = down
		}
	}
	v := b.rules.decide(e, s, there, b.read(addr, s, there))
	since, held := b.held[addr]
	switch l := b.leaving[addr]; {
	case l != nil:
		st.Note, st.Why = registrar.NoteLeaving, v.why
		st.Since, st.Until = b.redisTime(l.since), b.redisTime(l.since.Add(b.cfg.DrainTimeout))
	case held:
		st.Note, st.Why = registrar.NoteHeld, "too few servers are up to let it go"
		if b.many && e.Gone == nil {
			st.Why = fmt.Sprintf("many are absent, and nobody said how they went; one goes each %v", registrar.LetGoEvery)
		}
		st.Since = b.redisTime(since)
		if end := since.Add(v.hold); time.Now().Before(end) {
			st.Why, st.Until = v.why, b.redisTime(end)
		}
	case b.postponed[addr]:
		st.Note, st.Why = registrar.NoteWaits, "too few other servers are up to drain it"
	case b.unplaced[addr]:
		st.Note = registrar.NoteUnplaced
	case e.Present && v.goal == Keep && v.why != "":
		st.Note, st.Why, st.Excluded = registrar.NoteRefused, v.why, !b.rules.allowed(addr.Addr())
	case there && s.Resolver:
		st.Note, st.Why = registrar.NoteUndone, "HAProxy's own resolver put it into maint: it must have no `resolvers`"
	case e.Present && v.goal == Serve && there && s.Agent && b.undid(addr, s):
		st.Note, st.Why = registrar.NoteUndone, "its agent keeps it out"
		if b.have.Human(s) {
			st.Why = "its agent, or a human, put it into maint"
		}
	case there && b.have.Human(s):
		st.Note = registrar.NoteHuman
	}
	if st.Why == "" {
		st.Why = notServing[st.Reason()]
	}
	return b.sights.set(addr, st, true, b.redisTime(time.Now()))
}

// notServing says in words why HAProxy sends a server no requests.
var notServing = map[string]string{
	registrar.NoteUnplaced: "no slot is left",
	registrar.NoteHuman:    "a human put it into maint",
	registrar.ReasonMaint:  "it is in maint",
	registrar.ReasonDrain:  "it is drained",
	registrar.ReasonDown:   "its health check in HAProxy fails",
	registrar.ReasonWeight: "it has no weight",
}

// undid tells whether a server with an agent had what the register asks, and has it no
// more.
func (b *backend) undid(addr netip.AddrPort, s Server) bool {
	o, had := b.told[addr]
	return had && (s.Admin != o.state || s.Weight == 0 && !o.none)
}

// observeFault says of every instance that the backend is not driven.
func (b *backend) observeFault() {
	b.mu.Lock()
	b.applied = registrar.Token{}
	b.status = BackendStatus{Fault: b.fault}
	b.sights.wholeAt, b.sights.fresh, b.sights.version = b.readAt, true, 0
	present := map[netip.AddrPort]bool{}
	b.view.Each(func(e registrar.Entry) {
		if e.Present {
			present[e.Addr] = true
		}
	})
	for a := range present {
		b.sights.set(a, registrar.ServerState{Note: registrar.NoteRefused, Why: b.fault}, true, b.redisTime(time.Now()))
	}
	for a := range b.sights.states {
		if !present[a] {
			b.sights.set(a, registrar.ServerState{}, false, 0)
		}
	}
	b.mu.Unlock()
	b.looked()
	b.acked()
}

// unserved says which instances have no server as they should, after a step; nil if all
// have. One that waits for its check, or for its drain, has its server.
func (b *backend) unserved() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.fault != "" {
		return fmt.Errorf("backend %s is not driven: %s", b.name, b.fault)
	}
	present, without := 0, 0
	var first netip.AddrPort
	why, refused := "", "HAProxy refused its server; the log has HAProxy's words"
	b.view.Each(func(e registrar.Entry) {
		if !e.Present {
			return
		}
		present++
		st := b.sights.states[e.Addr]
		if st.Server != "" && st.Note != registrar.NoteRefused || st.State == Maint.String() {
			return
		}
		if without++; !first.IsValid() || e.Addr.Compare(first) < 0 {
			first = e.Addr
			why = cmp.Or(st.Why, refused)
		}
	})
	if without == 0 {
		return nil
	}
	return fmt.Errorf("backend %s: %d of %d instances are not served; %s: %s", b.name, without, present, first, why)
}

// redisTime is the time, unix ms by Redis' clock, at t. The caller has mu.
func (b *backend) redisTime(t time.Time) int64 { return b.now + t.Sub(b.viewAt).Milliseconds() }

// set enters the state of addr at now, or that there is none, and tells whether it is
// another than before.
func (s *sights) set(addr netip.AddrPort, st registrar.ServerState, there bool, now int64) bool {
	old, had := s.states[addr]
	if had && old.Note == st.Note && old.Reason() == st.Reason() {
		st.Since, st.Until = settled(old.Since, cmp.Or(st.Since, old.Since)), settled(old.Until, st.Until)
	}
	if st.Since == 0 && there && st.Reason() != "" {
		st.Since = now
	}
	if had == there && old == st {
		return false
	}
	if s.states == nil {
		s.states, s.changed = map[netip.AddrPort]registrar.ServerState{}, map[netip.AddrPort]bool{}
	}
	if there {
		s.states[addr] = st
	} else {
		delete(s.states, addr)
	}
	s.changed[addr] = true
	return true
}

// settled is the earlier reading of one moment.
func settled(before, now int64) int64 {
	if now > before-sameTime && now < before+sameTime {
		return before
	}
	return now
}

// news tells how old the last look at all servers is, and whether there has been
// one and there is something to tell.
func (b *backend) news() (age time.Duration, known, news bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := &b.sights
	return time.Since(s.wholeAt), !s.wholeAt.IsZero(), s.fresh || len(s.changed) > 0
}

// take returns the addresses that changed, or all of them, and counts them as
// told.
func (b *backend) take(all bool) []netip.AddrPort {
	b.mu.Lock()
	defer b.mu.Unlock()
	addrs := make([]netip.AddrPort, 0, len(b.sights.changed))
	for a := range b.sights.changed {
		addrs = append(addrs, a)
	}
	if all {
		for a := range b.sights.states {
			if !b.sights.changed[a] {
				addrs = append(addrs, a)
			}
		}
	}
	clear(b.sights.changed)
	b.sights.fresh, b.sights.takenAt = false, b.sights.wholeAt
	return addrs
}

// seenOf adds to seen what this backend has of each address there, and how many of
// its servers are up. It returns the service version that this is not older than.
func (b *backend) seenOf(seen registrar.Seen) (version int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.sights.wholeAt.IsZero() {
		seen.Up[b.name] = b.sights.up
		seen.Counts[b.name] = b.standings()
	}
	for a := range seen.Servers {
		if st, ok := b.sights.states[a]; ok {
			if seen.Servers[a] == nil {
				seen.Servers[a] = map[string]registrar.ServerState{}
			}
			seen.Servers[a][b.name] = st
		}
	}
	return b.sights.version
}

// standings counts how the registered instances stand. The caller has mu.
func (b *backend) standings() (n registrar.Standing) {
	b.view.Each(func(e registrar.Entry) {
		if e.Present {
			n.Add(e.Addr, b.sights.states[e.Addr])
		}
	})
	return n
}

// history is the one that the list of the service is of.
func (b *backend) history() registrar.Token {
	b.mu.Lock()
	defer b.mu.Unlock()
	return registrar.Token{ReplID: b.view.Token.ReplID, Epoch: b.view.Token.Epoch}
}

func (s *Syncer) looked() {
	select {
	case s.looks <- struct{}{}:
	default: // it has been told, and has not looked since
	}
}

// publish tells the register what the backends see, soon after.
func (s *Syncer) publish(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	<-timer.C
	var outage registrar.Outage
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.looks:
		}
		timer.Reset(registrar.Shorten(publishAfter))
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		err := s.Publish(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			if failures, say := outage.End(); say {
				s.log.Info().Int("failures", failures).Msg("the register knows again what HAProxy has")
			}
			continue
		case outage.Fail():
			s.log.Warn().Err(err).Msg("cannot say what HAProxy has, so explain cannot tell; trying again")
		}
		timer.Reset(registrar.Backoff(outage.Failures, publishRetry))
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		s.looked()
	}
}

// Publish tells the register what HAProxy has of each service, if there is
// anything new. It is for one goroutine.
func (s *Syncer) Publish(ctx context.Context) error {
	errs := make([]error, len(s.services))
	var telling sync.WaitGroup
	for i, svc := range s.services {
		if s.store.Cluster() {
			telling.Go(func() { errs[i] = s.publishOne(ctx, svc) }) // of a shard that hangs the others hear nothing
		} else {
			errs[i] = s.publishOne(ctx, svc)
		}
	}
	telling.Wait()
	return errors.Join(errs...)
}

func (s *Syncer) publishOne(ctx context.Context, svc registrar.Service) error {
	bs, t := s.backends[svc], s.told[svc]
	double := s.acker.Double(svc)
	if double == registrar.Second {
		t.addrs = nil // what the register has is of the other's HAProxy
		return nil
	}
	seen := registrar.Seen{Up: map[string]int{}, Counts: map[string]registrar.Standing{}, Servers: map[netip.AddrPort]map[string]registrar.ServerState{}}
	history := bs[0].history()
	// It may have none of it, or what was told long ago, or of another's HAProxy.
	seen.Anew = t.addrs == nil || t.history != history || double != registrar.Sole
	known, due := false, seen.Anew
	for _, b := range bs {
		if age, looked, news := b.news(); looked {
			known, due, seen.Age = true, due || news, max(seen.Age, age)
		}
	}
	if !known || !due {
		return nil
	}
	for _, b := range bs {
		for _, a := range b.take(seen.Anew) {
			seen.Servers[a] = nil
		}
	}
	for i, b := range bs {
		if v := b.seenOf(seen); i == 0 || v < seen.Version {
			seen.Version = v
		}
	}
	if seen.Anew {
		t.addrs, t.history = map[netip.AddrPort]bool{}, history
	}
	for a, states := range seen.Servers {
		if len(states) > 0 {
			t.addrs[a] = true
		} else {
			delete(t.addrs, a)
		}
	}
	tctx, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	addrs, err := s.store.Publish(tctx, s.cfg.ID, svc, seen)
	if err != nil {
		t.addrs = nil
		return err
	}
	if addrs != len(t.addrs) {
		t.addrs = nil // somebody else wrote there, or it expired
		s.looked()
	}
	return nil
}
