package reaper

import (
	"context"
	"time"

	"rollcall/registrar"
)

// tell writes the status to the register on every change and each 5 s, until
// ctx ends, and then that this reaper is no more. It is a loop of its own, so
// that no report delays a pulse.
func (r *Reaper) tell(ctx context.Context) {
	wait := time.NewTimer(0)
	defer wait.Stop()
	known := false // the register may have an entry
	outage := registrar.Outage{Shared: &r.voice.reports}
	for {
		select {
		case <-ctx.Done():
			if known {
				r.untell(ctx)
			}
			return
		case <-r.news:
		case <-wait.C:
		}
		st := r.Status()
		// Not cut short by the end: cut off, it might land after the entry was dropped.
		tctx, cancel := registrar.WithTimeout(context.WithoutCancel(ctx))
		err := r.store.Report(tctx, r.cfg.ID, &st)
		cancel()
		known = true
		if err != nil {
			if outage.Fail() {
				r.log.Warn().Err(err).Msg("cannot tell the register what this reaper does; tries again each 5 s")
			}
		} else if _, say := outage.End(); say {
			r.log.Info().Msg("the register knows again what this reaper does")
		}
		wait.Reset(registrar.Shorten(registrar.ReportInterval))
	}
}

// untell drops the entry of a reaper that ends in order.
func (r *Reaper) untell(ctx context.Context) {
	ctx, cancel := registrar.WithTimeout(context.WithoutCancel(ctx))
	defer cancel()
	if err := r.store.Report(ctx, r.cfg.ID, nil); err != nil {
		r.log.Warn().Err(err).Msg("cannot take this reaper's entry out of the register; it is dropped after 10 min")
	}
}

// tellNews has tell write the status now. The caller holds r.mu.
func (r *Reaper) tellNews() {
	select {
	case r.news <- struct{}{}:
	default: // it will be written anyway
	}
}
