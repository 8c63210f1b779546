package registrar

import (
	"testing"
	"time"
)

// span calls f often and returns the least and the greatest of its answers.
func span(f func() time.Duration) (least, greatest time.Duration) {
	least = f()
	greatest = least
	for range 20_000 {
		d := f()
		least, greatest = min(least, d), max(greatest, d)
	}
	return least, greatest
}

func TestBackoff(t *testing.T) {
	for _, c := range []struct {
		failures int
		limit    time.Duration
		ceiling  time.Duration
	}{
		{0, 5 * time.Second, 100 * time.Millisecond},
		{1, 5 * time.Second, 100 * time.Millisecond},
		{2, 5 * time.Second, 200 * time.Millisecond},
		{3, 5 * time.Second, 400 * time.Millisecond},
		{6, 5 * time.Second, 3200 * time.Millisecond},
		{7, 5 * time.Second, 5 * time.Second},
		{8, 5 * time.Second, 5 * time.Second},
		{1_000_000, 5 * time.Second, 5 * time.Second},
		{3, 300 * time.Millisecond, 300 * time.Millisecond},
		{9, 10 * time.Millisecond, 100 * time.Millisecond},
		{9, 0, 100 * time.Millisecond},
	} {
		least, greatest := span(func() time.Duration { return Backoff(c.failures, c.limit) })
		if least <= 0 || least > c.ceiling/50 || greatest > c.ceiling || greatest < c.ceiling*49/50 {
			t.Errorf("%d failures, limit %v: from %v to %v, want all of 0 to %v", c.failures, c.limit, least, greatest, c.ceiling)
		}
	}
}

func TestShorten(t *testing.T) {
	const d = 5 * time.Second
	least, greatest := span(func() time.Duration { return Shorten(d) })
	if least < 4*time.Second || greatest > d || least > 4010*time.Millisecond || greatest < 4990*time.Millisecond {
		t.Errorf("from %v to %v, want all of 4s to 5s", least, greatest)
	}
	for d := range 10 * time.Nanosecond {
		if got := Shorten(d); got > d || got < d*4/5 {
			t.Errorf("%v became %v", d, got)
		}
	}
}
