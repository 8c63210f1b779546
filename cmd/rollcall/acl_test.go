package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/redis/go-redis/v9"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

const rolePassword = "a password"

var passwordHash = regexp.MustCompile(`#SHA256_OF_[A-Z_]*_PASSWORD`)

// roles writes the n users of a directory under scripts/deploy into one file for
// a Redis. The canary on a single one is the sidecar of another service.
func roles(t *testing.T, dir string, n int) (file string) {
	t.Helper()
	files, err := filepath.Glob("../../scripts/deploy/" + dir + "/*.acl")
	if err != nil || len(files) != n {
		t.Fatalf("files %v, %v; want %d", files, err, n)
	}
	users := ""
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if n := len(passwordHash.FindAll(text, -1)); n != 1 || strings.Count(string(text), "\n") != 1 {
			t.Fatalf("%s: %d places for a password, want 1, on one line", f, n)
		}
		users += string(text)
		if f == "../../scripts/deploy/acl/sidecar.acl" {
			users += strings.NewReplacer("{web}", "{_canary}", "sidecar-web", "canary").Replace(string(text))
			users += strings.NewReplacer("{web}", "{evil}", "sidecar-web", "sidecar-evil").Replace(string(text))
		}
	}
	file = filepath.Join(t.TempDir(), "users.acl")
	hash := fmt.Sprintf("#%x", sha256.Sum256([]byte(rolePassword)))
	if err := os.WriteFile(file, []byte(passwordHash.ReplaceAllString(users, hash)), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// startRoles starts a Redis with the users of scripts/deploy/acl, and a canary.
func startRoles(t *testing.T) *redistest.Server {
	t.Helper()
	t.Setenv("ROLLCALL_REDIS_PASSWORD", rolePassword)
	t.Setenv("ROLLCALL_CANARY_REDIS_PASSWORD", rolePassword)
	return redistest.Start(t, "--aclfile", roles(t, "acl", 7))
}

func roleURL(srv *redistest.Server, role string) string {
	return "redis://" + role + "@" + srv.Addr + "/0"
}

// TestRolesKeepPassword follows the page with a Redis that had a password: whoever has none
// stays out, also after a restart.
func TestRolesKeepPassword(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../README.md")
	must(t, err)
	_, rights, _ := strings.Cut(string(page), "\n### Rights\n")
	_, first, found := strings.Cut(rights, "\n```\n")
	first, _, _ = strings.Cut(first, "```")
	if !found || strings.Contains(rights[:strings.Index(rights, first)], "acl load") {
		t.Fatal("the page does not begin with the default user")
	}
	open := func(srv *redistest.Server) bool {
		t.Helper()
		yes, err := registrar.Access{}.Anonymous(t.Context(), srv.URL())
		must(t, err)
		return yes
	}
	file := roles(t, "acl", 7)
	if !open(redistest.Start(t, "--requirepass", "before", "--aclfile", file)) {
		t.Error("without the first line it is not open, so this test shows nothing")
	}
	users, err := os.ReadFile(file)
	must(t, err)
	must(t, os.WriteFile(file, append([]byte(first), users...), 0o600))
	srv := redistest.Start(t, "--requirepass", "before", "--aclfile", file)
	if open(srv) {
		t.Error("it had a password, and everybody may come in")
	}
	srv.Kill(t)
	srv.Launch(t)
	if open(srv) {
		t.Error("after a restart everybody may come in")
	}
	rdb := roleClient(t, srv, "watcher")
	if err := rdb.Do(t.Context(), "hgetall", "rollcall:config").Err(); err != nil {
		t.Errorf("the roles' users: %v", err)
	}
}

// TestRolesWhole has every role do all that it does with the rights of its file,
// and finds that Redis has refused none of it.
func TestRolesWhole(t *testing.T) {
	srv := startRoles(t)
	s := &system{redis: srv, ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 5}}})}
	as := func(role string, args ...string) []string {
		return append([]string{args[0], "--redis", roleURL(srv, role)}, args[1:]...)
	}
	says := func(p *process, what string) {
		t.Helper()
		haproxytest.Poll(t, "it says "+what, func() error {
			if out := p.out.String(); !strings.Contains(out, what) {
				return errors.New(out)
			}
			return nil
		})
	}
	done := func(args []string, want string) {
		t.Helper()
		if out, stderr, code := s.rollcall(t, args...); code != 0 || !strings.Contains(out, want) {
			t.Errorf("%v: exit %d, want 0 and %q\n%s%s", args, code, want, out, stderr)
		}
	}

	says(s.spawn(t, as("reaper", "reap", "--ttl", "3s", "--canary-redis", roleURL(srv, "canary"))...), "armed")
	own := s.spawn(t, as("reaper", "reap", "--ttl", "3s")...) // its canary is the reaper itself
	says(own, "armed")
	web, all := s.spawn(t, as("watcher", "watch", "web")...), s.spawn(t, as("operator", "watch")...)
	follow := s.spawn(t, as("watcher", "events", "-f")...)
	lb := s.spawn(t, as("lbsync", "lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8")...)
	a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
	sideA := s.spawn(t, as("sidecar-web", "register", "--service", "web", "--addr", a.Addr().String())...)
	sideB := s.spawn(t, as("sidecar-web", "register", "--service", "web", "--addr", b.Addr().String())...)
	answered(t, "http://"+s.ha.Addr("be")+"/", a, b)
	says(web, a.Addr().String())
	says(all, b.Addr().String())

	for _, role := range []string{"operator", "watcher"} {
		done(as(role, "services"), "web")
		done(as(role, "instances", "web"), a.Addr().String())
		done(as(role, "wait", "web", "--for", "ready=2"), "applied by 1 balancers")
		done(as(role, "lb"), "yes")
		done(as(role, "status"), "REAPER")
		done(as(role, "events"), "joined")
	}
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte(rolePassword+rolePassword), 0o600); err != nil {
		t.Fatal(err)
	}
	for role, more := range map[string][]string{"watcher": nil, "operator": {"--token-file", token}} {
		page := s.page(t, append(as(role, "serve"), more...)...)
		for _, path := range []string{"/v1/status", "/v1/services/web", "/v1/events?since=1-1"} {
			if code, body, err := page.do("GET", path, ""); err != nil || code != 200 {
				t.Errorf("%s: %s: %d %s, %v", role, path, code, body, err)
			}
		}
		if more != nil {
			for path, body := range map[string]string{"/maint?wait=10s": `{"reason":"x"}`, "/ready?wait=10s": `{}`} {
				if code, body, err := page.do("POST", "/v1/services/web/instances/"+a.Addr().String()+path, body, "Authorization", "Bearer "+rolePassword+rolePassword); err != nil || code != 200 {
					t.Errorf("%s: %s: %d %s, %v", role, path, code, body, err)
				}
			}
		}
	}
	for _, word := range [][]string{
		{"drain", "web", a.Addr().String(), "--wait"}, {"maint", "web", a.Addr().String()}, {"ready", "web", a.Addr().String()},
		{"weight", "web", a.Addr().String(), "20"}, {"weight", "web", a.Addr().String(), "own"},
		{"drain", "web", "127.0.0.1:1", "--absent"}, {"ready", "web", "127.0.0.1:1"}, // nobody is there
		{"drain", "--host", a.Addr().Addr().String(), "--for", "1h", "--wait"}, {"ready", "--host", a.Addr().Addr().String()},
	} {
		done(as("operator", word...), "version")
	}

	sideB.signal(t, syscall.SIGKILL)
	says(web, "expired")
	says(follow, "expired")
	if code := sideA.signal(t, syscall.SIGTERM); code != 0 || !strings.Contains(sideA.out.String(), "drained") || !strings.Contains(sideA.out.String(), "left") {
		t.Errorf("the sidecar: exit %d\n%s", code, sideA.out)
	}
	says(all, "left")

	sideA = s.spawn(t, as("sidecar-web", "register", "--service", "web", "--addr", a.Addr().String())...)
	says(sideA, "registered")
	sideA.signal(t, syscall.SIGKILL)
	done(as("operator", "deregister", "--service", "web", "--addr", a.Addr().String(), "--force"), "deregister")
	says(web, "operator")
	lb.signal(t, syscall.SIGTERM)
	own.signal(t, syscall.SIGTERM)
	done(as("reaper", "reap", "--once", "--ttl", "3s"), "REMOVED")
	done(as("reaper", "reap", "--once", "--force", "--set-ttl", "--ttl", "3s"), "REMOVED")

	// A note older than 10 min is dropped by whoever comes next.
	root := srv.Client(t)
	prunes := func(role string, change func(*registrar.Store) error) {
		t.Helper()
		store := roleStore(t, srv, role)
		k := store.Keys()
		for _, err := range []error{
			root.HSet(t.Context(), k.Gone("web"), "10.0.0.1:1", "left 1 x").Err(),
			root.ZAdd(t.Context(), k.GoneAt("web"), redis.Z{Score: 1, Member: "10.0.0.1:1"}).Err(),
			root.ZAdd(t.Context(), k.Changed("web"), redis.Z{Score: 1, Member: "10.0.0.1:1"}).Err(),
			change(store),
		} {
			if err != nil {
				t.Errorf("%s: %v", role, err)
			}
		}
		if there, err := root.HExists(t.Context(), k.Gone("web"), "10.0.0.1:1").Result(); err != nil || there {
			t.Errorf("%s: the note is still there: %v", role, err)
		}
	}
	for _, role := range []string{"sidecar-web", "docker"} {
		prunes(role, func(s *registrar.Store) error {
			if _, err := s.Beat(t.Context(), "web", registrar.Beat{Addr: a.Addr(), Token: role, Meta: `{"id":"` + role + `"}`}); err != nil {
				return err
			}
			_, err := s.Leave(t.Context(), "web", a.Addr(), role, registrar.Left)
			return err
		})
	}
	prunes("operator", func(s *registrar.Store) error {
		_, _, err := s.SetAdmin(t.Context(), "web", a.Addr(), registrar.Word{Verb: "maint", Force: true})
		return err
	})

	refused, err := root.ACLLog(t.Context(), 10).Result()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range refused {
		t.Errorf("%s was refused: %s %s (%s)", r.Username, r.Reason, r.Object, r.Context)
	}
}

func roleStore(t *testing.T, srv *redistest.Server, role string) *registrar.Store {
	t.Helper()
	store, err := registrar.NewStore(roleClient(t, srv, role), registrar.DefaultNamespace)
	if err != nil {
		t.Fatal(err)
	}
	return store
}

func roleClient(t *testing.T, srv *redistest.Server, role string) redis.UniversalClient {
	t.Helper()
	rdb, err := registrar.Access{Password: func() (string, error) { return rolePassword, nil }}.Open(roleURL(srv, role), 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = rdb.Close() })
	return rdb
}

// TestRolesBounds tries on the real server what each role must be able to do and
// what it must not, by itself and from within a script: a script has its
// caller's rights and no more.
func TestRolesBounds(t *testing.T) {
	srv := startRoles(t)
	const sidecar, agent, reap, sync, operate, watch = "sidecar-web", "docker", "reaper", "lbsync", "operator", "watcher"
	clients := map[string]redis.UniversalClient{}
	for _, role := range []string{sidecar, agent, reap, sync, operate, watch} {
		clients[role] = roleClient(t, srv, role)
	}
	no := []string(nil)
	checks := bounds(t, clients, []bound{
		// Redis itself.
		{"flushall", no}, {"flushdb", no}, {"config get maxmemory", no}, {"config set maxmemory 1", no}, {"keys *", no}, {"scan 0", no},
		{"client list", no}, {"client kill type normal", no}, {"acl setuser x on", no}, {"acl list", no}, {"script flush", no}, {"replicaof no one", no},
		{"save", no}, {"randomkey", no}, {"dbsize", no}, {"swapdb 0 1", no}, {"function flush", no}, {"slowlog get", no},
		{"ping", []string{sidecar, agent, reap, sync, operate, watch}},
		// Whole keys.
		{"del rollcall:{web}:instances", no}, {"unlink rollcall:version", no}, {"rename rollcall:{web}:meta x", no}, {"expire rollcall:{web}:instances 1", no},
		{"copy rollcall:{web}:meta rollcall:{web}:admin", no}, {"zunionstore rollcall:{web}:instances 1 rollcall:{api}:instances", no},
		{"set other 1", no}, {"get other", no}, {"hset other a b", no}, {"zadd other 1 a", no},
		// The register.
		{"zadd rollcall:{web}:instances 1 a", []string{sidecar, agent, reap}}, {"zadd rollcall:{api}:instances 1 a", []string{agent, reap}},
		{"zrem rollcall:{web}:instances a", []string{sidecar, agent, reap, operate}}, {"zrem rollcall:{api}:instances a", []string{agent, reap, operate}},
		{"zremrangebyscore rollcall:{web}:instances 0 1", no},
		{"hset rollcall:{web}:meta a b", []string{sidecar, agent}}, {"hset rollcall:{api}:meta a b", []string{agent}}, {"hset rollcall:{_canary}:meta a b", []string{agent, reap}},
		{"hdel rollcall:{web}:meta a", []string{sidecar, agent, reap, operate}}, {"hdel rollcall:{api}:meta a", []string{agent, reap, operate}},
		{"hset rollcall:{web}:admin a b", []string{operate, reap}}, {"hdel rollcall:{web}:admin a", []string{operate, reap}}, // reapers end overrides
		{"hset rollcall:{web}:bound a b", []string{operate, reap}}, {"hdel rollcall:{web}:bound a", []string{operate, reap}},
		{"zadd rollcall:override-due 1 a", []string{operate, reap}}, {"zrem rollcall:override-due a", []string{operate, reap}},
		{"hset rollcall:{web}:gone a b", []string{sidecar, agent, reap, operate}}, {"hset rollcall:{api}:gone a b", []string{agent, reap, operate}},
		{"zadd rollcall:{web}:changed 1 a", []string{sidecar, agent, reap, operate}}, {"zadd rollcall:{api}:gone-at 1 a", []string{agent, reap, operate}},
		{"incr rollcall:{web}:version", []string{sidecar, agent, reap, operate}}, {"incr rollcall:{api}:version", []string{agent, reap, operate}},
		{"incr rollcall:version", []string{sidecar, agent, reap, operate}}, {"set rollcall:version 1", no}, {"set rollcall:{web}:version 1", no}, {"decr rollcall:version", no},
		{"setnx rollcall:epoch x", []string{sidecar, agent, reap, operate}}, {"set rollcall:epoch x", no},
		{"sadd rollcall:services web", []string{sidecar, agent}}, {"srem rollcall:services web", []string{reap}},
		{"hset rollcall:config a 1", []string{reap}}, {"hdel rollcall:config a", no},
		{"set rollcall:reaper:x y", []string{reap}}, {"set rollcall:let-go y", []string{reap}},
		{"set rollcall:quiet y", []string{sidecar, agent, reap, operate}}, {"pttl rollcall:quiet", []string{sidecar, agent, reap, operate}},
		{"hset rollcall:reapers f y", []string{reap}}, {"hdel rollcall:reapers f", []string{reap}}, {"hgetall rollcall:reapers", []string{reap, operate, watch}},
		{"hset rollcall:{web}:applied a 1", []string{sync}}, {"hdel rollcall:{web}:applied a", []string{sync}}, {"zadd rollcall:balancers 1 a", []string{sync}}, {"zrem rollcall:balancers a", []string{sync}},
		{"hset rollcall:balancer-owners a 1", []string{sync}}, {"hdel rollcall:balancer-owners a", []string{sync}}, {"hmget rollcall:balancer-owners a", []string{sidecar, agent, sync, operate, watch}}, {"unlink rollcall:balancer-owners", no},
		{"hset rollcall:{web}:seen:lb a 1", []string{sync}}, {"hdel rollcall:{web}:seen:lb a", []string{sync}}, {"unlink rollcall:{web}:seen:lb", []string{sync}},
		{"hgetall rollcall:{api}:seen:lb", []string{agent, sync, operate, watch}}, {"pexpire rollcall:{web}:seen:lb 1", []string{sync}}, {"pexpire rollcall:{web}:applied 1", no}, {"unlink rollcall:{web}:applied", no},
		{"xadd rollcall:events * what x", []string{sidecar, agent, reap, operate}}, {"xtrim rollcall:events maxlen 0", no}, {"xdel rollcall:events 1-1", no}, {"xinfo stream rollcall:events", []string{reap}}, {"del rollcall:events", []string{reap}}, {"del rollcall:config", no}, {"del rollcall:services", no},
		{"pubsub numsub rollcall:changes", []string{sidecar, agent, reap, sync, operate, watch}}, {"pubsub channels", no},
		{"set rollcall:docker:x y", []string{agent}}, {"pttl rollcall:docker:x", []string{agent}}, {"del rollcall:docker:x", no},
		{"sadd rollcall:docker-addrs:x y", []string{agent}}, {"srem rollcall:docker-addrs:x y", []string{agent}}, {"pexpire rollcall:docker-addrs:x 1", []string{agent}}, {"unlink rollcall:docker-addrs:x", no},
		{"smembers rollcall:docker-addrs:x", []string{agent, operate, watch}},
		{"publish rollcall:changes x", []string{sidecar, agent, reap, operate}}, {"publish other x", no},
		// Reading.
		{"xrevrange rollcall:events + - count 1", []string{reap, operate, watch}}, {"xread count 1 streams rollcall:events 0", []string{operate, watch}},
		{"smembers rollcall:services", []string{reap, operate, watch}}, {"srandmember rollcall:services 9", []string{reap, sync, operate, watch}},
		{"scard rollcall:services", []string{sidecar, agent}}, {"hlen rollcall:{web}:meta", []string{sync, operate, watch}}, {"zcard rollcall:{web}:instances", []string{sidecar, agent, reap, sync, operate, watch}},
		{"hgetall rollcall:config", []string{sidecar, agent, sync, operate, watch}},
		{"hgetall rollcall:{web}:meta", []string{sidecar, agent, sync, operate, watch}}, {"hgetall rollcall:{api}:meta", []string{agent, sync, operate, watch}},
		{"get rollcall:{api}:version", []string{agent, reap, sync, operate, watch}}, {"get rollcall:reaper:x", []string{reap, operate, watch}},
	})
	checks += listeners(t, clients, sync, operate, watch)
	t.Logf("%d checks", checks)

	// The product's own scripts, in the wrong hands.
	ctx := t.Context()
	addr := haproxytest.NewInstance(t).Addr()
	beat := func(role string, svc registrar.Service) error {
		_, err := roleStore(t, srv, role).Beat(ctx, svc, registrar.Beat{Addr: addr, Token: "t", Meta: `{"id":"t"}`})
		return err
	}
	if err := beat(sidecar, "web"); err != nil {
		t.Fatal(err)
	}
	word := func(role string) error {
		_, _, err := roleStore(t, srv, role).SetAdmin(ctx, "web", addr, registrar.Word{Verb: "maint"})
		return err
	}
	ack := func(role string) error {
		return roleStore(t, srv, role).Acker("lb").Ack(ctx, "web", registrar.Token{})
	}
	pulse := func(role string) error {
		_, err := roleStore(t, srv, role).Pulse(ctx, "r", "token", registrar.DefaultTTL)
		return err
	}
	sweep := func(role string) error {
		_, err := roleStore(t, srv, role).Reap(ctx, "web", registrar.Sweep{ID: "r", Token: "token"})
		return err
	}
	for what, err := range map[string]error{
		"sidecar-web beats for api":   beat(sidecar, "api"),
		"lbsync beats":                beat(sync, "web"),
		"the watcher beats":           beat(watch, "web"),
		"the reaper beats for api":    beat(reap, "api"),
		"the operator beats":          beat(operate, "web"),
		"the sidecar says maint":      word(sidecar),
		"the reaper says maint":       word(reap),
		"lbsync says maint":           word(sync),
		"the sidecar acknowledges":    ack(sidecar),
		"the reaper acknowledges":     ack(reap),
		"the operator acknowledges":   ack(operate),
		"the sidecar pulses":          pulse(sidecar),
		"the operator pulses":         pulse(operate),
		"lbsync pulses":               pulse(sync),
		"the sidecar reaps":           sweep(sidecar),
		"lbsync reaps":                sweep(sync),
		"the operator reaps":          sweep(operate),
		"the watcher reaps":           sweep(watch),
		"the sidecar sets the config": setConfig(ctx, roleStore(t, srv, sidecar)),
	} {
		if !refused(err) {
			t.Errorf("%s: %v, want a refusal", what, err)
		}
	}
}

// bound is who may send a command.
type bound struct {
	command string
	may     []string
}

// bounds has everybody try everything, directly and from within a script, and
// returns how many checks that were.
func bounds(t *testing.T, clients map[string]redis.UniversalClient, table []bound) (checks int) {
	t.Helper()
	for _, c := range table {
		var args []any
		for _, f := range strings.Fields(c.command) {
			args = append(args, f)
		}
		for role, rdb := range clients {
			run := "eval"
			if role == "watcher" { // it has no other
				run = "eval_ro"
			}
			direct := rdb.Do(t.Context(), args...).Err()
			inside := rdb.Do(t.Context(), append([]any{run, "return redis.call(unpack(ARGV))", 0}, args...)...).Err()
			for how, err := range map[string]error{"directly": direct, "in a script": inside} {
				checks++
				if got, want := !refused(err), slices.Contains(c.may, role); got != want {
					t.Errorf("%s %s: %s: allowed %v, want %v: %v", role, how, c.command, got, want, err)
				}
			}
		}
	}
	return checks
}

// listeners checks who may subscribe.
func listeners(t *testing.T, clients map[string]redis.UniversalClient, may ...string) (checks int) {
	t.Helper()
	for role, rdb := range clients {
		for channel, want := range map[string]bool{"rollcall:changes": slices.Contains(may, role), "other": false} {
			checks++
			ps := rdb.Subscribe(t.Context(), channel)
			_, err := ps.Receive(t.Context())
			if got := !refused(err); got != want {
				t.Errorf("%s: subscribe %s: allowed %v, want %v: %v", role, channel, got, want, err)
			}
			_ = ps.Close()
		}
	}
	return checks
}

func setConfig(ctx context.Context, s *registrar.Store) error {
	_, err := s.Config(ctx, registrar.DefaultTTL, registrar.DefaultInterval, true)
	return err
}

// refused tells Redis' word on rights from every other answer.
func refused(err error) bool {
	return err != nil && (strings.Contains(err.Error(), "NOPERM") ||
		strings.Contains(err.Error(), "The user executing the script can't") ||
		strings.Contains(err.Error(), "command is not allowed from script") ||
		strings.Contains(err.Error(), "Write commands are not allowed from read-only scripts"))
}
