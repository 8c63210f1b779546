package idfile

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"
)

// group starts a process that leads a group of its own; kill ends it and waits.
func group(t *testing.T) (pid int, kill func()) {
	t.Helper()
	cmd := exec.Command("sleep", "60")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	must(t, cmd.Start())
	kill = func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()         // it was killed
	}
	t.Cleanup(kill)
	return cmd.Process.Pid, kill
}

// TestLife: only what the kernel says of a process group of this very PID namespace
// counts.
func TestLife(t *testing.T) {
	pid, kill := group(t)
	a := app(pid)
	other := a
	other.Space = strings.Replace(a.Space, "pid:[", "pid:[1", 1)
	boot := a
	boot.Space = "another boot" + a.Space[strings.LastIndexByte(a.Space, ' '):]
	if other == a || boot == a {
		t.Fatal(a)
	}
	expect := func(when string, want map[App]Life) {
		t.Helper()
		for a, life := range want {
			if got := a.Life(); got != life {
				t.Errorf("%s: %+v: %d, want %d", when, a, got, life)
			}
		}
	}
	expect("it runs", map[App]Life{a: Running, other: Unknown, boot: Unknown, {}: Unknown, {Group: pid}: Unknown, {0, a.Space}: Unknown, {1, a.Space}: Unknown, {-pid, a.Space}: Unknown})
	if app(0) != (App{}) || app(1) != (App{}) {
		t.Error("process 1 is no app")
	}
	// A process of its group outlives it.
	member := exec.Command("sleep", "60")
	member.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pgid: pid, Pdeathsig: syscall.SIGKILL}
	must(t, member.Start())
	kill()
	expect("one of its group runs", map[App]Life{a: Running})
	must(t, member.Process.Kill())
	_ = member.Wait() // it was killed
	expect("it has ended", map[App]Life{a: Ended, other: Unknown, boot: Unknown})

	// One that has joined another group still is the app.
	leader, _ := group(t)
	moved := exec.Command("sleep", "60")
	moved.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pgid: leader, Pdeathsig: syscall.SIGKILL}
	must(t, moved.Start())
	expect("it is in another group", map[App]Life{app(moved.Process.Pid): Running})
	must(t, moved.Process.Kill())
	_ = moved.Wait() // it was killed
}

// TestAround: the file has the app of its sidecar alone, and never that of one before,
// which may have ended.
func TestAround(t *testing.T) {
	path := filepath.Join(t.TempDir(), "id")
	kept := func() Kept {
		t.Helper()
		all, err := Scan(filepath.Dir(path), of.Registry)
		must(t, err)
		if len(all) != 1 {
			t.Fatalf("%+v", all)
		}
		return all[0]
	}
	first, _ := open(t, path, of)
	first.Around(100)
	if _, err := os.Stat(path); err != nil {
		t.Fatal(err)
	}
	first.Keep("T1", time.Now())
	if k := kept(); k != (Kept{path, of, "T1", app(100)}) || k.App.Group != 100 {
		t.Errorf("%+v", k)
	}
	first.Keep("T2", time.Now())
	if k := kept(); k.Token != "T2" || k.App != app(100) {
		t.Errorf("a later registration of the same app: %+v", k)
	}
	must(t, first.file.Close()) // killed
	first.file = nil

	second, said := open(t, path, of)
	if token, _ := second.Kept(); token != "T2" || strings.Count(said.String(), "\n") != 1 {
		t.Errorf("it has %q, says %s", token, said)
	}
	if k := kept(); k.Token != "T2" || k.App != (App{}) {
		t.Errorf("before the next one has started its app: %+v", k)
	}
	second.Around(200)
	if k := kept(); k.Token != "T2" || k.App != app(200) {
		t.Errorf("and after: %+v", k)
	}
}

// TestScan has many files in a directory. Those that keep an id for the registry are
// found, and none is locked for that.
func TestScan(t *testing.T) {
	dir := t.TempDir()
	good := `{"rollcall_id":1,"id":"T1","since":1763893622123,"registry":"redis://10.0.0.1:6379/0 rollcall","service":"web","addr":"10.0.0.7:8080","app":7,"app_space":"b pid:[1]"}` + "\n"
	write := func(name, text string) {
		t.Helper()
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	edit := func(old, text string) string {
		t.Helper()
		if !strings.Contains(good, old) {
			t.Fatal(old)
		}
		return strings.Replace(good, old, text, 1)
	}
	api := of
	api.Service = "api"
	held, _ := open(t, filepath.Join(dir, api.Name()), api)
	held.Keep("T2", time.Now())
	write("good", good)
	write("without an app", edit(`,"app":7,"app_space":"b pid:[1]"`, ""))
	for i, text := range []string{
		"", "garbage", good[:len(good)/2], good[:5], strings.Repeat("\x00", 300), edit(`_id":1`, `_id":2`), edit("10.0.0.1", "10.0.0.2"),
		edit(" rollcall", " test"), edit(`"web"`, `"w{e}b"`), edit(`"web"`, `""`), edit(`"10.0.0.7:8080"`, `"x"`), edit(`"10.0.0.7:8080"`, `""`), edit("T1", ""), edit("T1", "T 1"),
		edit(`"app":7`, `"app":"7"`), good[:len(good)-2] + `,"x":"` + strings.Repeat("x", maxFile) + `"}`,
	} {
		write(fmt.Sprintf("bad%d", i), text)
	}
	must(t, os.Mkdir(filepath.Join(dir, "dir"), 0o700))
	must(t, syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600))
	must(t, os.Symlink("good", filepath.Join(dir, "link")))
	if os.Geteuid() == 0 { // another user's
		write("theirs", good)
		must(t, os.Chown(filepath.Join(dir, "theirs"), 65534, 65534))
	}
	all, err := Scan(dir, of.Registry)
	must(t, err)
	want := map[Kept]bool{
		{filepath.Join(dir, "good"), of, "T1", App{7, "b pid:[1]"}}: true,
		{filepath.Join(dir, "without an app"), of, "T1", App{}}:     true,
		{filepath.Join(dir, api.Name()), api, "T2", App{}}:          true,
	}
	for _, k := range all {
		if !want[k] {
			t.Errorf("found %+v", k)
		}
		delete(want, k)
	}
	if len(want) > 0 {
		t.Errorf("not found: %v", want)
	}
	if all, err := Scan(filepath.Join(dir, "none"), of.Registry); len(all) > 0 || err != nil {
		t.Errorf("no directory: %v, %v", all, err)
	}
	if all, err := Scan(filepath.Join(dir, "good"), of.Registry); len(all) > 0 || !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("no directory: %v, %v", all, err)
	}
}

// TestTake: who has a file locks out a sidecar, and removes the file only when it says
// so. A file that lives, or is another by now, is left alone.
func TestTake(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "id")
	scan := func() Kept {
		t.Helper()
		all, err := Scan(dir, of.Registry)
		must(t, err)
		if len(all) != 1 {
			t.Fatalf("%+v", all)
		}
		return all[0]
	}
	kill := func(f *File) {
		t.Helper()
		must(t, f.file.Close())
		f.file = nil
	}
	first, _ := open(t, path, of)
	first.Keep("T1", time.Now())
	k := scan()
	if f, err := k.Take(); f != nil || !errors.Is(err, ErrLocked) {
		t.Errorf("its sidecar lives: %v", err)
	}
	kill(first)
	f, err := k.Take()
	must(t, err)
	if token, _ := f.Kept(); token != "T1" {
		t.Errorf("it has %q", token)
	}
	if second, said := open(t, path, of); second.token != "" || !strings.Contains(said.String(), "another sidecar has") {
		t.Errorf("a sidecar has it too: %q, says %s", second.token, said)
	}
	f.Close()
	if now := scan(); now != k {
		t.Errorf("it was only looked at, and is %+v", now)
	}

	// The next sidecar of it was there and was killed meanwhile.
	second, _ := open(t, path, of)
	second.Around(100)
	kill(second)
	if f, err := k.Take(); f != nil || !errors.Is(err, ErrChanged) {
		t.Errorf("another app's: %v", err)
	}
	k = scan()
	second, _ = open(t, path, of)
	second.Keep("T2", time.Now())
	kill(second)
	if f, err := k.Take(); f != nil || !errors.Is(err, ErrChanged) {
		t.Errorf("another registration's: %v", err)
	}
	for _, text := range []string{"", "garbage", `{"rollcall_id":1,`} {
		must(t, os.WriteFile(path, []byte(text), 0o600))
		if f, err := k.Take(); f != nil || !errors.Is(err, ErrChanged) {
			t.Errorf("%q: %v", text, err)
		}
		if now, err := os.ReadFile(path); err != nil || string(now) != text {
			t.Errorf("%q has become %q, %v", text, now, err)
		}
	}
	must(t, os.Remove(path))
	if f, err := k.Take(); f != nil || !errors.Is(err, ErrChanged) {
		t.Errorf("removed: %v", err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("it was made: %v", err)
	}

	third, _ := open(t, path, of)
	third.Keep("T3", time.Now())
	kill(third)
	f, err = scan().Take()
	must(t, err)
	f.Keep("", time.Time{})
	f.Close()
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("it is still there: %v", err)
	}
	fourth := Open(Place{Path: path}, of, zerolog.Nop())
	defer fourth.Close()
	if token, _ := fourth.Kept(); token != "" || fourth.file == nil {
		t.Errorf("a sidecar that is started then has %q", token)
	}
}

// TestTakenFromAnother: a path may name another registration by now.
func TestTakenFromAnother(t *testing.T) {
	path := filepath.Join(t.TempDir(), "id")
	first, _ := open(t, path, of)
	first.Keep("T1", time.Now())
	first.Close()
	k := Kept{path, of, "T1", App{}}
	other := of
	other.Addr = netip.MustParseAddrPort("10.0.0.8:8080")
	second, _ := open(t, path, other)
	second.Keep("T1", time.Now())
	second.Close()
	if f, err := k.Take(); f != nil || !errors.Is(err, ErrChanged) {
		t.Errorf("it is that of %+v: %v", other, err)
	}
}
