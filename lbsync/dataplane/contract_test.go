package dataplane

import (
	"testing"
	"time"

	"rollcall/lbsync"
	"rollcall/lbsync/balancertest"
	"rollcall/lbsync/dataplane/dataplanetest"
	"rollcall/lbsync/haproxy/haproxytest"
)

func TestContract(t *testing.T) {
	balancertest.Run(t, balancertest.Implementation{
		New: func(t *testing.T, h *haproxytest.HAProxy, timeout time.Duration, _ string) lbsync.Balancer {
			return newClient(t, dataplanetest.Start(t, h.Socket, dataplanetest.Options{}), Config{Timeout: timeout})
		},
		Cannot: []lbsync.Kind{lbsync.EnableHealth, lbsync.Shutdown},
	})
}
