// Package footprint gives pages of the program's own file back: code and constants that
// a daemon needed once, at its start or for a statement, and that stay mapped for as long as it lives. The
// kernel keeps them in its page cache while there is room and maps them again, 64 KiB at a time,
// when they are used: nothing is read from the disk unless memory was short.
//
// Only mappings of the program that hold nothing of this process's own are touched: not writable, and without
// a page that was written (what a position-independent program relocates is written).
//
// Safe for concurrent use. It starts no goroutines.
package footprint
