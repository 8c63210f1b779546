package identity

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"rollcall/registrar"
	"rollcall/registrar/regular"
)

// lockPoll paces the attempts of an lbsync that stands by: with its start, the next
// one drives within a second.
const lockPoll = 250 * time.Millisecond

// ErrLocked says that another process drives a backend, or the whole HAProxy.
var ErrLocked = errors.New("another lbsync drives it")

// Locks keep other lbsyncs away from some backends of one HAProxy. They are the
// kernel's, on files beside the socket, so they end with their process, however that
// ends.
type Locks struct{ files []*os.File }

// TryLock locks the backends of the HAProxy behind socket, all of them, or none and
// returns ErrLocked with the name of one that is taken. For an HAProxy that is not
// driven through its socket, any other path that names it will do.
//
// They are locked by order of their names: of lbsyncs whose lists overlap, the one that
// has the last of what they share gets all of its own.
func TryLock(socket string, backends []string) (*Locks, error) {
	l := &Locks{}
	if err := l.take(socket, backends); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func (l *Locks) take(socket string, backends []string) error {
	// An lbsync of a release that locked the whole HAProxy has this file, and keeps
	// others away from all backends. Those that lock backends share it.
	err := l.lock(socket+".lbsync-lock", 0, syscall.LOCK_SH)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("lock the whole HAProxy, as older releases do: %w", err)
	}
	for _, b := range slices.Sorted(slices.Values(backends)) {
		if err := l.lock(path(socket, "lock", b), os.O_CREATE, syscall.LOCK_EX); err != nil {
			return fmt.Errorf("lock backend %s: %w", b, err)
		}
	}
	return nil
}

// lock locks one file, and adds it to l.
func (l *Locks) lock(path string, create, how int) error {
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOFOLLOW|syscall.O_NONBLOCK|create, 0o600)
	if err != nil {
		return fmt.Errorf("%w; lbsync must be able to write there", err)
	}
	info, err := f.Stat()
	if err == nil {
		err = regular.Check(path, info)
	}
	if err != nil {
		_ = f.Close() // nothing was written
		return err
	}
	if err := syscall.Flock(int(f.Fd()), how|syscall.LOCK_NB); err != nil {
		_ = f.Close() // nothing was written
		if errors.Is(err, syscall.EWOULDBLOCK) {
			err = ErrLocked
		}
		return fmt.Errorf("%w: %s", err, path)
	}
	l.files = append(l.files, f)
	return nil
}

// path is the file of a backend, beside all files whose names begin with prefix. A
// name of HAProxy's has no slash; one that has is of a backend that is nowhere.
func path(prefix, what, backend string) string {
	return prefix + ".lbsync-" + what + "." + strings.ReplaceAll(backend, "/", "%")
}

// WaitLock stands by until TryLock succeeds; standby is called once, with the first
// refusal, if it does not at first. It returns ctx's error when that ends.
func WaitLock(ctx context.Context, socket string, backends []string, standby func(error)) (*Locks, error) {
	wait := time.NewTimer(0)
	defer wait.Stop()
	for first := true; ; first = false {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-wait.C:
		}
		l, err := TryLock(socket, backends)
		if !errors.Is(err, ErrLocked) {
			return l, err
		}
		if first {
			standby(err)
		}
		wait.Reset(registrar.Shorten(lockPoll))
	}
}

// Close gives the locks back. The files stay: removing one would let two processes
// hold two locks of one name.
func (l *Locks) Close() error {
	var errs []error
	for _, f := range l.files {
		errs = append(errs, f.Close())
	}
	l.files = nil
	return errors.Join(errs...)
}
