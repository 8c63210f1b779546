package lbsync_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"rollcall/lbsync"
	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
)

// sight returns what the balancer said of web last.
func (w *world) sight(t *testing.T) registrar.Sight {
	t.Helper()
	var sights []registrar.Sight
	haproxytest.Poll(t, "what it said can be read", func() (err error) {
		sights, err = w.store.Sights(context.Background(), "web", []string{"test"})
		return err
	})
	return sights[0]
}

// says polls until the balancer has said, of these addresses and no others, what
// ok accepts.
func (w *world) says(t *testing.T, what string, ok func(registrar.ServerState) bool, of ...netip.AddrPort) {
	t.Helper()
	haproxytest.Poll(t, what, func() error {
		s := w.sight(t)
		for _, a := range of {
			if st, there := s.Servers[a]["be"]; !there || !ok(st) {
				b, err := json.Marshal(s.Servers)
				return fmt.Errorf("of %v %s, %v", a, b, err)
			}
		}
		if len(s.Servers) != len(of) {
			return fmt.Errorf("of %d addresses, want %d: %v", len(s.Servers), len(of), s.Servers)
		}
		return nil
	})
}

// TestSaysWhatHAProxyHas follows one instance and another through all that only
// HAProxy and lbsync know of them.
func TestSaysWhatHAProxyHas(t *testing.T) {
	t.Parallel()
	w := newWorld(t, haproxytest.Backend{Name: "be", Slots: 3, Check: true}, "")
	w.cfg.Backends[0].Mode = lbsync.Slots
	w.cfg.Full, w.cfg.Hold = 300*time.Millisecond, 2*time.Minute
	w.run(t, w.client(t))
	a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
	begun := time.Now().UnixMilli()
	w.beat(t, a.Addr(), 70)
	up := func(s registrar.ServerState) bool {
		return s.Serving() && s.Server != "" && s.State == "ready" && s.Check == "up" && s.Weight == 70 && s.Note == ""
	}
	w.says(t, "up", up, a.Addr())
	w.word(t, a.Addr(), registrar.Word{Verb: "drain"})
	w.says(t, "waits", func(s registrar.ServerState) bool {
		return s.Note == registrar.NoteWaits && s.State == "ready" && s.Why != "" && s.Until == 0
	}, a.Addr())
	w.word(t, a.Addr(), registrar.Word{Verb: "ready"})
	w.says(t, "no longer", up, a.Addr())

	a.SetHealthy(false)
	w.says(t, "its check fails", func(s registrar.ServerState) bool { return s.Check == "down" && s.Note == "" && !s.Serving() }, a.Addr())
	a.SetHealthy(true)
	w.says(t, "its check succeeds", up, a.Addr())

	w.ha.Command(t, "set server be/"+w.sight(t).Servers[a.Addr()]["be"].Server+" state maint")
	w.says(t, "a human's maint", func(s registrar.ServerState) bool { return s.State == "maint" && s.Note == registrar.NoteHuman }, a.Addr())
	w.ha.Command(t, "set server be/"+w.sight(t).Servers[a.Addr()]["be"].Server+" state ready")
	w.says(t, "it ends", up, a.Addr())

	w.expire(t, a.Addr())
	w.says(t, "held", func(s registrar.ServerState) bool {
		return s.Note == registrar.NoteHeld && s.Why != "" && s.Serving() && s.Since >= begun && s.Until-s.Since == w.cfg.Hold.Milliseconds() &&
			s.Since <= time.Now().UnixMilli()
	}, a.Addr())
	before := w.sight(t).Servers[a.Addr()]["be"]
	w.looksAgain(t, 3)
	if after := w.sight(t).Servers[a.Addr()]["be"]; after != before {
		t.Errorf("it holds since %+v, and then since %+v", before, after)
	}
	w.beat(t, a.Addr(), 70)
	w.says(t, "it is back", up, a.Addr())

	// More than there are slots, and one who may not be served.
	var more []netip.AddrPort
	for range 3 {
		more = append(more, haproxytest.NewInstance(t).Addr())
		w.beat(t, more[len(more)-1], 70)
	}
	foreign := netip.MustParseAddrPort("10.9.9.9:80")
	w.beat(t, foreign, 70)
	haproxytest.Poll(t, "unplaced and refused", func() error {
		notes := map[string]int{}
		s := w.sight(t)
		for addr, st := range s.Servers {
			notes[st["be"].Note]++
			if n := st["be"]; n.Note != "" && (n.Serving() || n.Server != "") || (n.Note == registrar.NoteRefused) != (addr == foreign) {
				return fmt.Errorf("%v: %+v", addr, n)
			}
		}
		if notes[""] != 3 || notes[registrar.NoteUnplaced] != 1 || notes[registrar.NoteRefused] != 1 {
			return fmt.Errorf("%v", notes)
		}
		return nil
	})
	for _, m := range append(more, foreign) {
		w.leave(t, m)
	}
	w.says(t, "who has left is forgotten", up, a.Addr())

	// One on its way out.
	w.beat(t, b.Addr(), 70)
	w.says(t, "both", up, a.Addr(), b.Addr())
	var busy sync.WaitGroup
	for range 2 { // round robin: one of them is b's
		busy.Go(func() {
			if resp, err := plain.Get("http://" + w.ha.Addr("be") + "/hold"); err == nil {
				_ = resp.Body.Close()
			}
		})
	}
	defer busy.Wait()
	defer a.Release()
	defer b.Release()
	haproxytest.Poll(t, "b is busy", func() error {
		if b.Held() == 0 {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	w.leave(t, b.Addr())
	haproxytest.Poll(t, "leaving", func() error {
		s := w.sight(t).Servers[b.Addr()]["be"]
		if s.Note != registrar.NoteLeaving || s.State != "drain" || s.Until-s.Since != w.cfg.DrainTimeout.Milliseconds() {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	w.says(t, "gone", up, a.Addr())
}

// TestCountsWhatServes follows the count of servers that serve, ours and the
// operator's own, by backend, through what changes it.
func TestCountsWhatServes(t *testing.T) {
	t.Parallel()
	own := haproxytest.NewInstance(t)
	w := newWorld(t, haproxytest.Backend{Name: "be", Slots: 3, Check: true, Extra: []string{"server own " + own.Addr().String() + " check inter 100ms"}}, "")
	w.cfg.Full = 300 * time.Millisecond
	w.cfg.Backends = append(w.cfg.Backends, lbsync.BackendConfig{Service: "web", Backend: "other", Mode: lbsync.Dynamic},
		lbsync.BackendConfig{Service: "web", Backend: "missing", Mode: lbsync.Auto})
	w.run(t, w.client(t))
	counts := func(what string, be, other int) {
		t.Helper()
		want := map[string]int{"be": be, "other": other, "missing": 0} // HAProxy does not have it
		haproxytest.Poll(t, what, func() error {
			if got := w.sight(t).Up; !maps.Equal(got, want) {
				return fmt.Errorf("%v, want %v", got, want)
			}
			return nil
		})
	}
	counts("the operator's own", 1, 0)
	a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
	w.beat(t, a.Addr(), 70)
	w.beat(t, b.Addr(), 0)
	counts("one with a weight", 2, 1)
	own.SetHealthy(false)
	counts("the check of the operator's own fails", 1, 1)
	own.SetHealthy(true)
	counts("it succeeds", 2, 1)
	a.SetHealthy(false)
	counts("an instance's check fails", 1, 1)
	a.SetHealthy(true)
	w.word(t, b.Addr(), registrar.Word{Verb: "weight", Weight: new(int)})
	w.beat(t, b.Addr(), 70)
	counts("weight 0 by an operator's word", 2, 1)
	w.word(t, b.Addr(), registrar.Word{Verb: "weight"})
	counts("its own weight", 3, 2)
	w.word(t, a.Addr(), registrar.Word{Verb: "drain"})
	counts("a drain", 2, 1)
	w.leave(t, b.Addr())
	counts("the other leaves", 1, 0)
	w.word(t, a.Addr(), registrar.Word{Verb: "ready"})
	counts("ready", 2, 1)

	if err := w.redis.Client(t).HDel(t.Context(), w.store.Keys().Seen("web", "test"), "up").Err(); err != nil {
		t.Fatal(err)
	}
	counts("after somebody has deleted it", 2, 1)
}

// TestCountsBetweenLooks says a count that has changed at once, also where nothing has
// changed of an instance.
func TestCountsBetweenLooks(t *testing.T) {
	t.Parallel()
	w := newWorld(t, haproxytest.Backend{Name: "be", Slots: 3, Extra: []string{"server own 127.0.0.1:9"}}, "")
	w.cfg.Full = time.Hour
	w.run(t, w.client(t))
	a := haproxytest.NewInstance(t).Addr()
	w.beat(t, a, 70)
	counts := func(want int) {
		t.Helper()
		haproxytest.Poll(t, fmt.Sprint("it counts ", want), func() error {
			if got := w.sight(t).Up["be"]; got != want {
				return fmt.Errorf("%d", got)
			}
			return nil
		})
	}
	counts(2)
	w.word(t, a, registrar.Word{Verb: "drain"})
	counts(1)
	w.ha.Command(t, "set server be/own state maint")
	w.word(t, a, registrar.Word{Verb: "drain", Reason: "another"}) // HAProxy is asked of it, and told nothing
	counts(0)
}

// looksAgain waits until the balancer has looked at all servers n times more.
func (w *world) looksAgain(t *testing.T, n int) {
	t.Helper()
	for range n {
		last := w.sight(t).At
		haproxytest.Poll(t, "it looks again", func() error {
			if at := w.sight(t).At; at <= last {
				return fmt.Errorf("at %d", at)
			}
			return nil
		})
	}
}

// TestSaysItAnew damages what was said in every way: it is said again, and
// nothing else is.
func TestSaysItAnew(t *testing.T) {
	t.Parallel()
	w := newWorld(t, haproxytest.Backend{Name: "be", Slots: 5}, "")
	w.cfg.Full = 300 * time.Millisecond
	w.cfg.Backends = append(w.cfg.Backends, lbsync.BackendConfig{Service: "web", Backend: "other", Mode: lbsync.Dynamic},
		lbsync.BackendConfig{Service: "web", Backend: "missing", Mode: lbsync.Auto})
	stop := w.run(t, w.client(t))
	a, b := haproxytest.NewInstance(t).Addr(), haproxytest.NewInstance(t).Addr()
	w.beat(t, a, 70)
	w.beat(t, b, 70)
	both := func(s registrar.ServerState) bool { return s.Serving() && s.Weight == 70 }
	rdb, ctx := w.redis.Client(t), context.Background()
	key := w.store.Keys().Seen("web", "test")
	do := func(args ...any) {
		t.Helper()
		if err := rdb.Do(ctx, args...).Err(); err != nil {
			t.Fatal(err)
		}
	}
	steady := func(what string) {
		t.Helper()
		w.says(t, what, both, a, b)
		haproxytest.Poll(t, what+": the other backend is told", func() error {
			if st := w.sight(t).Servers[a]["other"]; !both(st) || st.Server != lbsync.DynamicName(a) {
				return fmt.Errorf("%+v", st)
			}
			return nil
		})
		if left := rdb.PTTL(ctx, key).Val(); left < 50*time.Minute || left > time.Hour {
			t.Errorf("%s: it is forgotten in %v", what, left)
		}
	}
	steady("at the start")

	// While nothing changes only the time of the look is written.
	w.looksAgain(t, 1)
	do("HSET", key, b.String(), `{"be":{"server":"x","state":"ready","weight":70}}`)
	w.looksAgain(t, 2)
	if st := w.sight(t).Servers[b]["be"]; st.Server != "x" {
		t.Errorf("a steady state was written again: %+v", st)
	}

	do("DEL", key)
	steady("after its deletion")
	do("HSET", key, "10.0.0.1:80", `{"be":{"state":"ready"}}`)
	steady("after an entry of somebody else")
	do("DEL", key)
	do("RPUSH", key, "x")
	steady("after another type")
	do("HDEL", key, a.String())
	steady("after a part was deleted")

	w.redis.Kill(t)
	w.redis.Launch(t)
	old := `{"be":{"server":"x","state":"maint","weight":0}}`
	do("HSET", key, "at", 1, "up", "{}", a.String(), old, b.String(), old) // as many as there were
	w.beat(t, a, 70)
	w.beat(t, b, 70)
	steady("after a restart with old data")

	stop()
	do("HSET", key, a.String(), `{"be":{"state":"maint"}}`)
	w.run(t, w.client(t))
	steady("after a restart of lbsync")
}

// TestSaysNothingWithoutRights shows that lbsync does its work if it may not say
// what it sees.
func TestSaysNothingWithoutRights(t *testing.T) {
	t.Parallel()
	w := newWorld(t, haproxytest.Backend{Name: "be", Slots: 5}, "")
	ctx := context.Background()
	root := w.redis.Client(t)
	if err := root.Do(ctx, "ACL", "SETUSER", "lb", "on", "nopass", "+@all", "-unlink", "~*", "&*").Err(); err != nil {
		t.Fatal(err)
	}
	rdb := redis.NewClient(&redis.Options{Network: "unix", Addr: w.redis.Socket, Username: "lb", Password: "x", MaxRetries: -1, ContextTimeoutEnabled: true})
	t.Cleanup(func() { _ = rdb.Close() })
	own, err := registrar.NewStore(rdb, registrar.DefaultNamespace)
	if err != nil {
		t.Fatal(err)
	}
	whole := w.store
	w.store = own
	w.run(t, w.client(t))
	w.store = whole
	for range 3 {
		i := haproxytest.NewInstance(t)
		w.beat(t, i.Addr(), 100)
		w.acked(t, w.version(t))
	}
	if s := w.sight(t); s.At != 0 || len(s.Servers) > 0 {
		t.Errorf("it said %+v", s)
	}
}
