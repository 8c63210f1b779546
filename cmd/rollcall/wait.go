//go:build !sidecar

package main

import (
	"cmp"
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

func noBalancerFlag() cli.Flag {
	return &cli.BoolFlag{Name: "no-balancer", Usage: "it is enough if no balancer lives that follows the service"}
}

func waitFlags() []cli.Flag {
	return []cli.Flag{
		&cli.BoolFlag{Name: "wait", Usage: "until every live balancer has applied it, and none refuses, lacks or has undone an instance of the service"},
		timeoutFlag(), noBalancerFlag(),
	}
}

// waitApplied waits until every live balancer has applied version, and refuses, lacks or
// has undone nothing of the service.
func waitApplied(c *cli.Context, s *session, svc registrar.Service, version int64) (live int, err error) {
	v, err := waitServed(c, s, svc, registrar.Wanted{Ready: -1, Version: version})
	return len(v.Acks.Live()), err
}

// waitServed waits for w, with the words of the command line's flags.
func waitServed(c *cli.Context, s *session, svc registrar.Service, w registrar.Wanted) (registrar.Served, error) {
	ctx, cancel := context.WithTimeout(c.Context, c.Duration("timeout"))
	defer cancel()
	return waitServedIn(ctx, c, s, svc, w)
}

// waitServedIn is waitServed in a ctx that ends when --timeout has passed.
func waitServedIn(ctx context.Context, c *cli.Context, s *session, svc registrar.Service, w registrar.Wanted) (registrar.Served, error) {
	w.NoBalancer, w.Absent = c.Bool("no-balancer"), c.Bool("absent")
	v, err := s.store.WaitServed(ctx, svc, w)
	return v, timedOut(c, ctx, err)
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
		Name: "wait", Usage: "wait until every live balancer serves a state of a service", ArgsUsage: "SERVICE",
		Flags: redisFlags(outputFlag(), timeoutFlag(),
			&cli.StringFlag{Name: "for", Value: "converged", EnvVars: env("for"),
				Usage: "`GOAL`: converged (all that is known now is applied, and nothing is refused, without a slot or undone), version=N (the same of a version), or ready=N (so many instances get requests from every live balancer that is to serve them)"},
			noBalancerFlag(),
			&cli.BoolFlag{Name: "absent", Usage: "it is enough if nobody has ever registered as the service"},
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
			w, err := parseGoal(c.String("for"))
			if err != nil {
				return err
			}
			s, err := begin(c, 1)
			if err != nil {
				return err
			}
			defer s.close()
			if !c.Bool("absent") {
				s.nameUnknown(c.Context, svc)
			}
			v, err := waitServed(c, s, svc, w)
			if errors.Is(err, errTimedOut) && !c.Bool("absent") && s.never(c.Context, svc) {
				err = fmt.Errorf("%w%s", err, s.meant(c.Context, svc)) // whoever reads the last line alone
			}
			if err != nil {
				return err
			}
			o := struct {
				Service   registrar.Service `json:"service"`
				Version   int64             `json:"version"`
				Balancers int               `json:"balancers"`
			}{svc, cmp.Or(w.Version, v.Token.Version), len(v.Acks.Live())}
			return s.line(o, "%s: version %d, applied by %d balancers", svc, o.Version, o.Balancers)
		},
	}
}

// parseGoal reads --for.
func parseGoal(s string) (registrar.Wanted, error) {
	name, number, numbered := strings.Cut(s, "=")
	n, err := strconv.Atoi(number)
	switch {
	case s == "converged":
		return registrar.Wanted{Ready: -1}, nil
	case !numbered || err != nil || n < 0 || n > registrar.MaxVersion:
	case name == "version":
		return registrar.Wanted{Ready: -1, Version: int64(n)}, nil
	case name == "ready":
		return registrar.Wanted{Ready: n}, nil
	}
	return registrar.Wanted{}, usage("--for %q: want converged, ready=N or version=N", s)
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
			r.Behind = registrar.Lag(r.Version, r.Applied)
			if b.Seen > 0 {
				r.SeenMS = max(0, acks.Now-b.Seen)
			}
			rows = append(rows, r)
		}
	}
	return rows, errors.Join(errs...)
}
