package main

import (
	"slices"
	"strings"
)

// notForChildren are variables that name this process's own business with systemd: a
// child that took them for its own would speak for it.
var notForChildren = []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}

// childEnv returns what of an environment an app gets, and a command that checks it:
// all but this program's secrets. Those are the variables ROLLCALL_…_PASSWORD and
// ROLLCALL_…_TOKEN, and the passwords in URLs: of these the rest stays, so that the
// app, or a rollcall that it calls, still finds the registry. A variable …_FILE names
// a path, and who may read that is the file system's to say. Variables that are not
// this program's are the app's own, LISTEN_FDS among them, whose descriptors it has.
func childEnv(environ []string) []string {
	out := make([]string, 0, len(environ))
	for _, kv := range environ {
		name, value, _ := strings.Cut(kv, "=")
		switch ours := strings.HasPrefix(name, "ROLLCALL_"); {
		case slices.Contains(notForChildren, name):
		case !ours:
			out = append(out, kv)
		case strings.HasSuffix(name, "_PASSWORD"), strings.HasSuffix(name, "_TOKEN"):
		default:
			if value, known := urlForChild(value); known {
				out = append(out, name+"="+value)
			}
		}
	}
	return out
}

// urlForChild takes the password out of a URL. Another text it returns as it is.
// known is false of what could be a URL with a password, and cannot be told apart.
func urlForChild(text string) (clean string, known bool) {
	scheme, rest, isURL := strings.Cut(text, "://")
	if !isURL || !strings.Contains(rest, "@") {
		return text, true
	}
	authority, path := rest, ""
	if i := strings.IndexAny(rest, "/?#"); i >= 0 {
		authority, path = rest[:i], rest[i:]
	}
	// A password that was not escaped may have any of these characters.
	if strings.Contains(path, "@") || strings.Contains(authority, "://") {
		return "", false
	}
	at := strings.LastIndexByte(authority, '@')
	if at < 0 {
		return text, true
	}
	user, _, _ := strings.Cut(authority[:at], ":")
	if user != "" {
		user += "@"
	}
	return scheme + "://" + user + authority[at+1:] + path, true
}
