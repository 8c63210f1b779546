//go:build !sidecar

package main

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"strings"

	"rollcall/registrar"
)

// name looks whether the host name of a single server, if it has one, can be that of two.
func (d *doctor) name(ctx context.Context, url string) {
	hosts, err := registrar.Hosts(url)
	scheme, _, _ := strings.Cut(url, "://")
	if err != nil || strings.Contains(scheme, "+") || len(hosts) != 1 {
		return // another Sentinel or node is as good
	}
	host, _, err := net.SplitHostPort(hosts[0])
	if _, perr := netip.ParseAddr(host); err != nil || perr == nil {
		return
	}
	const check = "redis name"
	tctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupNetIP(tctx, "ip", host)
	if err != nil {
		d.unknown(check, err, "see why "+host+" cannot be looked up here; nobody is taken out while a reaper cannot look it up")
		return
	}
	var words []string
	for i, a := range addrs {
		addrs[i] = a.Unmap()
		words = append(words, addrs[i].String())
	}
	four := len(slices.DeleteFunc(slices.Clone(addrs), func(a netip.Addr) bool { return !a.Is4() }))
	d.add(check, worst(false, four > 1 || len(addrs)-four > 1), "if these are two servers, some processes register at one and others look at the other",
		"give "+host+" one address; for several servers use Sentinels or a Cluster", "%s is %s", host, strings.Join(words, ", "))
}
