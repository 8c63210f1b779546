// Package logqueue stands between a process and its log, so that nothing which the
// log's reader does can hold the process up: a reader that stands still (a full
// pipe), one that has gone, a full disk, a file system that never answers.
//
// It promises that a log call never waits, that lines come out in the order in
// which they came in, each by one write, and that lines which could not be written
// are counted and said. It does not promise to keep them: what waits is bounded.
package logqueue

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"
)

const (
	// MaxLines and MaxBytes bound what waits to be written, the line under way
	// included. It takes memory only while it waits: a sidecar has about 3 MB, and
	// a reader that keeps up leaves it empty.
	MaxLines = 1024
	MaxBytes = 256 << 10

	// busyWait paces the tries of a file that another process has made
	// non-blocking and that takes nothing now.
	busyWait = 20 * time.Millisecond

	ellipsis = "…\n" // the end of a line that was cut
)

// Queue is the writer of a log. New makes one and Close ends it; any number of
// goroutines may call its methods.
type Queue struct {
	w         io.Writer
	wake      chan struct{} // holds one: there is something to do
	done      chan struct{} // closed when the goroutine that writes has ended
	abandoned chan struct{} // closed when Close waits no longer
	idle      chan struct{} // holds one: no line waits
	dropped   atomic.Uint64

	mu      sync.Mutex // guards what follows
	waiting []line
	lines   int    // that wait, the one under way included
	bytes   int    // of these
	missed  uint64 // lines that did not fit, since the last one that did
	closed  bool
	report  func(lines uint64, cause error) []byte

	// Of the goroutine that writes alone.
	lost  uint64 // lines that are dropped and not said yet
	cause error  // why the last of them could not be written; nil = it did not fit
	torn  bool   // a part of a line was written, and not its end
}

// line is a line of the log, and how many lines were dropped just before it. An
// empty text says only that.
type line struct {
	text   []byte
	missed uint64
}

// New starts the goroutine that writes to w. Nobody else should write to w: it may
// block for ever in there.
func New(w io.Writer) *Queue {
	q := &Queue{
		w: w, wake: make(chan struct{}, 1), done: make(chan struct{}), abandoned: make(chan struct{}), idle: make(chan struct{}, 1),
		report: func(lines uint64, _ error) []byte { return fmt.Appendf(nil, "%d log lines were dropped\n", lines) },
	}
	go q.run()
	return q
}

// Report sets what makes the line that says how many lines were dropped, and why
// the last of them could not be written, nil if it did not fit. It is called by the
// goroutine that writes.
func (q *Queue) Report(report func(lines uint64, cause error) []byte) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.report = report
}

// Dropped returns how many lines were dropped so far.
func (q *Queue) Dropped() uint64 { return q.dropped.Load() }

// Under returns the writer that the lines go to.
func (q *Queue) Under() io.Writer { return q.w }

// Write takes one line, which it copies. A line that does not fit is dropped; one
// that could never fit is cut. It never waits and never returns an error.
func (q *Queue) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if q.add(p) {
		// With one processor the goroutine that writes runs only when this one lets it.
		runtime.Gosched()
	}
	select {
	case q.wake <- struct{}{}:
	default: // it will look anyway
	}
	return len(p), nil
}

// add puts a line where it waits, and tells whether half of the room is taken.
func (q *Queue) add(p []byte) (half bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed || q.lines >= MaxLines || q.bytes+min(len(p), MaxBytes) > MaxBytes {
		q.missed++
		q.dropped.Add(1)
		return true
	}
	text := bytes.Clone(p[:min(len(p), MaxBytes)])
	if len(p) > MaxBytes {
		text = cut(text)
	}
	q.waiting = append(q.waiting, line{text, q.missed})
	q.missed = 0
	q.lines++
	q.bytes += len(text)
	return q.lines > MaxLines/2 || q.bytes > MaxBytes/2
}

// cut replaces the end of a text that is too long.
func cut(text []byte) []byte {
	end := len(text) - len(ellipsis)
	for end > 0 && !utf8.RuneStart(text[end]) {
		end--
	}
	return append(text[:end], ellipsis...)
}

// Close writes what waits, for timeout at most, and tells whether it could. Later
// lines are dropped. It must be called once.
func (q *Queue) Close(timeout time.Duration) bool {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
	limit := time.NewTimer(timeout)
	defer limit.Stop()
	select {
	case <-q.done:
		return true
	case <-limit.C:
		close(q.abandoned) // a write that hangs ends with the process
		return false
	}
}

// run writes until Close.
func (q *Queue) run() {
	defer close(q.done)
	for {
		lines, closed := q.take()
		for _, l := range lines {
			q.write(l)
			q.written(l)
		}
		switch {
		case len(lines) > 0:
		case closed:
			q.write(line{}) // what was lost may be said by now
			return
		default:
			<-q.wake
		}
	}
}

// take returns the lines that wait; if there are none, the number of those that
// did not fit after the last one.
func (q *Queue) take() (lines []line, closed bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	lines, q.waiting = q.waiting, nil
	if len(lines) == 0 && q.missed > 0 {
		lines = []line{{missed: q.missed}}
		q.missed = 0
	}
	return lines, q.closed
}

// written makes room.
func (q *Queue) written(l line) {
	if len(l.text) == 0 {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.lines--
	q.bytes -= len(l.text)
	if q.lines == 0 {
		select {
		case q.idle <- struct{}{}:
		default: // it has been told
		}
	}
}

// Flush waits until no line waits, and tells whether that is so. It is for one goroutine
// at a time.
func (q *Queue) Flush(timeout time.Duration) bool {
	limit := time.NewTimer(timeout)
	defer limit.Stop()
	for {
		q.mu.Lock()
		lines := q.lines
		q.mu.Unlock()
		if lines == 0 {
			return true
		}
		select {
		case <-q.idle:
		case <-limit.C:
			return false
		}
	}
}

// write writes a line, and before it how many were dropped since the last one that
// was written.
func (q *Queue) write(l line) {
	q.lost += l.missed
	var err error
	if q.lost > 0 {
		q.mu.Lock()
		report := q.report
		q.mu.Unlock()
		if err = q.put(report(q.lost, q.cause)); err == nil {
			q.lost, q.cause = 0, nil
		}
	}
	if len(l.text) == 0 {
		return
	}
	if err == nil {
		err = q.put(l.text)
	}
	if err != nil {
		q.lost++
		q.cause = err
		q.dropped.Add(1)
	}
}

// put writes p whole, or returns an error. It may take for ever.
func (q *Queue) put(p []byte) error {
	if q.torn {
		p = append([]byte{'\n'}, p...)
	}
	for {
		n, err := q.w.Write(p)
		if n > 0 {
			q.torn = p[n-1] != '\n'
			p = p[n:]
		}
		if !errors.Is(err, syscall.EAGAIN) {
			return err
		}
		pause := time.NewTimer(busyWait)
		select {
		case <-pause.C:
		case <-q.abandoned:
			pause.Stop()
			return err
		}
	}
}
