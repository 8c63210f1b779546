package main

import "testing"

func TestNearest(t *testing.T) {
	t.Parallel()
	known := []string{"web", "webapi", "billing", "billing-api", "a"}
	for name, want := range map[string]string{
		"wbe": "web", "we": "web", "webb": "web", "weba": "web", "webapo": "webapi", "biling": "billing", "billling": "billing", "bilingapi": "billing-api",
		"xyz": "", "b": "a", "zzzzzzzzzz": "", "WEB": "",
	} {
		if got := nearest(name, known); got != want {
			t.Errorf("%q: %q, want %q", name, got, want)
		}
	}
	for _, d := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"", "abc", 3}, {"abc", "", 3}, {"abc", "abc", 0}, {"abc", "acb", 1}, {"abc", "abd", 1}, {"abcd", "acd", 1}, {"kitten", "sitting", 3}} {
		if got := distance(d.a, d.b); got != d.want {
			t.Errorf("%q to %q: %d, want %d", d.a, d.b, got, d.want)
		}
	}
}
