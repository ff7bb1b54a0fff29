/*
 * For tests alone, on machines without CAP_SYS_RESOURCE. CRIU reads the limits of each
 * task with prlimit64, which needs that capability for a task of another user. This
 * library, loaded into CRIU by LD_PRELOAD, answers such a read from /proc/PID/limits
 * when the system refused it. It never changes a limit.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>

/* In the order of RLIMIT_*: each is the start of its line in /proc/PID/limits. */
static const char *names[] = {
	"Max cpu time", "Max file size", "Max data size", "Max stack size",
	"Max core file size", "Max resident set", "Max processes", "Max open files",
	"Max locked memory", "Max address space", "Max file locks", "Max pending signals",
	"Max msgqueue size", "Max nice priority", "Max realtime priority", "Max realtime timeout",
};

struct limit64 { unsigned long long cur, max; };

static unsigned long long value(const char *s)
{
	return strncmp(s, "unlimited", 9) ? strtoull(s, NULL, 10) : ~0ULL;
}

static int from_proc(long pid, long which, struct limit64 *out)
{
	char path[64], line[256], cur[32], max[32];
	FILE *f;
	int found = -1;

	if (which < 0 || which >= (long)(sizeof(names) / sizeof(names[0])))
		return -1;
	snprintf(path, sizeof(path), "/proc/%ld/limits", pid);
	if (!(f = fopen(path, "re")))
		return -1;
	while (found && fgets(line, sizeof(line), f)) {
		size_t n = strlen(names[which]);
		if (strncmp(line, names[which], n))
			continue;
		if (sscanf(line + n, "%31s %31s", cur, max) == 2) {
			out->cur = value(cur);
			out->max = value(max);
			found = 0;
		}
	}
	fclose(f);
	return found;
}

long syscall(long number, ...)
{
	static long (*real)(long, ...);
	long a[6], ret;
	va_list ap;

	if (!real)
		real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
	va_start(ap, number);
	for (int i = 0; i < 6; i++)
		a[i] = va_arg(ap, long);
	va_end(ap);
	ret = real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
	if (ret == -1 && errno == EPERM && number == SYS_prlimit64 && a[0] && !a[2] && a[3] &&
	    !from_proc(a[0], a[1], (struct limit64 *)a[3]))
		return 0;
	return ret;
}
