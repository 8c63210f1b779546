package registrar

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"rollcall/registrar/redistest"
)

// TestInherit ends registrations that the register does not have, by their own token
// at least, and looks what becomes of what it has at their address: what a process
// that was killed has left drains, and leaves; what beats stays.
func TestInherit(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t)
	other, draining := `{"id":"other","weight":7}`, fmt.Sprintf(`{"id":"kept","weight":1,"draining":true,"registered":%d}`, int64(t0))
	for i, c := range []struct {
		name   string
		held   string        // what is there; empty: nothing
		age    time.Duration // of its last beat
		beats  bool          // it goes on beating
		kept   bool          // the token was kept by a process before
		begins bool          // the registration sends a beat before it ends
		cause  error
		hasty  bool
		nowait bool   // without a drain
		mute   bool   // no balancer acknowledges
		want   Reason // of whose token left; empty: nobody did
		drains bool   // the balancer was asked to drain it
	}{
		{name: "nothing there"},
		{name: "nothing there, kept", kept: true},
		{name: "killed", held: other, begins: true, want: Left, drains: true},
		{name: "killed, and has not begun", held: other, want: Left, drains: true},
		{name: "killed long ago", held: other, age: 600 * time.Millisecond, want: Left, drains: true},
		{name: "killed, kept", held: `{"id":"kept","weight":1}`, kept: true, want: Left, drains: true},
		{name: "killed while it drained, kept", held: draining, kept: true, want: Left, drains: true},
		{name: "killed while it drained, kept, and no balancer speaks", held: draining, kept: true, mute: true, want: Left},
		{name: "metadata that is none", held: "garbage", want: Left, drains: true},
		{name: "beats", held: other, beats: true, begins: true},
		{name: "beats, and has not begun", held: other, beats: true},
		{name: "in a hurry", held: other, begins: true, hasty: true},
		{name: "without a drain", held: other, begins: true, nowait: true},
		{name: "without a drain, kept", held: `{"id":"kept","weight":1}`, kept: true, nowait: true, want: Left},
		{name: "the app has ended", held: other, cause: ErrEnded},
		{name: "the app has ended, kept", held: `{"id":"kept","weight":1}`, kept: true, cause: ErrEnded, want: Left},
		{name: "handed over", held: `{"id":"kept","weight":1}`, kept: true, cause: ErrHandedOver},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			rdb := srv.Client(t)
			s, err := NewStore(rdb, fmt.Sprint("ns", i))
			must(t, err)
			ctx := t.Context()
			interval := 300 * time.Millisecond
			if c.beats {
				interval = 30 * time.Second // whoever waits for its silence waits for ever
			}
			do(t, s, "HSET", s.keys.Config(), "ttl_ms", 5*interval.Milliseconds(), "interval_ms", interval.Milliseconds())
			now := func() int64 { return rdb.Time(ctx).Val().UnixMilli() }
			a := host(1)
			// A balancer that acknowledges what drains, and nothing else from now on.
			read := func() Snapshot {
				snap, err := s.Read(ctx, web, nil)
				must(t, err)
				return snap
			}
			must(t, s.Acker("lb").Ack(ctx, web, read().Token))
			if c.held != "" {
				_, err := s.Beat(ctx, web, Beat{Addr: a, Token: "x", Meta: c.held})
				must(t, err)
				do(t, s, "ZADD", s.keys.Instances(web), now()-c.age.Milliseconds(), a.String())
			}
			if c.beats {
				stop := make(chan struct{})
				beating := make(chan struct{})
				defer func() { close(stop); <-beating }()
				go func() {
					defer close(beating)
					tick := time.NewTicker(50 * time.Millisecond)
					defer tick.Stop()
					for {
						select {
						case <-stop:
							return
						case <-tick.C:
							_, _ = s.Beat(context.WithoutCancel(ctx), web, Beat{Addr: a, Token: "other", Meta: other})
						}
					}
				}()
			}
			hurry := make(chan struct{})
			if c.hasty {
				close(hurry)
			}
			var kept []string
			cfg := BeaterConfig{Service: web, Addr: a, Weight: 1, DrainWait: time.Minute, Hurry: hurry, Keep: func(token string, _ time.Time) { kept = append(kept, token) }}
			switch {
			case c.nowait:
				cfg.DrainWait = 0
			case c.mute:
				cfg.DrainWait = interval
			}
			if c.kept {
				cfg.Token, cfg.Since = "kept", time.UnixMilli(t0)
			}
			l := &transcript{}
			b, err := NewBeater(cfg, s, zerolog.New(l))
			must(t, err)
			if c.begins {
				if _, err := b.Beat(ctx); !errors.Is(err, ErrNotOwner) {
					t.Fatalf("it begins with %v", err)
				}
			}
			begun := now()
			ended, cancel := context.WithCancelCause(ctx)
			cancel(c.cause)
			done := make(chan error, 1)
			go func() { done <- b.Run(ended) }()
			drained := false
			eventually(t, func() error {
				select {
				case err := <-done:
					must(t, err)
					return nil
				default:
				}
				snap := read()
				for _, e := range snap.Entries {
					if !c.mute && e.Present && e.Instance.Meta.ID == b.token && e.Instance.Meta.Draining {
						drained = true
						must(t, s.Acker("lb").Ack(ctx, web, snap.Token))
					}
				}
				return errors.New("it has not ended")
			})
			took := now() - begun
			note, _ := parseGone(gone(t, s, a))
			switch {
			case c.want == "" && (note != Gone{}):
				t.Errorf("left a note %+v", note)
			case c.want == "" && present(t, s, a) != (c.held != ""):
				t.Errorf("present: %v", present(t, s, a))
			case c.want != "" && (note.Reason != c.want || note.Token != b.token || present(t, s, a)):
				t.Errorf("left a note %+v, present: %v; said %q", note, present(t, s, a), l.said(t))
			}
			if drained != c.drains {
				t.Errorf("drained: %v", drained)
			}
			if c.held == other && c.want != "" && took+c.age.Milliseconds() <= 2*interval.Milliseconds() {
				t.Errorf("it was taken out %d ms after its last beat", took+c.age.Milliseconds())
			}
			if said := l.said(t); slices.Contains(said, "info: drained") != c.drains {
				t.Errorf("said %q", said)
			}
			if forgot := kept[len(kept)-1] == ""; forgot != !errors.Is(c.cause, ErrHandedOver) || kept[0] != b.token {
				t.Errorf("kept %q", kept)
			}
		})
	}
}
