package docker

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/client"
	"github.com/rs/zerolog"

	"rollcall/registrar"
	"rollcall/registrar/regular"
)

const (
	// resync is the longest time between two lists of all containers. Events
	// make it a safety net.
	resync = 30 * time.Second
	// engineTimeout bounds one question to the Engine, and is the ceiling of the
	// delay between two tries. A busy Engine answers late.
	engineTimeout = 5 * time.Second
	// inspections is how many containers are inspected at a time.
	inspections = 8
	// exitPoll paces the wait for the exit code of a command whose output has
	// ended: the Engine notes the one a moment after the other.
	exitPoll = 10 * time.Millisecond
)

// Config is what an agent does.
type Config struct {
	// Engine is the Engine's URL; empty = what DOCKER_HOST and its companions say.
	Engine string
	// Advertise is the host's address, of ports that are published on all of
	// them. Internal needs none.
	Advertise netip.Addr
	// Internal registers containers at their own addresses: in Network, or in
	// the first of theirs by name.
	Internal bool
	Network  string
	// Explicit registers only what has a SERVICE_NAME.
	Explicit bool
	// Services are those that containers may be of; empty = every one.
	Services []registrar.Service
	Zone     string
	// DrainWait is the Beater's: how long a container that was told to stop is
	// kept, draining, at most. It ends when the container does.
	DrainWait time.Duration
	// LeaveWait is the Beater's: how long a container that stops or has ended is tried
	// to be taken out while Redis does not answer.
	LeaveWait time.Duration
	// Leave has every container leave when Run ends. Without it they stay, until
	// another agent goes on or their TTL ends. LeaveAtEnd sets it later.
	Leave bool
	// ID, if not empty, names this host's agent in the place of what the Engine says
	// of itself.
	ID string
	// Tell, if not nil, hears that the Engine answers (nil), or why the agent does not
	// follow it, when this changes. Run calls it and waits for it, of any number of
	// goroutines.
	Tell func(why error)
	// Beaten, if not nil, hears of every heartbeat as BeaterConfig.Beaten does, of
	// any number of goroutines.
	Beaten func(err error)
	// Unknown, if not nil, hears of each look at a container that could not be made,
	// of any number of goroutines.
	Unknown func()
}

// Agent registers the containers of one Engine.
type Agent struct {
	cfg    Config
	engine *client.Client
	store  *registrar.Store
	roll   *registrar.Roll
	log    zerolog.Logger
	asking chan struct{} // full while so many inspect
	relist chan struct{} // has room for one: list now
	reopen chan struct{} // has room for one: the Engine is there, so hear its events
	voice  registrar.Sparing
	leave  atomic.Bool // at the end

	// Set by Run while nobody else runs.
	mark      string        // of what this agent registers; empty = none
	lease     string        // its name
	holder    string        // of the lease, this process alone
	leased    bool          // it has the lease
	length    time.Duration // of the lease
	known     chan struct{} // closed when it is known what was registered here before
	inspected chan struct{} // closed when every container of the first list has been inspected

	dampers dampers
	claims  claims
	working sync.WaitGroup // the workers
	mu      sync.Mutex
	place   place                                          // guarded by mu
	workers map[string]*worker                             // by container; guarded by mu
	pending map[string]bool                                // containers of the first list that have not been inspected; nil = no list yet; guarded by mu
	spots   map[netip.AddrPort]map[registrar.Service]*spot // guarded by mu
	ledger  bool                                           // there is one; guarded by mu
	away    error                                          // why the Engine does not answer; guarded by mu
	standby error                                          // why the agent does not register, else; guarded by mu
}

// errUnasked is the Engine's state before its first answer.
var errUnasked = errors.New("the Engine has not been asked yet")

// New checks cfg. It does no I/O but to read the certificates that the
// environment names. Close frees what it returns.
func New(cfg Config, store *registrar.Store, log zerolog.Logger) (*Agent, error) {
	if !cfg.Internal && (!cfg.Advertise.IsValid() || cfg.Advertise.IsUnspecified()) {
		return nil, errors.New("want the host's address, or internal ones")
	}
	if cfg.Network != "" && !cfg.Internal {
		return nil, errors.New("a network is of internal addresses")
	}
	if len(cfg.ID) > registrar.MaxName {
		return nil, fmt.Errorf("id of %d bytes, at most %d", len(cfg.ID), registrar.MaxName)
	}
	// The client reads these, and would wait for a pipe's writer for ever.
	if dir := os.Getenv("DOCKER_CERT_PATH"); dir != "" {
		for _, name := range []string{"ca.pem", "cert.pem", "key.pem"} {
			if err := regular.CheckPath(filepath.Join(dir, name)); errors.Is(err, regular.ErrKind) {
				return nil, fmt.Errorf("docker engine: DOCKER_CERT_PATH: %w", err)
			}
		}
	}
	opts := []client.Opt{client.FromEnv}
	if cfg.Engine != "" {
		opts = append(opts, client.WithHost(cfg.Engine))
	}
	engine, err := client.New(opts...)
	if err != nil {
		return nil, fmt.Errorf("docker engine: %w", err)
	}
	a := &Agent{
		cfg:    cfg,
		place:  place{cfg.Advertise, cfg.Internal, cfg.Network, cfg.Explicit, cfg.Services, cfg.Zone},
		engine: engine, store: store, roll: registrar.NewRoll(store),
		log:    log.With().Str("component", "docker").Logger(),
		asking: make(chan struct{}, inspections), relist: make(chan struct{}, 1), reopen: make(chan struct{}, 1),
		holder: rand.Text(), workers: map[string]*worker{}, away: errUnasked,
	}
	a.leave.Store(cfg.Leave)
	return a, nil
}

// LeaveAtEnd has every container leave when Run ends, as Config.Leave does. Any number
// of goroutines may call it.
func (a *Agent) LeaveAtEnd() { a.leave.Store(true) }

// Close closes the connections to the Engine.
func (a *Agent) Close() error { return a.engine.Close() }

// Run registers the Engine's containers until ctx ends, and returns nil then. While
// another agent does, it stands by. It may be called once.
func (a *Agent) Run(ctx context.Context) error {
	a.identify(ctx)
	a.lease = leaseOf(a.mark, a.cfg.Services)
	for ctx.Err() == nil && a.stand(ctx) {
		a.lead(ctx)
	}
	return nil
}

// serve follows the Engine until ctx ends.
func (a *Agent) serve(ctx context.Context) {
	a.known, a.inspected = make(chan struct{}), make(chan struct{})
	a.mu.Lock()
	a.workers, a.pending, a.spots = map[string]*worker{}, nil, map[netip.AddrPort]map[registrar.Service]*spot{}
	a.mu.Unlock()
	var beside sync.WaitGroup
	defer beside.Wait()
	defer a.working.Wait()
	lost := make(chan error, 1)
	beside.Go(func() { a.sweep(ctx) })
	beside.Go(func() { a.follow(ctx) })
	beside.Go(func() { a.watch(ctx, lost) })

	wait := time.NewTimer(0)
	defer wait.Stop()
	for failures := 0; ; {
		select {
		case <-ctx.Done():
			return
		case <-a.relist:
		case err := <-lost:
			a.answered(err)
		case <-wait.C:
		}
		err := a.Reconcile(ctx)
		if ctx.Err() != nil {
			return
		}
		a.answered(err)
		if failures++; err == nil {
			failures = 0
			wait.Reset(registrar.Shorten(resync))
		} else {
			wait.Reset(retry(failures, err))
		}
	}
}

// Reconcile lists the containers that run, and has every one of them inspected,
// and also those that are known and not in the list.
func (a *Agent) Reconcile(ctx context.Context) error {
	ids, err := a.list(ctx)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	listed := map[string]bool{}
	for _, id := range ids {
		listed[id] = true
		a.post(ctx, id, note{what: look})
	}
	for id := range a.workers {
		if !listed[id] {
			a.post(ctx, id, note{what: missed})
		}
	}
	if a.pending == nil {
		if a.pending = listed; len(listed) == 0 {
			close(a.inspected)
		}
	}
	return nil
}

// list returns the ids of the containers that run.
func (a *Agent) list(ctx context.Context) (ids []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	list, err := a.engine.ContainerList(ctx, client.ContainerListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list the containers: %w", err)
	}
	for _, c := range list.Items {
		ids = append(ids, c.ID)
	}
	return ids, nil
}

// inspectedOne notes what an inspection that began at asked says of w: what it is to
// have while it runs.
func (a *Agent) inspectedOne(w *worker, wants []want, asked time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	w.seen = asked
	w.plans(wants)
	if a.pending[w.id] {
		if delete(a.pending, w.id); len(a.pending) == 0 {
			close(a.inspected)
		}
	}
}

// retry is the delay before the Engine is asked again after so many failures in a
// row. One that is not there is asked more often: that it is back matters, and costs it
// nothing.
func retry(failures int, err error) time.Duration {
	limit := engineTimeout
	if client.IsErrConnectionFailed(err) {
		limit = time.Second
	}
	return registrar.Backoff(failures, limit)
}

// answered notes whether the Engine answers.
func (a *Agent) answered(err error) {
	a.mu.Lock()
	before, known := a.away, len(a.workers)
	a.away = err
	a.mu.Unlock()
	switch {
	case err == nil && before == nil, err != nil && before != nil && before != errUnasked:
		return
	case err == nil:
		hint(a.reopen)
		a.log.Info().Int("containers", known).Msg("the engine answers")
	default:
		a.log.Warn().Err(err).Int("containers", known).Msg("the engine does not answer; beating for the containers that are known, retrying for ever")
	}
	if a.cfg.Tell == nil {
		return
	}
	if err != nil {
		err = fmt.Errorf("the engine does not answer: %w", err)
	}
	a.cfg.Tell(err)
}

// follow hears the Engine's events until ctx ends.
func (a *Agent) follow(ctx context.Context) {
	wait := time.NewTimer(0)
	defer wait.Stop()
	for failures := 1; ; failures++ {
		select {
		case <-ctx.Done():
			return
		case <-a.reopen:
		case <-wait.C:
		}
		if a.hear(ctx) {
			failures = 1
		}
		wait.Reset(registrar.Backoff(failures, engineTimeout))
	}
}

// hints are the events of interest. A container that changes otherwise is found
// by the next list.
var hints = client.Filters{}.
	Add("type", string(events.ContainerEventType), string(events.NetworkEventType)).
	Add("event", string(events.ActionStart), string(events.ActionKill), string(events.ActionDie), string(events.ActionDestroy),
		string(events.ActionPause), string(events.ActionUnPause), string(events.ActionHealthStatus),
		string(events.ActionConnect), string(events.ActionDisconnect))

// hear passes one stream of events on, until it ends. It tells whether there was
// one. What was missed until it began is in the list that it asks for.
func (a *Agent) hear(ctx context.Context) (heard bool) {
	streaming, cancel := context.WithCancel(ctx)
	stream := a.engine.Events(streaming, client.EventsListOptions{Filters: hints})
	defer func() {
		cancel()
		for range stream.Err { // until the client's goroutine has ended
		}
	}()
	select {
	case err := <-stream.Err:
		a.log.Debug().Err(err).Msg("no events")
		return false
	default:
	}
	hint(a.relist)
	for {
		select {
		case m := <-stream.Messages:
			a.dispatch(ctx, m)
		case err := <-stream.Err:
			a.log.Debug().Err(err).Msg("the stream of events has ended")
			hint(a.relist) // which finds out whether the Engine is there
			return true
		}
	}
}

// dispatch turns an event into a note for the container's worker.
func (a *Agent) dispatch(ctx context.Context, m events.Message) {
	id, n := m.Actor.ID, note{at: time.Unix(0, m.TimeNano)}
	switch {
	case m.Type == events.NetworkEventType:
		id = m.Actor.Attributes["container"]
	case m.Action == events.ActionKill:
		n.what, n.signal = killed, m.Actor.Attributes["signal"]
	case m.Action == events.ActionDie:
		n.what = died
	case m.Action == events.ActionDestroy:
		n.what = missed
	}
	if id == "" {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.post(ctx, id, n)
}

// post gives the container's worker something to see to; a container without one
// gets it for a look, whose worker runs until ctx ends. The caller holds mu.
func (a *Agent) post(ctx context.Context, id string, n note) {
	w := a.workers[id]
	switch {
	case w != nil:
	case n.what != look || ctx.Err() != nil:
		return // there is nothing to end
	default:
		w = &worker{agent: a, id: id, wake: make(chan struct{}, 1), regs: map[key]*registration{}}
		w.log = a.log.With().Str("container", facts{id: id}.shortID()).Logger()
		a.workers[id] = w
		a.working.Go(func() { w.run(ctx) })
	}
	// Another look says nothing more than the last one.
	if last := len(w.notes) - 1; n.what != look && n.what != missed || last < 0 || w.notes[last].what != n.what {
		w.notes = append(w.notes, n)
	}
	hint(w.wake)
}

// hint wakes who listens to ch, which has room for one: if it is full, somebody
// will look anyway.
func hint(ch chan<- struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// next takes the next note of w.
func (a *Agent) next(w *worker) (note, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(w.notes) == 0 {
		return note{}, false
	}
	n := w.notes[0]
	w.notes = w.notes[1:]
	return n, true
}

// retire forgets w, unless there is something more for it to see to.
func (a *Agent) retire(w *worker) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(w.notes) > 0 {
		return false
	}
	delete(a.workers, w.id)
	return true
}

// inspect asks the Engine for the facts of a container. With an error nothing is
// known; errdefs.IsNotFound tells those that say it is not there.
func (a *Agent) inspect(ctx context.Context, id string) (facts, error) {
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	select {
	case a.asking <- struct{}{}:
		defer func() { <-a.asking }()
	case <-ctx.Done():
		return facts{}, ctx.Err()
	}
	r, err := a.engine.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
	switch {
	case err != nil:
		return facts{}, fmt.Errorf("inspect container %s: %w", id, err)
	case r.Container.ID != id || r.Container.State == nil:
		return facts{}, fmt.Errorf("inspect container %s: the answer is not about it", id)
	}
	return read(r.Container), nil
}

// Status is what an agent knows at one time.
type Status struct {
	Away       error // why the Engine does not answer; nil = it does
	Standby    error // why the agent does not register, which is not the Engine's fault; nil = it does
	Containers int   // that run, as far as is known
	Instances  []InstanceStatus
}

// InstanceStatus is one port of a container.
type InstanceStatus struct {
	Service  registrar.Service
	Addr     netip.AddrPort
	Standing Standing
}

// Status may be called by any number of goroutines.
func (a *Agent) Status() Status {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := Status{Away: a.away, Standby: a.standby, Containers: len(a.workers)}
	for _, w := range a.workers {
		for k, r := range w.regs {
			s.Instances = append(s.Instances, InstanceStatus{k.service, k.addr, Standing(r.standing.Load())})
		}
	}
	slices.SortFunc(s.Instances, func(x, y InstanceStatus) int {
		return cmp.Or(cmp.Compare(x.Service, y.Service), x.Addr.Compare(y.Addr))
	})
	return s
}
