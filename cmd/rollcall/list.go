//go:build !sidecar

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/urfave/cli/v2"

	"rollcall/registrar"
)

// serviceRow is one line of `services`.
type serviceRow struct {
	Service   registrar.Service `json:"service"`
	Instances int64             `json:"instances"`
	Version   int64             `json:"version"`
	Stale     int64             `json:"stale"` // silent for longer than the TTL
	// Serving is how many of them get requests, in the backend where that is fewest;
	// Balancers is how many live ones follow the service, and Backends how it stands in each.
	Serving   int                         `json:"serving"`
	Balancers int                         `json:"balancers"`
	Backends  []registrar.BackendStanding `json:"backends"`
	unsaid    map[string]bool             // balancers that follow it and have never said how it stands
}

func servicesCommand() *cli.Command {
	return &cli.Command{
		Name: "services", Usage: "list the services that have instances",
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
			rows, err := registrar.Try(c.Context, func(ctx context.Context) ([]serviceRow, error) {
				rows, err := s.services(ctx)
				if rows == nil {
					return nil, err
				}
				_, unread := s.stand(ctx, rows)
				return rows, errors.Join(err, unread)
			})
			if rows == nil {
				return err
			}
			if len(rows) == 0 {
				s.nameElsewhere(c.Context)
			}
			cells := make([][]string, len(rows))
			for i, r := range rows {
				cells[i] = []string{string(r.Service), strconv.FormatInt(r.Instances, 10), strconv.Itoa(r.Serving), strconv.Itoa(r.Balancers), strconv.FormatInt(r.Stale, 10), strconv.FormatInt(r.Version, 10)}
			}
			return errors.Join(err, s.table(rows, "SERVICE INSTANCES SERVING BALANCERS STALE VERSION", cells))
		},
	}
}

// services returns the rows that could be read, or none, and why not all.
func (s *session) services(ctx context.Context) ([]serviceRow, error) {
	svcs, _, err := s.store.Services(ctx)
	if err != nil {
		return nil, err
	}
	slices.Sort(svcs)
	if !s.store.Cluster() {
		return count(ctx, s.store, svcs)
	}
	parts := make([][]serviceRow, len(svcs))
	err = s.each(svcs, func(i int, of *registrar.Store) (err error) {
		parts[i], err = count(ctx, of, svcs[i:i+1])
		return err
	})
	rows := slices.DeleteFunc(append([]serviceRow{}, slices.Concat(parts...)...), func(r serviceRow) bool {
		return r.Instances == 0 // its name stays on the list for a while
	})
	return rows, err
}

// stand enters how the services of rows stand in the live balancers that follow them,
// and returns these.
func (s *session) stand(ctx context.Context, rows []serviceRow) ([]registrar.Following, error) {
	followers, err := s.store.Followers(ctx)
	if err != nil {
		return nil, err
	}
	var svcs []registrar.Service
	for _, r := range rows {
		svcs = append(svcs, r.Service)
	}
	standings, err := s.store.Standings(ctx, svcs, followers)
	if err != nil {
		return nil, err
	}
	for i := range rows {
		r := &rows[i]
		r.Serving, r.Balancers, r.Backends, r.unsaid = 0, 0, []registrar.BackendStanding{}, map[string]bool{}
		first := true
		for _, f := range followers {
			if len(f.Follows[r.Service]) > 0 {
				r.Balancers++
			}
			for _, backend := range f.Follows[r.Service] {
				st := registrar.BackendStanding{Balancer: f.Balancer, Backend: backend} // it may have said nothing
				if j := slices.IndexFunc(standings[r.Service], func(b registrar.BackendStanding) bool { return b.Balancer == f.Balancer && b.Backend == backend }); j >= 0 {
					st = standings[r.Service][j]
				} else {
					r.unsaid[f.Balancer] = true
				}
				r.Backends = append(r.Backends, st)
				if first || st.Serving < r.Serving {
					r.Serving, first = st.Serving, false
				}
			}
		}
	}
	return followers, nil
}

// each calls f with the register of every service of a Cluster, of all at the
// same time, so that a shard that hangs keeps nobody else waiting.
func (s *session) each(svcs []registrar.Service, f func(i int, of *registrar.Store) error) error {
	errs := make([]error, len(svcs))
	var asking sync.WaitGroup
	for i, svc := range svcs {
		asking.Go(func() {
			if err := f(i, s.store.Of(svc)); err != nil {
				errs[i] = fmt.Errorf("%s: %w", svc, err)
			}
		})
	}
	asking.Wait()
	return errors.Join(errs...)
}

// count reads services of one register.
func count(ctx context.Context, store *registrar.Store, svcs []registrar.Service) ([]serviceRow, error) {
	rows := make([]serviceRow, 0, len(svcs))
	if len(svcs) == 0 {
		return rows, nil
	}
	v, err := store.Versions(ctx, svcs)
	if err != nil {
		return nil, err
	}
	now, ttl, err := store.Clock(ctx)
	if err != nil {
		return nil, err
	}
	counts, err := store.Survey(ctx, svcs, now, now-ttl.Milliseconds(), now-ttl.Milliseconds())
	if err != nil {
		return nil, err
	}
	for _, n := range counts {
		rows = append(rows, serviceRow{Service: n.Service, Instances: n.Members, Version: v.Of[n.Service], Stale: n.Stale, Backends: []registrar.BackendStanding{}})
	}
	return rows, nil
}

// instanceRow is one line of `instances`.
type instanceRow struct {
	Addr   string               `json:"addr"`
	State  string               `json:"state"` // ready, drain, maint or garbage; away: nobody has the address, and an override stands
	Weight int                  `json:"weight"`
	AgeMS  int64                `json:"age_ms"` // of the last heartbeat
	Zone   string               `json:"zone,omitempty"`
	Tags   map[string]string    `json:"tags,omitempty"`
	ID     string               `json:"id,omitempty"`
	Reason string               `json:"reason,omitempty"` // of the state
	Word   registrar.AdminState `json:"word,omitempty"`   // an operator's
	By     string               `json:"by,omitempty"`     // which operator's
	Until  int64                `json:"until,omitempty"`  // of Word, unix ms by Redis' clock; 0 = until ready
	// Serving is how many of Balancers, the live ones that are to serve it, send it
	// requests; NotServed is why the others do not, and who is not to serve it.
	Serving   int                   `json:"serving"`
	Balancers int                   `json:"balancers"`
	NotServed []registrar.NotServed `json:"not_served,omitempty"`
	Silent    bool                  `json:"silent"` // for longer than the TTL
}

func instancesCommand() *cli.Command {
	return &cli.Command{
		Name: "instances", Usage: "list the instances of a service", ArgsUsage: "SERVICE",
		Flags: redisFlags(outputFlag()),
		Action: func(c *cli.Context) error {
			a, err := args(c, "SERVICE", 1)
			if err != nil {
				return err
			}
			svc, err := parseService(a[0])
			if err != nil {
				return err
			}
			s, err := begin(c, 1)
			if err != nil {
				return err
			}
			defer s.close()
			v, err := registrar.Try(c.Context, func(ctx context.Context) (registrar.Served, error) { return s.store.Served(ctx, svc) })
			if err != nil {
				return err
			}
			if v.Token.Version == 0 {
				return s.unknown(c.Context, svc)
			}
			rows := instances(v)
			overrides, err := registrar.Try(c.Context, func(ctx context.Context) ([]registrar.Override, error) { return s.store.Overrides(ctx, svc) })
			if err != nil {
				return err
			}
			rows, more := withAway(rows, overrides)
			cells := make([][]string, len(rows))
			for i, r := range rows {
				age := time.Duration(r.AgeMS) * time.Millisecond
				cells[i] = []string{r.Addr, r.State, fmt.Sprintf("%d/%d", r.Serving, r.Balancers), strconv.Itoa(r.Weight), age.String(), dash(r.Zone), dash(tags(r.Tags)), dash(r.Reason), dash(r.whyNot())}
				if r.State == "garbage" || r.State == stateAway {
					cells[i][2], cells[i][3], cells[i][4] = "-", "-", "-"
				}
			}
			if more > 0 {
				s.log.Warn().Int("more", more).Msgf("there are more overrides of addresses that nobody has; see rollcall overrides %s", svc)
			}
			return s.table(rows, "ADDR STATE SERVING WEIGHT BEAT ZONE TAGS REASON NOT-SERVED", cells)
		},
	}
}

// whyNot says in words why not all serve it.
func (r instanceRow) whyNot() string {
	if r.State == stateAway {
		return r.away()
	}
	var parts []string
	if r.Silent {
		parts = append(parts, "silent")
	}
	if r.State != "garbage" && r.Balancers == 0 && len(r.NotServed) == 0 {
		parts = append(parts, "no live balancer follows the service")
	}
	for _, n := range r.NotServed {
		parts = append(parts, n.String())
	}
	return strings.Join(parts, "; ")
}

func instances(v registrar.Served) []instanceRow {
	snap, rows := v.Snapshot, []instanceRow{}
	for _, e := range snap.Entries {
		if e.Garbage != "" {
			rows = append(rows, instanceRow{Addr: e.Addr.String(), State: "garbage", Reason: e.Garbage})
			continue
		}
		if !e.Present {
			continue
		}
		i, by := e.Instance, v.By(e.Addr)
		rows = append(rows, instanceRow{
			Addr: i.Addr.String(), State: stateWord(i), Weight: i.Weight(), AgeMS: max(0, snap.Now-i.Beat),
			Zone: i.Meta.Zone, Tags: i.Meta.Tags, ID: i.Meta.ID, Reason: i.Admin.Reason, Word: i.Admin.State, By: i.Admin.By, Until: i.Admin.Until,
			Serving: by.Serving, Balancers: by.Of, NotServed: by.Not, Silent: v.Silent(i) > 0,
		})
	}
	for _, g := range snap.Garbage {
		rows = append(rows, instanceRow{Addr: g, State: "garbage", Reason: "no address"})
	}
	slices.SortFunc(rows, func(a, b instanceRow) int { return cmp.Compare(a.Addr, b.Addr) })
	return rows
}

func stateWord(i registrar.Instance) string {
	if s := i.State(); s != registrar.AdminNone {
		return string(s)
	}
	return "ready"
}

func tags(m map[string]string) string {
	parts := make([]string, 0, len(m))
	for k, v := range m {
		parts = append(parts, fmt.Sprintf("%s=%s", k, v))
	}
	slices.Sort(parts)
	return strings.Join(parts, ",")
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
