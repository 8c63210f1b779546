package docker

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"rollcall/registrar"
	"rollcall/registrar/health"
)

// registration is one port of one life of a container.
type registration struct {
	worker *worker
	key    key
	shared bool // other containers may say that they have the address too: it is on the host's own network
	beater *registrar.Beater
	damper *registrar.Damper // of all lives of the port
	claims *claims           // of all containers
	prober *health.Prober    // nil: it counts as healthy
	log    zerolog.Logger

	standing atomic.Int32 // a Standing
	cancel   context.CancelCauseFunc
	// unregister ends the Run that a healthy app has; of run alone.
	unregister context.CancelCauseFunc
	hurry      chan struct{} // the Beater's
	hasten     func()        // closes hurry, once
	accepted   chan struct{} // closed when the first heartbeat was
	accept     func()        // closes accepted, once
	done       chan struct{} // closed when run has returned
}

func (r *registration) place() registrar.Place {
	return registrar.Place{Service: r.key.service, Addr: r.key.addr}
}

// Standing is how an instance stands with the register.
type Standing int32

// The standings, by the last heartbeat.
const (
	Absent     Standing = iota // no heartbeat is due: it is not healthy, say
	Registered                 // accepted
	Refused                    // not accepted, or not answered
	Damped                     // it comes and goes, and waits before it returns
)

// beaten hears of each heartbeat.
func (r *registration) beaten(err error) {
	r.damper.Beaten(err)
	if err == nil {
		r.standing.Store(int32(Registered))
		r.accept()
	} else {
		r.standing.Store(int32(Refused))
	}
}

// over tells whether run has returned: another container has had the address.
func (r *registration) over() bool {
	select {
	case <-r.done:
		return true
	default:
		return false
	}
}

// start runs r, which ends when leave is called.
func (r *registration) start(ctx context.Context) {
	ctx, r.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	r.done = make(chan struct{})
	go func() { // leave and wait
		defer close(r.done)
		r.run(ctx)
	}()
}

// leave has r leave for the cause, which is the Beater's, or is that it drains
// if it is nil. In a hurry no drain is waited for any longer.
func (r *registration) leave(cause error, hurry bool) {
	r.cancel(cause)
	if hurry {
		r.hasten()
	}
}

// run beats while the app is healthy, until ctx ends.
func (r *registration) run(ctx context.Context) {
	if r.prober == nil {
		r.beat(ctx)
		return
	}
	changes := make(chan health.Change)
	probing, stop := context.WithCancel(ctx)
	var prober sync.WaitGroup
	defer prober.Wait()
	defer stop()
	prober.Go(func() { r.prober.Run(probing, changes) })
	var left sync.WaitGroup // for the beat, whose context ends with ctx at the latest
	defer left.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case c, more := <-changes:
			switch {
			case !more: // so has ctx
				changes = nil
			case c.Healthy:
				var healthy context.Context
				healthy, r.unregister = context.WithCancelCause(ctx)
				left.Go(func() { r.beat(healthy) })
			case r.unregister == nil:
				r.log.Warn().Err(c.Cause).Msg("not healthy yet; it registers when it is")
			default:
				r.log.Warn().Err(c.Cause).Msg("unhealthy")
				r.unregister(registrar.ErrUnhealthy)
				left.Wait()
			}
		}
	}
}

// beat registers while the address is the container's, until ctx ends.
func (r *registration) beat(ctx context.Context) {
	for again := true; again; {
		mine, stop := r.mine(ctx)
		if mine == nil {
			return
		}
		r.hold(mine)
		again = ctx.Err() == nil && errors.Is(context.Cause(mine), registrar.ErrHandedOver)
		stop()
	}
}

// hold registers until ctx ends, or a container of another service has the address. A token that has left, by another hand or in
// another process's time, is followed by a new one.
func (r *registration) hold(ctx context.Context) {
	defer r.standing.Store(int32(Absent))
	if !r.damper.Hold(ctx, r.key.service, r.key.addr, func(time.Duration) { r.standing.Store(int32(Damped)) }) {
		return
	}
	defer func() { r.damper.Left(context.Cause(ctx)) }()
	beating, free, err := r.worker.agent.occupy(ctx, r)
	if err != nil {
		return
	}
	defer free()
	for beating.Err() == nil {
		err := r.beater.Run(beating)
		switch {
		case errors.Is(err, registrar.ErrLeft):
			r.log.Info().Msg("the registration had left; making a new one")
		case err != nil:
			r.log.Error().Err(err).Msg("not registered")
			return
		}
	}
}
