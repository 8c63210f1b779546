package main

import (
	"encoding/xml"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"
)

// texts returns the rows of a picture, which must be well-formed.
func texts(t *testing.T, svg io.Reader) (rows []string) {
	t.Helper()
	d := xml.NewDecoder(svg)
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return rows
		}
		if err != nil {
			t.Fatal(err)
		}
		if e, ok := token.(xml.StartElement); ok && e.Name.Local == "text" {
			var text string
			if err := d.DecodeElement(&text, &e); err != nil {
				t.Fatal(err)
			}
			rows = append(rows, text)
		}
	}
}

func TestRender(t *testing.T) {
	var b strings.Builder
	lines := []line{{"1/6 <start> & go", 0}, {"  ok: ]]>", 1234 * time.Millisecond}}
	if err := render(&b, `a "b"`, lines); err != nil {
		t.Fatal(err)
	}
	got := texts(t, strings.NewReader(b.String()))
	want := []string{`$ a "b"`, lines[0].text, lines[1].text}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got %q, want %q", got, want)
	}
	if !strings.Contains(b.String(), "animation-delay: 1.23s") {
		t.Error("the second line does not appear when it was printed")
	}
}

func TestRecord(t *testing.T) {
	lines, err := record([]string{"sh", "-c", "echo one; echo two"})
	if err != nil || len(lines) != 2 || lines[1].text != "two" {
		t.Errorf("got %v, %v", lines, err)
	}
	if _, err := record([]string{"sh", "-c", "echo one; exit 3"}); err == nil {
		t.Error("a run that failed was recorded")
	}
}

// TestPicture holds what the README shows to a run in which all went well.
func TestPicture(t *testing.T) {
	f, err := os.Open("../demo.svg")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	all := strings.Join(texts(t, f), "\n")
	for _, want := range []string{"$ scripts/demo", "haproxy.cfg: unchanged", "HAProxy reloads by rollcall: 0", "ok: every step happened"} {
		if !strings.Contains(all, want) {
			t.Errorf("the picture lacks %q; make it anew with scripts/record", want)
		}
	}
}
