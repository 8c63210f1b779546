package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"
)

// traffic is POSTs and GETs on kept connections until stop.
type traffic struct {
	stop func()

	mu           sync.Mutex
	sent, failed int
	why          map[string]int
}

func startTraffic(p *play, addr string) *traffic {
	t := &traffic{why: map[string]int{}}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for n := range 4 {
		running.Go(func() {
			c := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{}}
			defer c.CloseIdleConnections()
			pace := time.NewTicker(10 * time.Millisecond)
			defer pace.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-pace.C:
				}
				err := request(c, "http://"+addr+"/", n%2 == 0)
				t.mu.Lock()
				t.sent++
				if err != nil {
					t.failed++
					t.why[err.Error()]++
				}
				t.mu.Unlock()
			}
		})
	}
	t.stop = sync.OnceFunc(func() { cancel(); running.Wait() })
	p.Cleanup(t.stop)
	return t
}

func (t *traffic) count() (sent, failed int, why string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.sent, t.failed, fmt.Sprint(t.why)
}

// request posts a body that cannot be sent twice, so that nothing retries it
// silently, or gets.
func request(c *http.Client, url string, post bool) error {
	var r *http.Response
	var err error
	if post {
		r, err = c.Post(url, "text/plain", io.MultiReader(strings.NewReader("body")))
	} else {
		r, err = c.Get(url)
	}
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, r.Body)
	_ = r.Body.Close()
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d", r.StatusCode)
	}
	return err
}
