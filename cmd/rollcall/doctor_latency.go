//go:build !sidecar

package main

import (
	"context"
	"time"

	"rollcall/registrar"
)

// farthest is the longest round trip to Redis with which all works by the defaults: a
// new connection and its first script take five of them, TLS and log-in included, and
// every exchange and every pulse of a reaper at a TTL of 15 s has a second.
const farthest = registrar.Timeout / 5

// latency judges how far away Redis is, by the fastest of three calls: others may have
// waited for this machine.
func (d *doctor) latency(ctx context.Context) {
	trip := registrar.TryFor
	for range 3 {
		tctx, cancel := registrar.WithTimeout(ctx)
		begun := time.Now()
		err := d.store.Ping(tctx)
		cancel()
		if err != nil {
			d.unknown("redis latency", err, "try again")
			return
		}
		trip = min(trip, time.Since(begun))
	}
	d.add("redis latency", worst(trip > farthest, trip > farthest/2), "a new connection and its first script take five round trips, and have 1s; reapers are not armed, and commands fail",
		"a Redis nearer by: one for each site", "a round trip takes %v; at most %v works", trip.Round(100*time.Microsecond), farthest)
}
