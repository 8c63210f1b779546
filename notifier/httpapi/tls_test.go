package httpapi_test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"rollcall/notifier/httpapi"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// secure is how a world speaks TLS.
type secure struct {
	server *tls.Config
	dial   *tls.Config // of clients
	client *http.Client
}

// newSecure makes a certificate, and clients that know its CA and speak HTTP/2, or
// HTTP/1.1 alone.
func newSecure(t *testing.T, http2 bool) *secure {
	t.Helper()
	files := redistest.NewCertificates(t)
	pair, err := tls.LoadX509KeyPair(files.Cert, files.Key)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(files.CA)
	if err != nil {
		t.Fatal(err)
	}
	s := &secure{server: &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &pair, nil }}}
	s.dial = &tls.Config{RootCAs: x509.NewCertPool(), ServerName: redistest.NameTLS}
	s.dial.RootCAs.AppendCertsFromPEM(ca)
	transport := &http.Transport{TLSClientConfig: s.dial, ForceAttemptHTTP2: http2, DisableKeepAlives: !http2}
	t.Cleanup(transport.CloseIdleConnections)
	s.client = &http.Client{Timeout: 20 * time.Second, Transport: transport}
	return s
}

// TestTLS reads, writes, waits and follows over TLS, and has a reader who takes nothing
// dropped: by HTTP/1.1 and by HTTP/2.
func TestTLS(t *testing.T) {
	t.Parallel()
	for version, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2.0": true} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			w := start(t, nil, func(w *world) {
				w.secure, w.patience, w.bodies = newSecure(t, http2), time.Second, time.Second
				for n := range 100 {
					w.beat(t, "web", n+1, registrar.Meta{Tags: map[string]string{"fat": strings.Repeat("x", 4000)}})
				}
			})
			d := w.shows(t, "web", "is there", func(d httpapi.Service) bool { return len(d.Instances) == 100 })
			if resp, err := w.secure.client.Get(w.url + "/v1/status"); err != nil || resp.Proto != version {
				t.Fatalf("%v, %+v", err, resp)
			} else {
				resp.Body.Close()
			}
			r := w.follow(t, "", "")
			r.gets(t, `service {"service":"web"`)
			// For longer than bodies and patience: a wait of each kind lasts.
			waited := make(chan error, 1)
			begun := time.Now()
			go func() {
				got, err := w.fetch("GET", "/v1/services/web?wait=15s&version="+d.Token, "")
				if err == nil && (got.code != 200 || !strings.Contains(got.body, `"version":101`) || time.Since(begun) < 2*time.Second) {
					err = fmt.Errorf("after %v: %d %.100s", time.Since(begun), got.code, got.body)
				}
				waited <- err
			}()
			auth := []string{"Authorization", "Bearer " + secret, "Content-Type", jsonType}
			const at = "/v1/services/web/instances/10.0.0.1:8080/drain"
			time.AfterFunc(2*time.Second, func() {
				if got, err := w.fetch("POST", at+"?wait=2s", `{"reason":"x"}`, auth...); err != nil || got.code != 202 {
					t.Errorf("a write that waits: %v %+v", err, got)
				}
			})
			if err := <-waited; err != nil {
				t.Errorf("a long poll: %v", err)
			}
			r.gets(t, `"version":101`)
			// A body that does not end.
			body, stop := io.Pipe()
			defer stop.Close()
			req, err := http.NewRequest("POST", w.url+at, body)
			if err != nil {
				t.Fatal(err)
			}
			for i := 0; i < len(auth); i += 2 {
				req.Header.Set(auth[i], auth[i+1])
			}
			begun = time.Now()
			if resp, err := w.secure.client.Do(req); err != nil || resp.StatusCode != 400 || time.Since(begun) > 5*time.Second {
				t.Errorf("a body without an end, after %v: %v, %+v", time.Since(begun), err, resp)
			} else {
				resp.Body.Close()
			}

			slow := w.slow(t, http2)
			defer slow.Close()
			eventually(t, "who takes nothing is dropped", func() error {
				if s := w.server.Stats(); s.Dropped != 1 || s.Streams != 1 {
					return fmt.Errorf("%+v", s)
				}
				return nil
			})
			w.beat(t, "web", 101, registrar.Meta{})
			r.gets(t, `"10.0.0.101:8080"`)
			begun = time.Now()
			w.stop()
			<-r.ended
			if took := time.Since(begun); took > 4*time.Second {
				t.Errorf("the end took %v", took)
			}
		})
	}
}

// slow asks for the stream and takes nothing of it.
func (w *world) slow(t *testing.T, http2 bool) net.Conn {
	t.Helper()
	raw, err := net.Dial("tcp", strings.TrimPrefix(w.url, "https://"))
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.(*net.TCPConn).SetReadBuffer(4096); err != nil {
		t.Fatal(err)
	}
	cfg := w.secure.dial.Clone()
	if http2 {
		cfg.NextProtos = []string{"h2"}
	}
	conn := tls.Client(raw, cfg)
	if !http2 {
		if _, err := io.WriteString(conn, "GET /v1/stream HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	// RFC 9113: the preface, SETTINGS that grant a stream no byte, and HEADERS that end
	// the request, in HPACK without compression (RFC 7541).
	frame := func(kind, flags byte, stream uint32, payload []byte) []byte {
		head := binary.BigEndian.AppendUint32(nil, uint32(len(payload)))[1:]
		head = append(head, kind, flags)
		return append(binary.BigEndian.AppendUint32(head, stream), payload...)
	}
	literal := func(name byte, value string) []byte { return append([]byte{name, byte(len(value))}, value...) }
	headers := append([]byte{0x82, 0x87}, literal(0x04, "/v1/stream")...) // :method GET, :scheme https, :path
	headers = append(headers, literal(0x01, "localhost")...)              // :authority
	text := []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	text = append(text, frame(4, 0, 0, []byte{0, 4, 0, 0, 0, 0})...) // INITIAL_WINDOW_SIZE 0
	text = append(text, frame(1, 0x4|0x1, 1, headers)...)            // END_HEADERS, END_STREAM
	if _, err := conn.Write(text); err != nil {
		t.Fatal(err)
	}
	return conn
}

// TestTLSOnly answers nobody who does not speak TLS, nor an old version of it.
func TestTLSOnly(t *testing.T) {
	t.Parallel()
	w := start(t, nil, func(w *world) { w.secure = newSecure(t, false) })
	plain := &world{url: "http://" + strings.TrimPrefix(w.url, "https://")}
	if r, err := plain.fetch("GET", "/v1/services", ""); err != nil || r.code != 400 || !strings.Contains(r.body, "HTTPS") {
		t.Errorf("without TLS: %v %+v", err, r)
	}
	old := w.secure.dial.Clone()
	old.MaxVersion = tls.VersionTLS11
	if conn, err := tls.Dial("tcp", strings.TrimPrefix(w.url, "https://"), old); err == nil {
		conn.Close()
		t.Error("TLS 1.1 is spoken")
	}
}
