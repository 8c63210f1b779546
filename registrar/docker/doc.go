// Package docker registers the containers of one Docker Engine: one agent on a
// host in the place of a sidecar beside each container.
//
// What the Engine says of a container when it is inspected is the truth; its
// events, and a list of all containers from time to time, are hints of whom to
// inspect. Only that a container was told to stop, and that it has ended, is
// taken from an event itself. An Engine that does not answer has said nothing:
// the containers that are known go on beating.
//
// plan is a pure function from a container to its registrations, by the labels
// and variables that Registrator reads. One goroutine a container (worker) does
// everything about it, in order. Each registration is a registrar.Beater, and
// all of them share one registrar.Roll.
package docker
