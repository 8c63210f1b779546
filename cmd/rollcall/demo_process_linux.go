//go:build !sidecar

package main

import "syscall"

// demoProcess keeps a process out of the terminal's group, so that Ctrl-C
// reaches the demo alone, and has the kernel end it if the demo is killed.
func demoProcess() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
