package httpapi

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"rollcall/registrar"
)

var (
	errReadOnly = errors.New("this server is read-only; start it with --token-file to allow writes")
	errToken    = errors.New("want the header Authorization: Bearer TOKEN, with a token of --token-file")
	errGuesses  = errors.New("too many wrong tokens from this address; come again later")
	errJSON     = errors.New("want the header Content-Type: application/json")
)

// done is the answer to a write.
type done struct {
	Service   registrar.Service `json:"service"`
	Addr      string            `json:"addr"`
	Done      string            `json:"done"`
	Version   int64             `json:"version"`
	Present   bool              `json:"present"`
	Applied   *bool             `json:"applied,omitempty"` // by every live balancer; with ?wait
	Why       string            `json:"why,omitempty"`     // not applied
	Waits     string            `json:"waits,omitempty"`   // why a drain waits
	Balancers []Balancer        `json:"balancers,omitempty"`
}

func (s *Server) postWord(w http.ResponseWriter, r *http.Request) {
	s.write(w, r, r.PathValue("verb"), func(ctx context.Context, svc registrar.Service, addr netip.AddrPort, o order) (done, error) {
		version, present, err := s.store.SetAdmin(ctx, svc, addr, o.word)
		return done{Version: version, Present: present}, err
	})
}

func (s *Server) deleteInstance(w http.ResponseWriter, r *http.Request) {
	s.write(w, r, "deregister", func(ctx context.Context, svc registrar.Service, addr netip.AddrPort, o order) (done, error) {
		version, err := s.store.Deregister(ctx, svc, addr, o.force, o.word.By)
		return done{Version: version}, err
	})
}

// write does one operator's word, after every check, and waits for the balancers
// if that is asked for.
func (s *Server) write(w http.ResponseWriter, r *http.Request, verb string, do func(context.Context, registrar.Service, netip.AddrPort, order) (done, error)) {
	as, by, code, err := s.authorize(r)
	if err != nil {
		if code == http.StatusUnauthorized {
			w.Header().Set("WWW-Authenticate", "Bearer")
		}
		fail(w, code, err)
		return
	}
	svc, err := registrar.ParseService(r.PathValue("service"))
	if err != nil {
		fail(w, http.StatusBadRequest, err)
		return
	}
	if err := as.allows(svc); err != nil {
		fail(w, http.StatusForbidden, err)
		return
	}
	addr, err := registrar.ParseAddr(r.PathValue("addr"))
	if err != nil {
		fail(w, http.StatusBadRequest, err)
		return
	}
	patience, err := wait(r)
	if err != nil {
		fail(w, http.StatusBadRequest, err)
		return
	}
	rc := http.NewResponseController(w)
	if err := rc.SetWriteDeadline(time.Now().Add(s.bodies + registrar.Timeout + patience + writeTimeout)); err != nil {
		fail(w, http.StatusInternalServerError, err)
		return
	}
	o, code, err := s.order(w, r, verb)
	if err != nil {
		fail(w, code, err)
		return
	}
	o.word.By = by
	// The body has been read to its end; what follows may take longer.
	if err := rc.SetReadDeadline(time.Time{}); err != nil {
		fail(w, http.StatusInternalServerError, err)
		return
	}
	ctx, cancel := registrar.WithTimeout(r.Context())
	out, err := do(ctx, svc, addr, o)
	cancel()
	log := s.log.Info()
	if err != nil {
		log = s.log.Warn().Err(err)
	}
	log.Str("service", string(svc)).Stringer("addr", addr).Str("verb", verb).Str("reason", o.word.Reason).Str("who", "http "+r.RemoteAddr).Str("by", by).Bool("force", o.force).Msg("an operator's word")
	switch {
	case errors.Is(err, registrar.ErrAbsent) && verb == "deregister":
		fail(w, http.StatusNotFound, err)
		return
	case errors.Is(err, registrar.ErrAbsent) && o.word.Scope == registrar.ScopeRegistration:
		fail(w, http.StatusNotFound, fmt.Errorf("%w; scope registration is of the one that is there now, scope address of whoever comes", err))
		return
	case errors.Is(err, registrar.ErrAbsent):
		fail(w, http.StatusNotFound, fmt.Errorf("%w; ?absent=true says it for who is to come", err))
		return
	case errors.Is(err, registrar.ErrBeats):
		fail(w, http.StatusConflict, fmt.Errorf("%w; use maint to keep it out, or ?force=true to take it out until its next beat", err))
		return
	case errors.Is(err, registrar.ErrLast):
		fail(w, http.StatusConflict, fmt.Errorf("%w; start another first, or drain it, which waits for one, or ?force=true to take it out all the same", err))
		return
	case err != nil:
		fail(w, http.StatusServiceUnavailable, fmt.Errorf("whether it was done is unknown: %w", err))
		return
	}
	s.writes.Add(1)
	out.Service, out.Addr, out.Done = svc, addr.String(), verb
	code = http.StatusOK
	if patience > 0 {
		code = s.await(r.Context(), &out, patience)
	}
	if verb == "drain" && (out.Applied == nil || !*out.Applied) {
		ctx, cancel := registrar.WithTimeout(r.Context())
		out.Waits, err = s.store.DrainWaits(ctx, svc, addr)
		cancel()
		if err != nil {
			s.log.Warn().Err(err).Msg("cannot tell whether a drain waits for another instance")
		}
	}
	answer(w, code, encode(out))
}

// await waits until live balancers have applied it, and says who has: 200, or
// 202 if not all have in time.
func (s *Server) await(ctx context.Context, out *done, patience time.Duration) (code int) {
	tctx, cancel := context.WithTimeout(ctx, patience)
	_, err := s.store.WaitServed(tctx, out.Service, registrar.Wanted{Ready: -1, Version: out.Version})
	cancel()
	applied := err == nil
	out.Applied = &applied
	code = http.StatusOK
	if err != nil {
		code, out.Why = http.StatusAccepted, err.Error()
	}
	tctx, cancel = registrar.WithTimeout(ctx)
	defer cancel()
	acks, err := s.store.Acks(tctx, out.Service)
	if err != nil {
		return code // what was waited for is known
	}
	for _, b := range acks.Balancers {
		if b.Live {
			out.Balancers = append(out.Balancers, Balancer{Balancer: b.ID, Service: out.Service, Applied: b.Applied, Seen: b.Seen, Live: true, Behind: registrar.Lag(out.Version, b.Applied)})
		}
	}
	return code
}

// authorize returns the token that a write comes with, and by whom it is; or why it may
// not be done, and with what code.
func (s *Server) authorize(r *http.Request) (as token, by string, code int, err error) {
	if s.cfg.Tokens == nil {
		return as, "", http.StatusForbidden, errReadOnly
	}
	// A browser sends no Authorization by itself, so nobody can be tricked into
	// a write; that another site's page asks is refused all the same.
	if err := http.NewCrossOriginProtection().Check(r); err != nil {
		return as, "", http.StatusForbidden, err
	}
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return as, "", http.StatusForbidden, fmt.Errorf("remote address: %w", err)
	}
	tokens, err := s.cfg.Tokens()
	if err != nil {
		s.log.Error().Err(err).Msg("nobody can write")
		return as, "", http.StatusServiceUnavailable, errors.New("the server cannot read its tokens; its log says why")
	}
	given, bearer := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if as, ok := tokens.find(given); ok && bearer {
		return as, as.by(from.Addr()), 0, nil // whoever else is behind its address
	}
	if !s.refused.allows(from.Addr(), time.Now()) {
		return as, "", http.StatusTooManyRequests, errGuesses
	}
	s.refused.note(from.Addr(), time.Now())
	return as, "", http.StatusUnauthorized, errToken
}

// order is what a write says beside service and address.
type order struct {
	word  registrar.Word
	force bool
}

// body is what a write's body may have.
type body struct {
	Reason string          `json:"reason"`
	Weight json.RawMessage `json:"weight"` // a number, or null for the instance's own
	For    string          `json:"for"`    // a duration
	Scope  string          `json:"scope"`
}

// order reads the body and the query.
func (s *Server) order(w http.ResponseWriter, r *http.Request, verb string) (o order, code int, err error) {
	q := r.URL.Query()
	o.force = q.Get("force") == "true"
	if verb == "deregister" {
		if q.Has("for") || q.Has("scope") {
			return o, http.StatusBadRequest, errors.New("deregister: takes no for and no scope")
		}
		if _, err := io.Copy(io.Discard, http.MaxBytesReader(w, r.Body, maxBody)); err != nil {
			return o, http.StatusBadRequest, fmt.Errorf("body: %w", err)
		}
		return o, 0, nil
	}
	if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != "application/json" {
		return o, http.StatusUnsupportedMediaType, errJSON
	}
	var b body
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	dec.DisallowUnknownFields()
	err = dec.Decode(&b)
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		return o, http.StatusRequestEntityTooLarge, err
	case err != nil:
		return o, http.StatusBadRequest, fmt.Errorf("body: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return o, http.StatusBadRequest, errors.New("body: want one JSON object and nothing after it")
	}
	for name, field := range map[string]*string{"for": &b.For, "scope": &b.Scope} {
		if said := q.Get(name); said != "" && *field != "" && said != *field {
			return o, http.StatusBadRequest, fmt.Errorf("%s: the query says %q and the body %q; say it in one of them", name, clip(said), clip(*field))
		}
		*field = cmp.Or(*field, q.Get(name))
	}
	o.word = registrar.Word{Verb: verb, Reason: b.Reason, Force: o.force, Known: q.Get("absent") != "true", Scope: registrar.Scope(b.Scope)}
	return o, http.StatusBadRequest, o.check(b)
}

// check holds what each verb needs and may have, and sets what it parses.
func (o *order) check(b body) error {
	w := &o.word
	switch w.Verb {
	case "drain", "maint":
		if strings.TrimSpace(w.Reason) == "" {
			return fmt.Errorf("%s: say a reason, for whoever wonders", w.Verb)
		}
	case "ready", "weight":
		if w.Reason != "" {
			return fmt.Errorf("%s: takes no reason", w.Verb)
		}
	default:
		return fmt.Errorf("%q: want drain, maint, ready or weight", clip(w.Verb))
	}
	if w.Force && w.Verb != "maint" && w.Verb != "weight" {
		return fmt.Errorf("%s: takes no force", w.Verb)
	}
	if len(w.Reason) > registrar.MaxText || !utf8.ValidString(w.Reason) || strings.ContainsFunc(w.Reason, unicode.IsControl) {
		return fmt.Errorf("reason: want at most %d bytes, on one line", registrar.MaxText)
	}
	if (w.Verb == "weight") != (b.Weight != nil) {
		return errors.New("weight: goes with the verb weight, a number or null for the instance's own")
	}
	if b.Weight != nil && string(b.Weight) != "null" {
		n := 0
		if err := json.Unmarshal(b.Weight, &n); err != nil {
			return fmt.Errorf("weight: %w", err)
		}
		if err := registrar.CheckWeight(n); err != nil {
			return err
		}
		w.Weight = &n
	}
	switch w.Scope {
	case registrar.ScopeDefault, registrar.ScopeAddress, registrar.ScopeRegistration:
	default:
		return fmt.Errorf("scope %q: want %s or %s", clip(string(w.Scope)), registrar.ScopeAddress, registrar.ScopeRegistration)
	}
	if b.For == "" {
		return nil
	}
	d, err := time.ParseDuration(b.For)
	switch {
	case w.Verb == "ready" || w.Verb == "weight" && w.Weight == nil:
		return fmt.Errorf("for: %s ends an override, and lasts no time", w.Verb)
	case err != nil || d < time.Second || d > registrar.MaxFor:
		return fmt.Errorf("for %q: want a duration such as 2h, from %v to %v", clip(b.For), time.Second, registrar.MaxFor)
	}
	w.For = d
	return nil
}

// Of wrong tokens an address may send guesses at once, and one more each
// guessAgain.
const (
	guesses    = 10
	guessAgain = 10 * time.Second
	guessers   = 1000 // addresses that are remembered; all others share one
)

// refused bounds the rate of wrong tokens.
type refused struct {
	total atomic.Int64
	mu    sync.Mutex
	by    map[netip.Addr]*bucket // guarded by mu
}

// bucket is when an address' guesses are paid for.
type bucket struct{ paid time.Time }

func (r *refused) bucket(from netip.Addr, now time.Time) *bucket {
	from = from.Unmap()
	if from.Is6() { // whoever has one address of a /64 has all of them
		if p, err := from.Prefix(64); err == nil {
			from = p.Addr()
		}
	}
	if b := r.by[from]; b != nil {
		return b
	}
	if len(r.by) >= guessers {
		for a, b := range r.by {
			if b.paid.Before(now) {
				delete(r.by, a)
			}
		}
	}
	if len(r.by) >= guessers {
		from = netip.Addr{}
		if b := r.by[from]; b != nil {
			return b
		}
	}
	b := &bucket{}
	r.by[from] = b
	return b
}

func (r *refused) allows(from netip.Addr, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.bucket(from, now).paid.Sub(now) <= (guesses-1)*guessAgain
}

func (r *refused) note(from netip.Addr, now time.Time) {
	r.total.Add(1)
	r.mu.Lock()
	defer r.mu.Unlock()
	b := r.bucket(from, now)
	if b.paid.Before(now) {
		b.paid = now
	}
	b.paid = b.paid.Add(guessAgain)
}
