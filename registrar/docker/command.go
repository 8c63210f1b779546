package docker

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/client"

	"rollcall/registrar/health"
)

// notRun are the exit codes of a command that was not run: 126 and 127, as POSIX has
// them, of one that cannot be executed or is not there, and 128 where the Engine has
// no better one, when the container may have no more processes, say. 137 is SIGKILL's,
// which nobody here sends: the kernel's when memory runs out.
var notRun = map[int]string{126: "cannot be executed", 127: "not found", 128: "not started", 137: "killed"}

func unknown(what string, err error) error {
	return fmt.Errorf("%w: %s: %w", health.ErrUnknown, what, err)
}

// command returns a check that runs argv in the container. That the Engine does not
// run it, or does not say what became of it, tells nothing of the app: whether the
// container runs at all is its worker's business.
func (a *Agent) command(id string, argv []string) health.Check {
	stuck := "" // a command that has not ended in time; the Engine cannot kill it
	return func(ctx context.Context) error {
		if stuck != "" {
			r, err := a.engine.ExecInspect(ctx, stuck, client.ExecInspectOptions{})
			switch {
			case errdefs.IsNotFound(err):
			case err != nil:
				return unknown("ask the engine for the last command", err)
			case r.Running:
				return fmt.Errorf("process %d has not ended", r.PID)
			}
			stuck = ""
		}
		e, err := a.engine.ExecCreate(ctx, id, client.ExecCreateOptions{Cmd: argv, AttachStdout: true, AttachStderr: true})
		if err != nil {
			return unknown("have the engine make a command", err)
		}
		stuck = e.ID // whether or not the Engine says in time that it has started it
		out, err := a.engine.ExecAttach(ctx, e.ID, client.ExecAttachOptions{})
		if err != nil {
			return unknown("have the engine start a command", err)
		}
		stop := context.AfterFunc(ctx, out.Close)
		_, err = io.Copy(io.Discard, out.Reader)
		if stop() {
			out.Close()
		}
		if ctx.Err() != nil {
			return ctx.Err() // it runs for too long
		}
		if err != nil {
			return unknown("read a command's output", err)
		}
		poll := time.NewTicker(exitPoll)
		defer poll.Stop()
		for {
			r, err := a.engine.ExecInspect(ctx, e.ID, client.ExecInspectOptions{})
			switch {
			case err != nil:
				return unknown("ask the engine for the command's exit code", err)
			case r.Running:
			case notRun[r.ExitCode] != "":
				stuck = ""
				return unknown("run a command in the container", fmt.Errorf("exit status %d: %s", r.ExitCode, notRun[r.ExitCode]))
			case r.ExitCode != 0:
				stuck = ""
				return fmt.Errorf("exit status %d", r.ExitCode)
			default:
				stuck = ""
				return nil
			}
			select {
			case <-ctx.Done():
				return ctx.Err() // its output has ended, and it has not
			case <-poll.C:
			}
		}
	}
}
