package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/docker/dockertest"
)

// TestEngineCompose brings up scripts/deploy/compose.yaml, on images that are
// made here of this project's programs and of Debian's: requests flow through
// HAProxy to an app that is stopped, started and scaled, and none fails.
func TestEngineCompose(t *testing.T) {
	t.Parallel()
	compose, err := exec.LookPath("docker-compose")
	if err != nil {
		if os.Geteuid() != 0 {
			t.Skip("a Docker Engine of its own needs root")
		}
		t.Fatalf("%v; apt-get install docker-compose", err)
	}
	e := dockertest.Shared(t)
	program := filepath.Join(t.TempDir(), "rollcall")
	if out, err := exec.Command("../../scripts/build", program).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	app, err := e.Program("scripts/deploy/app")
	if err != nil {
		t.Fatal(err)
	}
	const deploy = "../../scripts/deploy/"
	if err := errors.Join(
		e.Dockerfile("rollcall", deploy+"Dockerfile", map[string]string{"rollcall": program}),
		e.Dockerfile("app", deploy+"app/Dockerfile", map[string]string{"app": app}),
		e.Installed("redis:debian", "redis-server"), e.Installed("haproxy:debian", "haproxy"),
	); err != nil {
		t.Fatal(err)
	}
	publish := e.Host + ":8088"
	play := func(ctx context.Context, args ...string) (string, error) {
		cmd := exec.CommandContext(ctx, compose, append([]string{"-f", deploy + "compose.yaml", "-p", "rc"}, args...)...)
		cmd.Env = append(os.Environ(), "DOCKER_HOST="+e.URL, "REDIS_IMAGE=redis:debian", "HAPROXY_IMAGE=haproxy:debian", "PUBLISH="+publish)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	must := func(args ...string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
		defer cancel()
		if out, err := play(ctx, args...); err != nil {
			t.Fatalf("docker-compose %v: %v\n%s", args, err, out)
		}
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if t.Failed() {
			out, _ := play(ctx, "logs", "--no-color")
			t.Log(out)
		}
		if out, err := play(ctx, "down", "-v", "-t", "10"); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
	must("up", "-d", "--no-build", "--scale", "web=2")

	url := "http://" + publish + "/"
	answer := func(n int) {
		t.Helper()
		c := &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
		haproxytest.Poll(t, fmt.Sprintf("%d apps answer", n), func() error {
			seen := map[string]bool{}
			for range 5 * n {
				r, err := c.Get(url)
				if err != nil {
					return err
				}
				b, err := io.ReadAll(r.Body)
				_ = r.Body.Close()
				if err != nil || r.StatusCode != http.StatusOK {
					return fmt.Errorf("status %s, %v", r.Status, err)
				}
				seen[string(b)] = true
			}
			if len(seen) != n {
				return fmt.Errorf("%d do", len(seen))
			}
			return nil
		})
	}
	answer(2)
	load := startLoad(t, url)
	haproxytest.Poll(t, "requests flow", func() error {
		if n := load.sent.Load(); n < 100 {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
	web := e.Labelled(t, "com.docker.compose.service=web")
	if len(web) != 2 {
		t.Fatalf("%d containers of web", len(web))
	}
	web[0].Do(t, "stop")
	answer(1)
	must("up", "-d", "--no-build", "--scale", "web=4")
	answer(4)
	for _, c := range e.Labelled(t, "com.docker.compose.project=rc") {
		i := c.Inspect(t)
		if i.Config.User != "65532:65532" || !i.HostConfig.ReadonlyRootfs || len(i.HostConfig.CapDrop) != 1 || strings.Join(i.HostConfig.SecurityOpt, "") != "no-new-privileges:true" {
			t.Errorf("%s: user %q, read-only %v, without %v, %v", i.Name, i.Config.User, i.HostConfig.ReadonlyRootfs, i.HostConfig.CapDrop, i.HostConfig.SecurityOpt)
		}
		if i.RestartCount > 0 && !strings.Contains(i.Name, "lbsync") { // which may be there before HAProxy's socket
			t.Errorf("%s was restarted %d times", i.Name, i.RestartCount)
		}
	}
	load.stop()
	if n := load.failed.Load(); n > 0 {
		t.Errorf("%d of %d requests failed: %s", n, load.sent.Load(), load.last)
	}
}
