// Package health finds out whether the app beside a sidecar can serve.
//
// A Check is one look; Parse makes one from a URL. State is what a row of
// looks comes to, as a pure value. A Prober looks again and again, and says when
// that changes. It knows nothing of the register.
package health

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/rs/zerolog"

	"rollcall/registrar"
)

// Defaults, which are HAProxy's own for its checks, but for the time-out.
const (
	DefaultInterval = 2 * time.Second
	DefaultTimeout  = time.Second
	DefaultRise     = 2
	DefaultFall     = 3

	MinInterval = 10 * time.Millisecond
	MinTimeout  = time.Millisecond
)

// startInterval paces the looks until the first one succeeds: an app that starts
// should serve when it can.
const startInterval = 250 * time.Millisecond

// ErrUnknown says that a look could not be made: for want of a process, a
// descriptor, memory or a right, say. It tells nothing of the app.
var ErrUnknown = errors.New("could not look")

// Check looks once. It returns nil if the app can serve, and else why not; an error
// that wraps ErrUnknown says neither. It returns soon after ctx ends, and is never
// called twice at a time.
type Check func(ctx context.Context) error

// Config is how to look.
type Config struct {
	Interval time.Duration // between the beginnings of two looks
	Timeout  time.Duration // of one look
	Rise     int           // successes in a row that make it healthy again; the first time one is enough
	Fall     int           // misses in a row that make it unhealthy
	Late     int           // misses before the first success after which that is said; 0 = as Fall
	// Log hears when looks cannot be made, and when they can again. Its zero value
	// says nothing.
	Log zerolog.Logger
	// Unknown, if not nil, hears of each look that could not be made, of Run's
	// goroutine.
	Unknown func()
}

// State is what all looks so far come to. The zero State has seen nothing and is
// not healthy.
type State struct {
	Healthy bool
	seen    bool // it has been healthy
	row     int  // looks in a row that contradict Healthy
}

// After returns the state after one more look.
func (s State) After(ok bool, rise, fall int) State {
	if ok == s.Healthy {
		s.row = 0
		return s
	}
	s.row++
	need := fall
	switch {
	case ok && !s.seen:
		need = 1
	case ok:
		need = rise
	}
	if s.row < need {
		return s
	}
	return State{Healthy: ok, seen: s.seen || ok}
}

// Change is a change of State, or says once that an app has not been healthy yet after
// as many misses as Config.Late. Cause is of the last miss.
type Change struct {
	Healthy bool
	Cause   error
}

// Prober looks again and again.
type Prober struct {
	cfg   Config
	check Check
	state State
	last  error // of the last look
	late  int   // misses; counts before the first success
	blind blindness
}

// New checks cfg.
func New(cfg Config, check Check) (*Prober, error) {
	switch {
	case cfg.Interval < MinInterval:
		return nil, fmt.Errorf("check interval %v: want %v or more", cfg.Interval, MinInterval)
	case cfg.Timeout < MinTimeout:
		return nil, fmt.Errorf("check timeout %v: want %v or more", cfg.Timeout, MinTimeout)
	case cfg.Rise < 1 || cfg.Fall < 1:
		return nil, fmt.Errorf("rise %d, fall %d: want 1 or more", cfg.Rise, cfg.Fall)
	}
	return &Prober{cfg: cfg, check: check}, nil
}

// Run looks until ctx ends, and sends every change of state to changes. It
// closes changes when it returns.
func (p *Prober) Run(ctx context.Context, changes chan<- Change) {
	defer close(changes)
	wait := time.NewTimer(0)
	defer wait.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-wait.C:
		}
		begun := time.Now()
		if changed := p.Probe(ctx); changed || p.overdue() {
			select {
			case changes <- Change{p.state.Healthy, p.last}:
			case <-ctx.Done():
				return
			}
		}
		interval := p.cfg.Interval
		if !p.state.seen {
			interval = min(interval, startInterval)
		}
		wait.Reset(max(0, registrar.Shorten(interval)-time.Since(begun)))
	}
}

// overdue tells once that the app has never been healthy and should be by now.
func (p *Prober) overdue() bool {
	if p.state.seen || p.late != cmp.Or(p.cfg.Late, p.cfg.Fall) {
		return false
	}
	p.late++ // further misses go on from there
	return true
}

// Probe looks once and tells whether that changed the state. A look that ctx cut
// short, or that could not be made, counts for nothing: the instance stays what it
// is for as long as that lasts, and a row of misses or successes goes on after it.
func (p *Prober) Probe(ctx context.Context) (changed bool) {
	tctx, cancel := context.WithTimeout(ctx, p.cfg.Timeout)
	defer cancel()
	err := p.check(tctx)
	if ctx.Err() != nil {
		return false
	}
	if errors.Is(err, ErrUnknown) {
		if p.blind.more(time.Now()) {
			p.cfg.Log.Warn().Err(err).Bool("healthy", p.state.Healthy).Int("looks", p.blind.looks).Msg("the app's health is unknown; the instance stays as it is")
		}
		if p.cfg.Unknown != nil {
			p.cfg.Unknown()
		}
		return false
	}
	if looks, say := p.blind.end(); say {
		p.cfg.Log.Info().Int("looks", looks).Msg("the app's health can be seen again")
	}
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("no answer within %v", p.cfg.Timeout)
	}
	p.last = err
	if err != nil {
		p.late++
	}
	before := p.state
	p.state = before.After(err == nil, p.cfg.Rise, p.cfg.Fall)
	return p.state.Healthy != before.Healthy
}
