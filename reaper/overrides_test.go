package reaper

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"rollcall/registrar"
)

// TestEndsOverrides has a reaper that is not armed yet end an override whose time is over,
// look for those that were written by hand, and leave the others.
func TestEndsOverrides(t *testing.T) {
	g := newRegistry(t)
	log := &logBuffer{}
	r := newReaper(t, Config{}, g.store, zerolog.New(log))
	ctx := t.Context()
	a, b := netip.MustParseAddrPort("10.0.0.1:80"), netip.MustParseAddrPort("10.0.0.2:80")
	if _, _, err := g.store.SetAdmin(ctx, "web", a, registrar.Word{Verb: "drain", For: time.Second, By: "alice"}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := g.store.SetAdmin(ctx, "web", b, registrar.Word{Verb: "maint"}); err != nil {
		t.Fatal(err)
	}
	k := g.store.Keys()
	byHand := "10.9.9.9:80"
	if err := g.rdb.HSet(ctx, k.Admin("web"), byHand, `{"state":"drain"}`).Err(); err != nil {
		t.Fatal(err)
	}
	g.put(t, "web", b.String(), time.Now().UnixMilli()) // the service is on the list
	eventually(t, func() error {
		r.overrides.at, r.overrides.adoptAt = 0, 0 // the time of the next look has come
		if err := r.Pulse(ctx); err != nil {
			return err
		}
		if _, err := r.Sweep(ctx); err != nil {
			t.Fatal(err)
		}
		left, err := g.rdb.HKeys(ctx, k.Admin("web")).Result()
		if err != nil {
			t.Fatal(err)
		}
		if len(left) != 2 {
			return fmt.Errorf("left are %v", left)
		}
		return nil
	})
	if r.armed {
		t.Error("it is armed, which this test does not need")
	}
	if n := len(log.lines(`"why":"drain by alice, its time is over","message":"override ended"`)); n != 1 {
		t.Errorf("said %d times:\n%s", n, strings.Join(log.lines("override"), "\n"))
	}
	if _, err := g.rdb.ZScore(ctx, k.OverrideDue(), "web a "+byHand).Result(); err != nil {
		t.Errorf("nobody looks at the one that was written by hand: %v", err)
	}
}

// TestOverridesRefused: a reaper whose user has no right to overrides, as by the rights of
// a release before they ended by themselves, says so once and reaps.
func TestOverridesRefused(t *testing.T) {
	g := newRegistry(t)
	ctx := t.Context()
	if err := g.rdb.Do(ctx, "ACL", "SETUSER", "default", "resetkeys", "~rollcall:{*", "~rollcall:[^o]*", "~"+g.keys.Services()).Err(); err != nil {
		t.Fatal(err)
	}
	log := &logBuffer{}
	r := newReaper(t, Config{}, g.store, zerolog.New(log))
	arm(t, r)
	cutoff, _ := r.proof.cutoff()
	for range 3 {
		r.overrides.at = 0
		g.put(t, "web", "10.0.0.1:80", cutoff-1)
		if report := mustSweep(t, r); len(report.Removed) != 1 {
			t.Fatalf("%+v", report)
		}
	}
	if n := len(log.lines("operators' overrides do not end by this reaper")); n != 1 {
		t.Errorf("said %d times:\n%s", n, strings.Join(log.lines(""), "\n"))
	}
}
