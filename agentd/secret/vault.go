package secret

import (
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"strings"
)

// VaultRef names a secret of HashiCorp Vault: either KV or Role is set.
type VaultRef struct {
	// KV is MOUNT/PATH of a secret of the KV v2 engine, such as
	// secret/warehouse. The mount is the first element; Mount says otherwise.
	KV    string `yaml:"kv"`
	Mount string `yaml:"mount"`
	// Field is the key of the password in it; "" means password.
	Field string `yaml:"field"`
	// Role is MOUNT/creds/ROLE of the database engine: Vault makes a user for
	// us and ends it.
	Role string `yaml:"role"`
}

// Dynamic tells whether Vault makes the user, too.
func (r Ref) Dynamic() bool { return r.Vault != nil && r.Vault.Role != "" }

// Split is the mount and the path in it of a KV secret.
func (v VaultRef) Split() (mount, path string) {
	if v.Mount != "" {
		return v.Mount, strings.TrimPrefix(v.KV, v.Mount+"/")
	}
	mount, path, _ = strings.Cut(v.KV, "/")
	return mount, path
}

var vaultPath = regexp.MustCompile(`^[A-Za-z0-9_.@+-]+(/[A-Za-z0-9_.@+ -]+)*$`)

// climbs tells whether a path has . or .. in it.
func climbs(path string) bool {
	for _, element := range strings.Split(path, "/") {
		if element == "." || element == ".." {
			return true
		}
	}
	return false
}

func (v VaultRef) validate() error {
	switch {
	case (v.KV == "") == (v.Role == ""):
		return errors.New("vault: exactly one of kv and role must be given, such as {vault: {kv: secret/warehouse}} or {vault: {role: database/creds/reader}}")
	case v.Role != "" && (v.Field != "" || v.Mount != ""):
		return errors.New("vault: field and mount go with kv alone")
	case v.Role != "" && (!vaultPath.MatchString(v.Role) || !strings.Contains(v.Role, "/") || climbs(v.Role)):
		return fmt.Errorf("vault: role %q is not a path such as database/creds/reader", v.Role)
	case v.Role != "":
		return nil
	}
	mount, path := v.Split()
	if !vaultPath.MatchString(v.KV) || mount == "" || path == "" || v.Mount != "" && !vaultPath.MatchString(v.Mount) || climbs(v.KV) {
		return fmt.Errorf("vault: kv %q is not MOUNT/PATH such as secret/warehouse", v.KV)
	}
	if strings.HasPrefix(path, "data/") {
		return fmt.Errorf("vault: kv %q: write the path as in vault kv get, without data/", v.KV)
	}
	return nil
}

// ValidateVaultAddress checks the URL of a Vault. Its error is one line.
func ValidateVaultAddress(address string) error {
	u, err := url.Parse(address)
	switch {
	case err != nil, u.Scheme != "https" && u.Scheme != "http", u.Hostname() == "", u.User != nil, u.RawQuery != "", u.Fragment != "", strings.Trim(u.Path, "/") != "":
		return errors.New("it is not a URL such as https://vault.example.com:8200")
	case u.Scheme == "http" && u.Hostname() != "localhost" && !strings.HasPrefix(u.Hostname(), "127.") && u.Hostname() != "::1":
		return fmt.Errorf("%s is not encrypted: use https", address)
	}
	return nil
}
