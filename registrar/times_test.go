package registrar

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"rollcall/registrar/redistest"
)

// TestTimesInForce writes the registry's times by hand, and asks everything that reads
// them: what is out of bounds is as if it were not there.
func TestTimesInForce(t *testing.T) {
	srv := redistest.Start(t)
	for _, c := range []struct {
		ttl, interval any // nil = not there
		want          [2]time.Duration
		fault         bool
	}{
		{15000, 5000, [2]time.Duration{DefaultTTL, DefaultInterval}, false},
		{300, 100, [2]time.Duration{MinTTL, MinInterval}, false},
		{86400000, 28800000, [2]time.Duration{MaxTTL, MaxTTL / 3}, false},
		{nil, nil, [2]time.Duration{DefaultTTL, DefaultInterval}, true}, // of what else is there
		{15000, 5001, [2]time.Duration{DefaultTTL, DefaultInterval}, true},
		{15000, 3600000, [2]time.Duration{DefaultTTL, DefaultInterval}, true},
		{3000, "9223372036854775807", [2]time.Duration{3 * time.Second, time.Second}, true},
		{3000, "99999999999999999999", [2]time.Duration{3 * time.Second, time.Second}, true},
		{3000, 1, [2]time.Duration{3 * time.Second, time.Second}, true},
		{3000, 99, [2]time.Duration{3 * time.Second, time.Second}, true},
		{3000, 0, [2]time.Duration{3 * time.Second, time.Second}, true},
		{3000, -1000, [2]time.Duration{3 * time.Second, time.Second}, true},
		{3000, "1e3", [2]time.Duration{3 * time.Second, time.Second}, true},
		{3000, " 1000", [2]time.Duration{3 * time.Second, time.Second}, true},
		{3000, "+1000", [2]time.Duration{3 * time.Second, time.Second}, true},
		{3000, "0x3e8", [2]time.Duration{3 * time.Second, time.Second}, true},
		{299, 100, [2]time.Duration{DefaultTTL, MinInterval}, true},
		{86400001, 1000, [2]time.Duration{DefaultTTL, time.Second}, true},
		{"1e18", 1000, [2]time.Duration{DefaultTTL, time.Second}, true},
		{0, 1000, [2]time.Duration{DefaultTTL, time.Second}, true},
		{-1, -1, [2]time.Duration{DefaultTTL, DefaultInterval}, true},
		{1, 1, [2]time.Duration{DefaultTTL, DefaultInterval}, true},
	} {
		t.Run(fmt.Sprint(c.ttl, " ", c.interval), func(t *testing.T) {
			s := fresh(t, srv)
			ctx := t.Context()
			do(t, s, "HSET", s.keys.Config(), "slow_ms", 0)
			for name, v := range map[string]any{"ttl_ms": c.ttl, "interval_ms": c.interval} {
				if v != nil {
					do(t, s, "HSET", s.keys.Config(), name, v)
				}
			}
			check := func(what string, ttl, interval time.Duration, err error) {
				t.Helper()
				if got := [2]time.Duration{ttl, interval}; got != c.want || err != nil {
					t.Errorf("%s: %v, %v; want %v", what, got, err, c.want)
				}
			}
			b := Beat{Addr: host(1), Token: "t1", Meta: metaOf("t1"), first: true}
			r, err := s.Beat(ctx, web, b)
			check("beat", r.TTL, r.Interval, err)
			s.setClock(t0 + 1)
			b.first = false
			r, err = s.Beat(ctx, web, b)
			check("steady beat", r.TTL, r.Interval, err)
			s.setClock(t0 + 2)
			many := s.BeatSteady(ctx, []ServiceBeat{{web, b}})[0]
			check("beat of many", many.TTL, many.Interval, many.Err)
			snap, err := s.Read(ctx, web, nil)
			check("read", snap.TTL, snap.Interval, err)
			e, err := s.Entry(ctx, web, host(1))
			check("entry", e.TTL, e.Interval, err)
			ttl, interval, err := s.InForce(ctx, web)
			check("in force", ttl, interval, err)
			_, ttl, err = s.Clock(ctx)
			check("clock", ttl, c.want[1], err)
			o, err := s.Overview(ctx)
			check("overview", o.TTL, o.Interval, err)
			reg, err := s.Registry(ctx)
			check("registry", reg.TTL, reg.Interval, err)
			if fault := reg.Fault != ""; fault != (c.fault && c.ttl != nil) {
				t.Errorf("doctor would say %q", reg.Fault)
			}
			b.Interval = c.want[0]/3 + time.Millisecond
			if _, err := s.Beat(ctx, web, b); !errors.Is(err, ErrInterval) {
				t.Errorf("an own interval of %v: %v", b.Interval, err)
			}
			if c.ttl != nil { // else it writes them
				times, err := s.Config(ctx, DefaultTTL, DefaultInterval, false)
				check("config", times.TTL, times.Interval, err)
			}
		})
	}
}

// TestMistypedTimesAreForgotten has a sidecar follow times that somebody has mistyped,
// within bounds, so that it would sleep for eight hours, and puts them right: it beats
// by those within one TTL.
func TestMistypedTimesAreForgotten(t *testing.T) {
	const ttl, interval = 900 * time.Millisecond, 300 * time.Millisecond
	srv := redistest.Start(t)
	for _, together := range []bool{false, true} {
		t.Run(fmt.Sprint("together ", together), func(t *testing.T) {
			t.Parallel()
			s := fresh(t, srv)
			s.now = ""
			set := func(ttl, interval time.Duration) {
				do(t, s, "HSET", s.keys.Config(), "ttl_ms", ttl.Milliseconds(), "interval_ms", interval.Milliseconds())
			}
			set(ttl, interval)
			cfg := BeaterConfig{Service: web, Addr: host(1)}
			if together {
				cfg.Roll = NewRoll(s)
			}
			b, err := NewBeater(cfg, s, zerolog.Nop())
			must(t, err)
			start(t, b)
			beats := func(n int, since float64) (last float64) {
				t.Helper()
				for range n {
					eventually(t, func() error {
						if last = s.rdb.ZScore(t.Context(), s.keys.Instances(web), host(1).String()).Val(); last <= since {
							return fmt.Errorf("no beat since %.0f", since)
						}
						return nil
					})
					since = last
				}
				return last
			}
			last := beats(3, 0)
			set(MaxTTL, MaxTTL/3)
			beats(1, last)
			last = s.rdb.ZScore(t.Context(), s.keys.Instances(web), host(1).String()).Val()
			right := time.Now()
			set(ttl, interval)
			beats(1, last)
			took := time.Since(right)
			t.Logf("beats again %v after they were put right; the TTL is %v", took, ttl)
			if took > 5*ttl {
				t.Errorf("%v", took)
			}
			beats(2, last)
		})
	}
	t.Run("of its own interval", func(t *testing.T) {
		s := fresh(t, srv)
		b, _ := newBeater(t, s, 4*time.Second)
		for _, c := range []struct {
			ttl  int
			want time.Duration
		}{{15000, 4 * time.Second}, {3000, time.Second}, {15000, 4 * time.Second}} {
			do(t, s, "HSET", s.keys.Config(), "ttl_ms", c.ttl)
			s.setClock(s.clock() + 1000)
			next, err := b.Beat(t.Context())
			if err != nil || next > c.want || next < c.want*4/5-1 {
				t.Errorf("TTL %d: next beat after %v, %v; want up to %v", c.ttl, next, err, c.want)
			}
		}
	})
}
