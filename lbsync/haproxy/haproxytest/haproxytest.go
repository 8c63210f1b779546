// Package haproxytest runs a real haproxy for a test, and small HTTP servers
// for it to send requests to.
//
// Each haproxy and each server has a loopback address of its own: HAProxy binds
// with SO_REUSEPORT, so two processes on one address would share its traffic
// and no error would tell. Everything ends with the test, by process id.
package haproxytest

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Options says which haproxy to start.
type Options struct {
	Backends []Backend
	// StateFile makes Reload and Restart keep the states of slots, as a server
	// with server-state-file in its configuration does.
	StateFile bool
	// Sections are further lines, after all else: whole sections.
	Sections []string
	// MasterWorker runs haproxy with -W: a master that forks the worker, and
	// forks another one for Reload.
	MasterWorker bool
}

// Backend is one backend, with a frontend of its own named fe_NAME.
type Backend struct {
	Name    string
	Balance string   // "" means HAProxy's own choice
	Slots   int      // number of server-template slots, named s1, s2, …
	Check   bool     // slots have checks; all checks of the backend ask for /healthz
	TCP     bool     // mode tcp, in its frontend too; Check does nothing then
	Extra   []string // further lines of the backend
}

// HAProxy is a running haproxy. Its methods are for one goroutine.
type HAProxy struct {
	// Socket is the path of the stats socket, level admin.
	Socket string
	// UserSocket is the path of a second one, level user.
	UserSocket string
	// OperatorSocket is the path of a third one, level operator.
	OperatorSocket string

	dir    string
	binary string
	addrs  map[string]string
	state  bool
	master bool
	worker int // process id of the one that answers
	child  *child
}

// child is one process, or a master with its workers, and the news of its end.
type child struct {
	cmd   *exec.Cmd
	group bool          // it leads a process group of its own
	done  chan struct{} // closed when the process has been waited for
}

func (c *child) pid() int { return c.cmd.Process.Pid }

// Start starts haproxy and returns when it answers. Without a haproxy on this
// machine it skips the test, or fails it if CI or ROLLCALL_REQUIRE_SERVERS is
// set.
func Start(tb testing.TB, o Options) *HAProxy {
	tb.Helper()
	binary, err := exec.LookPath("haproxy")
	if err != nil {
		binary = "/usr/sbin/haproxy" // not in every user's PATH
		if _, err := os.Stat(binary); err != nil {
			if os.Getenv("CI") != "" || os.Getenv("ROLLCALL_REQUIRE_SERVERS") != "" {
				tb.Fatalf("haproxy is not installed: %v", err)
			}
			tb.Skipf("haproxy is not installed: %v", err)
		}
	}
	// The path of a Unix socket has at most 107 bytes; t.TempDir is too long.
	dir, err := os.MkdirTemp("", "rc")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = os.RemoveAll(dir) })

	h := &HAProxy{
		Socket:         filepath.Join(dir, "admin"),
		UserSocket:     filepath.Join(dir, "user"),
		OperatorSocket: filepath.Join(dir, "operator"),

		dir:    dir,
		binary: binary,
		addrs:  make(map[string]string, len(o.Backends)),
		state:  o.StateFile,
		master: o.MasterWorker,
	}
	for _, b := range o.Backends {
		h.addrs[b.Name] = freeAddr(tb)
	}
	if err := os.WriteFile(h.path("haproxy.cfg"), h.config(o), 0o600); err != nil {
		tb.Fatal(err)
	}
	if err := os.WriteFile(h.path("state"), nil, 0o600); err != nil {
		tb.Fatal(err)
	}
	h.run(tb)
	return h
}

func (h *HAProxy) path(name string) string { return filepath.Join(h.dir, name) }

// config renders haproxy.cfg. A slot keeps its address over a reload only if
// it has a host name that its init-addr can do without.
func (h *HAProxy) config(o Options) []byte {
	var b bytes.Buffer
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("global")
	line("  nbthread 2")
	line("  stats socket %s mode 600 level admin expose-fd listeners", h.Socket)
	line("  stats socket %s mode 600 level user", h.UserSocket)
	line("  stats socket %s mode 600 level operator", h.OperatorSocket)
	if o.StateFile {
		line("  server-state-file %s", h.path("state"))
	}
	line("defaults")
	line("  mode http")
	line("  timeout connect 1s")
	line("  timeout client 30s")
	line("  timeout server 30s")
	line("  timeout check 500ms")
	line("  option redispatch")
	line("  option idle-close-on-response")
	line("  default-server inter 50ms rise 1 fall 2")
	if o.StateFile {
		line("  load-server-state-from-file global")
	}
	for _, be := range o.Backends {
		mode := "http"
		if be.TCP {
			mode = "tcp"
		}
		line("frontend fe_%s", be.Name)
		line("  mode %s", mode)
		line("  bind %s", h.addrs[be.Name])
		line("  default_backend %s", be.Name)
		line("backend %s", be.Name)
		line("  mode %s", mode)
		if be.Balance != "" {
			line("  balance %s", be.Balance)
		}
		check := ""
		if be.Check && !be.TCP {
			line("  option httpchk GET /healthz")
			check = "check "
		}
		for _, extra := range be.Extra {
			line("  %s", extra)
		}
		if be.Slots > 0 {
			line("  server-template s 1-%d slot.invalid:1 %sdisabled init-addr last,127.0.0.1", be.Slots, check)
		}
	}
	for _, s := range o.Sections {
		line("%s", s)
	}
	return b.Bytes()
}

// run starts one more process and waits until it is the one that answers.
func (h *HAProxy) run(tb testing.TB, args ...string) {
	tb.Helper()
	output, err := os.OpenFile(h.path("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		tb.Fatal(err)
	}
	defer output.Close()
	if h.master {
		args = append(args, "-W")
	}
	cmd := exec.Command(h.binary, append([]string{"-db", "-f", h.path("haproxy.cfg")}, args...)...)
	cmd.Stdout, cmd.Stderr = output, output
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: h.master}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	c := &child{cmd: cmd, group: h.master, done: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // how it ended does not matter: it is killed
		close(c.done)
	}()
	h.child = c
	tb.Cleanup(func() { c.kill() })
	h.await(tb)
}

// await waits until another process than the last one answers: the child, or a
// new worker of it.
func (h *HAProxy) await(tb testing.TB) {
	tb.Helper()
	before := h.worker
	poll(tb, startBound, "haproxy answers", func() error {
		select {
		case <-h.child.done:
			logged, _ := os.ReadFile(h.path("log"))
			tb.Fatalf("haproxy ended: %v\n%s", h.child.cmd.ProcessState, logged)
		default:
		}
		text, err := command(h.Socket, "show info")
		if err != nil {
			return err
		}
		pid := 0
		for line := range strings.Lines(text) {
			if n, ok := strings.CutPrefix(line, "Pid: "); ok {
				pid, err = strconv.Atoi(strings.TrimSpace(n))
			}
		}
		if pid == 0 || pid == before || !h.master && pid != h.child.pid() {
			return fmt.Errorf("another process answers: %d, %w", pid, err)
		}
		h.worker = pid
		return err
	})
}

// kill ends the process, stopped or not, and waits for its end.
func (c *child) kill() {
	select {
	case <-c.done: // its number may be another's by now
		return
	default:
	}
	if c.group {
		_ = syscall.Kill(-c.pid(), syscall.SIGKILL) // workers outlive a master that is killed
	}
	_ = c.cmd.Process.Kill() // fails only if it has ended
	<-c.done
}

// Addr returns where the frontend of a backend listens, as "127.1.2.3:8080".
func (h *HAProxy) Addr(backend string) string { return h.addrs[backend] }

// PID returns the process id of the newest process that answers: never a
// master's.
func (h *HAProxy) PID() int { return h.worker }

// ConfigSum returns a checksum of the configuration file as it is now.
func (h *HAProxy) ConfigSum(tb testing.TB) string {
	tb.Helper()
	text, err := os.ReadFile(h.path("haproxy.cfg"))
	if err != nil {
		tb.Fatal(err)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}

// Edit replaces old by text in haproxy.cfg, where it must be exactly once, as an
// operator does before a Reload.
func (h *HAProxy) Edit(tb testing.TB, old, text string) {
	tb.Helper()
	cfg, err := os.ReadFile(h.path("haproxy.cfg"))
	if err != nil {
		tb.Fatal(err)
	}
	if n := bytes.Count(cfg, []byte(old)); n != 1 {
		tb.Fatalf("%q is %d times in haproxy.cfg", old, n)
	}
	if err := os.WriteFile(h.path("haproxy.cfg"), bytes.Replace(cfg, []byte(old), []byte(text), 1), 0o600); err != nil {
		tb.Fatal(err)
	}
}

// saveState writes the state file, as an operator's reload script does.
func (h *HAProxy) saveState(tb testing.TB) {
	tb.Helper()
	if !h.state {
		return
	}
	if err := os.WriteFile(h.path("state"), []byte(h.Command(tb, "show servers state")), 0o600); err != nil {
		tb.Fatal(err)
	}
}

// Reload replaces the process by a new one without losing a connection, and
// returns when the new one answers. The old one ends when its connections do.
func (h *HAProxy) Reload(tb testing.TB) {
	tb.Helper()
	h.saveState(tb)
	if h.master {
		if err := h.child.cmd.Process.Signal(syscall.SIGUSR2); err != nil {
			tb.Fatal(err)
		}
		h.await(tb)
		return
	}
	h.run(tb, "-sf", strconv.Itoa(h.PID()), "-x", h.Socket)
}

// Replace starts a process that binds everything anew while the old one lives on, stopped
// or not, and returns the old one. The socket's path is the same. The frontends move to
// other addresses, as two processes would share the traffic of one.
func (h *HAProxy) Replace(tb testing.TB) (old *HAProxy) {
	tb.Helper()
	before := *h
	h.addrs = make(map[string]string, len(before.addrs))
	for name, addr := range before.addrs {
		h.addrs[name] = freeAddr(tb)
		h.Edit(tb, "bind "+addr+"\n", "bind "+h.addrs[name]+"\n")
	}
	h.run(tb)
	return &before
}

// Kill ends the process at once. The state file stays as old as it is.
func (h *HAProxy) Kill(tb testing.TB) {
	tb.Helper()
	h.child.kill()
}

// Restart starts a new process after the old one has ended.
func (h *HAProxy) Restart(tb testing.TB) {
	tb.Helper()
	select {
	case <-h.child.done:
	default:
		h.saveState(tb)
		h.child.kill()
	}
	h.run(tb)
}

// Stop freezes the process: it accepts and answers nothing until Cont. It
// returns when every thread has stopped.
func (h *HAProxy) Stop(tb testing.TB) {
	tb.Helper()
	h.signal(tb, syscall.SIGSTOP)
	Poll(tb, "haproxy has stopped", func() error {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", h.PID()))
		if err != nil || len(threads) == 0 {
			return fmt.Errorf("no threads in /proc: %w", errors.Join(err, os.ErrNotExist))
		}
		for _, thread := range threads {
			stat, err := os.ReadFile(thread)
			if err != nil {
				return err
			}
			if !bytes.Contains(stat, []byte(") T ")) {
				return fmt.Errorf("a thread runs: %s", stat)
			}
		}
		return nil
	})
}

// Cont ends Stop.
func (h *HAProxy) Cont(tb testing.TB) { tb.Helper(); h.signal(tb, syscall.SIGCONT) }

func (h *HAProxy) signal(tb testing.TB, s syscall.Signal) {
	tb.Helper()
	err := h.child.cmd.Process.Signal(s)
	if h.master {
		err = syscall.Kill(h.worker, s)
	}
	if err != nil {
		tb.Fatal(err)
	}
}

// Command runs one line on the stats socket and returns the answer as it came.
func (h *HAProxy) Command(tb testing.TB, line string) string {
	tb.Helper()
	text, err := command(h.Socket, line)
	if err != nil {
		tb.Fatalf("%s: %v", line, err)
	}
	return text
}

func command(socket, line string) (string, error) {
	conn, err := net.DialTimeout("unix", socket, time.Second)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(conn, line+"\n"); err != nil {
		return "", err
	}
	text, err := io.ReadAll(conn)
	return string(text), err
}

const (
	pollBound = 30 * time.Second
	// startBound: HAProxy compares every server with every other before it
	// answers, which takes seconds for 10,000 slots.
	startBound   = time.Minute
	pollInterval = 5 * time.Millisecond
)

// Poll calls fn until it returns nil, and fails the test with fn's last error
// after 30 s. what completes "waiting until …".
func Poll(tb testing.TB, what string, fn func() error) {
	tb.Helper()
	poll(tb, pollBound, what, fn)
}

func poll(tb testing.TB, bound time.Duration, what string, fn func() error) {
	tb.Helper()
	deadline := time.Now().Add(bound)
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		err := fn()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			tb.Fatalf("waiting until %s: %v", what, err)
		}
		<-tick.C
	}
}

// counter numbers the addresses that this process has given out.
var counter atomic.Uint32

// freeAddr returns a loopback address and port of this process alone. Test
// processes run side by side, so it depends on the process id, and an address
// where something listens already is passed over.
func freeAddr(tb testing.TB) string {
	tb.Helper()
	pid := os.Getpid()
	var last error
	for range 100 {
		n := int(counter.Add(1)) - 1
		addr := fmt.Sprintf("127.%d.%d.%d:%d", 16+pid%200, 1+pid/200%250, 1+n%250, 8080+n/250)
		l, err := net.Listen("tcp", addr)
		if err == nil {
			_ = l.Close()
			return addr
		}
		last = err
	}
	tb.Fatalf("no free loopback address: %v", last)
	return ""
}
