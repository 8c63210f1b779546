//go:build !sidecar

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"rollcall/reaper"
	"rollcall/registrar"
)

// errNobody says that nothing knows the instance: exit code 1.
var errNobody = errors.New("nothing knows it")

const (
	// explainTimeout bounds all the reading together.
	explainTimeout = 3 * registrar.Timeout
	// explainEvents is how many of the last events are shown.
	explainEvents = 10
)

// explanation is what `explain` prints. Times are unix ms by Redis' clock; what is
// not known is left out.
type explanation struct {
	Service   registrar.Service  `json:"service"`
	Addr      string             `json:"addr"`
	Verdict   string             `json:"verdict"`
	Now       int64              `json:"now"`
	Version   int64              `json:"version"`           // of the service
	Changed   int64              `json:"changed,omitempty"` // version of its last change
	Garbage   string             `json:"garbage,omitempty"` // why its entry cannot be believed
	Instance  *explainedInstance `json:"instance,omitempty"`
	Operator  *registrar.Admin   `json:"operator,omitempty"`
	Gone      *explainedGone     `json:"gone,omitempty"`
	Reapers   []reaperRow        `json:"reapers"`
	Held      []heldRow          `json:"held"` // that concerns it
	Overrule  string             `json:"overrule,omitempty"`
	Balancers []explainedLB      `json:"balancers"`
	Events    []registrar.Event  `json:"events"`
	Next      []string           `json:"next"`              // what to do
	Unknown   []string           `json:"unknown,omitempty"` // what could not be read
	armed     bool
	at        string // flags of a command on the same registry
}

type explainedInstance struct {
	Owner      string            `json:"owner"` // its token
	Joined     int64             `json:"joined,omitempty"`
	JoinedAt   int64             `json:"joined_version,omitempty"`
	Registered int64             `json:"registered,omitempty"` // by the instance's own clock
	Beat       int64             `json:"beat"`
	AgeMS      int64             `json:"age_ms"`
	TTLMS      int64             `json:"ttl_ms"`
	IntervalMS int64             `json:"interval_ms"` // the registry's
	RemovedAt  int64             `json:"removed_at"`  // without another heartbeat, and if nothing holds it
	State      string            `json:"state"`
	Weight     int               `json:"weight"` // in force
	Own        int               `json:"own_weight"`
	Zone       string            `json:"zone,omitempty"`
	Tags       map[string]string `json:"tags,omitempty"`
	Draining   bool              `json:"draining,omitempty"`
}

type explainedGone struct {
	Reason registrar.Reason `json:"reason"`
	At     int64            `json:"at"`
	Owner  string           `json:"owner"`
}

// explainedLB is one balancer, and what it says of the address.
type explainedLB struct {
	Balancer string                           `json:"balancer"`
	Live     bool                             `json:"live"`
	Seen     int64                            `json:"seen,omitempty"`
	Applied  int64                            `json:"applied"`          // version of the service
	Double   bool                             `json:"double,omitempty"` // two lbsyncs acknowledge as it, and one is not heard
	At       int64                            `json:"at,omitempty"`
	Servers  map[string]registrar.ServerState `json:"servers,omitempty"` // by backend
}

func explainCommand() *cli.Command {
	return &cli.Command{
		Name: "explain", Usage: "say why an instance gets requests or does not, when it goes, and what to do", ArgsUsage: "SERVICE ADDR",
		Flags: redisFlags(outputFlag()),
		Action: func(c *cli.Context) error {
			a, err := args(c, "SERVICE ADDR", 2)
			if err != nil {
				return err
			}
			svc, err := parseService(a[0])
			if err != nil {
				return err
			}
			addr, err := registrar.ResolveAddr(c.Context, a[1])
			if err != nil {
				return usageError{err}
			}
			s, err := begin(c, 1)
			if err != nil {
				return err
			}
			defer s.close()
			ctx, cancel := context.WithTimeout(c.Context, explainTimeout)
			defer cancel()
			doc, err := s.explain(ctx, sameRegistry(c), svc, addr)
			if err != nil {
				return err
			}
			doc.judge()
			if s.json {
				err = s.document(doc)
			} else {
				err = doc.tables(s.printer)
			}
			switch {
			case len(doc.Unknown) > 0:
				err = errors.Join(err, fmt.Errorf("could not look everywhere: %s", strings.Join(doc.Unknown, "; ")))
			case doc.unknown():
				nobody := fmt.Errorf("%s %s: %w: it is not registered, no operator has said anything of it, no note of the last 10 min and no event of the last 10,000 names it, nor does any of %d balancers",
					svc, addr, errNobody, len(doc.Balancers))
				if doc.Version == 0 {
					nobody = fmt.Errorf("%w; %w", nobody, s.unknown(c.Context, svc))
				}
				err = errors.Join(err, nobody)
			}
			return err
		},
	}
}

// explain reads all that is known of addr. Without its entry there is nothing to
// say; every other part may be missing.
func (s *session) explain(ctx context.Context, at string, svc registrar.Service, addr netip.AddrPort) (*explanation, error) {
	e, err := s.store.Entry(ctx, svc, addr)
	if err != nil {
		return nil, err
	}
	d := &explanation{
		Service: svc, Addr: addr.String(), Now: e.Now, Version: e.Token.Version, Changed: e.Changed, Garbage: e.Garbage,
		Reapers: []reaperRow{}, Held: []heldRow{}, Balancers: []explainedLB{}, Events: []registrar.Event{}, Next: []string{}, at: at,
	}
	if e.Admin != (registrar.Admin{}) {
		d.Operator = &e.Admin
	}
	if e.Gone != nil {
		d.Gone = &explainedGone{e.Gone.Reason, e.Gone.At, e.Gone.Token}
	}
	unread := func(err error) {
		if err != nil {
			d.Unknown = append(d.Unknown, err.Error())
		}
	}
	events, err := s.store.Events(ctx, []registrar.Service{svc}, "", 0)
	unread(err)
	var joined *registrar.Event
	for _, ev := range events {
		if ev.Addr != d.Addr && ev.Addr != "" {
			continue
		}
		if ev.Addr != "" && (ev.What == registrar.EventJoined || ev.What == registrar.EventTakeover) {
			joined = &ev
		}
		d.Events = append(d.Events, ev)
	}
	if i := e.Instance; e.Present {
		d.Instance = &explainedInstance{
			Owner: i.Meta.ID, Registered: i.Meta.Registered, Beat: i.Beat, AgeMS: max(0, e.Now-i.Beat), TTLMS: e.TTL.Milliseconds(), IntervalMS: e.Interval.Milliseconds(),
			RemovedAt: i.Beat + e.TTL.Milliseconds(), State: stateWord(i), Weight: i.Weight(), Own: i.Meta.Weight, Zone: i.Meta.Zone, Tags: i.Meta.Tags, Draining: i.Meta.Draining,
		}
		if joined != nil && joined.By == i.Meta.ID {
			d.Instance.Joined, d.Instance.JoinedAt = joined.At, joined.Version
		}
	}

	o, err := s.store.Of(svc).Overview(ctx)
	unread(err)
	for _, r := range o.Reapers {
		d.Reapers = append(d.Reapers, newReaperRow(r))
		d.armed = d.armed || r.Live && r.Armed
	}
	for _, h := range held(o.Reapers) {
		if h.Service == "" || h.Service == svc {
			d.Held = append(d.Held, h)
			d.Overrule = reaper.Overrule(o.TTL, o.Interval) + at
		}
	}

	acks, err := s.store.Acks(ctx, svc)
	unread(err)
	var ids []string
	for _, b := range acks.Balancers {
		ids = append(ids, b.ID)
	}
	sights, err := s.store.Sights(ctx, svc, ids, addr)
	unread(err)
	for i, b := range acks.Balancers {
		lb := explainedLB{Balancer: b.ID, Live: b.Live, Double: b.Double, Seen: b.Seen, Applied: b.Applied}
		if i < len(sights) {
			lb.At, lb.Servers = sights[i].At, sights[i].Servers[addr]
		}
		d.Balancers = append(d.Balancers, lb)
	}
	return d, nil
}

// unknown tells whether nobody has ever heard of it.
func (d *explanation) unknown() bool {
	return d.Instance == nil && d.Garbage == "" && d.Operator == nil && d.Gone == nil &&
		!slices.ContainsFunc(d.Events, func(e registrar.Event) bool { return e.Addr != "" }) &&
		!slices.ContainsFunc(d.Balancers, func(b explainedLB) bool { return len(b.Servers) > 0 })
}

// live is the balancers that are alive, and how many of them send it requests.
func (d *explanation) live() (live, serving int) {
	for _, b := range d.Balancers {
		if !b.Live {
			continue
		}
		live++
		for _, st := range b.Servers {
			if st.Serving() {
				serving++
				break
			}
		}
	}
	return live, serving
}

// judge draws the conclusions: the verdict, and what to do next.
func (d *explanation) judge() {
	live, serving := d.live()
	where := "not registered"
	switch {
	case d.Garbage != "":
		where = "its entry cannot be read"
	case d.Instance != nil:
		where = "registered"
	case d.Gone != nil:
		where = string(d.Gone.Reason) + " " + d.ago(d.Gone.At)
	}
	d.Verdict = fmt.Sprintf("%s; %d of %d balancers send it requests", where, serving, live)
	if live == 0 {
		d.Verdict = where + "; no balancer of this service is alive"
	}
	if len(d.Unknown) > 0 {
		d.Verdict += "; not all could be read"
	}
	next := func(format string, args ...any) { d.Next = append(d.Next, fmt.Sprintf(format, args...)) }
	name := string(d.Service) + " " + d.Addr
	if d.Garbage != "" {
		next("its entry in the registry was written by something else (%s): balancers leave it as it is; rollcall doctor%s", d.Garbage, d.at)
	}
	if i := d.Instance; i != nil {
		switch {
		case i.AgeMS > i.TTLMS && len(d.Held) > 0:
			next("it is silent for longer than the TTL and held, because too many look dead at once: if they are dead, %s", d.Overrule)
		case i.AgeMS > i.TTLMS && !d.armed:
			next("it is silent for longer than the TTL, and no reaper is armed to take it out: rollcall status%s", d.at)
		case i.AgeMS > 2*i.IntervalMS:
			next("it has missed heartbeats: look at its sidecar, and at the sidecar's way to Redis")
		}
		if i.Draining {
			next("it is leaving by itself; a new start of its sidecar ends that")
		}
		if i.Weight == 0 && d.Operator != nil && d.Operator.Weight != nil {
			next("it has weight 0 by an operator's word: rollcall weight %s own%s", name, d.at)
		} else if i.Weight == 0 {
			next("it has weight 0 by its own word: start its sidecar with another --weight, or rollcall weight %s N%s", name, d.at)
		}
	}
	if d.Operator != nil && d.Operator.State != registrar.AdminNone {
		next("an operator has said %s: rollcall ready %s%s", d.Operator.State, name, d.at)
	}
	if d.Gone != nil && (d.Gone.Reason == registrar.Expired || d.Gone.Reason == registrar.Unhealthy) {
		next("it is %s: look at the instance; it comes back with its sidecar's next success", d.Gone.Reason)
	}
	if live == 0 {
		next("no balancer of %s is alive: run rollcall lbsync --backend %s=BACKEND beside HAProxy", d.Service, d.Service)
	}
	for _, b := range d.Balancers {
		if !b.Live {
			continue
		}
		if b.Double {
			next("two lbsyncs acknowledge as %s: give one of them another --id", b.Balancer)
		}
		if b.Applied < d.Changed {
			next("%s has not applied its last change: look at that lbsync's log", b.Balancer)
		}
		for _, backend := range slices.Sorted(maps.Keys(b.Servers)) {
			if step := advice(backend, b.Servers[backend]); step != "" {
				next("at %s: %s", b.Balancer, step)
			}
		}
	}
	if len(d.Next) == 0 && serving > 0 && serving == live {
		next("nothing: it gets requests")
	}
}

// advice is what to do about the state of a server.
func advice(backend string, st registrar.ServerState) string {
	switch st.Note {
	case registrar.NoteHeld:
		return "kept in HAProxy, " + cmp.Or(st.Why, "for its silence") + "; to have it out now, rollcall maint"
	case registrar.NoteWaits:
		return "the drain waits until another server is up: start another instance"
	case registrar.NoteUnplaced:
		return "no slot is left: raise the count of the server-template of backend " + backend
	case registrar.NoteRefused:
		if strings.Contains(st.Why, "allowed networks") {
			return "not served: " + st.Why + "; see lbsync --allow"
		}
		return "not served: " + st.Why
	case registrar.NoteUndone:
		return "it was as asked, and HAProxy has it otherwise: " + st.Why
	case registrar.NoteHuman:
		cmd := "set server " + backend + "/" + st.Server + " state ready"
		if !shellSafe.MatchString(backend + st.Server) {
			cmd = "set server … state ready"
		}
		return "somebody set maint in HAProxy itself: " + cmd + ", on its socket"
	case registrar.NoteLeaving:
		return ""
	}
	if st.State == "ready" && st.Check == "down" {
		return "HAProxy's own check of it fails: look at the app, and at the check in haproxy.cfg"
	}
	return ""
}

// ago is how long ago at was, in words.
func (d *explanation) ago(at int64) string { return statusDoc{Now: d.Now}.ago(at) }

// in is how long it is to at, in words.
func (d *explanation) in(at int64) string {
	if wait := at - d.Now; wait > 0 {
		return "in " + duration(wait)
	}
	return "now"
}

func (d *explanation) tables(p printer) error {
	fmt.Fprintf(p.w, "%s %s: %s\n\n", d.Service, d.Addr, plain(d.Verdict))
	var rows [][]string
	row := func(hop string, at int64, format string, args ...any) {
		rows = append(rows, []string{hop, d.ago(at), fmt.Sprintf(format, args...)})
	}
	switch i := d.Instance; {
	case d.Garbage != "":
		row("registry", 0, "version %d; its entry cannot be read: %s", d.Version, d.Garbage)
	case i != nil:
		says := "here"
		if i.JoinedAt > 0 {
			says += fmt.Sprintf(" since version %d", i.JoinedAt)
		}
		row("registry", i.Joined, "%s, changed last with version %s; owner %s", says, known(d.Changed), dash(i.Owner))
		says = fmt.Sprintf("%s, weight %d", i.State, i.Weight)
		if i.Weight != i.Own {
			says += fmt.Sprintf(" (its own: %d)", i.Own)
		}
		if i.Zone != "" {
			says += ", zone " + i.Zone
		}
		if len(i.Tags) > 0 {
			says += ", " + tags(i.Tags)
		}
		row("instance", i.Registered, "%s", says)
		row("heartbeat", i.Beat, "of a TTL of %s; one is due each %s", duration(i.TTLMS), duration(i.IntervalMS))
	case d.Gone != nil:
		row("registry", d.Gone.At, "%s, version %s; owner was %s", d.Gone.Reason, known(d.Changed), dash(d.Gone.Owner))
	default:
		row("registry", 0, "not there, and no note of the last 10 min says how it went")
	}
	if d.Operator != nil {
		row("operator", d.Operator.At, "%s", d.override())
	}
	d.removal(row)
	for _, b := range d.Balancers {
		says := fmt.Sprintf("has applied version %d of %d", b.Applied, d.Version)
		if !b.Live {
			says = "not alive; it had applied version " + strconv.FormatInt(b.Applied, 10)
		}
		if b.Live && b.Double {
			says += "; a second lbsync of this id is not heard"
		}
		row(b.Balancer, b.Seen, "%s", says)
		switch {
		case b.At == 0:
			row("  haproxy", 0, "it does not say what HAProxy has")
		case len(b.Servers) == 0:
			row("  haproxy", b.At, "no server, as of then")
		}
		for _, backend := range slices.Sorted(maps.Keys(b.Servers)) {
			row("  "+backend, b.At, "%s", d.server(b.Servers[backend]))
		}
	}
	if len(d.Balancers) == 0 {
		row("balancers", 0, "none has ever applied this service")
	}
	if err := p.table(nil, "HOP WHEN SAYS", rows); err != nil {
		return err
	}
	if len(d.Events) > 0 {
		fmt.Fprintln(p.w)
		var cells [][]string
		for _, e := range d.Events[max(0, len(d.Events)-explainEvents):] {
			version := "-"
			if e.Version > 0 {
				version = strconv.FormatInt(e.Version, 10)
			}
			cells = append(cells, []string{time.UnixMilli(e.At).Format("2006-01-02 15:04:05.000"), d.ago(e.At), version, e.What, dash(e.By), dash(e.Why)})
		}
		if err := p.table(nil, "TIME WHEN VERSION EVENT BY WHY", cells); err != nil {
			return err
		}
	}
	if len(d.Next) > 0 {
		fmt.Fprintln(p.w)
	}
	for _, n := range d.Next {
		if _, err := fmt.Fprintf(p.w, "next: %s\n", plain(n)); err != nil {
			return err
		}
	}
	return nil
}

// override says what an operator has said, until when, of whom, why, and who that was.
func (d *explanation) override() string {
	w, says := d.Operator, []string{}
	until := func(word string, at int64) string {
		if at > 0 {
			word += " or " + d.in(at)
		}
		return ", until " + word
	}
	if w.State != registrar.AdminNone {
		says = append(says, string(w.State)+until("ready", w.Until))
	}
	if w.Weight != nil {
		lasts := ""
		if w.WeightUntil > 0 {
			lasts = until("own", w.WeightUntil)
		}
		says = append(says, "weight "+strconv.Itoa(*w.Weight)+lasts)
	}
	if w.ID != "" {
		says = append(says, "of this registration alone")
	}
	if w.By != "" {
		says = append(says, "by "+w.By)
	}
	if w.Reason != "" {
		says = append(says, "because: "+w.Reason)
	}
	return strings.Join(says, "; ")
}

func known(version int64) string {
	if version <= 0 {
		return "unknown"
	}
	return strconv.FormatInt(version, 10)
}

// removal says who would take it out of the registry, and when.
func (d *explanation) removal(row func(string, int64, string, ...any)) {
	armed, live := 0, 0
	for _, r := range d.Reapers {
		if r.Live {
			live++
		}
		if r.Live && r.Armed {
			armed++
		}
	}
	says := fmt.Sprintf("%d of %d alive are armed", armed, live)
	if i := d.Instance; i != nil {
		switch {
		case len(d.Held) > 0:
			h := d.Held[0]
			says += fmt.Sprintf("; %s held for %s, %d of %d look dead: taken out when that ends, or from %s on, one each %v",
				heldName(h.Service), duration(max(0, d.Now-h.Since)), h.Suspects, h.Members, d.in(h.LetGo), reaper.LetGoEvery)
		case armed == 0:
			says += "; so it is not taken out"
		default:
			says += "; taken out " + d.in(i.RemovedAt) + " without another heartbeat"
		}
	}
	row("reapers", 0, "%s", says)
}

// server says what HAProxy has of it.
func (d *explanation) server(st registrar.ServerState) string {
	says := "no server"
	if st.State == "maint" {
		says = "maint, no server"
	}
	if st.Server != "" {
		says = fmt.Sprintf("%s %s, weight %d", st.Server, st.State, st.Weight)
		if st.Check != "" {
			says += ", check " + st.Check
		}
	}
	if st.Note != "" {
		says += "; " + st.Note
	}
	if st.Since > 0 {
		says += " since " + d.ago(st.Since)
	}
	if st.Until > 0 {
		says += ", out " + d.in(st.Until) + " at the latest"
	}
	if st.Why != "" {
		says += ": " + st.Why
	}
	return says
}
