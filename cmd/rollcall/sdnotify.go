package main

import (
	"context"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"
)

// systemd is spoken to to systemd as sd_notify(3) has it: one datagram a message. Its
// methods may be called by any number of goroutines.
type systemd struct {
	conn  net.Conn // nil: nobody listens
	log   zerolog.Logger
	ready sync.Once
}

// newSystemd connects to $NOTIFY_SOCKET, if there is one.
func newSystemd(log zerolog.Logger) *systemd {
	n := &systemd{log: log}
	if path := os.Getenv("NOTIFY_SOCKET"); path != "" {
		conn, err := net.Dial("unixgram", path)
		if err != nil {
			log.Warn().Err(err).Msg("cannot notify systemd")
			return n
		}
		n.conn = conn
	}
	return n
}

func (n *systemd) send(message string) {
	if n.conn == nil {
		return
	}
	// systemd may be busy; who stops must stop.
	_ = n.conn.SetWriteDeadline(time.Now().Add(time.Second)) // unixgram has deadlines
	if _, err := n.conn.Write([]byte(message)); err != nil {
		n.log.Warn().Err(err).Msg("cannot notify systemd")
	}
}

// status says how things are.
func (n *systemd) status(s string) { n.send("STATUS=" + strings.ReplaceAll(s, "\n", " ")) }

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

func (n *systemd) close() {
	if n.conn != nil {
		_ = n.conn.Close() // nothing is buffered
	}
}
