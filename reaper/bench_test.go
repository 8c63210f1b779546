package reaper

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"

	"rollcall/registrar"
)

// fill writes n instances of svc that beat at the given time, with metadata.
func (g *registry) fill(b *testing.B, svc registrar.Service, n int, at int64) {
	b.Helper()
	ctx := b.Context()
	pipe := g.rdb.Pipeline()
	beats, meta := make([]redis.Z, n), make([]any, 0, 2*n)
	for i := range n {
		addr := fmt.Sprintf("10.%d.%d.%d:80", i/62500, i/250%250, i%250)
		beats[i] = redis.Z{Score: float64(at), Member: addr}
		meta = append(meta, addr, `{"id":"DTCKFYOWYZCXVJCQ2RBMVBOGHG","weight":100,"zone":"a","tags":{"commit":"4f1c"}}`)
	}
	pipe.ZAdd(ctx, g.keys.Instances(svc), beats...)
	pipe.HSet(ctx, g.keys.Meta(svc), meta...)
	pipe.SAdd(ctx, g.keys.Services(), string(svc))
	if _, err := pipe.Exec(ctx); err != nil {
		b.Fatal(err)
	}
}

// cpu is what Redis has used of it.
func (g *registry) cpu(b *testing.B) time.Duration {
	b.Helper()
	var sum float64
	for line := range strings.Lines(g.rdb.Info(b.Context(), "cpu").Val()) {
		for _, what := range []string{"used_cpu_sys:", "used_cpu_user:"} {
			if v, ok := strings.CutPrefix(strings.TrimSpace(line), what); ok {
				s, err := strconv.ParseFloat(v, 64)
				if err != nil {
					b.Fatal(err)
				}
				sum += s
			}
		}
	}
	return time.Duration(sum * float64(time.Second))
}

// watchBlocking has Redis note how long each script held it, and returns how
// the times of those with so many keys are reported. They are of the wall clock,
// so a busy machine shows in the longest.
func (g *registry) watchBlocking(b *testing.B, keys int) (report func()) {
	b.Helper()
	ctx := b.Context()
	for _, kv := range [][2]string{{"slowlog-max-len", "100000"}, {"slowlog-log-slower-than", "0"}} {
		if err := g.rdb.ConfigSet(ctx, kv[0], kv[1]).Err(); err != nil {
			b.Fatal(err)
		}
	}
	return func() {
		b.Helper()
		if err := g.rdb.ConfigSet(ctx, "slowlog-log-slower-than", "-1").Err(); err != nil {
			b.Fatal(err)
		}
		log, err := g.rdb.SlowLogGet(ctx, -1).Result()
		if err != nil {
			b.Fatal(err)
		}
		var took []time.Duration
		for _, l := range log {
			if strings.HasPrefix(strings.ToLower(l.Args[0]), "eval") && l.Args[2] == strconv.Itoa(keys) {
				took = append(took, l.Duration)
			}
		}
		slices.Sort(took)
		if len(took) == 0 {
			b.Fatal("no script was noted")
		}
		b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "ms-blocked-p50")
		b.ReportMetric(float64(took[len(took)-1].Microseconds())/1000, "ms-blocked-max")
	}
}

// BenchmarkIdleSweep sweeps 1,000 services of 1,000 who all beat.
func BenchmarkIdleSweep(b *testing.B) {
	g := newRegistry(b)
	r := newReaper(b, Config{}, g.store, zerolog.Nop())
	arm(b, r)
	for i := range 1000 {
		g.fill(b, registrar.Service(fmt.Sprint("s", i)), 1000, r.proof.now)
	}
	mustSweep(b, r)
	before := g.cpu(b)
	b.ResetTimer()
	for range b.N {
		if report := mustSweep(b, r); report.Members != 1_000_000 || report.Suspects > 0 {
			b.Fatalf("%+v", report)
		}
	}
	b.StopTimer()
	used := (g.cpu(b) - before) / time.Duration(b.N)
	b.ReportMetric(float64(used.Microseconds())/1000, "ms-redis/op")
	b.ReportMetric(100*float64(used)/float64(DefaultSweep*9/10), "%core") // jitter shortens
	report := g.watchBlocking(b, 250)
	for range 100 {
		mustPulse(b, r)
		mustSweep(b, r)
	}
	report()
}

// BenchmarkReap10000 takes 10,000 out of a service of 20,000 at once.
func BenchmarkReap10000(b *testing.B) {
	g := newRegistry(b)
	r := newReaper(b, Config{}, g.store, zerolog.Nop())
	report := g.watchBlocking(b, 15) // the keys of reap.lua
	for range b.N {
		b.StopTimer()
		g.fill(b, "web", 20_000, g.clock(b))
		g.fill(b, "web", 10_000, 1)
		mustPulse(b, r)
		cutoff := r.proof.now - r.cfg.TTL.Milliseconds()
		b.StartTimer()
		out, err := r.sweep(b.Context(), cutoff, true, true)
		if err != nil || len(out.Removed) != 1 || len(out.Removed[0].Addrs) != 10_000 {
			b.Fatalf("%v, %d services", err, len(out.Removed))
		}
	}
	b.StopTimer()
	report()
}

// BenchmarkLateness has b.N instances, each in a service of its own, die one
// after the other among 1,000 who live, and measures from the end of the TTL to
// the removal, by Redis' clock.
func BenchmarkLateness(b *testing.B) {
	g := newRegistry(b)
	r := newReaper(b, Config{TTL: registrar.DefaultTTL}, g.store, zerolog.Nop())
	end := run(b, r)
	eventuallyArmed(b, r)
	died := 0
	for _, gap := range []time.Duration{50 * time.Millisecond, 700 * time.Millisecond} {
		b.Run(fmt.Sprint("a death in ", gap), func(b *testing.B) {
			score := map[registrar.Service]int64{}
			beats := time.NewTicker(time.Second)
			defer beats.Stop()
			g.fill(b, "live", 1000, g.clock(b))
			wait := time.NewTimer(0)
			defer wait.Stop()
			var late []time.Duration
			for deadline := time.After(time.Duration(b.N)*gap + time.Minute); len(late) < b.N; {
				select {
				case <-deadline:
					b.Fatalf("%d of %d went; %+v", len(late), b.N, r.Status())
				case <-beats.C:
					g.fill(b, "live", 1000, g.clock(b))
					for svc, at := range score {
						for _, gone := range g.expired(b, svc) {
							late = append(late, ms(gone-at-registrar.DefaultTTL.Milliseconds()))
							delete(score, svc)
						}
					}
				case <-wait.C:
					if len(score)+len(late) < b.N {
						died++
						svc := registrar.Service(fmt.Sprint("d", died))
						score[svc] = g.clock(b)
						g.put(b, svc, "10.1.0.1:80", score[svc])
						wait.Reset(rand.N(2 * gap))
					}
				}
			}
			slices.Sort(late)
			for name, i := range map[string]int{"p50": len(late) / 2, "p99": (len(late) - 1) * 99 / 100, "max": len(late) - 1} {
				b.ReportMetric(float64(late[i].Milliseconds()), "ms-late-"+name)
			}
		})
	}
	if err := end(); err != nil {
		b.Error(err)
	}
}
