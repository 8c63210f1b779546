//go:build !sidecar

package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"rollcall/registrar"
)

const (
	// lasting is how long what may pass by itself, a start or a deployment, must last to
	// be a problem.
	lasting = 10 * time.Second
	// mostServices is how many services status lists; of more it lists those that do not
	// serve in full.
	mostServices = 50
)

// serving says in doc how the services of rows, those on the list, are served, and what
// is wrong with that.
func (s *session) serving(ctx context.Context, doc *statusDoc, rows []serviceRow) error {
	followers, err := s.settled(ctx, rows)
	if err != nil {
		return err
	}
	if r := doc.Registry; len(rows) == 0 && r.Version == 0 && r.Epoch == "" { // nobody has ever written here
		if hint := s.elsewhere(ctx); hint != "" {
			doc.problem("%s", hint)
		}
	}
	if r := doc.Registry; r.Stale > 0 && !slices.ContainsFunc(doc.Reapers, func(r reaperRow) bool { return r.Live && r.Armed }) {
		doc.problem("%d of %d instances silent for longer than the TTL, and still registered", r.Stale, r.Instances)
	}
	doc.Serving = append(doc.Serving, rows...)
	listed := map[registrar.Service]bool{}
	var unfollowed []string
	for _, r := range rows {
		listed[r.Service] = true
		if r.Instances > 0 && r.Balancers == 0 {
			unfollowed = append(unfollowed, string(r.Service))
		}
	}
	if len(unfollowed) > 0 {
		doc.problem("no live balancer follows %s: run rollcall lbsync --backend SERVICE=BACKEND beside HAProxy", few(unfollowed))
	}
	var others []registrar.Service // followed, and not on the list
	for _, f := range followers {
		others = slices.AppendSeq(others, maps.Keys(f.Follows))
	}
	slices.Sort(others)
	others = slices.DeleteFunc(slices.Compact(others), func(svc registrar.Service) bool { return listed[svc] })
	if err := s.unlisted(ctx, doc, others, listed, followers); err != nil {
		return err
	}
	for _, r := range rows {
		doc.standing(r)
		if !slices.ContainsFunc(r.Backends, func(b registrar.BackendStanding) bool { return b.Not[registrar.ReasonExcluded].Count == 0 }) && r.Balancers > 0 {
			// Each refuses somebody: perhaps all refuse the same one.
			v, err := s.store.Served(ctx, r.Service)
			if err != nil {
				return err
			}
			var refused []string
			for _, e := range v.Entries {
				if by := v.By(e.Addr); e.Present && by.Of == 0 && len(by.Not) > 0 && v.Now-by.Not[0].Since > lasting.Milliseconds() {
					refused = append(refused, fmt.Sprintf("%s (%s)", e.Addr, by.Not[0].Why))
				}
			}
			if len(refused) > 0 {
				doc.problem("%s: every balancer refuses %s; see lbsync --allow", r.Service, few(refused))
			}
		}
	}
	return nil
}

// settled is stand, after the moment that a balancer that has just begun to follow a
// service takes to say what it has of the instances.
func (s *session) settled(ctx context.Context, rows []serviceRow) ([]registrar.Following, error) {
	end := time.After(settle)
	for {
		followers, err := s.stand(ctx, rows)
		if err != nil || !slices.ContainsFunc(rows, func(r serviceRow) bool { return r.Instances > 0 && len(r.unsaid) > 0 }) {
			return followers, err
		}
		select {
		case <-ctx.Done():
			return followers, nil
		case <-end:
			return followers, nil
		case <-time.After(settle / 10):
		}
	}
}

// unlisted says what is wrong with services that balancers follow and that are not on the
// list.
func (s *session) unlisted(ctx context.Context, doc *statusDoc, svcs []registrar.Service, listed map[registrar.Service]bool, followers []registrar.Following) error {
	if len(svcs) == 0 {
		return nil
	}
	v, err := s.store.Versions(ctx, svcs)
	if err != nil {
		return err
	}
	rows := make([]serviceRow, len(svcs))
	for i, svc := range svcs {
		rows[i].Service = svc
	}
	if _, err := s.stand(ctx, rows); err != nil {
		return err
	}
	names := make([]string, 0, len(listed))
	for svc := range listed {
		names = append(names, string(svc))
	}
	for _, r := range rows {
		by := ""
		for _, f := range followers {
			if backends := f.Follows[r.Service]; len(backends) > 0 {
				by = cmp.Or(by, f.Balancer+" with backend "+backends[0])
			}
		}
		registered := slices.ContainsFunc(r.Backends, func(b registrar.BackendStanding) bool { return b.Registered > 0 })
		switch {
		case v.Of[r.Service] == 0:
			doc.problem("nobody has ever registered as %s, which is followed by %s%s", r.Service, by, didYouMean(string(r.Service), names))
		case registered:
			doc.problem("%s has instances and is not on the list of services, so no reaper looks at it", r.Service)
		default:
			doc.Notes = append(doc.Notes, fmt.Sprintf("%s, followed by %s, has no instance", r.Service, by))
		}
	}
	return nil
}

// standing says what is wrong with one service that is on the list.
func (d *statusDoc) standing(r serviceRow) {
	for _, b := range r.Backends {
		where := fmt.Sprintf("%s at %s/%s", r.Service, b.Balancer, b.Backend)
		switch {
		case r.Instances > 0 && r.unsaid[b.Balancer]:
			d.problem("%s: it says nothing of the %d instances; its log says why, and rollcall doctor --socket PATH --backend %s=%s beside it", where, r.Instances, r.Service, b.Backend)
			continue
		case r.Instances > 0 && b.Registered == 0: // it knows none of them yet, or none that it can believe
			d.Notes = append(d.Notes, where+": it has said nothing of the instances yet")
			continue
		}
		var worst *registrar.Example // the one that has not served for longest
		worstReason := ""
		for _, reason := range slices.Sorted(maps.Keys(b.Not)) {
			e := b.Not[reason]
			line := fmt.Sprintf("%s: %d of %d instances do not serve, %s: %s", where, e.Count, b.Registered, reason, e.Addr)
			if e.Why != "" {
				line += " (" + e.Why + ")"
			}
			lasts := e.Since > 0 && d.Now-e.Since > lasting.Milliseconds()
			if worst == nil || e.Since < worst.Since {
				worst, worstReason = &e, reason
			}
			switch reason {
			case registrar.NoteRefused, registrar.NoteUnplaced, registrar.NoteUndone, registrar.ReasonPending:
				if lasts {
					d.problem("%s", line)
					continue
				}
			case registrar.ReasonExcluded:
				continue // it may be served by another, as its operator wants it
			}
			d.Notes = append(d.Notes, line)
		}
		if b.Serving == 0 && worst != nil && worst.Since > 0 && d.Now-worst.Since > lasting.Milliseconds() && b.Not[registrar.ReasonExcluded].Count < b.Registered {
			line := fmt.Sprintf("%s: none of %d instances serves, %s: %s", where, b.Registered, worstReason, worst.Addr)
			if worst.Why != "" {
				line += " (" + worst.Why + ")"
			}
			d.problem("%s", line)
		}
	}
}

func (d *statusDoc) problem(format string, args ...any) {
	d.Problems = append(d.Problems, fmt.Sprintf(format, args...))
}
