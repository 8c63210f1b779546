package registrar

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
)

const replID = "0123456789abcdef0123456789abcdef01234567"

// answer is what read.lua would say at t0, version 9.
func answer(full int64, lists ...any) []any {
	return []any{t0, replID, "e", ttlMS, intervalMS, int64(DefaultMaxInstances), append([]any{full, int64(9)}, lists...)}
}

func TestParseSnapshotRefuses(t *testing.T) {
	none := []any{}
	full := func() []any { return answer(1, none, none, none, none, none) }
	set := func(i int, v any) []any { r := full(); r[i] = v; return r }
	list := func(i int, v any) []any { r := full(); r[headParts].([]any)[2+i] = v; return r }
	if _, err := parseSnapshot(web, full(), 0); err != nil {
		t.Fatalf("an empty service: %v", err)
	}
	for _, c := range []struct {
		name string
		r    []any
	}{
		{"nothing", nil},
		{"too short", full()[:headParts]},
		{"no limit", set(5, int64(0))},
		{"no service", set(headParts, nil)},
		{"too short a service", answer(1, none, none, none, none)},
		{"no replication id", set(1, "")},
		{"no time", set(0, int64(0))},
		{"no TTL", set(3, int64(0))},
		{"negative TTL", set(3, int64(-1))},
		{"no interval", set(4, int64(0))},
		{"no list", list(0, "x")},
		{"nil list", list(3, nil)},
		{"full with six lists", answer(1, none, none, none, none, none, none)},
		{"delta with five lists", answer(0, none, none, none, none, none)},
		{"half a pair", answer(1, []any{"10.0.0.1:80"}, none, none, none, none)},
		{"lists of unequal length", answer(0, []any{"10.0.0.1:80"}, none, none, none, none, none)},
	} {
		t.Run(c.name, func(t *testing.T) {
			if s, err := parseSnapshot(web, c.r, 0); err == nil || !reflect.DeepEqual(s, Snapshot{}) {
				t.Errorf("got %+v %v", s, err)
			}
		})
	}
}

func TestFutureTolerance(t *testing.T) {
	for score, ok := range map[int64]bool{t0: true, t0 + futureTolerance: true, t0 + futureTolerance + 1: false} {
		s, err := parseSnapshot(web, answer(1, []any{"10.0.0.1:80", fmt.Sprint(score)}, []any{}, []any{}, []any{}, []any{}), 0)
		must(t, err)
		if s.Entries[0].Present != ok || s.Entries[0].Garbage == "" != ok {
			t.Errorf("%d ms ahead: %+v, want believed %v", score-t0, s.Entries[0], ok)
		}
		if ok && s.Entries[0].Instance.Beat != score {
			t.Errorf("beat %d, want %d", s.Entries[0].Instance.Beat, score)
		}
	}
}

// TestScoreForms reads a score as text and as RESP3's numbers.
func TestScoreForms(t *testing.T) {
	for _, score := range []any{"1500000000000", "1.5e+12", 1.5e12, int64(1_500_000_000_000)} {
		s, err := parseSnapshot(web, answer(0, []any{"10.0.0.1:80"}, []any{score}, []any{nil}, []any{nil}, []any{nil}, []any{nil}), 0)
		must(t, err)
		if e := s.Entries[0]; !e.Present || e.Instance.Beat != 1_500_000_000_000 {
			t.Errorf("%T %v: %+v", score, score, e)
		}
	}
}

// TestFullLeavesOutStrangers checks that words and metadata of nobody make no
// entry, and that notes do.
func TestFullLeavesOutStrangers(t *testing.T) {
	s, err := parseSnapshot(web, answer(1, []any{"10.0.0.1:80", "1"},
		[]any{"10.0.0.2:80", "{}"}, []any{"10.0.0.3:80", "{}"}, []any{"10.0.0.4:80", "left 1 t"}, []any{"10.0.0.5:80", "{}"}), 0)
	must(t, err)
	if len(s.Entries) != 2 || !s.Entries[0].Present || s.Entries[1].Gone == nil {
		t.Errorf("got %+v", s.Entries)
	}
}

// FuzzParseSnapshot stores one row of anything and reads it both ways.
func FuzzParseSnapshot(f *testing.F) {
	f.Add("10.0.0.1:80", "1700000000000", true, `{"id":"t","weight":7}`, `{"state":"drain"}`, "left 1 t", true)
	f.Add("10.0.0.1:80", "nan", true, `{`, `{"weight":300}`, "", false)
	f.Add("10.0.0.1:80", "", false, "", "", "expired 1", true)
	f.Add("x", "+inf", true, "null", "[]", "x", true)
	f.Fuzz(func(t *testing.T, member, score string, here bool, meta, admin, gone string, noted bool) {
		list := func(there bool, v string) (pair, cell []any) {
			if !there {
				return []any{}, []any{nil}
			}
			return []any{member, v}, []any{v}
		}
		scores, score1 := list(here, score)
		metas, meta1 := list(meta != "", meta)
		admins, admin1 := list(admin != "", admin)
		gones, gone1 := list(noted, gone)
		full, err := parseSnapshot(web, answer(1, scores, metas, admins, gones, admins), 0)
		if err != nil {
			t.Fatal(err)
		}
		delta, err := parseSnapshot(web, answer(0, []any{member}, score1, meta1, admin1, gone1, admin1), 0)
		if err != nil {
			t.Fatal(err)
		}
		if (here || noted) && (!reflect.DeepEqual(full.Entries, delta.Entries) || !reflect.DeepEqual(full.Garbage, delta.Garbage)) {
			t.Errorf("full %+v\ndelta %+v", full, delta)
		}
		for _, e := range delta.Entries {
			if e.Addr.String() != member {
				t.Errorf("%q reads as %v", member, e.Addr)
			}
			if e.Present && (e.Garbage != "" || e.Gone != nil) || e.Garbage != "" && e.Gone != nil || !e.Present && e.Instance.Addr.IsValid() {
				t.Errorf("two conclusions: %+v", e)
			}
			if i := e.Instance; e.Present {
				if CheckWeight(i.Weight()) != nil || i.Beat < 0 || i.Beat > t0+futureTolerance || i.Addr != e.Addr {
					t.Errorf("believed: %+v", i)
				}
				switch i.State() {
				case AdminNone, AdminDrain, AdminMaint:
				default:
					t.Errorf("state %q", i.State())
				}
			}
		}
	})
}

func BenchmarkKeys(b *testing.B) {
	k := Keys{ns: DefaultNamespace}
	b.ReportAllocs()
	for b.Loop() {
		k.change(web)
	}
}

func BenchmarkParseSnapshotFull1000(b *testing.B) {
	var scores, metas []any
	for i := range 1000 {
		a := host(i).String()
		scores = append(scores, a, "1700000000000")
		metas = append(metas, a, `{"id":"`+strings.Repeat("A", 26)+`","weight":100,"zone":"a","registered":1700000000000}`)
	}
	r := answer(1, scores, metas, []any{}, []any{})
	b.ReportAllocs()
	for b.Loop() {
		if s, err := parseSnapshot(web, r, 0); err != nil || len(s.Entries) != 1000 {
			b.Fatal(len(s.Entries), err)
		}
	}
}

func BenchmarkParseSnapshotDelta1(b *testing.B) {
	r := answer(0, []any{"10.0.0.1:80"}, []any{"1700000000000"},
		[]any{`{"id":"` + strings.Repeat("A", 26) + `","weight":100,"registered":1700000000000}`}, []any{nil}, []any{nil})
	b.ReportAllocs()
	for b.Loop() {
		if s, err := parseSnapshot(web, r, 0); err != nil || !s.Entries[0].Present {
			b.Fatal(s, err)
		}
	}
}
