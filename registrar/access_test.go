package registrar

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

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

// TestCertificateReload changes the CA and the client's certificate in their
// files: the next new connection uses them.
func TestCertificateReload(t *testing.T) {
	before, after := redistest.NewCertificates(t), redistest.NewCertificates(t)
	srv := redistest.Start(t, after.Args()...)
	dir := t.TempDir()
	a := Access{CA: filepath.Join(dir, "ca"), Cert: filepath.Join(dir, "cert"), Key: filepath.Join(dir, "key")}
	put := func(c redistest.Certificates) {
		for to, from := range map[string]string{a.CA: c.CA, a.Cert: c.Cert, a.Key: c.Key} {
			b, err := os.ReadFile(from)
			must(t, err)
			must(t, os.WriteFile(to, b, 0o600))
		}
	}
	put(before)
	rdb, err := a.Open("rediss://"+srv.Addr+"/0", 1)
	must(t, err)
	defer rdb.Close()
	if err := rdb.Ping(t.Context()).Err(); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Fatalf("by the files of before: %v", err)
	}
	put(after)
	// After an error go-redis tries to connect once a second.
	eventually(t, func() error { return rdb.Ping(t.Context()).Err() })
}

// TestTLS speaks to a server that demands client certificates.
func TestTLS(t *testing.T) {
	own, other := redistest.NewCertificates(t), redistest.NewCertificates(t)
	srv := redistest.Start(t, own.Args()...)
	for _, c := range []struct {
		name string
		a    Access
		ok   bool
	}{
		{"CA and client certificate", Access{CA: own.CA, Cert: own.Cert, Key: own.Key}, true},
		{"no client certificate", Access{CA: own.CA}, false},
		{"another CA", Access{CA: other.CA, Cert: own.Cert, Key: own.Key}, false},
		{"a client certificate of another CA", Access{CA: own.CA, Cert: other.Cert, Key: other.Key}, false},
		{"the system's CAs", Access{Cert: own.Cert, Key: own.Key}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			rdb, err := c.a.Open("rediss://"+srv.Addr+"/0", 1)
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
		"half a pair": {Cert: own.Cert}, "no such CA": {CA: own.CA + ".none"}, "a key as CA": {CA: own.Key},
		"not its key": {Cert: own.Cert, Key: other.Key},
	} {
		if rdb, err := a.Open("rediss://127.0.0.1", 1); err == nil {
			rdb.Close()
			t.Errorf("%s was accepted", name)
		}
	}
	if rdb, err := (Access{CA: own.CA}).Open("redis://127.0.0.1", 1); err == nil {
		rdb.Close()
		t.Error("a CA without TLS was accepted")
	}
}
