package registrar

import (
	"crypto/sha1"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/redis/go-redis/v9"
)

// words says what a refusal of Redis means for who set it up, and how to cure it.
// Redis itself names neither the key nor, in a script, the command; nor does it know
// where a password comes from.
type words struct {
	user     string // of the URL; empty = default
	password string // the variable that has the password; empty = none
	server   bool   // the URL names this very server, and not who knows the primary
}

// explained is a refusal, or a server that is away, with its cure. What a caller decides on is unchanged.
type explained struct {
	error
	cure string
}

func (e explained) Error() string { return e.error.Error() + "; " + e.cure }
func (e explained) Unwrap() error { return e.error }

// explain adds the cure to the error of a command with these arguments, once.
func (w words) explain(args []any, err error) error {
	var answer redis.Error
	var before explained
	if err == nil || errors.Is(err, redis.Nil) || errors.As(err, &before) {
		return err
	}
	cure := w.away(err)
	if errors.As(err, &answer) {
		cure = w.cure(answer.Error(), args)
	}
	if cure != "" {
		return explained{err, cure}
	}
	return err
}

// away is what to look at where no connection to a server was made; empty if err is
// something else, or if others say where the server is (Sentinels, nodes of a Cluster).
func (w words) away(err error) string {
	var dial *net.OpError
	if !w.server || !errors.As(err, &dial) || dial.Op != "dial" {
		return ""
	}
	cure := "is redis-server running there?"
	if name, ok := strings.CutSuffix(w.password, "_PASSWORD"); ok {
		cure += fmt.Sprintf(" --%s or %s says where it is", strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(name, "ROLLCALL_"), "_", "-")), name)
	}
	return cure
}

var (
	// From Redis 7.0's and 7.2's acl.c and script.c.
	refusedCommand = regexp.MustCompile(`run the '([^']+)' command`)
	unknownCommand = regexp.MustCompile(`^ERR unknown command '([^']+)'`)
	// uncounted of lib.lua says it so.
	countedKey = regexp.MustCompile(`: INCR (\S+)$`)
	scriptLine = regexp.MustCompile(`script: ([0-9a-f]{40}), on @user_script:(\d+)`)
	calls      = regexp.MustCompile(`redis\.p?call\('(\w+)'(?:, KEYS\[(\d+)\])?`)
)

// cure returns what to do about an answer to a command with args; empty if it is not
// known to be a matter of rights or settings.
func (w words) cure(answer string, args []any) string {
	user := w.user
	if user == "" {
		user = "default"
	}
	commands, keys := inScript(answer, args)
	grant := func(what string) string { return "ACL SETUSER " + user + " " + what }
	switch m := refusedCommand.FindStringSubmatch(answer); {
	case strings.HasPrefix(answer, "NOAUTH ") || strings.Contains(answer, "unauthenticated"):
		if w.password == "" {
			return "it wants a password"
		}
		return fmt.Sprintf("it wants a password: set %s, or %s_FILE to a file's path", w.password, w.password)
	case strings.HasPrefix(answer, "WRONGPASS "):
		if w.password == "" {
			return "the password of user " + user + " is another one, or there is no such user"
		}
		return fmt.Sprintf("the password of user %s is not the one of %s, of %s_FILE or of the URL, or there is no such user", user, w.password, w.password)
	case m != nil:
		return grant("+" + m[1])
	case strings.Contains(answer, "can't run this command"):
		if k := countedKey.FindStringSubmatch(answer); k != nil {
			return grant("+incr ~" + k[1])
		}
		if len(commands) == 0 {
			return "user " + user + " lacks a right, which rollcall doctor names"
		}
		return grant("+" + strings.ToLower(strings.Join(commands, " +")))
	case strings.Contains(answer, "at least one of the keys"), strings.HasPrefix(answer, "NOPERM ") && strings.Contains(answer, "key"):
		if k := countedKey.FindStringSubmatch(answer); k != nil {
			keys = []string{k[1]}
		}
		if len(keys) == 0 {
			return "user " + user + " lacks the right to a key, which rollcall doctor names"
		}
		return grant("~" + strings.Join(keys, " ~"))
	case strings.Contains(answer, "channel") && (strings.HasPrefix(answer, "NOPERM ") || strings.Contains(answer, "can't publish")):
		return grant("&" + channel(args))
	case strings.HasPrefix(answer, "ERR unknown command") || strings.HasPrefix(answer, "ERR Unknown Redis command"):
		if m := unknownCommand.FindStringSubmatch(answer); m != nil {
			commands = []string{m[1]}
		}
		return fmt.Sprintf("take the line rename-command %s out of redis.conf", strings.ToUpper(strings.Join(commands, " or ")))
	case strings.HasPrefix(answer, "ERR DB index is out of range"):
		return "the URL ends with the number of a database that this Redis does not have; 0 is always there, and redis.conf's `databases` says how many"
	case strings.HasPrefix(answer, "READONLY ") && w.server:
		return "it is a replica: let the URL name the primary, or its Sentinels (redis+sentinel://HOST:PORT,…/PRIMARY/DB)"
	case strings.HasPrefix(answer, "WRONGTYPE ") && !slices.ContainsFunc(keys, func(k string) bool { return strings.Contains(answer, k) }):
		if may := read(commands, keys); len(may) > 0 {
			return "the key is " + strings.Join(may, " or ")
		}
	}
	return ""
}

// Refused tells whether the same call will be refused again: for want of a right or a
// password, say, or since the URL is wrong. Then Redis is not away.
func Refused(err error) bool {
	var answer redis.Error
	return errors.As(err, &answer) && !errors.Is(err, redis.Nil) && !Passing(err) ||
		errors.Is(err, ErrWrongDoor) || errors.Is(err, ErrPassword)
}

// Unknowable tells whether Redis was told not to know a command by its name.
func Unknowable(err error) bool {
	var answer redis.Error
	return errors.As(err, &answer) && strings.HasPrefix(answer.Error(), "ERR unknown command")
}

// Forbidden tells whether the user lacks the right to a command or a key, also within a
// script, or Redis was told not to know the command.
func Forbidden(err error) bool {
	var answer redis.Error
	return errors.As(err, &answer) && (strings.HasPrefix(answer.Error(), "NOPERM ") || strings.Contains(answer.Error(), "user executing the script can't") || strings.Contains(answer.Error(), "ACL failure in script")) || Unknowable(err)
}

// inScript finds the commands of the line at which a script failed, and its keys where
// the line names them by number; else all keys of the command.
func inScript(answer string, args []any) (commands, keys []string) {
	all := keysOf(args)
	m := scriptLine.FindStringSubmatch(answer)
	if m == nil {
		return nil, all
	}
	n, err := strconv.Atoi(m[2])
	lines := strings.Split(sourceOf(m[1]), "\n")
	if err != nil || n < 1 || n > len(lines) {
		return nil, all
	}
	for _, c := range calls.FindAllStringSubmatch(lines[n-1], -1) {
		commands = append(commands, c[1])
		if i, err := strconv.Atoi(c[2]); err == nil && i >= 1 && i <= len(all) {
			keys = append(keys, all[i-1])
		}
	}
	if len(keys) == 0 {
		keys = all
	}
	return commands, keys
}

// read returns those of the keys that one of the commands can be meant for, by the type
// that they are to have.
func read(commands, keys []string) []string {
	if len(commands) == 0 || len(keys) < 2 {
		return keys
	}
	return slices.DeleteFunc(slices.Clone(keys), func(key string) bool {
		name := key[strings.LastIndexByte(key, ':')+1:]
		return !slices.ContainsFunc(commands, func(c string) bool {
			switch c[0] {
			case 'Z':
				return slices.Contains([]string{"instances", "gone-at", "changed", "balancers"}, name)
			case 'H':
				return slices.Contains([]string{"meta", "admin", "gone", "applied", "config", "reapers", "balancer-owners"}, name)
			case 'S', 'G', 'I': // SET and SADD, GET, INCR
				return slices.Contains([]string{"services", "version", "epoch", "quiet"}, name)
			}
			return true
		})
	})
}

// keysOf returns the keys of a script's call, or the first argument of another command.
func keysOf(args []any) (keys []string) {
	name := ""
	if len(args) > 0 {
		name = strings.ToLower(fmt.Sprint(args[0]))
	}
	switch {
	case strings.HasPrefix(name, "eval") && len(args) > 2:
		n, err := strconv.Atoi(fmt.Sprint(args[2]))
		if err != nil || n < 0 || 3+n > len(args) {
			return nil
		}
		args = args[3 : 3+n]
	case len(args) > 1 && !strings.HasPrefix(name, "eval"):
		args = args[1:2]
	default:
		return nil
	}
	for _, a := range args {
		keys = append(keys, fmt.Sprint(a))
	}
	return keys
}

// channel is the one that a command or a script publishes to: of a script the first
// argument after its keys.
func channel(args []any) string {
	rest := args[min(1, len(args)):]
	if n := len(keysOf(args)); len(args) > 0 && strings.HasPrefix(strings.ToLower(fmt.Sprint(args[0])), "eval") {
		rest = args[min(3+n, len(args)):]
	}
	if len(rest) == 0 {
		return "*"
	}
	return fmt.Sprint(rest[0])
}

// sourceOf returns the text of the script with that digest; empty if it is none of
// this package's.
func sourceOf(digest string) string {
	files, err := fs.Glob(sources, "lua/*.lua")
	if err != nil {
		return ""
	}
	for _, f := range files {
		text := source(strings.TrimSuffix(strings.TrimPrefix(f, "lua/"), ".lua"))
		if fmt.Sprintf("%x", sha1.Sum([]byte(text))) == digest {
			return text
		}
	}
	return ""
}
