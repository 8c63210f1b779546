package registrar

import (
	"net"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

func TestOpenRefuses(t *testing.T) {
	for _, url := range []string{
		"", "redis", "http://:s3cret@host:6379/0", "redis://:s3cret@host:port/0", "redis://:s3cret@host:6379/x",
		"redis://user:s3cret@host:6379/0?nonsense=s3cret", "redis://:s3cret@ho st:6379", "redis://:s3cret%zz@host", "redis://:s3cret@host\n:1",
	} {
		rdb, err := Open(url, 1)
		if err == nil {
			t.Errorf("%q was accepted", url)
			rdb.Close()
			continue
		}
		if strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%q: the error holds the password: %v", url, err)
		}
	}
}

// TestOpenDoesNoIO opens a client for a listener that must not be called, also
// where the URL asks for connections in advance.
func TestOpenDoesNoIO(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	rdb, err := Open("redis://"+l.Addr().String()+"/0?min_idle_conns=3&dial_timeout=7s&max_retries=9", 4)
	must(t, err)
	o := rdb.(*redis.Client).Options()
	if o.MinIdleConns != 0 {
		t.Errorf("%d connections in advance", o.MinIdleConns)
	}
	if o.DialTimeout != DialTimeout || o.ReadTimeout != Timeout || o.WriteTimeout != Timeout || o.PoolTimeout != Timeout ||
		o.MaxRetries > 0 || o.DialerRetries != 1 || o.PoolSize != 4 || !o.ContextTimeoutEnabled {
		t.Errorf("the URL changed our deadlines: %+v", o)
	}
	must(t, rdb.Close())
	// Closed, so nothing can call any more; what has called waits here.
	must(t, l.(*net.TCPListener).SetDeadline(time.Now().Add(10*time.Millisecond)))
	if c, err := l.Accept(); err == nil {
		c.Close()
		t.Error("somebody called")
	}
}
