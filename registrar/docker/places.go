package docker

import (
	"context"
	"errors"
	"slices"
	"time"

	"rollcall/registrar"
)

// An address has one listener. When a container has it, whatever the agent has
// registered there for another service is out before the container's first heartbeat:
// else that service's requests reach this one's container. So the agent knows of each
// address which services it may have registered it in, also before its own time: that
// is in its ledger, in Redis.

const (
	// sweepEvery is how often places that no container has any more are looked at.
	sweepEvery = 5 * time.Minute
	// rivalPoll paces the wait for a container to be inspected.
	rivalPoll = 20 * time.Millisecond
)

// spot is one service at one address, where the agent may have a registration. Its
// fields are guarded by the agent's mu.
type spot struct {
	noted     bool        // it is in the ledger
	left      bool        // what was there has left, and that was said
	token     string      // of the last registration there of this process's
	occupants []*occupant // that beat there, or are about to: of a container that ends and of the next one, say
}

// occupant is a registration that beats, or is about to.
type occupant struct {
	reg   *registration
	evict context.CancelCauseFunc
	gone  chan struct{} // closed when it does not any more
}

// spotAt returns the spot of a place, which it makes if there is none. The caller
// holds mu.
func (a *Agent) spotAt(p registrar.Place) *spot {
	of := a.spots[p.Addr]
	if of == nil {
		of = map[registrar.Service]*spot{}
		a.spots[p.Addr] = of
	}
	if of[p.Service] == nil {
		of[p.Service] = &spot{}
	}
	return of[p.Service]
}

// occupy makes r the only registration of this agent's at its address, but for those
// of the same service, and returns the context to beat in, which ends when another
// container has the address. free must be called in the end. With an error ctx has
// ended before.
func (a *Agent) occupy(ctx context.Context, r *registration) (beating context.Context, free func(), err error) {
	select {
	case <-a.known:
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	beating, evict := context.WithCancelCause(ctx)
	o := &occupant{reg: r, evict: evict, gone: make(chan struct{})}
	for failures := 1; ; failures++ {
		rivals := a.enter(o, false)
		if len(rivals) == 0 {
			break
		}
		if r.shared {
			a.recheck(ctx, rivals)
			a.enter(o, true) // beside those that are there nevertheless
			break
		}
		if err = a.confirm(ctx, r); err == nil {
			for _, rival := range rivals {
				rival.reg.log.Warn().Str("by", r.worker.id).Msg("another container has the address now; leaving")
				rival.evict(registrar.ErrEnded)
				rival.reg.hasten()
			}
			for _, rival := range rivals {
				select {
				case <-rival.gone:
				case <-ctx.Done():
				}
			}
			continue
		}
		r.log.Debug().Err(err).Msg("two containers have one address, as far as is known; looking again")
		if !pause(ctx, registrar.Backoff(failures, engineTimeout)) {
			evict(nil)
			return nil, nil, ctx.Err()
		}
	}
	free = func() {
		evict(nil)
		a.exit(o)
	}
	if err = a.prepare(beating, r); err != nil {
		free()
		return nil, nil, err
	}
	return beating, free, nil
}

// enter notes that o is about to beat, unless others do at its address for another
// service: then it returns these and notes nothing, if it is not to stand beside them.
func (a *Agent) enter(o *occupant, beside bool) (rivals []*occupant) {
	a.mu.Lock()
	defer a.mu.Unlock()
	at := o.reg.place()
	for svc, s := range a.spots[at.Addr] {
		if svc != at.Service {
			rivals = append(rivals, s.occupants...)
		}
	}
	if len(rivals) == 0 || beside {
		s := a.spotAt(at)
		s.occupants, s.left = append(s.occupants, o), false
	}
	return rivals
}

// exit notes that o does not beat any more. What is left of it in the register is
// found by its token.
func (a *Agent) exit(o *occupant) {
	a.mu.Lock()
	defer a.mu.Unlock()
	defer close(o.gone)
	if s := a.spots[o.reg.key.addr][o.reg.key.service]; s != nil {
		s.token = o.reg.beater.Token()
		s.occupants = slices.DeleteFunc(s.occupants, func(x *occupant) bool { return x == o })
	}
}

// confirm asks the Engine whether the container of r has the address now: later than
// all that made the rivals be registered. Published ports and containers' own
// addresses belong to one container at a time.
func (a *Agent) confirm(ctx context.Context, r *registration) error {
	f, err := a.inspect(ctx, r.worker.id)
	if err != nil {
		return err
	}
	wants, _ := a.where().plan(f) // what cannot be registered is not r
	if f.state == ended || !slices.ContainsFunc(wants, func(w want) bool { return w.key() == r.key }) {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.post(ctx, r.worker.id, note{what: look})
		return errors.New("the container does not have it any more")
	}
	return nil
}

// look has the containers of rivals inspected.
func (a *Agent) look(ctx context.Context, rivals []*occupant) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, o := range rivals {
		w := o.reg.worker
		if a.workers[w.id] == w {
			a.post(ctx, w.id, note{what: look})
		}
	}
}

// recheck has the containers of rivals inspected, and waits until that is done or
// they have left: containers on the host's own network say which port they use, and
// any number may say the same one. It waits no longer than an inspection may take.
func (a *Agent) recheck(ctx context.Context, rivals []*occupant) {
	asked := time.Now()
	a.look(ctx, rivals)
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	for {
		if rivals = a.unseen(rivals, asked); len(rivals) == 0 || !pause(ctx, rivalPoll) {
			return
		}
	}
}

// unseen returns those of rivals that have not left, and whose containers have not
// been inspected since asked.
func (a *Agent) unseen(rivals []*occupant, asked time.Time) []*occupant {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.DeleteFunc(rivals, func(o *occupant) bool {
		select {
		case <-o.gone:
			return true
		default:
			return o.reg.worker.seen.After(asked)
		}
	})
}

// prepare has whatever the agent has registered at r's address for another service
// leave, and notes r in the ledger. It tries until Redis has answered, or ctx ends.
func (a *Agent) prepare(ctx context.Context, r *registration) error {
	outage := registrar.Outage{Shared: &a.voice}
	for {
		err := a.clear(ctx, r)
		if err == nil {
			err = a.enroll(ctx, r.place())
		}
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err == nil:
			return nil
		}
		r.standing.Store(int32(Refused))
		if outage.Fail() {
			r.log.Warn().Err(err).Msg("cannot prepare the registration; retrying for ever")
		}
		if !pause(ctx, registrar.Backoff(outage.Failures, registrar.NewcomerRetry)) {
			return ctx.Err()
		}
	}
}

// clear has what is registered at r's address for other services leave, where no
// registration of this process's beats. On the host's own network another container
// may have it, until all are known.
func (a *Agent) clear(ctx context.Context, r *registration) error {
	if r.shared && !a.complete() {
		return nil // the sweep sees to it
	}
	a.mu.Lock()
	var places []registrar.Place
	for svc, s := range a.spots[r.key.addr] {
		p := registrar.Place{Service: svc, Addr: r.key.addr}
		if svc != r.key.service && len(s.occupants) == 0 && !(r.shared && a.planned(p)) {
			places = append(places, p)
		}
	}
	a.mu.Unlock()
	_, err := a.settle(ctx, places, false)
	return err
}

// enroll has a place in the ledger.
func (a *Agent) enroll(ctx context.Context, p registrar.Place) error {
	a.mu.Lock()
	noted := !a.ledger || a.spotAt(p).noted
	a.mu.Unlock()
	if noted {
		return nil
	}
	tctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	err := a.store.WriteLedger(tctx, a.mark, []registrar.Place{p}, nil)
	if err = a.permitted(err); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.spotAt(p).noted = a.ledger
	return nil
}

// permitted turns a refusal for want of rights into a ledger that there is not, which
// is said once.
func (a *Agent) permitted(err error) error {
	if !errors.Is(err, registrar.ErrDenied) {
		return err
	}
	a.mu.Lock()
	was := a.ledger
	a.ledger = false
	a.mu.Unlock()
	if was {
		a.log.Warn().Err(err).Msg("going on without a ledger: what an agent leaves behind here stays for its TTL")
	}
	return nil
}

// settle has those of places leave whose registration is this agent's, or one before
// it's, and where none beats now; unplanned = nor may a container have it that runs.
// It returns the places of which nothing is left, and an error if of some nothing is
// known.
func (a *Agent) settle(ctx context.Context, places []registrar.Place, unplanned bool) (settled []registrar.Place, err error) {
	if len(places) == 0 {
		return nil, nil
	}
	tctx, cancel := registrar.WithTimeout(ctx)
	held, err := a.store.Held(tctx, places)
	cancel()
	if err = a.permitted(err); err != nil || held == nil {
		return nil, err
	}
	var failed []error
	for i, p := range places {
		// What has come since the read has another token, or is occupied.
		if a.leavable(p, held[i], unplanned) {
			tctx, cancel := registrar.WithTimeout(ctx)
			_, err := a.store.Leave(tctx, p.Service, p.Addr, held[i].Token, registrar.Left)
			cancel()
			if err != nil && !errors.Is(err, registrar.ErrNotOwner) {
				failed = append(failed, err)
				continue
			}
			if a.saysLeft(p) {
				a.log.Info().Str("service", string(p.Service)).Stringer("addr", p.Addr).Msg("left: no container has it any more")
			}
		}
		settled = append(settled, p)
	}
	return settled, errors.Join(failed...)
}

// leavable tells whether what the register holds at a place is of an agent here, and
// of no container any more.
func (a *Agent) leavable(p registrar.Place, h registrar.Held, unplanned bool) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.spots[p.Addr][p.Service]
	ours := h.Token != "" && (a.mark != "" && h.Agent == a.mark || s != nil && h.Token == s.token)
	return ours && (s == nil || len(s.occupants) == 0) && !(unplanned && a.planned(p))
}

// saysLeft tells whether to say that what was at a place has left: a container that has
// come there and the sweep may both have seen to it.
func (a *Agent) saysLeft(p registrar.Place) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.spots[p.Addr][p.Service]
	if s == nil || s.left {
		return false
	}
	s.left = true
	return true
}

// planned tells whether a container that runs is to have p, as far as is known. The
// caller holds mu.
func (a *Agent) planned(p registrar.Place) bool {
	for _, w := range a.workers {
		if w.plan[key{p.Service, p.Addr}] {
			return true
		}
	}
	return false
}

// sweep reads the ledger, and when all containers are known it has leave what an agent
// before this one registered and no container has: once at the start, until that is
// done, and then from time to time.
func (a *Agent) sweep(ctx context.Context) {
	a.readLedger(ctx)
	close(a.known)
	select {
	case <-a.inspected:
	case <-ctx.Done():
		return
	}
	outage := registrar.Outage{Shared: &a.voice}
	for ctx.Err() == nil {
		wait := registrar.Shorten(sweepEvery)
		if err := a.prune(ctx); err == nil {
			outage.End()
		} else {
			if outage.Fail() && ctx.Err() == nil {
				a.log.Warn().Err(err).Msg("cannot have leave what no container has; retrying for ever")
			}
			wait = registrar.Backoff(outage.Failures, registrar.DefaultInterval)
		}
		pause(ctx, wait)
	}
}

// readLedger takes in where an agent before this one may have registrations.
func (a *Agent) readLedger(ctx context.Context) {
	a.mu.Lock()
	a.ledger = a.leased
	a.mu.Unlock()
	outage := registrar.Outage{Shared: &a.voice}
	for a.leased && ctx.Err() == nil {
		tctx, cancel := registrar.WithTimeout(ctx)
		places, err := a.store.Ledger(tctx, a.mark)
		cancel()
		if err = a.permitted(err); err == nil {
			a.mu.Lock()
			for _, p := range places {
				if len(a.place.services) == 0 || slices.Contains(a.place.services, p.Service) {
					a.spotAt(p).noted = true
				}
			}
			a.mu.Unlock()
			return
		}
		if outage.Fail() && ctx.Err() == nil {
			a.log.Warn().Err(err).Msg("cannot read what was registered here before; retrying for ever")
		}
		pause(ctx, registrar.Backoff(outage.Failures, registrar.NewcomerRetry))
	}
}

// prune forgets the places that no container has, when nothing of them is left in the
// register.
func (a *Agent) prune(ctx context.Context) error {
	places := a.idlePlaces()
	settled, failed := a.settle(ctx, places, true)
	drop := a.forget(settled)
	a.mu.Lock()
	ledger := a.ledger
	a.mu.Unlock()
	if !ledger {
		return failed
	}
	tctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	err := a.store.WriteLedger(tctx, a.mark, nil, drop) // with none too, so that the ledger is kept
	// A container that has come meanwhile may have noted its place before that.
	var again []registrar.Place
	a.mu.Lock()
	for _, p := range drop {
		if s := a.spots[p.Addr][p.Service]; s != nil || err != nil {
			again = append(again, p)
		}
	}
	a.mu.Unlock()
	if err == nil && len(again) > 0 {
		err = a.store.WriteLedger(tctx, a.mark, again, nil)
	}
	if err != nil {
		a.mu.Lock()
		for _, p := range again {
			a.spotAt(p).noted = true // perhaps; the next sweep sees to it
		}
		a.mu.Unlock()
	}
	return errors.Join(failed, a.permitted(err))
}

// idlePlaces returns the places that no container has.
func (a *Agent) idlePlaces() (places []registrar.Place) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for addr, of := range a.spots {
		for svc, s := range of {
			if p := (registrar.Place{Service: svc, Addr: addr}); len(s.occupants) == 0 && !a.planned(p) {
				places = append(places, p)
			}
		}
	}
	return places
}

// forget takes places off those that are known, unless somebody has come there, and
// returns those of them that are in the ledger.
func (a *Agent) forget(places []registrar.Place) (noted []registrar.Place) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, p := range places {
		s := a.spots[p.Addr][p.Service]
		if s == nil || len(s.occupants) > 0 {
			continue
		}
		if delete(a.spots[p.Addr], p.Service); len(a.spots[p.Addr]) == 0 {
			delete(a.spots, p.Addr)
		}
		if s.noted {
			noted = append(noted, p)
		}
	}
	return noted
}

// complete tells whether every container has been inspected since the agent began.
func (a *Agent) complete() bool {
	select {
	case <-a.inspected:
		return true
	default:
		return false
	}
}

// pause waits for d, and tells whether ctx still lasts then.
func pause(ctx context.Context, d time.Duration) bool {
	wait := time.NewTimer(d)
	defer wait.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-wait.C:
		return true
	}
}
