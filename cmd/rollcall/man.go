//go:build !sidecar

package main

import (
	"bufio"
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"
)

func manCommand() *cli.Command {
	return &cli.Command{
		Name: "man", Usage: "print the manual page: rollcall man | man -l -",
		Action: func(c *cli.Context) error {
			if _, err := args(c, "", 0); err != nil {
				return err
			}
			return manPage(bufio.NewWriter(c.App.Writer), c.App)
		},
	}
}

// manPage writes what the commands say of themselves, for man(7). The library's
// own page knows neither variables nor which flags are common.
func manPage(w *bufio.Writer, app *cli.App) error {
	fmt.Fprintf(w, ".TH ROLLCALL 1 \"\" \"rollcall %s\" \"User Commands\"\n", roff(app.Version))
	fmt.Fprintf(w, ".SH NAME\nrollcall \\- %s\n", roff(app.Usage))
	fmt.Fprint(w, ".SH SYNOPSIS\n.B rollcall\n.I COMMAND\n[\\fIFLAG\\fR...] [\\fIARGUMENT\\fR...]\n")
	fmt.Fprint(w, ".SH DESCRIPTION\nFlags go before environment variables, and these before defaults.\n"+
		"Data goes to standard output, messages to standard error.\n"+
		"Secrets come from the environment, or from a file that it names, never from a flag.\n")
	fmt.Fprint(w, ".SH COMMANDS\n")
	for _, c := range app.Commands {
		if c.Hidden {
			continue
		}
		fmt.Fprintf(w, ".SS %q\n%s.\n", roff(strings.TrimSpace(c.Name+" "+c.ArgsUsage)), sentence(c.Usage))
		var shared []string
		for _, f := range c.Flags {
			if isCommon(f) {
				shared = append(shared, dashes(f.Names()[0]))
			} else {
				manFlag(w, f)
			}
		}
		for i, e := range examples[c.Name] {
			if i == 0 {
				fmt.Fprint(w, ".PP\nFor example:\n.nf\n")
			}
			fmt.Fprintf(w, "  %s\n", roff(e))
			if i == len(examples[c.Name])-1 {
				fmt.Fprint(w, ".fi\n")
			}
		}
		if len(shared) > 0 {
			fmt.Fprintf(w, ".PP\nAlso: %s.\n", roff(strings.Join(shared, ", ")))
		}
	}
	fmt.Fprint(w, ".SH COMMON FLAGS\n")
	for _, f := range commonFlags() {
		manFlag(w, f)
	}
	fmt.Fprint(w, ".SH EXIT STATUS\n0 done, 1 failed, 2 wrong usage, 3 \\-\\-dry\\-run found something to do, 4 a wait timed out. "+
		"\\fBregister\\fR around a command: the command's own.\n")
	return w.Flush()
}

func manFlag(w *bufio.Writer, f cli.Flag) {
	doc := f.(cli.DocGenerationFlag) // every kind of flag is one
	var names []string
	for _, n := range f.Names() {
		names = append(names, roff(dashes(n)))
	}
	before, value, after, text := "", "VALUE", "", doc.GetUsage()
	if b, rest, ok := strings.Cut(text, "`"); ok {
		if v, a, ok := strings.Cut(rest, "`"); ok {
			before, value, after = b, v, a
			text = before + value + after
		}
	}
	fmt.Fprintf(w, ".TP\n\\fB%s\\fR", strings.Join(names, ", "))
	if doc.TakesValue() {
		fmt.Fprintf(w, " \\fI%s\\fR", roff(value))
	}
	fmt.Fprintf(w, "\n%s.", sentence(text))
	if d := doc.GetDefaultText(); d != "" && doc.TakesValue() {
		fmt.Fprintf(w, " Default: %s.", roff(d))
	}
	if vars := doc.GetEnvVars(); len(vars) > 0 {
		fmt.Fprintf(w, " Variable: %s.", roff(strings.Join(vars, ", ")))
	}
	fmt.Fprintln(w)
}

// sentence begins a usage with a capital letter, unless it begins with a name in
// capitals or a number.
func sentence(s string) string { return roff(strings.ToUpper(s[:1]) + s[1:]) }

// roff escapes s, which is on one line, for the text of a page; see groff_char(7).
func roff(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`, `"`, `\(dq`, "`", "", "→", `\(->`, "…", "...", "’", `\(cq`).Replace(s)
	if strings.HasPrefix(s, ".") || strings.HasPrefix(s, "'") {
		s = `\&` + s
	}
	return s
}
