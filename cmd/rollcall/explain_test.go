package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
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

// TestExplain follows instances through what may become of them, and demands the
// reason and the next step each time.
func TestExplain(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 5, Check: true}}})}
	rdb, ctx := s.redis.Client(t), t.Context()
	keys, err := registrar.NewKeys(registrar.DefaultNamespace)
	if err != nil {
		t.Fatal(err)
	}
	do := func(args ...any) {
		t.Helper()
		if err := rdb.Do(ctx, args...).Err(); err != nil && !errors.Is(err, redis.Nil) {
			t.Fatal(err)
		}
	}
	// explain polls until the table has every one of wants, and returns the
	// document.
	explain := func(code int, addr string, wants ...string) (doc explanation) {
		t.Helper()
		haproxytest.Poll(t, fmt.Sprintf("explain %s says %q", addr, wants), func() error {
			out, stderr, got := s.rollcall(t, "explain", "web", addr)
			for _, w := range wants {
				if !strings.Contains(strings.Join(strings.Fields(out+stderr), " "), w) {
					return fmt.Errorf("no %q in\n%s%s", w, out, stderr)
				}
			}
			if got != code || strings.ContainsAny(out, "\x1b\r") {
				return fmt.Errorf("exit %d, %q", got, out)
			}
			out, stderr, _ = s.rollcall(t, "explain", "web", addr, "-o", "json")
			if err := json.Unmarshal([]byte(out), &doc); err != nil {
				t.Fatalf("%v: %s%s", err, out, stderr)
			}
			return nil
		})
		return doc
	}
	ready := fmt.Sprintf("--redis %s", s.redis.URL())

	explain(1, "10.0.0.9:80", "not registered; no balancer of this service is alive", "nothing knows it", "no event of the last 10,000", "of 0 balancers", "next: no balancer of web is alive")

	a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
	addr := a.Addr().String()
	side := s.spawn(t, "register", "--service", "web", "--addr", addr, "--zone", "z1", "--tag", "x=y")
	s.spawn(t, "lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8")
	doc := explain(0, addr, "registered; 1 of 1 balancers send it requests", "here since version 1", "ready, weight 100, zone z1, x=y", "of a TTL of 15s", "has applied version 1 of 1",
		"be ", "check up", "joined", "0 of 0 alive are armed; so it is not taken out", "next: nothing: it gets requests")
	if i := doc.Instance; i == nil || i.Owner == "" || i.JoinedAt != 1 || i.RemovedAt != i.Beat+15000 || i.AgeMS > 15000 || doc.Changed != 1 || doc.Version != 1 {
		t.Errorf("%+v of %+v", doc.Instance, doc)
	}
	if lb := doc.Balancers[0]; !lb.Live || lb.Applied != 1 || lb.At == 0 || !lb.Servers["be"].Serving() {
		t.Errorf("%+v", lb)
	}

	if _, stderr, code := s.rollcall(t, "drain", "web", addr, "--reason", "new\x1bdisk"); code != 0 {
		t.Fatal(stderr)
	}
	explain(0, addr, "because: new?disk", "drain, until ready", "waits: too few other servers are up", "has not applied its last change", "next: an operator has said drain: rollcall ready web "+addr+" "+ready, "start another instance", "drained")
	s.spawn(t, "register", "--service", "web", "--addr", b.Addr().String())
	explain(0, addr, "0 of 1 balancers send it requests", "drain, weight 100", "has applied version 3 of 3")
	for _, word := range []string{"ready", "weight"} {
		args := []string{word, "web", addr}
		if word == "weight" {
			args = append(args, "0")
		}
		if _, stderr, code := s.rollcall(t, args...); code != 0 {
			t.Fatal(stderr)
		}
	}
	explain(0, addr, "ready, weight 0 (its own: 100)", "operator", "weight 0", "rollcall weight web "+addr+" own")
	if _, stderr, code := s.rollcall(t, "weight", "web", addr, "own"); code != 0 {
		t.Fatal(stderr)
	}
	doc = explain(0, addr, "1 of 1 balancers send it requests")
	if doc.Operator != nil {
		t.Errorf("an operator's word of nothing: %+v", doc.Operator)
	}

	// What a reaper would do.
	now := rdb.Time(ctx).Val().UnixMilli()
	old := "10.0.0.1:80"
	do("ZADD", keys.Instances("web"), now-60_000, old)
	explain(0, old, "heartbeat 1m", "0 of 0 alive are armed; so it is not taken out", "no reaper is armed to take it out: rollcall status "+ready)
	do("HSET", keys.Reapers(), "r1", fmt.Sprintf(`{"at":%d,"armed":true}`, now+10_000))
	explain(0, old, "1 of 1 alive are armed; taken out now without another heartbeat", "it has missed heartbeats")
	do("HSET", keys.Reapers(), "r1", fmt.Sprintf(`{"at":%d,"armed":true,"held":[{"service":"api","suspects":9,"members":9,"since":1},{"service":"web","suspects":2,"members":3,"since":%d}]}`, now+10_000, now-5000))
	doc = explain(0, old, "web held for ", "2 of 3 look dead", "taken out when that ends, or from in 4m", "rollcall reap --once --force "+ready)
	if len(doc.Held) != 1 || doc.Held[0].Service != "web" || !strings.HasSuffix(doc.Overrule, ready) {
		t.Errorf("%+v, %q", doc.Held, doc.Overrule)
	}
	do("HSET", keys.Meta("web"), old, "no JSON")
	explain(0, old, "its entry cannot be read", "rollcall doctor")
	do("HDEL", keys.Meta("web"), old)
	do("ZREM", keys.Instances("web"), old)

	// Who has gone, and a word about somebody who was never there.
	if code := side.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
	doc = explain(0, addr, "left ", "0 of 1 balancers send it requests", "draining", "no server, as of then")
	if doc.Instance != nil || doc.Gone == nil || doc.Gone.Owner == "" || doc.Gone.Reason != registrar.Left {
		t.Errorf("%+v", doc)
	}
	if _, stderr, code := s.rollcall(t, "maint", "web", "10.0.0.2:80", "--absent"); code != 0 {
		t.Fatal(stderr)
	}
	explain(0, "10.0.0.2:80", "not registered", "maint, until ready", "no note of the last 10 min")

	three := 3
	for _, word := range []registrar.Word{{Verb: "drain", Reason: "disk", By: "alice@ops", For: 2 * time.Hour}, {Verb: "weight", Weight: &three, By: "ci", For: time.Hour}} {
		store, err := registrar.NewStore(rdb, registrar.DefaultNamespace)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := store.SetAdmin(ctx, "web", netip.MustParseAddrPort("10.0.0.3:80"), word); err != nil {
			t.Fatal(err)
		}
	}
	doc = explain(0, "10.0.0.3:80", "drain, until ready or in 1h59m", "; weight 3, until own or in 59m", "; by ci; because: disk", "drained alice@ops disk, for 2h", "weight ci 3")
	if doc.Operator == nil || doc.Operator.By != "ci" || doc.Operator.Until == 0 || doc.Operator.WeightUntil == 0 {
		t.Errorf("%+v", doc.Operator)
	}

	// What only HAProxy and lbsync know.
	name := ""
	for line := range strings.Lines(s.ha.Command(t, "show servers state be")) {
		if f := strings.Fields(line); len(f) > 18 && f[4]+":"+f[18] == b.Addr().String() {
			name = f[3]
		}
	}
	s.ha.Command(t, "set server be/"+name+" state maint")
	if _, stderr, code := s.rollcall(t, "weight", "web", b.Addr().String(), "50"); code != 0 { // so that it looks
		t.Fatal(stderr)
	}
	explain(0, b.Addr().String(), "maint, weight 100, check", "; human", "set server be/"+name+" state ready")
	for _, tt := range []struct {
		state registrar.ServerState
		wants []string
	}{
		{registrar.ServerState{Server: "x", State: "ready", Check: "down", Weight: 1}, []string{"check down", "HAProxy's own check of it fails"}},
		{registrar.ServerState{Note: registrar.NoteUnplaced}, []string{"no server; unplaced", "raise the count of the server-template of backend be"}},
		{registrar.ServerState{Note: registrar.NoteRefused, Why: "it is in none of the allowed networks"}, []string{"refused: it is in none of the allowed networks", "--allow"}},
		{registrar.ServerState{Server: "x", State: "ready", Check: "up", Weight: 1, Note: registrar.NoteHeld, Since: now, Until: now + 600_000}, []string{"held since", "out in", "kept in HAProxy"}},
		{registrar.ServerState{Server: "x\x1b", State: "maint\x1b", Note: registrar.NoteHuman}, []string{"x? maint?", "set server … state ready"}},
	} {
		value, err := json.Marshal(map[string]registrar.ServerState{"be": tt.state})
		if err != nil {
			t.Fatal(err)
		}
		do("HSET", keys.Seen("web", doc.Balancers[0].Balancer), "10.0.0.2:80", value)
		explain(0, "10.0.0.2:80", tt.wants...)
	}

	// A part that cannot be read is not left out in silence.
	do("DEL", keys.Events())
	do("SET", keys.Events(), "x")
	doc = explain(1, addr, "left", "not all could be read", "could not look everywhere", "WRONGTYPE")
	if len(doc.Unknown) != 1 || !slices.ContainsFunc(doc.Balancers, func(b explainedLB) bool { return b.Live }) {
		t.Errorf("%+v", doc)
	}
	for _, args := range []string{"web", "web 10.0.0.1", "Web 10.0.0.1:80", "web 10.0.0.1:80 x"} {
		if _, stderr, code := s.rollcall(t, append([]string{"explain"}, strings.Fields(args)...)...); code != exitUsage {
			t.Errorf("%s: exit %d, %s", args, code, stderr)
		}
	}
	s.redis.Kill(t)
	if out, stderr, code := s.rollcall(t, "explain", "web", addr); code != exitFailed || out != "" || stderr == "" {
		t.Errorf("without Redis: exit %d, %q, %q", code, out, stderr)
	}
}
