package reaper

import (
	"context"
	"errors"
	"fmt"
	"time"

	"rollcall/registrar"
)

// neverArmed is how many TTL Once waits at most. Armed takes TTL + B, which is
// at most 4/3 of one.
const neverArmed = 3

// longestWait bounds what Once waits for those who beat by longer times.
const longestWait = 24 * time.Hour

// Once sweeps a single time, as soon as it is armed. It returns an error that
// wraps ErrNeverArmed if that takes more than three TTL and the time that those
// have who do not know the registry's times yet, ErrHeld if the protection kept
// somebody, and what Sweep returns. force is an operator's word: it takes the last
// TTL, and that time, for healthy without proof and skips the protection, but still
// needs one accepted pulse.
func (r *Reaper) Once(ctx context.Context, force bool) (Report, error) {
	if err := r.arm(ctx, force); err != nil {
		return Report{}, err
	}
	if err := r.ready(ctx); err != nil {
		return Report{}, fmt.Errorf("sweep: %w", err)
	}
	cutoff, armed := r.proof.cutoff()
	switch {
	case force: // who may beat by longer times is not silent for less
		cutoff, armed = r.proof.now-r.cfg.TTL.Milliseconds()-r.proof.slow, true
	case !armed: // what was proven is not enough for the times that the registry has now
		return Report{}, fmt.Errorf("%w: %s", ErrNeverArmed, r.cause)
	}
	defer r.voice.sumUp(true)
	report, err := r.sweep(ctx, cutoff, armed, force)
	if !r.unsaid.At.IsZero() {
		wait := time.NewTimer(time.Until(r.unsaid.At))
		defer wait.Stop()
		select {
		case <-ctx.Done():
		case <-wait.C:
			r.announce(ctx)
		}
	}
	if err == nil && !force && len(report.Held) > 0 {
		err = fmt.Errorf("%w: %d of %d instances look dead; --force overrules", ErrHeld, report.Suspects, report.Members)
	}
	return report, err
}

// arm pulses until the reaper is armed or, with force, until one pulse is
// accepted.
func (r *Reaper) arm(ctx context.Context, force bool) error {
	limit := neverArmed * r.cfg.TTL
	never := func() error { return fmt.Errorf("%w within %v", ErrNeverArmed, limit) }
	cctx, cancel := context.WithTimeoutCause(ctx, limit, never())
	err := r.connect(cctx)
	cancel()
	if err != nil {
		return err
	}
	limit += ms(min(r.proof.slow, longestWait.Milliseconds()))
	actx, cancel := context.WithTimeoutCause(ctx, limit, never())
	defer cancel()
	wait := time.NewTimer(0)
	defer wait.Stop()
	var last error
	for {
		select {
		case <-actx.Done():
			return fmt.Errorf("%w: %w", context.Cause(actx), errors.Join(errors.New(r.cause), last))
		case <-wait.C:
		}
		began := r.elapsed()
		err := r.Pulse(actx)
		if err == nil && r.armed || force && r.proof.ok {
			return nil
		}
		if actx.Err() == nil {
			last = err
		}
		wait.Reset(began + registrar.Shorten(r.proof.period) - r.elapsed())
	}
}
