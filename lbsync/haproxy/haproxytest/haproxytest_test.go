package haproxytest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func get(url string) (body, instance string, status int, err error) {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
	resp, err := client.Get(url)
	if err != nil {
		return "", "", 0, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return string(text), resp.Header.Get("X-Instance"), resp.StatusCode, err
}

func TestInstance(t *testing.T) {
	for _, i := range []*Instance{NewInstance(t), NewInstance6(t)} {
		url := "http://" + i.Addr().String()
		body, name, status, err := get(url + "/")
		if err != nil || body != i.Addr().String() || name != body || status != 200 || i.Served() != 1 {
			t.Errorf("got %q, %q, %d, %v, served %d", body, name, status, err, i.Served())
		}
		for _, healthy := range []bool{true, false, true} {
			i.SetHealthy(healthy)
			if _, _, status, err := get(url + "/healthz"); err != nil || (status == 200) != healthy {
				t.Errorf("healthy %t: %d, %v", healthy, status, err)
			}
		}
		if i.Served() != 1 {
			t.Errorf("health checks are counted: %d", i.Served())
		}
		i.Close()
		i.Close()
		if _, _, _, err := get(url); err == nil {
			t.Error("answers when closed")
		}
	}
}

// TestLife takes a slot through a reload, a crash and a restart, and makes
// sure that two haproxys do not share traffic.
func TestLife(t *testing.T) {
	backends := []Backend{{Name: "web", Balance: "leastconn", Slots: 2, Check: true}}
	h := Start(t, Options{Backends: backends, StateFile: true})
	other := Start(t, Options{Backends: backends})
	if h.Addr("web") == other.Addr("web") {
		t.Fatalf("both listen on %s", h.Addr("web"))
	}
	i := NewInstance(t)
	set := fmt.Sprintf("set server web/s1 addr %s port %d;set server web/s1 state ready", i.Addr().Addr(), i.Addr().Port())
	h.Command(t, set)
	other.Command(t, set)
	sum := h.ConfigSum(t)

	serves := func(h *HAProxy, want int) {
		t.Helper()
		for range 5 {
			if _, _, status, err := get("http://" + h.Addr("web")); err != nil || status != want {
				t.Fatalf("status %d, %v, want %d", status, err, want)
			}
		}
	}
	serves(h, 200)
	pid := h.PID()
	h.Reload(t)
	if h.PID() == pid {
		t.Error("same process after a reload")
	}
	serves(h, 200)
	h.Kill(t)
	if _, err := command(h.Socket, "show info"); err == nil {
		t.Error("answers when killed")
	}
	h.Restart(t)
	serves(h, 200)
	h.Restart(t)
	serves(h, 200)
	if h.ConfigSum(t) != sum {
		t.Error("configuration has changed")
	}

	serves(other, 200)
	other.Reload(t) // has no state file
	serves(other, 503)

	h.Stop(t)
	if conn, err := net.DialTimeout("unix", h.Socket, time.Second); err == nil {
		_, _ = io.WriteString(conn, "show info\n")
		_ = conn.SetDeadline(time.Now().Add(50 * time.Millisecond))
		if n, err := conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a stopped haproxy answered: %d bytes, %v", n, err)
		}
		_ = conn.Close()
	}
	h.Cont(t)
	if text := h.Command(t, "show info"); !strings.Contains(text, fmt.Sprintf("\nPid: %d\n", h.PID())) {
		t.Errorf("got %s", text)
	}
}
