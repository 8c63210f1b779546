package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// process is one running rollcall. Its output goes to the test's log if the
// test fails.
type process struct {
	cmd  *exec.Cmd
	out  *lockedBuffer
	done chan struct{} // closed when it has ended
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// system is one Redis, one HAProxy and the rollcalls of a test.
type system struct {
	redis *redistest.Server
	ha    *haproxytest.HAProxy
	env   []string // more of it
	// program is another than the whole rollcall, if not empty.
	program string
}

func (s *system) binary(t *testing.T) string {
	t.Helper()
	if s.program != "" {
		return s.program
	}
	return binary(t)
}

// spawn starts a rollcall that the test's end kills.
func (s *system) spawn(t *testing.T, args ...string) *process {
	t.Helper()
	return s.start(t, exec.Command(s.binary(t), args...))
}

// start starts cmd with the variables of s. Output that goes nowhere yet is kept. The
// test's end kills it.
func (s *system) start(t *testing.T, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{cmd: cmd, out: &lockedBuffer{}, done: make(chan struct{})}
	cmd.Env = append(append(cmd.Environ(), "ROLLCALL_REDIS="+s.redis.URL()), s.env...)
	if cmd.Stdout == nil {
		cmd.Stdout = p.out
	}
	if cmd.Stderr == nil {
		cmd.Stderr = p.out
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		_ = cmd.Wait() // the exit code is read from ProcessState
	}()
	t.Cleanup(func() {
		p.signal(t, syscall.SIGKILL)
		if t.Failed() {
			t.Logf("%s\n%s", strings.Join(cmd.Args, " "), p.out)
		}
	})
	return p
}

// signal sends sig and waits for the end.
func (p *process) signal(t *testing.T, sig syscall.Signal) (code int) {
	t.Helper()
	_ = p.cmd.Process.Signal(sig) // it may have ended
	select {
	case <-p.done:
	case <-time.After(10 * time.Second):
		t.Errorf("%v does not end on %v", p.cmd.Args, sig)
	}
	return p.cmd.ProcessState.ExitCode()
}

// rollcall runs a command to its end.
func (s *system) rollcall(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	cmd := exec.Command(s.binary(t), args...)
	cmd.Env = append(append(cmd.Environ(), "ROLLCALL_REDIS="+s.redis.URL()), s.env...)
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return o.String(), e.String(), cmd.ProcessState.ExitCode()
}

// load sends POST requests on kept connections until stop, and counts.
type load struct {
	sent, failed atomic.Int64
	mu           sync.Mutex
	last         string // failure
	stop         func()
}

func startLoad(t *testing.T, url string) *load {
	t.Helper()
	l := &load{}
	ctx, cancel := context.WithCancel(context.Background())
	var workers sync.WaitGroup
	for range 3 {
		workers.Go(func() {
			c := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{}}
			defer c.CloseIdleConnections()
			pace := time.NewTicker(3 * time.Millisecond)
			defer pace.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-pace.C:
				}
				l.sent.Add(1)
				if err := post(c, url); err != nil {
					l.failed.Add(1)
					l.mu.Lock()
					l.last = err.Error()
					l.mu.Unlock()
				}
			}
		})
	}
	l.stop = sync.OnceFunc(func() { cancel(); workers.Wait() })
	t.Cleanup(l.stop)
	return l
}

// post sends a body that cannot be sent twice, so that nothing retries it
// silently.
func post(c *http.Client, url string) error {
	r, err := c.Post(url, "text/plain", io.MultiReader(strings.NewReader("body")))
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, r.Body)
	_ = r.Body.Close()
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d", r.StatusCode)
	}
	return err
}

// answered polls until these instances, and no other, answer.
func answered(t *testing.T, url string, want ...*haproxytest.Instance) {
	t.Helper()
	c := &http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	haproxytest.Poll(t, fmt.Sprintf("%d instances answer", len(want)), func() error {
		seen := map[string]bool{}
		for range 6 * len(want) {
			r, err := c.Get(url)
			if err != nil {
				return err
			}
			_ = r.Body.Close()
			if r.StatusCode != http.StatusOK {
				return fmt.Errorf("status %d", r.StatusCode)
			}
			seen[r.Header.Get("X-Instance")] = true
		}
		for _, i := range want {
			if !seen[i.Addr().String()] {
				return fmt.Errorf("%s does not, %v do", i.Addr(), seen)
			}
		}
		if len(seen) != len(want) {
			return fmt.Errorf("%v do", seen)
		}
		return nil
	})
}

// TestEndToEnd plays the life of a service with the real binary: join, leave,
// crash, lbsync killed, HAProxy reloaded and restarted, while requests flow.
func TestEndToEnd(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"slots", "dynamic"} {
		t.Run(mode, func(t *testing.T) {
			be := haproxytest.Backend{Name: "be", Balance: "roundrobin", Check: true}
			if mode == "slots" {
				be.Slots = 10
			}
			s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{be}, StateFile: true})}
			sum := s.ha.ConfigSum(t)
			url := "http://" + s.ha.Addr("be") + "/"
			s.spawn(t, "reap", "--ttl", "3s")
			s.spawn(t, "reap", "--ttl", "3s")
			sync := []string{"lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8",
				"--server-options", "check inter 500ms fastinter 100ms downinter 100ms"}
			lb := s.spawn(t, sync...)
			var is []*haproxytest.Instance
			var sidecars []*process
			join := func() {
				i := haproxytest.NewInstance(t)
				is = append(is, i)
				sidecars = append(sidecars, s.spawn(t, "register", "--service", "web", "--addr", i.Addr().String()))
			}
			join()
			join()
			join()
			answered(t, url, is...)

			l := startLoad(t, url)
			failed := func(step string, allowed int64) {
				t.Helper()
				n, f := l.sent.Load(), l.failed.Swap(0)
				t.Logf("%-28s %6d requests so far, %d failed", step, n, f)
				if f > allowed {
					t.Errorf("%s: %d requests failed, the last with: %s", step, f, l.last)
				}
			}
			join()
			answered(t, url, is...)
			failed("join", 0)

			if code := sidecars[0].signal(t, syscall.SIGTERM); code != 0 {
				t.Errorf("the sidecar ends with %d", code)
			}
			answered(t, url, is[1:]...)
			is[0].Close()
			failed("leave in order", 0)

			lb.signal(t, syscall.SIGKILL)
			join()
			lb = s.spawn(t, sync...)
			answered(t, url, is[1:]...)
			failed("lbsync killed and started", 0)

			begun := time.Now()
			sidecars[1].signal(t, syscall.SIGKILL)
			is[1].Close()
			answered(t, url, is[2:]...)
			gone := is[1].Addr().String()
			haproxytest.Poll(t, "the registry drops it", func() error {
				out, _, _ := s.rollcall(t, "instances", "web", "-o", "json")
				if strings.Contains(out, gone) {
					return errors.New(out)
				}
				return nil
			})
			t.Logf("crash: out of the registry after %v, TTL 3 s", time.Since(begun).Round(time.Millisecond))
			// What was under way at a crash cannot be saved: one for each worker.
			failed("crash", 3)

			s.ha.Reload(t)
			answered(t, url, is[2:]...)
			if mode == "slots" {
				failed("HAProxy reloaded", 0)
			} else {
				failed("HAProxy reloaded", 5000) // dynamic servers do not survive: the README says so
			}

			s.ha.Kill(t)
			begun = time.Now()
			s.ha.Restart(t)
			answered(t, url, is[2:]...)
			t.Logf("HAProxy killed: all answer again after %v", time.Since(begun).Round(time.Millisecond))
			failed("HAProxy killed and started", 5000)

			join()
			answered(t, url, is[2:]...)
			failed("join after all that", 0)
			l.stop()
			if n := l.sent.Load(); n < 500 {
				t.Errorf("only %d requests were sent", n)
			}
			if s.ha.ConfigSum(t) != sum {
				t.Error("haproxy.cfg changed")
			}
			if code := lb.signal(t, syscall.SIGTERM); code != 0 {
				t.Errorf("lbsync ends with %d", code)
			}
		})
	}
}

// TestDynamicServersByFlag has the flags of the README's dynamic backend reach
// HAProxy: the server has a check.
func TestDynamicServersByFlag(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be_api", Balance: "leastconn"}}})}
	i := haproxytest.NewInstance(t)
	s.spawn(t, "register", "--service", "api", "--addr", i.Addr().String(), "--weight", "7")
	haproxytest.Poll(t, "it is registered", func() error {
		if out, _, _ := s.rollcall(t, "instances", "api"); !strings.Contains(out, i.Addr().String()) {
			return errors.New(out)
		}
		return nil
	})
	if _, stderr, code := s.rollcall(t, "lbsync", "--socket", s.ha.Socket, "--backend", "api=be_api", "--allow", "127.0.0.0/8", "--once",
		"--server-options", "check inter 2s downinter 200ms"); code != 0 {
		t.Fatalf("exit %d: %s", code, stderr)
	}
	haproxytest.Poll(t, "its check passed", func() error {
		stat := s.ha.Command(t, "show stat be_api 4 -1")
		if !strings.Contains(stat, "rc_"+i.Addr().String()) || !strings.Contains(stat, "L4OK") {
			return errors.New(stat)
		}
		return nil
	})
}

// TestWaiting has the commands and the sidecar wait for the balancer.
func TestWaiting(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 5}}})}
	lb := s.spawn(t, "lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8")
	a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
	side := s.spawn(t, "register", "--service", "web", "--addr", a.Addr().String())
	other := s.spawn(t, "register", "--service", "web", "--addr", b.Addr().String())
	if out, stderr, code := s.rollcall(t, "wait", "web", "--for", "ready=2"); code != 0 || !strings.Contains(out, "applied by") {
		t.Fatalf("wait: exit %d, %s%s", code, out, stderr)
	}
	state := func() string { return s.ha.Command(t, "show servers state be") }
	haproxytest.Poll(t, "the balancer has spoken", func() error {
		if out, _, _ := s.rollcall(t, "lb"); !strings.Contains(out, "yes") {
			return errors.New(out)
		}
		return nil
	})
	out, stderr, code := s.rollcall(t, "drain", "web", a.Addr().String(), "--wait", "-o", "json")
	var o outcome
	if err := json.Unmarshal([]byte(out), &o); err != nil || code != 0 || o.Balancers == nil || *o.Balancers != 1 {
		t.Errorf("drain --wait: exit %d, %v, %s%s", code, err, out, stderr)
	}
	if !strings.Contains(state(), " 12 100 ") { // 8 drain, 4 was disabled in the configuration
		t.Errorf("drained, but there is\n%s", state())
	}
	var rows []lbRow
	out, _, _ = s.rollcall(t, "lb", "web", "-o", "json")
	if err := json.Unmarshal([]byte(out), &rows); err != nil || len(rows) != 1 || !rows[0].Live || rows[0].Behind != 0 || rows[0].Applied != o.Version {
		t.Errorf("lb: %v, %s", err, out)
	}
	if out, stderr, code := s.rollcall(t, "ready", "web", a.Addr().String(), "--wait"); code != 0 || !strings.Contains(out, "applied by 1 balancers") {
		t.Errorf("ready --wait: exit %d, %s%s", code, out, stderr)
	}

	// The sidecar leaves when HAProxy has let go of its instance, not before.
	if code := side.signal(t, syscall.SIGTERM); code != 0 || !strings.Contains(side.out.String(), "drained") {
		t.Errorf("exit %d, %s", code, side.out)
	}

	// A balancer that does not answer is waited for, and not for ever.
	if err := lb.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if _, stderr, code := s.rollcall(t, "maint", "web", b.Addr().String(), "--force", "--wait", "--timeout", "3s"); code != exitWait || !strings.Contains(stderr, "1 of 1 live balancers") {
		t.Errorf("maint --wait: exit %d, %s", code, stderr)
	}
	if _, stderr, code := s.rollcall(t, "wait", "web", "--for", "ready=9", "--timeout", "3s"); code != exitWait || !strings.Contains(stderr, "of 9 instances") {
		t.Errorf("wait: exit %d, %s", code, stderr)
	}
	if err := other.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	haproxytest.Poll(t, "it drains", func() error {
		if out, _, _ := s.rollcall(t, "instances", "web", "-o", "json"); !strings.Contains(out, "maint") {
			return errors.New(out)
		}
		return nil
	})
	if code := other.signal(t, syscall.SIGTERM); code != 0 || !strings.Contains(other.out.String(), "left") {
		t.Errorf("exit %d, %s", code, other.out)
	}
	if err := lb.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if out, stderr, code := s.rollcall(t, "wait", "web", "--for", "converged"); code != 0 {
		t.Errorf("converged: exit %d, %s%s", code, out, stderr)
	}
}

// TestTwoLbsyncs has a second lbsync stand by until the first one is killed, and
// a dry run say what is left to do.
func TestTwoLbsyncs(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 5}}})}
	args := []string{"lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8"}
	url := "http://" + s.ha.Addr("be") + "/"
	first := s.spawn(t, args...)
	i := haproxytest.NewInstance(t)
	s.spawn(t, "register", "--service", "web", "--addr", i.Addr().String())
	answered(t, url, i)
	second := s.spawn(t, args...)
	says := func(p *process, what string) {
		t.Helper()
		haproxytest.Poll(t, "it says "+what, func() error {
			if out := p.out.String(); !strings.Contains(out, what) {
				return errors.New(out)
			}
			return nil
		})
	}
	says(second, "standing by")
	if _, stderr, code := s.rollcall(t, append(args, "--once")...); code != exitFailed || !strings.Contains(stderr, "another lbsync") {
		t.Errorf("--once beside it: exit %d, %s", code, stderr)
	}
	if out, stderr, code := s.rollcall(t, append(args, "--dry-run")...); code != 0 || out != "" {
		t.Errorf("nothing to do: exit %d, %s%s", code, out, stderr)
	}
	first.signal(t, syscall.SIGKILL)
	says(second, "balancer found")
	j := haproxytest.NewInstance(t)
	s.spawn(t, "register", "--service", "web", "--addr", j.Addr().String())
	answered(t, url, i, j)
	second.signal(t, syscall.SIGTERM)
	if _, stderr, code := s.rollcall(t, "drain", "web", i.Addr().String()); code != 0 {
		t.Fatal(stderr)
	}
	out, stderr, code := s.rollcall(t, append(args, "--dry-run")...)
	if want := "set server be/s1 state drain\n"; code != exitDryRun || out != want && out != strings.Replace(want, "s1", "s2", 1) {
		t.Errorf("dry run: exit %d, %s%s", code, out, stderr)
	}
	answered(t, url, i, j)
}

func TestBadInput(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	rdb := s.redis.Client(t)
	if _, stderr, code := s.rollcall(t, "reap", "--once", "--force"); code != 0 {
		t.Fatalf("exit %d: %s", code, stderr)
	}
	// A reaper's pulse lives for four TTL, which a slow run outlasts.
	must(t, rdb.Del(t.Context(), rdb.Keys(t.Context(), "rollcall:reaper:*").Val()...).Err())
	before := rdb.DBSize(t.Context()).Val()
	register := func(args ...string) []string { return append([]string{"register"}, args...) }
	for _, tt := range []struct {
		name string
		args []string
	}{
		{"port 0", register("--service", "web", "--addr", "127.0.0.1:0")},
		{"port 65536", register("--service", "web", "--addr", "127.0.0.1:65536")},
		{"no port", register("--service", "web", "--addr", "127.0.0.1")},
		{"no address", register("--service", "web")},
		{"zone", register("--service", "web", "--addr", "[fe80::1%lo]:80")},
		{"unspecified", register("--service", "web", "--addr", "0.0.0.0:80")},
		{"unspecified 6", register("--service", "web", "--addr", "[::]:80")},
		{"multicast", register("--service", "web", "--addr", "224.0.0.1:80")},
		{"broadcast", register("--service", "web", "--addr", "255.255.255.255:80")},
		{"short IPv4", register("--service", "web", "--addr", "127.1:80")},
		{"unknown host", register("--service", "web", "--addr", "no-such-host.invalid:80")},
		{"no service", register("--addr", "127.0.0.1:80")},
		{"upper case", register("--service", "Web", "--addr", "127.0.0.1:80")},
		{"braces", register("--service", "w{e}b", "--addr", "127.0.0.1:80")},
		{"long name", register("--service", strings.Repeat("a", 64), "--addr", "127.0.0.1:80")},
		{"weight 257", register("--service", "web", "--addr", "127.0.0.1:80", "--weight", "257")},
		{"weight -1", register("--service", "web", "--addr", "127.0.0.1:80", "--weight", "-1")},
		{"interval too long", register("--service", "web", "--addr", "127.0.0.1:80", "--interval", "5001ms")},
		{"interval 0", register("--service", "web", "--addr", "127.0.0.1:80", "--interval", "0s")},
		{"tag", register("--service", "web", "--addr", "127.0.0.1:80", "--tag", "x")},
		{"too many tags", register("--service", "web", "--addr", "127.0.0.1:80", "--tag", "x="+strings.Repeat("y", 5000))},
		{"check", register("--service", "web", "--addr", "127.0.0.1:80", "--check", "ftp://127.0.0.1/")},
		{"check command", register("--service", "web", "--addr", "127.0.0.1:80", "--check", "exec:no-such-program")},
		{"check interval", register("--service", "web", "--addr", "127.0.0.1:80", "--check", "tcp://127.0.0.1:80", "--check-interval", "0s")},
		{"fall 0", register("--service", "web", "--addr", "127.0.0.1:80", "--check", "tcp://127.0.0.1:80", "--fall", "0")},
		{"check twice", register("--service", "web", "--addr", "127.0.0.1:80", "--check", "tcp://127.0.0.1:80", "--ready-file", "/x")},
		{"beat-file age", register("--service", "web", "--addr", "127.0.0.1:80", "--beat-file", "/x", "--beat-file-age", "0s")},
		{"no command", register("--service", "web", "--addr", "127.0.0.1:80", "--")},
		{"unknown command to run", register("--service", "web", "--addr", "127.0.0.1:80", "--", "no-such-program")},
		{"no such interface", register("--service", "web", "--addr", ":80", "--interface", "nope0")},
		{"interface of an address", register("--service", "web", "--addr", "127.0.0.1:80", "--interface", "lo")},
		{"chosen port 0", register("--service", "web", "--addr", ":0")},
		{"advertise without a port", register("--service", "web", "--advertise", "127.0.0.1")},
		{"argument", register("--service", "web", "--addr", "127.0.0.1:80", "more")},
		{"namespace", register("--service", "web", "--addr", "127.0.0.1:80", "--namespace", "a:{b}")},
		{"redis URL", register("--service", "web", "--addr", "127.0.0.1:80", "--redis", "http://u:secret@h")},
		{"log level", register("--service", "web", "--addr", "127.0.0.1:80", "--log-level", "loud")},
		{"weight word", []string{"weight", "web", "127.0.0.1:80", "heavy"}},
		{"weight 300", []string{"weight", "web", "127.0.0.1:80", "300"}},
		{"long zone", register("--service", "web", "--addr", "127.0.0.1:80", "--zone", strings.Repeat("z", 64))},
		{"long reason", []string{"drain", "web", "127.0.0.1:80", "--reason", strings.Repeat("r", 256)}},
		{"drain nothing", []string{"drain", "web"}},
		{"drain bad address", []string{"drain", "web", "nowhere"}},
		{"output", []string{"services", "-o", "xml"}},
		{"unknown flag", []string{"services", "--nope"}},
		{"unknown command", []string{"regsiter"}},
		{"no backend", []string{"lbsync"}},
		{"backend without service", []string{"lbsync", "--backend", "be"}},
		{"backend twice", []string{"lbsync", "--backend", "web=be", "--backend", "api=be"}},
		{"mode", []string{"lbsync", "--backend", "web=be", "--mode", "magic"}},
		{"network", []string{"lbsync", "--backend", "web=be", "--allow", "10.0.0.1"}},
		{"network of a backend", []string{"lbsync", "--backend", "web=be", "--allow", "be=10.0.0.1"}},
		{"network of no backend", []string{"lbsync", "--backend", "web=be", "--allow", "web=10.0.0.0/8"}},
		{"server option", []string{"lbsync", "--backend", "web=be", "--server-options", "check;disable frontend x"}},
		{"balancer's id", []string{"lbsync", "--backend", "web=be", "--id", "a b"}},
		{"no id", []string{"lbsync", "--backend", "web=be", "--id", ""}},
		{"long id", []string{"lbsync", "--backend", "web=be", "--id", strings.Repeat("x", 256)}},
		{"ttl", []string{"reap", "--ttl", "-1s"}},
		{"ttl that differs", []string{"reap", "--ttl", "16s"}},
		{"ttl that differs, once", []string{"reap", "--ttl", "16s", "--once"}},
		{"ttl that differs, forced", []string{"reap", "--ttl", "16s", "--once", "--force"}},
		{"force alone", []string{"reap", "--force"}},
		{"canary URL", []string{"reap", "--canary-redis", "http://u:secret@h"}},
		{"http", []string{"reap", "--http", "nowhere"}},
		{"http without a port", []string{"watch", "--http", "127.0.0.1"}},
		{"http of a name", register("--service", "web", "--addr", "127.0.0.1:80", "--http", "localhost:9464")},
		{"http once", []string{"lbsync", "--backend", "web=be", "--http", "127.0.0.1:0", "--once"}},
		{"http dry", []string{"lbsync", "--backend", "web=be", "--http", "127.0.0.1:0", "--dry-run"}},
		{"pprof alone", []string{"reap", "--pprof"}},
		{"canary in a Cluster only", []string{"reap", "--canary-redis", "redis+cluster://u:secret@h"}},
		{"wait for what", []string{"wait", "web", "--for", "happiness"}},
		{"doctor's socket alone", []string{"doctor", "--socket", "/nonexistent"}},
		{"doctor's backend alone", []string{"doctor", "--backend", "web=be"}},
		{"doctor's configuration alone", []string{"doctor", "--config", "/nonexistent"}},
		{"doctor's backend", []string{"doctor", "--socket", "/nonexistent", "--backend", "be"}},
		{"doctor's role", []string{"doctor", "--role", "nurse"}},
		{"doctor with an argument", []string{"doctor", "web"}},
		{"wait for how many", []string{"wait", "web", "--for", "ready=-1"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			stdout, stderr, code := s.rollcall(t, append(tt.args[:1:1], append(flagUnless(tt.name, "log level"), tt.args[1:]...)...)...)
			lines := strings.Count(strings.TrimSpace(stderr), "\n") + 1
			if code != exitUsage || lines != 1 || !strings.HasPrefix(stderr, "rollcall: ") || stdout != "" {
				t.Errorf("exit %d, %q, %q", code, stdout, stderr)
			}
			if strings.Contains(stderr, "secret") {
				t.Errorf("a password: %q", stderr)
			}
		})
	}
	if after := rdb.DBSize(t.Context()).Val(); after != before {
		t.Errorf("%d keys, %d before", after, before)
	}
}

// flagUnless silences the log, so that only the error itself is left.
func flagUnless(name, not string) []string {
	if name == not || name == "unknown command" || name == "argument" {
		return nil
	}
	return []string{"--log-level", "error"}
}

// TestOutput holds the forms of what the commands print.
func TestOutput(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	if out, _, code := s.rollcall(t, "services", "-o", "json"); code != 0 || strings.TrimSpace(out) != "[]" {
		t.Errorf("services of an empty registry: exit %d, %q", code, out)
	}
	side := s.spawn(t, "register", "--service", "web", "--addr", "127.0.0.1:9001", "--weight", "30", "--zone", "a", "--tag", "k=v")
	watch := s.spawn(t, "watch", "-o", "json")
	var rows []instanceRow
	haproxytest.Poll(t, "the instance is listed", func() error {
		out, _, _ := s.rollcall(t, "instances", "web", "-o", "json")
		if err := json.Unmarshal([]byte(out), &rows); err != nil || len(rows) != 1 {
			return fmt.Errorf("%v: %s", err, out)
		}
		return nil
	})
	if r := rows[0]; r.Addr != "127.0.0.1:9001" || r.State != "ready" || r.Weight != 30 || r.Zone != "a" || r.Tags["k"] != "v" || r.ID == "" || r.AgeMS > 15_000 {
		t.Errorf("%+v", r)
	}
	for _, step := range []struct {
		args  []string
		state string
		w     int
	}{
		{[]string{"drain", "web", "127.0.0.1:9001", "--reason", "why not"}, "drain", 30},
		{[]string{"maint", "--reason", "x", "web", "127.0.0.1:9001"}, "maint", 30},
		{[]string{"weight", "web", "127.0.0.1:9001", "0"}, "maint", 0},
		{[]string{"ready", "web", "127.0.0.1:9001"}, "ready", 0},
		{[]string{"weight", "web", "127.0.0.1:9001", "own"}, "ready", 30},
	} {
		out, stderr, code := s.rollcall(t, append(step.args, "-o", "json")...)
		var o outcome
		if err := json.Unmarshal([]byte(out), &o); err != nil || code != 0 || !o.Present || o.Version == 0 {
			t.Errorf("%v: exit %d, %v, %s%s", step.args, code, err, out, stderr)
		}
		list, _, _ := s.rollcall(t, "instances", "web", "-o", "json")
		if err := json.Unmarshal([]byte(list), &rows); err != nil || rows[0].State != step.state || rows[0].Weight != step.w {
			t.Errorf("%v: %s", step.args, list)
		}
	}
	if _, stderr, code := s.rollcall(t, "deregister", "--service", "web", "--addr", "127.0.0.1:9001"); code != exitFailed || !strings.Contains(stderr, "still beats") {
		t.Errorf("deregister of the living: exit %d, %s", code, stderr)
	}
	for _, verb := range [][]string{{"drain"}, {"maint"}, {"ready"}, {"weight", "20"}} {
		args := append([]string{verb[0], "web", "127.0.0.1:9009"}, verb[1:]...)
		if _, stderr, code := s.rollcall(t, args...); code != exitFailed || !strings.Contains(stderr, "no such instance; did you mean 127.0.0.1:9001?") {
			t.Errorf("%v: exit %d, %s", args, code, stderr)
		}
	}
	if _, stderr, code := s.rollcall(t, "drain", "web", "10.99.99.99:80"); code != exitFailed || !strings.Contains(stderr, "no such instance; see rollcall instances web, or say --absent") {
		t.Errorf("drain of nobody: exit %d, %s", code, stderr)
	}
	if _, stderr, code := s.rollcall(t, "drain", "wbe", "127.0.0.1:9001"); code != exitFailed || !strings.Contains(stderr, "nobody has ever registered as wbe; did you mean web?") {
		t.Errorf("drain of a service that nobody has: exit %d, %s", code, stderr)
	}
	if _, stderr, code := s.rollcall(t, "drain", "web", "127.0.0.1:9009", "--absent"); code != 0 || !strings.Contains(stderr, "no such instance now") {
		t.Errorf("drain of the absent: exit %d, %s", code, stderr)
	}
	if _, stderr, code := s.rollcall(t, "ready", "web", "127.0.0.1:9009"); code != 0 {
		t.Errorf("the end of that: exit %d, %s", code, stderr)
	}
	side.signal(t, syscall.SIGTERM)
	haproxytest.Poll(t, "watch has told it all", func() error {
		out := watch.out.String()
		for _, want := range []string{`"what":"here"`, `"state":"drain"`, `"state":"maint"`, `"weight":0`, `"what":"left"`} {
			if !strings.Contains(out, want) {
				return fmt.Errorf("no %s in %s", want, out)
			}
		}
		return nil
	})
	if code := watch.signal(t, syscall.SIGINT); code != 0 {
		t.Errorf("watch ends with %d", code)
	}
	// A Redis that hangs for longer than one exchange may take is asked again.
	s.redis.Signal(t, syscall.SIGSTOP)
	begun := time.Now()
	var commands []*process
	for _, args := range [][]string{{"services"}, {"instances", "web"}, {"lb"}, {"ready", "web", "127.0.0.1:9009", "--absent"}} {
		commands = append(commands, s.spawn(t, args...))
	}
	haproxytest.Poll(t, "the first exchange has timed out", func() error {
		if took := time.Since(begun); took < 1500*time.Millisecond {
			return fmt.Errorf("%v", took)
		}
		return nil
	})
	s.redis.Signal(t, syscall.SIGCONT)
	for _, p := range commands {
		<-p.done
		if code := p.cmd.ProcessState.ExitCode(); code != 0 {
			t.Errorf("%v: exit %d, %s", p.cmd.Args, code, p.out)
		}
	}
	s.redis.Kill(t)
	if _, stderr, code := s.rollcall(t, "services"); code != exitFailed || stderr == "" {
		t.Errorf("services without Redis: exit %d, %s", code, stderr)
	}
}
