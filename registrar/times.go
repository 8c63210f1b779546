package registrar

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"time"
)

// Bounds of the registry's times. What its config holds beyond them, as somebody may
// have written it by hand, is as if it were not there; lua/times.lua has the same.
const (
	// MinTTL keeps a reaper's deadline for a pulse, a 15th of it, above the time that a
	// busy machine takes for one.
	MinTTL      = 300 * time.Millisecond
	MaxTTL      = 24 * time.Hour
	MinInterval = 100 * time.Millisecond
)

// CheckTimes refuses a TTL and a heartbeat interval that no registry can have.
func CheckTimes(ttl, interval time.Duration) error {
	if ttl < MinTTL || ttl > MaxTTL {
		return fmt.Errorf("TTL %v: want %v to %v", ttl, MinTTL, MaxTTL)
	}
	if interval < MinInterval {
		return fmt.Errorf("interval %v: want at least %v", interval, MinInterval)
	}
	return CheckInterval(interval, ttl)
}

var digits = regexp.MustCompile(`^[0-9]+$`)

// stored is a time as the config holds it; 0 if it is none.
func stored(v any) time.Duration {
	n, err := strconv.ParseInt(text(v), 10, 64)
	if err != nil || !digits.MatchString(text(v)) || n > MaxTTL.Milliseconds() {
		return 0
	}
	return millis(n)
}

// inForce is what the config's ttl_ms and interval_ms come to.
func inForce(ttlMS, intervalMS any) (ttl, interval time.Duration) {
	if ttl = stored(ttlMS); ttl < MinTTL {
		ttl = DefaultTTL
	}
	if interval = stored(intervalMS); interval < MinInterval || interval*3 > ttl {
		interval = min(DefaultInterval, (ttl / 3).Truncate(time.Millisecond))
	}
	return ttl, interval
}

// InForce reads the TTL and the heartbeat interval that the register of svc has.
func (s *Store) InForce(ctx context.Context, svc Service) (ttl, interval time.Duration, err error) {
	key := s.keys.Of(svc).Config()
	cfg, err := s.rdb.HMGet(ctx, key, "ttl_ms", "interval_ms").Result()
	if err != nil {
		return 0, 0, fmt.Errorf("read %s: %w", key, err)
	}
	ttl, interval = inForce(cfg[0], cfg[1])
	return ttl, interval, nil
}
