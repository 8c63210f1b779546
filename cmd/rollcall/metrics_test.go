package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"
	"github.com/urfave/cli/v2"
	"go.yaml.in/yaml/v3"

	"rollcall/lbsync"
	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/notifier"
	"rollcall/notifier/httpapi"
	"rollcall/reaper"
	"rollcall/registrar"
	"rollcall/registrar/docker"
	"rollcall/registrar/redistest"
)

// monitored is a rollcall with --http.
type monitored struct {
	*process
	url string
}

var served = regexp.MustCompile(`serving metrics and health addr=(\S+)`)

// monitor starts a rollcall with --http on a port that it chooses itself.
func (s *system) monitor(t *testing.T, args ...string) *monitored {
	t.Helper()
	m := &monitored{process: s.spawn(t, append(args[:1:1], append([]string{"--http", "127.0.0.1:0"}, args[1:]...)...)...)}
	haproxytest.Poll(t, args[0]+" serves", func() error {
		found := served.FindStringSubmatch(m.out.String())
		if found == nil {
			return errors.New(m.out.String())
		}
		m.url = "http://" + found[1]
		return nil
	})
	return m
}

func (m *monitored) get(path string) (code int, body string, err error) {
	c := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := c.Get(m.url + path)
	if err != nil {
		return 0, "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return r.StatusCode, string(b), err
}

// value returns the value of one series; NaN is none of ours.
func (m *monitored) value(series string) (v float64, there bool, err error) {
	_, body, err := m.get("/metrics")
	if err != nil {
		return 0, false, err
	}
	for line := range strings.Lines(body) {
		if rest, ok := strings.CutPrefix(line, series+" "); ok {
			v, err := strconv.ParseFloat(strings.TrimSpace(rest), 64)
			return v, true, err
		}
	}
	return 0, false, nil
}

// shows waits until the series is there and at least low and at most high.
func (m *monitored) shows(t *testing.T, series string, low, high float64) {
	t.Helper()
	haproxytest.Poll(t, fmt.Sprintf("%s is within %v and %v", series, low, high), func() error {
		v, there, err := m.value(series)
		if err != nil || !there || v < low || v > high {
			return fmt.Errorf("%v, there: %v, %v", v, there, err)
		}
		return nil
	})
}

const many = 1e9

// ready waits until /readyz says yes, or no with these words, while /healthz
// says yes throughout.
func (m *monitored) ready(t *testing.T, why string) {
	t.Helper()
	haproxytest.Poll(t, "/readyz says "+why, func() error {
		if code, body, err := m.get("/healthz"); code != http.StatusOK || body != "ok\n" {
			t.Errorf("/healthz: %d %q %v", code, body, err)
		}
		code, body, err := m.get("/readyz")
		want := http.StatusServiceUnavailable
		if why == "ok" {
			want = http.StatusOK
		}
		if err != nil || code != want || !strings.Contains(body, why) || strings.Count(body, "\n") != 1 {
			return fmt.Errorf("%d %q, %v", code, body, err)
		}
		return nil
	})
	m.shows(t, "rollcall_ready", number(why == "ok"), number(why == "ok"))
}

// TestMetricsOfSidecar has every kind of refusal come to a sidecar.
func TestMetricsOfSidecar(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	rdb := s.redis.Client(t)
	file := filepath.Join(t.TempDir(), "ready")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// Heartbeats often enough that none of the outages here is over before one.
	args := []string{"register", "--service", "web", "--addr", "127.0.0.1:9001", "--interval", "100ms", "--ready-file", file}
	const registered = `rollcall_registered{addr="127.0.0.1:9001",service="web"}`
	failed := func(cause string) string { return `rollcall_beat_failures_total{cause="` + cause + `"}` }
	m := s.monitor(t, args...)
	m.ready(t, "ok")
	m.shows(t, "rollcall_beats_total", 3, many)
	m.shows(t, registered, 1, 1)
	m.shows(t, `rollcall_build_info{command="register",version="`+version()+`"}`, 1, 1)
	m.shows(t, "process_resident_memory_bytes", 1, many)
	if _, body, err := m.get("/metrics"); err != nil || strings.Contains(body, "rollcall_beat_failures_total{") {
		t.Errorf("failures without any: %v\n%s", err, body)
	}

	other := s.monitor(t, args...)
	loser := other
	haproxytest.Poll(t, "one of two loses", func() error {
		for _, p := range []*monitored{m, other} {
			if v, _, err := p.value(failed("not_owner")); err == nil && v > 0 {
				loser = p
				return nil
			}
		}
		return errors.New("neither")
	})
	loser.ready(t, "not registered")
	loser.shows(t, registered, 0, 0)
	if loser == m {
		m, other = other, m
	}
	if code := other.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}

	if err := rdb.Do(t.Context(), "replicaof", "127.0.0.1", "1").Err(); err != nil {
		t.Fatal(err)
	}
	m.shows(t, failed("readonly"), 1, many)
	m.ready(t, "not registered")
	if err := rdb.Do(t.Context(), "replicaof", "no", "one").Err(); err != nil {
		t.Fatal(err)
	}
	m.ready(t, "ok")
	if err := rdb.Do(t.Context(), "acl", "setuser", "default", "-evalsha", "-eval").Err(); err != nil {
		t.Fatal(err)
	}
	m.shows(t, failed("noperm"), 1, many)
	if err := rdb.Do(t.Context(), "acl", "setuser", "default", "+evalsha", "+eval").Err(); err != nil {
		t.Fatal(err)
	}
	m.ready(t, "ok")
	s.redis.Signal(t, syscall.SIGSTOP)
	m.shows(t, failed("timeout"), 1, many)
	s.redis.Signal(t, syscall.SIGCONT)
	m.ready(t, "ok")
	s.redis.Kill(t)
	m.shows(t, failed("connection"), 1, many)
	m.ready(t, "not registered")
	s.redis.Launch(t)
	m.ready(t, "ok")

	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	m.ready(t, "not registered")
	m.shows(t, registered, 0, 0)
	begun := time.Now()
	if code := m.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
	t.Logf("ended %v after SIGTERM", time.Since(begun).Round(time.Millisecond))
}

// TestBeatCauses holds the label to a set that no server can make grow.
func TestBeatCauses(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want string
	}{
		{registrar.ErrNotOwner, "not_owner"},
		{registrar.ErrFull, "full"},
		{registrar.ErrLeft, "left"},
		{registrar.ErrInterval, "interval"},
		{refusal("OOM command not allowed"), "oom"},
		{refusal("LOADING Redis is loading"), "loading"},
		{refusal("SURPRISE"), "refused"},
		{&net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}, "timeout"},
		{io.EOF, "connection"},
	} {
		if got := beatCause(fmt.Errorf("beat: %w", tt.err)); got != tt.want {
			t.Errorf("%v: %s, want %s", tt.err, got, tt.want)
		}
	}
}

// refusal is an answer of Redis as go-redis has it.
type refusal string

func (r refusal) Error() string { return string(r) }
func (r refusal) RedisError()   {}

var _ redis.Error = refusal("")

// TestMetricsOfReaper has one instance die alone, two together, and Redis go.
func TestMetricsOfReaper(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	const ttl = 3 * time.Second
	m := s.monitor(t, "reap", "--ttl", ttl.String())
	if code, body, err := m.get("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "not armed: ") {
		t.Errorf("at once: %d %q %v", code, body, err)
	}
	haproxytest.Poll(t, "a cause is there", func() error { // the first pulse may have been slow
		if _, body, err := m.get("/metrics"); err != nil || !strings.Contains(body, "rollcall_reaper_disarmed{") {
			return fmt.Errorf("%v\n%s", err, body)
		}
		return nil
	})
	var sidecars []*process
	for port := 9001; port <= 9004; port++ {
		sidecars = append(sidecars, s.spawn(t, "register", "--service", "web", "--addr", fmt.Sprintf("127.0.0.1:%d", port)))
	}
	m.ready(t, "ok")
	m.shows(t, "rollcall_reaper_armed", 1, 1)
	m.shows(t, "rollcall_reaper_pulses_total", 5, many)
	m.shows(t, "rollcall_reaper_canaries_total", 1, many)
	haproxytest.Poll(t, "no cause is there while it is armed", func() error {
		if _, body, err := m.get("/metrics"); err != nil || !strings.Contains(body, "rollcall_reaper_armed 1") || strings.Contains(body, "rollcall_reaper_disarmed{") {
			return fmt.Errorf("%v\n%s", err, body)
		}
		return nil
	})

	sidecars[0].signal(t, syscall.SIGKILL)
	beat := s.redis.Client(t).ZScore(t.Context(), "rollcall:{web}:instances", "127.0.0.1:9001").Val()
	m.shows(t, "rollcall_reaper_removed_total", 1, 1)
	m.shows(t, "rollcall_reaper_removal_lateness_seconds_count", 1, 1)
	var gone float64 // a busy machine may make it late, and the figure must say so
	if _, err := fmt.Sscanf(s.gone(t, "127.0.0.1:9001"), "expired %f", &gone); err != nil {
		t.Fatal(err)
	}
	late := (gone-beat)/1000 - ttl.Seconds()
	t.Logf("taken out %.3f s after its TTL", late)
	m.shows(t, "rollcall_reaper_removal_lateness_seconds_sum", max(0, late-0.5), late+0.5)
	m.shows(t, "rollcall_reaper_services", 1, 1)
	m.shows(t, "rollcall_reaper_instances", 3, 3)
	m.shows(t, "rollcall_reaper_holds", 0, 0)

	sidecars[1].signal(t, syscall.SIGKILL)
	sidecars[2].signal(t, syscall.SIGKILL)
	m.shows(t, "rollcall_reaper_suspects", 2, 2)
	m.shows(t, "rollcall_reaper_holds", 1, 2)
	m.shows(t, "rollcall_reaper_held_suspects", 2, 2)
	m.ready(t, "ok")
	m.shows(t, "rollcall_reaper_removed_total", 1, 1)

	s.redis.Kill(t)
	m.shows(t, "rollcall_reaper_pulse_failures_total", 1, many)
	m.ready(t, "not armed: pulse failed")
	m.shows(t, `rollcall_reaper_disarmed{cause="pulse failed"}`, 1, 1)
	m.shows(t, "rollcall_reaper_armed", 0, 0)
	s.redis.Launch(t)
	m.ready(t, "ok")
}

// TestMetricsOfCanary has a reaper whose canary may do nothing.
func TestMetricsOfCanary(t *testing.T) {
	s := &system{redis: redistest.Start(t)}
	if err := s.redis.Client(t).Do(t.Context(), "acl", "setuser", "weak", "on", ">x", "+@connection").Err(); err != nil {
		t.Fatal(err)
	}
	t.Setenv("ROLLCALL_CANARY_REDIS_PASSWORD", "x")
	m := s.monitor(t, "reap", "--ttl", "15s", "--canary-redis", "redis://weak@"+s.redis.Addr+"/0")
	m.shows(t, "rollcall_reaper_canary_failures_total", 3, many)
	m.shows(t, "rollcall_reaper_pulse_failures_total", 0, 0)
	m.ready(t, "not armed: the canary")
}

// TestMetricsOfLbsync has servers held, postponed, unplaced and refused, and
// then HAProxy go, and Redis.
func TestMetricsOfLbsync(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{
		{Name: "be", Slots: 2}, {Name: "be_checked", Slots: 4, Check: true}, {Name: "be_static", Balance: "static-rr", Slots: 2},
	}})}
	s.spawn(t, "reap", "--ttl", "3s")
	args := []string{"lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--backend", "db=be_checked", "--backend", "api=be_static", "--mode", "slots", "--allow", "127.0.0.0/8"}
	begun := time.Now()
	m := s.monitor(t, args...)
	web := func(name string) string { return name + `{backend="be",service="web"}` }
	m.ready(t, "ok") // of services that nobody has registered with yet
	m.shows(t, "rollcall_lbsync_driving", 1, 1)
	m.shows(t, web("rollcall_lbsync_servers_serving"), 0, 0)
	m.shows(t, web("rollcall_change_applied_seconds_count"), 0, 1)

	join := func(service string, more ...string) (*haproxytest.Instance, *process) {
		i := haproxytest.NewInstance(t)
		return i, s.spawn(t, append([]string{"register", "--service", service, "--addr", i.Addr().String()}, more...)...)
	}
	a, _ := join("web")
	b, _ := join("web")
	join("db")
	_, sidecar := join("db")
	m.shows(t, web("rollcall_lbsync_servers_serving"), 2, 2)
	m.shows(t, web("rollcall_lbsync_versions_behind"), 0, 0)
	m.shows(t, web("rollcall_change_applied_seconds_count"), 1, many)
	m.shows(t, web("rollcall_change_applied_seconds_sum"), 0.0001, 20)
	m.shows(t, "rollcall_haproxy_commands_total", 2, many)
	m.shows(t, "rollcall_haproxy_commands_refused_total", 0, 0)
	join("api", "--weight", "50")
	m.shows(t, "rollcall_haproxy_commands_refused_total", 1, many)

	_, third := join("web")
	m.shows(t, web("rollcall_lbsync_instances_unplaced"), 1, 1)
	third.signal(t, syscall.SIGTERM)
	m.shows(t, web("rollcall_lbsync_instances_unplaced"), 0, 0)

	for _, i := range []*haproxytest.Instance{a, b} {
		if _, stderr, code := s.rollcall(t, "drain", "web", i.Addr().String()); code != 0 {
			t.Fatalf("exit %d: %s", code, stderr)
		}
	}
	m.shows(t, web("rollcall_lbsync_drains_waiting"), 1, 1)
	m.shows(t, web("rollcall_lbsync_versions_behind"), 1, many)
	m.shows(t, web("rollcall_lbsync_servers_serving"), 1, 1)
	for _, i := range []*haproxytest.Instance{a, b} {
		if _, stderr, code := s.rollcall(t, "ready", "web", i.Addr().String()); code != 0 {
			t.Fatalf("exit %d: %s", code, stderr)
		}
	}
	m.shows(t, web("rollcall_lbsync_drains_waiting"), 0, 0)
	m.shows(t, web("rollcall_lbsync_versions_behind"), 0, 0)
	// One change at a time: together they cannot take longer than all of this.
	m.shows(t, web("rollcall_change_applied_seconds_count"), 3, many)
	m.shows(t, web("rollcall_change_applied_seconds_sum"), 0, time.Since(begun).Seconds())
	for _, op := range []string{"probe", "read", "apply", "peek"} {
		m.shows(t, `rollcall_haproxy_exchange_duration_seconds_count{operation="`+op+`"}`, 1, many)
	}

	sidecar.signal(t, syscall.SIGKILL) // its instance answers HAProxy's check
	m.shows(t, `rollcall_lbsync_servers_held{backend="be_checked",service="db"}`, 1, 1)
	m.shows(t, web("rollcall_lbsync_servers_held"), 0, 0)
	m.ready(t, "ok")

	second := s.monitor(t, args...)
	second.ready(t, "standing by")
	second.shows(t, "rollcall_lbsync_driving", 0, 0)
	second.signal(t, syscall.SIGTERM)

	m.shows(t, "rollcall_haproxy_restarts_total", 0, 0)
	s.ha.Kill(t)
	m.ready(t, "HAProxy does not answer")
	m.shows(t, "rollcall_haproxy_up", 0, 0)
	m.shows(t, `rollcall_haproxy_exchange_failures_total{operation="probe"}`, 1, many)
	const db = `{backend="be_checked",service="db"}`
	took := func() float64 {
		v, _, err := m.value("rollcall_change_applied_seconds_sum" + db)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	// What is heard while HAProxy is away took as long as it was away.
	m.shows(t, "rollcall_lbsync_versions_behind"+db, 0, 0)
	before := took()
	join("db")
	m.shows(t, "rollcall_lbsync_versions_behind"+db, 1, many)
	heard := time.Now()
	m.shows(t, `rollcall_haproxy_exchange_failures_total{operation="read"}`, 4, many)
	away := time.Since(heard).Seconds()
	s.ha.Restart(t)
	m.ready(t, "ok")
	m.shows(t, "rollcall_lbsync_versions_behind"+db, 0, 0)
	m.shows(t, "rollcall_change_applied_seconds_sum"+db, before+away, many)
	t.Logf("away for %.3f s, applied %.3f s after it was heard", away, took()-before)
	m.shows(t, "rollcall_haproxy_up", 1, 1)
	m.shows(t, "rollcall_haproxy_restarts_total", 1, 1)

	m.shows(t, "rollcall_redis_up", 1, 1)
	m.shows(t, "rollcall_redis_subscriptions_total", 1, 1)
	s.redis.Kill(t)
	m.ready(t, "redis does not answer")
	m.shows(t, "rollcall_redis_up", 0, 0)
	m.shows(t, "rollcall_redis_subscribed", 0, 0)
	s.redis.Launch(t)
	m.ready(t, "ok")
	m.shows(t, "rollcall_redis_subscribed", 1, 1)
	m.shows(t, "rollcall_redis_subscriptions_total", 2, many)
}

// TestMetricsOfWatch also holds that only --pprof serves pprof.
func TestMetricsOfWatch(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	m := s.monitor(t, "watch")
	m.ready(t, "ok")
	sidecar := s.spawn(t, "register", "--service", "web", "--addr", "127.0.0.1:9001")
	m.shows(t, `rollcall_watch_changes_total{what="here"}`, 1, 1)
	sidecar.signal(t, syscall.SIGTERM)
	m.shows(t, `rollcall_watch_changes_total{what="left"}`, 1, 1)
	s.redis.Kill(t)
	m.shows(t, "rollcall_redis_subscribed", 0, 0)
	m.ready(t, "redis does not answer")
	s.redis.Launch(t)
	m.ready(t, "ok")

	profiled := s.monitor(t, "watch", "--pprof")
	for _, tt := range []struct {
		m    *monitored
		path string
		want int
	}{
		{m, "/debug/pprof/", http.StatusNotFound}, {profiled, "/debug/pprof/", http.StatusOK},
		{m, "/debug/pprof/heap", http.StatusNotFound}, {profiled, "/debug/pprof/heap", http.StatusOK},
		{m, "/", http.StatusNotFound},
	} {
		if code, _, err := tt.m.get(tt.path); code != tt.want {
			t.Errorf("%s: %d, want %d, %v", tt.path, code, tt.want, err)
		}
	}
	port := strings.TrimPrefix(m.url, "http://")
	if _, stderr, code := s.rollcall(t, "watch", "--http", port); code != exitFailed || !strings.Contains(stderr, "rollcall: --http: listen tcp "+port) {
		t.Errorf("a port in use: exit %d, %q", code, stderr)
	}
	if code := m.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
}

// TestNobodyListens holds that without --http nothing is served.
func TestNobodyListens(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	with := s.monitor(t, "register", "--service", "web", "--addr", "127.0.0.1:9001").process
	without := s.spawn(t, "register", "--service", "web", "--addr", "127.0.0.1:9002")
	s.comes(t, "127.0.0.1:9002")
	for _, tt := range []struct {
		p    *process
		want int
	}{{with, 1}, {without, 0}} {
		if got := listening(t, tt.p.cmd.Process.Pid); got != tt.want {
			t.Errorf("%v listens on %d sockets, want %d", tt.p.cmd.Args, got, tt.want)
		}
	}
}

// listening counts the TCP sockets on which a process listens.
func listening(t *testing.T, pid int) (n int) {
	t.Helper()
	listens := map[string]bool{}
	for _, name := range []string{"tcp", "tcp6"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, name))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if f := strings.Fields(line); f[3] == "0A" { // proc(5), TCP_LISTEN
				listens["socket:["+f[9]+"]"] = true
			}
		}
	}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil || len(fds) == 0 {
		t.Fatal(len(fds), err)
	}
	for _, fd := range fds {
		if what, err := os.Readlink(fd); err == nil && listens[what] { // it may be closed by now
			n++
		}
	}
	return n
}

// metricNames returns the names of all metrics of all daemons, and of these the
// histograms'.
func metricNames(t *testing.T) (names []string, histograms map[string]bool) {
	t.Helper()
	rdb := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1"}) // nobody connects
	t.Cleanup(func() { _ = rdb.Close() })
	store, err := registrar.NewStore(rdb, registrar.DefaultNamespace)
	if err != nil {
		t.Fatal(err)
	}
	watcher, err := notifier.New(notifier.Config{}, store, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	server, err := httpapi.New(httpapi.Config{}, store, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	histograms = map[string]bool{}
	for _, wire := range []func(m *monitor){
		func(m *monitor) {
			addr := func() netip.AddrPort { return netip.MustParseAddrPort("127.0.0.1:1") }
			m.beats("web", addr, registrar.NewDamper(nil, zerolog.Nop()))
		},
		func(m *monitor) { m.docker(func() docker.Status { return docker.Status{} }) },
		func(m *monitor) { m.unseen() },
		func(m *monitor) {
			m.reaper(&reaper.Config{}, func() (map[registrar.Service]registrar.ReaperStatus, error) { return nil, nil })
		},
		func(m *monitor) {
			m.syncer(func() (lbsync.Status, bool) { return lbsync.Status{}, false }, m.balancer(&lbsync.Config{}, nil))
		},
		func(m *monitor) { m.watch(watcher) },
		func(m *monitor) { m.serves(server) },
	} {
		set := flag.NewFlagSet("", flag.PanicOnError)
		set.String("http", "127.0.0.1:1", "")
		c := cli.NewContext(nil, set, nil)
		c.Command = &cli.Command{Name: "x"}
		m, err := newMonitor(c, zerolog.Nop())
		if err != nil {
			t.Fatal(err)
		}
		wire(m)
		for _, collector := range m.collectors {
			descs := make(chan *prometheus.Desc, 100)
			collector.Describe(descs)
			close(descs)
			for d := range descs {
				name := regexp.MustCompile(`fqName: "([^"]+)"`).FindStringSubmatch(d.String())[1]
				names = append(names, name)
				switch collector.(type) {
				case prometheus.Histogram, *prometheus.HistogramVec:
					histograms[name] = true
				}
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names), histograms
}

// TestMetricNames holds the README's table, the alert rules and the dashboard to
// the metrics that there are.
func TestMetricNames(t *testing.T) {
	names, histograms := metricNames(t)
	if len(names) < 30 || len(histograms) != 3 {
		t.Fatalf("only %d metrics and %d histograms", len(names), len(histograms))
	}
	for _, n := range names {
		if !regexp.MustCompile(`^rollcall_[a-z_]+$`).MatchString(n) {
			t.Errorf("name %s", n)
		}
	}
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	var listed []string
	for _, m := range regexp.MustCompile("(?m)^\\| `(rollcall_[a-z_]+)(?:\\{[a-z,]+\\})?` \\|").FindAllStringSubmatch(string(readme), -1) {
		listed = append(listed, m[1])
	}
	slices.Sort(listed)
	if !slices.Equal(listed, names) {
		t.Errorf("the README has %v\nwant %v", listed, names)
	}

	exists := func(where, expression string) {
		t.Helper()
		found := regexp.MustCompile(`\brollcall_[a-z_]+`).FindAllString(expression, -1)
		if len(found) == 0 {
			t.Errorf("%s: %q names no metric", where, expression)
		}
		for _, name := range found {
			base := name
			for _, suffix := range []string{"_bucket", "_sum", "_count"} {
				if b, ok := strings.CutSuffix(name, suffix); ok && histograms[b] {
					base = b
				}
			}
			if !slices.Contains(names, base) || histograms[name] {
				t.Errorf("%s: there is no series %s", where, name)
			}
		}
	}
	var rules struct {
		Groups []struct {
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	text, err := os.ReadFile("../../scripts/deploy/prometheus/rules.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(text, &rules); err != nil || len(rules.Groups) != 1 || len(rules.Groups[0].Rules) < 10 {
		t.Fatalf("%v: %+v", err, rules)
	}
	seen := map[string]bool{}
	for _, r := range rules.Groups[0].Rules {
		exists(r.Alert, r.Expr)
		for _, a := range r.Annotations {
			if strings.Contains(a, "rollcall_") {
				exists(r.Alert, a)
			}
		}
		if r.Alert == "" || seen[r.Alert] || r.Labels["severity"] == "" || r.Annotations["summary"] == "" {
			t.Errorf("rule %+v", r)
		}
		seen[r.Alert] = true
	}
	var board struct {
		Panels []struct {
			ID      int
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if text, err = os.ReadFile("../../scripts/deploy/grafana/rollcall.json"); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &board); err != nil || len(board.Panels) < 10 {
		t.Fatalf("%v: %+v", err, board)
	}
	ids := map[int]bool{}
	for _, p := range board.Panels {
		if len(p.Targets) == 0 || p.Title == "" || ids[p.ID] {
			t.Errorf("panel %+v", p)
		}
		ids[p.ID] = true
		for _, e := range p.Targets {
			exists(p.Title, e.Expr)
		}
	}
}
