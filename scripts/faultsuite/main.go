// Command faultsuite plays faults on real servers: a Redis, a HAProxy, the real
// rollcall in every role, and requests all the while. For each fault it counts
// what must not happen: instances alive that were taken out of Redis or of
// HAProxy, requests that failed; and it measures how long after the fault's
// end everything was right again.
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
	Failed  int      `json:"failed_requests"`
	Sent    int      `json:"requests"`
	Right   float64  `json:"right_after_s"`
	Bound   float64  `json:"bound_s"`
	Verdict string   `json:"verdict"`
	Wrong   []string `json:"wrong,omitempty"`

	Mutants []loss `json:"mutants,omitempty"`
}

func main() {
	short := flag.Bool("short", false, "the twelve worst only, without mutants")
	real := flag.Bool("real", false, "at the real scale: TTL 15 s, heartbeat 5 s")
	bare := flag.Bool("no-mutants", false, "without mutants")
	list := flag.Bool("list", false, "print the faults")
	format := flag.String("o", "table", "table or json")
	length := flag.Duration("soak", 0, "play random faults among a churn for this long")
	every := flag.Duration("every", 20*time.Second, "least time between two of them; the most is three times that")
	seed := flag.Uint64("seed", 0, "of the random faults; 0 = a random one")
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
	if *length > 0 {
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
	if out, err := exec.Command("go", "build", "-o", binary, "./cmd/rollcall").CombinedOutput(); err != nil {
		return false, fmt.Errorf("build: %w\n%s", err, out)
	}
	begun := time.Now()
	stage := func(f fault) (*world, error) {
		w := &world{play: newPlay(f.name), ttl: 3 * time.Second, beat: time.Second}
		if real {
			w.ttl, w.beat = 15*time.Second, 5*time.Second
		}
		built := map[string]string{}
		if prove {
			var err error
			if built, err = build(dir, f.name); err != nil {
				return nil, err
			}
		}
		w.do(func() { w.setup(f, binary, built) })
		return w, nil
	}
	type staged struct {
		w   *world
		err error
	}
	// The next fault's servers start and get warm while one is played.
	next := make(chan staged, 1)
	prepare := func(i int) {
		if i < len(picked) {
			go func() { w, err := stage(picked[i]); next <- staged{w, err} }()
		}
	}
	prepare(0)
	var closing sync.WaitGroup
	defer closing.Wait()
	var rows []row
	ok = true
	for i, f := range picked {
		s := <-next
		if s.err != nil {
			return false, s.err
		}
		prepare(i + 1)
		r := perform(s.w, f)
		closing.Wait()
		closing.Go(s.w.close)
		rows = append(rows, r)
		ok = ok && r.Verdict == "met"
		fmt.Fprintf(os.Stderr, "%s %s (%d of %d)\n", r.Verdict, f.name, i+1, len(picked))
		for _, what := range r.Wrong {
			fmt.Fprintf(os.Stderr, "  %s\n", what)
		}
	}
	if asJSON {
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		return ok, e.Encode(rows)
	}
	return ok, table(rows, time.Since(begun))
}

// perform plays a fault in its world and judges.
func perform(w *world, f fault) row {
	r := row{Name: f.name, What: f.what, Bound: f.bound * w.ttl.Seconds()}
	w.do(func() {
		if w.Failed() {
			return
		}
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
		w.until("all is right", time.Duration(f.bound*float64(w.ttl))+w.ttl/10, func() error {
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
		if f.check != nil {
			if err := f.check(w); err != nil {
				w.Error(err)
			}
		}
	})
	r.Redis, r.HAProxy = w.cast.losses()
	if w.traffic != nil {
		w.traffic.stop()
		var why string
		r.Sent, r.Failed, why = w.traffic.count()
		if r.Failed > f.fails {
			w.Errorf("%d requests failed: %s", r.Failed, why)
		}
	}
	if r.Redis+r.HAProxy > 0 {
		w.Errorf("%d alive were taken out of redis, %d of haproxy", r.Redis, r.HAProxy)
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
	fmt.Fprintln(tw, "FAULT\tREDIS\tHAPROXY\tFAILED\tOF\tRIGHT AFTER\tBOUND\t")
	for _, r := range rows {
		fmt.Fprintf(tw, "%s\t%d\t%d\t%d\t%d\t%.1f s\t%.1f s\t%s\n", r.Name, r.Redis, r.HAProxy, r.Failed, r.Sent, r.Right, r.Bound, r.Verdict)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	mutated, missed := false, 0
	fmt.Fprintln(tw, "\nGUARD OFF\tFAULT\tLOST BY IT\tBY ROLLCALL\t")
	for _, r := range rows {
		for _, m := range r.Mutants {
			mutated = true
			fmt.Fprintf(tw, "%s\t%s\t%d\t%d\t%s\n", m.Guard, r.Name, m.Lost, r.Redis+r.HAProxy, m.Verdict)
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
	_, err := fmt.Printf("\nREDIS, HAPROXY: alive, and taken out of it. %d faults in %d s, %d missed%s\n", len(rows), int(took.Seconds()), missed, strings.Repeat("!", min(missed, 1)))
	return err
}
