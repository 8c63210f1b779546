//go:build !sidecar

package main

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"rollcall/notifier"
	"rollcall/registrar"
)

// event is one line of `watch`.
type event struct {
	Time    string            `json:"time"` // RFC 3339, by this machine's clock
	Service registrar.Service `json:"service"`
	Version int64             `json:"version"`
	Addr    string            `json:"addr"`
	What    string            `json:"what"` // here, changed, or why it is gone
	State   string            `json:"state,omitempty"`
	Weight  int               `json:"weight"`
}

func watchCommand() *cli.Command {
	return &cli.Command{
		Name: "watch", Usage: "print every change, of all services or of some, until SIGINT", ArgsUsage: "[SERVICE…]",
		Flags: redisFlags(append(httpFlags(), outputFlag())...),
		Action: func(c *cli.Context) error {
			svcs, err := parseServices(c.Args().Slice())
			if err != nil {
				return err
			}
			s, err := begin(c, 2)
			if err != nil {
				return err
			}
			defer s.close()
			defer s.hangups(c)()
			notify := newSystemd(s.log)
			defer notify.close()
			defer notify.stopping(c.Context)()
			w, err := notifier.New(notifier.Config{Services: svcs, Ready: func() { notify.useful("watching") }}, s.store, s.log)
			if err != nil {
				return err
			}
			mon, err := newMonitor(c, s.log)
			if err != nil {
				return err
			}
			count := func(event) {}
			if mon != nil {
				printed := mon.watch(w)
				count = func(e event) { printed.WithLabelValues(e.What).Inc() }
			}
			stop, err := mon.serve(c.Context)
			if err != nil {
				return err
			}
			defer stop()
			s.nameUnknown(c.Context, svcs...)
			ctx, cancel := whileRead(c.Context, c)
			defer cancel()
			var failed error
			shown := map[registrar.Service]*watched{}
			err = w.Run(ctx, func(ch notifier.Change) {
				if shown[ch.Service] == nil {
					shown[ch.Service] = &watched{last: map[netip.AddrPort]event{}}
				}
				for _, e := range shown[ch.Service].events(ch) {
					if err := s.line(e, "%s %s %d %s %s %s weight %d", e.Time, e.Service, e.Version, e.Addr, e.What, dash(e.State), e.Weight); err != nil {
						if c.Context.Err() == nil { // at its end it may end in the middle of a line
							failed = err
						}
						cancel() // as when a terminal was closed
					}
					count(e)
				}
			})
			return cmp.Or(err, failed)
		},
	}
}

// watched is what has been printed of one service.
type watched struct {
	view notifier.View
	last map[netip.AddrPort]event
}

// events returns what c changed of what has been printed, by address.
func (w *watched) events(c notifier.Change) []event {
	addrs := w.view.Apply(c)
	slices.SortFunc(addrs, netip.AddrPort.Compare)
	var out []event
	for _, a := range addrs {
		entry := w.view.Lookup(a)
		old, known := w.last[a]
		now := event{Service: c.Service, Addr: a.String()}
		switch {
		case entry.Garbage != "":
			continue
		case entry.Present:
			now.What, now.State, now.Weight = "here", stateWord(entry.Instance), entry.Instance.Weight()
			if known {
				now.What = "changed"
			}
			if known && now.State == old.State && now.Weight == old.Weight {
				continue
			}
		case !known:
			continue
		default:
			now.What = "absent"
			if entry.Gone != nil {
				now.What = string(entry.Gone.Reason)
			}
		}
		now.Time, now.Version = time.Now().Format("15:04:05.000"), c.Token.Version
		if entry.Present {
			w.last[a] = now
		} else {
			delete(w.last, a)
		}
		out = append(out, now)
	}
	return out
}
