package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"rollcall/registrar"
)

// fleet100k has 100,000 instances beat every 5 s for three rounds, one by one, each
// waiting for its answer. Every beat must be accepted, and afterwards no score
// may be older than two rounds.
func fleet100k(h *harness) []Row {
	return beatOn(h, 100_000, 5000, "one by one on 5,000 connections", "OK", func(f *fleet) [][]byte {
		return f.beats(f.steady, rand.Perm(f.size))
	})
}

// million is the same with 1,000,000 instances, in calls of 50 as host agents
// send them, 5 of a service each.
func million(h *harness) []Row {
	return beatOn(h, 1_000_000, 16, "50 a call on 16 connections, 5 of a service", "15000 5000", func(f *fleet) [][]byte {
		_, calls := f.hosts(f.size, 5)
		return calls
	})
}

func beatOn(h *harness, size, connections int, how, want string, render func(*fleet) [][]byte) []Row {
	const (
		interval = 5 * time.Second
		slices   = 50 // of an interval
		rounds   = 3
	)
	f := newFleet(h, size)
	calls := render(f)
	parts := make([][][]byte, slices)
	for i := range parts {
		parts[i] = calls[i*len(calls)/slices : (i+1)*len(calls)/slices]
	}
	conns := f.conns(connections)
	var shares, behind []float64
	for range rounds {
		begun, before := time.Now(), busy(h, f.rdb)
		for i, part := range parts {
			time.Sleep(time.Until(begun.Add(time.Duration(i) * interval / slices)))
			exchange(h, conns, part, 1, want)
		}
		took := time.Since(begun)
		time.Sleep(interval - took)
		shares = append(shares, 100*(busy(h, f.rdb)-before).Seconds()/max(took, interval).Seconds())
		behind = append(behind, max(took, interval).Seconds()/interval.Seconds())
	}
	for _, w := range conns {
		_ = w.c.Close() // all answers have been read
	}
	ctx, cancel := context.WithTimeout(context.Background(), changeTimeout)
	defer cancel()
	store, err := registrar.NewStore(f.rdb, registrar.DefaultNamespace)
	if err != nil {
		h.Fatal(err)
	}
	now, _, err := store.Clock(ctx)
	if err != nil {
		h.Fatal(err)
	}
	var svcs []registrar.Service
	for i := 0; i < size; i += perService {
		svcs = append(svcs, registrar.Service(f.service(i)))
	}
	cutoff := now - int64(2*interval.Milliseconds())
	if median(behind) > 1 {
		cutoff = now - int64(2*median(behind)*float64(interval.Milliseconds()))
	}
	counts, err := store.Survey(ctx, svcs, now, cutoff, cutoff)
	if err != nil {
		h.Fatal(err)
	}
	members := int64(0)
	for _, c := range counts {
		members += c.Members
		if c.Stale > 0 {
			h.Fatalf("%s: %d of %d instances lost beats", c.Service, c.Stale, c.Members)
		}
	}
	if members != int64(size) {
		h.Fatalf("%d instances of %d are there", members, size)
	}
	name := fmt.Sprintf("fleet/%d", size)
	return []Row{
		value(name+"/cpu", "% of a core", "Redis, "+how+"; no beat lost", 100, shares),
		value(name+"/round", "intervals", "that a round of beats took", 1, behind),
		value(name+"/memory", "bytes", "of Redis' data an instance", 0, []float64{memory(h, f.rdb) / float64(size)}),
	}
}
