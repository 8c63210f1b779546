package docker

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"rollcall/registrar"
)

// claims says which container has an address of a service that several are to have, as
// two on the host's network that EXPOSE one port: the one whose life began first, of
// two that began in the same moment the first by id. It keeps it while it lives, well
// or not, since whatever answers there may be its app. The zero value is ready.
type claims struct {
	mu sync.Mutex
	of map[key]*line // guarded by mu
}

// line is who is to have one address, the first of whom has it.
type line struct {
	claims  []claim
	changed chan struct{} // closed when another one is the first
}

type claim struct {
	container string
	started   time.Time
	said      bool // that another one has the address
}

// set makes the claims of a container's life be those of wants.
func (c *claims) set(container string, started time.Time, wants []want) {
	c.mu.Lock()
	defer c.mu.Unlock()
	wanted := map[key]bool{}
	for _, w := range wants {
		k := w.key()
		wanted[k] = true
		if c.of == nil {
			c.of = map[key]*line{}
		}
		if c.of[k] == nil {
			c.of[k] = &line{changed: make(chan struct{})}
		}
	}
	for k, l := range c.of {
		first := l.first()
		at := slices.IndexFunc(l.claims, func(x claim) bool { return x.container == container })
		if at >= 0 && (!wanted[k] || !l.claims[at].started.Equal(started)) {
			l.claims = slices.Delete(l.claims, at, at+1)
			at = -1
		}
		if wanted[k] && at < 0 {
			l.claims = append(l.claims, claim{container: container, started: started})
			slices.SortFunc(l.claims, func(a, b claim) int {
				return cmp.Or(a.started.Compare(b.started), cmp.Compare(a.container, b.container))
			})
		}
		if l.first() != first {
			close(l.changed)
			l.changed = make(chan struct{})
		}
		if len(l.claims) == 0 {
			delete(c.of, k)
		}
	}
}

func (l *line) first() string {
	if len(l.claims) == 0 {
		return ""
	}
	return l.claims[0].container
}

// first returns who has k, and what is closed when that is another one; say tells the
// container, once, that it is not the one. Who has no claim has it: nobody else has.
func (c *claims) first(k key, container string) (first string, say bool, changed <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.of[k]
	if l == nil {
		return container, false, nil
	}
	first = l.first()
	if at := slices.IndexFunc(l.claims, func(x claim) bool { return x.container == container }); at > 0 {
		say, l.claims[at].said = !l.claims[at].said, true
	}
	return first, say, l.changed
}

// mine waits until the container is the one that is to have the address. It returns a
// context that ends with ctx, or for ErrHandedOver when another one is to have it; stop
// must be called, and waits for its end. It returns nil if ctx ends first.
func (r *registration) mine(ctx context.Context) (mine context.Context, stop func()) {
	for {
		first, say, changed := r.claims.first(r.key, r.worker.id)
		if first != r.worker.id {
			if say {
				r.log.Warn().Str("other", facts{id: first}.shortID()).
					Msg("another container that was started before it has the address; registered when that ends")
			}
			select {
			case <-ctx.Done():
				return nil, nil
			case <-changed:
			}
			continue
		}
		if ctx.Err() != nil {
			return nil, nil
		}
		mine, cancel := context.WithCancelCause(ctx)
		var watching sync.WaitGroup
		watching.Go(func() {
			select {
			case <-changed: // the first is another one, or there is none any more
				cancel(registrar.ErrHandedOver)
			case <-mine.Done():
			}
		})
		return mine, func() {
			cancel(nil)
			watching.Wait()
		}
	}
}
