package registrar

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// ErrHopeless says that waiting cannot bring what is waited for: every balancer refuses
// instances that it needs.
var ErrHopeless = errors.New("waiting cannot mend it")

// Served is what a service has registered, and what its balancers do with it. It is read
// in three steps, so a change between two may be in one part only.
type Served struct {
	Snapshot
	Acks Acks
	// Sights is what each live balancer said, in their order in Acks.
	Sights []Sight
}

// Served reads it.
func (s *Store) Served(ctx context.Context, svc Service) (Served, error) {
	var v Served
	var err error
	if v.Snapshot, err = s.Read(ctx, svc, nil); err != nil {
		return Served{}, err
	}
	if v.Acks, err = s.Acks(ctx, svc); err != nil {
		return Served{}, err
	}
	followers, err := s.Followers(ctx)
	if err != nil && !s.keys.cluster { // there another shard may have them, and be down
		return Served{}, err
	}
	v.Acks.follow(svc, followers)
	if v.Sights, err = s.Sights(ctx, svc, v.Acks.Live()); err != nil {
		return Served{}, err
	}
	return v, nil
}

// follow adds the followers of svc that live and have acknowledged nothing of it.
func (a *Acks) follow(svc Service, followers []Following) {
	for _, f := range followers {
		if len(f.Follows[svc]) == 0 {
			continue
		}
		i := slices.IndexFunc(a.Balancers, func(b Balancer) bool { return b.ID == f.Balancer })
		if i < 0 {
			a.Balancers = append(a.Balancers, Balancer{ID: f.Balancer, Live: true})
		}
	}
	slices.SortFunc(a.Balancers, func(x, y Balancer) int { return cmp.Compare(x.ID, y.ID) })
}

// Silent is for how long i has not beaten, if that is longer than the TTL; else 0.
func (v Snapshot) Silent(i Instance) time.Duration {
	if age := millis(v.Now - i.Beat); age > v.TTL {
		return age
	}
	return 0
}

// ServedBy is who sends requests to one instance.
type ServedBy struct {
	Serving int         // live balancers that do, in every backend that is to serve it
	Of      int         // live balancers that are to
	Not     []NotServed // each backend of a live balancer that does not, the excluding ones last
}

// All tells whether it is served by every live balancer that is to serve it, and by one
// at least.
func (b ServedBy) All() bool { return b.Of > 0 && b.Serving == b.Of }

// NotServed is why one backend of one balancer does not serve an instance.
type NotServed struct {
	Balancer string `json:"balancer"`
	Backend  string `json:"backend,omitempty"` // empty if the balancer has said nothing of the instance
	Reason   string `json:"reason"`            // see ServerState.Reason
	Why      string `json:"why,omitempty"`     // for people
	Since    int64  `json:"since,omitempty"`   // unix ms by Redis' clock
}

func (n NotServed) String() string {
	where := n.Balancer
	if n.Backend != "" {
		where += "/" + n.Backend
	}
	if n.Why == "" {
		return where + ": " + n.Reason
	}
	return fmt.Sprintf("%s: %s (%s)", where, n.Reason, n.Why)
}

// By returns who serves addr. A balancer whose operator allows other networks only is
// not to serve it; one that has said nothing of it is, and does not.
func (v Served) By(addr netip.AddrPort) (by ServedBy) {
	var excluding []NotServed
	sights := map[string]Sight{}
	for _, s := range v.Sights {
		sights[s.Balancer] = s
	}
	for _, b := range v.Acks.Balancers {
		if !b.Live {
			continue
		}
		states := sights[b.ID].Servers[addr]
		if b.Double || len(states) == 0 {
			why := "it has said nothing of it yet"
			if b.Double {
				why = "two lbsyncs acknowledge as it: give one of them another --id"
			}
			by.Of++
			by.Not = append(by.Not, NotServed{Balancer: b.ID, Reason: ReasonPending, Why: why})
			continue
		}
		expected, serving := 0, 0
		for backend, st := range states {
			reason := st.Reason()
			n := NotServed{b.ID, backend, reason, st.Why, st.Since}
			switch {
			case st.Excluded:
				excluding = append(excluding, n)
				continue
			case reason == "":
				serving++
			default:
				by.Not = append(by.Not, n)
			}
			expected++
		}
		if expected > 0 {
			by.Of++
		}
		if expected > 0 && serving == expected {
			by.Serving++
		}
	}
	for _, list := range [][]NotServed{by.Not, excluding} {
		slices.SortFunc(list, func(x, y NotServed) int {
			return cmp.Or(strings.Compare(x.Balancer, y.Balancer), strings.Compare(x.Backend, y.Backend))
		})
	}
	by.Not = append(by.Not, excluding...)
	return by
}

// Wanted is a state of a service to wait for.
type Wanted struct {
	// Ready is how many instances must be served by every live balancer that is to
	// serve them; negative if that is not asked, and then nothing may be refused,
	// unplaced or undone.
	Ready int
	// Version must have been applied by every live balancer; 0 is the newest at the
	// first look.
	Version int64
	// NoBalancer says that there may be none, and Absent that nobody needs to have
	// heard of the service.
	NoBalancer, Absent bool
}

// Missing says what is missing of w, or nil; errors.Is(err, ErrHopeless) if waiting is
// no use.
func (v Served) Missing(svc Service, w Wanted) error {
	live := v.Acks.Live()
	if v.Token.Version == 0 && !w.Absent {
		return fmt.Errorf("nobody has ever registered as %s", svc)
	}
	if len(live) == 0 && !w.NoBalancer {
		return fmt.Errorf("no live balancer follows %s: run lbsync --backend %s=BACKEND beside HAProxy", svc, svc)
	}
	if v.Token.Version < w.Version {
		return fmt.Errorf("version is %d, want %d", v.Token.Version, w.Version)
	}
	registered, ready := 0, 0
	var refused, without []string
	var example netip.AddrPort // of without
	for _, e := range v.Entries {
		if !e.Present {
			continue
		}
		by := v.By(e.Addr)
		wanted := e.Instance.State() == AdminNone && e.Instance.Weight() > 0
		if wanted {
			registered++
		}
		if silent := v.Silent(e.Instance); wanted && silent > 0 && w.Ready >= 0 {
			without = append(without, fmt.Sprintf("%s, silent for %v", e.Addr, silent.Round(time.Second)))
			example = first(example, e.Addr)
			continue
		}
		switch {
		case by.Of == 0 && len(by.Not) > 0:
			refused = append(refused, fmt.Sprintf("%s at %s", e.Addr, by.Not[0]))
			continue
		case wanted && (by.All() || len(live) == 0):
			ready++
			continue
		}
		for _, n := range by.Not {
			disturbed := n.Reason == NoteRefused || n.Reason == NoteUnplaced || n.Reason == NoteUndone
			if w.Ready < 0 && disturbed || w.Ready >= 0 && wanted {
				without = append(without, fmt.Sprintf("%s at %s", e.Addr, n))
				example = first(example, e.Addr)
				break
			}
		}
	}
	more := "see lbsync --allow" // an instance that no balancer is to serve is in none of their networks
	if example.IsValid() {
		more = fmt.Sprintf("rollcall explain %s %s says more", svc, example)
	}
	switch {
	case w.Ready < 0 && len(refused) > 0:
		return fmt.Errorf("%w: every balancer refuses %s; see lbsync --allow", ErrHopeless, some(refused))
	case w.Ready < 0 && len(without) > 0:
		return fmt.Errorf("not served: %s; %s", some(without), more)
	case ready < w.Ready && registered >= w.Ready && registered-len(refused) < w.Ready:
		return fmt.Errorf("%d of %d instances serve; %w: every balancer refuses %s; see lbsync --allow", ready, w.Ready, ErrHopeless, some(refused))
	case ready < w.Ready && len(refused)+len(without) > 0:
		return fmt.Errorf("%d of %d instances serve; not %s; %s", ready, w.Ready, some(append(without, refused...)), more)
	case ready < w.Ready:
		return fmt.Errorf("%d of %d instances serve; %d are registered to serve", ready, w.Ready, registered)
	}
	var behind []string
	for _, b := range v.Acks.Balancers {
		if !b.Live {
			continue
		}
		if b.Double {
			return fmt.Errorf("two lbsyncs acknowledge as %s: give one of them another --id", b.ID)
		}
		applied := b.Applied
		if i := slices.IndexFunc(v.Sights, func(s Sight) bool { return s.Balancer == b.ID }); i >= 0 && applied >= w.Version {
			applied = v.Sights[i].Version // what it has said of its servers is not older
		}
		if Lag(w.Version, applied) > 0 || v.Acks.Token.Version < b.Applied {
			behind = append(behind, fmt.Sprintf("%s at version %d", b.ID, applied))
		}
	}
	if len(behind) > 0 {
		return fmt.Errorf("version %d: %d of %d live balancers have not applied it: %s", w.Version, len(behind), len(live), some(behind))
	}
	return nil
}

// first is a, or b if a is none.
func first(a, b netip.AddrPort) netip.AddrPort {
	if a.IsValid() {
		return a
	}
	return b
}

// some names a few of many.
func some(list []string) string {
	const few = 3
	if n := len(list) - few; n > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(list[:few], ", "), n)
	}
	return strings.Join(list, ", ")
}

// WaitServed waits until nothing is missing of w, and returns what it saw then. It
// returns ErrHopeless as Missing does, ErrOtherHistory if Redis' history is no longer
// the one at the first look, and what is missing when ctx ends; a read that fails is
// tried again until then.
func (s *Store) WaitServed(ctx context.Context, svc Service, w Wanted) (v Served, err error) {
	var first *Token
	ended := false
	err = lookUntil(ctx, func(ctx context.Context) (done bool, missing, failed error) {
		tctx, cancel := WithTimeout(ctx)
		defer cancel()
		if v, err = s.Served(tctx, svc); err != nil {
			return false, nil, err
		}
		if first == nil {
			first = &v.Token
		}
		if w.Version == 0 {
			w.Version = max(v.Token.Version, 0)
		}
		switch {
		case first.Interrupted(v.Token):
			missing, ended = fmt.Errorf("wait for version %d of %s: %w", w.Version, svc, ErrOtherHistory), true
		case min(w.Version, v.Token.Version, v.Acks.Token.Version) < 0:
			missing = s.uncounted(svc)
		default:
			missing = v.Missing(svc, w)
			ended = missing == nil || errors.Is(missing, ErrHopeless)
		}
		return ended, missing, nil
	})
	if !ended {
		return Served{}, fmt.Errorf("wait for %s: %w", svc, err)
	}
	return v, err
}
