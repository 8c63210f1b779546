package registrar

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"rollcall/registrar/redistest"
)

// transcript is what a Beater said; a test may read while a Run writes.
type transcript struct {
	mu  sync.Mutex
	buf bytes.Buffer // guarded by mu
}

func (l *transcript) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

// said returns level and message of every line.
func (l *transcript) said(tb testing.TB) []string {
	tb.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []string
	for line := range strings.Lines(l.buf.String()) {
		var m struct{ Level, Message, Component, Service, Addr string }
		must(tb, json.Unmarshal([]byte(line), &m))
		if m.Component != "beater" || m.Service != "web" || m.Addr != host(1).String() {
			tb.Errorf("a line names nobody: %s", line)
		}
		out = append(out, m.Level+": "+m.Message)
	}
	return out
}

// hears waits for a line.
func (l *transcript) hears(tb testing.TB, line string) {
	tb.Helper()
	eventually(tb, func() error {
		if said := l.said(tb); !slices.Contains(said, line) {
			return fmt.Errorf("said %q, not %q", said, line)
		}
		return nil
	})
}

// The lines of a Beater.
const (
	saidRegistered = "info: registered"
	saidFailed     = "warn: beat failed; retrying for ever"
	saidBack       = "info: redis answers again"
	saidLoser      = "warn: another registration holds this address; trying again at every interval"
	saidFull       = "error: not registered; trying again at every interval"
	saidLeft       = "info: left"
	saidNothing    = "info: nothing to leave: another registration holds this address"
	saidAway       = "warn: left without telling: redis is away; the reaper takes this instance out after its TTL"
)

func newBeater(tb testing.TB, s *Store, interval time.Duration) (*Beater, *transcript) {
	tb.Helper()
	l := &transcript{}
	b, err := NewBeater(BeaterConfig{Service: web, Addr: host(1), Weight: 50, Zone: "z", Tags: map[string]string{"k": "v"}, Interval: interval}, s, zerolog.New(l))
	must(tb, err)
	return b, l
}

// production returns a store on srv through the client that the binary uses.
func production(tb testing.TB, srv *redistest.Server) *Store {
	tb.Helper()
	rdb, err := Open(srv.URL(), 2)
	must(tb, err)
	tb.Cleanup(func() {
		if err := rdb.Close(); err != nil {
			tb.Error(err)
		}
	})
	s, err := NewStore(rdb, DefaultNamespace)
	must(tb, err)
	return s
}

// running is a Run in the background.
type running struct {
	cancel context.CancelFunc
	done   chan error
}

// start runs b until stop, which the test's end calls at the latest.
func start(tb testing.TB, b *Beater) *running {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{cancel, make(chan error, 1)}
	go func() {
		r.done <- b.Run(ctx)
		close(r.done)
	}()
	tb.Cleanup(func() {
		cancel()
		<-r.done
	})
	return r
}

// wait returns what Run returned.
func (r *running) wait(tb testing.TB) error {
	tb.Helper()
	select {
	case err := <-r.done:
		return err
	case <-time.After(10 * time.Second):
		tb.Fatal("Run has not returned")
		return nil
	}
}

func (r *running) stop(tb testing.TB) error {
	tb.Helper()
	r.cancel()
	return r.wait(tb)
}

// registered waits until the register has b.
func registered(tb testing.TB, s *Store, b *Beater) {
	tb.Helper()
	eventually(tb, func() error {
		snap, err := s.Read(tb.Context(), web, nil)
		if err != nil {
			return err
		}
		if len(snap.Entries) != 1 || !snap.Entries[0].Present || snap.Entries[0].Instance.Meta.ID != b.token {
			return fmt.Errorf("the register has %+v", snap.Entries)
		}
		return nil
	})
}

func TestNewBeaterRefuses(t *testing.T) {
	good := BeaterConfig{Service: web, Addr: host(1), Weight: 1, Interval: time.Second}
	tagged := func(n int) map[string]string { // each of 264 bytes as JSON
		tags := map[string]string{}
		for i := range n {
			tags[fmt.Sprintf("k%02d", i)] = strings.Repeat("v", MaxText)
		}
		return tags
	}
	for _, c := range []struct {
		name string
		edit func(*BeaterConfig)
		ok   bool
	}{
		{"nothing wrong", func(*BeaterConfig) {}, true},
		{"weight 0", func(c *BeaterConfig) { c.Weight = 0 }, true},
		{"weight -1", func(c *BeaterConfig) { c.Weight = -1 }, false},
		{"weight 257", func(c *BeaterConfig) { c.Weight = 257 }, false},
		{"the registry's interval", func(c *BeaterConfig) { c.Interval = 0 }, true},
		{"negative interval", func(c *BeaterConfig) { c.Interval = -time.Second }, false},
		{"interval of 1 ms", func(c *BeaterConfig) { c.Interval = time.Millisecond }, true},
		{"interval that is 0 on the wire", func(c *BeaterConfig) { c.Interval = time.Millisecond - 1 }, false},
		{"no service", func(c *BeaterConfig) { c.Service = "" }, false},
		{"service with a brace", func(c *BeaterConfig) { c.Service = "a}b" }, false},
		{"no address", func(c *BeaterConfig) { c.Addr = netip.AddrPort{} }, false},
		{"IPv4 in IPv6", func(c *BeaterConfig) { c.Addr = netip.MustParseAddrPort("[::ffff:1.2.3.4]:80") }, false},
		{"unspecified address", func(c *BeaterConfig) { c.Addr = netip.MustParseAddrPort("0.0.0.0:80") }, false},
		{"longest zone", func(c *BeaterConfig) { c.Zone = strings.Repeat("z", 63) }, true},
		{"longer zone", func(c *BeaterConfig) { c.Zone = strings.Repeat("z", 64) }, false},
		{"longest tag", func(c *BeaterConfig) { c.Tags = map[string]string{strings.Repeat("k", 63): strings.Repeat("v", 255)} }, true},
		{"longer key", func(c *BeaterConfig) { c.Tags = map[string]string{strings.Repeat("k", 64): ""} }, false},
		{"longer value", func(c *BeaterConfig) { c.Tags = map[string]string{"k": strings.Repeat("v", 256)} }, false},
		{"a newline in a value", func(c *BeaterConfig) { c.Tags = map[string]string{"k": "a\nb"} }, false},
		{"an escape in a key", func(c *BeaterConfig) { c.Tags = map[string]string{"\x1b[2J": "v"} }, false},
		{"longest agent", func(c *BeaterConfig) { c.Agent = strings.Repeat("a", 63) }, true},
		{"longer agent", func(c *BeaterConfig) { c.Agent = strings.Repeat("a", 64) }, false},
		{"no UTF-8 in the zone", func(c *BeaterConfig) { c.Zone = "\xff" }, false},
		{"many tags", func(c *BeaterConfig) { c.Tags = tagged(14) }, true},
		{"too many tags", func(c *BeaterConfig) { c.Tags = tagged(16) }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := good
			c.edit(&cfg)
			if _, err := NewBeater(cfg, nil, zerolog.Nop()); (err == nil) != c.ok {
				t.Errorf("got %v, want accepted %v", err, c.ok)
			}
		})
	}
}

// TestRun checks the whole life: it registers at once, and when its context
// ends it leaves, with its own token.
func TestRun(t *testing.T) {
	s, _ := newStore(t)
	b, log := newBeater(t, s, 0)
	began := time.Now()
	r := start(t, b)
	registered(t, s, b)
	if took := time.Since(began); took > DefaultInterval/2 {
		t.Errorf("registered after %v; the first beat waits for nothing", took)
	}
	snap, err := s.Read(t.Context(), web, nil)
	must(t, err)
	m := snap.Entries[0].Instance.Meta
	if m.Weight != 50 || m.Zone != "z" || m.Tags["k"] != "v" || m.Registered == 0 || len(m.ID) < 20 || m.Draining {
		t.Errorf("registered as %+v", m)
	}
	if err := r.stop(t); err != nil {
		t.Errorf("Run returned %v", err)
	}
	g, ok := parseGone(gone(t, s, host(1)))
	if !ok || g.Reason != Left || g.Token != b.token || present(t, s, host(1)) {
		t.Errorf("left a note %+v", g)
	}
	if want := []string{saidRegistered, saidLeft}; !slices.Equal(log.said(t), want) {
		t.Errorf("said %q, want %q", log.said(t), want)
	}
}

func TestRunBeatsAgain(t *testing.T) {
	s, _ := newStore(t)
	b, log := newBeater(t, s, 20*time.Millisecond)
	start(t, b)
	registered(t, s, b)
	for range 3 {
		last := s.rdb.ZScore(t.Context(), s.keys.Instances(web), host(1).String()).Val()
		eventually(t, func() error {
			if now := s.rdb.ZScore(t.Context(), s.keys.Instances(web), host(1).String()).Val(); now <= last {
				return fmt.Errorf("score is still %.0f", now)
			}
			return nil
		})
	}
	if want := []string{saidRegistered}; !slices.Equal(log.said(t), want) {
		t.Errorf("a steady Beater said %q, want %q", log.said(t), want)
	}
}

func TestRunWaitsForRedis(t *testing.T) {
	srv := redistest.Start(t)
	srv.Kill(t)
	s := production(t, srv)
	b, log := newBeater(t, s, 50*time.Millisecond)
	r := start(t, b)
	log.hears(t, saidFailed)
	srv.Launch(t)
	registered(t, s, b)
	if err := r.stop(t); err != nil {
		t.Errorf("Run returned %v", err)
	}
	if want := []string{saidFailed, saidBack, saidRegistered, saidLeft}; !slices.Equal(log.said(t), want) {
		t.Errorf("said %q, want %q", log.said(t), want)
	}
}

// TestRunLeavesWhileRedisRestarts checks that a leave tries again.
func TestRunLeavesWhileRedisRestarts(t *testing.T) {
	srv := redistest.Start(t)
	s := production(t, srv)
	b, log := newBeater(t, s, 0)
	b.cfg.LeaveWait = 10 * time.Second // how soon Redis is there again is not its matter
	r := start(t, b)
	log.hears(t, saidRegistered)
	srv.Kill(t)
	r.cancel()
	srv.Launch(t) // without its data: the leave is of an absent address
	if err := r.wait(t); err != nil {
		t.Errorf("Run returned %v", err)
	}
	if g, ok := parseGone(gone(t, s, host(1))); !ok || g.Token != b.token {
		t.Errorf("no note of its leave: %+v; said %q", g, log.said(t))
	}
}

func TestRunGivesUpLeaving(t *testing.T) {
	srv := redistest.Start(t)
	s := production(t, srv)
	b, log := newBeater(t, s, 0)
	r := start(t, b)
	log.hears(t, saidRegistered)
	srv.Kill(t)
	if err := r.stop(t); err != nil {
		t.Errorf("Run returned %v", err)
	}
	if want := []string{saidRegistered, saidAway}; !slices.Equal(log.said(t), want) {
		t.Errorf("said %q, want %q", log.said(t), want)
	}
}

func TestRunEnds(t *testing.T) {
	srv := redistest.Start(t)
	for _, c := range []struct {
		name   string
		before func(testing.TB, *Store, *Beater)
		want   error
	}{
		{"interval too long", func(testing.TB, *Store, *Beater) {}, ErrInterval},
		{"left by another hand", func(tb testing.TB, s *Store, b *Beater) {
			b.cfg.Interval = 0
			leave(tb, s, host(1), b.token)
		}, ErrLeft},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			b, log := newBeater(t, s, time.Minute)
			c.before(t, s, b)
			e := observe(t, s, func() {
				if err := start(t, b).wait(t); !errors.Is(err, c.want) {
					t.Errorf("Run returned %v, want %v", err, c.want)
				}
			})
			e.nothing(t)
			if said := log.said(t); len(said) > 0 { // its caller says it
				t.Errorf("said %q", said)
			}
		})
	}
}

func TestBeatDelays(t *testing.T) {
	s, srv := newStore(t)
	prod := production(t, srv)
	ctx := t.Context()
	const interval = time.Second
	b, _ := newBeater(t, prod, interval)
	// A newcomer does not wait for long.
	do(t, s, "CONFIG", "SET", "min-replicas-to-write", 1)
	for n := 1; n <= 40; n++ {
		if next, err := b.Beat(ctx); err == nil || next > NewcomerRetry {
			t.Fatalf("newcomer's failure %d: next in %v %v, want at most %v", n, next, err, NewcomerRetry)
		}
	}
	do(t, s, "CONFIG", "SET", "min-replicas-to-write", 0)
	for range 200 {
		if next, err := b.Beat(ctx); err != nil || next < interval*8/10 || next > interval {
			t.Fatalf("next in %v %v, want 0.8 to 1.0 of %v", next, err, interval)
		}
	}
	// As loser too.
	loser, _ := newBeater(t, prod, interval)
	loser.answered = true
	if next, err := loser.Beat(ctx); !errors.Is(err, ErrNotOwner) || next < interval*8/10 || next > interval {
		t.Errorf("loser: next in %v %v", next, err)
	}
	// A registry's answer resets the ceiling.
	do(t, s, "CONFIG", "SET", "min-replicas-to-write", 1)
	over := false
	for n := 1; n <= 60; n++ {
		ceiling := min(FirstRetry<<(n-1), interval)
		if n > 5 {
			ceiling = interval
		}
		next, err := b.Beat(ctx)
		if err == nil || !strings.Contains(err.Error(), "NOREPLICAS") || next <= 0 || next > ceiling {
			t.Fatalf("failure %d: next in %v %v, want at most %v", n, next, err, ceiling)
		}
		over = over || next > interval/2
	}
	if !over {
		t.Error("60 failures never waited for more than half of the interval")
	}
	do(t, s, "CONFIG", "SET", "min-replicas-to-write", 0)
	if _, err := b.Beat(ctx); err != nil || b.outage.Failures != 0 {
		t.Errorf("after the outage: %v, %d failures", err, b.outage.Failures)
	}
}

// TestBeatTakesNobodyOut has a second registration begin beside one that beats, and
// go on until that one has missed its beats. It beats again just then.
func TestBeatTakesNobodyOut(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	ctx := t.Context()
	join(t, s, host(1), "before")
	b, _ := newBeater(t, s, 0)
	var told []string
	b.cfg.Tell = func(status string) { told = append(told, status) }
	for _, silent := range []int64{0, 1, intervalMS, 2*intervalMS - 1, 2 * intervalMS} {
		s.setClock(t0 + silent)
		next, err := b.Beat(ctx)
		if !errors.Is(err, ErrNotOwner) {
			t.Fatalf("silent for %d ms: %v, want ErrNotOwner", silent, err)
		}
		if most := time.Duration(2*intervalMS-silent+1) * time.Millisecond; next > most || next < min(most, DefaultInterval*4/5) {
			t.Errorf("silent for %d ms: next in %v, want at most %v", silent, next, most)
		}
	}
	s.setClock(t0 + 2*intervalMS + 1)
	if _, err := b.Beat(ctx); err != nil {
		t.Fatalf("it has missed its beats: %v", err)
	}
	if want := []string{"not registered: another registration holds the address, until it misses its heartbeats", "registered"}; !slices.Equal(told, want) {
		t.Errorf("told %q, want %q", told, want)
	}
	s.setClock(t0) // a clock that is set back makes nobody silent
	join(t, s, host(2), "ahead")
	do(t, s, "ZADD", s.keys.Instances(web), "+inf", host(2).String())
	if r, err := s.Beat(ctx, web, Beat{Addr: host(2), Token: "t", Meta: metaOf("t")}); !errors.Is(err, ErrNotOwner) || r.Held != t0 || r.Silent != 0 {
		t.Errorf("a score in the future: %+v, %v", r, err)
	}
}

// TestBeatOfAnAgent takes over at once what the same agent registered, and nothing
// else.
func TestBeatOfAnAgent(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	for i, c := range []struct {
		agent string
		want  error
	}{{"a", nil}, {"b", ErrNotOwner}} {
		before, err := NewBeater(BeaterConfig{Service: web, Addr: host(i), Weight: 1, Agent: "a"}, s, zerolog.Nop())
		must(t, err)
		_, err = before.Beat(t.Context())
		must(t, err)
		b, err := NewBeater(BeaterConfig{Service: web, Addr: host(i), Weight: 1, Agent: c.agent}, s, zerolog.Nop())
		must(t, err)
		if _, err := b.Beat(t.Context()); !errors.Is(err, c.want) {
			t.Errorf("agent %s on what a registered: %v, want %v", c.agent, err, c.want)
		}
		// Once it is settled, it is not settled again.
		if _, err := before.Beat(t.Context()); !errors.Is(err, ErrNotOwner) && c.want == nil {
			t.Errorf("the one before: %v", err)
		}
	}
}

// TestBeatOfAnAgentUntilAnswered checks that failures do not use the agent's mark up.
func TestBeatOfAnAgentUntilAnswered(t *testing.T) {
	s, srv := newStore(t)
	prod := production(t, srv)
	cfg := BeaterConfig{Service: web, Addr: host(1), Weight: 1, Agent: "a"}
	before, err := NewBeater(cfg, prod, zerolog.Nop())
	must(t, err)
	_, err = before.Beat(t.Context())
	must(t, err)
	do(t, s, "CONFIG", "SET", "min-replicas-to-write", 1)
	b, err := NewBeater(cfg, prod, zerolog.Nop())
	must(t, err)
	for range 3 {
		if _, err := b.Beat(t.Context()); err == nil {
			t.Fatal("a beat without replicas was accepted")
		}
	}
	do(t, s, "CONFIG", "SET", "min-replicas-to-write", 0)
	if _, err := b.Beat(t.Context()); err != nil {
		t.Errorf("got %v, want a takeover", err)
	}
}

// TestBeatOfAnAgentIsSettledByAnyAnswer also with a registry whose TTL is nonsense.
func TestBeatOfAnAgentIsSettledByAnyAnswer(t *testing.T) {
	srv := redistest.Start(t)
	for _, ttl := range []any{15000, 0, -1} {
		s := fresh(t, srv)
		do(t, s, "HSET", s.keys.Config(), "ttl_ms", ttl)
		b, _ := newBeater(t, s, 0)
		if _, err := b.Beat(t.Context()); b.answered != (err == nil || errors.Is(err, ErrInterval)) {
			t.Errorf("TTL %v: %v, answered %v", ttl, err, b.answered)
		}
	}
}

func TestBeatAdoptsInterval(t *testing.T) {
	srv := redistest.Start(t)
	for _, c := range []struct {
		name           string
		own, registry  time.Duration
		afterwards     time.Duration // the registry's, changed while it runs
		want, wantThen time.Duration
	}{
		{"none of its own", 0, 3 * time.Second, 2 * time.Second, 3 * time.Second, 2 * time.Second},
		{"its own", time.Second, 3 * time.Second, 2 * time.Second, time.Second, time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			b, _ := newBeater(t, s, c.own)
			for _, step := range []struct{ registry, want time.Duration }{{c.registry, c.want}, {c.afterwards, c.wantThen}} {
				_, err := s.Config(t.Context(), DefaultTTL, step.registry, true)
				must(t, err)
				if next, err := b.Beat(t.Context()); err != nil || b.interval != step.want || next > step.want || next < step.want*8/10 {
					t.Errorf("registry %v: next in %v %v, interval %v, want %v", step.registry, next, err, b.interval, step.want)
				}
			}
		})
	}
}

// TestBeatOfLoser follows one who lost its address to another until the other
// stops.
func TestBeatOfLoser(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	ctx := t.Context()
	b, log := newBeater(t, s, 0)
	if _, err := b.Beat(ctx); err != nil {
		t.Fatal(err)
	}
	join(t, s, host(1), "other")
	for range 10 {
		s.setClock(s.clock() + intervalMS/5) // up to exactly two intervals
		if _, err := b.Beat(ctx); !errors.Is(err, ErrNotOwner) {
			t.Fatalf("got %v, want ErrNotOwner", err)
		}
	}
	s.setClock(s.clock() + 1)
	if _, err := b.Beat(ctx); err != nil {
		t.Fatalf("the holder is stale: %v", err)
	}
	join(t, s, host(1), "third")
	if _, err := b.Beat(ctx); !errors.Is(err, ErrNotOwner) {
		t.Fatalf("got %v, want ErrNotOwner", err)
	}
	if want := []string{saidRegistered, saidLoser, saidRegistered, saidLoser}; !slices.Equal(log.said(t), want) {
		t.Errorf("said %q, want %q", log.said(t), want)
	}
}

// TestBeatWithoutRoom checks that a newcomer who is one too many says so once, and
// comes in when there is room, and that those who are there beat on.
func TestBeatWithoutRoom(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	ctx := t.Context()
	do(t, s, "HSET", s.keys.Config(), "max_instances", 2)
	join(t, s, host(2), "t2")
	join(t, s, host(3), "t3")
	b, log := newBeater(t, s, 0)
	var told []string
	b.cfg.Tell = func(status string) { told = append(told, status) }
	for range 10 {
		next, err := b.Beat(ctx)
		if !errors.Is(err, ErrFull) {
			t.Fatalf("got %v, want ErrFull", err)
		}
		if next < DefaultInterval*4/5 || next > DefaultInterval {
			t.Errorf("tries again after %v, want the interval's pace", next)
		}
	}
	leave(t, s, host(2), "t2")
	if _, err := b.Beat(ctx); err != nil {
		t.Fatalf("there is room: %v", err)
	}
	if want := []string{saidFull, saidRegistered}; !slices.Equal(log.said(t), want) {
		t.Errorf("said %q, want %q", log.said(t), want)
	}
	if want := []string{"not registered: the register has no room for it", "registered"}; !slices.Equal(told, want) {
		t.Errorf("told %q, want %q", told, want)
	}
}

func TestRunOfLoserLeavesTheHolder(t *testing.T) {
	s, _ := newStore(t)
	b, log := newBeater(t, s, 20*time.Millisecond)
	r := start(t, b)
	registered(t, s, b)
	join(t, s, host(1), "other")
	log.hears(t, saidLoser)
	if err := r.stop(t); err != nil {
		t.Errorf("Run returned %v", err)
	}
	if !present(t, s, host(1)) || gone(t, s, host(1)) != "" {
		t.Error("the loser took the holder out")
	}
	if want := []string{saidRegistered, saidLoser, saidNothing}; !slices.Equal(log.said(t), want) {
		t.Errorf("said %q, want %q", log.said(t), want)
	}
}

// TestBeatOutageIsSaidOnce checks the volume of a long outage.
func TestBeatOutageIsSaidOnce(t *testing.T) {
	srv := redistest.Start(t)
	s := production(t, srv)
	b, log := newBeater(t, s, 0)
	if _, err := b.Beat(t.Context()); err != nil {
		t.Fatal(err)
	}
	srv.Kill(t)
	for range 1000 {
		if _, err := b.Beat(t.Context()); err == nil {
			t.Fatal("a dead server answered")
		}
	}
	if want := []string{saidRegistered, saidFailed}; !slices.Equal(log.said(t), want) {
		t.Errorf("said %q, want %q", log.said(t), want)
	}
	srv.Launch(t)
	eventually(t, func() error { _, err := b.Beat(t.Context()); return err })
	if want := []string{saidRegistered, saidFailed, saidBack, saidRegistered}; !slices.Equal(log.said(t), want) {
		t.Errorf("said %q, want %q", log.said(t), want)
	}
}

// TestBeatCancelledIsNoOutage checks that the end of a context is not reported
// as a failure of Redis.
func TestBeatCancelledIsNoOutage(t *testing.T) {
	srv := redistest.Start(t)
	b, log := newBeater(t, production(t, srv), 0)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := b.Beat(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if said := log.said(t); len(said) > 0 || b.outage.Failures != 0 {
		t.Errorf("said %q, %d failures", said, b.outage.Failures)
	}
}

// TestBeatSurvivesShorterTTL: a registry whose TTL is lowered must not lose the
// sidecars that run.
func TestBeatSurvivesShorterTTL(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	b, _ := newBeater(t, s, 5*time.Second)
	if _, err := b.Beat(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Config(t.Context(), 3*time.Second, time.Second, true); err != nil {
		t.Fatal(err)
	}
	if next, err := b.Beat(t.Context()); err != nil || next > time.Second {
		t.Errorf("next in %v, %v; want at most the registry's second", next, err)
	}
}

// TestRunLeavesAtOnce checks that who cannot answer does not drain, and what the
// register says of it.
func TestRunLeavesAtOnce(t *testing.T) {
	srv := redistest.Start(t)
	for _, c := range []struct {
		name  string
		cause error
		want  Reason
	}{
		{"unhealthy", ErrUnhealthy, Unhealthy},
		{"the app has ended", ErrEnded, Left},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			b, log := newBeater(t, s, 0)
			b.cfg.DrainWait = time.Minute
			ctx, cancel := context.WithCancelCause(t.Context())
			ended := make(chan error, 1)
			go func() { ended <- b.Run(ctx) }()
			registered(t, s, b)
			must(t, s.Acker("lb").Ack(t.Context(), web, token(t, s))) // a drain would wait for it
			cancel(c.cause)
			select {
			case err := <-ended:
				must(t, err)
			case <-time.After(10 * time.Second):
				t.Fatalf("Run waits; said %q", log.said(t))
			}
			if g, ok := parseGone(gone(t, s, host(1))); !ok || g.Reason != c.want || g.Token != b.token {
				t.Errorf("left a note %+v, want %s", g, c.want)
			}
		})
	}
}

// TestRunAgain checks that who comes back is a new registration, which takes the
// address from nobody.
func TestRunAgain(t *testing.T) {
	s, _ := newStore(t)
	b, log := newBeater(t, s, 150*time.Millisecond)
	var told []string
	b.cfg.Tell = func(status string) { told = append(told, status) }
	first := b.token
	for range 2 {
		ctx, cancel := context.WithCancelCause(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- b.Run(ctx) }()
		eventually(t, func() error {
			if !present(t, s, host(1)) {
				return errors.New("absent")
			}
			return nil
		})
		cancel(ErrUnhealthy)
		must(t, <-ended)
	}
	if b.token == first || gone(t, s, host(1)) == "" {
		t.Errorf("token %s again", first)
	}
	if want := []string{"registered", "registered"}; !slices.Equal(told, want) {
		t.Errorf("told %q, want %q", told, want)
	}
	join(t, s, host(1), "other")
	r := start(t, b)
	log.hears(t, saidLoser)
	must(t, r.stop(t))
	if !present(t, s, host(1)) {
		t.Error("who came back took the other out")
	}
	// A TTL that was shortened meanwhile does not end a sidecar that was welcome.
	leave(t, s, host(1), "other")
	do(t, s, "HSET", s.keys.Config(), "ttl_ms", 300, "interval_ms", 100)
	r = start(t, b)
	eventually(t, func() error {
		if !present(t, s, host(1)) {
			return errors.New("absent")
		}
		return nil
	})
	must(t, r.stop(t))
}

// TestHandOver checks that who comes after a restart with the same token goes on
// as if nothing had been: no version, no message.
func TestHandOver(t *testing.T) {
	s, _ := newStore(t)
	cfg := BeaterConfig{Service: web, Addr: host(1), Weight: 1, Token: "the container's", Since: time.UnixMilli(t0)}
	b, err := NewBeater(cfg, s, zerolog.Nop())
	must(t, err)
	ctx, cancel := context.WithCancelCause(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	registered(t, s, b)
	observe(t, s, func() {
		cancel(ErrHandedOver)
		if err := <-done; err != nil {
			t.Errorf("Run returned %v", err)
		}
	}).nothing(t)
	g, v := versions(t, s)
	next, err := NewBeater(cfg, s, zerolog.Nop())
	must(t, err)
	if _, err := next.Beat(t.Context()); err != nil {
		t.Error(err)
	}
	if g2, v2 := versions(t, s); g2 != g || v2 != v {
		t.Errorf("versions %d %d became %d %d", g, v, g2, v2)
	}
}
