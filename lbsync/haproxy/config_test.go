package haproxy

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestWords(t *testing.T) {
	for _, tt := range []struct {
		line string
		want []string
	}{
		{"", nil},
		{"  # nothing", nil},
		{"\toption  redispatch 1 # why", []string{"option", "redispatch", "1"}},
		{`a "b c" 'd # e' f\ g h\#i`, []string{"a", "b c", "d # e", "f g", "h#i"}},
		{`a "" b`, []string{"a", "", "b"}},
		{`a "\"" '\'`, []string{"a", `"`, `\`}},
		{"a b\r", []string{"a", "b"}},
		{"a#b", []string{"a"}},
	} {
		if got, err := words(tt.line); err != nil || !slices.Equal(got, tt.want) {
			t.Errorf("%q: %q, %v", tt.line, got, err)
		}
	}
	if got, err := words(`a "b`); err == nil {
		t.Errorf("an open quote: %q", got)
	}
}

// TestReadConfig has what a configuration of one section cannot show: defaults
// that end at the next defaults, and several files.
func TestReadConfig(t *testing.T) {
	file := func(text string) string {
		path := filepath.Join(t.TempDir(), "haproxy.cfg")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	one := file("global\n server-state-base /var/lib\ndefaults\n mode http\n http-reuse never\n option redispatch\n load-server-state-from-file local\n default-server check init-addr last,::1\n" +
		"listen l\n no option redispatch\nfrontend f\n default_backend a\n use_backend b if X\nbackend a\n server-template s 1-2 slot.invalid:1\n")
	two := file("backend b\n server-state-file-name other\ndefaults\n mode tcp\nbackend c\n")
	f, err := ReadConfig([]string{one, two})
	if err != nil {
		t.Fatal(err)
	}
	a, b, c, l := f.Proxy("a"), f.Proxy("b"), f.Proxy("c"), f.Proxy("l")
	if a == nil || b == nil || c == nil || l == nil || f.Proxy("f") != nil {
		t.Fatalf("%+v", f)
	}
	if !a.Options["redispatch"] || !b.Options["redispatch"] || c.Options["redispatch"] || l.Options["redispatch"] || !a.HTTP || c.HTTP {
		t.Errorf("defaults are not where they belong: %+v", f)
	}
	if !a.Private() || !b.Private() || c.Private() {
		t.Errorf("http-reuse: %q, %q, %q", a.Reuse, b.Reuse, c.Reuse)
	}
	if len(a.Templates) != 1 || a.Templates[0] != (Template{"slot.invalid", "last,::1"}) {
		t.Errorf("%+v", a.Templates)
	}
	for _, tt := range []struct {
		p    *Proxy
		want string
	}{{a, "/var/lib/a"}, {b, "/var/lib/other"}, {c, ""}} {
		if got, err := f.StatePath(tt.p); got != tt.want || err != nil {
			t.Errorf("%s: %q, %v", tt.p.Name, got, err)
		}
	}
	if len(f.Senders("a")) != 1 || len(f.Senders("b")) != 1 || len(f.Senders("c")) != 0 || len(f.Senders("l")) != 1 {
		t.Error("senders")
	}
	for _, text := range []string{".if 1\n", "defaults d\nbackend a from d\n"} {
		if _, err := ReadConfig([]string{file(text)}); !errors.Is(err, ErrConditional) {
			t.Errorf("%q: %v", text, err)
		}
	}
	if _, err := ReadConfig([]string{"/nonexistent"}); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
