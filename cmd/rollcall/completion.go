//go:build !sidecar

package main

import (
	"fmt"

	"github.com/urfave/cli/v2"
)

// Both ask the program itself, so they know what it knows. The word under the
// cursor goes along, as it is.
const (
	bashCompletion = `_rollcall() {
  local IFS=$'\n' word=${COMP_WORDS[COMP_CWORD]}
  COMPREPLY=($(compgen -W "$("${COMP_WORDS[@]:0:COMP_CWORD+1}" %[1]s 2>/dev/null)" -- "$word"))
}
complete -o default -F _rollcall rollcall
`
	zshCompletion = `#compdef rollcall
_rollcall() {
  local -a found
  found=("${(@f)$("${(@)words[1,CURRENT]}" %[1]s 2>/dev/null)}")
  compadd -- $found || _files
}
compdef _rollcall rollcall
`
)

func completionCommand() *cli.Command {
	return &cli.Command{
		Name: "completion", Usage: "print what makes a shell complete commands and flags", ArgsUsage: "bash|zsh|fish",
		Action: func(c *cli.Context) error {
			a, err := args(c, "bash|zsh|fish", 1)
			if err != nil {
				return err
			}
			script := ""
			switch a[0] {
			case "bash":
				script = fmt.Sprintf(bashCompletion, complete)
			case "zsh":
				script = fmt.Sprintf(zshCompletion, complete)
			case "fish":
				if script, err = c.App.ToFishCompletion(); err != nil {
					return err
				}
			default:
				return usage("completion %q: want bash, zsh or fish", a[0])
			}
			_, err = fmt.Fprint(c.App.Writer, script)
			return err
		},
	}
}
