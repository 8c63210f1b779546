package health

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http/httptrace"
	"slices"
	"sync"
	"syscall"
	"time"

	"rollcall/registrar"
)

// unknown wraps err so that it says that nothing could be seen.
func unknown(err error) error { return fmt.Errorf("%w: %w", ErrUnknown, err) }

// lacking are the errors of system calls about sockets that say what this process
// or its machine lacks, or what a sandbox or a firewall of its own forbids. That an
// address refuses, resets, does not answer or cannot be reached is none of these:
// balancers would see the same.
var lacking = []syscall.Errno{
	syscall.EMFILE, syscall.ENFILE, // descriptors
	syscall.ENOMEM, syscall.ENOBUFS, // memory
	syscall.EAGAIN, syscall.EADDRNOTAVAIL, // ports
	syscall.EPERM, syscall.EACCES, syscall.ENOSYS, // rights
	syscall.EAFNOSUPPORT, syscall.EPROTONOSUPPORT, // a kernel without IPv6, say
}

func isLacking(err error) bool {
	var errno syscall.Errno
	return errors.As(err, &errno) && slices.Contains(lacking, errno)
}

// trail notes what became of the connections of one look. Its methods may be called
// by any number of goroutines.
type trail struct {
	mu       sync.Mutex
	begun    bool  // a connection was tried; guarded by mu
	asking   int   // connections that are being tried; guarded by mu
	accepted bool  // one was; guarded by mu
	refused  error // why an address did not accept one; guarded by mu
	lacked   error // why one could not be tried; guarded by mu
}

// trace returns ctx such that dials under it are noted.
func (t *trail) trace(ctx context.Context) context.Context {
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		ConnectStart: func(string, string) {
			t.mu.Lock()
			defer t.mu.Unlock()
			t.begun = true
			t.asking++
		},
		ConnectDone: func(_, _ string, err error) {
			t.mu.Lock()
			defer t.mu.Unlock()
			t.asking--
			switch {
			case err == nil:
				t.accepted = true
			case isLacking(err):
				t.lacked = err
			default:
				t.refused = err
			}
		},
	})
}

// judge returns err, the end of a look that has failed, as what it says: of the app,
// or that nothing could be seen. Of a name with more addresses one that could be
// asked is enough.
func (t *trail) judge(err error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var lookup *net.DNSError
	switch {
	case !t.begun && errors.As(err, &lookup) && lookup.IsNotFound:
		return err // the name server's answer
	case !t.begun:
		return unknown(err) // the name was still looked up, or could not be
	case t.accepted && isLacking(err): // for the connection that there is
		return unknown(err)
	case t.accepted, t.asking > 0:
		return err
	case t.refused != nil:
		return t.refused
	}
	return unknown(t.lacked)
}

// blindness is a row of looks that could not be made, and when to say so: at its
// beginning, each quarter of an hour while it lasts, and less often if such rows come
// and go. The zero value is ready; it is for one goroutine.
type blindness struct {
	looks int // that could not be made, in a row
	said  time.Time
	lines registrar.Sparing
}

// remind is the least time between two lines about one row.
const remind = 15 * time.Minute

// more counts a look and tells whether to say so.
func (b *blindness) more(now time.Time) bool {
	b.looks++
	if (b.said.IsZero() || now.Sub(b.said) >= remind) && b.lines.May() {
		b.said = now
		return true
	}
	return false
}

// end tells, after a look that was made, whether to say so, and how many were not.
func (b *blindness) end() (looks int, say bool) {
	looks, say = b.looks, b.looks > 0 && !b.said.IsZero()
	b.looks, b.said = 0, time.Time{}
	return looks, say
}
