// Package kernel runs Jupyter kernels on the host. Its parts are in internal:
// sandbox is where a kernel's processes are.
package kernel
