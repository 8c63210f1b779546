package main

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// TestLoginRefused has Redis refuse the log-in of every command: each says so and ends
// with an error, and none takes what it did not hear for an empty register. Daemons
// whose password is refused from some moment on go on with what they know.
func TestLoginRefused(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 4}}})}
	root := s.redis.Client(t)
	password := func(is string) {
		t.Helper()
		if err := root.Do(t.Context(), "ACL", "SETUSER", "default", "resetpass", ">"+is).Err(); err != nil {
			t.Fatal(err)
		}
		for _, kind := range []string{"normal", "pubsub"} {
			if err := root.ClientKillByFilter(t.Context(), "TYPE", kind, "SKIPME", "yes").Err(); err != nil {
				t.Fatal(err)
			}
		}
	}
	password("right")
	s.env = []string{"ROLLCALL_REDIS_PASSWORD=right"}
	i := haproxytest.NewInstance(t)
	addr := i.Addr().String()
	beats := []string{"register", "--service", "web", "--addr", addr, "--interval", "100ms"}
	sync1 := []string{"lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8"}
	daemons := map[string]*process{
		"register": s.spawn(t, beats...), "reap": s.spawn(t, "reap", "--ttl", "1500ms"), "lbsync": s.spawn(t, sync1...),
		"watch": s.spawn(t, "watch"), "events": s.spawn(t, "events", "--follow"),
	}
	page := s.page(t, "serve")
	daemons["serve"] = page.process
	url := "http://" + s.ha.Addr("be") + "/"
	answered(t, url, i)
	shown := func() error {
		code, body, err := page.do(http.MethodGet, "/v1/services/web", "")
		if err != nil || code != http.StatusOK || !strings.Contains(body, addr) {
			return fmt.Errorf("%d %s: %w", code, body, err)
		}
		return nil
	}
	haproxytest.Poll(t, "serve shows it", shown)
	daemons["watch"].says(t, addr+" here")
	daemons["events"].says(t, "joined")

	password("another")
	refused := &system{redis: s.redis, env: s.env}
	once := [][]string{
		{"status"}, {"services"}, {"instances", "web"}, {"overrides"}, {"overrides", "web"}, {"explain", "web", addr}, {"events"}, {"lb"}, {"wait", "web", "--for", "ready=1", "--timeout", "5s"},
		{"drain", "web", addr}, {"maint", "web", addr}, {"ready", "web", addr}, {"weight", "web", addr, "10"}, {"deregister", "--service", "web", "--addr", addr}, {"doctor"},
		{"reap", "--once", "--ttl", "1500ms"}, {"lbsync", "--once", "--socket", s.ha.Socket, "--backend", "other=be_other"},
	}
	known := []string{"docker", "demo", "demo-service", "completion", "man"} // without Redis, or with an Engine besides
	for name := range daemons {
		known = append(known, name)
	}
	for _, args := range once {
		known = append(known, args[0])
	}
	for _, c := range commands() {
		if !slices.Contains(known, c.Name) {
			t.Errorf("%s is not tried", c.Name)
		}
	}
	var trying sync.WaitGroup
	for _, args := range once {
		trying.Go(func() {
			out, stderr, code := refused.rollcall(t, args...)
			if code == 0 || !strings.Contains(out+stderr, "WRONGPASS") || strings.Contains(stderr, "panic") || strings.Contains(stderr, "goroutine ") {
				t.Errorf("%v: exit %d\n%s%s", args, code, out, stderr)
			}
		})
	}
	trying.Wait()
	for name, p := range daemons {
		if name != "watch" && name != "events" { // what these say is of the register
			p.says(t, "WRONGPASS")
		}
	}
	time.Sleep(2 * time.Second) // for longer than any of them needs to try again
	for name, p := range daemons {
		select {
		case <-p.done:
			t.Errorf("%s has ended: %v", name, p.cmd.ProcessState)
		default:
		}
	}
	answered(t, url, i)
	if err := shown(); err != nil {
		t.Errorf("serve: %v", err)
	}
	if out := daemons["watch"].out.String(); strings.Contains(out, "absent") || strings.Contains(out, "expired") {
		t.Errorf("watch: %s", out)
	}
	password("right")
	haproxytest.Poll(t, "all is as before", func() error {
		out, stderr, code := s.rollcall(t, "status")
		if code != 0 || strings.Contains(stderr, "no reaper is armed") {
			return fmt.Errorf("exit %d\n%s%s", code, out, stderr)
		}
		return nil
	})
	haproxytest.Poll(t, "watch is told", func() error {
		if out, stderr, code := s.rollcall(t, "weight", "web", addr, "10", "--wait"); code != 0 {
			return fmt.Errorf("exit %d\n%s%s", code, out, stderr)
		}
		if out := daemons["watch"].out.String(); !strings.Contains(out, "weight") {
			return errors.New(out)
		}
		return nil
	})
	for name, p := range daemons {
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		if code := p.ends(t); code != 0 {
			t.Errorf("%s: exit %d", name, code)
		}
	}
}
