package main

import (
	"context"
	"fmt"
	"time"

	"rollcall/registrar"
)

// fleet100k has 100,000 instances beat every 5 s for three rounds, one by one, each
// waiting for its answer. Every beat must be answered OK, and afterwards no score
// may be older than two rounds.
func fleet100k(h *harness) []Row {
	return beatOn(h, 100_000, 5000, 1, "one by one on 5,000 connections")
}

// million is the same with 1,000,000 instances, pipelined as host agents would.
func million(h *harness) []Row { return beatOn(h, 1_000_000, 16, 64, "64 pipelined on 16 connections") }

func beatOn(h *harness, size, connections, pipeline int, how string) []Row {
	const (
		interval = 5 * time.Second
		slices   = 50 // of an interval
		rounds   = 3
	)
	f := newFleet(h, size)
	parts := make([][][]byte, slices)
	for i := range parts {
		mine := make([]int, size/slices)
		for j := range mine {
			mine[j] = j*slices + i
		}
		parts[i] = f.beats(f.steady, mine)
	}
	conns := f.conns(connections)
	var shares, behind []float64
	for range rounds {
		begun, before := time.Now(), busy(h, f.rdb)
		for i, part := range parts {
			time.Sleep(time.Until(begun.Add(time.Duration(i) * interval / slices)))
			exchange(h, conns, part, pipeline, "OK")
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
