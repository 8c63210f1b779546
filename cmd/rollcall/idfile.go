package main

import (
	"github.com/rs/zerolog"
	"github.com/urfave/cli/v2"

	"rollcall/registrar"
	"rollcall/registrar/idfile"
)

func idFileFlag() cli.Flag {
	return &cli.StringFlag{Name: "id-file", EnvVars: env("id-file"), DefaultText: "one in $RUNTIME_DIRECTORY, or $XDG_RUNTIME_DIR/rollcall, or /run/rollcall",
		Usage: "`PATH` of the file that keeps the registration's id, so that a sidecar that was killed comes back as the same; '' = nowhere"}
}

// keepID has cfg be the registration that the last process of this instance was, if
// that was killed, and keeps which one it is from now on. The caller closes the file.
// others are what killed sidecars of other services have left in its directory.
func keepID(c *cli.Context, cfg *registrar.BeaterConfig, store *registrar.Store, log zerolog.Logger) (_ *idfile.File, others *predecessors) {
	r := idfile.Registration{Registry: idfile.Registry(c.String("redis"), c.String("namespace")), Service: cfg.Service, Addr: cfg.Addr}
	place := idfile.Default(r)
	if c.IsSet("id-file") {
		place = idfile.Place{Path: c.String("id-file"), Chosen: true}
	}
	f := idfile.Open(place, r, log)
	cfg.Token, cfg.Since = f.Kept()
	cfg.Keep = f.Keep
	return f, newPredecessors(r, place, store, log)
}
