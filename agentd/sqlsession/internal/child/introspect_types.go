package child

import (
	"encoding/json"
	"fmt"

	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

var typeKinds = map[string]string{"e": "enum", "d": "domain", "c": "composite", "r": "range"}

func (c *catalog) trigger(r *relation, row []string) error {
	if len(r.table.Triggers) >= maxTriggers {
		r.table.Truncated = true
		return nil
	}
	r.table.Triggers = append(r.table.Triggers, name(row[0]))
	return nil
}

// types tells of enums, domains, composites and ranges.
func (c *catalog) types() error {
	return c.each(typesQuestion, func(row []string) error {
		t := &posternv1.CatalogType{Schema: name(row[0]), Name: name(row[1]), Kind: typeKinds[row[2]], Comment: comment(row[3])}
		if !c.wanted(t.Schema) || c.hide.Object(t.Schema, t.Name) {
			return nil
		}
		if t.Kind == "domain" || t.Kind == "range" {
			t.Base = c.typeText(row[5], row[6], row[7])
			t.NotNull = t.Kind == "domain" && row[4] == "t"
		}
		if err := c.members(t, row[8]); err != nil {
			return err
		}
		if gproto.Size(t) > maxTable {
			t.Truncated, t.Labels, t.Attributes = true, nil, nil
		}
		c.digest(t.Schema, t)
		c.room(gproto.Size(t))
		c.page.Types = append(c.page.Types, t)
		return nil
	})
}

// members reads the labels of an enum, or the attributes of a composite: a JSON array.
func (c *catalog) members(t *posternv1.CatalogType, list string) error {
	if list == "" {
		return nil
	}
	garbled := func(err error) error {
		return fmt.Errorf("%w: what %s is made of can't be read: %v", errProtocol, frame.Clip(t.Name, 100), err)
	}
	if t.Kind == "enum" {
		if err := json.Unmarshal([]byte(list), &t.Labels); err != nil {
			return garbled(err)
		}
		if len(t.Labels) > maxMembers {
			t.Labels, t.Truncated = t.Labels[:maxMembers], true
		}
		for i, label := range t.Labels {
			t.Labels[i] = name(label)
		}
		return nil
	}
	// Each: name, type, the type's schema, its bare name.
	var attributes [][4]string
	if err := json.Unmarshal([]byte(list), &attributes); err != nil {
		return garbled(err)
	}
	if len(attributes) > maxMembers {
		attributes, t.Truncated = attributes[:maxMembers], true
	}
	for _, a := range attributes {
		t.Attributes = append(t.Attributes, &posternv1.CatalogColumn{Name: name(a[0]), Type: c.typeText(a[1], a[2], a[3])})
	}
	return nil
}

func (c *catalog) sequences() error {
	return c.each(sequencesQuestion, func(row []string) error {
		s := &posternv1.CatalogSequence{Schema: name(row[0]), Name: name(row[1]), Type: name(row[2]), Comment: comment(row[3])}
		if !c.wanted(s.Schema) || c.hide.Object(s.Schema, s.Name) {
			return nil
		}
		if owner := (&posternv1.CatalogName{Schema: name(row[4]), Name: name(row[5])}); owner.Name != "" && !c.hide.Object(owner.Schema, owner.Name) {
			s.Owner, s.OwnerColumn = owner, name(row[6])
		}
		c.digest(s.Schema, s)
		c.room(gproto.Size(s))
		c.page.Sequences = append(c.page.Sequences, s)
		return nil
	})
}
