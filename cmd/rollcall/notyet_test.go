package main

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// TestNotHealthyYet: a check or a file that has never been right is said once, with its
// cause, in the log, in /readyz and to systemd, and the instance comes when it is.
func TestNotHealthyYet(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ flag, cause string }{{"--check", "connection refused"}, {"--ready-file", "no such file"}, {"--beat-file", "no such file"}} {
		t.Run(c.flag, func(t *testing.T) {
			t.Parallel()
			socket := filepath.Join(t.TempDir(), "notify")
			l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			s := &system{redis: redistest.Start(t), env: []string{"NOTIFY_SOCKET=" + socket}}
			addr := freeAddr(t)
			value := filepath.Join(t.TempDir(), "file")
			if c.flag == "--check" {
				value = "tcp://" + addr
			}
			m := s.monitor(t, "register", "--service", "web", "--addr", addr, c.flag, value)
			m.says(t, "not healthy yet; it registers when it is")
			m.says(t, c.cause)
			m.ready(t, "not registered: not healthy: ")
			haproxytest.Poll(t, "systemd hears it", func() error {
				buf := make([]byte, 4096)
				n, err := l.Read(buf)
				if err == nil && !strings.Contains(string(buf[:n]), "STATUS=not registered: not healthy yet: ") {
					err = os.ErrNotExist
				}
				return err
			})
			if c.flag == "--check" {
				app, err := net.Listen("tcp", addr)
				if err != nil {
					t.Fatal(err)
				}
				defer app.Close()
			} else if err := os.WriteFile(value, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			s.comes(t, addr)
			m.ready(t, "ok")
			m.signal(t, syscall.SIGTERM)
			if n := strings.Count(m.out.String(), "not healthy yet"); n != 1 {
				t.Errorf("said %d times", n)
			}
		})
	}
}
