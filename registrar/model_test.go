package registrar

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
)

// model is the register in plain Go: what DESIGN says of each change, without
// keys, indexes or scripts. It is exact: TestHistories demands of Redis the same
// answer, word for word.
type model struct {
	now           int64 // unix ms
	ttl, interval int64 // ms
	slow          int64 // ms: by what somebody may beat who does not know them; 0 = nobody
	slowAt        string
	epoch         string
	global        int64
	services      map[Service]*serviceModel
	pulses        map[string]string // by reaper
	replid        string            // of the process, so in no snapshot
	letGo         bool              // a reaper has let one go of late
	messages      []string          // announced since the last look
	events        []string          // the log of changes, all of it
}

type serviceModel struct {
	version int64
	here    map[netip.AddrPort]*instanceModel
	words   map[netip.AddrPort]wordModel
	bound   map[netip.AddrPort]boundModel
	gone    map[netip.AddrPort]Gone
	// noted is when an absent address was last noted, changed the version of an
	// address's last change, pruned the highest that was dropped with a note.
	noted, changed map[netip.AddrPort]int64
	pruned         int64
	listed         bool // its name is on the list of services
}

type instanceModel struct {
	token, meta string
	agent       string // of its metadata
	weight      int
	draining    bool
	beat        int64
}

// operator is who says all words of the model.
const operator = "alice@host"

// wordModel is an operator's word; weight is -1 where there is none.
type wordModel struct {
	state  AdminState
	weight int
	reason string
}

// boundModel is an operator's word about one registration.
type boundModel struct {
	id string
	wordModel
}

// of returns what was said of the registration that is at addr, and whether something is
// stored there of another one.
func (s *serviceModel) of(addr netip.AddrPort) (w wordModel, others bool) {
	b, stored := s.bound[addr]
	if i := s.here[addr]; stored && i != nil && i.token == b.id {
		return b.wordModel, false
	}
	return wordModel{weight: -1}, stored
}

// said is all that operators have said of addr and of registrations there.
func (s *serviceModel) said(addr netip.AddrPort) [2]any {
	return [2]any{s.word(addr), s.bound[addr]}
}

// inForce is what counts of the registration at addr.
func (s *serviceModel) inForce(addr netip.AddrPort) wordModel {
	w, _ := s.of(addr)
	own := s.word(addr)
	if w.state == AdminNone {
		w.state, w.reason = own.state, own.reason
	}
	if w.weight < 0 {
		w.weight = own.weight
	}
	return w
}

func (s *serviceModel) word(addr netip.AddrPort) wordModel {
	if w, ok := s.words[addr]; ok {
		return w
	}
	return wordModel{weight: -1}
}

func newModel(svcs ...Service) *model {
	m := &model{now: t0, ttl: ttlMS, interval: intervalMS, services: map[Service]*serviceModel{}, pulses: map[string]string{}}
	for _, svc := range svcs {
		m.services[svc] = &serviceModel{
			here: map[netip.AddrPort]*instanceModel{}, words: map[netip.AddrPort]wordModel{}, bound: map[netip.AddrPort]boundModel{}, gone: map[netip.AddrPort]Gone{},
			noted: map[netip.AddrPort]int64{}, changed: map[netip.AddrPort]int64{},
		}
	}
	return m
}

// clone is a snapshot as Redis writes one.
func (m *model) clone() *model {
	c := *m
	c.messages, c.pulses, c.services = nil, maps.Clone(m.pulses), map[Service]*serviceModel{}
	c.events = slices.Clone(m.events)
	for svc, s := range m.services {
		d := *s
		d.bound = maps.Clone(s.bound)
		d.words, d.gone, d.noted, d.changed = maps.Clone(s.words), maps.Clone(s.gone), maps.Clone(s.noted), maps.Clone(s.changed)
		d.here = map[netip.AddrPort]*instanceModel{}
		for a, i := range s.here {
			i := *i
			d.here[a] = &i
		}
		c.services[svc] = &d
	}
	return &c
}

// times sets those of the registry. Whoever is there may beat as slowly as the old
// ones allow.
func (m *model) times(ttl, interval int64) []any {
	slowest := max(m.ttl/3, m.interval)
	for _, s := range m.services {
		if len(s.here) > 0 && slowest > interval && (ttl != m.ttl || interval != m.interval) {
			m.slow, m.slowAt = max(m.slow, slowest), strconv.FormatInt(m.now, 10)
		}
	}
	m.ttl, m.interval = ttl, interval
	return []any{ttl, interval, m.slow, m.slowAt}
}

// learned is a reaper's word that all know the times of that change.
func (m *model) learned(at string) []any {
	if at != "" && at == m.slowAt {
		m.slow = 0
	}
	return []any{m.ttl, m.interval, m.slow, m.slowAt}
}

// bump makes the next versions; every change begins with it.
func (m *model) bump(svc Service, epoch string) int64 {
	m.global++
	m.services[svc].version++
	m.epoch = cmp.Or(m.epoch, epoch)
	m.messages = append(m.messages, fmt.Sprintf("%d %s %d", m.global, svc, m.services[svc].version))
	return m.services[svc].version
}

// event writes an entry of the log of changes.
func (m *model) event(svc Service, addr netip.AddrPort, what, id, why string) {
	m.events = append(m.events, fmt.Sprintf("%d %s %s %s %d %s %q", m.now, svc, addr, what, m.services[svc].version, id, why))
}

// note says how addr went, and drops what is older than 10 min.
func (m *model) note(svc Service, addr netip.AddrPort, why Reason, token string) {
	s := m.services[svc]
	what, by, text := string(why), token, ""
	switch i := s.here[addr]; {
	case i == nil:
		text = "it was not there"
	case why == Operator:
		what, by = "deregistered", operator
		fallthrough
	case why == Expired:
		text = fmt.Sprintf("silent for %d ms", m.now-i.beat)
	}
	m.event(svc, addr, what, by, text)
	delete(s.here, addr)
	s.gone[addr] = Gone{why, m.now, token}
	s.noted[addr], s.changed[addr] = m.now, s.version
}

func (m *model) prune(svc Service) {
	s := m.services[svc]
	for addr, at := range s.noted {
		if at < m.now-pruneAfter {
			s.pruned = max(s.pruned, s.changed[addr])
			delete(s.gone, addr)
			delete(s.noted, addr)
			delete(s.changed, addr)
		}
	}
}

func (m *model) beat(svc Service, addr netip.AddrPort, c client, agent string, interval int64, epoch string) []any {
	s := m.services[svc]
	answer := func(status string, version int64) []any { return []any{status, m.now, version, m.ttl, m.interval} }
	if interval*3 > m.ttl {
		return answer("INTERVAL", 0)
	}
	i := s.here[addr]
	status := "NEW"
	switch g := s.gone[addr]; {
	case i != nil && i.meta == c.meta():
		i.beat = m.now
		return answer("OK", 0)
	case g.Token == c.token && (g.Reason == Left || g.Reason == Unhealthy):
		return answer("LEFT", 0)
	case i == nil:
	case i.token == c.token:
		status = "CHANGED"
	case agent != "" && i.agent == agent || m.now-i.beat > 2*m.interval:
		status = "TAKEN"
	default: // it beats, and is taken out by nobody
		return answer("NOTOWNER", min(m.now, i.beat))
	}
	v := m.bump(svc, epoch)
	switch {
	case i == nil:
		m.event(svc, addr, "joined", c.token, "")
	case i.token != c.token:
		m.event(svc, addr, "takeover", c.token, "from "+i.token)
	default:
		what, why := "changed", ""
		if c.draining && !i.draining {
			what = "draining"
		}
		if c.weight != i.weight {
			why = fmt.Sprintf("weight %d", c.weight)
		}
		m.event(svc, addr, what, c.token, why)
	}
	s.here[addr], s.listed = &instanceModel{c.token, c.meta(), c.agent, c.weight, c.draining, m.now}, true
	s.changed[addr] = v
	delete(s.gone, addr)
	delete(s.noted, addr)
	if status == "CHANGED" {
		return answer(status, v)
	}
	overridden := int64(0)
	if s.word(addr) != (wordModel{weight: -1}) {
		overridden = 1
	}
	return append(answer(status, v), overridden)
}

func (m *model) leave(svc Service, addr netip.AddrPort, token string, why Reason, epoch string) []any {
	s := m.services[svc]
	g, noted := s.gone[addr]
	switch i := s.here[addr]; {
	case i != nil && i.token != token, i == nil && noted && g.Token != token:
		return []any{"NOTOWNER", int64(0)}
	case i == nil && noted && (g.Reason == Left || g.Reason == Unhealthy):
		return []any{"SAME", s.version}
	}
	v := m.bump(svc, epoch)
	m.note(svc, addr, why, token)
	m.prune(svc)
	return []any{"OK", v}
}

func (m *model) deregister(svc Service, addr netip.AddrPort, force bool, epoch string) []any {
	i := m.services[svc].here[addr]
	switch {
	case i == nil:
		return []any{"ABSENT", int64(0), int64(0)}
	case !force && m.now-i.beat <= 2*m.interval:
		return []any{"BEATS", int64(0), max(m.now-i.beat, 0)}
	}
	v := m.bump(svc, epoch)
	m.note(svc, addr, Operator, i.token)
	m.prune(svc)
	return []any{"OK", v, m.now - i.beat}
}

func (m *model) admin(svc Service, addr netip.AddrPort, verb string, weight int, reason, of string, scope Scope, epoch string) []any {
	s := m.services[svc]
	here := int64(0)
	if s.here[addr] != nil {
		here = 1
	}
	if of != "" && of != strconv.FormatInt(s.version, 10) {
		return []any{"STALE", s.version, here, "", int64(0)}
	}
	if scope == ScopeRegistration && here == 0 {
		return []any{"ABSENT", s.version, here, string(scope), int64(0)}
	}
	scope = cmp.Or(scope, ScopeAddress)
	own := s.word(addr)
	bound, others := s.of(addr)
	put := func(w *wordModel, says bool) (changed bool) {
		was := *w
		switch {
		case verb == "weight" && says:
			w.weight = weight
		case verb == "weight":
			w.weight = -1
		case verb == "ready" || !says:
			w.state, w.reason = AdminNone, ""
		default:
			w.state, w.reason = AdminState(verb), reason
		}
		return *w != was
	}
	changed := others
	if scope == ScopeRegistration {
		changed = put(&bound, true) || changed
	} else {
		changed = put(&own, true) || changed
		changed = put(&bound, false) || changed
	}
	if !changed {
		return []any{"SAME", s.version, here, string(scope), int64(0)}
	}
	v := m.bump(svc, epoch)
	s.words[addr], s.changed[addr] = own, v
	if delete(s.bound, addr); bound != (wordModel{weight: -1}) {
		s.bound[addr] = boundModel{s.here[addr].token, bound}
	}
	what, why := verb, ""
	switch {
	case verb == "drain":
		what, why = "drained", reason
	case verb == "maint":
		why = reason
	case verb == "weight" && weight < 0:
		why = "own"
	case verb == "weight":
		why = strconv.Itoa(weight)
	}
	if scope == ScopeRegistration && verb != "ready" && !(verb == "weight" && weight < 0) {
		if why != "" {
			why += ", "
		}
		why += "of this registration"
	}
	m.event(svc, addr, what, operator, why)
	if _, ok := s.noted[addr]; here == 0 && !ok {
		s.noted[addr] = m.now
	}
	m.prune(svc)
	return []any{"OK", v, here, string(scope), int64(0)}
}

func (m *model) pulse(id, token, epoch string) []any {
	before := []any{m.now, m.replid, m.epoch, m.pulses[id]}
	m.epoch = cmp.Or(m.epoch, epoch)
	m.pulses[id] = token
	return before
}

func (m *model) reap(svc Service, w Sweep, limit int, stay []netip.AddrPort, epoch string) []any {
	age := m.now - w.Last
	switch {
	case m.pulses[w.ID] != w.Token || w.ReplID != m.replid:
		return []any{"FENCED", int64(0), int64(0)}
	case age < 0 || age > w.MaxAge.Milliseconds():
		return []any{"LATE", int64(0), int64(0)}
	}
	s := m.services[svc]
	var stale []netip.AddrPort
	for addr, i := range s.here {
		i.beat = min(i.beat, m.now)
		if i.beat < w.Cutoff {
			stale = append(stale, addr)
		}
	}
	slices.SortFunc(stale, func(a, b netip.AddrPort) int {
		return cmp.Or(cmp.Compare(s.here[a].beat, s.here[b].beat), cmp.Compare(a.String(), b.String()))
	})
	if len(stale) == 0 {
		return []any{"OK", int64(0), int64(0)}
	}
	out := stale[:min(len(stale), limit)]
	if w.LetGo > 0 {
		i := slices.IndexFunc(out, func(a netip.AddrPort) bool {
			return slices.ContainsFunc(stay, func(b netip.AddrPort) bool { return b != a && s.here[b] != nil })
		})
		switch {
		case i < 0:
			return []any{"LAST", int64(0), int64(len(stale))}
		case m.letGo:
			return []any{"OK", int64(0), int64(len(stale))}
		}
		m.letGo, out = true, out[i:i+1]
	}
	v := m.bump(svc, epoch)
	answer := []any{"OK", v, int64(len(stale) - len(out))}
	for _, addr := range out {
		m.note(svc, addr, Expired, s.here[addr].token)
		answer = append(answer, addr.String())
	}
	m.prune(svc)
	s.listed = len(s.here) > 0 // only reapers take a name off
	return answer
}

// seen is what a reader knows of one address. Its zero value: it is not there.
type seen struct {
	here     bool
	token    string
	weight   int
	draining bool
	word     wordModel
	gone     Gone
}

type view map[netip.AddrPort]seen

// view is what a whole read must show now.
func (s *serviceModel) view() view {
	v := view{}
	for addr, g := range s.gone {
		v[addr] = seen{gone: g}
	}
	for addr, i := range s.here {
		v[addr] = seen{here: true, token: i.token, weight: i.weight, draining: i.draining, word: s.inForce(addr)}
	}
	return v
}

// fold applies a read to an earlier view.
func (v view) fold(snap Snapshot) (view, error) {
	n := view{}
	if !snap.Full {
		n = maps.Clone(v)
	}
	for _, e := range snap.Entries {
		if e.Garbage != "" {
			return nil, fmt.Errorf("%v is garbage: %s", e.Addr, e.Garbage)
		}
		x := seen{here: e.Present}
		if e.Gone != nil {
			x.gone = *e.Gone
		}
		if i := e.Instance; e.Present {
			x.token, x.weight, x.draining = i.Meta.ID, i.Meta.Weight, i.Meta.Draining
			x.word = wordModel{i.Admin.State, -1, i.Admin.Reason}
			if i.Admin.Weight != nil {
				x.word.weight = *i.Admin.Weight
			}
		}
		n[e.Addr] = x
	}
	return n, nil
}

// client is one registration of one address, as its sidecar knows it.
type client struct {
	token    string
	agent    string // whose instance it is; empty: nobody's
	weight   int
	draining bool
}

func (c client) meta() string {
	agent := ""
	if c.agent != "" {
		agent = `,"agent":"` + c.agent + `"`
	}
	return `{"id":"` + c.token + `","weight":` + strconv.Itoa(c.weight) + `,"draining":` + strconv.FormatBool(c.draining) + agent + `}`
}
