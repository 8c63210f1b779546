//go:build !sidecar

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/urfave/cli/v2"
)

// demoServiceCommand is what the demo registers: a small HTTP service that
// answers with its name and its address. It is a process of its own, so that it
// can be killed.
func demoServiceCommand() *cli.Command {
	return &cli.Command{
		Name: "demo-service", Usage: "the HTTP service of the demo, until SIGTERM", Hidden: true,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "name", Value: "web", Usage: "`NAME` to answer with"},
			&cli.StringFlag{Name: "listen", Value: "127.0.0.1:8080", Usage: "`ADDR:PORT` to listen on"},
			&cli.DurationFlag{Name: "work", Value: 5 * time.Millisecond, Usage: "how long an answer takes"},
		},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usage("unexpected argument %q", c.Args().First())
			}
			l, err := net.Listen("tcp", c.String("listen"))
			if err != nil {
				return err
			}
			return serveDemo(c.Context, l, demoHandler(c.String("name"), l.Addr(), c.Duration("work")))
		},
	}
}

// demoHandler answers with a name and an address, after some work.
func demoHandler(name string, addr net.Addr, work time.Duration) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-time.After(work):
			fmt.Fprintln(w, name, addr)
		case <-r.Context().Done():
		}
	})
	return mux
}

// serveDemo answers until ctx ends, and then what is still in flight.
func serveDemo(ctx context.Context, l net.Listener, h http.Handler) error {
	server := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second}
	stopped := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		stopped <- server.Shutdown(ctx)
	})
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		stop()
		return err
	}
	return <-stopped
}
