package registrar

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"rollcall/registrar/redistest"
)

// beatOutcome names what a beat came to, as the script does.
func beatOutcome(r BeatReply, err error) string {
	switch {
	case err == nil:
		return string(r.Status)
	case errors.Is(err, ErrLeft):
		return "LEFT"
	case errors.Is(err, ErrNotOwner):
		return "NOTOWNER"
	case errors.Is(err, ErrInterval):
		return "INTERVAL"
	}
	return err.Error()
}

func TestBeat(t *testing.T) {
	srv := redistest.Start(t)
	a := host(1)
	mine := Beat{Addr: a, Token: "t1", Meta: metaOf("t1")}
	other := Beat{Addr: a, Token: "t2", Meta: metaOf("t2")}
	claim := other
	claim.Agent = "a1"
	held := func(tb testing.TB, s *Store) { join(tb, s, a, "t1") }
	agents := func(mark string) func(testing.TB, *Store) {
		return func(tb testing.TB, s *Store) {
			_, err := s.Beat(tb.Context(), web, Beat{Addr: a, Token: "t1", Meta: `{"id":"t1","agent":"` + mark + `"}`})
			must(tb, err)
		}
	}
	every := func(d time.Duration) Beat { b := mine; b.Interval = d; return b }
	for _, c := range []struct {
		name   string
		before func(testing.TB, *Store)
		after  int64 // ms of the clock since before
		beat   Beat
		want   string
	}{
		{"arrival", nil, 0, mine, "NEW"},
		{"arrival of an agent's", nil, 0, claim, "NEW"},
		{"heartbeat", held, 1234, mine, "OK"},
		{"heartbeat of an absent-minded agent", held, 1234, Beat{Addr: a, Token: "t1", Meta: metaOf("t1"), Agent: "a1"}, "OK"},
		{"heartbeat that comes as a first one", held, 1234, Beat{Addr: a, Token: "t1", Meta: metaOf("t1"), first: true}, "OK"},
		{"other bytes, same meaning", held, 1, Beat{Addr: a, Token: "t1", Meta: `{"weight":7,"id":"t1"}`}, "CHANGED"},
		{"own score in the future", func(tb testing.TB, s *Store) {
			held(tb, s)
			do(tb, s, "ZADD", s.keys.Instances(web), t0+3_600_000, a.String())
		}, 10, mine, "OK"},
		{"own score infinite", func(tb testing.TB, s *Store) {
			held(tb, s)
			do(tb, s, "ZADD", s.keys.Instances(web), "+inf", a.String())
		}, 10, mine, "OK"},

		{"a live holder", held, 1, other, "NOTOWNER"},
		{"a live holder, by a first one", held, 1, Beat{Addr: a, Token: "t2", Meta: metaOf("t2"), first: true}, "NOTOWNER"},
		{"an agent on what it registered", agents("a1"), 1, claim, "TAKEN"},
		{"an agent on what another one registered", agents("a2"), 1, claim, "NOTOWNER"},
		{"an agent on what no agent registered", held, 1, claim, "NOTOWNER"},
		{"no agent on what an agent registered", agents("a1"), 1, other, "NOTOWNER"},
		{"holder beat two intervals ago", held, 2 * intervalMS, other, "NOTOWNER"},
		{"holder beat two intervals and 1 ms ago", held, 2*intervalMS + 1, other, "TAKEN"},
		{"two intervals of the registry's own", func(tb testing.TB, s *Store) {
			do(tb, s, "HSET", s.keys.Config(), "interval_ms", 1000)
			held(tb, s)
		}, 2001, other, "TAKEN"},
		{"two intervals of the registry's own, not yet", func(tb testing.TB, s *Store) {
			do(tb, s, "HSET", s.keys.Config(), "interval_ms", 1000)
			held(tb, s)
		}, 2000, other, "NOTOWNER"},
		{"holder's score in the future", func(tb testing.TB, s *Store) {
			held(tb, s)
			do(tb, s, "ZADD", s.keys.Instances(web), "+inf", a.String())
		}, ttlMS, other, "NOTOWNER"},
		{"holder's metadata is broken JSON", func(tb testing.TB, s *Store) {
			held(tb, s)
			do(tb, s, "HSET", s.keys.Meta(web), a.String(), `{"id":`)
		}, 1, other, "TAKEN"},
		{"holder's metadata is a JSON string", func(tb testing.TB, s *Store) {
			held(tb, s)
			do(tb, s, "HSET", s.keys.Meta(web), a.String(), `"t1"`)
		}, 1, other, "TAKEN"},
		{"holder's token is a number", func(tb testing.TB, s *Store) {
			held(tb, s)
			do(tb, s, "HSET", s.keys.Meta(web), a.String(), `{"id":1}`)
		}, 1, other, "TAKEN"},
		{"holder added by hand", func(tb testing.TB, s *Store) {
			do(tb, s, "ZADD", s.keys.Instances(web), t0, a.String())
		}, 1, other, "TAKEN"},

		{"late beat after left", func(tb testing.TB, s *Store) { held(tb, s); leave(tb, s, a, "t1") }, 1, mine, "LEFT"},
		{"an agent on a holder whose metadata is none", func(tb testing.TB, s *Store) {
			agents("a1")(tb, s)
			do(tb, s, "HSET", s.keys.Meta(web), a.String(), `{"id":"t1","agent":{"a1":1}}`)
		}, 1, claim, "NOTOWNER"},
		{"the mark of a claim as it was", held, 1, Beat{Addr: a, Token: "t2", Meta: metaOf("t2"), Agent: "1"}, "NOTOWNER"},
		{"left beats an agent's mark", func(tb testing.TB, s *Store) { join(tb, s, a, "t2"); leave(tb, s, a, "t2") }, 1, claim, "LEFT"},
		{"late beat with other metadata", func(tb testing.TB, s *Store) { held(tb, s); leave(tb, s, a, "t1") }, 1,
			Beat{Addr: a, Token: "t1", Meta: `{"id":"t1","draining":true}`}, "LEFT"},
		{"late beat after unhealthy", func(tb testing.TB, s *Store) {
			held(tb, s)
			_, err := s.Leave(tb.Context(), web, a, "t1", Unhealthy)
			must(tb, err)
		}, 1, mine, "LEFT"},
		{"another token after left", func(tb testing.TB, s *Store) { held(tb, s); leave(tb, s, a, "t1") }, 1, other, "NEW"},
		{"back after expired", func(tb testing.TB, s *Store) { held(tb, s); expire(tb, s, a) }, 1, mine, "NEW"},
		{"back after operator", func(tb testing.TB, s *Store) {
			held(tb, s)
			_, err := s.Deregister(tb.Context(), web, a, true, "")
			must(tb, err)
		}, 1, mine, "NEW"},
		{"taken out by hand, metadata left behind", func(tb testing.TB, s *Store) {
			held(tb, s)
			do(tb, s, "ZREM", s.keys.Instances(web), a.String())
		}, 1, mine, "NEW"},
		{"note of its going is unreadable", func(tb testing.TB, s *Store) {
			do(tb, s, "HSET", s.keys.Gone(web), a.String(), "left t1")
		}, 1, mine, "NEW"},

		{"interval above a third of the TTL", nil, 0, every(5001 * time.Millisecond), "INTERVAL"},
		{"interval exactly a third of the TTL", nil, 0, every(5 * time.Second), "NEW"},
		{"interval above a third of the registry's TTL", func(tb testing.TB, s *Store) {
			do(tb, s, "HSET", s.keys.Config(), "ttl_ms", 3000)
		}, 0, every(1001 * time.Millisecond), "INTERVAL"},
		{"interval exactly a third of the registry's TTL", func(tb testing.TB, s *Store) {
			do(tb, s, "HSET", s.keys.Config(), "ttl_ms", 3000)
		}, 0, every(time.Second), "NEW"},
		{"interval too long of one that is there", held, 1, every(5001 * time.Millisecond), "INTERVAL"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			ctx := t.Context()
			if c.before != nil {
				c.before(t, s)
			}
			s.setClock(s.clock() + c.after)
			var reply BeatReply
			var err error
			e := observe(t, s, func() { reply, err = s.Beat(ctx, web, c.beat) })
			if got := beatOutcome(reply, err); got != c.want {
				t.Fatalf("got %s, want %s", got, c.want)
			}
			switch c.want {
			case "LEFT", "NOTOWNER", "INTERVAL":
				e.nothing(t)
				if reply.TTL == 0 || reply.Interval == 0 {
					t.Errorf("refused without the registry's durations: %+v", reply)
				}
				return
			case "OK":
				if d := diff(e.before, e.after); !slices.Equal(d, []string{"{web}:instances"}) || len(e.messages) > 0 {
					t.Errorf("a heartbeat wrote %q and said %q", d, e.messages)
				}
				if reply.Version != 0 {
					t.Errorf("version %d, want 0", reply.Version)
				}
			default:
				e.oneChange(t, s, a)
				if reply.Version != e.version {
					t.Errorf("replied version %d, want %d", reply.Version, e.version)
				}
				if got := do(t, s, "HGET", s.keys.Meta(web), a.String()); got != c.beat.Meta {
					t.Errorf("metadata %v, want %s", got, c.beat.Meta)
				}
				if s.rdb.HExists(ctx, s.keys.Gone(web), a.String()).Val() || do(t, s, "ZSCORE", s.keys.GoneAt(web), a.String()) != nil {
					t.Error("the note of its going is still there")
				}
				if !s.rdb.SIsMember(ctx, s.keys.Services(), "web").Val() {
					t.Error("the service is not in the set")
				}
			}
			if got := s.rdb.ZScore(ctx, s.keys.Instances(web), a.String()).Val(); got != float64(s.clock()) {
				t.Errorf("score %.0f, want the clock, %d", got, s.clock())
			}
		})
	}
}

func TestBeatReplyCarriesConfig(t *testing.T) {
	srv := redistest.Start(t)
	for _, c := range []struct {
		name          string
		stored        []any
		ttl, interval time.Duration
	}{
		{"none", nil, DefaultTTL, DefaultInterval},
		{"both", []any{"ttl_ms", 9000, "interval_ms", 2500}, 9 * time.Second, 2500 * time.Millisecond},
		{"TTL only", []any{"ttl_ms", 60000}, time.Minute, DefaultInterval},
		{"no numbers", []any{"ttl_ms", "x", "interval_ms", "y"}, DefaultTTL, DefaultInterval},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			if c.stored != nil {
				do(t, s, append([]any{"HSET", s.keys.Config()}, c.stored...)...)
			}
			for _, want := range []string{"NEW", "OK"} {
				r, err := s.Beat(t.Context(), web, Beat{Addr: host(1), Token: "t1", Meta: metaOf("t1")})
				if got := beatOutcome(r, err); got != want || r.TTL != c.ttl || r.Interval != c.interval {
					t.Errorf("got %s %v %v, want %s %v %v", got, r.TTL, r.Interval, want, c.ttl, c.interval)
				}
			}
		})
	}
}

func TestEpochIsSetOnce(t *testing.T) {
	srv := redistest.Start(t)
	for _, c := range []struct {
		name string
		act  func(testing.TB, *Store)
	}{
		{"beat", func(tb testing.TB, s *Store) { join(tb, s, host(2), "t2") }},
		{"leave", func(tb testing.TB, s *Store) { leave(tb, s, host(2), "t2") }},
		{"admin", func(tb testing.TB, s *Store) { say(tb, s, host(2), Word{Verb: "drain"}) }},
		{"pulse", func(tb testing.TB, s *Store) {
			_, err := s.Pulse(tb.Context(), "r1", "p", time.Minute)
			must(tb, err)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			c.act(t, s)
			first, _ := do(t, s, "GET", s.keys.Epoch()).(string)
			if len(first) < 20 {
				t.Fatalf("epoch %q", first)
			}
			join(t, s, host(1), "t1")
			c.act(t, s)
			if got := do(t, s, "GET", s.keys.Epoch()); got != first {
				t.Errorf("epoch went from %q to %q", first, got)
			}
		})
	}
}

func TestBeatRefusesBigMetadata(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	pad := func(n int) string {
		const frame = `{"id":"t1","zone":""}`
		return fmt.Sprintf(`{"id":"t1","zone":"%s"}`, strings.Repeat("z", n-len(frame)))
	}
	b := Beat{Addr: host(1), Token: "t1", Meta: pad(MaxMeta + 1)}
	e := observe(t, s, func() {
		if r, err := s.Beat(t.Context(), web, b); err == nil {
			t.Errorf("%d bytes were accepted: %+v", len(b.Meta), r)
		}
	})
	e.nothing(t)
	b.Meta = pad(MaxMeta)
	if r, err := s.Beat(t.Context(), web, b); beatOutcome(r, err) != "NEW" {
		t.Errorf("%d bytes: %v", len(b.Meta), err)
	}
}

// TestBeatLimits checks who is kept out, who never is, and what they are told.
func TestBeatLimits(t *testing.T) {
	srv := redistest.Start(t)
	set := func(field string, value any) func(testing.TB, *Store) {
		return func(tb testing.TB, s *Store) { do(tb, s, "HSET", s.keys.Config(), field, value) }
	}
	silent := func(n int, score func(*Store) int64) func(testing.TB, *Store) {
		return func(tb testing.TB, s *Store) {
			do(tb, s, "EVAL", "for i=1,ARGV[1] do redis.call('ZADD',KEYS[1],ARGV[2],'x'..i) end", 1, s.keys.Instances(web), n, score(s))
		}
	}
	crowd := func(n int) func(testing.TB, *Store) { return silent(n, (*Store).clock) }
	dead := func(n int) func(testing.TB, *Store) { return silent(n, func(*Store) int64 { return 1 }) }
	names := func(n int) func(testing.TB, *Store) {
		return func(tb testing.TB, s *Store) {
			do(tb, s, "EVAL", "for i=1,ARGV[1] do redis.call('SADD',KEYS[1],'x'..i) end", 1, s.keys.Services(), n)
		}
	}
	all := func(steps ...func(testing.TB, *Store)) []func(testing.TB, *Store) { return steps }
	here := func(tb testing.TB, s *Store) { join(tb, s, host(1), "t1") }
	mine := Beat{Addr: host(1), Token: "t1", Meta: metaOf("t1")}
	changed := Beat{Addr: host(1), Token: "t1", Meta: `{"id":"t1","weight":8}`}
	for _, c := range []struct {
		name   string
		before []func(testing.TB, *Store)
		beat   Beat
		want   string // the error, or the status
	}{
		{"one below the default", all(crowd(19_999)), mine, "NEW"},
		{"the default", all(crowd(20_000)), mine, "there are 20000 instances of web"},
		{"one below", all(set("max_instances", 2), crowd(1)), mine, "NEW"},
		{"at the limit", all(set("max_instances", 2), crowd(2)), mine, "redis-cli hset NS:config max_instances 4"},
		{"above it", all(set("max_instances", 2), crowd(3)), mine, "there are 2 instances of web"},
		{"at the limit with the dead", all(set("max_instances", 2), dead(3)), mine, "NEW"},
		{"twice the limit with the dead", all(set("max_instances", 2), dead(4)), mine, "there are 2 instances of web"},
		{"none", all(set("max_instances", 0)), mine, "redis-cli hset NS:config max_instances 1"},
		{"no number", all(set("max_instances", "many"), crowd(3)), mine, "NEW"},
		{"who is there beats on", all(here, set("max_instances", 1), crowd(5)), mine, "OK"},
		{"who is there changes", all(here, set("max_instances", 1), crowd(5)), changed, "CHANGED"},
		{"who is there is taken over", all(here, func(tb testing.TB, s *Store) {
			do(tb, s, "ZADD", s.keys.Instances(web), 1, host(1).String())
		}, set("max_instances", 1), crowd(5)), Beat{Addr: host(1), Token: "t2", Meta: metaOf("t2")}, "TAKEN"},
		{"a last service", all(set("max_services", 2), names(1)), mine, "NEW"},
		{"a service too many", all(set("max_services", 2), names(2)), mine, "there are 2 services, the most"},
		{"the default of services", all(names(20_000)), mine, "redis-cli hset NS:config max_services 40000"},
		{"names, of which a reaper has counted one less", all(names(20_000), set("services", 19_999)), mine, "NEW"},
		{"names, all counted", all(names(20_000), set("services", 20_000)), mine, "there are 20000 services"},
		{"a count that is none", all(names(20_000), set("services", "few")), mine, "there are 20000 services"},
		{"a limit that nobody could read", all(set("max_services", 2_000_000), names(100_000)), mine, "there are 100000 services"},
		{"no limit", all(set("max_instances", -1), crowd(19_999)), mine, "NEW"},
		{"another instance of a service", all(here, set("max_services", 1), names(2)), Beat{Addr: host(2), Token: "t2", Meta: metaOf("t2")}, "NEW"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			for _, step := range c.before {
				step(t, s)
			}
			s.setClock(s.clock() + 1)
			var reply BeatReply
			var err error
			e := observe(t, s, func() { reply, err = s.Beat(t.Context(), web, c.beat) })
			if strings.ToUpper(c.want) == c.want {
				if err != nil || string(reply.Status) != c.want {
					t.Errorf("got %s %v, want %s", reply.Status, err, c.want)
				}
				return
			}
			want := strings.ReplaceAll(c.want, "NS", s.keys.ns)
			if !errors.Is(err, ErrFull) || !strings.Contains(err.Error(), want) || reply.Version != 0 || reply.TTL != DefaultTTL {
				t.Errorf("got %+v %v, want %q", reply, err, want)
			}
			e.nothing(t)
		})
	}
	t.Run("the canary", func(t *testing.T) {
		s := fresh(t, srv)
		set("max_instances", 0)(t, s)
		set("max_services", 0)(t, s)
		must(t, s.Canary(t.Context()))
	})
}

// TestVersionText checks that Lua's numbers never reach a message or an index
// as 1e+06.
func TestVersionText(t *testing.T) {
	srv := redistest.Start(t)
	for _, c := range []struct{ global, service int64 }{
		{999_999, 999_999},
		{1_000_000, 41},
		{1_000_000_000_000, 123_456_789_012_345},
		{MaxVersion - 2, MaxVersion - 2},
	} {
		t.Run(fmt.Sprint(c.global), func(t *testing.T) {
			s := fresh(t, srv)
			do(t, s, "MSET", s.keys.Version(), c.global, s.keys.ServiceVersion(web), c.service)
			a := host(1)
			e := observe(t, s, func() { join(t, s, a, "t1") })
			e.oneChange(t, s, a)
			if want := fmt.Sprintf("%d web %d", c.global+1, c.service+1); e.messages[0] != want {
				t.Errorf("said %q, want %q", e.messages[0], want)
			}
			snap, err := s.Read(t.Context(), web, nil)
			must(t, err)
			leave(t, s, a, "t1")
			if snap, err = s.Read(t.Context(), web, &snap.Token); err != nil || snap.Full || len(snap.Entries) != 1 || snap.Token.Version != c.service+2 {
				t.Errorf("got %+v %v, want a delta of 1 at %d", snap, err, c.service+2)
			}
		})
	}
}

// TestOutOfMemory checks the script flags: a full Redis lets the living beat and
// leave, and lets no reaper prove or remove anything.
func TestOutOfMemory(t *testing.T) {
	s, _ := newStore(t)
	s.setClock(t0)
	ctx := t.Context()
	join(t, s, host(1), "t1")
	p, err := s.Pulse(ctx, "r1", "pulse", time.Minute)
	must(t, err)
	s.setClock(t0 + 1)
	do(t, s, "CONFIG", "SET", "maxmemory", 1)
	oom := func(what string, err error) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), "OOM") || errors.Is(err, ErrBroken) {
			t.Errorf("%s: %v, want OOM", what, err)
		}
	}
	_, err = s.Pulse(ctx, "r1", "pulse", time.Minute)
	oom("pulse", err)
	_, err = s.Reap(ctx, web, Sweep{ID: "r1", Token: "pulse", ReplID: p.ReplID, Last: p.Now, MaxAge: time.Second, Cutoff: t0 + 1})
	oom("reap", err)
	if !present(t, s, host(1)) {
		t.Error("a reaper removed")
	}
	for n, want := range map[int]string{1: "OK", 2: "NEW"} {
		token := fmt.Sprintf("t%d", n)
		r, err := s.Beat(ctx, web, Beat{Addr: host(n), Token: token, Meta: metaOf(token)})
		if got := beatOutcome(r, err); got != want {
			t.Errorf("beat: got %s, want %s", got, want)
		}
	}
	leave(t, s, host(1), "t1")
	if present(t, s, host(1)) {
		t.Error("it did not leave")
	}
	if _, err := s.Read(ctx, web, nil); err != nil {
		t.Errorf("read: %v", err)
	}
}
