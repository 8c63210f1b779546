package main

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/docker"
	"rollcall/registrar/docker/dockertest"
	"rollcall/registrar/redistest"
)

// TestEngineCommand runs the agent as a host does: it finds what runs, serves its
// metrics, leaves nothing when it ends, and all with --leave.
func TestEngineCommand(t *testing.T) {
	t.Parallel()
	e := dockertest.Shared(t)
	s := &system{redis: redistest.Start(t)}
	labels := map[string]string{"SERVICE_NAME": "web"}
	c := e.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: labels})
	addr := c.Addr(t, "8080").String()
	intruder := e.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: map[string]string{"SERVICE_NAME": "payments"}})
	args := []string{"docker", "--engine", e.URL, "--advertise", e.Host, "--service", "web", "--service", "api", "--zone", "rack1"}
	m := s.monitor(t, args...)
	token := s.comes(t, addr)
	m.ready(t, "ok")
	registered := fmt.Sprintf(`rollcall_registered{addr="%s",service="web"}`, addr)
	m.shows(t, registered, 1, 1)
	m.shows(t, "rollcall_engine_up", 1, 1)
	m.shows(t, "rollcall_engine_containers", 1, many)
	m.shows(t, "rollcall_beats_total", 1, many)
	if out, _, _ := s.rollcall(t, "instances", "web"); !strings.Contains(out, "rack1") || !strings.Contains(out, "container="+c.ID[:12]) {
		t.Errorf("instances:\n%s", out)
	}
	haproxytest.Poll(t, "it says who is not let in", func() error {
		if out := m.out.String(); strings.Count(out, "service payments is none of those that are let in") != 1 {
			return errors.New(out)
		}
		return nil
	})
	if out, _, _ := s.rollcall(t, "services"); strings.Contains(out, "payments") {
		t.Errorf("%s is registered:\n%s", intruder.ID, out)
	}
	if code := m.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
	if again := s.token(t, addr); again != token {
		t.Errorf("after the agent's end its token is %q, was %q", again, token)
	}
	p := s.monitor(t, append(args, "--leave")...)
	p.shows(t, registered, 1, 1) // it has taken over
	c.Do(t, "pause")
	s.goes(t, addr, "unhealthy")
	c.Do(t, "unpause")
	s.comes(t, addr)
	if code := p.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
	s.goes(t, addr, "left")
}

// TestDockerFlags: what contradicts itself is refused before anything runs.
func TestDockerFlags(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ args, want string }{
		{"--internal --advertise 10.0.0.1", "--internal wants the containers'"},
		{"--internal --interface lo", "--internal wants the containers'"},
		{"--advertise 10.0.0.1 --interface lo", "want --advertise or --interface"},
		{"--advertise 10.0.0.1:80", "10.0.0.1:80"},
		{"--advertise 0.0.0.0", "unspecified"},
		{"--interface none0", "none0"},
		{"--advertise 10.0.0.1 --service web --service Web", `service name "Web"`},
		{"--network n --advertise 10.0.0.1", "a network is of internal addresses"},
		{"--engine engine --advertise 10.0.0.1", "docker engine"},
		{"--advertise 10.0.0.1 x", "want docker"},
	} {
		var out, errs strings.Builder
		if code := run(append([]string{"rollcall", "docker"}, strings.Fields(c.args)...), &out, &errs); code != exitUsage || !strings.Contains(errs.String(), c.want) {
			t.Errorf("%s: exit %d, %s", c.args, code, errs.String())
		}
	}
	if ip, err := resolveHost(t.Context(), "[fd00::1]"); err != nil || ip != netip.MustParseAddr("fd00::1") {
		t.Errorf("%v, %v", ip, err)
	}
}

// TestEngineNotify: the agent is ready when its Engine has answered.
func TestEngineNotify(t *testing.T) {
	e := dockertest.Shared(t)
	s := &system{redis: redistest.Start(t)}
	next := notifySocket(t)
	args := []string{"docker", "--advertise", e.Host, "--explicit", "--engine"}
	p := s.spawn(t, append(args, "unix:///none")...)
	if got := next(10 * time.Second); !strings.HasPrefix(got, "STATUS=the engine does not answer") {
		t.Errorf("heard %q", got)
	}
	if code := p.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
	p = s.spawn(t, append(args, e.URL)...)
	for _, want := range []string{"STOPPING=1", "STATUS=following the engine", "READY=1"} {
		if got := next(10 * time.Second); got != want {
			t.Errorf("heard %q, want %q", got, want)
		}
	}
	if code := p.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
}

// TestEngineMetricsOfOneAddress: what two containers claim is one line, and does
// not make the whole answer an error.
func TestEngineMetricsOfOneAddress(t *testing.T) {
	t.Parallel()
	at := netip.MustParseAddrPort("10.0.0.1:80")
	m := &monitor{}
	m.docker(func() docker.Status {
		return docker.Status{Instances: []docker.InstanceStatus{{Service: "web", Addr: at, Standing: docker.Registered}, {Service: "web", Addr: at, Standing: docker.Refused}}}
	})
	all := prometheus.NewRegistry()
	all.MustRegister(m.collectors...)
	families, err := all.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != registeredName {
			continue
		}
		if len(f.Metric) != 1 || f.Metric[0].GetGauge().GetValue() != 1 {
			t.Errorf("%v", f.Metric)
		}
		return
	}
	t.Error("no " + registeredName)
}

// TestEngineRights: the agent does all its work with the rights of its file, and
// Redis has refused none of it.
func TestEngineRights(t *testing.T) {
	e := dockertest.Shared(t)
	srv := startRoles(t)
	s := &system{redis: srv}
	c := e.Run(t, dockertest.Spec{Args: []string{"--linger", "2s"}, Publish: []string{"8080"}, Labels: map[string]string{"SERVICE_NAME": "rights"}})
	addr := c.Addr(t, "8080").String()
	p := s.spawn(t, "docker", "--redis", roleURL(srv, "docker"), "--engine", e.URL, "--advertise", e.Host, "--service", "rights")
	for _, want := range []string{"registered", "drained", "left"} {
		haproxytest.Poll(t, "it says "+want, func() error {
			if out := p.out.String(); !strings.Contains(out, `"message":"`+want+`"`) && !strings.Contains(out, " "+want+" ") {
				return errors.New(out)
			}
			return nil
		})
		if want == "registered" {
			c.Do(t, "stop")
		}
	}
	if code := p.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
	refused, err := srv.Client(t).ACLLog(t.Context(), 10).Result()
	if err != nil || len(refused) > 0 {
		t.Errorf("%s: refused %+v, %v", addr, refused, err)
	}
}
