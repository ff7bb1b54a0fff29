package confine

// forbiddenHere are the older forms; this architecture has none.
var forbiddenHere, filesHere []uint32
