package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/rs/zerolog"
	"github.com/urfave/cli/v2"

	"rollcall/registrar"
)

// Of --addr :PORT, and for `docker` without --advertise, one of this machine's
// addresses is chosen. The order depends on the machine's addresses and routes
// and on where Redis is, and not on whether Redis answers, so that all sidecars of
// a host choose the same one:
//
//  1. With --interface only addresses of that interface count, whatever it is.
//  2. The source of the connection to Redis: of the first of the URL's hosts, in
//     the URL's order, and the first of its addresses, IPv4 before IPv6 and the
//     lower one first, that gives one that may be chosen.
//  3. The source of the default route, of IPv4 and then of IPv6.
//  4. The rest: IPv4 before IPv6, private before public, the interface of the
//     lower index, the lower address.
//
// Without --interface an address is not chosen that others cannot be thought to
// reach: a loopback or link-local one; one of a tunnel (a point-to-point
// interface such as of a VPN, or an overlay's end); one of a bridge, of the host's
// end of a container's cable or of the loopback interface, unless the default
// route goes by it, as it does on a host whose uplink is in a bridge. So a Redis in
// a container of this host does not have docker0's address advertised.
//
// An address of Redis that is this machine's own may move, as virtual addresses
// do: in its place the first address of the interface that has it is chosen.

// linkKind is what matters here of what an interface is.
type linkKind int

const (
	linkPlain    linkKind = iota
	linkLoopback          // with linkBridge and linkCable: chosen only if the default route goes by it
	linkBridge
	linkCable // the host's end of a container's veth
	linkTunnel
)

var linkKinds = [...]string{linkPlain: "an interface as others", linkLoopback: "the loopback interface", linkBridge: "a bridge", linkCable: "a container's cable", linkTunnel: "a tunnel or point-to-point"}

func (k linkKind) String() string { return linkKinds[k] }

// localAddr is one address of an interface that is up.
type localAddr struct {
	name  string
	index int
	ip    netip.Addr
	bits  int // of the prefix
	kind  linkKind
	// spare addresses are those that connections from here do not have, or not
	// for long: secondary, temporary, deprecated, or not yet known to be unique.
	spare bool
}

// alone tells that the address has no network of its own, as a virtual one.
func (a localAddr) alone() bool { return a.ip.Is4() && a.bits == 32 }

func (a localAddr) String() string { return fmt.Sprintf("%s of %s", a.ip, a.name) }

// source is this machine's end of a connection that was routed and not made.
type source struct {
	redis    string // its HOST:PORT; empty = beyond every network that this machine knows
	ip       netip.Addr
	ofItself bool // Redis has this very address
}

func (s source) String() string {
	if s.redis == "" {
		return "the source of the default route"
	}
	return "the source of the connection to Redis " + s.redis
}

// choice is the address that was chosen, and why.
type choice struct {
	localAddr
	why string
	// tunnel is what Redis is reached by, if that is a tunnel, which was passed
	// over; else empty.
	tunnel string
	// others could as well have been chosen, for all that routes say; nil unless
	// there are none.
	others []localAddr
}

// MarshalZerologObject implements zerolog.LogObjectMarshaler. An address that was
// given needs no reason.
func (c choice) MarshalZerologObject(e *zerolog.Event) {
	if c.ip.IsValid() {
		e.Str("interface", c.name).Str("why", c.why)
	}
}

// choose returns the same address of all each time that the sources are the same,
// in the order that is above; or of the interface called name, if that is not
// empty. The sources are in that order too.
func choose(all []localAddr, name string, sources []source) (choice, error) {
	var fit, passed []localAddr
	known := false
	for _, a := range all {
		if name != "" && a.name != name {
			continue
		}
		known = true
		if !a.ip.IsLinkLocalUnicast() && (name != "" || !a.ip.IsLoopback()) {
			fit = append(fit, a)
		}
	}
	find := func(ip netip.Addr) (localAddr, bool) {
		i := slices.IndexFunc(fit, func(a localAddr) bool { return a.ip == ip })
		if i < 0 {
			return localAddr{}, false
		}
		return fit[i], true
	}
	uplink := func(a localAddr) bool {
		return slices.ContainsFunc(sources, func(s source) bool {
			b, ok := find(s.ip)
			return s.redis == "" && ok && (a.ip == b.ip || a.index == b.index && a.kind != linkLoopback)
		})
	}
	may := func(a localAddr) bool {
		return name != "" || a.kind == linkPlain || a.kind != linkTunnel && uplink(a)
	}
	c := choice{}
	for _, s := range sources {
		a, ok := find(s.ip)
		if !ok {
			continue
		}
		why := s.String()
		if s.ofItself {
			if a, ok = firstOf(fit, a.index, sources); !ok {
				continue
			}
			why = "of the interface that has Redis' address " + s.redis
		}
		if !may(a) {
			if s.redis != "" && a.kind == linkTunnel && c.tunnel == "" {
				c.tunnel = fmt.Sprintf("Redis %s is reached from %s, which is %s", s.redis, a, a.kind)
			}
			continue
		}
		c.localAddr, c.why = a, why
		return c.because(name), nil
	}
	rest := slices.Clone(fit)
	rest = slices.DeleteFunc(rest, func(a localAddr) bool {
		if may(a) {
			return false
		}
		passed = append(passed, a)
		return true
	})
	switch {
	case name != "" && !known:
		return choice{}, fmt.Errorf("--interface %s: there is none that is up and has an address", name)
	case name != "" && len(rest) == 0:
		return choice{}, fmt.Errorf("--interface %s: it has no address that another host could reach; name one with --advertise", name)
	case len(rest) == 0 && len(passed) > 0:
		return choice{}, fmt.Errorf("no interface has an address that another host could reach for sure: %s is of %s; name it with --interface %s, or another address with --advertise", passed[0], passed[0].kind, passed[0].name)
	case len(rest) == 0:
		return choice{}, errors.New("no interface has an address that another host could reach; name one with --advertise")
	}
	slices.SortFunc(rest, compareAddrs)
	c.localAddr, c.why = rest[0], "the first, for want of a route to Redis and of a default route"
	c.others = slices.DeleteFunc(rest[1:], func(a localAddr) bool { return a.index == c.index })
	return c.because(name), nil
}

// because completes why.
func (c choice) because(name string) choice {
	switch {
	case name != "":
		c.why, c.tunnel, c.others = "--interface", "", nil
	case c.tunnel != "":
		c.why += "; " + c.tunnel
	}
	return c
}

// firstOf returns the address of the interface that is its own rather than one
// that may move from machine to machine, if it can be told.
func firstOf(fit []localAddr, index int, sources []source) (localAddr, bool) {
	own := slices.DeleteFunc(slices.Clone(fit), func(a localAddr) bool {
		isDefault := slices.ContainsFunc(sources, func(s source) bool { return s.redis == "" && s.ip == a.ip })
		return a.index != index || !isDefault && (a.spare || a.alone())
	})
	if len(own) == 0 {
		return localAddr{}, false
	}
	return slices.MinFunc(own, compareAddrs), true
}

func compareAddrs(a, b localAddr) int {
	x, y := a.ip.As16(), b.ip.As16()
	return cmp.Or(last(a.spare, b.spare), last(!a.ip.Is4(), !b.ip.Is4()), last(!a.ip.IsPrivate(), !b.ip.IsPrivate()),
		cmp.Compare(a.index, b.index), last(a.alone(), b.alone()), bytes.Compare(x[:], y[:]))
}

// last compares so that those that are come last.
func last(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

const (
	// lookUpTimeout bounds how long all names of Redis' hosts together may take.
	lookUpTimeout = 3 * time.Second
	// lookUpEvery is how old an answer may get: a name may be moved.
	lookUpEvery = 5 * time.Minute
)

// beyond are addresses whose route is the default one: those of a.root-servers.net.
// Nothing is sent there. Documentation's addresses would not do: routers and
// hosts have them refused, and test networks have them.
var beyond = []netip.AddrPort{netip.MustParseAddrPort("198.41.0.4:53"), netip.MustParseAddrPort("[2001:503:ba3e::2:30]:53")}

// locator chooses this machine's address. It is for one goroutine at a time.
type locator struct {
	name  string   // --interface, or empty
	hosts []string // of Redis, HOST:PORT

	resolved map[string][]netip.Addr // names among hosts that have been resolved
	asked    time.Time               // when they were
}

// newLocator reads the flags --interface and --redis. A URL that is none is left
// for others to complain about.
func newLocator(c *cli.Context) *locator {
	hosts, _ := registrar.Hosts(c.String("redis"))
	return &locator{name: c.String("interface"), hosts: hosts}
}

// look chooses, by what addresses and routes are now. It waits for nothing but a
// resolver, for lookUpTimeout at most.
func (l *locator) look(ctx context.Context) (choice, []localAddr, error) {
	all, err := localAddrs()
	if err != nil {
		return choice{}, nil, err
	}
	c, err := choose(all, l.name, l.sources(ctx))
	return c, all, err
}

// sources asks for this machine's ends of connections to Redis, and of such as go
// by the default route.
func (l *locator) sources(ctx context.Context) (out []source) {
	l.resolve(ctx)
	for _, host := range l.hosts {
		name, portText, _ := net.SplitHostPort(host)
		port, err := strconv.ParseUint(portText, 10, 16)
		if err != nil {
			continue
		}
		for _, ip := range l.resolved[name] {
			if ip.IsLoopback() || ip.IsUnspecified() {
				continue // this machine, by an address that says nothing
			}
			to := netip.AddrPortFrom(ip, uint16(port))
			if from, ok := routed(ctx, to); ok {
				out = append(out, source{redis: to.String(), ip: from, ofItself: from == ip})
			}
		}
	}
	for _, to := range beyond {
		if from, ok := routed(ctx, to); ok {
			out = append(out, source{ip: from})
		}
	}
	return out
}

// resolve has the addresses of Redis' hosts, in their order, in resolved. An
// answer that does not come does not take away the one before.
func (l *locator) resolve(ctx context.Context) {
	fresh := time.Since(l.asked) < lookUpEvery
	ctx, cancel := context.WithTimeout(ctx, lookUpTimeout)
	defer cancel()
	if l.resolved == nil {
		l.resolved = map[string][]netip.Addr{}
	}
	for _, host := range l.hosts {
		name, _, _ := net.SplitHostPort(host)
		if fresh && len(l.resolved[name]) > 0 {
			continue
		}
		ips := []netip.Addr{}
		if ip, err := netip.ParseAddr(name); err == nil {
			ips = append(ips, ip)
		} else {
			ips, _ = net.DefaultResolver.LookupNetIP(ctx, "ip", name) // none: the default route has to do
		}
		for i := range ips {
			ips[i] = ips[i].Unmap()
		}
		slices.SortFunc(ips, func(a, b netip.Addr) int { return cmp.Or(last(!a.Is4(), !b.Is4()), a.Compare(b)) })
		if len(ips) > 0 {
			l.resolved[name] = ips
		}
	}
	if !fresh {
		l.asked = time.Now()
	}
}

// routed returns the address that a connection to there would have here. A UDP
// socket that is connected is routed, and sends nothing.
func routed(ctx context.Context, to netip.AddrPort) (netip.Addr, bool) {
	d := net.Dialer{Timeout: time.Second, Control: preferStable}
	conn, err := d.DialContext(ctx, "udp", to.String())
	if err != nil {
		return netip.Addr{}, false // there is no route
	}
	defer conn.Close()
	from, err := netip.ParseAddrPort(conn.LocalAddr().String())
	return from.Addr().Unmap().WithZone(""), err == nil
}

// located is the address to register, and how it is looked at again.
type located struct {
	addr    netip.AddrPort // of docker only the address
	choice  choice         // the zero choice: it was given
	locator *locator       // nil: it was given
}

// chooseAddr returns the address to register: --advertise, or --addr, or for
// --addr :PORT one of this machine's.
func chooseAddr(c *cli.Context) (*located, error) {
	given, advertise := c.String("addr"), c.String("advertise")
	host, port, err := net.SplitHostPort(given)
	if c.IsSet("interface") && (err != nil || host != "" || advertise != "") {
		return nil, usage("--interface is for --addr :PORT without --advertise")
	}
	fixed := func(addr string) (*located, error) {
		a, err := registrar.ResolveAddr(c.Context, addr)
		return &located{addr: a}, err
	}
	switch {
	case advertise != "":
		if _, _, noPort := net.SplitHostPort(advertise); noPort == nil {
			return fixed(advertise)
		}
		if err != nil {
			return nil, usage("--advertise %q names no port, and neither does --addr %q", advertise, given)
		}
		return fixed(net.JoinHostPort(strings.Trim(advertise, "[]"), port))
	case err != nil || host != "":
		return fixed(given)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return nil, usage("--addr %q: want a port from 1 to 65535", given)
	}
	return chooseLocal(c, uint16(n))
}

// chooseLocal chooses one of this machine's addresses.
func chooseLocal(c *cli.Context, port uint16) (*located, error) {
	l := &located{locator: newLocator(c)}
	var err error
	if l.choice, _, err = l.locator.look(c.Context); err != nil {
		return nil, err
	}
	l.addr = netip.AddrPortFrom(l.choice.ip, port)
	return l, nil
}
