package main

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// TestMigration plays the migration page's steps 2 to 5 under traffic: servers
// that a template wrote, rollcall's beside them, and then rollcall's alone. The
// page's commands are the ones that are run here.
func TestMigration(t *testing.T) {
	t.Parallel()
	one, two := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
	old := []string{fmt.Sprintf("server confd_0 %s check", one.Addr()), fmt.Sprintf("server confd_1 %s check", two.Addr())}
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{StateFile: true, Backends: []haproxytest.Backend{{
		Name: "be_web", Balance: "leastconn", Check: true, Slots: 5, Extra: old,
	}}})}
	url := "http://" + s.ha.Addr("be_web") + "/"
	var commands []string
	for _, b := range blocks(t, migration, "console") {
		commands = append(commands, strings.Split(strings.TrimSpace(b), "\n")...)
	}
	want := []string{
		"rollcall reap", "rollcall doctor",
		"rollcall lbsync --socket /run/haproxy/admin.sock --backend web=be_web --dry-run",
		"rollcall lbsync --socket /run/haproxy/admin.sock --backend web=be_web",
		"rollcall instances web", "rollcall wait web --for ready=2",
	}
	if !slices.Equal(commands, want) {
		t.Fatalf("the page has the commands %q", commands)
	}
	words := func(i int, more ...string) []string {
		line := strings.ReplaceAll(strings.TrimPrefix(commands[i], "rollcall "), "/run/haproxy/admin.sock", s.ha.Socket)
		return append(strings.Fields(line), more...)
	}
	answered(t, url, one, two)
	l := startLoad(t, url)
	s.spawn(t, words(0)...)
	if stdout, _, code := s.rollcall(t, words(1)...); code == 2 || stdout == "" {
		t.Errorf("doctor: exit %d", code)
	}
	if stdout, stderr, code := s.rollcall(t, words(2, "--allow", "127.0.0.0/8")...); code != 0 || stdout != "" {
		t.Errorf("dry run without an instance: exit %d: %s%s", code, stdout, stderr)
	}
	lb := s.spawn(t, words(3, "--allow", "127.0.0.0/8")...)
	s.spawn(t, "register", "--service", "web", "--addr", one.Addr().String())
	s.spawn(t, "register", "--service", "web", "--addr", two.Addr().String())
	haproxytest.Poll(t, "both are registered", func() error {
		if stdout, _, _ := s.rollcall(t, words(4)...); !strings.Contains(stdout, one.Addr().String()) || !strings.Contains(stdout, two.Addr().String()) {
			return fmt.Errorf("%s", stdout)
		}
		return nil
	})
	if _, stderr, code := s.rollcall(t, words(5, "--timeout", "20s")...); code != 0 {
		t.Fatalf("wait: exit %d: %s", code, stderr)
	}
	serving := func(prefix string) (n int) {
		for _, row := range strings.Split(s.ha.Command(t, "show stat be_web 4 -1"), "\n") {
			if f := strings.Split(row, ","); len(f) > 17 && strings.HasPrefix(f[1], prefix) && strings.HasPrefix(f[17], "UP") {
				n++
			}
		}
		return n
	}
	haproxytest.Poll(t, "both ways serve", func() error {
		if a, b := serving("confd_"), serving("s"); a != 2 || b != 2 {
			return fmt.Errorf("%d and %d servers are up", a, b)
		}
		return nil
	})
	for _, line := range old {
		s.ha.Edit(t, line, "")
	}
	s.ha.Reload(t)
	answered(t, url, one, two)
	if a, b := serving("confd_"), serving("s"); a != 0 || b != 2 {
		t.Errorf("%d and %d servers are up after the last reload", a, b)
	}
	l.stop()
	if n, f := l.sent.Load(), l.failed.Load(); f > 0 || n == 0 {
		t.Errorf("%d of %d requests failed, the last with: %s", f, n, l.last)
	} else {
		t.Logf("%d requests, 0 failed", n)
	}
	if code := lb.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("lbsync ends with %d", code)
	}
	if serving("s") != 2 {
		t.Error("the way back: the servers went with lbsync")
	}
}
