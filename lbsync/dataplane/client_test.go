package dataplane

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"rollcall/lbsync"
	"rollcall/lbsync/balancertest"
	"rollcall/lbsync/dataplane/dataplanetest"
	"rollcall/lbsync/haproxy/haproxytest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newClient returns a Client of an API that is closed with the test. Tests
// that do not measure the Timeout get a generous one.
func newClient(tb testing.TB, a *dataplanetest.API, cfg Config) *Client {
	tb.Helper()
	cfg.URL, cfg.User, cfg.PasswordFile, cfg.CAFile = a.URL, a.User, a.PasswordFile, a.CAFile
	if cfg.Timeout == 0 {
		cfg.Timeout = 5 * time.Second
	}
	c, err := New(cfg, zerolog.Nop())
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := c.Close(ctx); err != nil {
			tb.Error(err)
		}
	})
	return c
}

const backend = "be"

// start returns a haproxy with two slots, an API in front of it, and a Client.
func start(tb testing.TB, o dataplanetest.Options, cfg Config) (*dataplanetest.API, *Client) {
	tb.Helper()
	h := haproxytest.Start(tb, haproxytest.Options{Backends: []haproxytest.Backend{{Name: backend, Slots: 2}}})
	a := dataplanetest.Start(tb, h.Socket, o)
	return a, newClient(tb, a, cfg)
}

var slot = lbsync.Server{Name: "s1", ID: 1}

func weigh(weight int) lbsync.Op {
	return lbsync.Op{Kind: lbsync.SetWeight, Name: slot.Name, ID: slot.ID, Weight: weight}
}

func TestNew(t *testing.T) {
	const url = "http://127.0.0.1:5555"
	for _, tt := range []struct {
		name string
		cfg  Config
		want string // "" means that it is valid
	}{
		{"plain", Config{URL: url}, ""},
		{"all", Config{URL: "https://[::1]:5555/haproxy/", User: "u", PasswordFile: "p", CAFile: "c", Timeout: time.Minute, ServerOptions: "maxconn 5"}, ""},
		{"no URL", Config{}, "no URL"},
		{"no scheme", Config{URL: "127.0.0.1:5555"}, "malformed"},
		{"no host", Config{URL: "http:///v3"}, "HOST:PORT"},
		{"scheme", Config{URL: "ftp://host"}, "HOST:PORT"},
		{"query", Config{URL: url + "/?a=b"}, "more than a host and a path"},
		{"user in the URL", Config{URL: "http://me:secret@host"}, "user and password file instead"},
		{"user alone", Config{URL: url, User: "u"}, "go together"},
		{"password alone", Config{URL: url, PasswordFile: "p"}, "go together"},
		{"colon", Config{URL: url, User: "a:b", PasswordFile: "p"}, "colon"},
		{"CA without https", Config{URL: url, CAFile: "c"}, "https"},
		{"timeout", Config{URL: url, Timeout: -1}, "negative"},
		{"check", Config{URL: url, ServerOptions: "maxconn 5 check inter 2s"}, "cannot enable a health check"},
		{"unknown option", Config{URL: url, ServerOptions: "weight 5"}, `"weight" cannot`},
		{"no value", Config{URL: url, ServerOptions: "ssl maxconn"}, "lacks its value"},
		{"no number", Config{URL: url, ServerOptions: "maxconn many"}, "invalid syntax"},
		{"not allowed", Config{URL: url, ServerOptions: "ssl verify maybe"}, "verify"},
		{"quote", Config{URL: url, ServerOptions: `sni str("a b")`}, "character other than"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := New(tt.cfg, zerolog.Nop())
			switch {
			case tt.want == "" && (err != nil || c.Checks() || c.cfg.Timeout <= 0):
				t.Errorf("got %v", err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "secret")):
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestRender(t *testing.T) {
	c, err := New(Config{URL: "http://h/x/", ServerOptions: "maxconn 7 ssl verify none send-proxy-v2 sni str(a)"}, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	const server = "/v3/services/haproxy/runtime/backends/be/servers"
	addr := netip.MustParseAddrPort("[2001:db8::1]:80")
	for _, tt := range []struct {
		op   lbsync.Op
		want string
	}{
		{lbsync.Op{Kind: lbsync.Add, Addr: addr}, "POST " + server + ` {"address":"[2001:db8::1]","id":"5","maxconn":7,"name":"rc_a:1",` +
			`"pool_max_conn":-1,"pool_purge_delay":1000,"port":80,"send-proxy-v2":"enabled","sni":"str(a)","ssl":"enabled","verify":"none","weight":0}`},
		{lbsync.Op{Kind: lbsync.SetAddr, Addr: addr}, "PUT " + server + `/rc_a:1 {"address":"2001:db8::1","port":80}`},
		{lbsync.Op{Kind: lbsync.EnableHealth}, "# server rc_a:1: " + string(errCheck)},
		{lbsync.Op{Kind: lbsync.SetReady}, "PUT " + server + `/rc_a:1 {"admin_state":"ready"}`},
		{lbsync.Op{Kind: lbsync.SetDrain}, "PUT " + server + `/rc_a:1 {"admin_state":"drain"}`},
		{lbsync.Op{Kind: lbsync.SetMaint}, "PUT " + server + `/rc_a:1 {"admin_state":"maint"}`},
		{lbsync.Op{Kind: lbsync.HealthDown}, "PUT " + server + `/rc_a:1 {"operational_state":"down"}`},
		{lbsync.Op{Kind: lbsync.SetWeight}, "PUT " + server + `/rc_a:1 {"weight":0}`},
		{lbsync.Op{Kind: lbsync.Shutdown}, "# server rc_a:1: " + string(errCut)},
		{lbsync.Op{Kind: lbsync.Delete}, "DELETE " + server + `/rc_a:1`},
	} {
		tt.op.Name, tt.op.ID = "rc_a:1", 5
		if got, err := c.Render("be", tt.op); err != nil || got != tt.want {
			t.Errorf("got  %s, %v\nwant %s", got, err, tt.want)
		}
	}
}

// TestOptions has HAProxy take every server option.
func TestOptions(t *testing.T) {
	a, c := start(t, dataplanetest.Options{}, Config{ServerOptions: "backup send-proxy ssl maxconn 9 maxqueue 9 minconn 2 pool-max-conn 3" +
		" alpn h2,http/1.1 sni str(a) ssl-min-ver TLSv1.2 ssl-max-ver TLSv1.3 verify none verifyhost a"})
	op := lbsync.Op{Kind: lbsync.Add, Name: "rc_a", ID: 1_000_000, Addr: netip.MustParseAddrPort("127.0.0.1:81")}
	got, err := c.Apply(t.Context(), backend, []lbsync.Op{op})
	if err != nil || len(got.Refused) > 0 || len(got.Servers) != 1 {
		t.Errorf("got %+v, %v", got, err)
	}
	if !slices.ContainsFunc(a.Requests(), func(r string) bool { return strings.HasPrefix(r, "POST ") && strings.Contains(r, `"alpn"`) }) {
		t.Errorf("asked %q", a.Requests())
	}
}

// fault is put around the stand-in: a request that matches is answered by it.
type fault struct {
	method, path string // "" matches any; path is a part of it

	mu     sync.Mutex // guards answer
	answer answerer   // nil: no fault
}

// answerer answers instead of the real handler, or with its help.
type answerer = func(w http.ResponseWriter, r *http.Request, real http.Handler)

func newFault(method, path string, answer answerer) *fault {
	return &fault{method: method, path: path, answer: answer}
}

func (f *fault) set(answer answerer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answer = answer
}

func (f *fault) wrap(real http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		answer := f.answer
		f.mu.Unlock()
		if answer != nil && strings.Contains(r.URL.Path, f.path) && (f.method == "" || r.Method == f.method) {
			answer(w, r, real)
			return
		}
		real.ServeHTTP(w, r)
	})
}

// says answers with fixed text.
func says(status int, kind, text string) answerer {
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		if kind != "" {
			w.Header().Set("Content-Type", kind)
		}
		w.Header().Set("Location", "/elsewhere")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, text)
	}
}

// edits changes the text of the real answer.
func edits(change func(string) string) answerer {
	return func(w http.ResponseWriter, r *http.Request, real http.Handler) {
		rec := httptest.NewRecorder()
		real.ServeHTTP(rec, r)
		for key := range rec.Header() {
			w.Header().Set(key, rec.Header().Get(key))
		}
		w.WriteHeader(rec.Code)
		_, _ = io.WriteString(w, change(rec.Body.String()))
	}
}

// raw answers with bytes on the connection, and closes it.
func raw(text string) answerer {
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			panic(err)
		}
		_, _ = io.WriteString(conn, text)
		_ = conn.Close()
	}
}

// TestUnknown has answers that tell nothing, at each of the requests: they are
// errors, and no decision can come of them.
func TestUnknown(t *testing.T) {
	const (
		js      = "application/json"
		servers = "/runtime/backends/be/servers"
	)
	answers := map[string]answerer{
		"HTML":             says(200, "text/html", "<html>"),
		"no type":          says(200, "text/plain", "{}"),
		"no JSON":          says(200, js, "{"),
		"empty":            says(200, js, ""),
		"other shape":      says(200, js, `"ok"`),
		"more behind":      edits(func(s string) string { return s + "{}" }),
		"202":              says(202, js, "{}"),
		"204":              says(204, "", ""),
		"redirect":         says(302, js, `{"code":302,"message":"elsewhere"}`),
		"401":              says(401, js, `{"code":401,"message":"no"}`),
		"403":              says(403, js, `{"code":403,"message":"no"}`),
		"502 of a proxy":   says(502, "text/html", "<html>"),
		"503 of a proxy":   says(503, js, `{}`),
		"cut length":       raw("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{}"),
		"cut chunk":        raw("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"),
		"cut at the end":   edits(func(s string) string { return strings.TrimSpace(s)[:max(0, len(strings.TrimSpace(s))-1)] }),
		"closed":           raw(""),
		"no HTTP":          raw("hello\r\n\r\n"),
		"closed in header": raw("HTTP/1.1 200 OK\r\nContent-Ty"),
	}
	for _, where := range []struct {
		name string
		*fault
	}{
		{"version", newFault("", infoPath, nil)},
		{"process", newFault("", processPath, nil)},
		{"list", newFault("GET", servers, nil)},
		{"statistics", newFault("", statsPath, nil)},
		{"change", newFault("PUT", servers, nil)},
	} {
		t.Run(where.name, func(t *testing.T) {
			f := where.fault
			_, c := start(t, dataplanetest.Options{Wrap: f.wrap}, Config{})
			for name, answer := range answers {
				f.set(answer)
				c.supported = false
				got, err := c.Apply(t.Context(), backend, []lbsync.Op{weigh(rand.IntN(256))})
				if !errors.Is(err, lbsync.ErrUnknown) || len(got.Servers) > 0 || got.Process.PID != 0 {
					t.Errorf("%s: got %+v, %v", name, got, err)
				}
			}
			f.set(nil)
			if _, err := c.Read(t.Context(), backend); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}

// TestMisread has answers of status 200 that are not the truth.
func TestMisread(t *testing.T) {
	const servers = "/runtime/backends/be/servers"
	drop := func(s string) string { // the second of two servers
		return regexp.MustCompile(`,\{[^{}]*"name":"s2"[^{}]*\}`).ReplaceAllString(s, "")
	}
	for _, tt := range []struct {
		name string
		*fault
		want error
	}{
		{"a server is missing in the list", newFault("GET", servers, edits(drop)), lbsync.ErrUnknown},
		{"a row of the list was cut", newFault("GET", servers, edits(func(s string) string { return strings.Replace(s, `{"address"`, `null,{"address"`, 1) })), lbsync.ErrUnknown},
		{"the list is null", newFault("GET", servers, says(200, "application/json", "null")), lbsync.ErrUnknown},
		{"the list is empty", newFault("GET", servers, says(200, "application/json", "[]")), lbsync.ErrUnknown},
		{"no data for the list", newFault("GET", servers, says(404, "application/json", `{"code":404,"message":"no data for be: not found"}`)), lbsync.ErrUnknown},
		{"the list is of another", newFault("GET", servers, edits(func(s string) string { return strings.ReplaceAll(s, `"id":"2"`, `"id":"9"`) })), lbsync.ErrUnknown},
		{"an id is no number", newFault("GET", servers, edits(func(s string) string { return strings.ReplaceAll(s, `"id":"2"`, `"id":"x"`) })), lbsync.ErrUnknown},
		{"one is there twice", newFault("GET", servers, edits(func(s string) string {
			return strings.ReplaceAll(strings.ReplaceAll(s, `"id":"2"`, `"id":"1"`), `"name":"s2"`, `"name":"s1"`)
		})), lbsync.ErrUnknown},
		{"no weights", newFault("GET", servers, edits(func(s string) string { return strings.ReplaceAll(s, `"weight"`, `"other"`) })), ErrUnsupported},
		{"no statistics", newFault("", statsPath, says(200, "application/json", `{}`)), lbsync.ErrUnknown},
		{"statistics with an error", newFault("", statsPath, says(200, "application/json", `{"error":"dial: refused"}`)), lbsync.ErrUnknown},
		{"a row of the statistics is empty", newFault("", statsPath, says(200, "application/json", `{"stats":[null]}`)), lbsync.ErrUnknown},
		{"an unknown status", newFault("", statsPath, edits(func(s string) string { return strings.ReplaceAll(s, `"MAINT"`, `"LOST"`) })), lbsync.ErrUnknown},
		{"a process with an error", newFault("", processPath, says(200, "application/json", `{"error":"dial: refused"}`)), lbsync.ErrUnknown},
		{"a process without a pid", newFault("", processPath, edits(func(s string) string { return strings.ReplaceAll(s, `"pid"`, `"other"`) })), lbsync.ErrUnknown},
		{"a process that is stopping", newFault("", processPath, edits(func(s string) string { return strings.ReplaceAll(s, `"stopping":0`, `"stopping":1`) })), lbsync.ErrReplaced},
		{"fields of later versions", newFault("", "", edits(func(s string) string { return strings.ReplaceAll(s, `"name":`, `"later":{"a":[1]},"name":`) })), nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, c := start(t, dataplanetest.Options{Wrap: tt.fault.wrap}, Config{})
			if got, err := c.Read(t.Context(), backend); !errors.Is(err, tt.want) || (err == nil) != (len(got.Servers) == 2) {
				t.Errorf("got %+v, %v, want %v", got, err, tt.want)
			}
		})
	}
}

// TestDisagree has a server appear between the list and the statistics: they
// are read once more.
func TestDisagree(t *testing.T) {
	lists := 0
	f := newFault("GET", "/servers", edits(func(s string) string {
		if lists++; lists == 1 {
			return "[]"
		}
		return s
	}))
	_, c := start(t, dataplanetest.Options{Wrap: f.wrap}, Config{})
	if got, err := c.Read(t.Context(), backend); err != nil || len(got.Servers) != 2 {
		t.Errorf("got %+v, %v", got, err)
	}
}

// TestEmpty tells a backend without servers from one that could not be read.
func TestEmpty(t *testing.T) {
	h := haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: backend}}})
	f := newFault("GET", "/servers", nil)
	c := newClient(t, dataplanetest.Start(t, h.Socket, dataplanetest.Options{Wrap: f.wrap}), Config{})
	if got, err := c.Read(t.Context(), backend); err != nil || len(got.Servers) != 0 {
		t.Errorf("got %+v, %v", got, err)
	}
	f.set(says(404, "application/json", `{"code":404,"message":"no data for be: not found"}`))
	if got, err := c.Read(t.Context(), backend); !errors.Is(err, lbsync.ErrUnknown) {
		t.Errorf("got %+v, %v", got, err)
	}
}

// TestReplacedWithin has another process answer the last question of an
// exchange than the first.
func TestReplacedWithin(t *testing.T) {
	number := func(field string, n int64) func(string) string {
		return func(s string) string {
			return regexp.MustCompile(`"`+field+`":\d+`).ReplaceAllString(s, fmt.Sprintf(`"%s":%d`, field, n))
		}
	}
	for name, change := range map[string]func(string) string{
		"pid":         number("pid", 1),
		"connections": number("cum_conns", 0),
		"uptime":      number("uptime", 1000),
	} {
		t.Run(name, func(t *testing.T) {
			questions := 0
			f := newFault("", processPath, edits(func(s string) string {
				if questions++; questions%2 == 0 {
					return change(s)
				}
				return s
			}))
			_, c := start(t, dataplanetest.Options{Wrap: f.wrap}, Config{})
			for range 2 {
				if got, err := c.Apply(t.Context(), backend, []lbsync.Op{weigh(4)}); !errors.Is(err, lbsync.ErrReplaced) || len(got.Servers) > 0 {
					t.Errorf("got %+v, %v", got, err)
				}
			}
		})
	}
}

func TestSighting(t *testing.T) {
	at := func(pid int, from, to time.Duration, connections int64) sighting {
		return sighting{lbsync.Process{PID: pid, Version: "v", Started: int64(to)}, from, to, connections}
	}
	first := at(7, -11*time.Second, -10*time.Second, 100)
	for _, tt := range []struct {
		name string
		next sighting
		same bool
	}{
		{"same", first, true},
		{"later in the second", at(7, -10500*time.Millisecond, -9500*time.Millisecond, 101), true},
		{"at the slack", at(7, -9*time.Second, -8*time.Second, 101), true},
		{"beyond the slack", at(7, -9*time.Second+1, -8*time.Second, 101), false},
		{"a slow answer", at(7, -30*time.Second, -5*time.Second, 101), true},
		{"started later", at(7, -2*time.Second, -time.Second, 200), false},
		{"started before", at(7, -20*time.Second, -19*time.Second, 200), false},
		{"fewer connections", at(7, -11*time.Second, -10*time.Second, 99), false},
		{"other pid", at(8, -11*time.Second, -10*time.Second, 101), false},
	} {
		if got := tt.next.after(first); got.process.Same(first.process) != tt.same {
			t.Errorf("%s: got %+v", tt.name, got)
		}
	}
}

// TestLateAddress has the API show the address before in its answer, as it does where
// HAProxy gives the new one later. It is waited for: the rest of the join is sent.
func TestLateAddress(t *testing.T) {
	before := ""
	f := newFault("PUT", "", func(w http.ResponseWriter, r *http.Request, real http.Handler) {
		ask := r.Clone(r.Context())
		ask.Method, ask.Body = http.MethodGet, http.NoBody
		was, is := httptest.NewRecorder(), httptest.NewRecorder()
		real.ServeHTTP(was, ask)
		real.ServeHTTP(is, r)
		if before == "" { // the first is of the address
			before = was.Body.String()
			is = was
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(is.Code)
		_, _ = is.Body.WriteTo(w) // the caller may be gone
	})
	_, c := start(t, dataplanetest.Options{Wrap: f.wrap}, Config{})
	addr := netip.MustParseAddrPort("127.0.0.1:81")
	op := func(kind lbsync.Kind, weight int) lbsync.Op {
		return lbsync.Op{Kind: kind, Name: slot.Name, ID: slot.ID, Addr: addr, Weight: weight}
	}
	got, err := c.Apply(t.Context(), backend, []lbsync.Op{op(lbsync.SetAddr, 0), op(lbsync.SetReady, 0), op(lbsync.SetWeight, 9)})
	if err != nil || len(got.Refused) > 0 || len(got.Servers) != 1 || got.Servers[0].Addr != addr || got.Servers[0].Admin != lbsync.Ready || got.Servers[0].Weight != 9 {
		t.Errorf("got %+v, %v", got, err)
	}
	if strings.Contains(before, `"port":81`) {
		t.Errorf("the answer was not of before: %s", before)
	}
}

// TestSaidNotDone has the API say 200 and do nothing, as the older ones do.
func TestSaidNotDone(t *testing.T) {
	f := newFault("PUT", "", func(w http.ResponseWriter, r *http.Request, real http.Handler) {
		ask := r.Clone(r.Context())
		ask.Method, ask.Body = http.MethodGet, http.NoBody
		real.ServeHTTP(w, ask)
	})
	_, c := start(t, dataplanetest.Options{Wrap: f.wrap}, Config{})
	addr := netip.MustParseAddrPort("127.0.0.1:81")
	for _, op := range []lbsync.Op{
		{Kind: lbsync.SetAddr, Addr: addr},
		{Kind: lbsync.SetReady},
		{Kind: lbsync.SetWeight, Weight: 9},
	} {
		op.Name, op.ID = slot.Name, slot.ID
		got, err := c.Apply(t.Context(), backend, []lbsync.Op{op})
		if err != nil || len(got.Refused) != 1 || !strings.Contains(got.Refused[0], "said 200") {
			t.Errorf("%+v: got %+v, %v", op, got, err)
		}
	}
}

// TestEarlier has no server put into service after a step was refused.
func TestEarlier(t *testing.T) {
	f := newFault("PUT", "/s1", nil)
	a, c := start(t, dataplanetest.Options{Wrap: f.wrap}, Config{})
	once := true
	f.set(func(w http.ResponseWriter, r *http.Request, real http.Handler) {
		if once {
			once = false
			says(400, "application/json", `{"code":400,"message":"not  today"}`)(w, r, real)
			return
		}
		real.ServeHTTP(w, r)
	})
	of := func(k lbsync.Kind, name string, id int) lbsync.Op { return lbsync.Op{Kind: k, Name: name, ID: id} }
	move := of(lbsync.SetAddr, "s1", 1)
	move.Addr = netip.MustParseAddrPort("127.0.0.1:81")
	got, err := c.Apply(t.Context(), backend, []lbsync.Op{move, of(lbsync.SetReady, "s1", 1), weigh(5), of(lbsync.SetReady, "s2", 2), weigh(0)})
	if err != nil || len(got.Refused) != 3 || got.Refused[0] != "server s1: not today (status 400)" {
		t.Errorf("got %+v, %v", got, err)
	}
	if len(got.Servers) != 2 || got.Servers[0].Admin != lbsync.Maint || got.Servers[0].Weight != 0 || got.Servers[1].Admin != lbsync.Ready {
		t.Errorf("got %+v", got.Servers)
	}
	for _, r := range a.Requests() {
		if strings.HasPrefix(r, "PUT ") && strings.Contains(r, "/s1 ") && !strings.Contains(r, `"weight":0`) {
			t.Errorf("sent %s", r)
		}
	}
}

func TestVersions(t *testing.T) {
	for _, tt := range []struct {
		version string
		old     bool
		ok      bool
	}{
		{"v2.9.27 abc", true, false},
		{"v3.0.23 abc", true, false},
		{"v3.2.15 abc", true, false},
		{"v3.3.0 abc", true, false},
		{"v3.3.1 abc", false, true},
		{"v3.4.2 8c7bce50", false, true},
		{"3.10.0-1", false, true},
		{"v4.0.0", false, true},
		{"unknown dirty", false, true},
		{"unknown dirty", true, false}, // its lists tell
	} {
		t.Run(tt.version, func(t *testing.T) {
			a, c := start(t, dataplanetest.Options{Version: tt.version, Old: tt.old}, Config{})
			_, err := c.Read(t.Context(), backend)
			if tt.ok && err != nil || !tt.ok && !errors.Is(err, ErrUnsupported) {
				t.Errorf("got %v", err)
			}
			if !tt.ok && !strings.HasPrefix(tt.version, "unknown") {
				if !strings.Contains(err.Error(), tt.version) || !strings.Contains(err.Error(), "v3.3.1") {
					t.Errorf("got %v, want both versions in it", err)
				}
				if _, err := c.Apply(t.Context(), backend, []lbsync.Op{weigh(3)}); !errors.Is(err, ErrUnsupported) {
					t.Errorf("got %v", err)
				}
				for _, r := range a.Requests() {
					if !strings.HasSuffix(r, "/info") {
						t.Errorf("asked %s", r)
					}
				}
			}
		})
	}
}

func TestPassword(t *testing.T) {
	a, c := start(t, dataplanetest.Options{}, Config{})
	probe := func() error { _, err := c.Probe(t.Context()); return err }
	if err := probe(); err != nil {
		t.Fatal(err)
	}
	a.SetPassword(t, "another")
	if err := probe(); err != nil {
		t.Errorf("after a change: %v", err)
	}
	c.cfg.User = "nobody"
	if err := probe(); !errors.Is(err, lbsync.ErrUnknown) || !strings.Contains(err.Error(), "user and password") || strings.Contains(err.Error(), "another") {
		t.Errorf("got %v", err)
	}
	c.cfg.PasswordFile += ".gone"
	if err := probe(); !errors.Is(err, lbsync.ErrUnknown) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	c.cfg.User, c.cfg.PasswordFile = "", ""
	if err := probe(); !errors.Is(err, lbsync.ErrUnknown) {
		t.Errorf("got %v", err)
	}
}

func TestTLS(t *testing.T) {
	h := haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: backend, Slots: 1}}})
	a := dataplanetest.Start(t, h.Socket, dataplanetest.Options{TLS: true})
	if _, err := newClient(t, a, Config{}).Read(t.Context(), backend); err != nil {
		t.Errorf("got %v", err)
	}
	ca, pem := a.CAFile, filepath.Join(t.TempDir(), "pem")
	if err := os.WriteFile(pem, []byte("no certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{"": "certificate", pem: "no certificate", ca + ".gone": "no such file"} {
		a.CAFile = file
		if _, err := newClient(t, a, Config{}).Probe(t.Context()); !errors.Is(err, lbsync.ErrUnknown) || !strings.Contains(err.Error(), want) {
			t.Errorf("CA %q: got %v, want %q in it", file, err, want)
		}
	}
}

// TestHungAPI has no change sent while the API is silent, however often one is
// asked for, and none in the middle of an exchange after a silent one.
func TestHungAPI(t *testing.T) {
	const timeout = 50 * time.Millisecond
	silent := func(_ http.ResponseWriter, r *http.Request, _ http.Handler) {
		_, _ = io.Copy(io.Discard, r.Body) // so that the end of the connection is seen
		<-r.Context().Done()
	}
	changes := func(a *dataplanetest.API) (n int) {
		for _, r := range a.Requests() {
			if strings.HasPrefix(r, "PUT ") {
				n++
			}
		}
		return n
	}
	for name, f := range map[string]*fault{"at the first question": newFault("GET", processPath, nil), "at a change": newFault("PUT", "", nil)} {
		t.Run(name, func(t *testing.T) {
			a, c := start(t, dataplanetest.Options{Wrap: f.wrap}, Config{})
			if _, err := c.Probe(t.Context()); err != nil {
				t.Fatal(err)
			}
			c.cfg.Timeout = timeout
			f.set(silent)
			for range 3 {
				began := time.Now()
				_, err := c.Apply(t.Context(), backend, []lbsync.Op{weigh(3), weigh(4), weigh(5)})
				if !errors.Is(err, lbsync.ErrUnknown) || !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("got %v", err)
				}
				if took := time.Since(began); took < timeout || took > 20*timeout {
					t.Errorf("took %s", took)
				}
			}
			if n := changes(a); n != 0 { // the silent ones do not reach the stand-in
				t.Errorf("%d changes", n)
			}
			f.set(nil)
			c.cfg.Timeout = 5 * time.Second
			if _, err := c.Apply(t.Context(), backend, []lbsync.Op{weigh(6)}); err != nil || changes(a) != 1 {
				t.Errorf("%d changes, %v", changes(a), err)
			}
		})
	}
}

// TestEndlessAnswers has answers that drip and answers without end, in the header and in
// the body: they end within the Timeout and 64 MB, and the next exchange is a good one.
func TestEndlessAnswers(t *testing.T) {
	const (
		header = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
		body   = header + "Transfer-Encoding: chunked\r\n\r\n"
	)
	chunk := strings.Repeat(" ", 1<<16)
	for _, tt := range []struct {
		name, head, more string
		pause            time.Duration
	}{
		{"body drips", body, "1\r\n \r\n", 50 * time.Millisecond},
		{"header drips", header, "X", 50 * time.Millisecond},
		{"body has no end", body, "10000\r\n" + chunk + "\r\n", 0},
		{"header has no end", header, "X-A: " + chunk + "\r\n", 0},
		{"progress has no end", "", "HTTP/1.1 102 Processing\r\n\r\n", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ended := make(chan struct{})
			f := newFault("GET", processPath, nil)
			a, c := start(t, dataplanetest.Options{Wrap: f.wrap}, Config{})
			if _, err := c.Probe(t.Context()); err != nil {
				t.Fatal(err)
			}
			f.set(func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
				defer close(ended)
				conn, _, err := w.(http.Hijacker).Hijack()
				if err != nil {
					panic(err)
				}
				defer conn.Close()
				more := []byte(tt.more)
				for text := []byte(tt.head); ; text = more {
					if _, err := conn.Write(text); err != nil {
						return
					}
					time.Sleep(tt.pause) // that is the dripping
				}
			})
			c.cfg.Timeout = time.Second
			grown := balancertest.Memory(t)
			began := time.Now()
			_, err := c.Probe(t.Context())
			took := time.Since(began)
			t.Logf("ended after %s, memory grew by %d MB: %v", took.Round(time.Millisecond), grown()>>20, err)
			if !errors.Is(err, lbsync.ErrUnknown) {
				t.Errorf("got %v", err)
			}
			if took > 10*time.Second || grown() > 64<<20 {
				t.Errorf("took %s, memory grew by %d MB", took, grown()>>20)
			}
			select {
			case <-ended:
			case <-time.After(10 * time.Second):
				t.Error("the connection lives")
			}
			f.set(nil)
			c.cfg.Timeout = 5 * time.Second
			if _, err := c.Apply(t.Context(), backend, []lbsync.Op{weigh(6)}); err != nil {
				t.Errorf("afterwards: %v, asked %q", err, a.Requests())
			}
		})
	}
}

// TestTurn has a call wait for another, and end with its context.
func TestTurn(t *testing.T) {
	arrived, release := make(chan struct{}, 1), make(chan struct{})
	f := newFault("GET", processPath, func(w http.ResponseWriter, r *http.Request, real http.Handler) {
		select {
		case arrived <- struct{}{}:
		default:
		}
		<-release
		real.ServeHTTP(w, r)
	})
	_, c := start(t, dataplanetest.Options{Wrap: f.wrap}, Config{})
	errs := make(chan error, 1)
	go func() { _, err := c.Probe(t.Context()); errs <- err }()
	<-arrived
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Read(ctx, backend); !errors.Is(err, lbsync.ErrUnknown) || !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if err := c.Close(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Close: got %v", err)
	}
	close(release)
	if err := <-errs; err != nil {
		t.Error(err)
	}
}
