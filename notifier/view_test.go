package notifier

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"rollcall/registrar"
)

// here, left and broken are entries of the n-th host.
func here(n, weight int) registrar.Entry {
	return registrar.Entry{Addr: host(n), Present: true, Instance: registrar.Instance{Addr: host(n), Meta: registrar.Meta{Weight: weight}}}
}

func left(n int, at int64, token string) registrar.Entry {
	return registrar.Entry{Addr: host(n), Gone: &registrar.Gone{Reason: registrar.Left, At: at, Token: token}}
}

// is gives an instance an id and the time of its last heartbeat, ms.
func is(e registrar.Entry, id string, beat int64) registrar.Entry {
	e.Instance.Meta.ID, e.Instance.Beat = id, beat
	return e
}

func drains(e registrar.Entry) registrar.Entry {
	e.Instance.Meta.Draining = true
	return e
}

// why gives a note another reason.
func why(e registrar.Entry, r registrar.Reason) registrar.Entry {
	g := *e.Gone
	g.Reason = r
	e.Gone = &g
	return e
}

func broken(n int) registrar.Entry { return registrar.Entry{Addr: host(n), Garbage: "score"} }

func change(kind string, now int64, entries ...registrar.Entry) Change {
	return Change{
		Snapshot:    registrar.Snapshot{Service: web, Full: kind != "delta", Entries: entries, Now: now, Token: registrar.Token{Version: now}},
		Interrupted: kind == "interrupted",
	}
}

// show renders what a view knows: "1 here 7", "2 left", "3 absent", "4 garbage".
func show(e registrar.Entry) string {
	switch {
	case e.Garbage != "":
		return "garbage"
	case e.Present && e.Instance.Meta.Draining:
		return fmt.Sprint("drains ", e.Instance.Weight())
	case e.Present:
		return fmt.Sprint("here ", e.Instance.Weight())
	case e.Gone != nil:
		return string(e.Gone.Reason)
	}
	return "absent"
}

func TestViewApply(t *testing.T) {
	for _, tc := range []struct {
		name    string
		changes []Change
		changed string // by the last one
		want    map[int]string
		each    int
	}{
		{"nothing known", nil, "[]", map[int]string{1: "absent"}, 0},
		{"first", []Change{change("full", 10, here(1, 7), left(2, 5, "a"), broken(3))}, "[1 2 3]",
			map[int]string{1: "here 7", 2: "left", 3: "garbage", 4: "absent"}, 3},
		{"delta", []Change{change("full", 10, here(1, 7), here(2, 7)), change("delta", 11, here(2, 8), here(3, 9))}, "[2 3]",
			map[int]string{1: "here 7", 2: "here 8", 3: "here 9"}, 3},
		{"delta of a departure", []Change{change("full", 10, here(1, 7), here(2, 7)), change("delta", 11, left(1, 11, "a"))}, "[1]",
			map[int]string{1: "left", 2: "here 7"}, 2},
		{"delta without a note", []Change{change("full", 10, here(1, 7)), change("delta", 11, registrar.Entry{Addr: host(1)})}, "[1]",
			map[int]string{1: "absent"}, 1},
		{"delta first", []Change{change("delta", 10, here(1, 7))}, "[1]", map[int]string{1: "here 7"}, 1},
		{"empty delta", []Change{change("full", 10, here(1, 7)), change("delta", 11)}, "[]", map[int]string{1: "here 7"}, 1},
		{"turned to garbage and back", []Change{change("full", 10, here(1, 7)), change("delta", 11, broken(1)), change("delta", 12, here(1, 8))}, "[1]",
			map[int]string{1: "here 8"}, 1},
		{"full, some vanished", []Change{change("full", 10, here(1, 7), here(2, 7), left(3, 5, "a")), change("full", 11, here(2, 7))}, "[1 2 3]",
			map[int]string{1: "absent", 2: "here 7", 3: "absent"}, 1},
		{"full and empty", []Change{change("full", 10, here(1, 7)), change("full", 11)}, "[1]", map[int]string{1: "absent"}, 0},
		{"interrupted: a note from before", []Change{change("full", 10, here(1, 7)), change("interrupted", 20, left(1, 15, "a"), left(2, 20, "b"))}, "[1 2]",
			map[int]string{1: "absent", 2: "absent"}, 2},
		{"interrupted: a note by a clock ahead", []Change{change("full", 10, here(1, 7)), change("interrupted", 20, left(1, 25, "a")),
			change("full", 50, left(1, 25, "a"))}, "[1]", map[int]string{1: "absent"}, 1},
		{"interrupted: still not believed when read again", []Change{change("full", 10, here(1, 7)), change("interrupted", 20, left(1, 15, "a")),
			change("delta", 21, left(1, 15, "a"), here(2, 7)), change("full", 22, left(1, 15, "a"))}, "[1 2]", map[int]string{1: "absent", 2: "absent"}, 1},
		{"interrupted: a note from after", []Change{change("full", 10, here(1, 7)), change("interrupted", 20, here(1, 7)),
			change("delta", 21, left(1, 21, "a"))}, "[1]", map[int]string{1: "left"}, 1},
		{"interrupted: a note of the same millisecond", []Change{change("full", 10, here(1, 7)), change("interrupted", 20, here(1, 7)),
			change("delta", 21, left(1, 20, "a"))}, "[1]", map[int]string{1: "left"}, 1},
		{"interrupted: left once more", []Change{change("full", 10, here(1, 7)), change("interrupted", 20, left(1, 15, "a")),
			change("delta", 21, left(1, 21, "b"))}, "[1]", map[int]string{1: "left"}, 1},
		{"interrupted twice", []Change{change("full", 10, here(1, 7)), change("interrupted", 20, here(1, 7)), change("delta", 21, left(1, 21, "a")),
			change("interrupted", 30, left(1, 21, "a"))}, "[1]", map[int]string{1: "left"}, 1},
		{"interrupted twice, and another's note", []Change{change("full", 10, here(1, 7)), change("interrupted", 20, here(1, 7)), change("delta", 21, left(1, 21, "a")),
			change("interrupted", 30, left(1, 20, "b"))}, "[1]", map[int]string{1: "absent"}, 1},
		{"interrupted: what its owner says, of the id that was there", []Change{change("full", 10, is(here(1, 7), "a", 9), is(here(2, 7), "b", 9), is(here(3, 7), "c", 9)),
			change("interrupted", 20, left(1, 15, "a"), why(left(2, 15, "b"), registrar.Unhealthy), left(3, 15, "d"))}, "[1 2 3]",
			map[int]string{1: "left", 2: "unhealthy", 3: "absent"}, 3},
		{"interrupted: only silence, or an operator's word, of the id that was there", []Change{change("full", 10, is(here(1, 7), "a", 9), is(here(2, 7), "b", 9)),
			change("interrupted", 20, why(left(1, 15, "a"), registrar.Expired), why(left(2, 15, "b"), registrar.Operator))}, "[1 2]",
			map[int]string{1: "absent", 2: "absent"}, 2},
		{"interrupted: what its owner says, by a clock behind", []Change{change("full", 10_000, is(here(1, 7), "a", 10_000)),
			change("interrupted", 9000, left(1, 9000, "a"))}, "[1]", map[int]string{1: "left"}, 1},
		{"interrupted: what its owner said before it came back as the same", []Change{change("full", 700_000, is(here(1, 7), "a", 700_000)),
			change("interrupted", 700_001, left(1, 15, "a"))}, "[1]", map[int]string{1: "absent"}, 1},
		{"interrupted twice, and its owner has said so", []Change{change("full", 10, is(here(1, 7), "a", 9)), change("interrupted", 20, left(1, 15, "a")),
			change("interrupted", 30, left(1, 15, "a"))}, "[1]", map[int]string{1: "left"}, 1},
		{"interrupted: it is back in a register that lacks its leaving", []Change{change("full", 10, is(here(1, 7), "a", 9)), change("delta", 11, left(1, 11, "a")),
			change("interrupted", 20, is(here(1, 7), "a", 9))}, "[1]", map[int]string{1: "left"}, 1},
		{"interrupted: the same, read again", []Change{change("full", 10, is(here(1, 7), "a", 9)), change("delta", 11, left(1, 11, "a")),
			change("interrupted", 20, is(here(1, 7), "a", 9)), change("full", 30, is(here(1, 7), "a", 9))}, "[1]", map[int]string{1: "left"}, 1},
		{"interrupted: the same, and it beats", []Change{change("full", 10, is(here(1, 7), "a", 9)), change("delta", 11, left(1, 11, "a")),
			change("interrupted", 20, is(here(1, 7), "a", 9)), change("full", 30, is(here(1, 7), "a", 25))}, "[1]", map[int]string{1: "here 7"}, 1},
		{"interrupted: the same, and another is there", []Change{change("full", 10, is(here(1, 7), "a", 9)), change("delta", 11, left(1, 11, "a")),
			change("interrupted", 20, is(here(1, 7), "b", 9))}, "[1]", map[int]string{1: "here 7"}, 1},
		{"interrupted: an expired one is back", []Change{change("full", 10, is(here(1, 7), "a", 9)), change("delta", 11, why(left(1, 11, "a"), registrar.Expired)),
			change("interrupted", 20, is(here(1, 7), "a", 9))}, "[1]", map[int]string{1: "here 7"}, 1},
		{"interrupted: it drains no more in a register that lacks that", []Change{change("full", 10, drains(is(here(1, 7), "a", 9))),
			change("interrupted", 20, is(here(1, 8), "a", 5)), change("full", 30, is(here(1, 8), "a", 5))}, "[1]", map[int]string{1: "drains 7"}, 1},
		{"interrupted: it drains no more, and has beaten since", []Change{change("full", 10, drains(is(here(1, 7), "a", 9))),
			change("interrupted", 20, is(here(1, 8), "a", 15))}, "[1]", map[int]string{1: "here 8"}, 1},
		{"drains no more, without an interruption", []Change{change("full", 10, drains(is(here(1, 7), "a", 9))),
			change("delta", 20, is(here(1, 8), "a", 5))}, "[1]", map[int]string{1: "here 8"}, 1},
		{"interrupted: garbage stays in sight", []Change{change("full", 10, here(1, 7)), change("interrupted", 20, broken(1))}, "[1]",
			map[int]string{1: "garbage"}, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var v View
			var changed []netip.AddrPort
			for _, c := range tc.changes {
				before := fmt.Sprint(c.Entries)
				changed = v.Apply(c)
				if after := fmt.Sprint(c.Entries); after != before {
					t.Errorf("Apply changed its argument from %s to %s", before, after)
				}
				if v.Token != c.Token || !v.Known {
					t.Errorf("token %v, known %v after %v", v.Token, v.Known, c.Token)
				}
			}
			slices.SortFunc(changed, netip.AddrPort.Compare)
			ns := make([]int, len(changed))
			for i, a := range changed {
				ns[i] = int(a.Addr().As4()[3]) - 1
			}
			if got := fmt.Sprint(ns); got != tc.changed {
				t.Errorf("changed %s, want %s", got, tc.changed)
			}
			for _, n := range slices.Sorted(maps.Keys(tc.want)) {
				e := v.Lookup(host(n))
				if got := show(e); got != tc.want[n] || e.Addr != host(n) {
					t.Errorf("host %d: %s at %s, want %s", n, got, e.Addr, tc.want[n])
				}
			}
			each := 0
			v.Each(func(e registrar.Entry) {
				each++
				if show(e) != show(v.Lookup(e.Addr)) {
					t.Errorf("Each and Lookup differ on %s", e.Addr)
				}
			})
			if each != tc.each {
				t.Errorf("%d mentioned, want %d", each, tc.each)
			}
		})
	}
}

func TestParseMessage(t *testing.T) {
	for _, tc := range []struct {
		payload string
		svc     registrar.Service
		version int64
		ok      bool
	}{
		{"7 web 7", web, 7, true},
		{"0 web 0", web, 0, true},
		{"9007199254740991 web 9007199254740991", web, registrar.MaxVersion, true},
		{"9007199254740992 web 1", "", 0, false}, // no number
		{"1 web 9007199254740992", "", 0, false},
		{"1 web 9223372036854775808", "", 0, false},
		{"9007199254740991 " + strings.Repeat("a", 63) + " 9007199254740991", registrar.Service(strings.Repeat("a", 63)), registrar.MaxVersion, true},
		{"1 " + strings.Repeat("a", 64) + " 1", "", 0, false},
		{"", "", 0, false},
		{"12", "", 0, false},
		{"12 web", "", 0, false},
		{"12 web ", "", 0, false},
		{"12  7", "", 0, false},
		{"12 web 7 ", "", 0, false},
		{" 12 web 7", "", 0, false},
		{"12 web 7 8", "", 0, false},
		{"x web 7", "", 0, false},
		{"12 web x", "", 0, false},
		{"12 web -7", "", 0, false},
		{"-12 web 7", "", 0, false},
		{"12 WEB 7", "", 0, false},
		{"12 web 7\n", "", 0, false},
		{"12\tweb\t7", "", 0, false},
		{"12 web " + strings.Repeat("0", 200) + "7", "", 0, false},
	} {
		t.Run(tc.payload, func(t *testing.T) {
			// The global version of those that are right is the service's.
			global, svc, version, ok := parseMessage(tc.payload)
			if ok != tc.ok || ok && (svc != tc.svc || version != tc.version || global != tc.version) {
				t.Errorf("%d %q %d %v, want %d %q %d %v", global, svc, version, ok, tc.version, tc.svc, tc.version, tc.ok)
			}
		})
	}
}

func FuzzParseMessage(f *testing.F) {
	for _, s := range []string{"12 web 7", "", "  ", "1 web -1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, payload string) {
		global, svc, version, ok := parseMessage(payload)
		if !ok {
			return
		}
		if _, err := registrar.ParseService(string(svc)); err != nil || version < 0 || global < 0 {
			t.Errorf("%q: %d %q %d", payload, global, svc, version)
		}
	})
}

func BenchmarkParseMessage(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		parseMessage("123456 web-frontend 98765")
	}
}

func BenchmarkViewApplyDelta(b *testing.B) {
	for _, size := range []int{100, 10_000} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			var v View
			all := make([]registrar.Entry, size)
			for i := range all {
				all[i] = here(i, 1)
			}
			v.Apply(change("full", 1, all...))
			c := change("delta", 2, here(1, 2), here(2, 2), left(3, 2, "a"))
			b.ReportAllocs()
			for b.Loop() {
				v.Apply(c)
			}
		})
	}
}
