package docker

import (
	"context"
	"errors"
	"sync"
	"time"

	"rollcall/registrar"
)

// leaseRenewals is how many times an agent renews its lease in the length of one.
const leaseRenewals = 3

// errTakenOver ends the work of an agent whose lease another one has.
var errTakenOver = errors.New("another agent registers these containers")

// errStandby is why an agent without the lease does nothing.
var errStandby = errors.New("standing by: another agent registers the containers of this engine")

// stand waits until the agent may register: until it has the lease of its containers,
// or knows that it can have none. It returns false if ctx ends before.
func (a *Agent) stand(ctx context.Context) bool {
	a.leased = false
	if a.mark == "" {
		return true
	}
	outage, said, doubt := registrar.Outage{}, false, false
	wait := time.NewTimer(0)
	defer wait.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-wait.C:
		}
		tctx, cancel := registrar.WithTimeout(ctx)
		l, err := a.store.KeepLease(tctx, a.lease, a.holder, !doubt)
		cancel()
		switch {
		case ctx.Err() != nil:
			// Perhaps it was taken, and the answer is lost.
			a.release(ctx)
			return false
		case errors.Is(err, registrar.ErrDenied):
			a.log.Warn().Err(err).Msg("going on without a lease: a second agent here is not noticed, and what an agent leaves behind stays for its TTL")
			a.idle(nil)
			return true
		case err != nil:
			// The holder too could not renew it meanwhile. It is the first to take it.
			doubt = true
			if outage.Fail() {
				a.log.Warn().Err(err).Msg("cannot ask for the lease of these containers; retrying for ever")
			}
			a.idle(err)
			wait.Reset(registrar.Backoff(outage.Failures, registrar.NewcomerRetry))
			continue
		}
		if failures, say := outage.End(); say {
			a.log.Info().Int("failures", failures).Msg("redis answers again")
		}
		switch {
		case l.Held:
			a.leased, a.length = true, l.Length
			if said {
				a.log.Info().Msg("the other agent has ended; registering")
			}
			a.idle(nil)
			return true
		case l.Left == 0: // doubt, or it ended between two looks at it
			doubt = false
			wait.Reset(l.Length)
		default:
			doubt = false
			if !said {
				said = true
				a.log.Warn().Msg("another agent registers the containers of this engine; standing by until it ends. Stop one of them; if it is another host's, that was cloned from the same disk: give it another host name, or the agents an --id each")
			}
			a.idle(errStandby)
			wait.Reset(min(l.Left+time.Millisecond, registrar.Shorten(l.Length/leaseRenewals)))
		}
	}
}

// lead registers until ctx ends, or until another agent has the lease.
func (a *Agent) lead(ctx context.Context) {
	leading, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	if !a.leased {
		a.serve(leading)
		return
	}
	renewing, end := context.WithCancel(context.WithoutCancel(ctx)) // while the containers drain and leave too
	var renewer sync.WaitGroup
	renewer.Go(func() { a.renew(renewing, stop) })
	a.serve(leading)
	end()
	renewer.Wait()
	a.release(ctx)
}

// renew keeps the lease until ctx ends. That Redis is away, or has lost it, is no
// reason to stop: only that another agent has it is.
func (a *Agent) renew(ctx context.Context, stop context.CancelCauseFunc) {
	wait := time.NewTimer(registrar.Shorten(a.length / leaseRenewals))
	defer wait.Stop()
	for failures, said := 0, false; ; {
		select {
		case <-ctx.Done():
			return
		case <-wait.C:
		}
		tctx, cancel := registrar.WithTimeout(ctx)
		l, err := a.store.KeepLease(tctx, a.lease, a.holder, true)
		cancel()
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			failures++
			if errors.Is(err, registrar.ErrDenied) && !said {
				said = true
				a.log.Warn().Err(err).Msg("the lease cannot be renewed: a second agent here is not noticed")
			}
			wait.Reset(registrar.Backoff(failures, a.length/leaseRenewals))
		case !l.Held:
			a.log.Warn().Msg("another agent registers these containers now; handing over, and standing by until it ends")
			stop(errTakenOver)
			return
		default:
			failures = 0
			wait.Reset(registrar.Shorten(l.Length / leaseRenewals))
		}
	}
}

// release gives the lease up, for who stands by. If it cannot, the lease ends by
// itself.
func (a *Agent) release(ctx context.Context) {
	ctx, cancel := registrar.WithTimeout(context.WithoutCancel(ctx))
	defer cancel()
	if err := a.store.EndLease(ctx, a.lease, a.holder); err != nil {
		a.log.Debug().Err(err).Msg("the lease ends by itself")
	}
}

// idle notes why the agent does not register, which is not the Engine's fault; nil =
// it does, as far as the Engine answers.
func (a *Agent) idle(why error) {
	a.mu.Lock()
	before, away := a.standby, a.away
	a.standby = why
	a.mu.Unlock()
	switch {
	case a.cfg.Tell == nil:
	case why != nil && (before == nil || before.Error() != why.Error()):
		a.cfg.Tell(why)
	case why == nil && before != nil && away == nil: // else it is told when the Engine answers
		a.cfg.Tell(nil)
	}
}
