package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestSlope judges series of two hours, a sample each 10 s, by a bound of 1 an hour:
// what leaks is found, and what is flat, noisy, steps, or has settled is not.
func TestSlope(t *testing.T) {
	const runs = 200
	saw := func(i int) float64 { return float64(i%13) / 2 } // a collector's
	for _, c := range []struct {
		name        string
		floor       bool
		value       func(hours float64, i int, r *rand.Rand) float64
		least, most float64 // share of the runs that are found to grow
	}{
		{"flat", false, func(float64, int, *rand.Rand) float64 { return 20 }, 0, 0},
		{"noise", false, func(_ float64, _ int, r *rand.Rand) float64 { return 20 + 5*r.NormFloat64() }, 0, 0.01},
		{"saw", true, func(_ float64, i int, r *rand.Rand) float64 { return 20 + saw(i) + r.Float64() }, 0, 0.01},
		{"saw, and grows by 2", true, func(h float64, i int, r *rand.Rand) float64 { return 20 + 2*h + saw(i) + r.Float64() }, 1, 1},
		{"grows by 1.5 in noise", false, func(h float64, _ int, r *rand.Rand) float64 { return 20 + 1.5*h + r.NormFloat64() }, 0.99, 1},
		{"grows by 0.5", false, func(h float64, _ int, _ *rand.Rand) float64 { return 20 + h/2 }, 0, 0},
		{"shrinks", false, func(h float64, _ int, r *rand.Rand) float64 { return 20 - 3*h + r.NormFloat64() }, 0, 0},
		{"one step of 4", false, func(h float64, _ int, _ *rand.Rand) float64 { return 20 + 4*math.Floor(h) }, 0, 0},
		{"steps up each 12 min", false, func(h float64, _ int, _ *rand.Rand) float64 { return 20 + math.Floor(5*h) }, 1, 1},
		{"settles", false, func(h float64, _ int, r *rand.Rand) float64 { return 20 + 8*min(h, 0.7) + r.NormFloat64()/10 }, 0, 0.01},
		{"settles late", false, func(h float64, _ int, r *rand.Rand) float64 { return 20 + 8*min(h, 1.15) + r.NormFloat64()/10 }, 0, 0},
		{"spikes", false, func(_ float64, _ int, r *rand.Rand) float64 { return 20 + 100*math.Floor(1.1*r.Float64()) }, 0, 0.01},
		{"one descriptor lost each 20 min", false, func(h float64, _ int, r *rand.Rand) float64 { return 12 + math.Floor(3*h) + float64(r.IntN(3)) }, 0.99, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			found := 0
			var s slope
			for run := range runs {
				r := rand.New(rand.NewPCG(1, uint64(run)))
				var series []point
				for i := range 720 {
					at := time.Duration(i) * 10 * time.Second
					series = append(series, point{at, c.value(at.Hours(), i, r)})
				}
				if s = fit(settled(series), c.floor); s.verdict(1) == verdictGrows {
					found++
				}
			}
			t.Logf("found in %d of %d; the last: %.2f ± %.2f an hour", found, runs, s.perHour, s.uncertainty())
			if share := float64(found) / runs; share < c.least || share > c.most {
				t.Errorf("found in %d of %d runs, want %.2f to %.2f of them", found, runs, c.least, c.most)
			}
		})
	}
}

// TestSlopeOfFew has series that say nothing.
func TestSlopeOfFew(t *testing.T) {
	for n := range fewBins {
		var series []point
		for i := range n {
			series = append(series, point{time.Duration(i) * time.Hour, float64(100 * i)})
		}
		if v := fit(series, false).verdict(1); v != verdictFew {
			t.Errorf("%d points: %q, want %q", n, v, verdictFew)
		}
	}
	if v := (slope{n: bins, perHour: 9, low: 9, high: 9, late: 9}).verdict(math.NaN()); v != verdictTold {
		t.Errorf("a figure without a bound: %q", v)
	}
}

// TestTableOf has the samples of a run that was killed, in which one process leaks.
func TestTableOf(t *testing.T) {
	for leak, want := range map[float64]bool{0: true, 1 << 20: false} { // bytes an hour
		file := filepath.Join(t.TempDir(), "samples")
		var lines bytes.Buffer
		e := json.NewEncoder(&lines)
		r := rand.New(rand.NewPCG(1, 1))
		err := e.Encode(header{"2h", time.Now()})
		for i := range 720 {
			at := 10 * float64(i)
			s := sample{at, map[string]float64{"lbsync rss": 40<<20 + 1e6*r.Float64(), "redis keys": 20, "lbsync cpu": at / 10}}
			if i%heapEvery == 0 {
				s.Values["lbsync heap"] = 5<<20 + 3e5*r.Float64() + leak*at/3600
			}
			err = errors.Join(err, e.Encode(s))
		}
		lines.Truncate(lines.Len() - 20)
		if err := errors.Join(err, os.WriteFile(file, lines.Bytes(), 0o600)); err != nil {
			t.Fatal(err)
		}
		if ok, err := tableOf(file); ok != want || err != nil {
			t.Errorf("a leak of %.0f bytes an hour: %v, %v; want %v", leak, ok, err, want)
		}
	}
	if _, err := tableOf(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("no error without a file")
	}
}
