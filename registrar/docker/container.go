package docker

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
)

// state is what a container does.
type state int

const (
	ended   state = iota // it does not run
	waiting              // it runs, and has not said yet that it is healthy
	sick                 // it runs and cannot serve: unhealthy or paused
	serving              // it runs, and is healthy if it has a HEALTHCHECK
)

// facts are what one inspection says of a container.
type facts struct {
	id, name       string
	image, imageID string // as it was named, and its digest, "sha256:…"
	state          state
	started        time.Time // of this life: a restart is another
	stopSignal     string
	env            []string // KEY=VALUE
	labels         map[string]string
	hostNetwork    bool
	exposed        []network.Port
	published      map[network.Port][]netip.AddrPort // an unspecified or invalid address is every one of the host
	networks       map[string][]netip.Addr           // by name, IPv4 first
}

// shortID is how a container is called in the log and in its tags.
func (f facts) shortID() string { return f.id[:min(12, len(f.id))] }

// read takes the facts of an inspection. What the Engine leaves out is absent.
func read(c container.InspectResponse) facts {
	f := facts{
		id: c.ID, name: strings.TrimPrefix(c.Name, "/"), imageID: c.Image,
		published: map[network.Port][]netip.AddrPort{}, networks: map[string][]netip.Addr{},
	}
	if s := c.State; s != nil {
		f.state = stateOf(s)
		f.started, _ = time.Parse(time.RFC3339Nano, s.StartedAt) // the zero time is a life too
	}
	if c.Config != nil {
		f.image, f.stopSignal, f.env, f.labels = c.Config.Image, c.Config.StopSignal, c.Config.Env, c.Config.Labels
		f.exposed = slices.Collect(maps.Keys(c.Config.ExposedPorts))
	}
	if c.HostConfig != nil {
		f.hostNetwork = c.HostConfig.NetworkMode.IsHost()
	}
	if c.NetworkSettings == nil {
		return f
	}
	for port, bindings := range c.NetworkSettings.Ports {
		for _, b := range bindings {
			host, err := network.ParsePort(b.HostPort)
			if err == nil && host.Num() > 0 {
				f.published[port] = append(f.published[port], netip.AddrPortFrom(b.HostIP.Unmap(), host.Num()))
			}
		}
		if !slices.Contains(f.exposed, port) {
			f.exposed = append(f.exposed, port)
		}
	}
	for name, e := range c.NetworkSettings.Networks {
		if e == nil {
			continue
		}
		for _, ip := range []netip.Addr{e.IPAddress, e.GlobalIPv6Address} {
			if ip.IsValid() {
				f.networks[name] = append(f.networks[name], ip)
			}
		}
	}
	return f
}

func stateOf(s *container.State) state {
	health := container.NoHealthcheck
	if s.Health != nil {
		health = s.Health.Status
	}
	switch {
	case !s.Running || s.Restarting || s.Dead:
		return ended
	case s.Paused || health == container.Unhealthy:
		return sick
	case health == container.Starting:
		return waiting
	}
	return serving
}

// stops tells whether a signal is meant to end the container: its own stop
// signal, or SIGTERM or SIGKILL. Others, a SIGHUP say, are the app's business.
func (f facts) stops(signal string) bool {
	signal = number(signal)
	return signal == "15" || signal == "9" || f.stopSignal != "" && signal == number(f.stopSignal)
}

// signals are those that images name as their stop signal; the Engine's events
// have numbers, and images may have either, with or without SIG.
var signals = map[string]string{"HUP": "1", "INT": "2", "QUIT": "3", "KILL": "9", "USR1": "10", "USR2": "12", "TERM": "15", "WINCH": "28", "RTMIN+3": "37"}

func number(signal string) string {
	if n, ok := signals[strings.TrimPrefix(strings.ToUpper(signal), "SIG")]; ok {
		return n
	}
	return signal
}
