package registrar

import (
	"context"
	"net"
	"os"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"rollcall/registrar/redistest"
)

// closedPort returns a Redis URL where nobody listens.
func closedPort(tb testing.TB) string {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(tb, err)
	must(tb, l.Close())
	return "redis://" + l.Addr().String() + "/0"
}

// hourly is the most lines that a process may write in an hour without Redis.
const hourly = 100

// dialled waits, by the simulated clock, until go-redis has seen that its pool is
// closed: it dials on once a second after a refused connection.
func dialled() { <-time.After(2 * time.Second) }

// held counts the open files and the bytes in use of this process.
func held(tb testing.TB) (files int, bytes uint64) {
	tb.Helper()
	open, err := os.ReadDir("/proc/self/fd")
	must(tb, err)
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return len(open), m.HeapAlloc
}

// TestHourWithoutRedis has a Beater try for an hour, by a simulated clock, where
// nobody listens, and counts what it says.
func TestHourWithoutRedis(t *testing.T) {
	// What one try leaves behind, 1,400 would show.
	files, heap := held(t)
	defer func() {
		if f, h := held(t); f > files || h > heap+4<<20 {
			t.Errorf("%d open files and %d bytes after it, %d and %d before", f, h, files, heap)
		}
	}()
	synctest.Test(t, func(t *testing.T) {
		rdb, err := Open(closedPort(t), 1)
		must(t, err)
		defer dialled()
		defer func() { must(t, rdb.Close()) }()
		s, err := NewStore(rdb, DefaultNamespace)
		must(t, err)
		log, tried := &transcript{}, 0
		b, err := NewBeater(BeaterConfig{Service: web, Addr: host(1), Weight: 1, Beaten: func(error) { tried++ }}, s, zerolog.New(log))
		must(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		must(t, b.Run(ctx))
		said := log.said(t)
		t.Logf("%d tries, %d lines", tried, len(said))
		if want := []string{saidFailed, saidAway}; tried < 1000 || !slices.Equal(said, want) {
			t.Errorf("%d tries, said %q, want %q", tried, said, want)
		}
	})
}

// TestHourOfOutages is the same with a Redis that refuses two beats of four and
// forgets everything in between, as one that restarts in a loop.
func TestHourOfOutages(t *testing.T) {
	srv := redistest.Start(t)
	synctest.Test(t, func(t *testing.T) {
		s, err := NewStore(srv.Client(t), DefaultNamespace)
		must(t, err)
		b, log := newBeater(t, s, 0)
		begun, failed, arrived := time.Now(), 0, 0
		for n := 0; time.Since(begun) < time.Hour; n++ {
			switch n % 4 {
			case 0:
				do(t, s, "FLUSHALL")
				do(t, s, "CONFIG", "SET", "min-replicas-to-write", 1)
			case 2:
				do(t, s, "CONFIG", "SET", "min-replicas-to-write", 0)
				arrived++
			}
			next, err := b.Beat(t.Context())
			if (err != nil) != (n%4 < 2) {
				t.Fatalf("beat %d: %v", n, err)
			}
			if err != nil {
				failed++
			}
			<-time.After(next)
		}
		said := log.said(t)
		t.Logf("%d failed beats, %d arrivals, %d lines", failed, arrived, len(said))
		if arrived < 100 || len(said) > hourly {
			t.Errorf("%d arrivals, %d lines, want at most %d: %q", arrived, len(said), hourly, said)
		}
		if !slices.Equal(said[:4], []string{saidFailed, saidBack, saidRegistered, saidFailed}) {
			t.Errorf("began with %q: the first outages must be said", said[:4])
		}
		// One that lasts is said, however many were before it.
		do(t, s, "CONFIG", "SET", "min-replicas-to-write", 1)
		for range 200 {
			next, _ := b.Beat(t.Context())
			<-time.After(next)
		}
		if said := log.said(t); said[len(said)-1] != saidFailed {
			t.Errorf("the last was %q, want %q", said[len(said)-1], saidFailed)
		}
	})
}

func TestSparing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s Sparing
		count := func(d time.Duration) int {
			n := 0
			for end := time.Now().Add(d); time.Now().Before(end); <-time.After(time.Second) {
				if s.May() {
					n++
				}
			}
			return n
		}
		if n := count(time.Minute); n != sayAtOnce {
			t.Errorf("%d at once, want %d", n, sayAtOnce)
		}
		if n := count(time.Hour - time.Minute); n != 3 {
			t.Errorf("%d in the rest of the hour, want one each quarter", n)
		}
		<-time.After(3 * time.Hour)
		if n := count(time.Minute); n != sayAtOnce {
			t.Errorf("%d after three hours' silence, want %d", n, sayAtOnce)
		}
	})
}
