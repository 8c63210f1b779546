package haproxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	native "github.com/haproxytech/client-native/v5/runtime"
	"github.com/haproxytech/client-native/v5/runtime/options"

	"rollcall/lbsync"
	"rollcall/lbsync/balancertest"
	"rollcall/lbsync/haproxy/haproxytest"
)

// soon is a generous bound for what takes no time: client-native's own patience is 30 s.
const soon = 5 * time.Second

// connServer listens on a unix socket and hands each connection to handle, in a goroutine
// of its own and numbered from 0. It closes the connection when handle returns. At the end
// of the test ctx ends and all connections are closed.
func connServer(tb testing.TB, handle func(ctx context.Context, n int, conn net.Conn)) (path string) {
	tb.Helper()
	dir, err := os.MkdirTemp("", "rc")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = os.RemoveAll(dir) })
	path = filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		for n := 0; ; n++ {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
			running.Go(func() {
				handle(ctx, n, conn)
				stop()
				_ = conn.Close()
			})
		}
	})
	tb.Cleanup(func() { cancel(); _ = l.Close(); running.Wait() })
	return path
}

// lineServer is a connServer that reads a line first, and numbers those. Connections
// without one are closed.
func lineServer(tb testing.TB, handle func(ctx context.Context, n int, line string, conn net.Conn)) (path string) {
	tb.Helper()
	var count atomic.Int64
	return connServer(tb, func(ctx context.Context, _ int, conn net.Conn) {
		if line, err := bufio.NewReader(conn).ReadString('\n'); err == nil {
			handle(ctx, int(count.Add(1))-1, line, conn)
		}
	})
}

func answer1(conn net.Conn, line string) { _, _ = io.WriteString(conn, answered(line, lines(""))) }

// sockets is how many sockets this process has open.
func sockets(tb testing.TB) (n int) {
	tb.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		tb.Fatal(err)
	}
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.HasPrefix(to, "socket:") {
			n++
		}
	}
	return n
}

// leakless checks at the end of the test, after what is started later has ended, that no
// more sockets are open than now.
func leakless(tb testing.TB) {
	tb.Helper()
	before := sockets(tb)
	tb.Cleanup(func() {
		haproxytest.Poll(tb, "sockets are closed", func() error {
			if now := sockets(tb); now > before {
				return fmt.Errorf("%d are open, %d were", now, before)
			}
			return nil
		})
	})
}

// reading reads until one Read succeeds, and tells of each error before.
func reading(t *testing.T, c *Client) (failed, done <-chan error) {
	t.Helper()
	f, d := make(chan error, 1), make(chan error, 1)
	go func() {
		for {
			_, err := c.Read(t.Context(), "be")
			if err == nil || t.Context().Err() != nil {
				d <- err
				return
			}
			select {
			case f <- err:
			default:
			}
		}
	}()
	return f, d
}

// A HAProxy that hangs is given up for the one that takes its place, in the middle of a
// call. What the old one runs when it wakes does not reach the new one.
//
// A reload does not get that far: HAProxy asks the old process for its listeners first,
// and waits.
func TestHungIsReplaced(t *testing.T) {
	leakless(t)
	h, _ := start(t, haproxytest.Backend{Slots: 1}, Config{})
	c := newClient(t, Config{Socket: h.Socket, Timeout: DefaultTimeout})
	weight := func(w int) lbsync.Op { return lbsync.Op{Kind: lbsync.SetWeight, Name: "s1", ID: 1, Weight: w} }
	apply(t, c, weight(1))
	h.Stop(t)
	if got, err := c.Apply(t.Context(), "be", []lbsync.Op{weight(7)}); !errors.Is(err, lbsync.ErrUnknown) {
		t.Fatalf("got %+v, %v", got, err)
	}
	failed, done := reading(t, c)
	<-failed
	old := h.Replace(t)
	begun := time.Now()
	select {
	case err := <-done:
		t.Logf("the new one was read %s after it answered: %v", time.Since(begun).Round(time.Millisecond), err)
	case <-time.After(soon):
		t.Fatalf("the new one was not read for %s", soon)
	}
	apply(t, c, weight(9))
	old.Cont(t)
	if p, err := c.Probe(t.Context()); err != nil || p.PID != h.PID() {
		t.Errorf("got %+v, %v, want pid %d", p, err, h.PID())
	}
	if s := read(t, c)["s1"]; s.Weight != 9 {
		t.Errorf("weight %d, want 9", s.Weight)
	}
}

// An answer that does not come, comes a byte at a time or never ends costs a Timeout and
// less than 64 MB. The next exchange is a good one.
func TestEndlessAnswers(t *testing.T) {
	for _, tt := range []struct {
		name    string
		timeout time.Duration
		want    error
		handle  func(ctx context.Context, conn net.Conn)
	}{
		{"silent", 200 * time.Millisecond, context.DeadlineExceeded, func(ctx context.Context, _ net.Conn) { <-ctx.Done() }},
		{"drips", 500 * time.Millisecond, context.DeadlineExceeded, func(ctx context.Context, conn net.Conn) {
			tick := time.NewTicker(100 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-tick.C:
				case <-ctx.Done():
					return
				}
				if _, err := conn.Write([]byte("N")); err != nil {
					return
				}
			}
		}},
		{"has no end", time.Minute, errTooLong, func(_ context.Context, conn net.Conn) {
			text := slices.Repeat([]byte("Name: HAProxy\n"), 5000)
			for {
				if _, err := conn.Write(text); err != nil {
					return
				}
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			leakless(t)
			cut := make(chan struct{})
			path := lineServer(t, func(ctx context.Context, n int, line string, conn net.Conn) {
				if n > 0 {
					answer1(conn, line)
					return
				}
				defer close(cut)
				tt.handle(ctx, conn)
			})
			c := newClient(t, Config{Socket: path, Timeout: tt.timeout})
			grown := balancertest.Memory(t)
			begun := time.Now()
			p, err := c.Probe(t.Context())
			took := time.Since(begun)
			t.Logf("ended after %s, memory grew by %d MB", took.Round(time.Millisecond), grown()>>20)
			if !errors.Is(err, lbsync.ErrUnknown) || !errors.Is(err, tt.want) || p.PID != 0 {
				t.Errorf("got %+v, %v, want %v", p, err, tt.want)
			}
			if took > min(tt.timeout, time.Second)+soon {
				t.Errorf("took %s", took)
			}
			if n := grown(); n > 64<<20 {
				t.Errorf("memory grew by %d MB", n>>20)
			}
			begun = time.Now()
			if p, err := c.Probe(t.Context()); err != nil || p.PID != 10 {
				t.Errorf("the next exchange: %+v, %v", p, err)
			}
			if took := time.Since(begun); took > soon {
				t.Errorf("the next exchange took %s", took)
			}
			if tt.name != "silent" { // that one does not look
				select {
				case <-cut:
				case <-time.After(soon):
					t.Error("the connection lives")
				}
			}
		})
	}
}

// A HAProxy that does not even accept connections gets one line, and one connection that
// asks for the listener's address, however often it is tried: others need the room.
func TestHungIsLeftAlone(t *testing.T) {
	leakless(t)
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := newClient(t, Config{Socket: path, Timeout: 30 * time.Millisecond})
	for i := range 10 {
		_, err := c.Apply(t.Context(), "be", []lbsync.Op{{Kind: lbsync.SetReady, Name: "s1", ID: 1}})
		if !errors.Is(err, lbsync.ErrUnknown) || !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, errOwed) != (i > 0) {
			t.Errorf("try %d: %v", i, err)
		}
	}
	begun := time.Now()
	if err := c.Close(t.Context()); err != nil || time.Since(begun) > soon {
		t.Errorf("Close: %v after %s", err, time.Since(begun))
	}
	var got []string
	for {
		// Nobody connects any more: what does not come at once never does.
		if err := l.SetDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		conn, err := l.Accept()
		if err != nil {
			break
		}
		line, _ := bufio.NewReader(conn).ReadString('\n')
		_ = conn.Close()
		got = append(got, line)
	}
	if len(got) != 2 || !strings.Contains(got[0], "set server be/s1") || got[1] != "" {
		t.Errorf("it was sent %q", got)
	}
}

// A line that the other side does not read, and that its socket has no room for, ends too,
// though client-native tries it twice.
func TestWriteBlocks(t *testing.T) {
	leakless(t)
	var tries atomic.Int64
	path := connServer(t, func(ctx context.Context, _ int, conn net.Conn) {
		if _, err := conn.Read(make([]byte, 1)); err == nil { // a connection that only asks for the address sends nothing
			tries.Add(1)
		}
		<-ctx.Done()
	})
	r := &native.SingleRuntime{}
	if err := r.Init(path, 0, 0, options.RuntimeOptions{DoNotCheckRuntimeOnInit: true}); err != nil {
		t.Fatal(err)
	}
	c := newCaller(r, path)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	begun := time.Now()
	a, why := c.execute(ctx, strings.Repeat("x", 4<<20))
	if took := time.Since(begun); !errors.Is(why, context.DeadlineExceeded) || a != (answer{}) || took > soon {
		t.Errorf("got %+v, %v after %s", a, why, took)
	}
	if c.owed || !c.suspect {
		t.Errorf("owed %t, suspect %t", c.owed, c.suspect)
	}
	haproxytest.Poll(t, "both tries have come", func() error {
		if n := tries.Load(); n != 2 {
			return fmt.Errorf("%d have", n)
		}
		return nil
	})
	if err := c.close(t.Context()); err != nil {
		t.Error(err)
	}
}

// The process that answers again has a line of before the silence, and runs it first:
// until then it gets no command.
func TestLateLineComesFirst(t *testing.T) {
	leakless(t)
	release := make(chan struct{})
	var mu sync.Mutex // guards order
	var order []string
	note := func(s string) { mu.Lock(); defer mu.Unlock(); order = append(order, s) }
	path := lineServer(t, func(ctx context.Context, n int, line string, conn net.Conn) {
		switch {
		case n == 1: // after a Probe
			select {
			case <-release:
			case <-ctx.Done():
			}
			note("late")
		case strings.Contains(line, "set server"):
			note("command")
			answer1(conn, line)
		default:
			note("report")
			answer1(conn, line)
		}
	})
	c := newClient(t, Config{Socket: path, Timeout: soon})
	ops := []lbsync.Op{{Kind: lbsync.SetReady, Name: "s1", ID: 1}}
	if _, err := c.Probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.cfg.Timeout = 100 * time.Millisecond
	for i := range 3 {
		got, err := c.Apply(t.Context(), "be", ops)
		if !errors.Is(err, lbsync.ErrUnknown) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("try %d: got %+v, %v", i, got, err)
		}
	}
	haproxytest.Poll(t, "a report comes in time, and is no success", func() error {
		_, err := c.Probe(t.Context())
		if err == nil {
			t.Fatal("success")
		}
		if !errors.Is(err, lbsync.ErrUnknown) || !strings.Contains(err.Error(), "still runs an earlier line") {
			return err
		}
		return nil
	})
	close(release)
	c.cfg.Timeout = soon
	// The stand-in does not answer the look at the server.
	if _, err := c.Apply(t.Context(), "be", ops); errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("after the late line: %v", err)
	}
	mu.Lock()
	defer mu.Unlock()
	if late, command := slices.Index(order, "late"), slices.Index(order, "command"); late < 0 || command < late {
		t.Errorf("order %q, want the late line before a command", order)
	}
}

// A line that was cut is waited for no longer than it may be in the way: another process
// does not have it, and one that keeps it for ever is driven all the same.
func TestLateLineIsGivenUp(t *testing.T) {
	for name, then := range map[string]func(c *Client, other *atomic.Bool){
		"another process": func(_ *Client, other *atomic.Bool) { other.Store(true) },
		"kept for long":   func(c *Client, _ *atomic.Bool) { c.calls.since = c.calls.since.Add(-lateFor) },
	} {
		t.Run(name, func(t *testing.T) {
			leakless(t)
			var other atomic.Bool
			path := lineServer(t, func(ctx context.Context, n int, line string, conn net.Conn) {
				text := lines("")
				switch {
				case n == 1:
					<-ctx.Done()
					return
				case other.Load():
					text = strings.ReplaceAll(text, "Pid: 10", "Pid: 11")
				}
				_, _ = io.WriteString(conn, answered(line, text))
			})
			c := newClient(t, Config{Socket: path, Timeout: soon})
			if _, err := c.Probe(t.Context()); err != nil {
				t.Fatal(err)
			}
			c.cfg.Timeout = 100 * time.Millisecond
			for range 2 {
				if _, err := c.Probe(t.Context()); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("got %v", err)
				}
			}
			then(c, &other)
			c.cfg.Timeout = soon
			if p, err := c.Probe(t.Context()); err != nil || (p.PID == 11) != other.Load() {
				t.Errorf("got %+v, %v", p, err)
			}
		})
	}
}

// Two Clients of one path do not cut each other's calls.
func TestCutIsOnesOwn(t *testing.T) {
	leakless(t)
	slow := make(chan struct{})
	var asked, count atomic.Int64
	path := connServer(t, func(ctx context.Context, _ int, conn net.Conn) {
		line, err := bufio.NewReader(conn).ReadString('\n')
		if err != nil {
			asked.Add(1)
			return
		}
		if count.Add(1) == 1 {
			<-ctx.Done()
			return
		}
		select {
		case <-slow:
			answer1(conn, line)
		case <-ctx.Done():
		}
	})
	first := newClient(t, Config{Socket: path, Timeout: time.Minute})
	second := newClient(t, Config{Socket: path, Timeout: time.Minute})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	hung, other := make(chan error, 1), make(chan error, 1)
	go func() { _, err := first.Probe(ctx); hung <- err }()
	ends := func() (n int) { // on the Clients' side
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if fd, err := strconv.Atoi(e.Name()); err == nil && connected(fd, []string{path}) {
				n++
			}
		}
		return n
	}
	haproxytest.Poll(t, "the first call has been looked up", func() error {
		if a, n := asked.Load(), ends(); a < 1 || n != 2 {
			return fmt.Errorf("the listener was asked for %d times, %d descriptors", a, n)
		}
		return nil
	})
	go func() { _, err := second.Probe(t.Context()); other <- err }()
	haproxytest.Poll(t, "the second call has been looked up", func() error {
		if a, n := asked.Load(), ends(); a < 2 || n < 4 {
			return fmt.Errorf("the listener was asked for %d times, %d descriptors", a, n)
		}
		return nil
	})
	cancel()
	if err := <-hung; !errors.Is(err, context.Canceled) {
		t.Errorf("the first: %v", err)
	}
	close(slow)
	if err := <-other; err != nil {
		t.Errorf("the second: %v", err)
	}
}
