package main

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// spawnAs is spawn as another user, if uid is not 0 and this one may do that, and
// with a word before the command, such as prlimit's.
func (s *system) spawnAs(t *testing.T, uid int, before []string, args ...string) *process {
	t.Helper()
	binary := s.binary(t)
	if err := os.Chmod(filepath.Dir(binary), 0o711); err != nil {
		t.Fatal(err)
	}
	line := append(append(before[:len(before):len(before)], binary), args...)
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Dir, cmd.SysProcAttr = "/", &syscall.SysProcAttr{Credential: credential(uid)}
	return s.start(t, cmd)
}

// credential is of a user with no other process; nil where this one cannot become it.
func credential(uid int) *syscall.Credential {
	if uid == 0 || os.Geteuid() != 0 {
		return nil
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}
}

// nobody is a user whom no other test has.
func nobody() int { return 100000 + os.Getpid() }

// limit sets a soft limit of p, such as nofile=3.
func (p *process) limit(t *testing.T, uid int, limit string) {
	t.Helper()
	cmd := exec.Command("prlimit", "--pid", strconv.Itoa(p.cmd.Process.Pid), "--"+limit+":")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: credential(uid)}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("prlimit %s: %v: %s", limit, err, out)
	}
}

// beaten waits for so many further heartbeats of addr, which beats every 100 ms.
func (s *system) beaten(t *testing.T, addr string, beats int) {
	t.Helper()
	rdb := s.redis.Client(t)
	score := func() float64 { return rdb.ZScore(t.Context(), "rollcall:{web}:instances", addr).Val() }
	first := score()
	haproxytest.Poll(t, fmt.Sprintf("%s beats %d times", addr, beats), func() error {
		if now := score(); now < first+float64(beats)*100 {
			return fmt.Errorf("from %.0f to %.0f", first, now)
		}
		return nil
	})
}

// TestSidecarAtItsLimits: a sidecar that gets no descriptor and no process goes on
// beating for a healthy app, over a lost connection to Redis too, and is as before when
// it gets some again.
func TestSidecarAtItsLimits(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, check, none, some string
	}{
		{"no descriptors, http", "http", "nofile=3", "nofile=1000"},
		{"no descriptors, exec", "exec", "nofile=3", "nofile=1000"},
		{"no processes, exec", "exec", "nproc=1", "nproc=1000"},
		{"no processes, http", "http", "nproc=1", "nproc=1000"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := &system{redis: redistest.Start(t)}
			rdb := s.redis.Client(t)
			i := haproxytest.NewInstance(t)
			addr, dir := i.Addr().String(), t.TempDir()
			for _, d := range []string{dir, filepath.Dir(dir)} { // the other user's too
				if err := os.Chmod(d, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			file := filepath.Join(dir, "file")
			healthy := func(yes bool) {
				t.Helper()
				i.SetHealthy(yes)
				err := os.WriteFile(file, nil, 0o644)
				if !yes {
					err = os.Remove(file)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			healthy(true)
			check := "http://" + addr + "/healthz"
			if c.check == "exec" {
				check = "exec:test -e " + file
			}
			uid := nobody()
			p := s.spawnAs(t, uid, nil, "register", "--service", "web", "--addr", addr, "--interval", "100ms",
				"--http", "127.0.0.1:0", "--check", check, "--check-interval", "50ms", "--check-timeout", "10s")
			token := s.comes(t, addr)
			p.says(t, "serving metrics and health")
			m := &monitored{process: p, url: "http://" + served.FindStringSubmatch(p.out.String())[1]}
			threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", p.cmd.Process.Pid))
			if t.Logf("%d threads", len(threads)); err != nil || len(threads) <= spareThreads {
				t.Errorf("none is spare: %v", err)
			}
			version := rdb.Get(t.Context(), "rollcall:{web}:version").Val()
			stays := func(when string) {
				t.Helper()
				if now, v := s.token(t, addr), rdb.Get(t.Context(), "rollcall:{web}:version").Val(); now != token || v != version {
					t.Fatalf("%s: token %q became %q, version %s became %s, note %q", when, token, now, version, v, s.gone(t, addr))
				}
			}

			p.limit(t, uid, c.none)
			unknown := c.check == "exec" || strings.HasPrefix(c.none, "nofile")
			if unknown {
				p.says(t, "the app's health is unknown; the instance stays as it is")
			}
			scraping := make(chan struct{})
			go func() { // who asks now is answered later
				defer close(scraping)
				_, _, _ = m.get("/metrics") // it may be too late for this client
			}()
			s.beaten(t, addr, 15) // three misses are 150 ms
			stays("at the limit")
			if err := rdb.Do(t.Context(), "client", "kill", "type", "normal", "skipme", "yes").Err(); err != nil {
				t.Fatal(err)
			}
			if strings.HasPrefix(c.none, "nofile") {
				p.says(t, "beat failed; retrying for ever")
			} else {
				s.beaten(t, addr, 15)
			}
			stays("without Redis")

			p.limit(t, uid, c.some)
			s.beaten(t, addr, 5)
			if unknown {
				p.says(t, "the app's health can be seen again")
				m.shows(t, "rollcall_check_unknown_total", 3, many)
			}
			<-scraping
			m.ready(t, "ok")
			stays("afterwards")
			healthy(false)
			s.goes(t, addr, "unhealthy")
			healthy(true)
			s.comes(t, addr)
			if code := p.signal(t, syscall.SIGTERM); code != 0 {
				t.Errorf("exit %d", code)
			}
			if out := p.out.String(); strings.Count(out, "\n") > 30 || strings.Contains(out, "Accept error") {
				t.Errorf("it says too much:\n%s", out)
			}
		})
	}
}

// hanging are clients that hang: they say nothing, half of a request, or ask and do
// not read. At most so many are there, and 50 more come each second.
type hanging struct {
	opened int
	stop   func()
}

func hang(t *testing.T, addr, path string, most int) *hanging {
	t.Helper()
	h := &hanging{}
	end, full := make(chan struct{}), make(chan struct{})
	var working sync.WaitGroup
	working.Go(func() {
		var open []net.Conn
		defer func() {
			for _, c := range open {
				c.Close()
			}
		}()
		pace := time.NewTicker(time.Millisecond)
		defer pace.Stop()
		for {
			select {
			case <-end:
				return
			case <-pace.C:
			}
			c, err := net.DialTimeout("tcp", addr, time.Second)
			if err != nil {
				continue
			}
			switch h.opened++; h.opened % 3 {
			case 1:
				_, _ = c.Write([]byte("GET " + path + " HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")) // it may be cut off
			case 2:
				_, _ = c.Write([]byte("GET " + path + " HTTP/1.1\r\nHost: localhost\r\n\r\n"))
			}
			if open = append(open, c); len(open) > most {
				open[0].Close()
				open = open[1:]
			}
			if h.opened == most {
				close(full)
				pace.Reset(20 * time.Millisecond)
			}
		}
	})
	h.stop = sync.OnceFunc(func() { close(end); working.Wait() })
	t.Cleanup(h.stop)
	select {
	case <-full:
	case <-time.After(2 * time.Minute):
		t.Fatal("the clients do not get in")
	}
	return h
}

// scrapes gets a path n times, as a scraper with a new connection each time would, and
// every second time with a kept one. A try that fails, because its request came too late
// on a machine that is busy, is tried again, as scrapers do. It returns the longest time
// of one answer and how many tries failed.
func scrapes(t *testing.T, url string, n int) (longest time.Duration, failed int) {
	t.Helper()
	kept := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{}}
	defer kept.CloseIdleConnections()
	for i := range n {
		c := kept
		if i%2 == 0 {
			c = &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
		}
		haproxytest.Poll(t, "an answer of "+url, func() error {
			begun := time.Now()
			r, err := c.Get(url)
			if err == nil {
				_ = r.Body.Close()
				if longest = max(longest, time.Since(begun)); r.StatusCode == http.StatusOK {
					return nil
				}
				err = errors.New(r.Status)
			}
			failed++
			return fmt.Errorf("scrape %d: %w", i, err)
		})
	}
	return longest, failed
}

// TestHangingClients: a thousand clients that hang on --http or on serve's own
// address, of a process with few descriptors, keep nobody from an answer and the
// daemon from nothing.
func TestHangingClients(t *testing.T) {
	t.Parallel()
	few := []string{"prlimit", "--nofile=32:32"}
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 5, Balance: "roundrobin"}}})}
	start := func(args ...string) (*process, string) {
		t.Helper()
		p := s.spawnAs(t, 0, few, append(args[:1:1], append([]string{"--http", "127.0.0.1:0"}, args[1:]...)...)...)
		p.says(t, "serving metrics and health")
		return p, served.FindStringSubmatch(p.out.String())[1]
	}
	addr := haproxytest.NewInstance(t)
	sidecar, sideHTTP := start("register", "--service", "web", "--addr", addr.Addr().String(), "--interval", "100ms", "--check", "http://"+addr.Addr().String()+"/healthz", "--check-interval", "50ms")
	_, reapHTTP := start("reap", "--ttl", "2s", "--heartbeat", "500ms")
	_, lbHTTP := start("lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8")
	pageAddr := "127.0.0.1:" + strconv.Itoa(freePort(t))
	_, pageHTTP := start("serve", "--listen", pageAddr)
	url := "http://" + s.ha.Addr("be") + "/"
	answered(t, url, addr)
	token := s.token(t, addr.Addr().String())

	var all []*hanging
	for at, most := range map[string]int{sideHTTP: 1000, reapHTTP: 200, lbHTTP: 200, pageHTTP: 200, pageAddr: 1000} {
		path := "/metrics"
		if at == pageAddr {
			path = "/v1/services/web"
		}
		all = append(all, hang(t, at, path, most))
	}
	for _, at := range []string{sideHTTP, reapHTTP, lbHTTP, pageHTTP} {
		longest, failed := scrapes(t, "http://"+at+"/metrics", 20)
		t.Logf("%s: the longest of 20 scrapes took %v, %d tries failed", at, longest, failed)
	}
	longest, failed := scrapes(t, "http://"+pageAddr+"/v1/services/web", 20)
	t.Logf("the page: the longest of 20 answers took %v, %d tries failed", longest, failed)

	// All of them work: who comes is served, who dies is taken out, who beats stays.
	s.beaten(t, addr.Addr().String(), 10)
	second := haproxytest.NewInstance(t)
	other := s.spawn(t, "register", "--service", "web", "--addr", second.Addr().String(), "--interval", "100ms")
	answered(t, url, addr, second)
	haproxytest.Poll(t, "the reaper is armed", func() error {
		if out, _, code := s.rollcall(t, "status"); code != 0 {
			return errors.New(out)
		}
		return nil
	})
	other.signal(t, syscall.SIGKILL)
	s.goes(t, second.Addr().String(), "expired")
	if now := s.token(t, addr.Addr().String()); now != token {
		t.Errorf("token %s became %s", token, now)
	}
	for _, h := range all {
		h.stop()
	}
	if code := sidecar.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
	if n := strings.Count(sidecar.out.String(), "too many connections"); n != 1 {
		t.Errorf("said %d times that there are too many connections", n)
	}
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}
