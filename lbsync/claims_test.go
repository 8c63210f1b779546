package lbsync_test

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"rollcall/lbsync"
	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
)

// TestTwoServicesOneAddress checks that two services on one port are both served,
// and that a health check vouches no longer for an instance that is silent when
// another service has its address, also for the last that is up.
func TestTwoServicesOneAddress(t *testing.T) {
	w := newWorld(t, haproxytest.Backend{Name: "be", Slots: 10, Check: true}, "")
	w.cfg.Backends = append(w.cfg.Backends, lbsync.BackendConfig{Service: "api", Backend: "other", Mode: lbsync.Auto})
	w.run(t, w.client(t))
	api := func(a netip.AddrPort) {
		t.Helper()
		if _, err := w.store.Beat(t.Context(), "api", registrar.Beat{Addr: a, Token: "api", Meta: `{"id":"api","weight":100}`}); err != nil {
			t.Fatal(err)
		}
	}
	a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
	w.beat(t, a.Addr(), 100)
	w.beat(t, b.Addr(), 100)
	w.want(t, "be", ready(100, a, b))
	w.answers(t, a, b)
	w.expire(t, a.Addr())
	w.passMarker(t)
	w.want(t, "be", ready(100, a, b)) // silent, but its check is up
	api(a.Addr())
	w.want(t, "other", ready(100, a))
	w.want(t, "be", ready(100, b)) // the check is the other's

	api(b.Addr())
	w.want(t, "other", ready(100, a, b))
	w.passMarker(t)
	w.want(t, "be", ready(100, b)) // both beat
	w.expire(t, b.Addr())
	w.passMarker(t)
	w.want(t, "be", ready(100)) // though nobody else is up
}

// TestOtherServiceElsewhere has an instance go silent, and a service that this lbsync
// does not follow beat at its address: all that its health check or its being the last
// one kept it for ends at once.
func TestOtherServiceElsewhere(t *testing.T) {
	for _, c := range []struct {
		name  string
		share int
		last  bool
	}{
		{name: "check"}, {name: "share", share: 100}, {name: "last", last: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, haproxytest.Backend{Name: "be", Slots: 10, Check: true}, "")
			w.cfg.MinShare = c.share
			w.run(t, w.client(t))
			a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
			w.beat(t, a.Addr(), 100)
			stay := []*haproxytest.Instance{}
			if !c.last {
				w.beat(t, b.Addr(), 100)
				stay = append(stay, b)
			}
			w.want(t, "be", ready(100, append(stay, a)...))
			w.answers(t, append(stay, a)...)
			w.expire(t, a.Addr())
			w.passMarker(t)
			w.want(t, "be", ready(100, append(stay, a)...)) // silent, but its check is up

			begun := time.Now()
			if _, err := w.store.Beat(t.Context(), "misc", registrar.Beat{Addr: a.Addr(), Token: "misc", Meta: `{"id":"misc","weight":100}`}); err != nil {
				t.Fatal(err)
			}
			wrong := 0
			haproxytest.Poll(t, "no request goes to the other service", func() error {
				for range 4 {
					if by, _, err := get("http://" + w.ha.Addr("be") + "/"); err == nil && by == a.Addr().String() {
						wrong++
						return errors.New("it answers")
					}
				}
				return nil
			})
			t.Logf("%d wrong answers, the last one within %v of the other's first heartbeat", wrong, time.Since(begun).Round(time.Millisecond))
			w.want(t, "be", ready(100, stay...))
		})
	}
}

// TestFollowedAlone runs an lbsync whose user may not list the services: it knows the
// claims of those that it follows, and says so once.
func TestFollowedAlone(t *testing.T) {
	w := newWorld(t, haproxytest.Backend{Name: "be", Slots: 10, Check: true}, "")
	w.cfg.Backends = append(w.cfg.Backends, lbsync.BackendConfig{Service: "api", Backend: "other", Mode: lbsync.Auto})
	admin := w.redis.Client(t)
	if err := admin.Do(t.Context(), "acl", "setuser", "default", "-srandmember").Err(); err != nil {
		t.Fatal(err)
	}
	log := &syncBuffer{}
	w.log = zerolog.New(log)
	w.run(t, w.client(t))
	a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
	w.beat(t, a.Addr(), 100)
	w.beat(t, b.Addr(), 100)
	w.want(t, "be", ready(100, a, b))
	w.answers(t, a, b)
	w.expire(t, a.Addr())
	w.passMarker(t)
	if _, err := w.store.Beat(t.Context(), "api", registrar.Beat{Addr: a.Addr(), Token: "api", Meta: `{"id":"api","weight":100}`}); err != nil {
		t.Fatal(err)
	}
	w.want(t, "be", ready(100, b))
	if n := strings.Count(log.String(), "cannot list the services"); n != 1 {
		t.Errorf("said %d times that services cannot be listed", n)
	}
}
