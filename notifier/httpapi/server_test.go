package httpapi_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"rollcall/notifier/httpapi"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

const secret = "a token of the tests"

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a Redis and a Server on it.
type world struct {
	redis  *redistest.Server
	rdb    *redis.Client
	store  *registrar.Store
	server *httpapi.Server
	url    string
	log    *lockedBuffer
	stop   func() // the server, and waits for its end
	// patience, if not 0, is how long a stream's reader may take nothing, of
	// whom the kernel then holds little.
	patience time.Duration
	bodies   time.Duration // if not 0, is how long a body may take
	listen   string        // "" = on loopback
	rest     time.Duration // if not 0, is the least time between two reads of a service's overrides
	// secure, if not nil, has the server speak TLS, and clients speak it.
	secure *secure
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// start starts both; change may change the configuration, and seed the register.
func start(t *testing.T, change func(*httpapi.Config), seed ...func(*world)) *world {
	t.Helper()
	w := &world{redis: redistest.Start(t), log: &lockedBuffer{}}
	w.rdb = w.redis.Client(t)
	var err error
	if w.store, err = registrar.NewStore(w.rdb, registrar.DefaultNamespace); err != nil {
		t.Fatal(err)
	}
	// Looked at often, and nobody is silent before the test is over.
	if _, err := w.store.Config(t.Context(), time.Minute, time.Second, true); err != nil {
		t.Fatal(err)
	}
	for _, f := range seed {
		f(w)
	}
	w.serve(t, change)
	return w
}

// serve starts one more server.
func (w *world) serve(t *testing.T, change func(*httpapi.Config)) {
	t.Helper()
	cfg := httpapi.Config{
		Namespace: registrar.DefaultNamespace, Version: "test",
		Tokens: tokens(secret),
		Status: func(o registrar.Overview, n httpapi.Counts) httpapi.Status {
			healthy := false
			for _, r := range o.Reapers {
				healthy = healthy || r.Live && r.Armed
			}
			return httpapi.Status{Healthy: healthy, Document: map[string]any{"healthy": healthy, "counts": n}}
		},
	}
	scheme := "http://"
	if w.secure != nil {
		cfg.TLS, scheme = w.secure.server, "https://"
	}
	if change != nil {
		change(&cfg)
	}
	var err error
	if w.server, err = httpapi.New(cfg, w.store, zerolog.New(w.log)); err != nil {
		t.Fatal(err)
	}
	if w.rest > 0 {
		httpapi.SetRest(w.server, w.rest)
	}
	if w.bodies > 0 {
		httpapi.SetBodies(w.server, w.bodies)
	}
	var lc net.ListenConfig
	if w.patience > 0 {
		httpapi.SetPatience(w.server, w.patience)
		lc.Control = func(_, _ string, c syscall.RawConn) error {
			return c.Control(func(fd uintptr) { _ = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF, 4096) })
		}
	}
	l, err := lc.Listen(t.Context(), "tcp", cmp.Or(w.listen, "127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	w.url = scheme + l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.server.Serve(ctx, l) }()
	w.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(5 * time.Second):
			t.Errorf("Serve does not return")
		}
	})
	t.Cleanup(w.stop)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(w.log)
		}
	})
}

// tokens is a configuration's, of the text of a file.
func tokens(text string) func() (httpapi.Tokens, error) {
	return func() (httpapi.Tokens, error) { return httpapi.ParseTokens("tokens", []byte(text)) }
}

func address(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(n)}), 8080)
}

// beat has an instance beat with this metadata beside its id.
func (w *world) beat(t *testing.T, svc registrar.Service, n int, m registrar.Meta) {
	t.Helper()
	m.ID = fmt.Sprint("token", n)
	if m.Weight == 0 {
		m.Weight = registrar.DefaultWeight
	}
	text, err := json.Marshal(m)
	if err == nil {
		_, err = w.store.Beat(t.Context(), svc, registrar.Beat{Addr: address(n), Token: m.ID, Meta: string(text)})
	}
	if err != nil {
		t.Fatal(err)
	}
}

// client does not keep connections, so that none outlives its test.
var client = &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}

type reply struct {
	code   int
	header http.Header
	body   string
}

// fetch does one request; headers are name, value, name, value.
func (w *world) fetch(method, path, body string, headers ...string) (reply, error) {
	req, err := http.NewRequest(method, w.url+path, strings.NewReader(body))
	if err != nil {
		return reply{}, err
	}
	for i := 0; i < len(headers); i += 2 {
		if headers[i] == "Host" {
			req.Host = headers[i+1]
			continue
		}
		req.Header.Set(headers[i], headers[i+1])
	}
	c := client
	if w.secure != nil {
		c = w.secure.client
	}
	r, err := c.Do(req)
	if err != nil {
		return reply{}, err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return reply{r.StatusCode, r.Header, string(b)}, err
}

func (w *world) get(t *testing.T, path string) reply {
	t.Helper()
	r, err := w.fetch(http.MethodGet, path, "")
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// service reads the document of a service.
func (w *world) service(svc string) (httpapi.Service, error) {
	var d httpapi.Service
	r, err := w.fetch(http.MethodGet, "/v1/services/"+svc, "")
	if err != nil {
		return d, err
	}
	if r.code != http.StatusOK {
		return d, fmt.Errorf("%d %s", r.code, r.body)
	}
	return d, json.Unmarshal([]byte(r.body), &d)
}

// eventually polls until f returns nil.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	end := time.Now().Add(10 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("waiting until %s: %v", what, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// shows waits until the service's document is as want says.
func (w *world) shows(t *testing.T, svc, what string, want func(httpapi.Service) bool) (d httpapi.Service) {
	t.Helper()
	eventually(t, svc+": "+what, func() error {
		var err error
		if d, err = w.service(svc); err != nil {
			return err
		}
		if !want(d) {
			return fmt.Errorf("%+v", d)
		}
		return nil
	})
	return d
}

func states(d httpapi.Service) string {
	var out []string
	for _, i := range d.Instances {
		out = append(out, i.Addr+" "+i.State)
	}
	return strings.Join(out, ", ")
}

// TestDocuments reads everything that can be read of a small register.
func TestDocuments(t *testing.T) {
	t.Parallel()
	w := start(t, nil)
	w.beat(t, "web", 10, registrar.Meta{Zone: "a", Tags: map[string]string{"team-x": "<b>"}})
	w.beat(t, "web", 9, registrar.Meta{Weight: 7, Draining: true})
	w.beat(t, "web", 3, registrar.Meta{})
	w.beat(t, "api", 1, registrar.Meta{})
	five := 5
	for _, word := range []registrar.Word{{Verb: "maint", Reason: "disk"}, {Verb: "weight", Weight: &five}} {
		if _, _, err := w.store.SetAdmin(t.Context(), "web", address(3), word); err != nil {
			t.Fatal(err)
		}
	}
	w.beat(t, "web", 4, registrar.Meta{})
	if _, err := w.store.Leave(t.Context(), "web", address(4), "token4", registrar.Unhealthy); err != nil {
		t.Fatal(err)
	}
	d := w.shows(t, "web", "all is there", func(d httpapi.Service) bool { return d.Version == 7 })
	if want := "10.0.0.3:8080 maint, 10.0.0.9:8080 draining, 10.0.0.10:8080 ready"; states(d) != want {
		t.Errorf("states %s, want %s", states(d), want)
	}
	if i := d.Instances[0]; i.Weight != 5 || i.Reason != "disk" || i.Word == nil || *i.Word.Weight != 5 {
		t.Errorf("the operator's word: %+v", i)
	}
	if i := d.Instances[2]; i.Zone != "a" || i.Tags["team-x"] != "<b>" || i.AgeMS < 0 || i.AgeMS > 60000 || i.Silent {
		t.Errorf("the instance: %+v", i)
	}
	if len(d.Gone) != 1 || d.Gone[0].Addr != "10.0.0.4:8080" || d.Gone[0].Reason != registrar.Unhealthy {
		t.Errorf("gone: %+v", d.Gone)
	}
	v, err := w.store.Versions(t.Context(), []registrar.Service{"web"})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.store.Acker("lb1").Ack(t.Context(), "web", v.Token("web")); err != nil {
		t.Fatal(err)
	}
	w.shows(t, "web", "the balancer is up to date", func(d httpapi.Service) bool {
		return len(d.Balancers) == 1 && d.Balancers[0].Live && d.Balancers[0].Behind == 0 && d.Balancers[0].Applied == 7
	})
	w.beat(t, "web", 5, registrar.Meta{})
	w.shows(t, "web", "the balancer is behind", func(d httpapi.Service) bool {
		return len(d.Balancers) == 1 && d.Balancers[0].Behind == 1
	})

	// What HAProxy has: of one that serves, and of one that is gone and kept.
	seen := registrar.Seen{Anew: true, Servers: map[netip.AddrPort]map[string]registrar.ServerState{
		address(10): {"be": {Server: "s1", State: "ready", Check: "up", Weight: 100}},
		address(9):  {"be": {Server: "s2", State: "drain", Weight: 7}},
		address(4):  {"be": {Server: "s3", State: "ready", Weight: 100, Note: registrar.NoteHeld, Why: "<check>", Until: 99}},
		address(77): {"be": {Server: "s4", State: "maint"}}, // a server that is as it should be
	}}
	if _, err := w.store.Publish(t.Context(), "lb1", "web", seen); err != nil {
		t.Fatal(err)
	}
	d = w.shows(t, "web", "what HAProxy has", func(d httpapi.Service) bool {
		return states(d) == "10.0.0.3:8080 maint, 10.0.0.4:8080 gone, 10.0.0.5:8080 ready, 10.0.0.9:8080 draining, 10.0.0.10:8080 ready"
	})
	if in := d.Instances[4].HAProxy; len(in) != 1 || !in[0].Serving || in[0].Balancer != "lb1" || in[0].Backend != "be" || in[0].Server != "s1" {
		t.Errorf("who serves: %+v", in)
	}
	if i := d.Instances[1]; i.Reason != "unhealthy" || i.HAProxy[0].Note != registrar.NoteHeld || i.HAProxy[0].Until != 99 {
		t.Errorf("who is kept: %+v", i)
	}
	if in := d.Instances[3].HAProxy; len(in) != 1 || in[0].Serving {
		t.Errorf("who drains: %+v", in)
	}

	r := w.get(t, "/v1/services")
	for _, want := range []string{`"service":"api"`, `"instances":4,"ready":2,"serving":1,"out":2,"silent":0,"absent":0,"garbage":0,"kept":1`, `"behind":1`, `"answers":true`} {
		if !strings.Contains(r.body, want) {
			t.Errorf("/v1/services lacks %s: %s", want, r.body)
		}
	}
	if r.header.Get("Age") == "" || r.header.Get("Content-Type") != "application/json" || r.header.Get("Rollcall-Stale-Since") != "" {
		t.Errorf("headers %v", r.header)
	}
	if r := w.get(t, "/v1/balancers"); !strings.Contains(r.body, `"balancer":"lb1","service":"web","applied":7,"behind":1`) {
		t.Errorf("/v1/balancers: %s", r.body)
	}
	if r := w.get(t, "/v1/history"); !strings.Contains(r.body, `,2,2,0]`) {
		t.Errorf("/v1/history: %s", r.body)
	}
	r = w.get(t, "/v1/sd/prometheus?service=web")
	var sd []struct {
		Targets []string
		Labels  map[string]string
	}
	if err := json.Unmarshal([]byte(r.body), &sd); err != nil || len(sd) != 4 || sd[3].Targets[0] != "10.0.0.10:8080" ||
		sd[3].Labels["__meta_rollcall_tag_team_x"] != "<b>" || sd[3].Labels["__meta_rollcall_state"] != "ready" || sd[3].Labels["__meta_rollcall_zone"] != "a" {
		t.Errorf("/v1/sd/prometheus: %v %+v", err, sd)
	}
	for path, want := range map[string]int{
		"/v1/services/nobody": 404, "/v1/services/UPPER": 400, "/v1/services/web?wait=x": 400, "/v1/services/web?wait=-1s": 400,
		"/v1/sd/prometheus?service=%3Cb%3E": 400, "/v1/stream?service=%3Cb%3E": 400, "/nothing": 404, "/v1/services/web/x": 404,
	} {
		if r := w.get(t, path); r.code != want {
			t.Errorf("%s: %d, want %d: %s", path, r.code, want, r.body)
		}
	}
}

// TestEvents reads the log, of memory and of Redis, and what it says of the time
// before the start.
func TestEvents(t *testing.T) {
	t.Parallel()
	w := start(t, nil, func(w *world) {
		w.beat(t, "web", 1, registrar.Meta{})
		w.beat(t, "web", 2, registrar.Meta{})
		w.beat(t, "api", 1, registrar.Meta{})
		if _, err := w.store.Leave(t.Context(), "web", address(2), "token2", registrar.Left); err != nil {
			t.Fatal(err)
		}
	})
	read := func(query string) (out []registrar.Event) {
		t.Helper()
		r := w.get(t, "/v1/events"+query)
		var a struct{ Events []registrar.Event }
		if err := json.Unmarshal([]byte(r.body), &a); err != nil || r.code != 200 {
			t.Errorf("%s: %d %s %v", query, r.code, r.body, err)
		}
		return a.Events
	}
	what := func(events []registrar.Event) string {
		out := ""
		for _, e := range events {
			out += fmt.Sprint(e.Service, " ", e.What, "; ")
		}
		return out
	}
	w.shows(t, "web", "is there", func(d httpapi.Service) bool { return d.Version == 3 })
	eventually(t, "all events are there", func() error {
		if got := what(read("")); got != "web joined; web joined; api joined; web left; " {
			return errors.New(got)
		}
		return nil
	})
	all := read("")
	r := w.follow(t, "?service=web", "")
	for _, c := range []struct{ query, want string }{
		{"?service=api", "api joined; "},
		{"?limit=1", "web left; "},
		{"?since=" + all[1].ID, "api joined; web left; "},
		{"?service=web&since=" + all[0].ID, "web joined; web left; "},
		{"?since=" + all[3].ID, ""},
		{"?since=1-1", "web joined; web joined; api joined; web left; "}, // from Redis
		{"?since=1-1&limit=2&service=web", "web joined; web left; "},
	} {
		if got := what(read(c.query)); got != c.want {
			t.Errorf("%s: %s, want %s", c.query, got, c.want)
		}
	}
	for _, query := range []string{"?since=x", "?limit=0", "?limit=1001", "?limit=x", "?service=A"} {
		if r := w.get(t, "/v1/events"+query); r.code != 400 {
			t.Errorf("%s: %d %s", query, r.code, r.body)
		}
	}
	w.beat(t, "web", 3, registrar.Meta{})
	r.gets(t, `"addr":"10.0.0.3:8080","what":"joined"`)
	if got := r.String(); strings.Contains(got, "api") {
		t.Errorf("events of another service:\n%s", got)
	}
	eventually(t, "the history has five points", func() error { // the log may tell sooner
		var h struct {
			Services map[string][][4]int64
		}
		if r := w.get(t, "/v1/history"); json.Unmarshal([]byte(r.body), &h) != nil || len(h.Services["web"]) != 5 || h.Services["web"][2][1] != 2 {
			return errors.New(r.body)
		}
		return nil
	})
}

// TestStatusCode has /v1/status answer as `rollcall status` exits.
func TestStatusCode(t *testing.T) {
	t.Parallel()
	w := start(t, nil)
	for _, armed := range []bool{false, true, false} {
		if err := w.store.Report(t.Context(), "r", &registrar.ReaperStatus{Armed: armed}); err != nil {
			t.Fatal(err)
		}
		want := http.StatusServiceUnavailable
		if armed {
			want = http.StatusOK
		}
		eventually(t, fmt.Sprintf("armed %v", armed), func() error {
			r, err := w.fetch(http.MethodGet, "/v1/status", "")
			if err != nil || r.code != want || !strings.Contains(r.body, fmt.Sprintf(`"healthy":%v`, armed)) {
				return fmt.Errorf("%d %s, %v", r.code, r.body, err)
			}
			return nil
		})
	}
}

// TestLongPoll waits for changes by version and by token.
func TestLongPoll(t *testing.T) {
	t.Parallel()
	w := start(t, nil, func(w *world) { w.beat(t, "web", 1, registrar.Meta{}) })
	d := w.shows(t, "web", "is there", func(d httpapi.Service) bool { return d.Version == 1 })
	for _, c := range []struct {
		name, version string
		at            string // once; else only after a change
	}{
		{"another version", "0", "1"},
		{"a later version", "9", "1"},
		{"another history's token", "other.epoch.1", "1"},
		{"no version", "", "1"},
	} {
		if r := w.get(t, "/v1/services/web?wait=60s&version="+c.version); !strings.Contains(r.body, `"version":`+c.at) {
			t.Errorf("%s: %s", c.name, r.body)
		}
	}
	if r := w.get(t, "/v1/services/web?wait=10ms&version=1"); r.code != 200 || !strings.Contains(r.body, `"version":1`) {
		t.Errorf("a wait that ends: %d %s", r.code, r.body)
	}
	poll := func(path string) <-chan string {
		got := make(chan string, 1)
		go func() {
			r, err := w.fetch(http.MethodGet, path, "")
			got <- fmt.Sprint(r.code, " ", r.body, err)
		}()
		return got
	}
	list := w.get(t, "/v1/services")
	var l struct{ Token string }
	if err := json.Unmarshal([]byte(list.body), &l); err != nil {
		t.Fatal(err)
	}
	byVersion, byToken := poll("/v1/services/web?wait=15s&version=1"), poll("/v1/services/web?wait=15s&version="+d.Token)
	all, next := poll("/v1/services?wait=15s&version="+l.Token), poll("/v1/services/later?wait=15s&version=0")
	for i, waits := range []<-chan string{byVersion, byToken, all, next} {
		select {
		case got := <-waits:
			t.Errorf("poll %d does not wait: %s", i, got)
		case <-time.After(30 * time.Millisecond):
		}
	}
	w.beat(t, "web", 2, registrar.Meta{})
	w.beat(t, "later", 1, registrar.Meta{})
	for i, waits := range []<-chan string{byVersion, byToken, all, next} {
		want := []string{`"version":2`, `"version":2`, `"service":"web","version":2`, `"service":"later","version":1`}[i]
		if got := <-waits; !strings.Contains(got, want) && i != 2 || !strings.HasPrefix(got, "200") {
			t.Errorf("poll %d: %s, want %s", i, got, want)
		}
	}
	// The end of the server ends who waits.
	byVersion = poll("/v1/services/web?wait=60s&version=2")
	eventually(t, "it waits", func() error {
		if w.server.Stats().Waiting != 1 {
			return errors.New("not yet")
		}
		return nil
	})
	begun := time.Now()
	w.stop()
	if took := time.Since(begun); took > 4*time.Second {
		t.Errorf("the end took %v", took)
	}
	if got := <-byVersion; !strings.HasPrefix(got, "200") {
		t.Errorf("who waits at the end: %s", got)
	}
}

// TestRedisAway serves what is known with its age, and nothing where nothing is.
func TestRedisAway(t *testing.T) {
	t.Parallel()
	w := start(t, nil, func(w *world) { w.beat(t, "web", 1, registrar.Meta{}) })
	w.shows(t, "web", "is there", func(d httpapi.Service) bool { return len(d.Instances) == 1 })
	if err := w.store.Report(t.Context(), "r", &registrar.ReaperStatus{Armed: true}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "healthy", func() error {
		if r := w.get(t, "/v1/status"); r.code != 200 {
			return errors.New(r.body)
		}
		return nil
	})
	w.redis.Kill(t)
	eventually(t, "it says that it is away", func() error {
		r := w.get(t, "/v1/services")
		if since := r.header.Get("Rollcall-Stale-Since"); r.code != 200 || since == "" || !strings.Contains(r.body, `"answers":false`) || !strings.Contains(r.body, `"ready":1`) {
			return fmt.Errorf("%d %v %s", r.code, r.header, r.body)
		}
		return nil
	})
	for path, want := range map[string]int{"/v1/services/web": 200, "/v1/sd/prometheus": 200, "/v1/balancers": 200, "/v1/history": 200, "/v1/status": 503} {
		if r := w.get(t, path); r.code != want || r.header.Get("Rollcall-Stale-Since") == "" {
			t.Errorf("%s: %d %v %s", path, r.code, r.header, r.body)
		}
	}
	if r, err := w.fetch("POST", "/v1/services/web/instances/10.0.0.1:8080/drain", `{"reason":"x"}`, "Authorization", "Bearer "+secret, "Content-Type", "application/json"); err != nil || r.code != 503 || !strings.Contains(r.body, "unknown") {
		t.Errorf("a write: %v %+v", err, r)
	}
	// A server that starts now knows nothing, which is not an empty register.
	w.stop()
	w.serve(t, nil)
	for _, path := range []string{"/v1/services", "/v1/services/web", "/v1/services/web?version=0&wait=10ms", "/v1/sd/prometheus", "/v1/balancers", "/v1/history", "/v1/status"} {
		if r := w.get(t, path); r.code != 503 || !strings.Contains(r.body, "nothing is known yet") {
			t.Errorf("%s: %d %s", path, r.code, r.body)
		}
	}
	w.redis.Launch(t)
	eventually(t, "Redis, empty, is known to be", func() error {
		if r := w.get(t, "/v1/services"); r.code != 200 || !strings.Contains(r.body, `"services":[]`) {
			return errors.New(r.body)
		}
		return nil
	})
}

// TestRedisComesBackEmpty keeps whom Redis has lost, as absent, and as targets.
func TestRedisComesBackEmpty(t *testing.T) {
	t.Parallel()
	w := start(t, nil, func(w *world) {
		w.beat(t, "web", 1, registrar.Meta{})
		w.beat(t, "web", 2, registrar.Meta{})
	})
	w.shows(t, "web", "is there", func(d httpapi.Service) bool { return len(d.Instances) == 2 })
	w.redis.Kill(t)
	w.redis.Launch(t)
	w.beat(t, "web", 2, registrar.Meta{})
	w.shows(t, "web", "one is back", func(d httpapi.Service) bool {
		return states(d) == "10.0.0.1:8080 absent, 10.0.0.2:8080 ready"
	})
	if r := w.get(t, "/v1/sd/prometheus"); !strings.Contains(r.body, "10.0.0.1:8080") {
		t.Errorf("the absent one is no target: %s", r.body)
	}
	w.beat(t, "web", 1, registrar.Meta{})
	w.shows(t, "web", "both are back", func(d httpapi.Service) bool {
		return states(d) == "10.0.0.1:8080 ready, 10.0.0.2:8080 ready"
	})
}

// TestAbsentEnds drops an absent instance after TTL + 2 heartbeats.
func TestAbsentEnds(t *testing.T) {
	t.Parallel()
	w := start(t, nil, func(w *world) {
		if _, err := w.store.Config(t.Context(), 300*time.Millisecond, 100*time.Millisecond, true); err != nil {
			t.Fatal(err)
		}
		w.beat(t, "web", 1, registrar.Meta{})
		w.beat(t, "web", 2, registrar.Meta{})
	})
	w.shows(t, "web", "is there", func(d httpapi.Service) bool { return len(d.Instances) == 2 })
	k := w.store.Keys()
	if err := w.rdb.ZRem(t.Context(), k.Instances("web"), address(1).String()).Err(); err != nil {
		t.Fatal(err)
	}
	w.shows(t, "web", "one is absent", func(d httpapi.Service) bool {
		return strings.HasPrefix(states(d), "10.0.0.1:8080 absent")
	})
	w.shows(t, "web", "it is dropped", func(d httpapi.Service) bool { return states(d) == "10.0.0.2:8080 ready" })
}

// TestSilent marks who has missed heartbeats, though no message says so.
func TestSilent(t *testing.T) {
	t.Parallel()
	w := start(t, nil, func(w *world) {
		if _, err := w.store.Config(t.Context(), 300*time.Millisecond, 100*time.Millisecond, true); err != nil {
			t.Fatal(err)
		}
		w.beat(t, "web", 1, registrar.Meta{})
	})
	d := w.shows(t, "web", "it is silent", func(d httpapi.Service) bool { return len(d.Instances) == 1 && d.Instances[0].Silent })
	if d.Instances[0].AgeMS < 190 || d.Instances[0].State != "ready" {
		t.Errorf("%+v", d.Instances[0])
	}
}

// TestGarbage shows what cannot be believed as such.
func TestGarbage(t *testing.T) {
	t.Parallel()
	w := start(t, nil, func(w *world) {
		w.beat(t, "web", 1, registrar.Meta{})
		if err := w.rdb.HSet(t.Context(), w.store.Keys().Meta("web"), address(1).String(), `{"weight":900}`).Err(); err != nil {
			t.Fatal(err)
		}
	})
	d := w.shows(t, "web", "it is garbage", func(d httpapi.Service) bool { return states(d) == "10.0.0.1:8080 garbage" })
	if !strings.Contains(d.Instances[0].Reason, "900") {
		t.Errorf("%+v", d.Instances[0])
	}
	if r := w.get(t, "/v1/sd/prometheus"); strings.TrimSpace(r.body) != "[]" {
		t.Errorf("targets %s", r.body)
	}
}

// TestEventsFromRedis has Redis read for two requests at a time: others are told
// to come again, and do not take the connections that the server itself needs.
func TestEventsFromRedis(t *testing.T) {
	t.Parallel()
	w := start(t, nil, func(w *world) { w.beat(t, "web", 1, registrar.Meta{}) })
	w.shows(t, "web", "is there", func(d httpapi.Service) bool { return len(d.Instances) == 1 })
	w.redis.Signal(t, syscall.SIGSTOP)
	const asked = 6
	replies := make(chan reply, asked)
	for range asked {
		go func() {
			r, err := w.fetch(http.MethodGet, "/v1/events?since=1-1", "")
			if err != nil {
				t.Error(err)
			}
			replies <- r
		}()
	}
	busy := 0
	for range asked {
		r := <-replies
		if r.code != http.StatusServiceUnavailable {
			t.Errorf("%d %s", r.code, r.body)
		}
		if strings.Contains(r.body, "too many") && r.header.Get("Retry-After") != "" {
			busy++
		}
	}
	w.redis.Signal(t, syscall.SIGCONT)
	if busy != asked-2 {
		t.Errorf("%d of %d were told to come again", busy, asked)
	}
	eventually(t, "it answers again", func() error {
		if r := w.get(t, "/v1/events?since=1-1"); r.code != http.StatusOK {
			return errors.New(r.body)
		}
		return nil
	})
}

// TestUnreadBodies sends bodies that never come: the connection ends, whoever
// answered and whether anybody wanted the body.
func TestUnreadBodies(t *testing.T) {
	t.Parallel()
	w := &world{redis: redistest.Start(t), log: &lockedBuffer{}, bodies: 100 * time.Millisecond}
	var err error
	if w.store, err = registrar.NewStore(w.redis.Client(t), registrar.DefaultNamespace); err != nil {
		t.Fatal(err)
	}
	w.serve(t, nil)
	const at = "/v1/services/web/instances/10.0.0.1:8080"
	for _, head := range []string{
		"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9",
		"GET /v1/status HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked",
		"GET / HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 9",
		"POST " + at + "/ready HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9", // refused
		"POST " + at + "/ready HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nContent-Type: application/json\r\nAuthorization: Bearer " + secret,
		"DELETE " + at + " HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nAuthorization: Bearer " + secret,
	} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(w.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, head+"\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(conn); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: the connection is open; it answered %q", head, got)
		}
		_ = conn.Close() // it has been read to its end
	}
}

// TestEveryHost takes every name when it is told to.
func TestEveryHost(t *testing.T) {
	t.Parallel()
	w := start(t, func(c *httpapi.Config) { c.Hosts = []string{httpapi.AnyHost} })
	if r, err := w.fetch(http.MethodGet, "/", "", "Host", "some.example"); err != nil || r.code != http.StatusOK {
		t.Errorf("%d %v", r.code, err)
	}
}

// TestGuard holds what every answer has, and whose names are taken,
// where others can reach it too.
func TestGuard(t *testing.T) {
	t.Parallel()
	w := &world{redis: redistest.Start(t), log: &lockedBuffer{}, listen: "0.0.0.0:0"}
	var err error
	if w.store, err = registrar.NewStore(w.redis.Client(t), registrar.DefaultNamespace); err != nil {
		t.Fatal(err)
	}
	w.serve(t, func(c *httpapi.Config) { c.Hosts = []string{"Ops.example"} })
	for host, want := range map[string]int{
		"127.0.0.1:8300": 200, "[::1]:8300": 200, "[::1]": 200, "localhost:8300": 200, "localhost": 200, "ops.example": 200, "ops.example:443": 200, "OPS.Example": 200, "LocalHost": 200,
		"evil.example": 421, "evil.example:8300": 421, "localhost.evil.example": 421, "127.0.0.1.evil.example": 421,
	} {
		for _, path := range []string{"/", "/page.js", "/v1/stream?service=BAD"} {
			r, err := w.fetch(http.MethodGet, path, "", "Host", host)
			if err != nil {
				t.Fatal(err)
			}
			if (r.code == 421) != (want == 421) {
				t.Errorf("%s %s: %d, want %d", host, path, r.code, want)
			}
			for name, part := range map[string]string{
				"Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
			} {
				if !strings.Contains(r.header.Get(name), part) {
					t.Errorf("%s %s: %s is %q", host, path, name, r.header.Get(name))
				}
			}
		}
	}
	for _, path := range []string{"/", "/index.html", "/page.js", "/page.css", "/icon.svg"} {
		if r := w.get(t, path); r.code != 200 && r.code != 301 || r.header.Get("Access-Control-Allow-Origin") != "" {
			t.Errorf("%s: %d %v", path, r.code, r.header)
		}
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	rdb := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1"})
	defer rdb.Close()
	store, err := registrar.NewStore(rdb, registrar.DefaultNamespace)
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"", "ops.example:443", "http://ops.example", "[::1]"} {
		if _, err := httpapi.New(httpapi.Config{Hosts: []string{host}}, store, zerolog.Nop()); err == nil || !strings.Contains(err.Error(), "without a port") {
			t.Errorf("host %q: %v", host, err)
		}
	}
	for _, c := range []struct {
		token string
		err   error
		want  string
	}{
		{strings.Repeat("x", httpapi.MinToken-1), nil, "at least 16"},
		{"", errors.New("no such file"), "no such file"},
		{strings.Repeat("x", httpapi.MinToken), nil, ""},
	} {
		_, err := httpapi.New(httpapi.Config{Tokens: func() (httpapi.Tokens, error) {
			if c.err != nil {
				return httpapi.Tokens{}, c.err
			}
			return tokens(c.token)()
		}}, store, zerolog.Nop())
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%q, %v: %v, want %q", c.token, c.err, err, c.want)
		}
	}
	cluster := redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{"127.0.0.1:1"}})
	defer cluster.Close()
	if store, err = registrar.NewStore(cluster, registrar.DefaultNamespace); err != nil {
		t.Fatal(err)
	}
	if _, err := httpapi.New(httpapi.Config{}, store, zerolog.Nop()); err == nil {
		t.Error("a Cluster is taken")
	}
}
