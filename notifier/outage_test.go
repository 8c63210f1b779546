package notifier

import (
	"context"
	"fmt"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"rollcall/registrar"
)

// TestHourWithoutRedis has a Watcher try for an hour, by a simulated clock, where
// nobody listens, and counts what it says.
func TestHourWithoutRedis(t *testing.T) {
	for name, svcs := range map[string][]registrar.Service{"all services": nil, "one": {web}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, err := net.Listen("tcp", "127.0.0.1:0")
				must(t, err)
				must(t, l.Close())
				rdb, err := registrar.Open("redis://"+l.Addr().String()+"/0", 2)
				must(t, err)
				s, err := registrar.NewStore(rdb, registrar.DefaultNamespace)
				must(t, err)
				said := &logs{}
				w, err := New(Config{Services: svcs}, s, zerolog.New(said))
				must(t, err)
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				must(t, w.Run(ctx, func(c Change) { t.Errorf("a change of nothing: %+v", c) }))
				must(t, rdb.Close())
				// go-redis dials on once a second until it sees that its pool is closed.
				<-time.After(2 * time.Second)
				if n := said.count("\n"); n != 2 || said.count("redis does not answer") != 1 || said.count("no subscription") != 1 {
					t.Errorf("%d lines, want two:\n%s", n, said)
				}
			})
		})
	}
}

// TestOutagesAreSaidSparingly cuts the subscription again and again: the first times
// are said, and the log does not grow with the rest.
func TestOutagesAreSaidSparingly(t *testing.T) {
	w := newWorld(t)
	f := w.follow(Config{Services: []registrar.Service{web}})
	for n := range 12 {
		eventually(t, func() error {
			if s := f.w.Status(); !s.Subscribed || s.Subscriptions != int64(n+1) {
				return fmt.Errorf("%+v, want subscription %d", s, n+1)
			}
			return nil
		})
		must(t, w.rdb.Do(t.Context(), "CLIENT", "KILL", "TYPE", "pubsub").Err())
	}
	eventually(t, func() error {
		if s := f.w.Status(); s.Subscriptions != 13 {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	if lost, back := f.logs.count("no subscription"), f.logs.count("subscribed again"); lost != 8 || back != 8 {
		t.Errorf("12 cuts: %d and %d lines, want 8 of each", lost, back)
	}
}
