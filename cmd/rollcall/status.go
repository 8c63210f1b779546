package main

import (
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
	problems  []string
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
	Armed  bool   `json:"armed"`
	Cause  string `json:"cause,omitempty"` // of not being armed
	Error  string `json:"error,omitempty"` // of the cause
	Since  int64  `json:"since,omitempty"` // armed, or not
	Until  int64  `json:"until,omitempty"` // not armed before
	Seen   int64  `json:"seen,omitempty"`
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
		Name: "status", Usage: "say whether the dead are taken out: reapers, what the protection holds and how to overrule it, balancers",
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
			if s.store.Cluster() {
				return usage("status looks at one registry and would misjudge a Cluster, where each service is one")
			}
			doc, err := s.status(c)
			if err != nil {
				return err
			}
			if s.json {
				err = s.document(doc)
			} else {
				err = doc.tables(s.printer)
			}
			if err == nil && !doc.Healthy {
				err = fmt.Errorf("%w: %s", errUnhealthy, strings.Join(doc.problems, "; "))
			}
			return err
		},
	}
}

func (s *session) status(c *cli.Context) (statusDoc, error) {
	ctx, cancel := registrar.WithTimeout(c.Context)
	defer cancel()
	o, err := s.store.Overview(ctx)
	if err != nil {
		return statusDoc{}, err
	}
	rows, err := services(c, s.store)
	if err != nil {
		return statusDoc{}, err
	}
	doc := statusDoc{
		Now: o.Now,
		Registry: registryFacts{
			Namespace: c.String("namespace"), Epoch: o.Epoch, Version: o.Version, Services: len(rows),
			TTLMS: o.TTL.Milliseconds(), IntervalMS: o.Interval.Milliseconds(),
		},
		Reapers: []reaperRow{}, Held: held(o.Reapers), Balancers: []statusBalancer{},
		Overrule: reaper.Overrule(o.TTL, o.Interval) + sameRegistry(c),
	}
	for _, r := range rows {
		doc.Registry.Instances += max(r.Instances, 0)
		doc.Registry.Stale += r.Stale
	}
	armed := false
	for _, r := range o.Reapers {
		doc.Reapers = append(doc.Reapers, newReaperRow(r))
		armed = armed || r.Live && r.Armed
	}
	for _, b := range o.Balancers {
		doc.Balancers = append(doc.Balancers, statusBalancer{b.ID, b.Live, b.Seen})
	}
	if !armed {
		doc.problems = append(doc.problems, "no reaper is armed, so nobody is taken out")
	}
	for _, h := range doc.Held {
		doc.problems = append(doc.problems, fmt.Sprintf("%s held: %d of %d look dead at once", heldName(h.Service), h.Suspects, h.Members))
	}
	doc.Healthy = len(doc.problems) == 0
	return doc, nil
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
	r := d.Registry
	err := p.table(nil, "REGISTRY VERSION EPOCH SERVICES INSTANCES STALE TTL HEARTBEAT", [][]string{{
		r.Namespace, strconv.FormatInt(r.Version, 10), dash(r.Epoch), strconv.Itoa(r.Services), strconv.FormatInt(r.Instances, 10),
		strconv.FormatInt(r.Stale, 10), duration(r.TTLMS), duration(r.IntervalMS),
	}})
	if err != nil {
		return err
	}
	var reapers, held, balancers [][]string
	for _, r := range d.Reapers {
		why := r.Cause
		if r.Error != "" {
			why += ": " + r.Error
		}
		if wait := r.Until - d.Now; r.Until > 0 && wait > 0 {
			why += "; armed in " + duration(wait) + " at the earliest"
		}
		reapers = append(reapers, []string{r.Reaper, yes(r.Live), yes(r.Armed), d.ago(r.Since), d.ago(r.Seen), dash(why)})
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
