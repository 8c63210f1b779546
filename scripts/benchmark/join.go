package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"rollcall/lbsync"
	"rollcall/lbsync/haproxy"
	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// changeTimeout bounds one change, so that a lost one ends the program.
const changeTimeout = 10 * time.Second

// join measures from the call of a new instance's first beat to the answer of
// HAProxy to the command that puts it into rotation, without health checks. The
// floor does the same by hand: one pipeline of ZADD, INCR and PUBLISH, one
// message, one read, one runtime command line that HAProxy answers.
func join(h *harness) []Row {
	var rows []Row
	for _, mode := range []lbsync.Mode{lbsync.Slots, lbsync.Dynamic} {
		sizes := []int{10, 1000}
		// Sizes take turns within a run, so that a slow spell of the machine
		// meets both.
		lab := map[int]*joinLab{}
		results := map[int][]run{}
		for _, n := range sizes {
			lab[n] = newJoinLab(h, mode, n)
		}
		for range h.runs {
			for _, n := range sizes {
				var r run
				for range h.changes {
					r.floor = append(r.floor, lab[n].floor())
					r.figure = append(r.figure, lab[n].join())
				}
				results[n] = append(results[n], r)
			}
		}
		for _, n := range sizes {
			rows = append(rows, row(fmt.Sprintf("join/%s/%d", mode, n), "first beat → HAProxy routes, against a bare hop + read + command", 3, results[n]))
		}
		flat := make([]run, h.runs)
		for i := range flat {
			flat[i] = run{figure: results[1000][i].figure, floor: results[10][i].figure}
		}
		rows = append(rows, row(fmt.Sprintf("join/%s/flat", mode), "one change among 1,000 servers, against one among 10", 2, flat))
		for _, n := range sizes {
			lab[n].stop()
		}
	}
	return rows
}

// joinLab is one Redis and one HAProxy with a backend of some servers for
// rollcall, and a backend of as many for the floor.
type joinLab struct {
	h     *harness
	mode  lbsync.Mode
	store *registrar.Store
	rdb   *redis.Client
	ha    *haproxytest.HAProxy
	stop  func()

	applied chan netip.AddrPort // by rollcall's lbsync
	heard   chan string         // by the floor's subscriber
	next    uint32
}

// observer tells which address the last command of an Apply put into rotation.
type observer struct {
	lbsync.Balancer
	applied chan<- netip.AddrPort
	on      *atomic.Bool
}

func (o observer) Apply(ctx context.Context, backend string, ops []lbsync.Op) (lbsync.Applied, error) {
	got, err := o.Balancer.Apply(ctx, backend, ops)
	if err == nil && o.on.Load() {
		for _, s := range got.Servers {
			if s.Admin == lbsync.Ready && s.Weight > 0 {
				o.applied <- s.Addr
			}
		}
	}
	return got, err
}

func newJoinLab(h *harness, mode lbsync.Mode, size int) *joinLab {
	l := &joinLab{h: h, mode: mode, applied: make(chan netip.AddrPort, 16), heard: make(chan string, 16)}
	srv := redistest.Start(h)
	l.rdb = srv.Client(h)
	be := haproxytest.Backend{Name: "be", Balance: "leastconn"}
	by := haproxytest.Backend{Name: "floor", Balance: "leastconn"}
	if mode == lbsync.Slots {
		be.Slots, by.Slots = size+10, size+10
	}
	l.ha = haproxytest.Start(h, haproxytest.Options{Backends: []haproxytest.Backend{be, by}})
	client, err := haproxy.New(haproxy.Config{Socket: l.ha.Socket}, h.log)
	if err != nil {
		h.Fatal(err)
	}
	rdb, err := registrar.Open(srv.URL(), 4)
	if err != nil {
		h.Fatal(err)
	}
	if l.store, err = registrar.NewStore(rdb, registrar.DefaultNamespace); err != nil {
		h.Fatal(err)
	}
	var on atomic.Bool
	s, err := lbsync.New(lbsync.Config{
		ID:       "bench",
		Backends: []lbsync.BackendConfig{{Service: "web", Backend: "be", Mode: mode}},
		Allow:    []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}, Quarantine: time.Millisecond,
	}, observer{client, l.applied, &on}, l.store, h.log)
	if err != nil {
		h.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	listening := make(chan struct{})
	go l.listen(ctx, listening)
	l.stop = func() {
		cancel()
		if err := <-done; err != nil {
			h.Error(err)
		}
		<-listening
		if err := errors.Join(client.Close(context.Background()), rdb.Close()); err != nil {
			h.Error(err)
		}
	}

	var fill []string
	for i := range size {
		a := l.addr()
		l.beat(a)
		if mode == lbsync.Slots {
			fill = append(fill, fmt.Sprintf("set server floor/s%d addr %s port %d;set server floor/s%d state ready", i+1, a.Addr(), a.Port(), i+1))
		} else {
			fill = append(fill, fmt.Sprintf("add server floor/f%d %s;set server floor/f%d state ready", i, a, i))
		}
	}
	for len(fill) > 0 {
		n := min(25, len(fill))
		l.runtime(strings.Join(fill[:n], ";"))
		fill = fill[n:]
	}
	for _, b := range []string{"be", "floor"} {
		haproxytest.Poll(h, b+" is full", func() error {
			serving := 0
			for _, line := range strings.Split(l.ha.Command(h, "show servers state "+b), "\n") {
				if f := strings.Fields(line); len(f) > 18 && (f[6] == "0" || f[6] == "4") && f[7] != "0" {
					serving++
				}
			}
			if serving != size {
				return fmt.Errorf("%d of %d serve", serving, size)
			}
			return nil
		})
	}
	on.Store(true)
	return l
}

// addr returns an address that no instance had before.
func (l *joinLab) addr() netip.AddrPort {
	l.next++
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 150, byte(l.next >> 8), byte(l.next)}), 9)
}

func (l *joinLab) beat(a netip.AddrPort) (token string) {
	token = rand.Text()
	ctx, cancel := context.WithTimeout(context.Background(), changeTimeout)
	defer cancel()
	_, err := l.store.Beat(ctx, "web", registrar.Beat{
		Addr: a, Token: token, Meta: fmt.Sprintf(`{"id":%q,"weight":100,"registered":1763893622123}`, token), Claim: true,
	})
	if err != nil {
		l.h.Fatal(err)
	}
	return token
}

// join is one change by rollcall; the instance leaves again, untimed.
func (l *joinLab) join() time.Duration {
	a := l.addr()
	begun := time.Now()
	token := l.beat(a)
	for got := (netip.AddrPort{}); got != a; {
		got = receive(l.h, l.applied)
	}
	took := time.Since(begun)
	ctx, cancel := context.WithTimeout(context.Background(), changeTimeout)
	defer cancel()
	if _, err := l.store.Leave(ctx, "web", a, token, registrar.Left); err != nil {
		l.h.Fatal(err)
	}
	haproxytest.Poll(l.h, "it has left", func() error {
		for _, line := range strings.Split(l.ha.Command(l.h, "show servers state be"), "\n") {
			if f := strings.Fields(line); len(f) > 18 && f[4] == a.Addr().String() && (f[7] != "0" || l.mode == lbsync.Dynamic) {
				return errors.New(line)
			}
		}
		return nil
	})
	return took
}

// floor is one change by hand.
func (l *joinLab) floor() time.Duration {
	a := l.addr()
	command := fmt.Sprintf("add server floor/x %s;set server floor/x state ready", a)
	undo := []string{"set server floor/x state maint", "del server floor/x"}
	if l.mode == lbsync.Slots {
		// The last slot is free in the floor's backend.
		n := strings.Count(l.ha.Command(l.h, "show servers state floor"), lbsync.SlotHost)
		command = fmt.Sprintf("set server floor/s%d addr %s port %d;set server floor/s%d state ready", n, a.Addr(), a.Port(), n)
		undo = []string{fmt.Sprintf("set server floor/s%d state maint", n)}
	}
	ctx, cancel := context.WithTimeout(context.Background(), changeTimeout)
	defer cancel()
	begun := time.Now()
	if _, err := l.rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
		p.ZAdd(ctx, "floor:instances", redis.Z{Score: float64(begun.UnixMilli()), Member: a.String()})
		p.Incr(ctx, "floor:version")
		p.Publish(ctx, "floor:changes", a.String())
		return nil
	}); err != nil {
		l.h.Fatal(err)
	}
	heard := receive(l.h, l.heard)
	if err := l.rdb.ZScore(ctx, "floor:instances", heard).Err(); err != nil {
		l.h.Fatal(err)
	}
	l.runtime(command)
	took := time.Since(begun)
	for _, u := range undo {
		l.runtime(u)
	}
	return took
}

// listen is the floor's subscriber.
func (l *joinLab) listen(ctx context.Context, done chan<- struct{}) {
	defer close(done)
	ps := l.rdb.Subscribe(ctx, "floor:changes")
	stop := context.AfterFunc(ctx, func() { _ = ps.Close() })
	defer stop()
	for {
		m, err := ps.ReceiveMessage(ctx)
		if err != nil {
			return
		}
		l.heard <- m.Payload
	}
}

// runtime sends one line on a connection of its own and reads the answer.
func (l *joinLab) runtime(line string) {
	c, err := net.DialTimeout("unix", l.ha.Socket, changeTimeout)
	if err != nil {
		l.h.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(changeTimeout)); err != nil {
		l.h.Fatal(err)
	}
	if _, err := fmt.Fprintln(c, line); err != nil {
		l.h.Fatal(err)
	}
	for r := bufio.NewReader(c); err == nil; {
		_, err = r.ReadString('\n')
	}
}

func receive[T any](h *harness, c <-chan T) T {
	select {
	case v := <-c:
		return v
	case <-time.After(changeTimeout):
		h.Fatalf("a change was lost: nothing came within %v", changeTimeout)
		panic("unreachable")
	}
}
