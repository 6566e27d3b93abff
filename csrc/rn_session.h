/* rn_session.h - what the outside may know of a running session: stage cells and counters.
 *
 * One row a stage. The stage writes its own row only; supervisor and monitor read. Counters are kept
 * private in the loop and published once a turn with relaxed stores: a reader sees each value whole,
 * never torn, and a hot loop never misses the cache for a statistic (snabb's lesson, STYLE 2).
 */
#ifndef RN_SESSION_H
#define RN_SESSION_H

#include "rn_event.h"
#include "rn_layout.h"

/* CFFI BEGIN */
enum rn_stage_state {
	RN_ST_ABSENT = 0, /* no process yet */
	RN_ST_READY,	  /* configured, not moving frames */
	RN_ST_RUNNING,
	RN_ST_DRAINING, /* sources closed, emptying its rings */
	RN_ST_ENDED,
	RN_ST_FAILED,
	RN_ST_PAUSED /* told to take no frame: rn_stage_pace() */
};
/* CFFI END */

/* CFFI BEGIN */
#define RN_LATENCY_BUCKETS 64 /* half octaves from 256 ns on: the last begins at 9 minutes */
/* CFFI END */

/* Every counter, declared once in rn_metrics.def. */
enum rn_counter {
#define RN_COUNTER(stage, name, unit, help) RN_C_##name,
#include "rn_metrics.def"
#undef RN_COUNTER
	RN_NCOUNTERS
};

struct rn_cell {
	_Atomic uint32_t pid;
	_Atomic uint32_t generation;
	_Atomic uint32_t state; /* enum rn_stage_state */
	/* S1 release by the supervisor, S2 acquire by the stage: stop now, without a message. */
	_Atomic uint32_t stop;
	_Atomic uint64_t heartbeat_ns; /* CLOCK_MONOTONIC of the last turn */
	_Atomic uint32_t asleep;       /* 1: blocked in epoll_wait, so an old heartbeat is no fault */
	uint32_t reserved[7];
	alignas(RN_CACHE_LINE) _Atomic uint64_t counters[RN_NCOUNTERS];
};
_Static_assert(offsetof(struct rn_cell, counters) == RN_CACHE_LINE, "identity line, then counters");

/* How long frames took to a stage, from another, or within it, from link to socket or back: bucket b counts those of less than rn_latency_bound(b) ns. */
struct rn_latency {
	_Atomic uint64_t bucket[RN_LATENCY_BUCKETS];
};

struct rn_session {
	uint32_t magic, version;
	uint32_t nstages, ncounters;
	alignas(RN_CACHE_LINE) struct rn_cell cells[RN_STAGES_MAX];
	struct rn_event_log log[RN_STAGES_MAX];
	alignas(RN_CACHE_LINE) struct rn_latency latency[RN_STAGES_MAX][RN_STAGES_MAX]; /* [to][from] */
	/* Frames that the link gave and took, each stage's added before it sleeps. relaxed: for rn_busy_wait.c's guesses. */
	alignas(RN_CACHE_LINE) _Atomic uint64_t from_guest;
	_Atomic uint64_t to_guest;
};

/* CFFI BEGIN */
uint64_t rn_session_size(void);
int rn_session_create(void *mem, uint64_t size, uint32_t nstages);
int rn_session_check(const void *mem, uint64_t size); /* as rn_ring_check() */

struct rn_cell_view {
	uint32_t pid, generation, state, stop, asleep;
	uint64_t heartbeat_ns;
};
int rn_cell_read(const void *session, uint64_t size, uint32_t row, struct rn_cell_view *out);
void rn_cell_stop(void *session, uint32_t row);

/* Counter table for Python: number, then name, stage, unit, help by index; NULL past the end. */
uint32_t rn_ncounters(void);
const char *rn_counter_name(uint32_t i);
const char *rn_counter_stage(uint32_t i);
const char *rn_counter_unit(uint32_t i);
const char *rn_counter_help(uint32_t i);
uint64_t rn_counter_read(const void *session, uint64_t size, uint32_t row, uint32_t i);
/* Sampled frames that came to stage @to within bucket @b after they left stage @from. */
uint64_t rn_latency_read(const void *session, uint64_t size, uint32_t from, uint32_t to, uint32_t b);
uint32_t rn_latency_bucket(uint64_t ns);
uint64_t rn_latency_bound(uint32_t b); /* ns; UINT64_MAX for the last bucket */
/* CFFI END */
#endif
