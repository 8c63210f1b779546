package registrar

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"rollcall/registrar/redistest"
)

func TestSentinelURL(t *testing.T) {
	for _, url := range []string{
		"redis+sentinel://h1:26379", "redis+sentinel://h1:26379/", "redis+sentinel://u:s3cret@h1,,h2/m/0", "redis+sentinel://u:s3cret@h1/m/x",
		"redis+sentinel://u:s3cret@h1/m/-1", "redis+sentinel://u:s3cret@h1:port/m", "redis+sentinel://u:s3cret%zz@h1/m", "redis+sentinel://h1/m?x=s3cret",
		"redis+nonsense://u:s3cret@h1,h2", "http+sentinel://h1/m",
	} {
		rdb, err := Open(url, 1)
		if err == nil {
			t.Errorf("%q was accepted", url)
			rdb.Close()
		} else if strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%q: the error holds the password: %v", url, err)
		}
	}
	for _, url := range []string{
		"redis+sentinel://h1/m", "redis+sentinel://u:p%40s@h1:1,[::1]:2,h3/m/3", "rediss+sentinel://h1,h2/m/0",
	} {
		rdb, err := Open(url, 3)
		if err != nil {
			t.Errorf("%q: %v", url, err)
			continue
		}
		o := rdb.(*redis.Client).Options()
		if o.DialTimeout != DialTimeout || o.ReadTimeout != Timeout || o.WriteTimeout != Timeout || o.PoolTimeout != Timeout ||
			o.MaxRetries > 0 || o.DialerRetries != 1 || o.PoolSize != 3 || !o.ContextTimeoutEnabled || o.MinIdleConns != 0 {
			t.Errorf("%q: %+v", url, o)
		}
		if strings.Contains(url, "%40") {
			if user, password, err := o.CredentialsProviderContext(t.Context()); user != "u" || password != "p@s" || err != nil || o.DB != 3 {
				t.Errorf("%q: user %q, password %q, database %d, %v", url, user, password, o.DB, err)
			}
		}
		must(t, rdb.Close())
	}
}

// TestPasswordReload changes a password in Redis and in its file: the next new
// connection uses it.
func TestPasswordReload(t *testing.T) {
	srv := redistest.Start(t)
	file := filepath.Join(t.TempDir(), "password")
	rdb, err := Access{Password: func() (string, error) {
		b, err := os.ReadFile(file)
		return string(b), err
	}}.Open("redis://sidecar@"+srv.Addr+"/0", 1)
	must(t, err)
	defer rdb.Close()
	if err := rdb.Ping(t.Context()).Err(); err == nil || !strings.Contains(err.Error(), "redis password") {
		t.Fatalf("without a file: %v", err)
	}
	root := srv.Client(t)
	for _, password := range []string{"first", "second"} {
		must(t, root.Do(t.Context(), "ACL", "SETUSER", "sidecar", "reset", "on", ">"+password, "+ping", "+hello").Err())
		if err := rdb.Ping(t.Context()).Err(); err == nil {
			t.Fatalf("%s: a password of before was taken", password)
		}
		must(t, os.WriteFile(file, []byte(password), 0o600))
		must(t, rdb.Ping(t.Context()).Err())
		must(t, root.Do(t.Context(), "CLIENT", "KILL", "USER", "sidecar").Err())
	}
}

// TestTLS speaks to a server that demands client certificates.
func TestTLS(t *testing.T) {
	dir := t.TempDir()
	ca, caKey := certificate(t, dir, "ca", nil, nil, nil)
	certificate(t, dir, "other", nil, nil, nil)
	certificate(t, dir, "client", nil, ca, caKey)
	in := func(name string) string { return filepath.Join(dir, name) }
	certificate(t, dir, "server", net.IPv4(127, 0, 0, 1), ca, caKey)
	// redistest itself asks on the unix socket, so no plain port is needed.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	_, port, _ := net.SplitHostPort(l.Addr().String())
	must(t, l.Close())
	redistest.Start(t, "--bind", "127.0.0.1", "--port", "0", "--tls-port", port, "--tls-auth-clients", "yes",
		"--tls-cert-file", in("server.pem"), "--tls-key-file", in("server.key"), "--tls-ca-cert-file", in("ca.pem"))
	for _, c := range []struct {
		name string
		a    Access
		ok   bool
	}{
		{"CA and client certificate", Access{CA: in("ca.pem"), Cert: in("client.pem"), Key: in("client.key")}, true},
		{"no client certificate", Access{CA: in("ca.pem")}, false},
		{"another CA", Access{CA: in("other.pem"), Cert: in("client.pem"), Key: in("client.key")}, false},
		{"the system's CAs", Access{Cert: in("client.pem"), Key: in("client.key")}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			rdb, err := c.a.Open("rediss://127.0.0.1:"+port+"/0", 1)
			must(t, err)
			defer rdb.Close()
			ctx, cancel := WithTimeout(t.Context())
			defer cancel()
			if err := rdb.Ping(ctx).Err(); (err == nil) != c.ok {
				t.Errorf("ping: %v", err)
			}
		})
	}
	for name, a := range map[string]Access{
		"half a pair": {Cert: in("client.pem")}, "no such CA": {CA: in("none")}, "a key as CA": {CA: in("ca.key")},
		"not its key": {Cert: in("client.pem"), Key: in("server.key")},
	} {
		if rdb, err := a.Open("rediss://127.0.0.1", 1); err == nil {
			rdb.Close()
			t.Errorf("%s was accepted", name)
		}
	}
	if rdb, err := (Access{CA: in("ca.pem")}).Open("redis://127.0.0.1", 1); err == nil {
		rdb.Close()
		t.Error("a CA without TLS was accepted")
	}
}

// certificate writes name.pem and name.key into dir: a CA of its own if parent
// is nil.
func certificate(t *testing.T, dir, name string, ip net.IP, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, IsCA: parent == nil, KeyUsage: x509.KeyUsageDigitalSignature,
	}
	if ip != nil {
		c.IPAddresses = []net.IP{ip}
	}
	if parent == nil {
		c.KeyUsage |= x509.KeyUsageCertSign
		parent, parentKey = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, parentKey)
	must(t, err)
	keyDER, err := x509.MarshalECPrivateKey(key)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, name+".pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, name+".key"), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER}), 0o600))
	made, err := x509.ParseCertificate(der)
	must(t, err)
	return made, key
}
