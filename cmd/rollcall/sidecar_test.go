package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// around starts a register around an app. At the test's end it stops both; a
// killed sidecar would leave the app behind.
func (s *system) around(t *testing.T, args ...string) *process {
	t.Helper()
	p := s.spawn(t, append([]string{"register", "--service", "web"}, args...)...)
	t.Cleanup(func() {
		for range 3 { // leave, stop, kill
			_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
			select {
			case <-p.done:
			case <-time.After(sameStop * 5 / 4):
			}
		}
		p.signal(t, syscall.SIGTERM)
	})
	return p
}

// gone returns the register's note of addr.
func (s *system) gone(t *testing.T, addr string) string {
	t.Helper()
	return s.redis.Client(t).HGet(t.Context(), "rollcall:{web}:gone", addr).Val()
}

// token returns the id of the registration of addr, empty if it is absent.
func (s *system) token(t *testing.T, addr string) string {
	t.Helper()
	meta := s.redis.Client(t).HGet(t.Context(), "rollcall:{web}:meta", addr).Val()
	_, rest, _ := strings.Cut(meta, `"id":"`)
	id, _, _ := strings.Cut(rest, `"`)
	return id
}

// comes waits until addr is registered, and returns its token.
func (s *system) comes(t *testing.T, addr string) (token string) {
	t.Helper()
	haproxytest.Poll(t, addr+" is registered", func() error {
		if token = s.token(t, addr); token == "" {
			return errors.New("absent")
		}
		return nil
	})
	return token
}

// goes waits until addr is gone for that reason.
func (s *system) goes(t *testing.T, addr, reason string) {
	t.Helper()
	haproxytest.Poll(t, addr+" is "+reason, func() error {
		if note := s.gone(t, addr); s.token(t, addr) != "" || !strings.HasPrefix(note, reason+" ") {
			return fmt.Errorf("note %q", note)
		}
		return nil
	})
}

// TestHealthGate follows an instance that is unhealthy, healthy, unhealthy and
// healthy again.
func TestHealthGate(t *testing.T) {
	t.Parallel()
	for _, way := range []string{"http", "exec", "ready-file", "beat-file"} {
		t.Run(way, func(t *testing.T) {
			s := &system{redis: redistest.Start(t)}
			i := haproxytest.NewInstance(t)
			addr, file := i.Addr().String(), filepath.Join(t.TempDir(), "file")
			args := []string{"register", "--service", "web", "--addr", addr, "--check-interval", "50ms", "--check-timeout", "5s"}
			switch way {
			case "http":
				args = append(args, "--check", "http://"+addr+"/healthz")
			case "exec":
				args = append(args, "--check", "exec:test -e "+file)
			case "beat-file":
				args = append(args, "--beat-file", file, "--beat-file-age", "600ms")
			default:
				args = append(args, "--"+way, file)
			}
			healthy := func(yes bool) {
				i.SetHealthy(yes)
				var err error
				if yes {
					err = os.WriteFile(file, nil, 0o600) // a touch if it is there
				} else if err = os.Remove(file); os.IsNotExist(err) {
					err = nil
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			healthy(false)
			p := s.spawn(t, args...)
			haproxytest.Poll(t, "it has looked", func() error {
				if way == "http" && i.Checked() < 3 || !strings.Contains(p.out.String(), "registering") {
					return errors.New("no")
				}
				return nil
			})
			if s.token(t, addr) != "" {
				t.Error("registered without a success")
			}
			// becomes healthy until it is registered: whoever is late must not find a
			// touch too old.
			becomes := func() (token string) {
				haproxytest.Poll(t, addr+" is registered", func() error {
					healthy(true)
					if token = s.token(t, addr); token == "" {
						return errors.New("absent")
					}
					return nil
				})
				return token
			}
			first := becomes()
			if way != "beat-file" { // which just is not touched any more
				healthy(false)
			}
			s.goes(t, addr, "unhealthy")
			if second := becomes(); second == first {
				t.Errorf("it comes back as %s", second)
			}
			if code := p.signal(t, syscall.SIGTERM); code != 0 {
				t.Errorf("exit %d", code)
			}
			if way != "beat-file" { // which may be unhealthy by now
				s.goes(t, addr, "left")
			}
		})
	}
}

// TestAppCodes holds the exit codes of register around an app, which leaves when
// the app has ended.
func TestAppCodes(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	for script, want := range map[string]int{"exit 0": 0, "exit 3": 3, "exit 255": 255, "kill -9 $$": 137, "kill -USR1 $$": 138} {
		gate := filepath.Join(t.TempDir(), "go")
		p := s.around(t, "--addr", "127.0.0.1:9001", "--drain-wait", "1m", "--",
			"sh", "-c", "while ! test -e "+gate+"; do sleep 0.01; done; "+script)
		token := s.comes(t, "127.0.0.1:9001")
		if err := os.WriteFile(gate, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		select {
		case <-p.done:
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: it has not ended", script)
		}
		if got := p.cmd.ProcessState.ExitCode(); got != want {
			t.Errorf("%s: exit %d, want %d", script, got, want)
		}
		if note := s.gone(t, "127.0.0.1:9001"); !strings.HasPrefix(note, "left ") || !strings.HasSuffix(note, token) {
			t.Errorf("%s: the note is %q", script, note)
		}
	}
}

// TestSignals has the app get what is forwarded, and SIGTERM only when its
// instance has left.
func TestSignals(t *testing.T) {
	s := &system{redis: redistest.Start(t)}
	p := s.around(t, "--addr", "127.0.0.1:9001", "--", "sh", "-c", `
trap 'echo heard HUP' HUP; trap 'echo heard USR2' USR2
trap 'echo note=$(redis-cli -h `+s.redis.Host+` hget "rollcall:{web}:gone" 127.0.0.1:9001); exit 5' TERM
echo password=[$ROLLCALL_REDIS_PASSWORD] ready; while :; do sleep 0.02; done`)
	says := func(what string) {
		t.Helper()
		haproxytest.Poll(t, "it says "+what, func() error {
			if out := p.out.String(); !strings.Contains(out, what) {
				return errors.New(out)
			}
			return nil
		})
	}
	s.comes(t, "127.0.0.1:9001")
	says("ready")
	for name, sig := range map[string]syscall.Signal{"HUP": syscall.SIGHUP, "USR2": syscall.SIGUSR2} {
		if err := p.cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		says("heard " + name)
	}
	if code := p.signal(t, syscall.SIGTERM); code != 5 {
		t.Errorf("exit %d", code)
	}
	says("note=left ")
}

// TestStubbornApp is killed when it takes too long, and at one more signal, with
// all that it started.
func TestStubbornApp(t *testing.T) {
	s := &system{redis: redistest.Start(t)}
	for _, way := range []string{"timeout", "signal"} {
		timeout := "100ms"
		if way == "signal" {
			timeout = "1m"
		}
		p := s.around(t, "--addr", "127.0.0.1:9001", "--stop-timeout", timeout, "--",
			"sh", "-c", "trap '' TERM; sleep 300 & echo grandchild=$!. ; while :; do sleep 0.02; done")
		s.comes(t, "127.0.0.1:9001")
		haproxytest.Poll(t, "the app has set its trap", func() error {
			if out := p.out.String(); !strings.Contains(out, "grandchild=") {
				return errors.New(out)
			}
			return nil
		})
		if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		s.goes(t, "127.0.0.1:9001", "left")
		if way == "signal" {
			haproxytest.Poll(t, "it ends", func() error {
				_ = p.cmd.Process.Signal(syscall.SIGTERM) // the first may come before the app's wait
				select {
				case <-p.done:
					return nil
				default:
					return errors.New("it runs")
				}
			})
		}
		select {
		case <-p.done:
		case <-time.After(10 * time.Second):
			t.Fatal("it runs")
		}
		if code := p.cmd.ProcessState.ExitCode(); code != 137 {
			t.Errorf("%s: exit %d", way, code)
		}
		_, rest, _ := strings.Cut(p.out.String(), "grandchild=")
		pid, _, _ := strings.Cut(rest, ".")
		haproxytest.Poll(t, "the grandchild has ended", func() error {
			stat, err := os.ReadFile("/proc/" + pid + "/stat")
			if err == nil && !strings.Contains(string(stat), ") Z ") {
				return errors.New(string(stat))
			}
			return nil
		})
	}
}

// TestRollingRestart replaces apps, each with its sidecar around it, one by one
// and loses no request.
func TestRollingRestart(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 5, Balance: "roundrobin"}}})}
	url := "http://" + s.ha.Addr("be") + "/"
	s.spawn(t, "lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8")
	free := func() string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		return l.Addr().String()
	}
	run := func(addr string) *process {
		p := s.around(t, "--addr", addr, "--check", "http://"+addr+"/healthz", "--",
			binary(t), "demo-service", "--listen", addr)
		s.comes(t, addr)
		return p
	}
	applied := func(n int) {
		t.Helper()
		if _, stderr, code := s.rollcall(t, "wait", "web", "--for", "ready="+strconv.Itoa(n), "--timeout", "10s"); code != 0 {
			t.Fatal(stderr)
		}
	}
	addrs := []string{free(), free(), free()}
	var apps []*process
	for _, a := range addrs {
		apps = append(apps, run(a))
	}
	applied(3)
	haproxytest.Poll(t, "the balancer has spoken", func() error {
		if out, _, _ := s.rollcall(t, "lb"); !strings.Contains(out, "yes") {
			return errors.New(out)
		}
		return nil
	})
	l := startLoad(t, url)
	for i, a := range addrs {
		if code := apps[i].signal(t, syscall.SIGTERM); code != 0 {
			t.Errorf("exit %d", code)
		}
		if !strings.Contains(apps[i].out.String(), "drained") {
			t.Error("it did not drain")
		}
		apps[i] = run(a)
		applied(3)
	}
	l.stop()
	t.Logf("%d requests, %d failed", l.sent.Load(), l.failed.Load())
	if l.failed.Load() > 0 || l.sent.Load() < 20 {
		t.Errorf("%d of %d requests failed, the last with: %s", l.failed.Load(), l.sent.Load(), l.last)
	}
}

// TestNotify listens in systemd's place.
func TestNotify(t *testing.T) {
	dir, err := os.MkdirTemp("", "rc")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "s")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	hears := func(want string) {
		t.Helper()
		if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 1000)
		n, err := c.Read(buf)
		if got := string(buf[:n]); err != nil || !strings.HasPrefix(got, want) {
			t.Fatalf("heard %q, %v; want %q", got, err, want)
		}
	}
	t.Setenv("NOTIFY_SOCKET", path)
	s := &system{redis: redistest.Start(t)}
	i := haproxytest.NewInstance(t)
	i.SetHealthy(false)
	p := s.spawn(t, "register", "--service", "web", "--addr", i.Addr().String(), "--check", "http://"+i.Addr().String()+"/healthz", "--check-interval", "50ms")
	hears("STATUS=waiting for the first")
	i.SetHealthy(true)
	hears("STATUS=registered")
	hears("READY=1")
	i.SetHealthy(false)
	hears("STATUS=not registered: unhealthy: status 503")
	i.SetHealthy(true)
	hears("STATUS=registered")
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	hears("STOPPING=1")

	s.redis.Kill(t) // no reason to stop an app
	s.spawn(t, "register", "--service", "web", "--addr", "127.0.0.1:9001")
	for begun := time.Now(); ; {
		buf := make([]byte, 1000)
		n, err := c.Read(buf)
		if err != nil || time.Since(begun) > 10*time.Second {
			t.Fatalf("not ready without redis: %v", err)
		}
		if string(buf[:n]) == "READY=1" {
			break
		}
	}
}

// TestAdvertise sees which address is registered.
func TestAdvertise(t *testing.T) {
	s := &system{redis: redistest.Start(t)}
	for want, args := range map[string][]string{
		"127.0.0.1:81":   {"--addr", ":81", "--interface", "lo"},
		"10.9.8.7:82":    {"--addr", ":82", "--advertise", "10.9.8.7"},
		"10.9.8.7:83":    {"--addr", ":8080", "--advertise", "10.9.8.7:83"},
		"[fd00::1]:8484": {"--addr", ":8484", "--advertise", "fd00::1"},
	} {
		p := s.spawn(t, append([]string{"register", "--service", "web"}, args...)...)
		s.comes(t, want)
		if !strings.Contains(p.out.String(), "addr="+want) {
			t.Errorf("it does not print %s", want)
		}
	}
}
