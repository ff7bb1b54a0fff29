#!/bin/sh
# test.sh - what `make test` runs: install what is missing, check the form of the
# code, run every test, with the race detector, then each fuzz target for 1 s.
# TEST_FUZZTIME overrides the 1 s, TEST_RUN limits the tests by name, TEST_SERIAL=1 runs the
# end-to-end tests in one process.
set -eu
cd "$(dirname "$0")/../.."
PATH=$PWD/.go/bin:$PATH:/usr/local/go/bin:/usr/sbin:/sbin
export PATH
packaging/dev/deps.sh tests

began=$(date +%s)
step() { echo; echo "== $* ($(($(date +%s) - began)) s)"; }

step "form"
unformatted=$(git ls-files '*.go' | xargs gofmt -l)
[ -z "$unformatted" ] || { echo "gofmt would change: $unformatted"; exit 1; }
go vet ./...

step "tests"
# Packages three at a time, for their tests wait half of their time; then alone the one that starts the whole system, so that its time
# limits measure it and not its neighbours: those of kernels in one process, the others in
# another, for each waits half of its time. (Two writers would tear lines of one pipe.)
# All with the race detector but the corpora of thousands of statements, which drive code
# that agentd/sqlsession's tests run with it, and take four times as long under it.
# testreport has the verdict.
# The compiler of the WebAssembly that parses statements is built without it: with it a
# parser takes ten seconds of a processor to start instead of one. It may be: it computes,
# and synchronizes nothing (e2e/walls looks). Vet had its turn.
packages=$(go list ./...)
corpora='/agentd/sqlsession/(adversary|enginetest)$'
# The slowest come first, so that none of them is left to run alone.
slow='/(agentd|agentd/sqlsession|agentd/kernel/internal/(shim|restoretest)|agentd/checkpoint/pagestore|controlplane|controlplane/workspace|client/postern)$'
packages=$({ echo "$packages" | grep -E "$slow"; echo "$packages" | grep -vE "$slow"; })
wazevo=github.com/tetratelabs/wazero/internal/engine/wazevo
plain="-gcflags=$wazevo/ssa=-race=false -gcflags=$wazevo/backend/...=-race=false"
run() { go test -json -vet=off -timeout 20m ${TEST_RUN:+-run "$TEST_RUN"} "$@" || :; }
race() { run -race $plain "$@"; }
{
	run -p 2 $(echo "$packages" | grep -E "$corpora")
	race -p 3 $(echo "$packages" | grep -Ev "/e2e\$|$corpora")
	kernels='^Test(Kernel|Checkpoint|Jupyter|Notebook|Clients|Forks|Much|SecretsMove)'
	if [ -n "${TEST_RUN:-}${TEST_SERIAL:-}" ]; then
		race -p 1 ./e2e
	else
		half=$(mktemp)
		race -p 1 -run "$kernels" ./e2e >"$half" &
		race -p 1 -skip "$kernels" ./e2e
		wait $!
		cat "$half"
		rm -f "$half"
	fi
} | go run ./e2e/testreport

step "fuzz targets, ${TEST_FUZZTIME:-1s} each"
packaging/dev/fuzz.sh "${TEST_FUZZTIME:-1s}"
step "done"
