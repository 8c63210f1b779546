package registrar

import (
	"context"
	"net/netip"
)

// canary is where reapers beat to see that an instance could. ParseService
// refuses the name, and beat.lua keeps it out of the set of services, so nobody
// ever reads or sweeps it.
const canary Service = "_canary"

var canaryAddr = netip.MustParseAddrPort("127.0.0.1:1")

// Canary sends one heartbeat as a sidecar sends it: the same script, on the same
// global keys, with metadata that never changes. Every reaper sends the same
// one, so only the first in the life of a data set is an arrival, which moves
// the global version.
func (s *Store) Canary(ctx context.Context) error {
	_, err := s.Beat(ctx, canary, Beat{Addr: canaryAddr, Token: "canary", Meta: `{"id":"canary"}`})
	return err
}
