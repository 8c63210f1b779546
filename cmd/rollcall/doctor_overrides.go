//go:build !sidecar

package main

import (
	"context"
	"fmt"

	"rollcall/registrar"
)

// manyOrphans are more overrides of nobody than people say in a week.
const manyOrphans = 1000

// overrides counts what operators have said, and of it what is of nobody: such an
// override meets whoever comes to its address.
func (d *doctor) overrides(ctx context.Context) {
	const check = "registry overrides"
	svcs, err := d.store.Overridden(ctx)
	var all, orphans, garbage int
	var first, broken registrar.Override
	var unreadable []string
	for _, svc := range svcs {
		found, ferr := d.store.Overrides(ctx, svc)
		if ferr != nil {
			err = ferr
		}
		all += len(found)
		for _, o := range found {
			switch {
			case o.Garbage != "":
				garbage++
				if garbage == 1 {
					broken = o
				}
				unreadable = append(unreadable, fmt.Sprintf("%s %s (%s)", o.Service, o.Addr, o.Garbage))
			case o.Orphan():
				if orphans++; orphans == 1 {
					first = o
				}
			}
		}
	}
	if err != nil {
		d.unknown(check, err, readerFix)
		return
	}
	if garbage > 0 {
		d.add(check, stateBad, "who is at these addresses cannot be read: nothing that is said of them counts, and nobody adds them", fmt.Sprintf("look at it, then say it anew: rollcall ready %s %s --absent", broken.Service, broken.Addr), "cannot be read: %s", few(unreadable))
	}
	seen := fmt.Sprintf("%d, of nobody %d", all, orphans)
	if orphans > manyOrphans {
		d.add(check, stateWarn, "each meets whoever comes to its address, "+first.Addr.String()+" of "+string(first.Service)+" say",
			"rollcall overrides lists them; register with --ephemeral, or docker --internal, where addresses are a container's own; reapers end those that a week has passed over", "%s", seen)
		return
	}
	d.add(check, stateOK, "", "", "%s", seen)
}
