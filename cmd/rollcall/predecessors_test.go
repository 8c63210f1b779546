package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/idfile"
	"rollcall/registrar/redistest"
)

// pid returns the process id of the app that a sidecar is around.
func (p *process) pid(t *testing.T) (pid int) {
	t.Helper()
	p.says(t, "app started")
	_, rest, _ := strings.Cut(p.out.String(), "pid=")
	if _, err := fmt.Sscan(rest, &pid); err != nil {
		t.Fatalf("%v: %s", err, p.out)
	}
	t.Cleanup(func() { _ = syscall.Kill(-pid, syscall.SIGKILL) }) // it may have ended
	return pid
}

// killed kills a sidecar and the app that it is around, neither of which can leave, and
// waits until both have ended.
func (p *process) killed(t *testing.T) {
	t.Helper()
	pid := p.pid(t)
	send(t, p, syscall.SIGKILL)
	must(t, syscall.Kill(pid, syscall.SIGKILL))
	p.signal(t, syscall.SIGKILL)
	haproxytest.Poll(t, "the app has ended", func() error {
		if err := syscall.Kill(-pid, 0); !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("kill: %v", err)
		}
		return nil
	})
}

// rest is a command that does nothing.
var rest = []string{"--", "sh", "-c", "while :; do sleep 0.05; done"}

// of returns the id with which svc has addr; empty if it has not.
func (s *system) of(t *testing.T, svc, addr string) string {
	t.Helper()
	store, err := registrar.NewStore(s.redis.Client(t), registrar.DefaultNamespace)
	must(t, err)
	e, err := store.Entry(t.Context(), registrar.Service(svc), netip.MustParseAddrPort(addr))
	must(t, err)
	if !e.Present {
		return ""
	}
	return e.Instance.Meta.ID
}

// response is one response of a backend.
type response struct {
	asked, at time.Time
	by        string // the service whose app has given it; else an error or a status
}

// askAll sends a request each 5 ms, on its own connection, until it is told to stop, and
// then returns the answers. Those that wait for theirs hold up no others.
func askAll(t *testing.T, url string) (stop func() []response) {
	t.Helper()
	end := make(chan struct{})
	var mu sync.Mutex
	var all []response
	ask := func() {
		a := response{asked: time.Now()}
		r, err := alone.Get(url)
		switch {
		case err != nil:
			a.by = err.Error()
		default:
			body, _ := io.ReadAll(r.Body) // what has come of it tells who it was
			r.Body.Close()
			a.by, _, _ = strings.Cut(string(body), " ")
			if r.StatusCode != 200 {
				a.by = r.Status
			}
		}
		a.at = time.Now()
		mu.Lock()
		defer mu.Unlock()
		all = append(all, a)
	}
	var asking sync.WaitGroup
	asking.Go(func() {
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-end:
				return
			case <-tick.C:
				asking.Go(ask)
			}
		}
	})
	once := sync.OnceFunc(func() { close(end); asking.Wait() })
	t.Cleanup(once)
	return func() []response { once(); return all }
}

// firstBeat waits for the first heartbeat of svc at addr, and returns when Redis had it.
func (s *system) firstBeat(t *testing.T, svc, addr string) (at time.Time) {
	t.Helper()
	rdb := s.redis.Client(t)
	haproxytest.Poll(t, svc+" beats", func() error {
		score, err := rdb.ZScore(t.Context(), "rollcall:{"+svc+"}:instances", addr).Result()
		at = time.UnixMilli(int64(score))
		return err
	})
	return at
}

// TestPortUsedAgain kills a sidecar of web and its app at once, and has an app of another
// service listen on the same port, with a sidecar of its own. From that one's first
// heartbeat + 1 s no request for web goes there, although the registration of web looks
// alive for a TTL of 15 s, its HAProxy check, if there is one, passes, and it may be the
// last one.
func TestPortUsedAgain(t *testing.T) {
	t.Parallel()
	for _, last := range []bool{false, true} {
		for _, mode := range []string{"slots", "dynamic"} {
			t.Run(fmt.Sprintf("last=%v, %s", last, mode), func(t *testing.T) {
				// Without a check HAProxy sends requests to a port on which nobody
				// listens for a while, too.
				be := haproxytest.Backend{Name: "be", Balance: "roundrobin"}
				if mode == "slots" {
					be.Slots = 4
				} else {
					be.Check = true
				}
				s := &system{redis: redistest.Start(t), env: []string{"RUNTIME_DIRECTORY=" + t.TempDir()}}
				s.ha = haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{be}})
				s.spawn(t, "lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8", "--server-options", "check inter 200ms")
				app := func(svc, addr string) *process {
					p := s.spawn(t, "register", "--service", svc, "--addr", addr, "--check", "http://"+addr+"/healthz", "--check-interval", "50ms",
						"--", binary(t), "demo-service", "--name", svc, "--listen", addr, "--work", "0s")
					p.pid(t)
					return p
				}
				addr, n := freeAddr(t), "1"
				web := app("web", addr)
				if !last {
					app("web", freeAddr(t))
					n = "2"
				}
				s.serving(t, n)
				answers := askAll(t, "http://"+s.ha.Addr("be")+"/")
				web.killed(t)
				other := app("misc", addr)
				first := s.firstBeat(t, "misc", addr)
				other.says(t, "took out another service's registration")
				s.goes(t, addr, "left")
				time.Sleep(time.Until(first.Add(3 * time.Second))) // what is tested
				var wrong, right, late int
				until, asked := -time.Hour, -time.Hour
				for _, a := range answers() {
					switch {
					case a.by == "misc":
						wrong, until = wrong+1, max(until, a.at.Sub(first))
						asked = max(asked, a.asked.Sub(first))
						if a.asked.After(first.Add(time.Second)) {
							late++
						}
					case a.by == "web" && a.asked.After(first.Add(time.Second)):
						right++
					}
				}
				if wrong > 0 {
					// HAProxy tries a connection that was refused again for up to a second.
					t.Logf("%d wrong answers: after the first heartbeat of misc the last one was asked for %v, and there %v", wrong, asked.Round(time.Millisecond), until.Round(time.Millisecond))
				} else {
					t.Log("no wrong answer")
				}
				t.Logf("from 1 s after that on: %d wrong, %d right", late, right)
				if late > 0 || (right == 0) != last {
					t.Errorf("%d wrong answers and %d right ones", late, right)
				}
				if files, err := filepath.Glob(strings.TrimPrefix(s.env[0], "RUNTIME_DIRECTORY=") + "/web_*" + strings.ReplaceAll(addr, ":", "-") + "*"); len(files) > 0 || err != nil {
					t.Errorf("the file is still there: %v, %v", files, err)
				}
				if n := strings.Count(other.out.String(), "took out"); n != 1 || strings.Contains(other.out.String(), "was killed: requests") {
					t.Errorf("said %d times, or warned", n)
				}
				if s.of(t, "misc", addr) == "" || !last && s.of(t, "web", addr) != "" {
					t.Error("the wrong one was taken out")
				}
			})
		}
	}
}

// TestPortUsedAgainWithItsRights does that with the rights of a sidecar alone, which are
// on the keys of its own service. It takes nobody out, says so once, and beats.
func TestPortUsedAgainWithItsRights(t *testing.T) {
	s := &system{redis: startRoles(t), env: []string{"RUNTIME_DIRECTORY=" + t.TempDir()}}
	s.ha = haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 4}}})
	const ttl = 3 * time.Second
	s.spawn(t, "reap", "--ttl", ttl.String(), "--heartbeat", "1s").says(t, "armed")
	s.spawn(t, "lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8")
	app := func(svc, addr string) *process {
		p := s.spawn(t, "register", "--redis", roleURL(s.redis, "sidecar-"+svc), "--service", svc, "--addr", addr, "--check", "http://"+addr+"/healthz", "--check-interval", "50ms",
			"--", binary(t), "demo-service", "--name", svc, "--listen", addr, "--work", "0s")
		p.pid(t)
		return p
	}
	addr := freeAddr(t)
	web := app("web", addr)
	s.serving(t, "1")
	token := s.of(t, "web", addr)
	answers := askAll(t, "http://"+s.ha.Addr("be")+"/")
	web.killed(t)
	began := time.Now()
	evil := app("evil", addr)
	first := s.firstBeat(t, "evil", addr)
	evil.says(t, "it cannot be taken out")
	out := evil.out.String()
	for _, want := range []string{"WRN", "NOPERM", "other=web", "addr=" + addr, "rollcall deregister --service web --addr " + addr + " --force"} {
		if !strings.Contains(out, want) {
			t.Errorf("it does not say %q", want)
		}
	}
	if got := s.of(t, "web", addr); got != token {
		t.Errorf("the register has %q, had %q", got, token)
	}
	s.goes(t, addr, "expired")
	haproxytest.Poll(t, "HAProxy has it no more", func() error {
		state, err := serverStates(s.ha.Socket, addr)
		if err == nil && state != "absent" {
			err = errors.New(state)
		}
		return err
	})
	var until time.Time
	for _, a := range answers() {
		if a.by == "evil" && a.at.After(until) {
			until = a.at
		}
	}
	t.Logf("of a TTL of %v: the last wrong answer came %v after the kill, %v after the first heartbeat there", ttl, until.Sub(began).Round(time.Millisecond), until.Sub(first).Round(time.Millisecond))
	if files := idFiles(t, strings.TrimPrefix(s.env[0], "RUNTIME_DIRECTORY=")); len(files) != 2 {
		t.Errorf("files %v", files)
	}
	if got := strings.Count(evil.out.String(), "was killed: requests"); got != 1 || s.of(t, "evil", addr) == "" {
		t.Errorf("said %d times, registered as %q", got, s.of(t, "evil", addr))
	}
	refused, err := s.redis.Client(t).ACLLog(t.Context(), 10).Result()
	if err != nil || len(refused) != 1 || refused[0].Count != 1 {
		t.Errorf("refused: %+v, %v", refused, err)
	}
}

// TestPredecessors has a sidecar start where another service's was at the same address,
// of which it is not certain that it has ended together with its app. It is left alone.
func TestPredecessors(t *testing.T) {
	t.Parallel()
	const looked, unlisted = "looked for what sidecars of other services have left", "it is not known whether its app has ended"
	edit := func(t *testing.T, dir, old, text string) {
		t.Helper()
		for _, file := range idFiles(t, dir) {
			b, err := os.ReadFile(file)
			must(t, err)
			if !strings.Contains(string(b), old) {
				t.Fatalf("%s", b)
			}
			must(t, os.WriteFile(file, []byte(strings.Replace(string(b), old, text, 1)), 0o600))
		}
	}
	for _, c := range []struct {
		name    string
		args    []string // of the first sidecar
		after   []string // instead of the app that it is around; nil: that
		between func(t *testing.T, s *system, dir string, first *process)
		more    []string // of the second one
		says    string   // of the second one
		warns   bool
		stays   bool // the first one's registration; else it is taken out
	}{
		{name: "both have ended", says: "took out another service's registration"},
		{name: "both live", between: func(*testing.T, *system, string, *process) {}, says: "another sidecar has it", stays: true},
		{name: "its app lives", between: func(t *testing.T, _ *system, _ string, first *process) {
			first.pid(t)
			send(t, first, syscall.SIGKILL)
			haproxytest.Poll(t, "it has ended", func() error {
				if err := syscall.Kill(first.cmd.Process.Pid, 0); !errors.Is(err, syscall.ESRCH) {
					return fmt.Errorf("kill: %v", err)
				}
				return nil
			})
		}, says: "still runs", warns: true, stays: true},
		{name: "it was beside its app", after: []string{}, between: func(t *testing.T, _ *system, _ string, first *process) {
			first.signal(t, syscall.SIGKILL)
		}, says: unlisted, warns: true, stays: true},
		{name: "another PID namespace's", between: func(t *testing.T, _ *system, dir string, first *process) {
			first.killed(t)
			edit(t, dir, "pid:[", "pid:[9")
		}, says: unlisted, warns: true, stays: true},
		{name: "another machine's", between: func(t *testing.T, _ *system, dir string, first *process) {
			first.killed(t)
			edit(t, dir, `"app_space":"`, `"app_space":"0`)
		}, says: unlisted, warns: true, stays: true},
		{name: "damaged", between: func(t *testing.T, _ *system, dir string, first *process) {
			first.killed(t)
			edit(t, dir, `"id":`, `"id`)
		}, says: looked, stays: true},
		{name: "another address's", args: []string{"--addr", "10.0.0.7:81"}, says: looked, stays: true},
		{name: "another namespace's", more: []string{"--namespace", "test"}, says: looked, stays: true},
		{name: "no file of the first", args: []string{"--id-file", ""}, says: looked, stays: true},
		{name: "no file of the second", more: []string{"--id-file", ""}, says: "INF registered", stays: true},
		{name: "no directory", between: func(t *testing.T, s *system, dir string, first *process) {
			first.killed(t)
			must(t, os.RemoveAll(dir))
		}, says: looked, stays: true},
		{name: "it has gone", between: func(t *testing.T, s *system, _ string, first *process) {
			first.killed(t)
			if _, stderr, code := s.rollcall(t, "deregister", "--service", "web", "--addr", "10.0.0.7:80", "--force"); code != 0 {
				t.Error(stderr)
			}
		}, says: looked},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "d")
			must(t, os.Mkdir(dir, 0o700))
			s := &system{redis: redistest.Start(t), env: []string{"RUNTIME_DIRECTORY=" + dir}}
			const addr = "10.0.0.7:80"
			args := append([]string{"register", "--service", "web", "--addr", addr}, c.args...)
			if c.after == nil {
				args = append(args, rest...)
			}
			at := addr
			if len(c.args) > 0 && c.args[0] == "--addr" {
				at = c.args[1]
			}
			first := s.spawn(t, args...)
			if c.after == nil {
				first.pid(t)
			}
			s.firstBeat(t, "web", at)
			first.says(t, "INF registered")
			token := s.of(t, "web", at)
			if c.between == nil {
				first.killed(t)
			} else {
				c.between(t, s, dir, first)
			}
			second := s.spawn(t, append([]string{"register", "--service", "misc", "--addr", addr, "--log-level", "debug"}, c.more...)...)
			second.says(t, "INF registered")
			second.says(t, c.says)
			if want := map[bool]string{true: token}[c.stays]; s.of(t, "web", at) != want {
				t.Errorf("the register has %q, want %q", s.of(t, "web", at), want)
			}
			if code := second.signal(t, syscall.SIGTERM); code != 0 {
				t.Errorf("exit %d", code)
			}
			out := second.out.String()
			if n := strings.Count(out, "the sidecar of another service at this address was killed"); n > 1 || (n == 1) != c.warns || strings.Count(out, "took out") > 1 {
				t.Errorf("warns %d times", n)
			}
			if c.warns && !strings.Contains(out, "rollcall deregister --service web --addr "+addr+" --force") {
				t.Error("it does not say what to do")
			}
			if c.stays && c.name != "no directory" && c.name != "no file of the first" && len(idFiles(t, dir)) != 1 {
				t.Errorf("files %v", idFiles(t, dir))
			}
		})
	}
}

// TestAppOutlivesItsSidecar has the first app live on when its sidecar is killed and the
// second one starts. It is taken out when it has ended too.
func TestAppOutlivesItsSidecar(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t), env: []string{"RUNTIME_DIRECTORY=" + t.TempDir()}}
	const addr = "10.0.0.7:80"
	first := s.spawn(t, append([]string{"register", "--service", "web", "--addr", addr}, rest...)...)
	token := s.comes(t, addr)
	app := first.pid(t)
	send(t, first, syscall.SIGKILL)
	second := s.spawn(t, "register", "--service", "misc", "--addr", addr)
	second.says(t, "still runs")
	if now := s.token(t, addr); now != token {
		t.Errorf("it is %q, was %q", now, token)
	}
	must(t, syscall.Kill(-app, syscall.SIGKILL))
	second.says(t, "took out another service's registration")
	s.goes(t, addr, "left")
}

// TestPredecessorsAfterAnOutage has Redis be away when the second sidecar starts.
func TestPredecessorsAfterAnOutage(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t, "--appendonly", "yes", "--appendfsync", "always"), env: []string{"RUNTIME_DIRECTORY=" + t.TempDir()}}
	const addr = "10.0.0.7:80"
	first := s.spawn(t, append([]string{"register", "--service", "web", "--addr", addr}, rest...)...)
	s.comes(t, addr)
	first.killed(t)
	s.redis.Kill(t)
	second := s.spawn(t, "register", "--service", "misc", "--addr", addr)
	second.says(t, "beat failed")
	s.redis.Launch(t)
	second.says(t, "INF registered")
	second.says(t, "took out another service's registration")
	s.goes(t, addr, "left")
}

// TestPredecessorsOfCluster: the other service is in another slot, of another node.
func TestPredecessorsOfCluster(t *testing.T) {
	t.Parallel()
	c := redistest.StartCluster(t, 3)
	s := &system{redis: c[0], env: []string{"RUNTIME_DIRECTORY=" + t.TempDir(), "ROLLCALL_REDIS=" + c.URL()}}
	const addr = "10.0.0.7:80"
	first := s.spawn(t, append([]string{"register", "--service", "web", "--addr", addr}, rest...)...)
	first.pid(t)
	first.says(t, "INF registered")
	first.killed(t)
	second := s.spawn(t, "register", "--service", "misc", "--addr", addr)
	second.says(t, "took out another service's registration")
	for svc, there := range map[string]bool{"web": false, "misc": true} {
		if out, stderr, _ := s.rollcall(t, "instances", svc); strings.Contains(out, addr) != there {
			t.Errorf("%s: %s%s", svc, out, stderr)
		}
	}
}

// TestStartedAgainMeanwhile starts the sidecar of a service again, with its app, in the
// moment in which another service's comes to its address. Whoever of the two has the
// file first, both are registered in the end, and stay so.
func TestStartedAgainMeanwhile(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t), env: []string{"RUNTIME_DIRECTORY=" + t.TempDir()}}
	must(t, s.redis.Client(t).HSet(t.Context(), "rollcall:config", "ttl_ms", 3000, "interval_ms", 1000).Err())
	var tookOut, anew int
	type pair struct {
		addr, token string
		again       *process
	}
	var all []pair
	for n := range 12 {
		addr := fmt.Sprintf("10.0.0.%d:80", n+1)
		args := append([]string{"register", "--service", "web", "--addr", addr}, rest...)
		first := s.spawn(t, args...)
		token := s.comes(t, addr)
		first.killed(t)
		var again, other *process
		start := []func(){
			func() { again = s.spawn(t, args...) },
			func() { other = s.spawn(t, "register", "--service", "misc", "--addr", addr) },
		}
		start[n%2]()
		start[1-n%2]()
		again.pid(t)
		other.says(t, "INF registered")
		again.says(t, "INF registered")
		now := s.token(t, addr)
		if now == "" {
			t.Errorf("%s is not registered:\n%s", addr, again.out)
		}
		if now != token {
			anew++
		}
		if strings.Contains(other.out.String(), "took out") {
			tookOut++
		}
		all = append(all, pair{addr, now, again})
	}
	t.Logf("of %d: %d were taken out, %d came back as new ones", len(all), tookOut, anew)
	time.Sleep(2 * time.Second) // nothing happens any more
	for _, p := range all {
		if now := s.token(t, p.addr); now != p.token || strings.Contains(p.again.out.String(), "had left") {
			t.Errorf("%s is %q, was %q", p.addr, now, p.token)
		}
	}
}

// TestLostLeave has Redis answer too late when a registration is taken out. A sidecar
// that is started for it then is another registration, so that the late leave takes out
// nobody who lives.
func TestLostLeave(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t)
	must(t, srv.Client(t).HSet(t.Context(), "rollcall:config", "ttl_ms", 6000, "interval_ms", 2000).Err())
	s := &system{redis: srv, env: []string{"RUNTIME_DIRECTORY=" + t.TempDir()}}
	dir := strings.TrimPrefix(s.env[0], "RUNTIME_DIRECTORY=")
	const addr = "10.0.0.7:80"
	first := s.spawn(t, append([]string{"register", "--service", "web", "--addr", addr}, rest...)...)
	token := s.comes(t, addr)
	first.killed(t)
	conn, err := registrar.Access{}.Open(srv.URL(), 1) // with a sidecar's deadlines
	must(t, err)
	defer conn.Close()
	store, err := registrar.NewStore(conn, registrar.DefaultNamespace)
	must(t, err)
	at := netip.MustParseAddrPort(addr)
	of := idfile.Registration{Registry: idfile.Registry(srv.URL(), registrar.DefaultNamespace), Service: "misc", Addr: at}
	p := newPredecessors(of, idfile.Place{Path: filepath.Join(dir, of.Name())}, store, zerolog.Nop())
	rdb := srv.Client(t)
	must(t, rdb.Do(t.Context(), "client", "pause", 60_000, "write").Err())
	if again := p.look(t.Context(), at, 0); !again {
		t.Error("it is not to be tried again")
	}
	if files := idFiles(t, dir); len(files) > 0 {
		t.Fatalf("somebody may become it: %v", files)
	}
	must(t, rdb.Do(t.Context(), "client", "unpause").Err())
	if now := s.token(t, addr); now != token {
		t.Fatalf("it is %q: this shows nothing", now)
	}
	again := s.spawn(t, append([]string{"register", "--service", "web", "--addr", addr}, rest...)...)
	again.pid(t)
	again.says(t, "another registration holds this address")
	p.look(t.Context(), at, 0)
	if len(p.lost) > 0 {
		t.Errorf("it was not tried again: %v", p.lost)
	}
	again.says(t, "INF registered")
	if again := p.look(t.Context(), at, 0); !again {
		t.Error("the new one is not seen to live")
	}
	if now := s.token(t, addr); now == token || now == "" {
		t.Errorf("it is %q", now)
	}
}

// TestDoctorPredecessors: doctor names the killed sidecar whose address another service
// has.
func TestDoctorPredecessors(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := &system{redis: redistest.Start(t), env: []string{"RUNTIME_DIRECTORY=" + dir}}
	const addr = "10.0.0.7:80"
	row := func(want state, words ...string) {
		t.Helper()
		findings, _ := s.doctor(t)
		for _, f := range findings {
			if f.Check != "host id files" {
				continue
			}
			for _, w := range words {
				if !strings.Contains(f.Seen+f.Fix, w) {
					t.Errorf("%+v does not say %q", f, w)
				}
			}
			if f.State != want {
				t.Errorf("%+v, want %s", f, want)
			}
			return
		}
		t.Errorf("no row: %+v", findings)
	}
	row(stateOK, "0 in "+dir)
	first := s.spawn(t, "register", "--service", "web", "--addr", addr)
	s.comes(t, addr)
	second := s.spawn(t, "register", "--service", "misc", "--addr", addr)
	second.says(t, "INF registered")
	row(stateOK, "2 in "+dir)
	first.signal(t, syscall.SIGKILL)
	row(stateWarn, "web "+addr+": its sidecar was killed, it is not known whether its app lives", "rollcall deregister --service web --addr "+addr+" --force")
	second.signal(t, syscall.SIGKILL) // then nobody has the address
	row(stateOK)
	third := s.spawn(t, "register", "--service", "misc", "--addr", addr)
	third.says(t, "INF registered")
	row(stateWarn)
	if _, stderr, code := s.rollcall(t, "deregister", "--service", "web", "--addr", addr, "--force"); code != 0 {
		t.Error(stderr)
	}
	row(stateOK)
}
