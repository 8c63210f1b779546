package haproxy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"rollcall/registrar"
)

// lockPoll paces the attempts of an lbsync that stands by.
const lockPoll = time.Second

// ErrLocked says that another process drives the same HAProxy.
var ErrLocked = errors.New("another lbsync drives this HAProxy")

// Lock keeps other lbsyncs away from one HAProxy. It is a lock of the kernel's
// on a file beside the socket, so it ends with its process, however that ends.
type Lock struct{ file *os.File }

// TryLock takes the lock of socket, or returns ErrLocked. For an HAProxy that is
// not driven through its socket, any other path that names it will do.
func TryLock(socket string) (*Lock, error) {
	path := socket + ".lbsync-lock"
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock: %w; lbsync must be able to write there", err)
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err == nil {
		return &Lock{f}, nil
	}
	_ = f.Close() // nothing was written
	if errors.Is(err, syscall.EWOULDBLOCK) {
		err = ErrLocked
	}
	return nil, fmt.Errorf("lock %s: %w", path, err)
}

// WaitLock stands by until the lock is free; standby is called once if it is
// not free at first. It returns ctx's error when that ends.
func WaitLock(ctx context.Context, socket string, standby func()) (*Lock, error) {
	wait := time.NewTimer(0)
	defer wait.Stop()
	for first := true; ; first = false {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-wait.C:
		}
		l, err := TryLock(socket)
		if !errors.Is(err, ErrLocked) {
			return l, err
		}
		if first {
			standby()
		}
		wait.Reset(registrar.Shorten(lockPoll))
	}
}

// Close gives the lock back. The file stays: removing it would let two
// processes hold two locks of one name.
func (l *Lock) Close() error { return l.file.Close() }
