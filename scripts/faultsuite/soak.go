package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"text/tabwriter"
	"time"

	"github.com/redis/go-redis/v9"
)

// soakSize is how many instances a soak has, give or take soakSway.
const soakSize, soakSway = 20, 4

// soakFaults are those of the suite that a world outlives, so that another can
// follow, and two more.
var soakFaults = append([]fault{
	{name: "client-kill", bound: 3, what: "CLIENT KILL of every connection", play: func(w *world) {
		for _, kind := range []string{"normal", "pubsub"} {
			w.must(w.rdb.Do(w.ctx, "CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes").Err())
		}
	}},
	{name: "snapshot", bound: 3, what: "Redis restarts with the data of two heartbeats ago", play: func(w *world) {
		data := w.snapshot()
		w.sleep(2 * w.beat)
		w.restart(data)
	}},
}, chosen("empty", "flushall", "epoch-lost", "old-snapshot", "stop", "stop-short", "stutter", "busy", "oom", "noreplicas", "readonly", "maxclients", "script-flush",
	"half-open", "half-open-all", "half-cut", "all-cut", "reaper-stop", "reaper-killed", "all-stale", "sidecar-restart", "rolling", "flapping", "reload",
	"haproxy-killed", "haproxy-hung", "socket-gone", "lbsync-killed", "lbsync-stop", "cold-start", "all-restart")...)

func chosen(names ...string) []fault {
	var out []fault
	for _, f := range faults {
		if slices.Contains(names, f.name) {
			out = append(out, f)
		}
	}
	return out
}

// soak is one long run: a churn of instances, and a random fault now and then.
type soak struct {
	*world
	random  *rand.Rand
	history history
	did     map[string]int
	slowest time.Duration // of the dead, out of the registry
	rows    []row
}

// runSoak plays for this long, and reports.
func runSoak(length, least, most time.Duration, seed uint64, real bool) (ok bool, err error) {
	dir, err := os.MkdirTemp("", "rc")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(dir)
	binary := filepath.Join(dir, "rollcall")
	if out, err := exec.Command("go", "build", "-o", binary, "./cmd/rollcall").CombinedOutput(); err != nil {
		return false, fmt.Errorf("build: %w\n%s", err, out)
	}
	if seed == 0 {
		seed = rand.Uint64()
	}
	fmt.Printf("seed %d, %v, a fault every %v to %v\n", seed, length, least, most)
	w := &world{play: newPlay("soak"), ttl: 3 * time.Second, beat: time.Second, slots: 2 * soakSize, monitored: true}
	if real {
		w.ttl, w.beat = 15*time.Second, 5*time.Second
	}
	defer w.close()
	s := &soak{world: w, random: rand.New(rand.NewPCG(seed, seed)), did: map[string]int{}}
	var before, after map[string]usage
	w.do(func() {
		w.rollcall = binary
		w.setup(fault{again: true})
		w.traffic = startTraffic(w.play, w.cast.ha.Addr("be"))
		for len(w.cast.members) < soakSize {
			w.cast.join()
		}
		ctx, cancel := context.WithCancel(w.ctx)
		w.Cleanup(func() { cancel(); w.watching.Wait() })
		w.watching.Go(func() { s.history.watch(ctx, w) })
		s.calm(10 * w.beat)
		before = s.usage()
		for begun := time.Now(); time.Since(begun) < length; {
			s.calm(least + time.Duration(s.random.Int64N(int64(most-least)+1)))
			s.fault(soakFaults[s.random.IntN(len(soakFaults))])
		}
		s.calm(10 * w.beat)
		after = s.usage()
	})
	if s.Failed() {
		if err := s.keep(); err != nil {
			return false, err
		}
	}
	return s.report(before, after), nil
}

// keep writes what everybody said, and what the registry and HAProxy have, into a
// directory that stays, and says where.
func (s *soak) keep() error {
	dir, err := os.MkdirTemp("", "rollcall-soak-")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*lookTimeout)
	defer cancel()
	var found strings.Builder
	for _, key := range s.rdb.Keys(ctx, s.cast.key("*")).Val() {
		for _, command := range [][]any{{"zrange", key, 0, -1, "withscores"}, {"hgetall", key}, {"get", key}, {"xrange", key, "-", "+"}} {
			if v, err := s.rdb.Do(ctx, command...).Result(); err == nil {
				fmt.Fprintln(&found, key, v)
			}
		}
	}
	text, err := ask(s.cast.ha.Socket, "show servers state be;show stat be 4 -1")
	fmt.Fprintln(&found, text, err)
	files := map[string]string{"found": found.String()}
	c := s.cast
	c.mu.Lock()
	for i, p := range c.spawned {
		p.mu.Lock()
		files[fmt.Sprintf("%04d-%s.log", i, p.args[0])] = strings.Join(p.args, " ") + "\n" + p.out.String()
		p.mu.Unlock()
	}
	c.mu.Unlock()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	fmt.Println("logs:", dir)
	return nil
}

// calm lets instances come and go for d, ends when all is right.
func (s *soak) calm(d time.Duration) {
	w, c := s.world, s.cast
	sent := s.failures()
	for begun := time.Now(); time.Since(begun) < d; w.sleep(time.Duration(s.random.Int64N(int64(w.beat)))) {
		var alive []*member
		for _, m := range c.members {
			if !m.dead {
				alive = append(alive, m)
			}
		}
		m := alive[s.random.IntN(len(alive))]
		what := []string{"join", "leave", "die", "restart"}[s.random.IntN(4)]
		if len(alive) <= soakSize-soakSway {
			what = "join"
		} else if len(alive) >= soakSize+soakSway && what == "join" {
			what = "leave"
		}
		s.did[what]++
		switch what {
		case "join":
			c.join()
		case "leave":
			w.until("everybody serves", 20*w.beat, c.right)
			// That may be by an earlier sidecar's heartbeats: a new one, told to stop
			// before its first, has nothing to take back.
			w.until("the sidecar of "+m.addr.String()+" has registered", 20*w.beat, func() error {
				if !slices.ContainsFunc(m.sidecar.said(), func(l map[string]any) bool { return l["message"] == "registered" }) {
					return fmt.Errorf("%v", m.sidecar.said())
				}
				return nil
			})
			c.mu.Lock()
			m.dead = true
			c.mu.Unlock()
			m.sidecar.end(w, 15) // SIGTERM
		case "die":
			// One at a time, so that no protection holds it.
			w.until("everybody serves", 20*w.beat, c.right)
			c.die(m)
			died, disarmed := time.Now(), false
			w.until(m.addr.String()+" is out of the registry", 4*w.ttl, func() error {
				disarmed = disarmed || !c.armed() // for a TTL at least, so that a look finds it
				c.mu.Lock()
				defer c.mu.Unlock()
				if !c.seen.known || slices.Contains(c.seen.listed, m.addr.String()) {
					return errors.New("it is listed")
				}
				return nil
			})
			out := time.Since(died)
			if disarmed {
				s.did["die while a reaper disarms"]++
				break // there is no bound
			}
			if out > w.ttl+time.Second+lookEvery {
				w.Errorf("%s was out %v after it died, and every reaper was armed", m.addr, out)
			}
			s.slowest = max(s.slowest, out)
		case "restart":
			if m.sidecar.over() == 1 {
				w.Errorf("the sidecar of %s has ended by itself: %v", m.addr, m.sidecar.said())
			}
			m.sidecar.end(w, 9) // SIGKILL
			c.beat(m)
		}
	}
	w.until("all is right", 20*w.beat, c.right)
	s.blame("the churn", sent, 0)
	c.mu.Lock()
	dead := slices.Collect(func(yield func(*member) bool) {
		for _, m := range c.members {
			if m.dead && !yield(m) {
				return
			}
		}
	})
	c.members = slices.DeleteFunc(c.members, func(m *member) bool { return m.dead })
	// The plays take the first reaper.
	slices.SortStableFunc(c.reapers, func(a, b *process) int { return cmp.Compare(a.over(), b.over()) })
	c.mu.Unlock()
	for _, m := range dead {
		m.app.Close()
	}
}

// over is 1 if p has ended.
func (p *process) over() int {
	select {
	case <-p.done:
		return 1
	default:
		return 0
	}
}

func (s *soak) failures() int {
	_, failed, _ := s.traffic.count()
	return failed
}

// blame makes requests that failed since then somebody's.
func (s *soak) blame(what string, before, allowed int) {
	if _, failed, why := s.traffic.count(); failed-before > allowed {
		s.Errorf("%d requests failed in %s: %s", failed-before, what, why)
	}
}

// fault plays one fault, and waits until all is right.
func (s *soak) fault(f fault) {
	w, c := s.world, s.cast
	failed := s.failures()
	wasRedis, wasHAProxy, wasRevived := c.losses()
	fmt.Fprintf(os.Stderr, "%s %s: %s\n", time.Now().Format(time.TimeOnly), f.name, f.what)
	f.play(w)
	w.ended()
	w.until("all is right after "+f.name, f.limit(w.ttl)+w.ttl, c.right)
	right := time.Since(w.over)
	for {
		c.mu.Lock()
		live := 0
		for _, p := range c.reapers {
			live += 1 - p.over()
		}
		c.mu.Unlock()
		if live >= 2 {
			break
		}
		c.reap()
	}
	s.blame(f.name, failed, f.fails)
	redis, haproxy, revived := c.losses()
	r := row{Name: f.name, Redis: redis - wasRedis, HAProxy: haproxy - wasHAProxy, Revived: revived - wasRevived, Failed: s.failures() - failed, Right: right.Seconds(), Bound: (f.limit(w.ttl) + w.ttl).Seconds()}
	if r.lost() > 0 {
		w.Errorf("%s: %d alive were taken out of redis, %d of haproxy, %d dead were taken in", f.name, r.Redis, r.HAProxy, r.Revived)
	}
	s.rows = append(s.rows, r)
}

// history checks the registry's versions.
type history struct {
	looks, changes, histories int
}

// state is one look.
type state struct {
	replid, epoch string
	version       int64
	members       []string
}

// watch looks until ctx ends. A version goes back in another history only, and
// nothing changes without it.
func (h *history) watch(ctx context.Context, w *world) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	var last state
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now, err := look(ctx, w.rdb, w.cast)
		if err != nil {
			continue // unknown
		}
		h.looks++
		same := now.replid == last.replid && now.epoch == last.epoch
		changed := !slices.Equal(now.members, last.members)
		switch {
		case !same:
			h.histories++
		case now.version < last.version:
			w.Errorf("the version went back from %d to %d", last.version, now.version)
		case changed && now.version == last.version:
			w.Errorf("the members changed without the version %d: %v, %v", now.version, last.members, now.members)
		case changed:
			h.changes++
		}
		last = now
	}
}

func look(ctx context.Context, rdb redis.UniversalClient, c *cast) (state, error) {
	var info, epoch, version *redis.StringCmd
	var members *redis.StringSliceCmd
	_, err := rdb.TxPipelined(ctx, func(p redis.Pipeliner) error {
		info, epoch, version = p.Info(ctx, "replication"), p.Get(ctx, c.key("epoch")), p.Get(ctx, c.key("{web}:version"))
		members = p.ZRange(ctx, c.key("{web}:instances"), 0, -1)
		return nil
	})
	if err != nil && !errors.Is(err, redis.Nil) {
		return state{}, err
	}
	s := state{epoch: epoch.Val(), members: slices.Sorted(slices.Values(members.Val()))}
	_, s.replid, _ = strings.Cut(info.Val(), "master_replid:")
	s.replid, _, _ = strings.Cut(s.replid, "\r")
	if v := version.Val(); v != "" {
		if s.version, err = strconv.ParseInt(v, 10, 64); err != nil {
			return state{}, err
		}
	}
	return s, nil
}

// usage is what processes of one role have, the most of any of them.
type usage struct{ processes, goroutines, files, kilobytes int }

// usage asks every process that runs.
func (s *soak) usage() map[string]usage {
	c := s.cast
	roles := map[string][]*process{"lbsync": {c.lbsync}}
	c.mu.Lock()
	for _, p := range c.reapers {
		if p.over() == 0 {
			roles["reap"] = append(roles["reap"], p)
		}
	}
	for _, m := range c.members {
		roles["register"] = append(roles["register"], m.sidecar)
	}
	c.mu.Unlock()
	out := map[string]usage{}
	for role, ps := range roles {
		u := usage{processes: len(ps)}
		for _, p := range ps {
			m, err := scrape(p.monitor, 10*lookTimeout)
			if err != nil {
				s.Errorf("metrics of %s: %v", role, err)
				continue
			}
			u.goroutines = max(u.goroutines, int(m["go_goroutines"]))
			u.files = max(u.files, int(m["process_open_fds"]))
			u.kilobytes = max(u.kilobytes, int(m["process_resident_memory_bytes"]/1024))
		}
		out[role] = u
	}
	return out
}

func scrape(addr string, timeout time.Duration) (map[string]float64, error) {
	client := http.Client{Timeout: timeout}
	resp, err := client.Get("http://" + addr + "/metrics")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	defer client.CloseIdleConnections()
	out := map[string]float64{}
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), " ")
		if v, err := strconv.ParseFloat(value, 64); err == nil {
			out[name] = v
		}
	}
	return out, lines.Err()
}

var monitors atomic.Uint32

// monitorAddr is a new process's own address for its metrics.
func monitorAddr() string {
	n, pid := monitors.Add(1), os.Getpid()
	return fmt.Sprintf("127.%d.%d.%d:9464", 216+pid&31, n/250&255, n%250+1)
}

// report prints what happened, and tells whether all of it is allowed.
func (s *soak) report(before, after map[string]usage) bool {
	tw := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "FAULT\tREDIS\tHAPROXY\tFAILED\tRIGHT AFTER\tBOUND")
	for _, r := range s.rows {
		fmt.Fprintf(tw, "%s\t%d\t%d\t%d\t%.1f s\t%.1f s\n", r.Name, r.Redis, r.HAProxy, r.Failed, r.Right, r.Bound)
	}
	fmt.Fprintln(tw, "\nROLE\tGOROUTINES\tFILES\tRSS kB\tOF")
	for _, role := range slices.Sorted(maps.Keys(after)) {
		b, a := before[role], after[role]
		fmt.Fprintf(tw, "%s\t%d → %d\t%d → %d\t%d → %d\t%d\n", role, b.goroutines, a.goroutines, b.files, a.files, b.kilobytes, a.kilobytes, a.processes)
		if a.goroutines > b.goroutines+5 || a.files > b.files+5 || a.kilobytes > b.kilobytes*3/2+10_000 {
			s.Errorf("%s grew", role)
		}
	}
	_ = tw.Flush() // to standard output
	sent, failed := 0, 0
	if s.traffic != nil {
		s.traffic.stop()
		sent, failed, _ = s.traffic.count()
	}
	redis, haproxy, revived := s.cast.losses()
	fmt.Printf("\nalive and taken out of redis %d, of haproxy %d; dead and taken in %d; requests %d, failed %d; the slowest of the dead was out after %.2f s (TTL %v)\n",
		redis, haproxy, revived, sent, failed, s.slowest.Seconds(), s.ttl)
	fmt.Printf("%d looks at the registry, %d changes, %d histories; churn %v\n", s.history.looks, s.history.changes, s.history.histories, s.did)
	for _, what := range s.world.failures() {
		fmt.Println("WRONG:", what)
	}
	return !s.Failed()
}
