package reaper

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

func TestMain(m *testing.M) {
	// go-redis dials on after a refused connection until it sees, within a
	// second, that its pool is closed.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/redis/go-redis/v9/internal/pool.(*ConnPool).tryDial"))
}

// registry is a register on a Redis of its own.
type registry struct {
	srv   *redistest.Server
	rdb   *redis.Client // the test's own
	store *registrar.Store
	keys  registrar.Keys
}

func newRegistry(tb testing.TB, args ...string) *registry {
	tb.Helper()
	srv := redistest.Start(tb, args...)
	g := &registry{srv: srv, rdb: srv.Client(tb), store: newStore(tb, srv)}
	g.keys = g.store.Keys()
	return g
}

// newStore returns a store with a client of its own, with the deadlines that a
// reaper has.
func newStore(tb testing.TB, srv *redistest.Server) *registrar.Store {
	tb.Helper()
	rdb, err := registrar.Open(srv.URL(), 4)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := rdb.Close(); err != nil {
			tb.Error(err)
		}
	})
	s, err := registrar.NewStore(rdb, registrar.DefaultNamespace)
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

func newReaper(tb testing.TB, cfg Config, store Store, log zerolog.Logger) *Reaper {
	tb.Helper()
	if cfg.ID == "" {
		cfg.ID = "r1"
	}
	if cfg.TTL == 0 {
		// Pulses 2 s apart, so that a busy machine disturbs no step-by-step test.
		cfg.TTL, cfg.Interval = 30*time.Second, 10*time.Second
	}
	r, err := New(cfg, store, func(context.Context) error { return nil }, log)
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

// sing gives r a canary that beats on a new connection each time, as the
// command does, as user of that password; without user as the default one.
func sing(tb testing.TB, r *Reaper, srv *redistest.Server, user string) {
	r.canary = func(ctx context.Context) error {
		rdb, err := registrar.Open("redis://"+user+srv.Addr+"/0", 1)
		if err != nil {
			return err
		}
		defer rdb.Close()
		s, err := registrar.NewStore(rdb, registrar.DefaultNamespace)
		if err != nil {
			return err
		}
		return s.Canary(ctx)
	}
}

// arm pulses once and then gives r a healthy past, as if that long had gone by.
func arm(tb testing.TB, r *Reaper) {
	tb.Helper()
	mustPulse(tb, r)
	r.proof.segments = []segment{{r.proof.now - 2*r.cfg.TTL.Milliseconds(), r.proof.now}}
	r.note(fault{})
	if !r.Status().Armed {
		tb.Fatal("not armed")
	}
}

func mustPulse(tb testing.TB, r *Reaper) {
	tb.Helper()
	if err := r.Pulse(tb.Context()); err != nil {
		tb.Fatal(err)
	}
}

func mustSweep(tb testing.TB, r *Reaper) Report {
	tb.Helper()
	report, err := r.Sweep(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	return report
}

// put writes an instance of svc that beat at the given time.
func (g *registry) put(tb testing.TB, svc registrar.Service, addr string, at int64) {
	tb.Helper()
	ctx := tb.Context()
	if err := g.rdb.ZAdd(ctx, g.keys.Instances(svc), redis.Z{Score: float64(at), Member: addr}).Err(); err != nil {
		tb.Fatal(err)
	}
	if err := g.rdb.SAdd(ctx, g.keys.Services(), string(svc)).Err(); err != nil {
		tb.Fatal(err)
	}
}

// clock is Redis' time, unix ms.
func (g *registry) clock(tb testing.TB) int64 {
	tb.Helper()
	now, err := g.rdb.Time(tb.Context()).Result()
	if err != nil {
		tb.Fatal(err)
	}
	return now.UnixMilli()
}

func (g *registry) members(tb testing.TB, svc registrar.Service) []string {
	tb.Helper()
	m, err := g.rdb.ZRange(tb.Context(), g.keys.Instances(svc), 0, -1).Result()
	if err != nil {
		tb.Fatal(err)
	}
	slices.Sort(m)
	return m
}

// wantMembers compares without order.
func (g *registry) wantMembers(tb testing.TB, svc registrar.Service, want ...string) {
	tb.Helper()
	slices.Sort(want)
	if got := g.members(tb, svc); !slices.Equal(got, want) {
		tb.Errorf("%s: got %q, want %q", svc, got, want)
	}
}

// expired returns the addresses that a reaper took out of svc, with when.
func (g *registry) expired(tb testing.TB, svc registrar.Service) map[string]int64 {
	tb.Helper()
	all, err := g.rdb.HGetAll(tb.Context(), g.keys.Gone(svc)).Result()
	if err != nil {
		tb.Fatal(err)
	}
	out := map[string]int64{}
	for addr, note := range all {
		f := strings.Fields(note)
		if len(f) < 2 || registrar.Reason(f[0]) != registrar.Expired {
			continue
		}
		at, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil {
			tb.Fatal(err)
		}
		out[addr] = at
	}
	return out
}

// live runs n beaters of svc until stop, or else until the test ends.
func (g *registry) live(tb testing.TB, svc registrar.Service, n int, interval time.Duration) (stop func()) {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(tb.Context()))
	var wg sync.WaitGroup
	for i := range n {
		addr, err := registrar.ParseAddr(fmt.Sprintf("10.0.0.%d:80", i+1))
		if err != nil {
			tb.Fatal(err)
		}
		b, err := registrar.NewBeater(registrar.BeaterConfig{Service: svc, Addr: addr, Weight: 1, Interval: interval}, newStore(tb, g.srv), zerolog.Nop())
		if err != nil {
			tb.Fatal(err)
		}
		wg.Go(func() {
			if err := b.Run(ctx); err != nil {
				tb.Errorf("beater %s: %v", addr, err)
			}
		})
	}
	stop = func() { cancel(); wg.Wait() }
	tb.Cleanup(stop)
	eventually(tb, func() error {
		if got := len(g.members(tb, svc)); got != n {
			return fmt.Errorf("%d of %d registered", got, n)
		}
		return nil
	})
	return stop
}

// run starts r.Run, a Reaper's or a Cluster's, and returns how it is ended: with its error.
func run(tb testing.TB, r interface{ Run(context.Context) error }) (end func() error) {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(tb.Context()))
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	end = sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(20 * time.Second):
			return errors.New("run does not return after its context ended")
		}
	})
	tb.Cleanup(func() {
		if err := end(); err != nil {
			tb.Error(err)
		}
	})
	return end
}

// eventually polls until f succeeds, and shows its last error if it never does.
func eventually(tb testing.TB, f func() error) {
	tb.Helper()
	deadline := time.After(time.Minute)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-deadline:
			tb.Fatal(err)
		case <-tick.C:
		}
	}
}

func eventuallyArmed(tb testing.TB, r *Reaper) {
	tb.Helper()
	eventually(tb, func() error {
		if s := r.Status(); !s.Armed {
			return fmt.Errorf("not armed: %s", s.Cause)
		}
		return nil
	})
}

// logBuffer is a log that a test reads while others write.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

// lines returns those that contain what.
func (l *logBuffer) lines(what string) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []string
	for line := range strings.Lines(l.buf.String()) {
		if strings.Contains(line, what) {
			out = append(out, strings.TrimSpace(line))
		}
	}
	return out
}

// outage wraps the real store: before each call it asks the hook.
type outage struct {
	Store
	pulse func()
	reap  func(*registrar.Sweep)
}

func (o *outage) Pulse(ctx context.Context, id, token string, expiry time.Duration) (registrar.Pulse, error) {
	if o.pulse != nil {
		o.pulse()
	}
	return o.Store.Pulse(ctx, id, token, expiry)
}

func (o *outage) Reap(ctx context.Context, svc registrar.Service, w registrar.Sweep) (registrar.Reaped, error) {
	if o.reap != nil {
		o.reap(&w)
	}
	return o.Store.Reap(ctx, svc, w)
}
