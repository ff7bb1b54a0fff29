package child

// forbiddenHere are the older forms; this architecture has none.
var forbiddenHere = []uint32(nil)
