package lbsync

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
)

// DryRun is a Balancer that changes nothing: it writes down the commands that
// it would send, and answers as if they had been carried out, so that the plan
// goes on to its end. It reads the real one. Wrap a new one for each use; its
// methods may not be called concurrently.
type DryRun struct {
	Balancer
	// Render returns the command for an op. What begins with # is written and
	// is no command.
	Render func(backend string, op Op) (string, error)
	Out    io.Writer
	// Commands counts the commands written.
	Commands int

	states map[string]State
}

// Read returns the real state, or what it would have become.
func (d *DryRun) Read(ctx context.Context, backend string) (State, error) {
	if st, ok := d.states[backend]; ok {
		st.Servers = slices.Clone(st.Servers)
		return st, nil
	}
	st, err := d.Balancer.Read(ctx, backend)
	if err != nil {
		return State{}, err
	}
	if d.states == nil {
		d.states = map[string]State{}
	}
	kept := st
	kept.Servers = slices.Clone(st.Servers)
	d.states[backend] = kept
	return st, nil
}

// Apply writes the commands for ops.
func (d *DryRun) Apply(ctx context.Context, backend string, ops []Op) (Applied, error) {
	if _, err := d.Read(ctx, backend); err != nil {
		return Applied{}, err
	}
	st := d.states[backend]
	for _, o := range ops {
		command, err := d.Render(backend, o)
		if err != nil {
			return Applied{}, err
		}
		if _, err := fmt.Fprintln(d.Out, command); err != nil {
			return Applied{}, err
		}
		if !strings.HasPrefix(command, "#") {
			d.Commands++
		}
		st.Servers = pretend(st.Servers, o)
	}
	d.states[backend] = st
	got := Applied{Process: st.Process, Active: -1}
	for _, s := range st.Servers {
		if slices.ContainsFunc(ops, func(o Op) bool { return o.Name == s.Name }) {
			got.Servers = append(got.Servers, s)
		}
	}
	return got, nil
}

// Peek returns what the servers would have become.
func (d *DryRun) Peek(ctx context.Context, backend string, servers []Server) (Applied, error) {
	st, err := d.Read(ctx, backend)
	got := Applied{Process: st.Process, Active: -1}
	for _, s := range st.Servers {
		if slices.ContainsFunc(servers, func(o Server) bool { return o.Name == s.Name }) {
			got.Servers = append(got.Servers, s)
		}
	}
	return got, err
}

// pretend carries out one op. Connections in use stay unknown, so what waits
// for them waits.
func pretend(servers []Server, o Op) []Server {
	i := slices.IndexFunc(servers, func(s Server) bool { return s.Name == o.Name })
	if o.Kind == Add && i < 0 {
		return append(servers, Server{Name: o.Name, ID: o.ID, Addr: o.Addr, Admin: Maint, Busy: -1})
	}
	if i < 0 {
		return servers
	}
	switch s := &servers[i]; o.Kind {
	case SetAddr:
		s.Addr = o.Addr
	case EnableHealth:
		s.Checked = true
	case SetReady:
		s.Admin, s.Up = Ready, true
	case SetDrain:
		s.Admin = Drain
	case SetMaint:
		s.Admin, s.Up = Maint, false
	case HealthDown:
		s.Up, s.Passed = false, false
	case SetWeight:
		s.Weight = o.Weight
	case Shutdown:
		s.Busy = 0
	case Delete:
		return slices.Delete(servers, i, i+1)
	}
	return servers
}
