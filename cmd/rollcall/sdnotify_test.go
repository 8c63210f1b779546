package main

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// TestDaemonsNotify has the daemons that are no sidecars tell systemd when they
// are of use, which they are not without Redis, and when they stop.
func TestDaemonsNotify(t *testing.T) {
	ha := haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 2}}})
	for _, c := range []struct {
		args  []string
		away  string // it logs without Redis
		ready string // its status when it is ready
	}{
		{[]string{"reap", "--ttl", "3s"}, "cannot read the registry's times", "STATUS=armed"},
		{[]string{"lbsync", "--socket", ha.Socket, "--backend", "web=be"}, "redis does not answer", "STATUS=every backend is true"},
		{[]string{"watch"}, "redis does not answer", "STATUS=watching"},
		{[]string{"serve", "--listen", "127.0.0.1:0"}, "redis does not answer", "STATUS=serving"},
	} {
		t.Run(c.args[0], func(t *testing.T) {
			next := notifySocket(t)
			s := &system{redis: redistest.Start(t), ha: ha}
			s.redis.Kill(t)
			p := s.spawn(t, c.args...)
			haproxytest.Poll(t, "it has met the outage", func() error {
				if out := p.out.String(); !strings.Contains(out, c.away) {
					return errors.New(out)
				}
				return nil
			})
			if got := next(50 * time.Millisecond); got != "" {
				t.Errorf("without Redis it says %q", got)
			}
			s.redis.Launch(t)
			got := next(10 * time.Second)
			for strings.HasPrefix(got, "STATUS=not armed") {
				got = next(10 * time.Second)
			}
			if !strings.HasPrefix(got, c.ready) {
				t.Errorf("heard %q, want %q", got, c.ready)
			}
			if got := next(10 * time.Second); got != "READY=1" {
				t.Errorf("heard %q, want READY=1", got)
			}
			if code := p.signal(t, syscall.SIGTERM); code != 0 {
				t.Errorf("exit %d", code)
			}
			got = next(10 * time.Second)
			for strings.HasPrefix(got, "STATUS=") { // a pulse may have been slow
				got = next(10 * time.Second)
			}
			if got != "STOPPING=1" {
				t.Errorf("heard %q, want STOPPING=1", got)
			}
		})
	}
}

// notifySocket listens in systemd's place, and returns what gives the next
// message, or "" if there is none in time.
func notifySocket(t *testing.T) (next func(limit time.Duration) string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "rc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return func(limit time.Duration) string {
		t.Helper()
		buf := make([]byte, 1000)
		if err := l.SetReadDeadline(time.Now().Add(limit)); err != nil {
			t.Fatal(err)
		}
		n, err := l.Read(buf)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		return string(buf[:n])
	}
}

// TestNotifyStandsStill has a systemd that reads nothing: nobody waits for it, and
// what it reads later is what is so then.
func TestNotifyStandsStill(t *testing.T) {
	next := notifySocket(t)
	path := os.Getenv("NOTIFY_SOCKET")
	// full fills the socket: what one sender may have under way can be less than what
	// the socket holds (net.unix.max_dgram_qlen), so it is full when a new one gets
	// nothing through.
	full := func() {
		t.Helper()
		for sent := 1; sent > 0; {
			fill, err := net.Dial("unixgram", path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { fill.Close() })
			for sent = 0; ; sent++ {
				if err := fill.SetWriteDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
					t.Fatal(err)
				}
				_, err := fill.Write([]byte("filler"))
				if errors.Is(err, os.ErrDeadlineExceeded) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	full()
	var log lockedBuffer
	n := newSystemd(zerolog.New(&log))
	begun := time.Now()
	for i := range 100 {
		n.useful(strconv.Itoa(i))
	}
	if took := time.Since(begun); took > 10*time.Second { // 1 s each, if it waits
		t.Errorf("100 messages took %v", took)
	}
	haproxytest.Poll(t, "it is said", func() error {
		if log.String() == "" {
			return errors.New("it is not")
		}
		return nil
	})
	var got []string
	for len(got) == 0 || got[len(got)-1] != "STATUS=99" {
		m := next(10 * time.Second)
		if m == "" {
			t.Fatalf("heard only %q", got)
		}
		if m != "filler" {
			got = append(got, m)
		}
	}
	if want := []string{"STATUS=0", "READY=1", "STATUS=99"}; !slices.Equal(got, want) {
		t.Errorf("heard %q, want %q", got, want)
	}
	n.send("STOPPING=1")
	n.close()
	if got := next(10 * time.Second); got != "STOPPING=1" {
		t.Errorf("heard %q", got)
	}
	if lines := strings.Count(log.String(), "\n"); lines != 1 {
		t.Errorf("it is said %d times:\n%s", lines, log.String())
	}

	// The end waits for it, but not for long.
	n = newSystemd(zerolog.Nop())
	full()
	n.send("STOPPING=1")
	begun = time.Now()
	n.close()
	if took := time.Since(begun); took < notifyClose/2 || took > 10*notifyClose {
		t.Errorf("close took %v", took)
	}
}

// TestBeatsWithoutSystemd: the sidecar of an app whose systemd stands still is
// registered, beats and leaves.
func TestBeatsWithoutSystemd(t *testing.T) {
	notifySocket(t) // nobody reads it
	fill, err := net.Dial("unixgram", os.Getenv("NOTIFY_SOCKET"))
	if err != nil {
		t.Fatal(err)
	}
	defer fill.Close()
	for err == nil {
		_ = fill.SetWriteDeadline(time.Now().Add(50 * time.Millisecond)) // unixgram has deadlines
		_, err = fill.Write([]byte("filler"))
	}
	s := &system{redis: redistest.Start(t)}
	m := s.monitor(t, "register", "--service", "web", "--addr", "127.0.0.1:9001", "--interval", "50ms")
	m.shows(t, "rollcall_beats_total", 10, many)
	if code := m.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit %d", code)
	}
	s.goes(t, "127.0.0.1:9001", "left")
}
