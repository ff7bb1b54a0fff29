//go:build race

package sqlsession_test

const raceEnabled = true
