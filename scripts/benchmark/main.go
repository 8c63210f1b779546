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
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"
)

// Row is one figure and what it is compared with.
type Row struct {
	Name   string  `json:"name"`
	Unit   string  `json:"unit"`          // of all that is no ratio
	Figure float64 `json:"figure"`        // median of the runs' medians
	P90    float64 `json:"p90,omitempty"` // these three of all changes of all runs together
	P99    float64 `json:"p99,omitempty"`
	Max    float64 `json:"max,omitempty"`
	// The floor's, likewise; 0 = the figure stands alone.
	Floor    float64 `json:"floor,omitempty"`
	FloorP99 float64 `json:"floor_p99,omitempty"`
	// Ratio is the median of the runs' ratios, or of their figures if there is
	// no floor; Low and High are the least and the greatest.
	Ratio float64 `json:"ratio"`
	Low   float64 `json:"ratio_low"`
	High  float64 `json:"ratio_high"`
	// Goal is what Ratio shall be at most, or at least; 0 = none.
	Goal    float64 `json:"goal,omitempty"`
	AtLeast bool    `json:"goal_is_least,omitempty"`
	Meaning string  `json:"meaning"`
}

// bench is one benchmark, with a name that the command line can pick.
type bench struct {
	name string
	run  func(*harness) []Row
	long bool // not among the short ones unless it is named
}

var benches = []bench{
	{"propagation", propagation, false},
	{"bursts", bursts, false},
	{"heartbeats", heartbeats, false},
	{"reaper", reaping, true},
	{"fleet", fleet100k, true},
	{"million", million, true},
	{"peers", peers, true},
	{"announcements", announcements, true},
	{"watchers", watchers, true},
	{"consumers", consumers, true},
	{"footprint", footprint, true},
}

// harness is the servers' owner. It stands in for a test, so that the helpers
// that start servers for tests can start them here: it ends the program where a
// test would fail.
type harness struct {
	testing.TB
	cleanup []func()
	runs    int
	changes int  // a run
	short   bool // leave out what takes long
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

// await calls fn until it returns nil, and fails with its last error after bound.
func (h *harness) await(bound time.Duration, what string, fn func() error) {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(bound); ; <-tick.C {
		err := fn()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			h.Fatalf("waiting until %s: %v", what, err)
		}
	}
}

// dir is a directory that is removed at the end.
func (h *harness) dir() string {
	d, err := os.MkdirTemp("", "rb")
	if err != nil {
		h.Fatal(err)
	}
	h.Cleanup(func() { _ = os.RemoveAll(d) }) // what is left lies in the temporary directory
	return d
}

// process runs a program until the end; what it says is in a file of dir. It
// leads a process group, and the group ends with it.
func (h *harness) process(dir, name string, args ...string) *os.Process {
	out, err := os.CreateTemp(dir, filepath.Base(name))
	if err != nil {
		h.Fatal(err)
	}
	defer out.Close()
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		h.Fatal(err)
	}
	h.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // it may have ended
		_ = cmd.Wait()                                      // it says that it was killed
	})
	return cmd.Process
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
	short := flag.Bool("short", false, "leave out what takes long: 10,000 servers, checks, load")
	file := flag.String("json", "", "write the table to `FILE` as JSON too")
	list := flag.Bool("list", false, "only print the names of what would run")
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), "usage: scripts/bench [flags] [NAME…]\nbenchmarks: %s\n", names(benches))
		flag.PrintDefaults()
	}
	flag.Parse()
	redis.SetLogger(quiet{})
	for _, n := range flag.Args() {
		if !slices.ContainsFunc(benches, func(b bench) bool { return b.name == n }) {
			fmt.Fprintf(os.Stderr, "bench: no benchmark %q; there are: %s\n", n, names(benches))
			os.Exit(2)
		}
	}
	if *runs < 1 || *changes < 10 {
		fmt.Fprintln(os.Stderr, "bench: want at least 1 run of 10 changes")
		os.Exit(2)
	}
	chosen := slices.DeleteFunc(slices.Clone(benches), func(b bench) bool {
		return flag.NArg() > 0 && !slices.Contains(flag.Args(), b.name) || flag.NArg() == 0 && *short && b.long
	})
	if *list {
		fmt.Println(names(chosen))
		return
	}
	printVersions()
	var rows []Row
	for _, b := range chosen {
		h := &harness{runs: *runs, changes: *changes, short: *short, log: zerolog.New(os.Stderr).Level(zerolog.ErrorLevel)}
		got := b.run(h)
		h.close()
		print(os.Stdout, got)
		rows = append(rows, got...)
	}
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

// printVersions says between what the figures were measured.
func printVersions() {
	fmt.Fprintf(os.Stderr, "%d CPUs, %s\n", runtime.NumCPU(), runtime.Version())
	for _, c := range [][]string{{"redis-server", "--version"}, {"haproxy", "-v"}, {"etcd", "--version"}, {"consul", "version"}, {"consul-template", "-version"}} {
		out, err := exec.Command(c[0], c[1:]...).CombinedOutput()
		if err != nil {
			continue // only some benchmarks need it, and they say so
		}
		line, _, _ := strings.Cut(string(out), "\n")
		fmt.Fprintln(os.Stderr, line)
	}
}

// quiet drops go-redis' messages on connections that ended with their server.
type quiet struct{}

func (quiet) Printf(context.Context, string, ...any) {}

func names(of []bench) string {
	all := make([]string, len(of))
	for i, b := range of {
		all[i] = b.name
	}
	return strings.Join(all, ", ")
}

func print(w io.Writer, rows []Row) {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "BENCHMARK\tMEDIAN\tP90\tP99\tMAX\tFLOOR\tRATIO\tSPREAD\tGOAL\tMEANING")
	for _, r := range rows {
		fmt.Fprintf(tw, "%s\t%s %s\t%s\t%s\t%s\t%s\t%s\t%s–%s\t%s\t%s\n", r.Name, number(r.Figure), r.Unit,
			number(r.P90), number(r.P99), number(r.Max), number(r.Floor), number(r.Ratio), number(r.Low), number(r.High), r.verdict(), r.Meaning)
	}
	tw.Flush()
}

func (r Row) verdict() string {
	sign, met := "≤", r.Ratio <= r.Goal
	if r.AtLeast {
		sign, met = "≥", r.Ratio >= r.Goal
	}
	switch {
	case r.Goal == 0:
		return "-"
	case met:
		return fmt.Sprintf("%s %s met", sign, number(r.Goal))
	}
	return fmt.Sprintf("%s %s MISSED", sign, number(r.Goal))
}

// number prints three digits or so; what is not there is "-".
func number(f float64) string {
	switch {
	case f == 0:
		return "-"
	case f < 10:
		return fmt.Sprintf("%.2f", f)
	case f < 100:
		return fmt.Sprintf("%.1f", f)
	}
	return fmt.Sprintf("%.0f", f)
}

// run is one run of a benchmark: the same number of changes done by rollcall, by the
// floor, and, where there is such a floor, by hand with rollcall's commands.
type run struct{ figure, floor, hand []time.Duration }

// row condenses runs.
func row(name, meaning string, goal float64, runs []run) Row {
	var figures, floors, ratios []float64
	var all, bare []time.Duration
	for _, r := range runs {
		f, g := median(micros(r.figure)), median(micros(r.floor))
		figures, floors, ratios = append(figures, f), append(floors, g), append(ratios, f/g)
		all, bare = append(all, r.figure...), append(bare, r.floor...)
	}
	return Row{
		Name: name, Unit: "µs", Meaning: meaning, Goal: goal,
		Figure: median(figures), P90: quantile(all, 90), P99: quantile(all, 99), Max: quantile(all, 100),
		Floor: median(floors), FloorP99: quantile(bare, 99),
		Ratio: median(ratios), Low: slices.Min(ratios), High: slices.Max(ratios),
	}
}

func quantile(ds []time.Duration, percent int) float64 {
	sorted := micros(ds)
	slices.Sort(sorted)
	return sorted[min(len(sorted)*percent/100, len(sorted)-1)]
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
