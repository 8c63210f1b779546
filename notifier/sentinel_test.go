package notifier

import (
	"context"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"

	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// TestSentinelFailover moves the primary under a Watcher that knows only the
// Sentinels: it must subscribe to the new primary and hear of a change there. An
// old primary that lives on goes on answering the subscription, until Sentinel
// makes it a replica, 8 s later at the earliest.
func TestSentinelFailover(t *testing.T) {
	t.Run("the old primary dies", func(t *testing.T) {
		sentinelFailover(t, func(_ *redis.SentinelClient, primary *redistest.Server) { primary.Kill(t) })
	})
	t.Run("the old primary lives on", func(t *testing.T) {
		said := sentinelFailover(t, func(asked *redis.SentinelClient, _ *redistest.Server) {
			must(t, asked.Failover(t.Context(), "mymaster").Err())
		})
		if said.count("another server answers the reads") != 1 {
			t.Errorf("the subscription was not cut by the Watcher:\n%s", said)
		}
	})
}

func sentinelFailover(t *testing.T, fail func(*redis.SentinelClient, *redistest.Server)) *logs {
	t.Helper()
	said := &logs{}
	primary := redistest.Start(t)
	replicas := []*redistest.Server{primary.StartReplica(t), primary.StartReplica(t)}
	url := "redis+sentinel://"
	var sentinels []*redistest.Server
	for i := range 3 {
		s := primary.StartSentinel(t, "mymaster")
		if i > 0 {
			url += ","
		}
		url += s.Addr
		sentinels = append(sentinels, s)
	}
	until := func(what string, limit time.Duration, ok func(context.Context) bool) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for !ok(ctx) {
			select {
			case <-ctx.Done():
				t.Fatalf("%s: not within %v", what, limit)
			case <-tick.C:
			}
		}
	}
	asked := redis.NewSentinelClient(&redis.Options{Addr: sentinels[0].Addr, MaxRetries: -1})
	defer asked.Close()
	until("Sentinels know the replicas and each other", 20*time.Second, func(ctx context.Context) bool {
		m, err := asked.Master(ctx, "mymaster").Result()
		return err == nil && m["num-slaves"] == "2" && m["num-other-sentinels"] == "2"
	})
	rdb, err := registrar.Open(url+"/mymaster/0", 4)
	must(t, err)
	defer rdb.Close()
	store, err := registrar.NewStore(rdb, "rollcall")
	must(t, err)
	w, err := New(Config{Services: []registrar.Service{"web"}, Poll: time.Minute}, store, zerolog.New(said))
	must(t, err)
	changes := make(chan Change, 100)
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := w.Run(ctx, func(c Change) { changes <- c }); err != nil {
			t.Error(err)
		}
	})
	defer running.Wait()
	defer cancel()
	until("a subscription", 5*time.Second, func(context.Context) bool { return w.Alive() })
	beat := func(ctx context.Context, port uint16) error {
		tctx, cancel := registrar.WithTimeout(ctx)
		defer cancel()
		_, err := store.Beat(tctx, "web", registrar.Beat{Addr: netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), port), Token: "t", Meta: `{"id":"t"}`})
		return err
	}
	must(t, beat(t.Context(), 1))

	began := time.Now()
	fail(asked, primary)
	var now string
	until("another primary", 20*time.Second, func(ctx context.Context) bool {
		a, err := asked.GetMasterAddrByName(ctx, "mymaster").Result()
		if err == nil && a[0] != primary.Host {
			now = a[0]
		}
		return now != ""
	})
	switched := time.Now()
	until("a beat", 10*time.Second, func(ctx context.Context) bool { return beat(ctx, 2) == nil })
	written := time.Now()
	for _, r := range replicas {
		if r.Host == now {
			c := r.Client(t)
			until("a subscription to the new primary", 7*time.Second, func(ctx context.Context) bool {
				n, err := c.PubSubNumSub(ctx, "rollcall:changes").Result()
				return err == nil && n["rollcall:changes"] == 1
			})
		}
	}
	t.Logf("the switch took %v; then a beat was accepted after %v, and the watcher listened after %v",
		switched.Sub(began), written.Sub(switched), time.Since(switched))
	until("the change", 5*time.Second, func(context.Context) bool {
		select {
		case c := <-changes:
			for _, e := range c.Snapshot.Entries {
				if e.Present && e.Addr.Port() == 2 {
					return true
				}
			}
		default:
		}
		return false
	})
	return said
}
