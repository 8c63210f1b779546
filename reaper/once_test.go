package reaper

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
)

// once is r.Once, and once more when a busy machine was too slow for the proof.
func once(t *testing.T, r *Reaper) (report Report, err error) {
	t.Helper()
	for range 4 {
		if report, err = r.Once(t.Context(), false); !errors.Is(err, ErrNeverArmed) {
			break
		}
		t.Log(err)
	}
	return report, err
}

func TestOnce(t *testing.T) {
	t.Parallel()
	const ttl, interval = 3 * time.Second, 600 * time.Millisecond
	cfg := Config{TTL: ttl, Interval: interval}
	short := Config{TTL: 600 * time.Millisecond, Interval: 200 * time.Millisecond} // of who never arms
	t.Run("armed", func(t *testing.T) {
		t.Parallel()
		g := newRegistry(t)
		g.put(t, "web", "10.0.0.1:80", 1)
		began := time.Now()
		report, err := once(t, newReaper(t, cfg, g.store, zerolog.Nop()))
		if err != nil || fmt.Sprint(report.Removed) != "[{web [10.0.0.1:80]}]" {
			t.Errorf("got %+v, %v", report, err)
		}
		if took := time.Since(began); took < ttl+interval {
			t.Errorf("armed after %v, want at least TTL + B", took)
		}
	})
	t.Run("never armed", func(t *testing.T) {
		t.Parallel()
		g := newRegistry(t, "--min-replicas-to-write", "1")
		_, err := newReaper(t, short, g.store, zerolog.Nop()).Once(t.Context(), false)
		if !errors.Is(err, ErrNeverArmed) || !strings.Contains(err.Error(), "NOREPLICAS") {
			t.Errorf("got %v, want ErrNeverArmed and why", err)
		}
	})
	t.Run("never armed by pulses", func(t *testing.T) {
		t.Parallel()
		g := newRegistry(t)
		g.put(t, "web", "10.0.0.1:80", 1)
		lossy := &outage{Store: g.store, pulse: func() {
			if err := g.rdb.Del(t.Context(), g.keys.Reaper("r1")).Err(); err != nil {
				t.Error(err)
			}
		}}
		log := &logBuffer{}
		report, err := newReaper(t, short, lossy, zerolog.New(log)).Once(t.Context(), false)
		// On a busy machine its last pulse may have failed for another cause.
		if !errors.Is(err, ErrNeverArmed) || len(log.lines(causeToken)) == 0 || len(report.Removed) > 0 {
			t.Errorf("got %+v, %v, want ErrNeverArmed, and why in the log", report, err)
		}
	})
	t.Run("no redis", func(t *testing.T) {
		t.Parallel()
		g := newRegistry(t)
		g.srv.Kill(t)
		if _, err := newReaper(t, short, g.store, zerolog.Nop()).Once(t.Context(), false); !errors.Is(err, ErrNeverArmed) {
			t.Errorf("got %v, want ErrNeverArmed", err)
		}
	})
	t.Run("held, then forced", func(t *testing.T) {
		t.Parallel()
		g := newRegistry(t)
		now := g.clock(t)
		for i := range 4 {
			g.put(t, "web", fmt.Sprintf("10.0.0.%d:80", i), 1)
		}
		g.put(t, "web", "10.0.0.9:80", now+time.Minute.Milliseconds())
		report, err := once(t, newReaper(t, cfg, g.store, zerolog.Nop()))
		if !errors.Is(err, ErrHeld) || len(report.Removed) > 0 {
			t.Errorf("got %+v, %v, want ErrHeld", report, err)
		}
		r := newReaper(t, cfg, g.store, zerolog.Nop())
		report, err = r.Once(t.Context(), true)
		if err != nil || len(report.Removed) != 1 || len(report.Removed[0].Addrs) != 4 {
			t.Errorf("forced: got %+v, %v", report, err)
		}
		g.wantMembers(t, "web", "10.0.0.9:80")
	})
	t.Run("forced with a canary that cannot", func(t *testing.T) {
		t.Parallel()
		g := newRegistry(t)
		g.put(t, "web", "10.0.0.1:80", 1)
		r := newReaper(t, cfg, g.store, zerolog.Nop())
		sing(t, r, g.srv, "nobody:wrong@")
		report, err := r.Once(t.Context(), true)
		if err != nil || fmt.Sprint(report.Removed) != "[{web [10.0.0.1:80]}]" {
			t.Errorf("got %+v, %v", report, err)
		}
		r = newReaper(t, short, g.store, zerolog.Nop())
		sing(t, r, g.srv, "nobody:wrong@")
		if _, err := r.Once(t.Context(), false); !errors.Is(err, ErrConfig) {
			t.Errorf("of other times: %v, want ErrConfig", err)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		t.Parallel()
		g := newRegistry(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := newReaper(t, cfg, g.store, zerolog.Nop()).Once(ctx, false); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
}
