package haproxy

import (
	"context"
	"fmt"
	"strings"

	"rollcall/lbsync"
)

// inspection is what a process was found to have in one backend that `show servers
// state` does not tell. It cannot change while the process lives, but for servers that
// an operator adds.
type inspection struct {
	process lbsync.Process
	names   map[string]bool // servers that are not added by lbsync
	backups map[string]bool // those of them that are backups
	fault   string          // see lbsync.State
}

// kept returns the last inspection of a backend.
func (c *Client) kept(backend string) inspection {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.inspected[backend]
}

// has tells whether the inspection knows every one of servers. It need not know those
// that lbsync adds, which are never backups.
func (i inspection) has(servers []lbsync.Server) bool {
	for _, s := range servers {
		if !i.names[s.Name] && (s.Slot || !s.Ours()) {
			return false
		}
	}
	return true
}

// mark enters what the inspection knows of servers.
func (i inspection) mark(servers []lbsync.Server) {
	for j := range servers {
		servers[j].Backup = i.backups[servers[j].Name]
	}
}

// hasResolver begins the reply to a slot's own name as its new one, which changes
// nothing, where a resolver looks that name up. Elsewhere it is refused, since "no
// resolution is configured" (2.6 to 3.5-dev5).
const hasResolver = "no need to change the F" // …DQN, or …QDN

// maxTemplates bounds how many templates of one backend are inspected.
const maxTemplates = maxCommands

// inspect asks for what the list of servers, of the reply r, does not tell: which are
// backups, whether the socket may change servers, and whether HAProxy itself resolves
// the host name of slots, and so takes them out whatever lbsync says.
func (c *Client) inspect(ctx context.Context, backend string, r reply, servers []lbsync.Server) (inspection, error) {
	in := inspection{process: r.process, names: make(map[string]bool, len(servers)), backups: map[string]bool{}}
	var slots []lbsync.Server // one of each template
	templates := map[string]bool{}
	for _, s := range servers {
		in.names[s.Name] = true
		if t := strings.TrimRight(s.Name, "0123456789"); s.Slot && !templates[t] && len(slots) < maxTemplates {
			templates[t] = true
			slots = append(slots, s)
		}
	}
	if len(servers) > 0 {
		_, rows, _ := strings.Cut(r.states[0], "\n")
		id, _, _ := strings.Cut(rows, " ")
		// By number: a frontend may have the backend's name.
		got, err := c.exchange(ctx, []string{"show stat " + id + " 4 -1"})
		if err != nil {
			return inspection{}, err
		}
		if !got.process.Same(r.process) {
			return inspection{}, lbsync.ErrReplaced
		}
		if err := in.parseBackups(got.stats, backend); err != nil {
			return inspection{}, err
		}
	}
	probes := make([]string, 0, len(slots))
	for _, s := range slots {
		probes = append(probes, "set server "+backend+"/"+s.Name+" fqdn "+lbsync.SlotHost)
	}
	if len(probes) == 0 {
		probes = append(probes, "set server "+backend+"/"+nobody+" state ready")
	}
	got, err := c.exchange(ctx, probes)
	if err != nil {
		return inspection{}, err
	}
	if !got.process.Same(r.process) {
		return inspection{}, lbsync.ErrReplaced
	}
	in.fault = c.fault(backend, servers, slots, got.refused, in.backups)
	c.mu.Lock()
	c.inspected[backend] = in
	c.mu.Unlock()
	return in, nil
}

func (in *inspection) parseBackups(stats []string, backend string) error {
	if len(stats) != 1 {
		return fmt.Errorf("%w: reply has %d statistics", lbsync.ErrUnknown, len(stats))
	}
	rows, err := table(strings.TrimPrefix(stats[0], "# "))
	if err != nil {
		return fmt.Errorf("%w: malformed statistics: %w", lbsync.ErrUnknown, err)
	}
	column, err := columns(rows[0])
	if err != nil {
		return err
	}
	for _, row := range rows[1:] {
		if row[column[pxname]] != backend {
			return fmt.Errorf("%w: statistics of %q", lbsync.ErrUnknown, row[column[pxname]])
		}
		if row[column[rowType]] == statServer && row[column[bck]] == "1" {
			in.backups[row[column[svname]]] = true
		}
	}
	return nil
}

// fault says why a backend cannot be driven, from the replies to the probes of slots,
// one each, and from what its servers are; empty if it can.
func (c *Client) fault(backend string, servers, slots []lbsync.Server, replies []string, backups map[string]bool) string {
	for i, words := range replies {
		switch {
		case denied(words):
			return fmt.Sprintf("the socket refuses every change (%s); write: stats socket %s mode 660 level admin", strings.TrimSpace(words), c.cfg.Socket)
		case strings.HasPrefix(words, hasResolver) && len(replies) == len(slots):
			return fmt.Sprintf("its server-template of %s has `resolvers`, so HAProxy looks %s up and takes every slot out; take `resolvers` out of its line, or out of the default-server line that it has it from",
				slots[i].Name, lbsync.SlotHost)
		}
	}
	for _, s := range servers {
		if s.Slot && s.Agent && s.Configured <= 1 && !backups[s.Name] {
			return fmt.Sprintf("slot %s has agent-check and the weight %d, of which an agent's 75%% is 0; write `weight 100` into the server-template", s.Name, s.Configured)
		}
	}
	return ""
}
