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

// A Redis Cluster runs a script in one slot only. All keys of a service have one
// slot, so there each service is a register of its own, with its own epoch,
// version, config, balancers and reapers' pulses; see Keys. Every script is the
// same, and so is what it promises: a PUBLISH in a script reaches the subscribers
// of every node (measured, Redis 7.0). Only the list of all services is in
// another slot. It is a help to those who look for services, and never a reason
// to change anything.

const (
	// listEvery is how often a beating Store adds its service to the list, from which
	// it may have been lost.
	listEvery = time.Minute
	// listRetry is the pause after it could not.
	listRetry = 5 * time.Second
	// listTimeout bounds both calls together: they go before a beat, and the
	// shard of the list must not stop the beats of others.
	listTimeout = 200 * time.Millisecond
	// pingTries is how many nodes a Ping asks, and pingTimeout how long it waits
	// for each: less than Timeout in all. Of three, one dead, it misses the
	// living two once in 6,561 times.
	pingTries   = 8
	pingTimeout = 100 * time.Millisecond
)

// listing is when each service is to be added to the list again.
type listing struct {
	timeout time.Duration // of both calls together
	every   time.Duration

	mu sync.Mutex
	at map[Service]time.Time // guarded by mu
}

// due tells whether it is time to add svc, and puts the next time off for d.
func (l *listing) due(svc Service, d time.Duration) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if now.Before(l.at[svc]) {
		return false
	}
	l.at[svc] = now.Add(d)
	return true
}

// again is due, but for the first time an interval after it was first asked.
func (l *listing) again(svc Service) bool {
	l.mu.Lock()
	_, known := l.at[svc]
	l.mu.Unlock()
	if !known {
		l.done(svc)
	}
	return l.due(svc, listRetry)
}

// done puts the next time off until svc must be added again.
func (l *listing) done(svc Service) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.at[svc] = time.Now().Add(Shorten(l.every))
}

// Cluster tells whether each service is a register of its own.
func (s *Store) Cluster() bool { return s.keys.cluster }

// Of returns the store of the register that svc is in: outside of a Cluster, the
// same one.
func (s *Store) Of(svc Service) *Store {
	of := *s
	of.keys = s.keys.Of(svc)
	return &of
}

// Node returns the address of the node that holds the register of svc in a
// Cluster, as far as the client knows.
func (s *Store) Node(ctx context.Context, svc Service) (string, error) {
	c, ok := s.rdb.(*redis.ClusterClient)
	if !ok {
		return "", errors.New("not a Cluster")
	}
	node, err := c.MasterForKey(ctx, s.keys.Of(svc).Config())
	if err != nil {
		return "", fmt.Errorf("find the node of %s: %w", svc, err)
	}
	return node.Options().Addr, nil
}

// On returns the same store on another client, which the caller closes.
func (s *Store) On(rdb redis.UniversalClient) *Store {
	on := *s
	on.rdb = rdb
	return &on
}

// enlist adds svc to the list of services, and gives a new one the whole
// register's TTL and interval, before a first beat and once a minute. What fails
// is tried again with a later beat: the instance is alive either way, and it is
// found as soon as any beat of its service gets through.
func (s *Store) enlist(ctx context.Context, svc Service) {
	if s.keys.scope != "" || !s.listing.due(svc, listRetry) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, s.listing.timeout)
	defer cancel()
	if s.rdb.SAdd(ctx, s.keys.Services(), string(svc)).Err() != nil {
		return
	}
	cfg, err := s.rdb.HMGet(ctx, s.keys.Config(), "ttl_ms", "interval_ms").Result()
	if err != nil {
		return
	}
	// Else no reaper has ever run; and what somebody mistyped is not copied, since the
	// copy would outlive it.
	if CheckTimes(stored(cfg[0]), stored(cfg[1])) == nil {
		if _, err := s.Of(svc).setTimes(ctx, cfg[0], cfg[1], false, "", ""); err != nil {
			return
		}
	}
	s.listing.done(svc)
}

// relist adds svc, which has just beaten, to the list of services again, once a minute:
// somebody may have taken it off. Outside of a Cluster the script that lets an instance
// in puts it there first.
func (s *Store) relist(ctx context.Context, svc Service) {
	if s.keys.cluster || svc == canary || !s.listing.again(svc) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, s.listing.timeout)
	defer cancel()
	if s.rdb.SAdd(ctx, s.keys.Services(), string(svc)).Err() == nil {
		s.listing.done(svc)
	}
}

// node is what to ask for what no key says, such as the clock.
func (s *Store) node(ctx context.Context) (redis.UniversalClient, error) {
	if c, ok := s.rdb.(*redis.ClusterClient); ok {
		return c.MasterForKey(ctx, s.keys.Config())
	}
	return s.rdb, nil
}

// primaries returns a client of each primary of a Cluster that has slots, in the
// order of their addresses; else the only one there is.
func (s *Store) primaries(ctx context.Context) ([]redis.UniversalClient, error) {
	c, ok := s.rdb.(*redis.ClusterClient)
	if !ok {
		return []redis.UniversalClient{s.rdb}, nil
	}
	var mu sync.Mutex
	var nodes []redis.UniversalClient
	if err := c.ForEachMaster(ctx, func(_ context.Context, node *redis.Client) error {
		mu.Lock()
		defer mu.Unlock()
		nodes = append(nodes, node)
		return nil
	}); err != nil {
		return nil, fmt.Errorf("find the primaries: %w", err)
	}
	slices.SortFunc(nodes, func(a, b redis.UniversalClient) int { return cmp.Compare(addrOf(a), addrOf(b)) })
	return nodes, nil
}

func addrOf(node redis.UniversalClient) string {
	c, ok := node.(*redis.Client)
	if !ok {
		return ""
	}
	return c.Options().Addr
}

// ping asks nodes of a Cluster at random, until one answers.
func (s *Store) ping(ctx context.Context) error {
	if !s.keys.cluster {
		return s.rdb.Ping(ctx).Err()
	}
	var err error
	for range pingTries {
		tctx, cancel := context.WithTimeout(ctx, pingTimeout)
		err = s.rdb.Ping(tctx).Err()
		cancel()
		if err == nil {
			return nil
		}
	}
	return err
}

// subscribe listens on any node of a Cluster: each hears every announcement.
// go-redis by itself would choose the primary of the channel's slot, whose death
// would cost everybody the subscription.
func (s *Store) subscribe(ctx context.Context) *redis.PubSub {
	ps := s.rdb.Subscribe(ctx)
	_ = ps.Ping(ctx)                        // connects; if that node is dead, the next call tries the slot's primary
	_ = ps.Subscribe(ctx, s.keys.Changes()) // Receive says if it failed
	return ps
}

// versionsEach reads the counters of each service by itself, all at a time, so
// that a shard that hangs costs one time-out.
func (s *Store) versionsEach(ctx context.Context, svcs []Service) (Versions, error) {
	type answer struct {
		Versions
		err error
	}
	answers := make([]answer, len(svcs))
	var asking sync.WaitGroup
	for i, svc := range svcs {
		asking.Go(func() { answers[i].Versions, answers[i].err = s.Of(svc).Versions(ctx, svcs[i:i+1]) })
	}
	asking.Wait()
	v := Versions{Of: map[Service]int64{}, tokens: map[Service]Token{}, timesOf: map[Service][2]time.Duration{}}
	var failed error
	for i, svc := range svcs {
		if err := answers[i].err; err != nil {
			failed = err
			continue
		}
		v.Of[svc], v.tokens[svc], v.timesOf[svc] = answers[i].Of[svc], answers[i].Token(svc), answers[i].times
	}
	if len(v.Of) == 0 && failed != nil {
		return Versions{}, failed // one of many that are alike
	}
	return v, nil
}
