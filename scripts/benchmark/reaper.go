package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"

	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// reaping measures what the reaper costs Redis while everybody beats, how long it
// holds Redis when many go at once, and how late who is dead goes. There is no floor:
// the goals are absolute.
func reaping(h *harness) []Row {
	rows := []Row{idleSweep(h), reapMany(h)}
	for _, gap := range []time.Duration{50 * time.Millisecond, 700 * time.Millisecond} {
		rows = append(rows, lateness(h, gap)...)
	}
	return rows
}

// startReaper starts a reaper and waits until it is armed.
func startReaper(h *harness, srv *redistest.Server, rdb *redis.Client) {
	h.process(h.dir(), h.rollcall(), "reap", "--redis", srv.URL())
	ctx, cancel := context.WithTimeout(context.Background(), loadTimeout)
	defer cancel()
	h.await(loadTimeout, "the reaper is armed", func() error {
		all, err := rdb.HVals(ctx, "rollcall:reapers").Result()
		if err == nil && !strings.Contains(fmt.Sprint(all), `"armed":true`) {
			err = fmt.Errorf("%s", all)
		}
		return err
	})
}

// fillService has n instances of svc beat at that time. They have no metadata, as if
// by ZADD.
func fillService(h *harness, rdb *redis.Client, svc string, n int, at int64) {
	ctx, cancel := context.WithTimeout(context.Background(), loadTimeout)
	defer cancel()
	beats := make([]redis.Z, n)
	for i := range n {
		beats[i] = redis.Z{Score: float64(at), Member: fmt.Sprintf("10.%d.%d.%d:80", i/62500, i/250%250, i%250)}
	}
	if _, err := rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
		p.ZAdd(ctx, "rollcall:{"+svc+"}:instances", beats...)
		p.SAdd(ctx, "rollcall:services", svc)
		return nil
	}); err != nil {
		h.Fatal(err)
	}
}

func fillMeta(h *harness, rdb *redis.Client, svc string, n int) {
	ctx, cancel := context.WithTimeout(context.Background(), loadTimeout)
	defer cancel()
	var metas []any
	for i := range n {
		metas = append(metas, fmt.Sprintf("10.%d.%d.%d:80", i/62500, i/250%250, i%250), meta(fmt.Sprintf("token-%020d", i)))
	}
	if err := rdb.HSet(ctx, "rollcall:{"+svc+"}:meta", metas...).Err(); err != nil {
		h.Fatal(err)
	}
}

func clock(h *harness, rdb *redis.Client) int64 {
	ctx, cancel := context.WithTimeout(context.Background(), changeTimeout)
	defer cancel()
	now, err := rdb.Time(ctx).Result()
	if err != nil {
		h.Fatal(err)
	}
	return now.UnixMilli()
}

// idleSweep has everybody beat once, and looks at Redis for one sweep interval,
// which ends before the TTL does.
func idleSweep(h *harness) Row {
	const services, instances, window = 1000, 1000, 10 * time.Second
	srv := redistest.Start(h)
	rdb := srv.Client(h)
	startReaper(h, srv, rdb)
	var shares []float64
	for range h.runs {
		begun := time.Now()
		for i := range services {
			fillService(h, rdb, fmt.Sprint("s", i), instances, clock(h, rdb))
		}
		if took := time.Since(begun); took > registrar.DefaultTTL-window {
			h.Fatalf("this machine needs %v to have a million beat; those would die while the reaper is measured", took)
		}
		before, begun := busy(h, rdb), time.Now()
		time.Sleep(window)
		shares = append(shares, 100*(busy(h, rdb)-before).Seconds()/time.Since(begun).Seconds())
	}
	return value("reaper/idle", "% of a core", "Redis, with a reaper and 1,000 services of 1,000 who live", 1, shares)
}

// reapMany takes 10,000 out of a service of 20,000, in the calls of a sweep, and
// reads from Redis' own log how long the longest of them took.
func reapMany(h *harness) Row {
	srv := redistest.Start(h)
	rdb := srv.Client(h)
	store, err := registrar.NewStore(rdb, registrar.DefaultNamespace)
	if err != nil {
		h.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), loadTimeout)
	defer cancel()
	if err := errors.Join(rdb.ConfigSet(ctx, "slowlog-max-len", "100000").Err(), rdb.ConfigSet(ctx, "slowlog-log-slower-than", "0").Err()); err != nil {
		h.Fatal(err)
	}
	var held []float64
	for range h.runs {
		fillService(h, rdb, "web", 20_000, clock(h, rdb))
		fillMeta(h, rdb, "web", 10_000)
		fillService(h, rdb, "web", 10_000, 1)
		token := rand.Text()
		pulse, err := store.Pulse(ctx, "bench", token, time.Minute)
		if err != nil {
			h.Fatal(err)
		}
		if err := rdb.SlowLogReset(ctx).Err(); err != nil {
			h.Fatal(err)
		}
		gone := 0
		for left := int64(1); left > 0; {
			r, err := store.Reap(ctx, "web", registrar.Sweep{ID: "bench", Token: token, ReplID: pulse.ReplID, Last: pulse.Now, MaxAge: time.Minute, Cutoff: pulse.Now - 15_000})
			if err != nil {
				h.Fatal(err)
			}
			gone, left = gone+len(r.Addrs), r.Left
		}
		if gone != 10_000 {
			h.Fatalf("%d were taken out, want 10,000", gone)
		}
		log, err := rdb.SlowLogGet(ctx, -1).Result()
		if err != nil {
			h.Fatal(err)
		}
		longest := time.Duration(0)
		for _, l := range log {
			if strings.HasPrefix(strings.ToLower(l.Args[0]), "evalsha") {
				longest = max(longest, l.Duration)
			}
		}
		held = append(held, float64(longest)/float64(time.Millisecond))
	}
	return value("reaper/blocked", "ms", "the longest call while 10,000 of 20,000 go at once", 5, held)
}

// lateness has instances, each in a service of its own, die one after the other among
// 1,000 who live, and measures from the end of the TTL to the removal, which
// announces it, by Redis' clock.
func lateness(h *harness, gap time.Duration) []Row {
	deaths := h.changes
	const ttl = registrar.DefaultTTL
	srv := redistest.Start(h)
	rdb := srv.Client(h)
	ctx, cancel := context.WithTimeout(context.Background(), loadTimeout)
	defer cancel()
	startReaper(h, srv, rdb)
	store, err := registrar.NewStore(rdb, registrar.DefaultNamespace)
	if err != nil {
		h.Fatal(err)
	}
	living := time.NewTicker(time.Second)
	defer living.Stop()
	fillService(h, rdb, "live", 1000, clock(h, rdb))
	scores := map[string]int64{}
	var late []float64
	dying := time.NewTicker(gap)
	defer dying.Stop()
	for died := 0; len(late) < deaths; {
		select {
		case <-ctx.Done():
			h.Fatalf("%d of %d are out: %v", len(late), deaths, ctx.Err())
		case <-dying.C:
			if died == deaths {
				continue
			}
			died++
			svc := fmt.Sprint("d", died)
			if _, err := store.Beat(ctx, registrar.Service(svc), registrar.Beat{Addr: netip.MustParseAddrPort("10.9.0.1:80"), Token: "t", Meta: meta("t"), Agent: "bench"}); err != nil {
				h.Fatal(err)
			}
			score, err := rdb.ZScore(ctx, "rollcall:{"+svc+"}:instances", "10.9.0.1:80").Result()
			if err != nil {
				h.Fatal(err)
			}
			scores[svc] = int64(score)
		case <-living.C:
			fillService(h, rdb, "live", 1000, clock(h, rdb))
			for svc, score := range scores {
				note, err := rdb.HGet(ctx, "rollcall:{"+svc+"}:gone", "10.9.0.1:80").Result()
				if errors.Is(err, redis.Nil) {
					continue
				}
				if f := strings.Fields(note); err == nil && len(f) == 3 {
					at, err := strconv.ParseInt(f[1], 10, 64)
					if err != nil {
						h.Fatal(err)
					}
					late = append(late, float64(at-score-ttl.Milliseconds()))
					delete(scores, svc)
				} else {
					h.Fatalf("%s: note %q, %v", svc, note, err)
				}
			}
		}
	}
	slices.Sort(late)
	name := fmt.Sprintf("reaper/late/%v", gap)
	return []Row{
		value(name, "ms", fmt.Sprintf("from the end of the TTL to the removal, median of %d who die %v after one another", deaths, gap), 20, []float64{late[len(late)/2]}),
		value(name+"/p99", "ms", "the same, p99", 100, []float64{late[min(len(late)*99/100, len(late)-1)]}),
	}
}
