package main

import (
	"bufio"
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestCompletion has a bash complete words as a person's bash does.
func TestCompletion(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.Symlink(binary(t), filepath.Join(dir, "rollcall")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		words string // the last one is under the cursor
		want  string
	}{
		{"a command", "rollcall dereg", "deregister"},
		{"commands", "rollcall re", "register reap ready"},
		{"a flag", "rollcall drain --rea", "--reason"},
		{"a flag after arguments", "rollcall drain web 10.0.0.1:80 --rea", "--reason"},
		{"a flag of maint", "rollcall maint web 10.0.0.1:80 --fo", "--force"},
		{"a flag of weight", "rollcall weight --fo", "--force"},
		{"not of drain", "rollcall drain --fo", ""},
		{"a flag of another command", "rollcall lbsync --rea", ""},
		{"flags", "rollcall register --re", "--redis --redis-ca --redis-cert --redis-key --ready-file"},
		{"an argument, which is a file or nothing", "rollcall drain we", ""},
		{"a hidden command", "rollcall demo-", ""},
		{"an app's, which must not run", "rollcall register --service web --addr 127.0.0.1:9 -- touch " + dir + "/ran", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := exec.Command("bash", "--norc", "-c", `set -eu
source <(rollcall completion bash)
complete -p rollcall | grep -q -- '-F _rollcall '
COMP_WORDS=($WORDS) COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_rollcall || true # nothing found
printf '%s\n' "${COMPREPLY[@]}"`)
			cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "WORDS="+c.words)
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			got, want := strings.Fields(string(out)), strings.Fields(c.want)
			slices.Sort(got)
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("got %q, want %q", got, want)
			}
		})
	}
	if _, err := os.Stat(filepath.Join(dir, "ran")); err == nil {
		t.Error("completing has run the app")
	}
	for shell, want := range map[string]string{"zsh": "compdef _rollcall rollcall", "fish": "-l drain-wait"} {
		var out, errs strings.Builder
		if code := run([]string{"rollcall", "completion", shell}, &out, &errs); code != 0 || !strings.Contains(out.String(), want) {
			t.Errorf("%s: exit %d, %s%s", shell, code, out.String(), errs.String())
		}
	}
}

// TestManPage holds that the page has every command, flag and variable, and
// that groff, where there is one, has nothing to say against it.
func TestManPage(t *testing.T) {
	t.Parallel()
	var page bytes.Buffer
	app := newApp(nil, nil)
	if err := manPage(bufio.NewWriter(&page), app); err != nil {
		t.Fatal(err)
	}
	text := strings.ReplaceAll(page.String(), `\-`, "-")
	for i, line := range strings.Split(text, "\n") {
		if strings.HasPrefix(line, ".") && !slices.Contains([]string{".TH", ".SH", ".SS", ".TP", ".PP", ".nf", ".fi", ".B", ".I"}, strings.Fields(line)[0]) {
			t.Errorf("line %d is no request: %s", i+1, line)
		}
	}
	for _, c := range app.Commands {
		begun := strings.Index(strings.ReplaceAll(text, "\"\n", " \n"), ".SS \""+c.Name+" ")
		if (begun < 0) != c.Hidden {
			t.Errorf("%s: hidden %v, at %d", c.Name, c.Hidden, begun)
		}
		if c.Hidden {
			continue
		}
		section, _, _ := strings.Cut(text[begun+1:], "\n.S")
		for _, f := range c.Flags {
			if name := "--" + f.Names()[0]; name != "--help" && !strings.Contains(section, name) {
				t.Errorf("%s lacks %s", c.Name, name)
			}
		}
	}
	for _, want := range []string{
		"\\fB--weight\\fR \\fIVALUE\\fR\nShare of the traffic, 0 to 256. Default: 100. Variable: ROLLCALL_WEIGHT.",
		"\\fB--advertise\\fR \\fIHOST[:PORT]\\fR\n", "\\fB--output, -o\\fR",
		"Also: --redis, --redis-ca",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	if path, err := exec.LookPath("groff"); err == nil {
		cmd := exec.Command(path, "-k", "-man", "-Tutf8", "-ww", "-z")
		cmd.Stdin = &page
		if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("groff: %v\n%s", err, out)
		}
	}
	if got := roff(".a-b\\c"); got != `\&.a\-b\ec` {
		t.Errorf("got %q", got)
	}
}
