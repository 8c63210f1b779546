package httpapi

import (
	"fmt"
	"testing"

	"rollcall/registrar"
)

// TestPast recalls the membership before the first look from the log.
func TestPast(t *testing.T) {
	t.Parallel()
	maint := &Word{Admin: registrar.Admin{State: registrar.AdminMaint}}
	for _, c := range []struct {
		name   string
		now    []Instance
		events []registrar.Event
		want   string // [at,ready,out,silent] from 1 on
	}{
		{"nothing happened", []Instance{{Addr: "a", State: "ready"}, {Addr: "b", State: "maint", Word: maint}}, nil, "[[1,1,1,0]]"},
		{"one joined", []Instance{{Addr: "a", State: "ready"}, {Addr: "b", State: "ready"}}, []registrar.Event{{At: 5, Addr: "b", What: registrar.EventJoined}}, "[[1,1,0,0] [5,2,0,0]]"},
		{"each way of going", []Instance{{Addr: "a", State: "ready"}}, []registrar.Event{
			{At: 5, Addr: "b", What: registrar.EventLeft}, {At: 6, Addr: "c", What: registrar.EventExpired},
			{At: 7, Addr: "d", What: registrar.EventUnhealthy}, {At: 8, Addr: "e", What: registrar.EventDeregistered},
		}, "[[1,5,0,0] [5,4,0,0] [6,3,0,0] [7,2,0,0] [8,1,0,0]]"},
		{"it drains, leaves and comes back", []Instance{{Addr: "a", State: "ready"}}, []registrar.Event{
			{At: 5, Addr: "a", What: registrar.EventDraining}, {At: 6, Addr: "a", What: registrar.EventLeft}, {At: 7, Addr: "a", What: registrar.EventJoined},
		}, "[[1,1,0,0] [5,0,1,0] [6,0,0,0] [7,1,0,0]]"},
		{"words of an operator", []Instance{{Addr: "a", State: "maint", Word: maint}}, []registrar.Event{
			{At: 5, Addr: "a", What: registrar.EventReady}, {At: 6, Addr: "a", What: registrar.EventWeight}, {At: 7, Addr: "a", What: registrar.EventMaint},
		}, "[[1,0,1,0] [5,1,0,0] [6,1,0,0] [7,0,1,0]]"},
		{"a word outlives the instance", []Instance{{Addr: "a", State: "maint", Word: maint}}, []registrar.Event{
			{At: 5, Addr: "a", What: registrar.EventMaint}, {At: 6, Addr: "a", What: registrar.EventLeft}, {At: 7, Addr: "a", What: registrar.EventJoined},
		}, "[[1,1,0,0] [5,0,1,0] [6,0,0,0] [7,0,1,0]]"},
		{"a takeover, and a hold", []Instance{{Addr: "a", State: "ready"}}, []registrar.Event{
			{At: 5, Addr: "a", What: registrar.EventTakeover}, {At: 6, What: registrar.EventProtected},
		}, "[[1,1,0,0] [5,1,0,0] [6,1,0,0]]"},
	} {
		var points []string
		for _, p := range past(&document{Service: Service{Instances: c.now}}, c.events, 1) {
			b, err := p.MarshalJSON()
			if err != nil {
				t.Fatal(err)
			}
			points = append(points, string(b))
		}
		if got := fmt.Sprint(points); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

// TestHistoryLimit drops the oldest points, and says nothing twice.
func TestHistoryLimit(t *testing.T) {
	t.Parallel()
	var h []point
	for n := range 2 * historyLimit {
		h = add(h, point{At: int64(n), Ready: n})
		h = add(h, point{At: int64(n), Ready: n})
	}
	if len(h) != historyLimit || h[0].Ready != historyLimit || h[len(h)-1].Ready != 2*historyLimit-1 {
		t.Errorf("%d points, %v to %v", len(h), h[0], h[len(h)-1])
	}
	// A clock that goes back does not turn the picture round.
	if h = add(h, point{At: 3, Ready: 1}); h[len(h)-1].At != 2*historyLimit-1 {
		t.Errorf("%v", h[len(h)-1])
	}
}
