//go:build !linux

package main

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
)

// localAddrs reads the addresses of the interfaces that are up.
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
		kind := linkPlain
		switch {
		case i.Flags&net.FlagLoopback != 0:
			kind = linkLoopback
		case i.Flags&net.FlagPointToPoint != 0:
			kind = linkTunnel
		case strings.HasPrefix(i.Name, "bridge"):
			kind = linkBridge
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil { // else it is no IP address
				all = append(all, localAddr{name: i.Name, index: i.Index, ip: p.Addr().Unmap(), bits: p.Bits(), kind: kind})
			}
		}
	}
	return all, nil
}

func preferStable(string, string, syscall.RawConn) error { return nil }
