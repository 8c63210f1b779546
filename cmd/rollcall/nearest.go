//go:build !sidecar

package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"rollcall/registrar"
)

// nearest returns the name that is meant by one that nobody knows: of those within a
// third of its length the nearest, else "".
func nearest(name string, known []string) string {
	best, found := max(1, len(name)/3)+1, ""
	for _, k := range known {
		if d := distance(name, k); d < best || d == best && found != "" && k < found {
			best, found = d, k
		}
	}
	return found
}

// distance is how many bytes must be put in, taken out, changed or swapped with the next
// to make b of a (optimal string alignment).
func distance(a, b string) int {
	var before []int
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		next := make([]int, len(b)+1)
		next[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			next[j+1] = min(row[j+1]+1, next[j]+1, row[j]+cost)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				next[j+1] = min(next[j+1], before[j-1]+1)
			}
		}
		before, row = row, next
	}
	return row[len(b)]
}

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
