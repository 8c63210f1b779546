//go:build !sidecar

package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"

	"github.com/redis/go-redis/v9"
	"github.com/urfave/cli/v2"

	"rollcall/reaper"
	"rollcall/registrar"
)

func reapCommand() *cli.Command {
	return &cli.Command{
		Name: "reap", Usage: "take out who stopped answering, until SIGTERM; run two or more",
		Flags: redisFlags(append(httpFlags(), outputFlag(),
			&cli.DurationFlag{Name: "ttl", Value: registrar.DefaultTTL, EnvVars: env("ttl"), Usage: "after which a silent instance is dead; the same for every reaper"},
			&cli.DurationFlag{Name: "heartbeat", EnvVars: env("heartbeat"), DefaultText: "a third of the TTL", Usage: "what instances without --interval beat at; the same for every reaper"},
			&cli.DurationFlag{Name: "interval", Value: reaper.DefaultSweep, EnvVars: env("interval"), Usage: "longest time between two sweeps"},
			&cli.StringFlag{Name: "canary-redis", EnvVars: env("canary-redis"), DefaultText: "the same as --redis",
				Usage: "`URL` by which the reaper beats as an instance would, on a new connection each time; with an instance's user, password from ROLLCALL_CANARY_REDIS_PASSWORD or its _FILE"},
			&cli.BoolFlag{Name: "set-ttl", Usage: "write this TTL and heartbeat to the registry instead of refusing to start if it has others"},
			&cli.BoolFlag{Name: "once", Usage: "wait for proof that Redis is healthy, sweep once, print what went, and end"},
			&cli.BoolFlag{Name: "force", Usage: "with --once: sweep without proof and without protection"},
		)...),
		Action: func(c *cli.Context) error {
			if _, err := args(c, "", 0); err != nil {
				return err
			}
			if c.Bool("force") && !c.Bool("once") {
				return usage("--force goes with --once")
			}
			cfg := reaper.Config{
				ID: reaperID(), TTL: c.Duration("ttl"), Interval: c.Duration("heartbeat"), Sweep: c.Duration("interval"), SetTTL: c.Bool("set-ttl"),
			}
			if cfg.Interval == 0 {
				cfg.Interval = reaper.DefaultInterval(cfg.TTL)
			}
			s, err := begin(c, reaperPool)
			if err != nil {
				return err
			}
			defer s.close()
			canary, err := newCanary(c, s)
			if err != nil {
				return err
			}
			if c.String("canary-redis") != "" {
				warnPasswords(c, "canary-redis", s.log)
			}
			notify := newSystemd(s.log)
			defer notify.close()
			cfg.Tell = func(st registrar.ReaperStatus) {
				if st.Armed {
					notify.useful("armed")
				} else {
					notify.status("not armed: " + st.Cause)
				}
			}
			mon, err := newMonitor(c, s.log)
			if err != nil {
				return err
			}
			r, err := newReaping(cfg, s, canary, mon)
			if err != nil {
				return usageError{err}
			}
			if c.Bool("once") {
				err = reapOnce(c, r, s.printer)
			} else {
				var stop func()
				if stop, err = mon.serve(c.Context); err != nil {
					return err
				}
				defer stop()
				defer s.hangups(c, func() error {
					if c.String("canary-redis") == "" {
						return nil
					}
					return readable(c, "canary-redis")
				})()
				s.log.Info().Str("reaper", cfg.ID).Dur("ttl", cfg.TTL).Dur("heartbeat", cfg.Interval).Msg("reaper starts")
				defer notify.stopping(c.Context)()
				err = r.Run(c.Context)
			}
			if errors.Is(err, reaper.ErrConfig) {
				return usageError{err}
			}
			return err
		},
	}
}

// reaperPool is for the services of a Cluster's node, which are reaped at the
// same time; a single reaper takes one connection of it.
const reaperPool = 8

// reaping is a *reaper.Reaper or a *reaper.Cluster.
type reaping interface {
	Run(ctx context.Context) error
	Once(ctx context.Context, force bool) (reaper.Report, error)
}

// newReaping returns the reaper of a registry, or the reapers of a Cluster's,
// watched by mon if there is one.
func newReaping(cfg reaper.Config, s *session, canary func(registrar.Service) reaper.Canary, mon *monitor) (reaping, error) {
	var one *reaper.Reaper
	var many *reaper.Cluster
	var err error
	wrap := func(_ registrar.Service, store reaper.Store, canary reaper.Canary) (reaper.Store, reaper.Canary) {
		return store, canary
	}
	if !s.store.Cluster() {
		if mon != nil {
			wrap = mon.reaper(&cfg, func() (map[registrar.Service]registrar.ReaperStatus, error) {
				return map[registrar.Service]registrar.ReaperStatus{"": one.Status()}, nil
			})
		}
		store, canary := wrap("", s.store, canary(""))
		one, err = reaper.New(cfg, store, canary, s.log)
		return one, err
	}
	if mon != nil {
		wrap = mon.reaper(&cfg, func() (map[registrar.Service]registrar.ReaperStatus, error) {
			of, listed := many.Status()
			if !listed {
				return nil, errors.New("not armed: the services could not be listed yet")
			}
			return of, nil
		})
	}
	many, err = reaper.NewCluster(cfg, s.store, func(svc registrar.Service) (reaper.Store, reaper.Canary) {
		return wrap(svc, s.store.Of(svc), canary(svc))
	}, s.log)
	return many, err
}

// newCanary returns what makes a reaper's canary; outside of a Cluster, whatever
// the service. A URL that is none is an error now and not at the first beat.
func newCanary(c *cli.Context, s *session) (func(registrar.Service) reaper.Canary, error) {
	flag, store := "redis", s.store
	if c.String("canary-redis") != "" {
		flag = "canary-redis"
	}
	rdb, err := open(c, flag, 1, nil)
	if err != nil {
		return nil, err
	}
	_ = rdb.Close() // it was never used
	if _, same := rdb.(*redis.ClusterClient); same != store.Cluster() {
		return nil, usage("--canary-redis and --redis: want both to name a Cluster, or neither")
	}
	connect := func(context.Context, registrar.Service) (redis.UniversalClient, error) {
		return open(c, flag, 1, s.follower) // where the pulses go
	}
	if store.Cluster() {
		connect = func(ctx context.Context, svc registrar.Service) (redis.UniversalClient, error) {
			// A client of its own for the whole Cluster would first ask any node
			// for the map: one that hangs would silence the canaries of all.
			node, err := store.Node(ctx, svc)
			if err != nil {
				return nil, err
			}
			a, err := access(c, flag)
			if err != nil {
				return nil, err
			}
			a.Follow = s.follower
			return a.OpenNode(c.String(flag), node, 1)
		}
	}
	return func(svc registrar.Service) reaper.Canary {
		return func(ctx context.Context) error {
			rdb, err := connect(ctx, svc)
			if err != nil {
				return err
			}
			defer rdb.Close()
			return store.Of(svc).On(rdb).Canary(ctx)
		}
	}, nil
}

func reapOnce(c *cli.Context, r reaping, p printer) error {
	report, err := r.Once(c.Context, c.Bool("force"))
	if errors.Is(err, reaper.ErrConfig) {
		return err // before anybody was looked at
	}
	type row struct {
		Service registrar.Service `json:"service"`
		Addr    string            `json:"addr"`
	}
	rows, cells := []row{}, [][]string{}
	for _, removal := range report.Removed {
		for _, a := range removal.Addrs {
			rows = append(rows, row{removal.Service, a})
			cells = append(cells, []string{string(removal.Service), a})
		}
	}
	return errors.Join(err, p.table(rows, "SERVICE REMOVED", cells))
}

// reaperID is new in every process: a reaper's pulse must be its own.
func reaperID() string {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	return fmt.Sprintf("%s-%d-%s", host, os.Getpid(), rand.Text()[:6])
}
