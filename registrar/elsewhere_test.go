package registrar

import (
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"testing"
	"time"

	"rollcall/registrar/redistest"
)

func TestElsewhere(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	ctx := t.Context()
	const ttl = 10 * time.Second
	s.setClock(t0)
	for _, m := range []struct {
		svc   Service
		n     int
		score any
	}{
		{"web", 1, t0}, {"web", 2, t0}, {"web", 3, t0 - 60_000}, // the service itself
		{"api", 1, t0 - 5000}, {"api", 2, t0 - 5001}, {"api", 4, t0},
		{"misc", 3, t0 - 1}, {"misc", 1, t0 - 60_000},
	} {
		do(t, s, "ZADD", s.keys.Instances(m.svc), m.score, host(m.n).String())
		do(t, s, "SADD", s.keys.Services(), string(m.svc))
	}
	do(t, s, "SET", s.keys.Instances("broken"), "x")
	do(t, s, "SADD", s.keys.Services(), "broken", "No Name", "absent")
	all := []netip.AddrPort{host(1), host(2), host(3), host(5)}
	for _, c := range []struct {
		name   string
		within []Service
		want   map[netip.AddrPort]Service
	}{
		{"all that are listed", nil, map[netip.AddrPort]Service{host(1): "api", host(3): "misc"}},
		{"some", []Service{"web", "misc"}, map[netip.AddrPort]Service{host(3): "misc"}},
		{"only itself", []Service{"web"}, nil},
	} {
		found, looked, err := s.Elsewhere(ctx, "web", c.within, all, ttl)
		must(t, err)
		if !maps.Equal(found, c.want) || looked != len(all) {
			t.Errorf("%s: got %v of %d, want %v of %d", c.name, found, looked, c.want, len(all))
		}
	}
	if found, looked, err := s.Elsewhere(ctx, "web", nil, nil, ttl); len(found) > 0 || looked != 0 || err != nil {
		t.Errorf("of no address: %v, %d, %v", found, looked, err)
	}
}

// TestElsewhereIsBounded looks for many addresses in many services.
func TestElsewhereIsBounded(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	const services = 500
	for i := range services {
		svc := Service(fmt.Sprintf("s%d", i))
		do(t, s, "ZADD", s.keys.Instances(svc), time.Now().UnixMilli(), host(i+1).String())
		do(t, s, "SADD", s.keys.Services(), string(svc))
	}
	var addrs []netip.AddrPort
	for i := range services {
		addrs = append(addrs, host(i+1))
	}
	begun := time.Now()
	found, looked, err := s.Elsewhere(t.Context(), "s0", nil, addrs, time.Hour)
	took := time.Since(begun)
	must(t, err)
	if looked != elsewhereMost/services || len(found) != looked-1 { // not its own
		t.Errorf("found %d of %d, want all but its own of %d", len(found), looked, elsewhereMost/services)
	}
	t.Logf("%d look-ups took %v, %v each", looked*services, took.Round(time.Microsecond), (took / time.Duration(looked*services)).Round(time.Nanosecond))
	many := make([]netip.AddrPort, elsewhereMost)
	for i := range many {
		many[i] = host(1)
	}
	if _, looked, err := s.Elsewhere(t.Context(), "s1", nil, many[:1], time.Hour); err != nil || looked != 1 {
		t.Errorf("one address: %d, %v", looked, err)
	}
}

// TestReapReplaced takes out those that are named, if they are silent, and says why.
func TestReapReplaced(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	const now, cutoff = t0 + 100_000, t0 + 50_000
	for i := 1; i <= 4; i++ {
		join(t, s, host(i), fmt.Sprint("token-", i))
	}
	do(t, s, "ZADD", s.keys.Instances(web), cutoff, host(2).String())
	s.setClock(now)
	p, err := s.Pulse(t.Context(), "r1", "pulse", time.Minute)
	must(t, err)
	w := Sweep{ID: "r1", Token: "pulse", ReplID: p.ReplID, Last: p.Now, MaxAge: time.Second, Cutoff: cutoff}
	w.Replaced = map[netip.AddrPort]Service{host(1): "api", host(2): "api", host(9): "api"}
	out, err := s.Reap(t.Context(), web, w)
	must(t, err)
	if fmt.Sprint(out.Addrs) != fmt.Sprintf("[%v]", host(1)) || out.Left != 2 {
		t.Errorf("took out %q, left %d; want %v alone, and 2 left", out.Addrs, out.Left, host(1))
	}
	log, err := s.Events(t.Context(), []Service{web}, "", 10)
	must(t, err)
	if last := log[len(log)-1]; last.What != "expired" || !strings.HasSuffix(last.Why, "; api beats at its address") {
		t.Errorf("the log says %+v", last)
	}
	w.Replaced = map[netip.AddrPort]Service{host(2): "api"}
	e := observe(t, s, func() { out, err = s.Reap(t.Context(), web, w) })
	must(t, err)
	if len(out.Addrs) > 0 || out.Left != 2 || e.local != 0 {
		t.Errorf("none of those named is silent: took out %q, left %d, version moved by %d", out.Addrs, out.Left, e.local)
	}
}
