//go:build !sidecar

package main

import "github.com/urfave/cli/v2"

const program = "rollcall"

func commands() []*cli.Command {
	return []*cli.Command{
		registerCommand(), dockerCommand(), deregisterCommand(), reapCommand(), lbsyncCommand(),
		servicesCommand(), instancesCommand(), overridesCommand(), watchCommand(), lbCommand(), waitCommand(), statusCommand(), explainCommand(), eventsCommand(), doctorCommand(), serveCommand(),
		adminCommand("drain", "send no new requests to an instance, until ready"),
		adminCommand("maint", "send no requests at all to an instance, until ready"),
		adminCommand("ready", "end drain or maint"),
		adminCommand("weight", "set an instance's weight, 0 to 256, or `own` for the instance's own again"),
		demoCommand(), demoServiceCommand(), completionCommand(), manCommand(),
	}
}
