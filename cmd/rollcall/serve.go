//go:build !sidecar

package main

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/urfave/cli/v2"

	"rollcall/notifier/httpapi"
	"rollcall/registrar"
	"rollcall/registrar/regular"
)

// servePool is the connections to Redis: one for the watcher, one for who has
// applied what, one for overrides, the rest for writes that wait.
const servePool = 7

// serveConnections are open at most: streams and long polls last, so there is room for
// all of them and for some more.
const serveConnections, serveShare = httpapi.MaxStreams + httpapi.MaxWaits + 300, 2

func serveCommand() *cli.Command {
	return &cli.Command{
		Name: "serve", Usage: "serve the page and the HTTP API; read-only without --token-file",
		Flags: redisFlags(append(httpFlags(),
			&cli.StringFlag{Name: "listen", Value: "127.0.0.1:8300", EnvVars: env("listen"), Usage: "`ADDR:PORT` of the page and the API"},
			&cli.StringFlag{Name: "token-file", EnvVars: env("token-file"), Usage: fmt.Sprintf("`FILE` of what allows writes: one token, %d characters or more, or lines NAME TOKEN [SERVICE-PATTERN…]; it is read at every write", httpapi.MinToken)},
			&cli.StringFlag{Name: "tls-cert", EnvVars: env("tls-cert"), Usage: "`FILE` of the certificate, in PEM with those between it and its CA, to speak TLS with; goes with --tls-key"},
			&cli.StringFlag{Name: "tls-key", EnvVars: env("tls-key"), Usage: "`FILE` of the certificate's key, in PEM; both are looked at again at each handshake"},
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
				cfg.Tokens = func() (httpapi.Tokens, error) { return readTokens(file) }
			}
			pair, err := newKeyPair(c, s.log)
			if err != nil {
				return err
			}
			cfg.TLS = pair.config()
			defer s.hangups(c, pair.check, func() error {
				if cfg.Tokens == nil {
					return nil
				}
				_, err := cfg.Tokens()
				return err
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
			scheme := "http"
			if pair != nil {
				scheme = "https"
			}
			s.log.Info().Stringer("addr", l.Addr()).Str("url", scheme+"://"+l.Addr().String()).Bool("writes", cfg.Tokens != nil).Msg("serving the page and the API")
			if cfg.Tokens != nil && pair == nil && !addr.Addr().Unmap().IsLoopback() {
				s.log.Warn().Stringer("addr", l.Addr()).Msg("tokens can be read on their way here: give --tls-cert and --tls-key, or listen on loopback, behind a proxy that speaks TLS")
			}
			return srv.Serve(c.Context, boundConnections(l, serveConnections, serveShare, s.log))
		},
	}
}

// readTokens reads the file of --token-file.
func readTokens(file string) (httpapi.Tokens, error) {
	text, err := regular.Read(file)
	if err != nil {
		return httpapi.Tokens{}, fmt.Errorf("--token-file: %w", err)
	}
	return httpapi.ParseTokens(file, text)
}
