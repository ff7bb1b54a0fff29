package store

import (
	"context"
	"database/sql"
	"errors"
	"regexp"
	"time"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// The organization that every installation has. Its id is fixed, so that
// several control planes that start together make one.
const (
	DefaultOrganizationID   = proto.OrganizationPrefix + "default"
	DefaultOrganizationName = "default"
)

// namePattern is what names of organizations, tokens and agents look like.
var namePattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

func checkName(what, name string) error {
	if !namePattern.MatchString(name) {
		return proto.Errorf(proto.CodeInvalid, "%s %q is not a name: use 1 to 63 of a-z, 0-9 and -, not at the ends", what, clip(name))
	}
	return nil
}

const organizationColumns = "o.id, o.name, o.created, o.disabled"

type organizationRow struct {
	o        posternv1.Organization
	created  int64
	disabled sql.NullInt64
}

func (r *organizationRow) into() []any { return []any{&r.o.Id, &r.o.Name, &r.created, &r.disabled} }

func (r *organizationRow) value() *posternv1.Organization {
	r.o.Created, r.o.Disabled = stamp(r.created), r.disabled.Valid
	return &r.o
}

// EnsureDefaultOrganization makes the default organization if there is none.
func (s *Store) EnsureDefaultOrganization(ctx context.Context, now time.Time) (*posternv1.Organization, error) {
	err := s.write(ctx, "make the default organization", func(tx handle) error {
		_, err := tx.exec(ctx, "INSERT INTO organizations (id, name, created) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
			DefaultOrganizationID, DefaultOrganizationName, millis(now))
		return err
	})
	if err != nil {
		return nil, err
	}
	return s.GetOrganization(ctx, DefaultOrganizationID)
}

// CreateOrganization makes an organization; ALREADY_EXISTS if the name is taken.
func (s *Store) CreateOrganization(ctx context.Context, name string, now time.Time) (*posternv1.Organization, error) {
	if err := checkName("organization", name); err != nil {
		return nil, err
	}
	o := &posternv1.Organization{Id: proto.NewID(proto.OrganizationPrefix), Name: name, Created: stamp(millis(now))}
	err := s.write(ctx, "create organization", func(tx handle) error {
		_, err := tx.exec(ctx, "INSERT INTO organizations (id, name, created) VALUES (?, ?, ?)", o.Id, name, millis(now))
		if isUnique(err) {
			return proto.Errorf(proto.CodeAlreadyExists, "organization %q exists already", name)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return o, nil
}

// GetOrganization finds an organization by id or name.
func (s *Store) GetOrganization(ctx context.Context, idOrName string) (*posternv1.Organization, error) {
	var r organizationRow
	err := s.reader().row(ctx, "SELECT "+organizationColumns+" FROM organizations o WHERE o.id = ? OR o.name = ?",
		plainText(idOrName), plainText(idOrName)).Scan(r.into()...)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, notFound("organization", idOrName)
	}
	if err != nil {
		return nil, s.fail(ctx, "get organization", err)
	}
	return r.value(), nil
}

// ListOrganizations lists all, by name.
func (s *Store) ListOrganizations(ctx context.Context) ([]*posternv1.Organization, error) {
	rows, err := s.reader().query(ctx, "SELECT "+organizationColumns+" FROM organizations o ORDER BY o.name")
	return collect(ctx, s, "list organizations", rows, err, func(rows *sql.Rows) (*posternv1.Organization, error) {
		var r organizationRow
		err := rows.Scan(r.into()...)
		return r.value(), err
	})
}

// SetOrganizationDisabled disables or enables an organization, found by id or
// name. The default organization cannot be disabled: nobody could enable it.
func (s *Store) SetOrganizationDisabled(ctx context.Context, idOrName string, disabled bool, now time.Time) (*posternv1.Organization, error) {
	o, err := s.GetOrganization(ctx, idOrName)
	if err != nil {
		return nil, err
	}
	if o.Id == DefaultOrganizationID && disabled {
		return nil, proto.Errorf(proto.CodeInvalid, "organization %q runs the installation and cannot be disabled", o.Name)
	}
	err = s.write(ctx, "disable organization", func(tx handle) error {
		var err error
		if disabled {
			_, err = tx.exec(ctx, "UPDATE organizations SET disabled = ? WHERE id = ? AND disabled IS NULL", millis(now), o.Id)
		} else {
			_, err = tx.exec(ctx, "UPDATE organizations SET disabled = NULL WHERE id = ?", o.Id)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return s.GetOrganization(ctx, o.Id)
}

// collect reads all rows of a query whose error it checks first.
func collect[T any](ctx context.Context, s *Store, op string, rows *sql.Rows, err error, scan func(*sql.Rows) (T, error)) ([]T, error) {
	if err != nil {
		return nil, s.fail(ctx, op, err)
	}
	defer func() { _ = rows.Close() }()
	var all []T
	for rows.Next() {
		one, err := scan(rows)
		if err != nil {
			return nil, s.fail(ctx, op, err)
		}
		all = append(all, one)
	}
	return all, s.fail(ctx, op, rows.Err())
}
