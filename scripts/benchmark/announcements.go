package main

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// announcements measures what a change costs Redis when 1,000 subscribers hear of
// it, and the floor what a bare PUBLISH of as many bytes to them costs. Changes
// come one after the other: the figure is what a core would spend at 1,000 a
// second, if it could.
func announcements(h *harness) []Row {
	const subscribers, rate = 1000, 1000
	changes := h.changes
	srv := redistest.Start(h)
	rdb := srv.Client(h)
	store, err := registrar.NewStore(rdb, registrar.DefaultNamespace)
	if err != nil {
		h.Fatal(err)
	}
	var reading sync.WaitGroup
	for range subscribers {
		w := dial(h, srv.Addr)
		if _, err := w.c.Write(encode([]string{"SUBSCRIBE", "rollcall:changes"})); err != nil {
			h.Fatal(err)
		}
		if _, err := w.answer(); err != nil {
			h.Fatal(err)
		}
		reading.Go(func() {
			for {
				if _, err := w.answer(); err != nil {
					return // it was closed
				}
			}
		})
		defer w.c.Close()
	}
	ctx, cancel := context.WithTimeout(context.Background(), loadTimeout)
	defer cancel()
	share := func(do func(i int)) float64 {
		before := busy(h, rdb)
		for i := range changes {
			do(i)
		}
		return 100 * (busy(h, rdb) - before).Seconds() / float64(changes) * rate
	}
	var runs []rates
	n := 0
	for range h.runs {
		floor := share(func(i int) {
			if err := rdb.Publish(ctx, "rollcall:changes", fmt.Sprintf("%d web-%d %d", 100+i, i%10, 100+i)).Err(); err != nil {
				h.Fatal(err)
			}
		})
		figure := share(func(i int) {
			n++
			if _, err := store.Beat(ctx, registrar.Service(fmt.Sprintf("web-%d", i%10)), changed(n)); err != nil {
				h.Fatal(err)
			}
		})
		runs = append(runs, rates{figure, floor})
	}
	r := rateRow("announcements/1000 subscribers", "% of a core", fmt.Sprintf("at %d changes a second; by %d changes one after the other", rate, changes), 0, runs)
	r.AtLeast = false
	return []Row{r}
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
