package policy

import (
	"strings"
	"testing"
)

func TestAttachments(t *testing.T) {
	some := Attachments{Enabled: true, Workspaces: []string{"lab-*", "shared"}, ReadOnly: []string{"shared", "lab-ro*"}, HostMounts: []string{"/srv/postern"}, Binds: []AttachedBind{{Name: "data", Path: "/srv/data", ReadOnly: true}}}
	for _, c := range []struct {
		name, workspace string
		policy          Attachments
		readOnly        bool
		reason          string
	}{
		{"off", "lab-1", Attachments{}, false, "add attachments:"},
		{"all", "anything", Attachments{Enabled: true}, false, ""},
		{"named", "lab-1", some, false, ""},
		{"read-only", "shared", some, true, ""},
		{"read-only by pattern", "lab-ro1", some, true, ""},
		{"a directory of the host", "data", some, true, ""},
		{"not named", "labs", some, false, "attachments.workspaces"},
		{"none at all", "a", Attachments{Enabled: true, Workspaces: []string{}}, false, "attachments.workspaces"},
	} {
		readOnly, reason := c.policy.Mount(c.workspace)
		if readOnly != c.readOnly || (reason == "") != (c.reason == "") || !strings.Contains(reason, c.reason) {
			t.Errorf("%s: got %v, %q", c.name, readOnly, reason)
		}
	}
	for dir, ok := range map[string]bool{
		"/srv/postern/a": true, "/srv/postern/a/b": true, "/srv/postern": false, "/srv/posternx/a": false, "/etc": false, "/srv/postern/": false,
	} {
		if reason := some.HostMount(dir); (reason == "") != ok {
			t.Errorf("a mount on %s: %q", dir, reason)
		}
	}
	if reason := (Attachments{Enabled: true}).HostMount("/srv/a"); !strings.Contains(reason, "host_mounts") {
		t.Errorf("without host_mounts: %q", reason)
	}
}
