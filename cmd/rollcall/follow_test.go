package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// withHosts returns s with a program that has an /etc/hosts of its own, and what makes
// a name there that of addresses. Who is not root is skipped.
func (s *system) withHosts(t *testing.T, name string) (_ *system, point func(addrs ...string)) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a mount of its own needs root")
	}
	if _, err := exec.LookPath("unshare"); err != nil {
		t.Fatalf("unshare is missing: %v; apt-get install util-linux", err)
	}
	dir := t.TempDir()
	hosts, script := filepath.Join(dir, "hosts"), filepath.Join(dir, "rollcall")
	point = func(addrs ...string) {
		t.Helper()
		text := "127.0.0.1 localhost\n"
		for _, a := range addrs {
			text += a + " " + name + "\n"
		}
		must(t, os.WriteFile(hosts, []byte(text), 0o644)) // in place: what is mounted is the file, not its name
	}
	must(t, os.WriteFile(script, fmt.Appendf(nil, "#!/bin/sh\nexec unshare -m sh -c 'mount --bind %s /etc/hosts && exec %s \"$@\"' sh \"$@\"\n", hosts, s.binary(t)), 0o755))
	with := *s
	with.program = script
	return &with, point
}

// TestRegistryMovesByName points the registry's name at a replica that was promoted,
// while the server before lives on as a primary. The sidecars and the reaper hear of it
// first, and lbsync only when the instances have been silent for more than a TTL at the server
// before: all of them follow, and none of the instances leaves HAProxy. Go reads
// /etc/hosts each five seconds, so it takes that long twice.
func TestRegistryMovesByName(t *testing.T) {
	t.Parallel()
	const name = "registry.test"
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 5}}})}
	s.env = []string{"ROLLCALL_REDIS=redis://" + name + ":6379/0"}
	early, pointEarly := s.withHosts(t, name)
	late, pointLate := s.withHosts(t, name)
	other := s.redis.StartReplica(t)
	pointEarly(s.redis.Host)
	pointLate(s.redis.Host)

	url := "http://" + s.ha.Addr("be") + "/"
	early.spawn(t, "reap", "--ttl", "3s")
	late.spawn(t, "lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8")
	var is []*haproxytest.Instance
	join := func() {
		i := haproxytest.NewInstance(t)
		is = append(is, i)
		early.spawn(t, "register", "--service", "web", "--addr", i.Addr().String())
	}
	join() // one that falls silent is not held by the protection, nor are two
	join()
	answered(t, url, is...)
	l := startLoad(t, url)
	var always []func()
	for _, i := range is {
		always = append(always, s.watchServer(t, i.Addr().String()))
	}
	before, after := s.redis.Client(t), other.Client(t)
	haproxytest.Poll(t, "the replica has it all", func() error {
		if n := after.ZCard(t.Context(), "rollcall:{web}:instances").Val(); n != int64(len(is)) {
			return fmt.Errorf("%d instances", n)
		}
		return nil
	})
	must(t, after.Do(t.Context(), "REPLICAOF", "NO", "ONE").Err())

	promoted := after.Time(t.Context()).Val().UnixMilli()
	must(t, after.Del(t.Context(), after.Keys(t.Context(), "rollcall:reaper:*").Val()...).Err())
	follow := func() error {
		for _, z := range after.ZRangeWithScores(t.Context(), "rollcall:{web}:instances", 0, -1).Val() {
			if int64(z.Score) <= promoted {
				return fmt.Errorf("%v has not beaten since", z.Member)
			}
		}
		return nil
	}
	begun := time.Now()
	pointEarly(other.Host)
	haproxytest.Poll(t, "the sidecars follow", follow)
	t.Logf("sidecars followed after %v", time.Since(begun))
	haproxytest.Poll(t, "the reaper follows", func() error {
		if keys := after.Keys(t.Context(), "rollcall:reaper:*").Val(); len(keys) == 1 {
			return nil
		}
		return errors.New("no pulse at the other server")
	})
	t.Logf("the reaper followed after %v", time.Since(begun))
	haproxytest.Poll(t, "they have been silent for more than a TTL at the server before", func() error {
		now := before.Time(t.Context()).Val().UnixMilli()
		zs := before.ZRangeWithScores(t.Context(), "rollcall:{web}:instances", 0, -1).Val()
		if len(zs) != len(is) {
			t.Fatalf("%d instances at the server before, want %d", len(zs), len(is))
		}
		for _, z := range zs {
			if now-int64(z.Score) < 4500 {
				return fmt.Errorf("%v beat %d ms ago", z.Member, now-int64(z.Score))
			}
		}
		return nil
	})
	join()
	begun = time.Now()
	pointLate(other.Host)
	answered(t, url, is...)
	t.Logf("lbsync followed after %v", time.Since(begun))
	for _, a := range always {
		a()
	}
	l.stop()
	if n, f := l.sent.Load(), l.failed.Load(); f > 0 || n < 100 {
		t.Errorf("%d of %d requests failed: %s", f, n, l.last)
	}
}

// TestDoctorName has doctor look at the registry's name.
func TestDoctorName(t *testing.T) {
	t.Parallel()
	const name = "registry.test"
	s := &system{redis: redistest.Start(t), env: []string{"ROLLCALL_REDIS=redis://" + name + ":6379/0"}}
	s, point := s.withHosts(t, name)
	for _, c := range []struct {
		addrs []string
		want  state
		seen  string
	}{
		{[]string{s.redis.Host}, stateOK, name + " is " + s.redis.Host},
		{[]string{s.redis.Host, "127.0.0.9"}, stateWarn, name + " is " + s.redis.Host + ", 127.0.0.9"},
	} {
		point(c.addrs...)
		findings, _ := s.doctor(t)
		i := slices.IndexFunc(findings, func(f finding) bool { return f.Check == "redis name" })
		if i < 0 || findings[i].State != c.want || !strings.Contains(findings[i].Seen, c.seen) {
			t.Errorf("%v: %+v", c.addrs, findings)
		}
	}
	s.env = nil // by an address there is no name
	if findings, _ := s.doctor(t); slices.ContainsFunc(findings, func(f finding) bool { return f.Check == "redis name" }) {
		t.Errorf("%+v", findings)
	}
}
