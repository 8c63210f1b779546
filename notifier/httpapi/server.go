package httpapi

import (
	"context"
	"crypto/tls"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	stdlog "log"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"rollcall/notifier"
	"rollcall/registrar"
)

// Bounds.
const (
	// MaxWait is the longest that a request waits for a change or a balancer.
	MaxWait = 60 * time.Second
	// MaxStreams is how many streams are open at most, and MaxWaits how many
	// requests wait.
	MaxStreams = 200
	MaxWaits   = 1000
	// maxReads is how many requests have Redis read for them at the same time:
	// the survey, the log and the writes need connections too.
	maxReads = 2

	maxBody       = 64 << 10
	maxHeader     = 16 << 10
	headerTimeout = 5 * time.Second
	bodyTimeout   = 10 * time.Second
	writeTimeout  = 10 * time.Second // of one answer, or of one piece of a stream
	idleTimeout   = 2 * time.Minute
	closeTimeout  = 2 * time.Second
)

// AnyHost in Config.Hosts takes every name.
const AnyHost = "*"

// lookEvery is how often Redis is asked who is at work, and so how exact the age
// of what is shown is.
const lookEvery = time.Second

//go:embed page
var files embed.FS

// Config is what a Server needs to know.
type Config struct {
	Namespace string
	Version   string // of the program
	// Tokens returns what allows writes; nil = nobody may write. It is called for every
	// write, and for each that it returns an error nobody may write.
	Tokens func() (Tokens, error)
	// TLS, if not nil, is what the server speaks TLS with; it has the certificate.
	TLS *tls.Config
	// Hosts are names, without a port, by which browsers may ask, beside
	// localhost and IP addresses; AnyHost = every name.
	Hosts []string
	// Status judges, for /v1/status.
	Status func(registrar.Overview, Counts) Status
	// Ready, if not nil, is called once, when everything has been read.
	Ready func()
}

// Server shows one register. Serve may be called once; the rest at any time,
// concurrently.
type Server struct {
	cfg     Config
	store   *registrar.Store
	log     zerolog.Logger
	watcher *notifier.Watcher
	picture *picture
	hot     chan struct{} // of capacity 1: a balancer is to be asked
	changed chan struct{} // of capacity 1: overrides are to be read, perhaps
	// rest is the least time between two reads of a service's overrides.
	rest time.Duration
	// patience is how long a reader of the stream may take nothing.
	patience time.Duration
	// bodies is how long a request's body may take.
	bodies time.Duration

	streams, waits, reads slots
	dropped               atomic.Int64
	writes                atomic.Int64
	refused               refused
}

// New checks cfg and returns a Server. It does no I/O but to read the tokens. Of
// a Cluster it cannot show anything.
func New(cfg Config, store *registrar.Store, log zerolog.Logger) (*Server, error) {
	if store.Cluster() {
		return nil, errors.New("the page shows one registry; in a Cluster each service is one")
	}
	for _, h := range cfg.Hosts {
		if h == "" || strings.ContainsAny(h, ":/@[] ") {
			return nil, fmt.Errorf("host %q: want a name without a port or a scheme, such as ops.example, or %s for every name", clip(h), AnyHost)
		}
	}
	if cfg.Tokens != nil {
		if _, err := cfg.Tokens(); err != nil {
			return nil, err
		}
	}
	s := &Server{
		cfg: cfg, store: store, log: log.With().Str("component", "serve").Logger(),
		picture: newPicture(time.Now()), hot: make(chan struct{}, 1), changed: make(chan struct{}, 1), rest: awayEvery, patience: writeTimeout, bodies: bodyTimeout,
		streams: slots{max: MaxStreams}, waits: slots{max: MaxWaits}, reads: slots{max: maxReads}, refused: refused{by: map[netip.Addr]*bucket{}},
	}
	var err error
	s.watcher, err = notifier.New(notifier.Config{Ready: func() {
		s.picture.readAll()
		if cfg.Ready != nil {
			cfg.Ready()
		}
	}}, store, log)
	return s, err
}

// Stats are what a Server has done.
type Stats struct {
	Streams       int64 // open now
	Waiting       int64 // requests, for a change
	Dropped       int64 // streams of clients that were too slow
	Writes        int64 // accepted
	RefusedTokens int64
}

// Stats returns them.
func (s *Server) Stats() Stats {
	return Stats{s.streams.used.Load(), s.waits.used.Load(), s.dropped.Load(), s.writes.Load(), s.refused.total.Load()}
}

// Watching returns how the server's watcher stands with Redis.
func (s *Server) Watching() notifier.Status { return s.watcher.Status() }

// Serve follows the register and serves it on l until ctx ends, which ends long
// polls and streams at once. It closes l and returns when everything that it
// started has ended: with nil, or with why l accepts nothing more.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	srv := &http.Server{
		Handler:           s.handler(),
		ReadHeaderTimeout: headerTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader,
		// No ReadTimeout: when it passes, it would end a long poll. guard bounds
		// the few bodies.
		BaseContext: func(net.Listener) context.Context { return ctx },
		ErrorLog:    stdlog.New(s.log, "", 0),
	}
	// A listener that bounds its connections must know which of them have a request.
	if bounded, ok := l.(interface{ Attach(*http.Server) }); ok {
		bounded.Attach(srv)
	}
	var working sync.WaitGroup
	defer working.Wait()
	working.Go(func() { _ = s.watcher.Run(ctx, s.fold) }) // it returns nil
	working.Go(func() { s.survey(ctx) })
	working.Go(func() { s.follow(ctx) })
	working.Go(func() { s.readAway(ctx) })
	working.Go(func() {
		<-ctx.Done()
		tctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		if srv.Shutdown(tctx) != nil {
			_ = srv.Close() // who still reads has had its time
		}
	})
	var err error
	if s.cfg.TLS != nil {
		srv.TLSConfig = s.cfg.TLS.Clone()
		err = srv.ServeTLS(l, "", "") // the certificate is TLSConfig's
	} else {
		err = srv.Serve(l)
	}
	stop()
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve: %w", err)
}

func (s *Server) fold(c notifier.Change) {
	s.picture.fold(c, time.Now())
	for _, wake := range []chan struct{}{s.hot, s.changed} {
		select {
		case wake <- struct{}{}:
		default: // it has been told
		}
	}
}

// survey looks at what no change announces, again and again: who is at work, who
// has applied what, heartbeats.
func (s *Server) survey(ctx context.Context) {
	wait := time.NewTimer(0)
	defer wait.Stop()
	var looked time.Time
	failures := 0
	for {
		select {
		case <-ctx.Done():
			return
		case <-wait.C:
		case <-s.hot:
		}
		if time.Since(looked) >= lookEvery {
			looked = time.Now()
			if s.look(ctx) {
				failures = 0
			} else {
				failures++
			}
		}
		next := time.Until(looked.Add(lookEvery))
		if failures == 0 {
			next = min(next, s.ask(ctx))
		}
		wait.Reset(max(next, time.Millisecond))
	}
}

// look reads who is at work, and tells whether Redis answered.
func (s *Server) look(ctx context.Context) bool {
	tctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	o, err := s.store.Overview(tctx)
	if ctx.Err() != nil {
		return false
	}
	s.picture.looked(o, s.cfg.Status, err, time.Now())
	s.picture.expire(time.Now())
	return err == nil
}

// ask reads who has applied what of the services whose time has come, has their
// heartbeats read, and returns how soon there is more to ask. A service that
// does not answer keeps what is known of it.
func (s *Server) ask(ctx context.Context) time.Duration {
	every := s.picture.pace()
	errands, next := s.picture.due(time.Now(), every)
	for _, e := range errands {
		tctx, cancel := registrar.WithTimeout(ctx)
		acks, err := s.store.Acks(tctx, e.name)
		var sights []registrar.Sight
		if err == nil {
			sights, err = s.store.Sights(tctx, e.name, acks.Live())
		}
		cancel()
		if ctx.Err() != nil {
			return next
		}
		if err != nil {
			s.log.Debug().Err(err).Msg("balancers of a service are unknown; asks again")
			continue
		}
		s.picture.acked(e.name, acks, sights, every, time.Now())
		if e.whole {
			s.watcher.Refresh(e.name)
		}
	}
	if len(errands) > 0 {
		_, next = s.picture.due(time.Now(), every)
	}
	return next
}

// follow reads the log of changes until ctx ends.
func (s *Server) follow(ctx context.Context) {
	events := s.store.EventReader(nil)
	wait := time.NewTimer(0)
	defer wait.Stop()
	begun, failures := false, 0
	for {
		select {
		case <-ctx.Done():
			return
		case <-wait.C:
		}
		// The membership before the start is recalled by who is there now.
		if !begun && !s.picture.isReady() {
			wait.Reset(logRetry)
			continue
		}
		read := events.Next
		if !begun {
			read = func(ctx context.Context) ([]registrar.Event, error) {
				ctx, cancel := registrar.WithTimeout(ctx)
				defer cancel()
				return events.Last(ctx, "", eventsRead)
			}
		}
		list, err := read(ctx)
		if ctx.Err() != nil {
			return
		}
		switch {
		case err == nil:
			begun, failures = true, 0
			s.picture.happened(list)
			wait.Reset(0)
		case errors.Is(err, registrar.ErrOtherHistory):
			wait.Reset(0) // it goes on with all that is kept
		default:
			if failures == 0 {
				s.log.Warn().Err(err).Msg("cannot read the log of changes; tries again")
			}
			failures++
			wait.Reset(registrar.Backoff(failures, lastLogRetry))
		}
	}
}

const (
	// eventsRead is how many events are read at the start: for the membership
	// before it.
	eventsRead   = 2000
	logRetry     = 50 * time.Millisecond
	lastLogRetry = 5 * time.Second
)

// slots bound how many do something at the same time.
type slots struct {
	max  int64
	used atomic.Int64
}

func (s *slots) take() bool {
	if s.used.Add(1) > s.max {
		s.used.Add(-1)
		return false
	}
	return true
}

func (s *slots) free() { s.used.Add(-1) }

// handler routes. Everything but the page is under /v1.
func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	page, err := fs.Sub(files, "page")
	if err != nil {
		panic(err) // a directory named in this package is not in this package
	}
	mux.Handle("GET /", http.FileServerFS(page))
	mux.HandleFunc("GET /v1/services", s.getServices)
	mux.HandleFunc("GET /v1/services/{service}", s.getService)
	mux.HandleFunc("GET /v1/balancers", s.getBalancers)
	mux.HandleFunc("GET /v1/status", s.getStatus)
	mux.HandleFunc("GET /v1/history", s.getHistory)
	mux.HandleFunc("GET /v1/events", s.getEvents)
	mux.HandleFunc("GET /v1/stream", s.getStream)
	mux.HandleFunc("GET /v1/sd/prometheus", s.getTargets)
	mux.HandleFunc("POST /v1/services/{service}/instances/{addr}/{verb}", s.postWord)
	mux.HandleFunc("DELETE /v1/services/{service}/instances/{addr}", s.deleteInstance)
	return s.guard(mux)
}

// policy lets the page load its own files and nothing else, be framed by nobody,
// and make no element of a string, whoever wrote it.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"

// guard sets what every answer has, bounds the reading of a body, and refuses a
// name that is not this server's: another site's name may have been pointed
// here, to read with a visitor's browser what only that can reach. Nobody can
// point an address or localhost elsewhere, whatever this server listens on.
func (s *Server) guard(next http.Handler) http.Handler {
	hosts := map[string]bool{"localhost": true}
	for _, h := range s.cfg.Hosts {
		hosts[strings.ToLower(h)] = true
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", policy)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cache-Control", "no-cache")
		// net/http reads what a handler has left of a body, for as long as that
		// takes.
		if r.ContentLength != 0 {
			if err := http.NewResponseController(w).SetReadDeadline(time.Now().Add(s.bodies)); err != nil {
				fail(w, http.StatusInternalServerError, err)
				return
			}
		}
		if name := strings.ToLower(hostname(r.Host)); !hosts[AnyHost] && !hosts[name] && !literal(name) {
			fail(w, http.StatusMisdirectedRequest, fmt.Errorf("this server is not %q; start it with --host %s if it is", clip(name), clip(name)))
			return
		}
		next.ServeHTTP(w, r)
	})
}

// hostname is a Host header without its port.
func hostname(host string) string {
	if name, _, err := net.SplitHostPort(host); err == nil {
		return name
	}
	if len(host) > 1 && host[0] == '[' && host[len(host)-1] == ']' {
		return host[1 : len(host)-1]
	}
	return host
}

// literal tells whether name is an address, which nobody can point elsewhere.
func literal(name string) bool {
	_, err := netip.ParseAddr(name)
	return err == nil
}

// fail answers with why not.
func fail(w http.ResponseWriter, code int, err error) {
	answer(w, code, encode(map[string]string{"error": err.Error()}))
}

// answer writes a JSON document.
func answer(w http.ResponseWriter, code int, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	_, _ = w.Write(append(body, '\n')) // the client may have gone
}

// clip bounds what a client sent, for a line that quotes it.
func clip(s string) string {
	const limit = 80
	if len(s) > limit {
		return s[:limit] + "…"
	}
	return s
}
