package lbsync_test

import (
	"net/netip"
	"testing"

	"rollcall/lbsync"
	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
)

// TestTwoServicesOneAddress checks that two services on one port are both served,
// and that a health check vouches no longer for an instance that is silent when
// another service has its address; the last that is up stays.
func TestTwoServicesOneAddress(t *testing.T) {
	w := newWorld(t, haproxytest.Backend{Name: "be", Slots: 10, Check: true}, "")
	w.cfg.Backends = append(w.cfg.Backends, lbsync.BackendConfig{Service: "api", Backend: "other", Mode: lbsync.Auto})
	w.run(t, w.client(t))
	api := func(a netip.AddrPort) {
		t.Helper()
		if _, err := w.store.Beat(t.Context(), "api", registrar.Beat{Addr: a, Token: "api", Meta: `{"id":"api","weight":100}`, Claim: true}); err != nil {
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
	w.want(t, "be", ready(100, b)) // nobody else is up
}
