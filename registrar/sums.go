package registrar

import (
	"cmp"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"
)

const (
	// sumEvery is how long a sum is gathered, and the window in which lines are counted.
	sumEvery = time.Minute
	// sumAbove is how many lines in one window are said singly: a person's pace, and
	// more than anybody reads in a minute. A line has 150 to 300 bytes, so a log that
	// stays just below has 1 MB an hour at most; above it, there are 60 lines an hour.
	sumAbove = 60
	// sumKinds is how many kinds one sum names; what the rest have is counted together.
	sumKinds = 20
)

// Sums bounds how much a process says of what happens often. Up to 60 lines in a
// minute are said singly; what goes beyond is counted by its kind, and the count is
// taken once a minute until a minute had few again. What was said singly and what the
// sums have is together all that happened. The zero value is ready, and any number of
// goroutines may use it.
type Sums struct {
	mu    sync.Mutex
	began time.Time      // of the window; guarded by mu, as all below
	lines int            // that the window would have
	busy  bool           // nothing is said singly
	since time.Time      // of the first that sum has
	sum   map[string]int // kind → how often, not said yet
}

// Sum is what happened in a time and was not said singly.
type Sum struct {
	Over  time.Duration
	Kinds map[string]int // how often each; empty = there is nothing to say
}

// May counts one line, about n things of a kind that happened, and tells whether to say
// it at info. If not, it is in the next Sum, and for debug only.
func (s *Sums) May(kind string, n int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if now.Sub(s.began) >= sumEvery && len(s.sum) == 0 {
		s.roll(now)
	}
	s.lines++
	s.busy = s.busy || s.lines > sumAbove
	if !s.busy {
		return true
	}
	if len(s.sum) == 0 {
		s.since, s.sum = now, map[string]int{}
	}
	s.sum[kind] += n
	return false
}

// roll begins a window. After one with many lines nothing is said singly at once.
func (s *Sums) roll(now time.Time) {
	s.busy = s.lines > sumAbove
	s.began, s.lines = now, 0
}

// Take returns the sum when it is to be said, and forgets it: at a window's end, or
// at once if this is the last time.
func (s *Sums) Take(last bool) Sum {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if len(s.sum) == 0 || !last && now.Sub(s.began) < sumEvery {
		return Sum{}
	}
	out := Sum{now.Sub(s.since), s.sum}
	s.sum = nil
	s.roll(now)
	return out
}

// Wait returns how long there is nothing to take, unless May says no meanwhile; an hour
// if nothing waits.
func (s *Sums) Wait() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.sum) == 0 {
		return time.Hour
	}
	return max(sumEvery-time.Since(s.began), 0)
}

// Total is how often anything happened.
func (s Sum) Total() int {
	n := 0
	for _, c := range s.Kinds {
		n += c
	}
	return n
}

// MarshalZerologObject writes how often each kind happened, the most frequent first.
func (s Sum) MarshalZerologObject(e *zerolog.Event) {
	kinds := slices.SortedFunc(maps.Keys(s.Kinds), func(a, b string) int {
		return cmp.Or(cmp.Compare(s.Kinds[b], s.Kinds[a]), cmp.Compare(a, b))
	})
	rest := 0
	for i, k := range kinds {
		if i < sumKinds {
			e.Int(k, s.Kinds[k])
		} else {
			rest += s.Kinds[k]
		}
	}
	if rest > 0 {
		e.Int("(others)", rest)
	}
}
