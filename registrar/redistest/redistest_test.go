package redistest

import (
	"syscall"
	"testing"

	"github.com/redis/go-redis/v9"
)

func TestServer(t *testing.T) {
	a, b := Start(t), Start(t, "--appendonly", "yes")
	if a.Addr == b.Addr || a.Socket == b.Socket || a.PID() == b.PID() {
		t.Fatalf("two servers share something: %+v %+v", a, b)
	}
	ca, cb := a.Client(t), b.Client(t)
	ctx := t.Context()
	if err := ca.Set(ctx, "k", "a", 0).Err(); err != nil {
		t.Fatal(err)
	}
	if err := cb.Set(ctx, "k", "b", 0).Err(); err != nil {
		t.Fatal(err)
	}
	o, err := redis.ParseURL(a.URL())
	if err != nil || o.Addr != a.Addr {
		t.Errorf("URL %s: %+v %v", a.URL(), o, err)
	}

	pid := b.PID()
	b.Kill(t)
	b.Kill(t) // as the end of the test does
	if err := cb.Ping(ctx).Err(); err == nil {
		t.Error("a killed server answers")
	}
	if got := ca.Get(ctx, "k").Val(); got != "a" {
		t.Errorf("its neighbour holds %q", got)
	}
	b.Launch(t)
	if got := cb.Get(ctx, "k").Val(); got != "b" {
		t.Errorf("after a restart it holds %q, want what its settings keep", got)
	}
	if b.PID() == pid {
		t.Error("the same process")
	}

	b.Signal(t, syscall.SIGSTOP)
	b.Signal(t, syscall.SIGCONT)
	if err := cb.Ping(ctx).Err(); err != nil {
		t.Errorf("after SIGCONT: %v", err)
	}
}

// TestPingAsksThisServer checks that another's answer on the same TCP address
// is not taken for this server's.
func TestPingAsksThisServer(t *testing.T) {
	a := Start(t)
	b := &Server{Host: a.Host, Addr: a.Addr, Socket: a.Dir + "/none"}
	if err := b.ping(); err == nil {
		t.Error("a server that does not run answered")
	}
	if err := a.ping(); err != nil {
		t.Error(err)
	}
}
