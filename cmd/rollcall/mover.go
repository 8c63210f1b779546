package main

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/rs/zerolog"

	"rollcall/registrar"
)

// mover beats for one instance whose address may change while it does: the new
// address is registered first, and then the old one drains and leaves as at a
// SIGTERM. Until the register has accepted the new one the old one stays. It is
// for one Run at a time.
type mover struct {
	cfg   registrar.BeaterConfig // of the address at the start
	store *registrar.Store
	log   zerolog.Logger
	hint  chan struct{} // has room for one: there is another target

	mu     sync.Mutex
	target netip.AddrPort // guarded by mu
	at     netip.AddrPort // what counts as registered; guarded by mu

	cur *stint // of Run's goroutine
}

// stint is one address's time.
type stint struct {
	addr     netip.AddrPort
	beater   *registrar.Beater
	role     atomic.Int32  // one of coming, current, going
	accepted chan struct{} // closed when it becomes current
	cancel   context.CancelCauseFunc
	done     chan error // the end of its Run
}

// The roles of a stint, in order.
const (
	coming  = iota // not accepted by the register yet
	current        // speaks for the instance
	going          // drains or leaves
)

// newMover checks cfg, as registrar.NewBeater does.
func newMover(cfg registrar.BeaterConfig, store *registrar.Store, log zerolog.Logger) (*mover, error) {
	m := &mover{cfg: cfg, store: store, log: log, hint: make(chan struct{}, 1), target: cfg.Addr, at: cfg.Addr}
	var err error
	if m.cur, err = m.stint(cfg); err != nil {
		return nil, err
	}
	m.cur.role.Store(current)
	return m, nil
}

// move has the address in the place of the present one. It may be called at any
// time, of any goroutine.
func (m *mover) move(to netip.Addr) {
	m.mu.Lock()
	m.target = netip.AddrPortFrom(to, m.cfg.Addr.Port())
	m.mu.Unlock()
	select {
	case m.hint <- struct{}{}:
	default:
	}
}

// addr returns the address that speaks for the instance.
func (m *mover) addr() netip.AddrPort {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.at
}

func (m *mover) wanted() netip.AddrPort {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.target
}

// stint makes one, which has the role coming. Only what the current one says is
// passed on.
func (m *mover) stint(cfg registrar.BeaterConfig) (*stint, error) {
	s := &stint{addr: cfg.Addr, accepted: make(chan struct{})}
	beaten, tell := cfg.Beaten, cfg.Tell
	cfg.Beaten = func(err error) {
		if err == nil && s.role.CompareAndSwap(coming, current) {
			close(s.accepted)
		}
		if beaten != nil && s.role.Load() == current {
			beaten(err)
		}
	}
	if tell != nil {
		cfg.Tell = func(status string) {
			switch s.role.Load() {
			case coming:
				tell("moving to " + s.addr.String() + ", which is " + status)
			case current:
				tell(status)
			}
		}
	}
	var err error
	s.beater, err = registrar.NewBeater(cfg, m.store, m.log)
	return s, err
}

// next makes the stint of the target, if that is another address; nil if not.
func (m *mover) next(than netip.AddrPort) *stint {
	cfg := m.cfg
	if cfg.Addr = m.wanted(); cfg.Addr == than {
		return nil
	}
	// A token that has left one address must not be the other's, and the file that
	// keeps it is that of the address at the start.
	cfg.Token, cfg.Keep = "", nil
	s, err := m.stint(cfg)
	if err != nil {
		m.log.Error().Err(err).Stringer("addr", cfg.Addr).Msg("the new address cannot be registered; staying with the old one")
		return nil
	}
	return s
}

// become makes s the current stint.
func (m *mover) become(s *stint) {
	m.cur = s
	s.role.Store(current)
	m.mu.Lock()
	m.at = s.addr
	m.mu.Unlock()
}

// Run is registrar.Beater.Run, of one address after another. When ctx ends
// every address that is under way leaves.
func (m *mover) Run(ctx context.Context) error {
	var running sync.WaitGroup
	defer running.Wait()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil) // also if one ends by itself
	start := func(s *stint) {
		var sctx context.Context
		sctx, s.cancel = context.WithCancelCause(ctx)
		s.done = make(chan error, 1)
		running.Go(func() { s.done <- s.beater.Run(sctx) })
	}
	if s := m.next(m.cur.addr); s != nil { // it has changed while nothing was registered
		m.become(s)
	}
	start(m.cur)
	var next *stint
	for {
		var accepted <-chan struct{}
		var nextDone <-chan error
		if next != nil {
			accepted, nextDone = next.accepted, next.done
		}
		select {
		case <-ctx.Done():
			err := <-m.cur.done
			if next != nil {
				err = errors.Join(err, <-next.done)
				m.become(next)
			}
			return err
		case err := <-m.cur.done: // the register does not want it
			return err
		case err := <-nextDone:
			if errors.Is(err, registrar.ErrInterval) && m.cfg.Interval != 0 {
				// The registry's TTL has become shorter, as the current one has found out.
				m.cfg.Interval = 0
				next = m.next(m.cur.addr)
				if next != nil {
					start(next)
				}
				break
			}
			return err
		case <-accepted:
			m.cur.role.Store(going)
			m.cur.cancel(nil) // drains and leaves, while the next one serves
			m.become(next)
			next = nil
		case <-m.hint:
			if next != nil && next.addr == m.wanted() {
				break
			}
			if next != nil {
				next.role.Store(going)
				next.cancel(registrar.ErrEnded)
			}
			if next = m.next(m.cur.addr); next != nil {
				start(next)
			}
		}
	}
}
