package main

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// serverStates reads addr's server from HAProxy: "ready", how else it is, or absent.
func serverStates(socket, addr string) (string, error) {
	c, err := net.DialTimeout("unix", socket, 5*time.Second)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintln(c, "show servers state be"); err != nil {
		return "", err
	}
	lines := bufio.NewScanner(c)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 19 || f[4]+":"+f[18] != addr {
			continue
		}
		// 1, 2 and 32 are maint, 8 and 16 are drain; 4 only says that the configuration has
		// "disabled", as that of a slot.
		if admin, err := strconv.Atoi(f[6]); err == nil && f[5] == "2" && admin&(1|2|32|8|16) == 0 && f[7] != "0" {
			return "ready", nil
		}
		return fmt.Sprintf("op_state %s admin_state %s weight %s", f[5], f[6], f[7]), nil
	}
	return "absent", lines.Err()
}

// watchServer looks at addr's server all the time. What it returns ends that, and
// fails the test if the server was not ready once.
func (s *system) watchServer(t *testing.T, addr string) (always func()) {
	t.Helper()
	haproxytest.Poll(t, addr+" is ready", func() error {
		state, err := serverStates(s.ha.Socket, addr)
		if err == nil && state != "ready" {
			err = errors.New(state)
		}
		return err
	})
	end := make(chan struct{})
	var looks int
	var seen []string
	var watching sync.WaitGroup
	watching.Go(func() {
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-end:
				return
			case <-tick.C:
			}
			state, err := serverStates(s.ha.Socket, addr)
			if err != nil {
				state = err.Error()
			}
			if looks++; state != "ready" && !slices.Contains(seen, state) {
				seen = append(seen, state)
			}
		}
	})
	stop := sync.OnceFunc(func() { close(end); watching.Wait() })
	t.Cleanup(stop)
	return func() {
		t.Helper()
		stop()
		t.Logf("%d looks at %s", looks, addr)
		if len(seen) > 0 || looks == 0 {
			t.Errorf("%s was not always ready, of %d looks: %v", addr, looks, seen)
		}
	}
}

// meta returns the metadata of addr.
func (s *system) meta(t *testing.T, addr string) string {
	t.Helper()
	return s.redis.Client(t).HGet(t.Context(), "rollcall:{web}:meta", addr).Val()
}

// takeovers counts them.
func (s *system) takeovers(t *testing.T) int {
	t.Helper()
	out, stderr, code := s.rollcall(t, "events", "web", "-n", "1000")
	if code != 0 {
		t.Error(stderr)
	}
	return strings.Count(out, "takeover")
}

// quick is balanced with a heartbeat of a second, and a reaper that is armed.
func quick(t *testing.T) *system {
	t.Helper()
	s, _ := balanced(t, "ttl_ms", 3000, "interval_ms", 1000)
	s.spawn(t, "reap", "--ttl", "3s", "--heartbeat", "1s").says(t, "armed")
	return s
}

// idFiles returns the files of sidecars in dir.
func idFiles(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.id"))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// TestKilledComesBack kills a sidecar, with and without the app that it is around,
// and starts it again: it is the same registration, to the last byte, and HAProxy has
// seen nothing.
func TestKilledComesBack(t *testing.T) {
	t.Parallel()
	for _, around := range []bool{false, true} {
		t.Run(fmt.Sprintf("around=%v", around), func(t *testing.T) {
			s, _ := balanced(t)
			dir := t.TempDir()
			s.env = []string{"RUNTIME_DIRECTORY=" + dir}
			addr := freeAddr(t)
			args := []string{"register", "--service", "web", "--addr", addr, "--zone", "z", "--tag", "k=v"}
			var i *haproxytest.Instance
			if !around {
				i = haproxytest.NewInstance(t)
				addr = i.Addr().String()
				args[4] = addr
			}
			start := func(more ...string) *process {
				if around {
					return s.spawn(t, append(append(slices.Clone(args), more...), "--", binary(t), "demo-service", "--listen", addr)...)
				}
				return s.spawn(t, append(slices.Clone(args), more...)...)
			}
			kill := func(p *process) {
				if around {
					_, rest, _ := strings.Cut(p.out.String(), "pid=")
					pid := 0
					if _, err := fmt.Sscan(rest, &pid); err != nil {
						t.Fatal(err)
					}
					send(t, p, syscall.SIGKILL)
					if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
						t.Fatal(err)
					}
				}
				p.signal(t, syscall.SIGKILL)
			}
			p := start()
			s.comes(t, addr)
			s.serving(t, "2")
			meta := s.meta(t, addr)
			always := s.watchServer(t, addr)
			var l *load
			if !around { // else nobody answers while the app is dead
				l = startLoad(t, "http://"+s.ha.Addr("be")+"/")
				defer l.stop()
			}
			for range 3 {
				kill(p)
				if files := idFiles(t, dir); len(files) != 1 {
					t.Fatalf("files %v", files)
				}
				p = start()
				p.says(t, "going on as its registration")
				p.says(t, "status=OK")
				if now := s.meta(t, addr); now != meta {
					t.Errorf("metadata\n%s, was\n%s", now, meta)
				}
			}
			kill(p)
			token := s.token(t, addr)
			p = start("--tag", "k=w") // it is changed, and still the same
			p.says(t, "status=CHANGED")
			if now := s.token(t, addr); now != token {
				t.Errorf("it is %s, was %s", now, token)
			}
			s.serving(t, "2")
			if l != nil {
				l.none(t)
			}
			always()
			if n := s.takeovers(t); n > 0 {
				t.Errorf("%d takeovers", n)
			}
			if code := p.signal(t, syscall.SIGTERM); code != 0 {
				t.Errorf("exit %d", code)
			}
			s.goes(t, addr, "left")
			if files := idFiles(t, dir); len(files) > 0 {
				t.Errorf("it has left %v", files)
			}
		})
	}
}

// TestKilledWithoutAFile kills a sidecar that could keep no id, and starts it again:
// it waits until the old registration has missed its heartbeats, and takes it over
// before its TTL ends. HAProxy has seen nothing.
func TestKilledWithoutAFile(t *testing.T) {
	t.Parallel()
	s := quick(t)
	i := haproxytest.NewInstance(t)
	addr := i.Addr().String()
	args := []string{"register", "--service", "web", "--addr", addr, "--id-file", ""}
	p := s.spawn(t, args...)
	first := s.comes(t, addr)
	s.serving(t, "2")
	l := startLoad(t, "http://"+s.ha.Addr("be")+"/")
	defer l.stop()
	always := s.watchServer(t, addr)
	for n := range 3 {
		p.signal(t, syscall.SIGKILL)
		m := s.monitor(t, args...)
		m.says(t, "another registration holds this address")
		m.ready(t, "another registration holds the address, until it misses its heartbeats")
		m.says(t, "status=TAKEN")
		m.ready(t, "ok")
		if token := s.token(t, addr); token == first {
			t.Errorf("it is %s again", token)
		}
		if got := s.takeovers(t); got != n+1 {
			t.Errorf("%d takeovers, want %d", got, n+1)
		}
		if got := strings.Count(m.out.String(), "another registration holds"); got != 1 {
			t.Errorf("said %d times", got)
		}
		p = m.process
	}
	l.none(t)
	always()
	if out, _, _ := s.rollcall(t, "events", "web"); strings.Contains(out, "expired") {
		t.Errorf("it has expired:\n%s", out)
	}
}

// TestSecondSidecar starts a second sidecar of one instance, on the same host or in
// another container, and stops it. Nothing happens to the first.
func TestSecondSidecar(t *testing.T) {
	t.Parallel()
	s := quick(t)
	dir := t.TempDir()
	s.env = []string{"RUNTIME_DIRECTORY=" + dir}
	i := haproxytest.NewInstance(t)
	addr := i.Addr().String()
	args := []string{"register", "--service", "web", "--addr", addr}
	first := s.spawn(t, args...)
	token := s.comes(t, addr)
	s.serving(t, "2")
	l := startLoad(t, "http://"+s.ha.Addr("be")+"/")
	defer l.stop()
	always := s.watchServer(t, addr)
	for _, more := range [][]string{nil, {"--id-file", ""}, {"--tag", "other=one"}} {
		m := s.monitor(t, append(slices.Clone(args), more...)...)
		m.says(t, "another registration holds this address")
		if locked := strings.Contains(m.out.String(), "another sidecar has the file"); locked != (len(more) == 0 || more[0] != "--id-file") {
			t.Errorf("%v: it found the file locked: %v", more, locked)
		}
		m.ready(t, "another registration holds the address")
		m.shows(t, `rollcall_beat_failures_total{cause="not_owner"}`, 4, many) // more than two intervals
		begun := time.Now()
		if code := m.signal(t, syscall.SIGTERM); code != 0 {
			t.Errorf("%v: exit %d", more, code)
		}
		t.Logf("%v: it ended after %v", more, time.Since(begun))
		if out := m.out.String(); !strings.Contains(out, "nothing to leave") || strings.Count(out, "another registration holds this address; trying") != 1 {
			t.Errorf("%v: it does not say so, or too often", more)
		}
		if now := s.token(t, addr); now != token {
			t.Errorf("%v: the register has %s, had %s", more, now, token)
		}
	}
	// One that is stopped at once cannot know yet whether the first still beats.
	p := s.spawn(t, args...)
	p.says(t, "another registration holds this address")
	if code := p.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
	l.none(t)
	always()
	if s.takeovers(t) > 0 || s.gone(t, addr) != "" {
		t.Errorf("%d takeovers, a note %q", s.takeovers(t), s.gone(t, addr))
	}
	if code := first.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
	if note := s.gone(t, addr); !strings.HasPrefix(note, "left ") || !strings.HasSuffix(note, token) || len(idFiles(t, dir)) > 0 {
		t.Errorf("the first has left as %q, and %v", note, idFiles(t, dir))
	}
}

// TestTwoAtOnce starts two sidecars of one instance at the same time: one has the file,
// and one is registered.
func TestTwoAtOnce(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	dir := t.TempDir()
	s.env = []string{"RUNTIME_DIRECTORY=" + dir}
	for n := range 20 {
		addr := fmt.Sprintf("10.0.0.%d:80", n+1)
		args := []string{"register", "--service", "web", "--addr", addr, "--drain-wait", "0s"}
		two := []*process{s.spawn(t, args...), s.spawn(t, args...)}
		haproxytest.Poll(t, "both have beaten", func() error {
			for _, p := range two {
				if out := p.out.String(); !strings.Contains(out, "INF registered") && !strings.Contains(out, "another registration holds") {
					return errors.New(out)
				}
			}
			return nil
		})
		locked, registered := 0, 0
		for _, p := range two {
			if !strings.Contains(p.out.String(), "another sidecar has the file") {
				locked++
			}
			if strings.Contains(p.out.String(), "INF registered") {
				registered++
			}
		}
		if locked != 1 || registered != 1 {
			t.Errorf("%d have the file, %d are registered", locked, registered)
		}
		for _, p := range two {
			if code := p.signal(t, syscall.SIGTERM); code != 0 {
				t.Errorf("exit %d", code)
			}
		}
		if files := idFiles(t, dir); len(files) > 0 {
			t.Errorf("they have left %v", files)
		}
	}
}

// TestStopInTheWait kills a sidecar, starts another one for the same instance, and
// stops that before it has beaten successfully. HAProxy still has the server: it
// drains, and then leaves.
func TestStopInTheWait(t *testing.T) {
	t.Parallel()
	s, _ := balanced(t, "ttl_ms", 12000, "interval_ms", 2000)
	for _, c := range []struct {
		name  string
		args  []string
		says  string        // before it is stopped
		again time.Duration // until a second signal; 0: none
	}{
		{"without a file", []string{"--id-file", ""}, "another registration holds this address", 0},
		{"without a file, its check fails", []string{"--id-file", "", "--check"}, "registering", 0},
		{"with a file, its check fails", []string{"--check"}, "going on as its registration", 0},
		{"in a hurry", []string{"--id-file", ""}, "another registration holds this address", sameStop * 6 / 5},
	} {
		t.Run(c.name, func(t *testing.T) {
			i := haproxytest.NewInstance(t)
			addr := i.Addr().String()
			args := append([]string{"register", "--service", "web", "--addr", addr}, c.args...)
			if c.args[len(c.args)-1] == "--check" {
				args = append(args, "http://"+addr+"/healthz", "--check-interval", "50ms")
			}
			first := s.spawn(t, args...)
			token := s.comes(t, addr)
			s.serving(t, "2")
			l := startLoad(t, "http://"+s.ha.Addr("be")+"/")
			defer l.stop()
			first.signal(t, syscall.SIGKILL)
			killed := time.Now()
			i.SetHealthy(false)
			p := s.spawn(t, args...)
			p.says(t, c.says)
			send(t, p, syscall.SIGTERM)
			if c.again > 0 {
				time.Sleep(c.again) // what is tested
				send(t, p, syscall.SIGTERM)
			}
			if code := p.ends(t); code != 0 {
				t.Errorf("exit %d", code)
			}
			t.Logf("it ended %v after the kill", time.Since(killed))
			if c.again > 0 {
				if now := s.token(t, addr); now != token || !strings.Contains(p.out.String(), "nothing to leave") {
					t.Errorf("the register has %s, had %s", now, token)
				}
				return
			}
			p.says(t, "INF drained")
			s.goes(t, addr, "left")
			haproxytest.Poll(t, "HAProxy has it no more", func() error {
				state, err := serverStates(s.ha.Socket, addr)
				if err == nil && state != "absent" {
					err = errors.New(state)
				}
				return err
			})
			l.none(t)
		})
	}
}

// TestStopInTheWaitWithItsRights does that with the rights of a sidecar alone.
func TestStopInTheWaitWithItsRights(t *testing.T) {
	s := &system{redis: startRoles(t)}
	root := s.redis.Client(t)
	if err := root.HSet(t.Context(), "rollcall:config", "ttl_ms", 3000, "interval_ms", 1000).Err(); err != nil {
		t.Fatal(err)
	}
	const addr = "10.0.0.7:80"
	args := []string{"register", "--redis", roleURL(s.redis, "sidecar-web"), "--service", "web", "--addr", addr, "--id-file", ""}
	first := s.spawn(t, args...)
	s.comes(t, addr)
	first.signal(t, syscall.SIGKILL)
	p := s.spawn(t, args...)
	p.says(t, "another registration holds this address")
	if code := p.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
	p.says(t, "INF drained")
	s.goes(t, addr, "left")
	if refused, err := root.ACLLog(t.Context(), 10).Result(); err != nil || len(refused) > 0 {
		t.Errorf("refused: %+v, %v", refused, err)
	}
}

// TestManyAtOneAddress: an instance of two services, and of two registries, has an id
// in each.
func TestManyAtOneAddress(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t), env: []string{"RUNTIME_DIRECTORY=" + t.TempDir()}}
	other := &system{redis: redistest.Start(t), env: s.env}
	const addr = "10.0.0.7:80"
	var all []*process
	for _, args := range [][]string{{"web"}, {"api"}, {"web", "--namespace", "test"}} {
		all = append(all, s.spawn(t, append([]string{"register", "--addr", addr, "--service"}, args...)...))
	}
	all = append(all, other.spawn(t, "register", "--addr", addr, "--service", "web"))
	for _, p := range all {
		p.says(t, "INF registered")
		if out := p.out.String(); strings.Contains(out, "WRN") {
			t.Error(out)
		}
	}
}

// TestLeftIDIsNotUsedAgain has a file hold the id of a registration that has left.
func TestLeftIDIsNotUsedAgain(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	path := filepath.Join(t.TempDir(), "id")
	const addr = "10.0.0.7:80"
	args := []string{"--addr", addr, "--id-file", path, "--", "sh", "-c", "while :; do sleep 0.02; done"}
	p := s.around(t, args...)
	token := s.comes(t, addr)
	text, err := os.ReadFile(path)
	if err != nil || !strings.Contains(string(text), token) {
		t.Fatalf("%s, %v", text, err)
	}
	p.signal(t, syscall.SIGTERM)
	s.goes(t, addr, "left")
	if err := os.WriteFile(path, text, 0o600); err != nil { // as if it had been killed just then
		t.Fatal(err)
	}
	p = s.around(t, args...)
	p.says(t, "the registration had left; making a new one")
	again := s.comes(t, addr)
	if text, err = os.ReadFile(path); err != nil || again == token || !strings.Contains(string(text), again) {
		t.Errorf("it is %s, was %s; %s, %v", again, token, text, err)
	}
	if strings.Contains(p.out.String(), "app ended") {
		t.Error("its app has ended")
	}
}

// TestIDFollowsHealth: the file has the id of the registration that there is.
func TestIDFollowsHealth(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	path := filepath.Join(t.TempDir(), "id")
	i := haproxytest.NewInstance(t)
	addr := i.Addr().String()
	p := s.spawn(t, "register", "--service", "web", "--addr", addr, "--id-file", path, "--check", "http://"+addr+"/healthz", "--check-interval", "50ms")
	kept := func() string {
		text, _ := os.ReadFile(path)
		return string(text)
	}
	for range 2 {
		token := s.comes(t, addr)
		if got := kept(); !strings.Contains(got, token) {
			t.Errorf("it is %s, kept is %s", token, got)
		}
		i.SetHealthy(false)
		s.goes(t, addr, "unhealthy")
		haproxytest.Poll(t, "nothing is kept", func() error {
			if got := kept(); got != "" {
				return errors.New(got)
			}
			return nil
		})
		i.SetHealthy(true)
	}
	s.comes(t, addr)
	if code := p.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("after it has left: %v", err)
	}
}

// TestIDFileThatIsNone: whatever is there, the sidecar starts, with one line.
func TestIDFileThatIsNone(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	dir := t.TempDir()
	if err := errors.Join(
		syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600),
		os.Mkdir(filepath.Join(dir, "dir"), 0o700),
		os.WriteFile(filepath.Join(dir, "garbage"), []byte("garbage"), 0o600),
		os.WriteFile(filepath.Join(dir, "truncated"), []byte(`{"rollcall_id":1,"id":`), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	for n, name := range []string{"pipe", "dir", "garbage", "truncated", "none/id"} {
		addr := fmt.Sprintf("10.0.0.%d:80", n+1)
		p := s.spawn(t, "register", "--service", "web", "--addr", addr, "--id-file", filepath.Join(dir, name))
		s.comes(t, addr)
		p.says(t, "INF registered")
		if out := p.out.String(); strings.Count(out, "WRN") != 1 || !strings.Contains(out, "id_file="+filepath.Join(dir, name)) {
			t.Errorf("%s: %s", name, out)
		}
		if code := p.signal(t, syscall.SIGTERM); code != 0 {
			t.Errorf("%s: exit %d", name, code)
		}
	}
}
