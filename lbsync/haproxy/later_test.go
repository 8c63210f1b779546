package haproxy

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"rollcall/lbsync"
)

// The replies in testdata/3.2 were recorded from HAProxy 3.2.0, which these
// tests cannot install.

func TestLateAddress(t *testing.T) {
	now := recorded(t, "3.2/peek.reply")
	before := strings.Replace(now, "127.0.0.7:8080", "127.0.0.1:1", 1)
	slot := lbsync.Server{Name: "s1", ID: 1, Slot: true}
	ops := []lbsync.Op{{Kind: lbsync.SetAddr, Name: "s1", ID: 1, Addr: addrPort("127.0.0.7:8080")}, {Kind: lbsync.SetWeight, Name: "s1", ID: 1}}
	elsewhere := strings.ReplaceAll(now, "Pid: 28159", "Pid: 28160")
	for _, tt := range []struct {
		name    string
		answers []string
		addr    string
		err     error
	}{
		{name: "seen at once", answers: []string{now}, addr: "127.0.0.7:8080"},
		{name: "seen at the third look", answers: []string{before, before, now}, addr: "127.0.0.7:8080"},
		{name: "never seen", answers: []string{before, before, before, before, before, before}, addr: "127.0.0.1:1"},
		{name: "another process looks", answers: []string{before, elsewhere}, err: lbsync.ErrReplaced},
		{name: "a cut look", answers: []string{before, now[:len(now)/2]}, err: lbsync.ErrUnknown},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path, lines := fakeSocket(t, slices.Concat([]string{recorded(t, "3.2/del.reply"), recorded(t, "3.2/addr.reply")}, tt.answers)...)
			c := newClient(t, Config{Socket: path})
			if p, err := c.Probe(t.Context()); err != nil || !p.DefersAddr() {
				t.Fatalf("%+v, %v", p, err)
			}
			got, err := c.Apply(t.Context(), "be", ops)
			if !errors.Is(err, tt.err) {
				t.Fatalf("got %+v, %v; want %v", got, err, tt.err)
			}
			if n := len(lines()) - 2; n != len(tt.answers) {
				t.Errorf("%d looks, want %d", n, len(tt.answers))
			}
			if strings.Contains(lines()[1], "show stat") {
				t.Errorf("the line that moves the server looks at it: %s", lines()[1])
			}
			if tt.err != nil {
				return
			}
			slot.Addr, slot.Admin = addrPort(tt.addr), lbsync.Maint
			if !slices.Equal(got.Servers, []lbsync.Server{slot}) {
				t.Errorf("got  %+v\nwant %+v", got.Servers, slot)
			}
		})
	}
}

func TestLaterVersions(t *testing.T) {
	gone := lbsync.Server{Name: "rc_127.0.0.8:80", ID: 50}
	there := gone
	there.Addr, there.Admin, there.Up, there.Weight = addrPort("127.0.0.8:80"), lbsync.Ready, true, 5
	t.Run("a dynamic server comes", func(t *testing.T) {
		path, _ := fakeSocket(t, recorded(t, "3.2/add.reply"))
		got, err := newClient(t, Config{Socket: path}).Apply(t.Context(), "be", []lbsync.Op{
			{Kind: lbsync.Add, Name: gone.Name, ID: 50, Addr: there.Addr}, {Kind: lbsync.SetReady, Name: gone.Name, ID: 50}, {Kind: lbsync.SetWeight, Name: gone.Name, ID: 50, Weight: 5}})
		if err != nil || len(got.Refused) > 0 || !slices.Equal(got.Servers, []lbsync.Server{there}) {
			t.Errorf("got %+v, %v\nwant %+v", got, err, there)
		}
	})
	t.Run("and goes", func(t *testing.T) {
		for file, refused := range map[string][]string{"3.2/del.reply": nil, "3.2/refused.reply": {"No such server."}} {
			path, _ := fakeSocket(t, recorded(t, file), recorded(t, "3.2/peek.reply"))
			got, err := newClient(t, Config{Socket: path}).Apply(t.Context(), "be", []lbsync.Op{{Kind: lbsync.Delete, Name: gone.Name, ID: 50}})
			if err != nil || !slices.Equal(got.Refused, refused) || len(got.Servers) > 0 {
				t.Errorf("%s: got %+v, %v", file, got, err)
			}
		}
	})
	t.Run("a backend is read whole", func(t *testing.T) {
		path, _ := fakeSocket(t, recorded(t, "3.2/read.reply"))
		c := newClient(t, Config{Socket: path})
		inspected(t, c, recorded(t, "3.2/read.reply"))
		got, err := c.Read(t.Context(), "be")
		there := there
		there.Busy = -1
		want := []lbsync.Server{
			{Name: "s1", ID: 1, Addr: addrPort("127.0.0.7:8080"), Slot: true, Admin: lbsync.Maint, Busy: -1},
			{Name: "s2", ID: 2, Addr: addrPort("127.0.0.1:1"), Slot: true, Admin: lbsync.Maint, Weight: 1, Busy: -1},
			there,
		}
		if err != nil || !slices.Equal(bares(got.Servers), want) {
			t.Errorf("got  %+v, %v\nwant %+v", got.Servers, err, want)
		}
	})
}
