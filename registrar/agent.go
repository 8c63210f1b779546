package registrar

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// This file is what an agent that registers many instances needs beside heartbeats:
// a lease, so that of two agents of the same containers one stands by, and a ledger
// of where it has registrations, so that one that starts again finds those of
// containers that went meanwhile. To look for its mark in the metadata of every
// service instead held Redis for 450 ms in 112 calls with 100,000 instances, for each
// host that comes up.

const (
	// leaseMost is the longest lease: a second agent takes over so long after the
	// first was killed.
	leaseMost = 3 * time.Second
	// ledgerKept is how long a ledger outlives its agent.
	ledgerKept = 24 * time.Hour
	// ledgerPart is how many addresses one call reads or writes.
	ledgerPart = 250
)

// ErrDenied says that the Redis user lacks a right.
var ErrDenied = errors.New("the redis user lacks a right; see scripts/deploy/acl")

// denied adds ErrDenied to a refusal for want of rights, in a script or not.
func denied(err error) error {
	var refused redis.Error
	if errors.As(err, &refused) {
		if text := refused.Error(); strings.HasPrefix(text, "NOPERM") || strings.Contains(text, "The user executing the script") {
			return fmt.Errorf("%w: %w", ErrDenied, err)
		}
	}
	return err
}

// Lease is how an agent's lease stands.
type Lease struct {
	Held   bool          // by the holder that asked
	Left   time.Duration // that it still is somebody's
	Length time.Duration // of a lease: half of the registry's heartbeat interval, 3 s at most
}

// KeepLease renews the lease id if holder has it. If it is nobody's it is taken, if
// take is set. An error that wraps ErrDenied says that this user may have no lease.
func (s *Store) KeepLease(ctx context.Context, id, holder string, take bool) (Lease, error) {
	what := "keep"
	if take {
		what = "take"
	}
	l, err := s.leases(ctx, id, holder, what)
	if err != nil {
		return Lease{}, fmt.Errorf("%s the lease %s: %w", what, s.keys.Docker(id), err)
	}
	return l, nil
}

// EndLease gives the lease id up, if holder has it.
func (s *Store) EndLease(ctx context.Context, id, holder string) error {
	if _, err := s.leases(ctx, id, holder, "end"); err != nil {
		return fmt.Errorf("end the lease %s: %w", s.keys.Docker(id), err)
	}
	return nil
}

func (s *Store) leases(ctx context.Context, id, holder, what string) (Lease, error) {
	keys, cfg := []string{s.keys.Docker(id), s.keys.Config()}, []any{"", ""}
	if s.keys.cluster {
		keys = keys[:1]
		var err error
		if cfg, err = s.rdb.HMGet(ctx, s.keys.Config(), "ttl_ms", "interval_ms").Result(); err != nil {
			return Lease{}, denied(err)
		}
	}
	r, err := s.lease.Run(ctx, s.rdb, keys, holder, what, leaseMost.Milliseconds(), text(cfg[0]), text(cfg[1])).Slice()
	if err != nil {
		return Lease{}, denied(err)
	}
	if len(r) != 3 || integer(r[2]) <= 0 {
		return Lease{}, fmt.Errorf("unknown answer %s", quoted(r))
	}
	return Lease{integer(r[0]) == 1, millis(integer(r[1])), millis(integer(r[2]))}, nil
}

// Place is one address of one service.
type Place struct {
	Service Service
	Addr    netip.AddrPort
}

func (p Place) String() string { return string(p.Service) + " " + p.Addr.String() }

func parsePlace(s string) (Place, error) {
	name, text, _ := strings.Cut(s, " ")
	svc, err := ParseService(name)
	if err != nil {
		return Place{}, err
	}
	addr, err := ParseAddr(text)
	return Place{svc, addr}, err
}

// Ledger returns where the agent with this mark may have registrations, in no
// order. What is no place is left out.
func (s *Store) Ledger(ctx context.Context, mark string) ([]Place, error) {
	all, err := s.rdb.SMembers(ctx, s.keys.DockerAddrs(mark)).Result()
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", s.keys.DockerAddrs(mark), denied(err))
	}
	var places []Place
	for _, m := range all {
		if p, err := parsePlace(m); err == nil {
			places = append(places, p)
		}
	}
	return places, nil
}

// WriteLedger adds places to the ledger of the agent with this mark, and takes
// others off.
func (s *Store) WriteLedger(ctx context.Context, mark string, add, drop []Place) error {
	for first := true; first || len(add)+len(drop) > 0; first = false {
		n, m := min(len(add), ledgerPart), min(len(drop), ledgerPart)
		argv := []any{ledgerKept.Milliseconds(), n}
		for _, p := range slices.Concat(add[:n], drop[:m]) {
			argv = append(argv, p.String())
		}
		add, drop = add[n:], drop[m:]
		if err := s.ledger.Run(ctx, s.rdb, []string{s.keys.DockerAddrs(mark)}, argv...).Err(); err != nil {
			return fmt.Errorf("write %s: %w", s.keys.DockerAddrs(mark), denied(err))
		}
	}
	return nil
}

// Held is what the register has at a place; the zero Held is nothing.
type Held struct {
	Token string
	Agent string // the mark of the agent that registered it
}

// Held reads what the register has at each of the places, in their order. What
// cannot be read as metadata belongs to no agent.
func (s *Store) Held(ctx context.Context, places []Place) ([]Held, error) {
	out := make([]Held, 0, len(places))
	for part := range slices.Chunk(places, ledgerPart) {
		scores, metas := make([]*redis.FloatCmd, len(part)), make([]*redis.StringCmd, len(part))
		if err := unanswered(s.rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
			for i, at := range part {
				k := s.keys.Of(at.Service)
				scores[i] = p.ZScore(ctx, k.Instances(at.Service), at.Addr.String())
				metas[i] = p.HGet(ctx, k.Meta(at.Service), at.Addr.String())
			}
			return nil
		})); err != nil {
			return nil, fmt.Errorf("read %d places: %w", len(part), denied(err))
		}
		for i := range part { // each command has an error of its own
			for _, err := range []error{scores[i].Err(), metas[i].Err()} {
				if err != nil && !errors.Is(err, redis.Nil) && !broken(err) { // broken keys hold no registration
					return nil, fmt.Errorf("read %s: %w", part[i], denied(err))
				}
			}
			var h Held
			if scores[i].Err() == nil && metas[i].Err() == nil {
				if m, err := parseMeta(metas[i].Val()); err == nil {
					h = Held{m.ID, m.Agent}
				}
			}
			out = append(out, h)
		}
	}
	return out, nil
}
