package haproxy

import (
	"os"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// connections returns descriptors of our own, by inode, for this process' connections to
// unix sockets of these addresses. exceeded counts from here on. It takes 15 us with ten
// descriptors open.
func connections(names []string) map[uint64]int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil || len(names) == 0 {
		return nil
	}
	found := map[uint64]int{}
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || !connected(fd, names) {
			continue
		}
		own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			continue
		}
		// By now fd may be another's. What we have of it stays what it is.
		var st unix.Stat_t
		if !connected(own, names) || unix.Fstat(own, &st) != nil {
			closeFD(own)
			continue
		}
		if _, twice := found[st.Ino]; twice { // by a descriptor that we have of it already
			closeFD(own)
			continue
		}
		// The offset of peeking, which nobody does here, becomes less by what is read.
		if left, err := unix.GetsockoptInt(own, unix.SOL_SOCKET, unix.SO_PEEK_OFF); err == nil && left < 0 {
			_ = unix.SetsockoptInt(own, unix.SOL_SOCKET, unix.SO_PEEK_OFF, maxAnswer) // else exceeded is never true
		}
		found[st.Ino] = own
	}
	return found
}

func connected(fd int, names []string) bool {
	addr, err := unix.Getpeername(fd)
	if err != nil {
		return false
	}
	peer, ok := addr.(*unix.SockaddrUnix)
	return ok && slices.Contains(names, peer.Name)
}

// exceeded tells whether maxAnswer bytes have been read from the connection since it was
// found.
func exceeded(fd int) bool {
	left, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF)
	return err == nil && left == 0
}

// unread tells whether what was written to the connection is whole and the other side has
// yet to read it.
func unread(fd int) bool {
	n, err := unix.IoctlGetInt(fd, unix.SIOCOUTQ)
	return err == nil && n > 0 && writable(fd)
}

// shut lets reading from the connection end. The other side still reads what was written
// to it; if that has no room, writing ends too.
func shut(fd int) {
	how := unix.SHUT_RD
	if !writable(fd) {
		how = unix.SHUT_RDWR
	}
	_ = unix.Shutdown(fd, how) // fails only if it has ended
}

func writable(fd int) bool { return poll(fd, unix.POLLOUT)&unix.POLLOUT != 0 }

// hungUp tells whether the other side has closed the connection.
func hungUp(fd int) bool { return poll(fd, 0)&(unix.POLLHUP|unix.POLLERR|unix.POLLNVAL) != 0 }

// poll returns which of events, and which errors, there are now.
func poll(fd int, events int16) int16 {
	fds := []unix.PollFd{{Fd: int32(fd), Events: events}}
	_, _ = unix.Poll(fds, 0) // it does not wait, so nothing interrupts it
	return fds[0].Revents
}

func closeFD(fd int) { _ = unix.Close(fd) } // a socket's has no error
