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

const (
	// maxSteps bounds the plans of one pass. A new server takes two, a leaving
	// one three.
	maxSteps = 6
	// maxOps bounds what is done before it is read back. Reading back reads the
	// whole backend, so it must not be done often: of 10,000 servers it takes as
	// long as a few hundred ops.
	maxOps = 5000
	// firstPoll and lastPoll pace the look at connections in use while a
	// server drains.
	firstPoll = 25 * time.Millisecond
	lastPoll  = 250 * time.Millisecond
	// waitPoll paces the look at what waits for others.
	waitPoll = time.Second
	// recent is how old an observation may be for a server to count as up a
	// moment ago.
	recent = 10 * time.Second
	// maxRetry is the longest pause after a failed exchange.
	maxRetry = time.Second
)

// backend keeps one backend true to one service. change, replaced and the like
// may be called by anybody; everything else belongs to the goroutine of run.
type backend struct {
	cfg      Config
	service  registrar.Service
	name     string
	mode     Mode
	balancer Balancer
	rules    rules
	refresh  func(registrar.Service)
	acked    func() // applied has changed; must not block
	looked   func() // there is something new in sights; must not block
	claims   *claims
	private  bool               // see BackendConfig
	outages  *registrar.Sparing // bounds what all backends say of a balancer that comes and goes
	refills  *registrar.Sparing // and of the backends of its new processes
	sums     *registrar.Sums    // and of changes, when there are many
	looks    *looks             // of all backends
	log      zerolog.Logger

	wake chan struct{} // of capacity 1: look at what mu guards

	mu       sync.Mutex
	view     notifier.View
	now      int64        // Redis' clock at the last change, unix ms
	broken   bool         // after an interruption, until a whole read a TTL later
	brokenAt int64        // its time, unix ms by Redis' clock
	viewAt   time.Time    // the last change came
	moved    time.Time    // the registry went to another server; zero = never
	cold     *lastService // serves while view knows nothing; nil = none
	dirty    map[netip.AddrPort]time.Time
	back     map[netip.AddrPort]bool // was there since the last step, and may have gone again
	doubted  map[netip.AddrPort]bool // had an old heartbeat when it was read after an interruption, and has had no server since
	reread   bool                    // the process was replaced, or may have been
	applied  registrar.Token         // the state that HAProxy has, read back; zero before the first
	status   BackendStatus           // after the last step; without Synced and Behind
	sights   sights                  // what was seen, for the register

	since      time.Time     // the oldest change that is not applied was heard; zero = none
	have       *Inventory    // nil: unknown
	seen       time.Time     // last complete answer
	readAt     time.Time     // last whole read
	readTook   time.Duration // by that
	nextFull   time.Duration
	rising     int                                  // who waited for its check at the last whole read, or since
	riseIn     time.Duration                        // from that read to the next look at them
	fast       map[netip.AddrPort]time.Time         // up in the process before, and when it was last known
	leaving    map[netip.AddrPort]*leaving          // being drained
	held       map[netip.AddrPort]time.Time         // due to leave, but kept; since when
	others     map[netip.AddrPort]registrar.Service // of silent ones, the service that beats there
	stale      bool                                 // a hold must not end before another read
	many       bool                                 // so many are absent without a note that they go one by one
	letGo      time.Time                            // the last of them went
	asked      time.Time                            // for a whole read of the register, because of these two
	unplaced   map[netip.AddrPort]bool              // no slot for it
	static     bool                                 // HAProxy refused a weight for the balance algorithm
	process    Process                              // that static and noOverflow are of
	memory     Known                                // of the inventory that was forgotten
	noOverflow bool                                 // HAProxy refused a server beside the slots
	postponed  map[netip.AddrPort]bool              // drain would leave nobody
	undone     bool                                 // HAProxy did not take all of it; a whole look shows what
	told       map[netip.AddrPort]order             // what servers with an agent have been told, and had then
	lookAt     time.Time                            // whether HAProxy has undone a placement; zero: nothing to look for
	fault      string                               // why the backend is not driven
	single     bool                                 // it is for one step, whose caller says what is wrong
	said       said
	refill     refill // of this step, or of one before that failed
	refilled   int    // commands of it
	polls      int
}

// order is what a server with an agent is told.
type order struct {
	state Admin
	none  bool // no weight
}

// refill is how a step says what it does. In another process than the one before all
// servers may have to be put back: that is one line, and none where processes come and
// go.
type refill int

const (
	noRefill refill = iota // each change is said
	saidRefill
	unsaidRefill
)

// leaving is the progress of one server's end.
type leaving struct {
	since    time.Time // drain began
	byWord   bool      // rollcall maint says so, of an instance that is still there
	maint    time.Time // maint was first seen; zero before
	putOff   int       // times that its deletion was put off
	deleteAt time.Time // the next try, not before; zero until it was put off
}

// deletable tells whether the deletion may be tried now.
func (l *leaving) deletable(now time.Time, quarantine time.Duration) bool {
	return !l.maint.IsZero() && now.Sub(l.maint) >= quarantine && !now.Before(l.deleteAt)
}

// wait puts the deletion off, each time for twice as long, from lastPoll up to
// limit.
func (l *leaving) wait(now time.Time, limit time.Duration) {
	l.deleteAt = now.Add(registrar.Shorten(min(lastPoll<<min(l.putOff, 16), limit)))
	l.putOff++
}

func newBackend(cfg Config, bc BackendConfig, bal Balancer, refresh func(registrar.Service), acked, looked func(), claims *claims, log zerolog.Logger) *backend {
	allow := bc.Allow
	if len(allow) == 0 {
		allow = cfg.Allow
	}
	return &backend{
		cfg: cfg, service: bc.Service, name: bc.Backend, mode: bc.Mode, balancer: bal, refresh: refresh, acked: acked, looked: looked, claims: claims, private: bc.Private,
		rules: rules{allow: allow, hold: cfg.Hold},
		log:   log.With().Str("service", string(bc.Service)).Str("backend", bc.Backend).Logger(),
		wake:  make(chan struct{}, 1), dirty: map[netip.AddrPort]time.Time{}, back: map[netip.AddrPort]bool{},
		fast: map[netip.AddrPort]time.Time{}, leaving: map[netip.AddrPort]*leaving{}, held: map[netip.AddrPort]time.Time{},
		outages: &registrar.Sparing{}, refills: &registrar.Sparing{}, sums: &registrar.Sums{}, looks: &looks{took: map[*backend]time.Duration{}},
		unplaced: map[netip.AddrPort]bool{}, said: said{}, postponed: map[netip.AddrPort]bool{}, doubted: map[netip.AddrPort]bool{},
		told: map[netip.AddrPort]order{}, others: map[netip.AddrPort]registrar.Service{},
	}
}

// change takes in one change of the service. It does not wait for HAProxy.
func (b *backend) change(c notifier.Change) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.now, b.viewAt, b.moved, b.cold = c.Now, time.Now(), c.Moved, nil
	switch {
	case c.Interrupted:
		b.broken, b.brokenAt = true, c.Now
	case c.Full && c.Now-b.brokenAt >= c.TTL.Milliseconds():
		// Whoever lives has beaten since, and this read has seen it.
		b.broken = false
	}
	for _, addr := range b.view.Apply(c) {
		if _, ok := b.dirty[addr]; !ok {
			b.dirty[addr] = c.Heard
		}
		e := b.view.Lookup(addr)
		if e.Garbage != "" || e.Present && b.rules.allowed(addr.Addr()) {
			b.back[addr] = true
		}
		// An interruption ends a TTL later, but not for the dead that it brought
		// back: they are in the register until a reaper is armed again.
		if e.Present && c.Now-e.Instance.Beat >= c.TTL.Milliseconds() && (b.broken || b.doubted[addr]) {
			b.doubted[addr] = true
		} else {
			delete(b.doubted, addr)
		}
	}
	b.signal()
}

// coldStart says what the list was at the end of an earlier process. It counts
// only while Redis has not answered.
func (b *backend) coldStart(l lastService) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.view.Known {
		b.cold = &l
		b.signal()
	}
}

// last returns the list of the service, and whether one is known. Anybody may
// call it.
func (b *backend) last() (lastService, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return lastService{b.view.Token, b.viewAt, list(&b.view)}, b.view.Known
}

// replaced says that HAProxy may have been replaced: read it whole.
func (b *backend) replaced() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.reread = true
	b.signal()
}

func (b *backend) signal() {
	select {
	case b.wake <- struct{}{}:
	default: // it has been told, and has not looked since
	}
}

// run keeps the backend true until ctx ends.
func (b *backend) run(ctx context.Context) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	outage := registrar.Outage{Shared: b.outages}
	defer b.sumUp(true)
	for {
		select {
		case <-ctx.Done():
			return
		case <-b.wake:
		case <-timer.C:
		}
		next, err := b.Step(ctx)
		b.sumUp(false)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			if failures, say := outage.End(); say {
				b.log.Info().Int("failures", failures).Msg("balancer answers again")
			}
			timer.Reset(min(next, b.sums.Wait()+time.Millisecond))
		default:
			if outage.Fail() {
				b.log.Warn().Err(err).Msg("balancer unknown; changing nothing, trying again")
			}
			timer.Reset(registrar.Backoff(outage.Failures, maxRetry))
		}
	}
}

// Step does all that can be done now and returns how long it may then wait,
// unless it is woken. After an error it knows nothing of the backend any more
// and reads it whole the next time.
func (b *backend) Step(ctx context.Context) (next time.Duration, err error) {
	b.mu.Lock()
	known, reread := b.view.Known, b.reread
	b.reread = false
	dirty := b.dirty
	b.dirty = make(map[netip.AddrPort]time.Time, 1)
	for addr := range b.back {
		delete(b.held, addr) // who goes once more is held once more
		delete(b.others, addr)
		delete(b.leaving, addr)
	}
	clear(b.back)
	token := b.view.Token
	b.mu.Unlock()
	defer func() {
		if err != nil {
			b.forget()
			return
		}
		b.refill, b.refilled = noRefill, 0
	}()
	for _, heard := range dirty {
		if b.since.IsZero() || heard.Before(b.since) {
			b.since = heard
		}
	}
	if !known {
		return time.Hour, b.serveCold(ctx) // woken by Redis, or by another process
	}

	now := time.Now()
	if reread {
		b.forget()
	}
	if left := b.nextFull - now.Sub(b.readAt); b.fault != "" && !reread && left > 0 {
		b.observeFault()
		return left, nil
	}
	var addrs []netip.AddrPort
	// What waits for other servers to be up, or for its own check to fail, must
	// see all of them: HAProxy's checks tell nobody. Who rises is looked at when
	// there is nothing else to do: a change need not wait for a whole read.
	waits := (len(b.held)+len(b.postponed) > 0 || b.undone) && now.Sub(b.readAt) >= waitPoll ||
		b.have != nil && b.have.Rising > 0 && len(dirty) == 0 && now.Sub(b.readAt) >= b.riseIn ||
		!b.lookAt.IsZero() && !now.Before(b.lookAt)
	whole := b.have == nil || waits || now.Sub(b.readAt) >= b.nextFull
	if whole {
		if addrs, err = b.readWhole(ctx); err != nil {
			return 0, err
		}
		if b.fault != "" {
			b.observeFault()
			return b.nextFull, nil
		}
	} else {
		if addrs, err = b.due(ctx, now, dirty); err != nil {
			return 0, err
		}
	}
	done, err := b.converge(ctx, b.settled(addrs), dirty)
	if err != nil {
		return 0, err
	}
	if b.refill == saidRefill && b.refilled > 0 {
		b.log.Info().Int("commands", b.refilled).Int("serving", b.have.Serving).Msg("filled again, in another process")
	}
	b.undone = !done || b.undone && !whole
	// A drain that waits is not applied, nor is what HAProxy refused; who is held or
	// found no slot is reported, and does not keep everybody else waiting.
	if !b.undone && len(b.postponed) == 0 {
		b.mu.Lock()
		news := b.applied != token
		b.applied = token
		b.mu.Unlock()
		if news {
			b.acked()
		}
		if news && !b.since.IsZero() && b.cfg.Applied != nil {
			b.cfg.Applied(b.config(), time.Since(b.since))
		}
		b.since = time.Time{}
	}
	silent := map[netip.AddrPort]bool{}
	b.mu.Lock()
	for a := range b.held {
		if b.silent(a, b.view.Lookup(a), now) {
			silent[a] = true
		}
	}
	b.status = BackendStatus{Serving: b.have.Serving, Held: len(b.held), Postponed: len(b.postponed), Unplaced: len(b.unplaced)}
	b.mu.Unlock()
	b.claims.keep(b, silent)
	if whole {
		b.nextFull = b.looks.spent(b, b.readTook, b.cfg.Full)
	}
	b.observe(addrs, whole)
	return b.pause(time.Now()), nil
}

// forget drops what is known of the backend, and remembers who was up.
func (b *backend) forget() {
	clear(b.told)
	b.lookAt = time.Time{}
	if b.have != nil {
		b.memory = b.have.remember()
		b.fast = map[netip.AddrPort]time.Time{}
		b.have.Each(func(s Server) {
			if s.Admin == Ready && s.Up {
				b.fast[s.Addr] = b.seen
			}
		})
	}
	b.have = nil
}

// readWhole reads the backend and returns every address that matters to it.
func (b *backend) readWhole(ctx context.Context) ([]netip.AddrPort, error) {
	begun := time.Now()
	defer func() { b.readTook = time.Since(begun) }()
	st, err := b.balancer.Read(ctx, b.name)
	if errors.Is(err, ErrNoBackend) {
		// HAProxy has answered: its configuration lacks the backend until it is reloaded.
		st, err = State{Process: b.process, Fault: err.Error() + "; correct --backend, or write the backend into haproxy.cfg"}, nil
	}
	if err != nil {
		return nil, err
	}
	if b.have != nil && !b.have.Process.Same(st.Process) {
		b.forget()
	}
	watched := b.process != Process{}
	if !b.process.Same(st.Process) { // perhaps with another configuration
		b.process, b.static, b.noOverflow = st.Process, false, false
		switch {
		case !watched:
		case b.refills.May():
			b.refill = saidRefill
		default:
			b.refill = unsaidRefill
		}
	}
	now := time.Now()
	b.readAt, b.nextFull, b.lookAt = now, registrar.Shorten(b.cfg.Full), time.Time{}
	b.judge(st)
	if b.fault != "" {
		b.forget()
		return nil, nil
	}
	// A slot that was free at the last look has been since then, and one that was
	// not is from now on. Of what was before the first look nothing is known.
	k := b.memory
	if b.have != nil {
		k = b.have.remember()
	}
	k.Allowed = b.rules.allowed
	if watched {
		k.Now = now
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if k.Instance = nil; b.view.Known {
		k.Instance = func(a netip.AddrPort) bool {
			e := b.view.Lookup(a)
			return e.Present || e.Gone != nil || e.Garbage != ""
		}
	}
	inv := NewInventory(st, k)
	inv.Dynamic = b.mode == Dynamic || b.mode == Auto && inv.Slots == 0
	inv.Overflow = b.mode == Auto && inv.Slots > 0 && !b.noOverflow
	inv.Checks, inv.Static = b.cfg.Checks, b.static
	inv.Private = b.private && !st.Process.AtLeast(3, 0)
	if b.mode == Slots && inv.Slots == 0 {
		return nil, fmt.Errorf("backend %s has no server-template slots of host %s", b.name, SlotHost)
	}
	// Who has risen must be known to be up when HAProxy starts anew, long before
	// the next full read.
	b.riseIn = min(2*b.riseIn, waitPoll)
	if inv.Rising != b.rising {
		b.riseIn = lastPoll
	}
	b.rising = inv.Rising
	b.have, b.seen = inv, now
	all := map[netip.AddrPort]bool{}
	b.view.Each(func(e registrar.Entry) { all[e.Addr] = true })
	for a := range inv.byAddr {
		all[a] = true
	}
	addrs := make([]netip.AddrPort, 0, len(all))
	for a := range all {
		addrs = append(addrs, a)
	}
	// The same choice at every balancer when not all of them fit.
	slices.SortFunc(addrs, netip.AddrPort.Compare)
	return addrs, nil
}

// judge says whether the backend can be driven as it is configured.
func (b *backend) judge(st State) {
	fault := st.Fault
	slots := slices.DeleteFunc(slices.Clone(st.Servers), func(s Server) bool { return !s.Slot })
	if fault == "" && len(slots) > 0 && !slices.ContainsFunc(slots, func(s Server) bool { return !s.Backup }) {
		fault = "all its slots are `backup`, which get no request while another server is up; give it a server-template without that word"
	}
	if b.private && len(slots) > 0 && !st.Process.AtLeast(3, 0) {
		b.once("private", "", func(l *zerolog.Event) {
			what := "a slot is used for a second instance only where no server can be added"
			if b.mode == Slots {
				what = "mode auto would add a server in the place of a used slot"
			}
			l.Str("so", what).Msg("http-reuse never: before HAProxy 3.0 a client's connection stays with the instance that a slot had before")
		})
	}
	if fault == b.fault {
		return
	}
	b.fault = fault
	switch {
	case b.single: // Once returns it
	case fault != "":
		b.log.Error().Str("why", fault).Msg("backend is not driven; its servers stay as they are")
	default:
		b.log.Info().Msg("backend is driven again")
	}
}

// due returns the addresses that have something to do: those that changed, and
// those whose waiting may be over.
func (b *backend) due(ctx context.Context, now time.Time, dirty map[netip.AddrPort]time.Time) ([]netip.AddrPort, error) {
	addrs := make([]netip.AddrPort, 0, len(dirty)+len(b.leaving))
	for a := range dirty {
		addrs = append(addrs, a)
	}
	var look []Server
	for a, l := range b.leaving {
		if s, ok := b.have.Lookup(a); ok && (s.Admin == Drain || !s.Slot && s.Busy != 0 && l.deletable(now, b.cfg.Quarantine)) {
			look = append(look, s)
		}
		addrs = append(addrs, a)
	}
	for a := range b.held {
		addrs = append(addrs, a)
	}
	for a := range b.unplaced {
		addrs = append(addrs, a)
	}
	for a := range b.postponed {
		addrs = append(addrs, a)
	}
	slices.SortFunc(addrs, netip.AddrPort.Compare)
	addrs = slices.Compact(addrs)
	// What a human did to a server since the last whole read must be seen
	// before it is changed.
	for a := range dirty {
		if s, ok := b.have.Lookup(a); ok && b.leaving[a] == nil {
			look = append(look, s)
		}
	}
	if len(look) == 0 {
		return addrs, nil
	}
	got, err := b.balancer.Peek(ctx, b.name, look)
	if err != nil {
		return nil, err
	}
	return addrs, b.enter(peeks(look), got)
}

// settled returns addrs without those that changed since the step began: what it read of
// them may be older than what a human did just before. The next step looks at them.
func (b *backend) settled(addrs []netip.AddrPort) []netip.AddrPort {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.dirty) == 0 {
		return addrs
	}
	return slices.DeleteFunc(slices.Clone(addrs), func(a netip.AddrPort) bool {
		_, changed := b.dirty[a]
		return changed
	})
}

func peeks(servers []Server) []Op {
	ops := make([]Op, len(servers))
	for i, s := range servers {
		ops[i] = Op{Name: s.Name, ID: s.ID}
	}
	return ops
}

// enter takes in what was read back.
func (b *backend) enter(ops []Op, got Applied) error {
	if !got.Process.Same(b.have.Process) {
		return fmt.Errorf("backend %s: %w", b.name, ErrReplaced)
	}
	b.seen = time.Now()
	b.have.Update(ops, got.Servers, b.seen)
	if got.Active >= 0 {
		b.have.Serving = got.Active // HAProxy's checks tell nobody else
	}
	return nil
}

// converge brings addrs as near to what the register says as can be now: first
// who shall serve, then who shall leave, so that a whole new set is there before
// the old one goes. It tells whether HAProxy took all of it.
func (b *backend) converge(ctx context.Context, addrs []netip.AddrPort, heard map[netip.AddrPort]time.Time) (done bool, err error) {
	done = true
	for _, goal := range []Goal{Serve, Leave} {
		all, err := b.pursue(ctx, heard, func(now time.Time) []Want { return b.wants(addrs, goal, now) })
		if err != nil {
			return false, err
		}
		// Who leaves is drained at once; its deletion may take longer.
		done = done && (all || goal == Leave)
	}
	b.finish(addrs)
	return done, nil
}

// pursue plans, applies and reads back until there is nothing left to do but to
// wait. It tells whether HAProxy took all of it.
func (b *backend) pursue(ctx context.Context, heard map[netip.AddrPort]time.Time, wants func(now time.Time) []Want) (done bool, err error) {
	var last []Op
	late := false
	for range maxSteps {
		now := time.Now()
		ws := wants(now)
		ops, unplaced := Plan(ws, b.have, now, b.cfg.Quarantine)
		b.place(ws, unplaced)
		if len(ops) == 0 {
			return !late, nil
		}
		if slices.Equal(ops, last) {
			return false, nil
		}
		for _, part := range parts(ops) {
			if err := b.apply(ctx, part, heard); err != nil {
				return false, err
			}
		}
		// A slot that has not got its address yet is nobody's: only a whole look finds
		// what it has then.
		late = late || slices.ContainsFunc(ops, func(o Op) bool {
			s, there := b.have.byName[o.Name]
			return o.Kind == SetAddr && (!there || s.Addr != o.Addr)
		})
		last = ops
	}
	return false, nil
}

// parts cuts a long plan. The ops of one server stay together.
func parts(ops []Op) [][]Op {
	var out [][]Op
	for len(ops) > maxOps {
		n := maxOps
		for n < len(ops) && ops[n].Name == ops[n-1].Name {
			n++
		}
		out = append(out, ops[:n:n])
		ops = ops[n:]
	}
	return append(out, ops)
}

// apply has the balancer carry out ops and takes in what became of them.
func (b *backend) apply(ctx context.Context, ops []Op, heard map[netip.AddrPort]time.Time) error {
	got, err := b.balancer.Apply(ctx, b.name, ops)
	if err != nil {
		return err
	}
	if b.have.Fickle && slices.ContainsFunc(ops, func(o Op) bool { return o.Kind == SetAddr }) {
		b.lookAt = time.Now().Add(waitPoll)
	}
	if err := b.enter(ops, got); err != nil {
		return err
	}
	b.tell(ops, got, heard)
	b.overflow(ops)
	if got.Static && !b.static {
		b.once("static", "", func(l *zerolog.Event) {
			l.Msg("the balance algorithm is static: every instance has the weight of the configuration")
		})
		b.static, b.have.Static = true, true
	}
	return nil
}

// serveCold fills an empty backend with the last list, while Redis is away. A
// backend that serves anybody of ours knows better.
func (b *backend) serveCold(ctx context.Context) error {
	b.mu.Lock()
	cold := b.cold
	b.mu.Unlock()
	if cold == nil {
		return nil
	}
	if _, err := b.readWhole(ctx); err != nil || b.fault != "" {
		return err
	}
	serves := false
	b.have.Each(func(s Server) { serves = serves || s.Admin == Ready })
	if serves {
		if b.refill != unsaidRefill {
			b.log.Info().Msg("the register cannot be read; the backend serves already, and stays as it is")
		}
		return nil
	}
	var wants []Want
	for _, i := range cold.Instances {
		if b.rules.allowed(i.Addr.Addr()) && i.State != Maint {
			wants = append(wants, Want{Insist: true, Addr: i.Addr, Goal: Serve, State: i.State, Weight: i.Weight})
		}
	}
	if b.refill != unsaidRefill {
		b.log.Warn().Time("read_at", cold.ReadAt).Int("instances", len(wants)).Msg("the register cannot be read and the backend is empty: serving an old list")
	}
	_, err := b.pursue(ctx, nil, func(time.Time) []Want { return wants })
	b.have = nil // what Redis says next is compared with all of it
	return err
}

// state returns the state of the service that HAProxy has, and whether there is
// one. Anybody may call it.
func (b *backend) state() (registrar.Token, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.applied, b.applied != registrar.Token{}
}

func (b *backend) config() BackendConfig {
	return BackendConfig{b.service, b.name, b.mode, b.rules.allow, b.private}
}

// standing returns how the backend stands. Anybody may call it.
func (b *backend) standing() BackendStatus {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.status
	s.BackendConfig, s.Synced = b.config(), b.applied != registrar.Token{}
	s.Behind = b.view.Token.Version - b.applied.Version
	if b.applied.Interrupted(b.view.Token) {
		s.Behind = b.view.Token.Version // what is applied is of another history
	}
	s.Standing = b.standings()
	return s
}

// notes are what is to be logged when mu is free: a log can block.
type notes []func()

func (n *notes) add(say func()) { *n = append(*n, say) }

func (n notes) say() {
	for _, f := range n {
		f()
	}
}

// wants turns what the register says of addrs into wants of one goal.
func (b *backend) wants(addrs []netip.AddrPort, goal Goal, now time.Time) []Want {
	var later notes
	kept := map[verdict][]netip.AddrPort{}
	ws := b.choose(addrs, goal, now, kept, &later)
	later.say()
	b.tellKept(kept)
	return ws
}

// read is what a decision on addr, which s holds if it is there, needs to know of the
// last read. The caller has mu.
func (b *backend) read(addr netip.AddrPort, s Server, there bool) read {
	return read{
		ttl: b.view.TTL, interval: b.view.Interval, moved: !b.moved.IsZero() && time.Since(b.moved) < registrar.FollowFor, empty: b.have.Serving == 0, doubted: b.doubted[addr],
		human: there && b.have.Human(s), parked: there && b.have.parked(&s), blank: b.have.Blank(addr), other: b.others[addr],
	}
}

// claimed notes that another service beats at addr, which is silent. One that the
// register does not mention may have been lost with the register's data, and is to come
// back within a TTL and two heartbeats. The caller has mu.
func (b *backend) claimed(addr netip.AddrPort, e registrar.Entry, now time.Time, later *notes) {
	if e.Present || e.Garbage != "" {
		delete(b.others, addr)
		return
	}
	if b.others[addr] != "" || !b.silent(addr, e, now) {
		return
	}
	if other := b.claims.other(addr, b.service); other != "" {
		b.others[addr] = other
		delete(b.held, addr)
		later.add(func() {
			b.once("other service", addr.String()+string(other), func(l *zerolog.Event) {
				l.Stringer("addr", addr).Str("other", string(other)).Msg("not held: another service has this address")
			})
		})
	}
}

// silent tells whether addr, of which a server is kept, is known not to beat. The caller
// has mu.
func (b *backend) silent(addr netip.AddrPort, e registrar.Entry, now time.Time) bool {
	since, held := b.held[addr]
	if !held || e.Present || e.Garbage != "" {
		return false
	}
	grace := b.view.TTL + 2*b.view.Interval
	return e.Gone != nil || now.Sub(since) >= grace && b.viewAt.Sub(since) >= grace
}

// choose is wants with what it has to say left for later.
func (b *backend) choose(addrs []netip.AddrPort, goal Goal, now time.Time, kept map[verdict][]netip.AddrPort, later *notes) []Want {
	b.mu.Lock()
	defer b.mu.Unlock()
	serving := b.have.Serving
	// Whose drain HAProxy has not carried out, or no longer knows of, is not
	// leaving: what holds for everybody holds for it.
	maps.DeleteFunc(b.leaving, func(a netip.AddrPort, _ *leaving) bool {
		s, there := b.have.Lookup(a)
		return there && s.Admin == Ready
	})
	for _, s := range b.have.extra {
		serving -= serves(s)
	}
	for _, addr := range addrs {
		if e := b.view.Lookup(addr); e.Present || e.Gone != nil || e.Garbage != "" {
			b.have.Hear(addr)
		}
	}
	// Who is drained or goes by absence must not count on who goes by a word.
	for _, addr := range addrs {
		b.claimed(addr, b.view.Lookup(addr), now, later)
		s, there := b.have.Lookup(addr)
		if v := b.rules.decide(b.view.Lookup(addr), s, there, b.read(addr, s, there)); v.goal == Leave && v.word && b.leaving[addr] == nil {
			serving -= serves(&s)
		}
	}
	floor := sync.OnceValue(b.share)
	var next netip.AddrPort
	if goal == Leave {
		next = b.pace(now, later)
	}
	wants := make([]Want, 0, len(addrs))
	for _, addr := range addrs {
		e := b.view.Lookup(addr)
		s, there := b.have.Lookup(addr)
		rd := b.read(addr, s, there)
		v := b.rules.decide(e, s, there, rd)
		if v.goal == Serve || there && !rd.parked {
			delete(b.doubted, addr) // it has a server, or nobody else has
		}
		if v.goal == Serve || v.goal == Keep && there { // of what is gone finish tells
			delete(b.leaving, addr)
		}
		if v.goal != Leave {
			delete(b.held, addr)
		}
		if v.goal != Serve {
			delete(b.unplaced, addr)
			delete(b.postponed, addr)
		}
		if e.Present && v.goal == Keep && v.why != "" {
			later.add(func() {
				b.once("not served", addr.String()+v.why, func(l *zerolog.Event) { l.Stringer("addr", addr).Str("why", v.why).Msg("not served") })
			})
		}
		if v.goal != goal {
			continue
		}
		w := Want{Addr: addr, Goal: goal}
		if goal == Serve {
			w.State, w.Weight = admin(e.Instance.State()), e.Instance.Weight()
			w.Fast = now.Sub(b.fast[addr]) < recent
			if there && b.have.Human(s) {
				later.add(func() { b.tellHuman(addr, s) })
			}
			if b.isLast(addr, w.State, s, serving, floor, later) {
				w.State = Ready
			} else if w.State != Ready || w.Weight == 0 {
				serving -= serves(&s)
			}
			w.Insist = b.insist(w, s, there)
			wants = append(wants, w)
			continue
		}
		if !v.word && b.leaving[addr] == nil {
			paced := b.many && e.Gone == nil && serves(&s) == 1
			if why, stays := b.mustStay(addr, v, serves(&s) == 1, serving, floor, now, paced && addr != next); stays {
				if v.why = why; why != "" {
					kept[v] = append(kept[v], addr)
				}
				continue
			}
			if paced {
				b.letGo = now
			}
		}
		if b.leaving[addr] == nil {
			b.leaving[addr] = &leaving{since: now}
			if !v.word {
				serving -= serves(&s)
			}
			b.polls = 0
		}
		l := b.leaving[addr]
		if s.Admin == Maint && l.maint.IsZero() {
			l.maint = now
		}
		if l.byWord && !v.now {
			l.since = now // its sessions have not been told to end before
		}
		l.byWord, w.Now = v.now, v.now
		w.Overdue = !v.now && now.Sub(l.since) >= b.cfg.DrainTimeout
		w.Settled = l.deletable(now, b.cfg.Quarantine)
		wants = append(wants, w)
	}
	return wants
}

// tellHuman says that s is left in maint.
func (b *backend) tellHuman(addr netip.AddrPort, s Server) {
	msg := "in maint by a human's hand; left alone"
	if s.Agent {
		msg = "in maint by its agent or by a human's hand; left alone"
	}
	b.once("human", s.Name, func(l *zerolog.Event) { l.Stringer("addr", addr).Str("server", s.Name).Msg(msg) })
}

// insist tells whether a server must be told what w says. Without an agent always;
// with one, until it has had it once: what it has after that its agent has made of it.
func (b *backend) insist(w Want, s Server, there bool) bool {
	if !there || !s.Agent {
		delete(b.told, w.Addr)
		return true
	}
	w = w.of(&s)
	o := order{w.State, w.Weight == 0}
	if s.Admin == w.State && (o.none || s.Weight > 0) {
		b.told[w.Addr] = o
	}
	got, had := b.told[w.Addr]
	return !had || got != o
}

// share is how many servers must be up of those that the register wants ready,
// by MinShare, rounded up. The caller has mu.
func (b *backend) share() int {
	if b.cfg.MinShare == 0 {
		return 0
	}
	ready := 0
	b.view.Each(func(e registrar.Entry) {
		if e.Present && admin(e.Instance.State()) == Ready && b.rules.allowed(e.Addr.Addr()) {
			ready++
		}
	})
	return (ready*b.cfg.MinShare + 99) / 100
}

// isLast tells whether a drain must wait because nobody else is up, or too few
// of those who shall be. maint does not wait: who says maint means it.
func (b *backend) isLast(addr netip.AddrPort, state Admin, s Server, serving int, floor func() int, later *notes) bool {
	if state != Drain || serves(&s) == 0 || serving > max(1, floor()) {
		delete(b.postponed, addr)
		return false
	}
	if !b.postponed[addr] {
		least := max(1, floor())
		later.add(func() {
			b.log.Warn().Stringer("addr", addr).Int("up", serving).Int("at_least", least).Msg("drain waits: too few other servers are up")
		})
	}
	b.postponed[addr] = true
	return true
}

// pace looks whether half of the servers that are up, and more than one, are absent
// with no note of how they went: a register that lost its data says so of the
// living too, when they cannot reach it. Then, until none is left, they go one each
// registrar.LetGoEvery, and pace returns who may go now, the longest held. The
// caller has mu.
func (b *backend) pace(now time.Time, later *notes) (next netip.AddrPort) {
	if len(b.held) < 2 && !b.many {
		return next
	}
	missing, oldest := 0, now
	for a, since := range b.held {
		s, there := b.have.Lookup(a)
		if e := b.view.Lookup(a); !there || serves(&s) == 0 || e.Present || e.Garbage != "" || e.Gone != nil {
			continue
		}
		missing++
		if since.Before(oldest) || since.Equal(oldest) && (!next.IsValid() || a.Compare(next) < 0) {
			next, oldest = a, since
		}
	}
	was := b.many
	b.many = missing > 0 && (was || missing > 1 && missing*2 >= b.have.Serving)
	if b.many && !was {
		up := b.have.Serving
		later.add(func() {
			b.once("many", "", func(l *zerolog.Event) {
				l.Int("absent", missing).Int("up", up).Dur("each", registrar.LetGoEvery).Msg("many are absent, and nobody said how they went; they are kept, and then go one by one")
			})
		})
	}
	if b.many && now.Sub(b.letGo) < registrar.LetGoEvery {
		return netip.AddrPort{}
	}
	return next
}

// mustStay tells whether a server that is due to leave by absence alone is kept
// for now: while its hold lasts, while others go before it (waits), and while it is
// among the last that are up. The first time it says why.
func (b *backend) mustStay(addr netip.AddrPort, v verdict, up bool, serving int, floor func() int, now time.Time, waits bool) (why string, stays bool) {
	since, held := b.held[addr]
	if !held {
		since = now
	}
	why = v.why
	stay := now.Sub(since) < v.hold
	if !stay && v.hold > 0 && b.viewAt.Sub(since) < v.hold {
		// Redis may be away since then: what was absent in its last answer may
		// have beaten a hundred times. Another read must say so too.
		stay, b.stale = true, true
	}
	stay = stay || waits
	if !stay && up && serving <= max(b.cfg.MinServers, floor()) {
		stay, why = true, fmt.Sprintf("only %d servers are up", serving)
	}
	if !stay {
		delete(b.held, addr)
		return "", false
	}
	b.held[addr] = since
	if held {
		why = ""
	}
	return why, true
}

// tellKept says who is kept: each of a few, the count of many. A Redis that comes
// back empty, perhaps again and again, must not fill the log.
func (b *backend) tellKept(kept map[verdict][]netip.AddrPort) {
	const few = 5
	for v, addrs := range kept {
		if len(addrs) > few {
			b.once("kept", v.why, func(l *zerolog.Event) {
				l.Int("instances", len(addrs)).Stringer("first", addrs[0]).Str("why", v.why).Dur("hold", v.hold).Msg("kept")
			})
			continue
		}
		for _, a := range addrs {
			b.once("kept", a.String()+v.why, func(l *zerolog.Event) {
				l.Stringer("addr", a).Str("why", v.why).Dur("hold", v.hold).Msg("kept")
			})
		}
	}
}

// overflow looks what became of servers that were added for want of a slot. A
// backend that cannot have them, for its balance algorithm, is not asked again.
func (b *backend) overflow(ops []Op) {
	if !b.have.Overflow {
		return
	}
	for _, o := range ops {
		if o.Kind != Add {
			continue
		}
		if _, there := b.have.byName[o.Name]; !there {
			b.have.Overflow, b.noOverflow = false, true
			return
		}
		addr, _ := dynamicAddr(o.Name)
		if _, was := b.fast[addr]; was || b.refill == unsaidRefill {
			continue // it was said of the process before
		}
		if free := b.have.Free(); free > 0 {
			b.tellOne("beside").Stringer("addr", addr).Int("free", free).Msg("served beside the slots: those that are free may not be used again yet")
			continue
		}
		b.log.Error().Stringer("addr", addr).Int("slots", b.have.Slots).Msg("no slot is left; served by a server that does not survive a reload; raise the server-template's count")
	}
}

// place keeps count of who found no slot.
func (b *backend) place(wants []Want, unplaced []netip.AddrPort) {
	before := len(b.unplaced)
	if len(wants) > 0 && wants[0].Goal != Serve {
		return // who leaves needs no slot
	}
	for _, w := range wants {
		delete(b.unplaced, w.Addr)
	}
	for _, a := range unplaced {
		b.unplaced[a] = true
	}
	if n := len(b.unplaced); n > before && b.have.Free() > 0 {
		return // until the quarantine of one ends
	} else if n > before {
		b.log.Error().Int("slots", b.have.Slots).Int("without", n).Msg("instances without a slot are not served; raise the server-template's count")
	} else if n == 0 && before > 0 {
		b.log.Info().Int("slots", b.have.Slots).Msg("every instance has a slot again")
	}
}

// finish settles what has reached its end.
func (b *backend) finish(addrs []netip.AddrPort) {
	now := time.Now()
	for _, a := range addrs {
		s, there := b.have.Lookup(a)
		if l := b.leaving[a]; l != nil {
			if !there {
				delete(b.leaving, a)
				delete(b.others, a)
				b.tellOne("gone").Stringer("addr", a).Msg("gone")
			} else if l.deletable(now, b.cfg.Quarantine) {
				l.wait(now, b.cfg.Full)
				if s.Busy > 0 {
					b.once("busy", a.String(), func(e *zerolog.Event) {
						e.Stringer("addr", a).Str("server", s.Name).Int("sessions", s.Busy).Msg("sessions of a leaving server have not ended; it stays in maint and is deleted after them")
					})
				}
			}
			continue
		}
		if !there {
			delete(b.held, a)
		} else if s.Admin == Ready && s.Weight > 0 {
			delete(b.fast, a)
		}
	}
}

// tell logs what was done: each change of a few, the count of many.
func (b *backend) tell(ops []Op, got Applied, heard map[netip.AddrPort]time.Time) {
	for _, r := range got.Refused {
		b.once("refused", r, func(l *zerolog.Event) { l.Str("haproxy", r).Msg("refused") })
	}
	if b.refill != noRefill {
		b.refilled += len(ops)
		return
	}
	const few = 20
	if len(ops) > few {
		b.tellMany("commands", len(ops)).Int("commands", len(ops)).Int("serving", b.have.Serving).Msg("changed")
		return
	}
	logged, deleted := "", map[string]bool{} // these are gone, or as they were
	for _, o := range ops {
		if o.Kind == Delete {
			deleted[o.Name] = true
		}
	}
	for _, o := range ops {
		s, ok := b.have.byName[o.Name]
		if !ok || o.Name == logged || b.have.parked(s) || deleted[o.Name] || o.Kind != SetReady && o.Kind != SetDrain && o.Kind != SetMaint && o.Kind != SetWeight {
			continue
		}
		logged = o.Name // a server's ops stand together
		l := b.tellOne(s.Admin.String()).Str("server", s.Name).Stringer("addr", s.Addr).Stringer("state", s.Admin).Int("weight", s.Weight)
		if t, ok := heard[s.Addr]; ok {
			l = l.Dur("took", time.Since(t))
		}
		l.Msg("changed")
	}
}

// tellOne begins the line of one change. Where there are many, it is for debug only,
// and sumUp counts it under its kind.
func (b *backend) tellOne(kind string) *zerolog.Event { return b.tellMany(kind, 1) }

// tellMany begins one line of n changes.
func (b *backend) tellMany(kind string, n int) *zerolog.Event {
	if b.sums.May(kind, n) {
		return b.log.Info()
	}
	return b.log.Debug()
}

// sumUp says what was not said singly, when its time has come or this is the last time.
func (b *backend) sumUp(last bool) {
	sum := b.sums.Take(last)
	if len(sum.Kinds) == 0 {
		return
	}
	b.mu.Lock()
	version, serving := b.applied.Version, b.status.Serving
	b.mu.Unlock()
	b.log.Info().Object("counts", sum).Dur("over", sum.Over).Int("serving", serving).Int64("version", version).
		Msg("many changes, summed up; debug has each")
}

// said is what has been reported, by kind and detail, and when.
type said map[string]map[string]time.Time

// once warns of what holds on, and not again for an hour. Of one kind it says a hundred
// things an hour, and then once that there are more.
func (b *backend) once(kind, detail string, say func(*zerolog.Event)) {
	const (
		again = time.Hour
		limit = 100
	)
	now := time.Now()
	of := b.said[kind]
	if of == nil {
		of = map[string]time.Time{}
		b.said[kind] = of
	}
	if t, ok := of[detail]; ok && now.Sub(t) < again {
		return
	}
	if len(of) >= limit {
		maps.DeleteFunc(of, func(_ string, t time.Time) bool { return now.Sub(t) >= again })
	}
	if len(of) > limit {
		return
	}
	of[detail] = now
	if len(of) > limit {
		b.log.Warn().Str("kind", kind).Int("said", limit).Msg("more of this kind; the next are not said before an hour is over")
		return
	}
	say(b.log.Warn())
}

// pause is how long Step has nothing to do unless it is woken.
func (b *backend) pause(now time.Time) time.Duration {
	next := b.nextFull - now.Sub(b.readAt)
	if len(b.leaving) > 0 {
		poll := min(firstPoll<<min(b.polls, 8), lastPoll)
		b.polls++
		for _, l := range b.leaving {
			next = min(next, max(poll, l.deleteAt.Sub(now)))
		}
	}
	if len(b.held) > 0 || len(b.unplaced) > 0 || len(b.postponed) > 0 || b.undone {
		next = min(next, waitPoll)
	}
	if len(b.unplaced) > 0 && b.have != nil && b.have.Free() > 0 {
		next = min(next, max(min(b.cfg.Quarantine, lastPoll), firstPoll))
	}
	if !b.lookAt.IsZero() {
		next = min(next, max(b.lookAt.Sub(now), 0))
	}
	if b.have != nil && b.have.Rising > 0 {
		if b.have.Rising > b.rising { // somebody came
			b.rising, b.riseIn = b.have.Rising, lastPoll
		}
		next = min(next, max(b.riseIn-now.Sub(b.readAt), firstPoll))
	}
	b.mu.Lock()
	ask := b.stale || len(b.doubted) > 0
	b.mu.Unlock()
	if ask {
		b.stale = false
		// The answer wakes the next step: asked for by each, it would never end.
		if pace := b.cfg.Full / 6; now.Sub(b.asked) >= pace {
			b.asked = now
			b.refresh(b.service)
			next = min(next, pace)
		} else {
			next = min(next, pace-now.Sub(b.asked))
		}
	}
	return max(next, time.Millisecond)
}
