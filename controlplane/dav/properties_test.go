package dav

import (
	"encoding/xml"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/net/webdav"

	"github.com/postern-dev/postern/proto"
)

func set(local, inner string) webdav.Proppatch {
	return webdav.Proppatch{Props: []webdav.Property{{XMLName: xml.Name{Space: "urn:x", Local: local}, InnerXML: []byte(inner)}}}
}

func TestProperties(t *testing.T) {
	remove := set("a", "")
	remove.Remove = true
	text, err := patchProperties(nil, []webdav.Proppatch{set("a", "1"), set("b", "<y:z xmlns:y='urn:y'>2</y:z>"), set("a", "3")})
	if err != nil {
		t.Fatal(err)
	}
	if got := parseProperties(text); len(got) != 2 || got[0].XML != "3" || got[1].Local != "b" {
		t.Errorf("got %+v", got)
	}
	if text, err = patchProperties(text, []webdav.Proppatch{remove}); err != nil || strings.Contains(string(text), `"a"`) {
		t.Errorf("removed: %s, %v", text, err)
	}
	remove.Props[0].XMLName.Local = "b"
	if text, err = patchProperties(text, []webdav.Proppatch{remove, remove}); err != nil || text != nil {
		t.Errorf("all removed: %s, %v", text, err)
	}
	if _, err := patchProperties(nil, []webdav.Proppatch{set("a", strings.Repeat("x", maxPropertiesBytes))}); proto.CodeOf(err) != proto.CodeStorageFull {
		t.Errorf("a large one: %v", err)
	}
	var many []webdav.Proppatch
	for i := range maxProperties + 1 {
		many = append(many, set(fmt.Sprint("p", i), ""))
	}
	if _, err := patchProperties(nil, many); proto.CodeOf(err) != proto.CodeStorageFull {
		t.Errorf("many: %v", err)
	}
}

// TestForeignProperties: a host that mounts the workspace can write the attribute, too. What
// it says must not break out of the answer that it becomes a part of.
func TestForeignProperties(t *testing.T) {
	for text, want := range map[string]int{
		`[{"local":"a","xml":"ok &amp; <b>fine</b>"}]`: 1,
		`[{"local":"a","xml":"</a><D:owned/>"}]`:       0,
		`[{"local":"a","xml":"</x><x>"}]`:              0,
		`[{"local":"a","xml":"<b>"}]`:                  0,
		`[{"local":"a","xml":"<!DOCTYPE x>"}]`:         0,
		`[{"local":"a","xml":"a & b"}]`:                0,
		`[{"local":""}]`:                               0,
		`[{"local":"a b"}]`:                            0,
		`[{"local":"a><b"}]`:                           0,
		`{}`:                                           0,
		`nonsense`:                                     0,
	} {
		if got := parseProperties([]byte(text)); len(got) != want {
			t.Errorf("%s: %+v", text, got)
		}
	}
}
