package lbsync_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"rollcall/lbsync"
	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
)

// This file has haproxy.cfg as people write it.

// noted polls until lbsync has said this note of a, and returns all it has said of it.
func (w *world) noted(t *testing.T, a netip.AddrPort, note string) registrar.ServerState {
	t.Helper()
	var st registrar.ServerState
	haproxytest.Poll(t, fmt.Sprintf("the note of %v is %q", a, note), func() error {
		sights, err := w.store.Sights(context.Background(), "web", []string{w.cfg.ID})
		if err != nil {
			return err
		}
		if st = sights[0].Servers[a]["be"]; st.Note != note {
			return fmt.Errorf("it is %+v", st)
		}
		return nil
	})
	return st
}

// once lets an lbsync of its own do what can be done now.
func (w *world) once(t *testing.T) error {
	t.Helper()
	s, err := lbsync.New(w.cfg, w.client(t), w.store, w.log)
	if err != nil {
		t.Fatal(err)
	}
	return s.Once(t.Context())
}

// looks waits until bal has been asked for n more whole looks.
func (w *world) looks(t *testing.T, bal *counting, n int64) {
	t.Helper()
	from := bal.reads.Load()
	haproxytest.Poll(t, fmt.Sprintf("lbsync has looked %d times at all", n), func() error {
		if got := bal.reads.Load() - from; got < n {
			return fmt.Errorf("%d times", got)
		}
		return nil
	})
}

func TestAnyPlaceholder(t *testing.T) {
	t.Parallel()
	for name, template := range map[string]string{
		"a port":                  "s 1-2 slot.invalid:8080 disabled init-addr last,127.0.0.1",
		"a documentation address": "s 1-2 slot.invalid:80 disabled init-addr last,192.0.2.1",
		"port 80 and a check":     "s 1-2 slot.invalid:80 check inter 50ms rise 1 disabled init-addr last,127.0.0.1",
		"IPv6":                    "s 1-2 slot.invalid:8080 disabled init-addr last,::1",
		"weight 100":              "s 1-2 slot.invalid:8080 weight 100 disabled init-addr last,127.0.0.1",
	} {
		t.Run(name, func(t *testing.T) {
			said := &lockedLog{}
			w := newWorldOn(t, haproxytest.Options{StateFile: true, Backends: []haproxytest.Backend{{Name: "be", Extra: []string{"server-template " + template}}}}, "")
			w.log = zerolog.New(said).Level(zerolog.InfoLevel)
			w.cfg.Backends[0].Mode = lbsync.Slots
			stop := w.run(t, w.client(t))
			a, b, c := haproxytest.NewInstance(t), haproxytest.NewInstance(t), haproxytest.NewInstance(t)
			w.beat(t, a.Addr(), 100)
			w.beat(t, b.Addr(), 100)
			w.want(t, "be", ready(100, a, b))
			w.answers(t, a, b)
			w.leave(t, a.Addr())
			w.want(t, "be", ready(100, b))
			// Another lbsync, and another HAProxy process, find the free slots too.
			stop()
			stop = w.run(t, w.client(t))
			w.beat(t, c.Addr(), 100)
			w.want(t, "be", ready(100, b, c))
			stop()
			w.leave(t, b.Addr())
			w.leave(t, c.Addr())
			w.run(t, w.client(t))
			w.want(t, "be", map[string]string{})
			w.ha.Reload(t)
			w.beat(t, a.Addr(), 100)
			w.beat(t, b.Addr(), 100)
			w.want(t, "be", ready(100, a, b))
			if strings.Contains(said.String(), `"level":"error"`) {
				t.Errorf("said %s", said)
			}
		})
	}
	t.Run("a lone slot", func(t *testing.T) {
		w := newWorldOn(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Extra: []string{"server-template s 1 slot.invalid:8080 disabled init-addr last,127.0.0.1"}}}}, "")
		w.run(t, w.client(t))
		a := haproxytest.NewInstance(t)
		w.beat(t, a.Addr(), 100)
		haproxytest.Poll(t, "the slot has it", func() error {
			if text := w.ha.Command(t, "show servers state be"); !strings.Contains(text, " s1 "+a.Addr().Addr().String()) {
				return errors.New(text)
			}
			return nil
		})
	})
}

func TestResolversAreRefused(t *testing.T) {
	t.Parallel()
	const dns = "resolvers dns\n  nameserver none 127.0.0.1:9\n  hold nx 1s\n  timeout resolve 1s\n  timeout retry 1s"
	for name, lines := range map[string][]string{
		"in default-server": {"default-server resolvers dns", "server-template s 1-2 slot.invalid:1 disabled init-addr last,127.0.0.1"},
		"in the template":   {"server-template s 1-2 slot.invalid:1 disabled resolvers dns init-addr last,127.0.0.1"},
		"in one of two":     {"server-template a 1-2 slot.invalid:1 disabled init-addr last,127.0.0.1", "server-template s 1-2 slot.invalid:1 disabled resolvers dns init-addr last,127.0.0.1"},
	} {
		t.Run(name, func(t *testing.T) {
			said := &lockedLog{}
			w := newWorldOn(t, haproxytest.Options{Sections: []string{dns}, Backends: []haproxytest.Backend{
				{Name: "be", Extra: lines}, {Name: "other", Slots: 2},
			}}, "")
			w.cfg.Backends = append(w.cfg.Backends, lbsync.BackendConfig{Service: "api", Backend: "other", Mode: lbsync.Auto})
			a := haproxytest.NewInstance(t)
			w.beat(t, a.Addr(), 100)
			if err := w.once(t); err == nil || !strings.Contains(err.Error(), "resolvers") || !strings.Contains(err.Error(), "backend be") {
				t.Errorf("once: %v", err)
			}
			w.log = zerolog.New(said).Level(zerolog.InfoLevel)
			w.cfg.Full = 50 * time.Millisecond
			bal := &counting{Balancer: w.client(t)}
			w.run(t, bal)
			if st := w.noted(t, a.Addr(), registrar.NoteRefused); !strings.Contains(st.Why, "resolvers") {
				t.Errorf("why: %+v", st)
			}
			if _, err := w.store.Beat(t.Context(), "api", registrar.Beat{Addr: a.Addr(), Token: "t", Meta: `{"id":"t","weight":7}`}); err != nil {
				t.Fatal(err)
			}
			w.want(t, "other", map[string]string{a.Addr().String(): "ready 7"}) // the others go on
			w.looks(t, bal, 20)
			if n := strings.Count(said.String(), "not driven"); n != 1 {
				t.Errorf("said %d times: %s", n, said)
			}
			if text := w.ha.Command(t, "show servers state be"); strings.Contains(text, a.Addr().Addr().String()) {
				t.Errorf("touched: %s", text)
			}
			// The line is changed, and HAProxy reloaded.
			for _, l := range lines {
				if strings.Contains(l, "resolvers dns") {
					w.ha.Edit(t, l, strings.TrimSuffix(strings.Replace(l, "resolvers dns", "", 1), "default-server ")+"\n")
				}
			}
			w.ha.Reload(t)
			w.want(t, "be", ready(100, a))
			w.noted(t, a.Addr(), "")
		})
	}
}

// TestNoBackend: a backend that haproxy.cfg does not have is not driven, which is said once
// and of each instance, until a reload brings it.
func TestNoBackend(t *testing.T) {
	t.Parallel()
	said := &lockedLog{}
	w := newWorldOn(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "one", Slots: 2}, {Name: "other", Slots: 2}}}, "")
	a := haproxytest.NewInstance(t)
	w.beat(t, a.Addr(), 100)
	const want = "no such backend; HAProxy has one, other; correct --backend, or write the backend into haproxy.cfg"
	w.log = zerolog.New(said).Level(zerolog.InfoLevel)
	if err := w.once(t); err == nil || err.Error() != "backend be is not driven: "+want {
		t.Errorf("once: %v", err)
	}
	if text := said.String(); strings.Contains(text, "not driven") {
		t.Errorf("once logs what it returns: %s", text)
	}
	w.cfg.Full = 50 * time.Millisecond
	bal := &counting{Balancer: w.client(t)}
	w.run(t, bal)
	if st := w.noted(t, a.Addr(), registrar.NoteRefused); st.Why != want {
		t.Errorf("why: %+v", st)
	}
	w.looks(t, bal, 20)
	if n := strings.Count(said.String(), "not driven"); n != 1 {
		t.Errorf("said %d times: %s", n, said)
	}
	w.ha.Edit(t, "frontend fe_other\n", "backend be\n  server-template s 1-2 slot.invalid:1 disabled init-addr last,127.0.0.1\nfrontend fe_other\n")
	w.ha.Reload(t)
	w.want(t, "be", ready(100, a))
	w.noted(t, a.Addr(), "")
}

// h2c is an instance that speaks HTTP/2 without TLS. /stream answers bit by bit, until
// the client goes.
func h2c(t *testing.T) netip.AddrPort {
	t.Helper()
	var l net.Listener
	i := haproxytest.NewInstance(t) // for its address
	i.Close()
	l, err := net.Listen("tcp", i.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("X-Instance", i.Addr().String())
		if r.URL.Path != "/stream" {
			return
		}
		for tick := time.NewTicker(10 * time.Millisecond); ; {
			_, _ = rw.Write([]byte("."))
			_ = http.NewResponseController(rw).Flush()
			select {
			case <-r.Context().Done():
				tick.Stop()
				return
			case <-tick.C:
			}
		}
	})}
	s.Protocols.SetUnencryptedHTTP2(true)
	s.Protocols.SetHTTP1(true)
	var serving sync.WaitGroup
	serving.Go(func() { _ = s.Serve(l) }) // returns when closed
	t.Cleanup(func() { _ = s.Close(); serving.Wait() })
	return i.Addr()
}

// TestUsedSlotServesItsInstanceAlone has a slot's instance leave while one of its
// requests goes on over a connection of many, and live on.
func TestUsedSlotServesItsInstanceAlone(t *testing.T) {
	t.Parallel()
	for _, reuse := range []string{"always", "aggressive", "safe"} {
		t.Run(reuse, func(t *testing.T) {
			w := newWorldOn(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Extra: []string{
				"http-reuse " + reuse, "server-template s 1 slot.invalid:1 proto h2 disabled init-addr last,127.0.0.1",
			}}}}, "")
			w.cfg.Backends[0].Mode, w.cfg.DrainTimeout = lbsync.Slots, 100*time.Millisecond
			w.run(t, w.client(t))
			a, c := h2c(t), h2c(t)
			w.beat(t, a, 100)
			w.want(t, "be", map[string]string{a.String(): "ready 100"})
			r, err := plain.Get("http://" + w.ha.Addr("be") + "/stream")
			if err != nil {
				t.Fatal(err)
			}
			defer r.Body.Close()
			if _, err := io.ReadFull(r.Body, make([]byte, 3)); err != nil {
				t.Fatal(err)
			}
			w.leave(t, a)
			w.want(t, "be", map[string]string{})
			if _, err := io.ReadFull(r.Body, make([]byte, 3)); err != nil {
				t.Errorf("the request was cut before its slot was needed: %v", err)
			}
			w.beat(t, c, 100)
			w.want(t, "be", map[string]string{c.String(): "ready 100"})
			for range 200 {
				if by, status, err := get("http://" + w.ha.Addr("be") + "/"); err != nil || status != http.StatusOK || by != c.String() {
					t.Fatalf("%s answered, status %d, %v; %s has the slot", by, status, err, c)
				}
			}
		})
	}
}

// TestPrivateConnections: with http-reuse never a client's connection keeps its own one
// to the server that it used last, and 2.6 uses that again whatever address the server
// has by then.
func TestPrivateConnections(t *testing.T) {
	t.Parallel()
	w := newWorldOn(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Extra: []string{
		"http-reuse never", "server-template s 1 slot.invalid:1 disabled init-addr last,127.0.0.1",
	}}}}, "")
	w.cfg.Backends[0].Private, w.cfg.Quarantine = true, time.Nanosecond // that is no reason to leave the slot alone
	client := w.client(t)
	process, err := client.Probe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	w.run(t, client)
	a, c := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
	w.beat(t, a.Addr(), 100)
	w.want(t, "be", ready(100, a))
	kept := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{MaxConnsPerHost: 1}}
	defer kept.CloseIdleConnections()
	by := func() string {
		r, err := kept.Get("http://" + w.ha.Addr("be") + "/")
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			t.Fatal(err)
		}
		return r.Header.Get("X-Instance")
	}
	if got := by(); got != a.Addr().String() {
		t.Fatalf("%q answered", got)
	}
	w.leave(t, a.Addr())
	w.want(t, "be", map[string]string{})
	w.beat(t, c.Addr(), 100)
	w.want(t, "be", ready(100, c))
	for range 50 {
		if got := by(); got != c.Addr().String() {
			t.Fatalf("%s answered, which has left", got)
		}
	}
	// 3.0 needs no such care.
	if added := strings.Contains(w.ha.Command(t, "show servers state be"), " "+lbsync.DynamicName(c.Addr())+" "); added == process.AtLeast(3, 0) {
		t.Errorf("added beside the slot: %v, by HAProxy %s", added, process.Version)
	}
	// The instance itself gets its slot again.
	w.leave(t, c.Addr())
	w.beat(t, a.Addr(), 100)
	w.want(t, "be", ready(100, a))
	if got := by(); got != a.Addr().String() {
		t.Fatalf("%q answered", got)
	}
}

// agent is an agent-check that answers with a word.
type agent struct {
	word  atomic.Value
	asked atomic.Int64
	port  int
}

// newAgent starts an agent for i.
func newAgent(t *testing.T, i *haproxytest.Instance, word string) *agent {
	t.Helper()
	l, err := net.Listen("tcp", netip.AddrPortFrom(i.Addr().Addr(), 9100).String())
	if err != nil {
		t.Fatal(err)
	}
	a := &agent{port: 9100}
	a.word.Store(word)
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return // closed
			}
			_, _ = fmt.Fprintln(conn, a.word.Load())
			_ = conn.Close()
			a.asked.Add(1)
		}
	})
	t.Cleanup(func() { _ = l.Close(); serving.Wait() })
	return a
}

// says has the agent say word, and waits until HAProxy has asked it since.
func (a *agent) says(t *testing.T, word string) {
	t.Helper()
	a.word.Store(word)
	from := a.asked.Load()
	haproxytest.Poll(t, "HAProxy has asked the agent", func() error {
		if a.asked.Load() < from+3 {
			return errors.New("not yet")
		}
		return nil
	})
}

const agentTemplate = "server-template s 1-3 slot.invalid:1 weight 100 agent-check agent-port 9100 agent-inter 50ms disabled init-addr last,127.0.0.1"

// TestAgentHasItsWay: what an agent says of weight and state is not lbsync's to change,
// nor a human's word, and is told.
func TestAgentHasItsWay(t *testing.T) {
	t.Parallel()
	w := newWorldOn(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Extra: []string{agentTemplate}}}}, "")
	said := &lockedLog{}
	w.log = zerolog.New(said).Level(zerolog.InfoLevel)
	w.cfg.Full = 50 * time.Millisecond
	bal := &counting{Balancer: w.client(t)}
	w.run(t, bal)
	a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
	of := newAgent(t, a, "25%")
	newAgent(t, b, "100%")
	w.beat(t, a.Addr(), 10)
	w.beat(t, b.Addr(), 10)
	has := func(state string) map[string]string {
		return map[string]string{a.Addr().String(): state, b.Addr().String(): "ready 100"}
	}
	w.want(t, "be", has("ready 25"))
	bal.applies.Store(0)
	stays := func(word, state, note string) {
		t.Helper()
		of.says(t, word)
		w.want(t, "be", has(state))
		w.looks(t, bal, 5)
		w.want(t, "be", has(state))
		w.noted(t, a.Addr(), note)
	}
	stays("50%", "ready 50", "")
	stays("drain", "drain 50", registrar.NoteUndone)
	stays("ready 0%", "ready 0", registrar.NoteUndone)
	stays("75%", "ready 75", "")
	stays("maint", "maint 75", registrar.NoteUndone)
	stays("ready", "ready 75", "")
	if n := bal.applies.Load(); n != 0 {
		t.Errorf("lbsync spoke against the agent %d times", n)
	}
	if text := said.String(); strings.Contains(text, "in maint by a human's hand") || !strings.Contains(text, "its agent or") {
		t.Errorf("said of the agent's maint: %s", text)
	}
	// The register's words are said once, and hold where the agent says nothing of it.
	of.says(t, "up")
	w.word(t, a.Addr(), registrar.Word{Verb: "drain"})
	w.want(t, "be", has("drain 75"))
	w.word(t, a.Addr(), registrar.Word{Verb: "ready"})
	w.want(t, "be", has("ready 75"))
	none := 0
	w.word(t, a.Addr(), registrar.Word{Verb: "weight", Weight: &none})
	w.want(t, "be", has("drain 75"))
	w.word(t, a.Addr(), registrar.Word{Verb: "weight"})
	w.want(t, "be", has("ready 75"))
	// A free slot's agent cannot bring it back, even one that answers for every slot.
	of.says(t, "ready")
	w.leave(t, a.Addr())
	w.want(t, "be", map[string]string{b.Addr().String(): "ready 100"})
	w.looks(t, bal, 10)
	w.want(t, "be", map[string]string{b.Addr().String(): "ready 100"})
}

func TestAgentOfWeightOneIsRefused(t *testing.T) {
	t.Parallel()
	w := newWorldOn(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Extra: []string{strings.Replace(agentTemplate, "weight 100", "", 1)}}}}, "")
	a := haproxytest.NewInstance(t)
	w.beat(t, a.Addr(), 100)
	if err := w.once(t); err == nil || !strings.Contains(err.Error(), "weight 100") {
		t.Errorf("once: %v", err)
	}
}

// TestBackupIsNobodyElse: a sorry page that is up is no reason to let the last instance go.
func TestBackupIsNobodyElse(t *testing.T) {
	t.Parallel()
	for _, check := range []bool{false, true} {
		t.Run(fmt.Sprintf("check=%t", check), func(t *testing.T) {
			sorry := haproxytest.NewInstance(t)
			w := newWorld(t, haproxytest.Backend{Name: "be", Slots: 3, Check: check, Extra: []string{"server sorry " + sorry.Addr().String() + " backup"}}, "")
			w.cfg.Hold = 50 * time.Millisecond
			w.run(t, w.client(t))
			a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
			w.beat(t, a.Addr(), 100)
			w.beat(t, b.Addr(), 100)
			w.answers(t, a, b)
			w.word(t, a.Addr(), registrar.Word{Verb: "drain"})
			w.answers(t, b)
			w.word(t, b.Addr(), registrar.Word{Verb: "drain"})
			w.noted(t, b.Addr(), registrar.NoteWaits)
			w.answers(t, b)
			w.word(t, a.Addr(), registrar.Word{Verb: "ready"})
			w.answers(t, a)
			w.word(t, b.Addr(), registrar.Word{Verb: "ready"})
			w.answers(t, a, b)
			// Both go by silence: one of them stays.
			w.expire(t, a.Addr())
			w.expire(t, b.Addr())
			haproxytest.Poll(t, "one is held", func() error {
				if n := len(w.servers(t, "be")); n != 2 { // with the sorry page
					return fmt.Errorf("%d servers", n)
				}
				return nil
			})
			for range 20 {
				if by, _, err := get("http://" + w.ha.Addr("be") + "/"); err != nil || by == sorry.Addr().String() {
					t.Fatalf("%s answers, %v", by, err)
				}
			}
		})
	}
}

func TestBackupTemplateTakesNobody(t *testing.T) {
	t.Parallel()
	const spare = "server-template spare 1-2 slot.invalid:1 backup disabled init-addr last,127.0.0.1"
	t.Run("beside another", func(t *testing.T) {
		w := newWorld(t, haproxytest.Backend{Name: "be", Slots: 2, Extra: []string{spare}}, "")
		w.run(t, w.client(t))
		a, b, c := haproxytest.NewInstance(t), haproxytest.NewInstance(t), haproxytest.NewInstance(t)
		for _, i := range []*haproxytest.Instance{a, b, c} {
			w.beat(t, i.Addr(), 100)
		}
		w.answers(t, a, b, c)
	})
	t.Run("alone", func(t *testing.T) {
		w := newWorld(t, haproxytest.Backend{Name: "be", Extra: []string{spare}}, "")
		w.beat(t, haproxytest.NewInstance(t).Addr(), 100)
		if err := w.once(t); err == nil || !strings.Contains(err.Error(), "backup") {
			t.Errorf("once: %v", err)
		}
	})
}

// TestServersOfOthers: a name that begins as ours do is not enough.
func TestServersOfOthers(t *testing.T) {
	t.Parallel()
	legacy := haproxytest.NewInstance(t)
	w := newWorld(t, haproxytest.Backend{Name: "be", Balance: "leastconn", Extra: []string{
		"server rc_legacy " + legacy.Addr().String(), "server rc_10.0.0.1:080 " + legacy.Addr().String() + " disabled",
	}}, "")
	w.cfg.Full = 50 * time.Millisecond
	bal := &counting{Balancer: w.client(t)}
	w.run(t, bal)
	a := haproxytest.NewInstance(t)
	w.beat(t, a.Addr(), 100)
	w.answers(t, a, legacy)
	w.looks(t, bal, 10)
	w.leave(t, a.Addr())
	w.answers(t, legacy)
}

// TestHumanMaintStays: whatever the server's weight, and whatever happens to the
// instance and to lbsync, until a human says ready.
func TestHumanMaintStays(t *testing.T) {
	t.Parallel()
	for _, mode := range modes {
		for _, weight := range []int{0, 1, 100} {
			if weight > 0 && mode.name != "slots" {
				continue // the weight is no mark in any of them
			}
			t.Run(fmt.Sprintf("%s, weight %d", mode.name, weight), func(t *testing.T) {
				w := newWorld(t, mode.backend, mode.options)
				w.cfg.Full = 50 * time.Millisecond
				bal := &counting{Balancer: w.client(t)}
				stop := w.run(t, bal)
				a, b := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
				w.beat(t, a.Addr(), weight)
				w.beat(t, b.Addr(), 100)
				of := func(state string) map[string]string {
					return map[string]string{a.Addr().String(): fmt.Sprint(state, " ", weight), b.Addr().String(): "ready 100"}
				}
				w.want(t, "be", of("ready"))
				var server string
				for _, l := range strings.Split(w.ha.Command(t, "show servers state be"), "\n") {
					if f := strings.Fields(l); len(f) > 18 && f[4]+":"+f[18] == a.Addr().String() {
						server = "be/" + f[3]
					}
				}
				w.ha.Command(t, "set server "+server+" state maint")
				stays := func(what string) {
					t.Helper()
					w.looks(t, bal, 3)
					if got := w.servers(t, "be"); fmt.Sprint(got) != fmt.Sprint(of("maint")) {
						t.Fatalf("%s: %v", what, got)
					}
				}
				stays("at once")
				other := 50
				w.word(t, a.Addr(), registrar.Word{Verb: "weight", Weight: &other})
				stays("another weight")
				w.word(t, a.Addr(), registrar.Word{Verb: "weight"})
				w.word(t, a.Addr(), registrar.Word{Verb: "maint"})
				stays("rollcall maint")
				w.word(t, a.Addr(), registrar.Word{Verb: "ready"})
				stays("rollcall ready")
				w.leave(t, a.Addr())
				stays("its instance left")
				w.beat(t, a.Addr(), weight)
				stays("its instance came back")
				w.expire(t, a.Addr())
				stays("its instance expired")
				w.beat(t, a.Addr(), weight)
				stop()
				stop = w.run(t, bal)
				stays("another lbsync")
				if mode.backend.Slots > 0 {
					stop()
					w.ha.Reload(t)
					stop = w.run(t, bal)
					stays("another lbsync and another HAProxy")
				}
				w.noted(t, a.Addr(), registrar.NoteHuman)
				w.ha.Command(t, "set server "+server+" state ready")
				w.want(t, "be", of("ready"))
				w.ha.Command(t, "set server "+server+" state maint")
				stays("once more")
				w.leave(t, a.Addr())
				stays("gone for good")
				w.ha.Command(t, "set server "+server+" state ready")
				w.want(t, "be", map[string]string{b.Addr().String(): "ready 100"})
				stop()
			})
		}
	}
}

// TestOverflowWhileSlotsRest: a free slot that may not be used again yet is no reason
// to let a newcomer wait, and what is added beside slots with a check has one.
func TestOverflowWhileSlotsRest(t *testing.T) {
	t.Parallel()
	w := newWorld(t, haproxytest.Backend{Name: "be", Slots: 1, Check: true}, "")
	said := &lockedLog{}
	w.log = zerolog.New(said).Level(zerolog.InfoLevel)
	w.cfg.Quarantine = time.Hour
	w.run(t, w.client(t))
	a, c := haproxytest.NewInstance(t), haproxytest.NewInstance(t)
	w.beat(t, a.Addr(), 100)
	w.answers(t, a)
	w.leave(t, a.Addr())
	w.want(t, "be", map[string]string{})
	c.SetHealthy(false)
	w.beat(t, c.Addr(), 100)
	w.want(t, "be", ready(100, c))
	if _, status, _ := get("http://" + w.ha.Addr("be") + "/"); status != http.StatusServiceUnavailable {
		t.Errorf("served before its check has passed: %d", status)
	}
	c.SetHealthy(true)
	w.answers(t, c)
	if text := said.String(); strings.Contains(text, "raise") || !strings.Contains(text, "may not be used again yet") {
		t.Errorf("said %s", text)
	}
}

// TestSocketThatOnlyReads: said once, and nothing is tried again and again.
func TestSocketThatOnlyReads(t *testing.T) {
	t.Parallel()
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			w := newWorld(t, mode.backend, mode.options)
			w.ha.Socket, w.ha.OperatorSocket = w.ha.OperatorSocket, w.ha.Socket
			a := haproxytest.NewInstance(t)
			w.beat(t, a.Addr(), 100)
			if err := w.once(t); err == nil || !strings.Contains(err.Error(), "level admin") {
				t.Errorf("once: %v", err)
			}
			said := &lockedLog{}
			w.log = zerolog.New(said).Level(zerolog.InfoLevel)
			w.cfg.Full = 50 * time.Millisecond
			bal := &counting{Balancer: w.client(t)}
			w.run(t, bal)
			w.looks(t, bal, 20)
			if n := strings.Count(said.String(), "\n"); n > 3 || !strings.Contains(said.String(), "level admin") {
				t.Errorf("%d lines: %s", n, said)
			}
			if n := bal.applies.Load(); n > 0 {
				t.Errorf("%d attempts", n)
			}
		})
	}
}

// TestOnceSaysWhatIsNotServed: an exit code of 0 is no word for nothing done.
func TestOnceSaysWhatIsNotServed(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		be    haproxytest.Backend
		mode  lbsync.Mode
		allow string
		want  string // empty: all is well
	}{
		{"a static algorithm without slots", haproxytest.Backend{Name: "be", Balance: "static-rr"}, lbsync.Auto, "127.0.0.0/8", "HAProxy refused"},
		{"too few slots", haproxytest.Backend{Name: "be", Slots: 1}, lbsync.Slots, "127.0.0.0/8", "1 of 2"},
		{"a network that is not allowed", haproxytest.Backend{Name: "be", Slots: 3}, lbsync.Auto, "10.0.0.0/8", "allowed networks"},
		{"a check that has not passed", haproxytest.Backend{Name: "be", Slots: 3, Check: true}, lbsync.Auto, "127.0.0.0/8", ""},
		{"a static algorithm with slots", haproxytest.Backend{Name: "be", Slots: 3, Balance: "static-rr"}, lbsync.Auto, "127.0.0.0/8", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, tt.be, "")
			w.cfg.Backends[0].Mode, w.cfg.Allow = tt.mode, []netip.Prefix{netip.MustParsePrefix(tt.allow)}
			w.beat(t, haproxytest.NewInstance(t).Addr(), 100)
			w.beat(t, haproxytest.NewInstance(t).Addr(), 100)
			err := w.once(t)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}
