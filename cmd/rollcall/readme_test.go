package main

import (
	"context"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/urfave/cli/v2"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// readme and migration are the pages whose commands are run.
const (
	readme    = "../../README.md"
	migration = "../../scripts/deploy/migration.md"
)

// blocks returns a page's fenced blocks of one language.
func blocks(t *testing.T, page, language string) []string {
	t.Helper()
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, m := range regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```$").FindAllStringSubmatch(string(text), -1) {
		out = append(out, m[1])
	}
	return out
}

// TestReadmeCommands runs every sh block of the README, in order, in one shell,
// on private servers in the place of the ones that it names.
func TestReadmeCommands(t *testing.T) {
	t.Parallel()
	redis := redistest.Start(t)
	ha := haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be_web", Slots: 5}}})
	dir := t.TempDir()
	redisCLI, err := exec.LookPath("redis-cli")
	if err != nil {
		t.Fatal(err)
	}
	for name, line := range map[string]string{
		"redis-cli": "exec " + redisCLI + " -e -h " + redis.Host + ` "$@"`,
		"rollcall":  "exec " + binary(t) + ` "$@"`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+line+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	script := strings.Join(blocks(t, readme, "sh"), "\n")
	if n := strings.Count(script, "\n"); n < 30 {
		t.Fatalf("the README has only %d lines to run", n)
	}
	script = strings.NewReplacer("127.0.0.1:6379", redis.Addr, "/run/haproxy/admin.sock", ha.Socket,
		"serve --token-file", "serve --listen "+redis.Host+":8300 --token-file", "127.0.0.1:8300", redis.Host+":8300").Replace(script)
	// At the end: who was registered serves, and what runs ends.
	script = "set -eux\ntrap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT\n" + script + `
redis-cli zrange 'rollcall:{web}:instances' 0 -1 | grep -qx 127.0.0.1:9002
`
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-c", script)
	cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"127.0.0.1:9001  ready", "127.0.0.1:9003", `"zone":"a"`, "drain, version", "left", `"service":"web","version":`, `"done":"weight"`, `"applied":true`} {
		if !strings.Contains(string(out), want) {
			t.Errorf("nothing printed %q", want)
		}
	}
	if t.Failed() {
		t.Logf("%s", out)
	}
}

// TestPagesHAProxy has HAProxy itself check the pages' configurations.
func TestPagesHAProxy(t *testing.T) {
	for _, page := range []string{readme, migration} {
		checkHAProxy(t, strings.Join(blocks(t, page, "haproxy"), "\n"))
	}
}

func checkHAProxy(t *testing.T, text string) {
	t.Helper()
	dir := t.TempDir()
	text = strings.ReplaceAll(text, "/run/haproxy/admin.sock", filepath.Join(dir, "s"))
	text = strings.ReplaceAll(text, "\ndefaults\n", "\ndefaults\n    mode http\n    timeout connect 1s\n    timeout client 1s\n    timeout server 1s\n")
	file := filepath.Join(dir, "haproxy.cfg")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("haproxy", "-c", "-f", file).CombinedOutput()
	if err != nil || strings.Contains(string(out), "[ALERT]") {
		t.Errorf("%v\n%s\n%s", err, out, text)
	}
}

// TestReadmeConsole holds what the other commands of the README are: each is
// run by another test or is how the tests are run.
func TestReadmeConsole(t *testing.T) {
	known := []string{
		"scripts/demo", "scripts/test", "scripts/bench",
		"scripts/build", "scripts/build", "scripts/build --sidecar", // TestBuild
		"CGO_ENABLED=0 go build -trimpath -o app ./scripts/deploy/app", "docker build -t app -f scripts/deploy/app/Dockerfile .", // TestEngineCompose
		"docker build -t rollcall -f scripts/deploy/Dockerfile .",                                // TestEngineCompose
		"docker compose -f scripts/deploy/compose.yaml up -d --scale web=3",                      // the same
		"rollcall docker --advertise 10.0.0.7",                                                   // TestEngineCommand
		"rollcall reap --http 127.0.0.1:9464",                                                    // TestMetricsOfReaper
		`rollcall lbsync --backend api=be_api --server-options "check inter 2s downinter 200ms"`, // TestDynamicServersByFlag
		"rollcall lbsync --dataplane https://lb1:5555 --dataplane-user rollcall --dataplane-password-file /etc/rollcall/password --dataplane-ca /etc/rollcall/ca.pem --backend web=be_web", // TestDataplane
	}
	var got []string
	for _, b := range blocks(t, readme, "console") {
		got = append(got, strings.Split(strings.TrimSpace(b), "\n")...)
	}
	slices.Sort(got)
	slices.Sort(known)
	if !slices.Equal(got, known) {
		t.Errorf("got  %q\nwant %q", got, known)
	}
}

// TestReadmeReference holds the table of commands to the commands.
func TestReadmeReference(t *testing.T) {
	text, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "\n## Commands\n")
	section, _, _ = strings.Cut(section, "\n## ")
	rows := map[string]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z]+)(?: [^`]*)?` \\|(.*)$").FindAllStringSubmatch(section, -1) {
		rows[m[1]] = m[2]
	}
	common := map[string]bool{}
	for _, f := range redisFlags(outputFlag()) {
		common[f.Names()[0]] = true
	}
	for _, c := range newApp(nil, nil).Commands {
		if c.Hidden {
			continue
		}
		row, ok := rows[c.Name]
		if !ok {
			t.Errorf("the README does not have %s", c.Name)
		}
		var flags []string
		for _, f := range c.Flags {
			if name := f.Names()[0]; name != "help" && !common[name] {
				flags = append(flags, name)
			}
			if e, ok := f.(cli.DocGenerationFlag); ok && e.GetUsage() == "" {
				t.Errorf("%s --%s says nothing in --help", c.Name, f.Names()[0])
			}
		}
		var listed []string
		for _, m := range regexp.MustCompile("`--([a-z-]+)`").FindAllStringSubmatch(row, -1) {
			listed = append(listed, m[1])
		}
		slices.Sort(flags)
		slices.Sort(listed)
		if !slices.Equal(flags, listed) {
			t.Errorf("%s has %v, the README %v", c.Name, flags, listed)
		}
	}
}

// TestReadmeMessages holds each row of the README's troubleshooting table to a
// message that is in the program's source, part by part around the "…".
func TestReadmeMessages(t *testing.T) {
	text, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(text), "| it says |")
	if !ok {
		t.Fatal("the README has no table of messages")
	}
	table, _, _ := strings.Cut(rest, "\n\n")
	var source []byte
	for _, dir := range []string{".", "../../registrar", "../../reaper", "../../notifier", "../../lbsync"} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			b, err := os.ReadFile(path)
			source = append(source, b...)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	rows := regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllStringSubmatch(table, -1)
	if len(rows) < 15 {
		t.Errorf("only %d rows", len(rows))
	}
	for _, row := range rows {
		for _, part := range strings.Split(row[1], "…") {
			if !strings.Contains(string(source), strings.TrimSpace(part)) {
				t.Errorf("the program never says %q", part)
			}
		}
	}
}
