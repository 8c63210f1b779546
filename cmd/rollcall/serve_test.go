package main

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"rollcall/registrar/redistest"
)

// TestServe holds what `serve` takes, counts and refuses.
func TestServe(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	dir := t.TempDir()
	short, token := filepath.Join(dir, "short"), filepath.Join(dir, "token")
	for file, text := range map[string]string{short: "fifteen letters\n", token: pageToken + "\n"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		args []string
		want string
		code int
	}{
		{[]string{"--listen", "8300"}, "want an address and a port", exitUsage},
		{[]string{"more"}, "see rollcall serve --help", exitUsage},
		{[]string{"--token-file", short}, "at least 16 characters", exitUsage},
		{[]string{"--token-file", short + "er"}, "no such file", exitUsage},
		{[]string{"--host", "ops.example:443"}, "want a name without a port", exitUsage},
		{[]string{"--pprof"}, "--pprof goes with --http", exitUsage},
		{[]string{"--listen", "192.0.2.1:1"}, "--listen: listen tcp 192.0.2.1:1", exitFailed},
		{[]string{"--redis", "redis+cluster://127.0.0.1:1"}, "Cluster", exitUsage},
	} {
		if _, stderr, code := s.rollcall(t, append([]string{"serve"}, c.args...)...); code != c.code || !strings.Contains(stderr, c.want) {
			t.Errorf("%v: exit %d %q, want %d %q", c.args, code, stderr, c.code, c.want)
		}
	}

	page := s.page(t, "serve", "--token-file", token, "--host", "ops.example", "--http", "127.0.0.1:0")
	m := &monitored{process: page.process, url: "http://" + served.FindStringSubmatch(page.out.String())[1]}
	m.ready(t, "ok")
	for _, auth := range []string{"Bearer guess", "Bearer " + pageToken} {
		if _, answer, err := page.do(http.MethodPost, "/v1/services/web/instances/127.0.0.1:1/maint?absent=true", `{"reason":"x"}`, "Authorization", auth); err != nil {
			t.Error(answer, err)
		}
	}
	m.shows(t, "rollcall_serve_writes_total", 1, 1)
	m.shows(t, "rollcall_serve_tokens_refused_total", 1, 1)
	if code, body, err := page.do(http.MethodGet, "/v1/status", ""); err != nil || code != http.StatusServiceUnavailable || !strings.Contains(body, "no reaper is armed") {
		t.Errorf("/v1/status: %d %s, %v", code, body, err)
	}
	s.redis.Kill(t)
	m.ready(t, "redis does not answer")
	if code := page.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
}
