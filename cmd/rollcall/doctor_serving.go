//go:build !sidecar

package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"rollcall/lbsync"
	"rollcall/registrar"
)

// notServingFix is what to do about an instance that a HAProxy sends no requests, by the
// reason. Of all others explain says more.
var notServingFix = map[string]string{
	registrar.ReasonExcluded: "start that lbsync with the instance's network too: --allow; if it is another HAProxy's to serve, nothing",
	registrar.ReasonDown:     "look at the app, and at the check of its backend in haproxy.cfg",
	registrar.NoteUnplaced:   "a larger range in the backend's server-template, and a reload",
	registrar.NoteHuman:      "set server BACKEND/NAME state ready, on HAProxy's socket",
	registrar.ReasonMaint:    "rollcall ready SERVICE ADDR, when it is done",
	registrar.ReasonDrain:    "rollcall ready SERVICE ADDR, when it is done",
}

// seenWithin is how long lbsync may take to see, and to say, what HAProxy changes by itself:
// a server's first check, say.
const seenWithin = 3 * time.Second

// serving judges whether the live balancers that follow services send requests to the
// instances that are registered, as these balancers said last, and whether they follow
// services that nobody has registered as. With --backend only its services count.
func (d *doctor) serving(ctx context.Context, known []registrar.Service) {
	svcs := slices.Sorted(slices.Values(known))
	if len(d.backends) > 0 {
		svcs = slices.DeleteFunc(svcs, func(svc registrar.Service) bool {
			return !slices.ContainsFunc(d.backends, func(b lbsync.BackendConfig) bool { return b.Service == svc })
		})
	}
	for end := time.Now().Add(seenWithin); ; {
		found, err := d.servings(ctx, known, svcs)
		well := !slices.ContainsFunc(found, func(f finding) bool { return f.State != stateOK })
		switch {
		case err != nil:
			d.unknown("serving", err, "allow EVAL_RO, GET and HGET to the user of --redis")
			return
		case well || ctx.Err() != nil || time.Now().After(end):
			d.findings = append(d.findings, found...)
			return
		}
		again := time.NewTimer(seenWithin / 10)
		select {
		case <-ctx.Done():
		case <-again.C:
		}
		again.Stop()
	}
}

// servings are the findings of serving, as things stand now.
func (d *doctor) servings(ctx context.Context, known, svcs []registrar.Service) ([]finding, error) {
	ctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	followers, err := d.store.Followers(ctx)
	if err != nil {
		return nil, err
	}
	standings, err := d.store.Standings(ctx, svcs, followers)
	if err != nil {
		return nil, err
	}
	now := doctor{store: d.store, sizes: d.sizes}
	if err := now.neverSeen(ctx, known, followers); err != nil {
		return nil, err
	}
	for _, svc := range svcs {
		now.standing(svc, standings[svc], followers)
	}
	return now.findings, nil
}

// standing judges one service. An instance that is drained or has no weight is as an
// operator wants it, as long as others of the backend serve.
func (d *doctor) standing(svc registrar.Service, backends []registrar.BackendStanding, followers []registrar.Following) {
	check := "serving of " + string(svc)
	var seen []string
	bad, repair := false, ""
	for _, f := range followers {
		for _, backend := range f.Follows[svc] {
			says := func(b registrar.BackendStanding) bool { return b.Balancer == f.Balancer && b.Backend == backend }
			if d.sizes[svc] > 0 && !slices.ContainsFunc(backends, says) {
				seen = append(seen, fmt.Sprintf("%s/%s says nothing of its instances", f.Balancer, backend))
				repair = "look at that lbsync's log, and run doctor on its host with its --socket and --backend"
			}
		}
	}
	for _, b := range backends {
		for _, reason := range slices.Sorted(maps.Keys(b.Not)) {
			e := b.Not[reason]
			switch reason {
			case registrar.ReasonMaint, registrar.ReasonDrain, registrar.ReasonWeight, registrar.NoteLeaving:
				if b.Serving > 0 {
					continue
				}
			}
			line := fmt.Sprintf("%s/%s serves %d of %d; %s: %s", b.Balancer, b.Backend, b.Serving, b.Registered, reason, e.Addr)
			if e.Why != "" {
				line += " (" + e.Why + ")"
			}
			seen = append(seen, line)
			if b.Serving == 0 {
				bad = true
			}
			if repair == "" {
				if repair = notServingFix[reason]; repair == "" {
					repair = fmt.Sprintf("rollcall explain %s %s says more", svc, e.Addr)
				}
			}
		}
	}
	switch {
	case len(seen) == 0 && len(backends) == 0: // the balancers' line says it
	case len(seen) == 0:
		d.add(check, stateOK, "", "", "%d backends send requests to all that are to get some", len(backends))
	default:
		why := "these instances get no requests there"
		if bad {
			why = "of a backend that serves nobody every request fails"
		}
		d.add(check, worst(bad, true), why, repair, "%s", few(seen))
	}
}

// neverSeen names the services that balancers follow and that nobody has ever registered
// as: a --backend with a mistyped name looks so.
func (d *doctor) neverSeen(ctx context.Context, known []registrar.Service, followers []registrar.Following) error {
	by := map[registrar.Service]string{}
	for _, f := range followers {
		for svc, backends := range f.Follows {
			if len(backends) > 0 && !slices.Contains(known, svc) {
				by[svc] = f.Balancer + " with backend " + backends[0]
			}
		}
	}
	svcs := slices.Sorted(maps.Keys(by))
	if len(svcs) == 0 {
		return nil
	}
	v, err := d.store.Versions(ctx, svcs)
	if err != nil {
		return err
	}
	var names []string
	for _, svc := range known {
		names = append(names, string(svc))
	}
	for _, svc := range svcs {
		if v.Of[svc] == 0 {
			fix := "start its instances, or name the service that is meant in that lbsync's --backend" + didYouMean(string(svc), names)
			d.add("serving of "+string(svc), stateWarn, "that backend gets no instance", strings.TrimSpace(fix), "nobody has ever registered as %s, which is followed by %s", svc, by[svc])
		}
	}
	return nil
}
