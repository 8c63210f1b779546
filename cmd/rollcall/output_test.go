package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/docker/dockertest"
	"rollcall/registrar/redistest"
)

// pipe is a process's way to a reader, which the test is.
type pipe struct {
	r, w *os.File
	once sync.Once
}

// newPipe makes a pipe that blocks, as a shell's does.
func newPipe(t *testing.T) *pipe {
	t.Helper()
	var fds [2]int
	if err := syscall.Pipe2(fds[:], syscall.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	p := &pipe{r: os.NewFile(uintptr(fds[0]), "read"), w: os.NewFile(uintptr(fds[1]), "write")}
	t.Cleanup(func() { p.leave(); _ = p.w.Close() })
	return p
}

// fill takes all room that is left: the reader stands still.
func (p *pipe) fill(t *testing.T) {
	t.Helper()
	// Opened anew, so that the process's own descriptor stays blocking.
	w, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", p.w.Fd()), os.O_WRONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	raw, err := w.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{4096, 1} {
		for full := false; !full; {
			err := raw.Control(func(fd uintptr) {
				_, werr := syscall.Write(int(fd), make([]byte, size))
				full = errors.Is(werr, syscall.EAGAIN)
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
}

// leave is the reader's going away.
func (p *pipe) leave() { p.once.Do(func() { _ = p.r.Close() }) }

// spawnWith starts a rollcall with these as standard output and error; nil is the
// process's own buffer.
func (s *system) spawnWith(t *testing.T, stdout, stderr *os.File, args ...string) *process {
	t.Helper()
	cmd := exec.Command(s.binary(t), args...)
	if stdout != nil { // else the interface would not be nil
		cmd.Stdout = stdout
	}
	if stderr != nil {
		cmd.Stderr = stderr
	}
	cmd.WaitDelay = time.Second // the output of an app that is left behind
	return s.start(t, cmd)
}

// freeAddr returns a loopback address that nobody listens on.
func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// deaf is a rollcall whose log nobody reads, with its metrics.
type deaf struct {
	monitored
	log *pipe
}

// deaf starts a rollcall whose log is full from the beginning, at the level that
// says the most.
func (s *system) deaf(t *testing.T, args ...string) *deaf {
	t.Helper()
	log, http := newPipe(t), freeAddr(t)
	log.fill(t)
	args = append(args[:1:1], append([]string{"--log-level", "debug", "--http", http}, args[1:]...)...)
	return &deaf{monitored{s.spawnWith(t, nil, log.w, args...), "http://" + http}, log}
}

// TestLogReaderGone plays a service's life with daemons whose log is a full pipe
// that nobody reads, and then one that nobody can read any more: all of them do
// their work as ever.
func TestLogReaderGone(t *testing.T) {
	t.Parallel()
	const ttl = 3 * time.Second
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 12, Balance: "roundrobin", Check: true}}})}
	rdb, url := s.redis.Client(t), "http://"+s.ha.Addr("be")+"/"
	page := freeAddr(t)
	reap := s.deaf(t, "reap", "--ttl", ttl.String(), "--heartbeat", "1s")
	daemons := []*deaf{
		reap,
		s.deaf(t, "lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8"),
		s.deaf(t, "serve", "--listen", page),
		s.deaf(t, "watch"),
	}
	for _, d := range daemons {
		haproxytest.Poll(t, "it serves", func() error { _, _, err := d.get("/healthz"); return err })
	}
	reap.ready(t, "ok") // the times are in the registry

	type member struct {
		*haproxytest.Instance
		sidecar *deaf
	}
	var living []member
	all := func() {
		t.Helper()
		var is []*haproxytest.Instance
		for _, m := range living {
			is = append(is, m.Instance)
		}
		answered(t, url, is...)
	}
	join := func() {
		t.Helper()
		i := haproxytest.NewInstance(t)
		living = append(living, member{i, s.deaf(t, "register", "--service", "web", "--addr", i.Addr().String(), "--interval", "1s")})
		all()
	}
	leave := func() {
		t.Helper()
		m := living[0]
		living = living[1:]
		begun := time.Now()
		if code := m.sidecar.signal(t, syscall.SIGTERM); code != 0 {
			t.Errorf("register ends with %d", code)
		}
		t.Logf("register ended %v after SIGTERM", time.Since(begun).Round(time.Millisecond))
		s.goes(t, m.Addr().String(), "left")
		all()
	}
	die := func() {
		t.Helper()
		m := living[0]
		living = living[1:]
		m.SetHealthy(false) // HAProxy sends it no more; what it has been sent it answers
		m.sidecar.signal(t, syscall.SIGKILL)
		begun := time.Now()
		s.goes(t, m.Addr().String(), "expired")
		took := time.Since(begun)
		t.Logf("a dead one was out %v after its death, TTL %v", took.Round(time.Millisecond), ttl)
		all()
	}
	join()
	join()
	join()
	first := map[netip.AddrPort]string{}
	note := func() {
		for _, m := range living {
			first[m.Addr()] = s.token(t, m.Addr().String())
		}
	}
	// Around an app, which answers as the others do.
	app, appLog, appHTTP := freeAddr(t), newPipe(t), freeAddr(t)
	appLog.fill(t)
	around := s.spawnWith(t, nil, appLog.w, "register", "--log-level", "debug", "--http", appHTTP, "--service", "jobs", "--addr", app, "--interval", "1s", "--",
		"sh", "-c", "trap 'echo told to stop; exit 7' TERM; echo runs; while :; do sleep 0.02; done")
	haproxytest.Poll(t, "the app is registered", func() error {
		if rdb.HGet(t.Context(), "rollcall:{jobs}:meta", app).Val() == "" {
			return errors.New("absent")
		}
		return nil
	})

	l := startLoad(t, url)
	churn := func(phase string) {
		t.Helper()
		note()
		for range 2 {
			join()
			leave()
			// Everybody has something to log.
			for _, kind := range []string{"normal", "pubsub"} {
				if err := rdb.Do(t.Context(), "CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes").Err(); err != nil {
					t.Fatal(err)
				}
			}
		}
		die()
		join()
		for _, m := range living {
			addr := m.Addr()
			if token := s.token(t, addr.String()); first[addr] != "" && token != first[addr] {
				t.Errorf("%s: %s was registered as %q, is as %q", phase, addr, first[addr], token)
			}
			if gone := s.gone(t, addr.String()); gone != "" {
				t.Errorf("%s: %s is alive, and was taken out: %s", phase, addr, gone)
			}
		}
		for _, d := range daemons {
			if code, body, err := d.get("/healthz"); code != 200 || err != nil {
				t.Errorf("%s: %v: /healthz: %d %q %v", phase, d.cmd.Args, code, body, err)
			}
			d.ready(t, "ok")
		}
		if n := l.failed.Load(); n > 0 {
			t.Errorf("%s: %d of %d requests failed, the last with: %s", phase, n, l.sent.Load(), l.last)
		}
	}
	churn("stands still")
	for _, d := range daemons {
		d.log.leave()
	}
	for _, m := range living {
		m.sidecar.log.leave()
	}
	appLog.leave()
	churn("gone")
	l.stop()
	t.Logf("%d requests, %d failed", l.sent.Load(), l.failed.Load())

	// What was lost is counted, by every one that had something to say.
	everybody := []*deaf{{monitored{around, "http://" + appHTTP}, appLog}}
	for _, m := range living {
		everybody = append(everybody, m.sidecar)
	}
	everybody = append(everybody, daemons...) // lbsync last: who leaves waits for it
	for _, d := range everybody {
		const dropped = "rollcall_log_lines_dropped_total"
		if d.process != around {
			_ = d.cmd.Process.Signal(syscall.SIGHUP) // which is answered in the log
			d.log.leave()                            // of the last that joined
		}
		d.shows(t, dropped, 1, many)
		v, _, _ := d.value(dropped)
		t.Logf("%s dropped %v lines", d.cmd.Args[1], v)
	}
	for _, d := range everybody {
		want := 0
		if d.process == around {
			want = 7
		}
		begun := time.Now()
		if code := d.signal(t, syscall.SIGTERM); code != want {
			t.Errorf("%v ends with %d, want %d", d.cmd.Args, code, want)
		}
		t.Logf("%s ended %v after SIGTERM", d.cmd.Args[1], time.Since(begun).Round(time.Millisecond))
	}
	if out := around.out.String(); out != "runs\ntold to stop\n" {
		t.Errorf("the app printed %q", out)
	}
	if note := rdb.HGet(t.Context(), "rollcall:{jobs}:gone", app).Val(); !strings.HasPrefix(note, "left ") {
		t.Errorf("the app's instance left as %q", note)
	}
}

// TestLogStandsStillAtTheEnd: SIGTERM is obeyed, and the app stopped, while the pipe
// is full.
func TestLogStandsStillAtTheEnd(t *testing.T) {
	t.Parallel()
	for _, program := range []string{"rollcall", "rollcall-sidecar"} {
		t.Run(program, func(t *testing.T) {
			s := &system{redis: redistest.Start(t)}
			if program == "rollcall-sidecar" {
				var err error
				if s.program, err = buildSidecar(); err != nil {
					t.Fatal(err)
				}
			}
			log := newPipe(t)
			log.fill(t)
			p := s.spawnWith(t, nil, log.w, "register", "--service", "web", "--addr", "127.0.0.1:9001", "--",
				"sh", "-c", "trap 'echo told to stop; exit 7' TERM; echo runs; while :; do sleep 0.02; done")
			s.comes(t, "127.0.0.1:9001")
			haproxytest.Poll(t, "the app runs", func() error {
				if p.out.String() == "" {
					return errors.New("it has said nothing")
				}
				return nil
			})
			if code := p.signal(t, syscall.SIGTERM); code != 7 {
				t.Errorf("exit %d", code)
			}
			if out := p.out.String(); out != "runs\ntold to stop\n" {
				t.Errorf("the app printed %q", out)
			}
			s.goes(t, "127.0.0.1:9001", "left")
			// An error too is given up.
			log.fill(t)
			p = s.spawnWith(t, nil, log.w, "register", "--service", "WEB")
			<-p.done
			if code := p.cmd.ProcessState.ExitCode(); code != exitUsage {
				t.Errorf("exit %d", code)
			}
		})
	}
}

// TestEngineLogReaderGone is TestLogReaderGone for an agent.
func TestEngineLogReaderGone(t *testing.T) {
	t.Parallel()
	e := dockertest.Shared(t)
	s := &system{redis: redistest.Start(t)}
	d := s.deaf(t, "docker", "--engine", e.URL, "--advertise", e.Host, "--service", "web", "--leave")
	run := func() (*dockertest.Container, string) {
		c := e.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: map[string]string{"SERVICE_NAME": "web"}})
		addr := c.Addr(t, "8080").String()
		s.comes(t, addr)
		return c, addr
	}
	c, addr := run()
	_, kept := run()
	c.Do(t, "stop")
	s.goes(t, addr, "left")
	d.log.leave()
	c, addr = run()
	c.Do(t, "pause")
	s.goes(t, addr, "unhealthy")
	c.Do(t, "unpause")
	s.comes(t, addr)
	d.ready(t, "ok")
	d.shows(t, "rollcall_log_lines_dropped_total", 1, many)
	if code := d.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
	s.goes(t, addr, "left")
	s.goes(t, kept, "left")
}

// TestLogGoesOn: when somebody reads again, the lines that waited come, then how
// many were dropped, then what is said now.
func TestLogGoesOn(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	for _, format := range []string{"text", "json"} {
		t.Run(format, func(t *testing.T) {
			addr := map[string]string{"text": "127.0.0.1:9001", "json": "127.0.0.1:9002"}[format]
			d := s.deaf(t, "register", "--service", "web", "--addr", addr, "--log-format", format)
			s.comes(t, addr)
			// Each SIGHUP is a line.
			haproxytest.Poll(t, "lines are dropped", func() error {
				for range 200 {
					if err := d.cmd.Process.Signal(syscall.SIGHUP); err != nil {
						return err
					}
					time.Sleep(100 * time.Microsecond) // signals that wait are one
				}
				if v, _, err := d.value("rollcall_log_lines_dropped_total"); err != nil || v == 0 {
					return fmt.Errorf("%v dropped, %v", v, err)
				}
				return nil
			})
			read := &lockedBuffer{}
			go func() { _, _ = io.Copy(read, d.log.r) }() // until the pipe is closed
			haproxytest.Poll(t, "what waited has been read", func() error {
				if !strings.Contains(read.String(), "log lines were dropped") {
					return errors.New("there is more")
				}
				return nil
			})
			if code := d.signal(t, syscall.SIGTERM); code != 0 {
				t.Errorf("exit %d", code)
			}
			want := []string{"registering", "registered", "SIGHUP: files read again", "log lines were dropped", "left"}
			haproxytest.Poll(t, "the log is read", func() error {
				text := strings.Trim(read.String(), "\x00")
				for _, w := range want {
					_, rest, ok := strings.Cut(text, w)
					if !ok {
						return fmt.Errorf("no %q, in order, in …%s", w, text[max(0, len(text)-2000):])
					}
					text = rest
				}
				return nil
			})
			if n := strings.Count(read.String(), "log lines were dropped"); n != 1 {
				t.Errorf("it is said %d times", n)
			}
			field := map[string]string{"text": "log lines were dropped lines=", "json": `"lines":`}[format]
			if !strings.Contains(read.String(), field) {
				t.Errorf("no %s", field)
			}
		})
	}
}

// TestLogOnFullDisk has a sidecar log to a file on a full disk: it goes on, and says
// what was lost when there is room again.
func TestLogOnFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a disk of its own needs root")
	}
	t.Parallel()
	dir := t.TempDir()
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	log, err := os.OpenFile(filepath.Join(dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = log.Close() })
	s := &system{redis: redistest.Start(t)}
	http := freeAddr(t)
	p := s.spawnWith(t, nil, log, "register", "--service", "web", "--addr", "127.0.0.1:9001", "--interval", "100ms", "--http", http)
	t.Cleanup(func() { p.signal(t, syscall.SIGKILL) }) // before the disk goes
	d := &monitored{p, "http://" + http}
	token := s.comes(t, "127.0.0.1:9001")
	const dropped = "rollcall_log_lines_dropped_total"
	hup := func() { _ = p.cmd.Process.Signal(syscall.SIGHUP) } // a line of the log
	d.shows(t, dropped, 0, 0)

	filler := filepath.Join(dir, "filler")
	if err := os.WriteFile(filler, make([]byte, 1<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	haproxytest.Poll(t, "lines are dropped", func() error { // the file's last page has room
		hup()
		if v, _, err := d.value(dropped); err != nil || v < 3 {
			return fmt.Errorf("%v dropped, %v", v, err)
		}
		return nil
	})
	d.ready(t, "ok")
	if got := s.token(t, "127.0.0.1:9001"); got != token || s.gone(t, "127.0.0.1:9001") != "" {
		t.Errorf("registered as %q, was as %q", got, token)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	haproxytest.Poll(t, "lines come again", func() error {
		hup()
		text, err := os.ReadFile(log.Name())
		_, after, said := strings.Cut(string(text), `log lines were dropped error="write /dev/stderr: no space left on device" lines=`)
		if err != nil || !said || !strings.Contains(after, "SIGHUP: files read again") {
			return fmt.Errorf("%v\n%s", err, text)
		}
		return nil
	})
	if code := p.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
	s.goes(t, "127.0.0.1:9001", "left")
}

// TestChildrenGetSIGPIPE: the app and the command that checks it have the signal's
// default again, also when the sidecar was started without.
func TestChildrenGetSIGPIPE(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	path := binary(t)
	check, app := filepath.Join(t.TempDir(), "check"), filepath.Join(t.TempDir(), "app")
	s.program = "/bin/sh"
	p := s.spawn(t, "-c", `trap '' PIPE; exec "$0" "$@"`, path, "register", "--service", "web", "--addr", "127.0.0.1:9001",
		"--check", "exec:cp /proc/self/status "+check, "--check-interval", "50ms", "--", "sh", "-c", "cp /proc/self/status "+app+"; while :; do sleep 0.02; done")
	s.comes(t, "127.0.0.1:9001")
	for _, file := range []string{check, app} {
		haproxytest.Poll(t, "a child says what it ignores", func() error {
			text, err := os.ReadFile(file)
			_, rest, _ := strings.Cut(string(text), "SigIgn:")
			var ignored uint64
			if _, serr := fmt.Sscanf(strings.TrimSpace(rest), "%x", &ignored); err != nil || serr != nil {
				return fmt.Errorf("%v, %v", err, serr)
			}
			if ignored&(1<<(syscall.SIGPIPE-1)) != 0 {
				return fmt.Errorf("%s: it ignores %x", file, ignored)
			}
			return nil
		})
	}
	if err := p.cmd.Process.Signal(syscall.SIGPIPE); err != nil {
		t.Fatal(err)
	}
	if code := p.signal(t, syscall.SIGTERM); code != 128+int(syscall.SIGTERM) { // the app's
		t.Errorf("exit %d", code)
	}
	s.goes(t, "127.0.0.1:9001", "left")
}

// TestPrintedReaderGone: `rollcall … | head -1` ends with the code that it has else,
// and says nothing.
func TestPrintedReaderGone(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	s.spawn(t, "register", "--service", "web", "--addr", "127.0.0.1:9001")
	s.comes(t, "127.0.0.1:9001")
	for _, c := range []struct {
		args []string
		code int
	}{
		{[]string{"services"}, 0},
		{[]string{"instances", "web", "-o", "json"}, 0},
		{[]string{"events"}, 0},
		{[]string{"--help"}, 0},
		{[]string{"man"}, 0},
		{[]string{"watch"}, 0},
		{[]string{"events", "-f"}, 0},
		{[]string{"demo"}, exitFailed},
	} {
		stdout := newPipe(t)
		stdout.leave()
		p := s.spawnWith(t, stdout.w, nil, c.args...)
		select {
		case <-p.done:
		case <-time.After(20 * time.Second):
			t.Fatalf("%v goes on", c.args)
		}
		if code := p.cmd.ProcessState.ExitCode(); code != c.code {
			t.Errorf("%v: %v, want exit code %d", c.args, p.cmd.ProcessState, c.code)
		}
		if out := p.out.String(); c.code == 0 && out != "" {
			t.Errorf("%v says %q", c.args, out)
		}
	}
	// A failure stays one: no reaper is armed.
	stdout := newPipe(t)
	stdout.leave()
	p := s.spawnWith(t, stdout.w, nil, "status")
	<-p.done
	_, stderr, code := s.rollcall(t, "status")
	if got := p.cmd.ProcessState.ExitCode(); got != code || code != exitFailed || p.out.String() != stderr {
		t.Errorf("status: exit %d, %q; without a pipe exit %d, %q", got, p.out, code, stderr)
	}
}

// TestPrintedReaderStandsStill: a full pipe at standard output holds up what prints
// there, and does not keep it from obeying SIGTERM.
func TestPrintedReaderStandsStill(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	s.spawn(t, "register", "--service", "web", "--addr", "127.0.0.1:9001")
	s.comes(t, "127.0.0.1:9001")
	for _, c := range []struct {
		args []string
		code int
	}{
		{[]string{"watch"}, 0},
		{[]string{"events", "-f"}, exitFailed}, // it had not printed what is there yet
		{[]string{"instances", "web"}, exitFailed},
		{[]string{"demo"}, exitFailed},
	} {
		stdout := newPipe(t)
		stdout.fill(t)
		p := s.spawnWith(t, stdout.w, nil, c.args...)
		waits := func() error {
			stacks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/wchan", p.cmd.Process.Pid))
			if err != nil {
				return err
			}
			var where []string
			for _, file := range stacks {
				text, err := os.ReadFile(file)
				if err == nil && strings.Contains(string(text), "pipe_w") { // pipe_write, pipe_wait_writable
					return nil
				}
				where = append(where, string(text))
			}
			return fmt.Errorf("its threads are in %v", where)
		}
		haproxytest.Poll(t, fmt.Sprint(c.args, " waits for its reader"), waits)
		begun := time.Now()
		if code := p.signal(t, syscall.SIGTERM); code != c.code {
			t.Errorf("%v ends with %d, want %d: %s", c.args, code, c.code, p.out)
		}
		t.Logf("%v ended %v after SIGTERM", c.args, time.Since(begun).Round(time.Millisecond))
	}
}

// TestLastWords: what the Go runtime says at its end, here of a SIGQUIT, comes out
// when somebody reads it, and does not keep the process from ending if nobody does.
func TestLastWords(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	stderr := func(p *process) string {
		to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/2", p.cmd.Process.Pid))
		if err != nil {
			return err.Error()
		}
		return to
	}
	is := func(p *process, prefix string) {
		t.Helper()
		haproxytest.Poll(t, "standard error is "+prefix, func() error {
			if to := stderr(p); !strings.HasPrefix(to, prefix) {
				return errors.New(to)
			}
			return nil
		})
	}
	stuck := s.deaf(t, "watch")
	is(stuck.process, os.DevNull)
	if code := stuck.signal(t, syscall.SIGQUIT); code != 2 {
		t.Errorf("exit %d", code)
	}

	reads := s.deaf(t, "watch")
	is(reads.process, os.DevNull)
	read := &lockedBuffer{}
	go func() { _, _ = io.Copy(read, reads.log.r) }() // until the pipe is closed
	is(reads.process, "pipe:")
	if code := reads.signal(t, syscall.SIGQUIT); code != 2 {
		t.Errorf("exit %d", code)
	}
	haproxytest.Poll(t, "the stack is printed", func() error {
		if text := read.String(); !strings.Contains(text, "SIGQUIT: quit") || !strings.Contains(text, "goroutine 1 ") {
			return errors.New(text[max(0, len(text)-1000):])
		}
		return nil
	})
}
