package registrar

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"rollcall/registrar/redistest"
)

// TestCures takes rights from a user one by one. Each refusal says in one line which
// right it is, and how to give it.
func TestCures(t *testing.T) {
	t.Parallel()
	srv := redistest.Start(t)
	root, ctx := srv.Client(t), t.Context()
	set := func(rules ...any) {
		t.Helper()
		must(t, root.Do(ctx, append([]any{"ACL", "SETUSER", "app", "reset", "on", ">pw", "allkeys", "allchannels", "allcommands"}, rules...)...).Err())
	}
	set()
	open := func(url, password string) *Store {
		rdb, err := Access{Password: func() (string, error) { return password, nil }, PasswordName: "THE_PASSWORD"}.Open(url, 1)
		must(t, err)
		t.Cleanup(func() { _ = rdb.Close() })
		s, err := NewStore(rdb, DefaultNamespace)
		must(t, err)
		return s
	}
	s := open("redis://app@"+srv.Addr+"/0", "pw")
	beat := func(ctx context.Context) error {
		_, err := s.Beat(ctx, "web", Beat{Addr: host(1), Token: "t", Meta: metaOf("t"), first: true})
		return err
	}
	for _, c := range []struct {
		name  string
		rules []any
		do    func(context.Context) error
		want  string
	}{
		{"a command", []any{"-evalsha", "-eval"}, beat, "; ACL SETUSER app +evalsha"},
		{"a command in a script", []any{"-hmget"}, beat, "; ACL SETUSER app +hmget"},
		{"a counter in a script", []any{"-incr"}, beat, "; ACL SETUSER app +incr ~rollcall:version"},
		{"keys", []any{"resetkeys", "~other"}, beat, "; ACL SETUSER app ~rollcall:{web}:instances ~"},
		{"a channel in a script", []any{"resetchannels"}, beat, "; ACL SETUSER app &rollcall:changes"},
		{"a command of Redis", []any{"-time"}, func(ctx context.Context) error { _, _, err := s.Clock(ctx); return err }, "; ACL SETUSER app +time"},
		{"a key of a command", []any{"resetkeys", "~other"}, func(ctx context.Context) error { _, err := s.Stale(ctx, "web", 1, 0, 1); return err }, "; ACL SETUSER app ~rollcall:{web}:instances"},
		{"in a pipeline", []any{"-sismember"}, func(ctx context.Context) error { _, _, err := s.listed(ctx, "web"); return err }, "; ACL SETUSER app +sismember"},
		{"one command of a pipeline", []any{"-zrange"}, func(ctx context.Context) error { _, err := s.Overview(ctx); return err }, "; ACL SETUSER app +zrange"},
	} {
		must(t, root.FlushDB(ctx).Err())
		set(c.rules...)
		if err := c.do(ctx); err == nil || !strings.Contains(err.Error(), c.want) || !Refused(err) || Passing(err) {
			t.Errorf("%s: %v, want …%s", c.name, err, c.want)
		}
	}
	set()
	must(t, root.ZAdd(ctx, s.keys.Meta("web"), redis.Z{Score: 1, Member: "a"}).Err())
	if err := beat(ctx); err == nil || !strings.Contains(err.Error(), s.keys.Meta("web")) {
		t.Errorf("a wrong type: %v, want the key", err)
	}
	if _, err := s.Read(ctx, "web", nil); err == nil || !strings.Contains(err.Error(), "; the key is ") || !strings.Contains(err.Error(), s.keys.Meta("web")) || strings.Contains(err.Error(), "epoch") {
		t.Errorf("a wrong type that is read: %v, want the key", err)
	}
	must(t, root.FlushDB(ctx).Err())
	set("resetchannels")
	ps := s.Subscribe(ctx)
	_, err := ps.Receive(ctx)
	if err = s.OfSubscription(err); err == nil || !strings.HasSuffix(err.Error(), "; ACL SETUSER <user> &rollcall:changes") {
		t.Errorf("a subscription: %v", err)
	}
	must(t, ps.Close())

	must(t, root.ConfigSet(ctx, "requirepass", "secret").Err())
	for url, c := range map[string][2]string{
		"redis://" + srv.Addr + "/0":     {"", "; it wants a password: set THE_PASSWORD, or THE_PASSWORD_FILE to a file's path"},
		"redis://app@" + srv.Addr + "/0": {"wrong", "; the password of user app is not the one of THE_PASSWORD, of THE_PASSWORD_FILE or of the URL, or there is no such user"},
	} {
		s := open(url, c[0])
		_, read := s.Read(ctx, "web", nil)
		_, _, piped := s.listed(ctx, "web")
		_, beaten := s.Beat(ctx, "web", Beat{Addr: host(1), Token: "t", Meta: metaOf("t"), first: true})
		for what, err := range map[string]error{"a read": read, "a beat": beaten, "a pipeline": piped} {
			if err == nil || !strings.HasSuffix(err.Error(), c[1]) || !Refused(err) {
				t.Errorf("%s by %q: %v, want …%s", what, c[0], err, c[1])
			}
		}
	}
}

// TestOddAnswer shows numbers as such.
func TestOddAnswer(t *testing.T) {
	t.Parallel()
	if err := (&mark{}).take([]any{int64(70), "x"}); err == nil || !strings.Contains(err.Error(), `[70 "x"]`) {
		t.Error(err)
	}
}

// TestWithoutInfo does all that can be done where INFO is refused, or has no such name.
func TestWithoutInfo(t *testing.T) {
	t.Parallel()
	for name, args := range map[string][]string{"refused": nil, "renamed": {"--rename-command", "INFO", ""}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := redistest.Start(t, args...)
			ctx := t.Context()
			must(t, srv.Client(t).Do(ctx, "ACL", "SETUSER", "default", "-@dangerous", "+acl", "+shutdown").Err())
			s, err := NewStore(srv.Client(t), DefaultNamespace)
			must(t, err)
			_, err = s.Beat(ctx, "web", Beat{Addr: host(1), Token: "t", Meta: metaOf("t"), first: true})
			must(t, err)
			snap, err := s.Read(ctx, "web", nil)
			if err != nil || len(snap.Entries) != 1 || !snap.Token.Nameless() {
				t.Fatalf("%+v, %v", snap, err)
			}
			// By its version alone a change may be another history's.
			since := snap.Token
			since.Version--
			if snap, err = s.Read(ctx, "web", &since); err != nil || !snap.Full {
				t.Errorf("a change was read by itself: %+v, %v", snap, err)
			}
			v, err := s.Versions(ctx, []Service{"web"})
			if err != nil || v.Token("web") != snap.Token {
				t.Errorf("%+v, %v, want %+v", v, err, snap.Token)
			}
			must(t, s.Acker("lb").Ack(ctx, "web", snap.Token))
			if live, err := s.WaitApplied(ctx, "web", snap.Token.Version, nil); err != nil || live != 1 {
				t.Errorf("%d live, %v", live, err)
			}
			if e, err := s.Entry(ctx, "web", host(1)); err != nil || !e.Present {
				t.Errorf("%+v, %v", e, err)
			}
			if h, err := s.History(ctx); err != nil || h != noHistory {
				t.Errorf("history %q, %v", h, err)
			}
			// Nobody is taken out without a proof.
			if _, err := s.Pulse(ctx, "r", "p", time.Minute); !errors.Is(err, ErrNoHistory) || !strings.Contains(err.Error(), "+info") {
				t.Errorf("a pulse: %v", err)
			}
			if o, err := s.Examine(ctx); err != nil || o.Unseen == nil || o.Version == "" || o.Role != "master" || o.Memory != Unknown {
				t.Errorf("%+v, %v", o, err)
			}
			missing, err := s.Rights(ctx, "web")
			if what := strings.Join(missing[RoleReaper], ", "); err != nil || !strings.HasPrefix(what, "info") || strings.Contains(what, "rename-command") != (args != nil) {
				t.Errorf("missing %q, %v", what, err)
			}
			_, err = s.Leave(ctx, "web", host(1), "t", Left)
			must(t, err)
		})
	}
}
