package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// operator is a system's commands, with a store to look at what they wrote.
type operator struct {
	*system
	store *registrar.Store
}

func newOperator(t *testing.T, s *system) *operator {
	t.Helper()
	store, err := registrar.NewStore(s.redis.Client(t), registrar.DefaultNamespace)
	must(t, err)
	return &operator{s, store}
}

// says runs a command and holds its exit code, what both outputs say, and whether it
// changed the register. It returns standard output.
func (s *operator) says(t *testing.T, code int, changes bool, what string, args ...string) string {
	t.Helper()
	version := func() int64 {
		v, err := s.store.Versions(t.Context(), nil)
		must(t, err)
		return v.Global
	}
	before := version()
	out, stderr, got := s.rollcall(t, args...)
	if got != code || !strings.Contains(out+stderr, what) || (version() != before) != changes {
		t.Errorf("%q: exit %d, version %d after %d, want exit %d and %q\n%s%s", args, got, version(), before, code, what, out, stderr)
	}
	return out
}

// runs runs a command that is to succeed.
func (s *operator) runs(t *testing.T, args ...string) {
	t.Helper()
	if out, stderr, code := s.rollcall(t, args...); code != 0 {
		t.Errorf("%q: exit %d, %s%s", args, code, out, stderr)
	}
}

// admin returns what operators have said of an address that somebody has.
func (s *operator) admin(t *testing.T, svc, addr string) registrar.Admin {
	t.Helper()
	e, err := s.store.Entry(t.Context(), registrar.Service(svc), netip.MustParseAddrPort(addr))
	must(t, err)
	return e.Admin
}

// beat registers an instance once, without a process that beats for it.
func (s *operator) beat(t *testing.T, svc, addr, meta string) {
	t.Helper()
	token := fmt.Sprint("t", time.Now().UnixNano())
	if meta != "" {
		meta = "," + meta
	}
	_, err := s.store.Beat(t.Context(), registrar.Service(svc), registrar.Beat{
		Addr: netip.MustParseAddrPort(addr), Token: token, Meta: fmt.Sprintf(`{"id":%q,"weight":100%s}`, token, meta),
	})
	must(t, err)
}

// last returns the last event.
func (s *operator) last(t *testing.T) (e registrar.Event) {
	t.Helper()
	out, stderr, code := s.rollcall(t, "events", "-n", "1", "-o", "json")
	if err := json.Unmarshal([]byte(out), &e); err != nil || code != 0 {
		t.Errorf("events: exit %d, %v, %s%s", code, err, out, stderr)
	}
	return e
}

// TestWho: each command of an operator writes who said it, into the override and the event.
func TestWho(t *testing.T) {
	t.Parallel()
	s := newOperator(t, &system{redis: redistest.Start(t)})
	const addr = "10.0.0.1:80"
	s.beat(t, "web", addr, "")
	u, err := user.Current()
	must(t, err)
	host, err := os.Hostname()
	must(t, err)
	for _, c := range []struct {
		by   string
		env  string
		args []string
	}{
		{u.Username + "@" + host, "", []string{"drain", "web", addr}},
		{"alice", "", []string{"maint", "web", addr, "--as", "alice"}},
		{"deploy job 7", "deploy job 7", []string{"ready", "web", addr}},
		{"é", "other", []string{"weight", "web", addr, "20", "--as", "é"}},
		{u.Username + "@" + host, "", []string{"weight", "web", addr, "own", "--as", ""}},
		{"bob", "", []string{"drain", "--all", "web", "--as", "bob"}},
		{"carol", "", []string{"deregister", "--service", "web", "--addr", addr, "--force", "--as", "carol"}},
	} {
		s.env = nil
		if c.env != "" {
			s.env = []string{"ROLLCALL_AS=" + c.env}
		}
		s.says(t, 0, true, "version", c.args...)
		if e := s.last(t); e.By != c.by {
			t.Errorf("%q: the event is by %q, want %q", c.args, e.By, c.by)
		}
		if a := s.admin(t, "web", addr); c.args[0] != "deregister" && (a.State != "" || a.Weight != nil) && a.By != c.by {
			t.Errorf("%q: the override is by %q, want %q", c.args, a.By, c.by)
		}
	}
	s.env = nil
	for bad, why := range map[string]string{strings.Repeat("x", 256): "--as of 256 bytes", "a\nb": "--as \"a\\nb\": want UTF-8", "\x1b[31m": "want UTF-8", "\xff": "want UTF-8"} {
		for _, args := range [][]string{{"drain", "web", addr}, {"ready", "--all", "web"}, {"deregister", "--service", "web", "--addr", addr}} {
			s.says(t, exitUsage, false, why, append(args, "--as", bad)...)
		}
	}
}

// TestFor: --for is written, printed, and held to its bounds.
func TestFor(t *testing.T) {
	t.Parallel()
	s := newOperator(t, &system{redis: redistest.Start(t)})
	const addr = "10.0.0.1:80"
	s.beat(t, "web", addr, "")
	for _, c := range []struct{ flag, says string }{
		{"5", `--for "5": want a unit too, such as 5s`}, {"soon", "want a number with a unit"},
		{"0s", "--for 0s: want 1s to 8784h (366 days)"}, {"999ms", "--for 999ms: want 1s to 8784h"}, {"-5s", "--for -5s: want 1s"}, {"8784h1s", "--for 8784h0m1s: want 1s to 8784h"},
	} {
		s.says(t, exitUsage, false, c.says, "drain", "web", addr, "--for", c.flag)
	}
	s.says(t, exitUsage, false, "--for with own", "weight", "web", addr, "own", "--for", "1h")
	s.says(t, exitUsage, false, "unknown flag --for", "ready", "web", addr, "--for", "1h")
	const warning = "a reaper ends it, and none is alive"
	now := s.redis.Client(t).Time(t.Context()).Val()
	for _, args := range [][]string{{"drain", "web", addr}, {"maint", "web", addr}, {"weight", "web", addr, "50"}, {"drain", "web", "--all"}, {"weight", "--host", "10.0.0.1", "--to", "40"}} {
		out := s.says(t, 0, true, warning, append(args, "--for", "2h")...)
		a := s.admin(t, "web", addr)
		until := a.Until
		if args[0] == "weight" {
			until = a.WeightUntil
		}
		if d := time.UnixMilli(until).Sub(now); d < 2*time.Hour || d > 2*time.Hour+time.Minute {
			t.Errorf("%v: ends %v from now", args, d)
		}
		if want := ", until " + time.UnixMilli(until).Format(time.DateTime); !strings.Contains(out, want) {
			t.Errorf("%v: no %q in %s", args, want, out)
		}
	}
	var o outcome
	out := s.says(t, 0, true, `"until":`, "drain", "web", addr, "--for", "8784h", "-o", "json")
	if err := json.Unmarshal([]byte(out), &o); err != nil || o.Until != s.admin(t, "web", addr).Until || o.Scope != registrar.ScopeAddress {
		t.Errorf("%v, %s", err, out)
	}
	reap := s.spawn(t, "reap")
	reap.says(t, "armed")
	haproxytest.Poll(t, "the reaper is seen", func() error {
		if _, stderr, code := s.rollcall(t, "drain", "web", addr, "--for", "1s"); code != 0 || strings.Contains(stderr, warning) {
			return fmt.Errorf("exit %d, %s", code, stderr)
		}
		return nil
	})
	if _, stderr, _ := s.rollcall(t, "drain", "web", addr); strings.Contains(stderr, "reaper") {
		t.Errorf("without --for: %s", stderr)
	}
}

// TestRegistration: --registration says whom an override is of.
func TestRegistration(t *testing.T) {
	t.Parallel()
	s := newOperator(t, &system{redis: redistest.Start(t)})
	const addr, own, byHand = "10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"
	s.beat(t, "web", addr, "")
	s.beat(t, "web", own, `"own":true`)
	now := s.redis.Client(t).Time(t.Context()).Val().UnixMilli()
	must(t, s.redis.Client(t).Do(t.Context(), "ZADD", s.store.Keys().Instances("web"), now, byHand).Err())
	for _, c := range []struct {
		addr  string
		flags []string
		scope registrar.Scope
	}{
		{addr, nil, registrar.ScopeAddress}, {own, nil, registrar.ScopeRegistration},
		{addr, []string{"--registration"}, registrar.ScopeRegistration}, {own, []string{"--registration=false"}, registrar.ScopeAddress},
	} {
		for _, of := range [][]string{{"web", c.addr}, {"web", "--host", strings.TrimSuffix(c.addr, ":80")}} {
			for _, verb := range [][]string{{"drain"}, {"maint"}, {"weight", "--to", "7"}} {
				args := append(append(append([]string{}, verb...), of...), c.flags...)
				out := s.says(t, 0, true, "version", args...)
				if said := strings.Contains(out, ", of this registration"); said != (c.scope == registrar.ScopeRegistration) {
					t.Errorf("%q prints %s", args, out)
				}
				if bound := s.admin(t, "web", c.addr).ID != ""; bound != (c.scope == registrar.ScopeRegistration) {
					t.Errorf("%q: of a registration is %v", args, bound)
				}
				s.runs(t, "ready", "web", c.addr)
				s.runs(t, "weight", "web", c.addr, "own")
			}
		}
	}
	s.says(t, exitFailed, false, "no such instance; did you mean 10.0.0.", "drain", "web", "10.0.0.9:80", "--registration")
	s.says(t, exitFailed, false, "no such instance, so there is no registration; see rollcall instances web", "maint", "web", "192.168.99.99:8", "--registration")
	s.says(t, exitFailed, false, "it was added by hand", "drain", "web", byHand, "--registration")
	for _, verb := range [][]string{{"drain"}, {"maint"}, {"ready"}, {"weight", "--to", "5"}} {
		s.says(t, exitUsage, false, "--absent and --registration", append(verb, "web", addr, "--absent", "--registration")...)
	}
	s.says(t, exitUsage, false, "want true, false, or no value", "drain", "web", addr, "--registration=maybe")
	s.says(t, 0, true, "no such instance now", "drain", "web", "10.0.0.9:80", "--absent", "--registration=false")
}

// TestConditions: which instances a command about many touches, and what it says of those
// that it does not find.
func TestConditions(t *testing.T) {
	t.Parallel()
	s := newOperator(t, &system{redis: redistest.Start(t)})
	for _, i := range []struct{ svc, addr, meta string }{
		{"web", "10.0.0.2:80", `"zone":"b","tags":{"commit":"4f1c"}`},
		{"web", "10.0.0.1:80", `"zone":"a","tags":{"commit":"4f1c","slow":""}`},
		{"web", "10.0.0.1:81", `"zone":"a","tags":{"commit":"77aa"}`},
		{"web", "[2001:db8::1]:80", ""},
		{"api", "10.0.0.1:90", `"zone":"a"`},
		{"api", "127.0.0.1:91", `"zone":"b"`},
	} {
		s.beat(t, i.svc, i.addr, i.meta)
	}
	// Those that are drained are the ones that match.
	for _, c := range []struct {
		args []string
		want []string
	}{
		{[]string{"--host", "10.0.0.1"}, []string{"api 10.0.0.1:90", "web 10.0.0.1:80", "web 10.0.0.1:81"}},
		{[]string{"web", "--host", "10.0.0.1"}, []string{"web 10.0.0.1:80", "web 10.0.0.1:81"}},
		{[]string{"--host", "10.0.0.1", "api"}, []string{"api 10.0.0.1:90"}},
		{[]string{"--host", "2001:db8::1"}, []string{"web [2001:db8::1]:80"}},
		{[]string{"--host", "[2001:db8:0::1]"}, []string{"web [2001:db8::1]:80"}},
		{[]string{"--host", "::ffff:10.0.0.2"}, []string{"web 10.0.0.2:80"}},
		{[]string{"--host", "localhost"}, []string{"api 127.0.0.1:91"}},
		{[]string{"--zone", "b"}, []string{"api 127.0.0.1:91", "web 10.0.0.2:80"}},
		{[]string{"--zone", "a", "--host", "10.0.0.1", "--tag", "commit=4f1c"}, []string{"web 10.0.0.1:80"}},
		{[]string{"--tag", "commit=4f1c"}, []string{"web 10.0.0.1:80", "web 10.0.0.2:80"}},
		{[]string{"--tag", "commit=4f1c", "--tag", "slow="}, []string{"web 10.0.0.1:80"}},
		{[]string{"api", "--all"}, []string{"api 10.0.0.1:90", "api 127.0.0.1:91"}},
	} {
		for _, verb := range [][]string{{"drain"}, {"maint", "--reason", "x"}, {"weight", "--to", "9"}} {
			out := s.says(t, exitDryRun, false, "there are changes: "+verb[0]+" of ", append(append(slices.Clone(verb), c.args...), "--dry-run")...)
			if n := strings.Count(out, "\n"); n != len(c.want)+1 || !strings.HasPrefix(out, "SERVICE  ADDR ") {
				t.Errorf("%v %v: prints %s", verb, c.args, out)
			}
			out = s.says(t, 0, true, "", append(append(slices.Clone(verb), c.args...), "-o", "json")...)
			var rows []touched
			must(t, json.Unmarshal([]byte(out), &rows))
			var got []string
			for _, r := range rows {
				got = append(got, fmt.Sprint(r.Service, " ", r.Addr))
				if a := s.admin(t, string(r.Service), r.Addr); verb[0] != "weight" && string(a.State) != verb[0] || verb[0] == "weight" && (a.Weight == nil || *a.Weight != 9) || r.Done != verb[0] || r.Version == 0 || !r.Present || r.Error != "" {
					t.Errorf("%v %v: %+v, %+v", verb, c.args, r, a)
				}
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("%v %v: got %q, want %q", verb, c.args, got, c.want)
			}
			end := []string{"ready"}
			if verb[0] == "weight" {
				end = []string{"weight", "--to", "own"}
			}
			s.says(t, 0, true, "", append(end, c.args...)...)
			for _, svc := range []registrar.Service{"web", "api"} {
				all, err := s.store.Overrides(t.Context(), svc)
				must(t, err)
				if len(all) > 0 {
					t.Fatalf("%v: %+v are left", end, all)
				}
			}
		}
	}

	// What is found nowhere is answered with the nearest.
	for _, c := range []struct {
		code int
		says string
		args []string
	}{
		{1, "nobody has ever registered as wbe; did you mean web?", []string{"wbe", "--all"}},
		{1, "no instance of any service has host 10.0.0.3; did you mean 10.0.0.1?", []string{"--host", "10.0.0.3"}},
		{1, "no instance of api has host 10.0.0.2; did you mean 10.0.0.1?", []string{"api", "--host", "10.0.0.2"}},
		{1, "no instance of web has host localhost, which is 127.0.0.1,", []string{"web", "--host", "localhost"}},
		{1, "no instance of any service is in zone c; did you mean a?", []string{"--zone", "c"}},
		{1, "no instance of web has a tag comit; did you mean commit?", []string{"web", "--tag", "comit=4f1c"}},
		{1, "no instance of web has tag commit=4f1d; did you mean 4f1c?", []string{"web", "--tag", "commit=4f1d"}},
		{1, "no instance of any service meets all of the conditions; each alone is met", []string{"--zone", "b", "--tag", "commit=77aa"}},
		{2, "--all wants the SERVICE", []string{"--all"}},
		{2, "--all and --zone: say which", []string{"web", "--all", "--zone", "a"}},
		{2, `unexpected argument "10.0.0.1:80": an address, or conditions such as --zone, not both`, []string{"web", "10.0.0.1:80", "--zone", "a"}},
		{2, `service name "10.0.0.1:80"`, []string{"10.0.0.1:80", "--zone", "a"}},
		{2, `unexpected argument "api"`, []string{"web", "api", "--all"}},
		{2, "--host is empty", []string{"web", "--host", ""}},
		{2, "--zone is empty", []string{"--zone="}},
		{2, "--tag", []string{"--tag", ""}},
		{2, `--tag "commit": want KEY=VALUE`, []string{"--tag", "commit"}},
		{2, `--host "10.0.0.1:80": want a host without a port; one instance is SERVICE 10.0.0.1:80`, []string{"--host", "10.0.0.1:80"}},
		{2, `--host "no-such-host.invalid": `, []string{"--host", "no-such-host.invalid"}},
		{2, `--host "10.0.1": "10.0.1" is no IPv4 address`, []string{"--host", "10.0.1"}},
		{2, `--host "fe80::1%lo": `, []string{"--host", "fe80::1%lo"}},
		{2, "--absent is of one address", []string{"web", "--all", "--absent"}},
		{2, "--dry-run goes with", []string{"web", "10.0.0.1:80", "--dry-run"}},
		{2, "SERVICE ADDR", []string{"web"}},
		{2, "SERVICE ADDR", nil},
	} {
		for _, verb := range [][]string{{"drain"}, {"maint"}, {"ready"}, {"weight", "--to", "5"}} {
			_, stderr, code := s.rollcall(t, append(slices.Clone(verb), c.args...)...)
			if code != c.code || !strings.Contains(stderr, c.says) || strings.Count(stderr, "\n") != 1 {
				t.Errorf("%v %q: exit %d, %s, want exit %d, one line with %q", verb, c.args, code, stderr, c.code, c.says)
			}
		}
	}
	s.says(t, exitUsage, false, "--force goes with", "drain", "web", "10.0.0.1:80", "--force")
	s.says(t, exitUsage, false, "weight of many: want --to", "weight", "web", "--all")
	s.says(t, exitUsage, false, "weight of many: want --to", "weight", "web", "50", "--all")
	s.says(t, exitUsage, false, "SERVICE ADDR N|own", "weight", "web", "10.0.0.1:80")
	s.says(t, exitUsage, false, "SERVICE ADDR N|own", "weight", "web", "10.0.0.1:80", "5", "--to", "6")
	s.says(t, exitUsage, false, "weight 257: want 0 to 256", "weight", "--all", "web", "--to", "257")
	s.says(t, exitUsage, false, `weight "": want 0 to 256, or own`, "weight", "--all", "web", "--to", "")
	s.says(t, 0, true, "web 10.0.0.1:80: weight, version", "weight", "web", "10.0.0.1:80", "--to", "30")
	s.says(t, 0, true, "web 10.0.0.1:80: weight, version", "weight", "web", "10.0.0.1:80", "own")
	if out := s.says(t, exitDryRun, false, "", "drain", "--zone", "b", "--dry-run", "-o", "json"); !strings.HasPrefix(out, `[{"service":"api","addr":"127.0.0.1:91","done":"",`) {
		t.Errorf("got %s", out)
	}
}

// TestReadyOfThoseAway: ready of a host ends what was said of its instances also while
// they are away, so that they come back ready.
func TestReadyOfThoseAway(t *testing.T) {
	t.Parallel()
	s := newOperator(t, &system{redis: redistest.Start(t)})
	const addr, other = "10.0.0.1:80", "10.0.0.2:80"
	for _, a := range []string{addr, other} {
		s.beat(t, "web", a, "")
		s.runs(t, "drain", "web", a)
		s.runs(t, "weight", "web", a, "5")
		s.runs(t, "deregister", "--service", "web", "--addr", a, "--force")
	}
	s.says(t, exitFailed, false, "there is no instance of web", "maint", "web", "--host", "10.0.0.1")
	s.says(t, exitFailed, false, "there is no instance of web", "ready", "web", "--host", "10.0.0.1", "--registration")
	s.says(t, exitFailed, false, "there is no instance of web", "ready", "web", "--zone", "a")
	out := s.says(t, 0, true, "web: ready of 1 instance, version", "ready", "web", "--host", "10.0.0.1")
	if !strings.Contains(out, addr+"  drain, away") {
		t.Errorf("got %s", out)
	}
	if a := s.admin(t, "web", addr); a.State != "" || a.Weight == nil {
		t.Errorf("%+v", a)
	}
	s.says(t, 0, true, "web: weight of 2 instances, version", "weight", "web", "--all", "--to", "own")
	s.beat(t, "web", other, "") // who is there is touched once
	if a, b := s.admin(t, "web", addr), s.admin(t, "web", other); a.Weight != nil || b.Weight != nil || b.State == "" {
		t.Errorf("%+v, %+v", a, b)
	}
	s.says(t, 0, true, "web: ready of 1 instance, version", "ready", "web", "--all")
}

// machine is a host's two apps, one of each service.
type machine struct {
	ip       string
	web, api *haproxytest.Instance
}

// newMachine starts both on one loopback address.
func newMachine(t *testing.T, s *operator, zone string) machine {
	t.Helper()
	web := haproxytest.NewInstance(t)
	ip := web.Addr().Addr().String()
	api := haproxytest.NewInstanceOn(t, ip+":0")
	for svc, i := range map[string]*haproxytest.Instance{"web": web, "api": api} {
		s.spawn(t, "register", "--service", svc, "--addr", i.Addr().String(), "--zone", zone)
		s.comesTo(t, svc, i)
	}
	return machine{ip, web, api}
}

func (s *operator) comesTo(t *testing.T, svc string, i *haproxytest.Instance) {
	t.Helper()
	haproxytest.Poll(t, i.Addr().String()+" is registered", func() error {
		e, err := s.store.Entry(t.Context(), registrar.Service(svc), i.Addr())
		if err == nil && !e.Present {
			err = fmt.Errorf("it is not")
		}
		return err
	})
}

// TestBulk drains a host over two services under load, waits for all of it, and is
// refused whatever would leave a service with nobody that serves.
func TestBulk(t *testing.T) {
	t.Parallel()
	s := newOperator(t, &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{
		{Name: "be_web", Slots: 5, Balance: "roundrobin"}, {Name: "be_api", Slots: 5, Balance: "roundrobin"},
	}})})
	s.spawn(t, "lbsync", "--socket", s.ha.Socket, "--backend", "web=be_web", "--backend", "api=be_api", "--allow", "127.0.0.0/8", "--id", "lb1")
	a, b := newMachine(t, s, "a"), newMachine(t, s, "b")
	web, api := "http://"+s.ha.Addr("be_web")+"/", "http://"+s.ha.Addr("be_api")+"/"
	serve := func(n int) {
		t.Helper()
		for _, svc := range []string{"web", "api"} {
			s.runs(t, "wait", svc, "--for", "ready="+strconv.Itoa(n), "--timeout", "20s")
		}
	}
	serve(2)
	answered(t, web, a.web, b.web)
	answered(t, api, a.api, b.api)
	loads := []*load{startLoad(t, web), startLoad(t, api)}
	for range 3 {
		out := s.says(t, 0, true, "", "drain", "--host", a.ip, "--reason", "new kernel", "--wait", "--timeout", "20s")
		for _, svc := range []string{"web", "api"} {
			if !strings.Contains(out, svc+": drain of 1 instance, version ") || strings.Count(out, ", applied by 1 balancers\n") != 2 {
				t.Errorf("got %s", out)
			}
		}
		answered(t, web, b.web)
		answered(t, api, b.api)
		var rows []touched
		out = s.says(t, 0, true, "", "ready", "--host", a.ip, "--wait", "--timeout", "20s", "-o", "json")
		if err := json.Unmarshal([]byte(out), &rows); err != nil || len(rows) != 2 || rows[0].Balancers == nil || *rows[0].Balancers != 1 || rows[1].Balancers == nil || rows[0].State != "drain" {
			t.Errorf("%v, %s", err, out)
		}
		answered(t, web, a.web, b.web)
		answered(t, api, a.api, b.api)
	}
	for _, l := range loads {
		l.stop()
		if n, f := l.sent.Load(), l.failed.Load(); n < 500 || f > 0 {
			t.Errorf("%d of %d requests failed, the last with: %s", f, n, l.last)
		}
	}

	// The other one alone serves web: nothing is written of api either.
	serve(2)
	s.says(t, 0, true, "applied by 1 balancers", "drain", "web", a.web.Addr().String(), "--wait", "--timeout", "20s")
	haproxytest.Poll(t, "lb1 says that one serves", func() error {
		sights, err := s.store.Sights(t.Context(), "web", []string{"lb1"})
		if err == nil && sights[0].Up["be_web"] != 1 {
			err = fmt.Errorf("%+v", sights)
		}
		return err
	})
	const refusal = "nothing is written: web: it would leave nobody that serves: lb1 sends requests to no other server of be_web; start others first, or say --force"
	for _, verb := range [][]string{{"drain"}, {"maint"}, {"weight", "--to", "0"}} {
		for _, cond := range [][]string{{"--host", b.ip}, {"--zone", "b"}, {"web", "--all"}, {"web", "--host", b.ip}} {
			args := append(slices.Clone(verb), cond...)
			out := s.says(t, exitFailed, false, refusal, args...)
			if !strings.Contains(out, b.web.Addr().String()) {
				t.Errorf("%q does not say whom it would touch: %s", args, out)
			}
			s.says(t, exitFailed, false, refusal, append(args, "--dry-run")...)
			s.says(t, exitFailed, false, `"error":"it would leave nobody that serves: `, append(args, "-o", "json")...)
		}
	}
	s.says(t, 0, true, "web: weight of 2 instances", "weight", "web", "--all", "--to", "5")
	s.says(t, 0, true, "web: weight of 2 instances", "weight", "web", "--all", "--to", "own")

	// By force a drain is written, and the last one's waits.
	s.says(t, 0, true, "; the last of them waits: it would leave nobody that serves: lb1", "drain", "web", "--host", b.ip, "--force")
	_, stderr, code := s.rollcall(t, "drain", "web", "--host", b.ip, "--force", "--reason", "x", "--wait", "--timeout", "2s")
	if code != exitWait || !strings.Contains(stderr, "; the drain of "+b.web.Addr().String()+" waits: ") {
		t.Errorf("exit %d, %s", code, stderr)
	}
	answered(t, web, b.web)
	answered(t, api, a.api, b.api)
	s.says(t, 0, true, "web: ready of 2 instances", "ready", "web", "--all", "--wait", "--timeout", "20s")
	s.says(t, 0, true, "web: maint of 2 instances", "maint", "web", "--all", "--force")
	haproxytest.Poll(t, "nobody serves", func() error {
		sights, err := s.store.Sights(t.Context(), "web", []string{"lb1"})
		if err == nil && sights[0].Up["be_web"] != 0 {
			err = fmt.Errorf("%+v", sights)
		}
		return err
	})
	// Nobody is left with nobody where nobody serves.
	s.says(t, 0, true, "web: drain of 2 instances", "drain", "web", "--all")
	s.says(t, 0, true, "applied by 1 balancers", "ready", "--zone", "a", "--wait", "--timeout", "20s")
}

// TestBulkWaits: one --timeout is for all services, and what is missing is named.
func TestBulkWaits(t *testing.T) {
	t.Parallel()
	s := newOperator(t, &system{redis: redistest.Start(t)})
	for _, svc := range []string{"web", "api", "jobs"} {
		s.beat(t, svc, "10.0.0.1:80", "")
	}
	begun := time.Now()
	out := s.says(t, exitWait, true, "no live balancer follows jobs", "drain", "--host", "10.0.0.1", "--wait", "--timeout", "2s")
	if took := time.Since(begun); took > 5*time.Second || strings.Count(out, " of 1 instance, version ") != 3 {
		t.Errorf("after %v: %s", took, out)
	}
	s.says(t, 0, true, "applied by 0 balancers", "ready", "--host", "10.0.0.1", "--wait", "--no-balancer")
}

// TestBulkInPart: what is written and what is not is listed.
func TestBulkInPart(t *testing.T) {
	t.Parallel()
	s := newOperator(t, &system{redis: redistest.Start(t)})
	s.beat(t, "api", "10.0.0.1:80", "")
	s.beat(t, "web", "10.0.0.1:81", "")
	rdb := s.redis.Client(t)
	must(t, rdb.Set(t.Context(), s.store.Keys().GoneAt("web"), "x", 0).Err()) // of a wrong type, and none that read
	out := s.says(t, exitFailed, true, "1 of 2 instances of 2 services are not written: web 10.0.0.1:81: ", "drain", "--host", "10.0.0.1")
	for _, want := range []string{"api: drain of 1 instance, version ", "api      10.0.0.1:80  yes      -", "web      10.0.0.1:81  no       WRONGTYPE"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if strings.Contains(out, "web: ") {
		t.Errorf("nothing is written of web, and it says\n%s", out)
	}
	var rows []touched
	out = s.says(t, exitFailed, true, "", "maint", "--host", "10.0.0.1", "-o", "json")
	if err := json.Unmarshal([]byte(out), &rows); err != nil || len(rows) != 2 || rows[0].Done != "maint" || rows[0].Error != "" || rows[1].Done != "" || !strings.Contains(rows[1].Error, "WRONGTYPE") {
		t.Errorf("%v, %s", err, out)
	}
}

// TestBulkOfMany: 2,000 instances that a balancer serves take seconds.
func TestBulkOfMany(t *testing.T) {
	t.Parallel()
	s := newOperator(t, &system{redis: redistest.Start(t)})
	const many = 2000
	seen := registrar.Seen{Anew: true, Up: map[string]int{"be": many + 1}, Servers: map[netip.AddrPort]map[string]registrar.ServerState{}}
	for i := range many {
		addr := fmt.Sprintf("10.0.%d.%d:80", i/250, i%250+1)
		s.beat(t, "web", addr, `"zone":"a"`)
		seen.Servers[netip.MustParseAddrPort(addr)] = map[string]registrar.ServerState{"be": {Server: "s1", State: "ready", Weight: 100}}
	}
	for _, args := range [][]string{{"drain", "--zone", "a"}, {"maint", "web", "--all"}, {"ready", "--all", "web"}, {"maint", "--zone", "a"}} {
		v, err := s.store.Versions(t.Context(), []registrar.Service{"web"})
		must(t, err)
		must(t, s.store.Acker("lb1").Ack(t.Context(), "web", v.Token("web")))
		_, err = s.store.Publish(t.Context(), "lb1", "web", seen)
		must(t, err)
		begun := time.Now()
		out := s.says(t, 0, true, fmt.Sprintf(" of %d instances, version ", many), args...)
		took := time.Since(begun)
		t.Logf("%q of %d: %v", args, many, took.Round(time.Millisecond))
		if n := strings.Count(out, "\n"); n != many+2 || took > 12*time.Second {
			t.Errorf("%q: %d lines after %v", args, n, took)
		}
	}
}

// TestBulkInACluster: services of several shards, of which one does not know the script
// any more.
func TestBulkInACluster(t *testing.T) {
	t.Parallel()
	nodes := redistest.StartCluster(t, 3)
	s := &system{redis: nodes[0]}
	at := "--redis=" + nodes.URL()
	const ip = "127.0.0.1"
	svcs := []string{"s0", "s1", "s2", "s3", "s4", "s5"}
	for n, svc := range svcs {
		s.spawn(t, "register", at, "--service", svc, "--addr", fmt.Sprintf("%s:%d", ip, 9000+n))
		haproxytest.Poll(t, svc+" is registered", func() error {
			if out, _, _ := s.rollcall(t, "instances", at, svc); !strings.Contains(out, ip) {
				return errors.New(out)
			}
			return nil
		})
	}
	for _, verb := range []string{"drain", "maint", "ready"} {
		must(t, nodes[1].Client(t).ScriptFlush(t.Context()).Err())
		out, stderr, code := s.rollcall(t, verb, at, "--host", ip)
		if n := strings.Count(out, verb+" of 1 instance, version "); code != 0 || n != len(svcs) {
			t.Errorf("%s: exit %d, %s%s", verb, code, out, stderr)
		}
		for _, svc := range svcs {
			if out, _, _ := s.rollcall(t, "instances", at, svc); !strings.Contains(out, "  "+verb+"  ") {
				t.Errorf("%s: %s", verb, out)
			}
		}
	}
	if _, stderr, code := s.rollcall(t, "drain", at, "--host", ip, "--for", "1h"); code != 0 || !strings.Contains(stderr, "none is alive") {
		t.Errorf("exit %d, %s", code, stderr)
	}
}

// TestTwoBulks: two operators who take out a host each at the same time leave one.
func TestTwoBulks(t *testing.T) {
	t.Parallel()
	s := newOperator(t, &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 5}}})})
	s.spawn(t, "lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8", "--id", "lb1")
	a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
	for _, i := range []*haproxytest.Instance{a, b} {
		s.spawn(t, "register", "--service", "web", "--addr", i.Addr().String())
	}
	url := "http://" + s.ha.Addr("be") + "/"
	for range 5 {
		s.runs(t, "wait", "web", "--for", "ready=2", "--timeout", "20s")
		answered(t, url, a, b)
		var both []*process
		for _, i := range []*haproxytest.Instance{a, b} {
			both = append(both, s.spawn(t, "maint", "web", "--host", i.Addr().Addr().String()))
		}
		refused := 0
		for _, p := range both {
			if code := p.ends(t); code == exitFailed && strings.Contains(p.out.String(), "it would leave nobody that serves") {
				refused++
			} else if code != 0 {
				t.Errorf("exit %d, %s", code, p.out)
			}
		}
		if refused != 1 {
			t.Errorf("%d were refused", refused)
		}
		s.runs(t, "ready", "web", "--all")
	}
}
