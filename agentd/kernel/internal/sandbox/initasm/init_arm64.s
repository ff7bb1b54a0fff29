// The first process of a kernel's PID namespace. See initelf.go, and
// init_amd64.s, which says the same.
	.text
	.globl _start
_start:
	mov	x0, #17			// clone(SIGCHLD, 0, 0, 0, 0): fork
	mov	x1, #0
	mov	x2, #0
	mov	x3, #0
	mov	x4, #0
	mov	x8, #220
	svc	#0
	cbz	x0, child
	tbnz	x0, #63, broken
	mov	x19, x0
reap:
	mov	x0, #-1
	sub	x1, sp, #16
	mov	x2, #0
	mov	x3, #0
	mov	x8, #260		// wait4(-1, &status, 0, NULL)
	svc	#0
	cmn	x0, #10			// ECHILD
	b.eq	broken
	cmp	x0, x19
	b.ne	reap
	ldur	w1, [sp, #-16]
	ands	w0, w1, #0x7f
	b.eq	exited
	add	w0, w0, #128
	b	leave
exited:
	ubfx	w0, w1, #8, #8
leave:
	mov	x8, #94			// exit_group
	svc	#0
child:
	mov	x8, #157		// setsid
	svc	#0
	ldr	x3, [sp]		// argc
	ldr	x0, [sp, #16]		// PATH
	add	x1, sp, #24		// ARGV0...
	add	x2, sp, x3, lsl #3
	add	x2, x2, #16		// the environment
	mov	x8, #221		// execve
	svc	#0
	mov	w0, #127
	b	leave
broken:
	mov	w0, #126
	b	leave
