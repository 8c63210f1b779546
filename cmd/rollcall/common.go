package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"text/tabwriter"
	"unicode"

	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"
	"github.com/urfave/cli/v2"

	"rollcall/registrar"
	"rollcall/registrar/regular"
)

const defaultRedis = "redis://127.0.0.1:6379/0"

// env is the variable of a flag: --log-level is ROLLCALL_LOG_LEVEL.
func env(flag string) []string {
	return []string{"ROLLCALL_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))}
}

// redisFlags are of every command that speaks to Redis.
func redisFlags(more ...cli.Flag) []cli.Flag {
	return append([]cli.Flag{
		&cli.StringFlag{Name: "redis", Value: defaultRedis, EnvVars: env("redis"),
			Usage: "the registry's `URL`: redis://HOST:PORT/DB or redis+sentinel://HOST:PORT,…/PRIMARY/DB or redis+cluster://HOST:PORT,…, with rediss for TLS; its password comes from ROLLCALL_REDIS_PASSWORD or the file named by ROLLCALL_REDIS_PASSWORD_FILE"},
		&cli.StringFlag{Name: "redis-ca", EnvVars: env("redis-ca"), Usage: "`FILE` of the certificates that vouch for Redis; without it the system's"},
		&cli.StringFlag{Name: "redis-cert", EnvVars: env("redis-cert"), Usage: "`FILE` of this client's certificate"},
		&cli.StringFlag{Name: "redis-key", EnvVars: env("redis-key"), Usage: "`FILE` of that certificate's key"},
		&cli.StringFlag{Name: "namespace", Value: registrar.DefaultNamespace, EnvVars: env("namespace"), Usage: "`NAME` that every key begins with"},
	}, append(logFlags(), more...)...)
}

func logFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "log-level", Value: "info", EnvVars: env("log-level"), Usage: "debug, info, warn or error"},
		&cli.StringFlag{Name: "log-format", Value: "text", EnvVars: env("log-format"), Usage: "text (or console, the same) or json, on standard error"},
	}
}

func outputFlag() cli.Flag {
	return &cli.StringFlag{Name: "output", Aliases: []string{"o"}, Value: "table", EnvVars: env("output"), Usage: "table or json"}
}

// logger makes the command's logger. go-redis' own messages become debug lines.
func logger(c *cli.Context) (zerolog.Logger, error) {
	level, err := zerolog.ParseLevel(c.String("log-level"))
	if err != nil || level == zerolog.NoLevel {
		return zerolog.Nop(), usage("--log-level %q: want debug, info, warn or error", c.String("log-level"))
	}
	var format func(io.Writer) io.Writer
	switch f := c.String("log-format"); f {
	case "json":
		format = func(w io.Writer) io.Writer { return escaper{w} }
	case "text", "console":
		format = func(w io.Writer) io.Writer {
			return zerolog.ConsoleWriter{Out: w, NoColor: true, TimeFormat: "15:04:05.000"}
		}
	default:
		return zerolog.Nop(), usage("--log-format %q: want text (or console, the same) or json", f)
	}
	zerolog.TimeFieldFormat = zerolog.TimeFormatUnixMs
	log := zerolog.New(format(c.App.ErrWriter)).Level(level).With().Timestamp().Logger()
	reportDropped(c, format)
	redis.SetLogger(redisLogger{log.With().Str("component", "go-redis").Logger()})
	return log, nil
}

type redisLogger struct{ log zerolog.Logger }

// Printf implements go-redis' logger.
func (l redisLogger) Printf(_ context.Context, format string, v ...any) {
	l.log.Debug().Msg(plain(fmt.Sprintf(format, v...)))
}

// session is what a command needs once its own flags are right.
type session struct {
	printer
	store    *registrar.Store
	follower *registrar.Follower // of all its clients
	log      zerolog.Logger
	// others finds the registries that the same Redis has beside this one.
	others func(context.Context) ([]registrar.OtherRegistry, error)
	close  func()
}

// begin makes a session from the common flags. pool is the most connections to
// Redis that it keeps. It does no I/O but to read a password's file.
func begin(c *cli.Context, pool int) (*session, error) {
	p, err := newPrinter(c)
	if err != nil {
		return nil, err
	}
	s := &session{printer: p}
	if s.log, err = logger(c); err != nil {
		return nil, err
	}
	s.follower = registrar.NewFollower(nil, s.log)
	rdb, err := open(c, "redis", pool, s.follower)
	if err != nil {
		return nil, err
	}
	if s.store, err = registrar.NewStore(rdb, c.String("namespace")); err != nil {
		_ = rdb.Close()
		return nil, usageError{err}
	}
	warnPasswords(c, "redis", s.log)
	s.others = func(ctx context.Context) ([]registrar.OtherRegistry, error) {
		a, err := access(c, "redis")
		if err != nil {
			return nil, err
		}
		return a.OtherRegistries(ctx, c.String("redis"), c.String("namespace"))
	}
	s.store.Follow(s.follower)
	ctx, cancel := context.WithCancel(context.WithoutCancel(c.Context)) // it ends after what a command does at its end
	var following sync.WaitGroup
	following.Go(func() { s.follower.Run(ctx) })
	s.close = func() {
		cancel()
		following.Wait()
		_ = rdb.Close() // it has been used for the last time
	}
	return s, nil
}

// open makes a client of the URL that a flag has, with the password that the
// flag's variables have. follow may be nil.
func open(c *cli.Context, flag string, pool int, follow *registrar.Follower) (redis.UniversalClient, error) {
	a, err := access(c, flag)
	if err != nil {
		return nil, err
	}
	a.Follow = follow
	rdb, err := a.Open(c.String(flag), pool)
	if err != nil {
		return nil, usageError{err}
	}
	return rdb, nil
}

func access(c *cli.Context, flag string) (registrar.Access, error) {
	a := registrar.Access{
		Password:     secret(env(flag)[0] + "_PASSWORD"),
		PasswordName: env(flag)[0] + "_PASSWORD", SentinelPasswordName: "ROLLCALL_SENTINEL_PASSWORD",
		SentinelUser:     os.Getenv("ROLLCALL_SENTINEL_USER"),
		SentinelPassword: secret("ROLLCALL_SENTINEL_PASSWORD"),
		CA:               c.String("redis-ca"), Cert: c.String("redis-cert"), Key: c.String("redis-key"),
	}
	// A file that is not there is a mistake now, and an outage later.
	for _, read := range []func() (string, error){a.Password, a.SentinelPassword} {
		if _, err := read(); err != nil {
			return a, usageError{err}
		}
	}
	return a, nil
}

// passwords are where the password of a flag's URL is given, the one that is used first.
func passwords(c *cli.Context, flag string) (given []string) {
	name := env(flag)[0] + "_PASSWORD"
	for _, n := range []string{name, name + "_FILE"} {
		if os.Getenv(n) != "" {
			given = append(given, n)
		}
	}
	if registrar.HasPassword(c.String(flag)) {
		given = append(given, "the URL of --"+flag)
	}
	return given
}

// warnPasswords says so if a password is given more than once: one of them is older.
func warnPasswords(c *cli.Context, flag string, log zerolog.Logger) {
	if given := passwords(c, flag); len(given) > 1 {
		log.Warn().Str("used", given[0]).Strs("not", given[1:]).Msg("a password is given more than once; take out what is not used")
	}
}

// secret returns how to read the variable name, or the file that the variable
// name_FILE names. The variables are those of now.
func secret(name string) func() (string, error) {
	value, file := os.Getenv(name), os.Getenv(name+"_FILE")
	return func() (string, error) {
		if value != "" || file == "" {
			return value, nil
		}
		v, err := secretFile(file)
		switch {
		case err != nil:
			return "", fmt.Errorf("%s_FILE: %w", name, err)
		case v == "":
			return "", fmt.Errorf("%s_FILE: %s is empty", name, file)
		}
		return v, nil
	}
}

func secretFile(path string) (string, error) {
	b, err := regular.Read(path)
	return strings.TrimRight(string(b), "\r\n"), err
}

// fileKind refuses what can never be the file that a flag names. What is not there, or
// cannot be seen now, may be there later.
func fileKind(flag, path string) error {
	if err := regular.CheckPath(path); errors.Is(err, regular.ErrKind) {
		return fmt.Errorf("--%s: %w", flag, err)
	}
	return nil
}

// args returns the command's arguments, of which it takes as many as want.
func args(c *cli.Context, names string, want int) ([]string, error) {
	if got := c.Args().Slice(); len(got) == want {
		return got, nil
	}
	return nil, usage("want %s %s; see rollcall %s --help", c.Command.Name, names, c.Command.Name)
}

func parseService(s string) (registrar.Service, error) {
	svc, err := registrar.ParseService(s)
	if err != nil {
		return "", usageError{err}
	}
	return svc, nil
}

func parseServices(words []string) ([]registrar.Service, error) {
	var svcs []registrar.Service
	for _, w := range words {
		svc, err := parseService(w)
		if err != nil {
			return nil, err
		}
		svcs = append(svcs, svc)
	}
	return svcs, nil
}

// printer writes rows as an aligned table or as one JSON document.
type printer struct {
	w    io.Writer
	json bool
}

func newPrinter(c *cli.Context) (printer, error) {
	p := printer{w: c.App.Writer}
	switch o := c.String("output"); o {
	case "", "table": // not every command prints
	case "json":
		p.json = true
	default:
		return p, usage("-o %q: want table or json", o)
	}
	return p, nil
}

// table writes v as JSON, or else the header and the rows.
func (p printer) table(v any, header string, rows [][]string) error {
	if p.json {
		return p.document(v)
	}
	tw := tabwriter.NewWriter(p.w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, strings.Join(strings.Fields(header), "\t"))
	for _, r := range rows {
		for i := range r {
			r[i] = plain(r[i])
		}
		fmt.Fprintln(tw, strings.Join(r, "\t"))
	}
	return tw.Flush()
}

// line writes v as JSON, or else the text.
func (p printer) line(v any, format string, args ...any) error {
	if p.json {
		return p.document(v)
	}
	_, err := fmt.Fprintln(p.w, plain(fmt.Sprintf(format, args...)))
	return err
}

func (p printer) document(v any) error {
	e := json.NewEncoder(p.w)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// plain keeps what came from the registry from driving the terminal or breaking
// a line.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.In(r, unicode.Cc, unicode.Cf, unicode.Co, unicode.Zl, unicode.Zp) {
			return '?' // what moves the cursor, turns the text around or is not seen
		}
		return r
	}, s)
}

// escaper writes JSON without a raw control character: zerolog escapes those of
// ASCII only, and there are terminals that obey the others too.
type escaper struct{ w io.Writer }

func (e escaper) Write(b []byte) (int, error) {
	var out strings.Builder
	for _, r := range string(b) {
		if r >= 0x80 && unicode.In(r, unicode.Cc, unicode.Cf, unicode.Co, unicode.Zl, unicode.Zp) {
			r = '?'
		}
		out.WriteRune(r)
	}
	if _, err := io.WriteString(e.w, out.String()); err != nil {
		return 0, err
	}
	return len(b), nil
}

// printable is an error for a terminal: what Redis or HAProxy answered may be a
// part of it. Each further line is indented, so it cannot pass for one of ours.
func printable(err error) string {
	const limit = 4096
	text := err.Error()
	if len(text) > limit {
		text = text[:limit] + "…"
	}
	lines := strings.Split(text, "\n")
	for i, l := range lines {
		lines[i] = plain(l)
	}
	return strings.Join(lines, "\n  ")
}

// version is the module's, or the commit's that the binary was built from, with
// "+dirty" if there were changes on top of it.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v, dirty := info.Main.Version, ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			v = s.Value
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "+dirty"
		}
	}
	return strings.TrimSuffix(v, dirty) + dirty
}
