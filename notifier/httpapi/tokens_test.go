package httpapi

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"rollcall/registrar"
)

// TestParseTokens reads files of tokens, right and wrong ones, whose errors name the line
// and quote nothing of it.
func TestParseTokens(t *testing.T) {
	t.Parallel()
	const one, two = "0123456789abcdef", "fedcba9876543210"
	many := strings.Builder{}
	for i := range MaxTokens + 1 {
		fmt.Fprintf(&many, "n%d token-%016d\n", i, i)
	}
	for _, c := range []struct {
		name, text string
		err        string            // else
		want       map[string]string // by whom it is, of each token that is taken
	}{
		{"a lone token", one + "\n", "", map[string]string{one: "http 10.0.0.1"}},
		{"a lone token as it is", " a token of 16 or more\r\n\r\n", "", map[string]string{" a token of 16 or more": "http 10.0.0.1"}},
		{"a lone token below a comment", "# made by hand\n\n" + one + "\n", "", map[string]string{one: "http 10.0.0.1"}},
		{"a lone token, one character too short", one[1:], ":1: the token is too short: want at least 16 characters", nil},
		{"one line with a second word too short for a token", "ci " + one[1:] + " x", "", map[string]string{"ci " + one[1:] + " x": "http 10.0.0.1"}},
		{"one with a name", "ci " + one, "", map[string]string{one: "ci"}},
		{"two", "# who\n\nci\t" + one + "  web-* api\n  deploy " + two + "\r\n", "", map[string]string{one: "ci", two: "deploy"}},
		{"nothing", "", ":1: it has no token", nil},
		{"comments only", "# 0123456789abcdefgh\n", ":1: it has no token", nil},
		{"no name", "ci " + one + "\n" + two + "\n", ":2: want NAME TOKEN", nil},
		{"two without names", one + "\n" + two + "\n", ":1: want NAME TOKEN", nil},
		{"a name that is none", "CI " + one + "\n", ":1: the first word is no name", nil},
		{"a long name", strings.Repeat("n", 64) + " " + one + "\n", ":1: the first word is no name", nil},
		{"a short token", "ci " + one + "\n\nx " + two[1:] + "\n", ":3: the second word, the token, is too short", nil},
		{"a pattern that is none", "ci " + one + " web-? \n", ":1: word 3 is no pattern", nil},
		{"another pattern that is none", "ci " + one + " web -api\n", ":1: word 4 is no pattern", nil},
		{"a name twice", "ci " + one + "\nci " + two + "\n", ":2: it has the name of line 1", nil},
		{"a token twice", "ci " + one + "\n#\nx " + one + "\n", ":3: it has the token of line 1", nil},
		{"too many", many.String(), ":1001: want at most 1000 tokens", nil},
	} {
		got, err := ParseTokens("file", []byte(c.text))
		if c.err != "" {
			if err == nil || !strings.HasPrefix(err.Error(), "token file file"+c.err) {
				t.Errorf("%s: %v, want %s", c.name, err, c.err)
				continue
			}
			for w := range strings.FieldsSeq(c.text) {
				if len(w) > 10 && strings.Contains(err.Error(), w) {
					t.Errorf("%s: %v quotes %s", c.name, err, w)
				}
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		named := 0
		for given, want := range c.want {
			found, ok := got.find(given)
			if by := found.by(netip.MustParseAddr("::ffff:10.0.0.1")); !ok || by != want {
				t.Errorf("%s: %q is %v by %q, want %q", c.name, given, ok, by, want)
			}
			if !strings.HasPrefix(want, "http ") {
				named++
			}
		}
		if got.Named() != named {
			t.Errorf("%s: %d names, want %d", c.name, got.Named(), named)
		}
		for _, other := range []string{"", "ci", one + " ", one[1:], "x" + one} {
			if _, ok := got.find(other); ok {
				t.Errorf("%s: %q is taken", c.name, other)
			}
		}
	}
}

// TestTokenServices holds which services a token's patterns are for.
func TestTokenServices(t *testing.T) {
	t.Parallel()
	tokens, err := ParseTokens("file", []byte("all 0123456789abcdef\nci fedcba9876543210 web-* *.prod api a*b*c\n"))
	if err != nil {
		t.Fatal(err)
	}
	ci, _ := tokens.find("fedcba9876543210")
	all, _ := tokens.find("0123456789abcdef")
	for svc, want := range map[registrar.Service]bool{
		"web-1": true, "web-": true, "web": false, "xweb-1": false, "api": true, "api2": false, "x.prod": true, "x-prod": false, "abc": true, "a1b2c": true, "ab": false,
	} {
		err := ci.allows(svc)
		if (err == nil) != want {
			t.Errorf("%s: %v, want %v", svc, err, want)
		}
		if err != nil && err.Error() != "the token ci may not change the service "+string(svc)+", only web-* *.prod api a*b*c: see its line in --token-file" {
			t.Errorf("%s: %v", svc, err)
		}
		if err := all.allows(svc); err != nil {
			t.Error(err)
		}
	}
	if _, ok := (Tokens{}).find(""); ok {
		t.Error("the zero value allows something")
	}
}
