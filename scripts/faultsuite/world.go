package main

import (
	"context"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"

	"rollcall/lbsync/haproxy/haproxytest"
	"rollcall/registrar/redistest"
)

// size is how many instances a cast has, the one that dies included.
const size = 10

//go:embed clock/clock.c
var clockSource []byte

// world is where one fault is played: a Redis, and on it a cast of rollcall's
// and one of each mutant.
type world struct {
	*play
	rollcall  string            // the binary
	built     map[string]string // those of the mutants
	ttl, beat time.Duration
	srv       *redistest.Server // that holds the service
	rdb       redis.UniversalClient
	url       string // of Redis, if it is more than that one server
	nodes     redistest.Cluster
	second    *redistest.Server
	sentinels []*redistest.Server
	cast      *cast
	mutants   []*cast
	traffic   *traffic
	library   string // what is preloaded into a Redis whose clock moves
	clock     string // the file that shifts Redis' clock, if the fault needs one
	slots     int    // of HAProxy, if more than usual
	monitored bool   // all processes serve their metrics, not reapers alone
	piped     bool   // each log is a pipe, of which hears says who reads it

	watching sync.WaitGroup
	mu       sync.Mutex
	front    string    // the address of the Redis that counts
	over     time.Time // the fault's end
	logs     []*logPipe
	hearing  hearing

	last int64 // heartbeat of the dead one, unix ms by Redis' clock; for a fault that looks
}

// scaled makes a time of the real scale, with its TTL of 15 s, one of this.
func (w *world) scaled(d time.Duration) time.Duration {
	return time.Duration(float64(d) * float64(w.ttl) / float64(15*time.Second))
}

func (w *world) primary() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.front
}

// size is how many casts there will be.
func (w *world) size() int { return 1 + len(w.built) }

func (w *world) casts() []*cast { return append([]*cast{w.cast}, w.mutants...) }

// sleep lets the fault last: for a time that is its own, not for a condition.
func (w *world) sleep(d time.Duration) {
	select {
	case <-w.ctx.Done():
	case <-time.After(d):
	}
}

// ended notes the fault's end, from where the time to the right state counts,
// and forgets what was seen before it.
func (w *world) ended() {
	for _, c := range w.casts() {
		c.forget()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.over = time.Now()
}

// until polls fn.
func (w *world) until(what string, bound time.Duration, fn func() error) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for begun := time.Now(); ; <-tick.C {
		err := fn()
		if err == nil {
			return
		}
		if time.Since(begun) > bound {
			w.Fatalf("waiting %v until %s: %v", bound, what, err)
		}
	}
}

// setup starts everything and returns when all is well.
func (w *world) setup(f fault) {
	if f.stage != nil {
		f.stage(w)
	} else {
		w.srv = redistest.Start(w, f.redis...)
	}
	if w.rdb == nil {
		w.rdb = w.srv.Client(w)
	}
	w.front = w.srv.Addr
	w.cast = w.newCast("rollcall", w.rollcall, f)
	for name, path := range w.built {
		w.mutants = append(w.mutants, w.newCast(name, path, f))
	}
	if f.among > 0 {
		w.crowd(f.among)
	}
	for _, c := range w.casts() {
		w.until(c.namespace+" is ready", 30*time.Second+2*w.ttl, func() error {
			return c.right()
		})
	}
}

func (w *world) newCast(namespace, binary string, f fault) *cast {
	c := &cast{w: w, namespace: namespace, binary: binary, follow: f.follow}
	c.seen = sighting{expired: map[string]string{}, unserved: map[string]int{}, revived: map[string]int{}}
	c.even, c.odd = newRelay(w.play, w.srv.Addr), newRelay(w.play, w.srv.Addr)
	c.toReap, c.toSync = newRelay(w.play, w.srv.Addr), newRelay(w.play, w.srv.Addr)
	c.reap()
	w.until("the reaper has written the times", 10*time.Second, func() error {
		return w.rdb.HGet(w.ctx, c.key("config"), "ttl_ms").Err()
	})
	c.ha = haproxytest.Start(w, haproxytest.Options{
		Backends:  []haproxytest.Backend{{Name: "be", Balance: "roundrobin", Slots: max(w.slots, size+3), Check: !f.unchecked}},
		StateFile: true,
	})
	c.config = c.ha.ConfigSum(w)
	n := size
	if f.lone {
		n = 1
	}
	for range n {
		c.join()
	}
	if f.again {
		c.reap()
	}
	c.syncing = []string{"lbsync", "--socket", c.ha.Socket, "--backend", "web=be", "--allow", "127.0.0.0/8", "--state-file", filepath.Join(w.srv.Dir, namespace+".state"), "--state-dir", w.srv.Dir}
	c.balance()
	ctx, cancel := context.WithCancel(w.ctx)
	w.Cleanup(func() { cancel(); w.watching.Wait() })
	w.watching.Go(func() { c.watchRedis(ctx) })
	w.watching.Go(func() { c.watchHAProxy(ctx) })
	return c
}

// shiftable is a stage: a Redis with a clock that shift moves.
func shiftable(w *world) {
	w.srv = redistest.Start(w)
	w.srv.Kill(w)
	w.clock = filepath.Join(w.srv.Dir, "clock")
	if err := os.WriteFile(w.clock, make([]byte, 8), 0o600); err != nil {
		w.Fatal(err)
	}
	w.srv.Env = []string{"LD_PRELOAD=" + w.library, "CLOCK_SHIFT=" + w.clock}
	w.srv.Launch(w)
}

// buildClock compiles what makes a Redis' clock move.
func buildClock(dir string) (library string, err error) {
	source, library := filepath.Join(dir, "clock.c"), filepath.Join(dir, "clock.so")
	if err := os.WriteFile(source, clockSource, 0o600); err != nil {
		return "", err
	}
	if out, err := exec.Command("gcc", "-shared", "-fPIC", "-O1", "-o", library, source).CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the clock: %w\n%s", err, out)
	}
	return library, nil
}

// shift moves Redis' wall clock to d beside the machine's.
func (w *world) shift(d time.Duration) {
	f, err := os.OpenFile(w.clock, os.O_WRONLY, 0)
	if err == nil {
		b := binary.NativeEndian.AppendUint64(nil, uint64(d.Microseconds()))
		_, err = f.Write(b) // in place: it is mapped
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		w.Fatal(err)
	}
	now, err := w.rdb.Time(w.ctx).Result()
	if off := time.Until(now) - d; err != nil || off.Abs() > time.Second {
		w.Fatalf("redis' clock is %v beside where it was put: %v", off, err)
	}
}

// snapshot returns Redis' data as it is now.
func (w *world) snapshot() []byte {
	if err := w.rdb.Save(w.ctx).Err(); err != nil {
		w.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(w.srv.Dir, "dump.rdb"))
	if err != nil {
		w.Fatal(err)
	}
	return b
}

// restart kills Redis and starts it with this data; nil is none.
func (w *world) restart(data []byte) {
	w.srv.Kill(w)
	file := filepath.Join(w.srv.Dir, "dump.rdb")
	err := os.Remove(file)
	if data != nil {
		err = os.WriteFile(file, data, 0o600)
	} else if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	if err != nil {
		w.Fatal(err)
	}
	w.srv.Launch(w)
}

// config sets one of Redis' settings.
func (w *world) config(name, value string) {
	if err := w.rdb.ConfigSet(w.ctx, name, value).Err(); err != nil {
		w.Fatal(err)
	}
}

// stopped holds Redis for d.
func (w *world) stopped(d time.Duration) {
	w.srv.Signal(w, syscall.SIGSTOP)
	w.sleep(d)
	w.srv.Signal(w, syscall.SIGCONT)
}

// moved has everybody find another Redis.
func (w *world) moved(to string) {
	w.face(to)
	for _, c := range w.casts() {
		for _, r := range c.ways() {
			r.move(to)
		}
	}
}

// face says which Redis counts from now on.
func (w *world) face(addr string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.front = addr
}
