/* rn_busy_wait.h - looking on for a moment before going to sleep, while guest and host talk in turn.
 *
 * A wake of a sleeping process costs 10 to 20 us until it runs, most of what a request and its answer need on one machine:
 * a CPU leaves its idle state, and in a virtual machine that is an exit. So a stage that has nothing to do looks at its
 * descriptors for at most most_ns before it blocks, as hypervisors (halt polling) and network drivers (busy polling) do. It
 * does so only where it is likely to pay:
 *
 *   in turn    Frames went both ways within the last moments. A stream that goes one way is better off asleep: what comes
 *              meanwhile is a batch.
 *   soon	The last wait was short. After VAIN waits that were too long for it there is none for a while, longer each time.
 *   idle CPU   Between looks the CPU is offered to others (sched_yield). If one took it for long, others need it: none for a while.
 *   no stream  After QUICK waits of less than QUICK_NS things come as fast as they are dealt with: asleep they are a batch.
 */
#ifndef RN_BUSY_WAIT_H
#define RN_BUSY_WAIT_H

#include <stdint.h>

struct epoll_event;
struct rn_stage;

struct rn_busy_wait {
	uint64_t most_ns;	/* 0: never */
	uint64_t last_ns;	/* how long the last wait was, with sleep */
	uint64_t not_before;	/* CLOCK_MONOTONIC ns */
	uint64_t up, down;	/* frames from and to the guest, of the session, as last seen, */
	uint64_t up_at, down_at; /* and when they were seen to have grown */
	uint64_t up_here, down_here; /* moved by this stage, and not told the session yet */
	uint64_t held_ns;	/* how long it was, when it was held off last */
	uint32_t vain, quick, backoff;
};

/* This stage goes to sleep, or is about to. */
void rn_busy_tell(struct rn_stage *s);
/* Look until something is ready, @deadline, or it does not pay any more. Events, 0: sleep now, or -1 and errno. */
int rn_busy_wait(struct rn_stage *s, struct epoll_event *ev, int max, uint64_t began, uint64_t deadline);

#endif
