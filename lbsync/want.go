package lbsync

import (
	"fmt"
	"net/netip"
	"time"

	"rollcall/registrar"
)

// DefaultAllow lists the networks whose addresses may reach a balancer unless
// the operator names others: private IPv4 (RFC 1918), shared address space
// (RFC 6598) and unique local IPv6 (RFC 4193). Loopback is not among them.
func DefaultAllow() []netip.Prefix {
	return []netip.Prefix{
		netip.MustParsePrefix("10.0.0.0/8"),
		netip.MustParsePrefix("172.16.0.0/12"),
		netip.MustParsePrefix("192.168.0.0/16"),
		netip.MustParsePrefix("100.64.0.0/10"),
		netip.MustParsePrefix("fc00::/7"),
	}
}

// rules are the operator's limits on what the register may do to a backend.
type rules struct {
	allow []netip.Prefix
	// hold is how long a server whose health check is up outlives the silence
	// of its heartbeat.
	hold time.Duration
}

func (r rules) allowed(a netip.Addr) bool {
	for _, p := range r.allow {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// verdict is what decide makes of one address.
type verdict struct {
	goal Goal
	// hold is how long a Leave must wait, from when it was first due.
	hold time.Duration
	// word says that somebody said so: the floor does not apply.
	word bool
	// now says that a Leave does not wait for requests under way.
	now bool
	why string // for a hold or a refusal
}

// read is what a decision needs to know of the read that its entry came from.
type read struct {
	ttl, interval time.Duration
	// moved says that the registry went to another server by its name, and that not
	// everybody can have followed yet.
	moved bool
	// doubted says that it came after an interruption, when the heartbeat was
	// older than the TTL: it may be that of an old snapshot.
	doubted bool
	// empty says that the backend has no other server that is up.
	empty bool
	// human says that the server was put into maint by somebody else, and parked
	// that it is an added one that holds its instance no longer.
	human, parked bool
	// blank says that the address is that of slots without an instance.
	blank bool
	// other is the service that beats at the address while this one is silent; "" if
	// there is none.
	other registrar.Service
}

// decide says what shall become of one address: e is what the register says of
// it, s the server that holds it, if there is one. It is the one place that
// turns absence into a removal.
func (r rules) decide(e registrar.Entry, s Server, there bool, rd read) verdict {
	maint := e.Present && admin(e.Instance.State()) == Maint
	switch {
	case e.Garbage != "":
		return verdict{goal: Keep}
	case there && rd.human && (maint || !e.Present || !r.allowed(e.Addr.Addr())):
		return verdict{goal: Keep} // until a human says ready
	case e.Present && !r.allowed(e.Addr.Addr()):
		why := fmt.Sprintf("%s is in none of the allowed networks", e.Addr.Addr())
		if there {
			return verdict{goal: Leave, word: true, why: why}
		}
		return verdict{goal: Keep, why: why}
	case e.Present && rd.blank:
		return verdict{goal: Keep, why: "slots without an instance have this address; give the server-template another one: slot.invalid:1 … init-addr last,127.0.0.1"}
	case maint && there:
		return verdict{goal: Leave, word: true, now: true}
	case maint:
		return verdict{goal: Keep}
	case e.Present:
		if out := !there || rd.parked; out && rd.doubted && !rd.empty {
			return verdict{goal: Keep, why: "its heartbeat is older than the TTL, and the register has been interrupted"}
		}
		return verdict{goal: Serve}
	case !there:
		return verdict{goal: Keep}
	case rd.parked, e.Gone != nil && e.Gone.Reason != registrar.Expired, !r.allowed(e.Addr.Addr()):
		return verdict{goal: Leave, word: true}
	}
	vouched := s.Checked && s.Up && s.Passed
	switch {
	case rd.other != "":
		return verdict{goal: Leave, word: true, now: true, why: fmt.Sprintf("service %s has its address", rd.other)}
	case vouched:
		return verdict{goal: Leave, hold: r.hold, why: "it stopped beating, but its health check is up"}
	case rd.moved:
		return verdict{goal: Leave, hold: max(rd.ttl+2*rd.interval, registrar.FollowFor), why: "the registry moved, and it may not have followed yet"}
	case e.Gone != nil:
		return verdict{goal: Leave}
	default:
		return verdict{goal: Leave, hold: rd.ttl + 2*rd.interval, why: "the register does not mention it, and not how it went"}
	}
}

// admin translates the word in force into HAProxy's.
func admin(s registrar.AdminState) Admin {
	switch s {
	case registrar.AdminDrain:
		return Drain
	case registrar.AdminMaint:
		return Maint
	}
	return Ready
}
