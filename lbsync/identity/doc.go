// Package identity says which balancer an lbsync is: an HAProxy and the backends of
// it that are this lbsync's alone.
//
// They are its own by locks of the kernel's, one a backend, so that several lbsyncs
// may share an HAProxy. The register knows the balancer by an id, which is kept under
// the name of the first of these backends: a process that has locked that one has the
// id to itself, adding a backend keeps it, and two lbsyncs that were one do not share
// it. It is kept where it outlives a reboot, and beside HAProxy's socket, where it
// outlives a container. The package speaks neither to HAProxy nor to the register.
package identity
