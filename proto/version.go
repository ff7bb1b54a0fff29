package proto

import (
	"runtime/debug"
	"slices"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Protocol version. A side speaks its own minor version and the one before it;
// a new major version breaks with the old.
const (
	ProtocolMajor = 1
	ProtocolMinor = 0
)

// release is set by the linker (-X github.com/postern-dev/postern/proto.release=…).
var release = "dev"

// Features that may be negotiated. A feature is used only if both sides name it.
const (
	// FeatureSQL: statements at SQLPath.
	FeatureSQL = "sql"
	// FeatureWire: sessions of PostgreSQL's protocol, package wirestream.
	FeatureWire = "wire"
	// FeatureSoloLanes: bulk bodies may ask for a lane of their own.
	FeatureSoloLanes = "solo-lanes"
)

// Software is this build for people: "0.1.0 (git 1a2b3c4)".
func Software() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" && len(s.Value) >= 7 {
				return release + " (git " + s.Value[:7] + ")"
			}
		}
	}
	return release
}

// Version is the protocol version of this build.
func Version() *posternv1.ProtocolVersion {
	return &posternv1.ProtocolVersion{Major: ProtocolMajor, Minor: ProtocolMinor, Software: Software()}
}

// Features returns the features of this build, sorted.
func Features() []string { return []string{FeatureSoloLanes, FeatureSQL, FeatureWire} }

// CommonFeatures returns what both lists name, sorted.
func CommonFeatures(ours, theirs []string) []string {
	var common []string
	for _, f := range ours {
		if slices.Contains(theirs, f) {
			common = append(common, f)
		}
	}
	slices.Sort(common)
	return common
}

// Negotiate returns the version that this build and peer both speak: the lower
// minor of the two. It fails with VERSION_MISMATCH if the majors differ or the
// minors are more than one apart.
func Negotiate(peer *posternv1.ProtocolVersion) (*posternv1.ProtocolVersion, error) {
	return negotiate(Version(), peer)
}

func negotiate(ours, peer *posternv1.ProtocolVersion) (*posternv1.ProtocolVersion, error) {
	apart := int64(ours.GetMinor()) - int64(peer.GetMinor())
	if ours.GetMajor() != peer.GetMajor() || apart > 1 || apart < -1 {
		older := "the peer"
		if peer.GetMajor() > ours.GetMajor() || (peer.GetMajor() == ours.GetMajor() && apart < 0) {
			older = "this side"
		}
		return nil, Errorf(CodeVersionMismatch, "no protocol version in common: this side speaks %d.%d (%s), the peer %d.%d (%s): upgrade %s",
			ours.GetMajor(), ours.GetMinor(), ours.GetSoftware(), peer.GetMajor(), peer.GetMinor(), clip(peer.GetSoftware(), 64), older)
	}
	return &posternv1.ProtocolVersion{Major: ours.GetMajor(), Minor: min(ours.GetMinor(), peer.GetMinor()), Software: peer.GetSoftware()}, nil
}
