package httpapi

import "time"

// SetPatience sets how long a reader of s's streams may take nothing. It must be
// called before Serve.
func SetPatience(s *Server, d time.Duration) { s.patience = d }
