package lbsync_test

import (
	"errors"
	"fmt"
	"testing"

	"rollcall/lbsync"
	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
)

// TestSecondIsNotHeard has another process acknowledge as this balancer first: what
// this one has applied, and what its HAProxy has, is not written; when it was this one
// that was first, all of it is written anew.
func TestSecondIsNotHeard(t *testing.T) {
	t.Parallel()
	w := newWorld(t, haproxytest.Backend{Name: "be", Slots: 3}, "")
	rdb, ctx := w.redis.Client(t), t.Context()
	i := haproxytest.NewInstance(t)
	w.beat(t, i.Addr(), 100)
	snap, err := w.store.Read(ctx, "web", nil)
	if err != nil {
		t.Fatal(err)
	}
	seen := w.store.Keys().Seen("web", "test")
	for _, tt := range []struct {
		name  string
		first bool // this one is
		want  registrar.Double
	}{{"second", false, registrar.Second}, {"first", true, registrar.First}} {
		if err := rdb.Del(ctx, w.store.Keys().Owners(), seen).Err(); err != nil {
			t.Fatal(err)
		}
		s, err := lbsync.New(w.cfg, w.client(t), w.store, w.log)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Once(ctx); err != nil {
			t.Fatal(err)
		}
		if err := s.Publish(ctx); err != nil {
			t.Fatal(err)
		}
		other := w.store.Acker("test")
		this := func() error { return s.Acknowledge(ctx, true) }
		that := func() error { return other.Ack(ctx, "web", snap.Token) }
		early, late := that, this
		if tt.first {
			early, late = this, that
		}
		if err := early(); err != nil {
			t.Fatal(err)
		}
		begun := rdb.Time(ctx).Val().UnixMilli()
		haproxytest.Poll(t, "the next millisecond", func() error {
			if rdb.Time(ctx).Val().UnixMilli() == begun {
				return errors.New("not yet")
			}
			return nil
		})
		for range 2 {
			if err := errors.Join(late(), early()); err != nil {
				t.Fatal(err)
			}
		}
		if err := late(); tt.first != errors.Is(err, registrar.ErrDouble) {
			t.Errorf("%s: %v", tt.name, err)
		}
		if got := s.Status().Double; got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
		if err := rdb.HSet(ctx, seen, i.Addr().String(), "the other's").Err(); err != nil {
			t.Fatal(err)
		}
		if err := s.Publish(ctx); err != nil {
			t.Fatal(err)
		}
		if kept := rdb.HGet(ctx, seen, i.Addr().String()).Val() == "the other's"; kept == tt.first {
			t.Errorf("%s: what the other's HAProxy has is kept: %v", tt.name, kept)
		}
	}
}

// TestFormerIsForgotten has the register forget services that a balancer no longer
// has, and balancers that have become this one: not before their processes count as
// dead, and nothing of this one.
func TestFormerIsForgotten(t *testing.T) {
	t.Parallel()
	w := newWorld(t, haproxytest.Backend{Name: "be", Slots: 3}, "")
	rdb, ctx, k := w.redis.Client(t), t.Context(), w.store.Keys()
	snap, err := w.store.Read(ctx, "web", nil)
	if err != nil {
		t.Fatal(err)
	}
	for id, svc := range map[string]registrar.Service{"test": "old", "lb0": "web"} {
		for _, err := range []error{w.store.Acker(id).Ack(ctx, svc, snap.Token), rdb.HSet(ctx, k.Seen(svc, id), "at", 1).Err()} {
			if err != nil && !errors.Is(err, registrar.ErrOtherHistory) {
				t.Fatal(err)
			}
		}
	}
	w.beat(t, haproxytest.NewInstance(t).Addr(), 100)
	forgotten := make(chan struct{}, 2)
	w.cfg.Former = []lbsync.Former{{ID: "test", Services: []registrar.Service{"old"}}, {ID: "lb0", Services: []registrar.Service{"web"}}}
	w.cfg.Retired = func() { forgotten <- struct{}{} }
	s, err := lbsync.New(w.cfg, w.client(t), w.store, w.log)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Once(ctx); err != nil {
		t.Fatal(err)
	}
	left := func(when, want string) {
		t.Helper()
		if err := s.Acknowledge(ctx, true); err != nil {
			t.Error(err)
		}
		got := fmt.Sprint(rdb.HKeys(ctx, k.Applied("old")).Val(), rdb.Exists(ctx, k.Seen("old", "test")).Val(), rdb.HKeys(ctx, k.Applied("web")).Val(),
			rdb.Exists(ctx, k.Seen("web", "lb0")).Val(), rdb.ZRange(ctx, k.Balancers(), 0, -1).Val(), len(forgotten))
		if got != want {
			t.Errorf("%s: left %s, want %s", when, got, want)
		}
	}
	left("alive", "[] 0 [lb0 test] 1 [lb0 test] 0")
	if err := rdb.HSet(ctx, k.Owners(), "lb0", "P 1 1 0").Err(); err != nil { // it has been silent for long
		t.Fatal(err)
	}
	left("silent", "[] 0 [test] 0 [test] 1")
	left("again", "[] 0 [test] 0 [test] 1")
	if err := s.Retire(ctx); err != nil {
		t.Error(err)
	}
	if n := rdb.Exists(ctx, k.Applied("web"), k.Balancers(), k.Owners()).Val(); n != 0 {
		t.Errorf("after its end %d keys are left", n)
	}
}
