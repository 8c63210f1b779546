package registrar

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"
)

// An instance that comes and goes all the time costs every reader of its service two
// changes each time, and two entries of the log of changes, which has room for 10,000.
const (
	// dampAfter is how many departures within dampWithin begin the damping.
	dampAfter  = 3
	dampWithin = time.Minute
	// dampFirst is how long the return after that waits. Each further one waits twice
	// as long, dampMost at most: so one instance makes 2 changes a minute in the long run.
	dampFirst = 5 * time.Second
	dampMost  = time.Minute
	// dampQuiet without a change ends it. It is longer than dampMost, so that a wait
	// is no quiet time, and bounds who stays for just so long to 8 changes each time.
	dampQuiet = 2 * time.Minute
)

// Damping is how long an instance that comes and goes waits before it returns: the
// plain account of it. Its zero value is an instance that has never been there. It is
// for one goroutine at a time; now must not go back.
type Damping struct {
	in    bool
	since time.Time     // of in: the last change, or the end of the wait after it
	gone  []time.Time   // the last departures within dampWithin, at most dampAfter
	pause time.Duration // before the last return; 0 = it is not damped
}

// Came notes that the instance is there. It tells, once, whether that ends the damping.
func (d *Damping) Came(now time.Time) (ended bool) {
	if d.pause > 0 && now.Sub(d.since) >= dampQuiet {
		*d, ended = Damping{in: d.in, since: d.since}, true
	}
	if !d.in {
		d.in, d.since = true, now
	}
	return ended
}

// Went notes that the instance went for a reason that may come again: it was
// unhealthy, or its app ended. It tells, once, whether that begins the damping.
func (d *Damping) Went(now time.Time) (began bool) {
	if !d.in {
		return false
	}
	d.Came(now) // which may have been long ago
	d.gone = append(slices.DeleteFunc(d.gone, func(t time.Time) bool { return now.Sub(t) >= dampWithin }), now)
	switch {
	case d.pause > 0:
		d.pause = min(2*d.pause, dampMost)
	case len(d.gone) >= dampAfter:
		d.pause, began = dampFirst, true
	}
	d.gone = d.gone[max(0, len(d.gone)-dampAfter):]
	d.in, d.since = false, now.Add(d.pause)
	return began
}

// Wait is how long the instance has to wait now before it may return.
func (d *Damping) Wait(now time.Time) time.Duration {
	if d.in {
		return 0
	}
	return max(0, d.since.Sub(now))
}

// idle tells whether there is nothing to remember.
func (d *Damping) idle(now time.Time) bool { return !d.in && now.Sub(d.since) >= dampQuiet }

// askEvery paces the question whether others serve, while an instance waits: if the
// last of them goes, it returns so much later at most.
const askEvery = time.Second

// Damper has one instance wait before it returns if it comes and goes, through as
// many registrations as its caller gives it. The last of a service is never kept
// waiting, nor is anybody while the register does not answer. Any number of
// goroutines may use it.
type Damper struct {
	store *Store
	log   zerolog.Logger

	mu      sync.Mutex
	state   Damping // guarded by mu
	waiting int     // Holds that wait; guarded by mu
}

// NewDamper returns one of an instance that has never been there.
func NewDamper(store *Store, log zerolog.Logger) *Damper {
	return &Damper{store: store, log: log, state: Damping{since: time.Now()}}
}

// Beaten hears what became of each heartbeat, as BeaterConfig.Beaten does.
func (d *Damper) Beaten(err error) {
	if err != nil {
		return
	}
	d.mu.Lock()
	ended := d.state.Came(time.Now())
	d.mu.Unlock()
	if ended {
		d.log.Info().Dur("quiet", dampQuiet).Msg("it does not come and go any more; it returns at once again")
	}
}

// Left hears that a Run has ended, and for which cause it was cancelled.
func (d *Damper) Left(cause error) {
	if !errors.Is(cause, ErrUnhealthy) && !errors.Is(cause, ErrEnded) {
		return // on somebody's word, which is no flapping
	}
	d.mu.Lock()
	now := time.Now()
	began := d.state.Went(now)
	d.mu.Unlock()
	if began {
		d.log.Warn().Err(cause).Int("times", dampAfter).Dur("within", dampWithin).Dur("wait", dampFirst).Dur("most", dampMost).
			Msg("it comes and goes; each return waits longer now, unless nobody else serves")
	}
}

// Hold returns true when the instance may register: at once if it is not damped, if no
// other instance of svc serves by the register, or if that is not known. It returns
// false when ctx ends before. wait, if not nil, hears once how long it will take at
// most, if it has to wait at all; Hold waits for it.
func (d *Damper) Hold(ctx context.Context, svc Service, addr netip.AddrPort, wait func(most time.Duration)) bool {
	for first := true; ; first = false {
		most := d.Wait()
		if ctx.Err() != nil || most <= 0 {
			return ctx.Err() == nil
		}
		tctx, cancel := WithTimeout(ctx)
		others, err := d.store.OthersServe(tctx, svc, addr)
		cancel()
		if err != nil || !others {
			d.log.Debug().Err(err).Stringer("addr", addr).Msg("nobody else is known to serve; returning at once")
			return ctx.Err() == nil
		}
		if first {
			d.count(1)
			defer d.count(-1)
			if wait != nil {
				wait(most)
			}
		}
		pause := time.NewTimer(min(most, Shorten(askEvery)))
		select {
		case <-ctx.Done():
			pause.Stop()
			return false
		case <-pause.C:
		}
	}
}

func (d *Damper) count(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.waiting += n
}

// Wait is how long a return now has to wait at most.
func (d *Damper) Wait() time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.state.Wait(time.Now())
}

// Waiting tells whether a Hold waits.
func (d *Damper) Waiting() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.waiting > 0
}

// Idle tells whether there is nothing to remember: a new one would do the same.
func (d *Damper) Idle() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.waiting == 0 && d.state.idle(time.Now())
}

// othersLimit is how many members are looked at for one that serves.
const othersLimit = 50

// OthersServe tells whether the register has another instance of svc than addr that
// beats and is to get new requests: it is read, not draining, without an operator's
// drain or maint, and has a weight. What HAProxy's checks say of it is not asked.
func (s *Store) OthersServe(ctx context.Context, svc Service, addr netip.AddrPort) (bool, error) {
	k := s.keys.Of(svc)
	keys := []string{k.Instances(svc), k.Meta(svc), k.Admin(svc), k.Bound(svc), k.Config()}
	r, err := s.others.RunRO(ctx, s.rdb, keys, s.now, addr.String(), othersLimit, MaxMeta).Slice()
	if err != nil {
		return false, fmt.Errorf("read who else serves %s: %w", svc, err)
	}
	if len(r)%5 != 1 {
		return false, fmt.Errorf("read who else serves %s: answer of %d parts", svc, len(r))
	}
	found := Snapshot{Now: integer(r[0])}
	for m := range slices.Chunk(r[1:], 5) {
		found.add(text(m[0]), row{score: text(m[1]), meta: text(m[2]), admin: text(m[3]), bound: text(m[4]), hasScore: true})
	}
	return slices.ContainsFunc(found.Entries, func(e Entry) bool {
		return e.Present && e.Instance.State() == AdminNone && e.Instance.Weight() > 0
	}), nil
}
