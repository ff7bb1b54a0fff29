// Package leakwait has goleak's check at the end of a package's tests wait for goroutines that are
// about to end.
//
// goleak looks for about 0.4 seconds. On a busy machine that is too short for what tests rightly
// leave to end by itself: a connection whose other side was closed just now, a process that was
// told to end. A goroutine that is there after Patience is a leak here, too.
package leakwait
