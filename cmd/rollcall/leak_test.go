package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/redis/go-redis/v9"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// played is one run of the program: all that it printed, and how it was called.
type played struct {
	name, out, cmdline string
}

// timed is what was written, and calls first with the first of it.
type timed struct {
	said  bytes.Buffer // not embedded: io.Copy would go past Write
	first func()
}

func (b *timed) Write(p []byte) (int, error) {
	if b.said.Len() == 0 {
		b.first()
	}
	return b.said.Write(p)
}

// runFor runs the program with these variables, and ends it if it has not ended
// by itself: d after it first prints, or ten times as long after its start.
func runFor(t *testing.T, d time.Duration, env []string, args ...string) played {
	t.Helper()
	path := binary(t) // which is built once
	ctx, cancel := context.WithTimeout(t.Context(), 10*d)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), env...)
	out := timed{first: func() { time.AfterFunc(d, cancel) }}
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // how it ends is other tests' matter
	return played{name: strings.Join(args, " "), out: out.said.String(), cmdline: string(line)}
}

// TestSecretsStaySecret runs every role with passwords of each source against
// servers that refuse them, are not there, or hang, and looks for them in all
// that is printed and in the process list.
func TestSecretsStaySecret(t *testing.T) {
	t.Parallel()
	const secret = "s3kr1t%41pw"
	srv := redistest.Start(t)
	if err := srv.Client(t).ConfigSet(t.Context(), "requirepass", "another").Err(); err != nil {
		t.Fatal(err)
	}
	hang, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer hang.Close()
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	absent := gone.Addr().String()
	_ = gone.Close() // nobody listens there now
	file := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(file, []byte(secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	sources := []func(addr string) []string{
		func(addr string) []string {
			return []string{"ROLLCALL_REDIS=redis://user@" + addr, "ROLLCALL_REDIS_PASSWORD=" + secret}
		},
		func(addr string) []string {
			return []string{"ROLLCALL_REDIS=redis://" + addr, "ROLLCALL_REDIS_PASSWORD_FILE=" + file}
		},
		func(addr string) []string {
			return []string{"ROLLCALL_REDIS=redis://user:s3kr1t%2541pw@" + addr + "/0"}
		},
		func(addr string) []string { // one that cannot be parsed
			return []string{"ROLLCALL_REDIS=redis://user:" + secret + "@" + addr + "/x y%zz"}
		},
		func(addr string) []string {
			return []string{"ROLLCALL_REDIS=redis-sentinel://user:" + secret + "@" + addr + "/mymaster", "ROLLCALL_SENTINEL_PASSWORD=" + secret}
		},
	}
	roles := [][]string{
		{"register", "--service", "web", "--addr", "10.0.0.1:80"}, {"reap"}, {"lbsync", "--socket", "/none", "--backend", "web=be"}, {"watch"},
		{"services"}, {"status"}, {"doctor"}, {"drain", "web", "10.0.0.1:80"},
		{"lbsync", "--dataplane", "http://" + absent, "--dataplane-user", "admin", "--dataplane-password-file", file, "--backend", "web=be"},
	}
	var mu sync.Mutex
	var all []played
	var running sync.WaitGroup
	few := make(chan struct{}, 6)
	for i, role := range roles {
		for j, addr := range []string{srv.Addr, absent, hang.Addr().String()} {
			for k, source := range sources {
				if (i+j+k)%3 != 0 { // each role meets each server and each source
					continue
				}
				running.Go(func() {
					few <- struct{}{}
					p := runFor(t, 1500*time.Millisecond, append(source(addr), "ROLLCALL_LOG_LEVEL=debug", "ROLLCALL_LOG_FORMAT="+[]string{"text", "json"}[k%2]), role...)
					<-few
					mu.Lock()
					all = append(all, p)
					mu.Unlock()
				})
			}
		}
	}
	running.Wait()
	said := 0
	for _, p := range all {
		said += len(p.out)
		for _, word := range []string{secret, "s3kr1t", "czNrcjF0"} { // the last: in base64
			if strings.Contains(p.out, word) || strings.Contains(p.cmdline, word) {
				t.Errorf("rollcall %s shows a password\nin %q\nor %q", p.name, p.out, p.cmdline)
			}
		}
	}
	if len(all) < 45 || said < 100*len(all)/2 {
		t.Errorf("%d runs printed %d bytes: too little to judge by", len(all), said)
	}
}

// TestNothingForgesOutput has a registry full of what drives terminals, breaks
// lines and is endless. Neither logs of both formats nor tables let it through.
func TestNothingForgesOutput(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t)
	ha := haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 3}}})
	rdb := srv.Client(t)
	store, err := registrar.NewStore(rdb, "rollcall")
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	k := store.Keys()
	now := rdb.Time(ctx).Val().UnixMilli()
	const forged = "FORGED"
	evil := "\x1b[31m\x1b]0;x\x07\r\n" + forged + "\u2028\u202e\u2066\u009b\x7f\xff\xfe" + strings.Repeat("A", 20000)
	quoted, err := json.Marshal(evil)
	if err != nil {
		t.Fatal(err)
	}
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for i, m := range []string{"10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80", evil, "10.0.0.4:80" + evil} {
		do(rdb.ZAdd(ctx, k.Instances("web"), redis.Z{Score: float64(now), Member: m}).Err())
		do(rdb.HSet(ctx, k.Meta("web"), m, []string{
			`{"id":` + string(quoted) + `,"weight":1,"zone":` + string(quoted) + `,"tags":{` + string(quoted) + `:` + string(quoted) + `}}`, evil, "{", evil, evil}[i]).Err())
		do(rdb.HSet(ctx, k.Admin("web"), m, `{"state":"drain","reason":`+string(quoted)+`}`).Err())
	}
	do(rdb.HSet(ctx, k.Admin("web"), "10.0.0.3:80", `{"state":`+string(quoted)+`}`).Err())
	do(rdb.HSet(ctx, k.Gone("web"), "10.0.0.9:80", "left 1 "+evil, "10.0.0.8:80", evil, evil, evil).Err())
	do(rdb.SAdd(ctx, k.Services(), "web", evil).Err())
	do(rdb.Incr(ctx, k.ServiceVersion("web")).Err())
	do(rdb.HSet(ctx, k.Applied("web"), evil, "1", "lb", evil).Err())
	do(rdb.ZAdd(ctx, k.Balancers(), redis.Z{Score: float64(now), Member: evil}).Err())
	do(rdb.HSet(ctx, k.Reapers(), evil, `{"armed":false,"cause":`+string(quoted)+`,"at":`+fmt.Sprint(now)+`}`, "r", evil).Err())

	runs := [][]string{{"services"}, {"instances", "web"}, {"lb"}, {"status"}, {"watch"}, {"doctor"}, {"reap"}, {"drain", "web", "10.0.0.1:80"},
		{"lbsync", "--socket", ha.Socket, "--backend", "web=be"}, {"register", "--service", "web", "--addr", "10.0.0.1:80"}}
	var checking sync.WaitGroup
	for _, format := range []string{"text", "json"} {
		for _, args := range runs {
			checking.Go(func() {
				p := runFor(t, 2*time.Second, []string{"ROLLCALL_REDIS=" + srv.URL(), "ROLLCALL_LOG_FORMAT=" + format, "ROLLCALL_LOG_LEVEL=debug"}, args...)
				if p.out == "" {
					t.Errorf("rollcall %s printed nothing", p.name)
				}
				if !utf8.ValidString(p.out) {
					t.Errorf("rollcall %s printed what is no UTF-8", p.name)
				}
				for line := range strings.Lines(p.out) {
					line = strings.TrimSuffix(line, "\n")
					if i := strings.IndexFunc(line, func(r rune) bool { return unicode.In(r, unicode.Cc, unicode.Zl) }); i >= 0 {
						t.Errorf("rollcall %s lets %q through", p.name, line[i:min(len(line), i+40)])
					}
					if strings.HasPrefix(strings.TrimSpace(line), forged) {
						t.Errorf("rollcall %s printed a forged line: %.60q", p.name, line)
					}
				}
			})
		}
	}
	checking.Wait()
}
