package registrar

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	// bulkChunk is how many words go to Redis in one exchange.
	bulkChunk = 100
	// bulkAge is how old what balancers said may be when it is relied on.
	bulkAge = 500 * time.Millisecond
	// BulkTimeout is how long a Bulk goes on while it can write nothing.
	BulkTimeout = 10 * time.Second
)

// Bulk is one operator's word about many instances of a service. Unless it is forced it
// takes instances out, by a drain too, only while another server serves in each backend
// of each live balancer. It may be used by one goroutine at a time.
type Bulk struct {
	store   *Store
	svc     Service
	word    Word
	weight  string                   // as Word.check returns it
	addrs   []netip.AddrPort         // all that it is about
	entries map[netip.AddrPort]Entry // the service, as it was read last
	// version is the service's, of which entries and this Bulk's own words are all.
	version int64
	token   Token // of the last read
	changed bool  // somebody else has changed the service since
	sights  []Sight
	looked  time.Time     // when sights was read
	timeout time.Duration // BulkTimeout, but in tests

	done   map[netip.AddrPort]Written
	lost   bool   // Redis does not know the script, and must be sent its text
	unsaid Unsaid // the last change that is to be announced later
}

// emptied is ErrLast of a Bulk.
type emptied struct{ balancer, backend string }

func (e emptied) Error() string {
	return fmt.Sprintf("it would leave nobody that serves: %s sends requests to no other server of %s", e.balancer, e.backend)
}

func (e emptied) Unwrap() error { return ErrLast }

// Bulk prepares w about addrs, and writes nothing. snap is all of their service; what it
// says of them is believed until somebody changes the service.
func (s *Store) Bulk(ctx context.Context, snap Snapshot, addrs []netip.AddrPort, w Word) (*Bulk, error) {
	weight, err := w.check()
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", w.Verb, snap.Service, err)
	}
	b := &Bulk{store: s, svc: snap.Service, word: w, weight: weight, addrs: addrs, timeout: BulkTimeout, done: map[netip.AddrPort]Written{}}
	b.merge(snap)
	if len(b.out(addrs)) == 0 {
		return b, nil
	}
	return b, b.observe(ctx)
}

// Last returns ErrLast if the word would leave a backend of a live balancer, in which
// one of the instances serves, without a server that does. It is what was known when the
// Bulk was made.
func (b *Bulk) Last() error { return b.last(b.addrs) }

func (b *Bulk) last(pending []netip.AddrPort) error {
	out := b.out(pending)
	for _, sight := range b.sights {
		others := sight.others()
		for _, addr := range out {
			if backend, alone := sight.alone(addr, others); alone {
				return emptied{sight.Balancer, backend}
			}
		}
	}
	return nil
}

// out returns those of pending to which the word ends the requests.
func (b *Bulk) out(pending []netip.AddrPort) (out []netip.AddrPort) {
	for _, addr := range pending {
		if e := b.entries[addr]; e.Present && b.word.stops(e.Instance) {
			out = append(out, addr)
		}
	}
	return out
}

// merge enters a read of the service.
func (b *Bulk) merge(snap Snapshot) {
	if snap.Full || b.entries == nil {
		b.entries = make(map[netip.AddrPort]Entry, len(snap.Entries))
	}
	for _, e := range snap.Entries {
		b.entries[e.Addr] = e
	}
	b.token, b.version, b.changed = snap.Token, snap.Token.Version, false
}

// observe reads what live balancers say of the instances that go by this word, or go
// already: a server that is up and none of these is another one that serves.
func (b *Bulk) observe(ctx context.Context) error {
	acks, err := b.store.Acks(ctx, b.svc)
	if err != nil {
		return err
	}
	going := b.out(b.addrs)
	for addr, e := range b.entries {
		if e.going() {
			going = append(going, addr)
		}
	}
	b.sights = nil
	if len(going) > 0 {
		b.sights, err = b.store.Sights(ctx, b.svc, acks.Live(), going...)
	}
	b.looked = time.Now()
	return err
}

// Write writes the word about each instance, and returns what became of each, in the
// order that Bulk was given. Those that the word takes out are written one version of
// the service after another: if somebody else changes it, so do two operators who take
// out a half each, it is looked at again before the next one is written. Those that are
// left when they would leave nobody that serves have ErrLast, an instance that has gone
// meanwhile ErrAbsent. It ends BulkTimeout after it could write
// nothing more.
func (b *Bulk) Write(ctx context.Context) []Written {
	guarded := b.out(b.addrs)
	if b.word.Force {
		guarded = nil
	}
	later := map[netip.AddrPort]bool{}
	for _, addr := range guarded {
		later[addr] = true
	}
	var free []netip.AddrPort
	for _, addr := range b.addrs {
		if !later[addr] {
			free = append(free, addr)
		}
	}
	b.write(ctx, free, false)
	b.write(ctx, guarded, true)
	b.store.announceLater(ctx, b.unsaid)
	all := make([]Written, len(b.addrs))
	for i, addr := range b.addrs {
		all[i] = b.done[addr]
	}
	return all
}

// errRestless says that the service changes faster than it can be looked at.
var errRestless = errors.New("the service changes faster than it can be told who serves; try again when it stands still")

// write sends pending until each has an answer, or until nothing more can be written.
func (b *Bulk) write(ctx context.Context, pending []netip.AddrPort, guarded bool) {
	end := time.Now().Add(b.timeout)
	for failures := 0; len(pending) > 0; {
		var err error
		if guarded {
			err = b.look(ctx, pending)
		}
		left := pending
		if err == nil {
			chunk := pending[:min(bulkChunk, len(pending))]
			if b.lost {
				chunk = chunk[:1]
			}
			left, err = b.send(ctx, chunk, guarded)
			left = append(left, pending[len(chunk):]...)
		}
		if len(left) < len(pending) {
			failures, end = 0, time.Now().Add(b.timeout)
		}
		pending = left
		pause := time.Duration(0)
		if err != nil {
			failures++
			pause = Backoff(failures, lastTry)
		}
		if late := time.Now().Add(pause).After(end); err == nil && late && len(pending) > 0 {
			err = errRestless
		} else if err != nil && Passing(err) && !late && ctx.Err() == nil {
			err = nil
			wait := time.NewTimer(pause)
			select {
			case <-ctx.Done():
				err = ctx.Err()
			case <-wait.C:
			}
			wait.Stop()
		}
		if err != nil {
			for _, addr := range pending {
				b.done[addr] = Written{Addr: addr, Err: err}
			}
			return
		}
	}
}

// look returns ErrLast if pending may not be written now. It reads what has changed, and
// what balancers say if that is too old.
func (b *Bulk) look(ctx context.Context, pending []netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(ctx, TryFor)
	defer cancel()
	if b.changed {
		snap, err := b.store.Read(ctx, b.svc, &b.token)
		if err != nil {
			return err
		}
		b.merge(snap)
		b.looked = time.Time{}
	}
	if time.Since(b.looked) > bulkAge {
		if err := b.observe(ctx); err != nil {
			return err
		}
	}
	return b.last(pending)
}

// send writes the word about chunk in one exchange. It returns those that have no answer
// yet, and an error of Redis that may pass.
func (b *Bulk) send(ctx context.Context, chunk []netip.AddrPort, guarded bool) (left []netip.AddrPort, err error) {
	ctx, cancel := WithTimeout(ctx)
	defer cancel()
	s, marks, cmds := b.store, make([]string, len(chunk)), make([]*redis.Cmd, len(chunk))
	keys := s.keys.Of(b.svc).change(b.svc, s.keys.Of(b.svc).overrides(b.svc)...)
	argv := func(i int) []any {
		version := ""
		if guarded { // each takes the service a version on
			version = strconv.FormatInt(b.version+int64(i), 10)
		}
		marks[i] = rand.Text()
		return append([]any{s.keys.Changes(), string(b.svc), s.now, marks[i]}, b.word.args(chunk[i], b.weight, version)...)
	}
	if b.lost {
		cmds[0] = s.admin.Run(ctx, s.rdb, keys, argv(0)...)
	} else if err := unanswered(s.rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
		for i := range chunk {
			cmds[i] = s.admin.EvalSha(ctx, p, keys, argv(i)...)
		}
		return nil
	})); err != nil {
		return chunk, err
	}
	b.lost = false
	for i, addr := range chunk {
		r, e := cmds[i].Slice()
		var o Written
		var status string
		if e == nil {
			var u Unsaid
			if r, u = withheld(r, b.svc, marks[i]); !u.At.IsZero() {
				b.unsaid = u
			}
			o, status, e = written(addr, r)
		}
		switch {
		case e != nil && redis.HasErrorPrefix(e, "NOSCRIPT"):
			b.lost = true
			left = append(left, addr)
			continue
		case Passing(e):
			err = e
			left = append(left, addr)
			continue
		case e != nil:
			o.Err = e
		case status == "STALE":
			b.changed = b.changed || o.Version != b.version
			left = append(left, addr)
			continue
		case status == "ABSENT":
			o.Err = ErrAbsent
		case status == "OK" && o.Version == b.version+1:
			b.version = o.Version
		}
		b.done[addr] = o
	}
	return left, err
}
