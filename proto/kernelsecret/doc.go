// Package kernelsecret says what the names and values of kernels' secrets may be. Both
// sides of the tunnel hold requests to it: the control plane when a secret is set, agentd
// before a kernel gets one.
//
// It is pure and may be imported by all.
package kernelsecret
