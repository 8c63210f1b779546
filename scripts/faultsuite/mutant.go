package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// mutant is rollcall with guards off. It plays in the fault that its guard is
// for, and must lose somebody there; a control, which has the last guard on
// again, must not. Guards overlap: where another one would hide the loss, it is
// off in both.
type mutant struct {
	name, fault string
	guard       string // what is off; empty in a control
	late        bool   // it loses nobody, but must be late: its guard keeps rollcall in time
	edits       []edit
}

// edit replaces a text that must be in the file exactly once.
type edit struct{ file, old, new string }

var (
	noProtection = edit{"reaper/protection.go", "\treturn p.holds[everyService] != nil || p.holds[svc] != nil", "\treturn false"}
	noProof      = edit{"reaper/proof.go", "\tneed := p.ttl.Milliseconds()\n\tfor _, s", "\tneed := p.ttl.Milliseconds()\n\tif p.ok {\n\t\treturn p.now - need, true\n\t}\n\tfor _, s"}
	noClock      = edit{"reaper/proof.go", "case o.pulse.Now < p.now || now.lo-p.anchor.hi > p.period/2 || p.anchor.lo-now.hi > p.period/2:", "case false:"}
	noSoft       = edit{"reaper/proof.go", "\tp.open, p.ok = false, false\n", ""}
	noSuspects   = edit{"reaper/protection.go", "\t\tall.Suspects += c.Suspects\n", "\t\tall.Suspects += c.Stale\n"}
	noClause     = edit{"reaper/protection.go", "c.Suspects >= serviceSuspect && c.Suspects*2 >= c.Members ||", "c.Stale >= serviceSuspect && c.Stale*2 >= c.Members ||"}
	noWitness    = edit{"lbsync/want.go", "vouched := s.Checked && s.Up && s.Passed", "vouched := false"}
	noHold       = edit{"lbsync/want.go", "hold: rd.ttl + 2*rd.interval, why:", "why:"}
	noCanary     = edit{"reaper/reaper.go", "\terr := r.proof.late(r.canary(tctx))\n", "\t_ = tctx\n\tvar err error\n"}
	reapFull     = edit{"registrar/lua/reap.lua", "#!lua\n", "#!lua flags=allow-oom\n"}
	pulseFull    = edit{"registrar/lua/pulse.lua", "#!lua\n", "#!lua flags=allow-oom\n"}
	beatRefused  = edit{"registrar/lua/beat.lua", "#!lua flags=allow-oom\n", "#!lua\n"}
	noPull       = edit{"registrar/lua/reap.lua", "  redis.call('ZADD', KEYS[1], 'XX', now, a)\n", ""}
	noPoll       = edit{"notifier/watcher.go", "\t\t\tpoll.Reset(registrar.Shorten(every))\n\t\t\tw.due = true\n", ""}
	noHuman      = edit{"lbsync/plan.go", "if inv.Human(*s) || s.Agent && !w.Insist {", "if s.Agent && !w.Insist {"}
	noLast       = edit{"lbsync/backend.go", "if state != Drain || serves(&s) == 0 || serving > max(1, floor()) {", "if true {"}
	noProbe      = edit{"lbsync/lbsync.go", "if last != (Process{}) {", "if false {"}
	noCold       = edit{"lbsync/backend.go", "\t\tb.cold = &l\n", "\t\t_ = l\n"}
	noTimes      = edit{"reaper/sweep.go", "\treturn r.config(ctx, false, false)\n", "\treturn ctx.Err()\n"}
	noLearn      = edit{"reaper/reaper.go", "r.proof.teach(t.Slow, t.SlowAt)", "r.proof.teach(0, t.SlowAt)"}
	noFence      = edit{"registrar/lua/reap.lua", "if redis.call('GET', KEYS[13]) ~= token then return {'FENCED', 0, 0} end\n", ""}
	noFenceID    = edit{"registrar/lua/reap.lua", "if history() ~= ARGV[11] then return {'FENCED', 0, 0} end\n", ""}
	noAge        = edit{"registrar/lua/reap.lua", "if now < last or now - last > most then return {'LATE', 0, 0} end\n", ""}
	cutNow       = edit{"registrar/lua/reap.lua", "local stale = ", "cut = string.format('%.0f', tonumber(cut) + now - last)\nlocal stale = "}
	noToken      = edit{"reaper/proof.go", "case !p.known(o.pulse.Previous, o.recv):", "case false:"}
	noReplID     = edit{"reaper/proof.go", "case o.pulse.ReplID != p.replid:", "case false:"}
	noEpoch      = edit{"reaper/proof.go", "case p.epoch != \"\" && o.pulse.Epoch != p.epoch:", "case false:"}
	noGap        = edit{"reaper/proof.go", "case p.open && o.recv-last > p.maxAge():", "case p.open && o.recv < last:"}
	noSlow       = edit{"reaper/proof.go", "case o.recv-o.send > p.deadline()*5/4:", "case false:"}
	noCredit     = edit{"reaper/proof.go", "\tp.open, p.ok = false, false\n", "\tp.segments, p.open, p.ok = nil, false, false\n"}
	noDry        = edit{"reaper/protection.go", "protection{dry: 2 * beat, ", "protection{dry: 1, "}
	noService    = edit{"reaper/protection.go", "c.Suspects >= serviceSuspect && c.Suspects*2 >= c.Members ||", "false ||"}
	noFloor      = edit{"lbsync/backend.go", "if !stay && up && serving <= max(b.cfg.MinServers, floor()) {", "if false {"}
	noDoubt      = edit{"notifier/view.go", "case e.Gone != nil && v.doubted[e.Addr] == *e.Gone:", "case false:"}
	noMemory     = edit{"lbsync/lbsync.go", "s.watcher.Remember(svc, l.Token)", "_, _ = svc, l"}
	noSurpassed  = edit{"notifier/view.go", "case e.Present && surpassed(e.Instance, had):", "case false:"}
	noAgeCheck   = edit{"lbsync/want.go", "out && rd.doubted && ", "out && false && "}
	noWatchdog   = edit{"notifier/watcher.go", "if quiet >= silence {", "if quiet >= time.Hour {"}
	noOwnerLeave = edit{"registrar/lua/leave.lua", "if token_of(addr) ~= token then return {'NOTOWNER', 0} end", ""}
	noOwnerBeat  = edit{"registrar/lua/beat.lua", "elseif holder == '' or claim ~= '' and decoded(held).agent == claim or now - tonumber(score) > 2 * interval then", "elseif true then"}
	noLeft       = edit{"registrar/lua/beat.lua", "if by == token and (reason == 'left' or reason == 'unhealthy') then return {'LEFT', now, 0, ttl, interval} end", ""}
	noQueue      = edit{"cmd/internal/logqueue/logqueue.go", "\tif q.add(p) {\n", "\tif true {\n\t\treturn q.w.Write(p)\n\t}\n\tif q.add(p) {\n"}
	stillRefused = edit{"registrar/lua/still.lua", "#!lua flags=allow-oom\n", "#!lua\n"}
)

var mutants = []mutant{
	{name: "proof-old", fault: "old-snapshot", guard: "a whole TTL of proven writes (and protection)", edits: []edit{noProtection, noProof}},
	{name: "proof-down", fault: "down", guard: "a whole TTL of proven writes (and protection)", edits: []edit{noProtection, noProof}},
	{name: "proof-lag", fault: "failover-lag", guard: "a whole TTL of proven writes (and protection)", edits: []edit{noProtection, noProof}},
	{name: "control-old", fault: "old-snapshot", edits: []edit{noProtection}},
	{name: "control-down", fault: "down", edits: []edit{noProtection}},
	{name: "control-lag", fault: "failover-lag", edits: []edit{noProtection}},
	{name: "clock", fault: "clock-steps", guard: "the clock against an anchor (and protection)", edits: []edit{noProtection, noClock}},
	{name: "control-clock", fault: "clock-steps", edits: []edit{noProtection}},
	{name: "refused", fault: "noreplicas", guard: "a refused pulse ends the healthy time (and protection, canary)", edits: []edit{noProtection, noCanary, noSoft}},
	{name: "control-refused", fault: "noreplicas", edits: []edit{noProtection, noCanary}},
	{name: "full", fault: "oom", guard: "what refuses beats refuses pulse and reap (and protection, canary)", edits: []edit{noProtection, noCanary, beatRefused, stillRefused, pulseFull, reapFull}},
	{name: "control-full", fault: "oom", edits: []edit{noProtection, noCanary, beatRefused, stillRefused}},
	{name: "canary", fault: "maxclients", guard: "the canary (and protection)", edits: []edit{noProtection, noCanary}},
	{name: "control-canary", fault: "maxclients", edits: []edit{noProtection}},
	{name: "protection", fault: "half-cut", guard: "protection", edits: []edit{noProtection}},
	{name: "suspects", fault: "half-cut", guard: "protection counts suspects, not the stale", edits: []edit{noSuspects, noClause}},
	{name: "stale", fault: "all-stale", guard: "protection", edits: []edit{noProtection}},
	{name: "fence", fault: "restart-between", guard: "the fence: a removal needs the last pulse in the same data (and replication id)", edits: []edit{noFence, noFenceID}},
	{name: "fence-id", fault: "restart-pulse", guard: "the fence: a removal needs the last pulse's replication id", edits: []edit{noFenceID}},
	{name: "age", fault: "clock-between", guard: "a removal needs a young pulse, and none from the future", edits: []edit{noAge}},
	{name: "edge", fault: "clock-edge", guard: "the cut-off is the pulse's time - TTL, not now - TTL", edits: []edit{cutNow}},
	{name: "token", fault: "old-snapshot", guard: "the pulse's token (and replication id, epoch, protection)", edits: []edit{noProtection, noReplID, noEpoch, noToken}},
	{name: "control-token", fault: "old-snapshot", edits: []edit{noProtection, noReplID, noEpoch}},
	{name: "gap", fault: "reaper-blind", guard: "the reaper's own pause is no healthy time (and protection)", edits: []edit{noProtection, noSlow, noGap}},
	{name: "control-gap", fault: "reaper-blind", edits: []edit{noProtection, noSlow}},
	{name: "future", fault: "future", late: true, guard: "a score from the future is pulled back", edits: []edit{noPull}},
	{name: "poll", fault: "messages-lost", late: true, guard: "the poll of the versions", edits: []edit{noPoll}},
	{name: "human", fault: "human", late: true, guard: "a human's maint", edits: []edit{noHuman}},
	{name: "last", fault: "drain-last", guard: "a drain of the last waits", edits: []edit{noLast}},
	{name: "probe", fault: "haproxy-killed", late: true, guard: "another HAProxy process is read at once", edits: []edit{noProbe}},
	{name: "cold", fault: "start-cold", late: true, guard: "the last list serves while Redis is away", edits: []edit{noCold}},
	{name: "times", fault: "ttl-raised", guard: "a sweep makes sure of the registry's TTL (and protection)", edits: []edit{noProtection, noTimes}},
	{name: "control-times", fault: "ttl-raised", edits: []edit{noProtection}},
	{name: "learn", fault: "ttl-lowered", guard: "shorter times count once all can know them (and protection)", edits: []edit{noProtection, noLearn}},
	{name: "control-learn", fault: "ttl-lowered", edits: []edit{noProtection}},
	{name: "credit", fault: "stalls", late: true, guard: "credit: a stall takes nothing from the time before", edits: []edit{noCredit}},
	{name: "dry", fault: "stragglers", guard: "a hold lasts for two heartbeats after its cause", edits: []edit{noDry}},
	{name: "service", fault: "small-service", guard: "protection of one service by itself", edits: []edit{noService}},
	{name: "floor", fault: "last-cut", guard: "the last server stays", edits: []edit{noFloor}},
	{name: "doubt", fault: "old-note", guard: "notes that an interruption brought are not believed", edits: []edit{noDoubt}},
	{name: "memory", fault: "old-note-start", guard: "lbsync's token on disk", edits: []edit{noMemory}},
	{name: "revival", fault: "old-list", guard: "after an interruption who is older than TTL is not added (and what was said of it stands)", edits: []edit{noAgeCheck, noSurpassed}},
	{name: "revival-start", fault: "old-list-start", guard: "after an interruption who is older than TTL is not added", edits: []edit{noAgeCheck}},
	{name: "log", fault: "log-unread", late: true, guard: "the log's queue", edits: []edit{noQueue}},
	{name: "watchdog", fault: "half-open-late", late: true, guard: "the subscription must answer", edits: []edit{noWatchdog}},
	{name: "owner-leave", fault: "reused-address", guard: "only the owner leaves", edits: []edit{noOwnerLeave}},
	{name: "owner-beat", fault: "reused-address", guard: "only the owner beats", edits: []edit{noOwnerBeat}},
	{name: "left", fault: "late-beat", late: true, guard: "who has left stays away", edits: []edit{noLeft}},
	{name: "witness", fault: "lone-cut", guard: "HAProxy's check as second witness", edits: []edit{noWitness}},
	{name: "absence", fault: "empty", guard: "absence is held (and the second witness)", edits: []edit{noWitness, noHold}},
}

// loss is a mutant's result.
type loss struct {
	Name    string `json:"name"`
	Guard   string `json:"guard_off"`
	Lost    int    `json:"lost"`
	Late    bool   `json:"late,omitempty"` // the dead stayed, or the living did not come
	Verdict string `json:"verdict"`
}

// apply returns the files that the mutant changes, whole, by their paths below
// root.
func (m mutant) apply(root string) (map[string]string, error) {
	texts := map[string]string{}
	for _, e := range m.edits {
		file := filepath.Join(root, e.file)
		if texts[file] == "" {
			b, err := os.ReadFile(file)
			if err != nil {
				return nil, err
			}
			texts[file] = string(b)
		}
		if n := strings.Count(texts[file], e.old); n != 1 {
			return nil, fmt.Errorf("mutant %s: %s has %d times, not once: %q", m.name, e.file, n, e.old)
		}
		texts[file] = strings.Replace(texts[file], e.old, e.new, 1)
	}
	return texts, nil
}

// workshop builds mutants into dir: each of the same edits once.
type workshop struct {
	dir  string
	done map[string]string // edits → binary
}

// build builds the mutants of a fault from the tree as it is, with the edits
// laid over it, and returns their binaries by name.
func (s workshop) build(fault string) (map[string]string, error) {
	built := map[string]string{}
	root, err := filepath.Abs(".")
	if err != nil {
		return nil, err
	}
	for _, m := range mutants {
		if m.fault != fault {
			continue
		}
		edits := fmt.Sprint(m.edits)
		if s.done[edits] == "" {
			texts, err := m.apply(root)
			if err != nil {
				return nil, err
			}
			if s.done[edits], err = s.compile(m.name, texts); err != nil {
				return nil, fmt.Errorf("mutant %s: %w", m.name, err)
			}
		}
		built[m.name] = s.done[edits]
	}
	return built, nil
}

func (s workshop) compile(name string, texts map[string]string) (binary string, err error) {
	overlay := struct{ Replace map[string]string }{map[string]string{}}
	binary = filepath.Join(s.dir, name)
	for file, text := range texts {
		overlay.Replace[file] = binary + "-" + filepath.Base(file)
		if err := os.WriteFile(overlay.Replace[file], []byte(text), 0o600); err != nil {
			return "", err
		}
	}
	b, err := json.Marshal(overlay)
	if err == nil {
		err = os.WriteFile(binary+".json", b, 0o600)
	}
	if err != nil {
		return "", err
	}
	if out, err := exec.Command("go", "build", "-ldflags=-s -w", "-overlay", binary+".json", "-o", binary, "./cmd/rollcall").CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return binary, nil
}

// compare notes which mutants are not right now that rollcall is.
func (w *world) compare() {
	for _, c := range w.mutants {
		c.late = c.late || c.right() != nil
	}
}

// judgeMutants waits until each mutant has lost somebody, for two TTL at most.
func (w *world) judgeMutants() []loss {
	var out []loss
	for _, m := range mutants {
		for _, c := range w.mutants {
			if c.namespace != m.name {
				continue
			}
			l := loss{Name: m.name, Guard: m.guard, Verdict: "shown"}
			if m.guard == "" {
				l.Guard, l.Verdict = "(control: only what is in brackets)", "none"
			}
			lost := func() int { a, b, d := c.losses(); return a + b + d }
			for begun := time.Now(); m.guard != "" && !m.late && lost() == 0 && time.Since(begun) < 2*w.ttl; {
				w.sleep(lookEvery)
			}
			l.Lost, l.Late = lost(), m.late && c.late
			switch {
			case m.late && !l.Late:
				l.Verdict = "MISSED"
				w.Errorf("mutant %s was in time", m.name)
			case !m.late && (l.Lost > 0) != (m.guard != ""):
				l.Verdict = "MISSED"
				w.Errorf("mutant %s lost %d", m.name, l.Lost)
			}
			out = append(out, l)
		}
	}
	return out
}

func z(score float64, member string) redis.Z { return redis.Z{Score: score, Member: member} }
