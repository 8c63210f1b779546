package main

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"unicode/utf8"
)

// TestHelp: each command's help ends its lines at 100 characters, has the command's own
// flags before the common ones, and examples whose flags the command has.
func TestHelp(t *testing.T) {
	t.Parallel()
	for _, c := range newApp(nil, nil).Commands {
		if c.Hidden {
			continue
		}
		out, err := exec.Command(binary(t), "help", c.Name).CombinedOutput()
		if err != nil {
			t.Errorf("help %s: %v, %s", c.Name, err, out)
		}
		if other, err := exec.Command(binary(t), c.Name, "--help").CombinedOutput(); err != nil || string(other) != string(out) {
			t.Errorf("%s --help: %v, %s", c.Name, err, other)
		}
		own, common := strings.Index(string(out), "\nFlags:\n"), strings.Index(string(out), "\nCommon flags:\n")
		if common < 0 || own > common {
			t.Errorf("help %s: %s", c.Name, out)
		}
		for line := range strings.Lines(string(out)) {
			// A word that is longer than a line stays whole.
			if utf8.RuneCountInString(strings.TrimSpace(line)) > helpWidth && strings.Contains(strings.TrimSpace(line), " ") && !strings.HasPrefix(line, "Usage: ") {
				t.Errorf("help %s: a line of %d characters: %s", c.Name, utf8.RuneCountInString(line), line)
			}
		}
		if len(examples[c.Name]) == 0 && !strings.Contains("completion man", c.Name) {
			t.Errorf("%s has no example", c.Name)
		}
		for _, e := range examples[c.Name] {
			before, after, ok := strings.Cut(e, c.Name)
			if !ok || before != "rollcall " {
				t.Errorf("an example of %s: %s", c.Name, e)
				continue
			}
			if out, err := exec.Command("sh", "-c", fmt.Sprintf("exec %s %s --help%s", binary(t), c.Name, after)).CombinedOutput(); err != nil || !strings.HasPrefix(string(out), "rollcall "+c.Name+": ") {
				t.Errorf("%s: %v, %s", e, err, out)
			}
			if !strings.Contains(string(out), "  "+e+"\n") {
				t.Errorf("help %s lacks %s", c.Name, e)
			}
		}
	}
	for name := range examples {
		if newApp(nil, nil).Command(name) == nil {
			t.Errorf("examples of %s, which is no command", name)
		}
	}
}

// TestMistyped: what is mistyped is answered by one line that says what is meant.
func TestMistyped(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		line string
		code int
		says string
	}{
		{"drian web 127.0.0.1:1", 2, `unknown command "drian"; did you mean drain?`},
		{"hlep", 2, `unknown command "hlep"; did you mean help?`},
		{"quite-other", 2, `unknown command "quite-other"; see rollcall help`},
		{"help drian", 2, `unknown command "drian"; did you mean drain?`},
		{"drain --resaon x web 127.0.0.1:1", 2, "unknown flag --resaon; did you mean --reason?"},
		{"drain web 127.0.0.1:1 --quite-other x", 2, "unknown flag --quite-other; see rollcall help drain"},
		{"--quite-other drain", 2, "unknown flag --quite-other; see rollcall help"},
		{"wait web --timeout 5", 2, `--timeout "5": want a unit too, such as 5s`},
		{"wait web --timeout soon", 2, `--timeout "soon": want a number with a unit, such as 5s`},
		{"lbsync --min-servers x", 2, `--min-servers "x": want a whole number`},
		{"weight web 127.0.0.1:1 -5", 2, "weight -5: want 0 to 256"},
		{"instances Web", 2, `service name "Web": want 1 to 63 lower-case letters, digits, '.', '_' and '-', beginning with a letter or a digit`},
		{"--redis redis://127.0.0.1:1 --output xml services", 2, "xml"},
		{"-o json --redis redis://127.0.0.1:1 services", 1, "127.0.0.1:1"},
		{"drain web 127.0.0.1:1 -h", 0, "Usage: rollcall drain"},
		{"version", 0, "rollcall version "},
		{"help", 0, "Usage: rollcall COMMAND"},
	} {
		out, err := exec.Command(binary(t), strings.Fields(c.line)...).CombinedOutput()
		code := 0
		if err != nil {
			code = err.(*exec.ExitError).ExitCode()
		}
		if code != c.code || !strings.Contains(string(out), c.says) || c.code != 0 && strings.Count(string(out), "\n") != 1 {
			t.Errorf("rollcall %s: exit %d, %s, want exit %d and one line with %q", c.line, code, out, c.code, c.says)
		}
	}
}
