package httpapi

import "time"

// SetBodies sets how long a request's body may take. It must be called before
// Serve.
func SetBodies(s *Server, d time.Duration) { s.bodies = d }

// SetPatience sets how long a reader of s's streams may take nothing. It must be
// called before Serve.
func SetPatience(s *Server, d time.Duration) { s.patience = d }

// SetRest sets the least time between two reads of a service's overrides. It must be
// called before Serve.
func SetRest(s *Server, d time.Duration) { s.rest = d }
