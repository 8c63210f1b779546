package main

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
)

// relay is a proxy in front of a Redis, or of a HAProxy's socket, and the place
// of network faults. Its methods may be called concurrently.
type relay struct {
	network string
	addr    string
	l       net.Listener

	running sync.WaitGroup

	mu      sync.Mutex
	target  string
	away    bool   // new connections are closed at once
	lossy   bool   // no message of a channel passes
	clips   bool   // an answer ends anywhere
	mark    []byte // of the next request to hold; nil = none
	arrived func() // is called with it; the request goes on when it returns
	pairs   map[*pair]bool
}

// pair is one client's connection and the one to the target.
type pair struct {
	client net.Conn
	gate   sync.RWMutex // held for writing while nothing passes
	hung   bool         // guarded by relay.mu

	mu     sync.Mutex
	server net.Conn // guarded by mu; nil while a request is held
	ended  bool     // guarded by mu
}

var relays atomic.Uint32

func newRelay(p *play, target string) *relay {
	n, pid := relays.Add(1), os.Getpid()
	return relayOn(p, "tcp", fmt.Sprintf("127.%d.%d.%d:0", 150+pid>>8&63, pid&255, n%250+1), target)
}

func relayOn(p *play, network, addr, target string) *relay {
	l, err := net.Listen(network, addr)
	if err != nil {
		p.Fatal(err)
	}
	r := &relay{network: network, addr: l.Addr().String(), l: l, target: target, pairs: map[*pair]bool{}}
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
	server, err := net.Dial(r.network, target)
	if err != nil {
		_ = client.Close()
		return
	}
	c := &pair{client: client, server: server}
	r.mu.Lock()
	r.pairs[c] = true
	r.mu.Unlock()
	var answering sync.WaitGroup
	answering.Go(func() { r.answers(c, server) })
	buf := make([]byte, 32<<10)
	for {
		n, err := client.Read(buf)
		if arrived := r.holds(buf[:n]); arrived != nil {
			// Whatever becomes of the server meanwhile, the request reaches the
			// one that is there then, as over a pool's next connection.
			c.attach(nil)
			_ = server.Close()
			arrived()
			if another, derr := net.Dial(r.network, target); derr == nil {
				server = another
				c.attach(server)
				answering.Go(func() { r.answers(c, another) })
			}
		}
		c.gate.RLock()
		_, werr := server.Write(buf[:n])
		c.gate.RUnlock()
		if err != nil || werr != nil {
			break
		}
	}
	c.end()
	answering.Wait()
	r.mu.Lock()
	delete(r.pairs, c)
	r.mu.Unlock()
}

// answers copies what a server says, and ends the pair when it ends.
func (r *relay) answers(c *pair, server net.Conn) {
	defer c.endOf(server)
	buf := make([]byte, 32<<10)
	for {
		n, err := server.Read(buf)
		if n > 0 && r.loses(buf[:n]) {
			continue
		}
		if r.clipping() {
			n, err = rand.N(n+1), io.EOF
		}
		c.gate.RLock()
		_, werr := c.client.Write(buf[:n])
		c.gate.RUnlock()
		if err != nil || werr != nil {
			return
		}
	}
}

// attach makes server the pair's, unless the pair has ended.
func (c *pair) attach(server net.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.server = server
	if c.ended && server != nil {
		_ = server.Close()
	}
}

// end closes both connections.
func (c *pair) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	_ = c.client.Close()
	if c.server != nil {
		_ = c.server.Close()
	}
}

// endOf ends the pair if its server is still this one.
func (c *pair) endOf(server net.Conn) {
	c.mu.Lock()
	current := c.server == server
	c.mu.Unlock()
	if current {
		c.end()
	}
}

// hold stops the next request that contains mark, and calls arrived, after
// which the request goes on.
func (r *relay) hold(mark string, arrived func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mark, r.arrived = []byte(mark), arrived
}

func (r *relay) holds(request []byte) func() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mark == nil || !bytes.Contains(request, r.mark) {
		return nil
	}
	r.mark = nil
	return r.arrived
}

// lose has every message of a channel be lost from now on; the subscription
// itself lives.
func (r *relay) lose() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lossy = true
}

// clip has every answer end after any number of bytes, or pass whole again.
func (r *relay) clip(clips bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.clips = clips
}

func (r *relay) clipping() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.clips
}

func (r *relay) loses(answer []byte) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.lossy && bytes.Contains(answer, []byte("\r\nmessage\r\n"))
}

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
