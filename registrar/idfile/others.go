package idfile

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/rs/zerolog"

	"rollcall/registrar"
)

// maxFiles is the most files of a directory that Scan looks at: it may be one that
// others use too, such as /tmp.
const maxFiles = 10_000

// ErrChanged says that a file is not what Scan had read, or is no more.
var ErrChanged = errors.New("it has changed")

// App is the app that a sidecar is around, as the kernel knows it. The zero App is not
// known: that of a sidecar beside an app, or where there is no /proc.
type App struct {
	// Group is its process group: the sidecar has started it as the leader of one.
	Group int `json:"app,omitempty"`
	// Space is which machine, since which start, and which PID namespace of it Group is
	// a number of. The namespace alone would not do: the first one of every machine has
	// the same number.
	Space string `json:"app_space,omitempty"`
}

func app(group int) App {
	space := space()
	if group <= 1 || space == "" {
		return App{}
	}
	return App{group, space}
}

// space is that of this process; empty: not known.
func space() string {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	namespace, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(boot)) + " " + namespace
}

// Life is what can be said of an app.
type Life int

// The lives of an app.
const (
	Unknown Life = iota // nothing: it is not known, or not of this PID namespace
	Running             // it may run: there is a process of its group
	Ended               // no process of its group is left, which is certain
)

// Life tells whether the app lives. Another process group that has got its number, and
// a process that has ended and that nobody has waited for, make it Running.
func (a App) Life() Life {
	if a.Group <= 1 || a.Space == "" || a.Space != space() {
		return Unknown
	}
	// The leader may have joined another group.
	for _, pid := range []int{-a.Group, a.Group} {
		if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
			return Running
		}
	}
	return Ended
}

// Kept is what a file in a directory keeps.
type Kept struct {
	Path  string
	Of    Registration
	Token string
	App   App
}

// Scan returns what this user's files in dir keep for the registry, without locking
// them. What is damaged or somebody else's is left out; a directory that is not there
// has none. With an error it returns what it has read.
func Scan(dir, registry string) (all []Kept, err error) {
	d, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer d.Close() // it was only read
	entries, err := d.ReadDir(maxFiles)
	if errors.Is(err, io.EOF) { // it is empty
		err = nil
	}
	if len(entries) == maxFiles {
		err = errors.Join(err, fmt.Errorf("%s: only %d files are looked at", dir, maxFiles))
	}
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		k, ours, failed := peek(filepath.Join(dir, e.Name()))
		switch {
		case failed != nil:
			err = errors.Join(err, failed)
		case ours && k.Of.Registry == registry:
			all = append(all, k)
		}
	}
	return all, err
}

// peek reads the file at path; ours tells whether it keeps an id.
func peek(path string) (k Kept, ours bool, err error) {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !plain(info) {
		return Kept{}, false, nil
	}
	if err != nil {
		return Kept{}, false, err
	}
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return Kept{}, false, nil
	}
	if err != nil {
		return Kept{}, false, err
	}
	defer file.Close() // it was only read
	if opened, err := file.Stat(); err != nil || !os.SameFile(info, opened) {
		return Kept{}, false, err // it was replaced meanwhile
	}
	text, err := io.ReadAll(io.LimitReader(file, maxFile+1))
	if err != nil {
		return Kept{}, false, fmt.Errorf("%s: %w", path, err)
	}
	var r record
	if len(text) > maxFile || !bytes.HasPrefix(text, []byte(begins)) || json.Unmarshal(text, &r) != nil || r.Version != version || !isToken(r.ID) {
		return Kept{}, false, nil
	}
	if _, err := registrar.ParseService(string(r.Service)); err != nil || !r.Addr.IsValid() {
		return Kept{}, false, nil
	}
	return Kept{path, Registration{r.Registry, r.Service, r.Addr}, r.ID, r.App}, true, nil
}

// plain tells whether info may be a file of this user's that keeps an id. What another
// user has written proves nothing to this one.
func plain(info fs.FileInfo) bool {
	sys, ok := info.Sys().(*syscall.Stat_t)
	return ok && info.Mode().IsRegular() && int(sys.Uid) == os.Geteuid() && info.Size() > 0 && info.Size() <= maxFile
}

// Take locks the file, if it is still as Scan has read it. Then its sidecar does not
// live, and no other one becomes the same registration until the File is closed. Keep
// with no token and Close remove it; Close alone leaves it as it is. An error wraps
// ErrLocked if its sidecar lives, and ErrChanged if it is not what it was. It waits for
// nothing.
func (k Kept) Take() (*File, error) {
	f := &File{of: k.Of, place: Place{Path: k.Path}, log: zerolog.Nop()}
	err := f.lock(0)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%s: %w", k.Path, ErrChanged)
	}
	if err != nil {
		return nil, err
	}
	err = f.read()
	if err == nil && f.at() && f.token == k.Token && f.found == k.App {
		return f, nil
	}
	if f.file != nil { // read has not closed it
		_ = f.file.Close() // nothing was written
	}
	return nil, fmt.Errorf("%s: %w", k.Path, errors.Join(ErrChanged, err))
}
