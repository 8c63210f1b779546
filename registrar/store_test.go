package registrar

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/goleak"

	"rollcall/registrar/redistest"
)

// t0 is where the clock of most tests starts, unix ms: years ago, so no score
// lies in the future of the server's own clock.
const t0 int64 = 1_700_000_000_000

const web Service = "web"

// The defaults in the unit of the scripts.
const (
	intervalMS = int64(DefaultInterval / time.Millisecond)
	ttlMS      = int64(DefaultTTL / time.Millisecond)
)

// silence is go-redis' own log in the outages that tests make.
type silence struct{}

func (silence) Printf(context.Context, string, ...any) {}

func TestMain(m *testing.M) {
	redis.SetLogger(silence{})
	code := m.Run()
	if code == 0 {
		// After a failed dial go-redis' pool probes in the background and sees
		// only up to a second later that it was closed.
		if err := goleak.Find(goleak.IgnoreAnyFunction("github.com/redis/go-redis/v9/internal/pool.(*ConnPool).tryDial")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// newStore returns a store on a Redis of its own.
func newStore(tb testing.TB) (*Store, *redistest.Server) {
	tb.Helper()
	srv := redistest.Start(tb)
	s, err := NewStore(srv.Client(tb), DefaultNamespace)
	if err != nil {
		tb.Fatal(err)
	}
	return s, srv
}

var namespaces atomic.Int64

// fresh returns a store on an empty namespace of srv, its clock at t0.
func fresh(tb testing.TB, srv *redistest.Server) *Store {
	tb.Helper()
	s, err := NewStore(srv.Client(tb), fmt.Sprintf("ns%d", namespaces.Add(1)))
	if err != nil {
		tb.Fatal(err)
	}
	s.setClock(t0)
	return s
}

func (s *Store) setClock(ms int64) { s.now = strconv.FormatInt(ms, 10) }

func (s *Store) clock() int64 {
	ms, err := strconv.ParseInt(s.now, 10, 64)
	if err != nil {
		panic(err)
	}
	return ms
}

// must ends the test on an error of a step that only prepares.
func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// host is the n-th of 60,000 different addresses.
func host(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(n / 250), byte(n%250 + 1)}), 8080)
}

func metaOf(token string) string { return fmt.Sprintf(`{"id":%q,"weight":7}`, token) }

// join registers addr with token. It always arrives: a holder that beats is made to
// have missed its beats.
func join(tb testing.TB, s *Store, addr netip.AddrPort, token string) {
	tb.Helper()
	b := Beat{Addr: addr, Token: token, Meta: metaOf(token)}
	r, err := s.Beat(tb.Context(), web, b)
	if errors.Is(err, ErrNotOwner) {
		do(tb, s, "ZADD", s.keys.Instances(web), "XX", r.Held+r.Silent.Milliseconds()-2*r.Interval.Milliseconds()-1, addr.String())
		_, err = s.Beat(tb.Context(), web, b)
	}
	must(tb, err)
}

func leave(tb testing.TB, s *Store, addr netip.AddrPort, token string) {
	tb.Helper()
	_, err := s.Leave(tb.Context(), web, addr, token, Left)
	must(tb, err)
}

func say(tb testing.TB, s *Store, addr netip.AddrPort, w Word) {
	tb.Helper()
	_, _, err := s.SetAdmin(tb.Context(), web, addr, w)
	must(tb, err)
}

// sweep lets a reaper pulse and take out who beat before cutoff.
func sweep(tb testing.TB, s *Store, cutoff int64) ([]string, int64, error) {
	tb.Helper()
	p, err := s.Pulse(tb.Context(), "r1", "pulse", time.Minute)
	must(tb, err)
	out, err := s.Reap(tb.Context(), web, Sweep{ID: "r1", Token: "pulse", ReplID: p.ReplID, Last: p.Now, MaxAge: time.Second, Cutoff: cutoff})
	return out.Addrs, out.Left, err
}

// replid is the server's own.
func replid(tb testing.TB, s *Store) string {
	tb.Helper()
	info, err := s.rdb.Info(tb.Context(), "replication").Result()
	must(tb, err)
	_, rest, _ := strings.Cut(info, "master_replid:")
	id, _, _ := strings.Cut(rest, "\r\n")
	return id
}

// expire takes out addr, which must be the only one to have missed the TTL.
func expire(tb testing.TB, s *Store, addr netip.AddrPort) {
	tb.Helper()
	s.setClock(s.clock() + ttlMS + 1)
	out, _, err := sweep(tb, s, s.clock()-ttlMS)
	must(tb, err)
	if !slices.Equal(out, []string{addr.String()}) {
		tb.Fatalf("reaped %q, want %v", out, addr)
	}
}

// do runs one Redis command that prepares or looks.
func do(tb testing.TB, s *Store, args ...any) any {
	tb.Helper()
	v, err := s.rdb.Do(tb.Context(), args...).Result()
	if err != nil && !errors.Is(err, redis.Nil) {
		tb.Fatalf("%v: %v", args, err)
	}
	return v
}

// versions returns the global version and that of web.
func versions(tb testing.TB, s *Store) (global, service int64) {
	tb.Helper()
	v, err := s.Versions(tb.Context(), []Service{web})
	must(tb, err)
	return v.Global, v.Of[web]
}

// dump renders every key of the namespace.
func dump(tb testing.TB, s *Store) map[string]string {
	tb.Helper()
	ctx := tb.Context()
	keys, err := s.rdb.Keys(ctx, s.keys.ns+":*").Result()
	must(tb, err)
	out := make(map[string]string, len(keys))
	for _, k := range keys {
		var v any
		var err error
		typ := s.rdb.Type(ctx, k).Val()
		switch typ {
		case "string":
			v, err = s.rdb.Get(ctx, k).Result()
		case "hash":
			v, err = s.rdb.HGetAll(ctx, k).Result()
		case "zset":
			v, err = s.rdb.ZRangeWithScores(ctx, k, 0, -1).Result()
		case "set":
			var m []string
			m, err = s.rdb.SMembers(ctx, k).Result()
			slices.Sort(m)
			v = m
		case "list":
			v, err = s.rdb.LRange(ctx, k, 0, -1).Result()
		case "stream":
			v, err = s.rdb.XRange(ctx, k, "-", "+").Result()
		default:
			tb.Fatalf("%s is a %q", k, typ)
		}
		must(tb, err)
		out[k] = fmt.Sprintf("%s %v", typ, v)
	}
	return out
}

// diff lists the keys of two dumps that differ, without the namespace.
func diff(a, b map[string]string) []string {
	var out []string
	for k := range maps.Keys(a) {
		if a[k] != b[k] {
			out = append(out, k[strings.IndexByte(k, ':')+1:])
		}
	}
	for k := range maps.Keys(b) {
		if _, ok := a[k]; !ok {
			out = append(out, k[strings.IndexByte(k, ':')+1:])
		}
	}
	slices.Sort(out)
	return out
}

// listener hears the change channel.
type listener struct {
	ps *redis.PubSub
	s  *Store
}

func listen(tb testing.TB, s *Store) *listener {
	tb.Helper()
	ps := s.Subscribe(tb.Context())
	tb.Cleanup(func() {
		if err := ps.Close(); err != nil {
			tb.Error(err)
		}
	})
	_, err := ps.Receive(tb.Context()) // the confirmation
	must(tb, err)
	return &listener{ps, s}
}

// heard returns every message since the last call. It sends a mark and reads
// up to it, so it needs no clock.
func (l *listener) heard(tb testing.TB) []string {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), 5*time.Second)
	defer cancel()
	must(tb, l.s.rdb.Publish(ctx, l.s.keys.Changes(), "mark").Err())
	var out []string
	for {
		m, err := l.ps.ReceiveMessage(ctx)
		must(tb, err)
		if m.Payload == "mark" {
			return out
		}
		out = append(out, m.Payload)
	}
}

// effect is what one call did to Redis.
type effect struct {
	before, after map[string]string
	messages      []string
	global, local int64 // how far the versions moved
	version       int64 // of the service, after
}

// observe runs act and returns what it did.
func observe(tb testing.TB, s *Store, act func()) effect {
	tb.Helper()
	l := listen(tb, s)
	e := effect{before: dump(tb, s)}
	g1, v1 := versions(tb, s)
	act()
	g2, v2 := versions(tb, s)
	e.after, e.messages, e.global, e.local, e.version = dump(tb, s), l.heard(tb), g2-g1, v2-v1, v2
	return e
}

// nothing checks that a call wrote and said nothing.
func (e effect) nothing(tb testing.TB) {
	tb.Helper()
	if d := diff(e.before, e.after); len(d) > 0 {
		tb.Errorf("it wrote %q\nbefore %v\nafter  %v", d, e.before, e.after)
	}
	if len(e.messages) > 0 {
		tb.Errorf("it said %q", e.messages)
	}
}

// oneChange checks that a call bumped both versions once, noted addr in the
// index and said so once.
func (e effect) oneChange(tb testing.TB, s *Store, addr netip.AddrPort) {
	tb.Helper()
	if e.global != 1 || e.local != 1 {
		tb.Errorf("versions moved by %d and %d, want 1 and 1", e.global, e.local)
	}
	g, v := versions(tb, s)
	if want := []string{fmt.Sprintf("%d web %d", g, v)}; !slices.Equal(e.messages, want) {
		tb.Errorf("said %q, want %q", e.messages, want)
	}
	if got := s.rdb.ZScore(tb.Context(), s.keys.Changed(web), addr.String()).Val(); got != float64(v) {
		tb.Errorf("changed has %v at %v, want %d", addr, got, v)
	}
}

// gone returns the note of addr, "" if there is none.
func gone(tb testing.TB, s *Store, addr netip.AddrPort) string {
	tb.Helper()
	v, _ := do(tb, s, "HGET", s.keys.Gone(web), addr.String()).(string)
	return v
}

// present tells whether addr is a member.
func present(tb testing.TB, s *Store, addr netip.AddrPort) bool {
	tb.Helper()
	return do(tb, s, "ZSCORE", s.keys.Instances(web), addr.String()) != nil
}

// eventually calls fn until it returns nil and shows its last error if it never
// does.
func eventually(tb testing.TB, fn func() error) {
	tb.Helper()
	deadline := time.NewTimer(30 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		err := fn()
		if err == nil {
			return
		}
		select {
		case <-deadline.C:
			tb.Fatalf("still after 30 s: %v", err)
		case <-tick.C:
		}
	}
}

func TestNewStoreRefusesNamespace(t *testing.T) {
	for _, ns := range []string{"", "a:b", "{a}", "A", "a\n", " a", strings.Repeat("a", 64)} {
		if _, err := NewStore(nil, ns); err == nil {
			t.Errorf("%q was accepted", ns)
		}
	}
}

// TestKeys fixes the public names: other people's tools depend on them.
func TestKeys(t *testing.T) {
	k, err := NewKeys("rollcall")
	must(t, err)
	got := append(k.change(web), k.Changes(), k.Reaper("r1"), k.Reapers())
	want := []string{
		"rollcall:{web}:instances", "rollcall:{web}:meta", "rollcall:{web}:admin", "rollcall:{web}:gone",
		"rollcall:{web}:gone-at", "rollcall:{web}:changed", "rollcall:{web}:version",
		"rollcall:services", "rollcall:version", "rollcall:epoch", "rollcall:config", "rollcall:quiet", "rollcall:events",
		"rollcall:changes", "rollcall:reaper:r1", "rollcall:reapers",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestPing(t *testing.T) {
	s, srv := newStore(t)
	if err := s.Ping(t.Context()); err != nil {
		t.Error(err)
	}
	srv.Kill(t)
	if err := s.Ping(t.Context()); err == nil {
		t.Error("a dead server answered")
	}
}

func TestServices(t *testing.T) {
	s, _ := newStore(t)
	do(t, s, "SADD", s.keys.Services(), "web", "api", "Bad Name", "")
	names, garbage, err := s.Services(t.Context())
	must(t, err)
	slices.Sort(names)
	slices.Sort(garbage)
	if !slices.Equal(names, []Service{"api", "web"}) || !slices.Equal(garbage, []string{"", "Bad Name"}) {
		t.Errorf("got %q and %q", names, garbage)
	}
	do(t, s, "SET", s.keys.Services(), "x")
	if _, _, err := s.Services(t.Context()); err == nil {
		t.Error("a string was read as a set")
	}
}

func TestConfig(t *testing.T) {
	srv := redistest.Start(t)
	for _, c := range []struct {
		name          string
		stored        []any // ttl_ms, interval_ms, … as HSET takes them
		ttl, interval time.Duration
		overwrite     bool
		want          [2]time.Duration
		err           bool
		writes        bool
	}{
		{"first", nil, 15 * time.Second, 5 * time.Second, false, [2]time.Duration{15 * time.Second, 5 * time.Second}, false, true},
		{"kept", []any{"ttl_ms", 9000, "interval_ms", 3000}, 15 * time.Second, 5 * time.Second, false, [2]time.Duration{9 * time.Second, 3 * time.Second}, false, false},
		{"overwritten", []any{"ttl_ms", 9000, "interval_ms", 3000}, 15 * time.Second, 5 * time.Second, true, [2]time.Duration{15 * time.Second, 5 * time.Second}, false, true},
		{"stored TTL is no number", []any{"ttl_ms", "x", "interval_ms", 3000}, 15 * time.Second, 5 * time.Second, false, [2]time.Duration{15 * time.Second, 3 * time.Second}, false, false},
		{"stored interval is no number", []any{"ttl_ms", 9000, "interval_ms", ""}, 15 * time.Second, 5 * time.Second, false, [2]time.Duration{9 * time.Second, 3 * time.Second}, false, false},
		{"stored TTL is 0", []any{"ttl_ms", 0, "interval_ms", 3000}, 15 * time.Second, 5 * time.Second, false, [2]time.Duration{15 * time.Second, 3 * time.Second}, false, false},
		{"interval exactly a third", nil, 3 * time.Second, time.Second, false, [2]time.Duration{3 * time.Second, time.Second}, false, true},
		{"interval above a third", nil, 3*time.Second - 1, time.Second, false, [2]time.Duration{}, true, false},
		{"no interval", nil, 3 * time.Second, 0, false, [2]time.Duration{}, true, false},
		{"less than a millisecond", nil, 3 * time.Second, time.Microsecond, false, [2]time.Duration{}, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			if c.stored != nil {
				do(t, s, append([]any{"HSET", s.keys.Config(), "protocol", Protocol}, c.stored...)...)
			}
			before := dump(t, s)
			got, err := s.Config(t.Context(), c.ttl, c.interval, c.overwrite)
			if (err != nil) != c.err || got.TTL != c.want[0] || got.Interval != c.want[1] || got.Slow != 0 {
				t.Errorf("got %+v %v, want %v, error %v", got, err, c.want, c.err)
			}
			if wrote := len(diff(before, dump(t, s))) > 0; wrote != c.writes {
				t.Errorf("wrote: %v, want %v", wrote, c.writes)
			}
		})
	}
}

// TestConfigSlow has instances when the times come: of shorter ones somebody may
// not have heard, who beats as slowly as the old ones allow.
// TestProtocol: reapers write the protocol's number, and never a lower one.
func TestProtocol(t *testing.T) {
	s, _ := newStore(t)
	for _, c := range []struct{ stored, want any }{{nil, "1"}, {"x", "1"}, {"0", "1"}, {"1", "1"}, {"7", "7"}} {
		if do(t, s, "DEL", s.keys.Config()); c.stored != nil {
			do(t, s, "HSET", s.keys.Config(), "protocol", c.stored)
		}
		_, err := s.Config(t.Context(), 15*time.Second, 5*time.Second, false)
		must(t, err)
		if got := do(t, s, "HGET", s.keys.Config(), "protocol"); got != c.want {
			t.Errorf("of %v it is %v, want %v", c.stored, got, c.want)
		}
	}
}

func TestConfigSlow(t *testing.T) {
	srv := redistest.Start(t)
	for _, c := range []struct {
		name          string
		stored        []any
		ttl, interval time.Duration
		overwrite     bool
		want          int64 // ms
		at            string
	}{
		{"none, and the defaults", nil, 15 * time.Second, 5 * time.Second, false, 0, ""},
		{"none, and longer ones", nil, 60 * time.Second, 6 * time.Second, false, 0, ""},
		{"none, and shorter ones", nil, 3 * time.Second, time.Second, false, 5000, "1000000"},
		{"half of them", []any{"ttl_ms", 15000}, 15 * time.Second, time.Second, false, 5000, "1000000"},
		{"kept", []any{"ttl_ms", 30000, "interval_ms", 2000}, 3 * time.Second, time.Second, false, 0, ""},
		{"set again", []any{"ttl_ms", 30000, "interval_ms", 2000}, 30 * time.Second, 2 * time.Second, true, 0, ""},
		{"longer", []any{"ttl_ms", 9000, "interval_ms", 3000}, 12 * time.Second, 4 * time.Second, true, 0, ""},
		{"shorter; own intervals may be a third of the TTL", []any{"ttl_ms", 30000, "interval_ms", 2000}, 3 * time.Second, time.Second, true, 10000, "1000000"},
		{"of an interval that is too long", []any{"ttl_ms", 15000, "interval_ms", 9000}, 15 * time.Second, 5 * time.Second, true, 0, ""},
		{"out of bounds", []any{"ttl_ms", 86400001, "interval_ms", 28800000}, 3 * time.Second, time.Second, true, 5000, "1000000"},
		{"no numbers", []any{"ttl_ms", "x", "interval_ms", "y"}, 3 * time.Second, time.Second, true, 5000, "1000000"},
		{"rounded up", []any{"ttl_ms", 10000, "interval_ms", 1000}, 3 * time.Second, time.Second, true, 3334, "1000000"},
		{"shorter for the second time", []any{"ttl_ms", 15000, "interval_ms", 5000, "slow_ms", 20000, "slow_at", 7}, 3 * time.Second, time.Second, true, 20000, "1000000"},
		{"longer meanwhile", []any{"ttl_ms", 15000, "interval_ms", 5000, "slow_ms", 20000, "slow_at", 7}, 30 * time.Second, 10 * time.Second, true, 20000, "7"},
		{"proven before", []any{"ttl_ms", 15000, "interval_ms", 5000, "slow_ms", 0, "slow_at", 7}, 3 * time.Second, time.Second, true, 5000, "1000000"},
		{"deleted but for what was proven", []any{"slow_ms", 0, "slow_at", 7}, 3 * time.Second, time.Second, false, 5000, "1000000"},
		{"no number", []any{"ttl_ms", 3000, "interval_ms", 1000, "slow_ms", "nan", "slow_at", 7}, 3 * time.Second, time.Second, false, 0, "7"},
		{"huge", []any{"ttl_ms", 3000, "interval_ms", 1000, "slow_ms", "inf", "slow_at", 7}, 3 * time.Second, time.Second, false, 0, "7"},
		{"longer than a third of the longest TTL", []any{"ttl_ms", 3000, "interval_ms", 1000, "slow_ms", 28800001, "slow_at", 7}, 3 * time.Second, time.Second, false, 0, "7"},
		{"of no change", []any{"ttl_ms", 3000, "interval_ms", 1000, "slow_ms", 9000}, 3 * time.Second, time.Second, false, 0, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := fresh(t, srv)
			s.setClock(1_000_000)
			do(t, s, "SADD", s.keys.Services(), "web")
			if c.stored != nil {
				do(t, s, append([]any{"HSET", s.keys.Config()}, c.stored...)...)
			}
			got, err := s.Config(t.Context(), c.ttl, c.interval, c.overwrite)
			if err != nil || got.Slow != c.want || got.SlowAt != c.at {
				t.Errorf("got %+v, %v, want %d of %s", got, err, c.want, c.at)
			}
			s.setClock(1_000_001)
			if again, err := s.Config(t.Context(), c.ttl, c.interval, false); err != nil || again != got {
				t.Errorf("the next reaper finds %+v, %v", again, err)
			}
			other := got
			other.SlowAt += "1"
			must(t, s.Learned(t.Context(), other))
			if again, err := s.Config(t.Context(), c.ttl, c.interval, false); err != nil || again != got {
				t.Errorf("another change was proven, and it is %+v, %v", again, err)
			}
			must(t, s.Learned(t.Context(), got))
			if again, err := s.Config(t.Context(), c.ttl, c.interval, false); err != nil || again.Slow != 0 {
				t.Errorf("proven, and it is %+v, %v", again, err)
			}
		})
	}
}

func TestVersions(t *testing.T) {
	s, _ := newStore(t)
	k := s.keys
	do(t, s, "MSET", k.Version(), 9, k.Epoch(), "e1", k.ServiceVersion("ok"), 7, k.ServiceVersion("bad"), "x",
		k.ServiceVersion("nan"), "nan", k.ServiceVersion("negative"), -3, k.ServiceVersion("highest"), MaxVersion, k.ServiceVersion("beyond"), MaxVersion+1, k.ServiceVersion("padded"), "07")
	do(t, s, "SADD", k.ServiceVersion("set"), "x")
	want := map[Service]int64{"ok": 7, "bad": -1, "nan": -1, "negative": -1, "highest": MaxVersion, "beyond": -1, "padded": -1, "set": -1, "unknown": 0}
	v, err := s.Versions(t.Context(), slices.Collect(maps.Keys(want)))
	must(t, err)
	if v.Global != 9 || v.Epoch != "e1" || len(v.ReplID) != 40 || !maps.Equal(v.Of, want) {
		t.Errorf("got %+v, want %v", v, want)
	}
	do(t, s, "SET", k.Version(), "x")
	if v, err := s.Versions(t.Context(), nil); err != nil || v.Global != -1 {
		t.Errorf("got %+v %v, want a global version of -1", v, err)
	}
}

func TestSurvey(t *testing.T) {
	s, _ := newStore(t)
	const now, cutoff, suspect = t0, t0 - 15_000, t0 - 10_000
	for i, score := range []any{
		cutoff - 1, cutoff, // stale: the first; suspect: both
		suspect - 1, suspect, // suspect: the first
		now, now + 1, "+inf", // future: the last two
	} {
		do(t, s, "ZADD", s.keys.Instances(web), score, host(i).String())
	}
	do(t, s, "ZADD", s.keys.Instances("odd"), "-inf", host(1).String())
	do(t, s, "SET", s.keys.Instances("bad"), "x")
	// What is no address, or one in another form, counts only as garbage.
	do(t, s, "ZADD", s.keys.Instances("mix"), "-inf", "x", cutoff-1, "010.0.0.1:80", cutoff-1, host(1).String(),
		suspect-2, "", suspect-1, host(2).String(), suspect, "y")
	svcs := []Service{web, "none", "bad", "odd", "mix"}
	want := []Count{
		{Service: web, Members: 7, Stale: 1, Suspects: 3, Future: 2, Oldest: cutoff - 1},
		{Service: "none"},
		{Service: "bad", Members: -1, Mistyped: true},
		{Service: "odd", Members: 1, Stale: 1, Suspects: 1},
		{Service: "mix", Members: 3, Stale: 1, Garbage: 2, Suspects: 2},
	}
	// More services than one call takes.
	for i := range 2000 {
		svcs = append(svcs, Service(fmt.Sprintf("s%d", i)))
		want = append(want, Count{Service: svcs[len(svcs)-1]})
	}
	got, err := s.Survey(t.Context(), svcs, now, cutoff, suspect)
	must(t, err)
	if !slices.Equal(got, want) {
		t.Errorf("got  %+v\nwant %+v", got[:5], want[:5])
	}
}

// TestSurveyReadsSome checks that a survey reads the oldest 1,000 suspects of a
// call at most, takes the rest for addresses, and reads nobody who is none.
func TestSurveyReadsSome(t *testing.T) {
	s, _ := newStore(t)
	for _, svc := range []Service{"a", "b"} {
		args := []any{"ZADD", s.keys.Instances(svc)}
		for i := range 600 {
			args = append(args, i, fmt.Sprint("x", i))
		}
		do(t, s, args...)
	}
	got, err := s.Survey(t.Context(), []Service{"a", "b"}, t0, 500, 600)
	must(t, err)
	want := []Count{
		{Service: "a", Stale: 0, Garbage: 500},
		{Service: "b", Members: 200, Stale: 100, Garbage: 400, Suspects: 200},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	do(t, s, "CONFIG", "RESETSTAT")
	_, err = s.Survey(t.Context(), []Service{"a", "b"}, t0, 0, 0)
	must(t, err)
	if stats := s.rdb.Info(t.Context(), "commandstats").Val(); strings.Contains(stats, "zrangebyscore") {
		t.Errorf("a survey without suspects reads members:\n%s", stats)
	}
}

// TestServerClock checks what the other tests replace: without a clock argument
// the scripts take Redis' own.
func TestServerClock(t *testing.T) {
	s, _ := newStore(t)
	ctx := t.Context()
	now := func() int64 { return s.rdb.Time(ctx).Val().UnixMilli() }
	within := func(what string, from, got int64) {
		t.Helper()
		if to := now(); got < from || got > to {
			t.Errorf("%s: %d, want %d to %d", what, got, from, to)
		}
	}
	a := host(1)
	from := now()
	join(t, s, a, "t1")
	within("score on arrival", from, int64(s.rdb.ZScore(ctx, s.keys.Instances(web), a.String()).Val()))
	// still.lua and roll.lua put the milliseconds together as text: early in a
	// second there are zeros to mind.
	for early := false; !early; early = from%1000 < 100 {
		from = now()
		_, err := s.Beat(ctx, web, Beat{Addr: a, Token: "t1", Meta: metaOf("t1")})
		must(t, err)
		within("score of a heartbeat", from, int64(s.rdb.ZScore(ctx, s.keys.Instances(web), a.String()).Val()))
		if got := s.BeatSteady(ctx, []ServiceBeat{{web, Beat{Addr: a, Token: "t1", Meta: metaOf("t1")}}}); !got[0].Done {
			t.Errorf("many heartbeats: %+v", got[0])
		}
		within("score of many heartbeats", from, int64(s.rdb.ZScore(ctx, s.keys.Instances(web), a.String()).Val()))
	}
	from = now()
	p, err := s.Pulse(ctx, "r1", "p", time.Minute)
	must(t, err)
	within("pulse", from, p.Now)
	from = now()
	snap, err := s.Read(ctx, web, nil)
	must(t, err)
	within("read", from, snap.Now)
	from = now()
	say(t, s, a, Word{Verb: "drain"})
	snap, err = s.Read(ctx, web, nil)
	must(t, err)
	within("word", from, snap.Entries[0].Instance.Admin.At)
	from = now()
	leave(t, s, a, "t1")
	g, ok := parseGone(gone(t, s, a))
	if !ok {
		t.Fatal("no note")
	}
	within("note", from, g.At)
}

// TestAnswersAreShown has what an operator wrote by hand make answers that no caller
// can use. The errors show their numbers as numbers.
func TestAnswersAreShown(t *testing.T) {
	s := fresh(t, redistest.Start(t))
	ctx := t.Context()
	s.setClock(0)
	_, pulse := s.Pulse(ctx, "r", "token", time.Minute)
	for _, c := range []struct {
		err  error
		want string
	}{
		{pulse, "pulse: answer [0 "},
	} {
		if c.err == nil || !strings.Contains(c.err.Error(), c.want) {
			t.Errorf("got  %v\nwant %s", c.err, c.want)
		}
	}
}
