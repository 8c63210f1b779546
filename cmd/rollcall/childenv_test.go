package main

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

func TestChildEnv(t *testing.T) {
	for given, want := range map[string]string{ // "" = it does not get it
		"PATH=/bin":                                         "PATH=/bin",
		"EMPTY=":                                            "EMPTY=",
		"DATABASE_PASSWORD=theirs":                          "DATABASE_PASSWORD=theirs",
		"DATABASE_URL=postgres://u:theirs@h/d":              "DATABASE_URL=postgres://u:theirs@h/d",
		"LISTEN_FDS=1":                                      "LISTEN_FDS=1",
		"NOTIFY_SOCKET=/run/n":                              "",
		"WATCHDOG_USEC=1":                                   "",
		"WATCHDOG_PID=1":                                    "",
		"ROLLCALL_SERVICE=web":                              "ROLLCALL_SERVICE=web",
		"ROLLCALL_TAG=owner=me@example.org":                 "ROLLCALL_TAG=owner=me@example.org",
		"ROLLCALL_REDIS_PASSWORD=s":                         "",
		"ROLLCALL_SENTINEL_PASSWORD=s":                      "",
		"ROLLCALL_CANARY_REDIS_PASSWORD=s":                  "",
		"ROLLCALL_ANY_TOKEN=s":                              "",
		"ROLLCALL_REDIS_PASSWORD_FILE=/f":                   "ROLLCALL_REDIS_PASSWORD_FILE=/f",
		"ROLLCALL_SENTINEL_USER=u":                          "ROLLCALL_SENTINEL_USER=u",
		"ROLLCALL_REDIS=redis://h:1/0":                      "ROLLCALL_REDIS=redis://h:1/0",
		"ROLLCALL_REDIS=redis://u@h:1/0":                    "ROLLCALL_REDIS=redis://u@h:1/0",
		"ROLLCALL_REDIS=redis://u:s@h:1/0":                  "ROLLCALL_REDIS=redis://u@h:1/0",
		"ROLLCALL_REDIS=redis://:s@h:1/0":                   "ROLLCALL_REDIS=redis://h:1/0",
		"ROLLCALL_REDIS=redis://u:s@t:r@h":                  "ROLLCALL_REDIS=redis://u@h",
		"ROLLCALL_REDIS=rediss+sentinel://u:s@a:1,b:2/m/0":  "ROLLCALL_REDIS=rediss+sentinel://u@a:1,b:2/m/0",
		"ROLLCALL_REDIS=redis+cluster://u:s@[::1]:1,b:2":    "ROLLCALL_REDIS=redis+cluster://u@[::1]:1,b:2",
		"ROLLCALL_REDIS=redis://u:s/s@h":                    "", // what is the password here?
		"ROLLCALL_REDIS=redis://u:s@s/s@h":                  "",
		"ROLLCALL_REDIS=redis://u:s@a,redis://u:s@b":        "",
		"ROLLCALL_CANARY_REDIS=redis://u:s@h?x=1":           "ROLLCALL_CANARY_REDIS=redis://u@h?x=1",
		"ROLLCALL_DATAPLANE=https://u:s@h:5555":             "ROLLCALL_DATAPLANE=https://u@h:5555",
		"ROLLCALL_CHECK=http://127.0.0.1:80/healthz?a=b#c":  "ROLLCALL_CHECK=http://127.0.0.1:80/healthz?a=b#c",
		"ROLLCALL_CHECK=exec:curl -u me:theirs http://h/@x": "",
	} {
		var wanted []string
		if want != "" {
			wanted = []string{want}
		}
		if got := childEnv([]string{given}); !slices.Equal(got, wanted) {
			t.Errorf("%s: %q, want %q", given, got, wanted)
		}
	}
	two := []string{"B=2", "ROLLCALL_REDIS_PASSWORD=s", "A=1"}
	if got := childEnv(two); !slices.Equal(got, []string{"B=2", "A=1"}) || two[1] != "ROLLCALL_REDIS_PASSWORD=s" {
		t.Errorf("%q of %q", got, two)
	}
}

// TestChildrenSeeNoSecret: an app and a command that checks it print their environment,
// by themselves and as the kernel has it, and try to read the sidecar's.
func TestChildrenSeeNoSecret(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	if err := s.redis.Client(t).Do(t.Context(), "acl", "setuser", "app", "on", ">s3kr1t-redis", "~*", "&*", "+@all").Err(); err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(secret, []byte("s3kr1t-file"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.env = []string{
		"ROLLCALL_REDIS=redis://app:s3kr1t-url@" + s.redis.Addr + "/0", "ROLLCALL_REDIS_PASSWORD=s3kr1t-redis",
		"ROLLCALL_SENTINEL_PASSWORD=s3kr1t-sentinel", "ROLLCALL_SENTINEL_PASSWORD_FILE=/nowhere",
		"ROLLCALL_CANARY_REDIS=redis://canary:s3kr1t-canary-url@127.0.0.1/0", "ROLLCALL_CANARY_REDIS_PASSWORD=s3kr1t-canary",
		"ROLLCALL_DATAPLANE=https://admin:s3kr1t-dataplane@127.0.0.1:5555", "ROLLCALL_SERVE_TOKEN=s3kr1t-token",
		"NOTIFY_SOCKET=", "WATCHDOG_USEC=4242", "THEIRS_PASSWORD=of the app's",
	}
	dir, err := os.MkdirTemp("", "rc")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	const body = `#!/bin/sh
show() { env; tr '\0' '\n' < /proc/$$/environ; echo parent; tr '\0' '\n' < /proc/$PPID/environ; echo end; }
show >> DIR/$1 2>&1
`
	script := filepath.Join(dir, "show")
	if err := errors.Join(os.WriteFile(script, []byte(strings.ReplaceAll(body, "DIR", dir)), 0o755), os.Chmod(dir, 0o777)); err != nil {
		t.Fatal(err)
	}
	p := s.spawnAs(t, nobody(), nil, "register", "--service", "web", "--addr", "127.0.0.1:9001", "--check", "exec:"+script+" check", "--check-interval", "1h",
		"--", "sh", "-c", script+" app; exec sleep 300")
	defer p.signal(t, syscall.SIGTERM)
	s.comes(t, "127.0.0.1:9001")
	for _, who := range []string{"app", "check"} {
		var seen string
		haproxytest.Poll(t, who+" has looked", func() error {
			text, err := os.ReadFile(filepath.Join(dir, who))
			if seen = string(text); err == nil && !strings.HasSuffix(seen, "end\n") {
				err = errors.New(seen)
			}
			return err
		})
		if strings.Contains(seen, "s3kr1t") || strings.Contains(seen, "4242") {
			t.Errorf("%s sees a secret:\n%s", who, seen)
		}
		for _, want := range []string{"ROLLCALL_REDIS=redis://app@" + s.redis.Addr, "ROLLCALL_CANARY_REDIS=redis://canary@127.0.0.1/0", "ROLLCALL_SENTINEL_PASSWORD_FILE=/nowhere", "THEIRS_PASSWORD=of the app's"} {
			if strings.Count(seen, want) < 2 {
				t.Errorf("%s does not see %s:\n%s", who, want, seen)
			}
		}
	}
}
