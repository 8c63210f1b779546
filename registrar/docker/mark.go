package docker

import (
	"context"
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/client"

	"rollcall/registrar"
)

// infoTries is how often an Engine that answers otherwise is asked who it is.
const infoTries = 3

// markOf is what all registrations of an agent carry, so that the next agent of the
// same containers knows them for its own. It is the same after a restart of the
// agent, of the Engine and of the host. The Engine's id alone is not enough: it lies
// on the disk, and hosts that were cloned from one image have one id. Their names or
// the addresses that they advertise differ, or nobody could reach them. An operator
// can name the host with an id of their own.
func (p place) markOf(engine ...string) string {
	at := p.advertise.String()
	if p.internal {
		at = "internal " + p.network
	}
	return digest(append(engine, at)...)
}

// leaseOf names the lease of the agents that would register the same containers of
// the same services. Agents of other services have another one.
func leaseOf(mark string, services []registrar.Service) string {
	parts := []string{mark}
	for _, s := range slices.Sorted(slices.Values(services)) {
		parts = append(parts, string(s))
	}
	return digest(parts...)
}

// digest is as long as a rand.Text, and tells any two lists of texts apart.
func digest(parts ...string) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%q", parts))
	return base32.StdEncoding.EncodeToString(sum[:])[:26]
}

// identify finds out the agent's mark. It asks until the Engine answers, or ctx ends.
// An Engine, or a proxy before it, that answers other questions and not this one
// leaves the agent without a mark.
func (a *Agent) identify(ctx context.Context) {
	if a.cfg.ID != "" {
		a.mark = a.where().markOf("id", a.cfg.ID)
		return
	}
	wait := time.NewTimer(0)
	defer wait.Stop()
	for failures, refusals := 1, 0; ; failures++ {
		select {
		case <-ctx.Done():
			return
		case <-wait.C:
		}
		engine, err := a.info(ctx)
		if err == nil {
			a.mark = a.where().markOf(engine...)
			return
		}
		_, away := a.list(ctx)
		if ctx.Err() != nil {
			return
		}
		if away == nil {
			if refusals++; refusals == infoTries || refused(err) {
				a.log.Warn().Err(err).Msg("the engine does not say which one it is: what an agent leaves behind here stays for its TTL, and a second agent is not noticed; allow GET /info, or give --id")
				return
			}
			away = err
		} else {
			a.answered(away)
		}
		wait.Reset(retry(failures, away))
	}
}

// refused tells whether the Engine, or a proxy before it, will not answer.
func refused(err error) bool {
	return errdefs.IsPermissionDenied(err) || errdefs.IsUnauthorized(err) || errdefs.IsNotFound(err) || errdefs.IsNotImplemented(err)
}

// info returns what tells the Engine from others, as far as it can itself.
func (a *Agent) info(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	r, err := a.engine.Info(ctx, client.InfoOptions{})
	switch {
	case err != nil:
		return nil, fmt.Errorf("ask the engine who it is: %w", err)
	case r.Info.ID == "" && r.Info.Name == "":
		return nil, fmt.Errorf("ask the engine who it is: %w", errdefs.ErrNotImplemented)
	}
	return []string{r.Info.ID, r.Info.Name}, nil
}
