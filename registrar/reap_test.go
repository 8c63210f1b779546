package registrar

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"rollcall/registrar/redistest"
)

// pruneAfter is how long a note of who went is kept, ms.
const pruneAfter = 600_000

func TestReapBoundary(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	ctx := t.Context()
	const now, cutoff = t0 + 100_000, t0 + 50_000
	scores := map[string]any{"-inf": "-inf", "long ago": 0, "cutoff-1": cutoff - 1, "cutoff": cutoff, "now": now, "future": now + 1, "+inf": "+inf"}
	stale := []string{"-inf", "cutoff-1", "long ago"}
	addrs := map[string]string{}
	n := 0
	for name, score := range scores {
		n++
		a := host(n)
		join(t, s, a, "token-"+name)
		do(t, s, "ZADD", s.keys.Instances(web), score, a.String())
		addrs[a.String()] = name
	}
	s.setClock(now)
	var out []string
	var left int64
	var err error
	e := observe(t, s, func() { out, left, err = sweep(t, s, cutoff) })
	must(t, err)
	if left != 0 || e.local != 1 || e.global != 1 || len(e.messages) != 1 {
		t.Errorf("left %d, versions moved by %d and %d, said %q; want 0, 1, 1 and one message", left, e.global, e.local, e.messages)
	}
	var names []string
	for _, a := range out {
		names = append(names, addrs[a])
	}
	slices.Sort(names)
	if !slices.Equal(names, stale) {
		t.Fatalf("took out %q, want %q", names, stale)
	}
	for a, name := range addrs {
		if !slices.Contains(stale, name) {
			want := float64(now)
			if name == "cutoff" {
				want = float64(cutoff)
			}
			if got := s.rdb.ZScore(ctx, s.keys.Instances(web), a).Val(); got != want {
				t.Errorf("%s: score %.0f, want %.0f", name, got, want)
			}
			continue
		}
		if do(t, s, "ZSCORE", s.keys.Instances(web), a) != nil || do(t, s, "HGET", s.keys.Meta(web), a) != nil {
			t.Errorf("%s: still there", name)
		}
		if got, want := do(t, s, "HGET", s.keys.Gone(web), a), fmt.Sprintf("expired %d token-%s", now, name); got != want {
			t.Errorf("%s: noted %q, want %q", name, got, want)
		}
		if got := s.rdb.ZScore(ctx, s.keys.GoneAt(web), a).Val(); got != float64(now) {
			t.Errorf("%s: gone-at %.0f, want %d", name, got, now)
		}
		if got := s.rdb.ZScore(ctx, s.keys.Changed(web), a).Val(); got != float64(e.version) {
			t.Errorf("%s: changed at %.0f, want %d", name, got, e.version)
		}
	}
}

// TestReapFuture checks that scores from the future are pulled back, and that
// this is no change.
func TestReapFuture(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	join(t, s, host(1), "t1")
	join(t, s, host(2), "t2")
	do(t, s, "ZADD", s.keys.Instances(web), "+inf", host(1).String(), t0+1, host(2).String())
	e := observe(t, s, func() {
		if out, left, err := sweep(t, s, t0-ttlMS); err != nil || len(out) > 0 || left != 0 {
			t.Errorf("got %q %d %v", out, left, err)
		}
	})
	if want := []string{"reaper:r1", "{web}:instances"}; !slices.Equal(diff(e.before, e.after), want) || len(e.messages) > 0 {
		t.Errorf("wrote %q and said %q, want %q", diff(e.before, e.after), e.messages, want)
	}
	for n := 1; n <= 2; n++ {
		if got := s.rdb.ZScore(t.Context(), s.keys.Instances(web), host(n).String()).Val(); got != float64(t0) {
			t.Errorf("score %.0f, want now, %d", got, t0)
		}
	}
}

func TestReapManyCalls(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	const members = 2*reapLimit + 3
	for i := range members {
		do(t, s, "ZADD", s.keys.Instances(web), t0+int64(i), host(i).String())
	}
	do(t, s, "SADD", s.keys.Services(), "web")
	s.setClock(t0 + 1_000_000)
	seen := map[string]bool{}
	for call, want := range []struct{ out, left int }{{reapLimit, reapLimit + 3}, {reapLimit, 3}, {3, 0}, {0, 0}} {
		out, left, err := sweep(t, s, t0+members)
		must(t, err)
		if len(out) != want.out || left != int64(want.left) {
			t.Fatalf("call %d: %d out, %d left, want %+v", call, len(out), left, want)
		}
		for _, a := range out {
			if seen[a] {
				t.Errorf("%s is in two answers", a)
			}
			seen[a] = true
		}
		if call == 0 && out[0] != host(0).String() {
			t.Errorf("began with %s, want the oldest", out[0])
		}
		if listed := s.rdb.SIsMember(t.Context(), s.keys.Services(), "web").Val(); listed != (left > 0) {
			t.Errorf("call %d: in the set of services: %v, with %d left", call, listed, left)
		}
	}
	if len(seen) != members {
		t.Errorf("%d are out, want %d", len(seen), members)
	}
	if _, v := versions(t, s); v != 3 {
		t.Errorf("version %d, want 3: one bump a call that took somebody out", v)
	}
}

// TestReapLetsGo checks that all reapers together let go of one at the pace,
// oldest first, and never of the last of a service.
func TestReapLetsGo(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	ctx := t.Context()
	const pace = time.Minute
	letGo := func(reaper string, svc Service) Reaped {
		t.Helper()
		p, err := s.Pulse(ctx, reaper, "pulse", time.Minute)
		must(t, err)
		got, err := s.Reap(ctx, svc, Sweep{ID: reaper, Token: "pulse", ReplID: p.ReplID, Last: p.Now, MaxAge: time.Second, Cutoff: 10, LetGo: pace})
		must(t, err)
		return got
	}
	for n := range 3 {
		do(t, s, "ZADD", s.keys.Instances(web), 3-n, host(n).String())
		do(t, s, "ZADD", s.keys.Instances("other"), 3-n, host(n).String())
	}
	do(t, s, "ZADD", s.keys.Instances("lone"), 1, host(0).String())
	p, err := s.Pulse(ctx, "r1", "pulse", time.Minute)
	must(t, err)
	if got, err := s.Reap(ctx, "lone", Sweep{ID: "r1", Token: "pulse", ReplID: p.ReplID, Last: p.Now, MaxAge: time.Second, Cutoff: 10, LetGo: pace}); !errors.Is(err, ErrLastLeft) {
		t.Errorf("the last of a service: %+v, %v", got, err)
	}
	if got := letGo("r1", web); !slices.Equal(got.Addrs, []string{host(2).String()}) || got.Left != 2 || got.Version != 1 {
		t.Errorf("got %+v, want the oldest", got)
	}
	if left := s.rdb.PTTL(ctx, s.keys.LetGo()).Val(); left <= pace-10*time.Second || left > pace {
		t.Errorf("the next may go in %v, want %v", left, pace)
	}
	for _, svc := range []Service{web, "other"} {
		e := observe(t, s, func() {
			if got := letGo("r2", svc); len(got.Addrs) > 0 || got.Left < 2 {
				t.Errorf("%s, before the pace allows it: %+v", svc, got)
			}
		})
		if e.local != 0 || e.global != 0 || len(e.messages) > 0 {
			t.Errorf("%s: a call that took nobody out moved versions by %d and %d, said %q", svc, e.global, e.local, e.messages)
		}
	}
	do(t, s, "DEL", s.keys.LetGo()) // the pace has passed
	if got := letGo("r2", "other"); !slices.Equal(got.Addrs, []string{host(2).String()}) {
		t.Errorf("got %+v, want the oldest", got)
	}
}

// TestReapLetsGoOfGarbage has garbage beside the last instance of a service that is
// held. Nobody is sent to garbage, so the instance is the last one and stays, and
// garbage goes before it.
func TestReapLetsGoOfGarbage(t *testing.T) {
	srv := redistest.Start(t)
	type member struct {
		addr, meta, admin string
		score             any // "now" is the server's
	}
	last, other := host(1).String(), host(2).String()
	for _, c := range []struct {
		name    string
		members []member // the last instance, the oldest, is there too
		want    string   // goes; "" = nobody, and ErrLastLeft
	}{
		{"alone", nil, ""},
		{"no address, fresh", []member{{addr: "rubbish", score: "now"}}, ""},
		{"another spelling, fresh", []member{{addr: "010.0.0.1:80", score: "now"}, {addr: "[2001:DB8::1]:80", score: "now"}}, ""},
		{"unreadable metadata, fresh", []member{{addr: other, meta: "{", score: "now"}}, ""},
		{"metadata of another type, fresh", []member{{addr: other, meta: `{"weight":"much"}`, score: "now"}}, ""},
		{"too much metadata, fresh", []member{{addr: other, meta: `{"id":"` + strings.Repeat("x", MaxMeta) + `"}`, score: "now"}}, ""},
		{"unreadable word, fresh", []member{{addr: other, admin: `{"state":"sleep"}`, score: "now"}}, ""},
		{"no time", []member{{addr: other, score: "+inf"}}, ""},
		{"stale garbage goes", []member{{addr: "rubbish", score: 5}}, "rubbish"},
		{"and what is unreadable", []member{{addr: other, meta: "{", score: 5}}, other},
		{"another instance", []member{{addr: other, meta: `{"id":"x"}`, score: 5}}, last},
		{"a fresh one", []member{{addr: other, score: "now"}, {addr: "rubbish", score: 5}}, last},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			ctx := t.Context()
			do(t, s, "ZADD", s.keys.Instances(web), 1, last)
			p, err := s.Pulse(ctx, "r", "pulse", time.Minute)
			must(t, err)
			for _, m := range c.members {
				if m.score == "now" {
					m.score = p.Now
				}
				do(t, s, "ZADD", s.keys.Instances(web), m.score, m.addr)
				if m.meta != "" {
					do(t, s, "HSET", s.keys.Meta(web), m.addr, m.meta)
				}
				if m.admin != "" {
					do(t, s, "HSET", s.keys.Admin(web), m.addr, m.admin)
				}
			}
			got, err := s.Reap(ctx, web, Sweep{ID: "r", Token: "pulse", ReplID: p.ReplID, Last: p.Now, MaxAge: time.Minute, Cutoff: 10, LetGo: time.Minute})
			switch {
			case c.want == "" && (!errors.Is(err, ErrLastLeft) || len(got.Addrs) > 0):
				t.Errorf("got %+v, %v, want %v", got, err, ErrLastLeft)
			case c.want != "" && (err != nil || !slices.Equal(got.Addrs, []string{c.want})):
				t.Errorf("got %+v, %v, want %s", got, err, c.want)
			}
			if stays := do(t, s, "ZSCORE", s.keys.Instances(web), last) != nil; stays != (c.want != last) {
				t.Errorf("the last one is there: %v", stays)
			}
			if paced := do(t, s, "GET", s.keys.LetGo()) != nil; paced != (c.want != "") {
				t.Errorf("the pace counts it: %v", paced)
			}
		})
	}
}

func TestReapLicence(t *testing.T) {
	srv := redistest.Start(t)
	for _, c := range []struct {
		name          string
		token         string // that Redis holds, "" = none
		replid        string // that the pulse saw, "" = the server's
		last          int64  // ms before now
		want          error
		stale, remain int64
	}{
		{"valid", "pulse", "", 0, nil, 1, 0},
		{"as old as allowed", "pulse", "", 1000, nil, 1, 0},
		{"another's pulse", "other", "", 0, ErrFenced, 0, 1},
		{"no pulse", "", "", 0, ErrFenced, 0, 1},
		{"another replid", "pulse", strings.Repeat("0", 40), 0, ErrFenced, 0, 1},
		{"1 ms too old", "pulse", "", 1001, ErrLate, 0, 1},
		{"1 ms in the future", "pulse", "", -1, ErrLate, 0, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			join(t, s, host(1), "t1")
			s.setClock(t0 + 60_000)
			do(t, s, "ZADD", s.keys.Instances(web), "+inf", host(2).String()) // pulled back only by a valid one
			if c.token != "" {
				_, err := s.Pulse(t.Context(), "r1", c.token, time.Minute)
				must(t, err)
			}
			w := Sweep{ID: "r1", Token: "pulse", ReplID: cmp.Or(c.replid, replid(t, s)), Last: s.clock() - c.last, MaxAge: time.Second, Cutoff: s.clock() - ttlMS}
			var out Reaped
			var err error
			e := observe(t, s, func() { out, err = s.Reap(t.Context(), web, w) })
			if !errors.Is(err, c.want) || int64(len(out.Addrs)) != c.stale || present(t, s, host(1)) != (c.remain == 1) {
				t.Errorf("got %+v %v, present %v, want %v", out, err, present(t, s, host(1)), c.want)
			}
			if c.want != nil {
				e.nothing(t)
			}
		})
	}
}

// TestReapOnPromotedReplica checks the fence against a fail-over to a replica that
// has the pulse, and not a beat that came after it.
func TestReapOnPromotedReplica(t *testing.T) {
	srv := redistest.Start(t, "--repl-diskless-sync-delay", "0")
	primary, err := NewStore(srv.Client(t), DefaultNamespace)
	must(t, err)
	second := srv.StartReplica(t)
	replica, err := NewStore(second.Client(t), DefaultNamespace)
	must(t, err)
	ctx := t.Context()
	b := Beat{Addr: host(1), Token: "t1", Meta: metaOf("t1")}
	_, err = primary.Beat(ctx, web, b)
	must(t, err)
	p, err := primary.Pulse(ctx, "r1", "pulse", time.Minute)
	must(t, err)
	deadline := time.Now().Add(10 * time.Second)
	for do(t, replica, "GET", replica.keys.Reaper("r1")) != "pulse" {
		if time.Now().After(deadline) {
			t.Fatal("the pulse does not reach the replica")
		}
		<-time.After(time.Millisecond)
	}
	do(t, replica, "REPLICAOF", "NO", "ONE")
	_, err = primary.Beat(ctx, web, b) // accepted, and lost with the old primary
	must(t, err)
	out, err := replica.Reap(ctx, web, Sweep{ID: "r1", Token: "pulse", ReplID: p.ReplID, Last: p.Now, MaxAge: time.Minute, Cutoff: p.Now + 1})
	if !errors.Is(err, ErrFenced) || len(out.Addrs) > 0 || !present(t, replica, host(1)) {
		t.Errorf("got %+v, %v, want ErrFenced", out, err)
	}
}

func TestReapOddTokens(t *testing.T) {
	srv := redistest.Start(t)
	for _, c := range []struct{ name, meta, want string }{
		{"none", "", ""},
		{"broken JSON", `{"id":`, ""},
		{"no object", `[1]`, ""},
		{"null", `null`, ""},
		{"no string", `{"id":{"a":1}}`, ""},
		{"with spaces", `{"id":"a b  c"}`, "a b  c"},
		{"with a newline", `{"id":"a\nb"}`, "a\nb"},
		{"too deep for the parser", `{"id":"a","x":` + nested(1200) + `}`, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			a := host(1)
			do(t, s, "ZADD", s.keys.Instances(web), t0, a.String())
			if c.meta != "" {
				do(t, s, "HSET", s.keys.Meta(web), a.String(), c.meta)
			}
			expire(t, s, a)
			if got, want := gone(t, s, a), fmt.Sprintf("expired %d %s", s.clock(), c.want); got != want {
				t.Errorf("noted %q, want %q", got, want)
			}
			snap, err := s.Read(t.Context(), web, nil)
			must(t, err)
			if g := snap.Entries[0].Gone; g == nil || g.Reason != Expired || g.Token != c.want || g.At != s.clock() {
				t.Errorf("read %+v", snap.Entries[0])
			}
		})
	}
}

func nested(n int) string {
	b := make([]byte, 0, 2*n)
	for range n {
		b = append(b, '[')
	}
	for range n {
		b = append(b, ']')
	}
	return string(b)
}

// TestReapTakesGarbage checks that a member that is no address expires too.
func TestReapTakesGarbage(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	do(t, s, "ZADD", s.keys.Instances(web), 1, "not an address")
	out, _, err := sweep(t, s, t0)
	if err != nil || !slices.Equal(out, []string{"not an address"}) {
		t.Errorf("got %q %v", out, err)
	}
}

func TestPulse(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	ctx := t.Context()
	first, err := s.Pulse(ctx, "r1", "p1", time.Minute)
	must(t, err)
	if first.Now != t0 || len(first.ReplID) != 40 || first.Epoch != "" || first.Previous != "" {
		t.Errorf("first: %+v", first)
	}
	epoch := do(t, s, "GET", s.keys.Epoch())
	second, err := s.Pulse(ctx, "r1", "p2", time.Minute)
	must(t, err)
	if second.Previous != "p1" || second.Epoch != epoch || second.ReplID != first.ReplID {
		t.Errorf("second: %+v", second)
	}
	if other, err := s.Pulse(ctx, "r2", "p1", time.Minute); err != nil || other.Previous != "" {
		t.Errorf("another reaper's first: %+v %v", other, err)
	}
	if left := s.rdb.PTTL(ctx, s.keys.Reaper("r1")).Val(); left <= 0 || left > time.Minute {
		t.Errorf("expires in %v, want a minute", left)
	}
}

// TestPrune checks what happens to notes older than ten minutes.
func TestPrune(t *testing.T) {
	srv := redistest.Start(t)
	const notes = 150
	for _, c := range []struct {
		name string
		act  func(testing.TB, *Store)
	}{
		{"leave", func(tb testing.TB, s *Store) { leave(tb, s, host(notes+2), "late") }},
		{"reap", func(tb testing.TB, s *Store) {
			do(tb, s, "ZADD", s.keys.Instances(web), 1, host(notes+2).String())
			_, _, err := sweep(tb, s, 2)
			must(tb, err)
		}},
		{"admin", func(tb testing.TB, s *Store) { say(tb, s, host(notes+2), Word{Verb: "drain"}) }},
		{"deregister", func(tb testing.TB, s *Store) {
			do(tb, s, "ZADD", s.keys.Instances(web), 1, host(notes+2).String())
			_, err := s.Deregister(tb.Context(), web, host(notes+2), true, "")
			must(tb, err)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			ctx := t.Context()
			k := s.keys
			join(t, s, host(notes), "stays") // version 1
			for i := range notes {
				leave(t, s, host(i), fmt.Sprintf("t%d", i)) // versions 2 to notes+1
			}
			s.setClock(t0 + 1)
			leave(t, s, host(notes+1), "young") // version notes+2
			at := func(version int64) Token {
				snap, err := s.Read(ctx, web, nil)
				must(t, err)
				snap.Token.Version = version
				return snap.Token
			}
			count := func(key string) int64 {
				n, err := s.rdb.ZCard(ctx, key).Result()
				must(t, err)
				return n
			}

			s.setClock(t0 + pruneAfter) // not older yet
			act := c.act
			leave(t, s, host(notes+3), "x") // version notes+3
			if got := count(k.GoneAt(web)); got != notes+2 {
				t.Fatalf("%d notes at exactly ten minutes, want %d", got, notes+2)
			}

			s.setClock(t0 + pruneAfter + 1) // the young one is at exactly ten minutes
			act(t, s)                       // version notes+4, drops the first 100
			if got := count(k.GoneAt(web)); got != notes+3-100 {
				t.Errorf("%d notes after one call, want %d", got, notes+3-100)
			}
			// Equal scores come in the order of the members' bytes, so which 100
			// went is not which came first.
			left := s.rdb.HLen(ctx, k.Gone(web)).Val()
			var highest float64
			for i := range notes {
				noted := gone(t, s, host(i)) != ""
				indexed := do(t, s, "ZSCORE", k.Changed(web), host(i).String()) != nil
				if noted != indexed {
					t.Errorf("%v: noted %v, in the index %v", host(i), noted, indexed)
				}
				if !noted {
					highest = max(highest, float64(i+2))
				}
			}
			// An admin word leaves no note in gone, all others do.
			if want := int64(notes + 3 - 100); left != want && (c.name != "admin" || left != want-1) {
				t.Errorf("%d in gone, want %d", left, want)
			}
			pruned := s.rdb.ZScore(ctx, k.Changed(web), "pruned").Val()
			if pruned != highest || highest == 0 {
				t.Errorf("pruned %.0f, want the highest that went, %.0f", pruned, highest)
			}
			if got := s.rdb.ZScore(ctx, k.Changed(web), host(notes).String()).Val(); got != 1 {
				t.Errorf("the present one is in the index at %.0f, want 1", got)
			}

			if snap, err := s.Read(ctx, web, ptr(at(int64(pruned)-1))); err != nil || !snap.Full {
				t.Errorf("a reader before the pruned version: full %v %v, want all", snap.Full, err)
			}
			snap, err := s.Read(ctx, web, ptr(at(int64(pruned))))
			if err != nil || snap.Full || int64(len(snap.Entries)) != notes+4-int64(pruned) {
				t.Errorf("a reader at the pruned version %.0f: full %v, %d entries, %v", pruned, snap.Full, len(snap.Entries), err)
			}
			if len(snap.Garbage) > 0 {
				t.Errorf("garbage %q", snap.Garbage)
			}

			leave(t, s, host(notes+4), "y")
			if got := count(k.GoneAt(web)); got != 4 {
				t.Errorf("%d notes after a second call, want 4", got)
			}
			if got := s.rdb.ZScore(ctx, k.Changed(web), "pruned").Val(); got != notes+1 {
				t.Errorf("pruned %.0f, want %d", got, notes+1)
			}
			if gone(t, s, host(notes+1)) == "" {
				t.Error("a note of exactly ten minutes went")
			}
		})
	}
}

// TestPruneLeavesThePresent checks that an old note of somebody who came back
// takes nothing else along.
func TestPruneLeavesThePresent(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	k := s.keys
	join(t, s, host(1), "t1")
	do(t, s, "ZADD", k.GoneAt(web), t0, host(1).String()) // by hand: an arrival drops its own
	do(t, s, "HSET", k.Gone(web), host(1).String(), "left 1 t0")
	s.setClock(t0 + pruneAfter + 1)
	leave(t, s, host(2), "t2")
	if !present(t, s, host(1)) || gone(t, s, host(1)) != "" {
		t.Error("the instance went, or its old note stayed")
	}
	if s.rdb.ZScore(t.Context(), k.Changed(web), host(1).String()).Val() != 1 {
		t.Error("its place in the index went")
	}
}

func ptr[T any](v T) *T { return &v }
