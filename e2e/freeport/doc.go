// Package freeport finds ports for servers that tests start, stop and start again.
//
// A server that names its port itself (":0") needs nothing of this. One that is told its port,
// or has to come back on the one it had, is without it for a moment, and in that moment the
// system gives ports to others: to every test that listens on ":0" and to every connection. So
// these ports are of a range that the system gives to nobody.
package freeport
