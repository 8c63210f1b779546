package reaper

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
)

var errCanary = errors.New("refused")

// A failed canary takes back what was credited since the last that sang, over
// every segment, and nothing counts until the next one sings.
func TestProofCanary(t *testing.T) {
	w := newWorld(t)
	w.pulse(nil)
	w.p.canary(nil)
	w.run(testTTL + testBeat)
	w.p.canary(nil) // sang at TTL + B
	w.run(time.Second)
	w.fail(time.Second) // ends the segment after that
	w.run(2 * time.Second)
	w.wantArmed(true)
	if f := w.p.canary(errCanary); f.cause != causeCanary || f.hard || f.err != errCanary {
		t.Errorf("got %+v, want a soft fault", f)
	}
	w.wantArmed(false)
	want := []segment{{epochMS, epochMS + (testTTL + testBeat).Milliseconds()}}
	if !slices.Equal(w.p.segments, want) {
		t.Errorf("segments %v, want %v", w.p.segments, want)
	}
	w.run(time.Hour) // pulses alone earn nothing
	w.wantArmed(false)
	if !slices.Equal(w.p.segments, want) {
		t.Errorf("segments %v, want %v", w.p.segments, want)
	}
	w.p.canary(nil)
	w.wantArmed(true) // by the credit from before
	w.wantCutoff(time.Hour + 4*time.Second + testTTL)
	w.pulse(nil)
	w.run(testBeat + time.Second) // 1 s of credit
	w.wantCutoff(time.Hour + testBeat + 5*time.Second + testTTL - time.Second)
}

// The first canary of all fails: the pulses before it count for nothing.
func TestProofFirstCanary(t *testing.T) {
	w := newWorld(t)
	w.run(testTTL + testBeat + time.Second)
	w.wantArmed(true)
	w.p.canary(errCanary)
	w.p.canary(nil)
	w.wantArmed(false)
}

// After other data, the time at which a canary sang in the old data says
// nothing.
func TestProofCanaryAfterOtherData(t *testing.T) {
	w := newWorld(t)
	w.run(time.Minute)
	w.p.canary(nil)
	w.epoch = "e2"
	w.skew = -time.Hour // so it lies ahead of all that follows
	w.run(testTTL + testBeat + 2*time.Second)
	w.wantArmed(true)
	w.p.canary(errCanary)
	w.p.canary(nil)
	w.wantArmed(false)
}

func TestCanaryPace(t *testing.T) {
	g := newRegistry(t)
	r := newReaper(t, Config{}, g.store, zerolog.Nop())
	sing(t, r, g.srv, "")
	connections := func() int64 {
		n, err := g.rdb.InfoMap(t.Context(), "stats").Result()
		if err != nil {
			t.Fatal(err)
		}
		var total int64
		if _, err := fmt.Sscan(n["Stats"]["total_connections_received"], &total); err != nil {
			t.Fatal(err)
		}
		return total
	}
	mustPulse(t, r) // and the reaper's own connection
	before := connections()
	for range 2 * canaryEvery {
		mustPulse(t, r)
	}
	if n := connections() - before; n != 2 {
		t.Errorf("%d new connections in %d pulses, want 2", n, 2*canaryEvery)
	}
	// It is nobody's service, and an arrival once only.
	if names, garbage, err := g.store.Services(t.Context()); err != nil || len(names)+len(garbage) > 0 {
		t.Errorf("services %q %q, %v", names, garbage, err)
	}
	if v, err := g.store.Versions(t.Context(), nil); err != nil || v.Global != 1 {
		t.Errorf("global version %d, %v, want 1", v.Global, err)
	}
	if report := mustSweep(t, r); report.Members != 0 {
		t.Errorf("swept: %+v", report)
	}
}

// What keeps instances from beating and spares the pulse disarms the reaper;
// nobody goes, and when it is over, the reaper is armed by its credit.
func TestCanarySeesWhatAPulseDoesNot(t *testing.T) {
	tests := []struct {
		name, cause string
		begin, end  []any
	}{
		{"no connection left", "beat _canary", []any{"CONFIG", "SET", "maxclients", 1}, []any{"CONFIG", "SET", "maxclients", 1000}},
		{"another password", "WRONGPASS", []any{"ACL", "SETUSER", "web", "resetpass", ">other"}, []any{"ACL", "SETUSER", "web", ">pw"}},
		{"no right to the key", "NOPERM", []any{"ACL", "SETUSER", "web", "resetkeys", "~rollcall:version"}, []any{"ACL", "SETUSER", "web", "allkeys"}},
		{"no right to the script", "NOPERM", []any{"ACL", "SETUSER", "web", "-eval", "-evalsha"}, []any{"ACL", "SETUSER", "web", "+eval", "+evalsha"}},
		{"no right to a command in it", "can't run this command", []any{"ACL", "SETUSER", "web", "-zadd"}, []any{"ACL", "SETUSER", "web", "+zadd"}},
		{"user switched off", "WRONGPASS", []any{"ACL", "SETUSER", "web", "off"}, []any{"ACL", "SETUSER", "web", "on"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := newRegistry(t)
			ctx := t.Context()
			if err := g.rdb.Do(ctx, "ACL", "SETUSER", "web", "on", ">pw", "allkeys", "allchannels", "+@all").Err(); err != nil {
				t.Fatal(err)
			}
			log := &logBuffer{}
			r := newReaper(t, Config{}, g.store, zerolog.New(log))
			sing(t, r, g.srv, "web:pw@")
			arm(t, r)
			r.proof.sang = r.proof.now - time.Second.Milliseconds()
			g.put(t, "web", "10.0.0.1:80", 1)
			if err := g.rdb.Do(ctx, tt.begin...).Err(); err != nil {
				t.Fatal(err)
			}
			var err error
			for range canaryEvery {
				err = r.Pulse(ctx)
			}
			if err == nil || !strings.Contains(err.Error(), tt.cause) || strings.Contains(err.Error(), "pw") {
				t.Errorf("got %v, want %s", err, tt.cause)
			}
			for range 2 { // it is sent with every pulse now
				if err := r.Pulse(ctx); err == nil {
					t.Error("the canary sang again")
				}
			}
			if s := r.Status(); s.Armed || s.Cause != causeCanary || r.proof.resets != 0 {
				t.Errorf("got %+v, %d resets, want a soft fault", s, r.proof.resets)
			}
			if report := mustSweep(t, r); report.Armed || len(report.Removed) > 0 {
				t.Errorf("got %+v", report)
			}
			if lines := log.lines("not armed"); len(lines) != 1 || !strings.Contains(lines[0], tt.cause) {
				t.Errorf("in the log: %q, want one line with %s", lines, tt.cause)
			}
			if err := g.rdb.Do(ctx, tt.end...).Err(); err != nil {
				t.Fatal(err)
			}
			mustPulse(t, r)
			mustPulse(t, r) // whose note says armed
			if report := mustSweep(t, r); !report.Armed || fmt.Sprint(report.Removed) != "[{web [10.0.0.1:80]}]" {
				t.Errorf("afterwards: %+v", report)
			}
		})
	}
}
