package lbsync

import (
	"hash/fnv"
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
	State  Admin // with Serve
	Weight int   // with Serve, 0 to 256
	// Fast puts a new server into rotation before its first health check: it
	// was up a moment ago, in a process that was replaced.
	Fast bool
	// Overdue ends the wait for connections in use, and Settled the quarantine
	// in maint, of a leaving server.
	Overdue, Settled bool
}

// Inventory is what a backend has, indexed. Only Plan and its owner use it.
type Inventory struct {
	Process Process
	Slots   int  // server-template slots that are ours
	Dynamic bool // place new servers with Add rather than in slots
	// Overflow adds servers when every slot is taken.
	Overflow bool
	Checks   bool // dynamic servers get a health check
	Static   bool // the balance algorithm knows no weight but none and the configured one
	// Serving counts the servers, ours or not, that are ready and up with a
	// weight.
	Serving int
	// Rising counts ours that wait for their health check, with a weight.
	Rising int

	byAddr map[netip.AddrPort]*Server // ours, with an address of an instance
	byName map[string]*Server
	ids    map[int]bool
	extra  []*Server       // in rotation, with an address that another has too or that is nobody's
	took   map[string]bool // templates of which a slot has taken an instance's address

	queue  []freeSlot                 // free slots, longest free first, and some that are free no more
	free   map[*Server]time.Time      // which of them are, and since when
	vacant map[netip.AddrPort]*Server // free slots by the instance that they held last
}

type freeSlot struct {
	server *Server
	since  time.Time // zero: free since before we looked
}

// SlotHost is the host name that makes a server-template slot ours.
const SlotHost = "slot.invalid"

// placeholder tells whether a slot has never been given an instance since the
// process started: it has the template's port, which is no instance's. 3.5-dev5
// loses that port where there is a default-server line, and says 0.
func placeholder(s *Server) bool { return s.Addr.Port() <= 1 && s.Addr.Addr().IsLoopback() }

// NewInventory indexes a whole state. wanted tells whether the register wants an
// address served: a slot in maint that holds any other is free.
func NewInventory(st State, wanted func(netip.AddrPort) bool) *Inventory {
	inv := &Inventory{
		Process: st.Process,
		byAddr:  make(map[netip.AddrPort]*Server, len(st.Servers)),
		byName:  make(map[string]*Server, len(st.Servers)),
		ids:     make(map[int]bool, len(st.Servers)),
		took:    map[string]bool{},
		free:    map[*Server]time.Time{},
		vacant:  map[netip.AddrPort]*Server{},
	}
	for i := range st.Servers {
		s := &st.Servers[i]
		inv.ids[s.ID] = true
		inv.byName[s.Name] = s
		inv.count(s, 1)
		if !s.Ours() {
			continue
		}
		if s.Slot {
			inv.Slots++
		}
		if !s.Addr.IsValid() {
			continue // not usable: the template lacks a numeric init-addr
		}
		if !placeholder(s) {
			inv.takes(s)
		}
		switch {
		case s.Slot && (placeholder(s) || s.Admin == Maint && s.Weight == 0 && !wanted(s.Addr)):
			inv.vacate(s, time.Time{})
			if placeholder(s) && s.Admin != Maint {
				// HAProxy was replaced between our look and our commands, which
				// were meant for the instance that the slot had there.
				inv.extra = append(inv.extra, s)
			}
		default:
			if free := inv.index(s); free != nil {
				inv.vacate(free, time.Time{})
			}
		}
	}
	return inv
}

// takes notes that a slot has an instance's address.
func (inv *Inventory) takes(s *Server) {
	if s.Slot {
		inv.took[template(s)] = true
	}
}

// template names the server-template that a slot is of: HAProxy numbers its slots.
func template(s *Server) string { return strings.TrimRight(s.Name, "0123456789") }

// index enters s under its address. Of two with one address the one in
// rotation stays, and the other goes: index returns it if its slot is free.
func (inv *Inventory) index(s *Server) (free *Server) {
	other, taken := inv.byAddr[s.Addr]
	if !taken || other == s {
		inv.byAddr[s.Addr] = s
		return nil
	}
	if other.Admin > s.Admin {
		other, s = s, other
		inv.byAddr[s.Addr] = other
	}
	switch idle := s.Admin == Maint && s.Weight == 0; {
	case Human(*s): // left alone
	case !idle:
		inv.extra = append(inv.extra, s)
	case s.Slot:
		return s
	}
	return nil
}

func (inv *Inventory) vacate(s *Server, since time.Time) {
	inv.queue = append(inv.queue, freeSlot{s, since})
	inv.free[s] = since
	if !placeholder(s) {
		inv.vacant[s.Addr] = s
	}
}

// freed says since when each free slot that held an instance has been free.
func (inv *Inventory) freed(since func(name string) time.Time) {
	for i := range inv.queue {
		if f := &inv.queue[i]; !placeholder(f.server) {
			f.since = since(f.server.Name)
			inv.free[f.server] = f.since
		}
	}
	slices.SortStableFunc(inv.queue, func(a, b freeSlot) int { return a.since.Compare(b.since) })
}

// occupy takes a slot out of the free ones.
func (inv *Inventory) occupy(s *Server) {
	delete(inv.free, s)
	if inv.vacant[s.Addr] == s {
		delete(inv.vacant, s.Addr)
	}
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

// Each calls f for each of our servers that holds an instance's address.
func (inv *Inventory) Each(f func(Server)) {
	for _, s := range inv.byAddr {
		f(*s)
	}
}

// Update enters what was read back after ops.
func (inv *Inventory) Update(ops []Op, servers []Server) {
	read := make(map[string]*Server, len(servers))
	for i := range servers {
		read[servers[i].Name] = &servers[i]
	}
	for _, op := range ops {
		fresh, there := read[op.Name]
		old, known := inv.byName[op.Name]
		if known {
			inv.count(old, -1)
			if inv.byAddr[old.Addr] == old {
				delete(inv.byAddr, old.Addr)
			}
		}
		if !there {
			if known {
				delete(inv.byName, old.Name)
				delete(inv.ids, old.ID)
			}
			continue
		}
		if known {
			slot := old.Slot
			*old = *fresh
			old.Slot = slot
		} else {
			old = fresh
			inv.byName[old.Name] = old
			inv.ids[old.ID] = true
		}
		inv.count(old, 1)
		if old.Ours() && old.Addr.IsValid() && !placeholder(old) {
			inv.takes(old)
			inv.index(old) // the next whole look finds a slot that is free by it
		}
	}
}

// Release makes the slot of an address that has left free from now on. It tells
// whether there was one.
func (inv *Inventory) Release(addr netip.AddrPort, now time.Time) bool {
	s, ok := inv.byAddr[addr]
	if !ok || !s.Slot || s.Admin != Maint || s.Weight != 0 {
		return false
	}
	delete(inv.byAddr, addr)
	inv.vacate(s, now)
	return true
}

// Free counts the free slots.
func (inv *Inventory) Free() int { return len(inv.free) }

// Plan returns the next ops towards wants, in the order in which they must be
// carried out, and the addresses for which there is no slot. It is one step:
// after the ops have been read back, the next Plan goes on from what is there,
// and an empty plan means that nothing is left to do but to wait. It changes
// only inv's list of free slots.
//
// The first slot of a template that gets an instance costs two steps, and so does
// every slot of a Process that DefersAddr: it must be seen to have the right address
// before it may be made ready.
func Plan(wants []Want, inv *Inventory, now time.Time, quarantine time.Duration) (ops []Op, unplaced []netip.AddrPort) {
	for _, s := range inv.extra {
		ops = append(ops, inv.weigh(s, 0), op(SetMaint, s))
	}
	inv.extra = nil
	var place []Want
	for _, w := range wants {
		s, ok := inv.byAddr[w.Addr]
		if back := inv.vacant[w.Addr]; !ok && back != nil && w.Goal == Serve {
			inv.occupy(back)
			inv.byAddr[w.Addr] = back
			s, ok = back, true
		}
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
		if inv.Dynamic || inv.Overflow && len(inv.free) == 0 {
			id := freeID(w.Addr, inv.ids, taken)
			taken[id] = true
			// The name says the address: what follows a refused Add finds no
			// server, and no other one either.
			s := &Server{Name: DynamicName(w.Addr), ID: id, Addr: w.Addr, Admin: Maint}
			ops = append(ops, Op{Kind: Add, Name: s.Name, ID: id, Addr: w.Addr})
			ops = inv.serve(ops, w, s)
			continue
		}
		s := inv.takeSlot(now, quarantine)
		if s == nil {
			unplaced = append(unplaced, w.Addr)
			continue
		}
		// One that is not in maint yet (see extra) is on its way there with these ops.
		look := placeholder(s) && (s.Admin != Maint || !inv.took[template(s)]) || inv.Process.DefersAddr()
		// The weight 0 is said even where it is: if HAProxy has just been replaced,
		// the slot has the template's, and would look like a human's maint.
		ops = append(ops, inv.weigh(s, 0), Op{Kind: SetAddr, Name: s.Name, ID: s.ID, Addr: w.Addr})
		if !look {
			// What HAProxy can refuse of an address, it would have refused the
			// one before, or the one of another slot of the template: the kind of
			// the slot's address, or a port that is mapped. The first is looked at
			// first, and so is every slot where the address comes later than its
			// command: made ready meanwhile, it would send requests to the instance
			// before.
			s := *s
			s.Addr, s.Weight = w.Addr, 0
			ops = inv.serve(ops, w, &s)
		}
	}
	return ops, unplaced
}

// takeSlot returns the slot that has been free for longest, or nil if none has
// been for as long as the quarantine.
func (inv *Inventory) takeSlot(now time.Time, quarantine time.Duration) *Server {
	for len(inv.queue) > 0 {
		f := inv.queue[0]
		since, free := inv.free[f.server]
		free = free && since.Equal(f.since)
		if free && now.Sub(since) < quarantine {
			return nil
		}
		inv.queue = inv.queue[1:]
		if free {
			inv.occupy(f.server)
			return f.server
		}
	}
	return nil
}

// serve brings one server of ours into the state that w asks for.
func (inv *Inventory) serve(ops []Op, w Want, s *Server) []Op {
	if Human(*s) && w.State != Maint {
		return ops
	}
	if w.State == Maint {
		// The weight goes first: killed between the two, lbsync must not find a
		// maint that looks like a human's.
		if s.Weight != 0 {
			ops = append(ops, inv.weigh(s, 0))
		}
		if s.Admin != Maint {
			ops = append(ops, op(SetMaint, s))
		}
		return ops
	}
	checked := s.Checked
	if !s.Slot && inv.Checks && !checked {
		ops = append(ops, op(EnableHealth, s))
		checked = true
	}
	// A server that comes into rotation with a check waits for the check: HAProxy
	// would take it for up until the first one, and answer 503. It must be down
	// before it can be chosen: before it is ready, or has a weight.
	unproven := checked && !w.Fast && w.State == Ready && (s.Admin == Maint || !s.Passed)
	if s.Admin != w.State {
		if unproven && s.Admin == Drain && s.Weight > 0 {
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

// leave brings one server of ours a step nearer to its end.
func (inv *Inventory) leave(ops []Op, w Want, s *Server) []Op {
	switch s.Admin {
	case Ready:
		return append(ops, op(SetDrain, s))
	case Drain:
		if s.Busy != 0 && !w.Overdue {
			return ops
		}
		// What is left of a slot's sessions may end in peace: it can be given
		// away meanwhile. A dynamic server could never be deleted.
		if s.Busy != 0 && !s.Slot {
			ops = append(ops, op(Shutdown, s))
		}
		return append(ops, inv.weigh(s, 0), op(SetMaint, s))
	}
	if s.Weight != 0 {
		return append(ops, inv.weigh(s, 0))
	}
	if s.Slot || !w.Settled {
		return ops
	}
	// Entering maint once more purges the connections that became idle after
	// the first time; on 2.6 they would block the deletion for 25 s.
	return append(ops, op(SetDrain, s), op(SetMaint, s), op(Delete, s))
}

// Human tells whether a human put s into maint: lbsync would have given it
// weight 0.
func Human(s Server) bool { return s.Ours() && s.Admin == Maint && s.Weight != 0 && !placeholder(&s) }

// weigh is the op that gives s a weight; with a static algorithm any but 0 is
// the configured one.
func (inv *Inventory) weigh(s *Server, weight int) Op {
	o := Op{Kind: SetWeight, Name: s.Name, ID: s.ID, Weight: weight, Percent: inv.Static}
	if inv.Static && weight > 0 {
		o.Weight = 100
	}
	return o
}

// weighs tells whether s has that weight already.
func (inv *Inventory) weighs(s *Server, weight int) bool {
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
