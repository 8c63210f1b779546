package haproxy

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"rollcall/lbsync"
	"rollcall/registrar/regular"
)

// Config file reading, for `rollcall doctor` and lbsync's --config: the few keywords
// that no socket tells. haproxy.cfg is only ever read.

// ErrConditional says that a configuration has .if blocks or sections "from"
// others, which this reader does not evaluate: nothing is known of it.
var ErrConditional = errors.New(".if blocks and \"from\" are not understood here")

// File is what matters of configuration files.
type File struct {
	StateFile string // server-state-file
	StateBase string // server-state-base
	Proxies   []Proxy
}

// Proxy is a frontend, a backend or a listen section with what it has of its
// defaults.
type Proxy struct {
	Kind, Name string
	HTTP       bool            // mode http
	LoadState  string          // load-server-state-from-file: none, global or local
	StateName  string          // server-state-file-name; its own name if it names none
	Options    map[string]bool // option NAME; absent or false = not set
	Targets    []string        // backends that a frontend sends to
	Reuse      string          // http-reuse; empty = HAProxy's own choice, safe
	Templates  []Template
	initAddr   string // of default-server
}

// Template is one server-template.
type Template struct {
	Host     string
	InitAddr string // empty = HAProxy's own choice
}

// Proxy returns the section that holds a backend, or nil.
func (f *File) Proxy(backend string) *Proxy {
	for i, p := range f.Proxies {
		if p.Name == backend && p.Kind != "frontend" {
			return &f.Proxies[i]
		}
	}
	return nil
}

// Senders returns the sections that accept connections for a backend, as far as
// they name it.
func (f *File) Senders(backend string) []Proxy {
	var ps []Proxy
	for _, p := range f.Proxies {
		if p.Kind == "listen" && p.Name == backend || slices.Contains(p.Targets, backend) {
			ps = append(ps, p)
		}
	}
	return ps
}

// Private tells whether a client's connection keeps a server's connection for itself
// (http-reuse never, in mode http).
func (p *Proxy) Private() bool { return p.HTTP && p.Reuse == "never" }

// StatePath returns the state file that the backend p is loaded from: empty if
// none is, and an error if it cannot be told.
func (f *File) StatePath(p *Proxy) (string, error) {
	name := f.StateFile
	switch p.LoadState {
	case "global":
	case "local":
		name = p.StateName
	default:
		return "", nil
	}
	if name == "" {
		return "", nil
	}
	if !filepath.IsAbs(name) {
		name = filepath.Join(f.StateBase, name)
	}
	if !filepath.IsAbs(name) || strings.Contains(name, "$") {
		return "", fmt.Errorf("state file %q depends on the environment that HAProxy was started in", name)
	}
	return name, nil
}

// ReadConfig reads configuration files, in HAProxy's order.
func ReadConfig(paths []string) (*File, error) {
	f := &File{}
	var defaults, section Proxy
	for _, path := range paths {
		file, err := regular.Open(path)
		if err != nil {
			return nil, fmt.Errorf("read configuration: %w", err)
		}
		err = f.read(file, &defaults, &section)
		_ = file.Close() // it was only read
		if err != nil {
			return nil, fmt.Errorf("read configuration %s: %w", path, err)
		}
	}
	f.end(&defaults, &section)
	return f, nil
}

func (f *File) read(r io.Reader, defaults, section *Proxy) error {
	if section.Options == nil {
		section.Options = map[string]bool{} // of what stands before any section
	}
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		w, err := words(lines.Text())
		if err != nil {
			return err
		}
		if len(w) == 0 {
			continue
		}
		switch w[0] {
		case "global", "defaults", "frontend", "backend", "listen", "peers", "resolvers", "userlist", "mailers", "ring", "cache",
			"program", "http-errors", "log-forward", "fcgi-app", "crt-store", "traces", "acme", "log-profile":
			if slices.Contains(w[1:], "from") {
				return ErrConditional
			}
			f.end(defaults, section)
			*section = Proxy{Kind: w[0], Options: map[string]bool{}}
			if len(w) > 1 {
				section.Name = w[1]
			}
			switch w[0] {
			case "frontend", "backend", "listen":
				section.HTTP, section.LoadState, section.initAddr, section.Reuse = defaults.HTTP, defaults.LoadState, defaults.initAddr, defaults.Reuse
				section.StateName = section.Name
				for k, v := range defaults.Options {
					section.Options[k] = v
				}
			}
		default:
			if err := f.keyword(section, w); err != nil {
				return err
			}
		}
	}
	return lines.Err()
}

// end closes a section.
func (f *File) end(defaults, section *Proxy) {
	switch section.Kind {
	case "defaults":
		*defaults = *section
	case "frontend", "backend", "listen":
		f.Proxies = append(f.Proxies, *section)
	}
	section.Kind = ""
}

func (f *File) keyword(p *Proxy, w []string) error {
	arg := func(i int) string {
		if i < len(w) {
			return w[i]
		}
		return ""
	}
	switch w[0] {
	case ".if", ".elif", ".else", ".endif":
		return ErrConditional
	case "server-state-file":
		f.StateFile = arg(1)
	case "server-state-base":
		f.StateBase = arg(1)
	case "mode":
		p.HTTP = arg(1) == "http"
	case "http-reuse":
		p.Reuse = arg(1)
	case "load-server-state-from-file":
		p.LoadState = arg(1)
	case "server-state-file-name":
		if name := arg(1); name != "" && name != "use-backend-name" {
			p.StateName = name
		}
	case "option":
		p.Options[arg(1)] = true
	case "no":
		if arg(1) == "option" {
			p.Options[arg(2)] = false
		}
	case "default_backend", "use_backend":
		p.Targets = append(p.Targets, arg(1))
	case "default-server":
		if a := after(w, "init-addr"); a != "" {
			p.initAddr = a
		}
	case "server-template":
		host, _, _ := strings.Cut(arg(3), ":")
		t := Template{Host: host, InitAddr: p.initAddr}
		if a := after(w, "init-addr"); a != "" {
			t.InitAddr = a
		}
		p.Templates = append(p.Templates, t)
	}
	return nil
}

// after returns the word after name, or nothing.
func after(w []string, name string) string {
	if i := slices.Index(w, name); i >= 0 && i+1 < len(w) {
		return w[i+1]
	}
	return ""
}

// words splits a line as configuration.txt 2.2 has it: blanks, both quotes, the
// backslash, and # for a comment.
func words(line string) ([]string, error) {
	var out []string
	var b strings.Builder
	quote, in := byte(0), false
	for i := 0; i < len(line); i++ {
		ch := line[i]
		switch {
		case quote == '\'':
			if ch == quote {
				quote = 0
			} else {
				b.WriteByte(ch)
			}
		case ch == '\\' && i+1 < len(line):
			i++
			b.WriteByte(line[i])
			in = true
		case quote == '"':
			if ch == quote {
				quote = 0
			} else {
				b.WriteByte(ch)
			}
		case ch == '"' || ch == '\'':
			quote, in = ch, true
		case ch == '#':
			i = len(line)
		case ch == ' ' || ch == '\t' || ch == '\r':
			if in {
				out = append(out, b.String())
				b.Reset()
				in = false
			}
		default:
			b.WriteByte(ch)
			in = true
		}
	}
	if quote != 0 {
		return nil, fmt.Errorf("a quote is not closed: %q", line)
	}
	if in {
		out = append(out, b.String())
	}
	return out, nil
}

// ErrStateForm says that a file is no state file: HAProxy would ignore it.
var ErrStateForm = errors.New("no state file of HAProxy's")

// Kept returns how many of the servers a state file would bring back as they
// are now. It returns fs.ErrNotExist or fs.ErrPermission, wrapped, where that is
// why, and ErrStateForm.
func Kept(path, backend string, servers []ServerFacts) (int, error) {
	text, err := regular.Read(path)
	if err != nil {
		return 0, err
	}
	first, rest, _ := strings.Cut(string(text), "\n")
	if strings.TrimSpace(first) != "1" {
		return 0, fmt.Errorf("%s: %w", path, ErrStateForm)
	}
	saved := map[string]netip.AddrPort{}
	for row := range strings.Lines(rest) {
		col := strings.Fields(row)
		if len(col) < stateColumns || col[colBackend] != backend {
			continue
		}
		ip, err1 := netip.ParseAddr(col[colAddr])
		port, err2 := strconv.ParseUint(col[colPort], 10, 16)
		admin, err3 := strconv.Atoi(col[colAdmin])
		if errors.Join(err1, err2, err3) == nil && admin&adminMaint == 0 {
			saved[col[colName]] = netip.AddrPortFrom(ip, uint16(port))
		}
	}
	kept := 0
	for _, s := range servers {
		if s.Slot && s.Admin != lbsync.Maint && saved[s.Name] == s.Addr {
			kept++
		}
	}
	return kept, nil
}
