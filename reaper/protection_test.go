package reaper

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"rollcall/registrar"
)

// count is a service whose stale ones are all suspects.
func count(svc registrar.Service, members, suspects, stale, oldest int64) registrar.Count {
	return registrar.Count{Service: svc, Members: members, Suspects: suspects, Stale: stale, Oldest: oldest}
}

func TestProtectionThresholds(t *testing.T) {
	big := count("big", 1000, 0, 0, 1)
	tests := []struct {
		name   string
		counts []registrar.Count
		want   []registrar.Service // held; "" = every
	}{
		{"nobody", []registrar.Count{count("a", 10, 0, 0, 1)}, nil},
		{"lone death", []registrar.Count{count("a", 10, 1, 1, 1)}, nil},
		{"lone death of all there is", []registrar.Count{count("a", 1, 1, 1, 1)}, nil},
		{"lone death in each of two small services", []registrar.Count{big, count("a", 1, 1, 1, 1), count("b", 1, 1, 1, 1)}, nil},
		{"2 of 10 are 20 %, but only 2", []registrar.Count{count("a", 10, 2, 2, 1)}, nil},
		{"3 of 20 are 15 %", []registrar.Count{count("a", 20, 3, 3, 1)}, []registrar.Service{"a"}},
		{"3 of 21 are less", []registrar.Count{count("a", 21, 3, 3, 1)}, nil},
		{"over several services", []registrar.Count{count("a", 7, 1, 1, 1), count("b", 7, 1, 0, 1), count("c", 6, 1, 0, 1), count("d", 6, 1, 0, 1)}, []registrar.Service{""}},
		{"over several services, but without one of them there are only 2", []registrar.Count{count("a", 7, 1, 1, 1), count("b", 7, 1, 0, 1), count("c", 6, 1, 0, 1)}, nil},
		{"those of one hold it alone", []registrar.Count{count("a", 20, 20, 20, 1), count("b", 4, 1, 1, 1)}, []registrar.Service{"a"}},
		{"those of one hold it alone, also beside two deaths", []registrar.Count{count("a", 20_000, 20_000, 20_000, 1), count("b", 5, 1, 1, 1), count("c", 5, 1, 1, 1)}, []registrar.Service{"a"}},
		{"the living of one make the rule for all count for less, and no other", []registrar.Count{count("a", 20_000, 0, 0, 1), count("b", 10, 4, 1, 1), count("c", 4, 2, 1, 1)}, []registrar.Service{"c"}},
		{"those of one do not hide an event in the others", []registrar.Count{count("a", 20, 20, 20, 1), count("b", 10, 3, 1, 1), count("c", 10, 2, 1, 1)}, []registrar.Service{"a", ""}},
		{"half of a service", []registrar.Count{big, count("a", 4, 2, 2, 1)}, []registrar.Service{"a"}},
		{"less than half", []registrar.Count{big, count("a", 5, 2, 2, 1)}, nil},
		{"all of a service", []registrar.Count{big, count("a", 2, 2, 1, 1)}, []registrar.Service{"a"}},
		{"suspects, but nobody to remove yet", []registrar.Count{count("a", 10, 10, 0, 1)}, nil},
		{"suspects here, stale there", []registrar.Count{big, count("a", 4, 4, 0, 1), count("b", 9, 1, 1, 1)}, nil},
		{"mistyped says nothing", []registrar.Count{{Service: "a", Members: -1, Mistyped: true}, count("b", 10, 1, 1, 1)}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := newProtection(testBeat)
			began, ended := p.judge(0, tt.counts)
			if fmt.Sprint(began) != fmt.Sprint(tt.want) || len(ended) > 0 {
				t.Errorf("began %q, ended %v, want %q", began, ended, tt.want)
			}
			for _, c := range tt.counts {
				want := false
				for _, h := range tt.want {
					want = want || h == everyService || h == c.Service
				}
				if got := p.held(c.Service); got != want {
					t.Errorf("%s held %v, want %v", c.Service, got, want)
				}
			}
		})
	}
}

func TestProtectionStaysDry(t *testing.T) {
	p := newProtection(testBeat)
	bad := []registrar.Count{count("a", 10, 5, 1, 1)}
	good := []registrar.Count{count("a", 10, 1, 1, 1)}
	if began, _ := p.judge(0, bad); len(began) != 1 {
		t.Fatalf("began %q, want the service", began)
	}
	steps := []struct {
		at     time.Duration
		counts []registrar.Count
		held   bool
	}{
		{time.Minute, bad, true},
		{time.Minute + 9*time.Second, good, true},
		{time.Minute + 9500*time.Millisecond, []registrar.Count{count("a", 10, 5, 0, 1)}, true}, // again, in the dry time: the same hold
		{time.Minute + 19*time.Second, good, true},
		{time.Minute + 19*time.Second, []registrar.Count{{Service: "a", Members: -1, Mistyped: true}}, true},
		{time.Minute + 28999*time.Millisecond, good, true},
		{time.Minute + 29*time.Second, good, false}, // 2 B after the service was last seen at all
	}
	for _, s := range steps {
		began, ended := p.judge(s.at, s.counts)
		if got := p.held("a"); got != s.held || len(began) > 0 {
			t.Errorf("at %v: held %v, want %v; began %q", s.at, got, s.held, began)
		}
		if !s.held && (len(ended) != 1 || ended["a"].since != 0) {
			t.Errorf("ended %+v, want a since 0", ended)
		}
	}
}

func TestProtectionRelease(t *testing.T) {
	counts := []registrar.Count{
		count("a", 4, 4, 4, 300), count("b", 4, 4, 4, 200), count("last", 1, 1, 1, 100),
		{Service: "bad", Members: -1, Mistyped: true}, count("c", 4, 2, 0, 50),
	}
	type step struct {
		at   time.Duration
		want string // the services, oldest first; "" = nobody
	}
	steps := []step{
		{0, ""},
		{LetGoAfter - 1, ""},
		{LetGoAfter, "b a"}, // its oldest is the oldest; c has nobody stale, last only one
		{LetGoAfter + LetGoEvery - 1, ""},
		{LetGoAfter + LetGoEvery, "b a"},
	}
	names := func(counts []registrar.Count) string {
		var all []string
		for _, c := range counts {
			all = append(all, string(c.Service))
		}
		return strings.Join(all, " ")
	}
	p := newProtection(testBeat)
	for _, s := range steps {
		p.judge(s.at, counts)
		if got := names(p.release(s.at, counts)); got != s.want {
			t.Errorf("at %v: %q, want %q", s.at, got, s.want)
		}
	}

	// The cause is gone: the hold ends by itself.
	at := LetGoAfter + 2*LetGoEvery
	if got := names(p.release(at, counts)); got != "" {
		t.Errorf("released %s although the cause was not seen now", got)
	}
	// A young hold of the service counts as well as the old one of all.
	p = newProtection(testBeat)
	old := []registrar.Count{count("a", 10, 4, 1, 1), count("b", 10, 4, 0, 1)}
	p.judge(0, old)
	young := []registrar.Count{count("a", 10, 5, 1, 1), count("b", 10, 4, 0, 1)}
	p.judge(LetGoAfter, young)
	if got := names(p.release(LetGoAfter, young)); got != "" {
		t.Errorf("released %s, held since just now", got)
	}
	// What is not held is not released: it is swept.
	p = newProtection(testBeat)
	lone := []registrar.Count{count("a", 10, 1, 1, 1)}
	p.judge(LetGoAfter, lone)
	if got := names(p.release(LetGoAfter, lone)); got != "" {
		t.Errorf("released %s without a hold", got)
	}
}
