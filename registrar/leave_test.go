package registrar

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"rollcall/registrar/redistest"
)

func TestLeave(t *testing.T) {
	srv := redistest.Start(t)
	a := host(1)
	held := func(tb testing.TB, s *Store) { join(tb, s, a, "t1") }
	note := func(text string) func(testing.TB, *Store) {
		return func(tb testing.TB, s *Store) { do(tb, s, "HSET", s.keys.Gone(web), a.String(), text) }
	}
	const other = "NOTOWNER"
	for _, c := range []struct {
		name   string
		before func(testing.TB, *Store)
		token  string
		why    Reason
		want   string // OK, SAME or NOTOWNER
	}{
		{"own", held, "t1", Left, "OK"},
		{"own, unhealthy", held, "t1", Unhealthy, "OK"},
		{"with another's token", held, "t2", Left, other},
		{"with an empty token", held, "", Left, other},
		{"never registered", nil, "t1", Left, "OK"},
		{"after expired", func(tb testing.TB, s *Store) { held(tb, s); expire(tb, s, a) }, "t1", Left, "OK"},
		{"after an operator", func(tb testing.TB, s *Store) {
			held(tb, s)
			_, err := s.Deregister(tb.Context(), web, a, true, "")
			must(tb, err)
		}, "t1", Left, "OK"},
		{"after another expired", func(tb testing.TB, s *Store) { held(tb, s); expire(tb, s, a) }, "t2", Left, other},
		{"after another left", func(tb testing.TB, s *Store) { held(tb, s); leave(tb, s, a, "t1") }, "t2", Left, other},
		{"twice", func(tb testing.TB, s *Store) { held(tb, s); leave(tb, s, a, "t1") }, "t1", Left, "SAME"},
		{"after unhealthy", func(tb testing.TB, s *Store) {
			held(tb, s)
			_, err := s.Leave(tb.Context(), web, a, "t1", Unhealthy)
			must(tb, err)
		}, "t1", Left, "SAME"},
		{"after a takeover", func(tb testing.TB, s *Store) { held(tb, s); join(tb, s, a, "t2") }, "t1", Left, other},
		{"the note is unreadable", note("garbage"), "t1", Left, "OK"},
		{"the note names no token", note("expired 1699999999999 "), "t1", Left, "OK"},
		{"the note of a leave names no token", note("left 1699999999999 "), "t1", Left, "OK"},
		{"others stay", func(tb testing.TB, s *Store) { held(tb, s); join(tb, s, host(2), "t2") }, "t1", Left, "OK"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			ctx := t.Context()
			if c.before != nil {
				c.before(t, s)
			}
			s.setClock(s.clock() + 1)
			var version int64
			var err error
			e := observe(t, s, func() { version, err = s.Leave(ctx, web, a, c.token, c.why) })
			if c.want == other {
				if !errors.Is(err, ErrNotOwner) {
					t.Errorf("got %v, want ErrNotOwner", err)
				}
				e.nothing(t)
				return
			}
			if err != nil || version != e.version {
				t.Errorf("got %d %v, want %d", version, err, e.version)
			}
			if c.want == "SAME" {
				e.nothing(t)
				return
			}
			e.oneChange(t, s, a)
			if want := fmt.Sprintf("%s %d %s", c.why, s.clock(), c.token); gone(t, s, a) != want {
				t.Errorf("noted %q, want %q", gone(t, s, a), want)
			}
			if got := s.rdb.ZScore(ctx, s.keys.GoneAt(web), a.String()).Val(); got != float64(s.clock()) {
				t.Errorf("gone-at %.0f, want %d", got, s.clock())
			}
			if present(t, s, a) || do(t, s, "HGET", s.keys.Meta(web), a.String()) != nil {
				t.Error("it is still there")
			}
			if len(diff(map[string]string{"services": e.before["services"]}, map[string]string{"services": e.after["services"]})) > 0 {
				t.Error("a name is off the list of services, which is the reapers' to do")
			}
			// A beat that was on its way must not bring it back.
			for _, agent := range []string{"", "a1"} {
				e := observe(t, s, func() {
					r, err := s.Beat(ctx, web, Beat{Addr: a, Token: c.token, Meta: metaOf(c.token), Agent: agent})
					if got := beatOutcome(r, err); got != "LEFT" {
						t.Errorf("late beat, agent %q: %s, want LEFT", agent, got)
					}
				})
				e.nothing(t)
			}
		})
	}
}

func TestDeregister(t *testing.T) {
	srv := redistest.Start(t)
	a := host(1)
	held := func(tb testing.TB, s *Store) { join(tb, s, a, "t1") }
	for _, c := range []struct {
		name   string
		before func(testing.TB, *Store)
		after  int64 // ms since
		force  bool
		want   error
		text   string // in the error
	}{
		{"absent", nil, 0, false, ErrAbsent, ""},
		{"absent, by force", nil, 0, true, ErrAbsent, ""},
		{"gone", func(tb testing.TB, s *Store) { held(tb, s); leave(tb, s, a, "t1") }, 0, true, ErrAbsent, ""},
		{"beat two intervals ago", held, 2 * intervalMS, false, ErrBeats, "last beat 10s ago"},
		{"beat two intervals and 1 ms ago", held, 2*intervalMS + 1, false, nil, ""},
		{"two intervals of the registry's own", func(tb testing.TB, s *Store) {
			held(tb, s)
			do(tb, s, "HSET", s.keys.Config(), "interval_ms", 1000)
		}, 2001, false, nil, ""},
		{"by force", held, 0, true, nil, ""},
		{"score in the future", func(tb testing.TB, s *Store) {
			held(tb, s)
			do(tb, s, "ZADD", s.keys.Instances(web), t0+1_000_000, a.String())
		}, 0, false, ErrBeats, "last beat 0s ago"},
		{"added by hand", func(tb testing.TB, s *Store) {
			do(tb, s, "ZADD", s.keys.Instances(web), 1, a.String())
		}, 0, false, nil, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			ctx := t.Context()
			if c.before != nil {
				c.before(t, s)
			}
			s.setClock(s.clock() + c.after)
			token := "t1"
			if do(t, s, "HGET", s.keys.Meta(web), a.String()) == nil {
				token = ""
			}
			var version int64
			var err error
			e := observe(t, s, func() { version, err = s.Deregister(ctx, web, a, c.force, "") })
			if c.want != nil {
				if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
					t.Errorf("got %v, want %v, %s", err, c.want, c.text)
				}
				e.nothing(t)
				return
			}
			if err != nil || version != e.version {
				t.Errorf("got %d %v, want %d", version, err, e.version)
			}
			e.oneChange(t, s, a)
			if want := fmt.Sprintf("operator %d %s", s.clock(), token); gone(t, s, a) != want {
				t.Errorf("noted %q, want %q", gone(t, s, a), want)
			}
			if present(t, s, a) {
				t.Error("it is still there")
			}
			// Its owner was not asked and may come back.
			r, err := s.Beat(ctx, web, Beat{Addr: a, Token: "t1", Meta: metaOf("t1")})
			if got := beatOutcome(r, err); got != "NEW" {
				t.Errorf("next beat: %s, want NEW", got)
			}
		})
	}
}
