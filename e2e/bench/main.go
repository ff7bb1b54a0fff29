// Command bench measures Postern's figures. Each is a ratio or a bound measured
// in one run beside its peer or its physical limit, since absolute times say
// little on a shared machine. It ends with one line for each figure:
//
//	figure NAME VALUE GOAL ok|short
//	figure NAME not measured: WHY
//
//	bench [-bin DIR] [-run REGEXP] [-part REGEXP] [-short] [-cpuprofile FILE]
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"runtime/pprof"
	"strings"
	"syscall"
	"time"
)

func main() {
	if run := roles[os.Getenv(roleVariable)]; run != nil {
		os.Exit(run()) // a child process of a measurement
	}
	o := Options{}
	flag.StringVar(&o.Bin, "bin", "bin", "directory of agentd, controlplane and postern")
	flag.BoolVar(&o.Short, "short", false, "smaller amounts: for trying the programs, not for figures")
	pattern := flag.String("run", ".", "measure only what matches this regular expression")
	flag.Func("part", "of a measurement that has parts (files), only those whose name matches", func(text string) (err error) {
		o.Part, err = regexp.Compile(text)
		return err
	})
	profile := flag.String("cpuprofile", "", "write a CPU profile of this process")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := measure(ctx, o, *pattern, *profile); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// Options are what every measurement may want to know.
type Options struct {
	Bin   string
	Short bool
	// Part chooses among the parts of a measurement by their names; nil: all.
	Part *regexp.Regexp
}

func (o Options) wantsPart(name string) bool { return o.Part == nil || o.Part.MatchString(name) }

// measurement is one program that yields some figures.
type measurement struct {
	name string
	run  func(ctx context.Context, o Options, r *Report) error
}

// measurements in the order they run; each file adds its own here.
var measurements = append(tunnelMeasurements,
	measurement{"sql", measureSQL},
	measurement{"agent-sql", measureSQLAgent},
	measurement{"mask", measureMask},
	measurement{"introspect", measureIntrospection},
	measurement{"pgwire", measurePGWire},
	measurement{"idle", measureIdle},
	measurement{"fleet", measureFleet},
	measurement{"replicas", measureReplicas},
	measurement{"kernels", measureKernels},
	measurement{"kernel-sql", measureKernelSQL},
	measurement{"checkpoints", measureCheckpoints},
	measurement{"restore-lazy", measureLazyRestores},
	measurement{"files", measureFiles},
)

// roles are what this binary does when it is started as a child of itself, by the
// value of roleVariable.
var roles = map[string]func() int{}

const roleVariable = "POSTERN_BENCH_ROLE"

// Report collects figures.
type Report struct {
	figures []figure
}

type figure struct {
	name  string
	value float64
	unit  string
	goal  float64
	most  bool // goal is an upper bound
	// missing says why there is no value; empty: there is one.
	missing string
}

// AtLeast notes a figure whose value should be goal or more.
func (r *Report) AtLeast(name string, value, goal float64, unit string) {
	r.figures = append(r.figures, figure{name: name, value: value, unit: unit, goal: goal})
}

// AtMost notes a figure whose value should be goal or less.
func (r *Report) AtMost(name string, value, goal float64, unit string) {
	r.figures = append(r.figures, figure{name: name, value: value, unit: unit, goal: goal, most: true})
}

// NotMeasured notes that there is no value of a figure here, and why.
func (r *Report) NotMeasured(name, why string) {
	r.figures = append(r.figures, figure{name: name, missing: why})
}

// Printf prints readable text about what was measured.
func (r *Report) Printf(format string, args ...any) { fmt.Printf("  "+format+"\n", args...) }

func (f figure) String() string {
	if f.missing != "" {
		return fmt.Sprintf("figure %s not measured: %s", f.name, f.missing)
	}
	verdict, sign := "ok", ">="
	if f.most {
		sign = "<="
	}
	if f.most && f.value > f.goal || !f.most && f.value < f.goal {
		verdict = "short"
	}
	return fmt.Sprintf("figure %s %.3g%s %s%.3g%s %s", f.name, f.value, f.unit, sign, f.goal, f.unit, verdict)
}

func measure(ctx context.Context, o Options, pattern, profile string) error {
	wanted, err := regexp.Compile(pattern)
	if err != nil {
		return err
	}
	if profile != "" {
		f, err := os.Create(profile)
		if err != nil {
			return err
		}
		defer f.Close() //nolint:errcheck // a profile is for looking at
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	printMachine()
	r := &Report{}
	var failed error
	for _, m := range measurements {
		if !wanted.MatchString(m.name) {
			continue
		}
		fmt.Printf("\n== %s\n", m.name)
		began := time.Now()
		if err := m.run(ctx, o, r); err != nil {
			failed = fmt.Errorf("%s: %w", m.name, err)
			fmt.Printf("  FAILED: %v\n", err)
		}
		fmt.Printf("  (%.0f s)\n", time.Since(began).Seconds())
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	fmt.Println()
	for _, f := range r.figures {
		fmt.Println(f)
	}
	return failed
}

// printMachine prints what the figures depend on.
func printMachine() {
	fmt.Printf("machine: %s, %d cores, %s, kernel %s, memory %s\n", cpuModel(), runtime.NumCPU(), runtime.Version(), kernel(), memory())
	fmt.Printf("load before: %s\n", firstLine("/proc/loadavg"))
}

func firstLine(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return "unknown"
	}
	line, _, _ := strings.Cut(string(text), "\n")
	return line
}

func kernel() string { return firstLine("/proc/sys/kernel/osrelease") }

func cpuModel() string { return procField("/proc/cpuinfo", "model name") }

func memory() string { return procField("/proc/meminfo", "MemTotal") }

func procField(path, name string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return "unknown"
	}
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value)
		}
	}
	return "unknown"
}
