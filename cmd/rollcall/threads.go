package main

import (
	"runtime"
	"sync"
)

// spareThreads is how many threads a daemon keeps in reserve. Go makes one when all
// that it has wait in system calls, and ends the whole process if it gets none: where
// a limit on processes is reached, a sidecar would die for want of a thread, and with
// it a healthy instance. Its own need is 5 to 9, by what it does at a time. One that is
// idle takes 20 to 30 kB.
const spareThreads = 8

// reserveThreads makes the spare threads, which the runtime keeps.
func reserveThreads() {
	var made, ended sync.WaitGroup
	enough := make(chan struct{})
	for range spareThreads {
		made.Add(1)
		ended.Go(func() {
			runtime.LockOSThread() // each of these needs one of its own
			defer runtime.UnlockOSThread()
			made.Done()
			<-enough
		})
	}
	made.Wait()
	close(enough)
	ended.Wait()
}
