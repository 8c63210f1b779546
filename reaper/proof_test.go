package reaper

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"rollcall/registrar"
)

// The tables use TTL 15 s, so B = 5 s and P = 1 s.
const (
	testTTL  = 15 * time.Second
	testBeat = 5 * time.Second
	epochMS  = 1_700_000_000_000 // Redis' clock when ours is 0
)

// world is a Redis without faults, as a proof sees it: tests change a field
// and let it run on.
type world struct {
	t       *testing.T
	p       proof
	at      time.Duration // our clock
	skew    time.Duration // Redis' clock minus ours, less epochMS
	key     string        // what the pulse key holds
	replid  string
	epoch   string
	answers time.Duration // how long a pulse takes
	sent    int
	faults  []string // causes, in order, hard ones with a mark
}

func newWorld(t *testing.T) *world {
	return &world{t: t, p: newProof(testTTL, testBeat), replid: "r1", epoch: "e1", answers: time.Millisecond}
}

// pulse sends one at the world's time; with an error it did not land.
func (w *world) pulse(err error) fault {
	w.sent++
	o := outcome{token: fmt.Sprint("t", w.sent), send: w.at, recv: w.at + w.answers, err: err}
	if err == nil {
		o.pulse = registrar.Pulse{
			Now: epochMS + (w.at + w.skew + w.answers/2).Milliseconds(), ReplID: w.replid, Epoch: w.epoch, Previous: w.key,
		}
		w.key = o.token
	}
	f := w.p.feed(o)
	if f.cause != "" {
		name := f.cause
		if f.hard {
			name += " (hard)"
		}
		w.faults = append(w.faults, name)
	}
	return f
}

// run lets d go by with a pulse each P, the first after one P.
func (w *world) run(d time.Duration) {
	for end := w.at + d; w.at < end; {
		w.at += time.Second
		w.pulse(nil)
	}
}

// fail lets d go by with pulses that fail.
func (w *world) fail(d time.Duration) {
	for end := w.at + d; w.at < end; {
		w.at += time.Second
		w.pulse(errors.New("no answer"))
	}
}

// land is a pulse that had no answer but arrives now.
func (w *world) land(sent int) { w.key = fmt.Sprint("t", sent) }

func (w *world) wantArmed(want bool) {
	w.t.Helper()
	if _, armed := w.p.cutoff(); armed != want {
		w.t.Errorf("at %v: armed %v, want %v; faults %q", w.at, armed, want, w.faults)
	}
}

// wantCutoff checks the cut-off, as the age that it leaves to the last pulse.
func (w *world) wantCutoff(age time.Duration) {
	w.t.Helper()
	cut, armed := w.p.cutoff()
	if got := ms(w.p.now - cut); !armed || got != age {
		w.t.Errorf("at %v: armed %v, cut-off %v before the last pulse, want %v; faults %q", w.at, armed, got, age, w.faults)
	}
}

func TestProofArmsAfterTTLAndBeat(t *testing.T) {
	w := newWorld(t)
	w.pulse(nil)
	w.run(19 * time.Second)
	w.wantArmed(false)
	w.run(time.Second) // the boundary: TTL + B to the millisecond
	w.wantCutoff(testTTL)
	w.run(time.Hour)
	w.wantCutoff(testTTL)
	if len(w.p.segments) != 1 || len(w.faults) != 0 {
		t.Errorf("after an hour of health: %d segments, faults %q", len(w.p.segments), w.faults)
	}
}

// TestProofSlow: somebody may beat each 12 s, where all others beat each 5 s. That
// long he may need after it was said, and after each fault, until all has gone well
// for so long and a TTL.
func TestProofSlow(t *testing.T) {
	const slow = 12 * time.Second
	w := newWorld(t)
	w.pulse(nil)
	w.run(time.Minute)
	if w.p.teach(testBeat.Milliseconds(), "a") {
		t.Error("who beats as all do is news")
	}
	w.wantArmed(true)
	if !w.p.teach(slow.Milliseconds(), "b") || w.p.teach(slow.Milliseconds(), "b") {
		t.Error("it is news once")
	}
	w.wantArmed(false)
	begun := w.p.now + w.p.maxAge().Milliseconds()
	if at := w.p.earliest(w.p.now); at != begun+(slow+testTTL).Milliseconds() {
		t.Errorf("armed %v after the change at the earliest", ms(at-begun))
	}
	w.run(10 * time.Second) // gives no credit
	w.fail(30 * time.Second)
	if at := w.p.earliest(w.p.now); at != w.p.now+(slow+testTTL).Milliseconds() {
		t.Errorf("after a fault armed in %v at the earliest", ms(at-w.p.now))
	}
	w.run(slow + testTTL) // the first pulse opens the segment
	w.wantArmed(false)
	if w.p.taught() {
		t.Error("not proven yet")
	}
	w.run(time.Second)
	w.wantCutoff(testTTL)
	if !w.p.taught() {
		t.Error("all have had the time")
	}
	// Another change of the same kind begins anew. One that another reaper has proven,
	// or that somebody mistyped and has put right, is over.
	w.p.teach(slow.Milliseconds(), "c")
	w.wantArmed(false)
	w.p.teach(0, "c")
	w.wantArmed(true)
	if w.p.taught() {
		t.Error("there is nothing to prove")
	}
}

func TestProofFirstPulse(t *testing.T) {
	tests := []struct {
		name, key, epoch string
	}{
		{"new reaper", "", "e1"},
		{"new registry", "", ""},
		{"an earlier process of this id", "old", "e1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			w.key, w.epoch = tt.key, tt.epoch
			if f := w.pulse(nil); f != (fault{}) {
				t.Errorf("got fault %+v, want a fresh start", f)
			}
			w.epoch = "e1" // as the first pulse has set it, if there was none
			w.run(testTTL + testBeat)
			w.wantCutoff(testTTL)
			if len(w.faults) > 0 {
				t.Errorf("faults %q, want none", w.faults)
			}
		})
	}
}

// Each fault comes after a minute of health; the same pulse or the next one
// goes well.
func TestProofFaults(t *testing.T) {
	tests := []struct {
		name  string
		fault func(*world)
		want  []string      // causes, each once
		age   time.Duration // of the cut-off with the next good pulse; 0 = not armed
	}{
		{"none", func(w *world) { w.run(time.Second) }, nil, testTTL},
		{"failed pulse", func(w *world) { w.fail(time.Second) }, []string{causePulse}, testTTL + 2*time.Second},
		{"longest gap", func(w *world) { w.at += 1500 * time.Millisecond }, nil, testTTL},
		{"gap", func(w *world) { w.at += 1501 * time.Millisecond }, []string{causeGap}, testTTL + 2501*time.Millisecond},
		{"slow pulse", func(w *world) {
			w.at += time.Second
			w.answers = 1251 * time.Millisecond
			w.pulse(nil)
			w.answers = time.Millisecond
		}, []string{causeSlow}, testTTL + 2*time.Second},
		{"10 s outage", func(w *world) { w.fail(10 * time.Second) }, []string{causePulse}, testTTL + 11*time.Second},
		{"older data", func(w *world) { w.key = "t3" }, []string{causeToken + " (hard)"}, 0},
		{"key gone", func(w *world) { w.key = "" }, []string{causeToken + " (hard)"}, 0},
		{"second reaper of this id", func(w *world) { w.key = "x1" }, []string{causeToken + " (hard)"}, 0},
		{"other replication id", func(w *world) { w.replid = "r2" }, []string{causeReplID + " (hard)"}, 0},
		{"other epoch", func(w *world) { w.epoch = "e2" }, []string{causeEpoch + " (hard)"}, 0},
		{"no epoch", func(w *world) { w.epoch = "" }, []string{causeEpoch + " (hard)"}, 0},
		{"clock +499 ms", func(w *world) { w.skew = 499 * time.Millisecond }, nil, testTTL},
		{"clock +503 ms", func(w *world) { w.skew = 503 * time.Millisecond }, []string{causeClock + " (hard)"}, 0},
		{"clock −503 ms", func(w *world) { w.skew = -503 * time.Millisecond }, []string{causeClock + " (hard)"}, 0},
		{"clock before the last pulse", func(w *world) { w.at -= 990 * time.Millisecond; w.skew = -20 * time.Millisecond }, []string{causeClock + " (hard)"}, 0},
		{"clock +1 h during an outage", func(w *world) { w.fail(time.Second); w.skew = time.Hour }, []string{causePulse, causeClock + " (hard)"}, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			w.pulse(nil)
			w.run(time.Minute)
			tt.fault(w)
			w.run(time.Second)
			if got := slices.Compact(w.faults); !slices.Equal(got, tt.want) {
				t.Errorf("faults %q, want %q", got, tt.want)
			}
			if tt.age == 0 {
				w.wantArmed(false)
				w.run(testTTL + testBeat - time.Second)
				w.wantArmed(false)
				w.run(time.Second)
				w.wantCutoff(testTTL)
				return
			}
			w.wantCutoff(tt.age)
		})
	}
}

// A failed pulse is no licence, whatever the credit.
// What earliest says in the course of a fault is when it is armed again.
func TestProofEarliest(t *testing.T) {
	w := newWorld(t)
	if got := w.p.earliest(5); got != 0 {
		t.Errorf("before the first pulse: %d, want 0", got)
	}
	w.run(10 * time.Second)
	for _, step := range []struct {
		name  string
		fault func()
	}{
		{"healthy so far", func() {}},
		{"after a failed pulse", func() { w.fail(time.Second) }},
		{"after a canary that could not", func() { w.p.canary(errors.New("no")); w.p.canary(nil) }},
	} {
		t.Run(step.name, func(t *testing.T) {
			step.fault()
			said := w.p.earliest(epochMS + w.at.Milliseconds())
			for range 60 {
				if _, armed := w.p.cutoff(); armed {
					break
				}
				w.run(time.Second)
			}
			// A pulse is a second after the other.
			if _, armed := w.p.cutoff(); !armed {
				t.Fatal("never armed")
			}
			if late := ms(w.p.now - said); late < 0 || late > 2*time.Second {
				t.Errorf("armed %v after it said, want 0 to two pulses", late)
			}
		})
	}
}

func TestProofNotArmedByFailedPulse(t *testing.T) {
	w := newWorld(t)
	w.pulse(nil)
	w.run(time.Minute)
	w.fail(time.Second)
	w.wantArmed(false)
	w.p.soft(causeReap, nil)
	w.wantArmed(false)
}

// The first B after a fault gives no credit: until then an instance may not
// have found its way back.
func TestProofFirstBeatUncredited(t *testing.T) {
	w := newWorld(t)
	w.pulse(nil)
	w.run(time.Minute)
	end := w.p.now
	w.fail(30 * time.Second)
	for _, tt := range []struct {
		run  time.Duration
		want int64 // cut-off, before the end of the first segment
	}{
		{time.Second, 15000}, {testBeat, 15000}, {time.Second, 14000}, {10 * time.Second, 4000}, {3 * time.Second, 1000},
	} {
		w.run(tt.run)
		if cut, armed := w.p.cutoff(); !armed || end-cut != tt.want {
			t.Errorf("%v after the outage: armed %v, cut-off %d ms before it, want %d", w.at, armed, end-cut, tt.want)
		}
	}
	w.run(time.Second) // 15 s of credit since
	w.wantCutoff(testTTL)
}

// Stalls that come back before a TTL + B is over would keep a reaper that
// starts anew each time from ever removing anybody.
func TestProofPeriodicStalls(t *testing.T) {
	w := newWorld(t)
	w.pulse(nil)
	armed, n := 0, 0
	for range 50 {
		w.run(11 * time.Second)
		w.fail(time.Second)
		if w.at > time.Minute {
			n++
			w.run(time.Second)
			if cut, ok := w.p.cutoff(); ok {
				armed++
				// 15 s of credit is at most three segments of 12 s, less 5 s each.
				if age := ms(w.p.now - cut); age < testTTL+2*testBeat || age > 3*13*time.Second {
					t.Fatalf("cut-off %v old", age)
				}
			}
		}
	}
	if n == 0 || armed != n {
		t.Errorf("armed in %d of %d", armed, n)
	}
	// Those shorter than B give nothing, however many.
	w = newWorld(t)
	w.pulse(nil)
	for range 200 {
		w.run(4 * time.Second)
		w.wantArmed(false)
		w.fail(time.Second)
	}
	if len(w.p.segments) > 1 {
		t.Errorf("%d segments without credit are kept", len(w.p.segments))
	}
}

func TestProofSegmentsBounded(t *testing.T) {
	w := newWorld(t)
	w.pulse(nil)
	for range 3 * maxSegments {
		w.run(7 * time.Second)
		w.fail(time.Second)
	}
	if n := len(w.p.segments); n > maxSegments {
		t.Errorf("%d segments, want at most %d", n, maxSegments)
	}
	w.run(time.Second)
	w.wantArmed(true)
}

// 0.9 P from pulse to pulse is within any check of neighbours.
func TestProofCreepingClock(t *testing.T) {
	w := newWorld(t)
	w.pulse(nil)
	w.run(time.Minute)
	w.wantArmed(true)
	for i := range 30 {
		w.skew += 900 * time.Millisecond
		w.run(time.Second)
		if _, armed := w.p.cutoff(); armed {
			t.Fatalf("armed after %d s of a creeping clock; faults %q", i+1, w.faults)
		}
	}
	// Slowly: 60 ms a pulse is 0.9 P within 15 s.
	w = newWorld(t)
	w.pulse(nil)
	w.run(time.Minute)
	n := 0
	for ; n < 100 && len(w.faults) == 0; n++ {
		w.skew += 60 * time.Millisecond
		w.run(time.Second)
	}
	if n < 8 || n > 20 || len(w.faults) != 1 || w.faults[0] != causeClock+" (hard)" {
		t.Errorf("60 ms a pulse was seen after %d pulses, faults %q", n, w.faults)
	}
}

func TestProofAnchor(t *testing.T) {
	w := newWorld(t)
	w.pulse(nil)
	// A crystal's drift, 100 ppm, must not look like a step, however long.
	for range 3600 * 4 {
		w.skew += 100 * time.Microsecond
		w.run(time.Second)
	}
	w.wantArmed(true)
	if len(w.faults) > 0 {
		t.Errorf("drift of 100 ppm: faults %q", w.faults)
	}
	// A vague reading makes no anchor.
	anchor := w.p.anchor
	w.at += testTTL + testBeat
	w.answers = 600 * time.Millisecond
	w.run(time.Second)
	if w.p.anchor != anchor {
		t.Error("a pulse of 600 ms became the anchor")
	}
	w.answers = time.Millisecond
	w.run(time.Second)
	if w.p.anchor == anchor {
		t.Error("a sharp reading did not become the anchor")
	}
}

func TestProofUnconfirmed(t *testing.T) {
	lost := errors.New("timeout")
	newArmed := func(t *testing.T) *world {
		w := newWorld(t)
		w.pulse(nil)
		w.run(time.Minute)
		return w
	}
	t.Run("lands before the next", func(t *testing.T) {
		w := newArmed(t)
		w.at += time.Second
		w.pulse(lost)
		w.land(w.sent)
		w.run(time.Second)
		w.wantArmed(true)
	})
	t.Run("lands after the next", func(t *testing.T) {
		w := newArmed(t)
		w.at += time.Second
		w.pulse(lost)
		late := w.sent
		w.run(time.Second)
		w.land(late)
		w.run(time.Second)
		w.wantArmed(true)
	})
	t.Run("lands only once", func(t *testing.T) {
		w := newArmed(t)
		w.at += time.Second
		w.pulse(lost)
		late := w.sent
		w.land(late)
		w.run(2 * time.Second)
		w.wantArmed(true)
		w.land(late) // older data that held it
		w.run(time.Second)
		w.wantArmed(false)
	})
	t.Run("awaited for 4 TTL", func(t *testing.T) {
		w := newArmed(t)
		w.at += time.Second
		w.pulse(lost)
		late := w.sent
		w.run(4 * testTTL)
		w.land(late)
		w.at -= time.Second // so that the next is 4 TTL after it
		w.run(time.Second)
		w.wantArmed(true)
	})
	t.Run("not for longer", func(t *testing.T) {
		w := newArmed(t)
		w.at += time.Second
		w.pulse(lost)
		late := w.sent
		w.run(4 * testTTL)
		w.land(late)
		w.run(time.Second)
		w.wantArmed(false)
	})
	t.Run("a day without Redis", func(t *testing.T) {
		w := newArmed(t)
		w.fail(24 * time.Hour)
		if n := len(w.p.unconfirmed); n > 61 {
			t.Errorf("%d tokens are kept", n)
		}
	})
}

func TestProofSuspect(t *testing.T) {
	w := newWorld(t)
	w.pulse(nil)
	if got, want := ms(w.p.now-w.p.suspect()), 9500*time.Millisecond; got != want {
		t.Errorf("suspect after %v, want TTL − 1.1 B = %v", got, want)
	}
}
