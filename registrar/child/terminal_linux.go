package child

import (
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Terminal is the terminal that controls this process: the one that its shell reads
// commands from. Of the process groups on it one is in the foreground: it may read,
// and Ctrl-C and Ctrl-Z reach it. An app that is to be used by hand must be that. It
// leads a group of its own, so it gets the terminal as a shell gives it to a job, and
// a shell in turn sees this process stop, go on and end where the app does.
//
// Its methods are for one goroutine, and may be called on nil, which is no terminal.
type Terminal struct {
	fd    int
	own   int           // this process's group
	modes *unix.Termios // before the app; nil = they could not be read
	app   *Process      // that it was given to; nil = none so far
}

// ControllingTerminal returns the terminal that f is; nil if f is none or another
// one than this process's. A Terminal must not outlive f.
func ControllingTerminal(f *os.File) *Terminal {
	t := &Terminal{fd: int(f.Fd()), own: unix.Getpgrp()}
	if _, err := unix.IoctlGetInt(t.fd, unix.TIOCGPGRP); err != nil {
		return nil
	}
	if modes, err := unix.IoctlGetTermios(t.fd, unix.TCGETS); err == nil {
		t.modes = modes
	}
	return t
}

// Foreground tells whether this process's group is in the foreground.
func (t *Terminal) Foreground() bool {
	if t == nil {
		return false
	}
	now, err := unix.IoctlGetInt(t.fd, unix.TIOCGPGRP)
	return err == nil && now == t.own
}

// StartOn is Start of the app that is to be used by hand: it gets the terminal if this
// process has it, before it runs. From then on this process writes to the terminal
// from the background, also where `stty tostop` is set.
func (r *Reaper) StartOn(t *Terminal, argv, env []string, files [3]*os.File) (*Process, error) {
	if t == nil {
		return r.Start(argv, env, files)
	}
	sys := &syscall.SysProcAttr{Setpgid: true}
	given := t.Foreground()
	if given {
		sys.Foreground, sys.Ctty = true, t.fd
	}
	p, err := r.start(argv, env, files, sys)
	signal.Ignore(syscall.SIGTTOU) // not before: the app would inherit it
	if err != nil {
		if given {
			t.set(t.own) // it may have come as far as that
		}
		return nil, err
	}
	t.app = p
	return p, nil
}

// Give gives the app the terminal if this process has it now, and tells whether it did.
func (t *Terminal) Give() bool {
	return t.Foreground() && t.app != nil && t.set(t.app.pid)
}

// Take takes the terminal back from the app. It does nothing if somebody else has it:
// the shell, after it has seen this process stop. Of an app that a signal has ended
// the modes are put right too, as a shell does for its own jobs.
func (t *Terminal) Take() {
	if t == nil || t.app == nil {
		return
	}
	if now, err := unix.IoctlGetInt(t.fd, unix.TIOCGPGRP); err != nil || now != t.app.pid || !t.set(t.own) {
		return
	}
	select {
	case <-t.app.done:
		if t.app.status.Signaled() && t.modes != nil {
			_ = unix.IoctlSetTermios(t.fd, unix.TCSETSW, t.modes) // it may be gone
		}
	default:
	}
}

func (t *Terminal) set(group int) bool {
	return unix.IoctlSetPointerInt(t.fd, unix.TIOCSPGRP, group) == nil
}

// suspendWait is how long a stop of this process may take to come. A group without a
// shell cannot be stopped so.
const suspendWait = 50 * time.Millisecond

// Suspend stops this process's group by the signal that has stopped the app, and
// returns when it goes on. It tells whether it was stopped at all.
func (t *Terminal) Suspend(sig syscall.Signal) (stopped bool) {
	if sig == syscall.SIGTTOU { // which is ignored here
		sig = syscall.SIGTSTP
	}
	goesOn := make(chan os.Signal, 1)
	signal.Notify(goesOn, syscall.SIGCONT)
	defer signal.Stop(goesOn)
	if syscall.Kill(0, sig) != nil {
		return false
	}
	// Time passes while the process is stopped, too: a first wait that ends in a stop
	// is followed by one in which the SIGCONT comes.
	for range 2 {
		wait := time.NewTimer(suspendWait)
		select {
		case <-goesOn:
			wait.Stop()
			return true
		case <-wait.C:
		}
	}
	return false
}
