package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/rs/zerolog"

	"rollcall/registrar"
)

const (
	// ownDescriptors are what a daemon keeps for its work: standard files, Redis,
	// HAProxy or the Engine, locks, a check under way.
	ownDescriptors = 24
	// leastConnections may always be open.
	leastConnections = 4
	// acceptPause is the wait after a connection could not be accepted for want of a
	// descriptor.
	acceptPause = 100 * time.Millisecond
)

// connections is a listener that bounds its open connections, so that clients which
// hang cannot take the descriptors that the work needs. For each that is one too many
// the oldest without a request under way is closed, and if all have one, the oldest
// of these: a newcomer, a scraper's say, is always served. It is left alone for the
// first while, in which its request is to come: 2 ms for each connection that may be
// open, 10 ms to 1 s, so that a burst of a thousand is over in some 2 s. Only the
// server that it was attached to can tell which have a request.
type connections struct {
	net.Listener
	bound func() int // at most so many; any goroutine may call it
	log   zerolog.Logger
	lines registrar.Sparing // each line stands for thousands

	end   chan struct{} // closed by Close
	close func() error  // once
	room  chan struct{} // has room for one: a connection was closed

	mu   sync.Mutex
	open []*connection // the oldest first; guarded by mu
}

// connection is one of them.
type connection struct {
	net.Conn
	of    *connections
	busy  int       // requests under way, over HTTP/2 any number; guarded by of.mu
	since time.Time // of its beginning, its last request's end, or this one's beginning; guarded by of.mu
}

// boundConnections bounds l to most connections, or less where the limit on descriptors
// is low: of those that the work does not need, one of so many as share says.
func boundConnections(l net.Listener, most, share int, log zerolog.Logger) *connections {
	c := &connections{Listener: l, log: log, lines: registrar.Sparing{AtOnce: 1}, end: make(chan struct{}), room: make(chan struct{}, 1), bound: func() int {
		var limit syscall.Rlimit
		if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil || limit.Cur > 1<<20 {
			return most
		}
		return min(most, max(leastConnections, (int(limit.Cur)-ownDescriptors)/share))
	}}
	c.close = sync.OnceValue(func() error {
		close(c.end)
		return l.Close()
	})
	return c
}

// Close implements net.Listener. Open connections are their server's.
func (l *connections) Close() error { return l.close() }

// Attach has l know of srv's requests. It must be called before srv serves.
func (l *connections) Attach(srv *http.Server) {
	type key struct{}
	srv.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		if secure, ok := c.(interface{ NetConn() net.Conn }); ok { // a *tls.Conn around it
			c = secure.NetConn()
		}
		return context.WithValue(ctx, key{}, c)
	}
	next := srv.Handler
	srv.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c, ok := r.Context().Value(key{}).(*connection); ok {
			l.mark(c, 1)
			defer l.mark(c, -1)
		}
		next.ServeHTTP(w, r)
	})
}

// mark notes that a request of c begins, 1, or ends, -1, which makes c the newest.
func (l *connections) mark(c *connection, more int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c.busy, c.since = c.busy+more, time.Now()
	if i := slices.Index(l.open, c); i >= 0 {
		l.open = append(slices.Delete(l.open, i, i+1), c)
	}
}

// Accept implements net.Listener. It goes on where there is no descriptor for a moment.
func (l *connections) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		switch {
		case err == nil:
			if !l.makeRoom(l.bound()) {
				_ = conn.Close() // nothing was said
				return nil, net.ErrClosed
			}
			c := &connection{Conn: conn, of: l, since: time.Now()}
			l.mu.Lock()
			l.open = append(l.open, c)
			l.mu.Unlock()
			return c, nil
		case !errors.Is(err, syscall.EMFILE) && !errors.Is(err, syscall.ENFILE) && !errors.Is(err, syscall.ENOBUFS) && !errors.Is(err, syscall.ENOMEM):
			return nil, err
		}
		// What others hold here, the work may need more.
		l.closeOldest(0)
		if !l.pause(acceptPause) {
			return nil, net.ErrClosed
		}
	}
}

// makeRoom closes connections until there are fewer than n. It returns false if l is
// closed before.
func (l *connections) makeRoom(n int) bool {
	leave := min(max(time.Duration(n)*2*time.Millisecond, 10*time.Millisecond), time.Second)
	for {
		l.mu.Lock()
		full := len(l.open) >= n
		l.mu.Unlock()
		if !full {
			return true
		}
		if wait := l.closeOldest(leave); wait > 0 && !l.pause(wait) {
			return false
		}
	}
}

// closeOldest closes the connection whose turn it is, if there is one and it was left
// alone for so long. Else it returns for how long to wait.
func (l *connections) closeOldest(leave time.Duration) (wait time.Duration) {
	l.mu.Lock()
	if len(l.open) == 0 {
		l.mu.Unlock()
		return 0
	}
	i := max(0, slices.IndexFunc(l.open, func(c *connection) bool { return c.busy == 0 }))
	oldest := l.open[i]
	if wait = leave - time.Since(oldest.since); wait <= 0 {
		l.open = slices.Delete(l.open, i, i+1)
	}
	l.mu.Unlock()
	if wait > 0 {
		return wait
	}
	_ = oldest.Conn.Close() // whoever it was has had its time
	if l.lines.May() {
		l.log.Warn().Msg("too many connections, or too few descriptors: the oldest that does nothing is closed for each new one")
	}
	return 0
}

// pause waits until there may be room. It returns false if l is closed before.
func (l *connections) pause(d time.Duration) bool {
	wait := time.NewTimer(d)
	defer wait.Stop()
	select {
	case <-wait.C:
	case <-l.room:
	case <-l.end:
		return false
	}
	return true
}

// Close implements net.Conn.
func (c *connection) Close() error {
	l := c.of
	l.mu.Lock()
	if i := slices.Index(l.open, c); i >= 0 {
		l.open = slices.Delete(l.open, i, i+1)
	}
	l.mu.Unlock()
	err := c.Conn.Close()
	select {
	case l.room <- struct{}{}:
	default: // it has been told
	}
	return err
}
