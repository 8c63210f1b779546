package registrar

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"rollcall/registrar/redistest"
)

// TestRightsCoverScripts holds the list of commands to what the scripts call.
func TestRightsCoverScripts(t *testing.T) {
	s, err := NewStore(nil, "x")
	if err != nil {
		t.Fatal(err)
	}
	tried := map[string]string{}
	for _, r := range s.rights("web") {
		tried[fmt.Sprint(r.args[0])] += " " + cmp.Or(r.roles, "all")
	}
	roles := map[string][]string{
		"beat": {RoleSidecar}, "still": {RoleSidecar}, "roll": {RoleSidecar}, "leave": {RoleSidecar}, "announce": {RoleSidecar, RoleReaper, RoleAdmin}, "deregister": {RoleAdmin}, "admin": {RoleAdmin},
		"reap": {RoleReaper}, "overrides": {RoleReaper}, "adopt": {RoleReaper}, "latest": {RoleReaper}, "pulse": {RoleReaper}, "survey": {RoleReaper}, "config": {RoleReaper}, "report": {RoleReaper}, "ack": {RoleSync}, "retire": {RoleSync}, "seen": {RoleSync}, "follow": {RoleSync}, "followers": nil,
		"others": {RoleSidecar}, "elsewhere": {RoleReaper, RoleSync}, "lease": {RoleAgent}, "ledger": {RoleAgent}, "read": nil, "versions": nil, "applied": nil, "entry": nil, "history": nil, "unlist": {RoleReaper}, "counter": nil, "times": nil, "lib": {RoleSidecar, RoleReaper, RoleAdmin}, "event": {RoleSidecar, RoleReaper, RoleAdmin},
	}
	err = fs.WalkDir(sources, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		src, err := sources.ReadFile(path)
		if err != nil {
			return err
		}
		name := strings.TrimSuffix(strings.TrimPrefix(path, "lua/"), ".lua")
		needs, known := roles[name]
		if !known {
			t.Errorf("%s: which role runs it?", path)
		}
		for _, m := range regexp.MustCompile(`redis\.p?call\('(\w+)'`).FindAllStringSubmatch(string(src), -1) {
			of, ok := tried[strings.ToLower(m[1])]
			if !ok {
				t.Errorf("%s calls %s, which Rights does not try", path, m[1])
			}
			for _, role := range needs {
				if !slices.Contains(strings.Fields(of), "all") && !slices.Contains(strings.Fields(of), role) {
					t.Errorf("%s calls %s, which Rights does not try for %s", path, m[1], role)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestRights tries what would change everything, and nothing is changed.
func TestRights(t *testing.T) {
	redis := redistest.Start(t)
	rdb := redis.Client(t)
	store, err := NewStore(rdb, DefaultNamespace)
	if err != nil {
		t.Fatal(err)
	}
	sub := rdb.Subscribe(t.Context(), store.Keys().Changes())
	defer sub.Close()
	if _, err := sub.Receive(t.Context()); err != nil {
		t.Fatal(err)
	}
	missing, err := store.Rights(t.Context(), "web")
	if err != nil || len(missing) != 0 {
		t.Errorf("%v, %v", missing, err)
	}
	if n := rdb.DBSize(t.Context()).Val(); n != 0 {
		t.Errorf("%d keys", n)
	}
	// Its own message is the first that a subscriber gets.
	if err := rdb.Publish(t.Context(), store.Keys().Changes(), "end").Err(); err != nil {
		t.Fatal(err)
	}
	if m, err := sub.ReceiveMessage(t.Context()); err != nil || m.Payload != "end" {
		t.Errorf("%v, %v", m, err)
	}
	redis.Kill(t)
	if _, err := store.Rights(t.Context(), "web"); err == nil || errors.Is(err, ErrNoTrial) {
		t.Errorf("without a redis: %v", err)
	}
}

func TestKind(t *testing.T) {
	k, err := NewKeys("x")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		key string
		svc Service
		typ string
	}{
		{k.Services(), "", "set"}, {k.Version(), "", "string"}, {k.Epoch(), "", "string"}, {k.Config(), "", "hash"},
		{k.Balancers(), "", "zset"}, {k.Owners(), "", "hash"}, {k.Follows(), "", "hash"}, {k.Reaper("a"), "", "string"}, {"x:reapers", "", "hash"}, {k.LetGo(), "", "string"}, {k.Events(), "", "stream"}, {"x:{_canary}:meta", "_canary", "hash"},
		{k.Docker("a"), "", "string"}, {k.DockerAddrs("a"), "", "set"}, {"x:docker", "", ""},
		{"x:{web}:services", "", ""}, {"x:{web}:_canary:meta", "", ""},
		{k.Instances("web"), "web", "zset"}, {k.Meta("web"), "web", "hash"}, {k.Admin("web"), "web", "hash"}, {k.Gone("web"), "web", "hash"},
		{k.GoneAt("web"), "web", "zset"}, {k.Changed("web"), "web", "zset"}, {k.Applied("web"), "web", "hash"}, {k.ServiceVersion("web"), "web", "string"},
		{"x:{web}:fence:a", "", ""}, {k.Seen("web", "lb"), "web", "hash"},
		{"x:{web}:other", "", ""}, {"x:{web}", "", ""}, {"x:web:meta", "", ""}, {"x:other", "", ""}, {"y:services", "", ""}, {"y:{web}:meta", "", ""}, {"{web}:meta", "", ""},
	} {
		if svc, typ := k.kind(tt.key); svc != tt.svc || typ != tt.typ {
			t.Errorf("%s: %q %q, want %q %q", tt.key, svc, typ, tt.svc, tt.typ)
		}
	}
}

func TestClusterKind(t *testing.T) {
	k := Keys{ns: "x", cluster: true}
	of := k.Of("web")
	for _, tt := range []struct {
		key string
		svc Service
		typ string
	}{
		{k.Services(), "", "set"}, {k.Config(), "", "hash"}, {"x:version", "", ""}, {"x:epoch", "", ""}, {"x:balancers", "", ""}, {"x:reapers", "", ""}, {"x:reaper:a", "", ""},
		{k.Docker("a"), "", "string"}, {k.DockerAddrs("a"), "", "set"},
		{of.Services(), "web", "set"}, {of.Version(), "web", "string"}, {of.Epoch(), "web", "string"}, {of.Config(), "web", "hash"}, {of.Balancers(), "web", "zset"}, {of.Owners(), "web", "hash"}, {"x:balancer-owners", "", ""},
		{of.Reaper("a"), "web", "string"}, {of.Reapers(), "web", "hash"}, {of.LetGo(), "web", "string"},
		{of.Instances("web"), "web", "zset"}, {of.Meta("web"), "web", "hash"}, {of.Applied("web"), "web", "hash"}, {of.GoneAt("web"), "web", "zset"},
		{of.Instances(canary), "web", "zset"}, {of.Meta(canary), "web", "hash"}, {of.ServiceVersion(canary), "web", "string"},
		{"x:{web}:other", "", ""}, {"x:{web}", "", ""}, {"x:web:meta", "", ""}, {"y:{web}:meta", "", ""}, {"x:{web}:_canary:other", "", ""},
	} {
		if svc, typ := k.kind(tt.key); svc != tt.svc || typ != tt.typ {
			t.Errorf("%s: %q %q, want %q %q", tt.key, svc, typ, tt.svc, tt.typ)
		}
	}
}

// TestClusterExamine looks at a Cluster of which a part is broken: what is of
// the other nodes is found nevertheless.
func TestClusterExamine(t *testing.T) {
	t.Parallel()
	c := redistest.StartCluster(t, 3)
	s, ctx := newClusterStore(t, c), t.Context()
	names := onEach(t, c)
	for _, of := range names {
		_, err := s.Beat(ctx, of[0], Beat{Addr: host(1), Token: "t", Meta: metaOf("t")})
		must(t, err)
		_, err = s.Of(of[0]).Pulse(ctx, "r", "p", time.Minute)
		must(t, err)
		must(t, s.Of(of[0]).Canary(ctx))
		missing, err := s.Rights(ctx, of[0])
		if err != nil || len(missing) > 0 {
			t.Errorf("rights for %s: %v, %v", of[0], missing, err)
		}
	}
	inv, err := s.Inventory(ctx)
	if err != nil || !inv.Complete || len(inv.Services) != 3 || len(inv.Unowned)+len(inv.Mistyped)+len(inv.Orphans)+len(inv.Empty) > 0 {
		t.Errorf("%+v, %v", inv, err)
	}
	list := c.Shard(t, s.keys.Services())
	down, broken := (list+1)%3, (list+2)%3
	rdb := c[broken].Client(t)
	for _, err := range []error{
		c[list].Client(t).Set(ctx, s.keys.Meta(names[list][1]), "x", 0).Err(),
		rdb.ClusterDelSlotsRange(ctx, broken*16384/3+10, broken*16384/3+11).Err(), // of nobody's names
		rdb.ConfigSet(ctx, "cluster-require-full-coverage", "yes").Err(),
		rdb.Do(ctx, "CLUSTER", "SETSLOT", broken*16384/3+12, "MIGRATING", c[list].Client(t).ClusterMyID(ctx).Val()).Err(),
		c[list].Client(t).SAdd(ctx, s.keys.Services(), "~").Err(),
	} {
		must(t, err)
	}
	c[down].Kill(t)
	eventually(t, func() error { // until the others know
		tctx, cancel := WithTimeout(ctx)
		defer cancel()
		nodes, err := s.Nodes(tctx)
		if err != nil {
			return err
		}
		for _, n := range nodes {
			ok := false
			switch n.Addr {
			case c[down].Addr:
				ok = n.Err != nil
			case c[broken].Addr:
				ok = n.Err == nil && n.Role == "master" && n.Coverage == "yes" && n.State == "fail" && n.Failed > 5000 && n.Unowned == 2 && len(n.Moving) == 1
			default:
				ok = n.Err == nil && n.Version != "" && n.Coverage == "no" && n.State == "ok" && n.Failed > 5000 && len(n.Moving) == 0 && n.Replicas == 0
			}
			if !ok {
				return fmt.Errorf("%+v", n)
			}
		}
		if len(nodes) != 3 {
			return fmt.Errorf("%d nodes", len(nodes))
		}
		return nil
	})
	inv, err = s.Inventory(ctx)
	if err == nil || inv.Complete || len(inv.Services) != 3 || len(inv.Mistyped) != 1 || !slices.Equal(inv.BadNames, []string{"~"}) ||
		!slices.Equal(inv.Reapers[names[list][0]], []string{"r"}) || inv.Reapers[names[down][0]] != nil {
		t.Errorf("%+v, %v", inv, err)
	}
}

// TestInventoryOfMany shows that a look through a large namespace is whole.
func TestInventoryOfMany(t *testing.T) {
	rdb := redistest.Start(t).Client(t)
	store, err := NewStore(rdb, DefaultNamespace)
	if err != nil {
		t.Fatal(err)
	}
	const n = 20000
	if err := rdb.Eval(t.Context(), `for i = 1, ARGV[1] do redis.call('SET', 'other:' .. i, 1); redis.call('SET', KEYS[1] .. i, 1) end return 1`,
		[]string{"rollcall:stray"}, n).Err(); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	inv, err := store.Inventory(t.Context())
	if err != nil || !inv.Complete || inv.Keys != n || len(inv.Unowned) != n {
		t.Errorf("%d keys, %d unowned, complete %v, %v", inv.Keys, len(inv.Unowned), inv.Complete, err)
	}
	t.Logf("%d of %d keys in %v", inv.Keys, 2*n, time.Since(start).Round(time.Millisecond))
}
