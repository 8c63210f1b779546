package registrar

import (
	"context"
	"crypto/rand"
	"embed"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// What a caller of Store decides on. Every other error means that the outcome
// is unknown.
var (
	// ErrNotOwner says that another token holds the address.
	ErrNotOwner = errors.New("another registration holds the address")
	// ErrLeft says that this token has left; it cannot come back.
	ErrLeft = errors.New("this registration has left")
	// ErrInterval says that the heartbeat interval is too long for the TTL.
	ErrInterval = errors.New("heartbeat interval too long")
	// ErrFull says that the registry takes no more instances of this service, or no
	// more services. Those that are there beat on.
	ErrFull = errors.New("no room")
	// ErrAbsent says that there is no such instance.
	ErrAbsent = errors.New("no such instance")
	// ErrBeats says that the instance is alive and would come back.
	ErrBeats = errors.New("the instance still beats")
	// ErrLast says that nothing else serves: in a backend of a live balancer this
	// instance is the only server that gets new requests.
	ErrLast = errors.New("it is the last that serves")
	// ErrOtherHistory says that a token is of another data set than Redis holds.
	ErrOtherHistory = errors.New("redis holds another history")
	// ErrManyServices says that the list of services has more names than are read.
	ErrManyServices = errors.New("too many names")
	// ErrLarge says that all of a service is more than one call reads.
	ErrLarge = errors.New("it has more entries than one call reads")
	// ErrNoVersion says that a service's version is no number, so that nobody can tell
	// who has applied what.
	ErrNoVersion = errors.New("the version is no number from 0 to 2^53-1, so nobody can tell what is applied; put it right")
	// ErrDouble says that another process acknowledges as the same balancer.
	ErrDouble = errors.New("another process acknowledges as this balancer")
	// ErrFenced says that Redis does not hold a reaper's last pulse, or that it is
	// another process or another primary than the one that accepted it.
	ErrFenced = errors.New("the pulse is not in this data set")
	// ErrLate says that a reaper's last pulse is too old to act on.
	ErrLate = errors.New("the pulse is too old")
	// ErrLastLeft says that nobody is let go of a service, since no other instance that
	// can be read would stay.
	ErrLastLeft = errors.New("it is the last instance of the service")
	// ErrNoHistory says that the user may not use INFO, or that Redis has no such
	// command: one data set cannot be told from another one.
	ErrNoHistory = errors.New("redis does not say which data set this is, so nobody is taken out: ACL SETUSER <user> +info, or take the line rename-command INFO out of redis.conf")
	// ErrBroken says that a key of this one service holds something else.
	ErrBroken = errors.New("the service's keys are broken")
)

const (
	// reapLimit bounds one call of reap.lua, and so how long it holds Redis.
	reapLimit = 100
	// surveyKeys bounds one call of survey.lua: 1,000 services of 1,000 held Redis
	// for 7.6 ms (BenchmarkIdleSweep).
	surveyKeys = 250
	// surveyLimit is the most suspects that one call of survey.lua reads.
	surveyLimit = 1000
	// latestLimit is how many of a service's newest members are looked at for
	// instances that can be read, before one is let go.
	latestLimit = 100
	// deltaLimit is the most changed addresses that are cheaper to read one by
	// one than all at once.
	deltaLimit = 1000
	// manyServices is the most services whose changes are read in one call.
	manyServices = 20
	// ReadLimit is the most entries that are read of one key: ten times what a
	// service takes unless an operator says otherwise.
	ReadLimit = 100_000
)

//go:embed lua/*.lua
var sources embed.FS

func script(name string) *redis.Script { return redis.NewScript(source(name)) }

// source is the text of a script, with the parts that it shares with others.
func source(name string) string {
	src, err := sources.ReadFile("lua/" + name + ".lua")
	if err != nil {
		panic(err) // a file named in this package is not in this package
	}
	text := string(src)
	for _, part := range []string{"lib", "event", "counter", "times", "history"} { // in this order: lib names event
		src, err := sources.ReadFile("lua/" + part + ".lua")
		if err != nil {
			panic(err) // as above
		}
		text = strings.Replace(text, "-- "+part+"\n", string(src), 1)
	}
	return text
}

// Store runs the register's scripts on one Redis. It keeps no state of its own,
// but when the list of services was last written to, and may be used by any number
// of goroutines.
type Store struct {
	rdb     redis.UniversalClient
	keys    Keys
	listing *listing
	follow  *Follower // nil: none
	// now is the clock argument of the scripts: empty for the server's own,
	// set by tests of the package only.
	now string

	beat, still, roll, leave, deregister, admin, reap, latest, pulse, survey, read, versions, config, ack, retire, applied, report, seen, entry, announce, elsewhere, others, lease, ledger, unlist, overrides, adopt, follows, followers *redis.Script
}

// NewStore returns the store of namespace ns. It does no I/O. The caller
// closes rdb.
func NewStore(rdb redis.UniversalClient, ns string) (*Store, error) {
	keys, err := NewKeys(ns)
	if err != nil {
		return nil, err
	}
	s := &Store{
		rdb: rdb, keys: keys,
		beat: script("beat"), still: script("still"), roll: script("roll"), leave: script("leave"), deregister: script("deregister"), admin: script("admin"),
		reap: script("reap"), latest: script("latest"), pulse: script("pulse"), survey: script("survey"),
		read: script("read"), versions: script("versions"), config: script("config"),
		ack: script("ack"), retire: script("retire"), applied: script("applied"), report: script("report"),
		seen: script("seen"), follows: script("follow"), followers: script("followers"), entry: script("entry"), announce: script("announce"), elsewhere: script("elsewhere"), others: script("others"),
		lease: script("lease"), ledger: script("ledger"), unlist: script("unlist"), overrides: script("overrides"), adopt: script("adopt"),
	}
	s.listing = &listing{timeout: listTimeout, every: listEvery, at: map[Service]time.Time{}}
	_, s.keys.cluster = rdb.(*redis.ClusterClient)
	return s, nil
}

// Keys returns the names that the store uses.
func (s *Store) Keys() Keys { return s.keys }

// Follow says by which Follower the store's client was opened.
func (s *Store) Follow(f *Follower) { s.follow = f }

// Look is Follower.Look, and Moves Follower.Moves. Without a Follower nothing moves.
func (s *Store) Look(ctx context.Context) (moves int64, err error) {
	if s.follow == nil {
		return 0, nil
	}
	return s.follow.Look(ctx)
}

// Moves tells how often a name was found to name another server. An exchange that
// begins after it goes to a server that is named now.
func (s *Store) Moves() int64 {
	if s.follow == nil {
		return 0
	}
	return s.follow.Moves()
}

// Ping asks Redis for a sign of life. Of a Cluster one node must give it.
func (s *Store) Ping(ctx context.Context) error {
	if err := s.ping(ctx); err != nil {
		return fmt.Errorf("ping redis: %w", err)
	}
	return nil
}

// noHistory is the replication id where INFO is refused; see history.lua.
const noHistory = "-"

// History returns the replication id of the data set that answers, which is the same
// "-" for all where INFO is refused; of a Cluster, where each shard has one of its own,
// nothing.
func (s *Store) History(ctx context.Context) (replid string, err error) {
	if s.keys.cluster {
		return "", nil
	}
	info, err := s.rdb.Info(ctx, "replication").Result()
	switch {
	case Forbidden(err):
		return noHistory, nil
	case err != nil:
		return "", fmt.Errorf("read the replication id: %w", err)
	}
	_, rest, found := strings.Cut(info, "\nmaster_replid:")
	if !found {
		return "", errors.New("read the replication id: redis names none")
	}
	replid, _, _ = strings.Cut(rest, "\r")
	return replid, nil
}

// Subscribe opens a subscription to the change channel. The caller closes it,
// and must demand an answer of it from time to time: a dead connection is
// silent.
func (s *Store) Subscribe(ctx context.Context) *redis.PubSub {
	if s.keys.cluster {
		return s.subscribe(ctx)
	}
	return s.rdb.Subscribe(ctx, s.keys.Changes())
}

// OfSubscription adds to the error of a subscription which right it lacks, if it does:
// no hook of a client sees that answer.
func (s *Store) OfSubscription(err error) error {
	return words{user: "<user>"}.explain([]any{"subscribe", s.keys.Changes()}, err)
}

// change runs a script that changes one service, and announces the change later
// if it must.
func (s *Store) change(ctx context.Context, sc *redis.Script, svc Service, args ...any) ([]any, error) {
	return s.changeWith(ctx, sc, svc, nil, args...)
}

// changeWith is change, of a script with keys of its own.
func (s *Store) changeWith(ctx context.Context, sc *redis.Script, svc Service, own []string, args ...any) ([]any, error) {
	mark := rand.Text()
	argv := append([]any{s.keys.Changes(), string(svc), s.now, mark}, args...)
	r, err := sc.Run(ctx, s.rdb, s.keys.Of(svc).change(svc, own...), argv...).Slice()
	if err != nil {
		return nil, err
	}
	r, unsaid := withheld(r, svc, mark)
	s.announceLater(ctx, unsaid)
	return r, nil
}

// announceLater waits until u may be announced, and does so; early if ctx ends.
func (s *Store) announceLater(ctx context.Context, u Unsaid) {
	if u.At.IsZero() {
		return
	}
	wait := time.NewTimer(time.Until(u.At))
	defer wait.Stop()
	select {
	case <-ctx.Done():
		// Nobody else speaks while this call's mark is there: better early.
		var done context.CancelFunc
		ctx, done = WithTimeout(context.WithoutCancel(ctx))
		defer done()
	case <-wait.C:
	}
	_ = s.Announce(ctx, u) // the change is made, and who has not heard of it polls
}

// Unsaid is a change that was not announced at once, since another one had just
// been, to many. The zero value is none.
type Unsaid struct {
	At      time.Time // from when on Announce may be called; with the monotonic clock
	service Service
	mark    string
}

// withheld takes off a script's reply the word that the call must announce later.
func withheld(r []any, svc Service, mark string) ([]any, Unsaid) {
	if len(r) == 0 {
		return r, Unsaid{}
	}
	last, _ := r[len(r)-1].([]any)
	if len(last) != 2 || text(last[0]) != "QUIET" {
		return r, Unsaid{}
	}
	// Redis' clock runs to whole milliseconds.
	return r[:len(r)-1], Unsaid{time.Now().Add(millis(integer(last[1]) + 1)), svc, mark}
}

// Announce says what was not said, unless somebody has since. Without it the
// change is found by the next poll.
func (s *Store) Announce(ctx context.Context, u Unsaid) error {
	argv := []any{s.keys.Changes(), string(u.service), s.now, rand.Text(), u.mark}
	if err := s.announce.Run(ctx, s.rdb, s.keys.Of(u.service).change(u.service), argv...).Err(); err != nil {
		return fmt.Errorf("announce a change of %s: %w", u.service, err)
	}
	return nil
}

// BeatStatus is what a beat came to.
type BeatStatus string

// The outcomes of an accepted beat.
const (
	BeatOK      BeatStatus = "OK"      // the score moved
	BeatNew     BeatStatus = "NEW"     // the instance arrived
	BeatChanged BeatStatus = "CHANGED" // its metadata changed
	BeatTaken   BeatStatus = "TAKEN"   // it took the address over
)

// Beat is one heartbeat. Meta is the JSON of the registration with Token as
// its id.
type Beat struct {
	Addr     netip.AddrPort
	Token    string
	Meta     string
	Agent    string        // take over at once what the same agent registered: its Meta.Agent
	Interval time.Duration // 0 = the registry's own

	first bool // of its registration
}

// decides tells whether beat.lua must decide about the heartbeat: a first one hardly
// ever is a steady one.
func (b Beat) decides() bool { return b.first || b.Agent != "" }

// BeatReply is the register's answer. Version is 0 unless the beat was a
// change. Held and Silent go with ErrNotOwner: when the holder of the address beat
// last, unix ms by Redis' clock, and how long ago that is.
type BeatReply struct {
	Status        BeatStatus
	Version       int64
	TTL, Interval time.Duration
	Held          int64
	Silent        time.Duration
	Overridden    bool // it came, to an address of which operators have said something
}

// Beat records a heartbeat of svc. It returns ErrLeft, ErrNotOwner, ErrInterval
// or ErrFull, with the registry's TTL and interval in the reply, if Redis
// answered and wrote nothing.
func (s *Store) Beat(ctx context.Context, svc Service, b Beat) (BeatReply, error) {
	what := fmt.Sprintf("beat %s %s", svc, b.Addr)
	if len(b.Meta) > MaxMeta {
		return BeatReply{}, fmt.Errorf("%s: %d bytes of metadata, at most %d", what, len(b.Meta), MaxMeta)
	}
	if s.keys.cluster {
		s.enlist(ctx, svc)
	}
	if !b.decides() {
		if reply, done, err := s.steady(ctx, svc, b); err != nil {
			return BeatReply{}, fmt.Errorf("%s: %w", what, err)
		} else if done {
			s.relist(ctx, svc)
			return reply, nil
		}
	}
	return s.decide(ctx, svc, b)
}

// decide runs beat.lua.
func (s *Store) decide(ctx context.Context, svc Service, b Beat) (BeatReply, error) {
	what := fmt.Sprintf("beat %s %s", svc, b.Addr)
	r, err := s.change(ctx, s.beat, svc, b.Addr.String(), b.Token, b.Meta, b.Agent, b.Interval.Milliseconds())
	if err != nil {
		return BeatReply{}, fmt.Errorf("%s: %w", what, err)
	}
	overridden := len(r) == 6
	if overridden {
		overridden, r = integer(r[5]) == 1, r[:5]
	}
	status, err := word(r, 5)
	if err != nil {
		return BeatReply{}, fmt.Errorf("%s: %w", what, err)
	}
	reply := BeatReply{Overridden: overridden, Status: BeatStatus(status), Version: versionOf(r[2]), TTL: millis(integer(r[3])), Interval: millis(integer(r[4]))}
	if reply.TTL <= 0 || reply.Interval <= 0 {
		return BeatReply{}, fmt.Errorf("%s: unknown answer %s", what, quoted(r))
	}
	switch reply.Status {
	case BeatOK, BeatNew, BeatChanged, BeatTaken:
		return reply, nil
	case "LEFT":
		err = ErrLeft
	case "NOTOWNER":
		err = ErrNotOwner
		reply.Held, reply.Silent = reply.Version, millis(integer(r[1])-reply.Version)
	case "INTERVAL":
		err = fmt.Errorf("%w: %w", ErrInterval, CheckInterval(b.Interval, reply.TTL))
	case "INSTANCES":
		err = s.full(svc, "instances of "+string(svc), "max_instances", reply.Version)
	case "SERVICES":
		err = s.full(svc, "services", "max_services", reply.Version)
	default:
		err = fmt.Errorf("unknown answer %q", status)
	}
	reply.Version = 0
	return reply, fmt.Errorf("%s: %w", what, err)
}

// full says which limit keeps a newcomer out, and how to raise it.
func (s *Store) full(svc Service, of, field string, most int64) error {
	return fmt.Errorf("%w: there are %d %s, the most that the registry takes; take out who is not needed, or raise it: redis-cli hset %s %s %d",
		ErrFull, most, of, s.keys.Of(svc).Config(), field, max(2*most, 1))
}

// steady runs still.lua. It tells whether that was all there is to this beat.
func (s *Store) steady(ctx context.Context, svc Service, b Beat) (reply BeatReply, done bool, err error) {
	k := s.keys.Of(svc)
	keys := []string{k.Instances(svc), k.Meta(svc), k.Config()}
	r, err := s.still.Run(ctx, s.rdb, keys, s.now, b.Addr.String(), b.Meta, b.Interval.Milliseconds()).Slice()
	if err != nil || len(r) == 1 && text(r[0]) == "BEAT" {
		return BeatReply{}, false, err
	}
	status, err := word(r, 3)
	if err != nil {
		return BeatReply{}, false, err
	}
	reply = BeatReply{Status: BeatStatus(status), TTL: millis(integer(r[1])), Interval: millis(integer(r[2]))}
	if reply.Status != BeatOK || reply.TTL <= 0 || reply.Interval <= 0 {
		return BeatReply{}, false, fmt.Errorf("unknown answer %s", quoted(r))
	}
	return reply, true, nil
}

// Leave takes the token's instance out, or, if it is out already, keeps a late
// beat of the token from bringing it back. It returns the service's version
// after that, and ErrNotOwner if the address is another's.
func (s *Store) Leave(ctx context.Context, svc Service, addr netip.AddrPort, token string, why Reason) (int64, error) {
	what := fmt.Sprintf("leave %s %s", svc, addr)
	r, err := s.change(ctx, s.leave, svc, addr.String(), token, string(why))
	if err != nil {
		return 0, fmt.Errorf("%s: %w", what, err)
	}
	switch status, err := word(r, 2); {
	case err != nil:
		return 0, fmt.Errorf("%s: %w", what, err)
	case status == "OK" || status == "SAME":
		return versionOf(r[1]), nil
	case status == "NOTOWNER":
		return 0, fmt.Errorf("%s: %w", what, ErrNotOwner)
	default:
		return 0, fmt.Errorf("%s: unknown answer %q", what, status)
	}
}

// Deregister takes an instance out on an operator's word and returns the
// service's version after that; ErrAbsent if there is none, ErrBeats if its
// last beat is younger than two intervals and force is not set. by is a Word's By.
func (s *Store) Deregister(ctx context.Context, svc Service, addr netip.AddrPort, force bool, by string) (int64, error) {
	what := fmt.Sprintf("deregister %s %s", svc, addr)
	if err := checkBy(by); err != nil {
		return 0, fmt.Errorf("%s: %w", what, err)
	}
	r, err := s.change(ctx, s.deregister, svc, addr.String(), flag(force), by)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", what, err)
	}
	switch status, err := word(r, 3); {
	case err != nil:
		return 0, fmt.Errorf("%s: %w", what, err)
	case status == "OK":
		return versionOf(r[1]), nil
	case status == "ABSENT":
		return 0, fmt.Errorf("%s: %w", what, ErrAbsent)
	case status == "BEATS":
		return 0, fmt.Errorf("%s: %w: last beat %v ago", what, ErrBeats, millis(integer(r[2])))
	default:
		return 0, fmt.Errorf("%s: unknown answer %q", what, status)
	}
}

// Word is an operator's word about one address.
type Word struct {
	Verb   string // drain, maint, ready or weight
	Weight *int   // with weight; nil = the instance's own again
	Reason string // with drain and maint; at most MaxText bytes
	Force  bool   // also of the last that serves
	Known  bool   // only of an address that somebody has, or that a word stands for
	By     string // who says it, for people; at most MaxText bytes, empty = nobody knows
	// For is how long it holds: a reaper ends it then. 0 = until somebody says ready, or
	// that the weight is the instance's own again. At most MaxFor.
	For   time.Duration
	Scope Scope
}

// Scope is whom an operator's word is about.
type Scope string

// The scopes.
const (
	// ScopeDefault is ScopeRegistration where the metadata says that the address is the
	// instance's own, and else ScopeAddress. What ends an override ends both.
	ScopeDefault      Scope = ""
	ScopeAddress      Scope = "address"      // whoever has it, now and later
	ScopeRegistration Scope = "registration" // that is there now; it ends with it
)

// MaxFor is the longest time for which an override can be said to hold.
const MaxFor = 366 * 24 * time.Hour

// check refuses a word that is none, and returns its weight as admin.lua takes it.
func (w Word) check() (weight string, err error) {
	switch w.Verb {
	case "drain", "maint", "ready", "weight":
	default:
		return "", errors.New("unknown verb")
	}
	if len(w.Reason) > MaxText {
		return "", fmt.Errorf("reason of %d bytes, at most %d", len(w.Reason), MaxText)
	}
	if err := checkBy(w.By); err != nil {
		return "", err
	}
	if w.For != 0 && (w.For < time.Second || w.For > MaxFor) {
		return "", fmt.Errorf("for %v: want %v to %v", w.For, time.Second, MaxFor)
	}
	if w.Weight == nil {
		return "", nil
	}
	return strconv.Itoa(*w.Weight), CheckWeight(*w.Weight)
}

// args are admin.lua's own, of a word about addr. weight is what check returned, and
// version the one that the service must be of; empty = any.
func (w Word) args(addr netip.AddrPort, weight, version string) []any {
	return []any{addr.String(), w.Verb, weight, w.Reason, version, flag(w.Known), w.By, w.For.Milliseconds(), string(w.Scope)}
}

// Written is what became of an operator's word about one address.
type Written struct {
	Addr    netip.AddrPort
	Version int64 // of the service, after it
	Present bool  // somebody has the address; the word holds either way
	Scope   Scope // ScopeAddress or ScopeRegistration: whom it is about
	Until   int64 // when a reaper ends it, unix ms by Redis' clock; 0 = somebody must
	Err     error // of a Bulk: why it is not written, or not known to be
}

// written reads an answer of admin.lua.
func written(addr netip.AddrPort, r []any) (o Written, status string, err error) {
	if status, err = word(r, 5); err != nil {
		return Written{Addr: addr}, "", err
	}
	o = Written{Addr: addr, Version: versionOf(r[1]), Present: integer(r[2]) == 1, Scope: Scope(text(r[3])), Until: integer(r[4])}
	return o, status, nil
}

// SetAdmin is SetOverride. It returns the service's version after that and whether the
// instance is there.
func (s *Store) SetAdmin(ctx context.Context, svc Service, addr netip.AddrPort, w Word) (version int64, present bool, err error) {
	o, err := s.SetOverride(ctx, svc, addr, w)
	return o.Version, o.Present, err
}

// SetOverride writes an operator's word. It holds whether or not the instance is there,
// unless it is to be Known: then it returns ErrAbsent for an address that nobody has. So
// it does for a registration where nobody is registered. maint and
// weight 0 take at once, so without Force they return ErrLast, and write nothing, if
// addr is the last that serves, as far as live balancers have said.
func (s *Store) SetOverride(ctx context.Context, svc Service, addr netip.AddrPort, w Word) (Written, error) {
	what := fmt.Sprintf("%s %s %s", w.Verb, svc, addr)
	weight, err := w.check()
	if err != nil {
		return Written{}, fmt.Errorf("%s: %w", what, err)
	}
	for tries := lastTries; ; tries-- {
		weighed, err := s.weigh(ctx, svc, addr, w)
		if err != nil {
			return Written{}, fmt.Errorf("%s: %w", what, err)
		}
		if tries == 1 {
			weighed = ""
		}
		r, err := s.changeWith(ctx, s.admin, svc, s.keys.Of(svc).overrides(svc), w.args(addr, weight, weighed)...)
		if err != nil {
			return Written{}, fmt.Errorf("%s: %w", what, err)
		}
		o, status, err := written(addr, r)
		if err != nil {
			return Written{}, fmt.Errorf("%s: %w", what, err)
		}
		if status == "ABSENT" {
			return o, fmt.Errorf("%s: %w", what, ErrAbsent)
		}
		if status != "STALE" {
			return o, nil
		}
	}
}

// Services returns the names on the list of services, in no order: those that have
// instances, and such as a reaper has not taken off yet. Names that are none are left
// out and returned as garbage. Of more than 100,000 it returns so many, and
// ErrManyServices.
func (s *Store) Services(ctx context.Context) (names []Service, garbage []string, err error) {
	if s.keys.scope != "" {
		return []Service{s.keys.scope}, nil, nil
	}
	// All of them, unless there are more.
	all, err := s.rdb.SRandMemberN(ctx, s.keys.Services(), ReadLimit+1).Result()
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", s.keys.Services(), err)
	}
	if len(all) > ReadLimit {
		all, err = all[:ReadLimit], fmt.Errorf("read %s: %w: more than %d; reapers take off those that are empty", s.keys.Services(), ErrManyServices, ReadLimit)
	}
	for _, n := range all {
		if svc, err := ParseService(n); err == nil {
			names = append(names, svc)
		} else {
			garbage = append(garbage, n)
		}
	}
	return names, garbage, err
}

// Unlist takes those of svcs that have no instances off the list of services. Of a
// Cluster, where the list has another slot, nobody looks whether they have some: a
// sidecar that beats adds its service again within a minute.
func (s *Store) Unlist(ctx context.Context, svcs ...Service) error {
	names, keys := make([]any, len(svcs)), []string{s.keys.Services()}
	for i, svc := range svcs {
		names[i], keys = string(svc), append(keys, s.keys.Instances(svc))
	}
	var err error
	if s.keys.cluster {
		err = s.rdb.SRem(ctx, s.keys.Services(), names...).Err()
	} else {
		err = s.unlist.Run(ctx, s.rdb, keys, names...).Err()
	}
	if err != nil {
		return fmt.Errorf("take %d names off %s: %w", len(svcs), s.keys.Services(), err)
	}
	return nil
}

// Census notes how many services have instances. Newcomers are counted against it,
// since anybody who may beat for one service may put any number of names on the list.
func (s *Store) Census(ctx context.Context, services int) error {
	if err := s.rdb.HSet(ctx, s.keys.Config(), "services", services).Err(); err != nil {
		return fmt.Errorf("write %s: %w", s.keys.Config(), err)
	}
	return nil
}

// Pulse is Redis' answer to a reaper's pulse.
type Pulse struct {
	Now      int64 // unix ms by Redis' clock
	ReplID   string
	Epoch    string // before the call; empty if there was none
	Previous string // the token that this pulse replaced; empty if there was none
}

// Pulse writes token as the last pulse of the reaper id. Redis forgets it after
// expiry.
func (s *Store) Pulse(ctx context.Context, id, token string, expiry time.Duration) (Pulse, error) {
	keys := []string{s.keys.Reaper(id), s.keys.Epoch()}
	if s.keys.scope != "" {
		// While a slot moves, or is stuck half way, a node refuses a call for a key
		// that it lacks. So that no pulse passes where a beat does not, it names all
		// of a beat's keys.
		keys = append(keys, s.keys.change(s.keys.scope)...)
	}
	r, err := s.pulse.Run(ctx, s.rdb, keys, token, rand.Text(), expiry.Milliseconds(), s.now).Slice()
	if err != nil {
		return Pulse{}, fmt.Errorf("pulse: %w", err)
	}
	if len(r) != 4 {
		return Pulse{}, fmt.Errorf("pulse: answer of %d parts, want 4", len(r))
	}
	p := Pulse{integer(r[0]), text(r[1]), text(r[2]), text(r[3])}
	if p.ReplID == noHistory {
		return Pulse{}, fmt.Errorf("pulse: %w", ErrNoHistory)
	}
	if p.Now <= 0 || p.ReplID == "" {
		return Pulse{}, fmt.Errorf("pulse: answer %s without time or replication id", quoted(r))
	}
	return p, nil
}

// Count is what a survey says of one service. What is no address is garbage: it
// is no member and no suspect. Of more than 1,000 suspects in one call of the
// script, the rest is taken for addresses.
type Count struct {
	Service  Service
	Members  int64
	Stale    int64 // before the cut-off
	Garbage  int64 // before the cut-off, and no address
	Suspects int64 // before the suspect cut-off
	Future   int64 // scores after now
	Oldest   int64 // the oldest score, unix ms; 0 without members
	Mistyped bool  // the key holds something else; nothing is known
}

// Survey counts. It reads no members but suspects. Times are unix ms by Redis'
// clock; suspect is not before cutoff.
func (s *Store) Survey(ctx context.Context, svcs []Service, now, cutoff, suspect int64) ([]Count, error) {
	chunk := surveyKeys
	if s.keys.cluster {
		chunk = 1 // each has a slot of its own
	}
	counts := make([]Count, 0, len(svcs))
	for len(svcs) > 0 {
		part := svcs[:min(chunk, len(svcs))]
		svcs = svcs[len(part):]
		keys := make([]string, len(part))
		for i, svc := range part {
			keys[i] = s.keys.Instances(svc)
		}
		r, err := s.survey.RunRO(ctx, s.rdb, keys, now, cutoff, suspect, surveyLimit).Slice()
		if err != nil {
			return nil, fmt.Errorf("survey of %d services: %w", len(part), err)
		}
		if len(r) != 6*len(part) {
			return nil, fmt.Errorf("survey of %d services: answer of %d parts", len(part), len(r))
		}
		for i, svc := range part {
			f := r[6*i : 6*i+6]
			c := Count{Service: svc, Members: integer(f[0]), Stale: integer(f[1]), Suspects: integer(f[2]), Future: integer(f[3])}
			c.Mistyped = c.Members < 0
			if score, err := strconv.ParseFloat(text(f[4]), 64); err == nil && score > 0 && score < 1e15 {
				c.Oldest = int64(score)
			}
			c.discard(f[5])
			counts = append(counts, c)
		}
	}
	return counts, nil
}

// Stale returns the addresses of svc that beat before the cut-off, unix ms by Redis'
// clock, the oldest first, at most as many as most, from the nth on. What is no address
// is left out.
func (s *Store) Stale(ctx context.Context, svc Service, cutoff int64, nth, most int) ([]netip.AddrPort, error) {
	key := s.keys.Instances(svc)
	members, err := s.rdb.ZRangeByScore(ctx, key, &redis.ZRangeBy{Min: "-inf", Max: "(" + strconv.FormatInt(cutoff, 10), Offset: int64(nth), Count: int64(most)}).Result()
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", key, ofService(err))
	}
	var addrs []netip.AddrPort
	for _, m := range members {
		if a, err := ParseAddr(m); err == nil {
			addrs = append(addrs, a)
		}
	}
	return addrs, nil
}

// discard takes garbage out of the counts. The suspects that were read are the
// oldest ones, so the stale ones are the first of them.
func (c *Count) discard(suspects any) {
	read, _ := suspects.([]any)
	stale := c.Stale
	for i, m := range read {
		if _, err := ParseAddr(text(m)); err == nil {
			continue
		}
		c.Members--
		c.Suspects--
		if int64(i) < stale {
			c.Stale--
			c.Garbage++
		}
	}
}

// Sweep is a reaper's licence to remove: its pulse and the cut-off proven by it.
type Sweep struct {
	ID     string        // the reaper
	Token  string        // of its last pulse
	ReplID string        // that this pulse saw
	Last   int64         // time of that pulse, unix ms by Redis' clock
	MaxAge time.Duration // of that pulse
	Cutoff int64         // who beat before it is out, unix ms
	// LetGo, if not 0, takes out only the oldest, never the last of the service that
	// can be read, and nobody of any service if a reaper has let go within so long
	// before.
	LetGo time.Duration
	// Replaced, if not empty, takes out only these, also the last of the service: each
	// with the service that beats at its address; see Elsewhere. At most 100.
	Replaced map[netip.AddrPort]Service
}

// Reaped is what one call of Reap did.
type Reaped struct {
	Addrs   []string
	Version int64 // of the service, after the call; 0 if nobody went
	Left    int64 // how many more are before the cut-off
	Unsaid  Unsaid
}

// Reap takes out of svc at most 100 instances that beat before the cut-off. An
// address is in exactly one answer, whatever number of reapers run. It returns
// ErrFenced or ErrLate if the licence is void, ErrBroken if another service may still
// be reaped, and ErrLastLeft if it was to let go and could not.
func (s *Store) Reap(ctx context.Context, svc Service, w Sweep) (Reaped, error) {
	mark := rand.Text()
	argv := []any{s.keys.Changes(), string(svc), s.now, mark, w.Token, w.Last, w.MaxAge.Milliseconds(), w.Cutoff, reapLimit, w.LetGo.Milliseconds(), w.ReplID}
	switch {
	case len(w.Replaced) > 0:
		argv[9] = -1
		for a, other := range w.Replaced {
			argv = append(argv, a.String(), string(other))
		}
	case w.LetGo > 0:
		stay, err := s.readable(ctx, svc)
		if err != nil {
			return Reaped{}, fmt.Errorf("reap %s: %w", svc, err)
		}
		argv = append(argv, stay...)
	}
	k := s.keys.Of(svc)
	r, err := s.reap.Run(ctx, s.rdb, k.change(svc, k.Reaper(w.ID), k.LetGo()), argv...).Slice()
	if err != nil {
		return Reaped{}, fmt.Errorf("reap %s: %w", svc, ofService(err))
	}
	if len(r) < 3 {
		return Reaped{}, fmt.Errorf("reap %s: answer of %d parts", svc, len(r))
	}
	switch status := text(r[0]); status {
	case "OK":
	case "FENCED":
		return Reaped{}, fmt.Errorf("reap %s: %w", svc, ErrFenced)
	case "LATE":
		return Reaped{}, fmt.Errorf("reap %s: %w", svc, ErrLate)
	case "LAST":
		return Reaped{}, fmt.Errorf("reap %s: %w", svc, ErrLastLeft)
	default:
		return Reaped{}, fmt.Errorf("reap %s: unknown answer %q", svc, status)
	}
	r, unsaid := withheld(r, svc, mark)
	out := Reaped{Version: versionOf(r[1]), Left: integer(r[2]), Unsaid: unsaid}
	for _, a := range r[3:] {
		out.Addrs = append(out.Addrs, text(a))
	}
	return out, nil
}

// readable returns the two instances of svc that beat last, of its newest members
// those that are no garbage: whichever of them goes, the other one stays.
func (s *Store) readable(ctx context.Context, svc Service) (addrs []any, err error) {
	k := s.keys
	r, err := s.latest.RunRO(ctx, s.rdb, []string{k.Instances(svc), k.Meta(svc), k.Admin(svc), k.Bound(svc)}, latestLimit, MaxMeta).Slice()
	if err != nil {
		return nil, ofService(err)
	}
	if len(r)%5 != 1 {
		return nil, fmt.Errorf("answer of %d parts", len(r))
	}
	found := Snapshot{Now: integer(r[0])}
	for m := range slices.Chunk(r[1:], 5) {
		found.add(text(m[0]), row{score: text(m[1]), meta: text(m[2]), admin: text(m[3]), bound: text(m[4]), hasScore: true})
	}
	for _, e := range found.Entries {
		if e.Present && len(addrs) < 2 {
			addrs = append(addrs, e.Addr.String())
		}
	}
	return addrs, nil
}

// Times are the registry's TTL and heartbeat interval.
type Times struct {
	TTL, Interval time.Duration
	// Slow is the interval, ms, by which somebody may beat who has not heard of
	// these times yet; 0 = nobody does. SlowAt names the change that it comes from.
	Slow   int64
	SlowAt string
}

// Config makes sure that the registry has a TTL and a heartbeat interval, and
// returns those in force. With overwrite it sets them.
func (s *Store) Config(ctx context.Context, ttl, interval time.Duration, overwrite bool) (Times, error) {
	// Other times would not be in force, and one whose own interval is refused by its own
	// TTL would refuse every instance.
	if err := CheckTimes(ttl.Truncate(time.Millisecond), interval.Truncate(time.Millisecond)); err != nil {
		return Times{}, fmt.Errorf("write %s: %w", s.keys.Config(), err)
	}
	r, err := s.setTimes(ctx, ttl.Milliseconds(), interval.Milliseconds(), overwrite, "", Protocol)
	if err != nil {
		return Times{}, fmt.Errorf("write %s: %w", s.keys.Config(), err)
	}
	if len(r) != 4 || integer(r[0]) <= 0 || integer(r[1]) <= 0 {
		return Times{}, fmt.Errorf("%s: unknown answer %s", s.keys.Config(), quoted(r))
	}
	return Times{millis(integer(r[0])), millis(integer(r[1])), integer(r[2]), text(r[3])}, nil
}

// Learned notes that everybody has had the time to hear of t, which Config
// returned; it does nothing if the times have changed since.
func (s *Store) Learned(ctx context.Context, t Times) error {
	if _, err := s.setTimes(ctx, t.TTL.Milliseconds(), t.Interval.Milliseconds(), false, t.SlowAt, Protocol); err != nil {
		return fmt.Errorf("write %s: %w", s.keys.Config(), err)
	}
	return nil
}

// setTimes calls config.lua. The times are ms, as numbers or as Redis has them;
// learned is the SlowAt that is proven, or empty, and protocol a reaper's, or empty.
func (s *Store) setTimes(ctx context.Context, ttl, interval any, overwrite bool, learned string, protocol any) ([]any, error) {
	keys := []string{s.keys.Config()}
	if !s.keys.cluster || s.keys.scope != "" { // the list of a whole Cluster has another slot
		keys = append(keys, s.keys.Services())
	}
	return s.config.Run(ctx, s.rdb, keys, ttl, interval, flag(overwrite), s.now, learned, protocol).Slice()
}

// Clock returns Redis' time in unix ms and the registry's TTL.
func (s *Store) Clock(ctx context.Context) (now int64, ttl time.Duration, err error) {
	node, err := s.node(ctx)
	if err != nil {
		return 0, 0, fmt.Errorf("read redis' clock: %w", err)
	}
	t, err := node.Time(ctx).Result()
	if err != nil {
		return 0, 0, fmt.Errorf("read redis' clock: %w", err)
	}
	cfg, err := s.rdb.HMGet(ctx, s.keys.Config(), "ttl_ms", "interval_ms").Result()
	if err != nil {
		return 0, 0, fmt.Errorf("read %s: %w", s.keys.Config(), err)
	}
	ttl, _ = inForce(cfg[0], cfg[1])
	return t.UnixMilli(), ttl, nil
}

// Versions are the counters of some services in one instant. A counter that is
// no number reads -1, which no token has. Of a Cluster, where each service has a
// history of its own, ReplID and Epoch are empty and Global is 0, and Of lacks
// the services that did not answer.
type Versions struct {
	ReplID, Epoch string
	Global        int64
	Of            map[Service]int64
	// Listeners is how many subscribers the change channel has; 0 if that is not
	// known, as to whom may not ask, and of a Cluster.
	Listeners int64
	tokens    map[Service]Token            // of a Cluster
	times     [2]time.Duration             // in force: TTL and interval
	timesOf   map[Service][2]time.Duration // of a Cluster
}

// InForce is the TTL and the heartbeat interval that the register of svc has; 0 if that
// is not known.
func (v Versions) InForce(svc Service) (ttl, interval time.Duration) {
	t := v.times
	if v.timesOf != nil {
		t = v.timesOf[svc]
	}
	return t[0], t[1]
}

// Token is where svc stands; the zero Token, which none that was read equals, if
// that is not known.
func (v Versions) Token(svc Service) Token {
	if v.tokens != nil {
		return v.tokens[svc]
	}
	return Token{v.ReplID, v.Epoch, v.Of[svc]}
}

// Versions reads the counters of svcs. Of a Cluster it is an error only if no
// service answers.
func (s *Store) Versions(ctx context.Context, svcs []Service) (Versions, error) {
	if s.keys.cluster && s.keys.scope == "" {
		return s.versionsEach(ctx, svcs)
	}
	keys := make([]string, 0, len(svcs)+3)
	keys = append(keys, s.keys.Epoch(), s.keys.Config(), s.keys.Version())
	for _, svc := range svcs {
		keys = append(keys, s.keys.ServiceVersion(svc))
	}
	var argv []any
	if !s.keys.cluster {
		argv = []any{s.keys.Changes()}
	}
	r, err := s.versions.RunRO(ctx, s.rdb, keys, argv...).Slice()
	if err != nil {
		return Versions{}, fmt.Errorf("read versions: %w", err)
	}
	if len(r) != len(svcs)+6 {
		return Versions{}, fmt.Errorf("read versions: answer of %d parts, want %d", len(r), len(svcs)+6)
	}
	v := Versions{
		ReplID: text(r[0]), Epoch: text(r[1]), Listeners: integer(r[2]), Global: integer(r[5]), Of: make(map[Service]int64, len(svcs)),
		times: [2]time.Duration{millis(integer(r[3])), millis(integer(r[4]))},
	}
	for i, svc := range svcs {
		v.Of[svc] = integer(r[6+i])
	}
	return v, nil
}

// Read returns one consistent read of svc: what changed since a token, or all
// of it if since is nil or names another history. Twice as many instances as are
// served, and 100,000 notes, which no sidecar can have written, are not read: that is
// an error. A text of more than MaxMeta bytes is garbage, and so are instances beyond
// the limit. A call holds Redis for no more than 1,000 entries.
func (s *Store) Read(ctx context.Context, svc Service, since *Token) (Snapshot, error) {
	snap, err := s.readOnce(ctx, svc, since, scanCount)
	if errors.Is(err, ErrLarge) {
		snap, err = s.readLarge(ctx, svc, snap.Token)
	}
	if err != nil {
		return Snapshot{}, fmt.Errorf("read %s: %w", svc, err)
	}
	return snap, nil
}

// ReadChange is Read, but returns ErrLarge where that would be many calls.
func (s *Store) ReadChange(ctx context.Context, svc Service, since Token) (Snapshot, error) {
	snap, err := s.readOnce(ctx, svc, &since, scanCount)
	if err != nil {
		return Snapshot{}, fmt.Errorf("read %s: %w", svc, err)
	}
	return snap, nil
}

// readOnce is one call of read.lua. With ErrLarge the snapshot has the token alone.
func (s *Store) readOnce(ctx context.Context, svc Service, since *Token, page int) (Snapshot, error) {
	argv := []any{deltaLimit, ReadLimit, MaxMeta, page, "", "", ""}
	if since != nil {
		argv[4], argv[5], argv[6] = since.ReplID, since.Epoch, since.Version
	}
	r, err := s.read.RunRO(ctx, s.rdb, s.keys.Of(svc).read(svc), argv...).Slice()
	if err != nil {
		return Snapshot{}, err
	}
	return parseSnapshot(svc, r, 0)
}

// largeTries is how often a large service is scanned that changes too much meanwhile.
const largeTries = 3

// readLarge reads all of svc in small calls, and then what has changed since it began.
func (s *Store) readLarge(ctx context.Context, svc Service, since Token) (Snapshot, error) {
	for tries := 1; ; tries++ {
		rows, err := s.scanService(ctx, svc)
		var refused redis.Error
		if errors.As(err, &refused) && strings.HasPrefix(refused.Error(), "NOPERM") {
			return s.readOnce(ctx, svc, nil, ReadLimit) // with the rights of an older release
		}
		if err != nil {
			return Snapshot{}, err
		}
		snap, err := s.readOnce(ctx, svc, &since, scanCount)
		switch {
		case err == nil && !snap.Full:
			whole := snap
			whole.Full, whole.Entries, whole.Garbage = true, make([]Entry, 0, len(rows)), nil
			for _, e := range snap.Entries {
				delete(rows, e.Addr.String())
			}
			for member, x := range rows {
				whole.add(member, *x)
			}
			whole.Entries = append(whole.Entries, snap.Entries...)
			whole.cut()
			return whole, nil
		case err == nil:
			return snap, nil // it has become small
		case !errors.Is(err, ErrLarge):
			return Snapshot{}, err
		case snap.Token != since && tries < largeTries:
			since = snap.Token
			continue
		}
		// There are more than are served, so that nobody reads their changes, or somebody
		// bumps the version without a change. What was read is as new as since, or newer.
		snap.Full, snap.Entries = true, make([]Entry, 0, len(rows))
		for member, x := range rows {
			snap.add(member, *x)
		}
		snap.Token = since
		snap.cut()
		return snap, nil
	}
}

// scanService reads all rows of svc in calls of 1,000 entries. What comes or goes
// meanwhile may be in it or not.
func (s *Store) scanService(ctx context.Context, svc Service) (map[string]*row, error) {
	k := s.keys.Of(svc)
	rows := map[string]*row{}
	for i, key := range []string{k.Instances(svc), k.Meta(svc), k.Admin(svc), k.Gone(svc), k.Bound(svc)} {
		set := func(x *row, value string) { x.set(i, value) }
		if i == 2 || i == 4 { // overrides, also of those who are not there, in any number
			if ok, err := s.ofMembers(ctx, key, rows, set); err != nil {
				return nil, fmt.Errorf("%s: %w", key, err)
			} else if ok {
				continue
			}
		}
		for cursor := uint64(0); ; {
			scan := s.rdb.HScan
			if i == 0 {
				scan = s.rdb.ZScan
			}
			part, next, err := scan(ctx, key, cursor, "", scanCount).Result()
			if err != nil {
				return nil, fmt.Errorf("%s: %w", key, err)
			}
			for j := 0; j+1 < len(part); j += 2 {
				member, value := shortened(part[j]), shortened(part[j+1])
				x := rows[member]
				if x == nil {
					if i != 0 && i != 3 { // metadata or an override of nobody
						continue
					}
					x = &row{}
					rows[member] = x
				}
				set(x, value)
			}
			if len(rows) > 2*ReadLimit {
				return nil, fmt.Errorf("%s has grown beyond %d entries", key, ReadLimit)
			}
			if cursor = next; cursor == 0 {
				break
			}
		}
	}
	return rows, nil
}

// ofMembers reads what the HASH has of the members, if it has more than they are twice:
// else it had better be read whole, and it returns false.
func (s *Store) ofMembers(ctx context.Context, key string, rows map[string]*row, set func(*row, string)) (bool, error) {
	n, err := s.rdb.HLen(ctx, key).Result()
	if err != nil || n <= 2*int64(len(rows)) {
		return false, err
	}
	for members := range slices.Chunk(slices.Collect(maps.Keys(rows)), scanCount) {
		values, err := s.rdb.HMGet(ctx, key, members...).Result()
		if err != nil {
			return false, err
		}
		for i, v := range values {
			if v, ok := v.(string); ok {
				set(rows[members[i]], shortened(v))
			}
		}
	}
	return true, nil
}

// shortened is a text as read.lua returns it.
func shortened(s string) string {
	if len(s) > MaxMeta {
		return "#" + strconv.Itoa(len(s))
	}
	return s
}

// Since is a service and the token from which on it is to be read.
type Since struct {
	Service Service
	Token   Token
}

// ReadChanges reads in one call what changed of several services, and returns it in
// their order. A service that has to be read whole, or that cannot be read, is left
// out: its Snapshot has no service; Read reads it, or says why not. So many services
// hold Redis no longer than one can. Each call of 20 has its own Timeout; with an
// error comes what was read before. Of a Cluster, whose services lie in different
// places, all are left out.
func (s *Store) ReadChanges(ctx context.Context, wanted []Since) ([]Snapshot, error) {
	snaps := make([]Snapshot, len(wanted))
	for n := 0; len(wanted)-n > 1 && !s.keys.cluster; n += manyServices { // a last one alone might be read whole
		part := wanted[n:min(n+manyServices, len(wanted))]
		keys := []string{s.keys.Epoch(), s.keys.Config()}
		argv := []any{deltaLimit / manyServices, ReadLimit, MaxMeta, scanCount}
		for _, w := range part {
			keys = append(keys, s.keys.read(w.Service)[2:]...)
			argv = append(argv, w.Token.ReplID, w.Token.Epoch, w.Token.Version)
		}
		tctx, cancel := WithTimeout(ctx)
		r, err := s.read.RunRO(tctx, s.rdb, keys, argv...).Slice()
		cancel()
		if err == nil && len(r) != headParts+len(part) {
			err = fmt.Errorf("answer of %d parts, want %d", len(r), headParts+len(part))
		}
		if err != nil {
			return snaps, fmt.Errorf("read %d services: %w", len(part), err)
		}
		for i, w := range part {
			if of, _ := r[headParts+i].([]any); len(of) == 1 {
				continue
			}
			if snaps[n+i], err = parseSnapshot(w.Service, r, i); err != nil {
				return snaps, fmt.Errorf("read %s: %w", w.Service, err)
			}
		}
	}
	return snaps, nil
}

// uncounted says that the version of svc is no number, and how to mend it.
func (s *Store) uncounted(svc Service) error {
	k := s.keys.Of(svc)
	return fmt.Errorf("%w: %s; redis-cli del '%s'; redis-cli set '%s' 1", ErrNoVersion, k.ServiceVersion(svc), k.Changed(svc), k.ServiceVersion(svc))
}

// broken tells a script's failure on what a key holds from a Redis that refuses
// writes: that has a code of its own, such as OOM or READONLY.
func broken(err error) bool {
	var reply redis.Error
	return errors.As(err, &reply) &&
		(strings.HasPrefix(reply.Error(), "WRONGTYPE ") || strings.Contains(reply.Error(), " is no counter: "))
}

// ofService adds ErrBroken to a script's failure on what a key holds.
func ofService(err error) error {
	if broken(err) {
		return fmt.Errorf("%w: %w", ErrBroken, err)
	}
	return err
}

func flag(b bool) string {
	if b {
		return "1"
	}
	return ""
}

func millis(ms int64) time.Duration { return time.Duration(ms) * time.Millisecond }

// word checks an answer's length and returns its status.
func word(r []any, parts int) (string, error) {
	if len(r) != parts {
		return "", fmt.Errorf("answer of %d parts, want %d", len(r), parts)
	}
	return text(r[0]), nil
}

// quoted shows an answer in an error: its texts in quotes, its numbers as such.
func quoted(r []any) string {
	parts := make([]string, len(r))
	for i, v := range r {
		if s, ok := v.(string); ok {
			v = strconv.Quote(s)
		}
		parts[i] = fmt.Sprint(v)
	}
	return "[" + strings.Join(parts, " ") + "]"
}

func text(v any) string {
	s, _ := v.(string)
	return s
}

func integer(v any) int64 {
	n, _ := v.(int64)
	return n
}
