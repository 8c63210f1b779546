package main

import (
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
)

// relay is a TCP proxy in front of a Redis, and the place of network faults. Its
// methods may be called concurrently.
type relay struct {
	addr string
	l    net.Listener

	running sync.WaitGroup

	mu     sync.Mutex
	target string
	away   bool // new connections are closed at once
	pairs  map[*pair]bool
}

// pair is one client's connection and the one to the target.
type pair struct {
	client, server net.Conn
	gate           sync.RWMutex // held for writing while nothing passes
	hung           bool         // guarded by relay.mu
}

var relays atomic.Uint32

func newRelay(p *play, target string) *relay {
	n, pid := relays.Add(1), os.Getpid()
	l, err := net.Listen("tcp", fmt.Sprintf("127.%d.%d.%d:0", 150+pid>>8&63, pid&255, n%250+1))
	if err != nil {
		p.Fatal(err)
	}
	r := &relay{addr: l.Addr().String(), l: l, target: target, pairs: map[*pair]bool{}}
	r.running.Go(r.accept)
	p.Cleanup(func() { r.close() })
	return r
}

func (r *relay) url() string { return "redis://" + r.addr + "/0" }

func (r *relay) accept() {
	for {
		client, err := r.l.Accept()
		if err != nil {
			return // closed
		}
		r.mu.Lock()
		target, away := r.target, r.away
		r.mu.Unlock()
		if away {
			_ = client.Close()
			continue
		}
		r.running.Go(func() { r.serve(client, target) })
	}
}

func (r *relay) serve(client net.Conn, target string) {
	server, err := net.Dial("tcp", target)
	if err != nil {
		_ = client.Close()
		return
	}
	c := &pair{client: client, server: server}
	r.mu.Lock()
	r.pairs[c] = true
	r.mu.Unlock()
	var copying sync.WaitGroup
	copying.Go(func() { c.copy(server, client) })
	copying.Go(func() { c.copy(client, server) })
	copying.Wait()
	r.mu.Lock()
	delete(r.pairs, c)
	r.mu.Unlock()
}

// copy ends both connections when one ends.
func (c *pair) copy(to, from net.Conn) {
	defer c.end()
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		c.gate.RLock()
		_, werr := to.Write(buf[:n])
		c.gate.RUnlock()
		if err != nil || werr != nil {
			return
		}
	}
}

func (c *pair) end() { _, _ = c.client.Close(), c.server.Close() }

// hang has every connection that is open now pass nothing any more, without a
// word to either side; new ones work.
func (r *relay) hang() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range r.pairs {
		if !c.hung {
			c.hung = true
			c.gate.Lock()
		}
	}
}

// cut closes every connection, and refuses new ones until join.
func (r *relay) cut() { r.set(true); r.drop() }

// join ends cut.
func (r *relay) join() { r.set(false) }

func (r *relay) set(away bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.away = away
}

// drop closes every connection.
func (r *relay) drop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range r.pairs {
		if c.hung {
			c.hung = false
			c.gate.Unlock()
		}
		c.end()
	}
}

// move has new connections go to another server, and closes the others.
func (r *relay) move(target string) {
	r.mu.Lock()
	r.target = target
	r.mu.Unlock()
	r.drop()
}

func (r *relay) close() {
	_ = r.l.Close()
	r.drop()
	r.running.Wait()
}
