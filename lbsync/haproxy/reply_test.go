package haproxy

import (
	"encoding/csv"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"rollcall/lbsync"
)

// recorded returns a reply of HAProxy 2.6.12.
func recorded(tb testing.TB, name string) string {
	tb.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		tb.Fatal(err)
	}
	return string(text)
}

// lines is a complete reply with body between two reports.
func lines(body ...string) string {
	const report = "Name: HAProxy\nVersion: 2.6.12\nPid: 10\nStart_time_sec: 100\nStopping: 0\nTainted: 0\n\n"
	return "\n" + report + strings.Join(body, "\n") + "\n" + report
}

func TestParseReply(t *testing.T) {
	whole := lines("")
	tests := []struct {
		name string
		text string
		want error
	}{
		{"whole", whole, nil},
		{"without trailing space", strings.TrimSpace(whole), nil},
		{"empty", "", lbsync.ErrUnknown},
		{"blank", "\n\n", lbsync.ErrUnknown},
		{"one report", whole[:strings.LastIndex(whole, "Name")], lbsync.ErrUnknown},
		{"text before", "[3]: no" + whole, lbsync.ErrUnknown},
		{"text after", whole + "[3]: no", lbsync.ErrUnknown},
		{"last value missing", strings.TrimSpace(whole)[:len(strings.TrimSpace(whole))-1], lbsync.ErrUnknown},
		{"no version", strings.ReplaceAll(whole, "Version: 2.6.12\n", ""), lbsync.ErrUnknown},
		{"pid no number", strings.ReplaceAll(whole, "Pid: 10", "Pid: x"), lbsync.ErrUnknown},
		{"no start", strings.ReplaceAll(whole, "Start_time_sec: 100\n", ""), lbsync.ErrUnknown},
		{"no stopping", strings.ReplaceAll(whole, "Stopping: 0\n", ""), lbsync.ErrUnknown},
		{"other pid", strings.Replace(whole, "Pid: 10", "Pid: 11", 1), lbsync.ErrReplaced},
		{"same pid, other start", strings.Replace(whole, "sec: 100", "sec: 99", 1), lbsync.ErrReplaced},
		{"stopping", strings.ReplaceAll(whole, "Stopping: 0", "Stopping: 1"), lbsync.ErrReplaced},
		{"stopping at the end", whole[:100] + strings.ReplaceAll(whole[100:], "Stopping: 0", "Stopping: 1"), lbsync.ErrReplaced},
		{"other field", strings.Replace(whole, "Tainted", "Painted", 1), lbsync.ErrUnknown},
		{"unknown header", lines("# foo bar", ""), lbsync.ErrUnknown},
		{"state of another version", lines("2", stateHeader, ""), lbsync.ErrUnknown},
		{"state with other columns", lines("1", "# be_id srv_id", ""), lbsync.ErrUnknown},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r, err := parseReply(tt.text, nil)
			if !errors.Is(err, tt.want) {
				t.Fatalf("got %v, want %v", err, tt.want)
			}
			if want := (lbsync.Process{PID: 10, Started: 100, Version: "2.6.12"}); err == nil && r.process != want {
				t.Errorf("process %+v, want %+v", r.process, want)
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	body := []string{
		"[6]: New server registered.", "",
		"[3]: Only servers in maintenance mode can be deleted.",
		"[4]: no need to change the addr, no need to change the port by 'stats socket command'", "",
		"[4]: IP changed from '127.0.0.1' to '::1', no need to change the port by 'stats socket command'", "",
		"[4]: no need to change the addr, port changed from '1' to '2' by 'stats socket command'", "",
		"[4]: IP changed from '::1' to '::2', port changed from '1' to '2' by 'stats socket command'", "",
		"[4]: IP changed from '127.0.0.1' to '127.0.0.2' by 'stats socket command'", "",
		"[4]: port changed from '1' to '2' by 'stats socket command'", "",
		"[4]: IP changed from '127.0.0.1' to '127.0.0.2', problem converting port 'abc' to an int by 'stats socket command'", "",
		"[4]: nothing changed", "",
		"[4]: nothing changed, by refusal", "",
		"[4]: Invalid addr 'zz' by 'stats socket command'", "",
		"[4]: no need to change the addr, problem converting port 'abc' to an int by 'stats socket command'", "",
		"[6]: Unknown command, but maybe one of the following ones is a better match:",
		"  quit                                    : disconnect", "",
		"[6]: Server deleted.", "",
		"[0]: emergency", "",
		"[3] no colon", "[9]: no severity", "[3]:",
	}
	want := []string{
		"Only servers in maintenance mode can be deleted.",
		"IP changed from '127.0.0.1' to '127.0.0.2', problem converting port 'abc' to an int by 'stats socket command'",
		"nothing changed, by refusal",
		"Invalid addr 'zz' by 'stats socket command'",
		"no need to change the addr, problem converting port 'abc' to an int by 'stats socket command'",
		"Unknown command, but maybe one of the following ones is a better match:",
		"emergency",
	}
	r, err := parseReply(lines(body...), nil)
	if err != nil || !slices.Equal(r.refused, want) {
		t.Errorf("got %q, %v\nwant %q", r.refused, err, want)
	}
}

func TestParseRow(t *testing.T) {
	// Columns: backend id, backend, id, name, addr, op, admin, uweight, iweight,
	// since, check status, result, health, check state, agent, 2 flags, fqdn, port.
	const format = "2 be 7 %s %s %d %d 9 1 56 %d 0 0 %d 0 0 0 %s %s - 0 0 - - 0"
	row := func(name, addr string, op, admin, status, check int, fqdn, port string) string {
		return fmt.Sprintf(format, name, addr, op, admin, status, check, fqdn, port)
	}
	base := lbsync.Server{Name: "a", ID: 7, Addr: addrPort("10.0.0.1:80"), Weight: 9, Busy: -1, Up: true, Configured: 1}
	but := func(change func(*lbsync.Server)) lbsync.Server { s := base; change(&s); return s }
	none := func(*lbsync.Server) {}
	tests := []struct {
		name string
		row  string
		want lbsync.Server
	}{
		{"running", row("a", "10.0.0.1", 2, 0, 1, 0, "-", "80"), but(none)},
		{"starting", row("a", "10.0.0.1", 1, 0, 1, 0, "-", "80"), but(none)},
		{"stopped", row("a", "10.0.0.1", 0, 0, 1, 0, "-", "80"), but(func(s *lbsync.Server) { s.Up = false })},
		{"stopping", row("a", "10.0.0.1", 3, 0, 1, 0, "-", "80"), but(func(s *lbsync.Server) { s.Up = false })},
		{"config maint is history", row("a", "10.0.0.1", 2, 4, 1, 0, "-", "80"), but(none)},
		{"forced maint", row("a", "10.0.0.1", 2, 1, 1, 0, "-", "80"), but(func(s *lbsync.Server) { s.Admin, s.Up = lbsync.Maint, false })},
		{"inherited maint", row("a", "10.0.0.1", 0, 2, 1, 0, "-", "80"), but(func(s *lbsync.Server) { s.Admin, s.Up = lbsync.Maint, false })},
		{"maint by resolution", row("a", "10.0.0.1", 0, 32, 1, 0, "-", "80"), but(func(s *lbsync.Server) { s.Admin, s.Up, s.Resolver = lbsync.Maint, false, true })},
		{"drain is decimal", row("a", "10.0.0.1", 2, 12, 1, 0, "-", "80"), but(func(s *lbsync.Server) { s.Admin = lbsync.Drain })},
		{"inherited drain", row("a", "10.0.0.1", 2, 16, 1, 0, "-", "80"), but(func(s *lbsync.Server) { s.Admin = lbsync.Drain })},
		{"maint wins", row("a", "10.0.0.1", 0, 9, 1, 0, "-", "80"), but(func(s *lbsync.Server) { s.Admin, s.Up = lbsync.Maint, false })},
		{"configured is not checked", row("a", "10.0.0.1", 2, 0, 6, 2, "-", "80"), but(none)},
		{"checked, not yet passed", row("a", "10.0.0.1", 2, 0, 1, 6, "-", "80"), but(func(s *lbsync.Server) { s.Checked = true })},
		{"passed L4", row("a", "10.0.0.1", 2, 0, 6, 6, "-", "80"), but(func(s *lbsync.Server) { s.Checked, s.Passed = true, true })},
		{"passed L7, one under way", row("a", "10.0.0.1", 2, 0, 15, 7, "-", "80"), but(func(s *lbsync.Server) { s.Checked, s.Passed = true, true })},
		{"failed", row("a", "10.0.0.1", 2, 0, 8, 6, "-", "80"), but(func(s *lbsync.Server) { s.Checked = true })},
		{"passed, then paused", row("a", "10.0.0.1", 0, 1, 6, 14, "-", "80"), but(func(s *lbsync.Server) { s.Admin, s.Up, s.Checked = lbsync.Maint, false, true })},
		{"slot", row("a", "10.0.0.1", 2, 0, 1, 0, "slot.invalid", "80"), but(func(s *lbsync.Server) { s.Slot = true })},
		{"other host", row("a", "10.0.0.1", 2, 0, 1, 0, "x.slot.invalid", "80"), but(none)},
		{"IPv6", row("a", "::1", 2, 0, 1, 0, "-", "80"), but(func(s *lbsync.Server) { s.Addr = addrPort("[::1]:80") })},
		{"no address", row("a", "-", 2, 0, 1, 0, "foo.bar", "80"), but(func(s *lbsync.Server) { s.Addr = netip.AddrPort{} })},
		{"port -1", row("a", "10.0.0.1", 2, 0, 1, 0, "-", "4294967295"), but(func(s *lbsync.Server) { s.Addr = netip.AddrPort{} })},
		{"exactly 19 columns", strings.TrimSuffix(row("a", "10.0.0.1", 2, 0, 1, 0, "-", "80"), " - 0 0 - - 0"), but(none)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseRow(tt.row, "be", -1)
			if err != nil || got != tt.want {
				t.Errorf("got  %+v, %v\nwant %+v", got, err, tt.want)
			}
		})
	}
	good := tests[0].row
	for name, bad := range map[string]string{
		"empty":            "",
		"18 columns":       strings.TrimSuffix(good, " 80 - 0 0 - - 0"),
		"other backend":    strings.Replace(good, " be ", " bf ", 1),
		"freed memory":     strings.Replace(good, " a ", " |{t\x7fGV ", 1),
		"id no number":     strings.Replace(good, " 7 ", " x ", 1),
		"id 0":             strings.Replace(good, " 7 ", " 0 ", 1),
		"negative":         strings.Replace(good, " 9 ", " -9 ", 1),
		"weight 257":       strings.Replace(good, " 9 ", " 257 ", 1),
		"op state 4":       row("a", "10.0.0.1", 4, 0, 1, 0, "-", "80"),
		"port no number":   row("a", "10.0.0.1", 2, 0, 1, 0, "-", "http"),
		"two spaces":       strings.Replace(good, " ", "  ", 1),
		"status no number": strings.Replace(good, " 56 1 ", " 56 L4OK ", 1),
	} {
		t.Run(name, func(t *testing.T) {
			if s, err := parseRow(bad, "be", 0); !errors.Is(err, lbsync.ErrUnknown) {
				t.Errorf("got %+v, %v; want %v", s, err, lbsync.ErrUnknown)
			}
		})
	}
}

// A malformed row fails the whole list: the good rows before it are not used.
func TestServersMalformed(t *testing.T) {
	good := "2 be 7 a 10.0.0.1 2 0 9 1 56 1 0 0 0 0 0 0 - 80 - 0 0 - - 0"
	tests := []struct {
		name string
		body []string
		want error
		n    int
	}{
		{"good", []string{"1", stateHeader, good, good, ""}, nil, 2},
		{"no servers", []string{"1", stateHeader, ""}, nil, 0},
		{"second is cut", []string{"1", stateHeader, good, good[:20], ""}, lbsync.ErrUnknown, 0},
		{"nothing", []string{""}, lbsync.ErrUnknown, 0},
		{"twice", []string{"1", stateHeader, good, "", "1", stateHeader, good, ""}, lbsync.ErrUnknown, 0},
		{"no backend", []string{"[3]: Can't find backend.", ""}, lbsync.ErrNoBackend, 0},
		{"denied", []string{"[3]: Permission denied", ""}, lbsync.ErrUnknown, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r, err := parseReply(lines(tt.body...), nil)
			if err != nil {
				t.Fatal(err)
			}
			servers, err := r.servers("be")
			if !errors.Is(err, tt.want) || len(servers) != tt.n ||
				tt.name == "denied" && !strings.Contains(err.Error(), "Permission denied") {
				t.Errorf("got %d servers, %v; want %d, %v", len(servers), err, tt.n, tt.want)
			}
		})
	}
}

func TestParseStat(t *testing.T) {
	block := func(change map[string]string, backendRow bool) string {
		row := map[string]string{
			"pxname": "be", "svname": "rc_a", "type": "2", "sid": "50", "status": "UP", "uweight": "7", "addr": "127.0.0.1:81",
			"act": "1", "bck": "0", "scur": "0", "used_conn_cur": "0", "chkfail": "", "check_status": "",
		}
		for k, v := range change {
			row[k] = v
		}
		values, backend := make([]string, len(statColumns)), make([]string, len(statColumns))
		for i, name := range statColumns {
			values[i] = row[name]
		}
		copy(backend, []string{row["pxname"], "BACKEND", statBackend, "0", "UP", "3", "1"}) // act, bck
		text := "# " + strings.Join(statColumns[:], ",") + ",\n" + strings.Join(values, ",") + ",\n"
		if backendRow {
			text += strings.Join(backend, ",") + ",\n"
		}
		return text
	}
	base := lbsync.Server{Name: "rc_a", ID: 50, Addr: addrPort("127.0.0.1:81"), Up: true, Weight: 7}
	but := func(change func(*lbsync.Server)) lbsync.Server { s := base; change(&s); return s }
	type row map[string]string
	tests := []struct {
		name    string
		change  row
		want    lbsync.Server // zero: does not exist
		certain bool
	}{
		{"up", nil, base, true},
		{"going down", row{"status": "UP 1/3"}, base, true},
		{"no check", row{"status": "no check"}, base, true},
		{"drain", row{"status": "DRAIN"}, but(func(s *lbsync.Server) { s.Admin = lbsync.Drain }), true},
		{"drain going down", row{"status": "DRAIN 1/3"}, but(func(s *lbsync.Server) { s.Admin = lbsync.Drain }), true},
		{"maint", row{"status": "MAINT"}, but(func(s *lbsync.Server) { s.Admin, s.Up = lbsync.Maint, false }), true},
		{"maint inherited", row{"status": "MAINT (via be/x)"}, but(func(s *lbsync.Server) { s.Admin, s.Up = lbsync.Maint, false }), true},
		{"down can hide drain", row{"status": "DOWN"}, but(func(s *lbsync.Server) { s.Up = false }), false},
		{"going up too", row{"status": "DOWN 1/2"}, but(func(s *lbsync.Server) { s.Up = false }), false},
		{"stopping too", row{"status": "NOLB"}, but(func(s *lbsync.Server) { s.Up = false }), false},
		{"address not shown", row{"addr": ""}, but(func(s *lbsync.Server) { s.Addr = netip.AddrPort{} }), false},
		{"sessions without connections", row{"scur": "3", "used_conn_cur": "1"}, but(func(s *lbsync.Server) { s.Busy = 3 }), true},
		{"connections without sessions", row{"scur": "1", "used_conn_cur": "3"}, but(func(s *lbsync.Server) { s.Busy = 3 }), true},
		{"passed", row{"chkfail": "0", "check_status": "L4OK"}, but(func(s *lbsync.Server) { s.Checked, s.Passed = true, true }), true},
		{"passed, one under way", row{"chkfail": "0", "check_status": "* L7OK"}, but(func(s *lbsync.Server) { s.Checked, s.Passed = true, true }), true},
		{"failed", row{"chkfail": "4", "check_status": "L4CON"}, but(func(s *lbsync.Server) { s.Checked = true }), true},
		{"paused", row{"chkfail": "4"}, but(func(s *lbsync.Server) { s.Checked = true }), true},
		{"backup", row{"act": "0", "bck": "1"}, but(func(s *lbsync.Server) { s.Backup = true }), true},
		{"other name", row{"svname": "rc_b"}, lbsync.Server{}, true},
		{"other id", row{"sid": "51"}, lbsync.Server{}, true},
		{"other backend", row{"pxname": "bf"}, lbsync.Server{}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseStat(block(tt.change, true), "be", base)
			if err != nil || got.server != tt.want || got.exists != (tt.want.Name != "") || (got.certain && !got.hidden) != tt.certain || tt.certain && got.active != 3 {
				t.Errorf("got  %+v, %v\nwant %+v, certain %t", got, err, tt.want, tt.certain)
			}
			quoted := strings.ReplaceAll(block(tt.change, true), ",\n", ",\"a, b\"\n")
			if again, err := parseStat(quoted, "be", base); err != nil || again != got {
				t.Errorf("with a quoted field: %+v, %v; want %+v", again, err, got)
			}
			if got, err := parseStat(block(tt.change, false), "be", base); err != nil || got.certain {
				t.Errorf("without the backend's row: %+v, %v", got, err)
			}
		})
	}
	for name, bad := range map[string]string{
		"status":        block(row{"status": "SIDEWAYS"}, true),
		"weight":        block(row{"uweight": "x"}, true),
		"sessions":      block(row{"scur": ""}, true),
		"connections":   block(row{"used_conn_cur": ""}, true),
		"column gone":   strings.Replace(block(nil, true), "uweight", "wwwight", 1),
		"field too few": strings.Replace(block(nil, true), ",50,", ",", 1),
		"nothing":       "",
		"quote":         strings.Replace(block(nil, true), ",50,", ",\",", 1),
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := parseStat(bad, "be", base); !errors.Is(err, lbsync.ErrUnknown) {
				t.Errorf("got %v, want %v", err, lbsync.ErrUnknown)
			}
		})
	}
}

func BenchmarkParseState(b *testing.B) {
	var body strings.Builder
	body.WriteString(stateHeader + "\n")
	for i := range 1000 {
		fmt.Fprintf(&body, "2 be %d rc_%032x 10.0.%d.%d 2 0 1 1 56 15 3 4 6 0 0 1 - 8080 - 0 0 - - 0\n", i+1, i, i/250, i%250)
	}
	b.ReportAllocs()
	b.SetBytes(int64(body.Len()))
	for b.Loop() {
		if servers, err := parseState(body.String(), "be", 1); err != nil || len(servers) != 1000 {
			b.Fatal(len(servers), err)
		}
	}
}

// BenchmarkReply is the parsing of an answer to a change: a report and one server
// read back.
func BenchmarkReply(b *testing.B) {
	text := recorded(b, "apply.reply")
	r, err := parseReply(text, nil)
	if err != nil || len(r.stats) == 0 {
		b.Fatal(len(r.stats), err)
	}
	rows, err := csv.NewReader(strings.NewReader(strings.TrimPrefix(r.stats[0], "# "))).ReadAll()
	if err != nil {
		b.Fatal(err)
	}
	id, err := strconv.Atoi(rows[1][slices.Index(rows[0], "sid")])
	if err != nil {
		b.Fatal(err)
	}
	want := lbsync.Server{Name: rows[1][1], ID: id}
	text, known := answered("", text), r.form
	b.ReportAllocs()
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		r, err := parseReply(text, known)
		if err != nil {
			b.Fatal(err)
		}
		if st, err := parseStat(r.stats[0], rows[1][0], want); err != nil || !st.exists {
			b.Fatalf("%+v, %v", st, err)
		}
	}
}
