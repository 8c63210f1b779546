package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/redis/go-redis/v9"
	"github.com/urfave/cli/v2"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// TestStatus shows a registry without a reaper, with one that is armed, one
// that holds, what its own command does about that, and how a reaper ends.
func TestStatus(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	rdb, ctx := s.redis.Client(t), t.Context()
	keys, err := registrar.NewKeys(registrar.DefaultNamespace)
	if err != nil {
		t.Fatal(err)
	}
	// status polls until ok is content, and returns what it saw.
	status := func(what string, wantCode int, ok func(statusDoc) bool) (doc statusDoc) {
		t.Helper()
		haproxytest.Poll(t, what, func() error {
			out, stderr, code := s.rollcall(t, "status", "-o", "json")
			doc = statusDoc{}
			if err := json.Unmarshal([]byte(out), &doc); err != nil || code != wantCode || doc.Healthy != (code == 0) || !ok(doc) {
				return fmt.Errorf("exit %d, %v, %s%s", code, err, out, stderr)
			}
			if code != 0 && (!strings.HasPrefix(stderr, "rollcall: ") || strings.Count(stderr, "\n") != 1) {
				t.Errorf("said %q, want one line", stderr)
			}
			return nil
		})
		return doc
	}
	beat := func(age int64, addrs ...string) {
		t.Helper()
		at := rdb.Time(ctx).Val().UnixMilli() - age
		for _, a := range addrs {
			if err := rdb.ZAdd(ctx, keys.Instances("web"), redis.Z{Score: float64(at), Member: a}).Err(); err != nil {
				t.Fatal(err)
			}
		}
		if err := rdb.SAdd(ctx, keys.Services(), "web").Err(); err != nil {
			t.Fatal(err)
		}
	}

	out, stderr, code := s.rollcall(t, "status")
	if code != exitFailed || !strings.Contains(stderr, "no reaper is armed") || !strings.Contains(out, "REGISTRY") {
		t.Errorf("an empty registry: exit %d, %s%s", code, out, stderr)
	}
	reap := s.spawn(t, "reap", "--ttl", "3s", "--heartbeat", "800ms")
	doc := status("a reaper that is not armed yet", exitFailed, func(d statusDoc) bool { return len(d.Reapers) == 1 })
	if r := doc.Reapers[0]; !r.Live || r.Armed || r.Cause == "" {
		t.Errorf("%+v", r)
	}
	if err := rdb.ZAdd(ctx, keys.Balancers(), redis.Z{Score: float64(rdb.Time(ctx).Val().UnixMilli()), Member: "lb1"}).Err(); err != nil {
		t.Fatal(err)
	}
	doc = status("a reaper that is armed", 0, func(d statusDoc) bool { return len(d.Reapers) == 1 && d.Reapers[0].Armed })
	if r := doc.Registry; r.Namespace != "rollcall" || r.Epoch == "" || r.TTLMS != 3000 || r.IntervalMS != 800 || r.Services != 0 {
		t.Errorf("%+v", r)
	}
	if len(doc.Held) > 0 || len(doc.Balancers) != 1 || !doc.Balancers[0].Live || doc.Balancers[0].Balancer != "lb1" {
		t.Errorf("%+v", doc)
	}

	beat(60_000, "10.0.0.1:80", "10.0.0.2:80")
	doc = status("a hold", exitFailed, func(d statusDoc) bool { return len(d.Held) == 1 })
	if h := doc.Held[0]; h.Service != "web" || h.Suspects != 2 || h.Members != 2 || h.Since == 0 || h.Until < h.Since ||
		h.LetGo != h.Since+300_000 || !strings.Contains(h.Rule, "half of the service") {
		t.Errorf("%+v", h)
	}
	if r := doc.Registry; r.Services != 1 || r.Instances != 2 || r.Stale != 2 {
		t.Errorf("%+v", r)
	}
	out, stderr, code = s.rollcall(t, "status")
	overrule := "rollcall reap --once --force --ttl 3s --heartbeat 800ms --redis " + s.redis.URL()
	for _, want := range []string{"2 of 2", "half of the service", "back for 1.6s", "one goes each 10s, from ", "\n  " + overrule + "\n", "lb1"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if code != exitFailed || !strings.Contains(stderr, "web held: 2 of 2") {
		t.Errorf("exit %d, %s", code, stderr)
	}
	if doc.Overrule != overrule {
		t.Errorf("overrule: %q, want %q", doc.Overrule, overrule)
	}

	// A service of which a key has a wrong type, and one whose version is no number.
	for _, key := range []string{keys.Instances("odd"), keys.Meta("odd"), keys.Admin("odd"), keys.Gone("odd"), keys.GoneAt("odd"), keys.Changed("odd"), keys.ServiceVersion("odd"), keys.Applied("odd")} {
		rdb.Del(ctx, keys.Instances("odd"))
		if key != keys.Instances("odd") { // else a reaper takes the name off
			rdb.ZAdd(ctx, keys.Instances("odd"), redis.Z{Score: float64(rdb.Time(ctx).Val().UnixMilli()), Member: "10.0.0.9:80"})
		}
		rdb.LPush(ctx, key, "x")
		rdb.SAdd(ctx, keys.Services(), "odd")
		if _, stderr, code := s.rollcall(t, "status"); code != exitFailed || !strings.Contains(stderr, key) {
			t.Errorf("a list at %s: exit %d, %s", key, code, stderr)
		}
		rdb.Del(ctx, key)
	}
	for _, key := range []string{keys.ServiceVersion("odd"), keys.Version()} {
		was := rdb.Get(ctx, key).Val()
		rdb.ZAdd(ctx, keys.Instances("odd"), redis.Z{Score: float64(rdb.Time(ctx).Val().UnixMilli()), Member: "10.0.0.9:80"})
		rdb.SAdd(ctx, keys.Services(), "odd")
		rdb.Set(ctx, key, "-5", 0)
		if _, stderr, code := s.rollcall(t, "status"); code != exitFailed || !strings.Contains(stderr, "2^53") {
			t.Errorf("%s is no number: exit %d, %s", key, code, stderr)
		}
		rdb.Set(ctx, key, was, 0)
	}
	rdb.SRem(ctx, keys.Services(), "odd")
	rdb.Del(ctx, keys.ServiceVersion("odd"), keys.Instances("odd"))

	// The command itself, as printed.
	out, stderr, code = s.rollcall(t, strings.Fields(doc.Overrule)[1:]...)
	if code != 0 || !strings.Contains(out, "10.0.0.1:80") || !strings.Contains(out, "10.0.0.2:80") {
		t.Errorf("%s: exit %d, %s%s", doc.Overrule, code, out, stderr)
	}
	status("no hold any more", 0, func(d statusDoc) bool { return len(d.Held) == 0 && d.Registry.Instances == 0 })
	log := reap.out.String()
	if !strings.Contains(log, "held: too many look dead") || !strings.Contains(log, "overrule=\"rollcall reap --once --force --ttl 3s --heartbeat 800ms\"") || !strings.Contains(log, "no longer held") {
		t.Errorf("the log explains neither begin nor end:\n%s", log)
	}

	// One that is stopped or killed counts as alive for 12 s; one that ends says so.
	if code := reap.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
	status("nobody", exitFailed, func(d statusDoc) bool { return len(d.Reapers) == 0 })

	// What holds and does not live any more, or cannot be read, holds nothing.
	for id, state := range map[string]string{
		"dead": `{"at":1,"armed":true,"held":[{"service":"web","suspects":1,"members":1,"since":1,"until":1}]}`, "odd\x1b[31m": "x",
	} {
		if err := rdb.HSet(ctx, keys.Reapers(), id, state).Err(); err != nil {
			t.Fatal(err)
		}
	}
	doc = status("only the dead", exitFailed, func(d statusDoc) bool { return len(d.Reapers) == 2 })
	if len(doc.Held) > 0 || doc.Reapers[0].Live || doc.Reapers[1].Live || !strings.Contains(doc.Reapers[1].Cause, "cannot be read") {
		t.Errorf("%+v", doc)
	}
	if out, _, _ := s.rollcall(t, "status"); strings.Contains(out, "\x1b") {
		t.Errorf("drives the terminal: %q", out)
	}
	s.redis.Kill(t)
	if out, stderr, code := s.rollcall(t, "status"); code != exitFailed || out != "" || stderr == "" {
		t.Errorf("without Redis: exit %d, %q, %q", code, out, stderr)
	}
}

// TestSameRegistry holds what status adds to the command that overrules.
func TestSameRegistry(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{nil, ""},
		{[]string{"--redis", defaultRedis, "--namespace", "rollcall", "--log-level", "error"}, ""},
		{[]string{"--namespace", "prod", "--redis-ca", "/a b"}, " --redis-ca '/a b' --namespace prod"},
		{[]string{"--redis", "redis://u:s:e@cret@h:1/2"}, " --redis redis://u@h:1/2"},
		{[]string{"--redis", "redis+sentinel://:secret@a,b:2/main"}, " --redis redis+sentinel://@a,b:2/main"},
		{[]string{"--redis", "redis://u@h/0?x=1&y='"}, ` --redis 'redis://u@h/0?x=1&y='\'''`},
	} {
		app, got := newApp(nil, nil), "nothing ran"
		cmd := app.Command("status")
		cmd.Action = func(c *cli.Context) error { got = sameRegistry(c); return nil }
		if err := app.Run(append([]string{"rollcall", "status"}, tt.args...)); err != nil || got != tt.want {
			t.Errorf("%v: got %q, %v, want %q", tt.args, got, err, tt.want)
		}
	}
}
