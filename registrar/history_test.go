package registrar

import (
	"context"
	cmdline "flag"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"pgregory.net/rapid"

	"rollcall/registrar/redistest"
)

const (
	modelChecks = 50      // histories a round …
	modelSteps  = 250     // … of so many steps on average
	modelFloor  = 100_000 // steps a run, in as many rounds as it takes
	modelBatch  = 128     // steps a pipeline
)

// TestHistories plays random histories on a real Redis, and the model beside it:
// late and foreign beats, pauses and clock steps (nobody beats while the clock
// moves, and it moves back too), stale and foreign fences, restarts with old
// snapshots. Steps go in pipelines; every answer, message and read must be
// the model's. The model's own steps are held to what must never happen.
func TestHistories(t *testing.T) {
	setDefault(t, "rapid.checks", modelChecks)
	setDefault(t, "rapid.steps", modelSteps)
	whole := wanted(modelChecks, modelSteps)
	srv := redistest.Start(t)
	rdb := redis.NewClient(&redis.Options{Network: "unix", Addr: srv.Socket, MaxRetries: -1, DisableIdentity: true})
	t.Cleanup(func() { must(t, rdb.Close()) })
	var did tally
	begun := time.Now()
	for did.steps == 0 || whole && did.steps < modelFloor {
		rapid.Check(t, func(rt *rapid.T) {
			p := newPlayer(t, rdb, srv, &did)
			defer func() { must(t, p.ps.Close()) }()
			rt.Repeat(map[string]func(*rapid.T){"step": p.step})
			p.flush(rt)
		})
	}
	took := time.Since(begun).Round(time.Millisecond)
	t.Logf("%d steps in %v: %v", did.steps, took, did.answers)
	for _, a := range []string{
		"beat OK", "beat NEW", "beat CHANGED", "beat TAKEN", "beat LEFT", "beat NOTOWNER", "beat INTERVAL",
		"leave OK", "leave SAME", "leave NOTOWNER", "deregister OK", "deregister ABSENT", "deregister BEATS",
		"admin OK", "admin SAME", "admin STALE", "admin ABSENT", "reap OK", "reap FENCED", "reap LATE", "reap LAST", "reaped", "let go", "read delta", "read full", "restart old", "restart empty",
	} {
		if whole && did.answers[a] < 10 {
			t.Errorf("%d times %q, want 10 or more: the histories miss it", did.answers[a], a)
		}
	}
}

// setDefault sets one of rapid's flags unless the command line does.
func setDefault(tb testing.TB, name string, value int) {
	tb.Helper()
	if f := cmdline.Lookup(name); f.Value.String() == f.DefValue {
		must(tb, cmdline.Set(name, strconv.Itoa(value)))
	}
}

// wanted tells whether this is a whole run and not one that somebody cut short.
func wanted(checks, steps int) bool {
	return cmdline.Lookup("rapid.checks").Value.String() == strconv.Itoa(checks) && cmdline.Lookup("rapid.steps").Value.String() == strconv.Itoa(steps)
}

// check ends a history on an error.
func check(rt *rapid.T, err error) {
	if err != nil {
		rt.Fatal(err)
	}
}

type tally struct {
	steps   int
	answers map[string]int
}

func (d *tally) count(what string) {
	if d.answers == nil {
		d.answers = map[string]int{}
	}
	d.answers[what]++
}

// player draws steps, lets the model answer them at once, and sends them to
// Redis a batch at a time.
type player struct {
	*model
	tb     testing.TB // for what only prepares
	rdb    *redis.Client
	srv    *redistest.Server
	store  *Store
	did    *tally
	ps     *redis.PubSub
	latest int64  // the clock's highest; notes were dropped by it
	saved  *model // in the dump file; nil = nothing of this history

	pipe   redis.Pipeliner
	queued []func(rt *rapid.T) // what to make of its answers

	serial  int
	clients map[Service]map[netip.AddrPort][]*client // newest first
	reapers map[string]*reaperState
	tokens  map[Service][]remembered
}

type reaperState struct {
	tokens []string // of its pulses, newest first
	last   int64    // when the newest was
	replid string   // that it saw
}

// remembered is a state that a reader has seen.
type remembered struct {
	Token
	view view
}

var (
	modelServices = []Service{"api", "web"}
	modelAddrs    = []netip.AddrPort{host(0), host(1), host(2), host(3)}
	modelAgents   = []string{"", "a1", "a1", "", "a2"} // of one registration after the other
	modelKinds    = kinds(
		"beat", 170, "clock", 60, "read", 60, "register", 24, "change", 24, "leave", 24, "admin", 40, "deregister", 16,
		"reap", 50, "pulse", 30, "config", 3, "forget", 16, "save", 4, "restart", 1, "read", 4)
	modelClock = []int64{0, 1, 500, 1000, 2000, 3000, 5000, 10_000, 10_001, 15_000, 15_001, 200_000, -1, -1000, -30_000, pruneAfter, pruneAfter + 1}
)

// kinds lays out a table to draw from; rapid favours its beginning and its last.
func kinds(nameAndCount ...any) []string {
	var out []string
	for i := 0; i < len(nameAndCount); i += 2 {
		out = append(out, slices.Repeat([]string{nameAndCount[i].(string)}, nameAndCount[i+1].(int))...)
	}
	return out
}

var (
	drawKind    = rapid.SampledFrom(modelKinds)
	drawClock   = rapid.SampledFrom(modelClock)
	drawService = rapid.SampledFrom(modelServices)
	drawAddr    = rapid.SampledFrom(modelAddrs)
	drawSmall   = rapid.IntRange(0, 7)
	drawBool    = rapid.Bool()
	drawScope   = rapid.SampledFrom([]Scope{ScopeDefault, ScopeAddress, ScopeRegistration})
	drawVerb    = rapid.SampledFrom([]string{"drain", "maint", "ready", "weight"})
	drawReason  = rapid.SampledFrom([]string{"", "disk"})
	drawWhy     = rapid.SampledFrom([]Reason{Left, Unhealthy})
	drawReaper  = rapid.SampledFrom([]string{"r1", "r2"})
)

func newPlayer(tb testing.TB, rdb *redis.Client, srv *redistest.Server, did *tally) *player {
	store, err := NewStore(rdb, fmt.Sprintf("model%d", namespaces.Add(1)))
	must(tb, err)
	p := &player{
		model: newModel(modelServices...), tb: tb, rdb: rdb, srv: srv, store: store, did: did,
		clients: map[Service]map[netip.AddrPort][]*client{}, tokens: map[Service][]remembered{},
		reapers: map[string]*reaperState{"r1": {tokens: []string{"none"}}, "r2": {tokens: []string{"none"}}},
	}
	for _, svc := range modelServices {
		p.clients[svc] = map[netip.AddrPort][]*client{}
		for _, a := range modelAddrs {
			p.register(svc, a)
		}
	}
	p.connect()
	return p
}

// name is a new one.
func (p *player) name(what string) string {
	p.serial++
	return what + strconv.Itoa(p.serial)
}

// connect loads the scripts and subscribes, at the start and after a restart.
func (p *player) connect() {
	ctx, s := p.tb.Context(), p.store
	for _, sc := range []*redis.Script{s.beat, s.still, s.leave, s.deregister, s.admin, s.reap, s.pulse, s.read, s.versions, s.config} {
		must(p.tb, sc.Load(ctx, p.rdb).Err())
	}
	v, err := s.Versions(ctx, nil)
	must(p.tb, err)
	p.replid = v.ReplID
	p.ps = s.Subscribe(ctx)
	_, err = p.ps.Receive(ctx)
	must(p.tb, err)
	p.pipe = p.rdb.Pipeline()
}

func (p *player) register(svc Service, a netip.AddrPort) {
	old := p.clients[svc][a]
	p.clients[svc][a] = append([]*client{{token: p.name("t"), agent: modelAgents[p.serial%len(modelAgents)], weight: 100}}, old[:min(len(old), 2)]...)
}

// change queues one call of a script that changes svc, and what it must answer.
func (p *player) change(rt *rapid.T, sc *redis.Script, name string, svc Service, keys []string, epoch string, want []any, args ...any) {
	p.did.count(fmt.Sprint(name, " ", want[0]))
	argv := append([]any{p.store.keys.Changes(), string(svc), p.now, epoch}, args...)
	p.call(rt, sc, name, p.store.keys.change(svc, keys...), want, argv...)
}

func (p *player) call(rt *rapid.T, sc *redis.Script, name string, keys []string, want []any, argv ...any) {
	rt.Logf("%s %v: %v", name, argv, want)
	cmd := sc.EvalSha(p.tb.Context(), p.pipe, keys, argv...)
	p.queued = append(p.queued, func(rt *rapid.T) {
		got, err := cmd.Slice()
		if err != nil || !reflect.DeepEqual(got, want) {
			rt.Fatalf("%s %v\n got %v %v\nwant %v", name, argv, got, err, want)
		}
	})
}

// step draws one step and queues it.
func (p *player) step(rt *rapid.T) {
	p.did.steps++
	kind := drawKind.Draw(rt, "kind")
	switch kind {
	case "clock":
		p.now += drawClock.Draw(rt, "by")
		p.latest = max(p.latest, p.now)
	case "pulse":
		p.pulseOne(rt, drawReaper.Draw(rt, "reaper"))
	case "forget": // as an expired pulse is
		id := drawReaper.Draw(rt, "reaper")
		delete(p.pulses, id)
		p.letGo = false
		p.pipe.Del(p.tb.Context(), p.store.keys.Reaper(id), p.store.keys.LetGo())
	case "config":
		ttl, interval := int64(ttlMS), int64(intervalMS)
		if drawBool.Draw(rt, "short") {
			ttl, interval = 9000, 2000
		}
		p.call(rt, p.store.config, kind, []string{p.store.keys.Config(), p.store.keys.Services()}, p.times(ttl, interval), ttl, interval, "1", p.now, "")
		if drawBool.Draw(rt, "learned") {
			at := p.slowAt
			if drawBool.Draw(rt, "of before") {
				at += "0"
			}
			p.call(rt, p.store.config, "learned", []string{p.store.keys.Config(), p.store.keys.Services()}, p.learned(at), ttl, interval, "0", p.now, at)
		}
	case "save":
		p.flush(rt)
		must(p.tb, p.rdb.Save(p.tb.Context()).Err())
		p.saved = p.clone()
	case "restart":
		p.restart(rt)
	default:
		p.stepOf(rt, kind, drawService.Draw(rt, "service"))
	}
	if len(p.queued) >= modelBatch {
		p.flush(rt)
	}
}

func (p *player) stepOf(rt *rapid.T, kind string, svc Service) {
	epoch := p.name("e")
	if kind == "read" {
		states, since := p.tokens[svc], remembered{}
		if n := drawSmall.Draw(rt, "since"); n < len(states) {
			since = states[len(states)-1-n]
		}
		now := p.read(rt, svc, since)
		p.tokens[svc] = append(states[max(0, len(states)-7):len(states):len(states)], now)
		return
	}
	before, version, logged := p.services[svc].view(), p.services[svc].version, len(p.events)
	if kind == "reap" {
		p.reapOne(rt, svc, epoch)
		p.audit(rt, svc, before, version, logged, nil)
		return
	}
	a := drawAddr.Draw(rt, "addr")
	cs := p.clients[svc][a]
	c := cs[max(0, drawSmall.Draw(rt, "client")-4)%len(cs)] // mostly the newest
	word := p.services[svc].said(a)
	switch kind {
	case "register":
		p.register(svc, a)
	case "change":
		if drawBool.Draw(rt, "drain") {
			c.draining = true
		} else {
			c.weight = drawSmall.Draw(rt, "weight")
		}
	case "beat":
		agent, interval := "", int64(0)
		if drawBool.Draw(rt, "first") {
			agent = c.agent
		}
		if drawSmall.Draw(rt, "interval") == 7 {
			interval = 5001
		}
		scored := int64(-1)
		holder := p.services[svc].here[a]
		if holder != nil {
			scored = holder.beat
		}
		want := p.beat(svc, a, *c, agent, interval, epoch)
		if agent == "" {
			// As Store.Beat does: beat.lua only if still.lua says so.
			answer := []any{"BEAT"}
			steady := want[0] == "OK" && scored != p.now
			if steady {
				answer = []any{"OK", p.ttl, p.interval}
			}
			k := p.store.keys
			p.call(rt, p.store.still, "still", []string{k.Instances(svc), k.Meta(svc), k.Config()}, answer, p.now, a.String(), c.meta(), interval)
			if steady {
				p.did.count("still OK")
				break
			}
		}
		p.change(rt, p.store.beat, kind, svc, nil, epoch, want, a.String(), c.token, c.meta(), agent, interval)
		if g := before[a].gone; g.Token == c.token && (g.Reason == Left || g.Reason == Unhealthy) && p.services[svc].here[a] != nil {
			rt.Fatalf("%v came back after it had left", a)
		}
		if want[0] == "TAKEN" && p.now-scored <= 2*p.interval && (c.agent == "" || c.agent != holder.agent) {
			rt.Fatalf("%v was taken over from one that beats", a)
		}
	case "leave":
		why := drawWhy.Draw(rt, "why")
		want := p.leave(svc, a, c.token, why, epoch)
		p.change(rt, p.store.leave, kind, svc, nil, epoch, want, a.String(), c.token, string(why))
		if b := before[a]; b.here && b.token != c.token && p.services[svc].here[a] == nil {
			rt.Fatalf("%v was taken out by a foreign leave", a)
		}
	case "deregister":
		force := drawBool.Draw(rt, "force")
		want := p.deregister(svc, a, force, epoch)
		p.change(rt, p.store.deregister, kind, svc, nil, epoch, want, a.String(), flag(force), operator)
	case "admin":
		verb, weight, reason, text := drawVerb.Draw(rt, "verb"), -1, drawReason.Draw(rt, "reason"), ""
		if n := drawSmall.Draw(rt, "weight"); n < 5 {
			weight, text = n, strconv.Itoa(n)
		}
		of := ""
		if off := drawSmall.Draw(rt, "version"); off < 2 {
			of = strconv.FormatInt(p.services[svc].version+int64(off), 10)
		}
		scope := drawScope.Draw(rt, "scope")
		want := p.admin(svc, a, verb, weight, reason, of, scope, epoch)
		p.change(rt, p.store.admin, kind, svc, p.store.keys.overrides(svc), epoch, want, a.String(), verb, text, reason, of, "", operator, 0, string(scope))
	}
	p.audit(rt, svc, before, version, logged, func() bool { return word != p.services[svc].said(a) })
}

// audit holds the model itself to its promise: the version grows by one at
// every visible change, and not without one, and the log has an entry for each
// address that changed. Old notes go without one.
func (p *player) audit(rt *rapid.T, svc Service, before view, version int64, logged int, other func() bool) {
	s := p.services[svc]
	after := s.view()
	changes := 0
	for _, a := range modelAddrs {
		x, y := before[a], after[a]
		dropped := !x.here && y == seen{} && x.gone.At < p.now-pruneAfter
		if x != y && !dropped {
			changes++
		}
	}
	if changes == 0 && other != nil && other() {
		changes = 1 // a word about somebody absent, or one that another covers
	}
	changed := changes > 0
	if len(p.events)-logged != changes {
		rt.Fatalf("%d changes, and the log has %q", changes, p.events[logged:])
	}
	if grew := s.version - version; grew != 0 && grew != 1 || (grew == 1) != changed {
		rt.Fatalf("version of %s from %d to %d, and changed is %v\nfrom %v\nto   %v", svc, version, s.version, changed, before, after)
	}
}

func (p *player) pulseOne(rt *rapid.T, id string) {
	token, epoch := p.name("p"), p.name("e")
	want := p.pulse(id, token, epoch)
	r := p.reapers[id]
	r.tokens, r.last, r.replid = append([]string{token}, r.tokens[:min(len(r.tokens), 2)]...), p.now, p.replid
	p.call(rt, p.store.pulse, "pulse", []string{p.store.keys.Reaper(id), p.store.keys.Epoch()}, want, token, epoch, time.Hour.Milliseconds(), p.now)
}

func (p *player) reapOne(rt *rapid.T, svc Service, epoch string) {
	id := drawReaper.Draw(rt, "reaper")
	if drawBool.Draw(rt, "pulse first") {
		p.pulseOne(rt, id)
	}
	r := p.reapers[id]
	w := Sweep{ID: id, Token: r.tokens[0], ReplID: r.replid, Last: r.last, MaxAge: 5 * time.Second, Cutoff: r.last - p.ttl}
	limit := 1 + drawSmall.Draw(rt, "limit")
	var stay []netip.AddrPort // as they were found; by now they may be gone
	if drawSmall.Draw(rt, "let go") > 4 {
		w.LetGo = time.Hour
		for range drawSmall.Draw(rt, "found") / 2 {
			stay = append(stay, drawAddr.Draw(rt, "stays"))
		}
	}
	switch drawSmall.Draw(rt, "fence") {
	case 6: // its pulse before the last
		w.Token = r.tokens[len(r.tokens)-1]
	case 7: // another's
		w.Token = p.reapers[map[string]string{"r1": "r2", "r2": "r1"}[id]].tokens[0]
	}
	beats := map[string]int64{}
	for a, i := range p.services[svc].here {
		beats[a.String()] = i.beat
	}
	members := len(beats)
	want := p.reap(svc, w, limit, stay, epoch)
	if w.LetGo > 0 && len(want) > 3 {
		p.did.count("let go")
		if members < 2 || len(want) > 4 {
			rt.Fatalf("let go %v of %d", want[3:], members)
		}
	}
	for _, a := range want[3:] {
		p.did.count("reaped")
		if age := p.now - beats[a.(string)]; age <= p.ttl {
			rt.Fatalf("%v was reaped %d ms after its beat", a, age)
		}
	}
	argv := []any{w.Token, w.Last, w.MaxAge.Milliseconds(), w.Cutoff, limit, w.LetGo.Milliseconds(), w.ReplID}
	for _, a := range stay {
		argv = append(argv, a.String())
	}
	p.change(rt, p.store.reap, "reap", svc, []string{p.store.keys.Reaper(id), p.store.keys.LetGo()}, epoch, want, argv...)
}

// read queues a read of svc, whole or of what changed since an earlier state,
// and returns the state that it must show.
func (p *player) read(rt *rapid.T, svc Service, since remembered) remembered {
	s := p.services[svc]
	now := Token{p.replid, p.epoch, s.version}
	argv := []any{deltaLimit, ReadLimit, MaxMeta, scanCount, "", "", ""}
	full := true
	if since.view != nil {
		argv[4], argv[5], argv[6] = since.ReplID, since.Epoch, since.Version
		full = since.ReplID != now.ReplID || since.Epoch != now.Epoch || since.Version > now.Version || s.pruned > since.Version
		if since.Interrupted(now) != (since.ReplID != now.ReplID) {
			rt.Fatalf("from %v to %v: interrupted is %v", since.Token, now, since.Interrupted(now))
		}
	}
	want, beats, latest, last := s.view(), map[netip.AddrPort]int64{}, p.latest, maps.Clone(s.changed)
	for a, i := range s.here {
		beats[a] = i.beat
	}
	what := "read delta"
	if full {
		what = "read full"
	}
	p.did.count(what)
	rt.Logf("%s of %s since %v", what, svc, since.Token)
	cmd := p.store.read.EvalShaRO(p.tb.Context(), p.pipe, p.store.keys.read(svc), argv...)
	p.queued = append(p.queued, func(rt *rapid.T) {
		r, err := cmd.Slice()
		check(rt, err)
		snap, err := parseSnapshot(svc, r, 0)
		check(rt, err)
		if snap.Token != now || snap.Full != full || snap.Garbage != nil {
			rt.Fatalf("%s of %s since %v: token %v, want %v; full is %v, garbage %v", what, svc, since.Token, snap.Token, now, snap.Full, snap.Garbage)
		}
		for _, e := range snap.Entries {
			if e.Present && e.Instance.Beat != beats[e.Addr] {
				rt.Fatalf("%v beat at %d, want %d", e.Addr, e.Instance.Beat, beats[e.Addr])
			}
			if !full && last[e.Addr] <= since.Version {
				rt.Fatalf("%v is in what changed since %d, and changed at %d", e.Addr, since.Version, last[e.Addr])
			}
		}
		got, err := since.view.fold(snap)
		check(rt, err)
		for _, a := range modelAddrs {
			// An earlier view may know more of who went long ago.
			forgotten := !full && !got[a].here && want[a] == seen{} && got[a].gone.At < latest-pruneAfter
			if got[a] != want[a] && !forgotten {
				rt.Fatalf("%s of %s since %v: %v\n got %+v\nwant %+v", what, svc, since.Token, a, got[a], want[a])
			}
		}
	})
	return remembered{now, want}
}

// flush sends what is queued, compares every answer, and then all that a
// reader can see.
func (p *player) flush(rt *rapid.T) {
	ctx := p.tb.Context()
	for _, svc := range modelServices {
		p.read(rt, svc, remembered{})
		s := p.services[svc]
		index := maps.Clone(s.changed)
		if s.pruned > 0 {
			index[netip.AddrPort{}] = s.pruned
		}
		p.index(p.store.keys.Changed(svc), index)
		p.index(p.store.keys.GoneAt(svc), s.noted)
	}
	k := p.store.keys
	want := []any{p.replid, p.epoch, int64(1), p.ttl, p.interval, p.global} // one listens: this player
	var named []string
	for _, svc := range modelServices {
		want = append(want, p.services[svc].version)
		if p.services[svc].listed {
			named = append(named, string(svc))
		}
	}
	p.call(rt, p.store.versions, "versions", []string{k.Epoch(), k.Config(), k.Version(), k.ServiceVersion("api"), k.ServiceVersion("web")}, want, k.Changes())
	members, entries := p.pipe.SMembers(ctx, k.Services()), p.pipe.XRange(ctx, k.Events(), "-", "+")
	p.pipe.Publish(ctx, k.Changes(), "mark")
	_, err := p.pipe.Exec(ctx)
	check(rt, err)
	for _, answer := range p.queued {
		answer(rt)
	}
	p.queued = nil
	listed := members.Val()
	slices.Sort(listed)
	if !slices.Equal(listed, named) {
		rt.Fatalf("services %q, want %q", listed, named)
	}
	var entered []string
	for _, e := range entries.Val() {
		v := e.Values
		entered = append(entered, fmt.Sprintf("%s %s %s %s %s %s %q", v["at"], v["service"], v["addr"], v["what"], v["version"], v["id"], v["why"]))
	}
	if !slices.Equal(entered, p.events) {
		rt.Fatalf("the log has %q\n    want %q", entered, p.events)
	}
	var heard []string
	for {
		tctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		m, err := p.ps.ReceiveMessage(tctx)
		cancel()
		check(rt, err)
		if m.Payload == "mark" {
			break
		}
		heard = append(heard, m.Payload)
	}
	if !slices.Equal(heard, p.messages) {
		rt.Fatalf("announced %q\n    want %q", heard, p.messages)
	}
	p.messages = nil
}

// index queues a look at a sorted set by address; the zero address is `pruned`.
func (p *player) index(key string, scores map[netip.AddrPort]int64) {
	want := map[string]int64{}
	for a, score := range scores {
		if a.IsValid() {
			want[a.String()] = score
		} else {
			want["pruned"] = score
		}
	}
	cmd := p.pipe.ZRangeWithScores(p.tb.Context(), key, 0, -1)
	p.queued = append(p.queued, func(rt *rapid.T) {
		got := map[string]int64{}
		for _, z := range cmd.Val() {
			got[z.Member.(string)] = int64(z.Score)
		}
		if !maps.Equal(got, want) {
			rt.Fatalf("%s is %v, want %v", key, got, want)
		}
	})
}

// restart kills Redis and starts it with the snapshot that it wrote last.
func (p *player) restart(rt *rapid.T) {
	p.flush(rt)
	must(p.tb, p.ps.Close())
	p.srv.Kill(p.tb)
	p.srv.Launch(p.tb)
	now := p.now
	if p.saved == nil {
		p.did.count("restart empty")
		p.model = newModel(modelServices...)
	} else {
		p.did.count("restart old")
		p.model = p.saved.clone()
	}
	p.now = now
	p.connect()
}
