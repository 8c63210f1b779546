package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"rollcall/lbsync/haproxy/haproxytest"
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
				if out := m.out.String(); strings.Count(out, `"message":"registered"`)+strings.Count(out, " registered ") < 4 {
					t.Error(out)
				}
				m.signal(t, syscall.SIGTERM)
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
