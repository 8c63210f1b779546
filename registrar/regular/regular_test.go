package regular

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// within fails the test if f does not return: it would hang for ever.
func within(tb testing.TB, what string, f func() error) error {
	tb.Helper()
	ended := make(chan error, 1)
	go func() { ended <- f() }()
	select {
	case err := <-ended:
		return err
	case <-time.After(10 * time.Second):
		tb.Fatalf("%s hangs", what)
		return nil
	}
}

func TestKinds(t *testing.T) {
	dir, err := os.MkdirTemp("", "rk") // short, for the socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	at := func(name string) string { return filepath.Join(dir, name) }
	l, err := net.Listen("unix", at("socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, err := range []error{
		os.WriteFile(at("file"), []byte("text"), 0o600), os.Symlink(at("file"), at("link")),
		syscall.Mkfifo(at("pipe"), 0o600), os.Symlink(at("pipe"), at("link-to-pipe")), os.Symlink(at("loop"), at("loop")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for path, want := range map[string]string{
		at("file"): "", at("link"): "",
		at("pipe"): "a pipe", at("link-to-pipe"): "a pipe", at("socket"): "a socket", dir: "a directory",
		os.DevNull: "a device", "/dev/zero": "a device",
	} {
		var text []byte
		err := within(t, path, func() (err error) { text, err = Read(path); return err })
		if want == "" {
			if err != nil || string(text) != "text" {
				t.Errorf("%s: %q, %v", path, text, err)
			}
			if err := CheckPath(path); err != nil {
				t.Error(err)
			}
			continue
		}
		for _, err := range []error{err, CheckPath(path)} {
			if !errors.Is(err, ErrKind) || !strings.Contains(err.Error(), path+" is "+want) {
				t.Errorf("%s: %v, want %s", path, err, want)
			}
		}
	}
	if _, err := Read(at("none")); !errors.Is(err, fs.ErrNotExist) || CheckPath(at("none")) != nil {
		t.Errorf("what is not there: %v, %v", err, CheckPath(at("none")))
	}
	if err := CheckPath(at("loop")); err == nil || errors.Is(err, ErrKind) {
		t.Errorf("what cannot be seen: %v", err)
	}
}

// TestBecomesAPipe: a file that is a pipe and a file by turns never blocks who reads it.
func TestBecomesAPipe(t *testing.T) {
	dir := t.TempDir()
	file, pipe, path := filepath.Join(dir, "file"), filepath.Join(dir, "pipe"), filepath.Join(dir, "path")
	if err := errors.Join(os.WriteFile(file, []byte("text"), 0o600), syscall.Mkfifo(pipe, 0o600), os.Link(file, path)); err != nil {
		t.Fatal(err)
	}
	stop, swapping := make(chan struct{}), make(chan error, 1)
	go func() {
		next := filepath.Join(dir, "next")
		for i := 0; ; i++ {
			select {
			case <-stop:
				swapping <- nil
				return
			default:
			}
			from := file
			if i%2 == 0 {
				from = pipe
			}
			if err := errors.Join(os.Link(from, next), os.Rename(next, path)); err != nil {
				swapping <- err
				return
			}
			_ = os.Remove(next) // of two names of one file rename removes none
		}
	}()
	reads := 0
	for range 3000 {
		err := within(t, "a file that becomes a pipe", func() error {
			text, err := Read(path)
			if err == nil && string(text) == "text" {
				reads++
			}
			return err
		})
		if err != nil && !errors.Is(err, ErrKind) {
			t.Fatal(err)
		}
	}
	close(stop)
	if err := <-swapping; err != nil {
		t.Fatal(err)
	}
	t.Logf("%d of 3000 reads found the file", reads)
	if reads == 0 || reads == 3000 {
		t.Errorf("%d of 3000 reads found the file: there were no turns", reads)
	}
}
