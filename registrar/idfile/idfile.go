// Package idfile keeps a registration's id in a file, so that a sidecar that was
// killed comes back as the same registration. The file is locked while its sidecar
// lives: a second one of the same instance never uses the same id. It also says which
// process group the sidecar's app is, so that another sidecar can prove that both have
// ended.
package idfile

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/rs/zerolog"

	"rollcall/registrar"
)

const (
	// version is that of the file's form.
	version = 1
	// maxFile is the most bytes of a file; one has 400.
	maxFile = 4 << 10
	// begins every file of ours, of any version. What begins otherwise is somebody
	// else's, and is not written over.
	begins = `{"rollcall_id":`
	// tries bounds how often the file may go between its opening and its locking. Only
	// a sidecar that ends removes it.
	tries = 20
)

var (
	// ErrLocked says that another process has the file: a sidecar of the same instance.
	ErrLocked = errors.New("another sidecar has it")
	// ErrForm says that a file holds no id for this registration.
	ErrForm = errors.New("it holds no id for this registration")
	// ErrForeign says that a file is not of this package's writing; it is left alone.
	ErrForeign = errors.New("it is no file for an id, and is left as it is")
)

// Registration is what an id is kept for.
type Registration struct {
	Registry string // as Registry returns it
	Service  registrar.Service
	Addr     netip.AddrPort
}

// Registry names a registry: its URL without user and password, and its namespace.
func Registry(url, namespace string) string {
	scheme, rest, found := strings.Cut(url, "://")
	if !found {
		scheme, rest = "", url
	}
	end := strings.IndexAny(rest, "/?#")
	if end < 0 {
		end = len(rest)
	}
	at := strings.LastIndexByte(rest[:end], '@') + 1
	return scheme + "://" + rest[at:] + " " + namespace
}

// Name is the name of the file of r in a directory of many: at most 150 bytes, all
// of them letters, digits, '.', '_' and '-'.
func (r Registration) Name() string {
	addr := strings.NewReplacer(":", "-", "[", "", "]", "").Replace(r.Addr.String())
	sum := sha256.Sum256([]byte(r.Registry + "\n" + string(r.Service) + "\n" + r.Addr.String()))
	return fmt.Sprintf("%s_%s_%x.id", r.Service, addr, sum[:8])
}

// record is what a file holds.
type record struct {
	Version  int               `json:"rollcall_id"` // first: see begins
	ID       string            `json:"id"`
	Since    int64             `json:"since"` // unix ms, of the registration's beginning
	Registry string            `json:"registry"`
	Service  registrar.Service `json:"service"`
	Addr     netip.AddrPort    `json:"addr"`
	App
}

// Place is where an id is kept.
type Place struct {
	Path   string // of the file; empty: nowhere
	Dir    string // made if it is missing, but not what it is in; empty: none is made
	Chosen bool   // by the user, who hears it aloud when it cannot be used
}

// File is one registration's id. Its methods are for one goroutine at a time. That of
// a place that cannot be used keeps nothing.
type File struct {
	of    Registration
	place Place
	log   zerolog.Logger

	file  *os.File // locked; nil: there is none
	info  fs.FileInfo
	token string // what it holds; empty: none
	since time.Time
	app   App  // that this sidecar is around
	found App  // that the last sidecar was around
	taken bool // it is another sidecar's, so it may be free later
	quiet bool // that it cannot be written was said
}

// Open opens and locks the file of r in place, and reads what it keeps. What is wrong
// with it is logged, in one line: then it keeps nothing, or another id from now on.
// It waits for nothing, whatever is at that path. The caller closes it.
func Open(place Place, r Registration, log zerolog.Logger) *File {
	f := &File{of: r, place: place, log: log.With().Str("id_file", place.Path).Logger()}
	if place.Path == "" {
		return f
	}
	err := f.open()
	if err == nil && f.found != (App{}) {
		// It is no longer this registration's, and its end no proof: killed before
		// it has said which one its own app is, this sidecar must not look dead.
		err = f.write()
	}
	switch {
	case err == nil && f.token != "":
		f.log.Info().Time("since", f.since).Msg("the last sidecar of this instance was killed; going on as its registration")
	case err == nil:
	case errors.Is(err, ErrLocked):
		f.taken = true
		f.log.Warn().Msg("another sidecar has the file of this instance's id; if it beats for the same address, this one waits until it has stopped or misses its heartbeats")
	case errors.Is(err, ErrForm):
		f.log.Warn().Err(err).Msg("the kept id cannot be used, and is replaced")
	default:
		f.say(err)
	}
	return f
}

// Kept returns the id that the file had, and since when it is; empty: none.
func (f *File) Kept() (token string, since time.Time) { return f.token, f.since }

// Keep keeps a registration's token, and since when it is; of an empty token that
// there is none. It is a BeaterConfig's Keep.
func (f *File) Keep(token string, since time.Time) {
	if token == f.token && (token == "" || since.Equal(f.since)) {
		return
	}
	if f.file == nil && f.taken && token != "" {
		// The other one may have ended. What it has left is not this registration's.
		if err := f.open(); err != nil && !errors.Is(err, ErrForm) {
			return
		}
		f.taken = false
	}
	if f.file == nil {
		return
	}
	f.token, f.since = token, since
	if err := f.write(); err != nil {
		f.say(err)
	}
}

// Around has the file say which process group the app of this registration is, from
// the next Keep on or, if it keeps an id already, now.
func (f *File) Around(group int) {
	f.app = app(group)
	if f.file == nil || f.token == "" {
		return
	}
	if err := f.write(); err != nil {
		f.say(err)
	}
}

// Close gives the file back, and removes it if it keeps nothing.
func (f *File) Close() {
	if f.file == nil {
		return
	}
	// While it is locked nobody else uses it, and one who has opened it already looks
	// again when it has it locked.
	if f.token == "" && f.at() {
		if err := os.Remove(f.place.Path); err != nil {
			f.log.Debug().Err(err).Msg("an empty file stays")
		}
	}
	_ = f.file.Close() // all has been written
	f.file = nil
}

// say says that the id is not kept.
func (f *File) say(err error) {
	if f.quiet {
		return
	}
	f.quiet = true
	level := zerolog.InfoLevel
	if f.place.Chosen || errors.Is(err, ErrForeign) {
		level = zerolog.WarnLevel
	}
	f.log.WithLevel(level).Err(err).Msg("the id is not kept: a sidecar that is killed and started again has its address back when that has missed its heartbeats")
}

// at tells whether the path still names the file.
func (f *File) at() bool {
	info, err := os.Lstat(f.place.Path)
	return err == nil && os.SameFile(info, f.info)
}

// open locks the file and reads it. With ErrForm it is locked, and keeps nothing yet.
func (f *File) open() error {
	if f.place.Dir != "" {
		if err := os.Mkdir(f.place.Dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	for range tries {
		if err := f.lock(os.O_CREATE); err != nil {
			return err
		}
		if f.at() {
			return f.read()
		}
		_ = f.file.Close() // its last owner has removed it: another one may have its name
		f.file = nil
	}
	return fmt.Errorf("%s: removed again and again", f.place.Path)
}

func (f *File) lock(create int) error {
	// Neither a pipe nor a link, and nothing that blocks.
	file, err := os.OpenFile(f.place.Path, os.O_RDWR|create|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return err
	}
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = ErrForeign
	}
	if err == nil {
		err = syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if errors.Is(err, syscall.EWOULDBLOCK) {
			err = ErrLocked
		}
	}
	if err != nil {
		_ = file.Close() // nothing was written
		return fmt.Errorf("%s: %w", f.place.Path, err)
	}
	f.file, f.info = file, info
	return nil
}

// read reads the locked file.
func (f *File) read() error {
	text, err := io.ReadAll(io.NewSectionReader(f.file, 0, maxFile+1))
	var r record
	switch {
	case err != nil:
	case len(bytes.Trim(text, "\x00")) == 0:
		return nil // a new one, or one whose machine has failed while it was written
	case !bytes.HasPrefix(text, []byte(begins)) && !bytes.HasPrefix([]byte(begins), text):
		err = ErrForeign
	default:
		if err := json.Unmarshal(text, &r); err != nil || len(text) > maxFile {
			return fmt.Errorf("%w: %w", ErrForm, cmp.Or(err, errors.New("too long")))
		}
		return f.use(r)
	}
	_ = f.file.Close() // it is not ours
	f.file = nil
	return fmt.Errorf("%s: %w", f.place.Path, err)
}

// use has the file's id be this registration's, if it is.
func (f *File) use(r record) error {
	switch of := (Registration{r.Registry, r.Service, r.Addr}); {
	case r.Version != version:
		return fmt.Errorf("%w: it is of version %d, want %d", ErrForm, r.Version, version)
	case of != f.of:
		return fmt.Errorf("%w: it is that of %q %s in %q", ErrForm, r.Service, r.Addr, r.Registry)
	case !isToken(r.ID):
		return fmt.Errorf("%w: id %q", ErrForm, r.ID)
	case r.Since <= 0 || r.Since > 1<<53:
		return fmt.Errorf("%w: since %d", ErrForm, r.Since)
	}
	f.token, f.since, f.found = r.ID, time.UnixMilli(r.Since), r.App
	return nil
}

// isToken accepts what registrations have made their tokens of, and may yet.
func isToken(s string) bool {
	for _, r := range s {
		if (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '_' {
			return false
		}
	}
	return s != "" && len(s) <= registrar.MaxName
}

// write writes what the file keeps. It is a few hundred bytes in one call, in place,
// since the lock is on the file itself: whoever is killed meanwhile has written all of
// it or nothing. A machine that fails may leave what read refuses.
func (f *File) write() error {
	var text []byte
	if f.token != "" {
		var err error
		text, err = json.Marshal(record{version, f.token, f.since.UnixMilli(), f.of.Registry, f.of.Service, f.of.Addr, f.app})
		if err != nil {
			return fmt.Errorf("%s: %w", f.place.Path, err)
		}
		text = append(text, '\n')
	}
	_, err := f.file.WriteAt(text, 0)
	if err == nil {
		err = f.file.Truncate(int64(len(text)))
	}
	if err == nil && len(text) > 0 {
		err = f.file.Sync()
	}
	if err != nil {
		// The one before is not to be used again.
		f.token = ""
		return fmt.Errorf("%s: %w", f.place.Path, errors.Join(err, f.file.Truncate(0)))
	}
	return nil
}

// Default is the place of r's file where the user has named none, in Dir.
func Default(r Registration) Place {
	dir, made := Dir()
	p := Place{Path: filepath.Join(dir, r.Name())}
	if made {
		p.Dir = dir
	}
	return p
}

// Dir is the directory of the files that the user has named no other path of:
// $RUNTIME_DIRECTORY, which systemd makes for its services, else rollcall in
// $XDG_RUNTIME_DIR, else /run/rollcall; made says that who needs the last two makes them.
func Dir() (dir string, made bool) {
	// systemd names several with colons between them.
	dir, _, _ = strings.Cut(os.Getenv("RUNTIME_DIRECTORY"), ":")
	if filepath.IsAbs(dir) {
		return dir, false
	}
	base := os.Getenv("XDG_RUNTIME_DIR")
	if !filepath.IsAbs(base) {
		base = "/run"
	}
	return filepath.Join(base, "rollcall"), true
}
