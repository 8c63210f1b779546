package haproxy

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"rollcall/lbsync"
	"rollcall/lbsync/haproxy/haproxytest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newClient returns a Client that is closed with the test. Tests that do not
// measure the Timeout get a generous one.
func newClient(tb testing.TB, cfg Config) *Client {
	tb.Helper()
	c, _ := loggedClient(tb, cfg)
	return c
}

// loggedClient is newClient, and what the Client logs: each exchange.
func loggedClient(tb testing.TB, cfg Config) (*Client, *bytes.Buffer) {
	tb.Helper()
	if cfg.Timeout == 0 {
		cfg.Timeout = 5 * time.Second
	}
	var log bytes.Buffer
	c, err := New(cfg, zerolog.New(&log))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := c.Close(ctx); err != nil {
			tb.Error(err)
		}
	})
	return c, &log
}

// start returns a haproxy with the backend be and a Client for it.
func start(tb testing.TB, be haproxytest.Backend, cfg Config) (*haproxytest.HAProxy, *Client) {
	tb.Helper()
	be.Name = "be"
	h := haproxytest.Start(tb, haproxytest.Options{Backends: []haproxytest.Backend{be}})
	cfg.Socket = h.Socket
	return h, newClient(tb, cfg)
}

// apply applies ops to be and fails the test if one was refused.
func apply(tb testing.TB, c *Client, ops ...lbsync.Op) lbsync.Applied {
	tb.Helper()
	a, err := c.Apply(tb.Context(), "be", ops)
	if err != nil {
		tb.Fatal(err)
	}
	if len(a.Refused) > 0 {
		tb.Fatalf("refused: %q", a.Refused)
	}
	return a
}

// bare is s without what only a whole look tells of the configuration.
func bare(s lbsync.Server) lbsync.Server {
	s.Configured, s.Agent, s.Untouched, s.Resolver = 0, false, false, false
	return s
}

func bares(servers []lbsync.Server) []lbsync.Server {
	out := make([]lbsync.Server, len(servers))
	for i, s := range servers {
		out[i] = bare(s)
	}
	return out
}

// inspected has c know already what it would ask for after a reading.
func inspected(tb testing.TB, c *Client, reading string) {
	tb.Helper()
	r, err := parseReply(reading, nil)
	if err != nil {
		tb.Fatal(err)
	}
	in := inspection{process: r.process, names: map[string]bool{}}
	servers, err := r.servers("be")
	if err != nil {
		tb.Fatal(err)
	}
	for _, s := range servers {
		in.names[s.Name] = true
	}
	c.inspected["be"] = in
}

func read(tb testing.TB, c *Client) map[string]lbsync.Server {
	tb.Helper()
	state, err := c.Read(tb.Context(), "be")
	if err != nil {
		tb.Fatal(err)
	}
	servers := make(map[string]lbsync.Server, len(state.Servers))
	for _, s := range state.Servers {
		servers[s.Name] = s
	}
	return servers
}

// answered is an answer that begins with a report, without it if the line does not
// ask for one there.
func answered(line, answer string) string {
	if _, body, ok := strings.Cut(strings.TrimPrefix(answer, "\n"), "\n\n"); ok && !strings.Contains(line, ";show info;") {
		return body
	}
	return answer
}

// fakeSocket answers each connection with the next of answers, after it has
// read a line, without the report at the beginning if that is not asked for; when they are used up it holds the connection until the test
// ends. It returns the path and the lines it has read.
func fakeSocket(tb testing.TB, answers ...string) (path string, got func() []string) {
	tb.Helper()
	dir, err := os.MkdirTemp("", "rc")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = os.RemoveAll(dir) })
	path = filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		tb.Fatal(err)
	}
	var mu sync.Mutex // guards lines and held
	var lines []string
	var held []net.Conn
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			line, err := bufio.NewReader(conn).ReadString('\n')
			if err != nil { // it only asks for the listener's address
				_ = conn.Close()
				continue
			}
			mu.Lock()
			n := len(lines)
			lines = append(lines, line)
			if n >= len(answers) {
				held = append(held, conn)
			}
			mu.Unlock()
			if n < len(answers) {
				_, _ = io.WriteString(conn, answered(line, answers[n]))
				_ = conn.Close()
			}
		}
	})
	tb.Cleanup(func() {
		_ = l.Close()
		wg.Wait()
		for _, conn := range held {
			_ = conn.Close()
		}
	})
	return path, func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(lines)
	}
}

func TestDynamicServer(t *testing.T) {
	h, c := start(t, haproxytest.Backend{}, Config{})
	a, b := haproxytest.NewInstance(t), haproxytest.NewInstance6(t)
	opA := func(kind lbsync.Kind) lbsync.Op {
		return lbsync.Op{Kind: kind, Name: "rc_a", ID: 1000, Addr: a.Addr(), Weight: 256}
	}
	opB := func(kind lbsync.Kind) lbsync.Op {
		return lbsync.Op{Kind: kind, Name: "rc_b", ID: 2000, Addr: b.Addr(), Weight: 256}
	}

	got := apply(t, c, opA(lbsync.Add), opB(lbsync.Add))
	want := []lbsync.Server{
		{Name: "rc_a", ID: 1000, Addr: a.Addr(), Admin: lbsync.Maint},
		{Name: "rc_b", ID: 2000, Addr: b.Addr(), Admin: lbsync.Maint},
	}
	if !slices.Equal(got.Servers, want) {
		t.Fatalf("added %+v\nwant  %+v", got.Servers, want)
	}
	if got.Process.PID != h.PID() || got.Process.Started == 0 || got.Process.Version == "" {
		t.Errorf("process %+v, want pid %d", got.Process, h.PID())
	}

	got = apply(t, c, opA(lbsync.SetWeight), opB(lbsync.SetWeight), opA(lbsync.SetReady), opB(lbsync.SetReady))
	for i := range want {
		want[i].Admin, want[i].Up, want[i].Weight = lbsync.Ready, true, 256
	}
	if !slices.Equal(got.Servers, want) {
		t.Fatalf("ready %+v\nwant  %+v", got.Servers, want)
	}
	haproxytest.Poll(t, "both instances served", func() error {
		if _, err := get(h, "/"); err != nil {
			return err
		}
		if a.Served() == 0 || b.Served() == 0 {
			return fmt.Errorf("served %d and %d", a.Served(), b.Served())
		}
		return nil
	})

	got = apply(t, c, opA(lbsync.SetDrain))
	want[0].Admin = lbsync.Drain
	if !slices.Equal(got.Servers, want[:1]) {
		t.Fatalf("drained %+v\nwant    %+v", got.Servers, want[:1])
	}
	// Idle connections can keep the server for a moment: HAProxy's, not ours.
	haproxytest.Poll(t, "rc_a is deleted", func() error {
		got, err := c.Apply(t.Context(), "be", []lbsync.Op{
			opA(lbsync.SetDrain), opA(lbsync.SetMaint), opA(lbsync.Delete), opB(lbsync.SetDrain), opB(lbsync.Shutdown),
		})
		if err != nil {
			t.Fatal(err)
		}
		if len(got.Refused) > 0 {
			return errors.New(got.Refused[0])
		}
		want[1].Admin = lbsync.Drain
		if !slices.Equal(got.Servers, want[1:]) {
			t.Fatalf("left %+v\nwant %+v", got.Servers, want[1:])
		}
		return nil
	})
	if servers := read(t, c); len(servers) != 1 {
		t.Errorf("left %+v", servers)
	}
}

func TestSlot(t *testing.T) {
	h, c := start(t, haproxytest.Backend{Slots: 2, Check: true}, Config{})
	if _, err := c.Probe(t.Context()); err != nil { // an address may come late
		t.Fatal(err)
	}
	inst := haproxytest.NewInstance(t)
	op := func(kind lbsync.Kind) lbsync.Op {
		return lbsync.Op{Kind: kind, Name: "s2", ID: 2, Addr: inst.Addr(), Weight: 5}
	}

	got := apply(t, c, op(lbsync.SetAddr))
	want := lbsync.Server{Name: "s2", ID: 2, Addr: inst.Addr(), Slot: true, Admin: lbsync.Maint, Checked: true, Weight: 1}
	if !slices.Equal(got.Servers, []lbsync.Server{want}) {
		t.Fatalf("got  %+v\nwant %+v", got.Servers, want)
	}
	// In this order no request comes before the first check has passed.
	inst.SetHealthy(false)
	got = apply(t, c, op(lbsync.SetWeight), op(lbsync.EnableHealth), op(lbsync.SetDrain), op(lbsync.HealthDown), op(lbsync.SetReady))
	want.Admin, want.Weight = lbsync.Ready, 5
	if s := got.Servers[0]; s.Up || s.Admin != lbsync.Ready || s.Passed || s.Weight != 5 {
		t.Fatalf("got  %+v\nwant %+v", got.Servers, want)
	}
	inst.SetHealthy(true)
	want.Up, want.Passed = true, true
	haproxytest.Poll(t, "the check passes", func() error {
		got, err := c.Peek(t.Context(), "be", []lbsync.Server{want})
		if err == nil && !slices.Equal(got.Servers, []lbsync.Server{want}) {
			err = fmt.Errorf("got %+v, want %+v", got.Servers, want)
		}
		return err
	})
	if from, err := get(h, "/"); err != nil || from != inst.Addr().String() {
		t.Errorf("got %q, %v", from, err)
	}
	if s := read(t, c)["s1"]; !s.Slot || s.Admin != lbsync.Maint || s.Addr != addrPort("127.0.0.1:1") {
		t.Errorf("s1 is %+v", s)
	}
}

// get asks the frontend of be on a connection of its own.
func get(h *haproxytest.HAProxy, path string) (string, error) {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 20 * time.Second}
	resp, err := client.Get("http://" + h.Addr("be") + path)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	if resp.StatusCode != http.StatusOK {
		err = errors.Join(err, errors.New(resp.Status))
	}
	return resp.Header.Get("X-Instance"), err
}

func TestBusy(t *testing.T) {
	h, c := start(t, haproxytest.Backend{Slots: 20, Check: true}, Config{})
	inst := haproxytest.NewInstance(t)
	op := func(kind lbsync.Kind) lbsync.Op {
		return lbsync.Op{Kind: kind, Name: "s1", ID: 1, Addr: inst.Addr(), Weight: 5}
	}
	apply(t, c, op(lbsync.SetAddr), op(lbsync.SetReady))

	var wg sync.WaitGroup
	defer wg.Wait()
	defer inst.Release()
	for range 3 {
		wg.Go(func() {
			if _, err := get(h, "/hold"); err != nil {
				t.Error(err)
			}
		})
	}
	haproxytest.Poll(t, "3 requests are in flight", func() error {
		if n := inst.Held(); n != 3 {
			return fmt.Errorf("%d are", n)
		}
		return nil
	})
	// Up, draining, down and in drain, in maint; alone and among too many.
	inst.SetHealthy(false)
	all := make([]lbsync.Server, 0, 20)
	for _, s := range read(t, c) {
		all = append(all, s)
	}
	for _, kind := range []lbsync.Kind{lbsync.SetWeight, lbsync.SetDrain, lbsync.HealthDown, lbsync.SetMaint} {
		got := apply(t, c, op(kind))
		if len(got.Servers) != 1 || got.Servers[0].Busy != 3 {
			t.Errorf("after op %d: %+v, want Busy 3", kind, got.Servers)
		}
		got, err := c.Peek(t.Context(), "be", all)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range got.Servers {
			if want := map[bool]int{true: 3}[s.Name == "s1"]; s.Busy != want {
				t.Errorf("after op %d: %+v, want Busy %d", kind, s, want)
			}
		}
		if len(got.Servers) != 20 {
			t.Errorf("%d servers", len(got.Servers))
		}
	}
	inst.Release()
	haproxytest.Poll(t, "nothing is in flight", func() error {
		got, err := c.Peek(t.Context(), "be", []lbsync.Server{{Name: "s1", ID: 1}})
		if err == nil && got.Servers[0].Busy != 0 {
			err = fmt.Errorf("%+v", got.Servers)
		}
		return err
	})
}

// TestPeekAgreesWithRead is the contract: whichever report an answer comes
// from, it is the same, Busy aside. Read is checked against what was set.
func TestPeekAgreesWithRead(t *testing.T) {
	up4, up6 := haproxytest.NewInstance(t), haproxytest.NewInstance6(t)
	down4, down6 := haproxytest.NewInstance(t), haproxytest.NewInstance6(t)
	down4.SetHealthy(false)
	down6.SetHealthy(false)
	_, c := start(t, haproxytest.Backend{Slots: 12, Check: true, Extra: []string{
		"server fixed " + up4.Addr().String(), // somebody else's
		"server named foo.invalid:80 init-addr none",
	}}, Config{ServerOptions: "check inter 50ms rise 1 fall 1"})
	unchecked := newClient(t, Config{Socket: c.cfg.Socket})

	want := map[string]lbsync.Server{}
	id := 100
	for _, kind := range []string{"slot", "checked", "rested", "unchecked"} {
		slot := 0
		for _, inst := range []*haproxytest.Instance{up4, up6, down4, down6} {
			for _, admin := range []lbsync.Admin{lbsync.Ready, lbsync.Drain, lbsync.Maint} {
				id++
				slot++
				healthy := inst == up4 || inst == up6
				s := lbsync.Server{
					Name: fmt.Sprintf("rc_%s_%d", kind, slot), ID: id, Addr: inst.Addr(), Admin: admin, Weight: id % 100, Busy: -1,
				}
				if kind == "slot" {
					s.Name, s.ID, s.Slot = fmt.Sprintf("s%d", slot), slot, true
				}
				s.Checked = kind != "unchecked"
				s.Up = admin != lbsync.Maint && (healthy || !s.Checked)
				// A new server is checked in maint until it has once been ready.
				s.Passed = healthy && s.Checked && (admin != lbsync.Maint || kind == "checked")
				want[s.Name] = s

				op := lbsync.Op{Name: s.Name, ID: s.ID, Addr: s.Addr, Weight: s.Weight}
				var ops []lbsync.Op
				do := func(k lbsync.Kind) { op.Kind = k; ops = append(ops, op) }
				by := c
				switch kind {
				case "slot":
					do(lbsync.SetAddr)
				case "checked":
					do(lbsync.Add)
					do(lbsync.EnableHealth)
				case "rested":
					do(lbsync.Add)
					do(lbsync.EnableHealth)
					do(lbsync.SetReady)
				case "unchecked":
					by = unchecked
					do(lbsync.Add)
				}
				do(lbsync.SetWeight)
				do(map[lbsync.Admin]lbsync.Kind{lbsync.Ready: lbsync.SetReady, lbsync.Drain: lbsync.SetDrain, lbsync.Maint: lbsync.SetMaint}[admin])
				apply(t, by, ops...)
			}
		}
	}
	want["fixed"] = lbsync.Server{Name: "fixed", ID: 1, Addr: up4.Addr(), Up: true, Weight: 1, Busy: -1}
	want["named"] = lbsync.Server{Name: "named", ID: 2, Admin: lbsync.Maint, Weight: 1, Busy: -1}
	for slot := range 12 { // their ids follow those of the two
		s := want[fmt.Sprintf("s%d", slot+1)]
		s.ID += 2
		want[s.Name] = s
	}
	if len(want) != 50 {
		t.Fatal(len(want))
	}

	var state lbsync.State
	haproxytest.Poll(t, "all checks have told", func() error {
		var err error
		if state, err = c.Read(t.Context(), "be"); err != nil {
			return err
		}
		var errs []error
		for _, s := range state.Servers {
			if bare(s) != want[s.Name] {
				errs = append(errs, fmt.Errorf("read %+v\nwant %+v", s, want[s.Name]))
			}
		}
		if len(state.Servers) != len(want) {
			errs = append(errs, fmt.Errorf("%d servers, want %d", len(state.Servers), len(want)))
		}
		return errors.Join(errs...)
	})

	peek := func(servers ...lbsync.Server) {
		t.Helper()
		got, err := c.Peek(t.Context(), "be", servers)
		if err != nil {
			t.Fatal(err)
		}
		if got.Process != state.Process {
			t.Errorf("process %+v, want %+v", got.Process, state.Process)
		}
		for i := range got.Servers {
			if got.Servers[i].Busy != 0 {
				t.Errorf("Busy is %d in %+v", got.Servers[i].Busy, got.Servers[i])
			}
			got.Servers[i].Busy = -1
		}
		if !slices.Equal(bares(got.Servers), bares(servers)) {
			t.Errorf("peeked %+v\nread   %+v", got.Servers, servers)
		}
	}
	for _, s := range state.Servers {
		peek(s)
	}
	peek(state.Servers[:maxPeek]...)
	peek(state.Servers[:maxPeek+1]...)
	peek(state.Servers...)
	peek()

	// What is not there, or goes by another name or id, is not in the answer.
	for _, s := range []lbsync.Server{{Name: "rc_none", ID: 9999}, {Name: "rc_none", ID: 1}, {Name: "s1", ID: 1}} {
		if got, err := c.Peek(t.Context(), "be", []lbsync.Server{s}); err != nil || len(got.Servers) != 0 {
			t.Errorf("%+v: got %+v, %v", s, got, err)
		}
	}
}

// TestPeekIsSingle makes sure that the contract test compares two reports: in
// the common case a whole reading does not take part in Peek.
func TestPeekIsSingle(t *testing.T) {
	stat := func(id int) string {
		text := recorded(t, "apply.reply")
		block := text[strings.Index(text, statHeader):]
		block = block[:strings.Index(block, "\n\n")]
		return strings.ReplaceAll(block, ",50,", fmt.Sprintf(",%d,", id))
	}
	path, got := fakeSocket(t, lines(stat(50), ""))
	c := newClient(t, Config{Socket: path})
	a, err := c.Peek(t.Context(), "be", []lbsync.Server{{Name: "rc_a", ID: 50}})
	want := lbsync.Server{Name: "rc_a", ID: 50, Addr: addrPort("127.0.0.1:81"), Admin: lbsync.Drain, Up: true, Weight: 7}
	if err != nil || !slices.Equal(a.Servers, []lbsync.Server{want}) {
		t.Errorf("got %+v, %v\nwant %+v", a.Servers, err, want)
	}
	if want := []string{"set severity-output number;show info;show stat be 6 50;show info\n"}; !slices.Equal(got(), want) {
		t.Errorf("sent %q, want %q", got(), want)
	}
}

// A report hides whether a server that is down is ready or drained. Who has just
// said so must not read the whole backend for that: a newcomer waits for its
// first check, so every join would.
func TestApplyToADownServerIsOneExchange(t *testing.T) {
	h, _ := start(t, haproxytest.Backend{Slots: 3, Check: true}, Config{})
	c, log := loggedClient(t, Config{Socket: h.Socket})
	op := func(k lbsync.Kind) lbsync.Op { return lbsync.Op{Kind: k, Name: "s1", ID: 1} }
	move := op(lbsync.SetAddr)
	move.Addr = netip.MustParseAddrPort("127.9.9.9:9") // nobody listens
	apply(t, c, move)
	for _, tt := range []struct {
		name string
		ops  []lbsync.Op
		want lbsync.Admin
		n    int
	}{
		{"ready", []lbsync.Op{op(lbsync.SetReady), op(lbsync.HealthDown)}, lbsync.Ready, 1},
		{"drained", []lbsync.Op{op(lbsync.SetDrain)}, lbsync.Drain, 1},
		{"said nothing", []lbsync.Op{op(lbsync.HealthDown)}, lbsync.Drain, 2},
		{"ready after all", []lbsync.Op{op(lbsync.SetDrain), op(lbsync.SetReady)}, lbsync.Ready, 1},
	} {
		log.Reset()
		got := apply(t, c, tt.ops...)
		if n := strings.Count(log.String(), `"exchange"`); n != tt.n || len(got.Servers) != 1 || got.Servers[0].Admin != tt.want || got.Servers[0].Up {
			t.Errorf("%s: %d exchanges, %+v; want %d, %s and down", tt.name, n, got.Servers, tt.n, tt.want)
		}
		if s := read(t, c)["s1"]; s.Admin != tt.want {
			t.Errorf("%s: it is %s, want %s", tt.name, s.Admin, tt.want)
		}
	}
	// What was refused is not believed.
	log.Reset()
	wrong := lbsync.Op{Kind: lbsync.SetWeight, Name: "s9", ID: 9, Weight: 1}
	got, err := c.Apply(t.Context(), "be", []lbsync.Op{op(lbsync.SetDrain), wrong})
	if n := strings.Count(log.String(), `"exchange"`); err != nil || n != 2 || len(got.Refused) == 0 {
		t.Errorf("with a refusal: %d exchanges, %+v, %v; want a look at the whole", n, got, err)
	}
}

// HAProxy's own traffic waits for a line. All that one server takes is one line, and
// of several none is longer.
func TestShortBatch(t *testing.T) {
	const most = 7
	h, _ := start(t, haproxytest.Backend{Slots: most, Check: true}, Config{})
	c, log := loggedClient(t, Config{Socket: h.Socket})
	var ops []lbsync.Op
	var want []string
	for n := range most {
		name := fmt.Sprintf("s%d", n+1)
		for _, op := range []lbsync.Op{
			{Kind: lbsync.Shutdown}, {Kind: lbsync.SetWeight}, {Kind: lbsync.SetDrain}, {Kind: lbsync.HealthDown},
			{Kind: lbsync.SetAddr, Addr: addrPort("127.0.0.9:80")}, {Kind: lbsync.SetReady}, {Kind: lbsync.SetWeight, Weight: 7},
		} {
			op.Name, op.ID = name, n+1
			ops = append(ops, op)
		}
		want = append(want, name+" ready 7")
		log.Reset()
		var got []string
		for _, s := range apply(t, c, ops...).Servers {
			got = append(got, fmt.Sprintf("%s %s %d", s.Name, s.Admin, s.Weight))
		}
		var lines []int
		sum := 0
		for _, m := range regexp.MustCompile(`"commands":(\d+)`).FindAllStringSubmatch(log.String(), -1) {
			commands, _ := strconv.Atoi(m[1])
			lines, sum = append(lines, commands), sum+commands
		}
		one := 8 // seven commands and a look at each server
		if sum != one*(n+1) || slices.Max(lines) > one || n == 0 && len(lines) > 1 || !slices.Equal(got, want) {
			t.Errorf("%d servers: lines of %d; read back %q, want %q", n+1, lines, got, want)
		}
	}
}

// A frontend with the backend's name hides it from `show stat`.
func TestFrontendOfTheSameName(t *testing.T) {
	inst := haproxytest.NewInstance(t)
	h := haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{
		{Name: "first", Extra: []string{"frontend be"}}, // the earlier one wins
		{Name: "be", Extra: []string{"server a " + inst.Addr().String()}},
		{Name: "3", Extra: []string{"server a " + inst.Addr().String()}},
	}})
	if text := h.Command(t, "show stat be 6 1"); strings.Contains(text, "BACKEND") {
		t.Fatalf("the frontend hides nothing: %s", text)
	}
	c := newClient(t, Config{Socket: h.Socket})
	want := lbsync.Server{Name: "a", ID: 1, Addr: inst.Addr(), Up: true, Weight: 1}
	for _, backend := range []string{"be", "3"} {
		got, err := c.Peek(t.Context(), backend, []lbsync.Server{want})
		if err != nil || !slices.Equal(bares(got.Servers), []lbsync.Server{want}) {
			t.Errorf("%s: got %+v, %v\nwant %+v", backend, got.Servers, err, want)
		}
	}
	// 2 is no backend but the number of one.
	if got, err := c.Peek(t.Context(), "2", []lbsync.Server{want}); !errors.Is(err, lbsync.ErrNoBackend) {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestNoBackend(t *testing.T) {
	_, c := start(t, haproxytest.Backend{}, Config{})
	ctx := t.Context()
	if got, err := c.Read(ctx, "nope"); !errors.Is(err, lbsync.ErrNoBackend) {
		t.Errorf("Read: %+v, %v", got, err)
	}
	if got, err := c.Read(ctx, "fe_be"); !errors.Is(err, lbsync.ErrNoBackend) {
		t.Errorf("Read of a frontend: %+v, %v", got, err)
	}
	op := lbsync.Op{Kind: lbsync.SetReady, Name: "s1", ID: 1}
	if got, err := c.Apply(ctx, "nope", []lbsync.Op{op}); !errors.Is(err, lbsync.ErrNoBackend) {
		t.Errorf("Apply: %+v, %v", got, err)
	}
	if got, err := c.Apply(ctx, "fe_be", []lbsync.Op{op}); !errors.Is(err, lbsync.ErrNoBackend) {
		t.Errorf("Apply to a frontend: %+v, %v", got, err)
	}
	if got, err := c.Peek(ctx, "nope", make17()); !errors.Is(err, lbsync.ErrNoBackend) {
		t.Errorf("Peek: %+v, %v", got, err)
	}
	if got, err := c.Read(ctx, "be"); err != nil || len(got.Servers) != 0 {
		t.Errorf("Read of an empty one: %+v, %v", got, err)
	}
	if got, err := c.Apply(ctx, "be", nil); err != nil || got.Process.PID == 0 || len(got.Servers)+len(got.Refused) != 0 {
		t.Errorf("Apply of nothing: %+v, %v", got, err)
	}
}

func make17() []lbsync.Server {
	servers := make([]lbsync.Server, maxPeek+1)
	for i := range servers {
		servers[i] = lbsync.Server{Name: fmt.Sprintf("s%d", i+1), ID: i + 1}
	}
	return servers
}

func TestRefused(t *testing.T) {
	h, c := start(t, haproxytest.Backend{Slots: 1, Extra: []string{"server unix /tmp/rollcall-none.sock"}}, Config{})
	odd := newClient(t, Config{Socket: h.Socket, ServerOptions: "bogus 3"})
	user := newClient(t, Config{Socket: h.UserSocket})
	addr := addrPort("127.0.0.1:81")
	apply(t, c, lbsync.Op{Kind: lbsync.Add, Name: "rc_a", ID: 50, Addr: addr})

	tests := []struct {
		name   string
		client *Client
		op     lbsync.Op
		want   string
	}{
		{"delete when ready", c, lbsync.Op{Kind: lbsync.Delete, Name: "rc_a", ID: 50}, "Only servers in maintenance mode can be deleted."},
		{"name taken", c, lbsync.Op{Kind: lbsync.Add, Name: "rc_a", ID: 51, Addr: addr}, "Already exists a server with the same name in backend."},
		{"id taken", c, lbsync.Op{Kind: lbsync.Add, Name: "rc_b", ID: 50, Addr: addr}, "'id' : custom id 50 already used at (null):0 ('server rc_a')."},
		{"no server", c, lbsync.Op{Kind: lbsync.SetReady, Name: "rc_none", ID: 51}, "No such server."},
		{"no check", c, lbsync.Op{Kind: lbsync.EnableHealth, Name: "rc_a", ID: 50}, "Health check was not configured on this server, cannot enable."},
		{"option", odd, lbsync.Op{Kind: lbsync.Add, Name: "rc_b", ID: 51, Addr: addr}, "unknown keyword 'bogus'."},
		{"address of a socket", c, lbsync.Op{Kind: lbsync.SetAddr, Name: "unix", ID: 1, Addr: addr},
			"Update for the current server address family is only supported through configuration file"},
		{"level", user, lbsync.Op{Kind: lbsync.SetReady, Name: "s1", ID: 2}, "Permission denied"},
	}
	ready := lbsync.Op{Kind: lbsync.SetReady, Name: "rc_a", ID: 50}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before := read(t, c)
			weight := lbsync.Op{Kind: lbsync.SetWeight, Name: "rc_a", ID: 50, Weight: before["rc_a"].Weight + 1}
			got, err := tt.client.Apply(t.Context(), "be", []lbsync.Op{ready, tt.op, weight})
			want := []string{tt.want}
			if tt.client == user {
				want = []string{tt.want, tt.want, tt.want}
				weight.Weight--
			}
			begins := func(got, want string) bool { return strings.HasPrefix(got, want) }
			if err != nil || !slices.EqualFunc(got.Refused, want, begins) {
				t.Errorf("got %q, %v; want %q", got.Refused, err, want)
			}
			// The op after the refused one was carried out.
			if s := read(t, c)["rc_a"]; s.Weight != weight.Weight {
				t.Errorf("weight %d, want %d", s.Weight, weight.Weight)
			}
			if after := read(t, c); len(after) != len(before) {
				t.Errorf("before %+v\nafter %+v", before, after)
			}
			for _, s := range got.Servers {
				r := read(t, c)[s.Name]
				r.Busy = 0
				if bare(s) != bare(r) {
					t.Errorf("got %+v, read %+v", s, r)
				}
			}
		})
	}
}

func TestInjectionNeverSent(t *testing.T) {
	path, got := fakeSocket(t)
	c := newClient(t, Config{Socket: path})
	good := lbsync.Op{Kind: lbsync.SetReady, Name: "s1", ID: 1}
	for _, tt := range injections {
		if _, err := c.Apply(t.Context(), tt.backend, []lbsync.Op{good, tt.op}); err == nil || errors.Is(err, lbsync.ErrUnknown) {
			t.Errorf("%s: Apply: %v", tt.name, err)
		}
		if tt.want == "backend name" {
			if _, err := c.Read(t.Context(), tt.backend); err == nil {
				t.Errorf("%s: Read: no error", tt.name)
			}
		}
		if tt.want == "server name" || tt.want == "backend name" {
			if _, err := c.Peek(t.Context(), tt.backend, []lbsync.Server{{Name: tt.op.Name, ID: 1}}); err == nil {
				t.Errorf("%s: Peek: no error", tt.name)
			}
		}
	}
	if _, err := c.Peek(t.Context(), "be", []lbsync.Server{{Name: "s1"}}); err == nil {
		t.Error("Peek of id 0: no error")
	}
	if lines := got(); len(lines) != 0 {
		t.Errorf("sent %q", lines)
	}
}

// TestCutAnywhere cuts recorded replies at every offset and lets them come
// through the socket. Only trailing space may be lost.
func TestCutAnywhere(t *testing.T) {
	op := func(kind lbsync.Kind, name string, id int) lbsync.Op {
		return lbsync.Op{Kind: kind, Name: name, ID: id, Addr: addrPort("127.0.0.1:81")}
	}
	tests := []struct {
		file string
		call func(*Client) (string, error)
	}{
		{"read.reply", func(c *Client) (string, error) {
			got, err := c.Read(t.Context(), "be")
			return fmt.Sprintf("%+v", got.Servers), err
		}},
		{"apply.reply", func(c *Client) (string, error) {
			got, err := c.Apply(t.Context(), "be", []lbsync.Op{op(lbsync.Add, "rc_a", 50), op(lbsync.SetAddr, "s1", 1), op(lbsync.SetReady, "rc_b", 51)})
			return fmt.Sprintf("%+v %q", got.Servers, got.Refused), err
		}},
		{"whole.reply", func(c *Client) (string, error) {
			got, err := c.Peek(t.Context(), "be", make17())
			return fmt.Sprintf("%+v", got.Servers), err
		}},
	}
	for _, tt := range tests {
		for _, known := range []bool{false, true} { // the form of a report
			t.Run(fmt.Sprintf("%s/known=%t", tt.file, known), func(t *testing.T) {
				text := recorded(t, tt.file)
				first := 0
				if known {
					first = strings.Index(text, "\n\n") + 2 // such an answer has no head
				}
				var answers []string
				for n := first; n <= len(text); n++ {
					if known {
						answers = append(answers, text)
					}
					answers = append(answers, text[:n])
				}
				path, sent := fakeSocket(t, answers...)
				c := newClient(t, Config{Socket: path})
				if tt.file == "read.reply" {
					inspected(t, c, text)
				}
				whole := 0
				for n := first; n <= len(text); n++ {
					if known {
						c.form = nil
						if _, err := c.Probe(t.Context()); err != nil {
							t.Fatal(err)
						}
					}
					got, err := tt.call(c)
					if strings.TrimRight(text[:n], "\n") == strings.TrimRight(text, "\n") {
						whole++
						if err != nil || !strings.Contains(got, "Name:s1") {
							t.Errorf("whole, %d bytes: got %s, %v", n, got, err)
						}
					} else if !errors.Is(err, lbsync.ErrUnknown) || strings.Contains(got, "Name:") {
						t.Fatalf("cut after %d bytes: got %s, %v\n…%q", n, got, err, text[max(0, n-60):n])
					}
				}
				if whole == 0 {
					t.Error("no whole reply among them")
				}
				if second := sent()[1]; strings.Contains(second, ";show info;") == known {
					t.Errorf("the second line is %q", second)
				}
			})
		}
	}
}

// TestForm: once it is known how a report ends, a line asks for one; after an
// answer that was cut, and after one of another HAProxy, for two.
func TestForm(t *testing.T) {
	whole := lines("")
	later := strings.ReplaceAll(whole, "Tainted", "Painted")
	path, sent := fakeSocket(t, whole, whole, whole[:len(whole)-20], whole, later, later, later)
	c := newClient(t, Config{Socket: path})
	for i, want := range []struct {
		err   error
		heads bool
	}{{nil, true}, {nil, false}, {lbsync.ErrUnknown, false}, {nil, true}, {lbsync.ErrUnknown, false}, {nil, true}, {nil, false}} {
		if _, err := c.Probe(t.Context()); !errors.Is(err, want.err) {
			t.Errorf("exchange %d: got %v, want %v", i, err, want.err)
		}
		if line := sent()[i]; strings.Contains(line, ";show info;") != want.heads {
			t.Errorf("exchange %d: %q", i, line)
		}
	}
}

func TestReplaced(t *testing.T) {
	other := strings.ReplaceAll(lines(""), "Pid: 10", "Pid: 11")
	ops := make([]lbsync.Op, shortLine+1) // two lines
	for i := range ops {
		ops[i] = lbsync.Op{Kind: lbsync.SetReady, Name: "s1", ID: 1}
	}
	tests := []struct {
		name    string
		answers []string
		call    func(*Client) error
	}{
		{"within a line", []string{strings.Replace(lines(""), "Pid: 10", "Pid: 11", 1)}, func(c *Client) error {
			_, err := c.Read(t.Context(), "be")
			return err
		}},
		{"between lines", []string{lines(""), other}, func(c *Client) error {
			_, err := c.Apply(t.Context(), "be", ops)
			return err
		}},
		{"before the whole reading", []string{lines(""), other}, func(c *Client) error {
			_, err := c.Apply(t.Context(), "be", ops[:1])
			return err
		}},
		{"stopping", []string{strings.ReplaceAll(lines(""), "Stopping: 0", "Stopping: 1")}, func(c *Client) error {
			_, err := c.Probe(t.Context())
			return err
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path, _ := fakeSocket(t, tt.answers...)
			if err := tt.call(newClient(t, Config{Socket: path})); !errors.Is(err, lbsync.ErrReplaced) {
				t.Errorf("got %v, want %v", err, lbsync.ErrReplaced)
			}
		})
	}
}

func TestReload(t *testing.T) {
	h, c := start(t, haproxytest.Backend{Slots: 1}, Config{})
	apply(t, c, lbsync.Op{Kind: lbsync.Add, Name: "rc_a", ID: 50, Addr: addrPort("127.0.0.1:81")})
	before, err := c.Probe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	again, err := c.Probe(t.Context())
	if err != nil || again != before {
		t.Errorf("probed %+v, then %+v, %v", before, again, err)
	}
	h.Reload(t)
	after, err := c.Probe(t.Context())
	if err != nil || after.Same(before) || after.PID != h.PID() {
		t.Errorf("before %+v, after %+v, %v", before, after, err)
	}
	if servers := read(t, c); len(servers) != 1 {
		t.Errorf("dynamic servers outlived the reload: %+v", servers)
	}
	h.Kill(t)
	start := time.Now()
	if _, err := c.Probe(t.Context()); !errors.Is(err, lbsync.ErrUnknown) || !strings.Contains(err.Error(), h.Socket) ||
		!strings.Contains(err.Error(), "is HAProxy running") {
		t.Errorf("got %v", err)
	}
	if took := time.Since(start); took > c.cfg.Timeout/2 {
		t.Errorf("took %s", took)
	}
	h.Restart(t)
	if _, err := c.Probe(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestNoSocket(t *testing.T) {
	c := newClient(t, Config{Socket: "/nonexistent/rollcall.sock"})
	if _, err := c.Probe(t.Context()); !errors.Is(err, lbsync.ErrUnknown) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	// An error at once leaves nothing behind to wait for.
	if c.calls.suspect {
		t.Error("a line is taken to be under way")
	}
}

// A hung HAProxy costs a caller its Timeout, and gets no more than one line.
func TestHung(t *testing.T) {
	const timeout = time.Second
	h, c := start(t, haproxytest.Backend{Slots: 1}, Config{Timeout: timeout})
	weight := func(w int) lbsync.Op { return lbsync.Op{Kind: lbsync.SetWeight, Name: "s1", ID: 1, Weight: w} }
	apply(t, c, weight(1))

	h.Stop(t)
	for w := 2; w < 5; w++ {
		start := time.Now()
		got, err := c.Apply(t.Context(), "be", []lbsync.Op{weight(w)})
		if !errors.Is(err, lbsync.ErrUnknown) || !errors.Is(err, context.DeadlineExceeded) || len(got.Servers) != 0 {
			t.Errorf("got %+v, %v", got, err)
		}
		if took := time.Since(start); took < timeout || took > timeout+time.Second {
			t.Errorf("took %s, want %s", took, timeout)
		}
	}
	h.Cont(t)
	haproxytest.Poll(t, "it answers", func() error { _, err := c.Probe(t.Context()); return err })
	// The first line was in the socket and is carried out now; no other was.
	if s := read(t, c)["s1"]; s.Weight != 2 {
		t.Errorf("weight %d, want 2", s.Weight)
	}
	apply(t, c, weight(9))
}

// After a line without an answer only reports are asked for, until one comes.
func TestHungGetsOneLine(t *testing.T) {
	leakless(t)
	path, got := fakeSocket(t)
	c := newClient(t, Config{Socket: path, Timeout: 20 * time.Millisecond})
	for range 5 {
		_, err := c.Apply(t.Context(), "be", []lbsync.Op{{Kind: lbsync.SetReady, Name: "s1", ID: 1}})
		if !errors.Is(err, lbsync.ErrUnknown) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	}
	lines := got()
	if len(lines) != 5 || !strings.Contains(lines[0], "set server be/s1") {
		t.Fatalf("sent %q", lines)
	}
	for _, line := range lines[1:] {
		if line != "set severity-output number;show info;show info\n" {
			t.Errorf("sent %q", line)
		}
	}
}

// ctx ends a call at once, in each place where one waits.
func TestContext(t *testing.T) {
	path, got := fakeSocket(t)
	c, err := New(Config{Socket: path, Timeout: time.Minute}, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	first, cancelFirst := context.WithCancel(t.Context())
	second, cancelSecond := context.WithCancel(t.Context())
	defer cancelSecond()
	errs := make(chan error, 2)
	go func() { _, err := c.Probe(first); errs <- err }()
	haproxytest.Poll(t, "the line has come", func() error {
		if len(got()) == 0 {
			return errors.New("nothing")
		}
		return nil
	})
	go func() { _, err := c.Probe(second); errs <- err }() // waits for its turn
	cancelSecond()
	if err := <-errs; !errors.Is(err, context.Canceled) || !errors.Is(err, lbsync.ErrUnknown) {
		t.Errorf("waiting for the turn: %v", err)
	}
	cancelFirst()
	if err := <-errs; !errors.Is(err, context.Canceled) || !errors.Is(err, lbsync.ErrUnknown) {
		t.Errorf("waiting for the answer: %v", err)
	}
	if _, err := c.Probe(first); !errors.Is(err, context.Canceled) {
		t.Errorf("ended before: %v", err)
	}
	if len(got()) != 1 {
		t.Errorf("sent %q", got())
	}
	if err := c.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestThousandAdds(t *testing.T) {
	h, c := start(t, haproxytest.Backend{}, Config{ServerOptions: "check inter 60s"})
	ops := make([]lbsync.Op, 0, 2000)
	for i := range 1000 {
		addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 9, byte(i / 250), byte(i%250 + 1)}), 80)
		op := lbsync.Op{Name: fmt.Sprintf("rc_%04d", i), ID: 1_000_000 + i, Addr: addr}
		for _, op.Kind = range []lbsync.Kind{lbsync.Add, lbsync.EnableHealth} {
			ops = append(ops, op)
		}
	}
	got := apply(t, c, ops...)
	if len(got.Servers) != 1000 {
		t.Fatalf("%d servers", len(got.Servers))
	}
	for i, s := range got.Servers {
		want := lbsync.Server{Name: ops[2*i].Name, ID: ops[2*i].ID, Addr: ops[2*i].Addr, Admin: lbsync.Maint, Checked: true}
		if bare(s) != want {
			t.Fatalf("got %+v, want %+v", s, want)
		}
	}
	if n := strings.Count(h.Command(t, "show servers state be"), " rc_"); n != 1000 {
		t.Errorf("haproxy has %d", n)
	}
}

// Many callers at once are carried out one at a time and each gets its own
// answer.
func TestConcurrent(t *testing.T) {
	_, c := start(t, haproxytest.Backend{Slots: 8}, Config{})
	var wg sync.WaitGroup
	var calls atomic.Int64
	for i := range 8 {
		wg.Go(func() {
			for w := range 20 {
				op := lbsync.Op{Kind: lbsync.SetWeight, Name: fmt.Sprintf("s%d", i+1), ID: i + 1, Weight: w}
				got, err := c.Apply(t.Context(), "be", []lbsync.Op{op})
				if err != nil || len(got.Servers) != 1 || got.Servers[0].Name != op.Name || got.Servers[0].Weight != w {
					t.Errorf("got %+v, %v", got, err)
				}
				if _, err := c.Read(t.Context(), "be"); err != nil {
					t.Error(err)
				}
				calls.Add(1)
			}
		})
	}
	wg.Wait()
	if calls.Load() != 160 {
		t.Error(calls.Load())
	}
}

// BenchmarkExchange is the smallest exchange, and one of the size that a change takes.
func BenchmarkExchange(b *testing.B) {
	_, c := start(b, haproxytest.Backend{Slots: 100}, Config{})
	b.Run("probe", func(b *testing.B) {
		for b.Loop() {
			if _, err := c.Probe(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
	})
	op := lbsync.Op{Kind: lbsync.SetWeight, Name: "s1", ID: 1}
	b.Run("change", func(b *testing.B) {
		for b.Loop() {
			op.Weight = (op.Weight + 1) % 256
			apply(b, c, op)
		}
	})
}
