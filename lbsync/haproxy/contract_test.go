package haproxy

import (
	"testing"
	"time"

	"rollcall/lbsync"
	"rollcall/lbsync/balancertest"
	"rollcall/lbsync/haproxy/haproxytest"
)

func TestContract(t *testing.T) {
	balancertest.Run(t, balancertest.Implementation{
		New: func(t *testing.T, h *haproxytest.HAProxy, timeout time.Duration, options string) lbsync.Balancer {
			return newClient(t, Config{Socket: h.Socket, Timeout: timeout, ServerOptions: options})
		},
	})
}
