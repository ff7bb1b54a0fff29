#!/bin/sh
# deps.sh NAME... - make sure that what the developer commands need is there, and
# say what is installed. NAME is one of: go gcc postgresql mariadb
# nginx caddy tinyproxy litmus prometheus rsyslog unzip netns criu pydrivers jupyter sshfs linuxsource testhost bigclients;
# tests is what `make test` needs.
# Installs Debian packages with apt-get, as root or through sudo.
set -eu
cd "$(dirname "$0")/../.."
say() { echo "deps: $*" >&2; }
die() { say "$*"; exit 1; }

refreshed=
install() {
	if [ "$(id -u)" = 0 ]; then as=; elif command -v sudo >/dev/null 2>&1; then as=sudo; else
		die "missing Debian package(s) $*: run 'apt-get install $*' as root"
	fi
	command -v apt-get >/dev/null 2>&1 || die "missing $*, and there is no apt-get: install it by hand"
	say "installing Debian package(s): $*"
	if [ -z "$refreshed" ]; then
		$as apt-get update -q >/dev/null || say "apt-get update failed: going on with the lists at hand"
		refreshed=1
	fi
	# A server package must not start its daemon: tests start their own.
	policy=/usr/sbin/policy-rc.d
	ours=
	if [ ! -e $policy ]; then
		printf '#!/bin/sh\nexit 101\n' | $as tee $policy >/dev/null && $as chmod 755 $policy && ours=1
	fi
	code=0
	$as env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" >/dev/null || code=$?
	[ -z "$ours" ] || $as rm -f $policy
	[ $code = 0 ] || die "apt-get install $* failed"
}

# go_ok: is there a go that can build this module?
go_ok() {
	command -v go >/dev/null 2>&1 && go list -m >/dev/null 2>&1
}

# borrow_go: an old go (Debian 12 has 1.19) cannot switch toolchains by itself, but
# can fetch one as the module that it is; its files lack the mode bits.
borrow_go() {
	want=$(sed -n 's/^go //p' go.mod)
	module=golang.org/toolchain@v0.0.1-go$want.linux-$(dpkg --print-architecture)
	say "fetching $module from the Go module proxy into .go"
	empty=$(mktemp -d)
	dir=$(cd "$empty" && GO111MODULE=on GOFLAGS=-mod=mod go mod download -json "$module" | sed -n 's/^\t"Dir": "\(.*\)",*$/\1/p')
	rm -rf "$empty"
	[ -n "$dir" ] || return 1
	rm -rf .go && mkdir .go && cp -R "$dir/." .go/ && chmod -R u+w .go && chmod 755 .go/bin/* .go/pkg/tool/*/*
	hash -r # forget where the old go was
}

for name in "$@"; do
	case $name in
	go)
		PATH=$PWD/.go/bin:$PATH:/usr/local/go/bin
		go_ok && continue
		command -v go >/dev/null 2>&1 || install golang-go ca-certificates
		go_ok && continue
		if (export GOTOOLCHAIN=auto && go_ok); then
			go env -w GOTOOLCHAIN=auto
			say "go fetches the toolchain that go.mod asks for from the Go module proxy"
			continue
		fi
		borrow_go && go_ok && continue
		die "go $(sed -n 's/^go //p' go.mod) or newer is needed, here is $(go version 2>/dev/null || echo none): see https://go.dev/dl"
		;;
	gcc) command -v gcc >/dev/null 2>&1 || install gcc libc6-dev ;;
	postgresql)
		ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 && command -v psql >/dev/null 2>&1 || install postgresql
		for dir in /usr/lib/postgresql/*/bin; do # hypothetical indexes are tested with each
			version=$(basename "$(dirname "$dir")")
			[ -f "/usr/share/postgresql/$version/extension/hypopg.control" ] || install "postgresql-$version-hypopg"
		done
		;;
	tests)
		packaging/dev/deps.sh go gcc postgresql mariadb nginx caddy tinyproxy litmus prometheus rsyslog unzip pydrivers jupyter
		[ "$(id -u)" != 0 ] || packaging/dev/deps.sh netns criu
		;;
	mariadb) [ -x /usr/sbin/mariadbd ] || install mariadb-server ;;
	rsyslog) [ -x /usr/sbin/rsyslogd ] && ls /usr/lib/*/rsyslog/lmnsd_gtls.so >/dev/null 2>&1 || install rsyslog rsyslog-gnutls ;;
	nginx) [ -x /usr/sbin/nginx ] || install nginx-light ;;
	caddy) command -v caddy >/dev/null 2>&1 || install caddy ;;
	tinyproxy) command -v tinyproxy >/dev/null 2>&1 || install tinyproxy-bin ;;
	prometheus) command -v promtool >/dev/null 2>&1 || install prometheus ;; # its tool, for the alert rules
	litmus) command -v litmus >/dev/null 2>&1 || install litmus ;; # a conformance suite of WebDAV
	unzip) command -v unzip >/dev/null 2>&1 || install unzip ;; # 50,000 small files on a mount
	netns)
		command -v ip >/dev/null 2>&1 || install iproute2
		command -v nft >/dev/null 2>&1 || [ -x /usr/sbin/nft ] || install nftables
		;;
	criu) # checkpoints: a CRIU that works on this kernel, and what the tests' trees are made with
		command -v setpriv >/dev/null 2>&1 && command -v losetup >/dev/null 2>&1 || install util-linux mount
		command -v mkfs.ext4 >/dev/null 2>&1 || [ -x /usr/sbin/mkfs.ext4 ] || install e2fsprogs
		[ -x /usr/bin/python3 ] || install python3
		packaging/dev/criu.sh || die "no CRIU that works here: see above"
		;;
	pydrivers) # Python's PostgreSQL drivers, for Debian's Python
		/usr/bin/python3 -c 'import psycopg2, psycopg, asyncpg, pg8000' 2>/dev/null ||
			install python3 python3-psycopg2 python3-psycopg python3-asyncpg python3-pg8000
		;;
	jupyter) # what kernels' tests run, for Debian's Python; an assembler for their init
		/usr/bin/python3 -c 'import ipykernel, jupyter_client, zmq, numpy, pandas' 2>/dev/null ||
			install python3 python3-ipykernel python3-jupyter-client python3-zmq python3-numpy python3-pandas
		# and Jupyter's clients, each as a user has it
		/usr/bin/python3 -c 'import jupyter_kernel_test, nbclient, notebook, jupyter_server, jupyter_console, websocket, requests' 2>/dev/null ||
			install python3-jupyter-kernel-test python3-nbclient python3-notebook python3-jupyter-server python3-jupyter-console python3-websocket python3-requests
		command -v as >/dev/null 2>&1 || install binutils
		;;
	sshfs) # what a mounted workspace is measured against: sshfs with ssh and sshd, and without
		command -v sshfs >/dev/null 2>&1 && command -v ssh >/dev/null 2>&1 && [ -x /usr/lib/openssh/sftp-server ] || install sshfs openssh-client openssh-sftp-server libwrap0
		# sshd is unpacked only: what is installed would listen from the next boot on.
		if [ ! -x /usr/sbin/sshd ] && [ ! -x bin/openssh/usr/sbin/sshd ]; then
			rm -rf bin/openssh && mkdir -p bin/openssh
			(cd bin/openssh && apt-get download -q openssh-server >/dev/null && dpkg -x openssh-server_*.deb . && rm openssh-server_*.deb) || die "apt-get download openssh-server failed"
		fi
		;;
	linuxsource) # a large source tree for the tests of mounts, unpacked only
		if ! ls bin/linux-source/usr/src/linux-source-*.tar.xz >/dev/null 2>&1; then
			package=$(apt-cache depends linux-source | sed -n 's/^ *Depends: \(linux-source-.*\)/\1/p')
			[ -n "$package" ] || die "there is no Debian package linux-source"
			say "fetching Debian package $package into bin/linux-source (140 MB)"
			rm -rf bin/linux-source && mkdir -p bin/linux-source
			(cd bin/linux-source && apt-get download -q "$package" >/dev/null && dpkg -x linux-source-*.deb . && rm linux-source-*.deb) || die "apt-get download $package failed"
		fi
		command -v xz >/dev/null 2>&1 || install xz-utils
		;;
	testhost) # what boots disposable hosts for tests of packages and units
		command -v mmdebstrap >/dev/null 2>&1 && command -v systemd-nspawn >/dev/null 2>&1 || install mmdebstrap systemd-container
		;;
	bigclients) # what `make clients` runs: JDBC on a JDK, node with npm
		command -v javac >/dev/null 2>&1 || install default-jdk-headless
		[ -e /usr/share/java/postgresql.jar ] || install libpostgresql-jdbc-java
		command -v npm >/dev/null 2>&1 || install nodejs npm
		;;
	*) die "unknown name $name" ;;
	esac
done
