package haproxy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"rollcall/lbsync"
)

func addrPort(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func TestRender(t *testing.T) {
	plain := newClient(t, Config{Socket: "s"})
	checked := newClient(t, Config{Socket: "s", ServerOptions: "  check inter 2s\tfall 2 "})
	tests := []struct {
		name   string
		client *Client
		op     lbsync.Op
		want   string
	}{
		{"add", plain, lbsync.Op{Kind: lbsync.Add, Name: "rc_a", ID: 7, Addr: addrPort("10.0.0.1:80"), Weight: 5},
			"add server be/rc_a 10.0.0.1:80 id 7 weight 0 pool-purge-delay 1s pool-max-conn -1"},
		{"add IPv6 with options", checked, lbsync.Op{Kind: lbsync.Add, Name: "rc_a", ID: 1<<31 - 1, Addr: addrPort("[2001:db8::1]:65535")},
			"add server be/rc_a [2001:db8::1]:65535 id 2147483647 weight 0 pool-purge-delay 1s pool-max-conn -1 check inter 2s fall 2"},
		{"set addr", checked, lbsync.Op{Kind: lbsync.SetAddr, Name: "s1", ID: 1, Addr: addrPort("10.0.0.1:1")},
			"set server be/s1 addr 10.0.0.1 port 1"},
		{"set addr IPv6", plain, lbsync.Op{Kind: lbsync.SetAddr, Name: "s1", ID: 1, Addr: addrPort("[::1]:80")},
			"set server be/s1 addr ::1 port 80"},
		{"enable health", plain, lbsync.Op{Kind: lbsync.EnableHealth, Name: "s1", ID: 1}, "enable health be/s1"},
		{"ready", plain, lbsync.Op{Kind: lbsync.SetReady, Name: "s1", ID: 1}, "set server be/s1 state ready"},
		{"drain", plain, lbsync.Op{Kind: lbsync.SetDrain, Name: "s1", ID: 1}, "set server be/s1 state drain"},
		{"maint", plain, lbsync.Op{Kind: lbsync.SetMaint, Name: "s1", ID: 1}, "set server be/s1 state maint"},
		{"health down", plain, lbsync.Op{Kind: lbsync.HealthDown, Name: "s1", ID: 1}, "set server be/s1 health down"},
		{"least weight", plain, lbsync.Op{Kind: lbsync.SetWeight, Name: "s1", ID: 1}, "set server be/s1 weight 0"},
		{"most weight", plain, lbsync.Op{Kind: lbsync.SetWeight, Name: "s1", ID: 1, Weight: 256}, "set server be/s1 weight 256"},
		{"share of the configured weight", plain, lbsync.Op{Kind: lbsync.SetWeight, Name: "s1", ID: 1, Weight: 100, Percent: true}, "set server be/s1 weight 100%"},
		{"shutdown", plain, lbsync.Op{Kind: lbsync.Shutdown, Name: "s1", ID: 1}, "shutdown sessions server be/s1"},
		{"delete", plain, lbsync.Op{Kind: lbsync.Delete, Name: "s1", ID: 1}, "del server be/s1"},
		{"enable agent", plain, lbsync.Op{Kind: lbsync.EnableAgent, Name: "s1", ID: 1}, "enable agent be/s1"},
		{"disable agent", plain, lbsync.Op{Kind: lbsync.DisableAgent, Name: "s1", ID: 1}, "disable agent be/s1"},
		{"add with a check", plain, lbsync.Op{Kind: lbsync.Add, Name: "rc_a", ID: 7, Addr: addrPort("127.0.0.1:1"), Check: true},
			"add server be/rc_a 127.0.0.1:1 id 7 weight 0 pool-purge-delay 1s pool-max-conn -1 check"},
		{"add with the operator's check", checked, lbsync.Op{Kind: lbsync.Add, Name: "rc_a", ID: 7, Addr: addrPort("127.0.0.1:1"), Check: true},
			"add server be/rc_a 127.0.0.1:1 id 7 weight 0 pool-purge-delay 1s pool-max-conn -1 check inter 2s fall 2"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tt.client.Render("be", tt.op)
			if err != nil || got != tt.want {
				t.Errorf("got %q, %v\nwant %q", got, err, tt.want)
			}
		})
	}
	if plain.Checks() || !checked.Checks() {
		t.Errorf("Checks() = %t, %t, want false, true", plain.Checks(), checked.Checks())
	}
}

// injections are ops that must not be sent. Each of those with text was seen to
// run a second command, to hang HAProxy or to add keywords on 2.6.12.
var injections = []struct {
	name    string
	backend string
	op      lbsync.Op
	want    string // part of the error
}{
	{"command in the backend", "be;disable frontend fe_be", lbsync.Op{Kind: lbsync.SetReady, Name: "s1", ID: 1}, "backend name"},
	{"slash in the backend", "be/s2", lbsync.Op{Kind: lbsync.SetReady, Name: "s1", ID: 1}, "backend name"},
	{"empty backend", "", lbsync.Op{Kind: lbsync.SetReady, Name: "s1", ID: 1}, "backend name"},
	{"backend of 65", strings.Repeat("b", 65), lbsync.Op{Kind: lbsync.SetReady, Name: "s1", ID: 1}, "backend name"},
	{"semicolon", "be", lbsync.Op{Kind: lbsync.SetReady, Name: "s1;disable frontend fe_be", ID: 1}, "server name"},
	{"newline", "be", lbsync.Op{Kind: lbsync.SetReady, Name: "s1\ndisable frontend fe_be", ID: 1}, "server name"},
	{"newline at the end", "be", lbsync.Op{Kind: lbsync.SetReady, Name: "s1\n", ID: 1}, "server name"},
	{"space", "be", lbsync.Op{Kind: lbsync.SetReady, Name: "s1 state maint", ID: 1}, "server name"},
	{"backslash", "be", lbsync.Op{Kind: lbsync.SetReady, Name: `s1\`, ID: 1}, "server name"},
	{"payload", "be", lbsync.Op{Kind: lbsync.SetReady, Name: "s1<<", ID: 1}, "server name"},
	{"comment", "be", lbsync.Op{Kind: lbsync.SetReady, Name: "s1#", ID: 1}, "server name"},
	{"environment", "be", lbsync.Op{Kind: lbsync.SetReady, Name: "${HOME}", ID: 1}, "server name"},
	{"not ASCII", "be", lbsync.Op{Kind: lbsync.SetReady, Name: "sé", ID: 1}, "server name"},
	{"NUL", "be", lbsync.Op{Kind: lbsync.SetReady, Name: "s1\x00", ID: 1}, "server name"},
	{"empty name", "be", lbsync.Op{Kind: lbsync.SetReady, ID: 1}, "server name"},
	{"name of 65", "be", lbsync.Op{Kind: lbsync.SetReady, Name: strings.Repeat("s", 65), ID: 1}, "server name"},
	{"id 0", "be", lbsync.Op{Kind: lbsync.SetReady, Name: "s1"}, "id 0"},
	{"id -1", "be", lbsync.Op{Kind: lbsync.Add, Name: "rc_a", ID: -1, Addr: addrPort("10.0.0.1:80")}, "id -1"},
	{"id beyond", "be", lbsync.Op{Kind: lbsync.Add, Name: "rc_a", ID: 1 << 31, Addr: addrPort("10.0.0.1:80")}, "id 2147483648"},
	{"weight -1", "be", lbsync.Op{Kind: lbsync.SetWeight, Name: "s1", ID: 1, Weight: -1}, "weight -1"},
	{"weight 257", "be", lbsync.Op{Kind: lbsync.SetWeight, Name: "s1", ID: 1, Weight: 257}, "weight 257"},
	{"no address", "be", lbsync.Op{Kind: lbsync.Add, Name: "rc_a", ID: 1}, "invalid"},
	{"no port", "be", lbsync.Op{Kind: lbsync.Add, Name: "rc_a", ID: 1, Addr: addrPort("10.0.0.1:0")}, "no port"},
	{"no port to set", "be", lbsync.Op{Kind: lbsync.SetAddr, Name: "s1", ID: 1, Addr: addrPort("10.0.0.1:0")}, "no port"},
	{"zone", "be", lbsync.Op{Kind: lbsync.SetAddr, Name: "s1", ID: 1,
		Addr: netip.AddrPortFrom(netip.MustParseAddr("fe80::1").WithZone("lo;disable frontend fe_be"), 80)}, "zone"},
	{"unspecified", "be", lbsync.Op{Kind: lbsync.SetAddr, Name: "s1", ID: 1, Addr: addrPort("0.0.0.0:80")}, "unspecified"},
	{"unspecified IPv6", "be", lbsync.Op{Kind: lbsync.Add, Name: "rc_a", ID: 1, Addr: addrPort("[::]:80")}, "unspecified"},
	{"multicast", "be", lbsync.Op{Kind: lbsync.Add, Name: "rc_a", ID: 1, Addr: addrPort("224.0.0.1:80")}, "multicast"},
	{"multicast IPv6", "be", lbsync.Op{Kind: lbsync.Add, Name: "rc_a", ID: 1, Addr: addrPort("[ff02::1]:80")}, "multicast"},
	{"broadcast", "be", lbsync.Op{Kind: lbsync.Add, Name: "rc_a", ID: 1, Addr: addrPort("255.255.255.255:80")}, "broadcast"},
	{"mapped", "be", lbsync.Op{Kind: lbsync.Add, Name: "rc_a", ID: 1, Addr: addrPort("[::ffff:10.0.0.1]:80")}, "mapped"},
	{"unknown kind", "be", lbsync.Op{Kind: lbsync.DisableAgent + 1, Name: "s1", ID: 1}, "unknown kind"},
}

func TestRenderRefuses(t *testing.T) {
	c := newClient(t, Config{Socket: "s"})
	for _, tt := range injections {
		t.Run(tt.name, func(t *testing.T) {
			got, err := c.Render(tt.backend, tt.op)
			if got != "" || err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %q, %v; want no command and an error with %q", got, err, tt.want)
			}
		})
	}
}

// TestFrame tests the last gate alone, as nothing that Render lets through
// reaches it.
func TestFrame(t *testing.T) {
	for b := range 256 {
		_, err := frame([]string{"show", "a" + string([]byte{byte(b)})}, false)
		bad := b < ' ' || b > '~' || strings.IndexByte(`;\"'#$<>|`, byte(b)) >= 0
		if (err != nil) != bad {
			t.Errorf("byte %#x: error %v", b, err)
		}
	}
	for _, tt := range []struct {
		commands []string
		head     bool
		want     string
	}{
		{nil, true, "show info;show info"},
		{nil, false, "show info"},
		{[]string{"a b", "c"}, true, "show info;a b;c;show info"},
		{[]string{"a b", "c"}, false, "a b;c;show info"},
	} {
		if got, err := frame(tt.commands, tt.head); err != nil || got != tt.want {
			t.Errorf("got %q, %v; want %q", got, err, tt.want)
		}
	}
	if _, err := frame(make([]string, maxCommands+1), true); err == nil {
		t.Error("51 commands in one line")
	}
	full := strings.Repeat("x", maxLine-frameBytes-1)
	if line, err := frame([]string{full}, true); err != nil || len("set severity-output number;"+line+"\n") != maxLine {
		t.Errorf("%d bytes, %v", len(line), err)
	}
	if _, err := frame([]string{full + "x"}, true); err == nil {
		t.Error("a line of 8,001 bytes")
	}
}

func TestBatch(t *testing.T) {
	const long = 3000
	tests := []struct {
		name string
		ops  string // d: Delete; x: another; X: another of 3,000 bytes
		want string // the ops of each line
	}{
		{"nothing", "", ""},
		{"one line", "xxx", "3"},
		{"exactly 50", strings.Repeat("x", 50), "50"},
		{"51", strings.Repeat("x", 51), "50 1"},
		{"by bytes", "XXXxX", "2 3"},
		{"deletes are alone", "xdxxddx", "1 1 2 1 1 1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var ops []lbsync.Op
			var commands []string
			for i, kind := range tt.ops {
				op, command := lbsync.Op{Kind: lbsync.SetReady}, fmt.Sprint(i)
				switch kind {
				case 'd':
					op.Kind = lbsync.Delete
				case 'X':
					command += strings.Repeat("x", long)
				}
				ops, commands = append(ops, op), append(commands, command)
			}
			var counts, joined []string
			all := slices.Clone(commands)
			for todo := (&batch{ops: ops, commands: commands}); len(todo.commands) > 0; {
				line := todo.next(maxCommands)
				counts = append(counts, fmt.Sprint(len(line)))
				joined = append(joined, line...)
				if _, err := frame(line, true); err != nil {
					t.Error(err)
				}
			}
			if got := strings.Join(counts, " "); got != tt.want {
				t.Errorf("lines of %s, want %s", got, tt.want)
			}
			if strings.Join(joined, ";") != strings.Join(all, ";") {
				t.Error("commands are lost or out of order")
			}
		})
	}
}

// A server's ops are not torn apart, and looks come after all of them.
func TestBatchOfServers(t *testing.T) {
	const long = 3900
	for _, tt := range []struct {
		name  string
		ops   string // a letter is a server's op, a capital letter its Delete, + makes the one before long
		looks int
		limit int
		want  string // the ops and looks (?) of each line
	}{
		{"looks in a line of their own", "aaaaa", 2, 6, "aaaaa? ?"},
		{"one line", "aaaaa", 1, 6, "aaaaa?"},
		{"looks alone", "", 8, 6, "?????? ??"},
		{"nothing", "", 0, 6, ""},
		{"cut before a server", "aaaabbbb", 2, 6, "aaaa bbbb??"},
		{"and after as many as there is room for", "abbbbccd", 4, 6, "abbbb ccd??? ?"},
		{"one that is too long for a line", "abbbbbbbbc", 1, 6, "a bbbbbb bbc?"},
		{"what goes before a Delete may be left alone", "aaAbb", 2, 6, "aa A bb??"},
		{"with what goes before that", "bbaaA", 0, 6, "bbaa A"},
		{"a look waits for what comes after a Delete", "Aa", 1, 6, "A a?"},
		{"and may share the line of the last", "aA", 1, 6, "a A?"},
		{"by bytes too", "aab+b+b+", 1, 6, "aa b+b+ b+?"},
		{"a look that does not fit", "a+a+", 1, 6, "a+a+ ?"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			todo := &batch{}
			for _, r := range tt.ops {
				if n := len(todo.ops) - 1; r == '+' {
					todo.commands[n] += strings.Repeat("+", long)
					continue
				}
				name := strings.ToLower(string(r))
				op := lbsync.Op{Kind: lbsync.SetReady, Name: name}
				if string(r) != name {
					op.Kind = lbsync.Delete
				}
				todo.ops, todo.commands = append(todo.ops, op), append(todo.commands, string(r))
			}
			todo.looks = slices.Repeat([]string{"?" + strings.Repeat(" ", 200)}, tt.looks)
			var got []string
			for !todo.empty() {
				line := todo.next(tt.limit)
				if _, err := frame(line, true); err != nil {
					t.Error(err)
				}
				got = append(got, strings.NewReplacer(strings.Repeat("+", long), "+", " ", "").Replace(strings.Join(line, "")))
			}
			if s := strings.Join(got, " "); s != tt.want {
				t.Errorf("got  %s\nwant %s", s, tt.want)
			}
		})
	}
}

// A line of a long batch grows as far as its time allows.
func TestPaced(t *testing.T) {
	todo := &batch{ops: make([]lbsync.Op, 30), commands: slices.Repeat([]string{"x"}, 30)}
	if a, b := len(todo.next(fewCommands)), len(todo.next(maxCommands)); a != 10 || b != 20 {
		t.Errorf("lines of %d and %d, want 10 and 20", a, b)
	}
	for _, tt := range []struct {
		commands int
		took     time.Duration
		want     int
	}{
		{10, 250 * time.Microsecond, 32}, {32, 400 * time.Microsecond, 50}, {50, 800 * time.Microsecond, 50}, {50, time.Millisecond, 40},
		{10, 900 * time.Microsecond, 10}, {10, time.Second, 10}, {0, 0, 10}, {50, 0, 50},
	} {
		if got := paced(tt.commands, tt.took); got != tt.want {
			t.Errorf("after %d in %v: %d, want %d", tt.commands, tt.took, got, tt.want)
		}
	}
}

func TestNew(t *testing.T) {
	tests := []struct {
		name string
		cfg  Config
		want string // part of the error; "" for none
	}{
		{"plain", Config{Socket: "s"}, ""},
		{"backup", Config{Socket: "s", ServerOptions: "check backup"}, "not for added servers"},
		{"agent", Config{Socket: "s", ServerOptions: "agent-check agent-port 9"}, "not for added servers"},
		{"options", Config{Socket: "s", ServerOptions: "check inter 2s ssl verify none ca-file /a/b@c=d(e)"}, ""},
		{"40 words", Config{Socket: "s", ServerOptions: strings.Repeat("check ", 40)}, ""},
		{"41 words", Config{Socket: "s", ServerOptions: strings.Repeat("check ", 41)}, "41 words"},
		{"long", Config{Socket: "s", ServerOptions: "sni " + strings.Repeat("x", maxOptionBytes)}, "bytes"},
		{"no socket", Config{}, "no stats socket"},
		{"negative timeout", Config{Socket: "s", Timeout: -time.Second}, "negative"},
		{"enabled", Config{Socket: "s", ServerOptions: "check enabled"}, `"enabled"`},
		{"disabled", Config{Socket: "s", ServerOptions: "disabled"}, `"disabled"`},
		{"id", Config{Socket: "s", ServerOptions: "id 5"}, `"id"`},
		{"weight", Config{Socket: "s", ServerOptions: "weight 5"}, `"weight"`},
		{"semicolon", Config{Socket: "s", ServerOptions: "check;shutdown frontend fe"}, `"check;shutdown"`},
		{"quote", Config{Socket: "s", ServerOptions: `sni "x"`}, "character"},
		{"environment", Config{Socket: "s", ServerOptions: "sni ${HOME}"}, "character"},
		{"payload", Config{Socket: "s", ServerOptions: "check <<"}, "character"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := New(tt.cfg, zerolog.Nop())
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
}
