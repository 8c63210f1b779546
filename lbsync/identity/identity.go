package identity

import (
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/rs/zerolog"

	"rollcall/lbsync"
	"rollcall/registrar"
)

const (
	// maxFile is the most bytes of a file: more than 10,000 backends and services need.
	maxFile = 4 << 20
	// maxHost is the most bytes that an id has of the host's name.
	maxHost = 200
)

// ErrForm says that a file does not hold an id.
var ErrForm = errors.New("it holds no balancer's id")

// Place is where the ids of one HAProxy's balancers are kept.
type Place struct {
	prefix string // of the files' paths
	dir    string // made where it is missing; empty: the place is there or is none
	chosen bool
}

// StateDir is the place of haproxy, a socket's path or an URL, in a directory, which
// is made with mode 0700 where it is missing. If the user has chosen it, it is said
// when it cannot be used.
func StateDir(dir, haproxy string, chosen bool) Place {
	return Place{filepath.Join(dir, "balancer-"+hash(haproxy)), dir, chosen}
}

// Beside is the place beside a socket, or another path that TryLock takes.
func Beside(socket string) Place { return Place{prefix: socket} }

// Record is what is kept of a balancer.
type Record struct {
	ID       string              `json:"id"`
	HAProxy  string              `json:"haproxy"` // for people
	Backends []string            `json:"backends"`
	Services []registrar.Service `json:"services"`
	// Former is what the register may still have, and must forget.
	Former []lbsync.Former `json:"former,omitempty"`
}

// Config is whose id is asked for.
type Config struct {
	HAProxy  string // its socket's path, or its URL
	Backends []lbsync.BackendConfig
	ID       string  // named by the user; empty = the kept one, or else one that is made
	Places   []Place // that of the first counts if several ids are kept
}

// Balancer is what one lbsync is in the register.
type Balancer struct {
	Record
	// Kept are the files that keep the id. Without any, and without Config.ID, the next
	// lbsync has another id if it has another host's name, as a container made anew.
	Kept []string
}

// Identify finds the id of the balancer whose backends this process has locked, or
// makes one, and keeps it in every place that can be written. If several are kept, as
// of two lbsyncs that have become one, one is taken and the others are Former. What
// goes wrong with a file is logged: there is an id in any case.
func Identify(cfg Config, log zerolog.Logger) *Balancer {
	b := &Balancer{Record: Record{ID: cfg.ID, HAProxy: cfg.HAProxy}}
	for _, bc := range cfg.Backends {
		b.Backends, b.Services = append(b.Backends, bc.Backend), append(b.Services, bc.Service)
	}
	slices.Sort(b.Backends)
	slices.Sort(b.Services)
	b.Services = slices.Compact(b.Services)

	known := map[string][]registrar.Service{} // by id, what the register may have
	var others []string                       // files that are not, or no longer, where the id is kept
	for _, place := range cfg.Places {
		for i, backend := range b.Backends {
			file := path(place.prefix, "id", backend)
			r, err := read(file)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if i > 0 {
				others = append(others, file)
			}
			if err != nil {
				place.complain(log, err, "a kept id cannot be used, and is replaced")
				continue
			}
			b.ID = cmp.Or(b.ID, r.ID)
			if b.ID == r.ID {
				b.Kept = append(b.Kept, file)
			}
			for _, f := range append(r.Former, lbsync.Former{ID: r.ID, Services: r.Services}) {
				known[f.ID] = append(known[f.ID], f.Services...)
			}
		}
	}
	made := b.ID == ""
	if made {
		b.ID = host() + "-" + strings.ToLower(rand.Text()[:8])
	}
	for _, id := range slices.Sorted(maps.Keys(known)) {
		slices.Sort(known[id])
		gone := slices.DeleteFunc(slices.Compact(known[id]), func(s registrar.Service) bool { return id == b.ID && slices.Contains(b.Services, s) })
		if len(gone) > 0 {
			b.Former = append(b.Former, lbsync.Former{ID: id, Services: gone})
		}
	}

	var written []string
	for _, place := range cfg.Places {
		file := path(place.prefix, "id", b.Backends[0])
		if err := place.write(file, b.Record); err != nil {
			place.complain(log, err, "the balancer's id is not kept there")
			continue
		}
		written = append(written, file)
	}
	switch {
	case len(written) > 0:
		b.Kept = written
		for _, file := range others {
			if err := os.Remove(file); err != nil {
				log.Warn().Err(err).Msg("a balancer's id is kept twice")
			}
		}
	case made:
		b.ID = Derived(cfg.HAProxy, b.Backends[0])
	}
	return b
}

// Forgotten keeps that the register has forgotten Former.
func (b *Balancer) Forgotten() error {
	r := b.Record
	r.Former = nil
	var errs []error
	for _, file := range b.Kept {
		errs = append(errs, replace(file, r))
	}
	return errors.Join(errs...)
}

// Kept returns what is kept of the balancers of one HAProxy, and why that may not be
// all. It makes and changes nothing.
func Kept(places []Place) (records []Record, err error) {
	var errs []error
	for _, place := range places {
		dir, prefix := filepath.Split(path(place.prefix, "id", ""))
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("look for a balancer's id: %w", err))
		}
		for _, e := range entries {
			if !strings.HasPrefix(e.Name(), prefix) {
				continue
			}
			switch r, err := read(filepath.Join(dir, e.Name())); {
			case errors.Is(err, fs.ErrNotExist): // it went meanwhile
			case err != nil:
				errs = append(errs, err)
			default:
				records = append(records, r)
			}
		}
	}
	return records, errors.Join(errs...)
}

// Derived is the id of an lbsync on this host that could not keep one, if backend is
// the first of its own.
func Derived(haproxy, backend string) string { return host() + "-" + hash(haproxy+" "+backend) }

// complain says that a place cannot be used: aloud if somebody chose it, or if there
// is something that is no id.
func (p Place) complain(log zerolog.Logger, err error, msg string) {
	if p.chosen || errors.Is(err, ErrForm) {
		log.Warn().Err(err).Msg(msg)
		return
	}
	log.Debug().Err(err).Msg(msg)
}

func (p Place) write(file string, r Record) error {
	if p.dir != "" {
		if err := os.MkdirAll(p.dir, 0o700); err != nil {
			return fmt.Errorf("keep a balancer's id: %w", err)
		}
	}
	return replace(file, r)
}

// read reads a file, if it is one.
func read(file string) (Record, error) {
	fail := func(err error) (Record, error) {
		return Record{}, fmt.Errorf("read the balancer's id in %s: %w", file, err)
	}
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0) // a pipe would block
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() || info.Size() > maxFile {
		return fail(cmp.Or(err, ErrForm))
	}
	text, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return fail(err)
	}
	var r Record
	if err := json.Unmarshal(text, &r); err != nil {
		return fail(fmt.Errorf("%w: %w", ErrForm, err))
	}
	if err := r.check(); err != nil {
		return fail(fmt.Errorf("%w: %w", ErrForm, err))
	}
	return r, nil
}

func (r Record) check() error {
	for _, f := range append(r.Former, lbsync.Former{ID: r.ID, Services: r.Services}) {
		if err := registrar.CheckBalancerID(f.ID); err != nil {
			return err
		}
		for _, s := range f.Services {
			if _, err := registrar.ParseService(string(s)); err != nil {
				return err
			}
		}
	}
	return nil
}

// replace writes a file whole, readable by its owner only: a crash leaves the old one
// or the new one.
func replace(file string, r Record) error {
	text, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("keep a balancer's id: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(file), ".lbsync-*") // of mode 0600
	if err != nil {
		return fmt.Errorf("keep a balancer's id: %w", err)
	}
	defer os.Remove(f.Name()) // it is gone if all went well
	_, err = f.Write(append(text, '\n'))
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		return fmt.Errorf("keep a balancer's id: %w", err)
	}
	return nil
}

// host is this host's name as an id may have it. Where it has none, the rest of the id
// must do.
func host() string {
	name, err := os.Hostname()
	if err != nil || name == "" {
		name = "haproxy"
	}
	name = strings.Map(func(r rune) rune {
		if registrar.BalancerIDRune(r) {
			return r
		}
		return '-'
	}, name)
	return name[:min(len(name), maxHost)]
}

func hash(text string) string {
	sum := sha256.Sum256([]byte(text))
	return fmt.Sprintf("%x", sum[:4])
}
