//go:build !sidecar

package main

import (
	"bytes"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"rollcall/lbsync"
	"rollcall/registrar"
)

const (
	viewPeriod  = 250 * time.Millisecond
	plainPeriod = time.Second      // between two lines of counts when not on a terminal
	heldPeriod  = 10 * time.Second // and while nothing happens by itself
	ratePeriod  = time.Second
)

// Terminal control, ECMA-48 and DEC private modes.
const (
	eraseBelow = "\x1b[J"
	eraseRight = "\x1b[K"
	wrapOff    = "\x1b[?7l"
	wrapOn     = "\x1b[?7h"
	cursorOff  = "\x1b[?25l"
	cursorOn   = "\x1b[?25h"
	styleBold  = "\x1b[1m"
	styleGood  = "\x1b[32m"
	styleBad   = "\x1b[31m"
	styleFaint = "\x1b[2m"
	styleNone  = "\x1b[0m"
)

// demoRow is one instance in the live view.
type demoRow struct {
	name string
	addr netip.AddrPort
	pids string // of the service and of its sidecar

	state string        // in the registry
	beat  time.Duration // since the last heartbeat, or -1

	there  bool // HAProxy has a server for it
	server lbsync.Server
}

// demoScene is what the live view shows.
type demoScene struct {
	at        time.Time
	instances []demoRow
	served    map[netip.AddrPort]int
	total     demoCounts
	registry  bool // has answered
	balancer  bool // has answered
	pid       int  // HAProxy's
}

// enter adds what the register says, also of instances that others started:
// those have the names that they answer with.
func (s *demoScene) enter(snap registrar.Snapshot, name func(netip.AddrPort) string) {
	for n := range s.instances {
		s.instances[n].state, s.instances[n].beat = "-", -1
	}
	for _, e := range snap.Entries {
		n := slices.IndexFunc(s.instances, func(r demoRow) bool { return r.addr == e.Addr })
		if n < 0 && e.Present {
			n = len(s.instances)
			s.instances = append(s.instances, demoRow{name: dash(name(e.Addr)), addr: e.Addr, pids: "- -", beat: -1})
		}
		switch {
		case e.Garbage != "":
		case e.Present:
			s.instances[n].state = stateWord(e.Instance)
			s.instances[n].beat = time.Duration(max(0, snap.Now-e.Instance.Beat)) * time.Millisecond
		case n >= 0 && e.Gone != nil:
			s.instances[n].state = string(e.Gone.Reason)
		}
	}
}

// demoView prints the story: on a terminal with a table below it that is drawn
// again and again, else as plain lines. Its methods may be called concurrently.
type demoView struct {
	w      io.Writer
	unread func() // hears that nobody reads any more; may be called again
	tty    bool
	color  bool
	begin  time.Time

	mu      sync.Mutex // guards what follows
	block   []string   // the lines of the table
	drawn   int        // how many of them are on the screen
	past    []demoScene
	counted time.Time // the last plain line of counts
	holding bool
}

func newDemoView(w io.Writer, unread func()) *demoView {
	v := &demoView{w: w, unread: unread, begin: time.Now()}
	if f := fileUnder(w); f != nil && os.Getenv("TERM") != "dumb" {
		info, err := f.Stat()
		v.tty = err == nil && info.Mode()&os.ModeCharDevice != 0
	}
	v.color = v.tty && os.Getenv("NO_COLOR") == ""
	return v
}

func (v *demoView) style(code, text string) string {
	if !v.color {
		return text
	}
	return code + text + styleNone
}

func (v *demoView) strong(format string, args ...any) string {
	return v.style(styleBold, fmt.Sprintf(format, args...))
}

// say prints a line that stays.
func (v *demoView) say(format string, args ...any) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.draw(fmt.Sprintf(format, args...)+"\n", v.block)
}

// draw prints text that stays where the table was, and the table below it.
func (v *demoView) draw(text string, block []string) {
	var b bytes.Buffer
	if v.drawn > 0 {
		fmt.Fprintf(&b, "\x1b[%dA\r%s", v.drawn, eraseBelow)
	}
	b.WriteString(text)
	if len(block) > 0 {
		// A line that is too long is cut off: a wrapped one would take two.
		b.WriteString(cursorOff + wrapOff)
		for _, line := range block {
			b.WriteString(line + eraseRight + "\n")
		}
		b.WriteString(wrapOn)
	}
	v.block, v.drawn = block, len(block)
	if _, err := v.w.Write(b.Bytes()); err != nil {
		v.unread()
	}
}

// clear removes the table and gives the cursor back.
func (v *demoView) clear() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.drawn > 0 {
		v.draw(cursorOn, nil)
	}
}

// held says that nothing happens by itself any more.
func (v *demoView) held() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.holding = true
}

// show draws the table, or prints a line of counts now and then.
func (v *demoView) show(s demoScene) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for len(v.past) > 0 && s.at.Sub(v.past[0].at) > ratePeriod+viewPeriod/2 {
		v.past = v.past[1:]
	}
	v.past = append(v.past, s)
	if v.tty {
		v.draw("", v.table(s))
		return
	}
	period := plainPeriod
	if v.holding {
		period = heldPeriod
	}
	if s.total.Requests == 0 || s.at.Sub(v.counted) < period-viewPeriod/2 {
		return
	}
	v.counted = s.at
	var who []string
	for _, r := range s.instances {
		who = append(who, fmt.Sprintf("%s %d", r.name, s.served[r.addr]))
	}
	v.draw(fmt.Sprintf("    %5.1fs  %s; %s\n", time.Since(v.begin).Seconds(), s.total, strings.Join(who, ", ")), nil)
}

// table renders the live view.
func (v *demoView) table(s demoScene) []string {
	var b bytes.Buffer
	tw := tabwriter.NewWriter(&b, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "NAME\tADDRESS\tREGISTRY\tBEAT\tHAPROXY\tSERVED\tPER S\tPIDS")
	old := v.past[0]
	styles := []string{styleBold}
	for _, r := range s.instances {
		rate := 0.0
		if span := s.at.Sub(old.at).Seconds(); span > 0 {
			rate = float64(s.served[r.addr]-old.served[r.addr]) / span
		}
		registry, beat := "?", "-"
		if s.registry {
			registry = r.state
			if r.beat >= 0 {
				beat = fmt.Sprintf("%.1fs", r.beat.Seconds())
			}
		}
		balancer := "?"
		if s.balancer {
			balancer = serverWord(r)
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%d\t%.0f\t%s\n", r.name, r.addr, registry, beat, balancer, s.served[r.addr], rate, r.pids)
		switch {
		case balancer == "up":
			styles = append(styles, styleGood)
		case balancer == "down" || balancer == "?":
			styles = append(styles, styleBad)
		default:
			styles = append(styles, styleFaint)
		}
	}
	_ = tw.Flush() // into a buffer
	lines := []string{""}
	for n, line := range strings.Split(strings.TrimRight(b.String(), "\n"), "\n") {
		lines = append(lines, v.style(styles[n], line))
	}
	balancer := v.style(styleBad, "HAProxy does not answer")
	if s.balancer {
		balancer = "HAProxy is pid " + strconv.Itoa(s.pid)
	}
	counts := s.total.String()
	if s.total.Failed > 0 {
		counts = v.style(styleBad, counts)
	}
	return append(lines, counts+"; "+balancer+fmt.Sprintf("; %.0fs", time.Since(v.begin).Seconds()))
}

// serverWord is what HAProxy does with an instance.
func serverWord(r demoRow) string {
	switch {
	case !r.there || r.server.Admin == lbsync.Maint && r.server.Weight == 0:
		return "-"
	case r.server.Admin != lbsync.Ready:
		return r.server.Admin.String()
	case !r.server.Up:
		return "down"
	case r.server.Weight == 0:
		return "weight 0"
	}
	return "up"
}

// String is the counts as a sentence.
func (c demoCounts) String() string {
	text := fmt.Sprintf("%d requests, %d failed", c.Requests, c.Failed)
	if c.Cut > 0 {
		text += fmt.Sprintf(", %d cut by the kill", c.Cut)
	}
	if c.Gap > 0 {
		text += fmt.Sprintf(", %d in HAProxy's gap", c.Gap)
	}
	return text
}

// verdict is a step's result.
func (v *demoView) verdict(ok bool) string {
	if ok {
		return v.style(styleGood, "ok")
	}
	return v.style(styleBad, "FAILED")
}

// result prints what came of a step.
func (v *demoView) result(s demoStep) {
	v.say("    %5.1fs  %s: %s", time.Since(v.begin).Seconds(), v.verdict(s.OK), s.Note)
}

// summary prints what the story came to.
func (v *demoView) summary(s demoSummary) {
	var b bytes.Buffer
	tw := tabwriter.NewWriter(&b, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "\nSTEP\tRESULT\tTOOK\tREQUESTS\tFAILED\tCUT\tGAP")
	for _, step := range s.Steps {
		result := "ok"
		if !step.OK {
			result = "FAILED"
		}
		fmt.Fprintf(tw, "%s\t%s\t%v\t%d\t%d\t%d\t%d\n", step.Name, result,
			short(time.Duration(step.TookMS)*time.Millisecond), step.Requests, step.Failed, step.Cut, step.Gap)
	}
	_ = tw.Flush() // into a buffer
	config := "unchanged"
	if !s.Unchanged {
		config = "CHANGED"
	}
	fmt.Fprintf(&b, "\n%v\n", s.Total)
	if s.GapMS > 0 {
		fmt.Fprintf(&b, "gap: %v from HAProxy's death to the first good answer\n", short(time.Duration(s.GapMS)*time.Millisecond))
	}
	fmt.Fprintf(&b, "haproxy.cfg: %s, sha256 %s\nHAProxy reloads by rollcall: %d\n", config, s.Config, s.Reloads)
	if s.OK {
		b.WriteString(v.verdict(true) + ": every step happened")
	} else {
		b.WriteString(v.verdict(false) + ": see above")
	}
	v.say("%s", b.String())
}

// short rounds a duration for people.
func short(d time.Duration) time.Duration {
	if d < time.Second {
		return d.Round(time.Millisecond)
	}
	return d.Round(10 * time.Millisecond)
}
