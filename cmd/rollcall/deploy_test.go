package main

import (
	"crypto/sha256"
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/urfave/cli/v2"
)

// TestBuild holds what scripts/build promises: a static program, whose version is
// the commit, and the same bytes in whatever folder the commit is.
func TestBuild(t *testing.T) {
	t.Parallel()
	git := func(dir string, args ...string) string {
		t.Helper()
		cmd := exec.Command("git", append([]string{"-C", dir, "-c", "user.name=t", "-c", "user.email=t@invalid", "-c", "commit.gpgsign=false"}, args...)...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("git %v: %v\n%s", args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	// What is here now, committed, changes included.
	first := filepath.Join(t.TempDir(), "first")
	if err := copySource("../..", first); err != nil {
		t.Fatal(err)
	}
	git(first, "init", "-q")
	git(first, "add", "-A")
	git(first, "commit", "-q", "-m", "x")
	commit := git(first, "rev-parse", "HEAD")
	second := filepath.Join(t.TempDir(), "a longer name", "second")
	git(first, "clone", "-q", first, second)
	dirs := []string{first, second}
	sums := make([]string, 2)
	var building sync.WaitGroup
	for i, dir := range dirs {
		building.Go(func() {
			path := filepath.Join(dir, "rollcall")
			if out, err := exec.Command(filepath.Join(dir, "scripts/build"), path).CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
				return
			}
			b, err := os.ReadFile(path)
			if err != nil {
				t.Error(err)
			}
			sums[i] = fmt.Sprintf("%x", sha256.Sum256(b))
		})
	}
	building.Wait()
	if t.Failed() {
		return
	}
	if sums[0] != sums[1] {
		t.Errorf("sha256 %s in one folder, %s in another", sums[0], sums[1])
	}
	path := filepath.Join(first, "rollcall")
	if out, err := exec.Command(path, "--version").Output(); err != nil || strings.TrimSpace(string(out)) != "rollcall version "+commit {
		t.Errorf("--version: %s, %v; want %s", out, err, commit)
	}
	own := filepath.Join(first, "rollcall-sidecar")
	if out, err := exec.Command(filepath.Join(first, "scripts/build"), "--sidecar", own).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if out, err := exec.Command(own, "--version").Output(); err != nil || strings.TrimSpace(string(out)) != "rollcall-sidecar version "+commit {
		t.Errorf("--version: %s, %v; want %s", out, err, commit)
	}
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if libs, err := f.ImportedLibraries(); err != nil || len(libs) > 0 || slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
		t.Errorf("needs %v, %v", libs, err)
	}
}

// copySource copies the project without its history and what is built.
func copySource(from, to string) error {
	src := os.DirFS(from)
	return fs.WalkDir(src, ".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case path == ".git":
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		case d.IsDir():
			return os.MkdirAll(filepath.Join(to, path), 0o755)
		case !d.Type().IsRegular() || path == "rollcall" || path == "rollcall-sidecar":
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		b, err := fs.ReadFile(src, path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, path), b, info.Mode().Perm())
	})
}

// TestUnits holds the systemd units to the program's flags and variables, and has
// systemd's own tool look at them, where there is one.
func TestUnits(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("../../scripts/deploy/systemd/*.service")
	if err != nil || len(files) != 5 {
		t.Fatalf("units %v, %v", files, err)
	}
	var variables []string
	app := newApp(nil, nil)
	for _, c := range app.Commands {
		for _, f := range c.Flags {
			variables = append(variables, f.(cli.DocGenerationFlag).GetEnvVars()...)
		}
	}
	variables = append(variables, "ROLLCALL_REDIS_PASSWORD", "ROLLCALL_REDIS_PASSWORD_FILE")
	dir := t.TempDir()
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		text := string(b)
		for _, v := range regexp.MustCompile(`ROLLCALL_[A-Z_]+`).FindAllString(text, -1) {
			if !slices.Contains(variables, v) {
				t.Errorf("%s: there is no variable %s", file, v)
			}
		}
		m := regexp.MustCompile(`(?m)^ExecStart=/usr/local/bin/rollcall (.*)$`).FindStringSubmatch(text)
		if m == nil {
			t.Fatalf("%s has no ExecStart", file)
		}
		words := strings.Fields(m[1])
		cmd := app.Command(words[0])
		if cmd == nil {
			t.Fatalf("%s: there is no command %s", file, words[0])
		}
		for _, w := range words[1:] {
			name, isFlag := strings.CutPrefix(w, "--")
			if isFlag && !slices.ContainsFunc(cmd.Flags, func(f cli.Flag) bool { return f.Names()[0] == name }) {
				t.Errorf("%s: %s has no flag %s", file, words[0], w)
			}
		}
		for _, want := range []string{
			"Type=notify", "DynamicUser=yes", "ProtectSystem=strict", "NoNewPrivileges=yes", "CapabilityBoundingSet=", "TimeoutStartSec=infinity", "Restart=always",
		} {
			if !strings.Contains(text, "\n"+want+"\n") {
				t.Errorf("%s lacks %s", file, want)
			}
		}
		// For systemd itself: the program is here, and %i is a unit that there is.
		text = strings.ReplaceAll(text, "/usr/local/bin/rollcall", binary(t))
		text = regexp.MustCompile(`(?m)^Documentation=.*\n`).ReplaceAllString(text, "")
		name := strings.Replace(filepath.Base(file), "@", "@app", 1)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Log("no systemd-analyze here")
		return
	}
	if err := os.WriteFile(filepath.Join(dir, "app.service"), []byte("[Service]\nExecStart=/bin/true\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	units, err := filepath.Glob(filepath.Join(dir, "rollcall*"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(analyze, append([]string{"verify"}, units...)...)
	cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+dir+":")
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	for _, u := range units { // 15 is 1.5 of 10, "OK"
		if out, err := exec.Command(analyze, "security", "--no-pager", "--offline=true", "--threshold=15", u).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", u, err, out)
		}
	}
}
