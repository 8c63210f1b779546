package main

import (
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/urfave/cli/v2"
)

// helpWidth is where lines of help end, in characters.
const helpWidth = 100

func init() { cli.HelpPrinter = printHelp }

// printHelp prints the help of a command or of the program, in the place of the
// library's, whose lines have no end and whose flags are in the order of the code.
func printHelp(w io.Writer, _ string, data any) {
	var b strings.Builder
	switch v := data.(type) {
	case *cli.Command:
		commandHelp(&b, v)
	case *cli.App:
		programHelp(&b, v)
	}
	_, _ = io.WriteString(w, b.String()) // nobody can be told
}

func programHelp(b *strings.Builder, app *cli.App) {
	fmt.Fprintf(b, "%s: %s\n\nUsage: %s COMMAND [FLAG…] [ARGUMENT…]\n\nCommands:\n", app.Name, app.Usage, app.Name)
	var rows [][2]string
	for _, c := range app.Commands {
		if !c.Hidden {
			rows = append(rows, [2]string{c.Name, strings.ReplaceAll(c.Usage, "`", "")})
		}
	}
	table(b, rows)
	fmt.Fprintf(b, "\n%s help COMMAND says more of one, %s version which version this is.\n", app.Name, app.Name)
}

func commandHelp(b *strings.Builder, c *cli.Command) {
	fmt.Fprintf(b, "%s %s: ", program, c.Name)
	wrap(b, strings.ReplaceAll(c.Usage, "`", ""), len(program)+len(c.Name)+3, 2)
	fmt.Fprintf(b, "\nUsage: %s\n", strings.TrimSpace(fmt.Sprintf("%s %s [FLAG…] %s", program, c.Name, c.ArgsUsage)))
	if list := examples[c.Name]; len(list) > 0 {
		b.WriteString("\nExamples:\n")
		for _, e := range list {
			fmt.Fprintf(b, "  %s\n", e)
		}
	}
	var own, common [][2]string
	for _, f := range c.Flags {
		row := flagRow(f)
		if isCommon(f) {
			common = append(common, row)
		} else {
			own = append(own, row)
		}
	}
	for _, block := range []struct {
		title string
		rows  [][2]string
	}{{"Flags", own}, {"Common flags", common}} {
		if len(block.rows) > 0 {
			fmt.Fprintf(b, "\n%s:\n", block.title)
			table(b, block.rows)
		}
	}
}

// commonFlags are of most commands, and may come before the command too.
func commonFlags() []cli.Flag {
	return append(redisFlags(outputFlag()), httpFlags()...)
}

func isCommon(f cli.Flag) bool {
	return f.Names()[0] == "help" || slices.ContainsFunc(commonFlags(), func(c cli.Flag) bool { return c.Names()[0] == f.Names()[0] })
}

// flagRow is what is typed of a flag, and what it does.
func flagRow(f cli.Flag) [2]string {
	doc := f.(cli.DocGenerationFlag) // every kind of flag is one
	var names []string
	for _, n := range f.Names() {
		names = append(names, dashes(n))
	}
	typed, text := strings.Join(names, ", "), doc.GetUsage()
	value := "VALUE"
	if before, rest, ok := strings.Cut(text, "`"); ok {
		if v, after, ok := strings.Cut(rest, "`"); ok {
			value, text = v, before+v+after
		}
	}
	if doc.TakesValue() {
		typed += " " + value
		if d := doc.GetDefaultText(); d != "" {
			text += " (default: " + strings.Trim(d, `"`) + ")"
		}
	}
	if vars := doc.GetEnvVars(); len(vars) > 0 {
		text += " [$" + strings.Join(vars, ", $") + "]"
	}
	return [2]string{typed, text}
}

func dashes(name string) string { return strings.Repeat("-", min(2, len(name))) + name }

// table writes rows of two columns.
func table(b *strings.Builder, rows [][2]string) {
	const most = 30 // characters of the first column
	first := 0
	for _, r := range rows {
		if n := utf8.RuneCountInString(r[0]); n <= most {
			first = max(first, n)
		}
	}
	for _, r := range rows {
		n := utf8.RuneCountInString(r[0])
		fmt.Fprintf(b, "  %s", r[0])
		if n > first {
			fmt.Fprintf(b, "\n%s", strings.Repeat(" ", first+4))
		} else {
			b.WriteString(strings.Repeat(" ", first-n+2))
		}
		wrap(b, r[1], first+4, first+4)
	}
}

// wrap writes text, whose first line begins in column at, in lines of helpWidth; the
// others begin in column indent.
func wrap(b *strings.Builder, text string, at, indent int) {
	for i, word := range strings.Fields(text) {
		n := utf8.RuneCountInString(word)
		switch {
		case i == 0:
		case at+1+n > helpWidth:
			fmt.Fprintf(b, "\n%s", strings.Repeat(" ", indent))
			at = indent
		default:
			b.WriteByte(' ')
			at++
		}
		b.WriteString(word)
		at += n
	}
	b.WriteByte('\n')
}

// plainWords has `help`, `help COMMAND` and `version` mean what they say.
func plainWords(args []string) []string {
	switch {
	case len(args) == 2 && args[1] == "help":
		return []string{args[0], "--help"}
	case len(args) == 3 && args[1] == "help":
		return []string{args[0], args[2], "--help"}
	case len(args) == 2 && args[1] == "version":
		return []string{args[0], "--version"}
	}
	return args
}

// unknownCommand says so, with the command that may be meant.
func unknownCommand(app *cli.App, name string) error {
	known := []string{"help", "version"}
	for _, c := range app.Commands {
		if !c.Hidden {
			known = append(known, c.Name)
		}
	}
	if n := nearest(name, known); n != "" {
		return usage("unknown command %q; did you mean %s?", name, n)
	}
	return usage("unknown command %q; see %s help", name, program)
}

var (
	undefinedFlag = regexp.MustCompile(`^flag provided but not defined: -+(\S+)$`)
	invalidValue  = regexp.MustCompile(`(?s)^invalid (?:boolean )?value "(.*)" for (?:flag )?-(\S+): (.*)$`)
	bareNumber    = regexp.MustCompile(`^[0-9.]+$`)
)

// flagError puts the library's words about a flag into the ones of a person.
func flagError(c *cli.Context, err error) error {
	var flags []cli.Flag
	if c != nil && c.Command != nil {
		flags = c.Command.Flags
	}
	if m := undefinedFlag.FindStringSubmatch(err.Error()); m != nil {
		var known []string
		for _, f := range flags {
			known = append(known, f.Names()...)
		}
		if n := nearest(m[1], known); n != "" {
			return usage("unknown flag %s; did you mean %s?", dashes(m[1]), dashes(n))
		}
		where := program + " help"
		if c != nil && c.Command != nil && c.Command.Name != "" {
			where += " " + c.Command.Name
		}
		return usage("unknown flag %s; see %s", dashes(m[1]), where)
	}
	if m := invalidValue.FindStringSubmatch(err.Error()); m != nil {
		value, name, want := m[1], m[2], m[3]
		i := slices.IndexFunc(flags, func(f cli.Flag) bool { return slices.Contains(f.Names(), name) })
		if i >= 0 {
			switch flags[i].(type) {
			case *cli.DurationFlag:
				want = "want a number with a unit, such as 5s, 2m or 500ms"
				if bareNumber.MatchString(value) {
					want = fmt.Sprintf("want a unit too, such as %ss", value)
				}
			case *cli.IntFlag, *cli.Int64Flag, *cli.UintFlag:
				want = "want a whole number"
			case *cli.BoolFlag:
				want = "want true, false, or no value"
			}
		}
		return usage("%s %q: %s", dashes(name), value, want)
	}
	var u usageError
	if errors.As(err, &u) {
		return err
	}
	return usageError{err}
}
