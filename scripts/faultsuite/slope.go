package main

import (
	"cmp"
	"math"
	"slices"
	"time"
)

// point is one sample of one figure.
type point struct {
	at time.Duration // since the run began
	v  float64
}

// How a series is judged.
const (
	// warmUp is left out: caches, pools and maps fill, and the first notes have not
	// run out yet. A shorter run leaves out its first third.
	warmUp = 15 * time.Minute
	// bins is how many parts the rest is cut into, each with one value. Samples a few
	// seconds apart are not independent of each other, and an uncertainty from all of
	// them would be too small; more bins tell a slow growth sooner, fewer are more
	// independent. At two hours a bin has 5 min.
	bins = 21
	// fewBins have no verdict.
	fewBins = 8
	// sigmas is how sure it must be: about one flat figure in 700 looks like growth.
	sigmas = 3
)

// slope is how a figure moves.
type slope struct {
	n           int     // bins with a value
	first, last float64 // of the bins
	perHour     float64 // median of the slopes between any two bins (Theil, Sen)
	low, high   float64 // its bounds at 3 sigma
	late        float64 // the same of the second half of the bins alone
}

// fit computes the slope of a series, whose warm-up is cut off already. floor takes the
// least of each bin, for what a garbage collector has go up and down; else the median.
//
// The estimate is that of Theil and Sen: up to 29 % of the bins may be anything. Its
// bounds are Sen's: of the N slopes in order, those C/2 beside the middle, with
// C = sigmas · √(n(n-1)(2n+5)/18), the deviation of Kendall's S without a trend. A series
// that steps once has many slopes of 0, so its lower bound is 0: a step is no growth. The
// uncertainty is the greater distance to one of the two.
func fit(series []point, floor bool) slope {
	if len(series) == 0 {
		return slope{}
	}
	begin, end := series[0].at, series[len(series)-1].at
	width := (end-begin)/bins + 1
	of := make([][]float64, bins)
	for _, p := range series {
		i := int((p.at - begin) / width)
		of[i] = append(of[i], p.v)
	}
	var xs, ys []float64 // hours, values
	for i, vs := range of {
		if len(vs) == 0 {
			continue
		}
		slices.Sort(vs)
		v := vs[len(vs)/2]
		if floor {
			v = vs[0]
		}
		xs, ys = append(xs, (begin+time.Duration(i)*width+width/2).Hours()), append(ys, v)
	}
	s := slope{n: len(xs), first: ys[0], last: ys[len(ys)-1]}
	pairs := pairwise(xs, ys)
	if len(pairs) == 0 {
		return s
	}
	s.perHour = median(pairs)
	n := float64(len(xs))
	aside := sigmas * math.Sqrt(n*(n-1)*(2*n+5)/18) / 2
	middle := float64(len(pairs)-1) / 2
	s.low = pairs[max(int(math.Floor(middle-aside)), 0)]
	s.high = pairs[min(int(math.Ceil(middle+aside)), len(pairs)-1)]
	half := len(xs) / 2
	s.late = median(pairwise(xs[half:], ys[half:]))
	return s
}

// pairwise returns the slopes between any two points, in order.
func pairwise(xs, ys []float64) []float64 {
	var out []float64
	for i := range xs {
		for j := range i {
			out = append(out, (ys[i]-ys[j])/(xs[i]-xs[j]))
		}
	}
	slices.Sort(out)
	return out
}

// median is of values in order; 0 of none.
func median(vs []float64) float64 {
	if len(vs) == 0 {
		return 0
	}
	return (vs[(len(vs)-1)/2] + vs[len(vs)/2]) / 2
}

// The verdicts.
const (
	verdictOK    = "ok"
	verdictGrows = "GROWS"
	verdictFew   = "too short"
	verdictTold  = "" // no bound
)

// verdict judges a slope by a bound per hour; NaN = the figure is only told. It grows if
//
//	slope > bound  and  slope > uncertainty at 3 sigma  and  slope of the second half > bound/2
//
// A lower bound finds slower leaks, and takes what settles for one. The second condition
// needs a run that is long beside the noise; the third lets pass what has stopped to grow,
// such as a cache that was filled after the warm-up.
func (s slope) verdict(bound float64) string {
	switch {
	case math.IsNaN(bound):
		return verdictTold
	case s.n < fewBins:
		return verdictFew
	case s.perHour > bound && s.perHour > s.uncertainty() && s.late > bound/2:
		return verdictGrows
	}
	return verdictOK
}

// uncertainty is the greater distance from the slope to its bounds.
func (s slope) uncertainty() float64 { return max(s.perHour-s.low, s.high-s.perHour) }

// settled cuts the warm-up off.
func settled(series []point) []point {
	if len(series) == 0 {
		return nil
	}
	from := min(warmUp, series[len(series)-1].at/3)
	i, _ := slices.BinarySearchFunc(series, from, func(p point, t time.Duration) int { return cmp.Compare(p.at, t) })
	return series[i:]
}
