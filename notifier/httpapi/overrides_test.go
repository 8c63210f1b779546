package httpapi_test

import (
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"rollcall/notifier/httpapi"
	"rollcall/registrar"
)

// say writes an override.
func (w *world) say(t *testing.T, n int, word registrar.Word) {
	t.Helper()
	if _, _, err := w.store.SetAdmin(t.Context(), "web", address(n), word); err != nil {
		t.Fatal(err)
	}
}

// TestOverride shows an instance's override as its document has it: by whom, until when,
// and of whom.
func TestOverride(t *testing.T) {
	t.Parallel()
	w := start(t, nil, func(w *world) {
		w.beat(t, "web", 1, registrar.Meta{})
		w.beat(t, "web", 2, registrar.Meta{Own: true})
		w.beat(t, "web", 3, registrar.Meta{})
		w.say(t, 1, registrar.Word{Verb: "drain", Reason: "disk", By: "alice", For: time.Hour})
		w.say(t, 2, registrar.Word{Verb: "maint"})
	})
	d := w.shows(t, "web", "is there", func(d httpapi.Service) bool { return d.Version == 5 })
	one, two, three := d.Instances[0].Word, d.Instances[1].Word, d.Instances[2].Word
	if one == nil || one.By != "alice" || one.Until-one.At != 3600_000 || one.Scope != registrar.ScopeAddress || one.ID != "" {
		t.Errorf("of the address: %+v", one)
	}
	if two == nil || two.State != registrar.AdminMaint || two.Scope != registrar.ScopeRegistration || two.ID != "token2" || two.Until != 0 {
		t.Errorf("of the registration: %+v", two)
	}
	if three != nil {
		t.Errorf("of nobody: %+v", three)
	}
	if r := w.get(t, "/v1/services/web"); !strings.Contains(r.body, `"word":{"state":"drain","reason":"disk","at":`) || !strings.Contains(r.body, `"scope":"address"}`) {
		t.Errorf("the document has %s", r.body)
	}
}

// hscans is how many calls have read overrides.
func (w *world) hscans(t *testing.T) int {
	t.Helper()
	info, err := w.rdb.Info(t.Context(), "commandstats").Result()
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`cmdstat_hscan:calls=(\d+)`).FindStringSubmatch(info)
	if found == nil {
		return 0
	}
	n, err := strconv.Atoi(found[1])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestAway lists overrides that are in force for no instance, beside the instances, as
// they come, go, and find one; and reads them when a service changes, but not all the time.
func TestAway(t *testing.T) {
	t.Parallel()
	reg := registrar.ScopeRegistration
	w := start(t, nil, func(w *world) {
		w.rest = 2 * time.Second
		for n := 1; n <= 3; n++ {
			w.beat(t, "web", n, registrar.Meta{})
		}
		w.say(t, 1, registrar.Word{Verb: "drain"})
		w.say(t, 9, registrar.Word{Verb: "maint", Reason: "to come", By: "bob", For: time.Hour})
	})
	away := func(d httpapi.Service) string {
		var out []string
		for _, a := range d.Away {
			out = append(out, fmt.Sprintf("%s %s %s %s", a.Addr, a.State, a.Word.State, a.Word.Scope))
		}
		return strings.Join(out, ", ")
	}
	is := func(want string) httpapi.Service {
		t.Helper()
		return w.shows(t, "web", "away: "+want, func(d httpapi.Service) bool { return away(d) == want && d.AwayCount == len(d.Away) && d.AwayAt > 0 })
	}
	d := is("10.0.0.9:8080 absent maint address")
	if a := d.Away[0].Word; a.By != "bob" || a.Reason != "to come" || a.Until-a.At != 3600_000 {
		t.Errorf("%+v", a)
	}
	if states(d) != "10.0.0.1:8080 drain, 10.0.0.2:8080 ready, 10.0.0.3:8080 ready" {
		t.Errorf("the instances are %s", states(d))
	}
	if r := w.get(t, "/v1/sd/prometheus"); strings.Contains(r.body, "10.0.0.9") {
		t.Errorf("nobody is a target: %s", r.body)
	}
	if r := w.get(t, "/v1/services"); !strings.Contains(r.body, `"instances":3,"ready":2`) || !strings.Contains(r.body, `"absent":0`) {
		t.Errorf("nobody counts: %s", r.body)
	}
	r := w.follow(t, "", "")
	r.gets(t, `"away":[{"addr":"10.0.0.9:8080","state":"absent","word":{"state":"maint"`)

	// Somebody comes, and is not there twice for a moment.
	w.beat(t, "web", 9, registrar.Meta{})
	if d := w.shows(t, "web", "it has come", func(d httpapi.Service) bool { return len(d.Instances) == 4 }); len(d.Away) != 0 || d.AwayCount != 0 || d.Instances[3].Word.By != "bob" {
		t.Errorf("%s, %d, %+v", away(d), d.AwayCount, d.Instances[3])
	}
	// And goes, and one whose registration is another then.
	if _, err := w.store.Leave(t.Context(), "web", address(9), "token9", registrar.Left); err != nil {
		t.Fatal(err)
	}
	is("10.0.0.9:8080 absent maint address")
	w.say(t, 2, registrar.Word{Verb: "drain", Scope: reg})
	if _, err := w.store.Deregister(t.Context(), "web", address(2), true, ""); err != nil {
		t.Fatal(err)
	}
	is("10.0.0.2:8080 absent drain registration, 10.0.0.9:8080 absent maint address")
	if _, err := w.store.Beat(t.Context(), "web", registrar.Beat{Addr: address(2), Token: "another", Meta: `{"id":"another","weight":100}`}); err != nil {
		t.Fatal(err)
	}
	d = is("10.0.0.2:8080 absent drain registration, 10.0.0.9:8080 absent maint address")
	w.shows(t, "web", "another has the address", func(d httpapi.Service) bool {
		return states(d) == "10.0.0.1:8080 drain, 10.0.0.2:8080 ready, 10.0.0.3:8080 ready"
	})
	// Each ends by its own address.
	for _, n := range []string{"2", "9"} {
		got, err := w.fetch("POST", "/v1/services/web/instances/10.0.0."+n+":8080/ready?absent=true", "{}", "Authorization", "Bearer "+secret, "Content-Type", jsonType)
		if err != nil || got.code != 200 {
			t.Errorf("%v %+v", err, got)
		}
	}
	is("")

	// 40 changes in a second are one read or two.
	before, begun := w.hscans(t), time.Now()
	for n := range 20 {
		w.say(t, 50, registrar.Word{Verb: "drain", Reason: fmt.Sprint(n)})
		w.beat(t, "web", 3, registrar.Meta{Weight: 50 + n})
	}
	w.shows(t, "web", "the last of them", func(d httpapi.Service) bool { return len(d.Away) == 1 && d.Away[0].Word.Reason == "19" })
	if reads, most := (w.hscans(t)-before)/2, int(time.Since(begun)/w.rest)+1; reads > most {
		t.Errorf("%d reads in %v, want at most %d", reads, time.Since(begun), most)
	}
	// Nothing changes: nothing is read, whoever asks.
	before = w.hscans(t)
	end := time.Now().Add(2 * w.rest)
	for time.Now().Before(end) {
		w.get(t, "/v1/services/web")
	}
	if after := w.hscans(t); after != before {
		t.Errorf("%d calls while nothing changed", after-before)
	}
}

// TestAwayLimit shows the first thousand, and counts all; what cannot be read is said.
func TestAwayLimit(t *testing.T) {
	t.Parallel()
	keys, err := registrar.NewKeys(registrar.DefaultNamespace)
	if err != nil {
		t.Fatal(err)
	}
	w := start(t, nil, func(w *world) {
		w.beat(t, "web", 1, registrar.Meta{})
		pairs := []any{"10.0.0.2:80", "{"}
		for n := range 2500 {
			pairs = append(pairs, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(n >> 8), byte(n)}), 80).String(), `{"state":"drain"}`)
		}
		if err := w.rdb.HSet(t.Context(), keys.Admin("web"), pairs...).Err(); err != nil {
			t.Fatal(err)
		}
	})
	d := w.shows(t, "web", "has them", func(d httpapi.Service) bool { return d.AwayCount > 0 })
	if d.AwayCount != 2501 || len(d.Away) != 1000 || d.Away[0].Addr != "10.0.0.2:80" || d.Away[0].Reason == "" || d.Away[1].Addr != "10.1.0.0:80" || d.Away[999].Addr != "10.1.3.230:80" {
		t.Errorf("%d of %d, %+v to %+v", len(d.Away), d.AwayCount, d.Away[:2], d.Away[len(d.Away)-1])
	}
}
