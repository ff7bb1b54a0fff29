//go:build !race

package adversary

const raceFactor = 1
