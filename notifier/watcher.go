package notifier

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"

	"rollcall/registrar"
)

// Defaults of Config.
const (
	DefaultPoll = 5 * time.Second  // of the version counters
	DefaultFull = 30 * time.Second // between two whole reads of a service, whatever its version
)

// A Ping goes out every pingEvery, unless something was heard in the second half of
// that; a subscription that has been silent for silence then is dead, so it is
// noticed within the sum of both.
// go-redis itself notices nothing for minutes: its health check writes a PING
// and never demands the Pong.
const (
	pingEvery = 500 * time.Millisecond
	silence   = 2400 * time.Millisecond
)

// compareEvery is how often the subscription's server is compared with the one
// that answers the reads, and lastSubscribe the longest pause between two tries
// to subscribe. A pool that could not dial says so for up to a second more; with
// that, either is done within 3 s.
const (
	compareEvery  = 500 * time.Millisecond
	lastSubscribe = 500 * time.Millisecond
)

const (
	// lastRetry is the longest pause after a failed exchange that another try within a
	// second does not mend.
	lastRetry = 5 * time.Second
	// awayRetry is the longest pause while Redis does not answer, or a shard of a
	// Cluster. What is said to a new primary waits for it, and instances that leave then
	// are gone a moment later. awayEach for each service that is followed bounds
	// what a dead shard's cost: 200 tries a second.
	awayRetry = 500 * time.Millisecond
	awayEach  = 5 * time.Millisecond
	// lieGap is the pace of the reads of one service that messages ask for and
	// that find less than the message said: anybody on the channel may send any
	// number of them. Lies may run ahead by lieAhead, so that 2 cost nothing. A
	// message that tells the truth is never made to wait: what comes faster than
	// it is read is read as one.
	lieGap   = time.Second
	lieAhead = time.Second
	// When the global version has gone on by more than a message tells, others
	// look at the counters too: each at another moment within gapSpread, and for a
	// tenth of the time at most.
	gapSpread = 50 * time.Millisecond
	gapShare  = 10
	// A round of reads every roundGap is enough of a burst, and leaves time for
	// everybody else; rounds may run ahead of that by roundAhead, so that 20 in a row
	// wait for nothing.
	roundGap   = 5 * time.Millisecond
	roundAhead = 100 * time.Millisecond
	// Where many listen, what all of them read must leave Redis its time: a service
	// read among ten costs it 11 us and alone 25, and a round the counters and two
	// round trips besides. From restFrom listeners on, a round of reads is followed by a rest of restEach for
	// each listener and service read, a fifth of a core in all; of restLongest at
	// most, since who drains waits 3 s for all. A change after a quiet time finds
	// everybody rested.
	restFrom    = 20
	restEach    = 100 * time.Microsecond
	restLongest = time.Second
	// crowdPoll is the pace of the polls there: 1,000 that poll so cost Redis some 3 % of
	// a core.
	crowdPoll = 900 * time.Millisecond
	// A service whose reads take longer than largeRead is read whole for a tenth of the
	// time at most: its sidecars can make that necessary as often as they like.
	largeRead  = 50 * time.Millisecond
	largeShare = 10
	// lookFresh is how long a look at the registry's name holds, for reads in a burst.
	lookFresh = 250 * time.Millisecond
	// pollChunk is the most counters read at once. 1,000 hold Redis for less
	// than a millisecond.
	pollChunk = 1000
)

// Config says what a Watcher follows.
type Config struct {
	// Services to follow; none means all, those that come later too.
	Services []registrar.Service
	Poll     time.Duration // 0 = DefaultPoll
	Full     time.Duration // 0 = DefaultFull, or Poll if that is longer
	// Ready, if not nil, is called once, by Run, when everything has been read.
	Ready func()
}

// Watcher follows services. Run may be called once; Refresh and Alive at any
// time, concurrently.
type Watcher struct {
	cfg   Config
	store *registrar.Store
	log   zerolog.Logger

	wake chan struct{} // of capacity 1: look at what mu guards

	mu       sync.Mutex
	hints    map[registrar.Service]hint // what to read
	every    bool                       // read all that is followed: subscribed again
	stranger bool                       // a message named a service that is not known
	alive    bool                       // the subscription answers
	status   Status                     // but for Subscribed, which is alive
	heard    time.Time                  // its last sign of life
	told     account

	// followed is changed by the goroutine of Run only, under mu. What it holds
	// is for that goroutine alone.
	followed map[registrar.Service]*progress

	// For the goroutine of Run only.
	due       bool                       // a poll is
	listAfter time.Time                  // a stranger is not looked for before
	reported  map[string]bool            // garbage, each said once
	waiting   map[registrar.Service]wait // hints that must not be followed yet
	listing   registrar.Outage           // of the list of services
	reads     registrar.Sparing          // what is said of single services
	listeners int64                      // of the channel, when the counters were last read
	paid      time.Time                  // rounds of reads are paid for until then
	rested    time.Time                  // until then there are no reads but urgent ones
	moves     int64                      // of the registry, before the reads of this step
	moved     time.Time                  // when the last of them was seen; zero = none was
	looked    time.Time                  // the registry's name was, last
	unsure    bool                       // that look failed
}

// account is how far messages tell everything. Changes that come in a burst are
// not announced one by one: who hears a global version that went on by more than
// the message explains reads the counters. In a Cluster, where a service has a
// version of its own, a message always explains itself.
type account struct {
	known   bool                        // what follows
	global  int64                       // version up to which no change was missed
	of      map[registrar.Service]int64 // versions of services then
	highest int64                       // global version that a message named
	look    time.Time                   // when to read the counters; zero = no need
	pause   time.Time                   // not before
}

// hear takes a message into account, and tells whether it leaves a gap.
func (a *account) hear(global int64, svc registrar.Service, version int64) (gap bool) {
	if !a.known || global <= a.global {
		return false
	}
	a.highest = max(a.highest, global)
	was, known := a.of[svc]
	if global > a.global+1 && !(known && version-was >= global-a.global) {
		return true
	}
	a.global = global
	if known {
		a.of[svc] = version
	}
	return false
}

// progress is what a Watcher knows of one service.
type progress struct {
	token  registrar.Token
	known  bool             // it has been read
	times  [2]time.Duration // the registry's TTL and interval then
	tried  time.Time        // the last read began
	paid   time.Time        // lies are paid for until then
	scan   time.Time        // a large service is not read whole before, but for a full read
	outage registrar.Outage
}

func (p *progress) pay(d time.Duration) {
	if now := time.Now(); p.paid.Before(now) {
		p.paid = now
	}
	p.paid = p.paid.Add(d)
}

// hint is a reason to read a service.
type hint struct {
	heard time.Time
	full  bool
	sure  bool  // somebody else than a message says so
	says  int64 // the highest version that messages named
}

// and joins two reasons: the earlier time, the wider reading.
func (h hint) and(o hint) hint {
	if h.heard.IsZero() || !o.heard.IsZero() && o.heard.Before(h.heard) {
		h.heard = o.heard
	}
	return hint{heard: h.heard, full: h.full || o.full, sure: h.sure || o.sure, says: max(h.says, o.says)}
}

// wait is a hint and when its time comes.
type wait struct {
	hint
	at time.Time
}

// New checks cfg and returns a Watcher. It does no I/O.
func New(cfg Config, store *registrar.Store, log zerolog.Logger) (*Watcher, error) {
	if cfg.Poll == 0 {
		cfg.Poll = DefaultPoll
	}
	if cfg.Full == 0 {
		cfg.Full = max(DefaultFull, cfg.Poll)
	}
	if cfg.Poll < 0 || cfg.Full < cfg.Poll {
		return nil, fmt.Errorf("poll %v and full read %v: want 0 < poll <= full read", cfg.Poll, cfg.Full)
	}
	w := &Watcher{
		cfg: cfg, store: store, log: log.With().Str("component", "watcher").Logger(),
		wake:  make(chan struct{}, 1),
		hints: map[registrar.Service]hint{}, followed: map[registrar.Service]*progress{},
		reported: map[string]bool{}, waiting: map[registrar.Service]wait{},
	}
	for _, svc := range cfg.Services {
		w.followed[svc] = &progress{}
	}
	return w, nil
}

// Refresh asks for a whole read of svc soon. A service that is not followed is
// ignored.
func (w *Watcher) Refresh(svc registrar.Service) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.note(svc, hint{heard: time.Now(), full: true, sure: true})
	w.signal()
}

// Remember says which state of svc was the last that an earlier process read, so
// that the first read can tell whether it is of the same history. It must be
// called before Run.
func (w *Watcher) Remember(svc registrar.Service, t registrar.Token) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if p := w.followed[svc]; p != nil {
		p.token = t
	}
}

// Alive tells whether the subscription has answered lately.
func (w *Watcher) Alive() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.alive
}

// Status is how a Watcher stands with Redis.
type Status struct {
	Answers       bool  // the last exchange succeeded, and there was one
	Refused       bool  // it did not, for want of a right or a password: Redis is not away
	Subscribed    bool  // the subscription has answered lately
	Subscriptions int64 // made so far; all but the first are reconnects
}

// Status returns how the watcher stands. Any goroutine may call it.
func (w *Watcher) Status() Status {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.status
	s.Subscribed = w.alive
	return s
}

func (w *Watcher) answers(yes, refused bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.status.Answers, w.status.Refused = yes, refused
}

// Run follows until ctx ends, and returns nil then. It calls handle for every
// change, one at a time and in order for each service; handle must not block
// for long, since it holds up every other service. Changes that come faster
// than they are read are read as one.
func (w *Watcher) Run(ctx context.Context, handle func(Change)) error {
	var listening sync.WaitGroup
	listening.Go(func() { w.listen(ctx) })
	defer listening.Wait()

	every := w.cfg.Poll // by how many listen
	poll, full := time.NewTimer(registrar.Shorten(every)), time.NewTimer(registrar.Shorten(w.cfg.Full))
	again := time.NewTimer(lastRetry)
	defer poll.Stop()
	defer full.Stop()
	defer again.Stop()
	w.due = true
	var outage registrar.Outage
	ready := w.cfg.Ready
	for {
		err := w.Step(ctx, handle)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			if outage.Fail() {
				say := "redis does not answer; what is known stays in force"
				if registrar.Refused(err) {
					say = "redis refuses; what is known stays in force"
				}
				w.log.Warn().Err(err).Msg(say)
			}
			w.answers(false, registrar.Refused(err))
			again.Reset(registrar.Backoff(outage.Failures, w.away()))
		default:
			if failures, say := outage.End(); say {
				w.log.Info().Int("failures", failures).Msg("redis answers again")
			}
			w.answers(true, false)
			if ready != nil {
				ready()
				ready = nil
			}
			again.Reset(w.pause(time.Now()))
		}
		if now := w.pollEvery(); now != every {
			every = now
			poll.Reset(registrar.Shorten(every))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-w.wake:
		case <-again.C:
		case <-poll.C:
			poll.Reset(registrar.Shorten(every))
			w.due = true
		case <-full.C:
			full.Reset(registrar.Shorten(w.cfg.Full))
			w.all(hint{heard: time.Now(), full: true, sure: true})
		}
	}
}

// Step polls if that is due and reads what there is a reason to read. An error
// means that Redis does not answer; every reason is kept. Step, Poll and Follow
// belong to the goroutine of Run.
func (w *Watcher) Step(ctx context.Context, handle func(Change)) (err error) {
	if time.Now().Before(w.rested) && !w.urgent() {
		return nil // as after the last step, which was no failure
	}
	defer func() {
		if err != nil {
			w.rested = time.Time{}
		}
	}()
	w.mu.Lock()
	if !w.told.look.IsZero() && !time.Now().Before(w.told.look) {
		w.due = true
	}
	if w.every || w.stranger && !time.Now().Before(w.listAfter) {
		w.due = true
	}
	w.mu.Unlock()
	if w.due {
		if err = w.Poll(ctx); err != nil {
			return err
		}
	}
	if moves := w.store.Moves(); moves != w.moves {
		w.moves, w.moved = moves, time.Now()
	}
	return w.Follow(ctx, handle)
}

// urgent tells whether there is something to read that is not a change.
func (w *Watcher) urgent() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.every {
		return true
	}
	for _, h := range w.hints {
		if h.full {
			return true
		}
	}
	return false
}

// rest begins a rest after a round of reads.
func (w *Watcher) rest(services int) {
	if services == 0 {
		return
	}
	now := time.Now()
	if w.paid.Before(now) {
		w.paid = now
	}
	w.paid = w.paid.Add(roundGap)
	w.rested = w.paid.Add(-roundAhead)
	if w.listeners >= restFrom {
		crowd := now.Add(min(time.Duration(w.listeners)*time.Duration(services)*restEach, restLongest))
		if crowd.After(w.rested) {
			w.rested = crowd
		}
	}
}

// pause is how long Step has nothing to do unless it is woken.
func (w *Watcher) pause(now time.Time) time.Duration {
	if now.Before(w.rested) {
		return w.rested.Sub(now)
	}
	next := now.Add(w.retry())
	for _, l := range w.waiting {
		if l.at.Before(next) {
			next = l.at
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stranger && w.listAfter.Before(next) {
		next = w.listAfter
	}
	if !w.told.look.IsZero() && w.told.look.Before(next) {
		next = w.told.look
	}
	return max(next.Sub(now), time.Millisecond)
}

// pollEvery is how often the counters are read. Where many listen an announcement may
// be left to another client, which may be any that may beat: whoever keeps silent
// delays nobody's change for longer than this.
func (w *Watcher) pollEvery() time.Duration {
	if w.listeners >= restFrom {
		return min(w.cfg.Poll, crowdPoll)
	}
	return w.cfg.Poll
}

// retry is the longest pause after a failed exchange.
func (w *Watcher) retry() time.Duration { return min(w.cfg.Poll, lastRetry) }

// away is the longest pause while Redis does not answer.
func (w *Watcher) away() time.Duration {
	return min(w.retry(), max(awayRetry, time.Duration(len(w.followed))*awayEach))
}

// Poll reads the version counters and notes every service whose state is not
// the one last read; after a new subscription it notes every service.
func (w *Watcher) Poll(ctx context.Context) error {
	heard := time.Now()
	w.mu.Lock()
	every, stranger, claimed := w.every, w.stranger, w.told.highest
	w.every, w.stranger, w.told.look, w.told.highest = false, false, time.Time{}, 0
	w.mu.Unlock()
	svcs, err := w.services(ctx, stranger)
	if err == nil {
		err = w.compare(ctx, svcs, every, heard)
	}
	if err == nil {
		w.due = false
		w.mu.Lock()
		defer w.mu.Unlock()
		now := time.Now()
		w.told.pause = now.Add(gapShare * now.Sub(heard))
		if w.told.global < claimed { // somebody lied
			w.told.pause = now.Add(lieGap)
		}
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.every, w.stranger = w.every || every, w.stranger || stranger
	return err
}

func (w *Watcher) compare(ctx context.Context, svcs []registrar.Service, every bool, heard time.Time) error {
	told := account{of: make(map[registrar.Service]int64, len(svcs))}
	w.mu.Lock()
	was := w.told.global
	w.mu.Unlock()
	for len(svcs) > 0 {
		part := svcs[:min(pollChunk, len(svcs))]
		svcs = svcs[len(part):]
		tctx, cancel := registrar.WithTimeout(ctx)
		v, err := w.store.Versions(tctx, part)
		cancel()
		if err != nil {
			return err
		}
		w.listeners = v.Listeners
		if !told.known { // later parts know more, which does no harm
			told.known, told.global = !w.store.Cluster(), v.Global
		}
		w.mu.Lock()
		for _, svc := range part {
			told.of[svc] = v.Of[svc]
			p := w.followed[svc]
			ttl, interval := v.InForce(svc) // which bump no version when they change
			other := ttl > 0 && p.times != [2]time.Duration{ttl, interval}
			if every || !p.known || other || p.token != v.Token(svc) || v.Of[svc] < 0 { // what is no number names no state
				w.note(svc, hint{heard: heard, sure: true})
			}
		}
		w.mu.Unlock()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	// What messages have told meanwhile goes further.
	if w.told.global == was || w.told.global < told.global {
		w.told.known, w.told.global, w.told.of = told.known, told.global, told.of
	}
	return nil
}

// services lists what to poll: what Config names, or else what the register
// names and what was read before, whose last instance may have gone.
func (w *Watcher) services(ctx context.Context, stranger bool) ([]registrar.Service, error) {
	if len(w.cfg.Services) > 0 {
		return w.cfg.Services, nil
	}
	tctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	listed, garbage, err := w.store.Services(tctx)
	if err != nil && w.down(ctx) {
		return nil, err
	}
	if err == nil {
		w.listing.End()
	} else if listed = nil; w.listing.Fail() {
		w.log.Warn().Err(err).Msg("cannot list the services; following those that are known")
	}
	for _, g := range garbage {
		if w.reportOnce("services "+clip(g), true) {
			w.log.Warn().Str("name", clip(g)).Msg("ignoring what is no service name")
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	before := len(w.followed)
	named := make(map[registrar.Service]bool, len(listed))
	for _, svc := range listed {
		named[svc] = true
		if w.followed[svc] == nil {
			w.followed[svc] = &progress{}
		}
	}
	if stranger && len(w.followed) == before {
		w.listAfter = time.Now().Add(lieGap)
	}
	svcs := make([]registrar.Service, 0, len(w.followed))
	for svc, p := range w.followed {
		if p.known && p.token.Version == 0 && !named[svc] && err == nil {
			delete(w.followed, svc) // Redis knows nothing of it any more
			continue
		}
		svcs = append(svcs, svc)
	}
	return svcs, nil
}

// Follow reads what hints point at and hands the changes to handle. A service
// whose read fails keeps its hint and does not stop the others. An error means
// that Redis does not answer.
func (w *Watcher) Follow(ctx context.Context, handle func(Change)) error {
	var down error
	hints := w.take(time.Now())
	ahead, up := w.readAhead(ctx, hints)
	reads := 0
	for svc, h := range hints {
		if down == nil {
			down = ctx.Err()
		}
		if down != nil {
			w.mu.Lock()
			w.note(svc, h)
			w.mu.Unlock()
			continue
		}
		p := w.followed[svc]
		if p == nil || !w.worth(svc, p, h, time.Now()) {
			continue
		}
		reads++
		change, err := w.read(ctx, svc, p, h, ahead[svc])
		h.sure = true // if it is kept: it was worth a read
		switch {
		case err == nil:
			if failures, say := p.outage.End(); say {
				w.log.Info().Str("service", string(svc)).Int("failures", failures).Msg("service can be read again")
			}
			if change.Service != "" {
				handle(change)
			}
		case errors.Is(err, registrar.ErrLarge):
			w.putOff(svc, h, p.scan)
		case !up && w.down(ctx):
			down = err
			w.mu.Lock()
			w.note(svc, h)
			w.mu.Unlock()
		default:
			up = w.store.Cluster() // one answer of its many nodes is enough
			p.outage.Shared = &w.reads
			if p.outage.Fail() {
				w.log.Warn().Err(err).Msg("cannot read this service; what is known of it stays in force")
			}
			limit := w.retry()
			if registrar.Passing(err) {
				limit = w.away()
			}
			w.putOff(svc, h, time.Now().Add(registrar.Backoff(p.outage.Failures, limit)))
		}
	}
	w.rest(reads)
	return down
}

// down tells the failure of one exchange from a Redis that does not answer:
// one that is loading, busy or without its primary refuses a PING as well.
func (w *Watcher) down(ctx context.Context) bool {
	tctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	return w.store.Ping(tctx) != nil
}

// take returns the hints whose time has come.
func (w *Watcher) take(now time.Time) map[registrar.Service]hint {
	w.mu.Lock()
	hints := w.hints
	w.hints = make(map[registrar.Service]hint, len(hints))
	w.mu.Unlock()
	for svc, l := range w.waiting {
		h := hints[svc]
		if now.Before(l.at) && !h.sure {
			delete(hints, svc)
			w.waiting[svc] = wait{l.and(h), l.at}
			continue
		}
		hints[svc] = l.and(h)
		delete(w.waiting, svc)
	}
	return hints
}

// worth tells whether messages justify a read now. What they lose by a no, the
// poll finds.
func (w *Watcher) worth(svc registrar.Service, p *progress, h hint, now time.Time) bool {
	switch {
	case h.sure || !p.known:
		return true
	case h.says == p.token.Version:
		return false // it has been read
	case h.says < p.token.Version && now.Sub(p.tried) < lieGap:
		return false // a read has overtaken it
	case p.paid.Sub(now) > lieAhead:
		w.putOff(svc, h, p.paid.Add(-lieAhead))
		return false
	}
	return true
}

func (w *Watcher) putOff(svc registrar.Service, h hint, at time.Time) {
	w.waiting[svc] = wait{h.and(w.waiting[svc].hint), at}
}

// answer is what a read came to.
type answer struct {
	snap registrar.Snapshot
	err  error
}

// readAhead reads what there is a reason to read, if that is more than one service,
// in as few calls as can be. What it leaves out is read one by one. In a Cluster it
// reads all at the same time, so that a shard that hangs holds up the others'
// services for one time-out and not for one of each of its own. It tells whether any
// answered there.
func (w *Watcher) readAhead(ctx context.Context, hints map[registrar.Service]hint) (ahead map[registrar.Service]*answer, up bool) {
	ahead = map[registrar.Service]*answer{}
	var changes []registrar.Since
	var reading sync.WaitGroup
	for svc, h := range hints {
		p := w.followed[svc]
		switch {
		case p == nil || !w.worth(svc, p, h, time.Now()):
		case w.store.Cluster():
			a := &answer{}
			ahead[svc] = a
			reading.Go(func() { *a = w.fetch(ctx, svc, p, h) })
		case p.known && !h.full:
			changes = append(changes, registrar.Since{Service: svc, Token: p.token})
		}
	}
	reading.Wait()
	for _, a := range ahead {
		up = up || a.err == nil
	}
	if len(changes) < 2 {
		return ahead, up
	}
	tried := time.Now()
	snaps, _ := w.store.ReadChanges(ctx, changes) // whoever is left out says alone what is wrong
	for i, c := range changes {
		if snaps[i].Service != "" {
			w.followed[c.Service].tried = tried
			ahead[c.Service] = &answer{snap: snaps[i]}
		}
	}
	return ahead, up
}

// fetch reads one service. Nobody else may use p meanwhile.
func (w *Watcher) fetch(ctx context.Context, svc registrar.Service, p *progress, h hint) answer {
	since := &p.token
	if !p.known || h.full {
		since = nil
	}
	p.tried = time.Now()
	tctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	if since != nil && p.tried.Before(p.scan) {
		snap, err := w.store.ReadChange(tctx, svc, *since)
		return answer{snap, err}
	}
	snap, err := w.store.Read(tctx, svc, since)
	if took := time.Since(p.tried); took > largeRead {
		p.scan = time.Now().Add(largeShare * took)
	}
	return answer{snap, err}
}

// read reads one service, or takes what has been read ahead. A Change without a
// service is none.
func (w *Watcher) read(ctx context.Context, svc registrar.Service, p *progress, h hint, ahead *answer) (Change, error) {
	old, known, times := p.token, p.known, p.times
	if ahead == nil {
		now := w.fetch(ctx, svc, p, h)
		ahead = &now
	}
	snap, err := ahead.snap, ahead.err
	if err != nil {
		return Change{}, err
	}
	if slices.ContainsFunc(snap.Entries, expired) && w.former(ctx) {
		// On a server that the registry's name no longer has, everybody falls silent.
		for i := range snap.Entries {
			if expired(snap.Entries[i]) {
				snap.Entries[i].Gone = nil
			}
		}
	}
	p.token, p.known, p.times = snap.Token, true, [2]time.Duration{snap.TTL, snap.Interval}
	if w.reportOnce("history", snap.Token.Nameless()) {
		w.log.Warn().Str("cure", "ACL SETUSER <user> +info, or take the line rename-command INFO out of redis.conf").
			Msg("redis does not say which data set this is; one that went back is told by its versions alone, and every change is read whole")
	}
	if !h.sure && snap.Token.Version < h.says {
		p.pay(lieGap)
	}
	for _, g := range snap.Garbage {
		if w.reportOnce(string(svc)+" "+clip(g), true) {
			w.log.Warn().Str("service", string(svc)).Str("member", clip(g)).Msg("ignoring a member that is no address")
		}
	}
	for _, e := range snap.Entries {
		if e.Garbage != "" && w.reportOnce(string(svc)+" "+e.Addr.String()+" "+clip(e.Garbage), true) {
			w.log.Warn().Str("service", string(svc)).Stringer("addr", e.Addr).Str("why", clip(e.Garbage)).Msg("not acting on what cannot be believed")
		}
	}
	if known && !snap.Full && snap.Token == old && p.times == times {
		return Change{}, nil
	}
	before := known || old != registrar.Token{} // or Remembered
	return Change{Snapshot: snap, Interrupted: before && old.Interrupted(snap.Token), Moved: w.moved, Heard: h.heard}, nil
}

func expired(e registrar.Entry) bool { return e.Gone != nil && e.Gone.Reason == registrar.Expired }

// former tells whether what was read in this step may be of a server that the registry's
// name no longer has.
func (w *Watcher) former(ctx context.Context) bool {
	if time.Since(w.looked) >= lookFresh {
		tctx, cancel := registrar.WithTimeout(ctx)
		defer cancel()
		w.looked = time.Now()
		_, err := w.store.Look(tctx)
		w.unsure = err != nil
	}
	return w.unsure || w.store.Moves() != w.moves
}

// reportLimit bounds the memory of what has been said.
const reportLimit = 1000

// reportOnce tells whether to say what holds now, and has not been said. It
// stops saying anything when there is too much.
func (w *Watcher) reportOnce(what string, holds bool) bool {
	if !holds {
		delete(w.reported, what)
		return false
	}
	if w.reported[what] || len(w.reported) >= reportLimit {
		return false
	}
	w.reported[what] = true
	return true
}

// clip bounds what anybody could have written into Redis, for a log line.
func clip(s string) string {
	const limit = 100
	if len(s) > limit {
		return s[:limit] + "…"
	}
	return s
}

// all gives every service that is followed a hint.
func (w *Watcher) all(h hint) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for svc := range w.followed {
		w.note(svc, h)
	}
}

// note adds a reason to read svc. The caller holds mu.
func (w *Watcher) note(svc registrar.Service, h hint) { w.hints[svc] = h.and(w.hints[svc]) }

func (w *Watcher) signal() {
	select {
	case w.wake <- struct{}{}:
	default: // somebody has signalled already, and nobody has looked since
	}
}

// listen keeps a subscription until ctx ends.
func (w *Watcher) listen(ctx context.Context) {
	pause := time.NewTimer(0)
	defer pause.Stop()
	failures := 0 // since a subscription that lasted
	var outage registrar.Outage
	for {
		select {
		case <-ctx.Done():
			return
		case <-pause.C:
		}
		began := time.Now()
		err := w.subscribe(ctx, &outage)
		if ctx.Err() != nil {
			return
		}
		w.mu.Lock()
		lost := w.alive
		w.alive = false
		w.mu.Unlock()
		if lost && time.Since(began) > silence {
			failures = 0
		}
		if outage.Fail() {
			w.log.Warn().Err(err).Msg("no subscription; the poll goes on")
		}
		failures++
		pause.Reset(registrar.Backoff(failures, min(w.retry(), lastSubscribe)))
	}
}

// subscribe listens on one connection until it fails or is silent for too long.
// It blocks in Receive without a deadline: a deadline that passed within a
// message would lose the message and what of it had been read.
func (w *Watcher) subscribe(ctx context.Context, outage *registrar.Outage) error {
	// Before the subscription: if another server takes over in between, this is
	// not the new one's.
	history, err := w.history(ctx)
	if err != nil {
		return fmt.Errorf("subscription: %w", err)
	}
	ctx, cut := context.WithCancelCause(ctx)
	ps := w.store.Subscribe(ctx)
	w.mu.Lock()
	w.heard = time.Now()
	w.mu.Unlock()
	var demanding sync.WaitGroup
	demanding.Go(func() { w.demand(ctx, cut, ps) })
	demanding.Go(func() { w.compareHistory(ctx, cut, history) })
	defer demanding.Wait()
	defer cut(nil)
	for {
		msg, err := ps.Receive(ctx)
		if err != nil && !redis.IsLoadingError(err) { // which is an answer to a Ping
			if cause := context.Cause(ctx); cause != nil {
				err = cause
			}
			return fmt.Errorf("subscription: %w", w.store.OfSubscription(err))
		}
		now := time.Now()
		w.mu.Lock()
		w.heard = now
		if _, ok := msg.(*redis.Subscription); ok {
			// The first of this connection, or of one that go-redis made
			// underneath: either way, messages may have passed.
			if _, say := outage.End(); say {
				w.log.Info().Msg("subscribed again")
			}
			w.alive, w.every = true, true
			w.status.Subscriptions++
			w.signal()
		}
		w.mu.Unlock()
		if m, ok := msg.(*redis.Message); ok {
			w.message(m.Payload, now)
		}
	}
}

// demand asks a subscription that is silent for a Pong, again and again until ctx
// ends, cuts it when none comes, and closes it, which wakes Receive.
func (w *Watcher) demand(ctx context.Context, cut context.CancelCauseFunc, ps *redis.PubSub) {
	defer func() { _ = ps.Close() }() // it can only say that it is closed
	tick := time.NewTicker(pingEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		w.mu.Lock()
		quiet := time.Since(w.heard)
		w.mu.Unlock()
		if quiet >= silence {
			cut(fmt.Errorf("no answer for %v", quiet.Round(time.Millisecond)))
			return
		}
		if quiet < pingEvery/2 {
			continue
		}
		if err := ps.Ping(ctx); err != nil {
			cut(err)
			return
		}
	}
}

// history names the data set that answers the reads.
func (w *Watcher) history(ctx context.Context) (replid string, err error) {
	ctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	return w.store.History(ctx)
}

// compareHistory cuts the subscription when the reads' history is another than
// when it began. go-redis moves its pooled connections after a fail-over, and
// leaves a subscription where it is: a former primary that is alive answers it
// for ever, and hears of no change. That the reads fail says nothing.
func (w *Watcher) compareHistory(ctx context.Context, cut context.CancelCauseFunc, began string) {
	tick := time.NewTicker(registrar.Shorten(compareEvery))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if now, err := w.history(ctx); err == nil && now != began {
			cut(errors.New("another server answers the reads"))
			return
		}
	}
}

// message notes the service that a message names. What it says besides is a
// hint at most: anybody on the channel may have sent it.
func (w *Watcher) message(payload string, heard time.Time) {
	global, svc, version, ok := parseMessage(payload)
	if !ok {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	gap := w.told.hear(global, svc, version) && w.told.look.IsZero()
	if gap {
		w.told.look = heard.Add(rand.N(gapSpread))
		if w.told.look.Before(w.told.pause) {
			w.told.look = w.told.pause
		}
	}
	switch {
	case w.followed[svc] != nil:
		w.note(svc, hint{heard: heard, says: version})
	case len(w.cfg.Services) == 0:
		w.stranger = true // its name alone is no reason to remember it
	case !gap:
		return
	}
	w.signal()
}

// parseMessage reads "<global version> <service> <service version>".
func parseMessage(payload string) (global int64, svc registrar.Service, version int64, ok bool) {
	const limit = 128 // two numbers and a name of 63
	if len(payload) > limit {
		return 0, "", 0, false
	}
	first, rest, _ := strings.Cut(payload, " ")
	name, last, _ := strings.Cut(rest, " ")
	g, err := strconv.ParseUint(first, 10, 63)
	if err != nil {
		return 0, "", 0, false
	}
	v, err := strconv.ParseUint(last, 10, 63)
	if err != nil {
		return 0, "", 0, false
	}
	svc, err = registrar.ParseService(name)
	return int64(g), svc, int64(v), err == nil && g <= registrar.MaxVersion && v <= registrar.MaxVersion
}
