//go:build !sidecar

package main

import (
	"context"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"github.com/urfave/cli/v2"

	"rollcall/registrar"
	"rollcall/registrar/docker"
)

// dockerPool is for the batch of heartbeats, beside what drains and leaves.
const dockerPool = 4

func dockerCommand() *cli.Command {
	return &cli.Command{
		Name: "docker", Usage: "register the containers of a Docker Engine, by their labels and their health, until SIGTERM",
		Flags: redisFlags(append(httpFlags(),
			&cli.StringFlag{Name: "engine", EnvVars: env("engine"), DefaultText: "DOCKER_HOST's, or unix:///var/run/docker.sock", Usage: "the Engine's `URL`"},
			&cli.StringFlag{Name: "advertise", EnvVars: env("advertise"), Usage: "`HOST` that balancers can reach, of ports that are published on every address; without it the address that connections to Redis have is chosen, else that of the default route"},
			&cli.StringFlag{Name: "interface", EnvVars: env("interface"), Usage: "`NAME` of the network interface whose address that is, also when it changes"},
			&cli.BoolFlag{Name: "internal", EnvVars: env("internal"), Usage: "register containers at their own addresses and ports, published or not"},
			&cli.StringFlag{Name: "network", EnvVars: env("network"), DefaultText: "the container's first by name", Usage: "with --internal: `NAME` of the network of these addresses; who is not in it is not registered"},
			&cli.BoolFlag{Name: "explicit", EnvVars: env("explicit"), Usage: "register only what has a SERVICE_NAME"},
			&cli.StringSliceFlag{Name: "service", EnvVars: env("service"), DefaultText: "every one", Usage: "`NAME` of a service that containers may be of; repeatable. Others are not registered"},
			&cli.StringFlag{Name: "zone", EnvVars: env("zone"), Usage: "`NAME` of where the containers run"},
			&cli.DurationFlag{Name: "drain-wait", Value: registrar.DefaultDrainWait, EnvVars: env("drain-wait"),
				Usage: "longest time between a container's being told to stop and its leaving; it leaves when it ends, at the latest"},
			leaveWaitFlag(),
			&cli.BoolFlag{Name: "leave", EnvVars: env("leave"), Usage: "on SIGTERM, have all containers drain and leave; without it, and without a SIGUSR2 before, they stay registered for the TTL, in which another agent goes on"},
			&cli.StringFlag{Name: "id", EnvVars: env("id"), DefaultText: "the Engine's id and name, and the address", Usage: "`NAME` of this host's agent, which no other host's has: where the Engine may not be asked, or hosts have one name"},
		)...),
		Action: func(c *cli.Context) error {
			if _, err := args(c, "", 0); err != nil {
				return err
			}
			trim()
			cfg := docker.Config{
				Engine: c.String("engine"), Internal: c.Bool("internal"), Network: c.String("network"), Explicit: c.Bool("explicit"),
				Zone: c.String("zone"), DrainWait: c.Duration("drain-wait"), LeaveWait: c.Duration("leave-wait"), Leave: c.Bool("leave"), ID: c.String("id"),
			}
			for _, name := range c.StringSlice("service") {
				svc, err := registrar.ParseService(name)
				if err != nil {
					return usage("--service: %w", err)
				}
				cfg.Services = append(cfg.Services, svc)
			}
			where, err := advertised(c)
			if err != nil {
				return usageError{err}
			}
			cfg.Advertise = where.addr.Addr()
			s, err := begin(c, dockerPool)
			if err != nil {
				return err
			}
			defer s.close()
			defer s.hangups(c)()
			notify := newSystemd(s.log)
			defer notify.close()
			cfg.Tell = func(why error) {
				if why != nil {
					notify.status(why.Error())
				} else {
					notify.useful("following the engine")
				}
			}
			mon, err := newMonitor(c, s.log)
			if err != nil {
				return err
			}
			var agent *docker.Agent
			if mon != nil {
				cfg.Beaten = mon.docker(func() docker.Status { return agent.Status() })
				cfg.Unknown = mon.unseen()
			}
			if agent, err = docker.New(cfg, s.store, s.log); err != nil {
				return usageError{err}
			}
			defer agent.Close()
			ctx, unhear := leaveOn(c.Context, syscall.SIGUSR2, agent)
			defer unhear()
			stop, err := mon.serve(c.Context)
			if err != nil {
				return err
			}
			defer stop()
			s.log.Info().Stringer("advertise", cfg.Advertise).Bool("internal", cfg.Internal).EmbedObject(where.choice).Msg("registering containers")
			defer where.follow(c.Context, s.log, agent.Advertise)()
			defer notify.stopping(c.Context)()
			return agent.Run(ctx)
		},
	}
}

// leaveOn has the agent's containers leave when it ends, if sig comes before. sig ends
// nothing: it returns a context that ends with ctx, when a sig that came before that has
// been heard. stop must be called in the end.
func leaveOn(ctx context.Context, sig os.Signal, agent *docker.Agent) (until context.Context, stop func()) {
	heard := make(chan os.Signal, 1)
	signal.Notify(heard, sig)
	ending, stopListening := context.WithCancel(ctx)
	until, end := context.WithCancel(context.WithoutCancel(ctx))
	var listening sync.WaitGroup
	listening.Go(func() {
		defer end()
		for {
			select {
			case <-heard:
				agent.LeaveAtEnd()
				continue
			case <-ending.Done():
			}
			select {
			case <-heard:
				agent.LeaveAtEnd()
			default:
			}
			return
		}
	})
	return until, func() {
		signal.Stop(heard)
		stopListening()
		listening.Wait()
	}
}

// advertised returns the host's address, or none if containers have their own.
func advertised(c *cli.Context) (*located, error) {
	given := c.String("advertise")
	if c.Bool("internal") {
		if given != "" || c.String("interface") != "" {
			return nil, usage("--advertise and --interface are the host's address, and --internal wants the containers'")
		}
		return &located{}, nil
	}
	if given != "" {
		if c.String("interface") != "" {
			return nil, usage("want --advertise or --interface")
		}
		ip, err := resolveHost(c.Context, given)
		return &located{addr: netip.AddrPortFrom(ip, 0)}, err
	}
	return chooseLocal(c, 0)
}

// resolveHost is registrar.ResolveAddr for an address without a port.
func resolveHost(ctx context.Context, host string) (netip.Addr, error) {
	addr, err := registrar.ResolveAddr(ctx, net.JoinHostPort(strings.Trim(host, "[]"), "1"))
	return addr.Addr(), err
}
