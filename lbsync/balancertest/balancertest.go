// Package balancertest is the contract that every lbsync.Balancer keeps, as
// tests on a real HAProxy. What it expects of HAProxy is looked up beside the
// Balancer, on the stats socket.
package balancertest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"rollcall/lbsync"
	"rollcall/lbsync/haproxy/haproxytest"
)

// Implementation is a kind of Balancer.
type Implementation struct {
	// New returns one for a HAProxy, closed with the test. Each of its
	// exchanges ends within timeout, or a few times it where it asks more than
	// once. options are for the servers that it adds; there are none if it
	// cannot EnableHealth.
	New func(t *testing.T, h *haproxytest.HAProxy, timeout time.Duration, options string) lbsync.Balancer
	// Cannot lists the kinds of Op that it has no way to carry out. The
	// contract is then that each is refused in words and changes nothing.
	Cannot []lbsync.Kind
}

const (
	backend = "be"
	patient = 5 * time.Second // for tests that do not measure it
)

// Run runs the contract.
func Run(t *testing.T, im Implementation) {
	for _, tt := range []struct {
		name string
		run  func(*testing.T, Implementation)
	}{
		{"Probe", testProbe},
		{"Slot", testSlot},
		{"SlotChecked", testSlotChecked},
		{"Dynamic", testDynamic},
		{"DynamicChecked", testDynamicChecked},
		{"Weights", testWeights},
		{"Static", testStatic},
		{"Busy", testBusy},
		{"Shutdown", testShutdown},
		{"Cannot", testCannot},
		{"NoBackend", testNoBackend},
		{"Refused", testRefused},
		{"Invalid", testInvalid},
		{"Foreign", testForeign},
		{"Hung", testHung},
		{"Killed", testKilled},
		{"Context", testContext},
		{"Reload", testReload},
		{"Plan", testPlan},
		{"Concurrent", testConcurrent},
		{"Turns", testTurns},
	} {
		t.Run(tt.name, func(t *testing.T) { tt.run(t, im) })
	}
}

// world is one Balancer and the HAProxy behind it.
type world struct {
	*testing.T
	im       Implementation
	haproxy  *haproxytest.HAProxy
	balancer lbsync.Balancer
}

func start(t *testing.T, im Implementation, be haproxytest.Backend, timeout time.Duration) *world {
	t.Helper()
	return startWith(t, im, be, timeout, "")
}

func startWith(t *testing.T, im Implementation, be haproxytest.Backend, timeout time.Duration, options string) *world {
	t.Helper()
	be.Name = backend
	h := haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{be}})
	return &world{t, im, h, im.New(t, h, timeout, options)}
}

func (w *world) can(k lbsync.Kind) bool { return !slices.Contains(w.im.Cannot, k) }

// try applies ops and fails the test if no whole answer came.
func (w *world) try(ops ...lbsync.Op) lbsync.Applied {
	w.Helper()
	a, err := w.balancer.Apply(w.Context(), backend, ops)
	if err != nil {
		w.Fatalf("%+v: %v", ops, err)
	}
	if a.Process.PID != w.haproxy.PID() {
		w.Errorf("applied to pid %d, haproxy is %d", a.Process.PID, w.haproxy.PID())
	}
	return a
}

// apply applies ops and fails the test if one was refused.
func (w *world) apply(ops ...lbsync.Op) lbsync.Applied {
	w.Helper()
	a := w.try(ops...)
	if len(a.Refused) > 0 {
		w.Fatalf("%+v: refused: %q", ops, a.Refused)
	}
	return a
}

// read returns the backend by name.
func (w *world) read() map[string]lbsync.Server {
	w.Helper()
	st, err := w.balancer.Read(w.Context(), backend)
	if err != nil {
		w.Fatal(err)
	}
	if st.Process.PID != w.haproxy.PID() {
		w.Errorf("read from pid %d, haproxy is %d", st.Process.PID, w.haproxy.PID())
	}
	servers := make(map[string]lbsync.Server, len(st.Servers))
	for _, s := range st.Servers {
		servers[s.Name] = s
	}
	return servers
}

// one checks that a server is as wanted in the answer to the last Apply, in a
// Peek and in a Read. The count of connections is left out.
func (w *world) one(a lbsync.Applied, want lbsync.Server) {
	w.Helper()
	if len(a.Servers) != 1 {
		w.Fatalf("%d servers read back, want 1: %+v", len(a.Servers), a.Servers)
	}
	peeked, err := w.balancer.Peek(w.Context(), backend, []lbsync.Server{{Name: want.Name, ID: want.ID, Slot: want.Slot}})
	if err != nil || len(peeked.Servers) != 1 {
		w.Fatalf("peek: %+v, %v", peeked, err)
	}
	for where, got := range map[string]lbsync.Server{"applied": a.Servers[0], "peeked": peeked.Servers[0], "read": w.read()[want.Name]} {
		got.Busy = 0
		got.Configured, got.Agent, got.Untouched, got.Resolver = 0, false, false, false // only Read tells
		if got != want {
			w.Errorf("%s: got  %+v\nwant %+v", where, got, want)
		}
	}
}

// state returns a server's administrative bits and its weight as HAProxy has
// them.
func (w *world) state(name string) (admin string, weight string) {
	w.Helper()
	for line := range strings.Lines(w.haproxy.Command(w, "show servers state "+backend)) {
		if col := strings.Fields(line); len(col) > 7 && col[3] == name {
			return col[6], col[7]
		}
	}
	return "", ""
}

// get asks HAProxy once and returns the status and who answered.
func (w *world) get(path string) (status int, instance string) {
	w.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patient}
	resp, err := client.Get("http://" + w.haproxy.Addr(backend) + path)
	if err != nil {
		w.Error(err)
		return 0, ""
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	if err != nil {
		w.Error(err)
	}
	return resp.StatusCode, resp.Header.Get("X-Instance")
}

// served checks who answers, "" for nobody.
func (w *world) served(want string) {
	w.Helper()
	for range 3 {
		status, got := w.get("/")
		if got != want || (status == http.StatusOK) != (want != "") {
			w.Errorf("status %d from %q, want %q", status, got, want)
		}
	}
}

func op(k lbsync.Kind, s lbsync.Server) lbsync.Op {
	return lbsync.Op{Kind: k, Name: s.Name, ID: s.ID, Addr: s.Addr}
}

func weigh(s lbsync.Server, weight int) lbsync.Op {
	o := op(lbsync.SetWeight, s)
	o.Weight = weight
	return o
}

var placeholder = netip.MustParseAddrPort("127.0.0.1:1")

func testProbe(t *testing.T, im Implementation) {
	w := start(t, im, haproxytest.Backend{Slots: 1}, patient)
	first, err := w.balancer.Probe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if first.PID != w.haproxy.PID() || first.Version == "" || time.Since(time.Unix(first.Started, 0)).Abs() > time.Minute {
		t.Errorf("got %+v, want pid %d", first, w.haproxy.PID())
	}
	again, err := w.balancer.Probe(t.Context())
	if err != nil || again != first {
		t.Errorf("first %+v, then %+v, %v", first, again, err)
	}
	a, err := w.balancer.Apply(t.Context(), backend, nil)
	if err != nil || !a.Process.Same(first) || len(a.Servers)+len(a.Refused) != 0 || a.Active != -1 {
		t.Errorf("no ops: %+v, %v", a, err)
	}
}

// testSlot takes a slot through its life, in single steps.
func testSlot(t *testing.T, im Implementation) {
	w := start(t, im, haproxytest.Backend{Slots: 2}, patient)
	i := haproxytest.NewInstance(t)
	s := lbsync.Server{Name: "s1", ID: 1, Addr: placeholder, Slot: true, Admin: lbsync.Maint, Weight: 1}
	servers := w.read()
	if len(servers) != 2 || servers["s1"].Addr != placeholder || !servers["s2"].Slot {
		t.Fatalf("got %+v", servers)
	}

	w.one(w.apply(weigh(s, 0)), with(s, func(s *lbsync.Server) { s.Weight = 0 }))
	s.Weight, s.Addr = 0, i.Addr()
	w.one(w.apply(op(lbsync.SetAddr, s)), s)
	s.Admin, s.Up = lbsync.Ready, true
	w.one(w.apply(op(lbsync.SetReady, s)), s)
	w.served("")
	s.Weight = 7
	a := w.apply(weigh(s, 7))
	w.one(a, s)
	if a.Active != 1 {
		t.Errorf("%d active, want 1", a.Active)
	}
	w.served(i.Addr().String())

	s.Admin = lbsync.Drain
	a = w.apply(op(lbsync.SetDrain, s))
	w.one(a, s)
	if a.Active != 0 {
		t.Errorf("%d active, want 0", a.Active)
	}
	w.served("")
	s.Admin = lbsync.Ready
	w.one(w.apply(op(lbsync.SetReady, s)), s)
	w.served(i.Addr().String())
	s.Admin = lbsync.Drain
	w.one(w.apply(op(lbsync.SetDrain, s)), s)
	s.Admin, s.Up = lbsync.Maint, false
	w.one(w.apply(op(lbsync.SetMaint, s)), s)
	if admin, weight := w.state("s1"); admin != "5" || weight != "7" {
		t.Errorf("state %s, weight %s in HAProxy, want 5, 7", admin, weight)
	}
	s.Weight = 0
	w.one(w.apply(weigh(s, 0)), s)

	// Several steps at once, as a plan has them, from drain with weight 0 too.
	a = w.apply(op(lbsync.SetReady, s), weigh(s, 100))
	w.one(a, with(s, func(s *lbsync.Server) { s.Admin, s.Up, s.Weight = lbsync.Ready, true, 100 }))
	a = w.apply(op(lbsync.SetDrain, s), weigh(s, 0), op(lbsync.SetMaint, s), op(lbsync.SetMaint, s))
	w.one(a, s)
	w.served("")
}

func with(s lbsync.Server, change func(*lbsync.Server)) lbsync.Server {
	change(&s)
	return s
}

// testSlotChecked brings a slot into service that is taken for down until its
// first check has passed.
func testSlotChecked(t *testing.T, im Implementation) {
	w := start(t, im, haproxytest.Backend{Slots: 1, Check: true}, patient)
	i := haproxytest.NewInstance(t)
	i.SetHealthy(false)
	s := lbsync.Server{Name: "s1", ID: 1, Addr: i.Addr(), Slot: true, Checked: true, Weight: 5}
	got := w.apply(weigh(s, 0), op(lbsync.SetAddr, s), op(lbsync.SetReady, s), op(lbsync.HealthDown, s), weigh(s, 5))
	w.one(got, s)
	w.served("")
	i.SetHealthy(true)
	w.until("the check has passed", s, func(s lbsync.Server) bool { return s.Up && s.Passed })
	w.served(i.Addr().String())

	// A drained server that is down is neither ready nor in maint.
	w.apply(op(lbsync.SetDrain, s))
	i.SetHealthy(false)
	w.until("the check has failed", s, func(s lbsync.Server) bool { return !s.Up && !s.Passed })
	s.Admin = lbsync.Drain
	w.one(w.apply(op(lbsync.SetDrain, s)), s)
}

// until polls a server.
func (w *world) until(what string, s lbsync.Server, ok func(lbsync.Server) bool) {
	w.Helper()
	haproxytest.Poll(w, what, func() error {
		a, err := w.balancer.Peek(w.Context(), backend, []lbsync.Server{s})
		if err != nil {
			return err
		}
		if len(a.Servers) != 1 || !ok(a.Servers[0]) {
			return fmt.Errorf("got %+v", a.Servers)
		}
		return nil
	})
}

// testDynamic takes added servers through their lives.
func testDynamic(t *testing.T, im Implementation) {
	for name, i := range map[string]*haproxytest.Instance{"IPv4": haproxytest.NewInstance(t), "IPv6": haproxytest.NewInstance6(t)} {
		t.Run(name, func(t *testing.T) {
			w := start(t, im, haproxytest.Backend{}, patient)
			if got := w.read(); len(got) != 0 {
				t.Fatalf("got %+v", got)
			}
			s := lbsync.Server{Name: lbsync.DynamicName(i.Addr()), ID: 2147483647, Addr: i.Addr(), Admin: lbsync.Maint}
			w.one(w.apply(op(lbsync.Add, s)), s)
			w.served("")
			s.Admin, s.Up, s.Weight = lbsync.Ready, true, 9
			w.one(w.apply(op(lbsync.SetReady, s), weigh(s, 9)), s)
			w.served(i.Addr().String())

			s.Admin = lbsync.Drain
			w.one(w.apply(op(lbsync.SetDrain, s)), s)
			s.Admin, s.Up, s.Weight = lbsync.Maint, false, 0
			w.one(w.apply(op(lbsync.SetMaint, s), weigh(s, 0)), s)
			haproxytest.Poll(t, "it is deleted", func() error {
				if a := w.try(op(lbsync.SetDrain, s), op(lbsync.SetMaint, s), op(lbsync.Delete, s)); len(a.Servers) > 0 {
					return fmt.Errorf("got %+v, refused %q", a.Servers, a.Refused)
				}
				return nil
			})
			if got := w.read(); len(got) != 0 {
				t.Errorf("got %+v", got)
			}
			// The name and the id may be used again.
			w.one(w.apply(op(lbsync.Add, s)), s)
		})
	}
}

// testDynamicChecked brings an added server into service by way of its check;
// where it cannot have one, it must not be put into service as if it had.
func testDynamicChecked(t *testing.T, im Implementation) {
	options := "check inter 50ms"
	if slices.Contains(im.Cannot, lbsync.EnableHealth) {
		options = ""
	}
	w := startWith(t, im, haproxytest.Backend{Check: true}, patient, options)
	i := haproxytest.NewInstance(t)
	i.SetHealthy(false)
	s := lbsync.Server{Name: lbsync.DynamicName(i.Addr()), ID: 50, Addr: i.Addr()}
	a := w.try(op(lbsync.Add, s), op(lbsync.EnableHealth, s), op(lbsync.SetReady, s), op(lbsync.HealthDown, s), weigh(s, 5))
	w.served("")
	if options == "" {
		s.Admin = lbsync.Maint
		w.one(a, s)
		if len(a.Refused) != 4 {
			t.Errorf("refused %q, want 4", a.Refused)
		}
		return
	}
	s.Checked, s.Weight = true, 5
	w.one(a, s)
	if len(a.Refused) > 0 {
		t.Errorf("refused %q", a.Refused)
	}
	i.SetHealthy(true)
	w.until("the check has passed", s, func(s lbsync.Server) bool { return s.Up && s.Passed })
	w.served(i.Addr().String())
}

// testWeights sets the limits.
func testWeights(t *testing.T, im Implementation) {
	w := start(t, im, haproxytest.Backend{Slots: 1}, patient)
	for _, weight := range []int{0, 1, 256, 0} {
		s := lbsync.Server{Name: "s1", ID: 1}
		if a := w.apply(weigh(s, weight)); a.Servers[0].Weight != weight {
			t.Errorf("got %d, want %d", a.Servers[0].Weight, weight)
		}
		if _, got := w.state("s1"); got != fmt.Sprint(weight) {
			t.Errorf("HAProxy has %s, want %d", got, weight)
		}
	}
}

// testStatic has a backend that takes no weight but none and the configured
// one.
func testStatic(t *testing.T, im Implementation) {
	w := start(t, im, haproxytest.Backend{Slots: 1, Balance: "source", Extra: []string{"default-server weight 30"}}, patient)
	s := lbsync.Server{Name: "s1", ID: 1}
	a := w.try(weigh(s, 77))
	if !a.Static || len(a.Refused) != 1 || a.Servers[0].Weight != 30 {
		t.Errorf("got %+v", a)
	}
	for _, tt := range []struct{ percent, want int }{{0, 0}, {100, 30}, {0, 0}, {100, 30}} {
		o := weigh(s, tt.percent)
		o.Percent = true
		if a := w.apply(o); a.Servers[0].Weight != tt.want || a.Static {
			t.Errorf("%d %%: got %+v, want %d", tt.percent, a, tt.want)
		}
	}
}

// hold has one request in flight at a slot of the Instance and returns how to
// wait for its end, and the status it ended with, 0 if there was none.
func (w *world) hold(i *haproxytest.Instance) (status func() int) {
	w.Helper()
	got := make(chan int, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		// A session that is shut down ends without an answer from HAProxy 3.2 on.
		client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patient}
		resp, err := client.Get("http://" + w.haproxy.Addr(backend) + "/hold")
		if err != nil {
			got <- 0
			return
		}
		_ = resp.Body.Close() // the status is all that is asked
		got <- resp.StatusCode
	})
	w.Cleanup(wg.Wait)
	w.Cleanup(i.Release)
	haproxytest.Poll(w, "the request is in flight", func() error {
		if i.Held() == 0 {
			return errors.New("it is not")
		}
		return nil
	})
	return func() int { return <-got }
}

// testBusy sees the connection of a drained server until it has ended.
func testBusy(t *testing.T, im Implementation) {
	w := start(t, im, haproxytest.Backend{Slots: 1}, patient)
	i := haproxytest.NewInstance(t)
	s := lbsync.Server{Name: "s1", ID: 1, Addr: i.Addr(), Slot: true}
	w.apply(op(lbsync.SetAddr, s), op(lbsync.SetReady, s), weigh(s, 1))
	status := w.hold(i)
	w.apply(op(lbsync.SetDrain, s))
	w.until("it is busy", s, func(s lbsync.Server) bool { return s.Busy == 1 && s.Admin == lbsync.Drain })
	i.Release()
	if got := status(); got != http.StatusOK {
		t.Errorf("status %d", got)
	}
	w.until("it is idle", s, func(s lbsync.Server) bool { return s.Busy == 0 })
}

// testShutdown cuts a request, or is refused and lets it be.
func testShutdown(t *testing.T, im Implementation) {
	w := start(t, im, haproxytest.Backend{Slots: 1}, patient)
	i := haproxytest.NewInstance(t)
	s := lbsync.Server{Name: "s1", ID: 1, Addr: i.Addr(), Slot: true}
	w.apply(op(lbsync.SetAddr, s), op(lbsync.SetReady, s), weigh(s, 1))
	status := w.hold(i)
	w.apply(op(lbsync.SetDrain, s))
	a := w.try(op(lbsync.Shutdown, s), op(lbsync.SetMaint, s), weigh(s, 0))
	if len(a.Servers) != 1 || a.Servers[0].Admin != lbsync.Maint || a.Servers[0].Weight != 0 {
		t.Errorf("got %+v", a)
	}
	if w.can(lbsync.Shutdown) {
		if got := status(); got == http.StatusOK || len(a.Refused) > 0 {
			t.Errorf("status %d, refused %q", got, a.Refused)
		}
		return
	}
	if len(a.Refused) != 1 {
		t.Errorf("refused %q", a.Refused)
	}
	i.Release()
	if got := status(); got != http.StatusOK {
		t.Errorf("status %d", got)
	}
}

// testCannot has what is not possible refused, in words, and nothing changed.
func testCannot(t *testing.T, im Implementation) {
	w := start(t, im, haproxytest.Backend{Slots: 1}, patient)
	for _, k := range im.Cannot {
		before := w.haproxy.Command(t, "show servers state "+backend)
		a := w.try(lbsync.Op{Kind: k, Name: "s1", ID: 1})
		if len(a.Refused) != 1 || !strings.Contains(a.Refused[0], "cannot") || len(a.Servers) != 1 {
			t.Errorf("kind %d: got %+v", k, a)
		}
		if after := w.haproxy.Command(t, "show servers state "+backend); withoutAge(after) != withoutAge(before) {
			t.Errorf("kind %d: before %s\nafter %s", k, before, after)
		}
	}
}

// withoutAge takes the time since the last change out of a state.
func withoutAge(state string) string {
	var b strings.Builder
	for line := range strings.Lines(state) {
		if col := strings.Fields(line); len(col) > 9 {
			fmt.Fprintln(&b, slices.Delete(col, 9, 10))
		}
	}
	return b.String()
}

func testNoBackend(t *testing.T, im Implementation) {
	w := start(t, im, haproxytest.Backend{Slots: 1}, patient)
	s := lbsync.Server{Name: "s1", ID: 1}
	for name, call := range map[string]func() error{
		"Read":  func() error { _, err := w.balancer.Read(t.Context(), "nope"); return err },
		"Peek":  func() error { _, err := w.balancer.Peek(t.Context(), "nope", []lbsync.Server{s}); return err },
		"Apply": func() error { _, err := w.balancer.Apply(t.Context(), "nope", []lbsync.Op{weigh(s, 3)}); return err },
	} {
		if err := call(); !errors.Is(err, lbsync.ErrNoBackend) {
			t.Errorf("%s: got %v, want %v", name, err, lbsync.ErrNoBackend)
		}
	}
}

// testRefused has HAProxy refuse, and the later ops carried out.
func testRefused(t *testing.T, im Implementation) {
	w := start(t, im, haproxytest.Backend{Slots: 2}, patient)
	added := lbsync.Server{Name: "rc_a", ID: 50, Addr: netip.MustParseAddrPort("127.0.0.1:81")}
	w.apply(op(lbsync.Add, added), op(lbsync.SetReady, added))
	missing := lbsync.Server{Name: "rc_b", ID: 51}
	for _, tt := range []struct {
		name string
		op   lbsync.Op
		want string
	}{
		{"a name twice", op(lbsync.Add, with(added, func(s *lbsync.Server) { s.ID = 52 })), "Already exists"},
		{"an id twice", op(lbsync.Add, with(added, func(s *lbsync.Server) { s.Name = "rc_c" })), "already used"},
		{"no such server", op(lbsync.SetReady, missing), ""},
		{"no such server to delete", op(lbsync.Delete, missing), ""},
		{"a server in service to delete", op(lbsync.Delete, added), "maint"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := &world{t, im, w.haproxy, w.balancer}
			last := w.read()["s2"].Weight + 1
			a := w.try(tt.op, lbsync.Op{Kind: lbsync.SetWeight, Name: "s2", ID: 2, Weight: last})
			if len(a.Refused) != 1 || a.Refused[0] == "" || !strings.Contains(a.Refused[0], tt.want) {
				t.Errorf("refused %q, want %q in it", a.Refused, tt.want)
			}
			if n := len(a.Servers); n == 0 || a.Servers[n-1].Weight != last {
				t.Errorf("the op after it was not carried out: %+v", a)
			}
			got := w.read()
			if len(got) != 3 || got["rc_a"].Admin != lbsync.Ready || got["s1"].Admin != lbsync.Maint {
				t.Errorf("got %+v", got)
			}
		})
	}
}

// testInvalid has ops that must not reach HAProxy, nor the valid ones with them.
func testInvalid(t *testing.T, im Implementation) {
	w := start(t, im, haproxytest.Backend{Slots: 1}, patient)
	good := lbsync.Op{Kind: lbsync.SetWeight, Name: "s1", ID: 1, Weight: 99}
	at := func(addr string) lbsync.Op {
		return lbsync.Op{Kind: lbsync.SetAddr, Name: "s1", ID: 1, Addr: netip.MustParseAddrPort(addr)}
	}
	for name, bad := range map[string]lbsync.Op{
		"semicolon":   {Kind: lbsync.SetReady, Name: "s1;show info", ID: 1},
		"slash":       {Kind: lbsync.SetReady, Name: "../s1", ID: 1},
		"space":       {Kind: lbsync.SetReady, Name: "s1 x", ID: 1},
		"no name":     {Kind: lbsync.SetReady, ID: 1},
		"long name":   {Kind: lbsync.SetReady, Name: strings.Repeat("a", 65), ID: 1},
		"no id":       {Kind: lbsync.SetReady, Name: "s1"},
		"weight":      {Kind: lbsync.SetWeight, Name: "s1", ID: 1, Weight: 257},
		"kind":        {Kind: -1, Name: "s1", ID: 1},
		"no address":  {Kind: lbsync.Add, Name: "rc_a", ID: 2},
		"no port":     at("127.0.0.1:0"),
		"zone":        at("[fe80::1%eth0]:80"),
		"multicast":   at("224.0.0.1:80"),
		"mapped":      at("[::ffff:127.0.0.1]:80"),
		"unspecified": at("0.0.0.0:80"),
		"broadcast":   at("255.255.255.255:80"),
	} {
		a, err := w.balancer.Apply(t.Context(), backend, []lbsync.Op{good, bad})
		if err == nil || errors.Is(err, lbsync.ErrUnknown) || a.Process.PID != 0 {
			t.Errorf("%s: got %+v, %v", name, a, err)
		}
	}
	if _, err := w.balancer.Read(t.Context(), "be;show info"); err == nil || errors.Is(err, lbsync.ErrUnknown) {
		t.Errorf("backend: got %v", err)
	}
	if _, weight := w.state("s1"); weight != "1" {
		t.Errorf("weight %s: something was sent", weight)
	}
}

// testForeign has servers of others in the backend, which are read and counted
// and not ours.
func testForeign(t *testing.T, im Implementation) {
	i := haproxytest.NewInstance(t)
	w := start(t, im, haproxytest.Backend{Slots: 1, Extra: []string{
		"server theirs " + i.Addr().String() + " id 40",
		"server tracked 127.0.0.1:82 id 41 track theirs2",
		"server theirs2 127.0.0.1:83 id 42 check",
		"server off 127.0.0.1:84 id 43 disabled",
	}}, patient)
	got := w.read()
	theirs, off := got["theirs"], got["off"]
	if len(got) != 5 || theirs.Ours() || !theirs.Serving() || theirs.Addr != i.Addr() || theirs.ID != 40 || off.Admin != lbsync.Maint || !got["s1"].Ours() {
		t.Errorf("got %+v", got)
	}
	for admin, word := range map[lbsync.Admin]string{lbsync.Drain: "drain", lbsync.Maint: "maint", lbsync.Ready: "ready"} {
		w.haproxy.Command(t, "set server be/theirs2 state "+word)
		if got := w.read(); got["tracked"].Admin != admin || got["theirs2"].Admin != admin {
			t.Errorf("%s: got %+v", word, got)
		}
	}
}

// testHung has HAProxy stopped: every call ends with lbsync.ErrUnknown, soon.
func testHung(t *testing.T, im Implementation) {
	const timeout = 200 * time.Millisecond
	w := start(t, im, haproxytest.Backend{Slots: 1}, timeout)
	s := lbsync.Server{Name: "s1", ID: 1}
	haproxytest.Poll(t, "it answers in time", func() error {
		_, err := w.balancer.Apply(t.Context(), backend, []lbsync.Op{weigh(s, 3)})
		return err
	})
	w.haproxy.Stop(t)
	for name, call := range w.calls() {
		began := time.Now()
		if err := call(t.Context()); !errors.Is(err, lbsync.ErrUnknown) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: got %v", name, err)
		}
		if took := time.Since(began); took > 5*timeout+time.Second {
			t.Errorf("%s took %s", name, took)
		}
	}
	w.haproxy.Cont(t)
	haproxytest.Poll(t, "it answers again", func() error { _, err := w.balancer.Probe(t.Context()); return err })
	haproxytest.Poll(t, "it is changed again", func() error {
		a, err := w.balancer.Apply(t.Context(), backend, []lbsync.Op{weigh(s, 9)})
		if err == nil && (len(a.Servers) != 1 || a.Servers[0].Weight != 9) {
			err = fmt.Errorf("got %+v", a)
		}
		return err
	})
}

// calls are one call of each method. A call that returns an error must return
// nothing else.
func (w *world) calls() map[string]func(context.Context) error {
	s := lbsync.Server{Name: "s1", ID: 1}
	only := func(err error, n int, p lbsync.Process) error {
		if err != nil && (n > 0 || p.PID != 0) {
			w.Errorf("%d servers and pid %d beside %v", n, p.PID, err)
		}
		return err
	}
	return map[string]func(context.Context) error{
		"Probe": func(ctx context.Context) error { p, err := w.balancer.Probe(ctx); return only(err, 0, p) },
		"Read": func(ctx context.Context) error {
			st, err := w.balancer.Read(ctx, backend)
			return only(err, len(st.Servers), st.Process)
		},
		"Peek": func(ctx context.Context) error {
			a, err := w.balancer.Peek(ctx, backend, []lbsync.Server{s})
			return only(err, len(a.Servers), a.Process)
		},
		"Apply": func(ctx context.Context) error {
			a, err := w.balancer.Apply(ctx, backend, []lbsync.Op{weigh(s, 5)})
			return only(err, len(a.Servers), a.Process)
		},
	}
}

// testKilled has HAProxy gone, and back.
func testKilled(t *testing.T, im Implementation) {
	w := start(t, im, haproxytest.Backend{Slots: 1}, patient)
	before, err := w.balancer.Probe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	w.haproxy.Kill(t)
	for name, call := range w.calls() {
		if err := call(t.Context()); !errors.Is(err, lbsync.ErrUnknown) {
			t.Errorf("%s: got %v, want %v", name, err, lbsync.ErrUnknown)
		}
	}
	w.haproxy.Restart(t)
	after, err := w.balancer.Probe(t.Context())
	if err != nil || after.Same(before) {
		t.Errorf("before %+v, after %+v, %v", before, after, err)
	}
}

// testContext has every call end with its context, and send nothing after it.
func testContext(t *testing.T, im Implementation) {
	w := start(t, im, haproxytest.Backend{Slots: 1}, patient)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for name, call := range w.calls() {
		if err := call(ctx); !errors.Is(err, lbsync.ErrUnknown) || !errors.Is(err, context.Canceled) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if _, weight := w.state("s1"); weight != "1" {
		t.Errorf("weight %s: something was sent", weight)
	}
}

// testReload has HAProxy replaced, between exchanges and during them.
func testReload(t *testing.T, im Implementation) {
	w := start(t, im, haproxytest.Backend{Slots: 1}, patient)
	i := haproxytest.NewInstance(t)
	s := lbsync.Server{Name: lbsync.DynamicName(i.Addr()), ID: 50, Addr: i.Addr()}
	before := w.apply(op(lbsync.Add, s)).Process
	w.haproxy.Reload(t)
	if got := w.read(); len(got) != 1 {
		t.Errorf("dynamic servers outlived the reload: %+v", got)
	}
	a := w.apply(op(lbsync.Add, s))
	if a.Process.Same(before) {
		t.Errorf("before %+v, after %+v", before, a.Process)
	}

	ctx, cancel := context.WithCancel(t.Context())
	processes := map[int]bool{w.haproxy.PID(): true}
	seen := map[int]bool{}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		for weight := 0; ctx.Err() == nil; weight++ {
			a, err := w.balancer.Apply(ctx, backend, []lbsync.Op{{Kind: lbsync.SetWeight, Name: "s1", ID: 1, Weight: weight % 256}})
			switch {
			case errors.Is(err, lbsync.ErrUnknown), errors.Is(err, lbsync.ErrReplaced):
			case err != nil:
				t.Errorf("got %v", err)
			case len(a.Refused) > 0 || len(a.Servers) != 1 || a.Servers[0].Weight != weight%256:
				t.Errorf("got %+v", a)
			default:
				seen[a.Process.PID] = true
			}
		}
	})
	for range 3 {
		w.haproxy.Reload(t)
		processes[w.haproxy.PID()] = true
		haproxytest.Poll(t, "the new process is read", func() error {
			st, err := w.balancer.Read(t.Context(), backend)
			if err == nil && st.Process.PID != w.haproxy.PID() {
				err = fmt.Errorf("read from pid %d, haproxy is %d", st.Process.PID, w.haproxy.PID())
			}
			return err
		})
	}
	cancel()
	wg.Wait()
	for pid := range seen {
		if !processes[pid] {
			t.Errorf("applied to pid %d, which is none of %v", pid, processes)
		}
	}
}

// testPlan has lbsync's own plans carried out to their end, which is an empty
// plan: there and away, in slots and in added servers.
func testPlan(t *testing.T, im Implementation) {
	for name, be := range map[string]haproxytest.Backend{"slots": {Slots: 2}, "checked": {Slots: 2, Check: true}, "dynamic": {}} {
		t.Run(name, func(t *testing.T) {
			w := start(t, im, be, patient)
			i := haproxytest.NewInstance(t)
			want := lbsync.Want{Addr: i.Addr(), Goal: lbsync.Serve, State: lbsync.Ready, Weight: 100}
			converge := func(done func(lbsync.Server, bool) bool) {
				t.Helper()
				haproxytest.Poll(t, "the plan is empty", func() error {
					st, err := w.balancer.Read(t.Context(), backend)
					if err != nil {
						t.Fatal(err)
					}
					inv := lbsync.NewInventory(st, lbsync.Known{})
					inv.Dynamic = be.Slots == 0
					s, there := inv.Lookup(want.Addr)
					ops, unplaced := lbsync.Plan([]lbsync.Want{want}, inv, time.Now(), 0)
					if len(ops)+len(unplaced) == 0 && done(s, there) {
						return nil
					}
					a := w.try(ops...)
					return fmt.Errorf("%+v: had %+v, got %+v", ops, s, a)
				})
			}
			converge(func(s lbsync.Server, _ bool) bool { return s.Serving() && s.Weight == 100 })
			w.served(i.Addr().String())
			want.State = lbsync.Drain
			converge(func(s lbsync.Server, _ bool) bool { return s.Admin == lbsync.Drain })
			gone := func(_ lbsync.Server, there bool) bool { return !there }
			want = lbsync.Want{Addr: i.Addr(), Goal: lbsync.Leave, Now: true, Settled: true}
			converge(gone)
			w.served("")
			want = lbsync.Want{Addr: i.Addr(), Goal: lbsync.Serve, State: lbsync.Ready, Weight: 5}
			converge(func(s lbsync.Server, _ bool) bool { return s.Serving() && s.Weight == 5 })
			want = lbsync.Want{Addr: i.Addr(), Goal: lbsync.Leave, Overdue: true, Settled: true}
			converge(gone)
			w.served("")
		})
	}
}

// testConcurrent has many callers at once, each of whom gets its own answer.
func testConcurrent(t *testing.T, im Implementation) {
	w := start(t, im, haproxytest.Backend{Slots: 4}, patient)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for weight := range 10 {
				o := lbsync.Op{Kind: lbsync.SetWeight, Name: fmt.Sprintf("s%d", i+1), ID: i + 1, Weight: weight}
				a, err := w.balancer.Apply(t.Context(), backend, []lbsync.Op{o})
				if err != nil || len(a.Servers) != 1 || a.Servers[0].Name != o.Name || a.Servers[0].Weight != weight {
					t.Errorf("got %+v, %v", a, err)
				}
				if st, err := w.balancer.Read(t.Context(), backend); err != nil || len(st.Servers) != 4 {
					t.Errorf("got %+v, %v", st, err)
				}
			}
		})
	}
	wg.Wait()
}

// While a long Apply is under way, others have their turn: a probe, or another
// backend's change, must not wait until it is done.
func testTurns(t *testing.T, im Implementation) {
	w := start(t, im, haproxytest.Backend{Slots: 1}, patient)
	const n = 1000
	ops := make([]lbsync.Op, n)
	for i := range ops {
		ops[i] = lbsync.Op{Kind: lbsync.SetWeight, Name: "s1", ID: 1, Weight: i % 257}
	}
	type result struct {
		lbsync.Applied
		err error
	}
	turns := func() (probes int) {
		done := make(chan result, 1)
		go func() {
			a, err := w.balancer.Apply(t.Context(), backend, ops)
			done <- result{a, err}
		}()
		for ; ; probes++ {
			select {
			case r := <-done:
				if r.err != nil || len(r.Servers) != 1 || r.Servers[0].Weight != (n-1)%257 {
					t.Errorf("got %+v, %v", r.Applied, r.err)
				}
				return probes
			default:
			}
			if _, err := w.balancer.Probe(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	// One may have come before it, and one may end after it. On a busy machine this
	// may stand still for a whole Apply.
	probes := 0
	for try := 0; try < 5 && probes < 4; try++ {
		probes = turns()
	}
	if probes < 4 {
		t.Errorf("%d probes had their turn", probes)
	}
}
