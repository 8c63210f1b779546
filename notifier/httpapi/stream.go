package httpapi

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"time"
)

const (
	// streamBeat is how often a stream says something, whatever happens: a
	// reader who hears nothing for longer is cut off.
	streamBeat = 5 * time.Second
	// streamRest is the least time between two pieces, and streamByte what each
	// byte of one adds, so one reader gets 1 MB/s at most.
	streamRest = 50 * time.Millisecond
	streamByte = time.Microsecond
)

// getStream sends what changes as server-sent events. A reader that comes back
// with Last-Event-ID gets what it missed, or all of it after a reset. There is
// no queue: a slow reader gets fewer and later states, and one that takes
// nothing for 10 s is dropped, and comes back.
func (s *Server) getStream(w http.ResponseWriter, r *http.Request) {
	only, err := services(r)
	if err != nil {
		fail(w, http.StatusBadRequest, err)
		return
	}
	if !s.streams.take() {
		w.Header().Set("Retry-After", "5")
		fail(w, http.StatusServiceUnavailable, errBusy)
		return
	}
	defer s.streams.free()
	h := w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Accel-Buffering", "no")

	p := s.picture
	p.mu.Lock()
	seen := p.place(r.Header.Get("Last-Event-ID"))
	p.mu.Unlock()
	about := s.about()
	rc := http.NewResponseController(w)
	send := func(text []byte) bool {
		end := time.Now().Add(s.patience)
		err := rc.SetWriteDeadline(end)
		if err == nil {
			_, err = w.Write(text)
		}
		if err == nil {
			err = rc.Flush()
		}
		// Over HTTP/2 the deadline closes the stream, which is all that a write says.
		if errors.Is(err, os.ErrDeadlineExceeded) || err != nil && !time.Now().Before(end) {
			s.dropped.Add(1)
		}
		return err == nil
	}
	if !send([]byte("retry: 2000\n\n")) {
		return
	}
	beat := time.NewTicker(streamBeat)
	defer beat.Stop()
	for {
		msgs, seq, news, wait := p.since(seen, only, about, time.Now())
		more := make(<-chan time.Time) // nothing waits
		if wait > 0 {
			more = time.After(wait)
		}
		text := p.spell(msgs, seq)
		if len(text) > 0 && !send(text) {
			return
		}
		seen = seq
		rest := time.NewTimer(streamRest + time.Duration(len(text))*streamByte)
		select {
		case <-r.Context().Done():
			rest.Stop()
			return
		case <-rest.C:
		}
	waiting:
		for {
			select {
			case <-r.Context().Done():
				return
			case <-news:
				break waiting
			case <-more:
				break waiting
			case <-beat.C:
				if !send(p.spell(p.pulse(about, time.Now()), seen)) {
					return
				}
			}
		}
	}
}

// spell writes messages in the wire form of server-sent events (WHATWG HTML,
// 9.2.5). The last has the id, so who is cut off before it gets all again.
func (p *picture) spell(msgs []message, seq int64) []byte {
	var text []byte
	for i, m := range msgs {
		if i == len(msgs)-1 {
			text = fmt.Appendf(text, "id: %s\n", p.id(seq))
		}
		text = fmt.Appendf(text, "event: %s\ndata: %s\n\n", m.event, m.data())
	}
	return text
}

func (s *Server) about() meta {
	return meta{Namespace: s.cfg.Namespace, Version: s.cfg.Version, Writes: s.cfg.Tokens != nil}
}
