package registrar

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// Override is what operators have said of one address of a service, whether or not
// somebody has it, or of one registration there.
type Override struct {
	Admin
	Service Service
	Addr    netip.AddrPort
	Scope   Scope // ScopeAddress or ScopeRegistration
	// Present says that somebody has the address; with ScopeRegistration, that this
	// registration has.
	Present bool
	Garbage string // why what is stored cannot be read; all but Service, Addr and Scope is zero
}

// Orphan says that nobody has what it is of.
func (o Override) Orphan() bool { return !o.Present }

// Overrides reads all overrides of svc, by address, in calls of 1,000 entries: it holds
// Redis no longer than one. It returns at most ReadLimit, and an error if there are more.
func (s *Store) Overrides(ctx context.Context, svc Service) (all []Override, err error) {
	k := s.keys.Of(svc)
	for _, of := range []struct {
		scope Scope
		key   string
	}{{ScopeAddress, k.Admin(svc)}, {ScopeRegistration, k.Bound(svc)}} {
		for cursor := uint64(0); ; {
			part, next, err := s.rdb.HScan(ctx, of.key, cursor, "", scanCount).Result()
			if err != nil {
				return all, fmt.Errorf("read %s: %w", of.key, err)
			}
			found, err := s.present(ctx, svc, of.scope, part)
			if err != nil {
				return all, fmt.Errorf("read the overrides of %s: %w", svc, err)
			}
			all = append(all, found...)
			if len(all) > ReadLimit {
				return all[:ReadLimit], fmt.Errorf("%s has more than %d overrides; reapers end those of addresses that nobody has had for a week", svc, ReadLimit)
			}
			if cursor = next; cursor == 0 {
				break
			}
		}
	}
	slices.SortFunc(all, func(a, b Override) int {
		return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Scope, b.Scope))
	})
	// What is written while it is read may be there twice.
	return slices.CompactFunc(all, func(a, b Override) bool { return a.Addr == b.Addr && a.Scope == b.Scope }), nil
}

// Overridden returns the services that have overrides, also such as nobody has registered
// as, by the index that reapers use; of a Cluster, those on the list of services.
func (s *Store) Overridden(ctx context.Context) ([]Service, error) {
	if s.keys.cluster && s.keys.scope == "" {
		svcs, _, err := s.Services(ctx)
		return svcs, err
	}
	found := map[Service]bool{}
	key := s.keys.OverrideDue()
	for cursor := uint64(0); ; {
		part, next, err := s.rdb.ZScan(ctx, key, cursor, "", scanCount).Result()
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", key, err)
		}
		for i := 0; i < len(part); i += 2 {
			name, _, _ := strings.Cut(part[i], " ")
			if svc, err := ParseService(name); err == nil {
				found[svc] = true
			}
		}
		if cursor = next; cursor == 0 {
			return slices.Sorted(maps.Keys(found)), nil
		}
	}
}

// overdueAfter is how much later than it should be a reaper may look at an override:
// several sweeps.
const overdueAfter = time.Minute

// Overdue tells how many overrides no reaper has looked at in time. What was said for
// some time does not end then.
func (s *Store) Overdue(ctx context.Context, now int64) (int64, error) {
	key := s.keys.OverrideDue()
	n, err := s.rdb.ZCount(ctx, key, "-inf", strconv.FormatInt(now-overdueAfter.Milliseconds(), 10)).Result()
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", key, err)
	}
	return n, nil
}

// present parses pairs of an address and what is stored, and looks who is there.
func (s *Store) present(ctx context.Context, svc Service, scope Scope, pairs []string) (found []Override, err error) {
	var addrs []string
	for i := 0; i+1 < len(pairs); i += 2 {
		addr, err := ParseAddr(pairs[i])
		if err != nil {
			continue // it is no instance's, and never will be
		}
		o := Override{Service: svc, Addr: addr, Scope: scope}
		if o.Admin, err = parseAdmin(shortened(pairs[i+1])); err != nil {
			o.Admin, o.Garbage = Admin{}, err.Error()
		}
		found, addrs = append(found, o), append(addrs, pairs[i])
	}
	if len(addrs) == 0 {
		return nil, nil
	}
	k := s.keys.Of(svc)
	if scope == ScopeAddress {
		// go-redis' ZMScore does not tell a member that is not there from one of score 0.
		scores, err := s.rdb.Do(ctx, append([]any{"zmscore", k.Instances(svc)}, anys(addrs)...)...).Slice()
		if err == nil && len(scores) != len(found) {
			err = fmt.Errorf("%d scores of %d", len(scores), len(found))
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", k.Instances(svc), err)
		}
		for i := range found {
			found[i].Present = scores[i] != nil
		}
		return found, nil
	}
	metas, err := s.rdb.HMGet(ctx, k.Meta(svc), addrs...).Result()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", k.Meta(svc), err)
	}
	for i := range found {
		m, err := parseMeta(text(metas[i]))
		found[i].Present = err == nil && metas[i] != nil && m.ID != "" && m.ID == found[i].ID
	}
	return found, nil
}

func anys(texts []string) []any {
	out := make([]any, len(texts))
	for i, t := range texts {
		out[i] = t
	}
	return out
}

const (
	// OrphanFor is how long nobody must have had an address, or a registration must have
	// been away, before a reaper ends its override.
	OrphanFor = 7 * 24 * time.Hour
	// overrideLook is the longest time between two looks at an override. The notes of who
	// went stay for twice as long, so who came and went between two looks is seen.
	overrideLook = 5 * time.Minute
	// overrideCall bounds one call of overrides.lua.
	overrideCall = 100
)

// Ended is an override that a reaper has ended, and why, for people.
type Ended struct {
	Addr, Why string
}

// DueOverrides returns at most so many overrides that are to be looked at at now, unix
// ms by Redis' clock: what EndOverrides takes, by service.
func (s *Store) DueOverrides(ctx context.Context, now int64, most int) (map[Service][]string, error) {
	key := s.keys.OverrideDue()
	members, err := s.rdb.ZRangeByScore(ctx, key, &redis.ZRangeBy{Min: "-inf", Max: strconv.FormatInt(now, 10), Count: int64(most)}).Result()
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", key, ofService(err))
	}
	due := map[Service][]string{}
	for _, m := range members {
		name, of, _ := strings.Cut(m, " ")
		svc, err := ParseService(name)
		if _, _, ok := strings.Cut(of, " "); err != nil || !ok || s.keys.scope != "" && svc != s.keys.scope {
			if err := s.rdb.ZRem(ctx, key, m).Err(); err != nil {
				return nil, fmt.Errorf("take what is no override off %s: %w", key, err)
			}
			continue
		}
		due[svc] = append(due[svc], of)
	}
	return due, nil
}

// EndOverrides looks at overrides of svc that DueOverrides returned. It ends those whose
// time is over, and those of an address that nobody has had for OrphanFor, as a change,
// with an event by the reaper id, and returns them. The caller announces what is unsaid.
func (s *Store) EndOverrides(ctx context.Context, svc Service, id string, due []string) (ended []Ended, unsaid Unsaid, err error) {
	for part := range slices.Chunk(due, overrideCall) {
		mark := rand.Text()
		argv := []any{s.keys.Changes(), string(svc), s.now, mark, id, OrphanFor.Milliseconds(), overrideLook.Milliseconds()}
		r, err := s.overrides.Run(ctx, s.rdb, s.keys.change(svc, s.keys.overrides(svc)...), append(argv, anys(part)...)...).Slice()
		if err != nil {
			return ended, unsaid, fmt.Errorf("end overrides of %s: %w", svc, ofService(err))
		}
		r, u := withheld(r, svc, mark)
		if !u.At.IsZero() {
			unsaid = u
		}
		if len(r) < 2 {
			return ended, unsaid, fmt.Errorf("end overrides of %s: answer of %d parts", svc, len(r))
		}
		for i := 2; i+1 < len(r); i += 2 {
			ended = append(ended, Ended{Addr: text(r[i+1]), Why: text(r[i])})
		}
	}
	return ended, unsaid, nil
}

// AdoptOverrides has the overrides of svcs that somebody wrote by hand looked at too,
// from now on, unix ms by Redis' clock. Those that are known stay as they are. Of a Cluster
// svcs is one service.
func (s *Store) AdoptOverrides(ctx context.Context, now int64, svcs ...Service) error {
	keys, argv := []string{s.keys.OverrideDue()}, []any{now}
	for _, svc := range svcs {
		keys, argv = append(keys, s.keys.Admin(svc), s.keys.Bound(svc)), append(argv, string(svc))
	}
	if err := s.adopt.Run(ctx, s.rdb, keys, argv...).Err(); err != nil {
		return fmt.Errorf("adopt the overrides of %d services: %w", len(svcs), ofService(err))
	}
	return nil
}
