package main

import (
	"fmt"
	"time"
)

// dies kills each cast's first member in such a way that all of them run out at
// the same moment, and returns their last heartbeat, unix ms by Redis' clock.
func (w *world) dies() (at int64) {
	for _, c := range w.casts() {
		c.die(c.members[0])
	}
	now, err := w.rdb.Time(w.ctx).Result()
	w.must(err)
	at = now.UnixMilli()
	for _, c := range w.casts() {
		w.beaten(c, c.members[0], at)
	}
	return at
}

// beaten makes at the time of m's last heartbeat.
func (w *world) beaten(c *cast, m *member, at int64) {
	w.must(w.rdb.ZAdd(w.ctx, c.key("{web}:instances"), z(float64(at), m.addr.String())).Err())
}

// between has f happen between a reaper's last pulse and the removal that this
// licenses, in every cast: the request to remove waits for it on its way.
func (w *world) between(f func()) {
	casts := w.casts()
	here, done := make(chan struct{}, len(casts)), make(chan struct{})
	defer close(done)
	for _, c := range casts {
		c.toReap.hold(c.key("let-go"), func() {
			here <- struct{}{}
			select {
			case <-done:
			case <-w.ctx.Done():
			}
		})
	}
	patience := time.After(3 * w.ttl)
	for i := range casts {
		select {
		case <-here:
		case <-patience:
			w.Fatalf("%d of %d casts were about to remove somebody at that moment", i, len(casts))
		}
		if i == 0 { // a licence lasts for a sixth of a TTL
			patience = time.After(w.ttl / 30)
		}
	}
	f()
}

// crowd has n more instances of another service beat in every cast.
func (w *world) crowd(n int) {
	beat := func() error {
		now, err := w.rdb.Time(w.ctx).Result()
		if err != nil {
			return err
		}
		p := w.rdb.Pipeline()
		for _, c := range w.casts() {
			p.SAdd(w.ctx, c.key("services"), "bulk")
			for i := range n {
				p.ZAdd(w.ctx, c.key("{bulk}:instances"), z(float64(now.UnixMilli()), fmt.Sprintf("10.1.0.%d:80", i)))
			}
		}
		_, err = p.Exec(w.ctx)
		return err
	}
	w.must(beat())
	w.watching.Go(func() {
		tick := time.NewTicker(w.beat / 2)
		defer tick.Stop()
		for {
			select {
			case <-w.ctx.Done():
				return
			case <-tick.C:
			}
			if err := beat(); err != nil && w.ctx.Err() == nil {
				w.Errorf("the crowd cannot beat: %v", err)
			}
		}
	})
}
