//go:build !sidecar

package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"rollcall/registrar"
)

const (
	// flapWindow is how far back the log is read for who comes and goes, and flapEvents
	// how many of its last entries at most.
	flapWindow = 10 * time.Minute
	flapEvents = 2000
	// flapJoins within flapWindow are more than a deployment makes: one that is damped
	// makes about ten.
	flapJoins = 5
)

// flaps finds instances that come and go, in the log of changes. A user who may not
// read it, or a log that is none, is no finding of its own.
func (d *doctor) flaps(ctx context.Context, svcs []registrar.Service) {
	if len(svcs) == 0 {
		return
	}
	tctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	now, _, err := d.store.Of(svcs[0]).Clock(tctx)
	if err != nil {
		return
	}
	events, err := d.store.Events(tctx, nil, registrar.EventsAt(now-flapWindow.Milliseconds()), flapEvents)
	if err != nil {
		return
	}
	joins := map[string]int{}
	var many []string
	for _, e := range events {
		if at := string(e.Service) + " " + e.Addr; e.What == registrar.EventJoined {
			if joins[at]++; joins[at] == flapJoins {
				many = append(many, at)
			}
		}
	}
	slices.Sort(many)
	for i, at := range many {
		many[i] = fmt.Sprintf("%s (%d times)", at, joins[at])
	}
	if len(many) == 0 {
		d.add("registry flapping", stateOK, "", "", "nobody joined %d times within %v", flapJoins, flapWindow)
		return
	}
	d.add("registry flapping", stateWarn, "each return is a change for every reader and two entries of the log, and requests fail on who is going",
		"see in `rollcall events` why it goes: unhealthy is a check, which may be too strict; left or expired an app that crashes", "joined within %v: %s", flapWindow, few(many))
}
