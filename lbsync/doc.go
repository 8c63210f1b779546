// Package lbsync keeps the servers of a load balancer true to the register.
//
// It owns the comparison of want (a notifier.View) with have (what a Balancer
// reports) and every rule on when a server may be taken out. plan.go is a pure
// function; backend.go is the loop of one backend; lbsync.go wires many of them
// to one Watcher and one Balancer. The balancer's own state is the only ledger:
// a restart reads it and goes on where the last process stopped.
//
// How a server's state says who put it there: lbsync leaves no instance's address on a
// server in maint. What it frees gets the Placeholder first, and what it fills is in
// drain until it has its address, so that lbsync, killed between any two commands, leaves
// neither. A server of ours in maint with an instance's address was put there by a human,
// and stays, whatever its weight and whether the instance is there. A server with an
// agent-check is told state and weight once; what its agent makes of it stays too.
//
// It promises to touch only its own servers, to decide nothing from silence, and
// never to take the last server that is up out because of somebody's absence.
package lbsync
