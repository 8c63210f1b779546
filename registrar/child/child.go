//go:build unix

// Package child runs the processes of a sidecar: the app that it is around and
// the commands that check it. As process 1 of a container it also inherits the
// orphans of all of them, which nobody else would ever wait for.
//
// It owns waiting: one loop collects every child of this process. A process that
// has a Reaper must not start children by os/exec, whose Wait would find them
// collected already.
package child

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"syscall"
)

// Reaper starts children and collects those that have ended, orphans included.
// Its methods may be called by any number of goroutines.
type Reaper struct {
	mu      sync.Mutex // held over a start, so that no child is collected before it is known
	running map[int]*Process

	ended chan os.Signal
	stop  chan struct{}
	done  chan struct{}
}

// New starts the loop that collects. Close ends it.
func New() *Reaper {
	r := &Reaper{running: map[int]*Process{}, ended: make(chan os.Signal, 1), stop: make(chan struct{}), done: make(chan struct{})}
	signal.Notify(r.ended, syscall.SIGCHLD)
	go r.loop()
	return r
}

// Close ends the loop. It leaves running children alone.
func (r *Reaper) Close() {
	signal.Stop(r.ended)
	close(r.stop)
	<-r.done
}

func (r *Reaper) loop() {
	defer close(r.done)
	r.collect() // those of a process that this one was before its exec
	for {
		select {
		case <-r.stop:
			return
		case <-r.ended: // one signal can stand for many children
			r.collect()
		}
	}
}

// collect waits for every child that has ended, and notes of those that run here
// which are stopped or go on.
func (r *Reaper) collect() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG|syscall.WUNTRACED|syscall.WCONTINUED, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case err != nil || pid <= 0: // ECHILD: there is none; 0: none has ended
			return
		}
		p := r.running[pid]
		switch {
		case p == nil:
		case status.Stopped():
			p.stopped = true
			p.tell(status.StopSignal())
		case status.Continued():
			p.stopped = false
			p.tell(0)
		default:
			delete(r.running, pid)
			p.status = status
			close(p.done)
		}
	}
}

// Process is one child. It leads a process group of its own: a terminal's Ctrl-C
// reaches the sidecar alone, and Kill reaches all that it started.
type Process struct {
	reaper *Reaper
	pid    int
	done   chan struct{}
	status syscall.WaitStatus // set before done is closed

	stops   chan syscall.Signal // has room for the last one
	stopped bool                // by a signal, now; guarded by reaper.mu
}

// Start runs argv with env, looked up in PATH, with these files as its standard
// input, output and error.
func (r *Reaper) Start(argv, env []string, files [3]*os.File) (*Process, error) {
	return r.start(argv, env, files, &syscall.SysProcAttr{Setpgid: true})
}

func (r *Reaper) start(argv, env []string, files [3]*os.File, sys *syscall.SysProcAttr) (*Process, error) {
	path, err := Look(argv)
	if err != nil {
		return nil, err
	}
	attr := &syscall.ProcAttr{Env: env, Sys: sys}
	for _, f := range files {
		attr.Files = append(attr.Files, f.Fd())
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := syscall.ForkExec(path, argv, attr)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", path, err)
	}
	p := &Process{reaper: r, pid: pid, done: make(chan struct{}), stops: make(chan syscall.Signal, 1)}
	r.running[pid] = p
	return p, nil
}

// Look finds the program of argv in PATH.
func Look(argv []string) (path string, err error) {
	if len(argv) == 0 || strings.TrimSpace(argv[0]) == "" {
		return "", errors.New("no command")
	}
	if path, err = exec.LookPath(argv[0]); err != nil {
		return "", fmt.Errorf("command %w", err)
	}
	return path, nil
}

// PID is its process id.
func (p *Process) PID() int { return p.pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Stops has the signal that has stopped the process, or 0 when it goes on: the last
// of these that was not received yet.
func (p *Process) Stops() <-chan syscall.Signal { return p.stops }

// tell leaves sig as the last. The caller holds reaper.mu, so nobody else sends.
func (p *Process) tell(sig syscall.Signal) {
	select {
	case <-p.stops:
	default:
	}
	p.stops <- sig
}

// Continue has the process and its group go on if a signal has stopped it.
func (p *Process) Continue() {
	p.reaper.mu.Lock()
	defer p.reaper.mu.Unlock()
	if p.reaper.running[p.pid] == p && p.stopped {
		_ = syscall.Kill(-p.pid, syscall.SIGCONT) // it may have been continued or ended
	}
}

// Signal sends sig to the process alone, as long as it runs.
func (p *Process) Signal(sig syscall.Signal) {
	p.reaper.mu.Lock() // so that it is not collected, and its id another's, in between
	defer p.reaper.mu.Unlock()
	if p.reaper.running[p.pid] == p {
		_ = syscall.Kill(p.pid, sig) // it may have ended
	}
}

// Kill ends the process and every other one of its group: of an ended process,
// those that it left behind. A group's id is no new process's while the group
// has members; call it at once after Done for those.
func (p *Process) Kill() {
	p.reaper.mu.Lock()
	defer p.reaper.mu.Unlock()
	_ = syscall.Kill(-p.pid, syscall.SIGKILL) // the group may be empty
}

// Code is the exit code as a shell gives it: 128 + n of a process that signal n
// has ended. It is valid when Done is closed.
func (p *Process) Code() int {
	if p.status.Signaled() {
		return 128 + int(p.status.Signal())
	}
	return p.status.ExitStatus()
}

// String says how the process ended, when Done is closed.
func (p *Process) String() string {
	if p.status.Signaled() {
		return "signal: " + p.status.Signal().String()
	}
	return fmt.Sprintf("exit status %d", p.status.ExitStatus())
}
