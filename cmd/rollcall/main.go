// Command rollcall is every role of rollcall: the sidecar (register), the
// reaper (reap), the daemon beside HAProxy (lbsync), and the operator's
// commands. Flags become a Config, a Config becomes a New, and Run runs; only
// this package wires, exits, or knows urfave/cli. There is one file for each
// subcommand. Built with the tag sidecar it is rollcall-sidecar, which has
// register alone.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"
)

// Exit codes, as DESIGN and the README have them.
const (
	exitFailed = 1
	exitUsage  = 2
	exitDryRun = 3 // --dry-run found something to do
	exitWait   = 4 // --wait or wait has timed out
)

var (
	// errChanges says that a dry run found something to do: exit code 3.
	errChanges = errors.New("there are changes")
	// errTimedOut says that --timeout has passed: exit code 4.
	errTimedOut = errors.New("timed out")
)

// complete is the word at the end of a line that has the program print what may come
// next, and do nothing else. Nobody has a flag of that name.
const complete = "--generate-bash-completion"

// usageError is a mistake in what was typed: exit code 2.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// appError is the exit code of the app that register was around.
type appError int

func (e appError) Error() string { return fmt.Sprintf("the app has ended with %d", int(e)) }

func usage(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

func main() {
	log := logOutput()
	code := run(os.Args, os.Stdout, log)
	log.Close(outputTimeout)
	os.Exit(code)
}

// run is main without the process: it parses, runs until the command ends or a
// SIGINT or SIGTERM comes, and returns the exit code. A second signal kills, unless
// it is the same as the first.
func run(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if n := len(args) - 1; n > 0 && args[n] == complete {
		completing(ctx, args[1:n], stdout)
		return 0
	}
	context.AfterFunc(ctx, func() { time.AfterFunc(sameStop, stop) })
	app := newApp(&printed{w: stdout, stopped: ctx.Done()}, stderr)
	err := app.RunContext(ctx, flagsFirst(app, commandFirst(app, plainWords(args))))
	if err == nil {
		return 0
	}
	var ended appError
	if errors.As(err, &ended) {
		return int(ended) // the log has said it
	}
	fmt.Fprintf(stderr, "rollcall: %s\n", printable(err))
	var u usageError
	switch {
	case errors.As(err, &u):
		return exitUsage
	case errors.Is(err, errChanges):
		return exitDryRun
	case errors.Is(err, errTimedOut):
		return exitWait
	}
	return exitFailed
}

func newApp(stdout, stderr io.Writer) *cli.App {
	app := &cli.App{
		Name:      program,
		Usage:     "a heartbeat registry on Redis that keeps HAProxy's server lists true",
		Version:   version(),
		Writer:    stdout,
		ErrWriter: stderr,
		// Exit codes are given here, once, and not by the library.
		ExitErrHandler:  func(*cli.Context, error) {},
		HideHelpCommand: true,
		Commands:        commands(),
		OnUsageError:    onUsageError,
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return unknownCommand(c.App, c.Args().First())
			}
			return cli.ShowAppHelp(c)
		},
	}
	for _, c := range app.Commands {
		c.HideHelpCommand = true
		c.OnUsageError = onUsageError
	}
	return app
}

func onUsageError(c *cli.Context, err error, _ bool) error { return flagError(c, err) }

// commandFirst moves common flags that come before the command after it. What it does
// not know stays where it is, for the library to say so.
func commandFirst(app *cli.App, args []string) []string {
	for i := 1; i < len(args); i++ {
		a := args[i]
		if len(a) < 2 || a[0] != '-' {
			if i > 1 && app.Command(a) != nil {
				return slices.Concat(args[:1], args[i:i+1], args[1:i], args[i+1:])
			}
			return args
		}
		name, hasValue := flagName(a)
		if !slices.ContainsFunc(commonFlags(), func(f cli.Flag) bool { return slices.Contains(f.Names(), name) }) {
			return args
		}
		if !hasValue {
			i++ // each takes a value
		}
	}
	return args
}

// flagsFirst moves a command's flags before its arguments, so that both
// `rollcall drain web ADDR --reason x` and the other order work: the library
// stops reading flags at the first argument. What follows "--" stays. The library
// drops the "--" itself; register, which runs what follows it, gets a second one.
func flagsFirst(app *cli.App, args []string) []string {
	if len(args) < 3 {
		return args
	}
	cmd := app.Command(args[1])
	if cmd == nil {
		return args
	}
	boolean := map[string]bool{"help": true, "h": true}
	for _, f := range cmd.Flags {
		if _, ok := f.(*cli.BoolFlag); ok {
			for _, n := range f.Names() {
				boolean[n] = true
			}
		}
	}
	out, rest := args[:2:2], []string{}
	for i := 2; i < len(args); i++ {
		a := args[i]
		if a == "--" {
			if cmd.Name == "register" {
				rest = append(rest, a)
			}
			rest = append(rest, args[i:]...)
			break
		}
		if len(a) < 2 || a[0] != '-' || a[1] >= '0' && a[1] <= '9' { // -5 is a number
			rest = append(rest, a)
			continue
		}
		name, hasValue := flagName(a)
		if name == "help" || name == "h" {
			return []string{args[0], args[1], "--help"} // whatever else there is: the library would take it for a topic
		}
		out = append(out, a)
		if !hasValue && !boolean[name] && i+1 < len(args) {
			i++
			out = append(out, args[i])
		}
	}
	return append(out, rest...)
}

func flagName(a string) (name string, hasValue bool) {
	for a != "" && a[0] == '-' {
		a = a[1:]
	}
	for i := range a {
		if a[i] == '=' {
			return a[:i], true
		}
	}
	return a, false
}
