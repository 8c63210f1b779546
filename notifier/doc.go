// Package notifier is the far end of the change channel: it turns hints into
// facts.
//
// A Watcher subscribes, then reads, then follows. A message only says where to
// look; versions are the truth, and a poll of them finds what a lost message
// hid. A View is one consumer's picture of one service, folded from the changes
// that the Watcher hands it.
//
// It promises that a lost message costs at most one poll interval, that a dead
// subscription is noticed within 3 s, and that no failed read ever looks like an
// empty service. It does not decide what a change means for anybody.
package notifier
