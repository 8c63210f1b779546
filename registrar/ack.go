package registrar

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
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

// Ack says that the balancer id has applied the state of svc that t names, and
// that it lives. It returns ErrOtherHistory if Redis no longer holds the history
// that t is of.
func (s *Store) Ack(ctx context.Context, id string, svc Service, t Token) error {
	k := s.keys.Of(svc)
	ok, err := s.ack.Run(ctx, s.rdb, []string{k.Applied(svc), k.Balancers(), k.Epoch()},
		id, t.Version, t.ReplID, t.Epoch, balancerForget.Milliseconds(), s.now).Int()
	if err == nil && ok != 1 {
		err = ErrOtherHistory
	}
	if err != nil {
		return fmt.Errorf("acknowledge %s version %d: %w", svc, t.Version, err)
	}
	return nil
}

// Balancer is one balancer of a service.
type Balancer struct {
	ID      string
	Applied int64 // service version
	Seen    int64 // unix ms by Redis' clock; 0 if unknown
	Live    bool  // seen within BalancerLive
}

// Acks is which balancer has applied what of one service, in one instant.
type Acks struct {
	Token     Token // of the service now
	Now       int64 // unix ms by Redis' clock
	Balancers []Balancer
}

// Behind counts the live balancers that have not applied version, and all live
// ones.
func (a Acks) Behind(version int64) (behind, live int) {
	for _, b := range a.Balancers {
		if b.Live {
			live++
			if b.Applied < version {
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
	r, err := s.applied.RunRO(ctx, s.rdb, []string{k.Applied(svc), k.Balancers(), k.ServiceVersion(svc), k.Epoch()}, s.now).Slice()
	if err != nil {
		return Acks{}, fmt.Errorf("read acknowledgements of %s: %w", svc, err)
	}
	if len(r) < 4 || len(r)%3 != 1 {
		return Acks{}, fmt.Errorf("read acknowledgements of %s: answer of %d parts", svc, len(r))
	}
	a := Acks{Now: integer(r[0]), Token: Token{text(r[1]), text(r[2]), integer(r[3])}}
	for ; len(r) > 4; r = append(r[:4:4], r[7:]...) {
		b := Balancer{ID: text(r[4])}
		if b.Applied, err = strconv.ParseInt(text(r[5]), 10, 64); err != nil {
			b.Applied = -1 // nobody's version: it has applied nothing that is known
		}
		if seen, err := strconv.ParseFloat(text(r[6]), 64); err == nil && seen > 0 && seen < 1e15 {
			b.Seen = int64(seen)
			age := millis(a.Now - b.Seen)
			b.Live = age <= BalancerLive && age > -BalancerLive
		}
		a.Balancers = append(a.Balancers, b)
	}
	slices.SortFunc(a.Balancers, func(x, y Balancer) int { return cmp.Compare(x.ID, y.ID) })
	return a, nil
}

// ackPoll and lastAckPoll pace WaitApplied.
const (
	ackPoll     = 5 * time.Millisecond
	lastAckPoll = 200 * time.Millisecond
)

// WaitApplied waits until every live balancer of svc has applied version, and
// returns how many there are. With none it returns at once. It returns
// ErrOtherHistory if the version is no longer of Redis' history, and ctx's error
// when that ends; a read that fails is tried again until then. each, if not
// nil, is called before every look and ends the wait with its error.
func (s *Store) WaitApplied(ctx context.Context, svc Service, version int64, each func() error) (live int, err error) {
	wait := time.NewTimer(0)
	defer wait.Stop()
	var first *Token
	var last error
	failures := 0
	for pause := ackPoll; ; pause = min(2*pause, lastAckPoll) {
		select {
		case <-ctx.Done():
			return live, cmp.Or(last, ctx.Err())
		case <-wait.C:
		}
		if each != nil {
			if err := each(); err != nil {
				return live, err
			}
		}
		tctx, cancel := WithTimeout(ctx)
		acks, err := s.Acks(tctx, svc)
		cancel()
		next := Shorten(pause)
		if err != nil {
			failures++
			next = Backoff(failures, lastAckPoll)
		} else {
			failures = 0
			if first == nil {
				first = &acks.Token
			}
			if first.Interrupted(acks.Token) {
				return live, fmt.Errorf("wait for version %d of %s: %w", version, svc, ErrOtherHistory)
			}
			var behind int
			behind, live = acks.Behind(version)
			if behind == 0 {
				return live, nil
			}
			err = fmt.Errorf("wait for version %d of %s: %d of %d live balancers have not applied it", version, svc, behind, live)
		}
		if last == nil || ctx.Err() == nil { // else it is the read that was cut short
			last = err
		}
		wait.Reset(next)
	}
}
