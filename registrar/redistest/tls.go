package redistest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// NameTLS is a host name that every certificate has.
const NameTLS = "registry.test"

// Certificates are files of a CA of its own, and of what it vouches for.
type Certificates struct {
	CA        string
	Cert, Key string // a client's
	server    string // of every server of this process, without .pem and .key
}

// NewCertificates writes certificates for every server of this process, and
// their clients.
func NewCertificates(tb testing.TB) Certificates {
	tb.Helper()
	dir := tb.TempDir()
	ca, caKey := certificate(tb, dir, "ca", nil, nil, nil)
	var ips []net.IP
	for i := range hosts {
		ips = append(ips, net.ParseIP(fmt.Sprintf("%s.%d", network(), i+1)))
	}
	certificate(tb, dir, "server", ips, ca, caKey)
	certificate(tb, dir, "client", nil, ca, caKey)
	in := func(name string) string { return filepath.Join(dir, name) }
	return Certificates{CA: in("ca.pem"), Cert: in("client.pem"), Key: in("client.key"), server: in("server")}
}

// Args are the settings of a server that takes TLS connections only, of clients
// with a certificate of this CA.
func (c Certificates) Args() []string {
	return []string{
		"--port", "0", "--tls-port", "6379", "--tls-auth-clients", "yes", "--tls-replication", "yes", "--tls-cluster", "yes",
		"--tls-ca-cert-file", c.CA, "--tls-cert-file", c.server + ".pem", "--tls-key-file", c.server + ".key",
	}
}

// certificate writes name.pem and name.key into dir: a CA of its own if parent
// is nil.
func certificate(tb testing.TB, dir, name string, ips []net.IP, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, IPAddresses: ips, DNSNames: []string{NameTLS},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, IsCA: parent == nil, KeyUsage: x509.KeyUsageDigitalSignature,
	}
	if parent == nil {
		c.KeyUsage |= x509.KeyUsageCertSign
		parent, parentKey = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, parentKey)
	if err != nil {
		tb.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		tb.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{"pem": {Type: "CERTIFICATE", Bytes: der}, "key": {Type: "EC PRIVATE KEY", Bytes: keyDER}} {
		if err := os.WriteFile(filepath.Join(dir, name+"."+file), pem.EncodeToMemory(block), 0o600); err != nil {
			tb.Fatal(err)
		}
	}
	made, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return made, key
}
