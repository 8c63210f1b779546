package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/rs/zerolog"
	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/grpclog"

	"rollcall/cmd/internal/logqueue"
)

// Nothing that reads what this process writes can hold it up. The log and the
// errors go to standard error through a queue. What a command prints, which must
// not be dropped, waits for its reader, but not after a SIGINT or SIGTERM.

// outputTimeout is how long the process, when it ends, waits for the readers of
// what it has written, of the log and of the printed each.
const outputTimeout = time.Second

// logOutput returns what to write the log and the errors to, in the place of
// standard error, and has the process survive that a reader goes away. Its Close
// writes what waits. It is for main, before anything else.
func logOutput() *logqueue.Queue {
	// Notify, not Ignore: what is ignored stays so in the children. Nobody reads
	// the channel; a write to a pipe without a reader returns EPIPE.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	w := io.Writer(os.Stderr)
	if own, err := newStandardError(); err == nil {
		w, os.Stderr = own, own.file // a child gets it as it is
	}
	q := logqueue.New(w)
	// What has no logger of its own: net/http in a corner, gRPC's checks.
	stdlog.SetOutput(q)
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, q))
	return q
}

// stuckAfter is how long a write to standard error may take until what the runtime
// writes there goes nowhere.
const stuckAfter = time.Second

// standardError writes to a copy of descriptor 2. The descriptor itself is what the
// Go runtime writes its last words to, after a panic or a SIGQUIT, when all else
// stands still already: a reader that stands still would keep the process from
// ending. While a write hangs, the descriptor is therefore /dev/null.
type standardError struct {
	file *os.File
	fd   int // file's

	mu       sync.Mutex // guards what follows, and what descriptor 2 is
	writing  bool
	diverted bool
}

func newStandardError() (*standardError, error) {
	fd, err := unix.FcntlInt(2, unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("copy standard error: %w", err)
	}
	return &standardError{file: os.NewFile(uintptr(fd), os.Stderr.Name()), fd: fd}, nil
}

// Write is for one goroutine at a time.
func (s *standardError) Write(p []byte) (int, error) {
	s.begin(true)
	hangs := time.AfterFunc(stuckAfter, s.divert)
	n, err := s.file.Write(p)
	hangs.Stop()
	s.begin(false)
	return n, err
}

// Under returns the file.
func (s *standardError) Under() io.Writer { return s.file }

// begin notes that a write begins or has ended; then descriptor 2 is what it was.
func (s *standardError) begin(writing bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.writing = writing
	if !writing && s.diverted {
		s.diverted = unix.Dup2(s.fd, 2) != nil // else the next write tries again
	}
}

func (s *standardError) divert() {
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return // a panic would have to wait
	}
	defer null.Close() // nothing is written by this descriptor
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.writing && !s.diverted {
		s.diverted = unix.Dup2(int(null.Fd()), 2) == nil
	}
}

// reportDropped has the log say, in its format, that lines of it were dropped.
func reportDropped(c *cli.Context, format func(io.Writer) io.Writer) {
	q, ok := c.App.ErrWriter.(*logqueue.Queue)
	if !ok {
		return // a test reads it
	}
	q.Report(func(lines uint64, cause error) []byte {
		var text bytes.Buffer
		log := zerolog.New(format(&text)).With().Timestamp().Logger()
		log.Warn().Uint64("lines", lines).Err(cause).Msg("log lines were dropped")
		return text.Bytes()
	})
}

// droppedLines is how many lines of the log were dropped.
func droppedLines(c *cli.Context) uint64 {
	q, ok := c.App.ErrWriter.(*logqueue.Queue)
	if !ok {
		return 0
	}
	return q.Dropped()
}

// flushTimeout is how long a process that stops itself waits for the reader of its log.
const flushTimeout = 200 * time.Millisecond

// flushLog waits until the log has been written: a process that is stopped writes no more.
func flushLog(c *cli.Context) {
	if q, ok := c.App.ErrWriter.(*logqueue.Queue); ok {
		q.Flush(flushTimeout)
	}
}

// errUnread says that nobody took what was printed, and that the command had to end.
var errUnread = errors.New("standard output: its reader stands still")

// printed is a command's standard output. Once its reader has gone, what is
// printed goes nowhere, and the command ends as it would have: `instances web |
// head -1` is no error. It is for one goroutine at a time.
type printed struct {
	w       io.Writer
	stopped <-chan struct{} // closed by a SIGINT or a SIGTERM

	gone   bool   // the reader has gone
	stuck  bool   // it stood still at the end
	unread func() // is told that it has gone; may be nil
}

// Write waits for the reader: without a bound, or after a signal for outputTimeout.
func (o *printed) Write(p []byte) (int, error) {
	switch {
	case o.gone:
		return len(p), nil
	case o.stuck:
		return 0, errUnread
	}
	text, ended := bytes.Clone(p), make(chan error, 1)
	go func() { // one that hangs ends with the process
		_, err := o.w.Write(text)
		ended <- err
	}()
	var err error
	select {
	case err = <-ended:
	case <-o.stopped:
		limit := time.NewTimer(outputTimeout)
		defer limit.Stop()
		select {
		case err = <-ended:
		case <-limit.C:
			o.stuck = true
			return 0, errUnread
		}
	}
	switch {
	case errors.Is(err, syscall.EPIPE):
		o.gone = true
		if o.unread != nil {
			o.unread()
		}
	case err != nil:
		return 0, err
	}
	return len(p), nil
}

// Under returns the writer that it stands before.
func (o *printed) Under() io.Writer { return o.w }

// whileRead returns a context that ends with ctx or when the reader of what c
// prints has gone: that is the end of a command which prints for ever.
func whileRead(ctx context.Context, c *cli.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	if o, ok := c.App.Writer.(*printed); ok {
		o.unread = cancel
		if o.gone {
			cancel()
		}
	}
	return ctx, cancel
}

// fileUnder returns the file that a writer ends in, nil if it is none.
func fileUnder(w io.Writer) *os.File {
	for {
		switch v := w.(type) {
		case *os.File:
			return v
		case interface{ Under() io.Writer }:
			w = v.Under()
		default:
			return nil
		}
	}
}
