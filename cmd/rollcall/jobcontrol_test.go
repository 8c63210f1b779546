package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// terminal is a terminal with a process on it that leads its session.
type terminal struct {
	*process
	master *os.File
}

// openTerminal starts a command on a new terminal. The test's end kills it.
func openTerminal(t *testing.T, env []string, argv ...string) *terminal {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fd := int(master.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := &process{cmd: exec.Command(argv[0], argv[1:]...), out: &lockedBuffer{}, done: make(chan struct{})}
	p.cmd.Env = append(append(p.cmd.Environ(), "PS1=", "PS2=", "TERM=dumb", "HISTFILE="), env...)
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = slave, slave, slave
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	slave.Close()
	read := make(chan struct{})
	go func() {
		defer close(read)
		buf := make([]byte, 4096)
		for {
			n, err := master.Read(buf)
			_, _ = p.out.Write(buf[:n])
			if err != nil { // EIO: nobody has the other end
				return
			}
		}
	}()
	go func() {
		defer close(p.done)
		_ = p.cmd.Wait()
	}()
	t.Cleanup(func() {
		// All of the session, which its end's SIGHUP would not end if it is stopped.
		for _, pid := range inSession(t, p.cmd.Process.Pid) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		<-p.done
		master.Close()
		<-read
		if t.Failed() {
			t.Logf("the terminal:\n%s", p.out)
		}
	})
	return &terminal{p, master}
}

// stat is /proc/PID/stat from the state on: state, parent, group, session, terminal,
// the terminal's foreground group.
func stat(pid int) []string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return []string{"-", "", "", "", "", ""}
	}
	return strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
}

// knowsStopped waits until the shell knows that a job in the background has been stopped:
// until then its fg would not have the job go on.
func (c *terminal) knowsStopped(t *testing.T) {
	t.Helper()
	before := strings.Count(c.out.String(), "Stopped")
	haproxytest.Poll(t, "the shell knows that the job is stopped", func() error {
		if strings.Count(c.out.String(), "Stopped") > before {
			return nil
		}
		c.types(t, "jobs\n")
		return errors.New("not yet")
	})
}

// inSession returns the processes of a session.
func inSession(t *testing.T, leader int) (pids []int) {
	t.Helper()
	all, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		var pid int
		if _, err := fmt.Sscan(e.Name(), &pid); err == nil && stat(pid)[3] == fmt.Sprint(leader) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func (c *terminal) types(t *testing.T, text string) {
	t.Helper()
	if _, err := c.master.WriteString(text); err != nil {
		t.Fatal(err)
	}
}

// number returns the number that the terminal shows after a word, the last time.
func (c *terminal) number(t *testing.T, word string) (n int) {
	t.Helper()
	haproxytest.Poll(t, "the terminal shows "+word, func() error {
		out := c.out.String()
		i := strings.LastIndex(out, word)
		if i < 0 {
			return errors.New(out)
		}
		_, err := fmt.Sscanf(out[i+len(word):], "%d.", &n)
		return err
	})
	return n
}

// stands waits until a process is in one of these states and, of these, has its
// terminal or not.
func stands(t *testing.T, what string, pid int, states string, foreground bool) {
	t.Helper()
	haproxytest.Poll(t, what, func() error {
		s := stat(pid)
		if !strings.Contains(states, s[0]) || (s[2] == s[5]) != foreground {
			return fmt.Errorf("state %s, group %s, foreground %s", s[0], s[2], s[5])
		}
		return nil
	})
}

// asked is an app that answers each line, says its terminal's size when that changes,
// and tells its process id.
const asked = `trap 'echo size=$(stty size)' WINCH; echo app=$$.; while :; do if read line; then echo "got[$line]"; fi; done`

// TestAtATerminal uses an app by hand, around which register is, with a shell's job
// control.
func TestAtATerminal(t *testing.T) {
	t.Parallel()
	const addr = "127.0.0.1:9001"
	for _, shell := range [][]string{{"bash", "--norc", "--noprofile", "-i"}, {"dash", "-i"}} {
		t.Run(shell[0], func(t *testing.T) {
			s := &system{redis: redistest.Start(t)}
			c := openTerminal(t, []string{"ROLLCALL_REDIS=" + s.redis.URL(), "APP=" + asked, "RC=" + binary(t)}, shell...)
			c.types(t, "stty -echo; modes=$(stty -g); echo begun=1.\n")
			c.number(t, "begun=")
			const run = `$RC register --service web --addr ` + addr + ` -- sh -c "$APP"`
			c.types(t, run+"\n")
			app := c.number(t, "app=")
			sidecar := 0
			fmt.Sscan(stat(app)[1], &sidecar)
			first := s.comes(t, addr)
			stands(t, "the app waits for a line and has the terminal", app, "S", true)
			c.types(t, "one\n")
			c.says(t, "got[one]")

			if err := unix.IoctlSetWinsize(int(c.master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 33, Col: 77}); err != nil {
				t.Fatal(err)
			}
			c.types(t, "\n") // dash tells what its traps do after its read
			c.says(t, "size=33 77")

			// Ctrl-Z stops the job, and a stopped app is not registered.
			c.types(t, "\x1a")
			s.goes(t, addr, "unhealthy")
			stands(t, "the app is stopped", app, "T", false)
			stands(t, "so is the sidecar", sidecar, "T", false)
			c.types(t, "echo shell=$((6*7)).\n")
			if n := c.number(t, "shell="); n != 42 {
				t.Errorf("the shell says %d", n)
			}
			// bg has it go on, until it wants to read.
			c.types(t, "bg\n")
			c.says(t, `signal="stopped (tty input)"`)
			stands(t, "the app is stopped by its read", app, "T", false)
			stands(t, "so is the sidecar", sidecar, "T", false)
			c.knowsStopped(t)
			// fg gives it the terminal.
			c.types(t, "fg\n")
			haproxytest.Poll(t, "it is registered anew", func() error {
				if now := s.token(t, addr); now == "" || now == first {
					return fmt.Errorf("token %q", now)
				}
				return nil
			})
			stands(t, "the app has the terminal", app, "S", true)
			c.types(t, "two\n")
			c.says(t, "got[two]")

			// Ctrl-C is the app's, whose end makes the instance leave.
			c.types(t, "\x03")
			s.goes(t, addr, "left")
			c.types(t, "echo code=$?.\n")
			if n := c.number(t, "code="); n != 130 {
				t.Errorf("exit %d", n)
			}

			// In the background it takes the terminal from nobody.
			c.types(t, `$RC register --service web --addr `+addr+` -- sh -c 'echo back=$$.; sleep 300; echo' &`+"\n")
			back := c.number(t, "back=")
			s.comes(t, addr)
			stands(t, "the app runs in the background", back, "S", false)
			c.types(t, "echo still=$((7*7)).\n")
			if n := c.number(t, "still="); n != 49 {
				t.Errorf("the shell says %d", n)
			}
			fmt.Sscan(stat(back)[1], &sidecar)
			if err := syscall.Kill(sidecar, syscall.SIGTERM); err != nil {
				t.Error(err)
			}
			s.goes(t, addr, "left")

			// One that reads there is stopped as a job, until it is in the foreground.
			c.types(t, run+" &\n")
			haproxytest.Poll(t, "another app", func() error {
				if now := c.number(t, "app="); now == app {
					return errors.New("the same")
				}
				return nil
			})
			app = c.number(t, "app=")
			stands(t, "it is stopped", app, "T", false)
			fmt.Sscan(stat(app)[1], &sidecar)
			stands(t, "so is its sidecar", sidecar, "T", false)
			c.knowsStopped(t)
			c.types(t, "fg\n")
			stands(t, "it has the terminal", app, "S", true)
			c.types(t, "three\n")
			c.says(t, "got[three]")
			s.comes(t, addr)
			// One that is killed leaves a terminal that can be used.
			c.types(t, "\x03")
			s.goes(t, addr, "left")
			c.types(t, `$RC register --service web --addr `+addr+` -- sh -c 'stty raw; kill -9 $$'; test "$(stty -g)" = "$modes"; echo changed=$?.`+"\n")
			if n := c.number(t, "changed="); n != 0 {
				t.Error("the terminal's modes are the app's")
			}
		})
	}
}

// TestTerminalWithoutShell: where nobody could have a stopped job go on, as of a
// container's process 1, Ctrl-Z stops nothing for long.
func TestTerminalWithoutShell(t *testing.T) {
	t.Parallel()
	const addr = "127.0.0.1:9001"
	s := &system{redis: redistest.Start(t)}
	c := openTerminal(t, []string{"ROLLCALL_REDIS=" + s.redis.URL()}, binary(t), "register", "--service", "web", "--addr", addr, "--", "sh", "-c", "stty -echo; "+asked)
	app := c.number(t, "app=")
	s.comes(t, addr)
	c.types(t, "one\n")
	c.says(t, "got[one]")
	if out := c.out.String(); strings.Contains(out, "the app is stopped") || strings.Contains(out, "the app goes on") {
		t.Errorf("the app had to wait for the terminal: %s", out)
	}
	c.types(t, "\x1a")
	c.says(t, "the app goes on")
	stands(t, "the app has the terminal", app, "S", true)
	s.comes(t, addr)
	c.types(t, "two\n")
	c.says(t, "got[two]")
	c.types(t, "\x03")
	s.goes(t, addr, "left")
	select {
	case <-c.done:
	case <-time.After(20 * time.Second):
		t.Fatal("it does not end")
	}
	if code := c.cmd.ProcessState.ExitCode(); code != 130 {
		t.Errorf("exit %d", code)
	}
}

// TestAppStopped: an app that is stopped by hand, without a terminal, is said to be and
// stays registered; it ends with the sidecar all the same.
func TestAppStopped(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	p := s.around(t, "--addr", "127.0.0.1:9001", "--stop-timeout", "10m", "--", "sh", "-c", "echo app=$$.; trap 'exit 9' TERM; while :; do sleep 0.05; done")
	token := s.comes(t, "127.0.0.1:9001")
	p.says(t, "app=")
	var app int
	_, rest, _ := strings.Cut(p.out.String(), "app=")
	fmt.Sscan(strings.TrimSuffix(strings.Fields(rest)[0], "."), &app)
	signal := func(sig syscall.Signal) {
		t.Helper()
		if err := syscall.Kill(app, sig); err != nil {
			t.Fatal(err)
		}
	}
	signal(syscall.SIGSTOP)
	p.says(t, "the app is stopped and answers nobody")
	signal(syscall.SIGCONT)
	p.says(t, "the app goes on")
	signal(syscall.SIGTSTP)
	haproxytest.Poll(t, "it is said again", func() error {
		if n := strings.Count(p.out.String(), "the app is stopped"); n != 2 {
			return fmt.Errorf("%d times", n)
		}
		return nil
	})
	if now := s.token(t, "127.0.0.1:9001"); now != token {
		t.Errorf("token %s became %q", token, now)
	}
	if code := p.signal(t, syscall.SIGTERM); code != 9 {
		t.Errorf("exit %d", code)
	}
}
