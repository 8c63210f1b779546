//go:build !sidecar

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"rollcall/registrar"
)

const defaultWait = 30 * time.Second

func timeoutFlag() cli.Flag {
	return &cli.DurationFlag{Name: "timeout", Value: defaultWait, EnvVars: env("timeout"), Usage: "longest wait; exit code 4 when it ends"}
}

func waitFlags() []cli.Flag {
	return []cli.Flag{
		&cli.BoolFlag{Name: "wait", Usage: "until every live balancer has applied it"},
		timeoutFlag(),
	}
}

// waitApplied waits until every live balancer has applied version.
func waitApplied(c *cli.Context, s *session, svc registrar.Service, version int64) (live int, err error) {
	ctx, cancel := context.WithTimeout(c.Context, c.Duration("timeout"))
	defer cancel()
	live, err = s.store.WaitApplied(ctx, svc, version, nil)
	if err == nil && live == 0 {
		s.log.Warn().Str("service", string(svc)).Msg("no live balancer has this service: nobody to wait for")
	}
	return live, timedOut(c, ctx, err)
}

// timedOut marks an error that came of the --timeout.
func timedOut(c *cli.Context, ctx context.Context, err error) error {
	if err != nil && c.Context.Err() == nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("%w after %v: %w", errTimedOut, c.Duration("timeout"), err)
	}
	return err
}

func waitCommand() *cli.Command {
	return &cli.Command{
		Name: "wait", Usage: "wait for a state of a service in every live balancer", ArgsUsage: "SERVICE",
		Flags: redisFlags(outputFlag(), timeoutFlag(),
			&cli.StringFlag{Name: "for", Value: "converged", EnvVars: env("for"),
				Usage: "`GOAL`: converged (all that is known now is applied), ready=N (so many instances serve, and that is applied), or version=N"},
		),
		Action: func(c *cli.Context) error {
			a, err := args(c, "SERVICE", 1)
			if err != nil {
				return err
			}
			svc, err := parseService(a[0])
			if err != nil {
				return err
			}
			reached, err := parseGoal(c.String("for"))
			if err != nil {
				return err
			}
			s, err := begin(c, 1)
			if err != nil {
				return err
			}
			defer s.close()
			ctx, cancel := context.WithTimeout(c.Context, c.Duration("timeout"))
			defer cancel()
			version, err := s.await(ctx, svc, reached)
			if err != nil {
				return timedOut(c, ctx, err)
			}
			live, err := s.store.WaitApplied(ctx, svc, version, nil)
			if err != nil {
				return timedOut(c, ctx, err)
			}
			o := struct {
				Service   registrar.Service `json:"service"`
				Version   int64             `json:"version"`
				Balancers int               `json:"balancers"`
			}{svc, version, live}
			return s.line(o, "%s: version %d, applied by %d balancers", svc, version, live)
		},
	}
}

// goal returns the version that must be applied once the register is as wanted,
// or why it is not yet.
type goal func(registrar.Snapshot) (version int64, err error)

func parseGoal(s string) (goal, error) {
	name, number, numbered := strings.Cut(s, "=")
	n, err := strconv.ParseInt(number, 10, 64)
	switch {
	case s == "converged":
		return func(snap registrar.Snapshot) (int64, error) { return snap.Token.Version, nil }, nil
	case !numbered || err != nil || n < 0:
	case name == "version":
		return func(snap registrar.Snapshot) (int64, error) {
			if snap.Token.Version < n {
				return 0, fmt.Errorf("version is %d", snap.Token.Version)
			}
			return n, nil
		}, nil
	case name == "ready":
		return func(snap registrar.Snapshot) (int64, error) {
			ready := int64(0)
			for _, e := range snap.Entries {
				if e.Present && e.Instance.State() == registrar.AdminNone && e.Instance.Weight() > 0 {
					ready++
				}
			}
			if ready < n {
				return 0, fmt.Errorf("%d of %d instances are ready", ready, n)
			}
			return snap.Token.Version, nil
		}, nil
	}
	return nil, usage("--for %q: want converged, ready=N or version=N", s)
}

// await reads the service again and again until the goal is reached.
func (s *session) await(ctx context.Context, svc registrar.Service, reached goal) (int64, error) {
	const first, last = 10 * time.Millisecond, 500 * time.Millisecond
	wait := time.NewTimer(0)
	defer wait.Stop()
	why, failures := ctx.Err(), 0
	for pause := first; ; pause = min(2*pause, last) {
		select {
		case <-ctx.Done():
			return 0, fmt.Errorf("wait for %s: %w", svc, errors.Join(why, ctx.Err()))
		case <-wait.C:
		}
		tctx, cancel := registrar.WithTimeout(ctx)
		snap, err := s.store.Read(tctx, svc, nil)
		cancel()
		if err == nil {
			version, err := reached(snap)
			if err == nil {
				return version, nil
			}
			why, failures = err, 0
			wait.Reset(registrar.Shorten(pause))
			continue
		}
		if why == nil || ctx.Err() == nil { // else it is the read that was cut short
			why = err
		}
		failures++
		wait.Reset(registrar.Backoff(failures, last))
	}
}

// lbRow is one line of `lb`.
type lbRow struct {
	Balancer string            `json:"balancer"`
	Service  registrar.Service `json:"service"`
	Applied  int64             `json:"applied"`
	Version  int64             `json:"version"`
	Behind   int64             `json:"behind"`
	SeenMS   int64             `json:"seen_ms"` // ago; -1 if unknown
	Live     bool              `json:"live"`
	Double   bool              `json:"double,omitempty"` // two lbsyncs acknowledge as it, and one is not heard
}

func lbCommand() *cli.Command {
	return &cli.Command{
		Name: "lb", Usage: "list the balancers, what each has applied, and how far behind it is; of the services that have instances, or of some", ArgsUsage: "[SERVICE…]",
		Flags: redisFlags(outputFlag()),
		Action: func(c *cli.Context) error {
			svcs, err := parseServices(c.Args().Slice())
			if err != nil {
				return err
			}
			s, err := begin(c, 1)
			if err != nil {
				return err
			}
			defer s.close()
			rows, err := registrar.Try(c.Context, func(ctx context.Context) ([]lbRow, error) { return s.balancers(ctx, svcs) })
			if rows == nil {
				return err
			}
			cells := make([][]string, len(rows))
			for i, r := range rows {
				seen, live := "-", "no"
				if r.SeenMS >= 0 {
					seen = (time.Duration(r.SeenMS) * time.Millisecond).String()
				}
				switch {
				case r.Live && r.Double:
					live = "double"
				case r.Live:
					live = "yes"
				}
				cells[i] = []string{r.Balancer, string(r.Service), strconv.FormatInt(r.Applied, 10), strconv.FormatInt(r.Version, 10), strconv.FormatInt(r.Behind, 10), seen, live}
			}
			return errors.Join(err, s.table(rows, "BALANCER SERVICE APPLIED VERSION BEHIND SEEN LIVE", cells))
		},
	}
}

// balancers returns the rows that could be read, or none, and why not all.
func (s *session) balancers(ctx context.Context, svcs []registrar.Service) ([]lbRow, error) {
	if len(svcs) == 0 {
		var err error
		if svcs, _, err = s.store.Services(ctx); err != nil {
			return nil, err
		}
	}
	slices.Sort(svcs)
	rows := []lbRow{}
	var errs []error
	for _, svc := range svcs {
		acks, err := s.store.Acks(ctx, svc)
		switch {
		case err != nil && s.store.Cluster():
			errs = append(errs, err)
			continue
		case err != nil:
			return nil, err
		}
		for _, b := range acks.Balancers {
			r := lbRow{Balancer: b.ID, Service: svc, Applied: b.Applied, Version: acks.Token.Version, SeenMS: -1, Live: b.Live, Double: b.Double}
			r.Behind = max(0, r.Version-r.Applied)
			if b.Seen > 0 {
				r.SeenMS = max(0, acks.Now-b.Seen)
			}
			rows = append(rows, r)
		}
	}
	return rows, errors.Join(errs...)
}
