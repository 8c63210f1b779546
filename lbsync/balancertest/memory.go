package balancertest

import (
	"runtime/debug"
	"runtime/metrics"
	"sync/atomic"
	"testing"
	"time"
)

// Memory watches how much memory this process has, without the race detector's, until
// the test ends. grown returns by how many bytes it has been more than now, at most; any
// goroutine may call it.
func Memory(tb testing.TB) (grown func() int64) {
	tb.Helper()
	samples := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	now := func() int64 {
		metrics.Read(samples)
		return int64(samples[0].Value.Uint64() - samples[1].Value.Uint64())
	}
	debug.FreeOSMemory() // what earlier tests left would hide the growth
	before, most := now(), atomic.Int64{}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			most.Store(max(most.Load(), now()-before))
			select {
			case <-tick.C:
			case <-stop:
				return
			}
		}
	}()
	tb.Cleanup(func() { close(stop); <-stopped })
	return most.Load
}
