package haproxy

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/rs/zerolog"

	"rollcall/lbsync"
)

// believable fails the test if a server was made of a reply that no HAProxy
// can have.
func believable(t *testing.T, servers []lbsync.Server) {
	t.Helper()
	for _, s := range servers {
		if s.Name == "" || s.ID < 1 || s.Weight < 0 || s.Weight > 256 || s.Admin == lbsync.Maint && s.Up || s.Passed && !s.Checked {
			t.Fatalf("server %+v", s)
		}
	}
}

// FuzzReplies has HAProxy answer anything. What is no whole answer must be an
// error, and a cut one never another answer.
func FuzzReplies(f *testing.F) {
	for _, name := range []string{"read.reply", "apply.reply", "whole.reply", "3.2/read.reply", "3.2/peek.reply", "3.2/refused.reply", "3.2/del.reply", "3.2/add.reply"} {
		f.Add(recorded(f, name), uint16(40))
	}
	for _, s := range []string{"", "\n\n", lines(""), lines("1", stateHeader, ""), lines(statHeader, "a,b"), lines(connHeader+"used_cur", "x"), lines("# pxname,\"")} {
		f.Add(s, uint16(3))
	}
	f.Fuzz(func(t *testing.T, text string, cut uint16) {
		r, err := parseReply(text, nil)
		if err != nil {
			return
		}
		if again, err := parseReply(answered("", strings.TrimSpace(text)), r.form); err != nil || again.process != r.process || !slices.Equal(again.stats, r.stats) || !slices.Equal(again.states, r.states) {
			t.Fatalf("without its head: %+v, %v", again, err)
		}
		if r.process.PID == 0 && r.process.Version == "" {
			t.Fatalf("an answer of nobody: %+v", r.process)
		}
		servers, err := r.servers("be")
		if err == nil {
			believable(t, servers)
		}
		busy, err := r.busy("be")
		if err != nil && busy != nil {
			t.Fatalf("%v, and %v", busy, err)
		}
		want := []lbsync.Server{{Name: "s1", ID: 1, Slot: true}, {Name: "rc_10.0.0.1:80", ID: 7}}
		for _, w := range [][]lbsync.Server{nil, want[:1], want} {
			found, active, certain, err := peek(r.stats, "be", w, nil)
			if len(found) > len(w) || err == nil && certain && active < -1 {
				t.Fatalf("peek: %+v, %d, %v", found, active, err)
			}
			for _, s := range found {
				if s.Name != w[0].Name && s.Name != w[len(w)-1].Name {
					t.Fatalf("peek found %+v", s)
				}
			}
		}
		// All that is missing at the end makes it no answer, or leaves the same.
		short := strings.TrimSpace(text)
		short = short[:len(short)-min(len(short), 1+int(cut))]
		if c, err := parseReply(short, nil); err == nil && !strings.HasPrefix(text[strings.Index(text, "Name"):], short) && len(c.states) > len(r.states) {
			t.Fatalf("cut by %d: %d lists, of %d", cut, len(c.states), len(r.states))
		}
	})
}

func FuzzStat(f *testing.F) {
	head := strings.Join(statColumns[:], ",")
	f.Add("# " + head + "\nbe,s1,2,1,UP,,,100,10.0.0.1:80,0,0,0,L4OK\nbe,BACKEND,1,0,UP,1,0,100,,0,0,,\n")
	f.Add("# " + head + "\nbe,s1,2,1,no check,,,1,,0,0,,\n")
	f.Add("")
	f.Add("# ")
	f.Add("# \"" + head)
	f.Fuzz(func(t *testing.T, block string) {
		st, err := parseStat(block, "be", lbsync.Server{Name: "s1", ID: 1, Slot: true})
		if err == nil && st.exists && (st.server.Name != "s1" || st.server.ID != 1) {
			t.Fatalf("found %+v", st.server)
		}
	})
}

func FuzzConfig(f *testing.F) {
	for _, s := range []string{
		"global\n server-state-file x\ndefaults\n mode http\n option redispatch\nbackend be\n server-template s 1-3 slot.invalid:1 init-addr last,127.0.0.1\n",
		"option x\n", "no option y\n", ".if x\n", "backend b from d\n", "default-server init-addr\n", "\"", "a\\", "'x\\'", "server-template\n", "mode\n", "use_backend\n", "listen l # x\n",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var defaults, section Proxy
		file := &File{}
		if err := file.read(strings.NewReader(text), &defaults, &section); err != nil {
			return
		}
		file.end(&defaults, &section)
		for i := range file.Proxies {
			p := &file.Proxies[i]
			_, _ = file.StatePath(p) // it says what it cannot tell
			if got := file.Proxy(p.Name); got != nil && got.Kind == "frontend" {
				t.Fatalf("frontend %q is a backend", p.Name)
			}
			file.Senders(p.Name)
		}
	})
}

// grammar is what may be said to HAProxy, written down anew: it shares nothing
// with what makes the commands.
type grammar struct {
	backend string
	slots   map[string]bool
	options string
}

func (g grammar) number(s string, low, high int) bool {
	n, err := strconv.Atoi(s)
	return err == nil && strconv.Itoa(n) == s && n >= low && n <= high
}

// address takes apart what netip renders, and nothing else.
func (g grammar) address(ip string) bool {
	a, err := netip.ParseAddr(ip)
	return err == nil && a.String() == ip && a.Zone() == "" && !a.IsUnspecified() && !a.IsMulticast() && !a.IsLoopback()
}

func (g grammar) server(s string) bool {
	name, ok := strings.CutPrefix(s, g.backend+"/")
	if !ok {
		return false
	}
	if addr, ok := strings.CutPrefix(name, "rc_"); ok {
		i := strings.LastIndex(addr, ":")
		return i > 0 && g.address(addr[:i]) && g.number(addr[i+1:], 1, 65535)
	}
	return g.slots[name]
}

// accepts tells whether a command is one that lbsync may give.
func (g grammar) accepts(command string) bool {
	if w, ok := strings.CutSuffix(command, g.options); ok && strings.HasPrefix(command, "add server ") {
		f := strings.Split(w, " ")
		return len(f) == 11 && g.server(f[2]) && strings.HasPrefix(f[2], g.backend+"/rc_") && f[3] == "127.0.0.1:1" &&
			f[4] == "id" && g.number(f[5], 1, 1<<31-1) && strings.Join(f[6:], " ") == "weight 0 pool-purge-delay 1s pool-max-conn"
	}
	f := strings.Split(command, " ")
	switch {
	case command == "show info", command == "set server "+g.backend+"/rollcall-doctor.nobody state ready":
		return true
	case len(f) == 5 && f[0] == "set" && f[1] == "server" && f[3] == "fqdn":
		return g.server(f[2]) && f[4] == "slot.invalid"
	case len(f) == 5 && strings.HasPrefix(command, "show stat ") && strings.HasSuffix(command, " 4 -1"):
		return g.number(f[2], 1, 1000)
	case len(f) == 4 && f[0] == "show" && f[1] == "servers" && (f[2] == "state" || f[2] == "conn"):
		return f[3] == g.backend
	case len(f) == 5 && f[0] == "show" && f[1] == "stat":
		return f[2] == g.backend && f[3] == "6" && g.number(f[4], 1, 1<<31-1)
	case len(f) == 3 && (f[0] == "enable" && f[1] == "health" || f[0] == "del" && f[1] == "server" || (f[0] == "enable" || f[0] == "disable") && f[1] == "agent"):
		return g.server(f[2])
	case len(f) == 4 && strings.HasPrefix(command, "shutdown sessions server "):
		return g.server(f[3])
	case len(f) == 5 && f[0] == "set" && f[1] == "server" && f[3] == "state":
		return g.server(f[2]) && (f[4] == "ready" || f[4] == "drain" || f[4] == "maint")
	case len(f) == 5 && f[0] == "set" && f[1] == "server" && f[3] == "health":
		return g.server(f[2]) && f[4] == "down"
	case len(f) == 5 && f[0] == "set" && f[1] == "server" && f[3] == "weight":
		return g.server(f[2]) && (g.number(f[4], 0, 256) || f[4] == "0%" || f[4] == "100%")
	case len(f) == 7 && f[0] == "set" && f[1] == "server" && f[3] == "addr" && f[5] == "port":
		return g.server(f[2]) && (g.address(f[4]) && g.number(f[6], 1, 65535) || f[4] == "127.0.0.1" && f[6] == "1")
	}
	return false
}

// line tells whether a whole line is one that lbsync may send.
func (g grammar) line(line string) bool {
	commands := strings.Split(strings.TrimPrefix(line, "set severity-output number;"), ";")
	n := len(commands)
	if commands[n-1] != "show info" || len(line) > 16000 {
		return false
	}
	if commands = commands[:n-1]; len(commands) > 0 && commands[0] == "show info" {
		commands = commands[1:]
	}
	for _, c := range commands {
		if c == "show info" || !g.accepts(c) {
			return false
		}
	}
	return true
}

func TestGrammar(t *testing.T) {
	g := grammar{backend: "be", slots: map[string]bool{"s1": true}, options: " -1 check inter 2s"}
	good := []string{
		"add server be/rc_10.0.0.1:80 127.0.0.1:1 id 5 weight 0 pool-purge-delay 1s pool-max-conn -1 check inter 2s",
		"set server be/s1 fqdn slot.invalid", "show stat 3 4 -1", "enable agent be/s1", "disable agent be/s1", "set server be/s1 addr 127.0.0.1 port 1",
		"add server be/rc_2001:db8::1:80 127.0.0.1:1 id 5 weight 0 pool-purge-delay 1s pool-max-conn -1 check inter 2s",
		"set server be/s1 addr 10.0.0.1 port 80", "set server be/s1 weight 256", "set server be/s1 weight 0%", "set server be/s1 state maint",
		"set server be/s1 health down", "enable health be/s1", "del server be/s1", "shutdown sessions server be/s1", "show stat be 6 1", "show servers state be",
	}
	bad := []string{
		"", "show env", "set server other/s1 state maint", "set server be/s2 state maint", "set server be/s1 state maint ", "set server be/s1 weight 257",
		"set server be/s1 weight 07", "set server be/s1 addr 010.0.0.1 port 80", "set server be/s1 addr 10.0.0.1 port 0", "set server be/s1 addr a.b port 80",
		"set server be/s1 addr 127.0.0.1 port 80", "add server be/rc_10.0.0.1:80 10.0.0.1:80 id 5 weight 0 pool-purge-delay 1s pool-max-conn -1 check inter 2s",
		"set server be/s1 fqdn a.b", "show stat be 4 -1", "show stat -1 4 -1", "add server be/s1 127.0.0.1:1 id 5 weight 0 pool-purge-delay 1s pool-max-conn -1 check inter 2s",
		"add server be/rc_10.0.0.1:80 127.0.0.1:1 id 5 weight 9 pool-purge-delay 1s pool-max-conn -1 check inter 2s",
		"add server be/rc_10.0.0.1:80 127.0.0.1:1 id 5 weight 0 pool-purge-delay 1s pool-max-conn -1 check inter 2s enabled", "set\tserver be/s1 state maint",
	}
	for _, c := range good {
		if !g.accepts(c) || !g.line("set severity-output number;show info;"+c+";show info") || !g.line("set severity-output number;"+c+";show info") {
			t.Errorf("refuses %q", c)
		}
	}
	for _, c := range bad {
		if g.accepts(c) {
			t.Errorf("accepts %q", c)
		}
	}
	for _, l := range []string{"", "show info;show info;show env", "show info;x;show info", "show info;;show info", "x;show info", "show info;show info;show info"} {
		if g.line(l) {
			t.Errorf("accepts the line %q", l)
		}
	}
}

// FuzzRender renders any op for any backend. What is not refused must be of the
// grammar.
func FuzzRender(f *testing.F) {
	f.Add(uint8(0), "be", "rc_10.0.0.1:80", 5, "10.0.0.1:80", 0, false)
	f.Add(uint8(1), "be", "s1", 1, "[2001:db8::1]:80", 0, false)
	f.Add(uint8(7), "be", "s1", 1, "", 257, true)
	f.Add(uint8(7), "be", "s1;show env", 1, "", 100, true)
	f.Add(uint8(3), "be\nx", "s1", 1, "", 0, false)
	f.Add(uint8(1), "be", "s1", 1, "[fe80::1%;]:80", 0, false)
	c, err := New(Config{Socket: "/none", ServerOptions: "check inter 2s"}, zerolog.Nop())
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, kind uint8, backend, name string, id int, addr string, weight int, percent bool) {
		a, _ := netip.ParseAddrPort(addr) // none is the zero one
		command, err := c.Render(backend, lbsync.Op{Kind: lbsync.Kind(kind), Name: name, ID: id, Addr: a, Weight: weight, Percent: percent})
		if err != nil {
			return
		}
		for i := range len(command) {
			if b := command[i]; b < ' ' || b > '~' || strings.IndexByte(";\\\"'#$<>|", b) >= 0 {
				t.Fatalf("byte %q in %q", b, command)
			}
		}
		want := 3
		switch f := strings.Split(command, " "); f[0] {
		case "add":
			want = 15
		case "shutdown":
			want = 4
		case "set":
			want = 5
			if f[3] == "addr" {
				want = 7
			}
		}
		if n := len(strings.Split(command, " ")); n != want {
			t.Fatalf("%d words, want %d: %q", n, want, command)
		}
		if _, err := frame([]string{command}, true); err != nil && len(command) < 7000 {
			t.Fatal(err)
		}
	})
}
