package docker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"rollcall/registrar"
	"rollcall/registrar/docker/dockertest"
	"rollcall/registrar/redistest"
)

type silence struct{}

func (silence) Printf(context.Context, string, ...any) {}

func TestMain(m *testing.M) {
	redis.SetLogger(silence{})
	code := m.Run()
	if err := dockertest.Stop(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if code == 0 {
		if err := goleak.Find(goleak.IgnoreAnyFunction("github.com/redis/go-redis/v9/internal/pool.(*ConnPool).tryDial")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// host is one Redis, one agent and an Engine.
type host struct {
	*dockertest.Engine
	store *registrar.Store
	rdb   *redis.Client
	cfg   Config
	agent *Agent
	end   func() // the agent
	out   lines  // what agents have logged
}

// lines is a log that can be read while it is written.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer // guarded by mu
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// newHost starts an agent that registers only what has the test's own service
// names: others share the Engine.
func newHost(tb testing.TB, e *dockertest.Engine, edit func(*Config)) *host {
	tb.Helper()
	rdb := redistest.Start(tb).Client(tb)
	store, err := registrar.NewStore(rdb, registrar.DefaultNamespace)
	if err != nil {
		tb.Fatal(err)
	}
	h := &host{Engine: e, store: store, rdb: rdb, cfg: Config{
		Engine: e.URL, Advertise: netip.MustParseAddr(e.Host), Explicit: true, Zone: "z", DrainWait: time.Hour, // a container's end cuts it short
	}}
	if edit != nil {
		edit(&h.cfg)
	}
	h.start(tb)
	return h
}

// start starts an agent, whose end the test's end is at the latest.
func (h *host) start(tb testing.TB) {
	tb.Helper()
	var err error
	h.agent, err = New(h.cfg, h.store, zerolog.New(io.MultiWriter(zerolog.NewTestWriter(tb), &h.out)))
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	agent, over := h.agent, false
	go func() { done <- agent.Run(ctx) }()
	h.end = func() {
		if over {
			return
		}
		over = true
		cancel()
		select {
		case err := <-done:
			if err := errors.Join(err, agent.Close()); err != nil {
				tb.Errorf("Run returned %v", err)
			}
		case <-time.After(time.Minute):
			tb.Error("Run has not returned")
		}
	}
	tb.Cleanup(func() { h.end() })
}

func eventually(tb testing.TB, fn func() error) {
	tb.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for begun := time.Now(); ; <-tick.C {
		err := fn()
		if err == nil {
			return
		}
		if time.Since(begun) > 30*time.Second {
			tb.Fatalf("still after 30 s: %v", err)
		}
	}
}

// entry is what the register says of an address.
func (h *host) entry(tb testing.TB, svc registrar.Service, addr netip.AddrPort) (registrar.Entry, error) {
	tb.Helper()
	snap, err := h.store.Read(tb.Context(), svc, nil)
	if err != nil {
		return registrar.Entry{}, err
	}
	for _, e := range snap.Entries {
		if e.Addr == addr {
			return e, nil
		}
	}
	return registrar.Entry{}, fmt.Errorf("nothing of %s %s", svc, addr)
}

// here waits until the address is registered, and not under the token before.
func (h *host) here(tb testing.TB, svc registrar.Service, addr netip.AddrPort, before string) registrar.Meta {
	tb.Helper()
	var m registrar.Meta
	eventually(tb, func() error {
		e, err := h.entry(tb, svc, addr)
		m = e.Instance.Meta
		if err == nil && (!e.Present || m.ID == before) {
			err = fmt.Errorf("%s %s: %+v", svc, addr, e)
		}
		return err
	})
	return m
}

// went waits until the address is gone for a reason.
func (h *host) went(tb testing.TB, svc registrar.Service, addr netip.AddrPort, why registrar.Reason) {
	tb.Helper()
	eventually(tb, func() error {
		e, err := h.entry(tb, svc, addr)
		if err == nil && (e.Present || e.Gone == nil || e.Gone.Reason != why) {
			err = fmt.Errorf("%s %s: %+v %+v", svc, addr, e, e.Gone)
		}
		return err
	})
}

// named labels a container so that it is registered as svc.
func named(svc registrar.Service, more ...string) map[string]string {
	labels := map[string]string{"SERVICE_NAME": string(svc)}
	for i := 0; i < len(more); i += 2 {
		labels[more[i]] = more[i+1]
	}
	return labels
}

// tell says a word to the app behind addr: again, if the Engine's proxy listens and
// the app does not yet.
func tell(tb testing.TB, addr netip.AddrPort, word string) {
	tb.Helper()
	eventually(tb, func() error {
		r, err := http.Post("http://"+addr.String()+"/"+word, "", nil)
		if err != nil {
			return err
		}
		defer r.Body.Close()
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return err
		}
		if r.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s", word, r.Status)
		}
		return nil
	})
}

// TestEngineLife plays the lives of one container: each event of the Engine
// becomes the change that it means, and each life is a registration of its own.
func TestEngineLife(t *testing.T) {
	t.Parallel()
	h := newHost(t, dockertest.Shared(t), nil)
	silent := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: named("life", "SERVICE_IGNORE", "1")})
	nameless := h.Run(t, dockertest.Spec{Publish: []string{"8080"}})
	c := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Env: []string{"SERVICE_WEIGHT=7"}, Labels: named("life", "SERVICE_TAGS", "a,b=c")})
	addr := c.Addr(t, "8080")
	m := h.here(t, "life", addr, "")
	if m.Weight != 7 || m.Zone != "z" || m.Tags["a"] != "true" || m.Tags["b"] != "c" || m.Tags["container"] != c.ID[:12] {
		t.Errorf("registered as %+v", m)
	}
	if begun, err := time.Parse(time.RFC3339Nano, c.Inspect(t).State.StartedAt); err != nil || m.Registered != begun.UnixMilli() {
		t.Errorf("registered at %d, started at %v, %v", m.Registered, begun, err)
	}
	c.Do(t, "pause")
	h.went(t, "life", addr, registrar.Unhealthy)
	c.Do(t, "unpause")
	m = h.here(t, "life", addr, m.ID)
	c.Do(t, "WINCH") // which is not meant to end it
	c.Do(t, "KILL")
	h.went(t, "life", addr, registrar.Left)
	c.Do(t, "start")
	addr = c.Addr(t, "8080") // the Engine gives it another one each time
	m = h.here(t, "life", addr, m.ID)
	c.Do(t, "stop")
	h.went(t, "life", addr, registrar.Left)
	if n := h.rdb.ZCard(t.Context(), h.store.Keys().Instances("life")).Val(); n != 0 {
		t.Errorf("%d more are registered: one of %s, %s", n, silent.ID, nameless.ID)
	}
	h.end()
	if s := h.agent.Status(); s.Away != nil || len(s.Instances) > 0 {
		t.Errorf("at its end: %+v", s)
	}
}

// TestEngineRestarts has the Engine restart an app that crashes: the second life
// is a registration of its own, at the same address or another.
func TestEngineRestarts(t *testing.T) {
	t.Parallel()
	h := newHost(t, dockertest.Shared(t), func(c *Config) { c.Internal = true; c.Network = "rollcall" })
	c := h.Run(t, dockertest.Spec{Restart: true, Labels: named("restarts")})
	addr := netip.AddrPortFrom(c.IP(t), 8080)
	m := h.here(t, "restarts", addr, "")
	life := c.Inspect(t).State.StartedAt
	if err := syscall.Kill(c.Inspect(t).State.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	again := func() (addr netip.AddrPort) {
		eventually(t, func() error {
			addr = netip.AddrPortFrom(c.IP(t), 8080)
			if s := c.Inspect(t).State; !s.Running || s.StartedAt == life || !addr.Addr().IsValid() {
				return fmt.Errorf("it is %s since %s, at %s", s.Status, s.StartedAt, addr)
			}
			return nil
		})
		life = c.Inspect(t).State.StartedAt
		return addr
	}
	m = h.here(t, "restarts", again(), m.ID)
	c.Do(t, "restart")
	h.here(t, "restarts", again(), m.ID)
}

// TestEngineHealthcheck: a container with a HEALTHCHECK is registered while it is
// healthy, and not while it starts.
func TestEngineHealthcheck(t *testing.T) {
	t.Parallel()
	h := newHost(t, dockertest.Shared(t), nil)
	c := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Check: true, Labels: named("checked")})
	addr := c.Addr(t, "8080")
	m := h.here(t, "checked", addr, "")
	if s := c.Inspect(t).State.Health.Status; s != "healthy" {
		t.Errorf("registered while it was %s", s)
	}
	tell(t, addr, "sick")
	h.went(t, "checked", addr, registrar.Unhealthy)
	tell(t, addr, "well")
	h.here(t, "checked", addr, m.ID)
}

// TestEngineChecks: the agent's own checks, from the host and in the container.
func TestEngineChecks(t *testing.T) {
	t.Parallel()
	h := newHost(t, dockertest.Shared(t), nil)
	fast := []string{"SERVICE_CHECK_INTERVAL", "200ms", "SERVICE_CHECK_TIMEOUT", "2s"}
	http := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: named("http", append(fast, "SERVICE_8080_CHECK_HTTP", "/healthz")...)})
	tcp := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: named("tcp", append(fast, "SERVICE_CHECK_TCP", "true")...)})
	// The socket's other end is the Engine's proxy, which accepts for nobody too.
	nobody := h.Run(t, dockertest.Spec{Publish: []string{"8081"}, Labels: named("nobody", append(fast, "SERVICE_8081_CHECK_HTTP", "/")...)})
	exec := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: named("exec", "SERVICE_CHECK_CMD", "/app check", "SERVICE_CHECK_INTERVAL", "200ms", "SERVICE_CHECK_TIMEOUT", "1s")})
	none := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: named("none", "SERVICE_CHECK_CMD", "/bin/none")})
	h.here(t, "tcp", tcp.Addr(t, "8080"), "")
	at := map[registrar.Service]netip.AddrPort{"http": http.Addr(t, "8080"), "exec": exec.Addr(t, "8080")}
	for svc, addr := range at {
		m := h.here(t, svc, addr, "")
		tell(t, addr, "sick")
		h.went(t, svc, addr, registrar.Unhealthy)
		tell(t, addr, "well")
		m = h.here(t, svc, addr, m.ID)
		if svc == "exec" {
			tell(t, addr, "hang")
			h.went(t, svc, addr, registrar.Unhealthy)
			// One that hangs is waited for, and not joined by another.
			look := h.agent.command(exec.ID, []string{"/app", "check"})
			for _, want := range []string{context.DeadlineExceeded.Error(), "has not ended"} {
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				if err := look(ctx); err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("a command that hangs: %v, want %s", err, want)
				}
				cancel()
			}
			tell(t, addr, "well")
			h.here(t, svc, addr, m.ID)
		}
	}
	for svc, c := range map[registrar.Service]*dockertest.Container{"nobody": nobody, "none": none} {
		if n := h.rdb.ZCard(t.Context(), h.store.Keys().Instances(svc)).Val(); n != 0 {
			t.Errorf("%s is registered: %s", svc, c.ID)
		}
	}
	exec.Do(t, "KILL")
	h.went(t, "exec", at["exec"], registrar.Left)
}

// TestEngineStop: who is told to stop drains at once, while it still answers, and
// leaves when it has ended, whatever time the balancers take.
func TestEngineStop(t *testing.T) {
	t.Parallel()
	h := newHost(t, dockertest.Shared(t), nil)
	lingers := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Args: []string{"--linger", "3s"}, Labels: named("stops")})
	addr := lingers.Addr(t, "8080")
	h.here(t, "stops", addr, "")
	// A balancer that lives and never acknowledges.
	waiting := func() error {
		now := float64(h.rdb.Time(t.Context()).Val().UnixMilli())
		return errors.Join(
			h.rdb.ZAdd(t.Context(), h.store.Keys().Balancers(), redis.Z{Score: now, Member: "lb"}).Err(),
			h.rdb.HSet(t.Context(), h.store.Keys().Applied("stops"), "lb", 0).Err(),
		)
	}
	if err := waiting(); err != nil {
		t.Fatal(err)
	}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		lingers.Do(t, "stop")
	}()
	eventually(t, func() error {
		e, err := h.entry(t, "stops", addr)
		if err == nil && (!e.Present || !e.Instance.Meta.Draining) {
			err = fmt.Errorf("%+v", e)
		}
		return err
	})
	if !lingers.Inspect(t).State.Running {
		t.Error("it drained after its end")
	}
	<-stopped
	eventually(t, func() error {
		if err := waiting(); err != nil {
			return err
		}
		e, err := h.entry(t, "stops", addr)
		if err == nil && (e.Present || e.Gone.Reason != registrar.Left) {
			err = fmt.Errorf("%+v", e)
		}
		return err
	})

	// One that is told to stop by its own signal, and lives on, is not registered
	// until it is started again.
	deaf := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, StopSignal: "SIGWINCH", Labels: named("deaf")})
	addr = deaf.Addr(t, "8080")
	m := h.here(t, "deaf", addr, "")
	deaf.Do(t, "WINCH")
	h.went(t, "deaf", addr, registrar.Left)
	left := h.version(t, "deaf")
	if err := h.agent.Reconcile(t.Context()); err != nil {
		t.Error(err)
	}
	if !deaf.Inspect(t).State.Running {
		t.Error("it has ended")
	}
	deaf.Do(t, "pause")
	deaf.Do(t, "unpause")
	deaf.Do(t, "KILL")
	deaf.Do(t, "start")
	h.here(t, "deaf", deaf.Addr(t, "8080"), m.ID)
	if now := h.version(t, "deaf"); now != left+1 {
		t.Errorf("version %d became %d by more than its start", left, now)
	}
}

func (h *host) version(tb testing.TB, svc registrar.Service) int64 {
	tb.Helper()
	v, err := h.store.Versions(tb.Context(), []registrar.Service{svc})
	if err != nil {
		tb.Fatal(err)
	}
	return v.Of[svc]
}

// TestEngineAgentRestarts: an agent that ends leaves nothing, and the next one
// goes on with the same registrations: nobody sees a change. With Leave all leave.
func TestEngineAgentRestarts(t *testing.T) {
	t.Parallel()
	h := newHost(t, dockertest.Start(t), nil) // nobody else's containers
	c := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: named("kept", "SERVICE_CHECK_HTTP", "/healthz")})
	addr := c.Addr(t, "8080")
	m := h.here(t, "kept", addr, "")
	before := h.version(t, "kept")
	h.end()
	var beaten atomic.Int32
	h.cfg.Beaten = func(err error) {
		if err != nil {
			t.Error(err)
		}
		beaten.Add(1)
	}
	h.cfg.Leave = true
	h.start(t)
	eventually(t, func() error {
		if beaten.Load() == 0 {
			return errors.New("no beat of the second agent")
		}
		return nil
	})
	if now := h.version(t, "kept"); now != before {
		t.Errorf("version %d became %d", before, now)
	}
	if again := h.here(t, "kept", addr, ""); again.ID != m.ID {
		t.Errorf("token %s became %s", m.ID, again.ID)
	}
	if s := h.agent.Status(); len(s.Instances) != 1 || s.Instances[0] != (InstanceStatus{"kept", addr, Registered}) {
		t.Errorf("status %+v", s)
	}
	h.end()
	h.went(t, "kept", addr, registrar.Left)
	// Its token has left, so the third agent makes a new registration.
	h.cfg.Beaten = nil
	h.start(t)
	h.here(t, "kept", addr, m.ID)
}

// TestEngineAddresses: published on every address, on the host's own network, on
// loopback for nobody else, and the containers' own addresses.
func TestEngineAddresses(t *testing.T) {
	t.Parallel()
	e := dockertest.Shared(t)
	other := netip.MustParseAddr("10.95.0.1")
	h := newHost(t, e, func(c *Config) { c.Advertise = other })
	hidden := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: named("hidden")})
	wild := h.Run(t, dockertest.Spec{Publish: []string{"0.0.0.0:8080"}, Labels: named("wild")})
	h.Run(t, dockertest.Spec{Args: []string{"--addr", e.Host + ":8080"}, Network: "host", Labels: named("onhost")})
	h.here(t, "wild", netip.AddrPortFrom(other, wild.Addr(t, "8080").Port()), "")
	h.here(t, "onhost", netip.AddrPortFrom(other, 8080), "")
	if n := h.rdb.ZCard(t.Context(), h.store.Keys().Instances("hidden")).Val(); n != 0 {
		t.Errorf("registered though it is published on loopback only: %s", hidden.ID)
	}
	in := newHost(t, e, func(c *Config) { c.Internal, c.Advertise = true, netip.Addr{} })
	many := in.Run(t, dockertest.Spec{Expose: []string{"9000", "9001/udp", "9002"}, Labels: named("many", "SERVICE_9002_NAME", "other", "SERVICE_9000_TAGS", "x=y")})
	in.here(t, "many-8080", netip.AddrPortFrom(many.IP(t), 8080), "")
	in.here(t, "other", netip.AddrPortFrom(many.IP(t), 9002), "")
	if m := in.here(t, "many-9000", netip.AddrPortFrom(many.IP(t), 9000), ""); m.Tags["x"] != "y" {
		t.Errorf("registered as %+v", m)
	}
	if n := in.rdb.SCard(t.Context(), in.store.Keys().Services()).Val(); n < 3 || in.rdb.Exists(t.Context(), in.store.Keys().Instances("many-9001")).Val() != 0 {
		t.Errorf("%d services, or one for UDP", n)
	}

}

// TestEngineAway: an Engine that hangs, dies or comes back has said nothing about
// the containers until it answers again.
func TestEngineAway(t *testing.T) {
	t.Parallel()
	e := dockertest.Start(t, "--live-restore")
	away := make(chan error, 100)
	h := newHost(t, e, func(c *Config) { c.Tell = func(err error) { away <- err } })
	if err := <-away; err != nil {
		t.Fatal(err)
	}
	stays := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: named("stays")})
	dies := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: named("dies")})
	checked := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Check: true, Labels: named("checked")})
	at, gone, well := stays.Addr(t, "8080"), dies.Addr(t, "8080"), checked.Addr(t, "8080")
	healthy := h.here(t, "checked", well, "")
	pid := dies.Inspect(t).State.Pid
	m := h.here(t, "stays", at, "")
	h.here(t, "dies", gone, "")
	beats := func() {
		t.Helper()
		before := h.rdb.ZScore(t.Context(), h.store.Keys().Instances("stays"), at.String()).Val()
		eventually(t, func() error {
			if now := h.rdb.ZScore(t.Context(), h.store.Keys().Instances("stays"), at.String()).Val(); now <= before {
				return errors.New("no beat")
			}
			return nil
		})
	}
	joined := h.version(t, "checked")
	e.Kill(t)
	if err := <-away; err == nil {
		t.Error("the Engine is there, it says")
	}
	if err := h.agent.Reconcile(t.Context()); err == nil {
		t.Error("a list of a dead Engine")
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil { // nobody can say so
		t.Fatal(err)
	}
	beats()
	h.here(t, "dies", gone, "")
	if err := e.Launch(); err != nil {
		t.Fatal(err)
	}
	if err := <-away; err != nil {
		t.Error(err)
	}
	h.went(t, "dies", gone, registrar.Left)
	if again := h.here(t, "stays", at, ""); again.ID != m.ID {
		t.Error("who has lived on is another registration")
	}
	// Docker 20.10 has kept its health; later ones begin with "starting".
	if err := h.agent.Reconcile(t.Context()); err != nil {
		t.Error(err)
	}
	if again := h.here(t, "checked", well, ""); again.ID != healthy.ID || again.Registered != healthy.Registered {
		t.Error("who has a HEALTHCHECK is another registration")
	}
	if now := h.version(t, "checked"); now != joined {
		t.Errorf("version %d of who has a HEALTHCHECK became %d", joined, now)
	}
	stays.Do(t, "stop")
	h.went(t, "stays", at, registrar.Left)
}

// TestEngineHangs: inspections of a hung Engine are no answers.
func TestEngineHangs(t *testing.T) {
	t.Parallel()
	e := dockertest.Start(t)
	h := newHost(t, e, nil)
	c := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: named("hung")})
	addr := c.Addr(t, "8080")
	m := h.here(t, "hung", addr, "")
	e.Hang(t)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := h.agent.inspect(ctx, c.ID); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("inspected a hung Engine: %v", err)
	}
	if err := h.agent.Reconcile(ctx); err == nil {
		t.Error("listed a hung Engine")
	}
	e.Resume(t)
	if again := h.here(t, "hung", addr, ""); again.ID != m.ID {
		t.Error("another registration")
	}
	c.Do(t, "stop")
	h.went(t, "hung", addr, registrar.Left)
	if f, err := h.agent.inspect(t.Context(), strings.Repeat("0", 64)); !errdefs.IsNotFound(err) {
		t.Errorf("a container that is not there: %+v, %v", f, err)
	}
	if slices.ContainsFunc(h.agent.Status().Instances, func(i InstanceStatus) bool { return i.Service == "hung" }) {
		t.Error("it is still known")
	}
}

// proxied is an Engine behind a proxy that hides its events, and at the test's
// word some of its answers.
type proxied struct {
	url    string
	id     atomic.Value // of the container that is counted: the agent meets those of other tests too
	lost   atomic.Bool  // inspections of containers find nothing
	unseen atomic.Int32 // answers about it that were changed so, or so as anew has it
	anew   atomic.Bool  // who is healthy is starting, as after a restart of a later Engine
	late   atomic.Bool  // who starts a command does not hear that it runs
	execs  atomic.Int32 // commands that were made in it
	noInfo atomic.Bool  // it may not be asked who it is
	stuck  atomic.Value // id of a container whose inspections are not answered; "" = of none
	asked  atomic.Int32 // such inspections
	events atomic.Bool  // they are not hidden
	broken atomic.Bool  // commands cannot be made
}

// count adds an answer to n if path is of the container.
func (p *proxied) count(n *atomic.Int32, path string) {
	if id, _ := p.id.Load().(string); id != "" && strings.Contains(path, "/"+id+"/") {
		n.Add(1)
	}
}

func (p *proxied) isStuck(path string) bool {
	id, _ := p.stuck.Load().(string)
	return id != "" && strings.Contains(path, "/"+id+"/")
}

func behind(tb testing.TB, e *dockertest.Engine) *proxied {
	tb.Helper()
	dir, err := os.MkdirTemp("", "rp")
	if err != nil {
		tb.Fatal(err)
	}
	l, err := net.Listen("unix", dir+"/s")
	if err != nil {
		tb.Fatal(err)
	}
	p := &proxied{url: "unix://" + dir + "/s"}
	to := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: "engine"})
	dials := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", strings.TrimPrefix(e.URL, "unix://"))
	}}
	to.Transport = dials
	to.ErrorLog = stdlog.New(io.Discard, "", 0)
	to.ModifyResponse = func(r *http.Response) error {
		if p.late.Load() && strings.HasSuffix(r.Request.URL.Path, "/start") {
			<-r.Request.Context().Done()
		}
		if !p.anew.Load() || !strings.HasSuffix(r.Request.URL.Path, "/json") {
			return nil
		}
		p.count(&p.unseen, r.Request.URL.Path)
		body, err := io.ReadAll(r.Body)
		body = bytes.ReplaceAll(body, []byte(`"Status":"healthy"`), []byte(`"Status":"starting"`))
		r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
		r.Header.Set("Content-Length", strconv.Itoa(len(body)))
		return err
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch path := r.URL.Path; {
		case strings.HasSuffix(path, "/info") && p.noInfo.Load():
			http.Error(w, `{"message":"Forbidden"}`, http.StatusForbidden)
			return
		case strings.HasSuffix(path, "/json") && p.isStuck(path):
			p.asked.Add(1)
			for p.isStuck(path) && r.Context().Err() == nil {
				time.Sleep(5 * time.Millisecond) // a slow Engine's, not the test's
			}
			http.Error(w, `{"message":"gave up"}`, http.StatusInternalServerError)
			return
		case strings.HasSuffix(path, "/events") && !p.events.Load():
			http.Error(w, `{"message":"no events here"}`, http.StatusForbidden)
			return
		case p.lost.Load() && strings.Contains(path, "/containers/") && strings.HasSuffix(path, "/json") && !strings.HasSuffix(path, "/containers/json"):
			p.count(&p.unseen, path)
			http.Error(w, `{"message":"No such container"}`, http.StatusNotFound)
			return
		case p.broken.Load() && strings.Contains(path, "/exec"):
			http.Error(w, `{"message":"fork: resource temporarily unavailable"}`, http.StatusInternalServerError)
			return
		case strings.HasSuffix(path, "/exec"):
			p.count(&p.execs, path)
		}
		to.ServeHTTP(w, r)
	})}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	tb.Cleanup(func() {
		err := srv.Close()
		dials.CloseIdleConnections()
		if got := <-served; got != http.ErrServerClosed {
			err = errors.Join(err, got)
		}
		if err := errors.Join(err, os.RemoveAll(dir)); err != nil {
			tb.Error(err)
		}
	})
	return p
}

// TestEngineNotFound: that an inspection finds nothing is believed when a list
// lacks the container too.
func TestEngineNotFound(t *testing.T) {
	t.Parallel()
	e := dockertest.Shared(t)
	p := behind(t, e)
	h := newHost(t, e, func(c *Config) { c.Engine = p.url })
	c := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: named("lost")})
	addr := c.Addr(t, "8080")
	list := func() {
		t.Helper()
		if err := h.agent.Reconcile(t.Context()); err != nil {
			t.Error(err)
		}
	}
	list()
	h.here(t, "lost", addr, "")
	joined := h.version(t, "lost")
	p.id.Store(c.ID)
	p.lost.Store(true)
	list()
	eventually(t, func() error {
		if n := p.unseen.Load(); n < 3 {
			return fmt.Errorf("%d inspections", n)
		}
		return nil
	})
	if now := h.version(t, "lost"); now != joined {
		t.Errorf("version %d became %d", joined, now)
	}
	c.Do(t, "stop")
	list()
	h.went(t, "lost", addr, registrar.Left)
}

// TestEngineStartsAgain: a life that has been healthy and is "starting" again, as
// after the Engine's restart, is kept until it is unhealthy.
func TestEngineStartsAgain(t *testing.T) {
	t.Parallel()
	e := dockertest.Shared(t)
	p := behind(t, e)
	h := newHost(t, e, func(c *Config) { c.Engine = p.url })
	c := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Check: true, Labels: named("anew")})
	addr := c.Addr(t, "8080")
	eventually(t, func() error {
		_, err := h.entry(t, "anew", addr)
		return errors.Join(err, h.agent.Reconcile(t.Context()))
	})
	joined := h.version(t, "anew")
	p.id.Store(c.ID)
	p.anew.Store(true)
	eventually(t, func() error {
		if err := h.agent.Reconcile(t.Context()); err != nil {
			return err
		}
		if n := p.unseen.Load(); n < 5 {
			return fmt.Errorf("%d inspections", n)
		}
		return nil
	})
	if now := h.version(t, "anew"); now != joined {
		t.Errorf("version %d became %d", joined, now)
	}
	tell(t, addr, "sick")
	eventually(t, func() error {
		e, err := h.entry(t, "anew", addr)
		if err == nil && (e.Present || e.Gone.Reason != registrar.Unhealthy) {
			err = fmt.Errorf("%+v", e)
		}
		return errors.Join(err, h.agent.Reconcile(t.Context()))
	})
}

// TestEngineCommandUnheard: a command whose start is not heard of in time is
// waited for as one that hangs is.
func TestEngineCommandUnheard(t *testing.T) {
	t.Parallel()
	e := dockertest.Shared(t)
	p := behind(t, e)
	h := newHost(t, e, func(c *Config) { c.Engine = p.url })
	c := h.Run(t, dockertest.Spec{Publish: []string{"8080"}})
	tell(t, c.Addr(t, "8080"), "hang")
	p.id.Store(c.ID)
	p.late.Store(true)
	check := h.agent.command(c.ID, []string{"/app", "check"})
	for _, want := range []string{context.DeadlineExceeded.Error(), "has not ended"} {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		if err := check(ctx); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("a command that hangs: %v, want %s", err, want)
		}
		cancel()
	}
	if n := p.execs.Load(); n != 1 {
		t.Errorf("%d commands were made", n)
	}
	tell(t, c.Addr(t, "8080"), "well")
}
