package health

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	grpchealth "google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"rollcall/registrar/child"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestState(t *testing.T) {
	for _, c := range []struct{ name, looks, want string }{
		{"the first success is enough", "1", "1"},
		{"misses before it count for nothing", "0001", "0001"},
		{"fall", "1000", "1110"},
		{"one success ends a row of misses", "1001001", "1111111"},
		{"rise", "1000" + "11", "1110" + "01"},
		{"one miss ends a row of successes", "1000" + "10101", "1110" + "00000"},
		{"flapping changes nothing", "1010101", "1111111"},
		{"again", "1000" + "11" + "000", "1110" + "01" + "110"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var s State
			got := ""
			for _, look := range c.looks {
				s = s.After(look == '1', 2, 3)
				got += map[bool]string{true: "1", false: "0"}[s.Healthy]
			}
			if got != c.want {
				t.Errorf("%s: got %s, want %s", c.looks, got, c.want)
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	for _, s := range []string{"", "http://", "ftp://h:1", "tcp://h", "grpc://h/x", "localhost:80", "exec:", "exec: ", "exec:no-such-program", "http:h", "%"} {
		if _, err := Parse(s, nil, nil); err == nil {
			t.Errorf("%q is accepted", s)
		}
	}
}

// look looks once, within a second.
func look(tb testing.TB, url string, children *child.Reaper) error {
	tb.Helper()
	check, err := Parse(url, children, os.Environ())
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(tb.Context(), time.Second)
	defer cancel()
	return check(ctx)
}

func TestHTTP(t *testing.T) {
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/away":
			http.Redirect(w, r, "/503", http.StatusFound)
		case "/503":
			w.WriteHeader(http.StatusServiceUnavailable)
		case "/hung":
			<-r.Context().Done()
		}
	})
	plain, secure := httptest.NewServer(handler), httptest.NewTLSServer(handler)
	secure.Config.ErrorLog = nil
	defer plain.Close()
	defer secure.Close()
	for _, c := range []struct {
		url string
		ok  bool
	}{
		{plain.URL + "/", true},
		{plain.URL + "/away", true},
		{plain.URL + "/503", false},
		{plain.URL + "/hung", false},
		{secure.URL + "/", false}, // its certificate is nobody's
		{strings.Replace(secure.URL, "https", "https+insecure", 1) + "/", true},
		{strings.Replace(secure.URL, "https", "https+insecure", 1) + "/503", false},
	} {
		if err := look(t, c.url, nil); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.url, err)
		}
	}
}

func TestTCP(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	url := "tcp://" + l.Addr().String()
	if err := look(t, url, nil); err != nil {
		t.Error(err)
	}
	l.Close()
	if look(t, url, nil) == nil {
		t.Error("nobody listens")
	}
}

func TestGRPC(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv, h := grpc.NewServer(), grpchealth.NewServer()
	healthpb.RegisterHealthServer(srv, h)
	h.SetServingStatus("down", healthpb.HealthCheckResponse_NOT_SERVING)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	url := "grpc://" + l.Addr().String()
	for path, ok := range map[string]bool{"": true, "/down": false, "/unknown": false} {
		if err := look(t, url+path, nil); (err == nil) != ok {
			t.Errorf("%q: %v", path, err)
		}
	}
	srv.Stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if look(t, url, nil) == nil {
		t.Error("nobody listens")
	}
	hung, err := net.Listen("tcp", "127.0.0.1:0") // accepts and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer hung.Close()
	if err := look(t, "grpc://"+hung.Addr().String(), nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hung: %v", err)
	}
}

func TestExec(t *testing.T) {
	children := child.New()
	defer children.Close()
	script := func(body string) string {
		t.Helper()
		path := filepath.Join(t.TempDir(), "check")
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		return "exec:" + path
	}
	if err := look(t, "exec:test -d /", children); err != nil {
		t.Error(err)
	}
	if err := look(t, script("exit 3"), children); err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("got %v", err)
	}
	if err := look(t, script("kill -9 $$"), children); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("got %v", err)
	}
	// Whom a check leaves behind holds nothing up, and is killed; so is a check
	// that hangs, with all that it started.
	for name, body := range map[string]string{"leaves a child": "", "hangs": "sleep 60"} {
		pidFile := filepath.Join(t.TempDir(), "pid")
		begun := time.Now()
		err := look(t, script("trap '' TERM\nsleep 60 & echo $! >"+pidFile+"\n"+body), children)
		if hangs := body != ""; hangs != errors.Is(err, context.DeadlineExceeded) || time.Since(begun) > 5*time.Second {
			t.Errorf("%s: %v after %v", name, err, time.Since(begun))
		}
		b, err := os.ReadFile(pidFile)
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error {
			stat, err := os.ReadFile("/proc/" + strings.TrimSpace(string(b)) + "/stat")
			if err == nil && !strings.Contains(string(stat), ") Z ") { // its new parent may be slow to collect it
				return errors.New(string(stat))
			}
			return nil
		})
	}
}

func eventually(tb testing.TB, fn func() error) {
	tb.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for begun := time.Now(); ; <-tick.C {
		err := fn()
		if err == nil {
			return
		}
		if time.Since(begun) > 10*time.Second {
			tb.Fatalf("still after 10 s: %v", err)
		}
	}
}

func TestFiles(t *testing.T) {
	ctx := t.Context()
	path := filepath.Join(t.TempDir(), "f")
	touch := func(at time.Time) {
		t.Helper()
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, at, at); err != nil {
			t.Fatal(err)
		}
	}
	want := func(check Check, ok bool, when string) {
		t.Helper()
		if err := check(ctx); (err == nil) != ok {
			t.Errorf("%s: %v", when, err)
		}
	}
	old := time.Now().Add(-time.Hour)

	ready := ReadyFile(path, nil)
	want(ready, false, "no file")
	touch(old)
	want(ready, true, "a file")
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	again := ReadyFile(path, before)
	want(again, false, "a file from before")
	touch(old.Add(time.Second))
	want(again, true, "touched")

	beat := BeatFile(path, 50*time.Millisecond)
	want(beat, false, "never seen touched")
	touch(old.Add(2 * time.Second)) // whatever its clock says
	want(beat, true, "touched")
	want(beat, true, "still fresh")
	eventually(t, func() error {
		if beat(ctx) == nil {
			return errors.New("still fresh")
		}
		return nil
	})
	touch(old.Add(3 * time.Second))
	want(beat, true, "touched again")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	want(beat, false, "removed")
	touch(old)
	want(beat, true, "made anew")
}

// TestRun checks that changes come out, a hung look included, and that Run ends.
func TestRun(t *testing.T) {
	looks := make(chan error) // nil, an error, or errHang
	errHang := errors.New("hang")
	p, err := New(Config{Interval: 10 * time.Millisecond, Timeout: 20 * time.Millisecond, Rise: 1, Fall: 2}, func(ctx context.Context) error {
		var err error
		select {
		case err = <-looks:
		case <-ctx.Done():
			return ctx.Err()
		}
		if err == errHang {
			<-ctx.Done()
			err = fmt.Errorf("wrapped: %w", ctx.Err())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	changes := make(chan Change)
	go p.Run(ctx, changes)
	looks <- nil
	if c := <-changes; !c.Healthy {
		t.Errorf("got %+v", c)
	}
	looks <- errHang
	if c := <-changes; c.Healthy || !strings.Contains(c.Cause.Error(), "no answer within 20ms") {
		t.Errorf("got %+v", c)
	}
	cancel()
	if _, more := <-changes; more {
		t.Error("a change after the end")
	}
}

// TestNotHealthyYet: an app that has never been healthy is told of once, after as many
// misses as Late or Fall, and not when it is healthy in time.
func TestNotHealthyYet(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		late  int
		looks []bool // successes
		want  []bool // of the changes
	}{
		{"never", 0, []bool{false, false, false, false, false, false, false, true}, []bool{false, true}},
		{"in time", 0, []bool{false, false, true}, []bool{true}},
		{"later said", 5, []bool{false, false, false, false, true}, []bool{true}},
		{"and then falls", 0, []bool{false, false, false, true, false, false, false, true, true}, []bool{false, true, false, true}},
	} {
		looks := make(chan error)
		p, err := New(Config{Interval: 10 * time.Millisecond, Timeout: time.Second, Rise: 2, Fall: 3, Late: c.late}, func(ctx context.Context) error {
			select {
			case err := <-looks:
				return err
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		changes := make(chan Change, 10)
		go p.Run(ctx, changes)
		for _, ok := range c.looks {
			if ok {
				looks <- nil
			} else {
				looks <- errors.New("refused")
			}
		}
		var got []bool
		for range c.want {
			change := <-changes
			got = append(got, change.Healthy)
			if !change.Healthy && (change.Cause == nil || change.Cause.Error() != "refused") {
				t.Errorf("%s: cause %v", c.name, change.Cause)
			}
		}
		cancel()
		for change := range changes {
			got = append(got, change.Healthy)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	good := Config{Interval: time.Second, Timeout: time.Second, Rise: 1, Fall: 1}
	if _, err := New(good, nil); err != nil {
		t.Error(err)
	}
	for _, edit := range []func(*Config){
		func(c *Config) { c.Interval = 9 * time.Millisecond }, func(c *Config) { c.Timeout = 0 },
		func(c *Config) { c.Rise = 0 }, func(c *Config) { c.Fall = 0 },
	} {
		c := good
		edit(&c)
		if _, err := New(c, nil); err == nil {
			t.Errorf("%+v is accepted", c)
		}
	}
}
