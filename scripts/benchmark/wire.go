package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// wire is a connection to Redis that does nothing but write prepared bytes and
// read answers: what is measured is Redis.
type wire struct {
	c net.Conn
	r *bufio.Reader
}

// dial connects from a loopback address of its own choice: one source address
// has too few ports for tens of thousands of connections.
func dial(h *harness, addr string) *wire {
	var c net.Conn
	var err error
	for range 3 { // a port picked at random may be in use
		from := net.IPv4(127, byte(10+rand.N(40)), byte(rand.N(256)), byte(1+rand.N(254)))
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: from}, Timeout: changeTimeout}
		if c, err = d.Dial("tcp", addr); err == nil {
			return &wire{c, bufio.NewReaderSize(c, 512)}
		}
	}
	h.Fatal(err)
	return nil
}

// encode renders a command as Redis reads it.
func encode(args []string) []byte {
	b := fmt.Appendf(nil, "*%d\r\n", len(args))
	for _, a := range args {
		b = fmt.Appendf(b, "$%d\r\n%s\r\n", len(a), a)
	}
	return b
}

// answer reads one answer and returns it: of a list the first part, or all if it
// begins with a number.
func (w *wire) answer() (string, error) {
	line, err := w.r.ReadString('\n')
	if err != nil {
		return "", err
	}
	line = strings.TrimSuffix(line, "\r\n")
	if line == "" {
		return "", errors.New("an empty answer")
	}
	kind, rest := line[0], line[1:]
	switch kind {
	case '+', ':':
		return rest, nil
	case '-':
		return "", errors.New(rest)
	}
	n, err := strconv.Atoi(rest)
	if err != nil {
		return "", err
	}
	switch {
	case kind == '$' && n < 0:
		return "", nil
	case kind == '$':
		b := make([]byte, n+2)
		_, err := io.ReadFull(w.r, b)
		return string(b[:max(n, 0)]), err
	case kind == '*':
		var all []string
		for range n {
			s, err := w.answer()
			if err != nil {
				return "", err
			}
			all = append(all, s)
		}
		if n > 0 && all[0] != "" && all[0][0] > '9' {
			all = all[:1]
		}
		return strings.Join(all, " "), nil
	}
	return "", fmt.Errorf("unknown answer %q", line)
}

// payload reads one message of a subscription.
func (w *wire) payload() (string, error) {
	if _, err := w.r.ReadString('\n'); err != nil { // of how many parts it is
		return "", err
	}
	var part string
	for range 3 {
		var err error
		if part, err = w.answer(); err != nil {
			return "", err
		}
	}
	return part, nil
}

// exchange sends commands over the connections, pipeline of them at a time on
// each, and fails unless every answer is want.
func exchange(h *harness, conns []*wire, commands [][]byte, pipeline int, want string) {
	const workers = 4
	var running sync.WaitGroup
	each := (len(commands) + workers - 1) / workers
	for i := range workers {
		mine := conns[i*len(conns)/workers : (i+1)*len(conns)/workers]
		todo := commands[min(i*each, len(commands)):min((i+1)*each, len(commands))]
		running.Go(func() {
			sent := make([]int, len(mine))
			for len(todo) > 0 {
				for j, w := range mine {
					n := min(pipeline, len(todo))
					sent[j] = n
					if n == 0 {
						continue
					}
					b := todo[0]
					if n > 1 {
						b = nil
						for _, c := range todo[:n] {
							b = append(b, c...)
						}
					}
					todo = todo[n:]
					if _, err := w.c.Write(b); err != nil {
						h.Fatal(err)
					}
				}
				for j, w := range mine {
					for range sent[j] {
						if got, err := w.answer(); err != nil || got != want {
							h.Fatalf("redis answered %q, %v; want %q", got, err, want)
						}
					}
				}
			}
		})
	}
	running.Wait()
}

// busy returns for how long Redis' main thread has run so far.
func busy(h *harness, rdb *redis.Client) time.Duration {
	ctx, cancel := context.WithTimeout(context.Background(), changeTimeout)
	defer cancel()
	text, err := rdb.Info(ctx, "cpu").Result()
	if err != nil {
		h.Fatal(err)
	}
	var sum float64
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		if name == "used_cpu_user_main_thread" || name == "used_cpu_sys_main_thread" {
			f, err := strconv.ParseFloat(value, 64)
			if err != nil {
				h.Fatal(err)
			}
			sum += f
		}
	}
	if sum == 0 {
		h.Fatal("redis does not tell what its main thread used; it is older than 7.0")
	}
	return time.Duration(sum * float64(time.Second))
}

// memory returns what Redis' data take, in bytes.
func memory(h *harness, rdb *redis.Client) float64 {
	ctx, cancel := context.WithTimeout(context.Background(), changeTimeout)
	defer cancel()
	text, err := rdb.Info(ctx, "memory").Result()
	if err != nil {
		h.Fatal(err)
	}
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(line, "used_memory_dataset:"); ok {
			f, err := strconv.ParseFloat(strings.TrimSpace(v), 64)
			if err != nil {
				h.Fatal(err)
			}
			return f
		}
	}
	h.Fatal("redis does not tell its memory")
	return 0
}
