package main

import (
	"errors"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"rollcall/registrar"
)

func registerCommand() *cli.Command {
	return &cli.Command{
		Name:  "register",
		Usage: "beat for one instance until SIGTERM, and then leave",
		Flags: redisFlags(
			&cli.StringFlag{Name: "service", EnvVars: env("service"), Usage: "`NAME` of the service"},
			&cli.StringFlag{Name: "addr", EnvVars: env("addr"), Usage: "`HOST:PORT` that balancers can reach; a name is resolved once"},
			&cli.IntFlag{Name: "weight", Value: registrar.DefaultWeight, EnvVars: env("weight"), Usage: "share of the traffic, 0 to 256"},
			&cli.StringSliceFlag{Name: "tag", EnvVars: env("tag"), Usage: "`KEY=VALUE` kept with the instance; repeatable"},
			&cli.StringFlag{Name: "zone", EnvVars: env("zone"), Usage: "`NAME` of where it runs"},
			&cli.DurationFlag{Name: "interval", EnvVars: env("interval"), DefaultText: "the registry's own, 5s",
				Usage: "between two heartbeats; at most a third of the registry's TTL"},
			&cli.DurationFlag{Name: "drain-wait", Value: registrar.DefaultDrainWait, EnvVars: env("drain-wait"),
				Usage: "longest wait, on SIGTERM, until every live balancer sends no more requests; a second SIGTERM ends it"},
		),
		Action: func(c *cli.Context) error {
			cfg, err := beaterConfig(c)
			if err != nil {
				return usageError{err}
			}
			s, err := begin(c, 1)
			if err != nil {
				return err
			}
			defer s.close()
			hurry, stop := secondSignal()
			defer stop()
			cfg.Hurry = hurry
			b, err := registrar.NewBeater(cfg, s.store, s.log)
			if err != nil {
				return usageError{err}
			}
			s.log.Info().Str("service", string(cfg.Service)).Stringer("addr", cfg.Addr).Str("given", c.String("addr")).Msg("registering")
			err = b.Run(c.Context)
			if errors.Is(err, registrar.ErrInterval) {
				return usageError{err}
			}
			return err
		},
	}
}

// secondSignal returns a channel that is closed at the second SIGINT or SIGTERM:
// the first one ends the command's context, and the third one the process. stop
// gives the signals back.
func secondSignal() (second <-chan struct{}, stop func()) {
	signals, closed, done := make(chan os.Signal, 2), make(chan struct{}), make(chan struct{})
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	var waiting sync.WaitGroup
	waiting.Go(func() {
		defer signal.Stop(signals)
		for range 2 {
			select {
			case <-signals:
			case <-done:
				return
			}
		}
		close(closed)
	})
	return closed, func() { close(done); waiting.Wait() }
}

func beaterConfig(c *cli.Context) (registrar.BeaterConfig, error) {
	if c.Args().Present() {
		return registrar.BeaterConfig{}, usage("unexpected argument %q", c.Args().First())
	}
	svc, err := registrar.ParseService(c.String("service"))
	if err != nil {
		return registrar.BeaterConfig{}, err
	}
	addr, err := registrar.ResolveAddr(c.Context, c.String("addr"))
	if err != nil {
		return registrar.BeaterConfig{}, err
	}
	if err := registrar.CheckWeight(c.Int("weight")); err != nil {
		return registrar.BeaterConfig{}, err
	}
	interval := c.Duration("interval")
	if c.IsSet("interval") && interval < 10*time.Millisecond {
		return registrar.BeaterConfig{}, usage("--interval %v: want 10ms or more", interval)
	}
	tags := map[string]string{}
	for _, t := range c.StringSlice("tag") {
		k, v, ok := strings.Cut(t, "=")
		if !ok || k == "" {
			return registrar.BeaterConfig{}, usage("--tag %q: want KEY=VALUE", t)
		}
		tags[k] = v
	}
	return registrar.BeaterConfig{
		Service: svc, Addr: addr, Weight: c.Int("weight"), Zone: c.String("zone"), Tags: tags, Interval: interval, DrainWait: c.Duration("drain-wait"),
	}, nil
}
