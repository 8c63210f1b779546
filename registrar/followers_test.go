package registrar

import (
	"reflect"
	"testing"

	"rollcall/registrar/redistest"
)

func TestFollowers(t *testing.T) {
	t.Parallel()
	s := fresh(t, redistest.Start(t))
	ctx := t.Context()
	follows := map[Service][]string{"web": {"be", "be2"}, "never": {"be3"}}
	want := func(list ...Following) {
		t.Helper()
		got, err := s.Followers(ctx)
		if err != nil || !reflect.DeepEqual(got, list) {
			t.Errorf("%+v, %v, want %+v", got, err, list)
		}
	}
	want()
	must(t, s.Acker("lb2").Follow(ctx, map[Service][]string{"web": {"be"}}))
	s.setClock(t0 + 5000)
	must(t, s.Acker("lb1").Follow(ctx, follows))
	one, two := Following{"lb1", follows}, Following{"lb2", map[Service][]string{"web": {"be"}}}
	want(one, two)
	s.setClock(t0 + BalancerLive.Milliseconds() + 1)
	want(one)
	do(t, s, "HSET", s.keys.Follows(), "x", "y", "z", "1 {", "future", "9999999999999 {}", "now", "1700000000000")
	want(one)
	must(t, s.Acker("lb1").Follow(ctx, nil))
	want()
	s.setClock(t0 + balancerForget.Milliseconds() + 1)
	must(t, s.Acker("lb1").Follow(ctx, follows))
	want(one)
	if n := do(t, s, "HLEN", s.keys.Follows()); n != int64(2) { // and one of the future
		t.Errorf("%v are kept", n)
	}
	do(t, s, "DEL", s.keys.Follows())
	do(t, s, "SET", s.keys.Follows(), "x")
	if _, err := s.Followers(ctx); err == nil {
		t.Error("another type is read")
	}

	up := map[string]Standing{"be": {Registered: 2, Serving: 1, Not: map[string]Example{ReasonDown: {1, "10.0.0.1:80", "w", t0}}}, "be2": {Registered: 2}}
	_, err := s.Publish(ctx, "lb1", web, Seen{Counts: up})
	must(t, err)
	_, err = s.Publish(ctx, "lb2", web, Seen{Counts: map[string]Standing{"be": {Registered: 2, Serving: 2}}})
	must(t, err)
	do(t, s, "HSET", s.keys.Seen("api", "lb1"), "counts", "x")
	every := map[Service][]string{"api": {"be"}, web: {"be"}, "none": {"be"}}
	followers := []Following{{"lb1", every}, {"lb2", every}, {"lb3", every}, {"lb4", nil}}
	all, err := s.Standings(ctx, []Service{"api", web, "none"}, followers)
	if want := (map[Service][]BackendStanding{web: {{"lb1", "be", up["be"]}, {"lb1", "be2", up["be2"]}, {"lb2", "be", Standing{Registered: 2, Serving: 2}}}}); err != nil || !reflect.DeepEqual(all, want) {
		t.Errorf("%+v, %v, want %+v", all, err, want)
	}
	do(t, s, "SET", s.keys.Seen("none", "lb1"), "x")
	if _, err := s.Standings(ctx, []Service{"none"}, followers[:1]); err == nil {
		t.Error("another type is read")
	}
}
