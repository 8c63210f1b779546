// Package reaper decides when an instance that stopped answering is taken out,
// and how many at once. Any number of reapers may run on one registry.
//
// It owns three decisions. The proof (proof.go): Redis has accepted writes for
// a whole TTL of healthy time, so whoever is silent for that long was not kept
// from beating by Redis. The protection (protection.go): too many silent at
// once look more like a cut network than like deaths, so nobody goes. The
// schedule (reaper.go): a pulse 15 times a TTL, a sweep (sweep.go) at the moment
// when the oldest heartbeat runs out.
//
// It promises that no instance whose beat Redis accepted within the last TTL is
// removed, whatever Redis, its clock or this process do, and that a dead one is
// out soon after its TTL while one reaper is armed and no protection holds. No
// answer changes nothing.
//
// What it does, and why it does not, it tells the register (tell.go), where
// `rollcall status` finds it.
//
// It does not see what cannot be seen from inside Redis: a few instances cut
// off from Redis, or all of a service with one instance, look dead. HAProxy's
// own check is the witness there (package lbsync). It does not remove by
// itself either: the register's script does, under the fence of the last
// pulse: in the same data set, of the same life of the same primary, and 2.5
// pulses old at most.
package reaper
