//go:build race

package child

// raceDetector tells that the program is one of tests: the race detector takes
// many times the memory.
const raceDetector = true
