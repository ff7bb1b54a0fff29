#!/bin/sh
# packages.sh [ARCH...] - .deb and .rpm of agentd, controlplane and postern in dist/, with a list of
# what is in each binary (CycloneDX) beside them. ARCH is amd64 or arm64; default both. The same
# commit gives the same bytes: times are the commit's, paths are trimmed, versions are pinned.
# Environment: RELEASE, the version; DIST, where to (default dist); KINDS, which of deb and rpm;
# QUICK=1 for tests: paths stay, packages are not compressed, and TAGS are for the build.
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- amd64 arm64
GO=${GO:-go}
VERSION=${RELEASE:-0.1.0-dev}
dist=${DIST:-dist}
say() { echo "packages: $*" >&2; }

if [ -z "${SOURCE_DATE_EPOCH:-}" ]; then
	SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
fi
MTIME=$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y-%m-%dT%H:%M:%SZ)
export SOURCE_DATE_EPOCH VERSION MTIME
KINDS=${KINDS:-deb rpm}
trim=-trimpath
[ -z "${QUICK:-}" ] || trim=
umask 022
mkdir -p "$dist"
dist=$(cd "$dist" && pwd)
work=$dist/work
rm -rf "$work"
mkdir -p "$work/bin"

nfpm=$work/bin/nfpm
(cd packaging/nfpm && CGO_ENABLED=0 "$GO" build -o "$nfpm" github.com/goreleaser/nfpm/v2/cmd/nfpm)
CGO_ENABLED=0 "$GO" build -o "$work/bin/sbom" ./packaging/sbom
native=$work/native
mkdir -p "$native"

build() { # ARCH DIR
	CGO_ENABLED=0 GOOS=linux GOARCH=$1 "$GO" build $trim ${QUICK:+-tags "${TAGS:-}"} -buildvcs=auto \
		-ldflags "-s -w -buildid= -X github.com/postern-dev/postern/proto.release=$VERSION" -o "$2/" ./agentd ./controlplane ./client/postern
}

# script TEMPLATE OUT UNIT UNITS PACKAGE STATE: UNIT is what an upgrade restarts
script() { sed -e "s|@UNIT@|$3|g; s|@UNITS@|$4|g; s|@PACKAGE@|$5|g; s|@STATE@|$6|g" "packaging/nfpm/scripts/$1" >"$2" && chmod 755 "$2"; }

this=$("$GO" env GOHOSTARCH)
say "building for $this: man pages and completions come from the binaries"
build "$this" "$native"

for ARCH in "$@"; do
	TREE=$work/$ARCH
	export ARCH TREE
	mkdir -p "$TREE/units" "$TREE/doc" "$TREE/completions"
	if [ "$ARCH" = "$this" ]; then
		cp "$native"/agentd "$native"/controlplane "$native"/postern "$TREE/"
	else
		say "building for $ARCH"
		build "$ARCH" "$TREE"
	fi
	cp systemd/agentd.service systemd/controlplane.service "$TREE/units/"
	gzip -9nc CHANGELOG.md >"$TREE/doc/changelog.gz"
	{
		echo "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/"
		echo "Upstream-Name: postern"
		echo "Source: https://github.com/postern-dev/postern"
		echo
		echo "Files: *"
		echo "Copyright: 2026 the Postern authors"
		echo "License: Apache-2.0"
		echo " On Debian systems the full text is in /usr/share/common-licenses/Apache-2.0."
	} >"$TREE/doc/copyright"
	for n in postern-agentd postern-controlplane postern; do
		mkdir -p "$TREE/doc/$n"
		{
			echo "$n ($(echo "$VERSION" | sed 's/-/~/')-1) unstable; urgency=medium"
			echo
			echo "  * Built from $(git rev-parse --short=12 HEAD); changelog.gz says what is new."
			echo
			echo " -- Postern <postern@postern.dev>  $(LC_ALL=C date -u -d "@$SOURCE_DATE_EPOCH" '+%a, %d %b %Y %H:%M:%S +0000')"
		} | gzip -9nc >"$TREE/doc/$n/changelog.Debian.gz"
		{
			echo "# Go programs without cgo: nothing of the C library is linked at all."
			echo "$n: statically-linked-binary"
		} >"$TREE/doc/$n/lintian"
	done
	for b in agentd controlplane postern; do
		mkdir -p "$TREE/man/$b"
		"$native/$b" man "$TREE/man/$b"
		gzip -9n "$TREE/man/$b"/*
		"$native/$b" completion bash >"$TREE/completions/$b.bash"
	done
	"$native/postern" completion zsh >"$TREE/completions/postern.zsh"
	"$native/postern" completion fish >"$TREE/completions/postern.fish"
	for s in agentd controlplane; do
		mkdir -p "$TREE/scripts/$s"
		units=$s.service
		[ "$s" != agentd ] || units="agentd.service agentd-mountd.service agentd-workload.service"
		for t in postinst prerm postrm rpm-post rpm-preun rpm-postun; do
			script "$t" "$TREE/scripts/$s/$t" "$s.service" "$units" "postern-$s" "/var/lib/postern-$s /var/lib/private/postern-$s"
		done
	done
	for p in agentd controlplane postern; do
		sed -e "s|\${ARCH}|$ARCH|g; s|\${VERSION}|$VERSION|g; s|\${MTIME}|$MTIME|g; s|\${TREE}|$TREE|g" "packaging/nfpm/$p.yaml" >"$TREE/$p.yaml"
		[ -z "${QUICK:-}" ] || sed -i "s|compression: xz|compression: none|" "$TREE/$p.yaml"
		for kind in $KINDS; do
			out=$("$nfpm" package -f "$TREE/$p.yaml" -p "$kind" -t "$dist" 2>&1) || { echo "$out" >&2; exit 1; }
			out=$(echo "$out" | sed -n "s/^created package: //p")
			"$work/bin/sbom" "$TREE/$p" "$(basename "$out")" "$VERSION" >"$out.cdx.json"
			say "made $out"
		done
	done
done
rm -rf "$work"
(cd "$dist" && find . -maxdepth 1 \( -name "*.deb" -o -name "*.rpm" -o -name "*.cdx.json" \) | LC_ALL=C sort | xargs sha256sum >SHA256SUMS)
say "checksums are in $dist/SHA256SUMS"
