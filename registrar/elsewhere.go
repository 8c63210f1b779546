package registrar

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"time"
)

// Elsewhere finds out in which other services than svc the addresses beat: an
// address has one listener, so that a registration of svc that has been silent for a
// TTL is not it. It returns one such service of each address that has some. A
// heartbeat counts if it is no older than half a TTL: more than the longest interval,
// and less than what two registrations of one host have when that host cannot reach
// Redis and the TTL of the first of them ends.
//
// within are the services to look in; nil is every one that is listed, in a Cluster
// too. It costs Redis a look-up for each address and service, so of many addresses it
// looks for the first ones alone; looked is how many. Of a Cluster with more than 256
// services it returns an error, since there each service is a call. It may be called
// concurrently.
func (s *Store) Elsewhere(ctx context.Context, svc Service, within []Service, addrs []netip.AddrPort, ttl time.Duration) (found map[netip.AddrPort]Service, looked int, err error) {
	found = map[netip.AddrPort]Service{}
	if len(addrs) == 0 {
		return found, 0, nil
	}
	if within == nil {
		whole := *s
		whole.keys.scope = ""
		if within, _, err = whole.Services(ctx); err != nil {
			return nil, 0, err
		}
	}
	if s.keys.cluster && len(within) > elsewhereCluster {
		return nil, 0, fmt.Errorf("look for %d addresses in %d services of a Cluster: no more than %d are looked in", len(addrs), len(within), elsewhereCluster)
	}
	addrs = addrs[:min(len(addrs), max(1, elsewhereMost/max(1, len(within))))]
	age := (ttl / 2).Milliseconds()
	argv := []any{age, s.now}
	for _, a := range addrs {
		argv = append(argv, a.String())
	}
	chunk := max(1, elsewhereCall/len(addrs))
	if s.keys.cluster {
		chunk = 1 // each has a slot of its own
	}
	for len(within) > 0 {
		part := within[:min(chunk, len(within))]
		within = within[len(part):]
		var keys []string
		var of []Service
		for _, other := range part {
			if other != svc {
				keys, of = append(keys, s.keys.Instances(other)), append(of, other)
			}
		}
		if len(keys) == 0 {
			continue
		}
		r, err := s.elsewhere.RunRO(ctx, s.rdb, keys, argv...).Slice()
		if err != nil {
			return nil, 0, fmt.Errorf("look for %d addresses in %d services: %w", len(addrs), len(keys), err)
		}
		for i := 0; i+1 < len(r); i += 2 {
			k := integer(r[i])
			a, err := netip.ParseAddrPort(text(r[i+1]))
			if err != nil || k < 1 || k > int64(len(of)) {
				return nil, 0, fmt.Errorf("look for %d addresses in %d services: answer %s", len(addrs), len(keys), strconv.Quote(text(r[i+1])))
			}
			if _, known := found[a]; !known {
				found[a] = of[k-1]
			}
		}
	}
	return found, len(addrs), nil
}

const (
	// elsewhereMost is the most look-ups, addresses times services, that one call of
	// Elsewhere has Redis do, and elsewhereCall the most of one call of the script: what
	// a look-up takes is printed by TestElsewhereIsBounded.
	elsewhereMost, elsewhereCall = 50_000, 1000
	// elsewhereCluster is the most services of a Cluster.
	elsewhereCluster = 256
)
