package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rs/zerolog"

	"rollcall/lbsync"
)

// TestConfigOfHAProxy: lbsync's --config tells what no socket does, and says what it
// cannot use.
func TestConfigOfHAProxy(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		private    bool
		err, said  string
	}{
		{"reuse never", "defaults\n mode http\nbackend be\n http-reuse never\n", true, "", ""},
		{"of the defaults", "defaults\n mode http\n http-reuse never\nbackend be\n", true, "", ""},
		{"taken back", "defaults\n mode http\n http-reuse never\nbackend be\n http-reuse safe\n", false, "", ""},
		{"of mode tcp", "defaults\n http-reuse never\nbackend be\n mode tcp\n", false, "", ""},
		{"nothing of it", "backend be\n mode http\n", false, "", ""},
		{"another file", "backend other\n", false, "give every file", ""},
		{"a frontend of that name", "frontend be\n", false, "give every file", ""},
		{"a quote that is open", "backend be\n description \"x\n", false, "--config", ""},
		{"conditions", ".if 1\nbackend be\n http-reuse never\n.endif\n", false, "", "left out"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "haproxy.cfg")
			must(t, os.WriteFile(file, []byte(tt.text), 0o600))
			backends := []lbsync.BackendConfig{{Service: "web", Backend: "be"}}
			said := &strings.Builder{}
			err := readConfig([]string{file}, backends, zerolog.New(said))
			if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Errorf("got %v, want %q", err, tt.err)
			}
			if backends[0].Private != tt.private {
				t.Errorf("private: %v", backends[0].Private)
			}
			if !strings.Contains(said.String(), tt.said) || tt.said == "" && said.Len() > 0 {
				t.Errorf("said %q, want %q", said, tt.said)
			}
		})
	}
	if err := readConfig([]string{"/nonexistent"}, nil, zerolog.Nop()); err == nil {
		t.Error("a file that is not there is no error")
	}
}
