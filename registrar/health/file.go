package health

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"time"

	"rollcall/registrar/regular"
)

// ReadyFile succeeds while path exists. before is what was there before the app
// was started, which is not this app's word, until it is replaced or touched;
// nil if there was nothing or it counts.
func ReadyFile(path string, before os.FileInfo) Check {
	stat := &statter{path: path, stat: os.Stat}
	return func(ctx context.Context) error {
		now, err := stat.look(ctx)
		if err != nil {
			return err
		}
		if before != nil && same(before, now) {
			return fmt.Errorf("%s is from before the app was started", path)
		}
		return nil
	}
}

// BeatFile succeeds while path has been touched within age. Only touches that it
// has seen itself count, by this process's own clock: neither a file from before
// nor a clock that is set can make an app look alive or dead.
func BeatFile(path string, age time.Duration) Check {
	var last os.FileInfo
	var absent bool // it was, so that its being there is a touch
	var touched time.Time
	stat := &statter{path: path, stat: os.Stat}
	return func(ctx context.Context) error {
		now, err := stat.look(ctx)
		if err != nil {
			absent = absent || !errors.Is(err, ErrUnknown)
			return err
		}
		if absent || last != nil && !same(last, now) {
			touched = time.Now()
		}
		last, absent = now, false
		if touched.IsZero() {
			return fmt.Errorf("%s has not been touched yet", path)
		}
		if silent := time.Since(touched); silent > age {
			return fmt.Errorf("%s has not been touched for %v", path, silent.Round(time.Millisecond))
		}
		return nil
	}
}

func same(a, b os.FileInfo) bool { return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) }

// statter looks at a file that an app makes. Its look is for one goroutine.
type statter struct {
	path string
	stat func(path string) (os.FileInfo, error)
	// hung is a look that has not ended: a file system's server is away, say. No
	// signal ends it, so nobody waits for it; nil = there is none.
	hung chan statted
}

type statted struct {
	info os.FileInfo
	err  error
}

// look returns what is at path. That there is nothing, or what cannot be such a
// file, is the app's word. Whatever else keeps this process from seeing it is not.
func (s *statter) look(ctx context.Context) (os.FileInfo, error) {
	if s.hung == nil {
		looked := make(chan statted, 1)
		go func() {
			info, err := s.stat(s.path)
			looked <- statted{info, err}
		}()
		s.hung = looked
	}
	var now statted
	select {
	case now = <-s.hung:
		s.hung = nil
	case <-ctx.Done():
		return nil, unknown(fmt.Errorf("look at %s: its file system does not answer: %w", s.path, ctx.Err()))
	}
	switch {
	case errors.Is(now.err, fs.ErrNotExist), errors.Is(now.err, syscall.ENOTDIR):
		return nil, now.err
	case now.err != nil:
		return nil, unknown(now.err)
	}
	return now.info, regular.Check(s.path, now.info)
}
