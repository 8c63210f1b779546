package main

import (
	"context"
	"syscall"

	"rollcall/registrar"
)

// register has the instance registered from now on, if it is not: unless its check
// says no, or the terminal has stopped the app.
func (s *sidecar) register(ctx context.Context) {
	if s.left == nil && !s.suspended && (s.prober == nil || s.healthy) {
		s.beat(ctx)
	}
}

// appStopped hears that a signal has stopped the app, or with 0 that it goes on.
//
// An app that was stopped at a terminal, by Ctrl-Z or because it is in the background
// and wants to read, answers nobody: its instance leaves, and this process stops as
// well, with its group, for that is what the shell waits for. When the shell has it go
// on, so does the app, and registers anew. Any other stop is only said: who stops a
// process by hand, to look at it for a moment, say, wants no more than that, and with a
// check it is seen what comes of it.
func (s *sidecar) appStopped(ctx context.Context, sig syscall.Signal) {
	job := s.tty != nil && (sig == syscall.SIGTSTP || sig == syscall.SIGTTIN || sig == syscall.SIGTTOU)
	switch {
	case sig == 0:
		s.log.Info().Msg("the app goes on")
		s.suspended = false
		s.register(ctx)
		return
	case !job:
		s.log.Warn().Stringer("signal", sig).Msg("the app is stopped and answers nobody until a SIGCONT; without a check it stays registered")
		return
	case sig != syscall.SIGTSTP && s.tty.Give():
		s.app.Continue() // it wanted the terminal before it had it
		return
	}
	s.tty.Take() // Ctrl-C reaches this process while it leaves
	s.log.Info().Stringer("signal", sig).Msg("the terminal has stopped the app; leaving until it goes on")
	s.suspended = true
	s.leave(registrar.ErrUnhealthy)
	switch {
	case s.stops.n > 0:
		return // stopApp has it go on, and end
	case sig != syscall.SIGTSTP && s.tty.Give():
		s.app.Continue() // the shell's fg was faster
		return
	}
	s.notify.status("not registered: the app is stopped")
	s.flush()
	stopped := s.tty.Suspend(sig)
	if s.tty.Give() || stopped || sig == syscall.SIGTSTP {
		s.app.Continue()
		return
	}
	s.log.Warn().Stringer("signal", sig).Msg("the app waits for a terminal that it cannot get; it is stopped until a SIGCONT")
}
