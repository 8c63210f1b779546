package reaper

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"rollcall/registrar"
)

// The proof's constants, in terms of the TTL, the heartbeat interval B and the
// pulse's period P = TTL/15. Measured: reaper tests, at P of 40 ms to 1 s.
const (
	pulsesPerTTL = 15
	// keepTokens is how many TTL a pulse's token lives in Redis, and how long
	// one without an answer is awaited.
	keepTokens = 4
	// canaryEvery is how many pulses go by between two canaries. A fault that
	// only the canary sees is found 4 P after it began, canary's deadline
	// included; whoever beat within 2 B before it runs out TTL − 2 B, at least
	// 5 P, after it began. So nobody whose last beat was lost goes before.
	canaryEvery = 3
	// maxSegments bounds the memory of healthy times. Only those longer than B
	// are kept, so it covers 64 faults.
	maxSegments = 64
)

// The causes of not being armed, as logs and Status show them.
const (
	causeCredit = "no whole TTL of healthy time yet"
	causePulse  = "pulse failed"
	causeCanary = "the canary could not beat as an instance does"
	causeSlow   = "pulse too slow"
	causeGap    = "too long without a pulse"
	causeReap   = "removal refused"
	causeTimes  = "the registry's times are new, and not every instance knows them yet"
	causeToken  = "the last pulse is not in this data set, or another reaper has this id"
	causeReplID = "another replication id: a fail-over or other data"
	causeEpoch  = "another epoch: the registry lost its data"
	causeClock  = "the clock of redis moved"
	causeMoved  = "the registry's name names another server, and everybody has a minute to follow"
)

// outcome is one pulse as this process saw it. send and recv are monotonic,
// since any fixed instant; pulse counts only if err is nil.
type outcome struct {
	token      string
	send, recv time.Duration
	pulse      registrar.Pulse
	err        error
}

// fault is what a pulse or a removal revealed; the zero value is none. A soft
// one says that writes may have been refused for a while: that time does not
// count. A hard one says that the data or its clock may be others: nothing from
// before counts.
type fault struct {
	cause string
	hard  bool
	err   error
}

// segment is a healthy time, unix ms by Redis' clock.
type segment struct{ from, to int64 }

// proof answers whether Redis has accepted writes for a whole TTL of healthy
// time, and until when. It is fed with every pulse and knows no clock. The
// zero value is not usable; see newProof.
type proof struct {
	ttl, beat, period time.Duration

	segments []segment // newest last
	open     bool      // the last segment may still grow
	ok       bool      // the last pulse was accepted, and no removal failed since
	resets   int       // hard faults so far

	// Somebody may beat as slowly as slow, ms, by times from before; 0 = nobody.
	// Until all have beaten in healthy time, a fault sets them back that far.
	// What was before since, unix ms, counts for nothing. See registrar.Times.
	slow, since int64
	slowAt      string

	// A canary sees what a pulse cannot: that nobody new may connect. Its failure
	// takes the credit back to the last one that sang, and nothing counts until
	// the next one does.
	silent bool  // the last canary failed
	sang   int64 // the last accepted pulse's time when the last canary sang, unix ms

	mine          string // the last token known to be accepted; empty before the first
	unconfirmed   []pending
	replid, epoch string // epoch is empty if not known yet
	now           int64  // the last accepted pulse's time, unix ms by Redis' clock
	recv          time.Duration
	anchor        reading
}

// pending is the token of a pulse without an answer: it may land later.
type pending struct {
	token string
	at    time.Duration
}

// reading bounds Redis' clock minus ours: the pulse's time was read after it
// was sent and before its answer came.
type reading struct{ lo, hi, at time.Duration }

func newProof(ttl, beat time.Duration) proof {
	return proof{ttl: ttl, beat: beat, period: ttl / pulsesPerTTL}
}

// deadline is the most time that a pulse may take in all.
func (p *proof) deadline() time.Duration { return p.period }

// connectTrips is how many round trips to Redis a new connection and its first script
// take at most: TCP, TLS, log-in, the script by its name, and its text.
const connectTrips = 5

// late says what a pulse may take, if err is that it took longer.
func (p *proof) late(err error) error {
	var network net.Error
	if errors.Is(err, context.DeadlineExceeded) || errors.As(err, &network) && network.Timeout() {
		return fmt.Errorf("no answer within %v, a fifteenth of the TTL; a round trip to redis may take %v: %w", p.deadline(), p.deadline()/connectTrips, err)
	}
	return err
}

// maxAge is how old a pulse may be when it is acted on, and the longest time
// between two that still counts as healthy: 2.5 P.
func (p *proof) maxAge() time.Duration { return p.period * 5 / 2 }

// feed takes in a pulse and returns what it revealed.
func (p *proof) feed(o outcome) fault {
	if o.err != nil {
		p.expire(o.recv)
		p.unconfirmed = append(p.unconfirmed, pending{o.token, o.recv})
		return p.soft(causePulse, o.err)
	}
	now := reading{ms(o.pulse.Now) - o.recv, ms(o.pulse.Now+1) - o.send, o.recv}
	first, last := p.mine == "", p.recv
	var f fault
	switch {
	case first: // whatever an earlier process of this id left behind
	case !p.known(o.pulse.Previous, o.recv):
		f = fault{cause: causeToken, hard: true}
	case o.pulse.ReplID != p.replid:
		f = fault{cause: causeReplID, hard: true}
	case p.epoch != "" && o.pulse.Epoch != p.epoch:
		f = fault{cause: causeEpoch, hard: true}
	case o.pulse.Now < p.now || now.lo-p.anchor.hi > p.period/2 || p.anchor.lo-now.hi > p.period/2:
		f = fault{cause: causeClock, hard: true}
	case o.recv-o.send > p.deadline()*5/4:
		f = p.soft(causeSlow, nil)
	case p.open && o.recv-last > p.maxAge():
		f = p.soft(causeGap, nil)
	}
	switch {
	case f.hard:
		p.segments, p.open, p.sang = nil, false, 0
		p.resets++
		fallthrough
	case first:
		p.anchor = now
	case o.recv-p.anchor.at > p.ttl+p.beat && o.recv-o.send <= p.period/2:
		// Pulse by pulse, a clock that creeps would never be caught; against an
		// anchor this old it may gain or lose P/2 in TTL + B at most. A vague
		// reading makes no anchor.
		p.anchor = now
	}
	p.mine, p.replid, p.epoch = o.token, o.pulse.ReplID, o.pulse.Epoch
	p.now, p.recv, p.ok = o.pulse.Now, o.recv, true
	if p.open {
		p.segments[len(p.segments)-1].to = p.now
		return f
	}
	if p.silent {
		return f
	}
	if len(p.segments) == maxSegments {
		p.segments = slices.Delete(p.segments, 0, 1)
	}
	p.segments, p.open = append(p.segments, segment{p.now, p.now}), true
	return f
}

// known tells whether the pulse key held what this process wrote last. A token
// lands at most once, so one that was seen is no longer awaited.
func (p *proof) known(previous string, recv time.Duration) bool {
	p.expire(recv)
	if previous == p.mine {
		return true
	}
	i := slices.IndexFunc(p.unconfirmed, func(u pending) bool { return u.token == previous })
	if i < 0 {
		return false
	}
	p.unconfirmed = slices.Delete(p.unconfirmed, i, i+1)
	return true
}

// expire forgets tokens older than 4 TTL: the key itself lives no longer.
func (p *proof) expire(now time.Duration) {
	p.unconfirmed = slices.DeleteFunc(p.unconfirmed, func(u pending) bool { return now-u.at > keepTokens*p.ttl })
}

// soft ends the healthy time. A segment that gives no credit is forgotten, so
// that short ones do not push out long ones.
func (p *proof) soft(cause string, err error) fault {
	if n := len(p.segments); p.open && p.credit(p.segments[n-1]) <= 0 {
		p.segments = p.segments[:n-1]
	}
	p.open, p.ok = false, false
	return fault{cause: cause, err: err}
}

// canary takes in a canary's beat and returns what it revealed.
func (p *proof) canary(err error) fault {
	p.silent = err != nil
	if err == nil {
		p.sang = p.now
		return fault{}
	}
	for n := len(p.segments); n > 0 && p.segments[n-1].to > p.sang; n-- {
		s := &p.segments[n-1]
		if s.to = p.sang; s.to <= s.from {
			p.segments = p.segments[:n-1]
		}
	}
	p.open = false
	return fault{cause: causeCanary, err: err}
}

// credit is what a segment is worth, ms: its first B is not, because an
// instance may need that long to come back after the fault before it.
func (p *proof) credit(s segment) int64 { return s.to - max(s.from, p.since) - p.back() }

// back is how long, ms, an instance may need to come back after a fault.
func (p *proof) back() int64 { return max(p.beat.Milliseconds(), p.slow) }

// teach takes in what the registry says of those who do not know its times yet,
// and tells whether it is news that some do not.
func (p *proof) teach(slow int64, at string) (news bool) {
	if slow <= p.beat.Milliseconds() {
		p.slow, p.since = 0, 0 // also when somebody has put right what was written by hand
		return false
	}
	if news = at != p.slowAt || slow > p.slow; news {
		p.since = p.now + p.maxAge().Milliseconds() // it was after the last pulse, or was known
	}
	p.slow, p.slowAt = slow, at
	return news
}

// retime has the proof begin anew, for other times. Who beats by longer ones has one of
// their intervals to hear of shorter ones, also where nobody noted that (see teach):
// somebody may have written them by hand.
func (p *proof) retime(ttl, beat time.Duration) {
	slowest := max(p.beat, p.ttl/heartbeatsPerTTL)
	p.ttl, p.beat, p.period = ttl, beat, ttl/pulsesPerTTL
	p.segments, p.open = nil, false
	p.since = p.now + p.maxAge().Milliseconds()
	if slowest > beat {
		p.since += slowest.Milliseconds()
	}
}

// moved has nobody go before everybody has followed to the server of the last pulse,
// which is another than before. What is stored there may be of an earlier time. The
// proof's own time, TTL + B, is a part of that.
func (p *proof) moved() fault {
	p.since = p.now + max(registrar.FollowFor.Milliseconds()-p.ttl.Milliseconds()-p.back(), p.maxAge().Milliseconds())
	return fault{cause: causeMoved, hard: true}
}

// taught tells whether everybody has had the time to hear of the registry's
// times, and a TTL more.
func (p *proof) taught() bool {
	n := len(p.segments)
	return p.slow > 0 && p.ok && p.open && p.credit(p.segments[n-1]) >= p.ttl.Milliseconds()
}

// cutoff returns the point since when the credit adds up to the TTL, unix ms by
// Redis' clock, and whether there is one: whoever beat last before it had a
// whole TTL of healthy time to beat again. With one segment of TTL + B it is
// the last pulse's time − TTL. It never depends on the time of the call.
func (p *proof) cutoff() (ms int64, armed bool) {
	if !p.ok || p.silent {
		return 0, false
	}
	need := p.ttl.Milliseconds()
	for _, s := range slices.Backward(p.segments) {
		c := p.credit(s)
		if c >= need {
			return s.to - need, true
		}
		need -= max(c, 0)
	}
	return 0, false
}

// earliest returns when, unix ms, cutoff can be armed if all is healthy from now
// on; 0 if it has never been fed a pulse.
func (p *proof) earliest(now int64) int64 {
	if p.mine == "" {
		return 0
	}
	need := p.ttl.Milliseconds()
	for i, s := range p.segments {
		if p.open && i == len(p.segments)-1 {
			return s.to + need - p.credit(s)
		}
		need -= max(p.credit(s), 0)
	}
	if need <= 0 {
		return now // with the next pulse
	}
	return max(now, p.since) + need + p.back()
}

// suspect is the time, unix ms by Redis' clock, before which a last beat makes
// a suspect: TTL − 1.1 B before the last pulse. When the first victim of an
// event runs out, all others of it beat at most B later (and jitter only
// shortens B), so they are counted with it.
func (p *proof) suspect() int64 {
	return p.now - (p.ttl - p.beat*11/10).Milliseconds()
}

func ms(n int64) time.Duration { return time.Duration(n) * time.Millisecond }
