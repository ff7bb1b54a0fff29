package sandbox

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPrerequisites(t *testing.T) {
	needRoot(t)
	// What lies in /tmp is not in a kernel: programs have to be elsewhere.
	specs := t.TempDir()
	for name, text := range map[string]string{
		"good":   `{"argv": ["/usr/bin/python3", "-m", "ipykernel_launcher", "-f", "{connection_file}"]}`,
		"other":  `{"argv": ["sh", "{connection_file}"]}`,
		"absent": `{"argv": ["/nowhere/python", "-m", "ipykernel_launcher"]}`,
		"broken": `{"argv": [`,
		"empty":  `{}`,
	} {
		if err := os.MkdirAll(filepath.Join(specs, name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(specs, name, "kernel.json"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	before := tempEntries(t)
	got := map[string]Check{}
	for _, c := range Prerequisites(context30(t), Needs{UIDBase: 1_940_000_000, UIDs: 10, SpecDirs: []string{specs}}) {
		key := c.Name
		if spec, _, found := strings.Cut(c.Message, " ("); c.Name == "kernels: kernelspecs" && found {
			key += " " + spec
		}
		got[key] = c
		if !c.OK && c.Remedy == "" {
			t.Errorf("%s: no remedy", c.Name)
		}
		if strings.Contains(c.Message, "\n") {
			t.Errorf("%s: more than a line: %q", c.Name, c.Message)
		}
	}
	for name, message := range map[string]string{
		"kernels: users":              "kernels run as users 1940000000 to 1940000009, each its own",
		"kernels: sandbox":            "namespaces, root directory and seccomp filter work",
		"kernels: network":            "kernels can be fenced: none, allowed and open",
		"kernels: kernelspecs good":   "can start in the sandbox",
		"kernels: kernelspecs other":  "can start in the sandbox",
		"kernels: kernelspecs absent": "/nowhere/python cannot be executed",
		"kernels: kernelspecs broken": "unexpected end of JSON input",
		"kernels: kernelspecs empty":  "argv is empty",
	} {
		c, ok := got[name]
		bad := strings.Contains(name, "absent") || strings.Contains(name, "broken") || strings.Contains(name, "empty")
		if !ok || !strings.Contains(c.Message, message) || c.OK == bad {
			t.Errorf("%s: %+v", name, c)
		}
	}
	if _, ok := got["kernels: limits"]; !ok {
		t.Errorf("nothing about limits: %+v", got)
	}
	if after := tempEntries(t); after != before {
		t.Errorf("left in the temporary directory: %d, there were %d", after, before)
	}
	// An account has one of the users.
	passwd := filepath.Join(t.TempDir(), "passwd")
	if err := os.WriteFile(passwd, []byte("root:x:0:0::/:/bin/sh\nann:x:1009:1009::/:/bin/sh\nbroken\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if user := accountIn(passwd, 1000, 10); user != "ann" {
		t.Errorf("found %q", user)
	}
	if user := accountIn(passwd, 1010, 10); user != "" {
		t.Errorf("found %q", user)
	}
}

func tempEntries(t *testing.T) int {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(os.TempDir(), "agentd-doctor-*"))
	if err != nil {
		t.Fatal(err)
	}
	return len(found)
}
