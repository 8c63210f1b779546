package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// says waits until a process has said something.
func (p *process) says(t *testing.T, what string) {
	t.Helper()
	haproxytest.Poll(t, "it says "+what, func() error {
		if out := p.out.String(); !strings.Contains(out, what) {
			return errors.New(out)
		}
		return nil
	})
}

var idLine = regexp.MustCompile(`this balancer's id id=(\S+) kept=(\S+)`)

// id waits until an lbsync says its id, and returns it and where it is kept.
func (p *process) id(t *testing.T) (id, kept string) {
	t.Helper()
	p.says(t, "this balancer's id")
	m := idLine.FindStringSubmatch(p.out.String())
	if m == nil {
		t.Fatalf("no id in\n%s", p.out)
	}
	return m[1], m[2]
}

// balancers waits until `rollcall lb` shows these, by "id service live".
func (s *system) balancers(t *testing.T, args []string, want ...string) {
	t.Helper()
	haproxytest.Poll(t, fmt.Sprintf("lb %v shows %v", args, want), func() error {
		out, stderr, code := s.rollcall(t, append([]string{"lb", "-o", "json"}, args...)...)
		var rows []lbRow
		if err := json.Unmarshal([]byte(out), &rows); err != nil || code != 0 {
			return fmt.Errorf("%v, exit %d: %s%s", err, code, out, stderr)
		}
		got := []string{}
		for _, r := range rows {
			live := "silent"
			switch {
			case r.Double:
				live = "double"
			case r.Live:
				live = "live"
			}
			got = append(got, r.Balancer+" "+string(r.Service)+" "+live)
		}
		if !slices.Equal(got, want) {
			return errors.New(out)
		}
		return nil
	})
}

// TestLbsyncsShareAHAProxy has two lbsyncs of two namespaces drive two backends of
// one HAProxy.
func TestLbsyncsShareAHAProxy(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be1", Slots: 3}, {Name: "be2", Balance: "leastconn"}}})}
	ids := map[string]string{}
	for n, backend := range []string{"be1", "be2"} {
		ns := fmt.Sprint("ns", n)
		lb := s.spawn(t, "lbsync", "--namespace", ns, "--socket", s.ha.Socket, "--backend", "web="+backend, "--allow", "127.0.0.0/8")
		i := haproxytest.NewInstance(t)
		s.spawn(t, "register", "--namespace", ns, "--service", "web", "--addr", i.Addr().String())
		answered(t, "http://"+s.ha.Addr(backend)+"/", i)
		id, _ := lb.id(t)
		ids[id] = backend
		s.balancers(t, []string{"--namespace", ns}, id+" web live")
		if strings.Contains(lb.out.String(), "standing by") || strings.Contains(lb.out.String(), "without a lock") {
			t.Errorf("%s:\n%s", backend, lb.out)
		}
		findings, _ := s.doctor(t, "--namespace", ns, "--socket", s.ha.Socket, "--backend", "web="+backend)
		if !slices.ContainsFunc(findings, func(f finding) bool {
			return strings.HasSuffix(f.Check, " lbsync") && f.State == stateOK && f.Seen == "alive: "+id
		}) {
			t.Errorf("doctor: %s", ill(findings))
		}
	}
	if len(ids) != 2 {
		t.Errorf("ids %v", ids)
	}
	// Of a third, one backend of two is taken.
	third := s.spawn(t, "lbsync", "--namespace", "ns2", "--socket", s.ha.Socket, "--backend", "web=be0", "--backend", "web=be2", "--allow", "127.0.0.0/8")
	third.says(t, "standing by")
	third.says(t, "backend be2: another lbsync drives it")
}

// TestIDIsKept has an lbsync that was killed, and a container made anew, be the same
// balancer as before: it is heard at once, and there is no other.
func TestIDIsKept(t *testing.T) {
	t.Parallel()
	for _, place := range []string{"state directory", "beside the socket"} {
		t.Run(place, func(t *testing.T) {
			s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 5}, {Name: "be_api", Slots: 5}}})}
			dir := filepath.Join(t.TempDir(), "state")
			state := map[string]string{"state directory": dir, "beside the socket": ""}[place]
			args := []string{"lbsync", "--socket", s.ha.Socket, "--state-dir", state, "--backend", "web=be", "--allow", "127.0.0.0/8"}
			both := append(slices.Clone(args), "--backend", "api=be_api")
			lb := s.spawn(t, both...)
			id, _ := lb.id(t)
			s.balancers(t, []string{"web", "api"}, id+" api live", id+" web live")
			if files, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || (len(files) > 0) != (state != "") {
				t.Errorf("kept in %v, %v", files, err)
			}
			next := s.spawn(t, both...)
			next.says(t, "backend be: another lbsync drives it")
			if _, stderr, code := s.rollcall(t, append(args, "--once")...); code != exitFailed || !strings.Contains(stderr, "backend be: another lbsync drives it") {
				t.Errorf("--once beside it: exit %d, %s", code, stderr)
			}
			lb.signal(t, syscall.SIGKILL)
			begun := time.Now()
			if again, _ := next.id(t); again != id {
				t.Errorf("id %s, want %s", again, id)
			}
			next.says(t, "balancer found")
			t.Logf("the next one drives %v after the kill", time.Since(begun).Round(time.Millisecond))
			i := haproxytest.NewInstance(t)
			s.spawn(t, "register", "--service", "web", "--addr", i.Addr().String())
			answered(t, "http://"+s.ha.Addr("be")+"/", i)
			if _, stderr, code := s.rollcall(t, "wait", "web", "--for", "ready=1"); code != 0 {
				t.Errorf("wait: exit %d: %s", code, stderr)
			}
			s.balancers(t, []string{"web"}, id+" web live")
			next.signal(t, syscall.SIGTERM)
			s.balancers(t, []string{"web", "api"}, id+" api live", id+" web live") // it may be started again

			// It comes back without api, whose waits must not wait for it.
			last := s.spawn(t, args...)
			if again, _ := last.id(t); again != id {
				t.Errorf("id %s, want %s", again, id)
			}
			s.balancers(t, []string{"web", "api"}, id+" web live")
			if seen := s.redis.Client(t).Keys(t.Context(), "rollcall:{api}:seen:*").Val(); len(seen) > 0 {
				t.Errorf("still there: %v", seen)
			}
			for _, p := range []*process{lb, next, last} {
				if strings.Contains(p.out.String(), "acknowledges as this balancer") {
					t.Errorf("taken for two:\n%s", p.out)
				}
			}
		})
	}
}

// TestIDIsNotKept has an lbsync that can write nowhere leave nothing in the register.
func TestIDIsNotKept(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 5}}})}
	for _, file := range []string{".lbsync-lock.be", ".lbsync-id.be"} { // a directory in its place
		if err := os.Mkdir(s.ha.Socket+file, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	lb := s.spawn(t, "lbsync", "--socket", s.ha.Socket, "--state-dir", "", "--backend", "web=be", "--allow", "127.0.0.0/8")
	lb.says(t, "running without a lock")
	id, kept := lb.id(t)
	if kept != "[]" {
		t.Errorf("kept in %s", kept)
	}
	i := haproxytest.NewInstance(t)
	s.spawn(t, "register", "--service", "web", "--addr", i.Addr().String())
	answered(t, "http://"+s.ha.Addr("be")+"/", i)
	s.balancers(t, []string{"web"}, id+" web live")
	haproxytest.Poll(t, "it says what HAProxy has", func() error {
		if n := s.redis.Client(t).Exists(t.Context(), "rollcall:{web}:seen:"+id).Val(); n != 1 {
			return errors.New("not yet")
		}
		return nil
	})
	if findings, _ := s.doctor(t, "--socket", s.ha.Socket, "--state-dir", "", "--backend", "web=be"); !slices.ContainsFunc(findings, func(f finding) bool {
		return strings.HasSuffix(f.Check, " lbsync") && f.State == stateOK
	}) {
		t.Errorf("doctor: %s", ill(findings))
	}
	if code := lb.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
	for _, key := range []string{"balancers", "balancer-owners", "{web}:applied", "{web}:seen:" + id} {
		if s.redis.Client(t).Exists(t.Context(), "rollcall:"+key).Val() != 0 {
			t.Errorf("%s is still there", key)
		}
	}
}

// TestStateDirectory has the id lie where systemd says, if the user says nothing.
func TestStateDirectory(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 5}}})}
	s.env = []string{"STATE_DIRECTORY=" + filepath.Join(dir, "first") + ":" + filepath.Join(dir, "second")}
	once := []string{"lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--once"}
	in := func(want string) {
		t.Helper()
		_, stderr, code := s.rollcall(t, once...)
		m := idLine.FindStringSubmatch(stderr)
		if code != 0 || m == nil || !strings.HasPrefix(m[2], `["`+want+"/balancer-") {
			t.Errorf("exit %d, not kept in %s: %s", code, want, stderr)
		}
	}
	in(filepath.Join(dir, "first"))
	s.env = append(s.env, "ROLLCALL_STATE_DIR="+filepath.Join(dir, "third"))
	in(filepath.Join(dir, "third"))
	once = append(once, "--state-dir", filepath.Join(dir, "fourth"))
	in(filepath.Join(dir, "fourth"))
	if _, err := os.Stat(filepath.Join(dir, "second")); err == nil {
		t.Error("it keeps the id in the second directory")
	}
	for _, look := range [][]string{{"lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--dry-run"}, {"doctor", "--socket", s.ha.Socket, "--backend", "web=be"}} {
		s.rollcall(t, append(look, "--state-dir", filepath.Join(dir, "fifth"))...)
		if _, err := os.Stat(filepath.Join(dir, "fifth")); err == nil {
			t.Errorf("%s makes a directory", look[0])
		}
	}
}

// TestTwoHAProxiesOfOneID has two lbsyncs, of two HAProxies, use one id: both say so,
// one is heard, and nobody believes that the other has applied something.
func TestTwoHAProxiesOfOneID(t *testing.T) {
	t.Parallel()
	one := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 5}}})}
	two := &system{redis: one.redis, ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 5}}})}
	i := haproxytest.NewInstance(t)
	one.spawn(t, "register", "--service", "web", "--addr", i.Addr().String())
	args := func(s *system) []string {
		return []string{"lbsync", "--socket", s.ha.Socket, "--id", "lb", "--backend", "web=be", "--allow", "127.0.0.0/8"}
	}
	first := one.monitor(t, args(one)...)
	one.balancers(t, nil, "lb web live")
	first.ready(t, "ok")
	first.shows(t, "rollcall_lbsync_id_doubled", 0, 0)
	second := two.monitor(t, args(two)...)

	second.says(t, "did so first: this one drives HAProxy and is not heard; give it another --id")
	first.says(t, "another lbsync acknowledges as this balancer too, and is not heard: give it another --id")
	one.balancers(t, nil, "lb web double")
	second.ready(t, "give this one another --id")
	first.ready(t, "ok")
	for _, m := range []*monitored{first, second} {
		m.shows(t, "rollcall_lbsync_id_doubled", 1, 1)
	}
	answered(t, "http://"+two.ha.Addr("be")+"/", i) // it drives on
	if _, stderr, code := one.rollcall(t, "weight", "web", i.Addr().String(), "20", "--wait", "--timeout", "1s"); code != exitWait || !strings.Contains(stderr, "two lbsyncs acknowledge as lb: give one of them another --id") {
		t.Errorf("weight --wait: exit %d, %s", code, stderr)
	}
	if out, _, _ := one.rollcall(t, "explain", "web", i.Addr().String()); !strings.Contains(out, "give one of them another --id") {
		t.Errorf("explain:\n%s", out)
	}
	findings, _ := one.doctor(t, "--socket", one.ha.Socket, "--backend", "web=be")
	if !slices.ContainsFunc(findings, func(f finding) bool {
		return f.Check == "balancers of web" && f.State == stateWarn && strings.Contains(f.Seen, "two lbsyncs acknowledge as lb")
	}) {
		t.Errorf("doctor: %s", ill(findings))
	}

	// The first ends: the second's word counts when the first counts as silent.
	if code := first.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
	second.says(t, "this lbsync alone acknowledges as this balancer again")
	if _, stderr, code := one.rollcall(t, "wait", "web"); code != 0 {
		t.Errorf("wait: exit %d: %s", code, stderr)
	}
	one.balancers(t, nil, "lb web live")
	second.ready(t, "ok")
	if n := strings.Count(second.out.String(), "as this balancer"); n != 2 {
		t.Errorf("said %d times:\n%s", n, second.out)
	}
}
