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
		told  string // remarks as rows, one after another; empty = none but of what was not asked for
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
		{"another port's name", host, label("SERVICE_81_NAME", "api"), []string{"web 10.0.0.1:32768 100"}, `wrong SERVICE_81_NAME="api": the container has no port 81: it means nothing`},
		{"no label of ours", host, label("SERVICE", "x", "MY_SERVICE_NAME", "x", "service_name", "x"), []string{"web 10.0.0.1:32768 100"}, ""},
		{"a name with capitals", host, label("SERVICE_NAME", "Web"), []string{"web 10.0.0.1:32768 100"}, `remarked SERVICE_NAME="Web": service names have no capitals; registered as "web"`},
		{"two ports", host, two(), []string{"web-80 10.0.0.1:32768 100", "web-443 10.0.0.9:8443 100"}, ""},
		{"two ports, named", host, two("SERVICE_NAME", "api"), []string{"api-80 10.0.0.1:32768 100", "api-443 10.0.0.9:8443 100"}, ""},
		{"two ports, one named", host, two("SERVICE_443_NAME", "tls"), []string{"web-80 10.0.0.1:32768 100", "tls 10.0.0.9:8443 100"}, ""},
		{"two ports, one ignored", host, two("SERVICE_443_IGNORE", "1"), []string{"web-80 10.0.0.1:32768 100"}, ""},
		{"two ports, one with a wrong weight", host, two("SERVICE_443_WEIGHT", "257"), []string{"web-80 10.0.0.1:32768 100", "web-443 10.0.0.9:8443 100"}, `wrong SERVICE_443_WEIGHT="257": want a whole number from 0 to 256; it has the weight 100`},
		{"UDP", host, func(f *facts) {
			f.exposed = append(f.exposed, udp53)
			f.published[udp53] = []netip.AddrPort{at("0.0.0.0:53")}
		}, []string{"web 10.0.0.1:32768 100"}, ""},
		{"ignored", host, label("SERVICE_IGNORE", "true"), nil, ""},
		{"not published", host, func(f *facts) { f.published = nil }, nil, ""},
		{"explicit, without a name", explicit, label("SERVICE_TAGS", "a"), nil, ""},
		{"explicit, with a name", explicit, label("SERVICE_NAME", "api"), []string{"api 10.0.0.1:32768 100"}, ""},
		{"explicit, one port with a name", explicit, two("SERVICE_443_NAME", "tls"), []string{"tls 10.0.0.9:8443 100"}, ""},
		{"of a service that is let in", some, label("SERVICE_NAME", "api"), []string{"api 10.0.0.1:32768 100"}, ""},
		{"of another one", some, label("SERVICE_NAME", "payments"), nil, `left out SERVICE_NAME="payments": service payments is none of those that are let in: start the agent with --service payments too if it should be`},
		{"of another one, by its image", some, nil, nil, "remarked: service web is none of those that are let in: start the agent with --service web too if it should be"},
		{"one port of another", some, two(), []string{"web-80 10.0.0.1:32768 100"}, "remarked: service web-443 is none of those that are let in: start the agent with --service web-443 too if it should be"},
		{"tags", host, label("SERVICE_TAGS", "a, b=c,,=d", "SERVICE_80_REGION", "eu", "SERVICE_ID", "x1"),
			[]string{"web 10.0.0.1:32768 100 a=true,b=c,id=x1,region=eu"}, ""},
		{"a variable of no meaning is no tag", host, func(f *facts) { f.env = []string{"SERVICE_PASSWORD=secret", "SERVICE_ID=x1"} },
			[]string{"web 10.0.0.1:32768 100 id=x1"}, ""},
		{"weight", host, label("SERVICE_WEIGHT", "0"), []string{"web 10.0.0.1:32768 0"}, ""},
		{"weight that is none", host, label("SERVICE_WEIGHT", "much"), []string{"web 10.0.0.1:32768 100"}, `wrong SERVICE_WEIGHT="much": want a whole number from 0 to 256; it has the weight 100`},
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
		{"check cmd of nothing", host, label("SERVICE_CHECK_CMD", " "), []string{"web 10.0.0.1:32768 100"}, `wrong SERVICE_CHECK_CMD=" ": no command; until then it counts as healthy while the container does`},
		{"check script", host, label("SERVICE_CHECK_SCRIPT", "rm -r /"), []string{"web 10.0.0.1:32768 100"},
			`wrong SERVICE_CHECK_SCRIPT="rm -r /": it would run a container's word on the host: want SERVICE_CHECK_CMD, which runs in the container; until then it counts as healthy while the container does`},
		{"two checks", host, label("SERVICE_CHECK_TCP", "true", "SERVICE_CHECK_HTTP", "/"), []string{"web 10.0.0.1:32768 100 http://10.0.0.1:32768/ 2s/1s"}, `wrong SERVICE_CHECK_TCP="true": one check is enough: SERVICE_CHECK_HTTP is the one that looks`},
		{"a time that is none", host, label("SERVICE_CHECK_TCP", "true", "SERVICE_CHECK_INTERVAL", "often"), []string{"web 10.0.0.1:32768 100 tcp://10.0.0.1:32768 2s/1s"},
			`wrong SERVICE_CHECK_INTERVAL="often": want a time of at least 10ms, such as 5s; it is 2s`},
		{"times without a check", host, label("SERVICE_CHECK_INTERVAL", "often"), []string{"web 10.0.0.1:32768 100"}, ""},
		{"image by its id", host, func(f *facts) { f.image = "sha256:0123abcd" }, nil, `left out: it was started by its image's id, "sha256:0123abcd", which names no service: set SERVICE_NAME`},
		{"image by its id, alone", host, func(f *facts) { f.image, f.imageID = strings.Repeat("0123abcd", 8), "" }, nil,
			`left out: it was started by its image's id, "` + strings.Repeat("0123abcd", 7) + `0123"… (64 bytes), which names no service: set SERVICE_NAME`},
		{"image by a short id", host, func(f *facts) { f.image, f.imageID = "ca", "sha256:cafe"+strings.Repeat("0", 60) }, nil,
			`left out: it was started by its image's id, "ca", which names no service: set SERVICE_NAME`},
		{"image whose name could be an id", host, func(f *facts) { f.image, f.imageID = "cafe", "sha256:"+strings.Repeat("0", 64) }, []string{"cafe 10.0.0.1:32768 100"}, ""},
		{"image whose name could be an id, with a tag", host, func(f *facts) { f.image, f.imageID = "cafe:1", "sha256:cafe"+strings.Repeat("0", 60) }, []string{"cafe 10.0.0.1:32768 100"}, ""},
		{"image that is called so", host, func(f *facts) { f.image = "sha256:latest" }, []string{"sha256 10.0.0.1:32768 100"}, ""},
		{"image by its id, named", host, func(f *facts) { f.image = "sha256:0123abcd"; f.labels["SERVICE_NAME"] = "api" }, []string{"api 10.0.0.1:32768 100"}, ""},
		{"image with a tag and a digest", host, func(f *facts) { f.image = "reg:5000/a/api:1@sha256:00" }, []string{"api 10.0.0.1:32768 100"}, ""},
		{"image by its id, nobody asked", explicit, func(f *facts) { f.image = "sha256:0123abcd" }, nil, ""},
		{"an image's name that is too long", host, func(f *facts) { f.image = strings.Repeat("a", 64) + ":1" }, nil,
			`left out: its image's name makes no service name ("` + strings.Repeat("a", 60) + `"… (64 bytes)): set SERVICE_NAME`},
		{"a name that is none", host, label("SERVICE_NAME", "_web"), nil,
			`left out SERVICE_NAME="_web": service name "_web": want at most 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or a digit`},
		{"a name that is none, of two ports", host, two("SERVICE_NAME", "a b"), nil,
			`left out SERVICE_NAME="a b": service name "a b": want at most 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or a digit`},
		{"a name that is none, of one port", host, two("SERVICE_443_NAME", "\n"), []string{"web-80 10.0.0.1:32768 100"},
			`left out SERVICE_443_NAME="\n": service name "\n": want at most 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or a digit`},
		{"a name that is too long with its port", host, two("SERVICE_NAME", strings.Repeat("a", 61), "SERVICE_443_NAME", "tls"), []string{"tls 10.0.0.9:8443 100"},
			`left out SERVICE_NAME="` + strings.Repeat("a", 60) + `"… (61 bytes): service name "` + strings.Repeat("a", 60) + `"… (64 bytes) is too long with the port: set SERVICE_80_NAME, to which none is added`},
		{"capitals, of two ports", host, two("SERVICE_NAME", "API"), []string{"api-80 10.0.0.1:32768 100", "api-443 10.0.0.9:8443 100"},
			`remarked SERVICE_NAME="API": service names have no capitals; registered as "api"`},
		{"the host's port in the place of the container's", host, label("SERVICE_32768_NAME", "api"), []string{"web 10.0.0.1:32768 100"},
			`wrong SERVICE_32768_NAME="api": 32768 is where the host publishes the container's port 80: write SERVICE_80_NAME`},
		{"a variable of the app's own", host, func(f *facts) { f.env = []string{"SERVICE_81_HOST=x"} }, []string{"web 10.0.0.1:32768 100"}, ""},
		{"a name of a UDP port", host, func(f *facts) {
			f.exposed = append(f.exposed, udp53)
			f.labels["SERVICE_53_NAME"] = "dns"
		}, []string{"web 10.0.0.1:32768 100"}, `wrong SERVICE_53_NAME="dns": port 53 is one of UDP, for which HAProxy has no use`},
		{"HTTP/3", host, func(f *facts) {
			f.exposed = []network.Port{tcp443, network.MustParsePort("443/udp")}
			f.published = map[network.Port][]netip.AddrPort{tcp443: {at("0.0.0.0:443")}, f.exposed[1]: {at("0.0.0.0:443")}}
			f.labels["SERVICE_443_TAGS"] = "h3"
		}, []string{"web 10.0.0.1:443 100 h3=true"}, ""},
		{"UDP alone", host, func(f *facts) { f.exposed = []network.Port{udp53} }, nil, ""},
		{"UDP alone, named", host, func(f *facts) { f.exposed = []network.Port{udp53}; f.labels["SERVICE_NAME"] = "dns" }, nil,
			"left out: it has UDP ports only, for which HAProxy has no use"},
		{"UDP alone, ignored", host, func(f *facts) {
			f.exposed = []network.Port{udp53}
			f.labels["SERVICE_NAME"], f.labels["SERVICE_IGNORE"] = "dns", "1"
		}, nil, ""},
		{"named, not published", host, func(f *facts) { f.published = nil; f.labels["SERVICE_NAME"] = "api" }, nil,
			"left out: port 80 is not published: docker run -p 80, or start the agent with --internal"},
		{"named by a variable of a port, not published", host, func(f *facts) { f.published = nil; f.env = []string{"SERVICE_80_NAME=api"} }, nil,
			"left out: port 80 is not published: docker run -p 80, or start the agent with --internal"},
		{"named, no port", host, func(f *facts) { f.published, f.exposed = nil, nil; f.labels["SERVICE_NAME"] = "api" }, nil,
			"left out: it has no port: publish one, as with docker run -p PORT"},
		{"named, ignored, no port", host, func(f *facts) {
			f.published, f.exposed = nil, nil
			f.labels["SERVICE_NAME"], f.labels["SERVICE_IGNORE"] = "api", "true"
		}, nil, ""},
		{"named, ignored, not published", host, func(f *facts) {
			f.published = nil
			f.labels["SERVICE_NAME"], f.labels["SERVICE_IGNORE"] = "api", "true"
		}, nil, ""},
		{"named, published on loopback", host, func(f *facts) {
			f.published[tcp80] = []netip.AddrPort{at("127.0.0.1:80")}
			f.labels["SERVICE_NAME"] = "api"
		}, nil,
			"left out: port 80 is published on 127.0.0.1 only, which is for this host alone: publish it on 10.0.0.1"},
		{"published on loopback too", host, func(f *facts) {
			f.published[tcp80] = []netip.AddrPort{at("127.0.0.1:80"), at("10.0.0.3:80")}
			f.labels["SERVICE_NAME"] = "api"
		},
			[]string{"api 10.0.0.3:80 100"}, ""},
		{"named, on the host's network, no port", host, func(f *facts) {
			f.hostNetwork, f.published, f.exposed = true, nil, nil
			f.labels["SERVICE_NAME"] = "api"
		}, nil, "left out: it is on the host's network, and nothing says which port is its: EXPOSE it in the image, or run it with --expose PORT"},
		{"named, not of the network", inB, func(f *facts) { delete(f.networks, "b"); f.labels["SERVICE_NAME"] = "api" }, nil,
			"left out: port 80 is not in the network b of --network: the container is in a"},
		{"named, without a network", internal, func(f *facts) { f.networks = nil; f.labels["SERVICE_NAME"] = "api" }, nil,
			"left out: port 80 has no address: the container is in no network"},
		{"named, on the host's network, internal", internal, func(f *facts) { f.networks, f.hostNetwork = nil, true; f.labels["SERVICE_NAME"] = "api" }, nil,
			"left out: port 80 has no address of its own: the container is on the host's network, and --internal registers containers' own addresses"},
		{"named, internal, no port", internal, func(f *facts) { f.exposed = nil; f.labels["SERVICE_NAME"] = "api" }, nil,
			"left out: it exposes no port: EXPOSE it in the image, or run it with --expose PORT"},
		{"one port named and published on loopback", host, func(f *facts) {
			two("SERVICE_443_NAME", "tls")(f)
			f.published[tcp443] = []netip.AddrPort{at("127.0.0.1:8443")}
		}, []string{"web 10.0.0.1:32768 100"}, "remarked: port 443 is published on 127.0.0.1 only, which is for this host alone: publish it on 10.0.0.1"},
		{"a comma in a tag", host, label("SERVICE_TAGS", `a\,b,c=d\\e\,,/(;\,:-_)/`), []string{`web 10.0.0.1:32768 100 /(;,:-_)/=true,a,b=true,c=d\\e,`}, ""},
		{"a backslash at the end of the tags", host, label("SERVICE_TAGS", `a,b=c:\`), []string{`web 10.0.0.1:32768 100 a=true,b=c:\`}, ""},
		{"a tag that is too long", host, label("SERVICE_DESC", strings.Repeat("x", 300), "SERVICE_TAGS", "a"), []string{"web 10.0.0.1:32768 100 a=true"},
			`wrong SERVICE_DESC="` + strings.Repeat("x", 60) + `"… (300 bytes): registered without this tag: tag desc of 300 bytes, at most 255`},
		{"a tag of two lines", host, label("SERVICE_DESC", "a\nb"), []string{"web 10.0.0.1:32768 100"},
			`wrong SERVICE_DESC="a\nb": registered without this tag: tag desc "a\nb": want UTF-8 without control characters`},
		{"a tag of no UTF-8", host, label("SERVICE_TAGS", "a=\xff,b"), []string{"web 10.0.0.1:32768 100 b=true"},
			`wrong SERVICE_TAGS="a=\xff,b": registered without this tag: tag a "\xff": want UTF-8 without control characters`},
		{"a tag's key that is too long", host, label("SERVICE_TAGS", strings.Repeat("k", 64)+",b"), []string{"web 10.0.0.1:32768 100 b=true"},
			`wrong SERVICE_TAGS="` + strings.Repeat("k", 60) + `"… (66 bytes): registered without this tag: tag of 64 bytes, at most 63`},
		{"a label's name that is too long", host, label("SERVICE_"+strings.Repeat("K", 64), "v"), []string{"web 10.0.0.1:32768 100"},
			`wrong SERVICE_` + strings.Repeat("K", 64) + `="v": registered without this tag: tag of 64 bytes, at most 63`},
		{"an id that is too long", host, label("SERVICE_ID", strings.Repeat("i", 256)), []string{"web 10.0.0.1:32768 100"},
			`wrong SERVICE_ID="` + strings.Repeat("i", 60) + `"… (256 bytes): registered without this tag: tag id of 256 bytes, at most 255`},
		{"a weight that is a fraction", host, label("SERVICE_WEIGHT", "1.5"), []string{"web 10.0.0.1:32768 100"}, `wrong SERVICE_WEIGHT="1.5": want a whole number from 0 to 256; it has the weight 100`},
		{"times without a unit", host, label("SERVICE_CHECK_TCP", "1", "SERVICE_CHECK_INTERVAL", "5", "SERVICE_CHECK_TIMEOUT", "0.5"),
			[]string{"web 10.0.0.1:32768 100 tcp://10.0.0.1:32768 5s/500ms"},
			`wrong SERVICE_CHECK_INTERVAL="5": a number without a unit is taken for seconds: write 5s; wrong SERVICE_CHECK_TIMEOUT="0.5": a number without a unit is taken for seconds: write 0.5s`},
		{"times that cannot be", host, label("SERVICE_CHECK_TCP", "1", "SERVICE_CHECK_INTERVAL", "0", "SERVICE_CHECK_TIMEOUT", "-3s"),
			[]string{"web 10.0.0.1:32768 100 tcp://10.0.0.1:32768 2s/1s"},
			`wrong SERVICE_CHECK_INTERVAL="0": want a time of at least 10ms, such as 5s; it is 2s; wrong SERVICE_CHECK_TIMEOUT="-3s": want a time of at least 1ms, such as 5s; it is 1s`},
		{"a time beyond measure", host, label("SERVICE_CHECK_TCP", "1", "SERVICE_CHECK_INTERVAL", "99999999999999"),
			[]string{"web 10.0.0.1:32768 100 tcp://10.0.0.1:32768 2s/1s"},
			`wrong SERVICE_CHECK_INTERVAL="99999999999999": want a time of at least 10ms, such as 5s; it is 2s`},
		{"check http of no path", host, label("SERVICE_CHECK_HTTP", "/%zz"), []string{"web 10.0.0.1:32768 100"},
			`wrong SERVICE_CHECK_HTTP="/%zz": want a path such as /healthz; until then it counts as healthy while the container does`},
		{"check tcp that is off", host, label("SERVICE_CHECK_TCP", "false"), []string{"web 10.0.0.1:32768 100"}, ""},
		{"check script beside another", host, label("SERVICE_CHECK_SCRIPT", "x", "SERVICE_CHECK_HTTP", "/"), []string{"web 10.0.0.1:32768 100 http://10.0.0.1:32768/ 2s/1s"},
			`wrong SERVICE_CHECK_SCRIPT="x": it would run a container's word on the host: want SERVICE_CHECK_CMD, which runs in the container`},
		{"check ttl", host, label("SERVICE_CHECK_TTL", "30s", "SERVICE_CHECK_INITIAL_STATUS", "passing"), []string{"web 10.0.0.1:32768 100"},
			`wrong SERVICE_CHECK_TTL="30s": the agent beats, the app need not: want SERVICE_CHECK_HTTP, _HTTPS, _TCP or _CMD, or a HEALTHCHECK; until then it counts as healthy while the container does`},
		{"a check that is none", host, func(f *facts) { f.env = []string{"SERVICE_CHECK_HTPP=/secret"} }, []string{"web 10.0.0.1:32768 100"},
			`wrong SERVICE_CHECK_HTPP: there is no such label: want SERVICE_CHECK_HTTP, _HTTPS, _TCP, _CMD, _INTERVAL or _TIMEOUT; until then it counts as healthy while the container does`},
		{"any certificate, or not", host, label("SERVICE_CHECK_HTTPS", "/", "SERVICE_CHECK_TLS_SKIP_VERIFY", "yes"), []string{"web 10.0.0.1:32768 100 https://10.0.0.1:32768/ 2s/1s"},
			`wrong SERVICE_CHECK_TLS_SKIP_VERIFY="yes": want true or false; certificates are verified`},
		{"a mistake of two addresses", host, func(f *facts) {
			f.published[tcp80] = []netip.AddrPort{at("10.0.0.3:81"), at("10.0.0.2:80")}
			f.labels["SERVICE_WEIGHT"] = "-1"
		}, []string{"web 10.0.0.2:80 100", "web 10.0.0.3:81 100"}, `wrong SERVICE_WEIGHT="-1": want a whole number from 0 to 256; it has the weight 100`},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := box(c.edit)
			wants, remarks := c.place.plan(f)
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
			if told := rows(remarks); told != c.told {
				t.Errorf("told %s\nwant %s", told, c.told)
			}
		})
	}
}

// rows are remarks on a line, without those of what nobody asked for.
func rows(remarks []remark) string {
	var out []string
	for _, r := range remarks {
		s := map[kind]string{wrongLabel: "wrong", leftOut: "left out", remarked: "remarked", unasked: ""}[r.kind]
		if s == "" {
			continue
		}
		if r.label != "" {
			s += " " + r.label
		}
		if r.value != "" {
			s += "=" + r.value
		}
		out = append(out, s+": "+r.text)
	}
	return strings.Join(out, "; ")
}

// TestFit: of too many tags the largest are left out, of equal ones the first by
// name, and what remains is as much as the register takes, draining and under any
// token.
func TestFit(t *testing.T) {
	p := place{advertise: netip.MustParseAddr("10.0.0.1"), zone: strings.Repeat("z", 63)}
	f := box(func(f *facts) {
		for i := range 20 {
			f.labels[fmt.Sprintf("SERVICE_T%02d", i)] = strings.Repeat("<", 40) // 6 bytes each as JSON
		}
		f.labels["SERVICE_BIG"] = strings.Repeat("x", 255)
		f.labels["SERVICE_TAGS"] = "small"
	})
	wants, remarks := p.plan(f)
	const told = "wrong: all metadata may have 4096 bytes as JSON; registered without its largest tags: big, t00, t01, t02, t03, t04"
	if got := rows(remarks); got != told {
		t.Errorf("told %s\nwant %s", got, told)
	}
	w := wants[0]
	for _, k := range []string{"container", "small", "t05", "t19"} {
		if w.tags[k] == "" {
			t.Errorf("without %s: %v", k, w.tags)
		}
	}
	b, err := registrar.NewBeater(registrar.BeaterConfig{Service: w.service, Addr: w.addr, Weight: w.weight, Zone: p.zone, Tags: w.tags}, nil, zerolog.Nop())
	if b == nil || err != nil {
		t.Errorf("not fit to be registered: %v", err)
	}
	w.tags["t04"] = strings.Repeat("<", 40)
	if _, err := registrar.NewBeater(registrar.BeaterConfig{Service: w.service, Addr: w.addr, Weight: w.weight, Zone: p.zone, Tags: w.tags}, nil, zerolog.Nop()); err == nil {
		t.Error("one more would have fitted")
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
