// Package haproxy speaks to one HAProxy through its stats socket: it is the
// real lbsync.Balancer.
//
// It owns the text that goes over the socket, both ways. It promises that no
// byte it was not asked to send reaches HAProxy, that an answer is either
// complete or an error, and that HAProxy's wording ends here. It decides
// nothing: which server to change, and when, is lbsync's.
//
// Every exchange is one line, "COMMANDS;show info". The report ends the answer: if
// it is not there, whole, the answer was cut; and it names the process, and whether
// that is stopping. Which fields a whole report has, is known from the exchanges
// before; the first, and one after an answer that was cut, begins with a report too.
// A line runs in one process from its beginning to its end: that which accepted
// the connection. The commands go through client-native's ExecuteRaw, which dials once per
// line, returns what it has read when reading fails, and gives up only after
// 30 seconds. The report makes up for the second and call.go for the third.
//
// After a line that got no whole answer in time, which HAProxy may still run, the next
// one is a report alone, until that is answered, and nothing else is sent to the same
// process before it has ended the earlier line. So a HAProxy that hangs finds one line
// with commands when it wakes, not hundreds, and runs it before what comes later.
package haproxy

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/haproxytech/client-native/v5/runtime"
	"github.com/haproxytech/client-native/v5/runtime/options"
	"github.com/rs/zerolog"

	"rollcall/lbsync"
)

// DefaultTimeout bounds one exchange. A reading of 10,000 servers takes 10 ms.
const DefaultTimeout = time.Second

const (
	// maxLine keeps a line under the least tune.bufsize in use, as HAProxy 3.2
	// runs nothing of a longer line.
	maxLine = 8000
	// maxCommands bounds how long HAProxy works on one line, whatever it is of.
	maxCommands = 50
	// A line is run in one go, and HAProxy's own traffic waits for it. A batch of up to
	// manyOps goes in shortLines lines or so, each with room for shortLine commands,
	// which is what one server takes and the look at it.
	shortLine  = 8
	shortLines = 8
	// maxPeek is the number of servers up to which they are read back one by
	// one. One costs 2.5 kB in any backend, the whole 130 bytes a server.
	maxPeek = 16
	// fewCommands is the least that a line takes of a batch of more than manyOps. Among
	// 10,000 servers of 2.6 a command takes 70 µs. Of 25 a line the p99 beside the load
	// was 6 times idle, with pauses of 1 ms between them up to 4 times and the load half
	// as long again; of 10 without pauses it is 1.5 to 3 times, and the load takes no
	// longer (scripts/soak ManyServers). Among 1,000 a command takes a tenth of that, and
	// most of the time of so short a line is the connection's: as many more go into a
	// line as lineTime, which those 10 take, has room for.
	manyOps     = 200
	fewCommands = 10
	lineTime    = 800 * time.Microsecond
	// settleFirst and settleLast are the pauses between the looks for an
	// address that comes late: in all 31 ms.
	settleFirst = time.Millisecond
	settleLast  = 16 * time.Millisecond

	maxOptionWords = 40   // with ours below the 64 words HAProxy reads of a command
	maxOptionBytes = 2000 // one `add server` must leave room for the frame
)

// Config says which HAProxy to speak to.
type Config struct {
	// Socket is the path of a stats socket of level admin. Required.
	Socket string
	// Timeout bounds one exchange: an Apply of many ops is several. It must
	// not be negative; 0 means DefaultTimeout.
	Timeout time.Duration
	// ServerOptions are keywords for every `add server`, as "check inter 2s".
	// At most 40 words, none of them enabled, disabled, id, weight, backup or
	// agent-check.
	ServerOptions string
}

// staticAlgorithm begins HAProxy's refusal of any weight but 0% and 100% for
// static-rr, and for source, uri and the like without consistent hashing.
const staticAlgorithm = "Backend is using a static LB algorithm"

var optionWord = regexp.MustCompile(`^[A-Za-z0-9_.,:/@=+()-]+$`)

// validate checks c and returns the words of ServerOptions.
func (c Config) validate() ([]string, error) {
	if c.Socket == "" {
		return nil, errors.New("no stats socket given")
	}
	if c.Timeout < 0 {
		return nil, fmt.Errorf("timeout %s is negative", c.Timeout)
	}
	if len(c.ServerOptions) > maxOptionBytes {
		return nil, fmt.Errorf("server options have %d bytes, more than %d", len(c.ServerOptions), maxOptionBytes)
	}
	words := strings.Fields(c.ServerOptions)
	if len(words) > maxOptionWords {
		return nil, fmt.Errorf("server options have %d words, more than %d", len(words), maxOptionWords)
	}
	for _, w := range words {
		if !optionWord.MatchString(w) {
			return nil, fmt.Errorf("server option %q has a character other than A-Za-z0-9_.,:/@=+()-", w)
		}
		switch w {
		case "enabled", "disabled", "id", "weight":
			return nil, fmt.Errorf("server option %q is not the operator's to give", w)
		case "backup", "agent-check":
			return nil, fmt.Errorf("server option %q is not for added servers: a backup serves nobody while others do, and an agent's shares are of a weight that they lack; declare a server-template with slots", w)
		}
	}
	return words, nil
}

// Client is one HAProxy. It implements lbsync.Balancer. Make it with New.
type Client struct {
	cfg     Config
	options string
	checks  bool
	log     zerolog.Logger

	turn  chan struct{}  // holds one token; exchange takes it itself
	calls caller         // guarded by turn
	last  lbsync.Process // that answered; guarded by turn
	hung  lbsync.Process // that had answered last before the silence; guarded by turn
	form  *form          // of its reports, nil if it is to be learned; guarded by turn

	mu        sync.Mutex
	inspected map[string]inspection // by backend; guarded by mu
}

var _ lbsync.Balancer = (*Client)(nil)

// New returns a Client for cfg. It does no I/O.
func New(cfg Config, log zerolog.Logger) (*Client, error) {
	words, err := cfg.validate()
	if err != nil {
		return nil, fmt.Errorf("haproxy: %w", err)
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = DefaultTimeout
	}
	native := &runtime.SingleRuntime{}
	c := &Client{
		cfg:   cfg,
		log:   log.With().Str("component", "haproxy").Str("socket", cfg.Socket).Logger(),
		turn:  make(chan struct{}, 1),
		calls: newCaller(native, cfg.Socket),

		inspected: map[string]inspection{},
	}
	for _, w := range words {
		c.options += " " + w
		c.checks = c.checks || w == "check"
	}
	c.turn <- struct{}{}
	if err := native.Init(cfg.Socket, 0, 0, options.RuntimeOptions{DoNotCheckRuntimeOnInit: true}); err != nil {
		return nil, fmt.Errorf("haproxy: %w", err)
	}
	return c, nil
}

// Checks tells whether the servers that Apply adds have a health check.
func (c *Client) Checks() bool { return c.checks }

// Close waits for its turn, at most the Timeout of an exchange that is under way, ends
// what Client has started, and frees what it holds. c must not be used afterwards.
func (c *Client) Close(ctx context.Context) error {
	if err := c.take(ctx); err != nil {
		return fmt.Errorf("close %s: %w", c.cfg.Socket, err)
	}
	defer c.release()
	if err := c.calls.close(ctx); err != nil {
		return fmt.Errorf("close %s: %w", c.cfg.Socket, err)
	}
	return nil
}

// Probe says which process answers. It returns lbsync.ErrReplaced from one
// that is stopping.
func (c *Client) Probe(ctx context.Context) (lbsync.Process, error) {
	r, err := c.exchange(ctx, nil)
	return r.process, err
}

// Read returns a backend whole, or lbsync.ErrNoBackend. Busy is -1 in it. The first
// time in a process, and when an operator has added a server, it asks for what the list
// of servers does not tell (see inspect).
func (c *Client) Read(ctx context.Context, backend string) (lbsync.State, error) {
	if err := checkName("backend", backend); err != nil {
		return lbsync.State{}, err
	}
	r, err := c.exchange(ctx, []string{"show servers state " + backend})
	if err != nil {
		return lbsync.State{}, fmt.Errorf("read backend %s: %w", backend, err)
	}
	servers, err := r.servers(backend)
	if errors.Is(err, lbsync.ErrNoBackend) {
		return lbsync.State{}, c.instead(ctx, lbsync.ErrNoBackend)
	}
	if err != nil {
		return lbsync.State{}, fmt.Errorf("read backend %s: %w", backend, err)
	}
	kept := c.kept(backend)
	if !kept.process.Same(r.process) || !kept.has(servers) {
		if kept, err = c.inspect(ctx, backend, r, servers); err != nil {
			return lbsync.State{}, fmt.Errorf("inspect backend %s: %w", backend, err)
		}
	}
	kept.mark(servers)
	agent := slices.ContainsFunc(servers, func(s lbsync.Server) bool { return s.Ours() && s.Agent })
	return lbsync.State{Process: r.process, Servers: servers, Fault: kept.fault, Fickle: agent}, nil
}

// instead adds to an error about a backend that HAProxy does not have which ones it has,
// as far as it tells.
func (c *Client) instead(ctx context.Context, err error) error {
	r, rerr := c.exchange(ctx, []string{"show stat -1 2 -1"})
	if rerr != nil || len(r.stats) != 1 {
		return err
	}
	rows, rerr := table(strings.TrimPrefix(r.stats[0], "# "))
	if rerr != nil {
		return err
	}
	column, rerr := columns(rows[0])
	if rerr != nil {
		return err
	}
	const most = 5
	var names []string
	for i, row := range rows[1:] {
		if i == most {
			names = append(names, fmt.Sprintf("and %d more", len(rows)-1-most))
			break
		}
		names = append(names, row[column[pxname]])
	}
	if len(names) == 0 {
		return fmt.Errorf("%w; HAProxy has no backend at all", err)
	}
	return fmt.Errorf("%w; HAProxy has %s", err, strings.Join(names, ", "))
}

// Apply sends ops in order and reads back every server they name. If one op
// cannot be rendered, it returns that error and sends none of them. On any
// other error some of the ops may have been carried out.
//
// A server counts as read back if both its name and its id are the op's. A
// server that an op names is taken to be a slot unless its name begins with
// lbsync.NamePrefix, as lbsync touches nothing else.
func (c *Client) Apply(ctx context.Context, backend string, ops []lbsync.Op) (lbsync.Applied, error) {
	if err := checkName("backend", backend); err != nil {
		return lbsync.Applied{}, err
	}
	commands := make([]string, len(ops))
	touched := make([]lbsync.Server, 0, min(len(ops), maxPeek+1))
	seen := make(map[target]bool, len(ops))
	for i, op := range ops {
		var err error
		if commands[i], err = c.Render(backend, op); err != nil {
			return lbsync.Applied{}, err
		}
		if t := (target{op.Name, op.ID}); !seen[t] {
			seen[t] = true
			s := lbsync.Server{Name: op.Name, ID: op.ID}
			s.Slot = !strings.HasPrefix(s.Name, lbsync.NamePrefix)
			touched = append(touched, s)
		}
	}
	applied, err := c.apply(ctx, backend, &batch{ops: ops, commands: commands}, touched, moves(ops), states(ops))
	if err != nil {
		return lbsync.Applied{}, fmt.Errorf("apply %d ops to backend %s: %w", len(ops), backend, err)
	}
	return applied, nil
}

// Peek reads back the servers with these names and ids; Slot is taken over
// from them. It changes nothing.
func (c *Client) Peek(ctx context.Context, backend string, servers []lbsync.Server) (lbsync.Applied, error) {
	if err := checkName("backend", backend); err != nil {
		return lbsync.Applied{}, err
	}
	for _, s := range servers {
		if err := checkTarget(s.Name, s.ID); err != nil {
			return lbsync.Applied{}, err
		}
	}
	applied, err := c.apply(ctx, backend, &batch{}, servers, nil, nil)
	if err != nil {
		return lbsync.Applied{}, fmt.Errorf("peek at backend %s: %w", backend, err)
	}
	return applied, nil
}

// target names a server.
type target struct {
	name string
	id   int
}

// moves returns the addresses that ops ask for, the last of each server.
func moves(ops []lbsync.Op) map[target]netip.AddrPort {
	var m map[target]netip.AddrPort
	for _, op := range ops {
		if op.Kind == lbsync.SetAddr {
			if m == nil {
				m = map[target]netip.AddrPort{}
			}
			m[target{op.Name, op.ID}] = op.Addr
		}
	}
	return m
}

// states returns the states that ops ask for, the last of each server. A report
// hides whether a server that is down is ready or drained; who has just said so,
// and was not refused, need not read a whole backend to know it. What a human
// says in the same moment, the next whole read finds.
func states(ops []lbsync.Op) map[target]lbsync.Admin {
	var m map[target]lbsync.Admin
	for _, op := range ops {
		var state lbsync.Admin
		switch op.Kind {
		case lbsync.SetReady:
			state = lbsync.Ready
		case lbsync.SetDrain:
			state = lbsync.Drain
		default:
			continue
		}
		if m == nil {
			m = map[target]lbsync.Admin{}
		}
		m[target{op.Name, op.ID}] = state
	}
	return m
}

// apply sends a batch and then reads back servers. An address that HAProxy gives
// later than it says so is waited for, a moment: what is late beyond that is
// for the next plan to find.
func (c *Client) apply(ctx context.Context, backend string, todo *batch, servers []lbsync.Server, moves map[target]netip.AddrPort, states map[target]lbsync.Admin) (lbsync.Applied, error) {
	if len(moves) > 0 {
		if err := c.take(ctx); err != nil {
			return lbsync.Applied{}, err
		}
		last := c.last
		c.release()
		if last.PID == 0 || !last.DefersAddr() {
			moves = nil
		}
	}
	if len(moves) == 0 {
		return c.send(ctx, backend, todo, servers, states)
	}
	applied, err := c.send(ctx, backend, todo, nil, nil)
	if err != nil {
		return applied, err
	}
	for wait := settleFirst; ; wait *= 2 {
		seen, err := c.send(ctx, backend, &batch{}, servers, nil)
		if err != nil {
			return seen, err
		}
		if !seen.Process.Same(applied.Process) {
			return lbsync.Applied{}, fmt.Errorf("%w between two lines", lbsync.ErrReplaced)
		}
		applied.Servers, applied.Active = seen.Servers, seen.Active
		late := len(applied.Refused) == 0 && slices.ContainsFunc(seen.Servers, func(s lbsync.Server) bool {
			want, moved := moves[target{s.Name, s.ID}]
			return moved && s.Addr != want
		})
		if !late || wait > settleLast {
			return applied, nil
		}
		if err := sleep(ctx, wait); err != nil {
			return lbsync.Applied{}, err
		}
	}
}

// send sends a batch in lines and then reads back servers, if any: one by one where
// that is cheap and certain, else from a reading of the whole backend. Other calls
// may have their turn between two lines.
func (c *Client) send(ctx context.Context, backend string, todo *batch, servers []lbsync.Server, states map[target]lbsync.Admin) (lbsync.Applied, error) {
	single := len(servers) <= maxPeek
	if single {
		for _, s := range servers {
			todo.looks = append(todo.looks, peekCommand(backend, s))
		}
	}

	var applied lbsync.Applied
	var last reply
	var stats []string
	send := func(commands []string) (err error) {
		if last, err = c.exchange(ctx, commands); err != nil {
			return err
		}
		if applied.Process.PID == 0 {
			applied.Process = last.process
		}
		if !applied.Process.Same(last.process) {
			return fmt.Errorf("%w between two lines", lbsync.ErrReplaced)
		}
		return nil
	}

	limit, many := max(shortLine, len(todo.ops)/shortLines), len(todo.ops) > manyOps
	if many {
		limit = fewCommands
	}
	begun := time.Now()
	for first := single; first || !todo.empty(); first = false {
		line := todo.next(limit)
		if err := send(line); err != nil {
			return lbsync.Applied{}, err
		}
		if many {
			limit = paced(len(line), time.Since(begun))
			begun = time.Now()
		}
		stats = append(stats, last.stats...)
		for _, r := range last.refused {
			applied.Refused = append(applied.Refused, r)
			applied.Static = applied.Static || strings.HasPrefix(r, staticAlgorithm)
		}
	}

	if single {
		if len(applied.Refused) > 0 {
			states = nil // it may be one of them
		}
		found, active, certain, err := peek(stats, backend, servers, states)
		if err != nil {
			return lbsync.Applied{}, err
		}
		if certain {
			applied.Servers, applied.Active = found, active
			return applied, nil
		}
	}

	if err := send([]string{"show servers state " + backend, "show servers conn " + backend}); err != nil {
		return lbsync.Applied{}, err
	}
	whole, err := last.servers(backend)
	if err != nil {
		return lbsync.Applied{}, err
	}
	c.kept(backend).mark(whole)
	busy, err := last.busy(backend)
	if err != nil {
		return lbsync.Applied{}, err
	}
	applied.Servers = pick(whole, busy, servers)
	applied.Active = 0
	for _, s := range whole {
		if s.Serving() {
			applied.Active++
		}
	}
	return applied, nil
}

// pick returns of whole the servers wanted, in the order of wanted.
func pick(whole []lbsync.Server, busy map[target]int, wanted []lbsync.Server) []lbsync.Server {
	index := make(map[target]int, len(whole))
	for i, s := range whole {
		index[target{s.Name, s.ID}] = i
	}
	var picked []lbsync.Server
	for _, w := range wanted {
		t := target{w.Name, w.ID}
		if i, ok := index[t]; ok {
			s := whole[i]
			if n, ok := busy[t]; ok {
				s.Busy = n
			}
			picked = append(picked, s)
		}
	}
	return picked
}

// take waits for c's turn.
func (c *Client) take(ctx context.Context) error {
	select {
	case <-c.turn:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: %w while waiting to send", lbsync.ErrUnknown, ctx.Err())
	}
}

func (c *Client) release() { c.turn <- struct{}{} }

// exchange sends one line in its turn and returns the complete reply. After one that was
// cut it first asks for a report alone, and has the same process end that one first.
func (c *Client) exchange(ctx context.Context, commands []string) (reply, error) {
	if err := c.take(ctx); err != nil {
		return reply{}, err
	}
	defer c.release()
	ctx, cancel := context.WithTimeout(ctx, c.cfg.Timeout)
	defer cancel()
	if err := ctx.Err(); err != nil {
		return reply{}, fmt.Errorf("%w: nothing was sent: %w", lbsync.ErrUnknown, err)
	}
	if c.calls.suspect {
		r, err := c.round(ctx, nil)
		if err != nil {
			return reply{}, err
		}
		for r.process.Same(c.hung) && !c.calls.finished() {
			if err := sleep(ctx, lookEvery); err != nil {
				return reply{}, fmt.Errorf("%s still runs an earlier line, no command was sent: %w", c.cfg.Socket, err)
			}
		}
		c.calls.trust()
		if len(commands) == 0 {
			return r, nil
		}
	}
	return c.round(ctx, commands)
}

// round sends one line and returns the complete reply. The caller has the turn.
func (c *Client) round(ctx context.Context, commands []string) (reply, error) {
	line, err := frame(commands, c.form == nil)
	if err != nil {
		return reply{}, err
	}
	start, suspect := time.Now(), c.calls.suspect
	a, why := c.calls.execute(ctx, line)
	if why != nil {
		if !suspect {
			c.hung = c.last
		}
		return reply{}, fmt.Errorf("%w: %s did not answer within %s: %w",
			lbsync.ErrUnknown, c.cfg.Socket, time.Since(start).Round(time.Millisecond), why)
	}
	if a.err != nil {
		return reply{}, fmt.Errorf("%w: %w (is HAProxy running, and may this user write to the socket? it must be of level admin)",
			lbsync.ErrUnknown, a.err)
	}
	c.log.Debug().Int("commands", len(commands)).Int("sent", len(line)).Int("received", len(a.text)).
		Dur("took", time.Since(start)).Msg("exchange")
	r, err := parseReply(a.text, c.form)
	c.last, c.form = r.process, r.form
	return r, err
}

// sleep waits for d or ctx.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: %w between two lines", lbsync.ErrUnknown, ctx.Err())
	}
}
