package registrar

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"rollcall/registrar/redistest"
)

// token returns the state of web now.
func token(tb testing.TB, s *Store) Token {
	tb.Helper()
	snap, err := s.Read(tb.Context(), web, nil)
	must(tb, err)
	return snap.Token
}

func TestAck(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	ctx := t.Context()
	join(t, s, host(1), "a")
	must(t, s.Acker("lb1").Ack(ctx, web, token(t, s)))
	join(t, s, host(2), "b")
	must(t, s.Acker("lb2").Ack(ctx, web, token(t, s)))
	acks, err := s.Acks(ctx, web)
	must(t, err)
	want := []Balancer{{ID: "lb1", Applied: 1, Seen: t0, Live: true}, {ID: "lb2", Applied: 2, Seen: t0, Live: true}}
	if !slices.Equal(acks.Balancers, want) || acks.Token.Version != 2 || acks.Now != t0 {
		t.Errorf("got %+v, want %+v", acks, want)
	}
	for _, c := range []struct {
		version      int64
		behind, live int
	}{{1, 0, 2}, {2, 1, 2}, {3, 2, 2}} {
		if behind, live := acks.Behind(c.version); behind != c.behind || live != c.live {
			t.Errorf("version %d: %d of %d behind, want %d of %d", c.version, behind, live, c.behind, c.live)
		}
	}

	// Live is who was seen within 12 s, and who was not is waited for no more.
	for _, c := range []struct {
		age  int64
		live bool
	}{{BalancerLive.Milliseconds(), true}, {BalancerLive.Milliseconds() + 1, false}} {
		s.setClock(t0 + c.age)
		acks, err := s.Acks(ctx, web)
		must(t, err)
		if acks.Balancers[0].Live != c.live {
			t.Errorf("seen %d ms ago: live %v", c.age, acks.Balancers[0].Live)
		}
	}
	// Who is silent for an hour is forgotten by the next that speaks.
	s.setClock(t0 + balancerForget.Milliseconds())
	must(t, s.Acker("lb2").Ack(ctx, web, token(t, s)))
	acks, err = s.Acks(ctx, web)
	must(t, err)
	if len(acks.Balancers) != 1 || acks.Balancers[0].ID != "lb2" {
		t.Errorf("remembered: %+v", acks.Balancers)
	}
}

func TestAckOfAnotherHistory(t *testing.T) {
	srv := redistest.Start(t)
	for _, c := range []struct {
		name  string
		token func(Token) Token
	}{
		{"replid", func(t Token) Token { t.ReplID = "x"; return t }},
		{"epoch", func(t Token) Token { t.Epoch = "x"; return t }},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			join(t, s, host(1), "a")
			if err := s.Acker("lb").Ack(t.Context(), web, c.token(token(t, s))); !errors.Is(err, ErrOtherHistory) {
				t.Errorf("got %v", err)
			}
			acks, err := s.Acks(t.Context(), web)
			must(t, err)
			if len(acks.Balancers) != 0 {
				t.Errorf("written: %+v", acks.Balancers)
			}
		})
	}
}

func TestAckOfAWrongType(t *testing.T) {
	srv := redistest.Start(t)
	for _, of := range []func(Keys) string{func(k Keys) string { return k.Applied(web) }, Keys.Owners} {
		s := fresh(t, srv)
		join(t, s, host(1), "a")
		do(t, s, "SET", of(s.keys), "x")
		if err := s.Acker("lb").Ack(t.Context(), web, token(t, s)); err == nil {
			t.Error("accepted")
		}
		if n := do(t, s, "EXISTS", s.keys.Balancers()); n != int64(0) {
			t.Error("written before it was refused")
		}
	}
}

func TestWaitApplied(t *testing.T) {
	srv := redistest.Start(t)
	t.Run("nobody to wait for", func(t *testing.T) {
		s := fresh(t, srv)
		join(t, s, host(1), "a")
		if live, err := s.WaitApplied(t.Context(), web, 1, nil); live != 0 || err != nil {
			t.Errorf("%d, %v", live, err)
		}
	})
	t.Run("until the last has it", func(t *testing.T) {
		s := fresh(t, srv)
		join(t, s, host(1), "a")
		old := token(t, s)
		must(t, s.Acker("lb1").Ack(t.Context(), web, old))
		must(t, s.Acker("lb2").Ack(t.Context(), web, old))
		join(t, s, host(2), "b")
		must(t, s.Acker("lb1").Ack(t.Context(), web, token(t, s)))
		looks := 0
		live, err := s.WaitApplied(t.Context(), web, 2, func() error {
			if looks++; looks == 3 {
				must(t, s.Acker("lb2").Ack(t.Context(), web, token(t, s)))
			}
			return nil
		})
		if live != 2 || err != nil || looks != 3 {
			t.Errorf("%d, %v after %d looks", live, err, looks)
		}
	})
	t.Run("the dead are not waited for", func(t *testing.T) {
		s := fresh(t, srv)
		join(t, s, host(1), "a")
		must(t, s.Acker("lb").Ack(t.Context(), web, token(t, s)))
		s.setClock(t0 + BalancerLive.Milliseconds() + 1)
		if live, err := s.WaitApplied(t.Context(), web, 1, nil); live != 0 || err != nil {
			t.Errorf("%d, %v", live, err)
		}
	})
	t.Run("time runs out", func(t *testing.T) {
		s := fresh(t, srv)
		join(t, s, host(1), "a")
		must(t, s.Acker("lb").Ack(t.Context(), web, token(t, s)))
		join(t, s, host(2), "b")
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if live, err := s.WaitApplied(ctx, web, 2, nil); live != 1 || err == nil || errors.Is(err, ErrOtherHistory) {
			t.Errorf("%d, %v", live, err)
		}
	})
	t.Run("a version that is not reached", func(t *testing.T) { // another server may have taken over before the first look
		s := fresh(t, srv)
		join(t, s, host(1), "a")
		must(t, s.Acker("lb").Ack(t.Context(), web, token(t, s)))
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if _, err := s.WaitApplied(ctx, web, 2, nil); !errors.Is(err, ErrOtherHistory) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("the data is lost", func(t *testing.T) {
		s := fresh(t, srv)
		join(t, s, host(1), "a")
		must(t, s.Acker("lb").Ack(t.Context(), web, token(t, s)))
		join(t, s, host(2), "b")
		looks := 0
		_, err := s.WaitApplied(t.Context(), web, 2, func() error {
			if looks++; looks == 2 {
				do(t, s, "SET", s.keys.Epoch(), "another")
			}
			return nil
		})
		if !errors.Is(err, ErrOtherHistory) {
			t.Errorf("got %v", err)
		}
	})
}

// TestWaitAppliedForNoNumber writes a service's version by hand: nobody has applied what
// is no number, or what is beyond the version that there is.
func TestWaitAppliedForNoNumber(t *testing.T) {
	srv := redistest.Start(t)
	for _, value := range []string{"-5", "-2", "9007199254740991", "9007199254740992", "9223372036854775000"} {
		t.Run(value, func(t *testing.T) {
			s := fresh(t, srv)
			join(t, s, host(1), "a")
			must(t, s.Acker("lb").Ack(t.Context(), web, token(t, s)))
			do(t, s, "SET", s.keys.ServiceVersion(web), value)
			must(t, s.Acker("lb").Ack(t.Context(), web, token(t, s))) // all that it has read
			version, _, err := s.SetAdmin(t.Context(), web, host(1), Word{Verb: "drain"})
			must(t, err)
			if version != NoVersion {
				t.Errorf("the word has version %d", version)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			defer cancel()
			if _, err := s.WaitApplied(ctx, web, version, nil); !errors.Is(err, ErrNoVersion) || !strings.Contains(err.Error(), s.keys.ServiceVersion(web)) {
				t.Errorf("got %v", err)
			}
			acks, err := s.Acks(t.Context(), web)
			must(t, err)
			if behind, _ := acks.Behind(version); behind != 1 {
				t.Error("nobody is behind")
			}
			snap, err := s.Read(t.Context(), web, nil)
			must(t, err)
			if e := snap.Entries[0]; snap.Token.Version != NoVersion || e.Instance.State() != AdminDrain {
				t.Errorf("read %+v", snap)
			}
			// The way that the error shows.
			do(t, s, "DEL", s.keys.Changed(web))
			do(t, s, "SET", s.keys.ServiceVersion(web), 1)
			now, err := s.Read(t.Context(), web, &snap.Token)
			must(t, err)
			if snap.Token.Interrupted(now.Token) || !now.Full || len(now.Entries) != 1 {
				t.Errorf("put right, and read %+v", now)
			}
			must(t, s.Acker("lb").Ack(t.Context(), web, now.Token))
			if live, err := s.WaitApplied(t.Context(), web, 1, nil); live != 1 || err != nil {
				t.Errorf("put right: %d, %v", live, err)
			}
		})
	}
	t.Run("beyond what there is", func(t *testing.T) {
		for _, applied := range []any{7, MaxVersion, "9223372036854775807", "-1"} {
			s := fresh(t, srv)
			join(t, s, host(1), "a")
			must(t, s.Acker("lb").Ack(t.Context(), web, token(t, s)))
			do(t, s, "HSET", s.keys.Applied(web), "lb", applied)
			acks, err := s.Acks(t.Context(), web)
			must(t, err)
			if behind, live := acks.Behind(1); behind != 1 || live != 1 {
				t.Errorf("applied %v: %d of %d behind", applied, behind, live)
			}
		}
	})
}

// TestDrainsAnew has another history begin while a drain waits: the instance says there
// too that it drains, and waits for the balancers there.
func TestDrainsAnew(t *testing.T) {
	for _, lost := range []bool{false, true} { // with the instance and the balancers
		t.Run(fmt.Sprintf("data lost %v", lost), func(t *testing.T) {
			s, _ := newStore(t)
			b, log := newBeater(t, s, 0)
			b.cfg.DrainWait = time.Minute
			r := start(t, b)
			registered(t, s, b)
			must(t, s.Acker("lb").Ack(t.Context(), web, token(t, s)))
			r.cancel()
			draining := func() error {
				snap, err := s.Read(t.Context(), web, nil)
				if err == nil && (len(snap.Entries) != 1 || snap.Entries[0].Instance.State() != AdminDrain) {
					err = errors.New("not draining")
				}
				return err
			}
			eventually(t, draining)
			// It has looked who has applied that: of another history before it did it
			// could not know.
			looks := func() (n int) {
				_, stats, _ := strings.Cut(s.rdb.Info(t.Context(), "commandstats").Val(), "cmdstat_evalsha_ro:calls=")
				_, err := fmt.Sscan(stats, &n)
				must(t, err)
				return n
			}
			before := looks()
			eventually(t, func() error {
				if looks() < before+2 { // one may have begun before it drained
					return errors.New("it has not looked")
				}
				return nil
			})
			if lost {
				do(t, s, "FLUSHALL")
			} else {
				do(t, s, "SET", s.keys.Epoch(), "another")
			}
			log.hears(t, "info: another server has taken over; saying there that this instance drains")
			eventually(t, draining)
			if slices.Contains(log.said(t), "info: drained") {
				t.Error("it is drained, and no balancer has said so")
			}
			must(t, s.Acker("lb").Ack(t.Context(), web, token(t, s)))
			must(t, r.wait(t))
			if !slices.Contains(log.said(t), "info: drained") {
				t.Errorf("said %q", log.said(t))
			}
		})
	}
}

// TestLeaveIsWaitedFor has Redis be away for as long as a drain may wait. When it is
// back the instance leaves, and its app is not to end before the balancers know.
func TestLeaveIsWaitedFor(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t, "--appendonly", "yes", "--appendfsync", "always")
	s := production(t, srv)
	b, log := newBeater(t, s, 0)
	b.cfg.DrainWait, b.cfg.LeaveWait = time.Second, time.Minute
	r := start(t, b)
	registered(t, s, b)
	acker := s.Acker("lb")
	must(t, acker.Ack(t.Context(), web, token(t, s)))
	srv.Kill(t)
	r.cancel()
	log.hears(t, "warn: cannot say that this instance drains; leaving")
	srv.Launch(t)
	var snap Snapshot
	eventually(t, func() (err error) {
		if snap, err = s.Read(t.Context(), web, nil); err == nil && snap.Entries[0].Present {
			err = errors.New("it has not left")
		}
		return err
	})
	select {
	case <-r.done:
		t.Error("it has ended, and the balancer does not know")
	case <-time.After(b.cfg.DrainWait / 5): // it would have ended at once
	}
	must(t, acker.Ack(t.Context(), web, snap.Token))
	must(t, r.wait(t))
	if want := []string{saidRegistered, "warn: cannot say that this instance drains; leaving", saidLeft}; !slices.Equal(log.said(t), want) {
		t.Errorf("said %q, want %q", log.said(t), want)
	}
}

// TestForceStop ends a leave that Redis does not take.
func TestForceStop(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t)
	s := production(t, srv)
	b, log := newBeater(t, s, 0)
	force := make(chan struct{})
	b.cfg.LeaveWait, b.cfg.ForceStop = time.Hour, force
	r := start(t, b)
	registered(t, s, b)
	srv.Kill(t)
	r.cancel()
	close(force)
	must(t, r.wait(t))
	if want := []string{saidRegistered, saidAway}; !slices.Equal(log.said(t), want) {
		t.Errorf("said %q, want %q", log.said(t), want)
	}
}

// The order of leaving: say that it drains, beat on, wait for every balancer,
// leave.
func TestRunDrainsBeforeItLeaves(t *testing.T) {
	for _, c := range []struct {
		name  string
		ack   bool // the balancer applies it
		hurry bool
	}{
		{name: "applied", ack: true},
		{name: "not applied in time"},
		{name: "in a hurry", hurry: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, _ := newStore(t)
			b, log := newBeater(t, s, 0)
			hurry := make(chan struct{})
			b.cfg.Hurry, b.cfg.DrainWait = hurry, time.Minute
			if !c.ack && !c.hurry {
				b.cfg.DrainWait = 50 * time.Millisecond
			}
			r := start(t, b)
			registered(t, s, b)
			must(t, s.Acker("lb").Ack(t.Context(), web, token(t, s)))
			r.cancel()
			draining := func() error {
				snap, err := s.Read(t.Context(), web, nil)
				if err == nil && (len(snap.Entries) != 1 || snap.Entries[0].Instance.State() != AdminDrain) {
					err = errors.New("not draining")
				}
				return err
			}
			if c.ack || c.hurry {
				eventually(t, draining)
			}
			if c.hurry {
				close(hurry)
			}
			if c.ack {
				must(t, s.Acker("lb").Ack(t.Context(), web, token(t, s)))
			}
			must(t, r.wait(t))
			snap, err := s.Read(t.Context(), web, nil)
			must(t, err)
			if e := snap.Entries[0]; e.Present || e.Gone == nil || e.Gone.Reason != Left {
				t.Errorf("after Run: %+v", e)
			}
			drained := slices.Contains(log.said(t), "info: drained")
			if drained != c.ack {
				t.Errorf("said %q", log.said(t))
			}
		})
	}
}
