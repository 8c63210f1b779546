package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// counted polls until as many live balancers as there are counts say of these
// backends that so many servers are up, and returns what they are.
func (s *system) counted(t *testing.T, store *registrar.Store, up ...string) (ids []string) {
	t.Helper()
	haproxytest.Poll(t, fmt.Sprintf("the balancers count %v", up), func() error {
		acks, err := store.Acks(t.Context(), "web")
		if err != nil {
			return err
		}
		ids = acks.Live()
		sights, err := store.Sights(t.Context(), "web", ids)
		if err != nil {
			return err
		}
		got := ""
		for _, sight := range sights {
			for backend, n := range sight.Up {
				got += fmt.Sprintf(" %s=%d ", backend, n)
			}
		}
		for _, want := range up {
			if !strings.Contains(got, " "+want+" ") || len(sights) != len(up) {
				return fmt.Errorf("%q", got)
			}
		}
		return nil
	})
	return ids
}

// waits polls until a balancer says that the drain of i waits.
func (s *system) waits(t *testing.T, store *registrar.Store, i *haproxytest.Instance) {
	t.Helper()
	haproxytest.Poll(t, "its drain waits", func() error {
		acks, err := store.Acks(t.Context(), "web")
		if err != nil {
			return err
		}
		sights, err := store.Sights(t.Context(), "web", acks.Live(), i.Addr())
		if err != nil {
			return err
		}
		for _, sight := range sights {
			for _, state := range sight.Servers[i.Addr()] {
				if state.Note == registrar.NoteWaits {
					return nil
				}
			}
		}
		return fmt.Errorf("%+v", sights)
	})
}

// TestLastInstance has operators try to take out the last instance, by command and
// by the API: what takes at once is refused unless it is forced, a drain waits and
// says so.
func TestLastInstance(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 5}}})}
	store, err := registrar.NewStore(s.redis.Client(t), registrar.DefaultNamespace)
	must(t, err)
	a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
	url, addr, other := "http://"+s.ha.Addr("be")+"/", a.Addr().String(), b.Addr().String()
	lb := s.spawn(t, "lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8")
	s.spawn(t, "register", "--service", "web", "--addr", addr)
	ids := s.counted(t, store, "be=1")
	version := func() int64 {
		t.Helper()
		v, err := store.Versions(t.Context(), []registrar.Service{"web"})
		must(t, err)
		return v.Of["web"]
	}
	// says runs a command and holds its exit code, what it prints on both outputs,
	// and whether it changed the register.
	says := func(code int, changes bool, what string, args ...string) {
		t.Helper()
		before := version()
		out, stderr, got := s.rollcall(t, args...)
		if got != code || !strings.Contains(out+stderr, what) || (version() != before) != changes {
			t.Errorf("%v: exit %d, version %d after %d, want exit %d and %q\n%s%s", args, got, version(), before, code, what, out, stderr)
		}
	}
	refusal := "it is the last that serves: " + ids[0] + " sends requests to no other server of be; start another first, or drain it, which waits for one, or say --force"
	says(exitFailed, false, "maint web "+addr+": "+refusal, "maint", "web", addr)
	says(exitFailed, false, "weight web "+addr+": "+refusal, "weight", "web", addr, "0", "--wait")
	says(0, true, "version", "weight", "web", addr, "10")
	says(0, true, "no such instance now", "maint", "web", "127.0.0.1:1", "--absent")
	says(exitUsage, false, "force", "drain", "web", addr, "--force")

	file := filepath.Join(t.TempDir(), "token")
	must(t, os.WriteFile(file, []byte(pageToken), 0o600))
	page := s.page(t, "serve", "--token-file", file)
	posts := func(code int, verb, body string, what string) {
		t.Helper()
		got, answer, err := page.do(http.MethodPost, "/v1/services/web/instances/"+addr+"/"+verb, body, "Authorization", "Bearer "+pageToken)
		if err != nil || got != code || !strings.Contains(answer, what) {
			t.Errorf("%s: %d %s, %v; want %d and %q", verb, got, answer, err, code, what)
		}
	}
	before := version()
	posts(409, "maint", `{"reason":"x"}`, `{"error":"maint web `+addr+`: it is the last that serves: `)
	posts(409, "weight", `{"weight":0}`, "?force=true")
	posts(400, "drain?force=true", `{"reason":"x"}`, "takes no force")
	posts(400, "ready?force=true", `{}`, "takes no force")
	if after := version(); after != before {
		t.Errorf("version %d after %d", after, before)
	}
	answered(t, url, a)

	// A drain is written, and waits.
	says(0, true, "; it waits: ", "drain", "web", addr)
	s.waits(t, store, a)
	says(exitWait, true, "the drain waits: too few other servers are up to drain it, says "+ids[0]+" of be", "drain", "web", addr, "--reason", "disk", "--wait", "--timeout", "2s")
	out, _, code := s.rollcall(t, "drain", "web", addr, "--reason", "disk", "-o", "json")
	var o outcome
	if err := json.Unmarshal([]byte(out), &o); err != nil || code != 0 || !strings.HasPrefix(o.Waits, "too few") {
		t.Errorf("exit %d, %s, %v", code, out, err)
	}
	posts(202, "drain?wait=200ms", `{"reason":"new disk"}`, `"waits":"too few other servers`)
	posts(200, "drain", `{"reason":"newer disk"}`, `"waits":"too few other servers`)
	says(exitFailed, false, refusal, "maint", "web", addr)
	answered(t, url, a)
	says(0, true, "applied by 1 balancers\n", "ready", "web", addr, "--wait")

	// With another up nothing is refused, and a drain does not wait. The other one is
	// the last as soon as that has been said.
	second := s.spawn(t, "register", "--service", "web", "--addr", other)
	s.counted(t, store, "be=2")
	says(0, true, "applied by 1 balancers\n", "drain", "web", addr, "--wait")
	says(0, true, "version", "maint", "web", addr)
	says(exitFailed, false, refusal, "maint", "web", other)
	answered(t, url, b)
	s.counted(t, store, "be=1")
	says(0, true, "version", "ready", "web", addr)
	s.counted(t, store, "be=2")
	says(0, true, "version", "weight", "web", addr, "0")
	says(exitFailed, false, refusal, "weight", "web", other, "0")
	answered(t, url, b)
	s.counted(t, store, "be=1")
	says(0, true, "version", "weight", "web", addr, "own")
	s.counted(t, store, "be=2")
	if code := second.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
	s.counted(t, store, "be=1")

	// By force it is taken out. That has then been said, so nothing is refused.
	for _, word := range [][]string{{"maint", "web", addr}, {"weight", "web", addr, "0"}} {
		says(exitFailed, false, refusal, word...)
		says(0, true, "applied by 1 balancers\n", append(word, "--force", "--wait")...)
		if r, err := http.Get(url); err != nil || r.StatusCode != http.StatusServiceUnavailable {
			t.Errorf("%v: %v, %v", word, r, err)
		}
		s.counted(t, store, "be=0")
		says(0, false, "version", word...)
		says(0, word[0] == "maint", "version", "ready", "web", addr)
		says(0, word[0] == "weight", "version", "weight", "web", addr, "own")
		s.counted(t, store, "be=1")
		answered(t, url, a)
	}
	posts(200, "maint?force=true&wait=10s", `{"reason":"x"}`, `"applied":true`)
	s.counted(t, store, "be=0")
	says(0, true, "version", "ready", "web", addr)
	s.counted(t, store, "be=1")

	// A balancer that is silent counts for nothing.
	lb.signal(t, syscall.SIGKILL)
	rdb := s.redis.Client(t)
	silent := rdb.Time(t.Context()).Val().Add(-registrar.BalancerLive - registrar.AckInterval).UnixMilli()
	must(t, rdb.Do(t.Context(), "ZADD", store.Keys().Balancers(), silent, ids[0]).Err())
	says(0, true, "version", "maint", "web", addr)
	says(0, true, "version", "ready", "web", addr)
	says(0, true, "version", "weight", "web", addr, "0")
}

// TestLastInstanceOfOneBalancer holds that a server of the operator's own is another
// one that serves, and that being the last behind one of two balancers is enough.
func TestLastInstanceOfOneBalancer(t *testing.T) {
	t.Parallel()
	own, a := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{
		{Name: "be_one", Slots: 3, Extra: []string{"server own " + own.Addr().String()}},
	}})}
	ha2 := haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be_two", Slots: 3}}})
	store, err := registrar.NewStore(s.redis.Client(t), registrar.DefaultNamespace)
	must(t, err)
	addr := a.Addr().String()
	lbsync := func(socket, backend string) {
		t.Helper()
		s.spawn(t, "lbsync", "--socket", socket, "--backend", "web="+backend, "--allow", "127.0.0.0/8")
	}
	done := func(args ...string) {
		t.Helper()
		if out, stderr, code := s.rollcall(t, args...); code != 0 || strings.Contains(out, "waits") {
			t.Errorf("%v: exit %d, %s%s", args, code, out, stderr)
		}
	}
	lbsync(s.ha.Socket, "be_one")
	s.spawn(t, "register", "--service", "web", "--addr", addr)
	s.counted(t, store, "be_one=2")
	url := "http://" + s.ha.Addr("be_one") + "/"
	answered(t, url, own, a)
	for _, word := range []string{"maint", "drain"} {
		done(word, "web", addr, "--wait")
		answered(t, url, own)
		done("ready", "web", addr, "--wait")
		answered(t, url, own, a)
	}

	lbsync(ha2.Socket, "be_two")
	s.counted(t, store, "be_one=2", "be_two=1")
	if _, stderr, code := s.rollcall(t, "maint", "web", addr); code != exitFailed || !strings.Contains(stderr, "sends requests to no other server of be_two;") {
		t.Errorf("maint: exit %d, %s", code, stderr)
	}
	if out, stderr, code := s.rollcall(t, "drain", "web", addr); code != 0 || !strings.Contains(out, "; it waits: ") {
		t.Errorf("drain: exit %d, %s%s", code, out, stderr)
	}
	s.waits(t, store, a)
	if _, stderr, code := s.rollcall(t, "drain", "web", addr, "--reason", "x", "--wait", "--timeout", "2s"); code != exitWait || !strings.Contains(stderr, "1 of 2 live balancers have not applied it: ") || !strings.Contains(stderr, "; the drain waits: too few") || !strings.Contains(stderr, " of be_two") {
		t.Errorf("drain --wait: exit %d, %s", code, stderr)
	}
	answered(t, url, own)
	answered(t, "http://"+ha2.Addr("be_two")+"/", a)
}
