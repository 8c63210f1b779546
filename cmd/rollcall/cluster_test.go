package main

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// TestCluster plays the life of services on a Redis Cluster with the real
// binary: join, drain, leave, crash, and the death of a shard.
func TestCluster(t *testing.T) {
	nodes := redistest.StartCluster(t, 3)
	at := "--redis=" + nodes.URL()
	s := &system{redis: nodes[0], ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 4}}})}
	// One service off the shard that will die, one on it, and the list on neither.
	list := nodes.Shard(t, "rollcall:services")
	down := (list + 1) % 3
	name := func(shard int) string {
		for n := 0; ; n++ {
			if svc := fmt.Sprintf("s%d", n); nodes.Shard(t, "{"+svc+"}") == shard {
				return svc
			}
		}
	}
	web, other := name((list+2)%3), name(down)
	s.spawn(t, "reap", at, "--ttl", "3s")
	s.spawn(t, "reap", at, "--ttl", "3s")
	s.spawn(t, "lbsync", at, "--socket", s.ha.Socket, "--backend", web+"=be", "--allow", "127.0.0.0/8")
	watch := s.spawn(t, "watch", at)
	register := func(svc string) (*process, string) {
		i := haproxytest.NewInstance(t)
		return s.spawn(t, "register", at, "--service", svc, "--addr", i.Addr().String()), i.Addr().String()
	}
	leaves, leaving := register(web)
	crashes, crashing := register(web)
	_, stays := register(web)
	_, elsewhere := register(other)
	says := func(addr, what string) {
		t.Helper()
		haproxytest.Poll(t, addr+" is "+what, func() error {
			if !strings.Contains(watch.out.String(), addr+" "+what) {
				return errors.New(watch.out.String())
			}
			return nil
		})
	}
	for _, addr := range []string{leaving, crashing, stays, elsewhere} {
		says(addr, "here")
	}
	if out, stderr, code := s.rollcall(t, "wait", at, web, "--for", "ready=3"); code != 0 || !strings.Contains(out, "applied by 1 balancers") {
		t.Errorf("wait: exit %d, %s%s", code, out, stderr)
	}
	if out, stderr, code := s.rollcall(t, "drain", at, "--wait", web, stays); code != 0 {
		t.Errorf("drain: exit %d, %s%s", code, out, stderr)
	}
	haproxytest.Poll(t, "explain knows it", func() error {
		if out, stderr, code := s.rollcall(t, "explain", at, web, stays); code != 0 || !strings.Contains(out, "drain, weight 100") || !strings.Contains(out, "drained") {
			return fmt.Errorf("exit %d, %s%s", code, out, stderr)
		}
		return nil
	})
	if out, stderr, code := s.rollcall(t, "events", at); code != 0 || !strings.Contains(out, elsewhere) || !strings.Contains(out, "drained") {
		t.Errorf("events: exit %d, %s%s", code, out, stderr)
	}
	if state := s.ha.Command(t, "show servers state be"); !strings.Contains(state, "127.0.0") {
		t.Errorf("HAProxy has no instance:\n%s", state)
	}
	if code := leaves.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("the sidecar ends with %d", code)
	}
	says(leaving, "left")
	begun := time.Now()
	crashes.signal(t, syscall.SIGKILL)
	says(crashing, "expired")
	t.Logf("crash: out after %v, TTL 3 s and up to 4 s more to arm", time.Since(begun).Round(time.Millisecond))

	if out, stderr, code := s.rollcall(t, "services", at, "-o", "json"); code != 0 || !strings.Contains(out, web) || !strings.Contains(out, other) {
		t.Errorf("services: exit %d, %s%s", code, out, stderr)
	}
	nodes[down].Kill(t)
	haproxytest.Poll(t, "services says what it knows, and that it is not all", func() error {
		out, stderr, code := s.rollcall(t, "services", at)
		if code != 1 || !strings.Contains(out, web) || strings.Contains(out, other) || !strings.Contains(stderr, other) {
			return fmt.Errorf("exit %d, %s%s", code, out, stderr)
		}
		return nil
	})
	if out, stderr, code := s.rollcall(t, "events", at); code != 1 || !strings.Contains(out, stays) || strings.Contains(out, elsewhere) || stderr == "" {
		t.Errorf("events without a shard: exit %d, %s%s", code, out, stderr)
	}
	_, late := register(web)
	says(late, "here")
	if out, stderr, code := s.rollcall(t, "instances", at, web); code != 0 || !strings.Contains(out, stays) || !strings.Contains(out, late) || strings.Contains(out, crashing) {
		t.Errorf("instances: exit %d, %s%s", code, out, stderr)
	}
	if strings.Contains(watch.out.String(), elsewhere+" absent") || strings.Contains(watch.out.String(), elsewhere+" expired") {
		t.Errorf("%s went with its shard:\n%s", elsewhere, watch.out)
	}
}
