package reaper

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"rollcall/registrar"
)

const (
	// overridesEvery is how late an override may end after its time.
	overridesEvery = 10 * time.Second
	// overridesAtOnce is how many are looked at in that time at most: each every 5 min, so
	// 30,000 of a register are looked at in time.
	overridesAtOnce = 1000
	// adoptEvery is the least time between two looks for overrides that somebody wrote by
	// hand, and adoptAtOnce how many services are looked through with one look at what is
	// due.
	adoptEvery  = 5 * time.Minute
	adoptAtOnce = 250
)

// overrides is when the next look at operators' overrides is due.
type overrides struct {
	at      time.Duration // of what is due; on the reaper's clock
	adoptAt time.Duration // of the list that is looked through for what is not known
	adopt   []registrar.Service
	refused bool // that this reaper's user may not was said
}

// endOverrides ends the overrides whose time is over, and those of addresses that nobody
// has had for long. That takes nobody out, so it needs no proof that beats were possible.
// A user without the right to that reaps all the same, and it is said once.
func (r *Reaper) endOverrides(ctx context.Context, counts []registrar.Count) error {
	if r.elapsed() < r.overrides.at {
		return nil
	}
	err := r.lookAtOverrides(ctx, counts)
	if !registrar.Forbidden(err) {
		r.overrides.refused = false
		return err
	}
	if !r.overrides.refused {
		r.log.Warn().Err(err).Msg("operators' overrides do not end by this reaper")
	}
	r.overrides.refused = true
	return nil
}

func (r *Reaper) lookAtOverrides(ctx context.Context, counts []registrar.Count) error {
	now := r.elapsed()
	r.overrides.at = now + registrar.Shorten(overridesEvery)
	if now >= r.overrides.adoptAt && len(r.overrides.adopt) == 0 {
		r.overrides.adoptAt = now + registrar.Shorten(adoptEvery)
		for _, c := range counts {
			r.overrides.adopt = append(r.overrides.adopt, c.Service)
		}
	}
	redisNow := r.redisTime(now)
	tctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	if part := r.overrides.adopt[:min(len(r.overrides.adopt), adoptAtOnce)]; len(part) > 0 {
		if err := r.store.AdoptOverrides(tctx, redisNow, part...); err != nil {
			return fmt.Errorf("sweep: %w", err)
		}
		r.overrides.adopt = r.overrides.adopt[len(part):]
	}
	due, err := r.store.DueOverrides(tctx, redisNow, overridesAtOnce)
	if err != nil {
		return fmt.Errorf("sweep: %w", err)
	}
	var broken []error
	for _, svc := range slices.Sorted(maps.Keys(due)) {
		ended, unsaid, err := r.store.EndOverrides(tctx, svc, r.cfg.ID, due[svc])
		if !unsaid.At.IsZero() {
			r.unsaid = unsaid
		}
		for _, e := range ended[:min(len(ended), shownAddrs)] {
			r.log.Info().Str("service", string(svc)).Str("addr", e.Addr).Int("of", len(ended)).Str("why", e.Why).Msg("override ended")
		}
		if err != nil {
			broken = append(broken, fmt.Errorf("sweep: %w", err))
			if !errors.Is(err, registrar.ErrBroken) {
				break // Redis does not answer: there is no use in the others
			}
		}
	}
	return errors.Join(broken...)
}
