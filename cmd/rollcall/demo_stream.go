//go:build !sidecar

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"
)

const (
	demoWorkers     = 4
	demoPace        = 20 * time.Millisecond // between two requests of one worker: 200/s in all
	requestTimeout  = 3 * time.Second
	cutMargin       = 50 * time.Millisecond // for HAProxy to learn that a process is dead
	demoAnswerLimit = 1024                  // bytes
)

// demoCounts are requests and what became of those without a good answer.
type demoCounts struct {
	Requests int `json:"requests"`
	// Failed counts the failures that should not be.
	Failed int `json:"failed"`
	// Cut counts POSTs that were under way to a service when it was killed.
	// Nobody may send them again: they may have been carried out.
	Cut int `json:"cut"`
	// Gap counts the failures while no HAProxy ran.
	Gap int `json:"gap"`
}

func (c *demoCounts) add(d demoCounts) {
	c.Requests += d.Requests
	c.Failed += d.Failed
	c.Cut += d.Cut
	c.Gap += d.Gap
}

// demoTimes are those in which a failure is nobody's fault.
type demoTimes struct {
	cutFrom time.Time // a service was killed; zero before
	cutTo   time.Time // its end; zero while it is not known
	gapFrom time.Time // HAProxy was killed; zero before
	gapDead time.Time // its end; zero while it is not known
	gapTo   time.Time // the first good answer after it; zero while there is none
}

// demoStream sends requests through HAProxy and counts them. Its methods may be
// called concurrently.
type demoStream struct {
	addr string

	mu     sync.Mutex // guards what follows
	served map[netip.AddrPort]int
	names  map[netip.AddrPort]string // what they call themselves
	total  demoCounts
	step   demoCounts
	first  error // the first failure that counts as Failed in this step
	demoTimes
}

func newDemoStream(addr string) *demoStream {
	return &demoStream{addr: addr, served: map[netip.AddrPort]int{}, names: map[netip.AddrPort]string{}}
}

// run sends requests until ctx ends.
func (s *demoStream) run(ctx context.Context) {
	var workers sync.WaitGroup
	for n := range demoWorkers {
		workers.Go(func() { s.work(ctx, n) })
	}
	workers.Wait()
}

// work is worker n. The workers take turns, GET and POST.
func (s *demoStream) work(ctx context.Context, n int) {
	select {
	case <-ctx.Done():
		return
	case <-time.After(time.Duration(n) * demoPace / demoWorkers):
	}
	w := &demoWire{addr: s.addr}
	defer w.close()
	tick := time.NewTicker(demoPace)
	defer tick.Stop()
	methods := []string{http.MethodGet, http.MethodPost}
	for ; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		method, began := methods[n%2], time.Now()
		who, err := w.ask(ctx, method)
		if ctx.Err() != nil {
			return // it may have been cut by the end of the demo
		}
		s.count(method, who, err, began, time.Now())
	}
}

// count enters what came of one request.
func (s *demoStream) count(method string, who demoAnswer, err error, began, ended time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	one := demoCounts{Requests: 1}
	switch {
	case err == nil:
		s.served[who.addr]++
		s.names[who.addr] = who.name
		if !s.gapDead.IsZero() && s.gapTo.IsZero() && began.After(s.gapDead) {
			s.gapTo = ended
		}
	case within(began, ended, s.gapFrom, s.gapTo):
		one.Gap = 1
	case method == http.MethodPost && within(began, ended, s.cutFrom, s.cutTo):
		one.Cut = 1
	default:
		one.Failed = 1
		if s.first == nil {
			s.first = fmt.Errorf("%s: %w", method, err)
		}
	}
	s.total.add(one)
	s.step.add(one)
}

// within tells whether a request was under way at some time between from and
// to. Without from there is no such time, and without to it lasts.
func within(began, ended, from, to time.Time) bool {
	return !from.IsZero() && ended.After(from) && (to.IsZero() || began.Before(to))
}

// cut kills a service: do returns when it has ended. It returns when it began.
func (s *demoStream) cut(do func()) time.Time {
	s.mu.Lock()
	s.cutFrom, s.cutTo = time.Now(), time.Time{}
	from := s.cutFrom
	s.mu.Unlock()
	do()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cutTo = time.Now().Add(cutMargin)
	return from
}

// gap kills HAProxy: do returns when it has ended. The gap lasts until the
// first good answer afterwards. It returns when it began.
func (s *demoStream) gap(do func()) time.Time {
	s.mu.Lock()
	s.gapFrom, s.gapDead, s.gapTo = time.Now(), time.Time{}, time.Time{}
	from := s.gapFrom
	s.mu.Unlock()
	do()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gapDead = time.Now()
	return from
}

// gapLength returns how long the gap was, or ok false while it lasts or if
// there was none.
func (s *demoStream) gapLength() (length time.Duration, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.gapTo.Sub(s.gapFrom), !s.gapTo.IsZero()
}

// next begins the count of a step.
func (s *demoStream) next() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.step, s.first = demoCounts{}, nil
}

// counts returns the numbers of this step and of all, and this step's first
// failure.
func (s *demoStream) counts() (step, total demoCounts, first error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.step, s.total, s.first
}

// answers returns how many good answers each instance has given.
func (s *demoStream) answers() map[netip.AddrPort]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.served)
}

// name returns what the service at addr calls itself, or nothing if it has not
// answered.
func (s *demoStream) name(addr netip.AddrPort) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.names[addr]
}

// demoAnswer is who answered a request.
type demoAnswer struct {
	name string
	addr netip.AddrPort
}

// demoWire is one client's keep-alive connection. Go's own client would send a
// request again, in silence, if its connection turned out to be closed; here
// every failure is one that is counted.
type demoWire struct {
	addr string
	conn net.Conn
	r    *bufio.Reader
}

func (w *demoWire) close() {
	if w.conn != nil {
		_ = w.conn.Close() // it has been used for the last time
	}
	w.conn = nil
}

// ask sends one request and returns who answered.
func (w *demoWire) ask(ctx context.Context, method string) (who demoAnswer, err error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	if w.conn == nil {
		var d net.Dialer
		if w.conn, err = d.DialContext(ctx, "tcp", w.addr); err != nil {
			w.conn = nil
			return who, err
		}
		w.r = bufio.NewReader(w.conn)
	}
	deadline, _ := ctx.Deadline()
	if err := w.conn.SetDeadline(deadline); err != nil {
		return who, err
	}
	// A wait for an answer must not outlive the demo.
	conn := w.conn
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	var body io.Reader
	if method == http.MethodPost {
		body = strings.NewReader("order=1")
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+w.addr+"/", body)
	if err != nil {
		return who, err
	}
	if err := req.Write(w.conn); err != nil {
		return who, err
	}
	resp, err := http.ReadResponse(w.r, req)
	if err != nil {
		return who, err
	}
	text, err := io.ReadAll(io.LimitReader(resp.Body, demoAnswerLimit))
	if err = errors.Join(err, resp.Body.Close()); err != nil {
		return who, err
	}
	if resp.StatusCode != http.StatusOK {
		return who, fmt.Errorf("status %d", resp.StatusCode)
	}
	if resp.Close {
		w.close()
	}
	name, addr, _ := strings.Cut(strings.TrimSpace(string(text)), " ")
	if who.addr, err = netip.ParseAddrPort(addr); err != nil {
		return who, fmt.Errorf("answer %q: %w", text, err)
	}
	who.name = plain(name)
	return who, nil
}
