//go:build !sidecar

package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"rollcall/registrar"
)

// didYouMean is ", did you mean …?" or nothing.
func didYouMean(name string, known []string) string {
	if n := nearest(name, known); n != "" {
		return fmt.Sprintf("; did you mean %s?", n)
	}
	return ""
}

// unknown says that nobody has ever registered as svc, with the nearest service there is,
// or with the registry that may be meant if this one has no service at all.
func (s *session) unknown(ctx context.Context, svc registrar.Service) error {
	return fmt.Errorf("nobody has ever registered as %s%s", svc, s.meant(ctx, svc))
}

// meant is what may be meant in the place of svc, "; …"; empty if nothing is near.
func (s *session) meant(ctx context.Context, svc registrar.Service) string {
	names := s.names(ctx, svc)
	if len(names) > 0 {
		return didYouMean(string(svc), names)
	}
	return "; " + cmp.Or(s.elsewhere(ctx), "this registry is empty: run rollcall register, or name another one with --redis and --namespace")
}

// elsewhere says, of a registry that is empty, which others this Redis has; empty if there
// are none or if that cannot be told, within Timeout.
func (s *session) elsewhere(ctx context.Context) string {
	ctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	all, _ := s.others(ctx) // a hint is not worth an error, and some are better than none
	if len(all) == 0 {
		return ""
	}
	var where []string
	for _, r := range all {
		where = append(where, fmt.Sprintf("--redis %s --namespace %s has %s", r.URL, r.Namespace, plural(int(r.Services), "service")))
	}
	return "this registry is empty, but " + few(where)
}

// nameElsewhere warns that this registry is empty, if this Redis has others.
func (s *session) nameElsewhere(ctx context.Context) {
	if hint := s.elsewhere(ctx); hint != "" {
		s.log.Warn().Msg(hint)
	}
}

// absent is err of an override of addr, which nobody has, or of the registration there,
// with the nearest one that somebody has.
func (s *session) absent(ctx context.Context, svc registrar.Service, addr netip.AddrPort, scope registrar.Scope, err error) error {
	ctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	snap, rerr := s.store.Read(ctx, svc, nil)
	if rerr != nil {
		return err
	}
	if snap.Token.Version == 0 {
		return fmt.Errorf("%w; %w", err, s.unknown(ctx, svc))
	}
	var known []string
	for _, e := range snap.Entries {
		if e.Present {
			known = append(known, e.Addr.String())
		}
	}
	if n := didYouMean(addr.String(), known); n != "" {
		return fmt.Errorf("%w%s", err, n)
	}
	if scope == registrar.ScopeRegistration {
		return fmt.Errorf("%w, so there is no registration; see rollcall instances %s", err, svc)
	}
	return fmt.Errorf("%w; see rollcall instances %s, or say --absent for who is to come", err, svc)
}

// never tells whether nobody has ever registered as svc, if that can be told.
func (s *session) never(ctx context.Context, svc registrar.Service) bool {
	ctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	v, err := s.store.Versions(ctx, []registrar.Service{svc})
	return err == nil && v.Of[svc] == 0
}

// nameUnknown warns of services that nobody has ever registered as.
func (s *session) nameUnknown(ctx context.Context, svcs ...registrar.Service) {
	if len(svcs) == 0 {
		return
	}
	ctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	v, err := s.store.Versions(ctx, svcs)
	if err != nil {
		return // what follows says it
	}
	for _, svc := range svcs {
		if v.Of[svc] == 0 {
			s.log.Warn().Msg(s.unknown(ctx, svc).Error())
		}
	}
}

// names is the services that somebody has registered as or follows, but for svc; fewer if
// they cannot be read.
func (s *session) names(ctx context.Context, svc registrar.Service) (names []string) {
	svcs, _, _ := s.store.Services(ctx) // a hint is not worth an error
	followers, _ := s.store.Followers(ctx)
	for _, f := range followers {
		svcs = slices.AppendSeq(svcs, maps.Keys(f.Follows))
	}
	for _, n := range svcs {
		if n != svc && !strings.HasPrefix(string(n), "_") {
			names = append(names, string(n))
		}
	}
	return names
}
