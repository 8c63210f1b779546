package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// TestServing: what HAProxy does not serve is not said to be ready, whatever the reason,
// and each command says what is missing.
func TestServing(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{
		{Name: "be", Slots: 2, Check: true, Balance: "source", Extra: []string{"default-server inter 100ms fall 1 rise 1", "hash-type map-based"}},
	}})}
	becomes := func(code int, says string, args ...string) {
		t.Helper()
		haproxytest.Poll(t, fmt.Sprintf("rollcall %v exits with %d and says %q", args, code, says), func() error {
			if out, stderr, got := s.rollcall(t, args...); got != code || !strings.Contains(out+stderr, says) {
				return fmt.Errorf("exit %d, %s%s", got, out, stderr)
			}
			return nil
		})
	}
	waits := func(code int, says string, args ...string) {
		t.Helper()
		becomes(code, says, append([]string{"wait", "web", "--timeout", "500ms"}, args...)...)
	}
	row := func(addr string) (r instanceRow) {
		t.Helper()
		out, stderr, code := s.rollcall(t, "instances", "web", "-o", "json")
		var rows []instanceRow
		if err := json.Unmarshal([]byte(out), &rows); err != nil || code != 0 {
			t.Fatalf("exit %d, %v: %s", code, err, stderr)
		}
		for _, r := range rows {
			if r.Addr == addr {
				return r
			}
		}
		t.Fatalf("%s is not in %s", addr, out)
		return r
	}
	reaper := s.spawn(t, "reap", "--ttl", "2s", "--heartbeat", "500ms")
	reaper.says(t, "armed")

	// Nobody, and nobody's service.
	waits(exitWait, "nobody has ever registered as web", "--for", "ready=0")
	waits(exitWait, "nobody has ever registered as web")
	waits(exitWait, "no live balancer follows web", "--absent")
	waits(0, "applied by 0 balancers", "--absent", "--no-balancer")
	lb := s.spawn(t, "lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8", "--id", "lb1")
	becomes(exitFailed, "nobody has ever registered as web, which is followed by", "status")
	lb.signal(t, syscall.SIGKILL)
	a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
	addrA, addrB := a.Addr().String(), b.Addr().String()
	s.spawn(t, "register", "--service", "web", "--addr", addrA)
	s.comes(t, addrA)
	haproxytest.Poll(t, "the balancer is dead", func() error {
		if out, _, _ := s.rollcall(t, "status"); !strings.Contains(out, " 0\n") {
			return errors.New(out)
		}
		return nil
	})
	becomes(exitFailed, "no live balancer follows web", "status")
	waits(exitWait, "no live balancer follows web", "--for", "ready=1")
	waits(0, "applied by 0 balancers", "--for", "ready=1", "--no-balancer")

	// One that serves.
	s.spawn(t, "lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8", "--id", "lb1")
	becomes(0, "web: version", "wait", "web", "--for", "ready=1", "--timeout", "20s")
	becomes(0, "web: version", "wait", "web", "--timeout", "20s")
	if r := row(addrA); r.Serving != 1 || r.Balancers != 1 || len(r.NotServed) > 0 || r.Silent {
		t.Errorf("%+v", r)
	}
	becomes(0, "", "status")
	waits(exitWait, "1 of 2 instances serve; 1 are registered", "--for", "ready=2")

	// HAProxy's check is down.
	b.SetHealthy(false)
	other := s.spawn(t, "register", "--service", "web", "--addr", addrB)
	s.comes(t, addrB)
	becomes(exitWait, "not "+addrB+" at ", "wait", "web", "--for", "ready=2", "--timeout", "200ms")
	becomes(exitWait, "/be: down (its health check in HAProxy fails)", "wait", "web", "--for", "ready=2", "--timeout", "200ms")
	waits(0, "", "--for", "converged", "--timeout", "20s")
	if r := row(addrB); r.Serving != 0 || r.Balancers != 1 || len(r.NotServed) != 1 || r.NotServed[0].Reason != "down" || r.NotServed[0].Since == 0 {
		t.Errorf("%+v", r)
	}
	becomes(0, "1 of 2 instances do not serve, down: "+addrB, "status") // named, and one serves
	b.SetHealthy(true)
	becomes(0, "web: version", "wait", "web", "--for", "ready=2", "--timeout", "20s")

	// No slot is left.
	third := s.spawn(t, "register", "--service", "web", "--addr", haproxytest.NewInstance(t).Addr().String())
	becomes(exitWait, "unplaced (no slot is left)", "wait", "web", "--for", "ready=3", "--timeout", "200ms")
	waits(exitWait, "not served: ", "--for", "converged")
	becomes(exitFailed, "1 of 3 instances do not serve, unplaced: ", "status") // when it has lasted
	if _, stderr, code := s.rollcall(t, "weight", "web", addrA, "90", "--wait", "--timeout", "5s"); code != exitWait || !strings.Contains(stderr, "unplaced") {
		t.Errorf("weight --wait: exit %d, %s", code, stderr)
	}
	third.signal(t, syscall.SIGTERM)

	// A human drains it, and HAProxy has it so.
	var seen map[string]registrar.ServerState
	if err := json.Unmarshal([]byte(s.redis.Client(t).HGet(t.Context(), "rollcall:{web}:seen:lb1", addrB).Val()), &seen); err != nil {
		t.Fatal(err)
	}
	server := seen["be"].Server
	s.ha.Command(t, "set server be/"+server+" state maint")
	becomes(exitWait, "human (", "wait", "web", "--for", "ready=2", "--timeout", "200ms")
	s.ha.Command(t, "set server be/"+server+" state ready")
	becomes(0, "web: version", "wait", "web", "--for", "ready=2", "--timeout", "20s")

	// Nobody can take out who is silent, and it is not ready.
	reaper.signal(t, syscall.SIGKILL)
	other.signal(t, syscall.SIGKILL)
	becomes(exitWait, addrB+", silent for ", "wait", "web", "--for", "ready=2", "--timeout", "200ms")
	if r := row(addrB); !r.Silent {
		t.Errorf("%+v", r)
	}

	// Nobody serves at all.
	a.SetHealthy(false)
	b.SetHealthy(false)
	becomes(exitFailed, "none of 2 instances serves", "status")
}

// TestRefusedByAll: an address that no balancer may serve is an end to the wait.
func TestRefusedByAll(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 2}, {Name: "be2", Slots: 2}}})}
	s.spawn(t, "reap", "--ttl", "3s").says(t, "armed")
	s.spawn(t, "lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "10.0.0.0/8", "--id", "lb1")
	s.spawn(t, "register", "--service", "web", "--addr", "127.0.0.1:9001")
	becomes := func(code int, says string, args ...string) {
		t.Helper()
		haproxytest.Poll(t, fmt.Sprintf("rollcall %v", args), func() error {
			if out, stderr, got := s.rollcall(t, args...); got != code || !strings.Contains(out+stderr, says) {
				return fmt.Errorf("exit %d, %s%s, want exit %d, %q", got, out, stderr, code, says)
			}
			return nil
		})
	}
	becomes(exitFailed, "waiting cannot mend it: every balancer refuses 127.0.0.1:9001 at lb1/be: excluded (127.0.0.1 is in none of the allowed networks)", "wait", "web", "--for", "ready=1", "--timeout", "20s")
	becomes(exitFailed, "every balancer refuses 127.0.0.1:9001", "wait", "web", "--timeout", "20s")
	becomes(exitFailed, "web: every balancer refuses 127.0.0.1:9001", "status")
	// Another one that may serve it is enough.
	s.spawn(t, "lbsync", "--socket", s.ha.Socket, "--backend", "web=be2", "--allow", "127.0.0.0/8", "--id", "lb2")
	becomes(0, "web: version", "wait", "web", "--for", "ready=1", "--timeout", "20s")
	becomes(0, "web: version", "wait", "web", "--timeout", "20s")
	becomes(0, "", "status")
}

// TestUnknownService: a service that nobody knows is named, with the nearest.
func TestUnknownService(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	s.spawn(t, "register", "--service", "web", "--addr", "127.0.0.1:9001")
	s.comes(t, "127.0.0.1:9001")
	for _, c := range []struct {
		code int
		args []string
	}{
		{exitFailed, []string{"instances", "wbe"}},
		{exitFailed, []string{"explain", "wbe", "127.0.0.1:9001"}},
		{exitWait, []string{"wait", "wbe", "--timeout", "100ms"}},
	} {
		if out, stderr, code := s.rollcall(t, c.args...); code != c.code || !strings.Contains(stderr, "nobody has ever registered as wbe; did you mean web?") {
			t.Errorf("%v: exit %d, %s%s", c.args, code, out, stderr)
		}
	}
	s.spawn(t, "watch", "wbe").says(t, "nobody has ever registered as wbe; did you mean web?")
	if _, stderr, code := s.rollcall(t, "instances", "other"); code != exitFailed || strings.Contains(stderr, "did you mean") {
		t.Errorf("exit %d, %s", code, stderr)
	}
	s.ha = haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 2}}})
	for _, how := range []string{"--dry-run", "--once"} {
		if _, stderr, code := s.rollcall(t, "lbsync", "--socket", s.ha.Socket, "--backend", "wbe=be", how); code != 0 || !strings.Contains(stderr, "nobody has ever registered as wbe; did you mean web?") {
			t.Errorf("%s: exit %d, %s", how, code, stderr)
		}
	}
}
