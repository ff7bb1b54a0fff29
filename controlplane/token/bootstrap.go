package token

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/postern-dev/postern/proto"
)

// Bootstrap makes the default organization and, if that has no usable admin
// token, one that does not expire, whose text it writes to file (0600). So it
// does at the first start, and again for an operator who has lost all admin
// tokens: revoke them or let them expire, and start anew. It reports whether it
// wrote the file.
func (s *Service) Bootstrap(ctx context.Context, file string) (bool, error) {
	now := s.cfg.Now()
	org, err := s.cfg.Store.EnsureDefaultOrganization(ctx, now)
	if err != nil {
		return false, fmt.Errorf("make the default organization: %w", err)
	}
	admins, err := s.cfg.Store.CountAdmins(ctx, org.Id, now)
	if err != nil || admins > 0 {
		return false, err
	}
	text := NewText()
	// The file first: a token in the store that nobody has would keep us from
	// making another.
	if err := replaceFile(file, []byte(text.Encode()+"\n")); err != nil {
		return false, fmt.Errorf("write the admin token: %w", err)
	}
	name := "admin"
	for {
		_, _, err = s.create(ctx, org.Id, name, string(Admin), text, nil)
		if proto.CodeOf(err) != proto.CodeAlreadyExists {
			break
		}
		// Another control plane on the same database was first, or the name is
		// taken by a token that is none of an admin's or has expired.
		if admins, err = s.cfg.Store.CountAdmins(ctx, org.Id, now); err != nil || admins > 0 {
			return false, errors.Join(err, os.Remove(file))
		}
		name = "admin-" + madeUp()
	}
	if err != nil {
		return false, errors.Join(fmt.Errorf("make the admin token: %w", err), os.Remove(file))
	}
	return true, nil
}

// replaceFile writes a file whole or not at all, mode 0600, and waits for the
// disk.
func replaceFile(path string, content []byte) error {
	dir := filepath.Dir(path)
	// What a killed start left half written.
	left, err := filepath.Glob(filepath.Join(dir, filepath.Base(path)+".*"))
	if err != nil {
		return err
	}
	for _, name := range left {
		if err := os.Remove(name); err != nil {
			return err
		}
	}
	temp, err := os.CreateTemp(dir, filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return err
	}
	_, err = temp.Write(content)
	if err = errors.Join(err, temp.Sync(), temp.Close()); err == nil {
		err = os.Rename(temp.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(temp.Name()))
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
