package docker

import (
	"maps"
	"sync"

	"rollcall/registrar"
)

// dampers remember how the ports of containers came and went, through all their lives.
// The zero value is ready.
type dampers struct {
	mu sync.Mutex
	of map[port]*registrar.Damper // guarded by mu
}

// port is one port of a container, wherever it is published in this life.
type port struct {
	container, number string
	service           registrar.Service
}

// damper returns that of a port, and forgets those that have nothing to remember.
func (w *worker) damper(want want) *registrar.Damper {
	d := &w.agent.dampers
	d.mu.Lock()
	defer d.mu.Unlock()
	maps.DeleteFunc(d.of, func(_ port, d *registrar.Damper) bool { return d.Idle() })
	p := port{w.id, want.port, want.service}
	if d.of[p] == nil {
		if d.of == nil {
			d.of = map[port]*registrar.Damper{}
		}
		d.of[p] = registrar.NewDamper(w.agent.store, w.log.With().Str("service", string(want.service)).Str("port", want.port).Logger())
	}
	return d.of[p]
}
