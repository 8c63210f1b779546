package registrar

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"rollcall/registrar/redistest"
)

// sees is what a balancer says of one backend, be: how many servers are up, and the
// addresses that are Serving.
type sees struct {
	up      int
	serving []int
}

// TestLastServing holds which words are refused: those that take at once, where in
// some live balancer's backend nothing else serves.
func TestLastServing(t *testing.T) {
	srv := redistest.Start(t)
	zero, ten := 0, 10
	maint, drain := Word{Verb: "maint"}, Word{Verb: "drain"}
	weight := func(n *int) Word { return Word{Verb: "weight", Weight: n} }
	type words map[int]Word
	for _, c := range []struct {
		name    string
		sees    []sees // by the balancers lb0, lb1, …, of hosts 1 and 2
		said    words  // before
		word    Word   // of host 1
		refused string // the balancer that says so; empty = it is written
	}{
		{name: "maint of the last", sees: []sees{{1, []int{1}}}, word: maint, refused: "lb0"},
		{name: "weight 0 of the last", sees: []sees{{1, []int{1}}}, word: weight(&zero), refused: "lb0"},
		{name: "its own weight of 0", sees: []sees{{1, []int{1}}}, said: words{9: weight(&ten)}, word: weight(nil), refused: "lb0"},
		{name: "its own weight", sees: []sees{{1, []int{1}}}, said: words{1: weight(&ten)}, word: weight(nil)},
		{name: "another weight", sees: []sees{{1, []int{1}}}, word: weight(&ten)},
		{name: "drain", sees: []sees{{1, []int{1}}}, word: drain},
		{name: "ready", sees: []sees{{1, []int{1}}}, said: words{1: drain}, word: Word{Verb: "ready"}},
		{name: "forced", sees: []sees{{1, []int{1}}}, word: Word{Verb: "maint", Force: true}},
		{name: "maint while its drain waits", sees: []sees{{1, []int{1}}}, said: words{1: drain}, word: maint, refused: "lb0"},
		{name: "in maint already", sees: []sees{{1, []int{1}}}, said: words{1: {Verb: "maint", Force: true}}, word: weight(&zero)},
		{name: "of weight 0 already", sees: []sees{{1, []int{1}}}, said: words{1: {Verb: "weight", Weight: &zero, Force: true}}, word: maint},
		{name: "one that does not serve", sees: []sees{{1, []int{2}}}, word: maint},
		{name: "none serves", sees: []sees{{0, nil}}, word: maint},
		{name: "another instance serves", sees: []sees{{2, []int{1, 2}}}, word: maint},
		{name: "a server of the operator's own serves", sees: []sees{{2, []int{1}}}, word: maint},
		{name: "the other is in maint, and the balancer has not said so", sees: []sees{{2, []int{1, 2}}}, said: words{2: {Verb: "maint", Force: true}}, word: maint, refused: "lb0"},
		{name: "the other is to drain", sees: []sees{{2, []int{1, 2}}}, said: words{2: drain}, word: maint, refused: "lb0"},
		{name: "the other has weight 0", sees: []sees{{2, []int{1, 2}}}, said: words{2: {Verb: "weight", Weight: &zero, Force: true}}, word: maint, refused: "lb0"},
		{name: "the other is to drain, a third serves", sees: []sees{{3, []int{1, 2}}}, said: words{2: drain}, word: maint},
		{name: "the other does not serve, and is in maint", sees: []sees{{2, []int{1}}}, said: words{2: {Verb: "maint", Force: true}}, word: maint},
		{name: "in the second of two balancers", sees: []sees{{2, []int{1, 2}}, {1, []int{1}}}, word: maint, refused: "lb1"},
		{name: "in none of two", sees: []sees{{2, []int{1, 2}}, {1, []int{2}}}, word: maint},
		{name: "nothing is counted", sees: []sees{{-1, []int{1}}}, word: maint, refused: "lb0"},
		{name: "no balancer", word: maint},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			ctx := t.Context()
			own := Meta{Weight: 100}
			if _, nine := c.said[9]; nine { // stands for host 1's own weight of 0
				own.Weight = 0
				c.said = words{1: c.said[9]}
			}
			for n, m := range map[int]Meta{1: own, 2: {Weight: 100}} {
				_, err := s.Beat(ctx, web, Beat{Addr: host(n), Token: fmt.Sprint("t", n), Meta: fmt.Sprintf(`{"id":"t%d","weight":%d}`, n, m.Weight)})
				must(t, err)
			}
			for n, w := range c.said {
				say(t, s, host(n), w)
			}
			for i, x := range c.sees {
				tell(t, s, fmt.Sprint("lb", i), x)
			}
			before, err := s.Read(ctx, web, nil)
			must(t, err)
			version, present, err := s.SetAdmin(ctx, web, host(1), c.word)
			if c.refused != "" {
				after, rerr := s.Read(ctx, web, nil)
				must(t, rerr)
				if !errors.Is(err, ErrLast) || !strings.Contains(err.Error(), c.refused+" sends requests to no other server of be") || after.Token != before.Token {
					t.Errorf("%v, want a refusal by %s; version %d, %d before", err, c.refused, after.Token.Version, before.Token.Version)
				}
				return
			}
			if err != nil || !present || version != before.Token.Version+1 {
				t.Errorf("version %d, present %v, %v; want it written after version %d", version, present, err, before.Token.Version)
			}
		})
	}
}

// tell publishes what a balancer sees, and that it lives; with a count of less than 0
// none.
func tell(t *testing.T, s *Store, lb string, x sees) {
	t.Helper()
	v, err := s.Versions(t.Context(), []Service{web})
	must(t, err)
	must(t, s.Acker(lb).Ack(t.Context(), web, v.Token(web)))
	seen := Seen{Anew: true, Up: map[string]int{"be": x.up}, Servers: map[netip.AddrPort]map[string]ServerState{
		host(1): {"be": {State: "maint"}}, host(2): {"be": {State: "drain", Weight: 100}},
	}}
	if x.up < 0 {
		seen.Up = nil
	}
	for _, n := range x.serving {
		seen.Servers[host(n)]["be"] = ServerState{State: "ready", Check: "up", Weight: 100}
	}
	_, err = s.Publish(t.Context(), lb, web, seen)
	must(t, err)
}

// TestLastServingOfTheSilent holds that a balancer counts while it lives, that an
// address which the register does not know is weighed like any other, and that of
// those which went only the expired still count.
func TestLastServingOfTheSilent(t *testing.T) {
	s := fresh(t, redistest.Start(t))
	join(t, s, host(2), "t2")
	tell(t, s, "lb0", sees{2, []int{1, 2}})
	s.setClock(t0 + BalancerLive.Milliseconds())
	if _, _, err := s.SetAdmin(t.Context(), web, host(1), Word{Verb: "maint"}); err != nil {
		t.Errorf("with another: %v", err)
	}
	say(t, s, host(1), Word{Verb: "ready"})
	leave(t, s, host(2), "t2")
	if _, _, err := s.SetAdmin(t.Context(), web, host(1), Word{Verb: "maint"}); !errors.Is(err, ErrLast) {
		t.Errorf("the other has left: %v, want a refusal", err)
	}
	do(t, s, "HSET", s.keys.Gone(web), host(2).String(), fmt.Sprintf("expired %d t2", t0))
	if _, _, err := s.SetAdmin(t.Context(), web, host(1), Word{Verb: "maint"}); err != nil {
		t.Errorf("the other has expired, and is kept: %v", err)
	}
	say(t, s, host(1), Word{Verb: "ready"})
	do(t, s, "HDEL", s.keys.Seen(web, "lb0"), host(2).String())
	tell(t, s, "lb0", sees{1, []int{1}})
	if _, _, err := s.SetAdmin(t.Context(), web, host(1), Word{Verb: "maint"}); !errors.Is(err, ErrLast) {
		t.Errorf("alone: %v, want a refusal", err)
	}
	s.setClock(s.clock() + BalancerLive.Milliseconds() + 1)
	if _, _, err := s.SetAdmin(t.Context(), web, host(1), Word{Verb: "maint"}); err != nil {
		t.Errorf("its balancer is silent: %v", err)
	}
}

// TestLastServingInOneBackend is enough, of the several that a balancer has.
func TestLastServingInOneBackend(t *testing.T) {
	s := fresh(t, redistest.Start(t))
	tell(t, s, "lb0", sees{2, []int{1}})
	up := ServerState{State: "ready", Weight: 1}
	_, err := s.Publish(t.Context(), "lb0", web, Seen{Up: map[string]int{"a": 2, "b": 1, "c": 2}, Servers: map[netip.AddrPort]map[string]ServerState{
		host(1): {"a": up, "b": up, "c": {State: "maint"}}}})
	must(t, err)
	if _, _, err := s.SetAdmin(t.Context(), web, host(1), Word{Verb: "maint"}); !errors.Is(err, ErrLast) || !strings.HasSuffix(err.Error(), " of b") {
		t.Errorf("%v, want a refusal for b", err)
	}
}

// TestLastServingUnknown changes nothing where what balancers have cannot be read,
// unless that is asked for.
func TestLastServingUnknown(t *testing.T) {
	s := fresh(t, redistest.Start(t))
	join(t, s, host(1), "t1")
	tell(t, s, "lb0", sees{2, []int{1}})
	do(t, s, "DEL", s.keys.Seen(web, "lb0"))
	do(t, s, "SET", s.keys.Seen(web, "lb0"), "x")
	if _, _, err := s.SetAdmin(t.Context(), web, host(1), Word{Verb: "maint"}); err == nil || errors.Is(err, ErrLast) {
		t.Errorf("got %v, want the error of the read", err)
	}
	say(t, s, host(1), Word{Verb: "drain"})
	say(t, s, host(1), Word{Verb: "maint", Force: true})
}

// TestTwoOperators has two operators take out the last two at the same time, over and
// over: one of them is refused each time.
func TestTwoOperators(t *testing.T) {
	s := fresh(t, redistest.Start(t))
	join(t, s, host(1), "t1")
	join(t, s, host(2), "t2")
	tell(t, s, "lb0", sees{2, []int{1, 2}})
	for round := range 50 {
		errs := make([]error, 2)
		var operators sync.WaitGroup
		for i := range errs {
			operators.Go(func() { _, _, errs[i] = s.SetAdmin(t.Context(), web, host(1+i), Word{Verb: "maint"}) })
		}
		operators.Wait()
		if errors.Is(errs[0], ErrLast) == errors.Is(errs[1], ErrLast) {
			t.Fatalf("round %d: %v, %v; want one refusal", round, errs[0], errs[1])
		}
		say(t, s, host(1), Word{Verb: "ready"})
		say(t, s, host(2), Word{Verb: "ready"})
	}
}

// TestWordInARestlessService writes a word although the service changes between each
// look at it and the write.
func TestWordInARestlessService(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	join(t, s, host(1), "t1")
	tell(t, s, "lb0", sees{2, []int{1, 2}})
	other := srv.Client(t)
	changes := 0
	s.rdb.(*redis.Client).AddHook(ahead{s.admin.Hash(), func(ctx context.Context) error {
		changes++
		return other.Incr(ctx, s.keys.ServiceVersion(web)).Err()
	}})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, _, err := s.SetAdmin(ctx, web, host(1), Word{Verb: "maint"}); err != nil || changes != lastTries {
		t.Errorf("%v after %d changes, want it written after %d", err, changes, lastTries)
	}
}

// ahead does something before each call of one script.
type ahead struct {
	script string
	do     func(context.Context) error
}

func (a ahead) DialHook(next redis.DialHook) redis.DialHook { return next }
func (a ahead) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}
func (a ahead) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if args := cmd.Args(); len(args) > 1 && args[1] == a.script {
			if err := a.do(ctx); err != nil {
				return err
			}
		}
		return next(ctx, cmd)
	}
}

// TestDrainWaits returns what balancers say of a drain, or what will keep it waiting
// before they have.
func TestDrainWaits(t *testing.T) {
	s := fresh(t, redistest.Start(t))
	waits := func(want string) {
		t.Helper()
		why, err := s.DrainWaits(t.Context(), web, host(1))
		if err != nil || !strings.Contains(why, want) || (why == "") != (want == "") {
			t.Errorf("%q, %v; want %q", why, err, want)
		}
	}
	waits("")
	join(t, s, host(1), "t1")
	tell(t, s, "lb0", sees{2, []int{1, 2}})
	waits("")
	tell(t, s, "lb1", sees{1, []int{1}})
	waits("lb1 sends requests to no other server of be")
	_, err := s.Publish(t.Context(), "lb1", web, Seen{Up: map[string]int{"be": 3}, Servers: map[netip.AddrPort]map[string]ServerState{
		host(1): {"be": {State: "ready", Weight: 1, Note: NoteWaits, Why: "too few"}}}})
	must(t, err)
	waits("too few, says lb1 of be")
	s.setClock(t0 + time.Minute.Milliseconds())
	waits("")
}
