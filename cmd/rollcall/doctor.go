//go:build !sidecar

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/urfave/cli/v2"

	"rollcall/lbsync"
	"rollcall/lbsync/haproxy"
	"rollcall/lbsync/identity"
	"rollcall/registrar"
	"rollcall/registrar/idfile"
)

// state is what a finding comes to.
type state string

// The states. Bad is what loses requests or instances, now or at the next
// reload, restart or fail-over; warn is a margin that is gone.
const (
	stateOK      state = "ok"
	stateWarn    state = "warn"
	stateBad     state = "bad"
	stateUnknown state = "unknown" // no right to look, or no answer
)

// finding is one line of doctor. Why and Fix are empty if it is ok.
type finding struct {
	Check string `json:"check"`
	State state  `json:"state"`
	Seen  string `json:"seen"`
	Why   string `json:"why,omitempty"`
	Fix   string `json:"fix,omitempty"`
}

// errBad says that a finding would lose traffic: exit code 1.
var errBad = errors.New("traffic would be lost")

const (
	// doctorTimeout bounds the look through the key space.
	doctorTimeout = 30 * time.Second
	// settle is how long a balancer may take to apply what it is behind with.
	settle = 2 * time.Second
	// maxSkew is how far two clocks may lie apart unremarked.
	maxSkew = time.Second
	// fullPercent is where a margin is thin, and overPercent where it is gone.
	fullPercent, overPercent = 80, 95
	// pubSubFloor is less than the messages of 10,000 changes take.
	pubSubFloor = 1 << 20
	// pulseTTLs is how many TTL a reaper's pulse stays.
	pulseTTLs = 4
	// listed is the most names that a finding shows.
	listed = 5
)

func doctorCommand() *cli.Command {
	return &cli.Command{
		Name: "doctor", Usage: "look whether Redis, the registry, the roles and HAProxy are set up right; exit code 1 if traffic would be lost",
		Flags: redisFlags(outputFlag(),
			&cli.StringSliceFlag{Name: "socket", EnvVars: env("socket"), Usage: "`PATH` of a HAProxy's stats socket, as lbsync has it; repeatable"},
			&cli.StringSliceFlag{Name: "backend", EnvVars: env("backend"), Usage: "`SERVICE=BACKEND`, as lbsync has it; repeatable"},
			stateDirFlag(),
			&cli.StringSliceFlag{Name: "config", EnvVars: env("config"), Usage: "`FILE` of HAProxy's configuration, only read; repeatable, in HAProxy's order"},
			&cli.StringSliceFlag{Name: "role", EnvVars: env("role"), DefaultText: "all",
				Usage: "`ROLE` that the Redis user of --redis is for: " + strings.Join(registrar.Roles, ", ") + "; repeatable"},
			&cli.StringFlag{Name: "service", EnvVars: env("service"), DefaultText: "the first of --backend, or web", Usage: "`NAME` of a service, on whose keys the rights are tried"},
			&cli.DurationFlag{Name: "ttl", EnvVars: env("ttl"), DefaultText: "not compared", Usage: "that your reapers are started with"},
			&cli.DurationFlag{Name: "heartbeat", EnvVars: env("heartbeat"), DefaultText: "not compared", Usage: "that your reapers are started with"},
		),
		Action: func(c *cli.Context) error {
			if _, err := args(c, "", 0); err != nil {
				return err
			}
			backends, err := parseBackends(c.StringSlice("backend"))
			if err != nil {
				return err
			}
			sockets := c.StringSlice("socket")
			switch {
			case (len(sockets) > 0) != (len(backends) > 0):
				return usage("--socket and --backend go together")
			case len(c.StringSlice("config")) > 0 && len(sockets) == 0:
				return usage("--config goes with --socket and --backend")
			}
			roles := registrar.Roles
			if c.IsSet("role") {
				roles = c.StringSlice("role")
			}
			for _, r := range roles {
				if !slices.Contains(registrar.Roles, r) {
					return usage("--role %q: want one of %s", r, strings.Join(registrar.Roles, ", "))
				}
			}
			s, err := begin(c, 1)
			if err != nil {
				return err
			}
			defer s.close()
			clients := make([]*haproxy.Client, len(sockets))
			for i, socket := range sockets {
				if clients[i], err = haproxy.New(haproxy.Config{Socket: socket}, s.log); err != nil {
					return usageError{err}
				}
			}
			d := &doctor{store: s.store, others: s.elsewhere, backends: backends, roles: roles, any: !c.IsSet("role")}
			if d.service, err = rightsOf(c.String("service"), backends); err != nil {
				return err
			}
			d.passwords(passwords(c, "redis"))
			d.places = func(socket string) []identity.Place { return places(c, socket, socket) }
			d.host()
			d.name(c.Context, c.String("redis"))
			if d.registry(c.Context, c.Duration("ttl"), c.Duration("heartbeat")); d.answers {
				d.defaultUser(c)
				dir, _ := idfile.Dir()
				d.idFiles(c.Context, dir, idfile.Registry(c.String("redis"), c.String("namespace")))
			}
			d.address(c.Context, newLocator(c))
			for i, client := range clients {
				d.haproxy(c.Context, sockets[i], client, c.StringSlice("config"))
			}
			if err := s.findings(d.findings); err != nil {
				return err
			}
			bad := 0
			for _, f := range d.findings {
				if f.State == stateBad {
					bad++
				}
			}
			if bad > 0 {
				return fmt.Errorf("%w: findings that are bad: %d", errBad, bad)
			}
			return nil
		},
	}
}

func (p printer) findings(fs []finding) error {
	if p.json {
		return p.document(fs)
	}
	width := 0
	for _, f := range fs {
		width = max(width, len(f.Check))
	}
	for _, f := range fs {
		if _, err := fmt.Fprintf(p.w, "%-7s  %-*s  %s\n", f.State, width, plain(f.Check), plain(f.Seen)); err != nil {
			return err
		}
		for _, more := range []struct{ name, text string }{{"why", f.Why}, {"fix", f.Fix}} {
			if more.text == "" {
				continue
			}
			if _, err := fmt.Fprintf(p.w, "         %s: %s\n", more.name, plain(more.text)); err != nil {
				return err
			}
		}
	}
	return nil
}

// doctor gathers findings.
type doctor struct {
	store    *registrar.Store
	backends []lbsync.BackendConfig
	roles    []string
	places   func(socket string) []identity.Place // where ids of its lbsyncs are kept
	others   func(context.Context) string         // other registries of this Redis, in words
	findings []finding

	any     bool              // no role was named
	service registrar.Service // on whose keys the rights are tried
	answers bool              // Redis does

	known bool                        // the registry was read
	sizes map[registrar.Service]int64 // instances of each service
}

func (d *doctor) add(check string, s state, why, fix, seen string, args ...any) {
	f := finding{Check: check, State: s, Seen: fmt.Sprintf(seen, args...)}
	if s != stateOK {
		f.Why, f.Fix = why, fix
	}
	d.findings = append(d.findings, f)
}

// part is add for what was seen in part: what is wrong is certain, and nothing is ok while
// something has not been seen.
func (d *doctor) part(unseen []string, check string, s state, why, fix, seen string, args ...any) {
	if s == stateOK && len(unseen) > 0 {
		d.unknown(check, fmt.Errorf("not seen: %s", few(unseen)), readerFix)
		return
	}
	d.add(check, s, why, fix, seen, args...)
}

// unknown says that err kept a check from being made.
func (d *doctor) unknown(check string, err error, fix string) {
	d.add(check, stateUnknown, "what was not seen may be wrong", fix, "%v", err)
}

// rightsOf is the service on whose keys the rights are tried.
func rightsOf(named string, backends []lbsync.BackendConfig) (registrar.Service, error) {
	switch {
	case named != "":
		return parseService(named)
	case len(backends) > 0:
		return backends[0].Service, nil
	}
	return "web", nil
}

// defaultUser looks whether Redis asks everybody for a password. Where nobody has one it
// is for the network to keep others out, which a loopback address does.
func (d *doctor) defaultUser(c *cli.Context) {
	const check = "default user"
	a, err := access(c, "redis")
	if err != nil {
		d.unknown(check, err, "as the line says")
		return
	}
	hosts, err := registrar.Hosts(c.String("redis"))
	if err != nil {
		d.unknown(check, err, "as the line says")
		return
	}
	far := slices.ContainsFunc(hosts, func(host string) bool {
		at, err := netip.ParseAddrPort(host)
		return err != nil && !strings.HasPrefix(host, "localhost:") || err == nil && !at.Addr().IsLoopback()
	})
	open, err := a.Anonymous(c.Context, c.String("redis"))
	switch {
	case err != nil:
		d.unknown(check, err, "try again")
	case open && (far || len(passwords(c, "redis")) > 0):
		d.add(check, stateWarn, "whoever reaches the port may do everything, whatever rights the roles have", "in the file that aclfile names: user default off", "it needs no password")
	case open:
		d.add(check, stateOK, "", "", "it needs no password, on a loopback address")
	default:
		d.add(check, stateOK, "", "", "it is off, or has a password")
	}
}

// passwords judges where the password of --redis is given.
func (d *doctor) passwords(given []string) {
	if len(given) > 1 {
		d.add("redis password", stateWarn, "the one that is not used may be the one that was meant", "take out what is not used", "%s is used, and not %s", given[0], strings.Join(given[1:], " or "))
	}
}

// worst is bad, or else warn, or else ok.
func worst(bad, warn bool) state {
	switch {
	case bad:
		return stateBad
	case warn:
		return stateWarn
	}
	return stateOK
}

// registry looks at Redis, at what is in it, and at the roles that write there.
func (d *doctor) registry(ctx context.Context, ttl, heartbeat time.Duration) {
	_, err := registrar.Try(ctx, func(ctx context.Context) (struct{}, error) { return struct{}{}, d.store.Ping(ctx) })
	if err != nil {
		fix := "check --redis and its password, and that redis-server runs"
		if registrar.Refused(err) {
			fix = "as the line says"
		}
		d.add("redis", stateBad, "without it nobody's coming or going is heard of", fix, "%v", err)
		d.unknown("registry", errors.New("not looked at"), "the finding above comes first")
		return
	}
	d.answers = true
	if d.store.Cluster() {
		d.nodes(ctx)
	} else {
		tctx, cancel := context.WithTimeout(ctx, registrar.TryFor) // several exchanges
		server, err := d.store.Examine(tctx)
		cancel()
		if err != nil {
			d.unknown("redis", err, examineFix)
		} else {
			d.server("redis", server)
		}
	}
	d.latency(ctx)
	d.rights(ctx)
	d.namespace(ctx, ttl, heartbeat)
}

const (
	examineFix = "allow INFO and TIME to the user of --redis"
	// readerFix is for what no role needs but doctor.
	readerFix = "run doctor as the user of scripts/deploy/acl/doctor.acl (of a Cluster: acl/cluster/doctor.acl)"
)

// nodes judges a Cluster's primaries, each by itself and as a whole.
func (d *doctor) nodes(ctx context.Context) {
	nodes, err := registrar.Try(ctx, d.store.Nodes)
	if err != nil {
		d.unknown("cluster", err, "allow CLUSTER SLOTS to the user of --redis")
		return
	}
	var unowned, failed int64
	var dead, unseen, blind, without, stopped, moving []string
	covered := "no" // by all that were asked
	for _, n := range nodes {
		name := "redis " + n.Addr
		var refused redis.Error
		switch {
		case n.Err == nil:
		case errors.As(n.Err, &refused) && !registrar.Passing(n.Err):
			d.unknown(name, n.Err, readerFix)
			unseen = append(unseen, n.Addr)
			continue
		default:
			dead = append(dead, n.Addr)
			d.add(name, stateBad, "of its services nothing is known: nobody comes or goes", "look at that host and at redis-server's log", "%v", n.Err)
			continue
		}
		d.server(name, n.Server)
		unowned, failed = max(unowned, n.Unowned), max(failed, n.Failed)
		if n.State != "ok" {
			stopped = append(stopped, fmt.Sprintf("%s says %s", n.Addr, cmp.Or(n.State, "nothing")))
		}
		switch {
		case n.Replicas == 0:
			without = append(without, n.Addr)
		case n.Replicas < 0: // without INFO
			blind = append(blind, n.Addr)
		}
		for _, slot := range n.Moving {
			moving = append(moving, n.Addr+" "+slot)
		}
		if n.Coverage == "yes" || n.Coverage == "" && covered == "no" {
			covered = n.Coverage
		}
	}
	if len(dead) == len(nodes) {
		return
	}
	d.part(unseen, "cluster nodes", worst(len(stopped) > 0, false), "such a node refuses everything", "redis-cli --cluster check HOST:PORT", "%s", cmp.Or(few(stopped), fmt.Sprintf("%d primaries, all in order", len(nodes)-len(dead))))
	d.part(unseen, "cluster slots", worst(unowned+failed > 0, false), "a service whose name falls on such a slot has no register", "redis-cli --cluster fix HOST:PORT, or bring the node back",
		"%d without an owner, %d whose owner is down", unowned, failed)
	d.part(unseen, "cluster moving slots", worst(false, len(moving) > 0), "while a slot has keys on two nodes the services in it stand still", "let it come to its end, or: redis-cli --cluster fix HOST:PORT", "%s", cmp.Or(few(moving), "none"))
	switch {
	case covered == "" && len(unseen) == 0:
		d.unknown("cluster coverage", errors.New("no right to read cluster-require-full-coverage"), "ACL SETUSER <user> +config|get")
	default:
		d.part(unseen, "cluster coverage", worst(false, covered != "no"), "one shard that is down stops the services of all", "redis-cli config set cluster-require-full-coverage no, on every node; and in redis.conf: cluster-require-full-coverage no",
			"cluster-require-full-coverage %s", covered)
	}
	d.part(append(blind, unseen...), "cluster replicas", worst(false, len(without) > 0), "when such a primary dies its services stand still until it is back", "redis-cli --cluster add-node REPLICA HOST:PORT --cluster-slave --cluster-master-id ID",
		"%s", cmp.Or(also(without, "no replica follows: "), "every primary has one"))
}

// server judges what a Redis says of itself.
func (d *doctor) server(name string, o registrar.Server) {
	if o.Unseen != nil {
		fix := "ACL SETUSER <user> +info"
		if registrar.Unknowable(o.Unseen) {
			fix = "take the line rename-command INFO out of redis.conf"
		}
		d.add(name+" info", stateBad, "no reaper takes anybody out, and data that went back is noticed by its versions alone", fix, "%v", o.Unseen)
	}
	major, _, _ := strings.Cut(o.Version, ".")
	n, err := strconv.Atoi(major)
	switch {
	case err != nil:
		d.unknown(name+" version", fmt.Errorf("redis says %q", o.Version), "look at redis-cli info server")
	default:
		d.add(name+" version", worst(n < 7, false), "rollcall's scripts need 7.0", "upgrade redis-server", "%s", o.Version)
	}

	switch o.Role {
	case "master":
		d.add(name+" role", stateOK, "", "", "primary")
	case "":
		d.unknown(name+" role", errors.New("redis does not say"), "look at redis-cli info replication")
	default:
		d.add(name+" role", stateBad, "it refuses every heartbeat", "point --redis at the primary", "%s: a replica", o.Role)
	}

	const policyFix = "redis-cli config set maxmemory-policy noeviction; and in redis.conf: maxmemory-policy noeviction"
	switch {
	case o.Policy == "" || o.MaxMemory < 0:
		d.unknown(name+" eviction", errors.New("redis does not tell its policy"), "look at redis-cli config get maxmemory-policy")
	default:
		evicts := o.Policy != "noeviction"
		d.add(name+" eviction", worst(evicts && o.MaxMemory > 0, evicts), "eviction takes a whole service away at once", policyFix, "maxmemory-policy %s, maxmemory %d", o.Policy, o.MaxMemory)
	}
	switch {
	case o.MaxMemory == 0:
		d.add(name+" memory", stateOK, "", "", "%d bytes, no limit", o.Memory)
	case o.MaxMemory < 0 || o.Memory < 0:
		d.unknown(name+" memory", errors.New("redis does not tell"), "look at redis-cli info memory")
	default:
		p := o.Memory * 100 / o.MaxMemory
		d.add(name+" memory", worst(p >= overPercent, p >= fullPercent), "a full Redis refuses removals, so the dead stay", "raise maxmemory, or find what fills it: redis-cli --bigkeys",
			"%d of %d bytes (%d %%)", o.Memory, o.MaxMemory, p)
	}
	switch {
	case o.Clients < 0 || o.MaxClients <= 0:
		d.unknown(name+" clients", errors.New("redis does not tell"), "look at redis-cli info clients")
	default:
		p := o.Clients * 100 / o.MaxClients
		d.add(name+" clients", worst(p >= overPercent, p >= fullPercent), "a sidecar that cannot connect looks dead", "raise maxclients and the file limit of redis-server",
			"%d of %d (%d %%)", o.Clients, o.MaxClients, p)
	}

	const persistFix = "redis-cli config set appendonly yes; and in redis.conf: appendonly yes"
	switch {
	case o.WriteFault != "":
		d.add(name+" persistence", stateBad, "with a failed save Redis refuses writes (stop-writes-on-bgsave-error)", "look at redis-server's log and at its disk", "%s", o.WriteFault)
	case o.Persistent == "":
		d.unknown(name+" persistence", errors.New("no right to read whether it saves"), "ACL SETUSER <user> +config|get, or look at redis-cli config get save")
	default:
		d.add(name+" persistence", worst(false, o.Persistent == "no"), "a restart forgets operators' drain and maint, and holds every removal", persistFix, "%s", o.Persistent)
	}

	const replicaFix = "redis-cli config set min-replicas-to-write 1; redis-cli config set min-replicas-max-lag 10; and both in redis.conf"
	switch {
	case o.Role != "master":
	case o.Replicas < 0 || o.MinReplicas < 0:
		d.unknown(name+" replicas", errors.New("no right to read min-replicas-to-write"), "ACL SETUSER <user> +config|get")
	case o.MinReplicas > 0 && o.Good >= 0 && o.Good < o.MinReplicas:
		d.add(name+" replicas", stateBad, "Redis refuses writes until enough replicas follow", "bring the replicas back, or lower min-replicas-to-write",
			"%d follow, min-replicas-to-write is %d", o.Good, o.MinReplicas)
	default:
		d.add(name+" replicas", worst(false, o.Replicas > 0 && o.MinReplicas == 0), "a primary that is cut off goes on accepting what a fail-over throws away", replicaFix,
			"%d, min-replicas-to-write %d", o.Replicas, o.MinReplicas)
	}

	if o.PubSubLimit < 0 {
		d.unknown(name+" pub/sub buffer", errors.New("no right to read client-output-buffer-limit"), "ACL SETUSER <user> +config|get")
	} else {
		d.add(name+" pub/sub buffer", worst(false, o.PubSubLimit > 0 && o.PubSubLimit < pubSubFloor), "a burst of changes cuts lbsync off, and it hears of them at the next poll only",
			`redis-cli config set client-output-buffer-limit "pubsub 33554432 8388608 60"`, "%d bytes", o.PubSubLimit)
	}
	off := max(o.ClockMin, -o.ClockMax, 0) // what is certain
	d.add(name+" clock", worst(false, off > maxSkew), "times in logs and in metadata do not fit together; scores are by Redis' clock alone", "run an NTP client on both hosts",
		"between %v and %v of this host's", o.ClockMin.Round(time.Microsecond), o.ClockMax.Round(time.Microsecond))
}

// rights tries what the roles do, on the keys of a service that matters.
func (d *doctor) rights(ctx context.Context) {
	ctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	missing, err := d.store.Rights(ctx, d.service)
	if err != nil {
		d.unknown("redis rights", err, "ACL SETUSER <user> +multi +discard")
		return
	}
	if d.any && !slices.ContainsFunc(d.roles, func(role string) bool {
		return !slices.Contains(missing[role], "eval") || !slices.Contains(missing[role], "evalsha")
	}) {
		d.unknown("redis rights", errors.New("this user only reads"), "run doctor as the user of each role, with its --role")
		return
	}
	for _, role := range d.roles {
		m := missing[role]
		d.add("redis rights: "+role, worst(len(m) > 0, false), "this user cannot be used for this role", "ACL SETUSER <user> +<command> ~"+keyPattern(d.store)+" &"+d.store.Keys().Changes(),
			"%s", cmp.Or(few(m), "all"))
	}
}

// quote makes one word of a shell of what may have come from the registry.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// keyPattern matches every key of the namespace.
func keyPattern(s *registrar.Store) string {
	return strings.TrimSuffix(s.Keys().Services(), "services") + "*"
}

// few shows the first of a list.
func few[T ~string](l []T) string {
	words := make([]string, 0, listed+1)
	for i, s := range l {
		if i == listed {
			words = append(words, fmt.Sprintf("and %d more", len(l)-listed))
			break
		}
		words = append(words, string(s))
	}
	return strings.Join(words, ", ")
}

// namespace judges what the namespace holds, and the roles by what they write.
func (d *doctor) namespace(ctx context.Context, ttl, heartbeat time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	reg, err := d.store.Registry(ctx)
	if err != nil {
		d.unknown("registry", err, "allow GET and HGETALL to the user of --redis")
		return
	}
	inv, err := d.store.Inventory(ctx)
	switch {
	case err != nil && (d.store.Cluster() || registrar.Refused(err)) && len(inv.Services) > 0:
		fix := "the findings of the nodes come first"
		if registrar.Refused(err) {
			fix = readerFix
		}
		d.unknown("registry", fmt.Errorf("not all of it: %w", err), fix)
	case err != nil:
		d.unknown("registry", err, readerFix)
		return
	}
	k := d.store.Keys()
	switch {
	case inv.Complete && inv.Keys == 0:
		d.add("registry", stateWarn, "nobody has registered and no reaper has run", "check --redis, its database number and --namespace", "%s", strings.TrimSuffix("no key of the namespace; "+d.others(ctx), "; "))
	case err != nil:
	case !inv.Complete:
		d.unknown("registry", fmt.Errorf("too many keys in this database; %d of the namespace seen", inv.Keys), "give rollcall a database of its own")
	default:
		d.add("registry", stateOK, "", "", "%d keys, %d services", inv.Keys, len(inv.Services))
	}
	if d.store.Cluster() {
		d.registers(ctx, inv.Services, reg)
	} else {
		d.add("registry epoch", worst(false, reg.Epoch == ""), noEpoch, epochFix, "%s", cmp.Or(reg.Epoch, "none"))
	}
	d.config(reg, ttl, heartbeat)

	del := func(key string) string { return "look at it, then: redis-cli del " + quote(key) }
	if len(inv.Unowned) > 0 {
		d.add("registry keys", stateWarn, "nothing of rollcall reads or removes them", del(inv.Unowned[0]), "not rollcall's: %s", few(inv.Unowned))
	}
	if len(inv.Mistyped) > 0 {
		var wrong []string
		for _, m := range inv.Mistyped {
			wrong = append(wrong, fmt.Sprintf("%s is a %s, want a %s", m.Key, m.Type, m.Want))
		}
		d.add("registry types", stateBad, "every script on such a key fails", del(inv.Mistyped[0].Key), "%s", few(wrong))
	}
	if len(inv.BadNames) > 0 {
		d.add("registry services", stateWarn, "nobody serves them, and reapers call every sweep incomplete", "redis-cli srem "+k.Services()+" "+quote(inv.BadNames[0]), "no service names: %s", few(inv.BadNames))
	}
	if len(inv.Orphans) > 0 {
		d.add("registry services", stateBad, "no reaper looks at them, so their dead stay", "redis-cli sadd "+k.Services()+" "+string(inv.Orphans[0]), "not in %s: %s", k.Services(), few(inv.Orphans))
	}
	if len(inv.Empty) > 0 {
		d.add("registry services", stateWarn, "they are looked at for nothing", "start a reaper: it takes them off", "without instances: %s", few(inv.Empty))
	}
	if len(inv.Unowned)+len(inv.Mistyped)+len(inv.BadNames)+len(inv.Orphans)+len(inv.Empty) == 0 && inv.Complete {
		d.add("registry keys", stateOK, "", "", "all owned, all of the right type")
	}
	d.instances(ctx, inv, reg)
	d.limits(inv, reg)
	d.flaps(ctx, inv.Services)
	d.overrides(ctx)
	d.reapers(ctx, inv, reg)
	d.balancers(ctx, inv.Services)
	d.serving(ctx, inv.Services)
}

const (
	noEpoch  = "without one nobody notices that the data was lost"
	epochFix = "start a reaper: it sets one"
)

// registers judges what each service's own register in a Cluster says of itself,
// against the whole.
func (d *doctor) registers(ctx context.Context, svcs []registrar.Service, whole registrar.Registry) {
	var blank, other, unseen []string
	for _, svc := range svcs {
		tctx, cancel := registrar.WithTimeout(ctx)
		reg, err := d.store.Of(svc).Registry(tctx)
		cancel()
		switch {
		case err != nil:
			d.unknown("registry of "+string(svc), err, "the findings of the nodes come first")
			unseen = append(unseen, string(svc))
			continue
		case reg.Fault != "":
			other = append(other, fmt.Sprintf("%s: %s", svc, reg.Fault))
		case reg.Configured && (reg.TTL != whole.TTL || reg.Interval != whole.Interval):
			other = append(other, fmt.Sprintf("%s has ttl %v, heartbeat %v", svc, reg.TTL, reg.Interval))
		}
		if reg.Epoch == "" {
			blank = append(blank, string(svc))
		}
	}
	d.part(unseen, "registry epochs", worst(false, len(blank) > 0), noEpoch, epochFix, "%s", cmp.Or(also(blank, "none of "), "every service has one"))
	d.part(unseen, "registry configs", worst(len(other) > 0, false), "instances and reapers of these services keep to other times than the rest", fmt.Sprintf("rollcall reap --ttl %v --heartbeat %v --set-ttl --once", whole.TTL, whole.Interval), "%s", cmp.Or(few(other), "all as the whole"))
}

func (d *doctor) config(reg registrar.Registry, ttl, heartbeat time.Duration) {
	seen := fmt.Sprintf("ttl %v, heartbeat %v", reg.TTL, reg.Interval)
	switch {
	case reg.Fault != "":
		d.add("registry config", stateBad, "sidecars or reapers refuse to work with it", "rollcall reap --ttl 15s --heartbeat 5s --set-ttl --once", "%s", reg.Fault)
	case !reg.Configured:
		d.add("registry config", stateWarn, "the defaults are in force until a reaper writes it", "start a reaper", "none: %s", seen)
	case ttl > 0 && ttl != reg.TTL || heartbeat > 0 && heartbeat != reg.Interval:
		d.add("registry config", stateBad, "a reaper with other times refuses to start",
			fmt.Sprintf("start the reapers with --ttl %v --heartbeat %v, or change it with --set-ttl", reg.TTL, reg.Interval),
			"%s, your flags say ttl %v, heartbeat %v", seen, cmp.Or(ttl, reg.TTL), cmp.Or(heartbeat, reg.Interval))
	default:
		d.add("registry config", stateOK, "", "", "%s", seen)
	}
}

// instances reads every service for what cannot be believed, and for who
// should have been taken out.
func (d *doctor) instances(ctx context.Context, inv registrar.Inventory, reg registrar.Registry) {
	var garbage, stale, shared, unseen []string
	in := map[netip.AddrPort]string{} // the service, and for how long it has been silent there if it has
	var fix string                    // of the first
	d.sizes = map[registrar.Service]int64{}
	for _, svc := range inv.Services {
		tctx, cancel := registrar.WithTimeout(ctx)
		snap, err := d.store.Read(tctx, svc, nil)
		cancel()
		if err != nil {
			fix := "see what else is wrong with this service's keys"
			if registrar.Forbidden(err) {
				fix = readerFix
			}
			d.unknown("registry members of "+string(svc), err, fix)
			unseen = append(unseen, string(svc))
			continue
		}
		d.sizes[svc] = 0
		for _, g := range snap.Garbage {
			garbage = append(garbage, fmt.Sprintf("%s %s", svc, g))
			fix = cmp.Or(fix, "redis-cli zrem "+quote(d.store.Keys().Instances(svc))+" "+quote(g))
		}
		for _, e := range snap.Entries {
			switch {
			case e.Garbage != "":
				garbage = append(garbage, fmt.Sprintf("%s %s: %s", svc, e.Addr, e.Garbage))
				fix = cmp.Or(fix, fmt.Sprintf("rollcall deregister --service %s --addr %s --force", svc, e.Addr))
			case e.Present:
				d.sizes[svc]++
				name := string(svc)
				if silent := time.Duration(snap.Now-e.Instance.Beat) * time.Millisecond; silent > 2*reg.Interval {
					name += fmt.Sprintf(" (silent for %v)", silent.Round(time.Second))
				}
				if other, twice := in[e.Addr]; twice {
					shared = append(shared, fmt.Sprintf("%s in %s and %s", e.Addr, other, name))
				}
				in[e.Addr] = name
				// One second more: the reaper's own promise.
				if snap.Now-e.Instance.Beat > (reg.TTL + time.Second).Milliseconds() {
					stale = append(stale, fmt.Sprintf("%s %s", svc, e.Addr))
				}
			}
		}
	}
	d.known = len(unseen) == 0
	slices.Sort(stale)
	d.part(unseen, "registry addresses", worst(false, len(shared) > 0), "unless one process serves both, requests of one service reach the other", "the one that is silent goes by itself after its TTL; else take out the one that is wrong: rollcall deregister --service NAME --addr ADDR --force, and stop its sidecar",
		"%s", cmp.Or(few(shared), "each in one service"))
	d.part(unseen, "registry members", worst(false, len(garbage) > 0), "what cannot be believed is not served", fix, "%s", cmp.Or(few(garbage), "all are instances"))
	d.part(unseen, "registry silence", worst(false, len(stale) > 0), "the dead are still served, if no check says otherwise", "see the reapers below; if they live, they hold back: their log says why", "%s", cmp.Or(few(stale), "nobody is silent for longer than the TTL"))
}

// limits says how near the registry is to keeping newcomers out.
func (d *doctor) limits(inv registrar.Inventory, reg registrar.Registry) {
	if !d.known {
		d.unknown("registry limits", errors.New("not every service was read"), readerFix)
		return
	}
	for _, l := range []struct {
		what, field string
		n, most     int64
	}{
		{"services", "max_services", int64(len(inv.Services)), reg.MaxServices},
		{"instances", "max_instances", largest(d.sizes), reg.MaxInstances},
	} {
		config := d.store.Keys().Config()
		if l.most > registrar.ReadLimit {
			d.add("registry limit: "+l.what, stateBad, fmt.Sprintf("nobody reads more than %d", registrar.ReadLimit), fmt.Sprintf("redis-cli hset %s %s %d", config, l.field, registrar.ReadLimit), "%d", l.most)
			continue
		}
		seen := fmt.Sprintf("%d of %d", l.n, l.most)
		if l.what == "instances" {
			seen += " in the largest service"
		}
		d.add("registry limit: "+l.what, worst(l.n >= l.most, l.n*100 >= l.most*fullPercent), "newcomers are not registered", fmt.Sprintf("take out who is not needed, or: redis-cli hset %s %s %d", config, l.field, max(2*l.most, 1)), "%s", seen)
	}
}

func largest(sizes map[registrar.Service]int64) int64 {
	n := int64(0)
	for _, size := range sizes {
		n = max(n, size)
	}
	return n
}

const (
	noReaper  = "nobody takes the dead out"
	oneReaper = "when it stops nobody takes the dead out"
	reaperFix = "rollcall reap, on two hosts or more"
	pulseFix  = "allow PTTL to the user of --redis"
)

func (d *doctor) reapers(ctx context.Context, inv registrar.Inventory, reg registrar.Registry) {
	if d.store.Cluster() {
		d.clusterReapers(ctx, inv, reg)
		return
	}
	alive, silent, err := atWork(ctx, d.store, inv, "", reg.TTL)
	if err != nil {
		d.unknown("reapers", err, pulseFix)
		return
	}
	why := noReaper
	if len(alive) > 0 {
		why = oneReaper
	}
	d.add("reapers", worst(len(alive) == 0, len(alive) == 1), why, reaperFix, "%d alive%s", len(alive), also(silent, "; "))
}

// clusterReapers judges the reapers of each service: they pulse in its slot.
func (d *doctor) clusterReapers(ctx context.Context, inv registrar.Inventory, reg registrar.Registry) {
	var none, one []string
	unseen := 0
	for _, svc := range inv.Services {
		alive, _, err := atWork(ctx, d.store.Of(svc), inv, svc, reg.TTL)
		size, sized := d.sizes[svc]
		switch {
		case err != nil:
			d.unknown("reapers of "+string(svc), err, pulseFix)
			unseen++
		case len(alive) == 0 && !sized:
			d.unknown("reapers of "+string(svc), errors.New("none alive, and it is not known whether it has instances"), readerFix)
			unseen++
		case len(alive) == 0 && size > 0:
			none = append(none, string(svc))
		case len(alive) == 1:
			one = append(one, string(svc))
		}
	}
	switch {
	case len(none) > 0:
		d.add("reapers", stateBad, noReaper, reaperFix, "none alive for %s", few(none))
	case len(one) > 0:
		d.add("reapers", stateWarn, oneReaper, reaperFix, "only one alive for %s", few(one))
	case unseen > 0: // it has been said of each
	case len(inv.Services) == 0:
		d.add("reapers", stateOK, "", "", "nobody to look after")
	default:
		d.add("reapers", stateOK, "", "", "two or more alive for every service")
	}
}

// atWork finds the reapers of one register by their pulses; where not every key was
// looked at, by what they say of themselves, as status does.
func atWork(ctx context.Context, store *registrar.Store, inv registrar.Inventory, svc registrar.Service, ttl time.Duration) (alive, silent []string, err error) {
	if inv.Complete {
		return pulses(ctx, store, inv.Reapers[svc], ttl)
	}
	o, err := registrar.Try(ctx, store.Overview)
	if err != nil {
		return nil, nil, err
	}
	for _, r := range o.Reapers {
		if r.Live {
			alive = append(alive, r.ID)
		} else {
			silent = append(silent, r.ID)
		}
	}
	return alive, silent, nil
}

// pulses sorts reapers of one register by whether they pulse.
func pulses(ctx context.Context, store *registrar.Store, ids []string, ttl time.Duration) (alive, silent []string, err error) {
	for _, id := range ids {
		age, err := store.LastPulse(ctx, id, pulseTTLs*ttl)
		switch {
		case err != nil:
			return nil, nil, err
		case age == registrar.Unknown: // it went meanwhile
		case age <= ttl/3: // it pulses five times in that
			alive = append(alive, id)
		default:
			silent = append(silent, fmt.Sprintf("%s (silent for %v)", id, age.Round(time.Second)))
		}
	}
	return alive, silent, nil
}

// balancers judges who applies what. With --backend only those services count,
// and somebody must apply each of them.
func (d *doctor) balancers(ctx context.Context, svcs []registrar.Service) {
	named := len(d.backends) > 0
	if named {
		svcs = nil
		for _, b := range d.backends {
			svcs = append(svcs, b.Service)
		}
		slices.Sort(svcs)
	}
	for _, svc := range svcs {
		check := "balancers of " + string(svc)
		tctx, cancel := registrar.WithTimeout(ctx)
		acks, err := d.store.Acks(tctx, svc)
		cancel()
		if err != nil {
			d.unknown(check, err, "allow EVAL_RO to the user of --redis")
			continue
		}
		// What is under way now may be done in a moment.
		if behind, _ := acks.Behind(acks.Token.Version); behind > 0 {
			tctx, cancel := context.WithTimeout(ctx, settle)
			_, err = d.store.WaitApplied(tctx, svc, acks.Token.Version, nil)
			cancel()
			if now, rerr := d.store.Acks(ctx, svc); err == nil && rerr == nil {
				acks = now
			}
		}
		var live, late, dead, twice []string
		for _, b := range acks.Balancers {
			switch n := registrar.Lag(acks.Token.Version, b.Applied); {
			case !b.Live:
				dead = append(dead, b.ID)
			case b.Double:
				twice = append(twice, b.ID)
			case n > 0:
				late = append(late, fmt.Sprintf("%s is %d behind", b.ID, n))
			default:
				live = append(live, b.ID)
			}
		}
		const fix = "rollcall lbsync --backend "
		switch {
		case acks.Token.Version < 0:
			k := d.store.Keys().Of(svc)
			d.add(check, stateBad, "nobody can tell who has applied what: --wait and sidecars that stop wait in vain, and readers read all of it each time",
				fmt.Sprintf("redis-cli del %s; redis-cli set %s 1", quote(k.Changed(svc)), quote(k.ServiceVersion(svc))), "%s is no number from 0 to 2^53-1", k.ServiceVersion(svc))
		case len(twice) > 0:
			d.add(check, stateWarn, "one of them is not heard, so nobody knows what its HAProxy has, and --wait cannot end", "rollcall lbsync --id NAME, another name for one of them", "two lbsyncs acknowledge as %s", few(twice))
		case len(live)+len(late) == 0:
			d.add(check, worst(named, true), "no change reaches HAProxy", fix+string(svc)+"=BACKEND, beside each HAProxy", "none alive%s", also(dead, "; silent: "))
		case len(late) > 0:
			d.add(check, stateWarn, "it still sends requests to who has left", "look at that lbsync's log: it says what HAProxy refused or what it holds", "%s", few(late))
		case len(dead) > 0:
			d.add(check, stateWarn, "its HAProxy hears of no change", fix+string(svc)+"=BACKEND on that host; forgotten after an hour if it is gone for good", "alive: %s; silent: %s", few(live), few(dead))
		default:
			d.add(check, stateOK, "", "", "%s, at version %d", few(live), acks.Token.Version)
		}
	}
}

func also(l []string, before string) string {
	if len(l) == 0 {
		return ""
	}
	return before + few(l)
}

// haproxy looks at one HAProxy.
func (d *doctor) haproxy(ctx context.Context, socket string, client *haproxy.Client, files []string) {
	check := "haproxy " + socket
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if err := client.Close(ctx); err != nil {
			d.unknown(check, err, "HAProxy hangs: look at it")
		}
	}()
	facts, err := client.Examine(ctx)
	if err != nil {
		d.add(check, stateBad, "lbsync cannot drive it", "check --socket, that HAProxy runs, and that this user may write to the socket", "%v", err)
		return
	}
	fresh, err := atLeast(facts.Version, 2, 6)
	switch {
	case err != nil:
		d.unknown(check, err, "look at haproxy -v")
	default:
		d.add(check, worst(!fresh, false), "older ones cannot change servers as lbsync needs it", "upgrade HAProxy", "version %s", facts.Version)
	}
	levelFix := "stats socket " + socket + " mode 660 level admin"
	switch facts.Level {
	case haproxy.LevelUnknown:
		d.unknown(check+" level", errors.New("its answer to set server is not understood"), levelFix)
	default:
		d.add(check+" level", worst(facts.Level != haproxy.LevelAdmin, false), "it answers reads and refuses every change", levelFix, "%s", facts.Level)
	}
	d.own(ctx, socket)

	var config *haproxy.File
	why := errors.New("no --config given")
	fix := "rollcall doctor … --config " + cmp.Or(strings.Join(facts.Files, " --config "), "/etc/haproxy/haproxy.cfg")
	if len(files) > 0 {
		if config, err = haproxy.ReadConfig(files); err != nil {
			config, why, fix = nil, err, "give every file that HAProxy reads, readable for this user"
		}
	}
	for _, b := range d.backends {
		at := check + " " + b.Backend
		f, err := client.ExamineBackend(ctx, b.Backend)
		switch {
		case errors.Is(err, lbsync.ErrNoBackend):
			d.add(at, stateBad, "the service has nowhere to go", "correct --backend, or write into haproxy.cfg: backend "+b.Backend, "%v", err)
			continue
		case err != nil:
			d.unknown(at, err, "try again")
			continue
		}
		if facts.Level == haproxy.LevelAdmin { // others cannot ask
			d.add(at+" driven", worst(f.Fault != "", false), "lbsync leaves such a backend as it is", "as the line says, and reload HAProxy", "%s", cmp.Or(f.Fault, "nothing of what its servers are keeps lbsync from it"))
		}
		slots := d.backend(at, b, f, facts.Version)
		if config == nil {
			d.unknown(at+" configuration", why, fix)
			continue
		}
		d.file(at, b.Backend, facts.Version, f, slots, socket, config)
	}
}

// atLeast compares a version such as 2.6.12-1+deb12u3.
func atLeast(version string, major, minor int) (bool, error) {
	var a, b int
	if _, err := fmt.Sscanf(version, "%d.%d", &a, &b); err != nil {
		return false, fmt.Errorf("version %q is not understood", version)
	}
	return a > major || a == major && b >= minor, nil
}

// own looks for the lbsyncs of this very socket, which the registry knows by ids that
// are kept on this host.
func (d *doctor) own(ctx context.Context, socket string) {
	check := "haproxy " + socket + " lbsync"
	path, err := filepath.Abs(socket)
	if err != nil || !d.known {
		d.unknown(check, cmp.Or(err, errors.New("the registry was not read")), "the findings of Redis come first")
		return
	}
	kept, unread := identity.Kept(d.places(path))
	var alive []string
	for _, b := range d.backends {
		ctx, cancel := registrar.WithTimeout(ctx)
		acks, err := d.store.Acks(ctx, b.Service)
		cancel()
		if err != nil {
			d.unknown(check, err, "allow EVAL_RO to the user of --redis")
			return
		}
		ids := []string{identity.Derived(path, b.Backend)}
		for _, r := range kept {
			if slices.Contains(r.Backends, b.Backend) {
				ids = append(ids, r.ID)
			}
		}
		live := func(o registrar.Balancer) bool { return o.Live }
		i := slices.IndexFunc(acks.Balancers, func(o registrar.Balancer) bool { return live(o) && slices.Contains(ids, o.ID) })
		switch {
		case i >= 0:
			alive = append(alive, acks.Balancers[i].ID)
		case len(ids) > 1 || !slices.ContainsFunc(acks.Balancers, live):
			d.add(check, stateBad, "no change of the service reaches this HAProxy", fmt.Sprintf("rollcall lbsync --socket %s --backend %s=%s", socket, b.Service, b.Backend),
				"none alive for %s (run doctor on the host of HAProxy, with the socket as lbsync has it)", b.Service)
			return
		default:
			d.unknown(check, cmp.Or(unread, fmt.Errorf("no id of an lbsync that has backend %s is kept here", b.Backend)),
				"run doctor on the host of HAProxy, as a user that may read it, with the --socket and the --state-dir of that lbsync")
			return
		}
	}
	slices.Sort(alive)
	d.add(check, stateOK, "", "", "alive: %s", few(slices.Compact(alive)))
}

// backend judges what the socket tells of one backend, and returns its slots.
func (d *doctor) backend(at string, b lbsync.BackendConfig, f haproxy.BackendFacts, version string) (slots []haproxy.ServerFacts) {
	ours, unchecked := 0, 0
	var enabled, stuck, weightless, backups []string
	for _, s := range f.Servers {
		if !s.Ours() {
			continue
		}
		if s.Slot && s.Backup {
			backups = append(backups, s.Name)
			continue
		}
		ours++
		if !s.Checked {
			unchecked++
		}
		if !s.Slot {
			continue
		}
		slots = append(slots, s)
		if !s.Disabled {
			enabled = append(enabled, s.Name)
		}
		if !s.Settable {
			stuck = append(stuck, s.Name)
		}
		if s.Configured == 0 && f.Dynamics == haproxy.No {
			weightless = append(weightless, s.Name)
		}
	}
	if len(backups) > 0 {
		d.add(at+" backups", stateWarn, "a backup gets no request while another server is up, so no instance is placed there", "a server-template of "+lbsync.SlotHost+" without `backup`", "slots that take nobody: %s", few(backups))
	}
	recipe := func(n int64) string {
		return fmt.Sprintf("server-template %s 1-%d %s:1 check disabled init-addr last,127.0.0.1", b.Service, n, lbsync.SlotHost)
	}
	size := d.sizes[b.Service]
	if len(slots) == 0 {
		modern, err := atLeast(version, 3, 0)
		d.add(at+" mode", worst(f.Dynamics == haproxy.No, err != nil || !modern), "without slots a reload empties the backend until lbsync has filled it again, and dynamic servers before 3.0 have faults",
			recipe(max(10, 2*size)), "dynamic (no slots)")
	} else {
		n := int64(len(slots))
		d.add(at+" mode", stateOK, "", "", "slots (%d)", n)
		switch {
		case !d.known:
			d.unknown(at+" slots", errors.New("the registry was not read"), "the findings of Redis come first")
		default:
			d.add(at+" slots", worst(size > n, size*100 > n*fullPercent), "an instance without a slot is not served, or does not survive a reload", recipe(max(10, 2*size)), "%d for %d instances", n, size)
		}
		switch {
		case len(stuck) > 0:
			d.add(at+" slots usable", stateBad, "a slot without an address cannot be given one", recipe(n), "without an address: %s", few(stuck))
		case len(weightless) > 0:
			d.add(at+" slots usable", stateBad, "with this balance algorithm the weight stays 0", "take `weight 0` out of the server-template", "weight 0: %s", few(weightless))
		default:
			d.add(at+" slots usable", worst(len(enabled) > 0, false), "after a reload a free slot takes requests that nobody answers", recipe(n), "%s", cmp.Or(also(enabled, "not disabled: "), "all disabled at start, with an address"))
		}
	}
	algorithm := cmp.Or(f.Algorithm, "unknown algorithm")
	switch f.Dynamics {
	case haproxy.Unsaid:
		d.unknown(at+" balance", fmt.Errorf("%s; the socket does not tell whether it is a static one", algorithm), "level admin tells")
	default:
		d.add(at+" balance", worst(f.Dynamics == haproxy.No && len(slots) == 0, f.Dynamics == haproxy.No), "a static algorithm refuses dynamic servers and every weight but none and the configured one",
			"balance leastconn, or hash-type consistent", "%s", algorithm)
	}
	switch {
	case ours == 0:
		d.unknown(at+" check", errors.New("no server to tell by"), `rollcall lbsync … --server-options "check inter 2s downinter 200ms"`)
	default:
		d.add(at+" check", worst(false, unchecked > 0), "an instance that is cut off from Redis for a TTL looks dead to everybody", "`check` in the server-template, or in lbsync's --server-options",
			"%d of %d servers have one", ours-unchecked, ours)
	}
	return slots
}

// file judges what only the configuration tells.
func (d *doctor) file(at, backend, version string, f haproxy.BackendFacts, slots []haproxy.ServerFacts, socket string, config *haproxy.File) {
	p := config.Proxy(backend)
	if p == nil {
		d.unknown(at+" configuration", errors.New("--config does not have the backend"), "give every file that HAProxy reads")
		return
	}
	d.add(at+" redispatch", worst(!p.Options["redispatch"], false), "a request to an instance that has just died fails instead of going to another", "option redispatch 1", "%s", set(p.Options["redispatch"]))
	if p.HTTP {
		senders := config.Senders(backend)
		closing := !slices.ContainsFunc(senders, func(s haproxy.Proxy) bool { return s.HTTP && !s.Options["idle-close-on-response"] })
		if len(senders) == 0 {
			d.unknown(at+" idle close", errors.New("no frontend names the backend"), "option idle-close-on-response, in defaults")
		} else {
			d.add(at+" idle close", worst(!closing, false), "at a reload the old process closes connections that a request is already on", "option idle-close-on-response, in defaults", "%s", set(closing))
		}
	}
	if p.Private() && len(slots) > 0 {
		modern, err := atLeast(version, 3, 0)
		d.add(at+" reuse", worst(err == nil && !modern && f.Dynamics == haproxy.No, err != nil || !modern), "before 3.0 a client's connection stays with the instance that a slot had before, and no command ends that",
			"http-reuse safe, or HAProxy 3.0; or give lbsync --config too: it then adds a server in the place of a used slot, where the balance algorithm takes one", "http-reuse never")
	}
	foreign := slices.ContainsFunc(p.Templates, func(t haproxy.Template) bool { return t.Host != lbsync.SlotHost })
	if foreign && len(slots) == 0 {
		d.add(at+" templates", stateBad, "rollcall takes a server for a slot only if its host says so", "server-template … "+lbsync.SlotHost+":1 …", "no template of host %s", lbsync.SlotHost)
	}
	if len(slots) == 0 {
		return // nothing that a state file could keep
	}
	for _, t := range p.Templates {
		last, first, _ := strings.Cut(t.InitAddr, ",")
		if _, err := netip.ParseAddr(first); t.Host == lbsync.SlotHost && (last != "last" || err != nil) {
			d.add(at+" init-addr", stateBad, "without `last` a reload forgets the addresses, and without an address to begin with none can be set", "init-addr last,127.0.0.1", "%s", cmp.Or(t.InitAddr, "none"))
		}
	}
	d.stateFile(at+" state file", backend, f, socket, p, config)
}

func set(yes bool) string {
	if yes {
		return "set"
	}
	return "not set"
}

func (d *doctor) stateFile(check, backend string, f haproxy.BackendFacts, socket string, p *haproxy.Proxy, config *haproxy.File) {
	const why = "a reload begins with empty slots, until lbsync has filled them"
	path, err := config.StatePath(p)
	if err != nil {
		d.unknown(check, err, "server-state-base /var/lib/haproxy")
		return
	}
	if path == "" {
		d.add(check, stateBad, why, "server-state-file /var/lib/haproxy/state in global, and load-server-state-from-file global in defaults or in the backend", "none is loaded")
		return
	}
	dump := fmt.Sprintf(`echo "show servers state" | socat - %s > %s, before each reload`, socket, path)
	serving := 0
	for _, s := range f.Servers {
		if s.Slot && s.Admin != lbsync.Maint {
			serving++
		}
	}
	switch kept, err := haproxy.Kept(path, backend, f.Servers); {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, haproxy.ErrStateForm):
		d.add(check, stateBad, why, dump, "%v", err)
	case err != nil:
		d.unknown(check, err, "run doctor as a user that can read it")
	default:
		d.add(check, worst(false, kept < serving), "slots that it does not have begin empty, unless your reload writes it first", dump, "%s has %d of %d servers as they are now", path, kept, serving)
	}
}
