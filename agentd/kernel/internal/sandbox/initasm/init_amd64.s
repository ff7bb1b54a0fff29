# The first process of a kernel's PID namespace. See initelf.go.
# argv: init PATH ARGV0 ARGV1...  It starts PATH in a session of its own with
# ARGV0..., reaps whatever ends, and ends with the outcome of its child:
# the exit code, or 128 and the signal.
	.intel_syntax noprefix
	.text
	.globl _start
_start:
	mov	eax, 57			# fork
	syscall
	test	eax, eax
	jz	child
	js	broken
	mov	ebx, eax
reap:
	mov	edi, -1
	lea	rsi, [rsp-16]
	xor	edx, edx
	xor	r10d, r10d
	mov	eax, 61			# wait4(-1, &status, 0, NULL)
	syscall
	cmp	eax, -10		# ECHILD: cannot be, the child is ours to reap
	je	broken
	cmp	eax, ebx
	jne	reap
	mov	eax, [rsp-16]
	mov	edi, eax
	and	eax, 0x7f
	jz	exited
	lea	edi, [rax+128]
	jmp	leave
exited:
	shr	edi, 8
	and	edi, 0xff
leave:
	mov	eax, 231		# exit_group
	syscall
child:
	mov	eax, 112		# setsid
	syscall
	mov	rax, [rsp]		# argc
	mov	rdi, [rsp+16]		# PATH
	lea	rsi, [rsp+24]		# ARGV0...
	lea	rdx, [rsp+rax*8+16]	# the environment
	mov	eax, 59			# execve
	syscall
	mov	edi, 127
	jmp	leave
broken:
	mov	edi, 126
	jmp	leave
