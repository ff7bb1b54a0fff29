// Package policy says what a host's owner allows. It is pure functions over
// plain types: no file, no clock, no network, so that every rule can be tested
// as a table.
//
// A [Spec] is the policy of one data source as the configuration file has it;
// [Spec.Source] checks it, fills in the defaults and gives a [Source].
// [Decide] holds a request against it. A request can only narrow what the
// source's policy allows. What this version can't enforce is refused when the
// configuration is read, never ignored. Everything here is safe for
// concurrent use.
package policy
