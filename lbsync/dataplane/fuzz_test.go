package dataplane

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"testing"

	"github.com/rs/zerolog"

	"rollcall/lbsync"
)

// answers is a transport that answers with these bodies in turn, and then with
// the last again.
type answers struct {
	status int
	bodies [][]byte
}

func (a *answers) RoundTrip(*http.Request) (*http.Response, error) {
	body := a.bodies[0]
	if len(a.bodies) > 1 {
		a.bodies = a.bodies[1:]
	}
	return &http.Response{
		StatusCode: a.status, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(bytes.NewReader(body)), ProtoMajor: 1, ProtoMinor: 1,
	}, nil
}

// FuzzAnswers has the API answer anything. It must be an error, or servers and a
// process that a HAProxy can have.
func FuzzAnswers(f *testing.F) {
	const (
		info  = `{"info":{"pid":7,"uptime":3,"cum_conns":1,"stopping":0,"version":"2.6"}}`
		list  = `[{"id":"1","name":"s1","address":"10.0.0.1","port":80,"weight":100,"admin_state":"ready","fqdn":"slot.invalid"}]`
		stats = `{"stats":[{"name":"s1","stats":{"sid":1,"scur":0,"status":"UP","chkfail":0,"check_status":"L4OK"}}]}`
	)
	for _, s := range [][2]string{{info, info}, {list, stats}, {list, `{"stats":[null]}`}, {list, `{"stats":[{"name":"s1"}]}`}, {`[null]`, stats}, {`[]`, `{}`},
		{`null`, `null`}, {`{"code":404,"message":"x"}`, `{`}, {`{"info":null}`, ``}, {`{"api":{"version":"v3.3.1"}}`, `{"api":null}`}} {
		f.Add(200, []byte(s[0]), []byte(s[1]))
		f.Add(404, []byte(s[0]), []byte(s[1]))
	}
	f.Fuzz(func(t *testing.T, status int, first, second []byte) {
		client := func() *Client {
			c, err := New(Config{URL: "http://127.0.0.1:1"}, zerolog.Nop())
			if err != nil {
				t.Fatal(err)
			}
			c.http = &http.Client{Transport: &answers{status, [][]byte{first, second}}}
			return c
		}
		ctx := context.Background()
		if p, err := client().process(ctx); err == nil && p.Version == "" {
			t.Fatalf("process %+v", p)
		}
		servers, err := client().readOnce(ctx, "be")
		for _, s := range servers {
			if err != nil || s.ID < 1 || s.Weight < 0 || s.Weight > 256 || s.Admin == lbsync.Maint && s.Up {
				t.Fatalf("%+v, %v", s, err)
			}
		}
		_, _ = client().stat(ctx, "be", "s1")
		_ = client().support(ctx) // whatever it says, it must not panic
	})
}
