package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"rollcall/registrar"
	"rollcall/registrar/idfile"
)

// An address has one listener. A sidecar that was killed together with its app leaves a
// registration behind that looks alive until it has missed its heartbeats; if an app of
// another service listens there before, it gets the requests for the first one. Nobody
// but the kernel knows at once that the first app has ended, so the sidecar that
// registers the address anew asks it.

const (
	// firstLook is the pause after the first look, and lastLook the longest one. A
	// process that was killed takes a moment to end.
	firstLook, lastLook = 50 * time.Millisecond, time.Second
	// lookFor is how long it looks: the default TTL. What was left behind by then has
	// missed its heartbeats.
	lookFor = registrar.DefaultTTL
)

// predecessors takes out of the register what a sidecar that was killed has left there
// at this sidecar's address for another service, if its app has ended too, and warns of
// what it cannot prove that of. What is known of it lies in the directory of this
// sidecar's id file. It never holds up this sidecar's own heartbeats.
type predecessors struct {
	of    idfile.Registration // this sidecar's, but for an address that it has moved to
	dir   string
	store *registrar.Store
	log   zerolog.Logger

	fresh atomic.Bool         // no heartbeat of the present registration was accepted yet
	at    chan netip.AddrPort // of capacity 1: where the first one was accepted

	// Of run's goroutine alone.
	blind   bool                 // that not every file can be seen was said
	told    map[idfile.Kept]bool // of which there is no more to say while nothing else is known
	refused map[idfile.Kept]bool // Redis has refused to take them out
	// lost are registrations that may still be in the register, with why that is not
	// known. Their files are removed, so that nobody else becomes them.
	lost map[idfile.Kept]error
}

// newPredecessors makes those of a sidecar whose id file is in place.
func newPredecessors(of idfile.Registration, place idfile.Place, store *registrar.Store, log zerolog.Logger) *predecessors {
	p := &predecessors{
		of: of, store: store, log: log.With().Str("component", "predecessors").Logger(), at: make(chan netip.AddrPort, 1),
		told: map[idfile.Kept]bool{}, refused: map[idfile.Kept]bool{}, lost: map[idfile.Kept]error{}}
	if place.Path != "" {
		p.dir = filepath.Dir(place.Path)
	}
	return p
}

// start begins to look, and returns what ends that and waits for its end.
func (p *predecessors) start(ctx context.Context) (stop func()) {
	if p.dir == "" {
		return func() {}
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var running sync.WaitGroup
	running.Go(func() { p.run(ctx) })
	return func() {
		cancel()
		running.Wait()
	}
}

// registers says that a new registration begins.
func (p *predecessors) registers() { p.fresh.Store(true) }

// beaten says what became of a heartbeat at addr; nil = accepted.
func (p *predecessors) beaten(addr netip.AddrPort, err error) {
	if err != nil || !p.fresh.Swap(false) {
		return
	}
	select {
	case p.at <- addr:
	default: // the one before has not been looked at; it is of a moment ago
	}
}

// run looks, once a registration has begun, for as long as there is something to find.
func (p *predecessors) run(ctx context.Context) {
	var addr netip.AddrPort
	var begun time.Time
	var pause time.Duration
	next := time.NewTimer(lookFor)
	next.Stop()
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case addr = <-p.at:
			begun, pause = time.Now(), firstLook
		case <-next.C:
		}
		next.Stop()
		again := p.look(ctx, addr, time.Since(begun))
		switch {
		case !again:
		case time.Since(begun) < lookFor:
			next.Reset(pause)
			pause = min(2*pause, lastLook)
		default:
			for k, err := range p.lost {
				p.warn(k, cannot, err)
			}
			clear(p.lost)
		}
	}
}

// look looks once at what sidecars have left at addr; age is how long ago this
// sidecar's first heartbeat was accepted. It tells whether to look again.
func (p *predecessors) look(ctx context.Context, addr netip.AddrPort, age time.Duration) (again bool) {
	again = p.retry(ctx)
	all, err := idfile.Scan(p.dir, p.of.Registry)
	if err != nil {
		if !p.blind {
			p.log.Info().Err(err).Msg("cannot see all files that sidecars of other services may have left at this address")
		}
		p.blind, again = true, true
	}
	p.log.Debug().Int("files", len(all)).Msg("looked for what sidecars of other services have left at this address")
	for _, k := range all {
		if k.Of.Addr == addr && k.Of.Service != p.of.Service {
			again = p.judge(ctx, k, age) || again
		}
	}
	return again
}

// cannot is why a registration stays whose app is known to have ended.
const cannot = "its app has ended too, but it cannot be taken out"

// judge decides about one file, and tells whether to look at it again. It locks that of
// an app that may live only to see whether its sidecar does, and no more once it does not.
func (p *predecessors) judge(ctx context.Context, k idfile.Kept, age time.Duration) (again bool) {
	switch life := k.App.Life(); {
	case life == idfile.Ended:
		return !p.refused[k] && p.takeOut(ctx, k)
	case life == idfile.Running && (age < lastLook || p.told[k]): // it may be about to end
		return true
	case life == idfile.Running:
		p.warnIfLeft(ctx, k, fmt.Sprintf("its app, process group %d, still runs", k.App.Group))
		return true
	}
	return !p.told[k] && p.warnIfLeft(ctx, k, "it is not known whether its app has ended too")
}

// take locks k's file; nil if its sidecar lives, or if the next look will find another.
func (p *predecessors) take(k idfile.Kept) *idfile.File {
	f, err := k.Take()
	if err != nil {
		p.log.Debug().Err(err).Str("other", string(k.Of.Service)).Msg("left alone")
		return nil
	}
	return f
}

// warnIfLeft warns of k if its sidecar does not live and it is registered, and tells
// whether to look at it again.
func (p *predecessors) warnIfLeft(ctx context.Context, k idfile.Kept, why string) (again bool) {
	f := p.take(k)
	if f == nil {
		return true
	}
	f.Close()
	switch there, err := p.registered(ctx, k); {
	case registrar.Forbidden(err):
		p.warn(k, why, err)
	case err != nil:
		return true
	case there:
		p.warn(k, why, nil)
	}
	p.told[k] = true
	return false
}

// warn says once that requests may come to the wrong service, and what ends that.
func (p *predecessors) warn(k idfile.Kept, why string, err error) {
	if p.told[k] {
		return
	}
	p.told[k] = true
	p.log.Warn().Err(err).Str("other", string(k.Of.Service)).Stringer("addr", k.Of.Addr).Str("why", why).
		Str("fix", fmt.Sprintf("rollcall deregister --service %s --addr %s --force", k.Of.Service, k.Of.Addr)).
		Msg("the sidecar of another service at this address was killed: requests for that service may come here until its registration ends, a TTL at most")
}

// registered tells whether the register has the registration of k.
func (p *predecessors) registered(ctx context.Context, k idfile.Kept) (bool, error) {
	tctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	e, err := p.store.Entry(tctx, k.Of.Service, k.Of.Addr)
	if err != nil {
		p.log.Debug().Err(err).Msg("cannot see what is registered there")
	}
	return e.Present && e.Instance.Meta.ID == k.Token, err
}

// takeOut takes out a registration whose app has ended, if its sidecar has too, and
// tells whether to look at it again. The file is locked meanwhile, and removed if it may
// be out: a sidecar that is started for it makes a new registration, so none that lives
// is taken out, however late Redis does what it was told.
func (p *predecessors) takeOut(ctx context.Context, k idfile.Kept) (again bool) {
	there, err := p.registered(ctx, k)
	if registrar.Forbidden(err) {
		p.refused[k] = true
		p.warn(k, cannot, err)
		return false
	}
	if err != nil {
		return true
	}
	f := p.take(k)
	if f == nil {
		return true
	}
	defer f.Close()
	if there {
		err = p.leave(ctx, k)
	}
	if registrar.Forbidden(err) {
		p.refused[k] = true
		p.warn(k, cannot, err)
		return false
	}
	if err != nil {
		p.lost[k] = err
	}
	f.Keep("", time.Time{})
	return err != nil
}

// leave has the registration of k leave. Another one that has its address by now is
// left alone.
func (p *predecessors) leave(ctx context.Context, k idfile.Kept) error {
	tctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	version, err := p.store.Leave(tctx, k.Of.Service, k.Of.Addr, k.Token, registrar.Left)
	switch {
	case err == nil:
		p.log.Info().Str("other", string(k.Of.Service)).Stringer("addr", k.Of.Addr).Int64("version", version).Msg("took out another service's registration at this address: its sidecar was killed and its app has ended")
	case errors.Is(err, registrar.ErrNotOwner):
		return nil
	}
	return err
}

// retry tries the leaves again of which it is not known whether they were done, and
// tells whether some are left.
func (p *predecessors) retry(ctx context.Context) (again bool) {
	for k := range p.lost {
		err := p.leave(ctx, k)
		if registrar.Forbidden(err) {
			p.warn(k, cannot, err)
			err = nil
		}
		if p.lost[k] = err; err == nil {
			delete(p.lost, k)
		}
	}
	return len(p.lost) > 0
}
