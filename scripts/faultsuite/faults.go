package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"rollcall/registrar/redistest"
)

// fault is one row of the table. In each, besides, one instance dies silently
// at the beginning and must go: whoever removes nobody at all fails too.
type fault struct {
	name  string
	what  string
	worst bool     // it belongs to the short form
	redis []string // settings of the Redis
	clock bool     // the Redis has a clock that can be moved
	again bool     // there are two reapers
	calm  bool     // nobody dies
	// bound is the longest time from the fault's end to the right state, in
	// TTL. Nothing happens within less than TTL + B after a hard fault, and a
	// hold ends after two heartbeats more.
	bound float64
	fails int // requests that may fail
	play  func(*world)
	check func(*world) error // what else must be true in the end
}

var faults = []fault{
	// Redis itself.
	{name: "empty", worst: true, bound: 3, what: "Redis restarts without its data",
		play: func(w *world) { w.restart(nil) }},
	{name: "flushall", bound: 3, what: "somebody empties Redis",
		play: func(w *world) { w.must(w.rdb.FlushAll(w.ctx).Err()) }},
	{name: "epoch-lost", bound: 3, what: "somebody deletes the epoch",
		play: func(w *world) { w.delete("epoch") }},
	{name: "old-snapshot", worst: true, bound: 3, what: "Redis restarts with data of three ages, up to an hour",
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
	{name: "down", worst: true, bound: 3, redis: []string{"--appendonly", "yes"}, what: "Redis is down for 60 s (1:5: 12 s) and keeps its data",
		play: func(w *world) { w.srv.Kill(w); w.sleep(w.scaled(time.Minute)); w.srv.Launch(w) }},
	{name: "stop", worst: true, bound: 3, what: "Redis is stopped (SIGSTOP) for one and a half TTL",
		play: func(w *world) { w.stopped(w.ttl * 3 / 2) }},
	{name: "stop-short", bound: 3, what: "Redis is stopped for half a TTL",
		play: func(w *world) { w.stopped(w.ttl / 2) }},
	{name: "stutter", bound: 3, what: "Redis stops for 3/20 of a TTL, ten times",
		play: func(w *world) {
			for range 10 {
				w.stopped(w.ttl * 3 / 20)
				w.sleep(w.ttl / 12)
			}
		}},
	{name: "busy", bound: 3, what: "somebody's script holds Redis for one and a half TTL",
		play: func(w *world) {
			// It ends by itself; the client's deadline does not end it.
			_ = w.rdb.Eval(w.ctx, `local t = redis.call('TIME') local e = t[1] * 1000 + t[2] / 1000 + ARGV[1]
repeat t = redis.call('TIME') until t[1] * 1000 + t[2] / 1000 >= e`, nil, (w.ttl * 3 / 2).Milliseconds()).Err()
			w.until("redis answers", 3*w.ttl, func() error { return w.rdb.Ping(w.ctx).Err() })
		}},
	{name: "clock-forward", worst: true, clock: true, bound: 3, what: "Redis' clock steps 60 s forward",
		play: func(w *world) { w.shift(time.Minute) }},
	{name: "clock-steps", clock: true, bound: 3, what: "Redis' clock steps two TTL forward, eight times: too little for the pulse's key to expire",
		play: func(w *world) {
			for i := range 8 { // for longer than the pause between two sweeps
				w.shift(time.Duration(i+1) * 2 * w.ttl)
				w.sleep(w.beat * 3 / 10)
			}
		}},
	{name: "clock-back", worst: true, clock: true, bound: 4, what: "Redis' clock steps 60 s back",
		play: func(w *world) { w.shift(-time.Minute) }},
	{name: "clock-wild", clock: true, bound: 4, what: "Redis' clock steps an hour forward, and back after a beat",
		play: func(w *world) { w.shift(time.Hour); w.sleep(w.beat); w.shift(0) }},
	{name: "oom", worst: true, bound: 3, what: "Redis is full for one and a half TTL",
		play: func(w *world) { w.config("maxmemory", "1"); w.sleep(w.ttl * 3 / 2); w.config("maxmemory", "0") }},
	{name: "misconf", bound: 3, redis: []string{"--enable-protected-configs", "yes"}, what: "Redis cannot save and refuses writes for two TTL",
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
	{name: "readonly", bound: 3, what: "Redis is a replica for two TTL and refuses writes",
		play: func(w *world) {
			w.must(w.rdb.Do(w.ctx, "REPLICAOF", "127.0.0.1", "1").Err())
			w.refused("READONLY")
			w.sleep(2 * w.ttl)
			w.must(w.rdb.Do(w.ctx, "REPLICAOF", "NO", "ONE").Err())
		}},
	{name: "noreplicas", bound: 3, what: "Redis lacks replicas and refuses writes for two TTL",
		play: func(w *world) {
			w.config("min-replicas-to-write", "1")
			w.refused("NOREPLICAS")
			w.sleep(2 * w.ttl)
			w.config("min-replicas-to-write", "0")
		}},
	{name: "maxclients", bound: 3, what: "every sidecar loses its connection and gets none for two TTL",
		play: func(w *world) {
			w.config("maxclients", "1")
			for _, c := range w.casts() {
				c.even.drop()
				c.odd.drop()
			}
			w.sleep(2 * w.ttl)
			w.config("maxclients", "10000")
		}},
	{name: "script-flush", worst: true, bound: 2, what: "SCRIPT FLUSH every 10 ms for half a TTL: no beat fails",
		play: func(w *world) {
			for begun := time.Now(); time.Since(begun) < w.ttl/2; w.sleep(10 * time.Millisecond) {
				w.must(w.rdb.ScriptFlush(w.ctx).Err())
			}
		},
		check: func(w *world) error { return w.silent("beat failed") }},
	{name: "version-lost", bound: 3, what: "somebody deletes the versions, and one joins",
		play: func(w *world) { w.delete("version", "{web}:version"); w.cast.join() }},
	{name: "version-garbage", bound: 3, what: "a version is no number for a TTL",
		play: func(w *world) {
			for _, c := range w.casts() {
				w.must(w.rdb.Set(w.ctx, c.key("{web}:version"), "x", 0).Err())
			}
			w.sleep(w.ttl)
			w.delete("{web}:version")
		}},
	{name: "wrong-type", bound: 3, what: "another service's key has a wrong type: it stops nobody's sweep",
		play: func(w *world) {
			for _, c := range w.casts() {
				w.must(w.rdb.SAdd(w.ctx, c.key("services"), "pay", "bad name").Err())
				w.must(w.rdb.Set(w.ctx, c.key("{pay}:instances"), "x", 0).Err())
			}
		}},
	{name: "garbage", bound: 3, what: "garbage members for a TTL, until somebody deletes them",
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
	{name: "future", bound: 3, what: "the dead one's score is from the year 285428",
		play: func(w *world) {
			for _, c := range w.casts() {
				w.must(w.rdb.ZAdd(w.ctx, c.key("{web}:instances"), z(9e15, c.members[0].addr.String())).Err())
			}
		}},

	// Replication.
	{name: "failover-lag", worst: true, bound: 3, what: "another Redis takes over, 1.3 TTL behind",
		play: func(w *world) {
			replica, way := w.replica()
			way.hang()
			w.sleep(w.ttl * 13 / 10)
			w.promote(replica)
			w.srv.Kill(w)
			w.moved(replica.Addr)
		}},
	{name: "failover", bound: 3, what: "Redis is killed, its replica takes over after half a TTL",
		play: func(w *world) {
			replica, _ := w.replica()
			w.srv.Kill(w)
			w.sleep(w.ttl / 2)
			w.promote(replica)
			w.moved(replica.Addr)
		}},
	{name: "failover-stop", bound: 3, what: "Redis hangs, its replica takes over after half a TTL",
		play: func(w *world) {
			replica, _ := w.replica()
			w.srv.Signal(w, syscall.SIGSTOP)
			w.Cleanup(func() { w.srv.Signal(w, syscall.SIGCONT) })
			w.sleep(w.ttl / 2)
			w.promote(replica)
			w.moved(replica.Addr)
		}},
	{name: "failover-back", bound: 3, what: "fail-over and back to the old one, which stood still",
		play: func(w *world) {
			old := w.srv.Addr
			replica, _ := w.replica()
			w.promote(replica)
			w.moved(replica.Addr)
			w.sleep(w.ttl * 3 / 2)
			w.moved(old)
		}},
	{name: "split-brain", bound: 3, what: "half of the sidecars beat at the old primary for two TTL",
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
	{name: "half-open", worst: true, bound: 3, what: "lbsync's connections pass nothing any more, silently; one joins",
		play: func(w *world) {
			for _, c := range w.casts() {
				c.toSync.hang()
				c.join()
			}
		}},
	{name: "half-open-all", bound: 3, what: "every connection passes nothing any more, silently",
		play: func(w *world) {
			for _, c := range w.casts() {
				for _, r := range []*relay{c.even, c.odd, c.toReap, c.toSync} {
					r.hang()
				}
			}
		}},
	{name: "half-cut", worst: true, bound: 3, what: "half of the sidecars are cut off for one and a half TTL",
		play: func(w *world) { w.cutOff(w.ttl*3/2, func(c *cast) []*relay { return []*relay{c.odd} }) }},
	{name: "all-cut", bound: 3, what: "every sidecar is cut off for two TTL",
		play: func(w *world) { w.cutOff(2*w.ttl, func(c *cast) []*relay { return []*relay{c.odd, c.even} }) }},
	{name: "lone-cut", bound: 3, what: "one sidecar is stopped for two TTL: the registry may drop it, HAProxy keeps it",
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
	{name: "reaper-cut", bound: 3, what: "the reaper is cut off for two TTL",
		play: func(w *world) { w.cutOff(2*w.ttl, func(c *cast) []*relay { return []*relay{c.toReap} }) }},
	{name: "lbsync-cut", bound: 3, what: "lbsync is cut off for two TTL while one joins",
		play: func(w *world) {
			w.cast.join()
			w.cutOff(2*w.ttl, func(c *cast) []*relay { return []*relay{c.toSync} })
		}},
	{name: "flaky", bound: 3, what: "every connection breaks ten times within two TTL",
		play: func(w *world) {
			for range 10 {
				for _, c := range w.casts() {
					for _, r := range []*relay{c.even, c.odd, c.toReap, c.toSync} {
						r.drop()
					}
				}
				w.sleep(w.ttl / 5)
			}
		}},
	{name: "subscription-killed", bound: 3, what: "every subscription is killed every 20 ms for a TTL while one joins",
		play: func(w *world) {
			w.cast.join()
			for begun := time.Now(); time.Since(begun) < w.ttl; w.sleep(20 * time.Millisecond) {
				w.must(w.rdb.ClientKillByFilter(w.ctx, "TYPE", "pubsub").Err())
			}
		}},
	{name: "forged-messages", bound: 3, what: "thousands of forged messages while one joins",
		play: func(w *world) {
			w.cast.join()
			for i := range 5000 {
				for _, text := range []string{"", "x y z", fmt.Sprintf("%d web %d", i, 1<<40+i), "9 no-such 1"} {
					w.must(w.rdb.Publish(w.ctx, w.cast.key("changes"), text).Err())
				}
			}
		}},

	// Reapers.
	{name: "ten-reapers", worst: true, bound: 3, what: "ten reapers, two dead: each goes once",
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
	{name: "reaper-stop", bound: 3, what: "the reaper is stopped for two TTL",
		play: func(w *world) {
			for _, c := range w.casts() {
				c.reapers[0].signal(syscall.SIGSTOP)
			}
			w.sleep(2 * w.ttl)
			for _, c := range w.casts() {
				c.reapers[0].signal(syscall.SIGCONT)
			}
		}},
	{name: "reaper-killed", bound: 3, what: "the reaper is killed; another comes after two TTL",
		play: func(w *world) {
			for _, c := range w.casts() {
				c.reapers[0].end(w, syscall.SIGKILL)
			}
			w.sleep(2 * w.ttl)
			for _, c := range w.casts() {
				c.reap()
			}
		}},
	{name: "all-stale", worst: true, bound: 3, what: "every sidecar is killed, the instances live; the sidecars come back after one and a half TTL",
		play: func(w *world) {
			w.sidecars(func(_ *cast, m *member) { m.sidecar.end(w, syscall.SIGKILL) })
			w.sleep(w.ttl * 3 / 2)
			w.sidecars(func(c *cast, m *member) { c.beat(m) })
		}},

	// Providers.
	{name: "crash", bound: 2, what: "an instance dies: out of the registry by TTL + 1 s", play: func(*world) {},
		check: func(w *world) error {
			if n := len(w.cast.taken()); n != 1 {
				return fmt.Errorf("%d were taken out", n)
			}
			return nil
		}},
	{name: "sidecar-restart", bound: 2, what: "every sidecar is killed and comes back at once",
		play: func(w *world) {
			w.sidecars(func(c *cast, m *member) { m.sidecar.end(w, syscall.SIGKILL); c.beat(m) })
		}},
	{name: "rolling", bound: 2, what: "four instances leave in order (SIGTERM), one after the other, and others join",
		play: func(w *world) {
			for _, m := range w.cast.members[1:5] {
				w.cast.join()
				w.must(w.cast.ready())
				w.cast.mu.Lock()
				m.dead = true
				w.cast.mu.Unlock()
				m.sidecar.end(w, syscall.SIGTERM)
			}
		}},
	{name: "reused-address", bound: 2, what: "a second sidecar claims an address; the first one's leave must not count",
		play: func(w *world) {
			for _, c := range w.casts() {
				m := c.members[1]
				first := m.sidecar
				first.signal(syscall.SIGSTOP)
				c.beat(m)
				w.sleep(w.beat)
				first.signal(syscall.SIGTERM)
				first.end(w, syscall.SIGCONT)
			}
		}},
	{name: "two-services", bound: 2, what: "another service claims a live address, and leaves",
		play: func(w *world) {
			p := w.cast.spawn(w.cast.even, "register", "--service", "pay", "--addr", w.cast.members[1].addr.String(), "--interval", w.beat.String())
			w.sleep(w.ttl)
			p.end(w, syscall.SIGTERM)
		}},
	{name: "flapping", bound: 3, what: "an instance joins and leaves for two TTL, the others stay",
		play: func(w *world) {
			m := w.cast.join()
			for begun := time.Now(); time.Since(begun) < 2*w.ttl; {
				w.cast.mu.Lock()
				m.dead = true // it leaves: no loss
				w.cast.mu.Unlock()
				m.sidecar.end(w, syscall.SIGTERM)
				w.cast.beat(m)
				w.sleep(100 * time.Millisecond)
			}
			w.cast.mu.Lock()
			m.dead = false
			w.cast.mu.Unlock()
		}},

	// HAProxy and lbsync.
	{name: "reload", bound: 3, what: "HAProxy is reloaded three times, with its state file",
		play: func(w *world) {
			for range 3 {
				w.cast.ha.Reload(w)
				w.sleep(w.beat / 2)
			}
		}},
	{name: "haproxy-killed", bound: 3, fails: 1000, what: "HAProxy is killed and started; requests fail until it is back",
		play: func(w *world) { w.cast.ha.Kill(w); w.cast.ha.Restart(w) }},
	{name: "haproxy-hung", bound: 3, what: "HAProxy is stopped for a TTL while one joins",
		play: func(w *world) {
			w.cast.ha.Stop(w)
			w.cast.join()
			w.sleep(w.scaled(15 * time.Second))
			w.cast.ha.Cont(w)
		}},
	{name: "socket-gone", bound: 3, what: "HAProxy's socket is away for a TTL while one joins",
		play: func(w *world) {
			away := w.cast.ha.Socket + ".away"
			w.must(os.Rename(w.cast.ha.Socket, away))
			w.cast.join()
			w.sleep(w.ttl)
			w.must(os.Rename(away, w.cast.ha.Socket))
		}},
	{name: "slots-full", bound: 3, what: "more instances than slots",
		play: func(w *world) {
			for range 6 {
				w.cast.join()
			}
		}},
	{name: "lbsync-killed", bound: 3, what: "lbsync is killed eight times while instances join",
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
	{name: "lbsync-stop", bound: 3, what: "lbsync is stopped for two TTL while one joins",
		play: func(w *world) {
			w.cast.lbsync.signal(syscall.SIGSTOP)
			w.cast.join()
			w.sleep(2 * w.ttl)
			w.cast.lbsync.signal(syscall.SIGCONT)
		}},
	{name: "two-lbsyncs", bound: 3, what: "a second lbsync on the same HAProxy; the first is killed",
		play: func(w *world) {
			first := w.cast.lbsync
			w.cast.balance()
			w.sleep(w.ttl)
			first.end(w, syscall.SIGKILL)
			w.cast.join()
		}},
	{name: "cold-start", bound: 3, what: "Redis restarts empty and lbsync with it",
		play: func(w *world) {
			w.cast.lbsync.end(w, syscall.SIGKILL)
			w.restart(nil)
			w.cast.balance()
		}},
	{name: "start-without-redis", bound: 3, redis: []string{"--appendonly", "yes"}, what: "lbsync restarts while Redis is down for a TTL",
		play: func(w *world) {
			w.srv.Kill(w)
			w.cast.lbsync.end(w, syscall.SIGKILL)
			w.cast.balance()
			w.sleep(w.ttl)
			w.srv.Launch(w)
		}},
	{name: "all-restart", bound: 3, what: "reaper, lbsync and an empty Redis restart together",
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
	rdb := replica.Client(w)
	w.until("the replica is in step", 10*time.Second, func() error {
		info := rdb.Info(w.ctx, "replication").Val()
		if !strings.Contains(info, "master_link_status:up") {
			return errors.New(info)
		}
		return nil
	})
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
	}
	w.must(rdb.Save(w.ctx).Err())
	aged, err := os.ReadFile(file)
	w.must(err)
	s.Kill(w)
	return aged
}

// lonely notes that m cannot beat for a while.
func (c *cast) lonely(m *member) {
	c.mu.Lock()
	defer c.mu.Unlock()
	m.lonely = true
}

// ready waits until everybody alive serves.
func (c *cast) ready() error {
	var last error
	for begun := time.Now(); time.Since(begun) < 10*time.Second; c.w.sleep(20 * time.Millisecond) {
		c.mu.Lock()
		rotation := c.seen.rotation
		c.mu.Unlock()
		i := slices.IndexFunc(c.living(), func(a string) bool { return !rotation[a] })
		if i < 0 {
			return nil
		}
		last = fmt.Errorf("%s does not serve", c.living()[i])
	}
	return last
}
