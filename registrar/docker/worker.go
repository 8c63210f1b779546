package docker

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/rs/zerolog"

	"rollcall/registrar"
	"rollcall/registrar/health"
)

// moveWait is how long the old addresses of a container that moves are kept for the
// new ones to be registered.
const moveWait = time.Second

// what a note is about.
type what int

const (
	look   what = iota // something may have changed: inspect it
	missed             // a list lacks it, or it was removed: inspect it too
	killed             // it was sent a signal
	died               // its life has ended
	moved              // the host has another address, or a registration at it was accepted
)

// note is one thing for a worker to see to.
type note struct {
	what   what
	at     time.Time // by the Engine's clock; of killed and died
	signal string    // of killed
}

// worker does all about one container, one thing after another.
type worker struct {
	agent *Agent
	id    string
	log   zerolog.Logger
	wake  chan struct{} // has room for one: there are notes

	notes []note                // guarded by agent.mu
	regs  map[key]*registration // guarded by agent.mu; only run changes it
	plan  map[key]bool          // what it is to be registered as while it runs; guarded by agent.mu
	seen  time.Time             // when the last inspection that was answered began; guarded by agent.mu

	// Of run alone.
	facts    facts     // of the last inspection that was answered
	over     time.Time // beginning of the life that was told to stop or has ended: it is not registered again
	said     time.Time // beginning of the life whose mistakes have been logged
	missing  bool      // the Engine has said that it does not run, since the last inspection that was answered
	failures int       // inspections without an answer, in a row
}

// run sees to notes until ctx ends, or until the container does not run. Then all
// of its registrations have ended.
func (w *worker) run(ctx context.Context) {
	again := time.NewTimer(0)
	again.Stop()
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			w.end(context.Cause(ctx))
			return
		case <-again.C:
			w.look(ctx)
		case <-w.wake:
			for n, ok := w.agent.next(w); ok; n, ok = w.agent.next(w) {
				w.see(ctx, n)
			}
		}
		switch {
		case w.failures > 0:
			again.Reset(registrar.Backoff(w.failures, engineTimeout))
		case w.facts.state == ended && w.agent.retire(w):
			return
		}
	}
}

func (w *worker) see(ctx context.Context, n note) {
	if n.what == look || n.what == missed {
		w.missing = w.missing || n.what == missed
		w.look(ctx)
		return
	}
	if n.what == moved {
		w.moves(ctx)
		return
	}
	// A restarted container may have been inspected in its new life already.
	if n.at.Before(w.facts.started) {
		return
	}
	switch {
	case n.what == died:
		w.over, w.missing = w.facts.started, true
		w.leave(registrar.ErrEnded)
		w.planNothing()
	case w.facts.stops(n.signal) && !w.over.Equal(w.facts.started):
		w.over = w.facts.started
		w.log.Info().Str("signal", n.signal).Int("instances", len(w.regs)).Msg("told to stop; draining")
		for _, r := range w.regs {
			r.leave(nil, false) // its end is waited for when the container has died
		}
	}
}

// plans notes what the container is to have. The caller holds the agent's mu.
func (w *worker) plans(wants []want) {
	w.plan = map[key]bool{}
	for _, want := range wants {
		w.plan[want.key()] = true
	}
}

// planNothing notes that the container is to have nothing until it is inspected again.
func (w *worker) planNothing() {
	w.agent.mu.Lock()
	defer w.agent.mu.Unlock()
	w.plan = nil
}

// look inspects the container and has what it is now. One that is not found has
// ended if the Engine has also said so otherwise: a single 404, of a proxy before
// the socket say, must not take out what serves.
func (w *worker) look(ctx context.Context) {
	asked := time.Now()
	f, err := w.agent.inspect(ctx, w.id)
	if w.missing && errdefs.IsNotFound(err) {
		f, err = facts{id: w.id}, nil
	}
	if err != nil {
		if ctx.Err() == nil {
			w.failures++
			w.log.Debug().Err(err).Msg("nothing is known of the container; trying again")
		}
		return
	}
	w.failures, w.missing = 0, false
	if !f.started.Equal(w.facts.started) {
		w.leave(registrar.ErrEnded)
	}
	w.facts = f
	var wants []want
	var remarks []remark
	if f.state != ended {
		wants, remarks = w.agent.where().plan(f)
	}
	w.agent.inspectedOne(w, wants, asked)
	switch {
	case f.state == sick:
		w.leave(registrar.ErrUnhealthy)
	case f.state == waiting && len(w.regs) > 0:
		// A HEALTHCHECK says "starting" again after its Engine was restarted. It has
		// been healthy in this life, and nothing has said that it is not now.
	case f.state != serving:
		w.leave(registrar.ErrEnded)
	case !f.started.Equal(w.over):
		w.register(ctx, wants, remarks)
	}
}

// register makes the registrations be those that the container is to have. In one life
// its addresses change when it moves between networks: it cannot be reached at the old
// ones any more, so that nothing has to drain, and when the new ones have come the old
// ones go at once. They also change when the host has another address: then each drains
// and leaves when the register has its successor.
func (w *worker) register(ctx context.Context, wants []want, remarks []remark) {
	first := !w.facts.started.Equal(w.said)
	if first {
		w.said = w.facts.started
		w.tell(remarks)
	}
	wanted := map[key]bool{}
	for _, want := range wants {
		wanted[want.key()] = true
	}
	w.claim(wants) // with what it has still
	var come []*registration
	for _, want := range wants {
		if r := w.regs[want.key()]; r != nil && !r.over() {
			continue
		}
		r, err := w.registration(want)
		if err != nil {
			if first {
				w.log.Warn().Err(err).Str("name", w.facts.name).Str("service", string(want.service)).Stringer("addr", want.addr).Msg("cannot be registered")
			}
			continue
		}
		r.start(ctx)
		w.set(want.key(), r)
		come = append(come, r)
	}
	var old, going []key
	host := w.agent.where().advertise
	for k, r := range w.regs {
		switch {
		case wanted[k], w.awaited(k, r, wants, host):
		case succeeded(k, wants, host):
			r.leave(nil, false)
			going = append(going, k)
		default:
			old = append(old, k)
		}
	}
	if len(old) > 0 {
		await(ctx, come)
	}
	for _, k := range old {
		w.regs[k].leave(registrar.ErrEnded, true)
	}
	for _, k := range append(old, going...) {
		<-w.regs[k].done
		w.set(k, nil)
	}
	w.claim(wants)
}

// claim has the container claim the addresses that it is to have, and those that it has
// not left yet: a registration whose claim ends hands over, and leaves nothing.
func (w *worker) claim(wants []want) {
	all := slices.Clone(wants)
	for k := range w.regs {
		all = append(all, want{service: k.service, addr: k.addr})
	}
	w.agent.claims.set(w.id, w.facts.started, all)
}

// await waits until the register has rs, for moveWait at most.
func await(ctx context.Context, rs []*registration) {
	ctx, cancel := context.WithTimeout(ctx, moveWait)
	defer cancel()
	for _, r := range rs {
		select {
		case <-r.accepted:
		case <-r.done:
		case <-ctx.Done():
			return
		}
	}
}

// registration makes what is to be registered.
func (w *worker) registration(want want) (*registration, error) {
	a := w.agent
	r := &registration{
		worker: w, key: want.key(), damper: w.damper(want), claims: &w.agent.claims, shared: w.facts.hostNetwork && !a.place.internal,
		hurry: make(chan struct{}), accepted: make(chan struct{}),
		log: w.log.With().Str("service", string(want.service)).Stringer("addr", want.addr).Logger(),
	}
	r.hasten = sync.OnceFunc(func() { close(r.hurry) })
	r.accept = sync.OnceFunc(func() { close(r.accepted) })
	var err error
	r.beater, err = registrar.NewBeater(registrar.BeaterConfig{
		Service: want.service, Addr: want.addr, Weight: want.weight, Zone: a.cfg.Zone, Tags: want.tags,
		DrainWait: a.cfg.DrainWait, LeaveWait: a.cfg.LeaveWait, Hurry: r.hurry, Roll: a.roll,
		Token: want.token(w.facts), Since: w.facts.started, Agent: a.mark, Own: a.place.internal && !w.facts.hostNetwork,
		Beaten: w.accepted(r, func(err error) {
			r.beaten(err)
			if a.cfg.Beaten != nil {
				a.cfg.Beaten(err)
			}
		}),
	}, a.store, w.log)
	if err != nil {
		return nil, err
	}
	var check health.Check
	switch {
	case want.check.command != nil:
		check = a.command(w.id, want.check.command)
	case want.check.url != "":
		if check, err = health.Parse(want.check.url, nil, nil); err != nil {
			return nil, err
		}
	default:
		return r, nil
	}
	r.prober, err = health.New(health.Config{
		Interval: want.check.interval, Timeout: want.check.timeout, Rise: health.DefaultRise, Fall: health.DefaultFall,
		Log: r.log, Unknown: a.cfg.Unknown,
	}, check)
	return r, err
}

// leave ends every registration for the cause, in a hurry, and waits for it.
func (w *worker) leave(cause error) {
	for _, r := range w.regs {
		r.leave(cause, true)
	}
	w.wait()
	if cause == registrar.ErrEnded {
		w.agent.claims.set(w.id, time.Time{}, nil)
	}
}

// end is what becomes of the registrations when the agent ends, or stands by.
func (w *worker) end(why error) {
	cause := registrar.ErrHandedOver
	if w.agent.leave.Load() && !errors.Is(why, errTakenOver) {
		cause = nil
	}
	for _, r := range w.regs {
		r.leave(cause, false)
	}
	w.wait()
}

func (w *worker) wait() {
	for k, r := range w.regs {
		<-r.done
		w.set(k, nil)
	}
}

// set changes regs; nil = there is none.
func (w *worker) set(k key, r *registration) {
	w.agent.mu.Lock()
	defer w.agent.mu.Unlock()
	if r == nil {
		delete(w.regs, k)
	} else {
		w.regs[k] = r
	}
}
