package main

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"sync"
	"testing"
)

// play is one fault's owner of servers and failures. It stands in for a test,
// so that the helpers that start servers for tests can start them here: a Fatal
// ends the fault's goroutine, not the program.
type play struct {
	testing.TB
	name   string
	ctx    context.Context
	cancel context.CancelFunc

	mu      sync.Mutex
	cleanup []func()
	wrong   []string // what failed
}

func newPlay(name string) *play {
	p := &play{name: name}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	return p
}

func (p *play) Helper()                   {}
func (p *play) Name() string              { return p.name }
func (p *play) Context() context.Context  { return p.ctx }
func (p *play) Error(a ...any)            { p.note(fmt.Sprint(a...)) }
func (p *play) Errorf(f string, a ...any) { p.note(fmt.Sprintf(f, a...)) }
func (p *play) Fatal(a ...any)            { p.note(fmt.Sprint(a...)); runtime.Goexit() }
func (p *play) Fatalf(f string, a ...any) { p.note(fmt.Sprintf(f, a...)); runtime.Goexit() }
func (p *play) Skip(a ...any)             { p.Fatal(a...) } // a missing server is no reason to pass
func (p *play) Skipf(f string, a ...any)  { p.Fatalf(f, a...) }
func (p *play) Log(a ...any)              { fmt.Fprintln(os.Stderr, append([]any{p.name + ":"}, a...)...) }
func (p *play) Logf(f string, a ...any)   { p.Log(fmt.Sprintf(f, a...)) }

func (p *play) Cleanup(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cleanup = append(p.cleanup, f)
}

func (p *play) note(what string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wrong = append(p.wrong, what)
}

// failures returns what has failed so far.
func (p *play) failures() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.wrong...)
}

// Failed tells whether something has failed.
func (p *play) Failed() bool { return len(p.failures()) > 0 }

// do runs f to its end, or to its first Fatal.
func (p *play) do(f func()) {
	var done sync.WaitGroup
	done.Go(f)
	done.Wait()
}

// close ends what the fault started, last first.
func (p *play) close() {
	p.cancel()
	for {
		p.mu.Lock()
		n := len(p.cleanup)
		if n == 0 {
			p.mu.Unlock()
			return
		}
		f := p.cleanup[n-1]
		p.cleanup = p.cleanup[:n-1]
		p.mu.Unlock()
		p.do(f)
	}
}
