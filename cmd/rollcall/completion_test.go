package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// completionWorld is a registry with two services, one of which has instances and an
// operator's word of an address that is away, a directory with the program, and another
// one that shells are in.
func completionWorld(t *testing.T) (s *system, bin, dir string) {
	t.Helper()
	s, bin, dir = &system{redis: redistest.Start(t)}, t.TempDir(), t.TempDir()
	must(t, os.Symlink(binary(t), filepath.Join(bin, "rollcall")))
	must(t, os.WriteFile(filepath.Join(dir, "haproxy.cfg"), nil, 0o600))
	must(t, os.Mkdir(filepath.Join(dir, "state"), 0o700))
	rdb, ctx := s.redis.Client(t), t.Context()
	for service, addrs := range map[string][]string{"web": {"10.0.0.7:8080", "10.0.0.8:8080", "[fd00::7]:8080"}, "api": {"10.1.0.7:9090"}} {
		for _, a := range addrs {
			must(t, rdb.ZAdd(ctx, "rollcall:{"+service+"}:instances", redis.Z{Score: float64(time.Now().UnixMilli()), Member: a}).Err())
		}
		must(t, rdb.SAdd(ctx, "rollcall:services", service).Err())
		must(t, rdb.Incr(ctx, "rollcall:{"+service+"}:version").Err())
	}
	if _, stderr, code := s.rollcall(t, "drain", "web", "10.0.0.9:8080", "--absent"); code != 0 {
		t.Fatal(stderr)
	}
	return s, bin, dir
}

// The keys that put all candidates in the line.
const bashAll, zshAll = "\x1b*", "\x18a"

// zshDiffers are the lines that zsh itself completes: it offers files where there is no
// directory, and takes "[" for a subscript.
var zshDiffers = []string{"a file where a directory is wanted", "an address of IPv6"}

// completions are lines as they are typed, and as all candidates make them.
func completions(s *system, dir string) [][3]string {
	return [][3]string{
		{"a command", "rollcall dereg", "rollcall deregister"},
		{"commands", "rollcall re", "rollcall ready reap register"},
		{"help is one", "rollcall he", "rollcall help"},
		{"of what", "rollcall help dereg", "rollcall help deregister"},
		{"a command after a common flag", "rollcall --namespace x dereg", "rollcall --namespace x deregister"},
		{"a common flag before the command", "rollcall --names", "rollcall --namespace"},
		{"a flag", "rollcall drain --rea", "rollcall drain --reason"},
		{"a flag after arguments", "rollcall drain web 10.0.0.1:80 --rea", "rollcall drain web 10.0.0.1:80 --reason"},
		{"all flags", "rollcall services --", "rollcall services --help --log-format --log-level --namespace --output --redis --redis-ca --redis-cert --redis-key"},
		{"all flags after an argument", "rollcall watch web --", "rollcall watch web --help --http --log-format --log-level --namespace --output --pprof --redis --redis-ca --redis-cert --redis-key"},
		{"a flag of maint", "rollcall maint web 10.0.0.1:80 --fo", "rollcall maint web 10.0.0.1:80 --for --force"},
		{"a flag of weight", "rollcall weight --fo", "rollcall weight --for --force"},
		{"a condition", "rollcall drain --ho", "rollcall drain --host"},
		{"a condition after a service", "rollcall ready web --ta", "rollcall ready web --tag"},
		{"a flag of another command", "rollcall lbsync --rea", "rollcall lbsync --rea"},
		{"flags", "rollcall register --re", "rollcall register --ready-file --redis --redis-ca --redis-cert --redis-key"},
		{"a service", "rollcall drain we", "rollcall drain web"},
		{"services", "rollcall drain ", "rollcall drain api web"},
		{"more services", "rollcall watch web a", "rollcall watch web api"},
		{"a service, which is no file", "rollcall drain hapr", "rollcall drain hapr"},
		{"no service", "rollcall instances web a", "rollcall instances web a"},
		{"an address", "rollcall drain api 10", "rollcall drain api 10.1.0.7:9090"},
		{"an address up to its port", "rollcall drain web 10.0.0.7:", "rollcall drain web 10.0.0.7:8080"},
		{"an address of IPv6", "rollcall explain web [fd00:", "rollcall explain web [fd00::7]:8080"},
		{"an address that is away", "rollcall ready web 10.0.0.9", "rollcall ready web 10.0.0.9:8080"},
		{"no address that is away", "rollcall explain web 10.0.0.9", "rollcall explain web 10.0.0.9"},
		{"a weight", "rollcall weight web 10.0.0.7:8080 o", "rollcall weight web 10.0.0.7:8080 own"},
		{"a flag's service", "rollcall deregister --service a", "rollcall deregister --service api"},
		{"a flag's address", "rollcall deregister --service api --addr 10", "rollcall deregister --service api --addr 10.1.0.7:9090"},
		{"the same with =", "rollcall deregister --service=api --addr=10", "rollcall deregister --service=api --addr=10.1.0.7:9090"},
		{"a backend's service", "rollcall lbsync --backend we", "rollcall lbsync --backend web="},
		{"a form", "rollcall services -o j", "rollcall services -o json"},
		{"a goal", "rollcall wait web --for con", "rollcall wait web --for converged"},
		{"a goal that goes on", "rollcall wait web --for=re", "rollcall wait web --for=ready="},
		{"a role", "rollcall doctor --role rea", "rollcall doctor --role reap"},
		{"a mode", "rollcall lbsync --mode sl", "rollcall lbsync --mode slots"},
		{"an interface", "rollcall register --interface l", "rollcall register --interface lo"},
		{"a shell", "rollcall completion fi", "rollcall completion fish"},
		{"a file", "rollcall lbsync --config hapr", "rollcall lbsync --config haproxy.cfg"},
		{"a file with =", "rollcall lbsync --config=hapr", "rollcall lbsync --config=haproxy.cfg"},
		{"a directory", "rollcall lbsync --state-dir st", "rollcall lbsync --state-dir state"},
		{"a file where a directory is wanted", "rollcall lbsync --state-dir hapr", "rollcall lbsync --state-dir hapr"},
		{"another registry", "rollcall --namespace other drain we", "rollcall --namespace other drain we"},
		{"no registry", "rollcall drain --redis redis://" + s.redis.Host + ":1/0 we", "rollcall drain --redis redis://" + s.redis.Host + ":1/0 we"},
		{"a registry that is none", "rollcall drain --redis x we", "rollcall drain --redis x we"},
		{"an app, which must not run", "rollcall register --service web --addr 127.0.0.1:9 -- touch " + dir + "/ran", "rollcall register --service web --addr 127.0.0.1:9 -- touch " + dir + "/ran"},
		{"an app's file", "rollcall register --service web -- cat hapr", "rollcall register --service web -- cat haproxy.cfg"},
		{"a hidden command", "rollcall demo-", "rollcall demo-"},
		{"nothing of no command", "rollcall nope we", "rollcall nope we"},
	}
}

// typist is a shell on a terminal, with rollcall's completion.
type typist struct {
	*terminal
	lines int
}

// enter ends the line and returns what the shell prints behind the line's number.
func (c *typist) enter(t *testing.T, line string) (got string) {
	t.Helper()
	c.lines++
	c.types(t, line+"\r")
	mark := regexp.MustCompile(fmt.Sprintf(`(?m)^line=%d (.*?)\r?$`, c.lines))
	haproxytest.Poll(t, "the shell answers", func() error {
		m := mark.FindStringSubmatch(c.out.String())
		if m == nil {
			return errors.New("not yet")
		}
		got = m[1]
		return nil
	})
	return got
}

// line types text and keys, and returns the line that they make: the shell prints it
// instead of running it.
func (c *typist) line(t *testing.T, text string) string {
	t.Helper()
	return strings.TrimSpace(c.enter(t, text+fmt.Sprintf("\x01echo line=$((%d+1)) ", c.lines)))
}

// completed types every line and the key that puts all candidates in.
func (c *typist) completed(t *testing.T, s *system, dir, key string) {
	t.Helper()
	for _, w := range completions(s, dir) {
		t.Run(w[0], func(t *testing.T) {
			if key == zshAll && slices.Contains(zshDiffers, w[0]) {
				return
			}
			if got := strings.TrimSuffix(c.line(t, w[1]+key), "/"); got != w[2] { // of a directory a shell may print it
				t.Errorf("%s\n got %q\nwant %q", w[1], got, w[2])
			}
		})
	}
	if _, err := os.Stat(filepath.Join(dir, "ran")); err == nil {
		t.Error("completing has run the app")
	}
	if text := c.out.String(); strings.Contains(text, "rror") || strings.Contains(text, "rollcall: ") {
		t.Errorf("the shell shows an error:\n%s", text)
	}
}

// TestCompletion has a bash on a terminal complete what is typed: readline cuts words
// otherwise than the shell does, and a script that is called by hand does not see that.
func TestCompletion(t *testing.T) {
	t.Parallel()
	s, bin, dir := completionWorld(t)
	env := []string{"PATH=" + bin + ":" + os.Getenv("PATH"), "ROLLCALL_REDIS=" + s.redis.URL(), "INPUTRC=/dev/null"}
	c := &typist{terminal: openTerminal(t, env, "bash", "--norc", "-i")}
	c.enter(t, "stty cols 1000; cd "+dir+"; set -f; source <(rollcall completion bash); echo line=$((0+1)) ready")
	c.completed(t, s, dir, bashAll)
	if got := c.line(t, "rollcall register -- basenam"+bashAll); got != "rollcall register -- basename" {
		t.Errorf("an app: %q", got)
	}
	// With the key that people press: a blank comes where a word has ended, and no other.
	for typed, want := range map[string]string{
		"rollcall weight web 10.0.0.7:80\to\t--force": "rollcall weight web 10.0.0.7:8080 own --force",
		"rollcall wait web --for rea\t2":              "rollcall wait web --for ready=2",
		"rollcall wait web --for=rea\t2":              "rollcall wait web --for=ready=2",
		"rollcall drain web [fd00::\t--rea\tx":        "rollcall drain web [fd00::7]:8080 --reason x",
		"rollcall lbsync --state-dir sta\tx":          "rollcall lbsync --state-dir state/x",
		// The cursor is in the middle of the line.
		"rollcall drain we 10.0.0.7:8080" + strings.Repeat("\x02", 14) + "\t": "rollcall drain web 10.0.0.7:8080",
	} {
		if got := c.line(t, typed); got != want {
			t.Errorf("%q\n got %q\nwant %q", typed, got, want)
		}
	}
	// A Redis that hangs costs a second, and nothing is shown of it.
	s.redis.Signal(t, syscall.SIGSTOP)
	if got := c.line(t, "rollcall drain we\t"); got != "rollcall drain we" {
		t.Errorf("without an answer: %q", got)
	}
	least := time.Hour // of a few, as this machine is busy
	for range 3 {
		begun := time.Now()
		if out, stderr, code := s.rollcall(t, "drain", "we", complete); out+stderr != "" || code != 0 {
			t.Errorf("exit %d, %s%s", code, out, stderr)
		}
		least = min(least, time.Since(begun))
	}
	if least < completionTimeout || least > completionTimeout*3/2 {
		t.Errorf("a Redis that hangs costs %v", least)
	}
	s.redis.Signal(t, syscall.SIGCONT)
}

// TestCompletionOfOthers has zsh and fish complete the same, where there are such.
func TestCompletionOfOthers(t *testing.T) {
	t.Parallel()
	s, bin, dir := completionWorld(t)
	env := []string{"PATH=" + bin + ":" + os.Getenv("PATH"), "ROLLCALL_REDIS=" + s.redis.URL(), "HOME=" + t.TempDir()}
	if path, err := exec.LookPath("zsh"); err == nil {
		c := &typist{terminal: openTerminal(t, env, path, "-f", "-i")}
		c.enter(t, "stty cols 1000; unsetopt promptsp promptcr; bindkey -e; cd "+dir+"; autoload -Uz compinit; compinit -D -u; "+
			"zle -C all complete-word _generic; bindkey '^Xa' all; zstyle ':completion:all::::' completer _all_matches _complete; zstyle ':completion:all:*' insert true; "+
			"setopt noglob; source <(rollcall completion zsh); echo line=$((0+1)) ready")
		c.completed(t, s, dir, zshAll)
	}
	if path, err := exec.LookPath("fish"); err == nil {
		for _, w := range completions(s, dir) {
			cmd := exec.Command(path, "--no-config", "-c", "rollcall completion fish | source; complete -C $argv[1]", w[1])
			cmd.Env, cmd.Dir = append(os.Environ(), env...), dir
			out, _ := cmd.CombinedOutput() // it exits with 1 if it finds nothing
			begin := strings.LastIndexByte(w[1], ' ') + 1
			got := w[1][:begin] + strings.TrimSuffix(strings.Join(strings.Fields(string(out)), " "), "/")
			if len(out) == 0 {
				got = w[1]
			}
			if got != w[2] {
				t.Errorf("fish: %s: %s\n got %q\nwant %q", w[0], w[1], got, w[2])
			}
		}
	}
	for shell, want := range map[string]string{"zsh": "compdef _rollcall rollcall", "fish": "complete -c rollcall"} {
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
