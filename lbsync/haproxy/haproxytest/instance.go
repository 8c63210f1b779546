package haproxytest

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Instance is a small HTTP server that answers with its own address, in the
// body and in the header X-Instance. Its methods may be called concurrently.
//
// /healthz answers 200 or 503, see SetHealthy. /hold answers when the Instance
// is released or closed, and not before: a request that stays in flight.
type Instance struct {
	addr      netip.AddrPort
	handler   http.Handler
	served    atomic.Int64
	held      atomic.Int64
	checked   atomic.Int64
	unhealthy atomic.Bool
	pause     atomic.Int64
	release   func()

	mu      sync.Mutex
	server  *http.Server // the last one started
	serving sync.WaitGroup
}

// NewInstance starts an Instance on an IPv4 loopback address of its own.
func NewInstance(tb testing.TB) *Instance {
	tb.Helper()
	return newInstance(tb, freeAddr(tb))
}

// NewInstanceOn starts an Instance on addr; port 0 is a free one.
func NewInstanceOn(tb testing.TB, addr string) *Instance {
	tb.Helper()
	return newInstance(tb, addr)
}

// NewInstance6 starts an Instance on a free port of ::1.
func NewInstance6(tb testing.TB) *Instance {
	tb.Helper()
	return newInstance(tb, "[::1]:0")
}

func newInstance(tb testing.TB, addr string) *Instance {
	tb.Helper()
	l, err := listen(addr)
	if err != nil {
		tb.Fatal(err)
	}
	i := &Instance{addr: netip.MustParseAddrPort(l.Addr().String())}
	released, release := context.WithCancel(context.Background())
	i.release = release

	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		i.checked.Add(1)
		if i.unhealthy.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	mux.HandleFunc("/hold", func(w http.ResponseWriter, r *http.Request) {
		i.held.Add(1)
		defer i.held.Add(-1)
		select {
		case <-released.Done():
		case <-r.Context().Done():
		}
		i.answer(w)
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		if d := time.Duration(i.pause.Load()); d > 0 {
			time.Sleep(d)
		}
		i.answer(w)
	})
	i.handler = mux
	i.serve(l)
	tb.Cleanup(i.Close)
	return i
}

func (i *Instance) serve(l net.Listener) {
	s := &http.Server{Handler: i.handler}
	i.server = s
	i.serving.Go(func() { _ = s.Serve(l) }) // returns when closed
}

func (i *Instance) answer(w http.ResponseWriter) {
	i.served.Add(1)
	w.Header().Set("X-Instance", i.addr.String())
	_, _ = w.Write([]byte(i.addr.String()))
}

// Addr returns where the Instance listens.
func (i *Instance) Addr() netip.AddrPort { return i.addr }

// Served returns the number of requests answered, health checks aside.
func (i *Instance) Served() int64 { return i.served.Load() }

// Held returns the number of requests waiting in /hold.
func (i *Instance) Held() int64 { return i.held.Load() }

// Release lets the requests in /hold, and all later ones, be answered.
func (i *Instance) Release() { i.release() }

// SetHealthy chooses the answer of /healthz. An Instance starts healthy.
func (i *Instance) SetHealthy(healthy bool) { i.unhealthy.Store(!healthy) }

// Checked returns the number of health checks answered, well or not.
func (i *Instance) Checked() int64 { return i.checked.Load() }

// SetPause makes every request to other paths than /healthz and /hold take d.
func (i *Instance) SetPause(d time.Duration) { i.pause.Store(int64(d)) }

// Close cuts all connections and stops listening. It can be called again.
func (i *Instance) Close() {
	i.release()
	i.mu.Lock()
	defer i.mu.Unlock()
	_ = i.server.Close()
	i.serving.Wait()
}

// Shutdown ends as a service does on SIGTERM: it stops listening and returns
// when the requests under way have been answered, or with ctx's error.
func (i *Instance) Shutdown(ctx context.Context) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	err := i.server.Shutdown(ctx)
	i.serving.Wait()
	return err
}

// Listen starts again at the same address, after Shutdown.
func (i *Instance) Listen() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	l, err := listen(i.addr.String())
	if err != nil {
		return err
	}
	i.serve(l)
	return nil
}

// listen tries for a second: a process that is being started holds this one's
// sockets for a moment, closed ones too.
func listen(addr string) (net.Listener, error) {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for begun := time.Now(); ; <-tick.C {
		l, err := net.Listen("tcp", addr)
		if err == nil || !errors.Is(err, syscall.EADDRINUSE) || time.Since(begun) > time.Second {
			return l, err
		}
	}
}
