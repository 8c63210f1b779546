package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"github.com/rs/zerolog"

	"rollcall/registrar"
	"rollcall/registrar/child"
	"rollcall/registrar/health"
	"rollcall/registrar/idfile"
)

// trim makes the process small: one of it is beside every container. A sidecar
// has one thing to do at a time, and no hurry to grow its heap to Go's first 4 MB.
// The environment has the last word, as always in Go.
func trim() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(1)
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(25)
	}
	reserveThreads()
	debug.FreeOSMemory() // what the imported packages' initialisation has left
}

// settled gives back what connecting and registering took: a sidecar that is
// steady needs nothing of it.
func settled(tell func(status string)) func(status string) {
	return func(status string) {
		tell(status)
		debug.FreeOSMemory()
	}
}

// sidecar is one register command at work: what beats, what looks after the
// app's health, and the app itself, if it is around one.
type sidecar struct {
	command     []string       // nil: it is beside the app
	env         []string       // the command's
	prober      *health.Prober // nil: the instance counts as healthy
	stopTimeout time.Duration
	beater      *mover
	damper      *registrar.Damper
	service     registrar.Service
	hurry       chan struct{} // the Beaters'; closed at most once, by hasten
	force       chan struct{} // the Beaters' ForceStop; closed at most once, by forceStop
	notify      *systemd
	beats       *beats // nil: nobody asks
	children    *child.Reaper
	kept        *idfile.File
	others      *predecessors
	log         zerolog.Logger

	// Of run's goroutine alone.
	app     *child.Process
	ended   <-chan struct{}       // when the app ends; nil, which is never, without one
	halts   <-chan syscall.Signal // when it is stopped, and goes on; nil without one
	tty     *child.Terminal       // that the app is used by; nil: it is not
	flush   func()                // writes the log
	healthy bool                  // by the check, so far
	signals <-chan heard
	stops   stops // SIGINTs and SIGTERMs so far
	hasty   bool
	forced  bool
	begun   bool       // a Run has
	left    chan error // a Run's end; nil while none runs
	cancel  context.CancelCauseFunc
	// suspended: the terminal has stopped the app, and so the instance has left.
	suspended bool
}

// forwarded go to the app as they come. SIGINT and SIGTERM do not: they make the
// sidecar leave first, and then send the app a SIGTERM.
var forwarded = []os.Signal{syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH}

// run beats, while the app is healthy, until a signal or until ctx ends, and then
// leaves and stops the app. It returns an appError if it was around one, unless
// the register refused the instance.
func (s *sidecar) run(ctx context.Context) error {
	sigs := []os.Signal{syscall.SIGINT, syscall.SIGTERM}
	if s.command != nil {
		sigs = append(sigs, forwarded...)
	}
	var deaf func()
	s.signals, deaf = listen(ctx.Done(), sigs...)
	defer deaf()
	if s.command != nil {
		var err error
		s.tty = child.ControllingTerminal(os.Stdin)
		if s.app, err = s.children.StartOn(s.tty, s.command, s.env, [3]*os.File{os.Stdin, os.Stdout, os.Stderr}); err != nil {
			return err
		}
		defer s.tty.Take()
		s.ended, s.halts = s.app.Done(), s.app.Stops()
		s.kept.Around(s.app.PID()) // which leads its group
		s.log.Info().Str("command", s.command[0]).Int("pid", s.app.PID()).Msg("app started")
	}
	// What follows ends when this goroutine says so.
	ctx = context.WithoutCancel(ctx)
	var changes chan health.Change // nil, which never says anything, without a check
	if s.prober == nil {
		s.beat(ctx)
	} else {
		changes = make(chan health.Change)
		ctx, cancel := context.WithCancel(ctx)
		var probing sync.WaitGroup
		defer probing.Wait()
		defer cancel()
		probing.Go(func() { s.prober.Run(ctx, changes) })
		s.notify.status("waiting for the first successful check")
	}
	for s.stops.n == 0 {
		select {
		case c := <-changes:
			if s.healthy = c.Healthy; c.Healthy {
				s.log.Info().Msg("healthy")
				s.beats.unhealthy(nil)
				s.register(ctx)
				break
			}
			s.beats.unhealthy(c.Cause)
			if !s.begun {
				s.log.Warn().Err(c.Cause).Msg("not healthy yet; it registers when it is")
				s.notify.status("not registered: not healthy yet: " + c.Cause.Error())
				break
			}
			s.log.Warn().Err(c.Cause).Msg("unhealthy")
			s.leave(registrar.ErrUnhealthy)
			s.notify.status("not registered: unhealthy: " + c.Cause.Error())
		case err := <-s.left: // the register does not want it
			s.left = nil
			if errors.Is(err, registrar.ErrLeft) {
				// In the time of a process before this one, say, whose id was kept.
				s.log.Info().Msg("the registration had left; making a new one")
				s.beat(ctx)
				break
			}
			s.stopApp()
			return err
		case <-s.ended:
			return s.appEnded()
		case sig := <-s.halts:
			s.appStopped(ctx, sig)
		case h := <-s.signals:
			s.hear(h)
		}
	}
	s.notify.send("STOPPING=1")
	s.leave(nil)
	if s.app == nil {
		return nil
	}
	s.stopApp()
	return s.appEnded()
}

// beat registers.
func (s *sidecar) beat(ctx context.Context) {
	ctx, s.cancel = context.WithCancelCause(ctx)
	left := make(chan error, 1)
	first := !s.begun // its Run also sees to what a process that was killed has left
	s.left, s.begun = left, true
	s.others.registers()
	go func() { // leave waits for it
		var err error
		if first || s.damper.Hold(ctx, s.service, s.beater.addr(), func(most time.Duration) {
			s.notify.status(fmt.Sprintf("not registered: it comes and goes, and returns within %v", most.Round(time.Second)))
		}) {
			err = s.beater.Run(ctx)
			s.damper.Left(context.Cause(ctx))
		}
		left <- err
	}()
}

// leave ends what beat began, or what a process that was killed has left at this
// address if it began nothing, and waits until that has left. It hears signals
// meanwhile: one more signal to stop than the first, or any after the app has ended by
// itself, ends that soon. An app that ends makes waiting for balancers pointless.
func (s *sidecar) leave(cause error) {
	switch {
	case s.left != nil:
		s.cancel(cause)
	case s.begun:
		return
	default:
		ctx, cancel := context.WithCancelCause(context.Background())
		cancel(cause)
		s.beat(ctx)
	}
	ended, patient := s.ended, 1
	if errors.Is(cause, registrar.ErrEnded) {
		patient = s.stops.n
	}
	for {
		select {
		case err := <-s.left:
			s.left = nil
			s.beats.left()
			if err != nil {
				s.log.Warn().Err(err).Msg("left already")
			}
			return
		case <-ended:
			ended = nil
			s.hasten()
		case h := <-s.signals:
			if s.hear(h); s.stops.n > patient {
				s.hasten()
				s.forceStop()
			}
		}
	}
}

// hasten ends the Beater's wait.
func (s *sidecar) hasten() {
	if !s.hasty {
		s.hasty = true
		close(s.hurry)
	}
}

// forceStop has the Beater give up soon what Redis does not take.
func (s *sidecar) forceStop() {
	if !s.forced {
		s.forced = true
		close(s.force)
	}
}

// hear passes a signal on to the app, or counts it.
func (s *sidecar) hear(h heard) {
	switch {
	case h.sig == nil && s.stops.n > 0: // its signal has come here too
	case h.sig == nil || isStop(h.sig):
		s.stops.hear(h.at)
	case s.app != nil:
		s.app.Signal(h.sig.(syscall.Signal))
	}
}

// stopApp has the app end, and kills it when it takes too long or when one more
// signal comes.
func (s *sidecar) stopApp() {
	if s.app == nil {
		return
	}
	s.app.Signal(syscall.SIGTERM)
	s.app.Continue() // a stopped one would not hear it
	timeout := time.NewTimer(s.stopTimeout)
	defer timeout.Stop()
	for before := s.stops.n; ; {
		select {
		case <-s.ended:
			return
		case <-timeout.C:
			s.log.Warn().Dur("timeout", s.stopTimeout).Msg("the app does not end; killing it")
			s.app.Kill()
		case h := <-s.signals:
			if s.hear(h); s.stops.n > before {
				s.app.Kill()
			}
		}
	}
}

// appEnded leaves, if that is still to be done, and returns the app's code.
func (s *sidecar) appEnded() error {
	s.tty.Take()
	s.log.Info().Stringer("how", s.app).Int("code", s.app.Code()).Msg("app ended")
	s.leave(registrar.ErrEnded)
	return appError(s.app.Code())
}
