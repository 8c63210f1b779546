//go:build unix && !linux && !sidecar

package main

import "syscall"

// demoProcess keeps a process out of the terminal's group, so that Ctrl-C
// reaches the demo alone.
func demoProcess() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }
