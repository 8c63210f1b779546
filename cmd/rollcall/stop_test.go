package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/docker/dockertest"
	"rollcall/registrar/redistest"
)

func TestStops(t *testing.T) {
	for _, c := range []struct {
		name string
		at   []time.Duration // of the signals
		want int
	}{
		{"one", []time.Duration{0}, 1},
		{"two at once", []time.Duration{0, 0}, 1},
		{"two within a millisecond", []time.Duration{0, time.Millisecond}, 1},
		{"just the same", []time.Duration{0, sameStop - 1}, 1},
		{"just another", []time.Duration{0, sameStop}, 2},
		{"from the last that counted", []time.Duration{0, sameStop - 1, sameStop, 2*sameStop - 1}, 2},
		{"three", []time.Duration{0, time.Millisecond, sameStop, sameStop + 1, 2 * sameStop}, 3},
		{"one that was heard late", []time.Duration{0, -time.Second}, 1},
	} {
		var s stops
		now := time.Now()
		for _, d := range c.at {
			s.hear(now.Add(d))
		}
		if s.n != c.want {
			t.Errorf("%s: %d, want %d", c.name, s.n, c.want)
		}
	}
}

// ends waits until p has ended by itself.
func (p *process) ends(t *testing.T) (code int) {
	t.Helper()
	select {
	case <-p.done:
	case <-time.After(30 * time.Second):
		t.Fatalf("%v does not end", p.cmd.Args)
	}
	return p.cmd.ProcessState.ExitCode()
}

// balanced starts a Redis, an HAProxy and its lbsync, which drives backend be for
// the service web, and that service's first instance. config is the registry's, if it
// is not to be as usual.
func balanced(t *testing.T, config ...any) (s *system, lb *process) {
	t.Helper()
	s = &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 4, Balance: "roundrobin"}}})}
	if len(config) > 0 {
		if err := s.redis.Client(t).HSet(t.Context(), "rollcall:config", config...).Err(); err != nil {
			t.Fatal(err)
		}
	}
	lb = s.spawn(t, "lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8")
	s.spawn(t, "register", "--service", "web", "--addr", haproxytest.NewInstance(t).Addr().String())
	haproxytest.Poll(t, "the balancer has spoken", func() error {
		if out, stderr, _ := s.rollcall(t, "lb"); !strings.Contains(out, "yes") {
			return errors.New(out + stderr)
		}
		return nil
	})
	return s, lb
}

// serving waits until every live balancer sends requests to n instances of web.
func (s *system) serving(t *testing.T, n string) {
	t.Helper()
	if _, stderr, code := s.rollcall(t, "wait", "web", "--for", "ready="+n, "--timeout", "20s"); code != 0 {
		t.Fatal(stderr)
	}
}

// draining waits until the register says that addr drains.
func (s *system) draining(t *testing.T, addr string) {
	t.Helper()
	haproxytest.Poll(t, addr+" drains", func() error {
		if meta := s.redis.Client(t).HGet(t.Context(), "rollcall:{web}:meta", addr).Val(); !strings.Contains(meta, `"draining":true`) {
			return errors.New(meta)
		}
		return nil
	})
}

// none fails the test if a request failed.
func (l *load) none(t *testing.T) {
	t.Helper()
	l.stop()
	t.Logf("%d requests, %d failed", l.sent.Load(), l.failed.Load())
	if l.failed.Load() > 0 || l.sent.Load() < 20 {
		t.Errorf("%d of %d requests failed, the last with: %s", l.failed.Load(), l.sent.Load(), l.last)
	}
}

// TestTwoStops stops a sidecar whose balancer takes its time, by two signals. Two at
// once are one: it waits until the balancer has drained its instance. Two that are
// apart are two.
func TestTwoStops(t *testing.T) {
	t.Parallel()
	s, lb := balanced(t)
	for _, c := range []struct {
		name   string
		second syscall.Signal
		pause  time.Duration
		drains bool
	}{
		{"SIGTERM and SIGTERM at once", syscall.SIGTERM, time.Millisecond, true}, // at the same time the kernel makes one of them
		{"SIGINT and SIGTERM at once", syscall.SIGINT, 0, true},
		{"two that are apart", syscall.SIGTERM, sameStop + sameStop/5, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			i := haproxytest.NewInstance(t)
			addr := i.Addr().String()
			p := s.spawn(t, "register", "--service", "web", "--addr", addr, "--drain-wait", "8s")
			s.comes(t, addr)
			s.serving(t, "2")
			l := startLoad(t, "http://"+s.ha.Addr("be")+"/")
			defer l.stop()
			haproxytest.Poll(t, "it gets requests", func() error {
				if i.Served() == 0 || l.sent.Load() < 20 {
					return fmt.Errorf("%d of %d", i.Served(), l.sent.Load())
				}
				return nil
			})
			send(t, lb, syscall.SIGSTOP)
			defer send(t, lb, syscall.SIGCONT)
			send(t, p, syscall.SIGTERM)
			time.Sleep(c.pause) // what is tested
			send(t, p, c.second)
			if c.drains {
				s.draining(t, addr)
				p.took(t) // the second one
				send(t, lb, syscall.SIGCONT)
			}
			if code := p.ends(t); code != 0 {
				t.Errorf("exit %d", code)
			}
			out := p.out.String()
			if drained := strings.Contains(out, "INF drained "); drained != c.drains {
				t.Errorf("drained %v, want %v", drained, c.drains)
			}
			if left := strings.Contains(out, "leaving before every balancer has drained this instance"); left == c.drains {
				t.Errorf("left before it was drained: %v", left)
			}
			s.goes(t, addr, "left")
			if c.drains { // else the balancer stands still while the app goes on
				l.none(t)
			}
		})
	}
}

// TestStopWithoutRedis stops sidecars that cannot tell anybody: a second signal ends
// the wait for that, and so does Redis' return, also when the app has ended by itself.
func TestStopWithoutRedis(t *testing.T) {
	t.Parallel()
	for _, way := range []string{"a second signal", "redis is back", "the app has ended"} {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			s := &system{redis: redistest.Start(t, "--appendonly", "yes", "--appendfsync", "always")}
			addr, gate := freeAddr(t), filepath.Join(t.TempDir(), "go")
			p := s.spawn(t, "register", "--service", "web", "--addr", addr, "--leave-wait", "5m", "--drain-wait", "0s", "--",
				"sh", "-c", "while ! test -e "+gate+"; do sleep 0.01; done; exit 3")
			s.comes(t, addr)
			s.redis.Kill(t)
			if way == "the app has ended" {
				if err := os.WriteFile(gate, nil, 0o600); err != nil {
					t.Fatal(err)
				}
				p.says(t, "app ended")
			} else {
				send(t, p, syscall.SIGTERM)
			}
			time.Sleep(sameStop + sameStop/5) // two that are apart
			select {
			case <-p.done:
				t.Errorf("it has ended, and nobody knows\n%s", p.out)
			default:
			}
			if way == "a second signal" {
				send(t, p, syscall.SIGTERM)
				p.ends(t)
				p.says(t, "left without telling: redis is away")
				return
			}
			s.redis.Launch(t)
			code := p.ends(t)
			if want := map[string]int{"redis is back": 143, "the app has ended": 3}[way]; code != want {
				t.Errorf("exit %d, want %d", code, want)
			}
			s.goes(t, addr, "left")
		})
	}
}

// TestTimeout has GNU timeout end a sidecar and its app: it signals the process, and
// then the group that it leads.
func TestTimeout(t *testing.T) {
	t.Parallel()
	timeout, err := exec.LookPath("timeout")
	if err != nil {
		t.Fatal(err)
	}
	s, lb := balanced(t)
	addr := freeAddr(t)
	args := []string{"8", binary(t), "register", "--service", "web", "--addr", addr, "--drain-wait", "20s", "--check", "http://" + addr + "/healthz", "--",
		binary(t), "demo-service", "--listen", addr}
	p := (&system{redis: s.redis, program: timeout}).spawn(t, args...)
	s.comes(t, addr)
	s.serving(t, "2")
	l := startLoad(t, "http://"+s.ha.Addr("be")+"/")
	defer l.stop()
	send(t, lb, syscall.SIGSTOP)
	defer send(t, lb, syscall.SIGCONT)
	s.draining(t, addr)
	p.took(t) // timeout sends the second at once after the first, and the drain waits
	send(t, lb, syscall.SIGCONT)
	if code := p.ends(t); code != 124 { // timeout's own
		t.Errorf("exit %d", code)
	}
	p.says(t, "INF drained ")
	l.none(t)
}

// TestTwoStopsOfDaemons has two signals at once come to daemons that take their time
// to end. None is killed by the second.
func TestTwoStopsOfDaemons(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"lbsync", "reap", "serve"} {
		t.Run(name, func(t *testing.T) {
			s := &system{redis: redistest.Start(t)}
			args := map[string][]string{"reap": {"--ttl", "3s"}, "serve": {"--listen", "127.0.0.1:0"}}[name]
			ready := map[string]string{"reap": "armed", "serve": "serving"}[name]
			if name == "lbsync" {
				s.ha = haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 1}}})
				args = []string{"--socket", s.ha.Socket, "--backend", "web=be"}
				ready = "balancer found"
			}
			p := s.spawn(t, append([]string{name}, args...)...)
			p.says(t, ready)
			s.redis.Signal(t, syscall.SIGSTOP) // so that what is still to be told takes its time
			send(t, p, syscall.SIGTERM)
			p.took(t)
			_ = p.cmd.Process.Signal(syscall.SIGINT) // it may have ended
			defer s.redis.Signal(t, syscall.SIGCONT)
			if code := p.ends(t); code != 0 {
				t.Errorf("%v", p.cmd.ProcessState)
			}
		})
	}
}

// TestEngineTwoStops is the same for docker --leave, whose drain a balancer must
// acknowledge.
func TestEngineTwoStops(t *testing.T) {
	t.Parallel()
	e := dockertest.Shared(t)
	s := &system{redis: redistest.Start(t)}
	addr := e.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: map[string]string{"SERVICE_NAME": "web"}}).Addr(t, "8080").String()
	p := s.spawn(t, "docker", "--engine", e.URL, "--advertise", e.Host, "--explicit", "--leave", "--drain-wait", "8s")
	s.comes(t, addr)
	store, err := registrar.NewStore(s.redis.Client(t), registrar.DefaultNamespace)
	if err != nil {
		t.Fatal(err)
	}
	acked := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		snap, err := store.Read(ctx, "web", nil)
		if err != nil {
			return err
		}
		return store.Acker("lb").Ack(ctx, "web", snap.Token)
	}
	haproxytest.Poll(t, "a balancer lives", acked)
	send(t, p, syscall.SIGTERM)
	s.draining(t, addr)
	send(t, p, syscall.SIGINT)
	p.took(t)
	haproxytest.Poll(t, "the balancer has drained it", acked)
	if code := p.ends(t); code != 0 {
		t.Errorf("%v", p.cmd.ProcessState)
	}
	s.goes(t, addr, "left")
	p.says(t, "drained")
}

// took waits until no signal to stop waits in the kernel to be taken by p or, where p
// was started through another program, by the processes that it started.
func (p *process) took(t *testing.T) {
	t.Helper()
	const stops = 1<<(syscall.SIGINT-1) | 1<<(syscall.SIGTERM-1)
	pids := append(children(t, p.cmd.Process.Pid), p.cmd.Process.Pid)
	haproxytest.Poll(t, "signals are taken", func() error {
		for _, pid := range pids {
			status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
			if errors.Is(err, fs.ErrNotExist) {
				continue // it has ended
			}
			if err != nil {
				return err
			}
			_, rest, _ := strings.Cut(string(status), "\nShdPnd:\t")
			mask, _, _ := strings.Cut(rest, "\n")
			if n, err := strconv.ParseUint(mask, 16, 64); err != nil || n&stops != 0 {
				return fmt.Errorf("process %d: %q: %v", pid, mask, err)
			}
		}
		return nil
	})
}

// children returns the processes that pid started and that live.
func children(t *testing.T, pid int) (pids []int) {
	t.Helper()
	list, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	for _, f := range strings.Fields(string(list)) {
		child, err := strconv.Atoi(f)
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, child)
	}
	return pids
}

func send(t *testing.T, p *process, sig syscall.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}
