package httpapi

import (
	"fmt"
	"slices"

	"rollcall/registrar"
)

// point is how many instances there were from a time on.
type point struct {
	At                 int64 // unix ms by Redis' clock
	Ready, Out, Silent int
}

// MarshalJSON writes a point as [at, ready, out, silent].
func (p point) MarshalJSON() ([]byte, error) {
	return fmt.Appendf(nil, "[%d,%d,%d,%d]", p.At, p.Ready, p.Out, p.Silent), nil
}

// historyLimit is how many points are kept of a service.
const historyLimit = 300

// count is the membership that a chart shows: each instance in one of three.
func (d *document) count() (ready, out, silent int) {
	for _, i := range d.Instances {
		switch {
		case i.Silent || i.State == stateAbsent:
			silent++
		case i.State == stateReady:
			ready++
		case i.State != stateGarbage && i.State != stateGone:
			out++
		}
	}
	return ready, out, silent
}

// remember adds a point if the membership changed.
func (s *service) remember(at int64) {
	ready, out, silent := s.doc.count()
	s.history = add(s.history, point{at, ready, out, silent})
}

func add(history []point, p point) []point {
	if n := len(history); n > 0 {
		last := history[n-1]
		p.At = max(p.At, last.At)
		if last.Ready == p.Ready && last.Out == p.Out && last.Silent == p.Silent {
			return history
		}
	}
	history = append(history, p)
	return slices.Delete(history, 0, max(0, len(history)-historyLimit))
}

// recall puts the membership before this process' start in front of what it has
// seen, as far as the log of changes tells. The caller holds mu.
func (p *picture) recall(events []registrar.Event) {
	if len(events) == 0 {
		return
	}
	of := map[registrar.Service][]registrar.Event{}
	for _, e := range events {
		of[e.Service] = append(of[e.Service], e)
	}
	for name, s := range p.services {
		if len(s.history) == 0 {
			continue
		}
		first := s.history[0].At
		history := []point{}
		for _, p := range past(s.doc, of[name], events[0].At) {
			if p.At < first {
				history = add(history, p)
			}
		}
		for _, p := range s.history {
			history = add(history, p)
		}
		s.history = history
	}
}

// past plays the events that led to a document, all that there were since from.
func past(d *document, events []registrar.Event, from int64) []point {
	// Who was there before the first of them? Back from who is there now. word is
	// an operator's, own the instance's.
	there, word, own := map[string]bool{}, map[string]bool{}, map[string]bool{}
	for _, i := range d.Instances {
		there[i.Addr] = i.State != stateGarbage && i.State != stateGone
		word[i.Addr] = i.Word != nil && i.Word.State != registrar.AdminNone
		own[i.Addr] = i.State == stateDraining
	}
	play := func(e registrar.Event, forth bool) {
		switch e.What {
		case registrar.EventJoined, registrar.EventTakeover:
			there[e.Addr], own[e.Addr] = forth || e.What == registrar.EventTakeover, false
		case registrar.EventLeft, registrar.EventUnhealthy, registrar.EventExpired, registrar.EventDeregistered:
			there[e.Addr] = !forth
		case registrar.EventDraining:
			own[e.Addr] = forth
		case registrar.EventDrained, registrar.EventMaint:
			word[e.Addr] = forth
		case registrar.EventReady:
			word[e.Addr] = !forth
		}
	}
	count := func(at int64) point {
		p := point{At: at}
		for addr, is := range there {
			switch {
			case is && (word[addr] || own[addr]):
				p.Out++
			case is:
				p.Ready++
			}
		}
		return p
	}
	for _, e := range slices.Backward(events) {
		play(e, false)
	}
	points := []point{count(from)}
	for _, e := range events {
		play(e, true)
		points = append(points, count(e.At))
	}
	return points
}
