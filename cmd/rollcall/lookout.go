package main

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"rollcall/registrar"
)

const (
	// lookEvery is how often this machine's addresses are looked at again: two
	// questions to the kernel, and a socket that sends nothing for each of Redis'
	// addresses.
	lookEvery = 5 * time.Second
	// lookAgain is how long a change has to stand before it counts: an address that
	// comes and goes is not registered each time.
	lookAgain = time.Second
)

// lookout looks whether the address that was chosen is still the one to register.
// With --interface a new one is followed; without, it is only said, since
// another interface's may be of another network.
type lookout struct {
	locator *locator
	log     zerolog.Logger
	move    func(netip.Addr) // has the address registered in the place of at; nil = it is only said
	at      localAddr        // that is registered
	lines   registrar.Sparing
	look    func(context.Context) (v view, ok bool) // see; of tests another
}

// view is what a look comes to.
type view struct {
	present bool       // at is still an address of this machine, or of --interface
	now     netip.Addr // what would be chosen; the zero Addr if nothing
}

// follow looks until ctx ends or stop is called, which waits for its end. move, if
// there is an --interface, is called with each new address; it must not wait.
func (l *located) follow(ctx context.Context, log zerolog.Logger, move func(netip.Addr)) (stop func()) {
	if l.locator == nil {
		return func() {} // the address was given
	}
	w := &lookout{locator: l.locator, log: log.With().Str("component", "address").Logger(), at: l.choice.localAddr}
	if l.locator.name != "" {
		w.move = move
	}
	w.look = w.see
	ctx, cancel := context.WithCancel(ctx)
	var looking sync.WaitGroup
	looking.Go(func() { w.run(ctx) })
	return func() {
		cancel()
		looking.Wait()
	}
}

func (w *lookout) run(ctx context.Context) {
	wait := time.NewTimer(registrar.Shorten(lookEvery))
	defer wait.Stop()
	said := view{true, w.at.ip}
	seen := said
	for {
		select {
		case <-ctx.Done():
			return
		case <-wait.C:
		}
		v, ok := w.look(ctx)
		if ctx.Err() != nil {
			return
		}
		next := lookEvery
		switch {
		case !ok || v == said:
			seen = said
		case v != seen:
			seen, next = v, lookAgain
		default:
			said = w.changed(v)
			seen = said
		}
		wait.Reset(registrar.Shorten(next))
	}
}

// see returns how things are; not ok means that they could not be seen.
func (w *lookout) see(ctx context.Context) (v view, ok bool) {
	c, all, err := w.locator.look(ctx)
	if all == nil && err != nil {
		w.log.Debug().Err(err).Msg("cannot look at this machine's addresses; trying again")
		return view{}, false
	}
	i := slices.IndexFunc(all, func(a localAddr) bool {
		return a.ip == w.at.ip && (w.locator.name == "" || a.name == w.locator.name)
	})
	v.present = i >= 0
	switch {
	case err != nil: // there is none
	case v.present && w.move != nil && (!all[i].spare || c.spare):
		v.now = w.at.ip // another of the interface's comes and goes, as a virtual one does: no reason to move
	default:
		v.now = c.ip
	}
	return v, true
}

// changed does what is to be done about a view that has stood, and returns the
// one that is the rule from now on.
func (w *lookout) changed(v view) view {
	say := w.lines.May()
	log := w.log.With().Stringer("registered", w.at.ip).Str("interface", w.at.name).Logger()
	switch {
	case v.now == w.at.ip:
		if say {
			log.Info().Msg("the address that is registered is the one to register again")
		}
	case !v.now.IsValid() && v.present: // it is the interface's, and not one to choose any more: link-local, say
	case !v.now.IsValid():
		if say {
			log.Warn().Msg("the address that is registered is no longer this machine's, and there is no other; beating on for it")
		}
	case w.move != nil:
		if say {
			log.Info().Stringer("now", v.now).Msg("the interface has another address; registering that first, and then leaving the old one")
		}
		w.at.ip = v.now
		w.move(v.now)
		return view{true, v.now}
	case v.present:
		if say {
			log.Warn().Stringer("now", v.now).Msg("another address would be chosen now; beating on for the old one; name which with --interface or --advertise, or restart")
		}
	default:
		if say {
			log.Warn().Stringer("now", v.now).Msg("the address that is registered is no longer this machine's; beating on for it; restart, or have it followed by --interface")
		}
	}
	return v
}
