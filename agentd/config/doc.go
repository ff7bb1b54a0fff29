// Package config reads agentd's configuration file, /etc/postern/agentd.yaml;
// docs/agentd.md is its reference. Reading is strict: an unknown key, a value
// that makes no sense and a feature that this version lacks are errors, each
// with file and line, all of them reported at once. Load is the only way to a
// Config; a Config is never changed afterwards, a reload makes a new one. The
// package reads the files that the configuration names as bundles of
// certificates, but no secrets: those are read when they are needed.
package config
