package registrar

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
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
