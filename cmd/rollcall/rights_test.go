package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// TestWithoutInfo has instances come and go where INFO is refused, or has no such name:
// a reaper alone does nothing, and everybody says which right it lacks, once.
func TestWithoutInfo(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		args []string
		fix  string
	}{
		"refused": {nil, "ACL SETUSER <user> +info"},
		"renamed": {[]string{"--rename-command", "INFO", ""}, "take the line rename-command INFO out of redis.conf"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := &system{
				redis: redistest.Start(t, c.args...),
				ha:    haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 5}}}),
			}
			must(t, s.redis.Client(t).Do(t.Context(), "acl", "setuser", "app", "on", ">p", "~*", "&*", "+@all", "-@dangerous").Err())
			as := func(args ...string) []string { return append(args, "--redis", "redis://app:p@"+s.redis.Addr+"/0") }
			lb := s.spawn(t, as("lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8")...)
			reap := s.spawn(t, as("reap", "--ttl", "3s")...)
			a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
			side := s.spawn(t, as("register", "--service", "web", "--addr", a.Addr().String())...)
			s.spawn(t, as("register", "--service", "web", "--addr", b.Addr().String())...)
			answered(t, "http://"+s.ha.Addr("be")+"/", a, b)
			reap.says(t, "not armed: nobody is taken out")
			if stdout, stderr, code := s.rollcall(t, as("drain", "web", b.Addr().String(), "--wait")...); code != 0 || !strings.Contains(stdout, "applied by 1 balancers") {
				t.Errorf("drain: exit %d\n%s%s", code, stdout, stderr)
			}
			if stdout, stderr, code := s.rollcall(t, as("ready", "web", b.Addr().String(), "--wait")...); code != 0 {
				t.Errorf("ready: exit %d\n%s%s", code, stdout, stderr)
			}
			if code := side.signal(t, syscall.SIGTERM); code != 0 || !strings.Contains(side.out.String(), "drained") {
				t.Errorf("the sidecar: exit %d\n%s", code, side.out)
			}
			answered(t, "http://"+s.ha.Addr("be")+"/", b)
			if stdout, _, code := s.rollcall(t, as("status")...); code != exitFailed || !strings.Contains(stdout, "+info") {
				t.Errorf("status: exit %d\n%s", code, stdout)
			}
			for what, p := range map[string]*process{"lbsync": lb, "reap": reap} {
				out := p.out.String()
				if strings.Count(out, "+info") != 1 || strings.Contains(out, "does not answer") || strings.Contains(out, "no subscription") {
					t.Errorf("%s: want one line with the right\n%s", what, out)
				}
			}
			findings, _ := s.doctor(t, as()...)
			for _, f := range findings {
				switch {
				case f.Check == "redis info" && (f.State != stateBad || f.Fix != c.fix):
					t.Errorf("%+v", f)
				case f.Check == "redis version" && f.State != stateOK:
					t.Errorf("%+v", f)
				}
			}
			if !strings.Contains(ill(findings), "redis info: bad") {
				t.Error(ill(findings))
			}
		})
	}
}

// TestWithoutPassword asks a Redis that has one. Redis is not away, and nobody says so.
func TestWithoutPassword(t *testing.T) {
	t.Parallel()
	s := &system{
		redis: redistest.Start(t),
		ha:    haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 5}}}),
	}
	must(t, s.redis.Client(t).ConfigSet(t.Context(), "requirepass", "secret").Err())
	const cure = "it wants a password: set ROLLCALL_REDIS_PASSWORD, or ROLLCALL_REDIS_PASSWORD_FILE to a file's path"
	i := haproxytest.NewInstance(t)
	daemons := []*process{
		s.spawn(t, "register", "--service", "web", "--addr", i.Addr().String()), s.spawn(t, "reap"), s.spawn(t, "watch"),
		s.spawn(t, "lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8"), s.spawn(t, "serve", "--listen", "127.0.0.1:0"),
	}
	for _, p := range daemons {
		p.says(t, cure)
	}
	s.monitor(t, "watch").ready(t, "redis refuses what this user reads")
	for _, args := range [][]string{
		{"services"}, {"instances", "web"}, {"lb"}, {"status"}, {"events"}, {"explain", "web", i.Addr().String()}, {"drain", "web", i.Addr().String()},
		{"deregister", "--service", "web", "--addr", i.Addr().String()}, {"wait", "web", "--timeout", "1s"},
	} {
		if stdout, stderr, code := s.rollcall(t, args...); code == 0 || !strings.Contains(stderr, cure) {
			t.Errorf("%v: exit %d\n%s%s", args, code, stdout, stderr)
		}
	}
	for _, p := range daemons {
		p.signal(t, syscall.SIGTERM)
		if out := p.out.String(); strings.Contains(out, "away") || strings.Contains(out, "does not answer") {
			t.Errorf("it is not away:\n%s", out)
		}
	}
	findings, _ := s.doctor(t)
	expect(t, findings, [3]string{"bad", "redis", cure}, [3]string{"unknown", "registry", "not looked at"})
}

// TestWrongDoor goes with redis:// to a node of a Cluster, to a Sentinel and to TLS. Each
// command and each daemon says which URL is right, and none says that nothing is there.
func TestWrongDoor(t *testing.T) {
	t.Parallel()
	node := redistest.StartCluster(t, 1)[0]
	secure := redistest.Start(t, redistest.NewCertificates(t).Args()...)
	ha := haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 5}}})
	for _, c := range []struct {
		at   *redistest.Server
		want string
	}{
		{node, "is a node of a Cluster; the URL is redis+cluster://" + node.Addr},
		{secure, "speaks TLS only; the URL is rediss://" + secure.Addr + "/0"},
		{redistest.Start(t).StartSentinel(t, "m"), "is a Sentinel; the URL is redis+sentinel://"},
	} {
		s := &system{redis: c.at, ha: ha}
		if c.at == node {
			for _, p := range []*process{
				s.spawn(t, "register", "--service", "web", "--addr", "127.0.0.1:1"), s.spawn(t, "reap"), s.spawn(t, "watch"), s.spawn(t, "events", "-f"),
				s.spawn(t, "lbsync", "--socket", ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8"), s.spawn(t, "serve", "--listen", "127.0.0.1:0"),
			} {
				p.says(t, c.want)
			}
		}
		for _, args := range [][]string{{"services"}, {"instances", "web"}, {"events"}, {"status"}, {"lb"}, {"explain", "web", "127.0.0.1:1"}, {"drain", "web", "127.0.0.1:1"}} {
			stdout, stderr, code := s.rollcall(t, args...)
			if code != exitFailed || stdout != "" || !strings.Contains(stderr, c.want) || strings.Count(stderr, "\n") != 1 {
				t.Errorf("%v: exit %d, want one line with %s\n%s%s", args, code, c.want, stdout, stderr)
			}
		}
		findings, _ := s.doctor(t)
		expect(t, findings, [3]string{"bad", "redis", c.want}, [3]string{"unknown", "registry", "not looked at"})
	}
	one := redistest.Start(t)
	s := &system{redis: one}
	if stdout, stderr, code := s.rollcall(t, "services", "--redis", "rediss://"+one.Addr); code != exitFailed || stdout != "" || !strings.Contains(stderr, "speaks without TLS; the URL is redis://"+one.Addr+"/0") {
		t.Errorf("TLS: exit %d\n%s%s", code, stdout, stderr)
	}
}

// TestPasswords says where a password is given twice, and refuses an empty one.
func TestPasswords(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	must(t, s.redis.Client(t).Do(t.Context(), "acl", "setuser", "app", "on", ">p", "~*", "&*", "+@all").Err())
	file := filepath.Join(t.TempDir(), "password")
	must(t, os.WriteFile(file, []byte("\n"), 0o600))
	at := "redis://app@" + s.redis.Addr + "/0"
	for name, c := range map[string]struct {
		env  []string
		url  string
		code int
		want string
	}{
		"none":            {nil, at, exitUsage, "user app has none"},
		"an empty file":   {[]string{"ROLLCALL_REDIS_PASSWORD_FILE=" + file}, at, exitUsage, "is empty"},
		"a variable":      {[]string{"ROLLCALL_REDIS_PASSWORD=p"}, at, 0, ""},
		"URL and file":    {[]string{"ROLLCALL_REDIS_PASSWORD=p"}, "redis://app:old@" + s.redis.Addr + "/0", 0, "a password is given more than once; take out what is not used not=[\"the URL of --redis\"] used=ROLLCALL_REDIS_PASSWORD"},
		"no user, no one": {nil, s.redis.URL(), 0, ""},
	} {
		s := &system{redis: s.redis, env: c.env}
		_, stderr, code := s.rollcall(t, "services", "--redis", c.url)
		if code != c.code || !strings.Contains(stderr, c.want) || c.want == "" && stderr != "" {
			t.Errorf("%s: exit %d, want %d and %q\n%s", name, code, c.code, c.want, stderr)
		}
	}
	findings, _ := (&system{redis: s.redis, env: []string{"ROLLCALL_REDIS_PASSWORD=p"}}).doctor(t, "--redis", "redis://app:old@"+s.redis.Addr+"/0")
	if !strings.Contains(ill(findings), "redis password: warn: ROLLCALL_REDIS_PASSWORD is used, and not the URL of --redis") {
		t.Error(ill(findings))
	}
}

// TestDoctorAsRoles runs doctor as the user of every role's file: the role's rights are
// seen to be whole, what the user may not look at is unknown, and nothing is said to be
// bad. As the user of doctor.acl nothing is unknown but whether that is a role's user.
func TestDoctorAsRoles(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t, "--appendonly", "yes", "--aclfile", roles(t, "acl", 7)), env: []string{"ROLLCALL_REDIS_PASSWORD=" + rolePassword}}
	i := haproxytest.NewInstance(t)
	for range 2 {
		s.spawn(t, "reap", "--ttl", "3s", "--redis", roleURL(s.redis, "reaper")).says(t, "armed")
	}
	s.spawn(t, "register", "--redis", roleURL(s.redis, "sidecar-web"), "--service", "web", "--addr", i.Addr().String()).says(t, "registered")
	for user, role := range map[string]string{"sidecar-web": "register", "docker": "docker", "reaper": "reap", "lbsync": "lbsync", "operator": "operator"} {
		findings, _ := s.doctor(t, "--redis", roleURL(s.redis, user), "--role", role)
		said := ill(findings)
		for _, f := range findings {
			if f.Check == "redis rights: "+role && f.State != stateOK || f.State == stateBad || f.Check == "default user" && f.State != stateWarn {
				t.Errorf("%s: %s: %s: %s", user, f.Check, f.State, f.Seen)
			}
		}
		if !strings.Contains(said, "registry: unknown: ") || strings.Contains(said, "redis rights") {
			t.Errorf("%s:\n%s", user, said)
		}
	}
	findings, _ := s.doctor(t, "--redis", roleURL(s.redis, "doctor"))
	expect(t, findings, [3]string{"unknown", "redis rights", "only reads"}, [3]string{"warn", "default user", "needs no password"}, [3]string{"warn", "balancers of web", "none alive"})
	for _, user := range []string{"watcher", "operator"} {
		findings, _ := s.doctor(t, "--redis", roleURL(s.redis, user), "--role", "lbsync")
		for _, f := range findings {
			if f.Check == "reapers" && (f.State != stateOK || f.Seen != "2 alive") {
				t.Errorf("%s: %+v", user, f)
			}
		}
	}
	// As the page has it: the default user is off.
	must(t, s.redis.Client(t).Do(t.Context(), "acl", "setuser", "default", "off").Err())
	findings, _ = s.doctor(t, "--redis", roleURL(s.redis, "doctor"))
	expect(t, findings, [3]string{"unknown", "redis rights", "only reads"}, [3]string{"warn", "balancers of web", "none alive"})
}

// TestDoctorAsRolesOfCluster has users look who may not see all of a Cluster: no row is
// ok, or bad, for what it did not see.
func TestDoctorAsRolesOfCluster(t *testing.T) {
	t.Parallel()
	c := startSecured(t)
	i := haproxytest.NewInstance(t)
	for range 2 {
		c.spawn(t, c.as("reaper", "reap", "--ttl", "3s", "--canary-redis", c.url("canary"))...)
	}
	c.spawn(t, c.as("sidecar-web", "register", "--service", "web", "--addr", i.Addr().String())...).says(t, "registered")
	depend := []string{"cluster nodes", "cluster slots", "cluster moving slots", "cluster coverage", "cluster replicas"}
	haproxytest.Poll(t, "doctor sees two reapers as each user", func() error {
		for user, role := range map[string]string{"operator": "operator", "watcher": "", "sidecar-web": "register", "docker": "docker", "reaper": "reap", "lbsync": "lbsync", "doctor": ""} {
			args := c.as(user, "doctor")[1:]
			if role != "" {
				args = append(args, "--role", role)
			}
			findings, _ := c.doctor(t, args...)
			for _, f := range findings {
				sees := user == "doctor"
				switch {
				case slices.Contains(depend, f.Check) && (f.State == stateUnknown) == sees && f.Check != "cluster replicas":
					return fmt.Errorf("%s: %s: %s: %s", user, f.Check, f.State, f.Seen)
				case f.State == stateBad:
					return fmt.Errorf("%s: %s: %s: %s", user, f.Check, f.State, f.Seen)
				case f.Check == "redis rights: "+role && f.State != stateOK:
					return fmt.Errorf("%s: %s: %s: %s", user, f.Check, f.State, f.Seen)
				case f.Check == "reapers" && user != "sidecar-web" && f.State != stateOK:
					return fmt.Errorf("%s: %s: %s: %s", user, f.Check, f.State, f.Seen)
				}
			}
		}
		return nil
	})
}
