// Package httpapi shows a register over HTTP: a JSON API with long polls, a
// stream of server-sent events, Prometheus' service discovery, and one page.
//
// A Server follows every service with one notifier.Watcher and answers readers
// from what that has seen, so they cost Redis nothing, but for events that are
// not in memory any more: these are read for two requests at a time. While Redis is
// away it serves what it knows and says how old that is; before it has read
// everything it says 503 and never an empty list.
//
// It is read-only unless it is given a token. It decides nothing about
// instances: a write is an operator's word, as the commands write it.
package httpapi
