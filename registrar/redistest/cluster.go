package redistest

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// Cluster is the primaries of a Redis Cluster, as it was started.
type Cluster []*Server

// slots is how many a Cluster has; see Redis' cluster specification.
const slots = 16384

// StartCluster runs a Cluster of n primaries with equal shares of the slots, in
// that order. A slot whose primary is dead stops nothing but itself.
func StartCluster(tb testing.TB, n int, args ...string) Cluster {
	tb.Helper()
	c := make(Cluster, n)
	for i := range c {
		c[i] = startNode(tb, args...)
	}
	ctx := tb.Context()
	for i, s := range c {
		rdb := s.Client(tb)
		err := errors.Join(
			rdb.ClusterAddSlotsRange(ctx, i*slots/n, (i+1)*slots/n-1).Err(),
			rdb.Do(ctx, "CLUSTER", "SET-CONFIG-EPOCH", i+1).Err(),
		)
		for _, other := range c[:i] {
			err = errors.Join(err, rdb.ClusterMeet(ctx, other.Host, "6379").Err())
		}
		if err != nil {
			tb.Fatal(err)
		}
	}
	for _, s := range c {
		rdb := s.Client(tb)
		poll(tb, func() error {
			shards, err := rdb.ClusterShards(ctx).Result()
			info := rdb.ClusterInfo(ctx).Val()
			shards = slices.DeleteFunc(shards, func(s redis.ClusterShard) bool { return len(s.Slots) == 0 })
			if len(shards) != n || !strings.Contains(info, "cluster_state:ok") {
				return fmt.Errorf("%s knows %d of %d parts of the Cluster: %v\n%s", s.Addr, len(shards), n, err, info)
			}
			return nil
		})
	}
	return c
}

func startNode(tb testing.TB, args ...string) *Server {
	tb.Helper()
	s := prepare(tb, args...)
	s.args = append(s.args, "--cluster-enabled", "yes", "--cluster-announce-ip", s.Host,
		"--cluster-require-full-coverage", "no", "--cluster-node-timeout", "1000")
	s.Launch(tb)
	tb.Cleanup(func() { s.Kill(tb) })
	return s
}

// poll calls ok until it returns nil.
func poll(tb testing.TB, ok func() error) {
	tb.Helper()
	pollFor(tb, readyTimeout, ok)
}

func pollFor(tb testing.TB, limit time.Duration, ok func() error) {
	tb.Helper()
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ok()
		if err == nil {
			return
		}
		select {
		case <-deadline.C:
			tb.Fatalf("still after %v: %v", limit, err)
		case <-tick.C:
		}
	}
}

// StartReplica runs a replica of the primary s, which every primary may vote
// for. args are those of the Cluster.
func (c Cluster) StartReplica(tb testing.TB, s *Server, args ...string) *Server {
	tb.Helper()
	r, ctx := startNode(tb, append(args, "--repl-diskless-sync-delay", "0")...), tb.Context()
	rdb := r.Client(tb)
	for _, other := range c {
		if err := rdb.ClusterMeet(ctx, other.Host, "6379").Err(); err != nil {
			tb.Fatal(err)
		}
	}
	primary := s.id(tb)
	// It does not know the primary before they have shaken hands.
	poll(tb, func() error { return rdb.ClusterReplicate(ctx, primary).Err() })
	me := r.id(tb)
	for _, other := range append(Cluster{r}, c...) {
		of := other.Client(tb)
		poll(tb, func() error {
			nodes, err := of.ClusterNodes(ctx).Result()
			if err != nil {
				return err
			}
			for line := range strings.Lines(nodes) {
				if f := strings.Fields(line); len(f) > 3 && f[0] == me && strings.Contains(f[2], "slave") && f[3] == primary {
					return nil
				}
			}
			return fmt.Errorf("%s does not know the replica %s:\n%s", other.Addr, me, nodes)
		})
	}
	poll(tb, func() error {
		info, err := rdb.Info(ctx, "replication").Result()
		if err != nil || !strings.Contains(info, "master_link_status:up") {
			return fmt.Errorf("%w\n%s", err, info)
		}
		return nil
	})
	return r
}

// id is the node's name in its Cluster.
func (s *Server) id(tb testing.TB) string {
	tb.Helper()
	id, err := s.Client(tb).ClusterMyID(tb.Context()).Result()
	if err != nil {
		tb.Fatal(err)
	}
	return id
}

// Move moves the slot of key, as redis-cli --cluster reshard does. Half way, when
// each node has some of its keys, it calls between.
func (c Cluster) Move(tb testing.TB, key string, from, to *Server, between func()) {
	tb.Helper()
	ctx := tb.Context()
	source, target := from.Client(tb), to.Client(tb)
	slot, err := source.ClusterKeySlot(ctx, key).Result()
	if err == nil {
		err = target.Do(ctx, "CLUSTER", "SETSLOT", slot, "IMPORTING", from.id(tb)).Err()
	}
	if err == nil {
		err = source.Do(ctx, "CLUSTER", "SETSLOT", slot, "MIGRATING", to.id(tb)).Err()
	}
	if err != nil {
		tb.Fatal(err)
	}
	// move moves all keys, or every second.
	move := func(step int) {
		keys, err := source.ClusterGetKeysInSlot(ctx, int(slot), 10000).Result()
		if err != nil {
			tb.Fatal(err)
		}
		slices.Sort(keys)
		for i := 0; i < len(keys); i += step {
			if err := source.Migrate(ctx, to.Host, "6379", keys[i], 0, 5*time.Second).Err(); err != nil {
				tb.Fatalf("move %s: %v", keys[i], err)
			}
		}
	}
	move(2)
	between()
	move(1)
	for _, s := range append(Cluster{to, from}, c...) {
		if err := s.Client(tb).Do(ctx, "CLUSTER", "SETSLOT", slot, "NODE", to.id(tb)).Err(); err != nil && !strings.Contains(err.Error(), "to a replica") {
			tb.Fatal(err)
		}
	}
}

// URL is the Cluster's address as --redis takes it.
func (c Cluster) URL() string {
	addrs := make([]string, len(c))
	for i, s := range c {
		addrs[i] = s.Addr
	}
	return "redis+cluster://" + strings.Join(addrs, ",")
}

// Shard returns the index of the primary that key is on.
func (c Cluster) Shard(tb testing.TB, key string) int {
	tb.Helper()
	slot, err := c[0].Client(tb).ClusterKeySlot(tb.Context(), key).Result()
	if err != nil {
		tb.Fatal(err)
	}
	for i := range c {
		if int(slot) < (i+1)*slots/len(c) {
			return i
		}
	}
	return len(c) - 1
}
