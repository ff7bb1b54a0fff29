#!/bin/sh
# test.sh - what `make test` runs: install what is missing, check the form of the
# code, run every test with the race detector, then each fuzz target for 5 s.
# TEST_FUZZTIME overrides the 5 s, TEST_RUN limits the tests by name.
set -eu
cd "$(dirname "$0")/../.."
PATH=$PWD/.go/bin:$PATH:/usr/local/go/bin:/usr/sbin:/sbin
export PATH
packaging/dev/deps.sh go gcc postgresql mariadb nginx tinyproxy litmus pydrivers jupyter
[ "$(id -u)" != 0 ] || packaging/dev/deps.sh netns criu

began=$(date +%s)
step() { echo; echo "== $* ($(($(date +%s) - began)) s)"; }

step "form"
unformatted=$(git ls-files '*.go' | xargs gofmt -l)
[ -z "$unformatted" ] || { echo "gofmt would change: $unformatted"; exit 1; }
go vet ./...

step "tests, with the race detector"
# Packages two at a time; then alone the one that starts the whole system, so that
# its time limits measure it and not its neighbours. testreport has the verdict.
packages=$(go list ./...)
run() { go test -race -json -timeout 20m ${TEST_RUN:+-run "$TEST_RUN"} "$@" || :; }
{
	run -p 2 $(echo "$packages" | grep -v '/e2e$')
	run -p 1 ./e2e
} | go run ./e2e/testreport

step "fuzz targets, ${TEST_FUZZTIME:-5s} each"
packaging/dev/fuzz.sh "${TEST_FUZZTIME:-5s}"
step "done"
