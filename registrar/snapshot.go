package registrar

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
)

// futureTolerance is how far after Redis' own now a score may lie and still be
// believed: two hosts' clocks over a fail-over.
const futureTolerance = 1000 // ms

// row is one address as it is stored, unparsed; the has… fields tell "" from
// nothing.
type row struct {
	score, meta, admin, gone, bound string
	hasScore, hasGone               bool
}

// set enters what the i-th of a service's keys has of the address: instances, meta,
// admin, gone, bound.
func (x *row) set(i int, value string) {
	switch i {
	case 0:
		x.score, x.hasScore = value, true
	case 1:
		x.meta = value
	case 2:
		x.admin = value
	case 3:
		x.gone, x.hasGone = value, true
	case 4:
		x.bound = value
	}
}

// headParts is how many parts of an answer of read.lua come before the services.
const headParts = 6

// parseSnapshot turns an answer of read.lua, of which svc is the i-th service, into
// a Snapshot. What it cannot believe it marks as garbage; an answer of the wrong
// shape is an error.
func parseSnapshot(svc Service, answer []any, i int) (Snapshot, error) {
	if len(answer) <= headParts+i {
		return Snapshot{}, fmt.Errorf("answer of %d parts", len(answer))
	}
	head := answer[:headParts]
	r, _ := answer[headParts+i].([]any)
	if len(r) < 2 {
		return Snapshot{}, fmt.Errorf("answer of %d parts of a service", len(r))
	}
	s := Snapshot{
		Service: svc,
		Full:    integer(r[0]) == 1,
		Now:     integer(head[0]),
		Token:   Token{text(head[1]), text(head[2]), integer(r[1])},
		TTL:     millis(integer(head[3])), Interval: millis(integer(head[4])),
		served: integer(head[5]),
	}
	if s.Token.ReplID == "" || s.Now <= 0 || s.TTL <= 0 || s.Interval <= 0 || s.served <= 0 {
		return Snapshot{}, errors.New("answer without replication id, time, TTL, interval or limit")
	}
	if integer(r[0]) == toScan {
		return s, ErrLarge
	}
	if len(r) < 7 {
		return Snapshot{}, fmt.Errorf("answer of %d parts of a service", len(r))
	}
	lists := make([][]any, 0, 6)
	for _, v := range r[2:] {
		l, ok := v.([]any)
		if !ok {
			return Snapshot{}, errors.New("answer holds no lists")
		}
		lists = append(lists, l)
	}
	fill := s.fillDelta
	if s.Full {
		fill = s.fillFull
	}
	if err := fill(lists); err != nil {
		return Snapshot{}, err
	}
	if s.Full {
		s.cut()
	}
	return s, nil
}

// toScan is the status in an answer of read.lua of a service that is to be scanned.
const toScan = 3

// cut makes garbage of the instances beyond the limit: of those that beat, the first
// to be registered are served, and those last that say no time, as an entry by hand. It
// must be the same for every reader.
func (s *Snapshot) cut() {
	var beat []*Entry
	for i := range s.Entries {
		if e := &s.Entries[i]; e.Present && s.Now-e.Instance.Beat <= s.TTL.Milliseconds() {
			beat = append(beat, e)
		}
	}
	if int64(len(beat)) <= s.served {
		return
	}
	slices.SortFunc(beat, func(a, b *Entry) int {
		x, y := a.Instance.Meta.Registered, b.Instance.Meta.Registered
		return cmp.Or(cmp.Compare(flag(x <= 0), flag(y <= 0)), cmp.Compare(x, y), a.Addr.Compare(b.Addr))
	})
	for _, e := range beat[s.served:] {
		*e = Entry{Addr: e.Addr, Garbage: fmt.Sprintf("beyond the limit of %d instances that beat", s.served)}
	}
}

func (s *Snapshot) fillFull(lists [][]any) error {
	if len(lists) != 5 {
		return fmt.Errorf("answer of %d lists, want 5", len(lists))
	}
	rows := make(map[string]*row, len(lists[0])/2)
	order := make([]string, 0, len(lists[0])/2)
	for i, l := range lists {
		if len(l)%2 != 0 {
			return errors.New("answer with half a pair")
		}
		for j := 0; j < len(l); j += 2 {
			addr, value := text(l[j]), text(l[j+1])
			x := rows[addr]
			if x == nil {
				if i != 0 && i != 3 { // metadata or an override of nobody
					continue
				}
				x = &row{}
				rows[addr] = x
				order = append(order, addr)
			}
			x.set(i, value)
		}
	}
	s.Entries = make([]Entry, 0, len(order))
	for _, addr := range order {
		s.add(addr, *rows[addr])
	}
	return nil
}

func (s *Snapshot) fillDelta(lists [][]any) error {
	if len(lists) != 6 {
		return fmt.Errorf("answer of %d lists, want 6", len(lists))
	}
	addrs := lists[0]
	for _, l := range lists {
		if len(l) != len(addrs) {
			return errors.New("answer with lists of unequal length")
		}
	}
	s.Entries = make([]Entry, 0, len(addrs))
	for i := range addrs {
		var x row
		x.score, x.hasScore = number(lists[1][i])
		x.meta, x.admin = text(lists[2][i]), text(lists[3][i])
		x.gone, x.hasGone = lists[4][i].(string)
		x.bound = text(lists[5][i])
		s.add(text(addrs[i]), x)
	}
	return nil
}

// number accepts a score in RESP2 (text) and RESP3 (double) form.
func number(v any) (string, bool) {
	switch n := v.(type) {
	case string:
		return n, true
	case float64:
		return strconv.FormatFloat(n, 'f', -1, 64), true
	case int64:
		return strconv.FormatInt(n, 10), true
	}
	return "", false
}

func (s *Snapshot) add(member string, x row) {
	addr, err := ParseAddr(member)
	if err != nil {
		s.Garbage = append(s.Garbage, member)
		return
	}
	e := Entry{Addr: addr, Present: x.hasScore}
	if x.hasScore {
		if e.Instance, err = s.instance(addr, x); err != nil {
			e = Entry{Addr: addr, Garbage: err.Error()}
		}
	} else if g, ok := parseGone(x.gone); ok {
		e.Gone = &g
	} else if x.hasGone {
		e.Garbage = "a note of its going that cannot be read"
	}
	s.Entries = append(s.Entries, e)
}

func (s *Snapshot) instance(addr netip.AddrPort, x row) (Instance, error) {
	score, err := strconv.ParseFloat(x.score, 64)
	if err != nil || math.IsNaN(score) || math.IsInf(score, 0) || score < 0 {
		return Instance{}, fmt.Errorf("score %q is no time", x.score)
	}
	if score > float64(s.Now+futureTolerance) {
		return Instance{}, fmt.Errorf("score %q lies in the future", x.score)
	}
	meta, err := parseMeta(x.meta)
	if err != nil {
		return Instance{}, err
	}
	admin, err := parseAdmin(x.admin)
	if err != nil {
		return Instance{}, err
	}
	bound, err := parseAdmin(x.bound)
	if err != nil {
		return Instance{}, err
	}
	return Instance{Addr: addr, Beat: int64(score), Meta: meta, Admin: admin.over(bound, meta.ID)}, nil
}
