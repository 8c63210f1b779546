// Command recorder runs a command that prints lines and writes, as an SVG, a
// terminal in which each line appears when it was printed. What the command
// prints to standard error is passed on, and is not in the picture.
//
//	recorder COMMAND [ARGUMENT…] >picture.svg
package main

import (
	"bufio"
	"encoding/xml"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"
	"unicode/utf8"
)

// Sizes in pixels; a character of a monospaced font is 0.6 of its size wide.
const (
	fontSize   = 13
	lineHeight = 18
	margin     = 16
)

// line is what was printed, and when, from the start.
type line struct {
	text string
	at   time.Duration
}

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "recorder: give it a command to run")
		os.Exit(2)
	}
	lines, err := record(os.Args[1:])
	if err == nil {
		err = render(os.Stdout, strings.Join(os.Args[1:], " "), lines)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "recorder:", err)
		os.Exit(1)
	}
}

// record runs a command to its end, which must be a good one.
func record(args []string) ([]line, error) {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	var lines []line
	var begun time.Time
	for in := bufio.NewScanner(out); in.Scan(); {
		if begun.IsZero() {
			begun = time.Now() // building it is not part of the show
		}
		lines = append(lines, line{in.Text(), time.Since(begun)})
	}
	if err := cmd.Wait(); err != nil {
		return nil, fmt.Errorf("%s: %w", strings.Join(args, " "), err)
	}
	return lines, nil
}

// render writes the picture. Who wants no motion sees all of it at once.
func render(w io.Writer, command string, lines []line) error {
	columns := utf8.RuneCountInString(command) + 2
	for _, l := range lines {
		columns = max(columns, utf8.RuneCountInString(l.text))
	}
	width := 2*margin + columns*fontSize*6/10
	height := 2*margin + (len(lines)+1)*lineHeight
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img" aria-label="a run of `, width, height, width, height)
	escape(&b, command)
	fmt.Fprintf(&b, `">
<style>
text { font: %dpx ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #d7dde5; white-space: pre; }
.command { fill: #7fd4a8; }
.ok { fill: #8fc7ff; }
.step { fill: #ffffff; font-weight: bold; }
@media (prefers-reduced-motion: no-preference) { .l { opacity: 0; animation: appear 1ms linear forwards; } }
@keyframes appear { to { opacity: 1; } }
</style>
<rect width="100%%" height="100%%" rx="8" fill="#12161c"/>
`, fontSize)
	row := func(i int, class string, at time.Duration, text string) {
		fmt.Fprintf(&b, `<text x="%d" y="%d" class="l %s" style="animation-delay: %.2fs">`, margin, margin+fontSize+i*lineHeight, class, at.Seconds())
		escape(&b, text)
		b.WriteString("</text>\n")
	}
	row(0, "command", 0, "$ "+command)
	for i, l := range lines {
		class := "text"
		switch words := strings.Fields(l.text); {
		case len(words) > 0 && strings.Contains(words[0], "/6"):
			class = "step"
		case strings.Contains(l.text, " ok: "), strings.HasPrefix(l.text, "ok: "):
			class = "ok"
		}
		row(i+1, class, l.at, l.text)
	}
	b.WriteString("</svg>\n")
	_, err := io.WriteString(w, b.String())
	return err
}

func escape(b *strings.Builder, text string) {
	_ = xml.EscapeText(b, []byte(text)) // a Builder takes everything
}
