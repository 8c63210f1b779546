package registrar

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/redis/go-redis/v9"
)

// OtherRegistry is a registry that a Redis has beside the one that is meant: in another
// database, or under another namespace.
type OtherRegistry struct {
	URL       string // of its database, without a password
	Namespace string
	Services  int64 // on its list
}

const (
	// otherDatabases is how many databases are looked through, and otherScans how many
	// calls of SCAN, of scanCount keys each, in one of them.
	otherDatabases = 16
	otherScans     = 20
)

// OtherRegistries finds registries that are not empty on the server of rawURL, but for the
// one of its database and namespace. It is for people who have mistyped one of these: it
// looks at a bounded number of keys, so it may miss some, and it changes nothing. It needs
// INFO, SELECT and SCAN, which the roles' users do not have: of a user other than the
// default one it returns none, and asks nothing that Redis would have to refuse. Of a
// Cluster, which has one database, it returns none either.
func (a Access) OtherRegistries(ctx context.Context, rawURL, namespace string) (all []OtherRegistry, err error) {
	if user := userOf(rawURL); user != "" && user != "default" {
		return nil, nil
	}
	rdb, err := a.Open(rawURL, 1)
	if err != nil {
		return nil, err
	}
	defer rdb.Close()
	client, ok := rdb.(*redis.Client)
	if !ok {
		return nil, nil
	}
	own := client.Options().DB
	conn := client.Conn() // a database is chosen for a connection
	defer conn.Close()
	info, err := conn.Info(ctx, "keyspace").Result()
	if err != nil {
		return nil, fmt.Errorf("look for other registries: %w", err)
	}
	var dbs []int
	for name := range fields(info) {
		if db, err := strconv.Atoi(strings.TrimPrefix(name, "db")); err == nil && strings.HasPrefix(name, "db") {
			dbs = append(dbs, db)
		}
	}
	slices.Sort(dbs)
	for _, db := range dbs[:min(len(dbs), otherDatabases)] {
		if err := conn.Select(ctx, db).Err(); err != nil {
			return all, fmt.Errorf("look into database %d: %w", db, err)
		}
		found, err := registriesOf(ctx, conn)
		for _, r := range found {
			if db != own || r.Namespace != namespace {
				r.URL = inDatabase(rawURL, db)
				all = append(all, r)
			}
		}
		if err != nil {
			return all, fmt.Errorf("look through database %d: %w", db, err)
		}
	}
	return all, nil
}

// registriesOf finds those of the database that conn is in.
func registriesOf(ctx context.Context, conn *redis.Conn) (found []OtherRegistry, err error) {
	var cursor uint64
	var namespaces []string
	for range otherScans {
		keys, next, err := conn.ScanType(ctx, cursor, "*:services", scanCount, "set").Result()
		if err != nil {
			return nil, err
		}
		for _, key := range keys {
			if ns := strings.TrimSuffix(key, ":services"); isName(ns) {
				namespaces = append(namespaces, ns)
			}
		}
		if cursor = next; cursor == 0 {
			break
		}
	}
	slices.Sort(namespaces) // SCAN may return a key twice
	for _, ns := range slices.Compact(namespaces) {
		k := Keys{ns: ns}
		n, err := conn.SCard(ctx, k.Services()).Result()
		if err != nil {
			return found, err
		}
		if ours, err := conn.Exists(ctx, k.Version()).Result(); err != nil {
			return found, err
		} else if n > 0 && ours > 0 { // others may have a set of that name
			found = append(found, OtherRegistry{Namespace: ns, Services: n})
		}
	}
	return found, nil
}

// inDatabase is rawURL, which Open has taken, with another database and without a
// password.
func inDatabase(rawURL string, db int) string {
	base, form, rest, err := cutURL(rawURL)
	if err != nil {
		return ""
	}
	if form != "" {
		base += "+" + form
	}
	authority, path, _ := strings.Cut(rest, "/")
	authority, _, _ = strings.Cut(authority, "?") // options of the connection
	at := strings.LastIndexByte(authority, '@')
	user := userOf(rawURL)
	if user != "" {
		user += "@"
	}
	primary := ""
	if form == "sentinel" {
		primary, _, _ = strings.Cut(path, "/")
		primary += "/"
	}
	return base + "://" + user + authority[at+1:] + "/" + primary + strconv.Itoa(db)
}

// userOf is the user of a URL, as it is written there.
func userOf(rawURL string) string {
	_, rest, _ := strings.Cut(rawURL, "://")
	authority, _, _ := strings.Cut(rest, "/")
	user, _, _ := strings.Cut(authority[:max(strings.LastIndexByte(authority, '@'), 0)], ":")
	return user
}
