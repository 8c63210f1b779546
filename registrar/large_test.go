package registrar

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"rollcall/registrar/redistest"
)

// crowded fills web with n instances that beat now and were registered one after the
// other, each with so many bytes of metadata.
func crowded(tb testing.TB, s *Store, n, bytes int) {
	tb.Helper()
	const at = 1000
	for from := 0; from < n; from += at {
		meta, scores := []any{"HSET", s.keys.Meta(web)}, []any{"ZADD", s.keys.Instances(web)}
		for i := from; i < min(from+at, n); i++ {
			m := fmt.Sprintf(`{"id":"t%d","weight":7,"registered":%d,"zone":"`, i, t0+int64(i))
			m += strings.Repeat("z", max(0, bytes-len(m)-2)) + `"}`
			meta, scores = append(meta, host(i).String(), m), append(scores, s.clock(), host(i).String())
		}
		do(tb, s, meta...)
		do(tb, s, scores...)
	}
}

func byAddr(snap *Snapshot) {
	slices.SortFunc(snap.Entries, func(a, b Entry) int { return a.Addr.Compare(b.Addr) })
	slices.Sort(snap.Garbage)
}

// TestReadLarge reads a service in many calls and in one: both find the same.
func TestReadLarge(t *testing.T) {
	s := fresh(t, redistest.Start(t))
	crowded(t, s, 3000, 0)
	join(t, s, host(1), "t")
	join(t, s, host(3001), "t")
	leave(t, s, host(3001), "t")
	say(t, s, host(2), Word{Verb: "drain"})
	say(t, s, host(9000), Word{Verb: "drain"}) // nobody is there
	do(t, s, "ZADD", s.keys.Instances(web), t0, "x", t0, strings.Repeat("y", MaxMeta+1))
	do(t, s, "HSET", s.keys.Meta(web), host(3).String(), strings.Repeat("y", MaxMeta+1), host(4).String(), "{", "nobody", "x")
	do(t, s, "HSET", s.keys.Gone(web), host(3002).String(), "x")
	want, err := s.readOnce(t.Context(), web, nil, ReadLimit)
	must(t, err)
	if _, err := s.readOnce(t.Context(), web, nil, scanCount); !errors.Is(err, ErrLarge) {
		t.Fatalf("it is not large: %v", err)
	}
	if _, err := s.ReadChange(t.Context(), web, Token{}); !errors.Is(err, ErrLarge) {
		t.Errorf("of another history: %v", err)
	}
	got, err := s.Read(t.Context(), web, nil)
	must(t, err)
	got.Now = want.Now
	byAddr(&want)
	byAddr(&got)
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%d and %d entries, garbage %.40q and %.40q", len(got.Entries), len(want.Entries), got.Garbage, want.Garbage)
		for i := range min(len(got.Entries), len(want.Entries)) {
			if !reflect.DeepEqual(got.Entries[i], want.Entries[i]) {
				t.Fatalf("got %+v, want %+v", got.Entries[i], want.Entries[i])
			}
		}
	}

	// While it changes: an entry is of the token's version.
	ctx, cancel := context.WithCancel(t.Context())
	var changing sync.WaitGroup
	defer changing.Wait()
	defer cancel()
	base := got.Token.Version
	changing.Go(func() {
		for n := 1; ctx.Err() == nil; n++ {
			_, err := s.Beat(context.WithoutCancel(ctx), web, Beat{Addr: host(1), Token: "t", Meta: fmt.Sprintf(`{"id":"t","weight":1,"registered":%d}`, n), first: true})
			if err != nil {
				t.Error(err)
			}
		}
	})
	for range 20 {
		snap, err := s.Read(t.Context(), web, nil)
		must(t, err)
		i := slices.IndexFunc(snap.Entries, func(e Entry) bool { return e.Addr == host(1) })
		if e := snap.Entries[i]; !snap.Full || len(snap.Entries) != len(want.Entries) || snap.Token.Version > base && e.Instance.Meta.Registered != snap.Token.Version-base {
			t.Fatalf("at version %d+%d: %d entries, %+v", base, snap.Token.Version-base, len(snap.Entries), e)
		}
	}
}

// TestReadBeyondTheLimit writes instances by hand, more than the register lets in: those
// beyond are not served, and each reader agrees who that is.
func TestReadBeyondTheLimit(t *testing.T) {
	s := fresh(t, redistest.Start(t))
	s.setClock(s.rdb.Time(t.Context()).Val().UnixMilli()) // which reads go by
	crowded(t, s, DefaultMaxInstances, 0)
	before, err := s.Read(t.Context(), web, nil)
	must(t, err)
	var more []any
	for n := range 50 {
		more = append(more, s.clock(), fmt.Sprintf("10.0.0.%d:80", n+1)) // before all others
	}
	do(t, s, append([]any{"ZADD", s.keys.Instances(web)}, more...)...)
	do(t, s, "INCR", s.keys.ServiceVersion(web))
	do(t, s, "ZADD", s.keys.Changed(web), 1, "10.0.0.1:80")
	for _, since := range []*Token{nil, &before.Token} {
		snap, err := s.Read(t.Context(), web, since)
		must(t, err)
		served, beyond := 0, 0
		for _, e := range snap.Entries {
			switch by := strings.HasPrefix(e.Addr.String(), "10.0.0."); {
			case e.Present && !by:
				served++
			case by && strings.Contains(e.Garbage, "beyond the limit of 20000 instances"):
				beyond++
			}
		}
		if served != DefaultMaxInstances || beyond != 50 {
			t.Errorf("%d are served and %d beyond the limit", served, beyond)
		}
	}
	if one, err := s.readOnce(t.Context(), web, nil, ReadLimit); err != nil || !slices.ContainsFunc(one.Entries, func(e Entry) bool { return e.Garbage != "" }) {
		t.Errorf("in one call, as with older rights: %d entries, %v", len(one.Entries), err)
	}
	// Who is dead does not count, a limit that is raised does, and one that is lowered
	// takes out nobody.
	do(t, s, "HSET", s.keys.Config(), "max_instances", 1)
	dead := []any{"ZADD", s.keys.Instances(web), "XX"}
	for n := range 50 {
		dead = append(dead, 1, host(n).String())
	}
	do(t, s, dead...)
	check := func() {
		t.Helper()
		snap, err := s.Read(t.Context(), web, nil)
		must(t, err)
		if n := len(snap.Entries); n != DefaultMaxInstances+50 || slices.ContainsFunc(snap.Entries, func(e Entry) bool { return !e.Present }) {
			t.Errorf("%d entries, and not all are served", n)
		}
	}
	check()
	do(t, s, "HSET", s.keys.Config(), "max_instances", DefaultMaxInstances+50)
	do(t, s, append([]any{"ZADD", s.keys.Instances(web), "XX"}, func() (l []any) {
		for n := range 50 {
			l = append(l, s.clock(), host(n).String())
		}
		return l
	}()...)...)
	check()
}

// TestReadHoldsRedis has a service be as large as it may be, and prints how long a call
// of its read holds Redis, and with it everybody else.
func TestReadHoldsRedis(t *testing.T) {
	s := fresh(t, redistest.Start(t))
	crowded(t, s, DefaultMaxInstances, MaxMeta)
	do(t, s, "CONFIG", "SET", "slowlog-log-slower-than", 0)
	do(t, s, "CONFIG", "SET", "slowlog-max-len", 1000)
	do(t, s, "SLOWLOG", "RESET")
	begun := time.Now()
	if _, err := s.Read(t.Context(), web, nil); err != nil {
		t.Fatal(err)
	}
	took := time.Since(begun)
	log, err := s.rdb.SlowLogGet(t.Context(), -1).Result()
	must(t, err)
	longest := time.Duration(0)
	for _, l := range log {
		longest = max(longest, l.Duration)
	}
	t.Logf("%d instances of %d bytes: read in %v and %d calls, of which the longest held Redis for %v", DefaultMaxInstances, MaxMeta, took, len(log), longest)
	if longest > 500*time.Millisecond {
		t.Error("that is as long as all of it in one call")
	}
}
