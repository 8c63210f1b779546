//go:build !sidecar

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"rollcall/registrar"
)

// defaultEvents is how many of the last events are printed unless a flag says
// otherwise.
const defaultEvents = 50

func eventsCommand() *cli.Command {
	return &cli.Command{
		Name: "events", Usage: "print what changed last: who, what, when, why", ArgsUsage: "[SERVICE…]",
		Flags: redisFlags(outputFlag(),
			&cli.BoolFlag{Name: "follow", Aliases: []string{"f"}, Usage: "go on with what changes, until SIGINT"},
			&cli.StringFlag{Name: "since", EnvVars: env("since"), Usage: "`AGE|ID`: only what came later, 10m ago or after this event"},
			&cli.IntFlag{Name: "count", Aliases: []string{"n"}, EnvVars: env("count"), DefaultText: fmt.Sprintf("%d, or all --since", defaultEvents), Usage: "`N` events at most before those that --follow waits for"},
		),
		Action: func(c *cli.Context) error {
			svcs, err := parseServices(c.Args().Slice())
			if err != nil {
				return err
			}
			n := c.Int("count")
			switch {
			case n < 0 || n == 0 && c.IsSet("count"):
				return usage("--count %d: want 1 or more", n)
			case n == 0 && c.String("since") == "":
				n = defaultEvents
			}
			age, id, err := parseSince(c.String("since"))
			if err != nil {
				return err
			}
			s, err := begin(c, 1)
			if err != nil {
				return err
			}
			defer s.close()
			if age > 0 {
				ctx, cancel := registrar.WithTimeout(c.Context)
				now, _, err := s.store.Clock(ctx)
				cancel()
				if err != nil {
					return err
				}
				id = registrar.EventsAt(now - age.Milliseconds())
			}
			r := s.store.EventReader(svcs)
			ctx, cancel := registrar.WithTimeout(c.Context)
			events, err := r.Last(ctx, id, n)
			cancel()
			if !s.json && (err == nil || len(events) > 0) {
				fmt.Fprintf(s.w, eventLine, "TIME", "SERVICE", "VERSION", "ADDR", "WHAT", "WHY")
			}
			if err := errors.Join(s.events(events), err); err != nil || !c.Bool("follow") {
				return err
			}
			ctx, cancel = whileRead(c.Context, c)
			defer cancel()
			return s.follow(ctx, r)
		},
	}
}

// parseSince reads an age or the id of an event; both are empty if the flag is.
func parseSince(text string) (age time.Duration, id string, err error) {
	if text == "" {
		return 0, "", nil
	}
	if age, err = time.ParseDuration(text); err == nil && age > 0 {
		return age, "", nil
	}
	if registrar.CheckEventID(text) == nil {
		return 0, text, nil
	}
	return 0, "", usage("--since %q: want an age such as 10m, or the id of an event", text)
}

// follow prints what comes, until ctx ends. Redis may be away for any time.
func (s *session) follow(ctx context.Context, r *registrar.EventReader) error {
	wait := time.NewTimer(0)
	defer wait.Stop()
	for failures := 0; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-wait.C:
		}
		events, err := r.Next(ctx)
		if err := s.events(events); err != nil {
			if ctx.Err() != nil {
				return nil // it may end in the middle
			}
			return err
		}
		pause := time.Duration(0)
		switch {
		case ctx.Err() != nil:
		case errors.Is(err, registrar.ErrOtherHistory):
			s.log.Warn().Msg("the events begin anew, and some may be printed again: redis has other data, or its clock went back")
		case err != nil:
			if failures == 0 {
				s.log.Warn().Err(err).Msg("cannot read the events; trying again")
			}
			failures++
			pause = registrar.Backoff(failures, registrar.EventsWait)
		case failures > 0:
			s.log.Info().Int("failures", failures).Msg("the events can be read again")
			failures = 0
		}
		wait.Reset(pause)
	}
}

// whyOf says why, and of an operator's words by whom.
func whyOf(e registrar.Event) string {
	switch e.What {
	case registrar.EventDrained, registrar.EventMaint, registrar.EventReady, registrar.EventWeight, registrar.EventDeregistered:
	default:
		return e.Why // a registration or a reaper has done it
	}
	parts := []string{e.Why}
	if e.By != "" {
		parts = append(parts, "by "+e.By)
	}
	return strings.Trim(strings.Join(parts, ", "), ", ")
}

const eventLine = "%-23s  %-12s  %7s  %-21s  %-12s  %s\n"

// events prints one line each.
func (s *session) events(events []registrar.Event) error {
	for _, e := range events {
		if s.json {
			if err := s.document(e); err != nil {
				return err
			}
			continue
		}
		at, version, service := time.UnixMilli(e.At).Format("2006-01-02 15:04:05.000"), "-", cmp.Or(string(e.Service), "(every)")
		if e.Version > 0 {
			version = strconv.FormatInt(e.Version, 10)
		}
		if _, err := fmt.Fprintf(s.w, eventLine, at, plain(service), version, plain(dash(e.Addr)), plain(e.What), plain(dash(whyOf(e)))); err != nil {
			return err
		}
	}
	return nil
}
