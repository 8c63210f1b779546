package registrar

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/rs/zerolog"
)

// leaveTimeout bounds the whole of a leave, attempts included.
const leaveTimeout = 2 * time.Second

// BeaterConfig is one instance to register.
type BeaterConfig struct {
	Service  Service
	Addr     netip.AddrPort
	Weight   int               // 0 to 256
	Zone     string            // at most MaxName bytes
	Tags     map[string]string // keys of at most MaxName bytes, values of at most MaxText
	Interval time.Duration     // 0 = the registry's own
	// Roll, if not nil, sends the steady heartbeats together with others'.
	Roll *Roll
	// DrainWait is how long Run, when it ends, waits for every live balancer to
	// have drained the instance before it leaves; 0 = it leaves at once.
	DrainWait time.Duration
	// Hurry, when closed, ends that wait. It may be nil.
	Hurry <-chan struct{}
	// Tell, if not nil, hears in a few words how the instance stands with the
	// register, each time that this changes. Run calls it and waits for it.
	Tell func(status string)
	// Beaten, if not nil, hears what became of each heartbeat; nil = accepted.
	// Run calls it and waits for it.
	Beaten func(err error)
	// Token, if not empty, is the first registration's token, and Since when it
	// began. A process that derives both from what it registers, or has kept them
	// (see Keep), is the same registration again after a restart, to the last byte.
	Token string
	Since time.Time
	// Keep, if not nil, hears each registration's token and when it began: before its
	// first heartbeat, and again when another registration has held the address
	// meanwhile. An empty token says that the register has it no more. Run calls it
	// and waits for it.
	Keep func(token string, since time.Time)
	// Agent, if not empty, is the mark of the agent that registers the instance, of
	// at most MaxName bytes. What the same agent registered at this address before is
	// taken over at once; every other registration there must have missed its beats.
	Agent string
}

// The causes for which a Run can be cancelled other than in order.
var (
	// ErrHandedOver makes it end and leave nothing: another process is to beat for
	// the instance before its TTL ends.
	ErrHandedOver = errors.New("handed over")
	// The others make it leave at once: nobody is there to answer what a drain
	// would wait for.

	// ErrUnhealthy makes the register say that the instance is unhealthy.
	ErrUnhealthy = errors.New("unhealthy")
	// ErrEnded says that the app has ended by itself.
	ErrEnded = errors.New("the app has ended")
)

// DefaultDrainWait is long enough for a balancer that found out by its poll of
// the versions only when the message was lost half of the time; a balancer that
// is alive and has heard acknowledges within milliseconds.
const DefaultDrainWait = 3 * time.Second

// Beater answers the roll call for one instance. Each Run is a registration of
// its own, with a token of its own; one may follow another.
type Beater struct {
	cfg   BeaterConfig
	store *Store
	log   zerolog.Logger

	token    string
	since    time.Time
	meta     string
	draining string // the same metadata, draining
	interval time.Duration
	// look is the shortest interval that this Beater has heard of: it never sleeps for
	// longer without a look at the registry's times.
	look     time.Duration
	own      time.Duration // cfg's interval while the registry's TTL is too short for it
	answered bool          // Redis has answered a beat, so the agent's mark counts no more
	sent     bool          // a beat of this registration was
	accepted bool          // one of these was, or the register was found to have it
	version  int64         // of the service when it was found; 0 = it was not
	known    bool          // a beat of any registration was
	ended    bool          // the registration, by a Run that has ended
	loser    bool          // another holds the address, and that was said
	rival    int64         // when that one had beaten last when it was said, unix ms by Redis' clock
	full     bool          // the register has no room for it, and that was said
	outage   Outage
	news     Sparing // its arrivals and changes

	leaveTimeout time.Duration // of the whole of a leave
}

// NewBeater checks cfg and makes a new registration, with a new token. It does
// no I/O.
func NewBeater(cfg BeaterConfig, store *Store, log zerolog.Logger) (*Beater, error) {
	if _, err := ParseService(string(cfg.Service)); err != nil {
		return nil, err
	}
	if _, err := ParseAddr(cfg.Addr.String()); err != nil {
		return nil, err
	}
	if err := CheckWeight(cfg.Weight); err != nil {
		return nil, err
	}
	if err := errors.Join(checkText("zone", cfg.Zone, MaxName), checkText("agent", cfg.Agent, MaxName)); err != nil {
		return nil, err
	}
	for k, v := range cfg.Tags {
		if err := CheckTag(k, v); err != nil {
			return nil, err
		}
	}
	// Less than a millisecond is 0 on the wire, which means the registry's own.
	if cfg.Interval < 0 || cfg.Interval > 0 && cfg.Interval < time.Millisecond {
		return nil, fmt.Errorf("interval %v: want at least 1ms, or 0 for the registry's own", cfg.Interval)
	}
	b := &Beater{
		cfg: cfg, store: store, interval: cfg.Interval, look: DefaultInterval, leaveTimeout: leaveTimeout,
		log: log.With().Str("component", "beater").Str("service", string(cfg.Service)).Stringer("addr", cfg.Addr).Logger(),
	}
	if b.interval == 0 {
		b.interval = DefaultInterval
	}
	if cfg.Roll != nil {
		b.outage.Shared = &cfg.Roll.voice
	}
	token, since := cfg.Token, cfg.Since
	if token == "" {
		token, since = rand.Text(), time.Now()
	}
	if err := b.register(token, since); err != nil {
		return nil, err
	}
	return b, nil
}

// register makes a new registration: a token that has not left. What the agent's
// mark is for stays settled: an instance that comes back takes the address from
// nobody.
func (b *Beater) register(token string, since time.Time) error {
	b.token, b.since = token, since
	m := Meta{ID: token, Weight: b.cfg.Weight, Zone: b.cfg.Zone, Tags: b.cfg.Tags, Registered: since.UnixMilli(), Agent: b.cfg.Agent}
	meta, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("metadata: %w", err)
	}
	m.Draining = true
	draining, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("metadata: %w", err)
	}
	if len(draining) > MaxMeta {
		return fmt.Errorf("metadata of %d bytes, at most %d; use fewer tags", len(draining), MaxMeta)
	}
	b.meta, b.draining = string(meta), string(draining)
	b.sent, b.accepted, b.loser, b.full, b.ended, b.version, b.outage.Failures = false, false, false, false, false, 0, 0
	return nil
}

// Token is the token of the last registration. It must not be called while Run runs.
func (b *Beater) Token() string { return b.token }

// Run beats until ctx ends. Then, with a live context of its own, it says that it
// is draining, waits until every live balancer has seen to that, and leaves with
// its own token; if ctx's cause is ErrUnhealthy or ErrEnded it leaves at once, and
// if it is ErrHandedOver not at all. What a process that was killed has left in the
// register at this address drains and leaves likewise, also if ctx has ended before
// Run begins: for that Run waits until it may take the address over, two intervals
// at most. It returns nil then, also if the leave found Redis away:
// the reaper takes out who stopped. It returns an error that wraps ErrInterval
// if the registry does not accept the first beat's interval, and ErrLeft if somebody left
// with this token.
func (b *Beater) Run(ctx context.Context) error {
	if b.ended {
		if err := b.register(rand.Text(), time.Now()); err != nil {
			return err
		}
	}
	defer func() { b.ended = true }()
	b.keep()
	wait := time.NewTimer(0)
	defer wait.Stop()
	for {
		select {
		case <-ctx.Done():
		case <-wait.C:
		}
		if ctx.Err() != nil {
			b.end(context.WithoutCancel(ctx), context.Cause(ctx))
			return nil
		}
		next, err := b.Beat(ctx)
		if errors.Is(err, ErrInterval) || errors.Is(err, ErrLeft) {
			return err
		}
		wait.Reset(b.doze(ctx, next))
	}
}

// doze spends all of a long pause between two heartbeats but the last part, which it
// returns, with looks at the registry's times. Those that somebody has mistyped would
// else rule those who sleep by them long after they have been put right.
func (b *Beater) doze(ctx context.Context, next time.Duration) (rest time.Duration) {
	due := time.Now().Add(next)
	if b.cfg.Interval > 0 || b.interval <= b.look {
		return next
	}
	wait := time.NewTimer(0)
	defer wait.Stop()
	<-wait.C
	for {
		left := time.Until(due)
		if left <= b.look {
			return left
		}
		wait.Reset(Shorten(b.look))
		select {
		case <-ctx.Done():
			return 0
		case <-wait.C:
		}
		tctx, cancel := WithTimeout(ctx)
		interval, err := b.intervalNow(tctx)
		cancel()
		if err == nil && interval < b.interval {
			return 0 // the beat hears the rest
		}
	}
}

// intervalNow is the registry's heartbeat interval, which Beaters with one Roll read
// together.
func (b *Beater) intervalNow(ctx context.Context) (time.Duration, error) {
	if b.cfg.Roll != nil {
		return b.cfg.Roll.intervalNow(ctx, b.cfg.Service, b.look/2)
	}
	_, interval, err := b.store.InForce(ctx, b.cfg.Service)
	return interval, err
}

// Beat sends one heartbeat and returns when to send the next one: an interval
// shortened by up to a fifth, so that instances started together drift apart,
// the next tick of the Roll if there is one, or after a failure full jitter below a ceiling that doubles from 100 ms to
// the interval. A nil error says that the register has this instance;
// ErrNotOwner, that another holds its address, and ErrFull, that the register has
// no room for it, are answered at the interval's pace; of the former the next one is
// also no later than the moment from which the address may be taken over.
func (b *Beater) Beat(ctx context.Context) (next time.Duration, err error) {
	tctx, cancel := WithTimeout(ctx)
	defer cancel()
	send := b.store.Beat
	if b.cfg.Roll != nil {
		send = b.cfg.Roll.Beat
	}
	beat := Beat{Addr: b.cfg.Addr, Token: b.token, Meta: b.meta, Interval: b.cfg.Interval, first: !b.accepted}
	if !b.answered {
		beat.Agent = b.cfg.Agent
	}
	b.sent = true
	reply, err := send(tctx, b.cfg.Service, beat)
	b.beaten(ctx, err)
	if err == nil || errors.Is(err, ErrNotOwner) || errors.Is(err, ErrFull) || errors.Is(err, ErrLeft) || errors.Is(err, ErrInterval) {
		b.answered = true
	}
	if reply.Interval > 0 {
		b.look = min(b.look, reply.Interval)
	}
	if b.own > 0 && err == nil && CheckInterval(b.own, reply.TTL) == nil {
		b.log.Info().Dur("interval", b.own).Dur("ttl", reply.TTL).Msg("the registry's TTL is long enough again; beating at this sidecar's interval")
		b.cfg.Interval, b.interval, b.own = b.own, b.own, 0
	}
	if b.cfg.Interval == 0 && reply.Interval > 0 {
		b.interval = reply.Interval
	}
	switch {
	case err == nil:
		failures, say := b.outage.End()
		if say {
			b.log.Info().Int("failures", failures).Msg("redis answers again")
		}
		if (reply.Status != BeatOK || !b.accepted) && b.news.May() {
			b.log.Info().Str("status", string(reply.Status)).Int64("version", reply.Version).Dur("interval", b.interval).Msg("registered")
		}
		if failures > 0 || b.loser || b.full || !b.accepted {
			b.tell("registered")
		}
		lost := b.loser
		b.loser, b.full, b.accepted, b.known = false, false, true, true
		if lost {
			b.keep()
		}
	case errors.Is(err, ErrNotOwner):
		if !b.loser {
			b.log.Warn().Msg("another registration holds this address; trying again at every interval")
			b.tell("not registered: another registration holds the address, until it misses its heartbeats")
			b.rival = reply.Held
		}
		b.outage.End()
		b.loser, b.full = true, false
		return min(b.pace(), until(reply)), err
	case errors.Is(err, ErrFull):
		if !b.full {
			b.log.Error().Err(err).Msg("not registered; trying again at every interval")
			b.tell("not registered: the register has no room for it")
		}
		b.outage.End()
		b.loser, b.full = false, true
	case errors.Is(err, ErrInterval) && b.known:
		// An operator shortened the TTL under a running sidecar: its instance
		// is healthy, and must not go for that.
		b.log.Warn().Dur("interval", b.cfg.Interval).Dur("ttl", reply.TTL).Msg("the registry's TTL is shorter now; beating at its own interval")
		b.own, b.cfg.Interval = b.cfg.Interval, 0
		return b.Beat(ctx)
	case errors.Is(err, ErrInterval), errors.Is(err, ErrLeft):
		return 0, err
	default:
		if ctx.Err() == nil {
			if b.outage.Failures == 0 {
				b.tell("redis does not answer as it should; retrying for ever")
			}
			if b.outage.Fail() {
				b.log.Warn().Err(err).Msg("beat failed; retrying for ever")
			}
		}
		return Backoff(b.outage.Failures, b.interval), err
	}
	return b.pace(), err
}

// pace is how long after a heartbeat the next one is due.
func (b *Beater) pace() time.Duration {
	if b.cfg.Roll != nil {
		return b.cfg.Roll.next(b.interval)
	}
	return Shorten(b.interval)
}

// until is how long it takes until the address may be taken over of whose holder
// reply tells, if that stays silent. beat.lua counts whole milliseconds.
func until(reply BeatReply) time.Duration {
	return max(2*reply.Interval-reply.Silent, 0) + time.Millisecond
}

// end ends a registration, for the cause.
func (b *Beater) end(ctx context.Context, cause error) {
	why, drains := Left, b.cfg.DrainWait > 0
	switch {
	case errors.Is(cause, ErrHandedOver):
		return
	case errors.Is(cause, ErrUnhealthy):
		why, drains = Unhealthy, false
	case errors.Is(cause, ErrEnded):
		drains = false
	}
	// A token that nobody has kept is in the register only if it was sent.
	looked := true
	if (!b.accepted || b.loser) && (drains || !b.sent && b.token == b.cfg.Token) {
		looked = b.inherit(ctx, drains)
	}
	if drains {
		b.drain(ctx)
	}
	switch {
	case b.sent || b.accepted:
		b.leave(ctx, why)
	case looked:
		b.forget()
	}
}

// inherit looks for what a process that was killed has left at this address: with
// b's own token, which was kept, it is b's. Another one is waited for, if patient,
// until it has missed its beats and is b's to take out. A holder that beats is
// another process's. It tells whether Redis answered.
func (b *Beater) inherit(ctx context.Context, patient bool) (looked bool) {
	tctx, done := WithTimeout(ctx)
	e, err := b.store.Entry(tctx, b.cfg.Service, b.cfg.Addr)
	done()
	holder := e.Instance
	switch {
	case err != nil:
		if !b.sent { // else leave says it
			b.log.Warn().Err(err).Msg("cannot see what is registered at this address; if it is silent, the reaper takes it out after its TTL")
		}
	case e.Present && holder.Meta.ID == b.token:
		b.accepted, b.loser, b.version = true, false, e.Token.Version
	case !patient || !e.Present && e.Garbage == "":
	case b.loser && holder.Beat > b.rival && e.Now-holder.Beat <= e.Interval.Milliseconds():
		// It was seen to beat, and is not late.
	default:
		b.take(ctx, holder.Beat, e.Interval)
	}
	return err == nil
}

// take waits until the address is b's, or until its holder, who had beaten last at
// held, has beaten again.
func (b *Beater) take(ctx context.Context, held int64, interval time.Duration) {
	b.log.Info().Msg("stopping: what holds this address is drained as soon as it has missed its heartbeats")
	b.tell("stopping: waiting until what holds the address has missed its heartbeats, to drain it")
	ctx, cancel := b.patience(ctx, 2*interval+Timeout)
	defer cancel()
	beat := Beat{Addr: b.cfg.Addr, Token: b.token, Meta: b.meta, Interval: b.cfg.Interval, first: true}
	if !b.answered {
		beat.Agent = b.cfg.Agent
	}
	wait := time.NewTimer(0)
	defer wait.Stop()
	for failures := 0; ; {
		select {
		case <-ctx.Done():
			return
		case <-wait.C:
		}
		b.sent = true
		tctx, done := WithTimeout(ctx)
		reply, err := b.store.Beat(tctx, b.cfg.Service, beat)
		done()
		b.beaten(ctx, err)
		switch {
		case err == nil:
			b.log.Info().Str("status", string(reply.Status)).Int64("version", reply.Version).Msg("registered")
			b.accepted, b.loser = true, false
			return
		case errors.Is(err, ErrNotOwner):
			if reply.Held > held && held > 0 {
				b.loser = true
				return
			}
			held = reply.Held
			wait.Reset(min(until(reply), Shorten(interval/10)))
		case errors.Is(err, ErrLeft), errors.Is(err, ErrFull), errors.Is(err, ErrInterval):
			return
		default:
			failures++
			wait.Reset(Backoff(failures, interval))
		}
	}
}

// patience is a context that ends after d, or when the Beater is told to hurry. The
// caller calls cancel, which waits for the end of what it takes.
func (b *Beater) patience(ctx context.Context, d time.Duration) (_ context.Context, cancel func()) {
	ctx, stop := context.WithTimeout(ctx, d)
	var hurrying sync.WaitGroup
	hurrying.Go(func() {
		select {
		case <-b.cfg.Hurry: // nil: never
			stop()
		case <-ctx.Done():
		}
	})
	return ctx, func() {
		stop()
		hurrying.Wait()
	}
}

// drain has the balancers send no more requests, and waits until they have said
// so. It beats meanwhile. What fails is skipped: whoever stops must stop.
func (b *Beater) drain(ctx context.Context) {
	if b.cfg.DrainWait <= 0 || !b.accepted || b.loser {
		return
	}
	b.tell("draining")
	begun := time.Now()
	ctx, cancel := b.patience(ctx, b.cfg.DrainWait)
	defer cancel()
	b.meta = b.draining
	tctx, done := WithTimeout(ctx)
	reply, err := b.store.Beat(tctx, b.cfg.Service, Beat{Addr: b.cfg.Addr, Token: b.token, Meta: b.meta, Interval: b.cfg.Interval})
	done()
	b.beaten(ctx, err)
	if err != nil {
		b.log.Warn().Err(err).Msg("cannot say that this instance drains; leaving")
		return
	}
	// That it drains may be no change: it was killed while it did.
	version := max(reply.Version, b.version)
	next := time.Now().Add(b.interval)
	live, err := b.store.WaitApplied(ctx, b.cfg.Service, version, func() error {
		if time.Now().Before(next) {
			return nil
		}
		wait, err := b.Beat(ctx)
		next = time.Now().Add(wait)
		return err
	})
	if err != nil {
		b.log.Warn().Err(err).Int("balancers", live).Dur("took", time.Since(begun)).Msg("leaving before every balancer has drained this instance")
		return
	}
	b.log.Info().Int64("version", version).Int("balancers", live).Dur("took", time.Since(begun)).Msg("drained")
}

// leave tells the register. It tries again while its deadline lasts: a crash
// between two connections must not cost the peers a whole TTL.
func (b *Beater) leave(ctx context.Context, why Reason) {
	ctx, cancel := context.WithTimeout(ctx, b.leaveTimeout)
	defer cancel()
	wait := time.NewTimer(0)
	defer wait.Stop()
	var last error
	for failures := 0; ; failures++ {
		select {
		case <-ctx.Done():
			why := "left without telling: redis is away; the reaper takes this instance out after its TTL"
			if Refused(last) {
				why = "left without telling: redis refuses it; the reaper takes this instance out after its TTL"
			}
			b.log.Warn().Err(last).Msg(why)
			return
		case <-wait.C:
		}
		tctx, done := WithTimeout(ctx)
		version, err := b.store.Leave(tctx, b.cfg.Service, b.cfg.Addr, b.token, why)
		done()
		switch {
		case err == nil:
			b.log.Info().Int64("version", version).Str("reason", string(why)).Msg("left")
			b.forget()
			return
		case errors.Is(err, ErrNotOwner):
			b.log.Info().Msg("nothing to leave: another registration holds this address")
			b.forget()
			return
		}
		last = err
		wait.Reset(Backoff(failures+1, time.Second))
	}
}

// beaten reports a heartbeat, unless it was cut short: then nothing is known.
func (b *Beater) beaten(ctx context.Context, err error) {
	if b.cfg.Beaten != nil && (err == nil || ctx.Err() == nil) {
		b.cfg.Beaten(err)
	}
}

func (b *Beater) keep() {
	if b.cfg.Keep != nil {
		b.cfg.Keep(b.token, b.since)
	}
}

func (b *Beater) forget() {
	if b.cfg.Keep != nil {
		b.cfg.Keep("", time.Time{})
	}
}

func (b *Beater) tell(status string) {
	if b.cfg.Tell != nil {
		b.cfg.Tell(status)
	}
}
