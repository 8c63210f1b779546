package registrar

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"rollcall/registrar/redistest"
)

// bulkOf prepares w about hosts.
func bulkOf(tb testing.TB, s *Store, w Word, hosts ...int) *Bulk {
	tb.Helper()
	var addrs []netip.AddrPort
	for _, n := range hosts {
		addrs = append(addrs, host(n))
	}
	b, err := s.Bulk(tb.Context(), readFrom(tb, s, nil), addrs, w)
	must(tb, err)
	return b
}

// serve has a balancer lb0 say that hosts serve in the backend be, with own servers of
// the operator's.
func serve(tb testing.TB, s *Store, own int, hosts ...int) {
	tb.Helper()
	v, err := s.Versions(tb.Context(), []Service{web})
	must(tb, err)
	must(tb, s.Acker("lb0").Ack(tb.Context(), web, v.Token(web)))
	seen := Seen{Anew: true, Up: map[string]int{"be": own + len(hosts)}, Servers: map[netip.AddrPort]map[string]ServerState{}}
	for _, n := range hosts {
		seen.Servers[host(n)] = map[string]ServerState{"be": {State: "ready", Weight: 100}}
	}
	_, err = s.Publish(tb.Context(), "lb0", web, seen)
	must(tb, err)
}

// outcomes counts what became of a bulk.
func outcomes(all []Written) (ok, last int, others []error) {
	for _, o := range all {
		switch {
		case o.Err == nil:
			ok++
		case errors.Is(o.Err, ErrLast):
			last++
		default:
			others = append(others, o.Err)
		}
	}
	return ok, last, others
}

// TestBulkLast holds which words about many would leave nobody that serves.
func TestBulkLast(t *testing.T) {
	srv := redistest.Start(t)
	zero, ten := 0, 10
	drain, maint := Word{Verb: "drain"}, Word{Verb: "maint"}
	for _, c := range []struct {
		name    string
		own     int   // servers of the operator's that serve
		serving []int // of hosts 1 to 4
		said    map[int]Word
		word    Word
		hosts   []int
		refused bool
	}{
		{"a half", 0, []int{1, 2, 3, 4}, nil, drain, []int{1, 2}, false},
		{"all", 0, []int{1, 2, 3, 4}, nil, drain, []int{1, 2, 3, 4}, true},
		{"all, by maint", 0, []int{1, 2, 3, 4}, nil, maint, []int{1, 2, 3, 4}, true},
		{"all, by a weight of 0", 0, []int{1, 2, 3, 4}, nil, Word{Verb: "weight", Weight: &zero}, []int{1, 2, 3, 4}, true},
		{"another weight of all", 0, []int{1, 2, 3, 4}, nil, Word{Verb: "weight", Weight: &ten}, []int{1, 2, 3, 4}, false},
		{"ready of all", 0, []int{1, 2, 3, 4}, nil, Word{Verb: "ready"}, []int{1, 2, 3, 4}, false},
		{"all, and another server serves", 1, []int{1, 2, 3, 4}, nil, maint, []int{1, 2, 3, 4}, false},
		{"all that serve", 0, []int{1, 2}, nil, drain, []int{1, 2}, true},
		{"those that do not serve", 0, []int{1, 2}, nil, maint, []int{3, 4}, false},
		{"nobody serves before", 0, nil, nil, maint, []int{1, 2, 3, 4}, false},
		{"the others are to go, and serve still", 0, []int{1, 2, 3, 4}, map[int]Word{3: drain, 4: {Verb: "maint", Force: true}}, drain, []int{1, 2}, true},
		{"all go already", 0, []int{1, 2}, map[int]Word{1: drain, 2: drain}, drain, []int{1, 2}, false},
		{"maint of those whose drain waits", 0, []int{1, 2}, map[int]Word{1: drain, 2: drain}, maint, []int{1, 2}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			for n := 1; n <= 4; n++ {
				join(t, s, host(n), fmt.Sprint("t", n))
			}
			for n, w := range c.said {
				say(t, s, host(n), w)
			}
			serve(t, s, c.own, c.serving...)
			before := readFrom(t, s, nil).Token
			b := bulkOf(t, s, c.word, c.hosts...)
			if err := b.Last(); errors.Is(err, ErrLast) != c.refused || err != nil && err.Error() != "it would leave nobody that serves: lb0 sends requests to no other server of be" {
				t.Errorf("got %v, want a refusal: %v", err, c.refused)
			}
			ok, last, others := outcomes(b.Write(t.Context()))
			if len(others) > 0 || (last > 0) != c.refused || ok+last != len(c.hosts) {
				t.Errorf("%d written, %d refused, %v", ok, last, others)
			}
			if after := readFrom(t, s, nil).Token; c.refused && ok == 0 && after != before {
				t.Errorf("version %d, %d before", after.Version, before.Version)
			}
			if !c.refused {
				return
			}
			c.word.Force = true
			ok, last, others = outcomes(bulkOf(t, s, c.word, c.hosts...).Write(t.Context()))
			if ok != len(c.hosts) {
				t.Errorf("forced: %d written, %d refused, %v", ok, last, others)
			}
		})
	}
}

// TestBulkWrites has a word about more instances than one exchange has, some of which
// stand already and one of which has gone, on a Redis that does not know the script.
func TestBulkWrites(t *testing.T) {
	s, _ := newStore(t)
	s.setClock(t0)
	const n = 2*bulkChunk + 50
	var hosts []int
	for i := 1; i <= n+1; i++ {
		join(t, s, host(i), fmt.Sprint("t", i))
		if i <= n {
			hosts = append(hosts, i)
		}
	}
	serve(t, s, 0, append(slices.Clone(hosts), n+1)...)
	for i := 10; i <= 20; i++ {
		say(t, s, host(i), Word{Verb: "drain", Reason: "disk", By: "alice"})
	}
	b := bulkOf(t, s, Word{Verb: "drain", Reason: "disk", By: "alice", Known: true}, hosts...)
	leave(t, s, host(150), "t150")
	do(t, s, "SCRIPT", "FLUSH")
	exchanges := 0
	s.rdb.(*redis.Client).AddHook(aheadOfMany{"drain", func(context.Context) error { exchanges++; return nil }})
	all := b.Write(t.Context())
	if exchanges > 8 { // 3 are enough; the lost script costs one, and each of the two surprises two
		t.Errorf("%d exchanges", exchanges)
	}
	if len(all) != n {
		t.Fatalf("%d of %d", len(all), n)
	}
	for i, o := range all {
		switch {
		case o.Addr != host(i+1):
			t.Errorf("%s at the place of %s", o.Addr, host(i+1))
		case i+1 == 150:
			if !errors.Is(o.Err, ErrAbsent) {
				t.Errorf("the one that has gone: %+v", o)
			}
		case o.Err != nil || !o.Present || o.Version == 0 || o.Scope != ScopeAddress:
			t.Errorf("%+v", o)
		}
	}
	for _, e := range readFrom(t, s, nil).Entries {
		if want := e.Addr != host(n+1) && e.Addr != host(150); e.Present && (e.Instance.Admin.State == AdminDrain && e.Instance.Admin.By == "alice") != want {
			t.Errorf("%s: %s", e.Addr, text1(e.Instance.Admin))
		}
	}
	version := readFrom(t, s, nil).Token.Version
	// Said once more it changes nothing; for a time, it says until when.
	bulkOf(t, s, Word{Verb: "drain", Reason: "disk", By: "bob"}, hosts[:100]...).Write(t.Context())
	if v := readFrom(t, s, nil).Token.Version; v != version {
		t.Errorf("version %d after %d", v, version)
	}
	for _, o := range bulkOf(t, s, Word{Verb: "drain", For: time.Hour, Scope: ScopeRegistration}, 1, 2).Write(t.Context()) {
		if o.Err != nil || o.Until != t0+3600_000 || o.Scope != ScopeRegistration {
			t.Errorf("%+v", o)
		}
	}
	if _, err := s.Bulk(t.Context(), readFrom(t, s, nil), nil, Word{Verb: "drain", By: "a\nb"}); err == nil {
		t.Error("two lines of a name were accepted")
	}
}

// TestBulkOfTwoOperators has two operators take out a half each at the same time, over
// and over: never is nobody left.
func TestBulkOfTwoOperators(t *testing.T) {
	s, _ := newStore(t)
	const half = bulkChunk + 20
	var hosts []int
	for i := range 2 * half {
		join(t, s, host(i+1), fmt.Sprint("t", i))
		hosts = append(hosts, i+1)
	}
	for round := range 10 {
		serve(t, s, 0, hosts...)
		bulks := []*Bulk{bulkOf(t, s, Word{Verb: "maint"}, hosts[:half]...), bulkOf(t, s, Word{Verb: "maint"}, hosts[half:]...)}
		var all [2][]Written
		var operators sync.WaitGroup
		for i, b := range bulks {
			if err := b.Last(); err != nil {
				t.Fatal(err)
			}
			operators.Go(func() { all[i] = b.Write(t.Context()) })
		}
		operators.Wait()
		ok, last, others := outcomes(slices.Concat(all[0], all[1]))
		if last == 0 || ok == 0 || len(others) > 0 {
			t.Fatalf("round %d: %d written, %d refused, %v", round, ok, last, others)
		}
		left := 0
		for _, e := range readFrom(t, s, nil).Entries {
			if e.Instance.State() == AdminNone {
				left++
			}
		}
		if left != last {
			t.Errorf("round %d: %d are left, %d were refused", round, left, last)
		}
		bulkOf(t, s, Word{Verb: "ready"}, hosts...).Write(t.Context())
	}
}

// aheadOfMany does something before each pipeline of a verb.
type aheadOfMany struct {
	verb string
	do   func(context.Context) error
}

func (a aheadOfMany) DialHook(next redis.DialHook) redis.DialHook          { return next }
func (a aheadOfMany) ProcessHook(next redis.ProcessHook) redis.ProcessHook { return next }
func (a aheadOfMany) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		if strings.Contains(fmt.Sprint(cmds[0].Args()...), a.verb) {
			if err := a.do(ctx); err != nil {
				return err
			}
		}
		return next(ctx, cmds)
	}
}

// TestBulkInARestlessService: while the service changes between each look and the write
// nothing is written, and after a time that is said.
func TestBulkInARestlessService(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	for n := 1; n <= 3; n++ {
		join(t, s, host(n), fmt.Sprint("t", n))
	}
	serve(t, s, 0, 1, 2, 3)
	other, changes, restless := srv.Client(t), 0, 3
	s.rdb.(*redis.Client).AddHook(aheadOfMany{"maint", func(ctx context.Context) error {
		if changes++; changes > restless {
			return nil
		}
		return other.Incr(ctx, s.keys.ServiceVersion(web)).Err()
	}})
	if ok, _, others := outcomes(bulkOf(t, s, Word{Verb: "maint"}, 1).Write(t.Context())); ok != 1 || changes != restless+1 {
		t.Errorf("%d written after %d changes, %v", ok, changes, others)
	}
	changes, restless = 0, 1<<30
	begun, b := time.Now(), bulkOf(t, s, Word{Verb: "maint"}, 2)
	b.timeout = 500 * time.Millisecond
	all := b.Write(t.Context())
	if took := time.Since(begun); !errors.Is(all[0].Err, errRestless) || took < b.timeout || took > 20*b.timeout {
		t.Errorf("after %v: %+v", took, all)
	}
	all = bulkOf(t, s, Word{Verb: "maint", Force: true}, 2).Write(t.Context())
	if all[0].Err != nil {
		t.Errorf("forced: %+v", all)
	}
}

// TestBulkTakesItsTime: as long as it writes, it may take longer than its timeout.
func TestBulkTakesItsTime(t *testing.T) {
	s, _ := newStore(t)
	var hosts []int
	for i := range 4 * bulkChunk {
		join(t, s, host(i+1), fmt.Sprint("t", i))
		hosts = append(hosts, i+1)
	}
	serve(t, s, 1, hosts...)
	b := bulkOf(t, s, Word{Verb: "maint"}, hosts...)
	b.timeout = time.Second
	s.rdb.(*redis.Client).AddHook(aheadOfMany{"maint", func(ctx context.Context) error {
		slow, cancel := context.WithTimeout(ctx, 400*time.Millisecond)
		defer cancel()
		<-slow.Done()
		return ctx.Err()
	}})
	if ok, last, others := outcomes(b.Write(t.Context())); ok != len(hosts) {
		t.Errorf("%d written, %d refused, %v", ok, last, others)
	}
}

// TestBulkLooksAgain: what balancers say of those that stay is not relied on for longer
// than half a second.
func TestBulkLooksAgain(t *testing.T) {
	s, _ := newStore(t)
	for n := 1; n <= 2; n++ {
		join(t, s, host(n), fmt.Sprint("t", n))
	}
	serve(t, s, 0, 1, 2)
	b := bulkOf(t, s, Word{Verb: "drain"}, 1)
	serve(t, s, 0, 1) // the other's check is down
	b.looked = b.looked.Add(-bulkAge)
	if _, last, others := outcomes(b.Write(t.Context())); last != 1 {
		t.Errorf("%d refused, %v", last, others)
	}
}

// TestBulkWithoutRedis ends with an error of each that is not written.
func TestBulkWithoutRedis(t *testing.T) {
	s, srv := newStore(t)
	join(t, s, host(1), "t1")
	b := bulkOf(t, s, Word{Verb: "drain"}, 1)
	srv.Kill(t)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if all := b.Write(ctx); len(all) != 1 || all[0].Err == nil || all[0].Addr != host(1) {
		t.Errorf("%+v", all)
	}
}

// TestBulkIsAnnounced: what is written in a pause between two announcements is said when
// the pause is over.
func TestBulkIsAnnounced(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	join(t, s, host(1), "t1")
	join(t, s, host(2), "t2")
	b := bulkOf(t, s, Word{Verb: "drain"}, 1, 2)
	l := listen(t, s)
	listeners(t, srv, s, 400)
	do(t, s, "SET", s.keys.Quiet(), "", "PX", 100)
	if ok, _, others := outcomes(b.Write(t.Context())); ok != 2 {
		t.Fatal(others)
	}
	if got := l.heard(t); !slices.Equal(got, []string{"4 web 4"}) {
		t.Errorf("said %q", got)
	}
}
