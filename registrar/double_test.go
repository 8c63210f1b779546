package registrar

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"rollcall/registrar/redistest"
)

// acking is one process that acknowledges as lb at times that a test says.
type acking struct {
	*Acker
	store *Store
}

// at acknowledges the state of now, ms after t0.
func (a acking) at(tb testing.TB, ms int64) error {
	tb.Helper()
	a.store.setClock(t0 + ms)
	return a.Ack(tb.Context(), web, token(tb, a.store))
}

// processes are two processes of one id, by the order of their names.
func processes(tb testing.TB, srv *redistest.Server) (s *Store, a, b acking) {
	tb.Helper()
	s = fresh(tb, srv)
	join(tb, s, host(1), "t")
	a, b = acking{s.Acker("lb"), s}, acking{s.Acker("lb"), s}
	a.process, b.process = "A", "B"
	return s, a, b
}

// TestOneProcessAfterAnother has a balancer's process follow one that has ended a
// moment ago: that is no double, also if a word of it arrives late, or if Redis comes
// back with one.
func TestOneProcessAfterAnother(t *testing.T) {
	srv := redistest.Start(t)
	for _, tt := range []struct {
		name string
		late func(*testing.T, *Store, acking)
	}{
		{"killed", func(*testing.T, *Store, acking) {}},
		{"killed, with a word under way", func(t *testing.T, _ *Store, a acking) { must(t, a.at(t, 15)) }},
		{"older data", func(t *testing.T, s *Store, _ acking) {
			do(t, s, "HSET", s.keys.Owners(), "lb", fmt.Sprintf("A %d %d 0", t0, t0))
		}},
		{"garbage", func(t *testing.T, s *Store, _ acking) { do(t, s, "HSET", s.keys.Owners(), "lb", "A") }},
		{"lost data", func(t *testing.T, s *Store, _ acking) { do(t, s, "DEL", s.keys.Owners()) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, a, b := processes(t, srv)
			must(t, a.at(t, 0))
			for i := range int64(20) {
				if err := b.at(t, 10+i*4000); err != nil || b.Double(web) != Sole {
					t.Fatalf("word %d of the second process: %v, %v", i, err, b.Double(web))
				}
				if i == 0 {
					tt.late(t, s, a)
				}
			}
			acks, err := s.Acks(t.Context(), web)
			must(t, err)
			if want := []Balancer{{ID: "lb", Applied: 1, Seen: s.clock(), Live: true}}; !slices.Equal(acks.Balancers, want) {
				t.Errorf("got %+v, want %+v", acks.Balancers, want)
			}
		})
	}
	// Two late words, far apart, are two deaths and not one double.
	_, a, b := processes(t, srv)
	must(t, errors.Join(a.at(t, 0), b.at(t, 10), a.at(t, 20), b.at(t, 30)))
	c := acking{b.store.Acker("lb"), b.store}
	must(t, errors.Join(b.at(t, 60_000), c.at(t, 60_010), b.at(t, 60_020)))
	if err := c.at(t, 60_030); err != nil || c.Double(web) != Sole {
		t.Errorf("%v, %v", err, c.Double(web))
	}
}

// TestTwoProcesses has two acknowledge as one balancer: both hear of it, the one that
// began later has no say until the other is silent, and nobody takes its HAProxy for
// one that has applied something.
func TestTwoProcesses(t *testing.T) {
	srv := redistest.Start(t)
	for _, later := range []int64{1000, 0} { // began later, or in the same millisecond
		t.Run(fmt.Sprintf("%d ms later", later), func(t *testing.T) {
			s, a, b := processes(t, srv)
			must(t, errors.Join(a.at(t, 0), b.at(t, later), a.at(t, 5000), b.at(t, 6000)))
			if err := a.at(t, 10_000); err != nil || a.Double(web) != First {
				t.Fatalf("the first: %v, %v", err, a.Double(web))
			}
			join(t, s, host(2), "t2")
			if err := b.at(t, 11_000); !errors.Is(err, ErrDouble) || b.Double(web) != Second {
				t.Fatalf("the second: %v, %v", err, b.Double(web))
			}
			acks, err := s.Acks(t.Context(), web)
			must(t, err)
			if want := []Balancer{{"lb", 1, t0 + 10_000, true, true}}; !slices.Equal(acks.Balancers, want) {
				t.Errorf("got %+v, want %+v", acks.Balancers, want)
			}
			if err := a.at(t, 15_000); err != nil || a.Double(web) != First {
				t.Errorf("the first goes on: %v, %v", err, a.Double(web))
			}
			acks, err = s.Acks(t.Context(), web)
			must(t, err)
			if behind, live := acks.Behind(2); behind != 1 || live != 1 {
				t.Errorf("%d of %d are behind: %+v", behind, live, acks.Balancers)
			}

			// The first is silent.
			if err := b.at(t, 16_000); !errors.Is(err, ErrDouble) {
				t.Errorf("the first is live: %v", err)
			}
			edge := 15_000 + BalancerLive.Milliseconds()
			if err := b.at(t, edge); !errors.Is(err, ErrDouble) {
				t.Errorf("the first is still live: %v", err)
			}
			if err := b.at(t, edge+1); err != nil || b.Double(web) != Sole {
				t.Errorf("alone: %v, %v", err, b.Double(web))
			}
			acks, err = s.Acks(t.Context(), web)
			must(t, err)
			if behind, live := acks.Behind(2); behind != 0 || live != 1 {
				t.Errorf("%d of %d are behind: %+v", behind, live, acks.Balancers)
			}
		})
	}
	t.Run("the second ends", func(t *testing.T) {
		_, a, b := processes(t, srv)
		must(t, errors.Join(a.at(t, 0), b.at(t, 1000), a.at(t, 2000), b.at(t, 3000), a.at(t, 4000)))
		if err := b.at(t, 5000); !errors.Is(err, ErrDouble) {
			t.Fatal(err)
		}
		edge := 5000 + BalancerLive.Milliseconds()
		if err := a.at(t, edge); err != nil || a.Double(web) != First {
			t.Errorf("%v, %v", err, a.Double(web))
		}
		if err := a.at(t, edge+1); err != nil || a.Double(web) != Sole {
			t.Errorf("%v, %v", err, a.Double(web))
		}
	})
	t.Run("the first is followed", func(t *testing.T) { // by one that is later than the second
		_, a, b := processes(t, srv)
		must(t, errors.Join(a.at(t, 0), b.at(t, 1000), a.at(t, 2000), b.at(t, 3000), a.at(t, 4000)))
		if err := b.at(t, 5000); !errors.Is(err, ErrDouble) {
			t.Fatal(err)
		}
		c := acking{b.store.Acker("lb"), b.store}
		must(t, c.at(t, 6000))
		must(t, b.at(t, 7000))
		must(t, c.at(t, 8000))
		if err := b.at(t, 9000); err != nil || b.Double(web) != First {
			t.Errorf("%v, %v", err, b.Double(web))
		}
		if err := c.at(t, 10_000); !errors.Is(err, ErrDouble) {
			t.Errorf("%v", err)
		}
	})
}

// TestDoubleIsNotApplied has a wait say why it cannot end.
func TestDoubleIsNotApplied(t *testing.T) {
	s, a, _ := processes(t, redistest.Start(t))
	must(t, a.at(t, 0))
	do(t, s, "HSET", s.keys.Owners(), "lb", fmt.Sprintf("A %d %d %d", t0, t0, t0))
	ctx, cancel := WithTimeout(t.Context())
	defer cancel()
	looks := 0
	live, err := s.WaitApplied(ctx, web, 1, func() error {
		if looks++; looks > 2 {
			cancel()
		}
		return nil
	})
	if live != 1 || err == nil || !strings.Contains(err.Error(), "as lb: give one of them another --id") {
		t.Errorf("%d, %v", live, err)
	}
}

// TestOwnerIsForgotten has the owner of an id go with its balancer.
func TestOwnerIsForgotten(t *testing.T) {
	s, a, _ := processes(t, redistest.Start(t))
	must(t, a.at(t, 0))
	s.setClock(t0 + balancerForget.Milliseconds())
	must(t, s.Acker("other").Ack(t.Context(), web, token(t, s)))
	if ids := do(t, s, "HKEYS", s.keys.Owners()); !slices.Equal(ids.([]any), []any{"other"}) {
		t.Errorf("remembered: %v", ids)
	}
}

// TestRetire has a balancer forgotten: of one service, or whole; and not while
// another process uses its id.
func TestRetire(t *testing.T) {
	srv := redistest.Start(t)
	ctx := t.Context()
	of := func(s *Store) []any {
		return []any{
			do(t, s, "HVALS", s.keys.Applied(web)), do(t, s, "EXISTS", s.keys.Seen(web, "lb")),
			do(t, s, "ZCARD", s.keys.Balancers()), do(t, s, "HLEN", s.keys.Owners()),
		}
	}
	look := func(s *Store) {
		_, err := s.Publish(ctx, "lb", web, Seen{Anew: true})
		must(t, err)
	}
	for _, tt := range []struct {
		name  string
		by    func(a, b acking) acking
		at    int64
		whole bool
		err   error
		want  string
	}{
		{"one service", func(a, _ acking) acking { return a }, 0, false, nil, "[[] 0 1 1]"},
		{"whole", func(a, _ acking) acking { return a }, 0, true, nil, "[[] 0 0 0]"},
		{"another's", func(_, b acking) acking { return b }, BalancerLive.Milliseconds(), true, ErrDouble, "[[1] 1 1 1]"},
		{"another's, who is silent", func(_, b acking) acking { return b }, BalancerLive.Milliseconds() + 1, true, nil, "[[] 0 0 0]"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, a, b := processes(t, srv)
			must(t, a.at(t, 0))
			look(s)
			s.setClock(t0 + tt.at)
			if err := tt.by(a, b).Retire(ctx, web, tt.whole); !errors.Is(err, tt.err) {
				t.Errorf("got %v", err)
			}
			if got := fmt.Sprint(of(s)); got != tt.want {
				t.Errorf("left %s, want %s", got, tt.want)
			}
		})
	}
	t.Run("wrong type", func(t *testing.T) {
		for _, key := range []func(Keys) string{Keys.Balancers, Keys.Owners} {
			s, a, _ := processes(t, srv)
			must(t, a.at(t, 0))
			look(s)
			do(t, s, "DEL", key(s.keys))
			do(t, s, "SET", key(s.keys), "x")
			if err := a.Retire(ctx, web, true); err == nil {
				t.Error("accepted")
			}
			if n := do(t, s, "EXISTS", s.keys.Seen(web, "lb"), s.keys.Applied(web)); n != int64(2) {
				t.Error("written before it was refused")
			}
		}
	})
}

func TestCheckBalancerID(t *testing.T) {
	for id, good := range map[string]bool{
		"lb1": true, "a.B-c_d:9": true, strings.Repeat("x", MaxBalancerID): true,
		"": false, "a b": false, "a\n": false, "a{b}": false, "a*": false, "ü": false, strings.Repeat("x", MaxBalancerID+1): false,
	} {
		if err := CheckBalancerID(id); (err == nil) != good {
			t.Errorf("%q: %v", id, err)
		}
	}
}
