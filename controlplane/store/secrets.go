package store

import (
	"context"
	"database/sql"
	"errors"
	"time"

	posternproto "github.com/postern-dev/postern/proto"
)

// Scopes of secrets, as they are stored.
const (
	SecretOwn          = "own"
	SecretWorkspace    = "workspace"
	SecretOrganization = "organization"
)

const (
	// maxSecrets and maxSecretGrants bound those of an organization.
	maxSecrets      = 10_000
	maxSecretGrants = 100_000
	// maxSecretsOfOne bounds those of a token or a workspace.
	maxSecretsOfOne = 500
)

// SecretRow is a secret as it is stored: its value is sealed by the caller.
type SecretRow struct {
	ID, Organization string
	// Scope is SecretOwn (Owner is a token's id, OwnerName its name), SecretWorkspace
	// (Owner is the workspace's name) or SecretOrganization (Owner is empty).
	Scope, Owner, OwnerName, Name string
	Sealed                        []byte
	Created, Changed              time.Time
	ChangedBy                     string
}

// SecretGrantRow is who has a secret: a kernel, or all kernels of a token.
type SecretGrantRow struct {
	// Secret is its id; empty: hosts read the secret of this name themselves.
	Secret, Name string
	// Kernel is empty if Token, with TokenName, is not.
	Kernel, Token, TokenName string
}

const secretColumns = "s.id, s.organization, s.scope, s.owner, s.owner_name, s.name, s.sealed, s.created, s.changed, s.changed_by"

func scanSecret(scan func(...any) error) (SecretRow, error) {
	var r SecretRow
	var created, changed int64
	err := scan(&r.ID, &r.Organization, &r.Scope, &r.Owner, &r.OwnerName, &r.Name, &r.Sealed, &created, &changed, &r.ChangedBy)
	r.Created, r.Changed = time.UnixMilli(created).UTC(), time.UnixMilli(changed).UTC()
	return r, err
}

// PutSecret makes a secret, or gives the one of its organization, scope, owner and name
// another value; it returns what is stored. OVERLOADED means that the organization has
// too many.
func (s *Store) PutSecret(ctx context.Context, r SecretRow) (out SecretRow, err error) {
	err = s.write(ctx, "keep a secret", func(tx handle) error {
		master, err := s.sealable(ctx, tx, r.Sealed)
		if err != nil {
			return err
		}
		var n int
		if err := tx.row(ctx, "SELECT count(*) FROM secrets WHERE organization = ?", r.Organization).Scan(&n); err != nil {
			return err
		}
		changed, err := tx.exec(ctx, `UPDATE secrets SET sealed = ?, master = ?, changed = ?, changed_by = ?, owner_name = ?
			WHERE organization = ? AND scope = ? AND owner = ? AND name = ?`,
			r.Sealed, master, millis(r.Changed), plainText(r.ChangedBy), plainText(r.OwnerName), r.Organization, r.Scope, plainText(r.Owner), plainText(r.Name))
		if err != nil {
			return err
		}
		if changed == 0 {
			if n >= maxSecrets {
				return posternproto.Errorf(posternproto.CodeOverloaded, "the organization has %d secrets: remove some", n)
			}
			if err := tx.row(ctx, "SELECT count(*) FROM secrets WHERE organization = ? AND scope = ? AND owner = ?", r.Organization, r.Scope, plainText(r.Owner)).Scan(&n); err != nil {
				return err
			}
			if n >= maxSecretsOfOne && r.Scope != SecretOrganization {
				return posternproto.Errorf(posternproto.CodeOverloaded, "%s has %d secrets: remove some", r.OwnerName, n)
			}
			if _, err := tx.exec(ctx, `INSERT INTO secrets (id, organization, scope, owner, owner_name, name, sealed, created, changed, changed_by, master)
				VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
				r.ID, r.Organization, r.Scope, plainText(r.Owner), plainText(r.OwnerName), plainText(r.Name), r.Sealed, millis(r.Changed), millis(r.Changed), plainText(r.ChangedBy), master); err != nil {
				return err
			}
		}
		out, err = scanSecret(tx.row(ctx, "SELECT "+secretColumns+" FROM secrets s WHERE organization = ? AND scope = ? AND owner = ? AND name = ?", r.Organization, r.Scope, plainText(r.Owner), plainText(r.Name)).Scan)
		return err
	})
	return out, err
}

// Secret finds a secret, or NOT_FOUND.
func (s *Store) Secret(ctx context.Context, organization, scope, owner, name string) (SecretRow, error) {
	r, err := scanSecret(s.reader().row(ctx, "SELECT "+secretColumns+" FROM secrets s WHERE organization = ? AND scope = ? AND owner = ? AND name = ?",
		organization, scope, plainText(owner), plainText(name)).Scan)
	if errors.Is(err, sql.ErrNoRows) {
		return SecretRow{}, notFound("secret", name)
	}
	return r, s.fail(ctx, "find a secret", err)
}

// Secrets are those of an organization, by name.
func (s *Store) Secrets(ctx context.Context, organization string) ([]SecretRow, error) {
	rows, err := s.reader().query(ctx, "SELECT "+secretColumns+" FROM secrets s WHERE s.organization = ? ORDER BY s.name, s.scope, s.owner", organization)
	return collect(ctx, s, "list secrets", rows, err, func(rows *sql.Rows) (SecretRow, error) { return scanSecret(rows.Scan) })
}

// DeleteSecret removes a secret and its grants; it may be gone already.
func (s *Store) DeleteSecret(ctx context.Context, organization, id string) error {
	return s.write(ctx, "remove a secret", func(tx handle) error {
		_, err := tx.exec(ctx, "DELETE FROM secrets WHERE organization = ? AND id = ?", organization, id)
		return err
	})
}

// PutSecretGrant keeps a grant; it may be there already. NOT_FOUND means that the secret
// or the kernel is gone.
func (s *Store) PutSecretGrant(ctx context.Context, organization string, g SecretGrantRow, now time.Time) error {
	return s.write(ctx, "grant a secret", func(tx handle) error {
		var n int
		if err := tx.row(ctx, "SELECT count(*) FROM secret_grants WHERE organization = ?", organization).Scan(&n); err != nil {
			return err
		}
		if n >= maxSecretGrants {
			return posternproto.Errorf(posternproto.CodeOverloaded, "the organization has %d grants of secrets: remove some", n)
		}
		for _, there := range []struct{ table, id string }{{"secrets", g.Secret}, {"kernels", g.Kernel}} {
			if there.id == "" {
				continue
			}
			if err := tx.row(ctx, "SELECT count(*) FROM "+there.table+" WHERE organization = ? AND id = ?", organization, plainText(there.id)).Scan(&n); err != nil {
				return err
			}
			if n == 0 {
				return notFound(there.table[:len(there.table)-1], firstText(there.id, g.Name))
			}
		}
		_, err := tx.exec(ctx, "INSERT INTO secret_grants (organization, secret, name, kernel, token, token_name, created) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
			organization, orNull(g.Secret), plainText(g.Name), orNull(g.Kernel), plainText(g.Token), plainText(g.TokenName), millis(now))
		return err
	})
}

// DeleteSecretGrant takes a grant back, or NOT_FOUND.
func (s *Store) DeleteSecretGrant(ctx context.Context, organization string, g SecretGrantRow) error {
	return s.write(ctx, "take a secret back", func(tx handle) error {
		n, err := tx.exec(ctx, "DELETE FROM secret_grants WHERE organization = ? AND coalesce(secret, '') = ? AND name = ? AND coalesce(kernel, '') = ? AND token = ?",
			organization, g.Secret, plainText(g.Name), plainText(g.Kernel), plainText(g.Token))
		if err == nil && n == 0 {
			err = notFound("grant of secret", g.Name)
		}
		return err
	})
}

// SecretGrants are those of an organization.
func (s *Store) SecretGrants(ctx context.Context, organization string) ([]SecretGrantRow, error) {
	rows, err := s.reader().query(ctx, "SELECT secret, name, kernel, token, token_name FROM secret_grants WHERE organization = ? ORDER BY created, name", organization)
	return collect(ctx, s, "list grants of secrets", rows, err, func(rows *sql.Rows) (SecretGrantRow, error) {
		var g SecretGrantRow
		var secret, kernel sql.NullString
		err := rows.Scan(&secret, &g.Name, &kernel, &g.Token, &g.TokenName)
		g.Secret, g.Kernel = secret.String, kernel.String
		return g, err
	})
}

// SecretsOfKernel are the secrets that a kernel of a token is to have: those granted to
// it, to its token, and those of its workspaces. Names without a secret are read by the
// host. A name may be there more than once.
func (s *Store) SecretsOfKernel(ctx context.Context, organization, kernel, token string) (secrets []SecretRow, fromHost []string, err error) {
	rows, err := s.reader().query(ctx, "SELECT "+secretColumns+` FROM secrets s WHERE s.organization = ? AND (
		s.id IN (SELECT g.secret FROM secret_grants g WHERE g.organization = ? AND (g.kernel = ? OR g.token = ?))
		OR s.scope = 'workspace' AND s.owner IN (SELECT w.workspace FROM kernel_workspaces w WHERE w.kernel = ?)) ORDER BY s.name, s.id`,
		organization, organization, plainText(kernel), token, plainText(kernel))
	secrets, err = collect(ctx, s, "list a kernel's secrets", rows, err, func(rows *sql.Rows) (SecretRow, error) { return scanSecret(rows.Scan) })
	if err != nil {
		return nil, nil, err
	}
	rows, err = s.reader().query(ctx, "SELECT DISTINCT g.name FROM secret_grants g WHERE g.organization = ? AND g.secret IS NULL AND (g.kernel = ? OR g.token = ?) ORDER BY g.name", organization, plainText(kernel), token)
	fromHost, err = collect(ctx, s, "list a kernel's secrets", rows, err, func(rows *sql.Rows) (name string, err error) {
		return name, rows.Scan(&name)
	})
	return secrets, fromHost, err
}

// PutKernelWorkspaces remembers what a kernel was started with.
func (s *Store) PutKernelWorkspaces(ctx context.Context, kernel string, workspaces []string) error {
	return s.write(ctx, "remember a kernel's workspaces", func(tx handle) error {
		for _, w := range workspaces {
			if _, err := tx.exec(ctx, "INSERT INTO kernel_workspaces (kernel, workspace) VALUES (?, ?) ON CONFLICT DO NOTHING", plainText(kernel), plainText(w)); err != nil {
				return err
			}
		}
		return nil
	})
}

// CopyKernelGrants gives a kernel the grants and workspaces of another one.
func (s *Store) CopyKernelGrants(ctx context.Context, organization, from, to string, now time.Time) error {
	return s.write(ctx, "copy a kernel's grants", func(tx handle) error {
		if _, err := tx.exec(ctx, `INSERT INTO secret_grants (organization, secret, name, kernel, token, token_name, created)
			SELECT organization, secret, name, ?, token, token_name, ? FROM secret_grants WHERE organization = ? AND kernel = ? ON CONFLICT DO NOTHING`,
			plainText(to), millis(now), organization, plainText(from)); err != nil {
			return err
		}
		_, err := tx.exec(ctx, "INSERT INTO kernel_workspaces (kernel, workspace) SELECT ?, workspace FROM kernel_workspaces WHERE kernel = ? ON CONFLICT DO NOTHING", plainText(to), plainText(from))
		return err
	})
}

// KernelsWithSecret are the kernels that have, or are to have, a secret: an empty id means
// the one of this name that hosts read.
func (s *Store) KernelsWithSecret(ctx context.Context, organization, id, name string) ([]KernelRow, error) {
	rows, err := s.reader().query(ctx, "SELECT "+kernelColumns+` FROM kernels WHERE organization = ? AND (
		id IN (SELECT g.kernel FROM secret_grants g WHERE g.organization = ? AND coalesce(g.secret, '') = ? AND g.name = ? AND g.kernel IS NOT NULL)
		OR token IN (SELECT g.token FROM secret_grants g WHERE g.organization = ? AND coalesce(g.secret, '') = ? AND g.name = ? AND g.token <> '')
		OR id IN (SELECT w.kernel FROM kernel_workspaces w JOIN secrets s ON s.scope = 'workspace' AND s.owner = w.workspace AND s.organization = ? WHERE s.id = ?))
		ORDER BY started, id`, organization, organization, id, plainText(name), organization, id, plainText(name), organization, id)
	return collect(ctx, s, "list kernels with a secret", rows, err, func(rows *sql.Rows) (KernelRow, error) { return scanKernel(rows.Scan) })
}

// KernelsWithSecrets are the kernels of an agent, or of all, that have or are to have any.
func (s *Store) KernelsWithSecrets(ctx context.Context, organization, agent string) ([]KernelRow, error) {
	rows, err := s.reader().query(ctx, "SELECT "+kernelColumns+` FROM kernels WHERE organization = ? AND (? = '' OR agent = ?) AND (
		id IN (SELECT g.kernel FROM secret_grants g WHERE g.organization = ? AND g.kernel IS NOT NULL)
		OR token IN (SELECT g.token FROM secret_grants g WHERE g.organization = ? AND g.token <> '')
		OR id IN (SELECT w.kernel FROM kernel_workspaces w))
		ORDER BY started, id`, organization, agent, agent, organization, organization)
	return collect(ctx, s, "list kernels with secrets", rows, err, func(rows *sql.Rows) (KernelRow, error) { return scanKernel(rows.Scan) })
}

func orNull(text string) sql.NullString {
	return sql.NullString{String: plainText(text), Valid: text != ""}
}

func firstText(a, b string) string {
	if a != "" {
		return a
	}
	return b
}
