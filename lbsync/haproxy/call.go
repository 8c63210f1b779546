package haproxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"github.com/haproxytech/client-native/v5/runtime"
)

const (
	// lookEvery paces the looks at a call that takes long. The fastest answer grows by
	// 2 MB in that time.
	lookEvery = 5 * time.Millisecond
	// maxAnswer bounds an answer, beside what came before the first look. The longest
	// one, of a backend of 10,000 servers, has 3 MB. client-native's buffer grows by
	// copying: an answer without end takes 20 to 45 MB of memory.
	maxAnswer = 6 << 20
	// endWithin bounds the wait for a call whose connection was cut. It takes 0.5 ms.
	endWithin = 200 * time.Millisecond
	// lateFor bounds the wait for a process that answers and leaves an earlier line
	// alone: that is client-native's own patience.
	lateFor = 30 * time.Second
	// maxNames is how many listeners' addresses are remembered: the present one, those
	// that it replaced while they hang, and to spare.
	maxNames = 4
)

var (
	errTooLong = fmt.Errorf("the answer has more than %d MB", maxAnswer>>20)
	errMoved   = errors.New("another process has taken the socket's path")
	errOwed    = errors.New("it owes an earlier answer, nothing was sent")
	errClosed  = errors.New("the client is closed")
)

// caller makes client-native's calls, one at a time, and ends those that do not end by
// themselves.
//
// client-native dials once per call, gives up after 30 seconds, keeps whatever it has
// read, and calls once more if it could not write. So a call that takes long is watched:
// its connection is looked up among the descriptors of this process, and shut for reading
// when time is up, the answer is too long, or another process has taken the socket's
// path. client-native takes that for the end of the answer. A call that does not take long
// costs a timer and nothing else.
//
// When time is up and HAProxy has not even read the line, the call stays: the line is in
// its socket for good, and each further connection would be in the way of others. It
// tells when HAProxy wakes, and ends as above if another process takes the path.
//
// Its methods are for one goroutine at a time.
type caller struct {
	native *runtime.SingleRuntime
	watch  watch

	lines   chan string // to the goroutine that makes the calls, nil before the first
	answers chan answer // what they came to; of capacity 1: an owed one can come unheard
	owed    bool        // a call is under way whose answer no exchange waits for any more

	suspect bool           // a line got no answer in time, and none has been answered since
	late    map[uint64]int // the connections of the first such line, see watch.conns
	since   time.Time      // when that was given up
}

// answer is what ExecuteRaw returned.
type answer struct {
	text string
	err  error
}

func newCaller(native *runtime.SingleRuntime, socket string) caller {
	return caller{native: native, watch: watch{socket: socket}, answers: make(chan answer, 1)}
}

// execute sends one line and returns client-native's answer, or why there is none:
// ctx's error, at most 200 ms after it ended, errOwed or another of this file's. Then
// the line, or the one before, may still be carried out, and the caller is suspect.
func (c *caller) execute(ctx context.Context, line string) (answer, error) {
	if c.owed {
		if _, why := c.await(ctx, nil); c.owed {
			return answer{}, fmt.Errorf("%w: %w", errOwed, why)
		}
		if err := ctx.Err(); err != nil {
			return answer{}, fmt.Errorf("nothing was sent: %w", err)
		}
	}
	if c.lines == nil {
		c.lines = make(chan string)
		go c.call(c.lines)
	}
	c.lines <- line // at once: no call is under way
	return c.await(ctx, nil)
}

// call makes the calls, until close. It is one goroutine for all of them: to make a
// new one for each takes 40 us, with all the stack that client-native needs.
func (c *caller) call(lines <-chan string) {
	defer close(c.answers)
	for line := range lines {
		text, err := c.native.ExecuteRaw(line)
		c.answers <- answer{text, err}
	}
}

// await waits for the call under way, and ends it if why is not nil or there comes to be
// a reason.
func (c *caller) await(ctx context.Context, why error) (answer, error) {
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	done := ctx.Done()
	var last time.Time // when to give up, once ctx has ended
	for {
		select {
		case a := <-c.answers:
			return c.ended(a, why)
		case <-done:
			if why == nil {
				if why = ctx.Err(); c.watch.unread() {
					c.owed, c.suspect = true, true
					return answer{}, why
				}
			}
			done, last = nil, time.Now().Add(endWithin)
		case <-look.C:
			if why == nil {
				why = c.watch.look()
			}
		}
		if why == nil {
			continue
		}
		c.watch.cut()
		if done == nil && time.Now().After(last) {
			c.owed, c.suspect = true, true
			return answer{}, why
		}
	}
}

// ended returns the answer of a call that has ended, or why it was cut. An answer that
// was owed is dropped.
func (c *caller) ended(a answer, why error) (answer, error) {
	owed, conns := c.owed, c.watch.release()
	c.owed = false
	if why == nil && !owed {
		closeAll(conns)
		return a, nil
	}
	c.suspect = true
	if len(c.late) == 0 {
		c.late, c.since = conns, time.Now()
	} else {
		closeAll(conns) // that line had no commands
	}
	return answer{}, why
}

// finished tells whether HAProxy has ended the line that was cut, or the process that had
// it has ended, or has kept it for too long.
func (c *caller) finished() bool {
	for inode, fd := range c.late {
		if hungUp(fd) {
			closeFD(fd)
			delete(c.late, inode)
		}
	}
	return len(c.late) == 0 || time.Since(c.since) > lateFor
}

// trust ends that the caller is suspect.
func (c *caller) trust() {
	closeAll(c.late)
	c.suspect, c.late = false, nil
}

// close ends the goroutine and the call that is owed, and waits for both or for ctx.
func (c *caller) close(ctx context.Context) error {
	c.trust()
	if c.lines == nil {
		return nil
	}
	close(c.lines)
	c.lines = nil
	if c.owed {
		if _, _ = c.await(ctx, errClosed); c.owed {
			return fmt.Errorf("a call has not ended: %w", ctx.Err())
		}
		c.trust()
	}
	for range c.answers {
	}
	return nil
}

// watch finds the connection of a call that takes long.
//
// A listener's address is not the path that one connects to: HAProxy binds a temporary
// name and renames it, and may see other directories. So it is learned from a connection
// of our own, which sends nothing.
type watch struct {
	socket string
	names  []string // of the listeners that were at socket, the latest last

	// Of the call under way.
	conns map[uint64]int // descriptors of our own of its connections, by inode
	file  os.FileInfo    // at socket when the first were found
	again bool           // those were cut, and the call may have made others
}

// look returns why the call is to end, or nil.
func (w *watch) look() error {
	if len(w.conns) == 0 {
		w.find()
		return nil
	}
	for _, fd := range w.conns {
		if exceeded(fd) {
			return errTooLong
		}
	}
	if w.file == nil {
		return nil
	}
	now, err := os.Stat(w.socket)
	if err == nil && (!os.SameFile(now, w.file) || !now.ModTime().Equal(w.file.ModTime())) {
		return errMoved
	}
	return nil
}

// unread tells whether the line is whole and HAProxy has read nothing of it, or nothing is
// known of its connection.
func (w *watch) unread() bool {
	if len(w.conns) == 0 {
		w.find()
	}
	for _, fd := range w.conns {
		if unread(fd) {
			return true
		}
	}
	return len(w.conns) == 0
}

// cut ends the connections that were found by an earlier look, so that another Client of
// this process and HAProxy loses a call only if that takes as long. It is to be repeated
// until the call has ended: client-native connects again after a write that failed.
func (w *watch) cut() {
	for _, fd := range w.conns {
		shut(fd)
	}
	if w.again || len(w.conns) == 0 {
		w.find()
	}
	w.again = true
}

// find enters the connections to HAProxy that are not known yet.
func (w *watch) find() {
	if w.file == nil {
		w.file, _ = os.Stat(w.socket) // an abstract one has none
	}
	if w.enter() {
		return
	}
	conn, err := net.DialTimeout("unix", w.socket, lookEvery)
	if err != nil {
		return // the next look tries again
	}
	name := conn.RemoteAddr().String()
	_ = conn.Close() // nothing was written
	if slices.Contains(w.names, name) {
		return
	}
	w.names = append(w.names, name)
	w.names = w.names[max(0, len(w.names)-maxNames):]
	w.enter()
}

func (w *watch) enter() (found bool) {
	if w.conns == nil {
		w.conns = map[uint64]int{}
	}
	for inode, fd := range connections(w.names) {
		if _, known := w.conns[inode]; known {
			closeFD(fd)
			continue
		}
		w.conns[inode] = fd
		found = true
	}
	return found
}

// release gives up the call and returns its connections, which are to be closed.
func (w *watch) release() map[uint64]int {
	conns := w.conns
	w.conns, w.file, w.again = nil, nil, false
	return conns
}

func closeAll(fds map[uint64]int) {
	for _, fd := range fds {
		closeFD(fd)
	}
}
