package registrar

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"

	"rollcall/registrar/regular"
)

// Deadlines of every exchange with Redis. go-redis' own (dial 5 s, read 3 s,
// retries inside) would hide an outage from the loops that decide on it.
const (
	DialTimeout = 500 * time.Millisecond
	Timeout     = time.Second
)

// bufferSize is that of a connection, in each direction: 0 = go-redis' own 32 KiB,
// which are for long answers. Who has one connection beats, and has none.
func bufferSize(pool int) int {
	if pool == 1 {
		return 4 << 10
	}
	return 0
}

// The ports of lists of hosts that name none.
const (
	sentinelPort = "26379"
	clusterPort  = "6379"
)

// clusterReload is how old a client's map of a Cluster may get. Only answers
// renew it before that, and a dead primary gives none.
const clusterReload = 2 * time.Second

// Access is what a URL does not say of how to reach Redis. The zero value is
// plain access with what the URL has.
type Access struct {
	// Password, if not nil, is asked for at every new connection to a data node
	// and comes before the URL's; "" = the URL's own.
	Password func() (string, error)
	// PasswordName and SentinelPasswordName are what the user sets to give them, for
	// errors; "" = nothing is said of it.
	PasswordName, SentinelPasswordName string
	// SentinelUser and SentinelPassword are for the Sentinels themselves. The
	// password, if not nil, is asked for at every new connection to one; "" = none.
	SentinelUser     string
	SentinelPassword func() (string, error)
	// CA is a file of the certificates that vouch for the servers; "" = the
	// system's. Cert and Key are files of this client's own certificate; "" =
	// none. All are read at every new connection.
	CA, Cert, Key string
	// Follow, if not nil, keeps the connections where the registry is.
	Follow *Follower
}

// Open is Access.Open with plain access.
func Open(url string, pool int) (redis.UniversalClient, error) { return Access{}.Open(url, pool) }

// Open returns a client for one server, for the primary that Sentinels name or
// for the primaries of a Cluster, which never retries by itself. Every exchange ends
// within Timeout, whatever its context says; a subscription's Receive is none:
//
//	redis://[user[:password]@]host[:port][/db]
//	redis+sentinel://[user[:password]@]host[:port],host[:port]…/primary[/db]
//	redis+cluster://[user[:password]@]host[:port],host[:port]…
//
// The user is the data node's. With rediss in the place of redis every
// connection is TLS. pool is the most connections it keeps, to each node of a
// Cluster. It does no I/O but to read a's files; the caller closes the client.
func (a Access) Open(rawURL string, pool int) (redis.UniversalClient, error) {
	base, form, rest, err := cutURL(rawURL)
	if err != nil {
		return nil, err
	}
	// What is wrong with the files is a mistake now, and an outage later.
	secure, err := a.tls(base == "rediss")
	if err != nil {
		return nil, err
	}
	switch form {
	case "":
		return a.server(base, rest, secure, false, pool)
	case "sentinel":
		return a.sentinel(base, rest, secure, pool)
	case "cluster":
		return a.cluster(base, rest, secure, pool)
	}
	return nil, errURL
}

// cutURL takes a URL apart, whose scheme may be written in any case.
func cutURL(rawURL string) (base, form, rest string, err error) {
	scheme, rest, found := strings.Cut(rawURL, "://")
	base, form, _ = strings.Cut(strings.ToLower(scheme), "+")
	switch {
	case base == "unix" || form == "unix" || form == "socket" || strings.HasPrefix(rest, "/"), !found && strings.HasPrefix(rawURL, "/"):
		return "", "", "", errors.New("redis URL: unix sockets are not supported, since all hosts must find the same Redis; want redis://HOST:PORT/DB")
	case !found || base != "redis" && base != "rediss" || form != "" && form != "sentinel" && form != "cluster":
		return "", "", "", errURL
	}
	return base, form, rest, nil
}

// A parser's own errors can quote the URL, and with it a password.
var errURL = errors.New("redis URL: want redis://[user:password@]host:port/db, redis+sentinel://[user:password@]host:port,…/primary/db, redis+cluster://[user:password@]host:port,…, or any with rediss")

// parseServer reads what go-redis reads of a URL, and more strictly.
func parseServer(base, rest string) (*redis.Options, *url.Userinfo, error) {
	o, err := redis.ParseURL(base + "://" + rest)
	if err != nil {
		return nil, nil, errURL
	}
	u, err := url.Parse(base + "://" + rest)
	if err != nil {
		return nil, nil, errURL
	}
	// go-redis takes a path that is no number for database 0.
	if db := strings.TrimPrefix(u.Path, "/"); db != "" && db != strconv.Itoa(o.DB) && !u.Query().Has("db") || o.DB < 0 {
		return nil, nil, fmt.Errorf("redis URL: want a database number from 0 on after the last slash, not %q", db)
	}
	if strings.ContainsAny(u.Host, ",") {
		return nil, nil, errURL // hosts of Sentinels, or of a Cluster
	}
	return o, u.User, nil
}

func (a Access) server(base, rest string, secure *tls.Config, node bool, pool int) (redis.UniversalClient, error) {
	o, login, err := parseServer(base, rest)
	if err != nil {
		return nil, err
	}
	if secure != nil {
		secure = o.TLSConfig // what the query says
	}
	door := &doors{target: target{secure: secure != nil, user: o.Username, hosts: []string{o.Addr}, db: o.DB}, node: node}
	o.Dialer = a.late(a.dialer(secure, door))
	if o.CredentialsProviderContext, err = a.credentials(login); err != nil {
		return nil, err
	}
	o.DialTimeout = DialTimeout
	o.DialerRetries = 1
	o.ReadTimeout = Timeout
	o.WriteTimeout = Timeout
	o.PoolTimeout = Timeout
	o.ContextTimeoutEnabled = true
	o.MaxRetries = -1
	o.MaintNotificationsConfig = noMaintenance()
	o.PoolSize = pool
	o.MinIdleConns = 0 // a URL that asks for some would make NewClient dial
	o.DisableIdentity = true
	o.ReadBufferSize, o.WriteBufferSize = bufferSize(pool), bufferSize(pool)
	rdb := redis.NewClient(o)
	rdb.AddHook(bounded{words: words{o.Username, a.PasswordName, !node}, dialed: func(ctx context.Context, conn net.Conn, err error) (net.Conn, error) {
		if err != nil {
			return nil, err
		}
		return door.watch(ctx, conn, o.Addr, false), nil
	}})
	return rdb, nil
}

func (a Access) sentinel(base, rest string, secure *tls.Config, pool int) (redis.UniversalClient, error) {
	u, addrs, err := parseHosts(base, rest, sentinelPort)
	if err != nil {
		return nil, err
	}
	primary, dbText, hasDB := strings.Cut(strings.TrimPrefix(u.Path, "/"), "/")
	db := 0
	if hasDB {
		if db, err = strconv.Atoi(dbText); err != nil || db < 0 {
			return nil, errURL
		}
	}
	if primary == "" {
		return nil, errURL
	}
	credentials, err := a.credentials(u.User)
	if err != nil {
		return nil, err
	}
	door := &doors{target: target{secure != nil, "sentinel", u.User.Username(), addrs, primary, db}}
	// It makes the data nodes' connections and the Sentinels'. Only those of the data nodes
	// are asked for with the very context that the dial hook gives.
	greeting := func(plain dialer) dialer {
		return func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := plain(ctx, network, addr)
			if _, data := ctx.(ofData); data || err != nil {
				return conn, err
			}
			if err := a.login(ctx, conn); err != nil {
				_ = conn.Close()
				return nil, err
			}
			return door.watch(ctx, conn, addr, true), nil
		}
	}
	plain := a.dialer(secure, door)
	dial := greeting(plain)
	if a.Follow != nil {
		dial = a.late(greeting(a.Follow.watched(primary, addrs, plain, dial).dial))
	}
	rdb := redis.NewFailoverClient(&redis.FailoverOptions{
		MasterName: primary, SentinelAddrs: slices.Clone(addrs), DB: db,
		CredentialsProviderContext: credentials,
		Dialer:                     dial,
		DialTimeout:                DialTimeout, DialerRetries: 1,
		ReadTimeout: Timeout, WriteTimeout: Timeout, PoolTimeout: Timeout, ContextTimeoutEnabled: true,
		MaxRetries: -1, PoolSize: pool, DisableIdentity: true,
		ReadBufferSize: bufferSize(pool), WriteBufferSize: bufferSize(pool),
	})
	rdb.AddHook(bounded{words: words{u.User.Username(), a.PasswordName, false}, dialed: func(ctx context.Context, conn net.Conn, err error) (net.Conn, error) {
		if err != nil {
			return nil, a.known(ctx, door, dial, a.ofSentinels(err))
		}
		return door.watch(ctx, conn, conn.RemoteAddr().String(), false), nil
	}})
	return rdb, nil
}

// ofData is the context of a data node's connection, among those of Sentinels.
type ofData struct{ context.Context }

// login logs in to a Sentinel. go-redis does that by itself with one password for ever;
// for the data nodes it asks for credentials each time.
func (a Access) login(ctx context.Context, conn net.Conn) error {
	if a.SentinelPassword == nil {
		return nil
	}
	password, err := a.SentinelPassword()
	if err != nil {
		return fmt.Errorf("sentinel password: %w", err)
	}
	if password == "" {
		return nil
	}
	words := []string{"AUTH", password}
	if a.SentinelUser != "" {
		words = []string{"AUTH", a.SentinelUser, password}
	}
	command := fmt.Sprintf("*%d\r\n", len(words))
	for _, w := range words {
		command += fmt.Sprintf("$%d\r\n%s\r\n", len(w), w)
	}
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	if err := conn.SetDeadline(time.Now().Add(Timeout)); err != nil {
		return fmt.Errorf("log in to a Sentinel: %w", err)
	}
	if _, err := io.WriteString(conn, command); err != nil {
		return fmt.Errorf("log in to a Sentinel: %w", err)
	}
	answer, err := bufio.NewReaderSize(conn, 512).ReadString('\n') // it says nothing that was not asked for
	switch answer = strings.TrimSpace(answer); {
	case err != nil:
		return fmt.Errorf("log in to a Sentinel: %w", err)
	case answer != "+OK":
		return fmt.Errorf("log in to a Sentinel: %w", sentinelAnswer(strings.TrimPrefix(answer, "-")))
	}
	return conn.SetDeadline(time.Time{})
}

// sentinelAnswer is a refusal as go-redis would have it.
type sentinelAnswer string

func (e sentinelAnswer) Error() string { return string(e) }
func (sentinelAnswer) RedisError()     {}

// cluster follows no MOVED by itself: that answer renews the map, and the
// caller's next try goes to the right node. Nothing is read from replicas.
func (a Access) cluster(base, rest string, secure *tls.Config, pool int) (redis.UniversalClient, error) {
	u, addrs, err := parseHosts(base, rest, clusterPort)
	if err != nil {
		return nil, err
	}
	if u.Path != "/" {
		return nil, errURL // a Cluster has one database
	}
	credentials, err := a.credentials(u.User)
	if err != nil {
		return nil, err
	}
	door := &doors{target: target{secure: secure != nil, form: "cluster", user: u.User.Username(), hosts: addrs}}
	plain := a.dialer(secure, door)
	rdb := redis.NewClusterClient(&redis.ClusterOptions{
		Addrs:                      addrs,
		CredentialsProviderContext: credentials,
		Dialer: a.late(func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := plain(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			return door.watch(ctx, conn, addr, false), nil
		}),
		DialTimeout: DialTimeout, DialerRetries: 1,
		ReadTimeout: Timeout, WriteTimeout: Timeout, PoolTimeout: Timeout, ContextTimeoutEnabled: true,
		MaxRedirects: -1, MaxRetries: -1, PoolSize: pool, DisableIdentity: true,
		ReadBufferSize: bufferSize(pool), WriteBufferSize: bufferSize(pool),
		ClusterStateReloadInterval: clusterReload,
		MaintNotificationsConfig:   noMaintenance(),
		// Their table costs a COMMAND to a random node, for up to 5 s and with a
		// right of its own; every command here has its key.
		DisableRoutingPolicies: true,
	})
	hook := bounded{words: words{u.User.Username(), a.PasswordName, false}, lost: rdb.ReloadState}
	rdb.OnNewNode(func(node *redis.Client) { node.AddHook(hook) })
	rdb.AddHook(hook)
	return rdb, nil
}

// noMaintenance has go-redis not ask at each new connection for messages that only
// Redis Enterprise sends: far from Redis that round trip counts.
func noMaintenance() *maintnotifications.Config {
	return &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
}

// bounded is a hook that gives every exchange Timeout at most, in all: the wait
// for a connection, the Sentinels' or the Cluster's word on where to go, the
// dial, the log-in, and the exchange itself. go-redis' own deadlines are of each
// of these.
type bounded struct {
	words
	lost func(context.Context) // of a Cluster: has the map read again
	// dialed, if not nil, takes every connection for commands that was made, or why none.
	dialed func(context.Context, net.Conn, error) (net.Conn, error)
}

func (b bounded) DialHook(next redis.DialHook) redis.DialHook {
	if b.dialed == nil {
		return next
	}
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := next(ofData{ctx}, network, addr)
		return b.dialed(ctx, conn, err)
	}
}

func (b bounded) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if cmd.Name() == "xread" { // it may block, and its context says for how long
			return b.explain(cmd.Args(), next(ctx, cmd))
		}
		ctx, cancel := WithTimeout(ctx)
		defer cancel()
		err := next(ctx, cmd)
		b.look(ctx, err)
		return b.explain(cmd.Args(), err)
	}
}

func (b bounded) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		ctx, cancel := WithTimeout(ctx)
		defer cancel()
		err := next(ctx, cmds)
		b.look(ctx, err)
		for _, cmd := range cmds {
			if explained := b.explain(cmd.Args(), cmd.Err()); explained != cmd.Err() {
				if cmd.Err() == err {
					err = explained
				}
				cmd.SetErr(explained)
			}
		}
		return err
	}
}

// look has a Cluster's map read again when a node does not answer, or is not the
// one to ask: another may have taken over. go-redis by itself asks for the map
// only after a MOVED, which a dead node does not say.
func (b bounded) look(ctx context.Context, err error) {
	var answer redis.Error
	if b.lost != nil && err != nil && (!errors.As(err, &answer) || strings.HasPrefix(answer.Error(), "MOVED ")) {
		b.lost(ctx)
	}
}

// OpenNode returns a client for one node of the Cluster that rawURL names: for
// who needs a new connection to that node, and not to wait for others to say
// where it is.
func (a Access) OpenNode(rawURL, addr string, pool int) (redis.UniversalClient, error) {
	base, form, rest, err := cutURL(rawURL)
	if err != nil || form != "cluster" {
		return nil, errURL
	}
	secure, err := a.tls(base == "rediss")
	if err != nil {
		return nil, err
	}
	authority, _, _ := strings.Cut(rest, "/")
	at := strings.LastIndexByte(authority, '@') + 1
	return a.server(base, authority[:at]+addr+"/0", secure, true, pool)
}

// Anonymous tells whether Redis takes commands from who has no password: from its default
// user, that is.
func (a Access) Anonymous(ctx context.Context, rawURL string) (bool, error) {
	base, form, rest, err := cutURL(rawURL)
	if err != nil {
		return false, err
	}
	if form != "" {
		base += "+" + form
	}
	authority, _, _ := strings.Cut(rest, "/")
	a.Password = nil
	rdb, err := a.Open(base+"://"+rest[strings.LastIndexByte(authority, '@')+1:], 1)
	if err != nil {
		return false, err
	}
	defer rdb.Close()
	ctx, cancel := WithTimeout(ctx)
	defer cancel()
	var answer redis.Error
	switch err = rdb.Ping(ctx).Err(); {
	case err == nil:
		return true, nil
	case errors.As(err, &answer) && !Passing(err): // NOAUTH, or a default user without rights
		return false, nil
	}
	return false, err
}

// parseHosts reads [user[:password]@]host[:port],host[:port]…[/path].
func parseHosts(base, rest, defaultPort string) (*url.URL, []string, error) {
	authority, path, _ := strings.Cut(rest, "/")
	at := strings.LastIndexByte(authority, '@') + 1
	// net/url knows no lists of hosts, so it sees all but them.
	u, err := url.Parse(base + "://" + authority[:at] + "host/" + path)
	if err != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, nil, errURL
	}
	var addrs []string
	for _, h := range strings.Split(authority[at:], ",") {
		if _, _, err := net.SplitHostPort(h); err != nil {
			h = net.JoinHostPort(strings.Trim(h, "[]"), defaultPort)
		}
		host, port, err := net.SplitHostPort(h)
		if _, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || host == "" || strings.ContainsAny(host, "?#") {
			return nil, nil, errURL
		}
		addrs = append(addrs, h)
	}
	return u, addrs, nil
}

// ErrPassword says that this process has no password to log in with.
var ErrPassword = errors.New("redis password")

// anyPassword is sent for a user that needs none: without one go-redis would not say
// the user's name, and would go on as the default user.
const anyPassword = "none"

// credentials are asked for at every new connection, so a password that was
// changed in its file is in use without a restart. A user without a password is a
// mistake, unless the URL has an empty one (user:@): Redis would take the connection
// for the default user's.
func (a Access) credentials(login *url.Userinfo) (func(context.Context) (string, string, error), error) {
	user := login.Username()
	own, given := login.Password()
	if user != "" && given && own == "" {
		own = anyPassword
	}
	check := func(password string) error {
		if user == "" || password != "" {
			return nil
		}
		where := "the URL"
		if a.PasswordName != "" {
			where = fmt.Sprintf("%s, or in the file that %s_FILE names", a.PasswordName, a.PasswordName)
		}
		return fmt.Errorf("%w: user %s has none, and Redis would take it for the default user; want it in %s, or %s:@ in the URL for a user that needs none (nopass)",
			ErrPassword, user, where, url.User(user))
	}
	ask := func(context.Context) (string, string, error) {
		p := own
		if a.Password != nil {
			asked, err := a.Password()
			if err != nil {
				return "", "", fmt.Errorf("%w: %w", ErrPassword, err)
			}
			p = cmp.Or(asked, own)
		}
		return user, p, check(p)
	}
	if a.Password == nil {
		return ask, check(own)
	}
	if p, err := a.Password(); err == nil { // a file may be readable later
		return ask, check(cmp.Or(p, own))
	}
	return ask, nil
}

type dialer = func(ctx context.Context, network, addr string) (net.Conn, error)

// dialer connects with TLS, by the files as they are then, as if says beside
// them; nil = plainly. What speaks no TLS is said to.
func (a Access) dialer(as *tls.Config, door *doors) dialer {
	dial := (&net.Dialer{Timeout: DialTimeout, KeepAlive: keepAlive}).DialContext
	if a.Follow != nil {
		dial = a.Follow.dial
	}
	if as == nil {
		return dial
	}
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := a.tls(true)
		if err != nil {
			return nil, err
		}
		// The name that the certificate must have is addr's, if as has none.
		c.ServerName, c.InsecureSkipVerify = as.ServerName, as.InsecureSkipVerify
		if host, _, err := net.SplitHostPort(addr); err == nil && c.ServerName == "" {
			c.ServerName = host
		}
		return door.secured(ctx, addr, func(ctx context.Context) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, DialTimeout)
			defer cancel()
			raw, err := dial(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			conn := tls.Client(raw, c)
			if err := conn.HandshakeContext(ctx); err != nil {
				_ = raw.Close() // nothing was said
				return nil, err
			}
			if f, ok := raw.(*followed); ok {
				return secured{conn, f}, nil
			}
			return conn, nil
		})
	}
}

// keepAlive is go-redis' own, of plain connections.
const keepAlive = 5 * time.Minute

// tls returns nil for plain connections.
func (a Access) tls(secure bool) (*tls.Config, error) {
	if !secure {
		if a.CA != "" || a.Cert != "" || a.Key != "" {
			return nil, errors.New("certificates go with a rediss URL")
		}
		return nil, nil
	}
	if (a.Cert == "") != (a.Key == "") {
		return nil, errors.New("a client certificate and its key go together")
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if a.CA != "" {
		pem, err := regular.Read(a.CA)
		if err != nil {
			return nil, fmt.Errorf("redis CA: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("redis CA: %s holds no certificate", a.CA)
		}
	} else if _, err := x509.SystemCertPool(); err != nil {
		// Go reads the system's once, at their first use. If that were when there is no
		// descriptor, no server would be believed ever after.
		return nil, fmt.Errorf("redis CA: the system's certificates: %w", err)
	}
	if a.Cert != "" {
		own := func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			cert, err := regular.Read(a.Cert)
			if err != nil {
				return nil, err
			}
			key, err := regular.Read(a.Key)
			if err != nil {
				return nil, err
			}
			pair, err := tls.X509KeyPair(cert, key)
			return &pair, err
		}
		if _, err := own(nil); err != nil {
			return nil, fmt.Errorf("redis client certificate: %w", err)
		}
		c.GetClientCertificate = own
	}
	return c, nil
}

// WithTimeout bounds one exchange with Redis.
func WithTimeout(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, Timeout)
}
