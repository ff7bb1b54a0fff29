package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// What holds a rotation of the master key up, since when, and how it is called off.

const (
	// masterCount is how often what is left is counted while a rotation is under way.
	masterCount = 10 * time.Second
	// masterAsk bounds what other control planes are asked for a status.
	masterAsk = 2 * time.Second
	// maxBroken bounds the things that are named of those that can't be sealed anew, here and in a status.
	maxBroken = 20
	// brokenFor is how long what one control plane could not seal anew is told: each has its turn more often than that.
	brokenFor = time.Minute
	// maxWaits bounds what a status says of what a rotation waits for.
	maxWaits = 64
)

// masterTrouble is what holds a rotation up at one control plane, as it tells the others.
type masterTrouble struct {
	// Problem is why its ring is not as it has to be, Failed why the last step that it tried failed; empty: it did not.
	Problem, Failed           string
	ProblemSince, FailedSince time.Time
	// Broken are things that it could not seal anew, at most maxBroken, by name, and since when. Unsealed is how many there are.
	Broken   map[string]time.Time
	Unsealed int
}

// masterSight is what this control plane saw of a rotation.
type masterSight struct {
	mu       sync.Mutex
	trouble  masterTrouble // its Broken is replaced, never changed; guarded by mu
	brokenAt time.Time     // when it was found; guarded by mu
	left     uint64        // guarded by mu
	counted  time.Time     // when left was, zero for never in this rotation; guarded by mu
	moved    time.Time     // when less was left, zero for never; guarded by mu
	began    time.Time     // zero: none is under way; guarded by mu
	stage    time.Time     // since when it is in its stage; guarded by mu
}

// registerMasterKeyMetrics says how far a rotation is; all are 0 without one.
func (s *Server) registerMasterKeyMetrics(registry prometheus.Registerer) {
	gauge := func(name, help string, value func(*masterSight) float64) {
		registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
			s.masters.sight.mu.Lock()
			defer s.masters.sight.mu.Unlock()
			return value(&s.masters.sight)
		}))
	}
	seconds := func(t time.Time) float64 {
		if t.IsZero() {
			return 0
		}
		return float64(t.UnixMilli()) / 1000
	}
	gauge("controlplane_master_key_rotation_start_timestamp_seconds", "When the rotation of the master key that is under way began; 0: none is.",
		func(m *masterSight) float64 { return seconds(m.began) })
	gauge("controlplane_master_key_rotation_moved_timestamp_seconds", "When it last came into another stage, or less was left to be sealed anew; 0: none is under way.",
		func(m *masterSight) float64 { return seconds(m.movedLocked()) })
	gauge("controlplane_master_key_rotation_left", "What other master keys than the newest still seal.",
		func(m *masterSight) float64 { return float64(m.left) })
}

// movedLocked is zero if no rotation is under way.
func (m *masterSight) movedLocked() time.Time {
	if m.began.IsZero() || m.moved.Before(m.stage) {
		return m.stage
	}
	return m.moved
}

// masterTimes are when a rotation began and when it came into its stage; of no use without one.
func masterTimes(all []store.MasterKey) (began, stage time.Time) {
	for _, k := range all {
		if k.State == store.MasterRetired {
			continue
		}
		if k.Made.After(began) {
			began = k.Made // the newest key is made for it
		}
		if k.Since.After(stage) {
			stage = k.Since
		}
	}
	return began, stage
}

// follow notes how far a rotation is by the store's word, and counts what is left when it is time.
func (m *masterSight) follow(ctx context.Context, s *store.Store, all []store.MasterKey) error {
	now := time.Now()
	began, stage := masterTimes(all)
	active := ""
	for _, k := range all {
		if k.State == store.MasterActive {
			active = k.ID
		}
	}
	m.mu.Lock()
	if stageOf(all) == masterStable {
		m.began, m.stage, m.moved, m.counted, m.left = time.Time{}, time.Time{}, time.Time{}, time.Time{}, 0
		m.trouble.Failed, m.trouble.FailedSince, m.trouble.Broken, m.trouble.Unsealed = "", time.Time{}, nil, 0
		m.mu.Unlock()
		return nil
	}
	m.began, m.stage = began, stage
	due := now.Sub(m.counted) >= masterCount
	m.mu.Unlock()
	if !due {
		return nil
	}
	counts, err := s.SealedByOthers(ctx, active)
	if err != nil {
		return err
	}
	left := uint64(0)
	for _, n := range counts {
		left += n
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.counted.IsZero() && left < m.left {
		m.moved = now
	}
	m.left, m.counted = left, now
	return nil
}

// found notes what could not be sealed anew, by name, and returns the names that are new.
func (m *masterSight) found(names []string, unsealed int) (fresh []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	next := map[string]time.Time{}
	for _, name := range names {
		since, known := m.trouble.Broken[name]
		if !known {
			since, fresh = now, append(fresh, name)
		}
		next[name] = since
	}
	m.trouble.Broken, m.trouble.Unsealed, m.brokenAt = next, unsealed, now
	return fresh
}

// failed notes how a step ended.
func (m *masterSight) failed(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	text := ""
	if err != nil {
		text = oneLine(err.Error())
	}
	switch {
	case text == "":
		m.trouble.FailedSince = time.Time{}
	case m.trouble.Failed == "":
		m.trouble.FailedSince = time.Now()
	}
	m.trouble.Failed = text
}

// problem notes what is wrong with the ring here; it reports whether that is new.
func (m *masterSight) problem(text string) (fresh bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fresh = text != m.trouble.Problem
	if fresh {
		m.trouble.ProblemSince = time.Now()
	}
	m.trouble.Problem = text
	return fresh
}

// told is what holds a rotation up here.
func (m *masterSight) told() masterTrouble {
	m.mu.Lock()
	defer m.mu.Unlock()
	t := m.trouble
	if time.Since(m.brokenAt) > brokenFor {
		t.Broken, t.Unsealed = nil, 0
	}
	return t
}

// oneLine is what an error says, at most 400 bytes of it, in one line.
func oneLine(text string) string {
	text = strings.ToValidUTF8(strings.Join(strings.Fields(text), " "), "?")
	if len(text) > 400 {
		text = strings.ToValidUTF8(text[:400], "") + "..."
	}
	return text
}

// brokenName is how people are told of a thing that can't be sealed anew: by ids alone.
func brokenName(x store.Sealed) string {
	switch x.Kind {
	case store.SealedAuthority:
		return "the key of the certificate authority " + x.ID
	case store.SealedSecret:
		return "the secret " + x.ID + " of organization " + x.Organization
	case store.SealedRows:
		return "the kept rows of query " + x.ID + " of organization " + x.Organization
	case store.SealedFileKey:
		return "the key of files " + x.Name + " of organization " + x.Organization
	}
	return string(x.Kind) + " " + x.ID
}

// waits are what holds a rotation up, of all control planes that answer, what is longest first. replicas are what
// replicas returned.
func (m *masterRotation) waits(ctx context.Context, all []store.MasterKey, replicas []*posternv1.MasterKeyReplica) []*posternv1.MasterKeyWait {
	stage := stageOf(all)
	_, since := masterTimes(all)
	told := m.server.replicas.masterTroubles(ctx)
	told[m.server.replica] = m.sight.told()
	var out []*posternv1.MasterKeyWait
	add := func(replica, what string, since time.Time) {
		if !slices.ContainsFunc(out, func(w *posternv1.MasterKeyWait) bool { return w.What == what }) {
			out = append(out, &posternv1.MasterKeyWait{What: what, Replica: replica, Since: timestamppb.New(since)})
		}
	}
	for _, r := range replicas {
		t, answered := told[r.Name]
		switch {
		case t.Problem != "":
			r.Problem = t.Problem
			add(r.Name, "control plane "+r.Name+": "+t.Problem, t.ProblemSince)
		case r.Problem != "" && stage != masterStable:
			if silent := m.server.replicas.silence(r.Name); !answered && silent > silentAfter {
				r.Problem += fmt.Sprintf("; it has said nothing for %s, and is forgotten after %s", silent.Round(time.Second), lostAfter)
			}
			add(r.Name, "control plane "+r.Name+": "+r.Problem, since)
		}
	}
	if stage == masterStable {
		return clipWaits(out)
	}
	broken, unsealed := 0, 0
	for name, t := range told {
		if t.Failed != "" {
			add(name, "control plane "+name+": the last step failed: "+t.Failed, t.FailedSince)
		}
		for _, thing := range slices.Sorted(maps.Keys(t.Broken)) {
			if stage == masterSealing && broken < maxBroken {
				add("", thing+" does not open and can't be sealed anew: remove it or set it again", t.Broken[thing])
				broken++
			}
		}
		unsealed = max(unsealed, t.Unsealed)
	}
	if stage == masterSealing && unsealed > maxBroken {
		add("", fmt.Sprintf("%d things in all do not open; %d of them are named", unsealed, maxBroken), since)
	}
	return clipWaits(out)
}

// clipWaits puts what is longest first.
func clipWaits(out []*posternv1.MasterKeyWait) []*posternv1.MasterKeyWait {
	slices.SortStableFunc(out, func(a, b *posternv1.MasterKeyWait) int {
		if c := a.Since.AsTime().Compare(b.Since.AsTime()); c != 0 {
			return c
		}
		return strings.Compare(a.What, b.What)
	})
	return out[:min(len(out), maxWaits)]
}

// silence is how long a replica has said nothing, 0 for one that was never seen.
func (r *replicas) silence(name string) time.Duration {
	if r == nil {
		return 0
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if seen, ok := r.seen[name]; ok {
		return time.Since(seen.at)
	}
	return 0
}

// masterTroubles asks the others that live what holds a rotation up, by name, for masterAsk at most. One that does not
// answer, or is of a version that does not know the question, is missing.
func (r *replicas) masterTroubles(ctx context.Context) map[string]masterTrouble {
	all := map[string]masterTrouble{}
	if r == nil {
		return all
	}
	ctx, cancel := context.WithTimeout(ctx, masterAsk)
	defer cancel()
	var mu sync.Mutex
	var asked sync.WaitGroup
	for _, name := range r.others() {
		base := r.urlOf(name)
		if base == "" {
			continue
		}
		asked.Go(func() {
			var t masterTrouble
			answer, err := r.client.Call(ctx, base, callMasterTrouble, nil)
			if err != nil || json.Unmarshal(answer, &t) != nil {
				return
			}
			t.Problem, t.Failed = oneLine(t.Problem), oneLine(t.Failed)
			mu.Lock()
			defer mu.Unlock()
			all[name] = t
		})
	}
	asked.Wait()
	return all
}

// Cancel implements api.MasterKeys.
func (m *masterRotation) Cancel(ctx context.Context) (*posternv1.MasterKeyStatus, error) {
	s := m.server
	id, err := s.store.CancelMasterKey(ctx, time.Now())
	if err != nil {
		return nil, err
	}
	if id != "" {
		s.log.Info("rotation of the master key called off", "key", id)
		// The others do so within a tick, as this one does if it can't now.
		if keys := s.ca.Keys(); keys.Has(id) {
			if err := keys.Drop(id); err != nil {
				s.log.Warn("key of a rotation that was called off not dropped", "key", id, "err", err)
			}
		}
		return m.Status(ctx)
	}
	all, err := s.store.MasterKeys(ctx)
	if err != nil {
		return nil, err
	}
	if stageOf(all) == masterStable {
		return nil, proto.Errorf(proto.CodeInvalid, "no rotation of the master key is under way: there is nothing to call off")
	}
	for _, k := range all {
		if k.State == store.MasterActive {
			return nil, proto.Errorf(proto.CodeInvalid, "the rotation can't be called off any more: the new master key %s seals since %s; see with `postern master-key status` what it waits for, and mend that",
				k.ID, k.Since.Format(time.RFC3339))
		}
	}
	return nil, proto.Errorf(proto.CodeInternal, "no master key is active")
}
