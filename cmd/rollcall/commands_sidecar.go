//go:build sidecar

package main

import "github.com/urfave/cli/v2"

const program = "rollcall-sidecar"

// commands are those of the program that goes beside every container. It is the
// same code without what speaks to HAProxy and to Docker, whose packages take
// memory as soon as they are linked (scripts/bench footprint).
func commands() []*cli.Command { return []*cli.Command{registerCommand()} }
