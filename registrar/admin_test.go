package registrar

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"rollcall/registrar/redistest"
)

func TestSetAdmin(t *testing.T) {
	srv := redistest.Start(t)
	a := host(1)
	num := func(n int) *int { return &n }
	drain := Word{Verb: "drain", Reason: "disk"}
	for _, c := range []struct {
		name   string
		stored string // raw, before
		words  []Word // said before the last, each a change
		last   Word
		same   bool
		want   string // stored after, without "at"
	}{
		{"drain", "", nil, drain, false, `{"reason":"disk","state":"drain"}`},
		{"drain without a reason", "", nil, Word{Verb: "drain"}, false, `{"state":"drain"}`},
		{"maint", "", nil, Word{Verb: "maint", Reason: "a \"quoted\" /n\n one"}, false, `{"reason":"a \"quoted\" /n\n one","state":"maint"}`},
		{"maint after drain drops the reason", "", []Word{drain}, Word{Verb: "maint"}, false, `{"state":"maint"}`},
		{"same word", "", []Word{drain}, drain, true, `{"reason":"disk","state":"drain"}`},
		{"same word, other reason", "", []Word{drain}, Word{Verb: "drain", Reason: "cpu"}, false, `{"reason":"cpu","state":"drain"}`},
		{"ready", "", []Word{drain}, Word{Verb: "ready"}, false, ``},
		{"ready without a word", "", nil, Word{Verb: "ready"}, true, ``},
		{"ready takes no reason", "", nil, Word{Verb: "ready", Reason: "x"}, true, ``},
		{"weight", "", nil, Word{Verb: "weight", Weight: num(256)}, false, `{"weight":256}`},
		{"weight 0 is a weight", "", nil, Word{Verb: "weight", Weight: num(0)}, false, `{"weight":0}`},
		{"same weight", "", []Word{{Verb: "weight", Weight: num(0)}}, Word{Verb: "weight", Weight: num(0)}, true, `{"weight":0}`},
		{"weight beside drain", "", []Word{drain}, Word{Verb: "weight", Weight: num(9)}, false, `{"reason":"disk","state":"drain","weight":9}`},
		{"drain beside weight", "", []Word{{Verb: "weight", Weight: num(9)}}, drain, false, `{"reason":"disk","state":"drain","weight":9}`},
		{"ready keeps the weight", "", []Word{{Verb: "weight", Weight: num(9)}, drain}, Word{Verb: "ready"}, false, `{"weight":9}`},
		{"no weight drops it", "", []Word{{Verb: "weight", Weight: num(9)}}, Word{Verb: "weight"}, false, ``},
		{"no weight keeps drain", "", []Word{drain, {Verb: "weight", Weight: num(9)}}, Word{Verb: "weight"}, false, `{"reason":"disk","state":"drain"}`},
		{"no weight without one", "", nil, Word{Verb: "weight"}, true, ``},

		{"broken JSON, drain", `{"state":`, nil, drain, false, `{"reason":"disk","state":"drain"}`},
		{"broken JSON, ready", `{"state":`, nil, Word{Verb: "ready"}, false, ``},
		{"broken JSON, no weight", `{"state":`, nil, Word{Verb: "weight"}, false, ``},
		{"no object, ready", `"drain"`, nil, Word{Verb: "ready"}, false, ``},
		{"unknown state, weight", `{"state":"bogus","reason":"x"}`, nil, Word{Verb: "weight", Weight: num(1)}, false, `{"weight":1}`},
		{"unreadable weight, drain", `{"weight":"9"}`, nil, Word{Verb: "drain"}, false, `{"state":"drain"}`},
		{"weight out of range, drain", `{"weight":257}`, nil, Word{Verb: "drain"}, false, `{"state":"drain"}`},
		{"weight no whole number, drain", `{"weight":1.5}`, nil, Word{Verb: "drain"}, false, `{"state":"drain"}`},
		{"negative weight, drain", `{"weight":-1}`, nil, Word{Verb: "drain"}, false, `{"state":"drain"}`},
		{"unreadable reason, weight", `{"state":"drain","reason":7}`, nil, Word{Verb: "weight", Weight: num(1)}, false, `{"state":"drain","weight":1}`},
		{"unreadable weight, same state", `{"state":"drain","weight":[]}`, nil, Word{Verb: "drain"}, false, `{"state":"drain"}`},
	} {
		for _, here := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/present=%v", c.name, here), func(t *testing.T) {
				s := fresh(t, srv)
				ctx := t.Context()
				if here {
					join(t, s, a, "t1")
				}
				if c.stored != "" {
					do(t, s, "HSET", s.keys.Admin(web), a.String(), c.stored)
				}
				for _, w := range c.words {
					say(t, s, a, w)
				}
				s.setClock(t0 + 5)
				var version int64
				var present bool
				var err error
				e := observe(t, s, func() { version, present, err = s.SetAdmin(ctx, web, a, c.last) })
				if err != nil || present != here || version != e.version {
					t.Errorf("got %d %v %v, want %d %v", version, present, err, e.version, here)
				}
				if c.same {
					e.nothing(t)
				} else {
					e.oneChange(t, s, a)
				}
				stored, _ := do(t, s, "HGET", s.keys.Admin(web), a.String()).(string)
				got := ""
				if stored != "" {
					var m map[string]any
					must(t, json.Unmarshal([]byte(stored), &m))
					at := t0 + 5
					if c.same {
						at = t0
					}
					if m["at"] != float64(at) {
						t.Errorf("at %.0f, want %d", m["at"], at)
					}
					delete(m, "at")
					text, err := json.Marshal(m) // keys in order
					must(t, err)
					got = string(text)
				}
				if got != c.want {
					t.Errorf("stored %s, want %s", got, c.want)
				}
				if _, err := parseAdmin(stored); err != nil {
					t.Errorf("a reader cannot believe it: %v", err)
				}
			})
		}
	}
}

func TestSetAdminRefuses(t *testing.T) {
	s, err := NewStore(nil, DefaultNamespace) // whoever asks Redis panics
	must(t, err)
	for _, w := range []int{-1, 257} {
		if _, _, err := s.SetAdmin(t.Context(), web, host(1), Word{Verb: "weight", Weight: &w}); err == nil {
			t.Errorf("weight %d was accepted", w)
		}
	}
	if _, _, err := s.SetAdmin(t.Context(), web, host(1), Word{Verb: "drain", Reason: strings.Repeat("r", MaxText+1)}); err == nil {
		t.Error("a reason of 256 bytes was accepted")
	}
	for _, verb := range []string{"", "Drain", "stop"} {
		if _, _, err := s.SetAdmin(t.Context(), web, host(1), Word{Verb: verb}); err == nil {
			t.Errorf("verb %q was accepted", verb)
		}
	}
}

// TestWordOutlivesInstance follows one word through a leave and a return.
func TestWordOutlivesInstance(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	a := host(1)
	join(t, s, a, "t1")
	nine := 9
	say(t, s, a, Word{Verb: "maint", Reason: "disk"})
	say(t, s, a, Word{Verb: "weight", Weight: &nine})
	leave(t, s, a, "t1")
	if _, present, err := s.SetAdmin(t.Context(), web, a, Word{Verb: "ready"}); err != nil || present {
		t.Errorf("got %v %v, want an absent address", present, err)
	}
	say(t, s, a, Word{Verb: "drain"})
	join(t, s, a, "t2")
	snap, err := s.Read(t.Context(), web, nil)
	must(t, err)
	i := snap.Entries[0].Instance
	if i.State() != AdminDrain || i.Weight() != 9 || i.Meta.Weight != 7 || i.Admin.At != t0 {
		t.Errorf("got %+v", i)
	}
}

// TestWordOfAbsentIsPruned checks that a word about an address that never comes
// does not keep its place in the index for ever.
func TestWordOfAbsentIsPruned(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	say(t, s, host(1), Word{Verb: "drain"})
	s.setClock(t0 + pruneAfter + 1)
	say(t, s, host(2), Word{Verb: "drain"})
	if do(t, s, "ZSCORE", s.keys.Changed(web), host(1).String()) != nil {
		t.Error("it is still in the index")
	}
	if do(t, s, "HGET", s.keys.Admin(web), host(1).String()) == nil {
		t.Error("the word itself was lost")
	}
}

// TestSetAdminOfKnown: a word that is to be of an address that somebody has is refused
// where nobody has it, and nothing is written.
func TestSetAdminOfKnown(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	join(t, s, host(1), "a")
	weight := 5
	for _, w := range []Word{{Verb: "drain"}, {Verb: "maint", Force: true}, {Verb: "ready"}, {Verb: "weight", Weight: &weight}} {
		w.Known = true
		for _, svc := range []Service{web, "other"} {
			before := do(t, s, "DBSIZE")
			if version, present, err := s.SetAdmin(t.Context(), svc, host(2), w); !errors.Is(err, ErrAbsent) || present || version > 1 {
				t.Errorf("%s %s: version %d, present %v, %v", w.Verb, svc, version, present, err)
			}
			if after := do(t, s, "DBSIZE"); after != before {
				t.Errorf("%v keys, before %v", after, before)
			}
		}
	}
	drain := Word{Verb: "drain", Known: true}
	if _, present, err := s.SetAdmin(t.Context(), web, host(1), drain); err != nil || !present {
		t.Errorf("of who is there: %v, %v", present, err)
	}
	drain.Known = false
	_, _, err := s.SetAdmin(t.Context(), web, host(2), drain)
	must(t, err)
	if _, _, err := s.SetAdmin(t.Context(), web, host(2), Word{Verb: "ready", Known: true}); err != nil {
		t.Errorf("the end of a word that stands: %v", err)
	}
}
