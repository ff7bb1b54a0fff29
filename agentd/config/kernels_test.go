package config

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/policy"
)

func TestKernels(t *testing.T) {
	off, err := Parse("f.yaml", []byte("url: https://cp\n"), nil)
	if err != nil || off.Kernels.Enabled {
		t.Errorf("without kernels: %+v, %v", off, err)
	}
	for _, text := range []string{"kernels:\n", "kernels: {}\n"} {
		plain, err := Parse("f.yaml", []byte(text), nil)
		want := defaultKernels()
		want.Enabled = true
		if err != nil || !reflect.DeepEqual(plain.Kernels, want) {
			t.Errorf("%q: %+v, %v, want %+v", text, plain.Kernels, err, want)
		}
	}
	c, err := Parse("f.yaml", []byte(`
kernels:
  specs: [python3]
  spec_dirs: [/srv/kernels]
  max: 3
  limits: {memory: 1GiB, cpus: 1.5, pids: 100, disk: 1GiB}
  network: allowed
  network_allow: ["10.1.2.3:443", "10.0.0.0/8:8080", "[2001:db8::1]:443"]
  environment: [REGION]
  visible: [/srv/venv]
  idle: {after: 8h, then: suspend}
  checkpoints: {criu: /opt/x/criu, max_bytes: 1GiB, keep: 7, max_age: 2d, lazy: off}
  moves: out
  warm: 2
  journal: 32MiB
  uid_base: 70000
  secrets:
    control_plane: allow
    vault: {TOKEN: {path: secret/team/token}, DB: {path: kv/db, key: password}}
vault: {address: 'https://vault:8200', token: {file: /etc/token}}
`), nil)
	want := Kernels{UIDBase: 70000, Kernels: policy.Kernels{
		Enabled: true, Specs: []string{"python3"}, SpecDirs: []string{"/srv/kernels"}, Max: 3, Memory: 1 << 30, CPUs: 1.5, PIDs: 100, Disk: 1 << 30,
		Network: "allowed", NetworkAllow: []string{"10.1.2.3:443", "10.0.0.0/8:8080", "[2001:db8::1]:443"}, Environment: []string{"REGION"},
		Visible: []string{"/srv/venv"}, IdleAfter: 8 * time.Hour, IdleSuspend: true, Warm: 2, Journal: 32 << 20,
		Moves: "out", Checkpoints: policy.Checkpoints{CRIU: "/opt/x/criu", MaxBytes: 1 << 30, Keep: 7, MaxAge: 48 * time.Hour, Eager: true},
		Secrets: policy.KernelSecrets{ControlPlane: true, Vault: map[string]policy.VaultSecret{"TOKEN": {Path: "secret/team/token", Key: "value"}, "DB": {Path: "kv/db", Key: "password"}}},
	}}
	if err != nil || !reflect.DeepEqual(c.Kernels, want) {
		t.Errorf("got %+v, %v, want %+v", c, err, want)
	}
	for in, want := range map[string]string{
		"{spec: [x]}":                            "f.yaml:1: unknown key kernels.spec: did you mean specs?",
		"{specs: [a/b]}":                         `kernels.specs: "a/b"`,
		"{sources: [x]}":                         `kernels.sources: there is no data source "x" in sources`,
		"{max: 0}":                               "kernels.max: 0 is not between 1 and",
		"{warm: 99}":                             "kernels.warm: 99",
		"{journal: 1KiB}":                        "kernels.journal: 1KiB is not between",
		"{moves: away}":                          "kernels.moves: \"away\" is none of both, in, out, none",
		"{journal: many}":                        "kernels.journal:",
		"{limits: {memory: 1MiB}}":               "kernels.memory: 1MiB",
		"{limits: {cpus: none}}":                 "kernels.limits.cpus",
		"{limits: {cpus: .nan}}":                 "kernels.limits.cpus",
		"{limits: {pids: 1}}":                    "kernels.limits.pids",
		"{network: all}":                         `kernels.network: "all" is none of`,
		"{network_allow: ['10.1.2.3:443']}":      "kernels.network_allow: it means nothing with network: none",
		"{network: open, network_allow: ['db']}": "kernels.network_allow: \"db\" is none of",
		"{environment: ['A=B']}":                 "kernels.environment",
		"{visible: [relative]}":                  "kernels.visible",
		"{visible: [/]}":                         "kernels.visible",
		"{idle: {after: 1h}}":                    "kernels.idle: it does not say what then",
		"{idle: {then: stop}}":                   "kernels.idle: it does not say after what time",
		"{idle: {after: 1s, then: stop}}":        "less than 1m",
		"{idle: {after: 1h, then: sleep}}":       `kernels.idle.then: "sleep" is none of stop, suspend, keep`,
		"{idle: {then: suspend}}":                "kernels.idle: it does not say after what time",
		"{checkpoints: {criu: criu}}":            "kernels.checkpoints.criu",
		"{checkpoints: {keep: 0}}":               "kernels.checkpoints.keep: 0",
		"{checkpoints: {max_age: 3w}}":           "kernels.checkpoints.max_age",
		"{checkpoints: {max_bytes: 1KiB}}":       "kernels.max_bytes: 1KiB",
		"{checkpoints: {lazy: on}}":              `kernels.checkpoints.lazy: "on" is not auto or off`,
		"{secrets: {control_plane: yes}}":        `kernels.secrets.control_plane: "yes" is none of allow, deny`,
		"{secrets: {control_plan: allow}}":       "unknown key kernels.secrets.control_plan",
		"{secrets: {vault: {T: {path: kv/t}}}}":  "kernels.secrets.vault: there is no vault in this configuration",
		"{secrets: {vault: {PATH: {path: kv/t}}}}\nvault: {address: 'https://vault:8200', token: {file: /etc/token}}": "kernels.secrets.vault: PATH is no name for a secret",
		"{secrets: {vault: {T: {path: ../t}}}}\nvault: {address: 'https://vault:8200', token: {file: /etc/token}}":    "kernels.secrets.vault.T: \"../t\" is no path",
		"{uid_base: 0}":          "kernels.uid_base: 0",
		"{uid_base: 1900000000}": "must not share users",
	} {
		if _, err := Parse("f.yaml", []byte("kernels: "+in+"\n"), nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %s", in, err, want)
		}
	}
}
