package registrar

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"

	"rollcall/registrar/redistest"
)

// follower runs a Follower that asks dns until the test ends.
func follower(tb testing.TB, dns *redistest.DNS) (*Follower, *lines) {
	tb.Helper()
	l := &lines{}
	var resolver *net.Resolver
	if dns != nil {
		resolver = dns.Resolver()
	}
	f := NewFollower(resolver, zerolog.New(l))
	ctx, cancel := context.WithCancel(context.WithoutCancel(tb.Context()))
	var running sync.WaitGroup
	running.Go(func() { f.Run(ctx) })
	tb.Cleanup(func() {
		cancel()
		running.Wait()
	})
	return f, l
}

// lines is a log.
type lines struct {
	mu  sync.Mutex
	all []string // guarded by mu
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, string(b))
	return len(b), nil
}

func (l *lines) said() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.all)
}

// openFollowed returns a store on url that f follows.
func openFollowed(tb testing.TB, a Access, f *Follower, url string, pool int) *Store {
	tb.Helper()
	a.Follow = f
	rdb, err := a.Open(url, pool)
	must(tb, err)
	tb.Cleanup(func() {
		if err := rdb.Close(); err != nil {
			tb.Error(err)
		}
	})
	s, err := NewStore(rdb, DefaultNamespace)
	must(tb, err)
	return s
}

// TestFollowName points a name at another server while the one before lives on: a
// Beater goes there with no failure, also with TLS, a subscription too, and nothing is
// asked of the one before.
func TestFollowName(t *testing.T) {
	t.Parallel()
	for _, secure := range []bool{false, true} {
		t.Run(fmt.Sprintf("TLS %v", secure), func(t *testing.T) {
			t.Parallel()
			var args []string
			access, scheme := Access{}, "redis"
			if secure {
				certs := redistest.NewCertificates(t)
				args, scheme = certs.Args(), "rediss"
				access.CA, access.Cert, access.Key = certs.CA, certs.Cert, certs.Key
			}
			first, second := redistest.Start(t, args...), redistest.Start(t, args...)
			dns := redistest.StartDNS(t)
			dns.Point(redistest.NameTLS, first.Host)
			f, said := follower(t, dns)
			s := openFollowed(t, access, f, scheme+"://"+redistest.NameTLS+":6379/0", 2)
			failed := errors.New("none yet")
			b, err := NewBeater(BeaterConfig{Service: web, Addr: netip.MustParseAddrPort("10.0.0.1:80"), Interval: 100 * time.Millisecond, Beaten: func(err error) {
				if err != nil {
					failed = err
				}
			}}, s, zerolog.Nop())
			must(t, err)
			failed = nil
			r := start(t, b)
			one, two := first.Client(t), second.Client(t)
			at := func(c *redis.Client) error {
				if n := c.ZCard(t.Context(), "rollcall:{web}:instances").Val(); n != 1 {
					return fmt.Errorf("%d instances at %s", n, c)
				}
				return nil
			}
			eventually(t, func() error { return at(one) })
			ps := s.Subscribe(t.Context())
			defer ps.Close()
			if _, err := ps.Receive(t.Context()); err != nil {
				t.Fatal(err)
			}
			moved := time.Now()
			dns.Point(redistest.NameTLS, second.Host)
			eventually(t, func() error { return at(two) })
			t.Logf("the instance is at the other server after %v", time.Since(moved))
			if time.Since(moved) > time.Minute {
				t.Error("that is more than a minute")
			}
			for err := error(nil); err == nil; { // who subscribed hears that it is over
				_, err = ps.ReceiveTimeout(t.Context(), 30*time.Second)
				if err != nil && strings.Contains(err.Error(), "timeout") {
					t.Error("the subscription stays")
				}
			}
			eventually(t, func() error {
				list := one.ClientList(t.Context()).Val()
				if n := strings.Count(list, "\n"); n != 1 { // this one
					return fmt.Errorf("%d connections to the server before:\n%s", n, list)
				}
				return nil
			})
			if err := r.stop(t); err != nil {
				t.Error(err)
			}
			if failed != nil {
				t.Errorf("a heartbeat failed: %v", failed)
			}
			if lines := said.said(); len(lines) != 1 || !strings.Contains(lines[0], "names another server now") {
				t.Errorf("said %q", lines)
			}
		})
	}
}

// TestFollowNothing: a look-up that fails, and one more address, move nobody.
func TestFollowNothing(t *testing.T) {
	t.Parallel()
	first, second := redistest.Start(t), redistest.Start(t)
	dns := redistest.StartDNS(t)
	dns.Point("registry.test", first.Host)
	f, _ := follower(t, dns)
	s := openFollowed(t, Access{}, f, "redis://registry.test/0", 1)
	id := func(s *Store) string {
		t.Helper()
		info, err := s.rdb.InfoMap(t.Context(), "server").Result()
		must(t, err)
		return info["Server"]["run_id"]
	}
	was := id(s)
	dns.Fail(true)
	if _, err := f.Look(t.Context()); err == nil {
		t.Error("a look-up that failed is no error")
	}
	if id(s) != was {
		t.Error("a look-up that failed moved a connection")
	}
	dns.Fail(false)
	dns.Point("registry.test", second.Host, first.Host)
	var moves int64
	eventually(t, func() (err error) {
		moves, err = f.Look(t.Context())
		return err
	})
	// Also another client of the process goes where the first one is.
	if other := openFollowed(t, Access{}, f, "redis://registry.test/0", 1); moves != 0 || id(s) != was || id(other) != was {
		t.Errorf("%d moves, though the name has the server's address too", moves)
	}
	dns.Point("registry.test", second.Host)
	if moves, err := f.Look(t.Context()); err != nil || moves != 1 || id(s) == was {
		t.Errorf("%d moves, %v, want 1 and the other server", moves, err)
	}
	asked := dns.Asked()
	for range 200 { // uses within a second cost one look at most, of two questions
		must(t, s.Ping(t.Context()))
	}
	if n := dns.Asked() - asked; n > 6 {
		t.Errorf("200 calls asked %d questions", n)
	}
}

// TestFollowSentinels replaces all Sentinels one by one while connections are in use,
// and nothing connects anew, before the primary dies: its successor is found, though
// none of the Sentinels of the URL lives, or watches it.
func TestFollowSentinels(t *testing.T) {
	t.Parallel()
	t.Run("killed", func(t *testing.T) {
		t.Parallel()
		followSentinels(t, func(s *redistest.Server) { s.Kill(t) })
	})
	t.Run("removed", func(t *testing.T) {
		t.Parallel()
		followSentinels(t, func(s *redistest.Server) {
			rdb := redis.NewSentinelClient(&redis.Options{Addr: s.Addr, MaxRetries: -1})
			defer rdb.Close()
			must(t, rdb.Remove(t.Context(), "m").Err())
		})
	})
}

func followSentinels(t *testing.T, end func(*redistest.Server)) {
	w := redistest.StartWatched(t, "m", 1)
	f, _ := follower(t, nil)
	s := openFollowed(t, Access{}, f, w.URL(), 2)
	b, err := NewBeater(BeaterConfig{Service: web, Addr: netip.MustParseAddrPort("10.0.0.1:80"), Interval: 200 * time.Millisecond}, s, zerolog.Nop())
	must(t, err)
	start(t, b)
	registered(t, s, b)
	// Those that ended count on: five of nine must agree, and six live.
	for _, n := range []int{4, 1, 1} {
		w.AddSentinels(t, n)
		end(w.Sentinels[0])
		w.Sentinels = w.Sentinels[1:]
	}
	w.Primary.Kill(t)
	began := time.Now()
	promoted := w.Promoted(t)
	named := time.Since(began)
	now, err := NewStore(promoted.Client(t), DefaultNamespace)
	must(t, err)
	eventually(t, func() error {
		e, err := now.Entry(t.Context(), web, netip.MustParseAddrPort("10.0.0.1:80"))
		if err != nil {
			return err
		}
		if !e.Present || e.Now-e.Instance.Beat > 1000 {
			return errors.New("no heartbeat at the new primary")
		}
		return nil
	})
	t.Logf("Sentinels named the successor after %v, and it had a heartbeat after %v", named, time.Since(began))
}
