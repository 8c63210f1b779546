package main

import (
	"encoding/json"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// imports is the map of the project: each package, and the others that it may
// import. A package or an arrow that is not here is a decision to make.
var imports = map[string][]string{
	"registrar":                      {"registrar/regular"},
	"registrar/child":                {},
	"registrar/docker":               {"registrar", "registrar/health", "registrar/regular"},
	"registrar/docker/dockertest":    {},
	"registrar/health":               {"registrar", "registrar/child", "registrar/regular"},
	"registrar/idfile":               {"registrar"},
	"registrar/redistest":            {},
	"registrar/regular":              {},
	"reaper":                         {"registrar"},
	"notifier":                       {"registrar"},
	"notifier/httpapi":               {"notifier", "registrar"},
	"lbsync":                         {"notifier", "registrar", "registrar/regular"},
	"lbsync/haproxy":                 {"lbsync", "registrar/regular"},
	"lbsync/identity":                {"lbsync", "registrar", "registrar/regular"},
	"lbsync/balancertest":            {"lbsync", "lbsync/haproxy/haproxytest"},
	"lbsync/dataplane":               {"lbsync", "registrar/regular"},
	"lbsync/dataplane/dataplanetest": {},
	"lbsync/haproxy/haproxytest":     {},
	"cmd/internal/logqueue":          {},
	"cmd/rollcall":                   {"cmd/internal/logqueue", "lbsync", "lbsync/dataplane", "lbsync/haproxy", "lbsync/identity", "notifier", "notifier/httpapi", "reaper", "registrar", "registrar/child", "registrar/docker", "registrar/health", "registrar/idfile", "registrar/regular"},
	"scripts/deploy/app":             {},
	"scripts/camera":                 {},
	"scripts/faultsuite":             {"lbsync/haproxy/haproxytest", "registrar", "registrar/redistest"},
	"scripts/recorder":               {},
	"scripts/benchmark":              {"lbsync", "lbsync/haproxy", "lbsync/haproxy/haproxytest", "notifier", "registrar", "registrar/redistest"},
}

// only lists who alone may import what.
var only = map[string][]string{
	"github.com/haproxytech/client-native/v5": {"lbsync/dataplane", "lbsync/dataplane/dataplanetest", "lbsync/haproxy"},
	"github.com/moby/moby/":                   {"registrar/docker", "registrar/docker/dockertest"},
	"github.com/prometheus/":                  {"cmd/rollcall"},
	"github.com/urfave/cli/v2":                {"cmd/rollcall"},
}

func TestImports(t *testing.T) {
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports", "./...")
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for dec := json.NewDecoder(strings.NewReader(string(out))); dec.More(); {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := dec.Decode(&p); err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(p.ImportPath, "rollcall/")
		seen[name] = true
		allowed, ok := imports[name]
		if !ok {
			t.Errorf("package %s is not on the map", name)
		}
		for _, i := range p.Imports {
			if rest, ours := strings.CutPrefix(i, "rollcall/"); ours && !slices.Contains(allowed, rest) {
				t.Errorf("%s imports %s", name, rest)
			}
			for path, who := range only {
				if strings.HasPrefix(i, path) && !slices.Contains(who, name) {
					t.Errorf("%s imports %s, which only %v may", name, i, who)
				}
			}
		}
	}
	for name := range imports {
		if !seen[name] {
			t.Errorf("package %s is on the map and not there", name)
		}
	}
}
