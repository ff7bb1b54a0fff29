#!/bin/sh
# fuzz.sh TIME - run every fuzz target for TIME each. Found inputs stay in
# testdata/fuzz and are to be committed with the fix. Minimizing is kept short: by
# default each new input of a few KB may take a minute in which nothing is tried.
set -eu
cd "$(dirname "$0")/../.."
time=$1
failed=
count=0
for file in $(git ls-files '*_test.go' | xargs grep -l '^func Fuzz' | sort); do
	dir=./$(dirname "$file")
	for target in $(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$file"); do
		count=$((count + 1))
		echo "fuzz: $dir $target for $time"
		log=$(mktemp)
		if ! go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 20x "$dir" >"$log" 2>&1; then
			cat "$log"
			failed="$failed $dir:$target"
		else
			grep -E '^fuzz: elapsed' "$log" | tail -n 1
		fi
		rm -f "$log"
	done
done
[ "$count" -gt 0 ] || { echo "fuzz: no target found" >&2; exit 1; }
[ -z "$failed" ] || { echo "fuzz: failed:$failed" >&2; exit 1; }
echo "fuzz: $count targets, none failed"
