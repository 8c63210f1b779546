package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// verdict is what a command says to a mistake: its exit code, and parts of the one line
// on standard error.
type verdict struct {
	code  int
	says  []string
	words []string // of the command line
}

var infoLine = regexp.MustCompile(`(?m)^\S+ INF .*\n`)

// answers polls until the command gives the answer. Lines at level info, which say what a
// command does, do not count.
func (s *system) answers(t *testing.T, a verdict) {
	t.Helper()
	haproxytest.Poll(t, fmt.Sprintf("rollcall %v: exit %d, %q", a.words, a.code, a.says), func() error {
		out, stderr, code := s.rollcall(t, a.words...)
		stderr = infoLine.ReplaceAllString(stderr, "")
		if code != a.code {
			return fmt.Errorf("exit %d, %s%s", code, out, stderr)
		}
		for _, part := range a.says {
			if !strings.Contains(stderr, part) {
				return fmt.Errorf("no %q in %s", part, stderr)
			}
		}
		if n := strings.Count(stderr, "\n"); n != min(1, len(a.says)) {
			return fmt.Errorf("%d lines: %s", n, stderr)
		}
		return nil
	})
}

// finds polls until doctor has a finding that is not ok of a check, by the end of its
// name, with these parts.
func (s *system) finds(t *testing.T, flags []string, check string, parts ...string) {
	t.Helper()
	haproxytest.Poll(t, fmt.Sprintf("doctor %v finds %s, %q", flags, check, parts), func() error {
		findings, _ := s.doctor(t, flags...)
	next:
		for _, f := range findings {
			if f.State == stateOK || !strings.HasSuffix(f.Check, check) {
				continue
			}
			for _, part := range parts {
				if !strings.Contains(f.Seen+"\n"+f.Fix, part) {
					continue next
				}
			}
			return nil
		}
		return fmt.Errorf("it finds\n%s", ill(findings))
	})
}

// TestFirstHour plays what goes wrong in a new user's first hour. Each mistake is answered
// by one line that names it and what to do, and by the exit code that the README's table
// has for it; doctor has a finding of each.
func TestFirstHour(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{
		{Name: "be_web", Slots: 5, Check: true}, {Name: "be_api", Slots: 5},
	}})}
	url := func(addr string, db int) string { return fmt.Sprintf("redis://%s/%d", addr, db) }
	cmd := func(words ...string) []string { return words }
	at := func(socket, backend string) []string { return []string{"--socket", socket, "--backend", backend} }
	lbsync := func(socket, backend string, more ...string) []string {
		return append(append([]string{"lbsync"}, at(socket, backend)...), more...)
	}
	wait := func(service, goal string) []string { return cmd("wait", service, "--for", goal, "--timeout", "200ms") }

	// Redis is not started, or something else listens at the port.
	s.redis.Kill(t)
	away := []string{s.redis.Addr + ": connect: connection refused", "is redis-server running there? --redis or ROLLCALL_REDIS says where it is"}
	for _, words := range [][]string{cmd("services"), cmd("instances", "web"), cmd("status"), cmd("explain", "web", "127.0.0.1:9001"), lbsync(s.ha.Socket, "web=be_web", "--once")} {
		s.answers(t, verdict{exitFailed, away, words})
	}
	s.answers(t, verdict{exitWait, away, wait("web", "ready=1")})
	s.finds(t, nil, "redis", away...)
	side := s.spawn(t, "register", "--service", "web", "--addr", "127.0.0.1:9001", "--log-level", "warn")
	side.says(t, "is redis-server running there?")
	side.signal(t, syscall.SIGKILL)
	s.redis.Launch(t)
	other := cmd("--redis", url(s.ha.Addr("be_web"), 0))
	noRedis := []string{s.ha.Addr("be_web") + " is no Redis: it says \"HTTP/1.", "let the URL name the port of redis-server"}
	s.answers(t, verdict{exitFailed, noRedis, append(other, "services")})
	s.finds(t, other, "redis", noRedis...)

	// The password is missing, or another one.
	locked := &system{redis: redistest.Start(t, "--requirepass", "secret")}
	without := []string{"NOAUTH", "it wants a password: set ROLLCALL_REDIS_PASSWORD, or ROLLCALL_REDIS_PASSWORD_FILE"}
	locked.answers(t, verdict{exitFailed, without, cmd("services")})
	locked.finds(t, nil, "redis", without...)
	locked.env = []string{"ROLLCALL_REDIS_PASSWORD=wrong"}
	wrong := []string{"WRONGPASS", "the password of user default is not the one of ROLLCALL_REDIS_PASSWORD"}
	locked.answers(t, verdict{exitFailed, wrong, cmd("services")})
	locked.finds(t, nil, "redis", wrong...)

	// Nobody has registered at all.
	empty := []string{"nobody has ever registered as web; this registry is empty: run rollcall register, or name another one"}
	s.answers(t, verdict{exitFailed, empty, cmd("instances", "web")})
	s.finds(t, nil, "registry", "no key of the namespace")
	s.answers(t, verdict{exitUsage, []string{`address "": want HOST:PORT`}, cmd("register", "--service", "web", "--log-level", "error")})

	// One has, and neither a reaper nor a balancer looks at it.
	web := haproxytest.NewInstance(t)
	addr := web.Addr().String()
	side = s.spawn(t, "register", "--service", "web", "--addr", addr)
	s.comes(t, addr)
	s.answers(t, verdict{exitFailed, []string{"no reaper is armed, so nobody is taken out", "no live balancer follows web: run rollcall lbsync --backend SERVICE=BACKEND beside HAProxy"}, cmd("status")})
	s.finds(t, nil, "reapers", "0 alive", "rollcall reap")
	s.finds(t, nil, "balancers of web", "none alive", "rollcall lbsync --backend web=BACKEND")
	followed := []string{"no live balancer follows web: run lbsync --backend web=BACKEND beside HAProxy"}
	s.answers(t, verdict{exitWait, followed, wait("web", "ready=1")})
	s.answers(t, verdict{exitWait, followed, cmd("ready", "web", addr, "--wait", "--timeout", "200ms")})

	// The number of the database, or the namespace, is another one's.
	s.answers(t, verdict{exitFailed, []string{"ERR DB index is out of range", "0 is always there"}, cmd("services", "--redis", url(s.redis.Addr, 99))})
	s.finds(t, cmd("--redis", url(s.redis.Addr, 99)), "redis", "DB index", "as the line says")
	for _, where := range [][]string{cmd("--redis", url(s.redis.Addr, 1)), cmd("--namespace", "other")} {
		there := "this registry is empty, but --redis " + url(s.redis.Addr, 0) + " --namespace rollcall has 1 service"
		s.answers(t, verdict{0, []string{there}, append(where, "services")})
		s.answers(t, verdict{exitFailed, []string{"nobody has ever registered as web; " + there}, append(where, "instances", "web")})
		s.answers(t, verdict{exitFailed, []string{there}, append(where, "status")})
		s.answers(t, verdict{exitFailed, []string{there}, append(where, "drain", "web", addr)})
		s.finds(t, where, "registry", there)
	}

	// The socket is not there, may not be written to, or is below level admin.
	nowhere := filepath.Join(filepath.Dir(s.ha.Socket), "adnim")
	for _, how := range []string{"--once", "--dry-run"} {
		s.answers(t, verdict{exitFailed, []string{"dial unix " + nowhere + ": connect: no such file or directory", "is HAProxy running"}, lbsync(nowhere, "web=be_web", how)})
		s.answers(t, verdict{exitFailed, []string{"backend be_web is not driven", "stats socket " + s.ha.OperatorSocket + " mode 660 level admin"}, lbsync(s.ha.OperatorSocket, "web=be_web", how)})
		// So is a backend that haproxy.cfg does not have.
		s.answers(t, verdict{exitFailed, []string{"backend be_wbe is not driven: no such backend; HAProxy has be_web, be_api; correct --backend"}, lbsync(s.ha.Socket, "web=be_wbe", how)})
	}
	s.finds(t, at(nowhere, "web=be_web"), "adnim", "no such file or directory", "check --socket")
	s.finds(t, at(s.ha.OperatorSocket, "web=be_web"), "operator level", "operator or user", "level admin")
	s.finds(t, at(s.ha.Socket, "web=be_wbe"), "be_wbe", "no such backend; HAProxy has be_web, be_api", "correct --backend")

	// Such lbsyncs run on: what follows web and serves nothing is named.
	reaper := s.spawn(t, "reap", "--ttl", "3s", "--heartbeat", "1s")
	reaper.says(t, "armed")
	for _, tt := range []struct{ socket, backend, says, waits string }{
		{nowhere, "be_web", "lb0/be_web: it says nothing of the 1 instances", "lb0: pending"},
		{s.ha.OperatorSocket, "be_web", "level admin", "level admin"},
		{s.ha.Socket, "be_wbe", "no such backend", "no such backend"},
	} {
		lb := s.spawn(t, lbsync(tt.socket, "web="+tt.backend, "--id", "lb0")...)
		s.answers(t, verdict{exitWait, []string{"0 of 1 instances serve; not " + addr, tt.waits}, wait("web", "ready=1")})
		s.answers(t, verdict{exitFailed, []string{tt.says}, cmd("status")})
		s.finds(t, nil, "serving of web", "lb0/"+tt.backend)
		lb.signal(t, syscall.SIGTERM)
	}

	// The service's name is mistyped.
	lb := s.spawn(t, lbsync(s.ha.Socket, "wbe=be_api", "--id", "lb2")...)
	meant := "nobody has ever registered as wbe; did you mean web?"
	for _, words := range [][]string{cmd("instances", "wbe"), cmd("explain", "wbe", addr), cmd("drain", "wbe", addr), cmd("weight", "wbe", addr, "5")} {
		s.answers(t, verdict{exitFailed, []string{meant}, words})
	}
	for _, how := range []string{"--dry-run", "--once"} {
		s.answers(t, verdict{0, []string{meant}, lbsync(s.ha.Socket, "wbe=be_web", how)})
	}
	s.answers(t, verdict{exitFailed, []string{"nobody has ever registered as wbe, which is followed by lb2 with backend be_api; did you mean web?"}, cmd("status")})
	s.finds(t, nil, "serving of wbe", "nobody has ever registered as wbe, which is followed by lb2 with backend be_api", "did you mean web?")
	lb.signal(t, syscall.SIGTERM)
	// wait says it at once, and again when it ends.
	haproxytest.Poll(t, "wait names the nearest", func() error {
		_, stderr, code := s.rollcall(t, wait("wbe", "ready=1")...)
		lines := strings.Split(strings.TrimSpace(stderr), "\n")
		if code != exitWait || len(lines) != 2 || !strings.Contains(lines[0], "WRN "+meant) || !strings.Contains(lines[1], meant) {
			return fmt.Errorf("exit %d, %s", code, stderr)
		}
		return nil
	})
	s.answers(t, verdict{exitFailed, []string{"no such instance; did you mean " + addr}, cmd("drain", "web", addr[:len(addr)-1]+"1")})

	// The instance's network is not allowed.
	lb = s.spawn(t, lbsync(s.ha.Socket, "web=be_web", "--id", "lb3")...)
	refused := "every balancer refuses " + addr
	s.answers(t, verdict{exitFailed, []string{"waiting cannot mend it: " + refused, "is in none of the allowed networks", "--allow"}, wait("web", "ready=1")})
	s.answers(t, verdict{exitFailed, []string{"web: " + refused, "is in none of the allowed networks", "see lbsync --allow"}, cmd("status")})
	s.finds(t, nil, "serving of web", "lb3/be_web", "excluded: "+addr, "--allow")
	lb.signal(t, syscall.SIGTERM)

	// HAProxy's check of it fails.
	s.spawn(t, lbsync(s.ha.Socket, "web=be_web", "--id", "lb3", "--allow", "127.0.0.0/8")...)
	s.answers(t, verdict{0, nil, wait("web", "ready=1")})
	s.answers(t, verdict{0, nil, cmd("status")})
	web.SetHealthy(false)
	down := addr + " at lb3/be_web: down (its health check in HAProxy fails)"
	s.answers(t, verdict{exitWait, []string{"not " + down, "rollcall explain web " + addr}, wait("web", "ready=1")})
	s.answers(t, verdict{exitFailed, []string{"web at lb3/be_web: none of 1 instances serves, down: " + addr + " (its health check in HAProxy fails)"}, cmd("status")})
	s.finds(t, nil, "serving of web", "down: "+addr, "the check of its backend in haproxy.cfg")
	web.SetHealthy(true)
	s.answers(t, verdict{0, nil, wait("web", "ready=1")})

	// An app does not listen: with a check of its own it is not registered, and without
	// HAProxy's finds it down.
	dead := freeAddr(t)
	checked := s.spawn(t, "register", "--service", "web", "--addr", dead, "--check", "tcp://"+dead, "--log-level", "warn")
	checked.says(t, "not healthy yet; it registers when it is")
	checked.says(t, "dial tcp "+dead+": connect: connection refused")
	s.answers(t, verdict{exitWait, []string{"1 of 2 instances serve; 1 are registered to serve"}, wait("web", "ready=2")})
	checked.signal(t, syscall.SIGKILL)
	unchecked := s.spawn(t, "register", "--service", "web", "--addr", dead)
	s.comes(t, dead)
	s.answers(t, verdict{exitWait, []string{"not " + dead + " at lb3/be_web: down"}, wait("web", "ready=2")})
	s.finds(t, nil, "serving of web", "lb3/be_web serves 1 of 2; down: "+dead)
	unchecked.signal(t, syscall.SIGTERM)

	// An instance is killed while no reaper runs: a TTL later it is called silent.
	reaper.signal(t, syscall.SIGTERM)
	side.signal(t, syscall.SIGKILL)
	silent := []string{"no reaper is armed, so nobody is taken out", "1 of 1 instances silent for longer than the TTL"}
	s.answers(t, verdict{exitWait, []string{"not " + addr + ", silent for "}, wait("web", "ready=1")})
	s.answers(t, verdict{exitFailed, silent, cmd("status")})
	s.finds(t, nil, "registry silence", "web "+addr)
	s.finds(t, nil, "reapers", "0 alive", "rollcall reap")
	if out, _, code := s.rollcall(t, "explain", "web", addr); code != 0 || !strings.Contains(out, "next: it is silent for longer than the TTL, and no reaper is armed to take it out: rollcall status") {
		t.Errorf("explain: exit %d, %s", code, out)
	}
	if _, err := os.Stat(nowhere); err == nil {
		t.Error("the socket is there")
	}
}
