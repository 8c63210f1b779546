//go:build !sidecar

package main

import (
	"os"
	"os/user"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/urfave/cli/v2"

	"rollcall/registrar"
)

func asFlag() cli.Flag {
	return &cli.StringFlag{Name: "as", EnvVars: env("as"), DefaultText: "user@host", Usage: "`NAME` of who says it, at most 255 bytes; it is kept and shown, and nobody checks it"}
}

// who returns who says what the command line says.
func who(c *cli.Context) (string, error) {
	name := c.String("as")
	switch {
	case name == "":
		name = userAtHost()
		if !isName(name) {
			return "", nil
		}
	case len(name) > registrar.MaxText:
		return "", usage("--as of %d bytes: want at most %d", len(name), registrar.MaxText)
	case !isName(name):
		return "", usage("--as %q: want UTF-8 without control characters", name)
	}
	return name, nil
}

func isName(s string) bool {
	return len(s) <= registrar.MaxText && utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl)
}

// userAtHost is as much of it as is known.
func userAtHost() string {
	name, host := "", ""
	if u, err := user.Current(); err == nil { // in a container a user need not have a name
		name = u.Username
	}
	if h, err := os.Hostname(); err == nil && h != "" {
		host = "@" + h
	}
	return name + host
}
