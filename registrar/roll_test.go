package registrar

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"

	"rollcall/registrar/redistest"
)

// TestBeatSteady sends one beat between healthy ones of the same and of another
// service: it is steady or Beat's to decide, and they are steady anyway.
func TestBeatSteady(t *testing.T) {
	srv := redistest.Start(t)
	odd := host(7)
	mine := Beat{Addr: odd, Token: "t7", Meta: metaOf("t7")}
	other := Beat{Addr: odd, Token: "t8", Meta: metaOf("t8")}
	set := func(command string, key func(Keys, Service) string, args ...any) func(testing.TB, *Store) {
		return func(tb testing.TB, s *Store) { do(tb, s, append([]any{command, key(s.keys, web)}, args...)...) }
	}
	for _, c := range []struct {
		name   string
		before func(testing.TB, *Store)
		beat   Beat
		steady bool
		then   string // what Beat makes of it, unless steady
	}{
		{"steady", nil, mine, true, ""},
		{"steady, its score in the future", set("ZADD", Keys.Instances, t0+3_600_000, odd.String()), mine, true, ""},
		{"steady, beaten in this very millisecond", set("ZADD", Keys.Instances, t0+1000, odd.String()), mine, true, ""},
		{"steady at a third of the TTL", nil, Beat{Addr: odd, Token: "t7", Meta: metaOf("t7"), Interval: DefaultTTL / 3}, true, ""},
		{"another token", nil, other, false, "NOTOWNER"},
		{"a registration's first", nil, Beat{Addr: odd, Token: "t7", Meta: metaOf("t7"), first: true}, false, "OK"},
		{"an agent's first", nil, Beat{Addr: odd, Token: "t8", Meta: metaOf("t8"), Agent: "a1"}, false, "NOTOWNER"},
		{"other metadata", nil, Beat{Addr: odd, Token: "t7", Meta: metaOf("t7") + " "}, false, "CHANGED"},
		{"left", func(tb testing.TB, s *Store) { leave(tb, s, odd, "t7") }, mine, false, "LEFT"},
		{"taken out by hand, metadata and all", func(tb testing.TB, s *Store) {
			do(tb, s, "ZREM", s.keys.Instances(web), odd.String())
			do(tb, s, "HDEL", s.keys.Meta(web), odd.String())
		}, mine, false, "NEW"},
		{"taken out by hand, metadata left", set("ZREM", Keys.Instances, odd.String()), mine, false, "NEW"},
		{"metadata lost", set("HDEL", Keys.Meta, odd.String()), mine, false, "TAKEN"},
		{"too much metadata", nil, Beat{Addr: odd, Token: "t7", Meta: strings.Repeat("x", MaxMeta+1)}, false, "bytes of metadata"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			join(t, s, odd, "t7")
			join(t, s, host(6), "t6")
			join(t, s, host(8), "t9")
			api := Beat{Addr: host(7), Token: "a", Meta: metaOf("a")}
			_, err := s.Beat(t.Context(), "api", api)
			must(t, err)
			if c.before != nil {
				c.before(t, s)
			}
			s.setClock(t0 + 1000)
			got := s.BeatSteady(t.Context(), []ServiceBeat{
				{"web", Beat{Addr: host(6), Token: "t6", Meta: metaOf("t6")}}, {"api", api},
				{"web", c.beat}, {"web", Beat{Addr: host(8), Token: "t9", Meta: metaOf("t9")}},
			})
			for i, g := range got {
				want := i != 2 || c.steady
				if g.Done != want || g.Err != nil || want && (g.Status != BeatOK || g.TTL != DefaultTTL || g.Interval != DefaultInterval) {
					t.Errorf("beat %d: %+v, want steady %v", i, g, want)
				}
			}
			for _, of := range []struct {
				svc  Service
				addr netip.AddrPort
			}{{"web", host(6)}, {"web", host(8)}, {"api", host(7)}} {
				if score := s.rdb.ZScore(t.Context(), s.keys.Instances(of.svc), of.addr.String()).Val(); score != float64(t0+1000) {
					t.Errorf("%s %s: score %.0f, want %d", of.svc, of.addr, score, t0+1000)
				}
			}
			moved := s.rdb.ZScore(t.Context(), s.keys.Instances(web), odd.String()).Val() == float64(t0+1000)
			if moved != c.steady {
				t.Errorf("its score moved: %v", moved)
			}
			if !c.steady {
				if got := beatOutcome(s.Beat(t.Context(), web, c.beat)); !strings.Contains(got, c.then) {
					t.Errorf("Beat came to %q, want %q", got, c.then)
				}
			}
		})
	}
}

// TestBeatSteadyRefused has Redis refuse beats of one service, which is no
// reason to keep another's.
func TestBeatSteadyRefused(t *testing.T) {
	srv := redistest.Start(t)
	beats := []ServiceBeat{
		{"web", Beat{Addr: host(1), Token: "t1", Meta: metaOf("t1")}},
		{"api", Beat{Addr: host(2), Token: "t2", Meta: metaOf("t2")}},
		{"api", Beat{Addr: host(2), Token: "t2", Meta: metaOf("t2"), Interval: DefaultTTL/3 + time.Millisecond}},
	}
	both := beats[:2]
	for _, c := range []struct {
		name   string
		before func(testing.TB, *Store)
		beats  []ServiceBeat
		want   []bool // done
	}{
		{"instances of another type", func(tb testing.TB, s *Store) {
			do(tb, s, "DEL", s.keys.Instances(web))
			do(tb, s, "SET", s.keys.Instances(web), "x")
		}, both, []bool{false, true}},
		{"metadata of another type", func(tb testing.TB, s *Store) {
			do(tb, s, "DEL", s.keys.Meta(web))
			do(tb, s, "SET", s.keys.Meta(web), "x")
		}, both, []bool{false, true}},
		{"config of another type", func(tb testing.TB, s *Store) { do(tb, s, "SET", s.keys.Config(), "x") }, both, []bool{false, false}},
		{"one interval too long", func(testing.TB, *Store) {}, beats, []bool{false, false, false}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			for _, b := range both {
				_, err := s.Beat(t.Context(), b.Service, b.Beat)
				must(t, err)
			}
			c.before(t, s)
			s.setClock(t0 + 5)
			before := dump(t, s)
			for i, g := range s.BeatSteady(t.Context(), c.beats) {
				if g.Done != c.want[i] || g.Err != nil {
					t.Errorf("beat %d: %+v, want done %v", i, g, c.want[i])
				}
			}
			var want []string
			if c.want[1] {
				want = []string{"{api}:instances"}
			}
			if wrote := diff(before, dump(t, s)); !slices.Equal(wrote, want) {
				t.Errorf("it wrote %q, want %q", wrote, want)
			}
		})
	}
	t.Run("no answer", func(t *testing.T) {
		s := fresh(t, srv)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		for i, g := range s.BeatSteady(ctx, both) {
			if g.Done || !errors.Is(g.Err, context.Canceled) {
				t.Errorf("beat %d: %+v, want an unknown outcome", i, g)
			}
		}
	})
}

// TestBeatSteadyMany sends more than one call may hold.
func TestBeatSteadyMany(t *testing.T) {
	s, _ := newStore(t)
	s.setClock(t0)
	var beats []ServiceBeat
	for i := range 2*rollLimit + 1 {
		b := ServiceBeat{Service(fmt.Sprintf("s%d", i%3)), Beat{Addr: host(i), Token: "t", Meta: metaOf("t")}}
		_, err := s.Beat(t.Context(), b.Service, b.Beat)
		must(t, err)
		beats = append(beats, b)
	}
	s.setClock(t0 + 1)
	calls := counted(s)
	for i, g := range s.BeatSteady(t.Context(), beats) {
		if !g.Done {
			t.Errorf("beat %d: %+v", i, g)
		}
	}
	if n := calls.Load(); n != 3+1 { // one of them brings the script
		t.Errorf("%d calls, want 4", n)
	}
}

// counted counts what s sends from now on.
func counted(s *Store) *atomic.Int64 {
	n := &atomic.Int64{}
	s.rdb.(*redis.Client).AddHook(counter{n})
	return n
}

type counter struct{ n *atomic.Int64 }

func (c counter) DialHook(next redis.DialHook) redis.DialHook { return next }
func (c counter) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}
func (c counter) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		c.n.Add(1)
		return next(ctx, cmd)
	}
}

// TestRoll runs Beaters that share a Roll: each joins, beats and leaves as ever,
// and a round of heartbeats takes few calls.
func TestRoll(t *testing.T) {
	const beaters, interval = 40, 200 * time.Millisecond
	s, _ := newStore(t)
	roll := NewRoll(s)
	var runs []*running
	for i := range beaters {
		b, err := NewBeater(BeaterConfig{Service: Service(fmt.Sprintf("s%d", i%4)), Addr: host(i), Interval: interval, Roll: roll}, s, zerolog.Nop())
		must(t, err)
		runs = append(runs, start(t, b))
	}
	scores := func() map[string]float64 {
		all := map[string]float64{}
		for i := range 4 {
			zs, err := s.rdb.ZRangeWithScores(t.Context(), s.keys.Instances(Service(fmt.Sprintf("s%d", i))), 0, -1).Result()
			must(t, err)
			for _, z := range zs {
				all[z.Member.(string)] = z.Score
			}
		}
		return all
	}
	// later waits until everybody has beaten since the time of first.
	later := func(first map[string]float64) {
		eventually(t, func() error {
			now := scores()
			for i := range beaters {
				if a := host(i).String(); now[a] <= first[a] {
					return fmt.Errorf("%s: score %.0f", a, now[a])
				}
			}
			return nil
		})
	}
	later(nil)
	later(scores())
	eventually(t, func() error {
		most, together := 0, map[float64]int{}
		for _, score := range scores() {
			together[score]++
			most = max(most, together[score])
		}
		if most < beaters/2 {
			return fmt.Errorf("at most %d of %d beat together: %v", most, beaters, together)
		}
		return nil
	})
	for _, r := range runs {
		r.cancel()
	}
	for _, r := range runs {
		must(t, r.wait(t))
	}
	if left := scores(); len(left) > 0 {
		t.Errorf("still there: %v", left)
	}
}

// TestRollOutlivesItsFirst has somebody send for all whose own ctx has ended.
func TestRollOutlivesItsFirst(t *testing.T) {
	s, _ := newStore(t)
	s.setClock(t0)
	join(t, s, host(1), "t1")
	s.setClock(t0 + 1)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	r := NewRoll(s)
	r.gathering = &gathering{beats: []ServiceBeat{{web, Beat{Addr: host(1), Token: "t1", Meta: metaOf("t1")}}}, sent: make(chan struct{})}
	g := r.gathering
	r.send(ended, g)
	if <-g.sent; !g.out[0].Done || r.gathering != nil {
		t.Errorf("got %+v, and %+v may still be joined", g.out[0], r.gathering)
	}
}
