package docker

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"rollcall/registrar"
	"rollcall/registrar/docker/dockertest"
)

// TestClaims: the first by its start has the address, as long as it claims it.
func TestClaims(t *testing.T) {
	at := func(s int64) time.Time { return time.Unix(s, 0) }
	web := want{service: "web", addr: netip.MustParseAddrPort("10.0.0.1:80")}
	api := want{service: "api", addr: web.addr}
	for _, c := range []struct {
		name string
		set  func(c *claims)
		want string // who has web
	}{
		{"nobody claims it", func(c *claims) {}, "me"},
		{"one", func(c *claims) { c.set("a", at(5), []want{web}) }, "a"},
		{"the second waits", func(c *claims) { c.set("a", at(5), []want{web}); c.set("b", at(6), []want{web}) }, "a"},
		{"one that began earlier has it, though it is heard of later", func(c *claims) { c.set("b", at(6), []want{web}); c.set("a", at(5), []want{web}) }, "a"},
		{"of two at once the first by id", func(c *claims) { c.set("b", at(5), []want{web}); c.set("a", at(5), []want{web}) }, "a"},
		{"another service's address is its own", func(c *claims) { c.set("a", at(5), []want{api}); c.set("b", at(6), []want{web}) }, "b"},
		{"what is said again changes nothing", func(c *claims) {
			c.set("a", at(5), []want{web})
			c.set("b", at(6), []want{web})
			c.set("a", at(5), []want{web, api})
		}, "a"},
		{"another life is another claim", func(c *claims) {
			c.set("a", at(5), []want{web})
			c.set("b", at(6), []want{web})
			c.set("a", at(7), []want{web})
		}, "b"},
		{"the next has it at its end", func(c *claims) {
			c.set("a", at(5), []want{web})
			c.set("b", at(6), []want{web})
			c.set("a", time.Time{}, nil)
		}, "b"},
		{"what it wants no more", func(c *claims) {
			c.set("a", at(5), []want{web, api})
			c.set("b", at(6), []want{web})
			c.set("a", at(5), []want{api})
		}, "b"},
		{"all have ended", func(c *claims) { c.set("a", at(5), []want{web}); c.set("a", time.Time{}, nil) }, "me"},
	} {
		var cs claims
		c.set(&cs)
		if got, _, _ := cs.first(web.key(), "me"); got != c.want {
			t.Errorf("%s: %s has it, want %s", c.name, got, c.want)
		}
	}
	var cs claims
	cs.set("b", at(6), []want{web})
	_, say, changed := cs.first(web.key(), "b")
	cs.set("c", at(7), []want{web})
	select {
	case <-changed:
		t.Error("another one that waits is no change")
	default:
	}
	var said []bool
	for range 2 {
		_, again, _ := cs.first(web.key(), "c")
		said = append(said, again)
	}
	if say || !slices.Equal(said, []bool{true, false}) {
		t.Errorf("b is told %v, c %v", say, said)
	}
	cs.set("a", at(5), []want{web})
	select {
	case <-changed:
	default:
		t.Error("b has not heard that it lost it")
	}
}

// TestEngineTwoOfOneAddress: of two containers on the host's network that EXPOSE one
// port the first keeps the address; the second is said, and has it when that ends. The
// next agent finds it so.
func TestEngineTwoOfOneAddress(t *testing.T) {
	t.Parallel()
	e := dockertest.Shared(t)
	h := newHost(t, e, nil)
	addr := netip.MustParseAddrPort(e.Host + ":8080") // which the image EXPOSEs
	run := func(port string) *dockertest.Container {
		return h.Run(t, dockertest.Spec{Args: []string{"--addr", e.Host + ":" + port}, Network: "host", Labels: named("twins")})
	}
	first := run("18091")
	m := h.here(t, "twins", addr, "")
	second := run("18092")
	if n := h.says(t, "warn", `"container":"`+second.ID[:12]+`"`, "another container that was started before it has the address", first.ID[:12]); n != 1 {
		t.Errorf("said %d times", n)
	}
	takeovers := func() (n int) {
		t.Helper()
		all, err := h.rdb.XRange(t.Context(), h.store.Keys().Events(), "-", "+").Result()
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range all {
			if x.Values["what"] == "takeover" {
				n++
			}
		}
		return n
	}
	beat := func() {
		t.Helper()
		before := h.rdb.ZScore(t.Context(), h.store.Keys().Instances("twins"), addr.String()).Val()
		eventually(t, func() error {
			if h.rdb.ZScore(t.Context(), h.store.Keys().Instances("twins"), addr.String()).Val() <= before {
				return errors.New("no beat")
			}
			return nil
		})
	}
	first.Do(t, "pause") // unwell, and it keeps what may be its app's
	h.went(t, "twins", addr, registrar.Unhealthy)
	first.Do(t, "unpause")
	m = h.here(t, "twins", addr, m.ID)
	beat()
	if again := h.here(t, "twins", addr, ""); again.ID != m.ID || again.Tags["container"] != first.ID[:12] || takeovers() != 0 {
		t.Errorf("%+v became %+v, with %d takeovers", m, again, takeovers())
	}
	first.Do(t, "KILL")
	m = h.here(t, "twins", addr, m.ID)
	if m.Tags["container"] != second.ID[:12] {
		t.Errorf("after the first one's end: %+v", m)
	}
	first.Do(t, "start") // it is the second now
	if n := h.says(t, "warn", `"container":"`+first.ID[:12]+`"`, "another container that was started before it has the address", second.ID[:12]); n != 1 {
		t.Errorf("said %d times", n)
	}
	h.end()
	h.start(t)
	eventually(t, func() error { // whichever it inspects first
		beat()
		e, err := h.entry(t, "twins", addr)
		if err == nil && (!e.Present || e.Instance.Meta.Tags["container"] != second.ID[:12]) {
			err = fmt.Errorf("%+v", e)
		}
		return err
	})
	before := takeovers()
	beat()
	beat()
	if now := takeovers(); now != before || before > 2 {
		t.Errorf("%d takeovers, and then %d", before, now)
	}
}

// TestEngineHangIsNoticed: an Engine that hangs is said to be away within seconds, and
// back when it answers.
func TestEngineHangIsNoticed(t *testing.T) {
	t.Parallel()
	e := dockertest.Start(t)
	h := newHost(t, e, nil)
	eventually(t, func() error { return h.agent.Status().Away })
	e.Hang(t)
	begun := time.Now()
	eventually(t, func() error {
		if h.agent.Status().Away == nil {
			return errors.New("it is still up")
		}
		return nil
	})
	took := time.Since(begun)
	t.Logf("noticed after %v", took.Round(100*time.Millisecond))
	if took > resync*4/5 {
		t.Errorf("it took %v", took) // so long only the next list would
	}
	e.Resume(t)
	eventually(t, func() error { return h.agent.Status().Away })
}
