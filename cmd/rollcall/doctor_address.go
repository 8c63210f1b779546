//go:build !sidecar

package main

import (
	"context"
	"fmt"
)

// address says which address of this machine `register --addr :PORT` and `docker`
// would choose, and judges whether that can be right. Where none is chosen they do
// not start, which loses nobody.
func (d *doctor) address(ctx context.Context, l *locator) {
	const (
		check = "address"
		fix   = "register and docker with --interface NAME, or with --advertise HOST"
	)
	c, all, err := l.look(ctx)
	switch {
	case err != nil && all == nil:
		d.unknown(check, err, "allow netlink sockets: RestrictAddressFamilies=… AF_NETLINK")
	case err != nil:
		d.add(check, stateOK, "", "", "none for --addr :PORT: %v", err)
	case c.tunnel != "":
		d.add(check, stateWarn, "balancers that are on that network alone cannot reach the address", fmt.Sprintf("%s, if they are", fix), "%s, %s", c.localAddr, c.why)
	case len(c.others) > 0:
		var names []string
		for _, a := range c.others {
			names = append(names, a.String())
		}
		d.add(check, stateWarn, "balancers may be on the network of another one", fix, "%s, %s; as good: %s", c.localAddr, c.why, few(names))
	default:
		d.add(check, stateOK, "", "", "%s, %s", c.localAddr, c.why)
	}
}
