package idfile

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"rollcall/registrar"
)

var (
	addr = netip.MustParseAddrPort("10.0.0.7:8080")
	of   = Registration{Registry("redis://10.0.0.1:6379/0", "rollcall"), "web", addr}
)

// open opens the file at path, and returns it and what was said, line by line.
func open(t *testing.T, path string, r Registration) (*File, *bytes.Buffer) {
	t.Helper()
	var said bytes.Buffer
	f := Open(Place{Path: path, Chosen: true}, r, zerolog.New(&said))
	t.Cleanup(f.Close)
	return f, &said
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestKept follows a registration's id through processes that are killed, and one
// that leaves.
func TestKept(t *testing.T) {
	path := filepath.Join(t.TempDir(), "id")
	now := time.Now().Truncate(time.Millisecond)
	first, said := open(t, path, of)
	if token, _ := first.Kept(); token != "" || said.Len() > 0 {
		t.Fatalf("a new one has %q, says %s", token, said)
	}
	first.Keep("T1", now)
	first.Keep("T1", now)
	must(t, first.file.Close()) // as the kernel does it for who is killed
	first.file = nil
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}

	second, said := open(t, path, of)
	if token, since := second.Kept(); token != "T1" || !since.Equal(now) || !strings.Contains(said.String(), "was killed") {
		t.Fatalf("after a kill it has %q, %v; says %s", token, since, said)
	}
	second.Keep("a longer token, as a later registration may have", now.Add(time.Hour))
	second.Keep("T2", now.Add(time.Second)) // nothing of the longer one is left
	must(t, second.file.Close())
	second.file = nil

	third, said := open(t, path, of)
	if token, since := third.Kept(); token != "T2" || !since.Equal(now.Add(time.Second)) {
		t.Fatalf("after a second kill it has %q, %v; says %s", token, since, said)
	}
	third.Keep("", time.Time{}) // unhealthy, say
	if info, err := os.Stat(path); err != nil || info.Size() != 0 {
		t.Errorf("%v, %v", info, err)
	}
	third.Keep("T3", now)
	third.Close() // Redis was away when it left
	fourth, _ := open(t, path, of)
	if token, _ := fourth.Kept(); token != "T3" {
		t.Fatalf("after a leave that nobody has heard of it has %q", token)
	}
	fourth.Keep("", time.Time{})
	fourth.Close()
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("after it has left there is a file: %v", err)
	}
}

// TestUnusable has something else at the path, or a file that is damaged. Each is said
// in one line, and none is waited for.
func TestUnusable(t *testing.T) {
	good := `{"rollcall_id":1,"id":"T1","since":1763893622123,"registry":"redis://10.0.0.1:6379/0 rollcall","service":"web","addr":"10.0.0.7:8080"}` + "\n"
	edit := func(old, text string) []byte {
		if !strings.Contains(good, old) {
			t.Fatal(old)
		}
		return []byte(strings.Replace(good, old, text, 1))
	}
	file := func(text []byte) func(string) error {
		return func(path string) error { return os.WriteFile(path, text, 0o600) }
	}
	for _, c := range []struct {
		name string
		make func(path string) error
		kept string
		says string // of one line; empty: nothing
		mend bool   // a new id is kept there
	}{
		{"one that was kept", file([]byte(good)), "T1", "was killed", true},
		{"nothing", func(string) error { return nil }, "", "", true},
		{"empty", file(nil), "", "", true},
		{"zeros", file(make([]byte, 300)), "", "", true},
		{"truncated", file([]byte(good[:len(good)/2])), "", "the kept id cannot be used, and is replaced", true},
		{"truncated at once", file([]byte(good[:5])), "", "the kept id cannot be used, and is replaced", true},
		{"another version", file(edit(`_id":1`, `_id":2`)), "", "version 2", true},
		{"another registry's", file(edit("10.0.0.1", "10.0.0.2")), "", "cannot be used", true},
		{"another namespace's", file(edit(" rollcall", " test")), "", "cannot be used", true},
		{"another service's", file(edit("web", "api")), "", "cannot be used", true},
		{"another address's", file(edit("8080", "8081")), "", "cannot be used", true},
		{"no address", file(edit("10.0.0.7:8080", "x")), "", "cannot be used", true},
		{"an id with a space", file(edit("T1", "T 1")), "", "cannot be used", true},
		{"an id that is too long", file(edit("T1", strings.Repeat("T", 64))), "", "cannot be used", true},
		{"no id", file(edit("T1", "")), "", "cannot be used", true},
		{"no time", file(edit("1763893622123", "-1")), "", "cannot be used", true},
		{"too long", file([]byte(good[:len(good)-2] + `,"x":"` + strings.Repeat("x", maxFile) + `"}`)), "", "cannot be used", true},
		{"garbage", file([]byte("garbage")), "", "it is no file for an id, and is left as it is", false},
		{"somebody's JSON", file([]byte(`{"id":"T1"}`)), "", "left as it is", false},
		{"a directory", func(path string) error { return os.Mkdir(path, 0o700) }, "", "is a directory", false},
		{"a pipe", func(path string) error { return syscall.Mkfifo(path, 0o600) }, "", "left as it is", false},
		{"a link", func(path string) error { return os.Symlink("/etc/hostname", path) }, "", "symbolic links", false},
		{"no directory", func(path string) error { return os.Remove(filepath.Dir(path)) }, "", "no such file", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "d", "id")
			must(t, os.Mkdir(filepath.Dir(path), 0o700))
			must(t, c.make(path))
			before, _ := os.ReadFile(regular(path))
			f, said := open(t, path, of)
			if token, _ := f.Kept(); token != c.kept {
				t.Errorf("kept %q", token)
			}
			f.Keep("NEW", time.Now())
			f.Keep("NEWER", time.Now())
			if n := strings.Count(said.String(), "\n"); c.says == "" && n > 0 || c.says != "" && (n != 1 || !strings.Contains(said.String(), c.says)) {
				t.Errorf("says %s", said)
			}
			after, _ := os.ReadFile(regular(path))
			if mended := strings.Contains(string(after), `"id":"NEWER"`); mended != c.mend || !c.mend && !bytes.Equal(before, after) {
				t.Errorf("it has become %s", after)
			}
		})
	}
}

// regular is path if it can be read without waiting, else nothing.
func regular(path string) string {
	if info, err := os.Lstat(path); err != nil || !info.Mode().IsRegular() {
		return ""
	}
	return path
}

// TestLocked has a second process of one instance.
func TestLocked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "id")
	first, _ := open(t, path, of)
	first.Keep("T1", time.Now())
	second, said := open(t, path, of)
	if token, _ := second.Kept(); token != "" || strings.Count(said.String(), "\n") != 1 || !strings.Contains(said.String(), "another sidecar has the file") {
		t.Errorf("it has %q, says %s", token, said)
	}
	second.Keep("T2", time.Now()) // the other one still lives
	second.Close()
	again, said := open(t, path, of)
	again.Keep("T3", time.Now())
	first.Close() // it has not left in order
	again.Keep("T4", time.Now())
	again.Keep("T5", time.Now())
	if n := strings.Count(said.String(), "\n"); n != 1 {
		t.Errorf("says %s", said)
	}
	text, err := os.ReadFile(path)
	if err != nil || !strings.Contains(string(text), `"id":"T5"`) {
		t.Errorf("the one that is left has kept %s, %v", text, err)
	}
	if third, _ := open(t, path, of); third.file != nil {
		t.Error("and has not locked it")
	}
}

// TestLockOfARemovedFile has many open, lock and remove one file all the time: no two
// have it at once, also where one has opened what another one then removes.
func TestLockOfARemovedFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "id")
	var mu sync.Mutex
	holders, had := 0, 0
	count := func(n int) {
		mu.Lock()
		defer mu.Unlock()
		if holders += n; holders > 1 {
			t.Errorf("%d have it", holders)
		}
		if n > 0 {
			had++
		}
	}
	enough := func() int {
		mu.Lock()
		defer mu.Unlock()
		return had
	}
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for enough() < 100 {
				f := Open(Place{Path: path}, of, zerolog.Nop())
				if f.file != nil {
					count(1)
					f.Keep("T", time.Now())
					f.Keep("", time.Time{})
					count(-1)
				}
				f.Close()
			}
		})
	}
	all.Wait()
}

// TestRegistry: what a registry's name has, and has not.
func TestRegistry(t *testing.T) {
	for url, want := range map[string]string{
		"redis://10.0.0.1:6379/0":                     "redis://10.0.0.1:6379/0 ns",
		"redis://user@10.0.0.1:6379/0":                "redis://10.0.0.1:6379/0 ns",
		"rediss://user:secret@10.0.0.1/0":             "rediss://10.0.0.1/0 ns",
		"redis://:sec@ret@10.0.0.1":                   "redis://10.0.0.1 ns",
		"redis+sentinel://u:secret@a:1,b:2/primary/3": "redis+sentinel://a:1,b:2/primary/3 ns",
		"redis+cluster://secret@[fd00::1]:6379,b":     "redis+cluster://[fd00::1]:6379,b ns",
		"redis://u:secret@h/0?client_name=a@b":        "redis://h/0?client_name=a@b ns",
		"redis://h/0?client_name=a@b":                 "redis://h/0?client_name=a@b ns",
	} {
		if got := Registry(url, "ns"); got != want {
			t.Errorf("%s: %s, want %s", url, got, want)
		}
	}
}

// TestName: one file for each, with a harmless name.
func TestName(t *testing.T) {
	form := regexp.MustCompile(`^[a-z0-9][A-Za-z0-9._-]*\.id$`)
	seen := map[string]bool{}
	for _, r := range []Registration{
		of,
		{of.Registry, "api", addr},
		{of.Registry, "web", netip.MustParseAddrPort("10.0.0.7:8081")},
		{Registry("redis://10.0.0.1:6379/1", "rollcall"), "web", addr},
		{Registry("redis://10.0.0.1:6379/0", "test"), "web", addr},
		{of.Registry, registrar.Service(strings.Repeat("x", 63)), netip.MustParseAddrPort("[1111:2222:3333:4444:5555:6666:7777:8888]:65535")},
		{of.Registry, "web", netip.MustParseAddrPort("[fd00::1]:80")},
		{of.Registry, "web", netip.MustParseAddrPort("[fd00::1:80]:80")},
	} {
		n := r.Name()
		if !form.MatchString(n) || len(n) > 150 || seen[n] {
			t.Errorf("%v: %s", r, n)
		}
		seen[n] = true
	}
	if want := "web_10.0.0.7-8080_"; !strings.HasPrefix(of.Name(), want) {
		t.Errorf("%s, want %s…", of.Name(), want)
	}
}

func TestDefault(t *testing.T) {
	for _, c := range []struct{ runtime, xdg, want, made string }{
		{"", "", "/run/rollcall/", "/run/rollcall"},
		{"", "/x", "/x/rollcall/", "/x/rollcall"},
		{"", "x", "/run/rollcall/", "/run/rollcall"},
		{"/run/a", "/x", "/run/a/", ""},
		{"/run/a:/run/b", "", "/run/a/", ""},
		{"a", "/x", "/x/rollcall/", "/x/rollcall"},
	} {
		t.Setenv("RUNTIME_DIRECTORY", c.runtime)
		t.Setenv("XDG_RUNTIME_DIR", c.xdg)
		if p := Default(of); p.Path != c.want+of.Name() || p.Dir != c.made || p.Chosen {
			t.Errorf("%q, %q: %+v", c.runtime, c.xdg, p)
		}
	}
}

// TestNowhere: without a path nothing is kept, and nothing said.
func TestNowhere(t *testing.T) {
	f, said := open(t, "", of)
	f.Keep("T1", time.Now())
	f.Close()
	if said.Len() > 0 {
		t.Errorf("says %s", said)
	}
}

// TestUnreadable has a file that is another user's, and a device.
func TestUnreadable(t *testing.T) {
	if os.Getuid() == 0 && os.Getenv("IDFILE_HERE") == "" {
		dir, err := os.MkdirTemp("", "rc")
		must(t, err)
		defer os.RemoveAll(dir)
		must(t, os.Chmod(dir, 0o755))
		must(t, os.WriteFile(filepath.Join(dir, "id"), nil, 0o600))
		program, err := os.ReadFile(os.Args[0])
		must(t, err)
		must(t, os.WriteFile(filepath.Join(dir, "test"), program, 0o755))
		cmd := exec.Command(filepath.Join(dir, "test"), "-test.run", "^TestUnreadable$", "-test.v")
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "IDFILE_HERE="+dir)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		t.Logf("%s", out)
		must(t, err)
		return
	}
	path := filepath.Join(os.Getenv("IDFILE_HERE"), "id")
	if os.Getenv("IDFILE_HERE") == "" {
		path = filepath.Join(t.TempDir(), "id")
		must(t, os.WriteFile(path, nil, 0))
	}
	for path, says := range map[string]string{path: "permission denied", "/dev/null": "left as it is"} {
		f, said := open(t, path, of)
		f.Keep("T1", time.Now())
		if strings.Count(said.String(), "\n") != 1 || !strings.Contains(said.String(), says) {
			t.Errorf("%s: says %s", path, said)
		}
	}
}

// TestFileSystems has the file on file systems that are full or cannot be written, and
// its directory not be there.
func TestFileSystems(t *testing.T) {
	if os.Getenv("IDFILE_HERE") == "" {
		cmd := exec.Command("unshare", "--map-root-user", "--mount", os.Args[0], "-test.run", "^TestFileSystems$", "-test.v")
		cmd.Env = append(os.Environ(), "IDFILE_HERE="+t.TempDir())
		out, err := cmd.CombinedOutput()
		t.Logf("%s", out)
		must(t, err)
		return
	}
	here := os.Getenv("IDFILE_HERE")
	must(t, syscall.Mount("tmpfs", here, "tmpfs", 0, "size=16k"))
	path := filepath.Join(here, "id")
	early, _ := open(t, path, of)
	early.Keep("T1", time.Now())
	fill := func() {
		t.Helper()
		f, err := os.OpenFile(filepath.Join(here, "big"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		must(t, err)
		for err == nil {
			_, err = f.Write(make([]byte, 4096))
		}
		if pe, ok := err.(*os.PathError); !ok || pe.Err != syscall.ENOSPC {
			t.Fatal(err)
		}
		must(t, f.Close())
	}
	fill()
	// One that is there already can be written on.
	early.Keep("T2", time.Now())
	text, err := os.ReadFile(path)
	if err != nil || !strings.Contains(string(text), `"id":"T2"`) {
		t.Errorf("%s, %v", text, err)
	}
	// A new one cannot.
	other := of
	other.Service = "api"
	late, said := open(t, filepath.Join(here, "other"), other)
	late.Keep("T3", time.Now())
	late.Keep("T4", time.Now())
	if n := strings.Count(said.String(), "\n"); n != 1 || !strings.Contains(said.String(), "no space left") {
		t.Errorf("full: says %s", said)
	}
	second, said := open(t, filepath.Join(here, "other"), other)
	if second.file != nil || !strings.Contains(said.String(), "another sidecar") {
		t.Errorf("full: a second one has it too, says %s", said)
	}
	must(t, os.Remove(filepath.Join(here, "big")))
	late.Keep("T5", time.Now())
	if text, err := os.ReadFile(filepath.Join(here, "other")); err != nil || !strings.Contains(string(text), `"id":"T5"`) {
		t.Errorf("no longer full: %s, %v", text, err)
	}
	early.Close()
	late.Close()
	must(t, syscall.Mount("", here, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""))
	for _, place := range []Place{{Path: path, Chosen: true}, {Path: filepath.Join(here, "rollcall", "id"), Dir: filepath.Join(here, "rollcall")}} {
		var said bytes.Buffer
		f := Open(place, of, zerolog.New(&said))
		f.Keep("T6", time.Now())
		f.Close()
		level := map[bool]string{true: "warn", false: "info"}[place.Chosen]
		if token, _ := f.Kept(); token != "" || strings.Count(said.String(), "\n") != 1 || !strings.Contains(said.String(), "read-only file system") || !strings.Contains(said.String(), fmt.Sprintf(`"level":%q`, level)) {
			t.Errorf("%+v: %q, says %s", place, token, &said)
		}
	}
}
