package docker

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"rollcall/registrar/docker/dockertest"
	"rollcall/registrar/health"
)

// TestEngineCommandUnknown: a command that the Engine does not run, or says nothing of,
// tells nothing of the app; the instance stays.
func TestEngineCommandUnknown(t *testing.T) {
	t.Parallel()
	e := dockertest.Shared(t)
	p := behind(t, e)
	unknown := make(chan struct{}, 1000)
	h := newHost(t, e, func(c *Config) {
		c.Engine = p.url
		c.Unknown = func() {
			select {
			case unknown <- struct{}{}:
			default:
			}
		}
	})
	c := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Labels: named("cmd", "SERVICE_CHECK_CMD", "/app check", "SERVICE_CHECK_INTERVAL", "100ms", "SERVICE_CHECK_TIMEOUT", "5s")})
	addr := c.Addr(t, "8080")
	eventually(t, func() error {
		_, err := h.entry(t, "cmd", addr)
		return errors.Join(err, h.agent.Reconcile(t.Context()))
	})
	joined := h.version(t, "cmd")

	look := func(argv ...string) error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		return h.agent.command(c.ID, argv)(ctx)
	}
	if err := look("/app", "check"); err != nil {
		t.Error(err)
	}
	for _, argv := range [][]string{{"/none"}, {"/"}} {
		if err := look(argv...); !errors.Is(err, health.ErrUnknown) {
			t.Errorf("%q: %v", argv, err)
		}
	}
	p.broken.Store(true)
	if err := look("/app", "check"); !errors.Is(err, health.ErrUnknown) {
		t.Errorf("an Engine that can make none: %v", err)
	}
	for range 20 { // three misses take it out
		select {
		case <-unknown:
		case <-time.After(30 * time.Second):
			t.Fatal("it is not looked at")
		}
	}
	if now := h.version(t, "cmd"); now != joined || !slices.ContainsFunc(h.agent.Status().Instances, func(i InstanceStatus) bool { return i.Addr == addr && i.Standing == Registered }) {
		t.Errorf("version %d became %d: %+v", joined, now, h.agent.Status().Instances)
	}
	p.broken.Store(false)
	tell(t, addr, "sick")
	eventually(t, func() error {
		e, err := h.entry(t, "cmd", addr)
		if err == nil && e.Present {
			err = errors.New("still there")
		}
		return err
	})
	if err := look("/app", "check"); err == nil || errors.Is(err, health.ErrUnknown) {
		t.Errorf("a sick app: %v", err)
	}
}
