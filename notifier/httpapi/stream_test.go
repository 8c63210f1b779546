package httpapi_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"rollcall/notifier/httpapi"
	"rollcall/registrar"
)

// reader is one client of the stream, and what it has got.
type reader struct {
	mu    sync.Mutex
	text  string // event data, one line each
	last  string // id
	ended chan struct{}
	close func()
}

func (r *reader) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text
}

// follow opens a stream.
func (w *world) follow(t *testing.T, query, last string) *reader {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, w.url+"/v1/stream"+query, nil)
	if err != nil {
		t.Fatal(err)
	}
	if last != "" {
		req.Header.Set("Last-Event-ID", last)
	}
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	if w.secure != nil {
		c.Transport = w.secure.client.Transport
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "text/event-stream" {
		t.Fatalf("%d %v", resp.StatusCode, resp.Header)
	}
	r := &reader{ended: make(chan struct{})}
	go func() {
		defer close(r.ended)
		defer resp.Body.Close()
		event := ""
		for lines := bufio.NewReader(resp.Body); ; {
			line, err := lines.ReadString('\n')
			if err != nil {
				return
			}
			name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
			r.mu.Lock()
			switch name {
			case "id":
				r.last = value
			case "event":
				event = value
			case "data":
				r.text += event + " " + value + "\n"
			}
			r.mu.Unlock()
		}
	}()
	r.close = func() { cancel(); <-r.ended }
	t.Cleanup(r.close)
	return r
}

// gets waits until the stream has said this.
func (r *reader) gets(t *testing.T, want string) {
	t.Helper()
	eventually(t, "the stream says "+want, func() error {
		if !strings.Contains(r.String(), want) {
			return errors.New(r.String())
		}
		return nil
	})
}

// TestStream follows changes, comes back, and comes back too late.
func TestStream(t *testing.T) {
	t.Parallel()
	w := start(t, nil, func(w *world) {
		w.beat(t, "web", 1, registrar.Meta{Tags: map[string]string{"x": "<script>\n"}})
		w.beat(t, "api", 1, registrar.Meta{})
	})
	w.shows(t, "api", "is there", func(d httpapi.Service) bool { return d.Version == 1 })
	r := w.follow(t, "", "")
	only := w.follow(t, "?service=api", "")
	for _, want := range []string{"reset {}\nmeta {", `"writes":true`, `service {"service":"web","version":1`, `service {"service":"api","version":1`, "status {", `history {"api":[[`, `"x":"\u003cscript\u003e\n"`} {
		r.gets(t, want)
	}
	w.beat(t, "web", 2, registrar.Meta{})
	r.gets(t, `service {"service":"web","version":2`)
	r.gets(t, `beats {"service":"web"`) // within 5 s, though nothing changes
	eventually(t, "the id is the last", func() error {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.last == "" {
			return errors.New("none")
		}
		return nil
	})
	r.close()
	w.beat(t, "api", 2, registrar.Meta{})
	w.shows(t, "api", "has changed", func(d httpapi.Service) bool { return d.Version == 2 })

	back := w.follow(t, "", r.last)
	back.gets(t, `service {"service":"api","version":2`)
	if got := back.String(); strings.Contains(got, "reset") || strings.Contains(got, `"service":"web","version"`) {
		t.Errorf("who comes back gets what it has:\n%s", got)
	}
	only.gets(t, `service {"service":"api","version":2`)
	if got := only.String(); strings.Contains(got, `"web"`) {
		t.Errorf("a stream of api has web:\n%s", got)
	}
	for _, id := range []string{"other-3", "nonsense", r.last + "0000"} {
		again := w.follow(t, "", id)
		again.gets(t, "reset {}")
		again.close()
	}
	begun := time.Now()
	w.stop()
	<-back.ended
	if took := time.Since(begun); took > 4*time.Second {
		t.Errorf("the end took %v", took)
	}
}

// TestStreamBeforeRedis says that nothing is known, and all of it later.
func TestStreamBeforeRedis(t *testing.T) {
	t.Parallel()
	w := start(t, nil, func(w *world) { w.redis.Kill(t) })
	r := w.follow(t, "", "")
	r.gets(t, `meta {"redis":{"answers":false`)
	if got := r.String(); strings.Contains(got, "reset") || strings.Contains(got, "status") {
		t.Errorf("something is known:\n%s", got)
	}
	w.redis.Launch(t)
	w.beat(t, "web", 1, registrar.Meta{})
	r.gets(t, `service {"service":"web","version":1`)
	r.gets(t, `"answers":true`)
}

// TestStreamLimit refuses one stream too many.
func TestStreamLimit(t *testing.T) {
	t.Parallel()
	w := start(t, nil)
	for range httpapi.MaxStreams {
		w.follow(t, "?service=none", "")
	}
	if r := w.get(t, "/v1/stream"); r.code != 503 || r.header.Get("Retry-After") == "" {
		t.Errorf("one more: %+v", r)
	}
}

// TestStreamDropsSlow drops who takes nothing, and nobody else.
func TestStreamDropsSlow(t *testing.T) {
	t.Parallel()
	w := start(t, nil, func(w *world) {
		w.patience = time.Second
		for n := range 100 {
			w.beat(t, "web", n+1, registrar.Meta{Tags: map[string]string{"fat": strings.Repeat("x", 4000)}})
		}
	})
	w.shows(t, "web", "is there", func(d httpapi.Service) bool { return len(d.Instances) == 100 })
	other := w.follow(t, "", "")
	conn, err := net.Dial("tcp", strings.TrimPrefix(w.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.(*net.TCPConn).SetReadBuffer(4096); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, "GET /v1/stream HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "who takes nothing is dropped", func() error {
		if s := w.server.Stats(); s.Dropped != 1 || s.Streams != 1 {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	w.beat(t, "web", 1, registrar.Meta{})
	other.gets(t, `"version":101`)
}

// TestStreamPace: of a service that changes all the time a reader gets the first
// change at once, then its whole document four times a second, and the last state
// always; meanwhile the first change of another service does not wait.
func TestStreamPace(t *testing.T) {
	t.Parallel()
	w := start(t, nil, func(w *world) {
		for n := range 20 {
			w.beat(t, "web", n+1, registrar.Meta{Tags: map[string]string{"fill": strings.Repeat("x", 100)}})
		}
		w.beat(t, "api", 1, registrar.Meta{})
	})
	w.shows(t, "web", "is there", func(d httpapi.Service) bool { return len(d.Instances) == 20 })
	w.shows(t, "api", "is there", func(d httpapi.Service) bool { return len(d.Instances) == 1 })
	r := w.follow(t, "", "")
	r.gets(t, `service {"service":"web"`)
	documents := func() (n, bytes int) {
		for line := range strings.Lines(r.String()) {
			if strings.HasPrefix(line, `service {"service":"web"`) {
				n, bytes = n+1, bytes+len(line)
			}
		}
		return n, bytes
	}
	before, bytesBefore := documents()
	begun := time.Now()
	tick := time.NewTicker(24 * time.Millisecond) // 42 times a second
	defer tick.Stop()
	changes := 0
	for ; time.Since(begun) < 3*time.Second; <-tick.C {
		changes++
		w.beat(t, "web", 1, registrar.Meta{Weight: changes % 200})
		if changes == 20 {
			w.beat(t, "api", 2, registrar.Meta{})
		}
	}
	w.beat(t, "web", 1, registrar.Meta{Weight: 222})
	r.gets(t, `service {"service":"api","version":2`)
	r.gets(t, `"weight":222`)
	took := time.Since(begun)
	n, bytes := documents()
	n, bytes = n-before, bytes-bytesBefore
	if most := int(took/(250*time.Millisecond)) + 2; n > most || n < 2 {
		t.Errorf("%d documents in %v, want at most %d", n, took, most)
	}
	t.Logf("%d changes in %v: %d documents, %.1f kB/s for this reader", changes, took.Round(time.Millisecond), n, float64(bytes)/took.Seconds()/1e3)
}
