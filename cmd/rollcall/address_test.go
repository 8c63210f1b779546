package main

import (
	"net/netip"
	"strings"
	"testing"
)

func TestChoose(t *testing.T) {
	addr := func(name string, index int, prefix string, kind linkKind) localAddr {
		p := netip.MustParsePrefix(prefix)
		return localAddr{name: name, index: index, ip: p.Addr(), bits: p.Bits(), kind: kind}
	}
	spare := func(a localAddr) localAddr { a.spare = true; return a }
	from := func(ip string) source { return source{ip: netip.MustParseAddr(ip)} }
	redis := func(ip string) source {
		return source{redis: "redis:6379", ip: netip.MustParseAddr(ip)}
	}
	own := func(ip string) source { s := redis(ip); s.ofItself = true; return s }
	lo := addr("lo", 1, "127.0.0.1/8", linkLoopback)
	docker0 := addr("docker0", 2, "172.17.0.1/16", linkBridge)
	pub, six := addr("eth0", 3, "198.51.100.1/24", linkPlain), addr("eth0", 3, "fd00::1/64", linkPlain)
	link := addr("eth0", 3, "169.254.0.1/16", linkPlain)
	low, high := addr("eth1", 4, "10.0.0.7/24", linkPlain), addr("eth1", 4, "10.0.0.8/24", linkPlain)
	other := addr("eth2", 5, "10.0.0.1/24", linkPlain)
	vpn := addr("wg0", 6, "10.8.0.2/24", linkTunnel)
	br0, br0b := addr("br0", 7, "192.0.2.5/24", linkBridge), addr("br0", 7, "10.3.0.5/24", linkBridge)
	cable := addr("veth1", 8, "10.4.0.1/32", linkCable)
	vip, vip2 := addr("eth1", 4, "10.0.0.3/32", linkPlain), spare(addr("eth1", 4, "10.0.0.2/24", linkPlain))
	loVIP := addr("lo", 1, "10.9.9.9/32", linkLoopback)
	cluster := addr("kube-ipvs0", 9, "10.96.0.9/32", linkPlain)
	const toRedis, byDefault, rest = "connection to Redis", "the default route", "for want of a route"
	for _, c := range []struct {
		name, of  string
		all       []localAddr
		sources   []source
		want, why string // empty for none: why is of the error
	}{
		{"nothing", "", nil, nil, "", "no interface has an address"},
		{"only loopback", "", []localAddr{lo}, nil, "", "no interface has an address"},
		{"only loopback, and Redis there", "", []localAddr{lo}, []source{own("127.0.0.1")}, "", "no interface has an address"},
		{"loopback by name", "lo", []localAddr{lo, low}, nil, "127.0.0.1", "--interface"},
		{"link-local", "", []localAddr{link}, []source{from("169.254.0.1")}, "", "no interface has an address"},
		{"link-local by name", "eth0", []localAddr{link, low}, nil, "", "--interface eth0: it has no address"},
		{"IPv6 alone", "", []localAddr{lo, six}, nil, "fd00::1", rest},
		{"IPv4 before IPv6", "", []localAddr{six, pub}, nil, "198.51.100.1", rest},
		{"private before public", "", []localAddr{pub, low}, nil, "10.0.0.7", rest},
		{"lower index", "", []localAddr{other, high}, nil, "10.0.0.8", rest},
		{"lower address", "", []localAddr{high, low, other}, nil, "10.0.0.7", rest},
		{"named", "eth2", []localAddr{low, other}, []source{from("10.0.0.7")}, "10.0.0.1", "--interface"},
		{"unknown", "eth9", []localAddr{low}, nil, "", "--interface eth9: there is none"},

		{"docker0 without a route", "", []localAddr{lo, docker0, pub}, nil, "198.51.100.1", rest},
		{"docker0 of a lower index", "", []localAddr{docker0, low, pub}, []source{from("198.51.100.1")}, "198.51.100.1", byDefault},
		{"Redis in a container of this host", "", []localAddr{docker0, pub}, []source{redis("172.17.0.1"), from("198.51.100.1")}, "198.51.100.1", byDefault},
		{"so without a default route", "", []localAddr{docker0, low}, []source{redis("172.17.0.1")}, "10.0.0.7", rest},
		{"only docker0", "", []localAddr{lo, docker0}, nil, "", "172.17.0.1 of docker0 is of a bridge"},
		{"docker0 by name", "docker0", []localAddr{docker0, pub}, []source{from("198.51.100.1")}, "172.17.0.1", "--interface"},
		{"the uplink is a bridge", "", []localAddr{docker0, br0}, []source{from("192.0.2.5")}, "192.0.2.5", byDefault},
		{"Redis beyond another network of that", "", []localAddr{docker0, br0, br0b}, []source{redis("10.3.0.5"), from("192.0.2.5")}, "10.3.0.5", toRedis},
		{"Redis by the second interface", "", []localAddr{pub, low}, []source{redis("10.0.0.7"), from("198.51.100.1")}, "10.0.0.7", toRedis},
		{"Redis by a VPN", "", []localAddr{pub, vpn}, []source{redis("10.8.0.2"), from("198.51.100.1")}, "198.51.100.1", byDefault + "; Redis redis:6379 is reached from 10.8.0.2 of wg0, which is a tunnel"},
		{"a VPN takes the default route", "", []localAddr{pub, low, vpn}, []source{from("10.8.0.2")}, "10.0.0.7", rest},
		{"only a VPN", "", []localAddr{lo, vpn}, []source{from("10.8.0.2")}, "", "name it with --interface wg0"},
		{"a VPN by name", "wg0", []localAddr{lo, vpn, pub}, []source{from("198.51.100.1")}, "10.8.0.2", "--interface"},
		{"Redis by a container's cable", "", []localAddr{cable, pub}, []source{redis("10.4.0.1"), from("198.51.100.1")}, "198.51.100.1", byDefault},
		{"first of Redis' hosts that does", "", []localAddr{docker0, low, other}, []source{redis("172.17.0.1"), redis("10.0.0.1"), redis("10.0.0.7")}, "10.0.0.1", toRedis},
		{"IPv4's default route before IPv6's", "", []localAddr{six, pub}, []source{from("198.51.100.1"), from("fd00::1")}, "198.51.100.1", byDefault},
		{"IPv6's alone", "", []localAddr{lo, six}, []source{from("fd00::1")}, "fd00::1", byDefault},

		{"Redis has this machine's address", "", []localAddr{low, pub}, []source{own("10.0.0.7"), from("198.51.100.1")}, "10.0.0.7", "interface that has Redis' address"},
		{"a virtual one", "", []localAddr{vip, vip2, low, pub}, []source{own("10.0.0.3"), from("198.51.100.1")}, "10.0.0.7", "interface that has Redis' address"},
		{"a secondary one", "", []localAddr{vip2, low, pub}, []source{own("10.0.0.2"), from("198.51.100.1")}, "10.0.0.7", "interface that has Redis' address"},
		{"one that IPVS has bound", "", []localAddr{cluster, pub}, []source{own("10.96.0.9"), from("198.51.100.1")}, "198.51.100.1", byDefault},
		{"one of lo", "", []localAddr{loVIP, pub}, []source{own("10.9.9.9"), from("198.51.100.1")}, "198.51.100.1", byDefault},
		{"lo has the host's own", "", []localAddr{loVIP, pub}, []source{from("10.9.9.9")}, "10.9.9.9", byDefault},
		{"spare ones last", "eth1", []localAddr{vip2, vip, high}, nil, "10.0.0.8", "--interface"},
		{"what connections have, of the named", "eth1", []localAddr{low, high}, []source{from("10.0.0.8")}, "10.0.0.8", "--interface"},
	} {
		got, err := choose(c.all, c.of, c.sources)
		switch {
		case c.want == "":
			if err == nil || !strings.Contains(err.Error(), c.why) {
				t.Errorf("%s: got %v, error %v, want one with %q", c.name, got.ip, err, c.why)
			}
		case err != nil || got.ip.String() != c.want || !strings.Contains(got.why, c.why):
			t.Errorf("%s: got %v (%s), %v, want %s (%s)", c.name, got.ip, got.why, err, c.want, c.why)
		}
	}
	for _, c := range []struct {
		sources []source
		others  int
	}{{nil, 1}, {[]source{from("10.0.0.7")}, 0}} { // high is of the same interface
		if got, err := choose([]localAddr{docker0, low, high, other}, "", c.sources); err != nil || got.ip != low.ip || len(got.others) != c.others {
			t.Errorf("with %v: %v beside %v, %v", c.sources, got.ip, got.others, err)
		}
	}
}
