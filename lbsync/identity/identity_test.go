package identity

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/rs/zerolog"

	"rollcall/lbsync"
	"rollcall/registrar"
)

// home is where the ids of a test's HAProxy are kept.
type home struct {
	state, socket string
	log           bytes.Buffer
}

func newHome(t *testing.T) *home {
	dir := t.TempDir()
	return &home{state: filepath.Join(dir, "var", "state"), socket: filepath.Join(dir, "sock")}
}

func (h *home) places() []Place {
	var places []Place
	if h.state != "" {
		places = append(places, StateDir(h.state, h.socket, true))
	}
	return append(places, Beside(h.socket))
}

// identify is Identify for SERVICE=BACKEND words.
func (h *home) identify(t *testing.T, id string, words ...string) *Balancer {
	t.Helper()
	var backends []lbsync.BackendConfig
	for _, w := range words {
		svc, backend, _ := strings.Cut(w, "=")
		backends = append(backends, lbsync.BackendConfig{Service: registrar.Service(svc), Backend: backend})
	}
	b := Identify(Config{HAProxy: h.socket, Backends: backends, ID: id, Places: h.places()}, zerolog.New(&h.log).Level(zerolog.WarnLevel))
	if err := registrar.CheckBalancerID(b.ID); err != nil {
		t.Error(err)
	}
	return b
}

// files returns the backends under whose names an id is kept, in each place.
func (h *home) files(t *testing.T) (state, beside string) {
	t.Helper()
	names := func(pattern string) string {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for i, f := range files {
			_, files[i], _ = strings.Cut(f, ".lbsync-id.")
		}
		return strings.Join(files, " ")
	}
	return names(filepath.Join(h.state, "*.lbsync-id.*")), names(h.socket + ".lbsync-id.*")
}

func want[T any](t *testing.T, what string, got, want T) {
	t.Helper()
	if g, w := fmt.Sprintf("%v", got), fmt.Sprintf("%v", want); g != w {
		t.Errorf("%s: got %s, want %s", what, g, w)
	}
}

func TestIdentify(t *testing.T) {
	t.Run("kept", func(t *testing.T) {
		h := newHome(t)
		first := h.identify(t, "", "web=b")
		want(t, "places", len(first.Kept), 2)
		if again := h.identify(t, "", "web=b"); again.ID != first.ID || len(again.Former) > 0 {
			t.Errorf("got %+v, want %+v", again, first)
		}
		if other := h.identify(t, "", "api=c"); other.ID == first.ID || len(other.Former) > 0 {
			t.Errorf("of another backend: %+v", other)
		}
		for path, mode := range map[string]os.FileMode{h.state: 0o700 | os.ModeDir, first.Kept[0]: 0o600, first.Kept[1]: 0o600} {
			if info, err := os.Stat(path); err != nil || info.Mode() != mode {
				t.Errorf("%s: %v, %v", path, info.Mode(), err)
			}
		}
		want(t, "log", h.log.String(), "")
	})
	t.Run("the machine is booted, or the container made anew", func(t *testing.T) {
		for _, lost := range []func(*home) string{func(h *home) string { return h.state }, func(h *home) string { return path(h.socket, "id", "b") }} {
			h := newHome(t)
			first := h.identify(t, "", "web=b")
			if err := os.RemoveAll(lost(h)); err != nil {
				t.Fatal(err)
			}
			again := h.identify(t, "", "web=b")
			want(t, "id", again.ID, first.ID)
			want(t, "places", len(again.Kept), 2)
		}
	})
	t.Run("backends come", func(t *testing.T) {
		h := newHome(t)
		first := h.identify(t, "", "web=b")
		more := h.identify(t, "", "web=b", "web=c", "api=a")
		want(t, "id", more.ID, first.ID)
		want(t, "former", more.Former, nil)
		state, beside := h.files(t)
		want(t, "kept for", state+"/"+beside, "a/a")
	})
	t.Run("one becomes two", func(t *testing.T) {
		h := newHome(t)
		both := h.identify(t, "", "web=b", "api=a")
		web, api := h.identify(t, "", "web=b"), h.identify(t, "", "api=a")
		want(t, "id", api.ID, both.ID)
		want(t, "former", api.Former, []lbsync.Former{{ID: both.ID, Services: []registrar.Service{"web"}}})
		if web.ID == both.ID || len(web.Former) > 0 {
			t.Errorf("the other: %+v", web)
		}
	})
	t.Run("two become one", func(t *testing.T) {
		h := newHome(t)
		a, b := h.identify(t, "", "web=b", "db=b2"), h.identify(t, "", "api=a")
		one := h.identify(t, "", "web=b", "api=a")
		former := []lbsync.Former{{ID: a.ID, Services: []registrar.Service{"db", "web"}}}
		want(t, "id", one.ID, b.ID)
		want(t, "former", one.Former, former)
		state, beside := h.files(t)
		want(t, "kept for", state+"/"+beside, "a/a")
		// It ends before the register has forgotten.
		again := h.identify(t, "", "web=b", "api=a")
		want(t, "former", again.Former, former)
		if err := again.Forgotten(); err != nil {
			t.Fatal(err)
		}
		again = h.identify(t, "", "web=b", "api=a")
		want(t, "id", again.ID, b.ID)
		want(t, "former", again.Former, nil)
	})
	t.Run("services go and come back", func(t *testing.T) {
		h := newHome(t)
		first := h.identify(t, "", "web=b", "api=c")
		less := h.identify(t, "", "web=b")
		want(t, "former", less.Former, []lbsync.Former{{ID: first.ID, Services: []registrar.Service{"api"}}})
		again := h.identify(t, "", "web=b", "api=c")
		want(t, "former", again.Former, nil)
	})
	t.Run("named", func(t *testing.T) {
		h := newHome(t)
		first := h.identify(t, "", "web=b")
		named := h.identify(t, "lb7", "web=b")
		want(t, "id", named.ID, "lb7")
		want(t, "former", named.Former, []lbsync.Former{{ID: first.ID, Services: []registrar.Service{"web"}}})
		if err := named.Forgotten(); err != nil {
			t.Fatal(err)
		}
		want(t, "id without the name", h.identify(t, "", "web=b").ID, "lb7")
	})
}

// TestIdentifyWithoutAPlace has an id that cannot be kept be the same for this host,
// HAProxy and first backend, and that of another backend another.
func TestIdentifyWithoutAPlace(t *testing.T) {
	h := newHome(t)
	h.socket = filepath.Join(h.socket, "missing", "s")
	h.state = "" // none
	first := h.identify(t, "", "web=b", "web=a")
	want(t, "kept", len(first.Kept), 0)
	want(t, "id", first.ID, Derived(h.socket, "a"))
	want(t, "the next", h.identify(t, "", "web=a").ID, first.ID)
	if other := h.identify(t, "", "web=b"); other.ID == first.ID {
		t.Error("another backend has the same id")
	}
	if _, err := os.Stat(filepath.Dir(h.socket)); err == nil {
		t.Error("a directory was made for a socket that is not there")
	}
	want(t, "log", h.log.String(), "")

	// A directory that somebody named is missed.
	h.state = filepath.Join(os.DevNull, "x")
	want(t, "id", h.identify(t, "", "web=a").ID, first.ID)
	if !strings.Contains(h.log.String(), os.DevNull) {
		t.Errorf("said %q", h.log.String())
	}
}

// TestIdentifyBesideGarbage has files that hold no id be said and replaced.
func TestIdentifyBesideGarbage(t *testing.T) {
	for name, text := range map[string]string{
		"empty": "", "half": `{"id":"lb`, "no id": `{"services":["web"]}`, "bad id": `{"id":"a b"}`, "bad service": `{"id":"lb","services":["{web}"]}`,
		"bad former": `{"id":"lb","former":[{"id":"","services":["web"]}]}`, "bytes": "\x00\xff", "list": "[]", "huge": strings.Repeat(" ", maxFile) + `{"id":"lb"}`,
	} {
		t.Run(name, func(t *testing.T) {
			h := newHome(t)
			for _, backend := range []string{"b", "c"} {
				if err := os.WriteFile(path(h.socket, "id", backend), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			b := h.identify(t, "", "web=b", "web=c")
			if !strings.Contains(h.log.String(), "it holds no balancer's id") || !strings.Contains(h.log.String(), h.socket) {
				t.Errorf("said %q", h.log.String())
			}
			want(t, "the next", h.identify(t, "", "web=b", "web=c").ID, b.ID)
			_, beside := h.files(t)
			want(t, "kept for", beside, "b")
		})
	}
	t.Run("no file", func(t *testing.T) {
		h := newHome(t)
		for backend, make := range map[string]func(string) error{
			"a": func(p string) error { return syscall.Mkfifo(p, 0o600) },
			"b": func(p string) error { return os.Symlink("/etc/passwd", p) },
		} {
			if err := make(path(h.socket, "id", backend)); err != nil {
				t.Fatal(err)
			}
		}
		b := h.identify(t, "", "web=a", "web=b")
		want(t, "the next", h.identify(t, "", "web=a", "web=b").ID, b.ID)
	})
}

func TestKept(t *testing.T) {
	h := newHome(t)
	got := func() string {
		t.Helper()
		records, err := Kept(h.places())
		if err != nil {
			t.Error(err)
		}
		var ids []string
		for _, r := range records {
			ids = append(ids, r.ID+" of "+strings.Join(r.Backends, ","))
		}
		slices.Sort(ids)
		return strings.Join(slices.Compact(ids), "; ")
	}
	want(t, "nothing", got(), "")
	if _, err := os.Stat(h.state); err == nil {
		t.Error("a look made a directory")
	}
	h.identify(t, "lb1", "web=b", "api=a")
	h.identify(t, "lb2", "web=c")
	other := &home{state: h.state, socket: h.socket + ".b"}
	other.identify(t, "lb3", "web=b")
	want(t, "ids", got(), "lb1 of a,b; lb2 of c")
	if err := os.WriteFile(path(h.socket, "id", "d"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if records, err := Kept(h.places()); err == nil || len(records) != 4 {
		t.Errorf("beside garbage: %d records, %v", len(records), err)
	}
}

// TestRecordForm holds the form of the file: a later release reads it.
func TestRecordForm(t *testing.T) {
	h := newHome(t)
	h.identify(t, "lb0", "old=b")
	b := h.identify(t, "lb1", "web=b", "api=a")
	text, err := os.ReadFile(b.Kept[0])
	if err != nil {
		t.Fatal(err)
	}
	form := `{"id":"lb1","haproxy":%q,"backends":["a","b"],"services":["api","web"],"former":[{"id":"lb0","services":["old"]}]}` + "\n"
	want(t, "file", string(text), fmt.Sprintf(form, h.socket))
	if !json.Valid(text) {
		t.Error("no JSON")
	}
}
