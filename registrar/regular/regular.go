// Package regular opens and reads what must be a regular file. What is a pipe, a
// device, a socket or a directory is refused: a pipe would block who opens it until
// somebody writes, for ever if nobody does, and a device may have no end.
package regular

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
)

// ErrKind says that a path is no regular file.
var ErrKind = errors.New("want a regular file")

// Check returns an error that wraps ErrKind if info, which was found at path, is of
// no regular file.
func Check(path string, info os.FileInfo) error {
	if info.Mode().IsRegular() {
		return nil
	}
	return fmt.Errorf("%s is %s: %w", path, kind(info.Mode()), ErrKind)
}

func kind(m fs.FileMode) string {
	switch {
	case m.IsDir():
		return "a directory"
	case m&fs.ModeNamedPipe != 0:
		return "a pipe"
	case m&fs.ModeSocket != 0:
		return "a socket"
	case m&fs.ModeDevice != 0:
		return "a device"
	case m&fs.ModeSymlink != 0:
		return "a symbolic link"
	}
	return "of an unknown kind"
}

// CheckPath is Check of what is at path now. That there is nothing is no error.
func CheckPath(path string) error {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return Check(path, info)
}

// Open opens a file for reading. It does not wait for anybody, also if path is
// another thing from one moment to the next. Its errors name path.
func Open(path string) (*os.File, error) {
	// Opening some devices does something, and a socket cannot be opened.
	if err := CheckPath(path); errors.Is(err, ErrKind) {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil {
		err = Check(path, info)
	}
	if err != nil {
		_ = f.Close() // nothing was read
		return nil, err
	}
	return f, nil
}

// Read reads a file whole, as Open opens it.
func Read(path string) ([]byte, error) {
	f, err := Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}
