package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/rs/zerolog"
	"github.com/urfave/cli/v2"

	"rollcall/registrar"
	"rollcall/registrar/child"
	"rollcall/registrar/health"
)

func registerCommand() *cli.Command {
	return &cli.Command{
		Name:      "register",
		Usage:     "beat for one instance until SIGTERM, and then leave; or for a command, around which it runs",
		ArgsUsage: "[-- COMMAND ARG...]",
		Description: "A service has at most 20000 instances, and a registry at most 20000 services, unless max_instances\n" +
			"or max_services in the hash rollcall:config say otherwise. One too many is not registered, says so once,\n" +
			"and tries again at every heartbeat. Those that are registered stay so.",
		Flags: redisFlags(append(httpFlags(),
			&cli.StringFlag{Name: "service", EnvVars: env("service"), Usage: "`NAME` of the service"},
			&cli.StringFlag{Name: "addr", EnvVars: env("addr"), Usage: "`HOST:PORT` that balancers can reach; a name is resolved once; of :PORT the host is chosen and printed: the address that connections to Redis have, else that of the default route"},
			&cli.StringFlag{Name: "advertise", EnvVars: env("advertise"), Usage: "`HOST[:PORT]` in the place of --addr's own, as behind a port mapping"},
			&cli.StringFlag{Name: "interface", EnvVars: env("interface"), Usage: "`NAME` of the network interface whose address is the host of --addr :PORT, and is followed when it changes"},
			&cli.IntFlag{Name: "weight", Value: registrar.DefaultWeight, EnvVars: env("weight"), Usage: "share of the traffic, 0 to 256"},
			&cli.StringSliceFlag{Name: "tag", EnvVars: env("tag"), Usage: "`KEY=VALUE` kept with the instance, at most 63 and 255 bytes; repeatable, all metadata at most 4096"},
			&cli.StringFlag{Name: "zone", EnvVars: env("zone"), Usage: "`NAME` of where it runs, at most 63 bytes"},
			&cli.DurationFlag{Name: "interval", EnvVars: env("interval"), DefaultText: "the registry's own, 5s",
				Usage: "between two heartbeats; at most a third of the registry's TTL"},
			&cli.DurationFlag{Name: "drain-wait", Value: registrar.DefaultDrainWait, EnvVars: env("drain-wait"),
				Usage: "longest wait, on SIGTERM, until every live balancer sends no more requests; a second SIGTERM ends it"},
			leaveWaitFlag(),
			&cli.DurationFlag{Name: "stop-timeout", Value: 10 * time.Second, EnvVars: env("stop-timeout"),
				Usage: "longest wait for the command after its SIGTERM; then, or at a further SIGTERM, it is killed"},
			&cli.StringFlag{Name: "check", EnvVars: env("check"), Usage: "registered while the `URL` answers: " + health.Forms},
			&cli.DurationFlag{Name: "check-interval", Value: health.DefaultInterval, EnvVars: env("check-interval"), Usage: "between two checks"},
			&cli.DurationFlag{Name: "check-timeout", Value: health.DefaultTimeout, EnvVars: env("check-timeout"), Usage: "of one check"},
			&cli.IntFlag{Name: "rise", Value: health.DefaultRise, EnvVars: env("rise"), Usage: "successes in a row that bring an unhealthy instance back; the first time one is enough"},
			&cli.IntFlag{Name: "fall", Value: health.DefaultFall, EnvVars: env("fall"), Usage: "misses in a row that take it out"},
			&cli.StringFlag{Name: "ready-file", EnvVars: env("ready-file"), Usage: "registered while the file `PATH` exists"},
			&cli.StringFlag{Name: "beat-file", EnvVars: env("beat-file"), Usage: "registered while the app touches the file `PATH`"},
			&cli.DurationFlag{Name: "beat-file-age", Value: 10 * time.Second, EnvVars: env("beat-file-age"), Usage: "how long a touch of --beat-file counts"},
			&cli.BoolFlag{Name: "ephemeral", EnvVars: env("ephemeral"), Usage: "the address is this instance's alone, as a container's own: what operators say of it (drain, maint, weight) is not of who comes there next"},
			idFileFlag(),
		)...),
		Action: func(c *cli.Context) error {
			trim()
			where, err := chooseAddr(c)
			if err != nil {
				return usageError{err}
			}
			cfg, err := beaterConfig(c, where.addr)
			if err != nil {
				return usageError{err}
			}
			children := child.New()
			defer children.Close()
			side := &sidecar{children: children, stopTimeout: c.Duration("stop-timeout"), hurry: make(chan struct{}), force: make(chan struct{}), flush: func() { flushLog(c) }}
			if side.command, err = command(c); err != nil {
				return usageError{err}
			}
			side.env = childEnv(os.Environ())
			s, err := begin(c, 1)
			if err != nil {
				return err
			}
			defer s.close()
			mon, err := newMonitor(c, s.log)
			if err != nil {
				return err
			}
			if side.prober, err = prober(c, side, s.log, mon); err != nil {
				return usageError{err}
			}
			if side.command == nil {
				defer s.hangups(c)()
			}
			side.log = s.log
			side.notify = newSystemd(s.log)
			defer side.notify.close()
			if err := keepPrivate(); err != nil {
				s.log.Warn().Err(err).Msg("processes of this user can read this one's passwords")
			}
			kept, others := keepID(c, &cfg, s.store, s.log)
			defer kept.Close()
			side.kept, side.others = kept, others
			defer others.start(c.Context)()
			cfg.Hurry, cfg.ForceStop, cfg.Tell = side.hurry, side.force, settled(side.notify.useful)
			side.service, side.damper = cfg.Service, registrar.NewDamper(s.store, s.log)
			if mon != nil {
				side.beats = mon.beats(cfg.Service, func() netip.AddrPort { return side.beater.addr() }, side.damper)
			}
			cfg.Beaten = func(err error) {
				side.damper.Beaten(err)
				if side.beats != nil {
					side.beats.beaten(err)
				}
				others.beaten(side.beater.addr(), err)
			}
			if side.beater, err = newMover(cfg, s.store, s.log); err != nil {
				return usageError{err}
			}
			stop, err := mon.serve(c.Context)
			if err != nil {
				return err
			}
			defer stop()
			s.log.Info().Str("service", string(cfg.Service)).Stringer("addr", cfg.Addr).Str("given", c.String("addr")).EmbedObject(where.choice).Msg("registering")
			defer where.follow(c.Context, s.log, side.beater.move)()
			err = side.run(c.Context)
			if errors.Is(err, registrar.ErrInterval) {
				return usageError{err}
			}
			return err
		},
	}
}

// command returns what follows "--", nil if there is none.
func command(c *cli.Context) ([]string, error) {
	if !c.Args().Present() {
		return nil, nil
	}
	if c.Args().First() != "--" {
		return nil, usage("unexpected argument %q; a command comes after --", c.Args().First())
	}
	argv := c.Args().Tail()
	_, err := child.Look(argv)
	return argv, err
}

// prober makes what looks after the app's health; nil if nothing shall.
func prober(c *cli.Context, side *sidecar, log zerolog.Logger, mon *monitor) (*health.Prober, error) {
	cfg := health.Config{Interval: c.Duration("check-interval"), Timeout: c.Duration("check-timeout"), Rise: c.Int("rise"), Fall: c.Int("fall")}
	ways := 0
	for _, name := range []string{"check", "ready-file", "beat-file"} {
		if c.String(name) != "" {
			ways++
		}
	}
	if ways > 1 {
		return nil, usage("want one of --check, --ready-file and --beat-file")
	}
	var check health.Check
	var err error
	switch ready, beat := c.String("ready-file"), c.String("beat-file"); {
	case c.String("check") != "":
		if check, err = health.Parse(c.String("check"), side.children, side.env); err != nil {
			return nil, err
		}
	case ready != "":
		// The app's own word: once is enough.
		if err := fileKind("ready-file", ready); err != nil {
			return nil, err
		}
		cfg = health.Config{Interval: fileInterval, Timeout: cfg.Timeout, Rise: 1, Fall: 1, Late: cfg.Fall}
		var before os.FileInfo
		if side.command != nil {
			if before, err = os.Stat(ready); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, fmt.Errorf("--ready-file: %w", err)
			}
		}
		check = health.ReadyFile(ready, before)
	case beat != "":
		age := c.Duration("beat-file-age")
		if age < 2*fileInterval {
			return nil, usage("--beat-file-age %v: want %v or more", age, 2*fileInterval)
		}
		if err := fileKind("beat-file", beat); err != nil {
			return nil, err
		}
		cfg = health.Config{Interval: fileInterval, Timeout: cfg.Timeout, Rise: 1, Fall: 1, Late: cfg.Fall}
		check = health.BeatFile(beat, age)
	default:
		return nil, nil
	}
	cfg.Log, cfg.Unknown = log, mon.unseen()
	return health.New(cfg, check)
}

// fileInterval paces the looks at a file, which cost next to nothing.
const fileInterval = 250 * time.Millisecond

func beaterConfig(c *cli.Context, addr netip.AddrPort) (registrar.BeaterConfig, error) {
	svc, err := registrar.ParseService(c.String("service"))
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
		Service: svc, Addr: addr, Weight: c.Int("weight"), Zone: c.String("zone"), Tags: tags, Interval: interval,
		DrainWait: c.Duration("drain-wait"), LeaveWait: c.Duration("leave-wait"), Own: c.Bool("ephemeral"),
	}, nil
}

// leaveWaitFlag is of whoever registers instances.
func leaveWaitFlag() cli.Flag {
	return &cli.DurationFlag{Name: "leave-wait", Value: registrar.DefaultLeaveWait, EnvVars: env("leave-wait"),
		Usage: "longest time, from the stop on, in which an instance that stops tries to tell Redis while that does not answer, as in a fail-over; also after the app has ended"}
}
