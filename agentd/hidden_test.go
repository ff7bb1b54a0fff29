package main

import (
	"testing"

	"github.com/postern-dev/postern/agentd/policy"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// What a session's process says is held against the policy again: no part of a page may
// name what is hidden.
func TestTellsHidden(t *testing.T) {
	hide := policy.Hide{"hr", "public.*_secret"}
	hidden, visible := &posternv1.CatalogName{Schema: "public", Name: "a_secret"}, &posternv1.CatalogName{Schema: "public", Name: "a"}
	for name, page := range map[string]*posternv1.CatalogPage{
		"a table":            {Tables: []*posternv1.CatalogTable{{Schema: "hr", Name: "a"}}},
		"a partition":        {Tables: []*posternv1.CatalogTable{{Schema: "public", Name: "a", PartitionOf: hidden}}},
		"a key":              {Tables: []*posternv1.CatalogTable{{Schema: "public", Name: "a", Keys: []*posternv1.CatalogKey{{References: hidden}}}}},
		"a function":         {Functions: []*posternv1.CatalogFunction{{Schema: "public", Name: "f_secret"}}},
		"a type":             {Types: []*posternv1.CatalogType{{Schema: "hr", Name: "mood"}}},
		"a sequence":         {Sequences: []*posternv1.CatalogSequence{{Schema: "public", Name: "s_secret"}}},
		"a sequence's owner": {Sequences: []*posternv1.CatalogSequence{{Schema: "public", Name: "s", Owner: hidden}}},
		"a schema":           {Schemas: []*posternv1.CatalogSchema{{Name: "hr"}}},
	} {
		if !tellsHidden(page, hide) {
			t.Errorf("%s that is hidden is let through", name)
		}
	}
	if tellsHidden(&posternv1.CatalogPage{
		Tables:  []*posternv1.CatalogTable{{Schema: "public", Name: "a", PartitionOf: visible, Keys: []*posternv1.CatalogKey{{References: visible}, {ReferencesHidden: true}}}},
		Types:   []*posternv1.CatalogType{{Schema: "public", Name: "mood"}},
		Schemas: []*posternv1.CatalogSchema{{Name: "public"}}, Sequences: []*posternv1.CatalogSequence{{Schema: "public", Name: "s", Owner: visible}, {Schema: "public", Name: "t"}},
	}, hide) {
		t.Error("a page without anything hidden is refused")
	}
}
