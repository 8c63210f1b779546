package main

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// TestConnections: of too many connections the oldest without a request goes first, and
// the oldest with one if all have; the newest is always answered.
func TestConnections(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := boundConnections(inner, 10, 1, zerolog.Nop())
	started, ended, release := make(chan string, 100), make(chan string, 100), make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("/hold/{who}", func(w http.ResponseWriter, r *http.Request) {
		started <- r.PathValue("who")
		defer func() { ended <- r.PathValue("who") }()
		select {
		case <-release:
		case <-r.Context().Done():
		}
	})
	mux.HandleFunc("/", func(http.ResponseWriter, *http.Request) {})
	srv := &http.Server{Handler: mux}
	l.Attach(srv)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	defer func() {
		srv.Close()
		if err := <-served; err != http.ErrServerClosed {
			t.Error(err)
		}
	}()
	open := func() int {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.open)
	}
	dial := func() net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	hold := func(who string) net.Conn {
		t.Helper()
		c := dial()
		fmt.Fprintf(c, "GET /hold/%s HTTP/1.1\r\nHost: x\r\n\r\n", who)
		if got := hears(t, started); got != who {
			t.Fatalf("%s began", got)
		}
		return c
	}
	holders := map[string]net.Conn{}
	for i := range 8 {
		who := fmt.Sprint(i)
		holders[who] = hold(who)
	}
	for range 50 { // idle
		dial()
		if took, failed := scrapes(t, "http://"+inner.Addr().String()+"/", 1); took > time.Second || failed > 0 {
			t.Logf("an answer took %v, %d tries failed", took, failed)
		}
	}
	haproxytest.Poll(t, "no more are open than may", func() error {
		if n := open(); n > 10 {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
	if len(ended) > 0 {
		t.Errorf("%s lost its request to one without", <-ended)
	}
	// Requests alone: the oldest go.
	for _, who := range []string{"8", "9", "10", "11"} {
		holders[who] = hold(who)
	}
	for _, want := range []string{"0", "1"} {
		if got := hears(t, ended); got != want {
			t.Errorf("%s was cut off, want %s", got, want)
		}
	}
	if took, failed := scrapes(t, "http://"+inner.Addr().String()+"/", 1); took > time.Second || failed > 0 {
		t.Logf("an answer took %v, %d tries failed", took, failed)
	}
	if got := hears(t, ended); got != "2" {
		t.Errorf("%s was cut off, want 2", got)
	}
	close(release)
	for who, c := range holders {
		if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		_, err := http.ReadResponse(bufio.NewReader(c), nil)
		if cut := who == "0" || who == "1" || who == "2"; cut != (err != nil) {
			t.Errorf("%s: %v", who, err)
		}
	}
}

// TestConnectionsTLS: over TLS too a connection has a request while one of its requests is
// under way, and is none that goes first.
func TestConnectionsTLS(t *testing.T) {
	t.Parallel()
	for version, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2.0": true} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			files := redistest.NewCertificates(t)
			inner, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			l := boundConnections(inner, 4, 1, zerolog.Nop())
			started, release := make(chan string, 9), make(chan struct{})
			mux := http.NewServeMux()
			mux.HandleFunc("/hold", func(w http.ResponseWriter, r *http.Request) {
				started <- r.Proto
				select {
				case <-release:
				case <-r.Context().Done():
				}
			})
			mux.HandleFunc("/", func(http.ResponseWriter, *http.Request) {})
			srv := &http.Server{Handler: mux}
			l.Attach(srv)
			served := make(chan error, 1)
			go func() { served <- srv.ServeTLS(l, files.Cert, files.Key) }()
			defer func() {
				srv.Close()
				if err := <-served; err != http.ErrServerClosed {
					t.Error(err)
				}
			}()
			transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: http2}
			defer transport.CloseIdleConnections()
			c := http.Client{Timeout: 20 * time.Second, Transport: transport}
			get := func(path string) error {
				r, err := c.Get("https://" + inner.Addr().String() + path)
				if err == nil {
					r.Body.Close()
				}
				return err
			}
			held := make(chan error, 1)
			go func() { held <- get("/hold") }()
			if got := hears(t, started); got != version {
				t.Fatalf("it speaks %s", got)
			}
			for range 3 { // over HTTP/2 on the same connection
				if err := get("/"); err != nil {
					t.Error(err)
				}
			}
			for range 12 { // idle, each of which takes the place of an older one
				idle, err := net.Dial("tcp", inner.Addr().String())
				if err != nil {
					t.Fatal(err)
				}
				defer idle.Close()
			}
			haproxytest.Poll(t, "all but three of the idle are closed", func() error {
				l.mu.Lock()
				defer l.mu.Unlock()
				busy := 0
				for _, o := range l.open {
					busy += min(o.busy, 1)
				}
				if len(l.open) > 4 || len(l.open) < 4 || busy != 1 {
					return fmt.Errorf("%d are open, %d have a request", len(l.open), busy)
				}
				return nil
			})
			close(release)
			if err := <-held; err != nil {
				t.Errorf("who had a request was cut off: %v", err)
			}
		})
	}
}

func hears(t *testing.T, c <-chan string) string {
	t.Helper()
	select {
	case s := <-c:
		return s
	case <-time.After(10 * time.Second):
		t.Fatal("nothing is heard")
		return ""
	}
}
