package docker

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"rollcall/registrar/docker/dockertest"
)

// says waits until the log has a line with all of these words, of the level, and
// tells how many such lines there are.
func (h *host) says(tb testing.TB, level string, words ...string) (n int) {
	tb.Helper()
	eventually(tb, func() error {
		n = 0
		for line := range strings.Lines(h.out.String()) {
			has := strings.Contains(line, `"level":"`+level+`"`)
			for _, w := range words {
				has = has && strings.Contains(line, w)
			}
			if has {
				n++
			}
		}
		if n == 0 {
			return fmt.Errorf("no line of level %s with %q in\n%s", level, words, h.out.String())
		}
		return nil
	})
	return n
}

// TestEngineWrongLabels: a container with every wrong label is registered without
// those, and each is said once a life.
func TestEngineWrongLabels(t *testing.T) {
	t.Parallel()
	h := newHost(t, dockertest.Shared(t), nil)
	c := h.Run(t, dockertest.Spec{Publish: []string{"8080"}, Name: "mistaken", Labels: named("Mistaken",
		"SERVICE_DESC", strings.Repeat("x", 300), "SERVICE_LINE", "a\nb", "SERVICE_WEIGHT", "300", "SERVICE_TAGS", `a\,b=c`,
		"SERVICE_CHECK_HTTP", "/healthz", "SERVICE_CHECK_INTERVAL", "1", "SERVICE_CHECK_TIMEOUT", "soon", "SERVICE_CHECK_SCRIPT", "true", "SERVICE_81_NAME", "other")})
	addr := c.Addr(t, "8080")
	m := h.here(t, "mistaken", addr, "")
	if m.Weight != 100 || m.Tags["a,b"] != "c" || m.Tags["desc"] != "" || m.Tags["line"] != "" {
		t.Errorf("registered as %+v", m)
	}
	said := [][]string{
		{"warn", `"label":"SERVICE_DESC"`, "300 bytes"}, {"warn", `"label":"SERVICE_LINE"`}, {"warn", `"label":"SERVICE_WEIGHT"`, `\"300\"`},
		{"warn", `"label":"SERVICE_CHECK_INTERVAL"`, "write 1s"}, {"warn", `"label":"SERVICE_CHECK_TIMEOUT"`, `\"soon\"`},
		{"warn", `"label":"SERVICE_CHECK_SCRIPT"`, "SERVICE_CHECK_CMD"}, {"warn", `"label":"SERVICE_81_NAME"`}, {"info", `"label":"SERVICE_NAME"`, "no capitals"},
	}
	look := func(times int) {
		t.Helper()
		for _, s := range said {
			if n := h.says(t, s[0], append(s[1:], `"name":"mistaken"`)...); n != times {
				t.Errorf("%q: %d times, want %d", s, n, times)
			}
		}
	}
	c.Do(t, "pause")
	c.Do(t, "unpause")
	m = h.here(t, "mistaken", addr, m.ID)
	look(1)
	c.Do(t, "restart")
	h.here(t, "mistaken", c.Addr(t, "8080"), m.ID)
	look(2) // another life
}

// TestEngineLeftOut: a container that asks for a name and is left out is said, with
// the reason, and one that is not registered because nobody asked is not.
func TestEngineLeftOut(t *testing.T) {
	t.Parallel()
	e := dockertest.Shared(t)
	other := netip.MustParseAddr("10.95.0.2")
	h := newHost(t, e, func(c *Config) { c.Advertise = other })
	image := h.Run(t, dockertest.Spec{Publish: []string{"0.0.0.0:8080"}, Labels: named("first")}).Inspect(t).Image
	for _, c := range []struct {
		spec dockertest.Spec
		want string
	}{
		{dockertest.Spec{Labels: named("inward")}, "port 8080 is not published"},
		{dockertest.Spec{Publish: []string{"8080"}, Labels: named("loop")}, "is for this host alone: publish it on 10.95.0.2"},
		{dockertest.Spec{Publish: []string{"0.0.0.0:8080"}, Labels: named("_under")}, "beginning with a letter or a digit"},
	} {
		left := h.Run(t, c.spec)
		if n := h.says(t, "warn", `"container":"`+left.ID[:12]+`"`, c.want, "not registered as it is labelled"); n != 1 {
			t.Errorf("%s: said %d times", c.want, n)
		}
	}
	ignored := h.Run(t, dockertest.Spec{Labels: named("ignored", "SERVICE_IGNORE", "1")})
	byID := newHost(t, e, func(c *Config) { c.Advertise, c.Explicit = other, false })
	x := h.Run(t, dockertest.Spec{Image: image, Publish: []string{"0.0.0.0:8080"}})
	if n := byID.says(t, "warn", `"container":"`+x.ID[:12]+`"`, "started by its image's id", "set SERVICE_NAME"); n != 1 {
		t.Errorf("an image by its id: said %d times", n)
	}
	if n := byID.rdb.Exists(t.Context(), byID.store.Keys().Instances("sha256")).Val(); n != 0 {
		t.Error("a service sha256")
	}
	// One that came after it has been seen to.
	h.here(t, "last", netip.AddrPortFrom(other, h.Run(t, dockertest.Spec{Publish: []string{"0.0.0.0:8080"}, Labels: named("last")}).Addr(t, "8080").Port()), "")
	for line := range strings.Lines(h.out.String()) {
		if strings.Contains(line, ignored.ID[:12]) && strings.Contains(line, `"level":"warn"`) || strings.Contains(line, x.ID[:12]) && strings.Contains(line, `"level":"warn"`) {
			t.Errorf("it says %s", line)
		}
	}
}
