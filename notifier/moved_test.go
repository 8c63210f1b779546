package notifier

import (
	"testing"

	"github.com/rs/zerolog"

	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// TestExpiredOnAFormerServer reads notes of departures by the registry's name. That an
// instance expired is believed only of the server that the name has after the read:
// elsewhere it is an absence. What somebody said is believed anywhere.
func TestExpiredOnAFormerServer(t *testing.T) {
	t.Parallel()
	g, other := newWorld(t), newWorld(t)
	dns := redistest.StartDNS(t)
	dns.Point(redistest.NameTLS, g.srv.Host)
	f := registrar.NewFollower(dns.Resolver(), zerolog.Nop()) // which looks when it is asked
	rdb, err := registrar.Access{Follow: f}.Open("redis://"+redistest.NameTLS+"/0", 4)
	must(t, err)
	defer rdb.Close()
	store := storeOn(t, rdb)
	store.Follow(f)
	w, err := New(Config{Services: []registrar.Service{"web"}}, store, zerolog.Nop())
	must(t, err)
	var last Change
	step := func() Change {
		t.Helper()
		last = Change{}
		w.due, w.looked = true, w.looked.Add(-lookFresh)
		must(t, w.Step(t.Context(), func(c Change) { last = c }))
		return last
	}
	for n := range 4 {
		g.join("web", n, 1)
	}
	if c := step(); len(c.Entries) != 4 || !c.Moved.IsZero() {
		t.Fatalf("got %+v", c)
	}
	g.leave("web", 0, registrar.Expired)
	if c := step(); len(c.Entries) != 1 || c.Entries[0].Gone == nil || c.Entries[0].Gone.Reason != registrar.Expired {
		t.Errorf("on the server that the name has: %+v", c)
	}
	dns.Fail(true)
	g.leave("web", 1, registrar.Expired)
	if c := step(); len(c.Entries) != 1 || c.Entries[0].Present || c.Entries[0].Gone != nil {
		t.Errorf("where the name cannot be looked up: %+v", c)
	}
	dns.Fail(false)
	eventually(t, func() error {
		_, err := f.Look(t.Context())
		return err
	})
	dns.Point(redistest.NameTLS, other.srv.Host)
	g.leave("web", 2, registrar.Expired)
	g.leave("web", 3, registrar.Left)
	c := step()
	if len(c.Entries) != 2 {
		t.Fatalf("on the former server: %+v", c)
	}
	for _, e := range c.Entries {
		if said := e.Addr == host(3); e.Present || (e.Gone != nil) != said {
			t.Errorf("on the former server: %+v", e)
		}
	}
	other.join("web", 2, 1)
	if c := step(); !c.Interrupted || c.Moved.IsZero() || len(c.Entries) != 1 || !c.Entries[0].Present {
		t.Errorf("on the server that the name has now: %+v", c)
	}
}
