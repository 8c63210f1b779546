package reaper

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"rollcall/registrar"
)

// The protection's limits. A lone death is never held. Whoever may beat for one service
// can write any number of suspects into it, so those of one service, the one that has
// most, hold nobody of another: the rule for all must be fulfilled without them, and
// else, if it is with them, it holds that service alone.
const (
	manySuspects   = 2  // of all services: up to as many are never held
	manyPercent    = 15 // of all instances
	serviceSuspect = 2  // of one service, and at least half of it
)

// What has been held for LetGoAfter is let go, one instance each LetGoEvery.
const (
	LetGoAfter = 5 * time.Minute
	LetGoEvery = registrar.LetGoEvery
)

// Rule is why svc may be held; "" is every service.
func Rule(svc registrar.Service) string {
	if svc == everyService {
		return fmt.Sprintf("more than %d, and at least %d%% of all, also without the service that has most of them", manySuspects, manyPercent)
	}
	return fmt.Sprintf("at least %d, and half of the service; or more than %d, and with those of all others at least %d%% of all", serviceSuspect, manySuspects, manyPercent)
}

// Overrule is the command that takes out at once whom the protection holds, in
// a registry of these times.
func Overrule(ttl, interval time.Duration) string {
	cmd := "rollcall reap --once --force"
	if ttl != registrar.DefaultTTL {
		cmd += " --ttl " + ttl.String()
	}
	if interval != DefaultInterval(ttl) {
		cmd += " --heartbeat " + interval.String()
	}
	return cmd
}

// everyService is the name of the hold on all services; no service has it.
const everyService registrar.Service = ""

// hold is a stop of all removal, from one service or from every.
type hold struct {
	since, seen       time.Duration // began; the cause was there last
	suspects, members int64
	said              bool // in the log
}

// protection decides whether what looks dead is too much to be deaths. It is
// fed with every survey and knows no clock; times are monotonic, since any
// fixed instant.
//
// A member that is no address does not count (registrar.Count): nobody beats for
// it, and it goes as stale unless its service is held.
type protection struct {
	dry   time.Duration // nothing is removed for that long after the cause is gone
	holds map[registrar.Service]*hold
	letGo time.Duration // the last one

	// others, if not nil, returns the counts that are in no survey fed here: those of a
	// Cluster's other services.
	others func() []registrar.Count
}

func newProtection(beat time.Duration) protection {
	return protection{dry: 2 * beat, holds: map[registrar.Service]*hold{}, letGo: -LetGoEvery}
}

// judge takes in a survey and returns the names of holds that began with it or
// ended. A hold begins only if something would be removed otherwise; it lasts
// until its cause has been gone for two heartbeats, since instances that come
// back do so one after the other.
func (p *protection) judge(now time.Duration, counts []registrar.Count) (began []registrar.Service, ended map[registrar.Service]hold) {
	note := func(c registrar.Count, many bool) {
		h := p.holds[c.Service]
		switch {
		case !many || h == nil && c.Stale == 0:
			return
		case h == nil:
			h = &hold{since: now}
			p.holds[c.Service] = h
			began = append(began, c.Service)
		}
		h.seen, h.suspects, h.members = now, c.Suspects, c.Members
	}
	all, most := registrar.Count{Service: everyService}, registrar.Count{}
	add := func(c registrar.Count) {
		all.Members += c.Members
		all.Suspects += c.Suspects
		if c.Suspects > most.Suspects || c.Suspects == most.Suspects && c.Service < most.Service {
			most = c
		}
	}
	if p.others != nil {
		for _, c := range p.others() {
			if !c.Mistyped {
				add(c)
			}
		}
	}
	for _, c := range counts {
		if c.Mistyped {
			if h := p.holds[c.Service]; h != nil {
				h.seen = now // unknown changes nothing
			}
			continue
		}
		add(c)
		all.Stale += c.Stale
	}
	many := func(suspects, members int64) bool {
		return suspects > manySuspects && suspects*100 >= manyPercent*members
	}
	every := many(all.Suspects, all.Members) && many(all.Suspects-most.Suspects, all.Members-most.Members)
	alone := !every && many(all.Suspects, all.Members)
	for _, c := range counts {
		if !c.Mistyped {
			note(c, c.Suspects >= serviceSuspect && c.Suspects*2 >= c.Members || alone && c.Service == most.Service && c.Suspects > manySuspects)
		}
	}
	note(all, every)
	for svc, h := range p.holds {
		if now-h.seen >= p.dry {
			if ended == nil {
				ended = map[registrar.Service]hold{}
			}
			ended[svc] = *h
			delete(p.holds, svc)
		}
	}
	return began, ended
}

// held tells whether nothing may be removed from svc.
func (p *protection) held(svc registrar.Service) bool {
	return p.holds[everyService] != nil || p.holds[svc] != nil
}

// release names the held services of which one instance may go nevertheless, that
// with the oldest first: after 5 min of holding, one in 10 s, oldest first, and never
// the last of a service, so that a loss of many for good does not stay for ever. Here
// is only when this reaper asks: the pace of all of them together is kept in Redis, by
// the script that removes (registrar.Sweep.LetGo), which also knows more of garbage
// than the counts (registrar.ErrLastLeft).
func (p *protection) release(now time.Duration, counts []registrar.Count) (may []registrar.Count) {
	if now-p.letGo < LetGoEvery {
		return nil
	}
	for _, c := range counts {
		if c.Mistyped || c.Stale == 0 || c.Members < 2 || c.Oldest == 0 || !p.held(c.Service) {
			continue
		}
		if p.fresh(everyService, now) || p.fresh(c.Service, now) {
			continue
		}
		may = append(may, c)
	}
	if len(may) > 0 {
		p.letGo = now
	}
	slices.SortStableFunc(may, func(a, b registrar.Count) int { return cmp.Compare(a.Oldest, b.Oldest) })
	return may
}

// fresh tells whether a hold is too young to let go, or its cause is gone and
// it will end by itself.
func (p *protection) fresh(svc registrar.Service, now time.Duration) bool {
	h := p.holds[svc]
	return h != nil && (now-h.since < LetGoAfter || h.seen != now)
}
