package registrar

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"rollcall/registrar/redistest"
)

// TestClusterURL checks what --redis takes for a Cluster, and the deadlines.
func TestClusterURL(t *testing.T) {
	for _, url := range []string{
		"redis+cluster://", "redis+cluster://u:s3cret@h1,,h2", "redis+cluster://u:s3cret@h1/1", "redis+cluster://u:s3cret@h1/primary",
		"redis+cluster://u:s3cret@h1:port", "redis+cluster://u:s3cret%zz@h1", "redis+cluster://u:s3cret@h1?x=s3cret", "http+cluster://h1",
	} {
		rdb, err := Open(url, 1)
		if err == nil {
			t.Errorf("%q was accepted", url)
			rdb.Close()
		} else if strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%q: the error holds the password: %v", url, err)
		}
	}
	for _, url := range []string{"redis+cluster://h1", "redis+cluster://u:p%40s@h1:1,[::1]:2,h3", "rediss+cluster://h1,h2/"} {
		rdb, err := Open(url, 3)
		if err != nil {
			t.Errorf("%q: %v", url, err)
			continue
		}
		o := rdb.(*redis.ClusterClient).Options()
		if o.DialTimeout != DialTimeout || o.ReadTimeout != Timeout || o.WriteTimeout != Timeout || o.PoolTimeout != Timeout ||
			o.MaxRetries > 0 || o.MaxRedirects != 0 || o.DialerRetries != 1 || o.PoolSize != 3 || !o.ContextTimeoutEnabled || o.ReadOnly {
			t.Errorf("%q: %+v", url, o)
		}
		if secure := speaksTLS(t, o.Dialer); secure != strings.HasPrefix(url, "rediss") {
			t.Errorf("%q: TLS %v", url, secure)
		}
		if strings.Contains(url, "%40") {
			want := []string{"h1:1", "[::1]:2", "h3:6379"}
			if user, password, err := o.CredentialsProviderContext(t.Context()); user != "u" || password != "p@s" || err != nil || !slices.Equal(o.Addrs, want) {
				t.Errorf("%q: user %q, password %q, %v, nodes %v", url, user, password, err, o.Addrs)
			}
		}
		must(t, rdb.Close())
	}
}

// speaksTLS tells whether the first that a server hears of a connection is a TLS
// handshake. Without a dialer of its own, go-redis' connections are plain.
func speaksTLS(tb testing.TB, dial func(ctx context.Context, network, addr string) (net.Conn, error)) bool {
	tb.Helper()
	if dial == nil {
		return false
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(tb, err)
	defer l.Close()
	first := make(chan byte, 1)
	var listening sync.WaitGroup
	defer listening.Wait()
	listening.Go(func() {
		b := make([]byte, 1)
		if conn, err := l.Accept(); err == nil {
			_ = conn.SetReadDeadline(time.Now().Add(Timeout)) // a TCP connection has deadlines
			_, _ = conn.Read(b)                               // nothing came: 0
			_ = conn.Close()                                  // nothing was written
		}
		first <- b[0]
	})
	ctx, cancel := context.WithTimeout(tb.Context(), Timeout)
	defer cancel()
	if conn, err := dial(ctx, "tcp", l.Addr().String()); err == nil {
		_, _ = conn.Write([]byte("P")) // if it fails, nothing comes
		defer conn.Close()
	}
	const handshake = 22 // RFC 8446, 5.1: the type of the record
	return <-first == handshake
}

// newClusterStore returns a store with a client of its own.
func newClusterStore(tb testing.TB, c redistest.Cluster) *Store {
	tb.Helper()
	rdb, err := Open(c.URL(), 4)
	must(tb, err)
	tb.Cleanup(func() {
		if err := rdb.Close(); err != nil {
			tb.Error(err)
		}
	})
	s, err := NewStore(rdb, DefaultNamespace)
	must(tb, err)
	return s
}

// onEach returns two names of services on each shard.
func onEach(tb testing.TB, c redistest.Cluster) [][]Service {
	tb.Helper()
	const each = 2
	names := make([][]Service, len(c))
	for n, missing := 0, each*len(c); missing > 0; n++ {
		svc := Service(fmt.Sprintf("s%d", n))
		if i := c.Shard(tb, "{"+string(svc)+"}"); len(names[i]) < each {
			names[i] = append(names[i], svc)
			missing--
		}
	}
	return names
}

// TestClusterKeys looks whether every key that a script of a service touches
// is in its slot, and none is another service's.
func TestClusterKeys(t *testing.T) {
	whole := Keys{ns: "ns", cluster: true}
	k := whole.Of(web)
	keys := append(k.change(web), k.Reaper("r"), k.LetGo(), k.Balancers(), k.Owners(), k.Applied(web))
	for _, key := range append(keys, k.change(canary)...) {
		if !strings.HasPrefix(key, "ns:{web}:") {
			t.Errorf("%s is in another slot", key)
		}
	}
	for _, key := range k.change(canary)[:7] {
		if slices.Contains(keys, key) {
			t.Errorf("the canary writes the service's own %s", key)
		}
	}
	if k.Version() != k.ServiceVersion(web) || k.Changes() != whole.Changes() || whole.Services() != "ns:services" || k.Of("api") != k {
		t.Errorf("%q %q %q", k.Version(), k.Changes(), whole.Services())
	}
	if one := (Keys{ns: "ns"}); one.Of(web) != one {
		t.Error("a single Redis has more than one register")
	}
}

// TestClusterStore takes services of every shard through each of the store's
// calls.
func TestClusterStore(t *testing.T) {
	c := redistest.StartCluster(t, 3)
	s, ctx := newClusterStore(t, c), t.Context()
	ps := s.Subscribe(ctx)
	defer ps.Close()
	names := slices.Concat(onEach(t, c)...)
	for i := 0; i < 2; i++ { // the Pong and the subscription
		_, err := ps.Receive(ctx)
		must(t, err)
	}
	hear := func(svc Service, version int64) {
		t.Helper()
		m, err := ps.ReceiveTimeout(ctx, 5*time.Second)
		must(t, err)
		if got, want := m.(*redis.Message).Payload, fmt.Sprintf("%d %s %d", version, svc, version); got != want {
			t.Errorf("heard %q, want %q", got, want)
		}
	}
	s.listing.timeout = 5 * time.Second // a first beat's answer depends on it here
	// The whole register's times are older than its services.
	if _, err := s.Config(ctx, 6*time.Second, 2*time.Second, false); err != nil {
		t.Fatal(err)
	}
	a, b := host(1), host(2)
	for _, svc := range names {
		r, err := s.Beat(ctx, svc, Beat{Addr: a, Token: "t", Meta: metaOf("t")})
		if err != nil || r.Status != BeatNew || r.Version != 1 || r.TTL != 6*time.Second || r.Interval != 2*time.Second {
			t.Fatalf("first beat of %s: %+v, %v", svc, r, err)
		}
		hear(svc, 1)
		if r, err := s.Beat(ctx, svc, Beat{Addr: a, Token: "t", Meta: metaOf("t")}); err != nil || r.Status != BeatOK {
			t.Errorf("second beat of %s: %+v, %v", svc, r, err)
		}
		if _, err := s.Beat(ctx, svc, Beat{Addr: b, Token: "u", Meta: metaOf("u")}); err != nil {
			t.Error(err)
		}
		hear(svc, 2)
		if v, present, err := s.SetAdmin(ctx, svc, a, Word{Verb: "drain"}); v != 3 || !present || err != nil {
			t.Errorf("drain in %s: version %d, %v", svc, v, err)
		}
		hear(svc, 3)
	}
	var beats []ServiceBeat
	for _, svc := range names {
		beats = append(beats, ServiceBeat{svc, Beat{Addr: b, Token: "u", Meta: metaOf("u")}}, ServiceBeat{svc, Beat{Addr: b, Token: "w", Meta: metaOf("w")}})
	}
	for i, g := range s.BeatSteady(ctx, beats) {
		if own := i%2 == 0; g.Done != own || g.Err != nil || own && g.Interval != 2*time.Second {
			t.Errorf("beat %d of many: %+v", i, g)
		}
	}
	listed, _, err := s.Services(ctx)
	must(t, err)
	slices.Sort(listed)
	want := slices.Clone(names)
	slices.Sort(want)
	if !slices.Equal(listed, want) {
		t.Errorf("services %v, want %v", listed, want)
	}
	v, err := s.Versions(ctx, append(slices.Clone(names), "nobody"))
	must(t, err)
	for _, svc := range names {
		snap, err := s.Read(ctx, svc, nil)
		must(t, err)
		if snap.Token.Version != 3 || v.Token(svc) != snap.Token || len(snap.Entries) != 2 || snap.TTL != 6*time.Second {
			t.Errorf("%s: versions say %v, a read %+v", svc, v.Token(svc), snap)
		}
		must(t, s.Acker("lb").Ack(ctx, svc, snap.Token))
		if acks, err := s.Acks(ctx, svc); err != nil || len(acks.Balancers) != 1 || !acks.Balancers[0].Live || acks.Balancers[0].Applied != 3 {
			t.Errorf("acknowledgements of %s: %+v, %v", svc, acks, err)
		}
		if _, err := s.Leave(ctx, svc, b, "u", Left); err != nil {
			t.Error(err)
		}
		hear(svc, 4)
		delta, err := s.Read(ctx, svc, &snap.Token)
		if err != nil || delta.Full || len(delta.Entries) != 1 || delta.Entries[0].Gone == nil {
			t.Errorf("what changed of %s: %+v, %v", svc, delta, err)
		}

		of := s.Of(svc)
		must(t, of.Canary(ctx))
		must(t, of.Canary(ctx))
		if after, err := s.Read(ctx, svc, &delta.Token); err != nil || after.Token != delta.Token {
			t.Errorf("a canary changed %s from %v to %v, %v", svc, delta.Token, after.Token, err)
		}
		if m, err := ps.ReceiveTimeout(ctx, 5*time.Second); err != nil || m.(*redis.Message).Payload != "1 _canary 1" {
			t.Errorf("heard %v, %v", m, err)
		}
		p, err := of.Pulse(ctx, "r", "p1", time.Minute)
		must(t, err)
		if p.ReplID != delta.Token.ReplID || p.Epoch != delta.Token.Epoch {
			t.Errorf("a pulse of %s met another history: %+v", svc, p)
		}
		counts, err := of.Survey(ctx, []Service{svc}, p.Now+1, p.Now+1, p.Now+1)
		if err != nil || len(counts) != 1 || counts[0].Members != 1 || counts[0].Stale != 1 {
			t.Errorf("survey of %s: %+v, %v", svc, counts, err)
		}
		if _, err := of.Reap(ctx, svc, Sweep{ID: "r", Token: "p0", ReplID: p.ReplID, Last: p.Now, MaxAge: time.Minute, Cutoff: p.Now + 1}); err == nil {
			t.Errorf("%s was reaped without a pulse", svc)
		}
		out, err := of.Reap(ctx, svc, Sweep{ID: "r", Token: "p1", ReplID: p.ReplID, Last: p.Now, MaxAge: time.Minute, Cutoff: p.Now + 1})
		if err != nil || len(out.Addrs) != 1 || out.Version != 5 {
			t.Errorf("reap of %s: %+v, %v", svc, out, err)
		}
		hear(svc, 5)
		if now, ttl, err := of.Clock(ctx); err != nil || ttl != 6*time.Second || now < p.Now {
			t.Errorf("clock of %s: %d, %v, %v", svc, now, ttl, err)
		}
		if own, _, err := of.Services(ctx); err != nil || !slices.Equal(own, []Service{svc}) {
			t.Errorf("services of %s: %v, %v", svc, own, err)
		}
	}
	// Each service has a log of its own; what reads them shows one.
	r := s.EventReader(nil)
	events, err := r.Last(ctx, "", 0)
	must(t, err)
	for _, svc := range names {
		of := slices.DeleteFunc(slices.Clone(events), func(e Event) bool { return e.Service != svc })
		if got := said(of); len(got) != 5 || of[4].What != EventExpired || of[4].Version != 5 {
			t.Errorf("of %s the log has %q", svc, got)
		}
		if one := allEvents(t, s, svc); !slices.Equal(one, of) {
			t.Errorf("by itself %s has %q", svc, said(one))
		}
	}
	if len(events) != 5*len(names) || !slices.IsSortedFunc(events, func(a, b Event) int { return strings.Compare(a.ID, b.ID) }) {
		t.Errorf("the log has %q", said(events))
	}
	if last, err := s.Events(ctx, nil, "", 3); err != nil || !slices.Equal(last, events[len(events)-3:]) {
		t.Errorf("the last 3 are %q, %v", said(last), err)
	}
	eventually(t, func() error { // there is nothing else
		events, err := r.Next(ctx)
		if len(events) > 0 {
			t.Errorf("read twice: %q", said(events))
		}
		return err
	})
	for _, svc := range append(slices.Clone(names), "a-new-one") {
		_, err := s.Beat(ctx, svc, Beat{Addr: a, Token: "v", Meta: metaOf("v")})
		must(t, err)
	}
	var came []string
	eventually(t, func() error {
		events, err := r.Next(ctx)
		for _, e := range events {
			came = append(came, fmt.Sprint(e.What, " ", e.Service))
		}
		if err == nil && len(came) <= len(names) {
			err = fmt.Errorf("came %q", came)
		}
		return err
	})
	slices.Sort(came)
	for _, svc := range append(slices.Clone(names), "a-new-one") {
		if i, ok := slices.BinarySearch(came, "joined "+string(svc)); !ok || len(came) != len(names)+1 {
			t.Errorf("%s: %d of %q", svc, i, came)
		}
		must(t, s.Unlist(ctx, svc))
	}
	if listed, _, err := s.Services(ctx); err != nil || len(listed) > 0 {
		t.Errorf("services %v, %v, want none", listed, err)
	}
}

// TestClusterShardDown has one shard die or hang, in turn: everything of the
// others goes on at its pace, and of the dead one nothing is known.
func TestClusterShardDown(t *testing.T) {
	c := redistest.StartCluster(t, 3)
	s, ctx := newClusterStore(t, c), t.Context()
	names := onEach(t, c)
	all := slices.Concat(names...)
	beat := func(s *Store, svc Service) error {
		ctx, cancel := WithTimeout(ctx)
		defer cancel()
		_, err := s.Beat(ctx, svc, Beat{Addr: host(1), Token: "t", Meta: metaOf("t")})
		return err
	}
	list := c.Shard(t, s.Keys().Services())
	for _, way := range []string{"hangs", "is dead"} {
		for _, down := range []int{list, (list + 1) % 3} {
			t.Run(fmt.Sprintf("shard %d %s", down, way), func(t *testing.T) {
				for _, svc := range all { // after the last one's end, everything comes back by itself
					eventually(t, func() error { return beat(s, svc) })
				}
				if way == "hangs" {
					c[down].Signal(t, syscall.SIGSTOP)
					defer c[down].Signal(t, syscall.SIGCONT)
				} else {
					c[down].Kill(t)
					defer c[down].Launch(t)
				}
				s.listing.at = map[Service]time.Time{} // each beat wants to add to the list
				begun := time.Now()
				for i, of := range names {
					for _, svc := range of {
						if err := beat(s, svc); (err == nil) != (i != down) {
							t.Errorf("beat of %s on shard %d: %v", svc, i, err)
						}
					}
				}
				t.Logf("six beats took %v", time.Since(begun))
				begun = time.Now()
				tctx, cancel := WithTimeout(ctx)
				defer cancel()
				v, err := s.Versions(tctx, all)
				if err != nil || len(v.Of) != 4 {
					t.Errorf("versions of %d services, %v, want the 4 of the other shards", len(v.Of), err)
				}
				for _, svc := range names[down] {
					if v.Token(svc) != (Token{}) {
						t.Errorf("%s is at %v", svc, v.Token(svc))
					}
				}
				if took := time.Since(begun); took > Timeout+500*time.Millisecond {
					t.Errorf("versions took %v", took)
				}
				must(t, s.Ping(ctx))
				if _, err := s.Versions(tctx, names[down]); err == nil {
					t.Error("versions of dead services only, and no error")
				}
			})
		}
	}
}
