package token

import (
	"slices"

	"github.com/postern-dev/postern/proto"
)

// Role is what a token may do; each role includes those before it.
type Role string

// The roles, from the least to the most.
const (
	// Viewer sees agents, data sources and authorities.
	Viewer Role = "viewer"
	// Analyst runs and cancels statements of its own and checks data sources.
	Analyst Role = "analyst"
	// Operator makes registration keys, revokes agents, sees all queries and the
	// audit log.
	Operator Role = "operator"
	// Admin makes and revokes tokens; in the default organization it manages the
	// organizations.
	Admin Role = "admin"
)

var roles = []Role{Viewer, Analyst, Operator, Admin}

// ParseRole reads a role; INVALID for what is none.
func ParseRole(text string) (Role, error) {
	if r := Role(text); slices.Contains(roles, r) {
		return r, nil
	}
	return "", proto.Errorf(proto.CodeInvalid, "role %.40q: choose admin, operator, analyst or viewer", text)
}

// Includes reports whether r may do all that least may. What is no role includes
// nothing.
func (r Role) Includes(least Role) bool {
	have, need := slices.Index(roles, r), slices.Index(roles, least)
	return need >= 0 && have >= need
}
