package dataplane

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/haproxytech/client-native/v5/models"

	"rollcall/lbsync"
	"rollcall/registrar/regular"
)

// maxBody and maxHeader bound an answer. The statistics of 10,000 servers are some 15 MB.
const (
	maxBody   = 24 << 20
	maxHeader = 1 << 20
)

// The paths of the specification (client-native v6, haproxy-spec.yaml), under
// the base path /v3.
const (
	infoPath    = "/v3/info"
	processPath = "/v3/services/haproxy/runtime/info"
	statsPath   = "/v3/services/haproxy/stats/native"
	oldInfoPath = "/v2/info"
)

func serversPath(backend string) string {
	return "/v3/services/haproxy/runtime/backends/" + url.PathEscape(backend) + "/servers"
}

func serverPath(backend, name string) string {
	return serversPath(backend) + "/" + url.PathEscape(name)
}

// statusError is an answer of the API that says no in its own words.
type statusError struct {
	status int
	words  string
}

func (e *statusError) Error() string { return fmt.Sprintf("%s (status %d)", e.words, e.status) }

// request is one request and the answer that the specification has for it.
type request struct {
	method string
	path   string
	query  url.Values
	body   any // nil: none
	status int // of success
	answer any // where to put the body of success; nil: it has none
}

// do sends r once. A statusError is the API's refusal; every other error is
// lbsync.ErrUnknown. The caller has the turn.
func (c *Client) do(ctx context.Context, r request) error {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.Timeout)
	defer cancel()
	start := time.Now()
	n, err := c.send(ctx, r)
	var no *statusError
	if err == nil || errors.As(err, &no) {
		c.log.Debug().Str("method", r.method).Str("path", r.path).Int("received", n).Err(err).
			Dur("took", time.Since(start)).Msg("request")
		return err
	}
	// What comes next on this connection, if anything does, is not ours. The
	// CA file may have changed, or the API been replaced by another version.
	c.hangUp()
	if ctx.Err() != nil {
		err = fmt.Errorf("no answer within %s: %w", time.Since(start).Round(time.Millisecond), ctx.Err())
	}
	return fmt.Errorf("%w: %s %s: %w", lbsync.ErrUnknown, r.method, c.url(r), err)
}

func (c *Client) url(r request) string {
	u := strings.TrimSuffix(c.base.String(), "/") + r.path
	if len(r.query) > 0 {
		u += "?" + r.query.Encode()
	}
	return u
}

func (c *Client) send(ctx context.Context, r request) (received int, err error) {
	if err := c.connect(); err != nil {
		return 0, err
	}
	var body io.Reader
	if r.body != nil {
		text, err := json.Marshal(r.body)
		if err != nil {
			return 0, err
		}
		body = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, r.method, c.url(r), body)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Accept", "application/json")
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.cfg.User != "" {
		password, err := regular.Read(c.cfg.PasswordFile)
		if err != nil {
			return 0, fmt.Errorf("password: %w", err)
		}
		req.SetBasicAuth(c.cfg.User, strings.TrimRight(string(password), "\r\n"))
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	text, err := readBody(resp.Body)
	switch {
	case err != nil:
		return 0, fmt.Errorf("status %d: %w", resp.StatusCode, err)
	case resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden:
		return len(text), fmt.Errorf("status %d: the API does not accept the user and password", resp.StatusCode)
	case resp.StatusCode == r.status && r.answer == nil && len(text) == 0:
		return 0, nil
	}
	if kind, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type")); err != nil || kind != "application/json" {
		return len(text), fmt.Errorf("status %d with content type %q, not JSON", resp.StatusCode, resp.Header.Get("Content-Type"))
	}
	if resp.StatusCode == r.status && r.answer != nil {
		if err := json.Unmarshal(text, r.answer); err != nil {
			return len(text), fmt.Errorf("status %d: %w", resp.StatusCode, err)
		}
		return len(text), nil
	}
	var no models.Error
	if err := json.Unmarshal(text, &no); err != nil || no.Message == nil || resp.StatusCode < 400 {
		return len(text), fmt.Errorf("status %d where %d is specified", resp.StatusCode, r.status)
	}
	return len(text), &statusError{resp.StatusCode, strings.Join(strings.Fields(*no.Message), " ")}
}

// readBody is io.ReadAll of at most maxBody bytes. Of more it makes no copy.
func readBody(r io.Reader) ([]byte, error) {
	var chunks [][]byte
	total := 0
	for size := 8 << 10; ; size = min(2*size, 1<<20) {
		chunk, err := make([]byte, 0, size), error(nil)
		for len(chunk) < size && err == nil {
			var n int
			n, err = r.Read(chunk[len(chunk):size])
			chunk = chunk[:len(chunk)+n]
		}
		chunks, total = append(chunks, chunk), total+len(chunk)
		switch {
		case total > maxBody:
			return nil, fmt.Errorf("body of more than %d bytes", maxBody)
		case errors.Is(err, io.EOF):
			return bytes.Join(chunks, nil), nil
		case err != nil:
			return nil, fmt.Errorf("body was cut after %d bytes: %w", total, err)
		}
	}
}

// connect makes c.http if there is none.
func (c *Client) connect() error {
	if c.http != nil {
		return nil
	}
	t := &http.Transport{ // no proxy of the environment
		MaxIdleConnsPerHost: 1,
		IdleConnTimeout:     time.Minute,
		DisableCompression:  true,

		MaxResponseHeaderBytes: maxHeader,
	}
	if c.cfg.CAFile != "" {
		pem, err := regular.Read(c.cfg.CAFile)
		if err != nil {
			return fmt.Errorf("CA: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return fmt.Errorf("CA: %s has no certificate", c.cfg.CAFile)
		}
		t.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	c.http = &http.Client{
		Transport: t,
		// An answer from elsewhere is no answer, and the password is for here.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return nil
}

func (c *Client) hangUp() {
	if c.http != nil {
		c.http.CloseIdleConnections()
	}
	c.http, c.supported = nil, false
}
