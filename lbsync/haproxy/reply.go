package haproxy

import (
	"encoding/csv"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"rollcall/lbsync"
)

// reply is one complete answer to one line.
type reply struct {
	process lbsync.Process
	uptime  int      // of the process, in s
	form    *form    // of the report at its end
	refused []string // in HAProxy's words, without the severity
	stats   []string // the blocks that `show stat` printed, in order
	states  []string // those of `show servers state`
	conns   []string // those of `show servers conn`
	files   []string // the configuration files that HAProxy was started with
}

// The first lines of the reports. The columns of the second are relied on by
// position up to the port, so all of them must be where they were in 2.6.
const (
	statHeader  = "# pxname,"
	stateHeader = "# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight srv_iweight" +
		" srv_time_since_last_change srv_check_status srv_check_result srv_check_health srv_check_state" +
		" srv_agent_state bk_f_forced_id srv_f_forced_id srv_fqdn srv_port"
	connHeader = "# bkname/svname "
)

// form is what every report of one build of HAProxy has in common.
type form struct {
	name   string   // the first line
	fields []string // the names, in order
	empty  bool     // the last field has no value
}

// parseReply takes apart an answer to a line that ends with a report and, unless
// the form of reports is known already, begins with one. It returns
// lbsync.ErrUnknown if the answer is not whole and lbsync.ErrReplaced if it is of
// a process that is stopping, or of two.
//
// Whole means that it ends with a report that has the fields it must have, the
// last of them with its value. The value itself can be cut (within the digits of
// a field that nobody reads) and nothing else.
func parseReply(text string, known *form) (reply, error) {
	text = strings.TrimSpace(text) // as client-native does already
	if text == "" {
		return reply{}, fmt.Errorf("%w: empty reply", lbsync.ErrUnknown)
	}
	want := info{}
	body := text
	if known == nil {
		head, rest, ok := strings.Cut(text, "\n\n")
		name, _, _ := strings.Cut(head, "\n")
		if !ok || !strings.HasPrefix(name, "Name: ") {
			return reply{}, fmt.Errorf("%w: reply does not begin with a whole report", lbsync.ErrUnknown)
		}
		var err error
		if want, err = parseInfo(head); err != nil {
			return reply{}, err
		}
		known, body = &form{name, want.fields, want.last == ""}, rest
	}
	// The body is the report itself if there were no commands.
	at := strings.LastIndex("\n"+body, "\n"+known.name+"\n")
	if at < 0 {
		return reply{}, fmt.Errorf("%w: reply was cut", lbsync.ErrUnknown)
	}
	got, err := parseInfo(body[at:])
	if err != nil {
		return reply{}, err
	}
	switch {
	case !slices.Equal(got.fields, known.fields) || (got.last == "") != known.empty:
		return reply{}, fmt.Errorf("%w: reply was cut within its last report, or another HAProxy gave it", lbsync.ErrUnknown)
	case want.fields != nil && !want.process.Same(got.process):
		return reply{}, fmt.Errorf("%w: pid %d by pid %d", lbsync.ErrReplaced, want.process.PID, got.process.PID)
	case want.stopping || got.stopping:
		return reply{}, fmt.Errorf("%w: pid %d is stopping", lbsync.ErrReplaced, got.process.PID)
	}
	r := reply{process: got.process, uptime: got.uptime, form: known}
	return r, r.parseBody(body[:at])
}

// info is what matters of a `show info`.
type info struct {
	process  lbsync.Process
	uptime   int // in s; -1 if it is not told
	stopping bool
	fields   []string // the names, in order
	last     string   // the value of the last one
}

func parseInfo(text string) (info, error) {
	i := info{fields: make([]string, 0, 80)}
	values := make(map[string]string, 4)
	for line := range strings.Lines(text) {
		key, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		if !ok {
			return info{}, fmt.Errorf("%w: report has the line %q", lbsync.ErrUnknown, line)
		}
		i.fields, i.last = append(i.fields, key), strings.TrimSpace(value)
		switch key {
		case "Pid", "Start_time_sec", "Stopping", "Version", "Uptime_sec":
			values[key] = i.last
		}
	}
	var errs [3]error
	i.process.Version = values["Version"]
	i.process.PID, errs[0] = strconv.Atoi(values["Pid"])
	i.process.Started, errs[1] = strconv.ParseInt(values["Start_time_sec"], 10, 64)
	_, errs[2] = strconv.Atoi(values["Stopping"])
	i.stopping = values["Stopping"] != "0"
	var err error
	if i.uptime, err = strconv.Atoi(values["Uptime_sec"]); err != nil {
		i.uptime = -1
	}
	if err = errors.Join(errs[:]...); err != nil || i.process.Version == "" {
		return info{}, fmt.Errorf("%w: report lacks one of Pid, Start_time_sec, Stopping, Version", lbsync.ErrUnknown)
	}
	return i, nil
}

// parseBody sorts what came between the two reports: blocks, which begin with
// a header and end with an empty line, and single lines. Single lines are not
// matched to commands, as an error can lack the empty line that ends a reply.
func (r *reply) parseBody(body string) error {
	previous := ""
	for body != "" {
		line, rest, _ := strings.Cut(body, "\n")
		if strings.HasPrefix(line, "# ") {
			block, after, _ := strings.Cut(body, "\n\n")
			block = strings.TrimSuffix(block, "\n")
			switch {
			case strings.HasPrefix(line, statHeader):
				r.stats = append(r.stats, block)
			case strings.HasPrefix(line, stateHeader) && previous == "1":
				r.states = append(r.states, block)
			case strings.HasPrefix(line, connHeader):
				r.conns = append(r.conns, block)
			default:
				return fmt.Errorf("%w: unknown header %q", lbsync.ErrUnknown, line)
			}
			previous, body = "", after
			continue
		}
		if words, ok := refusal(line); ok {
			r.refused = append(r.refused, words)
		}
		if files, ok := strings.CutPrefix(line, filesVariable+"="); ok {
			r.files = strings.Split(files, ";")
		}
		previous, body = line, rest
	}
	return nil
}

// moved are the replies of `set server … addr` that mean success: measured on
// 2.6.12, 3.0.11 and 3.2.26. They come as a warning, as the refusals of that command
// do. 2.6 says something of both halves, 3 only of what changes.
var moved = regexp.MustCompile(`^(nothing changed$|` + part + `(, ` + part + `)? by ')`)

const part = `(no need to change the (addr|port)|(IP|port) changed from '[^']*' to '[^']*')`

// refusal tells whether line says no, and in which words. With "set
// severity-output number" errors are 0 to 3; an unknown command is only 6, and
// a refused address 4.
func refusal(line string) (string, bool) {
	if len(line) < 5 || line[0] != '[' || line[2:5] != "]: " {
		return "", false
	}
	words := line[5:]
	switch severity := line[1]; {
	case severity >= '0' && severity <= '3':
		return words, true
	case severity == '4':
		return words, !moved.MatchString(words)
	case severity <= '7':
		return words, strings.HasPrefix(words, "Unknown command")
	}
	return "", false
}

// servers returns the servers of the one `show servers state` in r. A row that
// is not as it must be fails the whole: HAProxy up to 2026-07 could print freed
// memory when a server was deleted while a slow reader listed it.
func (r *reply) servers(backend string) ([]lbsync.Server, error) {
	if slices.Contains(r.refused, "Can't find backend.") {
		return nil, lbsync.ErrNoBackend
	}
	if len(r.refused) > 0 {
		return nil, fmt.Errorf("%w: %s", lbsync.ErrUnknown, r.refused[0])
	}
	if len(r.states) != 1 {
		return nil, fmt.Errorf("%w: reply has %d lists of servers", lbsync.ErrUnknown, len(r.states))
	}
	return parseState(r.states[0], backend, r.uptime)
}

// Columns of `show servers state`, from 0 (management.txt, "show servers
// state").
const (
	colProxyID     = 0
	colBackend     = 1
	colID          = 2
	colName        = 3
	colAddr        = 4
	colOpState     = 5
	colAdmin       = 6
	colWeight      = 7
	colConfigured  = 8
	colUnchanged   = 9 // for so many s
	colCheckStatus = 10
	colCheckState  = 13
	colAgentState  = 14
	colFQDN        = 17
	colPort        = 18
	stateColumns   = 19
)

// Values in those columns (HAProxy 2.6 server-t.h and check-t.h, same in 3.2).
const (
	opStopped, opStarting, opRunning, opStopping = 0, 1, 2, 3

	adminMaint    = 1 | 2 | 32
	adminResolver = 32
	adminDrain    = 8 | 16

	checkConfigured = 2 // of agent-checks too
	checkEnabled    = 4
	checkPaused     = 8
)

// checkPassed has the check states of `show servers state` and of `show stat`
// that are a pass.
var (
	checkPassed = map[int]bool{6: true, 9: true, 15: true, 16: true, 20: true}
	statPassed  = map[string]bool{"L4OK": true, "L6OK": true, "L7OK": true, "L7OKC": true, "PROCOK": true}
)

func parseState(block, backend string, uptime int) ([]lbsync.Server, error) {
	_, rows, _ := strings.Cut(block, "\n")
	servers := make([]lbsync.Server, 0, strings.Count(rows, "\n")+1)
	for row := range strings.Lines(rows) {
		s, err := parseRow(strings.TrimSuffix(row, "\n"), backend, uptime)
		if err != nil {
			return nil, err
		}
		servers = append(servers, s)
	}
	return servers, nil
}

func parseRow(row, backend string, uptime int) (lbsync.Server, error) {
	malformed := func(what string) (lbsync.Server, error) {
		return lbsync.Server{}, fmt.Errorf("%w: malformed row (%s): %q", lbsync.ErrUnknown, what, row)
	}
	var col [stateColumns]string
	n := 0
	for rest, more := row, true; more && n < stateColumns; n++ {
		col[n], rest, more = strings.Cut(rest, " ")
	}
	if n < stateColumns {
		return malformed("too few columns")
	}
	if col[colBackend] != backend {
		return malformed("backend")
	}
	if !validName(col[colName]) {
		return malformed("name")
	}
	numbers := [...]int{colID, colOpState, colAdmin, colWeight, colConfigured, colUnchanged, colCheckStatus, colCheckState, colAgentState, colPort}
	var num [stateColumns]int
	for _, i := range numbers {
		v, err := strconv.ParseUint(col[i], 10, 32)
		if err != nil {
			return malformed("number")
		}
		num[i] = int(v)
	}
	switch {
	case num[colID] == 0:
		return malformed("id")
	case num[colOpState] > opStopping:
		return malformed("operational state")
	case num[colWeight] > 256:
		return malformed("weight")
	}

	s := lbsync.Server{
		Name:    col[colName],
		ID:      num[colID],
		Slot:    col[colFQDN] == lbsync.SlotHost,
		Checked: num[colCheckState]&checkEnabled != 0,
		Weight:  num[colWeight],
		Busy:    -1,

		Configured: num[colConfigured],
		Agent:      num[colAgentState]&checkConfigured != 0,
		Resolver:   num[colAdmin]&adminResolver != 0,
		Untouched:  uptime >= 0 && num[colUnchanged] >= uptime,
	}
	switch {
	case num[colAdmin]&adminMaint != 0:
		s.Admin = lbsync.Maint
	case num[colAdmin]&adminDrain != 0:
		s.Admin = lbsync.Drain
	}
	s.Up = s.Admin != lbsync.Maint && (num[colOpState] == opStarting || num[colOpState] == opRunning)
	// A paused check says nothing about now, and `show stat` hides it too.
	s.Passed = s.Checked && num[colCheckState]&checkPaused == 0 && checkPassed[num[colCheckStatus]]
	if ip, err := netip.ParseAddr(col[colAddr]); err == nil && num[colPort] <= 65535 {
		s.Addr = netip.AddrPortFrom(ip, uint16(num[colPort]))
	}
	return s, nil
}

// validName tells whether name is one or more of A-Za-z0-9_.:- (without the cost
// of a regular expression).
func validName(name string) bool {
	for i := range len(name) {
		switch b := name[i]; {
		case b >= 'a' && b <= 'z', b >= 'A' && b <= 'Z', b >= '0' && b <= '9',
			b == '_', b == '.', b == ':', b == '-':
		default:
			return false
		}
	}
	return name != ""
}

// busy returns the connections in use from the one `show servers conn` in r.
func (r *reply) busy(backend string) (map[target]int, error) {
	if len(r.conns) != 1 {
		return nil, fmt.Errorf("%w: reply has %d lists of connections", lbsync.ErrUnknown, len(r.conns))
	}
	header, rows, _ := strings.Cut(r.conns[0], "\n")
	used := slices.Index(strings.Fields(header), "used_cur") - 1 // the header begins with #
	if used < 2 {
		return nil, fmt.Errorf("%w: list of connections lacks used_cur", lbsync.ErrUnknown)
	}
	busy := make(map[target]int, strings.Count(rows, "\n")+1)
	for row := range strings.Lines(rows) {
		col := strings.Fields(row)
		if len(col) <= used {
			return nil, fmt.Errorf("%w: malformed row: %q", lbsync.ErrUnknown, row)
		}
		name, ok := strings.CutPrefix(col[0], backend+"/")
		_, sid, _ := strings.Cut(col[1], "/")
		id, err1 := strconv.Atoi(sid)
		n, err2 := strconv.Atoi(col[used])
		if !ok || err1 != nil || err2 != nil {
			return nil, fmt.Errorf("%w: malformed row: %q", lbsync.ErrUnknown, row)
		}
		busy[target{name, id}] = n
	}
	return busy, nil
}

// peek returns, by stats, a `show stat` for each of servers, those that exist and how
// many servers of the backend are up; -1 if no server was asked for. It is certain if
// the reports and states, which is what has just been commanded, tell everything, else
// only a reading of the whole backend can.
func peek(stats []string, backend string, servers []lbsync.Server, states map[target]lbsync.Admin) (found []lbsync.Server, active int, certain bool, err error) {
	if len(stats) != len(servers) { // one was refused
		return nil, 0, false, nil
	}
	active = -1
	for i, want := range servers {
		st, err := parseStat(stats[i], backend, want)
		if err != nil || !st.certain {
			return nil, 0, false, err
		}
		if st.hidden {
			state, said := states[target{want.Name, want.ID}]
			if !said {
				return nil, 0, false, nil
			}
			st.server.Admin = state
		}
		active = st.active
		if st.exists {
			found = append(found, st.server)
		}
	}
	return found, active, true, nil
}

// stat is what `show stat` tells of one server and its backend.
type stat struct {
	server  lbsync.Server
	exists  bool
	active  int // servers of the backend that are up with a weight, without backups
	certain bool
	hidden  bool // but for server.Admin, which is ready or drain
}

// Types of rows in `show stat` (management.txt 9.1, field 32).
const (
	statBackend = "1"
	statServer  = "2"
)

// parseStat reads the `show stat` of one server.
//
// `show stat NAME` means a frontend of that name if there is one, and else the
// proxy of that number. So the absence of a server is only believed beside the
// row of its backend. Nor does it tell drain from ready for a server that is
// down, or an address if there is none or the socket is of level user.
func parseStat(block, backend string, want lbsync.Server) (stat, error) {
	rows, err := table(strings.TrimPrefix(block, "# "))
	if err != nil {
		return stat{}, fmt.Errorf("%w: malformed statistics: %w", lbsync.ErrUnknown, err)
	}
	column, err := columns(rows[0])
	if err != nil {
		return stat{}, err
	}
	var st stat
	proven, located := false, true
	for _, row := range rows[1:] {
		get := func(c statColumn) string { return row[column[c]] }
		switch {
		case get(pxname) != backend:
			return stat{}, nil
		case get(rowType) == statBackend:
			active, err := strconv.Atoi(get(act))
			if err != nil {
				return stat{}, fmt.Errorf("%w: malformed statistics of backend %s: %w", lbsync.ErrUnknown, backend, err)
			}
			proven, st.active = true, active
		case get(rowType) == statServer && get(svname) == want.Name && get(sid) == strconv.Itoa(want.ID):
			st.exists = true
			if st.server, err = parseStatRow(get, want); err != nil {
				return stat{}, err
			}
			st.hidden = !st.server.Up && st.server.Admin != lbsync.Maint
			located = st.server.Addr.IsValid()
		}
	}
	st.certain = proven && located
	return st, nil
}

// table splits a report into its rows, the header first: at least that, and all of
// one length.
func table(report string) ([][]string, error) {
	if strings.Contains(report, `"`) || report == "" {
		rows, err := csv.NewReader(strings.NewReader(report)).ReadAll()
		if err == nil && len(rows) == 0 {
			err = errors.New("no header")
		}
		return rows, err
	}
	// Nearly every report: a tenth of the time.
	var rows [][]string
	for row := range strings.Lines(report) {
		rows = append(rows, strings.Split(strings.TrimSuffix(row, "\n"), ","))
		if n := len(rows) - 1; len(rows[n]) != len(rows[0]) {
			return nil, fmt.Errorf("row %d has %d fields, and the header has %d", n, len(rows[n]), len(rows[0]))
		}
	}
	return rows, nil
}

// statColumn is a column of `show stat` that is relied on.
type statColumn int

const (
	pxname statColumn = iota
	svname
	rowType
	sid
	status
	act
	bck
	uweight
	addr
	scur
	usedConn
	chkfail
	checkStatus
)

// statColumns has their names.
var statColumns = [...]string{
	"pxname", "svname", "type", "sid", "status", "act", "bck", "uweight", "addr", "scur", "used_conn_cur", "chkfail", "check_status",
}

// columns finds statColumns in the header of a report.
func columns(header []string) (column [len(statColumns)]int, err error) {
	for i, name := range statColumns {
		if column[i] = slices.Index(header, name); column[i] < 0 {
			return column, fmt.Errorf("%w: statistics lack the column %s", lbsync.ErrUnknown, name)
		}
	}
	return column, nil
}

func parseStatRow(get func(statColumn) string, want lbsync.Server) (lbsync.Server, error) {
	s := lbsync.Server{Name: want.Name, ID: want.ID, Slot: want.Slot, Backup: get(bck) == "1"}
	word, _, _ := strings.Cut(get(status), " ")
	switch word {
	case "UP", "no":
		s.Up = true
	case "DRAIN":
		s.Up, s.Admin = true, lbsync.Drain
	case "MAINT":
		s.Admin = lbsync.Maint
	case "DOWN", "NOLB":
	default:
		return s, fmt.Errorf("%w: server %s has the unknown status %q", lbsync.ErrUnknown, s.Name, get(status))
	}
	var errs [3]error
	var sessions, used int
	s.Weight, errs[0] = strconv.Atoi(get(uweight))
	sessions, errs[1] = strconv.Atoi(get(scur))
	used, errs[2] = strconv.Atoi(get(usedConn))
	if err := errors.Join(errs[:]...); err != nil {
		return s, fmt.Errorf("%w: malformed statistics of server %s: %w", lbsync.ErrUnknown, s.Name, err)
	}
	s.Busy = max(sessions, used)
	s.Addr, _ = netip.ParseAddrPort(get(addr)) // zero if it is none
	// Failures are counted just where a check is enabled, paused or not.
	s.Checked = get(chkfail) != ""
	s.Passed = statPassed[strings.TrimPrefix(get(checkStatus), "* ")] // the star: one is under way
	return s, nil
}
