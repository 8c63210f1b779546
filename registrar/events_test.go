package registrar

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"rollcall/registrar/redistest"
)

// said renders events without their ids and times.
func said(events []Event) []string {
	out := []string{}
	for _, e := range events {
		out = append(out, strings.TrimRight(fmt.Sprintf("%s %s %s %d %s %s", e.What, e.Service, e.Addr, e.Version, e.By, e.Why), " "))
	}
	return out
}

func allEvents(tb testing.TB, s *Store, svcs ...Service) []Event {
	tb.Helper()
	events, err := s.Events(tb.Context(), svcs, "", 0)
	must(tb, err)
	return events
}

// TestEventsOfEachChange plays every change once and reads what the log says of
// it; TestHistories holds it to random histories.
func TestEventsOfEachChange(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t)
	s := fresh(t, srv)
	ctx := t.Context()
	a, b := host(1), host(2)
	beat := func(token, meta string) {
		t.Helper()
		_, err := s.Beat(ctx, web, Beat{Addr: a, Token: token, Meta: meta})
		must(t, err)
	}
	word := func(w Word) { t.Helper(); w.By = "alice"; say(t, s, a, w) }
	twenty := 20
	beat("t1", `{"id":"t1","weight":7}`)
	s.setClock(t0 + 1)
	beat("t1", `{"id":"t1","weight":7}`) // a heartbeat is no change
	beat("t1", `{"id":"t1","weight":8}`)
	beat("t1", `{"id":"t1","weight":8,"zone":"z"}`)
	beat("t1", `{"id":"t1","weight":8,"draining":true}`)
	beat("t1", `no JSON`)
	beat("t2", `{"id":"t2","weight":{}}`) // nobody knows whose it is
	word(Word{Verb: "drain", Reason: "disk"})
	word(Word{Verb: "drain", Reason: "disk"})                                                                                              // it stood already
	_, err := s.changeWith(ctx, s.admin, web, s.keys.overrides(web), a.String(), "maint", "", strings.Repeat("é", 200), "", "", "", 0, "") // more than SetAdmin takes
	must(t, err)
	word(Word{Verb: "ready"})
	word(Word{Verb: "weight", Weight: &twenty})
	word(Word{Verb: "weight"})
	_, err = s.Leave(ctx, web, a, "t2", Unhealthy)
	must(t, err)
	_, err = s.Leave(ctx, web, b, "t3", Left)
	must(t, err)
	join(t, s, b, "t4")
	expire(t, s, b)
	join(t, s, b, "t5")
	_, err = s.Deregister(ctx, web, b, true, "bob")
	must(t, err)
	must(t, s.Canary(ctx))
	want := []string{
		"joined web 10.1.0.2:8080 1 t1",
		"changed web 10.1.0.2:8080 2 t1 weight 8",
		"changed web 10.1.0.2:8080 3 t1",
		"draining web 10.1.0.2:8080 4 t1",
		"changed web 10.1.0.2:8080 5 t1",
		"takeover web 10.1.0.2:8080 6 t2",
		"drained web 10.1.0.2:8080 7 alice disk",
		"maint web 10.1.0.2:8080 8  " + strings.Repeat("é", 128),
		"ready web 10.1.0.2:8080 9 alice",
		"weight web 10.1.0.2:8080 10 alice 20",
		"weight web 10.1.0.2:8080 11 alice own",
		"unhealthy web 10.1.0.2:8080 12 t2",
		"left web 10.1.0.3:8080 13 t3 it was not there",
		"joined web 10.1.0.3:8080 14 t4",
		"expired web 10.1.0.3:8080 15 t4 silent for 15001 ms",
		"joined web 10.1.0.3:8080 16 t5",
		"deregistered web 10.1.0.3:8080 17 bob silent for 0 ms",
	}
	events := allEvents(t, s)
	if got := said(events); !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if events[0].At != t0 || events[1].At != t0+1 {
		t.Errorf("at %d and %d, want %d and a ms later", events[0].At, events[1].At, t0)
	}
}

// TestLogGoesOn has a client add an entry after which there can be none, or none for
// long, as everybody may who may beat: a reaper's next report has the log go on.
func TestLogGoesOn(t *testing.T) {
	srv := redistest.Start(t)
	future := strconv.FormatInt(time.Now().Add(48*time.Hour).UnixMilli(), 10)
	for _, entry := range [][]any{
		{"18446744073709551615-18446744073709551615"}, {"MAXLEN", 0, "18446744073709551615-18446744073709551615"},
		{future + "-18446744073709551615"}, {"9223372036854775807-1"},
	} {
		t.Run(fmt.Sprint(entry...), func(t *testing.T) {
			t.Parallel()
			s := fresh(t, srv)
			ctx := t.Context()
			for n := 1; n <= 3; n++ {
				join(t, s, host(n), "t")
			}
			r := s.EventReader(nil)
			before, err := r.Last(ctx, "", 0)
			must(t, err)
			kept := before
			if entry[0] == "MAXLEN" {
				kept = nil // whoever may add may also cut off
			}
			do(t, s, append(append([]any{"XADD", s.keys.Events()}, entry...), "what", "x")...)
			if len(entry) == 1 {
				_, err = r.Next(ctx) // a reader that has seen it
				must(t, err)
			}
			must(t, s.Report(ctx, "r1", &ReaperStatus{}))
			eventually(t, func() error { // so that no two entries have one id
				last, _, _ := strings.Cut(before[len(before)-1].ID, "-")
				if now := s.rdb.Time(ctx).Val().UnixMilli(); strconv.FormatInt(now, 10) <= last {
					return fmt.Errorf("it is %d, and the last entry is of %s", now, last)
				}
				return nil
			})
			leave(t, s, host(1), "t")
			want := append(slices.Clone(kept), Event{})
			after, err := s.Events(ctx, nil, "", 0)
			must(t, err)
			if len(after) != len(want) || !slices.Equal(after[:len(kept)], kept) || after[len(after)-1].What != EventLeft {
				t.Errorf("the log has %+v", after)
			}
			if err := func() (err error) {
				for range 5 { // a history that has begun anew is said, then comes all that is kept
					var next []Event
					if next, err = r.Next(ctx); slices.ContainsFunc(next, func(e Event) bool { return e.What == EventLeft }) {
						return nil
					}
				}
				return fmt.Errorf("the reader stands still: %w", err)
			}(); err != nil {
				t.Error(err)
			}
			must(t, s.Report(ctx, "r1", &ReaperStatus{}))
			if again, err := s.Events(ctx, nil, "", 0); err != nil || !slices.Equal(again, after) {
				t.Errorf("another report changed it: %+v, %v", again, err)
			}
		})
	}
}

// TestEventsOfHolds has two reapers hold, end, die and come back: the log says
// when a service begins to be held by any, and when by none.
func TestEventsOfHolds(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t)
	s := fresh(t, srv)
	report := func(id string, held ...Service) {
		t.Helper()
		st := ReaperStatus{}
		for _, svc := range held {
			st.Held = append(st.Held, Hold{Service: svc, Suspects: 2, Members: 3})
		}
		must(t, s.Report(t.Context(), id, &st))
	}
	silent := func(d time.Duration) { s.setClock(s.clock() + d.Milliseconds()) }
	var from int
	logged := func(what string, want ...string) {
		t.Helper()
		events := allEvents(t, s)
		got := said(events[from:])
		from = len(events)
		slices.Sort(got)
		if !slices.Equal(got, append([]string{}, want...)) {
			t.Errorf("%s: logged %q, want %q", what, got, want)
		}
	}
	do(t, s, "HSET", s.keys.Reapers(), "odd", "x", "odd2", `{"at":1,"held":"x"}`, "odd3", `{"at":9000000000000,"held":[1,{"service":7}]}`)
	report("r1")
	report("r2", web)
	logged("one", "protected web  0 r2 2 of 3 look dead")
	report("r1", web, "")
	logged("the other too, and every service", "protected   0 r1 2 of 3 look dead")
	report("r2")
	logged("one of two ends")
	must(t, s.Report(t.Context(), "r1", nil))
	logged("the other stops", "released   0 r1", "released web  0 r1")
	report("r1", web)
	logged("again", "protected web  0 r1 2 of 3 look dead")
	silent(ReaperLive)
	report("r2")
	logged("silent, but not for long enough")
	silent(time.Millisecond)
	report("r2")
	logged("it counts as dead", "released web  0 r2")
	o, err := s.Overview(t.Context())
	must(t, err)
	if i := slices.IndexFunc(o.Reapers, func(r ReaperReport) bool { return r.ID == "r1" }); i < 0 || o.Reapers[i].Garbage || len(o.Reapers[i].Held) > 0 || o.Reapers[i].Seen == 0 {
		t.Errorf("of the dead one is left: %+v", o.Reapers)
	}
	report("r1", web)
	logged("it was only slow", "protected web  0 r1 2 of 3 look dead")
	silent(reaperForget + time.Millisecond)
	report("r2")
	logged("it is forgotten", "released web  0 r2")

	do(t, s, "DEL", s.keys.Events())
	do(t, s, "SET", s.keys.Events(), "x")
	report("r1", web)
	if o, err := s.Overview(t.Context()); err != nil || !slices.ContainsFunc(o.Reapers, func(r ReaperReport) bool { return len(r.Held) == 1 }) {
		t.Errorf("a log of another type keeps a reaper from saying what it holds: %+v, %v", o, err)
	}
}

// TestEventsCap shows that the log does not grow.
func TestEventsCap(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	pipe := s.rdb.Pipeline()
	must(t, s.admin.Load(t.Context(), s.rdb).Err())
	for i := range 11_000 {
		s.admin.EvalSha(t.Context(), pipe, s.keys.change(web, s.keys.overrides(web)...), s.keys.Changes(), string(web), "", "e", host(1).String(), "weight", i%200, "", "", "", "", 0, "")
	}
	_, err := pipe.Exec(t.Context())
	must(t, err)
	// Redis drops whole nodes of the stream, of 100 entries.
	if n := s.rdb.XLen(t.Context(), s.keys.Events()).Val(); n < 10_000 || n >= 10_100 {
		t.Errorf("%d entries, want 10,000 to 10,099", n)
	}
	bytes := s.rdb.MemoryUsage(t.Context(), s.keys.Events(), 0).Val()
	t.Logf("%d bytes", bytes)
	if events, err := s.Events(t.Context(), nil, "", 0); err != nil || len(events) < 10_000 || events[len(events)-1].Version != 11_000 {
		t.Errorf("read %d of them, %v", len(events), err)
	}
}

// TestEventsLast reads parts of a log of several pages.
func TestEventsLast(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	const n = 3*eventsPage + 10
	pipe := s.rdb.Pipeline()
	for i := range n {
		svc := "web"
		if i%1000 == 7 {
			svc = "api"
		}
		pipe.Do(t.Context(), "XADD", s.keys.Events(), fmt.Sprintf("%d-%d", 1000+i/2, i%2), "service", svc, "version", i)
	}
	pipe.Do(t.Context(), "XADD", s.keys.Events(), "999999-0", "service", "", "what", EventProtected, "version", "x", "at", "-", "why", "\xff")
	_, err := pipe.Exec(t.Context())
	must(t, err)
	for _, c := range []struct {
		name        string
		svcs        []Service
		since       string
		n           int
		want        int
		first, last int64
	}{
		{"all", nil, "", 0, n + 1, 0, 0},
		{"the last", nil, "", 1, 1, 0, 0},
		{"a page", nil, "", eventsPage, eventsPage, 2011, 0},
		{"more than a page", nil, "", eventsPage + 1, eventsPage + 1, 2010, 0},
		{"of one service, and of all", []Service{"api"}, "", 0, 5, 7, 0},
		{"the last of one service", []Service{"api"}, "", 2, 2, 3007, 0},
		{"of two", []Service{"api", "web"}, "", 0, n + 1, 0, 0},
		{"of nobody but all", []Service{"other"}, "", 0, 1, 0, 0},
		{"after the last", nil, "999999-0", 0, 0, 0, 0},
		{"after the one before", nil, "2504-1", 0, 1, 0, 0},
		{"after the second of a ms", nil, "2000-1", 0, n - 2002 + 1, 2002, 0},
		{"after the first of a ms", nil, "2000-0", 0, n - 2001 + 1, 2001, 0},
		{"from a ms on", nil, EventsAt(2000), 0, n - 2000 + 1, 2000, 0},
		{"since, and fewer", nil, EventsAt(2000), 10, 10, n - 9, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			events, err := s.Events(t.Context(), c.svcs, c.since, c.n)
			must(t, err)
			if len(events) != c.want {
				t.Fatalf("%d events, want %d", len(events), c.want)
			}
			if c.want > 0 && (events[0].Version != c.first || events[c.want-1].Version != c.last) {
				t.Errorf("from %d to %d, want %d to %d", events[0].Version, events[c.want-1].Version, c.first, c.last)
			}
		})
	}
	last, err := s.Events(t.Context(), nil, "", 1)
	must(t, err)
	if e := last[0]; e.At != 0 || e.Why != "\uFFFD" || e.ID != "999999-0" || e.What != EventProtected {
		t.Errorf("%+v", e)
	}
	for _, id := range []string{"x", "1-", "-1", "1-1-1", "+", "$"} {
		if _, err := s.Events(t.Context(), nil, id, 0); err == nil {
			t.Errorf("since %q was accepted", id)
		}
	}
	do(t, s, "DEL", s.keys.Events())
	if events := allEvents(t, s); len(events) > 0 {
		t.Errorf("no log reads as %v", events)
	}
	do(t, s, "SET", s.keys.Events(), "x")
	if events, err := s.Events(t.Context(), nil, "", 0); err == nil {
		t.Errorf("another type reads as %v", events)
	}
}

// TestEventsNext follows the log over its deletion, a restart without data and
// one with a clock that went back.
func TestEventsNext(t *testing.T) {
	t.Parallel()
	s, srv := newStore(t)
	ctx := t.Context()
	join(t, s, host(1), "t1")
	r := s.EventReader([]Service{web})
	events, err := r.Last(ctx, "", 0)
	must(t, err)
	if got := said(events); len(got) != 1 {
		t.Errorf("first %q", got)
	}
	next := func(want ...string) {
		t.Helper()
		var got []string
		eventually(t, func() error {
			events, err := r.Next(ctx)
			got = append(got, said(events)...)
			if err == nil && len(got) < len(want) {
				err = fmt.Errorf("got %q", got)
			}
			return err
		})
		if !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	next() // waits, and there is nothing
	leave(t, s, host(1), "t1")
	_, _, err = s.SetAdmin(ctx, "api", host(2), Word{Verb: "drain"}) // another's
	must(t, err)
	join(t, s, host(1), "t2")
	next("left web 10.1.0.2:8080 2 t1", "joined web 10.1.0.2:8080 3 t2")
	next()

	do(t, s, "DEL", s.keys.Events())
	next()
	leave(t, s, host(1), "t2")
	next("left web 10.1.0.2:8080 4 t2")

	srv.Kill(t)
	if _, err := r.Next(ctx); err == nil {
		t.Error("a dead server answered")
	}
	srv.Launch(t)
	join(t, s, host(1), "t3")
	next("joined web 10.1.0.2:8080 1 t3")

	do(t, s, "DEL", s.keys.Events())
	for i := range 2 {
		do(t, s, "XADD", s.keys.Events(), fmt.Sprintf("1000-%d", i), "service", "web", "what", "joined", "version", i+1)
	}
	if events, err := r.Next(ctx); !errors.Is(err, ErrOtherHistory) || len(events) > 0 {
		t.Errorf("a log that begins before our place: %v, %v", events, err)
	}
	next("joined web  1", "joined web  2")
	next()

	// Nothing came since the given moment, and that is no other history.
	r = s.EventReader(nil)
	if events, err := r.Last(ctx, EventsAt(t0), 0); err != nil || len(events) > 0 {
		t.Errorf("%v, %v", events, err)
	}
	next()
	do(t, s, "XADD", s.keys.Events(), "*", "service", "web", "what", "left")
	next("left web  0")
	do(t, s, "DEL", s.keys.Events())
	do(t, s, "SET", s.keys.Events(), "x")
	if _, err := r.Next(ctx); err == nil {
		t.Error("another type was read")
	}
}
