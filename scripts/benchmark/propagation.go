package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
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

const (
	// changeTimeout bounds one change, so that a lost one ends the program.
	changeTimeout = 10 * time.Second
	loadTimeout   = 2 * time.Minute
	// others is how many services change, each ten times a second, in the busy
	// rows.
	others = 100
	// warmUp is the number of changes that are not measured: more than there are
	// spare slots, so that each has held an instance.
	warmUp = spare + 2
	spare  = 10
	// pause lies before each change, rollcall's and the floor's: changes that
	// come one by one find every process asleep.
	pause = 3 * time.Millisecond
)

// verb is one kind of change: join, weight and leave follow one another on one
// instance.
type verb struct {
	name, meaning string
}

var verbs = []verb{
	{"join", "first beat → HAProxy routes"},
	{"weight", "an operator's weight → HAProxy has it"},
	{"leave", "leave → HAProxy sends no new request"},
}

// propagation measures from the call that changes the register to the answer of
// HAProxy to the command that brings it about. The floor does the same by hand:
// one pipeline of a write, INCR and PUBLISH, one message, one read, one runtime
// command line that HAProxy answers. The rows that end with "hand" have another
// floor: by hand too, but with rollcall's own scripts and commands. What they say is
// rollcall's own work; the rest is the price of what the scripts and commands promise.
//
// With checks the end is the same: the command's answer. HAProxy itself sends a
// newcomer requests only after its first check.
func propagation(h *harness) []Row {
	var rows []Row
	for _, checks := range []bool{false, true} {
		for _, mode := range []lbsync.Mode{lbsync.Slots, lbsync.Dynamic} {
			if checks && h.short {
				continue
			}
			rows = append(rows, propagate(h, mode, checks)...)
		}
	}
	return rows
}

func propagate(h *harness, mode lbsync.Mode, checks bool) []Row {
	sizes, loads := []int{10, 1000, 10000}, []bool{false, true}
	if checks {
		sizes[2] = 5000 // HAProxy keeps a file descriptor for each check
	}
	if h.short {
		sizes, loads = []int{10, 1000}, loads[:1]
	}
	type key struct {
		verb string
		size int
		busy bool
	}
	results := map[key][]run{}
	labs := map[int]*lab{}
	for _, n := range sizes {
		labs[n] = newLab(h, mode, checks, n)
	}
	// Sizes and loads take turns within a run, so that a slow spell of the
	// machine meets all of them.
	for range h.runs {
		for _, busy := range loads {
			for _, n := range sizes {
				quiet := func() {}
				if busy {
					quiet = labs[n].disturb()
				}
				part := map[string]*run{}
				for _, v := range verbs {
					part[v.name] = &run{}
				}
				for range h.changes {
					for v, took := range labs[n].floor(false) {
						part[v].floor = append(part[v].floor, took)
					}
					if !busy {
						for v, took := range labs[n].floor(true) {
							part[v].hand = append(part[v].hand, took)
						}
					}
					for v, took := range labs[n].change() {
						part[v].figure = append(part[v].figure, took)
					}
				}
				quiet()
				for v, r := range part {
					results[key{v, n, busy}] = append(results[key{v, n, busy}], *r)
				}
			}
		}
	}
	var rows []Row
	suffix := ""
	if checks {
		suffix = "/checks"
	}
	for _, v := range verbs {
		for _, busy := range loads {
			load := ""
			if busy {
				load = "/busy"
			}
			for _, n := range sizes {
				name, all := fmt.Sprintf("%s/%s%s/%d%s", v.name, mode, suffix, n, load), results[key{v.name, n, busy}]
				rows = append(rows, row(name, v.meaning, 1.5, all))
				if !busy {
					hand := make([]run, h.runs)
					for i, r := range all {
						hand[i] = run{figure: r.figure, floor: r.hand}
					}
					rows = append(rows, row(name+"/hand", "against the same scripts and commands by hand", 0, hand))
				}
			}
			for _, n := range sizes[1:] {
				flat := make([]run, h.runs)
				for i := range flat {
					flat[i] = run{figure: results[key{v.name, n, busy}][i].figure, floor: results[key{v.name, 10, busy}][i].figure}
				}
				rows = append(rows, row(fmt.Sprintf("%s/%s%s/flat %d%s", v.name, mode, suffix, n, load), "against the same among 10", 1.3, flat))
			}
		}
	}
	for _, n := range sizes {
		labs[n].stop()
	}
	return rows
}

// lab is one Redis and one HAProxy with a backend of some servers for rollcall,
// and a backend of as many for the floor.
type lab struct {
	h      *harness
	mode   lbsync.Mode
	checks bool
	size   int
	store  *registrar.Store
	hand   *registrar.Store // of another registry, for the floor
	token  registrar.Token  // that it has read
	rdb    *redis.Client
	ha     *haproxytest.HAProxy
	stop   func()
	// options of each server of the floor, as of rollcall's.
	options string

	applied chan answered // what rollcall's lbsync read back
	heard   chan string   // by the floor's subscriber
	next    uint32
}

// answered is a server as HAProxy's answer to an Apply has it, and when that came.
type answered struct {
	lbsync.Server
	at time.Time
}

// observer tells what every Apply read back.
type observer struct {
	lbsync.Balancer
	applied chan<- answered
	on      *atomic.Bool
}

func (o observer) Apply(ctx context.Context, backend string, ops []lbsync.Op) (lbsync.Applied, error) {
	got, err := o.Balancer.Apply(ctx, backend, ops)
	at := time.Now()
	if err == nil && o.on.Load() {
		for _, s := range got.Servers {
			o.applied <- answered{s, at}
		}
	}
	return got, err
}

func newLab(h *harness, mode lbsync.Mode, checks bool, size int) *lab {
	l := &lab{h: h, mode: mode, checks: checks, size: size, applied: make(chan answered, 1024), heard: make(chan string, 16)}
	srv := redistest.Start(h)
	l.rdb = srv.Client(h)
	be := haproxytest.Backend{Name: "be", Balance: "leastconn", Check: checks}
	if checks {
		// One address answers for all: what is measured is HAProxy, not the
		// instances.
		l.options = " check addr " + healthy(h) + " inter 60s"
		be.Extra = []string{"default-server" + strings.TrimPrefix(l.options, " check")}
	}
	if mode == lbsync.Slots {
		be.Slots = size + spare
	} else {
		be.Check = false // dynamic servers bring theirs
	}
	by := be
	by.Name = "floor"
	l.ha = haproxytest.Start(h, haproxytest.Options{Backends: []haproxytest.Backend{be, by}})
	cfg := haproxy.Config{Socket: l.ha.Socket}
	if mode == lbsync.Dynamic {
		cfg.ServerOptions = strings.TrimSpace(l.options)
	}
	client, err := haproxy.New(cfg, h.log)
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
	if l.hand, err = registrar.NewStore(l.rdb, "hand"); err != nil {
		h.Fatal(err)
	}
	var on atomic.Bool
	s, err := lbsync.New(lbsync.Config{
		ID:       "bench",
		Backends: []lbsync.BackendConfig{{Service: "web", Backend: "be", Mode: mode}},
		Allow:    []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}, Quarantine: time.Millisecond,
		Checks: client.Checks(),
	}, observer{client, l.applied, &on}, l.store, h.log)
	if err != nil {
		h.Fatal(err)
	}

	var fill []string
	for i := range size {
		a := l.addr()
		l.beat(l.store, a)
		server := fmt.Sprintf("floor/f%d", i)
		place := fmt.Sprintf("add server %s %s%s", server, a, l.options)
		if mode == lbsync.Slots {
			server = fmt.Sprintf("floor/s%d", i+1)
			place = fmt.Sprintf("set server %s addr %s port %d", server, a.Addr(), a.Port())
		}
		if checks {
			place += ";enable health " + server
		}
		fill = append(fill, place+";set server "+server+" state ready")
	}
	for chunk := range slices.Chunk(fill, 15) {
		l.runtime(strings.Join(chunk, ";"))
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
	for _, b := range []string{"be", "floor"} {
		h.await(loadTimeout, b+" is full", func() error {
			serving := 0
			for _, s := range l.servers(b) {
				switch {
				case s.ready && s.running && s.weight != "0":
					serving++
				case s.ready && s.weight != "0" && checks:
					l.runtime(fmt.Sprintf("set server %s/%s health up", b, s.name))
				}
			}
			if serving != size {
				return fmt.Errorf("%d of %d serve", serving, size)
			}
			return nil
		})
	}
	on.Store(true)
	for range warmUp {
		l.floor(false)
		l.floor(true)
		l.change()
	}
	return l
}

// healthy starts what every check asks, and returns its address as HAProxy's
// options name it.
func healthy(h *harness) string {
	ln, err := net.Listen("tcp", "127.151.0.1:0")
	if err != nil {
		h.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = srv.Serve(ln) // says that it was closed
	}()
	h.Cleanup(func() {
		_ = srv.Close() // as above
		<-ended
	})
	host, port, _ := net.SplitHostPort(ln.Addr().String())
	return host + " port " + port
}

// state is one server of `show servers state`.
type state struct {
	name, addr, weight string
	ready, running     bool
}

func (l *lab) servers(backend string) []state { return serversOf(l.h, l.ha, backend) }

func serversOf(h *harness, ha *haproxytest.HAProxy, backend string) []state {
	var all []state
	for _, line := range strings.Split(ha.Command(h, "show servers state "+backend), "\n") {
		if f := strings.Fields(line); len(f) > 18 && f[1] == backend {
			all = append(all, state{f[3], f[4], f[7], f[6] == "0" || f[6] == "4", f[5] == "2"})
		}
	}
	return all
}

// addr returns an address that no instance had before.
func (l *lab) addr() netip.AddrPort {
	l.next++
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 152 + byte(l.next>>16), byte(l.next >> 8), byte(l.next)}), 9)
}

func (l *lab) beat(store *registrar.Store, a netip.AddrPort) (token string) {
	token = rand.Text()
	ctx, cancel := context.WithTimeout(context.Background(), changeTimeout)
	defer cancel()
	_, err := store.Beat(ctx, "web", registrar.Beat{
		Addr: a, Token: token, Meta: fmt.Sprintf(`{"id":%q,"weight":100,"registered":1763893622123}`, token), Agent: "bench",
	})
	if err != nil {
		l.h.Fatal(err)
	}
	return token
}

// disturb changes other services until the function that it returns is called.
func (l *lab) disturb() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for n := 0; ; {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			for range others / 10 {
				n++
				svc := registrar.Service(fmt.Sprintf("other-%d", n%others))
				if _, err := l.store.Beat(ctx, svc, registrar.Beat{
					Addr: netip.MustParseAddrPort("127.150.0.1:9"), Token: "other", Meta: fmt.Sprintf(`{"id":"other","weight":%d}`, n%256),
				}); err != nil && ctx.Err() == nil {
					l.h.Fatal(err)
				}
			}
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

// change takes one instance through its life by rollcall.
func (l *lab) change() map[string]time.Duration {
	took := map[string]time.Duration{}
	a, token := l.addr(), ""
	ctx, cancel := context.WithTimeout(context.Background(), changeTimeout)
	defer cancel()
	took["join"] = l.until(a, func() { token = l.beat(l.store, a) }, func(s lbsync.Server) bool { return s.Admin == lbsync.Ready && s.Weight > 0 })
	l.up("be", a)
	weight := 10
	took["weight"] = l.until(a, func() {
		if _, _, err := l.store.SetAdmin(ctx, "web", a, registrar.Word{Verb: "weight", Weight: &weight}); err != nil {
			l.h.Fatal(err)
		}
	}, func(s lbsync.Server) bool { return s.Weight == weight })
	took["leave"] = l.until(a, func() {
		if _, err := l.store.Leave(ctx, "web", a, token, registrar.Left); err != nil {
			l.h.Fatal(err)
		}
	}, func(s lbsync.Server) bool { return s.Admin != lbsync.Ready })
	l.h.await(changeTimeout, "it is gone", func() error {
		for _, s := range l.servers("be") {
			if s.addr == a.Addr().String() && (s.weight != "0" || l.mode == lbsync.Dynamic) {
				return fmt.Errorf("%+v", s)
			}
		}
		return nil
	})
	return took
}

// up does not wait for the first check of a: that may take its whole interval.
func (l *lab) up(backend string, a netip.AddrPort) {
	if !l.checks {
		return
	}
	for _, s := range l.servers(backend) {
		if s.addr == a.Addr().String() && !s.running {
			l.runtime(fmt.Sprintf("set server %s/%s health up", backend, s.name))
		}
	}
}

// until measures how long it takes from do until HAProxy has been seen to have
// done so to a.
func (l *lab) until(a netip.AddrPort, do func(), so func(lbsync.Server) bool) time.Duration {
	for len(l.applied) > 0 {
		<-l.applied
	}
	time.Sleep(pause)
	begun := time.Now()
	do()
	for {
		if s := receive(l.h, l.applied); s.Addr == a && so(s.Server) {
			return s.at.Sub(begun)
		}
	}
}

// floor takes one server through the same life by hand: with the least that brings
// it about, or with rollcall's scripts and commands.
func (l *lab) floor(careful bool) map[string]time.Duration {
	took := map[string]time.Duration{}
	a, token := l.addr(), ""
	ctx, cancel := context.WithTimeout(context.Background(), changeTimeout)
	defer cancel()
	bare := func(write func(redis.Pipeliner)) func() {
		return func() {
			if _, err := l.rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
				write(p)
				p.Incr(ctx, "floor:version")
				p.Publish(ctx, "floor:changes", "web")
				return nil
			}); err != nil {
				l.h.Fatal(err)
			}
		}
	}
	commands := l.commands(a, careful)
	if careful {
		weight := 10
		took["join"] = l.hop(func() { token = l.beat(l.hand, a) }, func() error { return l.reread(ctx, a) }, commands["join"])
		l.up("floor", a)
		took["weight"] = l.hop(func() {
			if _, _, err := l.hand.SetAdmin(ctx, "web", a, registrar.Word{Verb: "weight", Weight: &weight}); err != nil {
				l.h.Fatal(err)
			}
		}, func() error { return l.reread(ctx, a) }, commands["weight"])
		took["leave"] = l.hop(func() {
			if _, err := l.hand.Leave(ctx, "web", a, token, registrar.Left); err != nil {
				l.h.Fatal(err)
			}
		}, func() error { return l.reread(ctx, a) }, commands["leave"])
	} else {
		instances, admin := "floor:instances", "floor:admin"
		took["join"] = l.hop(bare(func(p redis.Pipeliner) {
			p.ZAdd(ctx, instances, redis.Z{Score: float64(time.Now().UnixMilli()), Member: a.String()})
		}), func() error { return l.rdb.ZScore(ctx, instances, a.String()).Err() }, commands["join"])
		l.up("floor", a)
		took["weight"] = l.hop(bare(func(p redis.Pipeliner) { p.HSet(ctx, admin, a.String(), `{"weight":10}`) }),
			func() error { return l.rdb.HGet(ctx, admin, a.String()).Err() }, commands["weight"])
		took["leave"] = l.hop(bare(func(p redis.Pipeliner) { p.ZRem(ctx, instances, a.String()) }),
			func() error {
				if err := l.rdb.ZScore(ctx, instances, a.String()).Err(); !errors.Is(err, redis.Nil) {
					return fmt.Errorf("it is still there: %w", err)
				}
				return nil
			}, commands["leave"])
	}
	for _, line := range commands["after"] {
		l.h.await(changeTimeout, line, func() error {
			if got := l.runtime(line); strings.HasPrefix(line, "del ") && !strings.Contains(got, "deleted") {
				return errors.New(got)
			}
			return nil
		})
	}
	return took
}

// commands are the lines for HAProxy of a floor, for each verb, and what tidies up
// after them.
func (l *lab) commands(a netip.AddrPort, careful bool) map[string][]string {
	// The last slot is free in the floor's backend.
	server, id := "floor/x", 1_000_000
	if l.mode == lbsync.Slots {
		id = l.size + spare
		server = fmt.Sprintf("floor/s%d", id)
	}
	set := "set server " + server
	look := fmt.Sprintf("show stat floor 6 %d;show info", id)
	join := []string{fmt.Sprintf("add server %s %s%s", server, a, l.options)}
	if l.mode == lbsync.Slots {
		join[0] = fmt.Sprintf("%s addr %s port %d", set, a.Addr(), a.Port())
	}
	checked := []string{"enable health " + server, set + " health down"}
	if !careful {
		join = append(join, set+" weight 100%")
		if l.checks {
			join = append(join, checked...)
		}
		lines := map[string][]string{
			"join":   {strings.Join(append(join, set+" state ready"), ";")},
			"weight": {set + " weight 10"},
			"leave":  {set + " state maint"},
		}
		if l.mode == lbsync.Dynamic {
			lines["after"] = []string{"del server " + server}
		}
		return lines
	}
	address := fmt.Sprintf("%s addr %s port %d", set, a.Addr(), a.Port())
	join = []string{set + " weight 0"}
	if l.mode == lbsync.Dynamic {
		join[0] = fmt.Sprintf("add server %s %s id %d weight 0 pool-purge-delay 1s pool-max-conn -1%s", server, lbsync.Placeholder, id, l.options)
		if l.checks {
			join = append(join, checked[0])
		}
	}
	join = append(join, set+" state drain")
	if l.checks {
		join = append(join, checked[1])
	}
	join = append(join, address, set+" state ready", set+" weight 100", look)
	lines := map[string][]string{
		"join":   {strings.Join(join, ";")},
		"weight": {look, set + " weight 10;" + look},
		"leave":  {look, set + " state drain;" + look},
		"after":  {fmt.Sprintf("%s weight 0;%s addr %s port %d;%s state maint", set, set, lbsync.Placeholder.Addr(), lbsync.Placeholder.Port(), set)},
	}
	if l.mode == lbsync.Dynamic {
		lines["after"] = append(lines["after"], "del server "+server)
	}
	return lines
}

// reread reads what changed in the floor's registry: a.
func (l *lab) reread(ctx context.Context, a netip.AddrPort) error {
	snap, err := l.hand.Read(ctx, "web", &l.token)
	if err != nil {
		return err
	}
	if l.token.ReplID != "" && (snap.Full || len(snap.Entries) != 1 || snap.Entries[0].Addr != a) {
		return fmt.Errorf("not %s alone: %+v", a, snap)
	}
	l.token = snap.Token
	return nil
}

// hop is one change by hand: write, message, read, commands.
func (l *lab) hop(write func(), read func() error, lines []string) time.Duration {
	time.Sleep(pause)
	begun := time.Now()
	write()
	receive(l.h, l.heard)
	if err := read(); err != nil {
		l.h.Fatal(err)
	}
	var answer string
	for _, line := range lines {
		answer = l.runtime(line)
	}
	took := time.Since(begun)
	answer, _, _ = strings.Cut(answer, "\n# ") // what follows is a report
	for _, wrong := range []string{"No such", "nvalid", "Unknown", "Can't"} {
		if strings.Contains(answer, wrong) {
			l.h.Fatalf("%s: %s", lines, answer)
		}
	}
	return took
}

// listen is the floors' subscriber.
func (l *lab) listen(ctx context.Context, done chan<- struct{}) {
	defer close(done)
	ps := l.rdb.Subscribe(ctx, "floor:changes", l.hand.Keys().Changes())
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

// runtime sends one line on a connection of its own and returns the answer.
func (l *lab) runtime(line string) string {
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
	var answer strings.Builder
	if _, err := bufio.NewReader(c).WriteTo(&answer); err != nil {
		l.h.Fatal(err)
	}
	return answer.String()
}

func receive[T any](h *harness, c <-chan T) T {
	timer := time.NewTimer(changeTimeout)
	defer timer.Stop()
	select {
	case v := <-c:
		return v
	case <-timer.C:
		h.Fatalf("a change was lost: nothing came within %v", changeTimeout)
		panic("unreachable")
	}
}
