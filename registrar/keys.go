package registrar

import (
	"fmt"
	"regexp"
	"strings"
)

// DefaultNamespace begins every key unless the operator says otherwise.
const DefaultNamespace = "rollcall"

var namespacePattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9._-]{0,62})$`)

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
	if !namespacePattern.MatchString(ns) {
		return Keys{}, fmt.Errorf("namespace %q: want %s", ns, namespacePattern)
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
func (k Keys) Config() string    { return k.shared("config") }    // HASH: ttl_ms, interval_ms; max_instances, max_services, 10000 if not there
func (k Keys) Changes() string   { return k.ns + ":changes" }     // channel: "<global> <service> <service version>"
func (k Keys) Balancers() string { return k.shared("balancers") } // ZSET: balancer id, score = last seen, unix ms

func (k Keys) Instances(s Service) string { return k.of(s, "instances") } // ZSET: addr, score = last heartbeat, unix ms
func (k Keys) Meta(s Service) string      { return k.of(s, "meta") }      // HASH: addr → JSON of Meta
func (k Keys) Admin(s Service) string     { return k.of(s, "admin") }     // HASH: addr → JSON of Admin
func (k Keys) Gone(s Service) string      { return k.of(s, "gone") }      // HASH: addr → "<reason> <ms> <token>"
func (k Keys) GoneAt(s Service) string    { return k.of(s, "gone-at") }   // ZSET: addr, score = unix ms
func (k Keys) Changed(s Service) string   { return k.of(s, "changed") }   // ZSET: addr, score = service version
func (k Keys) Applied(s Service) string   { return k.of(s, "applied") }   // HASH: balancer id → service version it has applied
func (k Keys) ServiceVersion(s Service) string {
	return k.of(s, "version") // STRING, never deleted
}

// LetGo is a STRING: while it is there, no held instance is let go. It expires.
func (k Keys) LetGo() string { return k.shared("let-go") }

// Reapers is a HASH: reaper id → JSON of ReaperStatus with its time, "at".
func (k Keys) Reapers() string { return k.shared("reapers") }

// Reaper is a STRING, the last pulse token of one reaper; it expires.
func (k Keys) Reaper(id string) string { return k.shared("reaper:" + id) }

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
	switch key {
	case k.Services():
		return "", "set"
	case k.Version(), k.Epoch():
		return "", "string"
	case k.Config(), k.Reapers():
		return "", "hash"
	case k.Balancers():
		return "", "zset"
	}
	if strings.HasPrefix(key, k.Reaper("")) {
		return "", "string"
	}
	name, what, ok := strings.Cut(strings.TrimPrefix(key, k.ns+":{"), "}:")
	svc = Service(name)
	if !ok || key != k.of(svc, what) {
		return "", ""
	}
	switch key {
	case k.Instances(svc), k.GoneAt(svc), k.Changed(svc):
		return svc, "zset"
	case k.Meta(svc), k.Admin(svc), k.Gone(svc), k.Applied(svc):
		return svc, "hash"
	case k.ServiceVersion(svc):
		return svc, "string"
	}
	if strings.HasPrefix(what, "fence:") {
		return svc, "string"
	}
	return "", ""
}

// change lists the keys of every script that changes one service, in the order
// that lua/lib.lua names them.
func (k Keys) change(s Service) []string {
	version := k.Version()
	if k.scope != "" {
		version = k.ServiceVersion(s) // a Cluster's service has one counter, and its canary another
	}
	return []string{
		k.Instances(s), k.Meta(s), k.Admin(s), k.Gone(s), k.GoneAt(s), k.Changed(s), k.ServiceVersion(s),
		k.Services(), version, k.Epoch(), k.Config(),
	}
}
