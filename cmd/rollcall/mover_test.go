package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// moving is a mover of service web at 10.0.0.1:80 that runs, on a Redis of its own.
type moving struct {
	*system
	store *registrar.Store
	*mover
	cancel context.CancelCauseFunc
	ended  chan error
	log    *lockedBuffer

	mu   sync.Mutex
	told []string // guarded by mu
}

const oldAddr, newAddr, thirdAddr = "10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"

func startMoving(t *testing.T, drainWait time.Duration, hurry chan struct{}) *moving {
	t.Helper()
	return startMovingFrom(t, oldAddr, drainWait, hurry)
}

func startMovingFrom(t *testing.T, addr string, drainWait time.Duration, hurry chan struct{}) *moving {
	t.Helper()
	m := &moving{system: &system{redis: redistest.Start(t)}, log: &lockedBuffer{}}
	store, err := registrar.NewStore(m.redis.Client(t), registrar.DefaultNamespace)
	if err != nil {
		t.Fatal(err)
	}
	m.store = store
	m.mover, err = newMover(registrar.BeaterConfig{
		Service: "web", Addr: netip.MustParseAddrPort(addr), Weight: 1, Interval: 50 * time.Millisecond,
		DrainWait: drainWait, Hurry: hurry,
		Tell: func(status string) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.told = append(m.told, status)
		},
	}, store, zerolog.New(m.log))
	if err != nil {
		t.Fatal(err)
	}
	m.run(t)
	m.comes(t, addr)
	return m
}

// run starts a Run, which the test's end ends.
func (m *moving) run(t *testing.T) {
	t.Helper()
	var ctx context.Context
	ctx, m.cancel = context.WithCancelCause(context.Background())
	m.ended = make(chan error, 1)
	go func() { m.ended <- m.Run(ctx) }()
	t.Cleanup(func() {
		m.cancel(registrar.ErrEnded)
		if t.Failed() {
			t.Logf("%s", m.log)
		}
	})
}

func (m *moving) to(addr string) { m.move(netip.MustParseAddrPort(addr).Addr()) }

// ends waits for the end of the Run.
func (m *moving) ends(t *testing.T) {
	t.Helper()
	select {
	case err := <-m.ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("it does not end")
	}
}

// events returns what has happened to which addresses, in order.
func (s *system) happened(t *testing.T) (out []string) {
	t.Helper()
	store, err := registrar.NewStore(s.redis.Client(t), registrar.DefaultNamespace)
	if err != nil {
		t.Fatal(err)
	}
	events, err := store.EventReader(nil).Last(t.Context(), "", 1000)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range events {
		if e.Addr != "" {
			out = append(out, e.What+" "+e.Addr)
		}
	}
	return out
}

// happens waits until that is what has happened.
func (s *system) happens(t *testing.T, want ...string) {
	t.Helper()
	haproxytest.Poll(t, strings.Join(want, ", "), func() error {
		if got := s.happened(t); !slices.Equal(got, want) {
			return fmt.Errorf("%q", got)
		}
		return nil
	})
}

// balancer has a balancer be alive that has applied what there is now. seen has it
// be alive still, and apply what there is then only if it is told to.
func (m *moving) balancer(t *testing.T) (seen func(apply bool)) {
	t.Helper()
	var token registrar.Token
	seen = func(apply bool) {
		if apply {
			snap, err := m.store.Read(t.Context(), "web", nil)
			if err != nil {
				t.Fatal(err)
			}
			token = snap.Token
		}
		if err := m.store.Acker("lb").Ack(t.Context(), "web", token); err != nil {
			t.Fatal(err)
		}
	}
	seen(true)
	return seen
}

// TestMoverOrder: the new address is there before the old one drains, which leaves
// when the balancers have applied that. Also of a Run after another.
func TestMoverOrder(t *testing.T) {
	t.Parallel()
	m := startMoving(t, 30*time.Second, nil)
	seen := m.balancer(t)
	m.to(newAddr)
	begun := []string{"joined " + oldAddr, "joined " + newAddr, "draining " + oldAddr}
	m.happens(t, begun...)
	if m.token(t, oldAddr) == m.token(t, newAddr) {
		t.Error("two registrations have one token")
	}
	seen(true)
	m.happens(t, append(begun, "left "+oldAddr)...)
	if at := m.addr().String(); at != newAddr {
		t.Errorf("it speaks for %s", at)
	}
	m.mu.Lock()
	if got := m.told; !slices.Equal(got, []string{"registered", "registered"}) {
		t.Errorf("told %q", got) // not that the old one drains
	}
	m.mu.Unlock()
	m.cancel(registrar.ErrUnhealthy)
	m.ends(t)
	m.to(thirdAddr)
	m.run(t)
	m.comes(t, thirdAddr)
	if token := m.token(t, newAddr); token != "" {
		t.Errorf("%s is back", newAddr)
	}
}

// TestMoverStop: at a stop in the middle of a move both addresses drain and leave.
func TestMoverStop(t *testing.T) {
	t.Parallel()
	hurry := make(chan struct{})
	m := startMoving(t, time.Minute, hurry)
	seen := m.balancer(t)
	m.to(newAddr)
	begun := []string{"joined " + oldAddr, "joined " + newAddr, "draining " + oldAddr}
	m.happens(t, begun...)
	seen(false)
	m.cancel(nil)
	begun = append(begun, "draining "+newAddr)
	m.happens(t, begun...)
	select {
	case err := <-m.ended:
		t.Fatalf("it has not waited for the balancer: %v", err)
	default:
	}
	close(hurry)
	m.ends(t)
	for _, addr := range []string{oldAddr, newAddr} {
		m.goes(t, addr, "left")
	}
}

// TestMoverRefused: while the register does not accept the new address the old one
// stays. An address that comes back before that ends the move.
func TestMoverRefused(t *testing.T) {
	t.Parallel()
	m := startMoving(t, 0, nil)
	rdb := m.redis.Client(t)
	if err := rdb.HSet(t.Context(), "rollcall:config", "max_instances", 1).Err(); err != nil {
		t.Fatal(err)
	}
	m.to(newAddr)
	haproxytest.Poll(t, "there is no room", func() error {
		m.mu.Lock()
		defer m.mu.Unlock()
		if n := len(m.told); n == 0 || !strings.HasPrefix(m.told[n-1], "moving to "+newAddr+", which is not registered") {
			return fmt.Errorf("told %q", m.told)
		}
		return nil
	})
	if at := m.addr().String(); at != oldAddr {
		t.Errorf("it speaks for %s", at)
	}
	m.to(oldAddr)
	m.to(thirdAddr)
	if err := rdb.HDel(t.Context(), "rollcall:config", "max_instances").Err(); err != nil {
		t.Fatal(err)
	}
	m.comes(t, thirdAddr)
	m.goes(t, oldAddr, "left")
	if all := m.happened(t); slices.Contains(all, "joined "+newAddr) {
		t.Errorf("%q", all)
	}
}

// TestMoverServes moves the only instance of a service while requests flow: as long
// as the old address answers none fails.
func TestMoverServes(t *testing.T) {
	t.Parallel()
	i := haproxytest.NewInstance(t)
	next := netip.AddrPortFrom(i.Addr().Addr().Next(), i.Addr().Port())
	l, err := net.Listen("tcp", next.String())
	if err != nil {
		t.Fatal(err)
	}
	var served atomic.Int64
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			served.Add(1)
		}
		_, _ = io.Copy(io.Discard, r.Body) // the answer says all
		w.Header().Set("X-Instance", next.String())
	})}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = srv.Serve(l) }()
	defer func() { _ = srv.Close(); <-ended }()

	m := startMovingFrom(t, i.Addr().String(), 30*time.Second, nil)
	m.ha = haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 4, Check: true}}})
	m.spawn(t, "lbsync", "--socket", m.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8")
	url := "http://" + m.ha.Addr("be") + "/"
	answered(t, url, i)
	load := startLoad(t, url)
	begun := time.Now()
	m.to(next.String())
	m.goes(t, i.Addr().String(), "left")
	took, before := time.Since(begun), served.Load()
	haproxytest.Poll(t, "the new address serves", func() error {
		if n := served.Load(); n < before+10 || n < 10 {
			return fmt.Errorf("%d of %d requests", n, load.sent.Load())
		}
		return nil
	})
	load.stop()
	if n := load.failed.Load(); n > 0 {
		t.Errorf("%d of %d requests failed, the last with %s", n, load.sent.Load(), load.last)
	}
	t.Logf("moved in %v; %d requests, %d failed", took, load.sent.Load(), load.failed.Load())
}

// TestLookout plays what looks come to, one each, and sees what is done about it.
func TestLookout(t *testing.T) {
	a, b, c := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3")
	here := func(ip netip.Addr) view { return view{true, ip} }
	gone := func(ip netip.Addr) view { return view{false, ip} }
	none := gone(netip.Addr{})
	const noLonger, another, again, other = "no longer this machine's; beating on", "another address would be chosen now", "to register again", "and there is no other"
	for _, tt := range []struct {
		name    string
		follows bool
		views   []view
		moves   []netip.Addr
		said    []string
	}{
		{"nothing changes", true, []view{here(a), here(a)}, nil, nil},
		{"it flaps", true, []view{gone(b), here(a), gone(b), gone(c), here(a), here(a)}, nil, nil},
		{"another, then another", true, []view{gone(b), gone(b), here(b), here(b), gone(c), gone(c), here(c)}, []netip.Addr{b, c}, []string{"another address", "another address"}},
		{"between two leases", true, []view{none, none, none, none, gone(b), gone(b), here(b)}, []netip.Addr{b}, []string{other, "another address"}},
		{"it comes back", true, []view{none, none, none, here(a), here(a), here(a)}, nil, []string{other, again}},
		{"only said", false, []view{gone(b), gone(b), gone(b), gone(b), here(a), here(a)}, nil, []string{noLonger, again}},
		{"the route changes", false, []view{here(b), here(b), here(b), here(a), here(a)}, nil, []string{another, again}},
		{"nothing is left", false, []view{none, none, none}, nil, []string{other}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var out strings.Builder
				var moves []netip.Addr
				n := 0
				ctx, cancel := context.WithCancel(t.Context())
				w := &lookout{log: zerolog.New(&out), at: localAddr{name: "eth0", ip: a}, look: func(context.Context) (view, bool) {
					if n == len(tt.views) {
						cancel()
						return view{}, false
					}
					n++
					return tt.views[n-1], true
				}}
				if tt.follows {
					w.move = func(to netip.Addr) { moves = append(moves, to) }
				}
				begun := time.Now()
				w.run(ctx)
				if most := time.Duration(len(tt.views)+1) * lookEvery; time.Since(begun) > most {
					t.Errorf("%v for %d looks", time.Since(begun), len(tt.views))
				}
				if !slices.Equal(moves, tt.moves) {
					t.Errorf("moves to %v, want %v", moves, tt.moves)
				}
				lines := strings.Split(strings.TrimSpace(out.String()), "\n")
				if out.Len() == 0 {
					lines = nil
				}
				ok := len(lines) == len(tt.said)
				for i := 0; ok && i < len(lines); i++ {
					ok = strings.Contains(lines[i], tt.said[i])
				}
				if !ok {
					t.Errorf("said %q, want %q", lines, tt.said)
				}
			})
		})
	}
	// Many changes do not fill the log.
	var out strings.Builder
	w := &lookout{log: zerolog.New(&out), at: localAddr{name: "eth0", ip: a}}
	for range 100 {
		w.changed(gone(b))
		w.changed(here(a))
	}
	if n := strings.Count(out.String(), "\n"); n > 20 || n == 0 {
		t.Error(errors.New(out.String()))
	}
}
