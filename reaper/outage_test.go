package reaper

import (
	"context"
	"errors"
	"net"
	"os"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// hourly is the most lines that a process may write in an hour without Redis.
const hourly = 100

// unheard returns a store of a Redis at an address where nobody listens, and what
// closes it: go-redis dials on once a second after a refused connection, until it
// sees that its pool is closed. It is for a simulated clock.
func unheard(t *testing.T) (*registrar.Store, func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	rdb, err := registrar.Open("redis://"+l.Addr().String()+"/0", 4)
	if err != nil {
		t.Fatal(err)
	}
	s, err := registrar.NewStore(rdb, registrar.DefaultNamespace)
	if err != nil {
		t.Fatal(err)
	}
	return s, func() {
		if err := rdb.Close(); err != nil {
			t.Error(err)
		}
		<-time.After(2 * time.Second)
	}
}

// held counts the open files and the bytes in use of this process.
func held(tb testing.TB) (files int, bytes uint64) {
	tb.Helper()
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		tb.Fatal(err)
	}
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return len(open), m.HeapAlloc
}

// TestHourWithoutRedis has a Reaper try for an hour, by a simulated clock, where
// nobody listens, once from its start and once after it was armed, and counts what
// it says.
func TestHourWithoutRedis(t *testing.T) {
	t.Run("from the start", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s, done := unheard(t)
			defer done()
			log := &logBuffer{}
			r := newReaper(t, Config{TTL: registrar.DefaultTTL}, s, zerolog.New(log))
			ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
			defer cancel()
			if err := r.Run(ctx); err != nil {
				t.Error(err)
			}
			if n := len(log.lines("\n")); n != 1 {
				t.Errorf("%d lines, want one: %q", n, log.lines("\n"))
			}
		})
	})
	t.Run("after it was armed", func(t *testing.T) {
		srv := redistest.Start(t)
		// What one pulse leaves behind, 4,000 would show.
		files, heap := held(t)
		defer func() {
			if f, h := held(t); f > files || h > heap+4<<20 {
				t.Errorf("%d open files and %d bytes after it, %d and %d before", f, h, files, heap)
			}
		}()
		synctest.Test(t, func(t *testing.T) {
			away, done := unheard(t)
			defer done()
			log := &logBuffer{}
			r := newReaper(t, Config{TTL: registrar.DefaultTTL}, newStore(t, srv), zerolog.New(log))
			arm(t, r)
			r.store = &connected{Store: away}
			ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
			defer cancel()
			if err := r.Run(ctx); err != nil {
				t.Error(err)
			}
			lines := log.lines("\n")
			t.Logf("%d lines, %d pulses", len(lines), r.store.(*connected).pulses)
			// Armed, not armed, that it cannot tell, and at the end that its entry stays.
			if len(lines) != 4 || r.store.(*connected).pulses < 3000 {
				t.Errorf("%d pulses, lines %q", r.store.(*connected).pulses, lines)
			}
		})
	})
}

// connected is a store whose outage began after Run had read the times.
type connected struct {
	Store
	pulses int
}

func (c *connected) Config(_ context.Context, ttl, interval time.Duration, _ bool) (registrar.Times, error) {
	return registrar.Times{TTL: ttl, Interval: interval}, nil
}

func (c *connected) Pulse(ctx context.Context, id, token string, expiry time.Duration) (registrar.Pulse, error) {
	c.pulses++
	return c.Store.Pulse(ctx, id, token, expiry)
}

// TestHourOfOutages arms and disarms a Reaper all the time, with another cause each
// time, and has its sweeps fail and succeed.
func TestHourOfOutages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &logBuffer{}
		r := newReaper(t, Config{}, nil, zerolog.New(log))
		healthy := func() {
			r.proof.ok, r.proof.segments = true, []segment{{0, 2 * r.cfg.TTL.Milliseconds()}}
			r.note(fault{})
			r.complain(nil)
			if !r.armed {
				t.Fatal("not armed")
			}
		}
		fails := func(cause string) {
			r.note(r.proof.soft(cause, errors.New("refused")))
			r.complain(errors.New("refused"))
		}
		for range 1200 {
			healthy()
			<-time.After(time.Second)
			for _, cause := range []string{causePulse, causeSlow} {
				fails(cause)
				<-time.After(time.Second)
			}
		}
		lines := log.lines("\n")
		t.Logf("%d lines", len(lines))
		if len(lines) > hourly/2 || len(log.lines(`"armed"`)) == 0 || len(log.lines(causePulse)) == 0 || len(log.lines(causeSlow)) == 0 {
			t.Errorf("%d lines: %q", len(lines), lines)
		}
		// What lasts is said in the end.
		for range 1200 {
			fails(causeCanary)
			<-time.After(time.Second)
		}
		if n := len(log.lines(causeCanary)); n != 1 {
			t.Errorf("%d lines of a cause that lasted 20 min", n)
		}
		if s := r.Status(); s.Armed || s.Cause != causeCanary {
			t.Errorf("status %+v", s)
		}
	})
}
