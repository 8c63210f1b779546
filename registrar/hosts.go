package registrar

import (
	"net"
	"strings"
)

// HasPassword tells whether a URL has a password that is not empty. It takes every text.
func HasPassword(rawURL string) bool {
	_, _, rest, err := cutURL(rawURL)
	if err != nil {
		return false
	}
	authority, _, _ := strings.Cut(rest, "/")
	at := max(strings.LastIndexByte(authority, '@'), 0)
	_, password, _ := strings.Cut(authority[:at], ":")
	return password != ""
}

// Hosts returns the HOST:PORTs that a URL names, in its order: of the server, of
// the Sentinels, or of nodes of the Cluster. It does no I/O. Its error is
// Access.Open's for the same URL.
func Hosts(rawURL string) ([]string, error) {
	base, form, rest, err := cutURL(rawURL)
	if err != nil {
		return nil, err
	}
	switch form {
	case "":
		o, _, err := parseServer(base, rest)
		if err != nil {
			return nil, err
		}
		if _, _, err := net.SplitHostPort(o.Addr); err != nil {
			return nil, errURL
		}
		return []string{o.Addr}, nil
	case "sentinel":
		_, hosts, err := parseHosts(base, rest, sentinelPort)
		return hosts, err
	case "cluster":
		_, hosts, err := parseHosts(base, rest, clusterPort)
		return hosts, err
	}
	return nil, errURL
}
