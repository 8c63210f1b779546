//go:build !sidecar

package main

import (
	"crypto/tls"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"github.com/rs/zerolog"
	"github.com/urfave/cli/v2"

	"rollcall/registrar/regular"
)

// keyPair is a certificate and its key, in files that are looked at again at each
// handshake: who renews a certificate restarts nothing. A pair that is broken, as it is
// for a moment while it is being replaced, does not take the place of the last good one.
type keyPair struct {
	cert, key string // paths
	log       zerolog.Logger

	mu   sync.Mutex // guards the rest
	last *tls.Certificate
	seen [2]stamp // of the files that were read last, whether or not they were good
	bad  bool     // that is said
}

// stamp tells one state of a file from another without reading it.
type stamp struct {
	info fs.FileInfo // nil = it cannot be seen
}

func stampOf(path string) stamp {
	info, err := os.Stat(path)
	if err != nil {
		return stamp{}
	}
	return stamp{info}
}

func (s stamp) same(o stamp) bool {
	if s.info == nil || o.info == nil {
		return s.info == o.info
	}
	return os.SameFile(s.info, o.info) && s.info.ModTime().Equal(o.info.ModTime()) && s.info.Size() == o.info.Size()
}

// newKeyPair reads the files of --tls-cert and --tls-key; nil if neither is named.
func newKeyPair(c *cli.Context, log zerolog.Logger) (*keyPair, error) {
	k := &keyPair{cert: c.String("tls-cert"), key: c.String("tls-key"), log: log}
	switch {
	case k.cert == "" && k.key == "":
		return nil, nil
	case k.cert == "" || k.key == "":
		return nil, usage("--tls-cert and --tls-key go together")
	}
	k.seen = [2]stamp{stampOf(k.cert), stampOf(k.key)}
	var err error
	if k.last, err = k.read(); err != nil {
		return nil, usageError{err}
	}
	return k, nil
}

// read reads the pair. Its errors name the flags and the files.
func (k *keyPair) read() (*tls.Certificate, error) {
	cert, err := regular.Read(k.cert)
	if err != nil {
		return nil, fmt.Errorf("--tls-cert: %w", err)
	}
	key, err := regular.Read(k.key)
	if err != nil {
		return nil, fmt.Errorf("--tls-key: %w", err)
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("--tls-cert %s, --tls-key %s: %w", k.cert, k.key, err)
	}
	return &pair, nil
}

// check tells whether the files can be used now.
func (k *keyPair) check() error {
	if k == nil {
		return nil
	}
	_, err := k.read()
	return err
}

// config is what a server takes.
func (k *keyPair) config() *tls.Config {
	if k == nil {
		return nil
	}
	return &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: k.get}
}

// get returns the pair for a handshake. It does no more than look at the files unless
// one of them is another than the last time.
func (k *keyPair) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	pair, renewed, err := k.current()
	if err != nil {
		k.log.Warn().Err(err).Msg("the new certificate cannot be used; going on with the one before")
	}
	if renewed {
		k.log.Info().Time("ends", pair.Leaf.NotAfter).Msg("using a new certificate")
	}
	return pair, nil
}

// current returns the last good pair, whether it is a new one, and, once, why the newest
// is not good.
func (k *keyPair) current() (pair *tls.Certificate, renewed bool, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	// Looked at before it is read: what is written meanwhile differs at the next handshake.
	now := [2]stamp{stampOf(k.cert), stampOf(k.key)}
	if now[0].same(k.seen[0]) && now[1].same(k.seen[1]) {
		return k.last, false, nil
	}
	k.seen = now
	if pair, err = k.read(); err != nil {
		if k.bad {
			err = nil
		}
		k.bad = true
		return k.last, false, err
	}
	k.last, k.bad = pair, false
	return pair, true, nil
}
