package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// TestEvents reads the log of changes in all its forms, and follows it over a
// restart of Redis.
func TestEvents(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	done := func(args ...string) string {
		t.Helper()
		out, stderr, code := s.rollcall(t, args...)
		if code != 0 {
			t.Errorf("%v: exit %d, %s", args, code, stderr)
		}
		return out
	}
	if out := done("events"); !strings.HasPrefix(out, "TIME ") || strings.Count(out, "\n") != 1 {
		t.Errorf("nothing: %q", out)
	}
	follow := s.spawn(t, "events", "-f", "-o", "json")
	came := func(what string) {
		t.Helper()
		haproxytest.Poll(t, "it prints "+what, func() error {
			if out := follow.out.String(); !strings.Contains(out, what) {
				return errors.New(out)
			}
			return nil
		})
	}
	done("drain", "web", "10.0.0.1:80", "--absent", "--reason", "\x1b[31mred\n")
	done("maint", "api", "10.0.0.2:80", "--absent")
	done("weight", "web", "10.0.0.1:80", "20", "--absent")
	came(`"what":"weight"`)
	var events []registrar.Event
	for dec := json.NewDecoder(strings.NewReader(done("events", "-o", "json"))); dec.More(); {
		var e registrar.Event
		if err := dec.Decode(&e); err != nil {
			t.Fatal(err)
		}
		events = append(events, e)
	}
	if len(events) != 3 || events[0].What != "drained" || events[0].Addr != "10.0.0.1:80" || events[0].Why != "\x1b[31mred\n" || events[2].Version != 2 {
		t.Fatalf("%+v", events)
	}
	out := done("events")
	if strings.Contains(out, "\x1b") || strings.Count(out, "\n") != 4 || !strings.Contains(out, "?[31mred?") {
		t.Errorf("drives the terminal: %q", out)
	}
	for _, tt := range []struct {
		args, want string // what it prints, by service
	}{
		{"web", "web web"}, {"api", "api"}, {"api web", "web api web"}, {"none", ""},
		{"-n 2", "api web"}, {"--since 1h", "web api web"}, {"--since 1h -n 1", "web"}, {"--since 1ns", ""},
		{"--since " + events[0].ID, "api web"}, {"--since " + events[2].ID, ""},
	} {
		var got []string
		for line := range strings.Lines(done(append([]string{"events"}, strings.Fields(tt.args)...)...)) {
			got = append(got, strings.Fields(line)[2])
		}
		if got := strings.Join(got[1:], " "); got != tt.want {
			t.Errorf("%s: printed %q, want %q", tt.args, got, tt.want)
		}
	}
	for _, args := range []string{"-n 0", "-n -1", "--since x", "--since -1m", "--since 1-1-1", "Web", "-o yaml"} {
		if _, stderr, code := s.rollcall(t, append([]string{"events"}, strings.Fields(args)...)...); code != exitUsage {
			t.Errorf("%s: exit %d, %s", args, code, stderr)
		}
	}

	s.redis.Kill(t)
	if out, stderr, code := s.rollcall(t, "events"); code != exitFailed || stderr == "" || out != "" {
		t.Errorf("without Redis: exit %d, %q, %q", code, out, stderr)
	}
	came("cannot read the events; trying again")
	s.redis.Launch(t) // with nothing
	for n := range 3 {
		done("maint", "web", fmt.Sprintf("10.0.1.%d:80", n), "--absent")
		came(fmt.Sprintf("10.0.1.%d:80", n))
	}
	if code := follow.signal(t, syscall.SIGINT); code != 0 {
		t.Errorf("exit %d", code)
	}
	printed := 0
	for line := range strings.Lines(follow.out.String()) {
		if strings.HasPrefix(line, "{") {
			printed++
		}
	}
	if printed != 6 {
		t.Errorf("printed %d events, want 6:\n%s", printed, follow.out)
	}
}
