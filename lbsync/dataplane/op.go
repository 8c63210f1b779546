package dataplane

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/haproxytech/client-native/v5/models"

	"rollcall/lbsync"
)

// refusal says in whose words ever why an op was not carried out.
type refusal string

func (r refusal) Error() string { return string(r) }

// What the API has no endpoint for.
const (
	errCheck   = refusal("the Data Plane API cannot enable a health check; declare server-template slots with check instead")
	errCut     = refusal("the Data Plane API cannot cut the sessions of a server")
	errAgent   = refusal("the Data Plane API cannot start or stop an agent-check")
	errEarlier = refusal("not put into service, as an earlier step was refused")
)

// staticAlgorithm is in HAProxy's refusal of any weight but none and the
// configured one, for static-rr, and for source, uri and the like without
// consistent hashing.
const staticAlgorithm = "static LB algorithm"

// serves tells whether op can bring traffic to its server.
func serves(op lbsync.Op) bool {
	switch op.Kind {
	case lbsync.SetReady, lbsync.HealthDown:
		return true
	case lbsync.SetWeight:
		return op.Weight > 0
	}
	return false
}

// runtimeServer is a server as the API reports and takes it: client-native v5's
// model, and what v6.3.2 added to it.
type runtimeServer struct {
	models.RuntimeServer
	Weight  *int64 `json:"weight,omitempty"`
	Iweight *int64 `json:"iweight,omitempty"`
	Fqdn    string `json:"fqdn,omitempty"`
}

// change returns the request that op becomes. For SetMaint and Percent it is
// the first that is sent; answer is where the server read back goes.
func (c *Client) change(backend string, op lbsync.Op, answer *runtimeServer) (request, error) {
	put := func(s runtimeServer) (request, error) {
		return request{method: http.MethodPut, path: serverPath(backend, op.Name), body: s, status: http.StatusOK, answer: answer}, nil
	}
	var s runtimeServer
	switch op.Kind {
	case lbsync.Add:
		add := c.server
		add.Name, add.ID = op.Name, strconv.Itoa(op.ID)
		add.Address, add.Port = address(op.Addr.Addr()), ptr(op.Addr.Port())
		add.Weight = ptr(0)
		return request{
			method: http.MethodPost, path: serversPath(backend), body: add,
			status: http.StatusCreated, answer: new(models.RuntimeAddServer),
		}, nil
	case lbsync.SetAddr:
		s.Address, s.Port = op.Addr.Addr().String(), ptr(op.Addr.Port())
		return put(s)
	case lbsync.SetReady, lbsync.SetDrain, lbsync.SetMaint:
		s.AdminState = adminWord(op.Kind)
		return put(s)
	case lbsync.HealthDown:
		s.OperationalState = models.RuntimeServerOperationalStateDown
		return put(s)
	case lbsync.SetWeight:
		s.Weight = ptr(op.Weight)
		return put(s)
	case lbsync.Delete:
		return request{method: http.MethodDelete, path: serverPath(backend, op.Name), status: http.StatusNoContent}, nil
	case lbsync.EnableHealth:
		return request{}, errCheck
	case lbsync.EnableAgent, lbsync.DisableAgent:
		return request{}, errAgent
	}
	return request{}, errCut
}

func adminWord(k lbsync.Kind) string {
	switch k {
	case lbsync.SetReady:
		return models.RuntimeServerAdminStateReady
	case lbsync.SetDrain:
		return models.RuntimeServerAdminStateDrain
	}
	return models.RuntimeServerAdminStateMaint
}

// address is how the API wants an IP in front of the colon and port that it
// appends.
func address(ip netip.Addr) string {
	if ip.Is6() {
		return "[" + ip.String() + "]"
	}
	return ip.String()
}

func ptr[T int | uint16](n T) *int64 {
	v := int64(n)
	return &v
}

// Render returns the request that op becomes, in one line, or says what in op
// must not reach the API. What the API cannot do begins with #.
func (c *Client) Render(backend string, op lbsync.Op) (string, error) {
	if err := checkName("backend", backend); err != nil {
		return "", err
	}
	if err := checkOp(op); err != nil {
		return "", err
	}
	r, err := c.change(backend, op, new(runtimeServer))
	if err != nil {
		return "# server " + op.Name + ": " + err.Error(), nil
	}
	line := r.method + " " + r.path
	if r.body != nil {
		body, err := json.Marshal(r.body)
		if err != nil {
			return "", err
		}
		line += " " + string(body)
	}
	return line, nil
}

// perform carries out one op. Its error is a refusal, or unknown.
func (c *Client) perform(ctx context.Context, backend string, op lbsync.Op) error {
	if op.Kind == lbsync.SetWeight && op.Percent {
		var have runtimeServer
		if err := refused(c.do(ctx, request{method: http.MethodGet, path: serverPath(backend, op.Name), status: http.StatusOK, answer: &have})); err != nil {
			return err
		}
		if have.Iweight == nil {
			return refusal("the Data Plane API does not tell the configured weight")
		}
		op.Weight = int(*have.Iweight) * op.Weight / 100
	}
	if op.Kind == lbsync.Delete {
		// The API would put it into maint first, whatever it serves.
		s, err := c.stat(ctx, backend, op.Name)
		if err != nil {
			return err
		}
		if s != nil && !inMaint(s) {
			return refusal("only a server in maint is deleted")
		}
	}
	var got runtimeServer
	r, err := c.change(backend, op, &got)
	if err != nil {
		return err
	}
	if err := refused(c.do(ctx, r)); err != nil {
		return err
	}
	// Status 200 does not mean that it was done.
	switch op.Kind {
	case lbsync.SetAddr:
		return c.ensureAddr(ctx, backend, op, got)
	case lbsync.SetWeight:
		if got.Weight == nil || *got.Weight != int64(op.Weight) {
			return refusal(fmt.Sprintf("the API said 200, but the weight is not %d", op.Weight))
		}
	case lbsync.SetReady:
		if got.AdminState != models.RuntimeServerAdminStateReady {
			return refusal("the API said 200, but the state is " + got.AdminState)
		}
	case lbsync.SetMaint:
		return c.ensureMaint(ctx, backend, op, got)
	}
	return nil
}

// settleFirst and settleLast are the pauses between the looks for an address that
// comes late: in all 31 ms.
const (
	settleFirst = time.Millisecond
	settleLast  = 16 * time.Millisecond
)

// ensureAddr makes sure that the server has its address after the API has said so:
// HAProxy 2.9 and later give it a moment after the command.
func (c *Client) ensureAddr(ctx context.Context, backend string, op lbsync.Op, have runtimeServer) error {
	for wait := settleFirst; ; wait *= 2 {
		if have.Port != nil && have.Address == op.Addr.Addr().String() && *have.Port == int64(op.Addr.Port()) {
			return nil
		}
		if wait > settleLast {
			return refusal("the API said 200, but the address is not " + op.Addr.String())
		}
		pause := time.NewTimer(wait)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return fmt.Errorf("%w: %w before the address was seen", lbsync.ErrUnknown, ctx.Err())
		}
		have = runtimeServer{}
		if err := refused(c.do(ctx, request{method: http.MethodGet, path: serverPath(backend, op.Name), status: http.StatusOK, answer: &have})); err != nil {
			return err
		}
	}
}

// ensureMaint makes sure that the server is in maint after the API has said so.
// If it was taken for it while it was drained, the way is through ready.
func (c *Client) ensureMaint(ctx context.Context, backend string, op lbsync.Op, have runtimeServer) error {
	maint := func() (bool, error) {
		s, err := c.stat(ctx, backend, op.Name)
		return s != nil && inMaint(s), err
	}
	if ok, err := maint(); ok || err != nil {
		return err
	}
	if have.Weight == nil {
		return refusal("the API said 200, but the state is not maint")
	}
	weight := int(*have.Weight)
	steps := []lbsync.Op{{Kind: lbsync.SetWeight}, {Kind: lbsync.SetReady}, {Kind: lbsync.SetMaint}, {Kind: lbsync.SetWeight, Weight: weight}}
	if weight == 0 {
		steps = steps[1:3]
	}
	for _, s := range steps {
		r, err := c.change(backend, lbsync.Op{Kind: s.Kind, Name: op.Name, Weight: s.Weight}, new(runtimeServer))
		if err != nil {
			return err
		}
		if err := refused(c.do(ctx, r)); err != nil {
			return err
		}
	}
	if ok, err := maint(); ok || err != nil {
		return err
	}
	return refusal("the API said 200, but the state is not maint")
}

// refused turns the API's no into a refusal.
func refused(err error) error {
	var no *statusError
	if errors.As(err, &no) {
		return refusal(no.Error())
	}
	return err
}

// stat returns the statistics of one server, nil if there are none.
func (c *Client) stat(ctx context.Context, backend, name string) (*models.NativeStatStats, error) {
	rows, err := c.stats(ctx, url.Values{"type": {"server"}, "parent": {backend}, "name": {name}})
	if err != nil || len(rows) == 0 {
		return nil, err
	}
	return rows[0].Stats, nil
}

// serverOptions are the keywords of ServerOptions, and how each is entered.
var serverOptions = map[string]func(s *models.RuntimeAddServer, value string) error{
	"backup":        flag(func(s *models.RuntimeAddServer) *string { return &s.Backup }),
	"send-proxy":    flag(func(s *models.RuntimeAddServer) *string { return &s.SendProxy }),
	"send-proxy-v2": flag(func(s *models.RuntimeAddServer) *string { return &s.SendProxyV2 }),
	"ssl":           flag(func(s *models.RuntimeAddServer) *string { return &s.Ssl }),
	"maxconn":       number(func(s *models.RuntimeAddServer) **int64 { return &s.Maxconn }),
	"maxqueue":      number(func(s *models.RuntimeAddServer) **int64 { return &s.Maxqueue }),
	"minconn":       number(func(s *models.RuntimeAddServer) **int64 { return &s.Minconn }),
	"pool-max-conn": number(func(s *models.RuntimeAddServer) **int64 { return &s.PoolMaxConn }),
	"alpn":          word(func(s *models.RuntimeAddServer) *string { return &s.Alpn }),
	"ca-file":       word(func(s *models.RuntimeAddServer) *string { return &s.SslCafile }),
	"crt":           word(func(s *models.RuntimeAddServer) *string { return &s.SslCertificate }),
	"proto":         word(func(s *models.RuntimeAddServer) *string { return &s.Proto }),
	"sni":           word(func(s *models.RuntimeAddServer) *string { return &s.Sni }),
	"ssl-min-ver":   word(func(s *models.RuntimeAddServer) *string { return &s.SslMinVer }),
	"ssl-max-ver":   word(func(s *models.RuntimeAddServer) *string { return &s.SslMaxVer }),
	"verify":        word(func(s *models.RuntimeAddServer) *string { return &s.Verify }),
	"verifyhost":    word(func(s *models.RuntimeAddServer) *string { return &s.Verifyhost }),
}

var optionWord = regexp.MustCompile(`^[A-Za-z0-9_.,:/@=+()-]+$`)

func flag(field func(*models.RuntimeAddServer) *string) func(*models.RuntimeAddServer, string) error {
	return func(s *models.RuntimeAddServer, value string) error {
		*field(s) = "enabled"
		return nil
	}
}

func number(field func(*models.RuntimeAddServer) **int64) func(*models.RuntimeAddServer, string) error {
	return func(s *models.RuntimeAddServer, value string) error {
		n, err := strconv.ParseInt(value, 10, 32)
		*field(s) = &n
		return err
	}
}

func word(field func(*models.RuntimeAddServer) *string) func(*models.RuntimeAddServer, string) error {
	return func(s *models.RuntimeAddServer, value string) error {
		if !optionWord.MatchString(value) {
			return fmt.Errorf("%q has a character other than A-Za-z0-9_.,:/@=+()-", value)
		}
		*field(s) = value
		return nil
	}
}

// flags are the options without a value.
var flags = map[string]bool{"backup": true, "send-proxy": true, "send-proxy-v2": true, "ssl": true}

// parseOptions returns the server that every new one begins as.
func parseOptions(text string) (models.RuntimeAddServer, error) {
	// Without these HAProxy 2.6 never reuses the connections of a dynamic
	// server. Times are in milliseconds.
	server := models.RuntimeAddServer{PoolPurgeDelay: ptr(1000), PoolMaxConn: ptr(-1)}
	words := strings.Fields(text)
	for i := 0; i < len(words); i++ {
		w := words[i]
		if w == "check" {
			return server, fmt.Errorf("server option check: %w", errCheck)
		}
		set, ok := serverOptions[w]
		if !ok {
			return server, fmt.Errorf("server option %q cannot be given through the Data Plane API", w)
		}
		value := ""
		if !flags[w] {
			if i++; i == len(words) {
				return server, fmt.Errorf("server option %q lacks its value", w)
			}
			value = words[i]
		}
		if err := set(&server, value); err != nil {
			return server, fmt.Errorf("server option %q: %w", w, err)
		}
	}
	if err := server.Validate(nil); err != nil {
		return server, fmt.Errorf("server options: %w", err)
	}
	return server, nil
}

var nameForm = regexp.MustCompile(`^[A-Za-z0-9_.:-]+$`) // at most 64 of them

func checkName(what, name string) error {
	// A dot alone would be taken out of a path.
	if len(name) > 64 || !nameForm.MatchString(name) || name == "." || name == ".." {
		return fmt.Errorf("%s name %q is not 1 to 64 of A-Za-z0-9_.:-", what, name)
	}
	return nil
}

func checkTarget(name string, id int) error {
	if err := checkName("server", name); err != nil {
		return err
	}
	if id < 1 || id > 1<<31-1 {
		return fmt.Errorf("server %s: id %d is not within 1 and 2147483647", name, id)
	}
	return nil
}

// checkOp says what in op must not reach the API.
func checkOp(op lbsync.Op) error {
	if err := checkTarget(op.Name, op.ID); err != nil {
		return err
	}
	switch {
	case op.Kind < lbsync.Add || op.Kind > lbsync.Delete:
		return fmt.Errorf("server %s: unknown kind of op %d", op.Name, op.Kind)
	case op.Kind == lbsync.SetWeight && (op.Weight < 0 || op.Weight > 256):
		return fmt.Errorf("server %s: weight %d is not within 0 and 256", op.Name, op.Weight)
	case op.Kind != lbsync.Add && op.Kind != lbsync.SetAddr:
		return nil
	}
	switch ip := op.Addr.Addr(); {
	case !ip.IsValid(), ip.Zone() != "", ip.IsUnspecified(), ip.IsMulticast(), ip.Is4In6(),
		ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}), op.Addr.Port() == 0:
		return fmt.Errorf("server %s: %s is no address of one server", op.Name, op.Addr)
	}
	return nil
}
