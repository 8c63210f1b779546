package registrar

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	// learnTimeout bounds one round of asking Sentinels for the others.
	learnTimeout = 3 * time.Second
	// avoidFor is how long a Sentinel that could not be dialled comes after others, and
	// forgotFor one that watches the primary no more.
	avoidFor  = time.Minute
	forgotFor = time.Hour
	// learnEvery is the least time between two rounds of asking.
	learnEvery = 300 * time.Millisecond
	// switchFor is how long the Sentinels have to agree on a new primary: one that is asked
	// for it may still name the one before.
	switchFor = 5 * time.Second
	// switchEnds is when the connections to the former primary are closed. What it accepts
	// now is lost.
	switchEnds = 100 * time.Millisecond
)

// sentinels are those that watch one primary: the ones that the URL names, and those
// that they name. go-redis learns of others only when it connects to another one than
// before. Where each was replaced in the meantime it knows none that lives, and finds
// no primary ever after. So they are asked for the others while connections are in
// use, and one that was learnt stands in for one that cannot be dialled, or that watches
// the primary no more.
//
// A fail-over by command has two primaries for a second or more: Sentinels name the new
// one, and the one before accepts writes until it is told. go-redis hears of it from one
// Sentinel, and the one that leads the fail-over says so last. So that all processes move
// at the same time, the primary's address is asked for too: all Sentinels answer that
// alike.
type sentinels struct {
	primary string
	seeds   []string // of the URL; names are resolved at each dial
	connect dialer
	greet   dialer // the same, logged in

	asked *redis.SentinelClient // for learn alone; nil = none
	at    string                // its address

	mu    sync.Mutex
	known []string             // that live, as the one asked last said; it is the first
	all   map[string]bool      // that ever were known
	avoid map[string]time.Time // that were of no use, until then
	data  map[*followed]string // open connections to data nodes, by the address that was dialled
	epoch int64                // of the configuration that named the primary
	named string               // the primary's address, of that epoch
	until time.Time            // connections elsewhere are given up until then
}

// watched returns the Sentinels of a primary, one set for each in a process.
func (f *Follower) watched(primary string, seeds []string, connect, greet dialer) *sentinels {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.sets {
		if s.primary == primary && slices.Equal(s.seeds, seeds) {
			return s
		}
	}
	s := &sentinels{primary: primary, seeds: slices.Clone(seeds), connect: connect, greet: greet, all: map[string]bool{}, avoid: map[string]time.Time{}, data: map[*followed]string{}}
	for _, addr := range seeds {
		s.all[addr] = true
	}
	f.sets = append(f.sets, s)
	f.active.Store(true)
	return s
}

// learn asks each set's Sentinels for the others.
func (f *Follower) learn(ctx context.Context) {
	f.mu.Lock()
	sets := slices.Clone(f.sets)
	f.mu.Unlock()
	for _, s := range sets {
		if err := s.learn(ctx); err != nil && ctx.Err() == nil {
			f.log.Debug().Err(err).Str("primary", s.primary).Msg("no Sentinel says which others there are")
		}
		f.leave(s.elsewhere())
	}
}

// leave gives up connections to a former primary.
func (f *Follower) leave(conns []*followed) {
	if len(conns) == 0 {
		return
	}
	for _, c := range conns {
		c.former.Store(true)
	}
	f.mu.Lock()
	f.former = append(f.former, conns...)
	f.closeAt = time.Now().Add(switchEnds)
	f.mu.Unlock()
	f.signal()
}

// elsewhere returns the open connections to data nodes that are not the primary, after
// another one was named.
func (s *sentinels) elsewhere() (conns []*followed) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Now().After(s.until) {
		return nil
	}
	for c, addr := range s.data {
		if addr != s.named && !c.former.Load() {
			conns = append(conns, c)
		}
	}
	return conns
}

// track notes a new connection to a data node.
func (s *sentinels) track(conn net.Conn, addr string) {
	var c *followed
	switch conn := conn.(type) {
	case *followed:
		c = conn
	case secured:
		c = conn.raw
	default:
		return
	}
	c.set = s
	s.mu.Lock()
	defer s.mu.Unlock()
	s.data[c] = addr
}

// closed forgets a connection.
func (s *sentinels) closed(c *followed) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.data, c)
}

// learn asks the Sentinel that it asked last, or another one if that does not answer.
func (s *sentinels) learn(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, learnTimeout)
	defer cancel()
	var errs []error
	if s.asked != nil {
		err := s.ask(ctx)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
		s.close()
	}
	for _, addr := range s.candidates("") {
		if ctx.Err() != nil {
			break
		}
		s.at = addr
		s.asked = redis.NewSentinelClient(&redis.Options{
			Addr: addr, Dialer: s.greet, DialTimeout: DialTimeout, DialerRetries: 1, ReadTimeout: Timeout, WriteTimeout: Timeout,
			PoolTimeout: Timeout, ContextTimeoutEnabled: true, MaxRetries: -1, PoolSize: 1, DisableIdentity: true,
			ReadBufferSize: bufferSize(1), WriteBufferSize: bufferSize(1),
		})
		err := s.ask(ctx)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
		s.close()
	}
	return errors.Join(errs...)
}

func (s *sentinels) close() {
	if s.asked != nil {
		_ = s.asked.Close() // it has been used for the last time
		s.asked = nil
	}
}

func (s *sentinels) ask(ctx context.Context) error {
	ctx, cancel := WithTimeout(ctx)
	defer cancel()
	others, err := s.asked.Sentinels(ctx, s.primary).Result()
	var refused redis.Error
	if errors.As(err, &refused) { // it may live on, and watch others
		s.mu.Lock()
		s.avoid[s.at] = time.Now().Add(forgotFor)
		s.mu.Unlock()
	}
	if err != nil {
		return fmt.Errorf("ask the Sentinel %s for the others: %w", s.at, err)
	}
	master, err := s.asked.Master(ctx, s.primary).Result()
	if err != nil && !errors.As(err, &refused) { // a user may have no right to that; then go-redis tells
		return fmt.Errorf("ask the Sentinel %s for the primary: %w", s.at, err)
	}
	// In a fail-over the one that leads it has the new address here only.
	now, err := s.asked.GetMasterAddrByName(ctx, s.primary).Result()
	if err != nil {
		return fmt.Errorf("ask the Sentinel %s for the primary's address: %w", s.at, err)
	}
	known := []string{s.at}
	for _, o := range others {
		if o["ip"] != "" && o["port"] != "" && !strings.Contains(o["flags"], "_down") {
			known = append(known, net.JoinHostPort(o["ip"], o["port"]))
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known = known
	for _, addr := range known {
		s.all[addr] = true
	}
	// A Sentinel that is cut off may name an old primary, of an older epoch.
	epoch, err := strconv.ParseInt(master["config-epoch"], 10, 64)
	if err == nil && len(now) == 2 && (epoch > s.epoch || s.named == "") {
		if s.named != "" {
			s.until = time.Now().Add(switchFor)
		}
		s.epoch, s.named = epoch, net.JoinHostPort(now[0], now[1])
	}
	return nil
}

// candidates are all but one in the order in which to try them: those that are known
// to live, then those of the URL, and last those that were of no use.
func (s *sentinels) candidates(but string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	of := slices.Clone(s.known)
	rand.Shuffle(len(of), func(i, j int) { of[i], of[j] = of[j], of[i] })
	for _, addr := range s.seeds {
		if !slices.Contains(of, addr) {
			of = append(of, addr)
		}
	}
	of = slices.DeleteFunc(of, func(addr string) bool { return addr == but })
	slices.SortStableFunc(of, func(a, b string) int { return s.avoid[a].Compare(s.avoid[b]) })
	return of
}

// dial connects to a node, or to a Sentinel: to another one, if that cannot be dialled.
func (s *sentinels) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	s.mu.Lock()
	sentinel, avoided := s.all[addr], time.Now().Before(s.avoid[addr])
	s.mu.Unlock()
	if !sentinel {
		conn, err := s.connect(ctx, network, addr)
		if err == nil {
			s.track(conn, addr)
		}
		return conn, err
	}
	var first error
	of := append([]string{addr}, s.candidates(addr)...)
	if avoided && len(of) > 1 { // it would take the time that the others need
		of = append(of[1:], addr)
	}
	for _, a := range of {
		conn, err := s.connect(ctx, network, a)
		s.mu.Lock()
		if err != nil && !time.Now().Before(s.avoid[a]) {
			s.avoid[a] = time.Now().Add(avoidFor)
		}
		s.mu.Unlock()
		if err == nil {
			return conn, nil
		}
		if first == nil {
			first = err
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, first
}
