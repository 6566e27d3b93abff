/* rn_event.h - what a stage decided lately, and about whom: a log a stage, in the session's shared memory.
 *
 * Always on. A decision is noted, not a frame: dropped (by which counter), refused, opened, ended. The log is a ring
 * that its stage alone writes and never waits for; whoever reads takes what is whole. It lies in the session object, so
 * it is there after the stage has crashed (docs/debugging.md).
 *
 * One of the writer's events takes a line and a half and about 10 ns; what repeats is noted a few times in each
 * NOTE_WINDOW_NS and counted meanwhile (rn_stage.c), so a flood of one kind leaves the others readable.
 */
#ifndef RN_EVENT_H
#define RN_EVENT_H

#include "rn_layout.h"

/* CFFI BEGIN */
#define RN_EVENTS 2048 /* kept a stage; a power of two */
#define RN_NO_FLOW 4294967295
#define RN_NO_COUNTER 65535

enum rn_event_kind {
	RN_DID_START = 1, /* a process took the seat: value is its generation */
	RN_DID_COUNT,	  /* a counter of note went up by n, lately by this one */
	RN_DID_REFUSE,	  /* a flow the guest asked for is not made: value is an errno */
	RN_DID_OPEN,	  /* an entry of the flow table is in use */
	RN_DID_END	  /* and free again: value is its age, ns */
};

struct rn_event_view {
	uint64_t number; /* counts the stage's events, from 1 */
	uint64_t at_ns;	 /* CLOCK_MONOTONIC, of the turn */
	uint16_t kind;	 /* enum rn_event_kind */
	uint16_t counter;
	uint32_t n;
	uint32_t flow, flow_gen; /* RN_NO_FLOW: none */
	uint64_t value;
	uint8_t guest[16], peer[16]; /* v4-mapped; all zero: not known */
	uint16_t guest_port, peer_port;
	uint8_t proto; /* IP protocol, 0: not known */
	uint8_t pad[3];
};
/* CFFI END */

struct rn_event {
	/* E1 release by the stage, E2 acquire by a reader: number + 1 when the rest is whole, 0 while it is written. */
	_Atomic uint64_t whole;
	struct rn_event_view v;
};

struct rn_event_log {
	/* E3 release by the stage, E4 acquire by a reader: events ever. */
	alignas(RN_CACHE_LINE) _Atomic uint64_t count;
	alignas(RN_CACHE_LINE) struct rn_event ring[RN_EVENTS];
};
_Static_assert((RN_EVENTS & (RN_EVENTS - 1)) == 0, "a slot is number & (RN_EVENTS - 1)");

/* By the stage: the number it got. @ev's number is filled in. */
uint64_t rn_event_put(struct rn_event_log *log, struct rn_event_view *ev);

/* CFFI BEGIN */
/* Events that stage @row ever noted, 0 if there is no such row or object. */
uint64_t rn_events_count(const void *session, uint64_t size, uint32_t row);
/* Event @number of a stage: 0; -ENOENT: overwritten, or not there yet; -EINVAL: no such row or object. */
int rn_events_read(const void *session, uint64_t size, uint32_t row, uint64_t number, struct rn_event_view *out);
/* CFFI END */
#endif
