package lbsync

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"rollcall/notifier"
	"rollcall/registrar"
	"rollcall/registrar/regular"
)

// lastGood is what lbsync keeps in a file for a start without Redis, and to
// know on a restart whether Redis' history is still the same.
type lastGood struct {
	Services map[registrar.Service]lastService `json:"services"`
}

// lastService is the last list of one service.
type lastService struct {
	Token     registrar.Token `json:"token"`
	ReadAt    time.Time       `json:"read_at"` // by this machine's clock
	Instances []lastInstance  `json:"instances"`
}

type lastInstance struct {
	Addr   netip.AddrPort `json:"addr"`
	Weight int            `json:"weight"`
	State  Admin          `json:"state"`
}

// loadLastGood reads the file; none is an empty one.
func loadLastGood(path string) (lastGood, error) {
	var l lastGood
	b, err := regular.Read(path)
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &l)
	}
	if err != nil {
		return lastGood{}, fmt.Errorf("read last lists: %w", err)
	}
	for svc, s := range l.Services {
		for _, i := range s.Instances {
			_, aerr := registrar.ParseAddr(i.Addr.String())
			if err := errors.Join(aerr, registrar.CheckWeight(i.Weight)); err != nil {
				return lastGood{}, fmt.Errorf("read last lists: %s of %s: %w", path, svc, err)
			}
		}
	}
	return l, nil
}

// save replaces the file whole, readable by its owner only: a crash leaves the
// old one or the new one.
func (l lastGood) save(path string) error {
	b, err := json.Marshal(l)
	if err != nil {
		return fmt.Errorf("write last lists: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".lbsync-*") // of mode 0600
	if err != nil {
		return fmt.Errorf("write last lists: %w", err)
	}
	defer os.Remove(f.Name()) // it is gone if all went well
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write last lists: %w", err)
	}
	return nil
}

// list is what of a view is worth keeping.
func list(v *notifier.View) []lastInstance {
	var is []lastInstance
	v.Each(func(e registrar.Entry) {
		if e.Present {
			is = append(is, lastInstance{e.Addr, e.Instance.Weight(), admin(e.Instance.State())})
		}
	})
	return is
}
