#!/bin/sh
# test.sh - what `make test` runs: install what is missing, check the form of the
# code, run every test with the race detector, then each fuzz target for 20 s.
# TEST_FUZZTIME overrides the 20 s, TEST_RUN limits the tests by name.
set -eu
cd "$(dirname "$0")/../.."
PATH=$PWD/.go/bin:$PATH:/usr/local/go/bin:/usr/sbin:/sbin
export PATH
packaging/dev/deps.sh go gcc postgresql nginx tinyproxy
[ "$(id -u)" != 0 ] || packaging/dev/deps.sh netns

began=$(date +%s)
step() { echo; echo "== $* ($(($(date +%s) - began)) s)"; }

step "form"
unformatted=$(git ls-files '*.go' | xargs gofmt -l)
[ -z "$unformatted" ] || { echo "gofmt would change: $unformatted"; exit 1; }
go vet ./...

step "tests, with the race detector"
# Packages one after the other: several start servers of their own, and there are two cores.
go test -race -json -p 1 -timeout 15m ${TEST_RUN:+-run "$TEST_RUN"} ./... | go run ./e2e/testreport

step "fuzz targets, ${TEST_FUZZTIME:-20s} each"
packaging/dev/fuzz.sh "${TEST_FUZZTIME:-20s}"
step "done"
