package main

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// answerRow is a row of the migration page's table of what `wait` says.
type answerRow struct {
	words *regexp.Regexp
	code  int
	seen  bool
}

// answerRows reads that table. An "…" of the page is anything.
func answerRows(t *testing.T) (rows []*answerRow) {
	t.Helper()
	text, err := os.ReadFile(migration)
	must(t, err)
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\| (\\d) \\|").FindAllStringSubmatch(string(text), -1) {
		code, err := strconv.Atoi(m[2])
		must(t, err)
		rows = append(rows, &answerRow{words: regexp.MustCompile(strings.ReplaceAll(regexp.QuoteMeta(m[1]), "…", ".*")), code: code})
	}
	return rows
}

// TestMigration plays the migration page's steps under traffic, by the page's own
// commands: servers that a template wrote, rollcall's beside them, and then rollcall's
// alone. One instance is in a network that lbsync does not allow, and HAProxy's check of
// another one fails: with these two the page stops before the template's servers are
// deleted, and names them.
func TestMigration(t *testing.T) {
	t.Parallel()
	refused, down := haproxytest.NewInstance6(t), haproxytest.NewInstance(t)
	// The template's lines have no check, so they serve an instance that says it is ill.
	old := []string{fmt.Sprintf("server confd_0 %s", refused.Addr()), fmt.Sprintf("server confd_1 %s", down.Addr())}
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{StateFile: true, Backends: []haproxytest.Backend{{
		Name: "be_web", Balance: "leastconn", Check: true, Slots: 5, Extra: old,
	}}})}
	url := "http://" + s.ha.Addr("be_web") + "/"
	var commands []string
	for _, b := range blocks(t, migration, "console") {
		commands = append(commands, strings.Split(strings.TrimSpace(b), "\n")...)
	}
	want := []string{
		"rollcall reap", "rollcall doctor",
		"rollcall lbsync --socket /run/haproxy/admin.sock --backend web=be_web --dry-run",
		"rollcall lbsync --socket /run/haproxy/admin.sock --backend web=be_web",
		"rollcall instances web",
		"rollcall wait web --for ready=2", "rollcall status", "rollcall doctor --socket /run/haproxy/admin.sock --backend web=be_web",
	}
	if !slices.Equal(commands, want) {
		t.Fatalf("the page has the commands %q", commands)
	}
	const reap, look, dry, sync, instances, wait, status, doctor = 0, 1, 2, 3, 4, 5, 6, 7
	words := func(i int, more ...string) []string {
		line := strings.ReplaceAll(strings.TrimPrefix(commands[i], "rollcall "), "/run/haproxy/admin.sock", s.ha.Socket)
		return append(strings.Fields(line), more...)
	}
	// becomes polls until a command ends with code and has said all of parts.
	becomes := func(i, code int, parts ...string) {
		t.Helper()
		haproxytest.Poll(t, fmt.Sprintf("%s: exit %d, %q", commands[i], code, parts), func() error {
			out, stderr, got := s.rollcall(t, words(i)...)
			for _, p := range parts {
				if !strings.Contains(out+stderr, p) {
					return fmt.Errorf("no %q in exit %d, %s%s", p, got, out, stderr)
				}
			}
			if got != code {
				return fmt.Errorf("exit %d, %s%s", got, out, stderr)
			}
			return nil
		})
	}
	rows := answerRows(t)
	// waits polls until `wait` gives one answer of the page's table, about what.
	waits := func(code int, what string) {
		t.Helper()
		haproxytest.Poll(t, fmt.Sprintf("wait exits with %d and says %s", code, what), func() error {
			_, stderr, got := s.rollcall(t, words(wait, "--timeout", "300ms")...)
			if got != code || !strings.Contains(stderr, what) {
				return fmt.Errorf("exit %d, %s", got, stderr)
			}
			for _, r := range rows {
				if r.code == code && r.words.MatchString(stderr) {
					r.seen = true
					return nil
				}
			}
			t.Fatalf("the page does not have: exit %d, %s", code, stderr)
			return nil
		})
	}

	answered(t, url, refused, down)
	l := startLoad(t, url)
	s.spawn(t, words(reap)...)
	becomes(look, 0, "reapers")
	waits(exitWait, "nobody has ever registered as web")
	if stdout, stderr, code := s.rollcall(t, words(dry)...); code != 0 || stdout != "" || !strings.Contains(stderr, "nobody has ever registered as web") {
		t.Errorf("dry run without an instance: exit %d: %s%s", code, stdout, stderr)
	}
	lb := s.spawn(t, words(sync, "--allow", "127.0.0.0/8")...)
	s.spawn(t, "register", "--service", "web", "--addr", down.Addr().String())
	waits(exitWait, "1 are registered to serve")
	down.SetHealthy(false)
	s.spawn(t, "register", "--service", "web", "--addr", refused.Addr().String())
	becomes(instances, 0, refused.Addr().String(), down.Addr().String(), "excluded (::1 is in none of the allowed networks)", "down (its health check in HAProxy fails)")

	// The page's gate: whatever is wrong stops it at its first command.
	gate := func() {
		t.Helper()
		for _, i := range []int{wait, status, doctor} {
			if out, stderr, code := s.rollcall(t, words(i)...); code != 0 {
				t.Fatalf("%s: exit %d, %s%s", commands[i], code, out, stderr)
			}
		}
	}
	waits(exitFailed, "every balancer refuses "+refused.Addr().String())
	becomes(status, exitFailed, "web: every balancer refuses "+refused.Addr().String(), "down: "+down.Addr().String())
	becomes(doctor, exitFailed, "excluded: "+refused.Addr().String(), "down: "+down.Addr().String())
	lb.signal(t, syscall.SIGTERM)
	lb = s.spawn(t, words(sync, "--allow", "127.0.0.0/8", "--allow", "::1/128")...)
	waits(exitWait, "not "+down.Addr().String()+" at ")
	becomes(status, 0, "down: "+down.Addr().String())
	down.SetHealthy(true)
	haproxytest.Poll(t, "both serve", func() error {
		if _, stderr, code := s.rollcall(t, words(wait)...); code != 0 {
			return fmt.Errorf("exit %d: %s", code, stderr)
		}
		return nil
	})
	gate()

	serving := func() (n int) {
		for _, row := range strings.Split(s.ha.Command(t, "show stat be_web 4 -1"), "\n") {
			if f := strings.Split(row, ","); len(f) > 17 && strings.HasPrefix(f[1], "s") && strings.HasPrefix(f[17], "UP") {
				n++
			}
		}
		return n
	}
	for _, line := range old {
		s.ha.Edit(t, line, "")
	}
	s.ha.Reload(t)
	answered(t, url, refused, down)
	if n := serving(); n != 2 {
		t.Errorf("%d of rollcall's servers are up after the last reload", n)
	}
	l.stop()
	if n, f := l.sent.Load(), l.failed.Load(); f > 0 || n == 0 {
		t.Errorf("%d of %d requests failed, the last with: %s", f, n, l.last)
	} else {
		t.Logf("%d requests, 0 failed", n)
	}
	if code := lb.signal(t, syscall.SIGTERM); code != 0 {
		t.Errorf("lbsync ends with %d", code)
	}
	if serving() != 2 {
		t.Error("the way back: the servers went with lbsync")
	}
	waits(exitWait, "no live balancer follows web")
	for _, r := range rows {
		if elsewhere := regexp.MustCompile("unplaced|silent").MatchString(r.words.String()); r.seen == elsewhere { // TestServing plays these two
			t.Errorf("%s: said %v", r.words, r.seen)
		}
	}
	if len(rows) != 7 {
		t.Errorf("the page's table has %d rows", len(rows))
	}
}
