package docker

import (
	"context"
	"net/netip"
)

// Advertise has ports that are published on every address of the host registered
// at another address of it: of each port the new one first, and when the register
// has accepted that, the old one drains and leaves. It may be called of any
// goroutine, and does not wait.
func (a *Agent) Advertise(to netip.Addr) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.place.advertise == to {
		return
	}
	a.place.advertise = to
	for _, w := range a.workers {
		a.remind(w)
	}
}

// where returns where containers are reached now.
func (a *Agent) where() place {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.place
}

// remind has w look whether its registrations are those that they are to be. The
// Engine is not asked: nothing of the container has changed. The caller holds mu.
func (a *Agent) remind(w *worker) {
	w.notes = append(w.notes, note{what: moved})
	hint(w.wake)
}

// moves sees to the host's other address, of a container that is registered. One
// that is not is registered there when it serves.
func (w *worker) moves(ctx context.Context) {
	if len(w.regs) == 0 || w.facts.started.Equal(w.over) || w.facts.state != serving && w.facts.state != waiting {
		return
	}
	wants, remarks := w.agent.where().plan(w.facts)
	w.agent.mu.Lock()
	w.plans(wants)
	w.agent.mu.Unlock()
	w.register(ctx, wants, remarks)
}

// awaited tells whether the registration r of k, which is not wanted any more, stays
// until the one that is wanted in its place has been accepted: of the same port,
// at the host's other address.
func (w *worker) awaited(k key, r *registration, wants []want, host netip.Addr) bool {
	if Standing(r.standing.Load()) == Absent {
		return false // it is not healthy: there is nothing to keep
	}
	next, ok := successor(k, wants, host)
	if !ok {
		return false
	}
	s := w.regs[next]
	return s == nil || Standing(s.standing.Load()) != Registered
}

// succeeded tells whether one of wants is in the place of k.
func succeeded(k key, wants []want, host netip.Addr) bool {
	_, ok := successor(k, wants, host)
	return ok
}

// successor returns that of wants which is the same port at the host's other address.
func successor(k key, wants []want, host netip.Addr) (key, bool) {
	for _, want := range wants {
		if want.service == k.service && want.addr.Port() == k.addr.Port() && want.addr.Addr() == host {
			return want.key(), true
		}
	}
	return key{}, false
}

// accepted has the worker remove what a registration that was just accepted
// replaces. It returns what is to hear of its heartbeats.
func (w *worker) accepted(r *registration, beaten func(error)) func(error) {
	return func(err error) {
		before := Standing(r.standing.Load())
		beaten(err)
		if err != nil || before == Registered {
			return
		}
		w.agent.mu.Lock()
		defer w.agent.mu.Unlock()
		if len(w.regs) > 1 {
			w.agent.remind(w)
		}
	}
}
