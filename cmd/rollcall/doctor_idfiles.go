//go:build !sidecar

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"rollcall/registrar"
	"rollcall/registrar/idfile"
)

// idFiles looks on this machine for sidecars that were killed and whose address the
// sidecar of another service has, among those whose id files are in dir. Those of other
// users and of units with a directory of their own it does not see.
func (d *doctor) idFiles(ctx context.Context, dir, registry string) {
	const (
		check = "host id files"
		why   = "while it is registered, requests for it come to the other service"
	)
	all, err := idfile.Scan(dir, registry)
	if err != nil {
		d.unknown(check, err, "run doctor as the user of the sidecars")
		return
	}
	at := map[netip.AddrPort][]idfile.Kept{}
	for _, k := range all {
		at[k.Of.Addr] = append(at[k.Of.Addr], k)
	}
	var left []string
	var fix string // of the first
	for _, k := range all {
		if len(at[k.Of.Addr]) < 2 || lives(k) || !slices.ContainsFunc(at[k.Of.Addr], func(other idfile.Kept) bool {
			return other.Of.Service != k.Of.Service && lives(other)
		}) {
			continue
		}
		e, err := registrar.Try(ctx, func(ctx context.Context) (registrar.AddrEntry, error) {
			return d.store.Entry(ctx, k.Of.Service, k.Of.Addr)
		})
		switch {
		case err != nil:
			d.unknown(check, err, readerFix)
			return
		case !e.Present || e.Instance.Meta.ID != k.Token:
			continue // it has gone from there
		}
		app := "it is not known whether its app lives"
		switch k.App.Life() {
		case idfile.Running:
			app = fmt.Sprintf("its app, process group %d, still runs", k.App.Group)
		case idfile.Ended:
			app = "its app has ended"
		}
		left = append(left, fmt.Sprintf("%s %s: its sidecar was killed, %s", k.Of.Service, k.Of.Addr, app))
		if fix == "" {
			fix = fmt.Sprintf("rollcall deregister --service %s --addr %s --force, unless its app answers there", k.Of.Service, k.Of.Addr)
		}
	}
	if len(left) > 0 {
		d.add(check, stateWarn, why, fix, "%s", few(left))
		return
	}
	d.add(check, stateOK, "", "", "%d in %s, no killed sidecar's address is another service's", len(all), dir)
}

// lives tells whether k's sidecar does.
func lives(k idfile.Kept) bool {
	f, err := k.Take()
	if err == nil {
		f.Close()
	}
	return errors.Is(err, idfile.ErrLocked)
}
