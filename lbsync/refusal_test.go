package lbsync_test

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"

	"rollcall/lbsync"
	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/notifier"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// refusal is one way in which a Redis that runs refuses to answer. The words
// begin its errors; "" = it does answer.
type refusal struct {
	name              string
	read, beat, write string
	begin             func(ctx context.Context, root *redis.Client) (end func() error, err error)
}

func refusals(dir string) []refusal {
	set := func(name, value, back string) func(context.Context, *redis.Client) (func() error, error) {
		return func(ctx context.Context, root *redis.Client) (func() error, error) {
			return func() error { return root.ConfigSet(ctx, name, back).Err() }, root.ConfigSet(ctx, name, value).Err()
		}
	}
	replica := func(stale string) func(context.Context, *redis.Client) (func() error, error) {
		return func(ctx context.Context, root *redis.Client) (func() error, error) {
			if err := root.ConfigSet(ctx, "replica-serve-stale-data", stale).Err(); err != nil {
				return nil, err
			}
			return func() error { return root.ReplicaOf(ctx, "no", "one").Err() }, root.ReplicaOf(ctx, "127.0.0.1", "1").Err()
		}
	}
	rights := func(take, give []any) func(context.Context, *redis.Client) (func() error, error) {
		return func(ctx context.Context, root *redis.Client) (func() error, error) {
			if err := root.Do(ctx, append([]any{"acl", "setuser", "default"}, take...)...).Err(); err != nil {
				return nil, err
			}
			// A connection keeps what it was granted at its beginning.
			err := root.Do(ctx, "client", "kill", "user", "default").Err()
			return func() error { return root.Do(ctx, append([]any{"acl", "setuser", "default"}, give...)...).Err() }, err
		}
	}
	return []refusal{
		{"LOADING", "LOADING", "LOADING", "LOADING", func(ctx context.Context, root *redis.Client) (func() error, error) {
			ended := make(chan error, 1)
			go func() { ended <- root.Do(ctx, "debug", "reload").Err() }()
			return func() error { return <-ended }, nil
		}},
		{"READONLY", "", "READONLY", "READONLY", replica("yes")},
		{"MASTERDOWN", "MASTERDOWN", "READONLY", "READONLY", replica("no")},
		{"MISCONF", "", "MISCONF", "MISCONF", func(ctx context.Context, root *redis.Client) (func() error, error) {
			// Nothing can be saved in a directory that is not there any more.
			gone := filepath.Join(dir, "gone")
			if err := os.Mkdir(gone, 0o700); err != nil {
				return nil, err
			}
			for _, kv := range [][2]string{{"dir", gone}, {"save", "3600 1"}} {
				if err := root.ConfigSet(ctx, kv[0], kv[1]).Err(); err != nil {
					return nil, err
				}
			}
			if err := os.Remove(gone); err != nil {
				return nil, err
			}
			return func() error { return root.ConfigSet(ctx, "save", "").Err() }, root.BgSave(ctx).Err()
		}},
		{"OOM", "", "", "OOM", set("maxmemory", "1", "0")},
		{"NOREPLICAS", "", "NOREPLICAS", "NOREPLICAS", set("min-replicas-to-write", "1", "0")},
		// Of who has no password Redis reads ten arguments at most.
		{"NOAUTH", "auth", "auth", "auth", rights([]any{"resetpass", ">secret"}, []any{"nopass"})},
		{"NOPERM", "NOPERM", "NOPERM", "NOPERM", rights([]any{"-@all"}, []any{"+@all"})},
		{"BUSY", "BUSY", "BUSY", "BUSY", func(ctx context.Context, root *redis.Client) (func() error, error) {
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				_ = root.Eval(ctx, "while true do end", nil).Err() // it is killed
			}()
			return func() error {
				err := root.ScriptKill(ctx).Err()
				<-ended
				return err
			}, nil
		}},
	}
}

// call is one use of the register, and what its error must say.
type call struct {
	what, want string
	do         func(context.Context) error
}

func (r refusal) calls(s *registrar.Store, addr netip.AddrPort) []call {
	web := []registrar.Service{"web"}
	return []call{
		{"read", r.read, func(ctx context.Context) error { _, err := s.Read(ctx, "web", nil); return err }},
		{"versions", r.read, func(ctx context.Context) error { _, err := s.Versions(ctx, web); return err }},
		{"services", r.read, func(ctx context.Context) error { _, _, err := s.Services(ctx); return err }},
		{"survey", r.read, func(ctx context.Context) error { _, err := s.Survey(ctx, web, 1, 1, 1); return err }},
		{"acks", r.read, func(ctx context.Context) error { _, err := s.Acks(ctx, "web"); return err }},
		{"pulse", r.write, func(ctx context.Context) error { _, err := s.Pulse(ctx, "r", "token", time.Minute); return err }},
		{"reap", r.write, func(ctx context.Context) error {
			_, err := s.Reap(ctx, "web", registrar.Sweep{ID: "r", Token: "another"})
			return err
		}},
		{"beat", r.beat, func(ctx context.Context) error {
			_, err := s.Beat(ctx, "api", registrar.Beat{Addr: addr, Token: "t", Meta: `{"id":"t"}`})
			return err
		}},
	}
}

// TestRefusals has a Redis that runs refuse in every way that it knows. Each call
// of the register then returns an error and never an empty answer; who watches,
// who beats and HAProxy keep what they have; and all of them go on as soon as it
// answers again.
func TestRefusals(t *testing.T) {
	const interval = time.Second
	srv := redistest.Start(t, "--enable-debug-command", "yes", "--enable-protected-configs", "yes", "--busy-reply-threshold", "20",
		"--key-load-delay", "10000", "--loading-process-events-interval-bytes", "1024")
	ctx := t.Context()
	if err := srv.Client(t).Do(ctx, "acl", "setuser", "root", "on", "nopass", "~*", "&*", "+@all").Err(); err != nil {
		t.Fatal(err)
	}
	root := redis.NewClient(&redis.Options{Network: "unix", Addr: srv.Socket, Username: "root", Password: "x", MaxRetries: -1, ReadTimeout: -1})
	defer root.Close()
	for i := range 300 { // so that loading takes 3 s
		if err := root.Set(ctx, fmt.Sprint("filler", i), strings.Repeat("x", 2000), 0).Err(); err != nil {
			t.Fatal(err)
		}
	}

	said := &lockedLog{}
	w := &world{redis: srv, log: zerolog.New(said).With().Timestamp().Logger()}
	defer func() {
		if t.Failed() {
			t.Log(said)
		}
	}()
	w.ha = haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 5}}})
	open := func() *registrar.Store {
		rdb, err := registrar.Open(srv.URL(), 3)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = rdb.Close() })
		s, err := registrar.NewStore(rdb, registrar.DefaultNamespace)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	w.store = open()
	w.cfg.ID, w.cfg.Allow, w.cfg.Probe = "test", loopback, 50*time.Millisecond
	w.cfg.Backends = []lbsync.BackendConfig{{Service: "web", Backend: "be", Mode: lbsync.Auto}}
	bal := w.client(t)

	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	var all sync.WaitGroup
	defer all.Wait()
	defer stop()
	start := func(run func(context.Context) error) {
		all.Go(func() {
			if err := run(running); err != nil {
				t.Error(err)
			}
		})
	}
	is := []*haproxytest.Instance{haproxytest.NewInstance(t), haproxytest.NewInstance(t)}
	for _, i := range is {
		b, err := registrar.NewBeater(registrar.BeaterConfig{Service: "web", Addr: i.Addr(), Weight: 100, Interval: interval}, open(), w.log)
		if err != nil {
			t.Fatal(err)
		}
		start(b.Run)
	}
	watcher, err := notifier.New(notifier.Config{Services: []registrar.Service{"web"}, Poll: interval}, open(), w.log)
	if err != nil {
		t.Fatal(err)
	}
	var view notifier.View
	was := map[netip.AddrPort]bool{}
	start(func(ctx context.Context) error {
		return watcher.Run(ctx, func(c notifier.Change) {
			view.Apply(c)
			for _, i := range is {
				here := view.Lookup(i.Addr()).Present
				if was[i.Addr()] && !here && running.Err() == nil {
					t.Errorf("the Watcher has lost %s", i.Addr())
				}
				was[i.Addr()] = here
			}
		})
	})
	w.run(t, bal)
	w.want(t, "be", ready(100, is...))
	third := haproxytest.NewInstance(t)
	own := open()

	for _, r := range refusals(srv.Dir) {
		t.Run(r.name, func(t *testing.T) {
			end, err := r.begin(ctx, root)
			if err != nil {
				t.Fatal(err)
			}
			end = sync.OnceValue(end)
			defer func() { _ = end() }() // its error has been seen, unless the test failed before
			// Each call says the word, once the fault is there; nothing else but
			// success is heard before.
			for _, c := range r.calls(own, third.Addr()) {
				haproxytest.Poll(t, c.what+" is refused", func() error {
					tctx, cancel := registrar.WithTimeout(ctx)
					defer cancel()
					err := c.do(tctx)
					if c.want == "" && err == nil || c.want != "" && err != nil && says(err.Error(), c.want) {
						return nil
					}
					return fmt.Errorf("%s: %v, want %q", c.what, err, c.want)
				})
			}
			// Who loops has met it as well.
			if r.beat != "" {
				haproxytest.Poll(t, "both beaters were refused", func() error { return said.since(r.beat, "beat failed", len(is)) })
			}
			if r.read != "" {
				away := "redis does not answer;"
				if r.name == "NOAUTH" || r.name == "NOPERM" {
					away = "redis refuses;"
				}
				haproxytest.Poll(t, "the Watcher was refused", func() error { return said.since(r.read, away, 1) })
			}
			if got := w.servers(t, "be"); fmt.Sprint(got) != fmt.Sprint(ready(100, is...)) {
				t.Errorf("HAProxy has %v", got)
			}
			if err := end(); err != nil {
				t.Fatal(err)
			}
			over := time.Now()
			ms := root.Time(ctx).Val().UnixMilli()
			for _, i := range is {
				haproxytest.Poll(t, "it beats again", func() error {
					score, err := root.ZScore(ctx, own.Keys().Instances("web"), i.Addr().String()).Result()
					if err == nil && int64(score) < ms {
						err = fmt.Errorf("last beat %d ms before the end", ms-int64(score))
					}
					return err
				})
			}
			beaten := time.Since(over)
			w.token = map[netip.AddrPort]string{}
			w.beat(t, third.Addr(), 100)
			w.want(t, "be", ready(100, append(is[:2:2], third)...))
			heard := time.Since(over)
			w.leave(t, third.Addr())
			w.want(t, "be", ready(100, is...))
			t.Logf("over: all had beaten after %v, and HAProxy had the next change after %v", beaten, heard)
			// The interval, and a second in which a pool remembers a failed dial.
			if beaten > interval+2*time.Second || heard > beaten+4*time.Second {
				t.Errorf("beats after %v, the change after %v", beaten, heard)
			}
			said.forget()
		})
	}
}

func says(text, word string) bool {
	return strings.Contains(strings.ToLower(text), strings.ToLower(word))
}

// lockedLog is a log that is read while it is written.
type lockedLog struct {
	mu   sync.Mutex
	text strings.Builder
	from int
}

func (l *lockedLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lockedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// forget makes since begin here.
func (l *lockedLog) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.from = l.text.Len()
}

// since wants n lines with both texts.
func (l *lockedLog) since(a, b string, n int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	got := 0
	for line := range strings.Lines(l.text.String()[l.from:]) {
		if says(line, a) && strings.Contains(line, b) {
			got++
		}
	}
	if got < n {
		return fmt.Errorf("%d lines with %q and %q, want %d", got, a, b, n)
	}
	return nil
}

// TestRefusalsOfCluster asks a node of a Redis Cluster that serves no slots.
func TestRefusalsOfCluster(t *testing.T) {
	srv := redistest.Start(t, "--cluster-enabled", "yes")
	rdb, err := registrar.Access{}.OpenNode("redis+cluster://"+srv.Addr, srv.Addr, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer rdb.Close()
	store, err := registrar.NewStore(rdb, registrar.DefaultNamespace)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range (refusal{}).calls(store, netip.MustParseAddrPort("10.0.0.1:1")) {
		ctx, cancel := registrar.WithTimeout(t.Context())
		if err := c.do(ctx); err == nil || !says(err.Error(), "CLUSTERDOWN") && !says(err.Error(), "CROSSSLOT") {
			t.Errorf("%s: %v", c.what, err)
		} else {
			t.Logf("%s: %v", c.what, err)
		}
		cancel()
	}
}

// TestFlood has a stranger fill a service with more than anybody reads. HAProxy
// keeps what it has, the log says why, and all goes on when the flood is gone.
func TestFlood(t *testing.T) {
	w := newWorld(t, haproxytest.Backend{Name: "be", Slots: 5}, "")
	said := &lockedLog{}
	w.log = zerolog.New(said)
	ctx, k, rdb := t.Context(), w.store.Keys(), w.redis.Client(t)
	a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
	w.beat(t, a.Addr(), 100)
	w.run(t, w.client(t))
	w.want(t, "be", ready(100, a))
	write := func(script string) {
		t.Helper()
		if err := rdb.Eval(ctx, script+" redis.call('INCR', KEYS[3]) redis.call('INCR', KEYS[2]) redis.call('PUBLISH', ARGV[1], '1 web 1') return 1",
			[]string{k.Instances("web"), k.ServiceVersion("web"), k.Version()}, k.Changes(), registrar.ReadLimit).Err(); err != nil {
			t.Fatal(err)
		}
	}
	write("for i = 1, ARGV[2] do redis.call('ZADD', KEYS[1], 1, 'x' .. i) end")
	haproxytest.Poll(t, "lbsync says so", func() error {
		return said.since(k.Instances("web")+" has 100001 entries", "cannot read this service; what is known of it stays in force", 1)
	})
	w.want(t, "be", ready(100, a))
	write("redis.call('ZREMRANGEBYSCORE', KEYS[1], 1, 1)")
	w.beat(t, b.Addr(), 100)
	w.want(t, "be", ready(100, a, b))
	if err := said.since("cannot read this service", "", 2); err == nil {
		t.Errorf("said more than once:\n%s", said)
	}
}
