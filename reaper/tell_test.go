package reaper

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"

	"rollcall/registrar"
)

// said is what the register has of the reaper r1; nil = nothing.
func (g *registry) said(tb testing.TB) *registrar.ReaperReport {
	tb.Helper()
	o, err := g.store.Overview(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	i := slices.IndexFunc(o.Reapers, func(r registrar.ReaperReport) bool { return r.ID == "r1" })
	if i < 0 {
		return nil
	}
	return &o.Reapers[i]
}

// TestTells has a reaper be seen not armed, armed, holding, and gone.
func TestTells(t *testing.T) {
	t.Parallel()
	g := newRegistry(t)
	const ttl, interval = 3 * time.Second, 600 * time.Millisecond
	log := &logBuffer{}
	r := newReaper(t, Config{TTL: ttl, Interval: interval}, g.store, zerolog.New(log))
	began := g.clock(t)
	end := run(t, r)
	want := func(what string, ok func(*registrar.ReaperReport) bool) *registrar.ReaperReport {
		t.Helper()
		var got *registrar.ReaperReport
		eventually(t, func() error {
			if got = g.said(t); got == nil || !got.Live || !ok(got) {
				return fmt.Errorf("want %s, got %+v", what, got)
			}
			return nil
		})
		return got
	}
	got := want("not armed yet", func(r *registrar.ReaperReport) bool { return r.Since > 0 })
	if got.Armed || got.Cause == "" || got.Since < began || got.Until < got.Since+ttl.Milliseconds()/2 {
		t.Errorf("at the start: %+v", got)
	}
	until := got.Until
	got = want("armed", func(r *registrar.ReaperReport) bool { return r.Armed })
	if got.Cause != "" || got.Until != 0 || len(got.Held) > 0 {
		t.Errorf("armed: %+v", got)
	}
	if early := ms(until - got.Since); early > 0 {
		t.Errorf("armed %v before it said that it would be at the earliest", early)
	}
	began = g.clock(t)
	var dead []redis.Z // at once: of one alone a sweep in between would make an end
	for i := range 4 {
		dead = append(dead, redis.Z{Score: 1, Member: fmt.Sprintf("10.0.0.%d:80", i)})
	}
	if err := errors.Join(g.rdb.ZAdd(t.Context(), g.keys.Instances("web"), dead...).Err(),
		g.rdb.ZAdd(t.Context(), g.keys.Instances("api"), dead...).Err(), g.rdb.SAdd(t.Context(), g.keys.Services(), "api", "web").Err()); err != nil {
		t.Fatal(err)
	}
	got = want("three holds", func(r *registrar.ReaperReport) bool { return len(r.Held) == 3 })
	for i, svc := range []registrar.Service{everyService, "api", "web"} {
		h, n := got.Held[i], int64(4)
		if svc == everyService {
			n = 8
		}
		if h.Service != svc || h.Suspects != n || h.Members != n || h.Since < began-1 || h.Since > got.Seen || h.Until < h.Since+2*interval.Milliseconds() {
			t.Errorf("hold %d: %+v since %d", i, h, began)
		}
	}
	if lines := log.lines("too many look dead"); len(lines) != 3 {
		t.Errorf("%d lines for three holds", len(lines))
	} else {
		var line struct{ Service, Rule, Overrule string }
		if err := json.Unmarshal([]byte(lines[2]), &line); err != nil || line.Service != "web" || line.Rule != Rule("web") ||
			line.Overrule != "rollcall reap --once --force --ttl 3s --heartbeat 600ms" {
			t.Errorf("%v, %+v", err, line)
		}
	}
	if err := g.rdb.Del(t.Context(), g.keys.Instances("web"), g.keys.Instances("api")).Err(); err != nil {
		t.Fatal(err)
	}
	want("no hold", func(r *registrar.ReaperReport) bool { return len(r.Held) == 0 })
	if err := end(); err != nil {
		t.Error(err)
	}
	if got := g.said(t); got != nil {
		t.Errorf("ended, but it says %+v", got)
	}
}

// A full Redis is the reason that is told.
func TestTellsWhenFull(t *testing.T) {
	t.Parallel()
	g := newRegistry(t)
	r := newReaper(t, Config{TTL: 3 * time.Second, Interval: 600 * time.Millisecond}, g.store, zerolog.Nop())
	end := run(t, r)
	eventuallyArmed(t, r)
	if err := g.rdb.ConfigSet(t.Context(), "maxmemory", "1").Err(); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if got := g.said(t); got == nil || got.Armed || got.Cause != causePulse || !strings.Contains(got.Error, "OOM") || got.Until == 0 {
			return fmt.Errorf("got %+v", got)
		}
		return nil
	})
	if err := end(); err != nil {
		t.Error(err)
	}
	if got := g.said(t); got != nil {
		t.Errorf("ended, but it says %+v", got)
	}
}

// Of several reasons for one cause the newest is told.
func TestTellsTheNewestReason(t *testing.T) {
	t.Parallel()
	g := newRegistry(t)
	r := newReaper(t, Config{}, g.store, zerolog.Nop())
	fails := func(why string) {
		t.Helper()
		eventually(t, func() error {
			err := r.Pulse(t.Context())
			if s := r.Status(); err == nil || s.Cause != causePulse || !strings.Contains(s.Error, why) {
				return fmt.Errorf("%v, %+v, want %s", err, s, why)
			}
			return nil
		})
	}
	g.srv.Kill(t)
	fails("refused")
	g.srv.Launch(t)
	if err := g.rdb.ConfigSet(t.Context(), "maxmemory", "1").Err(); err != nil {
		t.Fatal(err)
	}
	fails("OOM")
}

// A key of another type costs the report, and nothing else.
func TestTellFails(t *testing.T) {
	t.Parallel()
	g := newRegistry(t)
	if err := g.rdb.Set(t.Context(), g.keys.Reapers(), "x", 0).Err(); err != nil {
		t.Fatal(err)
	}
	log := &logBuffer{}
	r := newReaper(t, Config{TTL: 3 * time.Second, Interval: 600 * time.Millisecond}, g.store, zerolog.New(log))
	end := run(t, r)
	eventuallyArmed(t, r)
	g.put(t, "web", "10.0.0.1:80", 1)
	eventually(t, func() error {
		if len(g.expired(t, "web")) != 1 {
			return errors.New("the dead one is still there")
		}
		return nil
	})
	if err := g.rdb.Del(t.Context(), g.keys.Reapers()).Err(); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if g.said(t) == nil || len(log.lines("knows again")) != 1 {
			return errors.New("it does not tell again")
		}
		return nil
	})
	if n := len(log.lines("cannot tell the register")); n != 1 {
		t.Errorf("%d lines of one failure", n)
	}
	if err := end(); err != nil {
		t.Error(err)
	}
}

func TestOverrule(t *testing.T) {
	for _, tt := range []struct {
		ttl, interval time.Duration
		want          string
	}{
		{15 * time.Second, 5 * time.Second, ""},
		{30 * time.Second, 10 * time.Second, " --ttl 30s"},
		{15 * time.Second, 4 * time.Second, " --heartbeat 4s"},
		{10 * time.Second, 3333 * time.Millisecond, " --ttl 10s"},
		{10 * time.Second, 3 * time.Second, " --ttl 10s --heartbeat 3s"},
	} {
		if got, want := Overrule(tt.ttl, tt.interval), "rollcall reap --once --force"+tt.want; got != want {
			t.Errorf("%v, %v: got %q, want %q", tt.ttl, tt.interval, got, want)
		}
	}
}
