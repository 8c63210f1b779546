package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// TestCluster plays the life of services on a Redis Cluster with the real
// binary: join, drain, leave, crash, and the death of a shard.
func TestCluster(t *testing.T) {
	t.Parallel()
	nodes := redistest.StartCluster(t, 3)
	at := "--redis=" + nodes.URL()
	s := &system{redis: nodes[0], ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 4}}})}
	// One service off the shard that will die, one on it, and the list on neither.
	list := nodes.Shard(t, "rollcall:services")
	down := (list + 1) % 3
	name := func(shard int) string {
		for n := 0; ; n++ {
			if svc := fmt.Sprintf("s%d", n); nodes.Shard(t, "{"+svc+"}") == shard {
				return svc
			}
		}
	}
	web, other := name((list+2)%3), name(down)
	reap := s.monitor(t, "reap", at, "--ttl", "3s")
	s.spawn(t, "reap", at, "--ttl", "3s")
	s.spawn(t, "lbsync", at, "--socket", s.ha.Socket, "--backend", web+"=be", "--allow", "127.0.0.0/8")
	watch := s.spawn(t, "watch", at)
	register := func(svc string) (*process, string) {
		i := haproxytest.NewInstance(t)
		return s.spawn(t, "register", at, "--service", svc, "--addr", i.Addr().String()), i.Addr().String()
	}
	leaves, leaving := register(web)
	crashes, crashing := register(web)
	_, stays := register(web)
	_, elsewhere := register(other)
	says := func(addr, what string) {
		t.Helper()
		haproxytest.Poll(t, addr+" is "+what, func() error {
			if !strings.Contains(watch.out.String(), addr+" "+what) {
				return errors.New(watch.out.String())
			}
			return nil
		})
	}
	for _, addr := range []string{leaving, crashing, stays, elsewhere} {
		says(addr, "here")
	}
	if out, stderr, code := s.rollcall(t, "wait", at, web, "--for", "ready=3"); code != 0 || !strings.Contains(out, "applied by 1 balancers") {
		t.Errorf("wait: exit %d, %s%s", code, out, stderr)
	}
	if out, stderr, code := s.rollcall(t, "drain", at, "--wait", web, stays); code != 0 {
		t.Errorf("drain: exit %d, %s%s", code, out, stderr)
	}
	haproxytest.Poll(t, "explain knows it", func() error {
		if out, stderr, code := s.rollcall(t, "explain", at, web, stays); code != 0 || !strings.Contains(out, "drain, weight 100") || !strings.Contains(out, "drained") {
			return fmt.Errorf("exit %d, %s%s", code, out, stderr)
		}
		return nil
	})
	if out, stderr, code := s.rollcall(t, "events", at); code != 0 || !strings.Contains(out, elsewhere) || !strings.Contains(out, "drained") {
		t.Errorf("events: exit %d, %s%s", code, out, stderr)
	}
	if state := s.ha.Command(t, "show servers state be"); !strings.Contains(state, "127.0.0") {
		t.Errorf("HAProxy has no instance:\n%s", state)
	}
	if code := leaves.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("the sidecar ends with %d", code)
	}
	says(leaving, "left")
	begun := time.Now()
	crashes.signal(t, syscall.SIGKILL)
	says(crashing, "expired")
	t.Logf("crash: out after %v, TTL 3 s and up to 4 s more to arm", time.Since(begun).Round(time.Millisecond))

	if out, stderr, code := s.rollcall(t, "services", at, "-o", "json"); code != 0 || !strings.Contains(out, web) || !strings.Contains(out, other) {
		t.Errorf("services: exit %d, %s%s", code, out, stderr)
	}
	nodes[down].Kill(t)
	haproxytest.Poll(t, "services says what it knows, and that it is not all", func() error {
		out, stderr, code := s.rollcall(t, "services", at)
		if code != 1 || !strings.Contains(out, web) || strings.Contains(out, other) || !strings.Contains(stderr, other) {
			return fmt.Errorf("exit %d, %s%s", code, out, stderr)
		}
		return nil
	})
	if out, stderr, code := s.rollcall(t, "events", at); code != 1 || !strings.Contains(out, stays) || strings.Contains(out, elsewhere) || stderr == "" {
		t.Errorf("events without a shard: exit %d, %s%s", code, out, stderr)
	}
	// The others' services are looked after, and that one of nothing is known.
	reap.ready(t, "not armed: pulse failed, for "+other)
	reap.shows(t, `rollcall_reaper_disarmed{cause="pulse failed"}`, 1, 1)
	reap.shows(t, "rollcall_reaper_armed", 0, 0)
	reap.shows(t, "rollcall_reaper_removed_total", 0, 1) // or the other one did
	reap.shows(t, "rollcall_reaper_services", 2, 2)      // as last seen
	haproxytest.Poll(t, "status says what it knows, and what not", func() error {
		out, stderr, code := s.rollcall(t, "status", at, "-o", "json")
		var doc statusDoc
		if err := json.Unmarshal([]byte(out), &doc); err != nil || code != exitFailed || doc.Registry.Services != 1 || doc.Registry.Instances != 1 ||
			len(doc.Reapers) != 2 || !doc.Reapers[0].Live || !doc.Reapers[1].Armed || doc.Reapers[0].ArmedFor != 1 || len(doc.Balancers) != 1 || !doc.Balancers[0].Live ||
			!strings.Contains(stderr, "nothing is known of "+other) || strings.Contains(stderr, "no reaper is armed") {
			return fmt.Errorf("exit %d, %v, %s%s", code, err, out, stderr)
		}
		return nil
	})
	found, _ := s.doctor(t, at)
	sick := ill(found)
	for _, want := range []string{
		"redis " + nodes[down].Addr + ": bad: ", "cluster slots: bad: 0 without an owner, ", "cluster replicas: warn: ",
		"registry: unknown: not all of it: ", "balancers of " + other + ": unknown: ",
	} {
		if !strings.Contains(sick, want) {
			t.Errorf("doctor says no %q:\n%s", want, sick)
		}
	}
	if strings.Contains(sick, "reapers: bad") || strings.Contains(sick, "balancers of "+web) {
		t.Errorf("doctor finds fault with the others:\n%s", sick)
	}
	_, late := register(web)
	says(late, "here")
	if out, stderr, code := s.rollcall(t, "instances", at, web); code != 0 || !strings.Contains(out, stays) || !strings.Contains(out, late) || strings.Contains(out, crashing) {
		t.Errorf("instances: exit %d, %s%s", code, out, stderr)
	}
	if strings.Contains(watch.out.String(), elsewhere+" absent") || strings.Contains(watch.out.String(), elsewhere+" expired") {
		t.Errorf("%s went with its shard:\n%s", elsewhere, watch.out)
	}
}

// secured is a Redis Cluster that takes client certificates only, with a user
// for each role, and the flags to reach it.
type secured struct {
	system
	nodes redistest.Cluster
	certs redistest.Certificates
	args  []string // of each node
}

func startSecured(t *testing.T) *secured {
	t.Helper()
	c := &secured{certs: redistest.NewCertificates(t)}
	c.args = append(c.certs.Args(), "--appendonly", "yes", "--aclfile", roles(t, "acl/cluster", 8))
	c.nodes = redistest.StartCluster(t, 3, c.args...)
	c.redis = c.nodes[0]
	c.ha = haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 10}}})
	c.env = []string{
		"ROLLCALL_REDIS_PASSWORD=" + rolePassword, "ROLLCALL_CANARY_REDIS_PASSWORD=" + rolePassword,
		"ROLLCALL_REDIS_CA=" + c.certs.CA, "ROLLCALL_REDIS_CERT=" + c.certs.Cert, "ROLLCALL_REDIS_KEY=" + c.certs.Key,
	}
	return c
}

// url is the Cluster's for the user of a role.
func (c *secured) url(role string) string {
	return strings.Replace(c.nodes.URL(), "redis+cluster://", "rediss+cluster://"+role+"@", 1)
}

// as is a command in a role.
func (c *secured) as(role string, args ...string) []string {
	return append([]string{args[0], "--redis", c.url(role)}, args[1:]...)
}

// TestClusterMoves has a service's slot move, stick half way for longer than a
// TTL, and arrive; then its primary handed over, and the next one killed. All of
// it over TLS and with the rights of the roles' files, while requests flow.
func TestClusterMoves(t *testing.T) {
	t.Parallel()
	const ttl = 3 * time.Second
	c := startSecured(t)
	reap := c.monitor(t, c.as("reaper", "reap", "--ttl", ttl.String(), "--canary-redis", c.url("canary"))...)
	second := c.spawn(t, c.as("reaper", "reap", "--ttl", ttl.String())...)
	lb := c.spawn(t, c.as("lbsync", "lbsync", "--socket", c.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8")...)
	watch := c.spawn(t, c.as("watcher", "watch")...)
	var is []*haproxytest.Instance
	var sidecars []*process
	for range 3 {
		i := haproxytest.NewInstance(t)
		is = append(is, i)
		sidecars = append(sidecars, c.spawn(t, c.as("sidecar-web", "register", "--service", "web", "--addr", i.Addr().String())...))
	}
	url := "http://" + c.ha.Addr("be") + "/"
	answered(t, url, is...)
	load := startLoad(t, url)
	shard := c.nodes.Shard(t, "{web}")
	from, to := c.nodes[shard], c.nodes[(shard+1)%3]
	replica := c.nodes.StartReplica(t, to, c.args...)

	reap.ready(t, "ok")
	reap.shows(t, "rollcall_reaper_services", 1, 1)
	reap.shows(t, "rollcall_reaper_instances", 3, 3)
	haproxytest.Poll(t, "status is content", func() error {
		out, stderr, code := c.rollcall(t, c.as("watcher", "status")...)
		if code != 0 || strings.Count(out, "1 of 1") != 2 || !strings.Contains(out, "BALANCER") {
			return fmt.Errorf("exit %d, %s%s", code, out, stderr)
		}
		return nil
	})
	doctor := func() []finding {
		t.Helper()
		found, _ := c.doctor(t, "--redis", c.url("default"), "--socket", c.ha.Socket, "--backend", "web=be")
		return found
	}
	expect(t, doctor(),
		[3]string{"warn", "cluster replicas", "no replica follows: "}, [3]string{"warn", to.Addr + " replicas", "1, min-replicas-to-write 0"},
		[3]string{"warn", "be check", ""}, [3]string{"unknown", "be configuration", ""}, [3]string{"warn", "default user", "needs no password"})

	// A word that is applied shows that changes are seen.
	applied := func(what string) {
		t.Helper()
		haproxytest.Poll(t, what+": a change is applied", func() error {
			for _, word := range []string{"drain", "ready"} {
				if out, stderr, code := c.rollcall(t, c.as("operator", word, "web", is[0].Addr().String(), "--wait", "--timeout", "5s")...); code != 0 {
					return fmt.Errorf("exit %d, %s%s", code, out, stderr)
				}
			}
			return nil
		})
	}
	applied("before")
	c.nodes.Move(t, "{web}", from, to, func() {
		begun := time.Now()
		reap.ready(t, "not armed: pulse failed, for web")
		if sick := ill(doctor()); !strings.Contains(sick, "cluster moving slots: warn: ") || !strings.Contains(sick, "registry members: unknown: ") {
			t.Errorf("half way doctor says\n%s", sick)
		}
		haproxytest.Poll(t, "it sticks for more than a TTL", func() error {
			if took := time.Since(begun); took < ttl+500*time.Millisecond {
				return fmt.Errorf("%v", took)
			}
			return nil
		})
		if _, stderr, code := c.rollcall(t, c.as("operator", "drain", "web", is[0].Addr().String())...); code != exitFailed || !strings.Contains(stderr, "TRYAGAIN") && !strings.Contains(stderr, "ASK") {
			t.Errorf("half way: exit %d, %s", code, stderr)
		}
	})
	applied("moved")
	if err := replica.Client(t).ClusterFailover(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	applied("handed over")
	replica.Kill(t)
	begun := time.Now()
	applied("killed")
	t.Logf("primary killed: a change is applied after %v", time.Since(begun).Round(time.Millisecond))
	answered(t, url, is...)
	if n := load.failed.Load(); n > 0 {
		t.Errorf("%d of %d requests failed, the last with %s", n, load.sent.Load(), load.last)
	}
	load.stop()
	for _, p := range []*process{reap.process, second} {
		if out := p.out.String(); strings.Contains(out, "took out") {
			t.Errorf("a living instance was taken out:\n%s", out)
		}
	}
	if out := watch.out.String(); strings.Contains(out, "expired") || strings.Contains(out, "absent") {
		t.Errorf("a living instance was missed:\n%s", out)
	}
	// All that was no removal of the living leaves the dead to be removed.
	reap.ready(t, "ok")
	sidecars[0].signal(t, syscall.SIGKILL)
	answered(t, url, is[1:]...)
	lb.signal(t, syscall.SIGTERM)
	if code := sidecars[1].signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("the sidecar: exit %d", code)
	}
	for _, n := range append(redistest.Cluster{}, c.nodes...) {
		refused, err := n.Client(t).ACLLog(t.Context(), 10).Result()
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range refused {
			t.Errorf("%s was refused on %s: %s %s (%s)", r.Username, n.Addr, r.Reason, r.Object, r.Context)
		}
	}
	c.bounds(t, from)
}

// bounds tries on a node what each role must be able to do, and what it must
// not. It does not matter whose the slots are: rights come first.
func (c *secured) bounds(t *testing.T, node *redistest.Server) {
	const sidecar, agent, canary, reap, sync, operate, watch = "sidecar-web", "docker", "canary", "reaper", "lbsync", "operator", "watcher"
	clients := map[string]redis.UniversalClient{}
	for _, role := range []string{sidecar, agent, canary, reap, sync, operate, watch} {
		rdb, err := registrar.Access{
			Password: func() (string, error) { return rolePassword, nil }, CA: c.certs.CA, Cert: c.certs.Cert, Key: c.certs.Key,
		}.OpenNode("rediss+cluster://"+role+"@"+node.Addr, node.Addr, 1)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = rdb.Close() })
		clients[role] = rdb
		if err := rdb.Do(t.Context(), "cluster", "slots").Err(); refused(err) != (role == canary) { // it is told where to go
			t.Errorf("%s: cluster slots: %v", role, err)
		}
	}
	no := []string(nil)
	checks := bounds(t, clients, []bound{
		{"flushall", no}, {"config get maxmemory", no}, {"config set maxmemory 1", no}, {"keys *", no}, {"scan 0", no}, {"client list", no},
		{"acl setuser x on", no}, {"acl list", no}, {"script flush", no}, {"save", no}, {"dbsize", no}, {"readwrite", no},
		{"cluster nodes", no}, {"cluster setslot 1 stable", no}, {"cluster addslots 1", no}, {"cluster failover", no}, {"cluster reset", no},
		{"cluster forget x", no}, {"cluster meet 127.0.0.1 6379", no}, {"migrate 127.0.0.1 6379 rollcall:{web}:meta 0 1", no}, {"asking", no},
		{"ping", []string{sidecar, agent, canary, reap, sync, operate, watch}},
		{"del rollcall:{web}:instances", no}, {"rename rollcall:{web}:meta rollcall:{web}:admin", no}, {"expire rollcall:{web}:instances 1", no},
		{"set other 1", no}, {"get other", no}, {"set rollcall:version 1", no}, {"incr rollcall:version", no}, {"setnx rollcall:epoch x", no},
		{"zadd rollcall:{web}:instances 1 a", []string{sidecar, agent, reap}}, {"zadd rollcall:{api}:instances 1 a", []string{agent, reap}},
		{"zrem rollcall:{web}:instances a", []string{sidecar, agent, reap, operate}}, {"zrem rollcall:{api}:instances a", []string{agent, reap, operate}},
		{"hset rollcall:{web}:meta a b", []string{sidecar, agent}}, {"hset rollcall:{api}:meta a b", []string{agent}},
		{"hdel rollcall:{web}:meta a", []string{sidecar, agent, reap, operate}}, {"hdel rollcall:{api}:meta a", []string{agent, reap, operate}},
		{"zadd rollcall:{web}:_canary:instances 1 a", []string{canary, reap}}, {"hset rollcall:{web}:_canary:meta a b", []string{canary, reap}},
		{"incr rollcall:{web}:_canary:version", []string{canary, reap}}, {"hset rollcall:{web}:_canary:admin a b", no},
		{"hset rollcall:{web}:admin a b", []string{operate, reap}}, {"hdel rollcall:{api}:admin a", []string{operate, reap}}, {"zadd rollcall:{web}:override-due 1 a", []string{operate, reap}},
		{"hset rollcall:{web}:gone a b", []string{sidecar, agent, reap, operate}}, {"hset rollcall:{api}:gone a b", []string{agent, reap, operate}},
		{"zadd rollcall:{web}:changed 1 a", []string{sidecar, agent, reap, operate}}, {"zadd rollcall:{api}:gone-at 1 a", []string{agent, reap, operate}},
		{"incr rollcall:{web}:version", []string{sidecar, agent, reap, operate}}, {"incr rollcall:{api}:version", []string{agent, reap, operate}},
		{"set rollcall:{web}:version 1", no}, {"decr rollcall:{web}:version", no},
		{"setnx rollcall:{web}:epoch x", []string{sidecar, agent, canary, reap, operate}}, {"setnx rollcall:{api}:epoch x", []string{agent, canary, reap, operate}}, {"set rollcall:{web}:epoch x", no},
		{"sadd rollcall:services web", []string{sidecar, agent}}, {"srem rollcall:services web", []string{reap}},
		{"sadd rollcall:{web}:services web", []string{sidecar, agent}}, {"srem rollcall:{web}:services web", []string{reap}}, {"sadd rollcall:{api}:services api", []string{agent}},
		{"hset rollcall:config a 1", []string{reap}}, {"hset rollcall:{web}:config a 1", []string{reap}},
		{"hsetnx rollcall:config a 1", []string{reap}}, {"hsetnx rollcall:{web}:config a 1", []string{sidecar, agent, reap}}, {"hsetnx rollcall:{api}:config a 1", []string{agent, reap}},
		{"set rollcall:{web}:reaper:x y", []string{reap}}, {"set rollcall:{web}:let-go y", []string{reap}},
		{"hset rollcall:{web}:reapers f y", []string{reap}}, {"hgetall rollcall:{api}:reapers", []string{agent, reap, sync, operate, watch}},
		{"hset rollcall:{web}:applied a 1", []string{sync}}, {"zadd rollcall:{web}:balancers 1 a", []string{sync}}, {"zrem rollcall:{web}:balancers a", []string{sync}},
		{"hset rollcall:{web}:balancer-owners a 1", []string{sync}}, {"hdel rollcall:{web}:balancer-owners a", []string{sync}}, {"hmget rollcall:{web}:balancer-owners a", []string{sidecar, agent, reap, sync, operate, watch}}, {"zadd rollcall:balancers 1 a", no},
		{"publish rollcall:changes x", []string{sidecar, agent, canary, reap, operate}}, {"publish other x", no},
		{"smembers rollcall:services", []string{reap, operate, watch}}, {"hgetall rollcall:config", []string{sidecar, agent, operate, watch}},
		{"hgetall rollcall:{web}:meta", []string{sidecar, agent, sync, operate, watch}}, {"hgetall rollcall:{api}:meta", []string{agent, sync, operate, watch}},
		{"hget rollcall:{web}:meta a", []string{sidecar, agent, reap, operate, watch}}, {"get rollcall:{api}:version", []string{agent, reap, sync, operate, watch}},
	})
	checks += listeners(t, clients, sync, operate, watch)
	t.Logf("%d checks of rights", checks)
	if checks < 200 {
		t.Errorf("only %d", checks)
	}
}
