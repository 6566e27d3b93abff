/* machine.c - what the machine asks for what every datapath does: a system call, a wake, a copy. The floor under the rest. */
#include "micro.h"

#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PIECE 65536u
#define FAR_BYTES (64u << 20) /* more than the caches hold */

static uint64_t empty_calls(void *ctx, uint32_t n)
{
	uint64_t t = micro_now();

	(void)ctx;
	for (uint32_t i = 0; i < n; i++)
		syscall(SYS_getppid);
	return micro_now() - t;
}

static uint64_t ready_polls(void *ctx, uint32_t n)
{
	int ep = *(int *)ctx;
	struct epoll_event ev[8];
	uint64_t t = micro_now();

	for (uint32_t i = 0; i < n; i++)
		NEED(epoll_wait(ep, ev, 8, 0) == 1);
	return micro_now() - t;
}

static uint64_t bells(void *ctx, uint32_t n)
{
	int fd = *(int *)ctx;
	uint64_t one = 1, t = micro_now();

	for (uint32_t i = 0; i < n; i++)
		NEED(write(fd, &one, 8) == 8 && read(fd, &one, 8) == 8);
	return micro_now() - t;
}

/* --- two threads that wake each other --- */

struct pair {
	int to, back; /* eventfds, blocking */
	int cpu[2];
	uint32_t n;
};

static void pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	NEED(!pthread_setaffinity_np(pthread_self(), sizeof(set), &set));
}

static void *answers(void *ctx)
{
	struct pair *p = ctx;
	uint64_t one;

	pin(p->cpu[1]);
	for (uint32_t i = 0; i < p->n; i++)
		NEED(read(p->to, &one, 8) == 8 && write(p->back, &one, 8) == 8);
	return NULL;
}

/* @n is one way: each round trip is two wakes. */
static uint64_t wakes(void *ctx, uint32_t n)
{
	struct pair *p = ctx;
	uint64_t one = 1, t;
	pthread_t thread;

	p->n = n / 2;
	pin(p->cpu[0]);
	NEED(!pthread_create(&thread, NULL, answers, p));
	t = micro_now();
	for (uint32_t i = 0; i < p->n; i++)
		NEED(write(p->to, &one, 8) == 8 && read(p->back, &one, 8) == 8);
	t = micro_now() - t;
	pthread_join(thread, NULL);
	return t;
}

static void measure_wakes(void)
{
	struct pair p = { eventfd(0, EFD_CLOEXEC), eventfd(0, EFD_CLOEXEC), { -1, -1 }, 0 };
	cpu_set_t were, other;
	int cpus[2], n = 0;

	NEED(p.to >= 0 && p.back >= 0 && !sched_getaffinity(0, sizeof(were), &were));
	other = were;
	for (int cpu = 0; cpu < CPU_SETSIZE && n < 2; cpu++)
		if (CPU_ISSET(cpu, &other))
			cpus[n++] = cpu;
	p.cpu[0] = p.cpu[1] = cpus[0];
	micro("machine", "wake, same core (write, switch, read)", 0, 5000, wakes, &p);
	if (n > 1) {
		p.cpu[1] = cpus[1];
		micro("machine", "wake, another core that sleeps", 0, 5000, wakes, &p);
	}
	NEED(!pthread_setaffinity_np(pthread_self(), sizeof(were), &were));
	close(p.to);
	close(p.back);
}

/* --- copies --- */

struct copy_ctx {
	uint8_t *from, *to;
	uint32_t step, span; /* where the next copy's source is */
};

static uint64_t copies(void *ctx, uint32_t n)
{
	struct copy_ctx *c = ctx;
	uint32_t at = 0;
	uint64_t t = micro_now();

	for (uint32_t i = 0; i < n; i++) {
		memcpy(c->to, c->from + at, PIECE);
		MICRO_USE(c->to);
		at = at + c->step < c->span ? at + c->step : 0;
	}
	return micro_now() - t;
}

/* --- a socket's send and recv of 64 KiB --- */

struct sock_ctx {
	int from, to;
	int receiving;
	uint8_t buf[PIECE];
};

static uint64_t moves(void *ctx, uint32_t n)
{
	struct sock_ctx *c = ctx;
	uint64_t spent = 0;

	for (uint32_t i = 0; i < n; i++) {
		uint64_t t = micro_now();
		uint32_t got = 0;

		NEED(send(c->from, c->buf, PIECE, 0) == PIECE);
		if (!c->receiving)
			spent += micro_now() - t;
		t = micro_now();
		while (got < PIECE) {
			ssize_t k = recv(c->to, c->buf, PIECE - got, 0);

			NEED(k > 0);
			got += (uint32_t)k;
		}
		if (c->receiving)
			spent += micro_now() - t;
	}
	return spent;
}

static void measure_sockets(void)
{
	static struct sock_ctx c;

	micro_tcp_pair(&c.from, &c.to);
	micro("machine", "send() of 64 KiB, TCP on loopback, delivery included", PIECE, 1500, moves, &c);
	c.receiving = 1;
	micro("machine", "recv() of 64 KiB", PIECE, 1500, moves, &c);
	close(c.from);
	close(c.to);
}

void micro_machine(void)
{
	int bell = eventfd(1, EFD_CLOEXEC | EFD_NONBLOCK), ep = epoll_create1(EPOLL_CLOEXEC);
	struct epoll_event ev = { .events = EPOLLIN };
	struct copy_ctx near = { micro_memory(PIECE), micro_memory(PIECE), 0, 1 };
	struct copy_ctx far = { micro_memory(FAR_BYTES), near.to, PIECE, FAR_BYTES };

	NEED(bell >= 0 && ep >= 0 && !epoll_ctl(ep, EPOLL_CTL_ADD, bell, &ev));
	micro("machine", "system call that does nothing", 0, 100000, empty_calls, NULL);
	micro("machine", "epoll_wait() with one ready", 0, 50000, ready_polls, &ep);
	micro("machine", "doorbell rung and quieted, nobody asleep", 0, 50000, bells, &bell);
	measure_wakes();
	micro("machine", "copy of 64 KiB, in cache", PIECE, 4000, copies, &near);
	micro("machine", "copy of 64 KiB, out of memory", PIECE, 2000, copies, &far);
	measure_sockets();
	close(bell);
	close(ep);
}
