package main

import (
	"bytes"
	"encoding/json"
	"fmt"
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
	case <-time.After(10 * time.Second):
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

	ha      *haproxytest.HAProxy // nil if the cast has none
	lbsync  *process
	syncing []string // its arguments
	members []*member

	mu      sync.Mutex
	reapers []*process
	seen    sighting
}

// member is an instance and its sidecar.
type member struct {
	addr    netip.AddrPort
	app     *haproxytest.Instance // nil in a cast without a HAProxy
	way     *relay
	sidecar *process
	dead    bool // guarded by cast.mu: it was made so, and must go
	lonely  bool // guarded by cast.mu: it cannot beat, so the registry may drop it
}

func (c *cast) spawn(way *relay, args ...string) *process {
	p := &process{args: args, cmd: exec.Command(c.binary, args...), done: make(chan struct{})}
	p.cmd.Env = append(p.cmd.Environ(), "ROLLCALL_REDIS="+way.url(), "ROLLCALL_NAMESPACE="+c.namespace, "ROLLCALL_LOG_FORMAT=json")
	if c.w.monitored {
		p.monitor = monitorAddr()
		p.cmd.Env = append(p.cmd.Env, "ROLLCALL_HTTP="+p.monitor)
	}
	p.cmd.Stdout, p.cmd.Stderr = p, p
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		c.w.Fatal(err)
	}
	go func() {
		defer close(p.done)
		_ = p.cmd.Wait() // how it ended is in its log
	}()
	c.w.Cleanup(func() { p.end(c.w, syscall.SIGKILL) })
	return p
}

// reap starts one more reaper.
func (c *cast) reap() *process {
	p := c.spawn(c.toReap, "reap", "--ttl", c.w.ttl.String(), "--heartbeat", c.w.beat.String(), "--interval", c.w.scaled(10*time.Second).String())
	c.mu.Lock()
	c.reapers = append(c.reapers, p)
	c.mu.Unlock()
	return p
}

// join starts an instance and its sidecar.
func (c *cast) join() *member {
	n := len(c.members)
	m := &member{way: c.even, addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}), 80)}
	if n%2 == 1 {
		m.way = c.odd
	}
	if c.ha != nil {
		m.app = haproxytest.NewInstance(c.w)
		m.addr = m.app.Addr()
	}
	c.beat(m)
	c.mu.Lock()
	c.members = append(c.members, m)
	c.mu.Unlock()
	return m
}

// beat starts a sidecar for m.
func (c *cast) beat(m *member) {
	m.sidecar = c.spawn(m.way, "register", "--service", "web", "--addr", m.addr.String(), "--interval", c.w.beat.String())
}

// die has the app fail its check and kills the sidecar. Nobody is told.
func (c *cast) die(m *member) {
	c.mu.Lock()
	m.dead = true
	c.mu.Unlock()
	if m.app != nil {
		m.app.SetHealthy(false)
	}
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
			return !m.dead && !m.lonely
		}
	}
	return false
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

// armed tells whether every reaper that runs says so.
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
		armed := false
		for _, l := range p.said() {
			if m, _ := l["message"].(string); m == "armed" || strings.HasPrefix(m, "not armed") {
				armed = m == "armed"
			}
		}
		if !armed {
			return false
		}
	}
	return true
}
