package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"rollcall/lbsync"
	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// bursts has 1,000 instances register on 16 connections, as fast as these carry
// them and spread over a second, and measures until HAProxy has all of them, read
// back and acknowledged. The floor does the same by hand: the same beats, of which
// nobody hears, and then the stream of the same runtime commands, to a backend of its
// own. Meanwhile requests go to another backend of the same HAProxy. That, and all
// the rest, runs on this machine: what it has too few cores for shows there.
func bursts(h *harness) []Row {
	var rows []Row
	for _, spread := range []time.Duration{0, time.Second} {
		for _, mode := range []lbsync.Mode{lbsync.Slots, lbsync.Dynamic} {
			rows = append(rows, burstOf(h, mode, spread)...)
		}
	}
	return rows
}

func burstOf(h *harness, mode lbsync.Mode, spread time.Duration) []Row {
	const connections = 16
	size := 1000
	if h.short {
		size = 100
	}
	var whole, after []run
	var beside, byHands []rates
	var within, messages, reads []float64
	for range h.runs {
		srv := redistest.Start(h)
		rdb, dir := srv.Client(h), h.dir()
		store, err := registrar.NewStore(rdb, registrar.DefaultNamespace)
		if err != nil {
			h.Fatal(err)
		}
		be := haproxytest.Backend{Name: "be", Balance: "leastconn"}
		if mode == lbsync.Slots {
			be.Slots = size + spare
		}
		by, other := be, haproxytest.Backend{Name: "other"}
		by.Name = "floor"
		app := haproxytest.NewInstance(h)
		other.Extra = []string{fmt.Sprintf("server app %s", app.Addr())}
		ha := haproxytest.Start(h, haproxytest.Options{Backends: []haproxytest.Backend{be, by, other}})
		lb := h.process(dir, h.rollcall(), "lbsync", "--state-dir", dir, "--redis", srv.URL(), "--socket", ha.Socket, "--backend", "web=be", "--mode", string(mode), "--allow", "127.0.0.0/8")
		ctx, cancel := context.WithTimeout(context.Background(), loadTimeout)
		applied := func(version int64) (asked int) {
			h.await(loadTimeout, fmt.Sprintf("version %d is applied", version), func() error {
				asked++
				a, err := store.Acks(ctx, "web")
				if behind, live := a.Behind(version); err == nil && (live != 1 || behind > 0) {
					err = fmt.Errorf("%+v", a)
				}
				return err
			})
			return asked
		}
		// The first instance of all is there before: everything has been read once.
		addr := func(i int) netip.AddrPort {
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 157, byte(i >> 8), byte(i)}), 9)
		}
		register := func(store *registrar.Store, i int) int64 {
			token := fmt.Sprint("t", i)
			r, err := store.Beat(ctx, "web", registrar.Beat{Addr: addr(i), Token: token, Meta: meta(token), Agent: "bench"})
			if err != nil {
				h.Fatal(err)
			}
			return r.Version
		}
		registerAll := func(store *registrar.Store) {
			todo := make(chan int)
			var registering sync.WaitGroup
			for range connections {
				registering.Go(func() {
					for i := range todo {
						register(store, i)
					}
				})
			}
			begun := time.Now()
			for i := range size {
				if wait := time.Until(begun.Add(spread * time.Duration(i) / time.Duration(size))); wait > 0 {
					time.Sleep(wait)
				}
				todo <- 1 + i
			}
			close(todo)
			registering.Wait()
		}
		applied(register(store, 0))

		load := startLoad(h, "http://"+ha.Addr("other")+"/")
		time.Sleep(2 * time.Second)
		idle := load.lap()
		published, read := calls(h, rdb, "publish"), calls(h, rdb, "evalsha_ro")
		begun := time.Now()
		registerAll(store)
		registered := time.Since(begun)
		asked := applied(int64(size) + 1)
		took := time.Since(begun)
		busy := load.lap()
		messages = append(messages, float64(calls(h, rdb, "publish")-published))
		reads = append(reads, float64(calls(h, rdb, "evalsha_ro")-read-asked))
		serving := 0
		for _, s := range serversOf(h, ha, "be") {
			if s.ready && s.weight != "0" {
				serving++
			}
		}
		if serving != size+1 {
			h.Fatalf("%d of %d serve", serving, size+1)
		}
		if err := lb.Kill(); err != nil {
			h.Fatal(err)
		}
		alone, err := registrar.NewStore(rdb, "hand")
		if err != nil {
			h.Fatal(err)
		}
		load.lap()
		begun = time.Now()
		registerAll(alone)
		beats := time.Since(begun)
		stream := byHand(h, ha, mode, size, addr)
		byHands = append(byHands, rates{quantile(load.lap(), 99), quantile(idle, 99)})
		load.stop()
		cancel()
		whole = append(whole, run{figure: []time.Duration{took}, floor: []time.Duration{beats + stream}})
		after = append(after, run{figure: []time.Duration{took - registered}, floor: []time.Duration{stream}})
		within = append(within, float64(registered)/float64(time.Millisecond))
		beside = append(beside, rates{quantile(busy, 99), quantile(idle, 99)})
	}
	name := fmt.Sprintf("bursts/%s/%d", mode, size)
	if spread > 0 {
		name += "/" + spread.String()
	}
	rows := []Row{
		row(name, "first beat → all routable; against the same beats and then the same commands", 2, whole),
		row(name+"/after", "last beat's answer → all routable; against the same commands", 2, after),
		value(name+"/register", "ms", "that the beats took", 0, within),
		value(name+"/messages", "", "that announced them", 0, messages),
		value(name+"/reads", "", "of the registry, by lbsync", 0, reads),
		rateRow(name+"/beside", "µs", "p99 of requests to another backend meanwhile; against an idle time", 3, beside),
		rateRow(name+"/beside hand", "µs", "the same while it is done by hand", 0, byHands),
	}
	for i := range rows {
		rows[i].AtLeast = false
		if spread == 0 && strings.HasSuffix(rows[i].Name, "/beside") {
			rows[i].Goal = 0 // whoever registers so fast is on this machine's cores too
		}
	}
	return rows
}

// byHand sends the commands that bring size servers into the backend floor, 12
// servers a line, and returns how long that takes.
func byHand(h *harness, ha *haproxytest.HAProxy, mode lbsync.Mode, size int, addr func(int) netip.AddrPort) time.Duration {
	var lines []string
	var servers []string
	for i := range size {
		a := addr(1 + i)
		server := fmt.Sprintf("floor/s%d", i+1)
		place := fmt.Sprintf("set server %s weight 0", server)
		if mode == lbsync.Dynamic {
			place = fmt.Sprintf("add server %s %s id %d weight 0 pool-purge-delay 1s pool-max-conn -1", server, lbsync.Placeholder, 1_000_000+i)
		}
		servers = append(servers, fmt.Sprintf("%s;set server %s state drain;set server %s addr %s port %d;set server %s state ready;set server %s weight 100", place, server, server, a.Addr(), a.Port(), server, server))
	}
	for part := range slices.Chunk(servers, 12) {
		lines = append(lines, strings.Join(part, ";"))
	}
	begun := time.Now()
	for _, line := range lines {
		if answer := ha.Command(h, line); strings.Contains(answer, "No such") || strings.Contains(answer, "nvalid") {
			h.Fatalf("%s: %s", line, answer)
		}
	}
	return time.Since(begun)
}

// meter is a stream of requests, and how long each took since the last lap.
type meter struct {
	mu   sync.Mutex
	took []time.Duration
	stop func()
}

func (m *meter) lap() []time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	took := m.took
	m.took = nil
	return took
}

// startLoad sends requests on four kept connections, each every 2 ms, until stop.
func startLoad(h *harness, url string) *meter {
	m := &meter{}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for range 4 {
		running.Go(func() {
			c := &http.Client{Timeout: changeTimeout, Transport: &http.Transport{}}
			defer c.CloseIdleConnections()
			tick := time.NewTicker(2 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
				begun := time.Now()
				r, err := c.Get(url)
				if err == nil {
					_, err = io.Copy(io.Discard, r.Body)
					_ = r.Body.Close() // it has been read
				}
				if err != nil || r.StatusCode != http.StatusOK {
					h.Fatalf("a request beside a burst failed: %v", err)
				}
				m.mu.Lock()
				m.took = append(m.took, time.Since(begun))
				m.mu.Unlock()
			}
		})
	}
	m.stop = func() {
		cancel()
		running.Wait()
	}
	return m
}

var commandCalls = regexp.MustCompile(`(?m)^cmdstat_([a-z_]+):calls=(\d+)`)

// calls counts the calls of a command so far.
func calls(h *harness, rdb *redis.Client, command string) int {
	ctx, cancel := context.WithTimeout(context.Background(), changeTimeout)
	defer cancel()
	text, err := rdb.Info(ctx, "commandstats").Result()
	if err != nil {
		h.Fatal(err)
	}
	for _, m := range commandCalls.FindAllStringSubmatch(text, -1) {
		if m[1] == command {
			n, err := strconv.Atoi(m[2])
			if err != nil {
				h.Fatal(err)
			}
			return n
		}
	}
	return 0
}
