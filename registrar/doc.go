// Package registrar is the register itself: what an instance is, where it is
// kept, and every atomic change that can be made to it.
//
// It owns the key names (keys.go), the Lua scripts (lua/, one for each atomic
// change) and the connection to Redis. A Store runs the scripts; a Beater is
// the heartbeat loop of one instance.
//
// It promises that a change and its announcement are one script, that versions
// only grow while the data lives, and that Redis' clock is the only one that
// scores. It does not decide when to remove anybody (package reaper) and does
// not follow changes (package notifier).
package registrar
