// Package dataplanetest is a stand-in for the Data Plane API in tests: it
// answers as the public specification has it and drives the real HAProxy behind
// it, through client-native's runtime client, as the API itself does.
//
// It follows haproxy-spec.yaml of client-native v6.3.2 to v6.4.0 and the
// behaviour of the API's handlers v3.3.1 to v3.4.2, for the runtime servers, the
// process information, the native statistics and /info. It is stricter than the
// API: whatever else is asked of it, above all a configuration endpoint, an
// unspecified parameter or field, fails the test.
package dataplanetest

import (
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/haproxytech/client-native/v5/misc"
	"github.com/haproxytech/client-native/v5/models"
	"github.com/haproxytech/client-native/v5/runtime"
	"github.com/haproxytech/client-native/v5/runtime/options"
)

// Options says which API to stand in for.
type Options struct {
	// Version is what /info reports; "" means "v3.4.2 8c7bce50". One that
	// begins with v2 has nothing but /v2/info.
	Version string
	// Old makes it neither report nor take weights and addresses, as up to
	// v3.3.0.
	Old bool
	TLS bool
	// Wrap is put around the handler, to lose requests or answers.
	Wrap func(http.Handler) http.Handler
}

// API is a running stand-in.
type API struct {
	URL          string
	User         string
	PasswordFile string
	CAFile       string // "" without TLS

	tb      testing.TB
	o       Options
	runtime *runtime.SingleRuntime

	mu       sync.Mutex // guards what follows
	requests []string
}

// Start starts an API for the HAProxy with this stats socket. It ends with the
// test.
func Start(tb testing.TB, socket string, o Options) *API {
	tb.Helper()
	if o.Version == "" {
		o.Version = "v3.4.2 8c7bce50"
	}
	dir := tb.TempDir()
	a := &API{User: "rollcall", PasswordFile: filepath.Join(dir, "password"), tb: tb, o: o, runtime: &runtime.SingleRuntime{}}
	a.SetPassword(tb, rand.Text())
	if err := a.runtime.Init(socket, 0, 0, options.RuntimeOptions{DoNotCheckRuntimeOnInit: true}); err != nil {
		tb.Fatal(err)
	}
	var h http.Handler = http.HandlerFunc(a.serve)
	if o.Wrap != nil {
		h = o.Wrap(h)
	}
	s := httptest.NewUnstartedServer(h)
	if o.TLS {
		s.StartTLS()
		a.CAFile = filepath.Join(dir, "ca.pem")
		block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
		if err := os.WriteFile(a.CAFile, block, 0o600); err != nil {
			tb.Fatal(err)
		}
	} else {
		s.Start()
	}
	a.URL = s.URL
	tb.Cleanup(s.Close)
	return a
}

// SetPassword writes a password into the file, from which the API knows it too.
func (a *API) SetPassword(tb testing.TB, password string) {
	tb.Helper()
	if err := os.WriteFile(a.PasswordFile, []byte(password+"\n"), 0o600); err != nil {
		tb.Fatal(err)
	}
}

// Requests returns what has been asked, as "PUT /v3/… {…}", in order.
func (a *API) Requests() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.requests)
}

// answer is a status and a body; a nil body is none.
type answer struct {
	status int
	body   any
}

func failure(status int, words string) answer {
	code := int64(status)
	return answer{status, &models.Error{Code: &code, Message: &words}}
}

// of is the answer to an error of client-native.
func of(err error) answer {
	status := http.StatusInternalServerError
	if errors.Is(err, errNoData) {
		status = http.StatusNotFound
	}
	return failure(status, err.Error())
}

// errNoData is the text that client-native v6 has for whatever it could not read.
var errNoData = errors.New("not found")

func (a *API) serve(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // the caller is gone
	}
	a.mu.Lock()
	a.requests = append(a.requests, strings.TrimSpace(r.Method+" "+r.URL.RequestURI()+" "+string(body)))
	a.mu.Unlock()
	got := a.handle(w, r, body)
	if got.body == nil {
		w.WriteHeader(got.status)
		return
	}
	text, err := json.Marshal(got.body)
	if err != nil {
		a.tb.Errorf("dataplanetest: %v", err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(got.status)
	_, _ = w.Write(append(text, '\n')) // the caller may be gone
}

var serversPath = regexp.MustCompile(`^/v3/services/haproxy/runtime/backends/([^/]+)/servers(?:/([^/]+))?$`)

func (a *API) handle(w http.ResponseWriter, r *http.Request, body []byte) answer {
	// Authentication is in front of everything, as in v3.4; a file that has
	// just been changed is the new password.
	password, err := os.ReadFile(a.PasswordFile)
	if err != nil {
		a.tb.Errorf("dataplanetest: %v", err)
	}
	user, given, ok := r.BasicAuth()
	if !ok || user != a.User || given != strings.TrimSpace(string(password)) {
		w.Header().Set("WWW-Authenticate", `Basic realm="API"`)
		return failure(http.StatusUnauthorized, "missing or invalid authorization")
	}
	if accept := r.Header.Get("Accept"); accept != "application/json" {
		a.tb.Errorf("%s %s: Accept is %q", r.Method, r.URL, accept)
		return failure(http.StatusNotAcceptable, "unsupported media type requested, only [application/json] are available")
	}
	v2 := strings.HasPrefix(a.o.Version, "v2")
	switch path := r.URL.Path; {
	case v2 && path == "/v2/info", !v2 && path == "/v3/info":
		return a.only(r, http.MethodGet, body, func() answer {
			return answer{http.StatusOK, &models.Info{API: &models.InfoAPI{Version: a.o.Version}, System: &models.InfoSystem{}}}
		})
	case v2 && path == "/v3/info", !v2 && path == "/v2/info":
	case v2:
		a.tb.Errorf("a v2 API was asked: %s %s", r.Method, r.URL)
	case path == "/v3/services/haproxy/runtime/info":
		return a.only(r, http.MethodGet, body, func() answer {
			info := a.runtime.GetInfo()
			return answer{http.StatusOK, &info}
		})
	case path == "/v3/services/haproxy/stats/native":
		return a.only(r, http.MethodGet, body, func() answer { return a.stats(r.URL.Query()) }, "type", "name", "parent")
	case serversPath.MatchString(r.URL.EscapedPath()):
		m := serversPath.FindStringSubmatch(r.URL.EscapedPath())
		backend, err1 := url.PathUnescape(m[1])
		name, err2 := url.PathUnescape(m[2])
		if err := errors.Join(err1, err2); err != nil {
			a.tb.Errorf("%s: %v", r.URL, err)
			return failure(http.StatusBadRequest, err.Error())
		}
		return a.servers(r, backend, name, body)
	default:
		a.tb.Errorf("not a runtime endpoint: %s %s", r.Method, r.URL)
	}
	return failure(http.StatusNotFound, "path "+r.URL.Path+" was not found")
}

// only answers a request of one method, with no parameter but the given ones,
// and a body just where there must be one.
func (a *API) only(r *http.Request, method string, body []byte, fn func() answer, parameters ...string) answer {
	if r.Method != method {
		a.tb.Errorf("%s is not specified for %s", r.Method, r.URL)
		return failure(http.StatusMethodNotAllowed, "method "+r.Method+" is not allowed for path "+r.URL.Path)
	}
	for key, values := range r.URL.Query() {
		if !slices.Contains(parameters, key) || len(values) != 1 {
			a.tb.Errorf("%s has the parameter %s=%q", r.URL.Path, key, values)
		}
	}
	switch takes := method == http.MethodPost || method == http.MethodPut; {
	case !takes && len(body) > 0:
		a.tb.Errorf("%s %s has a body", r.Method, r.URL)
	case takes && r.Header.Get("Content-Type") != "application/json":
		a.tb.Errorf("%s %s has the content type %q", r.Method, r.URL, r.Header.Get("Content-Type"))
		return failure(http.StatusUnsupportedMediaType, "header Content-Type has unexpected value")
	}
	return fn()
}

// stats are the rows of `show stat` that match the query.
func (a *API) stats(query url.Values) (got answer) {
	kind, name, parent := query.Get("type"), query.Get("name"), query.Get("parent")
	switch {
	case kind != "" && !slices.Contains([]string{"frontend", "backend", "server"}, kind):
		return failure(http.StatusBadRequest, "type in query: value is not one of the allowed values")
	case name != "" && kind == "":
		return failure(http.StatusBadRequest, "Type required when filtering by name")
	case name != "" && kind == "server" && parent == "":
		return failure(http.StatusBadRequest, "Parent backend required when filtering by server")
	}
	defer func() {
		if recover() != nil { // GetStats panics if the answer is empty
			got = failure(http.StatusInternalServerError, "internal server error")
		}
	}()
	all := a.runtime.GetStats()
	if all.Error != "" {
		return answer{http.StatusInternalServerError, all}
	}
	all.Stats = slices.DeleteFunc(all.Stats, func(s *models.NativeStat) bool {
		return kind != "" && s.Type != kind || name != "" && s.Name != name ||
			kind == "server" && parent != "" && s.BackendName != parent
	})
	return answer{http.StatusOK, all}
}

// server is runtime_server of the specification since client-native v6.3.2.
type server struct {
	models.RuntimeServer
	BackendName string `json:"backend_name,omitempty"`
	Weight      *int64 `json:"weight,omitempty"`
	Uweight     *int64 `json:"uweight,omitempty"`
	Iweight     *int64 `json:"iweight,omitempty"`
	CheckStatus *int64 `json:"check_status,omitempty"`
	CheckState  *int64 `json:"check_state,omitempty"`
	Fqdn        string `json:"fqdn,omitempty"`
	UseSsl      *bool  `json:"use_ssl,omitempty"`
}

// list reads the servers of a backend. Like the API it has no data for whatever
// goes wrong, and no server for a row that was cut.
func (a *API) list(backend string) ([]*server, error) {
	text, err := a.runtime.ExecuteWithResponse("show servers state " + backend)
	first, rest, _ := strings.Cut(text, "\n")
	if err != nil || strings.TrimSpace(first) != "1" {
		return nil, fmt.Errorf("no data for %s: %w", backend, errNoData)
	}
	list := []*server{}
	for row := range strings.SplitSeq(rest, "\n") {
		if strings.TrimSpace(row) == "" || strings.HasPrefix(row, "#") {
			continue
		}
		list = append(list, a.parse(strings.Split(row, " ")))
	}
	return list, nil
}

func (a *API) parse(col []string) *server {
	if len(col) < 25 {
		return nil
	}
	number := func(i int) *int64 {
		n, err := strconv.ParseInt(col[i], 10, 64)
		if err != nil {
			return nil
		}
		return &n
	}
	// The administrative state is decimal, and read as hexadecimal.
	admin, _ := misc.GetServerAdminState(col[6]) // "" if it is no number
	ssl := col[20] == "1"
	s := &server{
		RuntimeServer: models.RuntimeServer{
			ID: col[2], Name: col[3], Address: col[4], Port: number(18), AdminState: admin,
			OperationalState: map[string]string{"0": "down", "1": "up", "2": "up", "3": "stopping"}[col[5]],
		},
	}
	if !a.o.Old {
		s.BackendName, s.Fqdn, s.UseSsl = col[1], col[17], &ssl
		s.Weight, s.Uweight, s.Iweight = number(7), number(7), number(8)
		s.CheckStatus, s.CheckState = number(10), number(13)
	}
	return s
}

func (a *API) get(backend, name string) (*server, error) {
	list, err := a.list(backend)
	for _, s := range list {
		if s != nil && s.Name == name {
			return s, nil
		}
	}
	if err == nil {
		err = fmt.Errorf("no data for %s/%s: %w", backend, name, errNoData)
	}
	return nil, err
}

func (a *API) servers(r *http.Request, backend, name string, body []byte) answer {
	switch {
	case name == "" && r.Method == http.MethodPost:
		return a.only(r, r.Method, body, func() answer { return a.add(backend, body) })
	case name == "":
		return a.only(r, http.MethodGet, body, func() answer {
			list, err := a.list(backend)
			if err != nil {
				return of(err)
			}
			return answer{http.StatusOK, list}
		})
	case r.Method == http.MethodPut:
		return a.only(r, r.Method, body, func() answer { return a.replace(backend, name, body) })
	case r.Method == http.MethodDelete:
		return a.only(r, r.Method, body, func() answer { return a.remove(backend, name) })
	}
	return a.only(r, http.MethodGet, body, func() answer {
		s, err := a.get(backend, name)
		if err != nil {
			return of(err)
		}
		return answer{http.StatusOK, s}
	})
}

// decode reads a body strictly. It must have no field but the allowed ones.
func (a *API) decode(body []byte, into any, validate func() error, allowed ...string) *answer {
	var fields map[string]any
	if err := json.Unmarshal(body, &fields); err != nil {
		no := failure(http.StatusBadRequest, err.Error())
		return &no
	}
	for _, f := range slices.Sorted(maps.Keys(fields)) {
		if len(allowed) > 0 && !slices.Contains(allowed, f) {
			a.tb.Errorf("the field %s of %s is not specified, or read only", f, body)
		}
	}
	dec := json.NewDecoder(strings.NewReader(string(body)))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		a.tb.Errorf("body %s: %v", body, err)
		no := failure(http.StatusBadRequest, err.Error())
		return &no
	}
	if err := validate(); err != nil {
		no := failure(http.StatusUnprocessableEntity, err.Error())
		return &no
	}
	return nil
}

func (a *API) add(backend string, body []byte) answer {
	var s models.RuntimeAddServer
	if no := a.decode(body, &s, func() error { return s.Validate(nil) }); no != nil {
		return *no
	}
	if s.Name == "" {
		return failure(http.StatusBadRequest, "the new server must have a name")
	}
	err := a.runtime.AddServer(backend, s.Name, a.keywords(s, body))
	switch {
	case err == nil:
		return answer{http.StatusCreated, &s}
	case strings.Contains(err.Error(), "No such backend"):
		return failure(http.StatusNotFound, err.Error())
	case strings.Contains(err.Error(), "Already exists"):
		return failure(http.StatusConflict, err.Error())
	}
	return of(err)
}

// keywords are what the fields of a new server become. The test fails for one
// that is not here.
func (a *API) keywords(s models.RuntimeAddServer, body []byte) string {
	var fields map[string]any
	dec := json.NewDecoder(strings.NewReader(string(body)))
	dec.UseNumber()
	if err := dec.Decode(&fields); err != nil {
		a.tb.Errorf("body %s: %v", body, err)
	}
	text := s.Address
	if s.Port != nil {
		text += ":" + strconv.FormatInt(*s.Port, 10)
	}
	words := map[string]string{"ssl_cafile": "ca-file", "ssl_certificate": "crt", "send-proxy": "send-proxy", "send-proxy-v2": "send-proxy-v2"}
	for _, field := range slices.Sorted(maps.Keys(fields)) {
		word, ok := words[field]
		if !ok {
			word = strings.ReplaceAll(field, "_", "-")
		}
		switch field {
		case "name", "address", "port":
		case "backup", "check", "send-proxy", "send-proxy-v2", "ssl":
			if fields[field] == "enabled" {
				text += " " + word
			}
		case "id", "inter", "maxconn", "maxqueue", "minconn", "pool_max_conn", "pool_purge_delay", "weight",
			"alpn", "proto", "sni", "ssl_cafile", "ssl_certificate", "ssl_max_ver", "ssl_min_ver", "verify", "verifyhost":
			text += fmt.Sprintf(" %s %v", word, fields[field])
		default:
			a.tb.Errorf("the field %s of a new server is not known to the stand-in", field)
		}
	}
	return text
}

// replace changes what differs from what was read, in the API's order.
func (a *API) replace(backend, name string, body []byte) answer {
	var want server
	if no := a.decode(body, &want, func() error { return want.Validate(nil) }, "address", "port", "operational_state", "admin_state", "weight"); no != nil {
		return *no
	}
	have, err := a.get(backend, name)
	if err != nil {
		return of(err)
	}
	var steps []error
	if want.OperationalState != "" && want.OperationalState != have.OperationalState {
		steps = append(steps, a.runtime.SetServerHealth(backend, name, want.OperationalState))
	}
	if want.AdminState != "" && want.AdminState != have.AdminState {
		steps = append(steps, a.runtime.SetServerState(backend, name, want.AdminState))
	}
	if !a.o.Old && want.Weight != nil && (have.Weight == nil || *want.Weight != *have.Weight) {
		steps = append(steps, a.runtime.SetServerWeight(backend, name, strconv.FormatInt(*want.Weight, 10)))
	}
	if !a.o.Old && (want.Address != "" && want.Address != have.Address || want.Port != nil && (have.Port == nil || *want.Port != *have.Port)) {
		if want.Address == "" {
			want.Address = have.Address
		}
		if want.Port == nil {
			want.Port = have.Port
		}
		steps = append(steps, a.runtime.SetServerAddr(backend, name, want.Address, int(*want.Port)))
	}
	if len(steps) > 1 {
		// The API undoes the first ones if a later one fails; rollcall asks for
		// one thing at a time.
		a.tb.Errorf("body %s asks for %d things at once", body, len(steps))
	}
	if err := errors.Join(steps...); err != nil {
		return of(err)
	}
	if have, err = a.get(backend, name); err != nil {
		return of(err)
	}
	return answer{http.StatusOK, have}
}

// remove puts a server into maint if it is not, and deletes it.
func (a *API) remove(backend, name string) answer {
	have, err := a.get(backend, name)
	if err != nil {
		return of(err)
	}
	if have.AdminState != "maint" {
		if err := a.runtime.DisableServer(backend, name); err != nil {
			return of(err)
		}
	}
	if err := a.runtime.DeleteServer(backend, name); err != nil {
		return of(err)
	}
	return answer{http.StatusNoContent, nil}
}
