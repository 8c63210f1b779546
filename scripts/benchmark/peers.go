package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"rollcall/lbsync"
	"rollcall/lbsync/haproxy"
	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// registry is a way from a registration to HAProxy, seen from outside: an
// instance joins or leaves, and requests do or do not reach it.
type registry struct {
	name, meaning string
	frontend      string
	join, leave   func(netip.AddrPort)
}

// peers measures what people use today beside rollcall, each at its fastest: etcd with
// a watcher that writes haproxy.cfg anew and reloads HAProxy at once, as confd in its
// watch mode does; and Consul with consul-template, which does the same. The watcher
// is made for this comparison and leaves out what would slow it: no lease is asked
// for, and nothing waits for a second change. Nor does consul-template wait (no wait,
// no dedup; HAProxy is its child, which it signals itself), and Consul is one server
// that keeps everything in memory.
//
// From the call that registers to the first request that the instance answers,
// and from the call that takes it out to the first of three in a row that go
// elsewhere. Requests come one after the other, a millisecond apart, each on a new
// connection.
func peers(h *harness) []Row {
	dir := h.dir()
	resident, newcomer := h.app("127.153.0.1", "resident"), h.app("127.153.0.2", "newcomer")
	all := []registry{rollcallPeer(h), etcdPeer(h, dir, false), etcdPeer(h, dir, true)}
	if r, ok := consulPeer(h, dir, resident); ok {
		all = append(all, r)
	}
	for _, r := range all {
		r.join(resident)
		h.await(changeTimeout, r.name+" serves", func() error { _, err := ask(r.frontend); return err })
	}
	// Between two changes a reload must have ended: HAProxy 2.6 was seen to
	// ignore one that was asked for right after the one before.
	const settle = 300 * time.Millisecond
	changes := min(h.changes, 10)
	results := map[string][]run{}
	for range h.runs {
		took := map[string][]time.Duration{}
		for range changes {
			for _, r := range all {
				time.Sleep(settle)
				begun := time.Now()
				r.join(newcomer)
				h.await(changeTimeout, r.name+": the newcomer answers", func() error {
					if who, err := ask(r.frontend); err != nil || who != "newcomer" {
						return fmt.Errorf("%s answers: %w", who, err)
					}
					return nil
				})
				took["join/"+r.name] = append(took["join/"+r.name], time.Since(begun))
				time.Sleep(settle)
				begun = time.Now()
				r.leave(newcomer)
				first, row := begun, 0
				h.await(changeTimeout, r.name+": the newcomer is gone", func() error {
					at := time.Now()
					who, err := ask(r.frontend)
					switch {
					case err != nil:
						return err
					case who == "newcomer":
						row = 0
					default:
						if row++; row == 1 {
							first = at
						}
					}
					if row < 3 {
						return fmt.Errorf("it answered %v after the leave", at.Sub(begun))
					}
					return nil
				})
				took["leave/"+r.name] = append(took["leave/"+r.name], first.Sub(begun))
			}
		}
		for name, t := range took {
			verb, _, _ := strings.Cut(name, "/")
			results[name] = append(results[name], run{figure: t, floor: took[verb+"/rollcall"]})
		}
	}
	var rows []Row
	for _, verb := range []string{"join", "leave"} {
		for _, r := range all {
			rows = append(rows, row("peers/"+verb+"/"+r.name, r.meaning, 0, results[verb+"/"+r.name]))
		}
	}
	return rows
}

// app is an instance that answers its name.
func (h *harness) app(host, name string) netip.AddrPort {
	ln, err := net.Listen("tcp", host+":0")
	if err != nil {
		h.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, name) })}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = srv.Serve(ln) // says that it was closed
	}()
	h.Cleanup(func() {
		_ = srv.Close() // as above
		<-ended
	})
	return netip.MustParseAddrPort(ln.Addr().String())
}

var asking = &http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}

// ask sends one request and returns who answered.
func ask(frontend string) (string, error) {
	resp, err := asking.Get("http://" + frontend + "/")
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	who, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(resp.Status)
	}
	return string(who), err
}

func rollcallPeer(h *harness) registry {
	srv := redistest.Start(h)
	ha := haproxytest.Start(h, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Balance: "roundrobin", Slots: 10}}})
	client, err := haproxy.New(haproxy.Config{Socket: ha.Socket}, h.log)
	if err != nil {
		h.Fatal(err)
	}
	store, err := registrar.NewStore(srv.Client(h), registrar.DefaultNamespace)
	if err != nil {
		h.Fatal(err)
	}
	s, err := lbsync.New(lbsync.Config{
		ID: "bench", Backends: []lbsync.BackendConfig{{Service: "web", Backend: "be", Mode: lbsync.Slots}},
		Allow: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")},
	}, client, store, h.log)
	if err != nil {
		h.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	h.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, client.Close(context.Background())); err != nil {
			h.Error(err)
		}
	})
	token := ""
	return registry{
		name: "rollcall", meaning: "lbsync changes a running HAProxy", frontend: ha.Addr("be"),
		join: func(a netip.AddrPort) {
			token = fmt.Sprintf("token-%d", time.Now().UnixNano())
			if _, err := store.Beat(ctx, "web", registrar.Beat{Addr: a, Token: token, Meta: fmt.Sprintf(`{"id":%q,"weight":100}`, token), Agent: "bench"}); err != nil {
				h.Fatal(err)
			}
		},
		leave: func(a netip.AddrPort) {
			if _, err := store.Leave(ctx, "web", a, token, registrar.Left); err != nil {
				h.Fatal(err)
			}
		},
	}
}

// etcd speaks to etcd through its own JSON gateway. It costs less than a
// millisecond more than gRPC, of the hundred that a reload takes.
type etcd struct {
	h    *harness
	base string
}

func etcdPeer(h *harness, parent string, check bool) registry {
	name, meaning := "etcd + reload", "a watcher writes haproxy.cfg and reloads; against rollcall in the same run"
	if check {
		name, meaning = "etcd + check + reload", "… and has haproxy -c look at it first, as confd's example does"
	}
	binary, err := exec.LookPath("etcd")
	if err != nil {
		h.Fatalf("%v; apt-get install etcd-server", err)
	}
	dir, err := os.MkdirTemp(parent, "e")
	if err != nil {
		h.Fatal(err)
	}
	port := 12379
	host := "127.154.0.1"
	if check {
		host = "127.154.0.2"
	}
	e := &etcd{h, fmt.Sprintf("http://%s:%d", host, port)}
	peer := fmt.Sprintf("http://%s:%d", host, port+1)
	h.process(dir, binary, "--data-dir", filepath.Join(dir, "data"), "--listen-client-urls", e.base, "--advertise-client-urls", e.base,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer, "--logger", "zap")
	h.await(changeTimeout, "etcd answers", func() error {
		_, err := e.post(context.Background(), "kv/range", map[string]any{"key": prefix})
		return err
	})

	frontend := host + ":8080"
	cfg, socket := filepath.Join(dir, "haproxy.cfg"), filepath.Join(dir, "s")
	if err := os.WriteFile(cfg, render(frontend, socket, nil), 0o600); err != nil {
		h.Fatal(err)
	}
	ha := h.process(dir, "haproxy", "-W", "-db", "-f", cfg)
	h.listens(socket)
	ctx, cancel := context.WithCancel(context.Background())
	watching, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		e.watch(ctx, watching, func() {
			addrs := e.list(ctx)
			if ctx.Err() != nil {
				return
			}
			staged := cfg + ".new"
			if err := os.WriteFile(staged, render(frontend, socket, addrs), 0o600); err != nil {
				h.Fatal(err)
			}
			if check {
				if out, err := exec.Command("haproxy", "-c", "-f", staged).CombinedOutput(); err != nil {
					h.Fatalf("haproxy -c: %v: %s", err, out)
				}
			}
			if err := os.Rename(staged, cfg); err != nil {
				h.Fatal(err)
			}
			if err := ha.Signal(syscall.SIGUSR2); err != nil {
				h.Fatal(err)
			}
		})
	}()
	h.Cleanup(func() {
		cancel()
		<-done
	})
	<-watching
	return registry{
		name: name, meaning: meaning, frontend: frontend,
		join: func(a netip.AddrPort) {
			if _, err := e.post(ctx, "kv/put", map[string]any{"key": key(a), "value": coded("1")}); err != nil {
				h.Fatal(err)
			}
		},
		leave: func(a netip.AddrPort) {
			if _, err := e.post(ctx, "kv/deleterange", map[string]any{"key": key(a)}); err != nil {
				h.Fatal(err)
			}
		},
	}
}

// listens waits for HAProxy.
func (h *harness) listens(socket string) {
	h.await(changeTimeout, "haproxy answers", func() error {
		c, err := net.Dial("unix", socket)
		if err != nil {
			return err
		}
		return c.Close()
	})
}

// consulPeer is not there without a Consul and a consul-template. resident is in
// HAProxy's first configuration: a reload that is asked for while HAProxy starts is
// ignored.
func consulPeer(h *harness, parent string, resident netip.AddrPort) (r registry, ok bool) {
	for _, name := range []string{"consul", "consul-template"} {
		if _, err := exec.LookPath(name); err != nil {
			h.Logf("bench: no consul-template among the peers: %v", err)
			return registry{}, false
		}
	}
	dir, err := os.MkdirTemp(parent, "c")
	if err != nil {
		h.Fatal(err)
	}
	const host = "127.154.0.3"
	write := func(name string, text []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, text, 0o600); err != nil {
			h.Fatal(err)
		}
		return path
	}
	settings, err := json.Marshal(map[string]any{
		"bind_addr": host, "client_addr": host, "advertise_addr": host, "node_name": "bench", "log_level": "warn",
		"ports":                map[string]int{"dns": -1, "grpc": -1, "https": -1, "serf_wan": -1},
		"disable_update_check": true, "disable_remote_exec": true, "disable_coordinates": true,
	})
	if err != nil {
		h.Fatal(err)
	}
	h.process(dir, "consul", "agent", "-dev", "-config-file", write("consul.json", settings))
	ctx, cancel := context.WithCancel(context.Background())
	h.Cleanup(cancel)
	call := func(method, path string, body any) (string, error) {
		text, err := json.Marshal(body)
		if err != nil {
			return "", err
		}
		req, err := http.NewRequestWithContext(ctx, method, "http://"+host+":8500/v1/"+path, bytes.NewReader(text))
		if err != nil {
			return "", err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		answer, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s: %s", resp.Status, answer)
		}
		return string(answer), err
	}
	h.await(changeTimeout, "consul has a leader", func() error {
		leader, err := call(http.MethodGet, "status/leader", nil)
		if err == nil && !strings.Contains(leader, host) {
			err = fmt.Errorf("the leader is %q", leader)
		}
		return err
	})
	id := func(a netip.AddrPort) string { return strings.ReplaceAll(a.String(), ":", "-") }
	r = registry{
		name: "consul-template + reload", meaning: "Consul, and consul-template writes haproxy.cfg and reloads", frontend: host + ":8080",
		join: func(a netip.AddrPort) {
			if _, err := call(http.MethodPut, "agent/service/register",
				map[string]any{"ID": id(a), "Name": "web", "Address": a.Addr().String(), "Port": a.Port()}); err != nil {
				h.Fatal(err)
			}
		},
		leave: func(a netip.AddrPort) {
			if _, err := call(http.MethodPut, "agent/service/deregister/"+id(a), nil); err != nil {
				h.Fatal(err)
			}
		},
	}
	r.join(resident)
	cfg, socket := filepath.Join(dir, "haproxy.cfg"), filepath.Join(dir, "s")
	template := write("haproxy.ctmpl", append(render(r.frontend, socket, nil),
		"{{ range service \"web\" }}  server {{ .ID }} {{ .Address }}:{{ .Port }}\n{{ end }}"...))
	h.process(dir, "consul-template", "-config", write("ct.hcl", fmt.Appendf(nil, `
		consul { address = "%s:8500" }
		log_level = "warn"
		template {
			source = %q
			destination = %q
		}
		exec {
			command = ["haproxy", "-W", "-db", "-f", %[3]q]
			reload_signal = "SIGUSR2"
		}`, host, template, cfg)))
	h.listens(socket)
	return r, true
}

var prefix, prefixEnd = coded("/web/"), coded("/web0")

func coded(s string) string       { return base64.StdEncoding.EncodeToString([]byte(s)) }
func key(a netip.AddrPort) string { return coded("/web/" + a.String()) }

func (e *etcd) post(ctx context.Context, what string, body any) (map[string]any, error) {
	text, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, e.base+"/v3/"+what, bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var answer map[string]any
	err = json.NewDecoder(resp.Body).Decode(&answer)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %v", resp.Status, answer)
	}
	return answer, err
}

func (e *etcd) list(ctx context.Context) []string {
	answer, err := e.post(ctx, "kv/range", map[string]any{"key": prefix, "range_end": prefixEnd})
	if err != nil {
		if ctx.Err() == nil {
			e.h.Fatal(err)
		}
		return nil
	}
	kvs, _ := answer["kvs"].([]any) // absent when there are none
	var addrs []string
	for _, kv := range kvs {
		text, err := base64.StdEncoding.DecodeString(kv.(map[string]any)["key"].(string))
		if err != nil {
			e.h.Fatal(err)
		}
		addrs = append(addrs, strings.TrimPrefix(string(text), "/web/"))
	}
	slices.Sort(addrs)
	return addrs
}

// watch calls changed at each message until ctx ends.
func (e *etcd) watch(ctx context.Context, watching chan<- struct{}, changed func()) {
	body, err := json.Marshal(map[string]any{"create_request": map[string]any{"key": prefix, "range_end": prefixEnd}})
	if err != nil {
		e.h.Fatal(err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, e.base+"/v3/watch", bytes.NewReader(body))
	if err != nil {
		e.h.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		e.h.Fatal(err)
	}
	defer resp.Body.Close()
	messages := json.NewDecoder(resp.Body)
	for first := true; ; first = false {
		var m json.RawMessage
		if err := messages.Decode(&m); err != nil {
			if ctx.Err() == nil {
				e.h.Fatal(err)
			}
			return
		}
		if first { // the watch stands
			close(watching)
			continue
		}
		changed()
	}
}

func render(frontend, socket string, addrs []string) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "global\n  nbthread 2\n  hard-stop-after 1s\n  stats socket %s mode 600 level admin expose-fd listeners\n", socket)
	fmt.Fprintf(&b, "defaults\n  mode http\n  timeout connect 1s\n  timeout client 30s\n  timeout server 30s\n  option redispatch\n")
	fmt.Fprintf(&b, "frontend fe\n  bind %s\n  default_backend be\nbackend be\n  balance roundrobin\n", frontend)
	for i, a := range addrs {
		fmt.Fprintf(&b, "  server s%d %s\n", i, a)
	}
	return b.Bytes()
}
