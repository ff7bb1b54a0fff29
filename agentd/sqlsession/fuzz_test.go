package sqlsession

import (
	"testing"

	gproto "google.golang.org/protobuf/proto"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// FuzzDecodePage feeds what a session's process could send as a page.
func FuzzDecodePage(f *testing.F) {
	for _, page := range []*posternv1.CatalogPage{
		{Complete: true},
		{Tables: []*posternv1.CatalogTable{{Schema: "s", Name: "t", Columns: []*posternv1.CatalogColumn{{Name: "c", Type: "int"}}}}},
		{Functions: []*posternv1.CatalogFunction{{Schema: "s", Name: "f"}}, Schemas: []*posternv1.CatalogSchema{{Name: "s", Fingerprint: []byte("x")}}},
	} {
		raw, err := gproto.Marshal(page)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		page, err := decodePage(raw)
		if err != nil {
			return
		}
		for _, x := range page.Tables {
			if x.Name == "" || x.Schema == "" {
				t.Error("a table without a name")
			}
		}
		if _, err := gproto.Marshal(page); err != nil {
			t.Errorf("decoded, not encoded: %v", err)
		}
	})
}
