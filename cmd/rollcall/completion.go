//go:build !sidecar

package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"rollcall/lbsync"
	"rollcall/registrar"
)

// The shells ask the program itself what may come next, so they know what it knows: they
// run it with the words up to the cursor and the word `complete` behind them. It prints
// one candidate a line, each the whole word, or one of the directives below.
//
// bash cuts words at ":" and "=" too, so addresses and --flag=value come in pieces: the
// pieces that have no blank between them are put together, and of a candidate only what
// comes after the last cut is given back.
const (
	bashCompletion = `_rollcall() {
  local line=${COMP_LINE:0:COMP_POINT} word cur breaks kept= i n=0
  local -a words=()
  for ((i = 0; i < COMP_CWORD; i++)); do
    word=${COMP_WORDS[i]}
    if [[ $n -eq 0 || $line == [[:space:]]* ]]; then
      words[n]=$word
      n=$((n + 1))
    else
      words[n - 1]+=$word
    fi
    line=${line#*"$word"}
  done
  if [[ $line == [[:space:]]* ]]; then
    cur=${line#"${line%%%%[![:space:]]*}"}
  else
    n=$((n - 1))
    cur=${words[n]}$line
  fi
  breaks=${COMP_WORDBREAKS//[!:=]/}
  if [[ -n $breaks ]]; then
    kept=${cur%%"${cur##*[$breaks]}"}
  fi
  COMPREPLY=()
  while IFS= read -r word; do
    case $word in
      :files) compopt -o default ;;
      :dirs) compopt -o dirnames ;;
      :command)
        compopt -o default
        while IFS= read -r word; do COMPREPLY+=("$word"); done < <(compgen -c -- "$cur")
        ;;
      *)
        if [[ $word == *= ]]; then compopt -o nospace; fi
        COMPREPLY+=("${word#"$kept"}")
        ;;
    esac
  done < <("${words[@]:0:n}" "$cur" %[1]s 2>/dev/null)
}
complete -F _rollcall rollcall
`
	zshCompletion = `#compdef rollcall
_rollcall() {
  local -a found
  found=("${(@f)$("${(@)words[1,CURRENT-1]}" "$PREFIX" %[1]s 2>/dev/null)}")
  case $found[1] in
    (:files) if [[ $PREFIX == -*=* ]]; then compset -P '*='; fi; _files ;;
    (:dirs) if [[ $PREFIX == -*=* ]]; then compset -P '*='; fi; _files -/ ;;
    (:command) _command_names -e ;;
    (*) compadd -S '' -- ${(M)found:#*=}; compadd -- ${found:#*=} ;;
  esac
}
if [[ $funcstack[1] == _rollcall ]]; then
  _rollcall "$@"
else
  compdef _rollcall rollcall
fi
`
	fishCompletion = `function __rollcall_complete
    set -l typed (commandline -opc)
    set -l cur (commandline -ct)
    set -l flag (string match -r -- '^-[^=]*=' "$cur")
    set -l value (string replace -r -- '^-[^=]*=' '' "$cur")
    set -l found ($typed "$cur" %[1]s 2>/dev/null)
    switch "$found[1]"
        case :files
            printf '%%s\n' "$flag"(__fish_complete_path "$value")
        case :dirs
            printf '%%s\n' "$flag"(__fish_complete_directories "$value" '')
        case :command
            __fish_complete_command
        case '*'
            printf '%%s\n' $found
    end
end
complete -c rollcall -f -a '(__rollcall_complete)'
`
)

// What a shell knows itself: a directive is printed in the place of candidates.
const (
	anyFile    = ":files"
	anyDir     = ":dirs"
	anyCommand = ":command"
)

// completionTimeout bounds all that completing asks of Redis: somebody waits at the
// keyboard, and the shell with them.
const completionTimeout = time.Second

func completionCommand() *cli.Command {
	return &cli.Command{
		Name: "completion", Usage: "print what makes a shell complete commands, flags and their values", ArgsUsage: "bash|zsh|fish",
		Action: func(c *cli.Context) error {
			a, err := args(c, "bash|zsh|fish", 1)
			if err != nil {
				return err
			}
			script, ok := map[string]string{"bash": bashCompletion, "zsh": zshCompletion, "fish": fishCompletion}[a[0]]
			if !ok {
				return usage("completion %q: want bash, zsh or fish", a[0])
			}
			_, err = fmt.Fprintf(c.App.Writer, script, complete)
			return err
		},
	}
}

// completing prints what may stand in the place of the last of words, which are those
// after the program's name. It runs none of what is typed, and prints no error: the
// shell would show it in the middle of the line.
func completing(ctx context.Context, words []string, w io.Writer) {
	cur := ""
	if n := len(words); n > 0 {
		cur, words = words[n-1], words[:n-1]
	}
	for _, c := range readTyped(newApp(io.Discard, io.Discard), words).candidates(ctx, cur) {
		if strings.HasPrefix(c, cur) || strings.HasPrefix(c, ":") {
			_, _ = fmt.Fprintln(w, c) // nobody can be told
		}
	}
}

// typed is a command line up to the word under the cursor.
type typed struct {
	app   *cli.App
	help  bool              // it begins with help
	cmd   *cli.Command      // nil before it, or if it is none
	args  []string          // of the command
	given map[string]string // values of its flags, by the flag's first name
	open  cli.Flag          // whose value comes next; nil if none is
	over  bool              // a "--" has ended the flags
	bad   bool              // there is no such command
}

func readTyped(app *cli.App, words []string) *typed {
	t := &typed{app: app, given: map[string]string{}}
	for _, word := range words {
		switch {
		case t.open != nil:
			t.given[t.open.Names()[0]], t.open = word, nil
		case !t.over && word == "--":
			t.over = true
		case !t.over && len(word) > 1 && word[0] == '-':
			name, hasValue := flagName(word)
			f := t.flag(name)
			switch {
			case f == nil:
			case hasValue:
				_, t.given[f.Names()[0]], _ = strings.Cut(word, "=")
			case f.(cli.DocGenerationFlag).TakesValue():
				t.open = f
			}
		case t.cmd != nil:
			t.args = append(t.args, word)
		case word == "help":
			t.help = true
		default:
			t.cmd = app.Command(word)
			t.bad = t.cmd == nil
		}
	}
	return t
}

// flags are those that the command has; before the command the common ones.
func (t *typed) flags() []cli.Flag {
	if t.cmd == nil {
		return commonFlags()
	}
	return t.cmd.Flags
}

func (t *typed) flag(name string) cli.Flag {
	for _, f := range t.flags() {
		if slices.Contains(f.Names(), name) {
			return f
		}
	}
	return nil
}

// candidates are what may come next; they need not begin with cur.
func (t *typed) candidates(ctx context.Context, cur string) (all []string) {
	runs := t.cmd != nil && t.cmd.Name == "register" // what follows its "--"
	switch {
	case t.bad:
	case t.open != nil:
		return t.values(ctx, t.open)
	case t.over && runs && len(t.args) == 0:
		return []string{anyCommand}
	case t.over && runs:
		return []string{anyFile}
	case !t.over && strings.HasPrefix(cur, "-"):
		name, hasValue := flagName(cur)
		if !hasValue {
			all = []string{"--help"}
			for _, f := range t.flags() {
				for _, n := range f.Names() {
					all = append(all, dashes(n))
				}
			}
			break
		}
		if f := t.flag(name); f != nil {
			flag, _, _ := strings.Cut(cur, "=")
			for _, v := range t.values(ctx, f) {
				if !strings.HasPrefix(v, ":") {
					v = flag + "=" + v
				}
				all = append(all, v)
			}
		}
	case t.cmd == nil:
		for _, c := range t.app.Commands {
			if !c.Hidden {
				all = append(all, c.Name)
			}
		}
		if !t.help {
			all = append(all, "help", "version")
		}
	default:
		return t.argument(ctx)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// values are those that a flag may have.
func (t *typed) values(ctx context.Context, f cli.Flag) []string {
	switch f.Names()[0] {
	case "output":
		return []string{"json", "table"}
	case "log-format":
		return []string{"json", "text"}
	case "log-level":
		return []string{"debug", "error", "info", "warn"}
	case "for":
		return []string{"converged", "ready=", "version="}
	case "mode":
		return []string{string(lbsync.Auto), string(lbsync.Dynamic), string(lbsync.Slots)}
	case "role":
		return registrar.Roles
	case "interface":
		return interfaces()
	case "service":
		return t.services(ctx, "")
	case "backend":
		return t.services(ctx, "=")
	case "addr":
		if t.cmd.Name == "deregister" { // register's is a new one
			return t.addresses(ctx, t.given["service"])
		}
		return nil
	}
	switch typed := strings.Fields(flagRow(f)[0]); typed[len(typed)-1] { // --config FILE
	case "FILE", "PATH":
		return []string{anyFile}
	case "DIRECTORY":
		return []string{anyDir}
	}
	return nil
}

// argument is what may be the command's next argument, by what its help calls it.
func (t *typed) argument(ctx context.Context) (all []string) {
	names := strings.Fields(t.cmd.ArgsUsage)
	if len(names) == 0 {
		return nil
	}
	i := len(t.args)
	if last := len(names) - 1; i > last {
		if !strings.Contains(names[last], "…") {
			return nil
		}
		i = last
	}
	switch name := strings.Trim(names[i], "[]…"); name {
	case "SERVICE":
		return t.services(ctx, "")
	case "ADDR":
		return t.addresses(ctx, t.args[0])
	default:
		for _, word := range strings.Split(name, "|") {
			if word != "" && strings.ToLower(word) == word && word[0] != '-' {
				all = append(all, word) // and not N
			}
		}
		return all
	}
}

// interfaces are the names of this machine's; none if they cannot be told.
func interfaces() (names []string) {
	all, _ := net.Interfaces() // nobody can be told
	for _, i := range all {
		names = append(names, i.Name)
	}
	return names
}

// services are the names that somebody has registered as or follows, each with behind
// behind it.
func (t *typed) services(ctx context.Context, behind string) []string {
	return t.ask(ctx, func(ctx context.Context, s *session) (all []string) {
		for _, name := range s.names(ctx, "") {
			all = append(all, name+behind)
		}
		return all
	})
}

// addresses are those of a service's instances. ready and weight may also be said of
// one that is away, if an operator has said something of it.
func (t *typed) addresses(ctx context.Context, service string) []string {
	svc, err := registrar.ParseService(service)
	if err != nil {
		return nil
	}
	return t.ask(ctx, func(ctx context.Context, s *session) (all []string) {
		snap, err := s.store.Read(ctx, svc, nil)
		if err != nil {
			return nil
		}
		for _, e := range snap.Entries {
			if e.Present {
				all = append(all, e.Addr.String())
			}
		}
		if t.cmd.Name == "ready" || t.cmd.Name == "weight" {
			overrides, _ := s.store.Overrides(ctx, svc) // the rest is of use without
			for _, o := range overrides {
				all = append(all, o.Addr.String())
			}
		}
		return all
	})
}

// ask has f ask the registry that the line names. Whatever is wrong with it, nothing is
// found.
func (t *typed) ask(ctx context.Context, f func(context.Context, *session) []string) (found []string) {
	ctx, cancel := context.WithTimeout(ctx, completionTimeout)
	defer cancel()
	line := []string{program}
	for _, flag := range redisFlags() {
		if value, ok := t.given[flag.Names()[0]]; ok {
			line = append(line, dashes(flag.Names()[0])+"="+value)
		}
	}
	app := &cli.App{
		Name: program, Writer: io.Discard, ErrWriter: io.Discard, Flags: redisFlags(), HideHelp: true, HideVersion: true,
		ExitErrHandler: func(*cli.Context, error) {},
		Action: func(c *cli.Context) error {
			s, err := begin(c, 1)
			if err != nil {
				return err
			}
			defer s.close()
			found = f(c.Context, s)
			return nil
		},
	}
	_ = app.RunContext(ctx, line) // nobody can be told
	slices.Sort(found)
	return slices.Compact(found)
}
