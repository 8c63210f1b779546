package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"rollcall/lbsync/dataplane/dataplanetest"
	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// TestDataplane plays join, drain and leave through the Data Plane API, with
// TLS, and what must change nothing.
func TestDataplane(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir()) // where the lock is
	t.Run("slots", func(t *testing.T) { testDataplane(t, 4, "PUT /v3/services/haproxy/runtime/backends/be/servers/") })
	t.Run("dynamic", func(t *testing.T) { testDataplane(t, 0, "POST /v3/services/haproxy/runtime/backends/be/servers") })
}

func testDataplane(t *testing.T, slots int, change string) {
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Balance: "roundrobin", Slots: slots}}})}
	sum := s.ha.ConfigSum(t)
	api := dataplanetest.Start(t, s.ha.Socket, dataplanetest.Options{TLS: true})
	old := dataplanetest.Start(t, s.ha.Socket, dataplanetest.Options{Version: "v3.3.0 0123abcd", Old: true})
	lbsync := func(a *dataplanetest.API, password string, more ...string) []string {
		args := []string{"lbsync", "--dataplane", a.URL, "--dataplane-user", a.User, "--dataplane-password-file", password, "--backend", "web=be", "--allow", "127.0.0.0/8"}
		if a.CAFile != "" {
			args = append(args, "--dataplane-ca", a.CAFile)
		}
		return append(args, more...)
	}
	s.spawn(t, "reap", "--ttl", "3s")
	one, two := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
	first := s.spawn(t, "register", "--service", "web", "--addr", one.Addr().String())
	s.spawn(t, "register", "--service", "web", "--addr", two.Addr().String())
	haproxytest.Poll(t, "both are registered", func() error {
		if out, _, _ := s.rollcall(t, "instances", "web"); !strings.Contains(out, one.Addr().String()) || !strings.Contains(out, two.Addr().String()) {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	wrong := filepath.Join(t.TempDir(), "wrong")
	if err := os.WriteFile(wrong, []byte("wrong"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, out, err string
		code           int
		args           []string
	}{
		{"wrong password", "", "does not accept the user and password", 1, lbsync(api, wrong, "--once")},
		{"old", "", "v3.3.0", 1, lbsync(old, old.PasswordFile, "--once")},
		{"signed by nobody known", "", "certificate", 1, slices.Delete(lbsync(api, api.PasswordFile, "--once"), 11, 13)}, // no --dataplane-ca
		{"dry run", change, "", 3, lbsync(api, api.PasswordFile, "--dry-run")},
		{"socket too", "", "give one of them", 2, lbsync(api, api.PasswordFile, "--socket", s.ha.Socket)},
		{"no password file", "", "--dataplane-password-file", 2, lbsync(api, wrong+"er")},
		{"check", "", "server option check", 2, lbsync(api, api.PasswordFile, "--server-options", "check")},
		{"CA alone", "", "--dataplane-ca is for --dataplane", 2, []string{"lbsync", "--dataplane-ca", api.CAFile, "--backend", "web=be"}},
	} {
		stdout, stderr, code := s.rollcall(t, tt.args...)
		if code != tt.code || !strings.Contains(stdout, tt.out) || !strings.Contains(stderr, tt.err) {
			t.Errorf("%s: exit %d, want %d\n%s%s", tt.name, code, tt.code, stdout, stderr)
		}
	}
	for _, r := range append(api.Requests(), old.Requests()...) {
		if !strings.HasPrefix(r, "GET ") {
			t.Errorf("sent %s", r)
		}
	}
	lb := s.spawn(t, lbsync(api, api.PasswordFile)...)
	url := "http://" + s.ha.Addr("be") + "/"
	answered(t, url, one, two)
	if _, stderr, code := s.rollcall(t, lbsync(api, api.PasswordFile, "--once")...); code != 1 || !strings.Contains(stderr, "another lbsync") {
		t.Errorf("a second lbsync: exit %d: %s", code, stderr)
	}
	l := startLoad(t, url)
	if _, stderr, code := s.rollcall(t, "drain", "web", two.Addr().String(), "--wait"); code != 0 {
		t.Errorf("drain: exit %d: %s", code, stderr)
	}
	answered(t, url, one)
	if _, stderr, code := s.rollcall(t, "ready", "web", two.Addr().String(), "--wait"); code != 0 {
		t.Errorf("ready: exit %d: %s", code, stderr)
	}
	answered(t, url, one, two)
	if code := first.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("the sidecar ends with %d", code)
	}
	answered(t, url, two)
	l.stop()
	if n, f := l.sent.Load(), l.failed.Load(); f > 0 || n == 0 {
		t.Errorf("%d of %d requests failed, the last with: %s", f, n, l.last)
	}
	if code := lb.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("lbsync ends with %d", code)
	}
	if s.ha.ConfigSum(t) != sum {
		t.Error("haproxy.cfg has changed")
	}
}
