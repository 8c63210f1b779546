//go:build !sidecar

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/urfave/cli/v2"

	"rollcall/registrar"
)

// bulkAtOnce is how many services are read, written or waited for at the same time.
const bulkAtOnce = 8

// touched is an instance that a command about many touches: what it was before, and what
// became of it.
type touched struct {
	outcome                   // Done is empty while nothing is written
	State   string            `json:"state"` // before, as `instances` has it
	Weight  int               `json:"weight"`
	Zone    string            `json:"zone,omitempty"`
	Tags    map[string]string `json:"tags,omitempty"`
	Error   string            `json:"error,omitempty"` // why it is not written
}

// group is those of one service.
type group struct {
	svc     registrar.Service
	snap    registrar.Snapshot
	rows    []touched
	addrs   []netip.AddrPort // of rows
	bulk    *registrar.Bulk
	last    error  // it would leave nobody that serves
	version int64  // after it
	failed  int    // rows that are not written
	live    int    // balancers that have applied it
	waits   string // why a drain of it waits
	waited  error
}

// onMany says w of all instances that meet cond, of the service that is named, or of all.
func onMany(c *cli.Context, names []string, cond conditions, w registrar.Word) error {
	svcs, err := parseServices(names)
	if err != nil {
		return err
	}
	if err := cond.resolve(c.Context); err != nil {
		return err
	}
	s, err := begin(c, bulkAtOnce)
	if err != nil {
		return err
	}
	defer s.close()
	groups, err := s.find(c.Context, svcs, cond, w)
	if err != nil {
		return err
	}
	if err := s.prepare(c.Context, groups, w); err != nil {
		return err
	}
	var refused []string
	for _, g := range groups {
		if g.last != nil && !w.Force {
			refused = append(refused, fmt.Sprintf("%s: %v", g.svc, g.last))
			for i := range g.rows {
				g.rows[i].Error = g.last.Error()
			}
		}
	}
	if !s.json {
		if err := s.preview(groups); err != nil {
			return err
		}
	}
	if len(refused) > 0 {
		err := fmt.Errorf("nothing is written: %s; start others first, or say --force", few(refused))
		return errors.Join(s.results(groups), err)
	}
	if c.Bool("dry-run") {
		err := fmt.Errorf("%w: %s of %s would be written", errChanges, w.Verb, counted(groups))
		return errors.Join(s.results(groups), err)
	}
	atOnce(len(groups), func(i int) { groups[i].write(c.Context, w) })
	if w.For > 0 {
		s.warnNoReaper(c.Context, groups[0].svc)
	}
	failed, first := 0, ""
	for _, g := range groups {
		for _, r := range g.rows {
			if r.Error != "" {
				failed++
				first = cmp.Or(first, fmt.Sprintf("%s %s: %s", g.svc, r.Addr, r.Error))
			}
		}
	}
	if failed > 0 {
		err := fmt.Errorf("%d of %s are not written: %s", failed, counted(groups), first)
		return errors.Join(s.results(groups), s.list(groups), err)
	}
	if c.Bool("wait") {
		s.await(c, groups)
	}
	if w.Verb == "drain" {
		s.explainWaits(c.Context, groups)
	}
	var waited []error
	for _, g := range groups {
		waited = append(waited, g.waited)
	}
	return errors.Join(s.results(groups), errors.Join(waited...))
}

// atOnce calls f with 0 to n-1, of bulkAtOnce at the same time, and waits for all.
func atOnce(n int, f func(i int)) {
	var working sync.WaitGroup
	defer working.Wait()
	next := make(chan int)
	defer close(next)
	for range min(n, bulkAtOnce) {
		working.Go(func() {
			for i := range next {
				f(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
}

// find reads svcs, or all services if there are none, and returns the instances that
// meet cond, by service and address. With no such instance it is an error that says what
// is nearest.
func (s *session) find(ctx context.Context, svcs []registrar.Service, cond conditions, w registrar.Word) ([]*group, error) {
	named := len(svcs) > 0
	if !named {
		var err error
		svcs, err = registrar.Try(ctx, func(ctx context.Context) ([]registrar.Service, error) {
			svcs, _, err := s.store.Services(ctx)
			return svcs, err
		})
		if err != nil {
			return nil, err
		}
		slices.Sort(svcs)
	}
	all, errs, seen := make([]*group, len(svcs)), make([]error, len(svcs)), newHints()
	var mu sync.Mutex // of seen
	atOnce(len(svcs), func(i int) {
		g := &group{svc: svcs[i]}
		if g.snap, errs[i] = registrar.Try(ctx, func(ctx context.Context) (registrar.Snapshot, error) { return s.store.Read(ctx, g.svc, nil) }); errs[i] != nil {
			return
		}
		if named && g.snap.Token.Version == 0 {
			errs[i] = s.unknown(ctx, g.svc)
			return
		}
		for _, e := range g.snap.Entries {
			if e.Present && cond.meets(e.Instance) {
				g.add(e.Addr, true, stateWord(e.Instance), e.Instance)
			}
		}
		if cond.ofAddress() && w.Scope != registrar.ScopeRegistration && (w.Verb == "ready" || w.Verb == "weight" && w.Weight == nil) {
			errs[i] = s.away(ctx, g, cond, w)
		}
		mu.Lock()
		defer mu.Unlock()
		for _, e := range g.snap.Entries {
			if e.Present {
				seen.add(e.Instance)
			}
		}
		if len(g.rows) > 0 {
			all[i] = g
		}
	})
	if err := errors.Join(errs...); err != nil {
		return nil, err // what cannot be read may be what was meant
	}
	found := slices.DeleteFunc(all, func(g *group) bool { return g == nil })
	if len(found) == 0 {
		of := "any service"
		if named {
			of = string(svcs[0])
		}
		return nil, seen.unmet(cond, of)
	}
	for _, g := range found {
		slices.SortFunc(g.rows, func(a, b touched) int {
			return netip.MustParseAddrPort(a.Addr).Compare(netip.MustParseAddrPort(b.Addr))
		})
		for _, r := range g.rows {
			g.addrs = append(g.addrs, netip.MustParseAddrPort(r.Addr))
		}
	}
	return found, nil
}

func (g *group) add(addr netip.AddrPort, present bool, state string, i registrar.Instance) {
	g.rows = append(g.rows, touched{
		outcome: outcome{Service: g.svc, Addr: addr.String(), Present: present},
		State:   state, Weight: i.Weight(), Zone: i.Meta.Zone, Tags: i.Meta.Tags,
	})
}

// away adds the overrides that w ends of addresses whose instances are not there: when
// these come back, what was said of them is to be over too.
func (s *session) away(ctx context.Context, g *group, cond conditions, w registrar.Word) error {
	overrides, err := registrar.Try(ctx, func(ctx context.Context) ([]registrar.Override, error) { return s.store.Overrides(ctx, g.svc) })
	if err != nil {
		return err
	}
	for _, o := range overrides {
		ends := o.Weight != nil
		if w.Verb == "ready" {
			ends = o.State != registrar.AdminNone
		}
		if ends && o.Orphan() && o.Scope == registrar.ScopeAddress && cond.hasHost(o.Addr) {
			state := cmp.Or(string(o.State), "ready")
			g.add(o.Addr, false, state, registrar.Instance{Admin: o.Admin})
		}
	}
	return nil
}

// prepare looks who would be left to serve.
func (s *session) prepare(ctx context.Context, groups []*group, w registrar.Word) error {
	errs := make([]error, len(groups))
	atOnce(len(groups), func(i int) {
		g := groups[i]
		g.bulk, errs[i] = registrar.Try(ctx, func(ctx context.Context) (*registrar.Bulk, error) {
			return s.store.Bulk(ctx, g.snap, g.addrs, w)
		})
		if errs[i] == nil {
			g.last = g.bulk.Last()
		}
	})
	return errors.Join(errs...)
}

// write writes w and enters what became of each instance.
func (g *group) write(ctx context.Context, w registrar.Word) {
	for i, o := range g.bulk.Write(ctx) {
		r := &g.rows[i]
		if o.Err != nil {
			r.Error = o.Err.Error()
			g.failed++
			continue
		}
		r.Done, r.Version, r.Present, r.Scope, r.Until = w.Verb, o.Version, o.Present, o.Scope, o.Until
		g.version = max(g.version, o.Version)
	}
}

// await waits for all services together.
func (s *session) await(c *cli.Context, groups []*group) {
	ctx, cancel := context.WithTimeout(c.Context, c.Duration("timeout"))
	defer cancel()
	atOnce(len(groups), func(i int) {
		g := groups[i]
		v, err := waitServedIn(ctx, c, s, g.svc, registrar.Wanted{Ready: -1, Version: g.version})
		if g.waited = err; err != nil {
			return
		}
		g.live = len(v.Acks.Live())
		for i := range g.rows {
			g.rows[i].Balancers = &g.live
		}
	})
}

// explainWaits enters which drains wait and why, of services whose balancers have not
// applied them.
func (s *session) explainWaits(ctx context.Context, groups []*group) {
	atOnce(len(groups), func(i int) {
		g := groups[i]
		if g.rows[0].Balancers != nil {
			return
		}
		ctx, cancel := registrar.WithTimeout(ctx)
		defer cancel()
		waits, err := s.store.WaitingDrains(ctx, g.svc, g.addrs)
		if err != nil {
			s.log.Warn().Err(err).Str("service", string(g.svc)).Msg("cannot tell whether a drain waits for another instance")
			return
		}
		for i, addr := range g.addrs {
			if why := waits[addr]; why != "" {
				g.rows[i].Waits = why
				g.waits = cmp.Or(g.waits, fmt.Sprintf("the drain of %s waits: %s", addr, why))
			}
		}
		if g.waits == "" && g.last != nil { // no balancer has got to it yet
			g.waits = "the last of them waits: " + g.last.Error()
			for i := range g.rows {
				g.rows[i].Waits = g.waits
			}
		}
		if g.waits != "" && errors.Is(g.waited, errTimedOut) {
			g.waited = fmt.Errorf("%w; %s", g.waited, g.waits)
		}
	})
}

func counted(groups []*group) string {
	n := 0
	for _, g := range groups {
		n += len(g.rows)
	}
	text := plural(n, "instance")
	if len(groups) > 1 {
		text += " of " + plural(len(groups), "service")
	}
	return text
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return strconv.Itoa(n) + " " + what + "s"
}

// preview prints what will be touched.
func (s *session) preview(groups []*group) error {
	var cells [][]string
	for _, g := range groups {
		for _, r := range g.rows {
			state := r.State
			if !r.Present {
				state += ", away"
			}
			cells = append(cells, []string{string(g.svc), r.Addr, state, strconv.Itoa(r.Weight), dash(r.Zone), dash(tags(r.Tags))})
		}
	}
	return s.table(nil, "SERVICE ADDR STATE WEIGHT ZONE TAGS", cells)
}

// results prints what became of it: all instances as one JSON array, or a line for each
// service that something is written of.
func (s *session) results(groups []*group) error {
	if s.json {
		rows := []touched{}
		for _, g := range groups {
			rows = append(rows, g.rows...)
		}
		return s.document(rows)
	}
	for _, g := range groups {
		var first *touched
		for i := range g.rows {
			if first == nil && g.rows[i].Done != "" {
				first = &g.rows[i]
			}
		}
		if first == nil {
			continue
		}
		text := fmt.Sprintf("%s: %s of %s, version %d%s", g.svc, first.Done, plural(len(g.rows)-g.failed, "instance"), g.version, first.holds())
		if first.Balancers != nil {
			text += fmt.Sprintf(", applied by %d balancers", g.live)
		}
		if g.waits != "" {
			text += "; " + g.waits
		}
		if _, err := fmt.Fprintln(s.w, plain(text)); err != nil {
			return err
		}
	}
	return nil
}

// list prints what is written and what is not.
func (s *session) list(groups []*group) error {
	if s.json {
		return nil // results has said it
	}
	var cells [][]string
	for _, g := range groups {
		for _, r := range g.rows {
			cells = append(cells, []string{string(g.svc), r.Addr, yes(r.Error == ""), dash(strings.ReplaceAll(r.Error, "\n", " "))})
		}
	}
	return s.table(nil, "SERVICE ADDR WRITTEN WHY-NOT", cells)
}
