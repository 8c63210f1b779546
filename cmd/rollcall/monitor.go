package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	stdlog "log"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/rs/zerolog"
	"github.com/urfave/cli/v2"
)

// httpFlags are of every daemon.
func httpFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "http", EnvVars: env("http"), Usage: "`ADDR:PORT` where /metrics, /healthz and /readyz are served, such as 127.0.0.1:9464; without it nothing is"},
		&cli.BoolFlag{Name: "pprof", EnvVars: env("pprof"), Usage: "with --http: serve /debug/pprof/ too"},
	}
}

// monitor is what a daemon's --http serves. Without the flag there is none: it
// is nil, nothing is counted, and nobody listens.
type monitor struct {
	command    string
	addr       netip.AddrPort
	pprof      bool
	log        zerolog.Logger
	collectors []prometheus.Collector
	// ready says why the daemon does not do its work now; nil = it does. Any
	// number of goroutines call it.
	ready func() error
}

// newMonitor reads the flags. It does not listen yet.
func newMonitor(c *cli.Context, log zerolog.Logger) (*monitor, error) {
	given := c.String("http")
	switch {
	case given == "" && c.Bool("pprof"):
		return nil, usage("--pprof goes with --http")
	case given == "":
		return nil, nil
	case c.Bool("once") || c.Bool("dry-run"):
		return nil, usage("--http is for a daemon, not for --once or --dry-run")
	}
	addr, err := netip.ParseAddrPort(given)
	if err != nil {
		return nil, usage("--http %q: want an address and a port, such as 127.0.0.1:9464", given)
	}
	m := &monitor{command: c.Command.Name, addr: addr, pprof: c.Bool("pprof"), log: log.With().Str("component", "http").Logger()}
	m.add(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "rollcall_build_info", Help: "1, labelled with the command that runs and the version of the binary.",
		ConstLabels: prometheus.Labels{"command": m.command, "version": version()},
	}, func() float64 { return 1 }))
	m.add(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "rollcall_ready", Help: "1 while /readyz says yes."},
		func() float64 { return number(m.ready() == nil) }))
	m.add(prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "rollcall_log_lines_dropped_total", Help: "Lines of the log that were dropped, because nobody read them in time or because they could not be written.",
	}, func() float64 { return float64(droppedLines(c)) }))
	return m, nil
}

// add has these served. It must be called before serve.
func (m *monitor) add(cs ...prometheus.Collector) { m.collectors = append(m.collectors, cs...) }

// Bounds of the server. Its longest answer is a profile of pprof; any other must have
// been read after readTimeout.
const (
	headerTimeout = 5 * time.Second
	readTimeout   = 5 * time.Second
	answerTimeout = 90 * time.Second
	idleTimeout   = 2 * time.Minute
	closeTimeout  = time.Second
	// monitorConnections are open at most. A scraper needs one or two.
	monitorConnections, monitorShare = 64, 4
)

// serve listens until stop is called, which waits for the server's end. A nil
// monitor serves nothing.
func (m *monitor) serve(ctx context.Context) (stop func(), err error) {
	if m == nil {
		return func() {}, nil
	}
	registry := prometheus.NewRegistry()
	m.add(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	for _, c := range m.collectors {
		if err := registry.Register(c); err != nil {
			return nil, fmt.Errorf("metrics: %w", err)
		}
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", m.addr.String())
	if err != nil {
		return nil, fmt.Errorf("--http: %w", err)
	}
	errlog := stdlog.New(m.log, "", 0)
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", whole(promhttp.HandlerFor(registry, promhttp.HandlerOpts{ErrorLog: errlog, MaxRequestsInFlight: 4})))
	mux.Handle("GET /healthz", whole(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { answer(w, nil) })))
	mux.Handle("GET /readyz", whole(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { answer(w, m.ready()) })))
	if m.pprof {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	srv := &http.Server{
		Handler: mux, ErrorLog: errlog, MaxHeaderBytes: 16 << 10,
		ReadHeaderTimeout: headerTimeout, ReadTimeout: headerTimeout, WriteTimeout: answerTimeout, IdleTimeout: idleTimeout,
	}
	bounded := boundConnections(l, monitorConnections, monitorShare, m.log)
	bounded.Attach(srv)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := srv.Serve(bounded); !errors.Is(err, http.ErrServerClosed) {
			m.log.Error().Err(err).Msg("nothing is served any more")
		}
	}()
	m.log.Info().Stringer("addr", l.Addr()).Bool("pprof", m.pprof).Msg("serving metrics and health")
	return func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		if srv.Shutdown(ctx) != nil {
			_ = srv.Close() // who still reads has had its time
		}
		<-ended
	}, nil
}

// whole has a handler's answer made before any of it is sent, so that a client which
// reads slowly keeps nobody else from one, and sends it within readTimeout.
func whole(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		made := &madeAnswer{header: w.Header(), code: http.StatusOK}
		h.ServeHTTP(made, r)
		// A connection that has none is as good as gone.
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(readTimeout))
		w.WriteHeader(made.code)
		_, _ = w.Write(made.body.Bytes()) // who does not read it has had its time
	})
}

// madeAnswer is a http.ResponseWriter.
type madeAnswer struct {
	header http.Header
	code   int
	body   bytes.Buffer
}

func (a *madeAnswer) Header() http.Header         { return a.header }
func (a *madeAnswer) WriteHeader(code int)        { a.code = code }
func (a *madeAnswer) Write(b []byte) (int, error) { return a.body.Write(b) }

// answer says in one line that all is well, or what is not.
func answer(w http.ResponseWriter, err error) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if err != nil {
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprintln(w, plain(err.Error()))
		return
	}
	fmt.Fprintln(w, "ok")
}

func number(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}
