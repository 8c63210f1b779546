package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/moby/moby/client"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/docker/dockertest"
	"rollcall/registrar/redistest"
)

// fleet is an Engine of its own with containers of two services, and all that sends
// requests to them.
type fleet struct {
	*system
	engine *dockertest.Engine
	agent  []string // its command line

	mu       sync.Mutex
	services map[string]registrar.Service // by the containers' host names, which they answer with
	wrong    []answerOf                   // from a container of the other service
	failed   []answerOf
	answers  map[string]int // right ones, by host name
}

// answerOf is what became of one request for a service.
type answerOf struct {
	at  time.Time
	to  registrar.Service
	by  string // host name
	why error
}

var fleetServices = []registrar.Service{"web", "misc"}

// newFleet starts all but containers and the agent, which addresses names.
func newFleet(t *testing.T, addresses ...string) *fleet {
	t.Helper()
	f := &fleet{engine: dockertest.Start(t), services: map[string]registrar.Service{}, answers: map[string]int{}}
	var backends []haproxytest.Backend
	for _, svc := range fleetServices {
		backends = append(backends, haproxytest.Backend{Name: "be_" + string(svc), Slots: 8, Check: true, Balance: "roundrobin"})
	}
	f.system = &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: backends})}
	// An agent that was killed is followed at once: by its lease, which ends after half
	// of an interval.
	if err := f.redis.Client(t).HSet(t.Context(), "rollcall:config", "ttl_ms", 15000, "interval_ms", 1000).Err(); err != nil {
		t.Fatal(err)
	}
	f.agent = append([]string{"docker", "--engine", f.engine.URL, "--explicit"}, addresses...)
	if len(addresses) == 0 {
		f.agent = append(f.agent, "--advertise", f.engine.Host)
	}
	f.spawn(t, "lbsync", "--socket", f.ha.Socket, "--backend", "web=be_web,misc=be_misc", "--allow", "127.0.0.0/8", "--allow", "10.0.0.0/8")
	ctx, cancel := context.WithCancel(context.Background())
	var probing sync.WaitGroup
	for _, svc := range fleetServices {
		probing.Go(func() { f.probe(ctx, svc, "http://"+f.ha.Addr("be_"+string(svc))+"/") })
	}
	t.Cleanup(func() { cancel(); probing.Wait() })
	return f
}

// probe asks for svc all the time, and notes who answers.
func (f *fleet) probe(ctx context.Context, svc registrar.Service, url string) {
	c := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	pace := time.NewTicker(5 * time.Millisecond)
	defer pace.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-pace.C:
		}
		a := answerOf{at: time.Now(), to: svc}
		r, err := c.Get(url)
		if err == nil {
			var body []byte
			body, err = io.ReadAll(r.Body)
			_ = r.Body.Close()
			if r.StatusCode != http.StatusOK {
				err = fmt.Errorf("status %d", r.StatusCode)
			}
			a.by = strings.TrimSpace(string(body))
		}
		f.mu.Lock()
		switch a.why = err; {
		case err != nil:
			f.failed = append(f.failed, a)
		case f.services[a.by] != svc:
			f.wrong = append(f.wrong, a)
		}
		if err == nil && f.services[a.by] == svc {
			f.answers[a.by]++
		}
		f.mu.Unlock()
	}
}

// run starts a container of svc.
func (f *fleet) run(t *testing.T, svc registrar.Service, spec dockertest.Spec) *dockertest.Container {
	t.Helper()
	spec.Labels = map[string]string{"SERVICE_NAME": string(svc)}
	c := f.engine.Run(t, spec)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.services[c.ID[:12]] = svc
	return c
}

// serve waits until each of the containers has answered since the call.
func (f *fleet) serve(t *testing.T, cs ...*dockertest.Container) {
	t.Helper()
	f.mu.Lock()
	clear(f.answers)
	f.mu.Unlock()
	haproxytest.Poll(t, "each container answers", func() error {
		f.mu.Lock()
		defer f.mu.Unlock()
		for _, c := range cs {
			if f.answers[c.ID[:12]] == 0 {
				return fmt.Errorf("%s does not, %v do, %d fail", c.ID[:12], f.answers, len(f.failed))
			}
		}
		return nil
	})
}

// awaitWrong waits until requests go wrong: a test in which none does shows nothing.
func (f *fleet) awaitWrong(t *testing.T) {
	t.Helper()
	haproxytest.Poll(t, "requests go wrong while nobody can say so", func() error {
		f.mu.Lock()
		defer f.mu.Unlock()
		if len(f.wrong) == 0 {
			return fmt.Errorf("%v", f.answers)
		}
		return nil
	})
}

// judge holds the answers since the last call to the promise: none is wrong later than
// a second after the first heartbeat of the container that gave it. at is where the
// containers are.
func (f *fleet) judge(t *testing.T, step string, at map[*dockertest.Container]netip.AddrPort) {
	t.Helper()
	entries, err := f.redis.Client(t).XRange(t.Context(), "rollcall:events", "-", "+").Result()
	if err != nil {
		t.Fatal(err)
	}
	first := map[string]time.Time{} // heartbeat of the last registration, by host name
	for c, addr := range at {
		for _, e := range entries {
			if what := e.Values["what"]; (what == "joined" || what == "takeover") && e.Values["service"] == string(f.services[c.ID[:12]]) && e.Values["addr"] == addr.String() {
				var ms int64
				if _, err := fmt.Sscan(fmt.Sprint(e.Values["at"]), &ms); err != nil {
					t.Fatal(err)
				}
				first[c.ID[:12]] = time.UnixMilli(ms)
			}
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var last time.Duration
	late := 0
	for _, a := range f.wrong {
		since, known := first[a.by]
		if !known {
			t.Errorf("%s: %s answers for %s and has never been registered", step, a.by, a.to)
			continue
		}
		last = max(last, a.at.Sub(since))
		if a.at.Sub(since) > time.Second {
			late++
		}
	}
	total := 0
	for _, n := range f.answers {
		total += n
	}
	t.Logf("%s: %d right since the last one came, %d wrong, the last %v after the first heartbeat of who gave it; %d failed", step, total, len(f.wrong), last.Round(time.Millisecond), len(f.failed))
	if late > 0 {
		t.Errorf("%s: %d answers were wrong later than a second after the first heartbeat", step, late)
	}
	f.wrong, f.failed = nil, nil
}

// TestEngineFleetReboot switches a host off and on: Docker deals random ports anew, so
// that each service's old registrations point at the other's containers. Then one
// service's container is replaced by the other's on the same port while the agent is
// away.
func TestEngineFleetReboot(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	agent := f.spawn(t, f.agent...)
	free := dockertest.Spec{Publish: []string{"8080"}}
	var cs []*dockertest.Container
	for _, svc := range []registrar.Service{"web", "web", "misc", "misc"} {
		cs = append(cs, f.run(t, svc, free))
	}
	f.serve(t, cs...)
	where := func() map[*dockertest.Container]netip.AddrPort {
		at := map[*dockertest.Container]netip.AddrPort{}
		for _, c := range cs {
			at[c] = c.Addr(t, "8080")
		}
		return at
	}
	before := where()
	f.judge(t, "before", before)

	agent.signal(t, syscall.SIGKILL)
	f.engine.Kill(t)
	if err := f.engine.Launch(); err != nil {
		t.Fatal(err)
	}
	for i := range cs { // the other way round
		cs[len(cs)-1-i].Do(t, "start")
	}
	at := where()
	moved := 0
	for c, addr := range at {
		for d, was := range before {
			if addr == was && f.services[c.ID[:12]] != f.services[d.ID[:12]] {
				moved++
			}
		}
	}
	if moved == 0 {
		t.Fatalf("no port went to the other service: %v, before %v", at, before)
	}
	f.awaitWrong(t)
	agent = f.spawn(t, f.agent...)
	f.serve(t, cs...)
	f.judge(t, fmt.Sprintf("reboot, %d of %d ports with the other service", moved, len(cs)), at)

	agent.signal(t, syscall.SIGKILL)
	old := cs[0]
	fixed := dockertest.Spec{Publish: free.Publish, Port: at[old].Port()}
	old.Do(t, "KILL")
	haproxytest.Poll(t, "the port is free", func() error {
		if old.Inspect(t).State.Running {
			return fmt.Errorf("%s runs", old.ID)
		}
		return nil
	})
	next := f.run(t, "misc", fixed)
	f.awaitWrong(t)
	f.spawn(t, f.agent...)
	f.serve(t, next)
	f.judge(t, "a fixed port reused", map[*dockertest.Container]netip.AddrPort{next: next.Addr(t, "8080")})
	if out, _, _ := f.rollcall(t, "instances", "web"); strings.Contains(out, next.Addr(t, "8080").String()) {
		t.Errorf("web still has it:\n%s", out)
	}
}

// TestEngineFleetInternal does the same with the containers' own addresses, which are
// dealt anew too, and then moves the only container of a service to another network.
func TestEngineFleetInternal(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "--internal")
	agent := f.spawn(t, f.agent...)
	cs := []*dockertest.Container{f.run(t, "web", dockertest.Spec{}), f.run(t, "misc", dockertest.Spec{})}
	f.serve(t, cs...)
	where := func() map[*dockertest.Container]netip.AddrPort {
		at := map[*dockertest.Container]netip.AddrPort{}
		for _, c := range cs {
			at[c] = netip.AddrPortFrom(c.IP(t), 8080)
		}
		return at
	}
	before := where()
	if m := f.meta(t, before[cs[0]].String()); !strings.Contains(m, `"own":true`) {
		t.Errorf("an override of it would be of who comes to its address next: %s", m)
	}
	agent.signal(t, syscall.SIGKILL)
	for _, c := range cs {
		c.Do(t, "KILL")
	}
	haproxytest.Poll(t, "all have ended", func() error {
		for _, c := range cs {
			if c.Inspect(t).State.Running {
				return fmt.Errorf("%s runs", c.ID)
			}
		}
		return nil
	})
	cs[1].Do(t, "start")
	cs[0].Do(t, "start")
	at := where()
	if at[cs[0]] != before[cs[1]] || at[cs[1]] != before[cs[0]] {
		t.Fatalf("the addresses were not dealt anew: %v, before %v", at, before)
	}
	f.awaitWrong(t)
	agent = f.spawn(t, append(f.agent, "--drain-wait", "1m")...)
	f.serve(t, cs...)
	f.judge(t, "addresses dealt anew", at)

	// docker network connect and disconnect. A network whose name comes later changes
	// nothing until the first one is gone.
	ctx, docker := t.Context(), f.engine.Client
	if _, err := docker.NetworkCreate(ctx, "second", client.NetworkCreateOptions{Driver: "bridge"}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := docker.NetworkDisconnect(context.Background(), "second", client.NetworkDisconnectOptions{Container: cs[0].ID, Force: true}); err != nil {
			t.Error(err)
		}
		if _, err := docker.NetworkRemove(context.Background(), "second", client.NetworkRemoveOptions{}); err != nil {
			t.Error(err)
		}
	})
	if _, err := docker.NetworkConnect(ctx, "second", client.NetworkConnectOptions{Container: cs[0].ID}); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	if _, err := docker.NetworkDisconnect(ctx, f.engine.Network, client.NetworkDisconnectOptions{Container: cs[0].ID}); err != nil {
		t.Fatal(err)
	}
	moved := netip.AddrPortFrom(cs[0].Inspect(t).NetworkSettings.Networks["second"].IPAddress, 8080)
	haproxytest.Poll(t, "the new address is registered and the old one is not", func() error {
		out, _, _ := f.rollcall(t, "instances", "web")
		if !strings.Contains(out, moved.String()) || strings.Contains(out, at[cs[0]].String()) {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	f.serve(t, cs[0])
	t.Logf("it answers %v after it has moved", time.Since(begun).Round(time.Millisecond))
	if took := time.Since(begun); took > 30*time.Second {
		t.Errorf("it took %v: it has waited for its drain", took)
	}
	if out := agent.out.String(); strings.Contains(out, "draining") {
		t.Errorf("it has drained:\n%s", out)
	}
}

// TestEngineUnitStops runs the unit's ExecStop, and then the SIGTERM that systemd
// sends, beside an agent: when the host stops, all leave; when the unit is restarted,
// nothing does.
func TestEngineUnitStops(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../scripts/deploy/systemd/rollcall-docker.service")
	if err != nil {
		t.Fatal(err)
	}
	line := regexp.MustCompile(`(?m)^ExecStop=\+/bin/sh -c '(.*)'$`).FindSubmatch(text)
	if line == nil {
		t.Fatal("the unit has no ExecStop")
	}
	stop := strings.ReplaceAll(string(line[1]), "$$", "$") // as systemd does
	e := dockertest.Shared(t)
	s := &system{redis: redistest.Start(t)}
	c := e.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: map[string]string{"SERVICE_NAME": "unit"}})
	addr := c.Addr(t, "8080").String()
	here := func() bool {
		out, _, _ := s.rollcall(t, "instances", "unit")
		return strings.Contains(out, addr)
	}
	for _, state := range []string{"running", "degraded", "stopping"} {
		p := s.monitor(t, "docker", "--engine", e.URL, "--advertise", e.Host, "--service", "unit")
		p.shows(t, fmt.Sprintf(`rollcall_registered{addr="%s",service="unit"}`, addr), 1, 1)
		bin := t.TempDir()
		if err := os.WriteFile(filepath.Join(bin, "systemctl"), []byte("#!/bin/sh\n[ \"$*\" = is-system-running ] && echo "+state+"\nexit 1\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("/bin/sh", "-c", stop)
		cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), fmt.Sprintf("MAINPID=%d", p.cmd.Process.Pid))
		if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%s: %v\n%s", state, err, out)
		}
		if code := p.signal(t, syscall.SIGTERM); code != 0 {
			t.Errorf("%s: exit %d\n%s", state, code, p.out)
		}
		if got, want := here(), state != "stopping"; got != want {
			t.Errorf("%s: registered after the end: %v, want %v\n%s", state, got, want, p.out)
		}
	}
}

// TestEngineTwoAgents: the second agent on an Engine says so, is not ready, takes
// nothing out when it ends, and takes over when the first one was killed.
func TestEngineTwoAgents(t *testing.T) {
	t.Parallel()
	e := dockertest.Shared(t)
	s := &system{redis: redistest.Start(t)}
	c := e.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: map[string]string{"SERVICE_NAME": "web"}})
	addr := c.Addr(t, "8080").String()
	args := []string{"docker", "--engine", e.URL, "--advertise", e.Host, "--service", "web", "--leave"}
	first := s.spawn(t, args...)
	token := s.comes(t, addr)
	second := s.monitor(t, args...)
	second.ready(t, "standing by: another agent registers the containers of this engine")
	second.shows(t, "rollcall_ready", 0, 0)
	if n := strings.Count(second.out.String(), "another agent registers the containers of this engine; standing by"); n != 1 {
		t.Errorf("it says so %d times:\n%s", n, second.out)
	}
	if code := second.signal(t, syscall.SIGTERM); code != 0 || strings.Contains(second.out.String(), "left") {
		t.Errorf("exit %d\n%s", code, second.out)
	}
	if now := s.token(t, addr); now != token {
		t.Errorf("the token became %q", now)
	}
	second = s.monitor(t, args...)
	second.ready(t, "standing by: another agent registers the containers of this engine")
	// Agents of other services have nothing to do with them.
	other := s.spawn(t, append(args[:len(args)-1:len(args)-1], "--service", "three")...)
	haproxytest.Poll(t, "it follows the engine", func() error {
		if out := other.out.String(); !strings.Contains(out, "the engine answers") {
			return errors.New(out)
		}
		return nil
	})
	other.signal(t, syscall.SIGTERM)
	begun := time.Now()
	first.signal(t, syscall.SIGKILL)
	second.ready(t, "ok")
	t.Logf("ready %v after the first one was killed", time.Since(begun).Round(time.Millisecond))
	if now := s.token(t, addr); now != token {
		t.Errorf("the token became %q", now)
	}
	if code := second.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
	s.goes(t, addr, "left")
}

// TestEngineOldRights: an agent whose Redis user has the rights of an older release
// says once what it cannot do, and does all else.
func TestEngineOldRights(t *testing.T) {
	t.Parallel()
	e := dockertest.Shared(t)
	srv := redistest.Start(t)
	s := &system{redis: srv}
	text, err := os.ReadFile("../../scripts/deploy/acl/docker.acl")
	if err != nil {
		t.Fatal(err)
	}
	rule := string(text)
	for _, more := range []string{" (+get +set +pttl ~rollcall:docker:*) (+smembers +scard +sadd +srem +pexpire ~rollcall:docker-addrs:*)", " ~rollcall:docker:* ~rollcall:docker-addrs:*"} {
		if !strings.Contains(rule, more) {
			t.Fatalf("docker.acl lacks%s", more)
		}
		rule = strings.Replace(rule, more, "", 1)
	}
	rule = passwordHash.ReplaceAllString(rule, ">old")
	selectors := regexp.MustCompile(`\([^)]*\)|\S+`).FindAllString(strings.TrimPrefix(rule, "user "), -1)
	setuser := []any{"ACL", "SETUSER"}
	for _, f := range selectors {
		setuser = append(setuser, f)
	}
	if err := srv.Client(t).Do(t.Context(), setuser...).Err(); err != nil {
		t.Fatal(err)
	}
	c := e.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: map[string]string{"SERVICE_NAME": "web"}})
	addr := c.Addr(t, "8080").String()
	p := s.spawn(t, "docker", "--redis", "redis://docker:old@"+srv.Addr+"/0", "--engine", e.URL, "--advertise", e.Host, "--service", "web")
	s.comes(t, addr)
	c.Do(t, "KILL")
	s.goes(t, addr, "left")
	if n := strings.Count(p.out.String(), "going on without a lease"); n != 1 {
		t.Errorf("it says so %d times:\n%s", n, p.out)
	}
}
