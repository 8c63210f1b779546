package health

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"rollcall/registrar/child"
)

// Forms says what Parse takes.
const Forms = "http://HOST:PORT/PATH, https://…, https+insecure://…, tcp://HOST:PORT, grpc://HOST:PORT[/SERVICE] or exec:COMMAND"

// Parse makes the check that s describes:
//
//   - http, https: a GET is answered with 200 to 399; redirects are not followed.
//     https+insecure believes every certificate.
//   - tcp: a connection is accepted.
//   - grpc: grpc.health.v1 answers SERVING, for the service if one is named.
//   - exec: the command, split at blanks and run without a shell, exits with 0.
//     What it leaves behind is killed. children starts it, with env.
//
// It does no I/O, but to find the command, and for https to read the system's
// certificates.
func Parse(s string, children *child.Reaper, env []string) (Check, error) {
	if command, ok := strings.CutPrefix(s, "exec:"); ok {
		argv := strings.Fields(command)
		if _, err := child.Look(argv); err != nil {
			return nil, err
		}
		return (&program{children: children, argv: argv, env: env}).look, nil
	}
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.Opaque != "" {
		return nil, fmt.Errorf("check %q: want %s", s, Forms)
	}
	switch u.Scheme {
	case "http", "https", "https+insecure":
		return httpCheck(u)
	case "tcp", "grpc":
		if _, port, err := net.SplitHostPort(u.Host); err != nil || port == "" {
			return nil, fmt.Errorf("check %q: want a port", s)
		}
		if u.Scheme == "grpc" {
			return grpcCheck(u.Host, strings.TrimPrefix(u.Path, "/")), nil
		}
		return tcpCheck(u.Host), nil
	}
	return nil, fmt.Errorf("check %q: want %s", s, Forms)
}

// httpCheck makes a new connection for each look: that the app accepts one is
// part of the answer.
func httpCheck(u *url.URL) (Check, error) {
	// No proxy from the environment: the app is near.
	transport := &http.Transport{DisableKeepAlives: true, DisableCompression: true}
	switch u.Scheme {
	case "https+insecure":
		u.Scheme = "https"
		transport.TLSClientConfig = &tls.Config{InsecureSkipVerify: true}
	case "https":
		// Go reads them once, at their first use. If that were when there is no
		// descriptor, no certificate would be believed ever after.
		roots, err := x509.SystemCertPool()
		if err != nil {
			return nil, fmt.Errorf("check %q: the system's certificates: %w", u.Redacted(), err)
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: roots}
	}
	client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	return func(ctx context.Context) error {
		var t trail
		req, err := http.NewRequestWithContext(t.trace(ctx), http.MethodGet, u.String(), nil)
		if err != nil {
			return err
		}
		req.Header.Set("User-Agent", "rollcall")
		// A dial goes on after its request has ended, for minutes if nobody answers.
		defer transport.CloseIdleConnections()
		r, err := client.Do(req)
		if err != nil {
			return t.judge(err)
		}
		// A server that is cut off in its answer may log that.
		_, err = io.CopyN(io.Discard, r.Body, 64<<10)
		_ = r.Body.Close()
		if r.StatusCode >= 400 || r.StatusCode < 200 {
			return fmt.Errorf("status %s", r.Status)
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return t.judge(fmt.Errorf("read the answer: %w", err))
		}
		return nil
	}, nil
}

func tcpCheck(addr string) Check {
	return func(ctx context.Context) error {
		var d net.Dialer
		var t trail
		c, err := d.DialContext(t.trace(ctx), "tcp", addr)
		if err != nil {
			return t.judge(err)
		}
		return c.Close()
	}
}

// grpcCheck makes a new connection for each look, as httpCheck does; a kept one
// would also wait, after an outage, for as long as gRPC's back-off says.
func grpcCheck(addr, service string) Check {
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithNoProxy(), grpc.WithDisableServiceConfig(),
		grpc.WithReadBufferSize(4 << 10), grpc.WithWriteBufferSize(4 << 10),
	}
	return func(ctx context.Context) error {
		var t trail
		dialing := make(chan error, 1) // why the first dial failed; of gRPC's error only the text is left
		dial := grpc.WithContextDialer(func(dctx context.Context, addr string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(t.trace(dctx), "tcp", addr)
			if err != nil {
				select {
				case dialing <- err:
				default:
				}
			}
			return conn, err
		})
		c, err := grpc.NewClient("passthrough:///"+addr, append(slices.Clone(options), dial)...)
		if err != nil {
			return err
		}
		r, err := healthpb.NewHealthClient(c).Check(ctx, &healthpb.HealthCheckRequest{Service: service})
		err = errors.Join(err, c.Close())
		if err == nil {
			if r.Status != healthpb.HealthCheckResponse_SERVING {
				err = fmt.Errorf("status %s", r.Status)
			}
			return err
		}
		if ctx.Err() != nil {
			err = ctx.Err() // gRPC has an error of its own for this
		}
		select {
		case err = <-dialing:
		default:
		}
		return t.judge(err)
	}
}

// killWait is how long a killed command may take to end. One that hangs in the
// kernel takes longer; it is a miss for as long as it does.
const killWait = time.Second

// program is a command that looks.
type program struct {
	children *child.Reaper
	argv     []string
	env      []string
	stuck    *child.Process // a killed one that has not ended
}

// look runs the command. That it cannot be started, for whatever reason, or was
// killed by another hand, which is the kernel's when memory runs out, tells nothing
// of the app: nobody has asked it.
func (c *program) look(ctx context.Context) error {
	if c.stuck != nil {
		select {
		case <-c.stuck.Done():
			c.stuck = nil
		default:
			return fmt.Errorf("process %d was killed and has not ended", c.stuck.PID())
		}
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return unknown(err)
	}
	defer null.Close()
	p, err := c.children.Start(c.argv, c.env, [3]*os.File{null, null, null})
	if err != nil {
		return unknown(err)
	}
	defer p.Kill() // and whom it left behind
	select {
	case <-p.Done():
		switch {
		case p.Code() == 128+int(syscall.SIGKILL):
			return unknown(errors.New(p.String()))
		case p.Code() != 0:
			return errors.New(p.String())
		}
		return nil
	case <-ctx.Done():
	}
	p.Kill()
	wait := time.NewTimer(killWait)
	defer wait.Stop()
	select {
	case <-p.Done():
	case <-wait.C:
		c.stuck = p
	}
	return ctx.Err()
}
