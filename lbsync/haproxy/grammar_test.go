package haproxy

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"

	"rollcall/lbsync"
	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// still is a HAProxy that stays as it is; DryRun goes on from there.
type still struct{ state lbsync.State }

func (s still) Probe(context.Context) (lbsync.Process, error) { return s.state.Process, nil }
func (s still) Read(context.Context, string) (lbsync.State, error) {
	return s.state, nil
}
func (s still) Apply(context.Context, string, []lbsync.Op) (lbsync.Applied, error) {
	return lbsync.Applied{}, lbsync.ErrUnknown
}
func (s still) Peek(context.Context, string, []lbsync.Server) (lbsync.Applied, error) {
	return lbsync.Applied{}, lbsync.ErrUnknown
}

// canned is a connection to a Redis that answers with these bytes.
type canned struct {
	net.Conn
	answer *bytes.Reader
}

func (c *canned) Read(b []byte) (int, error)  { return c.answer.Read(b) }
func (c *canned) Write(b []byte) (int, error) { return len(b), nil }

// FuzzRegistry has the register hold anything, and looks at every command that
// lbsync would send to HAProxy for it.
func FuzzRegistry(f *testing.F) {
	for _, member := range nasty {
		f.Add(member, "1700000000000", `{"id":"t","weight":100}`, `{"state":"drain"}`, "10.0.0.9:80", "left 1 t", true)
	}
	f.Add("10.0.0.7:80", "1e400", `{"id":"t;show env","weight":1e9}`, `{"state":"maint\n"}`, "[fc00::1]:80", "expired 1 t;x", false)
	f.Add("[fc00::7]:80", "1700000000000", `{"weight":0}`, `{"weight":256}`, "10.0.0.7:80", "operator 1", true)
	c, err := New(Config{Socket: "/none", ServerOptions: "check inter 2s"}, zerolog.Nop())
	if err != nil {
		f.Fatal(err)
	}
	bulk := func(s string) string { return fmt.Sprintf("$%d\r\n%s\r\n", len(s), s) }
	pair := func(k, v string) string { return "*2\r\n" + bulk(k) + bulk(v) }
	answer := "" // to the one question of a connection
	rdb := redis.NewClient(&redis.Options{
		Protocol: 2, MaxRetries: -1, DisableIdentity: true, PoolSize: 1, DialerRetries: 1, ContextTimeoutEnabled: false, ReadTimeout: -2, WriteTimeout: -2,
		ConnMaxLifetime: time.Nanosecond,
		Dialer: func(context.Context, string, string) (net.Conn, error) {
			a, b := net.Pipe()
			_ = b.Close() // only the deadlines and addresses of a are of use
			return &canned{Conn: a, answer: bytes.NewReader([]byte(answer))}, nil
		},
	})
	f.Cleanup(func() { _ = rdb.Close() }) // nothing is open
	store, err := registrar.NewStore(rdb, "rollcall")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, member, score, meta, admin, goner, note string, slots bool) {
		answer = "*11\r\n:1\r\n:1700000000500\r\n" + bulk("abc") + bulk("e") + ":7\r\n:15000\r\n:5000\r\n" +
			pair(member, score) + pair(member, meta) + pair(member, admin) + pair(goner, note)
		have := lbsync.State{Process: lbsync.Process{PID: 1, Started: 1, Version: "2.6.12"}}
		g := grammar{backend: "be", slots: map[string]bool{}, options: " -1 check inter 2s"}
		if slots {
			for i, addr := range []string{"127.0.0.1:1", "10.0.0.9:80", "10.0.0.7:80"} {
				s := lbsync.Server{Name: fmt.Sprint("s", i), ID: i + 1, Slot: true, Addr: netip.MustParseAddrPort(addr), Admin: lbsync.Maint}
				if i > 0 {
					s.Admin, s.Up, s.Weight = lbsync.Ready, true, 100
				}
				g.slots[s.Name] = true
				have.Servers = append(have.Servers, s)
			}
		}
		var said bytes.Buffer
		dry := &lbsync.DryRun{Balancer: still{have}, Render: c.Render, Out: &said}
		s, err := lbsync.New(lbsync.Config{ID: "x", Checks: true, Backends: []lbsync.BackendConfig{{Service: "web", Backend: "be", Mode: lbsync.Auto}}}, dry, store, zerolog.Nop())
		if err != nil {
			t.Fatal(err)
		}
		_ = s.Once(context.Background()) // what it cannot read is an error
		for line := range strings.Lines(said.String()) {
			if line = strings.TrimSuffix(line, "\n"); !g.accepts(line) {
				t.Fatalf("%q was sent for %q", line, member)
			}
		}
	})
}

// nasty are members that somebody may have written into Redis.
var nasty = []string{
	"10.0.0.7:80", "[fc00::7]:80", "10.0.0.7:80;show env", "10.0.0.7:80\nshow env", "10.0.0.7 :80", "a\nset server be/s1 state maint", ";", "<<", "$(x)", "\x1b[31m",
	"[fe80::1%eth0;x]:80", "[::ffff:10.0.0.7]:80", "10.0.0.7:080", "10.0.0.7:+80", "localhost:80", "unix@/x", "", strings.Repeat("9", 70000), "10.0.0.7:80 check", "8.8.8.8:53", "\xff\xfe",
}

// recorder passes connections on to HAProxy's socket and keeps what was sent.
type recorder struct {
	mu   sync.Mutex
	sent []string
}

// record listens on a socket of its own.
func record(t *testing.T, target string) (r *recorder, path string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "rec")
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	r = &recorder{}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return // closed
			}
			serving.Go(func() { r.pass(conn, target) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		serving.Wait()
		_ = os.RemoveAll(dir)
	})
	return r, path
}

func (r *recorder) pass(conn net.Conn, target string) {
	defer conn.Close()
	line, err := bufio.NewReader(conn).ReadString('\n')
	if line != "" { // a connection on which nothing was said is none of a command
		r.mu.Lock()
		r.sent = append(r.sent, line)
		r.mu.Unlock()
	}
	if err != nil {
		return
	}
	ha, err := net.Dial("unix", target)
	if err != nil {
		return
	}
	defer ha.Close()
	if _, err := io.WriteString(ha, line); err == nil {
		_, _ = io.Copy(conn, ha) // the client sees that it was cut
	}
}

// TestNothingDumpsAllServers records what lbsync's calls and doctor's send: on HAProxy
// 2.6 a list of servers that is read while one of them is deleted reads freed memory
// (fixed by 282ac06d8), and the servers of other backends are other lbsyncs'.
func TestNothingDumpsAllServers(t *testing.T) {
	t.Parallel()
	ha := haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: maxPeek + 1}, {Name: "other", Slots: 1}}})
	r, path := record(t, ha.Socket)
	c, ctx := newClient(t, Config{Socket: path}), t.Context()
	if _, err := c.Probe(ctx); err != nil {
		t.Fatal(err)
	}
	whole, err := c.Read(ctx, "be")
	if err != nil {
		t.Fatal(err)
	}
	for _, servers := range [][]lbsync.Server{whole.Servers[:1], whole.Servers} { // one by one, and all
		if _, err := c.Peek(ctx, "be", servers); err != nil {
			t.Fatal(err)
		}
		var ops []lbsync.Op
		for _, s := range servers {
			ops = append(ops, lbsync.Op{Kind: lbsync.SetMaint, Name: s.Name, ID: s.ID})
		}
		if _, err := c.Apply(ctx, "be", ops); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Examine(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := c.ExamineBackend(ctx, "be"); err != nil {
		t.Fatal(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	forms := map[string]int{}
	for _, line := range r.sent {
		for command := range strings.SplitSeq(strings.TrimSuffix(line, "\n"), ";") {
			f := strings.Fields(command)
			if len(f) < 2 || f[0] != "show" || f[1] != "servers" && f[1] != "stat" {
				continue
			}
			switch {
			case len(f) == 4 && f[1] == "servers" && f[3] == "be": // of one backend
			case len(f) == 5 && f[1] == "stat" && f[2] == "be" && f[4] != "-1": // one server
			case (grammar{}).number(f[2], 1, 1000) && f[3] == "4" && f[4] == "-1": // of one backend, by number
				f[2] = "N"
			case command == "show stat -1 2 -1": // backends, without servers
			default:
				t.Errorf("HAProxy was sent %q", command)
			}
			forms[f[1]+f[2]]++
		}
	}
	for _, want := range []string{"serversstate", "serversconn", "statbe", "stat-1"} {
		if forms[want] == 0 {
			t.Errorf("nothing was sent of %s: %v", want, forms)
		}
	}
}

// TestOnlyGrammarReachesHAProxy writes nasty data into a real Redis, and records
// every byte on its way to a real HAProxy, in both modes.
func TestOnlyGrammarReachesHAProxy(t *testing.T) {
	t.Parallel()
	for _, slots := range []int{0, 3} {
		srv := redistest.Start(t)
		ha := haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: slots, Balance: "leastconn"}}})
		r, path := record(t, ha.Socket)
		c := newClient(t, Config{Socket: path, ServerOptions: "check inter 2s"})
		rdb := srv.Client(t)
		store, err := registrar.NewStore(rdb, "rollcall")
		if err != nil {
			t.Fatal(err)
		}
		s, err := lbsync.New(lbsync.Config{ID: "x", Checks: true, Backends: []lbsync.BackendConfig{{Service: "web", Backend: "be", Mode: lbsync.Auto}}}, c, store, zerolog.Nop())
		if err != nil {
			t.Fatal(err)
		}
		ctx := t.Context()
		k := store.Keys()
		for _, text := range []string{`{"id":"t;show env","weight":7}`, `{"id":"\n","weight":8,"zone":";x"}`, `{"weight":"1;show env"}`, "\n"} {
			now := rdb.Time(ctx).Val().UnixMilli()
			for _, m := range nasty {
				for _, err := range []error{
					rdb.ZAdd(ctx, k.Instances("web"), redis.Z{Score: float64(now), Member: m}).Err(),
					rdb.HSet(ctx, k.Meta("web"), m, text).Err(),
					rdb.HSet(ctx, k.Admin("web"), m, strings.Replace(text, "id", "reason", 1)).Err(),
					rdb.HSet(ctx, k.Gone("web"), "10.0.0.8:80", "left 1 "+text).Err(),
					rdb.Incr(ctx, k.ServiceVersion("web")).Err(),
				} {
					if err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := s.Once(ctx); err != nil && !strings.Contains(err.Error(), "are not served") {
				t.Fatal(err)
			}
		}
		g := grammar{backend: "be", slots: map[string]bool{"s1": true, "s2": true, "s3": true}, options: " -1 check inter 2s"}
		r.mu.Lock()
		changes := 0
		for _, line := range r.sent {
			if !strings.HasSuffix(line, "\n") || !g.line(strings.TrimSuffix(line, "\n")) {
				t.Errorf("HAProxy was sent %q", line)
			}
			changes += strings.Count(line, "set server")
		}
		r.mu.Unlock()
		if changes == 0 {
			t.Errorf("nothing was changed: %q", r.sent)
		}
	}
}
