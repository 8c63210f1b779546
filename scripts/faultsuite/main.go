// Command faultsuite plays faults on real servers: a Redis, a HAProxy, the real
// rollcall in every role, and requests all the while. For each fault it counts
// what must not happen: instances alive that were taken out of Redis or of
// HAProxy, dead ones that were taken into it, requests that failed; and it
// measures how long after the fault's end everything was right again.
//
// scripts/faults builds and runs it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/redis/go-redis/v9"
)

// row is a fault's result.
type row struct {
	Name    string   `json:"name"`
	What    string   `json:"what"`
	Redis   int      `json:"alive_taken_out_of_redis"`
	HAProxy int      `json:"alive_taken_out_of_haproxy"`
	Revived int      `json:"dead_taken_into_haproxy"`
	Failed  int      `json:"failed_requests"`
	Sent    int      `json:"requests"`
	Right   float64  `json:"right_after_s"`
	Bound   float64  `json:"bound_s"`
	Verdict string   `json:"verdict"`
	Wrong   []string `json:"wrong,omitempty"`

	Mutants []loss `json:"mutants,omitempty"`
}

func (r row) lost() int { return r.Redis + r.HAProxy + r.Revived }

func main() {
	short := flag.Bool("short", false, "the twelve worst only, without mutants")
	real := flag.Bool("real", false, "at the real scale: TTL 15 s, heartbeat 5 s")
	bare := flag.Bool("no-mutants", false, "without mutants")
	list := flag.Bool("list", false, "print the faults")
	format := flag.String("o", "table", "table or json")
	length := flag.Duration("soak", 0, "play random faults among a churn for this long")
	every := flag.Duration("every", 20*time.Second, "least time between two of them; the most is three times that")
	seed := flag.Uint64("seed", 0, "of the random faults; 0 = a random one")
	long := flag.Duration("for", 0, "a churn without faults for this long; fails on what grows")
	tableFile := flag.String("table", "", "with -for: write the table to this `FILE`, and the samples to FILE.samples, on the way too")
	samples := flag.String("samples", "", "with -for: write the samples to this `FILE`")
	ofFile := flag.String("table-of", "", "print the table of a `FILE` of samples")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: scripts/faults [flags] [NAME…]")
		flag.PrintDefaults()
	}
	flag.Parse()
	redis.SetLogger(quiet{})
	picked, err := pick(flag.Args(), *short)
	if err == nil && *format != "table" && *format != "json" {
		err = fmt.Errorf("-o %q: want table or json", *format)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "faults:", err)
		os.Exit(2)
	}
	if *list {
		for _, f := range picked {
			fmt.Printf("%-20s %s\n", f.name, f.what)
		}
		return
	}
	var ok bool
	if *ofFile != "" {
		ok, err = tableOf(*ofFile)
	} else if *long > 0 {
		ok, err = runGrowth(*long, *tableFile, *samples)
	} else if *length > 0 {
		ok, err = runSoak(*length, *every, 3**every, *seed, *real)
	} else {
		ok, err = run(picked, *real, !*short && !*bare, *format == "json")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "faults:", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}

// quiet drops go-redis' messages on connections that ended with their server.
type quiet struct{}

func (quiet) Printf(context.Context, string, ...any) {}

func pick(names []string, short bool) ([]fault, error) {
	var out []fault
	for _, n := range names {
		i := slices.IndexFunc(faults, func(f fault) bool { return f.name == n })
		if i < 0 {
			return nil, fmt.Errorf("no fault %q; -list prints them", n)
		}
		out = append(out, faults[i])
	}
	if len(names) > 0 {
		return out, nil
	}
	for _, f := range faults {
		if f.worst || !short {
			out = append(out, f)
		}
	}
	return out, nil
}

func run(picked []fault, real, prove, asJSON bool) (ok bool, err error) {
	dir, err := os.MkdirTemp("", "rc")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(dir)
	binary := filepath.Join(dir, "rollcall")
	if out, err := exec.Command("go", "build", "-ldflags=-s -w", "-o", binary, "./cmd/rollcall").CombinedOutput(); err != nil {
		return false, fmt.Errorf("build: %w\n%s", err, out)
	}
	library, err := buildClock(dir)
	if err != nil {
		return false, err
	}
	// Those that are alone come last, so that few others wait beside them, and
	// before them those with mutants, which are built meanwhile.
	rank := func(f fault) int {
		switch {
		case f.alone:
			return 2
		case prove && slices.ContainsFunc(mutants, func(m mutant) bool { return m.fault == f.name }):
			return 1
		}
		return 0
	}
	slices.SortStableFunc(picked, func(a, b fault) int { return rank(a) - rank(b) })
	begun := time.Now()
	rows := make([]row, len(picked))
	// The mutants of the next faults are built, and their servers start and get
	// warm, while others are played.
	type act struct {
		n   int // of the fault
		w   *world
		err error
	}
	built, ready := make(chan act, len(picked)), make(chan act, len(picked))
	house, scene := make(room, 2*casts), make(room, casts)
	var playing sync.WaitGroup
	defer playing.Wait()
	shop := workshop{dir, map[string]string{}}
	playing.Go(func() {
		for n, f := range picked {
			w := &world{play: newPlay(f.name), ttl: 3 * time.Second, beat: time.Second, rollcall: binary, library: library}
			if real {
				w.ttl, w.beat = 15*time.Second, 5*time.Second
			}
			var err error
			if prove {
				w.built, err = shop.build(f.name)
			}
			built <- act{n, w, err}
			if err != nil {
				return
			}
		}
	})
	playing.Go(func() {
		for range picked {
			a := <-built
			if a.err != nil {
				ready <- a
				return
			}
			house.enter(a.w.size())
			playing.Go(func() {
				a.w.do(func() { a.w.setup(picked[a.n]) })
				ready <- a
			})
		}
	})
	for done := range picked {
		a := <-ready
		if a.err != nil {
			return false, a.err
		}
		f, w := picked[a.n], a.w
		cost := w.size()
		if f.alone {
			cost = casts
		}
		scene.enter(cost)
		playing.Go(func() {
			rows[a.n] = perform(w, f)
			scene.leave(cost)
			w.close()
			house.leave(w.size())
			fmt.Fprintf(os.Stderr, "%s %s (%d of %d)\n", rows[a.n].Verdict, f.name, done+1, len(picked))
			for _, what := range rows[a.n].Wrong {
				fmt.Fprintf(os.Stderr, "  %s\n", what)
			}
		})
	}
	playing.Wait()
	ok = !slices.ContainsFunc(rows, func(r row) bool { return r.Verdict != "met" })
	if asJSON {
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		return ok, e.Encode(rows)
	}
	return ok, table(rows, time.Since(begun))
}

// casts is how many play at a time: those of several faults that mostly wait,
// or of one that is alone.
const casts = 4

// room holds so many casts as its capacity; one who is greater takes it all.
// Only one goroutine may enter, so that no two wait for each other's half.
type room chan struct{}

func (r room) enter(n int) {
	for range min(n, cap(r)) {
		r <- struct{}{}
	}
}

func (r room) leave(n int) {
	for range min(n, cap(r)) {
		<-r
	}
}

// perform plays a fault in its world and judges.
func perform(w *world, f fault) row {
	r := row{Name: f.name, What: f.what, Bound: f.limit(w.ttl).Seconds()}
	if w.Failed() {
		r.Verdict, r.Wrong = "MISSED", w.failures()
		return r
	}
	w.do(func() {
		w.traffic = startTraffic(w.play, w.cast.ha.Addr("be"))
		if !f.calm {
			for _, c := range w.casts() {
				c.die(c.members[0])
			}
		}
		f.play(w)
		w.ended()
		// Right is what stays right: a reaper's next pulses may still find that
		// nothing from before counts.
		var since time.Time
		w.until("all is right", f.limit(w.ttl)+w.ttl/10, func() error {
			if err := w.cast.right(); err != nil {
				since = time.Time{}
				return err
			}
			if since.IsZero() {
				since = time.Now()
			}
			if time.Since(since) < w.ttl/10 {
				return errors.New("it is, but not for long")
			}
			return nil
		})
		r.Right = since.Sub(w.over).Seconds()
		w.compare()
		if f.check != nil {
			if err := f.check(w); err != nil {
				w.Error(err)
			}
		}
	})
	w.do(func() {
		if w.cast.ha.ConfigSum(w) != w.cast.config {
			w.Error("haproxy.cfg has been changed")
		}
	})
	r.Redis, r.HAProxy, r.Revived = w.cast.losses()
	w.traffic.stop()
	var why string
	r.Sent, r.Failed, why = w.traffic.count()
	if r.Failed > f.fails {
		w.Errorf("%d requests failed: %s", r.Failed, why)
	}
	if r.lost() > 0 {
		w.cast.mu.Lock()
		w.Errorf("alive and taken out of redis: %d %v, of haproxy: %v; dead and taken into it: %v", r.Redis, w.cast.seen.expired, w.cast.seen.unserved, w.cast.seen.revived)
		w.cast.mu.Unlock()
	}
	r.Mutants = w.judgeMutants()
	r.Verdict, r.Wrong = "met", w.failures()
	if len(r.Wrong) > 0 {
		r.Verdict = "MISSED"
	}
	return r
}

func table(rows []row, took time.Duration) error {
	tw := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "FAULT\tREDIS\tHAPROXY\tREVIVED\tFAILED\tOF\tRIGHT AFTER\tBOUND\t")
	for _, r := range rows {
		fmt.Fprintf(tw, "%s\t%d\t%d\t%d\t%d\t%d\t%.1f s\t%.1f s\t%s\n", r.Name, r.Redis, r.HAProxy, r.Revived, r.Failed, r.Sent, r.Right, r.Bound, r.Verdict)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	mutated, missed := false, 0
	fmt.Fprintln(tw, "\nGUARD OFF\tFAULT\tLOST BY IT\tBY ROLLCALL\t")
	for _, r := range rows {
		for _, m := range r.Mutants {
			mutated = true
			lost := strconv.Itoa(m.Lost)
			if m.Late {
				lost = "late"
			}
			fmt.Fprintf(tw, "%s\t%s\t%s\t%d\t%s\n", m.Guard, r.Name, lost, r.lost(), m.Verdict)
		}
		if r.Verdict != "met" {
			missed++
		}
	}
	if mutated {
		if err := tw.Flush(); err != nil {
			return err
		}
	}
	_, err := fmt.Printf("\nREDIS, HAPROXY: alive, and taken out of it. REVIVED: dead, and taken into HAProxy. %d faults in %d s, %d missed%s\n", len(rows), int(took.Seconds()), missed, strings.Repeat("!", min(missed, 1)))
	return err
}
