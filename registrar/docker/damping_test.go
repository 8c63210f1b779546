package docker

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"rollcall/registrar"
	"rollcall/registrar/docker/dockertest"
)

// standing waits until the agent says so of a service's address.
func (h *host) stands(tb testing.TB, svc registrar.Service, addr netip.AddrPort, want Standing) {
	tb.Helper()
	eventually(tb, func() error {
		for _, i := range h.agent.Status().Instances {
			if i.Service == svc && i.Addr == addr && i.Standing == want {
				return nil
			}
		}
		return fmt.Errorf("want %s %s with standing %d: %+v", svc, addr, want, h.agent.Status().Instances)
	})
}

// TestEngineDamped: a container whose HEALTHCHECK flaps waits before it returns, while
// another of its service serves; when that has gone it returns at once.
func TestEngineDamped(t *testing.T) {
	t.Parallel()
	h := newHost(t, dockertest.Shared(t), nil)
	other := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: named("flaps")})
	h.here(t, "flaps", other.Addr(t, "8080"), "")
	c := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Check: true, Labels: named("flaps")})
	addr := c.Addr(t, "8080")
	id, flaps := "", 0
	damped := func() bool {
		for _, i := range h.agent.Status().Instances {
			if i.Addr == addr {
				return i.Standing == Damped
			}
		}
		return false
	}
	// On a machine so busy that three flaps take more than a minute it takes some more.
	for begun := time.Now(); !damped(); flaps++ {
		if time.Since(begun) > 5*time.Minute {
			t.Fatalf("not damped after %d flaps", flaps)
		}
		id = h.here(t, "flaps", addr, id).ID
		tell(t, addr, "sick")
		h.went(t, "flaps", addr, registrar.Unhealthy)
		tell(t, addr, "well")
		eventually(t, func() error {
			if e, err := h.entry(t, "flaps", addr); err != nil || !e.Present && !damped() {
				return errors.Join(err, errors.New("neither registered nor damped"))
			}
			return nil
		})
	}
	if flaps < 3 {
		t.Errorf("damped after %d flaps", flaps)
	}
	if n := h.says(t, "warn", "it comes and goes", `"container":"`+c.ID[:12]+`"`, `"service":"flaps"`); n != 1 {
		t.Errorf("said %d times", n)
	}
	other.Do(t, "KILL")
	h.here(t, "flaps", addr, id)
	h.stands(t, "flaps", addr, Registered)
}

// TestEngineCrashes: a container that crashes and is started again by the Engine is
// damped through its lives.
func TestEngineCrashes(t *testing.T) {
	t.Parallel()
	h := newHost(t, dockertest.Shared(t), func(c *Config) { c.Internal = true; c.Network = "rollcall" })
	other := h.Run(t, dockertest.Spec{Labels: named("crashes")})
	h.here(t, "crashes", netip.AddrPortFrom(other.IP(t), 8080), "")
	c := h.Run(t, dockertest.Spec{Restart: true, Labels: named("crashes")})
	said := func() int { return strings.Count(h.out.String(), "it comes and goes") }
	id := ""
	for n := 0; said() == 0; n++ {
		if n == 12 {
			t.Fatalf("not damped after %d crashes", n)
		}
		life := c.Inspect(t).State
		id = h.here(t, "crashes", netip.AddrPortFrom(c.IP(t), 8080), id).ID
		if err := syscall.Kill(life.Pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error {
			if s := c.Inspect(t).State; !s.Running || s.StartedAt == life.StartedAt || !c.IP(t).IsValid() {
				return fmt.Errorf("it is %s since %s", s.Status, s.StartedAt)
			}
			return nil
		})
	}
	if n := h.says(t, "warn", "it comes and goes", `"container":"`+c.ID[:12]+`"`); n != 1 {
		t.Errorf("said %d times", n)
	}
	h.here(t, "crashes", netip.AddrPortFrom(c.IP(t), 8080), id) // in the end
}
