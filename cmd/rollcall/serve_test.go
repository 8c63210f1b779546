package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// TestServe holds what `serve` takes, counts and refuses.
func TestServe(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	dir := t.TempDir()
	short, token, broken := filepath.Join(dir, "short"), filepath.Join(dir, "token"), filepath.Join(dir, "broken")
	for file, text := range map[string]string{short: "fifteen letters\n", token: pageToken + "\n", broken: "# who\nci 0123456789abcdef\n0123456789abcdeg\n"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		args []string
		want string
		code int
	}{
		{[]string{"--listen", "8300"}, "want an address and a port", exitUsage},
		{[]string{"more"}, "see rollcall serve --help", exitUsage},
		{[]string{"--token-file", short}, "at least 16 characters", exitUsage},
		{[]string{"--token-file", short + "er"}, "no such file", exitUsage},
		{[]string{"--token-file", broken}, broken + ":3: want NAME TOKEN [SERVICE-PATTERN…]", exitUsage},
		{[]string{"--tls-cert", short}, "--tls-cert and --tls-key go together", exitUsage},
		{[]string{"--tls-key", short}, "--tls-cert and --tls-key go together", exitUsage},
		{[]string{"--tls-cert", short + "er", "--tls-key", short}, "--tls-cert: open " + short + "er: no such file", exitUsage},
		{[]string{"--tls-cert", short, "--tls-key", short}, "--tls-cert " + short + ", --tls-key " + short + ": tls: failed to find any PEM data", exitUsage},
		{[]string{"--host", "ops.example:443"}, "want a name without a port", exitUsage},
		{[]string{"--pprof"}, "--pprof goes with --http", exitUsage},
		{[]string{"--listen", "192.0.2.1:1"}, "--listen: listen tcp 192.0.2.1:1", exitFailed},
		{[]string{"--redis", "redis+cluster://127.0.0.1:1"}, "Cluster", exitUsage},
	} {
		if _, stderr, code := s.rollcall(t, append([]string{"serve"}, c.args...)...); code != c.code || !strings.Contains(stderr, c.want) || strings.Contains(stderr, "0123456789") || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%v: exit %d %q, want %d %q", c.args, code, stderr, c.code, c.want)
		}
	}

	page := s.page(t, "serve", "--token-file", token, "--host", "ops.example", "--http", "127.0.0.1:0")
	m := &monitored{process: page.process, url: "http://" + served.FindStringSubmatch(page.out.String())[1]}
	m.ready(t, "ok")
	for _, auth := range []string{"Bearer guess", "Bearer " + pageToken} {
		if _, answer, err := page.do(http.MethodPost, "/v1/services/web/instances/127.0.0.1:1/maint?absent=true", `{"reason":"x"}`, "Authorization", auth); err != nil {
			t.Error(answer, err)
		}
	}
	m.shows(t, "rollcall_serve_writes_total", 1, 1)
	m.shows(t, "rollcall_serve_tokens_refused_total", 1, 1)
	if code, body, err := page.do(http.MethodGet, "/v1/status", ""); err != nil || code != http.StatusServiceUnavailable || !strings.Contains(body, "no reaper is armed") {
		t.Errorf("/v1/status: %d %s, %v", code, body, err)
	}
	s.redis.Kill(t)
	m.ready(t, "redis does not answer")
	if code := page.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
}

// TestServeTLS has serve speak TLS with what is in its files at each handshake, and go on
// with the last good pair while they are broken, which it says once.
func TestServeTLS(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	put := func(from, to string) {
		t.Helper()
		text, err := os.ReadFile(from)
		if err == nil {
			err = os.WriteFile(to, text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	one, two := redistest.NewCertificates(t), redistest.NewCertificates(t)
	put(one.Cert, cert)
	put(one.Key, key)
	p := s.spawn(t, "serve", "--listen", "127.0.0.1:0", "--tls-cert", cert, "--tls-key", key)
	url := ""
	haproxytest.Poll(t, "serve serves", func() error {
		if found := regexp.MustCompile(`url=(https://\S+)`).FindStringSubmatch(p.out.String()); found != nil {
			url = found[1]
			return nil
		}
		return errors.New(p.out.String())
	})
	// answers demands an answer by a server whose certificate is of that CA.
	answers := func(of redistest.Certificates) {
		t.Helper()
		text, err := os.ReadFile(of.CA)
		if err != nil {
			t.Fatal(err)
		}
		cfg := &tls.Config{RootCAs: x509.NewCertPool(), ServerName: redistest.NameTLS}
		cfg.RootCAs.AppendCertsFromPEM(text)
		c := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: cfg}}
		r, err := c.Get(url + "/v1/history")
		if err != nil {
			t.Fatalf("%v\n%s", err, p.out)
		}
		r.Body.Close()
	}
	answers(one)
	put(two.Cert, cert) // and the key of another: as it is in the middle of a renewal
	for range 3 {
		answers(one)
	}
	put(two.Key, key)
	answers(two)
	if err := os.Remove(key); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		answers(two)
	}
	if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	haproxytest.Poll(t, "SIGHUP tells", func() error {
		if out := p.out.String(); !strings.Contains(out, "a file cannot be read") || !strings.Contains(out, "--tls-key: open "+key) {
			return errors.New(out)
		}
		return nil
	})
	put(one.Key, key)
	put(one.Cert, cert)
	answers(one)
	out := p.out.String()
	for what, want := range map[string]int{
		"the new certificate cannot be used; going on with the one before": 2,
		"tls: private key does not match public key":                       1,
		"using a new certificate":                                          2,
	} {
		if n := strings.Count(out, what); n != want {
			t.Errorf("%q is said %d times, want %d:\n%s", what, n, want, out)
		}
	}
	if code := p.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
}

// TestServeInTheClear warns of tokens that others on the way may read, and of nothing else.
func TestServeInTheClear(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte(pageToken+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	files := redistest.NewCertificates(t)
	pair := []string{"--tls-cert", files.Cert, "--tls-key", files.Key}
	for _, c := range []struct {
		args []string
		want int
	}{
		{[]string{"--listen", "0.0.0.0:0", "--token-file", token}, 1},
		{[]string{"--listen", "0.0.0.0:0"}, 0},
		{[]string{"--listen", "127.9.9.9:0", "--token-file", token}, 0},
		{append([]string{"--listen", "0.0.0.0:0", "--token-file", token}, pair...), 0},
	} {
		p := s.spawn(t, append([]string{"serve"}, c.args...)...)
		haproxytest.Poll(t, "serve serves", func() error {
			if !strings.Contains(p.out.String(), "serving the page") {
				return errors.New(p.out.String())
			}
			return nil
		})
		p.signal(t, syscall.SIGTERM)
		if n := strings.Count(p.out.String(), "give --tls-cert and --tls-key"); n != c.want {
			t.Errorf("%v: said %d times, want %d\n%s", c.args, n, c.want, p.out)
		}
	}
}
