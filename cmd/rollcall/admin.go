//go:build !sidecar

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"time"

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
	// Scope is whom an override is about: the address, or the registration that is there.
	Scope registrar.Scope `json:"scope,omitempty"`
	Until int64           `json:"until,omitempty"` // when a reaper ends it, unix ms by Redis' clock
	// Balancers is how many live ones have applied it; with --wait.
	Balancers *int `json:"balancers,omitempty"`
	// Waits is why a drain waits.
	Waits string `json:"waits,omitempty"`
}

func adminCommand(verb, help string) *cli.Command {
	names := "SERVICE ADDR | [SERVICE] --host|--zone|--tag|--all"
	flags := redisFlags(append(waitFlags(), outputFlag())...)
	lasts := []cli.Flag{
		&cli.StringFlag{Name: "reason", EnvVars: env("reason"), Usage: "`TEXT` for whoever wonders, at most 255 bytes"},
		&cli.DurationFlag{Name: "for", DefaultText: "until somebody ends it", Usage: "how long it holds, 1s to 8784h (366 days): then a reaper ends it"},
	}
	force := &cli.BoolFlag{Name: "force", Usage: "also the last that serves; then none is left to answer"}
	switch verb {
	case "drain":
		flags = append(flags, lasts...)
		force.Usage = "with a condition: also the last that serve; the last one's drain waits until another serves"
	case "maint":
		flags = append(flags, lasts...)
	case "weight":
		names = "SERVICE ADDR N|own | [SERVICE] --host|--zone|--tag|--all --to N|own"
		flags = append(flags, lasts[1], &cli.StringFlag{Name: "to", Usage: "`N|own`: the weight"})
	}
	if verb != "ready" {
		flags = append(flags, force)
	}
	flags = append(flags,
		&cli.BoolFlag{Name: "absent", Usage: "also of an address that nobody has; it holds when somebody comes there"},
		&cli.BoolFlag{Name: "registration", DefaultText: "true where the address is a container's own", Usage: "of the registration that is there now, and ends with it; =false is of the address, whoever has it"},
		asFlag(),
	)
	return &cli.Command{
		Name: verb, Usage: help, ArgsUsage: names, Flags: append(flags, conditionFlags()...),
		Action: func(c *cli.Context) error {
			cond, given, err := parseConditions(c)
			if err != nil {
				return err
			}
			args := c.Args().Slice()
			if verb == "weight" && !given && len(args) == 3 && !c.IsSet("to") {
				given, args = false, args[:2]
			} else if verb == "weight" && !c.IsSet("to") {
				if given {
					return usage("weight of many: want --to N or --to own")
				}
				return wantArgs(c)
			}
			switch {
			case given && len(args) > 1:
				return usage("unexpected argument %q: an address, or conditions such as --%s, not both", args[1], cond.first())
			case given && c.Bool("absent"):
				return usage("--absent is of one address: --%s is of who is there", cond.first())
			case given && cond.all && len(args) == 0:
				return usage("--all wants the SERVICE whose instances it means")
			case !given && len(args) != 2:
				return wantArgs(c)
			case !given && c.Bool("dry-run"):
				return usage("--dry-run goes with --host, --zone, --tag or --all")
			case !given && verb == "drain" && c.Bool("force"):
				return usage("--force goes with --host, --zone, --tag or --all: a drain of one address is never refused; of the last that serves it waits for another")
			}
			w, err := parseWord(c, verb)
			if err != nil {
				return err
			}
			if given {
				return onMany(c, args, cond, w)
			}
			return onInstance(c, args[0], args[1], func(s *session, svc registrar.Service, addr netip.AddrPort) (outcome, error) {
				return s.override(c.Context, svc, addr, w)
			})
		},
	}
}

// wantArgs says how a command is called.
func wantArgs(c *cli.Context) error {
	return usage("want %s %s; see rollcall %s --help", c.Command.Name, c.Command.ArgsUsage, c.Command.Name)
}

// parseWord reads what is to be said, of whomever it is.
func parseWord(c *cli.Context, verb string) (w registrar.Word, err error) {
	w = registrar.Word{Verb: verb, Reason: c.String("reason"), Force: c.Bool("force"), Known: !c.Bool("absent"), For: c.Duration("for")}
	if n := len(w.Reason); n > registrar.MaxText {
		return w, usage("--reason of %d bytes: want at most %d", n, registrar.MaxText)
	}
	if w.By, err = who(c); err != nil {
		return w, err
	}
	if c.IsSet("for") && (w.For < time.Second || w.For > registrar.MaxFor) {
		return w, usage("--for %v: want 1s to %s (%d days)", w.For, "8784h", registrar.MaxFor/(24*time.Hour))
	}
	if c.IsSet("registration") {
		w.Scope = registrar.ScopeAddress
		if c.Bool("registration") {
			w.Scope = registrar.ScopeRegistration
		}
	}
	if w.Scope == registrar.ScopeRegistration && !w.Known {
		return w, usage("--absent and --registration: an address that nobody has has no registration")
	}
	if verb != "weight" {
		return w, nil
	}
	to := c.String("to")
	if !c.IsSet("to") {
		to = c.Args().Get(2)
	}
	if to == "own" {
		if c.IsSet("for") {
			return w, usage("--for with own: the instance's own weight is no override that could end")
		}
		return w, nil
	}
	n, err := strconv.Atoi(to)
	if err != nil {
		return w, usage("weight %q: want 0 to %d, or own", to, registrar.MaxWeight)
	}
	if err := registrar.CheckWeight(n); err != nil {
		return w, usageError{err}
	}
	w.Weight = &n
	return w, nil
}

// override writes w about one address.
func (s *session) override(ctx context.Context, svc registrar.Service, addr netip.AddrPort, w registrar.Word) (outcome, error) {
	o, err := registrar.Try(ctx, func(ctx context.Context) (registrar.Written, error) {
		return s.store.SetOverride(ctx, svc, addr, w)
	})
	switch {
	case errors.Is(err, registrar.ErrAbsent) && o.Present:
		err = fmt.Errorf("%w with a registration that --registration could be of: it was added by hand", err)
	case errors.Is(err, registrar.ErrAbsent):
		err = s.absent(ctx, svc, addr, w.Scope, err)
	case errors.Is(err, registrar.ErrLast):
		err = fmt.Errorf("%w; start another first, or drain it, which waits for one, or say --force", err)
	}
	if err == nil && o.Until > 0 {
		s.warnNoReaper(ctx, svc)
	}
	return outcome{Done: w.Verb, Version: o.Version, Present: o.Present, Scope: o.Scope, Until: o.Until}, err
}

// warnNoReaper says so if nobody lives who would end an override of svc.
func (s *session) warnNoReaper(ctx context.Context, svc registrar.Service) {
	ctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	o, err := s.store.Of(svc).Overview(ctx)
	if err != nil {
		s.log.Warn().Err(err).Msg("cannot tell whether a reaper is alive, which ends it")
		return
	}
	for _, r := range o.Reapers {
		if r.Live {
			return
		}
	}
	s.log.Warn().Str("service", string(svc)).Msg("a reaper ends it, and none is alive: it holds until one is, or until somebody ends it")
}

// holds says of an override whom it is of, if not of the address, and when it ends.
func (o outcome) holds() (text string) {
	if o.Scope == registrar.ScopeRegistration && o.Done != "ready" {
		text = ", of this registration"
	}
	if o.Until > 0 {
		text += ", until " + time.UnixMilli(o.Until).Format(time.DateTime)
	}
	return text
}

func deregisterCommand() *cli.Command {
	return &cli.Command{
		Name:  "deregister",
		Usage: "take an instance out whose sidecar is gone",
		Flags: redisFlags(append(waitFlags(), outputFlag(),
			&cli.StringFlag{Name: "service", EnvVars: env("service"), Usage: "`NAME` of the service"},
			&cli.StringFlag{Name: "addr", EnvVars: env("addr"), Usage: "`HOST:PORT` of the instance"},
			&cli.BoolFlag{Name: "force", Usage: "also one that beats; its next beat brings it back, so use maint to keep it out"},
			asFlag(),
		)...),
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usage("unexpected argument %q; want --service NAME --addr HOST:PORT", c.Args().First())
			}
			by, err := who(c)
			if err != nil {
				return err
			}
			return onInstance(c, c.String("service"), c.String("addr"), func(s *session, svc registrar.Service, addr netip.AddrPort) (outcome, error) {
				tries := 0
				version, err := registrar.Try(c.Context, func(ctx context.Context) (int64, error) {
					tries++
					version, err := s.store.Deregister(ctx, svc, addr, c.Bool("force"), by)
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
	text := fmt.Sprintf("%s %s: %s, version %d%s", svc, addr, o.Done, o.Version, o.holds())
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
