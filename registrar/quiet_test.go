package registrar

import (
	"context"
	"fmt"
	"net"
	"slices"
	"testing"
	"time"

	"rollcall/registrar/redistest"
)

// TestQuiet changes something while there is, or seems to be, a pause between
// two announcements.
func TestQuiet(t *testing.T) {
	srv := redistest.Start(t)
	// The longest pause that so many are given.
	const crowd, pause = 400, 100
	quiet := func(args ...any) func(testing.TB, *Store) {
		return func(tb testing.TB, s *Store) {
			do(tb, s, append([]any{"SET", s.keys.Quiet()}, args...)...)
		}
	}
	for _, c := range []struct {
		name   string
		before func(testing.TB, *Store)
		within time.Duration // of the call's ctx
		after  time.Duration // the call lasts as long at least
		said   bool          // when the call returns
	}{
		{"no pause", func(testing.TB, *Store) {}, time.Minute, 0, true},
		{"the first in a pause", quiet("", "PX", pause), time.Minute, pause / 2 * time.Millisecond, true},
		{"the first in a pause, cut short: who else would speak?", quiet("", "PX", pause), 5 * time.Millisecond, 0, true},
		{"the second in a pause", quiet("another's", "PX", pause), time.Minute, 0, false},
		{"a pause longer than so many are given", quiet("another's", "PX", 500), time.Minute, 0, true},
		{"a pause longer than any, since a clock was set back", quiet("", "PX", 3_600_000), time.Minute, 0, true},
		{"a pause without an end", quiet("x"), time.Minute, 0, true},
		{"no text", func(tb testing.TB, s *Store) {
			do(tb, s, "RPUSH", s.keys.Quiet(), "x")
			do(tb, s, "PEXPIRE", s.keys.Quiet(), pause)
		}, time.Minute, 0, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			l := listen(t, s)
			listeners(t, srv, s, crowd)
			began := time.Now() // before the pause begins
			c.before(t, s)
			ctx, cancel := context.WithTimeout(t.Context(), c.within)
			defer cancel()
			r, err := s.Beat(ctx, web, Beat{Addr: host(1), Token: "t1", Meta: metaOf("t1")})
			took := time.Since(began)
			if err != nil || r.Status != BeatNew || r.Version != 1 || r.TTL != DefaultTTL {
				t.Fatalf("beat: %+v, %v", r, err)
			}
			var want []string
			if c.said {
				want = []string{"1 web 1"}
			}
			if got := l.heard(t); !slices.Equal(got, want) {
				t.Errorf("said %q, want %q", got, want)
			}
			if took < c.after {
				t.Errorf("it took %v, and the pause was longer", took)
			}
		})
	}
}

// TestQuietChanges takes every script that changes a service through a pause.
func TestQuietChanges(t *testing.T) {
	srv := redistest.Start(t)
	for _, c := range changes {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			joined(t, s)
			l := listen(t, s)
			listeners(t, srv, s, 400)
			do(t, s, "SET", s.keys.Quiet(), "", "PX", 40)
			if c.name == "reap" { // which does not wait
				do(t, s, "SET", s.keys.Quiet(), "", "PX", 100) // it must not be over yet
				r, err := s.Reap(t.Context(), web, Sweep{ID: "r1", Token: "pulse", ReplID: replid(t, s), Last: t0, MaxAge: time.Second, Cutoff: t0 + 1})
				must(t, err)
				if len(r.Addrs) != 2 || r.Unsaid.At.IsZero() || len(l.heard(t)) > 0 {
					t.Fatalf("reaped %+v", r)
				}
				eventually(t, func() error {
					if left := s.rdb.PTTL(t.Context(), s.keys.Quiet()).Val(); left > 0 {
						return fmt.Errorf("%v to go", left)
					}
					return nil
				})
				must(t, s.Announce(t.Context(), r.Unsaid))
			} else if err := c.call(t, s); err != nil {
				t.Fatal(err)
			}
			g, v := versions(t, s)
			if got, want := l.heard(t), []string{fmt.Sprintf("%d web %d", g, v)}; !slices.Equal(got, want) {
				t.Errorf("said %q, want %q", got, want)
			}
		})
	}
}

// listeners subscribes n more.
func listeners(tb testing.TB, srv *redistest.Server, s *Store, n int) {
	tb.Helper()
	for range n {
		c, err := net.Dial("tcp", srv.Addr)
		must(tb, err)
		tb.Cleanup(func() { _ = c.Close() })
		_, err = fmt.Fprintf(c, "SUBSCRIBE %s\r\n", s.keys.Changes())
		must(tb, err)
	}
	eventually(tb, func() error {
		if got := s.rdb.PubSubNumSub(tb.Context(), s.keys.Changes()).Val()[s.keys.Changes()]; got < int64(n) {
			return fmt.Errorf("%d listen, want %d", got, n)
		}
		return nil
	})
}

// TestQuietKept has a client keep the key set, as everybody may who may beat for any
// service: among few listeners each change is announced at once.
func TestQuietKept(t *testing.T) {
	srv := redistest.Start(t)
	for _, n := range []int{0, 18, 40} {
		t.Run(fmt.Sprint(n, " more listen"), func(t *testing.T) {
			s := fresh(t, srv)
			l := listen(t, s)
			listeners(t, srv, s, n)
			for v := 1; v <= 20; v++ {
				do(t, s, "SET", s.keys.Quiet(), fmt.Sprint("another's ", v), "PX", 500)
				join(t, s, host(v), "t")
				if got, want := l.heard(t), []string{fmt.Sprintf("%d web %d", v, v)}; !slices.Equal(got, want) {
					t.Errorf("said %q, want %q", got, want)
				}
			}
		})
	}
}

// TestAnnounce calls it when the pause is over, or is another's.
func TestAnnounce(t *testing.T) {
	srv := redistest.Start(t)
	for _, c := range []struct {
		name  string
		quiet []any // nil = there is none
		said  bool
	}{
		{"the pause is over", nil, true},
		{"not quite, by Redis' clock", []any{"mine", "PX", 3000}, true},
		{"somebody has announced since", []any{"", "PX", 3000}, false},
		{"and somebody else must now", []any{"another's", "PX", 3000}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			join(t, s, host(1), "t1")
			if c.quiet != nil {
				do(t, s, append([]any{"SET", s.keys.Quiet()}, c.quiet...)...)
			}
			l := listen(t, s)
			must(t, s.Announce(t.Context(), Unsaid{service: web, mark: "mine"}))
			var want []string
			if c.said {
				want = []string{"1 web 1"}
			}
			if got := l.heard(t); !slices.Equal(got, want) {
				t.Errorf("said %q, want %q", got, want)
			}
		})
	}
}

// TestPause counts subscribers: few cause no pause, more a longer one.
func TestPause(t *testing.T) {
	srv := redistest.Start(t)
	for subscribers, want := range map[int]time.Duration{0: 0, 19: 0, 20: 5 * time.Millisecond, 44: 11 * time.Millisecond} {
		s := fresh(t, srv)
		for range subscribers {
			listen(t, s)
		}
		sent := time.Now()
		join(t, s, host(1), "t1")
		left := s.rdb.PTTL(t.Context(), s.keys.Quiet()).Val()
		took := time.Since(sent).Truncate(time.Millisecond) + time.Millisecond
		if want == 0 && left >= 0 || left > want || left < want-took && want > took {
			t.Errorf("%d subscribers: %v left of the pause after %v, want %v", subscribers, left, took, want)
		}
	}
}
