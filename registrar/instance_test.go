package registrar

import (
	"context"
	"encoding/json"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestParseService(t *testing.T) {
	for _, c := range []struct {
		in string
		ok bool
	}{
		{"web", true}, {"0", true}, {"a.b_c-d", true}, {strings.Repeat("a", 63), true},
		{"", false}, {strings.Repeat("a", 64), false}, {"Web", false}, {"-a", false}, {".a", false}, {"_a", false},
		{"a b", false}, {"a\n", false}, {"a\x00", false}, {"a:b", false}, {"{a}", false}, {"a}", false}, {"ä", false}, {"a/b", false}, {"a*", false},
	} {
		got, err := ParseService(c.in)
		if (err == nil) != c.ok || c.ok && string(got) != c.in || !c.ok && got != "" {
			t.Errorf("%q: got %q %v, want accepted %v", c.in, got, err, c.ok)
		}
	}
}

// badAddrs is refused by ParseAddr and by ResolveAddr.
var badAddrs = []struct{ name, in string }{
	{"empty", ""},
	{"no port", "10.0.0.7"},
	{"empty port", "10.0.0.7:"},
	{"port 0", "10.0.0.7:0"},
	{"port 65536", "10.0.0.7:65536"},
	{"port with a sign", "10.0.0.7:+80"},
	{"negative port", "10.0.0.7:-1"},
	{"port in hex", "10.0.0.7:0x50"},
	{"named port", "10.0.0.7:http"},
	{"two ports", "10.0.0.7:80:80"},
	{"empty host", ":80"},
	{"zone", "[fe80::1%eth0]:80"},
	{"zone on IPv4 in IPv6", "[::ffff:1.2.3.4%x]:80"},
	{"unspecified", "0.0.0.0:80"},
	{"unspecified IPv6", "[::]:80"},
	{"unspecified IPv4 in IPv6", "[::ffff:0.0.0.0]:80"},
	{"multicast", "224.0.0.1:80"},
	{"multicast IPv6", "[ff02::1]:80"},
	{"multicast IPv4 in IPv6", "[::ffff:224.0.0.1]:80"},
	{"broadcast", "255.255.255.255:80"},
	{"broadcast IPv4 in IPv6", "[::ffff:255.255.255.255]:80"},
	{"IPv6 without brackets", "2001:db8::1:80"},
	{"leading zero", "010.0.0.7:80"},
	{"leading zeros", "10.0.0.007:80"},
	{"three parts", "10.0.7:80"},
	{"two parts", "127.1:80"},
	{"one number", "2130706433:80"},
	{"hexadecimal number", "0x7f000001:80"},
	{"hexadecimal part", "127.0.0.0x1:80"},
	{"five parts", "1.2.3.4.5:80"},
	{"part above 255", "10.0.0.256:80"},
	{"trailing dot", "10.0.0.7.:80"},
	{"second command", "1.2.3.4:80;x"},
	{"second command before the port", "1.2.3.4;x:80"},
	{"newline", "10.0.0.7:80\n"},
	{"newline in the host", "10.0.0.7\n:80"},
	{"newline first", "\n10.0.0.7:80"},
	{"space", " 10.0.0.7:80"},
	{"space before the port", "10.0.0.7: 80"},
	{"NUL", "10.0.0.7:80\x00"},
	{"NUL in the host", "10.0.0.7\x00:80"},
	{"unix path", "/run/x.sock"},
	{"unix path with a scheme", "unix:/run/x.sock"},
	{"unix path with a port", "/run/x.sock:80"},
	{"abstract socket", "abns@x:80"},
	{"file descriptor", "fd@3:80"},
	{"scheme", "tcp://10.0.0.7:80"},
	{"user", "user@10.0.0.7:80"},
	{"prefix", "10.0.0.0/8:80"},
	{"Arabic digits", "١٠.0.0.7:80"},
}

func TestParseAddr(t *testing.T) {
	for _, in := range []string{"10.0.0.7:8080", "127.0.0.1:1", "1.2.3.4:65535", "[2001:db8::1]:80", "[::1]:80", "[fe80::1]:80", "255.255.255.254:80"} {
		t.Run(in, func(t *testing.T) {
			if a, err := ParseAddr(in); err != nil || a.String() != in {
				t.Errorf("got %v %v", a, err)
			}
		})
	}
	// What only ResolveAddr accepts and puts right.
	others := []struct{ name, in string }{
		{"IPv4 in IPv6", "[::ffff:1.2.3.4]:80"},
		{"IPv4 in brackets", "[10.0.0.7]:80"},
		{"port with a leading zero", "10.0.0.7:080"},
		{"IPv6 in capitals", "[2001:DB8::1]:80"},
		{"IPv6 written out", "[2001:db8:0:0:0:0:0:1]:80"},
		{"host name", "localhost:80"},
	}
	for _, c := range append(others, badAddrs...) {
		t.Run(c.name, func(t *testing.T) {
			a, err := ParseAddr(c.in)
			if err == nil || a.IsValid() {
				t.Fatalf("%q was accepted as %v", c.in, a)
			}
			if strings.ContainsAny(err.Error(), "\n\x00") {
				t.Errorf("the error repeats control characters: %q", err)
			}
		})
	}
}

func TestResolveAddr(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"10.0.0.7:8080", "10.0.0.7:8080"},
		{"10.0.0.7:080", "10.0.0.7:80"},
		{"[::ffff:1.2.3.4]:80", "1.2.3.4:80"},
		{"[10.0.0.7]:80", "10.0.0.7:80"},
		{"[2001:DB8:0::1]:80", "[2001:db8::1]:80"},
		{"localhost:80", "127.0.0.1:80"},
	} {
		t.Run(c.in, func(t *testing.T) {
			a, err := ResolveAddr(t.Context(), c.in)
			if err != nil || a.String() != c.want {
				t.Fatalf("got %v %v, want %s", a, err, c.want)
			}
			if _, err := ParseAddr(a.String()); err != nil {
				t.Errorf("ParseAddr refuses it: %v", err)
			}
		})
	}
	// Ended before it began: whatever asks a resolver would say so, and what is
	// refused is refused without asking.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, c := range badAddrs {
		t.Run(c.name, func(t *testing.T) {
			if a, err := ResolveAddr(ctx, c.in); err == nil || a.IsValid() {
				t.Errorf("%q was accepted as %v", c.in, a)
			}
		})
	}
	for _, number := range []string{"127.1:80", "2130706433:80", "0x7f000001:80", "127.0.0.0x1:80", "010.0.0.7:80", "10.0.0.7.:80", "1.0x:80"} {
		if _, err := ResolveAddr(t.Context(), number); err == nil || !strings.Contains(err.Error(), "no IPv4 address") {
			t.Errorf("%q was looked up: %v", number, err)
		}
	}
}

func TestPrefer4(t *testing.T) {
	for _, c := range []struct {
		ips  []string
		want string
	}{
		{[]string{"10.0.0.1", "10.0.0.2"}, "10.0.0.1"},
		{[]string{"2001:db8::1", "10.0.0.1"}, "10.0.0.1"},
		{[]string{"2001:db8::1", "::ffff:10.0.0.1", "10.0.0.2"}, "10.0.0.1"},
		{[]string{"2001:db8::1", "2001:db8::2"}, "2001:db8::1"},
	} {
		var ips []netip.Addr
		for _, s := range c.ips {
			ips = append(ips, netip.MustParseAddr(s))
		}
		if got := prefer4(ips); got.String() != c.want {
			t.Errorf("%v: %v, want %s", c.ips, got, c.want)
		}
	}
}

func TestNumericEnd(t *testing.T) {
	for _, name := range []string{"web", "web.", "web1", "1web", "1.web", "a0x1", "0xg", "deadbeef"} {
		if numericEnd.MatchString(name) {
			t.Errorf("%q counts as a number", name)
		}
	}
}

func TestCheckWeight(t *testing.T) {
	for w, ok := range map[int]bool{-1: false, 0: true, 1: true, 256: true, 257: false} {
		if err := CheckWeight(w); (err == nil) != ok {
			t.Errorf("%d: %v, want accepted %v", w, err, ok)
		}
	}
}

func TestCheckInterval(t *testing.T) {
	for _, c := range []struct {
		interval, ttl time.Duration
		ok            bool
	}{
		{5 * time.Second, 15 * time.Second, true},
		{5*time.Second + 1, 15 * time.Second, false},
		{1, 15 * time.Second, true},
		{0, 15 * time.Second, false},
		{-1, 15 * time.Second, false},
		{1, 0, false},
	} {
		if err := CheckInterval(c.interval, c.ttl); (err == nil) != c.ok {
			t.Errorf("%v of %v: %v, want accepted %v", c.interval, c.ttl, err, c.ok)
		}
	}
}

func TestInstanceInForce(t *testing.T) {
	zero := 0
	for _, c := range []struct {
		name   string
		i      Instance
		weight int
		state  AdminState
	}{
		{"its own", Instance{Meta: Meta{Weight: 7}}, 7, AdminNone},
		{"the operator's weight", Instance{Meta: Meta{Weight: 7}, Admin: Admin{Weight: &zero}}, 0, AdminNone},
		{"leaving", Instance{Meta: Meta{Draining: true}}, 0, AdminDrain},
		{"maint while leaving", Instance{Meta: Meta{Draining: true}, Admin: Admin{State: AdminMaint}}, 0, AdminMaint},
		{"drain", Instance{Admin: Admin{State: AdminDrain}}, 0, AdminDrain},
	} {
		if c.i.Weight() != c.weight || c.i.State() != c.state {
			t.Errorf("%s: %d %q, want %d %q", c.name, c.i.Weight(), c.i.State(), c.weight, c.state)
		}
	}
}

// TestMetaWireForm fixes the JSON that other people's tools read.
func TestMetaWireForm(t *testing.T) {
	m := Meta{ID: "t", Weight: 0, Zone: "z", Tags: map[string]string{"k": "v"}, Draining: true, Registered: 5, Agent: "a"}
	got, err := json.Marshal(m)
	must(t, err)
	if want := `{"id":"t","weight":0,"zone":"z","tags":{"k":"v"},"draining":true,"registered":5,"agent":"a"}`; string(got) != want {
		t.Errorf("got %s, want %s", got, want)
	}
	back, err := parseMeta(string(got))
	if err != nil || !reflect.DeepEqual(back, m) {
		t.Errorf("read back %+v %v", back, err)
	}
	if got, err = json.Marshal(Meta{ID: "t"}); err != nil || string(got) != `{"id":"t","weight":0,"registered":0}` {
		t.Errorf("got %s %v", got, err)
	}
}

func FuzzParseAddr(f *testing.F) {
	for _, c := range badAddrs {
		f.Add(c.in)
	}
	f.Add("10.0.0.7:8080")
	f.Add("[2001:db8::1]:80")
	f.Fuzz(func(t *testing.T, s string) {
		a, err := ParseAddr(s)
		if err != nil {
			if a != (netip.AddrPort{}) {
				t.Errorf("%q: refused, and yet %v", s, a)
			}
			return
		}
		ip := a.Addr()
		if a.String() != s || a.Port() == 0 || ip.Zone() != "" || ip.IsUnspecified() || ip.IsMulticast() || ip.Is4In6() {
			t.Errorf("%q was accepted as %v", s, a)
		}
	})
}
