// Package redistest starts real redis-server processes for tests: each on a
// loopback address of its own and on a unix socket, without persistence, ended
// by process id when the test ends. Nothing here imitates Redis.
package redistest

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// readyTimeout bounds the start of a server, which takes a few milliseconds.
const readyTimeout = 10 * time.Second

var started atomic.Uint32

// hosts is how many addresses the servers of one process share.
const hosts = 250

// network is the first three parts of these.
func network() string {
	pid := os.Getpid()
	return fmt.Sprintf("127.%d.%d", 64+pid>>8&63, pid&255)
}

// Server is one running redis-server.
type Server struct {
	Host   string   // a loopback address of this server alone
	Addr   string   // host:port
	Socket string   // path of its unix socket
	Dir    string   // its working directory
	file   string   // its configuration, or empty
	Env    []string // of the next Launch, besides this process's own
	args   []string
	within []string // what runs it, if not empty
	cmd    *exec.Cmd
}

// Start runs a redis-server until the test ends. args are further settings,
// such as "--appendonly", "yes". Without a redis-server the test is skipped, or
// fails where ROLLCALL_REQUIRE_SERVERS or CI is set.
func Start(tb testing.TB, args ...string) *Server {
	tb.Helper()
	s := prepare(tb, args...)
	s.Launch(tb)
	tb.Cleanup(func() { s.Kill(tb) })
	return s
}

// StartWithin is Start by a program that runs another as itself, such as "ip",
// "netns", "exec", NAME; the server binds to addr there. Clients of this process
// come by the unix socket.
func StartWithin(tb testing.TB, within []string, addr string, args ...string) *Server {
	tb.Helper()
	s := prepare(tb, args...)
	s.within, s.Host, s.Addr = within, addr, net.JoinHostPort(addr, "6379")
	s.Launch(tb)
	tb.Cleanup(func() { s.Kill(tb) })
	return s
}

// StartReplica runs a replica of s.
func (s *Server) StartReplica(tb testing.TB, args ...string) *Server {
	tb.Helper()
	r := prepare(tb, args...)
	r.args = append(r.args, "--replicaof", s.Host+" 6379", "--replica-announce-ip", r.Host, "--repl-diskless-sync-delay", "0")
	r.Launch(tb)
	tb.Cleanup(func() { r.Kill(tb) })
	return r
}

// StartSentinel runs a Sentinel that watches s as name, takes it for down after
// a second without an answer, and needs another's consent.
func (s *Server) StartSentinel(tb testing.TB, name string) *Server {
	tb.Helper()
	n := prepare(tb)
	n.file = filepath.Join(n.Dir, "sentinel.conf")
	conf := fmt.Sprintf("sentinel announce-ip %s\nsentinel monitor %s %s 6379 2\nsentinel down-after-milliseconds %s 1000\nsentinel failover-timeout %s 5000\n",
		n.Host, name, s.Host, name, name)
	if err := os.WriteFile(n.file, []byte(conf), 0o600); err != nil {
		tb.Fatal(err)
	}
	n.args = append(n.args, "--sentinel")
	n.Launch(tb)
	tb.Cleanup(func() { n.Kill(tb) })
	return n
}

func prepare(tb testing.TB, args ...string) *Server {
	tb.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		if os.Getenv("CI") != "" || os.Getenv("ROLLCALL_REQUIRE_SERVERS") != "" {
			tb.Fatalf("redis-server is missing: %v; apt-get install redis-server", err)
		}
		tb.Skipf("redis-server is missing: %v", err)
	}
	dir, err := os.MkdirTemp("", "rc") // short: a socket's path may have 104 bytes
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			tb.Error(err)
		}
	})
	host := fmt.Sprintf("%s.%d", network(), started.Add(1)%hosts+1)
	return &Server{Host: host, Addr: host + ":6379", Socket: filepath.Join(dir, "redis.sock"), Dir: dir, args: args}
}

// URL is the server's address as --redis takes it.
func (s *Server) URL() string { return "redis://" + s.Addr + "/0" }

// PID is the process id of the running server.
func (s *Server) PID() int { return s.cmd.Process.Pid }

// Client returns a client that the test's end closes.
func (s *Server) Client(tb testing.TB) *redis.Client {
	tb.Helper()
	o := &redis.Options{Addr: s.Addr, MaxRetries: -1, DisableIdentity: true}
	if slices.Contains(s.args, "--tls-port") || len(s.within) > 0 {
		o.Network, o.Addr = "unix", s.Socket // it needs no certificate and no route
	}
	c := redis.NewClient(o)
	tb.Cleanup(func() {
		if err := c.Close(); err != nil {
			tb.Error(err)
		}
	})
	return c
}

// Launch starts the process again after Kill.
func (s *Server) Launch(tb testing.TB) {
	tb.Helper()
	args := append([]string{
		"--bind", s.Host, "--port", "6379", "--unixsocket", s.Socket, "--dir", s.Dir,
		"--save", "", "--appendonly", "no", "--protected-mode", "no", "--daemonize", "no",
	}, s.args...)
	if s.file != "" {
		args = append([]string{s.file}, args...)
	}
	log, err := os.OpenFile(filepath.Join(s.Dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		tb.Fatal(err)
	}
	defer log.Close()
	args = slices.Concat(s.within, []string{"redis-server"}, args)
	s.cmd = exec.Command(args[0], args[1:]...)
	s.cmd.Env = append(s.cmd.Environ(), s.Env...)
	s.cmd.Stdout, s.cmd.Stderr = log, log
	// A test binary that is killed must not leave a server behind.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		tb.Fatalf("start redis-server: %v", err)
	}
	deadline := time.NewTimer(readyTimeout)
	defer deadline.Stop()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		err := s.ping()
		if err == nil {
			return
		}
		select {
		case <-deadline.C:
			out, _ := os.ReadFile(log.Name())
			tb.Fatalf("redis-server on %s does not answer: %v\n%s", s.Addr, err, out)
		case <-tick.C:
		}
	}
}

// ping succeeds when the server has loaded its data and answers. It asks on the
// unix socket, which is in a directory of this server alone: on the TCP address
// another's server might answer, if this one could not bind.
func (s *Server) ping() error {
	c, err := net.DialTimeout("unix", s.Socket, time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	if _, err := fmt.Fprint(c, "PING\r\n"); err != nil {
		return err
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return err
	}
	if answer != "+PONG\r\n" && !strings.HasPrefix(answer, "-NOAUTH ") { // as who has a password is answered
		return fmt.Errorf("answer %q", answer)
	}
	return nil
}

// Kill ends the process at once; it may have ended already.
func (s *Server) Kill(tb testing.TB) {
	tb.Helper()
	if s.cmd.ProcessState != nil {
		return
	}
	if err := s.cmd.Process.Kill(); err != nil {
		tb.Errorf("kill redis-server: %v", err)
	}
	_ = s.cmd.Wait() // says "signal: killed"
}

// Signal sends sig, such as SIGSTOP and SIGCONT.
func (s *Server) Signal(tb testing.TB, sig syscall.Signal) {
	tb.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		tb.Fatalf("signal redis-server: %v", err)
	}
}
