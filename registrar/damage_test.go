package registrar

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"rollcall/registrar/redistest"
)

type scriptCall struct {
	name string
	call func(testing.TB, *Store) error
}

// changes are the calls of every script that changes one service, each on a
// service that joined has prepared.
var changes = []scriptCall{
	{"beat, arrival", func(tb testing.TB, s *Store) error {
		_, err := s.Beat(tb.Context(), web, Beat{Addr: host(9), Token: "t9", Meta: metaOf("t9")})
		return err
	}},
	{"beat, change", func(tb testing.TB, s *Store) error {
		_, err := s.Beat(tb.Context(), web, Beat{Addr: host(1), Token: "t1", Meta: `{"id":"t1"}`})
		return err
	}},
	{"leave", func(tb testing.TB, s *Store) error {
		_, err := s.Leave(tb.Context(), web, host(1), "t1", Left)
		return err
	}},
	{"leave, absent", func(tb testing.TB, s *Store) error {
		_, err := s.Leave(tb.Context(), web, host(9), "t9", Left)
		return err
	}},
	{"deregister", func(tb testing.TB, s *Store) error {
		_, err := s.Deregister(tb.Context(), web, host(1), true, "")
		return err
	}},
	{"admin", func(tb testing.TB, s *Store) error {
		_, _, err := s.SetAdmin(tb.Context(), web, host(1), Word{Verb: "drain"})
		return err
	}},
	{"reap", func(tb testing.TB, s *Store) error {
		_, err := s.Reap(tb.Context(), web, Sweep{ID: "r1", Token: "pulse", ReplID: replid(tb, s), Last: t0, MaxAge: time.Second, Cutoff: t0 + 1})
		return err
	}},
}

// joined fills every key of s: three instances, a word, a note, a pulse.
func joined(tb testing.TB, s *Store) {
	tb.Helper()
	_, err := s.Config(tb.Context(), DefaultTTL, DefaultInterval, false)
	must(tb, err)
	for n := 1; n <= 3; n++ {
		join(tb, s, host(n), fmt.Sprintf("t%d", n))
	}
	say(tb, s, host(2), Word{Verb: "maint"})
	leave(tb, s, host(3), "t3")
	_, err = s.Pulse(tb.Context(), "r1", "pulse", time.Minute)
	must(tb, err)
}

func TestWrongTypeChangesNothing(t *testing.T) {
	srv := redistest.Start(t)
	for _, c := range changes {
		for i := range 11 {
			s := fresh(t, srv)
			key := s.keys.change(web)[i]
			t.Run(c.name+"/"+key[strings.IndexByte(key, ':')+1:], func(t *testing.T) {
				joined(t, s)
				do(t, s, "DEL", key)
				do(t, s, "RPUSH", key, "x")
				l := listen(t, s)
				before := dump(t, s)
				err := c.call(t, s)
				if err == nil || !strings.Contains(err.Error(), "WRONGTYPE") {
					t.Errorf("got %v, want WRONGTYPE", err)
				}
				if c.name == "reap" && !errors.Is(err, ErrBroken) {
					t.Errorf("%v is not ErrBroken: it would stop the sweep of every service", err)
				}
				if after := dump(t, s); len(diff(before, after)) > 0 {
					t.Errorf("it wrote %q", diff(before, after))
				}
				if said := l.heard(t); len(said) > 0 {
					t.Errorf("it said %q", said)
				}
			})
		}
	}
}

// TestChangesWithoutEvents checks that the log of changes is no part of the
// register: whatever its key holds, a change is made and announced as ever.
func TestChangesWithoutEvents(t *testing.T) {
	srv := redistest.Start(t)
	for _, c := range changes {
		var want []string
		for _, damage := range []string{"none", "gone", "another type", "no further id"} {
			s := fresh(t, srv)
			t.Run(c.name+"/"+damage, func(t *testing.T) {
				joined(t, s)
				key := s.keys.Events()
				if damage != "none" {
					do(t, s, "DEL", key)
				}
				switch damage {
				case "another type":
					do(t, s, "RPUSH", key, "x")
				case "no further id":
					do(t, s, "XADD", key, "18446744073709551615-18446744073709551615", "at", "1")
				}
				l := listen(t, s)
				before := dump(t, s)
				if err := c.call(t, s); err != nil {
					t.Fatal(err)
				}
				wrote := diff(before, dump(t, s))
				entry := slices.Index(wrote, "events")
				if writable := damage == "none" || damage == "gone"; writable != (entry >= 0) {
					t.Errorf("it wrote %q", wrote)
				}
				if entry >= 0 {
					wrote = slices.Delete(wrote, entry, entry+1)
				}
				if damage == "none" {
					want = wrote
				}
				if !slices.Equal(wrote, want) {
					t.Errorf("it wrote %q, want %q", wrote, want)
				}
				if said := l.heard(t); len(said) != 1 {
					t.Errorf("it said %q", said)
				}
			})
		}
	}
}

// TestHeartbeatOnWrongType checks which keys a plain heartbeat depends on: a
// broken key that it does not need must not make the living look dead.
func TestHeartbeatOnWrongType(t *testing.T) {
	srv := redistest.Start(t)
	for i := range 11 {
		s := fresh(t, srv)
		key := s.keys.change(web)[i]
		needed := i == 0 || i == 1 || i == 10
		t.Run(key[strings.IndexByte(key, ':')+1:], func(t *testing.T) {
			joined(t, s)
			do(t, s, "DEL", key)
			do(t, s, "RPUSH", key, "x")
			s.setClock(t0 + 1)
			before := dump(t, s)
			_, err := s.Beat(t.Context(), web, Beat{Addr: host(1), Token: "t1", Meta: metaOf("t1")})
			wrote := diff(before, dump(t, s))
			if needed && (err == nil || len(wrote) > 0) || !needed && (err != nil || !slices.Equal(wrote, []string{"{web}:instances"})) {
				t.Errorf("needed %v: got %v and wrote %q", needed, err, wrote)
			}
		})
	}
}

func TestBrokenCounterChangesNoMembership(t *testing.T) {
	srv := redistest.Start(t)
	for _, c := range changes {
		for _, value := range []string{"x", "", "1.5", "9223372036854775807"} {
			for _, which := range []string{"global", "service"} {
				t.Run(fmt.Sprintf("%s/%s=%q", c.name, which, value), func(t *testing.T) {
					s := fresh(t, srv)
					joined(t, s)
					key, may := s.keys.Version(), []string(nil)
					if which == "service" {
						key, may = s.keys.ServiceVersion(web), []string{"version"} // everybody looks again
					}
					do(t, s, "SET", key, value)
					l := listen(t, s)
					before := dump(t, s)
					err := c.call(t, s)
					if err == nil || !strings.Contains(err.Error(), "is no counter") {
						t.Errorf("got %v, want that it is no counter", err)
					}
					if c.name == "reap" && !errors.Is(err, ErrBroken) {
						t.Errorf("%v is not ErrBroken: it would stop the sweep of every service", err)
					}
					// The sweep pulls future scores back before it knows; there are none here.
					if wrote := diff(before, dump(t, s)); !slices.Equal(wrote, may) {
						t.Errorf("it wrote %q, want %q", wrote, may)
					}
					if said := l.heard(t); len(said) > 0 {
						t.Errorf("it said %q", said)
					}
				})
			}
		}
	}
}

// TestCounterWithoutRights checks that a user who may not count is told so, and
// not that the counter is broken: that would let a sweep go on, service by
// service.
func TestCounterWithoutRights(t *testing.T) {
	srv := redistest.Start(t)
	for _, c := range changes {
		for which, rule := range map[string]string{
			"command":        "",
			"global version": "(+incr ~*}:version)",
		} {
			t.Run(c.name+"/"+which, func(t *testing.T) {
				s := fresh(t, srv)
				joined(t, s)
				rules := []any{"ACL", "SETUSER", "poor", "reset", "on", "nopass", "+@all", "~*", "&*", "-incr"}
				if rule != "" {
					rules = append(rules, rule)
				}
				do(t, s, rules...)
				rdb := redis.NewClient(&redis.Options{Addr: srv.Addr, Username: "poor", Password: "x", MaxRetries: -1, DisableIdentity: true})
				t.Cleanup(func() { must(t, rdb.Close()) })
				before := dump(t, s)
				err := c.call(t, s.On(rdb))
				if err == nil || errors.Is(err, ErrBroken) || strings.Contains(err.Error(), "no counter") ||
					!strings.Contains(err.Error(), "can't") || !strings.Contains(err.Error(), "INCR "+s.keys.Version()) {
					t.Errorf("got %v, want that INCR %s is not allowed", err, s.keys.Version())
				}
				if wrote := diff(before, dump(t, s)); len(wrote) > 0 {
					t.Errorf("it wrote %q", wrote)
				}
			})
		}
	}
}

// TestScriptFlush checks that a Redis that forgot its scripts, as one does that
// restarts, is told them again by every call.
func TestScriptFlush(t *testing.T) {
	s, _ := newStore(t)
	s.setClock(t0)
	ctx := t.Context()
	steps := append(slices.Clone(changes), []scriptCall{
		{"beat, heartbeat", func(tb testing.TB, s *Store) error {
			_, err := s.Beat(ctx, web, Beat{Addr: host(2), Token: "t2", Meta: metaOf("t2")})
			return err
		}},
		{"many heartbeats", func(tb testing.TB, s *Store) error {
			got := s.BeatSteady(ctx, []ServiceBeat{{web, Beat{Addr: host(2), Token: "t2", Meta: metaOf("t2")}}})
			if !got[0].Done && got[0].Err == nil {
				return errors.New("it was not steady")
			}
			return got[0].Err
		}},
		{"read", func(tb testing.TB, s *Store) error { _, err := s.Read(ctx, web, nil); return err }},
		{"versions", func(tb testing.TB, s *Store) error { _, err := s.Versions(ctx, nil); return err }},
		{"survey", func(tb testing.TB, s *Store) error { _, err := s.Survey(ctx, []Service{web}, 1, 1, 1); return err }},
		{"pulse", func(tb testing.TB, s *Store) error { _, err := s.Pulse(ctx, "r1", "pulse", time.Minute); return err }},
		{"config", func(tb testing.TB, s *Store) error {
			_, err := s.Config(ctx, DefaultTTL, DefaultInterval, false)
			return err
		}},
	}...)
	for _, step := range steps {
		t.Run(step.name, func(t *testing.T) {
			do(t, s, "FLUSHALL")
			joined(t, s)
			do(t, s, "SCRIPT", "FLUSH", "SYNC")
			if err := step.call(t, s); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestReadersOnWrongType checks that a reader is told an error and never an
// empty service.
func TestReadersOnWrongType(t *testing.T) {
	srv := redistest.Start(t)
	for i := range 11 {
		s := fresh(t, srv)
		key := s.keys.change(web)[i]
		unread := i == 4 || i == 7 || i == 8 // gone-at, services, version
		t.Run(key[strings.IndexByte(key, ':')+1:], func(t *testing.T) {
			joined(t, s)
			snap, err := s.Read(t.Context(), web, nil)
			must(t, err)
			do(t, s, "DEL", key)
			do(t, s, "RPUSH", key, "x")
			for _, since := range []*Token{nil, {snap.Token.ReplID, snap.Token.Epoch, snap.Token.Version - 2}} {
				got, err := s.Read(t.Context(), web, since)
				if i == 5 && since == nil { // a full read needs no index
					continue
				}
				if unread != (err == nil) {
					t.Errorf("since %v: got %+v %v", since, got, err)
				}
			}
		})
	}
}

func TestClock(t *testing.T) {
	srv := redistest.Start(t)
	for _, c := range []struct {
		name   string
		config []any
		want   time.Duration
		err    bool
	}{
		{"no config", nil, DefaultTTL, false},
		{"TTL", []any{"HSET", "ttl_ms", 9000}, 9 * time.Second, false},
		{"no number", []any{"HSET", "ttl_ms", "x"}, DefaultTTL, false},
		{"no hash", []any{"RPUSH", "x"}, 0, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			if c.config != nil {
				do(t, s, slices.Insert(slices.Clone(c.config), 1, any(s.keys.Config()))...)
			}
			from := s.rdb.Time(t.Context()).Val().UnixMilli()
			now, ttl, err := s.Clock(t.Context())
			if (err != nil) != c.err || ttl != c.want || err == nil && now < from {
				t.Errorf("got %d %v %v, want %v, error %v", now, ttl, err, c.want, c.err)
			}
		})
	}
}
