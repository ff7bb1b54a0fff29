package config

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"os"
	"regexp"
	"strings"
)

var (
	sourceForm  = regexp.MustCompile(`^[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?$`)
	dsnUser     = regexp.MustCompile(`(?i)(^|[\s?&])user\s*=`)
	dsnPassword = regexp.MustCompile(`(?i)(^|\s)(ssl)?password\s*=`)
)

func (p *problems) sources(in file, c *Config, at func(...any) int, deeper func(engine, dsn string) error) {
	if len(in.Sources) > maxSources {
		p.add(at("sources"), "sources: %d are more than %d", len(in.Sources), maxSources)
		return
	}
	seen := map[string]bool{}
	for i, s := range in.Sources {
		line := func(keys ...any) int { return at(append([]any{"sources", i}, keys...)...) }
		where := fmt.Sprintf("sources[%d]", i)
		if s.Name != "" {
			where = "source " + s.Name
		}
		switch {
		case s.Name == "":
			p.add(line(), "%s: it has no name", where)
		case !sourceForm.MatchString(s.Name):
			p.add(line("name"), "source name %q is not 1 to 63 of a-z, 0-9, - and _, beginning and ending with a letter or digit", s.Name)
		case seen[s.Name]:
			p.add(line("name"), "%s: there are two of this name", where)
		}
		seen[s.Name] = true
		switch s.Engine {
		case "postgres":
			if s.Password.Dynamic() {
				s.DSN = withUser(s.DSN)
			}
			err := checkDSN(s.DSN)
			if err == nil && deeper != nil {
				err = deeper(s.Engine, s.DSN)
			}
			if err != nil {
				p.add(line("dsn"), "%s: dsn: %v", where, err)
			}
		case "mysql":
			if s.Password.Dynamic() {
				s.DSN = withUser(s.DSN)
			}
			var err error
			switch {
			case strings.TrimSpace(s.DSN) == "":
				err = errors.New("it is empty: set host, dbname and user")
			case dsnPassword.MatchString(s.DSN):
				err = errors.New("it holds a password: use password: {file: ...} beside it")
			case deeper != nil:
				err = deeper(s.Engine, s.DSN)
			}
			if err != nil {
				p.add(line("dsn"), "%s: dsn: %v", where, err)
			}
		case "sqlite":
			var err error
			switch {
			case strings.TrimSpace(s.DSN) == "":
				err = errors.New("it is empty: write path=/srv/data/app.db")
			case deeper != nil:
				err = deeper(s.Engine, s.DSN)
			}
			if err != nil {
				p.add(line("dsn"), "%s: dsn: %v", where, err)
			}
			if !s.Password.IsZero() {
				p.add(line("password"), "%s: password: SQLite has none: remove it", where)
			}
		case "":
			p.add(line(), "%s: it has no engine: set engine: postgres", where)
		default:
			p.add(line("engine"), "%s: engine %q is unknown: use postgres, mysql (also for MariaDB) or sqlite", where, s.Engine)
		}
		if !s.Password.IsZero() {
			if err := s.Password.Validate(); err != nil {
				p.add(line("password"), "%s: password: %v", where, err)
			} else if s.Password.Vault != nil && c.Vault.Address == "" {
				p.add(line("password"), "%s: password: vault: the file says nothing of the Vault: add vault: {address: ..., token: {file: ...}} at its top", where)
			}
		}
		checked, err := s.Policy.Source()
		if err == nil {
			err = s.Policy.CheckEngine(s.Engine)
		}
		if err != nil {
			// Its text begins with the key: policy.max_rows: ...
			key, _, _ := strings.Cut(strings.TrimPrefix(err.Error(), "policy."), ":")
			p.add(line("policy", key), "%s: %v", where, err)
		}
		c.Sources = append(c.Sources, Source{Name: s.Name, Engine: s.Engine, DSN: s.DSN, Password: s.Password, Policy: checked})
	}
}

// withUser gives a DSN without a user one, for a source whose users Vault makes.
func withUser(dsn string) string {
	const name = "vault"
	u, err := url.Parse(dsn)
	switch {
	case strings.TrimSpace(dsn) == "" || err == nil && u.User != nil || dsnUser.MatchString(dsn):
		return dsn
	case strings.HasPrefix(dsn, "postgres://") || strings.HasPrefix(dsn, "postgresql://"):
		if err != nil {
			return dsn
		}
		u.User = url.User(name)
		return u.String()
	}
	return dsn + " user=" + name
}

// checkDSN refuses a password in the DSN: it would be in this file, which more
// people read than may know it.
func checkDSN(dsn string) error {
	const instead = "use password: {file: ...} beside it"
	if strings.TrimSpace(dsn) == "" {
		return errors.New("it is empty: set host, dbname and user")
	}
	if strings.HasPrefix(dsn, "postgres://") || strings.HasPrefix(dsn, "postgresql://") {
		u, err := url.Parse(dsn)
		if err != nil {
			return errors.New("it is not a URL") // err would show a password
		}
		if _, has := u.User.Password(); has || u.Query().Has("password") || u.Query().Has("sslpassword") {
			return errors.New("it holds a password: " + instead)
		}
		return nil
	}
	if dsnPassword.MatchString(dsn) {
		return errors.New("it holds a password: " + instead)
	}
	if !strings.Contains(dsn, "=") {
		return errors.New("it is neither postgres://... nor KEY=VALUE pairs such as host=/run/postgresql dbname=warehouse user=reader")
	}
	return nil
}

// ReadBundle reads PEM certificates to trust beside the system's, and returns them in DER. Every block must be a good certificate:
// x509.CertPool would pass over the others and trust less than the owner thinks.
func ReadBundle(path string) (ders [][]byte, err error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	begins := strings.Count(string(raw), "-----BEGIN")
	for n := 1; ; n++ {
		var block *pem.Block
		if block, raw = pem.Decode(raw); block == nil {
			switch {
			case begins == 0:
				return nil, fmt.Errorf("%s holds no PEM certificate", path)
			case n != begins+1:
				return nil, fmt.Errorf("%s: a block is malformed", path)
			}
			return ders, nil
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s: block %d is a %q, not a certificate", path, n, block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: block %d is malformed: %w", path, n, err)
		}
		ders = append(ders, cert.Raw)
	}
}
