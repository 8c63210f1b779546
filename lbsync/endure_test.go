package lbsync_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"rollcall/lbsync"
	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
)

// The tests here run a real HAProxy under traffic for as long as something can
// go wrong. `go test` runs a short form. scripts/soak runs the full sizes: it
// sets ROLLCALL_SOAK to a file that takes the figures.

var soakFile = os.Getenv("ROLLCALL_SOAK")

// size is short, or long under scripts/soak.
func size[T any](short, long T) T {
	if soakFile != "" {
		return long
	}
	return short
}

var figures sync.Mutex // one line at a time

// figure notes a measurement. Its bound is for a machine with nothing else to
// do, so scripts/soak judges it and a test does not; an empty bound is none.
func figure(t *testing.T, what, got, bound string, met bool) {
	t.Helper()
	verdict := map[bool]string{true: "met", false: "MISSED"}[met]
	if bound == "" {
		verdict = "-"
	}
	t.Logf("%s: %s (%s) %s", what, got, bound, verdict)
	if soakFile == "" {
		return
	}
	figures.Lock()
	defer figures.Unlock()
	f, err := os.OpenFile(soakFile, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err == nil {
		_, err = fmt.Fprintf(f, "%s\t%s\t%s\t%s\t%s\n", strings.TrimPrefix(t.Name(), "TestEndure"), what, got, bound, verdict)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Error(err)
	}
}

// within is a figure that must not be longer than bound.
func within(t *testing.T, what string, got, bound time.Duration) {
	t.Helper()
	round := 100 * time.Microsecond
	if bound == 0 {
		figure(t, what, got.Round(round).String(), "", true)
		return
	}
	figure(t, what, got.Round(round).String(), "<= "+bound.String(), got <= bound)
}

// until polls like haproxytest.Poll, for longer and less often: for what
// takes HAProxy itself some time to tell.
func until(t *testing.T, what string, every, bound time.Duration, fn func() error) {
	t.Helper()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for begun := time.Now(); ; <-tick.C {
		err := fn()
		if err == nil {
			return
		}
		if time.Since(begun) > bound {
			t.Fatalf("waiting until %s: %v", what, err)
		}
	}
}

// traffic is requests at a steady pace until stop: POST and GET, on kept
// connections.
type traffic struct {
	sent, failed atomic.Int64
	stop         func()
	// A HAProxy that is being replaced closes kept connections that are idle, and
	// a request may be on its way just then: no answer at all, on a connection
	// that was used before, is asked for once more if reloads, and counted here.
	reloads bool
	crossed atomic.Int64

	mu   sync.Mutex
	why  map[string]int // failures by what they said
	took []time.Duration
}

func startTraffic(t *testing.T, addr string, workers int, pace time.Duration) *traffic {
	t.Helper()
	return new(traffic).start(t, addr, workers, pace)
}

func (tr *traffic) start(t *testing.T, addr string, workers int, pace time.Duration) *traffic {
	t.Helper()
	tr.why = map[string]int{}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for n := range workers {
		running.Go(func() {
			kept := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{}}
			defer kept.CloseIdleConnections()
			tick := time.NewTicker(pace)
			defer tick.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
				begun := time.Now()
				reused := false
				seen := httptrace.WithClientTrace(context.Background(), &httptrace.ClientTrace{GotConn: func(c httptrace.GotConnInfo) { reused = c.Reused }})
				err := request(seen, kept, "http://"+addr+"/", n%3 != 0)
				if tr.reloads && reused && errors.Is(err, io.EOF) {
					tr.crossed.Add(1)
					err = request(seen, kept, "http://"+addr+"/", n%3 != 0)
				}
				tr.sent.Add(1)
				tr.mu.Lock()
				tr.took = append(tr.took, time.Since(begun))
				if err != nil {
					tr.failed.Add(1)
					tr.why[err.Error()]++
				}
				tr.mu.Unlock()
			}
		})
	}
	tr.stop = sync.OnceFunc(func() { cancel(); running.Wait() })
	t.Cleanup(tr.stop)
	return tr
}

// request posts a body that cannot be sent twice, so that nothing retries it
// silently, or gets.
func request(ctx context.Context, c *http.Client, url string, post bool) error {
	method, body := http.MethodGet, io.Reader(nil)
	if post {
		method, body = http.MethodPost, io.MultiReader(strings.NewReader("body"))
	}
	q, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return err
	}
	r, err := c.Do(q)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, r.Body)
	_ = r.Body.Close()
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d", r.StatusCode)
	}
	return err
}

// reach polls until n requests have been sent.
func (tr *traffic) reach(t *testing.T, n int64) {
	t.Helper()
	until(t, fmt.Sprintf("%d requests are sent", n), 10*time.Millisecond, time.Minute, func() error {
		if got := tr.sent.Load(); got < n {
			return fmt.Errorf("%d are", got)
		}
		return nil
	})
}

// none ends the traffic: of at least least requests none has failed.
func (tr *traffic) none(t *testing.T, least int64) {
	t.Helper()
	tr.reach(t, least)
	tr.stop()
	n, failed := tr.sent.Load(), tr.failed.Load()
	figure(t, "failed requests", fmt.Sprintf("%d of %d", failed, n), fmt.Sprintf("0 of >= %d", least), failed == 0 && n >= least)
	within(t, "slowest request", tr.percentile(0, 1), 0)
	if failed > 0 {
		t.Errorf("%d of %d requests failed: %v", failed, n, tr.why)
	}
}

// percentile is of the requests from the n-th on.
func (tr *traffic) percentile(from int, p float64) time.Duration {
	tr.mu.Lock()
	took := slices.Clone(tr.took[min(from, len(tr.took)):])
	tr.mu.Unlock()
	return percentile(took, p)
}

func percentile(d []time.Duration, p float64) time.Duration {
	if len(d) == 0 {
		return 0
	}
	d = slices.Sorted(slices.Values(d))
	return d[min(int(p*float64(len(d))), len(d)-1)]
}

// unchanged fails the test at its end if haproxy.cfg was touched.
func (w *world) unchanged(t *testing.T) {
	t.Helper()
	sum := w.ha.ConfigSum(t)
	t.Cleanup(func() {
		if w.ha.ConfigSum(t) != sum {
			t.Error("haproxy.cfg changed")
		}
	})
}

// member is an instance with a sidecar: it beats, and leaves as the sidecar
// does.
type member struct {
	*haproxytest.Instance
	hurry  context.CancelFunc // it waits for no balancer then
	cancel context.CancelFunc
	done   chan struct{} // closed when the sidecar has ended
	err    error         // of the sidecar; read it after done
}

func (w *world) join(i *haproxytest.Instance) (*member, error) {
	hurried, hurry := context.WithCancel(context.Background())
	b, err := registrar.NewBeater(registrar.BeaterConfig{Service: "web", Addr: i.Addr(), Weight: 100, DrainWait: 10 * time.Second, Hurry: hurried.Done()}, w.store, w.log)
	if err != nil {
		hurry()
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	m := &member{Instance: i, hurry: hurry, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(m.done)
		m.err = b.Run(ctx)
	}()
	return m, nil
}

// leave ends the sidecar and then, gracefully, the instance, which serves for
// as long as linger after it.
func (m *member) leave(linger time.Duration) error {
	m.cancel()
	<-m.done
	m.hurry()
	<-time.After(linger)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return errors.Join(m.err, m.Shutdown(ctx))
}

// members joins n instances that answer after a moment each, so that some
// requests are always under way, and waits until HAProxy has them.
func (w *world) members(t *testing.T, n int) []*member {
	t.Helper()
	ms := make([]*member, n)
	is := make([]*haproxytest.Instance, n)
	for k := range ms {
		is[k] = haproxytest.NewInstance(t)
		is[k].SetPause(time.Millisecond)
		m, err := w.join(is[k])
		if err != nil {
			t.Fatal(err)
		}
		ms[k] = m
	}
	t.Cleanup(func() { // whoever is there at the end
		for _, m := range ms {
			m.hurry()
			m.cancel()
			<-m.done
		}
	})
	w.want(t, "be", ready(100, is...))
	w.answers(t, is...)
	return ms
}

// restart has a member leave and come back, at the same address.
func (w *world) restart(ms []*member, k int, linger time.Duration) error {
	if err := ms[k].leave(linger); err != nil {
		return err
	}
	if err := ms[k].Listen(); err != nil {
		return err
	}
	m, err := w.join(ms[k].Instance)
	if err == nil {
		ms[k] = m
	}
	return err
}

func instances(ms []*member) []*haproxytest.Instance {
	is := make([]*haproxytest.Instance, len(ms))
	for k, m := range ms {
		is[k] = m.Instance
	}
	return is
}

func TestEndureRollingRestart(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, mode.backend, mode.options)
			w.unchanged(t)
			w.run(t, w.client(t))
			ms := w.members(t, 20)
			tr := startTraffic(t, w.ha.Addr("be"), 6, 2*time.Millisecond)
			begun := time.Now()
			for k := range ms {
				if err := w.restart(ms, k, 0); err != nil {
					t.Fatal(err)
				}
				// Down to one is allowed, down to none is not: the next one
				// goes when this one serves.
				addr := ms[k].Addr().String()
				served := ms[k].Served()
				haproxytest.Poll(t, addr+" serves again", func() error {
					if ms[k].Served() == served {
						return fmt.Errorf("%v", w.servers(t, "be")[addr])
					}
					return nil
				})
			}
			within(t, "rolling restart of 20", time.Since(begun), 0)
			w.want(t, "be", ready(100, instances(ms)...))
			tr.none(t, size[int64](1500, 5000))
		})
	}
}

// watching is a Balancer that is watched: which process answered when, and how
// long the longest exchange took. It carries out one at a time.
type watching struct {
	lbsync.Balancer
	turn    sync.Mutex
	longest time.Duration // guarded by turn

	mu      sync.Mutex
	first   map[int]time.Time // answer of each process
	applies int
	before  func(n int)          // the n-th Apply
	after   func(lbsync.Applied) // each Apply
}

func (b *watching) saw(p lbsync.Process, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.first[p.PID]; err != nil || ok {
		return
	}
	if b.first == nil {
		b.first = map[int]time.Time{}
	}
	b.first[p.PID] = time.Now()
}

// timed takes the turn; what it returns gives it back.
func (b *watching) timed() func() {
	b.turn.Lock()
	begun := time.Now()
	return func() {
		b.longest = max(b.longest, time.Since(begun))
		b.turn.Unlock()
	}
}

func (b *watching) Probe(ctx context.Context) (lbsync.Process, error) {
	defer b.timed()()
	p, err := b.Balancer.Probe(ctx)
	b.saw(p, err)
	return p, err
}

func (b *watching) Read(ctx context.Context, backend string) (lbsync.State, error) {
	defer b.timed()()
	st, err := b.Balancer.Read(ctx, backend)
	b.saw(st.Process, err)
	return st, err
}

func (b *watching) Apply(ctx context.Context, backend string, ops []lbsync.Op) (lbsync.Applied, error) {
	b.turn.Lock()
	b.mu.Lock()
	n, before, after := b.applies, b.before, b.after
	b.applies++
	b.mu.Unlock()
	if before != nil {
		before(n)
	}
	begun := time.Now()
	got, err := b.Balancer.Apply(ctx, backend, ops)
	b.longest = max(b.longest, time.Since(begun))
	b.turn.Unlock()
	if after != nil && err == nil {
		after(got)
	}
	return got, err
}

func (b *watching) Peek(ctx context.Context, backend string, servers []lbsync.Server) (lbsync.Applied, error) {
	defer b.timed()()
	return b.Balancer.Peek(ctx, backend, servers)
}

// count returns the number of Applies so far.
func (b *watching) count() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.applies
}

// slowest returns how long the longest exchange so far took.
func (b *watching) slowest() time.Duration {
	b.turn.Lock()
	defer b.turn.Unlock()
	return b.longest
}

// noticed polls until lbsync has heard of HAProxy's process, and returns how
// long after since that was.
func (w *world) noticed(t *testing.T, b *watching, since time.Time) time.Duration {
	t.Helper()
	var took time.Duration
	haproxytest.Poll(t, "lbsync notices", func() error {
		b.mu.Lock()
		defer b.mu.Unlock()
		at, ok := b.first[w.ha.PID()]
		if !ok {
			return errors.New("not yet")
		}
		took = max(at.Sub(since), 0) // it may ask first
		return nil
	})
	return took
}

// HAProxy is reloaded again and again while instances come and go. Slots and
// their states outlive it by the state file.
//
// The file is a moment old when the new process reads it: who was drained in
// that moment is in rotation again until lbsync has looked. So an instance must
// serve for a little longer than its sidecar runs, and the next reload must not
// save that state once more. Those that end at once are counted too, without a
// bound.
func TestEndureReloads(t *testing.T) {
	for _, mode := range modes[:2] {
		for _, linger := range size([]time.Duration{time.Second}, []time.Duration{time.Second, 0}) {
			t.Run(fmt.Sprintf("%s/linger=%v", mode.name, linger), func(t *testing.T) {
				t.Parallel()
				w := newWorld(t, mode.backend, mode.options)
				w.unchanged(t)
				w.cfg.Probe = 0 // the default
				bal := &watching{Balancer: w.client(t)}
				w.run(t, bal)
				ms := w.members(t, 13)
				tr := (&traffic{reloads: true}).start(t, w.ha.Addr("be"), 4, 4*time.Millisecond)
				ctx, cancel := context.WithCancel(context.Background())
				var churning sync.WaitGroup
				var changes atomic.Int64
				t.Cleanup(func() { cancel(); churning.Wait() })
				for third := range 3 { // the last member always stays
					churning.Go(func() {
						for k := 0; ctx.Err() == nil; k = (k + 1) % 4 {
							if err := w.restart(ms, 4*third+k, linger); err != nil {
								t.Error(err)
								return
							}
							changes.Add(2)
						}
					})
				}
				var took []time.Duration
				tick := time.NewTicker(500 * time.Millisecond)
				defer tick.Stop()
				for range size(20, 200) {
					<-tick.C
					w.ha.Reload(t)
					took = append(took, w.noticed(t, bal, time.Now()))
				}
				cancel()
				churning.Wait()
				within(t, "reload noticed, worst", percentile(took, 1), 500*time.Millisecond)
				within(t, "reload noticed, median", percentile(took, 0.5), 0)
				figure(t, "requests that crossed the end of their connection", fmt.Sprint(tr.crossed.Load()), "", true)
				figure(t, "reloads, and changes meanwhile", fmt.Sprint(len(took), ", ", changes.Load()), "", true)
				w.want(t, "be", ready(100, instances(ms)...))
				if linger > 0 {
					tr.none(t, size[int64](1000, 10000))
					return
				}
				tr.stop()
				figure(t, "failed requests", fmt.Sprintf("%d of %d", tr.failed.Load(), tr.sent.Load()), "", true)
			})
		}
	}
}

// A master reloads its worker by SIGUSR2; lbsync speaks to the worker's socket.
func TestEndureMasterWorker(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			t.Parallel()
			w := newWorldOn(t, haproxytest.Options{
				Backends: []haproxytest.Backend{mode.backend}, StateFile: true, MasterWorker: true,
			}, mode.options)
			w.unchanged(t)
			w.cfg.Probe = 0
			bal := &watching{Balancer: w.client(t)}
			w.run(t, bal)
			ms := w.members(t, 3)
			tr := (&traffic{reloads: true}).start(t, w.ha.Addr("be"), 3, 4*time.Millisecond)
			var noticed, right []time.Duration
			for k := range size(4, 30) {
				old := w.ha.PID()
				w.ha.Reload(t)
				begun := time.Now()
				if w.ha.PID() == old {
					t.Fatal("the same worker")
				}
				if k%2 == 1 {
					if err := w.restart(ms, k%len(ms), 0); err != nil {
						t.Fatal(err)
					}
				}
				noticed = append(noticed, w.noticed(t, bal, begun))
				w.want(t, "be", ready(100, instances(ms)...))
				if k%2 == 0 {
					right = append(right, time.Since(begun))
				}
				w.answers(t, instances(ms)...)
			}
			within(t, "reload noticed, worst", percentile(noticed, 1), 500*time.Millisecond)
			within(t, "all right again, worst", percentile(right, 1), 2*time.Second)
			if mode.backend.Slots > 0 {
				tr.none(t, 100)
				return
			}
			// Dynamic servers do not outlive a reload.
			tr.stop()
			figure(t, "failed requests, which dynamic servers cannot avoid", fmt.Sprintf("%d of %d", tr.failed.Load(), tr.sent.Load()), "", true)
		})
	}
}

// gate stands between an lbsync and HAProxy's socket. It kills the lbsync at
// one exact exchange: before HAProxy has the commands, or when it has carried
// them out and nobody has seen the answer.
type gate struct {
	socket string // of the gate
	behind string // HAProxy's

	mu    sync.Mutex
	armed bool
	left  int // changing lines that pass before
	after bool
	kill  func()
}

func (w *world) gate(t *testing.T) *gate {
	t.Helper()
	dir, err := os.MkdirTemp("", "rc") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	g := &gate{socket: filepath.Join(dir, "gate"), behind: w.ha.Socket}
	l, err := net.Listen("unix", g.socket)
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer c.Close()
				g.serve(c)
			})
		}
	})
	t.Cleanup(func() { _ = l.Close(); running.Wait() })
	return g
}

// arm has kill called at the line-th line that changes something.
func (g *gate) arm(line int, after bool, kill func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.armed, g.left, g.after, g.kill = true, line, after, kill
}

func (g *gate) disarm() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.armed = false
}

func changes(line string) bool {
	return strings.Contains(line, ";set server ") || strings.Contains(line, ";add server ") || strings.Contains(line, ";del server ") ||
		strings.Contains(line, ";enable health ") || strings.Contains(line, ";shutdown sessions ")
}

// serve hands on one line and its answer. Errors are lbsync's to notice.
func (g *gate) serve(c net.Conn) {
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return
	}
	var kill func()
	after := false
	if changes(line) {
		g.mu.Lock()
		if g.armed {
			if g.left--; g.left < 0 {
				kill, after, g.armed = g.kill, g.after, false
			}
		}
		g.mu.Unlock()
	}
	if kill != nil && !after {
		kill()
		return
	}
	up, err := net.Dial("unix", g.behind)
	if err != nil {
		return
	}
	defer up.Close()
	if _, err := io.WriteString(up, line); err != nil {
		return
	}
	if kill != nil {
		_, _ = io.Copy(io.Discard, up) // it has been carried out then
		kill()
		return
	}
	_, _ = io.Copy(c, up)
}

// program is one running rollcall lbsync.
type program struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
}

func (p *program) kill() {
	_ = p.cmd.Process.Kill() // it may have ended
	<-p.done
}

// program starts the real lbsync on the gate's socket.
func (w *world) program(t *testing.T, binary string, g *gate) *program {
	t.Helper()
	args := []string{"lbsync", "--socket", g.socket, "--backend", "web=be", "--allow", "127.0.0.0/8", "--drain-timeout", "2s", "--state-dir", filepath.Dir(g.socket)}
	if w.opts != "" {
		args = append(args, "--server-options", w.opts)
	}
	p := &program{cmd: exec.Command(binary, args...), done: make(chan struct{})}
	p.cmd.Env = append(p.cmd.Environ(), "ROLLCALL_REDIS="+w.redis.URL())
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var out strings.Builder
	p.cmd.Stdout, p.cmd.Stderr = &out, &out
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.cmd.Wait() // how it ended does not matter: it is killed
		close(p.done)
	}()
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("lbsync %d\n%s", p.cmd.Process.Pid, &out)
		}
	})
	return p
}

// lbsync is killed at one line or command after the other of a join and a
// leave, and started again.
func TestEndureLbsyncKilled(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "rollcall")
	if out, err := exec.Command("go", "build", "-o", binary, "../cmd/rollcall").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	points := size(3, 30) // for each mode and each way; 24 and 240 in all
	for _, mode := range modes {
		t.Run(mode.name+"/process", func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, mode.backend, mode.options)
			w.unchanged(t)
			g := w.gate(t)
			p := w.program(t, binary, g)
			line, after := 0, false
			w.killed(t, points, func(change func(), arrived func() bool) {
				g.arm(line, after, func() { p.kill() })
				change()
				hit := true
				haproxytest.Poll(t, "lbsync is killed or done", func() error {
					select {
					case <-p.done:
						return nil
					default:
					}
					if hit = !arrived(); hit {
						return errors.New("neither")
					}
					return nil
				})
				g.disarm()
				p.kill() // at rest, if it took fewer lines
				if line++; !hit {
					line, after = 0, !after
				} else if soakFile == "" {
					after = !after
				}
			}, func() { p = w.program(t, binary, g) })
		})
		t.Run(mode.name+"/command", func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, mode.backend, mode.options)
			w.unchanged(t)
			client := w.client(t)
			start := func() (*dying, func()) {
				d := &dying{Balancer: client, kill: func() {}}
				d.left.Store(1 << 40)
				return d, w.run(t, d)
			}
			d, stop := start()
			n := int64(0)
			w.killed(t, points, func(change func(), arrived func() bool) {
				d.left.Store(n)
				change()
				haproxytest.Poll(t, "lbsync is killed or done", func() error {
					if !d.dead.Load() && !arrived() {
						return errors.New("neither")
					}
					return nil
				})
				stop()
				if n += size[int64](3, 1); !d.dead.Load() {
					n = 0
				}
			}, func() { d, stop = start() })
		})
	}
}

// killed makes one change after the other under traffic. kill calls change and
// has lbsync die at some point before or when arrived.
func (w *world) killed(t *testing.T, points int, kill func(change func(), arrived func() bool), start func()) {
	t.Helper()
	stays, goes := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
	w.beat(t, stays.Addr(), 100)
	w.beat(t, goes.Addr(), 100)
	w.want(t, "be", ready(100, stays, goes))
	w.answers(t, stays, goes)
	tr := startTraffic(t, w.ha.Addr("be"), 3, 5*time.Millisecond)
	var took []time.Duration
	for range points {
		comes := haproxytest.NewInstance(t)
		want := ready(100, stays, comes)
		kill(func() {
			w.beat(t, comes.Addr(), 100)
			w.leave(t, goes.Addr())
		}, func() bool { return maps.Equal(w.servers(t, "be"), want) })
		begun := time.Now()
		start()
		w.want(t, "be", want)
		took = append(took, time.Since(begun))
		w.answers(t, stays, comes)
		goes.Close()
		goes = comes
	}
	within(t, fmt.Sprintf("right after a kill, worst of %d", points), percentile(took, 1), 2*time.Second)
	tr.none(t, int64(points)*10)
}

// HAProxy hangs while the register changes, and changes back. What was sent to
// it before lies in its socket, is carried out late, and must not be the last
// word.
func TestEndureHang(t *testing.T) {
	type frozen struct {
		name    string
		w       *world
		bal     *watching
		applies int
		stays   []netip.AddrPort
		want    map[string]string
	}
	var all []frozen
	for _, mode := range modes {
		for _, joins := range []bool{true, false} {
			for at := range size(1, 2) {
				if joins && at > 0 {
					continue // a join is one Apply, beside two others
				}
				h := frozen{name: fmt.Sprintf("%s, joins %t, apply %d", mode.name, joins, at), w: newWorld(t, mode.backend, mode.options)}
				h.w.unchanged(t)
				h.bal = &watching{Balancer: h.w.client(t)}
				h.w.run(t, h.bal)
				a, b, c, d := haproxytest.NewInstance(t), haproxytest.NewInstance(t), haproxytest.NewInstance(t), haproxytest.NewInstance(t)
				begin := []*haproxytest.Instance{a, b}
				if !joins {
					begin = append(begin, c)
				}
				for _, i := range begin {
					h.w.beat(t, i.Addr(), 100)
				}
				h.w.want(t, "be", ready(100, begin...))
				h.w.answers(t, begin...)
				h.w.acked(t, h.w.version(t))

				stop, stopped := make(chan struct{}), make(chan struct{})
				h.bal.mu.Lock()
				fatal := h.bal.applies + at
				h.bal.before = func(n int) {
					if n == fatal {
						close(stop)
						<-stopped
					}
				}
				h.bal.mu.Unlock()
				if joins {
					h.w.beat(t, c.Addr(), 100)
				} else {
					h.w.leave(t, c.Addr())
				}
				haproxytest.Poll(t, h.name+": lbsync applies it", func() error {
					select {
					case <-stop:
						return nil
					default:
						return errors.New("not yet")
					}
				})
				h.w.ha.Stop(t)
				close(stopped)
				if joins {
					h.w.leave(t, c.Addr())
				} else {
					h.w.beat(t, c.Addr(), 100)
				}
				h.w.beat(t, a.Addr(), 50)
				h.w.beat(t, d.Addr(), 100)
				h.applies = fatal + 1
				h.stays = []netip.AddrPort{a.Addr(), b.Addr()}
				h.want = ready(100, append(begin[1:], d)...)
				h.want[a.Addr().String()] = "ready 50"
				all = append(all, h)
			}
		}
	}
	<-time.After(size(6*time.Second, time.Minute)) // that is the hang
	worst := time.Duration(0)
	longest := time.Duration(0)
	for _, h := range all {
		if n := h.bal.count(); n != h.applies {
			t.Errorf("%s: %d changes were tried in silence", h.name, n-h.applies)
		}
		tr := startTraffic(t, h.w.ha.Addr("be"), 3, 5*time.Millisecond)
		h.w.ha.Cont(t)
		begun := time.Now()
		haproxytest.Poll(t, fmt.Sprintf("%s: HAProxy has %v", h.name, h.want), func() error {
			got := h.w.servers(t, "be")
			for _, a := range h.stays {
				if !strings.HasPrefix(got[a.String()], "ready") {
					t.Errorf("%s: %s was taken out: %v", h.name, a, got)
				}
			}
			if !maps.Equal(got, h.want) {
				return fmt.Errorf("it has %v", got)
			}
			return nil
		})
		worst = max(worst, time.Since(begun))
		tr.reach(t, 100)
		tr.stop()
		if n := tr.failed.Load(); n > 0 {
			t.Errorf("%s: %d of %d requests failed: %v", h.name, n, tr.sent.Load(), tr.why)
		}
		longest = max(longest, h.bal.slowest())
	}
	within(t, fmt.Sprintf("right after it wakes, worst of %d", len(all)), worst, 2*time.Second)
	within(t, "longest attempt", longest, time.Second+50*time.Millisecond) // its timeout is 1 s
	if longest > 5*time.Second {
		t.Errorf("an attempt took %v", longest)
	}
}

// One change after the other, of every kind, at a steady pace.
func TestEndureChurn(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, mode.backend, mode.options)
			w.unchanged(t)
			w.run(t, w.client(t))
			ms := w.members(t, 5)
			tr := startTraffic(t, w.ha.Addr("be"), 4, 4*time.Millisecond)
			tick := time.NewTicker(size(200*time.Millisecond, time.Second))
			defer tick.Stop()
			n := size(12, 60)
			seven := 7
			for k := range n {
				<-tick.C
				m, next := ms[k/6%5], ms[(k/6+1)%5]
				switch k % 6 {
				case 0:
					if err := m.leave(0); err != nil {
						t.Fatal(err)
					}
				case 1:
					i := haproxytest.NewInstance(t)
					i.SetPause(time.Millisecond)
					m, err := w.join(i)
					if err != nil {
						t.Fatal(err)
					}
					ms[k/6%5] = m
				case 2:
					w.word(t, next.Addr(), registrar.Word{Verb: "drain"})
				case 3:
					w.word(t, next.Addr(), registrar.Word{Verb: "ready"})
				case 4:
					w.word(t, next.Addr(), registrar.Word{Verb: "weight", Weight: &seven})
				case 5:
					w.word(t, next.Addr(), registrar.Word{Verb: "weight"})
				}
			}
			w.want(t, "be", ready(100, instances(ms)...))
			figure(t, "changes", fmt.Sprint(n), "", true)
			tr.none(t, size[int64](500, 10000))
		})
	}
}

// many registers n instances that do not exist.
func (w *world) many(t *testing.T, n int) []netip.AddrPort {
	t.Helper()
	addrs := make([]netip.AddrPort, n)
	for i := range addrs {
		addrs[i] = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 200, byte(i >> 8), byte(i)}), 9)
		w.beat(t, addrs[i], 100)
	}
	return addrs
}

// serving counts the servers that HAProxy would send requests to.
func (w *world) serving(t *testing.T) (n int) {
	t.Helper()
	for line := range strings.Lines(w.ha.Command(t, "show servers state be")) {
		// Running, no bit of maint or drain (4 is the history of a slot), a weight.
		if f := strings.Fields(line); len(f) > 18 && f[5] == "2" && (f[6] == "0" || f[6] == "4") && f[7] != "0" {
			n++
		}
	}
	return n
}

// A backend is filled while another one has traffic, and then changed.
func TestEndureManyServers(t *testing.T) {
	n := size(1000, 10000)
	for _, mode := range []struct {
		name string
		be   haproxytest.Backend
	}{
		{"slots", haproxytest.Backend{Name: "be", Balance: "leastconn", Slots: n + 100}},
		{"dynamic", haproxytest.Backend{Name: "be", Balance: "leastconn"}},
	} {
		t.Run(mode.name, func(t *testing.T) { // alone: it measures
			w := newWorld(t, mode.be, "")
			w.unchanged(t)
			beside := haproxytest.NewInstance(t)
			w.ha.Command(t, fmt.Sprintf("add server other/hand %s pool-purge-delay 1s pool-max-conn -1", beside.Addr()))
			w.ha.Command(t, "set server other/hand state ready")
			addrs := w.many(t, n)
			version := w.version(t)

			tr := startTraffic(t, w.ha.Addr("other"), 4, 2*time.Millisecond)
			tr.reach(t, 200) // warm
			from := int(tr.sent.Load())
			tr.reach(t, int64(from)+size[int64](500, 4000))
			idle := tr.percentile(from, 0.99)

			from = int(tr.sent.Load())
			begun := time.Now()
			bal := &watching{Balancer: w.client(t)}
			w.run(t, bal)
			until(t, "all are applied", 10*time.Millisecond, time.Minute, func() error {
				acks, err := w.store.Acks(t.Context(), "web")
				if err == nil && (len(acks.Balancers) != 1 || acks.Balancers[0].Applied < version) {
					err = fmt.Errorf("%+v", acks)
				}
				return err
			})
			took := time.Since(begun)
			busy := tr.percentile(from, 0.99)
			samples := int(tr.sent.Load()) - from
			tr.none(t, 200)
			if got := w.serving(t); got != n {
				t.Errorf("%d of %d servers serve", got, n)
			}
			within(t, fmt.Sprintf("full load of %d", n), took, 6*time.Second)
			figure(t, "p99 beside it, idle and under load", fmt.Sprintf("%v, %v of %d", idle.Round(10*time.Microsecond), busy.Round(10*time.Microsecond), samples), "<= 5 times", busy <= 5*idle)
			within(t, "longest exchange", bal.slowest(), 0)
			if busy > 2*time.Second {
				t.Errorf("p99 beside the load is %v", busy)
			}

			// From the register's answer to HAProxy's, read back.
			type applied struct {
				server lbsync.Server
				at     time.Time
			}
			answers := make(chan applied, 100)
			bal.mu.Lock()
			bal.after = func(got lbsync.Applied) {
				for _, s := range got.Servers {
					answers <- applied{s, time.Now()}
				}
			}
			bal.mu.Unlock()
			change := func(a netip.AddrPort, weight int) time.Duration {
				w.beat(t, a, weight)
				begun := time.Now()
				give := time.NewTimer(10 * time.Second)
				defer give.Stop()
				for {
					select {
					case got := <-answers:
						if s := got.server; s.Addr == a && s.Admin == lbsync.Ready && s.Weight == weight {
							return max(got.at.Sub(begun), 0)
						}
					case <-give.C:
						t.Fatalf("%s was not given weight %d", a, weight)
					}
				}
			}
			var weights, joins []time.Duration
			for i := range 50 {
				weights = append(weights, change(addrs[(i*97)%n], 10+i))
				joins = append(joins, change(netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 201, 0, byte(i)}), 9), 100))
			}
			within(t, "one weight, median of 50", percentile(weights, 0.5), 5*time.Millisecond)
			within(t, "one weight, worst", percentile(weights, 1), 0)
			within(t, "one join, median of 50", percentile(joins, 0.5), 5*time.Millisecond)
			within(t, "one join, worst", percentile(joins, 1), 0)
		})
	}
}

// HAProxy is killed, starts with its configuration's servers alone, and gets
// them all back: up at once, as they were up a moment ago.
func TestEndureRestartOfMany(t *testing.T) {
	const n = 1000
	for _, mode := range []struct {
		name  string
		slots int
		check bool
		after time.Duration // all of them were up, the restart comes
		bound time.Duration
	}{
		{"slots", n, false, 0, time.Second},
		{"slots-check", n, true, 2 * time.Second, time.Second},
		{"dynamic", 0, false, 0, time.Second},
		{"dynamic-check", 0, true, 2 * time.Second, time.Second},
		// Nobody can have told lbsync that they were up: their checks decide.
		{"dynamic-check, up since this very moment", 0, true, 0, 0},
	} {
		t.Run(mode.name, func(t *testing.T) { // alone: it measures
			be := haproxytest.Backend{Name: "be", Balance: "leastconn", Slots: mode.slots, Check: mode.check}
			options := ""
			if mode.check {
				// One instance answers the checks of all of them.
				at := haproxytest.NewInstance(t).Addr()
				options = fmt.Sprintf("inter 10s fastinter 1s downinter 1s rise 1 fall 2 addr %s port %d", at.Addr(), at.Port())
				be.Extra = []string{"default-server " + options}
				options = "check " + options
			}
			w := newWorld(t, be, options)
			w.unchanged(t)
			w.run(t, w.client(t))
			w.many(t, n)
			all := func() error {
				if got := w.serving(t); got != n {
					return fmt.Errorf("%d do", got)
				}
				return nil
			}
			var took []time.Duration
			for range size(2, 10) {
				until(t, "all serve", 20*time.Millisecond, time.Minute, all)
				w.acked(t, w.version(t))
				<-time.After(mode.after) // how long they have been up is what is asked
				w.ha.Kill(t)
				w.ha.Restart(t)
				begun := time.Now() // its socket answers
				until(t, "all serve again", 10*time.Millisecond, time.Minute, all)
				took = append(took, time.Since(begun))
			}
			within(t, fmt.Sprintf("%d serve again, worst of %d restarts", n, len(took)), percentile(took, 1), mode.bound)
			within(t, "median", percentile(took, 0.5), 0)
		})
	}
}

// A new instance gets its first request when its check says so, and at once
// where there is none.
func TestEndureFirstRequest(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, mode.backend, mode.options)
			w.run(t, w.client(t))
			old := haproxytest.NewInstance(t)
			w.beat(t, old.Addr(), 100)
			w.answers(t, old)
			tr := startTraffic(t, w.ha.Addr("be"), 4, 2*time.Millisecond)
			var took []time.Duration
			checked := strings.HasSuffix(mode.name, "-check")
			for range size(2, 20) {
				next := haproxytest.NewInstance(t)
				next.SetHealthy(!checked)
				begun := time.Now()
				w.beat(t, next.Addr(), 100)
				if checked {
					w.acked(t, w.version(t))
					haproxytest.Poll(t, "its check has failed", func() error {
						if n := next.Checked(); n < 3 {
							return fmt.Errorf("%d checks", n)
						}
						return nil
					})
					tr.reach(t, tr.sent.Load()+100)
					if n := next.Served(); n != 0 {
						t.Errorf("%d requests before it was healthy", n)
					}
					next.SetHealthy(true)
					begun = time.Now()
				}
				haproxytest.Poll(t, "it serves", func() error {
					if next.Served() == 0 {
						return fmt.Errorf("%v", w.servers(t, "be"))
					}
					return nil
				})
				took = append(took, time.Since(begun))
				w.leave(t, next.Addr())
				w.want(t, "be", ready(100, old))
				next.Close()
			}
			within(t, "first request, worst", percentile(took, 1), 300*time.Millisecond) // a check each 50 or 100 ms
			tr.none(t, 200)
		})
	}
}

// echo is a TCP server that says its address and then repeats what it hears.
func echo(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	var mu sync.Mutex
	conns := map[net.Conn]bool{}
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns[c] = true
			mu.Unlock()
			running.Go(func() {
				defer c.Close()
				if _, err := fmt.Fprintln(c, l.Addr()); err == nil {
					_, _ = io.Copy(c, c)
				}
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for c := range conns {
			_ = c.Close()
		}
		mu.Unlock()
		running.Wait()
	})
	return netip.MustParseAddrPort(l.Addr().String())
}

// session is a long TCP connection through HAProxy.
type session struct {
	conn net.Conn
	r    *bufio.Reader
	by   string // address of the server that answered
}

func dial(t *testing.T, addr string) *session {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	s := &session{conn: c, r: bufio.NewReader(c)}
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	line, err := s.r.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	s.by = strings.TrimSpace(line)
	return s
}

// alive sends a line and reads it again.
func (s *session) alive() error {
	if err := s.conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(s.conn, "still there?"); err != nil {
		return err
	}
	_, err := s.r.ReadString('\n')
	return err
}

// Long TCP sessions outlive the drain of their server. Only a dynamic server,
// which could never be deleted otherwise, cuts them, and not before its time.
func TestEndureSessions(t *testing.T) {
	for _, mode := range []struct {
		name string
		be   haproxytest.Backend
	}{
		{"slots", haproxytest.Backend{Name: "be", TCP: true, Slots: 2}},
		{"dynamic", haproxytest.Backend{Name: "be", TCP: true, Balance: "leastconn"}},
	} {
		t.Run(mode.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, mode.be, "")
			w.unchanged(t)
			w.cfg.DrainTimeout = size(1500*time.Millisecond, 10*time.Second)
			w.run(t, w.client(t))
			a, b, c := echo(t), echo(t), echo(t)
			w.beat(t, a, 100)
			w.want(t, "be", map[string]string{a.String(): "ready 100"})
			var ss []*session
			for range 5 {
				s := dial(t, w.ha.Addr("be"))
				if s.by != a.String() {
					t.Fatalf("%s answers", s.by)
				}
				ss = append(ss, s)
			}
			w.beat(t, b, 100)
			w.want(t, "be", map[string]string{a.String(): "ready 100", b.String(): "ready 100"})
			begun := time.Now()
			w.leave(t, a)
			w.want(t, "be", map[string]string{a.String(): "drain 100", b.String(): "ready 100"})
			if s := dial(t, w.ha.Addr("be")); s.by != b.String() {
				t.Errorf("a new session goes to %s", s.by)
			}
			until(t, "a is out", 5*time.Millisecond, time.Minute, func() error {
				for _, s := range ss {
					if err := s.alive(); err != nil {
						if took := time.Since(begun); mode.be.Slots > 0 || took < w.cfg.DrainTimeout {
							t.Fatalf("a session was cut after %v: %v", took, err)
						}
						return nil
					}
				}
				if got := w.servers(t, "be"); got[a.String()] != "" {
					return fmt.Errorf("%v", got)
				}
				return nil
			})
			took := time.Since(begun)
			within(t, "out after", took, w.cfg.DrainTimeout+time.Second)
			if took < w.cfg.DrainTimeout {
				t.Errorf("out after %v", took)
			}
			w.want(t, "be", map[string]string{b.String(): "ready 100"})
			w.beat(t, c, 100) // takes a's slot
			w.want(t, "be", map[string]string{b.String(): "ready 100", c.String(): "ready 100"})
			for _, s := range ss {
				if err := s.alive(); (err == nil) != (mode.be.Slots > 0) {
					t.Errorf("at the end a session of a has %v", err)
				}
			}
		})
	}
}

// What a leaving server has been given, it answers, however long that takes
// within the drain's time.
func TestEndureRequestsInFlight(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, mode.backend, mode.options)
			w.cfg.DrainTimeout = time.Minute
			w.run(t, w.client(t))
			a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
			w.beat(t, a.Addr(), 100)
			w.want(t, "be", ready(100, a))
			w.answers(t, a)
			url := "http://" + w.ha.Addr("be")
			answers := make(chan error, 2)
			for _, post := range []bool{true, false} {
				kept := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{}}
				t.Cleanup(kept.CloseIdleConnections)
				if err := request(context.Background(), kept, url+"/", post); err != nil {
					t.Fatal(err)
				}
				go func() {
					err := request(context.Background(), kept, url+"/hold", post)
					if err == nil {
						err = request(context.Background(), kept, url+"/", post) // on the same connection
					}
					answers <- err
				}()
			}
			haproxytest.Poll(t, "both requests are under way", func() error {
				if n := a.Held(); n != 2 {
					return fmt.Errorf("%d are", n)
				}
				return nil
			})
			w.beat(t, b.Addr(), 100)
			w.want(t, "be", ready(100, a, b))
			haproxytest.Poll(t, "b serves", func() error {
				_, _, err := get(url + "/")
				if b.Served() == 0 {
					err = errors.Join(err, errors.New("not yet"))
				}
				return err
			})
			w.leave(t, a.Addr())
			both := ready(100, b)
			both[a.Addr().String()] = "drain 100"
			w.want(t, "be", both)
			w.answers(t, b)
			served := a.Served()
			if len(answers) != 0 || a.Held() != 2 {
				t.Errorf("%d of 2 requests are under way", a.Held())
			}
			w.want(t, "be", both)
			a.Release()
			for range 2 {
				if err := <-answers; err != nil {
					t.Error(err)
				}
			}
			if n := a.Served() - served; n != 2 {
				t.Errorf("a answered %d requests, want 2", n)
			}
			w.want(t, "be", ready(100, b))
		})
	}
}
