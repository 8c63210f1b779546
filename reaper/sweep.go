package reaper

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"rollcall/registrar"
)

// Removal is one service's part of a sweep.
type Removal struct {
	Service registrar.Service
	Addrs   []string
}

// Report is what a sweep found and did. Stale counts who would go if nothing
// held them; it is 0 when not armed.
type Report struct {
	Armed                    bool
	Members, Stale, Suspects int64
	Removed                  []Removal
	Held                     []registrar.Hold

	surveyed bool
	waits    bool  // somebody stale is still there
	oldest   int64 // score of who is not stale, unix ms; the highest number if there is nobody
}

// Sweep takes out, with the last pulse as its licence, who is silent for a TTL
// of proven health, and pulls scores from the future back. Not armed, it only
// looks. It returns what it did with the error that ended it or, joined, the
// errors of single services.
func (r *Reaper) Sweep(ctx context.Context) (Report, error) {
	if err := r.ready(ctx); err != nil {
		return Report{Armed: r.armed, oldest: math.MaxInt64}, fmt.Errorf("sweep: %w", err)
	}
	cutoff, armed := r.proof.cutoff()
	return r.sweep(ctx, cutoff, armed, false)
}

// ready tells whether a sweep may follow the last pulse. Beats follow the
// registry's times, and so must the reaper: with an older, shorter TTL it would
// take out the living. So it must before the cut-off is known, too: new times may
// be such that not everybody can know them yet.
func (r *Reaper) ready(ctx context.Context) error {
	if !r.proof.ok {
		return errNoPulse
	}
	return r.config(ctx, false, false)
}

// sweep is Sweep with a given cut-off. force does not feed the protection, so
// that nothing begins to be held.
func (r *Reaper) sweep(ctx context.Context, cutoff int64, armed, force bool) (Report, error) {
	report := Report{Armed: armed, oldest: math.MaxInt64}
	counts, broken, err := r.survey(ctx, cutoff)
	if err != nil {
		return report, fmt.Errorf("sweep: %w", err)
	}
	now, resets := r.elapsed(), r.proof.resets
	if !force {
		report.Held = r.judge(now, counts)
	}
	report.surveyed = true
	for _, c := range counts {
		report.Members += max(c.Members, 0)
		report.Stale += c.Stale
		report.Suspects += c.Suspects
		report.waits = report.waits || c.Stale+c.Garbage > 0
		if c.Stale+c.Garbage == 0 && c.Oldest > 0 {
			report.oldest = min(report.oldest, c.Oldest)
		}
	}
	if err := r.endOverrides(ctx, counts); err != nil {
		broken = append(broken, err)
	}
	if !armed {
		return report, errors.Join(broken...)
	}
	if report.waits {
		if err := r.look(ctx); err != nil {
			return report, fmt.Errorf("sweep: %w", errors.Join(append(broken, err)...))
		}
	}
	for _, c := range counts {
		if c.Stale+c.Garbage == 0 && c.Future == 0 {
			continue
		}
		w := registrar.Sweep{Cutoff: cutoff}
		if r.protection.held(c.Service) {
			if c.Future == 0 {
				continue // what is replaced is looked for below
			}
			w.Cutoff = 0 // nobody: only the scores from the future
		}
		addrs, err := r.reap(ctx, c.Service, w, resets)
		r.removed(&report, c, addrs)
		switch {
		case errors.Is(err, registrar.ErrBroken):
			broken = append(broken, err)
		case err != nil:
			return report, fmt.Errorf("sweep: %w", errors.Join(append(broken, err)...))
		}
	}
	if err := r.replace(ctx, &report, counts, cutoff, resets); err != nil {
		broken = append(broken, err)
	}
	whole, err := r.tidy(ctx, counts)
	if err != nil {
		broken = append(broken, fmt.Errorf("sweep: %w", err))
	}
	report.waits = report.waits || !whole
	for _, c := range r.protection.release(now, counts) {
		addrs, err := r.reap(ctx, c.Service, registrar.Sweep{Cutoff: cutoff, LetGo: LetGoEvery}, resets)
		if errors.Is(err, registrar.ErrLastLeft) {
			continue // another service's may go
		}
		r.removed(&report, c, addrs)
		broken = append(broken, err)
		break
	}
	return report, errors.Join(broken...)
}

// look looks up the name of the registry before anybody is taken out: on a server that
// it no longer names, everybody falls silent.
func (r *Reaper) look(ctx context.Context) error {
	tctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	moves, err := r.store.Look(tctx)
	switch {
	case err != nil:
		return fmt.Errorf("nobody is taken out: %w", err)
	case moves != r.moves:
		return errMoved
	}
	return nil
}

// removed notes that addrs of c's service went, the oldest among them.
func (r *Reaper) removed(report *Report, c registrar.Count, addrs []string) {
	if len(addrs) == 0 {
		return
	}
	report.Removed = append(report.Removed, Removal{c.Service, addrs})
	if r.cfg.Removed != nil {
		silent := ms(r.proof.now-c.Oldest) + r.elapsed() - r.proof.recv
		r.cfg.Removed(len(addrs), silent-r.cfg.TTL)
	}
}

// survey counts every service. Names and keys that are none are errors of
// their own, which do not keep the others from being swept.
func (r *Reaper) survey(ctx context.Context, cutoff int64) (counts []registrar.Count, broken []error, err error) {
	svcs, garbage, err := r.services(ctx)
	switch {
	case errors.Is(err, registrar.ErrManyServices):
		broken = append(broken, fmt.Errorf("%w: %w", registrar.ErrBroken, err))
	case err != nil:
		return nil, nil, err
	}
	for part := range slices.Chunk(svcs, surveyChunk) {
		// Beats go on between the pulse and the survey, so only a score that the
		// pulse's age cannot explain is from the future.
		tctx, cancel := registrar.WithTimeout(ctx)
		some, err := r.store.Survey(tctx, part, r.proof.now+r.proof.maxAge().Milliseconds(), cutoff, r.proof.suspect())
		cancel()
		if err != nil {
			return nil, nil, err
		}
		counts = append(counts, some...)
	}
	r.seen = make(map[registrar.Service]bool, len(r.seen))
	for _, c := range counts {
		if c.Mistyped || c.Members > 0 || c.Oldest > 0 {
			r.seen[c.Service] = true
		}
	}
	for _, g := range garbage[:min(len(garbage), shownErrors)] {
		broken = append(broken, fmt.Errorf("%q is no service's name: %w", g, registrar.ErrBroken))
	}
	for _, c := range counts {
		if c.Mistyped && len(broken) < 2*shownErrors {
			broken = append(broken, fmt.Errorf("%s: its instances are no sorted set: %w", c.Service, registrar.ErrBroken))
		}
	}
	return counts, broken, nil
}

// services lists what to survey: what the register names, and what has had members
// since then, though somebody may have taken the name off.
func (r *Reaper) services(ctx context.Context) (svcs []registrar.Service, garbage []string, err error) {
	tctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	svcs, garbage, err = r.store.Services(tctx)
	for svc := range r.seen {
		svcs = append(svcs, svc)
	}
	slices.Sort(svcs)
	slices.Sort(garbage)
	return slices.Compact(svcs), garbage, err
}

// tidy tells the register how many services have instances, and takes the names of
// the others off the list: as many as it can within half a pulse's period.
func (r *Reaper) tidy(ctx context.Context, counts []registrar.Count) (whole bool, err error) {
	if r.store.Cluster() {
		return true, nil
	}
	var empty []registrar.Service
	for _, c := range counts {
		if !r.seen[c.Service] {
			empty = append(empty, c.Service)
		}
	}
	if n := len(counts) - len(empty); n != r.census {
		tctx, cancel := registrar.WithTimeout(ctx)
		defer cancel()
		if err := r.store.Census(tctx, n); err != nil {
			return true, err
		}
		r.census = n
	}
	begun := r.elapsed()
	for part := range slices.Chunk(empty, unlistChunk) {
		if r.elapsed()-begun > r.proof.period/2 {
			return false, nil
		}
		tctx, cancel := registrar.WithTimeout(ctx)
		err := r.store.Unlist(tctx, part...)
		cancel()
		if err != nil {
			return true, err
		}
	}
	return true, nil
}

// surveyChunk is how many services are surveyed by one deadline, and unlistChunk how
// many names one call takes off the list.
const surveyChunk, unlistChunk = 1000, 250

// judge feeds the protection and says, in the log and to who asks for the
// status, what it holds and what no longer.
func (r *Reaper) judge(now time.Duration, counts []registrar.Count) []registrar.Hold {
	began, ended := r.protection.judge(now, counts)
	slices.Sort(began) // every service's comes first
	for _, svc := range began {
		h := r.protection.holds[svc]
		if h.said = r.voice.holds.May(); !h.said {
			continue // status has them all
		}
		r.log.Warn().Str("service", shown(svc)).Int64("suspects", h.suspects).Int64("members", h.members).Int("holds", len(r.protection.holds)).
			Str("rule", Rule(svc)).Dur("dry", r.protection.dry).Dur("let_go_after", LetGoAfter).Dur("let_go_every", LetGoEvery).
			Str("overrule", Overrule(r.cfg.TTL, r.cfg.Interval)).
			Msg("held: too many look dead at once, so nobody is taken out until they have been back for two heartbeats; after 5 min one goes each 10 s")
	}
	for svc, h := range ended {
		if !h.said {
			continue
		}
		r.log.Info().Str("service", shown(svc)).Int64("suspects", h.suspects).Int64("members", h.members).Dur("held", now-h.since).
			Msg("no longer held: for two heartbeats there were not too many who look dead; who still does is taken out")
	}
	held := make([]registrar.Hold, 0, len(r.protection.holds))
	for svc, h := range r.protection.holds {
		held = append(held, registrar.Hold{
			Service: svc, Suspects: h.suspects, Members: h.members,
			Since: r.redisTime(h.since), Until: r.redisTime(h.seen + r.protection.dry),
		})
	}
	slices.SortFunc(held, func(a, b registrar.Hold) int {
		return cmp.Or(cmp.Compare(a.Since, b.Since), cmp.Compare(a.Service, b.Service))
	})
	r.mu.Lock()
	defer r.mu.Unlock()
	r.status.Held = held
	if len(began) > 0 || len(ended) > 0 {
		r.tellNews()
	}
	return slices.Clone(held)
}

func shown(svc registrar.Service) string {
	if svc == everyService {
		return "(every)"
	}
	return string(svc)
}

// sumUp says what of the removals was not said singly, when its time has come or this
// is the last time.
func (v *voice) sumUp(last bool) {
	if sum := v.removals.Take(last); len(sum.Kinds) > 0 {
		v.log.Info().Int("count", sum.Total()).Object("counts", sum).Dur("over", sum.Over).
			Msg("took out many who stopped answering, summed up by service; debug has each")
	}
}

// reap takes out of one service, a call at a time until the limit is reached or
// nobody is left. A long sweep renews its licence on the way.
func (r *Reaper) reap(ctx context.Context, svc registrar.Service, w registrar.Sweep, resets int) (addrs []string, err error) {
	for {
		if r.elapsed()-r.proof.recv > r.proof.period {
			if err := r.pulse(ctx); err != nil {
				return addrs, err
			}
			if r.proof.resets != resets {
				return addrs, fmt.Errorf("reap %s: the proof was lost on the way: %s", svc, r.cause)
			}
		}
		if !r.proof.ok {
			return addrs, errNoPulse
		}
		w.ID, w.Token, w.ReplID, w.Last, w.MaxAge = r.cfg.ID, r.proof.mine, r.proof.replid, r.proof.now, r.proof.maxAge()
		tctx, cancel := registrar.WithTimeout(ctx)
		out, err := r.store.Reap(tctx, svc, w)
		cancel()
		switch {
		case errors.Is(err, registrar.ErrBroken), errors.Is(err, registrar.ErrLastLeft):
			return addrs, err
		case err != nil:
			f := r.proof.soft(causeReap, err)
			if ctx.Err() == nil {
				r.note(f)
			}
			return addrs, err
		}
		if n := len(out.Addrs); n > 0 {
			l := r.log.Debug()
			if r.voice.removals.May(string(svc), n) {
				l = r.log.Info()
			}
			l = l.Str("service", string(svc)).Int64("version", out.Version).Int("count", n).
				Strs("addrs", out.Addrs[:min(n, shownAddrs)]).Int64("left", out.Left)
			if len(w.Replaced) > 0 {
				l.Msg("took out, though held, instances at whose addresses another service beats")
			} else {
				l.Msg("took out who stopped answering")
			}
		}
		addrs = append(addrs, out.Addrs...)
		if !out.Unsaid.At.IsZero() {
			r.unsaid = out.Unsaid
		}
		if out.Left == 0 || len(out.Addrs) == 0 || w.LetGo > 0 || len(w.Replaced) > 0 {
			return addrs, nil
		}
	}
}
