package pki

import "github.com/postern-dev/postern/controlplane/masterkey"

// Box returns the box for a purpose, which is not empty. What one purpose's box has sealed no other
// one opens, and none of them the CA's key.
func (a *Authority) Box(purpose string) *masterkey.Box { return a.keys.Box(purpose) }
