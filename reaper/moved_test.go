package reaper

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/rs/zerolog"

	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// named returns a registry that is reached by a name, with a Follower of its clients,
// and the name server.
func named(t *testing.T) (*registry, *registrar.Follower, *redistest.DNS) {
	t.Helper()
	g := newRegistry(t)
	dns := redistest.StartDNS(t)
	dns.Point(redistest.NameTLS, g.srv.Host)
	f := registrar.NewFollower(dns.Resolver(), zerolog.Nop())
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var following sync.WaitGroup
	following.Go(func() { f.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		following.Wait()
	})
	g.store = g.open(t, f)
	return g, f, dns
}

func (g *registry) open(t *testing.T, f *registrar.Follower) *registrar.Store {
	t.Helper()
	rdb, err := registrar.Access{Follow: f}.Open("redis://"+redistest.NameTLS+"/0", 4)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := rdb.Close(); err != nil {
			t.Error(err)
		}
	})
	s, err := registrar.NewStore(rdb, registrar.DefaultNamespace)
	if err != nil {
		t.Fatal(err)
	}
	s.Follow(f)
	return s
}

// TestRegistryMoves points the registry's name at another server, which has what the
// first one had some time ago, while that lives on as a primary: on neither is anybody
// taken out who has gone to the other one, or is about to.
func TestRegistryMoves(t *testing.T) {
	t.Parallel()
	g, _, dns := named(t)
	other := newRegistry(t)
	g.put(t, "web", "10.0.0.1:80", 1)
	other.put(t, "web", "10.0.0.1:80", 1)
	r := newReaper(t, Config{}, g.store, zerolog.Nop())
	if err := r.config(t.Context(), false, true); err != nil {
		t.Fatal(err)
	}
	arm(t, r)

	dns.Fail(true) // what is not known changes nothing
	if _, err := r.Sweep(t.Context()); err == nil || !strings.Contains(err.Error(), "nobody is taken out") {
		t.Errorf("the name cannot be looked up: %v", err)
	}
	g.wantMembers(t, "web", "10.0.0.1:80")
	dns.Fail(false)
	eventually(t, func() error { // a look-up that failed is not made again at once
		_, err := g.store.Look(t.Context())
		return err
	})

	dns.Point(redistest.NameTLS, other.srv.Host)
	if _, err := r.Sweep(t.Context()); !errors.Is(err, errMoved) {
		t.Errorf("the name names another server: %v", err)
	}
	g.wantMembers(t, "web", "10.0.0.1:80")

	mustPulse(t, r)
	if s := r.Status(); s.Armed || s.Cause != causeMoved || s.Until < r.proof.now+registrar.FollowFor.Milliseconds()-1000 {
		t.Errorf("at the other server: %+v", s)
	}
	mustSweep(t, r)
	other.wantMembers(t, "web", "10.0.0.1:80")
	if n := other.rdb.Exists(t.Context(), other.keys.Reaper("r1")).Val(); n != 1 {
		t.Error("the pulse is not at the other server")
	}
}

// TestCanaryGoesWherePulsesGo: of a name with two servers, all that a reaper says goes
// to one of them.
func TestCanaryGoesWherePulsesGo(t *testing.T) {
	t.Parallel()
	g, f, dns := named(t)
	other := newRegistry(t)
	r := newReaper(t, Config{}, g.store, zerolog.Nop())
	r.canary = func(ctx context.Context) error {
		rdb, err := registrar.Access{Follow: f}.Open("redis://"+redistest.NameTLS+"/0", 1)
		if err != nil {
			return err
		}
		defer rdb.Close()
		return g.store.On(rdb).Canary(ctx)
	}
	mustPulse(t, r)
	// The other one first, and the only one that Go would try.
	dns.Point(redistest.NameTLS, other.srv.Host, g.srv.Host)
	for range 5 {
		r.pulses = 0
		mustPulse(t, r)
	}
	dns.Point(redistest.NameTLS, g.srv.Host, other.srv.Host)
	r.pulses = 0
	mustPulse(t, r)
	for _, key := range []string{other.keys.Reaper("r1"), other.keys.Instances("_canary")} {
		if n := other.rdb.Exists(t.Context(), key).Val(); n != 0 {
			t.Errorf("%s is at the other server", key)
		}
	}
	if r.proof.resets != 0 {
		t.Errorf("%d resets", r.proof.resets)
	}
	// Where the name goes, both go.
	dns.Point(redistest.NameTLS, other.srv.Host)
	if _, err := f.Look(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.pulses = 0
	mustPulse(t, r)
	if n := other.rdb.Exists(t.Context(), other.keys.Reaper("r1"), other.keys.Instances("_canary")).Val(); n != 2 {
		t.Errorf("%d of pulse and canary followed the name", n)
	}
}
