package lbsync

import (
	"hash/fnv"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Goal is what shall become of an address.
type Goal int

// The goals. Keep is the zero value: change nothing.
const (
	Keep  Goal = iota
	Serve      // be there, in State and with Weight
	Leave      // be drained, and then not be there
)

// Want is what the register asks of one address, with what the clock has to say
// about it: Plan has no clock.
type Want struct {
	Addr   netip.AddrPort
	Goal   Goal
	State  Admin // with Serve: Ready or Drain
	Weight int   // with Serve, 0 to 256
	// Fast puts a new server into rotation before its first health check: it
	// was up a moment ago, in a process that was replaced.
	Fast bool
	// Insist says State and Weight also to a server with an agent, which may have
	// changed them since they were said last.
	Insist bool
	// Now takes a leaving server out without a drain.
	Now bool
	// Overdue ends the wait for connections in use, and Settled the quarantine
	// in maint, of a leaving server.
	Overdue, Settled bool
}

// Inventory is what a backend has, indexed. Only Plan and its owner use it.
type Inventory struct {
	Process Process
	Slots   int  // server-template slots that are ours and take instances
	Dynamic bool // place new servers with Add rather than in slots
	// Overflow adds servers when no slot can be used.
	Overflow bool
	// Private says that a client's connection may stay tied to a slot's server
	// whatever instance the slot has by then: no slot is used for a second one while
	// another way is left.
	Private bool
	Checks  bool // dynamic servers get a health check
	Static  bool // the balance algorithm knows no weight but none and the configured one
	Fickle  bool // see State
	// Serving counts the servers, ours or not, that are ready and up with a
	// weight, without backups.
	Serving int
	// Rising counts ours that wait for their health check, with a weight.
	Rising int

	lacks   []Kind
	checked bool                       // a slot has a health check
	byAddr  map[netip.AddrPort]*Server // ours, with the address of an instance, or parked under it
	byName  map[string]*Server
	ids     map[int]bool
	extra   []*Server                 // not as lbsync would leave them, and of no instance
	took    map[string]bool           // templates of which a slot has taken an instance's address
	blank   map[string]netip.AddrPort // the address of a template's unused slots, where that is not Placeholder
	lone    map[string]netip.AddrPort // the same of a slot, by name, where it is the only one to tell by
	blanks  map[netip.AddrPort]bool   // all of both

	queues [restKinds][]*Server       // free slots, longest free first, and some that are free no more
	free   map[*Server]rest           // which of them are
	vacant map[netip.AddrPort]*Server // free slots by the instance that they held last
	left   map[*Server]netip.AddrPort // that instance, of slots that are not in maint yet
	spent  map[string]time.Time       // added servers beside another of their instance, by name, and since when they hold none
}

// rest is the time of a slot, or of a dynamic server, without an instance.
type rest struct {
	since time.Time      // zero: since before we looked
	used  bool           // it may have held an instance in this process
	last  netip.AddrPort // that instance; zero if unknown
	// sessions says that some of that instance's may go on, and idle that there may
	// be idle connections to it: new requests would take the way of either.
	sessions, idle bool
}

// The free slots in the order of their use: never used, clean, and those whose sessions
// must be cut or whose idle connections must be purged first.
const (
	unused = iota
	clean
	unclean
	restKinds
)

func (r rest) kind() int {
	switch {
	case !r.used:
		return unused
	case r.sessions || r.idle:
		return unclean
	}
	return clean
}

// Known is what the owner of an Inventory knows beside the state. The zero value knows
// nothing.
type Known struct {
	Allowed  func(netip.Addr) bool     // whether an instance may have this address; nil: any may
	Instance func(netip.AddrPort) bool // whether the register has an instance there, or had one; nil: that is not known
	Blank    map[string]netip.AddrPort // of the inventory before, by template
	Lone     map[string]netip.AddrPort // of the inventory before, by slot
	Rests    map[string]rest           // the free slots of the inventory before, by name
	Held     map[string]netip.AddrPort // the instances of its other slots
	Spent    map[string]time.Time      // of the inventory before
	Now      time.Time                 // other slots are free since then; zero: since before we looked
}

// SlotHost is the host name that makes a server-template slot ours.
const SlotHost = "slot.invalid"

// placeholder tells whether addr is that of a server without an instance: the one that
// lbsync gives, or the usual one of a template. 3.5-dev5 loses a template's port where
// there is a default-server line, and says 0.
func placeholder(addr netip.AddrPort) bool { return addr.Port() <= 1 && addr.Addr().IsLoopback() }

// parked tells whether s, which is ours, holds no instance. A template may have any
// other address for its unused slots.
func (inv *Inventory) parked(s *Server) bool {
	switch {
	case placeholder(s.Addr):
		return true
	case !s.Slot || !s.Addr.IsValid():
		return false
	}
	return inv.blanks[s.Addr] && (s.Addr == inv.blank[template(s)] || s.Addr == inv.lone[s.Name])
}

// Blank tells whether a template has addr for its unused slots, so that it cannot be an
// instance's.
func (inv *Inventory) Blank(addr netip.AddrPort) bool { return placeholder(addr) || inv.blanks[addr] }

// Hear takes in that the register knows an instance at addr. So a lone slot with it was
// no unused one.
func (inv *Inventory) Hear(addr netip.AddrPort) {
	if !inv.blanks[addr] {
		return
	}
	for name, a := range inv.lone {
		if s := inv.byName[name]; a == addr {
			delete(inv.lone, name)
			delete(inv.blanks, addr)
			if s != nil && s.Addr == addr {
				inv.occupy(s)
				inv.index(s)
			}
		}
	}
	for _, a := range inv.blank {
		inv.blanks[a] = true
	}
}

// Human tells whether somebody else than lbsync put s into maint: lbsync leaves no
// instance's address on a server in maint. It stays there, whatever its weight and
// whether its instance is there, until it is made ready.
func (inv *Inventory) Human(s Server) bool {
	return s.Ours() && s.Admin == Maint && s.Addr.IsValid() && !inv.parked(&s)
}

// key is the address that s is filed under: a dynamic server's name says it while the
// server is parked.
func (inv *Inventory) key(s *Server) netip.AddrPort {
	if s.Slot || !inv.parked(s) {
		return s.Addr
	}
	addr, _ := dynamicAddr(s.Name)
	return addr
}

// NewInventory indexes a whole state.
func NewInventory(st State, k Known) *Inventory {
	inv := &Inventory{
		Process: st.Process, Fickle: st.Fickle, lacks: st.Lacks,
		byAddr: make(map[netip.AddrPort]*Server, len(st.Servers)),
		byName: make(map[string]*Server, len(st.Servers)),
		ids:    make(map[int]bool, len(st.Servers)),
		took:   map[string]bool{},
		free:   map[*Server]rest{},
		vacant: map[netip.AddrPort]*Server{},
		left:   map[*Server]netip.AddrPort{},
		spent:  map[string]time.Time{},
	}
	maps.Copy(inv.spent, k.Spent)
	inv.blank, inv.lone = blanks(st.Servers, k)
	inv.blanks = make(map[netip.AddrPort]bool, len(inv.blank)+len(inv.lone))
	for _, of := range []map[string]netip.AddrPort{inv.blank, inv.lone} {
		for _, a := range of {
			inv.blanks[a] = true
		}
	}
	for i := range st.Servers {
		s := &st.Servers[i]
		inv.ids[s.ID] = true
		inv.byName[s.Name] = s
		inv.count(s, 1)
		if !s.Ours() {
			continue
		}
		if s.Slot && !s.Backup {
			inv.Slots++
			inv.checked = inv.checked || s.Checked
		}
		if !s.Addr.IsValid() {
			continue // not usable: the template lacks a numeric init-addr
		}
		parked := inv.parked(s)
		if s.Slot && !parked {
			inv.took[template(s)] = true
		}
		switch {
		case s.Slot && s.Backup && (parked || inv.Human(*s)):
		case s.Slot && s.Backup:
			inv.extra = append(inv.extra, s) // it holds an instance that belongs elsewhere
		case s.Slot && parked && s.Admin != Maint && !placeholder(s.Addr):
			inv.extra = append(inv.extra, s) // free when it has the Placeholder
		case s.Slot && parked:
			r, before := k.Rests[s.Name]
			if !before {
				r = rest{used: s.Weight == 0 && s.Configured != 0, sessions: true, idle: true}
				if r.used {
					r.since = k.Now
				}
			}
			r.sessions = r.sessions && s.Busy != 0
			inv.vacate(s, r)
			if s.Admin != Maint {
				// A placement that was cut short, or commands that were meant for
				// the instance that the slot had in a process before.
				inv.extra = append(inv.extra, s)
			}
		default:
			inv.index(s)
		}
	}
	for _, q := range inv.queues {
		slices.SortStableFunc(q, func(a, b *Server) int { return inv.free[a].since.Compare(inv.free[b].since) })
	}
	return inv
}

// blanks finds the address that each template gives its unused slots, where that is no
// placeholder by itself: several slots in maint have it, as no two have one instance's,
// or it has been that before.
//
// Of a lone slot it is the address if the register knows no instance there, and no
// instance may have it, or the slot is as the configuration has it, or it has been that
// before. A human's maint looks the same to an lbsync that has not seen the instance, in
// a process that was begun since, once the register has forgotten how it went.
func blanks(servers []Server, k Known) (blank, lone map[string]netip.AddrPort) {
	blank, lone = map[string]netip.AddrPort{}, map[string]netip.AddrPort{}
	maps.Copy(blank, k.Blank)
	unknown := func(a netip.AddrPort) bool { return k.Instance != nil && !k.Instance(a) }
	for name, a := range k.Lone {
		if unknown(a) {
			lone[name] = a
		}
	}
	seen := map[string]netip.AddrPort{} // in one slot of the template, at least
	for i := range servers {
		s := &servers[i]
		if !s.Slot || s.Resolver || !s.Addr.IsValid() || placeholder(s.Addr) {
			continue
		}
		t := template(s)
		if s.Admin == Maint && seen[t] == s.Addr {
			blank[t] = s.Addr
		}
		barred := k.Allowed != nil && !k.Allowed(s.Addr.Addr())
		fresh := s.Untouched && s.Weight == s.Configured && k.Held[s.Name] != s.Addr
		if s.Admin == Maint && (barred || fresh) && unknown(s.Addr) {
			lone[s.Name] = s.Addr
		}
		if s.Admin == Maint {
			seen[t] = s.Addr
		}
	}
	return blank, lone
}

// template names the server-template that a slot is of: HAProxy numbers its slots.
func template(s *Server) string { return strings.TrimRight(s.Name, "0123456789") }

// index enters s under its address. Of two with one address the one in rotation
// stays, and the other goes, unless a human holds it.
func (inv *Inventory) index(s *Server) {
	a := inv.key(s)
	other, taken := inv.byAddr[a]
	if !taken || other == s {
		inv.byAddr[a] = s
		return
	}
	if other.Admin > s.Admin || other.Admin == s.Admin && inv.parked(other) {
		other, s = s, other
		inv.byAddr[a] = other
	}
	if !inv.Human(*s) {
		inv.extra = append(inv.extra, s)
	}
}

// beside tells whether another server than s has the instance that s is filed under.
func (inv *Inventory) beside(s *Server) bool {
	other, taken := inv.byAddr[inv.key(s)]
	return taken && other != s
}

// vacate makes a slot free.
func (inv *Inventory) vacate(s *Server, r rest) {
	kind := r.kind()
	inv.queues[kind] = append(inv.queues[kind], s)
	inv.free[s] = r
	if r.last.IsValid() {
		inv.vacant[r.last] = s
	}
}

// occupy takes a slot out of the free ones.
func (inv *Inventory) occupy(s *Server) {
	if last := inv.free[s].last; inv.vacant[last] == s {
		delete(inv.vacant, last)
	}
	delete(inv.free, s)
}

// remember returns what the next Inventory must know of this one's slots.
func (inv *Inventory) remember() (k Known) {
	k = Known{Blank: inv.blank, Lone: inv.lone, Spent: inv.spent, Rests: make(map[string]rest, len(inv.free)), Held: make(map[string]netip.AddrPort, len(inv.byAddr))}
	for s, r := range inv.free {
		k.Rests[s.Name] = r
	}
	for a, s := range inv.byAddr {
		if s.Slot {
			k.Held[s.Name] = a
		}
	}
	return k
}

// count enters s into the counts, n times.
func (inv *Inventory) count(s *Server, n int) {
	switch {
	case s.Serving():
		inv.Serving += n
	case s.Ours() && s.Admin == Ready && s.Weight > 0 && s.Checked:
		inv.Rising += n
	}
}

func serves(s *Server) int {
	if s.Serving() {
		return 1
	}
	return 0
}

// Lookup returns our server with this address.
func (inv *Inventory) Lookup(addr netip.AddrPort) (Server, bool) {
	if s, ok := inv.byAddr[addr]; ok {
		return *s, true
	}
	return Server{}, false
}

// Each calls f for each of our servers that has an instance, or is parked under one's
// address.
func (inv *Inventory) Each(f func(Server)) {
	for _, s := range inv.byAddr {
		f(*s)
	}
}

// Update enters what was read back at now, after ops. Of what only Read tells, it
// keeps what cannot have changed.
func (inv *Inventory) Update(ops []Op, servers []Server, now time.Time) {
	read := make(map[string]*Server, len(servers))
	for i := range servers {
		read[servers[i].Name] = &servers[i]
	}
	done := make(map[string]bool, len(servers))
	for _, op := range ops {
		if done[op.Name] {
			continue
		}
		done[op.Name] = true
		fresh, there := read[op.Name]
		old, known := inv.byName[op.Name]
		var held netip.AddrPort // the instance until now
		if known {
			inv.count(old, -1)
			if a := inv.key(old); inv.byAddr[a] == old {
				delete(inv.byAddr, a)
			}
			if held = inv.left[old]; !inv.parked(old) {
				held = old.Addr
			}
		}
		if !there {
			if known {
				delete(inv.byName, old.Name)
				delete(inv.ids, old.ID)
				delete(inv.spent, old.Name)
				inv.occupy(old)
			}
			continue
		}
		if known {
			fresh.Slot, fresh.Configured, fresh.Backup, fresh.Agent = old.Slot, old.Configured, old.Backup, old.Agent
			*old = *fresh
		} else {
			old = fresh
			inv.byName[old.Name] = old
			inv.ids[old.ID] = true
		}
		inv.count(old, 1)
		if !old.Ours() || !old.Addr.IsValid() || old.Slot && old.Backup {
			continue
		}
		r, free := inv.free[old]
		switch parked := inv.parked(old); {
		case !old.Slot && parked && inv.beside(old):
			inv.spent[old.Name] = now // the next whole look finds it
		case !old.Slot:
			delete(inv.spent, old.Name)
			inv.index(old)
		case !parked:
			inv.occupy(old)
			inv.took[template(old)] = true
			inv.index(old)
		case old.Admin == Maint && free:
			inv.vacate(old, r.rinsed(ops, old))
		case old.Admin == Maint:
			delete(inv.left, old)
			inv.vacate(old, rest{since: now, used: true, last: held, sessions: old.Busy != 0, idle: old.Busy != 0})
		case slices.Contains(ops, Op{Kind: SetAddr, Name: old.Name, ID: old.ID, Addr: Placeholder}):
			inv.left[old] = held
			inv.extra = append(inv.extra, old)
		}
		// Any other slot without an instance that is not in maint is for the next
		// whole look: it may be about to get an address.
	}
}

// Free counts the free slots.
func (inv *Inventory) Free() int { return len(inv.free) }

// can tells whether the balancer has a way to do k.
func (inv *Inventory) can(k Kind) bool { return !slices.Contains(inv.lacks, k) }

// Plan returns the next ops towards wants, in the order in which they must be
// carried out, and the addresses for which there is no slot. It is one step:
// after the ops have been read back, the next Plan goes on from what is there,
// and an empty plan means that nothing is left to do but to wait. It changes
// only inv's list of free slots.
//
// Killed between any two ops, lbsync must not leave what looks like a human's maint. So
// a server is in drain while it gets an instance's address and while it loses it.
//
// The first slot of a template that gets an instance costs two steps, and so does
// a server without a check in a Process that DefersAddr: it must be seen to have the
// right address before it may be made ready.
func Plan(wants []Want, inv *Inventory, now time.Time, quarantine time.Duration) (ops []Op, unplaced []netip.AddrPort) {
	for _, s := range inv.extra {
		if since, ok := inv.spent[s.Name]; ok && now.Sub(since) < quarantine {
			continue // a later whole look finds it again
		}
		ops = inv.clear(ops, s)
	}
	inv.extra = nil
	var place []Want
	for _, w := range wants {
		s, ok := inv.byAddr[w.Addr]
		switch {
		case w.Goal == Keep:
		case w.Goal == Leave && ok:
			ops = inv.leave(ops, w, s)
		case w.Goal == Serve && ok:
			ops = inv.serve(ops, w, s)
		case w.Goal == Serve:
			place = append(place, w)
		}
	}
	taken := map[int]bool{}
	for _, w := range place {
		s, r, ok := inv.takeSlot(w.Addr, now, quarantine)
		switch {
		case ok && r.kind() == unclean && r.last != w.Addr:
			// It is placed when it has been rinsed.
			ops = inv.rinse(ops, s, r)
			unplaced = append(unplaced, w.Addr)
			continue
		case ok:
			inv.occupy(s)
			ops = inv.place(ops, w, s)
			continue
		}
		if !inv.Dynamic && !inv.Overflow {
			unplaced = append(unplaced, w.Addr)
			continue
		}
		id := freeID(w.Addr, inv.ids, taken)
		taken[id] = true
		// The name says the address: what follows a refused Add finds no
		// server, and no other one either.
		s = &Server{Name: DynamicName(w.Addr), ID: id, Addr: Placeholder, Admin: Maint}
		ops = append(ops, Op{Kind: Add, Name: s.Name, ID: id, Addr: Placeholder, Check: inv.checks()})
		ops = inv.place(ops, w, s)
	}
	return ops, unplaced
}

// checks tells whether added servers have a health check: the operator's, or where
// they stand beside slots that have one, a plain one.
func (inv *Inventory) checks() bool { return inv.Checks || inv.checked && inv.can(EnableHealth) }

// takeSlot returns the slot for an instance: that which it left a moment ago, else one
// that was never used, else, once they have been free for as long as the quarantine,
// the one that has been for longest. It is for one instance in each plan.
func (inv *Inventory) takeSlot(addr netip.AddrPort, now time.Time, quarantine time.Duration) (*Server, rest, bool) {
	if s := inv.vacant[addr]; s != nil {
		return s, inv.free[s], true
	}
	for kind := range inv.queues {
		if inv.Dynamic || kind != unused && inv.Private && inv.Overflow {
			break
		}
		for q := &inv.queues[kind]; len(*q) > 0; *q = (*q)[1:] {
			s := (*q)[0]
			r, free := inv.free[s]
			if !free || r.kind() != kind {
				continue // it has been taken, or is in another queue
			}
			if r.sessions && !inv.can(Shutdown) {
				continue // until a whole look finds that they have ended
			}
			if now.Sub(r.since) < quarantine {
				break
			}
			*q = (*q)[1:]
			return s, r, true
		}
	}
	return nil, rest{}, false
}

// rinse takes a free slot a step nearer to where nothing leads to the instance before:
// a connection that carries one of its sessions would carry others' requests too (seen
// with HTTP/2 and http-reuse always on 2.6), and so would one that became idle when the
// sessions ended, after the slot came into maint. To come into maint once more purges it.
func (inv *Inventory) rinse(ops []Op, s *Server, r rest) []Op {
	if r.sessions {
		return append(ops, op(Shutdown, s))
	}
	return append(ops, inv.weigh(s, 0), op(SetDrain, s), op(SetMaint, s))
}

// rinsed is what became of it.
func (r rest) rinsed(ops []Op, s *Server) rest {
	switch {
	case s.Busy != 0:
	case r.sessions:
		r.sessions = false
	default:
		r.idle = r.idle && !slices.Contains(ops, op(SetMaint, s))
	}
	return r
}

// place gives the address of w to s, which is parked.
func (inv *Inventory) place(ops []Op, w Want, s *Server) []Op {
	look := !inv.took[template(s)] && s.Slot
	if s.Slot || s.Weight != 0 {
		// The weight 0 is said even where it is: if HAProxy has just been replaced,
		// the slot has the template's.
		ops = append(ops, inv.weigh(s, 0))
	}
	placed := *s
	placed.Addr, placed.Admin, placed.Weight, placed.Up, placed.Passed = w.Addr, Drain, 0, true, false
	if !s.Slot && inv.checks() && !s.Checked {
		ops = append(ops, op(EnableHealth, s))
		placed.Checked = true
	}
	ops = append(ops, op(SetDrain, s))
	if placed.Checked && !w.Fast {
		ops = append(ops, op(HealthDown, s))
		placed.Up = false
	}
	ops = append(ops, Op{Kind: SetAddr, Name: s.Name, ID: s.ID, Addr: w.Addr})
	if s.Agent && inv.can(EnableAgent) {
		ops = append(ops, op(EnableAgent, s))
	}
	// What HAProxy can refuse of an address, it would have refused the one of another
	// slot of the template: the kind of the slot's address, or a port that is mapped.
	// Where the address comes later than its command, a server that is up would
	// send requests to the placeholder meanwhile.
	if look || inv.Process.DefersAddr() && placed.Up {
		return ops
	}
	w.Insist = true
	return inv.serve(ops, w, &placed)
}

// serve brings one server of ours into the state that w asks for.
func (inv *Inventory) serve(ops []Op, w Want, s *Server) []Op {
	if inv.parked(s) {
		return inv.place(ops, w, s)
	}
	if inv.Human(*s) || s.Agent && !w.Insist {
		return ops
	}
	w = w.of(s)
	checked := s.Checked
	if !s.Slot && inv.Checks && !checked {
		ops = append(ops, op(EnableHealth, s))
		checked = true
	}
	// A server that comes into rotation with a check waits for the check: HAProxy
	// would take it for up until the first one, and answer 503. It must be down
	// before it can be chosen: before it is ready, or has a weight.
	unproven := checked && !w.Fast && w.State == Ready && s.Up && !s.Passed
	if s.Admin != w.State {
		if unproven && s.Weight > 0 {
			ops = append(ops, op(HealthDown, s))
		}
		if w.State == Drain {
			ops = append(ops, op(SetDrain, s))
		} else {
			ops = append(ops, op(SetReady, s))
		}
	}
	if !inv.weighs(s, w.Weight) {
		if unproven && s.Weight == 0 {
			ops = append(ops, op(HealthDown, s))
		}
		ops = append(ops, inv.weigh(s, w.Weight))
	}
	return ops
}

// of is what w comes to for s: an agent gives shares of the configured weight, so with
// one there is no other, and who shall have none is drained.
func (w Want) of(s *Server) Want {
	if s.Agent && w.State == Ready && w.Weight == 0 {
		w.State = Drain
	}
	return w
}

// leave brings one server of ours a step nearer to its end.
func (inv *Inventory) leave(ops []Op, w Want, s *Server) []Op {
	switch {
	case inv.Human(*s):
		return ops
	case inv.parked(s): // an added one: a parked slot is nobody's
		if s.Admin != Maint {
			return inv.clear(ops, s)
		}
		switch {
		case !w.Settled:
			return ops
		case s.Busy > 0: // HAProxy deletes no server that is in use
			if w.Overdue && inv.can(Shutdown) {
				ops = append(ops, op(Shutdown, s))
			}
			return ops
		}
		return inv.clear(ops, s)
	case s.Admin == Ready && !w.Now:
		return append(ops, op(SetDrain, s))
	case s.Busy != 0 && !w.Overdue && !w.Now:
		return ops
	}
	if s.Busy > 0 && !s.Slot && w.Overdue && inv.can(Shutdown) {
		// A dynamic server could never be deleted. What is left of a slot's sessions
		// may go on until the slot is given away.
		ops = append(ops, op(Shutdown, s))
	}
	return inv.park(ops, s)
}

// park takes the instance's address from s, and puts it into maint: in the next step
// where the address goes some time after the command.
func (inv *Inventory) park(ops []Op, s *Server) []Op {
	if s.Agent && inv.can(DisableAgent) {
		ops = append(ops, op(DisableAgent, s)) // it could end the maint
	}
	ops = append(ops, inv.weigh(s, 0))
	if s.Admin != Drain {
		ops = append(ops, op(SetDrain, s))
	}
	ops = append(ops, Op{Kind: SetAddr, Name: s.Name, ID: s.ID, Addr: Placeholder})
	if inv.Process.DefersAddr() {
		return ops
	}
	return append(ops, op(SetMaint, s))
}

// clear takes s, which is of no instance, a step nearer to rest.
func (inv *Inventory) clear(ops []Op, s *Server) []Op {
	switch {
	case s.Admin != Maint && !placeholder(s.Addr), !inv.parked(s):
		return inv.park(ops, s)
	case s.Admin != Maint:
		if s.Agent && inv.can(DisableAgent) {
			ops = append(ops, op(DisableAgent, s))
		}
		return append(ops, inv.weigh(s, 0), op(SetMaint, s))
	case s.Slot:
		return ops
	}
	// Entering maint once more purges the connections that became idle after
	// the first time; on 2.6 they would block the deletion for 25 s.
	return append(ops, op(SetDrain, s), op(SetMaint, s), op(Delete, s))
}

// weigh is the op that gives s a weight; with a static algorithm, or with an agent, any
// but 0 is the configured one.
func (inv *Inventory) weigh(s *Server, weight int) Op {
	o := Op{Kind: SetWeight, Name: s.Name, ID: s.ID, Weight: weight, Percent: inv.Static || s.Agent}
	if o.Percent && weight > 0 {
		o.Weight = 100
	}
	return o
}

// weighs tells whether s has that weight already.
func (inv *Inventory) weighs(s *Server, weight int) bool {
	if s.Agent {
		return s.Weight > 0 || weight == 0
	}
	if inv.Static {
		return (s.Weight > 0) == (weight > 0)
	}
	return s.Weight == weight
}

func op(k Kind, s *Server) Op { return Op{Kind: k, Name: s.Name, ID: s.ID} }

// DynamicName is the name of the server that holds addr, such as
// rc_10.0.0.7:8080 or rc_2001:db8::1:8080: HAProxy allows no brackets in it.
func DynamicName(addr netip.AddrPort) string {
	b := make([]byte, 0, len(NamePrefix)+48)
	b = append(b, NamePrefix...)
	b = addr.Addr().AppendTo(b)
	b = append(b, ':')
	return string(strconv.AppendUint(b, uint64(addr.Port()), 10))
}

// dynamicAddr returns the address that a name of DynamicName's says, and whether name
// is one. An operator's server whose name only begins so is not ours.
func dynamicAddr(name string) (netip.AddrPort, bool) {
	rest, ok := strings.CutPrefix(name, NamePrefix)
	if !ok {
		return netip.AddrPort{}, false
	}
	colon := strings.LastIndexByte(rest, ':')
	if colon < 0 {
		return netip.AddrPort{}, false
	}
	ip, err1 := netip.ParseAddr(rest[:colon])
	port, err2 := strconv.ParseUint(rest[colon+1:], 10, 16)
	addr := netip.AddrPortFrom(ip, uint16(port))
	return addr, err1 == nil && err2 == nil && DynamicName(addr) == name
}

// freeID picks a server id from addr, so that it is the same at every balancer
// and over restarts, and probes on while it is taken. It is explicit because
// 2.6's balance random and consistent hashing ignore servers that got theirs
// from HAProxy; the range is HAProxy's, 1 to 2^31-1.
func freeID(addr netip.AddrPort, used, taken map[int]bool) int {
	h := fnv.New32a()
	h.Write([]byte(addr.String()))
	id := int(h.Sum32() & (1<<31 - 1))
	for id == 0 || used[id] || taken[id] {
		id = (id + 1) & (1<<31 - 1)
	}
	return id
}
