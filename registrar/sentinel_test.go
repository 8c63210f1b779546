package registrar

import (
	"context"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"rollcall/registrar/redistest"
)

// TestNewcomersDuringAnOutage starts instances at all times of a fail-over: each is
// registered soon after there is a primary again, however long it has been trying.
func TestNewcomersDuringAnOutage(t *testing.T) {
	t.Parallel()
	const bound = time.Second
	w := redistest.StartWatched(t, "m", 1)
	f, _ := follower(t, nil)
	w.Primary.Kill(t)

	stopped := make(chan struct{})
	starting := make(chan []*Beater)
	go func() { // one each 50 ms, for as long as there is no primary
		var all []*Beater
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stopped:
				starting <- all
				return
			case <-tick.C:
			}
			b, err := NewBeater(BeaterConfig{Service: web, Addr: netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), uint16(1000+len(all)))}, openFollowed(t, Access{}, f, w.URL(), 1), zerolog.Nop())
			if err != nil {
				t.Error(err)
				continue
			}
			start(t, b)
			all = append(all, b)
		}
	}()
	promoted := w.Promoted(t)
	at := time.Now()
	close(stopped)
	all := <-starting
	s, err := NewStore(promoted.Client(t), DefaultNamespace)
	must(t, err)
	eventually(t, func() error {
		snap, err := s.Read(context.WithoutCancel(t.Context()), web, nil)
		if err != nil {
			return err
		}
		if len(snap.Entries) < len(all) {
			return fmt.Errorf("%d of %d are registered", len(snap.Entries), len(all))
		}
		return nil
	})
	took := time.Since(at)
	t.Logf("%d newcomers were registered %v after all Sentinels named the new primary", len(all), took)
	if took > 3*bound {
		t.Errorf("%v, want %v, and here three times that at most", took, bound)
	}
}
