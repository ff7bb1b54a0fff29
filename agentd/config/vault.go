package config

import (
	"errors"
	"fmt"
	"regexp"

	"github.com/postern-dev/postern/agentd/secret"
)

// Vault is the HashiCorp Vault that passwords may come from. An empty Address
// means none.
type Vault struct {
	Address   string
	Namespace string
	CAs       [][]byte // beside the system's, in DER; may be nil
	// Token, or the AppRole with RoleID, SecretID and Mount.
	Token    secret.Ref
	Mount    string
	RoleID   string
	SecretID secret.Ref

	text string // what it was made of
}

// vaultFile is vault as written.
type vaultFile struct {
	Address   string     `yaml:"address"`
	Namespace string     `yaml:"namespace"`
	CAFile    string     `yaml:"ca_file"`
	Token     secret.Ref `yaml:"token"`
	AppRole   *struct {
		Mount    string     `yaml:"mount"`
		RoleID   string     `yaml:"role_id"`
		SecretID secret.Ref `yaml:"secret_id"`
	} `yaml:"approle"`
}

var vaultName = regexp.MustCompile(`^[A-Za-z0-9_./-]{0,256}$`)

func (p *problems) vault(in file, c *Config, at func(...any) int) {
	v := in.Vault
	if v.Address == "" {
		if v != (vaultFile{}) {
			p.add(at("vault"), "vault: it has no address: set address: https://vault.example.com:8200")
		}
		return
	}
	c.Vault = Vault{Address: v.Address, Namespace: v.Namespace, Token: v.Token}
	c.Vault.text = fmt.Sprint(v.Address, v.Namespace, v.CAFile, v.Token)
	if v.AppRole != nil {
		c.Vault.text += fmt.Sprint(*v.AppRole)
	}
	if err := secret.ValidateVaultAddress(v.Address); err != nil {
		p.add(at("vault", "address"), "vault.address: %v", err)
	}
	if !vaultName.MatchString(v.Namespace) {
		p.add(at("vault", "namespace"), "vault.namespace: %q is no name of a namespace", v.Namespace)
	}
	if v.CAFile != "" {
		ders, err := ReadBundle(v.CAFile)
		if err != nil {
			p.add(at("vault", "ca_file"), "vault.ca_file: %v", err)
		}
		c.Vault.CAs = ders
	}
	check := func(ref secret.Ref, keys ...any) {
		err := ref.Validate()
		if err == nil && ref.Vault != nil {
			err = errors.New("what opens Vault can't be in it: use file, env or credential")
		}
		if err != nil {
			p.add(at(keys...), "vault.%v: %v", keys[len(keys)-1], err)
		}
	}
	switch {
	case v.AppRole != nil && !v.Token.IsZero():
		p.add(at("vault"), "vault: it has both token and approle: choose one")
	case v.AppRole != nil:
		c.Vault.Mount, c.Vault.RoleID, c.Vault.SecretID = v.AppRole.Mount, v.AppRole.RoleID, v.AppRole.SecretID
		if v.AppRole.RoleID == "" {
			p.add(at("vault", "approle"), "vault.approle: it has no role_id")
		}
		if !vaultName.MatchString(v.AppRole.Mount) {
			p.add(at("vault", "approle", "mount"), "vault.approle.mount: %q is no path", v.AppRole.Mount)
		}
		check(v.AppRole.SecretID, "vault", "approle", "secret_id")
	case v.Token.IsZero():
		p.add(at("vault"), "vault: it has neither token nor approle: set token: {file: ...} or approle: {role_id: ..., secret_id: {file: ...}}")
	default:
		check(v.Token, "vault", "token")
	}
}
