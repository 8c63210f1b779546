package registrar

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/redis/go-redis/v9"
)

// Follow says that the balancer lives and follows these services, each in these
// backends; nil says that it ends. It is to be said again each AckInterval.
func (a *Acker) Follow(ctx context.Context, follows map[Service][]string) error {
	s, value := a.store, ""
	if follows != nil {
		b, err := json.Marshal(follows)
		if err != nil {
			return fmt.Errorf("say what balancer %s follows: %w", a.id, err)
		}
		value = string(b)
	}
	if err := s.follows.Run(ctx, s.rdb, []string{s.keys.Follows()}, a.id, value, balancerForget.Milliseconds(), s.now).Err(); err != nil {
		return fmt.Errorf("say what balancer %s follows: %w", a.id, err)
	}
	return nil
}

// Following is a live balancer and what it follows.
type Following struct {
	Balancer string
	Follows  map[Service][]string
}

// Followers returns the live ones, by id. What cannot be read is left out.
func (s *Store) Followers(ctx context.Context) ([]Following, error) {
	r, err := s.followers.RunRO(ctx, s.rdb, []string{s.keys.Follows()}, s.now).Slice()
	if err == nil && len(r)%2 != 1 {
		err = fmt.Errorf("answer of %d parts", len(r))
	}
	if err != nil {
		return nil, fmt.Errorf("read which services balancers follow: %w", err)
	}
	var list []Following
	for i := 1; i < len(r); i += 2 {
		f := Following{Balancer: text(r[i])}
		at, names, _ := strings.Cut(text(r[i+1]), " ")
		ms, err := strconv.ParseInt(at, 10, 64)
		if err != nil || !(Acks{Now: integer(r[0])}).live(ms) || json.Unmarshal([]byte(names), &f.Follows) != nil {
			continue
		}
		list = append(list, f)
	}
	slices.SortFunc(list, func(x, y Following) int { return cmp.Compare(x.Balancer, y.Balancer) })
	return list, nil
}

// BackendStanding is how the instances of a service stand in one backend of a live
// balancer.
type BackendStanding struct {
	Balancer string `json:"balancer"`
	Backend  string `json:"backend"`
	Standing
}

// Standings returns how svcs stand in the backends of the balancers that follow them, as
// these said last: for each service its backends, by balancer and backend.
func (s *Store) Standings(ctx context.Context, svcs []Service, followers []Following) (map[Service][]BackendStanding, error) {
	type asked struct {
		svc      Service
		balancer string
		counts   *redis.StringCmd
	}
	var all []asked
	_, err := s.rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
		for _, svc := range svcs {
			for _, f := range followers {
				if len(f.Follows[svc]) > 0 {
					all = append(all, asked{svc, f.Balancer, p.HGet(ctx, s.keys.Of(svc).Seen(svc, f.Balancer), "counts")})
				}
			}
		}
		return nil
	})
	if err != nil && !errors.Is(err, redis.Nil) {
		return nil, fmt.Errorf("read how services stand in balancers: %w", err)
	}
	standings := map[Service][]BackendStanding{}
	for _, a := range all {
		if err := a.counts.Err(); errors.Is(err, redis.Nil) {
			continue
		} else if err != nil {
			return nil, fmt.Errorf("read how %s stands in balancer %s: %w", a.svc, a.balancer, err)
		}
		var counts map[string]Standing
		if err := json.Unmarshal([]byte(a.counts.Val()), &counts); err != nil {
			continue // another has written there; the balancer says it anew
		}
		for _, backend := range slices.Sorted(maps.Keys(counts)) {
			standings[a.svc] = append(standings[a.svc], BackendStanding{a.balancer, backend, counts[backend]})
		}
	}
	return standings, nil
}
