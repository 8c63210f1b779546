package registrar

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rs/zerolog"
)

const (
	// lookEvery is the least time between two looks for the names in use. A look follows
	// a use of a connection, so a sidecar looks once a heartbeat: it has moved by its
	// second one after its resolver's answer changed, which is well within a TTL.
	lookEvery = time.Second
	// lookTimeout bounds the look-up of one name. A resolver's own retries take longer.
	lookTimeout = 3 * time.Second
	// lookLimit is the longest pause after look-ups that failed.
	lookLimit = 5 * time.Second
	// FollowFor is how long everybody has to follow a name that names another server:
	// who looked it up just before waits for as long as its resolver keeps the answer.
	// Until then silence at that server says nothing.
	FollowFor = time.Minute
	// closeAfter is when the connections to a former server are closed: what was under
	// way on them has ended, since every exchange ends within Timeout.
	closeAfter = Timeout + Timeout/2
)

// Follower keeps the connections of one process where the registry is. A host name
// that is pointed at another server moves nobody by itself: connections to the old
// server last as long as that lives. So a Follower looks the names up again while
// connections are in use. When a name no longer has the address of the server that
// they go to, nothing more is begun on them, what is under way ends, and what comes
// next goes to the server that the name has now.
//
// While it can be, all connections by one name go to one address, also where the name
// has several. A look-up that fails changes nothing.
//
// It also learns which Sentinels there are, so that a primary is found after those
// that the URL names were replaced.
type Follower struct {
	log      zerolog.Logger
	resolver *net.Resolver
	lines    Sparing
	began    time.Time // the zero of next

	looking chan struct{} // of capacity 1: a look is under way
	wake    chan struct{} // of capacity 1: a connection was used, or some are to be closed
	active  atomic.Bool   // there is something to look for
	next    atomic.Int64  // the next look, not before; since began
	// attentive says that the Sentinels are asked also while nothing is in use.
	attentive atomic.Bool

	mu       sync.Mutex
	names    map[string]*destination
	sets     []*sentinels
	moves    int64
	former   []*followed // connections to former servers, to be closed
	closeAt  time.Time
	failures int   // looks in a row that failed
	failed   error // why the last one did
}

// destination is where connections by one host name go.
type destination struct {
	at    netip.Addr             // zero = wherever the name leads
	last  netip.Addr             // the last one that was not zero
	conns map[*followed]struct{} // to at, that are open
}

// NewFollower returns a Follower that looks names up by resolver; nil = Go's own. It
// does no I/O.
func NewFollower(resolver *net.Resolver, log zerolog.Logger) *Follower {
	return &Follower{
		log: log.With().Str("component", "follower").Logger(), resolver: cmp.Or(resolver, net.DefaultResolver), began: time.Now(),
		looking: make(chan struct{}, 1), wake: make(chan struct{}, 1), names: map[string]*destination{},
	}
}

// Run looks, while connections are in use, until ctx ends.
func (f *Follower) Run(ctx context.Context) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	defer f.end()
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.wake:
		case <-timer.C:
		}
		f.closeFormer()
		if f.due() {
			_, _ = f.look(ctx, false) // it is said to who asks
			f.learn(ctx)
		} else if f.attentive.Load() {
			f.learn(ctx)
		}
		wait := time.Hour
		f.mu.Lock()
		if f.attentive.Load() && len(f.sets) > 0 {
			wait = Shorten(learnEvery)
		}
		if len(f.former) > 0 {
			wait = min(wait, max(time.Until(f.closeAt), time.Millisecond))
		}
		f.mu.Unlock()
		timer.Reset(wait)
	}
}

// Attend has the Sentinels asked for the primary all the time, three times a second, and
// not only while connections are in use: for the few processes that others wait for. It
// may be called at any time.
func (f *Follower) Attend() {
	f.attentive.Store(true)
	f.signal()
}

// end closes what Run has opened.
func (f *Follower) end() {
	f.mu.Lock()
	sets := f.sets
	f.mu.Unlock()
	for _, s := range sets {
		s.close()
	}
}

// due tells whether the next look may begin.
func (f *Follower) due() bool {
	return f.active.Load() && time.Since(f.began) >= time.Duration(f.next.Load())
}

// used is called with each use of a connection.
func (f *Follower) used() {
	if f.due() {
		f.signal()
	}
}

func (f *Follower) signal() {
	select {
	case f.wake <- struct{}{}:
	default: // it has been told, and has not looked since
	}
}

// Moves counts how often a name was found to name another server. Any goroutine may
// call it.
func (f *Follower) Moves() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.moves
}

// Look looks all names up now and returns Moves. After it, nothing is begun on a
// connection to a server that its name no longer has. An error says that a name could
// not be looked up, so that nothing is known of it.
func (f *Follower) Look(ctx context.Context) (moves int64, err error) { return f.look(ctx, true) }

// look is Look, and waits for one that is under way only if it must.
func (f *Follower) look(ctx context.Context, must bool) (int64, error) {
	if must {
		select {
		case f.looking <- struct{}{}:
		case <-ctx.Done():
			return 0, fmt.Errorf("look up the registry's name: %w", ctx.Err())
		}
	} else {
		select {
		case f.looking <- struct{}{}:
		default:
			return 0, nil
		}
	}
	defer func() { <-f.looking }()
	f.mu.Lock()
	hosts := make([]string, 0, len(f.names))
	for host := range f.names {
		hosts = append(hosts, host)
	}
	if f.failed != nil && time.Since(f.began) < time.Duration(f.next.Load()) {
		defer f.mu.Unlock()
		return f.moves, f.failed // asked again so soon, a resolver that hangs would hold up everything
	}
	f.mu.Unlock()
	var errs []error
	for _, host := range hosts {
		addrs, err := f.lookUp(ctx, host)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		f.named(host, addrs)
	}
	err := errors.Join(errs...)
	f.mu.Lock()
	defer f.mu.Unlock()
	pause := Shorten(lookEvery)
	if len(f.sets) > 0 {
		pause = Shorten(learnEvery)
	}
	if f.failures++; err == nil {
		f.failures = 0
	} else {
		pause = max(pause, Backoff(f.failures, lookLimit))
	}
	f.failed = err
	f.next.Store(int64(time.Since(f.began) + pause))
	return f.moves, err
}

func (f *Follower) lookUp(ctx context.Context, host string) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	addrs, err := f.resolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, fmt.Errorf("look up the registry's name: %w", err)
	}
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	return addrs, nil
}

// named takes in that host has these addresses.
func (f *Follower) named(host string, addrs []netip.Addr) {
	f.mu.Lock()
	p := f.names[host]
	was := p.at
	moved := was.IsValid() && len(addrs) > 0 && !slices.Contains(addrs, was)
	if moved {
		f.move(p, netip.Addr{})
	}
	f.mu.Unlock()
	if moved && f.lines.May() {
		f.log.Warn().Str("host", host).Stringer("was", was).Stringers("now", stringers(addrs)).
			Msg("the registry's name names another server now; nothing more is asked of the one before")
	}
}

func stringers(addrs []netip.Addr) []fmt.Stringer {
	out := make([]fmt.Stringer, len(addrs))
	for i, a := range addrs {
		out[i] = a
	}
	return out
}

// move gives up the connections that go elsewhere than to addr. The caller has mu.
func (f *Follower) move(p *destination, addr netip.Addr) {
	f.moves++
	p.at = addr
	for c := range p.conns {
		if c.at != addr {
			c.former.Store(true)
			f.former = append(f.former, c)
			delete(p.conns, c)
		}
	}
	f.closeAt = time.Now().Add(closeAfter)
	f.signal()
}

// closeFormer closes the connections to former servers when their time has come.
func (f *Follower) closeFormer() {
	f.mu.Lock()
	var old []*followed
	if !time.Now().Before(f.closeAt) {
		old, f.former = f.former, nil
	}
	f.mu.Unlock()
	for _, c := range old {
		_ = c.Conn.Close() // whoever waits on it, a subscription, connects again
	}
}

// dial connects to addr: by name, to where the other connections by that name go.
func (f *Follower) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	d := net.Dialer{Timeout: DialTimeout, KeepAlive: keepAlive, Resolver: f.resolver}
	host, port, err := net.SplitHostPort(addr)
	if _, perr := netip.ParseAddr(host); err != nil || perr == nil { // a path, or an address
		conn, err := d.DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return &followed{Conn: conn, of: f}, nil
	}
	f.mu.Lock()
	p := f.names[host]
	if p == nil {
		p = &destination{conns: map[*followed]struct{}{}}
		f.names[host] = p
		f.active.Store(true)
	}
	at := p.at
	f.mu.Unlock()
	if at.IsValid() {
		addrs, err := f.lookUp(ctx, host)
		if err != nil {
			return nil, err
		}
		f.named(host, addrs)
		if slices.Contains(addrs, at) {
			conn, err := d.DialContext(ctx, network, net.JoinHostPort(at.String(), port))
			if err == nil {
				return f.join(p, conn), nil
			}
		}
	}
	conn, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return f.join(p, conn), nil
}

// join takes in a new connection by a name. Where it goes, all of them go.
func (f *Follower) join(p *destination, conn net.Conn) net.Conn {
	c := &followed{Conn: conn, of: f, place: p}
	if tcp, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
		c.at = tcp.AddrPort().Addr().Unmap()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if p.at != c.at {
		if p.last.IsValid() && p.last != c.at {
			f.move(p, c.at)
		}
		p.at, p.last = c.at, c.at
	}
	p.conns[c] = struct{}{}
	return c
}

// late has dial's failures come with the first use of the connection. go-redis' pool
// says for a second after a dial that failed that it failed, and dials no more: whoever
// waits for a primary would be that late.
func (a Access) late(dial dialer) dialer {
	if a.Follow == nil || dial == nil {
		return dial
	}
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if err != nil {
			conn, _ = net.Pipe() // for all that it is asked besides
			return undialled{conn, dialError{err}}, nil
		}
		return conn, nil
	}
}

// dialError is one that go-redis passes on whole, with what was dialled: it unwraps errors
// of connections once.
type dialError struct{ err error }

func (e dialError) Error() string        { return e.err.Error() }
func (e dialError) Is(target error) bool { return errors.Is(e.err, target) }
func (e dialError) As(target any) bool   { return errors.As(e.err, target) }

// undialled is a connection that there is not.
type undialled struct {
	net.Conn
	err error
}

func (c undialled) Read([]byte) (int, error)              { return 0, c.err }
func (c undialled) Write([]byte) (int, error)             { return 0, c.err }
func (c undialled) SyscallConn() (syscall.RawConn, error) { return nil, c.err }

// followed is a connection that can become one to a former server.
type followed struct {
	net.Conn
	of     *Follower
	place  *destination // nil: by no name
	set    *sentinels   // nil: it goes to no data node that Sentinels named
	at     netip.Addr
	former atomic.Bool
}

var errFormer = errors.New("the registry's name names another server now")

// Write implements net.Conn. Every exchange begins with one.
func (c *followed) Write(b []byte) (int, error) {
	c.of.used()
	return c.Conn.Write(b)
}

// Close implements net.Conn.
func (c *followed) Close() error {
	if c.set != nil {
		c.set.closed(c)
	}
	if c.place != nil || c.former.Load() {
		c.of.mu.Lock()
		if c.place != nil {
			delete(c.place.conns, c)
		}
		c.of.former = slices.DeleteFunc(c.of.former, func(o *followed) bool { return o == c })
		c.of.mu.Unlock()
	}
	return c.Conn.Close()
}

// SyscallConn implements syscall.Conn. go-redis' pool looks by it whether a connection
// is still good, before each exchange, and makes a new one if not.
func (c *followed) SyscallConn() (syscall.RawConn, error) {
	if c.former.Load() {
		return nil, errFormer
	}
	s, ok := c.Conn.(syscall.Conn)
	if !ok {
		return unseen{}, nil
	}
	return s.SyscallConn()
}

// secured is TLS on a followed connection.
type secured struct {
	*tls.Conn
	raw *followed
}

// SyscallConn implements syscall.Conn as followed's, but shows no bytes: there may be
// records that are no answers.
func (c secured) SyscallConn() (syscall.RawConn, error) {
	if c.raw.former.Load() {
		return nil, errFormer
	}
	return unseen{}, nil
}

// unseen is a connection that the pool does not look into.
type unseen struct{}

func (unseen) Control(func(uintptr)) error              { return nil }
func (unseen) Read(func(fd uintptr) bool) error         { return nil }
func (unseen) Write(func(fd uintptr) (done bool)) error { return nil }
