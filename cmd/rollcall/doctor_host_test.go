package main

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"rollcall/registrar/redistest"
)

func TestDoctorDescriptors(t *testing.T) {
	t.Parallel()
	s := &system{redis: redistest.Start(t)}
	for limit, want := range map[string]state{"100:100": stateWarn, "256:256": stateOK} {
		p := s.spawnAs(t, 0, []string{"prlimit", "--nofile=" + limit}, "doctor", "-o", "json", "--log-level", "error")
		<-p.done
		var findings []finding
		if err := json.NewDecoder(strings.NewReader(p.out.String())).Decode(&findings); err != nil {
			t.Fatalf("%v\n%s", err, p.out)
		}
		i := slices.IndexFunc(findings, func(f finding) bool { return f.Check == "host descriptors" })
		if i < 0 || findings[i].State != want {
			t.Errorf("%s: %+v, want %s", limit, findings, want)
		}
	}
}
