package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"rollcall/lbsync/haproxy/haproxytest"
)

// process is one running rollcall.
type process struct {
	args []string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended

	monitor string // where its metrics are; empty = nowhere

	mu  sync.Mutex
	out bytes.Buffer
}

func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.Write(b)
}

// said returns the log so far, a map a line.
func (p *process) said() []map[string]any {
	p.mu.Lock()
	text := p.out.String()
	p.mu.Unlock()
	var lines []map[string]any
	for line := range strings.Lines(text) {
		var m map[string]any
		if json.Unmarshal([]byte(line), &m) == nil {
			lines = append(lines, m)
		}
	}
	return lines
}

func (p *process) signal(sig syscall.Signal) { _ = p.cmd.Process.Signal(sig) } // it may have ended

// end sends sig and waits.
func (p *process) end(w *world, sig syscall.Signal) {
	p.signal(sig)
	select {
	case <-p.done:
	case <-time.After(20 * time.Second): // a sidecar tries to leave for 10 s while Redis is away
		w.Errorf("rollcall %s does not end on %v", strings.Join(p.args, " "), sig)
	}
}

// cast is one registry's players: rollcall's, or a mutant's in a namespace of
// its own on the same Redis.
type cast struct {
	w         *world
	namespace string
	binary    string

	// The ways to Redis: half of the sidecars each, reapers, lbsync.
	even, odd, toReap, toSync *relay

	follow bool // its sidecars beat at the registry's interval

	ha      *haproxytest.HAProxy
	config  string // checksum of its configuration
	lbsync  *process
	syncing []string // its arguments
	members []*member

	mu      sync.Mutex
	spawned []*process // all that ever ran
	reapers []*process
	seen    sighting

	late bool // of a mutant: it was not right when rollcall was
}

// ways are all ways to Redis.
func (c *cast) ways() []*relay { return []*relay{c.even, c.odd, c.toReap, c.toSync} }

// member is an instance and its sidecar.
type member struct {
	addr    netip.AddrPort
	app     *haproxytest.Instance
	way     *relay
	sidecar *process
	check   bool // its sidecar asks its app
	dead    bool // guarded by cast.mu: it was made so, and must go
	lonely  bool // guarded by cast.mu: it cannot beat, so the registry may drop it
	free    bool // guarded by cast.mu: it comes and goes, or a human has it: no loss
	// known is when the register must know that it is dead; guarded by cast.mu.
	known time.Time
}

func (c *cast) spawn(way *relay, args ...string) *process {
	p := &process{args: args, cmd: exec.Command(c.binary, args...), done: make(chan struct{})}
	url := way.url()
	if c.w.url != "" {
		url = c.w.url
	}
	p.cmd.Env = append(p.cmd.Environ(), "ROLLCALL_REDIS="+url, "ROLLCALL_NAMESPACE="+c.namespace, "ROLLCALL_LOG_FORMAT=json", "RUNTIME_DIRECTORY="+c.w.srv.Dir)
	if c.w.monitored || args[0] == "reap" {
		p.monitor = monitorAddr()
		p.cmd.Env = append(p.cmd.Env, "ROLLCALL_HTTP="+p.monitor)
	}
	p.cmd.Stdout, p.cmd.Stderr = p, p
	if c.w.piped {
		c.w.logTo(p)
	}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		c.w.Fatal(err)
	}
	c.mu.Lock()
	c.spawned = append(c.spawned, p)
	c.mu.Unlock()
	go func() {
		defer close(p.done)
		_ = p.cmd.Wait() // how it ended is in its log
	}()
	c.w.Cleanup(func() { p.end(c.w, syscall.SIGKILL) })
	return p
}

// reap starts one more reaper.
func (c *cast) reap() *process { return c.reapAt(c.w.ttl, c.w.beat) }

func (c *cast) reapAt(ttl, beat time.Duration, more ...string) *process {
	args := []string{"reap", "--ttl", ttl.String(), "--heartbeat", beat.String(), "--interval", c.w.scaled(10 * time.Second).String()}
	p := c.spawn(c.toReap, append(args, more...)...)
	c.mu.Lock()
	c.reapers = append(c.reapers, p)
	c.mu.Unlock()
	return p
}

// join starts an instance and its sidecar.
func (c *cast) join() *member {
	m := c.enroll()
	c.beat(m)
	return m
}

// enroll starts an instance without a sidecar.
func (c *cast) enroll() *member {
	n := len(c.members)
	m := &member{way: c.even, app: haproxytest.NewInstance(c.w)}
	m.addr = m.app.Addr()
	if n%2 == 1 {
		m.way = c.odd
	}
	c.mu.Lock()
	c.members = append(c.members, m)
	c.mu.Unlock()
	return m
}

// beat starts a sidecar for m.
func (c *cast) beat(m *member) {
	args := []string{"register", "--service", "web", "--addr", m.addr.String()}
	if !c.follow {
		args = append(args, "--interval", c.w.beat.String())
	}
	if m.check {
		args = append(args, "--check", "http://"+m.addr.String()+"/healthz", "--check-interval", (c.w.beat / 5).String())
	}
	m.sidecar = c.spawn(m.way, args...)
}

// leave has m leave in order. Its app goes on.
func (c *cast) leave(m *member) {
	c.mark(m, func(m *member) { m.dead = true })
	m.sidecar.end(c.w, syscall.SIGTERM)
}

// mark changes what counts of m.
func (c *cast) mark(m *member, change func(*member)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(m)
}

// counted has m, which was free, count from the next look on.
func (c *cast) counted(m *member) {
	c.mu.Lock()
	defer c.mu.Unlock()
	m.free = false
	c.seen.admitted = maps.Clone(c.seen.admitted) // it is being read
	delete(c.seen.admitted, m.addr.String())
}

// forget forgets what was seen.
func (c *cast) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seen.known, c.seen.rotation = false, nil
}

// die has the app fail its check and kills the sidecar. Nobody is told.
func (c *cast) die(m *member) {
	c.mark(m, func(m *member) { m.dead, m.known = true, time.Now().Add(c.w.ttl+time.Second) })
	m.app.SetHealthy(false)
	m.sidecar.end(c.w, syscall.SIGKILL)
}

// balance starts lbsync, again if there was one.
func (c *cast) balance() { c.lbsync = c.spawn(c.toSync, c.syncing...) }

// living returns the addresses of who is not dead, sorted.
func (c *cast) living() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []string
	for _, m := range c.members {
		if !m.dead {
			out = append(out, m.addr.String())
		}
	}
	slices.Sort(out)
	return out
}

// innocent tells whether addr is of somebody alive who could beat.
func (c *cast) innocent(addr string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range c.members {
		if m.addr.String() == addr {
			return !m.dead && !m.lonely && !m.free
		}
	}
	return false
}

// claimed tells whether addr is of somebody alive, or of somebody dead, whom it
// is a loss to take out or to take in: who cannot reach Redis still serves.
func (c *cast) claimed(addr string) (alive, dead bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range c.members {
		if m.addr.String() == addr && !m.free {
			return !m.dead, m.dead && time.Now().After(m.known)
		}
	}
	return false, false
}

const tookOut = "took out who stopped answering"

// taken returns what the reapers say they took out, each address as often as
// they do.
func (c *cast) taken() []string {
	c.mu.Lock()
	reapers := slices.Clone(c.reapers)
	c.mu.Unlock()
	var out []string
	for _, p := range reapers {
		for _, l := range p.said() {
			if l["message"] != tookOut {
				continue
			}
			addrs, _ := l["addrs"].([]any)
			for _, a := range addrs {
				out = append(out, fmt.Sprint(a))
			}
		}
	}
	return out
}

// armed tells whether every reaper that runs says so: by its metrics, since its log
// says less the more there is to say.
func (c *cast) armed() bool {
	c.mu.Lock()
	reapers := slices.Clone(c.reapers)
	c.mu.Unlock()
	for _, p := range reapers {
		select {
		case <-p.done:
			continue
		default:
		}
		if m, err := scrape(p.monitor, lookTimeout); err != nil || m["rollcall_reaper_armed"] != 1 {
			return false
		}
	}
	return true
}
