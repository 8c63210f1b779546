package main

import (
	"bytes"
	order "encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// localAddrs reads the addresses of the interfaces that are up, in two questions
// to the kernel; package net asks once more for each interface, and does not tell
// what an interface is. See rtnetlink(7).
func localAddrs() ([]localAddr, error) {
	type link struct {
		name string
		kind linkKind
	}
	links := map[int]link{}
	err := dump(unix.RTM_GETLINK, unix.RTM_NEWLINK, func(body []byte, attrs map[uint16][]byte) {
		index, flags := order.NativeEndian.Uint32(body[4:]), order.NativeEndian.Uint32(body[8:]) // of unix.IfInfomsg
		if flags&unix.IFF_UP == 0 {
			return
		}
		l := link{name: string(bytes.TrimRight(attrs[unix.IFLA_IFNAME], "\x00"))}
		kind := attributes(attrs[unix.IFLA_LINKINFO])[unix.IFLA_INFO_KIND]
		l.kind = kindOf(l.name, string(bytes.TrimRight(kind, "\x00")), flags)
		links[int(index)] = l
	})
	if err != nil {
		return nil, fmt.Errorf("list the network interfaces: %w", err)
	}
	var all []localAddr
	err = dump(unix.RTM_GETADDR, unix.RTM_NEWADDR, func(body []byte, attrs map[uint16][]byte) {
		bits, flags, index := int(body[1]), uint32(body[2]), int(order.NativeEndian.Uint32(body[4:])) // of unix.IfAddrmsg
		l, up := links[index]
		// Of a point-to-point interface the address is the other end's.
		raw := attrs[unix.IFA_LOCAL]
		if raw == nil {
			raw = attrs[unix.IFA_ADDRESS]
		}
		ip, ok := netip.AddrFromSlice(raw)
		if !up || !ok {
			return
		}
		if f := attrs[unix.IFA_FLAGS]; len(f) >= 4 {
			flags = order.NativeEndian.Uint32(f)
		}
		all = append(all, localAddr{
			name: l.name, index: index, ip: ip.Unmap(), bits: bits, kind: l.kind,
			// IFA_F_TEMPORARY is the same bit, of IPv6.
			spare: flags&(unix.IFA_F_SECONDARY|unix.IFA_F_DEPRECATED|unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) != 0,
		})
	})
	if err != nil {
		return nil, fmt.Errorf("list the addresses of the network interfaces: %w", err)
	}
	return all, nil
}

// tunnels are the kinds of interface that carry packets inside of others, between
// two ends or in an overlay.
var tunnels = []string{"wireguard", "vxlan", "geneve", "ipip", "sit", "ip6tnl", "gre", "gretap", "ip6gre", "ip6gretap", "vti", "vti6", "xfrm", "ppp", "bareudp", "gtp"}

// kindOf judges an interface by its name, by the kind that the driver says, and
// by its flags.
func kindOf(name, kind string, flags uint32) linkKind {
	switch {
	case flags&unix.IFF_LOOPBACK != 0:
		return linkLoopback
	case kind == "bridge" || kind == "openvswitch":
		return linkBridge
	case flags&unix.IFF_POINTOPOINT != 0 || slices.Contains(tunnels, kind):
		return linkTunnel
	case kind == "veth" && strings.HasPrefix(name, "veth"):
		return linkCable // the container's own end has another name
	}
	return linkPlain
}

// dump hands each message that the kernel answers to each.
func dump(ask int, want uint16, each func(body []byte, attrs map[uint16][]byte)) error {
	table, err := syscall.NetlinkRIB(ask, unix.AF_UNSPEC)
	if err != nil {
		return err
	}
	messages, err := syscall.ParseNetlinkMessage(table)
	if err != nil {
		return err
	}
	head := map[uint16]int{unix.RTM_NEWLINK: unix.SizeofIfInfomsg, unix.RTM_NEWADDR: unix.SizeofIfAddrmsg}[want]
	for _, m := range messages {
		if m.Header.Type == want && len(m.Data) >= head {
			each(m.Data, attributes(m.Data[head:]))
		}
	}
	return nil
}

// attributes reads a list of attributes.
func attributes(b []byte) map[uint16][]byte {
	out := map[uint16][]byte{}
	for len(b) >= unix.SizeofRtAttr {
		n := int(order.NativeEndian.Uint16(b))
		if n < unix.SizeofRtAttr || n > len(b) {
			break
		}
		out[order.NativeEndian.Uint16(b[2:])&^unix.NLA_F_NESTED] = b[unix.SizeofRtAttr:n]
		b = b[min((n+unix.RTA_ALIGNTO-1)&^(unix.RTA_ALIGNTO-1), len(b)):]
	}
	return out
}

// preferPublic is IPV6_PREFER_SRC_PUBLIC of linux/in6.h.
const preferPublic = 2

// preferStable has a connection over IPv6 not have a temporary address, which is
// another one tomorrow. See RFC 5014.
func preferStable(network, _ string, raw syscall.RawConn) error {
	if network != "udp6" {
		return nil
	}
	// A kernel that does not know the option has its own preference.
	return raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_ADDR_PREFERENCES, preferPublic)
	})
}
