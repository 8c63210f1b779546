package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// The long run has no faults: instances come and go at a steady pace for hours, and what
// every process and Redis hold is sampled. It fails on what grows.
const (
	sampleEvery = 10 * time.Second
	heapEvery   = 6  // samples; that one collects garbage first
	tableEvery  = 30 // samples

	joinEvery  = time.Second / 14
	crashShare = 0.35 // of those that end; the others leave in order
	// deadShare is how many of the living may be dead and still listed. Then all leave in
	// order: with 15 % of all silent the reapers protect them, and who went on crashing
	// would keep them so for good, after one stall of a busy machine.
	deadShare   = 0.10
	leastLife   = 4 * time.Second
	mostLife    = 16 * time.Second
	lingerAfter = 5 * time.Second // an app goes on after it left
	growthSlots = 500
	askEvery    = 50 * time.Millisecond // a request through HAProxy
	serveEvery  = 2 * time.Second       // one to each path of the page's API, in turn
	openFor     = 20 * time.Second      // a stream of it, which costs a fifth of a core
	openEvery   = time.Minute
	endTimeout  = 2 * time.Minute // all is right after the last has come and gone
)

// bound is what of one figure may grow in an hour.
type bound struct {
	figure string
	unit   string  // in which it is printed
	per    float64 // of the figure's own unit in that one
	most   float64 // an hour, in the unit as printed; NaN = told only
	floor  bool    // see fit
}

// bounds say for each figure what is growth. Memory is in MB: what the runtime has of the
// machine moves in steps and comes back late, so that "heap", what lives after a
// collection, tells of a leak four times sooner. A smaller bound finds a slower leak, but
// in two hours the steps of the resident set alone are ± 1 MB an hour.
var bounds = []bound{
	{"rss", "MB", 1 << 20, 1, true},
	{"heap", "MB", 1 << 20, 0.25, true},
	{"goroutines", "", 1, 2, false},
	{"files", "", 1, 2, false},
	{"log", "MB", 1 << 20, 1, false}, // of one process: what its disk must take
	{"cpu", "s", 1, math.NaN(), false},
	{"memory", "MB", 1 << 20, 0.25, true},
	{"clients", "", 1, 2, false},
	{"keys", "", 1, 2, false},
	{"members", "", 1, 500, false}, // of all keys of one kind; a hundredth of what joins in an hour
}

// header is the first line of a file of samples; a sample is each other one.
type header struct {
	For   string    `json:"for"`
	Began time.Time `json:"began"`
}

// sample is every figure at one time, by "WHO FIGURE".
type sample struct {
	At     float64            `json:"at"` // seconds since the run began
	Values map[string]float64 `json:"values"`
}

// growth is one long run.
type growth struct {
	*world
	length  time.Duration
	began   time.Time
	store   *registrar.Store
	daemons map[string]*process // by their names in the table
	serve   string              // the address of its API
	churn   churning

	samples *os.File
	table   string // a file, or empty
	series  map[string][]point
}

// churning counts what came and went.
type churning struct {
	joined, left, crashed, living, failed atomic.Int64

	listed atomic.Int64 // in the registry, of late
}

// runGrowth plays for this long or until SIGTERM, and reports.
func runGrowth(length time.Duration, table, samples string) (ok bool, err error) {
	dir, err := os.MkdirTemp("", "rc")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(dir)
	binary := filepath.Join(dir, "rollcall")
	if out, err := exec.Command("go", "build", "-o", binary, "./cmd/rollcall").CombinedOutput(); err != nil {
		return false, fmt.Errorf("build: %w\n%s", err, out)
	}
	if samples == "" && table != "" {
		samples = table + ".samples"
	}
	g := &growth{
		world:  &world{play: newPlay("growth"), ttl: 3 * time.Second, beat: time.Second, monitored: true, rollcall: binary},
		length: length, table: table, series: map[string][]point{}, daemons: map[string]*process{},
	}
	defer g.close()
	if samples != "" {
		if g.samples, err = os.Create(samples); err != nil {
			return false, err
		}
		defer g.samples.Close()
	}
	ctx, stop := signal.NotifyContext(g.ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	g.do(func() { g.stage() })
	if !g.Failed() {
		g.do(func() { g.run(ctx) })
	}
	grown, text := tabulate(g.series)
	fmt.Print(text)
	fmt.Println(g.summary())
	if err := g.write(text); err != nil {
		g.Error(err)
	}
	for _, what := range g.failures() {
		fmt.Println("WRONG:", what)
	}
	fmt.Printf("%d s, %d figures, %d grow\n", int(time.Since(g.began).Seconds()), len(g.series), grown)
	if took := time.Since(g.began); took < 2*warmUp {
		fmt.Printf("What fills in the first %v looks like growth in so short a run, so that does not make it fail.\n", warmUp)
		grown = 0
	}
	return grown == 0 && !g.Failed(), nil
}

// stage starts the servers and the daemons.
func (g *growth) stage() {
	g.began = time.Now()
	g.srv = redistest.Start(g)
	g.rdb, g.url, g.front = g.srv.Client(g), "redis://"+g.srv.Addr+"/0", g.srv.Addr
	c := &cast{w: g.world, namespace: "rollcall", binary: g.rollcall}
	g.cast = c
	way := newRelay(g.play, g.srv.Addr) // not used: all have g.url
	c.even, c.odd, c.toReap, c.toSync = way, way, way, way
	for _, name := range []string{"reap 1", "reap 2"} {
		g.daemons[name] = c.reapAt(g.ttl, g.beat, "--pprof")
	}
	g.until("the reaper has written the times", time.Minute, func() error {
		return g.rdb.HGet(g.ctx, c.key("config"), "ttl_ms").Err()
	})
	// Checks at a pace that the whole crowd can have.
	c.ha = haproxytest.Start(g, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Balance: "roundrobin", Extra: []string{
		"option httpchk GET /healthz", "retries 3",
		"default-server inter 2s fastinter 500ms rise 1 fall 2",
		fmt.Sprintf("server-template s 1-%d slot.invalid:1 check disabled init-addr last,127.0.0.1", growthSlots),
	}}}})
	for n := range 3 {
		m := c.enroll()
		m.sidecar = c.spawn(way, "register", "--pprof", "--service", "web", "--addr", m.addr.String())
		g.daemons[fmt.Sprint("register ", n+1)] = m.sidecar
	}
	for n := range 3 {
		m := c.enroll()
		m.sidecar = c.spawn(way, "register", "--pprof", "--service", "web", "--addr", m.addr.String(),
			"--check", "http://"+m.addr.String()+"/healthz", "--check-interval", "1s",
			"--", "sh", "-c", "while kill -0 $PPID 2>/dev/null; do sleep 5; done") // ends with its sidecar, however that ends
		g.Cleanup(func() { m.sidecar.end(g.world, syscall.SIGTERM) })
		g.daemons[fmt.Sprint("sidecar ", n+1)] = m.sidecar
	}
	g.daemons["lbsync"] = c.spawn(way, "lbsync", "--pprof", "--socket", c.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8",
		"--state-file", filepath.Join(g.srv.Dir, "last.state"), "--state-dir", g.srv.Dir)
	g.serve = strings.TrimSuffix(monitorAddr(), ":9464") + ":8300"
	g.daemons["serve"] = c.spawn(way, "serve", "--pprof", "--listen", g.serve)
	g.until("all is ready", time.Minute, func() error { return g.allRight() })
	rdb, err := registrar.Open(g.url, 20)
	if err != nil {
		g.Fatal(err)
	}
	g.Cleanup(func() { _ = rdb.Close() })
	if g.store, err = registrar.NewStore(rdb, registrar.DefaultNamespace); err != nil {
		g.Fatal(err)
	}
}

// allRight returns what is not as it must be with the steady instances alone.
func (g *growth) allRight() error {
	ctx, cancel := context.WithTimeout(g.ctx, 10*lookTimeout)
	defer cancel()
	living := g.cast.living()
	listed, err := g.rdb.ZRange(ctx, g.cast.key("{web}:instances"), 0, -1).Result()
	if err != nil {
		return err
	}
	slices.Sort(listed)
	if !slices.Equal(listed, living) {
		return fmt.Errorf("the registry lists %v, alive are %v", listed, living)
	}
	text, err := ask(g.cast.ha.Socket, "show info;show servers state be")
	if err != nil {
		return err
	}
	_, _, admitted := parseServers(text)
	if has := slices.Sorted(maps.Keys(admitted)); !slices.Equal(has, living) {
		return fmt.Errorf("haproxy has %v, alive are %v", has, living)
	}
	return nil
}

// run has instances come and go until the time is over, or ctx ends.
func (g *growth) run(ctx context.Context) {
	fmt.Printf("%s: %v of %.0f joins a second\n", g.began.Format(time.TimeOnly), g.length, float64(time.Second/joinEvery))
	told := ctx
	ctx, cancel := context.WithTimeout(ctx, g.length)
	defer cancel()
	if g.samples != nil {
		g.keep(header{g.length.String(), g.began})
	}
	var playing sync.WaitGroup
	playing.Go(func() { g.crowd(ctx) })
	playing.Go(func() { g.count(ctx) })
	playing.Go(func() { g.ask(ctx) })
	playing.Go(func() { g.look(ctx) })
	playing.Go(func() { g.stream(ctx) })
	tick := time.NewTicker(sampleEvery)
	for n := 1; ctx.Err() == nil; n++ {
		select {
		case <-ctx.Done():
		case <-tick.C:
			g.sample(n%heapEvery == 0)
			if n%tableEvery == 0 {
				_, text := tabulate(g.series)
				if err := g.write(text); err != nil {
					g.Error(err)
				}
			}
		}
	}
	tick.Stop()
	playing.Wait()
	g.until("all is right after the last has gone", endTimeout, func() error {
		if told.Err() != nil {
			return nil // told to stop: the table cannot wait
		}
		return g.allRight()
	})
}

// crowd starts an instance each time, and waits for the last one's end.
func (g *growth) crowd(ctx context.Context) {
	var living sync.WaitGroup
	defer living.Wait()
	tick := time.NewTicker(joinEvery)
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			living.Go(func() { g.live(ctx, n) })
		}
	}
}

// live is one instance's life: an app of its own, and heartbeats from here, since a
// process for each would take a core.
func (g *growth) live(ctx context.Context, n int) {
	var unhealthy atomic.Bool
	l, err := net.Listen("tcp", fmt.Sprintf("127.%d.%d.%d:0", 20+n/250/250%20, n/250%250, n%250+1))
	if err != nil {
		g.Error(err)
		return
	}
	app := &http.Server{ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/healthz" && unhealthy.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})}
	var serving sync.WaitGroup
	serving.Go(func() { _ = app.Serve(l) }) // until it is closed
	defer serving.Wait()
	defer app.Close()
	addr := netip.MustParseAddrPort(l.Addr().String())
	b, err := registrar.NewBeater(registrar.BeaterConfig{Service: "web", Addr: addr, Weight: registrar.DefaultWeight, Interval: g.beat}, g.store, zerolog.Nop())
	if err != nil {
		g.Error(err)
		return
	}
	g.churn.joined.Add(1)
	g.churn.living.Add(1)
	bctx, end := context.WithCancelCause(context.WithoutCancel(ctx))
	defer end(nil)
	var beating sync.WaitGroup
	beating.Go(func() {
		if err := b.Run(bctx); err != nil {
			g.churn.failed.Add(1)
		}
	})
	life := time.NewTimer(leastLife + rand.N(mostLife-leastLife))
	defer life.Stop()
	crash := false
	select {
	case <-life.C:
		living := g.churn.living.Load()
		crash = rand.Float64() < crashShare && float64(g.churn.listed.Load()-living) < deadShare*float64(living)
	case <-ctx.Done(): // so many at once would be protected
	}
	if crash {
		unhealthy.Store(true)
		end(registrar.ErrHandedOver) // nobody is told
		g.churn.crashed.Add(1)
	} else {
		end(nil)
		g.churn.left.Add(1)
	}
	beating.Wait()
	g.churn.living.Add(-1)
	time.Sleep(lingerAfter) // the app's own time, not a wait for anything
}

// count keeps count of who is listed.
func (g *growth) count(ctx context.Context) {
	tick := time.NewTicker(g.beat / 2)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if n, err := g.rdb.ZCard(ctx, g.cast.key("{web}:instances")).Result(); err == nil {
			g.churn.listed.Store(n)
		}
	}
}

// ask sends requests through HAProxy.
func (g *growth) ask(ctx context.Context) {
	t := &traffic{why: map[string]int{}, stop: func() {}}
	g.mu.Lock()
	g.traffic = t
	g.mu.Unlock()
	c := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{}}
	defer c.CloseIdleConnections()
	tick := time.NewTicker(askEvery)
	defer tick.Stop()
	for post := false; ; post = !post {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		err := request(c, "http://"+g.cast.ha.Addr("be")+"/", post)
		t.mu.Lock()
		t.sent++
		if err != nil {
			t.failed++
			t.why[err.Error()]++
		}
		t.mu.Unlock()
	}
}

// look asks the page's API for all that it has, in turn.
func (g *growth) look(ctx context.Context) {
	c := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{}}
	defer c.CloseIdleConnections()
	tick := time.NewTicker(serveEvery)
	defer tick.Stop()
	paths := []string{"/v1/services", "/v1/services/web", "/v1/balancers", "/v1/status", "/v1/events", "/v1/history", "/v1/sd/prometheus", "/"}
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		resp, err := c.Get("http://" + g.serve + paths[n%len(paths)])
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
			_ = resp.Body.Close()
		}
		if err != nil {
			g.churn.failed.Add(1)
		}
	}
}

// stream reads the page's stream, and again after a while, as browsers do.
func (g *growth) stream(ctx context.Context) {
	c := &http.Client{Transport: &http.Transport{}}
	defer c.CloseIdleConnections()
	tick := time.NewTicker(openEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		sctx, cancel := context.WithTimeout(ctx, openFor)
		r, err := http.NewRequestWithContext(sctx, http.MethodGet, "http://"+g.serve+"/v1/stream", nil)
		if err != nil {
			cancel()
			g.Error(err)
			return
		}
		if resp, err := c.Do(r); err == nil {
			_, _ = io.Copy(io.Discard, resp.Body) // until sctx ends
			_ = resp.Body.Close()
		}
		cancel()
	}
}

// sample asks every process and Redis; whole = and what lives on the heaps, for which
// they collect garbage.
func (g *growth) sample(whole bool) {
	s := sample{At: time.Since(g.began).Seconds(), Values: map[string]float64{}}
	var mu sync.Mutex
	var asking sync.WaitGroup
	for name, p := range g.daemons {
		asking.Go(func() {
			if p.over() == 1 {
				g.Errorf("%s has ended by itself; the end of its log: %s", name, p.tail())
				return
			}
			m, err := scrape(p.monitor, 20*lookTimeout)
			if err != nil {
				return // a busy machine; the figure has a gap
			}
			heap, err := 0.0, error(nil)
			if whole {
				heap, err = heapOf(p.monitor)
			}
			mu.Lock()
			defer mu.Unlock()
			for figure, of := range map[string]string{"rss": "process_resident_memory_bytes", "goroutines": "go_goroutines", "files": "process_open_fds", "cpu": "process_cpu_seconds_total"} {
				s.Values[name+" "+figure] = m[of]
			}
			if whole && err == nil {
				s.Values[name+" heap"] = heap
			}
			p.mu.Lock()
			s.Values[name+" log"] = float64(p.out.Len())
			p.mu.Unlock()
		})
	}
	asking.Wait()
	if err := g.redis(s.Values); err != nil {
		g.churn.failed.Add(1)
	}
	if rss, files, cpu, err := ofProcess(g.cast.ha.PID()); err == nil {
		s.Values["haproxy rss"], s.Values["haproxy files"], s.Values["haproxy cpu"] = rss, files, cpu
	}
	if _, _, cpu, err := ofProcess(os.Getpid()); err == nil {
		s.Values["(driver) cpu"] = cpu
	}
	for key, v := range s.Values {
		g.series[key] = append(g.series[key], point{time.Duration(s.At * float64(time.Second)), v})
	}
	if g.samples != nil {
		g.keep(s)
	}
}

// keep writes one line of the samples' file.
func (g *growth) keep(v any) {
	b, err := json.Marshal(v)
	if err == nil {
		_, err = g.samples.Write(append(b, '\n'))
	}
	if err != nil {
		g.Errorf("samples: %v", err)
	}
}

// tail returns the end of what p has said.
func (p *process) tail() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	b := p.out.Bytes()
	return string(b[max(len(b)-500, 0):])
}

// heapOf has a process collect its garbage and returns what is left, in bytes.
func heapOf(addr string) (float64, error) {
	client := http.Client{Timeout: 40 * lookTimeout}
	resp, err := client.Get("http://" + addr + "/debug/pprof/heap?gc=1&debug=1")
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	defer client.CloseIdleConnections()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if v, ok := strings.CutPrefix(lines.Text(), "# HeapAlloc = "); ok {
			return strconv.ParseFloat(v, 64)
		}
	}
	return 0, errors.Join(errors.New("the profile does not say HeapAlloc"), lines.Err())
}

// redis adds what Redis has: of each kind of key how many there are, and how many
// members they have together.
func (g *growth) redis(values map[string]float64) error {
	ctx, cancel := context.WithTimeout(g.ctx, 20*lookTimeout)
	defer cancel()
	info, err := g.rdb.Info(ctx).Result()
	if err != nil {
		return err
	}
	for line := range strings.Lines(info) {
		name, v, _ := strings.Cut(strings.TrimSpace(line), ":")
		n, err := strconv.ParseFloat(v, 64)
		if err != nil {
			continue
		}
		switch name {
		case "used_memory":
			values["redis memory"] = n
		case "used_memory_rss":
			values["redis rss"] = n
		case "connected_clients":
			values["redis clients"] = n
		case "used_cpu_user", "used_cpu_sys":
			values["redis cpu"] += n
		}
	}
	keys, members := map[string]float64{}, map[string]float64{}
	all := 0.0
	scan := g.rdb.Scan(ctx, 0, "*", 1000).Iterator()
	for scan.Next(ctx) {
		key := scan.Val()
		kind := kindOf(key)
		all++
		keys[kind]++
		n, err := g.members(ctx, key)
		if err != nil {
			return err
		}
		members[kind] += n
	}
	if err := scan.Err(); err != nil {
		return err
	}
	values["redis keys"] = all
	for kind := range keys {
		values[kind+" keys"], values[kind+" members"] = keys[kind], members[kind]
	}
	return nil
}

// kindOf is a key without its namespace, the names in it and its numbers.
func kindOf(key string) string {
	_, rest, _ := strings.Cut(key, ":")
	parts := strings.Split(rest, ":") // reaper:ID, {web}:gone, {web}:seen:ID
	n := 1
	if strings.HasPrefix(rest, "{") {
		n = 2
	}
	return "key " + strings.Join(parts[:min(n, len(parts))], ":")
}

// members is how many a key has; 1 of a string.
func (g *growth) members(ctx context.Context, key string) (float64, error) {
	kind, err := g.rdb.Type(ctx, key).Result()
	if err != nil {
		return 0, err
	}
	var n *redis.IntCmd
	switch kind {
	case "zset":
		n = g.rdb.ZCard(ctx, key)
	case "hash":
		n = g.rdb.HLen(ctx, key)
	case "set":
		n = g.rdb.SCard(ctx, key)
	case "list":
		n = g.rdb.LLen(ctx, key)
	case "stream":
		n = g.rdb.XLen(ctx, key)
	case "none":
		return 0, nil // it has run out meanwhile
	default:
		return 1, nil
	}
	v, err := n.Result()
	return float64(v), err
}

// ofProcess reads /proc: bytes, open files, seconds.
func ofProcess(pid int) (rss, files, cpu float64, err error) {
	dir := fmt.Sprintf("/proc/%d/", pid)
	b, err := os.ReadFile(dir + "stat")
	if err != nil {
		return 0, 0, 0, err
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+2:])) // proc(5): from field 3 on
	if len(f) < 22 {
		return 0, 0, 0, fmt.Errorf("%sstat: %q", dir, b)
	}
	utime, _ := strconv.ParseFloat(f[11], 64)
	stime, _ := strconv.ParseFloat(f[12], 64)
	pages, _ := strconv.ParseFloat(f[21], 64)
	open, err := os.ReadDir(dir + "fd")
	return pages * float64(os.Getpagesize()), float64(len(open)), (utime + stime) / 100, err
}

// summary is one line of what happened.
func (g *growth) summary() string {
	c := &g.churn
	out := fmt.Sprintf("%d joined, %d left, %d crashed, %d unanswered of the driver", c.joined.Load(), c.left.Load(), c.crashed.Load(), c.failed.Load())
	g.mu.Lock()
	t := g.traffic
	g.mu.Unlock()
	if t != nil {
		sent, failed, why := t.count()
		out += fmt.Sprintf("; requests %d, failed %d %s", sent, failed, why)
	}
	levels := map[string]int{}
	for name, p := range g.daemons {
		for _, l := range p.said() {
			if v := fmt.Sprint(l["level"]); v == "warn" || v == "error" {
				levels[fmt.Sprintf("%s %s %q", strings.TrimRight(name, " 0123456789"), v, l["message"])]++
			}
		}
	}
	for _, k := range slices.Sorted(maps.Keys(levels)) {
		out += fmt.Sprintf("\n%6d %s", levels[k], k)
	}
	return out
}

// write replaces the table's file.
func (g *growth) write(text string) error {
	if g.table == "" {
		return nil
	}
	part := g.table + ".part"
	if err := os.WriteFile(part, []byte(text+g.summary()+"\n"), 0o644); err != nil {
		return err
	}
	return os.Rename(part, g.table)
}

// tabulate judges every series and returns how many grow.
func tabulate(series map[string][]point) (grown int, text string) {
	var out strings.Builder
	tw := tabwriter.NewWriter(&out, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "of\tfigure\tfirst\tlast\tan hour\t± (3 sigma)\tsecond half\tbound\t\t")
	keys := slices.SortedFunc(maps.Keys(series), func(a, b string) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a, b))
	})
	for _, key := range keys {
		of, figure := split(key)
		i := rank(key)
		if i == len(bounds) {
			continue
		}
		b := bounds[i]
		s := fit(settled(series[key]), b.floor)
		for _, v := range []*float64{&s.first, &s.last, &s.perHour, &s.low, &s.high, &s.late} {
			*v /= b.per
		}
		v := s.verdict(b.most)
		if v == verdictGrows {
			grown++
		}
		most := strconv.FormatFloat(b.most, 'g', -1, 64)
		if math.IsNaN(b.most) {
			most = "-"
		}
		fmt.Fprintf(tw, "%s\t%s\t%.4g\t%.4g\t%+.3g\t%.2g\t%+.3g\t%s\t%s\t\n", of, strings.TrimSpace(figure+" "+b.unit), s.first, s.last, s.perHour, s.uncertainty(), s.late, most, v)
	}
	_ = tw.Flush() // to memory
	return grown, out.String()
}

func split(key string) (of, figure string) {
	i := strings.LastIndexByte(key, ' ')
	return key[:max(i, 0)], key[i+1:]
}

// rank is the place of the figure's bound.
func rank(key string) int {
	_, figure := split(key)
	if i := slices.IndexFunc(bounds, func(b bound) bool { return b.figure == figure }); i >= 0 {
		return i
	}
	return len(bounds)
}

// tableOf computes the table of a file of samples, such as a killed run leaves.
func tableOf(file string) (ok bool, err error) {
	f, err := os.Open(file)
	if err != nil {
		return false, err
	}
	defer f.Close()
	series := map[string][]point{}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var s sample
		if json.Unmarshal(lines.Bytes(), &s) != nil {
			continue // a run was killed while it wrote its last line
		}
		for key, v := range s.Values {
			series[key] = append(series[key], point{time.Duration(s.At * float64(time.Second)), v})
		}
	}
	if err := lines.Err(); err != nil {
		return false, err
	}
	grown, text := tabulate(series)
	fmt.Print(text)
	fmt.Printf("%d figures, %d grow\n", len(series), grown)
	return grown == 0, nil
}
