package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

const megabyte = 1 << 20

// rollcall is the path of the program, which scripts/bench builds beside this
// one, stripped.
func (h *harness) rollcall() string { return h.program("rollcall") }

func (h *harness) program(name string) string {
	self, err := os.Executable()
	if err != nil {
		h.Fatal(err)
	}
	path := filepath.Join(filepath.Dir(self), name)
	if _, err := os.Stat(path); err != nil {
		h.Fatalf("%v; scripts/bench builds it", err)
	}
	return path
}

// footprint measures what the program itself takes. There is no floor: the goals
// are absolute.
func footprint(h *harness) []Row {
	var rows []Row
	for _, p := range []struct{ name, row string }{{"rollcall", "footprint"}, {"rollcall-sidecar", "footprint/own"}} {
		path := h.program(p.name)
		info, err := os.Stat(path)
		if err != nil {
			h.Fatal(err)
		}
		rows = append(rows, value(p.row+"/binary", "MB", p.name+", stripped", 30, []float64{float64(info.Size()) / megabyte}))
		rows = append(rows, sidecars(h, p.row+"/sidecar", path)...)
	}
	return append(rows, balancers(h)...)
}

// sidecars runs ten at a time of a program.
func sidecars(h *harness, row, program string) []Row {
	const sidecars, window = 10, 20 * time.Second
	srv := redistest.Start(h)
	rdb, dir := srv.Client(h), h.dir()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var starts, anon, cpu []float64
	for range h.runs {
		var procs []*os.Process
		ps := rdb.Subscribe(ctx, "rollcall:changes")
		if _, err := ps.Receive(ctx); err != nil {
			h.Fatal(err)
		}
		messages := ps.Channel()
		for i := range sidecars {
			begun := time.Now()
			procs = append(procs, h.process(dir, program, "register", "--redis", srv.URL(), "--service", "web", "--addr", fmt.Sprintf("127.155.0.%d:80", i+1),
				"--id-file", filepath.Join(dir, fmt.Sprint(filepath.Base(program), i, ".id"))))
			receive(h, messages)
			starts = append(starts, float64(time.Since(begun))/float64(time.Millisecond))
		}
		if err := ps.Close(); err != nil {
			h.Fatal(err)
		}
		before := make([]time.Duration, sidecars)
		for i, p := range procs {
			before[i] = h.ran(p.Pid)
		}
		time.Sleep(window)
		for i, p := range procs {
			cpu = append(cpu, 100*float64(h.ran(p.Pid)-before[i])/float64(window))
			anon = append(anon, h.anonymous(p.Pid))
			if err := p.Kill(); err != nil {
				h.Fatal(err)
			}
		}
	}
	return []Row{
		value(row+"/start", "ms", "from exec to the first beat announced", 50, starts),
		value(row+"/memory", "MB", fmt.Sprintf("anonymous, after %v", window), 4, anon),
		value(row+"/cpu", "% of a core", fmt.Sprintf("a beat every 5 s, over %v", window), 0.05, cpu),
	}
}

// balancers fills a HAProxy with 10,000 servers.
func balancers(h *harness) []Row {
	const servers = 10_000
	srv := redistest.Start(h)
	store, err := registrar.NewStore(srv.Client(h), registrar.DefaultNamespace)
	if err != nil {
		h.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), loadTimeout)
	defer cancel()
	for i := range servers {
		token := fmt.Sprintf("token-%020d", i)
		if _, err := store.Beat(ctx, "web", registrar.Beat{
			Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 156, byte(i >> 8), byte(i)}), 9), Token: token, Meta: meta(token), Agent: "bench",
		}); err != nil {
			h.Fatal(err)
		}
	}
	var anon []float64
	for range h.runs {
		ha := haproxytest.Start(h, haproxytest.Options{Backends: []haproxytest.Backend{{Name: "be", Balance: "leastconn"}}})
		dir := h.dir()
		p := h.process(dir, h.rollcall(), "lbsync", "--state-dir", dir, "--redis", srv.URL(), "--socket", ha.Socket, "--backend", "web=be", "--mode", "dynamic", "--allow", "127.0.0.0/8")
		h.await(loadTimeout, "every server serves", func() error {
			ready := 0
			for _, s := range serversOf(h, ha, "be") {
				if s.ready && s.weight != "0" {
					ready++
				}
			}
			if ready != servers {
				return fmt.Errorf("%d of %d do", ready, servers)
			}
			return nil
		})
		anon = append(anon, h.anonymous(p.Pid))
		if err := p.Kill(); err != nil {
			h.Fatal(err)
		}
	}
	return []Row{value("footprint/lbsync/memory", "MB", "anonymous, when it has placed 10,000 servers", 60, anon)}
}

// value is a row of single figures.
func value(name, unit, meaning string, goal float64, values []float64) Row {
	m := median(values)
	return Row{Name: name, Unit: unit, Meaning: meaning, Goal: goal, Figure: m, Max: slices.Max(values), Ratio: m, Low: slices.Min(values), High: slices.Max(values)}
}

// anonymous is the memory of a process that no file backs, in megabytes.
func (h *harness) anonymous(pid int) float64 {
	return h.field(fmt.Sprintf("/proc/%d/status", pid), "RssAnon:") / 1024
}

// received is what a process has read, in bytes.
func (h *harness) received(pid int) float64 {
	return h.field(fmt.Sprintf("/proc/%d/io", pid), "rchar:")
}

func (h *harness) field(path, name string) float64 {
	text, err := os.ReadFile(path)
	if err != nil {
		h.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(line, name); ok {
			f, err := strconv.ParseFloat(strings.Fields(v)[0], 64)
			if err != nil {
				h.Fatal(err)
			}
			return f
		}
	}
	h.Fatalf("%s has no %s", path, name)
	return 0
}

// ran is for how long a process was on a CPU, in all its threads.
func (h *harness) ran(pid int) time.Duration {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil || len(threads) == 0 {
		h.Fatalf("process %d has no threads: %v", pid, err)
	}
	var sum int64
	for _, t := range threads {
		text, err := os.ReadFile(t)
		if err != nil {
			h.Fatal(err)
		}
		ns, err := strconv.ParseInt(strings.Fields(string(text))[0], 10, 64)
		if err != nil {
			h.Fatal(err)
		}
		sum += ns
	}
	return time.Duration(sum)
}
