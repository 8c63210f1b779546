package registrar

import (
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"rollcall/registrar/redistest"
)

func TestPublish(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t)
	s := fresh(t, srv)
	ctx := t.Context()
	want := map[netip.AddrPort]map[string]ServerState{}
	publish := func(seen Seen, count int) {
		t.Helper()
		n, err := s.Publish(ctx, "lb1", web, seen)
		if err != nil || n != count {
			t.Errorf("%d addresses, %v, want %d", n, err, count)
		}
		for a, st := range seen.Servers {
			if want[a] = st; len(st) == 0 {
				delete(want, a)
			}
		}
		for _, some := range [][]netip.AddrPort{nil, {host(1), host(1999), host(5000)}} {
			sights, err := s.Sights(ctx, web, []string{"lb1", "lb2"}, some...)
			must(t, err)
			expect := maps.Clone(want)
			if some != nil {
				maps.DeleteFunc(expect, func(a netip.AddrPort, _ map[string]ServerState) bool { return a != some[0] && a != some[1] })
			}
			one := Sight{"lb1", s.clock() - seen.Age.Milliseconds(), seen.Up, seen.Version, seen.Counts, expect}
			if other := (Sight{Balancer: "lb2", Servers: map[netip.AddrPort]map[string]ServerState{}}); !reflect.DeepEqual(sights, []Sight{one, other}) {
				t.Errorf("read %d addresses at %d, and %+v; want %d at %d", len(sights[0].Servers), sights[0].At, sights[1], len(one.Servers), one.At)
			}
		}
	}
	many := map[netip.AddrPort]map[string]ServerState{}
	for n := range 2 * sightChunk * 2 { // whole chunks
		many[host(n)] = map[string]ServerState{"be": {Server: fmt.Sprint("web", n), State: "ready", Check: "up", Weight: n % 257, Note: NoteHeld, Why: `"x"`, Since: t0, Until: t0 + 1}, "be2": {}}
	}
	counts := map[string]Standing{"be": {Registered: 2000, Serving: 3, Not: map[string]Example{ReasonDown: {7, "10.0.0.1:80", `"x"`, t0}}}, "be2": {}}
	publish(Seen{Up: map[string]int{"be": 7, "be2": 0}, Version: 12, Counts: counts, Servers: many}, 2000)
	s.setClock(t0 + 1000)
	publish(Seen{Age: 300 * time.Millisecond}, 2000)
	publish(Seen{Servers: map[netip.AddrPort]map[string]ServerState{host(1): nil, host(2): {"be": {State: "maint"}}, host(5001): nil}}, 1999)
	want = map[netip.AddrPort]map[string]ServerState{}
	publish(Seen{Anew: true, Servers: map[netip.AddrPort]map[string]ServerState{host(1): {"be": {State: "drain"}}}}, 1)
	publish(Seen{}, 1)

	// What others write there is not believed.
	key := s.keys.Seen(web, "lb1")
	do(t, s, "HSET", key, "at", "x", "up", `{"be":1,"be2":"x"}`, "version", "-1", "counts", `{"be":1}`, "10.0.0.1:80", "x", "10.0.0.2:80", `{"be":{"weight":"x"}}`, "10.0.0.3:80", "{}", "010.0.0.1:80", `{"be":{}}`, "", "1")
	sights, err := s.Sights(ctx, web, []string{"lb1"})
	if err != nil || sights[0].At != 0 || sights[0].Up != nil || sights[0].Version != 0 || sights[0].Counts != nil || !reflect.DeepEqual(sights[0].Servers, want) {
		t.Errorf("%+v, %v", sights, err)
	}
	if left := s.rdb.PTTL(ctx, key).Val(); left <= 59*time.Minute || left > time.Hour {
		t.Errorf("it is forgotten in %v", left)
	}
	do(t, s, "DEL", key)
	do(t, s, "SET", key, "x")
	if _, err := s.Publish(ctx, "lb1", web, Seen{}); err == nil {
		t.Error("wrote to another type")
	}
	if sights, err := s.Sights(ctx, web, []string{"lb1"}); err == nil {
		t.Errorf("another type reads as %+v", sights)
	}
	want = map[netip.AddrPort]map[string]ServerState{}
	publish(Seen{Anew: true}, 0)
	if sights, err := s.Sights(ctx, web, nil); err != nil || len(sights) > 0 {
		t.Errorf("of no balancer: %+v, %v", sights, err)
	}
}

func TestEntry(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	ctx := t.Context()
	entry := func(svc Service, a netip.AddrPort) AddrEntry {
		t.Helper()
		e, err := s.Entry(ctx, svc, a)
		must(t, err)
		// A whole read must say the same.
		snap, err := s.Read(ctx, svc, nil)
		must(t, err)
		same := Entry{Addr: a}
		for _, x := range snap.Entries {
			if x.Addr == a {
				same = x
			}
		}
		if !reflect.DeepEqual(e.Entry, same) || e.Token != snap.Token || e.TTL != snap.TTL || e.Interval != snap.Interval || e.Now != s.clock() {
			t.Errorf("got %+v, a read says %+v at %v", e, same, snap.Token)
		}
		return e
	}
	if e := entry(web, host(1)); e.Present || e.Gone != nil || e.Changed != 0 || e.Token.Version != 0 || e.TTL != DefaultTTL {
		t.Errorf("of nobody: %+v", e)
	}
	joined(t, s) // 1 is there, 2 in maint, 3 has left
	for n, want := range map[int]AddrEntry{
		1: {Entry: Entry{Present: true}, Changed: 1},
		2: {Entry: Entry{Present: true}, Admin: Admin{State: AdminMaint, At: t0}, Changed: 4},
		3: {Entry: Entry{Gone: &Gone{Left, t0, "t3"}}, Changed: 5},
	} {
		e := entry(web, host(n))
		if e.Present != want.Present || e.Admin != want.Admin || e.Changed != want.Changed || !reflect.DeepEqual(e.Gone, want.Gone) || e.Token.Version != 5 {
			t.Errorf("of %d: %+v", n, e)
		}
	}
	say(t, s, host(3), Word{Verb: "drain", Reason: "disk"})
	if e := entry(web, host(3)); e.Present || e.Admin.State != AdminDrain || e.Admin.Reason != "disk" || e.Changed != 6 {
		t.Errorf("a word about who is away: %+v", e)
	}
	do(t, s, "HSET", s.keys.Admin(web), host(3).String(), "x", host(1).String(), "x")
	do(t, s, "HSET", s.keys.Gone(web), host(4).String(), "x")
	for _, n := range []int{1, 3, 4} {
		e, err := s.Entry(ctx, web, host(n))
		if err != nil || e.Garbage == "" {
			t.Errorf("of %d, which cannot be read: %+v, %v", n, e, err)
		}
	}
	for i, key := range s.keys.change(web)[:11] {
		s := fresh(t, srv)
		key = s.keys.change(web)[i]
		joined(t, s)
		do(t, s, "DEL", key)
		do(t, s, "RPUSH", key, "x")
		unread := i == 4 || i == 7 || i == 8 // gone-at, services, version
		if e, err := s.Entry(ctx, web, host(1)); unread != (err == nil) {
			t.Errorf("%s is another type: %+v, %v", key, e, err)
		}
	}
}

func TestReason(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		st   ServerState
		want string
	}{
		{ServerState{Server: "s", State: "ready", Weight: 1}, ""},
		{ServerState{Server: "s", State: "ready", Check: "up", Weight: 256}, ""},
		{ServerState{Server: "s", State: "ready", Weight: 1, Note: NoteHeld}, ""},
		{ServerState{Server: "s", State: "ready", Check: "down", Weight: 1}, ReasonDown},
		{ServerState{Server: "s", State: "ready", Down: true, Weight: 1}, ReasonDown},
		{ServerState{Server: "s", State: "ready", Weight: 0}, ReasonWeight},
		{ServerState{Server: "s", State: "drain", Weight: 1}, ReasonDrain},
		{ServerState{Server: "s", State: "maint", Weight: 1}, ReasonMaint},
		{ServerState{State: "maint"}, ReasonMaint},
		{ServerState{Server: "s", State: "ready", Weight: 0, Note: NoteUndone}, NoteUndone},
		{ServerState{Note: NoteUnplaced}, NoteUnplaced},
		{ServerState{}, ReasonPending},
	} {
		if got := c.st.Reason(); got != c.want {
			t.Errorf("%+v: %q, want %q", c.st, got, c.want)
		}
	}
	var n Standing
	n.Add(host(3), ServerState{Server: "s", State: "ready", Weight: 1})
	n.Add(host(2), ServerState{Server: "s", State: "ready", Check: "down", Weight: 1, Why: "late", Since: 9})
	n.Add(host(1), ServerState{Server: "s", State: "ready", Check: "down", Weight: 1, Why: "early", Since: 8})
	n.Add(host(0), ServerState{Server: "s", State: "ready", Check: "down", Weight: 1, Why: "last", Since: 10})
	if want := (Standing{4, 1, map[string]Example{ReasonDown: {3, host(1).String(), "early", 8}}}); !reflect.DeepEqual(n, want) {
		t.Errorf("%+v, want %+v", n, want)
	}
}
