package reaper

import (
	"fmt"
	"strings"
	"testing"

	"github.com/rs/zerolog"
)

// TestRemovalsAreSummed has an instance die between any two of many sweeps: the first
// removals are said singly, the others in one sum, and together they are all. Debug has
// each.
func TestRemovalsAreSummed(t *testing.T) {
	const dead = 100
	g := newRegistry(t)
	log := &logBuffer{}
	r := newReaper(t, Config{}, g.store, zerolog.New(log))
	arm(t, r)
	for i := range 10 {
		g.put(t, "web", fmt.Sprintf("10.0.1.%d:80", i), r.proof.now)
	}
	for i := range dead {
		cutoff, _ := r.proof.cutoff()
		g.put(t, "web", fmt.Sprintf("10.0.0.%d:80", i), cutoff-1)
		if report := mustSweep(t, r); len(report.Removed) != 1 {
			t.Fatalf("sweep %d: %+v", i, report)
		}
		r.voice.sumUp(false)
	}
	if n := len(log.lines("summed up")); n != 0 {
		t.Errorf("%d sums before a minute is over", n)
	}
	r.voice.sumUp(true)
	r.voice.sumUp(true)
	single := 0
	all := log.lines("took out who stopped answering")
	for _, line := range all {
		if strings.Contains(line, `"level":"info"`) {
			single++
		}
	}
	sum := fmt.Sprintf(`"count":%d,"counts":{"web":%d}`, dead-single, dead-single)
	t.Logf("%d removed, %d said singly, %d lines with debug's", dead, single, len(all))
	if single == 0 || single == dead || len(all) != dead || len(log.lines(sum)) != 1 || len(log.lines("summed up")) != 1 {
		t.Errorf("%d of %d said singly, %d at all; want one sum %s in:\n%s", single, dead, len(all), sum, strings.Join(log.lines(""), "\n"))
	}
}
