package docker

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"

	"rollcall/registrar"
	"rollcall/registrar/docker/dockertest"
)

// free waits until a container has ended, and so its port is free.
func free(tb testing.TB, c *dockertest.Container) {
	tb.Helper()
	eventually(tb, func() error {
		if c.Inspect(tb).State.Running {
			return errors.New("it runs")
		}
		return nil
	})
}

// list has the agent ask for all containers: behind a proxy it hears no events.
func (h *host) list() { hint(h.agent.relist) }

// order returns the changes of an address in the order in which they were made,
// "<service> <what>".
func (h *host) order(tb testing.TB, addr netip.AddrPort) []string {
	tb.Helper()
	entries, err := h.rdb.XRange(tb.Context(), h.store.Keys().Events(), "-", "+").Result()
	if err != nil {
		tb.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		if e.Values["addr"] == addr.String() {
			out = append(out, fmt.Sprintf("%s %s", e.Values["service"], e.Values["what"]))
		}
	}
	return out
}

// TestEngineOneListener has a container take over the port of another service's, and
// the Engine say nothing of that one: it has left before the new one comes.
func TestEngineOneListener(t *testing.T) {
	t.Parallel()
	e := dockertest.Shared(t)
	p := behind(t, e)
	h := newHost(t, e, func(c *Config) { c.Engine = p.url })
	old := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: named("before")})
	h.list()
	addr := old.Addr(t, "8080")
	h.here(t, "before", addr, "")
	p.stuck.Store(old.ID)
	old.Do(t, "KILL")
	free(t, old)
	h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Port: addr.Port(), Labels: named("after")})
	h.list()
	h.here(t, "after", addr, "")
	if p.asked.Load() == 0 {
		t.Error("nobody has asked for the container that is not answered for")
	}
	if got, want := fmt.Sprint(h.order(t, addr)), "[before joined before left after joined]"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	p.stuck.Store("")
	eventually(t, func() error {
		if n := len(h.agent.Status().Instances); n != 1 {
			h.list()
			return fmt.Errorf("%d instances", n)
		}
		return nil
	})
	// Nothing changes after that.
	if got := h.order(t, addr); len(got) != 3 {
		t.Errorf("%v", got)
	}
}

// TestEngineHostNetwork: on the host's own network containers say which port they use.
// One that has ended while nobody could say so is asked for before another one of
// another service takes its port; both are registered if both run.
func TestEngineHostNetwork(t *testing.T) {
	t.Parallel()
	e := dockertest.Start(t) // with the port for itself
	p := behind(t, e)
	h := newHost(t, e, func(c *Config) { c.Engine = p.url })
	spec := func(svc registrar.Service) dockertest.Spec {
		return dockertest.Spec{Args: []string{"--addr", e.Host + ":8080"}, Network: "host", Labels: named(svc)}
	}
	addr := netip.AddrPortFrom(netip.MustParseAddr(e.Host), 8080)
	old := h.Run(t, spec("before"))
	h.list()
	h.here(t, "before", addr, "")
	old.Do(t, "KILL")
	free(t, old)
	next := h.Run(t, spec("after"))
	h.list()
	h.here(t, "after", addr, "")
	if got, want := fmt.Sprint(h.order(t, addr)), "[before joined before left after joined]"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	// It says that it has the port too, and does not.
	beside := spec("beside")
	beside.Args = []string{"--addr", e.Host + ":8081"}
	h.Run(t, beside)
	h.list()
	h.here(t, "beside", addr, "")
	h.here(t, "after", addr, "")
	if !next.Inspect(t).State.Running {
		t.Error("it has ended")
	}
}

// TestEngineLeftBehind: an agent that starts has leave what one before it registered
// and no container has, when every container has been inspected; and nothing else.
func TestEngineLeftBehind(t *testing.T) {
	t.Parallel()
	e := dockertest.Start(t) // nobody else's containers
	p := behind(t, e)
	h := newHost(t, e, func(c *Config) { c.Engine = p.url })
	at := map[registrar.Service]netip.AddrPort{}
	cs := map[registrar.Service]*dockertest.Container{}
	for _, svc := range []registrar.Service{"goes", "stays", "paused", "moves"} {
		cs[svc] = h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: named(svc)})
		at[svc] = cs[svc].Addr(t, "8080")
	}
	h.list()
	tokens := map[registrar.Service]string{}
	for svc, addr := range at {
		tokens[svc] = h.here(t, svc, addr, "").ID
	}
	mark := h.here(t, "stays", at["stays"], "").Agent
	if mark == "" || mark != h.agent.mark {
		t.Errorf("its mark is %q", mark)
	}
	// Others of the same host's address, which are no business of this agent's.
	here := at["goes"].Addr()
	for svc, agent := range map[registrar.Service]string{"sidecar": "", "other": "another"} {
		b, err := registrar.NewBeater(registrar.BeaterConfig{Service: svc, Addr: netip.AddrPortFrom(here, 7), Weight: 1, Agent: agent}, h.store, zerolog.Nop())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.Beat(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := h.store.WriteLedger(t.Context(), mark, []registrar.Place{{Service: svc, Addr: netip.AddrPortFrom(here, 7)}}, nil); err != nil {
			t.Fatal(err)
		}
	}
	h.end()
	cs["goes"].Do(t, "KILL")
	cs["moves"].Do(t, "restart") // to another port
	cs["paused"].Do(t, "pause")
	defer cs["paused"].Do(t, "unpause") // or it cannot be removed
	moved := cs["moves"].Addr(t, "8080")
	p.stuck.Store(cs["stays"].ID)
	before := h.version(t, "goes")
	h.start(t)
	h.here(t, "moves", moved, tokens["moves"])
	eventually(t, func() error {
		if p.asked.Load() == 0 {
			return errors.New("the container that is not answered for has not been asked for")
		}
		return nil
	})
	// What is not known is not absent.
	if now := h.version(t, "goes"); now != before {
		t.Errorf("version %d became %d before all containers were known", before, now)
	}
	p.stuck.Store("")
	h.went(t, "goes", at["goes"], registrar.Left)
	h.went(t, "moves", at["moves"], registrar.Left)
	for svc, addr := range map[registrar.Service]netip.AddrPort{"stays": at["stays"], "paused": at["paused"], "sidecar": netip.AddrPortFrom(here, 7), "other": netip.AddrPortFrom(here, 7)} {
		if e, err := h.entry(t, svc, addr); err != nil || !e.Present || tokens[svc] != "" && e.Instance.Meta.ID != tokens[svc] {
			t.Errorf("%s: %+v, %v", svc, e, err)
		}
	}
	eventually(t, func() error {
		places, err := h.store.Ledger(t.Context(), mark)
		if err == nil && len(places) != 3 { // of stays, paused and moves
			err = fmt.Errorf("in the ledger: %v", places)
		}
		return err
	})
}

// TestEngineLeavesWhenRedisIsBack: what was left behind leaves also if Redis was away
// when the agent started, and before another service's container takes its port.
func TestEngineLeavesWhenRedisIsBack(t *testing.T) {
	t.Parallel()
	h := newHost(t, dockertest.Shared(t), nil)
	c := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: named("back")})
	addr := c.Addr(t, "8080")
	h.here(t, "back", addr, "")
	h.end()
	c.Do(t, "KILL")
	free(t, c)
	h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Port: addr.Port(), Labels: named("front")})
	// One that refuses to say what there was, as long as it is so.
	if err := h.rdb.Do(t.Context(), "CONFIG", "SET", "min-replicas-to-write", 1).Err(); err != nil {
		t.Fatal(err)
	}
	h.start(t)
	eventually(t, func() error {
		if s := h.agent.Status(); s.Standby == nil {
			return errors.New("it registers")
		}
		return nil
	})
	begun := time.Now()
	if err := h.rdb.Do(t.Context(), "CONFIG", "SET", "min-replicas-to-write", 0).Err(); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { return h.agent.Status().Standby })
	// Another agent that held the lease before the outage would have taken it first.
	if took := time.Since(begun); took < registrar.DefaultInterval/2 {
		t.Errorf("it has the lease %v after redis was back", took)
	}
	h.went(t, "back", addr, registrar.Left)
	h.here(t, "front", addr, "")
	if got, want := fmt.Sprint(h.order(t, addr)), "[back joined back left front joined]"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// TestMarks: what makes two agents' registrations each other's, and what does not.
func TestMarks(t *testing.T) {
	at := func(s string) place { return place{advertise: netip.MustParseAddr(s)} }
	inside := func(n string) place { return place{internal: true, network: n} }
	marks := map[string]string{}
	for what, mark := range map[string]string{
		"an engine": at("10.0.0.1").markOf("id", "name"), "a clone with another name": at("10.0.0.1").markOf("id", "other"),
		"a clone at another address": at("10.0.0.2").markOf("id", "name"), "its containers' addresses": inside("").markOf("id", "name"),
		"those of a network": inside("n").markOf("id", "name"), "texts that run together": at("10.0.0.1").markOf("idn", "ame"),
	} {
		if other, twice := marks[mark]; twice || len(mark) > registrar.MaxName || strings.ContainsAny(mark, `"\ :`) {
			t.Errorf("%s has the mark %s, as %s", what, mark, other)
		}
		marks[mark] = what
	}
	mark := at("10.0.0.1").markOf("id", "name")
	if again := at("10.0.0.1").markOf("id", "name"); again != mark {
		t.Error("the mark of an Engine is not the same again")
	}
	if leaseOf(mark, []registrar.Service{"a", "b"}) != leaseOf(mark, []registrar.Service{"b", "a"}) || leaseOf(mark, nil) == leaseOf(mark, []registrar.Service{"a"}) {
		t.Error("a lease is of a mark and the services, in no order")
	}
}

// TestEngineWithoutInfo: a proxy that does not let the agent ask who the Engine is
// leaves it without a mark. --id gives it one.
func TestEngineWithoutInfo(t *testing.T) {
	t.Parallel()
	e := dockertest.Shared(t)
	p := behind(t, e)
	p.noInfo.Store(true)
	for _, id := range []string{"", "rack 1"} {
		h := newHost(t, e, func(c *Config) { c.Engine, c.ID = p.url, id })
		c := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: named("unasked")})
		addr := c.Addr(t, "8080")
		var m registrar.Meta
		eventually(t, func() error {
			e, err := h.entry(t, "unasked", addr)
			if m = e.Instance.Meta; err != nil || !e.Present {
				h.list()
				return errors.Join(err, errors.New("it is not registered"))
			}
			return nil
		})
		if (m.Agent != "") != (id != "") {
			t.Errorf("with the id %q its mark is %q", id, m.Agent)
		}
		h.end()
	}
}

// TestEngineStandsBy: of two agents of one Engine one registers. The other one takes
// over when that ends, changes nothing by that, and hands over when it has been away.
func TestEngineStandsBy(t *testing.T) {
	t.Parallel()
	e := dockertest.Shared(t)
	h := newHost(t, e, func(c *Config) { c.Leave = true })
	if err := h.rdb.HSet(t.Context(), h.store.Keys().Config(), "interval_ms", 600).Err(); err != nil {
		t.Fatal(err)
	}
	c := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: named("standby")})
	addr := c.Addr(t, "8080")
	m := h.here(t, "standby", addr, "")
	second := &host{Engine: h.Engine, store: h.store, rdb: h.rdb, cfg: h.cfg}
	second.start(t)
	state := func(h *host, registers bool) {
		t.Helper()
		eventually(t, func() error {
			if s := h.agent.Status(); (s.Standby == nil && len(s.Instances) == 1) != registers || registers == (s.Standby != nil) {
				return fmt.Errorf("%+v, want that it registers: %v", s, registers)
			}
			return nil
		})
	}
	state(second, false)
	joined := h.version(t, "standby")
	second.end() // with Leave, and nothing leaves
	if now := h.version(t, "standby"); now != joined {
		t.Errorf("version %d became %d when the one that stands by ended", joined, now)
	}

	// Redis loses the lease with all else, and is away: the holder goes on.
	second.start(t)
	state(second, false)
	key := h.store.Keys().Docker(h.agent.lease)
	if err := h.rdb.Do(t.Context(), "CONFIG", "SET", "min-replicas-to-write", 1).Err(); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if n := h.rdb.Exists(t.Context(), key).Val(); n != 0 {
			return errors.New("the lease has not ended")
		}
		return nil
	})
	if err := h.rdb.Do(t.Context(), "CONFIG", "SET", "min-replicas-to-write", 0).Err(); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if by := h.rdb.Get(t.Context(), key).Val(); by != h.agent.holder {
			return fmt.Errorf("the lease is %q's", by)
		}
		return nil
	})
	state(h, true)
	state(second, false)

	// Another one has it, as after a pause of this process.
	if err := h.rdb.Set(t.Context(), key, second.agent.holder, redis.KeepTTL).Err(); err != nil {
		t.Fatal(err)
	}
	state(second, true)
	state(h, false)
	if again := h.here(t, "standby", addr, ""); again.ID != m.ID || h.version(t, "standby") != joined {
		t.Errorf("token %s became %s, version %d %d", m.ID, again.ID, joined, h.version(t, "standby"))
	}

	// In order.
	begun := time.Now()
	second.end() // with Leave
	if left := h.rdb.PTTL(t.Context(), key).Val(); left > 10*time.Millisecond && h.rdb.Get(t.Context(), key).Val() == second.agent.holder {
		t.Errorf("it still has the lease for %v", left)
	}
	h.here(t, "standby", addr, m.ID)
	state(h, true)
	t.Logf("taken over %v after the other one was told to end", time.Since(begun).Round(time.Millisecond))
}
