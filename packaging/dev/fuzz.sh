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

# one TIME LIST CACHE DIR: builds the package's test program once for all its targets (`go test
# -fuzz` links it again for each) and runs them as go test would, in their directory, with the
# inputs that go test keeps. A target's own deadline is reported as a failure when the time is
# up in the wrong moment ("context deadline exceeded", and no input that fails): then once more.
one='
	program=$1/$(echo "$3" | tr / _).test
	failed() {
		echo "fuzz: $1 FAILED"
		cat "$2"
		echo "$1" >>"$list/failed"
	}
	list=$1
	if ! go test -c -vet=off -fuzz . -o "$program" "$3" >"$program.log" 2>&1; then
		failed "$3" "$program.log"
		exit 0
	fi
	cache=$2/$(go list "$3")
	mkdir -p "$cache"
	sed -n "s|^$3 ||p" "$1/targets" | while read -r target; do
		log=$program.$target.log
		for try in 1 2 3; do
			if (cd "$3" && "$program" -test.run "^\$" -test.fuzz "^$target\$" -test.fuzztime "$0" -test.fuzzminimizetime 20x \
				-test.parallel 1 -test.fuzzcachedir "$cache" -test.paniconexit0) >"$log" 2>&1; then
				# A target that is not in the program is no failure for it.
				elapsed=$(grep -E "^fuzz: elapsed" "$log" | tail -n 1 | sed "s/^fuzz: //")
				[ -n "$elapsed" ] || break
				echo "fuzz: $3 $target: $elapsed"
				continue 2
			fi
			grep -q "^    context deadline exceeded\$" "$log" && ! grep -q "Failing input" "$log" || break
		done
		failed "$3 $target" "$log"
	done
	rm -f "$program"
'
# Packages with the most targets first: else they are what one waits for at the end.
cut -d ' ' -f 1 "$list/targets" | sort | uniq -c | sort -rn | sed 's/.* //' |
	xargs -P 2 -n 1 sh -c "$one" "$1" "$list" "$(go env GOCACHE)/fuzz"
[ ! -e "$list/failed" ] || { echo "fuzz: failed: $(cat "$list/failed")" >&2; exit 1; }
echo "fuzz: $count targets, none failed"
