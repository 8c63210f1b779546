package docker

import (
	"cmp"
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/network"

	"rollcall/registrar"
)

// place says where containers are reached, and which of them are registered.
type place struct {
	advertise netip.Addr          // of ports that are published on every address of the host
	internal  bool                // reached at the containers' own addresses
	network   string              // with internal: in this network; empty = the first by name
	explicit  bool                // only what has a SERVICE_NAME
	services  []registrar.Service // only these; empty = every one
	zone      string              // of all of them
}

// want is one registration that a container is to have.
type want struct {
	service registrar.Service
	addr    netip.AddrPort
	port    string // the container's own
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

// tokenLen is how long a token is: as a rand.Text.
const tokenLen = 26

// token is the same each time for the same life of the same container, so that
// an agent that is restarted goes on where it was.
func (w want) token(f facts) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %d %s %s", f.id, f.started.UnixNano(), w.service, w.addr))
	return base32.StdEncoding.EncodeToString(sum[:])[:tokenLen]
}

// check is how the agent itself looks after the app; the zero check is none.
type check struct {
	url               string   // as health.Parse takes it
	command           []string // run in the container, in the place of url
	interval, timeout time.Duration
}

// plan returns what a container is to be registered as, in the order of its ports,
// and what its owner should know: which of its labels are wrong, and why it, or a
// port of it, is left out. A mistake in an optional label costs that label alone.
// UDP ports count for nothing: HAProxy has no use for them.
func (p place) plan(f facts) (wants []want, remarks []remark) {
	type port struct {
		number uint16
		text   string
		addrs  []netip.AddrPort
		why    string // there are no addrs
	}
	var ports []port
	reachable := 0
	for _, n := range f.exposed {
		if n.Proto() != network.TCP {
			continue
		}
		addrs, why := p.addrs(f, n)
		if len(addrs) > 0 {
			reachable++
		}
		ports = append(ports, port{n.Num(), n.Port(), addrs, why})
	}
	slices.SortFunc(ports, func(a, b port) int { return cmp.Compare(a.number, b.number) })
	var missed, named []string // why ports cannot be reached: all, and those that have a name of their own
	asked := false
	for _, n := range ports {
		a := readAttrs(f, n.text)
		if a.all["ignore"] != "" {
			continue
		}
		asked = asked || a.all["name"] != ""
		if len(n.addrs) == 0 {
			missed = append(missed, "port "+n.text+" "+n.why)
			if a.ofPort["name"] {
				named = append(named, missed[len(missed)-1])
			}
			continue
		}
		for _, addr := range n.addrs {
			w, told := p.want(f, a, n.text, addr, reachable > 1)
			if w.service != "" {
				wants = append(wants, w)
			}
			remarks = append(remarks, told...)
		}
	}
	remarks = append(remarks, p.strays(f)...)
	switch {
	case len(wants) > 0, slices.ContainsFunc(remarks, func(r remark) bool { return r.kind == leftOut }):
		if len(named) > 0 { // an image may name all of its ports, and who runs it publish some
			remarks = append(remarks, remark{kind: remarked, text: strings.Join(named, "; ")})
		}
	case len(ports) == 0:
		a := readAttrs(f, "")
		if a.all["ignore"] == "" {
			remarks = append(remarks, leaves(a.anyName, p.portless(f)))
		}
	case len(missed) > 0:
		remarks = append(remarks, leaves(asked, strings.Join(missed, "; ")))
	case p.explicit && !asked:
		remarks = append(remarks, leaves(false, "it has no SERVICE_NAME, which --explicit wants"))
	}
	return wants, distinct(remarks)
}

// portless says why a container without a TCP port is left out.
func (p place) portless(f facts) string {
	switch {
	case len(f.exposed) > 0:
		return "it has UDP ports only, for which HAProxy has no use"
	case f.hostNetwork && !p.internal:
		return "it is on the host's network, and nothing says which port is its: EXPOSE it in the image, or run it with --expose PORT"
	case p.internal:
		return "it exposes no port: EXPOSE it in the image, or run it with --expose PORT"
	}
	return "it has no port: publish one, as with docker run -p PORT"
}

// addrs returns where a port of the container can be reached by others, or why it
// cannot.
func (p place) addrs(f facts, port network.Port) (addrs []netip.AddrPort, why string) {
	switch {
	case p.internal:
		name := p.network
		if name == "" && len(f.networks) > 0 {
			name = slices.Min(slices.Collect(maps.Keys(f.networks)))
		}
		if ips := f.networks[name]; len(ips) > 0 {
			return []netip.AddrPort{netip.AddrPortFrom(ips[0], port.Num())}, ""
		}
		switch {
		case f.hostNetwork:
			return nil, "has no address of its own: the container is on the host's network, and --internal registers containers' own addresses"
		case len(f.networks) == 0:
			return nil, "has no address: the container is in no network"
		}
		return nil, fmt.Sprintf("is not in the network %s of --network: the container is in %s", name, strings.Join(slices.Sorted(maps.Keys(f.networks)), ", "))
	case f.hostNetwork:
		return []netip.AddrPort{netip.AddrPortFrom(p.advertise, port.Num())}, ""
	}
	for _, b := range f.published[port] {
		switch ip := b.Addr(); {
		case !ip.IsValid() || ip.IsUnspecified():
			b = netip.AddrPortFrom(p.advertise, b.Port())
		case ip.IsLoopback() && !p.advertise.IsLoopback():
			why = fmt.Sprintf("is published on %s only, which is for this host alone: publish it on %s", ip, p.advertise)
			continue
		}
		if !slices.Contains(addrs, b) { // IPv4 and IPv6 of every address are two bindings
			addrs = append(addrs, b)
		}
	}
	slices.SortFunc(addrs, netip.AddrPort.Compare)
	switch {
	case len(addrs) > 0:
		why = ""
	case why == "":
		why = fmt.Sprintf("is not published: docker run -p %s, or start the agent with --internal", port.Port())
	}
	return addrs, why
}

// want reads what the container says of one port, at one address. Without a
// service the port is not wanted. grouped: it has more ports than this one.
func (p place) want(f facts, a attrs, port string, addr netip.AddrPort, grouped bool) (want, []remark) {
	if a.all["name"] == "" && p.explicit {
		return want{}, nil
	}
	if _, err := registrar.ParseAddr(addr.String()); err != nil {
		return want{}, []remark{{kind: leftOut, text: fmt.Sprintf("port %s: %v", port, err)}}
	}
	service, remarks := p.service(f, a, port, grouped)
	if service == "" {
		return want{}, remarks
	}
	w := want{service: service, addr: addr, port: port}
	var told []remark
	w.weight, told = a.weight()
	remarks = append(remarks, told...)
	w.check, told = a.check(addr)
	remarks = append(remarks, told...)
	w.tags, told = a.tags()
	remarks = append(remarks, told...)
	w.tags["container"] = f.shortID()
	if dropped := p.fit(w); len(dropped) > 0 {
		remarks = append(remarks, remark{text: fmt.Sprintf("all metadata may have %d bytes as JSON; registered without its largest tags: %s",
			registrar.MaxMeta, strings.Join(dropped, ", "))})
	}
	return w, remarks
}
