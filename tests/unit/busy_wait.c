/* busy_wait.c - rn_busy_wait.c on a clock of the test's: the linker puts these functions in the place of the kernel's. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>

#include "rn_session.h"
#include "rn_stage.h"

#define US 1000ull
#define MS 1000000ull
#define MUST(what) \
	do { \
		if (!(what)) { \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what); \
			exit(1); \
		} \
	} while (0)

static uint64_t now = 1000 * MS, event_at, yield_ns, looks;
static struct rn_stage *s;
static struct epoll_event ev[4];

int __wrap_clock_gettime(clockid_t which, struct timespec *t);
int __wrap_clock_gettime(clockid_t which, struct timespec *t)
{
	(void)which;
	t->tv_sec = (time_t)(now / 1000000000u);
	t->tv_nsec = (long)(now % 1000000000u);
	return 0;
}

int __wrap_epoll_wait(int ep, struct epoll_event *e, int max, int ms);
int __wrap_epoll_wait(int ep, struct epoll_event *e, int max, int ms)
{
	(void)ep;
	MUST(max == 4 && !ms && e == ev);
	looks++;
	now += US / 2;
	return event_at && now >= event_at;
}

int __wrap_sched_yield(void);
int __wrap_sched_yield(void)
{
	now += yield_ns;
	return 0;
}

/* One wait: something comes after @after ns, both ways since the last one if @both, the wait of before was @last ns long. */
static int wait_for(uint64_t after, int both, uint64_t last)
{
	uint64_t began = now;
	int n;

	s->busy.up_here += 1;
	s->busy.down_here += (uint64_t)both;
	rn_busy_tell(s);
	event_at = now + after;
	s->busy.last_ns = last;
	looks = 0;
	n = rn_busy_wait(s, ev, 4, began, UINT64_MAX);
	if (!n && now < event_at)
		now = event_at; /* asleep until then */
	return n;
}

/* So many waits pay, one after the other. */
static void pays(uint32_t n, uint64_t after)
{
	for (uint32_t i = 0; i < n; i++)
		MUST(wait_for(after, 1, 20 * US) == 1);
}

/* It is held off: until a wait pays again. ns. */
static uint64_t held_off(void)
{
	uint64_t began = now;

	while (!wait_for(20 * US, 1, 20 * US))
		MUST(!looks);
	return now - began;
}

static void in_turn(void)
{
	uint64_t before = s->c[RN_C_busy_waits];

	pays(1000, 20 * US);
	MUST(s->c[RN_C_busy_waits] == before + 1000);
}

static void one_way(void)
{
	pays(1, 20 * US);
	now += 200 * US; /* the last frame to the guest is long ago */
	for (int i = 0; i < 100; i++)
		MUST(!wait_for(20 * US, 0, 20 * US) && !looks);
	pays(1, 20 * US);
}

static void after_a_long_wait(void)
{
	MUST(!wait_for(20 * US, 1, 500 * US) && !looks);
	pays(1, 20 * US);
}

static void in_vain(void)
{
	uint64_t least = 2 * MS;

	for (int round = 0; round < 10; round++) {
		for (int i = 0; i < 3; i++)
			MUST(!wait_for(100 * US, 1, 20 * US) && looks);
		uint64_t off = held_off();

		MUST(off + 100 * US >= least && off < least + 200 * US);
		least *= least < 128 * MS ? 2 : 1;
	}
}

static void when_others_need_the_cpu(void)
{
	for (int i = 0; i < 2; i++) {
		uint64_t off;

		yield_ns = 3 * MS;
		MUST(!wait_for(20 * US, 1, 20 * US) && looks == 1);
		yield_ns = 0;
		off = held_off();
		MUST(off >= 10 * MS && off < 11 * MS);
		pays(10000, 20 * US); /* over a hundred ms: what comes then is another matter */
	}
	yield_ns = 100 * US; /* one who answers */
	MUST(wait_for(90 * US, 1, 20 * US) == 1 || looks == 2);
	yield_ns = 0;
}

static void a_stream(void)
{
	uint64_t began;

	pays(16, 2 * US);
	began = now;
	while (!wait_for(2 * US, 1, 2 * US))
		MUST(!looks);
	MUST(now - began >= MS && now - began < MS + 100 * US);
}

static void a_timer(void)
{
	uint64_t began = now;

	pays(1, 20 * US);
	s->busy.up_here = s->busy.down_here = 1;
	rn_busy_tell(s);
	event_at = 0;
	began = now;
	for (int i = 0; i < 10; i++) { /* is no vain wait */
		MUST(!rn_busy_wait(s, ev, 4, now, now + 10 * US));
		s->busy.last_ns = 10 * US;
	}
	MUST(now - began >= 100 * US && now - began < 120 * US);
	pays(1, 20 * US);
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*run)(void);
	} checks[] = { { "in_turn", in_turn }, { "one_way", one_way }, { "after_a_long_wait", after_a_long_wait },
		       { "in_vain", in_vain }, { "when_others_need_the_cpu", when_others_need_the_cpu }, { "a_stream", a_stream },
		       { "a_timer", a_timer } };
	void *session = aligned_alloc(4096, (rn_session_size() + 4095) / 4096 * 4096);

	MUST(argc == 2 && session && !rn_session_create(session, rn_session_size(), 2));
	s = rn_stage_new(0, 1);
	MUST(s && !rn_stage_set_session(s, session, rn_session_size()) && !rn_stage_busy_wait(s, 60));
	s->c[RN_C_busy_waits] = 0;
	for (size_t i = 0; i < sizeof(checks) / sizeof(checks[0]); i++)
		if (!strcmp(argv[1], checks[i].name)) {
			checks[i].run();
			rn_stage_free(s);
			free(session);
			printf("done\n");
			return 0;
		}
	fprintf(stderr, "no check %s\n", argv[1]);
	return 1;
}
