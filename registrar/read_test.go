package registrar

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"rollcall/registrar/redistest"
)

func TestReadDelta(t *testing.T) {
	srv := redistest.Start(t)
	nine := 9
	for _, c := range []struct {
		name string
		act  func(testing.TB, *Store)
		want []string // as entryText has them
	}{
		{"nothing", func(testing.TB, *Store) {}, nil},
		{"heartbeat", func(tb testing.TB, s *Store) { join(tb, s, host(1), "t1") }, nil},
		{"arrival", func(tb testing.TB, s *Store) { join(tb, s, host(9), "t9") }, []string{"10.1.0.10:8080 t9 weight 7"}},
		{"takeover", func(tb testing.TB, s *Store) { join(tb, s, host(1), "u1") }, []string{"10.1.0.2:8080 u1 weight 7"}},
		{"leave", func(tb testing.TB, s *Store) { leave(tb, s, host(1), "t1") }, []string{"10.1.0.2:8080 gone left t1"}},
		{"expiry", func(tb testing.TB, s *Store) {
			do(tb, s, "ZADD", s.keys.Instances(web), 1, host(1).String())
			_, _, err := sweep(tb, s, 2)
			must(tb, err)
		}, []string{"10.1.0.2:8080 gone expired t1"}},
		{"word", func(tb testing.TB, s *Store) { say(tb, s, host(1), Word{Verb: "maint"}) }, []string{"10.1.0.2:8080 t1 weight 7 maint"}},
		{"word that stood already", func(tb testing.TB, s *Store) { say(tb, s, host(2), Word{Verb: "drain"}) }, nil},
		{"word of an absent one", func(tb testing.TB, s *Store) { say(tb, s, host(9), Word{Verb: "maint"}) }, []string{"10.1.0.10:8080 absent"}},
		{"several, one of them twice", func(tb testing.TB, s *Store) {
			leave(tb, s, host(1), "t1")
			say(tb, s, host(2), Word{Verb: "weight", Weight: &nine})
			join(tb, s, host(1), "u1")
		}, []string{"10.1.0.3:8080 t2 weight 9 drain", "10.1.0.2:8080 u1 weight 7"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			for n := 1; n <= 3; n++ {
				join(t, s, host(n), fmt.Sprintf("t%d", n))
			}
			say(t, s, host(2), Word{Verb: "drain"})
			first, err := s.Read(t.Context(), web, nil)
			must(t, err)
			if !first.Full || len(first.Entries) != 3 {
				t.Fatalf("first read: %+v", first)
			}
			c.act(t, s)
			got, err := s.Read(t.Context(), web, &first.Token)
			must(t, err)
			var texts []string
			for _, e := range got.Entries {
				texts = append(texts, entryText(e))
			}
			if got.Full || !slices.Equal(texts, c.want) {
				t.Errorf("full %v, got %q, want %q", got.Full, texts, c.want)
			}
			if _, v := versions(t, s); got.Token.Version != v || first.Token.Interrupted(got.Token) || (got.Token == first.Token) != (len(c.want) == 0) {
				t.Errorf("token %+v after %+v, want version %d", got.Token, first.Token, v)
			}
			if got.TTL != DefaultTTL || got.Interval != DefaultInterval || got.Service != web || got.Now == 0 {
				t.Errorf("head %+v", got)
			}
		})
	}
}

// entryText renders what a reader acts on, without times.
func entryText(e Entry) string {
	switch {
	case e.Garbage != "":
		return fmt.Sprintf("%v garbage", e.Addr)
	case e.Present:
		return strings.TrimSpace(fmt.Sprintf("%v %s weight %d %s", e.Addr, e.Instance.Meta.ID, e.Instance.Weight(), e.Instance.State()))
	case e.Gone != nil:
		return fmt.Sprintf("%v gone %s %s", e.Addr, e.Gone.Reason, e.Gone.Token)
	}
	return fmt.Sprintf("%v absent", e.Addr)
}

func TestReadFullOrDelta(t *testing.T) {
	srv := redistest.Start(t)
	with := func(f func(*Token)) func(Token) *Token {
		return func(t Token) *Token { f(&t); return &t }
	}
	same := with(func(*Token) {})
	incr := func(tb testing.TB, s *Store) { do(tb, s, "INCR", s.keys.ServiceVersion(web)) }
	more := func(n int) func(testing.TB, *Store) {
		return func(tb testing.TB, s *Store) {
			for i := range n {
				join(tb, s, host(100+i), "t")
			}
		}
	}
	for _, c := range []struct {
		name  string
		act   func(testing.TB, *Store) // after the first read
		since func(Token) *Token
		full  bool
		n     int // entries
	}{
		{"no token", nil, func(Token) *Token { return nil }, true, 2},
		{"same token", nil, same, false, 0},
		{"another data set", nil, with(func(t *Token) { t.ReplID = strings.Repeat("0", 40) }), true, 2},
		{"another epoch", nil, with(func(t *Token) { t.Epoch = "x" }), true, 2},
		{"no epoch", nil, with(func(t *Token) { t.Epoch = "" }), true, 2},
		{"epoch lost", func(tb testing.TB, s *Store) { do(tb, s, "DEL", s.keys.Epoch()) }, same, true, 2},
		{"version went back", nil, with(func(t *Token) { t.Version++ }), true, 2},
		{"version lost", func(tb testing.TB, s *Store) { do(tb, s, "DEL", s.keys.ServiceVersion(web)) }, same, true, 2},
		{"version 0", nil, with(func(t *Token) { t.Version = 0 }), false, 2},
		{"version of an unreadable counter", nil, with(func(t *Token) { t.Version = -1 }), true, 2},
		{"counter unreadable", func(tb testing.TB, s *Store) { do(tb, s, "SET", s.keys.ServiceVersion(web), "x") }, same, true, 2},
		{"counter unreadable then and now", func(tb testing.TB, s *Store) { do(tb, s, "SET", s.keys.ServiceVersion(web), "x") },
			with(func(t *Token) { t.Version = -1 }), true, 2},
		{"counter nan", func(tb testing.TB, s *Store) { do(tb, s, "SET", s.keys.ServiceVersion(web), "nan") }, same, true, 2},
		{"bumped by hand", incr, same, true, 2},
		{"bumped by hand after a change", func(tb testing.TB, s *Store) { more(1)(tb, s); incr(tb, s) }, same, true, 3},
		{"index lost", func(tb testing.TB, s *Store) { more(1)(tb, s); do(tb, s, "DEL", s.keys.Changed(web)) }, same, true, 3},
		{"index lost, nothing new", func(tb testing.TB, s *Store) { do(tb, s, "DEL", s.keys.Changed(web)) }, same, false, 0},
		{"as many as are read one by one", more(deltaLimit), same, false, deltaLimit},
		{"one more", more(deltaLimit + 1), same, true, deltaLimit + 3},
		{"pruned past it", func(tb testing.TB, s *Store) { more(1)(tb, s); do(tb, s, "ZADD", s.keys.Changed(web), 3, "pruned") }, same, true, 3},
		{"pruned up to it", func(tb testing.TB, s *Store) { more(1)(tb, s); do(tb, s, "ZADD", s.keys.Changed(web), 2, "pruned") }, same, false, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			join(t, s, host(1), "t1")
			join(t, s, host(2), "t2")
			first, err := s.Read(t.Context(), web, nil)
			must(t, err)
			if c.act != nil {
				c.act(t, s)
			}
			got, err := s.Read(t.Context(), web, c.since(first.Token))
			must(t, err)
			if got.Full != c.full || len(got.Entries) != c.n {
				t.Errorf("full %v of %d, want %v of %d", got.Full, len(got.Entries), c.full, c.n)
			}
			// The read's version is the one that Versions tells, so that a reader
			// compares like with like.
			if _, v := versions(t, s); got.Token.Version != v {
				t.Errorf("version %d, want %d", got.Token.Version, v)
			}
		})
	}
}

func TestReadUnknownService(t *testing.T) {
	s, _ := newStore(t)
	snap, err := s.Read(t.Context(), "nobody", nil)
	must(t, err)
	if !snap.Full || len(snap.Entries) != 0 || snap.Token.Version != 0 || snap.Token.Epoch != "" {
		t.Errorf("got %+v", snap)
	}
	if snap, err = s.Read(t.Context(), "nobody", &snap.Token); err != nil || snap.Full || len(snap.Entries) != 0 {
		t.Errorf("got %+v %v, want an empty delta", snap, err)
	}
}

// TestReadGarbage stores what no script writes and reads it both ways.
func TestReadGarbage(t *testing.T) {
	srv := redistest.Start(t)
	future := time.Now().Add(time.Hour).UnixMilli()
	plain := "10.1.0.2:8080 t1 weight 7"
	const garbage = "10.1.0.2:8080 garbage"
	put := func(key func(Keys) string, value string) func(testing.TB, *Store) {
		return func(tb testing.TB, s *Store) { do(tb, s, "HSET", key(s.keys), host(1).String(), value) }
	}
	meta := func(v string) func(testing.TB, *Store) {
		return put(func(k Keys) string { return k.Meta(web) }, v)
	}
	admin := func(v string) func(testing.TB, *Store) {
		return put(func(k Keys) string { return k.Admin(web) }, v)
	}
	score := func(v any) func(testing.TB, *Store) {
		return func(tb testing.TB, s *Store) { do(tb, s, "ZADD", s.keys.Instances(web), v, host(1).String()) }
	}
	note := func(v string) func(testing.TB, *Store) {
		return func(tb testing.TB, s *Store) {
			leave(tb, s, host(1), "t1")
			do(tb, s, "HSET", s.keys.Gone(web), host(1).String(), v)
		}
	}
	for _, c := range []struct {
		name string
		act  func(testing.TB, *Store)
		want string
	}{
		{"score +inf", score("+inf"), garbage},
		{"score -inf", score("-inf"), garbage},
		{"score 1e300", score("1e300"), garbage},
		{"score in the future", score(future), garbage},
		{"score -1", score(-1), garbage},
		{"score -0", score("-0"), plain},
		{"score 0", score(0), plain},
		{"score with a fraction", score("1.5"), plain},
		{"meta broken", meta(`{"id":`), garbage},
		{"meta no object", meta(`[]`), garbage},
		{"meta weight 257", meta(`{"id":"t1","weight":257}`), garbage},
		{"meta weight -1", meta(`{"id":"t1","weight":-1}`), garbage},
		{"meta weight a string", meta(`{"id":"t1","weight":"7"}`), garbage},
		{"meta weight 256", meta(`{"id":"t1","weight":256}`), "10.1.0.2:8080 t1 weight 256"},
		{"meta without weight", meta(`{"id":"t1"}`), "10.1.0.2:8080 t1 weight 100"},
		{"meta draining", meta(`{"id":"t1","weight":7,"draining":true}`), plain + " drain"},
		{"meta empty", meta(``), "10.1.0.2:8080  weight 100"},
		{"meta with unknown words", meta(`{"id":"t1","weight":7,"x":{"y":[1]}}`), plain},
		{"admin broken", admin(`{`), garbage},
		{"admin unknown state", admin(`{"state":"ready"}`), garbage},
		{"admin weight 257", admin(`{"weight":257}`), garbage},
		{"admin weight null", admin(`{"state":"maint","weight":null}`), plain + " maint"},
		{"gone unreadable", note("what?"), garbage},
		{"gone of an unknown reason", note("vanished 1 t1"), garbage},
		{"gone without a time", note("left t1"), garbage},
		{"gone with a time that is none", note("left 1.5 t1"), garbage},
		{"gone without a token", note("expired 1"), "10.1.0.2:8080 gone expired"},
		{"gone, empty", note(""), garbage},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			join(t, s, host(2), "t2")
			before, err := s.Read(t.Context(), web, nil)
			must(t, err)
			join(t, s, host(1), "t1")
			c.act(t, s)
			for _, since := range []*Token{nil, &before.Token} {
				snap, err := s.Read(t.Context(), web, since)
				must(t, err)
				var got []string
				for _, e := range snap.Entries {
					if e.Addr == host(1) {
						got = append(got, strings.TrimSpace(entryText(e)))
						if e.Garbage != "" && (e.Present || e.Gone != nil) {
							t.Errorf("garbage concludes: %+v", e)
						}
					} else if entryText(e) != "10.1.0.3:8080 t2 weight 7" {
						t.Errorf("a neighbour reads %q", entryText(e))
					}
				}
				if snap.Full != (since == nil) || !slices.Equal(got, []string{c.want}) {
					t.Errorf("full %v: got %q, want %q", snap.Full, got, c.want)
				}
			}
		})
	}
}

func TestReadGarbageMembers(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	bad := []string{"", "10.0.0.1", "10.0.0.1:0", "010.0.0.1:80", "10.0.0.1:80\n", "::ffff:10.0.0.1:80", "10.0.0.1:80;shutdown", "\x00\xff", "0.0.0.0:80"}
	join(t, s, host(1), "t1")
	before, err := s.Read(t.Context(), web, nil)
	must(t, err)
	for _, m := range bad {
		do(t, s, "ZADD", s.keys.Instances(web), 1, m, 1, "10.9.9.9:80")
		do(t, s, "ZADD", s.keys.Changed(web), 2, m)
	}
	do(t, s, "SET", s.keys.ServiceVersion(web), 2)
	slices.Sort(bad)
	for _, since := range []*Token{nil, &before.Token} {
		snap, err := s.Read(t.Context(), web, since)
		must(t, err)
		slices.Sort(snap.Garbage)
		if snap.Full != (since == nil) || !slices.Equal(snap.Garbage, bad) {
			t.Errorf("full %v: garbage %q, want %q", snap.Full, snap.Garbage, bad)
		}
		if since == nil {
			// A member that somebody added by hand is an instance like any other.
			var texts []string
			for _, e := range snap.Entries {
				texts = append(texts, entryText(e))
			}
			slices.Sort(texts)
			if want := []string{"10.1.0.2:8080 t1 weight 7", "10.9.9.9:80  weight 100"}; !slices.Equal(texts, want) {
				t.Errorf("got %q, want %q", texts, want)
			}
		}
	}
}

// TestReadersAgree lets one reader fold deltas and another read all, over a
// random history, and compares both with what the calls answered.
func TestReadersAgree(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	srv := redistest.Start(t)
	s := fresh(t, srv)
	ctx := t.Context()

	model := map[string]string{} // address → token, of the present
	folded := map[string]Entry{}
	var token *Token
	fulls, deltas := 0, 0
	compare := func(step int) {
		t.Helper()
		// The folding reader reads first: between both nothing happens.
		d, err := s.Read(ctx, web, token)
		must(t, err)
		if token != nil && d.Token.Interrupted(*token) != (d.Token != *token) {
			t.Fatalf("step %d: tokens %+v and %+v", step, *token, d.Token)
		}
		if d.Full {
			clear(folded)
			fulls++
		} else {
			deltas++
		}
		for _, e := range d.Entries {
			folded[e.Addr.String()] = e
		}
		token = &d.Token
		all, err := s.Read(ctx, web, nil)
		must(t, err)
		want := map[string]Entry{}
		tokens := map[string]string{}
		for _, e := range all.Entries {
			want[e.Addr.String()] = e
			if e.Present {
				tokens[e.Addr.String()] = e.Instance.Meta.ID
			}
		}
		if !maps.Equal(tokens, model) {
			t.Fatalf("step %d: the register has %v, its answers were %v", step, tokens, model)
		}
		for addr, f := range folded {
			w, ok := want[addr]
			f.Instance.Beat, w.Instance.Beat = 0, 0 // a heartbeat is no change
			if !ok && !f.Present {
				continue // its note was pruned; the delta reader still remembers it
			}
			if !reflect.DeepEqual(f, w) {
				t.Fatalf("step %d, %s:\nfolded %+v\nfull   %+v", step, addr, f, w)
			}
		}
		for addr, w := range want {
			if _, ok := folded[addr]; !ok {
				t.Fatalf("step %d: %s is unknown to the delta reader: %+v", step, addr, w)
			}
		}
	}

	const steps, addrs, tokens = 2000, 40, 5
	for step := range steps {
		a, tok := host(r.IntN(addrs)), fmt.Sprintf("t%d", r.IntN(tokens))
		gap := r.Int64N(400)
		if r.IntN(400) == 0 {
			gap = pruneAfter + 1
		}
		s.setClock(s.clock() + gap)
		switch p := r.IntN(100); {
		case p < 60:
			// Tokens are reused across addresses and over time, which no Beater
			// does: it meets LEFT, takeovers and changes of metadata alike.
			meta := fmt.Sprintf(`{"id":%q,"weight":%d}`, tok, r.IntN(3))
			reply, err := s.Beat(ctx, web, Beat{Addr: a, Token: tok, Meta: meta})
			switch got := beatOutcome(reply, err); got {
			case "OK", "NEW", "CHANGED", "TAKEN":
				if _, was := model[a.String()]; was != (got != "NEW") {
					t.Fatalf("step %d: %s of %v, present before: %v", step, got, a, was)
				}
				model[a.String()] = tok
			case "LEFT", "NOTOWNER":
			default:
				t.Fatalf("step %d: %s", step, got)
			}
		case p < 72:
			switch _, err := s.Leave(ctx, web, a, tok, []Reason{Left, Unhealthy}[r.IntN(2)]); {
			case err == nil:
				if was, ok := model[a.String()]; ok && was != tok {
					t.Fatalf("step %d: %s left for %s", step, tok, was)
				}
				delete(model, a.String())
			case !errors.Is(err, ErrNotOwner):
				t.Fatalf("step %d: %v", step, err)
			}
		case p < 76:
			switch _, err := s.Deregister(ctx, web, a, r.IntN(2) == 0, ""); {
			case err == nil:
				delete(model, a.String())
			case !errors.Is(err, ErrAbsent) && !errors.Is(err, ErrBeats):
				t.Fatalf("step %d: %v", step, err)
			}
		case p < 90:
			w := Word{Verb: []string{"drain", "maint", "ready", "weight"}[r.IntN(4)], Reason: []string{"", "x"}[r.IntN(2)]}
			if n := r.IntN(4); n < 3 {
				w.Weight = &n
			}
			_, present, err := s.SetAdmin(ctx, web, a, w)
			must(t, err)
			if _, was := model[a.String()]; was != present {
				t.Fatalf("step %d: present %v, was %v", step, present, was)
			}
		default:
			out, _, err := sweep(t, s, s.clock()-ttlMS)
			must(t, err)
			for _, a := range out {
				if _, was := model[a]; !was {
					t.Fatalf("step %d: %s was taken out twice", step, a)
				}
				delete(model, a)
			}
		}
		if step%50 == 49 || r.IntN(10) == 0 {
			compare(step)
		}
	}
	compare(steps)
	if deltas < 5*fulls {
		t.Errorf("%d deltas and %d full reads: this compared too little", deltas, fulls)
	}
	t.Logf("%d deltas, %d full reads", deltas, fulls)
}

// TestReadFlood checks that what a stranger with redis-cli writes costs a reader
// an error, and bounded memory.
func TestReadFlood(t *testing.T) {
	srv := redistest.Start(t)
	flood := func(tb testing.TB, s *Store, key string, from, to int) {
		tb.Helper()
		do(tb, s, "EVAL", `
			local t = redis.call('TYPE', KEYS[1]).ok
			for i = ARGV[1], ARGV[2] do
				if t == 'zset' then redis.call('ZADD', KEYS[1], i, 'x' .. i)
				elseif t == 'hash' then redis.call('HSET', KEYS[1], 'x' .. i, 'x')
				else redis.call('SADD', KEYS[1], 'x' .. i) end
			end`, 1, s.keys.ns+key, from, to)
	}
	for _, key := range []string{":{web}:instances", ":{web}:meta", ":{web}:admin", ":{web}:gone"} {
		t.Run(key, func(t *testing.T) {
			s := fresh(t, srv)
			join(t, s, host(1), "t1")
			join(t, s, host(2), "t2")
			say(t, s, host(1), Word{Verb: "drain"})
			leave(t, s, host(2), "t2")
			limit := ReadLimit
			if key == ":{web}:instances" {
				limit = 2 * DefaultMaxInstances
			}
			flood(t, s, key, 2, limit)
			before, err := s.Read(t.Context(), web, nil)
			must(t, err)
			flood(t, s, key, limit+1, limit+1)
			if key == ":{web}:admin" { // overrides of nobody cost nothing, in any number
				snap, err := s.Read(t.Context(), web, nil)
				if err != nil || len(snap.Entries) != 2 {
					t.Errorf("%d entries, %v", len(snap.Entries), err)
				}
				return
			}
			want := fmt.Sprintf("%s%s has %d entries", s.keys.ns, key, limit+1)
			if _, err := s.Read(t.Context(), web, nil); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want %q", err, want)
			}
			if limit != ReadLimit {
				return
			}
			// Who knows the state before follows the changes.
			say(t, s, host(1), Word{Verb: "maint"})
			if snap, err := s.Read(t.Context(), web, &before.Token); err != nil || snap.Full || len(snap.Entries) != 1 {
				t.Errorf("what changed: full %v, %d entries, %v", snap.Full, len(snap.Entries), err)
			}
		})
	}
	t.Run("services", func(t *testing.T) {
		s := fresh(t, srv)
		flood(t, s, ":services", 1, ReadLimit)
		if names, _, err := s.Services(t.Context()); err != nil || len(names) != ReadLimit {
			t.Errorf("%d names, %v", len(names), err)
		}
		flood(t, s, ":services", 0, 0)
		if names, _, err := s.Services(t.Context()); !errors.Is(err, ErrManyServices) || len(names) != ReadLimit {
			t.Errorf("%d names, %v", len(names), err)
		}
	})
}

// TestReadLongTexts checks that a text longer than metadata may be is garbage of
// which only the length is read, in both forms of a read.
func TestReadLongTexts(t *testing.T) {
	srv := redistest.Start(t)
	pad := func(n int, frame string) string {
		return strings.Replace(frame, "~", strings.Repeat("x", n-len(frame)+1), 1)
	}
	for _, full := range []bool{true, false} {
		for _, c := range []struct {
			name, key, value string
			want             string // why it is garbage
		}{
			{"longest metadata", "meta", pad(MaxMeta, `{"id":"t1","zone":"~"}`), ""},
			{"longer metadata", "meta", pad(MaxMeta+1, `{"id":"t1","zone":"~"}`), "metadata: 4097 bytes, at most 4096"},
			{"longest word", "admin", pad(MaxMeta, `{"reason":"~"}`), ""},
			{"longer word", "admin", pad(MaxMeta+1, `{"reason":"~"}`), "admin word: 4097 bytes, at most 4096"},
		} {
			t.Run(fmt.Sprintf("%s, full %v", c.name, full), func(t *testing.T) {
				s := fresh(t, srv)
				join(t, s, host(2), "t2")
				first, err := s.Read(t.Context(), web, nil)
				must(t, err)
				join(t, s, host(1), "t1")
				do(t, s, "HSET", s.keys.ns+":{web}:"+c.key, host(1).String(), c.value)
				since := &first.Token
				if full {
					since = nil
				}
				snap, err := s.Read(t.Context(), web, since)
				must(t, err)
				if snap.Full != full {
					t.Errorf("full %v", snap.Full)
				}
				for _, e := range snap.Entries {
					if e.Addr == host(1) && (e.Garbage != c.want || e.Present != (c.want == "")) {
						t.Errorf("got %q, present %v, want %q", e.Garbage, e.Present, c.want)
					}
				}
			})
		}
		t.Run(fmt.Sprintf("address and note, full %v", full), func(t *testing.T) {
			s := fresh(t, srv)
			join(t, s, host(1), "t1")
			first, err := s.Read(t.Context(), web, nil)
			must(t, err)
			join(t, s, host(3), "t3")
			long := strings.Repeat("x", MaxMeta+1)
			do(t, s, "ZADD", s.keys.Instances(web), 1, long)
			do(t, s, "ZADD", s.keys.Changed(web), 2, long)
			do(t, s, "HSET", s.keys.Gone(web), host(2).String(), "left 1 "+long)
			do(t, s, "ZADD", s.keys.Changed(web), 2, host(2).String())
			since := &first.Token
			if full {
				since = nil
			}
			snap, err := s.Read(t.Context(), web, since)
			must(t, err)
			if snap.Full != full || !slices.Equal(snap.Garbage, []string{"#4097"}) {
				t.Errorf("full %v, garbage %q", snap.Full, snap.Garbage)
			}
			i := slices.IndexFunc(snap.Entries, func(e Entry) bool { return e.Addr == host(2) })
			if i < 0 || snap.Entries[i].Garbage != "a note of its going that cannot be read" {
				t.Errorf("got %+v", snap.Entries)
			}
		})
	}
}

func TestTokenInterrupted(t *testing.T) {
	was, unborn := Token{"r", "e", 5}, Token{"r", "", 0}
	for _, c := range []struct {
		name     string
		was, now Token
		want     bool
	}{
		{"same", was, Token{"r", "e", 5}, false},
		{"later", was, Token{"r", "e", 6}, false},
		{"earlier", was, Token{"r", "e", 4}, true},
		{"another data set", was, Token{"r2", "e", 6}, true},
		{"another epoch", was, Token{"r", "e2", 6}, true},
		{"epoch lost", was, Token{"r", "", 5}, true},
		{"first epoch", unborn, Token{"r", "e", 1}, false},
		{"first epoch, another data set", unborn, Token{"r2", "e", 1}, true},
		{"first epoch, earlier", Token{"r", "", 5}, Token{"r", "e", 1}, true},
	} {
		if got := c.was.Interrupted(c.now); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

// TestReadChanges reads many services in few calls, and of each finds what Read
// finds of it alone; whoever must be read whole, or cannot be, is left out and
// harms nobody.
func TestReadChanges(t *testing.T) {
	s := fresh(t, redistest.Start(t))
	name := func(i int) Service { return Service(fmt.Sprintf("s%d", i)) }
	const services = 2*manyServices + 1 // the last one alone in its call
	wanted := make([]Since, services)
	for i := range wanted {
		for n := range 2 {
			_, err := s.Beat(t.Context(), name(i), Beat{Addr: host(n), Token: fmt.Sprint("t", n), Meta: fmt.Sprintf(`{"id":"t%d","weight":7}`, n)})
			must(t, err)
		}
		snap, err := s.Read(t.Context(), name(i), nil)
		must(t, err)
		wanted[i] = Since{name(i), snap.Token}
	}
	const quiet, left, other, pruned, broken, busy, backwards = 0, 1, 2, 3, manyServices, manyServices + 1, manyServices + 2
	for i := range wanted {
		if i != quiet {
			_, err := s.Leave(t.Context(), name(i), host(1), "t1", Left)
			must(t, err)
		}
	}
	wanted[other].Token.Epoch = "another"
	wanted[backwards].Token.Version += 100
	do(t, s, "DEL", s.keys.Changed(name(pruned)))
	do(t, s, "SET", s.keys.Meta(name(broken)), "x")
	for n := range deltaLimit/manyServices + 1 {
		_, err := s.Beat(t.Context(), name(busy), Beat{Addr: host(10 + n), Token: "t", Meta: `{"id":"t"}`})
		must(t, err)
	}
	calls := func() (n int) {
		_, stats, _ := strings.Cut(s.rdb.Info(t.Context(), "commandstats").Val(), "cmdstat_evalsha_ro:calls=")
		_, err := fmt.Sscan(stats, &n)
		must(t, err)
		return n
	}
	before := calls()
	got, err := s.ReadChanges(t.Context(), wanted)
	must(t, err)
	if n := calls() - before; n != 2 {
		t.Errorf("%d calls, want 2", n)
	}
	if len(got) != services {
		t.Fatalf("%d snapshots of %d services", len(got), services)
	}
	for i, w := range wanted {
		switch i {
		case other, pruned, broken, busy, backwards, services - 1:
			if !reflect.DeepEqual(got[i], Snapshot{}) {
				t.Errorf("%s is not left out: %+v", w.Service, got[i])
			}
			continue
		}
		alone, err := s.Read(t.Context(), w.Service, &w.Token)
		must(t, err)
		alone.Now = got[i].Now
		if !reflect.DeepEqual(got[i], alone) {
			t.Errorf("%s\n among others %+v\nalone        %+v", w.Service, got[i], alone)
		}
		if n := len(got[i].Entries); i == quiet && n != 0 || i != quiet && n != 1 {
			t.Errorf("%s: %d entries", w.Service, n)
		}
	}
	if got, err := s.ReadChanges(t.Context(), wanted[left:left+1]); err != nil || len(got) != 1 || got[0].Service != "" {
		t.Errorf("one alone: %+v, %v", got, err)
	}
}
