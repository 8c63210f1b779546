package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"

	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

const perService = 100

// fleet is many instances in services of 100, and the bytes of their beats.
type fleet struct {
	h    *harness
	srv  *redistest.Server
	rdb  *redis.Client
	size int
	// arrival and steady are the arguments that the store sends for a first
	// beat and for every later one of the instance that template names; roll is
	// the SHA of the script that takes many.
	arrival, steady []string
	roll            string
}

// template is replaced by the name, address and token of each instance.
var template = struct {
	service registrar.Service
	addr    netip.AddrPort
	token   string
}{"template", netip.MustParseAddrPort("127.99.99.99:8080"), "TOKENTOKENTOKENTOKENTOKEN0"}

// capture notes the arguments of the last command.
type capture struct{ args []any }

func (c *capture) DialHook(next redis.DialHook) redis.DialHook { return next }
func (c *capture) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}
func (c *capture) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		c.args = slices.Clone(cmd.Args())
		return next(ctx, cmd)
	}
}

func newFleet(h *harness, size int) *fleet {
	f := &fleet{h: h, srv: redistest.Start(h, "--maxclients", "15000"), size: size}
	f.rdb = f.srv.Client(h)
	ctx, cancel := context.WithTimeout(context.Background(), changeTimeout)
	defer cancel()
	seen := &capture{}
	rdb := f.srv.Client(h)
	rdb.AddHook(seen)
	store, err := registrar.NewStore(rdb, registrar.DefaultNamespace)
	if err != nil {
		h.Fatal(err)
	}
	b := registrar.Beat{Addr: template.addr, Token: template.token, Meta: meta(template.token)}
	beat := func() []string {
		if _, err := store.Beat(ctx, template.service, b); err != nil {
			h.Fatal(err)
		}
		args := make([]string, len(seen.args))
		for i, a := range seen.args {
			args[i] = fmt.Sprint(a)
		}
		return args
	}
	// The first beat may have to send the script's text, so it is done twice.
	b.Agent = "bench"
	beat()
	f.arrival = beat()
	b.Agent = ""
	h.await(changeTimeout, "a beat is a steady one", func() error {
		// One within the same millisecond is not.
		if f.steady = beat(); len(f.steady) == len(f.arrival) {
			return fmt.Errorf("it has %d arguments", len(f.steady))
		}
		return nil
	})
	for range 2 { // likewise
		store.BeatSteady(ctx, []registrar.ServiceBeat{{Service: template.service, Beat: b}})
	}
	f.roll = fmt.Sprint(seen.args[1])
	for first := 0; first < size; first += 10000 {
		part := make([]int, min(10000, size-first))
		for i := range part {
			part[i] = first + i
		}
		f.send(f.conns(4), f.beats(f.arrival, part), 64, "NEW")
	}
	return f
}

// meta is a registration of the usual size: 120 bytes.
func meta(token string) string {
	return fmt.Sprintf(`{"id":%q,"weight":100,"zone":"eu-west-1a","tags":{"v":"1.2.3","r":"x"},"registered":1763893622123}`, token)
}

func (f *fleet) service(i int) string { return fmt.Sprintf("svc-%05d", i/perService) }
func (f *fleet) addr(i int) string {
	return fmt.Sprintf("10.%d.%d.%d:8080", i>>16, i>>8&255, i&255)
}
func (f *fleet) token(i int) string { return fmt.Sprintf("TOKENTOKENTOKENTOKE%07d", i) }

// beats renders the beats of instances.
func (f *fleet) beats(args []string, instances []int) [][]byte {
	out := make([][]byte, len(instances))
	for n, i := range instances {
		r := strings.NewReplacer(string(template.service), f.service(i), template.addr.String(), f.addr(i), template.token, f.token(i))
		mine := make([]string, len(args))
		for j, a := range args {
			mine[j] = r.Replace(a)
		}
		out[n] = encode(mine)
	}
	return out
}

// hosts picks n instances at random, none twice, as there are on hosts of 50
// containers, so many of them of each service, and renders their beats as the
// host's agent sends them: one call a host.
func (f *fleet) hosts(n, each int) (instances []int, calls [][]byte) {
	const perHost = 50
	places := rand.Perm(f.size / each)
	for len(instances) < n {
		keys, argv := []string{"rollcall:config"}, []string{"", "0"}
		for _, place := range places[:perHost/each] {
			first := place * each
			keys = append(keys, f.key(first, "instances"), f.key(first, "meta"))
			argv = append(argv, strconv.Itoa(each))
			for i := first; i < first+each; i++ {
				instances = append(instances, i)
				argv = append(argv, f.addr(i))
			}
			for i := first; i < first+each; i++ {
				argv = append(argv, meta(f.token(i)))
			}
		}
		places = places[perHost/each:]
		calls = append(calls, encode(slices.Concat([]string{"EVALSHA", f.roll, strconv.Itoa(len(keys))}, keys, argv)))
	}
	return instances, calls
}

// zadds renders the floor of the same beats.
func (f *fleet) zadds(instances []int) [][]byte {
	now := strconv.FormatInt(time.Now().UnixMilli(), 10)
	out := make([][]byte, len(instances))
	for n, i := range instances {
		out[n] = encode([]string{"ZADD", f.key(i, "instances"), now, f.addr(i)})
	}
	return out
}

func (f *fleet) key(i int, what string) string {
	return "rollcall:{" + f.service(i) + "}:" + what
}

func (f *fleet) conns(n int) []*wire {
	ws := make([]*wire, n)
	for i := range ws {
		ws[i] = dial(f.h, f.srv.Addr)
	}
	return ws
}

// send sends commands, closes the connections and returns for how long Redis'
// main thread ran.
func (f *fleet) send(conns []*wire, commands [][]byte, pipeline int, want string) time.Duration {
	defer func() {
		for _, w := range conns {
			_ = w.c.Close() // all answers have been read
		}
	}()
	before := busy(f.h, f.rdb)
	exchange(f.h, conns, commands, pipeline, want)
	return busy(f.h, f.rdb) - before
}

// sample picks n instances at random, so that neither Redis' nor the machine's
// caches hold them; none twice, since a second beat within a millisecond is none
// that still.lua takes.
func (f *fleet) sample(n int) []int { return rand.Perm(f.size)[:n] }

// heartbeats measures how many beats one core of Redis takes: by the time that
// its main thread runs, so neither the client nor a neighbour counts.
func heartbeats(h *harness) []Row {
	size, n, clients := 100_000, 40_000, 5000
	if h.short {
		size, n, clients = 10_000, 5000, 200
	}
	f := newFleet(h, size)
	results := map[string][]rates{}
	note := func(name string, figure, floor time.Duration, beats int) {
		results[name] = append(results[name], rates{float64(beats) / figure.Seconds(), float64(beats) / floor.Seconds()})
	}
	alike := []int{50, 10, 5, 1}
	variants := f.variants()
	for range h.runs {
		who := f.sample(n)
		one := f.send(f.conns(clients), f.zadds(who), 1, "0")
		note("heartbeat/one by one", f.send(f.conns(clients), f.beats(f.steady, who), 1, "OK"), one, n)
		many := f.send(f.conns(16), f.zadds(who), 64, "0")
		note("heartbeat/pipelined", f.send(f.conns(16), f.beats(f.steady, who), 64, "OK"), many, n)
		for _, each := range alike {
			who, calls := f.hosts(n, each)
			bare := f.send(f.conns(16), f.zadds(who), 64, "0")
			note(fmt.Sprintf("heartbeat/host/%d alike", each), f.send(f.conns(16), calls, 1, "15000 5000"), bare, len(who))
		}
		if h.short {
			continue
		}
		for _, v := range variants {
			note("heartbeat/cost/"+v.name, f.send(f.conns(16), v.commands(who), 64, "OK"), many, n)
		}
	}
	meaning := map[string]string{
		"heartbeat/one by one": fmt.Sprintf("%d connections, one beat each at a time, against bare ZADD likewise", clients),
		"heartbeat/pipelined":  "16 connections, 64 beats pipelined, against bare ZADD likewise",
	}
	goals := map[string]float64{"heartbeat/host/50 alike": 0.7}
	names := []string{"heartbeat/one by one", "heartbeat/pipelined"}
	for _, each := range alike {
		name := fmt.Sprintf("heartbeat/host/%d alike", each)
		names, meaning[name] = append(names, name), fmt.Sprintf("16 hosts' agents, 50 instances a call, %d of each service, against 64 ZADDs pipelined", each)
	}
	if !h.short {
		for _, v := range variants {
			name := "heartbeat/cost/" + v.name
			names, meaning[name] = append(names, name), v.meaning
		}
	}
	var rows []Row
	for _, name := range names {
		rows = append(rows, rateRow(name, "beats/s", meaning[name], goals[name], results[name]))
	}
	return rows
}

// variant is a way to beat that is not rollcall's: it shows what one thing
// costs.
type variant struct {
	name, meaning string
	commands      func(instances []int) [][]byte
}

func (f *fleet) variants() []variant {
	ctx, cancel := context.WithTimeout(context.Background(), changeTimeout)
	defer cancel()
	load := func(source string) string {
		sha, err := f.rdb.ScriptLoad(ctx, "#!lua flags=allow-oom\n"+source).Result()
		if err != nil {
			f.h.Fatal(err)
		}
		return sha
	}
	single := func(source string) func([]int) [][]byte {
		sha := load(source)
		return func(instances []int) [][]byte {
			out := make([][]byte, len(instances))
			for n, i := range instances {
				out[n] = encode([]string{"EVALSHA", sha, "3", f.key(i, "instances"), f.key(i, "meta"), "rollcall:config", f.addr(i), meta(f.token(i)), "1763893622123"})
			}
			return out
		}
	}
	const (
		now    = "local t = redis.call('TIME') local now = t[1] * 1000 + math.floor(t[2] / 1000)\n"
		check  = "if redis.call('HGET', KEYS[2], ARGV[1]) ~= ARGV[2] then return 'CHANGED' end\n"
		config = "local c = redis.call('HMGET', KEYS[3], 'ttl_ms', 'interval_ms')\n"
		write  = "redis.call('ZADD', KEYS[1], now, ARGV[1])\n"
		done   = "return {'OK', now, 0, 15000, 5000}"
	)
	lib := "#!lua name=bench\nredis.register_function{function_name='benchbeat', flags={'allow-oom'}, callback=function(KEYS, ARGV)\n" +
		now + check + config + write + done + "\nend}"
	if err := f.rdb.FunctionLoadReplace(ctx, lib).Err(); err != nil {
		f.h.Fatal(err)
	}
	return []variant{
		{"script", "an empty script with 3 keys", single("return 'OK'")},
		{"zadd", "a script that only writes the score", single("redis.call('ZADD', KEYS[1], ARGV[3], ARGV[1]) return 'OK'")},
		{"time", "… at the server's own time", single(now + write + "return 'OK'")},
		{"check", "… if token and metadata are the same", single(now + check + write + "return 'OK'")},
		{"config", "… and answers with TTL and interval", single(now + check + config + write + done)},
		{"fcall", "the same as a function", func(instances []int) [][]byte {
			out := make([][]byte, len(instances))
			for n, i := range instances {
				out[n] = encode([]string{"FCALL", "benchbeat", "3", f.key(i, "instances"), f.key(i, "meta"), "rollcall:config", f.addr(i), meta(f.token(i)), "1763893622123"})
			}
			return out
		}},
	}
}

// rates are what rollcall and the floor reach a second in one run.
type rates struct{ figure, floor float64 }

func rateRow(name, unit, meaning string, goal float64, runs []rates) Row {
	var figures, floors, ratios []float64
	for _, r := range runs {
		figures, floors, ratios = append(figures, r.figure), append(floors, r.floor), append(ratios, r.figure/r.floor)
	}
	return Row{
		Name: name, Unit: unit, Meaning: meaning, Goal: goal, AtLeast: true,
		Figure: median(figures), Floor: median(floors), Ratio: median(ratios), Low: slices.Min(ratios), High: slices.Max(ratios),
	}
}
