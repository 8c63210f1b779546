//go:build !sidecar

package main

import (
	"strconv"
	"syscall"
)

// fewDescriptors is a limit that leaves --http and serve next to nothing beside the work.
const fewDescriptors = 256

// host judges what a daemon that is started as doctor was would get of this machine.
func (d *doctor) host() {
	const check = "host descriptors"
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		d.unknown(check, err, "ulimit -n")
		return
	}
	// Go has raised the soft limit to the hard one, as in every daemon.
	d.add(check, worst(false, limit.Cur < fewDescriptors), "few clients of --http and of serve are served at a time, and a check or a connection to Redis may have to wait",
		"LimitNOFILE=65536 in the unit, or ulimit -n", "%s for each process", strconv.FormatUint(limit.Cur, 10))
}
