// Package simulatedcontrolplane is an API server for tests of the client and the
// postern command: it speaks the wire contract of the public API and answers
// with canned data. It is no control plane: nothing is stored, no host is asked,
// and a statement's text only picks one of the behaviours in sql.go. The real
// one is tested together with the command in e2e.
package simulatedcontrolplane
