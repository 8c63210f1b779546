//go:build !sidecar

package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"github.com/urfave/cli/v2"

	"rollcall/lbsync"
	"rollcall/lbsync/dataplane"
	"rollcall/lbsync/haproxy"
	"rollcall/lbsync/identity"
	"rollcall/registrar"
	"rollcall/registrar/regular"
)

func lbsyncCommand() *cli.Command {
	return &cli.Command{
		Name: "lbsync", Usage: "keep the backends of one HAProxy true to their services, until SIGTERM",
		Flags: redisFlags(append(httpFlags(),
			&cli.StringFlag{Name: "socket", Value: "/run/haproxy/admin.sock", EnvVars: env("socket"), Usage: "`PATH` of HAProxy's stats socket, level admin"},
			&cli.StringFlag{Name: "dataplane", EnvVars: env("dataplane"), Usage: "`URL` of a Data Plane API, v3.3.1 or later, in the place of the socket"},
			&cli.StringFlag{Name: "dataplane-user", EnvVars: env("dataplane-user"), Usage: "`NAME` that the API knows"},
			&cli.StringFlag{Name: "dataplane-password-file", EnvVars: env("dataplane-password-file"), Usage: "`FILE` of that user's password; read again before each exchange"},
			&cli.StringFlag{Name: "dataplane-ca", EnvVars: env("dataplane-ca"), Usage: "`FILE` of the certificates that vouch for the API; without it the system's"},
			&cli.StringSliceFlag{Name: "backend", EnvVars: env("backend"), Usage: "`SERVICE=BACKEND`; repeatable"},
			&cli.StringFlag{Name: "mode", Value: string(lbsync.Auto), EnvVars: env("mode"), Usage: "auto, slots (server-template) or dynamic (add server)"},
			&cli.StringSliceFlag{Name: "allow", EnvVars: env("allow"), DefaultText: "private networks, without loopback",
				Usage: "`NETWORK` whose addresses may reach HAProxy, or BACKEND=NETWORK for that backend alone; repeatable"},
			&cli.StringFlag{Name: "server-options", EnvVars: env("server-options"), Usage: "`KEYWORDS` for dynamic servers, such as \"check inter 2s\""},
			&cli.IntFlag{Name: "min-servers", Value: lbsync.DefaultMinServers, EnvVars: env("min-servers"), Usage: "that are up; absence alone takes nobody out below it"},
			&cli.IntFlag{Name: "min-share", EnvVars: env("min-share"), Usage: "`PERCENT` of the instances that shall be ready that must be up before a drain or an absence takes one out"},
			&cli.DurationFlag{Name: "hold", Value: lbsync.DefaultHold, EnvVars: env("hold"), Usage: "how long a silent instance stays whose health check is up"},
			&cli.DurationFlag{Name: "drain-timeout", Value: lbsync.DefaultDrainTimeout, EnvVars: env("drain-timeout"), Usage: "how long a leaving server's requests may last"},
			&cli.StringSliceFlag{Name: "config", EnvVars: env("config"), Usage: "`FILE` of HAProxy's configuration, only read, at the start, for what no socket tells; repeatable, in HAProxy's order"},
			stateDirFlag(),
			&cli.StringFlag{Name: "id", EnvVars: env("id"), DefaultText: "made once, and kept", Usage: "`NAME` of this HAProxy and these backends in the registry, of no other lbsync"},
			&cli.StringFlag{Name: "state-file", EnvVars: env("state-file"), Usage: "`PATH` where the last lists are kept, for a start while Redis is away"},
			&cli.BoolFlag{Name: "once", Usage: "do what can be done now, and end"},
			&cli.BoolFlag{Name: "dry-run", Usage: "print the commands that --once would send, and end; exit code 3 if there are any"},
		)...),
		Action: func(c *cli.Context) error {
			cfg, err := syncConfig(c)
			if err != nil {
				return err
			}
			s, err := begin(c, 2+len(cfg.Backends))
			if err != nil {
				return err
			}
			defer s.close()
			s.follower.Attend() // who leaves waits for this process
			if err := readConfig(c.StringSlice("config"), cfg.Backends, s.log); err != nil {
				return err
			}
			t, err := newTarget(c, s.log)
			if err != nil {
				return err
			}
			cfg.Checks = t.Checks()
			mon, err := newMonitor(c, s.log)
			if err != nil {
				return err
			}
			if c.Bool("dry-run") {
				err = dryRun(c, cfg, t, s)
			} else {
				err = drive(c, cfg, t, s, mon)
			}
			ctx, cancel := context.WithTimeout(context.WithoutCancel(c.Context), time.Second)
			defer cancel()
			if cerr := t.Close(ctx); cerr != nil {
				s.log.Warn().Err(cerr).Msg("a command is still under way")
			}
			return err
		},
	}
}

// driver is what the socket's client and the Data Plane API's have in common.
type driver interface {
	lbsync.Balancer
	Checks() bool
	Render(backend string, op lbsync.Op) (string, error)
	Close(context.Context) error
}

// target is the HAProxy that the flags name.
type target struct {
	driver
	kind string // of the way in, as the log has it: socket or dataplane
	at   string // the socket's path, or the URL
	lock string // the path that locks are beside
}

const defaultStateDir = "/var/lib/rollcall"

func stateDirFlag() cli.Flag {
	return &cli.StringFlag{Name: "state-dir", EnvVars: env("state-dir"), DefaultText: "$STATE_DIRECTORY, or " + defaultStateDir,
		Usage: "`DIRECTORY` where lbsync keeps its id, besides beside the socket; '' = nowhere else"}
}

// places are where the id of an lbsync of this HAProxy is kept.
func places(c *cli.Context, haproxy, lock string) []identity.Place {
	dir, chosen := c.String("state-dir"), c.IsSet("state-dir")
	if !chosen {
		// systemd names several with colons between them.
		dir, _, _ = strings.Cut(os.Getenv("STATE_DIRECTORY"), ":")
		chosen = dir != ""
		dir = cmp.Or(dir, defaultStateDir)
	}
	all := []identity.Place{identity.Beside(lock)}
	if dir != "" {
		all = append([]identity.Place{identity.StateDir(dir, haproxy, chosen)}, all...)
	}
	return all
}

var dataplaneFlags = []string{"dataplane-user", "dataplane-password-file", "dataplane-ca"}

// newTarget checks the flags that say where HAProxy is. It does no I/O but to
// open the files that they name.
func newTarget(c *cli.Context, log zerolog.Logger) (*target, error) {
	if c.IsSet("dataplane") {
		return dataplaneTarget(c, log)
	}
	for _, f := range dataplaneFlags {
		if c.IsSet(f) {
			return nil, usage("--%s is for --dataplane, which is not given", f)
		}
	}
	socket := c.String("socket")
	client, err := haproxy.New(haproxy.Config{Socket: socket, ServerOptions: c.String("server-options")}, log)
	if err != nil {
		return nil, usageError{err}
	}
	at, err := filepath.Abs(socket)
	return &target{client, "socket", at, at}, err
}

func dataplaneTarget(c *cli.Context, log zerolog.Logger) (*target, error) {
	if c.IsSet("socket") {
		return nil, usage("--dataplane and --socket are two ways to one HAProxy; give one of them")
	}
	client, err := dataplane.New(dataplane.Config{
		URL: c.String("dataplane"), User: c.String("dataplane-user"), PasswordFile: c.String("dataplane-password-file"),
		CAFile: c.String("dataplane-ca"), ServerOptions: c.String("server-options"),
	}, log)
	if err != nil {
		return nil, usageError{err}
	}
	// A file that is not there is a mistake now, and an outage later.
	if err := dataplaneReadable(c); err != nil {
		return nil, err
	}
	at, err := normalURL(c.String("dataplane"))
	if err != nil {
		return nil, usageError{err}
	}
	name, err := lockName(at)
	return &target{client, "dataplane", at, filepath.Join(os.TempDir(), name)}, err
}

// dataplaneReadable opens the files that go with --dataplane, if there are any.
func dataplaneReadable(c *cli.Context) error {
	for _, f := range dataplaneFlags[1:] {
		if name := c.String(f); name != "" {
			file, err := regular.Open(name)
			if err != nil {
				return usage("--%s: %v", f, err)
			}
			_ = file.Close() // nothing was written
		}
	}
	return nil
}

// normalURL spells a URL that dataplane.New accepts in one way only, so that one
// API has one id and one lock.
func normalURL(text string) (string, error) {
	u, err := url.Parse(text) // it has lowered the scheme
	if err != nil {
		return "", err
	}
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	host := net.JoinHostPort(strings.ToLower(u.Hostname()), port)
	return u.Scheme + "://" + host + strings.TrimRight(u.EscapedPath(), "/"), nil
}

// drive keeps backends of HAProxy true, while no other lbsync does.
func drive(c *cli.Context, cfg lbsync.Config, t *target, s *session, mon *monitor) error {
	notify := newSystemd(s.log)
	defer notify.close()
	defer notify.stopping(c.Context)()
	cfg.Ready = func() { notify.useful("every backend is true to its service") }
	var bal lbsync.Balancer = t
	var driving atomic.Pointer[lbsync.Syncer] // nil while it stands by
	if mon != nil {
		metered := mon.balancer(&cfg, t)
		bal = metered
		mon.syncer(func() (st lbsync.Status, drives bool) {
			if s := driving.Load(); s != nil {
				return s.Status(), true
			}
			for _, b := range cfg.Backends {
				st.Backends = append(st.Backends, lbsync.BackendStatus{BackendConfig: b})
			}
			return st, false
		}, metered)
	}
	stop, err := mon.serve(c.Context)
	if err != nil {
		return err
	}
	defer stop()
	if !c.Bool("once") {
		defer s.hangups(c, func() error { return dataplaneReadable(c) })()
	}
	starts := s.log.Info().Str(t.kind, t.at).Strs("backends", c.StringSlice("backend")).Stringers("allow", prefixes(cfg.Allow))
	for _, b := range cfg.Backends {
		if len(b.Allow) > 0 {
			starts.Stringers("allow "+b.Backend, prefixes(b.Allow))
		}
	}
	starts.Msg("lbsync starts")
	locks, err := lock(c, cfg, t, s, notify)
	switch {
	case c.Context.Err() != nil:
		return nil
	case errors.Is(err, identity.ErrLocked):
		return err
	case err != nil:
		// Two that do the same do no harm; not driving HAProxy at all does.
		s.log.Warn().Err(err).Msg("running without a lock")
	default:
		defer func() { _ = locks.Close() }() // the process ends next
	}

	self := identity.Identify(identity.Config{HAProxy: t.at, Backends: cfg.Backends, ID: c.String("id"), Places: places(c, t.at, t.lock)}, s.log)
	s.log.Info().Str("id", self.ID).Strs("kept", self.Kept).Msg("this balancer's id")
	cfg.ID, cfg.Former = self.ID, self.Former
	cfg.Retired = func() {
		if err := self.Forgotten(); err != nil {
			s.log.Warn().Err(err).Msg("the next start will have the registry forget the same again")
		}
	}
	syncer, err := lbsync.New(cfg, bal, s.store, s.log)
	if err != nil {
		return usageError{err}
	}
	if c.Bool("once") {
		s.nameUnknown(c.Context, services(cfg.Backends)...)
		err = errors.Join(syncer.Once(c.Context), syncer.Acknowledge(c.Context, true), syncer.Publish(c.Context))
	} else {
		driving.Store(syncer)
		err = syncer.Run(c.Context)
	}
	if c.String("id") == "" && len(self.Kept) == 0 {
		// Nobody will come back by this id.
		ctx, cancel := registrar.WithTimeout(context.WithoutCancel(c.Context))
		defer cancel()
		if err := syncer.Retire(ctx); err != nil {
			s.log.Warn().Err(err).Msg("this balancer's id is not kept, and the registry will show it as silent for an hour")
		}
	}
	return err
}

// lock locks the backends: at once or never for --once, else when others end.
func lock(c *cli.Context, cfg lbsync.Config, t *target, s *session, notify *systemd) (*identity.Locks, error) {
	var backends []string
	for _, b := range cfg.Backends {
		backends = append(backends, b.Backend)
	}
	if c.Bool("once") {
		return identity.TryLock(t.lock, backends)
	}
	return identity.WaitLock(c.Context, t.lock, backends, func(err error) {
		s.log.Warn().Str(t.kind, t.at).Err(err).Msg("standing by")
		notify.status("standing by: " + err.Error())
	})
}

func dryRun(c *cli.Context, cfg lbsync.Config, t *target, s *session) error {
	cfg.ID = "dry-run" // which nobody is told
	dry := &lbsync.DryRun{Balancer: t, Render: t.Render, Out: c.App.Writer}
	syncer, err := lbsync.New(cfg, dry, s.store, s.log.Level(zerolog.WarnLevel))
	if err != nil {
		return usageError{err}
	}
	s.nameUnknown(c.Context, services(cfg.Backends)...)
	if err := syncer.Once(c.Context); err != nil {
		return err
	}
	if dry.Commands > 0 {
		return fmt.Errorf("%w: %d commands would be sent", errChanges, dry.Commands)
	}
	return nil
}

func syncConfig(c *cli.Context) (lbsync.Config, error) {
	cfg := lbsync.Config{
		Hold: c.Duration("hold"), DrainTimeout: c.Duration("drain-timeout"), MinServers: c.Int("min-servers"), MinShare: c.Int("min-share"), StateFile: c.String("state-file"), Allow: lbsync.DefaultAllow(),
	}
	if c.Args().Present() {
		return cfg, usage("unexpected argument %q", c.Args().First())
	}
	backends, err := parseBackends(c.StringSlice("backend"))
	if err != nil {
		return cfg, err
	}
	for _, b := range backends {
		b.Mode = lbsync.Mode(c.String("mode"))
		cfg.Backends = append(cfg.Backends, b)
	}
	if len(cfg.Backends) == 0 {
		return cfg, usageError{errors.New("no backend; name at least one with --backend SERVICE=BACKEND")}
	}
	if err := parseAllow(c.StringSlice("allow"), &cfg); err != nil {
		return cfg, err
	}
	if c.IsSet("id") {
		if err := registrar.CheckBalancerID(c.String("id")); err != nil {
			return cfg, usage("--id: %v", err)
		}
	}
	if err := cfg.Check(); err != nil {
		return cfg, usageError{err}
	}
	if cfg.StateFile != "" {
		if err := fileKind("state-file", cfg.StateFile); err != nil {
			return cfg, usageError{err}
		}
	}
	return cfg, nil
}

// readConfig takes from HAProxy's configuration files what no socket tells of backends.
// A file that does not have one of them is not all that HAProxy reads. What is not
// understood is said, and nothing is known of it.
func readConfig(files []string, backends []lbsync.BackendConfig, log zerolog.Logger) error {
	if len(files) == 0 {
		return nil
	}
	f, err := haproxy.ReadConfig(files)
	switch {
	case errors.Is(err, haproxy.ErrConditional):
		log.Warn().Err(err).Msg("--config is left out: what no socket tells of the backends is not known")
		return nil
	case err != nil:
		return usage("--config: %v", err)
	}
	for i, b := range backends {
		p := f.Proxy(b.Backend)
		if p == nil {
			return usage("--config %s: no backend %s in it; give every file that HAProxy reads", strings.Join(files, " --config "), b.Backend)
		}
		backends[i].Private = p.Private()
	}
	return nil
}

// parseAllow reads NETWORK, for every backend that is not named, and
// BACKEND=NETWORK.
func parseAllow(words []string, cfg *lbsync.Config) error {
	var general []netip.Prefix
	for _, word := range words {
		name, network, own := strings.Cut(word, "=")
		if !own {
			network = word
		}
		p, err := netip.ParsePrefix(network)
		if err != nil {
			return usage("--allow %q: want a network such as 10.0.0.0/8, or BACKEND=NETWORK", word)
		}
		if !own {
			general = append(general, p.Masked())
			continue
		}
		i := slices.IndexFunc(cfg.Backends, func(b lbsync.BackendConfig) bool { return b.Backend == name })
		if i < 0 {
			return usage("--allow %q: no --backend names %s", word, name)
		}
		cfg.Backends[i].Allow = append(cfg.Backends[i].Allow, p.Masked())
	}
	if len(general) > 0 {
		cfg.Allow = general
	}
	return nil
}

// parseBackends reads SERVICE=BACKEND.
func parseBackends(words []string) ([]lbsync.BackendConfig, error) {
	var backends []lbsync.BackendConfig
	for _, b := range words {
		name, backend, ok := strings.Cut(b, "=")
		if !ok || backend == "" {
			return nil, usage("--backend %q: want SERVICE=BACKEND", b)
		}
		svc, err := registrar.ParseService(name)
		if err != nil {
			return nil, usageError{err}
		}
		backends = append(backends, lbsync.BackendConfig{Service: svc, Backend: backend})
	}
	return backends, nil
}

// services are those of backends.
func services(backends []lbsync.BackendConfig) (svcs []registrar.Service) {
	for _, b := range backends {
		svcs = append(svcs, b.Service)
	}
	return svcs
}

// prefixes lets zerolog print networks.
func prefixes(ps []netip.Prefix) []fmt.Stringer {
	out := make([]fmt.Stringer, len(ps))
	for i, p := range ps {
		out[i] = p
	}
	return out
}

// lockName names the files that lock the HAProxy behind a URL: this host's name and a
// hash of the URL.
func lockName(url string) (string, error) {
	host, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("name this HAProxy's locks: %w", err)
	}
	sum := sha256.Sum256([]byte(url))
	return fmt.Sprintf("rollcall-%s-%x", host, sum[:4]), nil
}
