package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"rollcall/registrar"
)

// chooseAddr returns the address to register: --advertise, or --addr, or for
// --addr :PORT one of this machine's.
func chooseAddr(c *cli.Context) (netip.AddrPort, error) {
	given, advertise := c.String("addr"), c.String("advertise")
	host, port, err := net.SplitHostPort(given)
	if c.IsSet("interface") && (err != nil || host != "" || advertise != "") {
		return netip.AddrPort{}, usage("--interface is for --addr :PORT without --advertise")
	}
	switch {
	case advertise != "":
		if _, _, noPort := net.SplitHostPort(advertise); noPort == nil {
			return registrar.ResolveAddr(c.Context, advertise)
		}
		if err != nil {
			return netip.AddrPort{}, usage("--advertise %q names no port, and neither does --addr %q", advertise, given)
		}
		return registrar.ResolveAddr(c.Context, net.JoinHostPort(strings.Trim(advertise, "[]"), port))
	case err != nil || host != "":
		return registrar.ResolveAddr(c.Context, given)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return netip.AddrPort{}, usage("--addr %q: want a port from 1 to 65535", given)
	}
	all, err := localAddrs()
	if err != nil {
		return netip.AddrPort{}, err
	}
	ip, err := chooseIP(all, c.String("interface"))
	if err != nil {
		return netip.AddrPort{}, err
	}
	return registrar.ResolveAddr(c.Context, net.JoinHostPort(ip.String(), port))
}

// localAddr is one address of an interface that is up.
type localAddr struct {
	name  string
	index int
	ip    netip.Addr
}

func localAddrs() ([]localAddr, error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list the network interfaces: %w", err)
	}
	var all []localAddr
	for _, i := range interfaces {
		if i.Flags&net.FlagUp == 0 {
			continue
		}
		addrs, err := i.Addrs()
		if err != nil {
			return nil, fmt.Errorf("list the addresses of %s: %w", i.Name, err)
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil { // else it is no IP address
				all = append(all, localAddr{i.Name, i.Index, p.Addr().Unmap()})
			}
		}
	}
	return all, nil
}

// chooseIP returns the same address of all each time: of the interface called
// name, or without a name of any but loopback. IPv4 goes before IPv6, private
// before public, and then the interface of the lower index and the lower
// address. Link-local addresses, which another host cannot use, are left out.
func chooseIP(all []localAddr, name string) (netip.Addr, error) {
	known := false
	var fit []localAddr
	for _, a := range all {
		if name != "" && a.name != name {
			continue
		}
		known = true
		if !a.ip.IsLinkLocalUnicast() && (name != "" || !a.ip.IsLoopback()) {
			fit = append(fit, a)
		}
	}
	switch {
	case name != "" && !known:
		return netip.Addr{}, fmt.Errorf("--interface %s: there is none that is up and has an address", name)
	case len(fit) == 0:
		return netip.Addr{}, errors.New("no interface has an address that another host could reach; name one with --advertise")
	}
	rank := func(ip netip.Addr) (r int) {
		if !ip.Is4() {
			r += 2
		}
		if !ip.IsPrivate() {
			r++
		}
		return r
	}
	best := slices.MinFunc(fit, func(a, b localAddr) int {
		x, y := a.ip.As16(), b.ip.As16()
		return cmp.Or(cmp.Compare(rank(a.ip), rank(b.ip)), cmp.Compare(a.index, b.index), bytes.Compare(x[:], y[:]))
	})
	return best.ip, nil
}
