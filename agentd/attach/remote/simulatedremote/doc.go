// Package simulatedremote is a control plane in memory, for tests of replicas: one
// workspace with the rules of AttachService that a replica can notice. It is no store:
// nothing of it survives the process, and it keeps every version.
package simulatedremote
