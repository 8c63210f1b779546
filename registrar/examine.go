package registrar

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// This file gathers facts for `rollcall doctor`. It judges nothing and writes
// nothing.

// Unknown is the value of a number that Redis did not tell.
const Unknown = -1

// Server is what a Redis says of itself. Numbers are Unknown, and strings empty,
// where it does not say.
type Server struct {
	Unseen      error // why INFO could not be read; nil = it could. Only Version and Role are told all the same
	Version     string
	Role        string // master or slave
	Policy      string // maxmemory-policy
	Persistent  string // yes, no, or empty: unknown
	WriteFault  string // why it refuses writes for its disk's sake; empty if it does not
	Memory      int64  // bytes in use
	MaxMemory   int64  // bytes; 0 = no limit
	Clients     int64
	MaxClients  int64
	Replicas    int64 // connected
	MinReplicas int64 // min-replicas-to-write
	Good        int64 // replicas that count for it
	PubSubLimit int64 // hard limit of a subscriber's output buffer, bytes; 0 = none
	// Redis' clock less this host's is within these two: the bounds are one
	// round trip apart.
	ClockMin, ClockMax time.Duration
}

// Node is a primary of a Cluster. With Err nothing of it is known but Addr.
type Node struct {
	Addr string
	Err  error
	Server
	State    string   // cluster_state, as it sees it
	Unowned  int64    // slots without an owner, as it sees them
	Failed   int64    // slots whose node is down, as it sees them
	Coverage string   // cluster-require-full-coverage: yes, no, or empty: unknown
	Moving   []string // slots that it is giving or taking
}

// Nodes examines every primary of a Cluster, all at the same time.
func (s *Store) Nodes(ctx context.Context) ([]Node, error) {
	primaries, err := s.primaries(ctx)
	if err != nil {
		return nil, err
	}
	nodes := make([]Node, len(primaries))
	var asking sync.WaitGroup
	for i, p := range primaries {
		asking.Go(func() { nodes[i] = s.On(p).examineNode(ctx, addrOf(p)) })
	}
	asking.Wait()
	return nodes, nil
}

// clusterSlots is how many slots a Cluster has.
const clusterSlots = 16384

func (s *Store) examineNode(ctx context.Context, addr string) Node {
	n := Node{Addr: addr}
	if n.Server, n.Err = s.Examine(ctx); n.Err != nil {
		return n
	}
	text, err := s.rdb.ClusterInfo(ctx).Result()
	if err != nil {
		n.Err = fmt.Errorf("read CLUSTER INFO: %w", err)
		return n
	}
	info := fields(text)
	n.State, n.Failed = info["cluster_state"], field(info, "cluster_slots_fail")
	if n.Unowned = Unknown; field(info, "cluster_slots_assigned") != Unknown {
		n.Unowned = clusterSlots - field(info, "cluster_slots_assigned")
	}
	if text, err = s.rdb.ClusterNodes(ctx).Result(); err != nil {
		n.Err = fmt.Errorf("read CLUSTER NODES: %w", err)
		return n
	}
	for line := range strings.Lines(text) {
		// id, address, flags, primary, ping, pong, epoch, link, then the slots
		if f := strings.Fields(line); len(f) > 8 && slices.Contains(strings.Split(f[2], ","), "myself") {
			for _, slot := range f[8:] {
				if strings.HasPrefix(slot, "[") { // [93->-id], [77-<-id]
					n.Moving = append(n.Moving, strings.Trim(slot, "[]"))
				}
			}
		}
	}
	if got, err := s.rdb.ConfigGet(ctx, "cluster-require-full-coverage").Result(); err == nil {
		n.Coverage = got["cluster-require-full-coverage"]
	}
	return n
}

// fields reads what INFO prints.
func fields(text string) map[string]string {
	m := map[string]string{}
	for line := range strings.Lines(text) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), ":"); ok {
			m[k] = v
		}
	}
	return m
}

// Examine asks Redis what it is and how it is set up.
func (s *Store) Examine(ctx context.Context) (Server, error) {
	sent := time.Now()
	now, err := s.rdb.Time(ctx).Result()
	received := time.Now()
	if err != nil {
		return Server{}, fmt.Errorf("read redis' clock: %w", err)
	}
	text, err := s.rdb.Info(ctx).Result()
	if err != nil && !Forbidden(err) {
		return Server{}, fmt.Errorf("read redis' INFO: %w", err)
	}
	info := fields(text)
	unseen := err
	if unseen != nil {
		info = s.greeting(ctx)
	}
	settings := map[string]string{}
	for _, name := range []string{"save", "min-replicas-to-write", "client-output-buffer-limit"} {
		// Many users may not read the configuration: then it is unknown.
		got, err := s.rdb.ConfigGet(ctx, name).Result()
		var refused redis.Error
		switch {
		case err == nil:
			for k, v := range got {
				settings[k] = v
			}
		case !errors.As(err, &refused):
			return Server{}, fmt.Errorf("read redis' setting %s: %w", name, err)
		}
	}
	o := Server{
		Unseen: unseen, Version: info["redis_version"], Role: info["role"], Policy: info["maxmemory_policy"],
		Memory: field(info, "used_memory"), MaxMemory: field(info, "maxmemory"),
		Clients: field(info, "connected_clients"), MaxClients: field(info, "maxclients"),
		Replicas: field(info, "connected_slaves"), MinReplicas: field(settings, "min-replicas-to-write"),
		Good: field(info, "min_slaves_good_slaves"), PubSubLimit: Unknown,
		ClockMin: now.Sub(received.Round(0)), ClockMax: now.Sub(sent.Round(0)),
	}
	save, known := settings["save"]
	switch {
	case info["aof_enabled"] == "1" || save != "":
		o.Persistent = "yes"
	case known && info["aof_enabled"] == "0":
		o.Persistent = "no"
	}
	for _, f := range []string{"rdb_last_bgsave_status", "aof_last_write_status"} {
		if v := info[f]; v != "" && v != "ok" {
			o.WriteFault = f + " is " + v
		}
	}
	f := strings.Fields(settings["client-output-buffer-limit"])
	if i := slices.Index(f, "pubsub"); i >= 0 && i+1 < len(f) {
		if n, err := strconv.ParseInt(f[i+1], 10, 64); err == nil {
			o.PubSubLimit = n
		}
	}
	return o, nil
}

// greeting is what everybody may know, by the names that INFO has for it.
func (s *Store) greeting(ctx context.Context) map[string]string {
	answer, err := s.rdb.Do(ctx, "hello").Result()
	if err != nil {
		return nil
	}
	got := map[string]string{}
	put := func(k, v any) {
		switch k {
		case "version":
			got["redis_version"] = text(v)
		case "role": // replica, where INFO says slave
			got["role"] = text(v)
		}
	}
	switch pairs := answer.(type) {
	case map[any]any:
		for k, v := range pairs {
			put(k, v)
		}
	case []any: // RESP2
		for p := range slices.Chunk(pairs, 2) {
			if len(p) == 2 {
				put(p[0], p[1])
			}
		}
	}
	return got
}

func field(m map[string]string, key string) int64 {
	n, err := strconv.ParseInt(m[key], 10, 64)
	if err != nil {
		return Unknown
	}
	return n
}

// The roles whose rights Rights tries.
const (
	RoleSidecar = "register"
	RoleAgent   = "docker" // all that a sidecar does, of every service, and its lease and ledger
	RoleReaper  = "reap"
	RoleSync    = "lbsync"
	RoleAdmin   = "operator" // drain, maint, ready, weight, deregister
)

// Roles lists them all.
var Roles = []string{RoleSidecar, RoleAgent, RoleReaper, RoleSync, RoleAdmin}

// right is one command, with a key or a channel where it takes one.
type right struct {
	roles string // the roles that need it; empty for all
	args  []any
}

// rights lists every command that the store and its scripts send, once with a
// key of each kind that it is used on.
func (s *Store) rights(svc Service) []right {
	k, whole := s.keys.Of(svc), s.keys
	const changers = RoleSidecar + " " + RoleReaper + " " + RoleAdmin
	const writers = changers + " " + RoleSync
	const readers = RoleSync + " " + RoleAdmin
	z, h, str := k.Instances(svc), k.Meta(svc), k.ServiceVersion(svc)
	var more []right
	if whole == k {
		more = []right{{RoleSync, []any{"pubsub", "numsub", k.Changes()}}}
	} else {
		more = []right{
			{"", []any{"cluster", "slots"}}, {RoleSidecar, []any{"sadd", whole.Services(), "-"}}, {RoleSidecar, []any{"hmget", whole.Config(), "-"}},
			{RoleSidecar, []any{"hsetnx", k.Config(), "-", "-"}}, {RoleReaper, []any{"hsetnx", whole.Config(), "-", "-"}},
			{RoleReaper, []any{"srandmember", whole.Services()}}, {RoleReaper, []any{"srem", whole.Services(), "-"}},
		}
	}
	return append(more, []right{
		{"", []any{"ping"}}, {"", []any{"time"}}, {"", []any{"info"}}, {"", []any{"eval_ro", "return 1", 0}},
		{"", []any{"evalsha_ro", "-", 0}}, {"", []any{"get", str}}, {"", []any{"get", k.Epoch()}}, {readers, []any{"get", k.Version()}},
		{changers, []any{"hget", h, "-"}}, {"", []any{"hmget", k.Config(), "-"}}, {RoleSidecar + " " + readers, []any{"hgetall", h}}, {RoleSidecar + " " + readers, []any{"hgetall", k.Applied(svc)}}, {RoleSidecar + " " + readers, []any{"hmget", k.Owners(), "-"}},
		{RoleSidecar + " " + readers, []any{"zscore", k.Balancers(), "-"}}, {"", []any{"zscore", z, "-"}}, {readers, []any{"zmscore", z, "-"}}, {RoleReaper + " " + readers, []any{"zrange", z, 0, 0}},
		{"", []any{"zrangebyscore", k.Changed(svc), 0, 0}}, {RoleReaper + " " + readers, []any{"srandmember", k.Services()}}, {"", []any{"zcard", z}}, {readers, []any{"hlen", h}}, {readers, []any{"hlen", k.Gone(svc)}}, {readers, []any{"hlen", k.Admin(svc)}}, {readers, []any{"hlen", k.Bound(svc)}},
		{writers, []any{"eval", "return 1", 0}}, {writers, []any{"evalsha", "-", 0}}, {RoleSidecar + " " + RoleReaper, []any{"zadd", z, 0, "-"}},
		{changers, []any{"type", z}}, {changers, []any{"incr", str}}, {changers, []any{"incr", k.Version()}},
		{changers, []any{"setnx", k.Epoch(), "-"}}, {changers, []any{"publish", k.Changes(), "-"}},
		{changers, []any{"pttl", k.Quiet()}}, {changers, []any{"get", k.Quiet()}}, {changers, []any{"set", k.Quiet(), "-"}},
		{RoleSidecar, []any{"hset", h, "-", "-"}}, {changers, []any{"hset", k.Gone(svc), "-", "-"}}, {changers, []any{"hdel", h, "-"}},
		{changers, []any{"zrem", z, "-"}}, {changers, []any{"zadd", k.GoneAt(svc), 0, "-"}}, {changers, []any{"zcard", z}},
		{changers, []any{"xadd", k.Events(), "*", "-", "-"}}, {RoleSidecar, []any{"sadd", k.Services(), "-"}}, {RoleSidecar, []any{"scard", k.Services()}}, {RoleSidecar, []any{"zcount", z, 0, 0}}, {RoleReaper, []any{"srem", k.Services(), "-"}}, {changers, []any{"pubsub", "numsub", k.Changes()}},
		{RoleReaper, []any{"xinfo", "stream", k.Events()}}, {RoleReaper, []any{"xrevrange", k.Events(), "+", "-"}}, {RoleReaper, []any{"del", k.Events()}}, {RoleReaper, []any{"hset", k.Config(), "-", "-"}},
		{RoleAgent, []any{"get", whole.Docker("-")}}, {RoleAgent, []any{"set", whole.Docker("-"), "-"}}, {RoleAgent, []any{"pttl", whole.Docker("-")}}, {RoleAgent, []any{"hget", whole.Config(), "-"}},
		{RoleAgent, []any{"smembers", whole.DockerAddrs("-")}}, {RoleAgent, []any{"sadd", whole.DockerAddrs("-"), "-"}}, {RoleAgent, []any{"srem", whole.DockerAddrs("-"), "-"}},
		{RoleAgent, []any{"scard", whole.DockerAddrs("-")}}, {RoleAgent, []any{"pexpire", whole.DockerAddrs("-"), 0}}, {RoleAgent, []any{"zscore", z, "-"}},
		{RoleAdmin + " " + RoleReaper, []any{"hset", k.Admin(svc), "-", "-"}}, {RoleAdmin + " " + RoleReaper, []any{"hset", k.Bound(svc), "-", "-"}}, {RoleAdmin + " " + RoleReaper, []any{"hdel", k.Admin(svc), "-"}}, {RoleAdmin + " " + RoleReaper, []any{"hdel", k.Bound(svc), "-"}}, {RoleAdmin + " " + RoleReaper, []any{"zadd", k.OverrideDue(), 0, "-"}}, {RoleAdmin + " " + RoleReaper, []any{"zrem", k.OverrideDue(), "-"}}, {RoleAdmin + " " + RoleSync, []any{"zscan", z, 0}}, {RoleAdmin + " " + RoleSync, []any{"hscan", h, 0}},
		{RoleReaper, []any{"zrangebyscore", k.OverrideDue(), 0, 0}}, {RoleReaper, []any{"hkeys", k.Admin(svc)}}, {RoleReaper, []any{"hkeys", k.Bound(svc)}},
		{RoleReaper, []any{"hset", k.Reapers(), "-", "-"}}, {RoleReaper, []any{"hdel", k.Reapers(), "-"}}, {RoleReaper, []any{"hgetall", k.Reapers()}},
		{RoleReaper, []any{"set", k.Reaper("-"), "-"}}, {RoleReaper, []any{"zcount", z, 0, 0}}, {RoleReaper, []any{"hsetnx", k.Config(), "-", "-"}},
		{RoleSync, []any{"subscribe", k.Changes()}}, {RoleSync, []any{"hkeys", k.Applied(svc)}}, {RoleSync, []any{"hset", k.Applied(svc), "-", "-"}}, {RoleSync, []any{"hdel", k.Applied(svc), "-"}},
		{RoleSync, []any{"hset", k.Seen(svc, "-"), "-", "-"}}, {RoleSync, []any{"hdel", k.Seen(svc, "-"), "-"}}, {RoleSync, []any{"hlen", k.Seen(svc, "-")}},
		{RoleSync, []any{"unlink", k.Seen(svc, "-")}}, {RoleSync, []any{"pexpire", k.Seen(svc, "-"), 0}},
		{RoleSync, []any{"zadd", k.Balancers(), 0, "-"}}, {RoleSync, []any{"zremrangebyscore", k.Balancers(), 0, 0}}, {RoleSync, []any{"zrem", k.Balancers(), "-"}},
		{RoleSync, []any{"hgetall", whole.Follows()}}, {RoleSync, []any{"hset", whole.Follows(), "-", "-"}}, {RoleSync, []any{"hdel", whole.Follows(), "-"}},
		{RoleSync, []any{"hkeys", k.Owners()}}, {RoleSync, []any{"hset", k.Owners(), "-", "-"}}, {RoleSync, []any{"hdel", k.Owners(), "-"}},
	}...)
}

// ErrNoTrial says that this user may not even try: MULTI and DISCARD.
var ErrNoTrial = errors.New("the user may not use MULTI and DISCARD")

// Rights tries each command that the roles need, as the store's own user, and
// returns for each role what is refused, in Redis' words. Nothing is executed:
// Redis checks a command's rights when it is queued after MULTI, and DISCARD
// drops the queue. Of a role that lacks nothing there is no entry.
func (s *Store) Rights(ctx context.Context, svc Service) (map[string][]string, error) {
	// Outside of a transaction the trial would be real, and without DISCARD the
	// connection would stay in one: so first these. A DISCARD alone is an error.
	rdb, err := s.Of(svc).node(ctx)
	if err != nil {
		return nil, fmt.Errorf("try rights: %w", err)
	}
	if err := rdb.Do(ctx, "discard").Err(); err != nil && strings.HasPrefix(err.Error(), "NOPERM ") {
		return nil, ErrNoTrial
	}
	if _, err := rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
		p.Do(ctx, "multi")
		p.Do(ctx, "discard")
		return nil
	}); err != nil {
		if strings.HasPrefix(err.Error(), "NOPERM ") {
			return nil, ErrNoTrial
		}
		return nil, fmt.Errorf("try rights: %w", err)
	}
	rs := s.rights(svc)
	cmds, err := rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
		p.Do(ctx, "multi")
		for _, r := range rs {
			p.Do(ctx, r.args...)
		}
		p.Do(ctx, "discard")
		return nil
	})
	if len(cmds) != len(rs)+2 {
		return nil, fmt.Errorf("try rights: %d answers to %d commands: %w", len(cmds), len(rs)+2, err)
	}
	if err := unanswered(cmds, err); err != nil {
		return nil, fmt.Errorf("try rights: %w", err)
	}
	missing := map[string][]string{}
	for i, r := range rs {
		err := cmds[i+1].Err()
		var refused redis.Error
		switch {
		case err == nil:
			continue
		case !errors.As(err, &refused):
			return nil, fmt.Errorf("try rights: %w", err)
		case !Forbidden(err):
			continue // another reason, which comes after the check of rights
		}
		roles := strings.Fields(r.roles)
		switch {
		case len(roles) == 0:
			roles = Roles
		case slices.Contains(roles, RoleSidecar):
			roles = append(roles, RoleAgent)
		}
		what := fmt.Sprint(r.args[0])
		if Unknowable(err) {
			what += " (rename-command in redis.conf)"
		}
		for _, a := range r.args[1:] {
			if name, ok := a.(string); ok && strings.HasPrefix(name, s.keys.ns+":") {
				what += " " + name
			}
		}
		for _, role := range roles {
			missing[role] = append(missing[role], what)
		}
	}
	return missing, nil
}

// Bounds of one look through the key space.
const (
	scanCount = 1000
	scanCalls = 2000
	scanPause = time.Millisecond
)

// Inventory is what the namespace holds.
type Inventory struct {
	Complete bool // else the look ended at its bound; what is listed is true
	Keys     int
	Unowned  []string // keys that nothing of rollcall writes
	Mistyped []Mistyped
	BadNames []string  // members of services that are no names
	Orphans  []Service // have instances and are not in services: no reaper sees them
	Empty    []Service // in services without instances
	Services []Service // in services
	// Reapers are ids of reapers with a pulse that has not expired: of a Cluster
	// by service, else all under "".
	Reapers map[Service][]string
}

// Mistyped is a key of rollcall's that holds something else.
type Mistyped struct{ Key, Type, Want string }

// mistypedServices is how many services one call of Mistyped asks for.
const mistypedServices = 50

// Mistyped returns the keys of svcs that hold something else than they must, sorted.
// It asks as a reader does, who may not ask for a key's type.
func (s *Store) Mistyped(ctx context.Context, svcs []Service) (keys []string, err error) {
	for part := range slices.Chunk(svcs, mistypedServices) {
		tctx, cancel := WithTimeout(ctx)
		found, err := s.mistyped(tctx, part)
		cancel()
		if err != nil {
			return nil, fmt.Errorf("look at the keys of %d services: %w", len(part), err)
		}
		keys = append(keys, found...)
	}
	slices.Sort(keys)
	return keys, nil
}

func (s *Store) mistyped(ctx context.Context, svcs []Service) (keys []string, err error) {
	asked := map[string]redis.Cmder{}
	pipe := s.rdb.Pipeline()
	for _, svc := range svcs {
		k := s.keys.Of(svc)
		for _, key := range []string{k.Instances(svc), k.GoneAt(svc), k.Changed(svc)} {
			asked[key] = pipe.ZCard(ctx, key)
		}
		for _, key := range []string{k.Meta(svc), k.Admin(svc), k.Gone(svc), k.Applied(svc)} {
			asked[key] = pipe.HLen(ctx, key)
		}
		asked[k.ServiceVersion(svc)] = pipe.Get(ctx, k.ServiceVersion(svc))
	}
	if err := unanswered(pipe.Exec(ctx)); err != nil {
		return nil, err
	}
	for key, cmd := range asked {
		switch err := cmd.Err(); {
		case err == nil || errors.Is(err, redis.Nil):
		case broken(err):
			keys = append(keys, key)
		default:
			return nil, fmt.Errorf("%s: %w", key, err)
		}
	}
	return keys, nil
}

// Inventory looks at every key of the namespace, in small steps. With an error what is
// there can be true nevertheless: a node of a Cluster was not looked at, or the user may
// not look through keys. Complete is false then.
func (s *Store) Inventory(ctx context.Context) (Inventory, error) {
	inv := Inventory{Complete: true, Reapers: map[Service][]string{}}
	seen := map[string]bool{}
	withInstances := map[Service]bool{}
	nodes, err := s.primaries(ctx)
	if err != nil {
		return inv, err
	}
	var failed error
	for _, node := range nodes {
		if err := s.On(node).scan(ctx, &inv, seen, withInstances); err != nil {
			inv.Complete, failed = false, err // of many nodes, the others'
		}
	}
	if failed != nil && !s.keys.cluster && !Forbidden(failed) {
		return inv, failed
	}
	inv.Keys = len(seen)
	if inv.Services, inv.BadNames, err = s.Services(ctx); err != nil && !broken(err) {
		return inv, err
	}
	doubtful := slices.Clone(inv.Services)
	for svc := range withInstances {
		if _, err := ParseService(string(svc)); err == nil && !slices.Contains(doubtful, svc) {
			doubtful = append(doubtful, svc)
		}
	}
	for _, svc := range doubtful {
		listed, has, err := s.listed(ctx, svc)
		switch {
		case err != nil && (s.keys.cluster || Forbidden(err)):
			failed = err
		case err != nil && !broken(err):
			return inv, err
		case err == nil && has && !listed:
			inv.Orphans = append(inv.Orphans, svc)
		case err == nil && listed && !has && !s.keys.cluster: // there the name stays for 2 min
			inv.Empty = append(inv.Empty, svc)
		}
	}
	slices.Sort(inv.Unowned)
	slices.Sort(inv.BadNames)
	for _, ids := range inv.Reapers {
		slices.Sort(ids)
	}
	slices.SortFunc(inv.Mistyped, func(a, b Mistyped) int { return cmp.Compare(a.Key, b.Key) })
	for _, l := range []*[]Service{&inv.Orphans, &inv.Empty, &inv.Services} {
		slices.Sort(*l)
	}
	return inv, failed
}

// scan looks at every key of the namespace on one node.
func (s *Store) scan(ctx context.Context, inv *Inventory, seen map[string]bool, withInstances map[Service]bool) error {
	var cursor uint64
	for range scanCalls {
		keys, next, err := s.rdb.Scan(ctx, cursor, s.keys.ns+":*", scanCount).Result()
		if err != nil {
			return fmt.Errorf("scan the keys: %w", err)
		}
		keys = slices.DeleteFunc(keys, func(k string) bool { was := seen[k]; seen[k] = true; return was })
		if err := s.sort(ctx, keys, inv, withInstances); err != nil {
			return err
		}
		if cursor = next; cursor == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("scan the keys: %w", ctx.Err())
		case <-time.After(Shorten(scanPause)):
		}
	}
	inv.Complete = false
	return nil
}

// sort puts keys where they belong in inv.
func (s *Store) sort(ctx context.Context, keys []string, inv *Inventory, withInstances map[Service]bool) error {
	types := make([]*redis.StatusCmd, len(keys))
	if len(keys) == 0 {
		return nil
	}
	if _, err := s.rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
		for i, key := range keys {
			types[i] = p.Type(ctx, key)
		}
		return nil
	}); err != nil {
		return fmt.Errorf("read the keys' types: %w", err)
	}
	for i, key := range keys {
		got := types[i].Val()
		svc, want := s.keys.kind(key)
		switch {
		case got == "none": // it went meanwhile
		case want == "":
			inv.Unowned = append(inv.Unowned, key)
		case got != want:
			inv.Mistyped = append(inv.Mistyped, Mistyped{key, got, want})
		case key == s.keys.Instances(svc):
			withInstances[svc] = true
		case strings.HasPrefix(key, s.keys.Of(svc).Reaper("")):
			inv.Reapers[svc] = append(inv.Reapers[svc], strings.TrimPrefix(key, s.keys.Of(svc).Reaper("")))
		}
	}
	return nil
}

// listed tells whether svc is in services and whether it has instances, as both
// were at one moment: each is asked twice, and only what did not change counts.
func (s *Store) listed(ctx context.Context, svc Service) (listed, has bool, err error) {
	var in [2]*redis.BoolCmd
	var ex [2]*redis.IntCmd
	if _, err := s.rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
		for i := range in {
			in[i], ex[i] = p.SIsMember(ctx, s.keys.Services(), string(svc)), p.Exists(ctx, s.keys.Instances(svc))
		}
		return nil
	}); err != nil {
		return false, false, fmt.Errorf("look at %s: %w", svc, err)
	}
	if in[0].Val() != in[1].Val() || ex[0].Val() != ex[1].Val() {
		return true, true, nil // it is being used
	}
	return in[0].Val(), ex[0].Val() == 1, nil
}

// Registry is what the registry says of itself.
type Registry struct {
	Epoch         string // empty: none
	TTL, Interval time.Duration
	Configured    bool   // else both are the defaults
	Fault         string // why the config key cannot be believed
	// MaxInstances of a service and MaxServices are what newcomers must stay
	// below. A value that is no number is the default, as beat.lua has it.
	MaxInstances, MaxServices int64
}

// Registry reads the epoch and the config. The whole of a Cluster has no epoch.
func (s *Store) Registry(ctx context.Context) (Registry, error) {
	r := Registry{TTL: DefaultTTL, Interval: DefaultInterval, MaxInstances: DefaultMaxInstances, MaxServices: DefaultMaxServices}
	if !s.keys.cluster || s.keys.scope != "" {
		epoch, err := s.rdb.Get(ctx, s.keys.Epoch()).Result()
		if err != nil && !errors.Is(err, redis.Nil) && !broken(err) {
			return r, fmt.Errorf("read %s: %w", s.keys.Epoch(), err)
		}
		r.Epoch = epoch
	}
	got, err := s.rdb.HGetAll(ctx, s.keys.Config()).Result()
	switch {
	case err != nil && broken(err):
		r.Fault = err.Error()
		return r, nil
	case err != nil:
		return r, fmt.Errorf("read %s: %w", s.keys.Config(), err)
	case len(got) == 0:
		return r, nil
	}
	for name, most := range map[string]*int64{"max_instances": &r.MaxInstances, "max_services": &r.MaxServices} {
		if n := field(got, name); n != Unknown {
			*most = n
		}
	}
	if got["ttl_ms"] == "" && got["interval_ms"] == "" {
		return r, nil // somebody set a limit before the first reaper ran
	}
	r.Configured = true
	r.TTL, r.Interval = inForce(got["ttl_ms"], got["interval_ms"])
	if ttl, interval := stored(got["ttl_ms"]), stored(got["interval_ms"]); ttl != r.TTL || interval != r.Interval {
		r.Fault = fmt.Sprintf("ttl_ms is %q and interval_ms is %q: out of bounds; %v and %v are in force", got["ttl_ms"], got["interval_ms"], r.TTL, r.Interval)
	}
	return r, nil
}

// LastPulse returns how long ago the reaper id pulsed, if its pulses expire
// after expiry; Unknown if there is none.
func (s *Store) LastPulse(ctx context.Context, id string, expiry time.Duration) (time.Duration, error) {
	left, err := s.rdb.PTTL(ctx, s.keys.Reaper(id)).Result()
	if err != nil {
		return Unknown, fmt.Errorf("read %s: %w", s.keys.Reaper(id), err)
	}
	if left <= 0 { // -1: it never expires, so it is no pulse; -2: it is gone
		return Unknown, nil
	}
	return max(0, expiry-left), nil
}
