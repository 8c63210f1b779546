package registrar

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/redis/go-redis/v9"
)

// What HAProxy has, each balancer says itself: checks that fail, servers that
// are kept, a human's maint are in no key of the register. It is for people and for
// ErrLast, and as old as Sight.At says.

// sightChunk is how many addresses one call of seen.lua writes.
const sightChunk = 500

// ServerState is what a balancer found of one address in one backend.
type ServerState struct {
	Server string `json:"server,omitempty"` // its name in HAProxy; empty: no server has the address
	State  string `json:"state,omitempty"`  // ready, drain or maint, as HAProxy has it
	Check  string `json:"check,omitempty"`  // up or down; empty without a health check
	Weight int    `json:"weight"`
	Down   bool   `json:"down,omitempty"` // HAProxy has it down, and not by a health check
	Note   string `json:"note,omitempty"` // why it is not as the register asks, a Note…; empty: it is
	// Excluded says that this balancer is not to serve it: its operator allows other
	// networks only.
	Excluded bool   `json:"excluded,omitempty"`
	Why      string `json:"why,omitempty"` // of the note, or of what else keeps requests from it, for people
	// Since is when the note began, or else when it was first seen to serve no more.
	Since int64 `json:"since,omitempty"`
	Until int64 `json:"until,omitempty"` // of the note; unix ms by Redis' clock, as Since is; 0: there is no such time
}

// The notes of a ServerState.
const (
	NoteHeld     = "held"     // due to leave for its silence, but kept
	NoteLeaving  = "leaving"  // on its way out of HAProxy
	NoteWaits    = "waits"    // its drain, until others are up
	NoteUnplaced = "unplaced" // no slot is left
	NoteRefused  = "refused"  // it may not be served, or the backend cannot be driven
	NoteHuman    = "human"    // in maint by a human's hand, and left alone
	NoteUndone   = "undone"   // it was as the register asks, and HAProxy, its agent say, has made it otherwise
)

// Serving tells whether HAProxy sends new requests to it: it would choose it for one
// without persistence. That is all that "ready" and "serving" mean anywhere. No server
// of rollcall's is a backup.
func (s ServerState) Serving() bool {
	return s.State == "ready" && s.Check != "down" && !s.Down && s.Weight > 0
}

// Reasons that no note gives for a server that does not serve.
const (
	ReasonMaint  = "maint"
	ReasonDrain  = "drain"
	ReasonDown   = "down"
	ReasonWeight = "weight" // it has none
	// ReasonExcluded is the reason where ServerState.Excluded says so.
	ReasonExcluded = "excluded"
	ReasonPending  = "pending" // nobody has said anything of it yet
)

// Reason is why no new request goes to it, a Note… or a Reason…; empty if one would.
func (s ServerState) Reason() string {
	switch {
	case s.Serving():
		return ""
	case s.Excluded:
		return ReasonExcluded
	case s.Note != "":
		return s.Note
	case s.State == "maint":
		return ReasonMaint
	case s.State == "drain":
		return ReasonDrain
	case s.Server == "":
		return ReasonPending
	case s.Check == "down" || s.Down:
		return ReasonDown
	}
	return ReasonWeight
}

// Standing is how the registered instances of a service stand in one backend.
type Standing struct {
	Registered int                `json:"registered"`
	Serving    int                `json:"serving"`       // of them
	Not        map[string]Example `json:"not,omitempty"` // of them, by ServerState.Reason
}

// Example stands for all instances that do not serve for one reason.
type Example struct {
	Count int    `json:"count"`
	Addr  string `json:"addr"`            // the one for which that is so for longest
	Why   string `json:"why,omitempty"`   // of that one
	Since int64  `json:"since,omitempty"` // of that one
}

// Add counts st of a registered instance.
func (c *Standing) Add(addr netip.AddrPort, st ServerState) {
	c.Registered++
	reason := st.Reason()
	if reason == "" {
		c.Serving++
		return
	}
	if c.Not == nil {
		c.Not = map[string]Example{}
	}
	e := c.Not[reason]
	if e.Count == 0 || st.Since < e.Since || st.Since == e.Since && addr.String() < e.Addr {
		e.Addr, e.Why, e.Since = addr.String(), st.Why, st.Since
	}
	e.Count++
	c.Not[reason] = e
}

// Seen is what Publish says.
type Seen struct {
	Anew bool           // forget what was said before
	Age  time.Duration  // of the last look at all servers
	Up   map[string]int // by backend: servers, ours and others', that HAProxy sends new requests to, backups not counted
	// Version is the service version that this is not older than; 0 if that is not known.
	Version int64
	Counts  map[string]Standing // by backend
	// Servers holds the states of the addresses that have changed, by backend; of
	// an address without any there is nothing to say any more.
	Servers map[netip.AddrPort]map[string]ServerState
}

// seenFields are what a balancer says beside addresses.
var seenFields = [...]string{"at", "up", "version", "counts"}

// Publish says what the HAProxy of the balancer id has of svc. It returns of how
// many addresses the register has something after that: another number than the
// balancer counts is a reason to begin anew. After an error some may be missing.
func (s *Store) Publish(ctx context.Context, id string, svc Service, seen Seen) (addrs int, err error) {
	up, err := json.Marshal(seen.Up)
	counts, err2 := json.Marshal(seen.Counts)
	if err := errors.Join(err, err2); err != nil {
		return 0, fmt.Errorf("say what HAProxy has of %s: %w", svc, err)
	}
	var pairs []any
	for addr, states := range seen.Servers {
		value := ""
		if len(states) > 0 {
			b, err := json.Marshal(states)
			if err != nil {
				return 0, fmt.Errorf("say what HAProxy has of %s: %w", svc, err)
			}
			value = string(b)
		}
		pairs = append(pairs, addr.String(), value)
	}
	keys, anew := []string{s.keys.Of(svc).Seen(svc, id)}, seen.Anew
	for first := true; first || len(pairs) > 0; first, anew = false, false {
		part := pairs[:min(len(pairs), 2*sightChunk)]
		pairs = pairs[len(part):]
		argv := append([]any{flag(anew), seen.Age.Milliseconds(), balancerForget.Milliseconds(), s.now, up, seen.Version, counts}, part...)
		fields, err := s.seen.Run(ctx, s.rdb, keys, argv...).Int()
		if err != nil {
			return 0, fmt.Errorf("say what HAProxy has of %s: %w", svc, err)
		}
		addrs = fields - len(seenFields)
	}
	return addrs, nil
}

// Sight is what one balancer said of its HAProxy's servers.
type Sight struct {
	Balancer string
	At       int64 // its last look at all of them, unix ms by Redis' clock; 0: it has said nothing
	// Up counts the servers of each backend, ours and others', that HAProxy sends new
	// requests to, backups not counted.
	Up      map[string]int
	Version int64               // of the service, that all of this is not older than; 0 if unknown
	Counts  map[string]Standing // by backend
	// Servers is by address and backend. What is no address or cannot be read is
	// not in it.
	Servers map[netip.AddrPort]map[string]ServerState
}

// Sights returns what the balancers ids said of addrs in svc, or of every
// address if there are none: one a balancer, in their order. Acks knows the ids.
func (s *Store) Sights(ctx context.Context, svc Service, ids []string, addrs ...netip.AddrPort) ([]Sight, error) {
	k := s.keys.Of(svc)
	fields := slices.Clone(seenFields[:])
	for _, a := range addrs {
		fields = append(fields, a.String())
	}
	if len(ids) == 0 {
		return nil, nil
	}
	all, some := make([]*redis.MapStringStringCmd, len(ids)), make([]*redis.SliceCmd, len(ids))
	_, err := s.rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
		for i, id := range ids {
			if len(addrs) == 0 {
				all[i] = p.HGetAll(ctx, k.Seen(svc, id))
			} else {
				some[i] = p.HMGet(ctx, k.Seen(svc, id), fields...)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read what HAProxy has of %s: %w", svc, err)
	}
	sights := make([]Sight, len(ids))
	for i, id := range ids {
		values := map[string]string{}
		if len(addrs) == 0 {
			values = all[i].Val()
		} else {
			for j, v := range some[i].Val() {
				values[fields[j]] = text(v)
			}
		}
		sights[i] = parseSight(id, values)
	}
	return sights, nil
}

func parseSight(id string, values map[string]string) Sight {
	sight := Sight{Balancer: id, Servers: map[netip.AddrPort]map[string]ServerState{}}
	if at, err := strconv.ParseInt(values["at"], 10, 64); err == nil && at > 0 && at < 1e15 {
		sight.At = at
	}
	if err := json.Unmarshal([]byte(values["up"]), &sight.Up); err != nil {
		sight.Up = nil // a part of it is not to be believed either
	}
	sight.Version = max(parseVersion(values["version"]), 0)
	if err := json.Unmarshal([]byte(values["counts"]), &sight.Counts); err != nil {
		sight.Counts = nil
	}
	for member, value := range values {
		addr, err := ParseAddr(member)
		if err != nil {
			continue
		}
		var states map[string]ServerState
		if err := json.Unmarshal([]byte(value), &states); err == nil && len(states) > 0 {
			sight.Servers[addr] = states
		}
	}
	return sight
}

// AddrEntry is all that the register knows of one address of a service, in one
// instant.
type AddrEntry struct {
	Entry
	// Admin is the operators' word, which is there also while the address is not.
	Admin Admin
	// Changed is the service version of its last change; 0 if that is not known
	// any more.
	Changed       int64
	Token         Token // of the service
	Now           int64 // unix ms by Redis' clock
	TTL, Interval time.Duration
}

// Entry reads one address of svc.
func (s *Store) Entry(ctx context.Context, svc Service, addr netip.AddrPort) (AddrEntry, error) {
	k := s.keys.Of(svc)
	keys := []string{
		k.Instances(svc), k.Meta(svc), k.Admin(svc), k.Gone(svc), k.Changed(svc), k.ServiceVersion(svc), k.Epoch(), k.Config(), k.Bound(svc),
	}
	what := fmt.Sprintf("read %s %s", svc, addr)
	r, err := s.entry.RunRO(ctx, s.rdb, keys, addr.String(), s.now).Slice()
	if err != nil {
		return AddrEntry{}, fmt.Errorf("%s: %w", what, err)
	}
	if len(r) != 12 {
		return AddrEntry{}, fmt.Errorf("%s: answer of %d parts, want 12", what, len(r))
	}
	a := AddrEntry{
		Now: integer(r[0]), Token: Token{text(r[1]), text(r[2]), integer(r[3])}, TTL: millis(integer(r[4])), Interval: millis(integer(r[5])),
	}
	if a.Token.ReplID == "" || a.Now <= 0 || a.TTL <= 0 || a.Interval <= 0 {
		return AddrEntry{}, fmt.Errorf("%s: %w", what, errors.New("answer without replication id, time, TTL or interval"))
	}
	x := row{meta: text(r[7]), admin: text(r[8]), bound: text(r[11])}
	x.score, x.hasScore = number(r[6])
	x.gone, x.hasGone = r[9].(string)
	snap := Snapshot{Now: a.Now}
	snap.add(addr.String(), x)
	if len(snap.Entries) != 1 {
		return AddrEntry{}, fmt.Errorf("%s: not an address as it is stored", what)
	}
	a.Entry = snap.Entries[0]
	if score, ok := number(r[10]); ok {
		if v, err := strconv.ParseFloat(score, 64); err == nil && v > 0 && v < 1e15 {
			a.Changed = int64(v)
		}
	}
	if a.Present && a.Garbage == "" {
		a.Admin = a.Instance.Admin
	} else if a.Admin, err = parseAdmin(x.admin); err != nil && a.Garbage == "" {
		a.Garbage = err.Error()
	}
	return a, nil
}
