package registrar

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
)

// TestSums has things happen at different paces for an hour by a simulated clock:
// nothing is lost, a person's pace is said singly, and more is said once a minute.
func TestSums(t *testing.T) {
	for _, c := range []struct {
		every         time.Duration
		least, most   int // lines said singly in the hour
		leastS, mostS int // and sums
	}{
		{5 * time.Minute, 12, 12, 0, 0},
		{2 * time.Second, 1800, 1800, 0, 0},
		{time.Minute / sumAbove, 3600, 3600, 0, 0},
		{time.Second / 14, sumAbove, sumAbove, 59, 61},
		{time.Millisecond, sumAbove, sumAbove, 59, 61},
	} {
		t.Run(c.every.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var s Sums
				did, single, summed, sums := 0, 0, 0, 0
				take := func(last bool) {
					if sum := s.Take(last); sum.Total() > 0 {
						summed += sum.Total()
						sums++
						if sum.Over > sumEvery+c.every {
							t.Errorf("a sum over %v", sum.Over)
						}
					}
				}
				for begun := time.Now(); time.Since(begun) < time.Hour; time.Sleep(c.every) {
					take(false)
					n := 1 + did%3
					did += n
					if s.May(fmt.Sprint("kind", did%2), n) {
						single += n
						c.least -= 1
						c.most -= 1
					}
				}
				take(true)
				if single+summed != did {
					t.Errorf("%d happened; %d were said singly and %d in sums", did, single, summed)
				}
				if c.least > 0 || c.most < 0 {
					t.Errorf("%d lines too few, or %d too many", c.least, -c.most)
				}
				if sums < c.leastS || sums > c.mostS {
					t.Errorf("%d sums, want %d to %d", sums, c.leastS, c.mostS)
				}
			})
		})
	}
}

// TestSumsEnd has a burst be over: after a minute with little everything is said singly
// again, and a sum that nobody takes in time is not lost.
func TestSumsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s Sums
		for range 100 {
			s.May("a", 1)
		}
		if w := s.Wait(); w != sumEvery {
			t.Errorf("the first sum waits for %v, want %v", w, sumEvery)
		}
		if got := s.Take(false); got.Total() != 0 {
			t.Errorf("a sum before its time: %v", got)
		}
		time.Sleep(sumEvery)
		if w := s.Wait(); w != 0 {
			t.Errorf("it waits for %v more", w)
		}
		time.Sleep(3 * sumEvery)
		if s.May("b", 2) {
			t.Error("said singly while a sum waits")
		}
		if got := s.Take(false); got.Kinds["a"] != 40 || got.Kinds["b"] != 2 || got.Over != 4*sumEvery {
			t.Errorf("%v, want 40 a and 2 b in %v", got, 4*sumEvery)
		}
		if s.May("a", 1) {
			t.Error("said singly at once after a minute with many")
		}
		time.Sleep(sumEvery)
		if got := s.Take(false); got.Total() != 1 {
			t.Errorf("%v, want one", got)
		}
		if !s.May("a", 1) {
			t.Error("not said singly after a minute with one")
		}
		if w := s.Wait(); w != time.Hour {
			t.Errorf("nothing to take, and it waits for %v", w)
		}
		for range 100 {
			s.May("a", 1)
		}
		if got := s.Take(true); got.Total() != 41 {
			t.Errorf("%v at the end, want 41", got)
		}
		time.Sleep(10 * sumEvery)
		if !s.May("a", 1) {
			t.Error("not said singly after 10 quiet minutes")
		}
	})
}

// TestSumText has more kinds than one line names.
func TestSumText(t *testing.T) {
	sum := Sum{Over: time.Minute, Kinds: map[string]int{}}
	for i := range sumKinds + 5 {
		sum.Kinds[fmt.Sprintf("k%02d", i)] = i + 1
	}
	var out bytes.Buffer
	log := zerolog.New(&out)
	log.Info().Object("counts", sum).Msg("x")
	if !strings.Contains(out.String(), `{"k24":25,"k23":24,`) || !strings.Contains(out.String(), `"k05":6,"(others)":15}`) {
		t.Error(out.String())
	}
}
