// Package catalog keeps what data sources hold (schemas, tables, columns, ...) in
// the control plane's store, as their hosts tell it: in the background when an agent
// comes and its catalog is old, and when somebody asks. What a host's policy hides
// never comes here; what it hides from now on is forgotten with the refresh that
// its change causes.
package catalog
