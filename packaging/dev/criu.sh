#!/bin/sh
# criu.sh [PREFIX] - put a working CRIU on a Debian-family host, and say which.
#
# Takes the host's own criu when it works: `criu check`, and a process with a TCP
# listener that is really dumped and restored (criu before 4.2 passes its check on
# kernels of 6.16 and later, and cannot dump such a process there). Otherwise it
# unpacks criu and all its libraries, libc included, from a newer Debian suite under
# PREFIX (default /opt/criu), touching neither dpkg's database nor the system's
# libraries. Either way PREFIX/bin/criu works afterwards; agentd looks there by itself.
# Run again it only checks. Needs root. Environment:
#   CRIU_SUITES   suites to try, in order (default "trixie forky sid")
#   CRIU_VERSION  the exact Debian version to insist on, e.g. 4.2.1-1
#   CRIU_PRIVATE  1 = leave the host's own criu out of it
#   CRIU_FORCE    1 = make PREFIX anew even if it works
set -eu
cd /
PATH=$PATH:/usr/sbin:/sbin

prefix=${1:-${CRIU_PREFIX:-/opt/criu}}
suites=${CRIU_SUITES:-trixie forky sid}
want=${CRIU_VERSION:-}
say() { echo "criu.sh: $*" >&2; }
die() { say "$*"; exit 1; }
[ "$(id -u)" = 0 ] || die "must run as root: CRIU can do nothing as another user"
case $prefix in /*) ;; *) die "PREFIX must be absolute, is $prefix" ;; esac
prefix=${prefix%/}
[ -n "$prefix" ] || die "PREFIX must not be /"
# PREFIX is replaced as a whole, so it must be ours.
mark=.install-criu
[ ! -e "$prefix" ] || [ -e "$prefix/$mark" ] || die "$prefix is there and was not made by this script: give another PREFIX"
command -v perl >/dev/null || die "perl is missing: run 'apt-get install perl-base'"
mkdir -p "${prefix%/*}/"

# One at a time, or two would replace each other's PREFIX. The process that is dumped
# below must not inherit the lock: criu would have to dump it.
exec 9>"$prefix.lock"
flock 9

work=$(mktemp -d) victim=
old=$prefix.old.$$ new=$prefix.new.$$
cleanup() {
	[ -z "$victim" ] || kill -9 "$victim" 2>/dev/null || :
	[ ! -e "$old" ] || [ -e "$prefix" ] || mv "$old" "$prefix"
	rm -rf "$work" "$new" "$old"
}
trap cleanup EXIT
trap 'exit 1' HUP INT TERM

# works CRIU: its check, then dump, restore and use a process.
works() {
	[ -x "$1" ] || return 1
	"$1" check >"$work/check.log" 2>&1 9>&- || return 1
	rm -rf "$work/t" && mkdir -p "$work/t/img" && mkfifo "$work/t/fifo"
	# It closes what it inherited, whoever called this script, and tells when it is ready.
	setsid perl -MSocket -MPOSIX -e 'chdir "/"; POSIX::close($_) for 3 .. 255;
		socket(S, PF_INET, SOCK_STREAM, 0) and
		bind(S, pack_sockaddr_in(0, INADDR_LOOPBACK)) and listen(S, 1) or die;
		open(F, "+<", "$ARGV[0]/fifo") or die; mkdir "$ARGV[0]/ready"; $x = <F>;
		open(O, ">", "$ARGV[0]/out") or die; print O $x; close O; mkdir "$ARGV[0]/done"' "$work/t" \
		</dev/null >/dev/null 2>&1 9>&- &
	victim=$!
	for _ in 1 2 3 4 5 6 7 8 9 10; do [ -d "$work/t/ready" ] && break; sleep 0.3; done
	if "$1" dump -t "$victim" -D "$work/t/img" --manage-cgroups=ignore -v2 -o d.log >>"$work/check.log" 2>&1 9>&-; then
		wait "$victim" 2>/dev/null || :
		if "$1" restore -d -D "$work/t/img" --manage-cgroups=ignore -v2 -o r.log >>"$work/check.log" 2>&1 9>&-; then
			echo alive >"$work/t/fifo"
			for _ in 1 2 3 4 5 6 7 8 9 10; do [ -d "$work/t/done" ] && break; sleep 0.3; done
		fi
	fi
	kill -9 "$victim" 2>/dev/null || :
	wait "$victim" 2>/dev/null || :
	victim=
	cat "$work/t/img/"*.log >>"$work/check.log" 2>/dev/null || :
	[ "$(cat "$work/t/out" 2>/dev/null)" = alive ]
}

finish() {
	say "$1 works here: $("$1" --version | tr '\n' ' ')"
	exit 0
}

criu=$prefix/bin/criu
if [ -z "${CRIU_FORCE:-}" ] && works "$criu"; then finish "$criu"; fi

export DEBIAN_FRONTEND=noninteractive
if [ -z "${CRIU_PRIVATE:-}" ]; then
	own=$(command -v criu || :)
	case $own in "$prefix"/*) own= ;; esac
	if [ -z "$own" ] && apt-get install -y -q --no-install-recommends criu >"$work/apt.log" 2>&1 9>&-; then
		own=$(command -v criu || :)
	fi
	if [ -n "$own" ] && works "$own"; then
		rm -rf "$prefix" && mkdir -p "$prefix/bin" && : >"$prefix/$mark" && ln -sfn "$own" "$criu"
		finish "$criu"
	fi
	say "this distribution's criu is absent or does not work on kernel $(uname -r): taking one from a newer suite into $prefix"
fi

# The mirror that the machine uses for Debian proper already.
mirror() {
	apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
		sed -n 's,^Debian|Debian|,,p' | head -n 1
}
command -v apt-get >/dev/null || die "no apt-get here: install CRIU 4.2 or newer by hand and name it in kernels.checkpoints.criu"
uri=$(mirror)
[ -n "$uri" ] || { apt-get update -q >"$work/apt.log" 2>&1 9>&- || :; uri=$(mirror); }
[ -n "$uri" ] || die "no Debian archive among this machine's apt sources: install CRIU 4.2 or newer by hand and name it in kernels.checkpoints.criu"

keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -r "$keyring" ] || die "no $keyring: run 'apt-get install debian-archive-keyring'"
arch=$(dpkg --print-architecture)

# borrow SUITE: make PREFIX from that suite; fails when it cannot.
borrow() {
	suite=$1
	say "trying $suite"
	# A private apt root whose status file is empty: apt then resolves everything.
	apt=$work/apt.$suite
	mkdir -p "$apt/lists/partial" "$apt/archives/partial" "$apt/parts"
	chmod 755 "$work" "$apt"
	chown -R _apt "$apt/lists/partial" "$apt/archives/partial" 2>/dev/null || :
	echo "deb [arch=$arch signed-by=$keyring] $uri $suite main" >"$apt/sources.list"
	: >"$apt/status"
	: >"$apt/preferences"
	set -- -q -o "Dir::Etc::sourcelist=$apt/sources.list" -o "Dir::Etc::sourceparts=$apt/parts" \
		-o "Dir::Etc::preferences=$apt/preferences" -o "Dir::Etc::preferencesparts=$apt/parts" \
		-o "Dir::State=$apt" -o "Dir::State::lists=$apt/lists" -o "Dir::State::status=$apt/status" \
		-o "Dir::Cache=$apt" -o "Dir::Cache::archives=$apt/archives" -o "APT::Architecture=$arch" \
		-o "APT::Architectures=$arch"
	apt-get "$@" update >"$work/apt.log" 2>&1 9>&- &&
		apt-get "$@" install -y --download-only --no-install-recommends "criu${want:+=$want}" \
			>>"$work/apt.log" 2>&1 9>&- || { tail -n 3 "$work/apt.log" >&2; return 1; }

	# Only what the binary can load: criu itself and the library packages.
	root=$work/root.$suite
	mkdir "$root"
	for deb in "$apt"/archives/*.deb; do
		case ${deb##*/} in
		criu_* | lib*) dpkg-deb -x "$deb" "$root" && dpkg-deb -W --showformat='${Package} ${Version}\n' "$deb" ;;
		esac
	done >"$work/versions"
	bin=$(find "$root/usr/sbin" "$root/sbin" -name criu -type f 2>/dev/null | head -n 1)
	ldso=$(find "$root" \( -name 'ld-linux*.so.*' -o -name 'ld64.so.*' \) ! -path '*/lib64/*' | head -n 1)
	[ -n "$bin" ] && [ -n "$ldso" ] || { say "no criu or dynamic loader in $suite's packages"; return 1; }

	rm -rf "$new" && mkdir -p "$new/bin" "$new/lib"
	cp -a "${ldso%/*}"/*.so* "$new/lib/"
	for so in "$root"/lib/*/*.so*; do
		[ ! -e "$so" ] || cp -an "$so" "$new/lib/"
	done
	: >"$new/$mark"
	cp "$work/versions" "$new/versions"
	cp "$bin" "$new/bin/criu" && chmod 755 "$new/bin/criu"
	if command -v patchelf >/dev/null; then
		# DT_RPATH, not RUNPATH: it serves the libraries' own dependencies too.
		patchelf --force-rpath --set-interpreter "$prefix/lib/${ldso##*/}" --set-rpath "$prefix/lib" "$new/bin/criu"
	else
		mv "$new/bin/criu" "$new/lib/criu.bin"
		printf '#!/bin/sh\nexec %s --library-path %s %s "$@"\n' \
			"$prefix/lib/${ldso##*/}" "$prefix/lib" "$prefix/lib/criu.bin" >"$new/bin/criu"
		chmod 755 "$new/bin/criu"
	fi
	[ ! -e "$prefix" ] || mv "$prefix" "$old"
	mv "$new" "$prefix" && rm -rf "$old"
	works "$criu" || {
		say "$(head -n 1 "$prefix/versions") from $suite does not work on kernel $(uname -r)"
		rm -rf "$prefix"
		return 1
	}
}

command -v patchelf >/dev/null ||
	apt-get install -y -q --no-install-recommends patchelf >"$work/apt.log" 2>&1 9>&- || :
for suite in $suites; do
	if borrow "$suite"; then finish "$criu"; fi
done
grep -h Error "$work/check.log" >&2 || :
die "no suite of \"$suites\" has a criu that works on kernel $(uname -r): checkpoints cannot be made here"
