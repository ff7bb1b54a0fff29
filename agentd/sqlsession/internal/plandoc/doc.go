// Package plandoc reads and writes plans in JSON, whichever server made them, and
// keeps the order of their members. It is for packages that decide what of a plan may
// be told (pgplan, mysqlplan). It is pure and safe for concurrent use.
package plandoc
