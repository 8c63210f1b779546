package lbsync_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"rollcall/lbsync"
	"rollcall/lbsync/haproxy"
	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var loopback = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}

// world is a real Redis and a real HAProxy with the backends be and other.
type world struct {
	redis *redistest.Server
	store *registrar.Store
	ha    *haproxytest.HAProxy
	cfg   lbsync.Config
	opts  string // for dynamic servers
	log   zerolog.Logger
	token map[netip.AddrPort]string // of who is registered
}

// modes are the two ways to hold instances, and a backend for each.
var modes = []struct {
	name    string
	backend haproxytest.Backend
	options string
}{
	{"slots", haproxytest.Backend{Name: "be", Slots: 30}, ""},
	{"slots-check", haproxytest.Backend{Name: "be", Slots: 30, Check: true}, ""},
	{"dynamic", haproxytest.Backend{Name: "be", Balance: "leastconn"}, ""},
	{"dynamic-check", haproxytest.Backend{Name: "be", Balance: "leastconn", Check: true}, "check inter 200ms fastinter 100ms downinter 100ms"},
}

func newWorld(t *testing.T, be haproxytest.Backend, options string) *world {
	t.Helper()
	return newWorldOn(t, haproxytest.Options{
		Backends:  []haproxytest.Backend{be, {Name: "other", Balance: "leastconn"}},
		StateFile: true,
	}, options)
}

func newWorldOn(t *testing.T, o haproxytest.Options, options string) *world {
	t.Helper()
	w := &world{redis: redistest.Start(t), opts: options, token: map[netip.AddrPort]string{}, log: zerolog.New(zerolog.NewTestWriter(t)).Level(zerolog.InfoLevel).With().Timestamp().Logger()}
	w.ha = haproxytest.Start(t, o)
	var err error
	if w.store, err = registrar.NewStore(w.redis.Client(t), registrar.DefaultNamespace); err != nil {
		t.Fatal(err)
	}
	w.cfg = lbsync.Config{
		ID:         "test",
		Backends:   []lbsync.BackendConfig{{Service: "web", Backend: "be", Mode: lbsync.Auto}},
		Allow:      loopback,
		Checks:     strings.Contains(options, "check"),
		Probe:      50 * time.Millisecond,
		Quarantine: 50 * time.Millisecond, DrainTimeout: 2 * time.Second,
		MinServers: 1,
	}
	return w
}

// client returns a Balancer on the world's HAProxy that the test's end closes.
func (w *world) client(t *testing.T) *haproxy.Client {
	t.Helper()
	c, err := haproxy.New(haproxy.Config{Socket: w.ha.Socket, ServerOptions: w.opts}, w.log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := c.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	return c
}

// run starts a Syncer; stop ends it and waits. The test's end stops it too.
func (w *world) run(t *testing.T, bal lbsync.Balancer) (stop func()) {
	t.Helper()
	s, err := lbsync.New(w.cfg, bal, w.store, w.log)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func (w *world) beat(t *testing.T, a netip.AddrPort, weight int) {
	t.Helper()
	if w.token[a] == "" {
		w.token[a] = rand.Text()
	}
	meta := fmt.Sprintf(`{"id":%q,"weight":%d}`, w.token[a], weight)
	if _, err := w.store.Beat(context.Background(), "web", registrar.Beat{Addr: a, Token: w.token[a], Meta: meta}); err != nil {
		t.Fatal(err)
	}
}

func (w *world) leave(t *testing.T, a netip.AddrPort) {
	t.Helper()
	if _, err := w.store.Leave(context.Background(), "web", a, w.token[a], registrar.Left); err != nil {
		t.Fatal(err)
	}
	delete(w.token, a)
}

// expire makes a reaper take a out.
func (w *world) expire(t *testing.T, a netip.AddrPort) {
	t.Helper()
	ctx := context.Background()
	p, err := w.store.Pulse(ctx, "test", "pulse", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.redis.Client(t).ZAdd(ctx, w.store.Keys().Instances("web"), redis.Z{Score: 1, Member: a.String()}).Err(); err != nil {
		t.Fatal(err)
	}
	removed, err := w.store.Reap(ctx, "web", registrar.Sweep{ID: "test", Token: "pulse", ReplID: p.ReplID, Last: p.Now, MaxAge: time.Minute, Cutoff: 1000})
	if err != nil || len(removed.Addrs) != 1 {
		t.Fatalf("reap: %+v, %v", removed, err)
	}
}

func (w *world) word(t *testing.T, a netip.AddrPort, word registrar.Word) {
	t.Helper()
	if _, _, err := w.store.SetAdmin(context.Background(), "web", a, word); err != nil {
		t.Fatal(err)
	}
}

// servers returns what HAProxy has of ours and in use, "state weight" by
// address; it reads from outside of lbsync.
func (w *world) servers(t *testing.T, backend string) map[string]string {
	t.Helper()
	got := map[string]string{}
	for _, line := range strings.Split(w.ha.Command(t, "show servers state "+backend), "\n") {
		f := strings.Fields(line)
		if len(f) < 19 || f[0] == "#" {
			continue
		}
		addr, admin, weight := netip.AddrPort{}, f[6], f[7]
		if ip, err := netip.ParseAddr(f[4]); err == nil {
			var port uint16
			fmt.Sscan(f[18], &port)
			addr = netip.AddrPortFrom(ip, port)
		}
		var bits int
		fmt.Sscan(admin, &bits)
		state := "ready"
		switch {
		case bits&(1|2|32) != 0:
			state = "maint"
		case bits&24 != 0:
			state = "drain"
		}
		if state == "maint" && addr == lbsync.Placeholder {
			of, added := strings.CutPrefix(f[3], lbsync.NamePrefix)
			if !added {
				continue // a free slot
			}
			got[of] = state + " " + weight
			continue
		}
		got[addr.String()] = state + " " + weight
	}
	return got
}

// want polls until HAProxy's servers are these.
func (w *world) want(t *testing.T, backend string, want map[string]string) {
	t.Helper()
	haproxytest.Poll(t, fmt.Sprintf("%s has %v", backend, want), func() error {
		if got := w.servers(t, backend); fmt.Sprint(got) != fmt.Sprint(want) {
			return fmt.Errorf("it has %v", got)
		}
		return nil
	})
}

// answers polls until requests to the backend are answered by exactly these.
func (w *world) answers(t *testing.T, from ...*haproxytest.Instance) {
	t.Helper()
	haproxytest.Poll(t, "all answer", func() error {
		seen := map[string]bool{}
		for range 8 * len(from) {
			by, status, err := get("http://" + w.ha.Addr("be") + "/")
			if err != nil || status != http.StatusOK {
				return fmt.Errorf("status %d, %v", status, err)
			}
			seen[by] = true
		}
		for _, i := range from {
			if !seen[i.Addr().String()] {
				return fmt.Errorf("%s does not answer, %v do", i.Addr(), seen)
			}
		}
		if len(seen) != len(from) {
			return fmt.Errorf("%v answer", seen)
		}
		return nil
	})
}

// client without kept connections: each request is balanced anew.
var plain = &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}

func get(url string) (by string, status int, err error) {
	r, err := plain.Get(url)
	if err != nil {
		return "", 0, err
	}
	defer r.Body.Close()
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		return "", 0, err
	}
	return r.Header.Get("X-Instance"), r.StatusCode, nil
}

func ready(weight int, is ...*haproxytest.Instance) map[string]string {
	m := map[string]string{}
	for _, i := range is {
		m[i.Addr().String()] = fmt.Sprint("ready ", weight)
	}
	return m
}

func TestLifeInHAProxy(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			w := newWorld(t, mode.backend, mode.options)
			w.run(t, w.client(t))
			a, b, c := haproxytest.NewInstance(t), haproxytest.NewInstance(t), haproxytest.NewInstance6(t)
			w.beat(t, a.Addr(), 100)
			w.beat(t, b.Addr(), 50)
			w.beat(t, c.Addr(), 100)
			all := map[string]string{a.Addr().String(): "ready 100", b.Addr().String(): "ready 50", c.Addr().String(): "ready 100"}
			w.want(t, "be", all)
			w.answers(t, a, b, c)

			seven := 7
			w.word(t, a.Addr(), registrar.Word{Verb: "weight", Weight: &seven})
			w.word(t, b.Addr(), registrar.Word{Verb: "drain"})
			all[a.Addr().String()], all[b.Addr().String()] = "ready 7", "drain 50"
			w.want(t, "be", all)
			w.answers(t, a, c)

			w.word(t, b.Addr(), registrar.Word{Verb: "maint"})
			delete(all, b.Addr().String()) // it needs no server
			w.want(t, "be", all)
			w.answers(t, a, c)
			w.word(t, b.Addr(), registrar.Word{Verb: "ready"})
			w.word(t, a.Addr(), registrar.Word{Verb: "weight"})
			all[a.Addr().String()], all[b.Addr().String()] = "ready 100", "ready 50"
			w.want(t, "be", all)
			w.answers(t, a, b, c)

			w.leave(t, a.Addr())
			w.leave(t, c.Addr())
			w.want(t, "be", map[string]string{b.Addr().String(): "ready 50"})
			w.answers(t, b)
			w.beat(t, c.Addr(), 100)
			w.leave(t, b.Addr()) // somebody's word: the last may go
			w.want(t, "be", ready(100, c))
			if got := w.servers(t, "other"); len(got) != 0 {
				t.Errorf("the other backend has %v", got)
			}
		})
	}
}

// dying is a Balancer whose lbsync is killed after so many commands: what comes
// after never reaches HAProxy.
type dying struct {
	lbsync.Balancer
	left atomic.Int64
	kill context.CancelFunc
	dead atomic.Bool
}

func (d *dying) Apply(ctx context.Context, backend string, ops []lbsync.Op) (lbsync.Applied, error) {
	if d.dead.Load() {
		return lbsync.Applied{}, lbsync.ErrUnknown
	}
	n := int64(len(ops))
	if left := d.left.Add(-n); left < 0 {
		d.dead.Store(true)
		// What was under way is carried out, its answer is never seen.
		_, _ = d.Balancer.Apply(context.WithoutCancel(ctx), backend, ops[:n+left])
		d.kill()
		return lbsync.Applied{}, lbsync.ErrUnknown
	}
	return d.Balancer.Apply(ctx, backend, ops)
}

func TestKilledBetweenAnyTwoCommands(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			w := newWorld(t, mode.backend, mode.options)
			stays, goes := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
			w.beat(t, stays.Addr(), 100)
			w.beat(t, goes.Addr(), 100)
			client := w.client(t)
			for n := int64(0); ; n++ {
				stop := w.run(t, client)
				w.want(t, "be", ready(100, stays, goes))
				stop()

				comes := haproxytest.NewInstance(t)
				w.beat(t, comes.Addr(), 100)
				w.leave(t, goes.Addr())
				ctx, cancel := context.WithCancel(context.Background())
				d := &dying{Balancer: client, kill: cancel}
				d.left.Store(n)
				s, err := lbsync.New(w.cfg, d, w.store, zerolog.Nop())
				if err != nil {
					t.Fatal(err)
				}
				done := make(chan error, 1)
				go func() { done <- s.Run(ctx) }()
				haproxytest.Poll(t, "lbsync is killed or ready", func() error {
					if d.dead.Load() || fmt.Sprint(w.servers(t, "be")) == fmt.Sprint(ready(100, stays, comes)) {
						return nil
					}
					return errors.New("neither")
				})
				cancel()
				if err := <-done; err != nil {
					t.Fatal(err)
				}

				stop = w.run(t, client)
				w.want(t, "be", ready(100, stays, comes))
				w.answers(t, stays, comes)
				stop()
				if !d.dead.Load() {
					t.Logf("killed at each of %d commands", n)
					if n < 6 {
						t.Errorf("a join and a leave took only %d commands", n)
					}
					return
				}
				goes = comes
			}
		})
	}
}

// counting counts what is asked of a Balancer.
type counting struct {
	lbsync.Balancer
	reads, applies atomic.Int64
}

func (c *counting) Read(ctx context.Context, backend string) (lbsync.State, error) {
	c.reads.Add(1)
	return c.Balancer.Read(ctx, backend)
}

func (c *counting) Apply(ctx context.Context, backend string, ops []lbsync.Op) (lbsync.Applied, error) {
	c.applies.Add(1)
	return c.Balancer.Apply(ctx, backend, ops)
}

func TestOneChangeReadsNothingWhole(t *testing.T) {
	for _, mode := range []string{"slots", "dynamic"} {
		t.Run(mode, func(t *testing.T) {
			be := haproxytest.Backend{Name: "be", Balance: "leastconn"}
			if mode == "slots" {
				be.Slots = 310
			}
			w := newWorld(t, be, "")
			for i := range 300 {
				w.beat(t, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 200, byte(i >> 8), byte(i)}), 9), 100)
			}
			bal := &counting{Balancer: w.client(t)}
			w.run(t, bal)
			haproxytest.Poll(t, "300 serve", func() error {
				if n := len(w.servers(t, "be")); n != 300 {
					return fmt.Errorf("%d do", n)
				}
				return nil
			})
			reads := bal.reads.Load()
			i := haproxytest.NewInstance(t)
			w.beat(t, i.Addr(), 100)
			haproxytest.Poll(t, "the new one serves", func() error {
				if w.servers(t, "be")[i.Addr().String()] != "ready 100" {
					return errors.New("not yet")
				}
				return nil
			})
			w.leave(t, i.Addr())
			haproxytest.Poll(t, "it has left", func() error {
				if _, ok := w.servers(t, "be")[i.Addr().String()]; ok {
					return errors.New("not yet")
				}
				return nil
			})
			if n := bal.reads.Load() - reads; n != 0 {
				t.Errorf("a join and a leave read the backend whole %d times", n)
			}
		})
	}
}

// stream sends requests until stop, and counts.
type stream struct {
	sent, failed atomic.Int64
	stop         func()
}

func (w *world) stream(t *testing.T) *stream {
	t.Helper()
	st := &stream{}
	ctx, cancel := context.WithCancel(context.Background())
	var workers sync.WaitGroup
	for range 3 {
		workers.Go(func() {
			kept := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{}}
			defer kept.CloseIdleConnections()
			for n := 0; ctx.Err() == nil; n++ {
				// A POST with a body that cannot be sent twice: nothing retries it.
				r, err := kept.Post("http://"+w.ha.Addr("be")+"/", "text/plain", io.MultiReader(strings.NewReader("body")))
				st.sent.Add(1)
				if err != nil {
					st.failed.Add(1)
					t.Log(err)
					continue
				}
				_, err = io.Copy(io.Discard, r.Body)
				_ = r.Body.Close()
				if err != nil || r.StatusCode != http.StatusOK {
					st.failed.Add(1)
					t.Log(r.StatusCode, err)
				}
			}
		})
	}
	st.stop = sync.OnceFunc(func() { cancel(); workers.Wait() })
	t.Cleanup(st.stop)
	return st
}

func TestRollingReplacementLosesNoRequest(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			w := newWorld(t, mode.backend, mode.options)
			w.run(t, w.client(t))
			old := haproxytest.NewInstance(t)
			w.beat(t, old.Addr(), 100)
			w.want(t, "be", ready(100, old))
			w.answers(t, old)
			sum := w.ha.ConfigSum(t)
			st := w.stream(t)
			for range 8 {
				next := haproxytest.NewInstance(t)
				w.beat(t, next.Addr(), 100)
				w.answers(t, old, next)
				w.leave(t, old.Addr())
				w.want(t, "be", ready(100, next))
				old.Close()
				old = next
			}
			st.stop()
			t.Logf("%d requests", st.sent.Load())
			if n := st.failed.Load(); n != 0 || st.sent.Load() < 100 {
				t.Errorf("%d of %d requests failed", n, st.sent.Load())
			}
			if w.ha.ConfigSum(t) != sum {
				t.Error("haproxy.cfg changed")
			}
		})
	}
}

func TestHAProxyReplaced(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			w := newWorld(t, mode.backend, mode.options)
			w.run(t, w.client(t))
			a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
			w.beat(t, a.Addr(), 100)
			w.beat(t, b.Addr(), 50)
			all := map[string]string{a.Addr().String(): "ready 100", b.Addr().String(): "ready 50"}
			w.want(t, "be", all)
			for _, step := range []struct {
				name string
				do   func()
			}{
				{"reload", func() { w.ha.Reload(t) }},
				{"kill and start", func() { w.ha.Kill(t); w.ha.Restart(t) }},
				{"kill, a change, start", func() {
					w.ha.Kill(t)
					w.leave(t, b.Addr())
					delete(all, b.Addr().String())
					w.ha.Restart(t)
				}},
			} {
				begun := time.Now()
				step.do()
				w.want(t, "be", all)
				t.Logf("%s: right after %v", step.name, time.Since(begun).Round(time.Millisecond))
				if len(all) == 2 {
					w.answers(t, a, b)
				} else {
					w.answers(t, a)
				}
			}
		})
	}
}

// A HAProxy that hangs does not keep lbsync from the one that takes its place, and what the
// old one runs when it wakes does not reach the new one.
func TestHungHAProxyReplaced(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, mode.backend, mode.options)
			w.run(t, w.client(t))
			a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
			w.beat(t, a.Addr(), 100)
			w.beat(t, b.Addr(), 50)
			all := map[string]string{a.Addr().String(): "ready 100", b.Addr().String(): "ready 50"}
			w.want(t, "be", all)
			w.ha.Stop(t)
			w.leave(t, b.Addr()) // a line that it finds when it wakes
			delete(all, b.Addr().String())
			old := w.ha.Replace(t)
			begun := time.Now()
			w.want(t, "be", all)
			took := time.Since(begun)
			t.Logf("right %v after the new one answered", took.Round(time.Millisecond))
			if took > 10*time.Second { // it took 24 s once
				t.Errorf("took %v", took)
			}
			w.answers(t, a)
			old.Cont(t)
			c := haproxytest.NewInstance(t)
			w.beat(t, c.Addr(), 100)
			all[c.Addr().String()] = "ready 100"
			w.want(t, "be", all)
			w.answers(t, a, c)
		})
	}
}

func TestSecondWitness(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			w := newWorld(t, mode.backend, mode.options)
			w.run(t, w.client(t))
			a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
			w.beat(t, a.Addr(), 100)
			w.beat(t, b.Addr(), 100)
			w.want(t, "be", ready(100, a, b))
			w.answers(t, a, b)
			w.expire(t, a.Addr())
			if !strings.HasSuffix(mode.name, "-check") {
				w.want(t, "be", ready(100, b)) // silence is all there is to go by
				// The last one that is up stays, whatever the register says.
				w.expire(t, b.Addr())
				w.passMarker(t)
				w.want(t, "be", ready(100, b))
				return
			}
			w.passMarker(t)
			w.want(t, "be", ready(100, a, b)) // silent, but its check is up
			a.SetHealthy(false)
			w.want(t, "be", ready(100, b))
			// Somebody's word goes at once, whatever the check says.
			w.beat(t, a.Addr(), 100)
			a.SetHealthy(true)
			w.answers(t, a, b)
			w.leave(t, a.Addr())
			w.want(t, "be", ready(100, b))
		})
	}
}

// passMarker has an instance join, in drain, and leave again: when HAProxy has
// followed, lbsync has seen all that was changed before.
func (w *world) passMarker(t *testing.T) {
	t.Helper()
	marker := haproxytest.NewInstance(t).Addr()
	w.word(t, marker, registrar.Word{Verb: "drain"})
	w.beat(t, marker, 100)
	for _, want := range []string{"drain 100", ""} {
		haproxytest.Poll(t, fmt.Sprintf("the marker is %q", want), func() error {
			if got := w.servers(t, "be")[marker.String()]; got != want {
				return fmt.Errorf("it is %q", got)
			}
			return nil
		})
		if want != "" {
			w.leave(t, marker)
		}
	}
}

func TestDrainOfTheLastWaits(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			w := newWorld(t, mode.backend, mode.options)
			w.run(t, w.client(t))
			a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
			w.beat(t, a.Addr(), 100)
			w.want(t, "be", ready(100, a))
			w.answers(t, a)
			w.word(t, a.Addr(), registrar.Word{Verb: "drain"})
			w.passMarker(t)
			w.want(t, "be", ready(100, a))
			w.beat(t, b.Addr(), 100)
			w.want(t, "be", map[string]string{a.Addr().String(): "drain 100", b.Addr().String(): "ready 100"})
			w.word(t, b.Addr(), registrar.Word{Verb: "maint", Force: true}) // a word that does not wait
			haproxytest.Poll(t, "b is in maint", func() error {
				if got := w.servers(t, "be"); strings.HasPrefix(got[b.Addr().String()], "ready") {
					return fmt.Errorf("%v", got)
				}
				return nil
			})
		})
	}
}

// Whether another server is up is asked when it matters: HAProxy's checks have
// changed that since lbsync looked last.
func TestDrainKnowsWhoIsUp(t *testing.T) {
	for _, mode := range modes {
		if !strings.HasSuffix(mode.name, "-check") {
			continue
		}
		t.Run(mode.name, func(t *testing.T) {
			w := newWorld(t, mode.backend, mode.options)
			w.run(t, w.client(t))
			a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
			w.beat(t, a.Addr(), 100)
			w.beat(t, b.Addr(), 100)
			w.answers(t, a, b) // both came up by their checks
			w.word(t, a.Addr(), registrar.Word{Verb: "drain"})
			begun := time.Now()
			w.want(t, "be", map[string]string{a.Addr().String(): "drain 100", b.Addr().String(): "ready 100"})
			t.Logf("drained after %v", time.Since(begun))
			w.word(t, a.Addr(), registrar.Word{Verb: "ready"})
			w.answers(t, a, b)
			b.SetHealthy(false)
			w.answers(t, a)
			w.word(t, a.Addr(), registrar.Word{Verb: "drain"})
			w.passMarker(t)
			w.want(t, "be", ready(100, a, b)) // a is all there is, and stays
			w.answers(t, a)
			b.SetHealthy(true)
			w.answers(t, b)
		})
	}
}

// A whole new set takes over: the old one shrinks as the new one comes up.
func TestShareStaysUp(t *testing.T) {
	for _, mode := range modes {
		if !strings.HasSuffix(mode.name, "-check") {
			continue
		}
		t.Run(mode.name, func(t *testing.T) {
			w := newWorld(t, mode.backend, mode.options)
			w.cfg.MinShare = 50
			w.run(t, w.client(t))
			old, fresh := make([]*haproxytest.Instance, 4), make([]*haproxytest.Instance, 4)
			for i := range old {
				old[i], fresh[i] = haproxytest.NewInstance(t), haproxytest.NewInstance(t)
				fresh[i].SetHealthy(false)
				w.beat(t, old[i].Addr(), 100)
			}
			w.answers(t, old...)
			for _, i := range fresh {
				w.beat(t, i.Addr(), 100)
			}
			for _, i := range old {
				w.word(t, i.Addr(), registrar.Word{Verb: "drain"})
			}
			left := func(n int) {
				t.Helper()
				haproxytest.Poll(t, fmt.Sprintf("%d of the old are ready", n), func() error {
					got, ready := w.servers(t, "be"), 0
					for _, i := range old {
						if strings.HasPrefix(got[i.Addr().String()], "ready") {
							ready++
						}
					}
					if ready != n {
						return fmt.Errorf("%d are: %v", ready, got)
					}
					return nil
				})
			}
			left(2) // half of the four that shall be ready
			w.passMarker(t)
			left(2)
			fresh[0].SetHealthy(true)
			left(1)
			fresh[1].SetHealthy(true)
			left(0)
			w.answers(t, fresh[:2]...)
		})
	}
}

func TestOthersServersAreLeftAlone(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			w := newWorld(t, mode.backend, mode.options)
			// In the backend's configuration it would be the same: not ours by name.
			w.ha.Command(t, "add server be/by-hand 127.201.0.1:9;set server be/by-hand weight 3;set server be/by-hand state ready")
			hand := map[string]string{"127.201.0.1:9": "ready 3"}
			w.want(t, "be", hand)
			w.run(t, w.client(t))
			a := haproxytest.NewInstance(t)
			w.beat(t, a.Addr(), 100)
			w.want(t, "be", map[string]string{"127.201.0.1:9": "ready 3", a.Addr().String(): "ready 100"})

			// A human's maint stays, over changes and over a restart of lbsync.
			name := ""
			for _, l := range strings.Split(w.ha.Command(t, "show servers state be"), "\n") {
				if f := strings.Fields(l); len(f) > 18 && f[4] == a.Addr().Addr().String() {
					name = f[3]
				}
			}
			w.ha.Command(t, "set server be/"+name+" state maint")
			w.beat(t, a.Addr(), 90)
			w.passMarker(t)
			w.want(t, "be", map[string]string{"127.201.0.1:9": "ready 3", a.Addr().String(): "maint 100"}) // untouched, weight and all
			w.ha.Command(t, "set server be/"+name+" state ready")
			w.beat(t, a.Addr(), 80)
			w.want(t, "be", map[string]string{"127.201.0.1:9": "ready 3", a.Addr().String(): "ready 80"})
			w.leave(t, a.Addr())
			w.want(t, "be", hand)
		})
	}
}

// stopping stops in its next read of the backend be, when it has been read.
type stopping struct {
	lbsync.Balancer
	next atomic.Pointer[stop]
}

type stop struct{ stopped, resume chan struct{} }

func (s *stopping) Read(ctx context.Context, backend string) (lbsync.State, error) {
	st, err := s.Balancer.Read(ctx, backend)
	if backend == "be" {
		if n := s.next.Swap(nil); n != nil {
			close(n.stopped)
			<-n.resume
		}
	}
	return st, err
}

// What a human did while the backend was read is seen before a change that came in the
// meantime is written.
func TestChangeDuringRead(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			w := newWorld(t, mode.backend, mode.options)
			// The other backend tells when the change has been heard.
			w.cfg.Backends = append(w.cfg.Backends, lbsync.BackendConfig{Service: "web", Backend: "other", Mode: lbsync.Auto})
			bal := &stopping{Balancer: w.client(t)}
			w.run(t, bal)
			a := haproxytest.NewInstance(t)
			w.beat(t, a.Addr(), 100)
			all := ready(100, a)
			w.want(t, "be", all)
			w.want(t, "other", all)
			name := ""
			for _, l := range strings.Split(w.ha.Command(t, "show servers state be"), "\n") {
				if f := strings.Fields(l); len(f) > 18 && f[4] == a.Addr().Addr().String() {
					name = f[3]
				}
			}
			look := &stop{make(chan struct{}), make(chan struct{})}
			goOn := sync.OnceFunc(func() { close(look.resume) })
			defer goOn()
			bal.next.Store(look)
			<-look.stopped
			w.ha.Command(t, "set server be/"+name+" state maint")
			w.beat(t, a.Addr(), 90)
			w.want(t, "other", ready(90, a))
			goOn()
			w.passMarker(t)
			if got := w.servers(t, "be")[a.Addr().String()]; got != "maint 100" {
				t.Errorf("be has %q; want maint 100: a human's server is left alone, weight and all", got)
			}
		})
	}
}

func TestMoreInstancesThanSlots(t *testing.T) {
	w := newWorld(t, haproxytest.Backend{Name: "be", Slots: 3}, "")
	w.cfg.Backends[0].Mode = lbsync.Slots
	w.run(t, w.client(t))
	var is []*haproxytest.Instance
	for range 5 {
		i := haproxytest.NewInstance(t)
		is = append(is, i)
		w.beat(t, i.Addr(), 100)
	}
	full := func() error {
		if got := w.servers(t, "be"); len(got) != 3 {
			return fmt.Errorf("%v serve", got)
		}
		return nil
	}
	haproxytest.Poll(t, "three serve", full)
	for n := range 2 {
		for _, i := range is {
			if w.servers(t, "be")[i.Addr().String()] != "" {
				w.leave(t, i.Addr())
				gone := i.Addr().String()
				haproxytest.Poll(t, "its slot is given on", func() error {
					if got := w.servers(t, "be"); got[gone] != "" || len(got) != 3 {
						return fmt.Errorf("%v serve", got)
					}
					return nil
				})
				break
			}
		}
		t.Log("given on", n+1)
	}
}

// With mode auto who finds no slot gets a server of its own, where HAProxy can
// add one; where it cannot, the rest are served all the same.
func TestOverflow(t *testing.T) {
	for _, tt := range []struct {
		balance string
		serve   int
	}{{"leastconn", 5}, {"static-rr", 3}} {
		t.Run(tt.balance, func(t *testing.T) {
			w := newWorld(t, haproxytest.Backend{Name: "be", Balance: tt.balance, Slots: 3}, "")
			w.run(t, w.client(t))
			var is []*haproxytest.Instance
			for range 5 {
				i := haproxytest.NewInstance(t)
				is = append(is, i)
				w.beat(t, i.Addr(), 100)
			}
			serving := func() error {
				if got := w.servers(t, "be"); len(got) != tt.serve {
					return fmt.Errorf("%v serve", got)
				}
				return nil
			}
			haproxytest.Poll(t, fmt.Sprint(tt.serve, " serve"), serving)
			w.acked(t, w.version(t))
			for _, i := range is[:2] {
				w.leave(t, i.Addr())
			}
			tt.serve = 3
			haproxytest.Poll(t, "three serve", serving)
			w.answers(t, is[2:]...)
		})
	}
}

func TestOneBackendsTroubleIsItsOwn(t *testing.T) {
	w := newWorld(t, haproxytest.Backend{Name: "be", Slots: 5}, "")
	w.cfg.Backends = append(w.cfg.Backends,
		lbsync.BackendConfig{Service: "web", Backend: "missing", Mode: lbsync.Auto},
		lbsync.BackendConfig{Service: "broken", Backend: "other", Mode: lbsync.Dynamic})
	if err := w.redis.Client(t).Set(context.Background(), w.store.Keys().Meta("broken"), "x", 0).Err(); err != nil {
		t.Fatal(err)
	}
	w.run(t, w.client(t))
	for range 3 {
		i := haproxytest.NewInstance(t)
		w.beat(t, i.Addr(), 100)
		haproxytest.Poll(t, "it serves", func() error {
			if w.servers(t, "be")[i.Addr().String()] == "" {
				return errors.New("not yet")
			}
			return nil
		})
	}
}

func TestRedisAwayOrEmptyTakesNobodyOut(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			w := newWorld(t, mode.backend, mode.options)
			stop := w.run(t, w.client(t))
			a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
			w.beat(t, a.Addr(), 100)
			w.beat(t, b.Addr(), 100)
			w.want(t, "be", ready(100, a, b))
			w.redis.Kill(t)
			stop()
			w.run(t, w.client(t)) // starts without Redis
			w.redis.Launch(t)     // and meets an empty one
			c := haproxytest.NewInstance(t)
			w.beat(t, c.Addr(), 100)
			w.want(t, "be", ready(100, a, b, c))
			w.beat(t, a.Addr(), 100)
			w.leave(t, c.Addr())
			w.want(t, "be", ready(100, a, b))
		})
	}
}

// An lbsync that starts without Redis serves the last lists, if HAProxy has
// nothing better.
func TestColdStart(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, mode.backend, mode.options)
			w.cfg.StateFile = filepath.Join(t.TempDir(), "last")
			client := w.client(t)
			a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
			w.beat(t, a.Addr(), 100)
			w.beat(t, b.Addr(), 50)
			stop := w.run(t, client)
			all := map[string]string{a.Addr().String(): "ready 100", b.Addr().String(): "ready 50"}
			w.want(t, "be", all)
			stop() // writes the file
			info, err := os.Stat(w.cfg.StateFile)
			if err != nil || info.Mode().Perm() != 0o600 {
				t.Fatalf("%v, %v", info, err)
			}

			w.redis.Kill(t)
			c := haproxytest.NewInstance(t)
			w.ha.Kill(t)
			w.ha.Restart(t)
			stop = w.run(t, client)
			w.want(t, "be", all)
			w.answers(t, a, b)

			// Redis comes back, empty: who registers is added, nobody goes at once.
			w.redis.Launch(t)
			w.beat(t, c.Addr(), 100)
			w.answers(t, a, b, c)
			stop()
		})
	}
}

func TestColdStartKnowsBetter(t *testing.T) {
	w := newWorld(t, haproxytest.Backend{Name: "be", Slots: 5}, "")
	w.cfg.StateFile = filepath.Join(t.TempDir(), "last")
	client := w.client(t)
	a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
	for _, text := range []string{"{", `{"services":{"web":{"instances":[{"addr":"0.0.0.0:1","weight":1}]}}}`, `{"services":{"web":{"instances":[{"addr":"127.0.0.1:80","weight":999}]}}}`} {
		if err := os.WriteFile(w.cfg.StateFile, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		stop := w.run(t, client)
		stop() // it neither fails nor is it in the way
	}
	w.beat(t, a.Addr(), 100)
	stop := w.run(t, client)
	w.want(t, "be", ready(100, a))
	stop()
	old, err := os.ReadFile(w.cfg.StateFile)
	if err != nil {
		t.Fatal(err)
	}
	w.beat(t, b.Addr(), 100)
	w.leave(t, a.Addr())
	stop = w.run(t, client)
	w.want(t, "be", ready(100, b))
	stop()
	if err := os.WriteFile(w.cfg.StateFile, old, 0o600); err != nil {
		t.Fatal(err)
	}
	// A file that is older than what HAProxy has is not applied, and a list of
	// another history makes nobody leave.
	w.redis.Kill(t)
	var out syncBuffer
	w.log = zerolog.New(&out)
	w.run(t, client)
	haproxytest.Poll(t, "the old list was looked at", func() error {
		if !strings.Contains(out.String(), "serves already") {
			return errors.New(out.String())
		}
		return nil
	})
	w.want(t, "be", ready(100, b))
	w.redis.Launch(t)
	w.beat(t, a.Addr(), 100)
	w.want(t, "be", ready(100, a, b))
}

// syncBuffer is a log that one goroutine writes and another one reads.
type syncBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func TestForeignAddressesAreRefused(t *testing.T) {
	w := newWorld(t, haproxytest.Backend{Name: "be", Slots: 5}, "")
	w.run(t, w.client(t))
	ctx := context.Background()
	rdb := w.redis.Client(t)
	k := w.store.Keys()
	for _, member := range []string{
		"127.0.0.1:80;disable frontend fe_be", "x\ny", "unix@/run/x", "127.0.0.1:0", "0.0.0.0:80", "::1:80", "localhost:80", "pruned", "",
	} {
		if err := rdb.ZAdd(ctx, k.Instances("web"), redis.Z{Score: float64(time.Now().UnixMilli()), Member: member}).Err(); err != nil {
			t.Fatal(err)
		}
	}
	w.beat(t, netip.MustParseAddrPort("10.9.9.9:80"), 100) // not among the allowed networks
	i := haproxytest.NewInstance(t)
	w.beat(t, i.Addr(), 100)
	w.want(t, "be", ready(100, i))
	w.answers(t, i)
}

func TestOnce(t *testing.T) {
	w := newWorld(t, haproxytest.Backend{Name: "be", Slots: 5}, "")
	a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
	w.beat(t, a.Addr(), 100)
	w.beat(t, b.Addr(), 100)
	s, err := lbsync.New(w.cfg, w.client(t), w.store, w.log)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Once(context.Background()); err != nil {
		t.Fatal(err)
	}
	if got, want := w.servers(t, "be"), ready(100, a, b); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v, want %v", got, want)
	}
	w.redis.Kill(t)
	if err := s.Once(context.Background()); err == nil {
		t.Error("no error without Redis")
	}
}

// acked polls until lbsync has acknowledged this version, or a later one.
func (w *world) acked(t *testing.T, version int64) {
	t.Helper()
	haproxytest.Poll(t, fmt.Sprintf("version %d is acknowledged", version), func() error {
		acks, err := w.store.Acks(context.Background(), "web")
		if err == nil && (len(acks.Balancers) != 1 || acks.Balancers[0].ID != "test" || !acks.Balancers[0].Live || acks.Balancers[0].Applied < version) {
			err = fmt.Errorf("%+v", acks)
		}
		return err
	})
}

func (w *world) version(t *testing.T) int64 {
	t.Helper()
	v, err := w.store.Versions(context.Background(), []registrar.Service{"web"})
	if err != nil {
		t.Fatal(err)
	}
	return v.Of["web"]
}

func TestAcknowledged(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			w := newWorld(t, mode.backend, mode.options)
			w.cfg.Backends = append(w.cfg.Backends, lbsync.BackendConfig{Service: "web", Backend: "other", Mode: lbsync.Dynamic})
			w.run(t, w.client(t))
			a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
			w.beat(t, a.Addr(), 100)
			w.acked(t, w.version(t))
			if got := w.servers(t, "be"); got[a.Addr().String()] != "ready 100" {
				t.Errorf("acknowledged, but there is %v", got)
			}
			if got := w.servers(t, "other"); got[a.Addr().String()] != "ready 100" {
				t.Errorf("acknowledged, but the other backend has %v", got)
			}
			w.answers(t, a)
			// A drain that waits for another server is not applied yet.
			before := w.version(t)
			w.word(t, a.Addr(), registrar.Word{Verb: "drain"})
			w.passMarker(t)
			acks, err := w.store.Acks(context.Background(), "web")
			if err != nil || acks.Balancers[0].Applied != before {
				t.Errorf("acknowledged %+v, %v; want version %d", acks, err, before)
			}
			w.beat(t, b.Addr(), 100)
			w.acked(t, w.version(t))
			if got := w.servers(t, "be"); got[a.Addr().String()] != "drain 100" {
				t.Errorf("acknowledged, but there is %v", got)
			}
			w.redis.Kill(t)
			w.redis.Launch(t)
			w.beat(t, a.Addr(), 90)
			w.acked(t, w.version(t)) // of the new history
		})
	}
}

// A backend's own networks take the place of the general ones.
func TestAllowOfBackend(t *testing.T) {
	w := newWorld(t, haproxytest.Backend{Name: "be", Slots: 2}, "")
	w.cfg.Backends = append(w.cfg.Backends, lbsync.BackendConfig{
		Service: "web", Backend: "other", Mode: lbsync.Dynamic, Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")},
	})
	w.run(t, w.client(t))
	loop, ten := netip.MustParseAddrPort("127.0.0.1:9"), netip.MustParseAddrPort("10.0.0.1:9")
	w.beat(t, loop, 100)
	w.beat(t, ten, 100)
	w.acked(t, w.version(t))
	if got := w.servers(t, "be"); got[loop.String()] != "ready 100" || len(got) != 1 {
		t.Errorf("the backend with the general networks has %v", got)
	}
	if got := w.servers(t, "other"); got[ten.String()] != "ready 100" || len(got) != 1 {
		t.Errorf("the backend with its own has %v", got)
	}
}

// A dry run writes what Once would send, and sends nothing.
func TestDryRun(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			w := newWorld(t, mode.backend, mode.options)
			client := w.client(t)
			w.beat(t, netip.MustParseAddrPort("127.210.0.1:9"), 70)
			state := func() string { // without the seconds since the last change
				var rows []string
				for _, line := range strings.Split(w.ha.Command(t, "show servers state be"), "\n") {
					if f := strings.Fields(line); len(f) > 18 {
						rows = append(rows, strings.Join(append(f[:9:9], f[10:]...), " "))
					}
				}
				return strings.Join(rows, "\n")
			}
			before := state()
			var out strings.Builder
			dry := &lbsync.DryRun{Balancer: client, Render: client.Render, Out: &out}
			once := func(b lbsync.Balancer) {
				s, err := lbsync.New(w.cfg, b, w.store, w.log)
				if err != nil {
					t.Fatal(err)
				}
				if err := s.Once(context.Background()); err != nil {
					t.Fatal(err)
				}
			}
			once(dry)
			if state() != before {
				t.Error("something was changed")
			}
			sent := &sending{Balancer: client, render: client.Render}
			once(sent)
			if want := strings.Join(sent.commands, "\n") + "\n"; out.String() != want || dry.Commands != len(sent.commands) || dry.Commands < 3 {
				t.Errorf("would send\n%sand sent\n%s", &out, want)
			}
			out.Reset()
			dry = &lbsync.DryRun{Balancer: client, Render: client.Render, Out: &out}
			if once(dry); dry.Commands != 0 {
				t.Errorf("left to do: %s", &out)
			}
		})
	}
}

// sending notes what is sent.
type sending struct {
	lbsync.Balancer
	render   func(string, lbsync.Op) (string, error)
	commands []string
}

func (s *sending) Apply(ctx context.Context, backend string, ops []lbsync.Op) (lbsync.Applied, error) {
	for _, o := range ops {
		c, err := s.render(backend, o)
		if err != nil {
			return lbsync.Applied{}, err
		}
		s.commands = append(s.commands, c)
	}
	return s.Balancer.Apply(ctx, backend, ops)
}

func TestConfigRefused(t *testing.T) {
	ok := lbsync.BackendConfig{Service: "web", Backend: "be", Mode: lbsync.Auto}
	for _, tt := range []struct {
		name string
		cfg  lbsync.Config
	}{
		{"nothing to do", lbsync.Config{ID: "x"}},
		{"no id", lbsync.Config{Backends: []lbsync.BackendConfig{ok}}},
		{"one backend, two services", lbsync.Config{ID: "x", Backends: []lbsync.BackendConfig{ok, {Service: "api", Backend: "be", Mode: lbsync.Auto}}}},
		{"mode", lbsync.Config{ID: "x", Backends: []lbsync.BackendConfig{{Service: "web", Backend: "be", Mode: "magic"}}}},
		{"negative", lbsync.Config{ID: "x", Backends: []lbsync.BackendConfig{ok}, Hold: -1}},
		{"negative floor", lbsync.Config{ID: "x", Backends: []lbsync.BackendConfig{ok}, MinServers: -1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := lbsync.New(tt.cfg, nil, nil, zerolog.Nop()); err == nil {
				t.Error("accepted")
			}
		})
	}
}
