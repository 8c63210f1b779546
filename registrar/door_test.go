package registrar

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"rollcall/registrar/redistest"
)

// TestWrongDoor goes with every kind of URL to every other kind of server. The first
// call says which URL is right, and is not tried again.
func TestWrongDoor(t *testing.T) {
	t.Parallel()
	certs := redistest.NewCertificates(t)
	one, secure := redistest.Start(t), redistest.Start(t, certs.Args()...)
	sentinel := one.StartSentinel(t, "mymaster")
	node := redistest.StartCluster(t, 1)[0]
	plain, tls := Access{}, Access{CA: certs.CA, Cert: certs.Cert, Key: certs.Key}
	for _, c := range []struct {
		a         Access
		url, want string
	}{
		{plain, "redis://u:@" + secure.Addr + "/3", " speaks TLS only; the URL is rediss://u@" + secure.Addr + "/3"},
		{plain, "redis+cluster://" + secure.Addr, " speaks TLS only; the URL is rediss+cluster://" + secure.Addr},
		{plain, "redis+sentinel://" + secure.Addr + "/mymaster", " speaks TLS only; the URL is rediss+sentinel://" + secure.Addr + "/mymaster/0"},
		{tls, "rediss://" + one.Addr, " speaks without TLS; the URL is redis://" + one.Addr + "/0"},
		{tls, "rediss+cluster://" + node.Addr, " speaks without TLS; the URL is redis+cluster://" + node.Addr},
		{tls, "rediss+sentinel://" + sentinel.Addr + "/mymaster/2", " speaks without TLS; the URL is redis+sentinel://" + sentinel.Addr + "/mymaster/2"},
		{plain, "redis://" + node.Addr + "/0", " is a node of a Cluster; the URL is redis+cluster://" + node.Addr},
		{plain, "redis://" + sentinel.Addr + "/1", " is a Sentinel; the URL is redis+sentinel://" + sentinel.Addr + "/PRIMARY/1"},
		{plain, "redis+cluster://" + one.Addr, " is no node of a Cluster but one server; the URL is redis://" + one.Addr + "/0"},
		{plain, "redis+cluster://" + sentinel.Addr, " is a Sentinel; the URL is redis+sentinel://" + sentinel.Addr + "/PRIMARY/0"},
		{plain, "redis+sentinel://" + one.Addr + "/mymaster", " is no Sentinel but one server; the URL is redis://" + one.Addr + "/0"},
		{plain, "redis+sentinel://" + node.Addr + "/mymaster", " is a node of a Cluster; the URL is redis+cluster://" + node.Addr},
		{plain, "redis+sentinel://" + sentinel.Addr + "/other/2", ` know no primary called "other", but mymaster; the URL is redis+sentinel://` + sentinel.Addr + "/mymaster/2"},
	} {
		t.Run(c.url, func(t *testing.T) {
			t.Parallel()
			rdb, err := c.a.Open(c.url, 2)
			must(t, err)
			defer rdb.Close()
			s, err := NewStore(rdb, DefaultNamespace)
			must(t, err)
			began := time.Now()
			eventually(t, func() error { // a machine that stands still may miss it the first time
				_, err := Try(t.Context(), func(ctx context.Context) (Snapshot, error) { return s.Read(ctx, "web", nil) })
				if !errors.Is(err, ErrWrongDoor) || !strings.HasSuffix(err.Error(), c.want) || strings.Contains(err.Error(), "\n") || errors.Is(err, redis.Nil) || !Refused(err) {
					return fmt.Errorf("%w\nwant …%s", err, c.want)
				}
				return nil
			})
			t.Logf("after %v", time.Since(began).Round(time.Millisecond))
			if _, err := s.rdb.Get(t.Context(), "x").Result(); err == nil || errors.Is(err, redis.Nil) {
				t.Errorf("a key: %v", err)
			}
		})
	}
}

// TestRightDoor opens each kind of server by its own URL, in any case, and one whose
// data node is also named among its Sentinels.
func TestRightDoor(t *testing.T) {
	t.Parallel()
	one := redistest.Start(t)
	node := redistest.StartCluster(t, 1)[0]
	sentinel := one.StartSentinel(t, "mymaster")
	for _, url := range []string{
		"redis://" + one.Addr, "REDIS://" + one.Addr + "/1", "Redis+Cluster://" + node.Addr, "redis+SENTINEL://" + sentinel.Addr + "/mymaster",
		"redis+sentinel://" + one.Addr + "," + sentinel.Addr + "/mymaster/0",
	} {
		rdb, err := Open(url, 1)
		must(t, err)
		eventually(t, func() error { return rdb.Ping(t.Context()).Err() })
		must(t, rdb.Close())
		if hosts, err := Hosts(url); err != nil || len(hosts) == 0 {
			t.Errorf("%s: %v, %v", url, hosts, err)
		}
	}
	rdb, err := Access{}.OpenNode("REDIS+cluster://"+node.Addr, node.Addr, 1)
	must(t, err)
	must(t, rdb.Ping(t.Context()).Err())
	must(t, rdb.Close())
}

// TestProtectedMode has Redis' answer to a connection from another host, which no test can
// make: it is said before the connection ends.
func TestProtectedMode(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "-DENIED Redis is running in protected mode because …\r\n")
			_ = c.Close()
		}
	})
	defer serving.Wait()
	defer l.Close()
	rdb, err := Open("redis://"+l.Addr().String(), 1)
	must(t, err)
	defer rdb.Close()
	if err := rdb.Ping(t.Context()).Err(); !Refused(err) || !strings.Contains(err.Error(), "protected-mode no") {
		t.Errorf("%v", err)
	}
}

// TestIdleConnection shows that a connection that the server has closed is not used:
// what watches the first answer does not hide that.
func TestIdleConnection(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t)
	rdb, err := Open(srv.URL(), 1)
	must(t, err)
	defer rdb.Close()
	must(t, rdb.Ping(t.Context()).Err())
	root := srv.Client(t)
	must(t, root.Do(t.Context(), "CLIENT", "KILL", "SKIPME", "yes", "TYPE", "normal").Err())
	eventually(t, func() error {
		if list := root.ClientList(t.Context()).Val(); strings.Count(list, "\n") != 1 {
			return fmt.Errorf("%s", list)
		}
		return nil
	})
	if err := rdb.Ping(t.Context()).Err(); err != nil {
		t.Errorf("it was used: %v", err)
	}
}

// TestURLRefusedByName says what is wrong with a URL, and never its password.
func TestURLRefusedByName(t *testing.T) {
	t.Parallel()
	for url, want := range map[string]string{
		"unix:///run/redis.sock": "unix sockets are not supported", "redis+unix:///run/redis.sock": "unix sockets", "/run/redis.sock": "unix sockets",
		"redis:///run/redis.sock": "unix sockets", "redis+socket:///run/redis.sock?db=1": "unix sockets",
		"redis://:s3cret@h:6379/-1": "database number from 0", "redis://h/one": "want redis://", "redis://h/1/2": "want redis://", "redis://h:6379/01": "database number from 0",
		"redis+sentinel://:s3cret@h/m/-1": "want redis://", "h:6379": "want redis://", "redis://u:s3cret@h1,h2": "want redis://",
	} {
		_, err := Open(url, 1)
		_, herr := Hosts(url)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: %v, want %s", url, err, want)
		}
		if herr == nil && !strings.Contains(url, "sentinel") {
			t.Errorf("%s: it has hosts", url)
		}
	}
}

// TestUserWithoutPassword never acts as the default user.
func TestUserWithoutPassword(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t)
	root, ctx := srv.Client(t), t.Context()
	must(t, root.Do(ctx, "ACL", "SETUSER", "app", "on", ">pw", "+@all").Err())
	must(t, root.Do(ctx, "ACL", "SETUSER", "free", "on", "nopass", "+@all").Err())
	for _, host := range []string{"redis://app@" + srv.Addr, "redis+cluster://app@" + srv.Addr, "redis+sentinel://app@" + srv.Addr + "/m"} {
		for name, a := range map[string]Access{
			"none": {}, "an empty one": {PasswordName: "THE_PASSWORD", Password: func() (string, error) { return "", nil }},
		} {
			if _, err := a.Open(host, 1); !errors.Is(err, ErrPassword) || !strings.Contains(err.Error(), "app:@") {
				t.Errorf("%s, %s: %v", host, name, err)
			}
		}
	}
	password := "pw"
	rdb, err := Access{Password: func() (string, error) { return password, nil }}.Open("redis://app@"+srv.Addr, 1)
	must(t, err)
	defer rdb.Close()
	must(t, rdb.Ping(ctx).Err())
	password = "" // the file has been emptied
	must(t, root.Do(ctx, "CLIENT", "KILL", "USER", "app").Err())
	if err := rdb.Ping(ctx).Err(); !errors.Is(err, ErrPassword) || !Refused(err) {
		t.Errorf("without one it says %v", err)
	}
	free, err := Open("redis://free:@"+srv.Addr, 1)
	must(t, err)
	defer free.Close()
	if who, err := free.Do(ctx, "ACL", "WHOAMI").Text(); who != "free" || err != nil {
		t.Errorf("it is %q, %v", who, err)
	}
}

// TestWhosePassword says whether it is the Sentinels' password or the data node's.
func TestWhosePassword(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t)
	sentinel := srv.StartSentinel(t, "m")
	ctx := t.Context()
	must(t, sentinel.Client(t).Do(ctx, "ACL", "SETUSER", "default", "resetpass", ">guard").Err())
	must(t, srv.Client(t).Do(ctx, "ACL", "SETUSER", "default", "resetpass", ">data").Err())
	for _, c := range []struct{ guard, data, want, not string }{
		{"", "data", "it wants a password: set THE_SENTINELS", "THE_DATA"},
		{"wrong", "data", "is not the one of THE_SENTINELS", "THE_DATA"},
		{"guard", "", "it wants a password: set THE_DATA", "THE_SENTINELS"},
		{"guard", "wrong", "is not the one of THE_DATA", "THE_SENTINELS"},
		{"guard", "data", "", ""},
	} {
		rdb, err := Access{
			Password: func() (string, error) { return c.data, nil }, SentinelPassword: func() (string, error) { return c.guard, nil },
			PasswordName: "THE_DATA", SentinelPasswordName: "THE_SENTINELS",
		}.Open("redis+sentinel://"+sentinel.Addr+"/m/0", 1)
		must(t, err)
		err = rdb.Ping(ctx).Err()
		must(t, rdb.Close())
		switch {
		case c.want == "" && err != nil, c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), c.not) || strings.Contains(err.Error(), "\n")):
			t.Errorf("%q and %q: %v, want %q", c.guard, c.data, err, c.want)
		}
	}
}
