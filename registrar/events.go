package registrar

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// The log of changes, for people: the scripts write an entry with each change.
// It is no part of the register, which is right without it.

const (
	// eventsPage is how many entries one call reads.
	eventsPage = 1000
	// EventsWait is how long Next waits for an entry at most.
	EventsWait = time.Second
	// eventsPoll is how often Next looks in a Cluster, where no call can wait on
	// several slots.
	eventsPoll = 500 * time.Millisecond
)

// What an Event says. Protected and Released are of a service, or of all; the
// others are of an address.
const (
	EventJoined       = "joined"
	EventChanged      = "changed"  // its metadata
	EventTakeover     = "takeover" // another registration has the address now
	EventDraining     = "draining" // it is about to leave
	EventLeft         = "left"
	EventUnhealthy    = "unhealthy"
	EventExpired      = "expired"
	EventDrained      = "drained" // an operator's words, this one and the next four
	EventMaint        = "maint"
	EventReady        = "ready"
	EventWeight       = "weight"
	EventDeregistered = "deregistered"
	EventEnded        = "override-ended" // by a reaper: its time is over, or nobody has had its address for long
	EventProtected    = "protected"      // the first reaper holds it
	EventReleased     = "released"       // no reaper holds it any more
)

// Event is one entry of the log.
type Event struct {
	ID      string  `json:"id"`      // where a reader goes on: "<ms>-<n>", growing
	At      int64   `json:"at"`      // unix ms by Redis' clock
	Service Service `json:"service"` // empty with a hold on every service
	Addr    string  `json:"addr"`    // as it is stored; empty with a hold
	What    string  `json:"what"`
	Version int64   `json:"version"` // of the service, after the change; 0 with a hold
	// By is the token of the instance, or the reaper's id with a hold, or who an operator
	// said to be; empty if nobody said.
	By  string `json:"by"`
	Why string `json:"why"` // for people, at most 256 bytes; empty where there is no more to say
}

var eventID = regexp.MustCompile(`^[0-9]{1,20}(-[0-9]{1,20})?$`)

// CheckEventID refuses what is no id of an event.
func CheckEventID(id string) error {
	if !eventID.MatchString(id) {
		return fmt.Errorf("event id %q: want MS or MS-N", id)
	}
	return nil
}

// EventsAt is the id that all events from at on, unix ms by Redis' clock, come
// after.
func EventsAt(at int64) string {
	return strconv.FormatInt(max(at, 1)-1, 10) + "-18446744073709551615"
}

// Events returns the last n events, or all that are kept if n is 0, that came
// after the id since, or ever if that is empty: of svcs, or of all services if
// there are none. A hold on every service is of each. Oldest first. Of a Cluster
// it returns what answers and, as an error, what does not.
func (s *Store) Events(ctx context.Context, svcs []Service, since string, n int) ([]Event, error) {
	return s.EventReader(svcs).Last(ctx, since, n)
}

// EventReader reads the log from some place on. It is for one goroutine.
type EventReader struct {
	store *Store
	svcs  []Service         // whose; none = all
	last  map[string]string // by key of a stream: the id read last
	since string            // of the streams that are not in last
}

// EventReader returns a reader of the events of svcs, of all services if there
// are none. It does no I/O.
func (s *Store) EventReader(svcs []Service) *EventReader {
	return &EventReader{store: s, svcs: svcs, last: map[string]string{}}
}

// Last is Store.Events, and has Next go on after what it has seen.
func (r *EventReader) Last(ctx context.Context, since string, n int) ([]Event, error) {
	if since != "" {
		if err := CheckEventID(since); err != nil {
			return nil, err
		}
	}
	keys, err := r.streams(ctx)
	if err != nil {
		return nil, err
	}
	var all []Event
	var errs []error
	for _, key := range keys {
		events, err := r.back(ctx, key, since, n)
		if err != nil {
			errs = append(errs, fmt.Errorf("read %s: %w", key, err))
			continue
		}
		all = append(all, events...)
	}
	// A stream that is new, or did not answer, is of interest from here on.
	r.since = cmp.Or(since, "0-0")
	if since == "" {
		for _, id := range r.last {
			if eventLess(r.since, id) {
				r.since = id
			}
		}
	}
	sortEvents(all)
	if n > 0 {
		all = all[max(0, len(all)-n):]
	}
	return all, errors.Join(errs...)
}

// Next returns the events that came after those that were read before, as soon
// as there are some, or none after EventsWait at most. After an error it may be
// called again. ErrOtherHistory says that the log has begun anew before the
// place where this reader was, as after a restart with old data and a clock that
// went back: the next call begins with all that is kept, so an event may come
// twice and none is missed.
func (r *EventReader) Next(ctx context.Context) ([]Event, error) {
	ctx, cancel := context.WithTimeout(ctx, EventsWait+Timeout)
	defer cancel()
	keys, err := r.streams(ctx)
	if err != nil {
		return nil, err
	}
	block := EventsWait
	if r.store.keys.cluster {
		block = -1 // do not
	}
	var all []Event
	var errs []error
	cmds := make([]*redis.XStreamSliceCmd, len(keys))
	// A Cluster's nodes are asked at the same time.
	pipe := r.store.rdb.Pipeline()
	for i, key := range keys {
		args := &redis.XReadArgs{Streams: []string{key, r.place(key)}, Count: eventsPage, Block: block}
		if r.store.keys.cluster {
			cmds[i] = pipe.XRead(ctx, args)
		} else {
			cmds[i] = r.store.rdb.XRead(ctx, args)
		}
	}
	if pipe.Len() > 0 {
		if err := unanswered(pipe.Exec(ctx)); err != nil {
			return nil, fmt.Errorf("read the events: %w", err)
		}
	}
	for i, key := range keys {
		streams, err := cmds[i].Result()
		switch {
		case errors.Is(err, redis.Nil): // nothing came
			err = r.anew(ctx, key)
		case err == nil && len(streams) == 1:
			messages := streams[0].Messages
			all = append(all, r.events(messages)...)
			r.last[key] = messages[len(messages)-1].ID
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("read %s: %w", key, err))
		}
	}
	if r.store.keys.cluster && len(all) == 0 && len(errs) == 0 {
		wait := time.NewTimer(Shorten(eventsPoll))
		defer wait.Stop()
		select {
		case <-ctx.Done():
		case <-wait.C:
		}
	}
	sortEvents(all)
	return all, errors.Join(errs...)
}

// streams returns the keys to read: one, or in a Cluster one a service.
func (r *EventReader) streams(ctx context.Context) ([]string, error) {
	k := r.store.keys
	if !k.cluster {
		return []string{k.Events()}, nil
	}
	svcs := r.svcs
	if len(svcs) == 0 {
		var err error
		if svcs, _, err = r.store.Services(ctx); err != nil {
			return nil, err
		}
	}
	keys := make([]string, len(svcs))
	for i, svc := range svcs {
		keys[i] = k.Of(svc).Events()
	}
	slices.Sort(keys)
	return slices.Compact(keys), nil
}

func (r *EventReader) place(key string) string {
	return cmp.Or(r.last[key], r.since, "0-0")
}

// back reads a stream from its end, until n events of ours are found or since
// is reached.
func (r *EventReader) back(ctx context.Context, key, since string, n int) ([]Event, error) {
	var found []Event // newest first
	for to := "+"; ; {
		messages, err := r.store.rdb.XRevRangeN(ctx, key, to, "-", eventsPage).Result()
		if err != nil {
			return nil, err
		}
		if to == "+" {
			r.last[key] = "0-0"
			if len(messages) > 0 {
				r.last[key] = messages[0].ID
			}
		}
		whole := len(messages) < eventsPage
		if i := slices.IndexFunc(messages, func(m redis.XMessage) bool { return since != "" && !eventLess(since, m.ID) }); i >= 0 {
			messages, whole = messages[:i], true
		}
		found = append(found, r.events(messages)...)
		if whole || n > 0 && len(found) >= n {
			slices.Reverse(found)
			return found, nil
		}
		to = "(" + messages[len(messages)-1].ID
	}
}

// anew tells, of a stream with nothing after our place in it, whether that place
// is of another history.
func (r *EventReader) anew(ctx context.Context, key string) error {
	messages, err := r.store.rdb.XRevRangeN(ctx, key, "+", "-", 1).Result()
	if err != nil {
		return err
	}
	if len(messages) > 0 && eventLess(messages[0].ID, r.place(key)) && r.last[key] != "" {
		r.last[key] = "0-0"
		return ErrOtherHistory
	}
	return nil
}

// events parses entries and leaves out those of other services.
func (r *EventReader) events(messages []redis.XMessage) []Event {
	var out []Event
	for _, m := range messages {
		field := func(name string) string { return strings.ToValidUTF8(text(m.Values[name]), "\uFFFD") }
		e := Event{ID: m.ID, Service: Service(field("service")), Addr: field("addr"), What: field("what"), By: field("id"), Why: field("why")}
		// What is no number was written by somebody else, and reads as 0.
		e.At, _ = strconv.ParseInt(field("at"), 10, 64)
		e.Version, _ = strconv.ParseInt(field("version"), 10, 64)
		if len(r.svcs) == 0 || e.Service == "" || slices.Contains(r.svcs, e.Service) {
			out = append(out, e)
		}
	}
	return out
}

// sortEvents puts the events of several streams, each in order, into the order
// of their ids.
func sortEvents(events []Event) {
	slices.SortStableFunc(events, func(a, b Event) int {
		switch {
		case eventLess(a.ID, b.ID):
			return -1
		case eventLess(b.ID, a.ID):
			return 1
		}
		return 0
	})
}

// eventLess tells whether id a is before id b; what is none is 0.
func eventLess(a, b string) bool {
	ams, an := splitEventID(a)
	bms, bn := splitEventID(b)
	return ams < bms || ams == bms && an < bn
}

func splitEventID(id string) (ms, n uint64) {
	left, right, _ := strings.Cut(id, "-")
	ms, _ = strconv.ParseUint(left, 10, 64)
	n, _ = strconv.ParseUint(right, 10, 64)
	return ms, n
}
