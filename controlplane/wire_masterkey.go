package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/controlplane/api"
	"github.com/postern-dev/postern/controlplane/masterkey"
	"github.com/postern-dev/postern/controlplane/query"
	"github.com/postern-dev/postern/controlplane/secret"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// The rotation of the master key. Each step is one transaction in the store, and any control plane of the installation
// takes the next one when it is due:
//
//	announced   the new key is on the disk of the control plane that was asked, and the others fetch it from each other.
//	            When it was there for a while and all of them have it, it
//	active      seals, and the one before is
//	old         what it sealed is sealed anew, in steps. When nothing is left, and all control planes seal with the new one, it is
//	closed      the store takes nothing any more that it seals; control planes prove themselves to each other with the new one. A while
//	            later, when nothing is sealed by it still, it is
//	retired     and each control plane takes it out of its file.

const (
	// masterTick is how often each control plane looks how far a rotation is.
	masterTick = 2 * time.Second
	// resealFor bounds how long what is sealed anew goes on in a tick: the rest of it is for others.
	resealFor = masterTick / 2
)

// Stages of a rotation, for people.
const (
	masterStable    = "stable"
	masterAnnounced = "announced"
	masterSealing   = "sealing"
	masterClosing   = "closing"
)

// masterRotation rotates the master key.
type masterRotation struct {
	server *Server
	sight  masterSight
}

var _ api.MasterKeys = (*masterRotation)(nil)

// openMasterKeys says which key seals, at the start, before anything is sealed or opened.
func (s *Server) openMasterKeys(ctx context.Context, keys *masterkey.Keys) error {
	if err := s.store.FirstMasterKey(ctx, keys.Active(), time.Now()); err != nil {
		return err
	}
	all, err := s.store.MasterKeys(ctx)
	if err != nil {
		return err
	}
	return useMasterKeys(keys, all)
}

// useMasterKeys has the key seal that the store says.
func useMasterKeys(keys *masterkey.Keys, all []store.MasterKey) error {
	active, shown := "", ""
	for _, k := range all {
		if k.State == store.MasterActive {
			active = k.ID
		}
		// The oldest that all have: a control plane that does not know of the rotation yet believes it, too.
		if shown == "" && (k.State == store.MasterOld || k.State == store.MasterActive) {
			shown = k.ID
		}
	}
	if !keys.Has(active) {
		return fmt.Errorf("master key: DATA/master.key does not have the key %s, with which this installation seals: copy the file from another control plane of it, or restore the one of the same age as the database", active)
	}
	if !keys.Has(shown) {
		shown = active
	}
	keys.Use(active, shown)
	return nil
}

// followMasterKeys takes rotations further until ctx ends.
func (s *Server) followMasterKeys(ctx context.Context) {
	tick := time.NewTicker(masterTick)
	defer tick.Stop()
	for {
		if err := s.masters.step(ctx, time.Now()); err != nil && ctx.Err() == nil {
			s.log.Warn("rotation of the master key not taken further", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// step learns what the store says, gets what is missing, and takes the step that is due, if any.
func (m *masterRotation) step(ctx context.Context, now time.Time) (err error) {
	s := m.server
	defer func() {
		if ctx.Err() == nil {
			m.sight.failed(err)
		}
	}()
	keys := s.ca.Keys()
	var problems []string
	if err := keys.Refresh(); err != nil {
		problems = append(problems, err.Error())
	}
	all, err := s.store.MasterKeys(ctx)
	if err != nil {
		return err
	}
	for _, k := range all {
		switch {
		case k.State == store.MasterRetired && keys.Has(k.ID):
			if err := keys.Drop(k.ID); err != nil {
				problems = append(problems, err.Error()+": take it out with `controlplane master-key remove FILE "+k.ID+"` (docs/controlplane.md)")
			}
		case k.State != store.MasterRetired && !keys.Has(k.ID):
			if err := m.fetch(ctx, k.ID); err != nil {
				problems = append(problems, err.Error())
			}
		}
	}
	if err := useMasterKeys(keys, all); err != nil {
		problems = append(problems, err.Error())
	}
	if problem := oneLine(strings.Join(problems, "; ")); m.sight.problem(problem) && problem != "" {
		s.log.Error("master keys", "err", problem)
	}
	if err := m.sight.follow(ctx, s.store, all); err != nil || stageOf(all) == masterStable {
		return err
	}
	_, err = s.store.Exclusively(ctx, "master key", func(ctx context.Context) error { return m.advance(ctx, now, all) })
	return err
}

// fetch gets a key from another control plane.
func (m *masterRotation) fetch(ctx context.Context, id string) error {
	s := m.server
	err := error(proto.Errorf(proto.CodeUnavailable, "no other control plane is there to get it from"))
	for _, base := range s.replicas.bases() {
		var key []byte
		if key, err = s.replicas.masterKey(ctx, base, id); err == nil {
			err = s.ca.Keys().Add(id, key)
			clear(key)
		}
		if err == nil {
			s.log.Info("master key got from another control plane", "key", id)
			return nil
		}
	}
	return fmt.Errorf("the master key %s is not in DATA/master.key (%w): copy the file from the control plane that has it", id, err)
}

// stageOf is how far a rotation is.
func stageOf(all []store.MasterKey) string {
	stage := masterStable
	for _, k := range all {
		switch k.State {
		case store.MasterAnnounced:
			return masterAnnounced
		case store.MasterOld:
			stage = masterSealing
		case store.MasterClosed:
			if stage == masterStable {
				stage = masterClosing
			}
		}
	}
	return stage
}

// advance takes the step that is due. One control plane is here at a time.
func (m *masterRotation) advance(ctx context.Context, now time.Time, all []store.MasterKey) error {
	s := m.server
	active := ""
	for _, k := range all {
		if k.State == store.MasterActive {
			active = k.ID
		}
	}
	for _, k := range all {
		settled := !now.Before(k.Since.Add(s.masterSettle()))
		switch k.State {
		case store.MasterAnnounced:
			if !settled {
				return nil
			}
			waiting, err := m.replicas(ctx, all)
			if err != nil || slices.ContainsFunc(waiting, func(r *posternv1.MasterKeyReplica) bool { return !slices.Contains(r.Keys, k.ID) }) {
				return err
			}
			done, err := s.store.ActivateMasterKey(ctx, k.ID, now)
			if err != nil || !done {
				return err
			}
			s.log.Info("the new master key seals from now on", "key", k.ID)
			return s.noteMasterKey(ctx, now, "masterkey.activate", k.ID)
		case store.MasterOld:
			if err := m.seal(ctx, active); err != nil {
				return err
			}
			waiting, err := m.replicas(ctx, all)
			if err != nil || slices.ContainsFunc(waiting, func(r *posternv1.MasterKeyReplica) bool { return r.Active != active }) {
				return err
			}
			_, err = s.store.CloseMasterKey(ctx, k.ID, now)
			return err
		case store.MasterClosed:
			if !settled {
				return nil
			}
			done, err := s.store.RetireMasterKey(ctx, k.ID, now)
			if err != nil || !done {
				return err
			}
			s.log.Info("the old master key is retired: nothing is sealed by it", "key", k.ID)
			return s.noteMasterKey(ctx, now, "masterkey.retire", k.ID)
		}
	}
	return nil
}

// masterSettle is how long all control planes have time to learn of a step. With SQLite there is but one.
func (s *Server) masterSettle() time.Duration {
	if s.options.Database == "" && s.options.CASettle == 0 {
		return 0
	}
	return s.caSettle()
}

func (s *Server) noteMasterKey(ctx context.Context, now time.Time, action, id string) error {
	return s.audit.Append(ctx, auditchain.Entry{
		Time: now, Organization: store.DefaultOrganizationID, Actor: "control plane", Action: action, Target: "master key " + id, Outcome: "done",
	})
}

// seal seals anew what other master keys than the active one seal, for a while. What does not open is counted and left.
func (m *masterRotation) seal(ctx context.Context, active string) error {
	s := m.server
	if s.ca.Keys().Active() != active {
		return nil // this one does not know of it yet; the next tick does
	}
	// Keys of files that versions before derived from the first master key.
	for {
		without, err := s.store.WithoutFileKey(ctx)
		if err != nil {
			return err
		}
		for _, organization := range without {
			if _, _, err := s.fileKeys.Newest(ctx, organization); err != nil {
				return err
			}
		}
		if len(without) == 0 {
			break
		}
	}
	bad, names := 0, []string(nil)
	done := func() {
		for _, name := range m.sight.found(names, bad) {
			s.log.Error("not sealed anew: its old master key stays", "what", name)
		}
	}
	for began := time.Now(); time.Since(began) < resealFor && ctx.Err() == nil; {
		stale, err := s.store.StaleSealed(ctx, active, bad)
		if err != nil {
			return err
		}
		if len(stale) == 0 {
			done()
			return nil
		}
		was, now := stale[:0], [][]byte(nil)
		for _, x := range stale {
			fresh, err := s.reseal(x)
			if err != nil {
				if bad++; len(names) < maxBroken {
					names = append(names, brokenName(x))
				}
				s.log.Debug("not sealed anew", "kind", string(x.Kind), "id", x.ID, "err", err)
				continue
			}
			was, now = append(was, x), append(now, fresh)
		}
		if err := s.store.ReplaceSealed(ctx, was, now); err != nil {
			return err
		}
	}
	done()
	return ctx.Err()
}

// reseal seals one thing anew.
func (s *Server) reseal(x store.Sealed) ([]byte, error) {
	switch x.Kind {
	case store.SealedAuthority:
		return s.ca.Reseal(x.ID, x.Sealed)
	case store.SealedSecret:
		return s.ca.Box(secretsOf(x.Organization)).Reseal(x.Sealed, secret.About(secret.Row{Organization: x.Organization, Scope: x.Scope, Owner: x.Owner, Name: x.Name}))
	case store.SealedRows:
		return s.ca.Box(rowsOfQueries).Reseal(x.Sealed, query.RowsAbout(x.Organization, x.ID))
	case store.SealedFileKey:
		return s.fileKeys.Reseal(x.Organization, x.Name, x.Sealed)
	}
	return nil, fmt.Errorf("nobody knows how %s are sealed", x.Kind)
}

// replicas are the control planes on this database, this one included, with the keys that they have. One that is of a version
// before says nothing of keys; one that died counts until it is forgotten.
func (m *masterRotation) replicas(ctx context.Context, all []store.MasterKey) ([]*posternv1.MasterKeyReplica, error) {
	s := m.server
	listed, err := s.store.Replicas(ctx)
	if err != nil {
		return nil, err
	}
	own := &posternv1.MasterKeyReplica{Name: s.replica, Keys: s.ca.Keys().IDs(), Active: s.ca.Keys().Active(), Problem: m.sight.told().Problem}
	out := []*posternv1.MasterKeyReplica{own}
	active := ""
	for _, k := range all {
		if k.State == store.MasterActive {
			active = k.ID
		}
	}
	for _, r := range listed {
		if r.Name == s.replica {
			continue
		}
		one := &posternv1.MasterKeyReplica{Name: r.Name, Keys: r.MasterKeys, Active: r.MasterActive}
		switch {
		case len(r.MasterKeys) == 0:
			one.Problem = "its version knows but one master key: upgrade or stop it"
		case r.MasterActive != active:
			one.Problem = "it does not seal with the newest key yet"
		}
		for _, k := range all {
			if k.State == store.MasterAnnounced && !slices.Contains(r.MasterKeys, k.ID) && one.Problem == "" {
				one.Problem = "it does not have the new key yet: its own log and status say why"
			}
		}
		out = append(out, one)
	}
	return out, nil
}

// Status implements api.MasterKeys.
func (m *masterRotation) Status(ctx context.Context) (*posternv1.MasterKeyStatus, error) {
	s := m.server
	all, err := s.store.MasterKeys(ctx)
	if err != nil {
		return nil, err
	}
	out := &posternv1.MasterKeyStatus{Stage: stageOf(all)}
	active := ""
	for _, k := range all {
		out.Keys = append(out.Keys, &posternv1.MasterKey{Id: k.ID, State: k.State, Made: timestamppb.New(k.Made), Since: timestamppb.New(k.Since)})
		switch k.State {
		case store.MasterActive:
			active = k.ID
		case store.MasterAnnounced:
			out.TakesOver = timestamppb.New(k.Since.Add(s.masterSettle()))
		}
	}
	counts, err := s.store.SealedByOthers(ctx, active)
	if err != nil {
		return nil, err
	}
	for kind, n := range counts {
		if n > 0 {
			out.Left = append(out.Left, &posternv1.SealedCount{Kind: string(kind), Count: n})
		}
	}
	slices.SortFunc(out.Left, func(a, b *posternv1.SealedCount) int { return strings.Compare(a.Kind, b.Kind) })
	if out.Replicas, err = m.replicas(ctx, all); err != nil {
		return nil, err
	}
	out.Waits = m.waits(ctx, all, out.Replicas)
	if out.Stage != masterStable {
		began, moved := masterTimes(all)
		m.sight.mu.Lock()
		defer m.sight.mu.Unlock()
		if m.sight.moved.After(moved) {
			moved = m.sight.moved
		}
		out.Began, out.Moved = timestamppb.New(began), timestamppb.New(moved)
	}
	return out, nil
}

// Rotate implements api.MasterKeys.
func (m *masterRotation) Rotate(ctx context.Context) (*posternv1.MasterKeyStatus, error) {
	s := m.server
	keys := s.ca.Keys()
	all, err := s.store.MasterKeys(ctx)
	if err != nil {
		return nil, err
	}
	if stageOf(all) != masterStable {
		return m.Status(ctx)
	}
	if err := keys.Refresh(); err != nil {
		return nil, proto.Errorf(proto.CodeInvalid, "%w", err)
	}
	// A key that somebody has put into the file, or that was made and not announced, is as good as another.
	next := ""
	for _, id := range keys.IDs() {
		if !slices.ContainsFunc(all, func(k store.MasterKey) bool { return k.ID == id }) {
			next = id
		}
	}
	made := next == ""
	if made {
		if next, err = keys.New(); err != nil {
			return nil, proto.Errorf(proto.CodeInvalid, "no new key can be put into DATA/master.key (%w): where it is a secret of Kubernetes or the like, add one with `controlplane master-key add FILE`, bring the file to all control planes, and run this again", err)
		}
	}
	err = s.store.AnnounceMasterKey(ctx, next, time.Now())
	if proto.CodeOf(err) == proto.CodeAlreadyExists {
		if made { // another control plane was asked as well
			err = keys.Drop(next)
		} else {
			err = nil
		}
	}
	if err != nil {
		return nil, err
	}
	return m.Status(ctx)
}

// errNoMasterKey is what another control plane is told that asks for a key which is not here.
var errNoMasterKey = proto.Errorf(proto.CodeNotFound, "this control plane does not have that master key")

// give hands a key to another control plane, which has proved that it belongs to the installation. A retired one
// nobody needs, and the first one everybody has.
func (m *masterRotation) give(ctx context.Context, id string) ([]byte, error) {
	s := m.server
	all, err := s.store.MasterKeys(ctx)
	if err != nil {
		return nil, err
	}
	for _, k := range all {
		if key := s.ca.Keys().Give(id); k.ID == id && k.State != store.MasterRetired && key != nil {
			s.log.Info("master key given to another control plane", "key", id)
			return key, nil
		}
	}
	return nil, errNoMasterKey
}
