package lbsync

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"rollcall/notifier"
	"rollcall/registrar"
)

// counted is a log that counts what it is told, by level.
type counted struct {
	mu     sync.Mutex // guards all below while a backend runs
	bytes  map[string]int
	lines  map[string]int
	said   map[string]int // what one line said, by level and kind
	summed map[string]int
	sums   int
	wrong  []string
}

func (c *counted) Write(p []byte) (int, error) {
	var l struct {
		Level, Message, State string
		Counts                map[string]int
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := json.Unmarshal(p, &l); err != nil {
		c.wrong = append(c.wrong, err.Error())
	}
	c.bytes[l.Level] += len(p)
	c.lines[l.Level]++
	switch {
	case l.Counts != nil:
		c.sums++
		for kind, n := range l.Counts {
			c.summed[kind] += n
		}
	case l.Message == "changed":
		c.said[l.Level+" "+l.State]++
	case l.Message == "gone":
		c.said[l.Level+" gone"]++
	}
	return len(p), nil
}

// driven runs a backend of 400 slots, and play beside it, until ctx ends.
func driven(ctx context.Context, full time.Duration, log io.Writer, play func(join, leave func(n int))) {
	st := State{Process: Process{PID: 1, Version: "3.0.11"}}
	for i := range 400 {
		st.Servers = append(st.Servers, Server{Name: fmt.Sprint("s", i+1), ID: i + 1, Slot: true, Admin: Maint, Addr: Placeholder})
	}
	sent := 0
	bal := &DryRun{Balancer: standing{st, &sent}, Out: io.Discard, Render: func(_ string, o Op) (string, error) { return o.Name, nil }}
	b := newBackend(Config{Allow: DefaultAllow(), Full: full, DrainTimeout: time.Minute, Quarantine: DefaultQuarantine},
		BackendConfig{Service: "web", Backend: "be", Mode: Slots}, bal, func(registrar.Service) {}, func() {}, func() {}, newClaims(), zerolog.New(log))
	var running sync.WaitGroup
	running.Go(func() { b.run(ctx) })
	version := int64(0)
	change := func(full bool, entries ...registrar.Entry) {
		version++
		b.change(notifier.Change{Heard: time.Now(), Snapshot: registrar.Snapshot{Service: "web", Full: full, Now: time.Now().UnixMilli(), TTL: 3 * time.Second, Interval: time.Second,
			Token: registrar.Token{ReplID: "r", Epoch: "e", Version: version}, Entries: entries}})
	}
	addr := func(n int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(n / 250 % 20), byte(n%250 + 1)}), 80)
	}
	change(true)
	play(func(n int) {
		a := addr(n)
		change(false, registrar.Entry{Addr: a, Present: true, Instance: registrar.Instance{Addr: a, Beat: time.Now().UnixMilli(), Meta: registrar.Meta{Weight: 100}}})
	}, func(n int) {
		change(false, registrar.Entry{Addr: addr(n), Gone: &registrar.Gone{Reason: registrar.Left, At: time.Now().UnixMilli(), Token: "t"}})
	})
	running.Wait()
}

func newCounted() *counted {
	return &counted{bytes: map[string]int{}, lines: map[string]int{}, said: map[string]int{}, summed: map[string]int{}}
}

// TestSumOfABurst has a burst of changes, and then nothing that would wake the backend:
// the sum comes when its minute is over.
func TestSumOfABurst(t *testing.T) {
	c := newCounted()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		driven(ctx, time.Hour, c, func(join, _ func(int)) {
			for n := range 100 {
				join(n)
				time.Sleep(time.Second / 20) // of the simulated clock
			}
			synctest.Wait()
			c.mu.Lock()
			if c.sums > 0 {
				t.Errorf("%d sums at once", c.sums)
			}
			c.mu.Unlock()
			time.Sleep(time.Minute)
			synctest.Wait()
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.sums != 1 || c.said["info ready"]+c.summed["ready"] != 100 {
				t.Errorf("%d sums after a minute; said %v, summed %v", c.sums, c.said, c.summed)
			}
		})
	})
}

// TestHourOfChanges has instances come and go by a simulated clock, for an hour and, where
// they are many, for a sixth of one. Each
// change of a few is said, many are said in sums once a minute, and singles and sums
// together are what happened. Debug has every one.
func TestHourOfChanges(t *testing.T) {
	for _, tt := range []struct {
		name         string
		every, span  time.Duration
		singles      bool // all are said singly
		lines, bytes int  // at most, at info, in an hour
	}{
		{"a person's pace", 4 * time.Second, time.Hour / 3, true, 3600, 1 << 20},
		{"14 a second", time.Second / 14, time.Hour / 6, false, 6 * (60 + 15), 200 << 10},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newCounted()
			changes := 0
			const living = 50 // the first of them leave when there are so many
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), tt.span)
				defer cancel()
				tick := time.NewTicker(tt.every)
				defer tick.Stop()
				driven(ctx, DefaultFull, c, func(join, leave func(n int)) {
					for n := 0; ctx.Err() == nil; n++ {
						select {
						case <-ctx.Done():
						case <-tick.C:
							join(n)
							if n >= living {
								leave(n - living)
							}
							changes++
						}
					}
				})
			})
			t.Logf("%d joins, %d lines and %.3f MB at info, %d and %.3f MB at debug, %d sums, summed %v, said %v",
				changes, c.lines["info"], float64(c.bytes["info"])/(1<<20), c.lines["debug"], float64(c.bytes["debug"])/(1<<20), c.sums, c.summed, c.said)
			if len(c.wrong) > 0 || c.lines["warn"]+c.lines["error"] > 0 {
				t.Errorf("%v, %v", c.wrong, c.lines)
			}
			hours := int(time.Hour / tt.span)
			if lines, bytes := hours*c.lines["info"], hours*c.bytes["info"]; lines > tt.lines || bytes > tt.bytes {
				t.Errorf("%d lines and %d bytes at info in an hour, want %d and %d at most", lines, bytes, tt.lines, tt.bytes)
			}
			if tt.singles != (c.sums == 0) {
				t.Errorf("%d sums", c.sums)
			}
			for _, kind := range []string{"ready", "drain", "gone"} {
				all := c.said["info "+kind] + c.said["debug "+kind]
				if all < (changes-living)*9/10 && kind != "drain" {
					t.Errorf("%s: %d lines for %d joins", kind, all, changes)
				}
				if got := c.said["info "+kind] + c.summed[kind]; got != all {
					t.Errorf("%s: %d said singly and %d in sums, of %d", kind, c.said["info "+kind], c.summed[kind], all)
				}
			}
		})
	}
}
