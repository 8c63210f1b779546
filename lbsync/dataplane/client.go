package dataplane

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/haproxytech/client-native/v5/models"
	"github.com/rs/zerolog"

	"rollcall/lbsync"
)

// DefaultTimeout bounds one request.
const DefaultTimeout = time.Second

// maxOps is how many ops are sent before other calls have their turn.
const maxOps = 100

// ErrUnsupported says that the API cannot do what lbsync needs, being too old.
var ErrUnsupported = errors.New("this Data Plane API is not supported")

// Config says which Data Plane API to speak to.
type Config struct {
	// URL is where it listens, as http://127.0.0.1:5555, with a path in front
	// of /v3 if a proxy adds one. Required.
	URL string
	// User and PasswordFile are for basic authentication; both or none. The
	// file is read before each exchange, so it may change; a line end at its
	// end is no part of the password.
	User         string
	PasswordFile string
	// CAFile has the certificates, PEM, that an https API must be signed by.
	// "" means the system's.
	CAFile string
	// Timeout bounds one request: an Apply is at least four, and two for some
	// ops. It must not be negative; 0 means DefaultTimeout.
	Timeout time.Duration
	// ServerOptions are keywords for every server that Apply adds, as
	// "maxconn 100 ssl verify none". New says which there are.
	ServerOptions string
}

// validate checks c and returns the URL, and a server with the ServerOptions.
func (c Config) validate() (*url.URL, models.RuntimeAddServer, error) {
	var none models.RuntimeAddServer
	if c.URL == "" {
		return nil, none, errors.New("no URL given")
	}
	u, err := url.Parse(c.URL)
	if err != nil {
		return nil, none, errors.New("the URL is malformed") // it may hold a password
	}
	switch {
	case u.User != nil:
		return nil, none, errors.New("the URL holds a user; give user and password file instead")
	case u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.Opaque != "":
		return nil, none, fmt.Errorf("%s is not http://HOST:PORT or https://HOST:PORT", u)
	case u.RawQuery != "" || u.Fragment != "":
		return nil, none, fmt.Errorf("%s has more than a host and a path", u)
	case (c.User == "") != (c.PasswordFile == ""):
		return nil, none, errors.New("user and password file go together")
	case strings.Contains(c.User, ":"):
		return nil, none, errors.New("the user has a colon in it")
	case c.CAFile != "" && u.Scheme != "https":
		return nil, none, errors.New("a CA file is for https")
	case c.Timeout < 0:
		return nil, none, fmt.Errorf("timeout %s is negative", c.Timeout)
	}
	server, err := parseOptions(c.ServerOptions)
	return u, server, err
}

// Client is one Data Plane API. It implements lbsync.Balancer. Make it with New.
type Client struct {
	cfg    Config
	base   *url.URL
	server models.RuntimeAddServer // the options of every new server
	log    zerolog.Logger
	epoch  time.Time

	turn chan struct{} // holds one token; who took it may exchange

	// Guarded by turn.
	http      *http.Client // nil: not made yet, or given up
	supported bool         // the API's version has been looked at
	last      sighting     // of the process
}

var _ lbsync.Balancer = (*Client)(nil)

// New returns a Client for cfg. It does no I/O. Server options that the API
// cannot take, check among them, are an error.
func New(cfg Config, log zerolog.Logger) (*Client, error) {
	base, server, err := cfg.validate()
	if err != nil {
		return nil, fmt.Errorf("dataplane: %w", err)
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = DefaultTimeout
	}
	c := &Client{
		cfg: cfg, base: base, server: server, epoch: time.Now(),
		log:  log.With().Str("component", "dataplane").Stringer("url", base).Logger(),
		turn: make(chan struct{}, 1),
	}
	c.turn <- struct{}{}
	if ip := net.ParseIP(base.Hostname()); cfg.User != "" && base.Scheme == "http" && base.Hostname() != "localhost" && !ip.IsLoopback() {
		c.log.Warn().Msg("the password goes over the network in clear; use https")
	}
	return c, nil
}

// Checks tells whether the servers that Apply adds have a health check. They
// never do: the API cannot switch it on.
func (c *Client) Checks() bool { return false }

// Close waits for its turn and closes idle connections. c must not be used
// afterwards.
func (c *Client) Close(ctx context.Context) error {
	if err := c.take(ctx); err != nil {
		return fmt.Errorf("close %s: %w", c.base, err)
	}
	defer c.release()
	c.hangUp()
	return nil
}

// Probe says which process answers. It returns lbsync.ErrReplaced from one
// that is stopping.
func (c *Client) Probe(ctx context.Context) (lbsync.Process, error) {
	if err := c.take(ctx); err != nil {
		return lbsync.Process{}, err
	}
	defer c.release()
	p, err := c.begin(ctx)
	if err != nil {
		return lbsync.Process{}, fmt.Errorf("probe: %w", err)
	}
	return p, nil
}

// Read returns a backend whole, or lbsync.ErrNoBackend.
func (c *Client) Read(ctx context.Context, backend string) (lbsync.State, error) {
	if err := checkName("backend", backend); err != nil {
		return lbsync.State{}, err
	}
	var servers []lbsync.Server
	p, err := c.exchange(ctx, func() (err error) {
		servers, err = c.read(ctx, backend)
		return err
	})
	if err != nil {
		return lbsync.State{}, fmt.Errorf("read backend %s: %w", backend, err)
	}
	return lbsync.State{Process: p, Servers: servers, Fickle: true, Lacks: lacks}, nil
}

// lacks has what the API has no endpoint for.
var lacks = []lbsync.Kind{lbsync.EnableHealth, lbsync.Shutdown, lbsync.EnableAgent, lbsync.DisableAgent}

// Apply sends ops in order, one by one, and reads back every server they name.
// Other calls may have their turn after each 100 ops.
// If one op cannot be rendered, it returns that error and sends none of them.
// On any other error some of the ops may have been carried out.
//
// After a refusal, what would put that server into service is not sent: a
// server whose address, check or state is not as asked must get no traffic.
// What takes it out of service is sent all the same.
func (c *Client) Apply(ctx context.Context, backend string, ops []lbsync.Op) (lbsync.Applied, error) {
	if err := checkName("backend", backend); err != nil {
		return lbsync.Applied{}, err
	}
	touched := make([]lbsync.Server, 0, len(ops))
	seen := make(map[target]bool, len(ops))
	for _, op := range ops {
		if err := checkOp(op); err != nil {
			return lbsync.Applied{}, err
		}
		if t := (target{op.Name, op.ID}); !seen[t] {
			seen[t] = true
			touched = append(touched, lbsync.Server{Name: op.Name, ID: op.ID})
		}
	}
	var applied lbsync.Applied
	refused := map[string]bool{}
	parts := slices.Collect(slices.Chunk(ops, maxOps))
	if len(parts) == 0 {
		parts = [][]lbsync.Op{nil}
	}
	for i, part := range parts {
		p, err := c.exchange(ctx, func() error {
			for _, op := range part {
				var err error = errEarlier
				if !refused[op.Name] || !serves(op) {
					err = c.perform(ctx, backend, op)
				}
				var r refusal
				if errors.As(err, &r) {
					applied.Refused = append(applied.Refused, fmt.Sprintf("server %s: %s", op.Name, r))
					applied.Static = applied.Static || strings.Contains(string(r), staticAlgorithm)
					refused[op.Name] = true
				} else if err != nil {
					return err
				}
			}
			if i < len(parts)-1 {
				return nil
			}
			return c.pick(ctx, backend, touched, &applied)
		})
		if err == nil && i > 0 && !applied.Process.Same(p) {
			err = fmt.Errorf("%w between two ops", lbsync.ErrReplaced)
		}
		if err != nil {
			return lbsync.Applied{}, fmt.Errorf("apply %d ops to backend %s: %w", len(ops), backend, err)
		}
		applied.Process = p
	}
	return applied, nil
}

// Peek reads back the servers with these names and ids. It changes nothing.
func (c *Client) Peek(ctx context.Context, backend string, servers []lbsync.Server) (lbsync.Applied, error) {
	if err := checkName("backend", backend); err != nil {
		return lbsync.Applied{}, err
	}
	for _, s := range servers {
		if err := checkTarget(s.Name, s.ID); err != nil {
			return lbsync.Applied{}, err
		}
	}
	var applied lbsync.Applied
	p, err := c.exchange(ctx, func() error { return c.pick(ctx, backend, servers, &applied) })
	if err != nil {
		return lbsync.Applied{}, fmt.Errorf("peek at backend %s: %w", backend, err)
	}
	applied.Process = p
	return applied, nil
}

// target names a server.
type target struct {
	name string
	id   int
}

// pick reads the backend and enters those of wanted that exist, in their order,
// and how many servers are serving.
func (c *Client) pick(ctx context.Context, backend string, wanted []lbsync.Server, applied *lbsync.Applied) error {
	applied.Active = -1
	if len(wanted) == 0 {
		return nil
	}
	whole, err := c.read(ctx, backend)
	if err != nil {
		return err
	}
	applied.Active = 0
	index := make(map[target]lbsync.Server, len(whole))
	for _, s := range whole {
		index[target{s.Name, s.ID}] = s
		if s.Serving() {
			applied.Active++
		}
	}
	for _, w := range wanted {
		if s, ok := index[target{w.Name, w.ID}]; ok {
			applied.Servers = append(applied.Servers, s)
		}
	}
	return nil
}

// exchange runs fn between two looks at the process, and returns the process.
func (c *Client) exchange(ctx context.Context, fn func() error) (lbsync.Process, error) {
	if err := c.take(ctx); err != nil {
		return lbsync.Process{}, err
	}
	defer c.release()
	before, err := c.begin(ctx)
	if err != nil {
		return lbsync.Process{}, err
	}
	if err := fn(); err != nil {
		return lbsync.Process{}, err
	}
	after, err := c.process(ctx)
	if err != nil {
		return lbsync.Process{}, err
	}
	if !before.Same(after) {
		return lbsync.Process{}, fmt.Errorf("%w: pid %d by pid %d", lbsync.ErrReplaced, before.PID, after.PID)
	}
	return before, nil
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
