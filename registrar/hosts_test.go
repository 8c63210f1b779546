package registrar

import (
	"slices"
	"strings"
	"testing"
)

func TestHosts(t *testing.T) {
	for _, c := range []struct{ url, want string }{
		{"redis://127.0.0.1:6379/0", "127.0.0.1:6379"},
		{"rediss://user:p%40ss@redis.example:7000", "redis.example:7000"},
		{"redis://[fd00::1]/3", "[fd00::1]:6379"},
		{"redis+sentinel://s1,10.0.0.2:5000/main/0", "s1:26379 10.0.0.2:5000"},
		{"redis+cluster://a:p@b:1,[fd00::2]", "b:1 [fd00::2]:6379"},
		{"unix:///run/redis.sock", ""},
		{"redis+other://a", ""},
		{"redis+cluster://", ""},
		{"nonsense", ""},
	} {
		got, err := Hosts(c.url)
		if !slices.Equal(got, strings.Fields(c.want)) || (err == nil) != (c.want != "") {
			t.Errorf("%s: %q, %v", c.url, got, err)
		}
	}
}
