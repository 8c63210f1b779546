//go:build !sidecar

package main

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"rollcall/registrar"
)

// overrideRow is one line of `overrides`. Times are unix ms by Redis' clock; 0, or none,
// where there is none.
type overrideRow struct {
	Service     registrar.Service    `json:"service"`
	Addr        string               `json:"addr"`
	Scope       registrar.Scope      `json:"scope"` // address or registration
	State       registrar.AdminState `json:"state,omitempty"`
	Weight      *int                 `json:"weight,omitempty"`
	Reason      string               `json:"reason,omitempty"`
	By          string               `json:"by,omitempty"`
	At          int64                `json:"at,omitempty"`
	Until       int64                `json:"until,omitempty"` // of the state
	WeightUntil int64                `json:"weight_until,omitempty"`
	Present     bool                 `json:"present"`        // somebody has the address, or is that registration
	Away        int64                `json:"away,omitempty"` // since when nobody is, as reapers know
	Garbage     string               `json:"garbage,omitempty"`
}

func overridesCommand() *cli.Command {
	return &cli.Command{
		Name: "overrides", Usage: "list what operators have said of instances (drain, maint, weight), also of those that are away", ArgsUsage: "[SERVICE]",
		Description: "One of an address (OF address) holds for whoever has it, one of a registration for that alone.\n" +
			"ready and weight ... own end them; reapers end those whose time is over (--for), and those of\n" +
			"addresses that nobody has had for a week.",
		Flags: redisFlags(outputFlag()),
		Action: func(c *cli.Context) error {
			a, err := args(c, "[SERVICE]", min(1, c.Args().Len()))
			if err != nil {
				return err
			}
			var svcs []registrar.Service
			for _, name := range a {
				svc, err := parseService(name)
				if err != nil {
					return err
				}
				svcs = append(svcs, svc)
			}
			s, err := begin(c, 1)
			if err != nil {
				return err
			}
			defer s.close()
			type found struct {
				all []registrar.Override
				now int64
			}
			f, err := registrar.Try(c.Context, func(ctx context.Context) (f found, err error) {
				of := svcs
				if len(of) == 0 {
					if of, err = s.store.Overridden(ctx); err != nil {
						return f, err
					}
				}
				var errs []error
				for _, svc := range of {
					some, err := s.store.Overrides(ctx, svc)
					f.all, errs = append(f.all, some...), append(errs, err)
				}
				f.now, _, err = s.store.Clock(ctx)
				return f, errors.Join(append(errs, err)...)
			})
			if f.now == 0 && err != nil {
				return err
			}
			if err == nil && len(f.all) == 0 && len(svcs) == 1 {
				v, verr := s.store.Versions(c.Context, svcs)
				if verr == nil && v.Of[svcs[0]] == 0 {
					return s.unknown(c.Context, svcs[0])
				}
			}
			slices.SortStableFunc(f.all, func(a, b registrar.Override) int { return cmp.Compare(a.Service, b.Service) })
			rows := make([]overrideRow, len(f.all))
			cells := make([][]string, len(f.all))
			for i, o := range f.all {
				rows[i] = newOverrideRow(o)
				cells[i] = rows[i].cells(f.now)
			}
			return errors.Join(err, s.table(rows, "SERVICE ADDR OF STATE WEIGHT BY AGO ENDS THERE REASON", cells))
		},
	}
}

func newOverrideRow(o registrar.Override) overrideRow {
	return overrideRow{
		Service: o.Service, Addr: o.Addr.String(), Scope: o.Scope, State: o.State, Weight: o.Weight, Reason: o.Reason, By: o.By, At: o.At,
		Until: o.Until, WeightUntil: o.WeightUntil, Present: o.Present, Away: o.Away, Garbage: o.Garbage,
	}
}

func (r overrideRow) cells(now int64) []string {
	weight := "-"
	if r.Weight != nil {
		weight = strconv.Itoa(*r.Weight)
	}
	there := yes(r.Present)
	if r.Away > 0 {
		there = "not for " + duration(now-r.Away)
	}
	ago := "-"
	if r.At > 0 {
		ago = duration(now - r.At)
	}
	return []string{
		string(r.Service), r.Addr, string(r.Scope), dash(string(r.State)), weight, dash(r.By), ago, dash(r.ends(now)), there, dash(cmp.Or(r.Garbage, r.Reason)),
	}
}

// ends says when what ends by itself does.
func (r overrideRow) ends(now int64) string {
	var parts []string
	for _, e := range []struct {
		what string
		at   int64
	}{{string(r.State), r.Until}, {"weight", r.WeightUntil}} {
		switch left := e.at - now; {
		case e.at == 0:
		case left <= 0:
			parts = append(parts, e.what+" with a reaper's next look")
		default:
			parts = append(parts, e.what+" in "+duration(left))
		}
	}
	return strings.Join(parts, ", ")
}

const (
	// stateAway is of an address that nobody has, and that operators have said something of.
	stateAway = "away"
	// shownAway is how many of these `instances` lists.
	shownAway = 100
)

// withAway adds to the rows of a service's instances the overrides of addresses that
// nobody has, as many as are shown, and returns how many more there are.
func withAway(rows []instanceRow, overrides []registrar.Override) (all []instanceRow, more int) {
	shown := 0
	for _, o := range overrides {
		if o.Present || o.Scope != registrar.ScopeAddress || o.Garbage != "" {
			continue // of a registration that has gone nobody is affected
		}
		if shown++; shown > shownAway {
			more++
			continue
		}
		row := instanceRow{Addr: o.Addr.String(), State: stateAway, Word: o.State, Reason: o.Reason, By: o.By, Until: o.Until}
		if o.Weight != nil {
			row.Weight = *o.Weight
		}
		rows = append(rows, row)
	}
	slices.SortStableFunc(rows, func(a, b instanceRow) int { return cmp.Compare(a.Addr, b.Addr) })
	return rows, more
}

// away says what stands of an address that nobody has.
func (r instanceRow) away() string {
	said := string(r.Word)
	if said == "" {
		said = "weight " + strconv.Itoa(r.Weight)
	}
	if r.By != "" {
		said += " by " + r.By
	}
	return "nobody has it; " + said + " holds for who comes"
}
