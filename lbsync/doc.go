// Package lbsync keeps the servers of a load balancer true to the register.
//
// It owns the comparison of want (a notifier.View) with have (what a Balancer
// reports) and every rule on when a server may be taken out. plan.go is a pure
// function; backend.go is the loop of one backend; lbsync.go wires many of them
// to one Watcher and one Balancer. The balancer's own state is the only ledger:
// a restart reads it and goes on where the last process stopped.
//
// How a server's state says who put it there: lbsync gives weight 0 to every
// server that it puts in maint, and the wanted weight last when it takes one out
// of maint. A server of ours in maint with another weight was put there by a
// human, and stays.
//
// It promises to touch only its own servers, to decide nothing from silence, and
// never to take the last server that is up out because of somebody's absence.
package lbsync
