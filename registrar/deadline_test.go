package registrar

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"rollcall/registrar/redistest"
)

// witness is a hook that looks at the deadlines of what passes.
type witness struct {
	mu   sync.Mutex
	seen map[string]int // guarded by mu
	bad  []string       // guarded by mu
}

func (w *witness) look(ctx context.Context, cmds ...redis.Cmder) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.seen == nil {
		w.seen = map[string]int{}
	}
	for _, cmd := range cmds {
		w.seen[cmd.Name()]++
		if end, ok := ctx.Deadline(); !ok || time.Until(end) > Timeout {
			w.bad = append(w.bad, fmt.Sprintf("%v: deadline %v", cmd.Args(), end))
		}
	}
}

func (w *witness) count(name string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.seen[name]
}

func (w *witness) DialHook(next redis.DialHook) redis.DialHook { return next }

func (w *witness) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		w.look(ctx, cmd)
		return next(ctx, cmd)
	}
}

func (w *witness) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		w.look(ctx, cmds...)
		return next(ctx, cmds)
	}
}

// TestDeadlines has every form send something with a context that never ends:
// each exchange, a Cluster's map among them, has a deadline nevertheless.
func TestDeadlines(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t)
	for _, url := range []string{srv.URL(), "redis+sentinel://" + srv.Addr + "/m", "redis+cluster://" + srv.Addr} { // which is neither
		rdb, err := Open(url, 1)
		must(t, err)
		var w witness
		rdb.AddHook(&w)
		if c, ok := rdb.(*redis.ClusterClient); ok {
			c.OnNewNode(func(node *redis.Client) { node.AddHook(&w) })
		}
		never := context.WithoutCancel(t.Context())
		_ = rdb.Get(never, "x") // what comes of it does not matter
		_, _ = rdb.Pipelined(never, func(p redis.Pipeliner) error { p.Get(never, "x"); return nil })
		if c, ok := rdb.(*redis.ClusterClient); ok {
			// go-redis asks for the map in the background, with no context of anybody's.
			before := w.count("cluster")
			eventually(t, func() error {
				c.ReloadState(never)
				if w.count("cluster") == before {
					return errors.New("the map is not asked for")
				}
				return nil
			})
		}
		must(t, rdb.Close())
		if w.count("get") < 2 || len(w.bad) > 0 {
			t.Errorf("%s: saw %v; without a deadline: %v", url, w.seen, w.bad)
		}
	}
}

// TestHung stops every server of each form: a call without a deadline of its own
// comes back, also while nobody says where the primary is, and also when it has
// to make a connection first.
func TestHung(t *testing.T) {
	t.Parallel()
	one := redistest.Start(t)
	sentinel := one.StartSentinel(t, "m")
	nodes := redistest.StartCluster(t, 3)
	for _, form := range []struct {
		url  string
		stop []*redistest.Server
	}{
		{one.URL(), []*redistest.Server{one}},
		{"redis+sentinel://" + sentinel.Addr + "/m", []*redistest.Server{sentinel}},
		{nodes.URL(), nodes},
	} {
		used, err := Open(form.url, 1)
		must(t, err)
		fresh, err := Open(form.url, 1)
		must(t, err)
		must(t, used.Set(t.Context(), "x", "y", 0).Err())
		for _, s := range form.stop {
			s.Signal(t, syscall.SIGSTOP)
		}
		for name, rdb := range map[string]redis.UniversalClient{"used": used, "fresh": fresh} {
			if strings.Contains(form.url, "sentinel") && name == "used" {
				continue // it has its connection to the primary, which is not stopped
			}
			begun := time.Now()
			err := rdb.Get(context.WithoutCancel(t.Context()), "x").Err()
			took := time.Since(begun)
			t.Logf("%s, %s: %v after %v", form.url, name, err, took.Round(time.Millisecond))
			if !Passing(err) || took > 5*Timeout { // without any it would be many times that
				t.Errorf("%s, %s: %v after %v", form.url, name, err, took)
			}
		}
		for _, s := range form.stop {
			s.Signal(t, syscall.SIGCONT)
		}
		must(t, used.Close())
		must(t, fresh.Close())
	}
}

// TestTry has calls that fail for a while, for good, and for ever.
func TestTry(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		err   error
		fails int // in a row, with err
		tries int // that there must be; 0 = two or more
	}{
		{"once", io.EOF, 0, 1},
		{"passing", fmt.Errorf("x: %w", refusal("LOADING Redis is loading")), 2, 3},
		{"no rights", refusal("NOPERM no"), 9, 1},
		{"an answer", fmt.Errorf("leave: %w", ErrAbsent), 9, 1},
		{"for ever", &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}, 1 << 30, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			tries := 0
			got, err := Try(t.Context(), func(ctx context.Context) (int, error) {
				tries++
				if end, ok := ctx.Deadline(); !ok || time.Until(end) > TryFor {
					t.Errorf("deadline %v", end)
				}
				if tries <= c.fails {
					return tries, c.err
				}
				return tries, nil
			})
			if got != tries || (err != nil) != (tries <= c.fails) || c.tries > 0 && tries != c.tries || c.tries == 0 && tries < 2 {
				t.Errorf("%d, %v after %d tries", got, err, tries)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Try(ctx, func(ctx context.Context) (int, error) { return 0, io.EOF }); !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %v", err)
	}
}

type refusal string

func (r refusal) Error() string { return string(r) }
func (r refusal) RedisError()   {}

// TestSentinelPassword changes the Sentinel's own password, in it and in the
// file: the next connection to it uses the new one. The data node never hears it.
func TestSentinelPassword(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t)
	sentinel := srv.StartSentinel(t, "m")
	file := filepath.Join(t.TempDir(), "password")
	root, data := sentinel.Client(t), srv.Client(t)
	ctx := t.Context()
	for _, user := range []string{"default", "watcher"} {
		a := Access{SentinelPassword: func() (string, error) {
			b, err := os.ReadFile(file)
			return string(b), err
		}}
		if user != "default" {
			a.SentinelUser = user
		}
		rdb, err := a.Open("redis+sentinel://"+sentinel.Addr+"/m", 1)
		must(t, err)
		for i, password := range []string{"first", "second"} {
			must(t, root.Do(ctx, "ACL", "SETUSER", user, "on", "resetpass", ">"+password, "allchannels", "+@all").Err())
			must(t, root.ClientKillByFilter(ctx, "TYPE", "pubsub").Err())
			must(t, root.ClientKillByFilter(ctx, "TYPE", "normal", "SKIPME", "yes").Err())
			must(t, data.ClientKillByFilter(ctx, "TYPE", "normal", "SKIPME", "yes").Err())
			if i > 0 { // else the other user's
				if err := rdb.Ping(ctx).Err(); err == nil {
					t.Errorf("%s: the old password was taken", user)
				}
			}
			must(t, os.WriteFile(file, []byte(password), 0o600))
			eventually(t, func() error { return rdb.Ping(ctx).Err() })
		}
		must(t, rdb.Close())
	}
	if stats := data.Info(ctx, "commandstats").Val(); strings.Contains(stats, "cmdstat_auth:") || !strings.Contains(stats, "cmdstat_ping:") {
		t.Errorf("the data node was asked to log somebody in: %s", stats)
	}
}
