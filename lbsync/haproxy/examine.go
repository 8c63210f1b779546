package haproxy

import (
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"rollcall/lbsync"
)

// This file gathers facts for `rollcall doctor`. It judges nothing and changes
// nothing.

// filesVariable is what HAProxy keeps the names of its configuration files in
// (management.txt, "show env").
const filesVariable = "HAPROXY_CFGFILES"

// nobody is the name of a server that nobody has. A command on it is refused
// for that reason or for an earlier one, and so changes nothing.
const nobody = "rollcall-doctor.nobody"

// Facts is what one HAProxy tells of itself.
type Facts struct {
	Version string
	Level   Level
	Files   []string // its configuration files; empty if the socket does not tell
}

// Level is what a socket lets its user do.
type Level string

// The levels that matter. Operator stands for user too: both only read.
const (
	LevelUnknown  Level = "unknown"
	LevelAdmin    Level = "admin"
	LevelOperator Level = "operator or user"
)

// Examine asks which HAProxy this is and what the socket permits.
//
// Every socket answers reads. What tells is `set server` for a server that
// cannot exist: HAProxy checks the level first, so an admin is told that there
// is no such backend, and the others "Permission denied" (measured on 2.6.12).
func (c *Client) Examine(ctx context.Context) (Facts, error) {
	r, err := c.exchange(ctx, []string{"show env " + filesVariable})
	if err != nil {
		return Facts{}, fmt.Errorf("examine HAProxy: %w", err)
	}
	f := Facts{Version: r.process.Version, Level: LevelUnknown, Files: r.files}
	if r, err = c.exchange(ctx, []string{"set server " + nobody + "/" + nobody + " state ready"}); err != nil {
		return Facts{}, fmt.Errorf("examine HAProxy: %w", err)
	}
	switch {
	case slices.Contains(r.refused, "No such backend."):
		f.Level = LevelAdmin
	case slices.ContainsFunc(r.refused, denied):
		f.Level = LevelOperator
	}
	return f, nil
}

func denied(words string) bool { return strings.HasPrefix(words, "Permission denied") }

// BackendFacts is what HAProxy tells of one backend.
type BackendFacts struct {
	Algorithm string // of balance; empty if the socket does not tell
	Dynamics  Answer // whether it takes servers at run time, and weights
	Servers   []ServerFacts
	Fault     string // why lbsync cannot drive it, and the line to change; empty if it can
}

// Answer is yes, no, or not known.
type Answer int

// The answers.
const (
	Unsaid Answer = iota
	Yes
	No
)

// ServerFacts is one server with what lbsync itself has no use for.
type ServerFacts struct {
	lbsync.Server
	Disabled bool // the configuration says `disabled`
	Settable bool // it has an address, so another can take its place
}

// ExamineBackend asks for one backend, or returns lbsync.ErrNoBackend.
func (c *Client) ExamineBackend(ctx context.Context, backend string) (BackendFacts, error) {
	if err := checkName("backend", backend); err != nil {
		return BackendFacts{}, err
	}
	fail := func(err error) (BackendFacts, error) {
		return BackendFacts{}, fmt.Errorf("examine backend %s: %w", backend, err)
	}
	r, err := c.exchange(ctx, []string{"show servers state " + backend})
	if err != nil {
		return fail(err)
	}
	servers, err := r.servers(backend)
	if errors.Is(err, lbsync.ErrNoBackend) {
		return BackendFacts{}, c.instead(ctx, err)
	}
	if err != nil {
		return fail(err)
	}
	in, err := c.inspect(ctx, backend, r, servers)
	if err != nil {
		return fail(err)
	}
	in.mark(servers)
	f := BackendFacts{Fault: in.fault}
	_, rows, _ := strings.Cut(r.states[0], "\n")
	for i, row := range strings.Split(strings.TrimSuffix(rows, "\n"), "\n") {
		if i == len(servers) { // no rows at all
			break
		}
		s, err := parseServerFacts(row, servers[i])
		if err != nil {
			return fail(err)
		}
		f.Servers = append(f.Servers, s)
	}
	// All backends, as a name could be taken for a frontend's.
	if r, err = c.exchange(ctx, []string{"show stat -1 2 -1"}); err != nil {
		return fail(err)
	}
	if len(r.stats) == 1 {
		if err := f.parseStat(r.stats[0], backend); err != nil {
			return fail(err)
		}
	}
	// Without an address it is refused in any case. The algorithm comes first.
	if r, err = c.exchange(ctx, []string{"add server " + backend + "/" + nobody}); err != nil {
		return fail(err)
	}
	for _, words := range r.refused {
		switch {
		case strings.HasPrefix(words, "Backend must use a dynamic load balancing"):
			f.Dynamics = No
		case strings.HasPrefix(words, "'server' expects"):
			f.Dynamics = Yes
		}
	}
	return f, nil
}

const adminConfigured = 4 // the configuration says `disabled`, whatever was set later

func parseServerFacts(row string, s lbsync.Server) (ServerFacts, error) {
	col := strings.Fields(row)
	if len(col) < stateColumns {
		return ServerFacts{}, fmt.Errorf("%w: malformed row: %q", lbsync.ErrUnknown, row)
	}
	admin, err := strconv.Atoi(col[colAdmin])
	if err != nil {
		return ServerFacts{}, fmt.Errorf("%w: malformed row: %q", lbsync.ErrUnknown, row)
	}
	return ServerFacts{Server: s, Disabled: admin&adminConfigured != 0, Settable: col[colAddr] != "-"}, nil
}

func (f *BackendFacts) parseStat(block, backend string) error {
	rows, err := csv.NewReader(strings.NewReader(strings.TrimPrefix(block, "# "))).ReadAll()
	if err != nil {
		return fmt.Errorf("%w: malformed statistics: %w", lbsync.ErrUnknown, err)
	}
	name, typ, algo := slices.Index(rows[0], "pxname"), slices.Index(rows[0], "type"), slices.Index(rows[0], "algo")
	if min(name, typ, algo) < 0 {
		return fmt.Errorf("%w: statistics lack a column", lbsync.ErrUnknown)
	}
	for _, row := range rows[1:] {
		if row[name] == backend && row[typ] == statBackend {
			f.Algorithm = row[algo]
		}
	}
	return nil
}
