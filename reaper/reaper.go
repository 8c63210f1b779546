package reaper

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"rollcall/registrar"
)

const (
	// DefaultSweep is the longest time between two sweeps. A heartbeat that runs
	// out is swept at that moment anyway; this is for what has no such moment,
	// such as a score from the future.
	DefaultSweep = 10 * time.Second

	heartbeatsPerTTL = 3

	shownAddrs  = 10 // in a log line
	shownErrors = 10 // of names, and of services, in one error
)

// What a caller of Run and Once decides on.
var (
	// ErrConfig says that the registry's TTL or heartbeat interval is another
	// than this reaper's at its start.
	ErrConfig = errors.New("the registry's times are others")
	// ErrNeverArmed says that Redis was not healthy for long enough.
	ErrNeverArmed = errors.New("never armed")
	// ErrHeld says that the protection holds what looks dead.
	ErrHeld = errors.New("held by the protection")
)

// errNoPulse says that there is no accepted pulse to sweep with.
var errNoPulse = errors.New("the last pulse was not accepted")

var errMoved = errors.New("nobody is taken out: the registry's name names another server now")

// An id is at most idLength long. A repetition with a bound takes 100 kB when
// compiled, in every process.
var idPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

const idLength = 128

// Store is what a reaper needs of the register; *registrar.Store is one.
type Store interface {
	Config(ctx context.Context, ttl, interval time.Duration, overwrite bool) (registrar.Times, error)
	Learned(ctx context.Context, t registrar.Times) error
	Pulse(ctx context.Context, id, token string, expiry time.Duration) (registrar.Pulse, error)
	Services(ctx context.Context) (names []registrar.Service, garbage []string, err error)
	Survey(ctx context.Context, svcs []registrar.Service, now, cutoff, suspect int64) ([]registrar.Count, error)
	Reap(ctx context.Context, svc registrar.Service, w registrar.Sweep) (registrar.Reaped, error)
	Stale(ctx context.Context, svc registrar.Service, cutoff int64, nth, most int) ([]netip.AddrPort, error)
	Elsewhere(ctx context.Context, svc registrar.Service, within []registrar.Service, addrs []netip.AddrPort, ttl time.Duration) (found map[netip.AddrPort]registrar.Service, looked int, err error)
	Unlist(ctx context.Context, svcs ...registrar.Service) error
	Census(ctx context.Context, services int) error
	Cluster() bool
	Announce(ctx context.Context, u registrar.Unsaid) error
	Report(ctx context.Context, id string, st *registrar.ReaperStatus) error
	AdoptOverrides(ctx context.Context, now int64, svcs ...registrar.Service) error
	DueOverrides(ctx context.Context, now int64, most int) (map[registrar.Service][]string, error)
	EndOverrides(ctx context.Context, svc registrar.Service, id string, due []string) (ended []registrar.Ended, unsaid registrar.Unsaid, err error)
	Look(ctx context.Context) (moves int64, err error)
	Moves() int64
}

// Canary sends one heartbeat as an instance would: on a new connection, with an
// instance's rights and its script.
type Canary func(ctx context.Context) error

// Config is one reaper.
type Config struct {
	ID       string        // of this process alone: two with one id never arm
	TTL      time.Duration // whole ms; 0 = registrar.DefaultTTL
	Interval time.Duration // between two heartbeats, whole ms; 0 = a third of the TTL
	Sweep    time.Duration // longest time between two sweeps; 0 = DefaultSweep
	SetTTL   bool          // write TTL and Interval to the registry instead of comparing them
	// Removed, if not nil, hears how many instances of a service one sweep took
	// out, and how long after its TTL the one went that was silent longest.
	Removed func(n int, late time.Duration)
	// Tell, if not nil, hears the Status each time that Armed or Cause changes. Run
	// calls it and waits for it; the Reapers of a Cluster do, each for its service.
	Tell func(registrar.ReaperStatus)
}

func (c Config) withDefaults() Config {
	if c.TTL == 0 {
		c.TTL = registrar.DefaultTTL
	}
	if c.Interval == 0 {
		c.Interval = DefaultInterval(c.TTL)
	}
	if c.Sweep == 0 {
		c.Sweep = DefaultSweep
	}
	return c
}

// DefaultInterval is the heartbeat interval that goes with a TTL unless somebody
// says otherwise.
func DefaultInterval(ttl time.Duration) time.Duration {
	return (ttl / heartbeatsPerTTL).Truncate(time.Millisecond)
}

func (c Config) validate() error {
	if len(c.ID) > idLength || !idPattern.MatchString(c.ID) {
		return fmt.Errorf("reaper id %q: want %s, at most %d long", c.ID, idPattern, idLength)
	}
	if c.TTL%time.Millisecond != 0 || c.Interval%time.Millisecond != 0 {
		return fmt.Errorf("TTL %v, interval %v: want whole milliseconds, as the registry keeps them", c.TTL, c.Interval)
	}
	if c.Sweep < 0 {
		return fmt.Errorf("sweep interval %v: want more than 0", c.Sweep)
	}
	return registrar.CheckTimes(c.TTL, c.Interval)
}

// Reaper takes out who stopped answering. Its methods are for one goroutine,
// except Status.
type Reaper struct {
	cfg    Config
	store  Store
	canary Canary
	log    zerolog.Logger
	begin  time.Time // the zero of all durations here, monotonic

	proof      proof
	protection protection
	armed      bool
	cause      string // of not being armed
	said       string // the cause that the log has; empty = armed
	complaint  string // the last sweep's error that the log has
	voice      *voice
	pulses     int                        // accepted ones until the next canary
	unsaid     registrar.Unsaid           // what it must still announce
	looking    looking                    // where the search for replaced instances goes on
	seen       map[registrar.Service]bool // services that had members in the last survey
	census     int                        // services with instances, as this reaper has told; -1 = not yet
	follows    bool                       // the registry's times from the start, whatever cfg says
	overrides  overrides
	moves      int64 // of the registry, before the last accepted pulse

	mu     sync.Mutex
	status registrar.ReaperStatus // guarded by mu
	news   chan struct{}          // holds one if status is another than the one told
}

// voice bounds what one process says of a Redis that comes and goes. What lasts is
// said in the end.
type voice struct {
	state, sweeps, holds, reports, times registrar.Sparing

	removals registrar.Sums // by service
	log      zerolog.Logger // for their sum

	mu             sync.Mutex
	ttl, heartbeat time.Duration // that were said last; guarded by mu
}

// news tells whether to say that the registry has these times now: once, though each
// service of a Cluster has its own.
func (v *voice) news(ttl, heartbeat time.Duration) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.ttl == ttl && v.heartbeat == heartbeat || !v.times.May() {
		return false
	}
	v.ttl, v.heartbeat = ttl, heartbeat
	return true
}

func newVoice(log zerolog.Logger) *voice {
	return &voice{holds: registrar.Sparing{AtOnce: 20}, log: log} // somebody may have to act
}

// New checks cfg. It does no I/O.
func New(cfg Config, store Store, canary Canary, log zerolog.Logger) (*Reaper, error) {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	r := &Reaper{
		cfg: cfg, store: store, canary: canary, begin: time.Now(),
		log:   log.With().Str("component", "reaper").Str("id", cfg.ID).Logger(),
		proof: newProof(cfg.TTL, cfg.Interval), protection: newProtection(cfg.Interval), census: -1,
		cause: causeCredit, said: causeCredit, voice: newVoice(log), status: registrar.ReaperStatus{Cause: causeCredit}, news: make(chan struct{}, 1),
	}
	return r, nil
}

// Status returns the state after the last pulse and sweep. Any goroutine may
// call it.
func (r *Reaper) Status() registrar.ReaperStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.status
	s.Held = slices.Clone(s.Held)
	return s
}

// Run pulses and sweeps until ctx ends, and then returns nil. It first makes
// sure that the registry has this reaper's TTL and interval, for as long as
// that takes. It returns an error that wraps ErrConfig if they are others. When
// somebody changes them later, it goes on with the new ones, as those who beat do.
func (r *Reaper) Run(ctx context.Context) error {
	if err := r.connect(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	tctx, end := context.WithCancel(ctx)
	var teller sync.WaitGroup
	teller.Go(func() { r.tell(tctx) })
	defer teller.Wait()
	defer end()
	defer r.voice.sumUp(true)
	wait := time.NewTimer(0)
	defer wait.Stop()
	var due time.Duration // of the next sweep
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-wait.C:
		}
		r.voice.sumUp(false)
		began, was, resets := r.elapsed(), r.armed, r.proof.resets
		next := began + registrar.Shorten(r.proof.period)
		if err := r.Pulse(ctx); err == nil {
			// After a reset the registry may have lost its times, and those who beat
			// would follow the defaults.
			if began >= due || r.armed && !was || r.proof.resets != resets {
				report, err := r.Sweep(ctx)
				if ctx.Err() == nil {
					r.complain(err)
				}
				due = r.due(report, err, r.elapsed()-began, next)
			}
			soonest := began + pace(r.elapsed()-began, r.proof.period)
			next = min(next, max(due, soonest))
			if !r.unsaid.At.IsZero() {
				next = min(next, max(r.announce(ctx), soonest))
			}
		}
		wait.Reset(next - r.elapsed())
	}
}

// pace is how soon after a sweep's begin the next one may follow. Who runs out just
// after a removal is that late, and a burst of removals costs that many sweeps: a
// fifth of the time at most, as long as they are short, and 20 in a pulse's period
// when each takes longer, since who is dead must not wait for the number of services.
func pace(took, period time.Duration) time.Duration {
	return min(max(5*took, period/100), period/20)
}

// announce says what a sweep left unsaid, when its time has come, and returns
// when to look again. A sweep does not wait for that: a pulse must not be late.
func (r *Reaper) announce(ctx context.Context) (next time.Duration) {
	at := r.unsaid.At.Sub(r.begin)
	if r.elapsed() < at {
		return at
	}
	tctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	if err := r.store.Announce(tctx, r.unsaid); err != nil && ctx.Err() == nil {
		r.log.Debug().Err(err).Msg("a removal is not announced; those who poll find it")
	}
	r.unsaid = registrar.Unsaid{}
	return math.MaxInt64
}

// due returns when to sweep after this report: when the oldest heartbeat runs
// out, and no later than the sweep interval; with the next pulse if something
// waits that could not be removed or was not seen. It is sooner while the protection
// holds stale instances, one of which another service may have replaced; took is how
// long the sweep took.
func (r *Reaper) due(report Report, err error, took, next time.Duration) time.Duration {
	now := r.elapsed()
	at := now + registrar.Shorten(r.cfg.Sweep)
	// Who arrives after the pulse runs out a TTL after it.
	expiry := min(report.oldest, r.proof.now) + r.cfg.TTL.Milliseconds()
	switch {
	case len(report.Removed) > 0:
		return now // the oldest went, so the next one is not known yet
	case report.Armed && report.Stale > 0 && len(report.Held) > 0:
		at = min(at, next, now+max(r.proof.period/looksPerPulse, looksRest*took))
	case report.waits || err != nil && !report.surveyed:
		at = min(at, next)
	}
	switch {
	case !report.Armed:
		return at // and once more when armed
	case expiry < r.proof.now:
		return min(at, next) // the credit does not reach that far yet
	}
	// The pulse's time was read before r.proof.recv, so Redis' clock is past the
	// expiry when ours says so; 1 ms more makes up for their rates.
	return min(at, r.proof.recv+ms(expiry+2-r.proof.now))
}

// connect makes sure that the registry's times are this reaper's. It tries
// again until ctx ends.
func (r *Reaper) connect(ctx context.Context) error {
	wait := time.NewTimer(0)
	defer wait.Stop()
	var last error
	outage := registrar.Outage{Shared: &r.voice.state}
	for {
		select {
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), last)
		case <-wait.C:
		}
		err := r.config(ctx, r.cfg.SetTTL, !r.follows)
		if err == nil || errors.Is(err, ErrConfig) {
			return err
		}
		if ctx.Err() != nil {
			continue // what was cut short says less than the error before
		}
		last = err
		if outage.Fail() {
			r.log.Warn().Err(err).Msg("cannot read the registry's times; retrying for ever")
		}
		wait.Reset(registrar.Backoff(outage.Failures, r.cfg.Interval))
	}
}

// config reads the registry's times, and writes this reaper's if there are none. Are
// they others, it is an error if strict, and else this reaper takes them over. That
// somebody may not know them yet goes into the proof; when the proof covers it, the
// registry is told.
func (r *Reaper) config(ctx context.Context, overwrite, strict bool) error {
	t, err := readTimes(ctx, r.store, r.cfg, overwrite)
	if err != nil {
		return err
	}
	if !strict {
		r.follow(t)
	} else if err := checkTimes(t, r.cfg); err != nil {
		return err
	}
	if r.proof.teach(t.Slow, t.SlowAt) {
		r.note(fault{cause: causeTimes})
	}
	if r.proof.taught() {
		tctx, cancel := registrar.WithTimeout(ctx)
		defer cancel()
		if err := r.store.Learned(tctx, t); err != nil {
			return err // the next sweep tries again
		}
		r.proof.slow = 0
	}
	return nil
}

// follow takes over the registry's times. What was proven of the old ones counts no
// more: a whole TTL of the new ones must be healthy first.
func (r *Reaper) follow(t registrar.Times) {
	if t.TTL == r.cfg.TTL && t.Interval == r.cfg.Interval {
		return
	}
	cfg := r.cfg
	cfg.TTL, cfg.Interval = t.TTL, t.Interval
	was := r.cfg
	r.cfg = cfg
	r.proof.retime(cfg.TTL, cfg.Interval)
	r.protection.dry = 2 * cfg.Interval
	r.note(fault{cause: causeTimes})
	if r.voice.news(cfg.TTL, cfg.Interval) {
		r.log.Warn().Dur("ttl", cfg.TTL).Dur("heartbeat", cfg.Interval).Dur("ttl_before", was.TTL).Dur("heartbeat_before", was.Interval).
			Msg("the registry has other times now; going on with them, though this reaper was started with others")
	}
}

type times interface {
	Config(ctx context.Context, ttl, interval time.Duration, overwrite bool) (registrar.Times, error)
}

func readTimes(ctx context.Context, store times, cfg Config, overwrite bool) (registrar.Times, error) {
	tctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	return store.Config(tctx, cfg.TTL, cfg.Interval, overwrite)
}

func checkTimes(t registrar.Times, cfg Config) error {
	if t.TTL != cfg.TTL || t.Interval != cfg.Interval {
		return fmt.Errorf("%w: the registry has TTL %v and heartbeat interval %v, this reaper has %v and %v; give it the registry's, or change the registry with --set-ttl",
			ErrConfig, t.TTL, t.Interval, cfg.TTL, cfg.Interval)
	}
	return nil
}

// Pulse proves by a small write, within a 15th of the TTL, that Redis accepts
// beats now, and by the canary, with each third pulse, that an instance can send
// them. Its error says which of them failed; a canary that did is sent again
// with the next pulse.
func (r *Reaper) Pulse(ctx context.Context) error {
	if err := r.pulse(ctx); err != nil {
		return err
	}
	if r.pulses > 0 {
		r.pulses--
		return nil
	}
	tctx, cancel := context.WithTimeout(ctx, r.proof.deadline())
	defer cancel()
	err := r.proof.late(r.canary(tctx))
	if ctx.Err() != nil {
		return ctx.Err() // nothing is known of the canary
	}
	f := r.proof.canary(err)
	if err == nil {
		r.pulses = canaryEvery - 1
	}
	r.note(f)
	if err != nil {
		return fmt.Errorf("canary: %w", err)
	}
	return nil
}

// pulse is a pulse without the canary.
func (r *Reaper) pulse(ctx context.Context) error {
	tctx, cancel := context.WithTimeout(ctx, r.proof.deadline())
	defer cancel()
	moves := r.store.Moves()
	o := outcome{token: rand.Text(), send: r.elapsed()}
	o.pulse, o.err = r.store.Pulse(tctx, r.cfg.ID, o.token, keepTokens*r.cfg.TTL)
	o.err = r.proof.late(o.err)
	o.recv = r.elapsed()
	f := r.proof.feed(o)
	if o.err == nil && moves != r.moves {
		r.moves = moves
		if f.hard {
			f = r.proof.moved()
		}
	}
	if ctx.Err() == nil {
		r.note(f)
	}
	return o.err
}

// note takes in a change between armed and not armed, and a new cause of the
// latter, and logs it.
func (r *Reaper) note(f fault) {
	was, cause := r.armed, r.cause
	_, armed := r.proof.cutoff()
	switch {
	case armed && !r.armed:
		r.armed, r.cause = true, ""
	case !armed && (r.armed || f.cause != "" && f.cause != r.cause):
		r.armed, r.cause = false, f.cause
		if r.cause == "" {
			r.cause = causeCredit
		}
	}
	r.mu.Lock()
	st := &r.status
	if r.armed != was || st.Since == 0 && r.proof.mine != "" {
		st.Since = r.redisTime(r.elapsed())
		r.tellNews()
	}
	changed := r.armed != was || r.cause != cause
	if changed {
		st.Armed, st.Cause, st.Error = r.armed, r.cause, ""
		if f.err != nil && !r.armed {
			st.Error = f.err.Error()
		}
		r.tellNews()
	}
	if !changed && !armed && f.err != nil && f.cause == r.cause {
		st.Error = f.err.Error() // the newest says best what is wrong; no news
	}
	if st.Until = 0; !armed {
		st.Until = r.proof.earliest(r.redisTime(r.elapsed()))
	}
	why := st.Error
	r.mu.Unlock()
	if r.cause != r.said && r.voice.state.May() {
		if r.said = r.cause; r.armed {
			r.log.Info().Msg("armed")
		} else {
			r.log.Info().Str("cause", r.cause).Str("error", why).Msg("not armed: nobody is taken out")
		}
	}
	if changed && r.cfg.Tell != nil {
		r.cfg.Tell(r.Status())
	}
}

// redisTime is the time, unix ms by Redis' clock, at elapsed: by the last
// accepted pulse; 0 before the first.
func (r *Reaper) redisTime(elapsed time.Duration) int64 {
	if r.proof.mine == "" {
		return 0
	}
	return r.proof.now + (elapsed - r.proof.recv).Milliseconds()
}

// complain logs the error of a sweep when it is another than the last one's. A
// failed connection's text differs each time; what is broken in Redis does not.
func (r *Reaper) complain(err error) {
	what := ""
	switch {
	case errors.Is(err, registrar.ErrBroken):
		what = err.Error()
	case err != nil:
		what = "no answer"
	}
	switch {
	case what == r.complaint || !r.voice.sweeps.May():
		return
	case err != nil:
		r.log.Warn().Err(err).Msg("sweep incomplete; the next one tries again")
	default:
		r.log.Info().Msg("sweeps are complete again")
	}
	r.complaint = what
}

func (r *Reaper) elapsed() time.Duration { return time.Since(r.begin) }
