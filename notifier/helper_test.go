package notifier

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

const web registrar.Service = "web"

func TestMain(m *testing.M) {
	code := m.Run()
	if code == 0 {
		// After a failed dial go-redis' pool probes in the background and sees
		// only up to a second later that it was closed.
		if err := goleak.Find(goleak.IgnoreAnyFunction("github.com/redis/go-redis/v9/internal/pool.(*ConnPool).tryDial")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// eventually calls f until it returns nil, for at most 30 s, and then fails
// with f's last error.
func eventually(tb testing.TB, f func() error) {
	tb.Helper()
	deadline := time.NewTimer(30 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-deadline.C:
			tb.Fatal(err)
		case <-tick.C:
		}
	}
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// host is the n-th of 60,000 different addresses.
func host(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(n / 250), byte(n%250 + 1)}), 8080)
}

// storeOn returns a store on rdb.
func storeOn(tb testing.TB, rdb redis.UniversalClient) *registrar.Store {
	tb.Helper()
	s, err := registrar.NewStore(rdb, registrar.DefaultNamespace)
	must(tb, err)
	return s
}

// open returns a client as rollcall makes them, with go-redis' options changed
// by edit, that the test's end closes.
func open(tb testing.TB, addr string, edit func(*redis.Options)) *redis.Client {
	tb.Helper()
	u, err := registrar.Open("redis://"+addr+"/0", 4)
	must(tb, err)
	o := *u.(*redis.Client).Options()
	must(tb, u.Close())
	o.PushNotificationProcessor = nil // it belongs to the closed client
	if edit != nil {
		edit(&o)
	}
	c := redis.NewClient(&o)
	tb.Cleanup(func() {
		if err := c.Close(); err != nil {
			tb.Error(err)
		}
	})
	return c
}

// world is a Redis with a store to change it and one whose messages are lost.
type world struct {
	tb    testing.TB
	srv   *redistest.Server
	rdb   *redis.Client
	store *registrar.Store
	mute  *registrar.Store
}

func newWorld(tb testing.TB, args ...string) *world {
	tb.Helper()
	srv := redistest.Start(tb, args...)
	w := &world{tb: tb, srv: srv, rdb: srv.Client(tb)}
	w.store = storeOn(tb, w.rdb)
	w.allowMute()
	w.mute = storeOn(tb, open(tb, srv.Addr, func(o *redis.Options) {
		o.CredentialsProviderContext = nil // it comes before what is named here
		o.Username, o.Password = "mute", "secret"
	}))
	return w
}

// allowMute adds the user that may do everything but send a message. Its
// script fails at the PUBLISH, after its writes.
func (w *world) allowMute() {
	w.tb.Helper()
	must(w.tb, w.rdb.Do(w.tb.Context(), "ACL", "SETUSER", "mute", "on", ">secret", "~*", "+@all", "resetchannels").Err())
}

func metaOf(n, weight int) string { return fmt.Sprintf(`{"id":"t%d","weight":%d}`, n, weight) }

// join registers the n-th instance of svc, or changes its weight.
func (w *world) join(svc registrar.Service, n, weight int) registrar.BeatReply {
	w.tb.Helper()
	r, err := w.store.Beat(w.tb.Context(), svc, registrar.Beat{Addr: host(n), Token: fmt.Sprint("t", n), Meta: metaOf(n, weight)})
	must(w.tb, err)
	return r
}

// joinMute is join, but Redis does not send the message.
func (w *world) joinMute(svc registrar.Service, n, weight int) {
	w.tb.Helper()
	_, err := w.mute.Beat(w.tb.Context(), svc, registrar.Beat{Addr: host(n), Token: fmt.Sprint("t", n), Meta: metaOf(n, weight)})
	if err == nil || !strings.Contains(err.Error(), "can't publish") {
		w.tb.Fatalf("beat without channel rights: %v, want a message that was refused", err)
	}
}

func (w *world) leave(svc registrar.Service, n int, why registrar.Reason) {
	w.tb.Helper()
	_, err := w.store.Leave(w.tb.Context(), svc, host(n), fmt.Sprint("t", n), why)
	must(w.tb, err)
}

func (w *world) publish(payload string) {
	w.tb.Helper()
	must(w.tb, w.rdb.Publish(w.tb.Context(), w.store.Keys().Changes(), payload).Err())
}

var commandCalls = regexp.MustCompile(`(?m)^cmdstat_([a-z_|]+):calls=(\d+),.*failed_calls=(\d+)`)

// calls counts the calls of a command so far, and how many failed.
func (w *world) calls(command string) (all, failed int) {
	w.tb.Helper()
	info, err := w.rdb.Info(w.tb.Context(), "commandstats").Result()
	must(w.tb, err)
	for _, m := range commandCalls.FindAllStringSubmatch(info, -1) {
		if m[1] == command {
			all, _ = strconv.Atoi(m[2])
			failed, _ = strconv.Atoi(m[3])
		}
	}
	return all, failed
}

// logs is a log that tests read.
type logs struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logs) count(what string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.buf.String(), what)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// follower is a Watcher that runs, and what it has handed out.
type follower struct {
	tb   testing.TB
	w    *Watcher
	logs *logs
	stop func() error // idempotent
	// dials counts the connections that were tried.
	dials *atomic.Int64

	mu          sync.Mutex
	views       map[registrar.Service]*View
	changes     int
	fulls       int
	interrupted map[registrar.Service]int
	versions    []int64 // of web
	lastAt      time.Time
}

func (w *world) follow(cfg Config) *follower {
	w.tb.Helper()
	var dials atomic.Int64
	f := follow(w.tb, open(w.tb, w.srv.Addr, func(o *redis.Options) {
		o.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
			dials.Add(1)
			return (&net.Dialer{Timeout: o.DialTimeout}).DialContext(ctx, network, addr)
		}
	}), cfg)
	f.dials = &dials
	return f
}

func follow(tb testing.TB, rdb *redis.Client, cfg Config) *follower {
	tb.Helper()
	f := &follower{tb: tb, logs: &logs{}, views: map[registrar.Service]*View{}, interrupted: map[registrar.Service]int{}}
	var err error
	f.w, err = New(cfg, storeOn(tb, rdb), zerolog.New(f.logs).With().Timestamp().Logger())
	must(tb, err)
	ctx, cancel := context.WithCancel(context.WithoutCancel(tb.Context()))
	ended := make(chan error, 1)
	var handling atomic.Int32
	go func() {
		ended <- f.w.Run(ctx, func(c Change) {
			if handling.Add(1) != 1 {
				tb.Error("handle called while it runs")
			}
			f.handle(c)
			handling.Add(-1)
		})
	}()
	f.stop = sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-ended:
			return err
		case <-time.After(10 * time.Second):
			return errors.New("Run does not end")
		}
	})
	tb.Cleanup(func() {
		if err := f.stop(); err != nil {
			tb.Errorf("run: %v", err)
		}
		if tb.Failed() {
			tb.Logf("watcher:\n%s", f.logs)
		}
	})
	return f
}

func (f *follower) handle(c Change) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.changes++
	f.lastAt = time.Now()
	if c.Full {
		f.fulls++
	}
	if c.Interrupted {
		f.interrupted[c.Service]++
	}
	v := f.views[c.Service]
	if v == nil {
		v = &View{}
		f.views[c.Service] = v
	}
	if v.Known && c.Token.Version < v.Token.Version && !c.Interrupted {
		f.tb.Errorf("%s: version %d after %d without an interruption", c.Service, c.Token.Version, v.Token.Version)
	}
	if c.Heard.IsZero() || c.Heard.After(time.Now()) {
		f.tb.Errorf("%s: heard at %v", c.Service, c.Heard)
	}
	v.Apply(c)
	if c.Service == web {
		f.versions = append(f.versions, c.Token.Version)
	}
}

// subscribed waits until messages come and everything has been read after that.
func (f *follower) subscribed() {
	f.tb.Helper()
	eventually(f.tb, func() error {
		f.w.mu.Lock()
		defer f.w.mu.Unlock()
		if !f.w.alive || f.w.every || len(f.w.hints) > 0 {
			return fmt.Errorf("alive %v, every %v, hints %v\n%s", f.w.alive, f.w.every, f.w.hints, f.logs)
		}
		return nil
	})
}

// settled waits until there is no reason left to read web.
func (f *follower) settled() {
	f.tb.Helper()
	f.subscribed()
	f.sees(web, 1, weight(1))
	fulls := f.wholeReads()
	f.w.Refresh(web) // is read with or after all that is under way
	eventually(f.tb, func() error {
		if n := f.wholeReads(); n == fulls {
			return fmt.Errorf("%d whole reads, want another", n)
		}
		return nil
	})
}

// sees waits until want says nil of what is known of an instance.
func (f *follower) sees(svc registrar.Service, n int, want func(registrar.Entry) error) {
	f.tb.Helper()
	eventually(f.tb, func() error {
		f.mu.Lock()
		defer f.mu.Unlock()
		v := f.views[svc]
		if v == nil {
			return fmt.Errorf("%s: nothing known of it", svc)
		}
		e := v.Lookup(host(n))
		if err := want(e); err != nil {
			return fmt.Errorf("%s %s at %d: %w: %+v", svc, host(n), v.Token.Version, err, e)
		}
		return nil
	})
}

func weight(n int) func(registrar.Entry) error {
	return func(e registrar.Entry) error {
		if !e.Present || e.Instance.Weight() != n {
			return fmt.Errorf("want weight %d", n)
		}
		return nil
	}
}

func gone(why registrar.Reason) func(registrar.Entry) error {
	return func(e registrar.Entry) error {
		if e.Present || e.Gone == nil || e.Gone.Reason != why {
			return fmt.Errorf("want gone, %s", why)
		}
		return nil
	}
}

func absent(e registrar.Entry) error {
	if e.Present || e.Gone != nil || e.Garbage != "" {
		return errors.New("want absent without a note")
	}
	return nil
}

func (f *follower) interruptions(svc registrar.Service) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.interrupted[svc]
}

func (f *follower) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changes
}

// logged waits for exactly n lines that say what.
func (f *follower) logged(what string, n int) {
	f.tb.Helper()
	eventually(f.tb, func() error {
		if got := f.logs.count(what); got != n {
			return fmt.Errorf("%q is logged %d times, want %d\n%s", what, got, n, f.logs)
		}
		return nil
	})
}

// proxy forwards TCP connections to addr.
type proxy struct {
	net.Listener
	tb   testing.TB
	addr string

	// split makes the next chunk from the server that holds the text arrive in
	// two parts, a pause between them.
	split atomic.Pointer[string]
	pause time.Duration

	mu     sync.Mutex
	conns  []net.Conn
	frozen *atomic.Bool // of the connections made since the last freeze
	n      int
}

func newProxy(tb testing.TB, addr string) *proxy {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(tb, err)
	p := &proxy{Listener: l, tb: tb, addr: addr, frozen: &atomic.Bool{}}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s, err := net.Dial("tcp", addr)
			if err != nil {
				_ = c.Close()
				continue
			}
			p.mu.Lock()
			p.n++
			frozen := p.frozen
			p.conns = append(p.conns, c, s)
			p.mu.Unlock()
			running.Go(func() { p.forward(s, c, frozen, false) })
			running.Go(func() { p.forward(c, s, frozen, true) })
		}
	})
	tb.Cleanup(func() {
		_ = l.Close()
		p.mu.Lock()
		for _, c := range p.conns {
			_ = c.Close()
		}
		p.mu.Unlock()
		running.Wait()
	})
	return p
}

// forward copies until one side ends. A frozen pair swallows what comes and
// closes nothing, as a host does whose packets are dropped.
func (p *proxy) forward(dst, src net.Conn, frozen *atomic.Bool, fromServer bool) {
	buf := make([]byte, 64<<10)
	for {
		n, err := src.Read(buf)
		if frozen.Load() {
			if err != nil {
				return
			}
			continue
		}
		if err != nil {
			_ = dst.Close()
			return
		}
		data := buf[:n]
		if s := p.split.Load(); s != nil && fromServer && bytes.Contains(data, []byte(*s)) && p.split.CompareAndSwap(s, nil) {
			if _, err := dst.Write(data[:n/2]); err != nil {
				return
			}
			<-time.After(p.pause) // the fault itself
			data = data[n/2:]
		}
		if _, err := dst.Write(data); err != nil && !errors.Is(err, io.ErrClosedPipe) {
			_ = src.Close()
			return
		}
	}
}

// freeze makes the present connections silent. New ones work.
func (p *proxy) freeze() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.frozen.Store(true)
	p.frozen = &atomic.Bool{}
}

func percentile(d []time.Duration, p int) time.Duration {
	s := slices.Sorted(slices.Values(d))
	return s[(len(s)-1)*p/100]
}

func (f *follower) wholeReads() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.fulls
}
