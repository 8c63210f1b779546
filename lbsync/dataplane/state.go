package dataplane

import (
	"context"
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

// least is the first version of the API that sets and reports weights and
// addresses of a running server.
var least = [3]int{3, 3, 1}

var versionForm = regexp.MustCompile(`^v?(\d+)\.(\d+)\.(\d+)`)

// begin looks at the API's version, once for each connection, and at the
// process.
func (c *Client) begin(ctx context.Context) (lbsync.Process, error) {
	if !c.supported {
		if err := c.support(ctx); err != nil {
			return lbsync.Process{}, err
		}
		c.supported = true
	}
	return c.process(ctx)
}

// support returns ErrUnsupported if the API is known to be too old.
func (c *Client) support(ctx context.Context) error {
	var info models.Info
	ask := request{method: http.MethodGet, path: infoPath, status: http.StatusOK, answer: &info}
	err := c.do(ctx, ask)
	var no *statusError
	if errors.As(err, &no) && no.status == http.StatusNotFound {
		ask.path = oldInfoPath
		if c.do(ctx, ask) == nil && info.API != nil {
			return fmt.Errorf("%w: it is %s; v%d.%d.%d or later is needed", ErrUnsupported, info.API.Version, least[0], least[1], least[2])
		}
	}
	if err != nil {
		return unknown(err)
	}
	if info.API == nil {
		return fmt.Errorf("%w: %s does not tell the version of the API", lbsync.ErrUnknown, infoPath)
	}
	digits := versionForm.FindStringSubmatch(info.API.Version)
	if digits == nil {
		// A build of one's own. If it is too old, its lists lack the weights.
		c.log.Warn().Str("version", info.API.Version).Msg("version of the API is not known")
		return nil
	}
	for i, n := range least {
		switch have, _ := strconv.Atoi(digits[i+1]); { // digits
		case have > n:
			return nil
		case have < n:
			return fmt.Errorf("%w: it is %s; v%d.%d.%d or later is needed", ErrUnsupported, info.API.Version, least[0], least[1], least[2])
		}
	}
	return nil
}

// unknown makes any answer but the one asked for lbsync.ErrUnknown.
func unknown(err error) error {
	var no *statusError
	if errors.As(err, &no) {
		return fmt.Errorf("%w: %w", lbsync.ErrUnknown, no)
	}
	return err
}

// sighting is what was seen of a process. The API does not report when HAProxy
// was started, only for how many seconds it has been up, so the start is
// between two moments.
type sighting struct {
	process          lbsync.Process
	earliest, latest time.Duration // since the epoch of the Client
	connections      int64         // accepted since the start
}

// slack is how far the clocks may drift apart between two sightings.
const slack = time.Second

// process says which process answers.
func (c *Client) process(ctx context.Context) (lbsync.Process, error) {
	var answer models.ProcessInfo
	sent := time.Since(c.epoch)
	err := c.do(ctx, request{method: http.MethodGet, path: processPath, status: http.StatusOK, answer: &answer})
	if err != nil {
		return lbsync.Process{}, unknown(err)
	}
	received := time.Since(c.epoch)
	i := answer.Info
	if answer.Error != "" {
		return lbsync.Process{}, fmt.Errorf("%w: %s", lbsync.ErrUnknown, answer.Error)
	}
	if i == nil || i.Pid == nil || i.Uptime == nil || i.CumConns == nil || i.Stopping == nil || i.Version == "" {
		return lbsync.Process{}, fmt.Errorf("%w: the API lacks one of pid, uptime, cum_conns, stopping, version", lbsync.ErrUnknown)
	}
	if *i.Stopping != 0 {
		return lbsync.Process{}, fmt.Errorf("%w: pid %d is stopping", lbsync.ErrReplaced, *i.Pid)
	}
	up := time.Duration(*i.Uptime) * time.Second
	now := sighting{
		process: lbsync.Process{
			PID: int(*i.Pid), Version: i.Version,
			Started: c.epoch.Add(received - up).Unix(),
		},
		earliest: sent - up - time.Second, latest: received - up,
		connections: *i.CumConns,
	}
	c.last = now.after(c.last)
	return c.last.process, nil
}

// after tells the process of s by the one seen before, if it can be the same:
// its start must fit, and its connections cannot have become fewer. When their
// count wraps, after 2^32, it is taken for another one once.
func (s sighting) after(before sighting) sighting {
	if s.process.PID == before.process.PID && s.process.Version == before.process.Version &&
		s.connections >= before.connections &&
		s.earliest <= before.latest+slack && before.earliest <= s.latest+slack {
		s.process.Started = before.process.Started
		// Both are true of it, unless the clocks drift.
		if e, l := max(s.earliest, before.earliest), min(s.latest, before.latest); e <= l {
			s.earliest, s.latest = e, l
		}
		return s
	}
	if s.process.Same(before.process) {
		s.process.Started++ // another one, of the same second
	}
	return s
}

// stats returns the rows of the statistics for a query.
func (c *Client) stats(ctx context.Context, query url.Values) ([]*models.NativeStat, error) {
	var answer models.NativeStatsCollection
	err := c.do(ctx, request{method: http.MethodGet, path: statsPath, query: query, status: http.StatusOK, answer: &answer})
	if err != nil {
		return nil, unknown(err)
	}
	if answer.Error != "" {
		return nil, fmt.Errorf("%w: %s", lbsync.ErrUnknown, answer.Error)
	}
	for _, row := range answer.Stats {
		if row == nil || row.Stats == nil {
			return nil, fmt.Errorf("%w: a row of the statistics is empty", lbsync.ErrUnknown)
		}
	}
	return answer.Stats, nil
}

// errDisagree says that two reports are not of one state: something changed
// between them, or one was cut.
var errDisagree = errors.New("the list of servers and the statistics disagree")

// read returns the servers of a backend, or lbsync.ErrNoBackend.
func (c *Client) read(ctx context.Context, backend string) ([]lbsync.Server, error) {
	servers, err := c.readOnce(ctx, backend)
	if errors.Is(err, errDisagree) {
		servers, err = c.readOnce(ctx, backend)
	}
	return servers, err
}

func (c *Client) readOnce(ctx context.Context, backend string) ([]lbsync.Server, error) {
	var list []*runtimeServer
	err := c.do(ctx, request{method: http.MethodGet, path: serversPath(backend), status: http.StatusOK, answer: &list})
	var no *statusError
	if err != nil && !(errors.As(err, &no) && no.status == http.StatusNotFound) {
		return nil, unknown(err)
	}
	if len(list) == 0 {
		// The API says the same of a backend that is not there, and of one
		// that it could not read.
		row, serr := c.stats(ctx, url.Values{"type": {"backend"}, "name": {backend}})
		if serr != nil {
			return nil, serr
		}
		rows, serr := c.stats(ctx, url.Values{"type": {"server"}, "parent": {backend}})
		switch {
		case serr != nil:
			return nil, serr
		case len(row) == 0 && len(rows) == 0:
			return nil, lbsync.ErrNoBackend
		case err != nil:
			return nil, unknown(err)
		case len(rows) > 0:
			return nil, fmt.Errorf("%w: %w", lbsync.ErrUnknown, errDisagree)
		}
		return []lbsync.Server{}, nil
	}
	rows, err := c.stats(ctx, url.Values{"type": {"server"}, "parent": {backend}})
	if err != nil {
		return nil, err
	}
	return merge(list, rows)
}

// merge puts the two reports together: who and where from the list, how from
// the statistics.
func merge(list []*runtimeServer, rows []*models.NativeStat) ([]lbsync.Server, error) {
	stats := make(map[target]*models.NativeStatStats, len(rows))
	for _, row := range rows {
		if row.Stats.Sid != nil {
			stats[target{row.Name, int(*row.Stats.Sid)}] = row.Stats
		}
	}
	if len(rows) != len(list) {
		return nil, fmt.Errorf("%w: %w", lbsync.ErrUnknown, errDisagree)
	}
	servers := make([]lbsync.Server, 0, len(list))
	for _, r := range list {
		if r == nil {
			return nil, fmt.Errorf("%w: the list of servers was cut", lbsync.ErrUnknown)
		}
		id, err := strconv.Atoi(r.ID)
		if err != nil || id < 1 {
			return nil, fmt.Errorf("%w: server %q has the id %q", lbsync.ErrUnknown, r.Name, r.ID)
		}
		t := target{r.Name, id}
		if stats[t] == nil {
			return nil, fmt.Errorf("%w: %w", lbsync.ErrUnknown, errDisagree)
		}
		s, err := combine(t, r, stats[t])
		if err != nil {
			return nil, err
		}
		delete(stats, t) // so one that is there twice is found out
		servers = append(servers, s)
	}
	return servers, nil
}

// passed has the check statuses that are a pass (management.txt 9.1, field 36).
var passed = map[string]bool{"L4OK": true, "L6OK": true, "L7OK": true, "L7OKC": true, "PROCOK": true}

// status returns the first word of a server's status: UP, DOWN, NOLB, DRAIN,
// MAINT or no (check). DRAIN is not in the specification, but is what HAProxy
// says and the API hands on.
func status(s *models.NativeStatStats) string {
	word, _, _ := strings.Cut(s.Status, " ")
	return word
}

func inMaint(s *models.NativeStatStats) bool { return status(s) == "MAINT" }

func combine(t target, r *runtimeServer, stats *models.NativeStatStats) (lbsync.Server, error) {
	if r.Weight == nil {
		return lbsync.Server{}, fmt.Errorf("%w: it does not report weights", ErrUnsupported)
	}
	if stats.Scur == nil || *r.Weight < 0 || *r.Weight > 256 {
		return lbsync.Server{}, fmt.Errorf("%w: server %s has no count of sessions, or the weight %d", lbsync.ErrUnknown, r.Name, *r.Weight)
	}
	s := lbsync.Server{
		Name:   t.name,
		ID:     t.id,
		Slot:   r.Fqdn == lbsync.SlotHost,
		Weight: int(*r.Weight),
		Busy:   int(*stats.Scur),
		Backup: stats.Bck != nil && *stats.Bck > 0,
		Agent:  stats.AgentStatus != "",
		// Failures are counted just where a check is enabled, paused or not.
		Checked: stats.Chkfail != nil,
		Passed:  passed[strings.TrimPrefix(stats.CheckStatus, "* ")], // the star: one is under way
	}
	if r.Iweight != nil && *r.Iweight >= 0 && *r.Iweight <= 256 {
		s.Configured = int(*r.Iweight)
	}
	if ip, err := netip.ParseAddr(r.Address); err == nil && r.Port != nil && *r.Port >= 0 && *r.Port <= 65535 {
		s.Addr = netip.AddrPortFrom(ip, uint16(*r.Port))
	}
	// The statistics were read after the list, and the list misreads some.
	switch word := status(stats); word {
	case "MAINT":
		s.Admin = lbsync.Maint
	case "DRAIN":
		s.Admin, s.Up = lbsync.Drain, true
	case "UP", "no":
		s.Up = true
	case "DOWN", "NOLB":
		// They do not tell drain from ready here. The list may say maint of a
		// drained slot, and of no ready one.
		if r.AdminState != models.RuntimeServerAdminStateReady {
			s.Admin = lbsync.Drain
		}
	default:
		return lbsync.Server{}, fmt.Errorf("%w: server %s has the unknown status %q", lbsync.ErrUnknown, r.Name, stats.Status)
	}
	return s, nil
}
