package health

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"
)

// ReadyFile succeeds while path exists. before is what was there before the app
// was started, which is not this app's word, until it is replaced or touched;
// nil if there was nothing or it counts.
func ReadyFile(path string, before os.FileInfo) Check {
	return func(context.Context) error {
		now, err := os.Stat(path)
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
	return func(context.Context) error {
		now, err := os.Stat(path)
		if err != nil {
			absent = absent || errors.Is(err, fs.ErrNotExist)
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
