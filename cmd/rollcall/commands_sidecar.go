//go:build sidecar

package main

import (
	"context"
	"io"

	"github.com/urfave/cli/v2"
)

const program = "rollcall-sidecar"

// commands are those of the program that goes beside every container. It is the
// same code without what speaks to HAProxy and to Docker, whose packages take
// memory as soon as they are linked (scripts/bench footprint).
func commands() []*cli.Command { return []*cli.Command{registerCommand()} }

// completing finds nothing: no shell asks this program, which people do not type.
func completing(context.Context, []string, io.Writer) {}
