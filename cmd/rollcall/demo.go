//go:build !sidecar

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"rollcall/lbsync"
	"rollcall/registrar"
)

const (
	demoInstances = 3                // that the story begins with
	stepBound     = 10 * time.Second // for anything that has no bound of its own
	stepPoll      = 5 * time.Millisecond
	lookOn        = time.Second            // after each step
	checkEvery    = 500 * time.Millisecond // HAProxy's inter
	restartAfter  = 500 * time.Millisecond // HAProxy's, as a supervisor would
	// reapBound is that of a dead instance in the register: its TTL and a second,
	// and a heartbeat, by which one pulse that comes late sets the cut-off back.
	reapBound = demoTTL + demoInterval + time.Second
)

func demoCommand() *cli.Command {
	return &cli.Command{
		Name:  "demo",
		Usage: "play a short story in this terminal, on a private Redis and a private HAProxy",
		Flags: []cli.Flag{
			outputFlag(),
			&cli.BoolFlag{Name: "hold", EnvVars: env("demo-hold"), Usage: "keep everything running after the story, to play with, until SIGINT"},
			&cli.BoolFlag{Name: "keep", EnvVars: env("demo-keep"), Usage: "keep the directory with the logs and haproxy.cfg"},
		},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usage("unexpected argument %q", c.Args().First())
			}
			p, err := newPrinter(c)
			if err != nil {
				return err
			}
			// The clean-up is bounded, and another signal must not cut it short.
			ctx, stop := signal.NotifyContext(c.Context, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
			defer stop()
			ctx, unread := whileRead(ctx, c)
			defer unread()
			out := c.App.Writer
			if p.json {
				out = c.App.ErrWriter // the story; the summary alone is data
			}
			d := &demo{view: newDemoView(out, unread), hold: c.Bool("hold"), keep: c.Bool("keep")}
			return d.run(ctx, func(s demoSummary) error {
				if p.json {
					return p.document(s)
				}
				d.view.summary(s)
				return nil
			})
		},
	}
}

// demo is one run of the story.
type demo struct {
	hold, keep bool
	view       *demoView
	stage      *demoStage
	stream     *demoStream
	steps      []demoStep

	mu      sync.Mutex
	foreign map[int]bool // HAProxy processes that the demo did not start; guarded by mu
}

// demoStep is one step of the story and what came of it.
type demoStep struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	TookMS int64  `json:"took_ms"` // until it had happened
	demoCounts
	Note string `json:"note"` // what was seen, or why it is not ok

	explain string
	do      func(context.Context) (took time.Duration, note string, err error)
}

// demoSummary is what the story came to.
type demoSummary struct {
	OK         bool       `json:"ok"`
	Steps      []demoStep `json:"steps"`
	Total      demoCounts `json:"total"`
	GapMS      int64      `json:"gap_ms"` // from HAProxy's death to the first good answer
	TTLMS      int64      `json:"ttl_ms"`
	IntervalMS int64      `json:"interval_ms"`
	Config     string     `json:"haproxy_cfg_sha256"`
	Unchanged  bool       `json:"haproxy_cfg_unchanged"`
	Reloads    int        `json:"haproxy_reloads_by_rollcall"`
}

var errInterrupted = errors.New("interrupted before the story's end")

// run plays the story. Whatever happens, it ends what it started.
func (d *demo) run(ctx context.Context, report func(demoSummary) error) (err error) {
	if d.stage, err = newDemoStage(); err != nil {
		return err
	}
	keep := d.keep
	defer func() {
		d.view.clear()
		ended, cerr := d.stage.close(ctx, keep)
		if cerr != nil {
			err = cmp.Or(err, fmt.Errorf("clean up: %w", cerr))
		}
		what := "removed"
		if keep {
			what = "kept, with logs and haproxy.cfg:"
		}
		d.view.say("processes ended: %d; %s %s", ended, what, d.stage.dir)
	}()
	if err := d.stage.writeConfig(); err != nil {
		return err
	}
	if err := d.stage.connect(); err != nil {
		return err
	}
	d.stream = newDemoStream(d.stage.haproxyAddr().String())

	running, stop := context.WithCancel(ctx)
	var goroutines sync.WaitGroup
	defer goroutines.Wait()
	defer stop()
	stepErr := d.story(running, &goroutines)
	if ctx.Err() != nil {
		return errInterrupted
	}
	s := d.sum(stepErr)
	if err := report(s); err != nil {
		return err
	}
	if !s.OK {
		keep = true
		err = errors.New("not everything happened as it should")
	}
	if d.hold && stepErr == nil {
		d.holds(ctx)
	}
	return err
}

// story plays every step. It returns an error if it could not go on.
func (d *demo) story(ctx context.Context, goroutines *sync.WaitGroup) error {
	d.view.say("%s a private Redis at %s,", d.view.strong("rollcall demo:"), d.stage.redisAddr())
	d.view.say("a private HAProxy at http://%s/. Ctrl-C ends everything.", d.stage.haproxyAddr())
	d.view.say("TTL %v and heartbeat %v, for a short story; the defaults are %v and %v.",
		demoTTL, demoInterval, registrar.DefaultTTL, registrar.DefaultInterval)
	steps := []demoStep{
		{Name: "start", explain: "three instances register and get slots in HAProxy; requests begin.",
			do: func(ctx context.Context) (time.Duration, string, error) { return d.start(ctx, goroutines) }},
		{Name: "join", explain: "web-4 joins. A heartbeat announces it, HAProxy's check lets it serve.",
			do: d.join},
		{Name: "leave", explain: "web-1 leaves in order. It stops when HAProxy has let go of it.",
			do: d.leave},
		{Name: "kill", explain: "web-2 is killed. HAProxy's check sees it; after its TTL it is reaped.",
			do: d.kill},
		{Name: "reload", explain: "HAProxy is reloaded. Its state file hands the servers on.",
			do: d.reload},
		{Name: "restart", explain: fmt.Sprintf("HAProxy is killed, and started %v later: a gap, counted apart.", restartAfter),
			do: d.restart},
	}
	for n, s := range steps {
		if err := d.play(ctx, n+1, len(steps), s); err != nil {
			return err
		}
	}
	return nil
}

// play does one step and looks on for a moment. A step that did not happen does
// not end the story, unless it is the first one.
func (d *demo) play(ctx context.Context, n, of int, s demoStep) error {
	d.view.say("%s %s", d.view.strong("%d/%d %s:", n, of, s.Name), s.explain)
	d.stream.next()
	began := time.Now()
	took, note, err := s.do(ctx)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err == nil {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(lookOn):
		}
		err = d.stage.check()
	} else {
		took = time.Since(began)
	}
	counts, _, first := d.stream.counts()
	if err == nil && first != nil {
		err = fmt.Errorf("%d requests failed, the first with %w", counts.Failed, first)
	}
	s.OK, s.TookMS, s.demoCounts, s.Note = err == nil, took.Milliseconds(), counts, note
	if err != nil {
		s.Note = err.Error()
	}
	d.steps = append(d.steps, s)
	d.view.result(s)
	if n == 1 {
		return err
	}
	return nil
}

// until calls fn until it returns nil. It returns fn's last error after bound,
// and sooner if ctx ends or a process ended that should be running.
func (d *demo) until(ctx context.Context, bound time.Duration, what string, fn func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, bound, fmt.Errorf("not within %v", bound))
	defer cancel()
	tick := time.NewTicker(stepPoll)
	defer tick.Stop()
	last := errors.New("no answer")
	for {
		err := fn(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil {
			last = err // and not that the time was up
		}
		if err := d.stage.check(); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w: %w", what, context.Cause(ctx), last)
		case <-tick.C:
		}
	}
}

// untilServing waits until HAProxy sends requests to all these.
func (d *demo) untilServing(ctx context.Context, instances ...*demoInstance) error {
	return d.until(ctx, stepBound, "HAProxy has every server up", func(ctx context.Context) error {
		_, servers, err := d.stage.servers(ctx)
		if err != nil {
			return err
		}
		return allServing(servers, instances)
	})
}

func allServing(servers map[netip.AddrPort]lbsync.Server, instances []*demoInstance) error {
	for _, i := range instances {
		if !serving(servers[i.addr]) {
			return fmt.Errorf("%s is not up", i.name)
		}
	}
	return nil
}

// untilAnswers waits until all these have answered more requests than before.
func (d *demo) untilAnswers(ctx context.Context, before map[netip.AddrPort]int, instances ...*demoInstance) error {
	return d.until(ctx, stepBound, "each answers", func(context.Context) error {
		now := d.stream.answers()
		for _, i := range instances {
			if now[i.addr] == before[i.addr] {
				return fmt.Errorf("%s has not answered", i.name)
			}
		}
		return nil
	})
}

// live returns the instances that run.
func (d *demo) live() []*demoInstance {
	return slices.DeleteFunc(d.stage.all(), func(i *demoInstance) bool { return !i.running() })
}

func (d *demo) start(ctx context.Context, goroutines *sync.WaitGroup) (time.Duration, string, error) {
	began := time.Now()
	if err := d.stage.startRedis(ctx); err != nil {
		return 0, "", err
	}
	if err := d.until(ctx, stepBound, "Redis answers", d.stage.store.Ping); err != nil {
		return 0, "", err
	}
	if _, err := d.stage.role(ctx, "reaper", "reap", "--ttl", demoTTL.String(), "--interval", demoInterval.String()); err != nil {
		return 0, "", err
	}
	if err := d.until(ctx, stepBound, "the reaper has set the registry's TTL", func(ctx context.Context) error {
		_, ttl, err := d.stage.store.Clock(ctx)
		if err == nil && ttl != demoTTL {
			err = fmt.Errorf("the TTL is %v", ttl)
		}
		return err
	}); err != nil {
		return 0, "", err
	}
	if err := d.stage.startHAProxy(ctx); err != nil {
		return 0, "", err
	}
	if err := d.until(ctx, stepBound, "HAProxy answers", func(ctx context.Context) error {
		_, _, err := d.stage.servers(ctx)
		return err
	}); err != nil {
		return 0, "", err
	}
	if _, err := d.stage.role(ctx, "lbsync", "lbsync", "--socket", d.stage.socket(), "--state-dir", d.stage.dir, "--backend", demoName+"="+demoName,
		"--mode", string(lbsync.Slots), "--allow", d.stage.network.String()); err != nil {
		return 0, "", err
	}
	goroutines.Go(func() { d.watch(ctx) })
	for range demoInstances {
		if _, _, err := d.add(ctx); err != nil {
			return 0, "", err
		}
	}
	all := d.stage.all()
	if err := d.untilServing(ctx, all...); err != nil {
		return 0, "", err
	}
	goroutines.Go(func() { d.stream.run(ctx) })
	if err := d.untilAnswers(ctx, nil, all...); err != nil {
		return 0, "", err
	}
	return time.Since(began), "web-1, web-2 and web-3 answer", nil
}

// add starts one more instance, and returns when its sidecar was started.
func (d *demo) add(ctx context.Context) (*demoInstance, time.Time, error) {
	i, err := d.stage.startService(ctx)
	if err != nil {
		return nil, time.Time{}, err
	}
	if err := d.until(ctx, stepBound, i.name+" listens", func(ctx context.Context) error {
		w := demoWire{addr: i.addr.String()}
		defer w.close()
		_, err := w.ask(ctx, "GET")
		return err
	}); err != nil {
		return nil, time.Time{}, err
	}
	began := time.Now()
	return i, began, d.stage.startSidecar(ctx, i)
}

func (d *demo) join(ctx context.Context) (time.Duration, string, error) {
	i, began, err := d.add(ctx)
	if err != nil {
		return 0, "", err
	}
	if err := d.untilAnswers(ctx, nil, i); err != nil {
		return 0, "", err
	}
	took := time.Since(began)
	return took, fmt.Sprintf("%s answered %v after its start; HAProxy checks every %v", i.name, short(took), checkEvery), nil
}

func (d *demo) leave(ctx context.Context) (time.Duration, string, error) {
	i := d.stage.all()[0]
	began := time.Now()
	d.stage.ask(i.sidecar)
	if err := d.until(ctx, stepBound, "HAProxy has let go of "+i.name, func(ctx context.Context) error {
		_, servers, err := d.stage.servers(ctx)
		if server, there := servers[i.addr]; err == nil && there {
			err = fmt.Errorf("its server is in state %v", server.Admin)
		}
		return err
	}); err != nil {
		return 0, "", err
	}
	took := time.Since(began)
	e, err := d.stage.entry(ctx, i.addr)
	if err != nil {
		return 0, "", err
	}
	if e.Present || e.Gone == nil || e.Gone.Reason != registrar.Left {
		return 0, "", fmt.Errorf("the register does not say that %s left: %+v", i.name, e)
	}
	d.stage.end(i.service, i.sidecar)
	for _, c := range []*demoChild{i.service, i.sidecar} {
		if err := c.stuck(); err != nil {
			return 0, "", err
		}
		if !c.cmd.ProcessState.Success() {
			return 0, "", fmt.Errorf("%s: %v%s", c.name, c.cmd.ProcessState, tail(c.log))
		}
	}
	return took, fmt.Sprintf("HAProxy let go of %s within %v, and then it stopped", i.name, short(took)), nil
}

func (d *demo) kill(ctx context.Context) (time.Duration, string, error) {
	i := d.stage.all()[1]
	began := d.stream.cut(func() { d.stage.kill(i.service, i.sidecar) })
	if err := d.until(ctx, stepBound, "HAProxy has stopped sending to "+i.name, func(ctx context.Context) error {
		_, servers, err := d.stage.servers(ctx)
		if err == nil && serving(servers[i.addr]) {
			err = errors.New("its server is up")
		}
		return err
	}); err != nil {
		return 0, "", err
	}
	down := time.Since(began)
	// Nobody beats any more, so the last beat that is seen is the last one.
	var beat int64
	var gone registrar.Gone
	if err := d.until(ctx, 2*stepBound, "the register has dropped "+i.name, func(ctx context.Context) error {
		e, err := d.stage.entry(ctx, i.addr)
		switch {
		case err != nil:
			return err
		case e.Present:
			beat = e.Instance.Beat
			return errors.New("it is there")
		case e.Gone == nil:
			return errors.New("the register does not say how it went")
		}
		gone = *e.Gone
		return nil
	}); err != nil {
		return 0, "", err
	}
	took := time.Since(began)
	silent := time.Duration(gone.At-beat) * time.Millisecond
	switch {
	case gone.Reason != registrar.Expired:
		return 0, "", fmt.Errorf("the register says that %s is gone as %s, not as expired", i.name, gone.Reason)
	case beat == 0:
		return 0, "", fmt.Errorf("the register dropped %s before its last heartbeat could be read", i.name)
	}
	note := fmt.Sprintf("HAProxy stopped sending after %v; reaped %v after its last heartbeat", short(down), short(silent))
	if silent > reapBound {
		if !d.stage.doubted() {
			return 0, "", fmt.Errorf("%s, later than %v", note, reapBound)
		}
		note += ", as a slow Redis kept the reaper waiting"
	}
	counts, _, _ := d.stream.counts()
	if counts.Cut > 0 {
		note += fmt.Sprintf("; %d POST cut", counts.Cut)
	}
	return took, note, nil
}

func (d *demo) reload(ctx context.Context) (time.Duration, string, error) {
	live := d.live()
	began := time.Now()
	old, err := d.stage.reloadHAProxy(ctx)
	if err != nil {
		return 0, "", err
	}
	var servers map[netip.AddrPort]lbsync.Server
	if err := d.until(ctx, stepBound, "the new HAProxy answers", func(ctx context.Context) error {
		pid, got, err := d.stage.servers(ctx)
		if err == nil && pid != d.stage.balancer.pid() {
			err = fmt.Errorf("process %d answers", pid)
		}
		servers = got
		return err
	}); err != nil {
		return 0, "", err
	}
	took := time.Since(began)
	if err := allServing(servers, live); err != nil {
		return 0, "", fmt.Errorf("in the new process: %w", err)
	}
	if err := d.untilAnswers(ctx, d.stream.answers(), live...); err != nil {
		return 0, "", err
	}
	if err := d.until(ctx, 2*stepBound, "the old HAProxy has ended", func(context.Context) error {
		if old.running() {
			return fmt.Errorf("process %d runs", old.pid())
		}
		return nil
	}); err != nil {
		return 0, "", err
	}
	return took, fmt.Sprintf("process %d took over from %d with %d servers up", d.stage.balancer.pid(), old.pid(), len(live)), nil
}

func (d *demo) restart(ctx context.Context) (time.Duration, string, error) {
	live := d.live()
	began := d.stream.gap(func() { d.stage.kill(d.stage.balancer) })
	select {
	case <-ctx.Done():
		return 0, "", ctx.Err()
	case <-time.After(restartAfter):
	}
	if err := d.stage.startHAProxy(ctx); err != nil {
		return 0, "", err
	}
	if err := d.until(ctx, stepBound, "a request is answered", func(context.Context) error {
		if _, ok := d.stream.gapLength(); !ok {
			return errors.New("none is")
		}
		return nil
	}); err != nil {
		return 0, "", err
	}
	if err := d.untilServing(ctx, live...); err != nil {
		return 0, "", err
	}
	took := time.Since(began)
	if err := d.untilAnswers(ctx, d.stream.answers(), live...); err != nil {
		return 0, "", err
	}
	gap, _ := d.stream.gapLength()
	return took, fmt.Sprintf("first good answer after %v; %d servers up after %v", short(gap), len(live), short(took)), nil
}

// sum returns the summary. stepErr is why the story could not go on.
func (d *demo) sum(stepErr error) demoSummary {
	_, total, _ := d.stream.counts()
	gap, _ := d.stream.gapLength()
	sum, err := d.stage.configSum()
	s := demoSummary{
		OK: stepErr == nil, Steps: d.steps, Total: total, GapMS: gap.Milliseconds(),
		TTLMS: demoTTL.Milliseconds(), IntervalMS: demoInterval.Milliseconds(),
		Config: sum, Unchanged: err == nil && sum == d.stage.sum, Reloads: d.reloads(),
	}
	for _, step := range d.steps {
		s.OK = s.OK && step.OK
	}
	s.OK = s.OK && s.Unchanged && s.Reloads == 0 && total.Failed == 0
	return s
}

// reloads counts the HAProxy processes seen that the demo did not start. The
// only other one who could have is rollcall.
func (d *demo) reloads() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.foreign)
}

// watch draws the live view until ctx ends.
func (d *demo) watch(ctx context.Context) {
	tick := time.NewTicker(viewPeriod)
	defer tick.Stop()
	for {
		d.view.show(d.look(ctx))
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// look reads the registry and HAProxy for the live view. What does not answer
// is unknown.
func (d *demo) look(ctx context.Context) demoScene {
	s := demoScene{at: time.Now(), served: d.stream.answers()}
	_, s.total, _ = d.stream.counts()
	for _, i := range d.stage.all() {
		s.instances = append(s.instances, demoRow{name: i.name, addr: i.addr, pids: fmt.Sprintf("%s %s", pid(i.service), pid(i.sidecar))})
	}
	tctx, cancel := registrar.WithTimeout(ctx)
	defer cancel()
	snap, err := d.stage.store.Read(tctx, demoName, nil)
	if s.registry = err == nil; s.registry {
		s.enter(snap, d.stream.name)
	}
	p, servers, err := d.stage.servers(ctx)
	if s.balancer = err == nil; s.balancer {
		s.pid = p
		if !d.stage.ourHAProxy(p) {
			d.mu.Lock()
			if d.foreign == nil {
				d.foreign = map[int]bool{}
			}
			d.foreign[p] = true
			d.mu.Unlock()
		}
	}
	for n := range s.instances {
		s.instances[n].server, s.instances[n].there = servers[s.instances[n].addr]
	}
	return s
}

func pid(c *demoChild) string {
	if !c.running() {
		return "-"
	}
	return fmt.Sprint(c.pid())
}

// holds keeps everything running until ctx ends.
func (d *demo) holds(ctx context.Context) {
	extra := demoAddr(d.stage.network, 99, demoPort)
	d.view.held()
	d.view.say(`
Everything keeps running until Ctrl-C. To play, in another terminal:
  alias rollcall=%[1]s; export ROLLCALL_REDIS=%[2]s
  rollcall instances web               # who is there
  rollcall watch web                   # every change
  rollcall drain web %[3]s   # and ready, maint, weight
  curl http://%[4]s/      # a request
  redis-cli -h %[5]s zrange 'rollcall:{web}:instances' 0 -1 withscores
  echo 'show servers state web' | socat - UNIX-CONNECT:%[6]s
Kill a service and its sidecar by the pids in the table. One more instance, whose
sidecar keeps the terminal and leaves with Ctrl-C:
  rollcall demo-service --name web-extra --listen %[7]s &
  rollcall register --service web --addr %[7]s`, d.stage.exe, d.stage.redisURL(), d.stage.all()[2].addr, d.stage.haproxyAddr(), d.stage.redisAddr().Addr(), d.stage.socket(), extra)
	<-ctx.Done()
}
