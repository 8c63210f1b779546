package httpapi

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"rollcall/registrar"
)

var (
	errNoService = errors.New("no such service, or it has had no instance for 10 minutes")
	errBusy      = errors.New("too many ask for that already; come again later")
)

// headers says how old the answer is, and since when Redis is away if it is.
// The caller holds the picture's lock.
func (p *picture) headers(w http.ResponseWriter, read time.Time, now time.Time) {
	w.Header().Set("Age", strconv.Itoa(int(now.Sub(read).Seconds())))
	if p.failure != "" {
		w.Header().Set("Rollcall-Stale-Since", p.heard.UTC().Format(time.RFC3339))
	}
}

// wait reads ?wait.
func wait(r *http.Request) (time.Duration, error) {
	text := r.URL.Query().Get("wait")
	if text == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("wait %q: want a duration such as 30s, at most %v", clip(text), MaxWait)
	}
	return min(d, MaxWait), nil
}

// poll calls look at once and after each change until it says that it has an
// answer, ?wait is over, or the client or the server goes. It tells whether an
// answer is due; else it has been given.
func (s *Server) poll(w http.ResponseWriter, r *http.Request, look func() (differs bool)) bool {
	d, err := wait(r)
	if err != nil {
		fail(w, http.StatusBadRequest, err)
		return false
	}
	if d == 0 {
		return true
	}
	if !s.waits.take() {
		busy(w)
		return false
	}
	defer s.waits.free()
	if err := http.NewResponseController(w).SetWriteDeadline(time.Now().Add(d + writeTimeout)); err != nil {
		fail(w, http.StatusInternalServerError, err)
		return false
	}
	end := time.NewTimer(d)
	defer end.Stop()
	for {
		s.picture.mu.Lock()
		news, differs := s.picture.news, look()
		s.picture.mu.Unlock()
		if differs {
			return true
		}
		select {
		case <-news:
		case <-end.C:
			return true
		case <-r.Context().Done():
			return true
		}
	}
}

// busy answers who is one too many.
func busy(w http.ResponseWriter) {
	w.Header().Set("Retry-After", "5")
	fail(w, http.StatusServiceUnavailable, errBusy)
}

func (s *Server) getServices(w http.ResponseWriter, r *http.Request) {
	p, seen := s.picture, r.URL.Query().Get("version")
	if !s.poll(w, r, func() bool { return p.list() != seen }) {
		return
	}
	var body []byte
	err := p.read(func() {
		now := time.Now()
		p.headers(w, p.heard, now)
		out := struct {
			Token    string    `json:"token"` // for ?version
			Now      int64     `json:"now"`
			Redis    source    `json:"redis"`
			Services []Summary `json:"services"`
		}{p.list(), p.overview.Now, p.source(now), []Summary{}}
		for _, d := range p.documents() {
			out.Services = append(out.Services, d.summary)
		}
		body = encode(out)
	})
	if err != nil {
		fail(w, http.StatusServiceUnavailable, err)
		return
	}
	answer(w, http.StatusOK, body)
}

// list names the state of all services together. The caller holds mu.
func (p *picture) list() string {
	last := int64(0)
	for _, s := range p.services {
		last = max(last, s.doc.seq)
	}
	for _, seq := range p.removed {
		last = max(last, seq)
	}
	return p.id(last)
}

// getService answers with one service, or waits until its version is another
// than ?version, a number or a token. Only a token tells histories apart.
func (s *Server) getService(w http.ResponseWriter, r *http.Request) {
	name, err := registrar.ParseService(r.PathValue("service"))
	if err != nil {
		fail(w, http.StatusBadRequest, err)
		return
	}
	p, seen := s.picture, r.URL.Query().Get("version")
	known := func() *document {
		if of := p.services[name]; of != nil {
			return of.doc
		}
		return nil
	}
	differs := func() bool {
		d := known()
		switch {
		case !p.ready:
			return false
		case d == nil:
			return seen == ""
		default:
			return seen != d.Token && seen != strconv.FormatInt(d.Version, 10)
		}
	}
	if !s.poll(w, r, differs) {
		return
	}
	var d *document
	err = p.read(func() {
		if d = known(); d != nil {
			p.headers(w, p.services[name].whole, time.Now())
		}
	})
	switch {
	case err != nil:
		fail(w, http.StatusServiceUnavailable, err)
	case d == nil:
		fail(w, http.StatusNotFound, errNoService)
	default:
		answer(w, http.StatusOK, append([]byte(nil), d.json()...))
	}
}

func (s *Server) getBalancers(w http.ResponseWriter, _ *http.Request) {
	p := s.picture
	var body []byte
	err := p.read(func() {
		now := time.Now()
		p.headers(w, p.heard, now)
		out := struct {
			Now       int64      `json:"now"`
			Redis     source     `json:"redis"`
			Balancers []Balancer `json:"balancers"`
		}{p.overview.Now, p.source(now), []Balancer{}}
		for _, d := range p.documents() {
			out.Balancers = append(out.Balancers, d.Balancers...)
		}
		body = encode(out)
	})
	if err != nil {
		fail(w, http.StatusServiceUnavailable, err)
		return
	}
	answer(w, http.StatusOK, body)
}

// getStatus answers 200 if the dead are taken out, and 503 with the same
// document if not, or if nobody knows.
func (s *Server) getStatus(w http.ResponseWriter, _ *http.Request) {
	p := s.picture
	var status Status
	away := false
	err := p.read(func() {
		p.headers(w, p.heard, time.Now())
		status, away = p.status, p.failure != ""
	})
	switch {
	case err != nil:
		fail(w, http.StatusServiceUnavailable, err)
	case !status.Healthy || away:
		answer(w, http.StatusServiceUnavailable, encode(status))
	default:
		answer(w, http.StatusOK, encode(status))
	}
}

func (s *Server) getHistory(w http.ResponseWriter, _ *http.Request) {
	p := s.picture
	var body []byte
	err := p.read(func() {
		p.headers(w, p.heard, time.Now())
		out := struct {
			Now      int64                         `json:"now"`
			Services map[registrar.Service][]point `json:"services"`
		}{p.overview.Now, map[registrar.Service][]point{}}
		for name, of := range p.services {
			out.Services[name] = of.history
		}
		body = encode(out)
	})
	if err != nil {
		fail(w, http.StatusServiceUnavailable, err)
		return
	}
	answer(w, http.StatusOK, body)
}

// Of events an answer has defaultEvents, or ?limit up to maxEvents.
const (
	defaultEvents = 100
	maxEvents     = 1000
)

// getEvents answers with the last events, of ?service or all, after the id
// ?since if it is given, the oldest first. What is not in memory any more is read
// from Redis, for maxReads at a time.
func (s *Server) getEvents(w http.ResponseWriter, r *http.Request) {
	only, err := services(r)
	since, limit := r.URL.Query().Get("since"), defaultEvents
	if text := r.URL.Query().Get("limit"); err == nil && text != "" {
		if limit, err = strconv.Atoi(text); err != nil || limit < 1 || limit > maxEvents {
			err = fmt.Errorf("limit %q: want 1 to %d", clip(text), maxEvents)
		}
	}
	if err == nil && since != "" {
		err = registrar.CheckEventID(since)
	}
	if err != nil {
		fail(w, http.StatusBadRequest, err)
		return
	}
	p := s.picture
	var events []registrar.Event
	whole := false
	err = p.read(func() {
		p.headers(w, p.heard, time.Now())
		events = p.after(0, only)
		i := slices.IndexFunc(events, func(e registrar.Event) bool { return e.ID == since })
		events = events[i+1:]
		switch {
		case since != "":
			whole = i >= 0
		default: // fewer than are kept are all that there are
			whole = len(events) >= limit || p.logged && len(p.events) < eventsKept
		}
	})
	if err == nil && !whole {
		if !s.reads.take() {
			busy(w)
			return
		}
		defer s.reads.free()
		ctx, cancel := registrar.WithTimeout(r.Context())
		events, err = s.store.Events(ctx, slices.Collect(maps.Keys(only)), since, limit)
		cancel()
	}
	if err != nil {
		fail(w, http.StatusServiceUnavailable, err)
		return
	}
	answer(w, http.StatusOK, encode(map[string]any{"events": append([]registrar.Event{}, events[max(0, len(events)-limit):]...)}))
}

var notInLabel = regexp.MustCompile(`[^a-zA-Z0-9_]`)

// targets is one entry of Prometheus' http_sd; see its documentation of
// http_sd_config.
type targets struct {
	Targets []string          `json:"targets"`
	Labels  map[string]string `json:"labels"`
}

// getTargets lists all instances, of ?service or all, for Prometheus. An
// instance that is absent without a word is still a target while it is kept.
func (s *Server) getTargets(w http.ResponseWriter, r *http.Request) {
	only, err := services(r)
	if err != nil {
		fail(w, http.StatusBadRequest, err)
		return
	}
	p := s.picture
	out := []targets{}
	err = p.read(func() {
		p.headers(w, p.heard, time.Now())
		for _, d := range p.documents() {
			name := d.Service.Service
			if len(only) > 0 && !only[name] {
				continue
			}
			for _, i := range d.Instances {
				if i.State == stateGarbage || i.State == stateGone {
					continue
				}
				labels := map[string]string{
					"__meta_rollcall_service": string(name),
					"__meta_rollcall_state":   i.State,
					"__meta_rollcall_weight":  strconv.Itoa(i.Weight),
					"__meta_rollcall_zone":    i.Zone,
				}
				for k, v := range i.Tags {
					labels["__meta_rollcall_tag_"+notInLabel.ReplaceAllString(k, "_")] = v
				}
				out = append(out, targets{[]string{i.Addr}, labels})
			}
		}
	})
	if err != nil {
		fail(w, http.StatusServiceUnavailable, err)
		return
	}
	answer(w, http.StatusOK, encode(out))
}

// services reads ?service, which may be there more than once; none = all.
func services(r *http.Request) (map[registrar.Service]bool, error) {
	only := map[registrar.Service]bool{}
	for _, text := range r.URL.Query()["service"] {
		for name := range strings.SplitSeq(text, ",") {
			svc, err := registrar.ParseService(name)
			if err != nil {
				return nil, err
			}
			only[svc] = true
		}
	}
	return only, nil
}
