package haproxy

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"
)

func TestLock(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	first, err := TryLock(socket)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := TryLock(socket); !errors.Is(err, ErrLocked) {
		t.Fatalf("a second one: %v", err)
	}
	stood := make(chan struct{})
	got := make(chan error, 1)
	go func() {
		second, err := WaitLock(t.Context(), socket, func() { close(stood) })
		if err == nil {
			err = second.Close()
		}
		got <- err
	}()
	<-stood
	select {
	case err := <-got:
		t.Fatalf("it did not wait: %v", err)
	default:
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-got:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the lock is free, and it waits")
	}
}

func TestLockEnds(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := TryLock(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := WaitLock(ctx, socket, cancel); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if _, err := TryLock(filepath.Join(t.TempDir(), "missing", "s")); err == nil || errors.Is(err, ErrLocked) {
		t.Errorf("no directory: %v", err)
	}
}
