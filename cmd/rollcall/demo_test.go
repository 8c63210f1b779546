package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"rollcall/lbsync"
	"rollcall/registrar"
)

var demoStory = []string{"start", "join", "leave", "kill", "reload", "restart"}

// demoRun is a running `rollcall demo` with a temporary directory of its own.
type demoRun struct {
	cmd   *exec.Cmd
	dir   string
	out   io.Closer   // the story is read from it
	lines chan string // of the story; closed at its end
	story []string    // the lines read so far
	data  bytes.Buffer
}

// startDemo runs the demo. The story is read from standard error if data is
// set, else from standard output.
func startDemo(t *testing.T, data bool, args ...string) *demoRun {
	t.Helper()
	for _, name := range []string{"redis-server", "haproxy"} {
		if _, err := findBinary(name); err != nil {
			if os.Getenv("CI") != "" || os.Getenv("ROLLCALL_REQUIRE_SERVERS") != "" {
				t.Fatal(err)
			}
			t.Skip(err)
		}
	}
	dir, err := os.MkdirTemp("", "rc") // short: a socket's path has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	d := &demoRun{cmd: exec.Command(binary(t), append([]string{"demo"}, args...)...), dir: dir, lines: make(chan string, 1000)}
	// A variable for the roles must not reach them.
	d.cmd.Env = append(d.cmd.Environ(), "TMPDIR="+dir, "ROLLCALL_NAMESPACE=other")
	d.cmd.SysProcAttr = demoProcess()
	var story io.ReadCloser
	if data {
		d.cmd.Stdout = &d.data
		story, err = d.cmd.StderrPipe()
	} else {
		d.cmd.Stderr = &d.data
		story, err = d.cmd.StdoutPipe()
	}
	if err != nil {
		t.Fatal(err)
	}
	d.out = story
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(d.lines)
		for s := bufio.NewScanner(story); s.Scan(); {
			d.lines <- s.Text()
		}
	}()
	t.Cleanup(func() {
		_ = d.cmd.Process.Kill() // or it has ended
		for range d.lines {
		}
		_ = d.cmd.Wait() // or it has been waited for
		if t.Failed() {
			t.Logf("the demo's output:\n%s\n%s", strings.Join(d.story, "\n"), &d.data)
		}
	})
	return d
}

// read reads the story up to a line that contains text, or to its end.
func (d *demoRun) read(t *testing.T, text string) {
	t.Helper()
	timeout := time.After(50 * time.Second)
	for {
		select {
		case line, ok := <-d.lines:
			if !ok {
				if text != "" {
					t.Fatalf("ended before %q", text)
				}
				return
			}
			d.story = append(d.story, line)
			if text != "" && strings.Contains(line, text) {
				return
			}
		case <-timeout:
			t.Fatalf("%q does not come", text)
		}
	}
}

// wait reads the story to its end and returns the exit code.
func (d *demoRun) wait(t *testing.T) int {
	t.Helper()
	d.read(t, "")
	var exit *exec.ExitError
	if err := d.cmd.Wait(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return d.cmd.ProcessState.ExitCode()
}

// processes returns the demo's processes: they work in its directory.
func (d *demoRun) processes(t *testing.T) []string {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*/cwd")
	if err != nil || len(dirs) == 0 {
		t.Skip("no /proc here")
	}
	var found []string
	for _, dir := range dirs {
		if target, err := os.Readlink(dir); err == nil && strings.HasPrefix(target, d.dir) {
			found = append(found, filepath.Dir(dir))
		}
	}
	return found
}

// nothingLeft fails the test if a process or a file of the demo is left.
func (d *demoRun) nothingLeft(t *testing.T) {
	t.Helper()
	if left := d.processes(t); len(left) > 0 {
		t.Errorf("processes left: %v", left)
	}
	entries, err := os.ReadDir(d.dir)
	if err != nil || len(entries) > 0 {
		t.Errorf("files left: %v, %v", entries, err)
	}
}

func TestDemo(t *testing.T) {
	t.Parallel()
	d := startDemo(t, false)
	d.read(t, "2/6")
	// As the kernel does when the demo writes to the HAProxy that it has killed.
	if err := d.cmd.Process.Signal(syscall.SIGPIPE); err != nil {
		t.Fatal(err)
	}
	if code := d.wait(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
	story := strings.Join(d.story, "\n")
	wants := []string{
		`HAProxy reloads by rollcall: 0`,
		`haproxy\.cfg: unchanged, sha256 [0-9a-f]{64}\n`,
		`\n\d+ requests, 0 failed, .*in HAProxy's gap`,
		`\nok: every step happened`,
		`the defaults are 15s and 5s`,
	}
	for n, name := range demoStory {
		wants = append(wants, fmt.Sprintf(`\n%d/6 %s: .+\n`, n+1, name), fmt.Sprintf(`\n%s +ok +\S+ +[1-9]\d* +0 +\d+ +\d+\n`, name))
	}
	for _, want := range wants {
		if !regexp.MustCompile(want).MatchString(story) {
			t.Errorf("nothing in the story matches %s", want)
		}
	}
	if strings.Contains(story, "\x1b") {
		t.Error("terminal controls in plain lines")
	}
	d.nothingLeft(t)
}

func TestDemoHold(t *testing.T) {
	t.Parallel()
	d := startDemo(t, true, "--hold", "-o", "json")
	d.read(t, "Everything keeps running")
	d.read(t, "redis-cli")
	// The commands that it names work.
	url := regexp.MustCompile(`redis://\S+`).FindString(strings.Join(d.story, "\n"))
	out, err := exec.Command(binary(t), "instances", "web", "--redis", url, "-o", "json").Output()
	var rows []instanceRow
	if err := errors.Join(err, json.Unmarshal(out, &rows)); err != nil || len(rows) != 2 {
		t.Errorf("instances: %s, %v, want 2", out, err)
	}
	if len(d.processes(t)) == 0 {
		t.Error("no process found that nothingLeft could find")
	}
	if err := d.cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if code := d.wait(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
	var s demoSummary
	if err := json.Unmarshal(d.data.Bytes(), &s); err != nil {
		t.Fatalf("%q: %v", &d.data, err)
	}
	var names []string
	for _, step := range s.Steps {
		names = append(names, step.Name)
		if !step.OK || step.Requests == 0 || step.Failed > 0 || step.Note == "" || step.Gap > 0 && step.Name != "restart" {
			t.Errorf("step %+v", step)
		}
	}
	if !slices.Equal(names, demoStory) {
		t.Errorf("steps %v", names)
	}
	if !s.OK || !s.Unchanged || s.Reloads != 0 || s.Total.Failed != 0 || s.Total.Gap == 0 || s.GapMS < restartAfter.Milliseconds() || s.TTLMS != 3000 {
		t.Errorf("summary %+v", s)
	}
	d.nothingLeft(t)
}

func TestDemoInterrupted(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		at      string      // the line after which
		signals []os.Signal // none: nobody reads any more
	}{
		{"rollcall demo:", []os.Signal{syscall.SIGINT}},
		{"1/6", []os.Signal{syscall.SIGTERM}},
		{"2/6", []os.Signal{syscall.SIGINT, syscall.SIGINT, syscall.SIGTERM}},
		{"4/6", []os.Signal{syscall.SIGHUP}},
		{"5/6", nil},
		{"6/6", []os.Signal{syscall.SIGINT}},
	} {
		t.Run(tt.at, func(t *testing.T) {
			t.Parallel()
			d := startDemo(t, false)
			d.read(t, tt.at)
			if len(tt.signals) == 0 {
				if err := d.out.Close(); err != nil {
					t.Fatal(err)
				}
			}
			for _, s := range tt.signals {
				if err := d.cmd.Process.Signal(s); err != nil {
					t.Fatal(err)
				}
			}
			if code := d.wait(t); code != exitFailed || !strings.Contains(d.data.String(), errInterrupted.Error()) {
				t.Errorf("exit code %d, %s", code, &d.data)
			}
			d.nothingLeft(t)
		})
	}
}

// TestDemoFails takes lbsync away, so that nothing can happen any more.
func TestDemoFails(t *testing.T) {
	t.Parallel()
	d := startDemo(t, false)
	d.read(t, "2/6")
	for _, dir := range d.processes(t) {
		line, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil || !bytes.Contains(line, []byte("\x00lbsync\x00")) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	if code := d.wait(t); code != exitFailed {
		t.Errorf("exit code %d", code)
	}
	story := strings.Join(d.story, "\n")
	for _, want := range []string{`FAILED: .*lbsync has ended: signal: killed`, `\nleave +FAILED`, `\nFAILED: see above`} {
		if !regexp.MustCompile(want).MatchString(story) {
			t.Errorf("nothing in the story matches %s", want)
		}
	}
	if kept, err := filepath.Glob(filepath.Join(d.dir, "rollcall-demo*", "lbsync.log")); err != nil || len(kept) != 1 || !strings.Contains(story, filepath.Dir(kept[0])) {
		t.Errorf("the logs are not kept and named: %v, %v", kept, err)
	}
	if left := d.processes(t); len(left) > 0 {
		t.Errorf("processes left: %v", left)
	}
}

// TestDemoKilled is about the kernel's part: the demo itself can do nothing.
func TestDemoKilled(t *testing.T) {
	t.Parallel()
	d := startDemo(t, false)
	d.read(t, "2/6")
	if len(d.processes(t)) < 8 { // Redis, reaper, HAProxy, lbsync, two sidecars and more
		t.Errorf("processes: %v", d.processes(t))
	}
	if err := d.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	d.wait(t)
	deadline := time.Now().Add(5 * time.Second)
	for left := d.processes(t); len(left) > 0; left = d.processes(t) {
		if time.Now().After(deadline) {
			t.Fatalf("processes left: %v", left)
		}
	}
}

// TestDemoStuck has a process that ends and that the kernel does not say so of.
func TestDemoStuck(t *testing.T) {
	t.Parallel()
	c := &demoChild{name: "web-1", cmd: exec.Command("sleep", "300"), done: make(chan struct{})}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.cmd.Wait(); err == nil || err.Error() != "signal: killed" && err.Error() != "signal: terminated" {
			t.Errorf("it ended with %v", err)
		}
	}()
	s := &demoStage{dir: t.TempDir(), children: []*demoChild{c}}
	ended, err := s.close(t.Context(), true)
	if want := fmt.Sprintf("web-1, process %d, was killed and has not ended", c.pid()); ended != 0 || err == nil || err.Error() != want {
		t.Errorf("%d ended, %v, want %s", ended, err, want)
	}
}

// TestDemoConfig has no name given to two proxies: HAProxy 3.3 and later refuse that.
func TestDemoConfig(t *testing.T) {
	s := &demoStage{dir: t.TempDir(), network: netip.MustParsePrefix("127.219.1.0/24")}
	if err := s.writeConfig(); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(s.path("haproxy.cfg"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 1 && slices.Contains([]string{"frontend", "backend", "listen"}, f[0]) {
			names = append(names, f[1])
		}
	}
	slices.Sort(names)
	if len(names) < 2 || len(slices.Compact(slices.Clone(names))) != len(names) {
		t.Errorf("the proxies are %q", names)
	}
	binary, err := findBinary("haproxy")
	if err != nil {
		if os.Getenv("CI") != "" || os.Getenv("ROLLCALL_REQUIRE_SERVERS") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	if out, err := exec.Command(binary, "-c", "-f", s.path("haproxy.cfg")).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

func TestDemoWithoutServers(t *testing.T) {
	cmd := exec.Command(binary(t), "demo")
	cmd.Env = []string{"PATH=/nonexistent"}
	if _, err := os.Stat("/usr/sbin/redis-server"); err == nil {
		t.Skip("redis-server is where it is looked for without PATH")
	}
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "redis-server is not installed") || !strings.Contains(string(out), "apt-get install") {
		t.Errorf("%s, %v", out, err)
	}
}

func TestDemoCounts(t *testing.T) {
	at := func(ms int) time.Time { return time.Unix(1000, 0).Add(time.Duration(ms) * time.Millisecond) }
	who := demoAnswer{"web-1", netip.MustParseAddrPort("127.0.0.1:1")}
	bad := errors.New("status 503")
	for _, tt := range []struct {
		name         string
		times        demoTimes
		method       string
		err          error
		began, ended time.Time
		want         demoCounts
		gapTo        time.Time
	}{
		{"good", demoTimes{}, "GET", nil, at(0), at(1), demoCounts{Requests: 1}, time.Time{}},
		{"bad", demoTimes{}, "GET", bad, at(0), at(1), demoCounts{Requests: 1, Failed: 1}, time.Time{}},
		{"POST under way at a kill", demoTimes{cutFrom: at(5)}, "POST", bad, at(0), at(6), demoCounts{Requests: 1, Cut: 1}, time.Time{}},
		{"GET under way at a kill", demoTimes{cutFrom: at(5)}, "GET", bad, at(0), at(6), demoCounts{Requests: 1, Failed: 1}, time.Time{}},
		{"POST over before a kill", demoTimes{cutFrom: at(5)}, "POST", bad, at(0), at(5), demoCounts{Requests: 1, Failed: 1}, time.Time{}},
		{"POST begun at the kill's end", demoTimes{cutFrom: at(5), cutTo: at(7)}, "POST", bad, at(7), at(8), demoCounts{Requests: 1, Failed: 1}, time.Time{}},
		{"POST begun before the kill's end", demoTimes{cutFrom: at(5), cutTo: at(7)}, "POST", bad, at(6), at(8), demoCounts{Requests: 1, Cut: 1}, time.Time{}},
		{"in the gap", demoTimes{gapFrom: at(5), gapDead: at(6)}, "GET", bad, at(6), at(7), demoCounts{Requests: 1, Gap: 1}, time.Time{}},
		{"before the gap", demoTimes{gapFrom: at(5), gapDead: at(6)}, "GET", bad, at(1), at(5), demoCounts{Requests: 1, Failed: 1}, time.Time{}},
		{"after the gap", demoTimes{gapFrom: at(5), gapDead: at(6), gapTo: at(9)}, "GET", bad, at(9), at(10), demoCounts{Requests: 1, Failed: 1}, at(9)},
		{"the gap's end", demoTimes{gapFrom: at(5), gapDead: at(6)}, "GET", nil, at(7), at(9), demoCounts{Requests: 1}, at(9)},
		{"a last answer before HAProxy died", demoTimes{gapFrom: at(5), gapDead: at(6)}, "GET", nil, at(6), at(9), demoCounts{Requests: 1}, time.Time{}},
		{"a later answer", demoTimes{gapFrom: at(5), gapDead: at(6), gapTo: at(9)}, "GET", nil, at(9), at(12), demoCounts{Requests: 1}, at(9)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newDemoStream("")
			s.demoTimes = tt.times
			s.count(tt.method, who, tt.err, tt.began, tt.ended)
			step, total, first := s.counts()
			if step != tt.want || total != tt.want || s.gapTo != tt.gapTo || (first != nil) != (tt.want.Failed > 0) {
				t.Errorf("step %+v, total %+v, gap until %v, first %v; want %+v, %v", step, total, s.gapTo, first, tt.want, tt.gapTo)
			}
			if s.answers()[who.addr] != 0 != (tt.err == nil) {
				t.Errorf("answers %v", s.answers())
			}
		})
	}
}

// TestDemoWire makes sure that a failure is seen, and that no request is sent
// twice.
func TestDemoWire(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	h := demoHandler("web-7", l.Addr(), 0)
	var requests atomic.Int32
	const lost, refused = 3, 5
	served := make(chan error, 1)
	go func() {
		served <- serveDemo(ctx, l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch requests.Add(1) {
			case lost:
				panic(http.ErrAbortHandler) // closes the connection
			case refused:
				w.WriteHeader(http.StatusServiceUnavailable)
			}
			h.ServeHTTP(w, r)
		}))
	}()
	w := &demoWire{addr: l.Addr().String()}
	defer w.close()
	for n, method := range []string{"GET", "POST", "GET", "GET", "GET", "POST"} {
		who, err := w.ask(t.Context(), method)
		if bad := n+1 == lost || n+1 == refused; (err != nil) != bad {
			t.Errorf("request %d: %+v, %v", n+1, who, err)
		} else if !bad && (who.name != "web-7" || who.addr.String() != w.addr) {
			t.Errorf("request %d: %+v", n+1, who)
		}
		if got := int(requests.Load()); got != n+1 {
			t.Errorf("%d requests came, not %d", got, n+1)
		}
	}
	stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if _, err := w.ask(t.Context(), "GET"); err == nil {
		t.Error("answers when stopped")
	}
}

// TestDemoService has a request in flight when the service is told to stop.
func TestDemoService(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	h := demoHandler("web-7", l.Addr(), 50*time.Millisecond)
	served, begun := make(chan error, 1), make(chan struct{})
	go func() {
		served <- serveDemo(ctx, l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			close(begun)
			h.ServeHTTP(w, r)
		}))
	}()
	answer := make(chan error, 1)
	go func() {
		w := &demoWire{addr: l.Addr().String()}
		defer w.close()
		_, err := w.ask(t.Context(), "POST")
		answer <- err
	}()
	<-begun
	stop()
	if err := <-answer; err != nil {
		t.Error(err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}

func TestDemoTable(t *testing.T) {
	addr := netip.MustParseAddrPort
	up := lbsync.Server{Up: true, Weight: 100}
	maint := lbsync.Server{Admin: lbsync.Maint}
	begin := time.Now()
	scene := func(at time.Duration, served int) demoScene {
		s := demoScene{
			at: begin.Add(at), registry: true, balancer: true, pid: 42, total: demoCounts{Requests: served, Cut: 1},
			served: map[netip.AddrPort]int{addr("127.1.1.11:8080"): served},
			instances: []demoRow{
				{name: "web-1", addr: addr("127.1.1.11:8080"), pids: "1 2", there: true, server: up},
				{name: "web-2", addr: addr("127.1.1.12:8080"), pids: "- -", there: true, server: maint},
				{name: "web-3", addr: addr("127.1.1.13:8080"), pids: "5 6", there: true, server: lbsync.Server{Weight: 100}},
			},
		}
		s.enter(registrar.Snapshot{Now: 10_000, Entries: []registrar.Entry{
			{Addr: addr("127.1.1.11:8080"), Present: true, Instance: registrar.Instance{Beat: 9_500}},
			{Addr: addr("127.1.1.12:8080"), Gone: &registrar.Gone{Reason: registrar.Left}},
			{Addr: addr("127.1.1.99:8080"), Present: true, Instance: registrar.Instance{Beat: 10_001, Meta: registrar.Meta{Draining: true}}},
			{Addr: addr("127.1.1.98:8080"), Gone: &registrar.Gone{Reason: registrar.Expired}},
		}}, func(a netip.AddrPort) string { return map[bool]string{true: "extra"}[a == addr("127.1.1.99:8080")] })
		return s
	}
	var out bytes.Buffer
	v := newDemoView(&out, func() { t.Error("the view says that nobody reads") })
	if v.tty || v.color {
		t.Fatal("a buffer is no terminal")
	}
	v.tty = true
	v.show(scene(0, 100))
	v.show(scene(time.Second, 150))
	got := strings.Join(v.block, "\n")
	want := `
NAME   ADDRESS          REGISTRY  BEAT  HAPROXY  SERVED  PER S  PIDS
web-1  127.1.1.11:8080  ready     0.5s  up       150     50     1 2
web-2  127.1.1.12:8080  left      -     -        0       0      - -
web-3  127.1.1.13:8080  -         -     down     0       0      5 6
extra  127.1.1.99:8080  drain     0.0s  -        0       0      - -
150 requests, 0 failed, 1 cut by the kill; HAProxy is pid 42; 0s`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	// The second drawing goes back over the seven lines of the first.
	if n := strings.Count(out.String(), "\x1b[7A\r\x1b[J"); n != 1 {
		t.Errorf("%d times back to the top: %q", n, &out)
	}
	out.Reset()
	v.say("news")
	v.clear()
	if got := out.String(); !strings.HasPrefix(got, "\x1b[7A\r\x1b[Jnews\n") || !strings.HasSuffix(got, cursorOn) || strings.Count(got, wrapOff) != strings.Count(got, wrapOn) {
		t.Errorf("%q", got)
	}

	v.tty = false
	out.Reset()
	v.show(scene(2*time.Second, 200))
	v.show(scene(2*time.Second+viewPeriod, 220)) // less than a second later
	if got := out.String(); !strings.HasSuffix(got, "s  200 requests, 0 failed, 1 cut by the kill; web-1 200, web-2 0, web-3 0, extra 0\n") || strings.Count(got, "\n") != 1 {
		t.Errorf("%q", got)
	}
}
