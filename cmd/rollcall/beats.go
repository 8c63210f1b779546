package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"

	"rollcall/registrar"
)

func counter(name, help string) prometheus.Counter {
	return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
}

func counters(name, help string, labels ...string) *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
}

// beats counts heartbeats, and of a sidecar notes what the last one came to. Its
// methods may be called on nil, which counts nothing.
type beats struct {
	sent       prometheus.Counter
	failed     *prometheus.CounterVec
	registered atomic.Bool
	rival      atomic.Bool            // another registration holds the address
	sick       atomic.Pointer[string] // why the check does not let it register; nil: it does
}

const registeredName, registeredHelp = "rollcall_registered", "1 while the register has the instance, by its last heartbeat."

func (m *monitor) newBeats() *beats {
	b := &beats{
		sent:   counter("rollcall_beats_total", "Heartbeats sent."),
		failed: counters("rollcall_beat_failures_total", "Heartbeats that were not accepted, by cause.", "cause"),
	}
	m.add(b.sent, b.failed)
	return b
}

const dampedName, dampedHelp = "rollcall_damped", "Instances that come and go, and wait before they return."

// beats are of one instance; addr is asked at each scrape where it is registered.
func (m *monitor) beats(svc registrar.Service, addr func() netip.AddrPort, damper *registrar.Damper) *beats {
	b := m.newBeats()
	m.add(registeredGauge{
		desc: prometheus.NewDesc(registeredName, registeredHelp, []string{"addr"}, prometheus.Labels{"service": string(svc)}),
		read: func() (string, bool) { return addr().String(), b.registered.Load() },
	})
	m.add(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: dampedName, Help: dampedHelp}, func() float64 { return number(damper.Waiting()) }))
	m.ready = func() error {
		switch {
		case b.registered.Load():
			return nil
		case b.sick.Load() != nil:
			return errors.New("not registered: not healthy: " + *b.sick.Load())
		case damper.Waiting():
			return fmt.Errorf("not registered: it comes and goes, and returns within %v", damper.Wait().Round(time.Second))
		case b.rival.Load():
			return errors.New("not registered: another registration holds the address, until it misses its heartbeats")
		}
		return errors.New("not registered; the log says why")
	}
	return b
}

// registeredGauge is whether the register has the instance, at the address that
// it has now.
type registeredGauge struct {
	desc *prometheus.Desc
	read func() (addr string, registered bool)
}

func (g registeredGauge) Describe(ch chan<- *prometheus.Desc) { ch <- g.desc }

func (g registeredGauge) Collect(ch chan<- prometheus.Metric) {
	addr, yes := g.read()
	ch <- prometheus.MustNewConstMetric(g.desc, prometheus.GaugeValue, number(yes), addr)
}

// unseen counts looks at apps that could not be made. It may be called on nil.
func (m *monitor) unseen() func() {
	if m == nil {
		return nil
	}
	n := counter("rollcall_check_unknown_total", "Looks at an app that could not be made, for want of a process or a descriptor, say.")
	m.add(n)
	return n.Inc
}

// beaten is a registrar.BeaterConfig's hook.
func (b *beats) beaten(err error) {
	b.sent.Inc()
	if err != nil {
		b.failed.WithLabelValues(beatCause(err)).Inc()
	}
	b.rival.Store(errors.Is(err, registrar.ErrNotOwner))
	b.registered.Store(err == nil)
}

// unhealthy notes why the check says that the app cannot serve; nil: it can.
func (b *beats) unhealthy(cause error) {
	if b == nil {
		return
	}
	if cause == nil {
		b.sick.Store(nil)
		return
	}
	text := cause.Error()
	b.sick.Store(&text)
}

func (b *beats) left() {
	if b != nil {
		b.rival.Store(false)
		b.registered.Store(false)
	}
}

// redisCodes are the refusals of Redis that have a cause of their own. The rest
// is "refused": a label must not grow with what a server says.
var redisCodes = []string{"busy", "loading", "masterdown", "misconf", "noauth", "noperm", "noreplicas", "oom", "readonly", "wrongpass", "wrongtype"}

// beatCause returns why a heartbeat was not accepted.
func beatCause(err error) string {
	var refused redis.Error
	var slow net.Error
	switch {
	case errors.Is(err, registrar.ErrNotOwner):
		return "not_owner"
	case errors.Is(err, registrar.ErrLeft):
		return "left"
	case errors.Is(err, registrar.ErrInterval):
		return "interval"
	case errors.Is(err, registrar.ErrFull):
		return "full"
	case errors.As(err, &refused):
		code, _, _ := strings.Cut(strings.ToLower(refused.Error()), " ")
		if slices.Contains(redisCodes, code) {
			return code
		}
		return "refused"
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &slow) && slow.Timeout():
		return "timeout"
	}
	return "connection"
}
