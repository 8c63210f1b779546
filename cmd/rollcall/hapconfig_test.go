package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rs/zerolog"

	"rollcall/lbsync"
	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// TestRefusedBackend has haproxy.cfg of people who come from Consul's DNS: what cannot
// work is said once, with the line to change, by every way to ask, and the others go on.
func TestRefusedBackend(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{
		Sections: []string{"resolvers dns\n  nameserver none 127.0.0.1:9"},
		Backends: []haproxytest.Backend{
			{Name: "be", Extra: []string{"server-template s 1-3 slot.invalid:1 disabled resolvers dns init-addr last,127.0.0.1"}},
			{Name: "good", Slots: 3},
		},
	})}
	a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
	s.spawn(t, "register", "--service", "web", "--addr", a.Addr().String())
	s.spawn(t, "register", "--service", "api", "--addr", b.Addr().String())
	for svc, i := range map[string]*haproxytest.Instance{"web": a, "api": b} {
		haproxytest.Poll(t, svc+" is registered", func() error {
			if out, stderr, _ := s.rollcall(t, "instances", svc); !strings.Contains(out, i.Addr().String()) {
				return errors.New(out + stderr)
			}
			return nil
		})
	}
	args := []string{"lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--backend", "api=good", "--allow", "127.0.0.0/8"}
	if out, stderr, code := s.rollcall(t, append(args, "--once")...); code != 1 || !strings.Contains(stderr, "`resolvers`") || !strings.Contains(stderr, "backend be") {
		t.Errorf("--once: exit %d, %s%s", code, out, stderr)
	}
	answered(t, "http://"+s.ha.Addr("good")+"/", b)

	m := s.monitor(t, args...)
	m.ready(t, "backend be is not driven: its server-template of s1 has `resolvers`")
	haproxytest.Poll(t, "explain says why", func() error {
		out, stderr, _ := s.rollcall(t, "explain", "web", a.Addr().String())
		if !strings.Contains(out, "not served: its server-template of s1 has `resolvers`") || strings.Contains(out, "--allow") {
			return errors.New(out + stderr)
		}
		return nil
	})
	if out, _, code := s.rollcall(t, "wait", "web", "--timeout", "1s"); code != 4 {
		t.Errorf("wait: exit %d, want 4: %s", code, out)
	}
	if out, stderr, code := s.rollcall(t, "wait", "api"); code != 0 || !strings.Contains(out, "1 balancer") {
		t.Errorf("wait for the other service: exit %d, %s%s", code, out, stderr)
	}
	if n := strings.Count(m.out.String(), "is not driven"); n != 1 {
		t.Errorf("said %d times: %s", n, m.out.String())
	}
}

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
