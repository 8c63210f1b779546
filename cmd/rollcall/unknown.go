//go:build !sidecar

package main

import (
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

// unknown says that nobody has ever registered as svc, with the nearest service there is.
func (s *session) unknown(ctx context.Context, svc registrar.Service) error {
	return fmt.Errorf("nobody has ever registered as %s%s", svc, didYouMean(string(svc), s.names(ctx, svc)))
}

// absent is err of an override of addr, which nobody has, with the nearest one that
// somebody has.
func (s *session) absent(ctx context.Context, svc registrar.Service, addr netip.AddrPort, err error) error {
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
	return fmt.Errorf("%w; see rollcall instances %s, or say --absent for who is to come", err, svc)
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
