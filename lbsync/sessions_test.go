package lbsync_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"rollcall/lbsync/dataplane"
	"rollcall/lbsync/dataplane/dataplanetest"
	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
)

// TestSessionThatCannotBeCut has a session outlast the drain deadline of an added
// server behind the Data Plane API, which cannot cut it. The server stays in maint,
// looked at and not touched, and is deleted when the session has ended.
func TestSessionThatCannotBeCut(t *testing.T) {
	t.Parallel()
	w := newWorld(t, haproxytest.Backend{Name: "be", TCP: true, Balance: "leastconn"}, "")
	said := &lockedLog{}
	w.log = zerolog.New(said).Level(zerolog.InfoLevel)
	w.cfg.DrainTimeout, w.cfg.Full = 100*time.Millisecond, 2*time.Second
	defer func() {
		if t.Failed() {
			t.Log(said)
		}
	}()
	api := dataplanetest.Start(t, w.ha.Socket, dataplanetest.Options{})
	c, err := dataplane.New(dataplane.Config{URL: api.URL, User: api.User, PasswordFile: api.PasswordFile, Timeout: 10 * time.Second}, w.log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	stop := w.run(t, c)
	a, b := echo(t), echo(t)
	w.beat(t, a, 100)
	w.want(t, "be", map[string]string{a.String(): "ready 100"})
	s := dial(t, w.ha.Addr("be"))
	w.beat(t, b, 100)
	w.want(t, "be", map[string]string{a.String(): "ready 100", b.String(): "ready 100"})
	w.leave(t, a)
	w.want(t, "be", map[string]string{a.String(): "maint 0", b.String(): "ready 100"})

	// Whatever is asked meanwhile, nothing is changed.
	const path = "/runtime/backends/be/servers"
	count := func(requests []string, method, end string) (n int) {
		for _, r := range requests {
			if strings.HasPrefix(r, method+" ") && strings.Contains(r, path+end) {
				n++
			}
		}
		return n
	}
	settled := len(api.Requests())
	haproxytest.Poll(t, "lbsync says that it waits", func() error {
		return said.since("sessions of a leaving server have not ended", `"sessions":1`, 1)
	})
	haproxytest.Poll(t, "the server has been looked at again and again", func() error {
		if n := count(api.Requests()[settled:], "GET", ""); n < 8 {
			return fmt.Errorf("%d times", n)
		}
		return nil
	})
	if err := s.alive(); err != nil {
		t.Errorf("the session was cut: %v", err)
	}
	waited := api.Requests()[settled:]
	if i := slices.IndexFunc(waited, func(r string) bool { return !strings.HasPrefix(r, "GET ") }); i >= 0 {
		t.Errorf("after maint: %s", waited[i])
	}
	_ = s.conn.Close()
	w.want(t, "be", map[string]string{b.String(): "ready 100"})
	haproxytest.Poll(t, "lbsync says that it is gone", func() error { return said.since(`"message":"gone"`, "", 1) })
	stop()
	if n := count(api.Requests(), "DELETE", "/"); n != 1 {
		t.Errorf("%d tries to delete it, want 1", n)
	}
	for words, n := range map[string]int{"sessions of a leaving server": 1, "refused": 0, `"message":"gone"`: 1} {
		if got := strings.Count(said.String(), words); got != n {
			t.Errorf("%d lines with %q, want %d", got, words, n)
		}
	}
}

// TestSessionOfMaint has an instance leave that an operator has put into maint
// before, with a session that goes on. It is cut when the drain's time is over.
func TestSessionOfMaint(t *testing.T) {
	t.Parallel()
	w := newWorld(t, haproxytest.Backend{Name: "be", TCP: true, Balance: "leastconn"}, "")
	w.cfg.DrainTimeout = time.Second
	w.run(t, w.client(t))
	a := echo(t)
	w.beat(t, a, 100)
	w.want(t, "be", map[string]string{a.String(): "ready 100"})
	s := dial(t, w.ha.Addr("be"))
	w.word(t, a, registrar.Word{Verb: "maint"})
	w.want(t, "be", map[string]string{a.String(): "maint 0"})
	if err := s.alive(); err != nil {
		t.Fatalf("maint has cut the session: %v", err)
	}
	left := time.Now()
	w.leave(t, a)
	haproxytest.Poll(t, "the session is cut", func() error {
		if err := s.alive(); err == nil {
			return fmt.Errorf("%v", w.servers(t, "be"))
		}
		return nil
	})
	if took := time.Since(left); took < w.cfg.DrainTimeout {
		t.Errorf("cut after %v", took)
	}
	w.want(t, "be", map[string]string{})
}
