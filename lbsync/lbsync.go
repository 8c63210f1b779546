package lbsync

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"rollcall/notifier"
	"rollcall/registrar"
)

// Defaults of Config.
const (
	DefaultFull         = 30 * time.Second       // between two whole reads of a backend, at most; see looks
	DefaultProbe        = 250 * time.Millisecond // of the balancer's process
	DefaultHold         = 5 * time.Minute        // of who is silent but whose check is up
	DefaultDrainTimeout = 30 * time.Second       // for connections in use
	DefaultQuarantine   = time.Second            // in maint, before a slot is used again or a server deleted
	DefaultMinServers   = 1                      // that are up, below which absence removes nobody

	coldAfter = 2 * registrar.Timeout // without an answer of Redis the last lists serve
	saveEvery = time.Second           // at most, while lists change
)

// Mode is how instances get servers.
type Mode string

// The modes. Auto takes slots if the backend has them.
const (
	Auto    Mode = "auto"
	Slots   Mode = "slots"
	Dynamic Mode = "dynamic"
)

// BackendConfig pairs a service with a backend.
type BackendConfig struct {
	Service registrar.Service
	Backend string
	Mode    Mode
	Allow   []netip.Prefix // in the place of Config.Allow; none = that
	// Private says that HAProxy ties connections to servers to one client's
	// connection each (http-reuse never), so that before 3.0 a slot that is used again
	// may go on serving the instance before.
	Private bool
}

// Former is services of an id, Config's or another, which its balancer no longer has.
type Former struct {
	ID       string              `json:"id"`
	Services []registrar.Service `json:"services"`
}

// Config says what to keep true, and how carefully. The zero value of a
// duration is its default.
type Config struct {
	// ID names this balancer in the register, where it says what it has applied: an
	// HAProxy and the backends of it that are this lbsync's. It is the same over
	// restarts.
	ID string
	// Former is what this balancer was before, and is no longer. The register forgets
	// it, and then Retired, if not nil, is called once.
	Former   []Former
	Retired  func()
	Backends []BackendConfig
	Allow    []netip.Prefix // of instances' addresses, for every backend without its own; none = DefaultAllow
	// Checks says that dynamic servers are added with a health check.
	Checks       bool
	Full         time.Duration
	Probe        time.Duration
	Hold         time.Duration
	DrainTimeout time.Duration
	Quarantine   time.Duration
	MinServers   int
	// MinShare is how many percent, 0 to 100, of the instances that shall be
	// ready must be up before a server that is up is drained, or goes by absence:
	// in a deployment the old set shrinks as the new one comes up. 0 = one.
	MinShare int
	// StateFile keeps the last lists for a start without Redis; empty = none.
	StateFile string
	// Applied, if not nil, hears how long a change took, from the hint or the
	// poll that told of it until HAProxy was read back with it. Several
	// goroutines call it, and wait for it.
	Applied func(b BackendConfig, took time.Duration)
	// Ready, if not nil, is called once, by Run, when every backend has been true
	// to its service.
	Ready func()
}

func (c *Config) defaults() {
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&c.Full, DefaultFull}, {&c.Probe, DefaultProbe}, {&c.Hold, DefaultHold},
		{&c.DrainTimeout, DefaultDrainTimeout}, {&c.Quarantine, DefaultQuarantine},
	} {
		if *d.field == 0 {
			*d.field = d.value
		}
	}
	if len(c.Allow) == 0 {
		c.Allow = DefaultAllow()
	}
}

// Check says what is wrong with c but for its id, which may be known later than the
// rest.
func (c Config) Check() error {
	c.defaults()
	return c.validate()
}

func (c *Config) validate() error {
	if len(c.Backends) == 0 {
		return errors.New("no backend: name at least one SERVICE=BACKEND")
	}
	seen := map[string]registrar.Service{}
	for _, b := range c.Backends {
		if other, ok := seen[b.Backend]; ok {
			return fmt.Errorf("backend %s is given to both %s and %s; one service a backend", b.Backend, other, b.Service)
		}
		seen[b.Backend] = b.Service
		switch b.Mode {
		case Auto, Slots, Dynamic:
		default:
			return fmt.Errorf("mode %q: want auto, slots or dynamic", b.Mode)
		}
	}
	for _, d := range []time.Duration{c.Full, c.Probe, c.Hold, c.DrainTimeout, c.Quarantine} {
		if d < 0 {
			return fmt.Errorf("duration %v: want more than 0", d)
		}
	}
	if c.MinServers < 0 {
		return fmt.Errorf("at least %d servers: want 0 or more", c.MinServers)
	}
	if c.MinShare < 0 || c.MinShare > 100 {
		return fmt.Errorf("share of %d %%: want 0 to 100", c.MinShare)
	}
	return nil
}

// Syncer keeps the backends of one balancer true to their services. Run may be
// called once.
type Syncer struct {
	cfg      Config
	balancer Balancer
	store    *registrar.Store
	watcher  *notifier.Watcher
	services []registrar.Service
	backends map[registrar.Service][]*backend
	claims   *claims
	log      zerolog.Logger

	acks     chan struct{}                         // of capacity 1: a backend has applied something
	acked    map[registrar.Service]registrar.Token // told to the register; for acknowledge alone
	acker    *registrar.Acker
	retiring []retiring // for acknowledge alone

	looks chan struct{}               // of capacity 1: a backend has seen something new
	told  map[registrar.Service]*told // what the register has been told of that; for publish alone
}

// retiring is what the register has yet to forget.
type retiring struct {
	*registrar.Acker
	service registrar.Service
	whole   bool // the balancer, and not this service of it alone
}

// New checks cfg and returns a Syncer. It does no I/O.
func New(cfg Config, bal Balancer, store *registrar.Store, log zerolog.Logger) (*Syncer, error) {
	cfg.defaults()
	if err := errors.Join(registrar.CheckBalancerID(cfg.ID), cfg.validate()); err != nil {
		return nil, err
	}
	s := &Syncer{
		cfg: cfg, balancer: bal, store: store, backends: map[registrar.Service][]*backend{}, claims: newClaims(),
		acks: make(chan struct{}, 1), acked: map[registrar.Service]registrar.Token{}, acker: store.Acker(cfg.ID),
		looks: make(chan struct{}, 1), told: map[registrar.Service]*told{},
		log: log.With().Str("component", "lbsync").Logger(),
	}
	// One outage of the balancer is said by each backend, and a few more are.
	few := len(cfg.Backends) + 7
	outages, refills := &registrar.Sparing{AtOnce: few}, &registrar.Sparing{AtOnce: few}
	all := &looks{took: map[*backend]time.Duration{}}
	var svcs []registrar.Service
	for _, bc := range cfg.Backends {
		if s.backends[bc.Service] == nil {
			svcs = append(svcs, bc.Service)
		}
		b := newBackend(cfg, bc, bal, func(svc registrar.Service) { s.watcher.Refresh(svc) }, s.applied, s.looked, s.claims, s.log)
		b.outages, b.refills, b.looks = outages, refills, all
		s.backends[bc.Service] = append(s.backends[bc.Service], b)
	}
	s.services = svcs
	for _, svc := range svcs {
		s.told[svc] = &told{}
	}
	for _, f := range cfg.Former {
		acker, whole := s.acker, f.ID != cfg.ID
		if whole {
			acker = store.Acker(f.ID)
		}
		for _, svc := range f.Services {
			s.retiring = append(s.retiring, retiring{acker, svc, whole})
		}
	}
	var err error
	s.watcher, err = notifier.New(notifier.Config{Services: svcs}, store, log)
	return s, err
}

// Run keeps the backends true until ctx ends, and returns nil then. It leaves
// the balancer as it is: stopping lbsync is no reason to stop serving.
func (s *Syncer) Run(ctx context.Context) error {
	var running sync.WaitGroup
	defer running.Wait()
	if s.cfg.StateFile != "" {
		last, err := loadLastGood(s.cfg.StateFile)
		if err != nil {
			s.log.Warn().Err(err).Msg("starting without the last lists")
		}
		for svc, l := range last.Services {
			s.watcher.Remember(svc, l.Token)
		}
		running.Go(func() { s.coldStart(ctx, last) })
		running.Go(func() { s.keep(ctx) })
	}
	for _, bs := range s.backends {
		for _, b := range bs {
			running.Go(func() { b.run(ctx) })
		}
	}
	running.Go(func() { s.probe(ctx) })
	running.Go(func() { s.acknowledge(ctx) })
	running.Go(func() { s.publish(ctx) })
	running.Go(func() { s.ask(ctx) })
	return s.watcher.Run(ctx, func(c notifier.Change) {
		for _, b := range s.backends[c.Service] {
			b.change(c)
		}
	})
}

// Status is how a Syncer stands.
type Status struct {
	Redis    notifier.Status
	Double   registrar.Double // of the service where that is worst
	Backends []BackendStatus
}

// BackendStatus is how one backend stood after the last look at it.
type BackendStatus struct {
	BackendConfig
	Synced    bool  // HAProxy has had the whole service once
	Behind    int64 // versions of the service that were heard of and are not in HAProxy
	Serving   int   // servers that HAProxy sent requests to
	Held      int   // due to leave by absence, but kept
	Postponed int   // drains that wait, because nobody else is up
	Unplaced  int   // instances without a slot
	// Standing is how the registered instances stand.
	Standing registrar.Standing
	// Fault is why the backend is not driven, for people; empty if it is.
	Fault string
}

// Status returns how the syncer stands. Any goroutine may call it.
func (s *Syncer) Status() Status {
	st := Status{Redis: s.watcher.Status(), Double: s.double()}
	for _, svc := range s.services {
		for _, b := range s.backends[svc] {
			st.Backends = append(st.Backends, b.standing())
		}
	}
	return st
}

// Once reads every service and brings every backend as near to it as can be
// without waiting. It returns an error if a backend is not driven, or an instance is
// refused or has no server.
func (s *Syncer) Once(ctx context.Context) error {
	var errs []error
	for svc, bs := range s.backends {
		snap, err := registrar.Try(ctx, func(ctx context.Context) (registrar.Snapshot, error) { return s.store.Read(ctx, svc, nil) })
		if err != nil {
			errs = append(errs, err)
			continue
		}
		// Of a service that nobody has ever registered as the caller may know which one is meant.
		if snap.Token.Version > 0 && !slices.ContainsFunc(snap.Entries, func(e registrar.Entry) bool { return e.Present }) {
			s.log.Warn().Str("service", string(svc)).Msg("nobody is registered as this service")
		}
		for _, b := range bs {
			b.single = true
			b.change(notifier.Change{Snapshot: snap, Heard: time.Now()})
			_, err := b.Step(ctx)
			if s.look(ctx, &look{}) > 0 && err == nil { // a server is kept that another service may have replaced
				_, err = b.Step(ctx)
			}
			if err == nil { // else it is not known what HAProxy has
				err = b.unserved()
			}
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (s *Syncer) applied() {
	select {
	case s.acks <- struct{}{}:
	default: // it has been told, and has not looked since
	}
}

// whole tells whether every backend has applied all of a state of its service.
func (s *Syncer) whole() bool {
	for _, bs := range s.backends {
		if _, ok := lowest(bs); !ok {
			return false
		}
	}
	return true
}

// acknowledge tells the register what has been applied, at once, and that this
// balancer lives, every few seconds.
func (s *Syncer) acknowledge(ctx context.Context) {
	timer := time.NewTimer(registrar.Shorten(publishAfter)) // what it follows is said soon, whatever has been applied
	defer timer.Stop()
	ready := s.cfg.Ready
	var outage registrar.Outage
	double := registrar.Sole
	var doubles doubleLog
	for {
		all := false
		select {
		case <-ctx.Done():
			return
		case <-s.acks:
		case <-timer.C:
			timer.Reset(registrar.Shorten(registrar.AckInterval))
			all = true
		}
		if ready != nil && s.whole() {
			ready()
			ready = nil
		}
		err := s.Acknowledge(ctx, all)
		if ctx.Err() != nil {
			return
		}
		if d := s.double(); d != double {
			double = d
			s.looked() // the register may have what the other sees
		}
		doubles.note(s.log.With().Str("id", s.cfg.ID).Logger(), double)
		if err != nil {
			if outage.Fail() {
				s.log.Warn().Err(err).Msg("cannot say what has been applied; trying again")
			}
		} else if _, say := outage.End(); say {
			s.log.Info().Msg("acknowledgements work again")
		}
	}
}

// doubleLog says when two lbsyncs acknowledge as one balancer, and when no longer.
type doubleLog struct {
	last  registrar.Double
	lines registrar.Sparing
}

func (l *doubleLog) note(log zerolog.Logger, d registrar.Double) {
	if d == l.last || !l.lines.May() {
		return
	}
	l.last = d
	switch d {
	case registrar.Sole:
		log.Info().Msg("this lbsync alone acknowledges as this balancer again")
	case registrar.First:
		log.Warn().Msg("another lbsync acknowledges as this balancer too, and is not heard: give it another --id")
	case registrar.Second:
		log.Error().Msg("another lbsync acknowledges as this balancer, and did so first: this one drives HAProxy and is not heard; give it another --id")
	}
}

// double tells how this balancer's id stands, for the service where that is worst.
func (s *Syncer) double() registrar.Double {
	worst := registrar.Sole
	for _, svc := range s.services {
		worst = max(worst, s.acker.Double(svc))
	}
	return worst
}

// Retire has the register forget this balancer, where nobody will know it by its
// id again. It is for after Run or Once.
func (s *Syncer) Retire(ctx context.Context) error {
	for _, svc := range s.services {
		s.retiring = append(s.retiring, retiring{s.acker, svc, true})
	}
	tctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	return errors.Join(s.acker.Follow(tctx, nil), s.retire(ctx))
}

// retire has the register forget what is to be forgotten, and keeps what it could
// not tell.
func (s *Syncer) retire(ctx context.Context) error {
	if len(s.retiring) == 0 {
		return nil
	}
	var errs []error
	s.retiring = slices.DeleteFunc(s.retiring, func(r retiring) bool {
		tctx, cancel := registrar.WithTimeout(ctx)
		defer cancel()
		err := r.Retire(tctx, r.service, r.whole)
		if err != nil && !errors.Is(err, registrar.ErrDouble) { // a process that has ended counts for some seconds
			errs = append(errs, err)
		}
		return err == nil
	})
	if len(s.retiring) == 0 && s.cfg.Retired != nil {
		s.cfg.Retired()
	}
	return errors.Join(errs...)
}

// Acknowledge tells the register, for each service, the state that every one of
// its backends has: for all services, or for those where that has changed. A
// service of which nothing has been applied yet is left out. With all it also has
// Config.Former forgotten, and says what this balancer follows.
func (s *Syncer) Acknowledge(ctx context.Context, all bool) error {
	var errs []error
	type answer struct {
		registrar.Token
		err error
	}
	answers := map[registrar.Service]*answer{}
	var telling sync.WaitGroup
	for svc, bs := range s.backends {
		t, ok := lowest(bs)
		if !ok {
			t, ok = refusing(bs)
		}
		if !ok || !all && s.acked[svc] == t {
			continue
		}
		a := &answer{Token: t}
		answers[svc] = a
		tell := func() {
			tctx, cancel := registrar.WithTimeout(ctx)
			defer cancel()
			a.err = s.acker.Ack(tctx, svc, t)
		}
		if s.store.Cluster() {
			telling.Go(tell) // a shard that hangs must not make this balancer late elsewhere
		} else {
			tell()
		}
	}
	telling.Wait()
	for svc, a := range answers {
		switch {
		case a.err == nil:
			s.acked[svc] = a.Token
		case errors.Is(a.err, registrar.ErrOtherHistory):
			// The watcher finds that out too, and what is applied then is of
			// the new one.
		case errors.Is(a.err, registrar.ErrDouble):
			delete(s.acked, svc) // the register has the other's word
		default:
			errs = append(errs, a.err)
		}
	}
	if all && s.watcher.Status().Answers { // else one more says that Redis is away
		tctx, cancel := registrar.WithTimeout(ctx)
		errs = append(errs, s.acker.Follow(tctx, s.follows()))
		cancel()
	}
	if all {
		errs = append(errs, s.retire(ctx))
	}
	return errors.Join(errs...)
}

// follows is each service with its backends.
func (s *Syncer) follows() map[registrar.Service][]string {
	of := map[registrar.Service][]string{}
	for svc, bs := range s.backends {
		for _, b := range bs {
			of[svc] = append(of[svc], b.name)
		}
	}
	return of
}

// refusing is version 0, if one of bs is not driven: so those who ask the register hear
// that a live balancer follows the service, and has applied nothing of it.
func refusing(bs []*backend) (registrar.Token, bool) {
	for _, b := range bs {
		if t := b.history(); b.standing().Fault != "" && t != (registrar.Token{}) {
			return t, true
		}
	}
	return registrar.Token{}, false
}

// lowest is the state that all of bs have applied.
func lowest(bs []*backend) (registrar.Token, bool) {
	var low registrar.Token
	for i, b := range bs {
		t, ok := b.state()
		if !ok || i > 0 && (t.ReplID != low.ReplID || t.Epoch != low.Epoch) {
			return low, false
		}
		if i == 0 || t.Version < low.Version {
			low = t
		}
	}
	return low, true
}

// probe looks which process answers, and has the backends read it whole when
// that is another one: a reload and a restart both begin with the
// configuration's servers alone.
func (s *Syncer) probe(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var last Process
	var outage registrar.Outage
	var reloads registrar.Sparing
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
			timer.Reset(registrar.Shorten(s.cfg.Probe))
		}
		p, err := s.balancer.Probe(ctx)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			if outage.Fail() {
				s.log.Warn().Err(err).Msg("balancer does not answer")
			}
			continue
		}
		failures, say := outage.End()
		switch {
		case !p.Same(last):
			if say || failures == 0 && reloads.May() {
				s.log.Info().Int("pid", p.PID).Str("version", p.Version).Msg("balancer found")
			}
			if last != (Process{}) {
				s.all((*backend).replaced)
			}
		case failures > 0:
			// The same process after a silence: what was sent before may have
			// run late.
			if say {
				s.log.Info().Msg("balancer answers again")
			}
			s.all((*backend).replaced)
		}
		last = p
	}
}

// coldStart hands the last lists to the backends that have heard nothing of
// Redis some time after the start.
func (s *Syncer) coldStart(ctx context.Context, last lastGood) {
	timer := time.NewTimer(coldAfter)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return
	case <-timer.C:
	}
	for svc, l := range last.Services {
		for _, b := range s.backends[svc] {
			b.coldStart(l)
		}
	}
}

// keep writes the lists to the file when they have changed, and at the end.
func (s *Syncer) keep(ctx context.Context) {
	tick := time.NewTicker(saveEvery)
	defer tick.Stop()
	var written map[registrar.Service]registrar.Token
	failing := false
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
		l, tokens := s.lists()
		if len(tokens) < len(s.services) || maps.Equal(tokens, written) {
			continue // half a file would forget the other half
		}
		err := l.save(s.cfg.StateFile)
		if err == nil {
			written = tokens
		} else if !failing {
			s.log.Warn().Err(err).Msg("a start without redis would serve older lists")
		}
		failing = err != nil
	}
}

// lists returns what is known of each service.
func (s *Syncer) lists() (lastGood, map[registrar.Service]registrar.Token) {
	l, tokens := lastGood{map[registrar.Service]lastService{}}, map[registrar.Service]registrar.Token{}
	for _, svc := range s.services {
		if last, known := s.backends[svc][0].last(); known { // all of them have the same view
			l.Services[svc], tokens[svc] = last, last.Token
		}
	}
	return l, tokens
}

func (s *Syncer) all(f func(*backend)) {
	for _, bs := range s.backends {
		for _, b := range bs {
			f(b)
		}
	}
}
