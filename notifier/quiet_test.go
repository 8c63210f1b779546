package notifier

import (
	"context"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"rollcall/registrar"
)

// TestQuietAmongMany has a client keep everybody silent, as it can where many listen:
// those who listen find each change within a second nevertheless.
func TestQuietAmongMany(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.join(web, 1, 1)
	const listeners = 400 // who are given a pause of 100 ms
	for range listeners {
		c, err := net.Dial("tcp", w.srv.Addr)
		must(t, err)
		t.Cleanup(func() { _ = c.Close() })
		_, err = fmt.Fprintf(c, "SUBSCRIBE %s\r\n", w.store.Keys().Changes())
		must(t, err)
	}
	f := w.follow(Config{Services: []registrar.Service{web}, Poll: time.Minute})
	f.subscribed()
	eventually(t, func() error {
		v, err := w.store.Versions(t.Context(), nil)
		if err == nil && v.Listeners <= listeners {
			err = fmt.Errorf("%d listen", v.Listeners)
		}
		return err
	})
	silence := open(t, w.srv.Addr, nil)
	ctx, cancel := context.WithCancel(t.Context())
	var keeping sync.WaitGroup
	defer keeping.Wait()
	defer cancel()
	keeping.Go(func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			silence.Set(ctx, w.store.Keys().Quiet(), "another's", 95*time.Millisecond)
		}
	})
	eventually(t, func() error { return silence.Get(t.Context(), w.store.Keys().Quiet()).Err() })
	var worst time.Duration
	for n := 2; n < 6; n++ {
		began := time.Now()
		w.join(web, n, 1)
		f.sees(web, n, weight(1))
		if n > 2 { // by then it knows how many listen
			worst = max(worst, time.Since(began))
		}
	}
	t.Logf("the slowest was seen after %v", worst)
	if worst > 5*time.Second {
		t.Error("that is longer than five polls")
	}
}
