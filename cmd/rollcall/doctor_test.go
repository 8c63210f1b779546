package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
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

// doctor runs the command and returns its findings.
func (s *system) doctor(t *testing.T, args ...string) (findings []finding, code int) {
	t.Helper()
	stdout, stderr, code := s.rollcall(t, append([]string{"doctor", "-o", "json"}, args...)...)
	if err := json.Unmarshal([]byte(stdout), &findings); err != nil {
		t.Fatalf("%v: exit %d, %q, %q", err, code, stdout, stderr)
	}
	bad := false
	for _, f := range findings {
		bad = bad || f.State == stateBad
		if f.Seen == "" || (f.State == stateOK) != (f.Why == "") || (f.State == stateOK) != (f.Fix == "") {
			t.Errorf("finding is not whole: %+v", f)
		}
	}
	if want := map[bool]int{false: 0, true: exitFailed}[bad]; code != want {
		t.Errorf("exit %d, want %d; %s", code, want, stderr)
	}
	return findings, code
}

// ill returns the findings that are not ok, as lines.
func ill(findings []finding) string {
	var b strings.Builder
	for _, f := range findings {
		if f.State != stateOK {
			fmt.Fprintf(&b, "%s: %s: %s\n", f.Check, f.State, f.Seen)
		}
	}
	return b.String()
}

// expect fails unless the findings that are not ok are exactly want: a state
// and the end of a check's name, then words of what is seen.
func expect(t *testing.T, findings []finding, want ...[3]string) {
	t.Helper()
	n := 0
	for _, f := range findings {
		if f.State != stateOK {
			n++
		}
	}
	ok := n == len(want)
	for _, w := range want {
		found := false
		for _, f := range findings {
			found = found || string(f.State) == w[0] && strings.HasSuffix(f.Check, w[1]) && strings.Contains(f.Seen, w[2])
		}
		ok = ok && found
	}
	if !ok {
		t.Errorf("got\n%swant %v", ill(findings), want)
	}
}

// healthy starts a system in which doctor finds nothing, and returns doctor's
// flags.
func healthy(t *testing.T) (s *system, flags []string, reapers []*process) {
	t.Helper()
	s = &system{
		redis: redistest.Start(t, "--appendonly", "yes"),
		ha: haproxytest.Start(t, haproxytest.Options{
			StateFile: true, Backends: []haproxytest.Backend{{Name: "be", Balance: "leastconn", Slots: 10, Check: true}},
		}),
	}
	reapers = []*process{s.spawn(t, "reap"), s.spawn(t, "reap")}
	s.spawn(t, "lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8")
	i := haproxytest.NewInstance(t)
	s.spawn(t, "register", "--service", "web", "--addr", i.Addr().String())
	answered(t, "http://"+s.ha.Addr("be")+"/", i)
	s.dump(t)
	flags = []string{"--socket", s.ha.Socket, "--backend", "web=be", "--config", s.file("haproxy.cfg")}
	s.recovers(t, flags)
	return s, flags, reapers
}

func (s *system) file(name string) string { return filepath.Join(filepath.Dir(s.ha.Socket), name) }

// dump writes the state file.
func (s *system) dump(t *testing.T) {
	t.Helper()
	if err := os.WriteFile(s.file("state"), []byte(s.ha.Command(t, "show servers state")), 0o600); err != nil {
		t.Fatal(err)
	}
}

// recovers waits until doctor finds nothing.
func (s *system) recovers(t *testing.T, flags []string) {
	t.Helper()
	haproxytest.Poll(t, "doctor finds nothing", func() error {
		if findings, _ := s.doctor(t, flags...); ill(findings) != "" {
			return fmt.Errorf("%s", ill(findings))
		}
		return nil
	})
}

// fromNow stands for unix ms, so long after the command that has it is sent.
type fromNow time.Duration

// TestDoctor breaks one thing at a time in a healthy system.
func TestDoctor(t *testing.T) {
	t.Parallel()
	s, flags, reapers := healthy(t)
	rdb := s.redis.Client(t)
	ctx := t.Context()
	do := func(t *testing.T, args ...any) any {
		t.Helper()
		args = slices.Clone(args)
		for i, a := range args {
			if d, ok := a.(fromNow); ok {
				args[i] = time.Now().Add(time.Duration(d)).UnixMilli()
			}
		}
		v, err := rdb.Do(ctx, args...).Result()
		if err != nil {
			t.Fatalf("%v: %v", args, err)
		}
		return v
	}
	doAll := func(cmds ...[]any) func(*testing.T) {
		return func(t *testing.T) {
			t.Helper()
			for _, c := range cmds {
				do(t, c...)
			}
		}
	}
	type cmd = []any
	used := func(percent int64) func(*testing.T) {
		return func(t *testing.T) {
			var n int64
			for line := range strings.Lines(rdb.Info(ctx, "memory").Val()) {
				if _, err := fmt.Sscanf(line, "used_memory:%d", &n); err == nil {
					break
				}
			}
			do(t, "config", "set", "maxmemory", n*100/percent)
		}
	}
	unlimited := doAll(cmd{"config", "set", "maxmemory", "0"})
	instances := "rollcall:{web}:instances"
	type fault struct {
		name       string
		make, undo func(*testing.T)
		flags      []string
		want       [][3]string
	}
	try := func(tt fault, also ...[3]string) {
		t.Run(tt.name, func(t *testing.T) {
			if tt.make != nil {
				tt.make(t)
			}
			args := flags
			for i := 0; i+1 < len(tt.flags); i += 2 {
				args = with(args, tt.flags[i], tt.flags[i+1])
			}
			findings, _ := s.doctor(t, args...)
			expect(t, findings, append(tt.want, also...)...)
			if tt.undo != nil {
				tt.undo(t)
			}
		})
	}
	for _, tt := range []fault{
		{"policy", doAll(cmd{"config", "set", "maxmemory-policy", "allkeys-lru"}), doAll(cmd{"config", "set", "maxmemory-policy", "noeviction"}), nil,
			[][3]string{{"warn", "redis eviction", "allkeys-lru"}}},
		{"evicting", doAll(cmd{"config", "set", "maxmemory-policy", "allkeys-lru", "maxmemory", "1gb"}), doAll(cmd{"config", "set", "maxmemory-policy", "noeviction", "maxmemory", "0"}), nil,
			[][3]string{{"bad", "redis eviction", "allkeys-lru"}}},
		{"memory thin", used(87), unlimited, nil, [][3]string{{"warn", "redis memory", "bytes"}}},
		{"memory gone", used(99), unlimited, nil, [][3]string{{"bad", "redis memory", "bytes"}}},
		{"clients", func(t *testing.T) {
			for range 50 { // so many that who comes and goes beside them makes no difference
				c, err := net.Dial("tcp", rdb.Options().Addr)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = c.Close() }) // nothing was sent
			}
			do(t, "config", "set", "maxclients", len(strings.Split(strings.TrimSpace(rdb.ClientList(ctx).Val()), "\n"))*8/7)
		}, doAll(cmd{"config", "set", "maxclients", 1000}), nil, [][3]string{{"warn", "redis clients", " of "}}},
		{"no persistence", doAll(cmd{"config", "set", "appendonly", "no"}), doAll(cmd{"config", "set", "appendonly", "yes"}), nil,
			[][3]string{{"warn", "redis persistence", "no"}}},
		{"subscriber's buffer", doAll(cmd{"config", "set", "client-output-buffer-limit", "pubsub 65536 0 0"}), doAll(cmd{"config", "set", "client-output-buffer-limit", "pubsub 33554432 8388608 60"}), nil,
			[][3]string{{"warn", "redis pub/sub buffer", "65536"}}},
		{"another's key", doAll(cmd{"set", "rollcall:x'y", "1"}), doAll(cmd{"del", "rollcall:x'y"}), nil, [][3]string{{"warn", "registry keys", "rollcall:x'y"}}},
		{"wrong type", doAll(cmd{"set", "rollcall:{api}:meta", "1"}), doAll(cmd{"del", "rollcall:{api}:meta"}), nil, [][3]string{{"bad", "registry types", "rollcall:{api}:meta is a string, want a hash"}}},
		{"no service name", doAll(cmd{"sadd", "rollcall:services", "A b"}), doAll(cmd{"srem", "rollcall:services", "A b"}), nil, [][3]string{{"warn", "registry services", "A b"}}},
		{"service without instances", doAll(cmd{"sadd", "rollcall:services", "api"}), doAll(cmd{"srem", "rollcall:services", "api"}), nil, [][3]string{{"warn", "registry services", "without instances: api"}}},
		{"service that nobody lists", doAll(cmd{"zadd", "rollcall:{api}:instances", fromNow(0), "127.0.0.1:1"}), doAll(cmd{"del", "rollcall:{api}:instances"}), nil,
			[][3]string{{"bad", "registry services", "not in rollcall:services: api"}}},
		// A weight that no instance can have. The owner never beats, so it lasts.
		{"metadata", doAll(cmd{"hset", "rollcall:{web}:meta", "127.0.0.1:1", `{"weight":999}`}, cmd{"zadd", instances, fromNow(0), "127.0.0.1:1"}),
			doAll(cmd{"zrem", instances, "127.0.0.1:1"}, cmd{"hdel", "rollcall:{web}:meta", "127.0.0.1:1"}), nil, [][3]string{{"warn", "registry members", "127.0.0.1:1"}}},
		{"flags", nil, nil, []string{"--ttl", "20s"}, [][3]string{{"bad", "registry config", "20s"}}},
		{"heartbeat", nil, nil, []string{"--heartbeat", "4s"}, [][3]string{{"bad", "registry config", "4s"}}},
		{"few services", doAll(cmd{"hset", "rollcall:config", "max_services", "1"}), doAll(cmd{"hdel", "rollcall:config", "max_services"}), nil, [][3]string{{"bad", "limit: services", "1 of 1"}}},
		{"hardly room", doAll(cmd{"hset", "rollcall:config", "max_instances", "0"}), doAll(cmd{"hdel", "rollcall:config", "max_instances"}), nil, [][3]string{{"bad", "limit: instances", "1 of 0 in the largest service"}}},
		{"more than is read", doAll(cmd{"hset", "rollcall:config", "max_instances", "100001"}), doAll(cmd{"hset", "rollcall:config", "max_instances", "100000"}), nil, [][3]string{{"bad", "limit: instances", "100001"}}},
		{"balancer that is gone", doAll(cmd{"hset", "rollcall:{web}:applied", "other", "1"}, cmd{"zadd", "rollcall:balancers", fromNow(-time.Minute), "other"}),
			doAll(cmd{"hdel", "rollcall:{web}:applied", "other"}, cmd{"zrem", "rollcall:balancers", "other"}), nil, [][3]string{{"warn", "balancers of web", "silent: other"}}},
		{"balancer that is late", doAll(cmd{"hset", "rollcall:{web}:applied", "other", "0"}, cmd{"zadd", "rollcall:balancers", fromNow(0), "other"}),
			doAll(cmd{"hdel", "rollcall:{web}:applied", "other"}, cmd{"zrem", "rollcall:balancers", "other"}), nil, [][3]string{{"warn", "balancers of web", "other is "}}},
		{"no configuration", nil, nil, []string{"--config", ""}, [][3]string{{"unknown", "be configuration", "no such file"}}},
		{"no state file", func(t *testing.T) { must(t, os.Remove(s.file("state"))) }, s.dump, nil, [][3]string{{"bad", "state file", "no such file"}}},
		{"other file", func(t *testing.T) { must(t, os.WriteFile(s.file("state"), []byte("x\n"), 0o600)) }, s.dump, nil, [][3]string{{"bad", "state file", "no state file"}}},
		{"old state file", func(t *testing.T) {
			must(t, os.WriteFile(s.file("state"), []byte("1\n# a header\n"), 0o600))
		}, s.dump, nil, [][3]string{{"warn", "state file", "0 of 1"}}},
		{"state file of a server in maint", func(t *testing.T) {
			var b strings.Builder
			for row := range strings.Lines(s.ha.Command(t, "show servers state")) {
				if col := strings.Fields(row); len(col) > 6 && col[1] == "be" {
					col[6] = "5" // srv_admin_state
					row = strings.Join(col, " ") + "\n"
				}
				b.WriteString(row)
			}
			must(t, os.WriteFile(s.file("state"), []byte(b.String()), 0o600))
		}, s.dump, nil, [][3]string{{"warn", "state file", "0 of 1"}}},
		{"operator's socket", nil, nil, []string{"--socket", s.ha.OperatorSocket}, [][3]string{
			{"bad", "operator level", "operator or user"}, {"unknown", "operator lbsync", "no id of an lbsync that has backend be"}, {"unknown", "balance", "leastconn"}}},
		{"user's socket", nil, nil, []string{"--socket", s.ha.UserSocket}, [][3]string{
			{"bad", "user level", "operator or user"}, {"unknown", "user lbsync", "no id of an lbsync that has backend be"}, {"unknown", "balance", "unknown algorithm"}}},
		{"no socket", nil, nil, []string{"--socket", s.file("nowhere")}, [][3]string{{"bad", "nowhere", "no complete answer"}}},
		{"no backend", nil, nil, []string{"--backend", "web=nope"}, [][3]string{{"bad", "nope", "no such backend"}, {"unknown", "admin lbsync", "backend nope"}}},
		{"no lbsync for it", nil, nil, []string{"--backend", "api=be"}, [][3]string{{"bad", "balancers of api", "none"}, {"bad", "lbsync", "none alive for api"}}},
		{"one reaper", func(t *testing.T) {
			reapers[0].signal(t, syscall.SIGKILL)
			haproxytest.Poll(t, "it is silent", func() error {
				if f, _ := s.doctor(t, flags...); !strings.Contains(ill(f), "silent for") {
					return fmt.Errorf("%s", ill(f))
				}
				return nil
			})
		}, nil, nil, [][3]string{{"warn", "reapers", "1 alive"}}},
	} {
		try(tt)
	}
	reapers[1].signal(t, syscall.SIGKILL)
	keys, err := rdb.Keys(ctx, "rollcall:reaper:*").Result()
	must(t, err)
	for _, k := range keys {
		do(t, "del", k)
	}
	none := [3]string{"bad", "reapers", "0 alive"}
	// What a reaper's sweep would mend, or what ends a reaper.
	for _, tt := range []fault{
		{"score in the future", doAll(cmd{"zadd", instances, fromNow(time.Hour), "127.0.0.1:2"}), doAll(cmd{"zrem", instances, "127.0.0.1:2"}), nil, [][3]string{{"warn", "registry members", "127.0.0.1:2"}}},
		{"member that is no address", doAll(cmd{"zadd", instances, fromNow(time.Hour), "not'an address"}), doAll(cmd{"zrem", instances, "not'an address"}), nil,
			[][3]string{{"warn", "registry members", "not'an address"}}},
		{"interval", doAll(cmd{"hset", "rollcall:config", "interval_ms", "9000"}), doAll(cmd{"hset", "rollcall:config", "interval_ms", "5000"}), nil, [][3]string{{"bad", "registry config", "9000"}}},
		{"no number", doAll(cmd{"hset", "rollcall:config", "interval_ms", "soon"}), doAll(cmd{"hset", "rollcall:config", "interval_ms", "5000"}), nil, [][3]string{{"bad", "registry config", "soon"}}},
		{"two services", func(t *testing.T) {
			a := do(t, "zrange", instances, 0, 0).([]any)[0]
			do(t, "zadd", "rollcall:{api}:instances", fromNow(0), a)
			do(t, "sadd", "rollcall:services", "api")
		},
			doAll(cmd{"del", "rollcall:{api}:instances"}, cmd{"srem", "rollcall:services", "api"}), nil, [][3]string{{"warn", "registry addresses", "in api and web"}}},
		{"two services, one silent", func(t *testing.T) {
			a := do(t, "zrange", instances, 0, 0).([]any)[0]
			do(t, "zadd", "rollcall:{api}:instances", fromNow(-12*time.Second), a)
			do(t, "sadd", "rollcall:services", "api")
		},
			doAll(cmd{"del", "rollcall:{api}:instances"}, cmd{"srem", "rollcall:services", "api"}), nil, [][3]string{{"warn", "registry addresses", "in api (silent for 1"}}},
		{"no config", doAll(cmd{"del", "rollcall:config"}), doAll(cmd{"hset", "rollcall:config", "interval_ms", "5000", "ttl_ms", "15000"}), nil, [][3]string{{"warn", "registry config", "none"}}},
	} {
		try(tt, none)
	}
	t.Run("no reaper", func(t *testing.T) {
		do(t, "zadd", instances, time.Now().Add(-time.Minute).UnixMilli(), "127.0.0.1:3")
		do(t, "del", "rollcall:epoch")
		findings, _ := s.doctor(t)
		expect(t, findings, none, [3]string{"warn", "registry silence", "127.0.0.1:3"}, [3]string{"warn", "registry epoch", "none"})
	})
}

// with replaces a flag's value, drops the flag if the value is empty, or adds
// it.
func with(args []string, flag, value string) []string {
	out := []string{}
	done := false
	for i := 0; i < len(args); i += 2 {
		v := args[i+1]
		if args[i] == flag {
			v, done = value, true
			if v == "" {
				v = "/nonexistent/haproxy.cfg"
			}
		}
		out = append(out, args[i], v)
	}
	if !done {
		out = append(out, flag, value)
	}
	return out
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestDoctorRedis looks at Redis servers that cannot be broken and mended.
func TestDoctorRedis(t *testing.T) {
	t.Parallel()
	only := func(findings []finding, prefix string) (out []finding) {
		for _, f := range findings {
			if strings.HasPrefix(f.Check, prefix) {
				out = append(out, f)
			}
		}
		return out
	}
	primary := redistest.Start(t, "--appendonly", "yes")
	s := &system{redis: primary}
	rdb := primary.Client(t)
	ctx := t.Context()

	findings, _ := s.doctor(t)
	expect(t, findings, [3]string{"warn", "registry", "no key"}, [3]string{"warn", "registry epoch", "none"}, [3]string{"warn", "registry config", "none"}, [3]string{"bad", "reapers", "0 alive"})

	t.Run("replica", func(t *testing.T) {
		replica := redistest.Start(t, "--appendonly", "yes", "--replicaof", primary.Host+" 6379")
		findings, _ := (&system{redis: replica}).doctor(t)
		expect(t, only(findings, "redis"), [3]string{"bad", "redis role", "slave"})
		haproxytest.Poll(t, "the replica follows", func() error {
			if !strings.Contains(rdb.Info(ctx, "replication").Val(), "state=online") {
				return redis.Nil
			}
			return nil
		})
		findings, _ = s.doctor(t)
		expect(t, only(findings, "redis"), [3]string{"warn", "redis replicas", "1, min-replicas-to-write 0"})
		must(t, rdb.ConfigSet(ctx, "min-replicas-to-write", "1").Err())
		findings, _ = s.doctor(t)
		expect(t, only(findings, "redis"))
		must(t, rdb.ConfigSet(ctx, "min-replicas-to-write", "2").Err())
		findings, _ = s.doctor(t)
		expect(t, only(findings, "redis"), [3]string{"bad", "redis replicas", "1 follow, min-replicas-to-write is 2"})
		must(t, rdb.ConfigSet(ctx, "min-replicas-to-write", "0").Err())
	})
	t.Run("rights", func(t *testing.T) {
		as := func(t *testing.T, rules ...any) []finding {
			t.Helper()
			must(t, rdb.Do(ctx, append([]any{"acl", "setuser", "u", "reset", "on", ">p", "~*", "&*", "+@all"}, rules...)...).Err())
			before := rdb.DBSize(ctx).Val()
			findings, _ := s.doctor(t, "--redis", "redis://u:p@"+primary.Addr+"/0")
			if after := rdb.DBSize(ctx).Val(); after != before {
				t.Errorf("doctor wrote: %d keys, %d before", after, before)
			}
			for _, f := range only(findings, "registry") {
				if f.State == stateUnknown {
					t.Errorf("%s: %s", f.Check, f.Seen)
				}
			}
			return only(findings, "redis")
		}
		if out := as(t); ill(out) != "" && !strings.Contains(ill(out), "replicas") {
			t.Errorf("a user with all rights: %s", ill(out))
		}
		for _, tt := range []struct {
			name  string
			rules []any
			want  [][3]string
		}{
			{"publish", []any{"-publish"}, [][3]string{{"bad", "rights: register", "publish rollcall:changes"}, {"bad", "rights: docker", "publish rollcall:changes"}, {"bad", "rights: reap", "publish"}, {"bad", "rights: operator", "publish"}}},
			{"subscribe", []any{"-subscribe"}, [][3]string{{"bad", "rights: lbsync", "subscribe rollcall:changes"}}},
			{"channel", []any{"resetchannels", "&other"}, [][3]string{{"bad", "rights: register", "publish"}, {"bad", "rights: docker", "publish"}, {"bad", "rights: reap", "publish"}, {"bad", "rights: operator", "publish"}, {"bad", "rights: lbsync", "subscribe"}}},
			{"pulse", []any{"-set"}, [][3]string{{"bad", "rights: register", "set rollcall:quiet"}, {"bad", "rights: docker", "set rollcall:quiet"}, {"bad", "rights: reap", "set rollcall:quiet, set rollcall:reaper:-"}, {"bad", "rights: operator", "set rollcall:quiet"}}},
			{"settings", []any{"-config"}, [][3]string{{"unknown", "redis pub/sub buffer", "no right"}, {"unknown", "redis replicas", "no right"}}},
			{"no DISCARD", []any{"-discard"}, [][3]string{{"unknown", "redis rights", "MULTI"}}},
			{"trial", []any{"-multi"}, [][3]string{{"unknown", "redis rights", "MULTI"}}},
			{"info", []any{"-info"}, [][3]string{{"bad", "redis info", "; ACL SETUSER u +info"}, {"unknown", "redis eviction", ""}, {"unknown", "redis memory", ""}, {"unknown", "redis clients", ""}, {"unknown", "redis persistence", ""}, {"unknown", "redis replicas", ""}, {"bad", "rights: register", "info"}, {"bad", "rights: docker", "info"}, {"bad", "rights: reap", "info"}, {"bad", "rights: operator", "info"}, {"bad", "rights: lbsync", "info"}}},
		} {
			t.Run(tt.name, func(t *testing.T) { expect(t, as(t, tt.rules...), tt.want...) })
		}
		as(t, "-subscribe", "-hsetnx")
		findings, _ := s.doctor(t, "--redis", "redis://u:p@"+primary.Addr+"/0", "--role", "register", "--role", "operator")
		expect(t, only(findings, "redis"))
		findings, _ = s.doctor(t, "--redis", "redis://u:wrong@"+primary.Addr+"/0")
		expect(t, findings, [3]string{"bad", "redis", "WRONGPASS"}, [3]string{"unknown", "registry", "not looked at"})
	})
	t.Run("failed save", func(t *testing.T) {
		must(t, os.Mkdir(filepath.Join(primary.Dir, "dump.rdb"), 0o700))
		must(t, rdb.BgSave(ctx).Err())
		haproxytest.Poll(t, "the save has failed", func() error {
			if !strings.Contains(rdb.Info(ctx, "persistence").Val(), "rdb_last_bgsave_status:err") {
				return redis.Nil
			}
			return nil
		})
		findings, _ := s.doctor(t)
		expect(t, only(findings, "redis"), [3]string{"bad", "redis persistence", "rdb_last_bgsave_status is err"})
	})
	t.Run("gone", func(t *testing.T) {
		primary.Kill(t)
		findings, _ := s.doctor(t)
		expect(t, findings, [3]string{"bad", "redis", "refused"}, [3]string{"unknown", "registry", "not looked at"})
	})
}

// TestDoctorServer has what no server at hand can show: its version, a clock
// that is wrong, and the boundaries.
func TestDoctorServer(t *testing.T) {
	good := registrar.Server{
		Version: "7.0.0", Role: "master", Policy: "noeviction", Persistent: "yes", Memory: 79, MaxMemory: 100, Clients: 79, MaxClients: 100,
		PubSubLimit: pubSubFloor, ClockMin: -maxSkew - time.Minute, ClockMax: -maxSkew,
	}
	for _, tt := range []struct {
		name   string
		change func(*registrar.Server)
		want   [][3]string
	}{
		{"good", func(*registrar.Server) {}, nil},
		{"version 6", func(o *registrar.Server) { o.Version = "6.2.14" }, [][3]string{{"bad", "redis version", "6.2.14"}}},
		{"version 10", func(o *registrar.Server) { o.Version = "10.0.0" }, nil},
		{"no version", func(o *registrar.Server) { o.Version = "" }, [][3]string{{"unknown", "redis version", ""}}},
		{"no role", func(o *registrar.Server) { o.Role = "" }, [][3]string{{"unknown", "redis role", ""}}},
		{"no policy", func(o *registrar.Server) { o.Policy = "" }, [][3]string{{"unknown", "redis eviction", ""}}},
		{"clock slow", func(o *registrar.Server) { o.ClockMax-- }, [][3]string{{"warn", "redis clock", "between"}}},
		{"clock fast", func(o *registrar.Server) { o.ClockMin, o.ClockMax = maxSkew+1, time.Hour }, [][3]string{{"warn", "redis clock", "between"}}},
		{"memory 80", func(o *registrar.Server) { o.Memory = 80 }, [][3]string{{"warn", "redis memory", "80 %"}}},
		{"memory 94", func(o *registrar.Server) { o.Memory = 94 }, [][3]string{{"warn", "redis memory", "94 %"}}},
		{"memory 95", func(o *registrar.Server) { o.Memory = 95 }, [][3]string{{"bad", "redis memory", "95 %"}}},
		{"memory unsaid", func(o *registrar.Server) { o.Memory = registrar.Unknown }, [][3]string{{"unknown", "redis memory", ""}}},
		{"clients 80", func(o *registrar.Server) { o.Clients = 80 }, [][3]string{{"warn", "redis clients", "80 %"}}},
		{"clients 95", func(o *registrar.Server) { o.Clients = 95 }, [][3]string{{"bad", "redis clients", "95 %"}}},
		{"clients unsaid", func(o *registrar.Server) { o.MaxClients = registrar.Unknown }, [][3]string{{"unknown", "redis clients", ""}}},
		{"persistence unsaid", func(o *registrar.Server) { o.Persistent = "" }, [][3]string{{"unknown", "redis persistence", ""}}},
		{"buffer", func(o *registrar.Server) { o.PubSubLimit-- }, [][3]string{{"warn", "redis pub/sub buffer", ""}}},
		{"buffer without limit", func(o *registrar.Server) { o.PubSubLimit = 0 }, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o, d := good, doctor{}
			tt.change(&o)
			d.server("redis", o)
			expect(t, d.findings, tt.want...)
		})
	}
}

// TestDoctorHAProxy looks at backends that are set up in other ways. Nobody
// drives them: that is one more finding.
func TestDoctorHAProxy(t *testing.T) {
	t.Parallel()
	template := func(words string) []string { return []string{"server-template x 1-3 " + words} }
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{StateFile: true, Backends: []haproxytest.Backend{
		{Name: "none", Balance: "leastconn"},
		{Name: "fixed", Balance: "static-rr"},
		{Name: "static", Balance: "source", Slots: 10, Check: true},
		{Name: "unchecked", Slots: 10},
		{Name: "few", Slots: 3, Check: true},
		{Name: "enabled", Extra: template("slot.invalid:1 check init-addr last,127.0.0.1")},
		{Name: "stuck", Extra: template("slot.invalid:1 check disabled init-addr last,none")},
		{Name: "weightless", Balance: "static-rr", Extra: template("slot.invalid:1 check disabled weight 0 init-addr last,127.0.0.1")},
		{Name: "others", Extra: template("127.0.0.1:1 check disabled")},
		{Name: "tcp", TCP: true, Slots: 3},
		{Name: "resolved", Extra: template("slot.invalid:1 check disabled resolvers dns init-addr last,127.0.0.1")},
		{Name: "agents", Extra: template("slot.invalid:1 check agent-check agent-port 9 disabled init-addr last,127.0.0.1")},
		{Name: "spares", Slots: 3, Check: true, Extra: []string{"server-template spare 1-3 slot.invalid:1 check backup disabled init-addr last,127.0.0.1"}},
		{Name: "odd", Extra: template("slot.invalid:8080 check disabled init-addr last,192.0.2.1")},
		{Name: "kept", Balance: "static-rr", Slots: 3, Check: true},
	}, Sections: []string{"resolvers dns\n  nameserver none 127.0.0.1:9\n  hold other 1h\n  hold refused 1h\n  hold nx 1h\n  hold timeout 1h"}})}
	s.dump(t)
	rdb := s.redis.Client(t)
	fill := func(n int) {
		for i := range n {
			must(t, rdb.ZAdd(t.Context(), "rollcall:{web}:instances", redis.Z{Score: float64(time.Now().UnixMilli()), Member: fmt.Sprintf("127.0.0.1:%d", 9000+i)}).Err())
		}
		must(t, rdb.SAdd(t.Context(), "rollcall:services", "web").Err())
	}
	fill(1)
	config, err := os.ReadFile(s.file("haproxy.cfg"))
	must(t, err)
	look := func(t *testing.T, backend, config string) (out []finding) {
		t.Helper()
		file := filepath.Join(t.TempDir(), "haproxy.cfg")
		must(t, os.WriteFile(file, []byte(config), 0o600))
		findings, _ := s.doctor(t, "--socket", s.ha.Socket, "--backend", "web="+backend, "--config", file)
		for _, f := range findings {
			if strings.HasPrefix(f.Check, "haproxy "+s.ha.Socket+" "+backend) {
				out = append(out, f)
			}
		}
		if len(out) == 0 {
			t.Error("nothing is said of the backend")
		}
		return out
	}
	for _, tt := range []struct {
		backend string
		want    [][3]string
	}{
		{"none", [][3]string{{"warn", "mode", "dynamic"}, {"unknown", "check", "no server"}}},
		{"fixed", [][3]string{{"bad", "mode", "dynamic"}, {"bad", "balance", "static-rr"}, {"unknown", "check", "no server"}}},
		{"static", [][3]string{{"warn", "balance", "source"}}},
		{"unchecked", [][3]string{{"warn", "check", "0 of 10"}}},
		{"enabled", [][3]string{{"bad", "slots usable", "not disabled: x1, x2, x3"}}},
		{"stuck", [][3]string{{"bad", "slots usable", "without an address"}, {"bad", "init-addr", "last,none"}}},
		{"weightless", [][3]string{{"bad", "slots usable", "weight 0"}, {"warn", "balance", "static-rr"}}},
		{"others", [][3]string{{"warn", "mode", "dynamic"}, {"unknown", "check", "no server"}, {"bad", "templates", "slot.invalid"}}},
		{"tcp", [][3]string{{"warn", "check", "0 of 3"}}},
		{"few", nil},
		{"resolved", [][3]string{{"bad", "driven", "resolvers"}}},
		{"agents", [][3]string{{"bad", "driven", "weight 100"}}},
		{"spares", [][3]string{{"warn", "backups", "spare1"}}},
		{"odd", nil},
		{"kept", [][3]string{{"warn", "balance", "static-rr"}}},
	} {
		t.Run(tt.backend, func(t *testing.T) {
			expect(t, look(t, tt.backend, string(config)), tt.want...)
		})
	}
	for _, tt := range []struct {
		name, old, new string
		want           [][3]string
	}{
		{"no redispatch", "  option redispatch\n", "", [][3]string{{"bad", "redispatch", "not set"}}},
		{"redispatch taken back", "backend few\n", "backend few\n  no option redispatch\n", [][3]string{{"bad", "redispatch", "not set"}}},
		{"no idle close", "  option idle-close-on-response\n", "", [][3]string{{"bad", "idle close", "not set"}}},
		{"no sender", "default_backend few", "default_backend tcp", [][3]string{{"unknown", "idle close", "no frontend"}}},
		{"no load", "  load-server-state-from-file global\n", "", [][3]string{{"bad", "state file", "none is loaded"}}},
		{"load none", "backend few\n", "backend few\n  load-server-state-from-file none\n", [][3]string{{"bad", "state file", "none is loaded"}}},
		{"no file", "  server-state-file ", "  # server-state-file ", [][3]string{{"bad", "state file", "none is loaded"}}},
		{"relative file", "  server-state-file ", "  server-state-file x # ", [][3]string{{"unknown", "state file", "depends"}}},
		{"relative file with a base", "  server-state-file " + s.file("state"), "  server-state-base " + filepath.Dir(s.ha.Socket) + "\n  server-state-file state", nil},
		{"local file", "backend few\n", "backend few\n  load-server-state-from-file local\n  server-state-file-name " + s.file("state") + "\n", nil},
		{"a file of its own name", "  load-server-state-from-file global\n", "  load-server-state-from-file local\n", [][3]string{{"unknown", "state file", "few"}}},
		{"no init-addr", "slot.invalid:1 check disabled init-addr last,127.0.0.1", "slot.invalid:1 check disabled", [][3]string{{"bad", "init-addr", "none"}}},
		{"init-addr of default-server", "slot.invalid:1 check disabled init-addr last,127.0.0.1", "slot.invalid:1\n  default-server init-addr last,127.0.0.1", [][3]string{{"bad", "init-addr", "none"}}},
		{"connections of one client", "backend few\n", "backend few\n  http-reuse never\n", [][3]string{{"warn", "reuse", "http-reuse never"}}},
		{"and of all", "defaults\n", "defaults\n  http-reuse never\n", [][3]string{{"warn", "reuse", "http-reuse never"}}},
		{"conditions", "global\n", ".if defined(X)\n.endif\nglobal\n", [][3]string{{"unknown", "configuration", "not understood"}}},
		{"another file", string(config), "global\n", [][3]string{{"unknown", "configuration", "does not have"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			changed := strings.ReplaceAll(string(config), tt.old, tt.new)
			if changed == string(config) {
				t.Fatal("nothing to replace")
			}
			expect(t, look(t, "few", changed), tt.want...)
		})
	}
	expect(t, look(t, "kept", strings.Replace(string(config), "\nbackend kept\n", "\nbackend kept\n  http-reuse never\n", 1)),
		[3]string{"bad", "reuse", "http-reuse never"}, [3]string{"warn", "balance", "static-rr"})
	fill(3)
	expect(t, look(t, "few", string(config)), [3]string{"warn", "slots", "3 for 3"})
	fill(4)
	expect(t, look(t, "few", string(config)), [3]string{"bad", "slots", "3 for 4"})
}

func TestAtLeast(t *testing.T) {
	for _, tt := range []struct {
		version string
		want    bool
	}{
		{"2.6.12-1+deb12u3", true}, {"2.6-dev1", true}, {"2.5.14", false}, {"1.8.4", false}, {"2.10.0", true}, {"3.0.1", true},
	} {
		if got, err := atLeast(tt.version, 2, 6); got != tt.want || err != nil {
			t.Errorf("%s: %v, %v", tt.version, got, err)
		}
	}
	if _, err := atLeast("unknown", 2, 6); err == nil {
		t.Error("a version that is none")
	}
}
