package httpapi

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"rollcall/notifier"
	"rollcall/registrar"
)

// forget is how long a service is shown after its last instance went.
const forget = 10 * time.Minute

// removedLimit is how many services that went are remembered, so that a reader
// who comes back hears of them; who comes later starts over.
const removedLimit = 1000

// errUnknown says that nothing can be answered yet.
var errUnknown = errors.New("nothing is known yet: Redis has not answered since the start")

// picture is all that is known. Any goroutine may use it.
//
// Every change has a number, seq. A reader who has seen all up to one number
// asks for what came after: there is no queue for each reader, and a slow one
// gets fewer, later states.
type picture struct {
	started time.Time
	boot    string // names this process' numbers

	mu       sync.Mutex // guards the rest, but documents never change
	seq      int64
	news     chan struct{} // closed at the next change
	ready    bool          // everything has been read once
	services map[registrar.Service]*service
	removed  map[registrar.Service]int64 // seq
	horizon  int64                       // who has seen less starts over

	events []numbered // the last ones, the oldest first
	logged bool       // the log has been read

	overview registrar.Overview // the last one
	heard    time.Time          // when it was read; zero = never
	failure  string             // why it cannot be read now
	metaSeq  int64
	status   Status
	condSeq  int64 // of the last change of status in substance
	cond     string
}

func newPicture(now time.Time) *picture {
	return &picture{
		started: now, boot: rand.Text()[:10], news: make(chan struct{}),
		services: map[registrar.Service]*service{}, removed: map[registrar.Service]int64{},
	}
}

// changed gives the change that is being made its number. The caller holds mu.
func (p *picture) changed() int64 {
	p.seq++
	close(p.news)
	p.news = make(chan struct{})
	return p.seq
}

// readAll notes that everything has been read once.
func (p *picture) readAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ready = true
	p.metaSeq = p.changed()
}

func (p *picture) isReady() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ready
}

// fold takes a change of a service in.
func (p *picture) fold(c notifier.Change, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.services[c.Service]
	if s == nil {
		s = &service{name: c.Service, absent: map[netip.AddrPort]absence{}, read: map[netip.AddrPort]int64{}, lag: map[string]time.Time{}}
		p.services[c.Service] = s
		delete(p.removed, c.Service)
	}
	before := s.view.Token
	frees := s.fold(c, now)
	if before != s.view.Token {
		s.due, s.pause, s.since = now, 0, time.Time{} // who has applied it?
		s.lagging(now)
		s.away.unread = s.away.unread || s.away.count > 0 || frees
	}
	p.renew(s, c.Now, now)
}

// renew makes the service's document anew. The caller holds mu.
func (p *picture) renew(s *service, at int64, now time.Time) {
	d := s.build(now)
	switch old := s.doc; {
	case old == nil || !d.same(old):
		d.seq = p.changed()
		d.beats = d.seq
	default:
		d.seq, d.beats = old.seq, p.changed()
	}
	s.doc = d
	s.remember(at)
	switch {
	case len(d.Instances) > 0:
		s.empty = time.Time{}
	case s.empty.IsZero():
		s.empty = now
	}
}

// lagging notes since when which live balancer is behind.
func (s *service) lagging(now time.Time) {
	lag := map[string]time.Time{}
	for _, b := range s.acks {
		if b.Live && registrar.Lag(s.view.Token.Version, b.Applied) > 0 {
			lag[b.ID] = now
			if since, ok := s.lag[b.ID]; ok {
				lag[b.ID] = since
			}
		}
	}
	s.lag = lag
}

// acked takes in who has applied what of a service, which is asked again after
// every if nobody is behind.
func (p *picture) acked(name registrar.Service, acks registrar.Acks, sights []registrar.Sight, every time.Duration, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.services[name]
	if s == nil {
		return
	}
	s.acks, s.sights = acks.Balancers, sights
	s.lagging(now)
	p.renew(s, acks.Now, now)
	switch {
	case s.settled():
		s.since, s.pause, s.due = time.Time{}, 0, now.Add(every)
		return
	case s.since.IsZero():
		s.since = now
	}
	s.pause = min(max(2*s.pause, firstFollow), lastFollow)
	if now.Sub(s.since) > followFor {
		s.pause = every
	}
	s.due = now.Add(s.pause)
}

// A service that is not settled is asked for again after firstFollow, then twice
// that, up to lastFollow; after followFor only as all others.
const (
	firstFollow = 10 * time.Millisecond
	lastFollow  = time.Second
	followFor   = time.Minute
)

// expire drops what has been kept for long enough.
func (p *picture) expire(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, s := range p.services {
		n := len(s.absent)
		maps.DeleteFunc(s.absent, func(_ netip.AddrPort, a absence) bool { return !now.Before(a.until) })
		if len(s.absent) != n {
			p.renew(s, p.overview.Now, now)
		}
		if !s.empty.IsZero() && now.Sub(s.empty) > forget {
			delete(p.services, name)
			p.removed[name] = p.changed()
		}
	}
	if len(p.removed) > removedLimit {
		p.removed, p.horizon = map[registrar.Service]int64{}, p.seq
	}
}

// looked takes in an overview, or why there is none.
func (p *picture) looked(o registrar.Overview, status func(registrar.Overview, Counts) Status, err error, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	was := p.failure
	if err != nil {
		p.failure = err.Error()
		if was == "" {
			p.metaSeq = p.changed()
		}
		return
	}
	p.overview, p.heard, p.failure = o, now, ""
	if was != "" {
		p.metaSeq = p.changed()
	}
	p.status = status(o, p.counts())
	// The document has the time in it; what people wait for is the rest.
	cond := fmt.Sprint(p.status.Healthy, o.Epoch, o.TTL, o.Interval)
	for _, r := range o.Reapers {
		cond += fmt.Sprint(r.ID, r.Live, r.Armed, r.Cause, r.Held)
	}
	for _, b := range o.Balancers {
		cond += fmt.Sprint(b.ID, b.Live)
	}
	if cond != p.cond {
		p.cond, p.condSeq = cond, p.changed()
	}
}

// Counts are of all services together.
type Counts struct {
	Services  int
	Instances int64
	Stale     int64 // silent for longer than the TTL
}

func (p *picture) counts() Counts {
	c := Counts{}
	for _, s := range p.services {
		n := s.doc.summary.Instances
		c.Instances += int64(n)
		if n > 0 {
			c.Services++
		}
		for _, i := range s.doc.Instances {
			if i.Beat > 0 && i.AgeMS > s.doc.TTLMS {
				c.Stale++
			}
		}
	}
	return c
}

// source is how the picture stands with Redis.
type source struct {
	Answers bool   `json:"answers"`
	Heard   string `json:"heard,omitempty"` // RFC 3339, the last answer
	AgeMS   int64  `json:"age_ms"`          // of that
	Error   string `json:"error,omitempty"`
}

// source tells. The caller holds mu.
func (p *picture) source(now time.Time) source {
	s := source{Answers: p.failure == "" && !p.heard.IsZero(), Error: p.failure}
	if !p.heard.IsZero() {
		s.Heard, s.AgeMS = p.heard.UTC().Format(time.RFC3339Nano), now.Sub(p.heard).Milliseconds()
	}
	return s
}

// read calls f with the lock held, or says why nothing can be answered.
func (p *picture) read(f func()) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.ready || p.heard.IsZero() {
		if p.failure != "" {
			return fmt.Errorf("%w: %s", errUnknown, p.failure)
		}
		return errUnknown
	}
	f()
	return nil
}

// documents returns the services by name. The caller holds mu.
func (p *picture) documents() []*document {
	docs := make([]*document, 0, len(p.services))
	for _, s := range p.services {
		docs = append(docs, s.doc)
	}
	slices.SortFunc(docs, func(a, b *document) int {
		return strings.Compare(string(a.Service.Service), string(b.Service.Service))
	})
	return docs
}

// id names a place in the stream of changes.
func (p *picture) id(seq int64) string { return p.boot + "-" + strconv.FormatInt(seq, 10) }

// place reads an id; 0 is where everybody starts, and who must start over.
func (p *picture) place(id string) int64 {
	boot, number, _ := strings.Cut(id, "-")
	seq, err := strconv.ParseInt(number, 10, 64)
	if err != nil || boot != p.boot || seq < p.horizon || seq > p.seq {
		return 0
	}
	return seq
}

// message is one server-sent event. Its data is made, once for all readers, when
// somebody sends it.
type message struct {
	event string
	data  func() []byte
}

func say(event string, v any) message {
	return message{event, func() []byte { return encode(v) }}
}

// pulse is what readers hear while nothing changes.
func (p *picture) pulse(m meta, now time.Time) []message {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := []message{say("meta", p.about(m, now))}
	if p.ready && !p.heard.IsZero() {
		out = append(out, say("status", p.status))
	}
	return out
}

// streamPace is the least time between two documents of one service in a stream. A
// document has all instances: of a service that changes 42 times a second each reader
// would get 42 of them.
const streamPace = 250 * time.Millisecond

// tell tells the streams of the service's last change, or returns how long that has
// to wait; 0 = they have been told. The caller holds mu.
func (p *picture) tell(s *service, now time.Time) (wait time.Duration) {
	if s.doc.seq <= s.toldDoc {
		return 0
	}
	if wait := s.toldAt.Add(streamPace).Sub(now); wait > 0 {
		return wait
	}
	s.told, s.toldDoc, s.toldAt = p.changed(), s.doc.seq, now
	return 0
}

// since returns what came after the place seen, of some services or all, the
// place that it leads to, what closes when there is more, and how soon there is more
// anyway; 0 = nothing waits.
func (p *picture) since(seen int64, only map[registrar.Service]bool, about meta, now time.Time) (out []message, seq int64, news <-chan struct{}, more time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.ready || p.heard.IsZero() {
		return []message{say("meta", p.about(about, now))}, 0, p.news, 0
	}
	all := seen < p.horizon || seen == 0
	if all {
		seen = 0
		out = append(out, say("reset", struct{}{}))
	}
	if all || p.metaSeq > seen {
		out = append(out, say("meta", p.about(about, now)))
	}
	if all || p.condSeq > seen {
		out = append(out, say("status", p.status))
	}
	histories := map[registrar.Service][]point{}
	for name, s := range p.services {
		if len(only) > 0 && !only[name] {
			continue
		}
		wait := p.tell(s, now)
		if wait > 0 && (more == 0 || wait < more) {
			more = wait
		}
		switch {
		case all || s.told > seen:
			out = append(out, message{"service", s.doc.json})
		case s.doc.beats > seen && wait == 0:
			out = append(out, message{"beats", s.doc.ages})
		}
		if all {
			histories[name] = slices.Clone(s.history)
		}
	}
	for name, seq := range p.removed {
		if seq > seen && !all && (len(only) == 0 || only[name]) {
			out = append(out, say("removed", map[string]registrar.Service{"service": name}))
		}
	}
	if all {
		out = append(out, say("history", histories))
	}
	if happened := p.after(seen, only); len(happened) > 0 {
		out = append(out, say("events", happened[max(0, len(happened)-defaultEvents):]))
	}
	return out, p.seq, p.news, more
}

// eventsKept is how many of the last events are in memory.
const eventsKept = 500

// numbered is an event and when this process heard of it.
type numbered struct {
	seq int64
	registrar.Event
}

// happened takes in events, the oldest first. Those that are known already, which
// a log that was read anew has again, are left out.
func (p *picture) happened(events []registrar.Event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.logged {
		p.logged = true
		p.recall(events)
	}
	known := make(map[string]bool, len(p.events))
	for _, e := range p.events {
		known[e.ID] = true
	}
	events = slices.DeleteFunc(events, func(e registrar.Event) bool { return known[e.ID] })
	if len(events) == 0 {
		return
	}
	seq := p.changed()
	for _, e := range events {
		p.events = append(p.events, numbered{seq, e})
	}
	p.events = slices.Delete(p.events, 0, max(0, len(p.events)-eventsKept))
}

// after returns the events that came after a place, of some services or all. The
// caller holds mu.
func (p *picture) after(seen int64, only map[registrar.Service]bool) []registrar.Event {
	var out []registrar.Event
	for _, e := range p.events {
		if e.seq > seen && (len(only) == 0 || e.Service == "" || only[e.Service]) {
			out = append(out, e.Event)
		}
	}
	return out
}

// meta is what a page needs to know beside the register.
type meta struct {
	Redis     source `json:"redis"`
	Now       int64  `json:"now"` // Redis' time at the last answer
	Namespace string `json:"namespace"`
	Version   string `json:"version"` // of the program
	Writes    bool   `json:"writes"`  // allowed with a token
	Started   int64  `json:"started"` // by this host's clock
}

// about completes m. The caller holds mu.
func (p *picture) about(m meta, now time.Time) meta {
	m.Redis, m.Now, m.Started = p.source(now), p.overview.Now, p.started.UnixMilli()
	return m
}

// errand is a service that is to be looked at.
type errand struct {
	name  registrar.Service
	whole bool // heartbeats too, which no change announces
}

// due returns what is to be looked at now, and how soon there is more.
func (p *picture) due(now time.Time, every time.Duration) (errands []errand, next time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	next = every
	for name, s := range p.services {
		if wait := s.due.Sub(now); wait > 0 {
			next = min(next, wait)
			continue
		}
		errands = append(errands, errand{name, now.Sub(s.whole) >= every/2})
		s.due = now.Add(every) // unless it answers
	}
	return errands, next
}

// pace is how often all services are looked at: once a heartbeat, within bounds,
// but so that all of it takes Redis a few percent of a core at most.
func (p *picture) pace() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	instances := 0
	for _, s := range p.services {
		instances += len(s.doc.Instances)
	}
	usual := min(max(p.overview.Interval, time.Second), registrar.DefaultInterval)
	return max(usual, time.Duration(len(p.services))*5*time.Millisecond+time.Duration(instances)*100*time.Microsecond)
}

// Status is what `rollcall status` finds.
type Status struct {
	Healthy  bool
	Document any // as JSON has it
}

// MarshalJSON writes the document.
func (s Status) MarshalJSON() ([]byte, error) { return json.Marshal(s.Document) }
