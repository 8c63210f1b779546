//go:build !sidecar

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"

	"rollcall/lbsync"
	"rollcall/lbsync/haproxy"
	"rollcall/registrar"
)

// The demo's times are a fifth of the defaults.
const (
	demoTTL      = 3 * time.Second
	demoInterval = time.Second
)

const (
	demoName  = "web" // the service, and HAProxy's backend
	demoSlots = 10
	demoPort  = 8080
	// endTimeout is how long a process may take to end before it is killed.
	endTimeout = 2 * time.Second
)

// demoStage is what the story plays on: a directory, loopback addresses and
// processes of its own. Methods that start and end are for one goroutine.
type demoStage struct {
	dir, exe       string
	redis, haproxy string // binaries
	network        netip.Prefix
	env            []string
	sum            string // of haproxy.cfg as it was written

	rdb    redis.UniversalClient
	store  *registrar.Store
	client *haproxy.Client

	balancer  *demoChild
	ending    sync.WaitGroup // the goroutines that wait for processes
	mu        sync.Mutex
	children  []*demoChild    // guarded by mu
	instances []*demoInstance // guarded by mu
}

// demoChild is one process and the news of its end.
type demoChild struct {
	name  string
	cmd   *exec.Cmd
	log   string
	meant bool          // to end: the story ended it
	asked bool          // to end, by SIGTERM; a second one would cut it short
	done  chan struct{} // closed when it has been waited for
}

func (c *demoChild) pid() int { return c.cmd.Process.Pid }

func (c *demoChild) running() bool {
	select {
	case <-c.done:
		return false
	default:
		return true
	}
}

// stuck returns an error if c, which was ended, runs.
func (c *demoChild) stuck() error {
	if !c.running() {
		return nil
	}
	return fmt.Errorf("%s, process %d, was killed and has not ended", c.name, c.pid())
}

// demoInstance is one instance of the service: the service and its sidecar.
type demoInstance struct {
	name             string
	addr             netip.AddrPort
	service, sidecar *demoChild
}

func (i *demoInstance) running() bool { return i.service.running() && i.sidecar.running() }

// newDemoStage looks for the binaries and makes the directory and the
// addresses. The caller closes the stage, also after an error of another step.
func newDemoStage() (*demoStage, error) {
	s := &demoStage{}
	var errs []error
	for _, b := range []struct {
		path *string
		name string
	}{{&s.redis, "redis-server"}, {&s.haproxy, "haproxy"}} {
		var err error
		if *b.path, err = findBinary(b.name); err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) > 0 {
		return nil, fmt.Errorf("%w; install them (Debian: apt-get install redis-server haproxy), or run scripts/demo as root, which does", errors.Join(errs...))
	}
	var err error
	if s.exe, err = os.Executable(); err != nil {
		return nil, fmt.Errorf("find the running program: %w", err)
	}
	// The roles take their flags from here and from nowhere else.
	s.env = slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "ROLLCALL_") })
	if s.network, err = demoNetwork(); err != nil {
		return nil, err
	}
	// The path of a Unix socket has at most 107 bytes.
	if s.dir, err = os.MkdirTemp("", "rollcall-demo"); err != nil {
		return nil, err
	}
	return s, nil
}

func findBinary(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		return path, nil
	}
	path = "/usr/sbin/" + name // not in every user's PATH
	if _, serr := os.Stat(path); serr != nil {
		return "", fmt.Errorf("%s is not installed: %w", name, err)
	}
	return path, nil
}

// demoNetwork picks a /24 of loopback addresses that nobody uses. It depends on
// the process id, so demos and tests side by side do not meet. HAProxy binds
// with SO_REUSEPORT: two on one address would share its traffic, and no error
// would tell.
func demoNetwork() (netip.Prefix, error) {
	var last error
	for n := range 100 {
		id := os.Getpid() + n*7919
		network := netip.PrefixFrom(netip.AddrFrom4([4]byte{127, byte(220 + id/250%35), byte(1 + id%250), 0}), 24)
		if last = unused(network); last == nil {
			return network, nil
		}
	}
	return netip.Prefix{}, fmt.Errorf("no free loopback network: %w", last)
}

func unused(network netip.Prefix) error {
	for _, a := range []netip.AddrPort{demoAddr(network, 1, 6379), demoAddr(network, 2, demoPort)} {
		l, err := net.Listen("tcp", a.String())
		if err != nil {
			return err
		}
		if err := l.Close(); err != nil {
			return err
		}
	}
	return nil
}

func demoAddr(network netip.Prefix, host byte, port uint16) netip.AddrPort {
	b := network.Addr().As4()
	b[3] = host
	return netip.AddrPortFrom(netip.AddrFrom4(b), port)
}

func (s *demoStage) redisAddr() netip.AddrPort   { return demoAddr(s.network, 1, 6379) }
func (s *demoStage) haproxyAddr() netip.AddrPort { return demoAddr(s.network, 2, demoPort) }
func (s *demoStage) redisURL() string            { return "redis://" + s.redisAddr().String() + "/0" }
func (s *demoStage) path(name string) string     { return filepath.Join(s.dir, name) }
func (s *demoStage) socket() string              { return s.path("haproxy.sock") }

// connect makes the demo's own clients of the registry and of HAProxy.
func (s *demoStage) connect() error {
	var err error
	if s.rdb, err = registrar.Open(s.redisURL(), 2); err != nil {
		return err
	}
	redis.SetLogger(redisLogger{zerolog.Nop()})
	if s.store, err = registrar.NewStore(s.rdb, registrar.DefaultNamespace); err != nil {
		return err
	}
	s.client, err = haproxy.New(haproxy.Config{Socket: s.socket()}, zerolog.Nop())
	return err
}

// start starts a process, with its output in a file.
func (s *demoStage) start(ctx context.Context, name, binary string, args ...string) (*demoChild, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	c := &demoChild{name: name, log: s.path(name + ".log"), done: make(chan struct{})}
	output, err := os.OpenFile(c.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer output.Close()
	// Not CommandContext: who ends when, and in which order, is the story's.
	c.cmd = exec.Command(binary, args...)
	c.cmd.Dir, c.cmd.Env = s.dir, s.env
	c.cmd.Stdout, c.cmd.Stderr = output, output
	c.cmd.SysProcAttr = demoProcess()
	if err := c.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	s.ending.Go(func() {
		_ = c.cmd.Wait() // how it ended is in ProcessState
		close(c.done)
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.children = append(s.children, c)
	return c, nil
}

func (s *demoStage) role(ctx context.Context, name string, args ...string) (*demoChild, error) {
	return s.start(ctx, name, s.exe, append(args, "--redis", s.redisURL())...)
}

// check returns an error if a process has ended that should be running.
func (s *demoStage) check() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.children {
		if !c.meant && !c.running() {
			return fmt.Errorf("%s has ended: %v%s", c.name, c.cmd.ProcessState, tail(c.log))
		}
	}
	return nil
}

// tail returns the last lines of a log, or nothing.
func tail(path string) string {
	const lines = 5
	text, err := os.ReadFile(path)
	text = bytes.TrimSpace(text)
	if err != nil || len(text) == 0 {
		return ""
	}
	all := strings.Split(string(text), "\n")
	return "\n  " + strings.Join(all[max(0, len(all)-lines):], "\n  ")
}

// doubted tells whether the reaper was kept from its work: on a machine that is
// too busy, Redis' answers come too late to be a proof.
func (s *demoStage) doubted() bool {
	text, err := os.ReadFile(s.path("reaper.log"))
	return err == nil && bytes.Contains(text, []byte("not armed"))
}

func (s *demoStage) startRedis(ctx context.Context) error {
	_, err := s.start(ctx, "redis-server", s.redis,
		"--bind", s.redisAddr().Addr().String(), "--port", "6379", "--dir", s.dir,
		"--save", "", "--appendonly", "no", "--protected-mode", "no", "--daemonize", "no")
	return err
}

// writeConfig writes haproxy.cfg, once.
func (s *demoStage) writeConfig() error {
	// A slot keeps its server over a reload only if it has a host name that its
	// init-addr can do without. Without idle-close-on-response a stopping
	// process closes idle connections that a request may already be on its way
	// on. A POST may have been carried out by who died with it, so only what is
	// idempotent is sent twice.
	text := fmt.Sprintf(`# Written once by rollcall demo. Nobody changes it afterwards.
global
    nbthread 2
    maxconn 256
    stats socket %s mode 600 level admin expose-fd listeners
    server-state-file %s
    hard-stop-after 10s
defaults
    mode http
    timeout connect 500ms
    timeout client 10s
    timeout server 2s
    timeout check 500ms
    load-server-state-from-file global
    option idle-close-on-response
    option redispatch 1
    retries 3
    retry-on conn-failure empty-response
frontend in
    bind %s
    default_backend %s
backend %[4]s
    balance roundrobin
    option httpchk GET /healthz
    http-request disable-l7-retry if METH_POST
    server-template s 1-%[5]d slot.invalid:1 check inter %[6]dms fastinter 100ms downinter 100ms rise 1 fall 2 disabled init-addr last,127.0.0.1
`, s.socket(), s.path("state"), s.haproxyAddr(), demoName, demoSlots, checkEvery.Milliseconds())
	if err := os.WriteFile(s.path("state"), nil, 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(s.path("haproxy.cfg"), []byte(text), 0o600); err != nil {
		return err
	}
	var err error
	s.sum, err = s.configSum()
	return err
}

func (s *demoStage) configSum() (string, error) {
	text, err := os.ReadFile(s.path("haproxy.cfg"))
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:]), nil
}

// startHAProxy starts one more process. It does not wait until it answers.
func (s *demoStage) startHAProxy(ctx context.Context, args ...string) error {
	c, err := s.start(ctx, "haproxy", s.haproxy, append([]string{"-db", "-f", s.path("haproxy.cfg")}, args...)...)
	if err == nil {
		s.balancer = c
	}
	return err
}

// reloadHAProxy does what an operator's reload does: it saves the servers'
// states and starts a new process that takes the old one's listeners over. It
// returns the old one.
func (s *demoStage) reloadHAProxy(ctx context.Context) (*demoChild, error) {
	state, err := s.command("show servers state " + demoName)
	if err != nil {
		return nil, fmt.Errorf("save the servers' states: %w", err)
	}
	if err := os.WriteFile(s.path("state"), state, 0o600); err != nil {
		return nil, err
	}
	old := s.balancer
	s.mean(old)
	return old, s.startHAProxy(ctx, "-sf", strconv.Itoa(old.pid()), "-x", s.socket())
}

// command runs one line on HAProxy's socket.
func (s *demoStage) command(line string) ([]byte, error) {
	conn, err := net.DialTimeout("unix", s.socket(), time.Second)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(endTimeout)); err != nil {
		return nil, err
	}
	if _, err := io.WriteString(conn, line+"\n"); err != nil {
		return nil, err
	}
	return io.ReadAll(conn)
}

// ourHAProxy tells whether the demo itself started this process.
func (s *demoStage) ourHAProxy(pid int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.ContainsFunc(s.children, func(c *demoChild) bool { return c.name == "haproxy" && c.pid() == pid })
}

// startService starts the service of a new instance, and startSidecar has it
// registered.
func (s *demoStage) startService(ctx context.Context) (*demoInstance, error) {
	s.mu.Lock()
	n := len(s.instances) + 1
	s.mu.Unlock()
	i := &demoInstance{name: fmt.Sprintf("%s-%d", demoName, n), addr: demoAddr(s.network, byte(10+n), demoPort)}
	var err error
	i.service, err = s.start(ctx, i.name, s.exe, "demo-service", "--name", i.name, "--listen", i.addr.String())
	return i, err
}

func (s *demoStage) startSidecar(ctx context.Context, i *demoInstance) error {
	var err error
	i.sidecar, err = s.role(ctx, i.name+"-sidecar", "register", "--service", demoName, "--addr", i.addr.String(), "--id-file", "")
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.instances = append(s.instances, i)
	return nil
}

// all returns the instances that have been started, in order.
func (s *demoStage) all() []*demoInstance {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.instances)
}

// mean says that processes are about to end.
func (s *demoStage) mean(children ...*demoChild) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range children {
		c.meant = true
	}
}

// kill ends processes at once, all together. One that the kernel does not let go
// of in endTimeout is left to it; close says so.
func (s *demoStage) kill(children ...*demoChild) {
	s.mean(children...)
	for _, c := range children {
		_ = c.cmd.Process.Kill() // or it has ended already
	}
	bound := time.After(endTimeout)
	for _, c := range children {
		select {
		case <-c.done:
		case <-bound:
			return
		}
	}
}

// ask asks processes to end, once.
func (s *demoStage) ask(children ...*demoChild) {
	s.mean(children...)
	for _, c := range children {
		if !c.asked {
			c.asked = true
			_ = c.cmd.Process.Signal(syscall.SIGTERM) // or it has ended already
		}
	}
}

// end asks processes to end, waits, and kills those that take too long.
func (s *demoStage) end(children ...*demoChild) {
	s.ask(children...)
	bound := time.NewTimer(endTimeout)
	defer bound.Stop()
	for _, c := range children {
		select {
		case <-c.done:
		case <-bound.C:
			s.kill(children...)
			return
		}
	}
}

// close ends every process that still runs, and returns how many: first the
// sidecars, which leave, and Redis last. It removes the directory unless keep is
// set.
func (s *demoStage) close(ctx context.Context, keep bool) (ended int, err error) {
	s.mu.Lock()
	children := slices.Clone(s.children)
	s.mu.Unlock()
	var groups [3][]*demoChild
	for _, c := range children {
		if c.running() {
			ended++
		}
		switch {
		case strings.HasSuffix(c.name, "-sidecar"):
			groups[0] = append(groups[0], c)
		case c.name == "redis-server":
			groups[2] = append(groups[2], c)
		default:
			groups[1] = append(groups[1], c)
		}
	}
	for _, g := range groups {
		s.end(g...)
	}
	var errs []error
	for _, c := range children {
		if err := c.stuck(); err != nil {
			ended--
			errs = append(errs, err)
		}
	}
	if len(errs) == 0 {
		s.ending.Wait()
	}
	if s.client != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
		defer cancel()
		errs = append(errs, s.client.Close(ctx))
	}
	if s.rdb != nil {
		errs = append(errs, s.rdb.Close())
	}
	if !keep {
		errs = append(errs, os.RemoveAll(s.dir))
	}
	return ended, errors.Join(errs...)
}

// entry returns what the register says of an instance.
func (s *demoStage) entry(ctx context.Context, addr netip.AddrPort) (registrar.Entry, error) {
	tctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	snap, err := s.store.Read(tctx, demoName, nil)
	if err != nil {
		return registrar.Entry{}, err
	}
	for _, e := range snap.Entries {
		if e.Addr == addr {
			return e, nil
		}
	}
	return registrar.Entry{Addr: addr}, nil
}

// servers returns what HAProxy says of each address.
func (s *demoStage) servers(ctx context.Context) (pid int, servers map[netip.AddrPort]lbsync.Server, err error) {
	st, err := s.client.Read(ctx, demoName)
	if err != nil {
		return 0, nil, err
	}
	servers = map[netip.AddrPort]lbsync.Server{}
	for _, srv := range st.Servers {
		servers[srv.Addr] = srv
	}
	return st.Process.PID, servers, nil
}

// serving tells whether HAProxy sends requests to srv.
func serving(srv lbsync.Server) bool { return srv.Admin == lbsync.Ready && srv.Up && srv.Weight > 0 }
