package reaper

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"

	"rollcall/registrar"
)

// TestSeenServicesAreReaped takes a service's name off the list: its dead go
// nevertheless, and a name whose service is empty goes.
func TestSeenServicesAreReaped(t *testing.T) {
	g := newRegistry(t)
	r := newReaper(t, Config{}, g.store, zerolog.Nop())
	arm(t, r)
	g.put(t, "web", "10.0.0.1:80", r.proof.now)
	g.put(t, "web", "10.0.0.2:80", r.proof.now)
	g.put(t, "gone", "10.0.0.3:80", r.proof.now)
	g.rdb.SAdd(t.Context(), g.keys.Services(), "empty")
	mustSweep(t, r)
	if n := g.rdb.HGet(t.Context(), g.keys.Config(), "services").Val(); n != "2" {
		t.Errorf("%q services have instances, want 2", n)
	}
	g.rdb.Del(t.Context(), g.keys.Instances("gone"))
	g.rdb.SRem(t.Context(), g.keys.Services(), "web")
	g.put(t, "api", "10.0.0.9:80", r.proof.now)
	g.rdb.ZAdd(t.Context(), g.keys.Instances("web"), zed(1, "10.0.0.1:80"))
	if report := mustSweep(t, r); fmt.Sprint(report.Removed) != "[{web [10.0.0.1:80]}]" || report.Members != 3 {
		t.Errorf("got %+v", report)
	}
	names, _, err := g.store.Services(t.Context())
	if err != nil || fmt.Sprint(names) != "[api]" {
		t.Errorf("on the list: %v, %v", names, err)
	}
	// Without members it is forgotten.
	g.rdb.Del(t.Context(), g.keys.Instances("web"))
	mustSweep(t, r)
	if r.seen["web"] || r.seen["gone"] || !r.seen["api"] {
		t.Errorf("remembers %v", r.seen)
	}
}

// TestManyNames puts more names on the list than are read: the dead of services that
// were seen go in time, and so do the names.
func TestManyNames(t *testing.T) {
	t.Parallel()
	g := newRegistry(t)
	r := newReaper(t, Config{}, g.store, zerolog.Nop())
	arm(t, r)
	g.put(t, "web", "10.0.0.1:80", 1)
	g.put(t, "web", "10.0.0.2:80", r.proof.now)
	g.put(t, "web", "10.0.0.3:80", r.proof.now)
	g.rdb.ZAdd(t.Context(), g.keys.Instances("web"), zed(float64(r.proof.now), "10.0.0.1:80"))
	mustSweep(t, r)
	const many = registrar.ReadLimit + 1000
	if err := g.rdb.Eval(t.Context(), "for i=1,ARGV[1] do redis.call('SADD',KEYS[1],'x'..i) end", []string{g.keys.Services()}, many).Err(); err != nil && !errors.Is(err, redis.Nil) {
		t.Fatal(err)
	}
	g.rdb.ZAdd(t.Context(), g.keys.Instances("web"), zed(1, "10.0.0.1:80"))
	begun := time.Now()
	for first := true; ; first = false {
		report, err := r.Sweep(t.Context())
		if first {
			t.Logf("%d names: swept in %v", many, time.Since(begun))
			if fmt.Sprint(report.Removed) != "[{web [10.0.0.1:80]}]" || !errors.Is(err, registrar.ErrManyServices) {
				t.Fatalf("got %+v, %v", report, err)
			}
		}
		left := g.rdb.SCard(t.Context(), g.keys.Services()).Val()
		if left == 1 {
			break
		}
		if !report.waits {
			t.Fatalf("%d names, and the next sweep does not hurry", left)
		}
		if time.Since(begun) > 2*time.Minute {
			t.Fatalf("%d names are left", left)
		}
		mustPulse(t, r)
	}
	t.Logf("all taken off after %v", time.Since(begun))
}

func zed(score float64, member string) redis.Z { return redis.Z{Score: score, Member: member} }
