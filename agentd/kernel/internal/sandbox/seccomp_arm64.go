package sandbox

// refusedHere are old calls of this architecture: it has none.
var refusedHere []uintptr
