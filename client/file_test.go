package client

import "testing"

func TestParseFilePath(t *testing.T) {
	for text, want := range map[string]string{
		"w": "w:/", "w:": "w:/", "w:/": "w:/", "w:a": "w:/a", "w:/a/": "w:/a", "w://a//b/./c": "w:/a/b/c", "w:/a:b": "w:/a:b",
		"w:/\xff\n": "w:/\xff\n", "": "", ":/a": "", "a/b:/c": "", "w:/a/../b": "", "w:/..": "", "w:/a\x00": "",
	} {
		p, err := ParseFilePath(text)
		if want == "" {
			if err == nil {
				t.Errorf("%q: %s, want an error", text, p)
			}
			continue
		}
		if err != nil || p.String() != want {
			t.Errorf("%q: %v, %v, want %s", text, p, err, want)
		}
	}
}

func TestFilesURL(t *testing.T) {
	c, err := New(Config{URL: "https://cp.example.com/prefix"})
	if err != nil {
		t.Fatal(err)
	}
	p := FilePath{Workspace: "w", Path: "/a b/%2e/ü?#\xff"}
	if got, want := c.filesURL("files", p, nil), "https://cp.example.com/prefix/api/v1/files/w/a%20b/%252e/%C3%BC%3F%23%FF"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if got, want := c.filesURL("chunks", p, nil), "https://cp.example.com/prefix/api/v1/chunks/w"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}
