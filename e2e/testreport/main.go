// Command testreport reads `go test -json` and prints what a person wants: one
// line per package, the whole output of what failed, every skipped test with its
// reason, the slowest tests, and totals. It exits 1 if a test failed, if no test ran, or if a skip
// is not on the allowed list below: a skip must never hide a missing part.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"sort"
	"strings"
)

// allowedSkips are the only reasons for which a test may be skipped, by how its
// message begins. As root the first does not count: there everything runs.
var allowedSkips = []string{
	"needs root",
}

type event struct {
	Action  string
	Package string
	Test    string
	Output  string
	Elapsed float64
}

type key struct{ pkg, test string }

// module is what every package's path begins with.
const module = "github.com/postern-dev/postern/"

// slowest is how many of the slowest tests are listed.
const slowest = 15

// timed is how many seconds a test took, with its subtests.
type timed struct {
	key
	seconds float64
}

func main() {
	os.Exit(run())
}

func run() int {
	outputs := map[key]*strings.Builder{}
	results := map[string]map[string]int{}
	var failed, skipped []key
	var times []timed
	total := map[string]int{}
	finished := map[key]bool{}
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 16<<20)
	for in.Scan() {
		var e event
		if json.Unmarshal(in.Bytes(), &e) != nil {
			fmt.Println(in.Text()) // a build error, say
			continue
		}
		k := key{e.Package, e.Test}
		switch e.Action {
		case "output", "build-output":
			if outputs[k] == nil {
				outputs[k] = &strings.Builder{}
			}
			outputs[k].WriteString(e.Output)
			if e.Action == "build-output" {
				fmt.Print(e.Output)
			}
		case "pass", "fail", "skip":
			if e.Test == "" {
				packageLine(e, results[e.Package], outputs[k])
				if e.Action == "fail" {
					printUnfinished(e.Package, outputs, finished)
					failed = append(failed, k)
				}
				continue
			}
			if results[e.Package] == nil {
				results[e.Package] = map[string]int{}
			}
			results[e.Package][e.Action]++
			total[e.Action]++
			finished[k] = true
			if !strings.Contains(e.Test, "/") {
				times = append(times, timed{k, e.Elapsed})
			}
			switch e.Action {
			case "fail":
				failed = append(failed, k)
			case "skip":
				skipped = append(skipped, k)
			}
			if e.Action == "pass" {
				delete(outputs, k)
			}
		}
	}
	if err := in.Err(); err != nil {
		fmt.Fprintln(os.Stderr, "testreport:", err)
		return 1
	}
	printSlowest(times)
	return report(outputs, total, failed, skipped)
}

// printSlowest says where the time of a run goes.
func printSlowest(times []timed) {
	sort.Slice(times, func(i, j int) bool { return times[i].seconds > times[j].seconds })
	if len(times) > slowest {
		times = times[:slowest]
	}
	fmt.Println("\nthe slowest tests:")
	for _, t := range times {
		fmt.Printf("  %6.1f s  %s %s\n", t.seconds, strings.TrimPrefix(t.pkg, module), t.test)
	}
}

func packageLine(e event, counts map[string]int, output *strings.Builder) {
	name := strings.TrimPrefix(e.Package, module)
	switch {
	case e.Action == "skip" || len(counts) == 0 && e.Action == "pass":
		fmt.Printf("  %-28s no tests\n", name)
	default:
		fmt.Printf("  %-28s %3d passed %2d failed %2d skipped  %6.1f s\n", name, counts["pass"], counts["fail"], counts["skip"], e.Elapsed)
	}
	if e.Action == "fail" && counts["fail"] == 0 && output != nil {
		fmt.Print(output.String()) // it died outside any test: a leak, say
	}
}

// printUnfinished prints what the tests of a package said that were under way
// when it died: a panic or a time-out.
func printUnfinished(pkg string, outputs map[key]*strings.Builder, finished map[key]bool) {
	for k, output := range outputs {
		if k.pkg == pkg && k.test != "" && !finished[k] {
			fmt.Printf("\n--- UNFINISHED %s %s\n%s", k.pkg, k.test, output)
		}
	}
}

func report(outputs map[key]*strings.Builder, total map[string]int, failed, skipped []key) int {
	code := 0
	for _, k := range failed {
		code = 1
		if k.test != "" && outputs[k] != nil {
			fmt.Printf("\n--- FAILED %s %s\n%s", k.pkg, k.test, outputs[k])
		}
	}
	reasons := map[string][]string{}
	for _, k := range skipped {
		reason := skipReason(outputs[k])
		reasons[reason] = append(reasons[reason], k.test)
		if !allowed(reason) {
			code = 1
			fmt.Printf("\n--- NOT ALLOWED TO SKIP %s %s: %s\n", k.pkg, k.test, reason)
		}
	}
	fmt.Printf("\n%d tests passed, %d failed, %d skipped\n", total["pass"], total["fail"], total["skip"])
	names := make([]string, 0, len(reasons))
	for reason := range reasons {
		names = append(names, reason)
	}
	sort.Strings(names)
	for _, reason := range names {
		fmt.Printf("skipped, %s: %s\n", reason, strings.Join(reasons[reason], " "))
	}
	for _, k := range failed {
		fmt.Printf("failed: %s %s\n", k.pkg, k.test)
	}
	if total["pass"] == 0 {
		fmt.Println("no test ran")
		code = 1
	}
	return code
}

func allowed(reason string) bool {
	for _, a := range allowedSkips {
		if strings.HasPrefix(reason, a) {
			return os.Getuid() != 0
		}
	}
	return false
}

// skipReason finds the text of t.Skip among a test's output lines, which look
// like "    file_test.go:12: reason".
func skipReason(output *strings.Builder) string {
	if output == nil {
		return "no reason given"
	}
	for line := range strings.Lines(output.String()) {
		if _, rest, ok := strings.Cut(strings.TrimSpace(line), ".go:"); ok {
			if _, reason, ok := strings.Cut(rest, ": "); ok {
				return strings.TrimSpace(reason)
			}
		}
	}
	return "no reason given"
}
