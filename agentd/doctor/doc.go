// Package doctor says what works on this host, what does not, and how to mend
// it. It holds the checks that need nothing but the operating system and the
// tunnel; the command wires them with configuration, identity and data sources.
// A check never changes anything, and its text holds no secret. A Report is for
// one goroutine.
package doctor
