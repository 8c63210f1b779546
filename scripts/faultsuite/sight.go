package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// lookEvery is the pace of the watching: an instance that was taken out is away
// for about half a heartbeat at least, and the reapers' logs tell too.
const lookEvery = 40 * time.Millisecond

// lookTimeout bounds one look.
const lookTimeout = 500 * time.Millisecond

// sighting is what a cast's watchers have seen. The cast's mu guards it.
type sighting struct {
	expired  map[string]string // note in `gone` of somebody alive → address
	unserved map[string]int    // somebody alive was taken out of the rotation: address → times
	revived  map[string]int    // somebody dead was taken in: address → times
	known    bool              // Redis has answered the last question
	listed   []string          // in the registry
	pid      string            // of the HAProxy that answered last
	rotation map[string]bool   // address → HAProxy would send it a request
	admitted map[string]bool   // not in maint or drain at the last look
}

// watchRedis asks Redis itself, without a relay, until the play ends.
func (c *cast) watchRedis(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	var rdb *redis.Client
	addr := ""
	defer func() {
		if rdb != nil {
			_ = rdb.Close()
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if now := c.w.primary(); now != addr {
			if rdb != nil {
				_ = rdb.Close()
			}
			addr = now
			rdb = redis.NewClient(&redis.Options{Addr: addr, MaxRetries: -1, DisableIdentity: true, ReadTimeout: lookTimeout, DialTimeout: 200 * time.Millisecond, DialerRetries: 1})
		}
		var listed *redis.StringSliceCmd
		var gone *redis.MapStringStringCmd
		_, err := rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
			listed = p.ZRange(ctx, c.key("{web}:instances"), 0, -1)
			gone = p.HGetAll(ctx, c.key("{web}:gone"))
			return nil
		})
		fresh := map[string]string{}
		for a, note := range gone.Val() {
			if strings.HasPrefix(note, "expired ") && c.innocent(a) {
				fresh[note] = a
			}
		}
		c.mu.Lock()
		c.seen.known = err == nil
		if err == nil {
			c.seen.listed = slices.Sorted(slices.Values(listed.Val()))
			for note, a := range fresh {
				c.seen.expired[note] = a
			}
		}
		c.mu.Unlock()
	}
}

func (c *cast) key(rest string) string { return c.namespace + ":" + rest }

// watchHAProxy reads the servers' states until the play ends.
func (c *cast) watchHAProxy(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		text, err := ask(c.ha.Socket, "show info;show servers state be")
		if err != nil {
			c.mu.Lock()
			c.seen.rotation = nil
			c.mu.Unlock()
			continue
		}
		pid, rotation, admitted := parseServers(text)
		c.mu.Lock()
		if pid != c.seen.pid {
			c.seen.admitted = nil // another process begins anew, by nobody's fault
		}
		before := c.seen.admitted
		c.seen.pid, c.seen.rotation, c.seen.admitted = pid, rotation, admitted
		c.mu.Unlock()
		if before == nil {
			continue
		}
		for a := range before {
			if alive, _ := c.claimed(a); alive && !admitted[a] {
				c.mu.Lock()
				c.seen.unserved[a]++
				c.mu.Unlock()
			}
		}
		for a := range admitted {
			if _, dead := c.claimed(a); dead && !before[a] {
				c.mu.Lock()
				c.seen.revived[a]++
				c.mu.Unlock()
			}
		}
	}
}

// parseServers reads `show servers state`; the columns are in HAProxy's
// management guide, section 9.3.
func parseServers(text string) (pid string, rotation, admitted map[string]bool) {
	rotation, admitted = map[string]bool{}, map[string]bool{}
	for line := range strings.Lines(text) {
		if p, ok := strings.CutPrefix(line, "Pid: "); ok {
			pid = strings.TrimSpace(p)
		}
		f := strings.Fields(line)
		if len(f) < 19 || f[1] != "be" {
			continue
		}
		var state, admin, weight int
		if _, err := fmt.Sscan(f[5]+" "+f[6]+" "+f[7], &state, &admin, &weight); err != nil {
			continue
		}
		const maintOrDrain = 0x01 | 0x08
		if admin&maintOrDrain == 0 && f[18] != "1" {
			a := net.JoinHostPort(f[4], f[18])
			admitted[a] = true
			rotation[a] = state == 2 && weight > 0
		}
	}
	return pid, rotation, admitted
}

// ask sends one line to HAProxy's socket.
func ask(socket, line string) (string, error) {
	conn, err := net.DialTimeout("unix", socket, 200*time.Millisecond)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(lookTimeout)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(conn, line+"\n"); err != nil {
		return "", err
	}
	text, err := io.ReadAll(conn)
	return string(text), err
}

// right returns what is not as it must be: the registry lists who lives and
// nobody else, HAProxy serves them and nobody else, every reaper is armed.
func (c *cast) right() error {
	living := c.living()
	c.mu.Lock()
	known, listed, rotation := c.seen.known, c.seen.listed, c.seen.rotation
	c.mu.Unlock()
	switch {
	case !known:
		return fmt.Errorf("redis does not answer")
	case !slices.Equal(listed, living):
		return fmt.Errorf("the registry lists %v, alive are %v", listed, living)
	}
	var serving []string
	for a, up := range rotation {
		if up {
			serving = append(serving, a)
		}
	}
	slices.Sort(serving)
	if !slices.Equal(serving, living) {
		return fmt.Errorf("haproxy serves %v, alive are %v", serving, living)
	}
	if !c.armed() {
		return fmt.Errorf("a reaper is not armed")
	}
	return nil
}

// losses counts who was alive and was taken out: of the registry, by the
// greater of what the reapers say and what was seen, and of HAProxy; and who
// was dead and was taken into HAProxy.
func (c *cast) losses() (redis, haproxy, revived int) {
	said := 0
	for _, a := range c.taken() {
		if c.innocent(a) {
			said++
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, n := range c.seen.unserved {
		haproxy += n
	}
	for _, n := range c.seen.revived {
		revived += n
	}
	return max(said, len(c.seen.expired)), haproxy, revived
}
