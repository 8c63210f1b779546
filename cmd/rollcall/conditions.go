//go:build !sidecar

package main

import (
	"context"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"rollcall/registrar"
)

// conditions say which instances a command is about: those that meet each of them.
type conditions struct {
	host string // as it was typed; empty = any
	ip   netip.Addr
	zone string // empty = any
	tags [][2]string
	all  bool // of the service that is named
}

// conditionFlags have no variables: what another command was told by one must not
// choose what this one takes out.
func conditionFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "host", Usage: "`HOST`, an IP or a name: the instances with this address, at any port; of all services, or of one"},
		&cli.StringFlag{Name: "zone", Usage: "`NAME`: the instances that say this zone; of all services, or of one"},
		&cli.StringSliceFlag{Name: "tag", Usage: "`KEY=VALUE`: the instances that have this tag; repeatable, and all of --host, --zone and --tag must hold"},
		&cli.BoolFlag{Name: "all", Usage: "every instance of the SERVICE"},
		&cli.BoolFlag{Name: "dry-run", Usage: "print what would be touched and write nothing; exit code 3 if that is anything"},
	}
}

// first is the name of a condition that is given.
func (cond conditions) first() string {
	switch {
	case cond.host != "":
		return "host"
	case cond.zone != "":
		return "zone"
	case len(cond.tags) > 0:
		return "tag"
	}
	return "all"
}

// parseConditions reads the flags, and tells whether there is a condition. It looks no
// name up.
func parseConditions(c *cli.Context) (cond conditions, given bool, err error) {
	for _, name := range []string{"host", "zone"} {
		if c.IsSet(name) && c.String(name) == "" { // a variable that is empty must not mean everybody
			return cond, false, usage("--%s is empty", name)
		}
	}
	cond = conditions{host: c.String("host"), zone: c.String("zone"), all: c.Bool("all")}
	for _, t := range c.StringSlice("tag") {
		k, v, ok := strings.Cut(t, "=")
		if !ok || k == "" {
			return cond, false, usage("--tag %q: want KEY=VALUE", t)
		}
		cond.tags = append(cond.tags, [2]string{k, v})
	}
	if c.IsSet("tag") && len(cond.tags) == 0 {
		return cond, false, usage("--tag is empty")
	}
	some := cond.host != "" || cond.zone != "" || len(cond.tags) > 0
	if cond.all && some {
		return cond, false, usage("--all and --%s: say which", cond.first())
	}
	return cond, some || cond.all, nil
}

// resolve looks the host's name up, as an instance's is.
func (cond *conditions) resolve(ctx context.Context) error {
	if cond.host == "" {
		return nil
	}
	host := strings.TrimSuffix(strings.TrimPrefix(cond.host, "["), "]")
	if ip, err := netip.ParseAddr(host); err != nil || ip.Is6() && !strings.Contains(host, ":") {
		if h, port, err := net.SplitHostPort(cond.host); err == nil {
			return usage("--host %q: want a host without a port; one instance is SERVICE %s", cond.host, net.JoinHostPort(h, port))
		}
	}
	addr, err := registrar.ResolveAddr(ctx, net.JoinHostPort(host, "1"))
	if err != nil {
		why := err.Error()
		if _, after, ok := strings.Cut(why, `:1": `); ok {
			why = after
		}
		return usage("--host %q: %s", cond.host, why)
	}
	cond.ip = addr.Addr()
	return nil
}

// ofAddress tells whether the conditions ask for nothing that only an instance says.
func (cond conditions) ofAddress() bool { return cond.zone == "" && len(cond.tags) == 0 }

func (cond conditions) hasHost(addr netip.AddrPort) bool {
	return cond.host == "" || addr.Addr() == cond.ip
}

// meets tells whether i meets all of them.
func (cond conditions) meets(i registrar.Instance) bool {
	if !cond.hasHost(i.Addr) || cond.zone != "" && i.Meta.Zone != cond.zone {
		return false
	}
	for _, t := range cond.tags {
		if v, ok := i.Meta.Tags[t[0]]; !ok || v != t[1] {
			return false
		}
	}
	return true
}

// hints is what instances say that a condition could have meant.
type hints struct {
	hosts, zones, keys map[string]bool
	values             map[string]map[string]bool // by a tag's key
	instances          int
}

func newHints() hints {
	return hints{map[string]bool{}, map[string]bool{}, map[string]bool{}, map[string]map[string]bool{}, 0}
}

func (k *hints) add(i registrar.Instance) {
	k.instances++
	k.hosts[i.Addr.Addr().String()] = true
	if i.Meta.Zone != "" {
		k.zones[i.Meta.Zone] = true
	}
	for key, value := range i.Meta.Tags {
		k.keys[key] = true
		if k.values[key] == nil {
			k.values[key] = map[string]bool{}
		}
		k.values[key][value] = true
	}
}

// unmet says why nothing meets cond: the first of them that nobody meets, with the
// nearest that somebody does. of is the services that were looked at.
func (k hints) unmet(cond conditions, of string) error {
	nearest := func(name string, among map[string]bool) string {
		return didYouMean(name, slices.Sorted(maps.Keys(among)))
	}
	if k.instances == 0 {
		return fmt.Errorf("there is no instance of %s", of)
	}
	if cond.host != "" && !k.hosts[cond.ip.String()] {
		host := cond.host
		if ip := cond.ip.String(); ip != host {
			host += ", which is " + ip + ","
		}
		return fmt.Errorf("no instance of %s has host %s%s", of, host, nearest(cond.ip.String(), k.hosts))
	}
	if cond.zone != "" && !k.zones[cond.zone] {
		return fmt.Errorf("no instance of %s is in zone %s%s", of, cond.zone, nearest(cond.zone, k.zones))
	}
	for _, t := range cond.tags {
		if !k.keys[t[0]] {
			return fmt.Errorf("no instance of %s has a tag %s%s", of, t[0], nearest(t[0], k.keys))
		}
		if !k.values[t[0]][t[1]] {
			return fmt.Errorf("no instance of %s has tag %s=%s%s", of, t[0], t[1], nearest(t[1], k.values[t[0]]))
		}
	}
	return fmt.Errorf("no instance of %s meets all of the conditions; each alone is met", of)
}
