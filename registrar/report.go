package registrar

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	// ReportInterval is how often a reaper says what it does.
	ReportInterval = 5 * time.Second
	// ReaperLive is how long after that it counts as alive: two of these may be
	// lost.
	ReaperLive = 12 * time.Second
	// reaperForget is when what it said is dropped.
	reaperForget = 10 * time.Minute
)

// ReaperStatus is what a reaper is doing. Times are unix ms by Redis' clock.
type ReaperStatus struct {
	Armed bool   `json:"armed"`
	Cause string `json:"cause,omitempty"` // of not being armed
	Error string `json:"error,omitempty"` // of the cause, if there is one
	Since int64  `json:"since,omitempty"` // armed, or not; 0 before the first accepted pulse
	Until int64  `json:"until,omitempty"` // not armed before; 0 if unknown
	Held  []Hold `json:"held,omitempty"`
}

// Hold is a stop of all removal, because too many look dead at once.
type Hold struct {
	Service  Service `json:"service"` // empty = every service
	Suspects int64   `json:"suspects"`
	Members  int64   `json:"members"`
	Since    int64   `json:"since"`
	Until    int64   `json:"until"` // the end, if the cause is not seen again before
}

// Report says what the reaper id does; nil says that it ends.
func (s *Store) Report(ctx context.Context, id string, st *ReaperStatus) error {
	state := ""
	if st != nil {
		b, err := json.Marshal(st)
		if err != nil {
			return fmt.Errorf("report of reaper %s: %w", id, err)
		}
		state = string(b)
	}
	if err := s.report.Run(ctx, s.rdb, []string{s.keys.Reapers(), s.keys.Events()},
		id, state, reaperForget.Milliseconds(), s.now, ReaperLive.Milliseconds()).Err(); err != nil {
		return fmt.Errorf("report of reaper %s: %w", id, err)
	}
	return nil
}

// ReaperReport is one reaper and what it said last.
type ReaperReport struct {
	ID string
	ReaperStatus
	Seen    int64 // when it said that, unix ms by Redis' clock
	Live    bool  // seen within ReaperLive
	Garbage bool  // what it said cannot be read; nothing else is known
}

// Overview is who is at work on a registry, and the registry's own facts.
type Overview struct {
	Now           int64 // unix ms by Redis' clock
	TTL, Interval time.Duration
	Epoch         string
	Version       int64 // the global one; may be NoVersion
	Reapers       []ReaperReport
	Balancers     []Balancer // without what they have applied
}

// Overview reads it, reapers and balancers by id. It is no single instant. Of a
// Cluster the store must be that of a service.
func (s *Store) Overview(ctx context.Context) (Overview, error) {
	k := s.keys
	node, err := s.node(ctx) // whose clock it is by
	if err != nil {
		return Overview{}, fmt.Errorf("read who is at work: %w", err)
	}
	pipe := node.Pipeline()
	reapers := pipe.HGetAll(ctx, k.Reapers())
	balancers := pipe.ZRangeWithScores(ctx, k.Balancers(), 0, -1)
	config := pipe.HMGet(ctx, k.Config(), "ttl_ms", "interval_ms")
	epoch := pipe.Get(ctx, k.Epoch())
	counter := pipe.Get(ctx, k.Version())
	clock := pipe.Time(ctx)
	if err := unanswered(pipe.Exec(ctx)); err != nil {
		return Overview{}, fmt.Errorf("read who is at work: %w", err)
	}
	for _, c := range []redis.Cmder{reapers, balancers, config, epoch, counter, clock} {
		if err := c.Err(); err != nil && !errors.Is(err, redis.Nil) {
			return Overview{}, fmt.Errorf("read who is at work: %s: %w", c.Name(), err)
		}
	}
	o := Overview{Now: clock.Val().UnixMilli(), Epoch: epoch.Val()}
	o.TTL, o.Interval = inForce(config.Val()[0], config.Val()[1])
	if text := counter.Val(); text != "" {
		o.Version = parseVersion(text)
	}
	for id, state := range reapers.Val() {
		o.Reapers = append(o.Reapers, o.reaper(id, state))
	}
	slices.SortFunc(o.Reapers, func(x, y ReaperReport) int { return cmp.Compare(x.ID, y.ID) })
	for _, z := range balancers.Val() {
		id, _ := z.Member.(string)
		b := Balancer{ID: id, Seen: int64(min(max(z.Score, 0), 1e15))}
		b.Live = o.within(b.Seen, BalancerLive)
		o.Balancers = append(o.Balancers, b)
	}
	slices.SortFunc(o.Balancers, func(x, y Balancer) int { return cmp.Compare(x.ID, y.ID) })
	return o, nil
}

func (o Overview) reaper(id, state string) ReaperReport {
	said := struct {
		ReaperStatus
		At int64 `json:"at"`
	}{}
	if err := json.Unmarshal([]byte(state), &said); err != nil || said.At <= 0 || said.At > 1e15 {
		return ReaperReport{ID: id, Garbage: true}
	}
	return ReaperReport{ID: id, ReaperStatus: said.ReaperStatus, Seen: said.At, Live: o.within(said.At, ReaperLive)}
}

// within tells whether at is no further from now than d, on either side.
func (o Overview) within(at int64, d time.Duration) bool {
	age := millis(o.Now - at)
	return age <= d && age >= -d
}
