package registrar

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"rollcall/registrar/redistest"
)

func TestReport(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	ctx := t.Context()
	now := s.rdb.Time(ctx).Val().UnixMilli()
	said := ReaperStatus{Cause: "pulse failed", Error: "OOM", Since: 5, Until: 6, Held: []Hold{{Service: web, Suspects: 3, Members: 4, Since: 7, Until: 8}}}
	s.setClock(now)
	must(t, s.Report(ctx, "r1", &said))
	want := fmt.Sprintf(`{"at":%d,"armed":false,"cause":"pulse failed","error":"OOM","since":5,"until":6,"held":[{"service":"web","suspects":3,"members":4,"since":7,"until":8}]}`, now)
	if got := do(t, s, "HGET", s.keys.Reapers(), "r1"); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	s.setClock(now - 11_000)
	must(t, s.Report(ctx, "r2", &ReaperStatus{Armed: true}))
	s.setClock(now - 13_000)
	must(t, s.Report(ctx, "r3", &ReaperStatus{Armed: true}))
	_, err := s.Config(ctx, 30*time.Second, 6*time.Second, false)
	must(t, err)
	do(t, s, "SET", s.keys.Version(), 7)
	do(t, s, "SET", s.keys.Epoch(), "e")
	do(t, s, "ZADD", s.keys.Balancers(), now, "lb1", now-13_000, "lb2", "+inf", "lb3")
	do(t, s, "HSET", s.keys.Reapers(), "bad", `{"at":"x"}`, "worse", "", "huge", `{"at":9000000000000000000}`)
	o, err := s.Overview(ctx)
	must(t, err)
	var got []string
	for _, r := range o.Reapers {
		got = append(got, fmt.Sprintf("%s live %v armed %v garbage %v", r.ID, r.Live, r.Armed, r.Garbage))
	}
	for _, b := range o.Balancers {
		got = append(got, fmt.Sprintf("%s live %v", b.ID, b.Live))
	}
	got = append(got, fmt.Sprintf("%v %v %s %d", o.TTL, o.Interval, o.Epoch, o.Version))
	if want := []string{
		"bad live false armed false garbage true", "huge live false armed false garbage true",
		"r1 live true armed false garbage false", "r2 live true armed true garbage false", "r3 live false armed true garbage false",
		"worse live false armed false garbage true", "lb1 live true", "lb2 live false", "lb3 live false", "30s 6s e 7",
	}; !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if r := o.Reapers[2]; r.Seen != now || fmt.Sprint(r.ReaperStatus) != fmt.Sprint(said) {
		t.Errorf("got %+v, want %+v at %d", r, said, now)
	}

	// One that was silent for 10 min is forgotten, and what says no time.
	s.setClock(now + reaperForget.Milliseconds())
	must(t, s.Report(ctx, "r2", nil))
	if got := s.rdb.HKeys(ctx, s.keys.Reapers()).Val(); len(got) != 2 || !slices.Contains(got, "r1") || !slices.Contains(got, "huge") {
		t.Errorf("left: %q, want r1, to the millisecond, and who will say so in the far future", got)
	}
	s.setClock(now + reaperForget.Milliseconds() + 1)
	must(t, s.Report(ctx, "r4", &ReaperStatus{}))
	if got := s.rdb.HExists(ctx, s.keys.Reapers(), "r1").Val(); got {
		t.Error("r1 is not forgotten")
	}
}

func TestReportRefused(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	ctx := t.Context()
	do(t, s, "CONFIG", "SET", "maxmemory", "1")
	if err := s.Report(ctx, "r1", &ReaperStatus{Cause: "OOM"}); err != nil {
		t.Errorf("out of memory: %v", err)
	}
	do(t, s, "CONFIG", "SET", "maxmemory", "0")
	do(t, s, "DEL", s.keys.Reapers())
	do(t, s, "SET", s.keys.Reapers(), "x")
	if err := s.Report(ctx, "r1", &ReaperStatus{}); err == nil {
		t.Error("wrote over another type")
	}
	if o, err := s.Overview(ctx); err == nil {
		t.Errorf("another type reads as %+v", o)
	}
}

// TestOverviewOfNothing reads an empty registry: defaults, and nobody.
func TestOverviewOfNothing(t *testing.T) {
	srv := redistest.Start(t)
	s := fresh(t, srv)
	o, err := s.Overview(t.Context())
	if err != nil || o.TTL != DefaultTTL || o.Interval != DefaultInterval || o.Epoch != "" || o.Version != 0 || len(o.Reapers)+len(o.Balancers) > 0 {
		t.Errorf("got %+v, %v", o, err)
	}
	for key, value := range map[string]string{s.keys.Config(): "ttl_ms", s.keys.Version(): ""} {
		if value == "" {
			do(t, s, "SET", key, "x")
		} else {
			do(t, s, "HSET", key, value, "x")
		}
	}
	if o, err := s.Overview(t.Context()); err != nil || o.TTL != DefaultTTL || o.Version != NoVersion {
		t.Errorf("what is no number was read as %v and %d, %v", o.TTL, o.Version, err)
	}
	srv.Kill(t)
	if o, err := s.Overview(t.Context()); err == nil {
		t.Errorf("no Redis reads as %+v", o)
	}
}
