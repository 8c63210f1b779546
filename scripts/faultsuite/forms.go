package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"

	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// primary is the name by which Sentinels know the primary.
const primary = "mymaster"

// sentinels is a stage: a primary and a replica, watched by three Sentinels
// that take a primary for down after a second. Everybody asks the Sentinels.
func sentinels(w *world) {
	w.srv = redistest.Start(w, "--appendonly", "yes", "--repl-diskless-sync-delay", "0")
	w.second = w.srv.StartReplica(w)
	var addrs []string
	for range 3 {
		s := w.srv.StartSentinel(w, primary)
		w.sentinels, addrs = append(w.sentinels, s), append(addrs, s.Addr)
	}
	w.url = "redis+sentinel://" + strings.Join(addrs, ",") + "/" + primary + "/0"
	for _, s := range w.sentinels {
		asked := redis.NewSentinelClient(&redis.Options{Addr: s.Addr, MaxRetries: -1})
		w.Cleanup(func() { _ = asked.Close() })
		w.until("the Sentinels know each other and the replica", 20*time.Second, func() error {
			m, err := asked.Master(w.ctx, primary).Result()
			if err == nil && (m["num-slaves"] != "1" || m["num-other-sentinels"] != "2") {
				err = fmt.Errorf("%s replicas, %s others", m["num-slaves"], m["num-other-sentinels"])
			}
			return err
		})
	}
}

// cluster is a stage: three primaries, each with a third of the slots.
func cluster(w *world) {
	w.nodes = redistest.StartCluster(w, 3, "--appendonly", "yes", "--appendfsync", "always")
	w.url = w.nodes.URL()
	w.srv = w.nodes[w.nodes.Shard(w, "{web}")]
	rdb := redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{w.srv.Addr}, MaxRedirects: 3, DisableIdentity: true})
	w.Cleanup(func() { _ = rdb.Close() })
	w.rdb = rdb
}

// taken waits until the replica has taken over, faces it, and returns how long
// that took. Sentinels whose votes are split try again 10 s later.
func (w *world) taken() (took time.Duration) {
	rdb, begun := w.second.Client(w), time.Now()
	w.until("the replica takes over", time.Minute, func() error {
		if info := rdb.Info(w.ctx, "replication").Val(); !strings.Contains(info, "role:master") {
			return errors.New(info)
		}
		return nil
	})
	w.face(w.second.Addr)
	return time.Since(begun)
}

// The longest time without writes in a fail-over, and what of it may be ours
// if the Sentinels themselves need longer.
const (
	outage  = 4 * time.Second
	ownPart = 1500 * time.Millisecond
)

// failover has fail start a fail-over, and waits until the replica has taken
// over. Somebody writes all the while, as everybody reaches Redis: it fails the
// fault if none of the writes was accepted for too long.
func (w *world) failover(fail func()) {
	end := w.writes()
	fail()
	took := w.taken()
	w.sleep(w.beat) // until the writer has found it
	silent := end()
	w.Logf("without a write for %v; the Sentinels took %v", silent.Round(time.Millisecond), took.Round(time.Millisecond))
	if most := max(outage, took+ownPart); silent > most {
		w.Errorf("no write was accepted for %v, want at most %v", silent, most)
	}
}

// writes has somebody write all the time. What it returns ends that, and
// returns the longest time without an accepted write.
func (w *world) writes() (end func() time.Duration) {
	rdb, err := registrar.Open(w.url, 1)
	w.must(err)
	stop, ended := make(chan struct{}), make(chan struct{})
	var longest time.Duration
	go func() {
		defer close(ended)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		last := time.Now()
		for {
			tctx, cancel := registrar.WithTimeout(w.ctx)
			err := rdb.Set(tctx, "probe", 1, 0).Err()
			cancel()
			now := time.Now()
			longest = max(longest, now.Sub(last))
			if err == nil {
				last = now
			}
			select {
			case <-stop:
				return
			case <-tick.C:
			}
		}
	}()
	return func() time.Duration {
		close(stop)
		<-ended
		_ = rdb.Close()
		return longest
	}
}

// otherShard returns the index of a primary that does not hold the service, if
// it can be that of the list of services.
func (w *world) otherShard() int {
	own := w.nodes.Shard(w, "{web}")
	if i := w.nodes.Shard(w, w.cast.key("services")); i != own {
		return i
	}
	return (own + 1) % len(w.nodes)
}

// migrate moves the slot of the service to another primary, key by key.
func (w *world) migrate() {
	from := w.srv
	to := w.nodes[w.otherShard()]
	src, dst := from.Client(w), to.Client(w)
	slot, err := src.ClusterKeySlot(w.ctx, "{web}").Result()
	w.must(err)
	fromID, err := src.ClusterMyID(w.ctx).Result()
	w.must(err)
	toID, err := dst.ClusterMyID(w.ctx).Result()
	w.must(err)
	w.must(dst.Do(w.ctx, "CLUSTER", "SETSLOT", slot, "IMPORTING", fromID).Err())
	w.must(src.Do(w.ctx, "CLUSTER", "SETSLOT", slot, "MIGRATING", toID).Err())
	for {
		keys, err := src.ClusterGetKeysInSlot(w.ctx, int(slot), 1).Result()
		w.must(err)
		if len(keys) == 0 {
			break
		}
		w.must(src.Migrate(w.ctx, to.Host, "6379", keys[0], 0, 5*time.Second).Err())
		w.sleep(w.beat / 10)
	}
	for _, s := range w.nodes {
		w.must(s.Client(w).Do(w.ctx, "CLUSTER", "SETSLOT", slot, "NODE", toID).Err())
	}
	w.srv = to
	w.face(to.Addr)
}
