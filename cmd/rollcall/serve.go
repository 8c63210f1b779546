//go:build !sidecar

package main

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/urfave/cli/v2"

	"rollcall/notifier/httpapi"
	"rollcall/registrar"
)

// servePool is the connections to Redis: one for the watcher, one for who has
// applied what, the rest for writes that wait.
const servePool = 6

// serveConnections are open at most: streams and long polls last, so there is room for
// all of them and for some more.
const serveConnections, serveShare = httpapi.MaxStreams + httpapi.MaxWaits + 300, 2

func serveCommand() *cli.Command {
	return &cli.Command{
		Name: "serve", Usage: "serve the page and the HTTP API; read-only without --token-file",
		Flags: redisFlags(append(httpFlags(),
			&cli.StringFlag{Name: "listen", Value: "127.0.0.1:8300", EnvVars: env("listen"), Usage: "`ADDR:PORT` of the page and the API"},
			&cli.StringFlag{Name: "token-file", EnvVars: env("token-file"), Usage: fmt.Sprintf("`FILE` of the token that allows writes, %d characters or more; it is read at every write", httpapi.MinToken)},
			&cli.StringSliceFlag{Name: "host", EnvVars: env("host"), Usage: "`NAME`, without a port, by which browsers may ask, beside localhost and IP addresses: that of a proxy in front, say; * takes every name; repeatable"},
		)...),
		Action: func(c *cli.Context) error {
			if _, err := args(c, "", 0); err != nil {
				return err
			}
			addr, err := netip.ParseAddrPort(c.String("listen"))
			if err != nil {
				return usage("--listen %q: want an address and a port, such as 127.0.0.1:8300", c.String("listen"))
			}
			s, err := begin(c, servePool)
			if err != nil {
				return err
			}
			defer s.close()
			notify := newSystemd(s.log)
			defer notify.close()
			defer notify.stopping(c.Context)()
			cfg := httpapi.Config{
				Namespace: c.String("namespace"), Version: version(), Hosts: c.StringSlice("host"),
				Ready: func() { notify.useful("serving") },
				Status: func(o registrar.Overview, n httpapi.Counts) httpapi.Status {
					doc := newStatus(o)
					doc.Registry.Namespace, doc.Registry.Services = c.String("namespace"), n.Services
					doc.Registry.Instances, doc.Registry.Stale = n.Instances, n.Stale
					doc.Overrule += sameRegistry(c)
					doc.judge()
					return httpapi.Status{Healthy: doc.Healthy, Document: doc}
				},
			}
			if file := c.String("token-file"); file != "" {
				cfg.Token = func() (string, error) { return secretFile(file) }
			}
			defer s.hangups(c, func() error {
				if cfg.Token == nil {
					return nil
				}
				return httpapi.CheckToken(cfg.Token())
			})()
			srv, err := httpapi.New(cfg, s.store, s.log)
			if err != nil {
				return usageError{err}
			}
			mon, err := newMonitor(c, s.log)
			if err != nil {
				return err
			}
			if mon != nil {
				mon.serves(srv)
			}
			stop, err := mon.serve(c.Context)
			if err != nil {
				return err
			}
			defer stop()
			var lc net.ListenConfig
			l, err := lc.Listen(c.Context, "tcp", addr.String())
			if err != nil {
				return fmt.Errorf("--listen: %w", err)
			}
			s.log.Info().Stringer("addr", l.Addr()).Bool("writes", cfg.Token != nil).Msg("serving the page and the API")
			return srv.Serve(c.Context, boundConnections(l, serveConnections, serveShare, s.log))
		},
	}
}
