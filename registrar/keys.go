package registrar

import (
	"fmt"
	"strings"
)

// Protocol is the number of what is in the keys and what the scripts expect of each
// other. Reapers write it to the config, and never a lower one: whoever changes the
// meaning of what others write looks there whether all can know it.
const Protocol = 1

// DefaultNamespace begins every key unless the operator says otherwise.
const DefaultNamespace = "rollcall"

// Keys spells every key and the channel of one namespace. All keys of one
// service carry the service's name in braces, so a Redis Cluster keeps them in
// one slot.
//
// In a Cluster one script reaches one slot only, so each service is a register
// of its own there: what Of(service) calls epoch, config, version and so on are
// keys in its slot. Without it these are the whole register's: the set of all
// services, and the config that new services copy.
type Keys struct {
	ns      string
	cluster bool
	scope   Service // in a Cluster: whose registry this is; empty = the whole one
}

// NewKeys returns the keys of namespace ns (lower-case letters, digits, '.',
// '_' and '-', at most 63).
func NewKeys(ns string) (Keys, error) {
	if !isName(ns) {
		return Keys{}, fmt.Errorf("namespace %q: want %s", ns, nameForm)
	}
	return Keys{ns: ns}, nil
}

// Of returns the keys of the register that s is in: outside of a Cluster, the
// only one.
func (k Keys) Of(s Service) Keys {
	if k.cluster && k.scope == "" {
		k.scope = s
	}
	return k
}

func (k Keys) Services() string  { return k.shared("services") }  // SET of service names
func (k Keys) Version() string   { return k.shared("version") }   // STRING, the global version
func (k Keys) Epoch() string     { return k.shared("epoch") }     // STRING, random id, set once
func (k Keys) Config() string    { return k.shared("config") }    // HASH: ttl_ms, interval_ms, slow_ms, slow_at; protocol; max_instances, max_services, 20000 if not there; services, that have instances
func (k Keys) Changes() string   { return k.ns + ":changes" }     // channel: "<global> <service> <service version>"
func (k Keys) Balancers() string { return k.shared("balancers") } // ZSET: balancer id, score = last seen, unix ms

// Owners is a HASH: balancer id → the process that acknowledges as it, "<process>
// <first ms> <last ms> <ms>": the last is when two were seen to.
func (k Keys) Owners() string { return k.shared("balancer-owners") }

// Events is a STREAM, the log of changes: at, service, addr, what, version, id, why.
func (k Keys) Events() string { return k.shared("events") }

// OverrideDue is a ZSET: "<service> a <addr>" for an override in Admin, "<service> r
// <addr>" for one in Bound, score = when a reaper is to look at it, unix ms.
func (k Keys) OverrideDue() string { return k.shared("override-due") }

func (k Keys) Instances(s Service) string { return k.of(s, "instances") } // ZSET: addr, score = last heartbeat, unix ms
func (k Keys) Meta(s Service) string      { return k.of(s, "meta") }      // HASH: addr → JSON of Meta
func (k Keys) Admin(s Service) string     { return k.of(s, "admin") }     // HASH: addr → JSON of Admin, for whoever is there
func (k Keys) Bound(s Service) string     { return k.of(s, "bound") }     // HASH: addr → JSON of Admin, for one registration, its id
func (k Keys) Gone(s Service) string      { return k.of(s, "gone") }      // HASH: addr → "<reason> <ms> <token>"
func (k Keys) GoneAt(s Service) string    { return k.of(s, "gone-at") }   // ZSET: addr, score = unix ms
func (k Keys) Changed(s Service) string   { return k.of(s, "changed") }   // ZSET: addr, score = service version
func (k Keys) Applied(s Service) string   { return k.of(s, "applied") }   // HASH: balancer id → service version it has applied

// Seen is a HASH of one balancer: addr → JSON, backend → ServerState; up → JSON, backend →
// how many servers, ours and others', are Serving; at → the time of its last look at all
// servers, unix ms; version → the service version that this is not older than; counts →
// JSON, backend → Standing. It expires.
func (k Keys) Seen(s Service, balancer string) string { return k.of(s, "seen:"+balancer) }

func (k Keys) ServiceVersion(s Service) string {
	return k.of(s, "version") // STRING, never deleted
}

// LetGo is a STRING: while it is there, no held instance is let go. It expires.
func (k Keys) LetGo() string { return k.shared("let-go") }

// Quiet is a STRING: while it is there, changes are not announced one by one. It
// holds the mark of who announces them then, or nothing. It expires.
func (k Keys) Quiet() string { return k.shared("quiet") }

// Reapers is a HASH: reaper id → JSON of ReaperStatus with its time, "at".
func (k Keys) Reapers() string { return k.shared("reapers") }

// Reaper is a STRING, the last pulse token of one reaper; it expires.
func (k Keys) Reaper(id string) string { return k.shared("reaper:" + id) }

// Docker is a STRING, the lease of an agent: its holder. It expires. In a Cluster it
// is the whole register's, and so are the ledgers.
func (k Keys) Docker(id string) string { return k.ns + ":docker:" + id }

// Follows is a HASH: balancer id → "<unix ms> <JSON, service → backends>", what it
// follows. In a Cluster it is the whole register's.
func (k Keys) Follows() string { return k.ns + ":balancer-follows" }

// DockerAddrs is a SET, the ledger of an agent, by its mark: "<service> <addr>", where
// it may have registrations. It expires.
func (k Keys) DockerAddrs(mark string) string { return k.ns + ":docker-addrs:" + mark }

func (k Keys) of(s Service, what string) string {
	if s == canary && k.scope != "" { // it beats where the service does
		s, what = k.scope, string(canary)+":"+what
	}
	return k.ns + ":{" + string(s) + "}:" + what
}

// shared spells a key of the whole register.
func (k Keys) shared(what string) string {
	if k.scope != "" {
		return k.of(k.scope, what)
	}
	return k.ns + ":" + what
}

// kind returns the Redis type that key must have and the service that it is of,
// if it is of one. The type is empty for a key that nothing of rollcall owns.
func (k Keys) kind(key string) (svc Service, typ string) {
	name, what, braces := strings.Cut(strings.TrimPrefix(key, k.ns+":{"), "}:")
	svc = Service(name)
	braces = braces && key == k.ns+":{"+name+"}:"+what
	switch {
	case strings.HasPrefix(key, k.Docker("")):
		return "", "string"
	case strings.HasPrefix(key, k.DockerAddrs("")):
		return "", "set"
	case key == k.Follows():
		return "", "hash"
	}
	if k.cluster && k.scope == "" {
		switch {
		case key == k.Services():
			return "", "set"
		case key == k.Config():
			return "", "hash"
		case !braces:
			return "", "" // all else is of a service
		}
		if _, typ = k.Of(svc).kind(key); typ == "" {
			return "", ""
		}
		return svc, typ
	}
	switch key {
	case k.Services():
		return "", "set"
	case k.Version(), k.Epoch(), k.Quiet(), k.LetGo():
		return "", "string"
	case k.Config(), k.Reapers(), k.Owners():
		return "", "hash"
	case k.Balancers(), k.OverrideDue():
		return "", "zset"
	case k.Events():
		return "", "stream"
	}
	if strings.HasPrefix(key, k.Reaper("")) {
		return "", "string"
	}
	if !braces {
		return "", ""
	}
	for _, s := range []Service{svc, canary} {
		switch key {
		case k.Instances(s), k.GoneAt(s), k.Changed(s):
			return svc, "zset"
		case k.Meta(s), k.Admin(s), k.Bound(s), k.Gone(s), k.Applied(s):
			return svc, "hash"
		case k.ServiceVersion(s):
			return svc, "string"
		}
	}
	if strings.HasPrefix(what, "seen:") {
		return svc, "hash"
	}
	return "", ""
}

// read are the keys of read.lua.
func (k Keys) read(s Service) []string {
	return []string{k.Epoch(), k.Config(), k.Instances(s), k.Meta(s), k.Admin(s), k.Gone(s), k.Changed(s), k.ServiceVersion(s), k.Bound(s)}
}

// overrides are the keys of admin.lua and overrides.lua beside those of change.
func (k Keys) overrides(s Service) []string { return []string{k.Bound(s), k.OverrideDue()} }

// change lists the keys of every script that changes one service, in the order
// that lua/lib.lua names them: with a script's own before the last.
func (k Keys) change(s Service, own ...string) []string {
	version := k.Version()
	if k.scope != "" {
		version = k.ServiceVersion(s) // a Cluster's service has one counter, and its canary another
	}
	keys := append([]string{
		k.Instances(s), k.Meta(s), k.Admin(s), k.Gone(s), k.GoneAt(s), k.Changed(s), k.ServiceVersion(s),
		k.Services(), version, k.Epoch(), k.Config(), k.Quiet(),
	}, own...)
	return append(keys, k.Events())
}
