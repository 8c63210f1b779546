package docker

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/moby/moby/client"

	"rollcall/registrar"
)

const (
	// pingEvery is how often the Engine is asked for a sign of life. A stream of events
	// says nothing of an Engine that hangs, and the next list may be resync away.
	pingEvery = 2 * time.Second
	// pingTimeout bounds one, and pingMisses in a row mean that the Engine does not
	// answer: it is noticed after pingEvery + pingMisses * pingTimeout = 6 s at most.
	pingTimeout = 2 * time.Second
	pingMisses  = 2
)

// watch tells lost, which has room for one, when the Engine has ceased to answer,
// until ctx ends. While it is known to be away nobody is asked: Run tries to list.
func (a *Agent) watch(ctx context.Context, lost chan<- error) {
	wait := time.NewTimer(registrar.Shorten(pingEvery))
	defer wait.Stop()
	for misses := 0; ; {
		select {
		case <-ctx.Done():
			return
		case <-wait.C:
		}
		wait.Reset(registrar.Shorten(pingEvery))
		err := a.ping(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			misses = 0
		case misses+1 < pingMisses:
			misses++
			wait.Reset(0)
		default:
			misses = 0
			select {
			case lost <- err:
			default:
			}
		}
	}
}

// ping returns why the Engine gives no sign of life; nil if it does, or is known to be
// away. A refusal is a sign.
func (a *Agent) ping(ctx context.Context) error {
	a.mu.Lock()
	away := a.away != nil
	a.mu.Unlock()
	if away {
		return nil
	}
	tctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	_, err := a.engine.Ping(tctx, client.PingOptions{})
	if errors.Is(err, context.DeadlineExceeded) || client.IsErrConnectionFailed(err) {
		return fmt.Errorf("ping: %w", err)
	}
	return nil
}
