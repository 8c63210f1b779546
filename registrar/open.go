package registrar

import (
	"context"
	"fmt"
	"time"

	"github.com/redis/go-redis/v9"
)

// Deadlines of every exchange with Redis. go-redis' own (dial 5 s, read 3 s,
// retries inside) would hide an outage from the loops that decide on it.
const (
	DialTimeout = 500 * time.Millisecond
	Timeout     = time.Second
)

// Open returns a client for url (redis:// or rediss://, as go-redis'
// ParseURL has it) that never retries by itself and never waits for more than
// Timeout. pool is the most connections it keeps. It does no I/O; the caller
// closes it.
func Open(url string, pool int) (redis.UniversalClient, error) {
	o, err := redis.ParseURL(url)
	if err != nil {
		// ParseURL's errors can quote the URL, and with it a password.
		return nil, fmt.Errorf("redis URL: want redis://[user:password@]host:port/db or rediss://…")
	}
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
	return redis.NewClient(o), nil
}

// WithTimeout bounds one exchange with Redis.
func WithTimeout(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, Timeout)
}
