package main

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// TestNotAFile: whatever names a file and is a pipe, a device, a socket or a directory is
// refused at the start, in one line that says so, and nobody waits for a pipe's writer.
func TestNotAFile(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "rk") // short, for the socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	pipe := filepath.Join(dir, "p")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	kinds := map[string]string{pipe: "is a pipe", os.DevNull: "is a device", l.Addr().String(): "is a socket", dir: "is a directory"}
	register := []string{"register", "--service", "web", "--addr", "127.0.0.1:9001"}
	lbsync := []string{"lbsync", "--socket", "/none", "--backend", "web=be"}
	for what, c := range map[string]struct {
		args []string // PATH is the path
		env  string
	}{
		"--ready-file":          {args: append(register, "--ready-file", "PATH")},
		"--beat-file":           {args: append(register, "--beat-file", "PATH")},
		"--redis-ca":            {args: append(register, "--redis", "rediss://127.0.0.1:1", "--redis-ca", "PATH")},
		"--redis-cert":          {args: append(register, "--redis", "rediss://127.0.0.1:1", "--redis-cert", "PATH", "--redis-key", "PATH")},
		"redis' password":       {args: register, env: "ROLLCALL_REDIS_PASSWORD_FILE=PATH"},
		"sentinel's password":   {args: []string{"reap"}, env: "ROLLCALL_SENTINEL_PASSWORD_FILE=PATH"},
		"canary's password":     {args: []string{"reap", "--canary-redis", "redis://127.0.0.1:1"}, env: "ROLLCALL_CANARY_REDIS_PASSWORD_FILE=PATH"},
		"--state-file":          {args: append(lbsync, "--state-file", "PATH")},
		"--config":              {args: append(lbsync, "--config", "PATH")},
		"the API's password":    {args: []string{"lbsync", "--dataplane", "http://127.0.0.1:1", "--dataplane-user", "u", "--dataplane-password-file", "PATH", "--backend", "web=be"}},
		"the API's certificate": {args: []string{"lbsync", "--dataplane", "https://127.0.0.1:1", "--dataplane-ca", "PATH", "--backend", "web=be"}},
		"--token-file":          {args: []string{"serve", "--token-file", "PATH"}},
		"--tls-cert":            {args: []string{"serve", "--tls-cert", "PATH", "--tls-key", "PATH"}},
	} {
		for path, want := range kinds {
			s := &system{redis: &redistest.Server{Addr: "127.0.0.1:1"}, env: []string{strings.ReplaceAll(c.env, "PATH", path)}}
			args := make([]string, len(c.args))
			for i, a := range c.args {
				args[i] = strings.ReplaceAll(a, "PATH", path)
			}
			p := s.spawn(t, args...)
			select {
			case <-p.done:
			case <-time.After(time.Minute):
				t.Fatalf("%s, which %s: it does not end", what, want)
			}
			if out := p.out.String(); p.cmd.ProcessState.ExitCode() != 2 || strings.Count(out, "\n") != 1 || !strings.Contains(out, path+" "+want) {
				t.Errorf("%s, which %s: exit %d\n%s", what, want, p.cmd.ProcessState.ExitCode(), out)
			}
		}
	}
}

// TestStateDirKinds: an id and a lock that are no files are said, and keep lbsync from
// nothing.
func TestStateDirKinds(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 2}}})}
	dir := t.TempDir()
	lock := s.ha.Socket + ".lbsync-lock.be"
	if err := errors.Join(syscall.Mkfifo(lock, 0o600), syscall.Mkfifo(s.ha.Socket+".lbsync-id.be", 0o600)); err != nil {
		t.Fatal(err)
	}
	i := haproxytest.NewInstance(t)
	p := s.spawn(t, "lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8", "--state-dir", dir)
	s.spawn(t, "register", "--service", "web", "--addr", i.Addr().String())
	answered(t, "http://"+s.ha.Addr("be")+"/", i)
	for _, want := range []string{"running without a lock", lock + " is a pipe"} {
		if out := p.out.String(); !strings.Contains(out, want) {
			t.Errorf("it does not say %s:\n%s", want, out)
		}
	}
}
