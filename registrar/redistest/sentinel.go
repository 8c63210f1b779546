package redistest

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/redis/go-redis/v9"
)

// Watched is a primary with its replicas and the Sentinels that watch them, as they
// were started.
type Watched struct {
	Name      string
	Primary   *Server
	Replicas  []*Server
	Sentinels []*Server
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
	for _, s := range w.Sentinels {
		w.Knows(tb, s, len(w.Sentinels)-1)
	}
	return w
}

// Knows waits until s knows the replicas and so many other Sentinels.
func (w *Watched) Knows(tb testing.TB, s *Server, others int) {
	tb.Helper()
	rdb := redis.NewSentinelClient(&redis.Options{Addr: s.Addr, MaxRetries: -1})
	defer rdb.Close()
	poll(tb, func() error {
		m, err := rdb.Master(tb.Context(), w.Name).Result()
		if err != nil {
			return err
		}
		if m["num-slaves"] != fmt.Sprint(len(w.Replicas)) || m["num-other-sentinels"] != fmt.Sprint(others) {
			return fmt.Errorf("%s knows %s replicas and %s other Sentinels", s.Addr, m["num-slaves"], m["num-other-sentinels"])
		}
		return nil
	})
}

// URL names the Sentinels as --redis takes them.
func (w *Watched) URL() string {
	addrs := make([]string, len(w.Sentinels))
	for i, s := range w.Sentinels {
		addrs[i] = s.Addr
	}
	return "redis+sentinel://" + strings.Join(addrs, ",") + "/" + w.Name + "/0"
}

// Promoted waits until a Sentinel names another primary than w.Primary, and returns it.
func (w *Watched) Promoted(tb testing.TB) *Server {
	tb.Helper()
	var found *Server
	poll(tb, func() error {
		for _, s := range w.Sentinels {
			addr, err := w.names(tb, s)
			if err != nil {
				return err
			}
			if i := slices.IndexFunc(w.Replicas, func(r *Server) bool { return r.Addr == addr }); i >= 0 {
				found = w.Replicas[i]
				return nil
			}
		}
		return fmt.Errorf("the primary is still %s", w.Primary.Addr)
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
