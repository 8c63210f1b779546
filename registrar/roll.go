package registrar

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// rollLimit bounds one call of roll.lua, and so how long it holds Redis.
const rollLimit = 250

// gatherFor is how long a Roll waits for more heartbeats after a first one.
// Those of one tick come within a few milliseconds.
const gatherFor = 10 * time.Millisecond

// ServiceBeat is one heartbeat of Service.
type ServiceBeat struct {
	Service Service
	Beat
}

// Steadied is what became of one heartbeat of many. Unless Done or Err says so,
// it was no steady one: nothing was written, and Beat must send it.
type Steadied struct {
	BeatReply
	Done bool  // the score moved
	Err  error // the outcome is unknown
}

// BeatSteady sends the heartbeats of instances of which nothing has changed since
// their last one, 250 a call, and returns what became of each, in their order.
// It promises for each what Beat promises: what Beat would have to decide about,
// such as another token, other metadata or an arrival, is left to it.
func (s *Store) BeatSteady(ctx context.Context, beats []ServiceBeat) []Steadied {
	out := make([]Steadied, len(beats))
	at := make([]int, 0, len(beats)) // of what is sent, service by service
	for i, b := range beats {
		if !b.decides() && len(b.Meta) <= MaxMeta {
			at = append(at, i)
		}
	}
	slices.SortStableFunc(at, func(i, j int) int { return cmp.Compare(beats[i].Service, beats[j].Service) })
	var sending sync.WaitGroup
	defer sending.Wait()
	for len(at) > 0 {
		n := min(rollLimit, len(at))
		if !s.keys.cluster {
			s.steadyMany(ctx, beats, at[:n], out)
			for i, j := range at[:n] {
				if svc := beats[j].Service; out[j].Done && (i == 0 || beats[at[i-1]].Service != svc) {
					s.relist(ctx, svc)
				}
			}
			at = at[n:]
			continue
		}
		svc := beats[at[0]].Service
		for beats[at[n-1]].Service != svc {
			n--
		}
		part := at[:n]
		sending.Go(func() { // each service is a register of its own
			s.enlist(ctx, svc)
			s.steadyMany(ctx, beats, part, out)
		})
		at = at[n:]
	}
	return out
}

// steadyMany is one call of roll.lua, for the beats at some places.
func (s *Store) steadyMany(ctx context.Context, beats []ServiceBeat, at []int, out []Steadied) {
	keys := []string{s.keys.Of(beats[at[0]].Service).Config()}
	argv := []any{s.now, int64(0)}
	longest := time.Duration(0)
	for n := 0; n < len(at); {
		svc := beats[at[n]].Service
		first := n
		for n < len(at) && beats[at[n]].Service == svc {
			n++
		}
		k := s.keys.Of(svc)
		keys = append(keys, k.Instances(svc), k.Meta(svc))
		argv = append(argv, n-first)
		for _, i := range at[first:n] {
			argv = append(argv, beats[i].Addr.String())
			longest = max(longest, beats[i].Interval)
		}
		for _, i := range at[first:n] {
			argv = append(argv, beats[i].Meta)
		}
	}
	argv[1] = longest.Milliseconds()
	r, err := s.roll.Run(ctx, s.rdb, keys, argv...).Slice()
	var refused redis.Error
	switch {
	case errors.As(err, &refused):
		return // by Redis, and perhaps for one service's sake: Beat hears for whose
	case err == nil && (len(r) < 2 || integer(r[0]) <= 0):
		err = fmt.Errorf("answer of %d parts", len(r))
	}
	if err != nil {
		for _, i := range at {
			out[i].Err = fmt.Errorf("beat %s %s with %d others: %w", beats[i].Service, beats[i].Addr, len(at)-1, err)
		}
		return
	}
	for _, i := range at {
		out[i] = Steadied{BeatReply: BeatReply{Status: BeatOK, TTL: millis(integer(r[0])), Interval: millis(integer(r[1]))}, Done: true}
	}
	for _, n := range r[2:] {
		if i := integer(n); i > 0 && i <= int64(len(at)) {
			out[at[i-1]] = Steadied{}
		}
	}
}

// Roll sends the steady heartbeats of many Beaters of one process together: they
// beat at the same ticks, and Redis has a call for each 250 of them. Each remains
// a registration of its own, with all that a Beater promises. Everything else a
// Beater sends itself. Any number of them may share a Roll.
type Roll struct {
	store *Store
	voice Sparing // of all its Beaters together: one outage is all of theirs

	mu        sync.Mutex
	gathering *gathering                  // that may still be joined; nil = none
	ticks     map[time.Duration]time.Time // by interval: the next
	looks     map[Service]*look           // by register: of a Cluster by service, else one under ""
}

// look is a read of the registry's heartbeat interval.
type look struct {
	at       time.Time
	done     chan struct{} // closed when the answer is there
	interval time.Duration
	err      error
}

// gathering is beats that are sent together.
type gathering struct {
	beats []ServiceBeat
	sent  chan struct{} // closed when out is there
	out   []Steadied
}

// NewRoll returns a Roll of Beaters on store.
func NewRoll(store *Store) *Roll {
	return &Roll{store: store, ticks: map[time.Duration]time.Time{}, looks: map[Service]*look{}}
}

// Beat is Store.Beat, with others if it may be a steady one. Who comes first
// sends for all: it waits for the answer, at most Timeout, even when ctx ends.
func (r *Roll) Beat(ctx context.Context, svc Service, b Beat) (BeatReply, error) {
	if b.decides() || len(b.Meta) > MaxMeta {
		return r.store.Beat(ctx, svc, b)
	}
	r.mu.Lock()
	g := r.gathering
	first := g == nil
	if first {
		g = &gathering{sent: make(chan struct{})}
		r.gathering = g
	}
	mine := len(g.beats)
	g.beats = append(g.beats, ServiceBeat{svc, b})
	r.mu.Unlock()
	if first {
		time.Sleep(gatherFor) // bounded, and nobody wants to interrupt it
		r.send(ctx, g)
	}
	select {
	case <-g.sent:
	case <-ctx.Done():
		return BeatReply{}, fmt.Errorf("beat %s %s with others: %w", svc, b.Addr, ctx.Err())
	}
	switch s := g.out[mine]; {
	case s.Done:
		return s.BeatReply, nil
	case s.Err != nil:
		return BeatReply{}, s.Err
	}
	return r.store.decide(ctx, svc, b)
}

// send closes the gathering and sends it.
func (r *Roll) send(ctx context.Context, g *gathering) {
	r.mu.Lock()
	r.gathering = nil
	r.mu.Unlock()
	// The others' beats are not for this one's ctx to end.
	ctx, cancel := WithTimeout(context.WithoutCancel(ctx))
	defer cancel()
	g.out = r.store.BeatSteady(ctx, g.beats)
	close(g.sent)
}

// intervalNow returns the heartbeat interval that the register of svc has, as it was
// read within so long before.
func (r *Roll) intervalNow(ctx context.Context, svc Service, within time.Duration) (time.Duration, error) {
	register := r.store.keys.Of(svc).scope
	r.mu.Lock()
	l := r.looks[register]
	first := l == nil || time.Since(l.at) > within
	if first {
		l = &look{at: time.Now(), done: make(chan struct{})}
		r.looks[register] = l
	}
	r.mu.Unlock()
	if first {
		// The others' answer is not for this one's ctx to end.
		tctx, cancel := WithTimeout(context.WithoutCancel(ctx))
		_, l.interval, l.err = r.store.InForce(tctx, svc)
		cancel()
		close(l.done)
	}
	select {
	case <-l.done:
		return l.interval, l.err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// next is how long until the next tick of interval: all who ask before it get
// the same, and it is never later than an interval from now.
func (r *Roll) next(interval time.Duration) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if at := r.ticks[interval]; at.After(now) {
		return at.Sub(now)
	}
	d := Shorten(interval)
	r.ticks[interval] = now.Add(d)
	return d
}
