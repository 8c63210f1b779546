package registrar

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"rollcall/registrar/redistest"
)

// TestServiceIsSaidAgain takes a service off the list, as somebody may by hand: whoever
// beats for it, alone or with others, puts it back.
func TestServiceIsSaidAgain(t *testing.T) {
	srv := redistest.Start(t)
	for name, roll := range map[string]func(*Store) *Roll{"alone": func(*Store) *Roll { return nil }, "with others": NewRoll} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := fresh(t, srv)
			s.now = ""
			s.listing.every = 100 * time.Millisecond
			b, err := NewBeater(BeaterConfig{Service: web, Addr: host(1), Interval: 50 * time.Millisecond, Roll: roll(s)}, s, zerolog.Nop())
			must(t, err)
			start(t, b)
			registered(t, s, b)
			for range 2 {
				do(t, s, "SREM", s.keys.Services(), "web")
				eventually(t, func() error {
					if !s.rdb.SIsMember(t.Context(), s.keys.Services(), "web").Val() {
						return errors.New("it is not on the list")
					}
					return nil
				})
			}
		})
	}
	t.Run("not the canary", func(t *testing.T) {
		s := fresh(t, srv)
		s.listing.every = 0
		for range 3 {
			must(t, s.Canary(context.WithoutCancel(t.Context())))
		}
		if n := s.rdb.SCard(t.Context(), s.keys.Services()).Val(); n != 0 {
			t.Errorf("%d names", n)
		}
	})
}

// TestUnlist takes names off the list, but of no service that has members.
func TestUnlist(t *testing.T) {
	s := fresh(t, redistest.Start(t))
	join(t, s, host(1), "t")
	do(t, s, "SADD", s.keys.Services(), "empty", "other", "odd")
	do(t, s, "RPUSH", s.keys.Instances("odd"), "x")
	must(t, s.Unlist(t.Context(), "empty", web, "odd", "unknown"))
	names, _, err := s.Services(t.Context())
	must(t, err)
	got := map[Service]bool{}
	for _, n := range names {
		got[n] = true
	}
	if len(got) != 3 || !got[web] || !got["other"] || !got["odd"] {
		t.Errorf("on the list: %v", names)
	}
}
