// Package simulatedkernels is a host's side of kernels for tests, without kernels: it
// answers KernelHostService and streams of package kernelstream as agentd and its shims do (a
// journal, replies to who asked, resume, taken), and runs a language of one command a
// line instead of Python:
//
//	print TEXT        a line on stdout          stderr TEXT   one on stderr
//	value TEXT        an execute_result         error TEXT    ends the cell with an error
//	input             asks, prints the answer   sleep         waits for an interrupt
//	image             a display of an image     buffers       a display with binary buffers
//	flood N SIZE      N pieces of SIZE bytes on stdout
//	die               ends the kernel
//
// It shows what the code on the other side does; what kernels do is shown by tests
// with real ones. A Host starts goroutines that end with their streams; Close ends
// all.
package simulatedkernels
