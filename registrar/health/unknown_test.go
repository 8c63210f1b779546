package health

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	grpchealth "google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"rollcall/registrar/child"
	"rollcall/registrar/regular"
)

// noDescriptors has this process get none until what it returns is called.
func noDescriptors(tb testing.TB) (enough func()) {
	tb.Helper()
	var before syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &before); err != nil {
		tb.Fatal(err)
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 3, Max: before.Max}); err != nil {
		tb.Fatal(err)
	}
	return func() {
		tb.Helper()
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &before); err != nil {
			tb.Fatal(err)
		}
	}
}

// wantUnknown and wantMiss tell the two kinds of failed looks apart.
func wantUnknown(tb testing.TB, what string, err error) {
	tb.Helper()
	if !errors.Is(err, ErrUnknown) {
		tb.Errorf("%s: %v, want that it is unknown", what, err)
	}
}

func wantMiss(tb testing.TB, what string, err error) {
	tb.Helper()
	if err == nil || errors.Is(err, ErrUnknown) {
		tb.Errorf("%s: %v, want a miss", what, err)
	}
}

// TestNoDescriptors: every kind of check succeeds, is unknown while there are no
// descriptors, and succeeds again, or misses if the app went meanwhile.
func TestNoDescriptors(t *testing.T) {
	children := child.New()
	defer children.Close()
	plain, secure := httptest.NewServer(http.NotFoundHandler()), httptest.NewTLSServer(http.NotFoundHandler())
	plain.Config.Handler = http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	secure.Config.Handler = plain.Config.Handler
	defer plain.Close()
	defer secure.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	healthpb.RegisterHealthServer(srv, grpchealth.NewServer())
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	host := strings.Replace(plain.Listener.Addr().String(), "127.0.0.1", "localhost", 1)
	urls := []string{
		plain.URL, "http://" + host, strings.Replace(secure.URL, "https", "https+insecure", 1),
		"tcp://" + plain.Listener.Addr().String(), "tcp://" + host, "grpc://" + l.Addr().String(), "exec:true",
	}
	each := func(when string, want func(url string, err error)) {
		t.Helper()
		for _, url := range urls {
			want(when+": "+url, look(t, url, children))
		}
	}
	well := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	each("before", well)
	enough := noDescriptors(t)
	each("without descriptors", func(what string, err error) { t.Helper(); wantUnknown(t, what, err) })
	enough()
	each("after", well)
	plain.Close()
	secure.Close()
	srv.Stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
	urls = urls[:len(urls)-1] // no app is behind the command
	each("when the app is gone", func(what string, err error) { t.Helper(); wantMiss(t, what, err) })
}

// TestNoCommand: that a command cannot be started says nothing of the app, nor that
// somebody killed it; that it fails or hangs does.
func TestNoCommand(t *testing.T) {
	children := child.New()
	defer children.Close()
	path := filepath.Join(t.TempDir(), "check")
	write := func(body string) {
		t.Helper()
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write("exit 0")
	check, err := Parse("exec:"+path, children, os.Environ())
	if err != nil {
		t.Fatal(err)
	}
	looks := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		return check(ctx)
	}
	if err := looks(); err != nil {
		t.Error(err)
	}
	write("exit 1")
	wantMiss(t, "it fails", looks())
	write("kill -9 $$")
	wantUnknown(t, "somebody killed it", looks())
	write("sleep 60")
	wantMiss(t, "it hangs", looks())
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	wantUnknown(t, "it may not be executed", looks())
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	wantUnknown(t, "it is not there", looks())
	if err := os.WriteFile(path, []byte("neither a script nor a program"), 0o755); err != nil {
		t.Fatal(err)
	}
	wantUnknown(t, "it is no program", looks())
	write("exit 0")
	if err := looks(); err != nil {
		t.Error(err)
	}
}

// nameServer answers every question for a name by its first label: with the code
// that it is here, or not at all.
func nameServer(tb testing.TB, codes map[string]byte) {
	tb.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1500)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			code, known := codes[string(buf[13:13+int(buf[12])])]
			if !known {
				continue
			}
			buf[2], buf[3] = buf[2]|0x80, 0x80|code
			_, _ = c.WriteTo(buf[:n], from) // the resolver may have given up
		}
	}()
	before := net.DefaultResolver
	var mu sync.Mutex
	var asking []net.Conn // guarded by mu
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, "udp", c.LocalAddr().String())
		if err == nil {
			mu.Lock()
			asking = append(asking, conn)
			mu.Unlock()
		}
		return conn, err
	}}
	tb.Cleanup(func() {
		net.DefaultResolver = before
		mu.Lock()
		for _, conn := range asking { // Go's resolver waits for 5 s whatever becomes of the look
			conn.Close()
		}
		mu.Unlock()
		c.Close()
		<-done
	})
}

// TestNames: only a name server that answers says anything of the app.
func TestNames(t *testing.T) {
	const servfail, nxdomain = 2, 3
	nameServer(t, map[string]byte{"fails": servfail, "gone": nxdomain})
	for _, form := range []string{"http://%s.rollcall.test.:80/", "tcp://%s.rollcall.test.:80", "grpc://%s.rollcall.test.:80"} {
		wantMiss(t, form, look(t, fmt.Sprintf(form, "gone"), nil))
		wantUnknown(t, form, look(t, fmt.Sprintf(form, "fails"), nil))
		wantUnknown(t, form, look(t, fmt.Sprintf(form, "silent"), nil))
	}
}

// TestNoPort has one local port, in a network of its own, and two connections.
func TestNoPort(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a network of its own needs root")
	}
	failed := make(chan error, 1)
	go func() { // whose thread ends with it
		runtime.LockOSThread()
		failed <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			if err := os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("50000 50000"), 0); err != nil {
				return err
			}
			l, err := net.Listen("tcp", "127.0.0.1:80")
			if err != nil {
				return err
			}
			defer l.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			check := tcpCheck("127.0.0.1:80")
			if err := check(ctx); err != nil {
				return fmt.Errorf("the first: %w", err)
			}
			if err := check(ctx); !errors.Is(err, ErrUnknown) || !errors.Is(err, syscall.EADDRNOTAVAIL) {
				return fmt.Errorf("the second: %v, want that there is no port", err)
			}
			return nil
		}()
	}()
	if err := <-failed; err != nil {
		t.Error(err)
	}
}

// TestTrail: of a name with more addresses one that could be asked decides.
func TestTrail(t *testing.T) {
	lacks := &net.OpError{Op: "dial", Err: os.NewSyscallError("socket", syscall.ENOMEM)}
	refuses := &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	for _, c := range []struct {
		name    string
		dials   []error // what became of each; context.Canceled: nothing yet
		end     error
		unknown bool
	}{
		{"all lack something", []error{lacks, lacks}, lacks, true},
		{"one refuses", []error{lacks, refuses}, lacks, false},
		{"the first refuses", []error{refuses, lacks}, refuses, false},
		{"one does not answer", []error{lacks, context.Canceled}, context.DeadlineExceeded, false},
		{"the answer cannot be read", []error{nil}, fmt.Errorf("read: %w", syscall.ENOBUFS), true},
		{"the answer is cut", []error{nil}, syscall.ECONNRESET, false},
		{"nothing was tried", nil, context.DeadlineExceeded, true},
	} {
		var trail trail
		trace := traceOf(trail.trace(t.Context()))
		for _, err := range c.dials {
			trace.ConnectStart("tcp", "")
			if err != context.Canceled {
				trace.ConnectDone("tcp", "", err)
			}
		}
		if err := trail.judge(c.end); errors.Is(err, ErrUnknown) != c.unknown {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// TestNothingIsLeft: a look at an address that does not answer leaves no connection
// that is still tried.
func TestNothingIsLeft(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	addr := fmt.Sprintf("127.0.0.1:%d", name.(*unix.SockaddrInet4).Port)
	for { // fill what it accepts
		c, err := net.DialTimeout("tcp", addr, 200*time.Millisecond)
		if err != nil {
			break
		}
		defer c.Close()
	}
	sockets := func() (n int) {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range fds {
			if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(to, "socket:") {
				n++
			}
		}
		return n
	}
	before := sockets()
	for _, url := range []string{"http://" + addr, "tcp://" + addr, "grpc://" + addr} {
		check, err := Parse(url, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		for range 5 {
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			wantMiss(t, url, check(ctx))
			cancel()
		}
		eventually(t, func() error {
			if now := sockets(); now > before {
				return fmt.Errorf("%s: %d sockets became %d", url, before, now)
			}
			return nil
		})
	}
}

// TestFilesUnseen: what keeps a file from being seen is not the app's word; what
// cannot be such a file is.
func TestFilesUnseen(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "f")
	ready, beat := ReadyFile(file, nil), BeatFile(file, time.Minute)
	each := func(want func(testing.TB, string, error), when string) {
		t.Helper()
		want(t, "ready-file, "+when, ready(t.Context()))
		want(t, "beat-file, "+when, beat(t.Context()))
	}
	each(wantMiss, "nothing there")
	if err := os.Mkdir(file, 0o700); err != nil {
		t.Fatal(err)
	}
	each(wantMiss, "a directory")
	if err := ready(t.Context()); !errors.Is(err, regular.ErrKind) {
		t.Error(err)
	}
	if err := errors.Join(os.Remove(file), os.Symlink(file, file)); err != nil {
		t.Fatal(err)
	}
	each(wantUnknown, "ELOOP")
	if err := errors.Join(os.Remove(file), os.WriteFile(file, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	each(func(tb testing.TB, what string, err error) {
		tb.Helper()
		if err != nil {
			tb.Errorf("%s: %v", what, err)
		}
	}, "a file")
	below := filepath.Join(file, "below")
	wantMiss(t, "ENOTDIR", ReadyFile(below, nil)(t.Context()))

	// A file system that does not answer: one look is under way at a time.
	var looks atomic.Int32
	answer := make(chan struct{})
	hung := &statter{path: file, stat: func(path string) (os.FileInfo, error) {
		looks.Add(1)
		<-answer
		return os.Stat(path)
	}}
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		_, err := hung.look(ctx)
		wantUnknown(t, "a file system that hangs", err)
		cancel()
	}
	if n := looks.Load(); n != 1 {
		t.Errorf("%d looks are under way", n)
	}
	close(answer)
	if _, err := hung.look(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestUnknownChangesNothing: looks that could not be made leave the state and a row of
// misses or successes as they are.
func TestUnknownChangesNothing(t *testing.T) {
	for looks, want := range map[string]string{
		"???1":           "0001",
		"1?????":         "111111",
		"10?0?0":         "111110", // the row of misses goes on
		"1000?1?1":       "11100001",
		"1000" + "1??01": "11100" + "0000",
	} {
		next := make(chan error, 1)
		p, err := New(Config{Interval: time.Second, Timeout: time.Second, Rise: 2, Fall: 3}, func(context.Context) error { return <-next })
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		for _, look := range looks {
			next <- map[rune]error{'0': errors.New("ill"), '1': nil, '?': unknown(context.DeadlineExceeded)}[look]
			p.Probe(t.Context())
			got += map[bool]string{true: "1", false: "0"}[p.state.Healthy]
		}
		if got != want {
			t.Errorf("%s: got %s, want %s", looks, got, want)
		}
	}
}

// TestUnknownIsSaid once a row, again while it lasts, and when it is over; all is
// counted.
func TestUnknownIsSaid(t *testing.T) {
	var out strings.Builder
	counted := 0
	next := make(chan error, 1)
	p, err := New(Config{Interval: time.Second, Timeout: time.Second, Rise: 1, Fall: 1, Log: zerolog.New(&out), Unknown: func() { counted++ }},
		func(context.Context) error { return <-next })
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{nil, unknown(syscall.EMFILE), unknown(syscall.EMFILE), unknown(syscall.EMFILE), nil, nil} {
		next <- err
		p.Probe(t.Context())
	}
	said := out.String()
	if strings.Count(said, "\n") != 2 || strings.Count(said, "unknown; the instance stays") != 1 || strings.Count(said, `"looks":3,"message":"the app's health can be seen again"`) != 1 || counted != 3 {
		t.Errorf("%d counted, and said:\n%s", counted, said)
	}

	var b blindness
	now, lines := time.Now(), 0
	for range 4 * 60 { // an hour of looks that cannot be made
		if b.more(now) {
			lines++
		}
		now = now.Add(15 * time.Second)
	}
	if looks, say := b.end(); lines != 4 || looks != 240 || !say {
		t.Errorf("an hour: %d lines, %d looks, %v", lines, looks, say)
	}
	if _, say := b.end(); say {
		t.Error("nothing is over")
	}
}

// TestSlowAnswer: a miss after a connection that was accepted stays one.
func TestSlowAnswer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); _, _ = io.Copy(io.Discard, c) }()
		}
	}()
	wantMiss(t, "no answer", look(t, "http://"+l.Addr().String(), nil))
}

func traceOf(ctx context.Context) *httptrace.ClientTrace { return httptrace.ContextClientTrace(ctx) }
