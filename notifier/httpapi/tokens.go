package httpapi

import (
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"net/netip"
	"path"
	"strings"

	"rollcall/registrar"
)

const (
	// MinToken is the fewest characters of a token.
	MinToken = 16
	// MaxTokens is how many tokens a file may have: it is read at every write.
	MaxTokens = 1000
)

// Tokens are what allows writes: named tokens, each for some services or all, or a lone
// one without a name for all. It holds their digests only. It never changes, so any
// goroutine may use it; the zero value allows nothing.
type Tokens struct{ all []token }

type token struct {
	name     string // empty = the lone token
	digest   [sha256.Size]byte
	patterns []string // of services' names, with *; none = every service
}

// ParseTokens reads the text of a token file. A file of one line with one word is that
// token, which has no name. Else each line is NAME TOKEN [SERVICE-PATTERN…], or blank, or
// begins with #. Errors name file and the line, and never quote it: any word of a wrong
// line may be a token.
//
// Before tokens had names the one line was a token, whatever was in it. So of a file with
// no other line it still is, spaces included, unless its second word is long enough to be
// a named token.
func ParseTokens(file string, text []byte) (Tokens, error) {
	whole := strings.TrimRight(string(text), "\r\n")
	lines := strings.Split(whole, "\n")
	type line struct {
		number int
		words  []string
	}
	var said []line
	for i, l := range lines {
		if words := strings.Fields(l); len(words) > 0 && words[0][0] != '#' {
			said = append(said, line{i + 1, words})
		}
	}
	wrong := func(number int, format string, args ...any) (Tokens, error) {
		return Tokens{}, fmt.Errorf("token file %s:%d: %s", file, number, fmt.Sprintf(format, args...))
	}
	switch {
	case len(said) == 0:
		return wrong(1, "it has no token; want one of at least %d characters, or lines NAME TOKEN [SERVICE-PATTERN…]", MinToken)
	case len(said) > MaxTokens:
		return wrong(said[MaxTokens].number, "want at most %d tokens", MaxTokens)
	case len(said) == 1 && (len(said[0].words) == 1 || len(lines) == 1 && len(said[0].words[1]) < MinToken):
		secret := said[0].words[0]
		if len(lines) == 1 {
			secret = whole
		}
		if len(secret) < MinToken {
			return wrong(said[0].number, "the token is too short: want at least %d characters", MinToken)
		}
		return Tokens{[]token{{digest: sha256.Sum256([]byte(secret))}}}, nil
	}
	var t Tokens
	names, digests := map[string]int{}, map[[sha256.Size]byte]int{} // and their lines
	for _, l := range said {
		if len(l.words) < 2 {
			return wrong(l.number, "want NAME TOKEN [SERVICE-PATTERN…]; a token without a name must be the only one")
		}
		if _, err := registrar.ParseService(l.words[0]); err != nil {
			return wrong(l.number, "the first word is no name: want 1 to 63 lower-case letters, digits, '.', '_' and '-', beginning with a letter or a digit")
		}
		if len(l.words[1]) < MinToken {
			return wrong(l.number, "the second word, the token, is too short: want at least %d characters", MinToken)
		}
		one := token{name: l.words[0], digest: sha256.Sum256([]byte(l.words[1])), patterns: l.words[2:]}
		for i, p := range one.patterns {
			if _, err := registrar.ParseService(strings.ReplaceAll(p, "*", "x")); err != nil {
				return wrong(l.number, "word %d is no pattern of services: want a service's name, in which * stands for any characters", i+3)
			}
		}
		if first, ok := names[one.name]; ok {
			return wrong(l.number, "it has the name of line %d", first)
		}
		if first, ok := digests[one.digest]; ok {
			return wrong(l.number, "it has the token of line %d", first)
		}
		names[one.name], digests[one.digest] = l.number, l.number
		t.all = append(t.all, one)
	}
	return t, nil
}

// Named is how many tokens have names: 0 if there is a lone one.
func (t Tokens) Named() int {
	n := 0
	for _, one := range t.all {
		if one.name != "" {
			n++
		}
	}
	return n
}

// find returns the token that was given. How long that takes does not depend on which
// it is, nor on how much of one was right.
func (t Tokens) find(given string) (found token, ok bool) {
	digest, at := sha256.Sum256([]byte(given)), -1
	for i := range t.all {
		at = subtle.ConstantTimeSelect(subtle.ConstantTimeCompare(t.all[i].digest[:], digest[:]), i, at)
	}
	if at < 0 {
		return token{}, false
	}
	return t.all[at], true
}

// allows tells whether the token is for a service.
func (t token) allows(svc registrar.Service) error {
	for _, p := range t.patterns {
		if ok, err := path.Match(p, string(svc)); ok && err == nil { // of a name's characters only * means something to it
			return nil
		}
	}
	if len(t.patterns) == 0 {
		return nil
	}
	return fmt.Errorf("the token %s may not change the service %s, only %s: see its line in --token-file", t.name, svc, strings.Join(t.patterns, " "))
}

// by is what overrides and events say of who wrote with the token from an address.
func (t token) by(from netip.Addr) string {
	if t.name != "" {
		return t.name
	}
	return "http " + from.Unmap().WithZone("").String()
}
