package lbsync

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
)

// Errors of a Balancer. Every other error is HAProxy's own refusal, in its words.
var (
	// ErrUnknown says that no complete answer came: nothing is known of what
	// the balancer did or has. It must change nothing, and what was sent may
	// still be carried out later.
	ErrUnknown = errors.New("no complete answer")
	// ErrReplaced says that the balancer's process changed between the first
	// and the last command of one exchange, or is stopping.
	ErrReplaced = errors.New("process was replaced")
	// ErrNoBackend says that the balancer has no backend of that name.
	ErrNoBackend = errors.New("no such backend")
)

// NamePrefix begins the name of every dynamic server that lbsync adds; its address
// follows (see DynamicName). With Server.Slot it is the whole of ownership: nothing
// else is ever touched.
const NamePrefix = "rc_"

// Placeholder is the address that lbsync gives a server of its own that holds no
// instance. Port 1 is assigned to tcpmux, which nothing serves any more.
var Placeholder = netip.MustParseAddrPort("127.0.0.1:1")

// Process identifies one running HAProxy worker. Two exchanges with equal
// Process spoke to the same worker; a PID alone repeats in containers.
type Process struct {
	PID     int
	Started int64 // Start_time_sec, unix seconds
	Version string
}

// Same tells whether p and q are one and the same worker.
func (p Process) Same(q Process) bool { return p.PID == q.PID && p.Started == q.Started }

// AtLeast tells whether p is HAProxy major.minor or a later one. A version that
// cannot be read counts as the latest: what is done for one is right for all.
func (p Process) AtLeast(major, minor int) bool {
	var ma, mi int
	if n, _ := fmt.Sscanf(p.Version, "%d.%d", &ma, &mi); n < 2 { // the count says it all
		return true
	}
	return ma > major || ma == major && mi >= minor
}

// DefersAddr tells whether a server gets a new address only some time after the
// command that asked for it, so that no later command of the same line may count
// on it (HAProxy 2.9 and later; run on 2.6, 2.8, 2.9, 3.0, 3.2, 3.3 and 3.5-dev5).
func (p Process) DefersAddr() bool { return p.AtLeast(2, 9) }

// Admin is a server's administrative state.
type Admin int

// The three administrative states of a server. Maint wins where several apply.
const (
	Ready Admin = iota
	Drain
	Maint
)

// String returns the word that `set server … state` takes.
func (a Admin) String() string {
	switch a {
	case Ready:
		return "ready"
	case Drain:
		return "drain"
	case Maint:
		return "maint"
	}
	return fmt.Sprintf("admin(%d)", int(a))
}

// Server is one server of one backend, as the balancer reports it.
type Server struct {
	Name    string
	ID      int            // unique within its backend; reused after a deletion, so no identity
	Addr    netip.AddrPort // zero if it has no numeric address
	Slot    bool           // a server-template slot declared for us (its host name is slot.invalid)
	Admin   Admin
	Up      bool // HAProxy would route to it, weight aside; true without a check once ready
	Checked bool // a health check is configured and enabled (it may be paused by maint)
	Passed  bool // its last health check succeeded
	Weight  int  // the user weight, 0 to 256
	Busy    int  // connections in use; -1 where the report does not tell

	// What the configuration says of it. Only Read tells; it is the same as long as
	// the process is.
	Configured int  // the initial weight, 0 to 256; an agent's percentages are of it
	Backup     bool // it gets requests only while no other server does
	Agent      bool // an agent-check may change its weight and its state

	Resolver bool // in maint by HAProxy's own resolver (only Read tells)
	// Untouched says that its state has not changed since the process began, or
	// before that, by a state file. Only Read tells, and not of every balancer.
	Untouched bool
}

// Ours tells whether lbsync may touch s at all.
func (s Server) Ours() bool {
	_, named := dynamicAddr(s.Name)
	return s.Slot || named
}

// Serving tells whether HAProxy sends new requests to s. A backup is not meant: it
// gets them only when nobody else can.
func (s Server) Serving() bool { return s.Admin == Ready && s.Up && s.Weight > 0 && !s.Backup }

// State is a backend read whole.
type State struct {
	Process Process
	Servers []Server // in the balancer's order, ours and others'
	// Fault is why the backend cannot be driven as it is configured, and the line
	// to change, for people; empty if it can.
	Fault string
	// Fickle says that HAProxy may undo what it was told, by an agent for instance,
	// or that this balancer cannot tell whether it may.
	Fickle bool
	// Lacks has the kinds of Op that this balancer has no way to carry out.
	Lacks []Kind
}

// Kind is what an Op does.
type Kind int

// The kinds of Op. Add takes Addr too and creates the server in maint with
// weight 0, with a health check if Check says so; SetAddr takes Addr, SetWeight takes
// Weight.
const (
	Add Kind = iota
	SetAddr
	EnableHealth
	SetReady
	SetDrain
	SetMaint
	HealthDown
	SetWeight
	Shutdown // cuts the sessions of the server
	Delete
	EnableAgent
	DisableAgent
)

// Op is one change of one server, named by both its name and its id.
type Op struct {
	Kind   Kind
	Name   string
	ID     int
	Addr   netip.AddrPort
	Weight int
	// Percent says that Weight is a share of the configured weight, 0 or 100:
	// all that a backend with a static balance algorithm takes.
	Percent bool
	Check   bool // with Add: a health check, also if the operator's options name none
}

// Applied is what one Apply came to.
type Applied struct {
	Process Process
	// Servers holds every server that an Op named, read back after the last
	// Op; a server that does not exist (any more) is not in it.
	Servers []Server
	// Refused holds the balancer's own words for what it refused, in order.
	Refused []string
	// Active is how many servers of the backend, ours and others', were Serving
	// after the last Op, backups not counted; -1 if that was not asked.
	Active int
	// Static says that a weight was refused because the balance algorithm is a
	// static one.
	Static bool
}

// Balancer is one load balancer whose servers can be changed while it runs.
// Its methods may be called concurrently, but calls for one backend belong to one
// goroutine: between the exchanges of an Apply others have their turn. Each exchange ends within the implementation's
// deadline or with ctx.
// No answer is never an empty answer: where the truth is not known they return
// ErrUnknown or ErrReplaced.
type Balancer interface {
	// Probe says which process answers. It is cheap.
	Probe(ctx context.Context) (Process, error)
	// Read returns a backend whole; ErrNoBackend if there is none.
	Read(ctx context.Context, backend string) (State, error)
	// Apply sends ops in order and reads back every server they name. A
	// refused op is no error (see Applied.Refused) and does not stop the later
	// ones. ops may be empty.
	Apply(ctx context.Context, backend string, ops []Op) (Applied, error)
	// Peek reads back the servers with these names and ids without changing
	// anything.
	Peek(ctx context.Context, backend string, servers []Server) (Applied, error)
}
