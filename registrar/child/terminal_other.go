//go:build unix && !linux

package child

import (
	"os"
	"syscall"
)

// Terminal is a terminal that the app can be given; here there is none.
type Terminal struct{}

// ControllingTerminal returns nil: no terminal.
func ControllingTerminal(*os.File) *Terminal { return nil }

// Foreground is false.
func (*Terminal) Foreground() bool { return false }

// StartOn is Start.
func (r *Reaper) StartOn(_ *Terminal, argv, env []string, files [3]*os.File) (*Process, error) {
	return r.Start(argv, env, files)
}

// Give gives nothing.
func (*Terminal) Give() bool { return false }

// Take takes nothing.
func (*Terminal) Take() {}

// Suspend stops nothing.
func (*Terminal) Suspend(syscall.Signal) bool { return false }
