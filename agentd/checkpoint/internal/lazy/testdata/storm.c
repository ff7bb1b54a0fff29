// A process whose memory is missing, as CRIU leaves one: it registers a mapping with
// userfaultfd, gives that to the server as CRIU does, and changes its mappings in every way
// while memory comes. It knows what each page must hold. usage: storm DIR MODE SEED ROUNDS;
// MODE is storm, or look: reads alone, and forks, forever. What is wrong it prints as bad.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL
#define THREADS 3
#define SLICE 2048UL		     // pages of each thread
#define WIPED 64UL		     // pages at the end that forks have as zeros
#define TOTAL (THREADS * SLICE + WIPED)
#define BASE ((char *)0x600000000000UL)
#define OTHER ((char *)0x610000000000UL) // where threads move memory to

static int rounds;
static const char *mode;

static uint64_t word(int64_t id, uint64_t off) { return id < 0 ? 0 : ((uint64_t)id + 1) * 0x9E3779B97F4A7C15UL ^ off; }

static void say(const char *format, ...)
{
	char line[300];
	va_list args;
	va_start(args, format);
	int n = vsnprintf(line, sizeof line, format, args);
	va_end(args);
	if (write(1, line, n) != n)
		_exit(9);
}

static void die(const char *what)
{
	say("bad: %s: %s\n", what, strerror(errno));
	_exit(3);
}

struct thread {
	int n;
	uint64_t rng;
	char *at;	       // its slice, and then as much at OTHER
	int64_t id[2 * SLICE]; // what each page holds: of the image, or what was written; -1: zeros
	int64_t written;
	pthread_t thread;
};

static uint64_t next(struct thread *t)
{
	t->rng ^= t->rng << 13;
	t->rng ^= t->rng >> 7;
	t->rng ^= t->rng << 17;
	return t->rng;
}

static char *address(struct thread *t, uint64_t page) { return page < SLICE ? BASE + (t->n * SLICE + page) * PAGE : OTHER + (t->n * SLICE + page - SLICE) * PAGE; }

static void verify(struct thread *t, uint64_t page, const char *who)
{
	volatile uint64_t *p = (uint64_t *)address(t, page);
	for (uint64_t off = 0; off < PAGE; off += 1024)
		if (p[off / 8] != word(t->id[page], off)) {
			say("bad: %s: page %lu of thread %d holds %lx, not %lx\n", who, page, t->n, p[off / 8], word(t->id[page], off));
			_exit(2);
		}
}

static void all(struct thread *t, const char *who)
{
	uint64_t start = next(t) % (2 * SLICE);
	for (uint64_t i = 0; i < 2 * SLICE; i++)
		verify(t, (start + i) % (2 * SLICE), who);
}

// wiped looks at what forks must not have.
static void wiped(int fork)
{
	for (uint64_t i = 0; i < WIPED; i++) {
		volatile uint64_t *p = (uint64_t *)(BASE + (THREADS * SLICE + i) * PAGE);
		if (*p != (fork ? 0 : word(THREADS * SLICE + i, 0))) {
			say("bad: page %lu, which forks have as zeros, holds %lx in a %s\n", i, *p, fork ? "fork" : "parent");
			_exit(2);
		}
	}
}

static void forked(struct thread *t, int depth)
{
	pid_t pid = fork();
	if (pid < 0)
		die("fork");
	if (pid == 0) {
		if (next(t) % 3 == 0)
			_exit(0); // at once, as one that executes something
		if (depth < 1 && next(t) % 2)
			forked(t, depth + 1);
		wiped(1);
		all(t, depth ? "fork of a fork" : "fork");
		_exit(0);
	}
	int status;
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			die("waitpid");
	if (!WIFEXITED(status) || WEXITSTATUS(status)) {
		say("bad: a fork ended with %x\n", status);
		_exit(2);
	}
}

// fresh maps zeros.
static void fresh(struct thread *t, uint64_t page, uint64_t n)
{
	if (mmap(address(t, page), n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
		die("mmap");
	for (uint64_t i = 0; i < n; i++)
		t->id[page + i] = -1;
}

// move moves pages of one mapping.
static void move(struct thread *t, uint64_t from, uint64_t to, uint64_t n)
{
	if (mremap(address(t, from), n * PAGE, n * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, address(t, to)) == MAP_FAILED)
		die("mremap");
	memmove(t->id + to, t->id + from, n * sizeof t->id[0]);
	fresh(t, from, n);
}

static void *run(void *arg)
{
	struct thread *t = arg;
	if (strcmp(mode, "storm") == 0) // large ones, while nobody divided it
		for (uint64_t i = 0; i < 8; i++)
			move(t, (SLICE / 8 * ((i * 5 + 3) % 8)) + 17, SLICE + SLICE / 8 * i + 5, 100 + next(t) % 100);
	for (int r = 0; r < rounds; r++) {
		uint64_t n = 1 + next(t) % 40, page = next(t) % (2 * SLICE - n), what = next(t) % 100;
		if (page < SLICE && page + n > SLICE)
			n = SLICE - page;
		if (strcmp(mode, "look") == 0)
			what = what < 2 ? 99 : 0;
		if (what < 45) {
			for (uint64_t i = 0; i < n; i++)
				verify(t, page + i, "reader");
		} else if (what < 60) {
			t->id[page] = ++t->written;
			uint64_t *p = (uint64_t *)address(t, page);
			for (uint64_t off = 0; off < PAGE; off += 8)
				p[off / 8] = word(t->written, off);
		} else if (what < 70) {
			if (madvise(address(t, page), n * PAGE, MADV_DONTNEED))
				die("madvise");
			for (uint64_t i = 0; i < n; i++)
				t->id[page + i] = -1;
		} else if (what < 78) {
			if (munmap(address(t, page), n * PAGE))
				die("munmap");
			fresh(t, page, n);
		} else if (what < 92) { // to the other half
			uint64_t from = next(t) % SLICE + (next(t) % 2) * SLICE;
			move(t, from, (from + SLICE) % (2 * SLICE), 1);
		} else if (what < 97) {
			if (mprotect(address(t, page), n * PAGE, PROT_READ) || mprotect(address(t, page), n * PAGE, PROT_READ | PROT_WRITE))
				die("mprotect");
		} else {
			forked(t, 0);
		}
	}
	all(t, "thread");
	return NULL;
}

int main(int argc, char **argv)
{
	if (argc != 5)
		return 1;
	mode = argv[2];
	rounds = atoi(argv[4]);
	int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (uffd < 0)
		die("userfaultfd");
	struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP};
	if (ioctl(uffd, UFFDIO_API, &api))
		die("UFFDIO_API");
	if (mmap(BASE, TOTAL * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) != BASE)
		die("mmap");
	if (mmap(OTHER, THREADS * SLICE * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) != OTHER)
		die("mmap");
	if (madvise(BASE + THREADS * SLICE * PAGE, WIPED * PAGE, MADV_WIPEONFORK))
		die("MADV_WIPEONFORK");
	struct uffdio_register reg = {.range = {(uint64_t)BASE, TOTAL * PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	if (ioctl(uffd, UFFDIO_REGISTER, &reg))
		die("UFFDIO_REGISTER");

	int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct sockaddr_un to = {.sun_family = AF_UNIX, .sun_path = "lazy-pages.socket"};
	if (chdir(argv[1]) || connect(sock, (struct sockaddr *)&to, sizeof to))
		die("connect");
	int32_t pid = 1, finished = 0x52535446, zombie = -7;
	char byte = 0, rights[CMSG_SPACE(sizeof(int))] = {0};
	struct iovec iov = {&byte, 1};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = rights, .msg_controllen = sizeof rights};
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(c), &uffd, sizeof uffd);
	if (send(sock, &zombie, 4, 0) != 4 || send(sock, &pid, 4, 0) != 4 || sendmsg(sock, &m, 0) != 1)
		die("send");
	close(uffd);
	volatile uint64_t *first = (uint64_t *)BASE; // served before the end, as what CRIU touches itself
	if (*first != word(0, 0)) {
		say("bad: the first page holds %lx\n", *first);
		return 2;
	}
	if (send(sock, &finished, 4, 0) != 4)
		die("send");
	close(sock);
	say("there\n");
	char go;
	if (read(0, &go, 1) != 1)
		return 1;

	struct thread *threads = calloc(THREADS, sizeof *threads);
	for (int n = 0; n < THREADS; n++) {
		struct thread *t = threads + n;
		t->n = n;
		t->rng = strtoull(argv[3], NULL, 10) * 7919 + n * 104729 + 1;
		t->written = 1L << 40;
		for (uint64_t i = 0; i < SLICE; i++) {
			t->id[i] = n * SLICE + i;
			t->id[SLICE + i] = -1;
		}
		if (pthread_create(&t->thread, NULL, run, t))
			die("pthread_create");
	}
	for (int n = 0; n < THREADS; n++)
		pthread_join(threads[n].thread, NULL);
	wiped(0);
	say("whole\n");
	return 0;
}
