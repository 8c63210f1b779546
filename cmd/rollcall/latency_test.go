package main

import (
	"context"
	"fmt"
	"net"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// distant is a way to a server far away: what is sent arrives after half of the round
// trip, and the first word of a connection a round trip later, as after TCP's handshake.
type distant struct {
	addr string
	to   string
	trip time.Duration
}

// startDistant listens until the test ends, on an address of the server's, which its
// certificate names.
func startDistant(t *testing.T, srv *redistest.Server, trip time.Duration) *distant {
	t.Helper()
	l, err := net.Listen("tcp", srv.Host+":0")
	if err != nil {
		t.Fatal(err)
	}
	d := &distant{addr: l.Addr().String(), to: srv.Addr, trip: trip}
	ctx, cancel := context.WithCancel(context.Background())
	var carrying sync.WaitGroup
	t.Cleanup(func() { cancel(); _ = l.Close(); carrying.Wait() })
	carrying.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			carrying.Go(func() { d.carry(ctx, c) })
		}
	})
	return d
}

// carry carries one connection, until either end or ctx does.
func (d *distant) carry(ctx context.Context, client net.Conn) {
	server, err := net.Dial("tcp", d.to)
	if err != nil {
		_ = client.Close()
		return
	}
	end := context.AfterFunc(ctx, func() { _ = client.Close(); _ = server.Close() })
	defer end()
	var both sync.WaitGroup
	both.Go(func() { d.pass(server, client, d.trip*3/2) })
	both.Go(func() { d.pass(client, server, d.trip/2) })
	both.Wait()
}

// pass carries what src sends to dst; the first part takes first, and what follows half
// of the round trip, or until what was sent before is there.
func (d *distant) pass(dst, src net.Conn, first time.Duration) {
	type part struct {
		b  []byte
		at time.Time
	}
	way := make(chan part, 1000)
	var arriving sync.WaitGroup
	arriving.Go(func() {
		defer dst.Close()
		for p := range way {
			time.Sleep(time.Until(p.at)) // the distance
			if _, err := dst.Write(p.b); err != nil {
				_ = src.Close()
			}
		}
	})
	for {
		b := make([]byte, 32<<10)
		n, err := src.Read(b)
		if n > 0 {
			way <- part{b[:n], time.Now().Add(max(first, d.trip/2))}
			first = 0
		}
		if err != nil {
			break
		}
	}
	close(way)
	arriving.Wait()
}

// TestLatency has everybody work with the defaults over a way to Redis that takes 200
// ms there and back, TLS too.
func TestLatency(t *testing.T) {
	t.Parallel()
	for _, secure := range []bool{false, true} {
		t.Run(fmt.Sprintf("TLS %v", secure), func(t *testing.T) {
			t.Parallel()
			s := &system{ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 4}}})}
			scheme := "redis"
			if secure {
				certs := redistest.NewCertificates(t)
				s.redis, scheme = redistest.Start(t, certs.Args()...), "rediss"
				s.env = []string{"ROLLCALL_REDIS_CA=" + certs.CA, "ROLLCALL_REDIS_CERT=" + certs.Cert, "ROLLCALL_REDIS_KEY=" + certs.Key}
			} else {
				s.redis = redistest.Start(t)
			}
			way := startDistant(t, s.redis, 200*time.Millisecond)
			at := "--redis=" + scheme + "://" + way.addr + "/0"
			i := haproxytest.NewInstance(t)
			reap := s.spawn(t, "reap", at)
			lb := s.spawn(t, "lbsync", at, "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8")
			side := s.spawn(t, "register", at, "--service", "web", "--addr", i.Addr().String())
			begun := time.Now()
			answered(t, "http://"+s.ha.Addr("be")+"/", i)
			t.Logf("served after %v", time.Since(begun).Round(time.Millisecond))
			// A TTL and a heartbeat of proof at the least, and anew for each pulse that a
			// busy machine made late.
			for limit := time.Now().Add(2 * time.Minute); !strings.Contains(reap.out.String(), "INF armed"); time.Sleep(50 * time.Millisecond) {
				if time.Now().After(limit) {
					t.Fatalf("not armed:\n%s", reap.out)
				}
			}
			t.Logf("armed after %v", time.Since(begun).Round(time.Millisecond))
			haproxytest.Poll(t, "status is content", func() error {
				out, stderr, code := s.rollcall(t, "status", at)
				if code != 0 {
					return fmt.Errorf("exit %d\n%s%s", code, out, stderr)
				}
				return nil
			})
			found, _ := s.doctor(t, at)
			if sick := ill(found); !strings.Contains(sick, "redis latency: warn: ") && !strings.Contains(sick, "redis latency: bad: ") || strings.Contains(sick, "redis: unknown") {
				t.Errorf("doctor says\n%s", sick)
			}
			// What a first try in a new connection did not do in a second, the next one has.
			for p, again := range map[*process]string{lb: "acknowledgements work again", side: "redis answers again"} {
				out := p.out.String()
				if n := strings.Count(out, " WRN "); n > strings.Count(out, again)+2 {
					t.Errorf("%v warns %d times\n%s", p.cmd.Args, n, out)
				}
			}
		})
	}
}

// TestTooFar has Redis be further away than works: whom it concerns says how far it may
// be.
func TestTooFar(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	way := startDistant(t, s.redis, 280*time.Millisecond)
	at := "--redis=redis://" + way.addr + "/0"
	reap := s.spawn(t, "reap", at)
	found, _ := s.doctor(t, at)
	if sick := ill(found); !regexp.MustCompile(`redis latency: bad: a round trip takes (2[89]|[3-9].)[0-9.]*ms`).MatchString(sick) || !strings.Contains(sick, "at most 200ms works") {
		t.Errorf("doctor says\n%s", sick)
	}
	reap.says(t, "a round trip to redis may take 200ms")
}
