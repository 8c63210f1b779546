package docker

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/rs/zerolog"

	"rollcall/registrar"
)

var (
	tcp80  = network.MustParsePort("80")
	tcp443 = network.MustParsePort("443")
	udp53  = network.MustParsePort("53/udp")
	at     = netip.MustParseAddrPort
)

// box is a container whose port 80 is published on every address.
func box(edit func(*facts)) facts {
	f := facts{
		id: "0123456789abcdef", image: "registry:5000/team/web:1.2", state: serving,
		labels: map[string]string{}, exposed: []network.Port{tcp80},
		published: map[network.Port][]netip.AddrPort{tcp80: {at("0.0.0.0:32768"), at("[::]:32768")}},
		networks:  map[string][]netip.Addr{"b": {netip.MustParseAddr("172.18.0.2"), netip.MustParseAddr("fd00::2")}, "a": {netip.MustParseAddr("172.17.0.2")}},
	}
	if edit != nil {
		edit(&f)
	}
	return f
}

// row is one want on a line.
func row(w want) string {
	tags := []string{}
	for k, v := range w.tags {
		if k != "container" {
			tags = append(tags, k+"="+v)
		}
	}
	slices.Sort(tags)
	s := fmt.Sprintf("%s %s %d", w.service, w.addr, w.weight)
	if len(tags) > 0 {
		s += " " + strings.Join(tags, ",")
	}
	if w.check.command != nil {
		s += fmt.Sprintf(" exec %q", w.check.command)
	} else if w.check.url != "" {
		s += " " + w.check.url
	}
	if w.check.interval > 0 {
		s += fmt.Sprintf(" %v/%v", w.check.interval, w.check.timeout)
	}
	return s
}

func TestPlan(t *testing.T) {
	label := func(kv ...string) func(*facts) {
		return func(f *facts) {
			for i := 0; i < len(kv); i += 2 {
				f.labels[kv[i]] = kv[i+1]
			}
		}
	}
	two := func(kv ...string) func(*facts) {
		return func(f *facts) {
			f.exposed = append(f.exposed, tcp443)
			f.published[tcp443] = []netip.AddrPort{at("10.0.0.9:8443")}
			label(kv...)(f)
		}
	}
	host := place{advertise: netip.MustParseAddr("10.0.0.1")}
	loopback := place{advertise: netip.MustParseAddr("127.0.0.1")}
	explicit := host
	explicit.explicit = true
	internal := place{internal: true}
	inB := place{internal: true, network: "b"}
	some := host
	some.services = []registrar.Service{"api", "web-80"}
	for _, c := range []struct {
		name  string
		place place
		edit  func(*facts)
		want  []string
		err   string
	}{
		{"by its image", host, nil, []string{"web 10.0.0.1:32768 100"}, ""},
		{"image with a digest", host, func(f *facts) { f.image = "a/b/api@sha256:00" }, []string{"api 10.0.0.1:32768 100"}, ""},
		{"name", host, label("SERVICE_NAME", "api"), []string{"api 10.0.0.1:32768 100"}, ""},
		{"name by variable", host, func(f *facts) { f.env = []string{"SERVICE_NAME=env"} }, []string{"env 10.0.0.1:32768 100"}, ""},
		{"a label goes before a variable", host, func(f *facts) {
			f.env = []string{"SERVICE_NAME=env"}
			f.labels["SERVICE_NAME"] = "label"
		}, []string{"label 10.0.0.1:32768 100"}, ""},
		{"a port's variable goes before a label", host, func(f *facts) {
			f.env = []string{"SERVICE_80_NAME=env"}
			f.labels["SERVICE_NAME"] = "label"
		}, []string{"env 10.0.0.1:32768 100"}, ""},
		{"another port's name", host, label("SERVICE_81_NAME", "api"), []string{"web 10.0.0.1:32768 100"}, ""},
		{"no label of ours", host, label("SERVICE", "x", "MY_SERVICE_NAME", "x", "service_name", "x"), []string{"web 10.0.0.1:32768 100"}, ""},
		{"a name that is none", host, label("SERVICE_NAME", "Web"), nil, `port 80: service name "Web"`},
		{"two ports", host, two(), []string{"web-80 10.0.0.1:32768 100", "web-443 10.0.0.9:8443 100"}, ""},
		{"two ports, named", host, two("SERVICE_NAME", "api"), []string{"api-80 10.0.0.1:32768 100", "api-443 10.0.0.9:8443 100"}, ""},
		{"two ports, one named", host, two("SERVICE_443_NAME", "tls"), []string{"web-80 10.0.0.1:32768 100", "tls 10.0.0.9:8443 100"}, ""},
		{"two ports, one ignored", host, two("SERVICE_443_IGNORE", "1"), []string{"web-80 10.0.0.1:32768 100"}, ""},
		{"two ports, one wrong", host, two("SERVICE_443_WEIGHT", "257"), []string{"web-80 10.0.0.1:32768 100"}, "port 443: SERVICE_WEIGHT: weight 257"},
		{"UDP", host, func(f *facts) {
			f.exposed = append(f.exposed, udp53)
			f.published[udp53] = []netip.AddrPort{at("0.0.0.0:53")}
		}, []string{"web-80 10.0.0.1:32768 100"}, ""},
		{"ignored", host, label("SERVICE_IGNORE", "true"), nil, ""},
		{"not published", host, func(f *facts) { f.published = nil }, nil, ""},
		{"explicit, without a name", explicit, label("SERVICE_TAGS", "a"), nil, ""},
		{"explicit, with a name", explicit, label("SERVICE_NAME", "api"), []string{"api 10.0.0.1:32768 100"}, ""},
		{"explicit, one port with a name", explicit, two("SERVICE_443_NAME", "tls"), []string{"tls 10.0.0.9:8443 100"}, ""},
		{"of a service that is let in", some, label("SERVICE_NAME", "api"), []string{"api 10.0.0.1:32768 100"}, ""},
		{"of another one", some, label("SERVICE_NAME", "payments"), nil, "port 80: service payments is none of those that are let in"},
		{"of another one, by its image", some, nil, nil, "port 80: service web is none"},
		{"one port of another", some, two(), []string{"web-80 10.0.0.1:32768 100"}, "port 443: service web-443 is none"},
		{"tags", host, label("SERVICE_TAGS", "a, b=c,,=d", "SERVICE_80_REGION", "eu", "SERVICE_ID", "x1"),
			[]string{"web 10.0.0.1:32768 100 a=true,b=c,id=x1,region=eu"}, ""},
		{"a variable of no meaning is no tag", host, func(f *facts) { f.env = []string{"SERVICE_PASSWORD=secret", "SERVICE_ID=x1"} },
			[]string{"web 10.0.0.1:32768 100 id=x1"}, ""},
		{"weight", host, label("SERVICE_WEIGHT", "0"), []string{"web 10.0.0.1:32768 0"}, ""},
		{"weight that is none", host, label("SERVICE_WEIGHT", "much"), nil, "SERVICE_WEIGHT"},
		{"published on loopback", host, func(f *facts) { f.published[tcp80] = []netip.AddrPort{at("127.0.0.1:80")} }, nil, ""},
		{"published on loopback, of a host of one", loopback, func(f *facts) { f.published[tcp80] = []netip.AddrPort{at("127.0.0.2:80")} },
			[]string{"web 127.0.0.2:80 100"}, ""},
		{"published twice", host, func(f *facts) { f.published[tcp80] = []netip.AddrPort{at("10.0.0.3:81"), at("10.0.0.2:80")} },
			[]string{"web 10.0.0.2:80 100", "web 10.0.0.3:81 100"}, ""},
		{"published by an old Engine", host, func(f *facts) { f.published[tcp80] = []netip.AddrPort{netip.AddrPortFrom(netip.Addr{}, 80)} },
			[]string{"web 10.0.0.1:80 100"}, ""},
		{"on the host's network", host, func(f *facts) { f.hostNetwork, f.published = true, nil }, []string{"web 10.0.0.1:80 100"}, ""},
		{"internal", internal, nil, []string{"web 172.17.0.2:80 100"}, ""},
		{"internal, not published", internal, func(f *facts) { f.published = nil }, []string{"web 172.17.0.2:80 100"}, ""},
		{"internal, of a network", inB, nil, []string{"web 172.18.0.2:80 100"}, ""},
		{"internal, not of the network", inB, func(f *facts) { delete(f.networks, "b") }, nil, ""},
		{"internal, without a network", internal, func(f *facts) { f.networks = nil }, nil, ""},
		{"check http", host, label("SERVICE_CHECK_HTTP", "/healthz"), []string{"web 10.0.0.1:32768 100 http://10.0.0.1:32768/healthz 2s/1s"}, ""},
		{"check of a port, with times", host, label("SERVICE_80_CHECK_HTTP", "up", "SERVICE_CHECK_INTERVAL", "15s", "SERVICE_CHECK_TIMEOUT", "3s"),
			[]string{"web 10.0.0.1:32768 100 http://10.0.0.1:32768/up 15s/3s"}, ""},
		{"check https", host, label("SERVICE_CHECK_HTTPS", "/"), []string{"web 10.0.0.1:32768 100 https://10.0.0.1:32768/ 2s/1s"}, ""},
		{"check https of any certificate", host, label("SERVICE_CHECK_HTTPS", "/", "SERVICE_CHECK_TLS_SKIP_VERIFY", "true"),
			[]string{"web 10.0.0.1:32768 100 https+insecure://10.0.0.1:32768/ 2s/1s"}, ""},
		{"check tcp", host, label("SERVICE_CHECK_TCP", "true"), []string{"web 10.0.0.1:32768 100 tcp://10.0.0.1:32768 2s/1s"}, ""},
		{"check cmd", host, label("SERVICE_CHECK_CMD", "/bin/check  -q"), []string{`web 10.0.0.1:32768 100 exec ["/bin/check" "-q"] 2s/1s`}, ""},
		{"check cmd of nothing", host, label("SERVICE_CHECK_CMD", " "), nil, "SERVICE_CHECK_CMD: no command"},
		{"check script", host, label("SERVICE_CHECK_SCRIPT", "rm -r /"), nil, "SERVICE_CHECK_SCRIPT"},
		{"two checks", host, label("SERVICE_CHECK_TCP", "true", "SERVICE_CHECK_HTTP", "/"), nil, "want one of"},
		{"a time that is none", host, label("SERVICE_CHECK_TCP", "true", "SERVICE_CHECK_INTERVAL", "often"), nil, "SERVICE_CHECK_INTERVAL"},
		{"times without a check", host, label("SERVICE_CHECK_INTERVAL", "often"), []string{"web 10.0.0.1:32768 100"}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := box(c.edit)
			wants, err := c.place.plan(f)
			got := []string{}
			for _, w := range wants {
				got = append(got, row(w))
				if w.tags["container"] != "0123456789ab" {
					t.Errorf("tags %v", w.tags)
				}
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("got  %q\nwant %q", got, c.want)
			}
			if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("error %v, want %q", err, c.err)
			}
		})
	}
}

// TestToken: a life of a container has one token at one address, whoever asks.
func TestToken(t *testing.T) {
	life := box(func(f *facts) { f.started = time.Unix(100, 1) })
	next, other := life, life
	next.started = time.Unix(100, 2)
	other.id = "fedcba9876543210"
	w := want{service: "web", addr: at("10.0.0.1:80")}
	elsewhere, api := w, w
	elsewhere.addr = at("10.0.0.1:81")
	api.service = "api"
	tokens := map[string]bool{w.token(next): true, w.token(other): true, elsewhere.token(life): true, api.token(life): true, w.token(life): true}
	if len(tokens) != 5 || w.token(life) != w.token(box(func(f *facts) { f.started = time.Unix(100, 1) })) || len(w.token(life)) != 26 {
		t.Errorf("tokens %v", tokens)
	}
}

func TestState(t *testing.T) {
	health := func(s container.HealthStatus) *container.Health { return &container.Health{Status: s} }
	for _, c := range []struct {
		name string
		s    container.State
		want state
	}{
		{"created", container.State{}, ended},
		{"running", container.State{Running: true}, serving},
		{"without a check", container.State{Running: true, Health: health(container.NoHealthcheck)}, serving},
		{"starting", container.State{Running: true, Health: health(container.Starting)}, waiting},
		{"healthy", container.State{Running: true, Health: health(container.Healthy)}, serving},
		{"unhealthy", container.State{Running: true, Health: health(container.Unhealthy)}, sick},
		{"paused", container.State{Running: true, Paused: true, Health: health(container.Healthy)}, sick},
		{"restarting", container.State{Running: true, Restarting: true}, ended},
		{"dead", container.State{Running: true, Dead: true}, ended},
		{"exited, unhealthy", container.State{Health: health(container.Unhealthy)}, ended},
	} {
		if got := stateOf(&c.s); got != c.want {
			t.Errorf("%s: got %d, want %d", c.name, got, c.want)
		}
	}
}

func TestStops(t *testing.T) {
	for _, c := range []struct {
		own, sent string
		want      bool
	}{
		{"", "15", true}, {"", "9", true}, {"", "1", false}, {"", "2", false}, {"", "", false},
		{"SIGQUIT", "3", true}, {"QUIT", "3", true}, {"3", "3", true}, {"SIGQUIT", "15", true}, {"SIGQUIT", "1", false},
		{"sigwinch", "28", true}, {"SIGRTMIN+3", "37", true}, {"", "SIGTERM", true},
	} {
		if got := (facts{stopSignal: c.own}).stops(c.sent); got != c.want {
			t.Errorf("stop signal %q, sent %q: got %v", c.own, c.sent, got)
		}
	}
}

// TestReadOfLittle: an answer that leaves things out is no crash, and no life.
func TestReadOfLittle(t *testing.T) {
	for _, c := range []container.InspectResponse{
		{}, {State: &container.State{Running: true, StartedAt: "yesterday"}, NetworkSettings: &container.NetworkSettings{}},
		{State: &container.State{}, Config: &container.Config{}, HostConfig: &container.HostConfig{}, NetworkSettings: &container.NetworkSettings{
			Ports: network.PortMap{tcp80: {{HostPort: ""}, {HostPort: "none"}}}, Networks: map[string]*network.EndpointSettings{"n": {}, "null": nil},
		}},
	} {
		f := read(c)
		if wants, _ := (place{advertise: netip.MustParseAddr("10.0.0.1")}).plan(f); len(wants) > 0 || !f.started.IsZero() {
			t.Errorf("%+v", f)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	ip := netip.MustParseAddr("10.0.0.1")
	for _, c := range []struct {
		name string
		cfg  Config
		ok   bool
	}{
		{"the host's address", Config{Advertise: ip}, true},
		{"internal", Config{Internal: true, Network: "n"}, true},
		{"no address", Config{}, false},
		{"an unspecified address", Config{Advertise: netip.IPv4Unspecified()}, false},
		{"a network of the host", Config{Advertise: ip, Network: "n"}, false},
		{"no URL", Config{Advertise: ip, Engine: "engine"}, false},
	} {
		a, err := New(c.cfg, nil, zerolog.Nop())
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
		if err == nil {
			if err := a.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}
