#!/bin/sh
# fuzz.sh TIME - run every fuzz target for TIME each, two at a time with a worker
# each. Found inputs stay in testdata/fuzz and are to be committed with the fix.
# Minimizing is kept short: by default each new input of a few KB may take a minute
# in which nothing is tried.
set -eu
cd "$(dirname "$0")/../.."
list=$(mktemp -d)
trap 'rm -rf "$list"' EXIT
git ls-files '*_test.go' | xargs grep -l '^func Fuzz' | sort | while read -r file; do
	sed -n "s|^func \(Fuzz[A-Za-z0-9_]*\)(.*|./$(dirname "$file") \1|p" "$file"
done >"$list/targets"
count=$(wc -l <"$list/targets")
[ "$count" -gt 0 ] || { echo "fuzz: no target found" >&2; exit 1; }

# one TIME LIST DIR TARGET: go test reports its own deadline as a failure when the time is up
# in the wrong moment ("context deadline exceeded", and no input that fails): then once more.
one='
	log=$1/$(echo "$2.$3" | tr / _).log
	for try in 1 2 3; do
		if go test -run "^\$" -fuzz "^$3\$" -fuzztime "$0" -fuzzminimizetime 20x -parallel 1 "$2" >"$log" 2>&1; then
			echo "fuzz: $2 $3: $(grep -E "^fuzz: elapsed" "$log" | tail -n 1 | sed "s/^fuzz: //")"
			exit 0
		fi
		grep -q "^    context deadline exceeded\$" "$log" && ! grep -q "Failing input" "$log" || break
	done
	echo "fuzz: $2 $3 FAILED"
	cat "$log"
	echo "$2:$3" >>"$1/failed"
'
xargs -P 2 -n 2 sh -c "$one" "$1" "$list" <"$list/targets"
[ ! -e "$list/failed" ] || { echo "fuzz: failed: $(cat "$list/failed")" >&2; exit 1; }
echo "fuzz: $count targets, none failed"
