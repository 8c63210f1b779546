package registrar

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"rollcall/registrar/redistest"
)

// TestLease: one holds it, renews it and gives it up; another one waits until it is
// nobody's, and is not robbed either.
func TestLease(t *testing.T) {
	srv := redistest.Start(t)
	s := production(t, srv)
	ctx := t.Context()
	must(t, s.rdb.HSet(ctx, s.keys.Config(), "ttl_ms", 180_000, "interval_ms", 60_000).Err())
	keep := func(holder string, take bool, want bool) Lease {
		t.Helper()
		l, err := s.KeepLease(ctx, "e", holder, take)
		must(t, err)
		if l.Held != want {
			t.Errorf("%s, take %v: %+v, want held %v", holder, take, l, want)
		}
		return l
	}
	if l := keep("a", false, false); l.Left != 0 {
		t.Errorf("nobody's: %+v", l)
	}
	if l := keep("a", true, true); l.Length != leaseMost || l.Left != leaseMost {
		t.Errorf("it is %+v", l)
	}
	if l := keep("b", true, false); l.Left <= 0 || l.Left > leaseMost {
		t.Errorf("another's: %+v", l)
	}
	keep("a", false, true)
	must(t, s.EndLease(ctx, "e", "b")) // which has none
	keep("a", true, true)
	must(t, s.EndLease(ctx, "e", "a"))
	eventually(t, func() error {
		l, err := s.KeepLease(ctx, "e", "b", true)
		if err == nil && !l.Held {
			err = fmt.Errorf("%+v", l)
		}
		return err
	})
	keep("a", false, false) // the one before finds that it is another's
	// By itself it ends too, after half of an interval.
	must(t, s.rdb.HSet(ctx, s.keys.Config(), "interval_ms", 200).Err())
	if l := keep("b", false, true); l.Length != 100*time.Millisecond {
		t.Errorf("half of 200 ms is %v", l.Length)
	}
	eventually(t, func() error {
		l, err := s.KeepLease(ctx, "e", "a", true)
		if err == nil && !l.Held {
			err = fmt.Errorf("%+v", l)
		}
		return err
	})
}

// TestLedger adds and takes off more than one call does, and finds what the register
// has there.
func TestLedger(t *testing.T) {
	srv := redistest.Start(t)
	s := production(t, srv)
	ctx := t.Context()
	var all []Place
	for i := range 2*ledgerPart + 1 {
		all = append(all, Place{Service: "web", Addr: host(i)})
	}
	must(t, s.WriteLedger(ctx, "m", all, nil))
	must(t, s.WriteLedger(ctx, "m", []Place{{"api", host(1)}}, all[3:]))
	must(t, s.rdb.SAdd(ctx, s.keys.DockerAddrs("m"), "x", "web 1.2.3.4").Err())
	got, err := s.Ledger(ctx, "m")
	must(t, err)
	slices.SortFunc(got, func(a, b Place) int { return slices.Compare([]byte(a.String()), []byte(b.String())) })
	want := append([]Place{{"api", host(1)}}, all[:3]...)
	slices.SortFunc(want, func(a, b Place) int { return slices.Compare([]byte(a.String()), []byte(b.String())) })
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if left := s.rdb.PTTL(ctx, s.keys.DockerAddrs("m")).Val(); left <= ledgerKept-time.Minute || left > ledgerKept {
		t.Errorf("it is kept for %v", left)
	}
	if other, err := s.Ledger(ctx, "o"); err != nil || len(other) > 0 {
		t.Errorf("another's: %v, %v", other, err)
	}

	_, err = s.Beat(ctx, web, Beat{Addr: host(0), Token: "t", Meta: `{"id":"t","weight":1,"agent":"m"}`})
	must(t, err)
	must(t, s.rdb.Set(ctx, s.keys.Meta("api"), "no hash", 0).Err())
	// Metadata without an instance is none.
	must(t, s.rdb.HSet(ctx, s.keys.Meta(web), host(1).String(), `{"id":"t","agent":"m"}`).Err())
	held, err := s.Held(ctx, append([]Place{{"api", host(1)}}, all...))
	must(t, err)
	if len(held) != len(all)+1 || held[1] != (Held{"t", "m"}) || held[0] != (Held{}) || slices.ContainsFunc(held[2:], func(h Held) bool { return h != Held{} }) {
		t.Errorf("held: %v", held)
	}
	srv.Kill(t)
	if _, err := s.Held(ctx, all[:1]); err == nil || errors.Is(err, ErrDenied) {
		t.Errorf("without a redis: %v", err)
	}
}

// TestAgentDenied tells a refusal for want of rights from everything else.
func TestAgentDenied(t *testing.T) {
	srv := redistest.Start(t)
	s := production(t, srv)
	must(t, srv.Client(t).Do(t.Context(), "ACL", "SETUSER", "default", "-smembers", "-sadd", "-set", "-hget").Err())
	_, ledger := s.Ledger(t.Context(), "m")
	_, lease := s.KeepLease(t.Context(), "e", "a", true)
	_, held := s.Held(t.Context(), []Place{{web, host(1)}})
	for what, err := range map[string]error{
		"ledger": ledger, "lease": lease, "held": held, "write": s.WriteLedger(t.Context(), "m", []Place{{web, host(1)}}, nil),
	} {
		if !errors.Is(err, ErrDenied) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestClusterAgent: a lease and a ledger have their places in a Cluster too, and what
// services hold is read from wherever they are.
func TestClusterAgent(t *testing.T) {
	t.Parallel()
	c := redistest.StartCluster(t, 3)
	s, ctx := newClusterStore(t, c), t.Context()
	if l, err := s.KeepLease(ctx, "e", "a", true); err != nil || !l.Held || l.Length != DefaultInterval/2 {
		t.Errorf("%+v, %v", l, err)
	}
	must(t, s.rdb.HSet(ctx, s.keys.Config(), "interval_ms", 1000).Err())
	if l, err := s.KeepLease(ctx, "e", "a", false); err != nil || !l.Held || l.Length != 500*time.Millisecond {
		t.Errorf("%+v, %v", l, err)
	}
	must(t, s.EndLease(ctx, "e", "a"))
	var places []Place
	for i, of := range onEach(t, c) {
		token := fmt.Sprint("t", i)
		_, err := s.Beat(ctx, of[0], Beat{Addr: host(i), Token: token, Meta: `{"id":"` + token + `","weight":1,"agent":"m"}`})
		must(t, err)
		places = append(places, Place{of[0], host(i)})
	}
	must(t, s.WriteLedger(ctx, "m", places, nil))
	if got, err := s.Ledger(ctx, "m"); err != nil || len(got) != len(places) {
		t.Errorf("%v, %v", got, err)
	}
	held, err := s.Held(ctx, places)
	must(t, err)
	for i, h := range held {
		if want := (Held{fmt.Sprint("t", i), "m"}); h != want {
			t.Errorf("%s: %+v, want %+v", places[i], h, want)
		}
	}
}
