// Package prometheus has nothing but tests: of the alert rules and the scrape configuration beside it, with
// promtool, and of the metrics that these and the Grafana dashboard name, which must be in docs/metrics.md and in
// the code.
package prometheus
