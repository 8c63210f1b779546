package registrar

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"
)

// ErrWrongDoor says that what answers is not what the URL says: TLS or not, one
// server, a Sentinel or a node of a Cluster, or a primary that the Sentinels do not
// know. It says which URL is right, and only another URL or another server helps.
var ErrWrongDoor = errors.New("the URL names something else")

// wrongDoor is an ErrWrongDoor that go-redis, which unwraps errors of connections,
// passes on whole.
type wrongDoor string

func (e wrongDoor) Error() string        { return string(e) }
func (e wrongDoor) Is(target error) bool { return target == ErrWrongDoor }

const (
	// probeTimeout bounds one look at what speaks at an address. Together with
	// DialTimeout it is less than Timeout.
	probeTimeout = 300 * time.Millisecond
	// probeEvery is the shortest time between two looks, so that a server that is away
	// costs no more than one connection each second beside its own. What was found counts
	// for foundFor.
	probeEvery = time.Second
	foundFor   = 10 * time.Second
	// slowHandshake is when a handshake without an answer is a reason to look: what
	// waits for TLS's words as for its own says nothing.
	slowHandshake = 100 * time.Millisecond
)

// target is what a URL says of where the register is, without its password.
type target struct {
	secure  bool   // TLS
	form    string // "", sentinel or cluster
	user    string
	hosts   []string // HOST:PORT each
	primary string   // with sentinel
	db      int
}

// String is the URL.
func (t target) String() string {
	u := "redis"
	if t.secure {
		u = "rediss"
	}
	if t.form != "" {
		u += "+" + t.form
	}
	u += "://"
	if t.user != "" {
		u += url.User(t.user).String() + "@"
	}
	u += strings.Join(t.hosts, ",")
	if t.form == "sentinel" {
		u += "/" + url.PathEscape(t.primary)
	}
	if t.form != "cluster" {
		u += "/" + strconv.Itoa(t.db)
	}
	return u
}

// doors watches what speaks at the addresses of a target.
type doors struct {
	target
	node bool // one node of a Cluster is asked for by itself

	right atomic.Bool // a TLS handshake has succeeded

	mu    sync.Mutex
	until time.Time // guarded by mu
	found error     // by the last probe, which counts until then; guarded by mu
}

func (d *doors) wrong(addr, is string, right target) error {
	return wrongDoor(fmt.Sprintf("%s %s; the URL is %s", addr, is, right))
}

// mode judges what addr says of itself in its answer to HELLO. sentinel tells that it
// was asked as one.
func (d *doors) mode(addr, mode string, sentinel bool) error {
	right := d.target
	switch {
	case mode == "cluster" && !d.node && (sentinel || d.form != "cluster"):
		right.form = "cluster"
		if d.form == "sentinel" && !sentinel {
			right.hosts = []string{addr}
		}
		return d.wrong(addr, "is a node of a Cluster", right)
	case mode == "sentinel" && !sentinel:
		right.form, right.primary = "sentinel", "PRIMARY"
		return d.wrong(addr, "is a Sentinel", right)
	case mode == "standalone" && sentinel:
		right.form, right.hosts = "", []string{addr}
		return d.wrong(addr, "is no Sentinel but one server", right)
	case mode == "standalone" && d.form == "cluster":
		right.form, right.hosts = "", []string{addr}
		return d.wrong(addr, "is no node of a Cluster but one server", right)
	}
	return nil
}

// probe looks, at most once each probeEvery, whether addr would take connections of
// the other kind: TLS where the URL says plain, or plain where it says TLS.
func (d *doors) probe(ctx context.Context, addr string) error {
	d.mu.Lock()
	known, found := time.Now().Before(d.until), d.found
	if !known {
		d.until = time.Now().Add(probeEvery)
	}
	d.mu.Unlock()
	if known {
		return found
	}
	right := d.target
	right.secure, found = !d.secure, nil
	switch {
	case d.secure && answersPlain(ctx, addr):
		found = d.wrong(addr, "speaks without TLS", right)
	case !d.secure && answersTLS(ctx, addr):
		found = d.wrong(addr, "speaks TLS only", right)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.found = found; found != nil {
		d.until = time.Now().Add(foundFor)
	}
	return found
}

// answersPlain tells whether addr answers a PING without TLS, in whatever way.
func answersPlain(ctx context.Context, addr string) bool {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return false
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })()
	if _, err := io.WriteString(conn, "PING\r\n"); err != nil {
		return false
	}
	var first [1]byte
	_, err = io.ReadFull(conn, first[:])
	return err == nil && (first[0] == '+' || first[0] == '-')
}

// answersTLS tells whether addr answers the beginning of a TLS handshake as TLS does,
// if only by refusing it. Nothing is said over the connection.
func answersTLS(ctx context.Context, addr string) bool {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	conn, err := (&tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}}).DialContext(ctx, "tcp", addr)
	if err == nil {
		_ = conn.Close()
		return true
	}
	var alert *net.OpError
	return errors.As(err, &alert) && alert.Op == "remote error"
}

// secured makes a TLS connection to addr by connect, and says so if what is there speaks
// without.
func (d *doors) secured(ctx context.Context, addr string, connect func(context.Context) (net.Conn, error)) (net.Conn, error) {
	look, found := context.WithCancelCause(ctx)
	defer found(nil)
	var looking sync.WaitGroup
	if !d.right.Load() {
		looking.Go(func() {
			slow := time.NewTimer(slowHandshake)
			defer slow.Stop()
			select {
			case <-look.Done():
				return
			case <-slow.C:
			}
			if wrong := d.probe(look, addr); wrong != nil {
				found(wrong)
			}
		})
	}
	conn, err := connect(look)
	found(nil)
	looking.Wait()
	if wrong := context.Cause(look); err != nil && errors.Is(wrong, ErrWrongDoor) {
		return nil, wrong
	}
	var unreached *net.OpError
	var untrusted *tls.CertificateVerificationError
	switch {
	case err == nil:
		d.right.Store(true)
	case errors.As(err, &unreached) && (unreached.Op == "dial" || unreached.Op == "remote error"), errors.As(err, &untrusted), ctx.Err() != nil:
	default:
		if wrong := d.probe(ctx, addr); wrong != nil {
			return nil, wrong
		}
	}
	return conn, err
}

// watch has the first bytes of a connection judged. ctx is that of its making.
func (d *doors) watch(ctx context.Context, conn net.Conn, addr string, sentinel bool) net.Conn {
	w := &watched{Conn: conn, mode: func(mode string) error { return d.mode(addr, mode, sentinel) }}
	if !d.secure {
		w.silent = func() error { return d.probe(context.WithoutCancel(ctx), addr) }
	}
	if raw, ok := conn.(syscall.Conn); ok {
		return rawWatched{w, raw}
	}
	return w
}

// watched is a connection whose first answer is looked at. Reads are one at a time.
type watched struct {
	net.Conn
	mode   func(string) error // judges the mode that the server says
	silent func() error       // why it ends without a word; may be nil
	head   []byte             // read so far
	over   bool               // nothing is looked for any more
	wrong  error              // what was found; every further read says it, since go-redis only peeks first
}

// rawWatched is watched with what go-redis needs to see whether an idle connection
// has been closed.
type rawWatched struct {
	*watched
	syscall.Conn
}

// NetConn is for go-redis too.
func (w *watched) NetConn() net.Conn { return w.Conn }

// mostHead is more than the answer to HELLO has before its mode.
const mostHead = 1 << 10

// firstOfRedis are the bytes with which an answer of Redis begins, in RESP2 and 3
// (redis.io/docs/latest/develop/reference/protocol-spec).
var firstOfRedis = []byte("+-:$*_#,(!=%~>|")

// HELLO's answer in RESP2 and 3, Redis 6 to 8.
var helloMode = regexp.MustCompile(`\$4\r\nmode\r\n\$\d+\r\n([a-z]+)\r\n`)

func (w *watched) Read(b []byte) (int, error) {
	if w.wrong != nil {
		return 0, w.wrong
	}
	n, err := w.Conn.Read(b)
	if w.over {
		return n, err
	}
	w.head = append(w.head, b[:n]...)
	m := helloMode.FindSubmatch(w.head)
	switch {
	case m != nil:
		w.over = true
		w.wrong = w.mode(string(m[1]))
	case bytes.HasPrefix(w.head, []byte("-DENIED ")): // and it ends the connection: nothing else would be seen
		w.over, w.wrong = true, wrongDoor(w.Conn.RemoteAddr().String()+" takes connections from its own host only (protected mode): give it a password, or set protected-mode no")
	case len(w.head) > 0 && !bytes.ContainsRune(firstOfRedis, rune(w.head[0])):
		w.over = true
		if w.silent != nil { // it may be an alert of TLS
			w.wrong = w.silent()
		}
		if w.wrong == nil {
			w.wrong = wrongDoor(fmt.Sprintf("%s is no Redis: it says %q; let the URL name the port of redis-server", w.Conn.RemoteAddr(), w.head[:min(len(w.head), 16)]))
		}
	case err != nil && len(w.head) == 0 && w.silent != nil && (errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET)):
		w.over = true
		w.wrong = w.silent()
	}
	if w.wrong != nil {
		return 0, w.wrong
	}
	if len(w.head) > mostHead {
		w.over = true
	}
	if w.over {
		w.head = nil
	}
	return n, err
}

// ofSentinels says of the Sentinels' own refusals whose password it is.
func (a Access) ofSentinels(err error) error {
	return words{user: a.SentinelUser, password: a.SentinelPasswordName}.explain(nil, err)
}

// known says which primary the URL names that no Sentinel knows, and which ones they
// do know. Without it go-redis says redis.Nil, which elsewhere means no value.
func (a Access) known(ctx context.Context, d *doors, dial dialer, err error) error {
	if !errors.Is(err, redis.Nil) {
		return err
	}
	right := d.target
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), probeTimeout)
	defer cancel()
	var names []string
	for _, addr := range d.hosts {
		if names = a.primaries(ctx, addr, dial); len(names) > 0 {
			break
		}
	}
	if len(names) == 0 {
		return wrongDoor(fmt.Sprintf("the Sentinels know no primary called %q", d.primary))
	}
	right.primary = names[0]
	return wrongDoor(fmt.Sprintf("the Sentinels know no primary called %q, but %s; the URL is %s", d.primary, strings.Join(names, ", "), right))
}

// primaries asks the Sentinel at addr which primaries it knows.
func (a Access) primaries(ctx context.Context, addr string, dial dialer) (names []string) {
	sentinel := redis.NewSentinelClient(&redis.Options{
		Addr: addr, Dialer: dial, DialTimeout: probeTimeout, DialerRetries: 1,
		ReadTimeout: probeTimeout, WriteTimeout: probeTimeout, PoolTimeout: probeTimeout, ContextTimeoutEnabled: true,
		MaxRetries: -1, PoolSize: 1, DisableIdentity: true,
	})
	defer sentinel.Close()
	all, err := sentinel.Masters(ctx).Result()
	if err != nil {
		return nil
	}
	for _, one := range all {
		switch fields := one.(type) {
		case map[any]any:
			names = append(names, text(fields["name"]))
		case []any: // name, NAME, ip, …
			if len(fields) > 1 && text(fields[0]) == "name" {
				names = append(names, text(fields[1]))
			}
		}
	}
	return names
}
