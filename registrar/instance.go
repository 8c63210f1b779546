package registrar

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Defaults of the protocol. A registry's own values are in its config key.
const (
	DefaultTTL      = 15 * time.Second // an instance that is silent for longer is dead
	DefaultInterval = 5 * time.Second  // between two heartbeats; at most a third of the TTL
	DefaultWeight   = 100              // of an instance that names none
	MaxWeight       = 256              // HAProxy's own limit

	DefaultMaxInstances = 20_000 // of a service
	DefaultMaxServices  = 20_000
)

var numericEnd = regexp.MustCompile(`(^|\.)([0-9]+|0[xX][0-9a-fA-F]*)\.?$`)

// nameForm is what isName accepts, in words.
const nameForm = "1 to 63 lower-case letters, digits, '.', '_' and '-', beginning with a letter or a digit"

// isName is no regexp.Regexp since each message of the channel is held against it, and
// since its repetition, ^[a-z0-9]([a-z0-9._-]{0,62})$, takes 50 kB when compiled, in
// every sidecar.
func isName(s string) bool {
	if s == "" || len(s) > 63 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && (i == 0 || c != '.' && c != '_' && c != '-') {
			return false
		}
	}
	return true
}

// Service is the name of a service, as ParseService accepts it.
type Service string

// ParseService accepts lower-case letters, digits, '.', '_' and '-', at most
// 63, beginning with a letter or a digit.
func ParseService(s string) (Service, error) {
	if !isName(s) {
		return "", fmt.Errorf("service name %q: want %s", s, nameForm)
	}
	return Service(s), nil
}

// ParseAddr accepts an instance's address in its one canonical form: an IP
// literal and a port from 1 to 65535, "10.0.0.7:8080" or "[2001:db8::1]:8080".
// It refuses zones, unspecified, multicast and broadcast addresses, IPv4 in
// IPv6 and every other spelling, so two members can never mean one address.
func ParseAddr(s string) (netip.AddrPort, error) {
	a, err := netip.ParseAddrPort(s)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("address %q: want IP:PORT", s)
	}
	if err := checkAddr(a); err != nil {
		return netip.AddrPort{}, fmt.Errorf("address %q: %w", s, err)
	}
	if a.String() != s {
		return netip.AddrPort{}, fmt.Errorf("address %q: not in its canonical form %s", s, a)
	}
	return a, nil
}

var errZone = errors.New("a zone means nothing on another host")

func checkAddr(a netip.AddrPort) error {
	ip := a.Addr()
	switch {
	case a.Port() == 0:
		return errors.New("port 0 cannot be served")
	case ip.Zone() != "":
		return errZone
	case ip.IsUnspecified():
		return errors.New("an unspecified address cannot be reached; name the interface's own")
	case ip.IsMulticast() || ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return errors.New("a multicast or broadcast address is no instance")
	case ip.Is4In6():
		return fmt.Errorf("IPv4 in IPv6; write %s", netip.AddrPortFrom(ip.Unmap(), a.Port()))
	}
	return nil
}

// ResolveAddr turns what a person types into an instance's address: an IP
// literal as it is (IPv4 in IPv6 unmapped), a host name by one look-up, of
// which it takes the first IPv4 address or else the first address.
func ResolveAddr(ctx context.Context, s string) (netip.AddrPort, error) {
	host, portText, err := net.SplitHostPort(s)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("address %q: want HOST:PORT", s)
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("address %q: port %q is no number from 1 to 65535", s, portText)
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		if ip, err = lookUp(ctx, host); err != nil {
			return netip.AddrPort{}, fmt.Errorf("address %q: %w", s, err)
		}
	}
	zone := ip.Zone() // which Unmap drops
	a := netip.AddrPortFrom(ip.Unmap(), uint16(port))
	if err := checkAddr(a); err != nil {
		return netip.AddrPort{}, fmt.Errorf("address %q: %w", s, err)
	}
	if zone != "" {
		return netip.AddrPort{}, fmt.Errorf("address %q: %w", s, errZone)
	}
	return a, nil
}

func lookUp(ctx context.Context, host string) (netip.Addr, error) {
	if host == "" {
		return netip.Addr{}, errors.New("no host; name the address that balancers can reach")
	}
	// A last label that is a number makes it a mistyped IPv4 literal, which some
	// resolvers would read as octal, as hexadecimal or as one number.
	if numericEnd.MatchString(host) {
		return netip.Addr{}, fmt.Errorf("%q is no IPv4 address", host)
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("resolve %s: %w", host, err)
	}
	if len(ips) == 0 {
		return netip.Addr{}, fmt.Errorf("resolve %s: no address", host)
	}
	return prefer4(ips), nil
}

// prefer4 returns the first IPv4 address of ips, or else the first.
func prefer4(ips []netip.Addr) netip.Addr {
	for _, ip := range ips {
		if ip.Unmap().Is4() {
			return ip.Unmap()
		}
	}
	return ips[0]
}

// CheckWeight refuses a weight outside 0 to 256.
func CheckWeight(w int) error {
	if w < 0 || w > MaxWeight {
		return fmt.Errorf("weight %d: want 0 to %d", w, MaxWeight)
	}
	return nil
}

// CheckInterval refuses a heartbeat interval that leaves room for fewer than
// three beats in a TTL.
func CheckInterval(interval, ttl time.Duration) error {
	if interval <= 0 || interval > ttl/3 {
		return fmt.Errorf("interval %v: want more than 0 and at most a third of the TTL %v, so that two lost beats cost nothing", interval, ttl)
	}
	return nil
}

// Meta is what an instance says of itself. It is stored verbatim: a beat whose
// bytes differ from the stored ones is a change.
type Meta struct {
	ID         string            `json:"id"`                 // token, new at each registration
	Weight     int               `json:"weight"`             // 0 to 256
	Zone       string            `json:"zone,omitempty"`     //
	Tags       map[string]string `json:"tags,omitempty"`     //
	Draining   bool              `json:"draining,omitempty"` // leaving: no new requests, please
	Registered int64             `json:"registered"`         // unix ms, by the instance's own clock; for display
	Agent      string            `json:"agent,omitempty"`    // the mark of the agent that registers it; at most MaxName bytes
	Own        bool              `json:"own,omitempty"`      // the address is the instance's alone, as a container's: who comes there next is another
}

// The most bytes of what people write into the register.
const (
	MaxMeta = 4096 // all the metadata of an instance, as JSON
	MaxName = 63   // of a service, a zone, a tag's key
	MaxText = 255  // a tag's value, an operator's reason
)

// CheckTag refuses a tag whose key or value is too long, or is no UTF-8 without
// control characters.
func CheckTag(key, value string) error {
	if err := checkText("tag", key, MaxName); err != nil {
		return err
	}
	return checkText("tag "+key, value, MaxText)
}

// checkText accepts at most most bytes of UTF-8 without control characters.
func checkText(what, s string, most int) error {
	if len(s) > most {
		return fmt.Errorf("%s of %d bytes, at most %d", what, len(s), most)
	}
	if !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl) {
		return fmt.Errorf("%s %q: want UTF-8 without control characters", what, s)
	}
	return nil
}

// checkBy refuses what is no name of who says something.
func checkBy(s string) error { return checkText("by", s, MaxText) }

// checkLength finds a text of which read.lua returned only the length.
func checkLength(s string) error {
	if n, long := strings.CutPrefix(s, "#"); long {
		return fmt.Errorf("%s bytes, at most %d", n, MaxMeta)
	}
	return nil
}

// parseMeta reads stored metadata. None at all is an instance that somebody
// added by hand: it has the default weight.
func parseMeta(s string) (Meta, error) {
	if s == "" {
		return Meta{Weight: DefaultWeight}, nil
	}
	if err := checkLength(s); err != nil {
		return Meta{}, fmt.Errorf("metadata: %w", err)
	}
	m := Meta{Weight: DefaultWeight}
	if err := json.Unmarshal([]byte(s), &m); err != nil {
		return Meta{}, fmt.Errorf("metadata: %w", err)
	}
	if err := CheckWeight(m.Weight); err != nil {
		return Meta{}, fmt.Errorf("metadata: %w", err)
	}
	return m, nil
}

// AdminState is an operator's word about one instance.
type AdminState string

// The words of an operator. None is the absence of one.
const (
	AdminNone  AdminState = ""
	AdminDrain AdminState = "drain" // no new requests
	AdminMaint AdminState = "maint" // no requests at all
)

// Admin is what operators have said of an address. It outlives the instance.
type Admin struct {
	State  AdminState `json:"state,omitempty"`
	Weight *int       `json:"weight,omitempty"` // in the place of the instance's own
	Reason string     `json:"reason,omitempty"`
	At     int64      `json:"at,omitempty"` // of the last change, unix ms by Redis' clock
	By     string     `json:"by,omitempty"` // who changed it last, as the client said
	// Until and WeightUntil are when a reaper ends the state and the weight, unix ms by
	// Redis' clock; 0 = somebody must. Until one does they are in force.
	Until       int64 `json:"until,omitempty"`
	WeightUntil int64 `json:"weight_until,omitempty"`
	// Away is since when nobody has had the address, or has been that registration, as
	// reapers know; 0 if somebody has, or if none has looked yet. Unix ms by Redis' clock.
	Away int64 `json:"away,omitempty"`
	// ID is the registration that it is of, if it is not of whoever has the address.
	ID string `json:"id,omitempty"`
}

// over returns what is in force for the registration id where a is said of its address
// and bound of one registration.
func (a Admin) over(bound Admin, id string) Admin {
	if bound.ID == "" || bound.ID != id {
		return a
	}
	if bound.State != AdminNone {
		a.State, a.Reason, a.Until = bound.State, bound.Reason, bound.Until
	}
	if bound.Weight != nil {
		a.Weight, a.WeightUntil = bound.Weight, bound.WeightUntil
	}
	if bound.At >= a.At {
		a.At, a.By = bound.At, bound.By
	}
	a.ID = bound.ID
	return a
}

func parseAdmin(s string) (Admin, error) {
	if s == "" {
		return Admin{}, nil
	}
	if err := checkLength(s); err != nil {
		return Admin{}, fmt.Errorf("admin word: %w", err)
	}
	var a Admin
	if err := json.Unmarshal([]byte(s), &a); err != nil {
		return Admin{}, fmt.Errorf("admin word: %w", err)
	}
	switch a.State {
	case AdminNone, AdminDrain, AdminMaint:
	default:
		return Admin{}, fmt.Errorf("admin word: unknown state %q", a.State)
	}
	if a.Weight != nil {
		if err := CheckWeight(*a.Weight); err != nil {
			return Admin{}, fmt.Errorf("admin word: %w", err)
		}
	}
	return a, nil
}

// Reason is why an address is gone.
type Reason string

// The reasons. Left, Unhealthy and Operator are somebody's word; Expired is
// only silence.
const (
	Left      Reason = "left"
	Unhealthy Reason = "unhealthy"
	Expired   Reason = "expired"
	Operator  Reason = "operator"
)

// Gone is the register's note of an address that went.
type Gone struct {
	Reason Reason
	At     int64 // unix ms by Redis' clock
	Token  string
}

func parseGone(s string) (Gone, bool) {
	f := strings.SplitN(s, " ", 3)
	if len(f) < 2 {
		return Gone{}, false
	}
	at, err := strconv.ParseInt(f[1], 10, 64)
	if err != nil {
		return Gone{}, false
	}
	g := Gone{Reason: Reason(f[0]), At: at}
	if len(f) == 3 {
		g.Token = f[2]
	}
	switch g.Reason {
	case Left, Unhealthy, Expired, Operator:
		return g, true
	}
	return Gone{}, false
}

// Instance is one address of a service as the register knows it.
type Instance struct {
	Addr  netip.AddrPort
	Beat  int64 // last heartbeat, unix ms by Redis' clock
	Meta  Meta
	Admin Admin
}

// Weight is the weight in force: the operator's if there is one.
func (i Instance) Weight() int {
	if i.Admin.Weight != nil {
		return *i.Admin.Weight
	}
	return i.Meta.Weight
}

// State is the admin state in force: the operator's word, or drain while the
// instance says that it is leaving.
func (i Instance) State() AdminState {
	if i.Admin.State == AdminNone && i.Meta.Draining {
		return AdminDrain
	}
	return i.Admin.State
}

// Entry is what a read says of one address: that it is there, or that and how
// it went (Gone is nil if the register does not know), or that what is stored
// cannot be believed (Garbage). Of the last nothing must be concluded.
type Entry struct {
	Addr     netip.AddrPort
	Present  bool
	Instance Instance // if Present
	Gone     *Gone    // if not
	Garbage  string   // why it cannot be believed; empty for all others
}

// Token names one state of one service. Two equal tokens name the same state;
// unequal ones say nothing of before and after.
type Token struct {
	ReplID  string // master_replid: another data set, or a fail-over; "-" where the user may not INFO
	Epoch   string // another epoch: the register lost its data
	Version int64
}

const (
	// MaxVersion is the highest version: of higher ones a script cannot tell each from
	// the next.
	MaxVersion = 1<<53 - 1
	// NoVersion is the version of a counter that holds something else than a number from
	// 0 to MaxVersion. It is compared with nothing.
	NoVersion = -1
)

// versionOf is a version in an answer.
func versionOf(v any) int64 {
	if n := integer(v); n >= 0 && n <= MaxVersion {
		return n
	}
	return NoVersion
}

// parseVersion is a version as it is stored.
func parseVersion(s string) int64 {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || strconv.FormatInt(n, 10) != s {
		return NoVersion
	}
	return versionOf(n)
}

// Lag is how many versions a balancer that has applied one is behind another: at
// least one if either is no number.
func Lag(version, applied int64) int64 {
	if version < 0 || applied < 0 {
		return 1
	}
	return max(0, version-applied)
}

// Nameless tells whether only the epoch and versions name the history: the user may
// not use INFO.
func (t Token) Nameless() bool { return t.ReplID == noHistory }

// Interrupted tells whether the history between t and the later u cannot be
// trusted to be one: another data set, or a version that went back. A register
// without an epoch has no history yet; its first change gives it one. A version that
// is no number any more may be any.
func (t Token) Interrupted(u Token) bool {
	if t.Epoch == "" {
		t.Epoch = u.Epoch
	}
	return t.ReplID != u.ReplID || t.Epoch != u.Epoch || u.Version < t.Version
}

// Snapshot is one consistent read of one service.
type Snapshot struct {
	Service Service
	Token   Token
	Full    bool // every address; else only those that changed since the token of the read
	Entries []Entry
	Now     int64 // unix ms by Redis' clock, of the same read
	TTL     time.Duration
	// Interval is the registry's heartbeat interval.
	Interval time.Duration
	// Garbage lists members that are no addresses at all.
	Garbage []string

	served int64 // most instances that are served
}
