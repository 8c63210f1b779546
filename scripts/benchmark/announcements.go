package main

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"rollcall/notifier"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// burstRate is of changes, a second, over 10 services.
const (
	burstRate   = 1000
	burstWindow = 4 * time.Second
)

// burst changes 10 services at burstRate, or as fast as this machine can, and
// returns what part of a core Redis spent meanwhile, in percent, and the rate.
func burst(ctx context.Context, h *harness, store *registrar.Store, rdb *redis.Client, n *atomic.Int64) (share, rate float64) {
	before, begun := busy(h, rdb), time.Now()
	var changing sync.WaitGroup
	due := make(chan struct{})
	for range 32 {
		changing.Go(func() {
			for range due {
				i := int(n.Add(1))
				if _, err := store.Beat(ctx, registrar.Service(fmt.Sprintf("web-%d", i%10)), changed(i)); err != nil {
					h.Fatal(err)
				}
			}
		})
	}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	sent := 0
	for ran := time.Duration(0); ran < burstWindow; ran = time.Since(begun) {
		if sent >= int(ran.Seconds()*burstRate) {
			<-tick.C
			continue
		}
		due <- struct{}{}
		sent++
	}
	close(due)
	changing.Wait()
	took := time.Since(begun)
	return 100 * (busy(h, rdb) - before).Seconds() / took.Seconds(), float64(sent) / took.Seconds()
}

// announcements measures what changes cost Redis when 1,000 subscribers hear of
// them: the floor is a bare PUBLISH of as many bytes for each of 1,000 changes a
// second, if a core could.
func announcements(h *harness) []Row {
	const subscribers = 1000
	srv := redistest.Start(h)
	rdb := srv.Client(h)
	store, err := registrar.NewStore(rdb, registrar.DefaultNamespace)
	if err != nil {
		h.Fatal(err)
	}
	var reading sync.WaitGroup
	var told, last atomic.Int64 // messages to one of them, and the last global version
	for i := range subscribers {
		w := dial(h, srv.Addr)
		if _, err := w.c.Write(encode([]string{"SUBSCRIBE", "rollcall:changes"})); err != nil {
			h.Fatal(err)
		}
		if _, err := w.answer(); err != nil {
			h.Fatal(err)
		}
		reading.Go(func() {
			for {
				if i > 0 {
					if _, err := w.answer(); err != nil {
						return // it was closed
					}
					continue
				}
				payload, err := w.payload()
				if err != nil {
					return
				}
				told.Add(1)
				var global int64
				if _, err := fmt.Sscan(payload, &global); err != nil {
					h.Fatal(err)
				}
				last.Store(global)
			}
		})
		defer w.c.Close()
	}
	ctx, cancel := context.WithTimeout(context.Background(), loadTimeout)
	defer cancel()
	var runs []rates
	var messages, late, changes []float64
	var n atomic.Int64
	for range h.runs {
		before := busy(h, rdb)
		for i := range h.changes {
			if err := rdb.Publish(ctx, "rollcall:changes", fmt.Sprintf("%d web-%d %d", 100+i, i%10, 100+i)).Err(); err != nil {
				h.Fatal(err)
			}
		}
		floor := 100 * (busy(h, rdb) - before).Seconds() / float64(h.changes) * burstRate
		first := told.Load()
		share, rate := burst(ctx, h, store, rdb, &n)
		runs, changes = append(runs, rates{share, floor}), append(changes, rate)
		ended := time.Now()
		version, err := rdb.Get(ctx, "rollcall:version").Int64()
		if err != nil {
			h.Fatal(err)
		}
		h.await(5*time.Second, "the last change is announced", func() error {
			if got := last.Load(); got != version {
				return fmt.Errorf("%d of %d is", got, version)
			}
			return nil
		})
		late = append(late, float64(time.Since(ended))/float64(time.Millisecond))
		messages = append(messages, float64(told.Load()-first)/burstWindow.Seconds())
	}
	r := rateRow("announcements/burst", "% of a core", "1,000 subscribers, 1,000 changes a second; against one PUBLISH for each", 0, runs)
	r.AtLeast = false
	var shares []float64
	for _, run := range runs {
		shares = append(shares, run.figure)
	}
	return []Row{
		r, value("announcements/burst/cpu", "% of a core", "the same: Redis' main thread, the changes included", 20, shares),
		value("announcements/burst/changes", "a second", "that this machine made", 0, changes),
		value("announcements/burst/messages", "a second", "to each subscriber", 0, messages),
		value("announcements/burst/end", "ms", "from the end of the burst until its last change is announced", 0, late),
	}
}

// watchers measures what 1,000 watchers of the same 10 services cost Redis: while
// nothing changes, while these change 1,000 times a second, and while as many
// changes are of others.
func watchers(h *harness) []Row {
	count := 1000
	if h.short {
		count = 100
	}
	srv := redistest.Start(h)
	rdb := srv.Client(h)
	store, err := registrar.NewStore(rdb, registrar.DefaultNamespace)
	if err != nil {
		h.Fatal(err)
	}
	var svcs []registrar.Service
	for i := range 10 {
		svcs = append(svcs, registrar.Service(fmt.Sprintf("web-%d", i)))
	}
	ctx, cancel := context.WithCancel(context.Background())
	var watching sync.WaitGroup
	defer watching.Wait()
	defer cancel()
	seen := make([]atomic.Int64, count) // the sum of the versions of all 10
	for i := range count {
		own, err := registrar.Open(srv.URL(), 1)
		if err != nil {
			h.Fatal(err)
		}
		defer own.Close()
		s, err := registrar.NewStore(own, registrar.DefaultNamespace)
		if err != nil {
			h.Fatal(err)
		}
		w, err := notifier.New(notifier.Config{Services: svcs}, s, h.log)
		if err != nil {
			h.Fatal(err)
		}
		versions := map[registrar.Service]int64{}
		watching.Go(func() {
			if err := w.Run(ctx, func(c notifier.Change) {
				seen[i].Add(c.Token.Version - versions[c.Service])
				versions[c.Service] = c.Token.Version
			}); err != nil {
				h.Fatal(err)
			}
		})
	}
	h.await(loadTimeout, "all watchers listen", func() error {
		n, err := rdb.PubSubNumSub(ctx, "rollcall:changes").Result()
		if err == nil && n["rollcall:changes"] != int64(count) {
			err = fmt.Errorf("%d do", n["rollcall:changes"])
		}
		return err
	})
	time.Sleep(2 * time.Second) // their first reads
	var idle, own, lag, changes []float64
	var n atomic.Int64
	for range h.runs {
		before, begun := busy(h, rdb), time.Now()
		time.Sleep(burstWindow)
		idle = append(idle, 100*(busy(h, rdb)-before).Seconds()/time.Since(begun).Seconds())
		share, rate := burst(ctx, h, store, rdb, &n)
		own, changes = append(own, share), append(changes, rate)
		ended := time.Now()
		v, err := store.Versions(ctx, svcs)
		if err != nil {
			h.Fatal(err)
		}
		var sum int64
		for _, version := range v.Of {
			sum += version
		}
		h.await(loadTimeout, "all watchers have seen the end", func() error {
			for i := range seen {
				if got := seen[i].Load(); got != sum {
					return fmt.Errorf("watcher %d: %d of %d", i, got, sum)
				}
			}
			return nil
		})
		lag = append(lag, float64(time.Since(ended))/float64(time.Millisecond))
	}
	return []Row{
		value("watchers/idle", "% of a core", fmt.Sprintf("Redis, with %d watchers of 10 services", count), 0, idle),
		value("watchers/burst", "% of a core", "… which change 1,000 times a second", 20, own),
		value("watchers/burst/changes", "a second", "… that this machine made, which runs the watchers too", 0, changes),
		value("watchers/burst/end", "ms", "… from the end of that until all have read the last change", 0, lag),
	}
}

// changed is a beat that differs from the one with another n.
func changed(n int) registrar.Beat {
	return registrar.Beat{Addr: netip.MustParseAddrPort("127.150.0.1:9"), Token: "changing", Meta: fmt.Sprintf(`{"id":"changing","weight":100,"tags":{"n":"%d"}}`, n)}
}

// consumers measures a watcher of 10 services while 10,000 others change: what it
// should not have to pay for. The floor is the same watcher while nothing
// changes.
func consumers(h *harness) []Row {
	const services, rate, window = 10_000, 1000, 5 * time.Second
	srv := redistest.Start(h)
	store, err := registrar.NewStore(srv.Client(h), registrar.DefaultNamespace)
	if err != nil {
		h.Fatal(err)
	}
	args := []string{"watch", "--redis", srv.URL()}
	for i := range 10 {
		args = append(args, fmt.Sprintf("mine-%d", i))
	}
	p := h.process(h.dir(), h.rollcall(), args...)
	rdb := srv.Client(h)
	ctx, cancel := context.WithTimeout(context.Background(), 10*loadTimeout)
	defer cancel()
	h.await(changeTimeout, "the watcher listens", func() error {
		n, err := rdb.PubSubNumSub(ctx, "rollcall:changes").Result()
		if err == nil && n["rollcall:changes"] == 0 {
			err = fmt.Errorf("nobody does")
		}
		return err
	})
	n := 0
	measure := func(rate int) (cpu, bytes float64) {
		ran, read, begun := h.ran(p.Pid), h.received(p.Pid), time.Now()
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for sent := 0; time.Since(begun) < window; <-tick.C {
			for ; sent < int(time.Since(begun).Seconds()*float64(rate)); sent++ {
				n++
				if _, err := store.Beat(ctx, registrar.Service(fmt.Sprintf("other-%d", n%services)), changed(n)); err != nil {
					h.Fatal(err)
				}
			}
		}
		took := time.Since(begun)
		return 100 * float64(h.ran(p.Pid)-ran) / float64(took), (h.received(p.Pid) - read) / 1024 / took.Seconds()
	}
	var cpus, bytes []rates
	for range h.runs {
		c0, b0 := measure(0)
		c, b := measure(rate)
		cpus, bytes = append(cpus, rates{c, c0}), append(bytes, rates{b, b0})
	}
	what := fmt.Sprintf("a watcher of 10 services, while %d others change %d times a second; against an idle time", services, rate)
	rows := []Row{rateRow("consumers/cpu", "% of a core", what, 0, cpus), rateRow("consumers/bytes", "kB/s", what, 0, bytes)}
	for i := range rows {
		rows[i].AtLeast = false
	}
	return rows
}
