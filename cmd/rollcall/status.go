//go:build !sidecar

package main

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"rollcall/reaper"
	"rollcall/registrar"
)

// errUnhealthy says that nobody would be taken out, or not everybody: exit code 1.
var errUnhealthy = errors.New("the registry needs care")

// statusDoc is what `status` prints. Times are unix ms by Redis' clock.
type statusDoc struct {
	Healthy   bool             `json:"healthy"`
	Now       int64            `json:"now"`
	Registry  registryFacts    `json:"registry"`
	Reapers   []reaperRow      `json:"reapers"`
	Held      []heldRow        `json:"held"`
	Overrule  string           `json:"overrule"` // the command that takes the held out
	Balancers []statusBalancer `json:"balancers"`
	Serving   []serviceRow     `json:"serving"`  // the services that are on the list
	Problems  []string         `json:"problems"` // why it is not healthy
	Notes     []string         `json:"notes"`    // what else does not serve
	cluster   bool
}

type registryFacts struct {
	Namespace  string `json:"namespace"`
	Epoch      string `json:"epoch"`
	Version    int64  `json:"version"`
	Services   int    `json:"services"`
	Instances  int64  `json:"instances"`
	Stale      int64  `json:"stale"` // silent for longer than the TTL
	TTLMS      int64  `json:"ttl_ms"`
	IntervalMS int64  `json:"interval_ms"`
}

type reaperRow struct {
	Reaper string `json:"reaper"`
	Live   bool   `json:"live"`
	Armed  bool   `json:"armed"`           // in a Cluster: for each service that it knows
	Cause  string `json:"cause,omitempty"` // of not being armed
	Error  string `json:"error,omitempty"` // of the cause
	Since  int64  `json:"since,omitempty"` // armed, or not
	Until  int64  `json:"until,omitempty"` // not armed before
	Seen   int64  `json:"seen,omitempty"`
	// In a Cluster: how many services it knows, and for how many it is armed.
	Services int `json:"services,omitempty"`
	ArmedFor int `json:"armed_for,omitempty"`
}

func newReaperRow(r registrar.ReaperReport) reaperRow {
	row := reaperRow{Reaper: r.ID, Live: r.Live, Armed: r.Armed, Cause: r.Cause, Error: r.Error, Since: r.Since, Until: r.Until, Seen: r.Seen}
	if r.Garbage {
		row.Cause = "its entry cannot be read"
	}
	return row
}

type heldRow struct {
	registrar.Hold
	Rule  string `json:"rule"`   // why it is held
	LetGo int64  `json:"let_go"` // from then on one is let go each 10 s
}

type statusBalancer struct {
	Balancer string `json:"balancer"`
	Live     bool   `json:"live"`
	Seen     int64  `json:"seen"`
}

func statusCommand() *cli.Command {
	return &cli.Command{
		Name: "status", Usage: "say whether the living are served and the dead taken out: services, reapers, what the protection holds and how to overrule it, balancers",
		Flags: redisFlags(outputFlag()),
		Action: func(c *cli.Context) error {
			if _, err := args(c, "", 0); err != nil {
				return err
			}
			s, err := begin(c, 1)
			if err != nil {
				return err
			}
			defer s.close()
			doc, err := registrar.Try(c.Context, func(ctx context.Context) (*statusDoc, error) {
				if s.store.Cluster() {
					return s.clusterStatus(ctx)
				}
				return s.status(ctx)
			})
			if doc == nil {
				return err
			}
			doc.Registry.Namespace = c.String("namespace")
			doc.Overrule += sameRegistry(c)
			doc.judge()
			if s.json {
				err = s.document(doc)
			} else {
				err = doc.tables(s.printer)
			}
			if err == nil && !doc.Healthy {
				err = fmt.Errorf("%w: %s", errUnhealthy, strings.Join(doc.Problems, "; "))
			}
			return err
		},
	}
}

func (s *session) status(ctx context.Context) (*statusDoc, error) {
	o, err := s.store.Overview(ctx)
	if err != nil {
		return nil, err
	}
	rows, err := s.services(ctx)
	if err != nil {
		return nil, err
	}
	doc := newStatus(o)
	doc.count(rows)
	if err := doc.overdue(ctx, s.store); err != nil {
		return nil, err
	}
	if err := doc.types(ctx, s.store, rows); err != nil {
		return nil, err
	}
	return doc, s.serving(ctx, doc, rows)
}

// newStatus makes the document of one registry, but for its counts.
func newStatus(o registrar.Overview) *statusDoc {
	doc := &statusDoc{
		Now: o.Now, Registry: registryFacts{Epoch: o.Epoch, Version: o.Version, TTLMS: o.TTL.Milliseconds(), IntervalMS: o.Interval.Milliseconds()},
		Reapers: []reaperRow{}, Held: held(o.Reapers), Balancers: []statusBalancer{}, Serving: []serviceRow{}, Problems: []string{}, Notes: []string{},
		Overrule: reaper.Overrule(o.TTL, o.Interval),
	}
	for _, r := range o.Reapers {
		doc.Reapers = append(doc.Reapers, newReaperRow(r))
	}
	for _, b := range o.Balancers {
		doc.Balancers = append(doc.Balancers, statusBalancer{b.ID, b.Live, b.Seen})
	}
	if !armed(o) {
		doc.Problems = append(doc.Problems, "no reaper is armed, so nobody is taken out")
	}
	if o.Version < 0 {
		doc.Problems = append(doc.Problems, "the registry's version is no number from 0 to 2^53-1")
	}
	return doc
}

// clusterStatus puts together what the registers of all services say. With an
// error it returns what is known nevertheless, if that is anything.
func (s *session) clusterStatus(ctx context.Context) (*statusDoc, error) {
	svcs, _, err := s.store.Services(ctx)
	if err != nil {
		return nil, err
	}
	slices.Sort(svcs)
	rows, views := make([][]serviceRow, len(svcs)), make([]registrar.Overview, len(svcs))
	unread, wrong, overdue := make([]string, len(svcs)), make([][]string, len(svcs)), make([]int64, len(svcs))
	err = s.each(svcs, func(i int, of *registrar.Store) (err error) {
		if views[i], err = of.Overview(ctx); err == nil {
			rows[i], err = count(ctx, of, svcs[i:i+1])
		}
		if err == nil {
			wrong[i], err = of.Mistyped(ctx, svcs[i:i+1])
		}
		if err == nil {
			overdue[i], err = of.Overdue(ctx, views[i].Now)
		}
		if err != nil {
			unread[i] = string(svcs[i])
		}
		return err
	})
	doc := &statusDoc{cluster: true, Reapers: []reaperRow{}, Balancers: []statusBalancer{}, Serving: []serviceRow{}, Problems: []string{}, Notes: []string{}}
	ttl, interval := registrar.DefaultTTL, registrar.DefaultInterval
	for _, o := range views {
		doc.Now = max(doc.Now, o.Now)
		if o.Now > 0 { // each has a copy of the whole's
			ttl, interval = o.TTL, o.Interval
		}
	}
	doc.Registry = registryFacts{TTLMS: ttl.Milliseconds(), IntervalMS: interval.Milliseconds()}
	doc.Overrule = reaper.Overrule(ttl, interval)
	var reports []registrar.ReaperReport
	var idle []string // services that nobody is armed for
	for i, o := range views {
		if len(rows[i]) == 0 || rows[i][0].Instances == 0 {
			continue // unknown; or its name stays on the list for a while
		}
		doc.count(rows[i])
		if !armed(o) {
			idle = append(idle, string(svcs[i]))
		}
		// Each node has a clock of its own, and the document one.
		shift := doc.Now - o.Now
		for _, r := range o.Reapers {
			r = shifted(r, shift)
			reports = append(reports, r)
			doc.reaper(svcs[i], r)
		}
		for _, b := range o.Balancers {
			doc.balancer(statusBalancer{b.ID, b.Live, b.Seen + shift})
		}
	}
	doc.Held = held(reports)
	err = errors.Join(err, s.serving(ctx, doc, slices.Concat(rows...)))
	slices.SortFunc(doc.Reapers, func(a, b reaperRow) int { return strings.Compare(a.Reaper, b.Reaper) })
	slices.SortFunc(doc.Balancers, func(a, b statusBalancer) int { return strings.Compare(a.Balancer, b.Balancer) })
	if len(idle) > 0 {
		doc.Problems = append(doc.Problems, "no reaper is armed, so nobody is taken out, of "+few(idle))
	}
	doc.mistyped(slices.Concat(wrong...))
	late := int64(0)
	for _, n := range overdue {
		late += n
	}
	doc.overdueCount(late)
	if unread = slices.DeleteFunc(unread, func(s string) bool { return s == "" }); len(unread) > 0 {
		first, _, _ := strings.Cut(err.Error(), "\n")
		doc.Problems = append(doc.Problems, fmt.Sprintf("nothing is known of %s: %s", few(unread), first))
	}
	return doc, err
}

// armed tells whether one of the reapers is at work.
func armed(o registrar.Overview) bool {
	return slices.ContainsFunc(o.Reapers, func(r registrar.ReaperReport) bool { return r.Live && r.Armed })
}

// shifted is r by a clock that is d ms ahead.
func shifted(r registrar.ReaperReport, d int64) registrar.ReaperReport {
	move := func(at *int64) {
		if *at != 0 {
			*at += d
		}
	}
	r.Held = slices.Clone(r.Held)
	move(&r.Seen)
	move(&r.Since)
	move(&r.Until)
	for i := range r.Held {
		move(&r.Held[i].Since)
		move(&r.Held[i].Until)
	}
	return r
}

// reaper adds what a reaper of a Cluster says of one service. Of those for which
// it is not armed, the first says why.
func (d *statusDoc) reaper(svc registrar.Service, r registrar.ReaperReport) {
	row := newReaperRow(r)
	if row.Cause != "" {
		row.Cause = string(svc) + ": " + row.Cause
	}
	row.Services = 1
	if row.Armed {
		row.ArmedFor = 1
	}
	i := slices.IndexFunc(d.Reapers, func(x reaperRow) bool { return x.Reaper == row.Reaper })
	if i < 0 {
		d.Reapers = append(d.Reapers, row)
		return
	}
	old := &d.Reapers[i]
	switch {
	case row.Live && !old.Live: // what it does not say any more counts for nothing
		*old = row
		return
	case !row.Live && old.Live:
		return
	}
	services, armedFor, since, seen := old.Services+1, old.ArmedFor+row.ArmedFor, max(old.Since, row.Since), max(old.Seen, row.Seen)
	if old.Armed && !row.Armed {
		*old = row
	}
	old.Services, old.ArmedFor, old.Since, old.Seen = services, armedFor, since, seen
}

func (d *statusDoc) balancer(b statusBalancer) {
	i := slices.IndexFunc(d.Balancers, func(x statusBalancer) bool { return x.Balancer == b.Balancer })
	if i < 0 {
		d.Balancers = append(d.Balancers, b)
		return
	}
	d.Balancers[i].Live = d.Balancers[i].Live || b.Live
	d.Balancers[i].Seen = max(d.Balancers[i].Seen, b.Seen)
}

func (d *statusDoc) count(rows []serviceRow) {
	for _, r := range rows {
		d.Registry.Services++
		d.Registry.Instances += max(r.Instances, 0)
		d.Registry.Stale += r.Stale
		if r.Version < 0 {
			d.Problems = append(d.Problems, fmt.Sprintf("the version of %s is no number from 0 to 2^53-1", r.Service))
		}
	}
}

// overdue notes overrides that no reaper looks at: those of some time do not end.
func (d *statusDoc) overdue(ctx context.Context, store *registrar.Store) error {
	n, err := store.Overdue(ctx, d.Now)
	d.overdueCount(n)
	return err
}

func (d *statusDoc) overdueCount(n int64) {
	if n > 0 {
		d.Problems = append(d.Problems, fmt.Sprintf("no reaper looks at operators' overrides, so those of some time (--for) do not end: %d are overdue", n))
	}
}

// types notes the keys of the services in rows that hold something else than they must:
// nobody can change such a service, and no reader can follow it.
func (d *statusDoc) types(ctx context.Context, store *registrar.Store, rows []serviceRow) error {
	svcs := make([]registrar.Service, len(rows))
	for i, r := range rows {
		svcs[i] = r.Service
	}
	keys, err := store.Mistyped(ctx, svcs)
	d.mistyped(keys)
	return err
}

func (d *statusDoc) mistyped(keys []string) {
	if len(keys) > 0 {
		d.Problems = append(d.Problems, "keys of a wrong type, whose services stand still: "+few(keys)+"; rollcall doctor says what to do")
	}
}

func (d *statusDoc) judge() {
	for _, h := range d.Held {
		d.Problems = append(d.Problems, fmt.Sprintf("%s held: %d of %d look dead at once", heldName(h.Service), h.Suspects, h.Members))
	}
	d.Healthy = len(d.Problems) == 0
}

// held returns what live reapers hold, each service once: as the one says that
// has held it for longest.
func held(reapers []registrar.ReaperReport) []heldRow {
	rows := []heldRow{}
	for _, r := range reapers {
		if !r.Live {
			continue
		}
		for _, h := range r.Held {
			row := heldRow{h, reaper.Rule(h.Service), h.Since + reaper.LetGoAfter.Milliseconds()}
			i := slices.IndexFunc(rows, func(x heldRow) bool { return x.Service == h.Service })
			switch {
			case i < 0:
				rows = append(rows, row)
			case h.Since < rows[i].Since:
				rows[i] = row
			}
		}
	}
	slices.SortFunc(rows, func(a, b heldRow) int { return strings.Compare(string(a.Service), string(b.Service)) })
	return rows
}

func heldName(svc registrar.Service) string {
	if svc == "" {
		return "(every service)"
	}
	return string(svc)
}

var shellSafe = regexp.MustCompile(`^[A-Za-z0-9_@%+=:,./-]+$`)

// sameRegistry is the flags that take another command to the registry of this
// one; a password is left out.
func sameRegistry(c *cli.Context) string {
	out := ""
	for _, f := range redisFlags() {
		name := f.Names()[0]
		v := c.String(name)
		switch {
		case strings.HasPrefix(name, "log-") || v == "" || name == "redis" && v == defaultRedis || name == "namespace" && v == registrar.DefaultNamespace:
			continue
		case name == "redis":
			v = withoutPassword(v)
		}
		if !shellSafe.MatchString(v) {
			v = "'" + strings.ReplaceAll(v, "'", `'\''`) + "'"
		}
		out += " --" + name + " " + v
	}
	return out
}

var passwordPattern = regexp.MustCompile(`^([a-z+]+://[^/:@]*):[^/]*@`)

func withoutPassword(url string) string { return passwordPattern.ReplaceAllString(url, "$1@") }

func (d statusDoc) tables(p printer) error {
	r, version := d.Registry, strconv.FormatInt(d.Registry.Version, 10)
	if d.cluster {
		version = "-" // each service has its own
	}
	err := p.table(nil, "REGISTRY VERSION EPOCH SERVICES INSTANCES STALE TTL HEARTBEAT", [][]string{{
		r.Namespace, version, dash(r.Epoch), strconv.Itoa(r.Services), strconv.FormatInt(r.Instances, 10),
		strconv.FormatInt(r.Stale, 10), duration(r.TTLMS), duration(r.IntervalMS),
	}})
	if err != nil {
		return err
	}
	var serving, reapers, held, balancers [][]string
	for _, r := range d.Serving {
		if len(d.Serving) <= mostServices || int64(r.Serving) < r.Instances || r.Balancers == 0 {
			serving = append(serving, []string{string(r.Service), strconv.FormatInt(r.Instances, 10), strconv.Itoa(r.Serving), strconv.Itoa(r.Balancers)})
		}
	}
	for _, r := range d.Reapers {
		why := r.Cause
		if r.Error != "" {
			why += ": " + r.Error
		}
		if wait := r.Until - d.Now; r.Until > 0 && wait > 0 {
			why += "; armed in " + duration(wait) + " at the earliest"
		}
		armed := yes(r.Armed)
		if d.cluster {
			armed = fmt.Sprintf("%d of %d", r.ArmedFor, r.Services)
		}
		reapers = append(reapers, []string{r.Reaper, yes(r.Live), armed, d.ago(r.Since), d.ago(r.Seen), dash(why)})
	}
	for _, h := range d.Held {
		until := fmt.Sprintf("they have been back for %s; one goes each %v, ", duration(2*r.IntervalMS), reaper.LetGoEvery)
		if wait := h.LetGo - d.Now; wait > 0 {
			until += "from " + duration(wait) + " on"
		} else {
			until += "since " + duration(-wait)
		}
		held = append(held, []string{heldName(h.Service), fmt.Sprintf("%d of %d", h.Suspects, h.Members), d.ago(h.Since), h.Rule, until})
	}
	for _, b := range d.Balancers {
		balancers = append(balancers, []string{b.Balancer, yes(b.Live), d.ago(b.Seen)})
	}
	for _, t := range []struct {
		header string
		rows   [][]string
	}{
		{"SERVICE INSTANCES SERVING BALANCERS", serving},
		{"REAPER LIVE ARMED SINCE SEEN WHY-NOT", reapers},
		{"HELD LOOK-DEAD SINCE RULE UNTIL", held},
		{"BALANCER LIVE SEEN", balancers},
	} {
		if len(t.rows) == 0 {
			continue
		}
		fmt.Fprintln(p.w)
		if err := p.table(nil, t.header, t.rows); err != nil {
			return err
		}
	}
	if len(d.Notes) > 0 {
		fmt.Fprintln(p.w)
	}
	for _, n := range d.Notes {
		fmt.Fprintln(p.w, plain(n))
	}
	if len(held) > 0 {
		fmt.Fprintf(p.w, "\nThis takes them out now, without proof that they are dead:\n  %s\n", plain(d.Overrule))
	}
	return nil
}

// ago is how long ago at was.
func (d statusDoc) ago(at int64) string {
	if at <= 0 {
		return "-"
	}
	return duration(max(0, d.Now-at)) + " ago"
}

// duration is ms in whole seconds once it is longer than a minute.
func duration(ms int64) string {
	d := time.Duration(ms) * time.Millisecond
	if d > time.Minute {
		d = d.Round(time.Second)
	}
	return d.String()
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
