package child

import (
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// TestMain lets the test binary be the child of its own tests.
func TestMain(m *testing.M) {
	switch os.Getenv("CHILD_TEST") {
	case "exit":
		n, _ := strconv.Atoi(os.Args[1])
		os.Exit(n)
	case "wait":
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGUSR1)
		println("ready")
		<-c
		os.Exit(7)
	}
	goleak.VerifyTestMain(m)
}

func null(tb testing.TB) [3]*os.File {
	tb.Helper()
	f, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { f.Close() })
	return [3]*os.File{f, f, f}
}

func start(tb testing.TB, r *Reaper, mode string, files [3]*os.File, args ...string) *Process {
	tb.Helper()
	argv := append([]string{os.Args[0]}, args...)
	if mode == "" {
		argv = args
	}
	p, err := r.Start(argv, append(os.Environ(), "CHILD_TEST="+mode), files)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(p.Kill)
	return p
}

func await(tb testing.TB, p *Process) {
	tb.Helper()
	select {
	case <-p.Done():
	case <-time.After(10 * time.Second):
		tb.Fatalf("process %d has not ended", p.PID())
	}
}

func TestCodes(t *testing.T) {
	r := New()
	defer r.Close()
	for _, want := range []int{0, 1, 42, 255} {
		p := start(t, r, "exit", null(t), strconv.Itoa(want))
		if await(t, p); p.Code() != want {
			t.Errorf("code %d, want %d", p.Code(), want)
		}
	}
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		p := start(t, r, "", null(t), "sleep", "60")
		p.Signal(sig)
		if await(t, p); p.Code() != 128+int(sig) {
			t.Errorf("code %d after %v", p.Code(), sig)
		}
		p.Signal(sig) // to nobody
	}
}

func TestSignal(t *testing.T) {
	r := New()
	defer r.Close()
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	files := null(t)
	files[2] = out
	p := start(t, r, "wait", files)
	out.Close()
	if _, err := in.Read(make([]byte, 1)); err != nil { // it listens
		t.Fatal(err)
	}
	p.Signal(syscall.SIGUSR1)
	if await(t, p); p.Code() != 7 {
		t.Errorf("ended with %s", p)
	}
}

// TestOrphans has a child leave a grandchild to this process, as to process 1 of
// a container.
func TestOrphans(t *testing.T) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0); err != nil {
			t.Error(err)
		}
	}()
	r := New()
	defer r.Close()
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	files := null(t)
	files[1] = out
	p := start(t, r, "", files, "sh", "-c", "sleep 2 >/dev/null & echo $!")
	out.Close()
	await(t, p)
	buf := make([]byte, 32)
	n, err := in.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	orphan := strings.TrimSpace(string(buf[:n]))
	deadline := time.Now().Add(10 * time.Second)
	look := time.NewTicker(time.Millisecond)
	defer look.Stop()
	mine := false
	for {
		stat, err := os.ReadFile("/proc/" + orphan + "/stat")
		if err != nil {
			break // collected
		}
		f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		mine = mine || f[1] == strconv.Itoa(os.Getpid())
		if time.Now().After(deadline) {
			t.Fatalf("the orphan is still there, state %s", f[0])
		}
		<-look.C
	}
	if !mine {
		t.Error("the orphan was never this process's")
	}
}

// TestKillTakesTheGroup also of a leader that has ended.
func TestKillTakesTheGroup(t *testing.T) {
	r := New()
	defer r.Close()
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	files := null(t)
	files[1] = out
	p := start(t, r, "", files, "sh", "-c", "sleep 60 &")
	out.Close()
	await(t, p)
	p.Kill()
	if err := in.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := in.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
		t.Errorf("who was left behind lives: %v", err)
	}
}

func TestStartRefuses(t *testing.T) {
	r := New()
	defer r.Close()
	for _, argv := range [][]string{nil, {""}, {"no-such-program"}, {"/etc/hostname"}} {
		if _, err := r.Start(argv, nil, null(t)); err == nil {
			t.Errorf("%q started", argv)
		}
	}
}
