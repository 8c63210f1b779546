package main

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"testing"

	"rollcall/registrar/docker/dockertest"
)

// tempDir is where the program is built: a test may have another for itself.
var tempDir = os.TempDir()

// buildDir holds the program under test. It is empty until a test needs it.
var buildDir string

// build builds the program once for all tests, with the race detector if they
// have it.
var build = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp(tempDir, "rc")
	if err != nil {
		return "", err
	}
	buildDir = dir
	path := filepath.Join(dir, "rollcall")
	args := []string{"build", "-o", path}
	if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		args = append(args, "-race")
	}
	if out, err := exec.Command("go", append(args, ".")...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
})

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
	if err := flag.Set("test.parallel", "4"); err != nil {
		panic(err)
	}
	code := m.Run()
	if err := dockertest.Stop(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if buildDir != "" {
		if err := os.RemoveAll(buildDir); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
	os.Exit(code)
}
