package registrar

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"
)

// TestDamping plays arrivals and departures on a clock of its own.
func TestDamping(t *testing.T) {
	type step struct {
		at   time.Duration
		what string        // came, went, or wait
		said bool          // of came and went: what they return
		wait time.Duration // after it
	}
	const s = time.Second
	flap := []step{
		{0, "came", false, 0}, {1 * s, "went", false, 0}, {2 * s, "came", false, 0}, {3 * s, "went", false, 0},
		{4 * s, "came", false, 0}, {5 * s, "went", true, 5 * s},
	}
	then := func(more ...step) []step { return append(append([]step{}, flap...), more...) }
	for _, c := range []struct {
		name  string
		steps []step
	}{
		{"the third departure within a minute begins it", flap},
		{"at a minute it does not", []step{
			{0, "came", false, 0}, {1 * s, "went", false, 0}, {2 * s, "came", false, 0}, {30 * s, "went", false, 0}, {31 * s, "came", false, 0}, {61 * s, "went", false, 0},
		}},
		{"just before a minute it does", []step{
			{0, "came", false, 0}, {1 * s, "went", false, 0}, {2 * s, "came", false, 0}, {30 * s, "went", false, 0}, {31 * s, "came", false, 0}, {61*s - 1, "went", true, 5 * s},
		}},
		{"who has not come has not gone", []step{{0, "went", false, 0}, {1 * s, "went", false, 0}, {2 * s, "went", false, 0}, {3 * s, "came", false, 0}}},
		{"the wait passes", then(step{9 * s, "wait", false, 1 * s}, step{10 * s, "wait", false, 0}, step{11 * s, "wait", false, 0})},
		{"it doubles up to a minute", then(
			step{10 * s, "came", false, 0}, step{11 * s, "went", false, 10 * s}, step{21 * s, "came", false, 0}, step{22 * s, "went", false, 20 * s},
			step{42 * s, "came", false, 0}, step{43 * s, "went", false, 40 * s}, step{83 * s, "came", false, 0}, step{84 * s, "went", false, 60 * s},
			step{144 * s, "came", false, 0}, step{145 * s, "went", false, 60 * s})},
		{"two minutes there end it", then(step{10 * s, "came", false, 0}, step{130*s - 1, "came", false, 0}, step{130 * s, "came", true, 0},
			step{131 * s, "came", false, 0}, step{132 * s, "went", false, 0})},
		{"two minutes there end it, though nobody has looked", then(step{10 * s, "came", false, 0}, step{130 * s, "went", false, 0})},
		{"less does not", then(step{10 * s, "came", false, 0}, step{130*s - 1, "went", false, 10 * s})},
		{"two minutes away, from the end of its wait, end it", then(step{130 * s, "came", true, 0}, step{131 * s, "went", false, 0})},
		{"less away does not", then(step{130*s - 1, "came", false, 0}, step{131 * s, "went", false, 10 * s})},
		{"it begins again, and says so", then(step{130 * s, "came", true, 0}, step{131 * s, "went", false, 0}, step{132 * s, "came", false, 0},
			step{133 * s, "went", false, 0}, step{134 * s, "came", false, 0}, step{135 * s, "went", true, 5 * s})},
	} {
		t.Run(c.name, func(t *testing.T) {
			var d Damping
			begun := time.Unix(1_700_000_000, 0)
			for _, x := range c.steps {
				now, said := begun.Add(x.at), false
				switch x.what {
				case "came":
					said = d.Came(now)
				case "went":
					said = d.Went(now)
				}
				if wait := d.Wait(now); said != x.said || wait != x.wait {
					t.Fatalf("%s at %v: %v, wait %v; want %v, %v", x.what, x.at, said, wait, x.said, x.wait)
				}
			}
		})
	}
}

// TestDampingBound: however an instance times it, it makes at most 4 changes a minute
// in the long run, and 2 if it stays as short as it can.
func TestDampingBound(t *testing.T) {
	for _, stays := range []time.Duration{0, time.Second, 20 * time.Second, dampWithin, dampQuiet - 1, dampQuiet} {
		var d Damping
		begun := time.Unix(1_700_000_000, 0)
		now, changes := begun, 0
		for n := 0; now.Sub(begun) < 24*time.Hour; n++ {
			now = now.Add(d.Wait(now))
			d.Came(now)
			// Its worst: it is quick until it is damped, and then stays for so long.
			if d.pause > 0 {
				now = now.Add(stays)
			} else {
				now = now.Add(time.Millisecond)
			}
			d.Went(now)
			changes += 2
		}
		most := 4.0
		if stays <= time.Second {
			most = 2.1
		}
		rate := float64(changes) / now.Sub(begun).Minutes()
		t.Logf("who stays for %v: %.1f changes a minute", stays, rate)
		if rate > most {
			t.Errorf("who stays for %v makes %.1f changes a minute", stays, rate)
		}
	}
}

// TestOthersServe asks who else of a service is to get requests.
func TestOthersServe(t *testing.T) {
	s, srv := newStore(t)
	rdb := srv.Client(t)
	own, other := netip.MustParseAddrPort("10.0.0.1:80"), netip.MustParseAddrPort("10.0.0.2:80")
	put := func(addr netip.AddrPort, m Meta) {
		t.Helper()
		m.ID = addr.String()
		text, err := json.Marshal(m)
		if err == nil {
			_, err = s.Beat(t.Context(), web, Beat{Addr: addr, Token: m.ID, Meta: string(text)})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	admin := func(verb string) {
		t.Helper()
		if _, _, err := s.SetAdmin(t.Context(), web, other, Word{Verb: verb, Force: true}); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name string
		make func()
		want bool
	}{
		{"nobody", func() {}, false},
		{"itself", func() { put(own, Meta{Weight: 100}) }, false},
		{"another", func() { put(other, Meta{Weight: 1}) }, true},
		{"one that drains", func() { put(other, Meta{Weight: 100, Draining: true}) }, false},
		{"one of weight 0", func() { put(other, Meta{}) }, false},
		{"one in maint", func() { put(other, Meta{Weight: 100}); admin("maint") }, false},
		{"one that is drained", func() { admin("drain") }, false},
		{"one that is ready again", func() { admin("ready") }, true},
		{"one that cannot be read", func() { rdb.HSet(t.Context(), s.Keys().Meta(web), other.String(), "{") }, false},
		{"one that has missed two beats", func() {
			put(other, Meta{Weight: 100})
			now := rdb.Time(t.Context()).Val().UnixMilli()
			rdb.ZAdd(t.Context(), s.Keys().Instances(web), redis.Z{Score: float64(now - 2*intervalMS - 1), Member: other.String()})
		}, false},
	} {
		c.make()
		if got, err := s.OthersServe(t.Context(), web, own); err != nil || got != c.want {
			t.Errorf("%s: %v, %v", c.name, got, err)
		}
	}
	srv.Kill(t)
	if _, err := s.OthersServe(t.Context(), web, own); err == nil {
		t.Error("an answer of a dead Redis")
	}
}

// TestDamperHold: one that is damped waits while another serves, and for nothing else.
func TestDamperHold(t *testing.T) {
	s, srv := newStore(t)
	own, other := netip.MustParseAddrPort("10.0.0.1:80"), netip.MustParseAddrPort("10.0.0.2:80")
	d := NewDamper(s, zerolog.New(zerolog.NewTestWriter(t)))
	hold := func(ctx context.Context) chan bool {
		done := make(chan bool, 1)
		go func() { done <- d.Hold(ctx, web, own, nil) }()
		return done
	}
	returns := func(what string, done chan bool, want bool) {
		t.Helper()
		select {
		case got := <-done:
			if got != want {
				t.Errorf("%s: %v", what, got)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("%s: it still waits", what)
		}
	}
	waits := func(done chan bool) {
		t.Helper()
		for begun := time.Now(); !d.Waiting(); time.Sleep(time.Millisecond) {
			select {
			case <-done:
				t.Fatal("it does not wait")
			default:
			}
			if time.Since(begun) > 30*time.Second {
				t.Fatal("it neither waits nor returns")
			}
		}
	}
	beat := func() {
		t.Helper()
		if _, err := s.Beat(t.Context(), web, Beat{Addr: other, Token: "x", Meta: `{"id":"x","weight":1}`}); err != nil {
			t.Fatal(err)
		}
	}
	beat()
	returns("one that has never gone", hold(t.Context()), true)
	for range dampAfter {
		d.Beaten(errors.New("refused")) // is not there
		d.Left(ErrUnhealthy)
	}
	returns("one that was never accepted", hold(t.Context()), true)
	for range 5 * dampAfter {
		d.Beaten(nil)
		d.Left(nil)
		d.Beaten(nil)
		d.Left(ErrHandedOver)
	}
	returns("one that went on somebody's word", hold(t.Context()), true)
	for range dampAfter + 4 {
		d.Beaten(nil)
		d.Left(ErrUnhealthy)
	}
	if wait := d.Wait(); wait < dampMost/2 || wait > dampMost {
		t.Fatalf("it waits %v", wait)
	}
	ctx, cancel := context.WithCancel(t.Context())
	held := hold(ctx)
	waits(held)
	cancel()
	returns("one that is not wanted any more", held, false)
	if d.Waiting() {
		t.Error("it still waits")
	}
	beat()
	held = hold(t.Context())
	waits(held)
	if _, err := s.Leave(t.Context(), web, other, "x", Left); err != nil {
		t.Fatal(err)
	}
	returns("when the last of the others has gone", held, true)
	if _, err := s.Beat(t.Context(), web, Beat{Addr: other, Token: "y", Meta: `{"id":"y","weight":1}`}); err != nil {
		t.Fatal(err)
	}
	held = hold(t.Context())
	waits(held)
	srv.Kill(t)
	returns("when nothing is known", held, true)
	if d.Idle() {
		t.Error("it has forgotten")
	}
}
