package docker

import (
	"cmp"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/network"

	"rollcall/registrar"
	"rollcall/registrar/health"
)

// place says where containers are reached, and which of them are registered.
type place struct {
	advertise netip.Addr          // of ports that are published on every address of the host
	internal  bool                // reached at the containers' own addresses
	network   string              // with internal: in this network; empty = the first by name
	explicit  bool                // only what has a SERVICE_NAME
	services  []registrar.Service // only these; empty = every one
}

// want is one registration that a container is to have.
type want struct {
	service registrar.Service
	addr    netip.AddrPort
	weight  int
	tags    map[string]string
	check   check
}

// key tells the registrations of a container apart.
type key struct {
	service registrar.Service
	addr    netip.AddrPort
}

func (w want) key() key { return key{w.service, w.addr} }

// token is the same each time for the same life of the same container, so that
// an agent that is restarted goes on where it was.
func (w want) token(f facts) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %d %s %s", f.id, f.started.UnixNano(), w.service, w.addr))
	return base32.StdEncoding.EncodeToString(sum[:])[:26] // as long as a rand.Text
}

// check is how the agent itself looks after the app; the zero check is none.
type check struct {
	url               string   // as health.Parse takes it
	command           []string // run in the container, in the place of url
	interval, timeout time.Duration
}

// plan returns what a container is to be registered as, in the order of its
// ports, and an error for what cannot be. A container that has no ports, or that
// nobody wants to be registered, has neither.
func (p place) plan(f facts) ([]want, error) {
	type port struct {
		network.Port
		addrs []netip.AddrPort
	}
	var ports []port
	for _, n := range f.exposed {
		if addrs := p.addrs(f, n); len(addrs) > 0 {
			ports = append(ports, port{n, addrs})
		}
	}
	slices.SortFunc(ports, func(a, b port) int {
		return cmp.Or(cmp.Compare(a.Num(), b.Num()), cmp.Compare(a.Proto(), b.Proto()))
	})
	var wants []want
	var errs []error
	for _, n := range ports {
		if n.Proto() != network.TCP {
			continue // HAProxy has no use for it
		}
		for _, addr := range n.addrs {
			w, err := p.want(f, n.Port.Port(), addr, len(ports) > 1)
			switch {
			case err != nil:
				errs = append(errs, fmt.Errorf("port %s: %w", n.Port.Port(), err))
			case w.service != "":
				wants = append(wants, w)
			}
		}
	}
	return wants, errors.Join(errs...)
}

// addrs returns where a port of the container can be reached by others.
func (p place) addrs(f facts, port network.Port) []netip.AddrPort {
	switch {
	case p.internal:
		name := p.network
		if name == "" && len(f.networks) > 0 {
			name = slices.Min(slices.Collect(maps.Keys(f.networks)))
		}
		if ips := f.networks[name]; len(ips) > 0 {
			return []netip.AddrPort{netip.AddrPortFrom(ips[0], port.Num())}
		}
		return nil
	case f.hostNetwork:
		return []netip.AddrPort{netip.AddrPortFrom(p.advertise, port.Num())}
	}
	var out []netip.AddrPort
	for _, b := range f.published[port] {
		switch ip := b.Addr(); {
		case !ip.IsValid() || ip.IsUnspecified():
			b = netip.AddrPortFrom(p.advertise, b.Port())
		case ip.IsLoopback() && !p.advertise.IsLoopback():
			continue // it is for this host alone
		}
		if !slices.Contains(out, b) { // IPv4 and IPv6 of every address are two bindings
			out = append(out, b)
		}
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	return out
}

// want reads what the container says of one port, at one address. Without a
// service the port is not wanted. grouped: it has more ports than this one.
func (p place) want(f facts, port string, addr netip.AddrPort, grouped bool) (want, error) {
	a := readAttrs(f, port)
	if a.all["ignore"] != "" {
		return want{}, nil
	}
	name := a.all["name"]
	if name == "" {
		if p.explicit {
			return want{}, nil
		}
		name = imageName(f.image)
	}
	if grouped && !a.ofPort["name"] {
		name += "-" + port
	}
	w := want{addr: addr, weight: registrar.DefaultWeight, tags: a.tags()}
	w.tags["container"] = f.shortID()
	if _, err := registrar.ParseAddr(addr.String()); err != nil {
		return want{}, err
	}
	var err error
	if v := a.all["weight"]; v != "" {
		if w.weight, err = strconv.Atoi(v); err == nil {
			err = registrar.CheckWeight(w.weight)
		}
		if err != nil {
			return want{}, fmt.Errorf("SERVICE_WEIGHT: %w", err)
		}
	}
	if w.check, err = a.check(addr); err != nil {
		return want{}, err
	}
	if w.service, err = registrar.ParseService(name); err != nil {
		return want{}, err
	}
	if len(p.services) > 0 && !slices.Contains(p.services, w.service) {
		return want{}, fmt.Errorf("service %s is none of those that are let in", w.service)
	}
	return w, nil
}

// imageName is what a service is called that has no name: the last part of the
// image's, without its tag and digest.
func imageName(image string) string {
	name, _, _ := strings.Cut(path.Base(image), "@")
	name, _, _ = strings.Cut(name, ":")
	return name
}

// attrs are what a container says of one port, by lower-case names without
// SERVICE_: variables first, labels over them, those of this port over both.
type attrs struct {
	all      map[string]string
	ofPort   map[string]bool // said of this very port
	labelled map[string]bool // said by a label
}

func readAttrs(f facts, port string) attrs {
	a := attrs{map[string]string{}, map[string]bool{}, map[string]bool{}}
	add := func(name, value string, label bool) {
		name, ours := strings.CutPrefix(name, "SERVICE_")
		if !ours {
			return
		}
		name = strings.ToLower(name)
		number, rest, found := strings.Cut(name, "_")
		_, err := strconv.Atoi(number)
		switch ofPort := found && err == nil; {
		case ofPort && number != port, !ofPort && a.ofPort[name]:
			return
		case ofPort:
			name = rest
			a.ofPort[name] = true
		}
		a.all[name], a.labelled[name] = value, label
	}
	for _, kv := range f.env {
		name, value, _ := strings.Cut(kv, "=")
		add(name, value, false)
	}
	for _, name := range slices.Sorted(maps.Keys(f.labels)) {
		add(name, f.labels[name], true)
	}
	return a
}

// tags are SERVICE_TAGS, split at commas (k=v, or k for k=true), SERVICE_ID as
// id, and every label that means nothing else. A variable of that kind is no tag:
// it may be the app's own, and a secret.
func (a attrs) tags() map[string]string {
	tags := map[string]string{}
	for name, value := range a.all {
		switch {
		case name == "id":
			tags[name] = value
		case name == "name", name == "tags", name == "weight", name == "ignore", strings.HasPrefix(name, "check_"):
		case a.labelled[name]:
			tags[name] = value
		}
	}
	for t := range strings.SplitSeq(a.all["tags"], ",") {
		k, v, found := strings.Cut(strings.TrimSpace(t), "=")
		if !found {
			v = "true"
		}
		if k != "" {
			tags[k] = v
		}
	}
	return tags
}

// check reads SERVICE_CHECK_*. SCRIPT, which would run a container's word on the
// host, is refused; TTL and INITIAL_STATUS have no meaning here.
func (a attrs) check(addr netip.AddrPort) (c check, err error) {
	if a.all["check_script"] != "" {
		return c, errors.New("SERVICE_CHECK_SCRIPT: want SERVICE_CHECK_CMD, which runs in the container")
	}
	ways := 0
	for _, way := range []string{"check_http", "check_https", "check_tcp", "check_cmd"} {
		v := a.all[way]
		if v == "" {
			continue
		}
		ways++
		switch scheme := strings.TrimPrefix(way, "check_"); scheme {
		case "cmd":
			if c.command = strings.Fields(v); len(c.command) == 0 {
				return c, errors.New("SERVICE_CHECK_CMD: no command")
			}
		case "tcp":
			c.url = "tcp://" + addr.String()
		case "https", "http":
			if scheme == "https" && a.all["check_tls_skip_verify"] == "true" {
				scheme = "https+insecure"
			}
			c.url = scheme + "://" + addr.String() + "/" + strings.TrimPrefix(v, "/")
		}
	}
	if ways == 0 {
		return check{}, nil
	}
	if ways > 1 {
		return c, errors.New("want one of SERVICE_CHECK_HTTP, _HTTPS, _TCP and _CMD")
	}
	c.interval, c.timeout = health.DefaultInterval, health.DefaultTimeout
	for name, d := range map[string]*time.Duration{"check_interval": &c.interval, "check_timeout": &c.timeout} {
		if v := a.all[name]; v != "" {
			if *d, err = time.ParseDuration(v); err != nil {
				return c, fmt.Errorf("SERVICE_%s: %w", strings.ToUpper(name), err)
			}
		}
	}
	return c, nil
}
