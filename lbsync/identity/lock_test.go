package identity

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// mustLock is TryLock until the test ends.
func mustLock(t *testing.T, socket string, backends ...string) *Locks {
	t.Helper()
	l, err := TryLock(socket, backends)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func TestLock(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	first := mustLock(t, socket, "b", "a")
	other := mustLock(t, socket, "c")
	_, err := TryLock(socket, []string{"d", "c"})
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "backend c: ") {
		t.Fatalf("a second one: %v", err)
	}
	mustLock(t, socket, "d") // which was given back
	if _, err := TryLock(socket, []string{"d", "c"}); err == nil || !strings.Contains(err.Error(), "backend c: ") {
		t.Errorf("not by order of their names: %v", err)
	}
	said := make(chan error, 2)
	got := make(chan error, 1)
	go func() {
		second, err := WaitLock(t.Context(), socket, []string{"c", "b"}, func(err error) { said <- err })
		if err == nil {
			err = second.Close()
		}
		got <- err
	}()
	if err := <-said; !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "backend b: ") {
		t.Errorf("standing by for %v", err)
	}
	// One of two is not enough.
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	mustLock(t, socket, "a")
	select {
	case err := <-got:
		t.Fatalf("it did not wait: %v", err)
	default:
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-got:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(30 * time.Second):
		t.Error("the locks are free, and it waits")
	}
	if len(said) > 0 {
		t.Errorf("it said more than once that it stands by: %v", <-said)
	}
}

// TestLocksOverlap has lbsyncs whose lists overlap, each named in another order, take
// and give back: each gets its turn, and no backend is ever two lbsyncs'.
func TestLocksOverlap(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	var mu sync.Mutex
	driven := map[string]int{}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var driving sync.WaitGroup
	for _, list := range [][]string{{"a", "b"}, {"b", "c"}, {"c", "a"}, {"c", "b", "a"}} {
		driving.Go(func() {
			for range 3 {
				l, err := WaitLock(ctx, socket, list, func(error) {})
				if err != nil {
					t.Errorf("%v never had its turn: %v", list, err)
					return
				}
				count := func(n int) {
					mu.Lock()
					defer mu.Unlock()
					for _, b := range list {
						if driven[b] += n; driven[b] > 1 {
							t.Errorf("backend %s is driven twice", b)
						}
					}
				}
				count(1)
				count(-1)
				if err := l.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	driving.Wait()
}

// TestLockOfAnOlderRelease has an lbsync that locks the whole HAProxy keep others
// away, and them keep it away.
func TestLockOfAnOlderRelease(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	f, err := os.OpenFile(socket+".lbsync-lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	whole := func() error { return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) }
	if err := whole(); err != nil {
		t.Fatal(err)
	}
	if _, err := TryLock(socket, []string{"a"}); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "whole HAProxy") {
		t.Errorf("beside an older one: %v", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	a, b := mustLock(t, socket, "a"), mustLock(t, socket, "b")
	for _, l := range []*Locks{a, b} {
		if err := whole(); !errors.Is(err, syscall.EWOULDBLOCK) {
			t.Errorf("an older one beside it: %v", err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := whole(); err != nil {
		t.Errorf("alone: %v", err)
	}
}

func TestLockEnds(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	mustLock(t, socket, "a")
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := WaitLock(ctx, socket, []string{"a"}, func(error) { cancel() }); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if _, err := TryLock(filepath.Join(t.TempDir(), "missing", "s"), []string{"a"}); err == nil || errors.Is(err, ErrLocked) {
		t.Errorf("no directory: %v", err)
	}
	mustLock(t, socket, "b")
	if err := os.Symlink("/dev/null", path(socket, "lock", "c")); err != nil {
		t.Fatal(err)
	}
	if _, err := TryLock(socket, []string{"b2", "c"}); err == nil || errors.Is(err, ErrLocked) {
		t.Errorf("a link: %v", err)
	}
	mustLock(t, socket, "b2") // which was given back
}
