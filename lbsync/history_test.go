package lbsync

import (
	"cmp"
	"context"
	cmdline "flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"pgregory.net/rapid"

	"rollcall/notifier"
	"rollcall/registrar"
)

const (
	modelChecks = 10      // histories a round …
	modelSteps  = 300     // … of so many steps on average
	modelFloor  = 100_000 // steps a run, in as many rounds as it takes
)

// TestHistories plays random histories of a register and of a HAProxy, in which
// everything fails that can, to one backend's View, decide and Plan. The HAProxy
// is a fake (model_test.go) that judges every op; time is synctest's. In the end
// all is quiet, and HAProxy must come to what the register says, and then be
// left alone.
func TestHistories(t *testing.T) {
	setDefault(t, "rapid.checks", modelChecks)
	setDefault(t, "rapid.steps", modelSteps)
	setDefault(t, "rapid.shrinktime", "100h") // by the bubble's clock
	whole := wanted(modelChecks, modelSteps)
	var did counts
	begun := time.Now()
	missed := func() []string {
		return slices.DeleteFunc(slices.Clone(modelMust), func(what string) bool { return did.of[what] > 0 })
	}
	for did.steps == 0 || whole && !t.Failed() && (did.steps < modelFloor || did.steps < 5*modelFloor && len(missed()) > 0) {
		synctest.Test(t, func(t *testing.T) {
			rapid.Check(bubbled{t}, func(rt *rapid.T) {
				p := newPlayer(rt, &did)
				rt.Repeat(map[string]func(*rapid.T){"step": p.step})
				p.rt = rt
				p.settle()
			})
		})
	}
	t.Logf("%d steps in %v: %v", did.steps, time.Since(begun).Round(time.Millisecond), did.of)
	if m := missed(); whole && len(m) > 0 {
		t.Errorf("never %q: the histories miss it", m)
	}
}

// modelMust is what the histories of a run must have met. Some of it is rare.
var modelMust = []string{
	"arrived", "drain", "maint", "weight 0", "word", "hold ended", "silence ended", "expired", "not allowed gone", "twin gone",
	"interrupted", "garbage", "human", "torn", "replaced", "unheard", "refused", "cold", "unplaced", "postponed", "floor", "stale",
}

// bubbled hides that t is a *testing.T: in a bubble, rapid must not ask for its
// deadline, which is by another clock.
type bubbled struct{ *testing.T }

// setDefault sets one of rapid's flags unless the command line does.
func setDefault(tb testing.TB, name string, value any) {
	tb.Helper()
	if f := cmdline.Lookup(name); f.Value.String() == f.DefValue {
		if err := cmdline.Set(name, fmt.Sprint(value)); err != nil {
			tb.Fatal(err)
		}
	}
}

// wanted tells whether this is a whole run and not one that somebody cut short.
func wanted(checks, steps int) bool {
	return cmdline.Lookup("rapid.checks").Value.String() == strconv.Itoa(checks) && cmdline.Lookup("rapid.steps").Value.String() == strconv.Itoa(steps)
}

var (
	modelAddrs = []netip.AddrPort{
		netip.MustParseAddrPort("10.0.0.1:80"), netip.MustParseAddrPort("10.0.0.2:80"), netip.MustParseAddrPort("10.0.0.3:80"),
		netip.MustParseAddrPort("10.0.0.4:80"), netip.MustParseAddrPort("[fc00::5]:80"), netip.MustParseAddrPort("8.8.8.8:80"),
	}
	// modelBlanks are what templates give their unused slots: the usual one, one that
	// no instance may have, and one that an instance might have.
	modelBlanks = []netip.AddrPort{Placeholder, netip.MustParseAddrPort("192.0.2.1:8080"), netip.MustParseAddrPort("10.9.9.1:80")}
	modelKinds  = kinds(
		"step", 60, "time", 40, "poll", 60, "full", 6, "join", 40, "app", 8, "silent", 8, "leave", 10, "expire", 20, "deregister", 4,
		"admin", 20, "meta", 10, "takeover", 3, "save", 3, "restore", 2, "renamed", 2, "redis down", 3, "redis up", 12, "garbage", 3, "prune", 2, "again", 3,
		"old answer", 2, "clock", 2, "boot", 4, "sick", 8, "human", 6, "unhuman", 3, "busy", 6, "trouble", 16, "lbsync", 4, "cold", 6, "twin", 3, "step", 10)
	modelTimes = []time.Duration{time.Millisecond, 30 * time.Millisecond, 300 * time.Millisecond, time.Second, time.Second,
		2 * time.Second, 5 * time.Second, 5 * time.Second, 11 * time.Second, 16 * time.Second, 26 * time.Second, 41 * time.Second}
	drawKind    = rapid.SampledFrom(modelKinds)
	drawTime    = rapid.SampledFrom(modelTimes)
	drawAddr    = rapid.SampledFrom(modelAddrs)
	drawTrouble = rapid.SampledFrom([]trouble{lost, half, unheard, torn, replaced, refuses, refuses})
	drawVerb    = rapid.SampledFrom([]string{"drain", "maint", "ready", "ready", "weight"})
	drawWeight  = rapid.SampledFrom([]int{100, 50, 0})
	drawReason  = rapid.SampledFrom([]registrar.Reason{registrar.Left, registrar.Unhealthy})
	drawSlots   = rapid.IntRange(0, 5)
)

// kinds lays out a table to draw from, shuffled, as rapid favours its ends.
func kinds(nameAndCount ...any) []string {
	var out []string
	for i := 0; i < len(nameAndCount); i += 2 {
		out = append(out, slices.Repeat([]string{nameAndCount[i].(string)}, nameAndCount[i+1].(int))...)
	}
	rand.New(rand.NewPCG(1, 1)).Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out
}

// player draws what happens to the register, to HAProxy and between them.
type player struct {
	rt    *rapid.T
	did   *counts
	ha    *machine
	cfg   Config
	mode  Mode
	names int

	// The instances and their sidecars, as they really are.
	apps   map[netip.AddrPort]bool // the app answers
	sick   map[netip.AddrPort]bool // it fails its check all the same
	beats  map[netip.AddrPort]bool // its sidecar beats
	tokens map[netip.AddrPort]string

	reg    *registry
	saved  []*registry
	redis  bool // it answers
	offset time.Duration
	up     time.Time // Redis has answered since

	// What the watcher has read last, and earlier answers.
	token registrar.Token
	knows bool
	last  *notifier.Change
	whole []registrar.Snapshot

	backend *backend
	*beliefs
	list    map[netip.AddrPort]lastInstance // of an earlier lbsync
	cold    map[netip.AddrPort]lastInstance // that this one serves
	refresh bool                            // it has asked for a whole read
	spoilt  bool                            // something was refused since the last whole read
}

func newPlayer(rt *rapid.T, did *counts) *player {
	p := &player{
		rt: rt, did: did, redis: true, up: time.Now(),
		apps: map[netip.AddrPort]bool{}, sick: map[netip.AddrPort]bool{}, beats: map[netip.AddrPort]bool{}, tokens: map[netip.AddrPort]string{},
	}
	p.reg = p.empty()
	p.cfg = Config{
		Hold: modelHold, DrainTimeout: modelDrain, Quarantine: modelQuarantine, Full: DefaultFull,
		MinServers: drawSmall.Draw(rt, "min servers") % 3, Checks: drawBool.Draw(rt, "checks"),
		Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fc00::/7")},
	}
	if drawBool.Draw(rt, "share") {
		p.cfg.MinShare = 50
	}
	m := &machine{player: p, lastUp: map[netip.AddrPort]time.Time{}, process: Process{PID: 1, Started: 1, Version: "2.6.12"}}
	if drawBool.Draw(rt, "defers addresses") {
		m.process.Version = "3.0.0"
	}
	n := drawSlots.Draw(rt, "slots")
	p.mode = rapid.SampledFrom([]Mode{Auto, Slots, Dynamic}).Draw(rt, "mode")
	if n == 0 && p.mode == Slots {
		p.mode = Auto
	}
	checked := drawBool.Draw(rt, "slots have checks")
	blank := rapid.SampledFrom(modelBlanks).Draw(rt, "placeholder")
	for i := range n {
		m.template = append(m.template, Server{
			Name: "s" + strconv.Itoa(i+1), ID: i + 1, Slot: true, Admin: Maint, Weight: 1, Checked: checked,
			Addr: blank, Configured: 1, Untouched: true,
		})
	}
	if drawBool.Draw(rt, "a server of others") {
		m.template = append(m.template, Server{Name: "fixed", ID: 100, Addr: netip.MustParseAddrPort("10.9.9.9:80"), Weight: 1, Up: true})
	}
	m.static = drawSmall.Draw(rt, "static") == 7
	m.noAdd = n > 0 && p.mode != Dynamic && drawSmall.Draw(rt, "no dynamic servers") == 7
	p.ha = m
	m.boot(false)
	p.start()
	for _, a := range modelAddrs[:drawSmall.Draw(rt, "instances")%6] {
		p.stepOf("join", a)
	}
	return p
}

func (p *player) name(what string) string {
	p.names++
	return what + strconv.Itoa(p.names)
}

func (p *player) empty() *registry {
	return &registry{
		replid: p.name("r"), here: map[netip.AddrPort]registrar.Instance{}, words: map[netip.AddrPort]registrar.Admin{},
		gone: map[netip.AddrPort]registrar.Gone{}, garbage: map[netip.AddrPort]bool{}, changed: map[netip.AddrPort]int64{},
	}
}

// allowed is what cfg.Allow means for modelAddrs.
func (p *player) allowed(a netip.AddrPort) bool {
	return a.Addr().Is6() && len(p.cfg.Allow) == 2 || a.Addr().Is4() && a.Addr().As4()[0] == 10
}

// start starts a new lbsync.
func (p *player) start() {
	p.backend = newBackend(p.cfg, BackendConfig{Service: "web", Backend: "be", Mode: p.mode}, p.ha, func(registrar.Service) { p.refresh = true }, func() {}, func() {}, newClaims(), zerolog.Nop())
	p.beliefs, p.cold, p.knows, p.last, p.refresh, p.spoilt = newBeliefs(), nil, false, nil, false, false
}

// belief is what lbsync may go by.
func (p *player) belief(a netip.AddrPort) belief {
	b := p.get(a)
	b.may = p.allowed(a)
	if i, ok := p.cold[a]; ok && !p.known {
		w := i.Weight
		b.Present, b.Instance = true, registrar.Instance{Addr: a, Admin: registrar.Admin{Weight: &w, State: map[Admin]registrar.AdminState{Drain: registrar.AdminDrain, Maint: registrar.AdminMaint}[i.State]}}
	}
	return b
}

func (p *player) healthy(a netip.AddrPort) bool { return p.apps[a] && !p.sick[a] }

func (p *player) now() int64 { return time.Now().Add(p.offset).UnixMilli() }

// advance lets time pass: who beats, beats, and HAProxy checks.
func (p *player) advance(d time.Duration) {
	time.Sleep(d)
	for _, a := range modelAddrs {
		p.beat(a)
	}
	p.ha.tick()
}

func (p *player) beat(a netip.AddrPort) {
	token := p.tokens[a]
	if !p.redis || !p.beats[a] || token == "" {
		return
	}
	r := p.reg
	i, here := r.here[a]
	g := r.gone[a]
	switch {
	case here && i.Meta.ID == token:
		i.Beat = p.now()
		r.here[a] = i
	case !here && g.Token == token && (g.Reason == registrar.Left || g.Reason == registrar.Unhealthy):
	default:
		r.change(a, p.name("e"))
		r.here[a] = registrar.Instance{Addr: a, Beat: p.now(), Meta: registrar.Meta{ID: token, Weight: 100}}
		delete(r.gone, a)
	}
}

func (p *player) remove(a netip.AddrPort, why registrar.Reason) {
	r := p.reg
	i, here := r.here[a]
	if !here {
		return
	}
	r.change(a, p.name("e"))
	delete(r.here, a)
	delete(r.garbage, a)
	r.gone[a] = registrar.Gone{Reason: why, At: p.now(), Token: i.Meta.ID}
}

// reap is what an armed reaper does.
func (p *player) reap() {
	if !p.redis || time.Since(p.up) < modelTTL {
		return
	}
	for _, a := range modelAddrs {
		i, here := p.reg.here[a]
		if here && i.Beat > p.now() {
			i.Beat = p.now()
			p.reg.here[a] = i
		}
		if here && p.now()-i.Beat > modelTTL.Milliseconds() {
			p.remove(a, registrar.Expired)
		}
	}
}

// poll reads what has changed, or all, and hands it on.
func (p *player) poll(full bool) {
	if !p.redis {
		return
	}
	since := &p.token
	if !p.knows || full {
		since = nil
	}
	p.refresh = p.refresh && !full
	s := p.reg.read(since, p.now())
	if s.Full {
		p.whole = append(p.whole[max(0, len(p.whole)-3):], s)
	}
	p.deliver(s)
}

// deliver does what the watcher does with an answer.
func (p *player) deliver(s registrar.Snapshot) {
	before, old := p.knows || p.token != registrar.Token{}, p.token
	known := p.knows
	p.token, p.knows = s.Token, true
	if known && !s.Full && s.Token == old {
		return
	}
	c := notifier.Change{Snapshot: s, Interrupted: before && old.Interrupted(s.Token), Heard: time.Now()}
	if c.Interrupted {
		p.did.count("interrupted")
	}
	p.last = &c
	p.hand(c)
}

func (p *player) hand(c notifier.Change) {
	p.rt.Logf("%v change: full %v, interrupted %v, %v: %v", time.Now().Format("15:04:05.000"), c.Full, c.Interrupted, c.Token, c.Entries)
	p.fold(c, time.Now())
	p.backend.change(c)
	for _, a := range modelAddrs {
		got, want := p.backend.view.Lookup(a), p.get(a).Entry
		if !equal(got, want) {
			p.rt.Fatalf("view of %v\n got %+v\nwant %+v", a, got, want)
		}
		if want.Garbage != "" {
			p.did.count("garbage")
		}
	}
}

func equal(x, y registrar.Entry) bool {
	if (x.Gone == nil) != (y.Gone == nil) || x.Gone != nil && *x.Gone != *y.Gone {
		return false
	}
	return x.Addr == y.Addr && x.Present == y.Present && x.Garbage == y.Garbage && x.Instance.Beat == y.Instance.Beat &&
		x.Instance.Meta.ID == y.Instance.Meta.ID && x.Instance.State() == y.Instance.State() && x.Instance.Weight() == y.Instance.Weight()
}

// step draws one step.
func (p *player) step(rt *rapid.T) {
	p.rt = rt
	p.did.steps++
	kind := drawKind.Draw(rt, "kind")
	switch kind {
	case "step":
		p.once()
	case "time":
		p.advance(drawTime.Draw(rt, "pass"))
	case "poll":
		p.poll(p.refresh)
	case "full":
		p.poll(true)
	case "expire":
		p.reap()
	case "again":
		if p.last != nil {
			p.hand(*p.last)
		}
	case "old answer":
		if len(p.whole) > 0 && p.redis {
			p.deliver(p.whole[0])
		}
	case "clock":
		p.offset += time.Duration(drawSmall.Draw(rt, "minutes")-3) * time.Minute
	case "redis down":
		p.redis = false
	case "redis up":
		if !p.redis {
			p.redis, p.up = true, time.Now()
		}
	case "save":
		p.saved = append(p.saved[max(0, len(p.saved)-2):], p.reg.clone())
	case "restore":
		p.restore()
	case "renamed":
		p.reg.replid, p.up = p.name("r"), time.Now()
	case "prune":
		if p.redis {
			clear(p.reg.gone)
			p.reg.pruned = p.reg.version
		}
	case "boot":
		p.ha.boot(drawBool.Draw(rt, "state file"))
	case "trouble":
		p.ha.trouble = drawTrouble.Draw(rt, "trouble")
	case "lbsync":
		p.restart()
	case "cold":
		if !p.known && len(p.list) > 0 {
			p.chill()
		}
	default:
		p.stepOf(kind, drawAddr.Draw(rt, "addr"))
	}
}

// restore has Redis restart with old data, or with none.
func (p *player) restore() {
	n := drawSmall.Draw(p.rt, "snapshot")
	p.up, p.redis = time.Now(), true
	if n >= len(p.saved) {
		p.reg = p.empty()
		return
	}
	replid := p.reg.replid
	p.reg = p.saved[n].clone()
	p.reg.replid = p.name("r")
	if drawSmall.Draw(p.rt, "same data set") == 7 { // which is only seen while its version is lower
		p.reg.replid = replid
		p.poll(false)
	}
}

// restart ends lbsync and starts another one.
func (p *player) restart() {
	if l, known := p.backend.last(); known {
		p.list = map[netip.AddrPort]lastInstance{}
		for _, i := range l.Instances {
			p.list[i.Addr] = i
		}
	}
	p.cfg.Allow = p.cfg.Allow[:1+drawSmall.Draw(p.rt, "allowed too")%2]
	p.start()
	p.ha.restarted = true
	for _, s := range p.ha.servers {
		s.idle = time.Unix(1, 0) // nobody knows any more since when
	}
	if drawBool.Draw(p.rt, "forgets its token") {
		p.token = registrar.Token{}
	}
}

// chill hands lbsync the list of the one before.
func (p *player) chill() {
	p.did.count("cold")
	p.cold = p.list
	l := lastService{ReadAt: time.Now()}
	for _, i := range p.list {
		l.Instances = append(l.Instances, i)
	}
	slices.SortFunc(l.Instances, func(a, b lastInstance) int { return a.Addr.Compare(b.Addr) })
	p.backend.coldStart(l)
}

func (p *player) stepOf(kind string, a netip.AddrPort) {
	rt, r := p.rt, p.reg
	i, here := r.here[a]
	s := p.holder(a)
	switch {
	case kind == "join":
		p.apps[a], p.beats[a], p.tokens[a] = true, true, p.name("t")
		p.beat(a)
	case kind == "app":
		p.apps[a] = !p.apps[a]
		p.beats[a] = p.apps[a]
	case kind == "silent":
		p.beats[a] = !p.beats[a]
	case kind == "sick":
		p.sick[a] = !p.sick[a]
	case kind == "busy" && s != nil:
		s.busy = drawSmall.Draw(rt, "busy") % 3
	case kind == "human" && s != nil && p.ha.holders(a) == 1 && s.Admin != Maint:
		s.Admin, s.Up, s.Passed, s.human, s.Untouched = Maint, false, false, true, false
		p.did.count("human")
	case kind == "unhuman" && s != nil && s.human && s.Admin == Maint:
		s.Admin, s.Up, s.human = Ready, true, false
	case kind == "twin" && s != nil && s.Slot && !s.human:
		for _, t := range p.ha.servers {
			if t.Slot && t.Admin == Maint && t.nobody() {
				t.Addr, t.Admin, t.Up, t.Weight, t.idle = a, Ready, true, 1, time.Time{}
				p.backend.replaced() // nobody changes the addresses of slots behind lbsync's back
				break
			}
		}
	case !p.redis:
	case kind == "leave":
		p.remove(a, drawReason.Draw(rt, "why"))
		p.beats[a], p.apps[a] = false, drawBool.Draw(rt, "app goes on")
	case kind == "deregister":
		p.remove(a, registrar.Operator)
		p.beats[a] = drawSmall.Draw(rt, "still beats") == 7
	case kind == "admin":
		w := r.words[a]
		switch verb := drawVerb.Draw(rt, "verb"); verb {
		case "ready":
			w.State = registrar.AdminNone
		case "weight":
			n := drawWeight.Draw(rt, "weight")
			w.Weight = &n
		default:
			w.State = registrar.AdminState(verb)
		}
		r.change(a, p.name("e"))
		r.words[a] = w
	case kind == "garbage" && here:
		r.garbage[a] = !r.garbage[a] || drawSmall.Draw(rt, "it stays") < 7
	case kind == "meta" && here:
		if drawBool.Draw(rt, "drain") {
			i.Meta.Draining = true
		} else {
			i.Meta.Weight = drawWeight.Draw(rt, "weight")
		}
		r.change(a, p.name("e"))
		r.here[a] = i
	case kind == "takeover" && here:
		p.tokens[a] = p.name("t")
		i.Meta.ID = p.tokens[a]
		r.change(a, p.name("e"))
		r.here[a] = i
	}
}

// holder returns one of our servers with an address.
func (p *player) holder(a netip.AddrPort) *machineServer {
	for _, s := range p.ha.servers {
		if s.Ours() && s.Addr == a {
			return s
		}
	}
	return nil
}

// once lets lbsync work once, and looks at what came of it.
func (p *player) once() time.Duration {
	m := p.ha
	m.failed, m.asked, m.refused, m.read = false, 0, 0, false
	if p.backend.have != nil && !p.backend.reread {
		p.backend.have.Each(m.trustServed) // by the report before, though HAProxy may be another one since
	}
	asked := p.refresh
	before, _ := p.backend.state()
	next, err := p.backend.Step(context.Background())
	p.backend.nextFull = DefaultFull // without its jitter a history can be played again
	p.rt.Logf("%v step: %v %v", time.Now().Format("15:04:05.000"), next, err)
	p.spoilt = m.refused > 0 || p.spoilt && !m.read
	if m.refused > 0 {
		p.did.count("refused")
	}
	if p.refresh && !asked {
		p.did.count("stale")
	}
	if !p.known && p.cold == nil && m.asked > 0 {
		p.rt.Fatalf("%d ops before anything was known", m.asked)
	}
	if (err != nil) != m.failed {
		p.rt.Fatalf("an exchange failed: %v, and the step says %v", m.failed, err)
	}
	if now, known := p.backend.state(); known && now != before && now == p.backend.view.Token {
		for _, s := range m.servers {
			if b := p.belief(s.Addr); s.Ours() && s.Serving() && s.told.Serving() && b.wanted() && b.Instance.State() == registrar.AdminDrain {
				p.rt.Fatalf("%s still serves %v, whose drain is acknowledged", s.Name, s.Addr)
			}
		}
	}
	if err != nil || p.spoilt || !p.known {
		return cmp.Or(next, 100*time.Millisecond)
	}
	st := p.backend.standing()
	for what, n := range map[string]int{"unplaced": st.Unplaced, "postponed": st.Postponed, "floor": st.Held} {
		if n > 0 {
			p.did.count(what)
		}
	}
	for _, s := range m.servers {
		if !s.Ours() || !s.Serving() || !s.told.Serving() || s.told.Addr != s.Addr {
			continue
		}
		switch b := p.get(s.Addr); {
		case s.nobody() && m.restarted && p.allowed(s.Addr):
			// An lbsync that has never seen this placeholder takes it for an instance
			// of which the register says nothing: it goes when its grace is over.
		case s.nobody():
			p.rt.Fatalf("%s serves and holds nobody", s.Name)
		case b.word():
			p.rt.Fatalf("%s still serves %v, which is gone: %s", s.Name, s.Addr, b.Gone.Reason)
		case b.Present && (!p.allowed(s.Addr) || b.Instance.State() == registrar.AdminMaint):
			p.rt.Fatalf("%s still serves %v, which is in maint or not allowed", s.Name, s.Addr)
		case b.Present && b.Instance.Weight() == 0:
			p.rt.Fatalf("%s still serves %v, whose weight is 0", s.Name, s.Addr)
		}
	}
	return next
}

// settle ends all trouble and lets time pass until nothing waits any more. Then
// HAProxy must have what the register says, and lbsync nothing to do.
func (p *player) settle() {
	m := p.ha
	p.redis, m.trouble = true, noTrouble
	clear(p.sick)
	clear(p.reg.garbage)
	for _, s := range m.servers {
		s.busy = 0
	}
	p.backend.replaced() // what a human did since the last look is seen
	begun, polled, whole := time.Now(), time.Time{}, time.Time{}
	for time.Since(begun) < 2*modelHold+modelSilence+2*DefaultFull+time.Duration(len(modelAddrs))*registrar.LetGoEvery {
		p.reap()
		if full := p.refresh || time.Since(whole) >= DefaultFull; full || time.Since(polled) >= notifier.DefaultPoll {
			p.poll(full)
			polled = time.Now()
			if full {
				whole = polled
			}
		}
		p.advance(min(p.once(), time.Second))
	}
	p.once()
	p.converged()
	p.advance(DefaultFull)
	if p.once(); m.asked > 0 {
		p.rt.Fatalf("all was right, and lbsync sent %d ops", m.asked)
	}
}

// converged compares HAProxy with the register.
func (p *player) converged() {
	m, rt := p.ha, p.rt
	free, twins := 0, map[netip.AddrPort]bool{}
	for _, s := range m.servers {
		b := p.belief(s.Addr)
		switch {
		case !s.Ours() || s.human && s.Admin == Maint && !s.nobody():
		case s.nobody() && m.restarted && p.allowed(s.Addr):
			// As said in once; in maint it looks like a human's.
		case s.nobody():
			if !s.Slot {
				rt.Fatalf("%s holds nobody, and is still there", s.Name)
			}
			free++
			if s.Admin != Maint {
				rt.Fatalf("%s is %v and holds nobody", s.Name, s.Admin)
			}
		case b.wanted() && twins[s.Addr]:
			rt.Fatalf("%v has two servers", s.Addr)
		case b.wanted():
			twins[s.Addr] = true
		default:
			if b.Present || b.word() || !s.Serving() || m.serving() > max(p.cfg.MinServers, m.share()) {
				rt.Fatalf("%s still holds %v (%v, weight %d, up %v)", s.Name, s.Addr, s.Admin, s.Weight, s.Up)
			}
		}
	}
	for _, a := range modelAddrs {
		b, s := p.belief(a), p.holder(a)
		for _, t := range m.servers {
			if t.Ours() && t.Addr == a && t.Admin < s.Admin {
				s = t // the other is idle
			}
		}
		if got := p.reg.entry(a); got.Present != b.Present {
			rt.Fatalf("%v: the register says %v, lbsync knows %v", a, got, b.Entry)
		}
		if !b.wanted() {
			continue
		}
		if b.Instance.State() == registrar.AdminMaint {
			if s != nil && !s.human {
				rt.Fatalf("%v is to be in maint, and %s has it", a, s.Name)
			}
			continue
		}
		if s == nil {
			if free > 0 && p.mode != Dynamic || m.template == nil && !m.noAdd {
				rt.Fatalf("%v has no server, and %d slots are free", a, free)
			}
			continue
		}
		want, weight := admin(b.Instance.State()), b.Instance.Weight()
		if s.human {
			continue
		}
		if m.static && weight > 0 {
			weight = 1
		}
		last := want == Drain && s.Serving() && m.serving() <= max(1, m.share())
		if s.Admin != want && !last || s.Weight != weight || !s.Slot && p.backend.have.checks() != s.Checked {
			rt.Fatalf("%s of %v is %v with weight %d, checked %v, want %v with weight %d", s.Name, a, s.Admin, s.Weight, s.Checked, want, weight)
		}
	}
}
