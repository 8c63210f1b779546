package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"
)

// hearing is what the readers of the logs do.
type hearing int

const (
	reads hearing = iota
	standsStill
	gone
)

// logPipe is a process's log: a pipe of its own, as a shell's, and its reader.
type logPipe struct {
	r, w   *os.File
	copied chan struct{} // closed when nobody reads any more
}

// logTo has p log to a pipe of its own, whose reader does what those of all do now.
// What it says goes to p, as long as somebody reads.
func (w *world) logTo(p *process) {
	var fds [2]int
	if err := syscall.Pipe2(fds[:], syscall.O_CLOEXEC); err != nil { // that blocks for the process
		w.Fatal(err)
	}
	w.must(syscall.SetNonblock(fds[0], true)) // so that a read can be ended
	l := &logPipe{r: os.NewFile(uintptr(fds[0]), "log"), w: os.NewFile(uintptr(fds[1]), "log"), copied: make(chan struct{})}
	w.Cleanup(func() {
		_ = l.r.Close() // it may have gone
		_ = l.w.Close()
		<-l.copied
	})
	go func() {
		defer close(l.copied)
		_, _ = io.Copy(p, l.r) // until it stands still or goes
	}()
	p.cmd.Stderr = l.w
	w.mu.Lock()
	w.logs = append(w.logs, l)
	now := w.hearing
	w.mu.Unlock()
	if now != reads {
		w.must(l.becomes(now))
	}
}

// hears has the readers of all logs do this from now on.
func (w *world) hears(h hearing) {
	w.mu.Lock()
	w.hearing = h
	logs := append([]*logPipe(nil), w.logs...)
	w.mu.Unlock()
	for _, l := range logs {
		w.must(l.becomes(h))
	}
}

func (l *logPipe) becomes(h hearing) error {
	if h == gone {
		return l.r.Close()
	}
	if err := l.r.SetReadDeadline(time.Unix(1, 0)); err != nil { // long ago: now
		return err
	}
	<-l.copied
	return l.fill()
}

// fill takes all the room that the pipe has left.
func (l *logPipe) fill() error {
	// Opened anew: the process's own descriptor goes on blocking.
	fd, err := syscall.Open(fmt.Sprintf("/proc/self/fd/%d", l.w.Fd()), syscall.O_WRONLY|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	for _, size := range []int{4096, 1} {
		for err = nil; err == nil; {
			_, err = syscall.Write(fd, make([]byte, size))
		}
		if !errors.Is(err, syscall.EAGAIN) {
			return err
		}
	}
	return nil
}
