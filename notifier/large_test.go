package notifier

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"rollcall/registrar"
)

// TestLargeService has a service's client make it necessary to read all of it, which is
// much, again and again: that is done for a part of the time, and another service's
// changes are seen meanwhile.
func TestLargeService(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	k := w.store.Keys()
	rdb := open(t, w.srv.Addr, nil)
	const size = 15_000
	for from := 0; from < size; from += 1000 {
		var scores, meta []any
		for i := from; i < from+1000; i++ {
			addr := fmt.Sprintf("10.7.%d.%d:80", i/250, i%250+1)
			scores, meta = append(scores, 1, addr), append(meta, addr, metaOf(1, 1))
		}
		must(t, rdb.Do(t.Context(), append([]any{"ZADD", k.Instances("large")}, scores...)...).Err())
		must(t, rdb.HSet(t.Context(), k.Meta("large"), meta...).Err())
	}
	w.join(web, 1, 1)
	f := w.follow(Config{Services: []registrar.Service{"large", web}, Poll: time.Hour})
	f.subscribed()
	f.sees(web, 1, weight(1))
	ctx, cancel := context.WithCancel(t.Context())
	var changing sync.WaitGroup
	defer changing.Wait()
	defer cancel()
	changing.Go(func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for v := 1; ctx.Err() == nil; v++ {
			rdb.Incr(ctx, k.ServiceVersion("large"))
			rdb.Publish(ctx, k.Changes(), fmt.Sprintf("1 large %d", v))
			select {
			case <-ctx.Done():
			case <-tick.C:
			}
		}
	})
	fulls := f.wholeReads()
	const lasts = 2 * time.Second
	begun, n, worst := time.Now(), 1, time.Duration(0)
	for time.Since(begun) < lasts || f.wholeReads() == fulls && time.Since(begun) < 30*time.Second {
		n++
		joined := time.Now()
		w.join(web, n, 1)
		f.sees(web, n, weight(1))
		worst = max(worst, time.Since(joined))
	}
	reads := f.wholeReads() - fulls
	t.Logf("%d whole reads of %d entries in %v; of %d changes of another service the slowest was seen after %v", reads, size, time.Since(begun), n-1, worst)
	if reads == 0 || reads > int(time.Since(begun)/(largeRead*largeShare))+3 {
		t.Errorf("%d whole reads", reads)
	}
}

// TestTimesAreFollowed changes the registry's times, which bumps no version: the poll
// finds them, also when they have been put right.
func TestTimesAreFollowed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.join(web, 1, 1)
	f := w.follow(Config{Services: []registrar.Service{web}, Poll: 50 * time.Millisecond, Full: time.Hour})
	f.subscribed()
	f.sees(web, 1, weight(1))
	for _, c := range []struct {
		stored any
		want   time.Duration
	}{{9000, 9 * time.Second}, {"1e18", registrar.DefaultTTL}, {60_000, time.Minute}, {15_000, 15 * time.Second}} {
		must(t, w.rdb.HSet(t.Context(), w.store.Keys().Config(), "ttl_ms", c.stored).Err())
		eventually(t, func() error {
			f.mu.Lock()
			defer f.mu.Unlock()
			if got := f.views[web].TTL; got != c.want {
				return fmt.Errorf("TTL %v, want %v", got, c.want)
			}
			return nil
		})
	}
	if n := f.interruptions(web); n != 0 {
		t.Errorf("%d interruptions", n)
	}
}
