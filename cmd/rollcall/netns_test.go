package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/docker/dockertest"
	"rollcall/registrar/redistest"
)

// network is two hosts in network namespaces of their own, between which there are
// the cables eth0 and eth1, with the same names at both ends: here, where what is
// tested runs, and there, which has everything else.
type network struct {
	here, there string
	hosts       string // a file that is /etc/hosts here
	dir         string
}

var networks atomic.Uint32

// newNetwork makes them, with eth0 and eth1 up and without addresses, until the
// test ends. Who is not root is skipped, but fails where that may not be.
func newNetwork(t *testing.T) *network {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a network of its own needs root")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		if os.Getenv("CI") != "" || os.Getenv("ROLLCALL_REQUIRE_SERVERS") != "" {
			t.Fatalf("ip is missing: %v; apt-get install iproute2", err)
		}
		t.Skipf("ip is missing: %v", err)
	}
	name := fmt.Sprintf("rc%d-%d", os.Getpid(), networks.Add(1))
	n := &network{here: name + "a", there: name + "b", dir: t.TempDir()}
	n.hosts = filepath.Join(n.dir, "hosts")
	if err := os.WriteFile(n.hosts, []byte("127.0.0.1 localhost\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, ns := range []string{n.here, n.there} {
		n.command(t, "", "netns", "add", ns)
		t.Cleanup(func() { n.command(t, "", "netns", "del", ns) })
		n.ip(t, ns, "link set lo up")
	}
	for i, cable := range []string{"eth0", "eth1"} { // with indexes above those of what comes later
		n.ip(t, n.there, fmt.Sprintf("link add %s type veth peer name %s index %d netns %s", cable, cable, 101+i, n.here), "link set "+cable+" up")
		n.ip(t, n.here, "link set "+cable+" up")
	}
	return n
}

func (n *network) command(t *testing.T, input string, args ...string) {
	t.Helper()
	cmd := exec.Command("ip", args...)
	cmd.Stdin = strings.NewReader(input)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("ip %q: %v\n%s%s", args, err, input, out)
	}
}

// ip has lines of ip(8) done in one of the namespaces, in order.
func (n *network) ip(t *testing.T, ns string, lines ...string) {
	t.Helper()
	n.command(t, strings.Join(lines, "\n")+"\n", "-n", ns, "-batch", "-")
}

// system runs rollcall here.
func (n *network) system(t *testing.T, redis *redistest.Server) *system {
	t.Helper()
	program := filepath.Join(n.dir, "rollcall")
	script := fmt.Sprintf("#!/bin/sh\nexec ip netns exec %s sh -c 'mount --bind %s /etc/hosts && exec \"$0\" \"$@\"' %s \"$@\"\n", n.here, n.hosts, binary(t))
	if err := os.WriteFile(program, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return &system{redis: redis, program: program}
}

// chosen is the address that register says that it has chosen.
var chosen = regexp.MustCompile(`registering addr=(\S+):8080 given=:8080 interface=(\S+) .*why=("[^"]*"|\S+)`)

// uplink is a host with one interface that matters.
var uplink = []string{"addr add 203.0.113.10/24 dev eth0", "route add default via 203.0.113.1"}

// TestNetnsChoice sees which address register chooses on hosts as they are. Redis
// answers nowhere: the address is known before it does.
func TestNetnsChoice(t *testing.T) {
	t.Parallel()
	docker0 := []string{"link add docker0 type bridge", "addr add 172.17.0.1/16 dev docker0", "link set docker0 up"}
	join := func(all ...[]string) []string { return slices.Concat(all...) }
	tun := []string{"tuntap add dev tun0 mode tun", "addr add 10.8.0.2 peer 10.8.0.1 dev tun0", "link set tun0 up"}
	const local = "redis://127.0.0.1:6379/0"
	for _, tt := range []struct {
		name, redis string
		ip          []string // done here
		args        []string
		addr, on    string // empty: an error, which why is of
		why         string
	}{
		{"public eth0 and docker0", local, join(docker0, uplink), nil, "203.0.113.10", "eth0", "the source of the default route"},
		{"private eth0 above docker0", local, join([]string{"link add docker0 type bridge", "addr add 10.0.0.1/16 dev docker0", "link set docker0 up"}, []string{"addr add 10.1.2.3/24 dev eth0", "route add default via 10.1.2.1"}), nil, "10.1.2.3", "eth0", "default route"},
		{"without a default route", local, join(docker0, []string{"addr add 203.0.113.10/24 dev eth0"}), nil, "203.0.113.10", "eth0", "for want of a route"},
		{"Redis on docker0's network", "redis://172.17.0.2", join(docker0, uplink), nil, "203.0.113.10", "eth0", "default route"},
		{"the uplink is in a bridge", local, join(docker0, []string{"link add br0 type bridge", "link set eth0 master br0", "addr add 10.1.2.3/24 dev br0", "link set br0 up", "route add default via 10.1.2.1"}), nil, "10.1.2.3", "br0", "default route"},
		{"a VPN beside", local, join(tun, uplink), nil, "203.0.113.10", "eth0", "default route"},
		{"a VPN takes all", local, join(tun, uplink, []string{"route add 0.0.0.0/1 dev tun0", "route add 128.0.0.0/1 dev tun0"}), nil, "203.0.113.10", "eth0", "for want of a route"},
		{"Redis by the VPN", "redis://10.8.0.1:7000", join(tun, uplink), nil, "203.0.113.10", "eth0", "Redis 10.8.0.1:7000 is reached from 10.8.0.2 of tun0, which is a tunnel"},
		{"the VPN by name", local, join(tun, uplink), []string{"--interface", "tun0"}, "10.8.0.2", "tun0", "--interface"},
		{"only a VPN", local, tun, nil, "", "", "name it with --interface tun0"},
		{"Redis by the second interface", "redis://10.5.0.9:6379", join(uplink, []string{"addr add 10.5.0.5/24 dev eth1"}), nil, "10.5.0.5", "eth1", "the source of the connection to Redis 10.5.0.9:6379"},
		{"Redis' name has two addresses", "redis://redis.test", join(uplink, []string{"addr add 10.5.0.5/24 dev eth1"}, docker0), nil, "10.5.0.5", "eth1", "Redis 10.5.0.9:6379"},
		{"no name resolves", "redis+sentinel://no.invalid,also.invalid/main", uplink, nil, "203.0.113.10", "eth0", "default route"},
		{"Sentinels", "redis+sentinel://no.invalid,127.0.0.1,10.5.0.9/main", join(uplink, []string{"addr add 10.5.0.5/24 dev eth1"}), nil, "10.5.0.5", "eth1", "Redis 10.5.0.9:26379"},
		{"a Cluster", "redis+cluster://172.17.0.2,10.5.0.9:7001", join(uplink, docker0, []string{"addr add 10.5.0.5/24 dev eth1"}), nil, "10.5.0.5", "eth1", "Redis 10.5.0.9:7001"},
		{"Redis has a virtual address of this host", "redis://10.5.0.3", join(uplink, []string{"addr add 10.5.0.3/32 dev eth1", "addr add 10.5.0.5/24 dev eth1"}), nil, "10.5.0.5", "eth1", "interface that has Redis' address"},
		{"IPv6 alone", "redis://[2001:db8::9]", []string{"addr add 2001:db8::5/64 dev eth0 nodad", "route add default via 2001:db8::1"}, nil, "[2001:db8::5]", "eth0", "Redis [2001:db8::9]:6379"},
		{"IPv6 alone, by the default route", local, []string{"addr add 2001:db8::5/64 dev eth0 nodad", "route add default via 2001:db8::1"}, nil, "[2001:db8::5]", "eth0", "default route"},
		{"IPv6 that is going", local, []string{"addr add 2001:db8::4/64 dev eth0 nodad preferred_lft 0", "addr add 2001:db8::5/64 dev eth0 nodad"}, []string{"--interface", "eth0"}, "[2001:db8::5]", "eth0", "--interface"},
		{"nothing but loopback", local, nil, nil, "", "", "no interface has an address that another host could reach; name one with --advertise"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			n := newNetwork(t)
			if err := os.WriteFile(n.hosts, []byte("10.5.0.9 redis.test\n172.17.0.9 redis.test\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			n.ip(t, n.here, tt.ip...)
			s := n.system(t, &redistest.Server{})
			args := append([]string{"register", "--redis", tt.redis, "--service", "web", "--addr", ":8080"}, tt.args...)
			if tt.addr == "" {
				if _, out, code := s.rollcall(t, args...); code != exitUsage || !strings.Contains(out, tt.why) {
					t.Errorf("exit %d, %s", code, out)
				}
				return
			}
			p := s.spawn(t, args...)
			haproxytest.Poll(t, "it registers", func() error {
				m := chosen.FindStringSubmatch(p.out.String())
				if m == nil {
					return errors.New(p.out.String())
				}
				if m[1] != tt.addr || m[2] != tt.on || !strings.Contains(m[3], tt.why) {
					t.Fatalf("%s of %s: %s; want %s of %s: %s", m[1], m[2], m[3], tt.addr, tt.on, tt.why)
				}
				return nil
			})
		})
	}
}

// TestNetnsDoctor sees what doctor says of the address that would be chosen.
func TestNetnsDoctor(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, redis string
		ip          []string
		state       state
		seen        string
	}{
		{"plain", "redis://10.5.0.9", slices.Concat(uplink, []string{"addr add 10.5.0.5/24 dev eth1"}), stateOK, "10.5.0.5 of eth1, the source of the connection to Redis 10.5.0.9:6379"},
		{"none", "redis://127.0.0.1", nil, stateOK, "none for --addr :PORT: no interface has an address"},
		{"two, and no route", "redis://127.0.0.1", []string{"addr add 203.0.113.10/24 dev eth0", "addr add 10.5.0.5/24 dev eth1"}, stateWarn, "10.5.0.5 of eth1, the first, for want of a route to Redis and of a default route; as good: 203.0.113.10 of eth0"},
		{"a VPN", "redis://10.8.0.1", slices.Concat(uplink, []string{"tuntap add dev tun0 mode tun", "addr add 10.8.0.2 peer 10.8.0.1 dev tun0", "link set tun0 up"}), stateWarn, "Redis 10.8.0.1:6379 is reached from 10.8.0.2 of tun0, which is a tunnel"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			n := newNetwork(t)
			n.ip(t, n.here, tt.ip...)
			findings, _ := n.system(t, &redistest.Server{}).doctor(t, "--redis", tt.redis)
			i := slices.IndexFunc(findings, func(f finding) bool { return f.Check == "address" })
			if i < 0 || findings[i].State != tt.state || !strings.Contains(findings[i].Seen, tt.seen) {
				t.Errorf("%+v", findings)
			}
		})
	}
}

// leased is a network in which eth0 has an address here, and Redis is there.
func leased(t *testing.T) (*network, *system) {
	t.Helper()
	n := newNetwork(t)
	n.ip(t, n.there, "addr add 10.0.0.1/24 dev eth0")
	n.ip(t, n.here, "addr add 10.0.0.5/24 dev eth0", "route add default via 10.0.0.1")
	redis := redistest.StartWithin(t, []string{"ip", "netns", "exec", n.there}, "10.0.0.1")
	return n, n.system(t, redis)
}

// TestNetnsLease has an interface lose its address and get another one. With
// --interface the instance follows, at each time there with one address at least;
// without, the sidecar says so and stays.
func TestNetnsLease(t *testing.T) {
	t.Parallel()
	for _, named := range []bool{true, false} {
		t.Run(fmt.Sprintf("interface=%v", named), func(t *testing.T) {
			t.Parallel()
			n, s := leased(t)
			const old, changed = "10.0.0.5:8080", "10.0.0.77:8080"
			args := []string{"--addr", ":8080", "--http", "127.0.0.1:9464"}
			if named {
				args = append(args, "--interface", "eth0")
			}
			p := s.around(t, append(args, "--", "sleep", "1000")...)
			s.comes(t, old)

			// Somebody is there all the time.
			rdb := s.redis.Client(t)
			ctx, cancel := context.WithCancel(t.Context())
			var watching sync.WaitGroup
			var missing atomic.Int64
			looks := 0
			watching.Go(func() {
				for tick := time.NewTicker(5 * time.Millisecond); ctx.Err() == nil; <-tick.C {
					if members, err := rdb.ZCard(ctx, "rollcall:{web}:instances").Result(); err == nil && members == 0 {
						missing.Add(1)
					}
					looks++
				}
			})
			defer watching.Wait()
			defer cancel()

			n.ip(t, n.here, "addr del 10.0.0.5/24 dev eth0")
			p.says(t, "and there is no other; beating on for it")
			begun := time.Now()
			n.ip(t, n.here, "addr add 10.0.0.77/24 dev eth0", "route add default via 10.0.0.1")
			if !named {
				p.says(t, "the address that is registered is no longer this machine's; beating on for it; restart")
				n.ip(t, n.here, "addr del 10.0.0.77/24 dev eth0", "addr add 10.0.0.5/24 dev eth0", "route add default via 10.0.0.1")
				p.says(t, "the one to register again")
				s.happens(t, "joined "+old)
				return
			}
			s.happens(t, "joined "+old, "joined "+changed, "draining "+old, "left "+old)
			t.Logf("followed after %v", time.Since(begun))
			cancel()
			watching.Wait()
			if missing.Load() > 0 {
				t.Errorf("nobody was there at %d of %d looks", missing.Load(), looks)
			}
			out, err := exec.Command("ip", "netns", "exec", n.here, "curl", "-sS", "http://127.0.0.1:9464/metrics").CombinedOutput()
			if err != nil || !strings.Contains(string(out), registeredName+`{addr="`+changed+`",service="web"} 1`) {
				t.Errorf("%v\n%s", err, out)
			}
			// The app has seen nothing of it.
			if out := p.out.String(); strings.Contains(out, "app ended") || strings.Count(out, "app started") != 1 {
				t.Error("the app was ended")
			}
			if code := p.signal(t, syscall.SIGTERM); code != 128+int(syscall.SIGTERM) {
				t.Errorf("exit %d", code)
			}
			s.goes(t, changed, "left")
		})
	}
}

// TestEngineLease has the host of an agent get another address: all that its
// containers publish is registered there before it leaves the old one.
func TestEngineLease(t *testing.T) {
	t.Parallel()
	e := dockertest.Shared(t)
	n, s := leased(t)
	c := e.Run(t, dockertest.Spec{Publish: []string{"0.0.0.0:8080", "0.0.0.0:8081"}, Labels: map[string]string{"SERVICE_NAME": "leased"}})
	p := s.spawn(t, "docker", "--engine", e.URL, "--interface", "eth0", "--service", "leased-8080", "--service", "leased-8081", "--explicit", "--leave")
	p.says(t, "interface=eth0")
	var old, changed []string
	for _, port := range []string{"8080", "8081"} {
		number := fmt.Sprint(c.Addr(t, port).Port())
		old, changed = append(old, "10.0.0.5:"+number), append(changed, "10.0.0.77:"+number)
	}
	// Each has a service of its own, so what happens to the one is in order.
	events := func(i int) (out []string) {
		for _, e := range s.happened(t) {
			if strings.HasSuffix(e, " "+old[i]) || strings.HasSuffix(e, " "+changed[i]) {
				out = append(out, e)
			}
		}
		return out
	}
	happens := func(want func(i int) []string) {
		t.Helper()
		for i := range old {
			haproxytest.Poll(t, strings.Join(want(i), ", "), func() error {
				if got := events(i); !slices.Equal(got, want(i)) {
					return fmt.Errorf("%q", got)
				}
				return nil
			})
		}
	}
	happens(func(i int) []string { return []string{"joined " + old[i]} })
	n.ip(t, n.here, "addr del 10.0.0.5/24 dev eth0", "addr add 10.0.0.77/24 dev eth0", "route add default via 10.0.0.1")
	moved := func(i int) []string {
		return []string{"joined " + old[i], "joined " + changed[i], "draining " + old[i], "left " + old[i]}
	}
	happens(moved)
	if code := p.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
	happens(func(i int) []string { return append(moved(i), "draining "+changed[i], "left "+changed[i]) })
}
