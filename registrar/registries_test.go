package registrar

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/redis/go-redis/v9"

	"rollcall/registrar/redistest"
)

// TestOtherRegistries: registries in other databases and under other namespaces are found,
// and nothing that only looks like one.
func TestOtherRegistries(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t, "--requirepass", "secret")
	for _, at := range []struct {
		db  int
		ns  string
		svc []Service
	}{{0, "rollcall", []Service{"web", "api"}}, {0, "prod", []Service{"web"}}, {3, "rollcall", []Service{"web"}}} {
		rdb, err := Open(fmt.Sprintf("redis://:secret@%s/%d", srv.Addr, at.db), 1)
		must(t, err)
		s, err := NewStore(rdb, at.ns)
		must(t, err)
		for _, svc := range at.svc {
			_, err := s.Beat(t.Context(), svc, Beat{Addr: netip.MustParseAddrPort("10.0.0.1:80"), Token: "t", Meta: `{"id":"t"}`})
			must(t, err)
		}
		must(t, rdb.SAdd(t.Context(), "somebody:services", "x").Err()) // without versions
		must(t, rdb.Set(t.Context(), "text:services", "x", 0).Err())   // of another type
		must(t, rdb.SAdd(t.Context(), "No Name:services", "x").Err())  // no namespace
		must(t, rdb.Set(t.Context(), "No Name:version", "1", 0).Err()) // the same
		must(t, rdb.Set(t.Context(), "emptied:version", "1", 0).Err()) // it had services
		must(t, rdb.Close())
	}
	found := func(url, ns string) []OtherRegistry {
		t.Helper()
		all, err := Access{Password: func() (string, error) { return "secret", nil }}.OtherRegistries(t.Context(), url, ns)
		must(t, err)
		return all
	}
	at := func(db int) string { return fmt.Sprintf("redis://%s/%d", srv.Addr, db) }
	rollcall0, prod0, rollcall3 := OtherRegistry{at(0), "rollcall", 2}, OtherRegistry{at(0), "prod", 1}, OtherRegistry{at(3), "rollcall", 1}
	for _, tt := range []struct {
		url, ns string
		want    []OtherRegistry
	}{
		{at(1), "rollcall", []OtherRegistry{prod0, rollcall0, rollcall3}},
		{"redis://:secret@" + srv.Addr + "/0", "rollcall", []OtherRegistry{prod0, rollcall3}},
		{"redis://" + srv.Addr, "prod", []OtherRegistry{rollcall0, rollcall3}},
		{at(3), "other", []OtherRegistry{prod0, rollcall0, rollcall3}},
	} {
		if got := found(tt.url, tt.ns); !slices.Equal(got, tt.want) {
			t.Errorf("%s %s: %v, want %v", tt.url, tt.ns, got, tt.want)
		}
	}
	if _, err := (Access{}).OtherRegistries(t.Context(), at(0), "rollcall"); err == nil || !strings.Contains(err.Error(), "NOAUTH") {
		t.Errorf("without a password: %v", err)
	}
	if all := found("redis://default:secret@"+srv.Addr+"/1", "rollcall"); len(all) != 3 {
		t.Errorf("as the default user: %v", all)
	}
	if all := found("redis://somebody:secret@"+srv.Addr+"/1", "rollcall"); len(all) != 0 { // and Redis hears nothing of them
		t.Errorf("as another user: %v", all)
	}
	for _, tt := range []struct{ url, want string }{
		{"redis://u:p@h:1/2", "redis://u@h:1/7"},
		{"rediss://:p@h:1", "rediss://h:1/7"},
		{"redis://h:1?db=3", "redis://h:1/7"},
		{"REDIS+sentinel://u:p@a,b:2/main/3", "redis+sentinel://u@a,b:2/main/7"},
		{"redis+sentinel://a/main", "redis+sentinel://a/main/7"},
	} {
		if got := inDatabase(tt.url, 7); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.url, got, tt.want)
		}
	}
}

// TestNoRedis: what is at the address is named when it is no Redis, and so is the server
// that is not there.
func TestNoRedis(t *testing.T) {
	t.Parallel()
	listen := func(serve func(net.Listener)) string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		done := make(chan struct{})
		go func() { defer close(done); serve(l) }()
		t.Cleanup(func() { must(t, l.Close()); <-done })
		return l.Addr().String()
	}
	web := listen(func(l net.Listener) { _ = http.Serve(l, http.NotFoundHandler()) }) // it ends with the test
	greets := listen(func(l net.Listener) {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("SSH-2.0-OpenSSH\r\n")) // to whoever is there
			_ = c.Close()
		}
	})
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	must(t, closed.Close())
	gone := closed.Addr().String()
	for _, tt := range []struct {
		name, addr, password, want string
		wrong                      bool
	}{
		{"HTTP", web, "", web + ` is no Redis: it says "HTTP/1.1 400 Bad"; let the URL name the port of redis-server`, true},
		{"SSH", greets, "", greets + ` is no Redis: it says "SSH-2.0-OpenSSH\r"; let the URL name the port of redis-server`, true},
		{"nothing", gone, "", "connect: connection refused; is redis-server running there?", false},
		{"nothing, by a flag", gone, "ROLLCALL_REDIS_PASSWORD", "connect: connection refused; is redis-server running there? --redis or ROLLCALL_REDIS says where it is", false},
		{"nothing, by another", gone, "ROLLCALL_CANARY_REDIS_PASSWORD", "running there? --canary-redis or ROLLCALL_CANARY_REDIS says where it is", false},
	} {
		rdb, err := Access{PasswordName: tt.password}.Open("redis://"+tt.addr, 1)
		must(t, err)
		for range 3 { // not only of the first connection
			err := rdb.Get(context.WithoutCancel(t.Context()), "x").Err()
			if err == nil || errors.Is(err, redis.Nil) || !strings.HasSuffix(err.Error(), tt.want) || errors.Is(err, ErrWrongDoor) != tt.wrong || Refused(err) != tt.wrong || Passing(err) == tt.wrong {
				t.Errorf("%s: %v, want …%s", tt.name, err, tt.want)
			}
		}
		must(t, rdb.Close())
	}
	for _, form := range []string{"redis+cluster://" + gone, "redis+sentinel://" + gone + "/main"} { // others say where the server is
		rdb, err := Access{PasswordName: "ROLLCALL_REDIS_PASSWORD"}.Open(form, 1)
		must(t, err)
		if err := rdb.Get(t.Context(), "x").Err(); err == nil || strings.Contains(err.Error(), "is redis-server running") {
			t.Errorf("%s: %v", form, err)
		}
		must(t, rdb.Close())
	}
	srv := redistest.Start(t)
	rdb, err := Open("redis://"+srv.Addr+"/16", 1)
	must(t, err)
	defer rdb.Close()
	if err := rdb.Get(t.Context(), "x").Err(); !Refused(err) || !strings.HasSuffix(err.Error(), "out of range; the URL ends with the number of a database that this Redis does not have; 0 is always there, and redis.conf's `databases` says how many") {
		t.Errorf("a database that is not there: %v", err)
	}
}
