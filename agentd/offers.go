package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base32"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/postern-dev/postern/agentd/config"
	"github.com/postern-dev/postern/agentd/control"
	"github.com/postern-dev/postern/agentd/sqlsession"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// offerLife is how long a one-time token is good.
	offerLife = 15 * time.Minute
	// maxOffers bounds the sources that are offered at once; the oldest goes.
	maxOffers = 16
)

// offers are data sources that may be checked before they are saved. It is safe
// for concurrent use.
type offers struct {
	mu   sync.Mutex
	list []offer // oldest first
}

type offer struct {
	source  sqlsession.Source
	hash    [sha256.Size]byte
	expires time.Time
}

// add keeps a source and returns the token for it.
func (o *offers) add(s sqlsession.Source, now time.Time) (token string, expires time.Time) {
	var random [20]byte
	rand.Read(random[:]) //nolint:errcheck // it never fails
	token = "pct1_" + strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(random[:]))
	expires = now.Add(offerLife)
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.list) == maxOffers {
		o.list = o.list[1:]
	}
	o.list = append(o.list, offer{s, sha256.Sum256([]byte(token)), expires})
	return token, expires
}

// take takes a source out, by its name and token; false when there is none.
func (o *offers) take(name, token string, now time.Time) (s sqlsession.Source, ok bool) {
	hash := sha256.Sum256([]byte(token))
	o.mu.Lock()
	defer o.mu.Unlock()
	o.list = slices.DeleteFunc(o.list, func(x offer) bool {
		if now.After(x.expires) {
			return true
		}
		if x.source.Name == name && subtle.ConstantTimeCompare(hash[:], x.hash[:]) == 1 {
			s, ok = x.source, true
			return true
		}
		return false
	})
	return s, ok
}

// checkCandidate checks a source of a file that is not in force, and offers it.
func (d *Daemon) checkCandidate(ctx context.Context, c control.Candidate) control.CandidateAnswer {
	s, err := d.candidate(c)
	if err != nil {
		return control.CandidateAnswer{Error: err.Error()}
	}
	answer := control.CandidateAnswer{Source: s.Name, Checks: plainChecks(d.sessions.CheckUnsaved(ctx, s))}
	if c.Offer {
		answer.Token, answer.Expires = d.offers.add(s, time.Now())
	}
	return answer
}

// candidate is the source that a candidate means.
func (d *Daemon) candidate(c control.Candidate) (sqlsession.Source, error) {
	parsed, err := config.Parse(c.File, []byte(c.Text), sqlsession.ValidateDSN)
	if err != nil {
		return sqlsession.Source{}, err
	}
	sources := mapSources(parsed, d.secrets, d.vault, nil)
	switch {
	case len(sources) == 0:
		return sqlsession.Source{}, fmt.Errorf("%s declares no data source: write it under sources: as in agentd.yaml", c.File)
	case c.Source == "" && len(sources) > 1:
		return sqlsession.Source{}, fmt.Errorf("%s declares %d data sources: say which", c.File, len(sources))
	case c.Source == "":
		return sources[0], nil
	}
	for _, s := range sources {
		if s.Name == c.Source {
			return s, nil
		}
	}
	return sqlsession.Source{}, fmt.Errorf("%s declares no data source %q", c.File, c.Source)
}

// checkOffered is for the control plane: see host.Config.
func (d *Daemon) checkOffered(ctx context.Context, name, token string) ([]*posternv1.Check, bool) {
	s, ok := d.offers.take(name, token, time.Now())
	if !ok {
		return nil, false
	}
	return d.sessions.CheckUnsaved(ctx, s), true
}
