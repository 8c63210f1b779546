package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// takeover is a Redis whose primary can be lost.
type takeover struct {
	url  string
	from *redistest.Server               // the primary, until another is
	lose func(ctx context.Context) error // begins a fail-over
	took func(ctx context.Context) error // nil when everybody can know of another primary
}

// sentineled is a primary with two replicas, which three Sentinels watch.
func sentineled(t *testing.T, killed bool) takeover {
	t.Helper()
	const name = "mymaster"
	primary := redistest.Start(t, "--repl-diskless-sync-delay", "0")
	f := takeover{from: primary}
	for range 2 {
		primary.StartReplica(t)
	}
	var addrs []string
	var asked []*redis.SentinelClient
	for range 3 {
		s := primary.StartSentinel(t, name)
		addrs = append(addrs, s.Addr)
		c := redis.NewSentinelClient(&redis.Options{Addr: s.Addr, MaxRetries: -1})
		t.Cleanup(func() { _ = c.Close() })
		asked = append(asked, c)
	}
	f.url = "redis+sentinel://" + strings.Join(addrs, ",") + "/" + name + "/0"
	for _, c := range asked {
		haproxytest.Poll(t, "a Sentinel knows the replicas and the others", func() error {
			m, err := c.Master(t.Context(), name).Result()
			if err == nil && (m["num-slaves"] != "2" || m["num-other-sentinels"] != "2") {
				err = fmt.Errorf("%s replicas, %s others", m["num-slaves"], m["num-other-sentinels"])
			}
			return err
		})
	}
	haproxytest.Poll(t, "the replicas have the data", func() error {
		info := primary.Client(t).Info(t.Context(), "replication").Val()
		if strings.Count(info, "state=online") != 2 {
			return errors.New(info)
		}
		return nil
	})
	// Each Sentinel hears it of the one that leads the fail-over.
	f.took = func(ctx context.Context) error {
		for _, c := range asked {
			if addr, err := c.GetMasterAddrByName(ctx, name).Result(); err != nil || addr[0] == primary.Host {
				return fmt.Errorf("%v: %w", addr, err)
			}
		}
		return nil
	}
	f.lose = func(ctx context.Context) error { return asked[0].Failover(ctx, name).Err() }
	if killed {
		f.lose = func(context.Context) error { primary.Kill(t); return nil }
	}
	return f
}

// clustered is a Cluster whose shard of the service web has a replica.
func clustered(t *testing.T, killed bool) takeover {
	t.Helper()
	nodes := redistest.StartCluster(t, 3)
	f := takeover{url: nodes.URL(), from: nodes[nodes.Shard(t, "{web}")]}
	replica := nodes.StartReplica(t, f.from)
	c := replica.Client(t)
	f.took = func(ctx context.Context) error {
		role, err := c.Do(ctx, "ROLE").Slice()
		if err == nil && role[0] != "master" {
			err = fmt.Errorf("%v", role)
		}
		return err
	}
	f.lose = func(ctx context.Context) error { return c.ClusterFailover(ctx).Err() }
	if killed {
		f.lose = func(context.Context) error { f.from.Kill(t); return nil }
	}
	return f
}

// TestLeaveInFailover stops instances before, in and after a fail-over. Each is out of
// HAProxy before its sidecar ends, and so before its app does, and soon after there is
// a primary again. HAProxy checks nobody, and no request fails.
//
// With ROLLCALL_GRID=1, as scripts/soak -leave sets it, one instance is stopped every
// 100 ms, else a few are.
func TestLeaveInFailover(t *testing.T) {
	t.Parallel()
	moments := []time.Duration{0, 200 * time.Millisecond, 600 * time.Millisecond, 1200 * time.Millisecond, 2 * time.Second, 3500 * time.Millisecond}
	if os.Getenv("ROLLCALL_GRID") != "" {
		moments = nil
		for at := -500 * time.Millisecond; at < 6*time.Second; at += 100 * time.Millisecond {
			moments = append(moments, at)
		}
	}
	for _, c := range []struct {
		name   string
		stage  func(t *testing.T, killed bool) takeover
		killed bool
	}{
		{"Sentinel, by command", sentineled, false},
		{"Sentinel, killed", sentineled, true},
		{"Cluster, by command", clustered, false},
		{"Cluster, killed", clustered, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			leaveInFailover(t, c.stage(t, c.killed), moments)
		})
	}
}

// leaver is one instance that stops.
type leaver struct {
	at                  time.Duration // after the fail-over's beginning
	side                *process
	app                 *haproxytest.Instance
	stopped, out, ended time.Time
	inTime              bool // HAProxy had no use for it when its sidecar had ended
	addr                string
}

func leaveInFailover(t *testing.T, f takeover, moments []time.Duration) {
	s := &system{redis: f.from, ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{
		{Name: "be", Slots: len(moments) + 4, Balance: "roundrobin"},
	}})}
	at := "--redis=" + f.url
	lb := s.spawn(t, "lbsync", at, "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8")
	join := func() (*process, *haproxytest.Instance) {
		i := haproxytest.NewInstance(t)
		return s.spawn(t, "register", at, "--service", "web", "--addr", i.Addr().String()), i
	}
	var all []*haproxytest.Instance
	for range 2 { // that stay
		_, i := join()
		all = append(all, i)
	}
	var ls []*leaver
	for _, m := range moments {
		l := &leaver{at: m}
		l.side, l.app = join()
		l.addr = l.app.Addr().String()
		ls, all = append(ls, l), append(all, l.app)
	}
	url := "http://" + s.ha.Addr("be") + "/"
	answered(t, url, all...)
	requests := startLoad(t, url)

	// ready returns the addresses of which HAProxy sends requests to a server. Many
	// connections at once are more than its socket takes.
	var looking sync.Mutex
	ready := func() map[string]bool {
		looking.Lock()
		defer looking.Unlock()
		found := map[string]bool{}
		for line := range strings.Lines(s.ha.Command(t, "show servers state be")) {
			x := strings.Fields(line)
			if len(x) < 19 {
				continue
			}
			const out = 1 | 2 | 8 | 16 | 32 // any of maint and drain
			if state, err := strconv.Atoi(x[6]); err == nil && state&out == 0 && x[5] == "2" && x[7] != "0" {
				found[x[4]+":"+x[18]] = true
			}
		}
		return found
	}
	begin := time.Now().Add(-slices.Min(moments)).Add(300 * time.Millisecond)
	var playing sync.WaitGroup
	for _, l := range ls {
		playing.Go(func() {
			time.Sleep(time.Until(begin.Add(l.at))) // the moment is what is tested
			_ = l.side.cmd.Process.Signal(syscall.SIGTERM)
			l.stopped = time.Now()
			tick := time.NewTicker(10 * time.Millisecond)
			defer tick.Stop()
			for limit := time.Now().Add(30 * time.Second); l.out.IsZero() || l.ended.IsZero(); <-tick.C {
				if time.Now().After(limit) {
					t.Errorf("%s, stopped at %v: out %v, ended %v", l.addr, l.at, !l.out.IsZero(), !l.ended.IsZero())
					return
				}
				ended := false
				select {
				case <-l.side.done:
					ended = l.ended.IsZero()
				default:
				}
				if ended {
					l.ended = time.Now()
				}
				is := ready()[l.addr]
				if !is && l.out.IsZero() {
					l.out = time.Now()
				}
				if ended {
					l.inTime = !is
					l.app.Close()
				}
			}
		})
	}
	time.Sleep(time.Until(begin))
	if err := f.lose(t.Context()); err != nil {
		t.Error(err)
	}
	haproxytest.Poll(t, "there is another primary", func() error { return f.took(t.Context()) })
	again := time.Now()
	playing.Wait()
	t.Logf("another primary after %v", again.Sub(begin).Round(time.Millisecond))
	var worst time.Duration
	for _, l := range ls {
		from := l.stopped
		if from.Before(again) && f.lost(l.out, begin, again) {
			from = again
		}
		took := l.out.Sub(from)
		worst = max(worst, took)
		t.Logf("stopped at %v: out of HAProxy %v later, %v after there was a primary; its sidecar ended %v after the stop",
			l.at, l.out.Sub(l.stopped).Round(time.Millisecond), took.Round(time.Millisecond), l.ended.Sub(l.stopped).Round(time.Millisecond))
		if !l.inTime || l.ended.IsZero() {
			t.Errorf("stopped at %v: HAProxy still sent requests when the sidecar had ended", l.at)
		}
		if out := l.side.out.String(); !strings.Contains(out, "INF left") || l.side.cmd.ProcessState.ExitCode() != 0 {
			t.Errorf("stopped at %v: exit %d\n%s", l.at, l.side.cmd.ProcessState.ExitCode(), out)
		}
	}
	// The bound is 1 s, for a machine with nothing else to do.
	bound := 4 * time.Second
	if os.Getenv("ROLLCALL_GRID") != "" {
		bound = time.Second
	}
	if worst > bound {
		t.Errorf("the last was out of HAProxy %v after there was a primary", worst)
	}
	t.Logf("the last was out %v after it could be", worst.Round(time.Millisecond))
	answered(t, url, all[:2]...)
	haproxytest.Poll(t, "nobody comes back", func() error {
		if time.Since(again) < 2*time.Second {
			return errors.New("not yet")
		}
		return nil
	})
	if n := len(ready()); n != 2 {
		t.Errorf("HAProxy sends requests to %d servers", n)
	}
	requests.none(t)
	if strings.Contains(lb.out.String(), " kept ") {
		t.Error("lbsync kept a server of an instance that had said that it leaves")
	}
}

// lost tells whether an instance that was out then can have said so to nobody before.
func (f takeover) lost(out, begin, again time.Time) bool {
	return out.After(again) && begin.Before(again)
}
