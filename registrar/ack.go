package registrar

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// AckInterval is how often a balancer says that it lives.
	AckInterval = 5 * time.Second
	// BalancerLive is how long after that it counts as alive: two of these may
	// be lost.
	BalancerLive = 12 * time.Second
	// balancerForget is when it is forgotten.
	balancerForget = time.Hour
)

// MaxBalancerID is the most bytes of a balancer's id.
const MaxBalancerID = 255

// CheckBalancerID refuses an id that could not be told from others in a key, in a
// list or on a terminal.
func CheckBalancerID(id string) error {
	if id == "" || len(id) > MaxBalancerID || strings.ContainsFunc(id, func(r rune) bool { return !BalancerIDRune(r) }) {
		return fmt.Errorf("balancer id %q: want 1 to %d of A-Za-z0-9._:-", id, MaxBalancerID)
	}
	return nil
}

// BalancerIDRune tells whether a balancer's id may have r.
func BalancerIDRune(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._:-", r)
}

// Double says whether an id is one process's alone.
type Double int32

// From what is right to what is worst.
const (
	Sole   Double = iota
	First         // another process acknowledges as the same balancer; this one was first, and goes on
	Second        // another one was first: this one's acknowledgements are not written
)

// Acker acknowledges as one balancer, for one process. Ack and Retire are for one
// goroutine at a time; of a Cluster, for one a service.
type Acker struct {
	store   *Store
	id      string
	process string // of this one alone

	mu    sync.Mutex
	marks map[Service]*mark // by register: of a Cluster by service, else one under ""; guarded by mu
}

// mark is what a process knows of its id in one register; times are unix ms by
// Redis' clock, 0 = never.
type mark struct {
	first, last int64 // its own words
	contested   int64 // when it last found another's word after its own
	double      atomic.Int32
}

// Acker returns what acknowledges as the balancer id. It does no I/O.
func (s *Store) Acker(id string) *Acker {
	return &Acker{store: s, id: id, process: rand.Text(), marks: map[Service]*mark{}}
}

func (a *Acker) mark(svc Service) *mark {
	register := a.store.keys.Of(svc).scope
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.marks[register] == nil {
		a.marks[register] = &mark{}
	}
	return a.marks[register]
}

// Ack says that the balancer has applied the state of svc that t names, and that
// it lives. It returns ErrOtherHistory if Redis no longer holds the history that t
// is of, and ErrDouble if another process acknowledges as the same balancer and
// did so first: nothing is written then. The id is this process's again when the
// other has been silent for BalancerLive.
func (a *Acker) Ack(ctx context.Context, svc Service, t Token) error {
	s, m := a.store, a.mark(svc)
	k := s.keys.Of(svc)
	r, err := s.ack.Run(ctx, s.rdb, []string{k.Applied(svc), k.Balancers(), k.Epoch(), k.Owners()},
		a.id, t.Version, t.ReplID, t.Epoch, balancerForget.Milliseconds(), s.now,
		BalancerLive.Milliseconds(), a.process, unlessZero(m.first), unlessZero(m.last), unlessZero(m.contested)).Slice()
	if err == nil {
		err = m.take(r)
	}
	if err != nil {
		return fmt.Errorf("acknowledge %s version %d as %s: %w", svc, t.Version, a.id, err)
	}
	return nil
}

// take takes in what ack.lua has answered.
func (m *mark) take(r []any) error {
	if len(r) != 4 || integer(r[1]) <= 0 {
		return fmt.Errorf("unknown answer %s", quoted(r))
	}
	now, double := integer(r[1]), Sole
	switch text(r[2]) {
	case "SOLE":
	case "FIRST":
		double = First
	case "SECOND":
		double = Second
	default:
		return fmt.Errorf("unknown answer %s", quoted(r))
	}
	if integer(r[3]) == 1 {
		m.contested = now
	}
	m.double.Store(int32(double))
	if double == Second {
		return ErrDouble
	}
	m.last = now
	if m.first == 0 {
		m.first = now
	}
	if integer(r[0]) != 1 {
		return ErrOtherHistory
	}
	return nil
}

// Double says how the id stood with the last Ack of svc. Any goroutine may call it.
func (a *Acker) Double(svc Service) Double { return Double(a.mark(svc).double.Load()) }

// Retire has the register forget what the balancer said of svc, and, if it has no
// other service, that there was such a balancer. It returns ErrDouble, and does
// nothing, if another process has acknowledged as it within BalancerLive.
func (a *Acker) Retire(ctx context.Context, svc Service, whole bool) error {
	s := a.store
	k := s.keys.Of(svc)
	ok, err := s.retire.Run(ctx, s.rdb, []string{k.Applied(svc), k.Seen(svc, a.id), k.Balancers(), k.Owners()},
		a.id, a.process, flag(whole || s.keys.cluster), BalancerLive.Milliseconds(), s.now).Int()
	if err == nil && ok != 1 {
		err = ErrDouble
	}
	if err != nil {
		return fmt.Errorf("forget what balancer %s has of %s: %w", a.id, svc, err)
	}
	return nil
}

// unlessZero is an argument that may be absent.
func unlessZero(ms int64) any {
	if ms == 0 {
		return ""
	}
	return ms
}

// Balancer is one balancer of a service.
type Balancer struct {
	ID      string
	Applied int64 // service version
	Seen    int64 // unix ms by Redis' clock; 0 if unknown
	Live    bool  // seen within BalancerLive
	// Double says that two processes acknowledge as it, of which the second has no
	// say: what that one's HAProxy has, nobody knows.
	Double bool
}

// Acks is which balancer has applied what of one service, in one instant.
type Acks struct {
	Token     Token // of the service now
	Now       int64 // unix ms by Redis' clock
	Balancers []Balancer
}

// Behind counts the live balancers that have not applied version, or not surely,
// and all live ones. What is no number is applied by none, and neither is what a
// balancer has that is beyond the service's version: that is of another history.
func (a Acks) Behind(version int64) (behind, live int) {
	for _, b := range a.Balancers {
		if b.Live {
			live++
			if b.Double || Lag(version, b.Applied) > 0 || a.Token.Version < b.Applied {
				behind++
			}
		}
	}
	return behind, live
}

// Live returns the ids of the live balancers.
func (a Acks) Live() []string {
	var ids []string
	for _, b := range a.Balancers {
		if b.Live {
			ids = append(ids, b.ID)
		}
	}
	return ids
}

// Acks reads who has applied what of svc, by id.
func (s *Store) Acks(ctx context.Context, svc Service) (Acks, error) {
	k := s.keys.Of(svc)
	r, err := s.applied.RunRO(ctx, s.rdb, []string{k.Applied(svc), k.Balancers(), k.ServiceVersion(svc), k.Epoch(), k.Owners()}, s.now).Slice()
	if err != nil {
		return Acks{}, fmt.Errorf("read acknowledgements of %s: %w", svc, err)
	}
	if len(r) < 4 || len(r)%4 != 0 {
		return Acks{}, fmt.Errorf("read acknowledgements of %s: answer of %d parts", svc, len(r))
	}
	a := Acks{Now: integer(r[0]), Token: Token{text(r[1]), text(r[2]), versionOf(r[3])}}
	for ; len(r) > 4; r = append(r[:4:4], r[8:]...) {
		b := Balancer{ID: text(r[4])}
		b.Applied = parseVersion(text(r[5]))
		if seen, err := strconv.ParseFloat(text(r[6]), 64); err == nil && seen > 0 && seen < 1e15 {
			b.Seen = int64(seen)
			b.Live = a.live(b.Seen)
		}
		if twice, err := strconv.ParseInt(text(r[7]), 10, 64); err == nil {
			b.Double = a.live(twice)
		}
		a.Balancers = append(a.Balancers, b)
	}
	slices.SortFunc(a.Balancers, func(x, y Balancer) int { return cmp.Compare(x.ID, y.ID) })
	return a, nil
}

// live tells whether at is within BalancerLive of now.
func (a Acks) live(at int64) bool {
	age := a.Now - at // of milliseconds: a Duration would overflow
	return max(age, -age) <= BalancerLive.Milliseconds()
}

// doubles are the live balancers as which two processes acknowledge.
func (a Acks) doubles() (ids []string) {
	for _, b := range a.Balancers {
		if b.Live && b.Double {
			ids = append(ids, b.ID)
		}
	}
	return ids
}

// ackPoll and lastAckPoll pace WaitApplied.
const (
	ackPoll     = 5 * time.Millisecond
	lastAckPoll = 200 * time.Millisecond
)

// WaitApplied waits until every live balancer of svc has applied version, and
// returns how many there are. With none it returns at once. A version that is no
// number is never applied. It returns
// ErrOtherHistory if the version is no longer of Redis' history, and ctx's error
// when that ends; a read that fails is tried again until then. each, if not
// nil, is called before every look and ends the wait with its error.
func (s *Store) WaitApplied(ctx context.Context, svc Service, version int64, each func() error) (live int, err error) {
	var first *Token
	err = lookUntil(ctx, func(ctx context.Context) (done bool, missing, failed error) {
		if each != nil {
			if err := each(); err != nil {
				return true, err, nil
			}
		}
		tctx, cancel := WithTimeout(ctx)
		acks, err := s.Acks(tctx, svc)
		cancel()
		if err != nil {
			return false, nil, err
		}
		if first == nil {
			first = &acks.Token
		}
		// A fail-over may have come before the first look: then the version that was
		// given is not reached yet.
		if first.Interrupted(acks.Token) || acks.Token.Version >= 0 && acks.Token.Version < version {
			return true, fmt.Errorf("wait for version %d of %s: %w", version, svc, ErrOtherHistory), nil
		}
		var behind int
		behind, live = acks.Behind(version)
		unknown := version < 0 || acks.Token.Version < 0
		if behind == 0 && !unknown {
			return true, nil, nil
		}
		missing = fmt.Errorf("wait for version %d of %s: %d of %d live balancers have not applied it", version, svc, behind, live)
		if unknown {
			missing = fmt.Errorf("wait for %s: %w", svc, s.uncounted(svc))
		}
		if ids := acks.doubles(); len(ids) > 0 {
			missing = fmt.Errorf("%w; two lbsyncs acknowledge as %s: give one of them another --id", missing, strings.Join(ids, ", "))
		}
		return false, missing, nil
	})
	return live, err
}

// lookUntil calls look until that is done, and returns what is missing then; nil if nothing
// is. When ctx ends it returns what the last look that was not cut short by that has found
// missing, or why it failed. It looks after ackPoll, then less and less often.
func lookUntil(ctx context.Context, look func(context.Context) (done bool, missing, failed error)) error {
	wait := time.NewTimer(0)
	defer wait.Stop()
	var last error
	failures := 0
	for pause := ackPoll; ; pause = min(2*pause, lastAckPoll) {
		select {
		case <-ctx.Done():
			return cmp.Or(last, ctx.Err())
		case <-wait.C:
		}
		done, missing, failed := look(ctx)
		if done {
			return missing
		}
		next := Shorten(pause)
		if failures++; failed == nil {
			failures = 0
		} else {
			next = Backoff(failures, lastAckPoll)
		}
		if last == nil || ctx.Err() == nil { // else it is the look that was cut short
			last = cmp.Or(failed, missing)
		}
		wait.Reset(next)
	}
}
