package kernel

import (
	"fmt"
	"os"
	"path/filepath"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// revokedMark is a file in the directory of a kernel whose owner's token was revoked.
const revokedMark = "revoked"

// errRevoked is what such a kernel is told when it asks a data source.
var errRevoked = proto.Errorf(proto.CodePolicyDenied, "the token that this kernel belongs to was revoked or has expired: it may use no data source any more")

// Revoke makes kernels of a token ask data sources for nothing any more, also after a
// restart of agentd: statements under way end, new ones are refused. The kernels go on.
// It returns for how many kernels that is new.
func (m *Manager) Revoke(organization, token string) (int, error) {
	m.mu.Lock()
	var found []*kernel
	for _, k := range m.kernels {
		p := &posternv1.Principal{}
		if protojson.Unmarshal([]byte(k.spec.Owner), p) == nil && p.Organization == organization && p.TokenId == token && k.revoked.Err() == nil {
			found = append(found, k)
		}
	}
	m.mu.Unlock()
	var failed error
	for _, k := range found {
		k.revoke(errRevoked)
		if err := os.WriteFile(filepath.Join(k.dir, revokedMark), nil, 0o600); err != nil {
			// It holds until agentd ends; the control plane says it again then.
			failed = fmt.Errorf("note that kernel %s may use no data source: %w", k.spec.ID, err)
		}
	}
	return len(found), failed
}
