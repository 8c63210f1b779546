package redistest

import (
	"context"
	"encoding/binary"
	"net"
	"strings"
	"sync"
	"testing"
)

// DNS is a name server for tests. It speaks as much of the protocol (RFC 1035) as
// Go's resolver asks for: the IPv4 addresses of a name, by UDP.
type DNS struct {
	conn net.PacketConn

	mu    sync.Mutex
	names map[string][]string // guarded by mu
	fails bool                // guarded by mu
	asked int                 // guarded by mu
}

// StartDNS runs a name server that knows no name, until the test ends.
func StartDNS(tb testing.TB) *DNS {
	tb.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	d := &DNS{conn: conn, names: map[string][]string{}}
	var serving sync.WaitGroup
	serving.Go(d.serve)
	tb.Cleanup(func() {
		_ = conn.Close() // ends serve
		serving.Wait()
	})
	return d
}

// Resolver returns Go's resolver, which asks d.
func (d *DNS) Resolver() *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var dialer net.Dialer
		return dialer.DialContext(ctx, "udp", d.conn.LocalAddr().String())
	}}
}

// Point makes name have these addresses, and no others.
func (d *DNS) Point(name string, addrs ...string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.names[name] = addrs
}

// Fail makes each answer a failure of the server, or no longer.
func (d *DNS) Fail(yes bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fails = yes
}

// Asked returns how many questions there were so far.
func (d *DNS) Asked() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.asked
}

func (d *DNS) serve() {
	b := make([]byte, 1500)
	for {
		n, from, err := d.conn.ReadFrom(b)
		if err != nil {
			return // closed
		}
		if answer := d.answer(b[:n]); answer != nil {
			_, _ = d.conn.WriteTo(answer, from) // who does not hear it asks again
		}
	}
}

// answer makes an answer to a message with one question.
func (d *DNS) answer(q []byte) []byte {
	const header, typeA = 12, 1
	var labels []string
	at := header
	for at < len(q) && q[at] != 0 {
		end := at + 1 + int(q[at])
		if end >= len(q) {
			return nil
		}
		labels, at = append(labels, string(q[at+1:end])), end
	}
	at++ // the root label
	if at+4 > len(q) {
		return nil
	}
	kind := binary.BigEndian.Uint16(q[at:])
	d.mu.Lock()
	defer d.mu.Unlock()
	d.asked++
	addrs, known := d.names[strings.ToLower(strings.Join(labels, "."))]
	if kind != typeA {
		addrs = nil
	}
	code := uint16(0)
	switch {
	case d.fails:
		code, addrs = 2, nil // SERVFAIL
	case !known:
		code = 3 // NXDOMAIN
	}
	out := append([]byte{}, q[:2]...)
	out = binary.BigEndian.AppendUint16(out, 0x8180|code) // an answer; recursion was wanted, and done
	out = append(out, 0, 1, 0, byte(len(addrs)), 0, 0, 0, 0)
	out = append(out, q[header:at+4]...)
	for _, a := range addrs {
		out = append(out, 0xc0, header, 0, typeA, 0, 1, 0, 0, 0, 0, 0, 4) // the name is the question's; to be kept for 0 s
		out = append(out, net.ParseIP(a).To4()...)
	}
	return out
}
