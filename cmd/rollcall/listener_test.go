package main

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// alone makes a connection for each request, so that each is balanced anew.
var alone = &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}

// TestAddressesDealtAnew kills a host's sidecars, of two services, and starts them
// again after a TTL, each at an address that the other service had: the protection holds
// all of the old registrations, HAProxy's checks of them are up, and a request for a
// service is answered by the other's listener until the new ones beat.
func TestAddressesDealtAnew(t *testing.T) {
	t.Parallel()
	const each = 3
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{
		Backends: []haproxytest.Backend{{Name: "be", Slots: 10, Check: true}, {Name: "other", Slots: 10, Check: true}},
	})}
	store, err := registrar.NewStore(s.redis.Client(t), registrar.DefaultNamespace)
	must(t, err)
	const ttl = 3 * time.Second
	s.spawn(t, "reap", "--ttl", ttl.String())
	// Neither follows the other's service.
	s.spawn(t, "lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8")
	s.spawn(t, "lbsync", "--socket", s.ha.Socket, "--backend", "misc=other", "--allow", "127.0.0.0/8")
	var instances []*haproxytest.Instance
	for range 2 * each {
		instances = append(instances, haproxytest.NewInstance(t))
	}
	// deal starts a sidecar at each address.
	deal := func(first, rest string) (ps []*process) {
		for i, in := range instances {
			svc := first
			if i >= each {
				svc = rest
			}
			ps = append(ps, s.spawn(t, "register", "--service", svc, "--addr", in.Addr().String()))
		}
		return ps
	}
	// has tells which addresses answer for a service.
	has := func(backend string) (by []string, err error) {
		for range 4 * len(instances) {
			r, err := alone.Get("http://" + s.ha.Addr(backend) + "/")
			if err != nil {
				return nil, err
			}
			r.Body.Close()
			if r.StatusCode == http.StatusOK && !slices.Contains(by, r.Header.Get("X-Instance")) {
				by = append(by, r.Header.Get("X-Instance"))
			}
		}
		return by, nil
	}
	served := func(backend string, of []*haproxytest.Instance) {
		t.Helper()
		haproxytest.Poll(t, "the right ones answer for "+backend, func() error {
			by, err := has(backend)
			for _, in := range of {
				if !slices.Contains(by, in.Addr().String()) {
					return fmt.Errorf("%v does not, %v do, %v", in.Addr(), by, err)
				}
			}
			if len(by) != len(of) {
				return fmt.Errorf("%v do", by)
			}
			return nil
		})
	}
	old := deal("web", "misc")
	served("be", instances[:each])
	served("other", instances[each:])
	for _, p := range old {
		p.signal(t, syscall.SIGKILL)
	}
	haproxytest.Poll(t, "all are held", func() error {
		out, _, _ := s.rollcall(t, "status")
		if !strings.Contains(out, "HELD") {
			return errors.New(out)
		}
		return nil
	})
	served("be", instances[:each]) // held, and up

	deal("misc", "web")
	first := map[registrar.Service]time.Time{}
	haproxytest.Poll(t, "the new ones beat", func() error {
		for svc, of := range map[registrar.Service][]*haproxytest.Instance{"misc": instances[:each], "web": instances[each:]} {
			snap, err := store.Read(t.Context(), svc, nil)
			if err != nil {
				return err
			}
			for _, in := range of {
				if !slices.ContainsFunc(snap.Entries, func(e registrar.Entry) bool { return e.Present && e.Addr == in.Addr() }) {
					return fmt.Errorf("%v does not as %s", in.Addr(), svc)
				}
			}
			first[svc] = time.Now()
		}
		return nil
	})
	served("be", instances[each:])
	t.Logf("web is answered by web alone %v after misc's last first heartbeat was seen", time.Since(first["misc"]).Round(time.Millisecond))
	served("other", instances[:each])
	t.Logf("misc is answered by misc alone %v after web's", time.Since(first["web"]).Round(time.Millisecond))
}
