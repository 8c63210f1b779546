package lbsync

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"pgregory.net/rapid"

	"rollcall/notifier"
	"rollcall/registrar"
)

// The consumers' limits in a history. A hold is longer than TTL + two heartbeats.
const (
	modelTTL        = 15 * time.Second
	modelInterval   = 5 * time.Second
	modelHold       = 40 * time.Second
	modelDrain      = 10 * time.Second
	modelQuarantine = time.Second
	modelSilence    = modelTTL + 2*modelInterval // of who is absent without a note
)

// registry is the register as a reader sees it, in plain Go; registrar's
// TestHistories holds the real one to the same.
type registry struct {
	replid, epoch string
	version       int64
	here          map[netip.AddrPort]registrar.Instance
	words         map[netip.AddrPort]registrar.Admin
	gone          map[netip.AddrPort]registrar.Gone
	garbage       map[netip.AddrPort]bool
	changed       map[netip.AddrPort]int64
	pruned        int64
}

func (r *registry) clone() *registry {
	c := *r
	c.here, c.words, c.gone = maps.Clone(r.here), maps.Clone(r.words), maps.Clone(r.gone)
	c.garbage, c.changed = maps.Clone(r.garbage), maps.Clone(r.changed)
	return &c
}

// change makes the next version, for addr.
func (r *registry) change(addr netip.AddrPort, epoch string) {
	r.version++
	if r.epoch == "" {
		r.epoch = epoch
	}
	r.changed[addr] = r.version
}

func (r *registry) token() registrar.Token {
	return registrar.Token{ReplID: r.replid, Epoch: r.epoch, Version: r.version}
}

func (r *registry) entry(a netip.AddrPort) registrar.Entry {
	e := registrar.Entry{Addr: a}
	if i, ok := r.here[a]; ok {
		if r.garbage[a] {
			e.Garbage = "metadata: garbage"
			return e
		}
		i.Admin = r.words[a]
		e.Present, e.Instance = true, i
	} else if g, ok := r.gone[a]; ok {
		e.Gone = &g
	}
	return e
}

// read is what read.lua answers.
func (r *registry) read(since *registrar.Token, now int64) registrar.Snapshot {
	s := registrar.Snapshot{Service: "web", Token: r.token(), Now: now, TTL: modelTTL, Interval: modelInterval}
	s.Full = since == nil || since.ReplID != r.replid || since.Epoch != r.epoch || r.version < since.Version || since.Version < r.pruned
	for _, a := range modelAddrs {
		e := r.entry(a)
		if s.Full && (e.Present || e.Gone != nil || e.Garbage != "") || !s.Full && r.changed[a] > since.Version {
			s.Entries = append(s.Entries, e)
		}
	}
	return s
}

// belief is what a reader may know of one address, and since when it has been
// absent, without a break, with nobody's word for it.
type belief struct {
	registrar.Entry
	absent time.Time // zero: it is not
	read   time.Time // when that was last read
	left   bool      // somebody said so, and it has not been back
	stale  bool      // an interruption brought it back, and it has neither beaten nor had a server since
	may    bool      // it lies in an allowed network
}

// wanted tells whether it shall have a server.
func (b belief) wanted() bool { return b.Present && b.may }

// goes tells whether it shall go by somebody's word, the operator's networks too.
func (b belief) goes() bool { return b.word() || b.Present && !b.may }

// word tells whether somebody said that it shall go.
func (b belief) word() bool {
	return b.Gone != nil && b.Gone.Reason != registrar.Expired
}

// beliefs folds what has been delivered, as View must.
type beliefs struct {
	of      map[netip.AddrPort]belief
	doubted map[netip.AddrPort]registrar.Gone
	since   map[netip.AddrPort]later
	known   bool
	broken  bool  // by an interruption, until a whole read a TTL later
	at      int64 // its time by Redis' clock, unix ms
}

// later is what an owner has said after the state that an interruption brought back.
type later struct {
	old  registrar.Instance
	said registrar.Entry
}

// stated tells whether g is an owner's last word: of the registration that was there,
// or known already.
func stated(g registrar.Gone, had registrar.Entry) bool {
	owner := g.Token != "" && (g.Reason == registrar.Left || g.Reason == registrar.Unhealthy)
	if had.Present {
		return owner && g.Token == had.Instance.Meta.ID && had.Instance.Beat < g.At+60_000
	}
	return owner && had.Gone != nil && *had.Gone == g
}

// older tells whether i is from before its owner said what had says.
func older(i registrar.Instance, had registrar.Entry) bool {
	if had.Gone != nil {
		return stated(*had.Gone, had) && had.Gone.Token == i.Meta.ID && i.Beat <= had.Gone.At
	}
	h := had.Instance
	return had.Present && i.Meta.ID != "" && h.Meta.ID == i.Meta.ID && h.Meta.Draining && !i.Meta.Draining && i.Beat <= h.Beat
}

func newBeliefs() *beliefs { return &beliefs{of: map[netip.AddrPort]belief{}} }

func (bs *beliefs) get(a netip.AddrPort) belief {
	b := bs.of[a]
	b.Addr = a
	return b
}

func (bs *beliefs) fold(c notifier.Change, now time.Time) {
	said := map[netip.AddrPort]registrar.Entry{}
	if c.Full && c.Now-bs.at >= modelTTL.Milliseconds() {
		bs.broken = false
	}
	if c.Interrupted {
		bs.broken, bs.at = true, c.Now
		bs.doubted, bs.since = map[netip.AddrPort]registrar.Gone{}, map[netip.AddrPort]later{}
	}
	for _, e := range c.Entries {
		had := bs.get(e.Addr).Entry
		if e.Gone != nil && c.Interrupted && !stated(*e.Gone, had) {
			bs.doubted[e.Addr] = *e.Gone
		}
		if e.Present && c.Interrupted && older(e.Instance, had) {
			bs.since[e.Addr] = later{e.Instance, had}
		}
		if d, ok := bs.doubted[e.Addr]; ok && e.Gone != nil && d == *e.Gone {
			e.Gone = nil
		}
		if l, ok := bs.since[e.Addr]; ok && e.Present && e.Instance.Meta.ID == l.old.Meta.ID && e.Instance.Beat == l.old.Beat {
			word := e.Instance.Admin
			e = l.said
			if e.Present {
				e.Instance.Admin = word
			}
		} else {
			delete(bs.since, e.Addr)
		}
		said[e.Addr] = e
	}
	for _, a := range modelAddrs {
		b := bs.get(a)
		if e, ok := said[a]; ok {
			b.Entry = e
			b.stale = (b.stale || bs.broken) && e.Present && c.Now-e.Instance.Beat >= modelTTL.Milliseconds()
		} else if c.Full {
			b.Entry, b.stale = registrar.Entry{Addr: a}, false
		}
		b.left = b.word() || b.left && !b.Present && b.Garbage == ""
		switch {
		case b.Present || b.Garbage != "" || b.word():
			b.absent = time.Time{}
		case b.absent.IsZero():
			b.absent = now
		}
		b.read = now
		bs.of[a] = b
	}
	bs.known = true
}

// machine is a HAProxy with one backend, which obeys Balancer, and judges every
// op that it is sent.
type machine struct {
	*player
	process  Process
	servers  []*machineServer
	template []Server // the configuration's
	static   bool     // its balance algorithm
	noAdd    bool     // its balance algorithm allows no dynamic servers
	trouble  trouble  // befalls the next exchange
	lastUp   map[netip.AddrPort]time.Time
	reported int       // servers in service, by the last report, and by what has been asked since
	counted  int       // servers in service, by the last report
	gone     time.Time // who was absent without a note went last
	seen     Process
	failed   bool // an exchange of this step
	asked    int  // ops of this step
	refused  int  // of them

	restarted bool // another lbsync has been started
	read      bool // the whole was read in this step
}

type machineServer struct {
	Server
	// later is an address that is not in force yet.
	later netip.AddrPort
	idle  time.Time      // free since; zero: it is not, or was from the beginning
	last  netip.AddrPort // the instance before
	lost  bool           // see forgotten
	human bool           // the last to say maint
	drain time.Time      // it has not been ready since; zero: it is, or was not from the beginning
	busy  int
	// told is the server as it was last reported.
	told    Server
	tellAny bool
}

// trouble is what befalls one exchange.
type trouble int

const (
	noTrouble trouble = iota
	lost              // nothing was done
	half              // half of it was
	unheard           // all of it was
	torn              // another process did the second half, and it shows
	replaced          // another process did all of it
	refuses           // one server's ops are refused
)

func (m *machine) boot(keep bool) {
	m.process.PID++
	m.process.Started += 7
	old := m.servers
	m.servers = nil
	for _, s := range m.template {
		n := &machineServer{Server: s}
		n.Up = n.Admin != Maint
		if keep && s.Slot && drawSmall.Draw(m.rt, "kept") < 6 {
			for _, o := range old {
				if o.Name == s.Name {
					n.Addr, n.Admin, n.Weight, n.Up, n.human = o.Addr, o.Admin, o.Weight, o.Up, o.human
					n.land()
				}
			}
		}
		m.servers = append(m.servers, n)
	}
}

func (m *machine) find(name string, id int) *machineServer {
	for _, s := range m.servers {
		if s.Name == name && s.ID == id {
			return s
		}
	}
	return nil
}

// tick is what time does: addresses come, checks run.
func (m *machine) tick() {
	now := time.Now()
	for _, s := range m.servers {
		s.land()
		if s.Checked && s.Admin != Maint {
			s.Passed = m.healthy(s.Addr)
			s.Up = s.Passed
		}
		if s.Admin == Ready && s.Up {
			m.lastUp[s.Addr] = now
		}
	}
}

// free tells whether s holds an instance no longer.
func (s *machineServer) free() bool { return s.nobody() || s.later.IsValid() && placeholder(s.later) }

// nobody tells whether s has an address that no instance has.
func (s *machineServer) nobody() bool {
	return placeholder(s.Addr) || slices.Contains(modelBlanks, s.Addr)
}

func (s *machineServer) land() {
	if s.later.IsValid() {
		s.Addr, s.later = s.later, netip.AddrPort{}
	}
}

func (m *machine) serving() (n int) {
	for _, s := range m.servers {
		n += serves(&s.Server)
	}
	return n
}

// begin begins an exchange, and says what befalls it.
func (m *machine) begin(what string) (trouble, error) {
	t := m.trouble
	m.trust()
	switch {
	case t == lost:
		m.trouble, m.failed = noTrouble, true
		return t, fmt.Errorf("%s: %w", what, ErrUnknown)
	case what == "apply":
		m.trouble = noTrouble
		return t, nil
	}
	return noTrouble, nil
}

// tally counts who is in service for a report.
func (m *machine) tally() int {
	m.reported = m.serving()
	m.counted = m.reported
	m.trust()
	return m.counted
}

// trust ends all doubt of who is old when nobody is in service: then anybody is
// better than nobody.
func (m *machine) trust() {
	for a, b := range m.of {
		b.stale = b.stale && m.counted > 0
		m.of[a] = b
	}
}

func (m *machine) report(s *machineServer, busy bool) Server {
	r := s.Server
	r.Busy = -1
	if busy {
		r.Busy = s.busy
	}
	s.told, s.tellAny = r, true
	if s.Admin == Ready && s.Up {
		m.lastUp[s.Addr] = time.Now()
	}
	m.trustServed(r)
	return r
}

// trustServed ends the doubt of who has a server: it is no matter of taking it in.
func (m *machine) trustServed(s Server) {
	if b, ok := m.of[s.Addr]; ok && s.Ours() {
		b.stale = false
		m.of[s.Addr] = b
	}
}

func (m *machine) Probe(context.Context) (Process, error) { return m.process, nil }

func (m *machine) Read(_ context.Context, _ string) (State, error) {
	if _, err := m.begin("read"); err != nil {
		return State{}, err
	}
	m.read, m.seen = true, m.process
	st := State{Process: m.process}
	for _, s := range m.servers {
		s.land()
		st.Servers = append(st.Servers, m.report(s, false))
	}
	m.tally()
	return st, nil
}

func (m *machine) Peek(_ context.Context, _ string, servers []Server) (Applied, error) {
	if _, err := m.begin("peek"); err != nil {
		return Applied{}, err
	}
	return m.readBack(peeks(servers)), nil
}

func (m *machine) readBack(ops []Op) Applied {
	m.failed = m.failed || m.process != m.seen // who asked will see it
	m.seen = m.process
	got := Applied{Process: m.process, Active: m.tally()}
	seen := map[string]bool{}
	for _, o := range ops {
		if s := m.find(o.Name, o.ID); s != nil && !seen[o.Name] {
			seen[o.Name] = true
			s.land()
			got.Servers = append(got.Servers, m.report(s, true))
		}
	}
	return got
}

func (m *machine) Apply(_ context.Context, _ string, ops []Op) (Applied, error) {
	if m.failed {
		m.rt.Fatalf("ops were sent after an exchange had failed: %s", words(ops))
	}
	t, err := m.begin("apply")
	m.asked += len(ops)
	if err != nil {
		return Applied{}, err
	}
	m.rt.Logf("apply %s (trouble %d)", words(ops), t)
	if t == replaced || t == torn || t == unheard {
		m.did.count(map[trouble]string{replaced: "replaced", torn: "torn", unheard: "unheard"}[t])
	}
	if t == replaced {
		m.boot(drawBool.Draw(m.rt, "state file"))
	}
	judged := m.process == m.seen
	var refusals []string
	static := false
	for i, o := range ops {
		if (t == half || t == torn) && i == len(ops)/2 {
			m.failed = true
			if t == torn {
				m.boot(drawBool.Draw(m.rt, "state file"))
				return Applied{}, ErrReplaced
			}
			return Applied{}, ErrUnknown
		}
		why := "refused"
		if t != refuses || o.Name != ops[0].Name {
			why = m.carryOut(o, judged)
		}
		if why != "" {
			refusals = append(refusals, why)
			static = static || strings.HasPrefix(why, "static")
		}
	}
	if t == unheard {
		m.failed = true
		return Applied{}, ErrUnknown
	}
	got := m.readBack(ops)
	got.Refused, got.Static = refusals, static
	m.refused += len(refusals)
	return got, nil
}

// carryOut does what HAProxy does, and judges it unless another process was
// meant.
func (m *machine) carryOut(o Op, judged bool) (refused string) {
	s := m.find(o.Name, o.ID)
	if o.Kind == Add {
		return m.add(o, judged)
	}
	if s == nil {
		return "No such server."
	}
	s.lost = s.lost || s.human && m.forgotten(s.told) // whatever becomes of it then, until it has another address
	before := *s
	now := time.Now()
	s.Untouched = false
	switch o.Kind {
	case SetAddr:
		s.lost = false
		if m.process.DefersAddr() {
			s.later = o.Addr
		} else {
			s.Addr = o.Addr
		}
	case EnableHealth:
		s.Checked = true
	case SetReady:
		if s.Admin == Maint {
			s.Up = true
		}
		s.Admin = Ready
	case SetDrain:
		if s.Admin == Maint {
			s.Up = true
		}
		s.Admin = Drain
	case SetMaint:
		s.Admin, s.Up, s.Passed, s.human = Maint, false, false, false
	case HealthDown:
		s.Up, s.Passed = false, false
	case SetWeight:
		switch {
		case o.Weight < 0 || o.Weight > 256:
			return "weight out of range"
		case m.static && !o.Percent && o.Weight > 1:
			return "static algorithm" // which takes the configured weight, 1, and none
		case o.Percent:
			s.Weight = o.Weight / 100
		default:
			s.Weight = o.Weight
		}
	case Shutdown:
		s.busy = 0
	case Delete:
		if s.Slot || s.Admin != Maint || s.busy > 0 {
			return "cannot be deleted"
		}
		m.servers = slices.DeleteFunc(m.servers, func(x *machineServer) bool { return x == s })
	}
	if !s.free() {
		s.idle = time.Time{}
	} else if !before.free() {
		s.idle, s.last = now, before.Addr
	}
	if s.Admin == Ready {
		s.drain = time.Time{}
	} else if before.Admin == Ready {
		s.drain = now
	}
	if judged {
		m.judge(o, before, *s)
	}
	if s.Admin == Ready && s.Up {
		m.lastUp[s.Addr] = now
	}
	return ""
}

func (m *machine) add(o Op, judged bool) string {
	if m.noAdd {
		return "balance algorithm does not allow dynamic servers"
	}
	for _, s := range m.servers {
		if s.Name == o.Name || s.ID == o.ID {
			return "already exists"
		}
	}
	a, named := dynamicAddr(o.Name)
	if b := m.belief(a); judged && (!b.wanted() || m.old(b) || !named || !placeholder(o.Addr)) {
		m.rt.Fatalf("added %s with %v, which nobody wants, or which is from before an interruption", o.Name, o.Addr)
	}
	m.servers = append(m.servers, &machineServer{Server: Server{Name: o.Name, ID: o.ID, Addr: o.Addr, Admin: Maint}, idle: time.Now()})
	return ""
}

// judge holds one op, from before to after, to what must never happen.
func (m *machine) judge(o Op, before, after machineServer) {
	rt, now := m.rt, time.Now()
	a := before.Addr
	b := m.belief(a)
	if !before.Ours() {
		rt.Fatalf("%s is not ours: %s", before.Name, words([]Op{o}))
	}
	if told := before.told; before.human && before.tellAny && told.Admin == Maint && told.Addr == a && !before.nobody() && !before.lost {
		rt.Fatalf("%s is in a human's maint: %s; it was told %+v, and is believed %+v", before.Name, words([]Op{o}), told, b)
	}
	if after.Admin == Maint && !after.human && !after.nobody() && !after.lost {
		rt.Fatalf("%s is in maint with %v, as if a human had put it there: %s", before.Name, after.Addr, words([]Op{o}))
	}
	holders := m.holders(a)
	if after.Addr != a {
		holders++ // it was one
	}
	if b.Garbage != "" && holders == 1 && before.told.Addr == a {
		rt.Fatalf("%s holds %v, of which nothing is known: %s", before.Name, a, words([]Op{o}))
	}
	if o.Kind == SetAddr {
		switch to := m.belief(o.Addr); {
		case before.Admin != Drain || before.Weight != 0:
			rt.Fatalf("%s gets the address %v in %v with weight %d", before.Name, o.Addr, before.Admin, before.Weight)
		case placeholder(o.Addr):
		case !to.wanted() || m.old(to):
			rt.Fatalf("%s gets the address %v, which nobody wants, or which is from before an interruption", before.Name, o.Addr)
		case before.Slot && o.Addr != before.last && !before.idle.IsZero() && now.Sub(before.idle) < modelQuarantine:
			rt.Fatalf("%s is used again %v after it was freed", before.Name, now.Sub(before.idle))
		}
	}
	if o.Kind == Delete && now.Sub(before.idle) < modelQuarantine {
		rt.Fatalf("%s is deleted %v after it was freed", before.Name, now.Sub(before.idle))
	}
	if o.Kind == SetMaint && before.Weight != 0 {
		rt.Fatalf("%s is put into maint with weight %d, as a human would", before.Name, before.Weight)
	}
	if busy := before.told.Admin == Drain && before.told.Busy > 0 && before.told.Addr == a; busy && (o.Kind == SetAddr || o.Kind == SetMaint || o.Kind == Shutdown) &&
		holders == 1 && !before.nobody() && now.Sub(before.drain) < modelDrain && !(b.wanted() && b.Instance.State() == registrar.AdminMaint) {
		rt.Fatalf("%s has %d connections in use, and drains for %v: %s", before.Name, before.told.Busy, now.Sub(before.drain), words([]Op{o}))
	}
	if was, is := before.Serving(), after.Serving(); is && !was {
		m.judgeArrival(o, after)
	} else if was && !is {
		m.judgeDeparture(o, before)
	} else if was && o.Kind == Shutdown {
		rt.Fatalf("%s serves, and its sessions are cut", before.Name)
	}
}

// forgotten tells whether s may be taken for a slot that was never used: its address may
// not be served any more, or lbsync and HAProxy have both been started since, and nobody
// knows its instance.
func (m *machine) forgotten(s Server) bool {
	b := m.belief(s.Addr)
	return m.restarted && (!m.allowed(s.Addr) || s.Untouched && s.Weight == s.Configured && !b.Present && b.Gone == nil && b.Garbage == "")
}

// judgeArrival: s has begun to get requests.
func (m *machine) judgeArrival(o Op, s machineServer) {
	now := time.Now()
	b := m.belief(s.Addr)
	m.did.count("arrived")
	m.reported++
	switch {
	case s.later.IsValid() && s.later != s.Addr && !s.Checked:
		m.rt.Fatalf("%s serves %v, and shall have %v: %s", s.Name, s.Addr, s.later, words([]Op{o}))
	case !b.wanted() || b.Instance.State() == registrar.AdminMaint:
		m.rt.Fatalf("%s serves %v, which nobody wants: %s", s.Name, s.Addr, words([]Op{o}))
	case m.old(b):
		m.rt.Fatalf("%s serves %v, whose heartbeat is from before an interruption: %s", s.Name, s.Addr, words([]Op{o}))
	case s.Checked && !s.Passed && now.Sub(m.lastUp[s.Addr]) >= recent:
		m.rt.Fatalf("%s serves %v before its check has passed: %s", s.Name, s.Addr, words([]Op{o}))
	}
}

// judgeDeparture: s gets no requests any more.
func (m *machine) judgeDeparture(o Op, s machineServer) {
	now := time.Now()
	b := m.belief(s.Addr)
	told := s.told
	if !s.tellAny || told.Addr != s.Addr {
		m.rt.Fatalf("%s was never read: %s", s.Name, words([]Op{o}))
	}
	up := m.reported // with it
	if serves(&told) == 1 {
		m.reported--
	}
	floor := max(m.cfg.MinServers, m.share())
	switch {
	case s.nobody():
		m.did.count("nobody gone") // what was meant for another process
	case m.holders(s.Addr) > 1:
		m.did.count("twin gone")
	case !b.may:
		m.did.count("not allowed gone")
	case b.Present:
		switch state := b.Instance.State(); {
		case state == registrar.AdminMaint:
			m.did.count("maint")
		case b.Instance.Weight() == 0 && o.Kind == SetWeight:
			m.did.count("weight 0") // who says so, means it
		case state == registrar.AdminDrain && serves(&told) == 1 && up <= max(1, m.share()):
			m.rt.Fatalf("%s of %v is drained, and %d are up, floor %d", s.Name, s.Addr, up, floor)
		case state == registrar.AdminDrain:
			m.did.count("drain")
		default:
			m.rt.Fatalf("%s of %v is alive and was taken out: %s", s.Name, s.Addr, words([]Op{o}))
		}
	case b.left:
		m.did.count("word")
	default:
		silent := now.Sub(b.absent)
		confirmed := b.read.Sub(b.absent)
		vouched := told.Checked && told.Up && told.Passed
		switch {
		case vouched && (silent < modelHold || confirmed < modelHold):
			m.rt.Fatalf("%s of %v, whose check is up, was taken out %v after it was missed, last read after %v", s.Name, s.Addr, silent, confirmed)
		case b.Gone == nil && serves(&told) == 1 && m.missing() > 0 && m.missing() == m.reported && now.Sub(m.gone) < registrar.LetGoEvery:
			m.rt.Fatalf("%s of %v is absent, as all are, and was taken out %v after another one", s.Name, s.Addr, now.Sub(m.gone))
		case b.Gone == nil && (silent < modelSilence || confirmed < modelSilence):
			m.rt.Fatalf("%s of %v, which nobody said is gone, was taken out %v after it was missed, last read after %v", s.Name, s.Addr, silent, confirmed)
		case serves(&told) == 1 && up-m.goers() <= floor:
			m.rt.Fatalf("%s of %v is absent and was taken out, and %d are up, floor %d", s.Name, s.Addr, up, floor)
		case vouched:
			m.did.count("hold ended")
		case b.Gone == nil:
			m.did.count("silence ended")
			m.gone = now
		default:
			m.did.count("expired")
		}
	}
}

// old tells whether b must not be taken in, for what an interruption brought back.
func (m *machine) old(b belief) bool { return m.known && b.stale && m.counted > 0 }

// missing counts our servers that are in service, by the last report too, and absent
// with no note.
func (m *machine) missing() (n int) {
	for _, s := range m.servers {
		if b := m.belief(s.Addr); s.Ours() && s.Serving() && serves(&s.told) == 1 && s.told.Addr == s.Addr && !b.Present && b.Garbage == "" && b.Gone == nil {
			n++
		}
	}
	return n
}

// goers counts our servers that were reported in service and go by a word.
func (m *machine) goers() (n int) {
	for _, s := range m.servers {
		if s.Ours() && s.Serving() && serves(&s.told) == 1 && s.told.Addr == s.Addr && m.belief(s.Addr).goes() {
			n++
		}
	}
	return n
}

// holders counts our servers with an address.
func (m *machine) holders(a netip.AddrPort) (n int) {
	for _, s := range m.servers {
		if s.Ours() && s.Addr == a {
			n++
		}
	}
	return n
}

// share is how many must be up by MinShare.
func (m *machine) share() int {
	ready := 0
	for _, a := range modelAddrs {
		if b := m.belief(a); b.wanted() && admin(b.Instance.State()) == Ready {
			ready++
		}
	}
	return (ready*m.cfg.MinShare + 99) / 100
}

// counts is how often what happened.
type counts struct {
	steps int
	of    map[string]int
}

func (c *counts) count(what string) {
	if c.of == nil {
		c.of = map[string]int{}
	}
	c.of[what]++
}

var (
	drawSmall = rapid.IntRange(0, 7)
	drawBool  = rapid.Bool()
)
