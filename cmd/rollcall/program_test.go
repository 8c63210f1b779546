package main

import (
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"rollcall/registrar/redistest"
)

// TestSidecarProgram holds the program that has register alone: it registers,
// serves metrics and leaves as the whole one does, knows no other command, and is
// without the packages that it is there to be without.
func TestSidecarProgram(t *testing.T) {
	t.Parallel()
	path, err := buildSidecar()
	if err != nil {
		t.Fatal(err)
	}
	s := &system{redis: redistest.Start(t), program: path}
	const addr = "10.0.0.7:80"
	side := s.monitor(t, "register", "--service", "web", "--addr", addr)
	s.comes(t, addr)
	if _, body, err := side.get("/metrics"); err != nil || !strings.Contains(body, registeredName+`{addr="`+addr+`"`) {
		t.Errorf("%v\n%s", err, body)
	}
	if code := side.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit code %d", code)
	}
	s.goes(t, addr, "left")

	if out, text, code := s.rollcall(t, "lbsync"); code != exitUsage || out != "" ||
		text != "rollcall: unknown command \"lbsync\"; see rollcall-sidecar help\n" {
		t.Errorf("lbsync: exit code %d\n%s%s", code, out, text)
	}

	out, err := exec.Command("go", "list", "-deps", "-tags", "sidecar", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, without := range []string{"github.com/haproxytech/", "github.com/moby/", "rollcall/lbsync", "rollcall/notifier", "rollcall/reaper"} {
		if strings.Contains(string(out), without) {
			t.Errorf("rollcall-sidecar is linked with %s", without)
		}
	}
}
