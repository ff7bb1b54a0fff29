package bundle

import (
	"errors"
	"regexp"
	"sort"
	"strings"

	"gopkg.in/yaml.v3"
)

// Redacted stands for what was taken out.
const Redacted = "redacted"

// minLiteral is the length in bytes under which a value is not searched for: it would be found all over.
const minLiteral = 4

// Keep are the keys of agentd.yaml whose values, texts too, are no secrets.
var Keep = map[string]bool{
	"name": true, "engine": true, "mode": true, "plans": true, "with": true, "level": true, "format": true,
	"max_rows": true, "max_bytes": true, "statement_timeout": true, "concurrency": true, "first": true, "last": true, "keep_rows": true,
	"idle_timeout": true, "enabled": true, "memory": true, "cpu": true, "cpus": true, "tasks": true, "network": true,
	"file": true, "env": true, "credential": true, "ca_file": true, "criu": true, "listen": true, "spec_dirs": true, "visible": true,
	"cache": true, "cache_bytes": true, "journal_bytes": true, "workspaces": true, "read_only": true, "auth": true, "role": true, "mount": true,
}

// patterns are what secrets look like; the first group is kept.
var patterns = []*regexp.Regexp{
	regexp.MustCompile(`(?s)(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?-----END [A-Z ]*PRIVATE KEY-----`),
	regexp.MustCompile(`\b(pst1_|prk1_|hvs\.|hvb\.|s\.)[A-Za-z0-9_.\-]{12,}`),
	regexp.MustCompile(`(?i)((?:authorization|proxy-authorization|x-vault-token|cookie)["']?\s*[:=]\s*)[^\r\n]+`),
	regexp.MustCompile(`(?i)((?:bearer|basic)\s+)[A-Za-z0-9+/=_.\-]{8,}`),
	regexp.MustCompile(`(?i)([a-z][a-z0-9+.\-]*://)[^/\s@"']+@`),
	regexp.MustCompile(`(?i)((?:password|passwd|pwd|secret|secret_id|token|api_?key|access_?key|private_?key)["']?\s*[:=]\s*)(?:"(?:[^"\\]|\\.)*"|'[^']*'|[^\s,;&"'}]+)`),
}

// Redactor takes secrets out of text.
type Redactor struct{ literals []string }

// NewRedactor returns one that takes out these values, too. Those shorter than 4 bytes are
// not searched for.
func NewRedactor(values ...string) *Redactor {
	r := &Redactor{}
	for _, v := range values {
		for _, form := range []string{v, strings.TrimSpace(v)} {
			if len(form) >= minLiteral {
				r.literals = append(r.literals, form)
			}
		}
	}
	// One that is part of another must not leave the rest of it.
	sort.Slice(r.literals, func(i, j int) bool { return len(r.literals[i]) > len(r.literals[j]) })
	return r
}

// Text takes secrets out of text.
func (r *Redactor) Text(text string) string {
	for _, v := range r.literals {
		text = strings.ReplaceAll(text, v, Redacted)
	}
	for _, p := range patterns {
		text = p.ReplaceAllString(text, "${1}"+Redacted)
	}
	return text
}

var errNoYAML = errors.New("it is no YAML, so that nothing of it can be shown")

// YAML returns a configuration with its shape, its numbers and switches, and the values of
// the keys in Keep. Comments are left out.
func (r *Redactor) YAML(raw []byte) ([]byte, error) {
	var root yaml.Node
	if err := yaml.Unmarshal(raw, &root); err != nil {
		return nil, errNoYAML
	}
	r.node(&root, "", 0)
	out, err := yaml.Marshal(&root)
	if err != nil {
		return nil, errNoYAML
	}
	return []byte(r.Text(string(out))), nil
}

// maxDepth bounds how deep a configuration is followed; what is deeper is taken out.
const maxDepth = 32

func (r *Redactor) node(n *yaml.Node, key string, depth int) {
	n.HeadComment, n.LineComment, n.FootComment, n.Anchor = "", "", "", ""
	if depth > maxDepth || n.Kind == yaml.AliasNode {
		*n = yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: Redacted}
		return
	}
	switch n.Kind {
	case yaml.MappingNode:
		for i := 0; i+1 < len(n.Content); i += 2 {
			name := n.Content[i]
			name.HeadComment, name.LineComment, name.FootComment = "", "", ""
			r.node(n.Content[i+1], name.Value, depth+1)
		}
	case yaml.ScalarNode:
		switch n.ShortTag() {
		case "!!int", "!!float", "!!bool", "!!null":
			if secretKey.MatchString(key) {
				n.Tag, n.Value, n.Style = "!!str", Redacted, 0
			}
		default:
			if !Keep[key] {
				n.Tag, n.Value, n.Style = "!!str", Redacted, 0
			}
		}
	default:
		for _, c := range n.Content {
			r.node(c, key, depth+1)
		}
	}
}

// secretKey is a key whose value is a secret even if it is a number.
var secretKey = regexp.MustCompile(`(?i)password|secret|token|key|dsn`)
