package haproxytest

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
)

// Instance is a small HTTP server that answers with its own address, in the
// body and in the header X-Instance. Its methods may be called concurrently.
//
// /healthz answers 200 or 503, see SetHealthy. /hold answers when the Instance
// is released or closed, and not before: a request that stays in flight.
type Instance struct {
	addr      netip.AddrPort
	server    http.Server
	served    atomic.Int64
	held      atomic.Int64
	unhealthy atomic.Bool
	release   func()
	close     func()
}

// NewInstance starts an Instance on an IPv4 loopback address of its own.
func NewInstance(tb testing.TB) *Instance {
	tb.Helper()
	return newInstance(tb, freeAddr(tb))
}

// NewInstance6 starts an Instance on a free port of ::1.
func NewInstance6(tb testing.TB) *Instance {
	tb.Helper()
	return newInstance(tb, "[::1]:0")
}

func newInstance(tb testing.TB, addr string) *Instance {
	tb.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		tb.Fatal(err)
	}
	i := &Instance{addr: netip.MustParseAddrPort(l.Addr().String())}
	released, release := context.WithCancel(context.Background())
	i.release = release

	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
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
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { i.answer(w) })
	i.server.Handler = mux

	var wg sync.WaitGroup
	wg.Go(func() { _ = i.server.Serve(l) }) // returns when closed
	i.close = sync.OnceFunc(func() {
		release()
		_ = i.server.Close()
		wg.Wait()
	})
	tb.Cleanup(i.close)
	return i
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

// Close cuts all connections and stops listening. It can be called again.
func (i *Instance) Close() { i.close() }
