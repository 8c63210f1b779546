package notifier

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"rollcall/registrar"
	"rollcall/registrar/redistest"
)

// views is what a Watcher has told of each service.
type views struct {
	mu          sync.Mutex
	of          map[registrar.Service]*View
	interrupted map[registrar.Service]int
}

func (v *views) handle(c Change) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.of[c.Service] == nil {
		v.of[c.Service] = &View{}
	}
	v.of[c.Service].Apply(c)
	if c.Interrupted {
		v.interrupted[c.Service]++
	}
}

// want tells whether svc has n instances.
func (v *views) want(svc registrar.Service, n int) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	got := 0
	if view := v.of[svc]; view != nil {
		view.Each(func(e registrar.Entry) {
			if e.Present {
				got++
			}
		})
	}
	if got != n {
		return fmt.Errorf("%s has %d instances, want %d", svc, got, n)
	}
	return nil
}

func (v *views) interruptions(svc registrar.Service) int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.interrupted[svc]
}

// TestClusterWatch follows services of every shard: by the announcements, by the
// poll when these are lost, and past a shard that hangs or dies, of which
// nothing changes meanwhile.
func TestClusterWatch(t *testing.T) {
	nodes := redistest.StartCluster(t, 3, "--appendonly", "yes", "--appendfsync", "always")
	client := func(url string) *registrar.Store {
		rdb, err := registrar.Open(url, 2)
		must(t, err)
		t.Cleanup(func() { must(t, rdb.Close()) })
		return storeOn(t, rdb)
	}
	store := client(nodes.URL())
	for _, n := range nodes {
		must(t, n.Client(t).Do(t.Context(), "ACL", "SETUSER", "mute", "on", ">secret", "~*", "+@all", "resetchannels").Err())
	}
	mute := client(strings.Replace(nodes.URL(), "://", "://mute:secret@", 1))
	names, all := make([][]registrar.Service, 3), []registrar.Service(nil)
	for n := 0; len(all) < 6; n++ {
		svc := registrar.Service(fmt.Sprintf("s%d", n))
		if i := nodes.Shard(t, "{"+string(svc)+"}"); len(names[i]) < 2 {
			names[i], all = append(names[i], svc), append(all, svc)
		}
	}
	join := func(s *registrar.Store, svc registrar.Service, n int) error {
		ctx, cancel := registrar.WithTimeout(t.Context())
		defer cancel()
		_, err := s.Beat(ctx, svc, registrar.Beat{Addr: host(n), Token: fmt.Sprint("t", n), Meta: metaOf(n, 1)})
		return err
	}
	for _, svc := range all {
		must(t, join(store, svc, 1))
	}
	const poll = time.Second
	w, err := New(Config{Poll: poll}, client(nodes.URL()), zerolog.Nop())
	must(t, err)
	v := &views{of: map[registrar.Service]*View{}, interrupted: map[registrar.Service]int{}}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	running.Go(func() {
		if err := w.Run(ctx, v.handle); err != nil {
			t.Error(err)
		}
	})
	members := map[registrar.Service]int{}
	seen := func(svc registrar.Service) (took time.Duration) {
		t.Helper()
		begun := time.Now()
		eventually(t, func() error { return v.want(svc, members[svc]) })
		return time.Since(begun)
	}
	add := func(svc registrar.Service) time.Duration {
		t.Helper()
		members[svc]++
		eventually(t, func() error { return join(store, svc, members[svc]) })
		return seen(svc)
	}
	for _, svc := range all {
		members[svc] = 1
		seen(svc)
	}
	eventually(t, func() error {
		if !w.Alive() {
			return fmt.Errorf("no subscription")
		}
		return nil
	})
	var heard []time.Duration
	for _, svc := range all {
		heard = append(heard, add(svc).Round(100*time.Microsecond))
	}
	t.Logf("announced changes were seen after %v", heard)
	if m := slices.Max(heard); m > poll/2 {
		t.Errorf("an announcement took %v", m)
	}

	for _, svc := range all {
		members[svc]++
		if err := join(mute, svc, members[svc]); err == nil || !strings.Contains(err.Error(), "can't publish") {
			t.Fatalf("beat without channel rights: %v", err)
		}
		if took := seen(svc); took > 2*poll {
			t.Errorf("a lost announcement of %s was found after %v, by a poll each %v", svc, took, poll)
		}
	}

	channel := nodes.Shard(t, store.Keys().Changes()) // whose death must not cost the subscription for long
	for _, way := range []string{"hangs", "is dead"} {
		end := func() { nodes[channel].Signal(t, syscall.SIGCONT) }
		if way == "hangs" {
			nodes[channel].Signal(t, syscall.SIGSTOP)
		} else {
			nodes[channel].Kill(t)
			end = func() { nodes[channel].Launch(t) }
		}
		var took []time.Duration
		for range 3 {
			for _, svc := range slices.Concat(names[(channel+1)%3], names[(channel+2)%3]) {
				took = append(took, add(svc).Round(time.Millisecond))
			}
		}
		t.Logf("a shard %s: others' changes were seen after %v", way, took)
		if m := slices.Max(took); m > poll+5*registrar.Timeout {
			t.Errorf("another's change took %v while a shard %s", m, way)
		}
		eventually(t, func() error {
			if !w.Alive() {
				return fmt.Errorf("no subscription while a shard %s", way)
			}
			return nil
		})
		for _, svc := range names[channel] {
			if err := v.want(svc, members[svc]); err != nil {
				t.Errorf("a shard %s: %v", way, err)
			}
		}
		end()
		for _, svc := range all {
			add(svc)
		}
	}
	for i, of := range names {
		for _, svc := range of {
			// A restarted node has another replication id; one that hung has not.
			want := 0
			if i == channel {
				want = 1
			}
			if got := v.interruptions(svc); got != want {
				t.Errorf("%d interruptions of %s on shard %d, want %d", got, svc, i, want)
			}
		}
	}
}
