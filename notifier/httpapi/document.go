package httpapi

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"rollcall/notifier"
	"rollcall/registrar"
)

// Times in the documents are unix ms by Redis' clock.

// Summary is one line of /v1/services.
type Summary struct {
	Service   registrar.Service `json:"service"`
	Version   int64             `json:"version"`
	Token     string            `json:"token"`
	Instances int               `json:"instances"` // of the register: all but the garbage and the kept
	Ready     int               `json:"ready"`     // as the register wants them
	Serving   int               `json:"serving"`   // of those: every live balancer that is to send them requests does
	Out       int               `json:"out"`       // drain, draining or maint
	Silent    int               `json:"silent"`    // whatever their state
	Absent    int               `json:"absent"`
	Garbage   int               `json:"garbage"`
	Kept      int               `json:"kept"`      // gone from the register, but not from every HAProxy
	Balancers int               `json:"balancers"` // live ones
	Behind    int64             `json:"behind"`    // versions, of the live balancer that lags most
}

// Service is the document of one service.
type Service struct {
	Service    registrar.Service `json:"service"`
	Version    int64             `json:"version"`
	Token      string            `json:"token"` // names this state among all histories
	Now        int64             `json:"now"`   // when all of it was read
	TTLMS      int64             `json:"ttl_ms"`
	IntervalMS int64             `json:"interval_ms"`
	Instances  []Instance        `json:"instances"`
	Gone       []Gone            `json:"gone"` // the last ones, the latest first
	Balancers  []Balancer        `json:"balancers"`
	// Away are overrides that are in force for no instance, the first 1,000 by address:
	// they are not members of the service. AwayCount is of all, and AwayAt when they were
	// read; 0 = not yet.
	Away      []Away `json:"away"`
	AwayCount int    `json:"away_count"`
	AwayAt    int64  `json:"away_at"`
}

// States of an Instance, beside drain and maint.
const (
	stateReady    = "ready"
	stateDraining = "draining" // by its own word: it is leaving
	stateAbsent   = "absent"   // Redis came back without it; kept for TTL + 2 heartbeats
	stateGarbage  = "garbage"  // what is stored cannot be believed
	stateGone     = "gone"     // from the register, but a balancer says why it has it still
)

// Instance is one address.
type Instance struct {
	Addr       string            `json:"addr"`
	State      string            `json:"state"`
	Silent     bool              `json:"silent"` // has missed heartbeats and may be dead
	Weight     int               `json:"weight"`
	Beat       int64             `json:"beat"`
	AgeMS      int64             `json:"age_ms"` // of the last heartbeat, when it was read
	Zone       string            `json:"zone,omitempty"`
	Tags       map[string]string `json:"tags,omitempty"`
	ID         string            `json:"id,omitempty"`
	Registered int64             `json:"registered,omitempty"` // by its own clock
	Reason     string            `json:"reason,omitempty"`     // of the state
	Word       *Word             `json:"word,omitempty"`       // an operator's
	// Serving is how many of Balancers, the live ones that are to serve it, send it requests.
	Serving   int         `json:"serving"`
	Balancers int         `json:"balancers"`
	HAProxy   []InHAProxy `json:"haproxy,omitempty"`
}

// served tells whether all that are to serve it do.
func (i Instance) served() bool { return i.Balancers > 0 && i.Serving == i.Balancers }

// InHAProxy is what one balancer found of an instance in one backend, at its
// last look.
type InHAProxy struct {
	Balancer string `json:"balancer"`
	Backend  string `json:"backend"`
	Serving  bool   `json:"serving"` // it gets new requests
	registrar.ServerState
}

// Gone is an address that went.
type Gone struct {
	Addr   string           `json:"addr"`
	Reason registrar.Reason `json:"reason"`
	At     int64            `json:"at"`
}

// Balancer is one balancer of one service.
type Balancer struct {
	Balancer string            `json:"balancer"`
	Service  registrar.Service `json:"service"`
	Applied  int64             `json:"applied"` // version
	Behind   int64             `json:"behind"`  // versions
	BehindMS int64             `json:"behind_ms"`
	Seen     int64             `json:"seen"` // 0 if unknown
	Live     bool              `json:"live"`
	Double   bool              `json:"double,omitempty"` // two lbsyncs acknowledge as it, and one is not heard
}

// goneLimit is how many departures a document has.
const goneLimit = 20

// tokenText spells a token for clients, who only compare it.
func tokenText(t registrar.Token) string {
	return t.ReplID + "." + t.Epoch + "." + strconv.FormatInt(t.Version, 10)
}

// service is what is known of one service. The picture's mutex guards it.
type service struct {
	name   registrar.Service
	view   notifier.View
	read   map[netip.AddrPort]int64 // when each was read, by Redis' clock
	absent map[netip.AddrPort]absence
	whole  time.Time // the last whole read, by this process' clock
	now    int64     // of it, by Redis' clock
	acks   []registrar.Balancer
	sights []registrar.Sight
	away   away
	lag    map[string]time.Time // since when each live balancer is behind
	empty  time.Time            // since when it has no instance; zero = it has

	doc     *document
	history []point

	// What streams have been told of, which lags behind doc while it changes all the
	// time: the seq of the telling, and the doc's own.
	told, toldDoc int64
	toldAt        time.Time

	due   time.Time     // its balancers are asked again
	pause time.Duration // after that, while it is not settled
	since time.Time     // when that was first seen; zero = it is
}

// absence is an instance that Redis no longer mentions, without a word of why.
type absence struct {
	last  Instance
	until time.Time
}

// document is one state of a service, never changed.
type document struct {
	seq     int64 // of its last change
	beats   int64 // seq of its last heartbeats
	token   registrar.Token
	summary Summary
	Service
	json func() []byte // the Service
	ages func() []byte // its heartbeats
}

// fold takes a change in, and tells whether it may have left an override without its
// instance.
func (s *service) fold(c notifier.Change, now time.Time) (frees bool) {
	frees = c.Full
	old := map[string]Instance{}
	if s.doc != nil {
		for _, i := range s.doc.Instances {
			old[i.Addr] = i
		}
	}
	if c.Full {
		s.read = make(map[netip.AddrPort]int64, len(c.Entries))
		s.whole, s.now = now, c.Now
	}
	for _, addr := range s.view.Apply(c) {
		e := s.view.Lookup(addr)
		s.read[addr] = c.Now
		last, shown := old[addr.String()]
		frees = frees || !e.Present || shown && last.ID != e.Instance.Meta.ID
		switch _, kept := s.absent[addr]; {
		case e.Present || e.Gone != nil || e.Garbage != "":
			delete(s.absent, addr)
		case shown && !kept && last.State != stateGarbage:
			s.absent[addr] = absence{last, now.Add(c.TTL + 2*c.Interval)}
		}
	}
	return frees
}

// build makes the document of what is known now.
func (s *service) build(now time.Time) *document {
	d := &document{token: s.view.Token, Service: Service{
		Service: s.name, Version: s.view.Token.Version, Token: tokenText(s.view.Token), Now: s.now,
		TTLMS: s.view.TTL.Milliseconds(), IntervalMS: s.view.Interval.Milliseconds(),
		Instances: []Instance{}, Gone: []Gone{}, Balancers: []Balancer{},
	}}
	of := registrar.Served{Acks: registrar.Acks{Balancers: s.acks}, Sights: s.sights}
	// As a reaper has it: who has missed a heartbeat and a little more.
	suspect := (s.view.TTL - s.view.Interval - s.view.Interval/10).Milliseconds()
	s.view.Each(func(e registrar.Entry) {
		switch {
		case e.Garbage != "":
			d.Instances = append(d.Instances, Instance{Addr: e.Addr.String(), State: stateGarbage, Reason: e.Garbage, HAProxy: s.inHAProxy(e.Addr)})
		case e.Present:
			i := instance(e.Instance, s.read[e.Addr], suspect)
			by := of.By(e.Addr)
			i.Serving, i.Balancers, i.HAProxy = by.Serving, by.Of, s.inHAProxy(e.Addr)
			d.Instances = append(d.Instances, i)
		case e.Gone != nil:
			d.Gone = append(d.Gone, Gone{e.Addr.String(), e.Gone.Reason, e.Gone.At})
		}
	})
	for addr := range s.kept() {
		i := Instance{Addr: addr.String(), State: stateGone, HAProxy: s.inHAProxy(addr)}
		if gone := s.view.Lookup(addr).Gone; gone != nil {
			i.Reason = string(gone.Reason)
		}
		d.Instances = append(d.Instances, i)
	}
	for addr, a := range s.absent {
		i := a.last
		i.State, i.Reason, i.HAProxy = stateAbsent, "Redis came back without it", s.inHAProxy(addr)
		d.Instances = append(d.Instances, i)
	}
	slices.SortFunc(d.Instances, func(a, b Instance) int { return compareAddr(a.Addr, b.Addr) })
	slices.SortFunc(d.Gone, func(a, b Gone) int { return cmp.Or(cmp.Compare(b.At, a.At), strings.Compare(a.Addr, b.Addr)) })
	d.Gone = d.Gone[:min(len(d.Gone), goneLimit)]
	for _, b := range s.acks {
		row := Balancer{Balancer: b.ID, Service: s.name, Applied: b.Applied, Seen: b.Seen, Live: b.Live, Double: b.Double, Behind: registrar.Lag(d.Version, b.Applied)}
		if since, ok := s.lag[b.ID]; ok {
			row.BehindMS = now.Sub(since).Milliseconds()
		}
		d.Balancers = append(d.Balancers, row)
	}
	d.Away, d.AwayCount = s.missing()
	d.AwayAt = s.away.at
	d.summary = d.sum()
	d.json = sync.OnceValue(func() []byte { return encode(d.Service) })
	d.ages = sync.OnceValue(func() []byte {
		ages := make(map[string]int64, len(d.Instances))
		for _, i := range d.Instances {
			ages[i.Addr] = i.AgeMS
		}
		return encode(struct {
			Service registrar.Service `json:"service"`
			Now     int64             `json:"now"`
			AgeMS   map[string]int64  `json:"age_ms"`
		}{d.Service.Service, d.Now, ages})
	})
	return d
}

// kept returns the addresses that the register does not have, and that a
// balancer has and says why.
func (s *service) kept() map[netip.AddrPort]bool {
	out := map[netip.AddrPort]bool{}
	for _, sight := range s.sights {
		for addr, states := range sight.Servers {
			_, absent := s.absent[addr]
			if e := s.view.Lookup(addr); absent || e.Present || e.Garbage != "" {
				continue
			}
			for _, state := range states {
				if state.Server != "" && state.Note != "" {
					out[addr] = true
				}
			}
		}
	}
	return out
}

// settled tells whether every balancer has what the register asks for, or says
// why not for long.
func (s *service) settled() bool {
	for _, i := range s.doc.Instances {
		for _, in := range i.HAProxy {
			if in.Note == registrar.NoteLeaving || in.Note == registrar.NoteWaits {
				return false
			}
			if i.State == stateReady && !i.Silent && i.Weight > 0 && !in.Serving {
				return false
			}
		}
	}
	return len(s.lag) == 0
}

// inHAProxy is what live balancers have of an address, by balancer and backend.
func (s *service) inHAProxy(addr netip.AddrPort) []InHAProxy {
	var out []InHAProxy
	for _, sight := range s.sights {
		for backend, state := range sight.Servers[addr] {
			out = append(out, InHAProxy{sight.Balancer, backend, state.Serving(), state})
		}
	}
	slices.SortFunc(out, func(a, b InHAProxy) int {
		return cmp.Or(strings.Compare(a.Balancer, b.Balancer), strings.Compare(a.Backend, b.Backend))
	})
	return out
}

func instance(i registrar.Instance, read, suspect int64) Instance {
	out := Instance{
		Addr: i.Addr.String(), State: stateReady, Weight: i.Weight(), Beat: i.Beat, AgeMS: max(0, read-i.Beat),
		Zone: i.Meta.Zone, Tags: i.Meta.Tags, ID: i.Meta.ID, Registered: i.Meta.Registered, Reason: i.Admin.Reason, Word: newWord(i.Admin),
	}
	switch {
	case i.Admin.State != registrar.AdminNone:
		out.State = string(i.Admin.State)
	case i.Meta.Draining:
		out.State = stateDraining
	}
	out.Silent = out.AgeMS > suspect
	return out
}

func (d *document) sum() Summary {
	s := Summary{Service: d.Service.Service, Version: d.Version, Token: d.Token}
	for _, i := range d.Instances {
		switch i.State {
		case stateReady:
			s.Ready++
			if i.served() {
				s.Serving++
			}
		case stateAbsent:
			s.Absent++
		case stateGarbage:
			s.Garbage++
		case stateGone:
			s.Kept++
		default:
			s.Out++
		}
		if i.Silent {
			s.Silent++
		}
	}
	s.Instances = s.Ready + s.Out + s.Absent
	for _, b := range d.Balancers {
		if b.Live {
			s.Balancers++
			s.Behind = max(s.Behind, b.Behind)
		}
	}
	return s
}

// same tells whether nothing but heartbeats and the time differs.
func (d *document) same(o *document) bool {
	return d.token == o.token && d.TTLMS == o.TTLMS && d.IntervalMS == o.IntervalMS &&
		slices.EqualFunc(d.Instances, o.Instances, Instance.same) && slices.Equal(d.Gone, o.Gone) &&
		slices.EqualFunc(d.Balancers, o.Balancers, Balancer.same) &&
		d.AwayCount == o.AwayCount && slices.EqualFunc(d.Away, o.Away, Away.same)
}

func (i Instance) same(o Instance) bool {
	i.Beat, i.AgeMS, o.Beat, o.AgeMS = 0, 0, 0, 0
	return reflect.DeepEqual(i, o)
}

func (b Balancer) same(o Balancer) bool {
	return b.Balancer == o.Balancer && b.Applied == o.Applied && b.Behind == o.Behind && b.Live == o.Live
}

// compareAddr sorts as people count: .9 before .10.
func compareAddr(a, b string) int {
	x, errX := netip.ParseAddrPort(a)
	y, errY := netip.ParseAddrPort(b)
	if errX != nil || errY != nil {
		return strings.Compare(a, b)
	}
	return x.Compare(y)
}

// encode is for documents that cannot fail to be JSON. It escapes what HTML
// would read.
func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("%T: %v", v, err)) // a type of this package that JSON does not have
	}
	return b
}
