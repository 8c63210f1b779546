package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// TestOverridesCommand: what operators have said is listed, with those who are away and
// with services that nobody has registered as, where a list of instances has it too; who
// registers under an override says so; what was said for a time ends by a reaper.
func TestOverridesCommand(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 4}}})}
	store, err := registrar.NewStore(s.redis.Client(t), registrar.DefaultNamespace)
	must(t, err)
	must1 := func(_ int64, _ bool, err error) { t.Helper(); must(t, err) }
	list := func(args ...string) (rows []overrideRow) {
		t.Helper()
		out, stderr, code := s.rollcall(t, append([]string{"overrides", "-o", "json"}, args...)...)
		if err := json.Unmarshal([]byte(out), &rows); err != nil || code != 0 {
			t.Fatalf("exit %d, %v: %s%s", code, err, out, stderr)
		}
		return rows
	}
	if rows := list(); rows == nil || len(rows) != 0 {
		t.Errorf("without any: %v", rows)
	}
	if out, stderr, code := s.rollcall(t, "overrides", "wbe"); code != exitFailed || !strings.Contains(stderr, "nobody has ever registered as wbe") {
		t.Errorf("of nobody's service: exit %d, %s%s", code, out, stderr)
	}
	if _, _, code := s.rollcall(t, "overrides", "a", "b"); code != exitUsage {
		t.Errorf("of two services: exit %d", code)
	}
	a := haproxytest.NewInstance(t).Addr()
	s.spawn(t, "register", "--service", "web", "--addr", a.String())
	s.comes(t, a.String())
	away := freeAddr(t)
	must1(store.SetAdmin(t.Context(), "web", a, registrar.Word{Verb: "drain", By: "alice@host", Reason: "disk", For: 90 * time.Minute}))
	if _, stderr, code := s.rollcall(t, "maint", "web", away, "--absent", "--reason", "not yet"); code != 0 {
		t.Fatal(stderr)
	}
	if _, stderr, code := s.rollcall(t, "weight", "api", "10.9.9.9:80", "7", "--absent"); code != 0 {
		t.Fatal(stderr)
	}
	rows := list()
	if len(rows) != 3 {
		t.Fatalf("got %+v", rows)
	}
	if r := rows[0]; r.Service != "api" || r.Weight == nil || *r.Weight != 7 || r.Present {
		t.Errorf("got %+v", r)
	}
	i := slices.IndexFunc(rows, func(r overrideRow) bool { return r.Addr == a.String() })
	if r := rows[i]; r.State != "drain" || r.By != "alice@host" || r.Reason != "disk" || !r.Present || r.Until-r.At != 90*60_000 || r.Scope != registrar.ScopeAddress {
		t.Errorf("got %+v", r)
	}
	if rows := list("web"); len(rows) != 2 {
		t.Errorf("of web: %+v", rows)
	}
	out, _, _ := s.rollcall(t, "overrides")
	for _, want := range []string{"SERVICE", "alice@host", "drain in 1h", "not yet"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	out, _, _ = s.rollcall(t, "instances", "web")
	if !strings.Contains(out, away) || !strings.Contains(out, "nobody has it; maint") {
		t.Errorf("instances:\n%s", out)
	}
	if out, _, _ := s.rollcall(t, "doctor"); !strings.Contains(out, "3, of nobody 2") {
		t.Errorf("doctor:\n%s", out)
	}

	// Who comes to such an address says so.
	p := s.spawn(t, "register", "--service", "web", "--addr", away)
	p.says(t, "an operator's override of this address is in force")
	p.says(t, "rollcall ready web "+away)
	p.signal(t, syscall.SIGKILL)

	// No reaper: what was said for a time does not end, and status says so when it is late.
	rdb := s.redis.Client(t)
	must(t, rdb.ZAdd(t.Context(), "rollcall:override-due", redis.Z{Score: 1, Member: "web a " + a.String()}).Err())
	if _, stderr, code := s.rollcall(t, "status"); code != exitFailed || !strings.Contains(stderr, "1 are overdue") {
		t.Errorf("status: exit %d, %s", code, stderr)
	}
	must1(store.SetAdmin(t.Context(), "web", a, registrar.Word{Verb: "drain", By: "alice@host", For: time.Second}))
	s.spawn(t, "reap", "--ttl", "3s", "--heartbeat", "1s", "--set-ttl")
	haproxytest.Poll(t, "a reaper has ended it", func() error {
		if rows := list("web"); slices.ContainsFunc(rows, func(r overrideRow) bool { return r.Addr == a.String() }) {
			return fmt.Errorf("%+v", rows)
		}
		return nil
	})
	if out, _, _ := s.rollcall(t, "events", "web"); !strings.Contains(out, "disk, for 90m, by alice@host") {
		t.Errorf("the events do not say by whom:\n%s", out)
	}
	haproxytest.Poll(t, "the events say so", func() error {
		if out, _, _ := s.rollcall(t, "events", "web"); !strings.Contains(out, "override-ended") || !strings.Contains(out, "drain by alice@host, its time is over") {
			return errors.New(out)
		}
		return nil
	})
}

// TestEphemeral: what is said of an instance whose address is its own is not said of who
// comes there next.
func TestEphemeral(t *testing.T) {
	t.Parallel()
	s, _ := balanced(t)
	addr := haproxytest.NewInstance(t).Addr().String()
	weight := func(want int) {
		t.Helper()
		haproxytest.Poll(t, fmt.Sprintf("its weight is %d", want), func() error {
			out, stderr, _ := s.rollcall(t, "instances", "web", "-o", "json")
			var rows []instanceRow
			if err := json.Unmarshal([]byte(out), &rows); err != nil {
				return fmt.Errorf("%w: %s", err, stderr)
			}
			i := slices.IndexFunc(rows, func(r instanceRow) bool { return r.Addr == addr })
			if i < 0 || rows[i].Weight != want || rows[i].Serving != 1 {
				return fmt.Errorf("%+v", rows)
			}
			return nil
		})
	}
	first := s.spawn(t, "register", "--service", "web", "--addr", addr, "--ephemeral", "--id-file", "")
	weight(100)
	if _, stderr, code := s.rollcall(t, "weight", "web", addr, "50", "--wait"); code != 0 {
		t.Fatal(stderr)
	}
	weight(50)
	if out, _, _ := s.rollcall(t, "overrides"); !strings.Contains(out, " registration ") {
		t.Errorf("got %s", out)
	}
	first.signal(t, syscall.SIGTERM)
	<-first.done
	second := s.spawn(t, "register", "--service", "web", "--addr", addr, "--ephemeral", "--id-file", "")
	weight(100)
	if out := second.out.String(); strings.Contains(out, "override") {
		t.Errorf("it says that it is under an override: %s", out)
	}
}
