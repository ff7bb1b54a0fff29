package policy

import (
	"maps"
	"strings"
	"testing"
)

func TestStartKernel(t *testing.T) {
	on := Kernels{Enabled: true, Specs: []string{"python3"}, Environment: []string{"REGION"}}
	many := map[string]string{}
	for i := range maxEnvironment + 1 {
		many["KERNEL_"+strings.Repeat("x", i)] = ""
	}
	for name, c := range map[string]struct {
		policy Kernels
		spec   string
		in     map[string]string
		want   map[string]string
		reason string
	}{
		"off":         {Kernels{}, "python3", nil, nil, "kernels are off on this host: add kernels: to agentd.yaml"},
		"plain":       {on, "python3", nil, nil, ""},
		"all specs":   {Kernels{Enabled: true}, "ir", nil, nil, ""},
		"other spec":  {on, "ir", nil, nil, "kernels.specs"},
		"variable":    {on, "python3", map[string]string{"REGION": "eu"}, map[string]string{"REGION": "eu"}, ""},
		"Jupyter's":   {on, "python3", map[string]string{"KERNEL_WORKING_DIR": "/x", "KERNEL_LAUNCH_TIMEOUT": "40"}, nil, ""},
		"other":       {on, "python3", map[string]string{"LD_PRELOAD": "x"}, nil, `variable "LD_PRELOAD" may not be set`},
		"NUL":         {on, "python3", map[string]string{"REGION": "a\x00b"}, nil, "NUL"},
		"large value": {on, "python3", map[string]string{"REGION": strings.Repeat("x", maxValue+1)}, nil, "more than"},
		"too many":    {on, "python3", many, nil, "more than 64"},
	} {
		got, reason := c.policy.StartKernel(c.spec, c.in)
		if !maps.Equal(got, c.want) || (c.reason == "") != (reason == "") || !strings.Contains(reason, c.reason) {
			t.Errorf("%s: got %v, %q, want %v, %q", name, got, reason, c.want, c.reason)
		}
	}
}
