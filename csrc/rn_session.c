/* rn_session.c - stage cells and counters (layout: rn_session.h).
 *
 * Every word is an atomic of its own and is read alone: a reader needs no lock and sees no torn value, but
 * two counters read one after the other need not be of the same turn.
 */
#include "rn_session.h"

#include <errno.h>
#include <string.h>

static const struct counter_text {
	const char *stage, *name, *unit, *help;
} counter_table[] = {
#define RN_COUNTER(stage, name, unit, help) { #stage, #name, #unit, help },
#include "rn_metrics.def"
#undef RN_COUNTER
};
_Static_assert(sizeof(counter_table) / sizeof(counter_table[0]) == RN_NCOUNTERS, "both come from rn_metrics.def");

uint64_t rn_session_size(void)
{
	return sizeof(struct rn_session);
}

int rn_session_create(void *mem, uint64_t size, uint32_t nstages)
{
	struct rn_session *session = mem;

	if (!mem || (uintptr_t)mem % RN_CACHE_LINE || size < sizeof(*session) || !nstages || nstages > RN_STAGES_MAX)
		return -EINVAL;
	memset(session, 0, sizeof(*session));
	session->version = RN_LAYOUT_VERSION;
	session->nstages = nstages;
	session->ncounters = RN_NCOUNTERS;
	session->magic = RN_SESSION_MAGIC;
	return 0;
}

int rn_session_check(const void *mem, uint64_t size)
{
	const volatile struct rn_session *session = mem;

	if (!mem || (uintptr_t)mem % RN_CACHE_LINE)
		return -EINVAL;
	if (size < sizeof(*session))
		return -EMSGSIZE;
	if (session->magic != RN_SESSION_MAGIC || session->version != RN_LAYOUT_VERSION)
		return -EPROTO;
	/* Counters are numbered by the build: another count means another build. */
	if (session->ncounters != RN_NCOUNTERS || session->nstages > RN_STAGES_MAX)
		return -EPROTO;
	return 0;
}

/* 0; as rn_session_check(); -EINVAL if there is no such row. */
int rn_cell_read(const void *mem, uint64_t size, uint32_t row, struct rn_cell_view *out)
{
	const struct rn_session *session = mem;
	const struct rn_cell *cell;
	int err = rn_session_check(mem, size);

	if (err)
		return err;
	if (row >= RN_STAGES_MAX)
		return -EINVAL;
	cell = &session->cells[row];
	out->pid = atomic_load_explicit(&cell->pid, memory_order_relaxed);
	out->generation = atomic_load_explicit(&cell->generation, memory_order_relaxed);
	out->state = atomic_load_explicit(&cell->state, memory_order_relaxed);
	out->stop = atomic_load_explicit(&cell->stop, memory_order_relaxed);
	out->asleep = atomic_load_explicit(&cell->asleep, memory_order_relaxed);
	out->heartbeat_ns = atomic_load_explicit(&cell->heartbeat_ns, memory_order_relaxed);
	return 0;
}

/* The caller rings the stage's doorbell afterwards: the word alone wakes nobody. */
void rn_cell_stop(void *mem, uint32_t row)
{
	struct rn_session *session = mem;

	if (row < RN_STAGES_MAX)
		/* S1: release, pairs S2 in rn_stage_run(). */
		atomic_store_explicit(&session->cells[row].stop, 1, memory_order_release);
}

uint32_t rn_ncounters(void)
{
	return RN_NCOUNTERS;
}

const char *rn_counter_name(uint32_t i)
{
	return i < RN_NCOUNTERS ? counter_table[i].name : NULL;
}

const char *rn_counter_stage(uint32_t i)
{
	return i < RN_NCOUNTERS ? counter_table[i].stage : NULL;
}

const char *rn_counter_unit(uint32_t i)
{
	return i < RN_NCOUNTERS ? counter_table[i].unit : NULL;
}

const char *rn_counter_help(uint32_t i)
{
	return i < RN_NCOUNTERS ? counter_table[i].help : NULL;
}

/* 0 for a counter, row or object that does not exist. */
uint64_t rn_counter_read(const void *mem, uint64_t size, uint32_t row, uint32_t i)
{
	const struct rn_session *session = mem;

	if (row >= RN_STAGES_MAX || i >= RN_NCOUNTERS || rn_session_check(mem, size))
		return 0;
	return atomic_load_explicit(&session->cells[row].counters[i], memory_order_relaxed);
}

/* Bucket 2k holds [2^(k+8), 1.5 * 2^(k+8)), bucket 2k + 1 the rest of the octave; the first holds everything below. */
uint32_t rn_latency_bucket(uint64_t ns)
{
	uint32_t octave, b;

	if (ns < 256)
		return 0;
	octave = 63 - (uint32_t)__builtin_clzll(ns);
	b = 2 * (octave - 8) + (uint32_t)(ns >> (octave - 1) & 1) + 1;
	return b < RN_LATENCY_BUCKETS ? b : RN_LATENCY_BUCKETS - 1;
}

uint64_t rn_latency_bound(uint32_t b)
{
	if (b >= RN_LATENCY_BUCKETS - 1)
		return UINT64_MAX;
	return b % 2 ? 384ull << (b / 2) : 256ull << (b / 2);
}

uint64_t rn_latency_read(const void *mem, uint64_t size, uint32_t from, uint32_t to, uint32_t b)
{
	const struct rn_session *session = mem;

	if (from >= RN_STAGES_MAX || to >= RN_STAGES_MAX || b >= RN_LATENCY_BUCKETS || rn_session_check(mem, size))
		return 0;
	return atomic_load_explicit(&session->latency[to][from].bucket[b], memory_order_relaxed);
}
