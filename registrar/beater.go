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

const (
	// leaveTimeout is what a leave has at least, attempts included.
	leaveTimeout = 2 * time.Second
	// lastSay is the longest pause between two tries to say that an instance drains
	// or leaves: after a fail-over every second counts, and there are few of them.
	lastSay = 250 * time.Millisecond
)

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
	// LeaveWait is how long Run, when it ends, tries to tell the register that the
	// instance drains and leaves while Redis does not take it, as in a fail-over. It
	// counts from the end's beginning; a leave has leaveTimeout in any case. An
	// instance that was never registered has no more than that.
	LeaveWait time.Duration
	// ForceStop, when closed, has a leave end within leaveTimeout. It may be nil.
	ForceStop <-chan struct{}
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
	// Own is the metadata's: overrides are of this registration, not of its address.
	Own bool
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

// DefaultLeaveWait is longer than a fail-over takes, 3 to 5 s where a primary counts
// as down after 1 s, and leaves time for the app's own end where a supervisor kills
// after 30 s.
const DefaultLeaveWait = 10 * time.Second

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
	known    bool          // a beat of any registration was
	ended    bool          // the registration, by a Run that has ended
	loser    bool          // another holds the address, and that was said
	rival    int64         // when that one had beaten last when it was said, unix ms by Redis' clock
	full     bool          // the register has no room for it, and that was said
	outage   Outage
	news     Sparing // its arrivals and changes

	reborn time.Time // when Redis had lost this registration, and has it again since
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
		cfg: cfg, store: store, interval: cfg.Interval, look: DefaultInterval,
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
	m := Meta{ID: token, Weight: b.cfg.Weight, Zone: b.cfg.Zone, Tags: b.cfg.Tags, Registered: since.UnixMilli(), Agent: b.cfg.Agent, Own: b.cfg.Own}
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
	b.sent, b.accepted, b.loser, b.full, b.ended, b.outage.Failures = false, false, false, false, false, 0
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
// the interval, or to NewcomerRetry until the register has accepted this registration. A nil error says that the register has this instance;
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
		if reply.Overridden {
			b.overridden(ctx)
		}
		if failures > 0 || b.loser || b.full || !b.accepted {
			b.tell("registered")
		}
		b.found(reply)
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
		limit := b.interval
		if !b.accepted {
			limit = min(limit, NewcomerRetry)
		}
		return Backoff(b.outage.Failures, limit), err
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
	begun := time.Now()
	// A token that nobody has kept is in the register only if it was sent.
	looked := true
	if (!b.accepted || b.loser) && (drains || !b.sent && b.token == b.cfg.Token) {
		looked = b.inherit(ctx, drains)
	}
	var undrained time.Duration
	if drains {
		undrained = b.drain(ctx)
	}
	switch {
	case b.sent || b.accepted:
		telling := leaveTimeout
		if b.accepted {
			telling = max(telling, time.Until(begun.Add(b.cfg.LeaveWait)))
		}
		b.leave(ctx, why, telling, undrained)
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
		b.accepted, b.loser = true, false
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
	ctx, cancel := cutShort(ctx, 2*interval+Timeout, b.cfg.Hurry, 0)
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

// cutShort is a context that ends after d, or grace after sooner is closed, which may
// be nil. The caller calls cancel, which waits for the end of what it takes.
func cutShort(ctx context.Context, d time.Duration, sooner <-chan struct{}, grace time.Duration) (_ context.Context, cancel func()) {
	ctx, stop := context.WithTimeout(ctx, d)
	var cutting sync.WaitGroup
	cutting.Go(func() {
		select {
		case <-sooner:
		case <-ctx.Done():
			return
		}
		rest := time.NewTimer(grace)
		defer rest.Stop()
		select {
		case <-rest.C:
			stop()
		case <-ctx.Done():
		}
	})
	return ctx, func() {
		stop()
		cutting.Wait()
	}
}

// insist calls say, with Timeout each time, until it succeeds, is refused for good, or
// ctx ends. Between two primaries Redis answers in many ways that are none of these:
// not at all, READONLY, MOVED, CLUSTERDOWN. It returns what say returned last, but for a
// call that ctx cut short after another.
func insist[T any](ctx context.Context, say func(context.Context) (T, error)) (T, error) {
	wait := time.NewTimer(0)
	defer wait.Stop()
	<-wait.C
	var last error
	for failures := 1; ; failures++ {
		tctx, done := WithTimeout(ctx)
		v, err := say(tctx)
		done()
		if err == nil || refusedForGood(err) {
			return v, err
		}
		if last == nil || ctx.Err() == nil {
			last = err
		}
		wait.Reset(Backoff(failures, lastSay))
		select {
		case <-ctx.Done():
			return v, last
		case <-wait.C:
		}
	}
}

// refusedForGood tells the answers that another try within seconds does not change.
func refusedForGood(err error) bool {
	return errors.Is(err, ErrNotOwner) || errors.Is(err, ErrLeft) || errors.Is(err, ErrFull) || errors.Is(err, ErrInterval) ||
		broken(err) || errors.Is(denied(err), ErrDenied)
}

// drain has the balancers send no more requests, and waits until they have said so. It
// beats meanwhile. After a fail-over it begins anew: the new primary may not know that
// the instance drains. What fails is skipped in the end: an instance that stops must
// stop. It returns what is left of the time to wait for balancers, while none was
// waited for because Redis did not answer; 0 if all have drained it.
func (b *Beater) drain(ctx context.Context) (undrained time.Duration) {
	if b.cfg.DrainWait <= 0 || !b.accepted || b.loser {
		return 0
	}
	b.tell("draining")
	begun := time.Now()
	ctx, cancel := cutShort(ctx, b.cfg.DrainWait, b.cfg.Hurry, 0)
	defer cancel()
	b.meta = b.draining
	for undrained = b.cfg.DrainWait; ; {
		version, err := insist(ctx, b.sayDraining)
		if err != nil {
			b.log.Warn().Err(err).Msg("cannot say that this instance drains; leaving")
			return undrained
		}
		asked := time.Now()
		live, err := b.drained(ctx, version)
		undrained -= time.Since(asked)
		switch {
		case err == nil:
			b.log.Info().Int64("version", version).Int("balancers", live).Dur("took", time.Since(begun)).Msg("drained")
			return 0
		case errors.Is(err, ErrOtherHistory) && ctx.Err() == nil:
			b.log.Info().Err(err).Msg("another server has taken over; saying there that this instance drains")
			continue
		}
		b.log.Warn().Err(err).Int("balancers", live).Dur("took", time.Since(begun)).Msg("leaving before every balancer has drained this instance")
		return undrained
	}
}

// sayDraining returns a version of the service with which this instance drains.
func (b *Beater) sayDraining(ctx context.Context) (version int64, err error) {
	reply, err := b.store.Beat(ctx, b.cfg.Service, Beat{Addr: b.cfg.Addr, Token: b.token, Meta: b.meta, Interval: b.cfg.Interval})
	b.beaten(ctx, err)
	b.found(reply)
	if err != nil || reply.Version > 0 {
		return reply.Version, err
	}
	// That it drains is no change: a process that was killed has said it, or this
	// one did, to another primary or without hearing the answer.
	e, err := b.store.Entry(ctx, b.cfg.Service, b.cfg.Addr)
	return e.Token.Version, err
}

// overridden says what operators have said of the address, which this registration comes
// to. That it cannot be read changes nothing.
func (b *Beater) overridden(ctx context.Context) {
	tctx, cancel := WithTimeout(ctx)
	defer cancel()
	e, err := b.store.Entry(tctx, b.cfg.Service, b.cfg.Addr)
	if err != nil {
		b.log.Warn().Err(err).Msg("an operator's override of this address is in force; it cannot be read")
		return
	}
	l := b.log.Warn().Str("state", string(e.Admin.State)).Str("reason", e.Admin.Reason).Str("by", e.Admin.By)
	if e.Admin.Weight != nil {
		l = l.Int("weight", *e.Admin.Weight)
	}
	if e.Admin.At > 0 {
		l = l.Time("since", time.UnixMilli(e.Admin.At))
	}
	end := "ready"
	if e.Admin.State == AdminNone {
		end = "weight"
	}
	cmd := fmt.Sprintf("rollcall %s %s %s", end, b.cfg.Service, b.cfg.Addr)
	if end == "weight" {
		cmd += " own"
	}
	l.Str("end_it", cmd).Msg("an operator's override of this address is in force")
}

// found notes what an accepted heartbeat says of the register.
func (b *Beater) found(reply BeatReply) {
	if reply.Status == BeatNew && b.accepted {
		b.reborn = time.Now()
	}
}

// drained waits until every live balancer has applied version, and beats meanwhile. A
// register that lost its data a moment ago knows of no balancer yet: then it waits for
// the first one too.
func (b *Beater) drained(ctx context.Context, version int64) (live int, err error) {
	next := time.Now().Add(b.interval)
	for {
		live, err = b.store.WaitApplied(ctx, b.cfg.Service, version, func() error {
			if time.Now().Before(next) {
				return nil
			}
			wait, err := b.Beat(ctx)
			next = time.Now().Add(wait)
			if err != nil && refusedForGood(err) {
				return err
			}
			return nil
		})
		if err != nil || live > 0 || b.reborn.IsZero() || time.Since(b.reborn) > AckInterval {
			return live, err
		}
		wait := time.NewTimer(Shorten(lastAckPoll))
		select {
		case <-ctx.Done():
			wait.Stop()
			return live, nil
		case <-wait.C:
		}
	}
}

// leave tells the register, and tries for as long as telling. Where the instance has
// not been drained, it then waits until the balancers have applied that it left, for
// undrained at most: the app ends after this.
func (b *Beater) leave(ctx context.Context, why Reason, telling, undrained time.Duration) {
	tctx, cancel := cutShort(ctx, telling, b.cfg.ForceStop, leaveTimeout)
	defer cancel()
	for {
		version, err := insist(tctx, func(ctx context.Context) (int64, error) {
			return b.store.Leave(ctx, b.cfg.Service, b.cfg.Addr, b.token, why)
		})
		switch {
		case errors.Is(err, ErrNotOwner):
			b.log.Info().Msg("nothing to leave: another registration holds this address")
			b.forget()
			return
		case err != nil && (refusedForGood(err) || Refused(err)):
			b.log.Warn().Err(err).Msg("left without telling: redis refuses it; the reaper takes this instance out after its TTL")
			return
		case err != nil:
			b.log.Warn().Err(err).Msg("left without telling: redis is away; the reaper takes this instance out after its TTL")
			return
		}
		b.log.Info().Int64("version", version).Str("reason", string(why)).Msg("left")
		if undrained < lastAckPoll || b.hurried() { // too short for an answer
			b.forget()
			return
		}
		actx, done := cutShort(ctx, undrained, b.cfg.Hurry, 0)
		asked := time.Now()
		live, err := b.store.WaitApplied(actx, b.cfg.Service, version, nil)
		done()
		undrained -= time.Since(asked)
		if errors.Is(err, ErrOtherHistory) && undrained > 0 && tctx.Err() == nil {
			b.log.Info().Err(err).Msg("another server has taken over; leaving there too")
			continue
		}
		if err != nil {
			b.log.Warn().Err(err).Int("balancers", live).Msg("not every balancer has said that this instance is out of it")
		}
		b.forget()
		return
	}
}

func (b *Beater) hurried() bool {
	select {
	case <-b.cfg.Hurry:
		return true
	default: // also if it is nil
		return false
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
