package redistest

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// electionTimeout bounds a fail-over. Where two Sentinels begin one at the same time, they
// try again 10 s later.
const electionTimeout = 40 * time.Second

// Watched is a primary with its replicas and the Sentinels that watch them, as they
// were started.
type Watched struct {
	Name      string
	Primary   *Server
	Replicas  []*Server
	Sentinels []*Server // that live
}

// StartWatched runs a primary with so many replicas, and three Sentinels, which know
// all of them and each other when it returns.
func StartWatched(tb testing.TB, name string, replicas int) *Watched {
	tb.Helper()
	w := &Watched{Name: name, Primary: Start(tb)}
	for range replicas {
		w.Replicas = append(w.Replicas, w.Primary.StartReplica(tb))
	}
	for range 3 {
		w.Sentinels = append(w.Sentinels, w.Primary.StartSentinel(tb, name))
	}
	w.meet(tb)
	return w
}

// meet waits until each Sentinel knows the replicas and the others.
func (w *Watched) meet(tb testing.TB) {
	tb.Helper()
	for _, s := range w.Sentinels {
		w.knows(tb, s)
	}
}

func (w *Watched) knows(tb testing.TB, s *Server) {
	tb.Helper()
	rdb := redis.NewSentinelClient(&redis.Options{Addr: s.Addr, MaxRetries: -1})
	defer rdb.Close()
	poll(tb, func() error {
		replicas, err := rdb.Replicas(tb.Context(), w.Name).Result()
		if err != nil {
			return err
		}
		others, err := rdb.Sentinels(tb.Context(), w.Name).Result()
		if err != nil {
			return err
		}
		known := map[string]bool{s.Host: true}
		for _, o := range slices.Concat(replicas, others) {
			known[o["ip"]] = true
		}
		for _, o := range slices.Concat(w.Replicas, w.Sentinels) {
			if !known[o.Host] {
				return fmt.Errorf("%s does not know %s", s.Addr, o.Addr)
			}
		}
		return nil
	})
}

// AddSentinels starts n more, and waits until all that live know them.
func (w *Watched) AddSentinels(tb testing.TB, n int) {
	tb.Helper()
	for range n {
		w.Sentinels = append(w.Sentinels, w.Primary.StartSentinel(tb, w.Name))
	}
	w.meet(tb)
}

// URL names the Sentinels as --redis takes them.
func (w *Watched) URL() string {
	addrs := make([]string, len(w.Sentinels))
	for i, s := range w.Sentinels {
		addrs[i] = s.Addr
	}
	return "redis+sentinel://" + strings.Join(addrs, ",") + "/" + w.Name + "/0"
}

// Promoted waits until every Sentinel names another primary than w.Primary, and returns
// it. One of them names it first; the others hear of it within two seconds.
func (w *Watched) Promoted(tb testing.TB) *Server {
	tb.Helper()
	var found *Server
	pollFor(tb, electionTimeout, func() error {
		for _, s := range w.Sentinels {
			addr, err := w.names(tb, s)
			if err != nil {
				return err
			}
			i := slices.IndexFunc(w.Replicas, func(r *Server) bool { return r.Addr == addr })
			if i < 0 {
				return fmt.Errorf("the primary of %s is still %s", s.Addr, addr)
			}
			found = w.Replicas[i]
		}
		return nil
	})
	return found
}

// names returns the primary that s names.
func (w *Watched) names(tb testing.TB, s *Server) (string, error) {
	rdb := redis.NewSentinelClient(&redis.Options{Addr: s.Addr, MaxRetries: -1})
	defer rdb.Close()
	a, err := rdb.GetMasterAddrByName(tb.Context(), w.Name).Result()
	if err != nil {
		return "", err
	}
	return net.JoinHostPort(a[0], a[1]), nil
}
