package logqueue

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"
)

// gate is a writer that stands still while it is shut, and fails while it has an
// error, after as many bytes as it then takes.
type gate struct {
	shut chan struct{} // closed = it goes on; nil = it never stands still

	mu    sync.Mutex
	text  bytes.Buffer
	fails error
	takes int // bytes of a write that fails
	calls int
}

func (g *gate) Write(p []byte) (int, error) {
	if g.shut != nil {
		<-g.shut // not a mutex: synctest's clock must go on
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.calls++
	if g.fails != nil {
		n, _ := g.text.Write(p[:min(g.takes, len(p))])
		return n, g.fails
	}
	return g.text.Write(p)
}

func (g *gate) fail(err error, takes int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.fails, g.takes = err, takes
}

func (g *gate) String() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.text.String()
}

// closed closes a queue that must have been able to write all.
func closed(t *testing.T, q *Queue) {
	t.Helper()
	if !q.Close(10 * time.Second) {
		t.Fatal("what waits was not written")
	}
}

func say(t *testing.T, q *Queue, text string) {
	t.Helper()
	if n, err := q.Write([]byte(text)); n != len(text) || err != nil {
		t.Fatalf("Write: %d, %v", n, err)
	}
}

// TestOrder: what fits comes out as it came in, a line a write, and the caller may
// use its buffer again.
func TestOrder(t *testing.T) {
	g := &gate{}
	q := New(g)
	var want strings.Builder
	buf := make([]byte, 0, 20)
	for i := range MaxLines / 2 {
		buf = append(strconv.AppendInt(buf[:0], int64(i), 10), '\n')
		want.Write(buf)
		if n, err := q.Write(buf); n != len(buf) || err != nil {
			t.Fatalf("Write: %d, %v", n, err)
		}
		clear(buf)
	}
	closed(t, q)
	if g.String() != want.String() || g.calls != MaxLines/2 || q.Dropped() != 0 {
		t.Errorf("%d writes of %d bytes for %d, %d dropped", g.calls, len(g.String()), want.Len(), q.Dropped())
	}
	say(t, q, "late\n")
	if q.Dropped() != 1 || strings.Contains(g.String(), "late") {
		t.Errorf("after Close %d dropped, %q", q.Dropped(), g)
	}
}

// TestBounds has the writer stand still: lines up to the bound wait, the others are
// dropped, counted, and said in the place where they would be.
func TestBounds(t *testing.T) {
	for _, c := range []struct {
		name string
		line string
		fit  int
	}{
		{"lines", "x\n", MaxLines},
		{"bytes", strings.Repeat("x", 1<<10-1) + "\n", MaxBytes >> 10},
		{"one line fills it", strings.Repeat("x", MaxBytes-1) + "\n", 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := &gate{shut: make(chan struct{})}
				q := New(g)
				for range c.fit {
					say(t, q, c.line)
				}
				if q.Dropped() != 0 {
					t.Errorf("%d dropped of what fits", q.Dropped())
				}
				for range 7 {
					say(t, q, c.line)
				}
				if q.Dropped() != 7 {
					t.Errorf("%d dropped of 7 that do not fit", q.Dropped())
				}
				close(g.shut)
				synctest.Wait() // there is room, and nobody logs
				say(t, q, "after\n")
				closed(t, q)
				if want := strings.Repeat(c.line, c.fit) + "7 log lines were dropped\nafter\n"; g.String() != want {
					t.Errorf("%d bytes, want %d: …%.60q", len(g.String()), len(want), g.String()[max(0, len(g.String())-60):])
				}
			})
		})
	}
}

// TestDroppedBetween: the number is said between the line before and the line after.
func TestDroppedBetween(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gate{shut: make(chan struct{})}
		q := New(g)
		big := strings.Repeat("x", MaxBytes/2-1) + "\n"
		say(t, q, big)
		say(t, q, "a\n")
		say(t, q, big) // does not fit
		say(t, q, big) // nor this
		say(t, q, "b\n")
		close(g.shut)
		closed(t, q)
		if want := big + "a\n2 log lines were dropped\nb\n"; g.String() != want {
			t.Errorf("…%q", strings.TrimPrefix(g.String(), big))
		}
	})
}

// TestLongLine: a line that could never fit is cut, at a rune's end.
func TestLongLine(t *testing.T) {
	for _, extra := range []int{0, 1, 2, 3, 4, 1 << 20} {
		synctest.Test(t, func(t *testing.T) {
			g := &gate{}
			q := New(g)
			// The cut falls into a rune, or between two.
			line := strings.Repeat("x", extra%2) + strings.Repeat("é", MaxBytes/2-1) + strings.Repeat("x", 1+extra-extra%2) + "\n"
			say(t, q, line)
			synctest.Wait() // until there is room again
			say(t, q, "next\n")
			closed(t, q)
			if extra == 0 && g.String() != line+"next\n" {
				t.Error("a line of the greatest length is changed")
			}
			got, rest, _ := strings.Cut(g.String(), "\n")
			if extra > 0 && (!utf8.ValidString(got) || !strings.HasSuffix(got, "é…") || len(got) >= MaxBytes || len(got) < MaxBytes-8) {
				t.Errorf("%d bytes too long: %d are left: %q", extra, len(got), got[max(0, len(got)-10):])
			}
			if rest != "next\n" || q.Dropped() != 0 {
				t.Errorf("%d bytes too long: %d dropped, then %q", extra, q.Dropped(), rest)
			}
		})
	}
}

// TestCrowd has a thousand goroutines log at once: nothing is lost without being
// counted, and the lines of each are in order. Nobody waits for a wake-up: all is
// written when they have ended, though the queue was empty again and again.
func TestCrowd(t *testing.T) {
	const goroutines, each = 1000, 50
	g := &gate{}
	q := New(g)
	var crowd sync.WaitGroup
	for i := range goroutines {
		crowd.Go(func() {
			for n := range each {
				fmt.Fprintf(q, "%d %d\n", i, n)
			}
		})
	}
	crowd.Wait()
	closed(t, q)
	last := make([]int, goroutines)
	for i := range last {
		last[i] = -1
	}
	lines, missed := 0, 0
	for l := range strings.Lines(g.String()) {
		var i, n int
		if m, err := fmt.Sscanf(l, "%d log lines were dropped", &n); m == 1 && err == nil {
			missed += n
			continue
		}
		if _, err := fmt.Sscanf(l, "%d %d\n", &i, &n); err != nil {
			t.Fatalf("line %q: %v", l, err)
		}
		if n <= last[i] {
			t.Fatalf("goroutine %d: line %d after %d", i, n, last[i])
		}
		last[i] = n
		lines++
	}
	t.Logf("%d lines, %d of them dropped", goroutines*each, missed)
	if lines+missed != goroutines*each || uint64(missed) != q.Dropped() {
		t.Errorf("%d written and %d said to be dropped of %d; counted %d", lines, missed, goroutines*each, q.Dropped())
	}
}

// TestWakeUps: one line after the other is written though nothing comes behind it.
func TestWakeUps(t *testing.T) {
	r, w := io.Pipe()
	q := New(w)
	buf := make([]byte, 10)
	for i := range 10_000 {
		text := strconv.Itoa(i) + "\n"
		say(t, q, text)
		n, err := io.ReadFull(r, buf[:len(text)])
		if err != nil || string(buf[:n]) != text {
			t.Fatalf("%q: %v", buf[:n], err)
		}
	}
	closed(t, q)
}

// TestFailure: what cannot be written is counted and said with its cause when it can
// be again; a line of which only a part was written does not run into the next.
func TestFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gate{}
		q := New(g)
		q.Report(func(lines uint64, cause error) []byte { return fmt.Appendf(nil, "[%d %v]\n", lines, cause) })
		say(t, q, "a\n")
		synctest.Wait()
		g.fail(syscall.ENOSPC, 3)
		say(t, q, "broken\n")
		synctest.Wait()
		g.fail(syscall.ENOSPC, 0)
		say(t, q, "b\n")
		say(t, q, "c\n")
		synctest.Wait()
		if q.Dropped() != 3 {
			t.Errorf("%d dropped", q.Dropped())
		}
		g.fail(nil, 0)
		say(t, q, "d\n")
		say(t, q, "e\n")
		closed(t, q)
		if want := "a\nbro\n[3 no space left on device]\nd\ne\n"; g.String() != want {
			t.Errorf("got %q, want %q", g, want)
		}
	})
}

// TestFailureAtTheEnd: Close says what was lost if it can be said by then, and ends
// if it cannot.
func TestFailureAtTheEnd(t *testing.T) {
	for _, better := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			g := &gate{}
			q := New(g)
			g.fail(syscall.EPIPE, 0)
			say(t, q, "a\n")
			synctest.Wait()
			want := ""
			if better {
				g.fail(nil, 0)
				want = "1 log lines were dropped\n"
			}
			closed(t, q)
			if g.String() != want {
				t.Errorf("got %q, want %q", g, want)
			}
		})
	}
}

// TestBusy: a file that another process made non-blocking is tried again, from where
// it stopped.
func TestBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gate{}
		q := New(g)
		g.fail(&os.PathError{Op: "write", Path: "stderr", Err: syscall.EAGAIN}, 1)
		say(t, q, "abcdef\n")
		time.Sleep(busyWait + busyWait/2) // the clock is synctest's: two tries
		g.fail(nil, 0)
		closed(t, q)
		if g.String() != "abcdef\n" || q.Dropped() != 0 {
			t.Errorf("%q, %d dropped", g, q.Dropped())
		}
	})
}

// TestCloseIsBounded: a write that hangs, or a file that stays busy, ends with the
// process and does not keep it.
func TestCloseIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gate{shut: make(chan struct{})}
		q := New(g)
		say(t, q, "a\n")
		begun := time.Now()
		if q.Close(time.Second) || time.Since(begun) != time.Second {
			t.Errorf("Close of a log that hangs took %v", time.Since(begun))
		}
		close(g.shut)
		<-q.done
	})
	synctest.Test(t, func(t *testing.T) {
		g := &gate{}
		g.fail(syscall.EAGAIN, 0)
		q := New(g)
		say(t, q, "a\n")
		if q.Close(time.Second) {
			t.Error("Close of a log that is busy wrote it")
		}
		<-q.done
	})
}

// TestNoMemoryAtRest: what waited is let go of.
func TestNoMemoryAtRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gate{shut: make(chan struct{})}
		q := New(g)
		for range MaxLines + 1 {
			say(t, q, "x\n")
		}
		close(g.shut)
		synctest.Wait()
		q.mu.Lock()
		if q.waiting != nil || q.lines != 0 || q.bytes != 0 || q.missed != 0 {
			t.Errorf("at rest %d lines of %d bytes wait, %d missed, room for %d", q.lines, q.bytes, q.missed, cap(q.waiting))
		}
		q.mu.Unlock()
		closed(t, q)
	})
}

var errAny = errors.New("any")

// TestNeverAnError: zerolog would print one to standard error itself.
func TestNeverAnError(t *testing.T) {
	g := &gate{}
	g.fail(errAny, 0)
	q := New(g)
	for range 10 {
		say(t, q, "x\n")
		say(t, q, "")
	}
	closed(t, q)
	if q.Dropped() != 10 {
		t.Errorf("%d dropped", q.Dropped())
	}
}

// TestFlush: it waits for what is being written, and not for a reader that stands still.
func TestFlush(t *testing.T) {
	t.Parallel()
	begun, goOn := make(chan struct{}), make(chan struct{})
	q := New(writerFunc(func(p []byte) (int, error) {
		begun <- struct{}{}
		<-goOn
		return len(p), nil
	}))
	if !q.Flush(time.Minute) {
		t.Error("nothing waits")
	}
	for range 2 {
		if _, err := q.Write([]byte("line\n")); err != nil {
			t.Fatal(err)
		}
	}
	<-begun
	if q.Flush(10 * time.Millisecond) {
		t.Error("a line is under way")
	}
	flushed := make(chan bool)
	go func() { flushed <- q.Flush(time.Minute) }()
	goOn <- struct{}{}
	<-begun
	select {
	case <-flushed:
		t.Error("one more is under way")
	default:
	}
	goOn <- struct{}{}
	if !<-flushed {
		t.Error("it has been written")
	}
	q.Close(time.Minute)
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
