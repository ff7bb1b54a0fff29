// Command check looks at the chart of the directory above as `helm lint` and
// `helm template` do, and decodes every object that it renders into the Kubernetes types
// of its kind, strictly: a field that the API does not have fails, at whatever depth. It
// does so for each file in values/. It reads packaging/compose as well.
//
//	check [CHART]
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"helm.sh/helm/v3/pkg/action"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/kubernetes/scheme"
)

func main() {
	chart := ".."
	if len(os.Args) > 1 {
		chart = os.Args[1]
	}
	n, err := check(chart)
	err = errors.Join(err, composition(filepath.Join(chart, "..", "compose")))
	if err != nil {
		fmt.Fprintln(os.Stderr, "check:", err)
		os.Exit(1)
	}
	fmt.Printf("%d objects are as Kubernetes wants them, and the composition as Compose does\n", n)
}

// check returns how many objects were looked at.
func check(chart string) (int, error) {
	files, err := filepath.Glob(filepath.Join(chart, "check", "values", "*.yaml"))
	if err != nil {
		return 0, err
	}
	if len(files) == 0 {
		return 0, errors.New("no values to render the chart with")
	}
	n := 0
	for _, file := range files {
		values, err := chartutil.ReadValuesFile(file)
		if err != nil {
			return n, err
		}
		lint := action.NewLint()
		lint.Strict = true
		result := lint.Run([]string{chart}, values)
		if err := errors.Join(result.Errors...); err != nil {
			return n, fmt.Errorf("lint with %s: %w", filepath.Base(file), err)
		}
		objects, err := render(chart, values)
		if err != nil {
			return n, fmt.Errorf("render with %s: %w", filepath.Base(file), err)
		}
		for _, o := range objects {
			if err := strict(o.text); err != nil {
				return n, fmt.Errorf("%s with %s: %w", o.template, filepath.Base(file), err)
			}
			n++
		}
	}
	return n, refusals(chart)
}

// refusals are values that the chart must refuse, and a word of why.
func refusals(chart string) error {
	for name, tt := range map[string]struct {
		values chartutil.Values
		says   string
	}{
		"no database":      {chartutil.Values{"blob": "s3://b", "masterKey": map[string]any{"existingSecret": "k"}}, "database"},
		"no object store":  {chartutil.Values{"database": map[string]any{"url": "postgres://p@h/d"}, "masterKey": map[string]any{"existingSecret": "k"}}, "blob"},
		"no master key":    {chartutil.Values{"database": map[string]any{"url": "postgres://p@h/d"}, "blob": "s3://b"}, "masterKey"},
		"an unknown value": {chartutil.Values{"replicaz": 3}, "replicaz"},
	} {
		_, err := render(chart, tt.values)
		if err == nil || !strings.Contains(err.Error(), tt.says) {
			return fmt.Errorf("%s: the chart should refuse that with %q: got %v", name, tt.says, err)
		}
	}
	return nil
}

// object is one YAML document.
type object struct{ template, text string }

func render(chart string, values chartutil.Values) ([]object, error) {
	c, err := loader.Load(chart)
	if err != nil {
		return nil, err
	}
	all, err := chartutil.ToRenderValues(c, values, chartutil.ReleaseOptions{Name: "postern", Namespace: "postern", IsInstall: true}, chartutil.DefaultCapabilities)
	if err != nil {
		return nil, err
	}
	rendered, err := engine.Engine{Strict: true}.Render(c, all)
	if err != nil {
		return nil, err
	}
	var objects []object
	for name, text := range rendered {
		if filepath.Ext(name) != ".yaml" {
			continue
		}
		for _, document := range strings.Split(text, "\n---") {
			if strings.TrimSpace(strings.Trim(document, "-\n ")) != "" {
				objects = append(objects, object{name, document})
			}
		}
	}
	sort.Slice(objects, func(i, j int) bool { return objects[i].template < objects[j].template })
	if len(objects) == 0 {
		return nil, errors.New("nothing was rendered")
	}
	return objects, nil
}

// decoder knows all kinds of Kubernetes itself and refuses unknown and repeated fields.
var decoder = serializer.NewCodecFactory(scheme.Scheme, serializer.EnableStrict).UniversalDeserializer()

func strict(text string) error {
	o, _, err := decoder.Decode([]byte(text), nil, nil)
	if err != nil && runtime.IsStrictDecodingError(err) {
		return fmt.Errorf("%w\n%s", err, text)
	}
	if err != nil {
		return err
	}
	if o.GetObjectKind().GroupVersionKind().Empty() {
		return errors.New("an object without a kind")
	}
	return nil
}
