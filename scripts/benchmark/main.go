// Command benchmark measures rollcall on a real Redis and a real HAProxy that
// it starts itself, and prints every figure as a ratio to a floor: a minimal
// program, written by hand, that was measured in the same run between the same
// servers. Absolute times mean nothing on another machine; the ratios do.
//
// scripts/bench builds and runs it.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"
)

// Row is one figure and what it is compared with.
type Row struct {
	Name    string  `json:"name"`
	Figure  float64 `json:"figure_us"`  // median of the runs' medians
	P99     float64 `json:"p99_us"`     // of all runs together
	Floor   float64 `json:"floor_us"`   // median of the runs' floors
	Ratio   float64 `json:"ratio"`      // median of the runs' ratios
	Low     float64 `json:"ratio_low"`  // least of the runs' ratios
	High    float64 `json:"ratio_high"` // greatest
	Goal    float64 `json:"goal"`       // the ratio shall be at most this
	Meaning string  `json:"meaning"`
}

// bench is one benchmark, with a name that the command line can pick.
type bench struct {
	name string
	run  func(*harness) []Row
}

var benches = []bench{{"join", join}}

// harness is the servers' owner. It stands in for a test, so that the helpers
// that start servers for tests can start them here: it ends the program where a
// test would fail.
type harness struct {
	testing.TB
	cleanup []func()
	runs    int
	changes int // a run
	log     zerolog.Logger
}

func (h *harness) Helper()                   {}
func (h *harness) Cleanup(f func())          { h.cleanup = append(h.cleanup, f) }
func (h *harness) Error(a ...any)            { h.fail(fmt.Sprint(a...)) }
func (h *harness) Errorf(f string, a ...any) { h.fail(fmt.Sprintf(f, a...)) }
func (h *harness) Fatal(a ...any)            { h.fail(fmt.Sprint(a...)) }
func (h *harness) Fatalf(f string, a ...any) { h.fail(fmt.Sprintf(f, a...)) }
func (h *harness) Skip(a ...any)             { h.fail(fmt.Sprint(a...)) }
func (h *harness) Skipf(f string, a ...any)  { h.fail(fmt.Sprintf(f, a...)) }
func (h *harness) Log(a ...any)              { fmt.Fprintln(os.Stderr, a...) }
func (h *harness) Logf(f string, a ...any)   { fmt.Fprintf(os.Stderr, f+"\n", a...) }

func (h *harness) fail(what string) {
	fmt.Fprintln(os.Stderr, "bench:", what)
	h.close()
	os.Exit(1)
}

func (h *harness) close() {
	for len(h.cleanup) > 0 {
		f := h.cleanup[len(h.cleanup)-1]
		h.cleanup = h.cleanup[:len(h.cleanup)-1]
		f()
	}
}

func main() {
	runs := flag.Int("runs", 5, "runs of each benchmark")
	changes := flag.Int("changes", 60, "changes a run")
	file := flag.String("json", "", "write the table to `FILE` as JSON too")
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), "usage: scripts/bench [flags] [NAME…]\nbenchmarks: %s\n", names())
		flag.PrintDefaults()
	}
	flag.Parse()
	redis.SetLogger(quiet{})
	for _, n := range flag.Args() {
		if !slices.ContainsFunc(benches, func(b bench) bool { return b.name == n }) {
			fmt.Fprintf(os.Stderr, "bench: no benchmark %q; there are: %s\n", n, names())
			os.Exit(2)
		}
	}
	if *runs < 1 || *changes < 10 {
		fmt.Fprintln(os.Stderr, "bench: want at least 1 run of 10 changes")
		os.Exit(2)
	}
	var rows []Row
	for _, b := range benches {
		if flag.NArg() > 0 && !slices.Contains(flag.Args(), b.name) {
			continue
		}
		h := &harness{runs: *runs, changes: *changes, log: zerolog.New(os.Stderr).Level(zerolog.ErrorLevel)}
		rows = append(rows, b.run(h)...)
		h.close()
	}
	print(os.Stdout, rows)
	if *file != "" {
		out, err := json.MarshalIndent(rows, "", "  ")
		if err == nil {
			err = os.WriteFile(*file, append(out, '\n'), 0o644)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
	}
}

// quiet drops go-redis' messages on connections that ended with their server.
type quiet struct{}

func (quiet) Printf(context.Context, string, ...any) {}

func names() string {
	all := make([]string, len(benches))
	for i, b := range benches {
		all[i] = b.name
	}
	return strings.Join(all, ", ")
}

func print(w io.Writer, rows []Row) {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "BENCHMARK\tMEDIAN\tP99\tFLOOR\tRATIO\tSPREAD\tGOAL\tMEANING")
	for _, r := range rows {
		verdict := "met"
		if r.Ratio > r.Goal {
			verdict = "MISSED"
		}
		fmt.Fprintf(tw, "%s\t%.0f µs\t%.0f µs\t%.0f µs\t%.2f\t%.2f–%.2f\t≤ %.1f %s\t%s\n",
			r.Name, r.Figure, r.P99, r.Floor, r.Ratio, r.Low, r.High, r.Goal, verdict, r.Meaning)
	}
	tw.Flush()
}

// run is one run of a benchmark: the same number of changes done by rollcall
// and by the floor.
type run struct{ figure, floor []time.Duration }

// row condenses runs.
func row(name, meaning string, goal float64, runs []run) Row {
	var figures, floors, ratios []float64
	var all []time.Duration
	for _, r := range runs {
		f, g := median(micros(r.figure)), median(micros(r.floor))
		figures, floors, ratios = append(figures, f), append(floors, g), append(ratios, f/g)
		all = append(all, r.figure...)
	}
	sorted := micros(all)
	slices.Sort(sorted)
	return Row{
		Name: name, Meaning: meaning, Goal: goal,
		Figure: median(figures), P99: sorted[len(sorted)*99/100], Floor: median(floors),
		Ratio: median(ratios), Low: slices.Min(ratios), High: slices.Max(ratios),
	}
}

func micros(ds []time.Duration) []float64 {
	out := make([]float64, len(ds))
	for i, d := range ds {
		out[i] = float64(d) / float64(time.Microsecond)
	}
	return out
}

func median[T cmp.Ordered](xs []T) T {
	xs = slices.Clone(xs)
	slices.Sort(xs)
	return xs[len(xs)/2]
}
