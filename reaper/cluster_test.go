package reaper

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"

	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// shards is a register on a Redis Cluster, with services on each shard.
type shards struct {
	nodes redistest.Cluster
	store *registrar.Store
	rdb   redis.UniversalClient
	names [][]registrar.Service // of each shard
	all   []registrar.Service
}

func newShards(tb testing.TB) *shards {
	tb.Helper()
	// A killed node comes back with its data, and every score in it is old.
	s := &shards{nodes: redistest.StartCluster(tb, 3, "--appendonly", "yes", "--appendfsync", "always")}
	s.store, s.rdb = s.open(tb)
	s.names = make([][]registrar.Service, len(s.nodes))
	for n := 0; len(s.all) < 2*len(s.nodes); n++ {
		svc := registrar.Service(fmt.Sprintf("s%d", n))
		if i := s.nodes.Shard(tb, "{"+string(svc)+"}"); len(s.names[i]) < 2 {
			s.names[i], s.all = append(s.names[i], svc), append(s.all, svc)
		}
	}
	return s
}

func (s *shards) open(tb testing.TB) (*registrar.Store, redis.UniversalClient) {
	tb.Helper()
	rdb, err := registrar.Open(s.nodes.URL(), 8)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := rdb.Close(); err != nil {
			tb.Error(err)
		}
	})
	store, err := registrar.NewStore(rdb, registrar.DefaultNamespace)
	if err != nil {
		tb.Fatal(err)
	}
	return store, rdb
}

// cluster returns a Cluster with canaries as the command's.
func (s *shards) cluster(tb testing.TB, cfg Config, log zerolog.Logger) *Cluster {
	tb.Helper()
	store, _ := s.open(tb)
	c, err := NewCluster(cfg, store, func(svc registrar.Service) (Store, Canary) {
		return store.Of(svc), func(ctx context.Context) error {
			node, err := store.Node(ctx, svc)
			if err != nil {
				return err
			}
			rdb, err := registrar.Access{}.OpenNode(s.nodes.URL(), node, 1)
			if err != nil {
				return err
			}
			defer rdb.Close()
			return store.Of(svc).On(rdb).Canary(ctx)
		}
	}, log)
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

// live runs n beaters of every service until the test ends.
func (s *shards) live(tb testing.TB, n int, interval time.Duration) {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(tb.Context()))
	var wg sync.WaitGroup
	for _, svc := range s.all {
		own, _ := s.open(tb)
		for i := range n {
			b, err := registrar.NewBeater(registrar.BeaterConfig{Service: svc, Addr: netip.MustParseAddrPort(liveAddr(i)), Weight: 1, Interval: interval}, own, zerolog.Nop())
			if err != nil {
				tb.Fatal(err)
			}
			wg.Go(func() {
				if err := b.Run(ctx); err != nil {
					tb.Error(err)
				}
			})
		}
	}
	tb.Cleanup(func() {
		cancel()
		wg.Wait()
	})
}

func liveAddr(i int) string { return fmt.Sprintf("10.0.0.%d:80", i+1) }

// dies writes an instance of svc that beats now and never again.
func (s *shards) dies(tb testing.TB, svc registrar.Service, addr string) (at int64) {
	tb.Helper()
	eventually(tb, func() (err error) {
		if at, _, err = s.store.Of(svc).Clock(tb.Context()); err != nil {
			return err
		}
		return s.rdb.ZAdd(tb.Context(), s.store.Keys().Instances(svc), redis.Z{Score: float64(at), Member: addr}).Err()
	})
	return at
}

// gone waits until addr has been reaped, and returns when, unix ms.
func (s *shards) gone(tb testing.TB, svc registrar.Service, addr string) (at int64) {
	tb.Helper()
	eventually(tb, func() error {
		note, err := s.rdb.HGet(tb.Context(), s.store.Keys().Gone(svc), addr).Result()
		if err != nil {
			return fmt.Errorf("%s of %s: %w", addr, svc, err)
		}
		_, err = fmt.Sscanf(note, "expired %d", &at)
		return err
	})
	return at
}

// eventuallyArmed waits until the reapers of svcs are armed.
func (c *Cluster) eventuallyArmed(tb testing.TB, svcs []registrar.Service) {
	tb.Helper()
	eventually(tb, func() error {
		for _, svc := range svcs {
			if _, known := c.fleet.count(svc); !known {
				return fmt.Errorf("%s is not armed", svc)
			}
		}
		return nil
	})
}

// wantLive fails if one of the first n instances of svcs was ever taken out, or
// is not there.
func (s *shards) wantLive(tb testing.TB, svcs []registrar.Service, n int) {
	tb.Helper()
	for _, svc := range svcs {
		snap, err := s.store.Read(tb.Context(), svc, nil)
		if err != nil {
			tb.Error(err)
			continue
		}
		here := 0
		for _, e := range snap.Entries {
			if e.Present && e.Addr.Addr().String() < "10.0.0.9" {
				here++
			}
			if e.Gone != nil && e.Addr.Addr().String() < "10.0.0.9" {
				tb.Errorf("%s of %s, which lives, went: %+v", e.Addr, svc, e.Gone)
			}
		}
		if here != n {
			tb.Errorf("%d instances of %s, want %d", here, svc, n)
		}
	}
}

// TestClusterShardOutage has a shard hang or die for two TTL. The services of
// the others lose their dead meanwhile, and only these; of the shard's own
// nothing goes, not even when it is back with all its scores too old.
func TestClusterShardOutage(t *testing.T) {
	const ttl, interval, n = 3 * time.Second, time.Second, 4
	for _, way := range []string{"hangs", "is dead"} {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			s := newShards(t)
			s.live(t, n, interval)
			var log logBuffer
			c := s.cluster(t, Config{ID: "r1", TTL: ttl, Interval: interval}, zerolog.New(&log))
			run(t, c)
			c.eventuallyArmed(t, s.all)
			down := s.nodes.Shard(t, s.store.Keys().Services()) // without the list, too
			ours, others := s.names[down], slices.Concat(s.names[(down+1)%3], s.names[(down+2)%3])
			end := func() { s.nodes[down].Signal(t, syscall.SIGCONT) }
			if way == "hangs" {
				s.nodes[down].Signal(t, syscall.SIGSTOP)
			} else {
				s.nodes[down].Kill(t)
				end = func() { s.nodes[down].Launch(t) }
			}
			begun, before := time.Now(), len(log.lines("not armed"))
			died := s.dies(t, others[0], "10.0.0.9:80")
			late := time.Duration(s.gone(t, others[0], "10.0.0.9:80")-died)*time.Millisecond - ttl
			t.Logf("a dead instance on another shard was out %v after its TTL", late)
			// A reaper that gets no processor for a pulse's deadline, 200 ms here,
			// cannot tell that from a Redis that refuses beats, and says that it is
			// not armed.
			var disarmed []string
			for _, l := range log.lines("not armed")[before:] {
				if strings.Contains(l, fmt.Sprintf("%q:%q", "of", others[0])) {
					disarmed = append(disarmed, l)
				}
			}
			if late < 0 { // how late is for the benchmark and the faults
				t.Errorf("out %v before its TTL", -late)
			}
			for _, l := range disarmed {
				if !strings.Contains(l, "timeout") && !strings.Contains(l, "deadline exceeded") && !strings.Contains(l, causeSlow) && !strings.Contains(l, causeGap) && !strings.Contains(l, causeReap) {
					t.Errorf("not for want of a processor: %s", l)
				}
			}
			waits := slices.Clone(others) // a slow pulse disarms for a moment: each must have been armed once
			eventually(t, func() error {
				if time.Since(begun) < 2*ttl {
					return errors.New("the outage is too short")
				}
				waits = slices.DeleteFunc(waits, func(svc registrar.Service) bool { _, known := c.fleet.count(svc); return known })
				if len(waits) > 0 {
					return fmt.Errorf("the reapers of %q are not armed, and another's shard %s", waits, way)
				}
				return nil
			})
			for _, svc := range ours {
				if _, known := c.fleet.count(svc); known {
					t.Errorf("the reaper of %s is armed, and its shard %s", svc, way)
				}
			}
			s.wantLive(t, others, n)
			end()
			c.eventuallyArmed(t, s.all)
			s.dies(t, ours[0], "10.0.0.9:80")
			t.Logf("armed again %v after the outage began", time.Since(begun))
			s.gone(t, ours[0], "10.0.0.9:80")
			s.wantLive(t, s.all, n)
			if held := log.lines("too many look dead"); len(held) > 0 {
				t.Errorf("held: %q", held)
			}
		})
	}
}

// TestClusterFleet lets one instance of each service die at once: for each
// service that is a lone death, for all of them together it is too much.
func TestClusterFleet(t *testing.T) {
	const ttl, interval, n = 3 * time.Second, time.Second, 4
	s := newShards(t)
	s.live(t, n, interval)
	var log logBuffer
	c := s.cluster(t, Config{ID: "r1", TTL: ttl, Interval: interval}, zerolog.New(&log))
	run(t, c)
	c.eventuallyArmed(t, s.all)
	for _, svc := range s.all {
		s.dies(t, svc, "10.0.0.9:80")
	}
	eventually(t, func() error {
		if n := len(log.lines("too many look dead")); n < len(s.all) {
			return fmt.Errorf("%d of %d services are held", n, len(s.all))
		}
		return nil
	})
	if went := log.lines("took out"); len(went) > 0 {
		t.Errorf("went: %q", went)
	}
	s.wantLive(t, s.all, n)
}

// TestClusterTimesSet has another process change the times of all services: the first
// goes on with them, says so once, and reaps a service that comes later.
func TestClusterTimesSet(t *testing.T) {
	t.Parallel()
	const ttl, interval = 1500 * time.Millisecond, 500 * time.Millisecond
	s := newShards(t)
	s.live(t, 1, interval)
	var log logBuffer
	c := s.cluster(t, Config{ID: "r1", TTL: ttl, Interval: interval}, zerolog.New(&log))
	end := run(t, c)
	c.eventuallyArmed(t, s.all)
	other := run(t, s.cluster(t, Config{ID: "r2", TTL: 2 * ttl, Interval: 2 * interval, SetTTL: true}, zerolog.Nop()))
	eventually(t, func() error {
		for svc, st := range statuses(c) {
			if st.Armed {
				return fmt.Errorf("the reaper of %s goes on with the old times", svc)
			}
		}
		return nil
	})
	if err := other(); err != nil {
		t.Error(err)
	}
	const late = "late"
	if _, err := s.store.Beat(t.Context(), late, registrar.Beat{Addr: netip.MustParseAddrPort("10.0.0.9:80"), Token: "t", Meta: `{"id":"t"}`}); err != nil {
		t.Fatal(err)
	}
	s.gone(t, late, "10.0.0.9:80")
	s.wantLive(t, s.all, 1)
	if n := len(log.lines("other times")); n != 1 {
		t.Errorf("%d lines of the times", n)
	}
	if err := end(); err != nil {
		t.Error(err)
	}
}

func statuses(c *Cluster) map[registrar.Service]registrar.ReaperStatus {
	of, _ := c.Status()
	return of
}

// TestClusterOnce sweeps once: what can be swept is, and what cannot is an
// error.
func TestClusterOnce(t *testing.T) {
	const ttl, interval = 3 * time.Second, time.Second
	s := newShards(t)
	for _, svc := range s.all {
		if _, err := s.store.Beat(t.Context(), svc, registrar.Beat{Addr: netip.MustParseAddrPort("10.0.0.9:80"), Token: "t", Meta: `{"id":"t"}`}); err != nil {
			t.Fatal(err)
		}
	}
	down := (s.nodes.Shard(t, s.store.Keys().Services()) + 1) % 3
	if s.nodes.Shard(t, s.store.Keys().Config()) == down {
		down = (down + 1) % 3
	}
	c := s.cluster(t, Config{ID: "r1", TTL: ttl, Interval: interval}, zerolog.Nop())
	if _, err := c.services(t.Context()); err != nil { // and the map of the Cluster
		t.Fatal(err)
	}
	s.nodes[down].Kill(t)
	report, err := c.Once(t.Context(), false)
	if !errors.Is(err, ErrNeverArmed) || report.Armed {
		t.Errorf("%+v, %v, want an error", report, err)
	}
	for range 3 { // a busy machine may have been too slow for the proof of some
		if len(report.Removed) < 4 {
			more, err := c.Once(t.Context(), false)
			t.Log(err)
			report.Removed = append(report.Removed, more.Removed...)
		}
	}
	if len(report.Removed) != 4 {
		t.Errorf("%+v, want 4 services of the living shards", report)
	}
	for _, svc := range s.names[down] {
		for _, r := range report.Removed {
			if r.Service == svc {
				t.Errorf("%s went from a dead shard", svc)
			}
		}
	}
}

// TestClusterSlotStuck has a slot move half way and back again. Meanwhile, for
// more than a TTL, no beat is accepted, and nothing but the instances' key is
// elsewhere: the pulse must see that.
func TestClusterSlotStuck(t *testing.T) {
	t.Parallel()
	const ttl, interval, n = 1500 * time.Millisecond, 500 * time.Millisecond, 1 // which the protection does not hold
	s := newShards(t)
	s.live(t, n, interval)
	var log logBuffer
	c := s.cluster(t, Config{ID: "r1", TTL: ttl, Interval: interval}, zerolog.New(&log))
	run(t, c)
	c.eventuallyArmed(t, s.all)
	ctx, svc := t.Context(), s.names[0][0]
	key := s.store.Keys().Instances(svc)
	from, to := s.nodes[0], s.nodes[1]
	source, target := from.Client(t), to.Client(t)
	slot, err := source.ClusterKeySlot(ctx, key).Result()
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{
		target.Do(ctx, "CLUSTER", "SETSLOT", slot, "IMPORTING", source.ClusterMyID(ctx).Val()).Err(),
		source.Do(ctx, "CLUSTER", "SETSLOT", slot, "MIGRATING", target.ClusterMyID(ctx).Val()).Err(),
		source.Migrate(ctx, to.Host, "6379", key, 0, time.Second).Err(),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	// A slow pulse of a busy machine disarms for a moment: each other must have
	// been armed once since.
	begun, waits := time.Now(), slices.DeleteFunc(slices.Clone(s.all), func(other registrar.Service) bool { return other == svc })
	eventually(t, func() error {
		if time.Since(begun) < 2*ttl {
			return errors.New("it is too early")
		}
		if _, known := c.fleet.count(svc); known {
			t.Fatalf("the reaper of %s is armed, and no beat is accepted", svc)
		}
		waits = slices.DeleteFunc(waits, func(other registrar.Service) bool { _, known := c.fleet.count(other); return known })
		if len(waits) > 0 {
			return fmt.Errorf("the reapers of %q were not armed since another's slot moves", waits)
		}
		return nil
	})
	for _, err := range []error{
		source.Do(ctx, "CLUSTER", "SETSLOT", slot, "STABLE").Err(),
		target.Do(ctx, "MIGRATE", from.Host, "6379", key, 0, 1000, "REPLACE").Err(),
		target.Do(ctx, "CLUSTER", "SETSLOT", slot, "STABLE").Err(),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	c.eventuallyArmed(t, s.all)
	s.wantLive(t, s.all, n)
	if went := log.lines("took out"); len(went) > 0 {
		t.Errorf("went: %q", went)
	}
}
