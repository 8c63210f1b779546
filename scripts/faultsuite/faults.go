package main

import (
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"

	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// fault is one row of the table. In each, besides, one instance dies silently
// at the beginning and must go: whoever removes nobody at all fails too.
type fault struct {
	name      string
	what      string
	worst     bool         // it belongs to the short form
	redis     []string     // settings of the Redis
	stage     func(*world) // starts something else than one Redis
	again     bool         // there are two reapers
	calm      bool         // nobody dies, or not at the beginning
	lone      bool         // there is one instance only
	unchecked bool         // HAProxy has no health checks
	follow    bool         // sidecars beat at the registry's interval
	among     int          // so many more instances of another service beat
	// alone says that what matters happens within pulses, or needs the machine:
	// nothing else is played meanwhile.
	alone bool
	// bound is the longest time from the fault's end to the right state, in
	// TTL, to which slack comes. Who died is out after one. After a fault that
	// makes all proof void a reaper is armed again after TTL + B, and a hold ends
	// after two heartbeats more: that is two.
	bound float64
	most  time.Duration // a bound that is none of the TTL's; 0 = bound
	// lost says that the registry's times are lost: whoever beats before a reaper
	// writes them again follows the default interval, at any scale.
	lost  bool
	fails int // requests that may fail
	play  func(*world)
	check func(*world) error // what else must be true in the end
}

// limit is the longest time to the right state.
func (f fault) limit(ttl time.Duration) time.Duration {
	if f.most > 0 {
		return f.most
	}
	most := time.Duration(f.bound*float64(ttl)) + slack
	if f.lost {
		most += registrar.DefaultInterval - ttl/3
	}
	return most
}

// slack is for what is none of the TTL's: HAProxy's checks, time-outs of 1 s,
// polls, a busy machine.
const slack = 3 * time.Second

var faults = []fault{
	// Redis itself.
	{name: "empty", worst: true, lost: true, bound: 2, what: "Redis restarts without its data",
		play: func(w *world) { w.restart(nil) }},
	{name: "flushall", lost: true, bound: 2, what: "somebody empties Redis",
		play: func(w *world) { w.must(w.rdb.FlushAll(w.ctx).Err()) }},
	{name: "epoch-lost", bound: 2, what: "somebody deletes the epoch",
		play: func(w *world) { w.delete("epoch") }},
	{name: "old-snapshot", worst: true, bound: 2, what: "Redis restarts with data of three ages, up to an hour",
		play: func(w *world) {
			data := w.snapshot()
			for i, age := range []time.Duration{20 * time.Second, time.Minute, 5 * time.Hour} {
				if i < 2 { // the last time so fast that no pulse fails
					w.srv.Kill(w)
					w.sleep(w.ttl / 8)
				}
				w.restart(w.aged(data, w.scaled(age)))
				w.sleep(w.beat * 11 / 10)
			}
		}},
	{name: "restart-between", calm: true, alone: true, bound: 2, what: "Redis restarts with old data between a reaper's pulse and its removal",
		play: func(w *world) {
			data := w.aged(w.snapshot(), w.scaled(time.Minute))
			w.dies()
			w.between(func() { w.restart(data) })
		}},
	{name: "restart-pulse", calm: true, alone: true, bound: 2, what: "the same, with data that has the pulse, and not the heartbeat of one who came back after it",
		play: func(w *world) {
			for _, c := range w.casts() {
				c.members[1].sidecar.signal(syscall.SIGSTOP)
			}
			at := w.dies()
			for _, c := range w.casts() {
				w.beaten(c, c.members[1], at)
			}
			w.between(func() {
				data := w.snapshot()
				for _, c := range w.casts() {
					c.members[1].sidecar.signal(syscall.SIGCONT)
				}
				w.until("they are back", w.ttl/15, func() error {
					for _, c := range w.casts() {
						if score, err := w.rdb.ZScore(w.ctx, c.key("{web}:instances"), c.members[1].addr.String()).Result(); err != nil || int64(score) == at {
							return fmt.Errorf("score %.0f: %w", score, errors.Join(err))
						}
					}
					return nil
				})
				w.restart(data)
			})
		}},
	{name: "old-note", calm: true, bound: 2, what: "Redis restarts with data in which one has left that is back",
		play: func(w *world) { w.returned(w.restart) }},
	{name: "old-note-start", calm: true, bound: 2, what: "the same, and lbsync restarts too",
		play: func(w *world) { w.returned(w.restartBoth) }},
	{name: "old-list", calm: true, unchecked: true, bound: 2, what: "Redis restarts with data in which one lives that has left; nothing checks it",
		play: func(w *world) { w.left(w.restart) }},
	{name: "old-list-start", calm: true, unchecked: true, bound: 2, what: "the same, and lbsync restarts too",
		play: func(w *world) { w.left(w.restartBoth) }},
	{name: "down", worst: true, bound: 2, redis: []string{"--appendonly", "yes"}, what: "Redis is down for 60 s (1:5: 12 s) and keeps its data",
		play: func(w *world) { w.srv.Kill(w); w.sleep(w.scaled(time.Minute)); w.unlucky(func() { w.srv.Launch(w) }) }},
	{name: "stop", worst: true, bound: 2, what: "Redis is stopped (SIGSTOP) for one and a half TTL",
		play: func(w *world) { w.stopped(w.ttl * 3 / 2) }},
	{name: "stop-short", alone: true, bound: 2, what: "Redis is stopped for half a TTL",
		play: func(w *world) { w.stopped(w.ttl / 2) }},
	{name: "stutter", alone: true, bound: 2, what: "Redis stops for 3/20 of a TTL, ten times",
		play: func(w *world) {
			for range 10 {
				w.stopped(w.ttl * 3 / 20)
				w.sleep(w.ttl / 12)
			}
		}},
	{name: "stalls", bound: 1, what: "Redis stops for 3/20 of a TTL again and again, more often than once in TTL + B: the dead one goes meanwhile",
		play: func(w *world) {
			for range 8 {
				w.stopped(w.ttl * 3 / 20)
				w.sleep(w.ttl * 23 / 20)
			}
			living := w.cast.living()
			w.cast.mu.Lock()
			defer w.cast.mu.Unlock()
			if !slices.Equal(w.cast.seen.listed, living) {
				w.Errorf("after eight stalls the registry lists %v, alive are %v", w.cast.seen.listed, living)
			}
		}},
	{name: "busy", alone: true, bound: 2, what: "somebody's script holds Redis for one and a half TTL",
		play: func(w *world) {
			// It ends by itself; the client's deadline does not end it.
			_ = w.rdb.Eval(w.ctx, `local t = redis.call('TIME') local e = t[1] * 1000 + t[2] / 1000 + ARGV[1]
repeat t = redis.call('TIME') until t[1] * 1000 + t[2] / 1000 >= e`, nil, (w.ttl * 3 / 2).Milliseconds()).Err()
			w.until("redis answers", 3*w.ttl, func() error { return w.rdb.Ping(w.ctx).Err() })
		}},
	{name: "clock-forward", worst: true, stage: shiftable, bound: 2, what: "Redis' clock steps 60 s forward",
		play: func(w *world) { w.shift(time.Minute) }},
	{name: "clock-steps", alone: true, stage: shiftable, bound: 2, what: "Redis' clock steps two TTL forward, eight times: too little for the pulse's key to expire",
		play: func(w *world) {
			for i := range 8 { // for longer than the pause between two sweeps
				w.shift(time.Duration(i+1) * 2 * w.ttl)
				w.sleep(w.beat * 3 / 10)
			}
		}},
	{name: "clock-between", stage: shiftable, calm: true, alone: true, bound: 3, what: "Redis' clock steps 60 s back between a reaper's pulse and its removal",
		play: func(w *world) {
			w.dies()
			w.between(func() { w.shift(-time.Minute); w.sleep(w.ttl / 10) })
		}},
	{name: "clock-edge", stage: shiftable, calm: true, alone: true, bound: 2, what: "Redis' clock steps a tenth of a TTL forward between a reaper's pulse and its removal; one missed two beats",
		play: func(w *world) {
			for _, c := range w.casts() {
				c.members[1].sidecar.signal(syscall.SIGSTOP)
			}
			at := w.dies()
			for _, c := range w.casts() {
				w.beaten(c, c.members[1], at+w.ttl.Milliseconds()/20)
			}
			w.between(func() { w.shift(w.ttl / 10) })
			w.sleep(w.ttl / 30) // the removal is over
			for _, c := range w.casts() {
				c.members[1].sidecar.signal(syscall.SIGCONT)
			}
		}},
	{name: "clock-back", worst: true, stage: shiftable, bound: 3, what: "Redis' clock steps 60 s back",
		play: func(w *world) { w.shift(-time.Minute) }},
	{name: "clock-wild", stage: shiftable, bound: 3, what: "Redis' clock steps an hour forward, and back after a beat",
		play: func(w *world) { w.shift(time.Hour); w.sleep(w.beat); w.shift(0) }},
	{name: "oom", worst: true, bound: 2, what: "Redis is full for one and a half TTL",
		play: func(w *world) { w.config("maxmemory", "1"); w.sleep(w.ttl * 3 / 2); w.config("maxmemory", "0") }},
	{name: "misconf", bound: 2, redis: []string{"--enable-protected-configs", "yes"}, what: "Redis cannot save and refuses writes for two TTL",
		play: func(w *world) {
			dir := filepath.Join(w.srv.Dir, "gone")
			w.must(os.Mkdir(dir, 0o700))
			w.config("dir", dir)
			w.must(os.Remove(dir))
			w.config("save", "3600 1000000")
			w.must(w.rdb.BgSave(w.ctx).Err())
			w.refused("MISCONF")
			w.sleep(2 * w.ttl)
			w.config("stop-writes-on-bgsave-error", "no")
		}},
	{name: "readonly", bound: 2, what: "Redis is a replica for two TTL and refuses writes",
		play: func(w *world) {
			w.must(w.rdb.Do(w.ctx, "REPLICAOF", "127.0.0.1", "1").Err())
			w.refused("READONLY")
			w.sleep(2 * w.ttl)
			w.must(w.rdb.Do(w.ctx, "REPLICAOF", "NO", "ONE").Err())
		}},
	{name: "noreplicas", bound: 2, what: "Redis lacks replicas and refuses writes for two TTL",
		play: func(w *world) {
			w.config("min-replicas-to-write", "1")
			w.refused("NOREPLICAS")
			w.sleep(2 * w.ttl)
			w.config("min-replicas-to-write", "0")
		}},
	{name: "evicted", lost: true, bound: 2, what: "Redis evicts whatever it holds (allkeys-random) for a moment",
		play: func(w *world) {
			w.config("maxmemory-policy", "allkeys-random")
			w.config("maxmemory", "1")
			w.sleep(w.ttl / 10)
			w.config("maxmemory", "0")
		}},
	{name: "maxclients", bound: 2, what: "every sidecar loses its connection and gets none for two TTL",
		play: func(w *world) {
			w.config("maxclients", "1")
			for _, c := range w.casts() {
				c.even.drop()
				c.odd.drop()
			}
			w.sleep(2 * w.ttl)
			w.config("maxclients", "10000")
		}},
	{name: "script-flush", worst: true, alone: true, bound: 1, what: "SCRIPT FLUSH every 10 ms for half a TTL: no beat fails",
		play: func(w *world) {
			for begun := time.Now(); time.Since(begun) < w.ttl/2; w.sleep(10 * time.Millisecond) {
				w.must(w.rdb.ScriptFlush(w.ctx).Err())
			}
		},
		check: func(w *world) error { return w.silent("beat failed") }},
	{name: "version-lost", bound: 2, what: "somebody deletes the versions, and one joins",
		play: func(w *world) { w.delete("version", "{web}:version"); w.cast.join() }},
	{name: "version-garbage", bound: 2, what: "a version is no number for a TTL",
		play: func(w *world) {
			for _, c := range w.casts() {
				w.must(w.rdb.Set(w.ctx, c.key("{web}:version"), "x", 0).Err())
			}
			w.sleep(w.ttl)
			w.delete("{web}:version")
		}},
	{name: "version-max", bound: 2, what: "a version is the greatest number for a TTL",
		play: func(w *world) {
			for _, c := range w.casts() {
				w.must(w.rdb.Set(w.ctx, c.key("{web}:version"), int64(math.MaxInt64), 0).Err())
			}
			w.sleep(w.ttl)
			w.delete("{web}:version")
		}},
	{name: "wrong-type", bound: 2, what: "another service's key has a wrong type: it stops nobody's sweep",
		play: func(w *world) {
			for _, c := range w.casts() {
				w.must(w.rdb.SAdd(w.ctx, c.key("services"), "pay", "bad name").Err())
				w.must(w.rdb.Set(w.ctx, c.key("{pay}:instances"), "x", 0).Err())
			}
		}},
	{name: "garbage", bound: 2, what: "garbage members for a TTL, until somebody deletes them",
		play: func(w *world) {
			garbage := []string{"a\nset server be/s1 state maint", "10.0.0.1", ";", strings.Repeat("x", 1<<16), "[::1"}
			for _, m := range garbage {
				w.must(w.rdb.ZAdd(w.ctx, w.cast.key("{web}:instances"), z(1, m)).Err())
			}
			w.sleep(w.ttl)
			for _, m := range garbage {
				w.must(w.rdb.ZRem(w.ctx, w.cast.key("{web}:instances"), m).Err())
			}
		}},
	{name: "future", bound: 2, what: "the dead one's score is from the year 285428",
		play: func(w *world) {
			for _, c := range w.casts() {
				w.must(w.rdb.ZAdd(w.ctx, c.key("{web}:instances"), z(9e15, c.members[0].addr.String())).Err())
			}
		}},
	{name: "infinite", bound: 2, what: "the dead one's score is infinite",
		play: func(w *world) {
			for _, c := range w.casts() {
				w.must(w.rdb.ZAdd(w.ctx, c.key("{web}:instances"), z(math.Inf(1), c.members[0].addr.String())).Err())
			}
		}},

	// Sentinel and Cluster.
	{name: "sentinel-lag", worst: true, stage: sentinels, bound: 2, what: "a Sentinel fail-over to a replica 1.3 TTL behind (6 s at most); 4 s without writes at most",
		play: func(w *world) {
			way := w.lagging(w.second)
			way.hang()
			w.sleep(min(w.ttl*13/10, 6*time.Second))
			w.failover(func() { w.srv.Kill(w) })
		}},
	{name: "sentinel-stop", stage: sentinels, bound: 2, what: "a Sentinel fail-over from a primary that hangs, which then goes on as if it still were one",
		play: func(w *world) {
			w.failover(func() { w.srv.Signal(w, syscall.SIGSTOP) })
			w.srv.Signal(w, syscall.SIGCONT)
		}},
	{name: "sentinel-switch", stage: sentinels, bound: 2, what: "a Sentinel fail-over by command: the old primary becomes a replica",
		play: func(w *world) {
			asked := redis.NewSentinelClient(&redis.Options{Addr: w.sentinels[0].Addr, MaxRetries: -1})
			defer asked.Close()
			w.failover(func() { w.must(asked.Failover(w.ctx, primary).Err()) })
		}},
	{name: "sentinel-empty", stage: sentinels, lost: true, bound: 2, what: "the primary under Sentinel restarts empty, too fast for a fail-over",
		play: func(w *world) {
			w.srv.Kill(w)
			w.must(os.RemoveAll(filepath.Join(w.srv.Dir, "appendonlydir")))
			w.srv.Launch(w)
		}},
	{name: "sentinel-minority", stage: sentinels, bound: 2, what: "two of three Sentinels are dead and the primary for one and a half TTL: nobody takes over",
		play: func(w *world) {
			w.sentinels[0].Kill(w)
			w.sentinels[1].Kill(w)
			w.srv.Kill(w)
			w.sleep(w.ttl * 3 / 2)
			w.srv.Launch(w)
		}},
	{name: "cluster-other", stage: cluster, bound: 1, what: "another shard of a Redis Cluster is killed, with the list of services: a service's dead go, and nobody else",
		play: func(w *world) { w.nodes[w.otherShard()].Kill(w) }},
	{name: "cluster-hung", stage: cluster, bound: 1, what: "another shard of a Redis Cluster hangs, with the list of services",
		play: func(w *world) {
			w.nodes[w.otherShard()].Signal(w, syscall.SIGSTOP)
			w.Cleanup(func() { w.nodes[w.otherShard()].Signal(w, syscall.SIGCONT) })
		}},
	{name: "cluster-own", stage: cluster, bound: 2, what: "the service's own shard of a Redis Cluster is down for one and a half TTL and keeps its data",
		play: func(w *world) { w.srv.Kill(w); w.sleep(w.ttl * 3 / 2); w.srv.Launch(w) }},
	{name: "cluster-move", stage: cluster, bound: 2, what: "the service's slot moves to another shard of the Redis Cluster, key by key",
		play: func(w *world) { w.migrate() }},

	// Replication.
	{name: "failover-lag", bound: 2, what: "another Redis takes over, 1.3 TTL behind",
		play: func(w *world) {
			replica, way := w.replica()
			way.hang()
			w.sleep(w.ttl * 13 / 10)
			w.promote(replica)
			w.srv.Kill(w)
			w.moved(replica.Addr)
		}},
	{name: "failover", bound: 2, what: "Redis is killed, its replica takes over after half a TTL",
		play: func(w *world) {
			replica, _ := w.replica()
			w.srv.Kill(w)
			w.sleep(w.ttl / 2)
			w.promote(replica)
			w.moved(replica.Addr)
		}},
	{name: "failover-stop", bound: 2, what: "Redis hangs, its replica takes over after half a TTL",
		play: func(w *world) {
			replica, _ := w.replica()
			w.srv.Signal(w, syscall.SIGSTOP)
			w.Cleanup(func() { w.srv.Signal(w, syscall.SIGCONT) })
			w.sleep(w.ttl / 2)
			w.promote(replica)
			w.moved(replica.Addr)
		}},
	{name: "failover-back", bound: 2, what: "fail-over and back to the old one, which stood still",
		play: func(w *world) {
			old := w.srv.Addr
			replica, _ := w.replica()
			w.promote(replica)
			w.moved(replica.Addr)
			w.sleep(w.ttl * 3 / 2)
			w.moved(old)
		}},
	{name: "split-brain", bound: 2, what: "half of the sidecars beat at the old primary for two TTL",
		play: func(w *world) {
			replica, _ := w.replica()
			w.promote(replica)
			for _, c := range w.casts() {
				for _, r := range []*relay{c.even, c.toReap, c.toSync} {
					r.move(replica.Addr)
				}
			}
			w.sleep(2 * w.ttl)
			w.moved(replica.Addr)
		}},

	// The network.
	{name: "half-open", worst: true, bound: 2, what: "lbsync's connections pass nothing any more, silently; one joins",
		play: func(w *world) {
			for _, c := range w.casts() {
				c.toSync.hang()
				c.join()
			}
		}},
	{name: "half-open-late", bound: 1, what: "the same, silent for 3 s; then three join, one after the other, and each is known at once",
		play: func(w *world) {
			for _, c := range w.casts() {
				c.toSync.hang()
			}
			w.sleep(3500 * time.Millisecond) // 3 s, and to subscribe again
			for range 3 {
				for _, c := range w.casts() {
					c.join()
				}
				w.must(w.cast.ready(1500 * time.Millisecond))
				for _, c := range w.mutants {
					c.late = c.late || c.ready(0) != nil
				}
			}
		}},
	{name: "messages-lost", calm: true, most: 6 * time.Second, what: "every message is lost while one joins: 6 s at most",
		play: func(w *world) {
			for _, c := range w.casts() {
				c.toSync.lose()
				c.join()
			}
		}},
	{name: "half-open-all", bound: 2, what: "every connection passes nothing any more, silently",
		play: func(w *world) {
			for _, c := range w.casts() {
				for _, r := range c.ways() {
					r.hang()
				}
			}
		}},
	{name: "half-cut", worst: true, bound: 2, what: "half of the sidecars are cut off for one and a half TTL",
		play: func(w *world) { w.cutOff(w.ttl*3/2, func(c *cast) []*relay { return []*relay{c.odd} }) }},
	{name: "stragglers", bound: 2, what: "half of the sidecars stand still for one and a half TTL, and come back within a heartbeat, one by one",
		play: func(w *world) {
			var odd []*member
			for _, c := range w.casts() {
				for i, m := range c.members {
					if i%2 == 1 {
						odd = append(odd, m)
						m.sidecar.signal(syscall.SIGSTOP)
					}
				}
			}
			w.sleep(w.ttl * 3 / 2)
			for i := range size / 2 { // one of each cast at a time
				for j, m := range odd {
					if j%(size/2) == i {
						m.sidecar.signal(syscall.SIGCONT)
					}
				}
				w.sleep(w.beat / 5)
				if i == size/2-2 {
					w.sleep(w.beat / 2)
				}
			}
		}},
	{name: "small-service", among: 90, bound: 2, what: "half of one service is cut off for one and a half TTL: little among all instances",
		play: func(w *world) { w.cutOff(w.ttl*3/2, func(c *cast) []*relay { return []*relay{c.odd} }) }},
	{name: "last-cut", calm: true, lone: true, unchecked: true, bound: 2, what: "the only sidecar of a service is stopped for two TTL, and nothing checks its instance: HAProxy keeps it",
		play: func(w *world) {
			for _, c := range w.casts() {
				c.lonely(c.members[0])
				c.members[0].sidecar.signal(syscall.SIGSTOP)
			}
			w.sleep(2 * w.ttl)
			for _, c := range w.casts() {
				c.members[0].sidecar.signal(syscall.SIGCONT)
			}
		}},
	{name: "all-cut", bound: 2, what: "every sidecar is cut off for two TTL",
		play: func(w *world) { w.cutOff(2*w.ttl, func(c *cast) []*relay { return []*relay{c.odd, c.even} }) }},
	{name: "lone-cut", bound: 2, what: "one sidecar is stopped for two TTL: the registry may drop it, HAProxy keeps it",
		play: func(w *world) {
			for _, c := range w.casts() {
				c.lonely(c.members[1])
				c.members[1].sidecar.signal(syscall.SIGSTOP)
			}
			w.sleep(2 * w.ttl)
			for _, c := range w.casts() {
				c.members[1].sidecar.signal(syscall.SIGCONT)
			}
		}},
	{name: "reaper-cut", bound: 2, what: "the reaper is cut off for two TTL",
		play: func(w *world) { w.cutOff(2*w.ttl, func(c *cast) []*relay { return []*relay{c.toReap} }) }},
	{name: "lbsync-cut", bound: 2, what: "lbsync is cut off for two TTL while one joins",
		play: func(w *world) {
			w.cast.join()
			w.cutOff(2*w.ttl, func(c *cast) []*relay { return []*relay{c.toSync} })
		}},
	{name: "flaky", alone: true, bound: 2, what: "every connection breaks ten times within two TTL",
		play: func(w *world) {
			for range 10 {
				for _, c := range w.casts() {
					for _, r := range c.ways() {
						r.drop()
					}
				}
				w.sleep(w.ttl / 5)
			}
		}},
	{name: "subscription-killed", alone: true, bound: 2, what: "every subscription is killed every 20 ms for a TTL while one joins",
		play: func(w *world) {
			w.cast.join()
			for begun := time.Now(); time.Since(begun) < w.ttl; w.sleep(20 * time.Millisecond) {
				w.must(w.rdb.ClientKillByFilter(w.ctx, "TYPE", "pubsub").Err())
			}
		}},
	{name: "forged-messages", alone: true, bound: 2, what: "thousands of forged messages while one joins",
		play: func(w *world) {
			w.cast.join()
			for i := range 5000 {
				for _, text := range []string{"", "x y z", fmt.Sprintf("%d web %d", i, 1<<40+i), "9 no-such 1"} {
					w.must(w.rdb.Publish(w.ctx, w.cast.key("changes"), text).Err())
				}
			}
		}},
	{name: "slow-consumer", bound: 2, what: "lbsync stands still until Redis drops it for what it has not read; one joins",
		play: func(w *world) {
			w.cast.lbsync.signal(syscall.SIGSTOP)
			w.until("redis drops the subscriber", 30*time.Second, func() error {
				n, err := w.rdb.Publish(w.ctx, w.cast.key("changes"), strings.Repeat("x", 1<<20)).Result()
				if err == nil && n > int64(len(w.mutants)) {
					err = fmt.Errorf("%d subscribers", n)
				}
				return err
			})
			w.cast.join()
			w.cast.lbsync.signal(syscall.SIGCONT)
		}},

	// Reapers.
	{name: "ten-reapers", worst: true, alone: true, bound: 2, what: "ten reapers, two dead: each goes once",
		play: func(w *world) {
			for range 9 {
				w.cast.reap()
			}
			w.cast.die(w.cast.members[1])
		},
		check: func(w *world) error {
			for _, m := range w.cast.members[:2] {
				n := 0
				for _, a := range w.cast.taken() {
					if a == m.addr.String() {
						n++
					}
				}
				if n != 1 {
					return fmt.Errorf("%s was taken out %d times", m.addr, n)
				}
			}
			return nil
		}},
	{name: "reaper-stop", bound: 2, what: "the reaper is stopped for two TTL",
		play: func(w *world) {
			for _, c := range w.casts() {
				c.reapers[0].signal(syscall.SIGSTOP)
			}
			w.sleep(2 * w.ttl)
			for _, c := range w.casts() {
				c.reapers[0].signal(syscall.SIGCONT)
			}
		}},
	{name: "reaper-blind", bound: 2, what: "the reaper stands still for two TTL, in which Redis refuses writes, and goes on when that is over",
		play: func(w *world) {
			for _, c := range w.casts() {
				c.reapers[0].signal(syscall.SIGSTOP)
			}
			w.config("min-replicas-to-write", "1")
			w.refused("NOREPLICAS")
			w.sleep(2 * w.ttl)
			w.config("min-replicas-to-write", "0")
			for _, c := range w.casts() {
				c.reapers[0].signal(syscall.SIGCONT)
			}
		}},
	{name: "late-removal", calm: true, bound: 2, what: "a removal is on its way for a TTL, and who was to go is back meanwhile",
		play: func(w *world) {
			w.dies()
			w.between(func() {
				for _, c := range w.casts() {
					m := c.members[0]
					c.mark(m, func(m *member) { m.dead = false })
					m.app.SetHealthy(true)
					c.beat(m)
				}
				w.sleep(w.ttl)
			})
		}},
	{name: "ttl-raised", follow: true, bound: 6, what: "another reaper sets four times the TTL and the heartbeat: the first one takes nobody out by its own",
		play: func(w *world) {
			for _, c := range w.casts() {
				c.reapAt(4*w.ttl, 4*w.beat, "--set-ttl")
			}
		}},
	{name: "ttl-lowered", follow: true, bound: 5, what: "eight times the TTL and the heartbeat are the registry's, and a reaper sets them back: who beats by the long ones, and hears of others only when it beats, stays",
		play: func(w *world) {
			for _, c := range w.casts() {
				c.reapAt(8*w.ttl, 8*w.beat, "--set-ttl")
			}
			w.sleep(2 * w.beat) // each has beaten since, and knows
			// Sidecars look for shorter times in between. A client of another language
			// does not: it takes a sidecar's place.
			for _, c := range w.casts() {
				c.members[1].sidecar.end(w, syscall.SIGKILL)
				now, err := w.rdb.Time(w.ctx).Result()
				w.must(err)
				w.beaten(c, c.members[1], now.UnixMilli())
			}
			for _, c := range w.casts() {
				c.reapAt(w.ttl, w.beat, "--set-ttl")
			}
			w.sleep(8*w.beat - w.beat/2)
			for _, c := range w.casts() {
				c.beat(c.members[1])
			}
		}},
	{name: "reaper-killed", bound: 2, what: "the reaper is killed; another comes after two TTL",
		play: func(w *world) {
			for _, c := range w.casts() {
				c.reapers[0].end(w, syscall.SIGKILL)
			}
			w.sleep(2 * w.ttl)
			for _, c := range w.casts() {
				c.reap()
			}
		}},
	{name: "all-stale", worst: true, bound: 2, what: "every sidecar is killed, the instances live; the sidecars come back after one and a half TTL",
		play: func(w *world) {
			w.sidecars(func(_ *cast, m *member) { m.sidecar.end(w, syscall.SIGKILL) })
			w.sleep(w.ttl * 3 / 2)
			w.sidecars(func(c *cast, m *member) { c.beat(m) })
		}},

	// Providers.
	{name: "crash", alone: true, bound: 1, what: "an instance dies: out of the registry by TTL + 1 s",
		play: func(w *world) {
			score, err := w.rdb.ZScore(w.ctx, w.cast.key("{web}:instances"), w.cast.members[0].addr.String()).Result()
			w.must(err)
			w.last = int64(score)
		},
		check: func(w *world) error {
			if n := len(w.cast.taken()); n != 1 {
				return fmt.Errorf("%d were taken out", n)
			}
			var at int64
			note, err := w.rdb.HGet(w.ctx, w.cast.key("{web}:gone"), w.cast.members[0].addr.String()).Result()
			if err == nil {
				_, err = fmt.Sscanf(note, "expired %d", &at)
			}
			if late := time.Duration(at-w.last)*time.Millisecond - w.ttl; err == nil && (late < 0 || late > time.Second) {
				err = fmt.Errorf("it was taken out %v after its TTL", late)
			}
			return err
		}},
	{name: "sidecar-restart", bound: 1, what: "every sidecar is killed and comes back at once",
		play: func(w *world) {
			w.sidecars(func(c *cast, m *member) { m.sidecar.end(w, syscall.SIGKILL); c.beat(m) })
		}},
	{name: "rolling", alone: true, bound: 1, what: "four instances leave in order (SIGTERM), one after the other, and others join",
		play: func(w *world) {
			for _, m := range w.cast.members[1:5] {
				w.cast.join()
				w.must(w.cast.ready(10 * time.Second))
				w.cast.leave(m)
			}
		}},
	{name: "reused-address", bound: 1, what: "a second sidecar takes over the address of one that hangs; the first one's leave must not count",
		play: func(w *world) {
			for _, c := range w.casts() {
				m := c.members[1]
				first := m.sidecar
				first.signal(syscall.SIGSTOP)
				c.beat(m)
				w.sleep(w.beat * 5 / 2) // two missed heartbeats, and some more
				first.signal(syscall.SIGTERM)
				first.end(w, syscall.SIGCONT)
			}
		}},
	{name: "late-beat", calm: true, bound: 1, what: "a first heartbeat is on its way until its instance has come otherwise, and left",
		play: func(w *world) {
			left := make(chan struct{})
			var late []*member
			for _, c := range w.casts() {
				m := c.enroll()
				late = append(late, m)
				m.way.hold(m.addr.String(), func() {
					select {
					case <-left:
					case <-w.ctx.Done():
					}
				})
				c.beat(m)
			}
			w.must(w.cast.ready(10 * time.Second))
			for i, c := range w.casts() {
				c.leave(late[i])
			}
			for _, m := range late {
				m.app.SetHealthy(false)
			}
			close(left)
			w.sleep(w.ttl / 10) // for it to arrive
		}},
	{name: "app-dies", bound: 1, what: "an app fails its sidecar's check: it leaves without anybody's TTL",
		play: func(w *world) {
			m := w.cast.enroll()
			m.check = true
			w.cast.beat(m)
			w.must(w.cast.ready(10 * time.Second))
			w.cast.mark(m, func(m *member) { m.dead = true })
			m.app.SetHealthy(false)
		},
		check: func(w *world) error {
			m := w.cast.members[len(w.cast.members)-1]
			note, err := w.rdb.HGet(w.ctx, w.cast.key("{web}:gone"), m.addr.String()).Result()
			if err != nil || !strings.HasPrefix(note, "unhealthy ") {
				return fmt.Errorf("%s left as %q: %w", m.addr, note, errors.Join(err))
			}
			return nil
		}},
	{name: "log-unread", bound: 2, what: "the readers of all logs stand still for a minute, in which instances come and go, and then are gone",
		stage: func(w *world) { w.srv, w.piped = redistest.Start(w), true },
		play: func(w *world) {
			w.hears(standsStill)
			for _, c := range w.casts() {
				c.join()
			}
			churn := func(most time.Duration) {
				for begun := time.Now(); time.Since(begun) < most; w.sleep(w.beat) {
					m := w.cast.join()
					w.must(w.cast.ready(10 * time.Second))
					w.cast.leave(m)
					for _, c := range w.casts() {
						for _, r := range c.ways() {
							r.drop() // everybody has something to say
						}
					}
				}
			}
			churn(time.Minute)
			for _, c := range w.mutants {
				c.late = c.right() != nil
			}
			w.hears(gone)
			churn(2 * w.ttl)
		},
		check: func(w *world) error {
			for _, p := range append([]*process{w.cast.lbsync}, w.cast.reapers...) {
				select {
				case <-p.done:
					return fmt.Errorf("rollcall %s has ended", strings.Join(p.args, " "))
				default:
				}
			}
			return nil
		}},
	{name: "two-services", bound: 1, what: "another service claims a live address, and leaves",
		play: func(w *world) {
			p := w.cast.spawn(w.cast.even, "register", "--service", "pay", "--addr", w.cast.members[1].addr.String(), "--interval", w.beat.String())
			w.sleep(w.ttl)
			p.end(w, syscall.SIGTERM)
		}},
	{name: "flapping", bound: 2, what: "an instance joins and leaves for two TTL, the others stay",
		play: func(w *world) {
			m := w.cast.join()
			w.cast.mark(m, func(m *member) { m.free = true })
			for begun := time.Now(); time.Since(begun) < 2*w.ttl; {
				m.sidecar.end(w, syscall.SIGTERM)
				w.cast.beat(m)
				w.sleep(100 * time.Millisecond)
			}
		}},

	// HAProxy and lbsync.
	{name: "reload", bound: 2, what: "HAProxy is reloaded three times, with its state file",
		play: func(w *world) {
			for range 3 {
				w.cast.ha.Reload(w)
				w.sleep(w.beat / 2)
			}
		}},
	{name: "haproxy-killed", bound: 2, fails: 1000, what: "HAProxy is killed and started; requests fail until it is back",
		play: func(w *world) {
			for _, c := range w.casts() {
				c.ha.Kill(w)
				c.ha.Restart(w)
				c.forget()
			}
			w.must(w.cast.ready(5 * time.Second)) // long before the dead one's TTL
			for _, c := range w.mutants {
				c.late = c.ready(0) != nil
			}
		}},
	{name: "haproxy-hung", bound: 2, what: "HAProxy is stopped for a TTL while one joins",
		play: func(w *world) {
			w.cast.ha.Stop(w)
			w.cast.join()
			w.sleep(w.scaled(15 * time.Second))
			w.cast.ha.Cont(w)
		}},
	{name: "half-answers", bound: 2, what: "HAProxy's answers end after any number of bytes for a TTL while one joins",
		play: func(w *world) {
			way := w.cast.relayed()
			way.clip(true)
			w.cast.join()
			w.sleep(w.ttl)
			way.clip(false)
		}},
	{name: "socket-gone", bound: 2, what: "HAProxy's socket is away for a TTL while one joins",
		play: func(w *world) {
			away := w.cast.ha.Socket + ".away"
			w.must(os.Rename(w.cast.ha.Socket, away))
			w.cast.join()
			w.sleep(w.ttl)
			w.must(os.Rename(away, w.cast.ha.Socket))
		}},
	{name: "slots-full", bound: 2, what: "more instances than slots",
		play: func(w *world) {
			for range 6 {
				w.cast.join()
			}
		}},
	{name: "human", bound: 2, what: "a human puts a server into maint for a TTL, and ready again: lbsync leaves it alone",
		play: func(w *world) {
			names := map[*cast]string{}
			for _, c := range w.casts() {
				m := c.members[1]
				c.mark(m, func(m *member) { m.free = true })
				names[c] = c.server(m)
				c.ha.Command(w, "set server be/"+names[c]+" state maint")
				// lbsync looks at a server before it changes it, and now it does.
				w.must(w.rdb.HDel(w.ctx, c.key("{web}:meta"), m.addr.String()).Err())
			}
			w.sleep(w.ttl)
			for _, c := range w.casts() {
				c.late = c.serves(c.members[1])
				c.ha.Command(w, "set server be/"+names[c]+" state ready")
			}
			if w.cast.late {
				w.Errorf("%s was in maint by a human's hand, and serves", w.cast.members[1].addr)
			}
		}},
	{name: "drain-last", calm: true, lone: true, bound: 1, what: "an operator drains the only instance, and then another comes and the first is ready again",
		play: func(w *world) {
			word := func(c *cast, verb string) {
				p := c.spawn(c.even, verb, "web", c.members[0].addr.String())
				<-p.done
			}
			for _, c := range w.casts() {
				word(c, "drain")
			}
			w.sleep(w.beat)
			for _, c := range w.casts() {
				c.mark(c.members[0], func(m *member) { m.free = true })
				c.join()
			}
			w.until("the first is drained", 10*time.Second, func() error {
				if w.cast.serves(w.cast.members[0]) {
					return errors.New("it serves")
				}
				return nil
			})
			for _, c := range w.casts() {
				word(c, "ready")
			}
		}},
	{name: "lbsync-killed", bound: 2, what: "lbsync is killed eight times while instances join",
		play: func(w *world) {
			for i := range 8 {
				if i%4 == 0 {
					w.cast.join()
				}
				w.sleep(w.beat / 5)
				w.cast.lbsync.end(w, syscall.SIGKILL)
				w.cast.balance()
			}
		}},
	{name: "lbsync-stop", bound: 2, what: "lbsync is stopped for two TTL while one joins",
		play: func(w *world) {
			w.cast.lbsync.signal(syscall.SIGSTOP)
			w.cast.join()
			w.sleep(2 * w.ttl)
			w.cast.lbsync.signal(syscall.SIGCONT)
		}},
	{name: "two-lbsyncs", bound: 2, what: "a second lbsync on the same HAProxy; the first is killed",
		play: func(w *world) {
			first := w.cast.lbsync
			w.cast.balance()
			w.sleep(w.ttl)
			first.end(w, syscall.SIGKILL)
			w.cast.join()
		}},
	{name: "cold-start", lost: true, bound: 2, what: "Redis restarts empty and lbsync with it",
		play: func(w *world) {
			w.cast.lbsync.end(w, syscall.SIGKILL)
			w.restart(nil)
			w.cast.balance()
		}},
	{name: "start-without-redis", bound: 2, redis: []string{"--appendonly", "yes"}, what: "lbsync restarts while Redis is down for a TTL",
		play: func(w *world) {
			w.srv.Kill(w)
			w.cast.lbsync.end(w, syscall.SIGKILL)
			w.cast.balance()
			w.sleep(w.ttl)
			w.srv.Launch(w)
		}},
	{name: "start-cold", calm: true, bound: 2, fails: 5000, redis: []string{"--appendonly", "yes"}, what: "HAProxy and lbsync restart empty while Redis is down: the last list serves",
		play: func(w *world) {
			w.srv.Kill(w)
			for _, c := range w.casts() {
				c.lbsync.end(w, syscall.SIGKILL)
				c.ha.Kill(w)
				c.ha.Restart(w)
				c.balance()
			}
			w.must(w.cast.ready(10 * time.Second))
			w.sleep(w.beat)
			for _, c := range w.mutants {
				c.late = c.ready(0) != nil
			}
			w.srv.Launch(w)
		}},
	{name: "all-restart", bound: 2, what: "reaper, lbsync and an empty Redis restart together",
		play: func(w *world) {
			w.cast.lbsync.end(w, syscall.SIGKILL)
			w.cast.reapers[0].end(w, syscall.SIGKILL)
			w.restart(nil)
			w.cast.reap()
			w.cast.balance()
		}},
}

func (w *world) must(err error) {
	if err != nil {
		w.Fatal(err)
	}
}

// delete removes keys of every cast.
func (w *world) delete(keys ...string) {
	for _, c := range w.casts() {
		for _, k := range keys {
			w.must(w.rdb.Del(w.ctx, c.key(k)).Err())
		}
	}
}

// refused makes sure that Redis refuses writes with this error now.
func (w *world) refused(with string) {
	w.until("writes are refused with "+with, 10*time.Second, func() error {
		if err := w.rdb.Set(w.ctx, "probe", 1, 0).Err(); err == nil || !strings.HasPrefix(err.Error(), with) {
			return fmt.Errorf("got %w", errors.Join(err))
		}
		return nil
	})
}

// silent fails if a sidecar has said so.
func (w *world) silent(message string) error {
	for _, m := range w.cast.members[1:] {
		for _, l := range m.sidecar.said() {
			if s, _ := l["message"].(string); strings.HasPrefix(s, message) {
				return fmt.Errorf("%s: %v", m.addr, l)
			}
		}
	}
	return nil
}

// sidecars calls f for everybody alive.
func (w *world) sidecars(f func(*cast, *member)) {
	for _, c := range w.casts() {
		for _, m := range c.members {
			if !m.dead {
				f(c, m)
			}
		}
	}
}

// unlucky has end end a fault in such a way that every sidecar's next try comes
// late: within a heartbeat, as the jitter of its retries may have it.
func (w *world) unlucky(end func()) {
	w.sidecars(func(_ *cast, m *member) { m.sidecar.signal(syscall.SIGSTOP) })
	end()
	w.sleep(w.beat * 4 / 5)
	w.sidecars(func(_ *cast, m *member) { m.sidecar.signal(syscall.SIGCONT) })
}

// cutOff takes these ways away for d.
func (w *world) cutOff(d time.Duration, ways func(*cast) []*relay) {
	each := func(f func(*relay)) {
		for _, c := range w.casts() {
			for _, r := range ways(c) {
				f(r)
			}
		}
	}
	each((*relay).cut)
	w.sleep(d)
	each((*relay).join)
}

// replica starts one and returns when it is in step, with the way by which it
// follows.
func (w *world) replica() (*redistest.Server, *relay) {
	w.config("repl-diskless-sync-delay", "0")
	way := newRelay(w.play, w.srv.Addr)
	host, port, _ := strings.Cut(way.addr, ":")
	replica := redistest.Start(w, "--replicaof", host+" "+port)
	w.inStep(replica)
	return replica, way
}

func (w *world) promote(replica *redistest.Server) {
	w.must(replica.Client(w).Do(w.ctx, "REPLICAOF", "NO", "ONE").Err())
}

// aged returns the data with every heartbeat moved into the past.
func (w *world) aged(data []byte, by time.Duration) []byte {
	s := redistest.Start(w)
	s.Kill(w)
	file := filepath.Join(s.Dir, "dump.rdb")
	w.must(os.WriteFile(file, data, 0o600))
	s.Launch(w)
	rdb := s.Client(w)
	for _, c := range w.casts() {
		key := c.key("{web}:instances")
		for _, m := range rdb.ZRange(w.ctx, key, 0, -1).Val() {
			w.must(rdb.ZIncrBy(w.ctx, key, -float64(by.Milliseconds()), m).Err())
		}
		// The reapers' last pulses of then were others.
		for _, key := range rdb.Keys(w.ctx, c.key("reaper:*")).Val() {
			w.must(rdb.SetArgs(w.ctx, key, "then", redis.SetArgs{KeepTTL: true}).Err())
		}
	}
	w.must(rdb.Save(w.ctx).Err())
	aged, err := os.ReadFile(file)
	w.must(err)
	s.Kill(w)
	return aged
}

// lonely notes that m cannot beat for a while.
func (c *cast) lonely(m *member) { c.mark(m, func(m *member) { m.lonely = true }) }

// ready waits until everybody alive serves, for most at most.
func (c *cast) ready(most time.Duration) error {
	for begun := time.Now(); ; c.w.sleep(lookEvery / 2) {
		c.mu.Lock()
		rotation := c.seen.rotation
		c.mu.Unlock()
		i := slices.IndexFunc(c.living(), func(a string) bool { return !rotation[a] })
		if i < 0 {
			return nil
		}
		if time.Since(begun) > most {
			return fmt.Errorf("%s does not serve after %v", c.living()[i], most)
		}
	}
}

// relayed starts lbsync again behind a relay to HAProxy's socket.
func (c *cast) relayed() *relay {
	socket := filepath.Join(c.w.srv.Dir, "relay")
	way := relayOn(c.w.play, "unix", socket, c.ha.Socket)
	c.lbsync.end(c.w, syscall.SIGTERM)
	c.syncing[slices.Index(c.syncing, c.ha.Socket)] = socket
	c.balance()
	return way
}

// serves tells whether HAProxy sends m requests.
func (c *cast) serves(m *member) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.seen.rotation[m.addr.String()]
}

// server returns the name of the server that holds m.
func (c *cast) server(m *member) string {
	for line := range strings.Lines(c.ha.Command(c.w, "show servers state be")) {
		if f := strings.Fields(line); len(f) >= 19 && net.JoinHostPort(f[4], f[18]) == m.addr.String() {
			return f[3]
		}
	}
	c.w.Fatalf("no server holds %s", m.addr)
	return ""
}

// returned has one of each cast leave and come back, and calls restart with the
// data from in between. The one that is back beats a heartbeat later.
func (w *world) returned(restart func(data []byte)) {
	for _, c := range w.casts() {
		c.mark(c.members[1], func(m *member) { m.free = true })
		c.members[1].sidecar.end(w, syscall.SIGTERM)
	}
	data := w.snapshot()
	for _, c := range w.casts() {
		c.beat(c.members[1])
	}
	w.settled()
	for _, c := range w.casts() {
		c.counted(c.members[1])
		c.members[1].sidecar.signal(syscall.SIGSTOP)
	}
	restart(data)
	w.sleep(w.beat)
	for _, c := range w.casts() {
		c.members[1].sidecar.signal(syscall.SIGCONT)
	}
}

// left has one of each cast leave, and calls restart with older data, of two
// TTL ago.
func (w *world) left(restart func(data []byte)) {
	data := w.aged(w.snapshot(), 2*w.ttl)
	for _, c := range w.casts() {
		c.leave(c.members[1])
	}
	w.settled()
	for _, c := range w.casts() {
		c.members[1].app.Close()
	}
	restart(data)
}

// settled waits until all is right, by what is seen from now on.
func (w *world) settled() {
	for _, c := range w.casts() {
		c.forget()
	}
	w.until("all is right", 10*time.Second, func() error {
		for _, c := range w.casts() {
			if err := c.right(); err != nil {
				return err
			}
		}
		return nil
	})
}

// restartBoth is restart, with lbsync.
func (w *world) restartBoth(data []byte) {
	for _, c := range w.casts() {
		c.lbsync.end(w, syscall.SIGKILL)
	}
	w.restart(data)
	for _, c := range w.casts() {
		c.balance()
	}
}

// lagging has a replica follow over a way that can be hung.
func (w *world) lagging(replica *redistest.Server) *relay {
	way := newRelay(w.play, w.srv.Addr)
	host, port, _ := strings.Cut(way.addr, ":")
	w.must(replica.Client(w).Do(w.ctx, "REPLICAOF", host, port).Err())
	w.inStep(replica)
	return way
}

func (w *world) inStep(replica *redistest.Server) {
	rdb := replica.Client(w)
	w.until("the replica is in step", 10*time.Second, func() error {
		info := rdb.Info(w.ctx, "replication").Val()
		if !strings.Contains(info, "master_link_status:up") {
			return errors.New(info)
		}
		return nil
	})
}
