#!/bin/sh
# init.sh [NAME] - makes what compose.yaml expects in secrets/: passwords, the master key, a
# certificate of its own for NAME (default localhost), and nginx's configuration. It overwrites
# nothing.
set -eu
cd "$(dirname "$0")"
name=${1:-localhost}
umask 077
mkdir -p secrets/tls
random() { od -An -N"$1" -tx1 /dev/urandom | tr -d ' \n'; }
[ -e secrets/database ] || random 24 >secrets/database
if [ ! -e secrets/master.key ]; then
	head -c 32 /dev/urandom >secrets/master.key
fi
if [ ! -e secrets/s3.env ]; then
	id=$(random 10) secret=$(random 20)
	printf 'AWS_ACCESS_KEY_ID=%s\nAWS_SECRET_ACCESS_KEY=%s\n' "$id" "$secret" >secrets/s3.env
	printf 'ROOT_ACCESS_KEY=%s\nROOT_SECRET_KEY=%s\n' "$id" "$secret" >secrets/s3-server.env
fi
if [ ! -e secrets/tls/key.pem ]; then
	openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 365 -subj "/CN=$name" \
		-addext "subjectAltName=DNS:$name" -keyout secrets/tls/key.pem -out secrets/tls/fullchain.pem 2>/dev/null
fi
# The file of docs/nginx.md for two replicas.
sed -e 's/10\.0\.0\.5:8080/controlplane-1:8080/' -e 's/10\.0\.0\.6:8080/controlplane-2:8080/' -e "s/cp\.example\.com/$name/" \
	../../docs/nginx/replicas.conf >secrets/nginx.conf
# Docker gives secrets the mode and owner of their files: the control plane runs as 65532.
if [ "$(id -u)" = 0 ]; then
	chown 65532:65532 secrets/master.key
	chown 65532 secrets/database
	chmod 444 secrets/database
else
	echo "init.sh: not root: run 'chown 65532 secrets/master.key' as root before you start it" >&2
	chmod 444 secrets/database
fi
echo "init.sh: secrets/ is ready; back up secrets/master.key, apart from the database" >&2
