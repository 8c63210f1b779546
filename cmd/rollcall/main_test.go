package main

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"

	"rollcall/registrar/docker/dockertest"
)

// tempDir is where the program is built: a test may have another for itself.
var tempDir = os.TempDir()

var (
	// buildDirs hold the programs under test: none until a test needs one.
	buildDirs []string
	buildLock sync.Mutex

	build        = sync.OnceValues(func() (string, error) { return buildProgram("rollcall") })
	buildSidecar = sync.OnceValues(func() (string, error) { return buildProgram("rollcall-sidecar", "-tags", "sidecar") })
)

// buildProgram builds one, with the race detector if the tests have it.
func buildProgram(name string, args ...string) (string, error) {
	dir, err := os.MkdirTemp(tempDir, "rc")
	if err != nil {
		return "", err
	}
	buildLock.Lock()
	buildDirs = append(buildDirs, dir)
	buildLock.Unlock()
	path := filepath.Join(dir, name)
	args = append([]string{"build", "-o", path}, args...)
	if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		args = append(args, "-race")
	}
	if out, err := exec.Command("go", append(args, ".")...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("go %v: %w\n%s", args, err, out)
	}
	return path, nil
}

// binary returns the path of the program under test.
func binary(tb testing.TB) string {
	tb.Helper()
	path, err := build()
	if err != nil {
		tb.Fatal(err)
	}
	return path
}

func TestMain(m *testing.M) {
	// These tests wait for servers far more than they compute.
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if !given {
		if err := flag.Set("test.parallel", "4"); err != nil {
			panic(err)
		}
	}
	// A program built with -race sleeps for 1 s before it ends with 0.
	if err := os.Setenv("GORACE", strings.TrimSpace(os.Getenv("GORACE")+" atexit_sleep_ms=0")); err != nil {
		panic(err)
	}
	// An lbsync that is told nothing keeps its id here, and not on this machine.
	state, err := os.MkdirTemp("", "rc")
	if err != nil {
		panic(err)
	}
	buildDirs = append(buildDirs, state)
	if err := os.Setenv("STATE_DIRECTORY", state); err != nil {
		panic(err)
	}
	// Likewise a sidecar.
	if err := os.Setenv("RUNTIME_DIRECTORY", state); err != nil {
		panic(err)
	}
	code := m.Run()
	if err := dockertest.Stop(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	for _, dir := range buildDirs {
		if err := os.RemoveAll(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
	os.Exit(code)
}
