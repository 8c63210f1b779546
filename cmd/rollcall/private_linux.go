package main

import "golang.org/x/sys/unix"

// keepPrivate keeps processes of the same user from reading this one's environment and
// memory, and with them its passwords: the app that it is around is such a process.
// There is no core dump either, and a debugger needs root.
func keepPrivate() error { return unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) }
