package reaper

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"rollcall/registrar"
)

// idleService is how long a service of a Cluster must have been without
// instances before its reaper ends: longer than a sidecar takes to put the name
// back on the list.
const idleService = 2 * time.Minute

// Directory is what a Cluster needs of the whole register; *registrar.Store is
// one.
type Directory interface {
	Config(ctx context.Context, ttl, interval time.Duration, overwrite bool) (registrar.Times, error)
	Services(ctx context.Context) (names []registrar.Service, garbage []string, err error)
	Unlist(ctx context.Context, svcs ...registrar.Service) error
}

// Cluster reaps a Redis Cluster, where each service is a register of its own:
// one Reaper a service, unchanged, with its pulses, canary and sweeps in the
// service's slot. So each shard proves by itself that it accepts beats, what is
// proven of a service holds of its own keys wherever a slot moves, and a dead
// shard disarms the reapers of its own services and nobody else's.
//
// Only the rule on all instances together needs the others: each survey is told
// to all, of those services whose reaper is armed. What is not known of a dead
// shard, or not proven of one that has just come back, holds nobody elsewhere.
//
// It costs Redis about three calls a service each pulse, and a new connection
// with every third.
type Cluster struct {
	cfg   Config
	list  Directory
	of    func(registrar.Service) (Store, Canary)
	log   zerolog.Logger
	fleet fleet
	voice *voice // of all reapers together

	mu      sync.Mutex
	reapers map[registrar.Service]*Reaper // that run; guarded by mu
	listed  bool                          // the list has been read, at least once; guarded by mu
}

// NewCluster checks cfg; of returns what the Reaper of a service works with. It
// does no I/O.
func NewCluster(cfg Config, list Directory, of func(registrar.Service) (Store, Canary), log zerolog.Logger) (*Cluster, error) {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	// The others must hear of suspects while they decide.
	cfg.Sweep = min(cfg.Sweep, cfg.TTL/pulsesPerTTL)
	return &Cluster{cfg: cfg, list: list, of: of, log: log, voice: newVoice(log), fleet: fleet{of: map[registrar.Service]registrar.Count{}}, reapers: map[registrar.Service]*Reaper{}}, nil
}

// running is the reaper of one service.
type running struct {
	end  context.CancelFunc
	idle time.Time // since when it has had no instances; zero = it has some
}

// Run runs a Reaper for each service until ctx ends, and then returns nil. It
// returns an error that wraps ErrConfig if the register's times are others, or, where
// these cannot be read, those of one service.
func (c *Cluster) Run(parent context.Context) error {
	ctx, fail := context.WithCancelCause(parent)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer fail(nil)
	reapers := map[registrar.Service]*running{}
	wait := time.NewTimer(0)
	defer wait.Stop()
	var outage registrar.Outage
	configured, set := false, c.cfg.SetTTL
	for {
		select {
		case <-ctx.Done():
			if parent.Err() != nil {
				return nil
			}
			return context.Cause(ctx) // a reaper's error
		case <-wait.C:
		}
		if !configured {
			// The times of services that nobody has seen yet. A shard that is
			// away must not keep the others' services from being reaped.
			err := c.config(ctx)
			if errors.Is(err, ErrConfig) {
				return err
			}
			configured = err == nil
		}
		svcs, err := c.services(ctx)
		switch {
		case err == nil:
			outage.End()
		case ctx.Err() == nil && outage.Fail():
			c.log.Warn().Err(err).Msg("cannot list the services; going on with those that are known")
		}
		for _, svc := range svcs {
			if reapers[svc] == nil {
				rctx, end := context.WithCancel(ctx)
				reapers[svc] = &running{end: end}
				set, follows := set, configured
				wg.Go(func() {
					if err := c.reap(rctx, svc, set, follows); err != nil {
						fail(err)
					}
				})
			}
		}
		// Services that come later begin with the times that the register has then.
		set = set && (err != nil || !configured)
		c.retire(ctx, reapers)
		wait.Reset(registrar.Shorten(c.cfg.TTL / pulsesPerTTL))
	}
}

// config is Reaper.config for the whole register.
func (c *Cluster) config(ctx context.Context) error {
	t, err := readTimes(ctx, c.list, c.cfg, c.cfg.SetTTL)
	if err != nil {
		return err
	}
	return checkTimes(t, c.cfg)
}

func (c *Cluster) services(ctx context.Context) ([]registrar.Service, error) {
	tctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	svcs, garbage, err := c.list.Services(tctx)
	if err != nil {
		svcs = nil
	}
	c.mu.Lock()
	first := err == nil && !c.listed
	c.listed = c.listed || err == nil
	c.mu.Unlock()
	if first && len(garbage) > 0 {
		c.log.Warn().Strs("names", garbage[:min(len(garbage), shownErrors)]).Msg("ignoring what is no service name")
	}
	return svcs, err
}

// Status returns the state of the Reaper of each service that is known, and
// whether the list of services has ever been read. Any goroutine may call it.
func (c *Cluster) Status() (of map[registrar.Service]registrar.ReaperStatus, listed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	of = make(map[registrar.Service]registrar.ReaperStatus, len(c.reapers))
	for svc, r := range c.reapers {
		of[svc] = r.Status()
	}
	return of, c.listed
}

// reaper makes the Reaper of one service.
func (c *Cluster) reaper(svc registrar.Service) (*Reaper, error) {
	store, canary := c.of(svc)
	r, err := New(c.cfg, member{store, svc, &c.fleet}, canary, c.log.With().Str("of", string(svc)).Logger())
	if err != nil {
		return nil, err
	}
	r.voice = c.voice
	r.protection.others = func() []registrar.Count { return c.fleet.without(svc) }
	return r, nil
}

// reap runs the Reaper of svc. set says that it writes the times of the command, and
// follows that it takes over those that svc has.
func (c *Cluster) reap(ctx context.Context, svc registrar.Service, set, follows bool) error {
	defer c.fleet.forget(svc)
	r, err := c.reaper(svc)
	if err != nil {
		return err
	}
	r.cfg.SetTTL, r.follows = set, follows
	c.mu.Lock()
	c.reapers[svc] = r
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.reapers[svc] == r { // else the service came back meanwhile
			delete(c.reapers, svc)
		}
	}()
	return r.Run(ctx)
}

// retire ends the reapers of services that have been empty for long, and takes
// the names off the list.
func (c *Cluster) retire(ctx context.Context, reapers map[registrar.Service]*running) {
	now := time.Now()
	for svc, r := range reapers {
		switch count, known := c.fleet.count(svc); {
		case !known || count.Members != 0: // -1: no sorted set
			r.idle = time.Time{}
		case r.idle.IsZero():
			r.idle = now
		case now.Sub(r.idle) >= idleService:
			tctx, cancel := registrar.WithTimeout(ctx)
			err := c.list.Unlist(tctx, svc)
			cancel()
			if err != nil {
				continue // the next pass tries again
			}
			r.end()
			delete(reapers, svc)
		}
	}
}

// Once is Reaper.Once for each service, at the same time and each by itself:
// without the rule on all instances together. Services that cannot be swept are
// errors, and do not keep the others from it.
func (c *Cluster) Once(ctx context.Context, force bool) (Report, error) {
	unread := c.config(ctx)
	if errors.Is(unread, ErrConfig) {
		return Report{}, unread
	}
	svcs, err := c.services(ctx)
	if err != nil {
		return Report{}, err
	}
	reports, errs := make([]Report, len(svcs)), make([]error, len(svcs))
	var wg sync.WaitGroup
	for i, svc := range svcs {
		wg.Go(func() {
			r, err := c.reaper(svc)
			if err != nil {
				errs[i] = err
				return
			}
			r.protection.others = nil
			if reports[i], err = r.Once(ctx, force); err != nil {
				errs[i] = fmt.Errorf("%s: %w", svc, err)
			}
		})
	}
	wg.Wait()
	all := Report{Armed: true}
	for _, r := range reports {
		all.Armed = all.Armed && r.Armed
		all.Members += r.Members
		all.Stale += r.Stale
		all.Suspects += r.Suspects
		all.Removed = append(all.Removed, r.Removed...)
		all.Held = append(all.Held, r.Held...)
	}
	return all, errors.Join(append(errs, unread)...)
}

// fleet is what is known of all services of a Cluster: the last survey of each
// whose reaper is armed.
type fleet struct {
	mu sync.Mutex
	of map[registrar.Service]registrar.Count // guarded by mu
}

func (f *fleet) tell(svc registrar.Service, c registrar.Count) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.of[svc] = c
}

func (f *fleet) forget(svc registrar.Service) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.of, svc)
}

func (f *fleet) count(svc registrar.Service) (registrar.Count, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c, known := f.of[svc]
	return c, known
}

// without returns what is known of all services but one.
func (f *fleet) without(svc registrar.Service) []registrar.Count {
	f.mu.Lock()
	defer f.mu.Unlock()
	counts := make([]registrar.Count, 0, len(f.of))
	for s, c := range f.of {
		if s != svc {
			counts = append(counts, c)
		}
	}
	return counts
}

// member is the Store of one service's Reaper, which tells the fleet what it
// sees.
type member struct {
	Store
	svc   registrar.Service
	fleet *fleet
}

func (m member) Pulse(ctx context.Context, id, token string, expiry time.Duration) (registrar.Pulse, error) {
	p, err := m.Store.Pulse(ctx, id, token, expiry)
	if err != nil {
		m.fleet.forget(m.svc)
	}
	return p, err
}

func (m member) Survey(ctx context.Context, svcs []registrar.Service, now, cutoff, suspect int64) ([]registrar.Count, error) {
	counts, err := m.Store.Survey(ctx, svcs, now, cutoff, suspect)
	if err != nil || len(counts) != 1 || cutoff == 0 { // 0: not armed, so silence says nothing
		m.fleet.forget(m.svc)
	} else {
		m.fleet.tell(m.svc, counts[0])
	}
	return counts, err
}
