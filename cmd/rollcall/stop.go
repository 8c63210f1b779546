package main

import (
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

// sameStop is how long further signals to stop count as the one before: a wrapper
// that signals its whole process group, GNU timeout, or a terminal's Ctrl-C beside
// a supervisor's SIGTERM send two for one wish, a millisecond apart. It is shorter
// than the time that a person takes to lose patience.
const sameStop = 500 * time.Millisecond

// stops counts how often a process was told to stop. The zero value is not at all.
type stops struct {
	n    int
	last time.Time // when the last signal that counted came
}

// hear counts a signal to stop that came at at, unless it is the same as the last
// one that counted.
func (s *stops) hear(at time.Time) {
	if s.n > 0 && at.Sub(s.last) < sameStop {
		return
	}
	s.n, s.last = s.n+1, at
}

// heard is a signal and when it came: its reader may be busy for longer than
// sameStop.
type heard struct {
	sig os.Signal // nil: the process was told to stop before anybody listened
	at  time.Time
}

// listen has signals come as they are heard, until stop is called, which waits for
// the end of that. From then on they do nothing: the process is about to end, with a
// code that is not to become a signal's. The end of told, which any signal to stop
// brings about too, is one that came before.
func listen(told <-chan struct{}, sigs ...os.Signal) (signals <-chan heard, stop func()) {
	in, out, end := make(chan os.Signal, 16), make(chan heard, 16), make(chan struct{})
	signal.Notify(in, sigs...)
	var listening sync.WaitGroup
	listening.Go(func() {
		for {
			h := heard{}
			select {
			case <-end:
				return
			case <-told:
				told = nil
			case h.sig = <-in:
			}
			h.at = time.Now()
			select {
			case out <- h:
			default: // 16 wait already, as signals do that are blocked
			}
		}
	})
	return out, func() {
		close(end) // in fills and then drops what comes
		listening.Wait()
	}
}

// isStop tells whether sig tells a process to stop.
func isStop(sig os.Signal) bool { return sig == syscall.SIGINT || sig == syscall.SIGTERM }
