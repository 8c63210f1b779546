package main

import (
	"context"
	"errors"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"
)

// systemd is spoken to as sd_notify(3) has it: one datagram a message. Its methods
// may be called by any number of goroutines and never wait: a goroutine of its own
// does, for a systemd that is busy or stands still. Nobody's heartbeat hangs on it.
type systemd struct {
	conn  net.Conn // nil: nobody listens
	log   zerolog.Logger
	ready sync.Once
	wake  chan struct{} // holds one: there is something to send
	limit time.Time     // of what is left at the end; set before ended is closed
	ended chan struct{} // closed by close
	done  chan struct{} // closed when the goroutine has ended

	mu sync.Mutex
	// pending is what is not sent yet, in order, of each run of STATUS the last:
	// these, READY and STOPPING at most. Guarded by mu.
	pending []string
}

const (
	statusMessage = "STATUS="

	// notifyTry bounds one try to send; notifyClose is for what is left at the end,
	// STOPPING=1 that is.
	notifyTry   = time.Second
	notifyClose = time.Second
)

// newSystemd connects to $NOTIFY_SOCKET, if there is one. close ends what it starts.
func newSystemd(log zerolog.Logger) *systemd {
	n := &systemd{log: log, wake: make(chan struct{}, 1), ended: make(chan struct{}), done: make(chan struct{})}
	if path := os.Getenv("NOTIFY_SOCKET"); path != "" {
		conn, err := net.Dial("unixgram", path)
		if err != nil {
			log.Warn().Err(err).Msg("cannot notify systemd")
			return n
		}
		n.conn = conn
		go n.run()
	}
	return n
}

// run sends what comes until close, and then what is left.
func (n *systemd) run() {
	defer close(n.done)
	for slow := false; ; {
		closing := n.closing() // before the look: what was sent before close is seen
		message := n.first()
		switch {
		case message != "":
		case closing:
			return
		default:
			select {
			case <-n.wake:
			case <-n.ended:
			}
			continue
		}
		limit := time.Now().Add(notifyTry)
		if closing {
			limit = n.limit
		}
		_ = n.conn.SetWriteDeadline(limit) // unixgram has deadlines
		_, err := n.conn.Write([]byte(message))
		again := errors.Is(err, os.ErrDeadlineExceeded)
		if err != nil && !(again && slow) { // said once for as long as it stands still
			n.log.Warn().Err(err).Msg("cannot notify systemd")
		}
		slow = again
		switch {
		case !again:
			n.sent(message)
		case closing:
			return
		}
	}
}

func (n *systemd) closing() bool {
	select {
	case <-n.ended:
		return true
	default:
		return false
	}
}

// first returns what is to be sent next, empty if there is nothing.
func (n *systemd) first() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.pending) == 0 {
		return ""
	}
	return n.pending[0]
}

// sent takes message away, unless another has come in its place.
func (n *systemd) sent(message string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.pending) > 0 && n.pending[0] == message {
		n.pending = n.pending[1:]
	}
}

func (n *systemd) send(message string) {
	if n.conn == nil {
		return
	}
	n.mu.Lock()
	if last := len(n.pending) - 1; last >= 0 && strings.HasPrefix(message, statusMessage) && strings.HasPrefix(n.pending[last], statusMessage) {
		n.pending[last] = message
	} else {
		n.pending = append(n.pending, message)
	}
	n.mu.Unlock()
	select {
	case n.wake <- struct{}{}:
	default: // it will look anyway
	}
}

// status says how things are.
func (n *systemd) status(s string) { n.send(statusMessage + strings.ReplaceAll(s, "\n", " ")) }

// useful says how things are, and the first time also READY. Of a sidecar that is
// when its app runs, is healthy, and Redis was asked: that Redis is away is no
// reason for systemd to end the app.
func (n *systemd) useful(s string) {
	n.status(s)
	n.ready.Do(func() { n.send("READY=1") })
}

// stopping says STOPPING when ctx ends, unless what it returns is called before.
func (n *systemd) stopping(ctx context.Context) (never func()) {
	told := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(told)
		n.send("STOPPING=1")
	})
	return func() {
		if !stop() {
			<-told
		}
	}
}

// close sends what is left, for notifyClose at most.
func (n *systemd) close() {
	if n.conn == nil {
		return
	}
	n.limit = time.Now().Add(notifyClose)
	close(n.ended)
	<-n.done
	_ = n.conn.Close() // nothing is buffered
}
