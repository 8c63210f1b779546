//go:build !sidecar

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"rollcall/lbsync"
	"rollcall/notifier"
	"rollcall/notifier/httpapi"
	"rollcall/reaper"
	"rollcall/registrar"
	"rollcall/registrar/docker"
)

// The stages know nothing of Prometheus. What they count is heard through hooks
// of their Config, by standing in for what they call (a reaper.Store, an
// lbsync.Balancer), or asked for at each scrape from their Status.

// scraped is a Collector of what is so at the time of a scrape.
type scraped struct {
	descs []*prometheus.Desc
	read  func(emit func(d *prometheus.Desc, value float64, labels ...string))
}

func (s scraped) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range s.descs {
		ch <- d
	}
}

func (s scraped) Collect(ch chan<- prometheus.Metric) {
	s.read(func(d *prometheus.Desc, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	})
}

func gauge(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

// docker counts an agent's heartbeats, by the hook that it returns, and has served
// what status says.
func (m *monitor) docker(status func() docker.Status) (beaten func(error)) {
	b := m.newBeats()
	up := gauge("rollcall_engine_up", "1 while the Docker Engine answers.")
	containers := gauge("rollcall_engine_containers", "Containers that run on it.")
	registered := gauge(registeredName, registeredHelp, "service", "addr")
	damped := gauge(dampedName, dampedHelp)
	m.add(scraped{[]*prometheus.Desc{up, containers, registered, damped}, func(emit func(*prometheus.Desc, float64, ...string)) {
		s := status()
		emit(up, number(s.Away == nil))
		emit(containers, float64(s.Containers))
		// Two containers may claim one address: a life that ends and the next, say.
		type instance struct {
			service registrar.Service
			addr    string
		}
		is, waiting := map[instance]bool{}, 0
		for _, i := range s.Instances {
			if i.Standing == docker.Damped {
				waiting++
			}
			at := instance{i.Service, i.Addr.String()}
			is[at] = is[at] || i.Standing == docker.Registered
		}
		emit(damped, float64(waiting))
		for i, yes := range is {
			emit(registered, number(yes), string(i.service), i.addr)
		}
	}})
	m.ready = func() error {
		s := status()
		if s.Standby != nil {
			return s.Standby
		}
		for _, i := range s.Instances {
			if s.Away == nil && i.Standing == docker.Refused {
				return fmt.Errorf("%s %s is not accepted; the log says why", i.Service, i.Addr)
			}
		}
		return s.Away
	}
	return b.beaten
}

// reapings is what a reaper did and found; of a Cluster, all its reapers
// together.
type reapings struct {
	pulses, failed, canaries, silent prometheus.Counter

	mu   sync.Mutex
	last map[registrar.Service][]registrar.Count // of each register's last sweep; guarded by mu
}

// meteredStore counts what the reaper of a register asks of it.
type meteredStore struct {
	reaper.Store
	of registrar.Service // in a Cluster; else empty
	*reapings
}

func (s meteredStore) Pulse(ctx context.Context, id, token string, expiry time.Duration) (registrar.Pulse, error) {
	p, err := s.Store.Pulse(ctx, id, token, expiry)
	s.pulses.Inc()
	if err != nil {
		s.failed.Inc()
	}
	return p, err
}

func (s meteredStore) Survey(ctx context.Context, svcs []registrar.Service, now, cutoff, suspect int64) ([]registrar.Count, error) {
	counts, err := s.Store.Survey(ctx, svcs, now, cutoff, suspect)
	if err == nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.last[s.of] = slices.Clone(counts)
	}
	return counts, err
}

// sums adds up the last sweeps of the registers that are reaped.
func (r *reapings) sums(of map[registrar.Service]registrar.ReaperStatus) (services, instances, suspects int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for register, counts := range r.last {
		if _, reaped := of[register]; !reaped {
			delete(r.last, register)
			continue
		}
		for _, c := range counts {
			if register != "" && c.Members == 0 {
				continue // its reaper waits whether it comes back
			}
			services++
			instances += max(c.Members, 0)
			suspects += c.Suspects
		}
	}
	return services, instances, suspects
}

// reapStatus returns the state of the reaper of each register: of one, under "",
// or of a Cluster's services; or why that is not known.
type reapStatus func() (map[registrar.Service]registrar.ReaperStatus, error)

// reaper returns what puts counters around what the reaper of a register is made
// of. The reaper is known later: status is called at a scrape.
func (m *monitor) reaper(cfg *reaper.Config, status reapStatus) func(registrar.Service, reaper.Store, reaper.Canary) (reaper.Store, reaper.Canary) {
	r := &reapings{
		pulses:   counter("rollcall_reaper_pulses_total", "Pulses sent."),
		failed:   counter("rollcall_reaper_pulse_failures_total", "Pulses that Redis did not accept in time."),
		canaries: counter("rollcall_reaper_canaries_total", "Heartbeats sent as an instance would, on a new connection."),
		silent:   counter("rollcall_reaper_canary_failures_total", "Such heartbeats that were not accepted."),
		last:     map[registrar.Service][]registrar.Count{},
	}
	removed := counter("rollcall_reaper_removed_total", "Instances taken out because they stopped answering.")
	lateness := prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "rollcall_reaper_removal_lateness_seconds", Help: "Time from the end of an instance's TTL to its removal: the longest of each sweep of a service.",
		Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 15, 60, 300, 1800},
	})
	cfg.Removed = func(n int, late time.Duration) {
		removed.Add(float64(n))
		lateness.Observe(late.Seconds())
	}
	services := gauge("rollcall_reaper_services", "Services at the last sweep.")
	instances := gauge("rollcall_reaper_instances", "Instances at the last sweep.")
	suspects := gauge("rollcall_reaper_suspects", "Instances at the last sweep that have missed a heartbeat and may be dead.")
	armed := gauge("rollcall_reaper_armed", "1 while it has proof that Redis accepts heartbeats, and may remove; in a Cluster from every service.")
	disarmed := gauge("rollcall_reaper_disarmed", "1, labelled with the cause, while it is not armed; in a Cluster for how many services.", "cause")
	holds := gauge("rollcall_reaper_holds", "Holds of the protection: services of which nobody is removed; all services at once count as one.")
	held := gauge("rollcall_reaper_held_suspects", "Suspects that these holds keep.")
	m.add(r.pulses, r.failed, r.canaries, r.silent, removed, lateness, scraped{
		[]*prometheus.Desc{services, instances, suspects, armed, disarmed, holds, held},
		func(emit func(*prometheus.Desc, float64, ...string)) {
			of, err := status()
			names, members, doubtful := r.sums(of)
			emit(services, float64(names))
			emit(instances, float64(members))
			emit(suspects, float64(doubtful))
			causes := map[string]float64{}
			keeps := map[registrar.Service]int64{}
			for _, st := range of {
				if !st.Armed {
					causes[st.Cause]++
				}
				for _, h := range st.Held {
					keeps[h.Service] = max(keeps[h.Service], h.Suspects)
				}
			}
			emit(armed, number(err == nil && len(causes) == 0))
			for cause, n := range causes {
				emit(disarmed, n, cause)
			}
			emit(holds, float64(len(keeps)))
			most := keeps[""] // the hold of all services counts those of each again
			var sum int64
			for svc, n := range keeps {
				if svc != "" {
					sum += n
				}
			}
			emit(held, float64(max(most, sum)))
		},
	})
	m.ready = func() error {
		of, err := status()
		if err != nil {
			return err
		}
		var idle []registrar.Service
		for svc, st := range of {
			if !st.Armed {
				idle = append(idle, svc)
			}
		}
		if len(idle) == 0 {
			return nil
		}
		slices.Sort(idle)
		why := of[idle[0]].Cause
		if idle[0] != "" {
			why = fmt.Sprintf("%s, for %s", why, few(idle))
		}
		return fmt.Errorf("not armed: %s", why)
	}
	return func(svc registrar.Service, store reaper.Store, canary reaper.Canary) (reaper.Store, reaper.Canary) {
		return meteredStore{store, svc, r}, func(ctx context.Context) error {
			err := canary(ctx)
			r.canaries.Inc()
			if err != nil {
				r.silent.Inc()
			}
			return err
		}
	}
}

// watcher adds how a notifier.Watcher stands with Redis.
func (m *monitor) watcher(status func() notifier.Status) {
	answers := gauge("rollcall_redis_up", "1 while Redis answers the reads.")
	subscribed := gauge("rollcall_redis_subscribed", "1 while the subscription to changes answers.")
	m.add(scraped{
		[]*prometheus.Desc{answers, subscribed},
		func(emit func(*prometheus.Desc, float64, ...string)) {
			st := status()
			emit(answers, number(st.Answers))
			emit(subscribed, number(st.Subscribed))
		},
	}, prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "rollcall_redis_subscriptions_total", Help: "Subscriptions made; each but the first is a reconnect.",
	}, func() float64 { return float64(status().Subscriptions) }))
}

// redisReady tells whether a watcher hears Redis.
func redisReady(st notifier.Status) error {
	switch {
	case st.Refused:
		return errors.New("redis refuses what this user reads; the log says which right it lacks")
	case !st.Answers:
		return errors.New("redis does not answer")
	case !st.Subscribed:
		return errors.New("no subscription to changes")
	}
	return nil
}

// watch counts what watch prints.
func (m *monitor) watch(w *notifier.Watcher) *prometheus.CounterVec {
	printed := counters("rollcall_watch_changes_total", "Changes printed, by what happened.", "what")
	m.add(printed)
	m.watcher(w.Status)
	m.ready = func() error { return redisReady(w.Status()) }
	return printed
}

// serves adds what `serve` counts.
func (m *monitor) serves(srv *httpapi.Server) {
	streams := gauge("rollcall_serve_streams", "Streams that are open.")
	waits := gauge("rollcall_serve_waits", "Requests that wait for a change.")
	m.add(scraped{[]*prometheus.Desc{streams, waits}, func(emit func(*prometheus.Desc, float64, ...string)) {
		st := srv.Stats()
		emit(streams, float64(st.Streams))
		emit(waits, float64(st.Waiting))
	}})
	for name, c := range map[string]struct {
		help string
		of   func(httpapi.Stats) int64
	}{
		"rollcall_serve_streams_dropped_total": {"Streams that ended because the reader took nothing for 10 s.", func(s httpapi.Stats) int64 { return s.Dropped }},
		"rollcall_serve_writes_total":          {"Words of operators that were written.", func(s httpapi.Stats) int64 { return s.Writes }},
		"rollcall_serve_tokens_refused_total":  {"Wrong tokens.", func(s httpapi.Stats) int64 { return s.RefusedTokens }},
	} {
		m.add(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: c.help}, func() float64 { return float64(c.of(srv.Stats())) }))
	}
	m.watcher(srv.Watching)
	m.ready = func() error { return redisReady(srv.Watching()) }
}

// meteredBalancer counts what is asked of HAProxy.
type meteredBalancer struct {
	lbsync.Balancer
	took              *prometheus.HistogramVec
	failed            *prometheus.CounterVec
	commands, refused prometheus.Counter
	restarts          prometheus.Counter
	up                atomic.Bool
	last              lbsync.Process // for the one goroutine that probes
}

// exchanged notes the end of an exchange that began at begun.
func (b *meteredBalancer) exchanged(operation string, begun time.Time, err error) {
	b.took.WithLabelValues(operation).Observe(time.Since(begun).Seconds())
	if err != nil {
		b.failed.WithLabelValues(operation).Inc()
	}
}

func (b *meteredBalancer) Probe(ctx context.Context) (lbsync.Process, error) {
	begun := time.Now()
	p, err := b.Balancer.Probe(ctx)
	b.exchanged("probe", begun, err)
	b.up.Store(err == nil)
	if err == nil {
		if b.last != (lbsync.Process{}) && !p.Same(b.last) {
			b.restarts.Inc()
		}
		b.last = p
	}
	return p, err
}

func (b *meteredBalancer) Read(ctx context.Context, backend string) (lbsync.State, error) {
	begun := time.Now()
	st, err := b.Balancer.Read(ctx, backend)
	b.exchanged("read", begun, err)
	return st, err
}

func (b *meteredBalancer) Apply(ctx context.Context, backend string, ops []lbsync.Op) (lbsync.Applied, error) {
	begun := time.Now()
	got, err := b.Balancer.Apply(ctx, backend, ops)
	b.exchanged("apply", begun, err)
	if err == nil {
		b.commands.Add(float64(len(ops)))
		b.refused.Add(float64(len(got.Refused)))
	}
	return got, err
}

func (b *meteredBalancer) Peek(ctx context.Context, backend string, servers []lbsync.Server) (lbsync.Applied, error) {
	begun := time.Now()
	got, err := b.Balancer.Peek(ctx, backend, servers)
	b.exchanged("peek", begun, err)
	return got, err
}

// balancer puts counters around a balancer and into cfg's hook.
func (m *monitor) balancer(cfg *lbsync.Config, bal lbsync.Balancer) *meteredBalancer {
	b := &meteredBalancer{
		Balancer: bal,
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "rollcall_haproxy_exchange_duration_seconds", Help: "Time of an exchange with HAProxy, the wait for its turn included.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 14),
		}, []string{"operation"}),
		failed:   counters("rollcall_haproxy_exchange_failures_total", "Exchanges without a complete answer of one process.", "operation"),
		commands: counter("rollcall_haproxy_commands_total", "Commands that HAProxy answered."),
		refused:  counter("rollcall_haproxy_commands_refused_total", "Commands that it refused."),
		restarts: counter("rollcall_haproxy_restarts_total", "Reloads and restarts of HAProxy that were seen."),
	}
	applied := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "rollcall_change_applied_seconds", Help: "Time from hearing of a change to having read it back from HAProxy.",
		Buckets: prometheus.ExponentialBuckets(0.001, 2, 17),
	}, []string{"service", "backend"})
	for _, bc := range cfg.Backends {
		applied.WithLabelValues(string(bc.Service), bc.Backend)
	}
	cfg.Applied = func(bc lbsync.BackendConfig, took time.Duration) {
		applied.WithLabelValues(string(bc.Service), bc.Backend).Observe(took.Seconds())
	}
	m.add(b.took, b.failed, b.commands, b.refused, b.restarts, applied, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "rollcall_haproxy_up", Help: "1 while HAProxy answers.",
	}, func() float64 { return number(b.up.Load()) }))
	return b
}

// syncer adds how an lbsync stands, and whether it drives its backends.
func (m *monitor) syncer(status func() (st lbsync.Status, drives bool), bal *meteredBalancer) {
	behind := gauge("rollcall_lbsync_versions_behind", "Versions of the service that were heard of and are not in HAProxy yet.", "service", "backend")
	serving := gauge("rollcall_lbsync_servers_serving", "Servers that HAProxy sent requests to at the last look.", "service", "backend")
	held := gauge("rollcall_lbsync_servers_held", "Servers whose instance is absent, kept by their check or because too few others are up.", "service", "backend")
	postponed := gauge("rollcall_lbsync_drains_waiting", "Drains that wait because no other server is up.", "service", "backend")
	unplaced := gauge("rollcall_lbsync_instances_unplaced", "Instances without a slot, which get no requests.", "service", "backend")
	not := gauge("rollcall_lbsync_instances_not_serving", "Registered instances that HAProxy sends no requests, by why: refused, excluded (by --allow), unplaced, undone, human, down, drain, maint, weight and others.", "service", "backend", "reason")
	driving := gauge("rollcall_lbsync_driving", "1 while this lbsync drives its backends, 0 while it stands by for another.")
	doubled := gauge("rollcall_lbsync_id_doubled", "1 while another lbsync acknowledges by the same id.")
	m.add(scraped{
		[]*prometheus.Desc{behind, serving, held, postponed, unplaced, not, driving, doubled},
		func(emit func(*prometheus.Desc, float64, ...string)) {
			st, drives := status()
			emit(driving, number(drives))
			emit(doubled, number(st.Double != registrar.Sole))
			for _, b := range st.Backends {
				labels := []string{string(b.Service), b.Backend}
				emit(behind, float64(b.Behind), labels...)
				emit(serving, float64(b.Serving), labels...)
				emit(held, float64(b.Held), labels...)
				emit(postponed, float64(b.Postponed), labels...)
				emit(unplaced, float64(b.Unplaced), labels...)
				for reason, e := range b.Standing.Not {
					emit(not, float64(e.Count), append(labels[:2:2], reason)...)
				}
			}
		},
	})
	m.watcher(func() notifier.Status { st, _ := status(); return st.Redis })
	m.ready = func() error {
		st, drives := status()
		if !drives {
			return errors.New("standing by: another lbsync drives one of these backends")
		}
		if err := redisReady(st.Redis); err != nil {
			return err
		}
		if !bal.up.Load() {
			return errors.New("HAProxy does not answer")
		}
		for _, b := range st.Backends {
			if b.Fault != "" {
				return fmt.Errorf("backend %s is not driven: %s", b.Backend, b.Fault)
			}
			if !b.Synced {
				return fmt.Errorf("backend %s has not had all of service %s yet", b.Backend, b.Service)
			}
		}
		if st.Double == registrar.Second {
			return errors.New("another lbsync acknowledges as this balancer, and did so first: give this one another --id")
		}
		return nil
	}
}
