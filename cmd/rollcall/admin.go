//go:build !sidecar

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"

	"github.com/urfave/cli/v2"

	"rollcall/registrar"
)

// outcome is what the commands that change one instance print.
type outcome struct {
	Service registrar.Service `json:"service"`
	Addr    string            `json:"addr"`
	Done    string            `json:"done"`
	Version int64             `json:"version"`
	Present bool              `json:"present"`
	// Balancers is how many live ones have applied it; with --wait.
	Balancers *int `json:"balancers,omitempty"`
	// Waits is why a drain waits.
	Waits string `json:"waits,omitempty"`
}

func adminCommand(verb, help string) *cli.Command {
	names, want := "SERVICE ADDR", 2
	flags := redisFlags(append(waitFlags(), outputFlag())...)
	reason := &cli.StringFlag{Name: "reason", EnvVars: env("reason"), Usage: "`TEXT` for whoever wonders, at most 255 bytes"}
	force := &cli.BoolFlag{Name: "force", Usage: "also the last instance that serves; then none is left to answer"}
	flags = append(flags, &cli.BoolFlag{Name: "absent", Usage: "also of an address that nobody has; it holds when somebody comes there"})
	switch verb {
	case "drain":
		flags = append(flags, reason)
	case "maint":
		flags = append(flags, reason, force)
	case "weight":
		names, want = "SERVICE ADDR N|own", 3
		flags = append(flags, force)
	}
	return &cli.Command{
		Name: verb, Usage: help, ArgsUsage: names, Flags: flags,
		Action: func(c *cli.Context) error {
			a, err := args(c, names, want)
			if err != nil {
				return err
			}
			w := registrar.Word{Verb: verb, Reason: c.String("reason"), Force: c.Bool("force"), Known: !c.Bool("absent")}
			if n := len(w.Reason); n > registrar.MaxText {
				return usage("--reason of %d bytes: want at most %d", n, registrar.MaxText)
			}
			if verb == "weight" && a[2] != "own" {
				n, err := strconv.Atoi(a[2])
				if err != nil {
					return usage("weight %q: want 0 to %d, or own", a[2], registrar.MaxWeight)
				}
				if err := registrar.CheckWeight(n); err != nil {
					return usageError{err}
				}
				w.Weight = &n
			}
			return onInstance(c, a[0], a[1], func(s *session, svc registrar.Service, addr netip.AddrPort) (outcome, error) {
				o, err := registrar.Try(c.Context, func(ctx context.Context) (outcome, error) {
					version, present, err := s.store.SetAdmin(ctx, svc, addr, w)
					return outcome{Done: verb, Version: version, Present: present}, err
				})
				if errors.Is(err, registrar.ErrAbsent) {
					err = s.absent(c.Context, svc, addr, err)
				}
				if errors.Is(err, registrar.ErrLast) {
					err = fmt.Errorf("%w; start another first, or drain it, which waits for one, or say --force", err)
				}
				return o, err
			})
		},
	}
}

func deregisterCommand() *cli.Command {
	return &cli.Command{
		Name:  "deregister",
		Usage: "take an instance out whose sidecar is gone",
		Flags: redisFlags(append(waitFlags(), outputFlag(),
			&cli.StringFlag{Name: "service", EnvVars: env("service"), Usage: "`NAME` of the service"},
			&cli.StringFlag{Name: "addr", EnvVars: env("addr"), Usage: "`HOST:PORT` of the instance"},
			&cli.BoolFlag{Name: "force", Usage: "also one that beats; its next beat brings it back, so use maint to keep it out"},
		)...),
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usage("unexpected argument %q; want --service NAME --addr HOST:PORT", c.Args().First())
			}
			return onInstance(c, c.String("service"), c.String("addr"), func(s *session, svc registrar.Service, addr netip.AddrPort) (outcome, error) {
				tries := 0
				version, err := registrar.Try(c.Context, func(ctx context.Context) (int64, error) {
					tries++
					version, err := s.store.Deregister(ctx, svc, addr, c.Bool("force"), "")
					if tries > 1 && errors.Is(err, registrar.ErrAbsent) { // the try without an answer took it out
						v, err := s.store.Versions(ctx, []registrar.Service{svc})
						return v.Of[svc], err
					}
					return version, err
				})
				if errors.Is(err, registrar.ErrBeats) {
					s.log.Warn().Msg("stop its sidecar, or use maint to keep it out, or --force to take it out until its next beat")
				}
				return outcome{Done: "deregister", Version: version}, err
			})
		},
	}
}

// onInstance parses service and address, runs do, and prints the outcome.
func onInstance(c *cli.Context, service, address string, do func(*session, registrar.Service, netip.AddrPort) (outcome, error)) error {
	svc, err := parseService(service)
	if err != nil {
		return err
	}
	addr, err := registrar.ResolveAddr(c.Context, address)
	if err != nil {
		return usageError{err}
	}
	s, err := begin(c, 1)
	if err != nil {
		return err
	}
	defer s.close()
	o, err := do(s, svc, addr)
	if err != nil {
		return err
	}
	o.Service, o.Addr = svc, addr.String()
	if !o.Present && o.Done != "deregister" {
		s.log.Warn().Str("service", service).Stringer("addr", addr).Msg("no such instance now; the word holds when it comes")
	}
	text := fmt.Sprintf("%s %s: %s, version %d", svc, addr, o.Done, o.Version)
	var waited error
	if c.Bool("wait") {
		var live int
		live, waited = waitApplied(c, s, svc, o.Version)
		if waited == nil {
			o.Balancers = &live
			text = fmt.Sprintf("%s, applied by %d balancers", text, live)
		}
	}
	if o.Done == "drain" && o.Balancers == nil {
		if o.Waits = s.drainWaits(c.Context, svc, addr); o.Waits != "" {
			text += "; it waits: " + o.Waits
		}
		if errors.Is(waited, errTimedOut) && o.Waits != "" {
			waited = fmt.Errorf("%w; the drain waits: %s", waited, o.Waits)
		}
	}
	return errors.Join(s.line(o, "%s", text), waited)
}

// drainWaits returns why a drain that has been written waits; empty if it does not.
// That this cannot be told does not make the drain a failure.
func (s *session) drainWaits(ctx context.Context, svc registrar.Service, addr netip.AddrPort) string {
	ctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	why, err := s.store.DrainWaits(ctx, svc, addr)
	if err != nil {
		s.log.Warn().Err(err).Msg("cannot tell whether the drain waits for another instance")
	}
	return why
}
