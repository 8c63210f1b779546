package registrar

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"rollcall/registrar/redistest"
)

// inForce returns what is in force for addr: of a whole read, of what changed, and of a
// read of the address alone, which must be the same.
func inForceOf(tb testing.TB, s *Store, n int) Admin {
	tb.Helper()
	whole := readFrom(tb, s, nil)
	entry, err := s.Entry(tb.Context(), web, host(n))
	must(tb, err)
	for _, e := range whole.Entries {
		if e.Addr != host(n) || !e.Present {
			continue
		}
		if a, b := text1(e.Instance.Admin), text1(entry.Admin); a != b {
			tb.Errorf("a whole read has %s, one of the address alone %s", a, b)
		}
		return e.Instance.Admin
	}
	return entry.Admin
}

func readFrom(tb testing.TB, s *Store, since *Token) Snapshot {
	tb.Helper()
	snap, err := s.Read(tb.Context(), web, since)
	must(tb, err)
	return snap
}

func text1(a Admin) string {
	text, err := json.Marshal(a)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// TestScope says overrides of an address and of a registration, in every order, and
// looks at what the registration, and one that comes after it at that address, has.
func TestScope(t *testing.T) {
	srv := redistest.Start(t)
	num := func(n int) *int { return &n }
	drain, maint := Word{Verb: "drain"}, Word{Verb: "maint"}
	of := func(w Word, s Scope) Word { w.Scope = s; return w }
	for _, tt := range []struct {
		name       string
		own        bool // the address is the instance's
		said       []Word
		now, after string // "state weight"
	}{
		{"an address", false, []Word{drain}, "drain", "drain"},
		{"its own address", true, []Word{drain}, "drain", ""},
		{"its own, all the same of the address", true, []Word{of(drain, ScopeAddress)}, "drain", "drain"},
		{"a registration", false, []Word{of(drain, ScopeRegistration)}, "drain", ""},
		{"weight of a registration", false, []Word{of(Word{Verb: "weight", Weight: num(7)}, ScopeRegistration)}, " 7", ""},
		{"both, the registration's counts", false, []Word{maint, of(drain, ScopeRegistration)}, "drain", "maint"},
		{"the address's, said later, counts", false, []Word{of(maint, ScopeRegistration), drain}, "drain", "drain"},
		{"ready ends both", false, []Word{maint, of(drain, ScopeRegistration), {Verb: "ready"}}, "", ""},
		{"ready ends both of its own", true, []Word{of(maint, ScopeAddress), drain, {Verb: "ready"}}, "", ""},
		{"ready of the registration leaves the address's", false, []Word{maint, of(drain, ScopeRegistration), of(Word{Verb: "ready"}, ScopeRegistration)}, "maint", "maint"},
		{"own weight ends both", false, []Word{{Verb: "weight", Weight: num(3)}, of(Word{Verb: "weight", Weight: num(4)}, ScopeRegistration), {Verb: "weight"}}, "", ""},
		{"the state of one, the weight of the other", false, []Word{maint, of(Word{Verb: "weight", Weight: num(4)}, ScopeRegistration)}, "maint 4", "maint"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := fresh(t, srv)
			meta := func(id string) string { return fmt.Sprintf(`{"id":%q,"weight":100,"own":%v}`, id, tt.own) }
			come := func(id string) {
				t.Helper()
				_, err := s.Beat(t.Context(), web, Beat{Addr: host(1), Token: id, Meta: meta(id)})
				must(t, err)
			}
			come("t1")
			since := readFrom(t, s, nil).Token
			for i, w := range tt.said {
				s.setClock(t0 + int64(i))
				w.By = fmt.Sprint("op", i)
				say(t, s, host(1), w)
			}
			state := func() string {
				a, weight := inForceOf(t, s, 1), ""
				if a.Weight != nil {
					weight = fmt.Sprint(" ", *a.Weight)
				}
				return string(a.State) + weight
			}
			if got := state(); got != tt.now {
				t.Errorf("in force is %q, want %q", got, tt.now)
			}
			delta := readFrom(t, s, &since)
			if a := delta.Entries[0].Instance.Admin; delta.Full || text1(a) != text1(inForceOf(t, s, 1)) {
				t.Errorf("what changed has %s, full is %v", text1(a), delta.Full)
			}
			if a := inForceOf(t, s, 1); tt.now != "" && a.By != fmt.Sprint("op", len(tt.said)-1) && !strings.Contains(tt.name, "leaves") {
				t.Errorf("by %q", a.By)
			}
			leave(t, s, host(1), "t1")
			come("t2")
			if got := state(); got != tt.after {
				t.Errorf("of the next registration %q is in force, want %q", got, tt.after)
			}
		})
	}
	t.Run("of one that has gone", func(t *testing.T) {
		s := fresh(t, srv)
		join(t, s, host(1), "t1")
		say(t, s, host(1), of(drain, ScopeRegistration))
		leave(t, s, host(1), "t1")
		if _, _, err := s.SetAdmin(t.Context(), web, host(1), Word{Verb: "ready", Known: true}); err != nil {
			t.Errorf("what is listed cannot be ended: %v", err)
		}
		if all, err := s.Overrides(t.Context(), web); err != nil || len(all) != 0 {
			t.Errorf("left are %+v, %v", all, err)
		}
	})
	t.Run("of nobody", func(t *testing.T) {
		s := fresh(t, srv)
		if _, _, err := s.SetAdmin(t.Context(), web, host(1), of(drain, ScopeRegistration)); !errors.Is(err, ErrAbsent) {
			t.Errorf("got %v", err)
		}
	})
}

// TestFor has overrides end at a time, each by itself, and refuses times that are none.
func TestFor(t *testing.T) {
	s, _ := newStore(t)
	join(t, s, host(1), "t1")
	seven := 7
	s.setClock(t0)
	say(t, s, host(1), Word{Verb: "drain", For: 2 * time.Hour})
	say(t, s, host(1), Word{Verb: "weight", Weight: &seven, For: time.Minute})
	a := inForceOf(t, s, 1)
	if a.Until != t0+2*3600_000 || a.WeightUntil != t0+60_000 {
		t.Errorf("got %s", text1(a))
	}
	say(t, s, host(1), Word{Verb: "drain"}) // until somebody ends it
	if a = inForceOf(t, s, 1); a.Until != 0 || a.WeightUntil != t0+60_000 {
		t.Errorf("got %s", text1(a))
	}
	for d, want := range map[time.Duration]string{90 * time.Second: "for 90s", 90 * time.Minute: "for 90m", 48 * time.Hour: "for 48h"} {
		say(t, s, host(1), Word{Verb: "maint", For: d})
		if events := allEvents(t, s); events[len(events)-1].Why != want {
			t.Errorf("of %v the event says %q, want %q", d, events[len(events)-1].Why, want)
		}
	}
	for _, d := range []time.Duration{-time.Second, time.Millisecond, MaxFor + 1} {
		if _, _, err := s.SetAdmin(t.Context(), web, host(1), Word{Verb: "drain", For: d}); err == nil {
			t.Errorf("for %v was accepted", d)
		}
	}
	if _, _, err := s.SetAdmin(t.Context(), web, host(1), Word{Verb: "drain", By: "a\nb"}); err == nil {
		t.Error("two lines of a name were accepted")
	}
}

// TestOverrides lists overrides of addresses and of registrations, of those who are
// there, of those who have gone, and of nobody; more than one call reads.
func TestOverrides(t *testing.T) {
	s, _ := newStore(t)
	s.setClock(t0)
	ctx := t.Context()
	reg := func(w Word) Word { w.Scope = ScopeRegistration; return w }
	for n := 1; n <= 4; n++ {
		join(t, s, host(n), fmt.Sprint("t", n))
	}
	say(t, s, host(1), Word{Verb: "drain", Reason: "disk", By: "alice", For: time.Hour})
	say(t, s, host(2), reg(Word{Verb: "maint"}))
	say(t, s, host(3), reg(Word{Verb: "maint"}))
	say(t, s, host(4), Word{Verb: "maint"})
	leave(t, s, host(3), "t3")
	join(t, s, host(3), "t5") // another
	leave(t, s, host(4), "t4")
	do(t, s, "HSET", s.keys.Admin(web), host(5).String(), "{", "no address", `{"state":"drain"}`)
	for i := range 2500 {
		do(t, s, "HSET", s.keys.Admin(web), fmt.Sprintf("10.9.%d.%d:80", i>>8, i&255), `{"state":"drain"}`)
	}
	all, err := s.Overrides(ctx, web)
	must(t, err)
	if len(all) != 5+2500 {
		t.Fatalf("%d overrides", len(all))
	}
	var got []string
	for _, o := range all[:5] {
		got = append(got, fmt.Sprintf("%s %s %s %s %s %d %v %v", o.Addr, o.Scope, o.State, o.Reason, o.By, o.Until, o.Present, o.Garbage != ""))
	}
	want := []string{
		fmt.Sprintf("%s address drain disk alice %d true false", host(1), t0+3600_000),
		fmt.Sprintf("%s registration maint   0 true false", host(2)),
		fmt.Sprintf("%s registration maint   0 false false", host(3)),
		fmt.Sprintf("%s address maint   0 false false", host(4)),
		fmt.Sprintf("%s address    0 false true", host(5)),
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if a := inForceOf(t, s, 3); a.State != AdminNone {
		t.Errorf("another registration has %s", text1(a))
	}
}

// endDue ends what is due now, as a reaper does, and returns it by address.
func endDue(tb testing.TB, s *Store, now int64) []string {
	tb.Helper()
	s.setClock(now)
	due, err := s.DueOverrides(tb.Context(), now, 1000)
	must(tb, err)
	var all []string
	for svc, of := range due {
		ended, _, err := s.EndOverrides(tb.Context(), svc, "r1", of)
		must(tb, err)
		for _, e := range ended {
			all = append(all, fmt.Sprintf("%s %s: %s", svc, e.Addr, e.Why))
		}
	}
	slices.Sort(all)
	return all
}

// TestOverrideEnds has overrides end when their time is over: each by itself, as a
// change, with an event by the reaper.
func TestOverrideEnds(t *testing.T) {
	s, _ := newStore(t)
	s.setClock(t0)
	join(t, s, host(1), "t1")
	seven, minute := 7, int64(60_000)
	say(t, s, host(1), Word{Verb: "drain", For: time.Minute, By: "alice"})
	say(t, s, host(1), Word{Verb: "weight", Weight: &seven, For: 2 * time.Minute})
	say(t, s, host(1), Word{Verb: "maint", Scope: ScopeRegistration, For: time.Minute})
	if got := endDue(t, s, t0+minute-1); got != nil {
		t.Errorf("before its time %v ended", got)
	}
	if a := inForceOf(t, s, 1); a.State != AdminMaint {
		t.Errorf("in force is %s", text1(a))
	}
	before := readFrom(t, s, nil).Token
	got := endDue(t, s, t0+minute)
	want := []string{"web 10.1.0.2:8080: drain, its time is over", "web 10.1.0.2:8080: maint, its time is over"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	delta := readFrom(t, s, &before)
	if delta.Full || delta.Token.Version != before.Version+1 || len(delta.Entries) != 1 {
		t.Errorf("the change reads as %+v", delta)
	}
	if a := inForceOf(t, s, 1); a.State != AdminNone || a.Weight == nil || *a.Weight != 7 || a.WeightUntil == 0 {
		t.Errorf("in force is %s", text1(a))
	}
	if got := endDue(t, s, t0+2*minute); len(got) != 1 || !strings.Contains(got[0], "weight 7") {
		t.Errorf("got %q", got)
	}
	for _, key := range []string{s.keys.Admin(web), s.keys.Bound(web), s.keys.OverrideDue()} {
		if n := s.rdb.Exists(t.Context(), key).Val(); n != 0 {
			t.Errorf("%s is still there", key)
		}
	}
	events := allEvents(t, s)
	if e := events[len(events)-1]; e.What != EventEnded || e.By != "r1" || e.Version == 0 || e.Addr != host(1).String() {
		t.Errorf("the last event is %+v", e)
	}
	must(t, checkRead(s, t))
}

// checkRead tells whether a whole read of web holds no garbage.
func checkRead(s *Store, tb testing.TB) error {
	for _, e := range readFrom(tb, s, nil).Entries {
		if e.Garbage != "" {
			return errors.New(e.Garbage)
		}
	}
	return nil
}

// TestOrphansEnd has a week pass in steps of a look. Overrides of an address that nobody
// has had end, and of a registration that is away; not where somebody has been there in
// between, however short, nor after a time in which no reaper looked.
func TestOrphansEnd(t *testing.T) {
	srv := redistest.Start(t)
	drain := Word{Verb: "drain", By: "alice"}
	of := func(s Scope) Word { w := drain; w.Scope = s; return w }
	look := overrideLook.Milliseconds()
	week := OrphanFor.Milliseconds()
	for _, tt := range []struct {
		name  string
		scope Scope
		here  bool
		at    func(*testing.T, *Store, int64) // at each look, after so many ms
		ends  bool
	}{
		{"of nobody", ScopeAddress, false, nil, true},
		{"of somebody", ScopeAddress, true, nil, false},
		{"of a registration that is there", ScopeRegistration, true, nil, false},
		{"of one that has gone", ScopeRegistration, true, func(t *testing.T, s *Store, ms int64) {
			if ms == look {
				leave(t, s, host(1), "t1")
			}
		}, true},
		{"of one whose address another has", ScopeRegistration, true, func(t *testing.T, s *Store, ms int64) {
			if ms == look {
				leave(t, s, host(1), "t1")
				join(t, s, host(1), "t2")
			}
		}, true},
		{"who comes for a moment in between", ScopeAddress, false, func(t *testing.T, s *Store, ms int64) {
			if ms == week/2/look*look {
				s.setClock(t0 + ms - look/2)
				join(t, s, host(1), "t1")
				leave(t, s, host(1), "t1")
			}
		}, false},
		{"nobody looks for an hour", ScopeAddress, false, func(t *testing.T, s *Store, ms int64) {
			if ms == week/2/look*look {
				do(t, s, "ZADD", s.keys.OverrideDue(), t0+ms-3600_000, "web a "+host(1).String())
			}
		}, false},
		{"written by hand", ScopeAddress, false, func(t *testing.T, s *Store, ms int64) {
			if ms == 0 {
				do(t, s, "DEL", s.keys.Admin(web), s.keys.OverrideDue())
				do(t, s, "HSET", s.keys.Admin(web), host(1).String(), `{"state":"drain"}`)
				must(t, s.AdoptOverrides(t.Context(), t0, web))
			}
		}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := fresh(t, srv)
			s.setClock(t0)
			if tt.here {
				join(t, s, host(1), "t1")
			}
			say(t, s, host(1), of(tt.scope))
			var ended []string
			for ms := int64(0); ms <= week+5*look; ms += look {
				if tt.at != nil {
					tt.at(t, s, ms)
				}
				if ended = append(ended, endDue(t, s, t0+ms)...); len(ended) > 0 && ms < week {
					t.Fatalf("ended after %v: %q", time.Duration(ms)*time.Millisecond, ended)
				}
			}
			if (len(ended) > 0) != tt.ends {
				t.Errorf("a week later %q had ended", ended)
			}
		})
	}
}

// TestManyOrphans bounds what overrides of addresses that nobody has cost a reader:
// those of 15,000 made a whole read hold Redis for 25 to 35 ms.
func TestManyOrphans(t *testing.T) {
	s, _ := newStore(t)
	s.setClock(t0)
	for n := 1; n <= 20; n++ {
		join(t, s, host(n), fmt.Sprint("t", n))
	}
	say(t, s, host(3), Word{Verb: "drain"})
	pipe := s.rdb.Pipeline()
	for _, key := range []string{s.keys.Admin(web), s.keys.Bound(web)} {
		for i := range 15_000 {
			pipe.HSet(t.Context(), key, fmt.Sprintf("10.9.%d.%d:80", i>>8, i&255), `{"state":"drain","reason":"the disk of this host is broken","at":1700000000000,"id":"x"}`)
		}
	}
	_, err := pipe.Exec(t.Context())
	must(t, err)
	do(t, s, "CONFIG", "RESETSTAT")
	const times = 20
	for range times {
		snap := readFrom(t, s, nil)
		if !snap.Full || len(snap.Entries) != 20 || inForceOf(t, s, 3).State != AdminDrain {
			t.Fatalf("read %d entries", len(snap.Entries))
		}
	}
	stats := text(do(t, s, "INFO", "commandstats"))
	_, rest, found := strings.Cut(stats, "cmdstat_evalsha_ro:")
	var calls, usec int64
	if _, err := fmt.Sscanf(rest, "calls=%d,usec=%d", &calls, &usec); !found || err != nil {
		t.Fatalf("no time of the scripts in %q", stats)
	}
	t.Logf("a read of 20 instances and 30,000 overrides of nobody: %d us of Redis", usec/calls)
}
