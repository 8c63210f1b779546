package httpapi_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"rollcall/notifier/httpapi"
	"rollcall/registrar"
)

const jsonType = "application/json"

// TestWrites does each operator's word, and holds who may not and what is not
// taken.
func TestWrites(t *testing.T) {
	t.Parallel()
	w := start(t, nil, func(w *world) { w.beat(t, "web", 1, registrar.Meta{}) })
	const at = "/v1/services/web/instances/10.0.0.1:8080"
	auth := []string{"Authorization", "Bearer " + secret, "Content-Type", jsonType}
	with := func(more ...string) []string { return append(more, auth...) }
	for _, c := range []struct {
		name, method, path, body string
		headers                  []string
		want                     int
		says                     string
	}{
		{"no token", "POST", at + "/drain", `{"reason":"x"}`, []string{"Content-Type", jsonType}, 401, "Authorization: Bearer"},
		{"a wrong token", "POST", at + "/drain", `{"reason":"x"}`, []string{"Content-Type", jsonType, "Authorization", "Bearer " + secret + "x"}, 401, ""},
		{"the token as something else", "POST", at + "/drain", `{"reason":"x"}`, []string{"Content-Type", jsonType, "Authorization", "Basic " + secret}, 401, ""},
		{"the token in the URL", "POST", at + "/drain?token=" + strings.ReplaceAll(secret, " ", "+"), `{"reason":"x"}`, []string{"Content-Type", jsonType}, 401, ""},
		{"another site's page", "POST", at + "/drain", `{"reason":"x"}`, with("Origin", "https://evil.example"), 403, "cross-origin"},
		{"another site's page, as browsers say", "POST", at + "/drain", `{"reason":"x"}`, with("Sec-Fetch-Site", "cross-site"), 403, "cross-origin"},
		{"deregister without a token", "DELETE", at, "", nil, 401, ""},
		{"a form", "POST", at + "/drain", "reason=x", []string{"Authorization", "Bearer " + secret, "Content-Type", "application/x-www-form-urlencoded"}, 415, ""},
		{"no type", "POST", at + "/drain", `{"reason":"x"}`, []string{"Authorization", "Bearer " + secret}, 415, ""},
		{"no reason", "POST", at + "/drain", `{}`, auth, 400, "reason"},
		{"a blank reason", "POST", at + "/maint", `{"reason":"  "}`, auth, 400, "reason"},
		{"a reason too long", "POST", at + "/drain", `{"reason":"` + strings.Repeat("x", registrar.MaxText+1) + `"}`, auth, 400, "255"},
		{"a reason of two lines", "POST", at + "/drain", `{"reason":"a\nb"}`, auth, 400, "one line"},
		{"no JSON", "POST", at + "/drain", `reason`, auth, 400, "body"},
		{"two documents", "POST", at + "/drain", `{"reason":"x"}{}`, auth, 400, "one JSON object"},
		{"a field too many", "POST", at + "/drain", `{"reason":"x","who":"me"}`, auth, 400, "who"},
		{"a body too large", "POST", at + "/drain", `{"reason":"` + strings.Repeat("x", 70<<10) + `"}`, auth, 413, ""},
		{"an unknown verb", "POST", at + "/explode", `{}`, auth, 400, "explode"},
		{"weight without one", "POST", at + "/weight", `{}`, auth, 400, "weight"},
		{"weight of 257", "POST", at + "/weight", `{"weight":257}`, auth, 400, "256"},
		{"weight of a half", "POST", at + "/weight", `{"weight":0.5}`, auth, 400, "weight"},
		{"drain with a weight", "POST", at + "/drain", `{"reason":"x","weight":1}`, auth, 400, "weight"},
		{"no service name", "POST", "/v1/services/WEB/instances/10.0.0.1:8080/drain", `{"reason":"x"}`, auth, 400, "service name"},
		{"no address", "POST", "/v1/services/web/instances/10.0.0.1/drain", `{"reason":"x"}`, auth, 400, "address"},
		{"another spelling of an address", "POST", "/v1/services/web/instances/[::ffff:10.0.0.1]:8080/drain", `{"reason":"x"}`, auth, 400, "address"},
		{"a wait that is none", "POST", at + "/drain?wait=long", `{"reason":"x"}`, auth, 400, "wait"},
		{"GET", "GET", at + "/drain", "", auth, 404, ""},
		{"PUT", "PUT", at + "/drain", "{}", auth, 405, ""},

		{"drain by force", "POST", at + "/drain?force=true", `{"reason":"x"}`, auth, 400, "force"},
		{"ready by force", "POST", at + "/ready?force=true", `{}`, auth, 400, "force"},
		{"for no duration", "POST", at + "/drain", `{"reason":"x","for":"2 hours"}`, auth, 400, `for \"2 hours\": want a duration such as 2h, from 1s to 8784h0m0s`},
		{"for too short", "POST", at + "/drain?for=999ms", `{"reason":"x"}`, auth, 400, "from 1s to 8784h0m0s"},
		{"for too long", "POST", at + "/weight", `{"weight":1,"for":"8784h1ns"}`, auth, 400, "from 1s to 8784h0m0s"},
		{"for two times", "POST", at + "/drain?for=2h", `{"reason":"x","for":"1h"}`, auth, 400, "say it in one of them"},
		{"for what ends one", "POST", at + "/ready", `{"for":"2h"}`, auth, 400, "ready ends an override"},
		{"for the own weight", "POST", at + "/weight?for=2h", `{"weight":null}`, auth, 400, "weight ends an override"},
		{"a scope that is none", "POST", at + "/drain", `{"reason":"x","scope":"instance"}`, auth, 400, `scope \"instance\": want address or registration`},
		{"another scope that is none", "POST", at + "/ready?scope=all", `{}`, auth, 400, "want address or registration"},
		{"deregister for a time", "DELETE", at + "?for=2h", "", auth, 400, "takes no for"},
		{"deregister a scope", "DELETE", at + "?scope=address", "", auth, 400, "no scope"},
		{"a registration that is not there", "POST", "/v1/services/web/instances/10.0.0.7:8080/drain?scope=registration&absent=true", `{"reason":"x"}`, auth, 404, "of the one that is there now"},

		{"drain", "POST", at + "/drain", `{"reason":"<b>new</b> disk"}`, auth, 200, `"done":"drain","version":2,"present":true}`},
		{"the same page's own", "POST", at + "/drain", `{"reason":"other"}`, with("Sec-Fetch-Site", "same-origin"), 200, `"version":3`},
		{"maint, nobody to wait for", "POST", at + "/maint?wait=50ms", `{"reason":"x"}`, auth, 202, `"version":4,"present":true,"applied":false,"why":"wait for web: no live balancer follows web`},
		{"ready", "POST", at + "/ready", `{}`, auth, 200, `"version":5`},
		{"weight", "POST", at + "/weight", `{"weight":0}`, auth, 200, `"version":6`},
		{"own weight", "POST", at + "/weight", `{"weight":null}`, auth, 200, `"version":7`},
		{"deregister one that beats", "DELETE", at, "", auth, 409, "force=true"},
		{"deregister it nevertheless", "DELETE", at + "?force=true", "", auth, 200, `"done":"deregister","version":8`},
		{"deregister nobody", "DELETE", at, "", auth, 404, "no such instance"},
		{"an address that nobody has", "POST", "/v1/services/web/instances/[2001:db8::1]:80/drain", `{"reason":"x"}`, auth, 404, "no such instance; ?absent=true"},
		{"a service that nobody has", "POST", "/v1/services/wbe/instances/10.0.0.1:8080/ready", `{}`, auth, 404, "no such instance"},
		{"who is to come", "POST", "/v1/services/web/instances/[2001:db8::1]:80/drain?absent=true", `{"reason":"x"}`, auth, 200, `"present":false`},
		{"and no longer", "POST", "/v1/services/web/instances/[2001:db8::1]:80/ready", `{}`, auth, 200, `"present":false`},
	} {
		r, err := w.fetch(c.method, c.path, c.body, c.headers...)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if r.code != c.want || !strings.Contains(r.body, c.says) {
			t.Errorf("%s: %d %s, want %d %s", c.name, r.code, r.body, c.want, c.says)
		}
	}
	for _, want := range []string{`"verb":"drain","reason":"<b>new</b> disk","who":"http 127.0.0.1:`, `"verb":"deregister"`} {
		if !strings.Contains(strings.ReplaceAll(w.log.String(), `\u003c`, "<"), want) {
			t.Errorf("the log lacks %s:\n%s", want, w.log)
		}
	}
	if strings.Contains(w.log.String(), secret) {
		t.Error("the token is in the log")
	}
}

// TestWriteOfTheLast refuses to take out the last that serves, unless it is forced,
// and says why a drain of it waits.
func TestWriteOfTheLast(t *testing.T) {
	t.Parallel()
	w := start(t, nil, func(w *world) { w.beat(t, "web", 1, registrar.Meta{}) })
	v, err := w.store.Versions(t.Context(), []registrar.Service{"web"})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.store.Acker("lb1").Ack(t.Context(), "web", v.Token("web")); err != nil {
		t.Fatal(err)
	}
	if _, err := w.store.Publish(t.Context(), "lb1", "web", registrar.Seen{Up: map[string]int{"be": 1}, Servers: map[netip.AddrPort]map[string]registrar.ServerState{
		address(1): {"be": {Server: "s1", State: "ready", Check: "up", Weight: 100}},
	}}); err != nil {
		t.Fatal(err)
	}
	const why = "it is the last that serves: lb1 sends requests to no other server of be"
	for _, c := range []struct {
		path, body string
		want       int
		says       string
	}{
		{"maint", `{"reason":"x"}`, 409, `{"error":"maint web 10.0.0.1:8080: ` + why + `; start another first, or drain it, which waits for one, or ?force=true to take it out all the same"}`},
		{"weight", `{"weight":0}`, 409, why},
		{"weight", `{"weight":5}`, 200, `"version":2,`},
		{"drain", `{"reason":"x"}`, 200, `"version":3,"present":true,"waits":"` + why},
		{"drain?wait=50ms", `{"reason":"y"}`, 202, `"waits":"` + why},
		{"ready", `{}`, 200, `"present":true}`},
		{"weight?force=true", `{"weight":0}`, 200, `"version":6,`},
		{"maint", `{"reason":"x"}`, 200, `"version":7,`}, // it has been asked for already
		{"ready", `{}`, 200, `"version":8,`},
		{"weight", `{"weight":null}`, 200, `"version":9,`},
		{"maint?force=true", `{"reason":"x"}`, 200, `"version":10,`},
	} {
		r, err := w.fetch("POST", "/v1/services/web/instances/10.0.0.1:8080/"+c.path, c.body, "Authorization", "Bearer "+secret, "Content-Type", jsonType)
		if err != nil || r.code != c.want || !strings.Contains(r.body, c.says) {
			t.Errorf("%s %s: %v, %d %s, want %d %s", c.path, c.body, err, r.code, r.body, c.want, c.says)
		}
	}
}

// TestWriteForAndScope says in the body and in the query how long an override lasts, and
// of whom it is.
func TestWriteForAndScope(t *testing.T) {
	t.Parallel()
	w := start(t, nil, func(w *world) { w.beat(t, "web", 1, registrar.Meta{}) })
	for _, c := range []struct {
		verb, body   string
		state, lasts time.Duration // until then from the override's time; 0 = for ever
		scope        registrar.Scope
	}{
		{"drain", `{"reason":"x","for":"2h"}`, 2 * time.Hour, 0, registrar.ScopeAddress},
		{"drain?for=90m&scope=registration", `{"reason":"x"}`, 90 * time.Minute, 0, registrar.ScopeRegistration},
		{"weight?for=1s", `{"weight":7,"for":"1s","scope":"registration"}`, 90 * time.Minute, time.Second, registrar.ScopeRegistration},
		{"ready", `{}`, 0, time.Second, registrar.ScopeRegistration},
		{"weight", `{"weight":null}`, 0, 0, ""},
		{"maint?scope=address", `{"reason":"x"}`, 0, 0, registrar.ScopeAddress},
	} {
		r, err := w.fetch("POST", "/v1/services/web/instances/10.0.0.1:8080/"+c.verb, c.body, "Authorization", "Bearer "+secret, "Content-Type", jsonType)
		if err != nil || r.code != 200 {
			t.Fatalf("%s %s: %v %+v", c.verb, c.body, err, r)
		}
		entry, err := w.store.Entry(t.Context(), "web", address(1))
		if err != nil {
			t.Fatal(err)
		}
		a := entry.Admin
		left := func(until int64) time.Duration { // of what was said before this one
			if until == 0 {
				return 0
			}
			return time.Duration(until-entry.Now) * time.Millisecond
		}
		within := func(got, want time.Duration) bool {
			return got <= want && got > want-10*time.Second && (got == 0) == (want == 0)
		}
		scope := registrar.Scope("")
		switch {
		case a.ID != "":
			scope = registrar.ScopeRegistration
		case a.State != "" || a.Weight != nil:
			scope = registrar.ScopeAddress
		}
		if !within(left(a.Until), c.state) || !within(left(a.WeightUntil), c.lasts) || scope != c.scope {
			t.Errorf("%s %s: %+v", c.verb, c.body, a)
		}
	}
}

// TestNamedTokens writes as one or another: each only to its services, and each change
// says by whom. The file may change, and be broken for a while.
func TestNamedTokens(t *testing.T) {
	t.Parallel()
	const ci, ops = "the-token-of-ci-1", "the-token-of-ops-2"
	var file atomic.Value
	file.Store("# two\nci " + ci + " web-*\nops " + ops + "\n")
	w := start(t, func(c *httpapi.Config) {
		c.Tokens = func() (httpapi.Tokens, error) { return tokens(file.Load().(string))() }
	}, func(w *world) {
		w.beat(t, "web-1", 1, registrar.Meta{})
		w.beat(t, "api", 1, registrar.Meta{})
	})
	write := func(token, svc, verb string, code int, says string) {
		t.Helper()
		method, path, body := "POST", "/v1/services/"+svc+"/instances/10.0.0.1:8080", `{"reason":"x"}`
		switch verb {
		case "deregister":
			method = "DELETE"
		case "ready":
			body = "{}"
			fallthrough
		default:
			path += "/" + verb
		}
		r, err := w.fetch(method, path+"?force="+fmt.Sprint(verb == "deregister"), body, "Authorization", "Bearer "+token, "Content-Type", jsonType)
		if err != nil || r.code != code || !strings.Contains(r.body, says) {
			t.Errorf("%s %s as %s: %v %d %s, want %d %s", verb, svc, token, err, r.code, r.body, code, says)
		}
	}
	write(ci, "web-1", "drain", 200, "")
	for _, verb := range []string{"drain", "deregister"} {
		write(ci, "api", verb, 403, "the token ci may not change the service api, only web-*")
	}
	write(ops, "api", "maint", 200, "")
	write(ops+"x", "api", "maint", 401, "a token of --token-file")
	write("ci", "web-1", "drain", 401, "")
	if d := w.shows(t, "api", "is out", func(d httpapi.Service) bool { return d.Instances[0].Word != nil }); d.Instances[0].Word.By != "ops" {
		t.Errorf("%+v", d.Instances[0].Word)
	}
	write(ops, "web-1", "deregister", 200, "")
	eventually(t, "events say who", func() error {
		r := w.get(t, "/v1/events")
		for _, want := range []string{`"service":"web-1","addr":"10.0.0.1:8080","what":"drained","version":2,"by":"ci"`, `"what":"maint","version":2,"by":"ops"`, `"what":"deregistered","version":3,"by":"ops"`} {
			if !strings.Contains(r.body, want) {
				return fmt.Errorf("no %s in %s", want, r.body)
			}
		}
		return nil
	})

	file.Store("ci " + ci + "\nops short\n")
	write(ci, "web-1", "ready", 503, "cannot read its tokens")
	if log := w.log.String(); !strings.Contains(log, "token file tokens:2: the second word, the token, is too short") || strings.Contains(log, ci) {
		t.Errorf("the log: %s", log)
	}
	file.Store(secret)
	write(ci, "api", "ready", 401, "")
	write(secret, "api", "ready", 200, "")
	eventually(t, "a token without a name is an address", func() error {
		if r := w.get(t, "/v1/events"); !strings.Contains(r.body, `"what":"ready","version":3,"by":"http 127.0.0.1"`) {
			return errors.New(r.body)
		}
		return nil
	})
	if log := w.log.String(); !strings.Contains(log, `"by":"ci"`) || strings.Contains(log, "the-token") || strings.Contains(log, secret) {
		t.Errorf("the log: %s", log)
	}
}

// TestReadOnly writes nothing without a token of the server's own.
func TestReadOnly(t *testing.T) {
	t.Parallel()
	w := start(t, func(c *httpapi.Config) { c.Tokens = nil }, func(w *world) { w.beat(t, "web", 1, registrar.Meta{}) })
	for _, method := range []string{"POST", "DELETE"} {
		path := "/v1/services/web/instances/10.0.0.1:8080"
		if method == "POST" {
			path += "/maint"
		}
		r, err := w.fetch(method, path, `{"reason":"x"}`, "Authorization", "Bearer ", "Content-Type", jsonType)
		if err != nil || r.code != 403 || !strings.Contains(r.body, "--token-file") {
			t.Errorf("%s: %v %+v", method, err, r)
		}
	}
	if d := w.shows(t, "web", "is there", func(d httpapi.Service) bool { return len(d.Instances) == 1 }); d.Version != 1 {
		t.Errorf("version %d", d.Version)
	}
}

// TestGuesses has an address that guesses wait, but never with the right token,
// and a token file that changes.
func TestGuesses(t *testing.T) {
	t.Parallel()
	token := secret
	w := start(t, func(c *httpapi.Config) { c.Tokens = func() (httpapi.Tokens, error) { return tokens(token)() } })
	try := func(guess string) int {
		t.Helper()
		r, err := w.fetch("POST", "/v1/services/web/instances/10.0.0.1:8080/ready?absent=true", "{}", "Authorization", "Bearer "+guess, "Content-Type", jsonType)
		if err != nil {
			t.Fatal(err)
		}
		return r.code
	}
	if code := try(secret); code != 200 {
		t.Errorf("the token: %d", code)
	}
	token = "another token of it"
	if code := try(secret); code != 401 {
		t.Errorf("the old token: %d", code)
	}
	if code := try(token); code != 200 {
		t.Errorf("the new token: %d", code)
	}
	for range 9 {
		if code := try("guess"); code != 401 {
			t.Errorf("a guess: %d", code)
		}
	}
	if code := try("guess"); code != 429 {
		t.Errorf("after 10 guesses: %d, want 429", code)
	}
	if code := try(token); code != 200 {
		t.Errorf("the token after 10 guesses of others: %d, want 200", code)
	}
	if n := w.server.Stats().RefusedTokens; n != 10 {
		t.Errorf("%d refused, want 10", n)
	}
	token = "short"
	if code := try(token); code != 503 {
		t.Errorf("the server's token is too short: %d, want 503", code)
	}
}

// TestWriteWaits waits for live balancers, and says who has not applied it.
func TestWriteWaits(t *testing.T) {
	t.Parallel()
	w := start(t, nil, func(w *world) { w.beat(t, "web", 1, registrar.Meta{}) })
	v, err := w.store.Versions(t.Context(), []registrar.Service{"web"})
	if err != nil {
		t.Fatal(err)
	}
	token := v.Token("web")
	// apply is all that an lbsync says when it has applied token's version.
	apply := func(lb string) {
		t.Helper()
		if err := w.store.Acker(lb).Ack(t.Context(), "web", token); err != nil {
			t.Fatal(err)
		}
		if _, err := w.store.Publish(t.Context(), lb, "web", registrar.Seen{Version: token.Version, Servers: map[netip.AddrPort]map[string]registrar.ServerState{
			netip.MustParseAddrPort("10.0.0.1:8080"): {"be": {Server: "s1", State: "drain", Weight: 100}},
		}}); err != nil {
			t.Fatal(err)
		}
	}
	for _, lb := range []string{"lb1", "lb2"} {
		apply(lb)
	}
	drain := func(wait string) (code int, answer struct {
		Applied   bool
		Why       string
		Version   int64
		Balancers []httpapi.Balancer
	}) {
		r, err := w.fetch(http.MethodPost, "/v1/services/web/instances/10.0.0.1:8080/drain?wait="+wait, fmt.Sprintf(`{"reason":"for %s"}`, wait), "Authorization", "Bearer "+secret, "Content-Type", jsonType)
		if err == nil {
			err = json.Unmarshal([]byte(r.body), &answer)
		}
		if err != nil {
			t.Error(err, r)
		}
		return r.code, answer
	}
	token.Version = 2
	apply("lb1")
	if code, a := drain("50ms"); code != 202 || a.Applied || !strings.Contains(a.Why, "1 of 2") || len(a.Balancers) != 2 || a.Balancers[0].Behind != 0 || a.Balancers[1].Behind != 1 {
		t.Errorf("not applied: %d %+v", code, a)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if code, a := drain("15s"); code != 200 || !a.Applied || a.Version != 3 || len(a.Balancers) != 2 {
			t.Errorf("applied: %d %+v", code, a)
		}
	}()
	token.Version = 3
	for _, lb := range []string{"lb1", "lb2"} {
		apply(lb)
	}
	<-done
}
