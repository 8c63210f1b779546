// Package dockertest starts real Docker Engines for tests: each a dockerd of its
// own, with its data, its sockets, its bridge and its containerd, ended by
// process id when the tests end. Its images are made from nothing but programs of
// this project. It needs root. Nothing here imitates an Engine.
package dockertest

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
)

const (
	readyTimeout = 60 * time.Second // an Engine starts in half a second
	stopTimeout  = 30 * time.Second
	callTimeout  = 60 * time.Second
)

// App is the image that every Engine has: scripts/deploy/app, and nothing else.
const App = "app:test"

var started atomic.Uint32

// Engine is one running dockerd.
type Engine struct {
	URL     string // of its socket, as DOCKER_HOST has it
	Client  *client.Client
	Host    string       // a loopback address to publish ports on, of this Engine alone
	Network string       // of its containers, with addresses of its own
	bridge  string       // the network's interface
	pool    netip.Prefix // of addresses of the networks
	dir     string
	args    []string
	cmd     *exec.Cmd
}

var (
	sharing sync.Mutex
	shared  *Engine // guarded by sharing
)

// Shared returns the Engine that all tests of a package share. Its TestMain calls
// Stop.
func Shared(tb testing.TB) *Engine {
	tb.Helper()
	sharing.Lock()
	defer sharing.Unlock()
	if shared == nil {
		shared = launch(tb)
	}
	return shared
}

// Stop ends the shared Engine, if there is one.
func Stop() error {
	sharing.Lock()
	defer sharing.Unlock()
	if shared == nil {
		return nil
	}
	e := shared
	shared = nil
	return e.stop()
}

// Start runs an Engine of the test's own until that ends. args are further flags
// of dockerd.
func Start(tb testing.TB, args ...string) *Engine {
	tb.Helper()
	e := launch(tb, args...)
	tb.Cleanup(func() {
		if err := e.stop(); err != nil {
			tb.Error(err)
		}
	})
	return e
}

// launch prepares and starts an Engine. Who is not root, or has no dockerd, is
// skipped, but fails where it may not be: root where ROLLCALL_REQUIRE_SERVERS or
// CI is set.
func launch(tb testing.TB, args ...string) *Engine {
	tb.Helper()
	if os.Geteuid() != 0 {
		tb.Skip("a Docker Engine of its own needs root")
	}
	if _, err := exec.LookPath("dockerd"); err != nil {
		if os.Getenv("CI") != "" || os.Getenv("ROLLCALL_REQUIRE_SERVERS") != "" {
			tb.Fatalf("dockerd is missing: %v; apt-get install docker.io", err)
		}
		tb.Skipf("dockerd is missing: %v", err)
	}
	dir, err := os.MkdirTemp("", "rc") // short: a socket's path may have 104 bytes
	if err != nil {
		tb.Fatal(err)
	}
	n, pid := int(started.Add(1)), os.Getpid()
	e := &Engine{
		URL: "unix://" + filepath.Join(dir, "s"), dir: dir, args: args,
		Host:    fmt.Sprintf("127.%d.%d.%d", 128+pid>>8&63, pid&255, n%250+1),
		Network: "rollcall", bridge: fmt.Sprintf("rc%x-%d", pid, n),
		// Of 10.96/11, four for each process.
		pool: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(96 + pid>>6&31), byte(pid<<2 + n&3), 0}), 24),
	}
	err = e.Launch()
	if err == nil {
		e.Client, err = client.New(client.WithHost(e.URL))
	}
	if err == nil {
		err = e.network()
	}
	if err == nil {
		err = e.importApp()
	}
	if err != nil {
		tb.Fatal(errors.Join(err, e.stop()))
	}
	return e
}

// Launch starts the process again after Kill.
func (e *Engine) Launch() error {
	path := func(name string) string { return filepath.Join(e.dir, name) }
	log, err := os.OpenFile(path("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	// vfs works everywhere. Without iptables nothing of the host's changes;
	// docker-proxy publishes ports.
	e.cmd = exec.Command("dockerd", append([]string{
		"--data-root", path("data"), "--exec-root", path("exec"), "--pidfile", path("pid"), "-H", e.URL, "--storage-driver", "vfs",
		"--bridge", "none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false", "--config-file", path("none.json"),
		"--default-address-pool", fmt.Sprintf("base=%s,size=26", e.pool),
	}, e.args...)...)
	e.cmd.Stdout, e.cmd.Stderr = log, log
	// A test binary that is killed must not leave an Engine behind. SIGTERM has it
	// end its containers too.
	e.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := os.WriteFile(path("none.json"), []byte("{}"), 0o600); err != nil {
		return err
	}
	if err := e.cmd.Start(); err != nil {
		return fmt.Errorf("start dockerd: %w", err)
	}
	deadline := time.NewTimer(readyTimeout)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		c, err := net.DialTimeout("unix", path("s"), time.Second)
		if err == nil {
			return c.Close()
		}
		select {
		case <-deadline.C:
			out, _ := os.ReadFile(log.Name())
			return fmt.Errorf("dockerd does not listen: %w\n%s", err, out)
		case <-tick.C:
		}
	}
}

// network makes the containers' network.
func (e *Engine) network() error {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	_, err := e.Client.NetworkCreate(ctx, e.Network, client.NetworkCreateOptions{
		Driver: "bridge", Options: map[string]string{"com.docker.network.bridge.name": e.bridge},
	})
	return err
}

// Program builds a package of this project without cgo and returns the program's
// path.
func (e *Engine) Program(pkg string) (string, error) {
	path := filepath.Join(e.dir, filepath.Base(pkg))
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s", "-o", path, "rollcall/"+pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", pkg, err, out)
	}
	return path, nil
}

func (e *Engine) importApp() error {
	path, err := e.Program("scripts/deploy/app")
	if err != nil {
		return err
	}
	return e.Import(App, map[string]string{"app": path}, `ENTRYPOINT ["/app"]`, "EXPOSE 8080")
}

// Import makes an image of files alone, path in the image → path here, with
// changes as a Dockerfile has them.
func (e *Engine) Import(tag string, files map[string]string, changes ...string) error {
	image, err := pack(files)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	r, err := e.Client.ImageImport(ctx, client.ImageImportSource{Source: image, SourceName: "-"}, tag, client.ImageImportOptions{Changes: changes})
	if err != nil {
		return fmt.Errorf("import %s: %w", tag, err)
	}
	_, err = io.Copy(io.Discard, r)
	return errors.Join(err, r.Close())
}

// Installed makes an image of a program that is installed here, with the
// libraries that it is linked with and nothing else.
func (e *Engine) Installed(tag, program string) error {
	path, err := exec.LookPath(program)
	if err != nil {
		return err
	}
	out, err := exec.Command("ldd", path).Output()
	if err != nil {
		return fmt.Errorf("ldd %s: %w", path, err)
	}
	files := map[string]string{"bin/" + program: path}
	for _, lib := range regexp.MustCompile(`/\S+`).FindAllString(string(out), -1) {
		files[lib[1:]] = lib
	}
	return e.Import(tag, files, "ENV PATH=/bin")
}

// Dockerfile builds an image, with files beside the Dockerfile, name → path here.
func (e *Engine) Dockerfile(tag, dockerfile string, files map[string]string) error {
	files = maps.Clone(files)
	files["Dockerfile"] = dockerfile
	around, err := pack(files)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	r, err := e.Client.ImageBuild(ctx, around, client.ImageBuildOptions{Tags: []string{tag}, Remove: true})
	if err != nil {
		return fmt.Errorf("build %s: %w", tag, err)
	}
	out, err := io.ReadAll(r.Body)
	if err == nil && !strings.Contains(string(out), "Successfully tagged") {
		err = fmt.Errorf("build %s:\n%s", tag, out)
	}
	return errors.Join(err, r.Body.Close())
}

// pack makes a tar of files, name → path here.
func pack(files map[string]string) (io.Reader, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	// A directory that is only implied would be root's alone.
	dirs := map[string]bool{}
	for name := range files {
		for dir := filepath.Dir(name); dir != "."; dir = filepath.Dir(dir) {
			dirs[dir] = true
		}
	}
	for _, dir := range slices.Sorted(maps.Keys(dirs)) {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755}); err != nil {
			return nil, err
		}
	}
	for name, path := range files {
		content, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(content))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(content); err != nil {
			return nil, err
		}
	}
	return &out, w.Close()
}

// Labelled returns the containers, running or not, that have a label KEY=VALUE.
func (e *Engine) Labelled(tb testing.TB, label string) []*Container {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), callTimeout)
	defer cancel()
	all, err := e.Client.ContainerList(ctx, client.ContainerListOptions{All: true, Filters: client.Filters{}.Add("label", label)})
	if err != nil {
		tb.Fatal(err)
	}
	var out []*Container
	for _, c := range all.Items {
		out = append(out, &Container{c.ID, e})
	}
	return out
}

// Hang stops dockerd, until Resume.
func (e *Engine) Hang(tb testing.TB) {
	tb.Helper()
	e.signal(tb, syscall.SIGSTOP)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(readyTimeout); ; <-tick.C { // each of its threads has to hear of it
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", e.cmd.Process.Pid))
		if err != nil || len(threads) == 0 {
			tb.Fatalf("no threads of dockerd: %v", err)
		}
		stopped := 0
		for _, path := range threads {
			if stat, err := os.ReadFile(path); err == nil && strings.Contains(string(stat), ") T ") {
				stopped++
			}
		}
		if stopped == len(threads) {
			return
		}
		if time.Now().After(deadline) {
			tb.Fatal("dockerd does not stop")
		}
	}
}

// Resume ends Hang.
func (e *Engine) Resume(tb testing.TB) {
	tb.Helper()
	e.signal(tb, syscall.SIGCONT)
}

// Kill ends dockerd at once. Launch starts it again.
func (e *Engine) Kill(tb testing.TB) {
	tb.Helper()
	e.signal(tb, syscall.SIGKILL)
	_ = e.cmd.Wait() // says "signal: killed"
	// Its containerd goes with it. Until an init has reaped that, the next dockerd
	// would take it for alive, and wait for it.
	pidfile := filepath.Join(e.dir, "exec/containerd/containerd.pid")
	pid, err := os.ReadFile(pidfile)
	if err != nil {
		tb.Fatal(err)
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(readyTimeout); ; <-tick.C {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%s/stat", bytes.TrimSpace(pid)))
		if err != nil || bytes.Contains(stat, []byte(") Z ")) {
			break
		}
		if time.Now().After(deadline) {
			tb.Fatal("dockerd's containerd does not end")
		}
	}
	if err := os.Remove(pidfile); err != nil {
		tb.Error(err)
	}
	// Which it does itself when it ends in order.
	if err := syscall.Unmount(filepath.Join(e.dir, "data"), syscall.MNT_DETACH); err != nil {
		tb.Error(err)
	}
}

func (e *Engine) signal(tb testing.TB, sig syscall.Signal) {
	tb.Helper()
	if err := e.cmd.Process.Signal(sig); err != nil {
		tb.Fatalf("signal dockerd: %v", err)
	}
}

// stop removes the containers and the network, ends dockerd, and looks whether it
// has left anything behind.
func (e *Engine) stop() error {
	defer os.RemoveAll(e.dir)
	var errs []error
	if e.Client != nil {
		ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
		defer cancel()
		all, err := e.Client.ContainerList(ctx, client.ContainerListOptions{All: true})
		errs = append(errs, err)
		for _, c := range all.Items {
			_, err := e.Client.ContainerRemove(ctx, c.ID, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
			errs = append(errs, err)
		}
		_, err = e.Client.NetworkRemove(ctx, e.Network, client.NetworkRemoveOptions{})
		errs = append(errs, err, e.Client.Close())
	}
	if e.cmd.Process != nil && e.cmd.ProcessState == nil {
		errs = append(errs, e.cmd.Process.Signal(syscall.SIGTERM))
		kill := time.AfterFunc(stopTimeout, func() { _ = e.cmd.Process.Kill() }) // Wait says so
		errs = append(errs, e.cmd.Wait())
		kill.Stop()
	}
	if _, err := net.InterfaceByName(e.bridge); err == nil {
		errs = append(errs, fmt.Errorf("dockerd has left the interface %s", e.bridge))
	}
	// The host's own network, as containers see it, is what dockerd always leaves.
	if err := syscall.Unmount(filepath.Join(e.dir, "exec/netns/default"), syscall.MNT_DETACH); err != nil && err != syscall.EINVAL && err != syscall.ENOENT {
		errs = append(errs, err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	errs = append(errs, err)
	for line := range strings.Lines(string(mounts)) {
		if at := strings.Fields(line)[1]; strings.HasPrefix(at, e.dir+"/") {
			errs = append(errs, fmt.Errorf("dockerd has left the mount %s", at), syscall.Unmount(at, syscall.MNT_DETACH))
		}
	}
	return errors.Join(errs...)
}

// Container is one container that runs App.
type Container struct {
	ID     string
	engine *Engine
}

// Spec is how to run one.
type Spec struct {
	Name       string // empty = the Engine's choice
	Image      string // empty = App
	Args       []string
	Env        []string
	Labels     map[string]string
	Publish    []string // [ADDR:]PORT of the container, on the Engine's Host or on ADDR, a free port of that
	Port       uint16   // where they are published in the place of a free one
	Expose     []string
	Network    string // empty = the Engine's; or host, or none
	Check      bool   // HEALTHCHECK by "app check", ten times a second, unhealthy at once
	StopSignal string
	Restart    bool // whenever it ends
}

// Run starts a container that the test's end removes.
func (e *Engine) Run(tb testing.TB, s Spec) *Container {
	tb.Helper()
	cfg := &container.Config{Image: cmp.Or(s.Image, App), Cmd: s.Args, Env: s.Env, Labels: s.Labels, StopSignal: s.StopSignal, ExposedPorts: network.PortSet{}}
	host := &container.HostConfig{NetworkMode: container.NetworkMode(e.Network), PortBindings: network.PortMap{}}
	if s.Network != "" {
		host.NetworkMode = container.NetworkMode(s.Network)
	}
	for _, p := range s.Publish {
		at := e.Host
		if i := strings.LastIndexByte(p, ':'); i >= 0 {
			at, p = p[:i], p[i+1:]
		}
		port := network.MustParsePort(p)
		binding := network.PortBinding{HostIP: netip.MustParseAddr(at)}
		if s.Port > 0 {
			binding.HostPort = strconv.Itoa(int(s.Port))
		}
		host.PortBindings[port] = []network.PortBinding{binding}
		cfg.ExposedPorts[port] = struct{}{}
	}
	for _, p := range s.Expose {
		cfg.ExposedPorts[network.MustParsePort(p)] = struct{}{}
	}
	if s.Check {
		cfg.Healthcheck = &container.HealthConfig{Test: []string{"CMD", "/app", "check"}, Interval: 100 * time.Millisecond, Timeout: 5 * time.Second, Retries: 1}
	}
	if s.Restart {
		host.RestartPolicy.Name = container.RestartPolicyAlways
	}
	ctx, cancel := context.WithTimeout(tb.Context(), callTimeout)
	defer cancel()
	created, err := e.Client.ContainerCreate(ctx, client.ContainerCreateOptions{Config: cfg, HostConfig: host, Name: s.Name})
	if err != nil {
		tb.Fatal(err)
	}
	c := &Container{created.ID, e}
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
		defer cancel()
		if _, err := e.Client.ContainerRemove(ctx, c.ID, client.ContainerRemoveOptions{Force: true}); err != nil {
			tb.Error(err)
		}
	})
	c.Do(tb, "start")
	return c
}

// Do is one of start, stop, restart, pause, unpause, or a signal's name.
func (c *Container) Do(tb testing.TB, verb string) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), callTimeout)
	defer cancel()
	var err error
	e := c.engine.Client
	switch verb {
	case "start":
		_, err = e.ContainerStart(ctx, c.ID, client.ContainerStartOptions{})
	case "stop":
		_, err = e.ContainerStop(ctx, c.ID, client.ContainerStopOptions{})
	case "restart":
		_, err = e.ContainerRestart(ctx, c.ID, client.ContainerRestartOptions{})
	case "pause":
		_, err = e.ContainerPause(ctx, c.ID, client.ContainerPauseOptions{})
	case "unpause":
		_, err = e.ContainerUnpause(ctx, c.ID, client.ContainerUnpauseOptions{})
	default:
		_, err = e.ContainerKill(ctx, c.ID, client.ContainerKillOptions{Signal: verb})
	}
	if err != nil {
		tb.Fatalf("%s: %v", verb, err)
	}
}

// Inspect is what the Engine says of the container.
func (c *Container) Inspect(tb testing.TB) container.InspectResponse {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), callTimeout)
	defer cancel()
	r, err := c.engine.Client.ContainerInspect(ctx, c.ID, client.ContainerInspectOptions{})
	if err != nil {
		tb.Fatal(err)
	}
	return r.Container
}

// Addr is where the container's port is published.
func (c *Container) Addr(tb testing.TB, port string) netip.AddrPort {
	tb.Helper()
	bindings := c.Inspect(tb).NetworkSettings.Ports[network.MustParsePort(port)]
	if len(bindings) == 0 {
		tb.Fatalf("port %s is not published", port)
	}
	n, err := strconv.ParseUint(bindings[0].HostPort, 10, 16)
	if err != nil {
		tb.Fatal(err)
	}
	return netip.AddrPortFrom(bindings[0].HostIP, uint16(n))
}

// IP is the container's own address.
func (c *Container) IP(tb testing.TB) netip.Addr {
	tb.Helper()
	return c.Inspect(tb).NetworkSettings.Networks[c.engine.Network].IPAddress
}
