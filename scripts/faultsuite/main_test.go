package main

import (
	"slices"
	"testing"
)

// TestMutants holds the table of guards to the source: a mutant whose guard has
// been rewritten would prove nothing.
func TestMutants(t *testing.T) {
	named := map[string]bool{}
	for _, m := range mutants {
		if named[m.name] {
			t.Errorf("two mutants are named %s", m.name)
		}
		named[m.name] = true
		if _, err := pick([]string{m.fault}, false); err != nil {
			t.Errorf("mutant %s: %v", m.name, err)
		}
		if _, err := m.apply("../.."); err != nil {
			t.Error(err)
		}
	}
}

// TestFaults holds the table of faults to its own rules.
func TestFaults(t *testing.T) {
	var names []string
	for _, f := range faults {
		names = append(names, f.name)
		if f.what == "" || f.play == nil || (f.bound > 0) == (f.most > 0) {
			t.Errorf("%s: want words, a play and one bound", f.name)
		}
	}
	slices.Sort(names)
	if n := len(slices.Compact(names)); n != len(faults) {
		t.Errorf("%d faults have %d names", len(faults), n)
	}
}
