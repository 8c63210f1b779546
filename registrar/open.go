package registrar

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"

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
	// SentinelUser and SentinelPassword are for the Sentinels themselves. The
	// password, if not nil, is asked for at every new connection to one; "" = none.
	SentinelUser     string
	SentinelPassword func() (string, error)
	// CA is a file of the certificates that vouch for the servers; "" = the
	// system's. Cert and Key are files of this client's own certificate; "" =
	// none. All are read at every new connection.
	CA, Cert, Key string
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
	scheme, rest, _ := strings.Cut(rawURL, "://")
	base, form, _ := strings.Cut(scheme, "+")
	if base != "redis" && base != "rediss" {
		return nil, errURL
	}
	// What is wrong with the files is a mistake now, and an outage later.
	secure, err := a.tls(base == "rediss")
	if err != nil {
		return nil, err
	}
	switch form {
	case "":
		return a.server(rawURL, pool)
	case "sentinel":
		return a.sentinel(base, rest, a.dialer(secure), pool)
	case "cluster":
		return a.cluster(base, rest, a.dialer(secure), pool)
	}
	return nil, errURL
}

// A parser's own errors can quote the URL, and with it a password.
var errURL = errors.New("redis URL: want redis://[user:password@]host:port/db, redis+sentinel://[user:password@]host:port,…/primary/db, redis+cluster://[user:password@]host:port,…, or any with rediss")

func (a Access) server(rawURL string, pool int) (redis.UniversalClient, error) {
	o, err := redis.ParseURL(rawURL)
	if err != nil {
		return nil, errURL
	}
	o.Dialer = a.dialer(o.TLSConfig)
	o.CredentialsProviderContext = a.credentials(o.Username, o.Password)
	o.DialTimeout = DialTimeout
	o.DialerRetries = 1
	o.ReadTimeout = Timeout
	o.WriteTimeout = Timeout
	o.PoolTimeout = Timeout
	o.ContextTimeoutEnabled = true
	o.MaxRetries = -1
	o.PoolSize = pool
	o.MinIdleConns = 0 // a URL that asks for some would make NewClient dial
	o.DisableIdentity = true
	o.ReadBufferSize, o.WriteBufferSize = bufferSize(pool), bufferSize(pool)
	rdb := redis.NewClient(o)
	rdb.AddHook(bounded{})
	return rdb, nil
}

func (a Access) sentinel(base, rest string, dial dialer, pool int) (redis.UniversalClient, error) {
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
	password, _ := u.User.Password()
	var rdb *redis.Client
	rdb = redis.NewFailoverClient(&redis.FailoverOptions{
		MasterName: primary, SentinelAddrs: addrs, DB: db,
		OnConnect: func(ctx context.Context, cn *redis.Conn) error {
			// It hears of the data nodes' connections and of the Sentinels'. Only a
			// client's own connections bear its name.
			if cn.String() == rdb.String() {
				return nil
			}
			return a.greetSentinel(ctx, cn)
		},
		CredentialsProviderContext: a.credentials(u.User.Username(), password),
		Dialer:                     dial,
		DialTimeout:                DialTimeout, DialerRetries: 1,
		ReadTimeout: Timeout, WriteTimeout: Timeout, PoolTimeout: Timeout, ContextTimeoutEnabled: true,
		MaxRetries: -1, PoolSize: pool, DisableIdentity: true,
		ReadBufferSize: bufferSize(pool), WriteBufferSize: bufferSize(pool),
	})
	rdb.AddHook(bounded{})
	return rdb, nil
}

// greetSentinel logs in to a Sentinel. go-redis does that by itself with one
// password for ever; for the data nodes it asks for credentials each time.
func (a Access) greetSentinel(ctx context.Context, cn *redis.Conn) error {
	if a.SentinelPassword == nil {
		return nil
	}
	password, err := a.SentinelPassword()
	switch {
	case err != nil:
		return fmt.Errorf("sentinel password: %w", err)
	case password == "":
		return nil
	case a.SentinelUser == "":
		return cn.Auth(ctx, password).Err()
	}
	return cn.AuthACL(ctx, a.SentinelUser, password).Err()
}

// cluster follows no MOVED by itself: that answer renews the map, and the
// caller's next try goes to the right node. Nothing is read from replicas.
func (a Access) cluster(base, rest string, dial dialer, pool int) (redis.UniversalClient, error) {
	u, addrs, err := parseHosts(base, rest, clusterPort)
	if err != nil {
		return nil, err
	}
	if u.Path != "/" {
		return nil, errURL // a Cluster has one database
	}
	password, _ := u.User.Password()
	rdb := redis.NewClusterClient(&redis.ClusterOptions{
		Addrs:                      addrs,
		CredentialsProviderContext: a.credentials(u.User.Username(), password),
		Dialer:                     dial,
		DialTimeout:                DialTimeout, DialerRetries: 1,
		ReadTimeout: Timeout, WriteTimeout: Timeout, PoolTimeout: Timeout, ContextTimeoutEnabled: true,
		MaxRedirects: -1, MaxRetries: -1, PoolSize: pool, DisableIdentity: true,
		ReadBufferSize: bufferSize(pool), WriteBufferSize: bufferSize(pool),
		ClusterStateReloadInterval: clusterReload,
		// Their table costs a COMMAND to a random node, for up to 5 s and with a
		// right of its own; every command here has its key.
		DisableRoutingPolicies: true,
	})
	rdb.OnNewNode(func(node *redis.Client) { node.AddHook(bounded{lost: rdb.ReloadState}) })
	rdb.AddHook(bounded{lost: rdb.ReloadState})
	return rdb, nil
}

// bounded is a hook that gives every exchange Timeout at most, in all: the wait
// for a connection, the Sentinels' or the Cluster's word on where to go, the
// dial, the log-in, and the exchange itself. go-redis' own deadlines are of each
// of these.
type bounded struct {
	lost func(context.Context) // of a Cluster: has the map read again
}

func (bounded) DialHook(next redis.DialHook) redis.DialHook { return next }

func (b bounded) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if cmd.Name() == "xread" { // it may block, and its context says for how long
			return next(ctx, cmd)
		}
		ctx, cancel := WithTimeout(ctx)
		defer cancel()
		err := next(ctx, cmd)
		b.look(ctx, err)
		return err
	}
}

func (b bounded) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		ctx, cancel := WithTimeout(ctx)
		defer cancel()
		err := next(ctx, cmds)
		b.look(ctx, err)
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
	scheme, rest, _ := strings.Cut(rawURL, "://")
	base, form, _ := strings.Cut(scheme, "+")
	if form != "cluster" {
		return nil, errURL
	}
	authority, _, _ := strings.Cut(rest, "/")
	at := strings.LastIndexByte(authority, '@') + 1
	return a.Open(base+"://"+authority[:at]+addr+"/0", pool)
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

// credentials are asked for at every new connection, so a password that was
// changed in its file is in use without a restart.
func (a Access) credentials(user, password string) func(context.Context) (string, string, error) {
	return func(context.Context) (string, string, error) {
		if a.Password == nil {
			return user, password, nil
		}
		p, err := a.Password()
		if err != nil {
			return "", "", fmt.Errorf("redis password: %w", err)
		}
		if p == "" {
			p = password
		}
		return user, p, nil
	}
}

type dialer = func(ctx context.Context, network, addr string) (net.Conn, error)

// dialer connects with TLS, by the files as they are then, as if says beside
// them; nil = plainly, which go-redis does by itself.
func (a Access) dialer(as *tls.Config) dialer {
	if as == nil {
		return nil
	}
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := a.tls(true)
		if err != nil {
			return nil, err
		}
		// The name that the certificate must have is addr's, if as has none.
		c.ServerName, c.InsecureSkipVerify = as.ServerName, as.InsecureSkipVerify
		d := tls.Dialer{NetDialer: &net.Dialer{Timeout: DialTimeout, KeepAlive: keepAlive}, Config: c}
		return d.DialContext(ctx, network, addr)
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
