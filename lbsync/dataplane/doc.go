// Package dataplane speaks to one HAProxy through the Data Plane API: it is the
// second lbsync.Balancer, for those who cannot have the stats socket.
//
// It owns the requests and what their answers mean. It uses the endpoints under
// runtime, the statistics and the API's own version, and none under
// configuration: nothing it does writes haproxy.cfg or causes a reload.
//
// It needs version 3.3.1 of the API (March 2026) or later. The earlier ones, all
// of v2 among them, answer 200 to a weight or an address at run time and drop
// it, do not report weights, and (v2, up to 3.0.17 and 3.1.13) add a server with
// the first of its options alone. They are refused with ErrUnsupported.
//
// What becomes of each lbsync.Op:
//
//	Add           POST runtime server, in maint, with id and weight 0
//	SetAddr       PUT address and port; read back, for 31 ms until it is there, as
//	              the API says 200 to any, and HAProxy 2.9 and later give it late
//	EnableHealth  refused: the API cannot; see below
//	SetReady      PUT admin_state
//	SetDrain      PUT admin_state
//	SetMaint      PUT admin_state; see below
//	HealthDown    PUT operational_state
//	SetWeight     PUT weight; read back. Percent of the configured weight
//	Shutdown      refused: the API cannot cut sessions
//	Delete        DELETE runtime server, of one in maint; see below
//
// Checks. HAProxy adds a server with its health check off, and the API has no
// way to switch it on. So New refuses the option check, Checks is false, and
// servers that this package adds are taken for up as soon as they are ready.
// Slots with check in haproxy.cfg are checked as they are with the socket.
//
// Drain. The API counts sessions (scur) and not connections in use, so that is
// what Busy is. What is left when the drain deadline has passed is not cut: a
// slot goes to maint with it, and a dynamic server stays in maint until it has
// ended, as HAProxy deletes no server in use.
//
// Maint. The API takes the number of the administrative state, which is
// decimal, for hexadecimal. So it shows a slot that haproxy.cfg declares
// disabled as maint when it is being drained, and then takes no order to put it
// into maint, with status 200. The statistics tell the truth; such a slot goes
// to maint by way of ready, with weight 0.
//
// Delete. The API puts a server into maint by itself before it deletes it, in
// use or not. Here a server that is in service is not deleted.
//
// Answers. The API says 200 or 404 where it could not read from HAProxy, and can
// leave out what came too late. So every exchange begins and ends with the
// process information, a server counts only if the list and the statistics
// have it, and a backend is missing only if the statistics lack it too.
//
// A request that was given up on may still wait within the API and be carried
// out later: an exchange therefore sends no change before its first question
// has been answered, so that it is one at most.
package dataplane
