package haproxy

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"rollcall/lbsync"
)

// frameBytes is what a line has beside its commands: client-native's own
// "set severity-output number;", the two reports and the newline.
const frameBytes = len("set severity-output number;") + len(reportCommand)*2 + len(";\n")

const reportCommand = "show info"

// forbidden are the bytes that end a command, quote, comment, expand or begin
// a payload in HAProxy's command line (management.txt 9.3, "Unix Socket
// commands"). No command of ours has one.
const forbidden = ";\\\"'#$<>|"

// maxName bounds our servers' and backends' names, not other people's.
const maxName = 64

// Render returns the command that op becomes, or says what in op must not
// reach HAProxy. Nothing is repaired or left out.
func (c *Client) Render(backend string, op lbsync.Op) (string, error) {
	if err := checkName("backend", backend); err != nil {
		return "", err
	}
	if err := checkTarget(op.Name, op.ID); err != nil {
		return "", err
	}
	server := backend + "/" + op.Name
	var command string
	switch op.Kind {
	case lbsync.Add:
		if err := checkAddr(op.Addr); err != nil {
			return "", fmt.Errorf("server %s: %w", op.Name, err)
		}
		// Without an id, balance random and consistent hashing skip some
		// dynamic servers; without the pool settings HAProxy 2.6 never reuses
		// their connections.
		command = fmt.Sprintf("add server %s %s id %d weight 0 pool-purge-delay 1s pool-max-conn -1%s",
			server, op.Addr, op.ID, c.options)
		if op.Check && !c.checks {
			command += " check"
		}
	case lbsync.SetAddr:
		if err := checkAddr(op.Addr); err != nil {
			return "", fmt.Errorf("server %s: %w", op.Name, err)
		}
		command = fmt.Sprintf("set server %s addr %s port %d", server, op.Addr.Addr(), op.Addr.Port())
	case lbsync.EnableHealth:
		command = "enable health " + server
	case lbsync.SetReady:
		command = "set server " + server + " state ready"
	case lbsync.SetDrain:
		command = "set server " + server + " state drain"
	case lbsync.SetMaint:
		command = "set server " + server + " state maint"
	case lbsync.HealthDown:
		command = "set server " + server + " health down"
	case lbsync.SetWeight:
		if op.Weight < 0 || op.Weight > 256 {
			return "", fmt.Errorf("server %s: weight %d is not within 0 and 256", op.Name, op.Weight)
		}
		command = "set server " + server + " weight " + strconv.Itoa(op.Weight)
		if op.Percent {
			command += "%"
		}
	case lbsync.Shutdown:
		command = "shutdown sessions server " + server
	case lbsync.Delete:
		command = "del server " + server
	case lbsync.EnableAgent:
		command = "enable agent " + server
	case lbsync.DisableAgent:
		command = "disable agent " + server
	default:
		return "", fmt.Errorf("server %s: unknown kind of op %d", op.Name, op.Kind)
	}
	return command, checkCommand(command)
}

// peekCommand asks for one server and, as proof that the name was taken for
// the backend's, for the backend: types 2 (backend) and 4 (server).
func peekCommand(backend string, s lbsync.Server) string {
	return "show stat " + backend + " 6 " + strconv.Itoa(s.ID)
}

// batch is ops and the command of each that are to be sent, and looks to take when
// all of them have been.
type batch struct {
	ops      []lbsync.Op
	commands []string
	looks    []string
}

func (b *batch) empty() bool { return len(b.commands)+len(b.looks) == 0 }

// next takes the commands of one line off b: of a Delete alone, of others as many as
// fit, and limit at most; then looks likewise. The ops of one server stay in one line
// if they can: in a process that has taken over between two lines, the second half
// alone could make another instance's slot ready.
func (b *batch) next(limit int) []string {
	n := 0
	for n < len(b.commands) && n < limit && (n == 0 || b.ops[n].Kind != lbsync.Delete && fits(b.commands[:n], b.commands[n])) {
		n++
		if b.ops[n-1].Kind == lbsync.Delete {
			break
		}
	}
	if n < len(b.commands) && b.ops[n].Kind != lbsync.Delete {
		whole := n
		for whole > 0 && b.ops[whole].Name == b.ops[whole-1].Name {
			whole--
		}
		if whole > 0 {
			n = whole
		}
	}
	line := b.commands[:n:n]
	b.ops, b.commands = b.ops[n:], b.commands[n:]
	for len(b.commands) == 0 && len(b.looks) > 0 && (len(line) == 0 || len(line) < limit && fits(line, b.looks[0])) {
		line, b.looks = append(line, b.looks[0]), b.looks[1:]
	}
	return line
}

// paced is how many commands to send after a line of so many that took so long.
func paced(commands int, took time.Duration) int {
	return max(min(int(lineTime*time.Duration(commands)/max(took, 1)), maxCommands), fewCommands)
}

// fits tells whether more can be added to line.
func fits(line []string, more ...string) bool {
	n := frameBytes
	for _, c := range line {
		n += len(c) + 1
	}
	for _, c := range more {
		n += len(c) + 1
	}
	return len(line)+len(more) <= maxCommands && n <= maxLine
}

// frame returns the line for commands, with a report before them too if head. It
// is the last gate before the socket.
func frame(commands []string, head bool) (string, error) {
	for _, c := range commands {
		if err := checkCommand(c); err != nil {
			return "", err
		}
	}
	if !fits(commands) {
		return "", fmt.Errorf("%d commands do not fit into one line", len(commands))
	}
	var b strings.Builder
	if head {
		b.WriteString(reportCommand)
		b.WriteByte(';')
	}
	for _, c := range commands {
		b.WriteString(c)
		b.WriteByte(';')
	}
	b.WriteString(reportCommand)
	return b.String(), nil
}

func checkCommand(command string) error {
	for i := range len(command) {
		if b := command[i]; b < 0x20 || b > 0x7e || strings.IndexByte(forbidden, b) >= 0 {
			return fmt.Errorf("byte %q must not be in the command %q", b, command)
		}
	}
	return nil
}

func checkName(what, name string) error {
	if len(name) > maxName || !validName(name) {
		return fmt.Errorf("%s name %q is not 1 to %d of A-Za-z0-9_.:-", what, name, maxName)
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

// checkAddr refuses what is no address of one server, and an IPv4 address
// dressed as IPv6, which would not compare equal to itself.
func checkAddr(addr netip.AddrPort) error {
	ip := addr.Addr()
	switch {
	case !ip.IsValid():
		return fmt.Errorf("address %s is invalid", addr)
	case ip.Zone() != "":
		return fmt.Errorf("address %s has a zone", addr)
	case ip.IsUnspecified():
		return fmt.Errorf("address %s is unspecified", addr)
	case ip.IsMulticast():
		return fmt.Errorf("address %s is a multicast address", addr)
	case ip.Is4In6():
		return fmt.Errorf("address %s is IPv4 mapped into IPv6", addr)
	case ip == broadcast:
		return fmt.Errorf("address %s is the broadcast address", addr)
	case addr.Port() == 0:
		return fmt.Errorf("address %s has no port", addr)
	}
	return nil
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})
