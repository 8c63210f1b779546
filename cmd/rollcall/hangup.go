package main

import (
	"errors"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/urfave/cli/v2"
)

// hangups has the process survive SIGHUP until what it returns is called. All
// files are read again by themselves, at every new connection; a SIGHUP reads
// them now, so that who has changed one hears whether it can be read. more reads
// what is not of --redis.
func (s *session) hangups(c *cli.Context, more ...func() error) (stop func()) {
	heard, end := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(heard, syscall.SIGHUP)
	var listening sync.WaitGroup
	listening.Go(func() {
		for {
			select {
			case <-end:
				return
			case <-heard:
			}
			errs := []error{readable(c, "redis")}
			for _, read := range more {
				errs = append(errs, read())
			}
			if err := errors.Join(errs...); err != nil {
				s.log.Error().Err(err).Msg("SIGHUP: a file cannot be read; open connections stay, new ones need it")
				continue
			}
			s.log.Info().Msg("SIGHUP: files read again; new connections use them")
		}
	})
	return func() {
		close(end)
		listening.Wait()
		signal.Stop(heard)
	}
}

// readable reads the files that go with the URL of a flag.
func readable(c *cli.Context, flag string) error {
	rdb, err := open(c, flag, 1, nil)
	if err != nil {
		return err
	}
	return rdb.Close() // it was never used
}
