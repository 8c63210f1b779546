package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

const pageToken = "a token of 16 or more"

var pageServed = regexp.MustCompile(`serving the page and the API addr=(\S+)`)

// pageServer is a rollcall serve.
type pageServer struct {
	*process
	url string
}

// page starts one, on a port that it chooses itself unless args name one, and
// waits until it knows everything.
func (s *system) page(t *testing.T, args ...string) *pageServer {
	t.Helper()
	if !slices.Contains(args, "--listen") {
		args = append(args, "--listen", "127.0.0.1:0")
	}
	p := &pageServer{process: s.spawn(t, args...)}
	haproxytest.Poll(t, "serve serves", func() error {
		found := pageServed.FindStringSubmatch(p.out.String())
		if found == nil {
			return errors.New(p.out.String())
		}
		p.url = "http://" + found[1]
		if code, body, err := p.do(http.MethodGet, "/v1/services", ""); err != nil || code != http.StatusOK {
			return fmt.Errorf("%d %s, %v", code, body, err)
		}
		return nil
	})
	return p
}

// do asks the API. headers are name, value, name, value.
func (p *pageServer) do(method, path, body string, headers ...string) (code int, answer string, err error) {
	req, err := http.NewRequest(method, p.url+path, strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	req.Header.Set("Content-Type", "application/json")
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	c := http.Client{Timeout: 15 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := c.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return r.StatusCode, string(b), err
}

// startChromium starts a headless browser without a profile, and returns the
// context that tabs are made from.
func startChromium(t *testing.T) context.Context {
	t.Helper()
	path, err := exec.LookPath("chromium")
	if err != nil {
		if os.Getenv("CI") != "" || os.Getenv("ROLLCALL_REQUIRE_SERVERS") != "" {
			t.Fatalf("chromium is not installed: %v", err)
		}
		t.Skipf("chromium is not installed: %v", err)
	}
	opts := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(path), chromedp.UserDataDir(t.TempDir()),
		chromedp.DisableGPU, chromedp.Flag("disable-component-update", true), chromedp.Flag("disable-domain-reliability", true), chromedp.Flag("no-pings", true))
	if os.Geteuid() == 0 {
		opts = append(opts, chromedp.NoSandbox)
	}
	ctx, free := chromedp.NewExecAllocator(context.Background(), opts...)
	ctx, _ = chromedp.NewContext(ctx)
	t.Cleanup(func() {
		tctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		if err := chromedp.Cancel(tctx); err != nil {
			t.Errorf("the browser does not end: %v", err)
		}
		free()
	})
	if err := chromedp.Do(ctx); err != nil {
		t.Fatal(err)
	}
	return ctx
}

// tab is one page in the browser. Its methods fail the test.
type tab struct {
	t   *testing.T
	ctx context.Context

	mu       sync.Mutex
	messages []string // of the console
}

// openTab opens url in a window of that size, and has the test fail if the page
// says anything on the console that allowed does not match: an error, an
// exception, a breach of its policy.
func openTab(t *testing.T, browser context.Context, url string, wide, high int64, allowed string) *tab {
	t.Helper()
	ctx, cancel := chromedp.NewContext(browser)
	p := &tab{t: t, ctx: ctx}
	console := chromedp.Console(ctx)
	read := make(chan struct{})
	go func() {
		defer close(read)
		for m, err := range console {
			if err != nil {
				return
			}
			p.mu.Lock()
			p.messages = append(p.messages, m.String())
			p.mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-read
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, m := range p.messages {
			if allowed == "" || !regexp.MustCompile(allowed).MatchString(m) {
				t.Errorf("the console says %s", m)
			}
		}
	})
	if _, err := chromedp.Call(ctx, emulation.SetDeviceMetricsOverride, emulation.SetDeviceMetricsOverrideParams{Width: wide, Height: high, DeviceScaleFactor: 1, Mobile: wide < 600}); err != nil {
		t.Fatal(err)
	}
	p.do(chromedp.Navigate(url))
	p.shows(`#link-text`, "live")
	return p
}

func (p *tab) do(steps ...chromedp.Action[chromedp.Void]) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, 10*time.Second)
	defer cancel()
	if err := chromedp.Do(ctx, steps...); err != nil {
		p.t.Fatal(err)
	}
}

// press sends keys to whatever has the focus.
func (p *tab) press(keys string) { p.t.Helper(); p.do(chromedp.KeyEvent(keys)) }

// ask evaluates an expression.
func ask[T any](p *tab, expression string) T {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, 10*time.Second)
	defer cancel()
	v, err := chromedp.Run(ctx, chromedp.Evaluate[T](expression))
	if err != nil {
		p.t.Fatalf("%s: %v", expression, err)
	}
	return v
}

// text is what an element and its children say, spaces joined.
func (p *tab) text(selector string) string {
	p.t.Helper()
	return ask[string](p, fmt.Sprintf(`[...document.querySelectorAll(%q)].map((e) => e.textContent).join(" | ")`, selector))
}

// shows waits until the elements say what.
func (p *tab) shows(selector, what string) {
	p.t.Helper()
	haproxytest.Poll(p.t, fmt.Sprintf("%s says %q", selector, what), func() error {
		if got := p.text(selector); !strings.Contains(got, what) {
			return fmt.Errorf("%q", got)
		}
		return nil
	})
}

// gone waits until no element is there.
func (p *tab) gone(selector string) {
	p.t.Helper()
	haproxytest.Poll(p.t, selector+" is gone", func() error {
		if n := ask[int](p, fmt.Sprintf(`document.querySelectorAll(%q).length`, selector)); n > 0 {
			return fmt.Errorf("%d, %s", n, p.text(selector))
		}
		return nil
	})
}

// row is the selector of an instance's row, by its button's label.
func row(addr string) string { return fmt.Sprintf(`tr:has(button[aria-label$="%s"])`, addr) }

// reach presses Tab until an element has the focus.
func (p *tab) reach(selector string) {
	p.t.Helper()
	for range 80 {
		if ask[bool](p, fmt.Sprintf(`document.activeElement.matches(%q)`, selector)) {
			// Who sees the page must see where the keyboard is.
			if !ask[bool](p, `document.activeElement.matches(":focus-visible")`) {
				p.t.Errorf("%s has the focus, and nobody sees it", selector)
			}
			return
		}
		p.press(kb.Tab)
	}
	p.t.Fatalf("Tab does not reach %s", selector)
}

// TestPage has a real browser look at a real system. Its parts follow each
// other.
func TestPage(t *testing.T) {
	t.Parallel()
	browser := startChromium(t)
	s := &system{redis: redistest.Start(t), ha: haproxytest.Start(t, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Slots: 5, Balance: "roundrobin"}}})}
	store, err := registrar.NewStore(s.redis.Client(t), registrar.DefaultNamespace)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(pageToken+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	server := s.page(t, "serve", "--token-file", file)
	url := server.url + "/"
	s.spawn(t, "reap", "--ttl", "3s", "--heartbeat", "1s")
	s.spawn(t, "lbsync", "--socket", s.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8")
	a, b, c := haproxytest.NewInstance(t), haproxytest.NewInstance(t), haproxytest.NewInstance(t)
	var sidecars []*process
	for _, i := range []*haproxytest.Instance{a, b, c} {
		sidecars = append(sidecars, s.spawn(t, "register", "--service", "web", "--addr", i.Addr().String(), "--interval", "1s", "--zone", "north", "--tag", "commit=4f1c"))
	}
	answered(t, "http://"+s.ha.Addr("be")+"/", a, b, c)

	t.Run("it opens", func(t *testing.T) {
		p := openTab(t, browser, url, 1280, 900, "")
		if n := ask[int](p, "spark([]).childElementCount"); n != 0 {
			t.Errorf("%d lines for a service whose history has not come yet", n)
		}
		for _, i := range []*haproxytest.Instance{a, b, c} {
			p.shows(row(i.Addr().String()), "serving")
			p.shows(row(i.Addr().String()), "commit=4f1c")
			p.shows(row(i.Addr().String())+` td[data-label="In HAProxy"]`, "serving")
		}
		p.shows("#balancers tbody", "up to date")
		p.shows("#reapers tbody", "armed")
		p.shows("#events", "joined")
		p.shows("#tiles", "3serving")
		if got := ask[string](p, `document.querySelector("#chart svg").getAttribute("aria-label")`); !strings.Contains(got, "now 3 to serve, 0 drained") {
			t.Errorf("the chart says %q", got)
		}
		if n := ask[int](p, `document.querySelectorAll("table:not(:has(caption)), thead th:not([scope=col]), tbody th:not([scope=row]), button:not([type]), input:not(label input)").length`); n != 0 {
			t.Errorf("%d elements without what a screen reader needs", n)
		}
	})

	t.Run("an instance leaves", func(t *testing.T) {
		p := openTab(t, browser, url, 1280, 900, "")
		p.shows(row(c.Addr().String()), "serving")
		sidecars[2].signal(t, syscall.SIGTERM)
		p.gone(row(c.Addr().String()))
		p.shows("#events li:first-child", "left")
		p.shows("#tiles", "2serving")
		p.shows("#news", c.Addr().String()+" is gone: left")
		p.shows("#chart svg", "") // it is there
	})

	t.Run("it is not served", func(t *testing.T) {
		p := openTab(t, browser, url, 1280, 900, "")
		p.shows(row(b.Addr().String()), "serving")
		v, err := store.Served(t.Context(), "web")
		if err != nil {
			t.Fatal(err)
		}
		server := "be/" + v.Sights[0].Servers[b.Addr()]["be"].Server
		s.ha.Command(t, "set server "+server+" state maint") // a human's, which is left alone
		p.shows(row(b.Addr().String())+` td[data-label="State"]`, "not served")
		p.shows("#tiles", "1not served")
		p.shows("details summary", "1 serving, 1 not served")
		s.ha.Command(t, "set server "+server+" state ready")
		p.shows(row(b.Addr().String())+` td[data-label="State"]`, "serving")
	})

	t.Run("it drains, by keyboard alone", func(t *testing.T) {
		p := openTab(t, browser, url, 1280, 900, "401") // for the wrong token
		p.shows(row(a.Addr().String()), "serving")
		button := fmt.Sprintf(`button[aria-label="Change web %s"]`, a.Addr())
		p.reach(button)
		p.press(kb.Enter)
		p.reach("#token")
		p.press("a wrong token")
		p.reach("#reason")
		p.press("new disk" + kb.Enter)
		p.shows("#change-result", "not a token of this server")
		p.press(pageToken)
		p.reach("#reason")
		p.press(kb.Enter)
		p.shows("#change-result", "applied by 1 balancer")
		answered(t, "http://"+s.ha.Addr("be")+"/", b)
		p.press(kb.Escape)
		if !ask[bool](p, fmt.Sprintf(`document.activeElement.matches(%q) && !document.querySelector("dialog").open`, button)) {
			t.Error("after Escape the focus is not where it was")
		}
		p.shows(row(a.Addr().String())+` td[data-label="State"]`, "drainnew disk")
		p.shows(row(a.Addr().String())+` td[data-label="In HAProxy"]`, "drain")
		p.shows("#events li:first-child", "drained")
		if kept := ask[string](p, `JSON.stringify([location.href, document.cookie, {...localStorage}, {...sessionStorage}])`); strings.Contains(kept, "token") {
			t.Errorf("the token is kept: %s", kept)
		}
		// And back, with the token that the page has.
		p.press(kb.Enter)
		if !ask[bool](p, `document.activeElement.matches("[name=verb][value=ready]")`) {
			t.Error("ready is not what is offered first")
		}
		p.press(kb.Enter)
		p.shows("#change-result", "applied by 1 balancer")
		answered(t, "http://"+s.ha.Addr("be")+"/", a, b)
		p.press(kb.Escape)
		p.shows(row(a.Addr().String())+` td[data-label="State"]`, "serving")
		// An arrow key chooses what is next.
		p.press(kb.Enter)
		p.press(kb.ArrowDown + kb.ArrowDown + kb.ArrowDown)
		p.reach("#weight")
		p.press("7" + kb.Enter)
		p.shows("#change-result", "Done")
		p.press(kb.Escape)
		p.shows(row(a.Addr().String())+` td[data-label="Weight"]`, "7")
	})

	t.Run("the last one is taken out when that is confirmed", func(t *testing.T) {
		word := func(args ...string) {
			t.Helper()
			if out, stderr, code := s.rollcall(t, args...); code != 0 {
				t.Errorf("%v: exit %d, %s%s", args, code, out, stderr)
			}
		}
		word("maint", "web", b.Addr().String())
		p := openTab(t, browser, url, 1280, 900, "409") // the refusal
		p.shows(row(b.Addr().String())+` td[data-label="In HAProxy"]`, "maint")
		p.reach(fmt.Sprintf(`button[aria-label="Change web %s"]`, a.Addr()))
		p.press(kb.Enter)
		p.reach("#token")
		p.press(pageToken)
		p.reach("[name=verb]:checked")
		p.press(kb.ArrowDown)
		if ask[bool](p, `document.querySelector("#force").checkVisibility()`) {
			t.Error("force is offered before anything was refused")
		}
		p.reach("#reason")
		p.press("new disk" + kb.Enter)
		p.shows("#change-result", "Nothing was done: maint web "+a.Addr().String()+": it is the last that serves: ")
		p.shows("#change-result", " sends requests to no other server of be. Start another first")
		p.shows("#force-text", "Take out the last one")
		answered(t, "http://"+s.ha.Addr("be")+"/", a)
		p.reach("#force") // it has the focus, and is not ticked
		p.press(kb.Enter)
		p.shows("#change-result", "Nothing was done: ")
		p.reach("#force")
		p.press(" " + kb.Enter)
		p.shows("#change-result", "applied by 1 balancer")
		p.shows(row(a.Addr().String())+` td[data-label="In HAProxy"]`, "maint")
		if ask[bool](p, `document.querySelector("#force").checkVisibility() || document.querySelector("#force").checked`) {
			t.Error("force is still offered after it was done")
		}
		word("ready", "web", a.Addr().String())
		word("ready", "web", b.Addr().String())
		answered(t, "http://"+s.ha.Addr("be")+"/", a, b)
	})

	t.Run("it keeps no token that was not looked at", func(t *testing.T) {
		p := openTab(t, browser, url, 1280, 900, "429")
		p.shows(row(a.Addr().String()), "serving")
		p.reach(fmt.Sprintf(`button[aria-label="Change web %s"]`, a.Addr()))
		p.press(kb.Enter)
		p.reach("#token")
		p.press("a wrong token")
		p.reach("#reason")
		p.press("new disk")
		for range 10 { // now: one more may be sent 10 s later
			if _, _, err := server.do(http.MethodDelete, "/v1/services/web/instances/"+a.Addr().String(), "", "Authorization", "Bearer guess"); err != nil {
				t.Fatal(err)
			}
		}
		p.press(kb.Enter)
		p.shows("#change-result", "too many wrong tokens")
		if !ask[bool](p, `document.querySelector("#forget").hidden && !document.querySelector("#token-field").hidden`) {
			t.Error("the page has kept it")
		}
	})

	t.Run("it says who has overridden what until when, also of nobody", func(t *testing.T) {
		say := func(addr string, w registrar.Word) {
			t.Helper()
			if _, _, err := store.SetAdmin(t.Context(), "web", netip.MustParseAddrPort(addr), w); err != nil {
				t.Fatal(err)
			}
		}
		p := openTab(t, browser, url, 1280, 900, "")
		state := row(a.Addr().String()) + ` td[data-label="State"]`
		seven := 7
		say(a.Addr().String(), registrar.Word{Verb: "weight", Weight: &seven, By: "ci", For: time.Hour})
		say(a.Addr().String(), registrar.Word{Verb: "drain", Reason: "disk", By: "alice@ops"})
		p.shows(state, "drain")
		p.shows(state, "diskby alice@ops")
		p.shows("#events li:first-child", "by alice@ops")
		if got := ask[string](p, fmt.Sprintf(`document.querySelector(%q).title`, row(a.Addr().String())+` td[data-label="Weight"]`)); !strings.HasPrefix(got, "by alice@ops, until ") {
			t.Errorf("the weight is %q", got)
		}
		say(a.Addr().String(), registrar.Word{Verb: "ready", By: "alice@ops"})
		say(a.Addr().String(), registrar.Word{Verb: "weight"})

		// One of nobody: it is a row of its own, and can be ended.
		say("10.0.0.9:80", registrar.Word{Verb: "maint", Reason: "to come", By: "bob", For: 48 * time.Hour})
		const button = `button[aria-label="Change the override of web 10.0.0.9:80"]`
		const nobody = "tr:has(" + button + ")"
		p.shows(nobody, "10.0.0.9:80absentmaintto comeby bob, until ")
		p.shows("details summary", "1 override without an instance")
		p.shows("#tiles", "2serving")
		p.reach("#filter")
		p.press("bob maint")
		p.shows("#list", "10.0.0.9:80")
		p.gone(row(b.Addr().String()))
		p.do(chromedp.Evaluate[chromedp.Void](`document.querySelector("#filter").value = ""; document.querySelector("#filter").dispatchEvent(new Event("input"))`))
		p.shows(row(b.Addr().String()), "serving")
		p.reach(button)
		p.press(kb.Enter)
		p.shows("#change-now", "No instance has it now. Override: maint, by bob, until ")
		p.reach("#token")
		p.press(pageToken + kb.Enter)
		p.shows("#change-result", "applied by 1 balancer")
		p.gone(nobody)
		p.press(kb.Escape)

		// Until when is asked for, and checked.
		p = openTab(t, browser, url, 1280, 900, "400")
		p.reach(fmt.Sprintf(`button[aria-label="Change web %s"]`, a.Addr()))
		p.press(kb.Enter)
		p.reach("#token")
		p.press(pageToken)
		p.reach("#reason")
		p.press("new disk")
		p.reach("#for")
		p.press("soon" + kb.Enter)
		p.shows("#change-result", `for "soon": want a duration such as 2h`)
		p.do(chromedp.Evaluate[chromedp.Void](`document.querySelector("#for").value = "90m"`))
		p.press(kb.Enter)
		p.shows("#change-result", "applied by 1 balancer")
		p.press(kb.Escape)
		p.shows(state, "new diskby http 127.0.0.1, until ")
		say(a.Addr().String(), registrar.Word{Verb: "ready"})
		answered(t, "http://"+s.ha.Addr("be")+"/", a, b)
	})

	t.Run("hostile names are text, on a phone too", func(t *testing.T) {
		const evil = `"><img src=x onerror=pwned=1><script>pwned=1</script>`
		long := strings.Repeat("wide", 60)
		addr := haproxytest.NewInstance(t).Addr()
		s.spawn(t, "register", "--service", "evil", "--addr", addr.String(), "--interval", "1s", "--zone", evil, "--tag", "k="+evil, "--tag", "long="+long)
		if _, _, err := store.SetAdmin(t.Context(), "evil", addr, registrar.Word{Verb: "maint", Reason: (evil + long)[:250], By: (evil + long)[:250]}); err != nil {
			t.Fatal(err)
		}
		v, err := store.Versions(t.Context(), []registrar.Service{"evil"})
		if err != nil {
			t.Fatal(err)
		}
		if err := store.Acker(evil).Ack(t.Context(), "evil", v.Token("evil")); err != nil {
			t.Fatal(err)
		}
		for _, wide := range []int64{1280, 360} {
			if err := store.Report(t.Context(), evil, &registrar.ReaperStatus{Cause: evil + long, Error: evil + "\u202e\x07", Held: []registrar.Hold{{Service: "web", Suspects: 2, Members: 3, Since: 1, Until: 2}}}); err != nil {
				t.Fatal(err)
			}
			p := openTab(t, browser, url, wide, 740, "")
			for _, where := range []string{row(addr.String()) + ` td[data-label="State"]`, row(addr.String()) + ` td[data-label="Zone"]`, row(addr.String()) + ` td[data-label="Tags"]`, "#balancers tbody", "#reapers tbody", "#events"} {
				p.shows(where, evil[:30])
			}
			p.shows("#banners", "Removal is held for web")
			p.shows("#banners code", "rollcall reap --once --force --ttl 3s --redis "+s.redis.URL())
			if text := p.text("body"); strings.ContainsAny(text, "\u202e\x07") {
				t.Error("text that steers is not shown as such")
			}
			if n := ask[int](p, `document.querySelectorAll("main img, main script, main [onerror]").length`); n != 0 || ask[bool](p, `"pwned" in window`) {
				t.Errorf("%d elements were made of names", n)
			}
			if got := ask[int](p, `document.documentElement.scrollWidth`); got > int(wide) {
				t.Errorf("%d pixels in a window of %d", got, wide)
			}
			p.do(chromedp.Evaluate[chromedp.Void](fmt.Sprintf(`document.querySelector(%q).click()`, row(addr.String())+" button")))
			if got := ask[string](p, `(() => { const r = document.querySelector("dialog").getBoundingClientRect(); return r.left >= 0 && r.right <= innerWidth && r.top >= 0 && r.bottom <= innerHeight ? "" : JSON.stringify(r); })()`); got != "" {
				t.Errorf("the dialog is not within the window: %s", got)
			}
		}
	})

	t.Run("it says what is old", func(t *testing.T) {
		p := openTab(t, browser, url, 1280, 900, "ERR_|Failed to load resource")
		s.redis.Signal(t, syscall.SIGSTOP)
		p.shows("#banners", "Redis does not answer")
		p.shows("#link-text", "old data")
		p.shows(row(b.Addr().String()), "serving")
		s.redis.Signal(t, syscall.SIGCONT)
		p.shows("#link-text", "live")
		p.gone("#banners .banner.bad")
		server.signal(t, syscall.SIGTERM)
		p.shows("#banners", "The connection to rollcall serve is lost")
		p.shows("#banners", "Last heard")
		p.shows(row(b.Addr().String()), "serving")
		s.page(t, "serve", "--token-file", file, "--listen", strings.TrimPrefix(server.url, "http://"))
		p.shows("#link-text", "live")
		p.shows(row(b.Addr().String()), "serving")
	})
}
