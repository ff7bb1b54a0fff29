// Package sqltext reads the text of PostgreSQL statements as far as that can
// be done by tokens alone: it finds placeholders and turns them into $1, $2,
// ...; it names the first keyword; it says how complex a text is. It knows quotes, E”, U&”, dollar quotes, nested
// comments, casts and array slices as PostgreSQL's own scanner (scan.l) does
// with standard_conforming_strings on, which every session sets.
//
// What a statement is and does its parse tree says; see package pgguard.
// Everything here is pure and safe for concurrent use.
package sqltext
