#!/bin/sh
# mysql.sh PREFIX - put a MySQL server (not MariaDB) at PREFIX, for tests.
#
# Debian's stable suites have none. So mysql-server-core and all libraries that it
# needs (libc included) are fetched from a newer suite and unpacked under PREFIX; neither
# dpkg's database nor the system's libraries are touched. PREFIX/bin/mysqld then runs
# it. Does nothing if that works already. Needs no root. Environment:
#   MYSQL_SUITES  suites to try, in order (default "forky sid")
set -eu

say() { echo "mysql: $*" >&2; }
die() { say "$*"; exit 1; }
prefix=${1:-}
case $prefix in /*) ;; *) die "usage: mysql.sh PREFIX, an absolute path" ;; esac
prefix=${prefix%/}
mark=.postern-mysql
works() { [ -x "$prefix/bin/mysqld" ] && "$prefix/bin/mysqld" --no-defaults --version >/dev/null 2>&1; }
! works || exit 0
# PREFIX is replaced as a whole, so it must be ours.
[ ! -e "$prefix" ] || [ -e "$prefix/$mark" ] || die "$prefix exists and was not made by this script"

work=$(mktemp -d)
new=$prefix.new.$$
trap 'rm -rf "$work" "$new"' EXIT
trap 'exit 1' HUP INT TERM
chmod 755 "$work"

# The archive that the machine already uses for Debian proper.
uri=$(apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
	sed -n 's,^Debian|Debian|,,p' | head -n 1)
[ -n "$uri" ] || die "no Debian archive among this machine's apt sources: run apt-get update"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -r "$keyring" ] || die "no $keyring: install the Debian package debian-archive-keyring"
arch=$(dpkg --print-architecture)

fetch() {
	suite=$1
	say "fetching MySQL from Debian's $suite"
	# An apt of its own whose status is empty: it resolves everything down to libc.
	apt=$work/$suite
	mkdir -p "$apt/lists/partial" "$apt/archives/partial" "$apt/parts"
	echo "deb [arch=$arch signed-by=$keyring] $uri $suite main" >"$apt/sources.list"
	: >"$apt/status"
	: >"$apt/preferences"
	set -- -q -o "Dir::Etc::sourcelist=$apt/sources.list" -o "Dir::Etc::sourceparts=$apt/parts" \
		-o "Dir::Etc::preferences=$apt/preferences" -o "Dir::Etc::preferencesparts=$apt/parts" \
		-o "Dir::State=$apt" -o "Dir::State::lists=$apt/lists" -o "Dir::State::status=$apt/status" \
		-o "Dir::Cache=$apt" -o "Dir::Cache::archives=$apt/archives" -o "APT::Architecture=$arch" \
		-o "APT::Architectures=$arch" -o "APT::Sandbox::User=$(id -un)" -o "Debug::NoLocking=1"
	apt-get "$@" update >"$work/log" 2>&1 &&
		apt-get "$@" install -y --download-only --no-install-recommends mysql-server-core >>"$work/log" 2>&1 ||
		{ tail -n 3 "$work/log" >&2; return 1; }
	rm -rf "$work/root" "$new"
	mkdir -p "$work/root" "$new/bin" "$new/lib" "$new/share"
	for deb in "$apt"/archives/*.deb; do
		case ${deb##*/} in
		mysql-server-core_* | lib*) dpkg-deb -x "$deb" "$work/root" && dpkg-deb -W --showformat='${Package} ${Version}\n' "$deb" >>"$new/versions" ;;
		esac
	done
	ldso=$(find "$work/root" \( -name 'ld-linux*.so.*' -o -name 'ld64.so.*' \) ! -path '*/lib64/*' | head -n 1)
	[ -x "$work/root/usr/sbin/mysqld" ] && [ -n "$ldso" ] || { say "no mysqld or dynamic loader in $suite's packages"; return 1; }
	for dir in "$work/root/usr/lib"/*-linux-gnu* "$work/root/lib"/*-linux-gnu*; do
		[ ! -d "$dir" ] || cp -an "$dir"/*.so* "$new/lib/" 2>/dev/null || :
	done
	cp "$work/root/usr/sbin/mysqld" "$new/lib/mysqld"
	cp -R "$work/root/usr/share/mysql" "$new/share/"
	cp -R "$work/root/usr/lib/mysql" "$new/lib/"
	printf '#!/bin/sh\nexec %s --library-path %s %s "$@"\n' "$prefix/lib/${ldso##*/}" "$prefix/lib" "$prefix/lib/mysqld" >"$new/bin/mysqld"
	chmod 755 "$new/bin/mysqld"
	: >"$new/$mark"
	rm -rf "$prefix"
	mv "$new" "$prefix"
	works || { say "MySQL from $suite does not start here: $("$prefix/bin/mysqld" --no-defaults --version 2>&1 | tail -n 1)"; return 1; }
}

mkdir -p "${prefix%/*}"
for suite in ${MYSQL_SUITES:-forky sid}; do
	if fetch "$suite"; then
		say "$("$prefix/bin/mysqld" --no-defaults --version)"
		exit 0
	fi
done
die "no suite of \"${MYSQL_SUITES:-forky sid}\" has a MySQL server that runs here"
