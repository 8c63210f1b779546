package docker

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/network"

	"rollcall/registrar"
	"rollcall/registrar/health"
)

// kind is what a remark came to.
type kind int

const (
	wrongLabel kind = iota // a label is wrong, and costs itself alone
	leftOut                // a port or the container is not registered, though it asks for it
	remarked               // nothing is wrong
	unasked                // it was not asked for
)

// remark is one thing that the owner of a container should know of its labels.
type remark struct {
	kind  kind
	label string // the label or variable, as it is written; empty: the container
	value string // printable, and cut
	text  string // what is wrong and what became of it, or what to write instead
}

// leaves says that a container is left out, which is its owner's trouble if it asks
// to be registered.
func leaves(asked bool, why string) remark {
	if asked {
		return remark{kind: leftOut, text: why}
	}
	return remark{kind: unasked, text: why}
}

// distinct drops what was said before: a label without a port in it is read for each
// port and for each address.
func distinct(all []remark) (out []remark) {
	for _, r := range all {
		if !slices.Contains(out, r) {
			out = append(out, r)
		}
	}
	return out
}

// valueShown is how much of a label's value the log shows, in bytes.
const valueShown = 60

// shown is a label's value for the log.
func shown(v string) string {
	if len(v) > valueShown {
		return strconv.QuoteToASCII(v[:valueShown]) + fmt.Sprintf("… (%d bytes)", len(v))
	}
	return strconv.QuoteToASCII(v)
}

// attrs are what a container says of one port, by lower-case names without
// SERVICE_: variables first, labels over them, those of this port over both.
type attrs struct {
	all      map[string]string
	as       map[string]string // by name, how the label or variable itself is called
	ofPort   map[string]bool   // said of this very port
	labelled map[string]bool   // said by a label
	anyName  bool              // a port that may be another one has a name
}

// portOf splits the name of an attribute, lower-case and without SERVICE_, into the
// port that it is of, if any, and the rest.
func portOf(name string) (port, rest string, ok bool) {
	port, rest, found := strings.Cut(name, "_")
	if _, err := strconv.Atoi(port); err != nil || !found {
		return "", name, false
	}
	return port, rest, true
}

// said calls add for each SERVICE_… of a container: variables first, then labels in
// order.
func said(f facts, add func(as, name, value string, label bool)) {
	one := func(as, value string, label bool) {
		if name, ours := strings.CutPrefix(as, "SERVICE_"); ours {
			add(as, strings.ToLower(name), value, label)
		}
	}
	for _, kv := range f.env {
		as, value, _ := strings.Cut(kv, "=")
		one(as, value, false)
	}
	for _, as := range slices.Sorted(maps.Keys(f.labels)) {
		one(as, f.labels[as], true)
	}
}

func readAttrs(f facts, port string) attrs {
	a := attrs{all: map[string]string{}, as: map[string]string{}, ofPort: map[string]bool{}, labelled: map[string]bool{}}
	said(f, func(as, name, value string, label bool) {
		number, rest, ofPort := portOf(name)
		a.anyName = a.anyName || rest == "name" && value != ""
		switch {
		case ofPort && number != port, !ofPort && a.ofPort[name]:
			return
		case ofPort:
			name = rest
			a.ofPort[name] = true
		}
		a.all[name], a.as[name], a.labelled[name] = value, as, label
	})
	return a
}

// wrong makes a remark of one attribute.
func (a attrs) wrong(name, format string, args ...any) remark {
	return remark{label: a.as[name], value: shown(a.all[name]), text: fmt.Sprintf(format, args...)}
}

// nameRule is what registrar.ParseService takes, in words.
const nameRule = "want at most 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or a digit"

// service is what a port is registered as; empty with the reason in a remark.
func (p place) service(f facts, a attrs, port string, grouped bool) (registrar.Service, []remark) {
	var remarks []remark
	given := a.all["name"]
	name := strings.ToLower(given)
	if name != given {
		r := a.wrong("name", "service names have no capitals; registered as %s", strings.ToLower(shown(given)))
		r.kind = remarked
		remarks = append(remarks, r)
	}
	out := func(format string, args ...any) (registrar.Service, []remark) {
		r := remark{kind: leftOut, text: fmt.Sprintf(format, args...)}
		if given != "" {
			r.label, r.value = a.as["name"], shown(given)
		}
		return "", append(remarks, r)
	}
	if given == "" {
		if name = imageName(f); name == "" {
			return out("it was started by its image's id, %s, which names no service: set SERVICE_NAME", shown(f.image))
		}
	}
	suffixed := name
	if grouped && !a.ofPort["name"] {
		suffixed += "-" + port
	}
	svc, err := registrar.ParseService(suffixed)
	switch _, alone := registrar.ParseService(name); {
	case err == nil:
	case given == "":
		return out("its image's name makes no service name (%s): set SERVICE_NAME", shown(suffixed))
	case alone == nil:
		return out("service name %s is too long with the port: set SERVICE_%s_NAME, to which none is added", shown(suffixed), port)
	default:
		return out("service name %s: %s", shown(name), nameRule)
	}
	if len(p.services) > 0 && !slices.Contains(p.services, svc) {
		svc, remarks := out("service %s is none of those that are let in: start the agent with --service %s too if it should be", svc, svc)
		if given == "" { // that nobody has asked for it is not its owner's mistake
			remarks[len(remarks)-1].kind = remarked
		}
		return svc, remarks
	}
	return svc, remarks
}

// imageName is what a service is called that has no name: the last part of the
// image's, without its tag and digest; empty if the image was named by its id.
func imageName(f facts) string {
	name, _, digested := strings.Cut(path.Base(f.image), "@")
	name, tag, tagged := strings.Cut(name, ":")
	switch {
	case digested:
	case name == "sha256" && tagged && isHex(tag):
		return ""
	// As short as it may be: the Engine takes any beginning that names one image.
	case !tagged && name == f.image && isHex(name) && (len(name) >= 12 || strings.HasPrefix(f.imageID, "sha256:"+name)):
		return ""
	}
	return name
}

func isHex(s string) bool { return s != "" && strings.Trim(s, "0123456789abcdef") == "" }

// weight reads SERVICE_WEIGHT. One that cannot be is the default: a larger number may
// be by another product's scale.
func (a attrs) weight() (int, []remark) {
	v := a.all["weight"]
	if v == "" {
		return registrar.DefaultWeight, nil
	}
	w, err := strconv.Atoi(v)
	if err != nil || registrar.CheckWeight(w) != nil {
		return registrar.DefaultWeight, []remark{a.wrong("weight", "want a whole number from 0 to %d; it has the weight %d", registrar.MaxWeight, registrar.DefaultWeight)}
	}
	return w, nil
}

// tags are SERVICE_TAGS, split at commas (k=v, or k for k=true), SERVICE_ID as
// id, and every label that means nothing else. A variable of that kind is no tag:
// it may be the app's own, and a secret. What the register would refuse is left out.
func (a attrs) tags() (map[string]string, []remark) {
	tags := map[string]string{}
	var remarks []remark
	add := func(name, key, value string) {
		if err := registrar.CheckTag(key, value); err != nil {
			remarks = append(remarks, a.wrong(name, "registered without this tag: %v", err))
			return
		}
		tags[key] = value
	}
	for _, name := range slices.Sorted(maps.Keys(a.all)) {
		switch {
		case name == "id":
			add(name, name, a.all[name])
		case name == "name", name == "tags", name == "weight", name == "ignore", strings.HasPrefix(name, "check_"):
		case a.labelled[name]:
			add(name, name, a.all[name])
		}
	}
	for _, t := range splitTags(a.all["tags"]) {
		k, v, found := strings.Cut(t, "=")
		if !found {
			v = "true"
		}
		if k != "" {
			add("tags", k, v)
		}
	}
	return tags, remarks
}

// splitTags splits at commas, as Registrator does: a comma after a backslash is one of
// the tag, without that backslash. Every other backslash stands for itself.
func splitTags(s string) (tags []string) {
	var tag strings.Builder
	end := func() {
		if t := strings.TrimSpace(tag.String()); t != "" {
			tags = append(tags, t)
		}
		tag.Reset()
	}
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '\\' && i+1 < len(s) && s[i+1] == ',':
			i++
			tag.WriteByte(',')
		case s[i] == ',':
			end()
		default:
			tag.WriteByte(s[i])
		}
	}
	end()
	return tags
}

// fit takes tags out of w until its metadata has room in the register: always the
// largest, of equal ones the first by name, never that of the container. It returns
// their names.
func (p place) fit(w want) (dropped []string) {
	const later = 9_999_999_999_999 // unix ms, until the year 2286
	m := registrar.Meta{ID: strings.Repeat("X", tokenLen), Weight: w.weight, Zone: p.zone, Tags: w.tags, Draining: true, Registered: later}
	size := func(v any) int {
		b, err := json.Marshal(v)
		if err != nil {
			panic(err) // of strings and numbers
		}
		return len(b)
	}
	for size(m) > registrar.MaxMeta && len(w.tags) > 1 {
		largest, most := "", 0
		for _, k := range slices.Sorted(maps.Keys(w.tags)) {
			if n := size(k) + size(w.tags[k]); k != "container" && n > most {
				largest, most = k, n
			}
		}
		delete(w.tags, largest)
		dropped = append(dropped, largest)
	}
	return dropped
}

// checks are the ways in which the agent looks, in the order in which Registrator
// takes the first one.
var checks = []string{"check_http", "check_https", "check_cmd", "check_tcp"}

// moot are what Registrator knows too and what means nothing here.
var moot = []string{"check_initial_status", "check_deregister_after"}

// check reads SERVICE_CHECK_*. What cannot be understood is said, and then the
// container's own state and HEALTHCHECK count alone: a container that is left out
// serves nobody, and balancers have a check of their own.
func (a attrs) check(addr netip.AddrPort) (c check, remarks []remark) {
	const instead = "; until then it counts as healthy while the container does"
	way := ""
	for _, w := range checks {
		v := a.all[w]
		if no, err := strconv.ParseBool(v); v == "" || w == "check_tcp" && err == nil && !no {
			continue
		}
		if way != "" {
			remarks = append(remarks, a.wrong(w, "one check is enough: %s is the one that looks", a.as[way]))
			continue
		}
		way = w
	}
	// What stands in the place of what is asked for; empty = a check that is named above.
	without := instead
	if way != "" {
		without = ""
	}
	for _, name := range slices.Sorted(maps.Keys(a.all)) {
		v := a.all[name]
		switch {
		case v == "" || !strings.HasPrefix(name, "check_") || slices.Contains(checks, name) || slices.Contains(moot, name):
		case name == "check_script":
			remarks = append(remarks, a.wrong(name, "it would run a container's word on the host: want SERVICE_CHECK_CMD, which runs in the container%s", without))
		case name == "check_ttl":
			remarks = append(remarks, a.wrong(name, "the agent beats, the app need not: want SERVICE_CHECK_HTTP, _HTTPS, _TCP or _CMD, or a HEALTHCHECK%s", without))
		case name == "check_interval" || name == "check_timeout":
		case name == "check_tls_skip_verify":
			if _, err := strconv.ParseBool(v); err != nil {
				remarks = append(remarks, a.wrong(name, "want true or false; certificates are verified"))
			}
		default:
			r := a.wrong(name, "there is no such label: want SERVICE_CHECK_HTTP, _HTTPS, _TCP, _CMD, _INTERVAL or _TIMEOUT%s", without)
			r.value = "" // it may be a variable of the app's own
			remarks = append(remarks, r)
		}
	}
	if way == "" {
		return check{}, remarks
	}
	v := a.all[way]
	switch scheme := strings.TrimPrefix(way, "check_"); scheme {
	case "cmd":
		if c.command = strings.Fields(v); len(c.command) == 0 {
			return check{}, append(remarks, a.wrong(way, "no command%s", instead))
		}
	case "tcp":
		c.url = "tcp://" + addr.String()
	default:
		if skip, err := strconv.ParseBool(a.all["check_tls_skip_verify"]); err == nil && skip && scheme == "https" {
			scheme = "https+insecure"
		}
		c.url = scheme + "://" + addr.String() + "/" + strings.TrimPrefix(v, "/")
		if _, err := health.Parse(c.url, nil, nil); err != nil {
			return check{}, append(remarks, a.wrong(way, "want a path such as /healthz%s", instead))
		}
	}
	var told []remark
	c.interval, told = a.duration("check_interval", health.DefaultInterval, health.MinInterval)
	remarks = append(remarks, told...)
	c.timeout, told = a.duration("check_timeout", health.DefaultTimeout, health.MinTimeout)
	return c, append(remarks, told...)
}

// duration reads a time. A number without a unit is taken for seconds, which Consul
// refuses and nobody means otherwise.
func (a attrs) duration(name string, usual, least time.Duration) (time.Duration, []remark) {
	v := strings.TrimSpace(a.all[name])
	if v == "" {
		return usual, nil
	}
	d, err := time.ParseDuration(v)
	var remarks []remark
	if _, number := strconv.ParseFloat(v, 64); err != nil && number == nil {
		if d, err = time.ParseDuration(v + "s"); err == nil {
			remarks = []remark{a.wrong(name, "a number without a unit is taken for seconds: write %ss", v)}
		}
	}
	if err != nil || d < least {
		return usual, []remark{a.wrong(name, "want a time of at least %v, such as 5s; it is %v", least, usual)}
	}
	return d, remarks
}

// tell logs what the owner of the container should know.
func (w *worker) tell(remarks []remark) {
	for _, r := range remarks {
		line, says := w.log.Warn(), "a label is wrong; registered without it"
		switch r.kind {
		case leftOut:
			says = "not registered as it is labelled"
		case remarked:
			line, says = w.log.Info(), "registered otherwise than it is labelled"
		case unasked:
			line, says = w.log.Debug(), "nothing to register"
		}
		if line = line.Str("name", w.facts.name); r.label != "" {
			line = line.Str("label", r.label)
		}
		if r.value != "" {
			line = line.Str("value", r.value)
		}
		line.Str("why", r.text).Msg(says)
	}
}

// meant are the attributes that mean something, also as variables.
func meant(name string) bool {
	return slices.Contains([]string{"name", "tags", "id", "weight", "ignore"}, name) || strings.HasPrefix(name, "check_")
}

// strays finds SERVICE_<port>_… of ports that the container does not have: what its
// owner wrote there goes to nobody.
func (p place) strays(f facts) (remarks []remark) {
	said(f, func(as, name, value string, label bool) {
		port, rest, ofPort := portOf(name)
		if !ofPort || !label && !meant(rest) || rest == "ignore" {
			return
		}
		r := remark{label: as, value: shown(value)}
		for _, n := range f.exposed {
			switch {
			case n.Port() != port:
			case n.Proto() == network.TCP:
				return
			default:
				r.text = "port " + port + " is one of UDP, for which HAProxy has no use"
			}
		}
		if r.text == "" {
			r.text = "the container has no port " + port + ": it means nothing"
			for n, bindings := range f.published {
				for _, b := range bindings {
					if strconv.Itoa(int(b.Port())) == port && n.Proto() == network.TCP {
						r.text = fmt.Sprintf("%s is where the host publishes the container's port %s: write SERVICE_%s_%s", port, n.Port(), n.Port(), strings.ToUpper(rest))
					}
				}
			}
		}
		remarks = append(remarks, r)
	})
	return remarks
}
