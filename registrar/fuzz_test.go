package registrar

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// only tells whether s has no other bytes than those of set.
func only(s, set string) bool { return strings.Trim(s, set) == "" }

func FuzzParseService(f *testing.F) {
	for _, s := range []string{"web", "a.b_c-d", "", "-a", "web\n", "wéb", "Web", strings.Repeat("a", 63), strings.Repeat("a", 64), "web}", "web x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		svc, err := ParseService(s)
		if err != nil {
			return
		}
		if string(svc) != s || len(s) == 0 || len(s) > 63 || !only(s, "abcdefghijklmnopqrstuvwxyz0123456789._-") || only(s[:1], "._-") {
			t.Fatalf("accepted %q as %q", s, svc)
		}
	})
}

func FuzzMeta(f *testing.F) {
	for _, s := range []string{`{"id":"t","weight":100,"registered":1}`, `{"weight":257}`, `{"weight":-1}`, `{"weight":1e400}`, `{"tags":{"a":"\u001b[31m"}}`,
		`{"id":1}`, `null`, `[]`, `{`, `{"draining":true,"zone":"a"}`, "", `{"weight":null}`, `{"tags":null}`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		m, err := parseMeta(s)
		if err != nil {
			return
		}
		if m.Weight < 0 || m.Weight > MaxWeight {
			t.Fatalf("accepted weight %d of %q", m.Weight, s)
		}
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := parseMeta(string(b)); err != nil || again.Weight != m.Weight || again.Draining != m.Draining {
			t.Fatalf("%q became %s: %+v, %v", s, b, again, err)
		}
	})
}

func FuzzAdmin(f *testing.F) {
	for _, s := range []string{`{"state":"drain","reason":"x","at":1}`, `{"state":"maint"}`, `{"state":"off"}`, `{"weight":0}`, `{"weight":300}`, `null`, ``, `{"state":1}`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := parseAdmin(s)
		if err != nil {
			return
		}
		if a.State != AdminNone && a.State != AdminDrain && a.State != AdminMaint || a.Weight != nil && (*a.Weight < 0 || *a.Weight > MaxWeight) {
			t.Fatalf("accepted %+v of %q", a, s)
		}
	})
}

func FuzzGone(f *testing.F) {
	for _, s := range []string{"left 1 t", "expired 1700000000000 ", "operator 1", "unhealthy x t", "gone 1 t", "left", "", "left 1 a b c", "left -1 t", "left 9223372036854775808 t"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		g, ok := parseGone(s)
		if !ok {
			return
		}
		switch g.Reason {
		case Left, Unhealthy, Expired, Operator:
		default:
			t.Fatalf("accepted the reason %q of %q", g.Reason, s)
		}
		if !strings.HasPrefix(s, string(g.Reason)+" ") || !strings.HasSuffix(s, g.Token) {
			t.Fatalf("%q became %+v", s, g)
		}
	})
}

// canned is a connection that answers every command with the same bytes, and is
// then closed.
type canned struct {
	net.Conn // of which nothing else is called
	answer   *bytes.Reader
}

func (c canned) Read(b []byte) (int, error)       { return c.answer.Read(b) }
func (c canned) Write(b []byte) (int, error)      { return len(b), nil }
func (c canned) Close() error                     { return nil }
func (c canned) SetDeadline(time.Time) error      { return nil }
func (c canned) SetReadDeadline(time.Time) error  { return nil }
func (c canned) SetWriteDeadline(time.Time) error { return nil }
func (c canned) RemoteAddr() net.Addr             { return &net.TCPAddr{} }

// FuzzRedisReplies has Redis answer anything to everything that a Store asks.
// What is no whole answer must be an error, and what is none of the form asked
// for, too.
func FuzzRedisReplies(f *testing.F) {
	bulk := func(s string) string { return "$" + itoa(len(s)) + "\r\n" + s + "\r\n" }
	list := func(of ...string) string { return "*" + itoa(len(of)) + "\r\n" + strings.Join(of, "") }
	head := []string{":1\r\n", ":1700000000000\r\n", bulk("abc"), bulk("e"), ":7\r\n", ":15000\r\n", ":5000\r\n"}
	full := list(append(head, list(bulk("10.0.0.7:80"), bulk("1700000000000")), list(bulk("10.0.0.7:80"), bulk(`{"id":"t","weight":1}`)),
		list(bulk("10.0.0.7:80"), bulk(`{"state":"drain"}`)), list(bulk("10.0.0.8:80"), bulk("left 1 t")))...)
	delta := list(append(append([]string{":0\r\n"}, head[1:]...), list(bulk("10.0.0.7:80")), list(",1.7e12\r\n"), list(bulk("{}")), list("$-1\r\n"), list("$-1\r\n"))...)
	acks := list(":1700000000000\r\n", bulk("abc"), bulk("e"), ":7\r\n", bulk("lb"), bulk("7"), bulk("1.7e12"))
	for call := range storeCalls {
		for _, s := range []string{full, delta, acks, full[:len(full)-3], list(bulk("OK"), ":1700000000000\r\n", ":7\r\n", ":15000\r\n", ":5000\r\n"),
			list(bulk("abc"), bulk("e"), ":3\r\n", ":7\r\n"), "-LOADING x\r\n", "*-1\r\n", "$-1\r\n", ":0\r\n", "_\r\n", "%1\r\n+a\r\n:1\r\n", "*9999\r\n", ""} {
			f.Add(uint8(call), []byte(s))
		}
	}
	// go-redis makes room for as many elements as an answer announces: that ends
	// the program, and is not what is looked for here.
	endless := regexp.MustCompile(`[*%~>$=!|]\+?[0-9]{7}`)
	base, err := NewStore(nil, "rollcall") // its scripts take longer to make than an answer to read
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, call uint8, answer []byte) {
		if endless.Match(answer) {
			return
		}
		rdb := redis.NewClient(&redis.Options{
			Protocol: 2, MaxRetries: -1, DisableIdentity: true, PoolSize: 1, DialerRetries: 1,
			Dialer: func(context.Context, string, string) (net.Conn, error) {
				return canned{answer: bytes.NewReader(answer)}, nil
			},
		})
		defer func() { _ = rdb.Close() }() // what was canned has no end to fail
		s := *base
		s.rdb = rdb
		storeCalls[int(call)%len(storeCalls)](t, &s)
	})
}

func itoa(n int) string {
	b, _ := json.Marshal(n) // a number
	return string(b)
}

// storeCalls are what a Store reads, each with what its success promises.
var storeCalls = []func(*testing.T, *Store){
	func(t *testing.T, s *Store) {
		for _, since := range []*Token{nil, {"abc", "e", 3}} {
			snap, err := s.Read(context.Background(), "web", since)
			if err != nil {
				continue
			}
			if snap.Token.ReplID == "" || snap.Now <= 0 || snap.TTL <= 0 || snap.Interval <= 0 {
				t.Fatalf("an empty answer was taken for one: %+v", snap)
			}
			for _, e := range snap.Entries {
				if a, err := ParseAddr(e.Addr.String()); err != nil || a != e.Addr {
					t.Fatalf("entry of %v: %v", e.Addr, err)
				}
				if e.Present && (e.Gone != nil || e.Garbage != "" || e.Instance.Weight() < 0 || e.Instance.Weight() > MaxWeight || e.Instance.Addr != e.Addr) {
					t.Fatalf("entry %+v", e)
				}
			}
		}
	},
	func(t *testing.T, s *Store) {
		if v, err := s.Versions(context.Background(), []Service{"web"}); err == nil && len(v.Of) != 1 {
			t.Fatalf("versions %+v", v)
		}
	},
	func(t *testing.T, s *Store) {
		a, err := s.Acks(context.Background(), "web")
		for _, b := range a.Balancers {
			if err != nil || b.Applied < -1 && b.Live {
				t.Fatalf("%+v of %v", b, err)
			}
		}
	},
	func(t *testing.T, s *Store) { _, _ = s.Overview(context.Background()) }, // any order of answers may be right
	func(t *testing.T, s *Store) {
		b := Beat{Addr: netip.MustParseAddrPort("10.0.0.7:80"), Token: "t", Meta: `{"id":"t","weight":1}`}
		if r, err := s.Beat(context.Background(), "web", b); err == nil && (r.TTL <= 0 || r.Interval <= 0 || r.Status == "") {
			t.Fatalf("beat %+v", r)
		}
	},
	func(t *testing.T, s *Store) {
		r, err := s.Reap(context.Background(), "web", Sweep{ID: "r", Token: "p"})
		if err != nil && len(r.Addrs) > 0 {
			t.Fatalf("reaped %v, and %v", r.Addrs, err)
		}
	},
	func(t *testing.T, s *Store) {
		if err := s.Acker("lb").Ack(context.Background(), "web", Token{"abc", "e", 1}); err != nil && errors.Is(err, io.EOF) && errors.Is(err, ErrOtherHistory) {
			t.Fatal(err)
		}
	},
	func(t *testing.T, s *Store) {
		names, _, _ := s.Services(context.Background()) // whatever is wrong with the rest
		for _, n := range names {
			if _, err := ParseService(string(n)); err != nil {
				t.Fatal(err)
			}
		}
	},
	func(t *testing.T, s *Store) {
		if p, err := s.Pulse(context.Background(), "r", "p", time.Second); err == nil && p.Now <= 0 {
			t.Fatalf("pulse %+v", p)
		}
	},
	func(t *testing.T, s *Store) { _, _ = s.Survey(context.Background(), []Service{"web"}, 1, 1, 1) },
	func(t *testing.T, s *Store) {
		if now, ttl, err := s.Clock(context.Background()); err == nil && (now <= 0 || ttl <= 0) {
			t.Fatalf("clock %d, ttl %v", now, ttl)
		}
	},
	func(t *testing.T, s *Store) {
		if got, err := s.Config(context.Background(), 15*time.Second, 5*time.Second, false); err == nil && (got.TTL <= 0 || got.Interval <= 0) {
			t.Fatalf("config %+v", got)
		}
	},
}
