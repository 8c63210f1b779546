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
	edits       []edit
}

// edit replaces a text that must be in the file exactly once.
type edit struct{ file, old, new string }

var (
	noProtection = edit{"reaper/protection.go", "\treturn p.holds[everyService] != nil || p.holds[svc] != nil", "\treturn false"}
	noProof      = edit{"reaper/proof.go", "\tneed := p.ttl.Milliseconds()\n\tfor _, s", "\tneed := p.ttl.Milliseconds()\n\tif p.ok {\n\t\treturn p.now - need, true\n\t}\n\tfor _, s"}
	noClock      = edit{"reaper/proof.go", "case o.pulse.Now < p.now || now.lo-p.anchor.hi > p.period/2 || p.anchor.lo-now.hi > p.period/2:", "case false:"}
	noSoft       = edit{"reaper/proof.go", "\tp.open, p.ok = false, false\n", ""}
	noSuspects   = edit{"reaper/protection.go", "note(all, all.Suspects > manySuspects && all.Suspects*100 >= manyPercent*all.Members)", "note(all, all.Stale > manySuspects && all.Stale*100 >= manyPercent*all.Members)"}
	noClause     = edit{"reaper/protection.go", "note(c, c.Suspects >= serviceSuspect && c.Suspects*2 >= c.Members)", "note(c, c.Stale >= serviceSuspect && c.Stale*2 >= c.Members)"}
	noWitness    = edit{"lbsync/want.go", "vouched := s.Checked && s.Up && s.Passed", "vouched := false"}
	noHold       = edit{"lbsync/want.go", "hold: rd.ttl + 2*rd.interval, why:", "why:"}
	noCanary     = edit{"reaper/reaper.go", "\terr := r.canary(tctx)\n", "\t_ = tctx\n\tvar err error\n"}
	reapFull     = edit{"registrar/lua/reap.lua", "#!lua\n", "#!lua flags=allow-oom\n"}
	pulseFull    = edit{"registrar/lua/pulse.lua", "#!lua\n", "#!lua flags=allow-oom\n"}
	beatRefused  = edit{"registrar/lua/beat.lua", "#!lua flags=allow-oom\n", "#!lua\n"}
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
	{name: "refused", fault: "noreplicas", guard: "a refused pulse ends the healthy time (and protection)", edits: []edit{noProtection, noSoft}},
	{name: "control-refused", fault: "noreplicas", edits: []edit{noProtection}},
	{name: "full", fault: "oom", guard: "what refuses beats refuses pulse and reap (and protection, canary)", edits: []edit{noProtection, noCanary, beatRefused, stillRefused, pulseFull, reapFull}},
	{name: "control-full", fault: "oom", edits: []edit{noProtection, noCanary, beatRefused, stillRefused}},
	{name: "canary", fault: "maxclients", guard: "the canary (and protection)", edits: []edit{noProtection, noCanary}},
	{name: "control-canary", fault: "maxclients", edits: []edit{noProtection}},
	{name: "protection", fault: "half-cut", guard: "protection", edits: []edit{noProtection}},
	{name: "suspects", fault: "half-cut", guard: "protection counts suspects, not the stale", edits: []edit{noSuspects, noClause}},
	{name: "stale", fault: "all-stale", guard: "protection", edits: []edit{noProtection}},
	{name: "witness", fault: "lone-cut", guard: "HAProxy's check as second witness", edits: []edit{noWitness}},
	{name: "absence", fault: "empty", guard: "absence is held (and the second witness)", edits: []edit{noWitness, noHold}},
}

// loss is a mutant's result.
type loss struct {
	Name    string `json:"name"`
	Guard   string `json:"guard_off"`
	Lost    int    `json:"lost"`
	Verdict string `json:"verdict"`
}

// build builds the mutants of a fault from the tree as it is, with the edits
// laid over it, and returns their binaries by name.
func build(dir, fault string) (map[string]string, error) {
	built := map[string]string{}
	for _, m := range mutants {
		if m.fault != fault {
			continue
		}
		overlay := struct{ Replace map[string]string }{map[string]string{}}
		texts := map[string]string{}
		for _, e := range m.edits {
			file, err := filepath.Abs(e.file)
			if err != nil {
				return nil, err
			}
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
		base := filepath.Join(dir, m.name)
		for file, text := range texts {
			overlay.Replace[file] = base + "-" + filepath.Base(file)
			if err := os.WriteFile(overlay.Replace[file], []byte(text), 0o600); err != nil {
				return nil, err
			}
		}
		b, err := json.Marshal(overlay)
		if err == nil {
			err = os.WriteFile(base+".json", b, 0o600)
		}
		if err != nil {
			return nil, err
		}
		if out, err := exec.Command("go", "build", "-overlay", base+".json", "-o", base, "./cmd/rollcall").CombinedOutput(); err != nil {
			return nil, fmt.Errorf("mutant %s: %w\n%s", m.name, err, out)
		}
		built[m.name] = base
	}
	return built, nil
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
			lost := func() int { a, b := c.losses(); return a + b }
			for begun := time.Now(); m.guard != "" && lost() == 0 && time.Since(begun) < 2*w.ttl; {
				w.sleep(lookEvery)
			}
			if l.Lost = lost(); (l.Lost > 0) != (m.guard != "") {
				l.Verdict = "MISSED"
				w.Errorf("mutant %s lost %d", m.name, l.Lost)
			}
			out = append(out, l)
		}
	}
	return out
}

func z(score float64, member string) redis.Z { return redis.Z{Score: score, Member: member} }
