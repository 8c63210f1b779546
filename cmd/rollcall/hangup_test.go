package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// TestHangup sends each daemon SIGHUPs: it lives, says whether its files can be
// read, and its next connection uses the password that is there now.
func TestHangup(t *testing.T) {
	t.Parallel()
	redis := redistest.Start(t)
	ha := haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 2}}})
	root := redis.Client(t)
	dir := t.TempDir()
	token := filepath.Join(dir, "token")
	write := func(t *testing.T, file, text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(t, token, pageToken)
	for _, c := range []struct {
		args   string
		begins string // it logs when it is at work
	}{
		{"reap --ttl 600ms", "reaper starts"},
		{"lbsync --socket " + ha.Socket + " --backend web=be", "lbsync starts"},
		{"watch --http 127.0.0.1:0", "serving metrics"},
		{"serve --listen 127.0.0.1:0 --token-file " + token, "serving the page"},
		{"register --service web --addr 127.0.0.1:9001 --interval 100ms", "registering"},
		{"docker --advertise 127.0.0.1 --engine unix:///none", "registering containers"},
	} {
		args := strings.Fields(c.args)
		t.Run(args[0], func(t *testing.T) {
			t.Parallel()
			user, file := "user-"+args[0], filepath.Join(dir, args[0])
			password := func(text string) {
				if err := root.Do(t.Context(), "ACL", "SETUSER", user, "reset", "on", ">"+text, "~*", "&*", "+@all").Err(); err != nil {
					t.Fatal(err)
				}
			}
			connects := func(what string) {
				t.Helper()
				if args[0] == "docker" {
					return // it has nothing to say without an Engine
				}
				haproxytest.Poll(t, what, func() error {
					list, err := root.ClientList(t.Context()).Result()
					if err == nil && !strings.Contains(list, " user="+user+" ") {
						err = fmt.Errorf("no connection of %s:\n%s", user, list)
					}
					return err
				})
			}
			password("first")
			write(t, file, "first")
			s := &system{redis: redis, env: []string{"ROLLCALL_REDIS=redis://" + user + "@" + redis.Addr + "/0", "ROLLCALL_REDIS_PASSWORD_FILE=" + file}}
			p := s.spawn(t, append(args, "--log-format", "console")...)
			says := func(what string, times int) {
				t.Helper()
				haproxytest.Poll(t, what, func() error {
					if out := p.out.String(); strings.Count(out, what) < times {
						return errors.New(out)
					}
					return nil
				})
			}
			hangUp := func() {
				t.Helper()
				if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
					t.Fatal(err)
				}
			}
			says(c.begins, 1)
			connects("it works")
			hangUp()
			says("files read again; new connections use them", 1)

			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
			hangUp()
			says("a file cannot be read; open connections stay", 1)
			says("ROLLCALL_REDIS_PASSWORD_FILE: open "+file, 1)

			password("second")
			write(t, file, "second")
			hangUp()
			says("files read again; new connections use them", 2)
			if err := root.Do(t.Context(), "CLIENT", "KILL", "USER", user).Err(); err != nil {
				t.Fatal(err)
			}
			connects("it uses the new password")

			if args[0] == "serve" {
				write(t, token, "short")
				hangUp()
				says("at least 16 characters", 1)
			}
			if code := p.signal(t, syscall.SIGTERM); code != 0 {
				t.Errorf("exit %d", code)
			}
		})
	}
}

// TestPasswordVariable has a sidecar log in with the password of a variable.
func TestPasswordVariable(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	if err := s.redis.Client(t).Do(t.Context(), "ACL", "SETUSER", "sidecar", "reset", "on", ">in a variable", "~*", "&*", "+@all").Err(); err != nil {
		t.Fatal(err)
	}
	s.env = []string{"ROLLCALL_REDIS=redis://sidecar@" + s.redis.Addr + "/0", "ROLLCALL_REDIS_PASSWORD=in a variable"}
	p := s.spawn(t, "register", "--service", "web", "--addr", "127.0.0.1:9001")
	s.comes(t, "127.0.0.1:9001")
	if code := p.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
}
