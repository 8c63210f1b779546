// Command app is the smallest app that the compose file and the tests put into
// a container: it answers every request with its host's name, says how healthy
// it is, and on SIGTERM goes on for --linger, finishes its requests and ends.
//
//	app [--addr :8080] [--linger 0s]
//	app check    exits with 0 if the one beside it is healthy
//
// POST /sick and POST /well change its health, for who tests; POST /hang has check
// wait for 3 s in vain.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "app:", err)
		os.Exit(1)
	}
}

func run() error {
	addr := flag.String("addr", ":8080", "where to listen")
	linger := flag.Duration("linger", 0, "how long to go on after SIGTERM")
	flag.Parse()
	if flag.Arg(0) == "check" {
		return check("http://127.0.0.1:8080/healthz")
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	var status atomic.Int32
	status.Store(http.StatusOK)
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, name) })
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, r *http.Request) {
		if s := int(status.Load()); s != 0 {
			w.WriteHeader(s)
			return
		}
		<-r.Context().Done()
	})
	for path, s := range map[string]int32{"POST /sick": http.StatusServiceUnavailable, "POST /well": http.StatusOK, "POST /hang": 0} {
		mux.HandleFunc(path, func(http.ResponseWriter, *http.Request) { status.Store(s) })
	}
	srv := &http.Server{Addr: *addr, Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	ended := make(chan error, 1)
	go func() { ended <- srv.ListenAndServe() }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	select {
	case <-time.After(*linger):
	case err := <-ended:
		return err
	}
	tctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err := srv.Shutdown(tctx); err != nil {
		return err
	}
	if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func check(url string) error {
	c := http.Client{Timeout: 3 * time.Second}
	r, err := c.Get(url)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusOK {
		return errors.New(r.Status)
	}
	return nil
}
