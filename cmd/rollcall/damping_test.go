package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// TestSidecarDamped: an app that is ready and not, over and over, waits before it is
// registered again, and says so everywhere; without another instance it does not.
func TestSidecarDamped(t *testing.T) {
	t.Parallel()
	for _, last := range []bool{false, true} {
		t.Run(fmt.Sprintf("last %v", last), func(t *testing.T) {
			t.Parallel()
			s := &system{redis: redistest.Start(t)}
			addr, file := "127.9.8.7:9001", filepath.Join(t.TempDir(), "ready")
			if !last {
				other := s.spawn(t, "register", "--service", "web", "--addr", "127.9.8.7:9002")
				s.comes(t, "127.9.8.7:9002")
				defer other.signal(t, syscall.SIGTERM)
			}
			m := s.monitor(t, "register", "--service", "web", "--addr", addr, "--ready-file", file)
			for n := range 3 {
				if err := os.WriteFile(file, nil, 0o600); err != nil {
					t.Fatal(err)
				}
				s.comes(t, addr)
				if n == 0 {
					m.shows(t, "rollcall_damped", 0, 0)
				}
				if err := os.Remove(file); err != nil {
					t.Fatal(err)
				}
				s.goes(t, addr, "unhealthy")
			}
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if last {
				s.comes(t, addr)
				m.signal(t, syscall.SIGTERM) // and all of its log is there
				if out := m.out.String(); strings.Count(out, `"message":"registered"`)+strings.Count(out, " registered ") < 4 {
					t.Error(out)
				}
				return
			}
			m.shows(t, "rollcall_damped", 1, 1)
			m.ready(t, "it comes and goes, and returns within")
			s.comes(t, addr) // in the end
			m.shows(t, "rollcall_damped", 0, 0)
			haproxytest.Poll(t, "it says so once", func() error {
				if out := m.out.String(); strings.Count(out, "it comes and goes; each return waits longer now") != 1 {
					return errors.New(out)
				}
				return nil
			})
			m.signal(t, syscall.SIGTERM)
		})
	}
}

// TestRolesDamped: who may register may ask whether others serve.
func TestRolesDamped(t *testing.T) {
	srv := startRoles(t)
	for _, role := range []string{"sidecar-web", "docker"} {
		if _, err := roleStore(t, srv, role).OthersServe(t.Context(), "web", netip.MustParseAddrPort("10.0.0.1:80")); err != nil {
			t.Errorf("%s: %v", role, err)
		}
	}
}

// TestDoctorFlaps: doctor names who comes and goes.
func TestDoctorFlaps(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	store, err := registrar.NewStore(s.redis.Client(t), registrar.DefaultNamespace)
	if err != nil {
		t.Fatal(err)
	}
	addr := netip.MustParseAddrPort("10.0.0.1:80")
	join := func(n int) {
		t.Helper()
		token := fmt.Sprint("token", n)
		if _, err := store.Beat(t.Context(), "web", registrar.Beat{Addr: addr, Token: token, Meta: `{"id":"` + token + `","weight":100}`}); err != nil {
			t.Fatal(err)
		}
	}
	for n, want := range map[int]state{4: stateOK, 5: stateWarn} {
		for i := range n {
			join(10*n + i)
			if i < n-1 {
				if _, err := store.Leave(t.Context(), "web", addr, fmt.Sprint("token", 10*n+i), registrar.Unhealthy); err != nil {
					t.Fatal(err)
				}
			}
		}
		findings, _ := s.doctor(t)
		at := slices.IndexFunc(findings, func(f finding) bool { return f.Check == "registry flapping" })
		if at < 0 || findings[at].State != want || want == stateWarn && !strings.Contains(findings[at].Seen, "web 10.0.0.1:80 (5 times)") {
			t.Errorf("joined %d times: %+v", n, findings)
		}
		if err := s.redis.Client(t).FlushAll(t.Context()).Err(); err != nil {
			t.Fatal(err)
		}
	}
}
