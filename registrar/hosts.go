package registrar

import (
	"net"
	"strings"

	"github.com/redis/go-redis/v9"
)

// Hosts returns the HOST:PORTs that a URL names, in its order: of the server, of
// the Sentinels, or of nodes of the Cluster. It does no I/O. Its error is
// Access.Open's for the same URL.
func Hosts(rawURL string) ([]string, error) {
	scheme, rest, _ := strings.Cut(rawURL, "://")
	base, form, _ := strings.Cut(scheme, "+")
	if base != "redis" && base != "rediss" {
		return nil, errURL
	}
	switch form {
	case "":
		o, err := redis.ParseURL(rawURL)
		if err != nil {
			return nil, errURL
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
