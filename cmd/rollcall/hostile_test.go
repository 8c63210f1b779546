package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
)

// TestHostileSidecar has a client with the rights of one service's sidecar do to the
// others all that it can: it costs them time, never membership. The bounds of each are
// held by TestQuietKept, TestQuietAmongMany, TestForgedMessages, TestManyNames,
// TestBeatLimits, TestProtectionThresholds, TestReadHoldsRedis, TestLogGoesOn and
// TestReplacedIsNotHeld; here they come together.
func TestHostileSidecar(t *testing.T) {
	srv := startRoles(t)
	s := &system{redis: srv, ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 5}}})}
	as := func(role string, args ...string) []string {
		return append([]string{args[0], "--redis", roleURL(srv, role)}, args[1:]...)
	}
	register := func(i *haproxytest.Instance) *process {
		return s.spawn(t, as("sidecar-web", "register", "--service", "web", "--addr", i.Addr().String())...)
	}
	reap := s.spawn(t, as("reaper", "reap", "--ttl", "3s", "--canary-redis", roleURL(srv, "canary"))...)
	haproxytest.Poll(t, "armed", func() error {
		if !strings.Contains(reap.out.String(), "armed") {
			return fmt.Errorf("%s", reap.out)
		}
		return nil
	})
	s.spawn(t, as("lbsync", "lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8")...)
	a, b, c := haproxytest.NewInstance(t), haproxytest.NewInstance(t), haproxytest.NewInstance(t)
	register(a)
	dies := register(b)
	answered(t, "http://"+s.ha.Addr("be")+"/", a, b)

	evil, root := roleClient(t, srv, "sidecar-evil"), srv.Client(t)
	for what, args := range map[string][]any{
		"web's name":      {"SREM", "rollcall:services", "web"},
		"web's instances": {"ZREM", "rollcall:{web}:instances", a.Addr().String()},
		"web's limit":     {"HSET", "rollcall:config", "max_instances", 0},
		"web's version":   {"INCR", "rollcall:{web}:version"},
	} {
		if err := evil.Do(t.Context(), args...).Err(); !refused(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	do := func(args ...any) {
		t.Helper()
		if err := evil.Do(t.Context(), args...).Err(); err != nil {
			t.Fatalf("%.80v: %v", args, err)
		}
	}
	now := time.Now().UnixMilli()
	for n := range 20 {
		do("ZADD", "rollcall:{evil}:instances", now-600_000, fmt.Sprintf("10.9.0.%d:80", n+1))
	}
	do("SADD", "rollcall:services", "evil")
	do("XADD", "rollcall:events", "18446744073709551615-18446744073709551615", "what", "x")
	ctx, cancel := context.WithCancel(t.Context())
	var at sync.WaitGroup
	defer at.Wait()
	defer cancel()
	at.Go(func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		names := make([]any, 1002)
		names[0], names[1] = "SADD", "rollcall:services"
		for round := 0; ctx.Err() == nil; round++ {
			for i := range names[2:] {
				names[2+i] = fmt.Sprintf("x%d", round%25*1000+i) // 25,000 in all
			}
			for _, cmd := range [][]any{names, {"SET", "rollcall:quiet", round, "PX", 500}, {"INCR", "rollcall:version"}, {"PUBLISH", "rollcall:changes", "9000000000000000 web 9000000000000000"}} {
				evil.Do(ctx, cmd...)
			}
			select {
			case <-ctx.Done():
			case <-tick.C:
			}
		}
	})
	haproxytest.Poll(t, "there are many names", func() error {
		if n := root.SCard(t.Context(), "rollcall:services").Val(); n < 1000 {
			return fmt.Errorf("%d names", n)
		}
		return nil
	})

	began := time.Now()
	register(c)
	answered(t, "http://"+s.ha.Addr("be")+"/", a, b, c)
	joined := time.Since(began)
	began = time.Now()
	dies.signal(t, syscall.SIGKILL)
	haproxytest.Poll(t, "the dead one is out", func() error {
		if err := root.ZScore(t.Context(), "rollcall:{web}:instances", b.Addr().String()).Err(); !errors.Is(err, redis.Nil) {
			return fmt.Errorf("it is there: %v", err)
		}
		return nil
	})
	out := time.Since(began)
	// A service that is new gets in beside all the names.
	fresh := roleClient(t, srv, "docker")
	other, err := registrar.NewStore(fresh, registrar.DefaultNamespace)
	if err != nil {
		t.Fatal(err)
	}
	root.HSet(t.Context(), "rollcall:config", "max_services", 100)
	haproxytest.Poll(t, "more names than services may be", func() error {
		if n := root.SCard(t.Context(), "rollcall:services").Val(); n < 100 {
			return fmt.Errorf("%d names", n)
		}
		return nil
	})
	if _, err := other.Beat(t.Context(), "new", registrar.Beat{Addr: c.Addr(), Token: "t", Meta: `{"id":"t"}`}); err != nil {
		t.Errorf("a new service: %v", err)
	}
	haproxytest.Poll(t, "status says what is held", func() error { // of thousands of names, among all that
		doc, stderr, code := s.rollcall(t, as("operator", "status")...)
		if strings.Contains(stderr, "(every service)") {
			t.Errorf("all is held: %s", stderr)
		}
		if code != exitFailed || !strings.Contains(stderr, "evil held: 20 of 20") {
			return fmt.Errorf("exit %d, %s%s", code, doc, stderr)
		}
		return nil
	})
	cancel()
	at.Wait()
	haproxytest.Poll(t, "the log goes on and the names are off", func() error {
		events, _, _ := s.rollcall(t, as("operator", "events", "web", "-n", "1")...)
		names := root.SMembers(t.Context(), "rollcall:services").Val()
		slices.Sort(names)
		if !strings.Contains(events, "expired") && !strings.Contains(events, "joined") || fmt.Sprint(names) != "[evil new web]" {
			return fmt.Errorf("%.100v, %s", names, events)
		}
		return nil
	})
	for _, i := range []*haproxytest.Instance{a, c} {
		if err := root.ZScore(t.Context(), "rollcall:{web}:instances", i.Addr().String()).Err(); err != nil {
			t.Errorf("%s is out: %v", i.Addr(), err)
		}
	}
	answered(t, "http://"+s.ha.Addr("be")+"/", a, c)
	t.Logf("one joined in %v, one that died was out after %v, TTL 3s", joined, out)
}
